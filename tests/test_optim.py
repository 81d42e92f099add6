# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The Langevin dynamics as optax transformations, by themselves: what they add to a position, and with which noise."""

from decimal import Decimal, getcontext
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.linalg import expm

from numpyro_ebm import kinetic_langevin, kinetic_langevin_splitting, langevin
from numpyro_ebm.optim import _integrated_variance, normal_like

KEY = jax.random.key(0)
MAKERS = {
    "langevin": lambda h=0.1: langevin(h),
    "kinetic_langevin": lambda h=0.1: kinetic_langevin(h, 2.0),
    "kinetic_langevin_splitting": lambda h=0.1: kinetic_langevin_splitting(h, 2.0),
}


pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def _feed(noise):
    """Stands in for ``normal_like``: hands out a given vector piece by piece."""
    rest = [jnp.asarray(noise, float)]

    def normal(rng_key, tree):
        flat, unravel = ravel_pytree(tree)
        piece, rest[0] = rest[0][: flat.size], rest[0][flat.size :]
        return unravel(piece)

    return mock.patch("numpyro_ebm.optim.normal_like", normal)


def _step(optim, gradient, state, noise, temperature=1.0):
    """The update and the velocity after it, for given noise."""
    with _feed(noise):
        update, state = optim.update(gradient, state, temperature=temperature, rng_key=KEY)
    return update, state


def _transition(optim, temperature=1.0):
    """Matrix on (velocity, gradient) of a scalar's (update, velocity), and the covariance of their noise."""

    def out(velocity, gradient, noise):
        state = optim.init(jnp.zeros(()))._replace(velocity=jnp.asarray(velocity))
        update, state = _step(optim, jnp.asarray(gradient), state, noise, temperature)
        return np.array([update, state.velocity])

    drift = np.stack([out(1.0, 0.0, [0, 0]), out(0.0, 1.0, [0, 0])], 1)
    by_noise = np.stack([out(0.0, 0.0, [1, 0]), out(0.0, 0.0, [0, 1])], 1)
    return drift, by_noise @ by_noise.T


def _exact_transition(h, gamma, eta):
    """The transition of dx = eta v dt, dv = -gamma eta v dt - g dt + sqrt(2 gamma) dB, by Van Loan's matrix exponentials."""
    drift = np.array([[0, eta, 0], [0, -gamma * eta, -1], [0, 0, 0]])  # of (x, v, g)
    a, q = drift[:2, :2], np.diag([0, 2 * gamma])
    blocks = expm(h * np.block([[-a, q], [np.zeros((2, 2)), a.T]]))
    return expm(h * drift)[:2, 1:], blocks[2:, 2:].T @ blocks[:2, 2:]


# ---- Overdamped -----------------------------------------------------------------------------------------------------------


def test_langevin_moves_by_the_gradient_and_by_noise_of_variance_2ht():
    # guards against: sqrt(2h) T, noise of the gradient's sign or size
    optim = langevin(0.3)
    gradient = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(4.0)}
    update, state = _step(optim, gradient, optim.init(gradient), [1.0, 2.0, -3.0], temperature=0.25)
    sd = np.sqrt(2 * 0.3 * 0.25)
    np.testing.assert_allclose(update["a"], [-0.3 + sd, 0.6 + 2 * sd], rtol=1e-12)
    np.testing.assert_allclose(update["b"], -1.2 - 3 * sd, rtol=1e-12)
    assert state.num_steps == 1


def test_langevin_reads_its_schedule_at_the_number_of_steps_made():
    # guards against: a schedule that starts at 1, stands still, or counts for the drift and not for the noise
    optim = langevin(lambda count: 0.1 / (1 + count))
    state = optim.init(jnp.zeros(()))
    for count in range(3):
        h = 0.1 / (1 + count)
        update, state = _step(optim, jnp.array(5.0), state, [1.0])
        np.testing.assert_allclose(update, -5 * h + np.sqrt(2 * h), rtol=1e-12)


# ---- Kinetic --------------------------------------------------------------------------------------------------------------

SETTINGS = [(0.3, 0.9, 2.0), (0.01, 2.0, 1.0), (1.7, 3.0, 0.5)]


@pytest.mark.parametrize(("h", "gamma", "eta"), SETTINGS)
def test_kinetic_langevin_is_exact_while_the_gradient_is_frozen(h, gamma, eta):
    # guards against: covariances of position and velocity exchanged, a factor or a sign in any of them
    drift, covariance = _transition(kinetic_langevin(h, gamma, inverse_mass=eta))
    exact_drift, exact_covariance = _exact_transition(h, gamma, eta)
    np.testing.assert_allclose(drift, exact_drift, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(covariance, exact_covariance, rtol=1e-7)
    if (h, gamma, eta) == SETTINGS[0]:
        np.testing.assert_allclose(
            [covariance[0, 0], covariance[1, 1], covariance[0, 1]], [0.0440725, 0.3302022, 0.0967217], atol=5e-8
        )


def test_kinetic_langevin_keeps_its_velocity_at_equipartition():
    # Without a gradient Var(v) = T / eta for ever. Guards against: a temperature that does not reach the velocity
    drift, covariance = _transition(kinetic_langevin(0.4, 0.9, inverse_mass=2.0), temperature=0.2)
    np.testing.assert_allclose(drift[1, 0] ** 2 * 0.1 + covariance[1, 1], 0.1, rtol=1e-12)


def test_kinetic_langevin_without_noise_is_its_own_drift():
    drift, covariance = _transition(kinetic_langevin(0.3, 0.9, inverse_mass=2.0, noise=False))
    np.testing.assert_array_equal(covariance, 0)
    np.testing.assert_allclose(drift, _exact_transition(0.3, 0.9, 2.0)[0], rtol=1e-11)


@pytest.mark.parametrize("a", [1e-6, 1e-3, 0.0999, 0.1001, 2.0])
def test_the_variance_of_the_position_does_not_cancel_for_small_steps(a):
    # 2a - 3 + 4 exp(-a) - exp(-2a) is (2/3) a^3 for small a. Guards against: a series cut short, a branch point too low
    getcontext().prec = 60
    exact = 2 * Decimal(a) - 3 + 4 * (-Decimal(a)).exp() - (-2 * Decimal(a)).exp()
    assert _integrated_variance(a) == pytest.approx(float(exact), rel=1e-11)


def test_lookahead_is_nesterovs_momentum():
    # The parameters of the optimizer are the point where the gradient is taken. Guards against: a gradient at x itself
    h, gamma, eta, curvature = 0.2, 0.9, 2.0, 3.0
    optim = kinetic_langevin(h, gamma, inverse_mass=eta, noise=False, lookahead=True)
    e = np.exp(-gamma * eta * h)
    ahead, x, v = jnp.array(1.0), 1.0, 0.0
    state = optim.init(ahead)
    for _ in range(30):
        g = curvature * (x + (1 - e) * v / gamma)
        x, v = x + ((1 - e) * v - (h - (1 - e) / (gamma * eta)) * g) / gamma, e * v - (1 - e) / (gamma * eta) * g
        update, state = optim.update(curvature * ahead, state, temperature=1.0, rng_key=KEY)
        ahead = ahead + update
        np.testing.assert_allclose([ahead, state.velocity], [x + (1 - e) * v / gamma, v], rtol=1e-10, atol=1e-14)


def test_splitting_with_one_gradient_per_step_is_the_two_gradient_formula():
    # guards against: the gradient of the step before used twice or lost, noise before and after exchanged, a factor sqrt(2)
    h, gamma, temperature = 0.3, 1.2, 0.4
    d, sd = np.exp(-gamma * h / 2), np.sqrt((1 - np.exp(-gamma * h)) * temperature)
    noise = np.random.default_rng(0).normal(size=(20, 2))
    optim = kinetic_langevin_splitting(h, gamma)
    ours = jnp.array(0.5)
    state = optim.init(ours)
    x, v = 0.5, -d * h / 2 * np.sin(0.5)  # the state starts at 0 before its last term
    for xi, after in noise:
        new = x + h * (d * v + sd * xi) - h**2 / 2 * np.sin(x)
        v = d**2 * v - d * h / 2 * (np.sin(x) + np.sin(new)) + sd * (d * xi + after)
        update, state = _step(optim, jnp.sin(ours), state, [xi, after], temperature)
        ours, x = ours + update, new
        np.testing.assert_allclose(ours, x, rtol=1e-12)
        np.testing.assert_allclose(state.velocity - d * h / 2 * jnp.sin(ours), v, rtol=1e-11)


# ---- All ------------------------------------------------------------------------------------------------------------------


def test_temperature_scales_the_variance_of_the_noise_and_not_the_drift(make):
    optim, gradient = make(), jnp.arange(3.0)
    state = optim.init(gradient)
    cold, warm, hot = (optim.update(gradient, state, temperature=t, rng_key=KEY)[0] for t in (0.0, 0.1, 0.4))
    np.testing.assert_allclose(hot - cold, 2 * (warm - cold), rtol=1e-10)
    assert jnp.all(warm != cold)
    zero = optim.update(0 * gradient, state, temperature=0.1, rng_key=KEY)[0]
    np.testing.assert_allclose(warm - cold, zero, rtol=1e-10)


@pytest.mark.parametrize("missing", ["temperature", "rng_key"])
def test_missing_temperature_or_key_is_refused_with_the_fix(make, missing):
    optim, given = make(), {"temperature": 1.0, "rng_key": KEY}
    del given[missing]
    with pytest.raises(ValueError, match=r"needs the temperature and rng_key .* pass them to update"):
        optim.update(jnp.ones(2), optim.init(jnp.ones(2)), **given)


def test_transformations_compose_in_a_chain(make):
    # guards against: a chain that drops the temperature and key, or a transformation that does not see what came before it
    gradient = jnp.array([3.0, 4.0])
    plain, chained = make(), optax.chain(optax.clip_by_global_norm(1.0), make(), optax.scale(2.0))
    extra = {"temperature": 0.3, "rng_key": KEY}
    alone, _ = plain.update(gradient / 5, plain.init(gradient), **extra)
    together, _ = jax.jit(chained.update)(gradient, chained.init(gradient), gradient, **extra)
    np.testing.assert_allclose(together, 2 * alone, rtol=1e-12)


def test_missing_leaves_and_nested_trees_keep_their_structure(make):
    # guards against: a tree map that counts None as a leaf, as optax.masked and frozen parameters give
    optim = make()
    gradient = {"frozen": None, "net": (jnp.ones((2, 3)), [jnp.ones(())])}
    update, state = optim.update(gradient, optim.init(gradient), temperature=1.0, rng_key=KEY)
    assert jax.tree.structure(update) == jax.tree.structure(gradient)
    assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, gradient)
    optim.update(gradient, state, temperature=1.0, rng_key=KEY)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtypes_are_those_of_the_gradient(make, dtype):
    # guards against: a state that changes its dtype and compiles every loop twice
    optim, gradient = make(), jnp.ones(2, dtype)
    state = optim.init(gradient)
    update, after = optim.update(gradient, state, temperature=jnp.asarray(0.5), rng_key=KEY)
    assert update.dtype == dtype
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_the_same_key_gives_the_same_noise_and_nothing_random_is_kept(make):
    optim, gradient = make(), jnp.ones(4)
    state = optim.init(gradient)
    first, second, other = (optim.update(gradient, state, temperature=1.0, rng_key=key)[0] for key in (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(first, second)
    assert not jnp.any(first == other)


def test_noise_is_standard_normal_and_independent_between_arrays():
    # guards against: arrays of a tree that share a key
    noise = normal_like(KEY, {"a": jnp.zeros(20_000), "b": jnp.zeros(20_000), "c": jnp.zeros((), jnp.float32)})
    assert noise["c"].dtype == jnp.float32
    draws = np.stack([noise["a"], noise["b"], noise["a"] ** 2 - 1])
    np.testing.assert_allclose(draws.mean(1), 0, atol=5 * np.sqrt(2 / 20_000))
    np.testing.assert_allclose(draws @ draws.T / 20_000, np.diag([1, 1, 2]), atol=5 * np.sqrt(60 / 20_000))


def test_the_two_draws_of_a_kinetic_step_are_independent():
    # The distribution of the update needs two draws. Guards against: one key for both, which leaves a perfect correlation
    h, gamma = 0.3, 0.9
    optim, zero = kinetic_langevin(h, gamma), jnp.zeros(20_000)
    update, state = optim.update(zero, optim.init(zero), temperature=1.0, rng_key=KEY)
    exact = _exact_transition(h, gamma, 1.0)[1]
    error = np.sqrt((np.outer(np.diag(exact), np.diag(exact)) + exact**2) / 20_000)
    assert (abs(np.cov(np.stack([update, state.velocity])) - exact) / error).max() < 5
