# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How far a density stands from what it learns from: in closed form, and nothing where there is nothing but noise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebm import ParticleMMLE, ScoreMatching, SlicedScoreMatching, TiltedDistribution, diagnose, negative_phase
from numpyro_ebm.evaluate.natural_distance import natural_distance
from numpyro_ebm.evaluate.stationarity import FROM_DATA, FROM_POSTERIOR
from numpyro_ebm.evaluate.yardstick import LIKELIHOOD

KEY = jax.random.key(0)
Y = 1.0 + np.random.default_rng(0).standard_normal(200)


def normal(y):
    """N(tilt, 1)."""
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", TiltedDistribution(dist.Normal(0, 1), lambda y: -tilt * y), obs=y)


def hierarchical(y):
    """z of N(tilt, 1), seen with as much noise."""
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


def posterior(y):
    """Exact where the tilt is that of the model."""
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("z", dist.Normal((y + tilt) / 2, 0.5**0.5))


def nothing(*args):
    pass


def fitted(model, guide, y, init_params, num_chains=200):
    """A fit that stays where it starts, with its chains."""
    phase = negative_phase(model, num_chains=num_chains)
    svi = SVI(phase, guide, optax.sgd(0.0), Trace_ELBO())
    return svi.run(KEY, 50, y, progress_bar=False, init_params=init_params), phase


@pytest.mark.parametrize("tilt", [0.0, 1.0, 1.5])
def test_distance_from_data_is_that_of_the_means_in_standard_deviations(tilt):
    fit, phase = fitted(normal, nothing, Y, {"tilt": tilt})
    found = told(diagnose(fit, phase, Y, warn=False), FROM_DATA)
    error = (found.most - 0.15) / 3
    assert error < 0.06
    assert abs(abs(found.value) - abs(Y.mean() - tilt)) < 4 * error
    assert found.is_well == (tilt == 1.0)


def test_distance_of_a_mode_is_the_difference_of_its_weights_over_their_root():
    # Two modes that the base has with equal weights; the energy gives one of them 1 / (1 + e^-a).
    modes = dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.array([-5.0, 5.0]), 0.5))

    def model(x):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", TiltedDistribution(modes, lambda x: -a * (x > 0)), obs=x)

    x = np.where(np.arange(100) < 30, 5.0, -5.0)
    fit, phase = fitted(model, nothing, x, {"a": 0.0}, num_chains=1000)
    found = told(diagnose(fit, phase, x, warn=False), FROM_DATA)
    assert abs(found.value - 0.2 / 0.5) < 4 * (found.most - 0.15) / 3


def test_prior_is_compared_with_the_samples_of_the_guide():
    tilt = float(Y.mean())  # the maximum of the marginal N(tilt, 2)
    fit, phase = fitted(hierarchical, posterior, Y, {"tilt": tilt})
    assert told(diagnose(fit, phase, Y, guide=posterior), FROM_POSTERIOR).value < 0.15
    fit, phase = fitted(hierarchical, posterior, Y, {"tilt": tilt - 1})  # the posterior follows by half
    found = told(diagnose(fit, phase, Y, guide=posterior, warn=False), FROM_POSTERIOR)
    assert abs(found.value - 0.5) < 4 * (found.most - 0.15) / 3
    with pytest.warns(
        UserWarning, match=r"site 'z': distance of prior from posterior is .* the prior and the posterior .*rate fall"
    ):
        diagnose(fit, phase, Y, guide=posterior)
    # Without the guide all other numbers are well, and would be taken for the fit, which is wrong.
    with pytest.warns(UserWarning, match=r"site 'z': distance of prior from posterior cannot be told: give .*guide="):
        report = diagnose(fit, phase, Y)
    assert not report.is_well
    unknown = told(report, FROM_POSTERIOR)
    assert report.trouble == (unknown,)
    assert not unknown.is_told
    assert unknown.fix == "give diagnose(..., guide=) the guide of the fit, whose samples the prior has learned from"


def test_particles_are_what_a_prior_is_compared_with():
    def told_at(tilt):
        engine = ParticleMMLE(hierarchical, optax.sgd(0.0), num_particles=20, kernel="mala")
        result = engine.run(KEY, 100, Y, progress_bar=False, report=False, init_params={"tilt": tilt})
        return told(diagnose(result, engine, Y, warn=False), FROM_POSTERIOR)

    assert told_at(float(Y.mean())).is_well
    found = told_at(float(Y.mean()) - 1)
    assert abs(found.value - 0.5) < 4 * (found.most - 0.15) / 3


def test_rows_of_a_batch_stand_for_the_data():
    def model(y):
        tilt = numpyro.param("tilt", 0.0)
        with numpyro.plate("data", len(y), subsample_size=50):
            numpyro.sample(
                "y", TiltedDistribution(dist.Normal(0, 1), lambda y: -tilt * y), obs=numpyro.subsample(jnp.asarray(y), 0)
            )

    fit, phase = fitted(model, nothing, Y, {"tilt": 0.0})
    report = diagnose(fit, phase, Y, warn=False)
    found = told(report, FROM_DATA)
    assert abs(found.value - Y.mean()) < 4 * (found.most - 0.15) / 3
    # four batches are all rows, each of them once
    np.testing.assert_allclose(told(report, LIKELIHOOD).value, dist.Normal(0, 1).log_prob(Y).mean(), atol=2e-3)


def test_energies_of_rows_are_compared_row_by_row():
    # Data that a mean over all rows would be right for, and that no row is right for.
    y, x = np.array([1.0, -1.0] * 50), np.array([1.0, -1.0] * 50)

    def model(y, x):
        slope = numpyro.param("slope", 0.0)
        with numpyro.plate("data", len(y)):
            energy = TiltedDistribution(dist.Normal(0, 1), lambda by, y: -by * y, params=slope * x, batch_shape=(len(y),))
            numpyro.sample("y", energy, obs=y)

    phase = negative_phase(model, num_chains=64)
    svi = SVI(phase, nothing, optax.sgd(0.0), Trace_ELBO())
    for slope, wanted in [(1.0, 0.0), (0.4, 0.6)]:
        fit = svi.run(KEY, 50, y, x, progress_bar=False, init_params={"slope": slope})
        found = told(diagnose(fit, phase, y, x, warn=False), FROM_DATA)
        assert abs(found.value - wanted) < 4 * (found.most - 0.15) / 3


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_has_no_distance(seed):
    """Of 50 parameters, whose estimated gradient is all noise: it would be .4 along itself."""
    one, other = np.random.default_rng(seed).standard_normal((2, 40, 20, 50))
    value, error = natural_distance(
        lambda w, x: x @ w["w"], {"w": jnp.zeros(50)}, jnp.asarray(one), jnp.asarray(other), is_all=False
    )
    assert abs(value) < 4.5 * error
    assert 0.02 < error < 0.06  # 1 / sqrt(400), of either side, and of two halves


def test_what_is_not_a_maximum_of_its_own_is_not_told():
    def shared(y):
        tilt = numpyro.param("tilt", 0.0)
        numpyro.sample("mean", dist.Normal(tilt, 1), obs=0.3)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", TiltedDistribution(dist.Normal(0, 1), lambda y: -tilt * y), obs=y)

    fit, phase = fitted(shared, nothing, Y, {"tilt": 0.0})
    assert "shares them with other sites" in told(diagnose(fit, phase, Y), FROM_DATA).fix


def test_a_guide_without_a_latent_is_refused():
    fit, phase = fitted(hierarchical, posterior, Y, {"tilt": 1.0})
    with pytest.raises(ValueError, match=r"the guide has no value of \['z'\], latent sites of the model"):
        diagnose(fit, phase, Y, guide=nothing)


def test_an_engine_needs_no_guide():
    engine = ScoreMatching(normal, optax.adam(0.1), SlicedScoreMatching())
    result = engine.run(KEY, 2, Y, progress_bar=False, report=False)
    with pytest.raises(ValueError, match="guide is for SVI"):
        diagnose(result, engine, Y, guide=nothing)


def test_a_fit_whose_rate_falls_arrives():
    phase = negative_phase(hierarchical, num_chains=200)
    guide = AutoNormal(phase)
    svi = SVI(phase, guide, optax.adam(optax.cosine_decay_schedule(0.05, 300)), Trace_ELBO())
    assert told(diagnose(svi.run(KEY, 300, Y, progress_bar=False), phase, Y, guide=guide), FROM_POSTERIOR).is_well
