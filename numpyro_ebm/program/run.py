# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""One run of a NumPyro model, what it showed, and the model as pure functions of its parameters, latents and data.

The engines speak this language and hold no handlers of their own. Latents are in unconstrained space throughout: a site of
support ``S`` is the image of a real array under ``biject_to(S)``, and its log Jacobian is part of the log density.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, biject_to, constraints
from numpyro.distributions.util import scale_and_mask, sum_rightmost
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import compute_log_probs, helpful_support_errors
from numpyro.primitives import Messenger

from numpyro_ebm._checks import require_instance
from numpyro_ebm._compat import PLACES, in_subsampled_plate, marked_factor, one_at_a_time, scan_index, sites_named
from numpyro_ebm._precision import is_coarse, tell_coarse_density
from numpyro_ebm.distributions.energy import TiltedDistribution, energy_site, with_core
from numpyro_ebm.program.minibatch import taking_rows
from numpyro_ebm.program.sites import Model, Site, is_factor, is_latent, kind_of, require_events, transform_of


class LatentSite(NamedTuple):
    """Where a latent site stands in its plates."""

    #: (plate, axis) of every plate around the site, innermost first; the axis of the unconstrained value, from the right
    plates: tuple[tuple[str, int], ...]
    #: number of dims of one unconstrained event
    event_dim: int


class Plate(NamedTuple):
    """A plate as one run of the program saw it."""

    #: (subsample_size,) rows of the data in this run
    indices: Array
    #: number of rows of the data
    size: int
    #: (subsample_size,) where what is kept for these rows lies, if the data come in minibatches and no row is at its own place
    places: Array | None = None

    @property
    def in_store(self) -> Array:
        """(subsample_size,) where what is kept for each row lies."""
        return self.indices if self.places is None else self.places

    @property
    def is_subsampled(self) -> bool:
        return self.size != len(self.indices)

    @property
    def is_row(self) -> Array:
        """Whether each index is that of a row; where all rows are given, of the row at its place, since none is gathered."""
        if self.is_subsampled:
            return (self.indices >= 0) & (self.indices < self.size)
        return self.indices == jnp.arange(self.size)


class Run(NamedTuple):
    """What one run of a model showed: its sites, and what is needed to run it again on the same rows of the data."""

    #: every site by name, as :class:`numpyro.handlers.trace` gives them
    sites: dict[str, Site]
    #: latent sites by name
    latents: dict[str, LatentSite]
    #: plates by name
    plates: dict[str, Plate]

    @property
    def params(self) -> dict[str, Any]:
        """Values of the param sites, constrained."""
        return {name: site["value"] for name, site in self.sites.items() if site["type"] == "param"}

    @property
    def param_transforms(self) -> dict[str, Any]:
        """The transforms that take unconstrained values to the param sites."""
        return {name: _param_transform(site) for name, site in self.sites.items() if site["type"] == "param"}

    @property
    def drawn(self) -> dict[str, Array]:
        """Values of the latent sites, constrained."""
        return {name: self.sites[name]["value"] for name in self.latents}

    @property
    def positions(self) -> dict[str, Array]:
        """Unconstrained values of the continuous latent sites."""
        sites = {name: self.sites[name] for name in self.latents if not self.sites[name]["fn"].support.is_discrete}
        return {name: transform_of(site).inv(site["value"]) for name, site in sites.items()}

    def given(self, *, but: Collection[str]) -> dict[str, Any]:
        """The rows of its plates and the values of its latents but these: what another run like it needs beside them."""
        indices = {name: plate.indices for name, plate in self.plates.items()}
        return {name: value for name, value in {**indices, **self.drawn}.items() if name not in but}

    @property
    def observed(self) -> dict[str, Site]:
        """Sample sites with data, factors among them."""
        return {name: site for name, site in self.sites.items() if site["type"] == "sample" and site["is_observed"]}

    @property
    def mutable_state(self) -> dict[str, Any]:
        """Values of the mutable sites after the run."""
        return {name: site["value"] for name, site in self.sites.items() if site["type"] == "mutable"}

    @property
    def subsampled(self) -> dict[str, Plate]:
        """The plates that give a part of the data in each run."""
        return {name: plate for name, plate in self.plates.items() if plate.is_subsampled}

    def scale(self, name: str) -> float:
        """Rows of the data per row of this run at a latent site: what subsampling multiplies its log density by."""
        frames = self.latents[name].plates
        return float(np.prod([self.plates[plate].size / len(self.plates[plate].indices) for plate, _ in frames]))


def run_model(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rng_key: Array,
    *,
    data: dict[str, Any] | None = None,
    latents: dict[str, Array] | None = None,
) -> Run:
    """One run of a model.

    :param data: values of param and mutable sites, and indices of plates, by name; the model's own where missing.
    :param latents: unconstrained latents by name. A latent in a subsampled plate may have a row for all data: the rows of
        this run are gathered. Sites that are missing are drawn.
    """
    given = substitute(data=_copied(data or {}))
    with one_at_a_time, sites_named(), _trace() as sites, _place(latents or {}), given, seed(rng_seed=rng_key):
        taking_rows(model)(*args, **kwargs)
    return _read(sites)


class _trace(trace):
    """NumPyro's trace, in which of a param and a plate of one name the later would hide the other."""

    def postprocess_message(self, msg: Site) -> None:
        earlier = self.trace.get(msg.get("name"))
        if earlier is not None and earlier["type"] != msg["type"]:
            raise ValueError(
                f"site '{msg['name']}': the model has both a {earlier['type']} and a {msg['type']} of this name, and one would "
                "hide the other. Give them different names."
            )
        super().postprocess_message(msg)


def require_program(what: str, program: Model) -> None:
    """Refuses what is no program, and one with a key of its own.

    All particles would start alike with it, and every batch have the same rows.

    :param str what: what the program is called: ``"the model"``.
    :raises TypeError: if it is no function.
    :raises ValueError: with what to pass.
    """
    require_instance(what, program, ("__call__",), "a NumPyro program, a function of its arguments")
    while isinstance(program, Messenger):
        if isinstance(program, seed) and program.rng_key is not None:
            raise ValueError(
                f"{what} is wrapped in numpyro.handlers.seed, so that every run of it would draw the same: pass it without. The "
                "engine gives it a key in every step."
            )
        program = program.fn


def draw_latents(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rng_key: Array,
    *,
    data: dict[str, Any],
    init_strategy: Callable[..., Any],
) -> dict[str, Array]:
    """Unconstrained latents to start from, by NumPyro's ``init_strategy``; energy sites give samples of their base.

    :raises ValueError: naming a site of which it gives a value of another shape, or that is no latent of the model.
    """

    def start(site: Site) -> Any:
        if not is_latent(site) or site["fn"].support.is_discrete:  # discrete latents are refused with their name, later
            return None
        value = init_strategy({**site, "fn": with_core(site["fn"], _start_of)})
        shape = site["fn"].shape(site["kwargs"].get("sample_shape", ()))
        own = np.shape(value)[scan_index(site) is not None :]  # inside a scan values have its steps in front, if they are given
        if value is not None and shape not in (own, np.shape(value)):
            raise ValueError(
                f"site '{site['name']}': init_strategy gives a value of shape {np.shape(value)}, and the site has {shape}, its "
                "plates first (a subsampled one with the rows of a batch). Give it in full, as by "
                f"jnp.broadcast_to(value, {shape})."
            )
        if value is None or (jnp.issubdtype(jnp.result_type(value), jnp.inexact) and not is_coarse(value)):
            return value
        return jnp.asarray(value, float)  # not whole numbers, nor bfloat16, in which small moves are lost

    given = substitute(data=_copied(data))
    with one_at_a_time, sites_named(), trace() as sites, substitute(substitute_fn=start), given, seed(rng_seed=rng_key):
        taking_rows(model)(*args, **kwargs)
    latents = {name: site for name, site in sites.items() if is_latent(site) and not site["fn"].support.is_discrete}
    _require_known_starts(init_strategy, set(latents))
    return {name: transform_of(site).inv(site["value"]) for name, site in latents.items()}


def _require_known_starts(init_strategy: Any, latents: set[str]) -> None:
    """Refuses values of ``init_to_value`` for what is no latent, which NumPyro passes over, while a latent is left without one."""
    values = getattr(init_strategy, "keywords", {}).get("values")  # of a functools.partial
    if not isinstance(values, Mapping):
        return
    unknown, missing = sorted(set(values) - latents), latents - set(values)
    if unknown and missing:
        raise ValueError(f"init_strategy gives values of {unknown}, which is no latent site: the model has {sorted(latents)}.")


def log_density_terms(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rng_key: Array,
    *,
    data: dict[str, Any],
    latents: dict[str, Array] | None = None,
    jacobian: bool = True,
) -> tuple[dict[str, Array], Run]:
    """The log density of every site, not summed and scaled by its plates, and the run that gave it.

    :param data: values of sites by name, latents among them that are constrained, as the model has them: without Jacobians.
    :param latents: unconstrained latents by name.
    :param jacobian: whether there is a term for the log Jacobian of each latent's transform, which makes it a density of the
        unconstrained value.
    """
    place = _place(latents or {}, substitute(seed(taking_rows(model), rng_key), data=_copied(data)), jacobian=jacobian)
    terms, sites = compute_log_probs(place, args, kwargs, {}, sum_log_prob=False)
    fix = "give its data or its parameters as float32; a network before them may be of less."
    return {name: tell_coarse_density(f"site '{name}': its log density", term, fix) for name, term in terms.items()}, _read(sites)


_JACOBIAN = "numpyro_ebm.log_jacobian"  # how the factor of a latent's log Jacobian is known: scope changes its name


def jacobians_of(program: Run) -> set[str]:
    """The names of the factors that :func:`log_density_terms` has added for the log Jacobians of latents."""
    return {name for name, site in program.observed.items() if _JACOBIAN in site["infer"]}


def terms_of(program: Run) -> dict[str, Array]:
    """The log density of every site of a run as it stands, not summed and scaled by its plates."""
    sites = [site for site in program.sites.values() if site["type"] == "sample"]
    return {site["name"]: scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"]) for site in sites}


def total(terms: dict[str, Array]) -> Array:
    """The log density of all sites together, a scalar."""
    return sum((jnp.sum(term) for term in terms.values()), jnp.zeros(()))


def constrained(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], rng_key: Array, *, data: dict[str, Any], latents: dict[str, Array]
) -> dict[str, Array]:
    """The values of latent sites that stand at unconstrained ``latents``, for all rows of the data.

    :raises ValueError: as :func:`require_all_rows`.
    """
    with whole_plates():
        program = run_model(model, args, kwargs, rng_key, data=data, latents=latents)
    require_all_rows(program, latents)
    return {name: program.sites[name]["value"] for name in latents}


def constrain_params(unconstrained: dict[str, Any], transforms: dict[str, Any]) -> dict[str, Any]:
    """Param sites at unconstrained values."""
    return {name: transforms[name](value) if name in transforms else value for name, value in unconstrained.items()}


def unconstrain_params(params: dict[str, Any], transforms: dict[str, Any]) -> dict[str, Any]:
    """Unconstrained values of param sites, with their weak types made strong so that nothing is compiled twice."""
    for name, value in params.items():
        for leaf in jax.tree.leaves(value):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"param site '{name}': it has values of {jnp.result_type(leaf)}, which have no gradient: write 1.0 for 1."
                )
    values = {name: transforms[name].inv(value) for name, value in params.items()}
    return strong_types(values)


def strong_types(tree: Any) -> Any:
    """Arrays of the same dtypes, none of them weakly typed: a weak type that a step makes strong would compile it twice."""

    def strong(x: Any) -> Any:
        is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        return x if is_key else jax.lax.convert_element_type(x, jnp.result_type(x))

    return jax.tree.map(strong, tree)


def own_key(rng_key: Array) -> Array:
    """The key of what programs draw by themselves, such as dropout, apart from those that a key is split into.

    ``seed(rng_seed=rng_key)`` gives a program what ``jax.random.split(rng_key)`` gives, which would be the key of something else.
    """
    return jax.random.fold_in(rng_key, jnp.iinfo(jnp.int32).max)


def require_continuous(program: Run) -> None:
    """Refuses models with a discrete latent.

    :raises ValueError: naming the site.
    """
    for name in program.latents:
        fn = program.sites[name]["fn"]
        if fn.support.is_discrete:
            raise ValueError(
                f"site '{name}': a latent with {kind_of(fn)} is discrete and has no score to move by. Sum it out (a mixture "
                "such as MixtureSameFamily does it), make it continuous, or observe it."
            )


def require_all_rows(program: Run, latents: dict[str, Array]) -> None:
    """Refuses latents of other rows than those of the data.

    :param latents: unconstrained, with a row for all data.
    :raises ValueError: naming the site and the plate, with both numbers of rows.
    """
    for name in latents:
        for plate, axis in program.latents[name].plates:
            given, size = latents[name].shape[axis], program.plates[plate].size
            if given != size and program.plates[plate].places is None:
                raise ValueError(
                    f"site '{name}': the state has {given} rows of plate '{plate}', and the data {size}. Give the data that the "
                    "state is of, or start anew on these by init."
                )
        shape, own = jnp.shape(program.sites[name]["value"]), program.sites[name]["fn"].shape()
        if shape != own:
            raise ValueError(f"site '{name}': the state has values of shape {shape}, and the model on these data of {own}.")


def _require_no_batch(site: Site) -> None:
    plate = in_subsampled_plate(site["fn"].batch_shape)
    if plate is not None:
        raise ValueError(
            f"site '{site['name']}': plate '{plate}' is subsampled inside control_flow.scan, where it cannot be told which rows a "
            "step sees. Do not subsample it, or write the steps as a Python loop."
        )


class _place(substitute):
    """Puts latents at unconstrained positions, and adds their log Jacobians as NumPyro's ``potential_energy`` does."""

    def __init__(self, latents: dict[str, Array], fn: Model | None = None, *, jacobian: bool = True) -> None:
        self.latents, self.jacobian = latents, jacobian
        self.indices: dict[str, Array] = {}
        super().__init__(fn, substitute_fn=self._value)

    def _value(self, site: Site) -> Array | None:
        if not is_latent(site) or site["name"] not in self.latents:
            return None
        transform, position = transform_of(site), self.latents[site["name"]]
        if (step := scan_index(site)) is not None:
            _require_no_batch(site)
            position = position[step]
        for frame, (plate, axis) in zip(site["cond_indep_stack"], _axes(site, transform), strict=True):
            if position.shape[axis] != frame.size:
                position = jnp.take(position, self.indices[plate], axis)
        value = transform(position)
        if self.jacobian:
            log_det = transform.log_abs_det_jacobian(position, value)
            log_det = sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + site["fn"].event_dim)
            marked_factor(f"_{site['name']}_log_det", log_det, _JACOBIAN)
        return value

    def postprocess_message(self, msg: Site) -> None:
        if msg["type"] == "plate":
            self.indices[msg["name"]] = msg[PLACES] if PLACES in msg else msg["value"]


def _start_of(fn: Distribution) -> Distribution:
    """Where an energy site starts, as its negative chains do; other distributions as they are."""
    if not isinstance(fn, TiltedDistribution) or energy_site(fn) is None:
        return fn
    source = fn.base if fn.initial is None else fn.initial
    return with_core(source.expand(fn.batch_shape), _start_of)


class at_mean(Messenger):
    """Puts sample sites, observed ones too, at the mean of their distribution instead of drawing them.

    :param sites: names of the sites; all if not given.
    :raises NotImplementedError: naming a site whose distribution has no mean.
    """

    def __init__(self, fn: Model | None = None, *, sites: Collection[str] | None = None) -> None:
        super().__init__(fn)
        self.sites = sites

    def process_message(self, msg: Site) -> None:
        if msg["type"] != "sample" or (self.sites is not None and msg["name"] not in self.sites):
            return
        try:
            msg["value"] = msg["fn"].mean
        except NotImplementedError:
            raise NotImplementedError(f"site '{msg['name']}': {kind_of(msg['fn'])} has no mean.") from None
        msg["is_observed"] = False


class whole_plates(Messenger):
    """Runs programs on all rows of the data: subsampled plates give every row once, in order.

    :param but_given: leave the plates alone to which the program itself gives their rows, as one for a data loader does.
    """

    def __init__(self, fn: Model | None = None, *, but_given: bool = False) -> None:
        super().__init__(fn)
        self.but_given = but_given

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate" and not (self.but_given and msg["value"] is not None):
            size = msg["args"][0]
            msg["args"], msg["value"] = (size, size), jnp.arange(size)


def _read(sites: dict[str, Site]) -> Run:
    # latents of other rows than the data, from a state, have an error of their own: require_all_rows
    if all(jnp.shape(site["value"]) == site["fn"].shape() for site in sites.values() if is_latent(site)):
        for site in sites.values():
            if site["type"] == "sample" and site["is_observed"] and not is_factor(site["fn"]):
                require_events(site)
    plates = {
        name: Plate(site["value"], site["args"][0], site.get(PLACES)) for name, site in sites.items() if site["type"] == "plate"
    }
    latents = {}
    for name, site in sites.items():
        if is_latent(site):
            transform = None if site["fn"].support.is_discrete else transform_of(site)
            axes = tuple(at for at in _axes(site, transform) if at[0] in plates)  # those inside a scan are not seen
            latents[name] = LatentSite(axes, _event_dim(site["fn"], transform))
    return Run(sites, latents, plates)


def _axes(site: Site, transform: Any) -> tuple[tuple[str, int], ...]:
    event_dim = _event_dim(site["fn"], transform)
    return tuple((frame.name, frame.dim - event_dim) for frame in site["cond_indep_stack"])


def _event_dim(fn: Distribution, transform: Any) -> int:
    """Number of dims of one unconstrained event: a transform may change it, as that of a covariance matrix does."""
    return fn.event_dim if transform is None else fn.event_dim - transform.codomain.event_dim + transform.domain.event_dim


def _param_transform(site: Site) -> Any:
    with helpful_support_errors(site):
        return biject_to(site["kwargs"].get("constraint", constraints.real))


def _copied(data: dict[str, Any]) -> dict[str, Any]:
    """The same values in containers of their own: a program updates its mutable sites in place."""
    return jax.tree.map(lambda x: x, data)
