# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The negative chains of a model, as its mutable sites keep them: their names, where they stand, and whether they are well."""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_ebm.samplers import Sampler, Target
from numpyro_ebm.weighted import is_weighted, resampled

_SUFFIX = "/chains"
IMPROPER, SHORT_RUN, MIXED_FIELDS, NOT_FINITE = -2, -1, 8, 9  # beyond what samplers know

NEAR, FAR = 1e4, 1e6  # times where chains start

#: With a fraction q of their start kept, a linear tilt is learned 1 / (1 - 2q) times too large (Conventions in the documentation):
#: by a quarter here. Chains that restart are judged when they have learned what the energy is like.
KEPT_OF_START, RUNS_TO_JUDGE = 0.1, 20


class ChainTarget(Protocol):
    """What chains need of a distribution: an energy site, whose chains are an array, or a random field, with one by site."""

    @property
    def chain_sampler(self) -> Sampler:
        """How chains move if no sampler is named."""

    @property
    def supports(self) -> list[Any]:
        """The supports of the values."""

    def to_chain(self, value: Any, sampler: Sampler) -> Array:
        """Values as positions of a sampler."""

    def from_chain(self, position: Array, sampler: Sampler) -> Any:
        """Positions of a sampler as values."""

    def chain_log_prob(self, sampler: Sampler) -> Target:
        """The log density of positions of a sampler, without gradients in the parameters."""

    def _log_density(self, value: Any) -> Array:
        """The log density of values, with gradients in the parameters."""


def chains_name(site: str) -> str:
    """The mutable site that keeps the chains of a sample site."""
    return site + _SUFFIX


def chains_of(mutable_state: Mapping[str, Any]) -> dict[str, Any]:
    """What mutable sites keep of chains, by the sample site that they belong to."""
    return {name.removesuffix(_SUFFIX): kept for name, kept in mutable_state.items() if name.endswith(_SUFFIX)}


def status_of(mutable_state: Mapping[str, Any]) -> dict[str, Array]:
    """The status of chains by site: 0 where all is well, above 1 for an error, else for a warning."""
    return {site: kept["status"] for site, kept in chains_of(mutable_state).items()}


def is_warning(status: int) -> bool:
    """Whether a status warns of something that does not stop a run."""
    return status in (IMPROPER, SHORT_RUN, 1)


def falls_off(target: Target, position: Array) -> Array:
    """Whether a density of positions may be integrable: it falls off faster than 1 / r^d far out, in the directions of where chains
    start and against them, as a density over d elements does that can be integrated. What is not finite there is not told.
    """
    batch_shape = jax.eval_shape(target, position).shape
    axes = tuple(range(len(batch_shape), position.ndim))
    squares = (position**2).sum(axes, keepdims=True)
    distant = position * jnp.sqrt(squares.mean(0) / jnp.where(squares == 0, 1, squares))  # all equally, one may be close to 0
    size = position.size / math.prod(batch_shape)
    improper = jnp.zeros((), bool)
    for sign in (1, -1):
        near, far = target(sign * NEAR * distant), target(sign * FAR * distant)
        rises = (far - near > -size * math.log(FAR / NEAR)) & jnp.isfinite(near) & (far > -jnp.inf)
        improper |= (rises & (squares > 0).reshape(batch_shape)).any()
    return ~improper


def positions(chains: Mapping[str, Mapping[str, Any]]) -> dict[str, Array]:
    """Samples of sites, by sample site: where their chains stand, weighted ones resampled. Those of a field are of many sites."""
    found: dict[str, Array] = {}
    for site, kept in chains.items():
        x = resampled(kept) if is_weighted(kept) else kept["x"]
        found |= x if isinstance(x, Mapping) else {site: x}
    return found


def watch(
    name: str, sampler: Sampler, state: Any, trouble: Array, chains: dict[str, Any], *, persistent: bool, reports: bool
) -> Array:
    """The status of a site's chains, reported from inside a compiled run on a CPU: a warning once, an error at once.

    On an accelerator a condition makes the host take part in every step, which costs more than many a step does. There the status
    is kept with the chains, and the loss is nan from then on.
    """
    status = jnp.asarray(sampler.check(state), jnp.int32)
    if not persistent:
        is_short = (chains["num_updates"] >= RUNS_TO_JUDGE) & (sampler.kept_of_start(state) > KEPT_OF_START)
        status = jnp.where((status == 0) & is_short, SHORT_RUN, status)
    status = jnp.where(trouble > 0, trouble, status)

    def report(status: np.ndarray, num_updates: np.ndarray, old: np.ndarray) -> None:
        if _rank(int(status)) > _rank(int(old)):  # under vmap both branches of the condition run
            tell(f"site '{name}', update {int(num_updates)}: {explain(sampler, int(status))}", int(status))

    old = chains["status"]
    worse = _rank(status) > _rank(old)
    if reports:
        told = partial(lax.cond, worse, lambda *a: jax.debug.callback(report, *a), lambda *a: None)
        lax.platform_dependent(status, chains["num_updates"], old, cpu=told, default=lambda *a: None)
    return jnp.where(worse, status, old)


def _rank(status: Any) -> Any:
    """How bad a status is: warnings are all alike, errors go by their number."""
    return status * (status > 0) + 1 * (status < 0)


def tell(message: str, status: int) -> None:
    """An error, or a warning where the status is one."""
    if status > 1:
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def explain(sampler: Sampler, status: int) -> str:
    """What a status means, and the fix."""
    if status == MIXED_FIELDS:
        return (
            "the rows of its subsampled plate have fields of their own (covariates or parameters differ between rows), so that a "
            "persistent chain would belong to another field at every step. Use persistent=False, or do not subsample."
        )
    if status == IMPROPER:
        return (
            "when its chains started its density did not fall off far out, and so could not be integrated, as that of an energy "
            "with a negative precision, or of a network that nothing confines. Constrain parameters, as by numpyro.param(..., "
            "constraint=constraints.positive), add a term that grows, or tilt a base that confines (TiltedDistribution)."
        )
    if status == SHORT_RUN:
        return (
            "the chains restart at every step and keep more than a tenth of their start in every direction that the energy depends "
            f"on: {sampler!r} is too short for the energy. What is learned is biased, a linear tilt by a quarter or more, and if "
            "chains keep more than a half the fit does not settle. Take more num_steps, a larger step_size, or persistent chains."
        )
    if status != NOT_FINITE:
        return f"{sampler.explain(status)}."
    return (
        "the negative chains, or the energy at them, are no longer finite. The data or parameters "
        "were not finite before, or the energy is not integrable, or the step is too large for it: look at the data, take "
        "a base that confines (TiltedDistribution), a smaller learning rate, or a smaller step_size."
    )
