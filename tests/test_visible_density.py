# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What scores do not see of the density of a visible: against closed forms."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told

from numpyro_ebm import (
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ExactScoreMatching,
    ScoreMatching,
    TiltedDistribution,
    diagnose,
)
from numpyro_ebm.evaluate.yardstick import LIKELIHOOD
from numpyro_ebm.infer.collapse import AT_ROWS
from numpyro_ebm.infer.visible_density import FROM_MAXIMUM, FROM_ROWS, MOST

KEY = jax.random.key(0)
NOISE = "noise of denoising in standard deviations of the data"
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 1)), jnp.float32)
STILL = optax.sgd(0.0)


def report_of(model, rows, objective=None, params=None):
    """Of a fit that stays where it starts."""
    engine = ScoreMatching(model, STILL, objective or ExactScoreMatching())
    result = engine.run(KEY, 1, rows, progress_bar=False, init_params=params, report=False)
    return diagnose(result, engine, rows, warn=False)


def normal(x):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", EnergyDistribution(lambda x: precision * (x**2).sum() / 2, event_shape=(1,)), obs=x)


def test_weights_of_modes_that_scores_do_not_see_are_told():
    """At -4 and 4, where rows have .3 and .7 and the energy has a half: its scores at the rows are right to the last digit."""

    def model(x):
        upper = numpyro.param("upper", 0.5)
        modes = dist.MixtureSameFamily(dist.Categorical(jnp.stack([1 - upper, upper])), dist.Normal(jnp.array([-4.0, 4.0]), 0.5))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", EnergyDistribution(lambda x: -modes.log_prob(x)), obs=x)

    rows = 0.5 * ROWS[:, 0] + jnp.where(jnp.arange(2000) < 600, -4.0, 4.0)
    engine = ScoreMatching(model, STILL, ExactScoreMatching())
    with pytest.warns(UserWarning, match=r"site 'x': distance of density from rows is 0.2.* Scores hardly see the weights"):
        report = engine.run(KEY, 1, rows, progress_bar=False, report=True).report
    assert told(report, FROM_ROWS).value == pytest.approx(0.2, abs=0.005)
    assert told(report, AT_ROWS).is_well
    assert told(report, FROM_MAXIMUM).value == pytest.approx(0.2 / 0.5, abs=0.1)  # of weights .5 and .7
    assert told(report, FROM_MAXIMUM).most is None  # the cause is told
    right = report_of(model, rows, params={"upper": 0.7})
    assert right.is_well
    assert told(right, FROM_ROWS).value < 0.02


@pytest.mark.parametrize(("precision", "is_well"), [(1.0, True), (0.2, False)])
def test_log_likelihood_is_that_of_the_normalized_density(precision, is_well):
    report = report_of(normal, ROWS, params={"precision": precision})
    square, variance = float((ROWS**2).mean()), float(ROWS.var())
    assert told(report, LIKELIHOOD).value == pytest.approx(-precision * square / 2 + np.log(precision / (2 * np.pi)) / 2, abs=0.02)
    gaussian = -0.5 * np.log(2 * np.pi * np.e * variance)
    assert told(report, LIKELIHOOD).fix.startswith(f"a normal distribution with their moments has {gaussian - 2 / 4000:.3g}")
    assert report.is_well == is_well


@pytest.mark.parametrize(("precision", "noise"), [(1.0, None), (0.45, None), (0.2, 2.0), (0.09, 2.0)])
def test_distance_from_the_maximum_is_that_of_the_moment_that_is_learned(precision, noise):
    """Of -x^2 / 2, whose standard deviation under N(0, 1 / precision) is 1 / (sqrt(2) precision)."""
    report = report_of(normal, ROWS, DenoisingScoreMatching(noise) if noise else None, {"precision": precision})
    square = float((ROWS**2).mean()) + (noise or 0) ** 2
    error = ((square * precision) ** 2 + 1) ** 0.5 / 2000**0.5  # of 2000 rows, and as many samples
    found = told(report, FROM_MAXIMUM)
    assert abs(found.value - abs(square * precision - 1) / np.sqrt(2)) < 4 * error
    if precision in (1.0, 0.2):
        assert report.is_well
        assert found.most - MOST == pytest.approx(3 * error, rel=0.3)


def test_a_correlation_that_is_not_learned_is_told_by_the_distance_from_the_maximum():
    """Of -x y, with standard deviation 1 where they are thought to be independent. Nothing else sees so little of it."""

    def model(x):
        precision, coupling = numpyro.param("precision", 1.0), numpyro.param("coupling", 0.0)
        energy = EnergyDistribution(lambda x: precision * (x**2).sum() / 2 - coupling * x.prod(), event_shape=(2,))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", energy, obs=x)

    one, other = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2000)), jnp.float32)
    rows = jnp.stack([one, 0.37 * one + 0.8631**0.5 * other], 1)
    right = report_of(model, rows, params={"precision": 1 / 0.8631, "coupling": 0.37 / 0.8631})
    assert right.is_well
    assert abs(told(right, FROM_MAXIMUM).value) < 0.12
    engine = ScoreMatching(model, STILL, ExactScoreMatching())
    still = engine.run(KEY, 1, rows, progress_bar=False, report=False)
    reports = [diagnose(still, engine, rows, rng_key=key, warn=False) for key in jax.random.split(KEY, 8)]
    values = np.array([told(report, FROM_MAXIMUM).value for report in reports])
    assert abs(values.mean() - float(rows.prod(1).mean())) < 4 * 2**0.5 / 2000**0.5 / 8**0.5
    trouble = [finding for report in reports for finding in report.trouble]
    assert {finding.quantity for finding in trouble} == {FROM_MAXIMUM}
    assert len(trouble) >= 4  # its bound is .34, give or take .01
    for finding in trouble:
        assert f"a step there would gain about {finding.value**2 / 2:.2g} nats for each row" in finding.fix


def test_density_of_many_dimensions_is_weighed_by_the_reference():
    tilt = jnp.full(5, 0.3)

    def model(x, scale=1.0):
        scale = numpyro.param("scale", scale)
        base = dist.Normal(0, 1).expand([5]).to_event(1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", TiltedDistribution(base, lambda x: -scale * (tilt * x).sum()), obs=x)

    rows = 0.3 + jnp.asarray(np.random.default_rng(1).normal(size=(1000, 5)), jnp.float32)
    found = told(report_of(model, rows), LIKELIHOOD)
    exact = float(dist.Normal(0.3, 1).log_prob(rows).sum(1).mean())
    assert abs(found.value - exact) < 4 * (np.exp(0.45) - 1) ** 0.5 / 100  # of the mean of 10 000 weights exp(0.3 sum z - .225)
    for scale in (1.0, 2.0):  # of sum(tilt x), whose mean is .45 and .9, with a standard deviation of .67
        to_maximum = told(report_of(model, rows, params={"scale": scale}), FROM_MAXIMUM)
        assert abs(to_maximum.value - 0.45**0.5 * (scale - 1)) < 0.2
    far = told(report_of(model, rows, params={"scale": 10.0}), FROM_ROWS)
    assert "of 10000 samples of its reference about" in far.fix


def test_density_is_compared_with_rows_as_the_objective_moves_them():
    """Denoising with a noise of 2 learns N(0, 1 + 4), which is far from rows of N(0, 1) and right."""
    report = report_of(normal, ROWS, DenoisingScoreMatching(2.0), {"precision": 0.2})
    assert report.is_well
    assert told(report, FROM_ROWS).value < 0.03
    assert not told(report_of(normal, ROWS, params={"precision": 0.2}), FROM_ROWS).value < 0.1


def test_denoising_that_has_not_come_near_a_normal_distribution_is_told():
    """A guide that is exact, so that the score of the marginal is: N(0, 1 + w^2) where the rows with noise have N(0, 1.09)."""

    def model(v):
        w = numpyro.param("w", 1.0)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1))
            numpyro.sample("v", dist.Normal(w * h, 1), obs=v)

    def guide(v):
        w = numpyro.param("w_of_guide", 1.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(w * v / (1 + w**2), (1 + w**2) ** -0.5))

    def told_at(w):
        engine = BiSM(model, guide, STILL, STILL, DenoisingScoreMatching(0.3))
        start = {"w": w, "w_of_guide": w}
        result = engine.run(KEY, 1, ROWS[:, 0], progress_bar=False, init_params=start, report=False)
        return diagnose(result, engine, ROWS[:, 0], warn=False)

    right, wrong = told_at(0.3), told_at(2.0)
    assert told(right, AT_ROWS).is_well
    finding = told(wrong, AT_ROWS)
    assert not finding.is_well
    # 1 / (2 sigma^2) - 1 / variance + E[v^2] / (2 variance^2): what denoising has of a normal score
    assert finding.value - told(right, AT_ROWS).value == pytest.approx(
        -1 / 5 + 1.09 / 50 + 1 / 1.09 - 1.09 / (2 * 1.09**2), abs=0.1
    )


def test_noise_that_is_all_of_the_objective_is_told():
    rows = 100 * ROWS
    found = [told(report_of(normal, rows, DenoisingScoreMatching(s), {"precision": 1e-4}), NOISE) for s in (1.0, 5.0)]
    assert [finding.is_well for finding in found] == [False, True]
    assert found[0].value == pytest.approx(0.01 / float(ROWS.std()), rel=1e-4)
    assert "Take a sigma of a tenth of the standard deviation" in str(found[0])


def test_nothing_is_said_of_a_fit_that_is_right():
    engine = ScoreMatching(normal, optax.adam(0.03), ExactScoreMatching())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = engine.run(KEY, 200, ROWS, progress_bar=False, report=True, init_params={"precision": 2.0}).report
    assert report.is_well
