# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""ParticleMMLE: what it refuses and says, and how its particles, parameters and chains move."""

import re
import warnings
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints
from numpyro.handlers import mask, scale, seed, substitute
from numpyro.infer import init_to_value
from numpyro.infer.util import potential_energy

from numpyro_ebm import MALA, NonFiniteError, ParticleMMLE, TiltedDistribution, UnadjustedLangevin, negative_phase
from numpyro_ebm.infer import Averaged, Summed

KEY = jax.random.key(5)
Y = jnp.array([0.3, -1.0, 2.0, 0.5, 1.5, -0.2])
STILL = optax.sgd(1e-30)  # parameters that stay where they are


def _drift(gradient, state, params=None, *, rng_key, **_):
    """Particles that follow their score, with noise of no size: without any they are refused."""
    return jax.tree.map(lambda g: -0.01 * g + 0 * jax.random.normal(rng_key, g.shape), gradient), state


DRIFT = optax.GradientTransformationExtraArgs(lambda params: (), _drift)


def _hierarchical(y, sd=1.0):
    loc = numpyro.param("loc", 0.5)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, sd), obs=y)


def _loaded(y, index):
    """A data loader's batch: its rows of the data, and their indices."""
    loc = numpyro.param("loc", 0.5)
    with substitute(data={"data": index}):
        plate = numpyro.plate("data", 6, subsample_size=len(index))
    with plate:
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def _engine(model, optim=None, **settings):
    settings = {"num_particles": 3, "step_size": 0.05, **settings}
    return ParticleMMLE(model, optax.sgd(0.01) if optim is None else optim, **settings)


def _run(engine, num_steps, *args, **settings):
    return engine.run(KEY, num_steps, *args, progress_bar=False, **settings)


# Bad input.


def test_noise_between_visits_is_that_of_overdamped_particles():
    with pytest.raises(ValueError, match="noise='all' is noise between visits of overdamped particles"):
        _engine(_hierarchical, noise="all", dynamics=DRIFT)


def _discrete(y):
    p = numpyro.param("p", 0.5, constraint=constraints.unit_interval)
    with numpyro.plate("data", len(y)):
        k = numpyro.sample("k", dist.Bernoulli(p))
        x = numpyro.sample("x", dist.Normal(k, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def _nothing_to_learn(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1).expand([len(y)]).to_event(1), obs=y)


def _no_latent(y):
    numpyro.sample("y", dist.Normal(numpyro.param("loc", 0.0), 1).expand([len(y)]).to_event(1), obs=y)


def _outside_a_subsampled_plate(y):
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    shared = numpyro.sample("shared", dist.Normal(0, scale))
    with numpyro.plate("data", len(y), subsample_size=2) as index:
        x = numpyro.sample("x", dist.Normal(shared, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y[index])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_discrete, r"site 'k': a latent with Bernoulli.* is discrete .* Sum it out .*, make it continuous, or observe it"),
        (_nothing_to_learn, "the model has no param site, so that there is nothing to learn: draw its latents by MCMC"),
        (_no_latent, "the model has no latent site, so that there are no particles: learn its parameters by SVI"),
        (_outside_a_subsampled_plate, "site 'shared' stands outside the subsampled plate 'data'.* Make it a numpyro.param"),
    ],
)
def test_models_that_cannot_be_learned_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        _engine(model).init(KEY, Y)


def _with_rows_that_stay(y, data=None, num_rows=6):
    """A batch of a data loader, of which nothing says which rows it has."""
    loc = numpyro.param("loc", 0.5)
    with numpyro.plate("data", num_rows, subsample_size=len(y)) as index:
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y if data is None else data(y, x, index))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_data_that_stay_where_a_plate_draws_other_rows_are_refused(num_rows):
    """Catches particles that meet other rows' data in each step: a scale of 2.8 was learned for .8, with a report that is well."""
    fix = rf"numpyro.subsample\(y, event_dim=0\).*numpyro.plate\('data', {num_rows}\).*Minibatch\(index, \(y,\)\)"
    cause = f"site 'y': plate 'data' draws {num_rows} of 6 rows in each step, and the data do not depend on which"
    with pytest.raises(ValueError, match=rf"{cause}.*{fix}"):
        _engine(_with_rows_that_stay).init(KEY, Y[:num_rows])
    with pytest.raises(ValueError, match=cause):  # that are no argument
        _engine(partial(_with_rows_that_stay, data=lambda y, x, index: Y[:num_rows])).init(KEY, Y[:num_rows])
    with pytest.raises(ValueError, match=cause):  # before anything is known of the values
        jax.jit(_engine(_with_rows_that_stay).init)(KEY, Y[:num_rows])


def test_data_of_one_of_two_plates_that_stay_are_refused():
    def model(y):
        loc = numpyro.param("loc", 0.0)
        rows = numpyro.plate("rows", 6, subsample_size=2, dim=-2)
        with rows as i, numpyro.plate("columns", 5, subsample_size=3, dim=-1):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y[i])

    with pytest.raises(ValueError, match="site 'y': plate 'columns' draws 3 of 5 rows in each step"):
        _engine(model).init(KEY, jnp.arange(18.0).reshape(6, 3))
    jax.eval_shape(lambda: _engine(model).init(KEY, jnp.arange(6.0)[:, None]))  # one for all columns


@pytest.mark.parametrize(
    "data",
    [
        lambda y, x, index: 2.0,
        lambda y, x, index: jnp.full(1, 2.0),
        lambda y, x, index: jnp.zeros(3),
        lambda y, x, index: Y[index],
        lambda y, x, index: jnp.where(index > 2, 1.0, 0.0),
        lambda y, x, index: numpyro.subsample(Y, event_dim=0),
        lambda y, x, index: x * y.sum(),
    ],
)
def test_data_that_are_the_same_for_all_rows_or_of_the_rows_drawn_are_learned(data):
    engine = _engine(partial(_with_rows_that_stay, data=data))
    jax.eval_shape(lambda: engine.init(KEY, Y[:3]))


def test_masked_data_need_not_be_finite():
    """And move nothing: catches a gradient of nan times zero."""

    def model(y, seen):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            with mask(mask=seen):
                numpyro.sample("y", dist.Normal(x, 1), obs=y)

    engine = _engine(model)
    state, loss = engine.update(
        engine.init(KEY, Y.at[1].set(jnp.nan), jnp.arange(6) != 1), Y.at[1].set(jnp.nan), jnp.arange(6) != 1
    )
    same, exact = engine.update(engine.init(KEY, Y, jnp.arange(6) != 1), Y, jnp.arange(6) != 1)
    assert loss == exact
    np.testing.assert_array_equal(state.particles["x"], same.particles["x"])
    with pytest.raises(ValueError, match="site 'y': 1 of 6 observed events are NaN"):
        engine.init(KEY, Y.at[1].set(jnp.nan), jnp.arange(6) != 2)


def test_nan_is_found_in_rows_that_the_first_batch_does_not_show():
    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y), subsample_size=1) as index:
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y[index])

    engine = _engine(model)
    for row in range(6):
        with pytest.raises(ValueError, match="site 'y': 1 of 1 observed events are NaN"):
            engine.init(KEY, Y.at[row].set(jnp.nan))


@pytest.mark.parametrize(("index", "bad"), [([2, 6], 6), ([-1, 2], -1)])
def test_index_out_of_range_is_refused_before_and_during_a_run(index, bad):
    """JAX itself would clip it, and move the particles of another row."""
    engine, index = _engine(_loaded), jnp.array(index)
    message = f"plate 'data': index {bad} is out of range for 6 rows of data"
    with pytest.raises(ValueError, match=message):
        engine.init(KEY, Y[:2], index)
    state = engine.init(KEY, Y[:2], jnp.array([0, 1]))
    with pytest.raises(NonFiniteError, match=f"step 1: {message}") as error:
        _run(engine, 3, Y[:2], index, init_state=state)
    np.testing.assert_array_equal(error.value.state.particles["x"], state.particles["x"])
    assert jnp.isnan(engine.update(state, Y[:2], index)[1])


def test_all_rows_in_another_order_are_refused():
    """A whole plate is not gathered, so they would be paired with particles of other rows."""
    with pytest.raises(ValueError, match="plate 'data': index 1 is out of order"):
        _engine(_loaded).init(KEY, Y, jnp.array([1, 0, 2, 3, 4, 5]))


def test_average_over_data_needs_their_number():
    def model(y):
        w = numpyro.sample("w", dist.Normal(numpyro.param("loc", 0.0), 1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(w, 1), obs=y)

    with pytest.raises(ValueError, match=r"no plate has all latent sites in it: give it, drift=Averaged\(num_data=...\), or"):
        _engine(model, drift=Averaged()).init(KEY, Y)
    start = _engine(model).init(KEY, Y)
    by_mean, by_sum = (
        engine.update(start, Y)[0].params["loc"]
        for engine in (_engine(model, drift=Averaged(num_data=6)), _engine(model, optax.sgd(0.01 / 6)))
    )
    np.testing.assert_allclose(by_mean, by_sum, rtol=1e-6)


def test_state_of_another_model_or_number_of_particles_is_refused():
    state = _engine(_hierarchical).init(KEY, Y)

    def other(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 1)), 1), obs=y.sum())

    with pytest.raises(ValueError, match=r"the state is of another model: its latent sites are \['x'\], the model's \['z'\]"):
        _engine(other).update(state, Y)
    with pytest.raises(ValueError, match="the state has 3 particles and the engine num_particles=6"):
        _engine(_hierarchical, num_particles=6).update(state, Y)


# Steps that are too large.


@pytest.mark.filterwarnings("ignore:site 'x'. step_size is h = 0.6:UserWarning")  # if a chunk ends before all diverges
def test_step_above_the_stability_limit_is_said():
    """The curvature is 1 + 1 / 0.25 = 5, so the limit is 0.4."""
    engine = _engine(_hierarchical, STILL, step_size=0.6)
    with pytest.raises(NonFiniteError, match=r"The step_size h = 0.6 is above the stability limit of about 0.4 ") as error:
        _run(engine, 1_000, Y, sd=0.5)
    assert "the particles of site 'x'" in str(error.value) or "the loss" in str(error.value)
    state = error.value.state
    assert jnp.isfinite(state.particles["x"]).all()
    assert jnp.abs(state.particles["x"]).max() > 1e15  # the last good state is the one just before
    assert int(state.num_steps) == error.value.step - 1


def test_learning_rate_that_is_too_large_is_said():
    engine = _engine(_hierarchical, optax.sgd(50.0))
    with pytest.raises(NonFiniteError, match=r"take a smaller learning rate.* What was seen: .*(param 'loc'|the loss)") as error:
        _run(engine, 1_000, Y)
    assert "Particles are stable where they were at fixed parameters (h = 0.05, limit about 1)" in str(error.value)


def _logistic(x, y):
    """Its score is bounded, so that no step makes particles diverge: they hop instead."""
    sd = numpyro.param("sd", 100.0, constraint=constraints.positive)
    w = numpyro.sample("w", dist.Normal(0, sd))
    numpyro.sample("y", dist.Bernoulli(logits=w * x).to_event(1), obs=y)


def test_stiff_but_bounded_particles_are_warned_of():
    x, y = jnp.full(50, 10.0), jnp.arange(50) % 2
    at_zero = init_to_value(values={"w": 0.0})
    with pytest.warns(
        UserWarning, match=r"site 'w': step_size is h = 0.1, and h times the curvature is about \d.* smaller step_size"
    ):
        _run(_engine(_logistic, STILL, step_size=0.1, init_strategy=at_zero), 400, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # at a step that suits the curvature of 1250, none
        _run(_engine(_logistic, STILL, step_size=2e-4, init_strategy=at_zero), 400, x, y)


@pytest.mark.parametrize("sd", [0.5, 2.0])
def test_stability_limit_of_a_quadratic_is_two_over_its_largest_curvature(sd):
    """Of several elements, each with a curvature of its own; the plate's scale does not count for a row's own posterior."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", 6, subsample_size=2) as index:
            x = numpyro.sample("x", dist.Normal(loc, jnp.array([1.0, 3.0])).to_event(1))
            numpyro.sample("y", dist.Normal(x[..., 0], sd), obs=y[index])

    engine = _engine(model)
    limit = engine.stability_limit(engine.init(KEY, Y), Y)
    np.testing.assert_allclose(limit, 2 / (1 + 1 / sd**2), rtol=1e-3)


# One step, exactly.


def _nested(y, index):
    """Rows of a batch, each with groups of its own, an event, a support, and a term of parameters alone."""
    loc = numpyro.param("loc", 0.5)
    sd = numpyro.param("sd", 2.0, constraint=constraints.positive)
    numpyro.factor("prior", -(sd**2))
    with substitute(data={"data": index}):
        data = numpyro.plate("data", 6, subsample_size=len(index), dim=-2)
    with data:
        share = numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("groups", 2, dim=-1), scale(scale=1.5):
            x = numpyro.sample("x", dist.Gamma(sd, 1.0))
            numpyro.sample("y", dist.Normal(x * share[..., 0] + loc, 1), obs=y[index, None])


def _network(y, index):
    net = eqx_module("net", eqx.nn.MLP(2, "scalar", 3, 1, key=jax.random.key(0)))
    with substitute(data={"data": index}):
        data = numpyro.plate("data", 6, subsample_size=len(index))
    with data:
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(jax.vmap(net)(z), 0.5), obs=y[index])


def _time_series(y, index):
    decay = numpyro.param("decay", 0.5)

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(decay * x, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)
        return x, None

    scan(step, jnp.zeros(()), y)


@pytest.mark.parametrize("model", [_nested, _network, _time_series])
def test_one_step_follows_the_gradients_of_numpyros_density(model):
    """Particles their own posterior's, without the scale of the plate; parameters the mean over particles, with it.

    Catches that scale on the wrong one of the two, rows put back at other rows, a lost factor 1 / num_particles, and a log
    Jacobian that is missing from the drift.
    """
    index = jnp.array([4, 1])
    engine = _engine(model, optax.sgd(0.02), dynamics=DRIFT)
    start = engine.init(KEY, Y, index)
    state, loss = engine.update(start, Y, index)
    in_plate = model is not _time_series
    rows = jax.tree.map(lambda x: x[:, index] if in_plate else x, start.particles)

    def potentials(free, x):
        params = {**free, "sd": jnp.exp(free["sd"])} if "sd" in free else free
        fixed = substitute(seed(model, KEY), data=params)
        return jax.vmap(lambda x: potential_energy(fixed, (Y, index), {}, x))(x)

    value, (of_params, of_x) = jax.value_and_grad(lambda *at: potentials(*at).sum(), (0, 1))(start.unconstrained, rows)
    np.testing.assert_allclose(loss, value / 3, rtol=1e-5)

    def check(new, old, gradient, rate):
        np.testing.assert_allclose(new, old - rate * gradient, rtol=1e-4, atol=1e-5)

    jax.tree.map(lambda new, old, g: check(new, old, g, 0.02 / 3), state.unconstrained, start.unconstrained, of_params)
    for name, x in start.particles.items():
        new = x.at[:, index].add(-0.01 / 3 * of_x[name]) if in_plate else x - 0.01 * of_x[name]  # 6 / 2 rows is the scale
        np.testing.assert_allclose(state.particles[name], new, rtol=1e-4, atol=1e-5)


def test_energy_prior_of_a_batch_pays_its_normalizer_for_all_data():
    """With chains that stand at known values: the gradient in the tilt is 6 / 2 * sum over rows of (x - mean of chains)."""

    def model(y, index):
        tilt = numpyro.param("tilt", 0.3)
        with substitute(data={"data": index}):
            data = numpyro.plate("data", 6, subsample_size=len(index))
        with data:
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
            numpyro.sample("y", dist.Normal(z, 1), obs=y[index])

    chains = jnp.array([-1.0, 0.5, 2.0, 4.0])
    phase = negative_phase(model, sampler=MALA(num_steps=0), num_chains=4, init_chains={"z": chains})
    index = jnp.array([4, 1])
    for drift, count in ((Summed(), 1), (Averaged(), 6)):
        engine = _engine(phase, optax.sgd(0.02), drift=drift)
        start = engine.init(KEY, Y, index)
        state, _ = engine.update(start, Y, index)
        gradient = -3 * (start.particles["z"][:, index] - chains.mean()).sum(1).mean()
        np.testing.assert_allclose(state.params["tilt"], 0.3 - 0.02 * gradient / count, rtol=1e-5)
        np.testing.assert_array_equal(state.mutable_state["z/chains"]["x"], chains)


# Particles.


def test_constrained_particles_have_the_exact_mean_of_a_gamma():
    """Stationarity of the Euler step makes E[score] = 0 at any step size, so that E[z] = 3 / 2 exactly in log space.

    Catches a missing log Jacobian, which gives (3 - 1) / 2. The rows are independent: five standard errors over them.
    """

    def model():
        numpyro.sample("y", dist.Normal(numpyro.param("loc", 0.0), 1), obs=0.0)
        with numpyro.plate("data", 300):
            numpyro.sample("z", dist.Gamma(3, 2))

    engine = _engine(model, step_size=0.1, num_particles=2)
    draws = np.exp(_run(engine, 600, collect=lambda state: state.particles["z"]).collected[100:])
    rows = draws.mean((0, 1))
    error = rows.std(ddof=1) / np.sqrt(300)
    assert error < 0.02
    assert abs(rows.mean() - 1.5) < 5 * error


def test_particles_stay_in_their_support():
    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            share = numpyro.sample("share", dist.Dirichlet(jnp.full(3, 0.5)))
            at = numpyro.sample("at", dist.Uniform(-1, 2))
            numpyro.sample("y", dist.Normal(loc + at + share[..., 0], 0.5), obs=y)

    engine = _engine(model, num_particles=4)
    state = _run(engine, 200, Y).state
    found = engine.get_particles(state, Y)
    assert found["share"].shape == (4, 6, 3)
    assert found["at"].shape == (4, 6)
    assert state.particles["share"].shape == (4, 6, 2)
    assert constraints.simplex(found["share"]).all()
    assert constraints.interval(-1, 2)(found["at"]).all()


def test_global_latent_has_its_posterior_mean():
    """The Euler step keeps the mean of a Gaussian: (0 + sum y) / 7. Particles are independent: five standard errors."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        w = numpyro.sample("w", dist.Normal(loc, 1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(w, 1), obs=y)

    w = _run(_engine(model, STILL, num_particles=2_000), 100, Y + 2).state.particles["w"]
    assert w.shape == (2_000,)
    assert abs(w.mean() - (Y + 2).sum() / 7) < 5 * w.std() / np.sqrt(2_000)


@pytest.mark.parametrize("settings", [{}, {"noise": "all"}, {"dynamics": DRIFT}])
def test_only_the_rows_of_the_batch_move_but_for_noise_on_all(settings):
    index = jnp.array([4, 1])
    engine = _engine(_loaded, **settings)
    start = engine.init(KEY, Y[index], index)
    state, _ = engine.update(start, Y[index], index)
    moved = (state.particles["x"] != start.particles["x"]).all(0)
    still = (state.particles["x"] == start.particles["x"]).all(0)
    assert moved[index].all()
    rest = jnp.array([0, 2, 3, 5])
    assert moved[rest].all() if settings.get("noise") == "all" else still[rest].all()


@pytest.mark.parametrize("settings", [{}, {"order": "gauss_seidel"}, {"average_moves": True}])
@pytest.mark.parametrize("num_moves", [1, 2, 10])
def test_noise_on_all_leaves_the_variance_of_langevin_with_any_number_of_moves(num_moves, settings):
    # catches moves without noise between visits: the cloud had a fifth of the variance with 10 moves
    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", 16, subsample_size=4) as index:
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y[index])

    h = 0.1  # of a curvature of 2: x <- (1 - 2h) x + sqrt(2h) xi has the variance 2h / (1 - (1 - 2h)^2)
    engine = _engine(model, STILL, num_particles=500, step_size=h, noise="all", num_moves=num_moves, **settings)
    result = _run(engine, 200, jnp.zeros(16), collect=lambda state: (state.particles["x"] ** 2).mean())
    np.testing.assert_allclose(result.collected[100:].mean(), 2 * h / (1 - (1 - 2 * h) ** 2), rtol=0.03)


def test_velocities_are_kept_by_row():
    index = jnp.array([4, 1])
    engine = ParticleMMLE.kiplmc2(_loaded, num_particles=3, step_size=0.1, friction=1.0)
    state, _ = engine.update(engine.init(KEY, Y[index], index), Y[index], index)
    velocity = state.dynamics_state.velocity["x"]
    assert velocity.shape == (3, 6)
    assert (velocity[:, index] != 0).all()
    assert (velocity[:, jnp.array([0, 2, 3, 5])] == 0).all()


def test_every_row_starts_from_a_draw_of_its_own():
    """Also where the batch does not divide the data. Catches rows left at zero, and one draw copied to all batches."""

    def model(y):
        loc = numpyro.param("loc", 3.0)
        with numpyro.plate("data", len(y), subsample_size=4) as index:
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y[index])

    x = _engine(model, num_particles=500).init(KEY, Y).particles["x"]
    assert x.shape == (500, 6)
    assert len(np.unique(x)) > 2_900
    assert (jnp.abs(x.mean(0) - 3) < 5 / np.sqrt(500)).all()


def test_a_density_that_was_finite_before_has_met_too_large_a_step_first_of_all():
    """Catches a cause named first that only the first step can have: that the model makes such values impossible."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.factor("wall", -jnp.exp(jnp.exp(x - 5)))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    engine = ParticleMMLE(model, optax.sgd(1e4), 2, 0.1, init_strategy=init_to_value(values={"x": jnp.ones(6)}))
    causes = "it overflows where too large a step_size or learning rate has led to, or the model makes these values impossible"
    seen = rf"site 'wall': its log density is not finite .*: {causes}\."
    with pytest.raises(NonFiniteError, match=rf"step [2-9]: .*(step_size|learning rate).* What was seen: {seen}"):
        engine.run(KEY, 20, Y, progress_bar=False)


@pytest.mark.parametrize("value", [0.0, jnp.zeros(2), jnp.zeros(6), jnp.zeros((1, 2)), jnp.zeros((7, 2))])
def test_values_to_start_from_have_the_shape_of_their_site(value):
    """Some failed inside NumPy with an IndexError, others were taken for the state of other data."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(x + w.sum(-1), 1), obs=y)

    def begun(value):
        return ParticleMMLE(model, STILL, 2, 0.1, init_strategy=init_to_value(values={"w": value})).init(KEY, Y)

    with pytest.raises(ValueError, match=rf"site 'w': init_strategy gives .* shape {re.escape(str(np.shape(value)))}, .* \(6, 2\)"):
        begun(value)
    assert (begun(jnp.ones((6, 2))).particles["w"] == 1).all()


def test_particles_start_where_they_are_told():
    at = init_to_value(values={"x": jnp.arange(6.0)})
    start = _engine(_hierarchical, init_strategy=at).init(KEY, Y)
    np.testing.assert_array_equal(start.particles["x"], np.tile(np.arange(6.0), (3, 1)))


def test_values_to_start_from_are_of_a_latent():
    """NumPyro passes over names that the model does not have, and starts elsewhere."""
    at = init_to_value(values={"effect": jnp.zeros(6)})
    with pytest.raises(ValueError, match=r"init_strategy gives values of \['effect'\], .* the model has \['x'\]"):
        _engine(_hierarchical, init_strategy=at).init(KEY, Y)


def test_replicated_state_goes_on_with_copies_that_part():
    one, six = _engine(_hierarchical, num_particles=2), _engine(_hierarchical, num_particles=6)
    state = _run(one, 10, Y).state
    copies = six.replicate(state)
    np.testing.assert_array_equal(copies.particles["x"], np.repeat(state.particles["x"], 3, 0))
    assert copies.params == state.params
    x = _run(six, 5, Y, init_state=copies).state.particles["x"]
    assert len(np.unique(x)) == 36
    assert len(one.replicate(state, 4).particles["x"]) == 4
    with pytest.raises(ValueError, match="num_particles=5 is no multiple of the state's 2"):
        one.replicate(state, 5)


def test_mutable_site_of_the_user_goes_through_the_steps():
    def model(y):
        count = numpyro.primitives.mutable("count", {"n": 0})
        count["n"] = count["n"] + 1
        _hierarchical(y)

    engine = _engine(model)
    start = engine.init(KEY, Y)
    assert not start.mutable_state["count"]["n"].weak_type  # as that of Python's 0 is, which would compile twice
    state = _run(engine, 5, Y, init_state=start).state
    assert int(state.mutable_state["count"]["n"] - start.mutable_state["count"]["n"]) == 5
    assert not any("chains" in name for name in state.mutable_state)


# Energy priors.


def _tilted(y, tilt=None):
    loc = numpyro.param("loc", 0.0)
    tilt = numpyro.param("tilt", 0.0) if tilt is None else tilt
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
        numpyro.sample("y", dist.Normal(z + loc, 1), obs=y)


def test_chains_are_kept_where_an_energy_is_learned_and_nowhere_else():
    """Catches a normal model, or a fixed energy, paying for chains, and a learned one going without."""
    assert _engine(_hierarchical).init(KEY, Y).mutable_state == {}
    assert _engine(_tilted).init(KEY, Y, tilt=0.5).mutable_state == {}
    assert set(_engine(_tilted).init(KEY, Y).mutable_state) == {"z/chains"}
    state = _engine(negative_phase(_tilted, num_chains=5)).init(KEY, Y)
    assert state.mutable_state["z/chains"]["x"].shape == (5,)


def test_ebipla_as_it_comes_learns_a_linear_tilt():
    # catches short-run chains that keep their start: with (1 - h)^J = .55 there was no fixed point, and the tilt ran away
    def model(y):
        tilt = numpyro.param("tilt", 0.5)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    engine = ParticleMMLE.ebipla(model, num_particles=20, step_size=0.1)
    kept = (1 - 0.1) ** 60  # the mean of the chains is tilt (1 - kept), of the particles (tilt + 1) / 2
    for number in range(3):
        result = engine.run(
            jax.random.key(number), 2000, jnp.ones(100), collect=lambda state: state.params["tilt"], progress_bar=False
        )
        blocks = np.asarray(result.collected)[400:].reshape(8, -1).mean(1)  # of 200 steps: the tilt forgets in 20
        assert abs(blocks.mean() - 1 / (1 - 2 * kept)) < 5 * blocks.std(ddof=1) / np.sqrt(8)
        assert blocks.std(ddof=1) < 0.1


def test_short_runs_that_keep_their_start_are_said():
    # (1 - h)^J = .55 of a standard normal: a tilt has no fixed point there. With h = .1 it is .002, and nothing is said
    def model(y):
        tilt = numpyro.param("tilt", 0.5)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    short = {"num_particles": 2, "step_size": 0.1, "num_chains": 256}
    _run(ParticleMMLE.ebipla(model, **short), 30, Y)
    with pytest.warns(UserWarning, match=r"site 'z': the chains restart .* more than a tenth .*step_size=0.01, num_steps=60"):
        _run(ParticleMMLE.ebipla(model, **short, prior_step_size=0.01), 30, Y)


def test_fixed_energy_gives_the_answer_of_its_normalized_form():
    """A tilt of 0.5 is the prior N(0.5, 1), so loc = mean(y) - 0.5. Parameters fluctuate: five standard errors."""
    engine = _engine(_tilted, optax.sgd(0.02))
    loc = _run(engine, 6_000, Y, tilt=0.5, collect=lambda state: state.params["loc"]).collected[1_000:]
    means = loc.reshape(20, -1).mean(1)
    error = means.std(ddof=1) / np.sqrt(20)
    assert error < 0.05
    assert abs(means.mean() - (Y.mean() - 0.5)) < 5 * error


def test_chains_that_run_away_stop_the_run_and_name_their_site():
    """Unadjusted chains of step 5 on a quartic: catches the trouble being kept in the state in silence."""

    def model(y):
        weight = numpyro.param("weight", 1.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: weight * z**4))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    engine = _engine(negative_phase(model, sampler=UnadjustedLangevin(5.0, 10), num_chains=8), step_size=0.01)
    with pytest.raises(NonFiniteError, match=r"step 1: site 'z': .*The state before is in .state") as error:
        _run(engine, 5, Y)
    assert int(error.value.state.num_steps) == 0
    with pytest.raises(NonFiniteError):  # and is not forgotten by going on
        _run(engine, 5, Y, init_state=error.value.state)
