# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Bi-level doubly variational learning against closed forms of linear Gaussians, in double precision.

Where every mean over rows is that of a quadratic function of independent normal variables, the two-point Gauss-Hermite rule is
exact: its nodes are -1 and 1, of equal weight. So eight rows that hold all signs of three variables, put in the place of the
draws, make each term of the engine its expectation.
"""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.stats.norm import logpdf
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO

from numpyro_ebm import MALA, BiDVL, EnergyDistribution
from numpyro_ebm.infer import Difference, Hinge, LowerLevel, Softplus
from numpyro_ebm.infer.bidvl import _Levels, energy_weights, upper_keys
from numpyro_ebm.infer.bidvl_settings import LATENT_TERMS
from numpyro_ebm.program.batch import Batch
from numpyro_ebm.samplers import Sampler

KEY = jax.random.key(11)
STEP = optax.sgd(1.0)  # so that a step is the gradient
OF_LATENT, OF_VISIBLE, OF_ENCODER = np.array(list(itertools.product([-1.0, 1.0], repeat=3))).T
DATA = 1.4 + 1.5 * OF_LATENT  # of mean 1.4 and standard deviation 1.5, apart from the encoder's noise


pytestmark = pytest.mark.usefixtures("double_precision")


class AtNodes(dist.Normal):
    """A normal distribution that gives the nodes of a quadrature for draws."""

    def __init__(self, loc, scale, nodes):
        super().__init__(loc, scale)
        self.nodes = nodes

    def sample(self, key, sample_shape=()):
        return self.loc + self.scale * self.nodes


def at_random(loc, scale, nodes):
    return dist.Normal(loc, scale)


# The linear Gaussian: an energy N(loc, spread), a generator h ~ N(0, 1), v ~ N(gain h + mean, noise), an encoder N(slope v +
# shift, width).


def positive(name, start):
    return numpyro.param(name, start, constraint=constraints.positive)


def energy(v):
    loc, spread = numpyro.param("loc", 0.3), positive("spread", 2.0)
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", EnergyDistribution(lambda v: ((v - loc) / spread) ** 2 / 2), obs=v)


def no_energy(v):
    loc = numpyro.param("loc", 0.3)
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", EnergyDistribution(lambda v: 0.0 * (v - loc) ** 2), obs=v)


def autoencoder(distribution):
    def generator(v):
        gain, mean, noise = numpyro.param("gain", 0.8), numpyro.param("mean", 0.5), positive("noise", 0.9)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", distribution(jnp.zeros(len(v)), 1.0, OF_LATENT))
            numpyro.sample("v", distribution(gain * h + mean, noise, OF_VISIBLE), obs=v)

    def encoder(v):
        slope, shift, width = numpyro.param("slope", 0.2), numpyro.param("shift", -0.3), positive("width", 0.7)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", distribution(slope * v + shift, width, OF_ENCODER))

    return encoder, generator


def engine_of(distribution=AtNodes, marginal=energy, optims=(STEP, STEP, STEP), **settings):
    return BiDVL(marginal, *autoencoder(distribution), *optims, **settings)


def start(engine, v=DATA, **init_params):
    v = jnp.asarray(v)
    state = engine.init(KEY, v, init_params={name: jnp.asarray(value) for name, value in init_params.items()})
    return state, _Levels(engine, state, Batch((v,)), {})


def blocks(state):
    return state.theta, state.phi, state.omega


def energy_by_hand(theta, mean, variance):
    return ((mean - theta["loc"]) ** 2 + variance) / (2 * jnp.exp(2 * theta["spread"]))


def generated_moments(omega):
    return omega["mean"], omega["gain"] ** 2 + jnp.exp(2 * omega["noise"])


def latent_by_hand(phi, omega, latent):
    """E[(h - slope v - shift)^2], and what the latent term makes of it."""
    a, b, s = omega["gain"], omega["mean"], jnp.exp(omega["noise"])
    m, c, w = phi["slope"], phi["shift"], jnp.exp(phi["width"])
    square = (1 - m * a) ** 2 + (m * s) ** 2 + (m * b + c) ** 2
    exact = -jnp.log(2 * jnp.pi) / 2 - 1 - jnp.log(s) + jnp.log(w) + square / (2 * w**2)
    return {"exact": exact, "offset": square, "complete": square + w**2}[latent]


def prior_divergence(phi, mean, variance):
    m, c, w = phi["slope"], phi["shift"], jnp.exp(phi["width"])
    return (w**2 + (m * mean + c) ** 2 + m**2 * variance - 1) / 2 - jnp.log(w)


def vae_by_hand(phi, omega, mean=1.4, variance=2.25):
    a, b, s = omega["gain"], omega["mean"], jnp.exp(omega["noise"])
    m, c, w = phi["slope"], phi["shift"], jnp.exp(phi["width"])
    square = ((1 - a * m) * mean - b - a * c) ** 2 + (1 - a * m) ** 2 * variance + (a * w) ** 2
    return square / (2 * s**2) + jnp.log(2 * jnp.pi * s**2) / 2 + prior_divergence(phi, mean, variance)


def upper_by_hand(theta, omega):
    return energy_by_hand(theta, 1.4, 2.25) - energy_by_hand(theta, *generated_moments(omega))


def lower_by_hand(theta, phi, omega, latent="exact", latent_weight=1.0, vae_weight=1.0):
    rest = latent_weight * latent_by_hand(phi, omega, latent) + vae_weight * vae_by_hand(phi, omega)
    return energy_by_hand(theta, *generated_moments(omega)) + rest


def value_of(function):
    """The value of a function of the levels, without the mutable sites."""
    return lambda *args: function(*args)[0]


def assert_close(found, wanted, rtol=1e-12, atol=1e-13):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), found, wanted)


def is_zero(tree):
    return all((np.asarray(x) == 0).all() for x in jax.tree.leaves(tree))


def no_part_is_zero(tree):
    return all((np.abs(x) > 1e-3).all() for x in jax.tree.leaves(tree))


# The levels.


def test_compact_symmetric_divergence_is_that_of_the_gaussians():
    """Catches a missing or doubled term of R: a = .7, s^2 = .5, t^2 = 1.4, m = .4, q^2 = .6 give .2839981.

    There h ~ N(0, 1) and v|h ~ N(a h, s^2); v ~ N(0, t^2) and h|v ~ N(m v, q^2): the sum of both divergences, not its half.
    """
    a, s2, t2, m, q2 = 0.7, 0.5, 1.4, 0.4, 0.6
    generated = np.array([[1, a], [a, a**2 + s2]])
    learned = np.array([[m**2 * t2 + q2, m * t2], [m * t2, t2]])
    closed = np.trace(np.linalg.solve(learned, generated) + np.linalg.solve(generated, learned)) / 2 - 2
    np.testing.assert_allclose(closed, 0.2839981, atol=5e-8)
    at = {"loc": 0.0, "spread": t2**0.5, "gain": a, "mean": 0.0, "noise": s2**0.5, "slope": m, "shift": 0.0, "width": q2**0.5}
    for elbo in (TraceMeanField_ELBO(), Trace_ELBO()):
        engine = engine_of(lower=LowerLevel(elbo=elbo))
        state, levels = start(engine, t2**0.5 * OF_LATENT, **at)
        lower, _ = levels.lower(*blocks(state), {}, KEY)
        np.testing.assert_allclose(lower - engine.energies(state, levels.v).mean(), closed, rtol=1e-12)


@pytest.mark.parametrize("latent", LATENT_TERMS)
def test_lower_level_and_its_gradient_are_the_closed_form(latent):
    """Value and every block. Catches a wrong weight of a term, and a visible or latent held fixed where it must not be."""
    state, levels = start(engine_of(lower=LowerLevel(latent, 0.3, 1.7)))
    found, gradient = jax.jit(jax.value_and_grad(value_of(levels.lower), (0, 1, 2)))(*blocks(state), {}, KEY)
    closed, exact = jax.value_and_grad(lower_by_hand, (0, 1, 2))(*blocks(state), latent, 0.3, 1.7)
    if latent == "offset":  # the encoder learns nothing from the latent term
        exact = (exact[0], jax.tree.map(lambda x: 1.7 * x, jax.grad(vae_by_hand)(state.phi, state.omega)), exact[2])
    np.testing.assert_allclose(found, closed, rtol=1e-12)
    assert_close(gradient, exact)


@pytest.mark.parametrize("form", LATENT_TERMS)
def test_gradient_of_the_latent_term_flows_where_its_form_says(form):
    """Catches a stop_gradient on what the encoder makes of the visible: the generator must feel it through mu(v)."""
    state, levels = start(engine_of(lower=LowerLevel(form)))

    def latent(phi, omega):
        return levels.latent_term(phi, levels.generate(omega, KEY, {}), {}, KEY)[0]

    of_phi, of_omega = jax.grad(latent, (0, 1))(state.phi, state.omega)
    exact_phi, exact_omega = jax.grad(latent_by_hand, (0, 1))(state.phi, state.omega, form)
    assert_close(of_omega, exact_omega)
    assert no_part_is_zero(of_omega)
    if form == "offset":
        assert is_zero(of_phi)
    else:
        assert_close(of_phi, exact_phi)
        assert no_part_is_zero(of_phi)


@pytest.mark.parametrize("form", [Difference, Softplus, Hinge])
def test_upper_level_is_the_energy_of_data_less_that_of_generated(form):
    """Its gradient is E_data grad E - E_gen grad E, each row by its weight, in theta alone. Catches a wrong sign."""
    state, levels = start(engine_of(upper=form()))
    gradient = jax.jit(jax.grad(value_of(levels.upper), (0, 1, 2)))(*blocks(state), {}, upper_keys(KEY))

    def of_rows(v):
        loc, spread = state.theta["loc"], jnp.exp(state.theta["spread"])
        return (v - loc) ** 2 / (2 * spread**2), {"loc": -(v - loc) / spread**2, "spread": -(((v - loc) / spread) ** 2)}

    (of_data, grad_data), (of_generated, grad_generated) = of_rows(DATA), of_rows(0.8 * OF_LATENT + 0.5 + 0.9 * OF_VISIBLE)
    low, high = tuple(map(jax.nn.sigmoid, (of_data, of_generated))) if form is Softplus else (1.0, 1.0)
    high = high * (of_generated < 1) if form is Hinge else high
    wanted = {name: (low * grad_data[name]).mean() - (high * grad_generated[name]).mean() for name in grad_data}
    assert_close(gradient[0], wanted)
    assert no_part_is_zero(gradient[0])
    assert is_zero(gradient[1:])


@pytest.mark.parametrize("form", [Difference, Softplus, Hinge])
def test_upper_level_has_no_gradient_where_the_generator_gives_the_data(form):
    """On the same rows; for the hinge where all its corners are further away."""
    v = 0.4 + 0.3 * OF_LATENT + 0.2 * OF_VISIBLE
    state, levels = start(engine_of(upper=form()), v, mean=0.4, gain=0.3, noise=0.2)
    gradient = jax.grad(value_of(levels.upper))(*blocks(state), {}, upper_keys(KEY))
    assert_close(gradient, jax.tree.map(jnp.zeros_like, gradient), atol=1e-15)


def test_hinge_is_the_difference_and_two_within_its_corners():
    """Exactly; beyond them it is less, since rows of energy below -1 or above 1 are left alone."""
    of_data, of_generated = jnp.array([-0.75, 3.0, 0.5]), jnp.array([-7.0, 0.5, 0.75])
    assert Hinge().contrast(of_data, of_generated) == Difference().contrast(of_data, of_generated) + 2
    grads = jax.grad(Hinge().contrast, (0, 1))(jnp.array([-1.5, -0.5]), jnp.array([1.5, 0.5]))
    assert_close(grads, (jnp.array([0.0, 0.5]), jnp.array([0.0, -0.5])))
    softplus = Softplus().contrast(of_data, of_generated)
    np.testing.assert_allclose(softplus, np.log1p(np.exp(of_data)).mean() - np.log1p(np.exp(of_generated)).mean(), rtol=1e-12)


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO(), Trace_ELBO()])
def test_lower_level_without_energy_is_numpyros_elbo(elbo):
    """Value and gradient, by the same key; of a generator with variance 1/2 it is |v - v_rec|^2 and the divergence."""
    half = jnp.sqrt(0.5)
    state, levels = start(engine_of(at_random, no_energy, lower=LowerLevel(elbo=elbo, latent_weight=0.0)), noise=half)
    vae_key = jax.random.split(jax.random.split(KEY)[1])[1]
    encoder, generator = autoencoder(at_random)

    def by_numpyro(phi, omega):
        params = {**phi, **omega, "noise": jnp.exp(omega["noise"]), "width": jnp.exp(phi["width"])}
        return elbo.loss(vae_key, params, generator, encoder, levels.v) / 8

    found = jax.value_and_grad(value_of(levels.lower), (1, 2))(*blocks(state), {}, KEY)
    assert_close(found, jax.value_and_grad(by_numpyro, (0, 1))(state.phi, state.omega))
    state, levels = start(engine_of(AtNodes, no_energy, lower=LowerLevel(elbo=elbo, latent_weight=0.0)), noise=half)
    recovered = 0.8 * (0.2 * DATA - 0.3 + 0.7 * OF_ENCODER) + 0.5
    wanted = ((DATA - recovered) ** 2).mean() + prior_divergence(state.phi, 1.4, 2.25) + np.log(np.pi) / 2
    np.testing.assert_allclose(levels.lower(*blocks(state), {}, KEY)[0], wanted, rtol=1e-12)


@pytest.mark.parametrize("latent", LATENT_TERMS)
def test_draws_of_the_lower_level_have_its_mean(latent):
    """400,000 rows within 5 standard errors. Catches one key for two draws, which 'complete' would take for agreement."""
    v = jnp.asarray(np.random.default_rng(0).normal(1.4, 1.5, 4_000))
    engine = engine_of(at_random, lower=LowerLevel(latent))
    state, levels = start(engine, v)
    one = jax.jit(lambda key: levels.lower(*blocks(state), {}, key)[0])
    values = jax.lax.map(one, jax.random.split(KEY, 100))
    vae = vae_by_hand(state.phi, state.omega, v.mean(), v.var())
    closed = lower_by_hand(*blocks(state), latent, vae_weight=0.0) + vae
    assert abs(values.mean() - closed) < 5 * values.std(ddof=1) / 10
    assert values.std(ddof=1) < 0.1


def test_without_noise_visibles_are_means():
    """For the energy of generated visibles in both levels, and the latent term."""
    state, levels = start(engine_of(noise=False))
    quiet = {**state.omega, "noise": -jnp.inf}
    closed = upper_by_hand(state.theta, quiet)
    np.testing.assert_allclose(levels.upper(*blocks(state), {}, upper_keys(KEY))[0], closed, rtol=1e-12)
    state, levels = start(engine_of(lower=LowerLevel("complete", vae_weight=0.0), noise=False))
    closed = energy_by_hand(state.theta, *generated_moments(quiet)) + latent_by_hand(state.phi, quiet, "complete")
    np.testing.assert_allclose(levels.lower(*blocks(state), {}, KEY)[0], closed, rtol=1e-12)


class Descent(Sampler):
    """A sampler of a user's own, without noise: a step of .8 down the energy."""

    def run(self, rng_key, target, state):
        return state._replace(position=state.position + 0.8 * jax.grad(lambda v: target(v).sum())(state.position))


def test_sampler_moves_generated_visibles_for_the_upper_level_alone():
    """Down the energy, and held fixed there. Catches a sampler on -E, one in the lower level, and a gradient through its steps."""
    state, levels = start(engine_of(sampler=Descent()))
    kept = 1 - 0.8 / 2.0**2
    mean, variance = generated_moments(state.omega)
    moved = kept * mean + (1 - kept) * 0.3, kept**2 * variance

    def by_hand(theta):
        return energy_by_hand(theta, 1.4, 2.25) - energy_by_hand(theta, *moved)

    assert_close(levels.upper(*blocks(state), {}, upper_keys(KEY))[0], by_hand(state.theta))
    gradient = jax.grad(value_of(levels.upper), (0, 1, 2))(*blocks(state), {}, upper_keys(KEY))
    assert_close(gradient[0], jax.grad(by_hand)(state.theta))
    assert is_zero(gradient[1:])
    assert_close(levels.lower(*blocks(state), {}, KEY)[0], lower_by_hand(*blocks(state)))


# Importance weights.


def test_weights_are_larger_where_the_energy_is_less_and_have_mean_one():
    energies = jnp.array([0.0, 0.1, 0.2, 0.5, 3.0])
    by_hand = np.clip(np.exp(float(energies.mean()) - np.asarray(energies)), 0.5, 1.9)
    weights = energy_weights(energies, (0.5, 1.9))
    assert_close(weights, by_hand / by_hand.mean())
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-15)
    np.testing.assert_allclose(weights.max() / weights.min(), 1.9 / 0.5)
    assert is_zero(jax.grad(lambda e: energy_weights(e, (0.5, 1.9)) @ jnp.arange(5.0))(energies))


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO(), Trace_ELBO()])
def test_each_row_of_data_counts_by_its_weight(elbo):
    """Reconstruction and divergence, without a gradient in theta. Catches weights on one part only, or of other rows."""
    bounds = (0.5, 1.5)
    state, levels = start(engine_of(lower=LowerLevel(weight_bounds=bounds, elbo=elbo)))
    weights = np.clip(np.exp((((DATA - 0.3) / 2) ** 2 / 2).mean() - ((DATA - 0.3) / 2) ** 2 / 2), *bounds)
    assert np.ptp(weights) > 0.3

    def by_hand(phi, omega):
        m, c, w = phi["slope"], phi["shift"], jnp.exp(phi["width"])
        h = m * DATA + c + w * OF_ENCODER
        divergence = logpdf(h, m * DATA + c, w) - logpdf(h)
        if isinstance(elbo, TraceMeanField_ELBO):
            divergence = (w**2 + (m * DATA + c) ** 2 - 1) / 2 - jnp.log(w)
        rows = divergence - logpdf(DATA, omega["gain"] * h + omega["mean"], jnp.exp(omega["noise"]))
        return (weights / weights.mean() * rows).mean()

    found, gradient = jax.value_and_grad(value_of(levels.vae_loss), (0, 1, 2))(*blocks(state), {}, KEY)
    np.testing.assert_allclose(found, by_hand(state.phi, state.omega), rtol=1e-12)
    assert is_zero(gradient[0])
    assert_close(gradient[1:], jax.grad(by_hand, (0, 1))(state.phi, state.omega))


def test_weights_go_to_rows_under_two_plates():
    """Three pixels for four rows. Catches weights along the last dimension, where they would not even fit."""

    def plates(v):
        return numpyro.plate("rows", len(v), dim=-2), numpyro.plate("pixels", 3, dim=-1)

    def energy(v):
        loc, (rows, pixels) = numpyro.param("loc", 0.0), plates(v)
        with rows, pixels:
            numpyro.sample("v", dist.Normal(loc, 1.0), obs=v)

    def generator(v):
        mean, (rows, pixels) = numpyro.param("mean", 0.1), plates(v)
        with rows, pixels:
            h = numpyro.sample("h", dist.Normal(0.0, 1.0))
            numpyro.sample("v", dist.Normal(mean + h, 1.0), obs=v)

    def encoder(v):
        slope, (rows, pixels) = numpyro.param("slope", 0.5), plates(v)
        with rows, pixels:
            numpyro.sample("h", dist.Normal(slope * v, 1.0))

    v = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    state, levels = start(BiDVL(energy, encoder, generator, STEP, STEP, STEP, lower=LowerLevel(weight_bounds=(0.8, 1.2))), v)
    found, _ = levels.vae_loss(*blocks(state), {}, KEY)
    with numpyro.handlers.seed(rng_seed=jax.random.split(KEY)[1]):
        h = 0.5 * v + jax.random.normal(numpyro.prng_key(), v.shape)
    rows = (-logpdf(v, 0.1 + h, 1.0) + (0.5 * v) ** 2 / 2).sum(1)
    weights = energy_weights(-logpdf(v).sum(1), (0.8, 1.2))
    np.testing.assert_allclose(found, (weights * rows).mean(), rtol=1e-12)


# Steps.


@pytest.mark.parametrize("latent", LATENT_TERMS)
def test_one_step_is_that_of_the_closed_form(latent):
    """theta by the upper level; then phi and omega by the lower, at the new theta. Catches optimizers or an order exchanged."""
    rates = (0.3, 0.2, 0.1)
    engine = engine_of(lower=LowerLevel(latent, 0.3, 1.7), optims=tuple(map(optax.sgd, rates)))
    state, levels = start(engine)
    theta, phi, omega = blocks(state)
    new, loss = engine.update(state, levels.v)
    np.testing.assert_allclose(loss, upper_by_hand(theta, omega), rtol=1e-12)

    def moved(values, rate, gradient):
        return jax.tree.map(lambda x, g: x - rate * g, values, gradient)

    theta = moved(theta, rates[0], jax.grad(upper_by_hand)(theta, omega))
    if latent == "complete":
        divergence = jax.grad(lambda phi: 0.3 * prior_divergence(phi, *generated_moments(omega)))(phi)
        assert no_part_is_zero(divergence)
        phi = moved(phi, rates[1], divergence)
    lower, gradient = jax.value_and_grad(lower_by_hand, (1, 2))(theta, phi, omega, latent, 0.3, 1.7)
    if latent == "offset":
        gradient = (jax.tree.map(lambda x: 1.7 * x, jax.grad(vae_by_hand)(phi, omega)), gradient[1])
    np.testing.assert_allclose(new.lower_loss, lower, rtol=1e-12)
    assert_close(blocks(new), (theta, moved(phi, rates[1], gradient[0]), moved(omega, rates[2], gradient[1])))
    np.testing.assert_allclose(new.params["spread"], jnp.exp(theta["spread"]), rtol=1e-12)


@pytest.mark.parametrize(("latent", "of_encoder"), [("exact", 2), ("complete", 5)])
def test_optimizers_make_as_many_steps_as_told(latent, of_encoder):
    """Three of the energy and two of encoder and generator; in 'complete' the encoder makes one in every upper step too.

    The loss is the upper level before the first of them.
    """
    adam = optax.adam(1e-2)
    engine = engine_of(optims=(adam, adam, adam), upper=Difference(3), lower=LowerLevel(latent, num_steps=2))
    state, levels = start(engine)
    for _ in range(2):
        before = upper_by_hand(state.theta, state.omega)
        state, loss = engine.update(state, levels.v)
        np.testing.assert_allclose(loss, before, rtol=1e-12)
    counts = [int(each[0].count) for each in (state.optim_state, state.encoder_optim_state, state.generator_optim_state)]
    assert counts == [6, 2 * of_encoder, 4]
    assert int(state.num_steps) == 2


def test_upper_level_and_encoder_see_the_same_visibles(monkeypatch):
    """Generated once in the upper level and once in the lower. Catches visibles drawn again for the encoder's own step.

    Drawn again, they are others as soon as a mutable site or a key has moved in between.
    """
    keys, generate = [], _Levels.generate

    def counted(self, omega, rng_key, mutable, **settings):
        keys.append(rng_key)
        return generate(self, omega, rng_key, mutable, **settings)

    monkeypatch.setattr(_Levels, "generate", counted)
    engine = engine_of(lower=LowerLevel(latent="complete"))
    state = engine.init(KEY, jnp.asarray(DATA))
    keys.clear()
    jax.eval_shape(lambda state: engine._step(state, (jnp.asarray(DATA),), {}), state)
    assert len(keys) == 2


def test_unrolled_gradient_is_that_of_finite_differences():
    """Of E(data) less what two steps of Adam on the lower level reach. Catches a wrong sign of the rest, and a theta held fixed."""
    adam = optax.adam(0.1, eps_root=1e-12)
    engine = engine_of(optims=(STEP, adam, adam), upper=Difference(num_unroll_steps=2), lower=LowerLevel(latent_weight=0.3))
    state, levels = start(engine)

    @jax.jit
    def reached(theta):
        phi, omega, of_phi, of_omega = state.phi, state.omega, state.encoder_optim_state, state.generator_optim_state
        for _ in range(2):
            by_phi, by_omega = jax.grad(lower_by_hand, (1, 2))(theta, phi, omega, "exact", 0.3)
            update, of_phi = adam.update(by_phi, of_phi)
            phi = optax.apply_updates(phi, update)
            update, of_omega = adam.update(by_omega, of_omega)
            omega = optax.apply_updates(omega, update)
        return energy_by_hand(theta, 1.4, 2.25) - lower_by_hand(theta, phi, omega, "exact", 0.3)

    new, loss = engine.update(state, levels.v)
    np.testing.assert_allclose(loss, reached(state.theta), rtol=1e-12)
    for name in state.theta:
        up, down = ({**state.theta, name: state.theta[name] + step} for step in (1e-5, -1e-5))
        by_differences = (reached(up) - reached(down)) / 2e-5
        np.testing.assert_allclose(state.theta[name] - new.theta[name], by_differences, rtol=1e-7)


OPTIMUM = {"loc": 1.4, "spread": 1.5, "gain": 1.2, "mean": 1.4, "noise": 0.9, "slope": 1.2 / 2.25, "shift": -1.4 * 1.2 / 2.25}
OPTIMUM["width"] = 0.9 / 1.5


def test_exact_lower_level_is_stationary_at_the_optimum_and_only_there():
    """Where energy, generator and data have one distribution, and the encoder is the generator's posterior."""
    engine = engine_of()
    gradient = jax.jit(jax.grad(value_of(start(engine)[1].lower), (1, 2)))
    at_optimum = gradient(*blocks(start(engine, **OPTIMUM)[0]), {}, KEY)
    assert_close(at_optimum, jax.tree.map(jnp.zeros_like, at_optimum), atol=1e-14)
    for name, value in OPTIMUM.items():
        leaves = jax.tree.leaves(gradient(*blocks(start(engine, **{**OPTIMUM, name: value + 0.1})[0]), {}, KEY))
        assert max(map(abs, leaves)) > 0.02, name


@pytest.mark.parametrize("num_unroll_steps", [0, 3])
def test_exact_lower_level_reaches_the_likelihood(num_unroll_steps):
    """To rounding, without noise. Catches a lower level or an unrolled one with another fixed point.

    The gain is not identified: all generators of the right variance, with their posterior, are one optimum.
    """
    engine = engine_of(optims=(optax.sgd(0.05),) * 3, upper=Difference(num_unroll_steps=num_unroll_steps))
    result = engine.run(KEY, 6_000, jnp.asarray(DATA), progress_bar=False)
    p = {name: float(value) for name, value in result.params.items()}
    assert_close((p["loc"], p["spread"], p["mean"]), (1.4, 1.5, 1.4), rtol=1e-6)
    np.testing.assert_allclose(p["gain"] ** 2 + p["noise"] ** 2, 2.25, rtol=1e-6)
    posterior = (p["gain"] / 2.25, -1.4 * p["gain"] / 2.25, p["noise"] / 1.5)
    assert_close((p["slope"], p["shift"], p["width"]), posterior, rtol=1e-6)
    assert p["gain"] > 0.3


@pytest.mark.parametrize("latent", ["offset", "complete"])
def test_other_latent_terms_have_another_optimum(latent):
    """As they are documented: they lack what makes the level a divergence."""
    state, levels = start(engine_of(lower=LowerLevel(latent)), **OPTIMUM)
    gradient = jax.grad(value_of(levels.lower), (1, 2))(*blocks(state), {}, KEY)
    assert max(map(abs, jax.tree.leaves(gradient))) > 0.1


def test_every_step_of_either_level_draws_its_own_rows():
    """Energy theta v, visible without noise, batches of one row: each step adds its row, which powers of 2 tell apart."""

    def energy(v):
        theta = numpyro.param("theta", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", EnergyDistribution(lambda v: theta * v), obs=v)

    def generator(v):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(0.0, 1.0))
            numpyro.sample("v", dist.Normal(jnp.full(len(v), mean), 1.0), obs=v)

    def encoder(v):
        shift = numpyro.param("shift", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(jnp.full(len(v), shift), 1.0))

    levels = {"upper": Difference(num_steps=2), "lower": LowerLevel("offset", latent_weight=0.0, num_steps=2)}
    rows, rate = jnp.asarray(2.0 ** np.arange(10)), 2.0**-30
    optims = (optax.sgd(rate), optax.set_to_zero(), optax.sgd(0.5))
    engine = BiDVL(energy, encoder, generator, *optims, **levels, noise=False, batch_size=1)
    run = engine.run(KEY, 200, rows, progress_bar=False, collect=lambda state: (state.theta["theta"], state.omega["mean"]))
    theta, mean = run.collected
    of_upper = 2 * mean[:-1] - np.diff(theta) / rate  # the sum of two rows
    of_lower = mean[1:] - mean[:-1] / 4 + 0.75 * theta[1:]  # a fourth of one and half of the next
    seen = []
    for found, parts in ((of_upper, (1, 1)), (of_lower, (0.25, 0.5))):
        pairs = np.add.outer(parts[0] * rows, parts[1] * rows)
        at = np.abs(found[:, None, None] - pairs).reshape(len(found), -1)
        assert at.min(1).max() < 1e-3
        first, second = np.unravel_index(at.argmin(1), pairs.shape)
        assert 0.01 < np.mean(first == second) < 0.25  # .1
        assert set(first) | set(second) == set(range(10))
        seen.append(np.sort([first, second], axis=0))
    assert np.mean((seen[0] == seen[1]).all(0)) < 0.1  # .02: neither do the levels share their rows


def test_noise_of_steps_and_levels_is_independent():
    """Recovered from two steps each of theta and of the mean. Catches a key used for two steps or both levels."""

    def energy(v):
        theta = numpyro.param("theta", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", EnergyDistribution(lambda v: theta * v + v**2 / 2), obs=v)

    def generator(v):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(0.0, 1.0))
            numpyro.sample("v", dist.Normal(jnp.full(len(v), mean), 1.0), obs=v)

    rate, num = 0.1, 4_000
    sgd = optax.sgd(rate)
    levels = {"upper": Difference(num_steps=2), "lower": LowerLevel(latent_weight=0.0, vae_weight=0.0, num_steps=2)}
    engine = BiDVL(energy, autoencoder(at_random)[0], generator, sgd, sgd, sgd, **levels)
    run = engine.run(KEY, num, jnp.zeros(1), progress_bar=False, collect=lambda state: (state.theta["theta"], state.omega["mean"]))
    theta, mean = run.collected
    of_upper = np.diff(theta) / rate - 2 * mean[:-1]  # the sum of two normal draws
    kept = 1 - rate
    of_lower = (kept**2 * mean[:-1] - (1 + kept) * rate * theta[1:] - mean[1:]) / rate  # first draw times kept, and second
    error = np.sqrt(2 / num)  # of a variance of 1
    assert abs(of_upper.var() / 2 - 1) < 5 * error
    assert abs(of_lower.var() / (1 + kept**2) - 1) < 5 * error
    pairs = [(of_upper, of_lower), (of_upper[1:], of_lower[:-1]), (of_upper[1:], of_upper[:-1]), (of_lower[1:], of_lower[:-1])]
    for x, y in pairs:
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(num)


# After the fit.

AT = {"loc": 0.3, "spread": 0.7, "gain": 0.8, "mean": 0.5, "noise": 0.9, "slope": 0.2, "shift": -0.3, "width": 0.7}


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True):
        engine = engine_of(at_random)
        return engine, start(engine, **AT)[0]


def assert_mean(draws, exact):
    """Of independent rows, within 5 standard errors."""
    draws = np.asarray(draws)
    assert abs(draws.mean() - exact) < 5 * draws.std(ddof=1) / np.sqrt(len(draws))


def test_draws_have_the_distribution_of_the_generator(fitted):
    engine, state = fitted
    drawn = engine.sample(KEY, state, 20_000, jnp.asarray(DATA))
    assert drawn["h"].shape == drawn["v"].shape == (20_000,)
    h, v = drawn["h"], drawn["v"]
    for draws, exact in ((h, 0), (h**2, 1), (v - 0.5, 0), ((v - 0.5) ** 2, 0.64 + 0.81), (h * (v - 0.5), 0.8)):
        assert_mean(draws, exact)
    quiet = engine.sample(KEY, state, 7, jnp.asarray(DATA), noise=False)
    assert_close(quiet["v"], 0.8 * quiet["h"] + 0.5)
    assert quiet["v"].shape == (7,)
    assert len(np.unique(quiet["h"])) == 7


def test_an_engine_without_noise_samples_means(fitted):
    """And draws where it is told to. Catches a setting that the engine does not take over."""
    engine, (_, state) = engine_of(at_random, noise=False), fitted
    quiet = engine.sample(KEY, state, 7, jnp.asarray(DATA))
    assert_close(quiet["v"], 0.8 * quiet["h"] + 0.5)
    loud = engine.sample(KEY, state, 7, jnp.asarray(DATA), noise=True)
    assert np.abs(loud["v"] - 0.8 * loud["h"] - 0.5).min() > 1e-3


def test_reconstruction_and_energies_are_closed_forms(fitted):
    engine, state = fitted
    assert_close(engine.reconstruct(state, jnp.asarray(DATA)), 0.8 * (0.2 * DATA - 0.3) + 0.5)
    assert_close(engine.energies(state, jnp.asarray(DATA)), ((DATA - 0.3) / 0.7) ** 2 / 2)
    three = jnp.asarray(DATA)[:3]
    assert engine.energies(state, three).shape == (3,)


def test_refined_visibles_have_the_distribution_of_the_energy(fitted):
    """They start far from it, at 3. Catches a sampler on the energy with the wrong sign, and chains that do not move."""
    engine, state = fitted
    v = engine.refine(KEY, state, MALA(0.3, num_steps=200), jnp.full(3_000, 3.0))
    assert v.shape == (3_000,)
    assert_mean(v, 0.3)
    assert_mean((v - 0.3) ** 2, 0.49)
    assert (engine.refine(KEY, state, MALA(0.3, num_steps=0), jnp.full(3, 3.0)) == 3.0).all()


def test_refinement_of_whole_numbers_moves_them(fitted):
    """Catches chains that stand still because every move is cut to an integer."""
    engine, state = fitted
    for sampler in (MALA(0.3, num_steps=20), Descent()):
        v = engine.refine(KEY, state, sampler, jnp.arange(3))
        assert jnp.issubdtype(v.dtype, jnp.floating)
        assert (v != jnp.arange(3)).all()


@pytest.mark.parametrize("sampler", [None, MALA, SimpleNamespace(init=len, run=len)])
def test_what_is_no_sampler_is_refused(fitted, sampler):
    """Catches an error about a missing attribute from deep inside the compiled run."""
    engine, state = fitted
    with pytest.raises(TypeError, match=r"sampler must be a sampler such as MALA\(\), got"):
        engine.refine(KEY, state, sampler, jnp.zeros(3))
    if sampler is not None:
        with pytest.raises(TypeError, match=r"sampler must be a sampler such as MALA\(\), got"):
            engine_of(sampler=sampler)


def test_refinement_is_refused_where_it_would_leave_the_support(fitted):
    def bounded(v):
        loc, spread = numpyro.param("loc", 0.3), numpyro.param("spread", 1.0)
        fn = EnergyDistribution(lambda v: (v - loc) ** 2 / spread, support=constraints.interval(-3.0, 5.0))
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", fn, obs=v)

    engine = engine_of(at_random, bounded)
    with pytest.raises(ValueError, match=r"site 'v': its support is .*, which moved visibles would leave"):
        engine.refine(KEY, start(engine)[0], MALA(0.3), jnp.zeros(3))
