# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Weights of modes of a density on a grid, against mixtures whose weights are known."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told

from numpyro_ebm import EnergyDistribution, ExactScoreMatching, ScoreMatching, diagnose
from numpyro_ebm.evaluate.density import known_density
from numpyro_ebm.evaluate.mode_weights import WEIGHTS_LOSE, mode_weights
from numpyro_ebm.infer.visible_density import FROM_ROWS

KEY = jax.random.key(0)
PLACES = jnp.array([[-3.0, 0.0], [3.0, 1.0], [0.0, 8.0]])
OF_DENSITY = np.array([0.5, 0.3, 0.2])


def mixture(weights, places=PLACES, scale=0.5):
    return dist.MixtureSameFamily(
        dist.Categorical(jnp.asarray(weights, jnp.float32)), dist.Normal(places, scale).to_event(places.ndim - 1)
    )


def energy_of(modes):
    return EnergyDistribution(lambda x: 3.0 - modes.log_prob(x), event_shape=modes.event_shape)


@jax.jit
def in_the_plane(rows):
    energy = energy_of(mixture(OF_DENSITY))
    return mode_weights(known_density(KEY, energy, energy.chain_sampler, rows), rows)


def rows_with(weights, num_rows, key=KEY):
    """As many rows of each mode as its weight says."""
    which = np.repeat(np.arange(3), np.round(np.asarray(weights) * num_rows).astype(int))
    return PLACES[which] + 0.5 * jax.random.normal(key, (num_rows, 2))


@pytest.mark.parametrize("of_rows", [(0.5, 0.3, 0.2), (0.4, 0.35, 0.25), (0.5, 0.1, 0.4), (0.2, 0.6, 0.2)])
def test_modes_have_the_weights_of_the_mixture(of_rows):
    found, of_rows = in_the_plane(rows_with(of_rows, 1000)), np.asarray(of_rows)
    assert found.lost == pytest.approx(np.sum(of_rows * np.log(of_rows / OF_DENSITY)), abs=2e-3 * max(of_rows / OF_DENSITY))
    assert found.num_modes == 3
    if found.lost > 0.01:
        most = np.argmax(abs(of_rows - OF_DENSITY))
        assert float(found.of_rows) == pytest.approx(of_rows[most], abs=2e-3)
        assert float(found.of_density) == pytest.approx(OF_DENSITY[most], abs=2e-3)
        assert np.abs(found.place - PLACES[most]).max() < 0.2


def test_samples_of_the_density_lose_what_chance_does():
    """Twice the rows times the loss is chi-square with two degrees of freedom."""
    keys = jax.random.split(jax.random.key(1), 60)
    statistics = np.array([400 * float(in_the_plane(mixture(OF_DENSITY).sample(key, (200,))).lost) for key in keys])
    assert abs(statistics.mean() - 2) < 4 * 2 / 60**0.5


def test_one_mode_loses_nothing():
    energy, rows = energy_of(dist.Normal(0.0, 1.0)), jax.random.normal(KEY, (500,)) * 3 + 1
    found = mode_weights(known_density(KEY, energy, energy.chain_sampler, rows), rows)
    assert found.lost == pytest.approx(0, abs=1e-5)
    assert found.num_modes == 1


def test_a_density_that_is_known_by_samples_has_no_modes():
    energy = EnergyDistribution(lambda x: (x**2).sum() / 2, event_shape=(3,), initial=dist.Normal(0, 1).expand([3]).to_event(1))
    rows = jax.random.normal(KEY, (100, 3))
    assert mode_weights(known_density(KEY, energy, energy.chain_sampler, rows), rows) is None


def test_weights_that_distribution_functions_allow_are_told():
    """Rows have .3 at -4 and .7 at 4, and the density .4 and .6: .1 of a distribution function, and .022 nats."""

    def model(x):
        upper = numpyro.param("upper", 0.6)
        modes = mixture(jnp.stack([1 - upper, upper]), jnp.array([-4.0, 4.0]))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", energy_of(modes), obs=x)

    rows = 0.5 * jax.random.normal(KEY, (2000,)) + jnp.where(jnp.arange(2000) < 600, -4.0, 4.0)
    engine = ScoreMatching(model, optax.sgd(0.0), ExactScoreMatching())

    def report_at(upper):
        result = engine.run(KEY, 1, rows, progress_bar=False, init_params={"upper": upper}, report=False)
        return diagnose(result, engine, rows, warn=False)

    wrong = report_at(0.6)
    (found,) = wrong.trouble
    assert found.quantity == WEIGHTS_LOSE
    assert found.value == pytest.approx(0.3 * np.log(0.3 / 0.4) + 0.7 * np.log(0.7 / 0.6), abs=1e-3)
    assert told(wrong, FROM_ROWS).is_well
    assert "0.3 stand at the mode about -4" in found.fix or "0.7 stand at the mode about 4" in found.fix
    assert report_at(0.7).is_well
    far = told(report_at(0.2), WEIGHTS_LOSE)  # of which the line on distribution functions tells
    assert far.most is None
    assert far.value == pytest.approx(0.3 * np.log(0.3 / 0.8) + 0.7 * np.log(0.7 / 0.2), abs=5e-3)
