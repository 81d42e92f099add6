# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Persistent chains with weights, which are right however fast the parameters move.

Chains that follow an energy lag behind it, and between modes they do not follow at all. With weights they need not: when the
parameters of :math:`\tilde p_k` become those of :math:`\tilde p_{k+1}`, every chain is weighed where it stands,

.. math:: \log w \leftarrow \log w + \log \tilde p_{k+1}(x) - \log \tilde p_k(x),

and only then moved by a kernel that leaves :math:`p_{k+1}` invariant (Jarzynski's equality; Carbone et al. 2023). The weighted
mean of :math:`\nabla \log \tilde p` is then the negative phase whatever the kernel, and the mean weight is :math:`Z_k / Z_0`.
Chains whose weights differ much are worth few: they are resampled, and begin anew with equal weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm._checks import require_count, require_fraction
from numpyro_ebm.samplers import Sampler, Target
from numpyro_ebm.samplers.base import over_events
from numpyro_ebm.weights import LogNormalizer, effective_sample_size, normalized_weights, systematic

Population = dict[str, Array]  # what is kept of weights, by field; leading axes are chains, or groups of chains


@dataclass(frozen=True)
class Weighted:
    r"""The ``weights`` of a :class:`~numpyro_ebm.negative_phase` whose persistent chains carry weights (Carbone et al. 2023).

    With weights the negative phase is right however slowly the chains move, as between modes that they do not cross between, and
    :math:`\log Z` is known during the fit: :meth:`negative_phase.log_normalizer`.

    The chains that teach the energy know :math:`\log Z` too well: they have moved the parameters to where they say that it is low.
    ``num_monitor_chains`` are weighed, moved and resampled like the others and teach nothing: their :math:`\log Z` has no such
    bias.

    The chains in the state are then *weighted* samples. :meth:`negative_phase.sample_chains`, :func:`~numpyro_ebm.diagnose` and
    :func:`~numpyro_ebm.to_inference_data` resample them.

    :param float resample_below: the chains are resampled when their effective sample size falls below this fraction of them.
        Resampling at every step is not harmless: the noise of minibatches moves weights to and fro, which cancels only in weights
        that are kept.
    :param int num_monitor_chains: chains beside ``num_chains`` that :math:`\log Z` is estimated from; all of them if 0.
    :raises ValueError: if ``resample_below`` is not between 0 and 1, or ``num_monitor_chains`` is not an integer of 0, 2 or more.

    **References**

    1. Carbone et al., *Efficient training of energy-based models using Jarzynski equality*, NeurIPS 2023, arXiv:2305.19414.
    2. Jarzynski, *Nonequilibrium equality for free energy differences*, Physical Review Letters 78 (1997).
    """

    resample_below: float = 0.5
    num_monitor_chains: int = 0

    def __post_init__(self) -> None:
        resample_below = require_fraction("resample_below", self.resample_below)
        num_monitors = require_count("num_monitor_chains", self.num_monitor_chains, least=0)
        if num_monitors == 1:
            raise ValueError("num_monitor_chains=1: one chain has the weight 1 whatever it is. Take 2 or more, or 0.")
        object.__setattr__(self, "resample_below", resample_below)
        object.__setattr__(self, "num_monitor_chains", num_monitors)

    def begin(
        self, rng_key: Array, target: Target, sampler: Sampler, start: Array, num_chains: int, *, from_reference: bool
    ) -> tuple[Array, Population]:
        """Positions of chains and their weights: annealed from the target's reference, or where they are told to start.

        :param start: of the second.
        """
        if not from_reference or target.reference is None:
            log_density = lax.stop_gradient(target(start))
            return start, self._equal(log_density, num_chains, jnp.full(log_density.shape[1:], jnp.nan, log_density.dtype))
        start_key, moves_key = jax.random.split(rng_key)
        x = target.reference.sample(start_key, len(start))
        log_density = target.at(0.0)(x)
        constant = (log_density - target.reference.log_prob(x))[0]  # log Z at the start of the path
        population = self._equal(log_density, num_chains, constant)
        state = sampler.init(x, target)

        def step(carry: tuple[Any, Population], xs: tuple[Array, Array]) -> tuple[tuple[Any, Population], None]:
            (state, population), (key, beta) = carry, xs
            weigh_key, move_key = jax.random.split(key)
            there = target.at(beta)
            x, population = self.weigh(weigh_key, state.position, population, there(state.position), num_chains)
            state = sampler.run(move_key, there, state._replace(position=x))
            return (state, population | {"log_density": there(state.position)}), None

        betas = jnp.linspace(0, 1, NUM_TEMPERATURES + 1, dtype=log_density.dtype)[1:]
        keys = jax.random.split(moves_key, NUM_TEMPERATURES)
        (state, population), _ = lax.scan(step, (state, population), (keys, betas))
        return lax.stop_gradient((state.position, population))

    def _equal(self, log_density: Array, num_chains: int, log_normalizer: Array) -> Population:
        by_group = jnp.zeros((len(self._groups(num_chains)), *log_density.shape[1:]), log_density.dtype)
        return {
            "log_weight": jnp.zeros_like(log_density),  # whose mean, of weights, is Z over that of the start
            "log_density": log_density,
            "start_log_normalizer": log_normalizer,
            "spent_variance": by_group,  # of log Z, at every resampling
            "num_resampled": by_group.astype(jnp.int32),
        }

    def _groups(self, num_chains: int) -> list[slice]:
        """The chains that teach, and the monitors."""
        taught = slice(0, num_chains)
        return [taught, slice(num_chains, num_chains + self.num_monitor_chains)] if self.num_monitor_chains else [taught]

    def weigh(
        self, rng_key: Array, x: Array, population: Population, log_density: Array, num_chains: int, *, resample: bool = False
    ) -> tuple[Array, Population]:
        """Weighs chains where they stand, at a new density, and resamples those whose weights have become worth too few.

        :param log_density: of the new density at ``x``, ``(rows,) + batch_shape``.
        :param resample: resample whatever the weights are worth.
        """
        log_weight = population["log_weight"] + log_density - population["log_density"]
        indices, log_weights, spent, counts = [], [], [], []
        for g, (group, key) in enumerate(zip(self._groups(num_chains), jax.random.split(rng_key, 2), strict=False)):
            size, of_group = group.stop - group.start, log_weight[group]
            weights = normalized_weights(of_group)
            worth = effective_sample_size(weights)
            poor = jnp.logical_or(worth < self.resample_below * size, resample)
            stay = jnp.broadcast_to(jnp.arange(size).reshape(-1, *(1,) * (of_group.ndim - 1)), of_group.shape)
            indices.append(group.start + jnp.where(poor, systematic(key, weights), stay))
            log_weights.append(jnp.where(poor, _log_mean(of_group), of_group))
            spent.append(population["spent_variance"][g] + jnp.where(poor, _variance(worth, size), 0.0))
            counts.append(population["num_resampled"][g] + poor)
        index = jnp.concatenate(indices)
        return jnp.take_along_axis(x, over_events(index, x.ndim), 0), {
            **population,
            "log_weight": jnp.concatenate(log_weights),
            "log_density": jnp.take_along_axis(log_density, index, 0),
            "spent_variance": jnp.stack(spent),
            "num_resampled": jnp.stack(counts),
        }

    def mean(self, values: Array, population: Population, num_chains: int) -> Array:
        """The weighted mean over the chains that teach."""
        weights = lax.stop_gradient(normalized_weights(population["log_weight"][:num_chains]))
        return (weights * values[:num_chains]).sum(0)

    def log_normalizer(self, population: Mapping[str, Array], num_chains: int) -> LogNormalizer:
        """Log Z of the monitors, or of all chains where there are none."""
        group = self._groups(num_chains)[-1]
        of_group, size = jnp.asarray(population["log_weight"])[group], group.stop - group.start
        worth = effective_sample_size(normalized_weights(of_group))
        variance = population["spent_variance"][-1] + _variance(worth, size)
        return LogNormalizer(population["start_log_normalizer"] + _log_mean(of_group), jnp.sqrt(variance), worth)


def is_weighted(kept: Mapping[str, Any]) -> bool:
    """Whether what a mutable site keeps of chains has weights."""
    return "log_weight" in kept


def resampled(kept: Mapping[str, Any]) -> Array:
    """Where weighted chains stand, each as often as it weighs: a fixed choice, and no random one, of all rows together."""
    x, log_weight = jnp.asarray(kept["x"]), jnp.asarray(kept["log_weight"])
    index = systematic(None, normalized_weights(log_weight))
    return jnp.take_along_axis(x, over_events(index, x.ndim), 0)


def _log_mean(log_weight: Array) -> Array:
    return logsumexp(log_weight, 0) - math.log(len(log_weight))


def _variance(worth: Array, size: int) -> Array:
    """Of the log of a mean weight, by the delta method."""
    return (size / worth - 1) / size


NUM_TEMPERATURES = 20
