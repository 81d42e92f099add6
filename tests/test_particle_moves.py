# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Metropolis-adjusted particles: their posterior is exact at every step; and the steps of particles by latent site."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import init_to_value

from numpyro_ebm import ParticleMMLE, kinetic_langevin
from numpyro_ebm.infer import particle_moves

KEY = jax.random.key(3)
Y = jnp.array([0.3, -1.0, 2.0, 0.5, 1.5, -0.2])
STILL = optax.sgd(1e-30)  # parameters that stay where they are


def _normal(y, sd=1.0, batch_size=None):
    """The marginal distribution of y is N(loc, 1 + sd^2), and the precision of a posterior 1 + 1 / sd^2."""
    loc = numpyro.param("loc", 0.5)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as index:
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, jnp.broadcast_to(sd, len(y))[index]), obs=y[index])


def _counts(y, batch_size=None):
    """Posteriors Gamma(2 + y, 2): in log space the curvature is 2 + y."""
    rate = numpyro.param("rate", 1.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as index:
        x = numpyro.sample("x", dist.Gamma(2.0, rate))
        numpyro.sample("y", dist.Poisson(x), obs=y[index])


def _global_and_local(y):
    numpyro.param("loc", 0.0)
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 0.7))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def _draws(engine, num_steps, *args, warm_up=300, **kwargs):
    """Constrained particles of every tenth step, of shape ``(steps, particles) + shape`` by site."""
    run = engine.run(KEY, warm_up, *args, progress_bar=False, **kwargs)

    def collect(state):
        return state.particles

    more = engine.run(KEY, num_steps, *args, init_state=run.state, progress_bar=False, collect=collect, **kwargs)
    return more, {name: x[::10] for name, x in more.collected.items()}


def _assert_moments(draws, mean, variance):
    """Within 4.5 standard errors, from particles that move independently of each other: their means count as one draw each."""
    by_particle = np.moveaxis(np.asarray(draws, float), 1, 0)  # (particles, steps, ...)
    for values, exact in ((by_particle, mean), ((by_particle - np.asarray(mean)) ** 2, variance)):
        each = values.mean(1)
        error = each.std(0, ddof=1) / np.sqrt(len(each))
        np.testing.assert_array_less(np.abs(each.mean(0) - exact), 4.5 * error)


def test_variance_is_exact_far_above_the_limit_of_langevin(monkeypatch):
    """The limit is 1 for sd 1, and the step stays at 2.5: guards against a proposal or a density left out of the ratio."""
    monkeypatch.setattr(particle_moves, "GAIN", 0.0)
    engine = ParticleMMLE(_normal, STILL, 500, 2.5, kernel="mala")
    more, draws = _draws(engine, 1000, Y)
    _assert_moments(draws["x"], (0.5 + Y) / 2, 0.5)
    np.testing.assert_allclose(more.state.dynamics_state.step_size["x"], 2.5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_gamma_posteriors_are_exact_with_rows_a_hundred_times_as_stiff(batch_size):
    """Guards against one step for all rows, a Jacobian left out, or a row's acceptance that is another's under subsampling."""
    y = jnp.array([0, 3, 400])
    engine = ParticleMMLE(_counts, STILL, 400, kernel="mala", num_moves=3)
    more, draws = _draws(engine, 1000, y, batch_size=batch_size)
    shape = 2.0 + y
    _assert_moments(jnp.exp(draws["x"]), shape / 2, shape / 4)
    step = more.state.dynamics_state.step_size["x"]
    assert step.shape == (3,)
    assert step[0] > 30 * step[2]
    np.testing.assert_allclose(more.state.acceptance["x"], 0.574, atol=0.08)


def test_global_latent_and_local_latents_have_their_joint_posterior():
    precision = np.diag([1 + len(Y) / 0.49, *(1 / 0.49 + 4) * np.ones(len(Y))])
    precision[0, 1:] = precision[1:, 0] = -1 / 0.49
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.concatenate([[0.0], 4 * Y])
    more, draws = _draws(ParticleMMLE(_global_and_local, STILL, 400, kernel="mala"), 1000, Y)
    _assert_moments(draws["mean"], mean[0], covariance[0, 0])
    _assert_moments(draws["x"], mean[1:], np.diag(covariance)[1:])
    assert more.state.acceptance["mean"].shape == ()
    assert more.state.acceptance["x"].shape == (6,)


@pytest.mark.parametrize("settings", [{}, {"order": "gauss_seidel", "num_moves": 3}, {"num_moves": 2, "average_moves": True}])
def test_the_maximum_of_the_likelihood_is_learned_without_a_step_size(settings):
    """With one row that is 400 times as stiff, where unadjusted particles need h < .005."""
    sd = jnp.array([1.0, 1.0, 1.0, 0.05, 1.0, 1.0])
    engine = ParticleMMLE(_normal, optax.adam(optax.exponential_decay(0.05, 200, 0.7)), 100, kernel="mala", **settings)
    learned = engine.run(KEY, 2000, Y, sd=sd, progress_bar=False).params["loc"]
    weight = 1 / (1 + sd**2)
    np.testing.assert_allclose(learned, (weight * Y).sum() / weight.sum(), atol=0.02)


def test_rows_that_a_term_outside_their_plate_couples_are_accepted_together():
    def model(y):
        loc = numpyro.param("loc", 0.5)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x.sum(), 0.5), obs=y.sum())

    more, draws = _draws(ParticleMMLE(model, STILL, 400, kernel="mala"), 1000, Y)
    assert more.state.acceptance["x"].shape == (1,)
    covariance = np.linalg.inv(np.eye(6) + 4 * np.ones((6, 6)))
    _assert_moments(draws["x"], covariance @ (0.5 + 4 * float(Y.sum()) * np.ones(6)), np.diag(covariance))


def test_rows_that_are_not_independent_are_refused_by_name():
    def inside(y):
        loc = numpyro.param("loc", 0.5)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(jnp.cumsum(x), 1), obs=y)

    def outside(y):
        loc = numpyro.param("loc", 0.5)
        with numpyro.plate("data", len(y), subsample_size=2) as index:
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y[index])
        numpyro.factor("sum", -(x.sum() ** 2))

    def step(y):
        loc = numpyro.param("loc", 0.5)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.factor("far", jnp.where(abs(x - jnp.roll(x, 1)) < 0.7, 0.0, -4.0))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    for model in (inside, step):
        with pytest.raises(ValueError, match="site 'x': rows of its plates depend on each other, and kernel='mala'"):
            ParticleMMLE(model, STILL, 2, kernel="mala").init(KEY, Y)
    ParticleMMLE(inside, STILL, 2, 0.1).init(KEY, Y)  # as unadjusted particles do not mind
    with pytest.raises(ValueError, match="site 'x': site 'sum' outside the subsampled plate 'data' depends on it"):
        ParticleMMLE(outside, STILL, 2, kernel="mala").init(KEY, Y)


def test_settings_that_adjusted_moves_have_no_use_for_are_refused():
    with pytest.raises(ValueError, match="kernel='mala' does not go with dynamics="):
        ParticleMMLE(_normal, STILL, 2, 0.1, kernel="mala", dynamics=kinetic_langevin(0.1, 1.0))
    with pytest.raises(ValueError, match="kernel='mala' does not go with noise='all'"):
        ParticleMMLE(_normal, STILL, 2, 0.1, kernel="mala", noise="all")
    with pytest.raises(ValueError, match="step_size is a schedule, and the steps of kernel='mala' adapt"):
        ParticleMMLE(_normal, STILL, 2, lambda step: 0.1, kernel="mala")
    with pytest.raises(ValueError, match=r"step_size is needed: .* With kernel='mala' they find one themselves"):
        ParticleMMLE(_normal, STILL, 2)


def test_replicated_particles_keep_their_steps():
    engine = ParticleMMLE(_normal, STILL, 4, kernel="mala")
    state = engine.run(KEY, 20, Y, progress_bar=False).state
    more = ParticleMMLE(_normal, STILL, 8, kernel="mala")
    state = more.replicate(state)
    assert state.dynamics_state.step_size["x"].shape == (6,)
    assert more.update(state, Y)[0].particles["x"].shape == (8, 6)


# Steps by latent site.


def test_steps_of_sites_are_theirs():
    """Particles at 0 with a score of 0 move by their noise alone, sqrt(2h)."""

    def model():
        numpyro.param("loc", 0.0)
        for name in ("a", "b"):
            numpyro.sample(name, dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(0, 1), obs=0.0)

    steps = {"a": 0.02, "b": lambda step: 0.08 / (1 + step)}
    at_zero = init_to_value(values={"a": 0.0, "b": 0.0})
    engine = ParticleMMLE(model, STILL, 4000, steps, init_strategy=at_zero)
    state, _ = engine.update(engine.init(KEY))
    np.testing.assert_allclose([state.particles[name].std() for name in ("a", "b")], [0.2, 0.4], rtol=0.05)
    after, _ = engine.update(state)
    np.testing.assert_allclose((after.particles["b"] - (1 - 0.04) * state.particles["b"]).std(), np.sqrt(0.08), rtol=0.05)


def test_steps_of_other_sites_are_refused_before_compilation():
    for steps, message in (
        ({"x": 0.1}, "site 'mean' has no step_size: step_size must name the latent sites"),
        ({"x": 0.1, "mean": 0.1, "w": 0.1}, "site 'w' is no latent site of the model: step_size must name"),
    ):
        with pytest.raises(ValueError, match=message):
            ParticleMMLE(_global_and_local, STILL, 2, steps).init(KEY, Y)
    with pytest.raises(ValueError, match=r"step_size\['x'\] must be a positive finite number, got 0"):
        ParticleMMLE(_normal, STILL, 2, {"x": 0})
    with pytest.raises(ValueError, match="ipla moves the parameters by step_size as well, which must be one number"):
        ParticleMMLE.ipla(_normal, num_particles=2, step_size={"x": 0.1})
