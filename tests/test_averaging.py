# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Averages of the iterates, the same for every engine."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_ebm import BiDVL, BiSM, DenoisingScoreMatching, EnergyDistribution, ParticleMMLE, ScoreMatching, VaGES

KEY = jax.random.key(2)
Y = jnp.array([0.4, 2.9, 1.1, 3.2, -0.6, 1.4])
SGD, DENOISING = optax.sgd(0.05), DenoisingScoreMatching(0.3)


def _marginal(y):
    loc = numpyro.param("loc", 0.5)
    spread = numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(loc, spread), obs=y)


def _joint(y):
    loc = numpyro.param("loc", 0.5)
    spread = numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 0.5))
        numpyro.sample("y", dist.Normal(x, spread), obs=y)


def _guide(y):
    width = numpyro.param("width", 0.5, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("x", dist.Normal(numpyro.param("shift", 0.5), width))


def _energy(y):
    center = numpyro.param("center", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: (y - center) ** 2 / 2), obs=y)


ENGINES = {
    "ParticleMMLE": lambda **settings: ParticleMMLE(_joint, SGD, 3, 0.05, **settings),
    "ScoreMatching": lambda **settings: ScoreMatching(_marginal, SGD, DENOISING, **settings),
    "BiSM": lambda **settings: BiSM(_joint, _guide, SGD, SGD, DENOISING, num_inner_steps=1, **settings),
    "VaGES": lambda **settings: VaGES(_joint, _guide, SGD, SGD, DENOISING, num_inner_steps=1, **settings),
    "BiDVL": lambda **settings: BiDVL(_energy, _guide, _joint, SGD, SGD, SGD, **settings),
}
POSITIVE = {"spread", "width"}


def _averaged(iterates, eta):
    """By the weights written out: of an iterate its own, times what each later one leaves of it."""
    t = np.arange(1, len(iterates) + 1)
    own = (1 + eta) / (t + eta)
    weights = own * np.append(np.cumprod((1 - own)[::-1])[::-1][1:], 1)
    return weights @ iterates


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_returns_the_average_of_unconstrained_iterates(name):
    """Whether by a run, or by single steps with a pickled state between."""
    engine = ENGINES[name](average_iterates=True)
    result = engine.run(KEY, 7, Y, progress_bar=False, collect=lambda state: state.params)
    for site, values in result.collected.items():
        iterates = np.log(np.asarray(values, float)) if site in POSITIVE else np.asarray(values, float)
        mean = _averaged(iterates, 3)
        np.testing.assert_allclose(result.params[site], np.exp(mean) if site in POSITIVE else mean, rtol=1e-5)
    state = engine.init(KEY, Y)
    for step in range(7):
        state, _ = engine.update(state, Y)
        if step == 3:
            state = pickle.loads(pickle.dumps(state._replace(rng_key=jax.random.key_data(state.rng_key))))
            state = state._replace(rng_key=jax.random.wrap_key_data(state.rng_key))
    jax.tree.map(np.testing.assert_array_equal, engine.get_params(state), result.params)


def test_the_exponent_is_a_setting_and_nothing_else_is():
    """With 0 it is the mean of the iterates, which are those of an engine that does not average."""
    engine = ENGINES["ScoreMatching"](average_iterates=0)
    result = engine.run(KEY, 6, Y, progress_bar=False, collect=lambda state: state.params["loc"])
    np.testing.assert_allclose(result.params["loc"], np.mean(result.collected), rtol=1e-6)
    last = ENGINES["ScoreMatching"]().run(KEY, 6, Y, progress_bar=False).params["loc"]
    np.testing.assert_array_equal(result.state.params["loc"], last)
    for wrong in ("yes", -1.0, None):
        with pytest.raises(ValueError, match="average_iterates must be a finite number of 0 or more"):
            ENGINES["ScoreMatching"](average_iterates=wrong)


def test_a_fit_that_did_not_average_goes_on_with_an_average_from_there():
    plain, engine = ENGINES["ScoreMatching"](), ENGINES["ScoreMatching"](average_iterates=0)
    start = plain.run(KEY, 5, Y, progress_bar=False).state
    assert start.average == ()
    np.testing.assert_array_equal(engine.get_params(start)["loc"], start.params["loc"])
    result = engine.run(KEY, 3, Y, init_state=start, progress_bar=False, collect=lambda state: state.params["loc"])
    np.testing.assert_allclose(result.params["loc"], np.mean(result.collected), rtol=1e-6)
    assert int(engine.update(start, Y)[0].average.num_iterates) == 1


def test_a_step_that_is_not_made_is_not_averaged():
    engine = ENGINES["ScoreMatching"](average_iterates=True)
    state, _ = engine.update(engine.init(KEY, Y), Y)
    skipped, loss = engine.stable_update(state, Y * jnp.nan)
    assert jnp.isnan(loss)
    jax.tree.map(np.testing.assert_array_equal, skipped.average, state.average)


def test_an_average_is_nearer_to_the_optimum_than_the_last_iterate():
    """Of particles whose parameter swings: by a factor of about ten in the mean square."""
    engine = ParticleMMLE.ipla(_joint, num_particles=4, step_size=0.03, average_iterates=True)

    def errors(key):
        state = jax.lax.fori_loop(0, 2000, lambda _, state: engine.update(state, Y)[0], engine.init(key, Y))
        return jnp.array([state.params["loc"], engine.get_params(state)["loc"]]) - Y.mean()

    last, averaged = (jax.vmap(errors)(jax.random.split(KEY, 50)) ** 2).mean(0)
    assert averaged < 0.3 * last
