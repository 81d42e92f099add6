# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The likelihood of a model with latents that were learned by scores: that of the normal distribution which it is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told
from numpyro.distributions import constraints
from scipy.stats import multivariate_normal

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    DenoisingScoreMatching,
    GumbelBernoulli,
    MultiscaleDenoisingScoreMatching,
    SlicedScoreMatching,
    VaGES,
    diagnose,
)
from numpyro_ebm.evaluate.yardstick import LIKELIHOOD
from numpyro_ebm.infer.collapse import AT_ROWS
from numpyro_ebm.infer.marginal_likelihood import CONDITIONAL, FEW, NO_CHAINS, batches_to_judge
from numpyro_ebm.infer.visible_density import FROM_MAXIMUM

KEY = jax.random.key(0)
STILL = optax.sgd(0.0)
FEW_ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(300, 3)), jnp.float32)
WEIGHTS = np.array([0.9, -0.5, 0.7])
H, NOISE = np.random.default_rng(0).normal(size=(400, 1)), np.random.default_rng(1).normal(size=(400, 3))
ROWS = jnp.asarray(H * WEIGHTS + 0.6 * NOISE, jnp.float32)


def params():
    return numpyro.param("weights", jnp.asarray(WEIGHTS, jnp.float32)), numpyro.param("noise", 0.6)


def directed(v, *covariates):
    weights, noise = params()
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(h[..., None] * weights, noise).to_event(1), obs=v)


def field(v, *covariates):
    """The same, up to a normalizer that nobody tells."""
    weights, noise = params()
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.ImproperUniform(constraints.real, (), ()))
        numpyro.sample("v", dist.ImproperUniform(constraints.real_vector, (), (3,)), obs=v)
        numpyro.factor("energy", -(h**2) / 2 - ((v - h[..., None] * weights) ** 2).sum(-1) / (2 * noise**2) + 5)


def guide(v, *covariates):
    """The posterior, where it has the params of the model."""
    weights, noise = numpyro.param("weights_of_guide", jnp.asarray(WEIGHTS, jnp.float32)), numpyro.param("noise_of_guide", 0.6)
    precision = 1 + (weights**2).sum() / noise**2
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(v @ weights / noise**2 / precision, precision**-0.5))


def told_of(model, start=None, *, engine=BiSM, objective=None, rows=ROWS, batch_size=100, covariates=()):
    """Of a fit that stays where it starts."""
    start = {} if start is None else {**start, **{f"{name}_of_guide": value for name, value in start.items()}}
    engine = engine(model, guide, STILL, STILL, objective or SlicedScoreMatching(), batch_size=batch_size)
    result = engine.run(KEY, 1, rows, *covariates, progress_bar=False, init_params=start, report=False)
    return diagnose(result, engine, rows, *covariates, warn=False)


def exact(weights, noise, rows, sigma=0.0):
    covariance = np.outer(weights, weights) + (noise**2 + sigma**2) * np.eye(3)
    return multivariate_normal(np.zeros(3), covariance).logpdf(np.asarray(rows)).mean()


@pytest.mark.parametrize("model", [directed, field])
def test_likelihood_is_that_of_the_marginal(model):
    """The guide is exact, so that its weights are no estimate; the normalizer is one, of 4096 samples that are worth half."""
    found = told(told_of(model), LIKELIHOOD)
    assert found.value == pytest.approx(exact(WEIGHTS, 0.6, ROWS), abs=4.5 * (2 / 4096) ** 0.5 if model is field else 1e-3)
    assert found.is_well
    assert "a normal distribution with their moments has" in found.fix


@pytest.mark.parametrize("model", [directed, field])
def test_rows_that_are_less_likely_than_a_normal_distribution_has_them_are_told(model):
    """A correlation of the wrong sign; the objective at the rows is the cause that is told where it is far off too."""
    start = {"weights": jnp.asarray(WEIGHTS * np.array([1, 1, 0.3]), jnp.float32), "noise": jnp.array(0.75)}
    report = told_of(model, start)
    found = told(report, LIKELIHOOD)
    wrong = exact(np.asarray(start["weights"]), 0.75, ROWS)
    assert exact(WEIGHTS, 0.6, ROWS) - wrong > 0.2
    assert found.value == pytest.approx(wrong, abs=4.5 * (3 / 4096) ** 0.5 if model is field else 1e-3)
    assert told(report, AT_ROWS).is_well
    assert report.trouble == (found,)
    assert "Scale data whose elements have different standard deviations" in str(found)


def report_of_a_mode_without_rows(shift):
    """Half of the mass of this machine is where its bit is 1, and there are no rows: no score says so, nor any guide."""

    def machine(v):
        odds = numpyro.param("odds", 0.0)
        with numpyro.plate("data", len(v)):
            bit = numpyro.sample("bit", BaseMeasure(constraints.boolean))
            numpyro.sample("v", BaseMeasure(constraints.real, (3,)), obs=v)
            place = bit[..., None] * jnp.array([shift, 0.0, 0.0])
            numpyro.factor("energy", odds * bit - ((v - place) ** 2).sum(-1) / 2)

    def guide(v):
        logits = numpyro.param("logits", -20.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("bit", GumbelBernoulli(logits * jnp.ones(len(v))))

    engine = VaGES(machine, guide, STILL, STILL, SlicedScoreMatching(), batch_size=100)
    result = engine.run(KEY, 1, FEW_ROWS, progress_bar=False, report=False)
    return diagnose(result, engine, FEW_ROWS, warn=False)


def test_a_mode_without_rows_is_told():
    report = report_of_a_mode_without_rows(8.0)
    found = told(report, LIKELIHOOD)
    exact = multivariate_normal(np.zeros(3), np.eye(3)).logpdf(np.asarray(FEW_ROWS)).mean() - np.log(2)
    assert found.value == pytest.approx(exact, abs=4.5 * (1 / 600) ** 0.5)
    assert report.trouble == (found,)
    assert "A mode may be left where there are no rows" in found.fix
    # a bit that is 1 for half of the samples and for no row, which is one standard deviation
    assert told(report, FROM_MAXIMUM).value == pytest.approx(1, abs=4.5 * (1 / 300) ** 0.5)


def test_a_mode_that_is_too_far_for_chains_is_asked_for():
    report = report_of_a_mode_without_rows(30.0)
    assert report.trouble == (told(report, LIKELIHOOD),)
    assert "there may be modes far from all rows" in report.trouble[0].fix


@pytest.mark.parametrize("model", [directed, field])
def test_distance_to_the_maximum_is_that_of_the_normal_distribution(model):
    """Along the natural gradient of the likelihood, which is known exactly; half of the rows gives the direction."""
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(2000, 1)) * WEIGHTS + 0.6 * rng.normal(size=(2000, 3))).astype(np.float32)
    start = {"weights": WEIGHTS * np.array([1.0, 1.4, 0.7]), "noise": 0.8}
    at = np.append(start["weights"], start["noise"])

    def log_density(at, v):
        covariance = jnp.outer(at[:3], at[:3]) + at[3] ** 2 * jnp.eye(3)
        return -(v @ jnp.linalg.solve(covariance, v)) / 2 - jnp.linalg.slogdet(covariance)[1] / 2

    slopes = jax.vmap(jax.grad(log_density), (None, 0))
    covariance = np.outer(at[:3], at[:3]) + at[3] ** 2 * np.eye(3)
    under = np.asarray(slopes(at, rng.multivariate_normal(np.zeros(3), covariance, 100_000)))
    gradient, fisher = np.asarray(slopes(at, rows)).mean(0), np.cov(under.T)
    exact = np.sqrt(gradient @ np.linalg.solve(fisher, gradient))
    assert exact > 0.4
    report = told_of(model, {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}, rows=jnp.asarray(rows))
    found = told(report, FROM_MAXIMUM)
    assert found.value == pytest.approx(exact, abs=0.15)  # its error is .04
    assert not found.is_well or not told(report, LIKELIHOOD).is_well
    right = told(told_of(model, rows=jnp.asarray(rows)), FROM_MAXIMUM)
    assert right.is_well
    assert right.value == pytest.approx(0, abs=4.5 * 0.05)


def test_a_distance_to_the_maximum_needs_latents_that_can_be_annealed():
    def counts(v):
        noise = numpyro.param("noise", 0.6)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Poisson(1.0))
            numpyro.sample("v", dist.Normal(h[..., None] * jnp.asarray(WEIGHTS), noise).to_event(1), obs=v)

    def guide(v):
        rate = numpyro.param("rate", 1.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Poisson(rate * jnp.ones(len(v))))

    engine = VaGES(counts, guide, STILL, STILL, DenoisingScoreMatching(0.5), num_inner_steps=0, batch_size=100)
    result = engine.run(KEY, 1, ROWS, progress_bar=False, report=False)
    assert told(diagnose(result, engine, ROWS, warn=False), FROM_MAXIMUM).fix == NO_CHAINS


def test_rows_have_the_noise_of_denoising():
    found = told(told_of(directed, engine=VaGES, objective=DenoisingScoreMatching(0.8)), LIKELIHOOD)
    rows = np.asarray(ROWS) + 0.8 * np.random.default_rng(2).normal(size=(400, 3))
    spread = np.std(multivariate_normal(np.zeros(3), np.outer(WEIGHTS, WEIGHTS) + 0.36 * np.eye(3)).logpdf(rows))
    assert found.value == pytest.approx(exact(WEIGHTS, 0.6, rows), abs=4.5 * spread * (2 / 400) ** 0.5)


def test_a_normalizer_that_may_differ_by_row_is_not_told():
    covariates = (jnp.ones(100),)
    assert told(told_of(field, rows=ROWS[:100], batch_size=None, covariates=covariates), LIKELIHOOD).fix == CONDITIONAL
    assert told(told_of(directed, rows=ROWS[:100], batch_size=None, covariates=covariates), LIKELIHOOD).is_told


def test_rows_with_noise_of_many_levels_are_not_judged():
    objective = MultiscaleDenoisingScoreMatching(0.2, 0.1, 0.4)
    assert "noise of many levels" in told(told_of(directed, objective=objective), LIKELIHOOD).fix


def test_few_rows_are_not_judged():
    assert told(told_of(directed, rows=ROWS[:25], batch_size=25), LIKELIHOOD).fix == FEW
    assert batches_to_judge(29, 29, 3) is None
    assert batches_to_judge(30, 30, 3).tolist() == [list(range(30))]


@pytest.mark.parametrize(("num_rows", "size", "num"), [(400, 3, 4), (5000, 3, 20), (60_000, 20, 20), (60_000, 784, None)])
def test_rows_that_are_judged_come_from_everywhere_and_are_no_more_than_needed(num_rows, size, num):
    found = batches_to_judge(num_rows, 100, size)
    if num is None:
        assert found is None
    else:
        assert found.shape == (num, 100)
        assert len(np.unique(found)) == found.size
        assert found.max() >= num_rows - num_rows // num
