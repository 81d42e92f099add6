# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Which sites of a model have an unknown normalizer, what it depends on, and what learning them takes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from numpyro.distributions import ImproperUniform
from numpyro.infer.inspect import get_model_relations
from numpyro.primitives import Messenger

from numpyro_ebm._compat import layers
from numpyro_ebm.distributions.energy import BaseMeasure, TiltedDistribution


@dataclass(frozen=True)
class SiteReport:
    """What :func:`check_model` found at one site."""

    #: name of the site
    name: str
    #: name of its distribution, without what plates and masks wrap around it
    distribution: str
    #: whether its normalizer is unknown
    is_energy: bool
    #: param sites that its density depends on
    params: tuple[str, ...]
    #: latent sites that its density depends on
    latents: tuple[str, ...]
    #: whether no engine can learn it yet
    refused: bool
    #: what learning it takes, in words
    verdict: str
    #: the flat sites that it couples into a random field with parameters, if it is a factor that does
    couples: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelReport:
    """What :func:`check_model` found in a model; printed as a table."""

    #: one report per sample site, in the order of the model
    sites: tuple[SiteReport, ...]

    @property
    def needs_negative_phase(self) -> bool:
        """Whether plain ``SVI`` would need a derivative of an unknown normalizer."""
        return self.is_random_field or any(site.is_energy and site.params for site in self.sites)

    @property
    def is_random_field(self) -> bool:
        """Whether factors couple flat sites into a random field with parameters: the model has one joint normalizer."""
        return any(site.couples and not site.refused for site in self.sites)

    def __str__(self) -> str:
        rows = [("site", "distribution", "verdict"), *((s.name, s.distribution, s.verdict) for s in self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows)


def check_model(model: Callable[..., Any], *args: Any, **kwargs: Any) -> ModelReport:
    """Tells, before anything runs, which sites have an unknown normalizer and what learning the model takes.

    It reads NumPyro's own model relations; the model is traced abstractly and nothing is computed.

    :param model: a NumPyro model.
    :param args: its arguments.
    :return: one :class:`SiteReport` per sample site, in order; ``print`` it.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import TiltedDistribution, check_model
        >>> def model(y):
        ...     tilt = numpyro.param("tilt", 0.0)
        ...     z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
        ...     numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> print(check_model(model, jnp.array(1.0)))
        site  distribution        verdict
        z     TiltedDistribution  unknown normalizer, depends on param 'tilt': learn it under negative_phase
        y     Normal              normalized
    """
    recorder = _record_sites(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"init_to_median\(\) skipping")  # the recorder gave the site its value
        relations = get_model_relations(recorder, model_args=args, model_kwargs=kwargs)
    return ModelReport(tuple(_report_site(name, recorder, relations) for name in recorder.found))


class _record_sites(Messenger):
    """Notes what stands at each sample site while NumPyro traces the model, and gives flat and energy sites a value."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.found: dict[str, tuple[Any, bool, bool]] = {}  # distribution, whether observed, whether inside scan
        self.has_pool = False  # whether a handler inside has added the normalizer of a random field
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        fn = _core(msg["fn"]) if msg["type"] == "sample" else None
        if msg.get("value") is None and isinstance(fn, (BaseMeasure, TiltedDistribution)):
            whole = msg["fn"]
            msg["value"] = whole.support.feasible_like(jnp.zeros(whole.shape()))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample":
            return
        if msg["name"].endswith("/log_normalizer"):  # what negative_phase adds
            self.has_pool |= msg["name"].endswith("random_field/log_normalizer")
        else:
            self.found[msg["name"]] = (_core(msg["fn"]), msg["is_observed"], msg.get("_control_flow_done", False))


def _core(fn: Any) -> Any:
    """What a site's distribution is, under what plates, masks and users wrapped around it."""
    parts = list(layers(fn))
    return next((part for part in parts if isinstance(part, TiltedDistribution)), parts[-1])


def _report_site(name: str, recorder: _record_sites, relations: dict[str, Any]) -> SiteReport:
    found = recorder.found
    fn, _, in_scan = found[name]
    kind = type(fn).__name__
    parents = [p for p in _parents(name, relations["sample_sample"], relations["sample_dist"]) if p in found]
    params = tuple(sorted(relations["sample_param"][name]))
    latents = tuple(parent for parent in parents if not found[parent][1])
    flat = [parent for parent in (*parents, name) if isinstance(found[parent][0], BaseMeasure)]
    if isinstance(fn, TiltedDistribution) and not fn.is_normalized:
        if in_scan:
            verdict = "unknown normalizer inside scan: negative_phase cannot tell whether it depends on the carry and refuses it"
            return SiteReport(name, kind, True, params, latents, True, verdict)
        refused = bool(latents)
        return SiteReport(name, kind, True, params, latents, refused, _verdict_on_energy(params, latents, fn.guarded))
    if kind == "Unit" and flat and (all_params := _params_behind(name, relations)):
        why = _why_no_field(found)
        field = f"couples the flat sites {_quoted(flat)} into a random field whose unknown normalizer depends on param "
        fix = "a handler adds it" if recorder.has_pool else why or "learn it under negative_phase"
        couples = () if recorder.has_pool else tuple(flat)
        return SiteReport(name, kind, False, params, latents, why is not None, f"{field}{_quoted(all_params)}: {fix}", couples)
    return SiteReport(name, kind, False, params, latents, False, _verdict_on_the_rest(fn, kind, params))


def _params_behind(name: str, relations: dict[str, Any]) -> tuple[str, ...]:
    """The param sites of a site's density and of those that it depends on, directly or not."""
    behind, found = [name], set[str]()
    for site in behind:
        found.update(relations["sample_param"][site])
        behind.extend(parent for parent in relations["sample_sample"][site] if parent not in behind)
    return tuple(sorted(found))


def _why_no_field(found: dict[str, tuple[Any, bool, bool]]) -> str | None:
    """Why the sites of a model cannot be the values of a random field's pool, and the fix."""
    for name, (fn, _, in_scan) in found.items():
        if in_scan:
            return f"site '{name}' stands inside scan, where it cannot be told what depends on what: write the steps as a plate"
        if isinstance(fn, TiltedDistribution) and not fn.is_normalized:
            return f"site '{name}' is an energy site: make it a BaseMeasure and put its energy into a factor"
        if type(fn).__name__ != "Unit" and fn.support.is_discrete:
            return (
                f"site '{name}' is discrete, and the pool of a field moves by scores: sum it out of the energy, or write the field "
                "as one EnergyDistribution site with a sampler of your own"
            )
    return None


def _verdict_on_the_rest(fn: Any, kind: str, params: tuple[str, ...]) -> str:
    if isinstance(fn, ImproperUniform):
        return "flat"
    if kind != "Unit":
        return "normalized"
    return "factor" + (f", depends on param {_quoted(params)}: right only if it is a normalized log density" if params else "")


def _verdict_on_energy(params: tuple[str, ...], latents: tuple[str, ...], guarded: bool) -> str:
    if latents:
        return (
            f"its unknown normalizer depends on latent site {_quoted(latents)} (doubly intractable), which no engine "
            "handles: make what it depends on a numpyro.param, or fix it"
        )
    if params and not guarded:
        return f"unknown normalizer, depends on param {_quoted(params)}: a handler has lifted the guard"
    if params:
        return f"unknown normalizer, depends on param {_quoted(params)}: learn it under negative_phase"
    return "unknown normalizer, but fixed: every engine is right as it is"


def _parents(name: str, sample_sample: dict[str, list[str]], kinds: dict[str, str]) -> list[str]:
    """The sample sites that a site's density depends on; deterministic sites are looked through."""
    parents: list[str] = []
    for parent in sample_sample[name]:
        found = _parents(parent, sample_sample, kinds) if kinds[parent] == "Deterministic" else [parent]
        parents.extend(site for site in found if site not in parents and site != name)
    return parents


def _quoted(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)
