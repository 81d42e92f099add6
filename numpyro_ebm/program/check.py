# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Which sites of a model have an unknown normalizer, what it depends on, and what is needed to learn them."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
from numpyro.distributions import ImproperUniform, TransformedDistribution
from numpyro.handlers import block, seed, substitute

from numpyro_ebm._compat import is_in_scan, layers, one_at_a_time, open_handler, scan_index, sites_named
from numpyro_ebm.distributions.base_measure import BaseMeasure, is_flat
from numpyro_ebm.distributions.energy import TiltedDistribution, energy_site
from numpyro_ebm.distributions.guard import NormalizerError
from numpyro_ebm.program.identify import scale_and_shift
from numpyro_ebm.program.minibatch import rows_given, taking_rows
from numpyro_ebm.program.provenance import mark, sources_of
from numpyro_ebm.program.scale import Scales, scales_of
from numpyro_ebm.program.sites import FIELD, core_of, is_factor, is_normalizer, normalizer_name, require_events, stand_in


@dataclass(frozen=True)
class SiteReport:
    """What :func:`check_model` found at one site."""

    #: name of the site
    name: str
    #: name of its distribution, without what plates and masks wrap around it
    distribution: str
    #: whether its normalizer is unknown
    is_energy: bool
    #: param sites that its density depends on, or its normalizer if that is unknown
    params: tuple[str, ...]
    #: latent sites that its density depends on, or its normalizer if that is unknown
    latents: tuple[str, ...]
    #: whether no engine can learn it yet
    refused: bool
    #: what learning it takes, in words
    verdict: str
    #: the flat sites that it couples into a random field with parameters, if it is a factor that does
    couples: tuple[str, ...] = ()
    #: whether its unknown normalizer depends on the model's first argument, the visible of engines that match scores
    of_first_argument: bool = False
    #: param and latent sites that scale or shift it wherever it enters, where its own density is learned: the two may not be
    #: identified. :func:`check_model` alone looks for them
    absorbed: tuple[str, ...] = ()
    #: whether it has data
    is_observed: bool = False
    #: param sites that the base of its energy depends on
    of_base: tuple[str, ...] = ()
    #: how far data are from the base of its energy, in words, where that is too far. :func:`check_model` alone looks for it
    distant: str = ""


@dataclass(frozen=True)
class ModelReport:
    """What :func:`check_model` found in a model; printed as a table."""

    #: one report per sample site, in the order of the model
    sites: tuple[SiteReport, ...]

    @property
    def needs_negative_phase(self) -> bool:
        """Whether plain ``SVI`` would need a derivative of an unknown normalizer."""
        return bool(self.learned)

    @property
    def learned(self) -> tuple[SiteReport, ...]:
        """The sites whose unknown normalizer has a derivative in the parameters."""
        return tuple(site for site in self.sites if (site.is_energy and site.params) or site.couples)

    @property
    def is_random_field(self) -> bool:
        """Whether factors couple flat sites into a random field with parameters: the model has one joint normalizer."""
        return any(site.couples and not site.refused for site in self.sites)

    def require_learnable(self) -> None:
        """Refuses what no gradient can learn.

        :raises NormalizerError: naming the sites.
        """
        self._refuse([(site, site.verdict) for site in self.sites if site.refused])

    def require_scores(self) -> None:
        """Refuses what the scores of the first argument, or a guide together with them, cannot learn.

        :raises NormalizerError: naming the sites.
        """
        of_visible = (
            "its unknown normalizer depends on the first argument, the visible, whose score lacks its derivative: write the site "
            "as a distribution with a known normalizer, or the whole as one energy of the visible"
        )
        energies = [site for site in self.sites if site.is_energy]
        self._refuse([(site, site.verdict) for site in energies if site.latents])
        self._refuse([(site, of_visible) for site in energies if site.of_first_argument])

    def _refuse(self, found: list[tuple[SiteReport, str]]) -> None:
        if found:
            raise NormalizerError("\n".join(f"site '{site.name}': {why}" for site, why in found))

    def __str__(self) -> str:
        rows = [("site", "distribution", "verdict"), *((s.name, s.distribution, s.verdict) for s in self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows)


def check_model(model: Callable[..., Any], *args: Any, **kwargs: Any) -> ModelReport:
    """Tells, before anything runs, which sites have an unknown normalizer and what is needed to learn the model.

    The model is traced abstractly, every param and every value marked where it arises: what a density or a normalizer is made of is
    told through deterministic sites, handlers and functions. Computed is one thing alone: whether data are on the scale of the base
    of a learned energy, from 64 samples of the model with bases in the place of energies. Data of an observed energy are compared
    with its base (with its reference where that is flat), those of a latent one with what the model predicts for them, where no
    param may move that. Right is a mean at most 5 standard deviations away, and a spread between a twentieth and 20 times.

    :param model: a NumPyro model, with handlers around it or not.
    :param args: its arguments.
    :return: one :class:`SiteReport` per sample site, in order; ``print`` it.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import TiltedDistribution, check_model
        >>> def model(y):
        ...     tilt = numpyro.param("tilt", 0.0)
        ...     z = numpyro.sample(
        ...         "z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z)
        ...     )
        ...     numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> print(check_model(model, jnp.array(1.0)))
        site  distribution        verdict
        z     TiltedDistribution  unknown normalizer, depends on param 'tilt': learn it under negative_phase
        y     Normal              normalized
    """
    try:
        report = check_run(model, args, kwargs, mark_visible=True, identify=True)
    except _NEEDS_VALUES:  # the model looks at the values of its first argument, as no engine that compiles it would let it
        report = check_run(model, args, kwargs, identify=True)
    return _with_scales(report, model, args, kwargs)


def _with_scales(report: ModelReport, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelReport:
    """The same, and what data are too far from the base of an energy that is learned."""
    sites = {site.name: site for site in report.sites}
    learned = {site.name for site in report.learned if site.is_energy and not site.of_base}
    compared = {
        site.name: learned & {site.name, *site.latents}
        for site in report.sites
        if site.is_observed and learned & {site.name, *site.latents} and _is_fixed(site, sites)
    }
    far = {data: scales for data, scales in scales_of(model, args, kwargs, compared).items() if scales.are_far}
    for data, scales in far.items():
        for energy in compared[data]:
            site = sites[energy]
            distant = _distant(energy, data, scales)
            sites[energy] = replace(site, distant=distant, verdict=f"{site.verdict}. {distant}")
    return ModelReport(tuple(sites.values()))


def _is_fixed(site: SiteReport, sites: Mapping[str, SiteReport]) -> bool:
    """Whether no param moves a site, or the latents that it depends on, but through their energies."""
    if site.is_energy:
        return not site.of_base
    return not site.params and all(_is_fixed(sites[latent], sites) for latent in site.latents)


def _distant(energy: str, data: str, scales: Scales) -> str:
    what = "its base" if energy == data else f"what the model predicts at samples of its base for site '{data}'"
    return f"In units of {what}, {scales}. Standardize the data, or give a base on their scale"


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_VISIBLE = "(first argument)"
_BASE = "(base of) "  # beside the densities of sites, that of the base of an energy
_CORE = "(core of) "  # the value of a latent with an energy, before the transforms of its distribution


def check_run(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    data: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
    mark_visible: bool = False,
    identify: bool = False,
) -> ModelReport:
    """The report of a model; its own errors are raised as they are, since no engine could run it either.

    :param data: values of param and mutable sites and indices of plates, by name; the model's own where missing.
    :param kinds: what handlers outside make of sites: ``"param"``, ``"latent"`` or ``"observed"``, by name.
    :param mark_visible: whether to tell what depends on the first argument, of which the model may then know no value.
    :param identify: whether to tell what a learned prior can do itself.
    """
    look, outside = _look(), open_handler(rows_given)  # which a block would hide

    def run() -> dict[str, Any]:
        first = mark(args[:1], _VISIBLE) if mark_visible else args[:1]
        given = jax.tree.map(lambda x: x, dict(data or {}))  # in containers of its own: mutable sites are updated in place
        rows = nullcontext() if outside is None else rows_given(outside.batch)
        with one_at_a_time, sites_named(), block(), seed(rng_seed=0), look, substitute(data=given), rows:
            taking_rows(model)(*first, *args[1:], **kwargs)
        densities, look.densities = look.densities, {}  # what is traced ends with the trace
        return densities

    try:
        jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)()
    except Exception as error:
        error.add_note("The model was run on abstract values, to tell what its energies depend on.")
        raise
    structure = jax.tree.structure(shapes)
    densities = jax.tree.unflatten(structure, sources_of(jaxpr))
    return _Report(look, densities, kinds or {}, jaxpr if identify else None).of_model()


class _look(substitute):
    """Notes what stands at each sample site and what its density is made of, with every param and value marked by its site.

    The density of an energy is taken at an event of no site: what is left in it is what its normalizer depends on.
    """

    def __init__(self) -> None:
        self.found: dict[str, _Found] = {}
        self.densities: dict[str, Any] = {}
        self.params: set[str] = set()
        self.has_pool = False  # whether a handler inside has added the normalizer of a random field
        super().__init__(substitute_fn=self._value)

    def _value(self, msg: dict[str, Any]) -> Any:
        if msg["type"] != "sample" or is_factor(msg["fn"]):
            return None
        value, in_scan = msg["value"], scan_index(msg) is not None
        if value is None:
            shape = msg["kwargs"].get("sample_shape", ())
            value = stand_in(msg["fn"], shape) if _is_undrawable(msg["fn"]) else msg["fn"].sample(jax.random.key(0), shape)
        elif in_scan:
            return None
        if energy_site(msg["fn"]) is not None and not msg["is_observed"]:
            value = _by_transforms(msg["fn"], value, _CORE + msg["name"])
        return mark(value, msg["name"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "param":
            self.params.add(msg["name"])
            msg["value"] = mark(msg["value"], msg["name"], learned=True)
        if msg["type"] != "sample":
            return
        name = msg["name"]
        if is_normalizer(name):  # what negative_phase adds
            self.has_pool |= name.endswith(normalizer_name(FIELD))
        else:
            if msg["is_observed"] and not is_factor(msg["fn"]):
                require_events(msg)
            self.found[name] = _found(msg)
            self.densities[name] = _density(msg)
            energy = energy_site(msg["fn"])
            if energy is not None and not is_flat(energy.base) and energy_site(energy.base) is None:
                self.densities[_BASE + name] = energy.base.log_prob(stand_in(energy))


class _Found(NamedTuple):
    """What there is to say of a sample site: no value of it, which is traced, is kept."""

    kind: str  # of its distribution, without what plates and masks wrap around it
    is_energy: bool
    is_guarded: bool
    is_flat: bool
    is_improper: bool
    is_discrete: bool
    is_observed: bool
    in_scan: bool
    plates: frozenset[str]


def _found(msg: dict[str, Any]) -> _Found:
    fn = core_of(msg["fn"])
    return _Found(
        type(fn).__name__,
        is_energy=isinstance(fn, TiltedDistribution) and not fn.is_normalized,
        is_guarded=isinstance(fn, TiltedDistribution) and fn.guarded,
        is_flat=isinstance(fn, BaseMeasure),
        is_improper=isinstance(fn, ImproperUniform),
        is_discrete=not is_factor(fn) and fn.support.is_discrete,
        is_observed=msg["is_observed"],
        in_scan=is_in_scan(msg),
        plates=frozenset(frame.name for frame in msg["cond_indep_stack"]),
    )


def _density(msg: dict[str, Any]) -> Any:
    energy = energy_site(msg["fn"])
    if energy is None:
        return msg["fn"].log_prob(msg["value"])
    bounds = [bound for bound in jax.tree.leaves(energy.support) if isinstance(bound, jax.Array)]
    return energy._log_density(stand_in(energy)), bounds


def _by_transforms(fn: Any, value: Any, core: str) -> Any:
    """The same value, as the transforms around an energy make it of the energy's own, which is marked by ``core``."""
    transforms = [t for part in layers(fn) if isinstance(part, TransformedDistribution) for t in reversed(part.transforms)]
    for transform in transforms:
        value = transform.inv(value)
    value = mark(value, core)
    for transform in reversed(transforms):
        value = transform(value)
    return value


def _is_undrawable(fn: Any) -> bool:
    return isinstance(core_of(fn), (ImproperUniform, TiltedDistribution))


class _Report:
    """What was found, and what depends on what, as reports of sites."""

    def __init__(self, look: _look, densities: dict[str, Any], kinds: Mapping[str, str], jaxpr: Any) -> None:
        self.jaxpr = jaxpr
        self.found, self.params, self.has_pool = look.found, look.params, look.has_pool
        self.behind = {name: frozenset[str]().union(*jax.tree.leaves(marks)) for name, marks in densities.items()}
        known = {name: "observed" if site.is_observed else "latent" for name, site in look.found.items()}
        self.kinds = {**dict.fromkeys(look.params, "param"), **known, **kinds}

    def of_model(self) -> ModelReport:
        return ModelReport(tuple(self._of_site(name) for name in self.found))

    def _of_site(self, name: str) -> SiteReport:
        site = self.found[name]
        kind = site.kind
        parents = self._parents(name)
        params, latents = self._of_kind("param", parents), self._of_kind("latent", parents)
        report = partial(SiteReport, name, kind, site.is_energy, params, latents, is_observed=self.kinds[name] == "observed")
        if site.is_energy:
            given = _VISIBLE in self.behind[name]
            refused = bool(latents or (params and site.in_scan))
            absorbed = self._absorbed(name) if params and not refused else ()
            verdict = _verdict_on_energy(params, latents, site, given) + _verdict_on_absorbed(absorbed)
            of_base = tuple(sorted(self.params & self.behind.get(_BASE + name, frozenset())))
            return report(refused, verdict, of_first_argument=given, absorbed=absorbed, of_base=of_base)
        flat = tuple(parent for parent in (*parents, name) if parent in self.found and self.found[parent].is_flat)
        if kind == "Unit" and flat and (all_params := self._params_behind(name)):
            why = _why_no_field(self.found)
            field = f"couples the flat sites {_quoted(flat)} into a random field whose unknown normalizer depends on param "
            fix = "a handler adds it" if self.has_pool else why or "learn it under negative_phase"
            return report(why is not None, f"{field}{_quoted(all_params)}: {fix}", () if self.has_pool else flat)
        return report(False, _verdict_on_the_rest(site, params))

    def _absorbed(self, name: str) -> tuple[str, ...]:
        """What scales or shifts a latent: params of the base that an energy tilts; or in transforms around the energy and wherever
        the latent enters, params, and latents that are of more than one of its events.
        """
        if self.jaxpr is None or self.kinds[name] != "latent":
            return ()
        if own := self.params & self.behind.get(_BASE + name, frozenset()):  # beside params of the energy alone
            return tuple(sorted(own)) if own < self.params & self.behind[name] else ()
        plates = self.found[name].plates
        shared = {site for site, found in self.found.items() if self.kinds[site] == "latent" and found.plates < plates}
        return scale_and_shift(self.jaxpr, _CORE + name, self.params | shared)

    def _parents(self, name: str) -> list[str]:
        """What a site's density depends on, its normalizer if that is unknown, in the order of the model."""
        marks = self.behind[name]
        own = set() if self.found[name].is_energy else {name}  # an energy depends on its own site by the carry of a scan alone
        hidden = marks - self.kinds.keys() - {_VISIBLE}  # sites of a scan that has a scope around it
        return [
            site
            for site in self.kinds
            if site not in own and (site in marks or (hidden and site in self.found and self.found[site].in_scan))
        ]

    def _of_kind(self, kind: str, names: list[str]) -> tuple[str, ...]:
        found = [name for name in names if self.kinds[name] == kind]
        return tuple(sorted(found) if kind == "param" else found)

    def _params_behind(self, name: str) -> tuple[str, ...]:
        """The param sites of a site's density and of those that it depends on, lifted or not, directly or not."""
        behind = [name]
        for site in behind:
            behind.extend(parent for parent in self._parents(site) if parent not in behind and parent in self.found)
        return tuple(sorted({param for site in behind for param in self._parents(site) if param in self.params}))


def _why_no_field(found: dict[str, _Found]) -> str | None:
    """Why the sites of a model cannot be the values of a random field's pool, and the fix."""
    for name, site in found.items():
        if site.in_scan:
            return f"site '{name}' stands inside scan or cond, where it cannot be told what depends on what: write steps as a plate"
        if site.is_energy:
            return f"site '{name}' is an energy site: make it a BaseMeasure and put its energy into a factor"
        if site.is_discrete:
            return (
                f"site '{name}' is discrete, and the pool of a field moves by scores: sum it out of the energy, or write the field "
                "as one EnergyDistribution site with a sampler of your own"
            )
    return None


def _verdict_on_the_rest(site: _Found, params: tuple[str, ...]) -> str:
    if site.is_improper:
        return "flat"
    if site.kind != "Unit":
        return "normalized"
    return "factor" + (f", depends on param {_quoted(params)}: right only if it is a normalized log density" if params else "")


def _verdict_on_energy(params: tuple[str, ...], latents: tuple[str, ...], site: _Found, given: bool) -> str:
    if site.in_scan and (params or latents):
        return "unknown normalizer inside scan or cond: negative_phase cannot tell whether it depends on a carry and refuses it"
    if latents:
        return (
            f"its unknown normalizer depends on latent site {_quoted(latents)} (doubly intractable), which no engine "
            "handles: make what it depends on a numpyro.param, or fix it"
        )
    if params and not site.is_guarded:
        return f"unknown normalizer, depends on param {_quoted(params)}: a handler has lifted the guard"
    if params:
        return f"unknown normalizer, depends on param {_quoted(params)}: learn it under negative_phase"
    if given:
        return "unknown normalizer, fixed by the first argument: right as it is, but not for the score of that argument"
    return "unknown normalizer, but fixed: every engine is right as it is"


def _verdict_on_absorbed(absorbed: tuple[str, ...]) -> str:
    if not absorbed:
        return ""
    return (
        f". The model scales or shifts it by {_quoted(absorbed)} wherever it uses it, and its learned density can do the same: one "
        f"of the two may not be identified. Fix {_quoted(absorbed)} (a scale at 1 and a shift at 0, with the data standardized), "
        "or the scale and location of the density"
    )


def _quoted(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)
