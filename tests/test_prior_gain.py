# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a prior would gain by steps of likelihood: that of the maximum in closed form, and nothing where rows cannot tell."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told
from numpyro.infer import SVI, Trace_ELBO
from scipy.stats import norm

from numpyro_ebm import ParticleMMLE, TiltedDistribution, diagnose, negative_phase
from numpyro_ebm.evaluate.prior_gain import (
    CHANCE,
    GAIN,
    MIN_WORTH,
    NATS,
    PriorGain,
    _best_prior,
    prior_gain,
    prior_gain_findings,
)
from numpyro_ebm.program.run import run_model

KEY = jax.random.key(0)
Y = 1 + 2**0.5 * norm.ppf((np.arange(200) + 0.5) / 200)  # of the mean 1 and nearly the variance 2
GRID = norm.ppf((np.random.default_rng(0).permutation(3200) + 0.5) / 3200).reshape(16, 200)


def gain_of(model, y, params, of_energies=("loc",), reference=3.0, **data):
    """Of a prior N(loc, exp(log_sd)^2), on samples that are spread evenly, of it and of a wide normal distribution."""
    y, own = jnp.asarray(y, jnp.result_type(float)), {name: jnp.asarray(params[name]) for name in of_energies}
    data = {**jax.tree.map(jnp.asarray, params), **data}
    program = run_model(model, (y,), {}, KEY, data=data)
    sd = math.exp(params.get("log_sd", 0.0))
    at = np.concatenate([sd * GRID, reference * GRID], 1)
    log_prior, log_reference = norm.logpdf(at, 0, sd), norm.logpdf(at, 0, reference)
    log_weights = math.log(2) + log_prior - np.logaddexp(log_prior, log_reference)

    def log_density(own, x):
        return -(((x - own["loc"]) / jnp.exp(own.get("log_sd", 0.0))) ** 2) / 2  # without the normalizer

    samples = jnp.asarray(params["loc"] + at, y.dtype), jnp.asarray(log_weights, y.dtype)
    args = model, (y,), {}, data, program, "z", *samples, log_density, own, set(of_energies)
    return jax.jit(lambda key: prior_gain(key, *args))(KEY)


def seen_with(noise, size=None):
    """z of N(loc, exp(log_sd)^2), seen with noise."""

    def model(y):
        loc, log_sd = numpyro.param("loc", 0.0), numpyro.param("log_sd", 0.0)
        s = noise() if callable(noise) else noise
        with numpyro.plate("rows", len(y), subsample_size=size):
            z = numpyro.sample("z", dist.Normal(loc, jnp.exp(log_sd)))
            numpyro.sample("y", dist.Normal(z, s), obs=y if size is None else numpyro.subsample(y, 0))

    return model


def to_maximum(y, loc, variance):
    """Nats a row from N(loc, variance) to the normal distribution that fits best."""
    return (np.var(y) + (np.mean(y) - loc) ** 2) / variance / 2 - 0.5 - math.log(np.var(y) / variance) / 2


@pytest.mark.parametrize("loc", [1.0, 0.0, -0.5])
def test_gain_is_that_of_the_maximum(loc):
    found = gain_of(seen_with(1.0), Y, {"loc": loc})
    assert found.value == pytest.approx((Y.mean() - loc) ** 2 / 4, abs=5e-3)
    assert found.error < 0.03


def test_what_rows_share_goes_along():
    # The sum of both variances is known by the rows, and neither of the two: a row of two outcomes knows them.
    def model(y):
        loc, log_sd = numpyro.param("loc", 0.0), numpyro.param("log_sd", 0.0)
        noise = numpyro.param("noise", 1.0, constraint=dist.constraints.positive)
        with numpyro.plate("rows", len(y), dim=-2):
            z = numpyro.sample("z", dist.Normal(loc, jnp.exp(log_sd)))
            with numpyro.plate("outcomes", 2, dim=-1):
                numpyro.sample("y", dist.Normal(z, noise), obs=y)

    y = 1 + np.random.default_rng(0).normal(size=(300, 2)) + np.random.default_rng(1).normal(size=(300, 1))
    within, between = (np.diff(y) ** 2).mean() / 2, np.var(y.mean(1))

    def log_likelihood(of_mean, noise):  # of the mean of a row, and of the difference
        return -math.log(of_mean * noise) / 2 - (between / of_mean + within / noise) / 2

    wanted = log_likelihood(between, within) - log_likelihood(0.5**2 + 1.6**2 / 2, 1.6**2)
    params = {"loc": float(y.mean()), "log_sd": math.log(0.5), "noise": 1.6}
    assert gain_of(model, y, params, ("loc", "log_sd")).value == pytest.approx(wanted, abs=0.01)
    assert gain_of(model, y, params, ("loc", "log_sd", "noise")).value < wanted / 2  # of other energies it stays


def test_a_latent_that_rows_share_goes_along():
    noise = lambda: numpyro.sample("noise", dist.LogNormal(0, 10))  # noqa: E731
    found = gain_of(seen_with(noise), Y, {"loc": 1.0}, noise=jnp.array(3.0))
    assert found.value == pytest.approx(to_maximum(Y, 1.0, 10.0), abs=0.01)


def test_samples_of_a_reference_have_room_for_a_wider_prior():
    params = {"loc": 1.0, "log_sd": math.log(0.1)}
    wanted = to_maximum(Y, 1.0, 1 + 0.1**2)
    assert gain_of(seen_with(1.0), Y, params, ("loc", "log_sd")).value == pytest.approx(wanted, abs=5e-3)
    without = gain_of(seen_with(1.0), Y, params, ("loc", "log_sd"), reference=0.1)
    assert abs(without.value - wanted) > 0.05 or without.error > 0.05


def test_the_best_prior_is_found_where_no_step_leads():
    """Rows of two points, which no normal prior has: by a prior N(0, 9) and a noise of 1 they are thought to be of N(0, 10)."""
    y = np.concatenate([norm.ppf((np.arange(150) + 0.5) / 150) + point for point in (-3, 3)])
    found = gain_of(seen_with(1.0), y, {"loc": 0.0, "log_sd": math.log(3)})
    wanted = np.logaddexp(norm.logpdf(y, -3), norm.logpdf(y, 3)).mean() - math.log(2) - norm.logpdf(y, 0, 10**0.5).mean()
    assert found.value < 0.01
    assert found.of_best == pytest.approx(wanted, abs=0.03)
    same = gain_of(seen_with(1.0), Y, {"loc": 0.0})
    assert same.of_best == pytest.approx(to_maximum(Y, 0.0, 2.0), abs=0.02)


@pytest.mark.parametrize("noise", [0.15, 0.4, 0.8])
def test_rows_of_the_prior_itself_gain_what_chance_does(noise):
    z, weights = jnp.linspace(-6, 6, 401), norm.pdf(np.linspace(-6, 6, 401))
    weights = jnp.asarray(weights / weights.sum(), jnp.result_type(float))
    y = (1 + noise**2) ** 0.5 * jax.random.normal(KEY, (200, 100))
    found, told_apart = jax.jit(jax.vmap(lambda y: _best_prior(weights, -(((y - z[:, None]) / noise) ** 2) / 2)))(y)
    assert told_apart.mean() == pytest.approx((1 + noise**-2) ** 0.5, rel=0.05)  # half the log of both variances to the noise's
    by_chance = CHANCE * np.asarray(told_apart)
    gained = 100 * np.asarray(found)
    assert 0.6 < gained.mean() / by_chance.mean() < 1
    assert (gained > by_chance + 3 * np.sqrt(by_chance)).mean() < 0.01


@pytest.mark.parametrize(("num_params", "of_best", "is_well"), [(100, 0.12, False), (100, 0.08, True), (10, 0.12, True)])
def test_networks_are_asked_for_the_best_prior(num_params, of_best, is_well):
    """Of 300 rows that tell 3 values apart, 7.5 nats by chance and 3 standard deviations of them, and .04 each."""
    found = PriorGain(*map(jnp.asarray, (0.01, 0.001, 500.0, 300, of_best, 3.0, num_params)))
    steps, best = prior_gain_findings("z", found, are_well=True)
    assert steps.is_well
    assert best.is_well == is_well
    assert best.most is None or best.most == pytest.approx(0.04 + (7.5 + 3 * 7.5**0.5) / 300 + 1 / 500)
    assert prior_gain_findings("z", found, are_well=False)[1].most is None


def test_rows_of_a_batch_have_an_error_of_their_own():
    found = gain_of(seen_with(1.0, size=50), Y, {"loc": 0.0})
    assert abs(found.value - Y.mean() ** 2 / 4) < 4 * found.error < 0.3


def test_rows_that_cannot_tell_are_not_asked(monkeypatch):
    def by_index(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("groups", 100):
            z = numpyro.sample("z", dist.Normal(loc, 1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(z[jnp.arange(len(y)) // 2], 1), obs=y)

    assert gain_of(by_index, Y, {"loc": 0.0}).worth == 0  # the likelihood stands outside of the groups
    assert gain_of(seen_with(1e-4), Y, {"loc": 0.0}).worth < MIN_WORTH
    assert gain_of(seen_with(1.0), Y[:10], {"loc": 0.0}) is None

    monkeypatch.setattr("numpyro_ebm.evaluate.prior_gain.MAX_VALUES", 300)
    assert gain_of(seen_with(1.0), Y, {"loc": 0.0}) is None  # of 400 values of each sample

    def without_rows(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 1)), 1), obs=y)

    monkeypatch.undo()
    assert gain_of(without_rows, Y, {"loc": 0.0}) is None


def hierarchical(y):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


def guide(y):
    with numpyro.plate("data", len(y)):
        numpyro.sample("z", dist.Normal((y + 1) / 2, 0.5**0.5))


def by_svi(tilt):
    phase = negative_phase(hierarchical, num_chains=200)
    fit = SVI(phase, guide, optax.sgd(0.0), Trace_ELBO()).run(KEY, 50, Y, progress_bar=False, init_params={"tilt": tilt})
    return diagnose(fit, phase, Y, guide=guide, warn=False)


def by_particles(tilt):
    engine = ParticleMMLE(hierarchical, optax.sgd(0.0), num_particles=20, kernel="mala")
    fit = engine.run(KEY, 100, Y, progress_bar=False, report=False, init_params={"tilt": tilt})
    return diagnose(fit, engine, Y, warn=False)


@pytest.mark.parametrize("report_at", [by_svi, by_particles])
def test_a_prior_is_told_by_what_its_rows_would_gain(report_at):
    finding = told(report_at(1.0), GAIN)
    assert finding.is_well
    assert abs(finding.value) < finding.most - NATS
    assert told(report_at(0.0), GAIN).value == pytest.approx(0.25, abs=0.04)
