# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Score matching that has put spikes at the data says so, and stops before it does if it is asked to."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_ebm import (
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ExactScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
    diagnose,
    reports_enabled,
)
from numpyro_ebm.infer.collapse import (
    beside,
    collapse_finding,
    correlated_score,
    gaussian_score,
    level_finding,
    validation_finding,
)

KEY = jax.random.key(0)
ROWS = jnp.asarray(np.random.default_rng(1).normal(size=(60, 1)), jnp.float32)
OTHERS = jnp.asarray(np.random.default_rng(2).normal(size=(200, 1)), jnp.float32)


def spikes(x):
    """A kernel density estimate: one normal distribution at every row of ROWS, whose common width is learned; 0 is its optimum."""
    width = jnp.exp(numpyro.param("log_width", 0.0))
    with numpyro.plate("data", len(x)):
        energy = EnergyDistribution(lambda x: -jax.nn.logsumexp(-(((x - ROWS) / width) ** 2) / 2), event_shape=(1,))
        numpyro.sample("x", energy, obs=x)


def bell(x):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", EnergyDistribution(lambda x: precision * (x**2).sum() / 2, event_shape=(1,)), obs=x)


EXACT = ExactScoreMatching()


@pytest.fixture(autouse=True)
def _reports():
    with reports_enabled():
        yield


def run(model=spikes, objective=EXACT, num_steps=400, rows=ROWS, **settings):
    engine = ScoreMatching(model, optax.adam(0.03), objective)
    return engine, engine.run(KEY, num_steps, rows, progress_bar=False, **settings)


@pytest.mark.parametrize("objective", [ExactScoreMatching(), SlicedScoreMatching()])
def test_a_collapse_is_told_with_its_numbers_and_the_fix(objective):
    """Catches a run that ends with an objective of minus thousands and says nothing."""
    with pytest.warns(UserWarning, match=r"site 'x': objective at half the distance .* should be at most 0: .* noise_scale="):
        _, result = run(objective=objective)
    assert result.losses[-1] < -100
    assert result.params["log_width"] < -3


@pytest.mark.parametrize(
    ("model", "objective", "num_steps"),
    [
        (bell, ExactScoreMatching(), 200),
        (bell, SlicedScoreMatching(), 200),
        (spikes, DenoisingScoreMatching(0.5), 400),
        (spikes, ExactScoreMatching(noise_scale=0.5), 400),
    ],
)
def test_a_fit_without_spikes_is_silent(model, objective, num_steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, objective, num_steps)


def test_rounded_rows_collapse_and_are_told():
    """Many rows, twenty values. Catches neighbors at distance 0, beside which nothing moves."""
    rows = jnp.round(3 * jnp.asarray(np.random.default_rng(3).normal(size=(2000, 1)), jnp.float32)) / 3

    def model(x):
        width = jnp.exp(numpyro.param("log_width", -1.0))
        with numpyro.plate("data", len(x)):
            grid = jnp.arange(-12, 13) / 3
            log_p = jax.nn.log_softmax(-(grid**2) / 2)
            energy = EnergyDistribution(
                lambda x: -jax.nn.logsumexp(log_p - ((x - grid) / width) ** 2 / 2 - jnp.log(width)), event_shape=(1,)
            )
            numpyro.sample("x", energy, obs=x)

    with pytest.warns(UserWarning, match="rounded to"):
        run(model, rows=rows)


def test_the_rows_of_validation_tell_too():
    with pytest.warns(UserWarning, match="site 'x'") as said:
        run(validation=OTHERS)
    wanted = r"site 'x': objective on validation rows is \S+ and should be at most -0.*a Gaussian reaches -0.*has -.*patience="
    assert any(re.search(wanted, str(one.message)) for one in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(bell, num_steps=200, validation=OTHERS)


def test_arrays_of_numpy_are_told_of_as_those_of_jax_are():
    """Catches a report that cannot read what the run has read, and calls the fit well."""
    with pytest.warns(UserWarning, match="site 'x'") as said:
        engine, result = run(rows=np.asarray(ROWS), validation=np.asarray(OTHERS))
    assert [re.sub(r"\W.*", "", str(one.message)) for one in said] == ["site", "site"]
    assert [finding.is_well for finding in result.report.findings] == [False, True, True, True, True, True, True, False]
    assert not diagnose(result, engine, np.asarray(ROWS), warn=False).is_well


def test_a_run_stops_where_validation_rows_become_worse_and_returns_the_best_state():
    """Against the width that is best on these rows, by a search. Catches the last state in place of the best, and losses cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what it returns has not collapsed
        engine, result = run(validation=OTHERS, patience=3, chunk_size=5)
    assert len(result.losses) < 400
    assert result.state.num_steps == len(result.losses) - 3 * 5
    states = [result.state._replace(params={"log_width": jnp.float32(w)}) for w in np.linspace(-3, 0.5, 71)]
    best = min(float(engine.evaluate(state, OTHERS)) for state in states)
    assert float(engine.evaluate(result.state, OTHERS)) < best + 0.02 * abs(best)


def test_patience_needs_rows_and_keeps_no_records():
    with pytest.raises(ValueError, match="patience=3 with no validation= rows"):
        run(patience=3)
    with pytest.raises(ValueError, match="patience=3 with collect, whose records would be lost"):
        run(patience=3, validation=OTHERS, collect=lambda state: state.num_steps)


def test_validation_replaces_the_first_argument_or_all():
    def model(x, shift):
        precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(shift, precision**-0.5), obs=x)

    engine = ScoreMatching(model, optax.adam(0.03), ExactScoreMatching())
    x, other, shift = ROWS[:, 0], OTHERS[:, 0], jnp.zeros(60)
    settings = {"progress_bar": False, "chunk_size": 5}
    whole = engine.run(KEY, 20, x, shift, validation=(other, jnp.zeros(200)), patience=1, **settings)
    part = engine.run(KEY, 20, x, shift, validation=other[:60], patience=1, **settings)
    assert whole.state.num_steps > 0
    assert part.state.num_steps > 0


def test_engines_with_a_guide_tell_too():
    """The visible is one normal distribution, and the latent does not touch it."""

    def model(x):
        width = jnp.exp(numpyro.param("log_width", 0.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Normal(0, 1))
            energy = EnergyDistribution(lambda x: -jax.nn.logsumexp(-(((x - ROWS) / width) ** 2) / 2), event_shape=(1,))
            numpyro.sample("x", energy, obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Normal(numpyro.param("loc", 0.1), 1))

    engine = BiSM(model, guide, optax.adam(0.03), optax.adam(0.01), ExactScoreMatching(), num_inner_steps=1)
    with pytest.warns(UserWarning, match="site 'x': objective at half the distance"):
        engine.run(KEY, 400, ROWS, progress_bar=False)


def normal(x):
    loc = numpyro.param("loc", jnp.zeros(2))
    scale = numpyro.param("scale", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


TABLE = jnp.asarray(np.random.default_rng(6).normal(size=(300, 2)), jnp.float32)


@pytest.mark.parametrize("objective", [ExactScoreMatching(), SlicedScoreMatching()])
def test_a_model_that_is_worse_than_a_gaussian_at_its_own_rows_is_told(objective):
    """Rows far from where a normal distribution starts, and one step. Catches a report that knows spikes alone."""
    wanted = r"site 'x': objective at the rows is \S+ and should be at most -0\.\d+: a normal distribution .* reaches -.*more steps"
    with pytest.warns(UserWarning, match=wanted):
        _, result = run(normal, objective, 1, TABLE + 5)
    assert [finding.quantity for finding in result.report.trouble] == ["objective at the rows"]


def test_a_model_without_the_correlation_of_the_data_is_told():
    """At its optimum, where it has the variances: the objective is -1, that of a Gaussian -1 / (1 - .9^2)."""
    rows = TABLE @ jnp.linalg.cholesky(jnp.array([[1.0, 0.9], [0.9, 1.0]])).T
    with pytest.warns(UserWarning, match="site 'x': objective at the rows .* reaches -5"):
        run(normal, EXACT, 200, rows)


def test_masked_rows_are_not_compared_with_a_gaussian():
    def model(x):
        with numpyro.handlers.mask(mask=jnp.arange(len(x)) % 4 == 0):
            normal(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, result = run(model, EXACT, 200, TABLE)
    assert [finding.is_told for finding in result.report.findings] == [True, False]


# The numbers.


def test_rows_move_by_half_the_distance_to_the_nearest_other():
    """In one dimension exactly; rows that are there twice move by the distance to the next value."""
    v = jnp.array([[0.0], [1.0], [1.0], [4.0]])
    np.testing.assert_allclose(abs(beside(KEY, v, v) - v)[:, 0], [0.5, 0.5, 0.5, 1.5], rtol=1e-4)


def test_rows_move_little_where_all_are_close():
    """A covariance of 1 and 1e-4: moves have the same. Catches distances and directions in the coordinates as they are."""
    v = jnp.asarray(np.random.default_rng(4).normal(size=(300, 2)), jnp.float32) @ jnp.array([[1.0, 1.0], [0.01, -0.01]])
    moves = np.cov(beside(KEY, v, v).T - v.T)
    ratio = np.linalg.eigvalsh(moves) / np.linalg.eigvalsh(np.cov(v.T))
    assert 0.6 < ratio[0] / ratio[1] < 1.6
    shaped = beside(KEY, v.reshape(300, 2, 1), v.reshape(300, 2, 1))
    np.testing.assert_allclose(shaped[..., 0], beside(KEY, v, v), rtol=1e-6)


def test_rows_that_are_all_equal_stay():
    v = jnp.ones((3, 2))
    np.testing.assert_array_equal(beside(KEY, v, v), v)


def of_exact(fit, v):
    return ExactScoreMatching().loss(fit(v), KEY, v, v).mean()


def test_the_objective_of_a_gaussian_is_half_of_its_information():
    v = jnp.asarray(np.random.default_rng(5).normal(size=(50, 2)), jnp.float32) * jnp.array([1.0, 3.0])
    np.testing.assert_allclose(of_exact(gaussian_score, v), -(1 / v.var(0)).sum() / 2, rtol=1e-4)


def test_the_objective_of_a_correlated_gaussian_is_half_of_its_information():
    """Minus half the trace of the inverse covariance; and of events of two dimensions the same."""
    v = TABLE @ jnp.array([[1.0, 2.0], [0.0, 0.5]])
    wanted = -np.trace(np.linalg.inv(np.cov(v.T, bias=True))) / 2
    np.testing.assert_allclose(of_exact(correlated_score, v), wanted, rtol=1e-4)
    np.testing.assert_allclose(of_exact(correlated_score, v.reshape(300, 2, 1)), wanted, rtol=1e-4)


def test_directions_without_variance_are_none_to_be_good_in():
    """A constant column, and one that is another: catches a precision without bound, by which every model is bad."""
    x, y = TABLE.T
    constant = of_exact(correlated_score, jnp.stack([x, jnp.full(300, 3.0)], 1))
    np.testing.assert_allclose(constant, -1 / x.var() / 2 - 1, rtol=1e-4)  # of precision 1 at its mean: the trace alone
    same = of_exact(correlated_score, jnp.stack([x, y, x + 1e-4 * y], 1))
    assert same > -3


def test_few_rows_have_no_covariance():
    v = TABLE[:15] @ jnp.array([[1.0, 1.0], [0.0, 0.01]])
    assert of_exact(correlated_score, v) == of_exact(gaussian_score, v)


@pytest.mark.parametrize(
    ("at_rows", "of_gaussian", "is_well"),
    [
        ([-0.85, -0.85], [-1.0, -1.0], True),  # near: half of what a Gaussian reaches
        ([-0.7, -0.7], [-1.0, -1.0], False),
        ([0.1, -0.9], [-1.0, -1.0], True),  # within what two batches tell
        ([np.inf, np.inf], [-1.0, -1.0], False),
        ([0.0, 0.0], [np.nan, np.nan], True),
    ],
)
def test_a_model_is_bad_that_is_far_from_a_gaussian(at_rows, of_gaussian, is_well):
    assert level_finding("x", np.array(at_rows), np.array(of_gaussian)).is_well is is_well


@pytest.mark.parametrize(
    ("at_rows", "value", "is_well"),
    [(-2.0, 1.0, False), (-2.0, -1.0, True), (-0.5, 1.0, True), (-2.0, np.nan, False), (np.nan, np.nan, True)],
)
def test_a_model_that_is_worse_than_a_gaussian_at_the_rows_has_no_spikes(at_rows, value, is_well):
    """The fourth overflows beside its spikes; the last cannot be told."""
    assert collapse_finding("x", at_rows, value, -1.0).is_well is is_well


def test_validation_is_compared_with_a_gaussian():
    assert not validation_finding("x", -2.0, -0.3, -1.0, -0.9).is_well  # at most -.9 + .5
    assert validation_finding("x", -2.0, -0.5, -1.0, -0.9).is_well
    assert validation_finding("x", -0.7, -0.3, -1.0, -0.9).is_well  # nothing is learned


def test_validation_of_denoising_with_little_noise_says_that_it_is_noise():
    """For a standard normal and noise of .1, 1 / .02 of a score of 0, and 1 / .02 - 1 / 2.02 of the best."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        little, much, exact = (
            run(bell, objective, 200, validation=OTHERS)[1].report
            for objective in (DenoisingScoreMatching(0.1), DenoisingScoreMatching(2.0), EXACT)
        )
    assert "is the noise of denoising" in little.findings[-1].quantity
    assert {report.findings[-1].quantity for report in (much, exact)} == {"objective on validation rows"}
