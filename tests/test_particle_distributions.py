# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The distributions of ParticleMMLE in closed form.

On a linear-Gaussian model an update of the engine is an affine map of parameters, velocities and particles, plus Gaussian
noise. Both are read from the engine itself: the map from its values at a basis, which is exact for an affine map, and the
noise from unit vectors in place of the normal draws. Stationary covariances then follow from a Lyapunov equation without
sampling. That the random stream is what the propagation takes it for is checked by simulation.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import hierarchical
from jax import lax
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov

from numpyro_ebm import (
    EnergyDistribution,
    ParticleMMLE,
    TiltedDistribution,
    UnadjustedLangevin,
    langevin,
    negative_phase,
    optim,
)
from numpyro_ebm.infer import Averaged, Summed
from numpyro_ebm.samplers import Sampler
from numpyro_ebm.samplers.base import ChainState

Y = np.array([-0.3, 2.2, 1.4, 0.7])  # mean 1
KEY = jax.random.key(3)
EXACT = {"rtol": 1e-9, "atol": 1e-12}
# What is compiled here runs once: without the compiler's slow passes the file takes half as long.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


pytestmark = pytest.mark.usefixtures("double_precision")


# ---- The update as an affine map with noise -----------------------------------------------------------------------------


class Affine(NamedTuple):
    """An update z -> matrix z + offset + N(0, noise), and at which places of z each part of the state is."""

    matrix: Any
    noise: Any
    offset: Any
    at: Any

    @property
    def mean(self):
        return np.linalg.solve(np.eye(len(self.offset)) - self.matrix, self.offset)

    @property
    def covariance(self):
        return solve_discrete_lyapunov(self.matrix, self.noise)

    @property
    def spectral_radius(self):
        return abs(np.linalg.eigvals(self.matrix)).max()

    def variance(self, part):
        """The stationary variance of a part of the state whose elements are alike."""
        variances = np.diag(self.covariance)[_places(part)]
        np.testing.assert_allclose(variances, variances[0], rtol=1e-9)
        return variances[0]


class _Feed:
    """Stands in for ``normal_like``: hands out a given vector piece by piece, and keeps the keys it was asked with."""

    def __init__(self, noise=None):
        self.noise, self.used, self.keys = noise, 0, []

    def __call__(self, rng_key, tree):
        flat, unravel = ravel_pytree(tree)
        self.keys.append(jax.random.key_data(rng_key))
        start, self.used = self.used, self.used + flat.size
        return unravel(jnp.zeros_like(flat) if self.noise is None else self.noise[start : self.used])


def _asks_for_noise(step):
    with mock.patch("numpyro_ebm.optim.normal_like", feed := _Feed()):
        jax.eval_shape(step)
    return feed.used > 0


def _unrolled(function, carry, xs=None, length=None, *, where=_asks_for_noise, scan=lax.scan, **settings):
    """``lax.scan``, as a Python loop where its steps ask for noise, so that every step meets a feed anew."""

    def row(i):
        return jax.tree.map(lambda x: x[i], xs)

    if not where(lambda: function(carry, row(0))):
        return scan(function, carry, xs, length, **settings)
    outputs = []
    for i in range(len(jax.tree.leaves(xs)[0]) if length is None else length):
        carry, output = function(carry, row(i))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


@contextmanager
def _fed(feed, where=_asks_for_noise):
    loop = partial(_unrolled, where=where)
    with mock.patch("numpyro_ebm.optim.normal_like", feed), mock.patch.object(lax, "scan", loop):
        yield


ALL = ("unconstrained", "optim_state", "particles", "dynamics_state")


def affine_step(engine, state, *args, moving=ALL):
    """The update of an engine around a state, as arrays that may be traced; with the random keys that it used."""
    args = jax.tree.map(jnp.asarray, args)
    parts, rest = eqx.partition({name: getattr(state, name) for name in moving}, eqx.is_inexact_array)
    z, unravel = ravel_pytree(parts)

    def step(z, noise):
        here = eqx.combine(unravel(z), rest)
        if "unconstrained" in here:  # params without a constraint
            here["params"] = here["unconstrained"]
        feed = _Feed(noise)
        with _fed(feed):
            new, _, _ = engine._step(state._replace(**here), args, {})
        new = eqx.filter({name: getattr(new, name) for name in moving}, eqx.is_inexact_array)
        return ravel_pytree(new)[0], jnp.stack(feed.keys)

    with _fed(count := _Feed()):
        jax.eval_shape(lambda: engine._step(state, args, {})[0].particles)
    n, m = z.size, count.used
    far = jnp.concatenate([3.0 + jnp.arange(n) % 7, jnp.cos(jnp.arange(m))])  # tells whether the update is affine at all
    directions = jnp.concatenate([jnp.zeros((1, n + m)), jnp.eye(n + m), far[None]])
    values, keys = jax.vmap(lambda d: step(z + d[:n], d[n:]), out_axes=(0, None))(directions)
    start, columns = values[0], values[1:-1] - values[0]
    by_state, by_noise = columns[:n].T, columns[n:].T
    residual = values[-1] - start - columns.T @ far
    return Affine(by_state, by_noise @ by_noise.T, start - by_state @ z, unravel(jnp.arange(1.0 * n))), keys, residual


def distribution(make, *args, steps=None):
    """The distribution of an engine; of ``make(step_size)`` for every one of ``steps``, compiled once, where they are given."""

    def at(h):
        engine = make if steps is None else make(lambda count: h)
        return affine_step(engine, engine.init(KEY, *args), *args)

    hs = jnp.zeros(1) if steps is None else jnp.asarray(steps)
    affine, keys, residual = jax.tree.map(np.asarray, compiled(jax.vmap(at))(hs))
    assert abs(residual).max() < 1e-7, "the update is not affine"
    assert len(np.unique(keys[0], axis=0)) == len(keys[0]), "a random key is used twice"
    each = [jax.tree.map(lambda x, i=i: x[i], affine) for i in range(len(hs))]
    return each[0] if steps is None else each


def _places(part):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(part)]).astype(int)


def _theta(affine):
    return affine.variance(affine.at["unconstrained"])


def _x(affine):
    return affine.variance(affine.at["particles"])


D, N = 4, 5
SUMMED, AVERAGED = 4 / (D + 2 + np.sqrt(D**2 + 4)), 4 / (3 + np.sqrt(5))  # step limits
FASTEST = {"pgd": 2 / (D + 2), "pqn": 2 / 3, "pmgd": 2 / 3}
AROUND = [factor * limit for factor in (0.999, 1.001) for limit in (SUMMED, AVERAGED, 1.0)]
STEPS = (1e-3, 2e-3, 0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, *AROUND, *(f * h for f in (0.98, 1.0, 1.02) for h in (2 / (D + 2), 2 / 3)))


@cache
def distributions(name, num_data=D, num_particles=N, **settings):
    """The distributions of an algorithm at all of STEPS."""

    def make(h):
        if name == "ebipla without noise":  # parameters that move by plain gradient descent
            return ParticleMMLE.ebipla(hierarchical, optax.sgd(h), num_particles=num_particles, step_size=h)
        return getattr(ParticleMMLE, name)(hierarchical, num_particles=num_particles, step_size=h, **settings)

    return dict(zip(STEPS, distribution(make, Y[:num_data], steps=STEPS), strict=True))


def _extrapolated(name, variance, **settings):
    """A variance at step 0: the bias is h times a constant, which cancels."""
    by_step = distributions(name, **settings)
    return 2 * variance(by_step[1e-3]) - variance(by_step[2e-3])


def _centered(speed, theta_noise, h, num_data, num_particles):
    """Variances of loc and of one particle, from the distribution of loc and the grand mean, and the deviations from that mean."""
    drift = np.array([[speed, -speed], [-1, 2]])
    total = num_data * num_particles
    mean = solve_discrete_lyapunov(np.eye(2) - h * drift, h * np.diag([theta_noise, 2 / total]))
    return mean[0, 0], mean[1, 1] + (1 - 1 / total) / (2 * (1 - h))


# ---- Stationary distributions at every step size ---------------------------------------------------------------------------------

SIZES = [(D, N), (1, 1), (3, 2)]


@pytest.mark.parametrize(("num_data", "num_particles"), SIZES)
@pytest.mark.parametrize("h", [0.1, 0.3, 0.7])
def test_ebipla_has_the_exact_distribution_of_its_discretization(num_data, num_particles, h):
    # guards against: noise sqrt(2h/N) with averaged drift, Gauss-Seidel for Jacobi, summed drift
    affine, total = distributions("ebipla", num_data, num_particles)[h], num_data * num_particles
    denominator = total * (1 - 1.5 * h + 0.25 * h**2)
    np.testing.assert_allclose(_theta(affine), (2 - 2.5 * h) / denominator, **EXACT)
    np.testing.assert_allclose(_x(affine), (1 - h) / denominator + (1 - 1 / total) / (2 * (1 - h)), **EXACT)
    if (num_data, h) == (4, 0.1):
        np.testing.assert_allclose([_theta(affine), _x(affine)], [0.1026393, 0.5805637], atol=5e-8)


@pytest.mark.parametrize("h", [0.1, 0.3, 0.7])
def test_ebipla_without_noise_on_the_parameters_has_the_distribution_of_its_drift(h):
    # guards against: noise that the optimizer was not asked for, a gradient summed over data
    affine = distributions("ebipla without noise")[h]
    np.testing.assert_allclose([_theta(affine), _x(affine)], _centered(1, 0, h, D, N), **EXACT)


@pytest.mark.parametrize(
    ("name", "num_data", "num_particles"), [("ipla", *size) for size in SIZES] + [("pgd", D, N), ("pgd", 3, 2)]
)
@pytest.mark.parametrize("h", [0.01, 0.1, 0.3])
def test_summed_drift_has_the_distribution_of_its_discretization(name, num_data, num_particles, h):
    # guards against: a gradient averaged over data, a mean over particles forgotten, noise in PGD and none in IPLA
    affine, noise = distributions(name, num_data, num_particles)[h], {"ipla": 2 / num_particles, "pgd": 0.0}[name]
    exact = _centered(num_data, noise, h, num_data, num_particles)
    np.testing.assert_allclose([_theta(affine), _x(affine)], exact, **EXACT)
    if (name, num_data, h) == ("ipla", 4, 0.1):
        np.testing.assert_allclose(exact, [0.1126761, 0.5805946], atol=5e-8)


@pytest.mark.parametrize("h", [0.01, 0.5, 0.9])
def test_pmgd_has_the_distribution_of_its_discretization(h):
    # guards against: parameters that maximize for the cloud before its move
    total = D * N
    np.testing.assert_allclose(_x(distributions("pmgd")[h]), (1 - 1 / total) / (2 * (1 - h)) + (2 / total) / (2 - h), rtol=1e-6)


def test_pqn_has_the_distribution_of_ebipla_without_noise():
    # The Hessian is D: Newton's direction is the gradient averaged over data. Guards against: a Hessian of the wrong scale
    for newton, averaged in zip(distributions("pqn")[0.2][:3], distributions("ebipla without noise")[0.2][:3], strict=True):
        np.testing.assert_allclose(newton, averaged, atol=1e-12)


def _soul_distribution(h, num_data, num_moves):
    """Variance of loc when it follows the mean of one chain over its moves, all of them at the loc before."""
    a, j = 1 - 2 * h, np.arange(1, num_moves + 1)
    pull = (1 - a**j) / 2
    speed = h * num_data
    step = np.array([[1 - speed + speed * pull.mean(), speed * (a**j).mean()], [pull[-1], a**num_moves]])
    by_move = [(speed * (a ** np.arange(num_moves - i)).sum() / num_moves, a ** (num_moves - 1 - i)) for i in range(num_moves)]
    noise = 2 * h / num_data * sum(np.outer(u, u) for u in map(np.array, by_move))
    return solve_discrete_lyapunov(step, noise)[0, 0]


SOUL = {"num_particles": 1, "num_moves": 3}


@pytest.mark.parametrize("h", [0.01, 0.1, 0.2])
def test_soul_averages_over_the_moves_of_one_chain(h):
    # guards against: the last point instead of the mean, moves that count the point before, a step per move
    np.testing.assert_allclose(_theta(distributions("soul", **SOUL)[h]), _soul_distribution(h, D, 3), **EXACT)


def test_soul_varies_more_than_as_many_particles():
    # 1 / (D + 2m) against 1 / (m (D + 2)): the points of a chain are alike. Guards against: moves from independent chains
    np.testing.assert_allclose(_extrapolated("soul", _theta, **SOUL), 1 / (D + 2 * 3), rtol=1e-4)
    np.testing.assert_allclose(_extrapolated("pgd", _theta, num_particles=3), 1 / (3 * (D + 2)), rtol=1e-4)


LIMITS = {
    "ipla": (2 / (N * D), 1 / 2 + 1 / (2 * N * D)),
    "pgd": (1 / (N * (D + 2)), (1 - 1 / (N * D)) / 2 + (1 + D) / (N * D * (D + 2))),
    "ebipla": (2 / (N * D), 1 / 2 + 1 / (2 * N * D)),
    "ebipla without noise": (1 / (3 * N * D), None),
    "pmgd": (None, 1 / 2 + 1 / (2 * N * D)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_small_steps_reach_the_distribution_of_the_diffusion(name):
    # guards against: an algorithm that is the discretization of another diffusion
    for variance, limit in zip((_theta, _x), LIMITS[name], strict=True):
        if limit is not None:
            np.testing.assert_allclose(_extrapolated(name, variance), limit, rtol=1e-4)


@pytest.mark.parametrize("speed", [0.5, 4.0])
def test_the_limit_does_not_depend_on_the_speed_of_the_parameters(speed):
    # Any c with drift c h and noise sqrt(2 c h / (M N)). Guards against: noise that does not follow the optimizer's own step
    def make(step_size):
        optim = langevin(lambda count: speed * step_size(count))
        return ParticleMMLE.ebipla(hierarchical, optim, num_particles=N, step_size=step_size)

    coarse, fine = (_theta(affine) for affine in distribution(make, Y, steps=[2e-3, 1e-3]))
    np.testing.assert_allclose(2 * fine - coarse, 2 / (D * N), rtol=1e-4)


KINETIC_STEPS = {"kiplmc1": (0.1, 0.05, 0.01), "kiplmc2": (0.1, 0.05, 0.01), "mpd": (0.1, 4e-3, 2e-3)}


def _kinetic_engine(name, h):
    settings = {"inverse_mass": 2.0} if name == "mpd" else {}
    return getattr(ParticleMMLE, name)(hierarchical, num_particles=N, step_size=h, friction=2.0, **settings)


@cache
def kinetic_distributions(name):
    return {h: distribution(_kinetic_engine(name, h), Y) for h in KINETIC_STEPS[name]}


ALGORITHMS = {
    "pgd": lambda: distributions("pgd")[0.2],
    "ipla": lambda: distributions("ipla")[0.2],
    "ebipla": lambda: distributions("ebipla")[0.2],
    "soul": lambda: distributions("soul", **SOUL)[0.2],
    "pqn": lambda: distributions("pqn")[0.2],
    "pmgd": lambda: distributions("pmgd")[0.2],
    "kiplmc1": lambda: kinetic_distributions("kiplmc1")[0.1],
    "kiplmc2": lambda: kinetic_distributions("kiplmc2")[0.1],
    "mpd": lambda: kinetic_distributions("mpd")[0.1],
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_mean_of_the_parameters_is_the_maximum_at_a_finite_step(name):
    # guards against: a drift that is not that of the model
    affine = ALGORITHMS[name]()
    np.testing.assert_allclose(affine.mean[_places(affine.at["unconstrained"])], Y.mean(), rtol=1e-7)
    x = affine.mean[_places(affine.at["particles"])].reshape(-1, D)
    np.testing.assert_allclose(x, np.broadcast_to((Y + Y.mean()) / 2, x.shape), rtol=1e-7)
    assert affine.spectral_radius < 1


def test_the_spread_of_the_parameters_falls_as_the_root_of_the_number_of_particles():
    # guards against: a mean over particles forgotten in the drift or in the noise
    numbers = [1, 4, 16]
    spread = [np.sqrt(_theta(distributions("ipla", 2, number)[0.1])) for number in numbers]
    assert np.polyfit(np.log(numbers), np.log(spread), 1)[0] == pytest.approx(-0.5, abs=1e-8)


# ---- Step limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"), [("pgd", SUMMED), ("ipla", SUMMED), ("ebipla", AVERAGED), ("pqn", AVERAGED), ("pmgd", 1.0)]
)
def test_the_update_is_stable_up_to_the_step_limit_and_not_above(name, limit):
    # guards against: an update that is not the explicit Euler step
    by_step = distributions(name)
    assert by_step[0.999 * limit].spectral_radius < 1 < by_step[1.001 * limit].spectral_radius


@pytest.mark.parametrize("name", FASTEST)
def test_the_fastest_step_is_the_best_for_a_quadratic(name):
    # guards against: an update that is not the explicit Euler step
    slow, fastest, large = (distributions(name)[factor * FASTEST[name]].spectral_radius for factor in (0.98, 1.0, 1.02))
    assert fastest < min(slow, large)


def test_the_limit_of_ebipla_does_not_depend_on_the_number_of_data():
    by_step = distributions("ebipla", 3, 2)
    assert by_step[0.999 * AVERAGED].spectral_radius < 1 < by_step[1.001 * AVERAGED].spectral_radius


def test_stability_limit_is_that_of_the_particles():
    # the posterior precision of x is 2. Guards against: a curvature that counts the parameters, or the scale of a plate
    engine = ParticleMMLE.pgd(hierarchical, num_particles=2, step_size=0.2)
    assert engine.stability_limit(engine.init(KEY, Y), Y) == pytest.approx(1.0)


# ---- The random stream ---------------------------------------------------------------------------------------------------


def simulate(engine, num_chains, num_steps, *args):
    """The last states of independent fits, in single precision."""

    def end(key):
        state = engine.init(key, *args)
        return lax.scan(lambda state, _: (engine._step(state, args, {})[0], None), state, length=num_steps)[0]

    with jax.enable_x64(False):
        args = jax.tree.map(jnp.asarray, args)
        return compiled(jax.vmap(end))(jax.random.split(KEY, num_chains))


SIMULATED = {
    "ipla": (lambda: ParticleMMLE.ipla(hierarchical, num_particles=N, step_size=0.2), 100),
    "ebipla": (lambda: ParticleMMLE.ebipla(hierarchical, num_particles=N, step_size=0.2), 150),
    "soul": (lambda: ParticleMMLE.soul(hierarchical, num_moves=3, step_size=0.2), 60),
    "kiplmc1": (lambda: _kinetic_engine("kiplmc1", 0.1), 200),
    "kiplmc2": (lambda: _kinetic_engine("kiplmc2", 0.1), 200),
    "mpd": (lambda: _kinetic_engine("mpd", 0.1), 200),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_simulation_has_the_propagated_covariance(name):
    # guards against: one key for two draws, or for two steps; noise shared by particles
    make, num_steps = SIMULATED[name]
    affine, num_chains = ALGORITHMS[name](), 2000
    assert affine.spectral_radius**num_steps < 1e-3
    state = simulate(make(), num_chains, num_steps, Y)
    parts = {field: eqx.filter(getattr(state, field), eqx.is_inexact_array) for field in ALL}
    z = np.asarray(jax.vmap(lambda parts: ravel_pytree(parts)[0])(parts))
    exact = affine.covariance
    error = np.sqrt((np.outer(np.diag(exact), np.diag(exact)) + exact**2) / num_chains)
    assert (abs(np.cov(z.T) - exact) / error).max() < 5
    assert (abs(z.mean(0) - affine.mean) / np.sqrt(np.diag(exact) / num_chains)).max() < 5


# ---- Minibatches ---------------------------------------------------------------------------------------------------------


def resting(y, index):
    """Particles whose distribution is N(0, 1/2) whatever the parameter; the batch comes from outside."""
    loc = numpyro.param("loc", 0.0)
    with numpyro.handlers.substitute(data={"data": index}):
        plate = numpyro.plate("data", len(y), subsample_size=len(index))
    with plate as rows:
        numpyro.sample("x", dist.Normal(0, jnp.sqrt(0.5)))
        numpyro.sample("y", dist.Normal(loc, 1), obs=y[rows])


def resting_at_random(y):
    """The same, with batches that the plate draws."""
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y), subsample_size=2) as rows:
        numpyro.sample("x", dist.Normal(0, jnp.sqrt(0.5)))
        numpyro.sample("y", dist.Normal(loc, 1), obs=y[rows])


def batch_steps(engine, y, batches):
    """The affine maps of the particles for every batch."""
    state = engine.init(KEY, y, batches[0])
    steps = compiled(jax.vmap(lambda index: affine_step(engine, state, y, index, moving=("particles",))[0]))(jnp.asarray(batches))
    return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), steps) for i in range(len(batches))]


@pytest.mark.parametrize(("noise", "after"), [("batch", 0.625), ("all", 0.36 * 0.625 + 0.04)])
def test_cyclic_batches_meet_the_distribution_of_plain_langevin_before_their_drift(noise, after):
    # c = 2, h = .2, L = 10: 1 / (c (1 - hc/2)) = .625 before, .225 after the drift, and then noise. Guards against: sqrt(2h) on
    # all particles (L times too wide) and sqrt(2h/L) on the batch alone (L times too narrow), a scaled particle drift
    engine = ParticleMMLE(resting, optax.set_to_zero(), 1, 0.2, noise=noise)
    steps = batch_steps(engine, np.zeros(10), np.arange(10)[:, None])
    epoch, sum_of_noise = np.eye(10), np.zeros((10, 10))
    for step in steps:
        epoch, sum_of_noise = step.matrix @ epoch, step.matrix @ sum_of_noise @ step.matrix.T + step.noise
    covariance = solve_discrete_lyapunov(epoch, sum_of_noise)
    for row, step in enumerate(steps):
        np.testing.assert_allclose(covariance[row, row], 0.625, **EXACT)
        covariance = step.matrix @ covariance @ step.matrix.T + step.noise
        np.testing.assert_allclose(covariance[row, row], after, **EXACT)


@pytest.mark.parametrize("noise", ["batch", "all"])
def test_batches_drawn_by_the_plate_give_the_distribution_of_plain_langevin(noise):
    # v = p (1 - hc)^2 v + (1 - p) v + 2 h p after the noise, p = B / M. Guards against: the same batch at every step, rows
    # scattered to other places, particles outside the batch that drift
    engine = ParticleMMLE(resting_at_random, optax.set_to_zero(), 2, 0.3, noise=noise)
    x = np.asarray(simulate(engine, 2000, 40, np.zeros(6)).particles["x"])
    by_chain = (x**2).mean((1, 2))
    assert abs(by_chain.mean() - 1 / (2 * (1 - 0.3))) < 5 * by_chain.std() / np.sqrt(len(by_chain))
    across = np.corrcoef(x.reshape(len(x), -1).T) - np.eye(12)
    assert abs(across).max() < 5 / np.sqrt(len(x))


def hierarchical_rows(y, index):
    loc = numpyro.param("loc", 0.0)
    with numpyro.handlers.substitute(data={"data": index}):
        plate = numpyro.plate("data", len(y), subsample_size=len(index))
    with plate as rows:
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y[rows])


@pytest.mark.parametrize(("drift", "per_row"), [(Summed(), 3.0), (Averaged(), 0.5)])
def test_the_scale_of_a_plate_counts_for_the_parameters_and_not_for_the_particles(drift, per_row):
    # guards against: particles of a batch that drift M / B times too far, a parameter gradient that forgets the other batches
    y, index, h = np.arange(6.0), np.array([4, 1]), 0.1
    engine = ParticleMMLE(hierarchical_rows, optax.sgd(h), 1, h, drift=drift)
    step = distribution(engine, y, index)
    loc, x = int(step.at["unconstrained"]["loc"]), np.asarray(step.at["particles"]["x"][0], int)
    exact = np.eye(7)
    exact[loc, loc] -= 2 * h * per_row
    exact[loc, x[index]] = h * per_row
    exact[x[index], x[index]] = 1 - 2 * h
    exact[x[index], loc] = h
    np.testing.assert_allclose(step.matrix, exact, atol=1e-12)
    noise = np.zeros(7)
    noise[x[index]] = 2 * h
    np.testing.assert_allclose(step.noise, np.diag(noise), atol=1e-12)
    np.testing.assert_allclose(step.offset[x], h * y * np.isin(np.arange(6), index), atol=1e-12)


# ---- Energy priors -------------------------------------------------------------------------------------------------------


def tilted(y):
    """The prior N(loc, 1) written as exp(loc x) N(x; 0, 1), whose normalizer exp(loc^2 / 2) is not told."""
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -loc * x))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


@dataclass(frozen=True)
class FromTilt(Sampler):
    """Chains of the linear tilt at its mean, which is the score at 0, or drawn around it with variance 1."""

    draw: bool = False

    def run(self, rng_key, log_prob, state):
        x = lax.stop_gradient(state.position)
        mean = jax.grad(lambda x: log_prob(x).sum())(jnp.zeros_like(x))
        return ChainState(mean + optim.normal_like(rng_key, x) if self.draw else mean)


def _tilted_ebipla(step_size, sampler, num_chains=1):
    phase = negative_phase(tilted, num_chains=num_chains, sampler=sampler, persistent=False)
    return ParticleMMLE.ebipla(phase, num_particles=N, step_size=step_size)


def test_an_energy_prior_with_exact_chains_moves_as_the_normalized_model():
    # guards against: the sign or the scale of d log Z, a normalizer for the whole plate, one per particle
    (energy,) = distribution(lambda h: _tilted_ebipla(h, FromTilt()), Y, steps=[0.1])
    for ours, exact in zip(energy[:3], distributions("ebipla", D, N)[0.1][:3], strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-12)


def test_independent_chains_add_their_share_to_the_variance():
    # 5/6 h Var(prior) / M from M chains, to first order in h. Guards against: chains averaged over particles too
    h = 1e-3
    draws, means = (
        _theta(distribution(lambda h, draw=draw: _tilted_ebipla(h, FromTilt(draw), D), Y, steps=[h])[0]) for draw in (True, False)
    )
    np.testing.assert_allclose((draws - means) / (h / D), 5 / 6, rtol=2e-3)


@pytest.mark.parametrize(("num_steps", "told"), [(8, 7.19), (20, 1.321), (60, 1.0036)])
def test_short_run_chains_have_their_biased_fixed_point(num_steps, told):
    # guards against: persistent chains where fresh ones are meant, a step more or less, chains that start elsewhere
    step = _short_run(num_steps)
    fixed = step.mean[int(step.at["unconstrained"]["loc"])]
    np.testing.assert_allclose(fixed, Y.mean() / (1 - 2 * 0.9**num_steps), rtol=1e-9)
    assert fixed == pytest.approx(told, rel=1e-3)
    assert step.spectral_radius < 1


def test_chains_that_are_too_short_make_training_diverge():
    # (1 - gamma)^J = .53 > 1/2, and .48 < 1/2
    assert _short_run(6).spectral_radius > 1 > _short_run(7).spectral_radius


def _short_run(num_steps):
    """The mean of EBIPLA: with all noise of the chains 0 they follow their mean."""
    engine = ParticleMMLE.ebipla(
        tilted, num_particles=1, step_size=0.1, num_chains=1, prior_step_size=0.1, num_prior_steps=num_steps
    )
    with mock.patch.object(jax.random, "normal", lambda key, shape=(), dtype=float: jnp.zeros(shape, dtype)):
        return distribution(engine, Y)


S, S2 = 3.0, 1.0  # variance of the data, variance of their noise
PAIR = np.sqrt(S) * np.array([-1.0, 1.0])


def precise(y):
    """The energy tau x^2 / 2: the maximum is 1 / tau = S - S2."""
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", EnergyDistribution(lambda x: tau * x**2 / 2, initial=dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, jnp.sqrt(S2)), obs=y)


@dataclass(frozen=True)
class Stationary(Sampler):
    """Two chains with the variance of a stationary unadjusted chain on a quadratic; the exact one for step 0."""

    step_size: float

    def run(self, rng_key, log_prob, state):
        c = -jax.grad(lambda x: log_prob(x).sum())(jnp.ones_like(state.position))[0]
        return ChainState(lax.stop_gradient(jnp.array([-1.0, 1.0]) / jnp.sqrt(c * (1 - self.step_size * c / 2))))


def resting_drift(make, y, name, inverse, fed=None):
    """How far a step moves a parameter, by its value and settings, where particles have the distribution of their own moves there.

    Two particles per datum, a deviation below and above the mean, have the mean and the square of that distribution.

    :param make: the engine, of the settings.
    :param inverse: the transform of the parameter to unconstrained space.
    :param fed: a context for the step, such as one with given noise.
    """

    def drift(value, *settings):
        engine = make(*settings)
        state = engine.init(KEY, y)._replace(params={name: value}, unconstrained={name: inverse(value)})
        moves, _, _ = affine_step(engine, state, y, moving=("particles",))
        a, q = jnp.diag(moves.matrix), jnp.diag(moves.noise)
        deviation = jnp.sqrt(q / (1 - a**2)).reshape(2, -1) * jnp.array([[-1.0], [1.0]])
        (site,) = state.particles
        state = state._replace(particles={site: (moves.offset / (1 - a)).reshape(2, -1) + deviation})
        with fed() if fed else _fed(_Feed()):
            new, _, _ = engine._step(state, (jnp.asarray(y),), {})
        return new.unconstrained[name] - state.unconstrained[name]

    return drift


def roots(drift, low, high, *settings):
    """The only zero of ``drift(., *setting)`` between low and high for every setting, by repeated section; nan without one."""
    settings = tuple(jnp.asarray(column) for column in settings)
    values_on = compiled(jax.vmap(jax.vmap(drift, (0, *(None for _ in settings)))))
    low, high = (np.full(len(settings[0]), end) for end in (low, high))
    for section in range(8):
        grid = np.linspace(low, high, 40, axis=1)
        turns = np.diff(np.sign(values_on(grid, *settings)), axis=1) != 0
        assert section > 0 or (turns.sum(1) <= 1).all()  # later ones end in rounding
        first, rows = turns.argmax(1), np.arange(len(grid))
        found = turns.any(1)
        low, high = np.where(found, grid[rows, first], np.nan), np.where(found, grid[rows, first + 1], np.nan)
        if not found.any():
            break
    return (low + high) / 2


FIXED_POINTS = [
    (0.1, 0.0, 0.47237),
    (0.05, 0.0, 0.48606),
    (1e-6, 0.1, 0.53208),
    (1e-6, 0.05, 0.51497),
    (0.05, 0.05, 0.49963),
    (0.1, 0.1, 0.49845),
]


def test_unadjusted_particles_and_chains_bias_the_precision_by_the_known_amount():
    # guards against: the posterior's and the prior's term exchanged, a half lost, the log transform of the parameter
    def make(h, gamma):
        phase = negative_phase(precise, num_chains=2, sampler=Stationary(gamma), persistent=False)
        return ParticleMMLE.ebipla(phase, optax.sgd(1.0), num_particles=2, step_size=lambda count: h)

    h, gamma, told = np.array(FIXED_POINTS).T
    tau = roots(resting_drift(make, PAIR, "tau", jnp.log), 0.2, 0.9, h, gamma)
    rho = tau + 1 / S2
    posterior = S / (S2**2 * rho**2) + 1 / (rho * (1 - h * rho / 2))
    np.testing.assert_allclose(posterior, 1 / (tau * (1 - gamma * tau / 2)), rtol=1e-7)
    np.testing.assert_allclose(tau, told, atol=6e-6)


class _Design:
    """Stands in for ``jax.random.normal``: draw k of chain i is such that over the chains all draws are uncorrelated, with
    variance 1. Two chains for every draw, so that the chains' mean square is their variance, exactly.
    """

    def __init__(self):
        self.used = 0

    def __call__(self, key, shape=(), dtype=float):
        (num_chains,) = shape
        pair, self.used = 2 * self.used, self.used + 1
        return jnp.zeros(num_chains, dtype).at[jnp.array([pair, pair + 1])].set(jnp.sqrt(num_chains / 2) * jnp.array([1.0, -1.0]))


def _short_run_precision(num_steps, steps):
    """Where EBIPLA's own chains of step .1 let the precision rest, at every particle step."""

    def make(h):
        chains = {"num_chains": 2 * (num_steps + 1), "prior_step_size": 0.1, "num_prior_steps": num_steps}
        return ParticleMMLE.ebipla(precise, optax.sgd(1.0), num_particles=2, step_size=lambda count: h, **chains)

    @contextmanager
    def exactly():
        with mock.patch.object(jax.random, "normal", _Design()), _fed(_Feed(), where=lambda step: True):
            yield

    return roots(resting_drift(make, PAIR, "tau", jnp.log, exactly), 1e-3, 3.0, steps)


def test_short_run_chains_bias_the_precision_by_the_known_amount():
    # guards against: chains of another length or start, the noise of unadjusted Langevin, prior and posterior exchanged
    h = np.array([0.1, 0.01])
    tau = _short_run_precision(20, h)
    rho, q = tau + 1 / S2, (1 - 0.1 * tau) ** 2
    posterior = S / (S2**2 * rho**2) + 1 / (rho * (1 - h * rho / 2))
    np.testing.assert_allclose(posterior, q**20 + 0.2 * (1 - q**20) / (1 - q), rtol=1e-7)
    np.testing.assert_allclose(tau, [0.3567, 0.3982], atol=6e-5)


def test_very_short_chains_have_no_fixed_point():
    # five steps never spread as far as the posterior: the precision falls without end
    assert np.isnan(_short_run_precision(5, np.array([0.1]))).all()


def test_the_biased_fixed_point_is_where_training_ends():
    # 20 steps and h = .1 rest at .3567, far from the maximum .5. Guards against: chains that are not those of the model
    y = np.tile(PAIR, 50)
    engine = ParticleMMLE.ebipla(
        precise, optax.sgd(0.5), num_particles=10, step_size=0.1, num_chains=200, prior_step_size=0.1, num_prior_steps=20
    )
    with jax.enable_x64(False), pytest.warns(UserWarning, match="the chains restart at every step and keep more than a tenth"):
        taus = engine.run(KEY, 2000, y, progress_bar=False, collect=lambda state: state.params["tau"]).collected
    parts = np.asarray(taus)[400:].reshape(16, 100).mean(1)  # 100 steps apart they are independent
    assert abs(parts.mean() - 0.3567) < 5 * parts.std() / np.sqrt(len(parts)) + 0.003  # the curvature's share, about 1 / 200
    assert parts.std() / np.sqrt(len(parts)) < 0.005


def test_the_gradient_of_a_tilted_prior_is_that_of_quadrature():
    # f = a x - b x^2/2 + c tanh x over N(0, 1), y ~ N(w x, s2). Guards against: the sign of the normalizer's gradient
    params = {"a": 0.3, "b": 0.2, "c": 0.5, "w": 1.1}
    told = {"a": 0.1815061, "b": 0.1882431, "c": 0.2089626, "w": -0.5448966}
    y, s2 = 0.8, 0.3

    def tilt(p, x):
        return p["a"] * x - p["b"] * x**2 / 2 + p["c"] * jnp.tanh(x)

    def model(y):
        p = {name: numpyro.param(name, value) for name, value in params.items()}
        with numpyro.plate("data", 1):
            x = numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -tilt(p, x)))
            numpyro.sample("y", dist.Normal(p["w"] * x, jnp.sqrt(s2)), obs=y)

    def gradient(x, chain):
        """One particle and one chain: their shares of the gradient add up."""
        still = UnadjustedLangevin(0.1, num_steps=0)
        phase = negative_phase(model, num_chains=1, sampler=still, persistent=False, init_chains={"x": chain[None]})
        engine = ParticleMMLE(phase, optax.sgd(1.0), 1, 0.1)
        state = engine.init(KEY, jnp.array([y]))
        new, _, _ = engine._step(state._replace(particles={"x": x[None, None]}), (jnp.array([y]),), {})
        return jax.tree.map(jnp.subtract, new.unconstrained, state.unconstrained)

    grid = jnp.linspace(-12, 12, 2001)
    prior = tilt(params, grid) - grid**2 / 2
    posterior = prior - (y - params["w"] * grid) ** 2 / (2 * s2)
    zero = jnp.zeros_like(grid)
    places = jnp.stack([grid, zero, zero]), jnp.stack([zero, grid, zero])
    shares = compiled(jax.vmap(jax.vmap(gradient)))(*places)
    for name, value in told.items():
        by_particle, by_chain, neither = shares[name]
        mean = jax.nn.softmax(posterior) @ by_particle + jax.nn.softmax(prior) @ by_chain - neither[0]
        assert float(mean) == pytest.approx(value, abs=6e-8)


# ---- Factor analysis -----------------------------------------------------------------------------------------------------


def test_one_factor_is_biased_by_the_step_as_in_closed_form():
    # w^2 = s2 (S / (s2 + h S/2) - 1), 1.7222 where the maximum is 2. Guards against: a wrong gradient in a decoder's weight
    s2, spread = 0.5, 2.5
    y = np.sqrt(spread) * np.array([-1.0, 1.0])

    def model(y):
        w = numpyro.param("w", 1.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(w * x, jnp.sqrt(s2)), obs=y)

    def make(h):
        return ParticleMMLE.pgd(model, optax.sgd(1.0), num_particles=2, step_size=lambda count: h)

    h = np.array([0.05, 1e-4])
    squares = roots(resting_drift(make, y, "w", lambda w: w), 0.5, 2.0, h) ** 2
    np.testing.assert_allclose(squares, s2 * (spread / (s2 + h * spread / 2) - 1), rtol=1e-8)
    assert squares[0] == pytest.approx(1.7222, abs=6e-5)
    assert (squares[1] - 2) / h[1] == pytest.approx(-(spread**2) / (2 * s2), rel=1e-3)  # O(h)


@pytest.mark.slow
def test_two_factors_reach_the_maximum_of_the_likelihood():
    # guards against: weights that only one factor learns, latents that share their noise
    rng = np.random.default_rng(0)
    s2, true = 0.5, rng.normal(size=(5, 2))
    y = rng.normal(size=(400, 2)) @ true.T + np.sqrt(s2) * rng.normal(size=(400, 5))
    y -= y.mean(0)

    def model(y):
        w = numpyro.param("w", 0.1 * jnp.arange(10.0).reshape(5, 2) - 0.4)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(x @ w.T, jnp.sqrt(s2)).to_event(1), obs=y)

    values, vectors = np.linalg.eigh(y.T @ y / len(y))
    exact = vectors[:, -2:] @ np.diag(values[-2:] - s2) @ vectors[:, -2:].T
    engine = ParticleMMLE(model, optax.sgd(0.05), 20, 0.004, drift=Averaged())
    taken = engine.run(KEY, 8000, y, progress_bar=False, collect=lambda s: s.params["w"] @ s.params["w"].T).collected
    bias = 0.004 * values[-1] ** 2 / (2 * s2)  # of the largest factor, in closed form to first order
    assert abs(np.asarray(taken)[4000:].mean(0) - exact).max() < 2 * bias


# ---- Relations between algorithms -----------------------------------------------------------------------------------------


def test_particles_at_frozen_parameters_follow_plain_unadjusted_langevin():
    # bit for bit under the same keys. Guards against: anything that reaches the particles besides score and noise
    engine = ParticleMMLE(hierarchical, optax.set_to_zero(), 3, 0.1)
    state = engine.init(KEY, Y, init_params={"loc": 0.7})

    @jax.jit
    def plain(rng_key, x):
        rng_key, _, move_key, _, _ = jax.random.split(rng_key, 5)
        noise = optim.normal_like(jax.random.split(move_key, 1)[0], {"x": x})["x"]
        score = jax.grad(lambda x: (dist.Normal(0.7, 1).log_prob(x) + dist.Normal(x, 1).log_prob(jnp.asarray(Y))).sum())(x)
        return rng_key, x + 0.1 * score + jnp.sqrt(0.2) * noise

    rng_key, x = state.rng_key, state.particles["x"]
    for _ in range(20):
        state, _ = engine.update(state, Y)
        rng_key, x = plain(rng_key, x)
        np.testing.assert_array_equal(state.particles["x"], x)
    assert state.params["loc"] == 0.7


def test_permuting_the_data_with_their_particles_leaves_the_parameters():
    # guards against: rows of particles that meet other rows of data
    scale, order = np.array([0.5, 1.0, 1.5, 2.0]), np.array([2, 0, 3, 1])
    engine = ParticleMMLE.ipla(hierarchical, num_particles=2, step_size=0.05)
    plain, permuted = distribution(engine, Y, scale), distribution(engine, Y[order], scale[order])
    z = np.arange(len(plain.offset))
    z[_places(plain.at["particles"])] = plain.at["particles"]["x"][:, order].ravel()
    np.testing.assert_allclose(permuted.matrix, plain.matrix[np.ix_(z, z)], atol=1e-12)
    np.testing.assert_allclose(permuted.noise, plain.noise[np.ix_(z, z)], atol=1e-12)
    np.testing.assert_allclose(permuted.offset, plain.offset[z], atol=1e-12)


T = np.array([-1.0, 0.2, 1.5, 4.0])


def regression(t):
    """The maximum for a cloud is least squares on its mean, with a Hessian that is not diagonal, and the spread around it."""
    a, b = numpyro.param("a", 0.5), numpyro.param("b", -1.0)
    sd = numpyro.param("sd", 3.0, constraint=constraints.positive)
    with numpyro.plate("data", len(t)):
        x = numpyro.sample("x", dist.Normal(a + b * t, sd))
        numpyro.sample("y", dist.Normal(x, 1), obs=jnp.sin(t))


def first_update(engine, *args):
    """The states before and after it."""
    args = jax.tree.map(jnp.asarray, args)

    @compiled
    def states():
        start = engine.init(KEY, *args)
        return start, engine._step(start, args, {})[0]

    return states()


def _least_squares(x):
    """Intercept, slope and spread."""
    a, b = np.linalg.lstsq(np.stack([np.ones(4), T], 1), np.asarray(x).mean(0), rcond=None)[0]
    return np.array([a, b, np.sqrt(np.mean(np.square(x - (a + b * T))))])


def test_pqn_goes_a_step_along_the_direction_of_newton():
    # guards against: a diagonal Hessian, a direction divided by the number of data, the cloud after its move
    def loss(theta, x):
        return -dist.Normal(theta[0] + theta[1] * T, jnp.exp(theta[2])).log_prob(x).sum(-1).mean()

    start, end = first_update(ParticleMMLE.pqn(regression, num_particles=3, step_size=0.2, drift=Averaged()), T)
    before, x = jnp.array([0.5, -1.0, np.log(3.0)]), start.particles["x"]
    gradient, hessian = compiled(lambda x: (jax.grad(loss)(before, x), jax.hessian(loss)(before, x)))(x)
    exact = before - 0.2 * np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose([end.unconstrained[name] for name in ("a", "b", "sd")], exact, rtol=1e-10)


def test_pmgd_stands_at_the_maximum_for_its_cloud():
    # guards against: the cloud before its move, L-BFGS stopped early, a maximum of the constrained spread
    _, state = first_update(ParticleMMLE.pmgd(regression, num_particles=3, step_size=0.2), T)
    np.testing.assert_allclose([state.params[name] for name in ("a", "b", "sd")], _least_squares(state.particles["x"]), rtol=1e-7)


# ---- Kinetic dynamics ----------------------------------------------------------------------------------------------------

KINETIC = {"kiplmc1": (0.10555, 0.10263, 0.10051), "kiplmc2": (0.100505, 0.100125, 0.100005)}


@pytest.mark.parametrize("name", KINETIC)
def test_kinetic_parameters_have_the_known_variances(name):
    # exact .1; bias O(h) and O(h^2). Guards against: covariances of position and velocity exchanged, and every factor in them
    for affine, told in zip(kinetic_distributions(name).values(), KINETIC[name], strict=True):
        assert _theta(affine) == pytest.approx(told, abs=6e-6 if name == "kiplmc1" else 6e-7)
    variances = [_x(affine), affine.variance(affine.at["optim_state"]), affine.variance(affine.at["dynamics_state"])]
    np.testing.assert_allclose(variances, [1 / 2 + 1 / (2 * N * D), 1 / N, 1], rtol=0.011)  # h = .01


def test_mpd_approaches_the_distribution_of_its_diffusion():
    # guards against: noise on the parameters, the look-ahead on the particles, the inverse mass on one of both
    gamma, eta = 2.0, 2.0
    drift = np.array([[0, eta, 0, 0], [-D, -gamma * eta, D, 0], [0, 0, 0, eta], [1, 0, -2, -gamma * eta]])  # loc, m, mean x, mean u
    exact = solve_continuous_lyapunov(drift, -np.diag([0, 0, 0, 2 * gamma / (D * N)]))
    coarse, fine = (_theta(kinetic_distributions("mpd")[h]) for h in (4e-3, 2e-3))
    np.testing.assert_allclose(2 * fine - coarse, exact[0, 0], rtol=1e-3)


def test_mpd_has_no_noise_on_its_parameters():
    affine = kinetic_distributions("mpd")[0.1]
    for part in ("unconstrained", "optim_state"):
        at = _places(affine.at[part])
        np.testing.assert_array_equal(affine.noise[at], 0)
