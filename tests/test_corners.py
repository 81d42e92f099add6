# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Exact checks where two features meet: plates and scales, nested handlers, batches from outside, keys."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import normal
from jax.extend.random import define_prng_impl
from numpyro.distributions import constraints
from numpyro.handlers import condition, reparam, scale, scope, seed, substitute
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from numpyro.infer.util import log_density

from numpyro_ebm import (
    MALA,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ExactScoreMatching,
    Implicit,
    NormalizerError,
    ParticleMMLE,
    ScoreMatching,
    TiltedDistribution,
    find_map,
    negative_phase,
    sample_posterior,
    standard_errors,
)

KEY = jax.random.key(3)
STILL = MALA(num_steps=0)  # chains that stay where init_chains puts them


def gradient_of(model, params, *args, latents=None):
    """The gradient of a model's log density in its params, at latents."""

    def log_joint(params):
        return log_density(seed(model, KEY), args, {}, {**params, **(latents or {})})[0]

    return jax.grad(log_joint)(params)


# Plates and scales.


def test_weights_of_rows_are_counts_of_them_in_draws_modes_and_standard_errors():
    # scale(w) around a row stands for w rows with one latent: N((loc + y) / 2, 1 / (2 w)), information w / 2
    y, w = jnp.array([0.0, 2.0, 5.0]), jnp.array([0.5, 2.0, 7.0])

    def model(y):
        loc = numpyro.param("loc", 1.0)
        with numpyro.plate("data", 3), scale(scale=w):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    params = {"loc": 1.0}
    draws = sample_posterior(KEY, model, params, y, num_samples=500, num_chains=16, thinning=2)
    z = (draws["x"] - (1 + y) / 2) * jnp.sqrt(2 * w)
    np.testing.assert_allclose(z.mean((0, 1)), 0, atol=0.1)
    np.testing.assert_allclose(z.var((0, 1)), 1, atol=0.1)
    np.testing.assert_allclose(find_map(KEY, model, params, y).latents["x"], (1 + y) / 2, atol=1e-3)
    with pytest.warns(UserWarning, match="param 'loc': .* move it by 6.8 "):  # (39 / 9.5 - 1) / sqrt(2 / 9.5)
        found = standard_errors(model, params, draws, y)
    assert abs(found.standard_errors["loc"] - (2 / w.sum()) ** 0.5) < 6 * found.monte_carlo_errors["loc"]


def test_particles_of_a_plate_at_a_dim_of_its_own_keep_their_rows():
    # dims -1 and -3 of three, events of 2, subsampled: catches rows gathered along another axis. No parameter moves.
    y, h = normal(0, 4, 1, 3, 2), 0.15

    def model(y):
        loc = numpyro.param("loc", 0.0)
        rows, columns = numpyro.plate("rows", 4, subsample_size=2, dim=-3), numpyro.plate("columns", 3, dim=-1)
        with rows, columns:
            batch = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", dist.Normal(loc, 1).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=batch)

    engine = ParticleMMLE(model, optax.sgd(0.0), num_particles=1000, step_size=h)
    state = engine.run(KEY, 60, y, progress_bar=False).state
    x = engine.get_particles(state, y)["x"]
    assert x.shape == (1000, 4, 1, 3, 2)
    variance = 1 / (5 * (1 - 5 * h / 2))  # of unadjusted Langevin at curvature 1 + 1 / .25
    np.testing.assert_allclose(x.mean(0), 0.8 * y, atol=5 * (variance / 1000) ** 0.5)
    np.testing.assert_allclose(x.var(0) / variance, 1, atol=5 * (2 / 1000) ** 0.5)


def test_a_stack_of_energies_in_an_inner_plate_is_scaled_by_the_outer_one():
    # two energies, one for each column; 2 of 6 rows, a mask and a scale of .5: d/dt = .5 * 6/2 * (-E'(rows) + rows * E'(chains))
    x = normal(1, 6, 2)
    chains = jnp.array([[1.0, 2.0], [0.0, 4.0], [2.0, 0.0]])
    rows, mask = jnp.array([4, 1]), jnp.array([[True, False], [True, True]])

    def model(x):
        t = numpyro.param("t", jnp.ones(2))
        fn = EnergyDistribution(lambda t, x: t * x**2 / 2, params=t, batch_shape=(2,), initial=dist.Normal(0, 1))
        with numpyro.plate("rows", 6, subsample_size=2, dim=-2), numpyro.plate("columns", 2), scale(scale=0.5):
            batch = numpyro.subsample(x, event_dim=0)
            with numpyro.handlers.mask(mask=mask):
                numpyro.sample("x", fn, obs=batch)

    phase = negative_phase(substitute(model, data={"rows": rows}), num_chains=3, sampler=STILL, init_chains={"x": chains})
    found = gradient_of(phase, {"t": jnp.array([1.0, 2.0])}, x)["t"]
    exact = 0.5 * 3 * (mask * ((chains**2).mean(0) - x[rows] ** 2) / 2).sum(0)
    np.testing.assert_allclose(found, exact, rtol=1e-5)


# Deterministic and nested handlers.


def test_a_normalizer_behind_a_deterministic_site_of_the_visible_is_refused():
    # the derivative of log Z in v would be missing from the score, and the site cuts what NumPyro knows of v
    def model(v):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(0, t), obs=v)
            squares = numpyro.deterministic("squares", 1 + v**2)
            fn = EnergyDistribution(lambda s, w: s * w**2, params=squares, batch_shape=v.shape, initial=dist.Normal(0, 1))
            numpyro.sample("w", fn, obs=jnp.ones(len(v)))

    for wrapped in (model, scope(model, prefix="m"), condition(model, data={"w": jnp.zeros(5)})):
        with pytest.raises(NormalizerError, match=r"site '(m/)?w': its unknown normalizer depends on the first argument"):
            ScoreMatching(wrapped, optax.sgd(0.1), ExactScoreMatching()).init(KEY, normal(2, 5))


@pytest.mark.parametrize("how", [LocScaleReparam(0), LocScaleReparam(0.5), TransformReparam()])
def test_standard_errors_do_not_depend_on_how_latents_are_written(how):
    # the observed information of loc and log scale is that of N(loc, scale^2 + 1), whatever the complete data are
    y = 1 + 2 * normal(3, 12)

    def model(y):
        loc, sd = numpyro.param("loc", 1.0), numpyro.param("sd", 1.5, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            fn = dist.Normal(loc, sd)
            if isinstance(how, TransformReparam):
                fn = dist.TransformedDistribution(dist.Normal(0, 1), dist.transforms.AffineTransform(loc, sd))
            x = numpyro.sample("x", fn)
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    def log_likelihood(theta):
        return dist.Normal(theta[0], jnp.sqrt(jnp.exp(2 * theta[1]) + 1)).log_prob(y).sum()

    params, other = {"loc": 1.0, "sd": 1.5}, reparam(model, config={"x": how})
    draws = sample_posterior(KEY, other, params, y, num_samples=400, num_chains=16)
    with pytest.warns(UserWarning, match="param 'sd': .* move it by 3.1 "):
        found = standard_errors(other, params, draws, y)
    exact = -jax.hessian(log_likelihood)(jnp.array([1.0, jnp.log(1.5)]))
    np.testing.assert_allclose(found.information, exact, atol=0.05 * np.abs(exact).max())


def test_scopes_on_both_sides_of_the_phase_and_a_condition_between_change_nothing():
    # chains are named inside the handler by what it sees; d/dt = -E'(y) n + n E'(chains), and the state has the outer name
    y, chains = normal(4, 4), jnp.array([0.5, -1.0, 2.0])

    def model(y=None):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("data", 4):
            numpyro.deterministic("twice", 2 * t)
            numpyro.sample("y", EnergyDistribution(lambda y: t * y**4, initial=dist.Normal(0, 1)), obs=y)

    inner = scope(condition(scope(model, prefix="a"), data={"a/y": y}), prefix="b", hide_types=["param"])
    phase = negative_phase(inner, num_chains=3, sampler=STILL, init_chains={"b/a/y": chains})
    outer = scope(condition(phase, data={}), prefix="c", hide_types=["param"])
    exact = -(y**4).sum() + 4 * (chains**4).mean()
    np.testing.assert_allclose(gradient_of(outer, {"a/t": jnp.array(1.0)})["a/t"], exact, rtol=1e-5)
    with numpyro.handlers.trace() as sites:
        seed(outer, KEY)()
    assert {"c/b/a/y/chains", "c/b/a/y/log_normalizer"} <= sites.keys()


# Batches from outside.


def of_rows(batch, rows, num_data):
    """A model as a data loader calls it: with its rows, and which they are."""
    loc = numpyro.param("loc", 0.5)
    with substitute(data={"data": rows}):
        data = numpyro.plate("data", num_data, subsample_size=len(rows))
    with data:
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=batch)


def test_a_batch_from_outside_moves_its_particles_and_stands_for_all_rows():
    # d loss / d loc = -(N / B) sum over the batch of the mean of x - loc; the other rows rest
    engine = ParticleMMLE(of_rows, optax.sgd(0.1), num_particles=3, step_size=0.1)
    y, rows = normal(5, 6), jnp.array([5, 2])
    state = engine.init(KEY, y, jnp.arange(6), 6)
    new, _ = engine.update(state, y[rows], rows, 6)
    x, moved = state.particles["x"], new.particles["x"]
    np.testing.assert_allclose(new.params["loc"], 0.5 + 0.1 * 3 * (x[:, rows] - 0.5).mean(0).sum(), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(moved != x).all(0), np.isin(np.arange(6), rows))
    one, _ = engine.update(new, y[:1], jnp.array([0]), 6)  # and a last batch may be smaller
    np.testing.assert_array_equal(np.asarray(one.particles["x"] != moved).any(0), np.arange(6) == 0)


def test_rows_given_and_rows_drawn_give_a_score_engine_the_same_step():
    # 2 of 6 rows: the loss is their mean, whether the plate draws them from all or they are all that is given
    def model(v):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", 6, subsample_size=2):
            batch = numpyro.subsample(v, event_dim=0)
            numpyro.sample("v", EnergyDistribution(lambda v: precision * v**2 / 2), obs=batch)

    v = normal(6, 6)
    engine = ScoreMatching(model, optax.sgd(0.5), ExactScoreMatching())
    given = engine.update(engine.init(KEY, v[3:5]), v[3:5])[0].params["precision"]
    np.testing.assert_allclose(given, 1 - 0.5 * ((v[3:5] ** 2).mean() - 1), rtol=1e-5)  # of p^2 v^2 / 2 - p
    drawn = engine.update(engine.init(KEY, v), v)[0].params["precision"]
    steps = [1 - 0.5 * ((v[i] ** 2 + v[j] ** 2) / 2 - 1) for i in range(6) for j in range(i)]
    assert np.min(np.abs(np.asarray(steps) - drawn)) < 1e-5


def test_one_energy_keeps_its_chains_from_batch_to_batch_of_any_size():
    # the chains belong to the energy and not to rows: d/dt = N / B (-E'(batch) + B E'(chains)) for B = 3 and for B = 1
    def model(batch, rows):
        t = numpyro.param("t", 1.0)
        with substitute(data={"data": rows}):
            data = numpyro.plate("data", 6, subsample_size=len(rows))
        with data:
            numpyro.sample("y", EnergyDistribution(lambda y: t * y**2, initial=dist.Normal(0, 1)), obs=batch)

    y, chains = normal(7, 6), jnp.array([1.0, 3.0])
    phase = negative_phase(model, num_chains=2, sampler=STILL, init_chains={"y": chains})
    svi = SVI(phase, lambda batch, rows: None, optax.sgd(0.1), Trace_ELBO())
    state, t = svi.init(KEY, y[:3], jnp.arange(3)), 1.0
    for rows in (jnp.array([0, 4, 2]), jnp.array([5])):
        state, _ = svi.update(state, y[rows], rows)
        t += 0.1 * 6 / len(rows) * (-(y[rows] ** 2).sum() + len(rows) * (chains**2).mean())
        np.testing.assert_allclose(svi.get_params(state)["t"], t, rtol=1e-4)
        np.testing.assert_array_equal(state.mutable_state["y/chains"]["x"], chains)


# Keys.

USES = defaultdict(set)  # by key: what it was split into, and what was drawn with it


def _note(key, *use):
    jax.debug.callback(lambda key: USES[tuple(np.ravel(key).tolist())].add(use), key)
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def _bits(key, bit_width, shape):
    return jax.random.bits(_note(key, "bits", bit_width, *shape), shape, f"uint{bit_width}")


WATCHED = define_prng_impl(
    key_shape=(2,),
    seed=lambda number: jax.random.key_data(jax.random.key(number, impl="threefry2x32")),
    split=lambda key, shape: jax.random.key_data(jax.random.split(_note(key, "split", *shape), shape)),
    random_bits=_bits,
    fold_in=lambda key, data: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), data)),
    name="watched",
    tag="watched",
)


def _dropout(shape):
    return jax.random.bernoulli(numpyro.prng_key(), 0.5, shape)


def joint(v):
    loc = numpyro.param("loc", 0.1)
    with numpyro.plate("data", len(v), subsample_size=4):
        batch = numpyro.subsample(v, event_dim=0)
        h = numpyro.sample("h", TiltedDistribution(dist.Normal(0, 1), lambda h: -loc * h))
        numpyro.sample("v", dist.Normal(loc * _dropout(batch.shape) + h, 1), obs=batch)


def guide(v):
    slope = numpyro.param("slope", 0.1)
    with numpyro.plate("data", len(v), subsample_size=4):
        batch = numpyro.subsample(v, event_dim=0)
        numpyro.sample("h", dist.Normal(slope * batch * _dropout(batch.shape), 1))


PHASE = negative_phase(joint, num_chains=3, sampler=MALA(num_steps=1))
ENGINES = {
    "ebipla": lambda: ParticleMMLE.ebipla(joint, num_particles=2, step_size=0.1, num_chains=3, num_prior_steps=2, num_moves=2),
    "BiSM, fisher": lambda: BiSM(
        *(joint, guide, optax.sgd(0.1), optax.sgd(0.1), DenoisingScoreMatching(0.3)),
        num_inner_steps=1,
        hypergradient=Implicit(curvature="fisher", num_draws=2),
    ),
    "SVI": lambda: SVI(PHASE, guide, optax.sgd(0.1), Trace_ELBO()),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_key_is_split_or_drawn_from_in_one_way(name):
    """A key that is split into two and into three, or split and drawn from, gives two purposes the same numbers."""
    engine, v = ENGINES[name](), normal(8, 6)
    key = jax.random.key(0, impl=WATCHED)
    jax.effects_barrier()
    USES.clear()
    if name == "ebipla":  # what the others run to begin with they only look at
        jax.block_until_ready(engine.init(key, v).params)
    state = engine.init(key, v)
    jax.effects_barrier()
    if name != "ebipla":
        USES.clear()
    jax.block_until_ready(jax.jit(engine.update)(state, v)[1])
    jax.effects_barrier()
    assert len(USES) > 20
    assert [uses for uses in USES.values() if len(uses) > 1] == []


def test_sites_rows_and_particles_have_noise_of_their_own():
    # two latents of one shape under a flat density: after a step of h they are noise of variance 2h, and nothing of it repeats
    def model(v):
        scale_of = numpyro.param("scale", 1e6)
        with numpyro.plate("data", 40):
            a, b = numpyro.sample("a", dist.Normal(0, scale_of)), numpyro.sample("b", dist.Normal(0, scale_of))
            numpyro.sample("v", dist.Normal(a + b, 1e6), obs=v)

    engine = ParticleMMLE(model, optax.sgd(0.0), num_particles=50, step_size=0.5)
    state = engine.init(KEY, jnp.zeros(40))
    state = state._replace(particles=jax.tree.map(jnp.zeros_like, state.particles))
    steps = [state := engine.update(state, jnp.zeros(40))[0] for _ in range(2)]
    first, second = (jax.tree.map(np.asarray, step.particles) for step in steps)
    noise = np.stack([first["a"], first["b"], second["a"] - first["a"], second["b"] - first["b"]]).reshape(4, -1)
    assert len(np.unique(noise)) > 0.999 * noise.size
    np.testing.assert_allclose(np.cov(noise), np.eye(4), atol=6 / 2000**0.5)


def test_positive_and_negative_phase_have_the_same_dropout():
    # chains that stand at the data cancel them exactly, if the energy that both meet has one mask
    v, wide = normal(9, 3, 8), dist.Normal(jnp.zeros(8), 1).to_event(1)

    def model(v):
        t = numpyro.param("t", 1.0)
        fn = EnergyDistribution(lambda keep, v: t * (keep * v**2).sum(), (8,), params=_dropout((8,)), initial=wide)
        with numpyro.plate("data", 3):
            numpyro.sample("v", fn, obs=v)

    phase = negative_phase(model, num_chains=3, sampler=STILL, init_chains={"v": v})
    np.testing.assert_allclose(gradient_of(phase, {"t": jnp.array(1.0)}, v)["t"], 0, atol=1e-4)
    assert abs(gradient_of(negative_phase(model, num_chains=3, sampler=STILL), {"t": jnp.array(1.0)}, v)["t"]) > 0.1


def test_chains_do_not_take_the_dropout_of_an_engine_away():
    # the engine runs the model with and without chains: those of the first site had the key of the mask of the second
    def model(v):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("data", 6):
            numpyro.sample("a", EnergyDistribution(lambda a: a**2, initial=dist.Normal(0, 1)))
            numpyro.sample("c", dist.Normal(0, 1), obs=v)
        keep = _dropout((6, 8))
        with numpyro.plate("data", 6):
            fn = EnergyDistribution(
                lambda keep, b: t * (keep * b**2).sum(),
                (8,),
                params=keep,
                batch_shape=(6,),
                initial=dist.Normal(jnp.zeros(8), 1).to_event(1),
            )
            numpyro.sample("b", fn)

    b = normal(10, 1, 6, 8)
    phase = negative_phase(model, num_chains=1, sampler={"b": STILL}, init_chains={"b": b})
    engine = ParticleMMLE(phase, optax.sgd(0.1), num_particles=1, step_size=0.1)
    state = engine.init(KEY, jnp.zeros(6))
    state = state._replace(particles={**state.particles, "b": b})
    np.testing.assert_allclose(engine.update(state, jnp.zeros(6))[0].params["t"], 1, atol=1e-5)
