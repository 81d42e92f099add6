# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Samples of a joint density of real numbers and bits whose normalizer is unknown, by annealed importance sampling (AIS).

Scores say nothing of where there are no rows, and may leave a mode there. No sample of a guide sees it, nor one that stands beside
the rows. So chains start from a wide normal distribution b, with bits that are 0 or 1 as often, and move along

.. math:: \log p_\beta = (1 - \beta) \log b + \beta \log \tilde p, \qquad
    \log w \leftarrow \log w + (\beta_k - \beta_{k-1}) (\log \tilde p - \log b).

The mean weight is an unbiased estimate of the normalizer, and chains, each by itself, are weighted samples (Neal 2001).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm.evaluate.yardstick import Normal
from numpyro_ebm.samplers.base import langevin_move, log_langevin, over_events
from numpyro_ebm.samplers.mala import ADAPTATION_GAIN, metropolis
from numpyro_ebm.weights import effective_sample_size, normalized_weights

NUM_CHAINS, NUM_TEMPERATURES = 4096, 100
POWER = 3  # of the temperatures: most is decided near 0
WIDTHS = 1.0, 2.0, 4.0, 8.0  # of the distribution that chains start from, where the moments say 1
NUM_MOVES, STEP_SIZE, ACCEPTANCE = 2, 0.5, 0.574  # at each temperature; adapted, of a coordinate with the variance 1
MAX_FLIPS = 4  # of bits, of each chain at each temperature


class Annealed(NamedTuple):
    """Where chains stand at the end, each with its weight."""

    #: (chains, size)
    x: Array
    #: (chains, bits)
    bits: Array
    #: (chains,), they sum to 1
    weights: Array
    #: (), the log normalizer
    log_normalizer: Array
    #: (), how many samples it is known by
    worth: Array


class _Chains(NamedTuple):
    white: Array  # (chains, size), where steps of one size suit all directions
    bits: Array  # (chains, bits)
    log_densities: Array  # (chains, 2), of both ends of the path
    scores: Array  # (chains, 2, size), their derivatives


class _Step(NamedTuple):
    """One step of all chains."""

    key: Array
    beta: Array
    rise: Array  # of beta since the step before
    is_flip: Array  # of a bit; else the real numbers move


_Carry = tuple[_Chains, Array, Array]  # with the log weights, and the log of the size of moves


def anneal(rng_key: Array, log_density: Callable[[Array, Array], Array], start: Normal, num_bits: int, num_chains: int) -> Annealed:
    """Chains from a normal distribution, and bits from fair coins, to a density; traced.

    :param log_density: of ``(chains, size)`` and bits ``(chains, num_bits)``, of shape ``(chains,)``.
    """
    start_key, bits_key, steps_key = jax.random.split(rng_key, 3)
    white = start.whiten(start.sample(start_key, num_chains, WIDTHS))
    bits = jax.random.bernoulli(bits_key, 0.5, (num_chains, num_bits)).astype(white.dtype)
    size, dtype = white.shape[1], white.dtype

    def first(white: Array) -> Array:
        return start.log_prob(start.unwhiten(white), WIDTHS) - num_bits * math.log(2)

    def last(white: Array, bits: Array) -> Array:
        found = log_density(start.unwhiten(white), bits)
        return jnp.where(jnp.isnan(found), -jnp.inf, found)

    def chains_at(white: Array, bits: Array) -> _Chains:
        ends = jax.vjp(first, white), jax.vjp(lambda white: last(white, bits), white)
        scores = [pull(jnp.ones_like(found))[0] for found, pull in ends]
        log_densities = jnp.stack([found for found, _ in ends], 1)
        return _Chains(white, bits, log_densities, jnp.nan_to_num(jnp.stack(scores, 1), posinf=0, neginf=0))

    def step(carry: _Carry, step: _Step) -> tuple[_Carry, None]:
        old, log_weights, log_size = carry
        h, is_start = jnp.exp(log_size), step.beta == 0
        move_key, flip_key, accept_key = jax.random.split(step.key, 3)
        stays = step.is_flip | is_start
        moved = langevin_move(move_key, old.white, _on_path(step.beta, old.scores), h, jnp.sqrt(2 * h))
        flipped = jnp.where(step.is_flip, _flipped(flip_key, old.bits), old.bits)
        new = chains_at(jnp.where(stays, old.white, moved), flipped)  # the one place where the density is compiled
        log_weights += jnp.where(step.rise > 0, step.rise * (old.log_densities[:, 1] - old.log_densities[:, 0]), 0)
        log_ratio = _on_path(step.beta, new.log_densities - old.log_densities)
        back, there = (_log_move(*pair, step.beta, h) for pair in ((new, old), (old, new)))
        probability = metropolis(log_ratio + jnp.where(stays, 0, back - there))
        accept = is_start | jax.random.bernoulli(accept_key, probability)
        chains = jax.tree.map(lambda x, y: jnp.where(over_events(accept, x.ndim), x, y), new, old)
        log_size += jnp.where(stays, 0, ADAPTATION_GAIN * (probability.mean() - ACCEPTANCE))
        return (chains, log_weights, log_size), None

    nowhere = _Chains(white, bits, jnp.zeros((num_chains, 2), dtype), jnp.zeros((num_chains, 2, size), dtype))
    carry = nowhere, jnp.zeros(num_chains, dtype), jnp.asarray(math.log(STEP_SIZE), dtype)
    (chains, log_weights, _), _ = lax.scan(step, carry, _steps(steps_key, num_bits, dtype))
    weights = normalized_weights(log_weights)
    log_normalizer = logsumexp(log_weights) - math.log(num_chains)
    return Annealed(start.unwhiten(chains.white), chains.bits, weights, log_normalizer, effective_sample_size(weights))


def _steps(rng_key: Array, num_bits: int, dtype: Any) -> _Step:
    """All steps: at 0, where densities are looked up, and some at each temperature."""
    flips = np.arange(NUM_MOVES + min(num_bits, MAX_FLIPS)) >= NUM_MOVES
    betas = np.linspace(0, 1, NUM_TEMPERATURES + 1) ** POWER
    rises = np.zeros((NUM_TEMPERATURES, len(flips)))
    rises[:, 0] = np.diff(betas)
    beta, rise = np.append(0, np.repeat(betas[1:], len(flips))), np.append(0, rises.ravel())
    is_flip = np.append(False, np.tile(flips, NUM_TEMPERATURES))
    return _Step(jax.random.split(rng_key, len(beta)), jnp.asarray(beta, dtype), jnp.asarray(rise, dtype), jnp.asarray(is_flip))


def _flipped(rng_key: Array, bits: Array) -> Array:
    """One bit of each chain flipped."""
    num_chains, num_bits = bits.shape
    which = jax.random.randint(rng_key, (num_chains, 1), 0, max(1, num_bits))
    return jnp.where(jnp.arange(num_bits) == which, 1 - bits, bits)


def _on_path(beta: Array, ends: Array) -> Array:
    """What log densities or scores, ``(chains, 2, ...)``, are on the way."""
    return (1 - beta) * ends[:, 0] + beta * ends[:, 1]


def _log_move(start: _Chains, to: _Chains, beta: Array, h: Array) -> Array:
    """The log density of a move from one place to another, but for a constant."""
    return log_langevin(to.white, start.white, _on_path(beta, start.scores), h, start.white.shape[:1])
