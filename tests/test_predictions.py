# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Which fraction of data lies beyond 9 predictions: by quadrature, 2 of 10 where the model is right."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told
from scipy.stats import norm

from numpyro_ebm import ParticleMMLE, diagnose
from numpyro_ebm.evaluate.predictions import BEYOND, MOST, NUM_PREDICTIONS, PULL, prediction_findings, predictions
from numpyro_ebm.program.run import run_model

KEY = jax.random.key(0)
NUM = 4000
Y = np.random.default_rng(0).standard_normal(NUM)


def predicted(model, *args):
    def run_at(key, run, latents):
        return run_model(model, args, {}, key, latents=latents)

    return jax.jit(lambda key: predictions(key, lambda key: run_model(model, args, {}, key), run_at))(KEY)


@pytest.mark.parametrize("noise", [1.0, 0.5, 2.0])
def test_fraction_is_that_of_the_normal_distribution(noise):
    def model(y):
        numpyro.sample("y", dist.Normal(0, noise).expand([NUM]), obs=y)

    found = predicted(model, Y).beyond["y"]
    x = np.linspace(-8, 8, 4001)
    below = norm.cdf(x / noise)
    exact = np.trapezoid((below**NUM_PREDICTIONS + (1 - below) ** NUM_PREDICTIONS) * norm.pdf(x), x)
    if noise == 1:
        assert exact == pytest.approx(0.2, abs=1e-6)
    assert found.fraction == pytest.approx(exact, abs=4.5 * np.sqrt(exact * (1 - exact) / NUM))
    assert found.num_data == NUM


def test_sites_that_are_not_compared():
    """What is masked, a factor, or of bits that are either of two values; and counts are, and lie beyond more rarely."""

    def model(y):
        numpyro.sample("y", dist.Normal(0, 1).expand([NUM]), obs=y)
        numpyro.sample("counts", dist.Poisson(3.0).expand([NUM]), obs=np.random.default_rng(1).poisson(3.0, NUM))
        numpyro.sample("masked", dist.Normal(0, 1).expand([NUM]).mask(jnp.arange(NUM) < 5), obs=y)
        numpyro.factor("factor", y.sum())

    found = predicted(model, Y).beyond
    assert sorted(found) == ["counts", "y"]
    assert 0.05 < found["counts"].fraction < 0.2


def noisy(y):
    """A noise that starts at a twentieth of what is right, beside latents that make up for nothing."""
    noise = numpyro.param("noise", 0.05, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Normal(0, 0.01))
        numpyro.sample("y", dist.Normal(z, noise), obs=y)


@pytest.mark.parametrize(("rate", "is_well"), [(0.0, False), (0.05, True)])
def test_noise_that_has_not_arrived_is_told(rate, is_well):
    engine = ParticleMMLE(noisy, optax.adam(rate), num_particles=2, kernel="mala")
    result = engine.run(KEY, 300, Y[:200], progress_bar=False, report=False)
    found = told(diagnose(result, engine, Y[:200], warn=False), BEYOND)
    assert found.is_well == is_well, found
    assert found.most == pytest.approx(MOST + 1.5 / 200**0.5)


@pytest.mark.parametrize(("noise", "spread"), [(1.0, 1.0), (1.0, 0.1), (2.5, 0.1)])
def test_pull_on_latents_is_that_of_the_variances(noise, spread):
    """Five data for each of many latents of N(0, spread), which stand for N(0, 2^2) and a noise of 1."""
    groups = 2.0 * np.random.default_rng(2).standard_normal((NUM, 1)) + np.random.default_rng(3).standard_normal((NUM, 5))
    if spread == 1.0:  # as the model has it: latents from their posterior, and data of the model
        groups = groups - groups.mean(1, keepdims=True) + np.random.default_rng(4).standard_normal((NUM, 1)) * (1 + 0.2) ** 0.5

    def model(y):
        precision = 1 / spread**2 + 5 / noise**2
        mean = y.mean(1, keepdims=True) * 5 / noise**2 / precision
        with numpyro.plate("groups", NUM, dim=-2):
            z = numpyro.sample("z", dist.Normal(mean, precision**-0.5))  # the posterior
            with numpyro.plate("data", 5, dim=-1):
                numpyro.sample("y", dist.Normal(z, noise), obs=y)

    found = predicted(model, groups)
    ratio, error = found.pulls["z"]
    variance = (1.0 if spread == 1.0 else 4.0) + 0.2  # of the means of five
    weight = 5 / noise**2 / (1 / spread**2 + 5 / noise**2)
    # the score is 5 / noise^2 times what is left of a mean, and varies by 5 / noise^2 where predictions are data
    left = (1 - weight) ** 2 * variance + 1 / (1 / spread**2 + 5 / noise**2)
    exact = left * 5 / noise**2
    if spread == 1.0:
        assert exact == pytest.approx(1)
    assert ratio == pytest.approx(exact, rel=4.5 * (2 / NUM) ** 0.5)
    assert error == pytest.approx((2 / NUM) ** 0.5, rel=0.1)
    (finding,) = [f for f in prediction_findings(found) if f.quantity == PULL]
    assert finding.value == pytest.approx(exact**0.5, rel=0.1)
    assert finding.is_well == (spread == 1.0)
