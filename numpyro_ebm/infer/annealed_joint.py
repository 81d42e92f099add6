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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm.evaluate.yardstick import Normal
from numpyro_ebm.samplers import MALA, MALAState
from numpyro_ebm.weights import effective_sample_size, normalized_weights

NUM_CHAINS, NUM_TEMPERATURES = 4096, 100
POWER = 3  # of the temperatures: most is decided near 0
WIDTHS = 1.0, 2.0, 4.0, 8.0  # of the distribution that chains start from, where the moments say 1
SAMPLER = MALA(step_size=0.5, num_steps=2, num_jumps=0)
MAX_FLIPS = 8  # of bits, of each chain at each temperature


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


_Carry = tuple[MALAState, Array, Array]  # where chains stand, their bits, and their log weights


def anneal(rng_key: Array, log_density: Callable[[Array, Array], Array], start: Normal, num_bits: int, num_chains: int) -> Annealed:
    """Chains from a normal distribution, and bits from fair coins, to a density; traced.

    :param log_density: of ``(chains, size)`` and bits ``(chains, num_bits)``, of shape ``(chains,)``.
    """
    start_key, bits_key, moves_key = jax.random.split(rng_key, 3)
    white = start.whiten(start.sample(start_key, num_chains, WIDTHS))  # where steps of one size suit all directions
    bits = jax.random.bernoulli(bits_key, 0.5, (num_chains, num_bits)).astype(white.dtype)

    def first(white: Array) -> Array:
        return start.log_prob(start.unwhiten(white), WIDTHS) - num_bits * math.log(2)

    def last(white: Array, bits: Array) -> Array:
        found = log_density(start.unwhiten(white), bits)
        return jnp.where(jnp.isnan(found), -jnp.inf, found)

    def step(carry: _Carry, at: tuple[Array, Array, Array]) -> tuple[_Carry, None]:
        (state, bits, log_weights), (key, before, beta) = carry, at
        move_key, flip_key = jax.random.split(key)

        def path(white: Array, bits: Array) -> Array:
            return (1 - beta) * first(white) + beta * last(white, bits)

        log_weights += (beta - before) * (last(state.position, bits) - first(state.position))
        bits = _flipped(flip_key, lambda bits: path(state.position, bits), bits)
        return (SAMPLER.run(move_key, lambda white: path(white, bits), state), bits, log_weights), None

    betas = jnp.linspace(0, 1, NUM_TEMPERATURES + 1, dtype=white.dtype) ** POWER
    at = jax.random.split(moves_key, NUM_TEMPERATURES), betas[:-1], betas[1:]
    carry = SAMPLER.init(white), bits, jnp.zeros(num_chains, white.dtype)
    (state, bits, log_weights), _ = lax.scan(step, carry, at)
    weights = normalized_weights(log_weights)
    log_normalizer = logsumexp(log_weights) - math.log(num_chains)
    return Annealed(start.unwhiten(state.position), bits, weights, log_normalizer, effective_sample_size(weights))


def _flipped(rng_key: Array, log_density: Callable[[Array], Array], bits: Array) -> Array:
    """Bits after some flips of one of them, accepted by Metropolis-Hastings."""
    num_chains, num_bits = bits.shape
    if num_bits == 0:
        return bits

    def flip(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        old, log_old = carry
        which_key, accept_key = jax.random.split(key)
        which = jax.random.randint(which_key, (num_chains, 1), 0, num_bits)
        new = jnp.where(jnp.arange(num_bits) == which, 1 - old, old)
        log_new = log_density(new)
        accept = jnp.log(jax.random.uniform(accept_key, (num_chains,))) < log_new - log_old
        return (jnp.where(accept[:, None], new, old), jnp.where(accept, log_new, log_old)), None

    carry = bits, log_density(bits)
    return lax.scan(flip, carry, jax.random.split(rng_key, min(num_bits, MAX_FLIPS)))[0][0]
