# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Normalizers and samples of joint densities of real numbers and bits: those of quadrature and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from numpyro_ebm.evaluate.yardstick import Normal
from numpyro_ebm.infer.annealed_joint import anneal

NUM_CHAINS = 2048
WEIGHTS = jnp.asarray(1.5 * np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)
BIASES = jnp.array([0.5, -1.0, 0.0, 1.0])
SCALE = 0.4
BITS = jnp.asarray(list(itertools.product([0, 1], repeat=4)), jnp.float32)
CONSTANT = -7.0
FAR = jnp.array([5.0, 0.0])


def start(size):
    return Normal(jnp.zeros(size), jnp.eye(size), jnp.ones(size), 2 * size)


def two_modes(x, bits):
    """The second mode is where the start has next to nothing, and has three times the mass of the first."""
    log_modes = jnp.stack([-((x / 0.5) ** 2).sum(-1) / 2, jnp.log(3.0) - (((x - FAR) / 0.5) ** 2).sum(-1) / 2])
    return logsumexp(log_modes, axis=0) + CONSTANT


def machine(x, bits):
    """Of a mode for each setting of the bits."""
    return bits @ BIASES - ((x - bits @ WEIGHTS.T) ** 2).sum(-1) / (2 * SCALE**2)


def coins(x, bits):
    """One real number that says nothing of the bits, of which neighbors are alike."""
    return bits @ BIASES + 1.5 * (bits[:, 1:] * bits[:, :-1]).sum(-1) - x[:, 0] ** 2 / 2


CASES = {
    "two modes": (two_modes, 2, 0, np.log(4 * 2 * np.pi * 0.25) + CONSTANT, lambda found: found.x[:, 0] > 2.5, 0.75, 250),
    "machine": (
        machine,
        3,
        4,
        logsumexp(BITS @ BIASES) + 3 * np.log(np.sqrt(2 * np.pi) * SCALE),
        lambda found: found.bits[:, 1],
        jax.nn.sigmoid(-1.0),
        550,
    ),
    "coins": (
        coins,
        1,
        4,
        logsumexp(coins(jnp.zeros((16, 1)), BITS)) + np.log(2 * np.pi) / 2,
        lambda found: found.bits[:, 2],
        jax.nn.softmax(coins(jnp.zeros((16, 1)), BITS)) @ BITS[:, 2],
        1500,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_normalizer_and_samples_are_exact(name):
    log_density, size, num_bits, log_normalizer, statistic, expected, worth = CASES[name]
    found = jax.jit(lambda key: anneal(key, log_density, start(size), num_bits, NUM_CHAINS))(jax.random.key(0))
    assert found.x.shape == (NUM_CHAINS, size)
    assert found.bits.shape == (NUM_CHAINS, num_bits)
    assert found.worth > worth  # of bits that stay where they start, 800 and 300
    assert found.log_normalizer == pytest.approx(float(log_normalizer), abs=4.5 * (1 / float(found.worth) - 1 / NUM_CHAINS) ** 0.5)
    spread = np.sqrt(float(expected * (1 - expected)) / float(found.worth))
    assert (found.weights * statistic(found)).sum() == pytest.approx(float(expected), abs=4.5 * spread)


def test_places_without_a_density_count_nothing():
    """Half of the plane has no density, and a strip of it has nan."""

    def half(x, bits):
        inside = jnp.where(x[:, 0] > 0, -(x**2).sum(-1) / 2, -jnp.inf)
        return jnp.where(x[:, 0] < -1, jnp.nan, inside)

    found = jax.jit(lambda key: anneal(key, half, start(2), 0, NUM_CHAINS))(jax.random.key(0))
    assert found.log_normalizer == pytest.approx(np.log(np.pi), abs=4.5 / float(found.worth) ** 0.5)
    assert (found.x[found.weights > 0, 0] > 0).all()
