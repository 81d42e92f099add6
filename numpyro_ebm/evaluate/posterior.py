# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Samples of the posterior of the latents of a model whose parameters are fixed.

At fixed parameters particles are independent
Markov chains, which they are not during a fit, so that R-hat and ESS mean what they usually do. Where the posterior is a
product over the rows of a plate, every row is accepted by itself and has a step size of its own: the step then does not
shrink with the number of data.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints
from numpyro.infer import init_to_sample

from numpyro_ebm._checks import require_count, require_key
from numpyro_ebm._compiled import compiled
from numpyro_ebm._pytree import read_params
from numpyro_ebm.distributions.guard import NormalizerError
from numpyro_ebm.evaluate.mixing import DRAWS_TO_JUDGE, R_HAT_OF_DRAWS, r_hat, sample_size
from numpyro_ebm.handlers import unnormalized
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.provenance import mark, sources
from numpyro_ebm.program.rows import dim_of, mixes_rows, per_row, shared_plates
from numpyro_ebm.program.run import (
    Run,
    constrain_params,
    draw_latents,
    log_density_terms,
    require_continuous,
    run_model,
    total,
    unconstrain_params,
    whole_plates,
)
from numpyro_ebm.program.sites import Model, require_data
from numpyro_ebm.samplers import MALA, NUTS, Sampler
from numpyro_ebm.samplers.base import require_sampler

Latents = dict[str, Array]


def sample_posterior(
    rng_key: Array,
    model: Model,
    params: Mapping[str, Any],
    *args: Any,
    num_samples: int,
    num_warmup: int = 200,
    num_chains: int | None = None,
    thinning: int = 1,
    sampler: Sampler | NUTS | None = None,
    start: Mapping[str, Array] | None = None,
    mutable_state: Mapping[str, Any] | None = None,
    init_strategy: Callable[..., Any] = init_to_sample,
    **kwargs: Any,
) -> Latents:
    """Samples the latents from their posterior at fixed parameters, for the data of a fit or for new data.

    Subsampled plates show all their rows; one that the model itself gives some of its rows, as a model for a data loader does,
    shows these, and the samples are of their latents. Energy sites need no normalizer here and are taken as they are.

    :param rng_key: a key of :func:`jax.random.key`.
    :param model: a NumPyro model, under :class:`~numpyro_ebm.negative_phase` or not.
    :param dict params: values of all :func:`numpyro.param` sites, ``result.params``; others are ignored.
    :param args: arguments of the model.
    :param int num_samples: draws that are kept of every chain.
    :param int num_warmup: transitions before the first sample. Only in them is the step size adapted.
    :param int num_chains: independent chains; as many as ``start`` has if it is given, else 4.
    :param int thinning: transitions per sample.
    :param sampler: :class:`~numpyro_ebm.MALA` if not given; :class:`~numpyro_ebm.UnadjustedLangevin` goes on as the particles
        of a fit do, with their bias in the step size. One transition is one run of it, ``num_steps`` steps. Rows of a plate
        that all latents share move independently. :class:`samplers.NUTS() <numpyro_ebm.samplers.NUTS>` moves all latents
        of a chain together, by NumPyro's NUTS with its window adaptation.
    :param start: latents to start from, constrained, of shape ``(num_chains,) + batch_shape + event_shape``, such as
        :meth:`ParticleMMLE.get_particles <numpyro_ebm.ParticleMMLE.get_particles>` gives.
    :param mutable_state: values of the model's own :func:`numpyro.primitives.mutable` sites.
    :param init_strategy: a NumPyro ``init_to_...`` strategy to start from without ``start``.
    :param kwargs: keyword arguments of the model.
    :return: by latent site, constrained, of shape ``(num_chains, num_samples) + batch_shape + event_shape``. ``Predictive``
        takes them with ``batch_ndims=2``. It warns where several chains of 100 samples or more have an R-hat above 1.1.
    :raises ValueError: for counts out of range, missing parameters, discrete latents, a ``start`` of another shape, a density
        that is not finite where chains start, or samples that are not finite, naming the site.
    :raises NormalizerError: if an energy's normalizer depends on another latent.

    **References**

    1. Roberts and Tweedie, *Exponential convergence of Langevin distributions and their discrete approximations*,
       Bernoulli 2 (1996).
    2. Hoffman and Gelman, *The No-U-Turn sampler*, JMLR 15 (2014), arXiv:1111.4246.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import sample_posterior
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> draws = sample_posterior(
        ...     jax.random.key(0), model, {"loc": 1.0}, jnp.array([1.0, 5.0]), num_samples=2000
        ... )
        >>> draws["x"].shape
        (4, 2000, 2)
        >>> print(draws["x"].mean((0, 1)).round(1))
        [1. 3.]
    """
    sampler = MALA() if sampler is None else sampler
    if not isinstance(sampler, NUTS):
        require_sampler("sampler", sampler, ", or samplers.NUTS()")
    num_samples, thinning = require_count("num_samples", num_samples), require_count("thinning", thinning)
    num_warmup = require_count("num_warmup", num_warmup, least=1 if isinstance(sampler, NUTS) else 0)
    model_key, start_key, run_key = jax.random.split(require_key("rng_key", rng_key), 3)
    posterior = Posterior(model_key, model, params, args, kwargs, mutable_state)
    positions = posterior.start(start_key, start, num_chains, "num_chains", init_strategy)
    draws, status = compiled(_drawn, run_key, posterior, sampler, positions, num_warmup, num_samples, thinning)
    latents = compiled(_by_site, posterior, draws)
    for name, values in latents.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"site '{name}': the draws are not finite, because chains ran away: take a smaller step_size, or MALA()."
            )
    if int(status):
        warnings.warn(_explain(sampler, int(status), num_samples * len(positions) * thinning), stacklevel=2)
    if not_mixed := _not_mixed(posterior, latents):
        warnings.warn(not_mixed, stacklevel=2)
    return compiled(_constrained, posterior, latents)


def _not_mixed(posterior: "Posterior", latents: Latents) -> str:
    """What to say of the worst element of unconstrained draws, if chains disagree in it."""
    num_chains, num_samples = next(iter(latents.values())).shape[:2]
    if num_chains < 2 or num_samples < DRAWS_TO_JUDGE:
        return ""
    found = {name: r_hat(draws) for name, draws in latents.items()}
    if not any((values > R_HAT_OF_DRAWS).any() for values in found.values()):  # nan where nothing moves
        return ""
    score = jax.grad(lambda x: posterior.row_log_density(x).sum())
    scores = jax.jit(jax.vmap(score))({name: draws[:, -1] for name, draws in latents.items()})
    # masked elements have no density, and wander
    found = {name: np.where(np.any(scores[name], 0) & (values > R_HAT_OF_DRAWS), values, 0.0) for name, values in found.items()}
    name = max(found, key=lambda name: found[name].max(initial=0))
    if not found[name].any():
        return ""
    index: Any = np.unravel_index(found[name].argmax(), found[name].shape)
    chains = np.asarray(latents[name])[(..., *index)]
    element = f", element {[int(i) for i in index]}" if index else ""
    return (
        f"site '{name}'{element}: R-hat is {found[name][index]:.2f}, and the {chains.size} draws of {num_chains} chains count as "
        f"{float(sample_size(chains)):.0f}: the chains have not mixed, and their means may be far off. Take more "
        "num_warmup and num_samples, thinning, or sampler=samplers.NUTS() where latents are narrow jointly."
    )


@jax.tree_util.register_pytree_node_class
class Posterior:
    """The latents of a model at fixed parameters, on all rows of the data.

    A pytree of these parameters and data, so that what is compiled for one is of use to others.

    For samplers they are one array of shape ``(rows, dim)``, with the rows of the plate that all latents share, or ``(dim,)``
    where no plate's rows are independent: the log density then has shape ``(rows,)`` or ``()``.
    """

    def __init__(
        self,
        rng_key: Array,
        model: Model,
        params: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mutable_state: Mapping[str, Any] | None,
    ) -> None:
        self.args, self.kwargs, self.rng_key = args, kwargs, rng_key
        params = read_params("params", params)
        if not isinstance(mutable_state, Mapping | None):
            raise TypeError(f"mutable_state must map mutable sites to values, got {type(mutable_state).__name__}.")
        self.given, self.data = model, {**params, **(mutable_state or {})}
        try:
            latents = self.draw(rng_key, init_to_sample)
        except ValueError as error:
            error.add_note(f"The model was run at params {sorted(params)} as given: are they all inside their constraints?")
            raise
        self._shapes = {name: jax.ShapeDtypeStruct(latents[name].shape, latents[name].dtype) for name in sorted(latents)}
        with whole_plates(but_given=True):
            self.program = run_model(self.model, args, kwargs, rng_key, data=self.data, latents=latents)
        self.report = check_run(self.model, args, kwargs, data=self.data)
        self._require_drawable(params)
        self.plate: str | None = None
        # the largest plate with all latents in it whose rows are independent
        plates = shared_plates(self.program, self.program.latents)
        plates = sorted(plates, key=lambda plate: -len(self.program.plates[plate].indices))
        self.plate = next((plate for plate in plates if self._factorizes(plate, latents)), None)
        for name, plate in self.program.subsampled.items():
            if name != self.plate:
                raise ValueError(
                    f"plate '{name}': the model is given {len(plate.indices)} of its {plate.size} rows, as a data loader does, and "
                    "the posterior is not a product over them: pass all rows."
                )

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.args, self.kwargs, self.rng_key, self.data), (self.given, self.plate, tuple(self._shapes.items()))

    @classmethod
    def tree_unflatten(cls, fixed: Any, values: Any) -> Self:
        posterior = object.__new__(cls)
        posterior.args, posterior.kwargs, posterior.rng_key, posterior.data = values
        posterior.given, posterior.plate, shapes = fixed
        posterior._shapes = dict(shapes)
        return posterior

    @property
    def model(self) -> Model:
        """The model without the guard of its energies."""
        return unnormalized(self.given)

    @cached_property
    def program(self) -> Run:
        """A run of the model, made anew while something is compiled."""
        with whole_plates(but_given=True):
            latents = self.draw(self.rng_key, init_to_sample)
            return run_model(self.model, self.args, self.kwargs, self.rng_key, data=self.data, latents=latents)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, constrained."""
        return self.program.params

    def draw(self, rng_key: Array, init_strategy: Callable[..., Any]) -> Latents:
        """Unconstrained latents to start from."""
        with whole_plates(but_given=True):
            return draw_latents(self.model, self.args, self.kwargs, rng_key, data=self.data, init_strategy=init_strategy)

    def terms(self, latents: Latents, params: Mapping[str, Any] | None = None, *, jacobian: bool = True) -> dict[str, Array]:
        """The log density of every site at unconstrained latents, at these parameters or at others."""
        data = {**self.data, **(params or {})}
        call = self.model, self.args, self.kwargs, self.rng_key
        with whole_plates(but_given=True):
            return log_density_terms(*call, data=data, latents=latents, jacobian=jacobian)[0]

    def row_log_density(self, latents: Latents, params: Mapping[str, Any] | None = None, *, jacobian: bool = True) -> Array:
        """The log density that depends on latents, ``(rows,)``, or ``()`` where rows are not independent."""
        terms = self.terms(latents, params, jacobian=jacobian)
        return total(terms) if self.plate is None else self._rows_and_rest(terms, self.plate)[0]

    def constrained(self, latents: Latents) -> Latents:
        """The values of the latent sites."""
        with whole_plates(but_given=True):
            program = run_model(self.model, self.args, self.kwargs, self.rng_key, data=self.data, latents=latents)
        return {name: program.sites[name]["value"] for name in latents}

    def to_rows(self, latents: Latents) -> Array:
        """Unconstrained latents as one array of shape ``(rows, dim)`` or ``(dim,)``."""
        if self.plate is None:
            return ravel_pytree(latents)[0]
        parts = [jnp.moveaxis(latents[name], self._axis(name), 0) for name in self._shapes]
        return jnp.concatenate([part.reshape(len(part), -1) for part in parts], -1)

    def from_rows(self, x: Array) -> Latents:
        """The inverse of :meth:`to_rows`."""
        if self.plate is None:
            return ravel_pytree({name: jnp.zeros(like.shape, like.dtype) for name, like in self._shapes.items()})[1](x)
        latents, done = {}, 0
        for name, like in self._shapes.items():
            moved = np.moveaxis(np.broadcast_to(0, like.shape), self._axis(name), 0).shape
            size = math.prod(moved[1:])
            part = x[:, done : done + size].reshape(moved).astype(like.dtype)
            latents[name], done = jnp.moveaxis(part, 0, self._axis(name)), done + size
        return latents

    def start(
        self,
        rng_key: Array,
        start: Mapping[str, Array] | None,
        number: int | None,
        counted: str,
        init_strategy: Callable[..., Any],
    ) -> Array:
        """Where chains or searches start, of shape ``(number, rows, dim)`` or ``(number, dim)``."""
        if number is not None:
            number = require_count(counted, number)
        if start is None:
            keys = jax.random.split(rng_key, number or 4)
            latents = compiled(_started, self, keys, init_strategy)
        else:
            first = next(iter(start.values()), ()) if isinstance(start, Mapping) else ()
            number = (np.shape(first)[0] if np.ndim(first) else 1) if number is None else number
            latents = self.unconstrained("start", start, (number,), f"with {counted}={number} ")
        positions, value = compiled(_placed, self, latents)
        if not (finite := np.isfinite(value)).all():
            raise ValueError(
                f"the log density is not finite at {int((~finite).sum())} of {finite.size} places to start"
                f"{self.rows_where((~finite).any(0))}: give start=, or another init_strategy."
            )
        return positions

    def rows_where(self, where: Any) -> str:
        """Words for the rows where something is the case."""
        if self.plate is None:
            return ""
        rows = np.flatnonzero(where)
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        return f" in rows {', '.join(map(str, rows[:3]))}{more} of plate '{self.plate}'"

    def _axis(self, name: str) -> int:
        return dict(self.program.latents[name].plates)[self.plate]  # type: ignore[index]

    def _require_drawable(self, params: Mapping[str, Any]) -> None:
        require_continuous(self.program)
        if not self.program.latents:
            raise ValueError("the model has no latent site, so that there is no posterior to look at.")
        if missing := sorted(set(self.program.params) - set(params)):
            raise ValueError(f"params lacks {missing}: give the values of all param sites, {sorted(self.program.params)}.")
        for name, site in self.program.sites.items():
            if site["type"] == "param" and jax.tree_util.all_leaves([site["value"]]):
                inside = site["kwargs"].get("constraint", constraints.real)(site["value"])
                if not isinstance(inside, jax.core.Tracer) and not np.all(inside):
                    raise ValueError(f"params['{name}'] is outside the param's constraint, {site['kwargs']['constraint']}.")
            if site["type"] == "sample" and site["is_observed"]:
                require_data(site)
        for found in self.report.sites:
            if found.is_energy and found.latents:
                raise NormalizerError(
                    f"site '{found.name}': its unknown normalizer depends on a latent, whose posterior would need its value "
                    "(doubly intractable). Hold what the energy depends on fixed, or make it a numpyro.param."
                )

    def _factorizes(self, plate: str, latents: Latents) -> bool:
        """Whether the density is a product over rows.

        NumPyro takes the user's word for it, which a sum over a plate's rows breaks. Where it is true, nothing outside the plate
        depends on a latent, no row's log density changes with others, and weighing them weighs the rows' scores by the same
        numbers. With powers of two nothing is rounded by that, so that a row is judged by its own score, however large those of the
        others are.
        """
        size = len(self.program.plates[plate].indices)

        if self._rest_sees(plate, latents) or compiled(_rows_mix, self, plate, latents, self.rng_key):
            return False
        plain = compiled(_scores_of_rows, self, plate, latents, jnp.ones(size))
        for weights in _powers_of_two(size):
            weighed = compiled(_scores_of_rows, self, plate, latents, jnp.asarray(weights))
            for name, site in self.program.latents.items():
                axis = dict(site.plates)[plate]
                found, own = (np.moveaxis(np.asarray(score[name]), axis, 0).reshape(size, -1) for score in (weighed, plain))
                tolerance = float(jnp.finfo(own.dtype).eps) ** 0.5 * np.abs(own).max(1, keepdims=True)
                if not (np.abs(found / weights[:, None] - own) <= tolerance).all():
                    return False
        return True

    def _rest_sees(self, plate: str, latents: Latents) -> bool:
        """Whether something outside a plate depends on the latents; told from the trace."""
        return bool(sources(lambda: self._rows_and_rest(self.terms(mark(latents, "latents")), plate)[1]))

    def _rows_and_rest(self, terms: dict[str, Array], plate: str) -> tuple[Array, Array]:
        """The log density of every row of a plate, and of what stands outside it."""
        inside = {}
        for name, term in terms.items():
            if dim_of(self.program.sites[name], plate) is not None:
                inside[name] = term
        return per_row(inside, self.program, plate), total({name: term for name, term in terms.items() if name not in inside})

    def unconstrained(self, what: str, given: Mapping[str, Array], leading: tuple[int, ...], why: str = "") -> Latents:
        """Given values of the latents, checked and unconstrained.

        :param what: what they are, for a message.
        :param leading: the shape that stands in front of the site's own.
        :param why: what that shape comes from, for a message.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must map latent sites, {sorted(self._shapes)}, to values, got {type(given).__name__}.")
        if set(given) != set(self._shapes):
            raise ValueError(f"{what} has the sites {sorted(given)}, the latents of the model are {sorted(self._shapes)}.")
        for name, value in given.items():
            shape = (*leading, *jnp.shape(self.program.sites[name]["value"]))
            if jnp.shape(value) != shape:
                raise ValueError(f"site '{name}': {what} has shape {jnp.shape(value)}, {why}it must be {shape}.")
        dtypes = {name: jnp.result_type(self.program.sites[name]["value"]) for name in given}
        real = {name: jnp.asarray(value, dtypes[name]) for name, value in given.items()}  # integers would not move

        latents = compiled(_inverted, self, real, len(leading))
        for name, position in latents.items():
            if not np.isfinite(position).all():
                raise ValueError(f"site '{name}': {what} has values that are not finite, or not inside the support.")
        return latents

    # Parameters, for derivatives in them.

    def theta(self) -> Any:
        """The parameters, unconstrained."""
        return unconstrain_params(self.params, self.program.param_transforms)

    def params_at(self, theta: Any) -> dict[str, Any]:
        """The parameters at unconstrained values."""
        return constrain_params(theta, self.program.param_transforms)


# What is compiled once for all posteriors of a model.


def _started(posterior: Posterior, keys: Array, init_strategy: Callable[..., Any]) -> Latents:
    return jax.vmap(lambda key: posterior.draw(key, init_strategy))(keys)


def _placed(posterior: Posterior, latents: Latents) -> tuple[Array, Array]:
    """Positions of samplers, and the log density there."""
    return jax.vmap(lambda x: (posterior.to_rows(x), posterior.row_log_density(x)))(latents)


def _inverted(posterior: Posterior, values: Latents, num_leading: int) -> Latents:
    """Values of the latents, unconstrained."""

    def invert(values: Latents) -> Latents:
        return posterior.draw(posterior.rng_key, lambda site: values[site["name"]])

    for _ in range(num_leading):
        invert = jax.vmap(invert)
    return invert(values)


def _scores_of_rows(posterior: Posterior, plate: str, latents: Latents, weights: Array) -> Latents:
    def weighed(latents: Latents) -> Array:
        return (posterior._rows_and_rest(posterior.terms(latents), plate)[0] * weights).sum()

    return jax.grad(weighed)(latents)


def _rows_mix(posterior: Posterior, plate: str, latents: Latents, rng_key: Array) -> Array:
    axes = {name: dict(site.plates)[plate] for name, site in posterior.program.latents.items()}
    return mixes_rows(lambda latents: posterior._rows_and_rest(posterior.terms(latents), plate)[0], latents, axes, rng_key)


def _by_site(posterior: Posterior, draws: Array) -> Latents:
    return jax.vmap(jax.vmap(posterior.from_rows))(draws)


def _constrained(posterior: Posterior, latents: Latents) -> Latents:
    return jax.vmap(jax.vmap(posterior.constrained))(latents)


def _drawn(
    rng_key: Array,
    posterior: Posterior,
    sampler: Sampler | NUTS,
    positions: Array,
    num_warmup: int,
    num_samples: int,
    thinning: int,
) -> tuple[Array, Array]:
    """Draws of all chains, and what became of the sampler."""
    log_density = jax.vmap(lambda x: posterior.row_log_density(posterior.from_rows(x)))
    if isinstance(sampler, NUTS):
        return sampler.draw(rng_key, log_density, positions, num_warmup, num_samples, thinning)
    return _run_sampler(rng_key, sampler, log_density, positions, num_warmup, num_samples, thinning)


def _powers_of_two(size: int) -> list[np.ndarray]:
    """Weights of ``size`` rows, no two of which have the same in all lists: 2 to the power of a digit of their number."""
    rows, base = np.arange(size), 16
    weights: list[np.ndarray] = []
    while not weights or rows.any():
        weights.append(2.0 ** (rows % base))
        rows = rows // base
    return weights


def _run_sampler(
    rng_key: Array,
    sampler: Sampler,
    log_density: Callable[[Array], Array],
    positions: Array,
    num_warmup: int,
    num_samples: int,
    thinning: int,
) -> tuple[Array, Array]:
    """Samples of a sampler, whose step is adapted in the warmup and held afterwards: with a step that keeps adapting they would
    not be a chain.
    """
    held = sampler.frozen()

    def warm(state: Any, key: Array) -> tuple[Any, None]:
        return sampler.run(key, log_density, state), None

    def move(state: Any, key: Array) -> tuple[Any, None]:
        return held.run(key, log_density, state), None

    def draw(state: Any, key: Array) -> tuple[Any, Array]:
        state = lax.scan(move, state, jax.random.split(key, thinning))[0]
        return state, state.position

    warm_key, draw_key = jax.random.split(rng_key)
    state = lax.scan(warm, sampler.init(positions, log_density), jax.random.split(warm_key, num_warmup))[0]
    state, draws = lax.scan(draw, state, jax.random.split(draw_key, num_samples))
    return jnp.moveaxis(draws, 1, 0), sampler.check(state)


def _explain(sampler: Sampler | NUTS, status: int, num_transitions: int) -> str:
    if isinstance(sampler, NUTS):
        return f"{status} of {num_transitions} transitions of NUTS diverged: the draws may miss where the posterior is narrow."
    return f"{sampler.explain(status)}."
