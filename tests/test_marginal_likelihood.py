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

from numpyro_ebm import BiSM, DenoisingScoreMatching, MultiscaleDenoisingScoreMatching, SlicedScoreMatching, VaGES, diagnose
from numpyro_ebm.evaluate.yardstick import LIKELIHOOD
from numpyro_ebm.infer.collapse import AT_ROWS
from numpyro_ebm.infer.marginal_likelihood import CONDITIONAL, FEW, batches_to_judge

KEY = jax.random.key(0)
STILL = optax.sgd(0.0)
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
