# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How far params are from the maximum: Newton's step of a normal model, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told
from helpers import hierarchical
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import ParticleMMLE, TiltedDistribution, diagnose, negative_phase
from numpyro_ebm.evaluate.param_distance import (
    MOST,
    QUANTITY,
    OfBatch,
    ParamDistance,
    param_distance,
    param_findings,
    told_params,
)
from numpyro_ebm.program.run import log_density_terms, run_model

KEY = jax.random.key(0)
Y = jnp.asarray(1.0 + np.random.default_rng(0).standard_normal(200), jnp.float32)
STILL = optax.sgd(0.0)
SIZE = 16


def of_model(model, params, *args, draw=None, batches=None, told=None):
    """Of latents that ``draw`` has by a key, or of none."""

    def copies(carry, key):
        return carry, jax.vmap(draw)(jax.random.split(key, SIZE)) if draw else {"none": jnp.zeros(SIZE)}

    def of_batch(rows):
        def terms_at(theta, latents):
            return log_density_terms(model, args, {}, KEY, data={**params, **theta, **latents, **rows})

        return OfBatch(terms_at, copies, None)

    told = told_params(params, ()) if told is None else told
    return jax.jit(lambda: param_distance(of_batch, batches or {}, told, KEY, 1))()


def newton(y, loc):
    """Of the mean of normal rows, whose scores have the variance of the rows: their standard deviation cancels."""
    return abs(y.mean() - loc) / y.std() * len(y) ** 0.5


def posterior_of(y, loc):
    return lambda key: {"x": (y + loc) / 2 + 0.5**0.5 * jax.random.normal(key, y.shape)}


@pytest.mark.parametrize("loc", [1.0, 0.5, -3.0])
def test_step_is_that_of_the_mean_in_its_standard_errors(loc):
    found = of_model(hierarchical, {"loc": jnp.array(loc)}, Y, draw=posterior_of(Y, loc))
    # of 512 samples, whose scores have the variance 1 / 2 given the row
    assert float(found.errors[0]) == pytest.approx((0.5 / 512) ** 0.5 / (float(Y.std()) / 2), rel=0.5)
    assert abs(found.steps[0] - newton(Y, loc)) < 4.5 * found.errors[0] + 0.02 * newton(Y, loc)
    (finding,) = param_findings(found, are_well=True)
    assert (finding.site, finding.quantity) == ("loc", QUANTITY)
    assert finding.is_well == (loc == 1.0)
    assert param_findings(found, are_well=False)[0].most is None


def test_params_that_depend_on_each_other_are_told_by_their_common_step():
    """Of a regression without latents: Newton's step of intercept and slope, by the scores of rows."""
    x = jnp.linspace(0, 1, 100)
    y = 2 + 3 * x + 0.5 * jnp.asarray(np.random.default_rng(1).standard_normal(100), jnp.float32)

    def model(x, y):
        a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)

    at = {"a": jnp.array(2.2), "b": jnp.array(2.8)}
    scores = np.asarray((y - at["a"] - at["b"] * x) / 0.25)[:, None] * np.stack([np.ones(100), np.asarray(x)], 1)
    inverse = np.linalg.inv((scores - scores.mean(0)).T @ (scores - scores.mean(0)))
    exact = abs(inverse @ scores.sum(0)) / inverse.diagonal() ** 0.5
    found = of_model(model, at, x, y)
    assert found.steps == pytest.approx(exact, rel=1e-3)
    assert found.errors == pytest.approx(0, abs=1e-3)


def test_rows_are_those_of_the_first_axis_with_a_plate_or_none():
    """Data without a plate, in a matrix whose columns belong to a row, and one term for all of them."""
    y = jnp.asarray(1 + np.random.default_rng(2).standard_normal((50, 3)), jnp.float32)

    def model(y):
        loc = numpyro.param("loc", 0.0)
        numpyro.sample("y", dist.Normal(loc, 1), obs=y)
        numpyro.factor("penalty", -3.0 * (loc - 1.0) ** 2)

    found = of_model(model, {"loc": jnp.array(0.8)}, y)
    rows = np.asarray(y - 0.8).sum(1)
    assert found.steps[0] == pytest.approx(abs(rows.sum() + 6 * 0.2) / (rows.std() * 50**0.5), rel=1e-3)


def test_batches_stand_for_all_rows_and_are_less_certain_where_some_are_not_seen(monkeypatch):
    """With a prior of the param, which is the same in all batches."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        numpyro.sample("prior", dist.Normal(loc, 0.2), obs=jnp.array(0.5))
        with numpyro.plate("data", len(y), subsample_size=50):
            numpyro.sample("y", dist.Normal(loc, 1), obs=numpyro.subsample(y, event_dim=0))

    def found(rows):
        return of_model(model, {"loc": jnp.array(0.0)}, Y, batches={"data": rows})

    def step(y):
        return (len(Y) * y.mean() + 0.5 / 0.2**2) / (len(Y) * y.var()) ** 0.5

    rows = jnp.arange(200).reshape(50, 4).T  # four batches, one of which is every fourth row
    of_all, of_one = found(rows), found(rows[:1])
    assert of_all.steps[0] == pytest.approx(step(np.asarray(Y)), rel=1e-3)
    assert of_all.errors[0] == pytest.approx(0, abs=1e-3)
    assert of_one.steps[0] == pytest.approx(step(np.asarray(Y[::4])), rel=1e-3)
    assert of_one.errors[0] == pytest.approx(3**0.5, rel=1e-3)  # of 150 rows that are not seen
    twice = found(jnp.concatenate([rows, rows]))  # as where another plate has two batches
    assert twice.steps[0] == pytest.approx(step(np.asarray(Y)), rel=1e-3)
    monkeypatch.setattr("numpyro_ebm.evaluate.param_distance.MAX_BATCHES", 2)
    of_two = found(rows)
    assert of_two.steps[0] == pytest.approx(step(np.asarray(Y[jnp.concatenate([rows[0], rows[2]])])), rel=1e-3)
    assert of_two.errors[0] == pytest.approx(1, rel=1e-3)


def test_batches_have_noise_of_their_own():
    """The score of a row is y + x - loc with noise x, which would add up if it were the same in each of 50 batches."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y), subsample_size=4):
            numpyro.sample("x", dist.Normal(loc - numpyro.subsample(y, event_dim=0), 1))

    def draw(key):
        return {"x": 3 * jax.random.normal(key, (4,))}

    rows = jnp.arange(200).reshape(50, 4)
    found = of_model(model, {"loc": Y.mean()}, Y, draw=draw, batches={"data": rows})
    assert found.steps[0] < 2.5 * found.errors[0]
    assert found.errors[0] == pytest.approx(3 / (SIZE * 640 // 50) ** 0.5 / float(Y.std()), rel=0.2)  # of so many samples of a row


def test_what_is_not_told():
    theta = {"a": jnp.zeros(3), "energy": jnp.zeros(()), "network": {"w": jnp.zeros((10, 10))}, "count": jnp.zeros((), int)}
    assert list(told_params(theta, {"energy"})) == ["a"]
    assert told_params({str(i): jnp.zeros(20) for i in range(3)}, ()) == {}
    assert of_model(hierarchical, {"loc": jnp.array(1.0)}, Y[:5], draw=posterior_of(Y[:5], 1.0)) is None
    assert param_findings(None, are_well=True) == []

    @jax.custom_vjp
    def solver(loc):
        return loc

    solver.defvjp(lambda loc: (loc, None), lambda _, g: (g,))  # which has no forward mode

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(solver(loc), 1), obs=y)

    assert of_model(model, {"loc": jnp.array(1.0)}, Y) is None


def test_a_param_that_no_datum_depends_on_is_not_told():
    def model(y):
        numpyro.param("unused", 0.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(0, 1), obs=y)

    (finding,) = param_findings(of_model(model, {"unused": jnp.array(1.0)}, Y), are_well=True)
    assert not finding.is_told
    assert finding.is_well


@pytest.mark.parametrize("kernel", ["mala", "langevin"])
def test_particles_tell_it_and_a_run_warns(kernel):
    engine = ParticleMMLE(hierarchical, STILL, num_particles=8, kernel=kernel, step_size=0.1)
    start = {"loc": float(Y.mean())}  # unadjusted particles would not move it: they have the right means
    result = engine.run(KEY, 200, Y, progress_bar=False, init_params=start, report=True)
    assert result.report.is_well
    with pytest.warns(UserWarning, match=r"site 'loc': standard errors from the maximum of likelihood is 7.* a Newton step"):
        result = engine.run(KEY, 200, Y, progress_bar=False, init_params={"loc": start["loc"] - 0.5}, report=True)
    found = told(result.report, QUANTITY)
    error = (found.most - MOST) / 3
    assert error < 0.2
    assert abs(found.value - newton(Y, start["loc"] - 0.5)) < 4.5 * error


def test_samples_of_a_guide_tell_it_beside_an_energy():
    """The tilt of the prior is that of an energy and has its own line; the noise is a param of the likelihood."""

    def model(y):
        tilt = numpyro.param("tilt", 1.0)
        noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
            numpyro.sample("y", dist.Normal(z, noise), obs=y)

    def guide(y):
        noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            numpyro.sample("z", dist.Normal((y + noise**2) / (1 + noise**2), noise / (1 + noise**2) ** 0.5))

    y = 1 + 2**0.5 * (Y - Y.mean()) / Y.std()

    def told_at(noise):
        phase = negative_phase(model, num_chains=200)
        svi = SVI(phase, guide, STILL, Trace_ELBO())
        fit = svi.run(KEY, 50, y, progress_bar=False, init_params={"noise": noise})
        return diagnose(fit, phase, y, guide=guide, warn=False)

    assert run_model(model, (y,), {}, KEY).params.keys() == {"tilt", "noise"}
    right, wrong = told_at(1.0), told_at(1.3)
    assert right.is_well
    assert told(right, QUANTITY).site == "noise"
    # of log noise: y has N(1, 1 + noise^2), and its scores at each row
    variance = 1 + 1.3**2
    scores = np.asarray((y - 1) ** 2 / variance - 1) * 1.3**2 / variance
    found = told(wrong, QUANTITY)
    exact = abs(scores.sum()) / (scores.std() * 200**0.5)
    assert abs(found.value - exact) < 4.5 * (found.most - MOST) / 3 + 0.03 * exact
    assert not found.is_well


def test_batches_of_a_guide_have_the_same_rows():
    """Catches scores of different rows that are averaged as if they were samples of one: the information would be near 0."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        numpyro.sample(
            "energy", TiltedDistribution(dist.Normal(0, 1), lambda e: -numpyro.param("tilt", 0.0) * e), obs=jnp.zeros(())
        )
        with numpyro.plate("data", len(y), subsample_size=100):
            batch = numpyro.subsample(y, event_dim=0)
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=batch)

    def guide(y):
        with numpyro.plate("data", len(y), subsample_size=100):
            numpyro.sample("x", dist.Normal((numpyro.subsample(y, event_dim=0) - 1) / 2, 0.5**0.5))

    phase = negative_phase(model, num_chains=50)
    fit = SVI(phase, guide, STILL, Trace_ELBO()).run(KEY, 5, Y, progress_bar=False, init_params={"loc": -1.0})
    found = told(diagnose(fit, phase, Y, guide=guide, warn=False), QUANTITY)
    assert abs(found.value - newton(Y, -1.0)) < 4.5  # of the 100 rows that are not seen


def test_what_unadjusted_particles_have_done_to_a_param_is_a_part_of_it():
    """Of the variance t of a prior, which particles of a variance that is too large make larger: with h c = .4, a fourth."""
    y = jnp.asarray(np.random.default_rng(3).standard_normal(2000) * 2**0.5, jnp.float32)

    def model(y):
        log_scale = numpyro.param("log_scale", 0.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.Normal(0, jnp.exp(log_scale)))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    engine = ParticleMMLE(model, optax.adam(optax.cosine_decay_schedule(0.05, 400)), num_particles=8, step_size=0.2)
    result = engine.run(KEY, 400, y, progress_bar=False, report=False)
    found = told(diagnose(result, engine, y, warn=False), QUANTITY)
    marginal = 1 + np.exp(2 * result.params["log_scale"])
    scores = (np.asarray(y) ** 2 / marginal - 1) * (marginal - 1) / marginal
    exact = abs(scores.sum()) / (scores.std() * 2000**0.5)
    assert exact > 2
    assert abs(found.value - exact) < 4.5 * (found.most - MOST) / 3 + 0.05 * exact
    assert not found.is_well


def test_rows_that_depend_on_each_other_are_not_told():
    """By a sum over a row of the plate, of which the plate says that it has rows: no row can be accepted by itself."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x + 0.1 * x.mean(), 1), obs=y)

    engine = ParticleMMLE(model, STILL, num_particles=4, step_size=0.05)
    result = engine.run(KEY, 10, Y, progress_bar=False, report=False)
    assert not told(diagnose(result, engine, Y, warn=False), QUANTITY).is_told


def test_what_a_batch_cannot_know_is_not_told():
    # A bound of fourteen standard errors said that a param nearly three away was well.
    def finding(step):
        found = ParamDistance(jnp.array([step, 0.1]), jnp.array([4.5, 0.2]), {"a": jnp.zeros(()), "b": jnp.zeros(())})
        (finding,) = param_findings(found, are_well=True)
        return finding

    assert not finding(1.8).is_told
    assert finding(1.8).site == "a"
    assert "its error is 4.5 standard errors" in finding(1.8).fix
    assert finding(20.0).is_told
    assert not finding(20.0).is_well
