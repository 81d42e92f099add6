# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Bi-level score matching against the marginal model, enumeration and finite differences, in double precision."""

import itertools
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import Frozen, normal
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    DenoisingScoreMatching,
    ExactScoreMatching,
    GumbelBernoulli,
    Implicit,
    MultiscaleDenoisingScoreMatching,
    NormalizerError,
    PosteriorFisher,
    ScoreMatching,
    SlicedScoreMatching,
    TiltedDistribution,
    Unrolled,
    VaGES,
)

KEY = jax.random.key(5)
NUM_VISIBLE, NUM_HIDDEN, NUM_ROWS = 3, 4, 6


pytestmark = pytest.mark.usefixtures("double_precision")


OBJECTIVES = {
    "SM": ExactScoreMatching(),
    "SSM": SlicedScoreMatching(),
    "DSM": DenoisingScoreMatching(0.3),
    "MDSM": MultiscaleDenoisingScoreMatching(0.2, 0.1, 0.5),
}

# A Gaussian-Bernoulli restricted Boltzmann machine, whose posterior is in the guide's family.


def grbm_params():
    W = numpyro.param("W", lambda key: normal(0, NUM_VISIBLE, NUM_HIDDEN))
    b, c = numpyro.param("b", lambda key: normal(1, NUM_VISIBLE)), numpyro.param("c", lambda key: normal(2, NUM_HIDDEN))
    return W, b, c, numpyro.param("sigma", lambda key: jnp.array([0.8, 1.0, 1.3]), constraint=constraints.positive)


def grbm(v):
    W, b, c, sigma = grbm_params()
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (NUM_HIDDEN,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
        numpyro.factor("coupling", -(((v - b) / sigma) ** 2).sum(-1) / 2 + h @ c + ((v @ W) * h).sum(-1))


def grbm_marginal(v):
    W, b, c, sigma = grbm_params()
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
        numpyro.factor("free_energy", -(((v - b) / sigma) ** 2).sum(-1) / 2 + jax.nn.softplus(c + v @ W).sum(-1))


def grbm_guide(v, temperature=0.1, distribution=GumbelBernoulli):
    """Starts at the posterior: A = W, a = c."""
    A = numpyro.param("A", lambda key: normal(0, NUM_VISIBLE, NUM_HIDDEN))
    a = numpyro.param("a", lambda key: normal(2, NUM_HIDDEN))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", distribution(v @ A + a, temperature).to_event(1))


def exact_grbm_guide(v):
    """Nearly without relaxation."""
    grbm_guide(v, temperature=0.01)


@pytest.fixture(name="v")
def _visible():
    return normal(3, NUM_ROWS, NUM_VISIBLE)


class ExactKL:
    """The Kullback-Leibler divergence of the GRBM's guide from its posterior, without noise."""

    def loss(self, rng_key, params, model, guide, v):
        q, p = v @ params["A"] + params["a"], v @ params["W"] + params["c"]
        return (jax.nn.sigmoid(q) * (q - p) - jax.nn.softplus(q) + jax.nn.softplus(p)).sum()


STEP = optax.sgd(1.0)  # so that a step is the gradient
EXACT_KL = ExactKL()


@cache  # an engine compiles its own steps: equal ones are the same
def engine_of(objective=OBJECTIVES["DSM"], guide=grbm_guide, guide_optim=STEP, lower_loss=EXACT_KL, **settings):
    settings = {"num_inner_steps": 0, "hypergradient": Unrolled(0), **settings}
    return BiSM(grbm, guide, STEP, guide_optim, Frozen(objective), lower_loss, **settings)


@cache
def marginal_of(objective):
    return ScoreMatching(grbm_marginal, STEP, Frozen(objective))


def gradient_by(engine, v, state=None, rng_key=KEY):
    """The hypergradient in unconstrained parameters."""
    state = engine.init(rng_key, v) if state is None else state
    new, _ = engine.update(state, v)
    return jax.tree.map(jnp.subtract, getattr(state, "theta", state[1]), getattr(new, "theta", new[1]))


def marginal_gradient(objective, v):
    return gradient_by(marginal_of(objective), v)


def assert_close(found, wanted, rtol):
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol * float(jnp.abs(value).max()), err_msg=name)


IMPLICIT = Implicit("hessian", damping=0.0, num_cg_steps=60, tol=1e-14, num_draws=1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_at_the_posterior_is_that_of_the_marginal(name, v):
    """To 1e-12, for every draw of h. Catches a score that follows the draw, and a missing -log q."""
    engine, marginal = engine_of(OBJECTIVES[name]), marginal_of(OBJECTIVES[name])
    value = marginal.evaluate(marginal.init(KEY, v), v)
    np.testing.assert_allclose(engine.evaluate(engine.init(KEY, v), v), value, rtol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_implicit_gradient_at_the_posterior_is_that_of_the_marginal(name, v):
    """To the solver's tolerance. Catches a wrong sign or transpose in the implicit term."""
    found = gradient_by(engine_of(OBJECTIVES[name], hypergradient=IMPLICIT), v)
    assert_close(found, marginal_gradient(OBJECTIVES[name], v), 1e-9)


def test_direct_gradient_misses_the_posteriors_covariance(v):
    """z^T Cov(d f/dv, d f/dtheta), by enumeration (note 1.6); the hidden biases get nothing at all."""
    engine = engine_of(guide=exact_grbm_guide)
    state = engine.init(KEY, v)
    draws = jax.vmap(lambda key: gradient_by(engine, v, state._replace(rng_key=key)))(jax.random.split(KEY, 4000))
    assert jnp.all(draws["c"] == 0)
    exact = marginal_gradient(OBJECTIVES["DSM"], v)
    missing = covariance_term(state.params, v)
    for name in ("W", "b", "c", "sigma"):
        found, error = exact[name] - draws[name].mean(0), draws[name].std(0, ddof=1) / np.sqrt(4000)
        assert (jnp.abs(found - missing[name]) < 5 * error + 2e-4).all(), name  # 2e-4: what is left of the relaxation
    assert all(jnp.abs(missing[name]).max() > 0.05 for name in ("W", "c"))
    assert all(jnp.abs(missing[name]).max() < 1e-12 for name in ("b", "sigma"))


def covariance_term(params, v):
    objective = OBJECTIVES["DSM"]
    noised = objective.perturb(KEY, v)
    states = jnp.asarray(list(itertools.product([0.0, 1.0], repeat=NUM_HIDDEN)))

    def f(free, x, h):
        W, b, c, sigma = free["W"], free["b"], free["c"], jnp.exp(free["sigma"])
        return -(((x - b) / sigma) ** 2).sum() / 2 + h @ c + x @ W @ h

    free = {**{name: params[name] for name in ("W", "b", "c")}, "sigma": jnp.log(params["sigma"])}

    def of_row(x, target):
        p = jax.nn.softmax(jax.vmap(lambda h: f(free, x, h))(states))
        of_v = jax.vmap(lambda h: jax.grad(f, 1)(free, x, h))(states)
        score = p @ of_v
        weight = p * ((of_v - score) @ (score - target))
        return jax.tree.map(lambda g: jnp.tensordot(weight, g, 1), jax.vmap(lambda h: jax.grad(f)(free, x, h))(states))

    rows = jax.vmap(of_row)(noised, -(noised - v) / objective.sigma**2)
    return jax.tree.map(lambda g: g.mean(0), rows)


@pytest.mark.parametrize(("lower_loss", "checkpoint"), [(Trace_ELBO(), False), (Trace_ELBO(), True), (PosteriorFisher(), False)])
def test_unrolled_gradient_is_that_of_the_whole_map(lower_loss, checkpoint, v):
    """Central differences of theta -> J(theta, phi_N(theta)) along a random direction, through Adam and its state.

    Catches a state of the optimizer, a draw of h or a log q that is held fixed in the unrolled steps.
    """
    adam = optax.adam(0.05, b2=0.95, eps_root=1e-24)
    engine = engine_of(guide_optim=adam, lower_loss=lower_loss, hypergradient=Unrolled(3, checkpoint))
    warm = engine_of(guide_optim=adam, lower_loss=lower_loss, num_inner_steps=2)
    off = normal(0, NUM_VISIBLE, NUM_HIDDEN) + 0.2 * normal(7, NUM_VISIBLE, NUM_HIDDEN)  # no posterior
    start = warm.init(KEY, v, init_params={"A": off})
    state = warm.update(start, v)[0]._replace(theta=start.theta)  # a state of Adam that has seen gradients
    flat, unravel = ravel_pytree(state.theta)
    direction = normal(11, len(flat))

    def value(t):
        return float(engine.update(state._replace(theta=unravel(flat + t * direction)), v)[1])

    t = 1e-6
    slope = ravel_pytree(gradient_by(engine, v, state))[0] @ direction
    np.testing.assert_allclose((value(t) - value(-t)) / (2 * t), slope, rtol=1e-8)


def test_unrolled_bias_shrinks_as_gradient_descent_does_and_not_with_inner_steps(v):
    """At phi* what is missing after N steps is (I - alpha H)^N times what is missing at N = 0, for every K (note 1.6)."""
    alpha = 0.5
    exact = ravel_pytree(marginal_gradient(OBJECTIVES["DSM"], v))[0]

    def missing(num_unrolled, num_inner_steps=0):
        unrolled = Unrolled(num_unrolled)
        engine = engine_of(guide_optim=optax.sgd(alpha), hypergradient=unrolled, num_inner_steps=num_inner_steps)
        return exact - ravel_pytree(gradient_by(engine, v))[0]

    state = engine_of().init(KEY, v)
    flat, unravel = ravel_pytree(state.phi)
    noised = OBJECTIVES["DSM"].perturb(KEY, v)
    hessian = jax.hessian(lambda phi: EXACT_KL.loss(KEY, {**state.theta, **unravel(phi)}, None, None, noised) / NUM_ROWS)(flat)
    at = np.r_[: NUM_VISIBLE * NUM_HIDDEN, NUM_VISIBLE * (NUM_HIDDEN + 1) : NUM_VISIBLE * (NUM_HIDDEN + 1) + NUM_HIDDEN]  # W and c
    contraction = jnp.eye(len(flat)) - alpha * hessian
    none = missing(0)
    for num_steps in (1, 50):
        wanted = jnp.linalg.matrix_power(contraction, num_steps) @ none[at]
        np.testing.assert_allclose(missing(num_steps)[at], wanted, rtol=1e-7, atol=1e-12)
    five = missing(5)
    np.testing.assert_allclose(missing(5, num_inner_steps=100), five, rtol=1e-7, atol=1e-12)
    assert jnp.linalg.norm(five) > 0.1 * jnp.linalg.norm(none)


@pytest.mark.parametrize("objective", [OBJECTIVES["DSM"], MultiscaleDenoisingScoreMatching(0.3, 0.3, 0.3)])
def test_fishers_information_is_the_curvature_where_the_guide_is_the_posterior(objective):
    """The mean over 12 keys, each with 500 draws for 60 rows. Without the implicit term c has no gradient.

    One part in a hundred is allowed for the inverse of a mean of draws. Catches weights that do not arrive, and half a Fisher.
    """
    v = normal(3, 60, NUM_VISIBLE)
    implicit = Implicit("fisher", damping=0.0, num_cg_steps=60, tol=1e-5, num_draws=500)
    engine = engine_of(objective, guide=exact_grbm_guide, lower_loss=WeightedKL(objective), hypergradient=implicit)
    state = engine.init(KEY, v)
    draws = jax.vmap(lambda key: gradient_by(engine, v, state._replace(rng_key=key)))(jax.random.split(KEY, 12))
    for name, exact in marginal_gradient(objective, v).items():
        error, size = draws[name].std(0, ddof=1) / np.sqrt(12), jnp.abs(exact).max()
        assert (error < 0.01 * size).all()
        assert (jnp.abs(draws[name].mean(0) - exact) < 5 * error + 0.01 * size).all(), name


@pytest.mark.parametrize(
    ("lower_loss", "curvature"), [(Trace_ELBO(), "fisher"), (PosteriorFisher(), "hessian")], ids=["ELBO", "PosteriorFisher"]
)
def test_curvature_of_bits_is_chosen_by_the_lower_loss(lower_loss, curvature, v):
    # Catches a Hessian of relaxed bits where the information is known, and an information that is not the curvature.
    chosen, given = (engine_of(lower_loss=lower_loss, hypergradient=Implicit(name)) for name in ("auto", curvature))
    assert_close(gradient_by(chosen, v), gradient_by(given, v), 1e-12)


class WeightedKL(ExactKL):
    """The divergence at the rows of an objective, each with its weight."""

    def __init__(self, objective):
        self.objective = objective

    def loss(self, rng_key, params, model, guide, v):
        return self.objective.weight(len(v))[0] * super().loss(rng_key, params, model, guide, v)  # alike for all rows here


# A linear model with a continuous latent: v = h + noise, h ~ N(loc, 1), exact posterior slope 1/2.


def linear(v):
    loc = numpyro.param("loc", 0.5)
    spread = numpyro.param("spread", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(loc, 1))
        numpyro.sample("v", dist.Normal(h, spread), obs=v)


def linear_guide(v):
    slope, shift = numpyro.param("slope", 0.0), numpyro.param("shift", 0.0)
    width = numpyro.param("width", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(slope * v + shift, width))


def linear_marginal(v):
    loc = numpyro.param("loc", 0.5)
    spread = numpyro.param("spread", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", dist.Normal(loc, jnp.sqrt(1 + spread**2)), obs=v)


def test_implicit_gradient_with_a_trained_guide_is_exact_within_its_noise():
    """The guide is trained at fixed theta by the Fisher divergence, whose noise vanishes at the posterior.

    The gradient is then exact for every draw; by the ELBO, whose noise does not vanish, in the mean. Catches a lower level at
    other data than the upper's.
    """
    v = normal(4, 40) + 1
    objective = Frozen(OBJECTIVES["DSM"])
    exact = gradient_by(ScoreMatching(linear_marginal, STEP, objective), v)
    decay = optax.adam(optax.cosine_decay_schedule(0.05, 3000))
    trainer = BiSM(linear, linear_guide, optax.set_to_zero(), decay, objective, PosteriorFisher(), 1, hypergradient=Unrolled(0))
    state = trainer.run(KEY, 3000, v, progress_bar=False).state
    assert_close(state.params, {"slope": 0.5, "shift": 0.25, "width": np.sqrt(0.5)}, 1e-6)
    settings = {"num_inner_steps": 0, "hypergradient": Implicit(damping=0.0, tol=1e-12, num_cg_steps=20)}
    fisher, elbo = (BiSM(linear, linear_guide, STEP, STEP, objective, by, **settings) for by in (PosteriorFisher(), Trace_ELBO()))
    start = elbo.init(KEY, v)._replace(phi=state.phi)
    assert_close(gradient_by(fisher, v, start), exact, 1e-6)
    settings["hypergradient"] = replace(settings["hypergradient"], curvature="hessian")  # what "auto" is for normal latents
    hessian = BiSM(linear, linear_guide, STEP, STEP, objective, Trace_ELBO(), **settings)
    assert_close(gradient_by(hessian, v, start), gradient_by(elbo, v, start), 1e-12)
    draws = jax.vmap(lambda key: gradient_by(elbo, v, start._replace(rng_key=key)))(jax.random.split(KEY, 200))
    for name in ("loc", "spread"):
        error = draws[name].std(ddof=1) / np.sqrt(200)
        assert error < 2e-2 * abs(exact[name])  # without the implicit term loc would have no gradient at all
        assert abs(draws[name].mean() - exact[name]) < 5 * error + 1e-12, name


def test_one_step_is_the_maths_by_hand():
    """The whole step, K = 2 and N = 2, with the engine's own keys. Catches rows, noise or moments that are mixed up."""
    v, sigma = normal(4, 5) + 1, 0.3
    adam = optax.adam(0.1, eps_root=1e-20)
    engine = BiSM(linear, linear_guide, STEP, adam, DenoisingScoreMatching(sigma), num_inner_steps=2, hypergradient=Unrolled(2))
    state = engine.init(KEY, v)

    def log_p(theta, v, h):
        s = jnp.exp(theta["spread"])
        return jax.scipy.stats.norm.logpdf(h, theta["loc"], 1) + jax.scipy.stats.norm.logpdf(v, h, s)

    def log_q(phi, v, h):
        return jax.scipy.stats.norm.logpdf(h, phi["slope"] * v + phi["shift"], jnp.exp(phi["width"]))

    def draw(phi, v, key):
        with numpyro.handlers.seed(rng_seed=key):
            noise = jax.random.normal(numpyro.prng_key(), v.shape)
        return phi["slope"] * v + phi["shift"] + jnp.exp(phi["width"]) * noise

    def lower_keys(key):
        noise_key, draw_key = jax.random.split(key)
        return noise_key, jax.random.split(draw_key)[1]  # NumPyro's ELBO gives the second half to the guide

    def lower(theta, phi, key):
        noise_key, draw_key = lower_keys(key)
        x = v + sigma * jax.random.normal(noise_key, v.shape)
        h = draw(phi, x, draw_key)
        return (log_q(phi, x, h) - log_p(theta, x, h)).mean()

    def steps(theta, phi, optim_state, keys):
        for key in keys:
            updates, optim_state = adam.update(jax.grad(lower, 1)(theta, phi, key), optim_state)
            phi = optax.apply_updates(phi, updates)
        return phi, optim_state

    def upper(theta, phi, key):
        noise_key, _, draw_key = jax.random.split(key, 3)
        x = v + sigma * jax.random.normal(noise_key, v.shape)
        h = draw(phi, x, draw_key)
        score = jax.grad(lambda x: (log_p(theta, x, h) - log_q(phi, x, h)).sum())(x)
        return ((score + (x - v) / sigma**2) ** 2).mean() / 2

    theta = state.theta
    _, _, inner_key, upper_key = jax.random.split(state.rng_key, 4)
    phi, optim_state = steps(theta, state.phi, adam.init(state.phi), jax.random.split(inner_key, 2))
    lower_key, upper_key = jax.random.split(upper_key)
    keys = jax.random.split(lower_key, 2)
    value, gradient = jax.value_and_grad(lambda theta: upper(theta, steps(theta, phi, optim_state, keys)[0], upper_key))(theta)
    new, loss = engine.update(state, v)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    assert_close(new.phi, phi, 1e-12)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), new.guide_optim_state, optim_state)
    assert_close(new.theta, jax.tree.map(jnp.subtract, theta, gradient), 1e-12)


@pytest.mark.parametrize("lower_loss", [Trace_ELBO(), PosteriorFisher()])
def test_lower_level_of_a_noise_level_is_divided_by_it(lower_loss):
    """Where all levels are sigma = 2, a step of the guide is half that of one level. Catches weights that do not arrive."""
    v = normal(4, 10)
    levels = (DenoisingScoreMatching(2.0), MultiscaleDenoisingScoreMatching(2.0, 2.0, 2.0))
    steps = []
    for objective in levels:
        engine = BiSM(linear, linear_guide, STEP, STEP, objective, lower_loss, 1, hypergradient=Unrolled(0))
        state = engine.init(KEY, v)
        steps.append(jax.tree.map(jnp.subtract, engine.update(state, v)[0].phi, state.phi))
    assert_close(jax.tree.map(lambda x: 2 * x, steps[1]), steps[0], 1e-12)


def test_autoguide_learns_where_the_data_are_one_batch():
    v = normal(4, 30) + 2
    optims = optax.adam(0.02), optax.adam(0.02)
    engine = BiSM(linear, AutoNormal(linear), *optims, ExactScoreMatching(), hypergradient=Unrolled(1))
    result = engine.run(KEY, 5, v, progress_bar=False)
    assert jnp.isfinite(result.losses).all()
    assert result.params["h_auto_loc"].shape == (30,)
    assert jnp.abs(result.params["h_auto_loc"] - engine.init(KEY, v).params["h_auto_loc"]).min() > 0.01


def test_discrete_latents_are_learned_without_unrolling_by_a_graph_elbo(v):
    """Hard draws have no gradient: the guide's comes from TraceGraph_ELBO, and is not zero."""

    def model(v):
        W, b, c, sigma = grbm_params()
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Bernoulli(logits=c).to_event(1))
            numpyro.sample("v", dist.Normal(b + h @ W.T, sigma).to_event(1), obs=v)

    def guide(v):
        grbm_guide(v, distribution=lambda logits, temperature: dist.Bernoulli(logits=logits))

    objective = DenoisingScoreMatching(0.3)
    engine = BiSM(model, guide, STEP, optax.sgd(0.01), objective, TraceGraph_ELBO(), hypergradient=Unrolled(0))
    state = engine.init(KEY, v)
    new, loss = engine.update(state, v)
    assert jnp.isfinite(loss)
    assert jnp.abs(new.phi["A"] - state.phi["A"]).max() > 1e-4


@pytest.mark.parametrize("lower_loss", [Trace_ELBO(), PosteriorFisher()])
def test_relaxed_bits_keep_their_density_at_a_bernoulli_site(lower_loss, v):
    """A prior of bits gives a relaxed one h c - softplus(c). Catches validation, which gives it -inf and loses its gradient."""

    def as_prior(v):
        W, b, c, sigma = grbm_params()
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Bernoulli(logits=c).to_event(1))
            v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
            numpyro.factor("coupling", -(((v - b) / sigma) ** 2).sum(-1) / 2 + ((v @ W) * h).sum(-1))

    steps = []
    for model in (grbm, as_prior):
        engine = BiSM(model, grbm_guide, STEP, STEP, Frozen(OBJECTIVES["DSM"]), lower_loss, 1, hypergradient=Unrolled(1))
        steps.append(engine.update(engine.init(KEY, v), v)[0])
    assert_close(steps[1].phi, steps[0].phi, 1e-10)
    assert_close(steps[1].theta, steps[0].theta, 1e-10)


# What is refused.


def guide_without_h(v):
    numpyro.param("slope", 0.0)


def guide_of_more(v):
    linear_guide(v)
    with numpyro.plate("data", len(v)):
        numpyro.sample("g", dist.Normal(0, 1))


def guide_of_wrong_shape(v):
    slope = numpyro.param("slope", 0.0)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(slope * v[:, None], jnp.ones(2)).to_event(1))


def guide_that_shares(v):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(loc, 1))


def guide_of_mixtures(v):
    """Which part a sample of a mixture is from has no gradient."""
    shift = numpyro.param("shift", jnp.zeros(2))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(shift, 1)))


def guide_without_params(v):
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(0, 1))


@pytest.mark.parametrize("outer", [False, True])
def test_every_lower_loss_takes_the_same_plate_for_the_rows(outer):
    """An inner plate of as many latents, or an outer one that has nothing to do with the visible, under any lower loss.

    Catches engine and lower loss that find the rows each in its own way: one learns what the other refuses.
    """

    def model(v):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(v), dim=-1 if outer else -2):
            with numpyro.plate("units", 3 if outer else len(v), dim=-2 if outer else -1):
                h = numpyro.sample("h", dist.Normal(0, 1))
            numpyro.sample("v", dist.Normal(loc + h.sum(-2 if outer else -1).reshape(v.shape), 1), obs=v)

    def guide(v):
        shift = numpyro.param("shift", 0.0)
        with (
            numpyro.plate("data", len(v), dim=-1 if outer else -2),
            numpyro.plate("units", 3 if outer else len(v), dim=-2 if outer else -1),
        ):
            numpyro.sample("h", dist.Normal(shift, 1))

    v = normal(4, 10) if outer else normal(4, 10)[:, None]
    for lower_loss in (Trace_ELBO(), PosteriorFisher()):
        engine = BiSM(model, guide, STEP, STEP, ExactScoreMatching(), lower_loss)
        assert jnp.isfinite(engine.update(engine.init(KEY, v), v)[1])


REFUSED_GUIDES = {
    "missing": (guide_without_h, "site 'h': the model samples it and the guide, which samples .*, does not"),
    "more": (guide_of_more, r"site 'g': the guide samples it and the model, which samples \['h'\], does not"),
    "shape": (guide_of_wrong_shape, r"site 'h': the guide gives shape \(10, 2\), the model needs \(10,\)"),
    "shared": (guide_that_shares, r"the model and the guide share \['loc'\]"),
    "not reparametrized": (
        guide_of_mixtures,
        "site 'h': the guide draws it from MixtureSameFamily, which is not reparametrized.*GumbelBernoulli",
    ),
    "no params": (guide_without_params, "the guide has no param site"),
}


@pytest.mark.parametrize("name", REFUSED_GUIDES)
def test_guide_that_is_none_of_the_models_is_refused(name):
    guide, message = REFUSED_GUIDES[name]
    with pytest.raises(ValueError, match=message):
        BiSM(linear, guide, STEP, STEP, ExactScoreMatching()).init(KEY, normal(4, 10))


def test_not_reparametrized_guide_is_refused_without_unrolling_too():
    """Catches the gradient of a plain ELBO, which is silently wrong for hard draws."""
    with pytest.raises(ValueError, match=r"or hypergradient=Unrolled\(0\) with lower_loss=TraceGraph_ELBO"):
        BiSM(linear, guide_of_mixtures, STEP, STEP, ExactScoreMatching(), hypergradient=Unrolled(0)).init(KEY, normal(4, 10))


def test_model_without_latents_is_sent_to_score_matching():
    with pytest.raises(ValueError, match=r"no latent site: learn it by ScoreMatching"):
        BiSM(linear_marginal, guide_without_h, STEP, STEP, ExactScoreMatching()).init(KEY, normal(4, 10))


def test_normalizer_that_depends_on_a_latent_is_refused():
    def model(v):
        tilt = numpyro.param("tilt", 1.0)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1))
            energy = TiltedDistribution(dist.Normal(0, 1), lambda h, x: tilt * h * x, params=h, batch_shape=(len(v),))
            numpyro.sample("v", energy, obs=v)

    with pytest.raises(NormalizerError, match="site 'v': its unknown normalizer depends on latent site 'h'"):
        BiSM(model, linear_guide, STEP, STEP, ExactScoreMatching()).init(KEY, normal(4, 10))


def test_fishers_information_is_refused_for_another_divergence():
    with pytest.raises(ValueError, match="curvature='fisher' is that of a Kullback-Leibler divergence"):
        BiSM(linear, linear_guide, STEP, STEP, ExactScoreMatching(), PosteriorFisher(), hypergradient=Implicit("fisher"))


@pytest.mark.parametrize("engine", [BiSM, VaGES])
def test_a_param_of_the_guide_with_the_name_of_a_factor_is_refused(engine):
    # Catches NumPyro's word for it, that shapes of model and guide disagree.
    def model(v):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(loc, 1))
            numpyro.sample("v", dist.Normal(h, 1), obs=v)
            numpyro.factor("slope", -(h**2) / 2)

    def guide(v):
        slope = numpyro.param("slope", 0.5)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(slope * v, 0.7))

    with pytest.raises(ValueError, match="param site 'slope' of the guide has the name of a sample site of the model"):
        engine(model, guide, STEP, STEP, DenoisingScoreMatching(0.3)).init(KEY, jnp.zeros(8))
