# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Estimates that need no training: against their definitions, and the truth is never short of them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told
from helpers import hierarchical
from jax.scipy.special import logsumexp
from numpyro.infer import SVI, Trace_ELBO
from scipy.stats import norm

from numpyro_ebm import (
    EnergyDistribution,
    ExactScoreMatching,
    ParticleMMLE,
    ScoreMatching,
    TiltedDistribution,
    diagnose,
    negative_phase,
)
from numpyro_ebm.evaluate.stationarity import FROM_DATA, FROM_POSTERIOR
from numpyro_ebm.evaluate.yardstick import LIKELIHOOD, NATS, OF_OTHERS, OF_PRIOR, normal_of, rows_finding, shortfall

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def compared(x, log_density=None):
    """Of values ``(copies, owners, size)``."""
    x = jnp.asarray(x, jnp.float32)
    log_density = jnp.zeros(x.shape[:2]) if log_density is None else jnp.asarray(log_density, jnp.float32)
    return jax.jit(shortfall)(log_density, x)


@pytest.mark.parametrize("copies", [1, 4])
def test_mixture_comes_near_a_mixture_and_never_above_it(copies):
    """Of 1000 rows a mixture of the other half loses what its parameters are uncertain by, some hundredths of a nat."""
    means, rng = np.array([[-2.0, 0.0], [1.0, 1.0], [1.0, -1.0]]), np.random.default_rng(5)
    kind = rng.choice(3, 1000, p=[0.2, 0.3, 0.5])
    x = means[kind] + 0.3 * rng.normal(size=(copies, 1000, 2))
    densities = [norm.logpdf(x, mean, 0.3).sum(-1) + np.log(p) for mean, p in zip(means, [0.2, 0.3, 0.5], strict=True)]
    exact = np.logaddexp.reduce(densities)
    found = compared(x, exact)
    assert -0.06 < found.gains[1] < 0
    assert found.log_density == pytest.approx(exact.mean(), abs=1e-4)


def test_mixtures_are_of_few_elements():
    assert [len(compared(RNG.normal(size=(1, 60, size))).gains) for size in (10, 11)] == [2, 1]


def test_normal_distribution_has_the_moments_less_what_they_gain():
    x = RNG.normal(size=(1, 200, 2)) @ np.array([[1.0, 0.7], [0.0, 0.5]])
    entropy = np.linalg.slogdet(2 * np.pi * np.e * np.cov(x[0].T, bias=True))[1] / 2
    assert compared(x).gains[0] == pytest.approx(-entropy - 5 / 400, abs=1e-4)


def test_normal_distribution_of_few_values_has_no_correlations():
    x = RNG.normal(size=(1, 40, 5))
    x[..., 1] = x[..., 0]
    exact = -np.log(2 * np.pi * np.e * x[0].var(0)).sum() / 2
    assert compared(x).gains[0] == pytest.approx(exact - 10 / 80, abs=1e-4)


def test_normal_distribution_and_its_wider_one_are_normalized():
    x = RNG.normal(size=(500, 2)) @ np.array([[2.0, 0.7], [0.0, 0.5]])
    normal = normal_of(jnp.asarray(x, jnp.float32))
    drawn = np.asarray(normal.sample(KEY, 20_000, (1.0, 2.0)))
    assert np.cov(drawn.T, bias=True) == pytest.approx(2.5 * np.cov(x.T, bias=True), abs=0.4)
    # the mean of another density over this one is 1
    covariance = np.cov(x.T, bias=True)
    other = (
        -np.einsum("ni,ij,nj->n", drawn, np.linalg.inv(covariance), drawn) / 2 - np.linalg.slogdet(2 * np.pi * covariance)[1] / 2
    )
    weights = np.exp(other - np.asarray(normal.log_prob(jnp.asarray(drawn), (1.0, 2.0))))
    assert weights.mean() == pytest.approx(1, abs=4.5 * weights.std() / 20_000**0.5)


@pytest.mark.parametrize("rows", [40, 400])
@pytest.mark.parametrize("kind", ["bell", "rounded", "twins", "two modes"])
def test_the_truth_is_never_short(rows, kind):
    """Over many data sets, rounded and repeated rows among them, which make narrow components look good."""

    def of_seed(seed):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=rows)
        if kind == "twins":  # every row twice, with a little noise of its own
            x = np.repeat(z[: rows // 2], 2) + 0.01 * rng.normal(size=rows)
            return shortfall_of(x, norm.logpdf(x, 0, 1.0001))
        if kind == "two modes":
            x = np.where(rng.uniform(size=rows) < 0.3, -2, 2) + 0.3 * z
            return shortfall_of(x, np.log(0.3 * norm.pdf(x, -2, 0.3) + 0.7 * norm.pdf(x, 2, 0.3)))
        x = z.round(1) if kind == "rounded" else z
        return shortfall_of(x, norm.logpdf(x))

    judge = jax.jit(shortfall)

    def shortfall_of(x, log_density):
        arrays = (jnp.asarray(a, jnp.float32)[None] for a in (log_density, x))
        return rows_finding("x", judge(*arrays), "fix")

    assert all(of_seed(seed).is_well for seed in range(30))


def test_samples_of_one_row_belong_to_the_same_half():
    """Tight clouds around 12 places: a mixture that has seen others of a cloud would be far better."""
    rng = np.random.default_rng(1)
    places, noise = rng.normal(size=(1, 24, 1)), 0.01 * rng.normal(size=(20, 24, 1))
    x = places + noise
    apart, together = (compared(y, norm.logpdf(y)[..., 0]) for y in (x, np.moveaxis(x, 0, 1).reshape(1, -1, 1)))
    assert apart.gains[1] < 0.15
    assert together.gains[1] > 0.25


def test_finding_names_the_better_and_what_is_short():
    x = np.where(RNG.uniform(size=(1, 500, 1)) < 0.5, -3, 3) + 0.5 * RNG.normal(size=(1, 500, 1))
    found = compared(x, norm.logpdf(x, 0, 3)[..., 0])
    finding, best = rows_finding("x", found, "Do this."), float(found.log_density + found.gains[1])
    assert finding.fix == f"a mixture of normal distributions fitted to the other half of them has {best:.3g} there. Do this."
    assert finding.least == pytest.approx(best - NATS - 3 * (2 * NATS / 500) ** 0.5, abs=1e-5)
    assert not finding.is_well
    assert rows_finding("x", found, "Do this.", are_well=False).is_well


def of_rows_in_noise(num, **settings):
    """Two modes, seen with a noise that hides them, under a prior that is broad: the comparison, and the rows."""
    rng = np.random.default_rng(3)
    y = rng.choice([-1.5, 1.5], num, p=[0.3, 0.7]) + rng.normal(0, 0.25, num) + rng.normal(0, 0.8, num)
    share, variance = 9 / 9.64, 9 * 0.64 / 9.64  # of the posterior
    z = share * y + variance**0.5 * rng.normal(size=(200, num))
    return jax.jit(lambda *a: shortfall(*a, **settings))(*(jnp.asarray(a, jnp.float32) for a in (norm.logpdf(z, 0, 3), z))), z, y


def test_another_prior_gains_what_the_likelihood_of_rows_gains():
    found, z, y = of_rows_in_noise(400)
    before = norm.logpdf(y, 0, 9.64**0.5)
    by_normal = (norm.logpdf(y, z.mean(), (z.var() + 0.64) ** 0.5) - before).mean() - 2 / 800
    assert found.gains[0] == pytest.approx(by_normal, abs=0.01)
    sides = [np.log(p) + norm.logpdf(y, mean, (0.25**2 + 0.8**2) ** 0.5) for p, mean in ((0.3, -1.5), (0.7, 1.5))]
    by_truth = (np.logaddexp(*sides) - before).mean()
    assert by_truth - 0.06 < found.gains[1] < by_truth + 0.01
    one_step = of_rows_in_noise(400, of_posterior=False)[0]
    assert one_step.gains[1] < by_truth - 0.1  # by the samples as they are, a step of EM


@pytest.mark.parametrize("width", [0.02, 0.5])
def test_rows_that_were_not_learned_from_tell_what_was_learned_by_heart(width):
    """Of an energy with a well at each of its rows."""
    rows, others = jnp.asarray(np.random.default_rng(6).normal(size=(2, 60, 1)), jnp.float32)

    def model(x):
        tilt = numpyro.param("tilt", 0.0)  # which is at its maximum, as the wells are symmetric
        with numpyro.plate("data", len(x)):
            start = dist.Normal(0, 2).expand([1]).to_event(1)

            def energy(x):
                return -logsumexp(-(((x - rows) / width) ** 2) / 2) - tilt * x.sum()

            numpyro.sample("x", EnergyDistribution(energy, event_shape=(1,), initial=start), obs=x)

    def exact(x):
        return float(np.logaddexp.reduce(norm.logpdf(x, rows.T, width), axis=1).mean() - np.log(60))

    phase = negative_phase(model, num_chains=200)
    fit = SVI(phase, lambda x: None, optax.sgd(0.0), Trace_ELBO()).run(KEY, 50, rows, progress_bar=False)
    engine = ScoreMatching(model, optax.sgd(0.0), ExactScoreMatching())
    scores = engine.run(KEY, 1, rows, report=False, progress_bar=False)
    for report in (
        diagnose(fit, phase, rows, validation=others, warn=False),
        diagnose(scores, engine, rows, validation=others, warn=False),
    ):
        found = told(report, OF_OTHERS)
        assert found.value == pytest.approx(exact(others), abs=0.05)
        by_normal = norm.logpdf(others, rows.mean(), rows.std()).mean()
        tolerated = NATS + 3 * (2 * NATS / 60) ** 0.5
        assert width == 0.5 or not report.is_well
        if found.least is not None:  # of scores the objective beside the rows has told it already
            assert by_normal - tolerated - 1e-3 <= found.least <= norm.logpdf(others).mean() - tolerated + 0.1
            assert found.is_well == (width == 0.5)
    assert told(diagnose(fit, phase, rows, validation=others, warn=False), OF_OTHERS).least is not None
    assert OF_OTHERS not in [finding.quantity for finding in diagnose(fit, phase, rows, warn=False).findings]


@pytest.mark.parametrize("num_params", [0, 40, 700])
def test_many_times_more_parameters_than_rows_ask_for_others(num_params):
    rows = jnp.asarray(RNG.normal(size=(60, 1)), jnp.float32)

    def model(x):
        unused = numpyro.param("unused", jnp.zeros(60 + num_params)).sum()
        tilt = numpyro.param("tilt", 0.0) + unused
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1).expand([1]).to_event(1), lambda x: -tilt * x.sum()), obs=x)

    phase = negative_phase(model, num_chains=200)
    fit = SVI(phase, lambda x: None, optax.sgd(0.0), Trace_ELBO()).run(KEY, 50, rows, progress_bar=False)
    engine = ScoreMatching(model, optax.sgd(0.0), ExactScoreMatching())
    scores = engine.run(KEY, 1, rows, report=False, progress_bar=False)
    for result, program in ((fit, phase), (scores, engine)):
        found = told(diagnose(result, program, rows, warn=False), OF_OTHERS)
        assert not found.is_told
        assert found.is_missing == (num_params == 700)
        assert "Give validation= rows" in found.fix
        assert told(diagnose(result, program, rows, validation=(rows,), warn=False), OF_OTHERS).is_told


def test_validation_rows_are_of_scores_and_energies_of_rows():
    engine = ParticleMMLE(hierarchical, optax.sgd(0.0), num_particles=4, step_size=0.1)
    y = jnp.ones(30)
    fit = engine.run(KEY, 1, y, report=False, progress_bar=False)
    with pytest.raises(ValueError, match="validation= rows are for engines that match scores, and a ParticleMMLE does not"):
        diagnose(fit, engine, y, validation=y)


def tilted(x, base):
    """N(tilt, 1): the width is that of the base, and no gradient moves it."""
    tilt = numpyro.param("tilt", 0.0)
    return numpyro.sample("x", TiltedDistribution(base, lambda x: -tilt * x), obs=x)


def still(model, guide, y):
    phase = negative_phase(model, num_chains=200)
    fit = SVI(phase, guide, optax.sgd(0.0), Trace_ELBO()).run(KEY, 50, y, progress_bar=False)
    return diagnose(fit, phase, y, guide=guide, warn=False)


@pytest.mark.parametrize("width", [1.0, 0.3])
def test_an_energy_of_data_that_is_at_rest_is_compared(width):
    def model(y):
        with numpyro.plate("data", len(y)):
            tilted(y, dist.Normal(0, 1))

    y = jnp.asarray(RNG.normal(size=500), jnp.float32)
    y = width * (y - y.mean())
    report = still(model, lambda y: None, y)
    assert told(report, FROM_DATA).is_well  # at the maximum, of a family that is too small
    found = told(report, LIKELIHOOD)
    assert found.value == pytest.approx(float(norm.logpdf(y).mean()), abs=0.01)
    assert found.is_well == (width == 1)


@pytest.mark.parametrize("width", [1.0, 4.0])
def test_a_prior_is_compared_with_its_posterior(width):
    """Of 60 groups, each known to .1: the posterior has the width 1 however wide the prior is."""
    y = jnp.asarray(RNG.normal(size=60), jnp.float32)
    y = (y - y.mean()) / y.std()

    def model(y):
        with numpyro.plate("groups", len(y)):
            z = tilted(None, dist.Normal(0, width))
            numpyro.sample("y", dist.Normal(z, 0.1), obs=y)

    def guide(y):
        with numpyro.plate("groups", len(y)):
            numpyro.sample("x", dist.Normal(y, 0.1))

    report = still(model, guide, y)
    assert told(report, FROM_POSTERIOR).is_well
    found = told(report, OF_PRIOR)
    gain = np.log(width) + 1.01 / width**2 / 2 - np.log(1.01) / 2 - 0.5 - 2 / 120  # of a normal distribution
    assert found.value == pytest.approx(gain, abs=0.02)
    assert found.is_well == (width == 1)
