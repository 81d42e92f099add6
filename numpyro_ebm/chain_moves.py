# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""One move of a site's negative chains while its model runs, which a mutable site keeps."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax
from numpyro.primitives import mutable

from numpyro_ebm.chains import IMPROPER, MIXED_FIELDS, NOT_FINITE, ChainTarget, explain, falls_off, tell, watch
from numpyro_ebm.distributions.energy import TiltedDistribution
from numpyro_ebm.program.pair import same_support
from numpyro_ebm.program.random_field import RandomField
from numpyro_ebm.program.sites import is_without_end
from numpyro_ebm.samplers import Sampler
from numpyro_ebm.weighted import Population, Weighted


class Keeping(NamedTuple):
    """How the chains of a site are kept."""

    where: str  # the mutable site
    num_chains: int
    persistent: bool
    weights: Weighted | None
    is_told: bool  # whether a user says where they start
    reports: bool


def advance(name: str, energy: ChainTarget, sampler: Sampler, start: Any, run_key: Array, keeping: Keeping) -> Array:
    """The mean log density at the chains of a site, which it moves by one run of the sampler and stores in a mutable site.

    :param energy: a :class:`TiltedDistribution`, whose chains are an array, or a :class:`RandomField`, whose are one by site.
    :param start: where new chains start.
    """
    target, weights = energy.chain_log_prob(sampler), keeping.weights
    population: Population = {}
    if weights is not None:
        run_key, start_key, weigh_key = jax.random.split(run_key, 3)
        start, population = _weighted_start(start_key, name, energy, sampler, start, keeping)
    fresh = sampler.init(energy.to_chain(start, sampler), target)
    kept = {field: value for field, value in fresh._asdict().items() if field != "position"}
    count = jnp.zeros((), jnp.int32)
    begin = {"x": start, "num_updates": count, "status": count, **population, **kept}
    chains = mutable(keeping.where, begin)
    if chains is begin and sampler.uses_score and all(map(is_without_end, energy.supports)):
        with numpyro.validation_enabled(False):  # that far a transform may underflow
            chains["status"] = jnp.where(falls_off(target, fresh.position), count, IMPROPER)
        if keeping.reports:  # once in a fit, so that the host may be asked on every device
            jax.debug.callback(partial(_tell_start, name, sampler), chains["status"])
    _require_same(name, chains, begin)
    x = chains["x"] if keeping.persistent else start
    if weights is not None:
        population = {field: chains[field] for field in population}
        x, population = weights.weigh(weigh_key, x, population, lax.stop_gradient(energy._log_density(x)), keeping.num_chains)
    state = fresh._replace(position=energy.to_chain(x, sampler), **{field: chains[field] for field in kept})
    state = sampler.run(run_key, target, state)
    x = lax.stop_gradient(energy.from_chain(state.position, sampler))
    moved = state._asdict()
    chains.update({"x": x, "num_updates": chains["num_updates"] + 1, **{field: moved[field] for field in kept}})
    log_density = energy._log_density(x)
    if weights is not None:
        chains.update({**population, "log_density": lax.stop_gradient(log_density)})
    finite = jnp.all(jnp.stack([jnp.isfinite(array).all() for array in jax.tree.leaves((x, state.position, log_density))]))
    trouble = jnp.where(finite, 0, NOT_FINITE)
    if isinstance(energy, RandomField) and keeping.persistent:
        trouble = jnp.maximum(trouble, jnp.where(energy.mixes_fields(x), MIXED_FIELDS, 0))
    chains["status"] = watch(name, sampler, state, trouble, chains, persistent=keeping.persistent, reports=keeping.reports)
    mean = log_density.mean(0) if weights is None else weights.mean(log_density, population, keeping.num_chains)
    return mean * jnp.where(chains["status"] > 1, jnp.nan, 1)  # so that no fit goes on with such chains, whoever runs it


def _weighted_start(
    rng_key: Array, name: str, energy: ChainTarget, sampler: Sampler, start: Any, keeping: Keeping
) -> tuple[Array, Population]:
    """Where weighted chains start, with their weights at the parameters of the start."""
    if not isinstance(energy, TiltedDistribution):
        raise ValueError(f"site '{name}': weights are for the chains of energy sites, and those of a random field have none.")
    if not sampler.is_exact:
        raise ValueError(
            f"site '{name}': {sampler!r} does not leave the density as it is, and weights would drift: take MALA(), or no weights."
        )
    reference = energy._reference()
    is_same = reference is None or same_support(energy, reference)
    if reference is not None and not isinstance(is_same, Array) and not is_same:
        raise ValueError(
            f"site '{name}': its chains start from {type(reference).__name__} on {reference.support}, which is not its support "
            f"{energy.support}: weights would miss the rest. Give reference= a distribution on all of it."
        )
    weights: Any = keeping.weights
    at_start, target = energy.to_chain(start, sampler), energy.chain_log_prob(sampler)
    is_told = keeping.is_told
    position, population = weights.begin(rng_key, target, sampler, at_start, keeping.num_chains, from_reference=not is_told)
    start = energy.from_chain(position, sampler)
    return start, population | {"log_density": lax.stop_gradient(energy._log_density(start))}


def _require_same(name: str, chains: dict[str, Any], begin: dict[str, Any]) -> None:
    """Refuses chains that are not of the shapes that this model keeps."""
    if _shapes(chains) == _shapes(begin):
        return
    found, wanted = _shapes(chains["x"]), _shapes(begin["x"])
    if found != wanted:
        raise ValueError(
            f"site '{name}': the state holds chains of shape {found}, this handler keeps {wanted}. Use the same num_chains, or "
            "begin from a fresh state."
        )
    raise ValueError(
        f"site '{name}': the state keeps {sorted(chains)} of its chains, this handler {sorted(begin)}. Use the same sampler "
        "and weights, or begin from a fresh state."
    )


def _tell_start(name: str, sampler: Sampler, status: np.ndarray) -> None:
    if status:
        tell(f"site '{name}': {explain(sampler, int(status))}", int(status))


def _shapes(x: Any) -> Any:
    return jax.tree.map(jnp.shape, x)
