# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The laws of ParticleMMLE in closed form.

On a linear-Gaussian model an update of the engine is an affine map of parameters, velocities and particles, plus Gaussian
noise. Both are read from the engine itself: the map from its values at a basis, which is exact for an affine map, and the
noise from unit vectors in place of the normal draws. Stationary covariances then follow from a Lyapunov equation without
sampling. That the random stream is what the propagation takes it for is checked by simulation.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
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
from jax import lax
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov
from scipy.optimize import brentq

from numpyro_ebm import (
    EnergyDistribution,
    ParticleMMLE,
    TiltedDistribution,
    UnadjustedLangevin,
    kinetic_langevin,
    langevin,
    negative_phase,
)
from numpyro_ebm.infer import particle_mmle
from numpyro_ebm.optim import normal_like
from numpyro_ebm.samplers import langevin as samplers

Y = np.array([-0.3, 2.2, 1.4, 0.7])  # mean 1
KEY = jax.random.key(3)
EXACT = dict(rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


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


def _unrolled(function, carry, xs):
    """``lax.scan`` as a Python loop, in which every step meets a feed anew."""
    outputs = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, output = function(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


@contextmanager
def _fed(feed):
    lax_here = SimpleNamespace(scan=_unrolled, while_loop=lax.while_loop)
    with (
        mock.patch("numpyro_ebm.optim.normal_like", feed),
        mock.patch.object(particle_mmle, "normal_like", feed),
        mock.patch.object(particle_mmle, "lax", lax_here),
    ):
        yield


ALL = ("unconstrained", "optim_state", "particles", "dynamics_state")


def affine_step(engine, state, *args, moving=ALL):
    """The update of an engine around a state, as arrays that may be traced; with the random keys that it used."""
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


def law(make, *args, steps=None):
    """The law of an engine; of ``make(step_size)`` for every one of ``steps``, compiled once, where they are given."""

    def at(h):
        engine = make if steps is None else make(lambda count: h)
        return affine_step(engine, engine.init(KEY, *args), *args)

    hs = jnp.zeros(1) if steps is None else jnp.asarray(steps)
    affine, keys, residual = jax.tree.map(np.asarray, jax.jit(jax.vmap(at))(hs))
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


def hierarchical(y):
    """x ~ N(loc, 1), y ~ N(x, 1): the marginal law of y is N(loc, 2), the maximum is the mean of y."""
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def _engine(name, num_particles, **settings):
    """A constructor of the engine as a function of the step size."""

    def make(step_size):
        return getattr(ParticleMMLE, name)(hierarchical, num_particles=num_particles, step_size=step_size, **settings)

    return make


def _without_noise(num_particles):
    """EBIPLA whose parameters move by plain gradient descent."""
    return lambda h: ParticleMMLE.ebipla(hierarchical, optax.sgd(h), num_particles=num_particles, step_size=h)


def _centred(speed, theta_noise, h, num_data, num_particles):
    """Variances of loc and of one particle, from the law of loc and the grand mean, and the deviations from that mean."""
    drift = np.array([[speed, -speed], [-1, 2]])
    total = num_data * num_particles
    mean = solve_discrete_lyapunov(np.eye(2) - h * drift, h * np.diag([theta_noise, 2 / total]))
    return mean[0, 0], mean[1, 1] + (1 - 1 / total) / (2 * (1 - h))


# ---- Stationary laws at every step size ---------------------------------------------------------------------------------

SIZES = [(4, 5), (1, 1), (3, 2)]


@pytest.mark.parametrize(("num_data", "num_particles"), SIZES)
def test_ebipla_has_the_exact_law_of_its_discretisation(num_data, num_particles):
    # guards against: noise sqrt(2h/N) with averaged drift, Gauss-Seidel for Jacobi, summed drift
    steps, total = [0.1, 0.3, 0.7], num_data * num_particles
    for h, affine in zip(steps, law(_engine("ebipla", num_particles), Y[:num_data], steps=steps), strict=True):
        denominator = total * (1 - 1.5 * h + 0.25 * h**2)
        np.testing.assert_allclose(_theta(affine), (2 - 2.5 * h) / denominator, **EXACT)
        np.testing.assert_allclose(_x(affine), (1 - h) / denominator + (1 - 1 / total) / (2 * (1 - h)), **EXACT)
        if (num_data, h) == (4, 0.1):
            np.testing.assert_allclose([_theta(affine), _x(affine)], [0.1026393, 0.5805637], atol=5e-8)


@pytest.mark.parametrize(("num_data", "num_particles"), SIZES)
def test_ebipla_without_noise_on_the_parameters_has_the_law_of_its_drift(num_data, num_particles):
    # guards against: noise that the optimiser was not asked for, a gradient summed over data
    steps = [0.1, 0.3, 0.7]
    for h, affine in zip(steps, law(_without_noise(num_particles), Y[:num_data], steps=steps), strict=True):
        np.testing.assert_allclose([_theta(affine), _x(affine)], _centred(1, 0, h, num_data, num_particles), **EXACT)


@pytest.mark.parametrize("name", ["ipla", "pgd"])
@pytest.mark.parametrize(("num_data", "num_particles"), SIZES)
def test_summed_drift_has_the_law_of_its_discretisation(name, num_data, num_particles):
    # guards against: a gradient averaged over data, a mean over particles forgotten, noise in PGD and none in IPLA
    noise = {"ipla": 2 / num_particles, "pgd": 0.0}[name]
    steps = [0.01, 0.1, 0.3]
    for h, affine in zip(steps, law(_engine(name, num_particles), Y[:num_data], steps=steps), strict=True):
        exact = _centred(num_data, noise, h, num_data, num_particles)
        np.testing.assert_allclose([_theta(affine), _x(affine)], exact, **EXACT)
        if (name, num_data, h) == ("ipla", 4, 0.1):
            np.testing.assert_allclose(exact, [0.1126761, 0.5805946], atol=5e-8)


def test_pmgd_has_the_law_of_its_discretisation():
    # guards against: parameters that maximise for the cloud before its move
    steps, total = [0.05, 0.5, 0.9], 20
    for h, affine in zip(steps, law(_engine("pmgd", 5), Y, steps=steps), strict=True):
        np.testing.assert_allclose(_x(affine), (1 - 1 / total) / (2 * (1 - h)) + (2 / total) / (2 - h), rtol=1e-6)


def test_pqn_has_the_law_of_ebipla_without_noise():
    # The Hessian is D: Newton's direction is the gradient averaged over data. Guards against: a Hessian of the wrong scale
    newton, averaged = law(_engine("pqn", 5), Y, steps=[0.2])[0], law(_without_noise(5), Y, steps=[0.2])[0]
    np.testing.assert_allclose(newton.matrix, averaged.matrix, atol=1e-12)
    np.testing.assert_allclose(newton.noise, averaged.noise, atol=1e-12)


def _soul_law(h, num_data, num_moves):
    """Variance of loc when it follows the mean of one chain over its moves, all of them at the loc before."""
    a, j = 1 - 2 * h, np.arange(1, num_moves + 1)
    pull = (1 - a**j) / 2
    speed = h * num_data
    step = np.array([[1 - speed + speed * pull.mean(), speed * (a**j).mean()], [pull[-1], a**num_moves]])
    by_move = [(speed * (a ** np.arange(num_moves - i)).sum() / num_moves, a ** (num_moves - 1 - i)) for i in range(num_moves)]
    noise = 2 * h / num_data * sum(np.outer(u, u) for u in map(np.array, by_move))
    return solve_discrete_lyapunov(step, noise)[0, 0]


def test_soul_averages_over_the_moves_of_one_chain():
    # guards against: the last point instead of the mean, moves that count the point before, a step per move
    steps = [0.02, 0.2]
    for h, affine in zip(steps, law(_engine("soul", 1, num_moves=4), Y, steps=steps), strict=True):
        np.testing.assert_allclose(_theta(affine), _soul_law(h, 4, 4), **EXACT)


def test_soul_varies_more_than_as_many_particles():
    # 1 / (D + 2m) against 1 / (m D + 2 m): the points of a chain are alike. Guards against: moves from independent chains
    slow, fast = (2 * fine - coarse for coarse, fine in [_soul_and_pgd(2e-3, 1e-3, name) for name in ("soul", "pgd")])
    np.testing.assert_allclose([slow, fast], [1 / (4 + 2 * 3), 1 / (3 * (4 + 2))], rtol=1e-4)


def _soul_and_pgd(*steps_and_name):
    *steps, name = steps_and_name
    make = _engine("soul", 1, num_moves=3) if name == "soul" else _engine("pgd", 3)
    return [_theta(affine) for affine in law(make, Y, steps=steps)]


D, N = 4, 5
LIMITS = {
    "ipla": (_engine("ipla", N), 2 / (N * D), 1 / 2 + 1 / (2 * N * D)),
    "pgd": (_engine("pgd", N), 1 / (N * (D + 2)), (1 - 1 / (N * D)) / 2 + (1 + D) / (N * D * (D + 2))),
    "ebipla": (_engine("ebipla", N), 2 / (N * D), 1 / 2 + 1 / (2 * N * D)),
    "ebipla without noise": (_without_noise(N), 1 / (3 * N * D), None),
    "pmgd": (_engine("pmgd", N), None, 1 / 2 + 1 / (2 * N * D)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_small_steps_reach_the_law_of_the_diffusion(name):
    # guards against: an algorithm that is the discretisation of another diffusion
    make, *limits = LIMITS[name]
    coarse, fine = law(make, Y, steps=[2e-3, 1e-3])
    for variance, limit in zip((_theta, _x), limits, strict=True):
        if limit is not None:  # the bias is h times a constant, which cancels here
            np.testing.assert_allclose(2 * variance(fine) - variance(coarse), limit, rtol=1e-4)


@pytest.mark.parametrize("speed", [0.5, 1.0, 4.0])
def test_the_limit_does_not_depend_on_the_speed_of_the_parameters(speed):
    # Any c with drift c h and noise sqrt(2 c h / (M N)). Guards against: noise that does not follow the optimiser's own step
    def make(step_size):
        optim = langevin(lambda count: speed * step_size(count))
        return ParticleMMLE.ebipla(hierarchical, optim, num_particles=N, step_size=step_size)

    coarse, fine = (_theta(affine) for affine in law(make, Y, steps=[2e-3, 1e-3]))
    np.testing.assert_allclose(2 * fine - coarse, 2 / (D * N), rtol=1e-4)


ALGORITHMS = {
    "pgd": ParticleMMLE.pgd(hierarchical, num_particles=2, step_size=0.2),
    "ipla": ParticleMMLE.ipla(hierarchical, num_particles=2, step_size=0.2),
    "ebipla": ParticleMMLE.ebipla(hierarchical, num_particles=2, step_size=0.2),
    "soul": ParticleMMLE.soul(hierarchical, num_moves=2, step_size=0.2),
    "pqn": ParticleMMLE.pqn(hierarchical, num_particles=2, step_size=0.2),
    "pmgd": ParticleMMLE.pmgd(hierarchical, num_particles=2, step_size=0.2),
    "kiplmc1": ParticleMMLE.kiplmc1(hierarchical, num_particles=2, step_size=0.2, friction=2.0),
    "kiplmc2": ParticleMMLE.kiplmc2(hierarchical, num_particles=2, step_size=0.2, friction=2.0),
    "mpd": ParticleMMLE.mpd(hierarchical, num_particles=2, step_size=0.2, friction=2.0),
}


@pytest.fixture(scope="module")
def propagated():
    """The law of every algorithm at one step size."""
    with jax.enable_x64(True):
        return {name: law(engine, Y) for name, engine in ALGORITHMS.items()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_mean_of_the_parameters_is_the_maximum_at_a_finite_step(propagated, name):
    # guards against: a drift that is not that of the model
    affine = propagated[name]
    np.testing.assert_allclose(affine.mean[_places(affine.at["unconstrained"])], Y.mean(), rtol=1e-7)
    x = affine.mean[_places(affine.at["particles"])].reshape(-1, D)
    np.testing.assert_allclose(x, np.broadcast_to((Y + Y.mean()) / 2, x.shape), rtol=1e-7)
    assert affine.spectral_radius < 1


def test_the_spread_of_the_parameters_falls_as_the_root_of_the_number_of_particles():
    # guards against: a mean over particles forgotten in the drift or in the noise
    numbers = np.array([1, 2, 4, 8, 16])
    for name in ("ipla", "pgd"):
        spread = [np.sqrt(_theta(law(_engine(name, int(n)), Y[:2], steps=[0.1])[0])) for n in numbers[:: 1 if name == "ipla" else 2]]
        counts = numbers[:: 1 if name == "ipla" else 2]
        assert np.polyfit(np.log(counts), np.log(spread), 1)[0] == pytest.approx(-0.5, abs=1e-8)


# ---- Step limits ---------------------------------------------------------------------------------------------------------

SUMMED = 4 / (D + 2 + np.sqrt(D**2 + 4))
AVERAGED = 4 / (3 + np.sqrt(5))  # .7639 for every number of data


@pytest.mark.parametrize(("name", "limit"), [("pgd", SUMMED), ("ipla", SUMMED), ("ebipla", AVERAGED), ("pqn", AVERAGED), ("pmgd", 1)])
def test_the_update_is_stable_up_to_the_step_limit_and_not_above(name, limit):
    # guards against: an update that is not the explicit Euler step
    below, above = law(_engine(name, 2), Y, steps=[0.999 * limit, 1.001 * limit])
    assert below.spectral_radius < 1 < above.spectral_radius


@pytest.mark.parametrize(("name", "best"), [("pgd", 2 / (D + 2)), ("pqn", 2 / 3), ("pmgd", 2 / 3)])
def test_the_fastest_step_is_the_best_for_a_quadratic(name, best):
    slow, fastest, large = law(_engine(name, 2), Y, steps=[0.98 * best, best, 1.02 * best])
    assert fastest.spectral_radius < min(slow.spectral_radius, large.spectral_radius)


def test_stability_limit_is_that_of_the_particles():
    engine = ALGORITHMS["pgd"]
    assert engine.stability_limit(engine.init(KEY, Y), Y) == pytest.approx(1.0)  # posterior precision 2


# ---- The random stream ---------------------------------------------------------------------------------------------------


def simulate(engine, num_chains, num_steps, *args):
    """The last states of independent fits."""

    def end(key):
        state = engine.init(key, *args)
        return lax.scan(lambda state, _: (engine.update(state, *args)[0], None), state, length=num_steps)[0]

    return jax.jit(jax.vmap(end))(jax.random.split(KEY, num_chains))


@pytest.mark.parametrize("name", ["ipla", "ebipla", "soul", "kiplmc1", "kiplmc2", "mpd"])
def test_simulation_has_the_propagated_covariance(propagated, name):
    # guards against: one key for two draws, or for two steps; noise shared by particles
    affine, num_chains = propagated[name], 4000
    state = simulate(ALGORITHMS[name], num_chains, 150 if name != "mpd" else 250, Y)
    parts = {field: eqx.filter(getattr(state, field), eqx.is_inexact_array) for field in ALL}
    z = np.asarray(jax.vmap(lambda parts: ravel_pytree(parts)[0])(parts))
    exact = affine.covariance
    error = np.sqrt((np.outer(np.diag(exact), np.diag(exact)) + exact**2) / num_chains)
    assert (abs(np.cov(z.T) - exact) / error).max() < 5
    assert (abs(z.mean(0) - affine.mean) / np.sqrt(np.diag(exact) / num_chains)).max() < 5


# ---- Minibatches ---------------------------------------------------------------------------------------------------------


def resting(y, index):
    """Particles whose law is N(0, 1/2) whatever the parameter; the batch comes from outside."""
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


def batch_steps(model, batches, **settings):
    """The affine maps of the particles for every batch."""
    y = np.arange(float(1 + batches.max()))
    engine = ParticleMMLE(model, optax.set_to_zero(), 1, settings.pop("step_size"), **settings)
    state = engine.init(KEY, y, batches[0])
    steps = jax.jit(jax.vmap(lambda index: affine_step(engine, state, y, index, moving=("particles",))[0]))(jnp.asarray(batches))
    return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), steps) for i in range(len(batches))]


@pytest.mark.parametrize(("noise", "after"), [("batch", 0.625), ("all", 0.36 * 0.625 + 0.04)])
def test_cyclic_batches_meet_the_law_of_plain_langevin_before_their_drift(noise, after):
    # c = 2, h = .2, L = 10: 1 / (c (1 - hc/2)) = .625 before, .225 after the drift, and then noise. Guards against: sqrt(2h) on
    # all particles (L times too wide) and sqrt(2h/L) on the batch alone (L times too narrow), a scaled particle drift
    steps = batch_steps(resting, np.arange(10)[:, None], noise=noise, step_size=0.2)
    epoch, sum_of_noise = np.eye(10), np.zeros((10, 10))
    for step in steps:
        epoch, sum_of_noise = step.matrix @ epoch, step.matrix @ sum_of_noise @ step.matrix.T + step.noise
    covariance = solve_discrete_lyapunov(epoch, sum_of_noise)
    for row, step in enumerate(steps):
        np.testing.assert_allclose(covariance[row, row], 0.625, **EXACT)
        covariance = step.matrix @ covariance @ step.matrix.T + step.noise
        np.testing.assert_allclose(covariance[row, row], after, **EXACT)


@pytest.mark.parametrize("noise", ["batch", "all"])
def test_batches_drawn_by_the_plate_give_the_law_of_plain_langevin(noise):
    # v = p (1 - hc)^2 v + (1 - p) v + 2 h p after the noise, p = B / M. Guards against: the same batch at every step, rows
    # scattered to other places, particles outside the batch that drift
    engine = ParticleMMLE(resting_at_random, optax.set_to_zero(), 2, 0.3, noise=noise)
    x = np.asarray(simulate(engine, 3000, 60, np.zeros(6)).particles["x"])
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


@pytest.mark.parametrize(("drift", "per_row"), [("sum", 3.0), ("mean", 0.5)])
def test_the_scale_of_a_plate_counts_for_the_parameters_and_not_for_the_particles(drift, per_row):
    # guards against: particles of a batch that drift M / B times too far, a parameter gradient that forgets the other batches
    y, index, h = np.arange(6.0), np.array([4, 1]), 0.1
    engine = ParticleMMLE(hierarchical_rows, optax.sgd(h), 1, h, drift=drift)
    step = affine_step(engine, engine.init(KEY, y, index), y, index)[0]
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
    """The prior N(loc, 1) written as exp(loc x) N(x; 0, 1), whose normaliser exp(loc^2 / 2) is not told."""
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -loc * x))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


class _Chains(NamedTuple):
    position: Any


@dataclass(frozen=True)
class FromTilt:
    """Chains of the linear tilt at its mean, which is the score at 0, or drawn around it with variance 1."""

    draw: bool = False

    def init(self, position, log_prob=None):
        return _Chains(position)

    def run(self, rng_key, log_prob, state):
        x = lax.stop_gradient(state.position)
        mean = jax.grad(lambda x: log_prob(x).sum())(jnp.zeros_like(x))
        # looked up here, for the feed takes its place
        return _Chains(mean + particle_mmle.normal_like(rng_key, x) if self.draw else mean)


def _tilted_ebipla(step_size, sampler, num_chains=1):
    phase = negative_phase(tilted, num_chains=num_chains, sampler=sampler, persistent=False)
    return ParticleMMLE.ebipla(phase, num_particles=3, step_size=step_size)


def test_an_energy_prior_with_exact_chains_moves_as_the_normalised_model():
    # guards against: the sign or the scale of d log Z, a normaliser for the whole plate, one per particle
    (energy,) = law(lambda h: _tilted_ebipla(h, FromTilt()), Y, steps=[0.1])
    (normal,) = law(_engine("ebipla", 3), Y, steps=[0.1])
    for ours, exact in zip(energy[:3], normal[:3], strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-12)


def test_independent_chains_add_their_share_to_the_variance():
    # 5/6 h Var(prior) / M from M chains, to first order in h. Guards against: chains averaged over particles too
    h = 1e-3
    draws, means = (
        _theta(law(lambda h, draw=draw: _tilted_ebipla(h, FromTilt(draw), D), Y, steps=[h])[0]) for draw in (True, False)
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
    engine = ParticleMMLE.ebipla(tilted, num_particles=1, step_size=0.1, num_chains=1, prior_step_size=0.1, num_prior_steps=num_steps)
    with mock.patch.object(jax.random, "normal", lambda key, shape=(), dtype=float: jnp.zeros(shape, dtype)):
        return law(engine, Y)


S, S2 = 3.0, 1.0  # variance of the data, variance of their noise
PAIR = np.sqrt(S) * np.array([-1.0, 1.0])


def precise(y):
    """The energy tau x^2 / 2: the maximum is 1 / tau = S - S2."""
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", EnergyDistribution(lambda x: tau * x**2 / 2, initial=dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, jnp.sqrt(S2)), obs=y)


@dataclass(frozen=True)
class Stationary:
    """Two chains with the variance of a stationary unadjusted chain on a quadratic; the exact one for step 0."""

    step_size: float

    def init(self, position, log_prob=None):
        return _Chains(position)

    def run(self, rng_key, log_prob, state):
        c = -jax.grad(lambda x: log_prob(x).sum())(jnp.ones_like(state.position))[0]
        return _Chains(lax.stop_gradient(jnp.array([-1.0, 1.0]) / jnp.sqrt(c * (1 - self.step_size * c / 2))))


def root(engine, args, name, low, high, step=lambda engine, state, args: engine._step(state, args, {})[0]):
    """Where a positive parameter rests, its particles at the law that the engine's own moves have there.

    Two particles per datum, a deviation below and above the mean, have the mean and the square of that law.
    """

    @jax.jit
    def drift(value):
        state = engine.init(KEY, *args, init_params={name: value})
        moves, _, _ = affine_step(engine, state, *args, moving=("particles",))
        a, q = jnp.diag(moves.matrix), jnp.diag(moves.noise)
        cloud = (moves.offset / (1 - a)).reshape(2, -1) + jnp.sqrt(q / (1 - a**2)).reshape(2, -1) * jnp.array([[-1.0], [1.0]])
        (site,) = state.particles
        new = step(engine, state._replace(particles={site: cloud}), args)
        return (new.unconstrained[name] - state.unconstrained[name]).squeeze()

    values = jax.vmap(drift)(jnp.linspace(low, high, 200))
    assert int((jnp.diff(jnp.sign(values)) != 0).sum()) <= 1
    return brentq(lambda value: float(drift(value)), low, high, xtol=1e-12) if values[0] * values[-1] < 0 else None


FIXED_POINTS = [
    (0.1, 0.0, 0.47237),
    (0.05, 0.0, 0.48606),
    (0.0, 0.1, 0.53208),
    (0.0, 0.05, 0.51497),
    (0.05, 0.05, 0.49963),
    (0.1, 0.1, 0.49845),
]


@pytest.mark.parametrize(("h", "gamma", "told"), FIXED_POINTS)
def test_unadjusted_particles_and_chains_bias_the_precision_by_the_known_amount(h, gamma, told):
    # guards against: the posterior's and the prior's term exchanged, a half lost, the log transform of the parameter
    phase = negative_phase(precise, num_chains=2, sampler=Stationary(gamma), persistent=False)
    engine = ParticleMMLE.ebipla(phase, optax.sgd(1.0), num_particles=2, step_size=h or 1e-9)
    tau = root(engine, (PAIR,), "tau", 0.2, 0.9)
    rho = tau + 1 / S2
    posterior = S / (S2**2 * rho**2) + 1 / (rho * (1 - h * rho / 2))
    np.testing.assert_allclose(posterior, 1 / (tau * (1 - gamma * tau / 2)), rtol=1e-7)
    assert tau == pytest.approx(told, abs=6e-6)


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


def _exact_short_run(num_steps, h):
    def step(engine, state, args):
        with (
            mock.patch.object(jax.random, "normal", _Design()),
            mock.patch.object(samplers, "lax", SimpleNamespace(scan=_unrolled, stop_gradient=lax.stop_gradient)),
            _fed(_Feed()),
        ):
            return engine._step(state, args, {})[0]

    engine = ParticleMMLE.ebipla(
        precise,
        optax.sgd(1.0),
        num_particles=2,
        step_size=h,
        num_chains=2 * (num_steps + 1),
        prior_step_size=0.1,
        num_prior_steps=num_steps,
    )
    return root(engine, (PAIR,), "tau", 1e-3, 3.0, step)


@pytest.mark.parametrize(("num_steps", "h", "told"), [(20, 0.1, 0.3567), (20, 0.01, 0.3982)])
def test_short_run_chains_bias_the_precision_by_the_known_amount(num_steps, h, told):
    # guards against: chains of another length or start, the noise of unadjusted Langevin, prior and posterior exchanged
    tau = _exact_short_run(num_steps, h)
    rho, q = tau + 1 / S2, (1 - 0.1 * tau) ** 2
    posterior = S / (S2**2 * rho**2) + 1 / (rho * (1 - h * rho / 2))
    np.testing.assert_allclose(posterior, q**num_steps + 0.2 * (1 - q**num_steps) / (1 - q), rtol=1e-7)
    assert tau == pytest.approx(told, abs=6e-5)


def test_very_short_chains_have_no_fixed_point():
    # five steps never spread as far as the posterior: the precision falls without end
    assert _exact_short_run(5, 0.1) is None


def test_the_biased_fixed_point_is_where_training_ends():
    # 20 steps and h = .1 rest at .3567, far from the maximum .5. Guards against: chains that are not those of the model
    y = np.tile(PAIR, 50)
    engine = ParticleMMLE.ebipla(
        precise, optax.sgd(0.5), num_particles=10, step_size=0.1, num_chains=200, prior_step_size=0.1, num_prior_steps=20
    )
    taus = engine.run(KEY, 3000, y, progress_bar=False, collect=lambda state: state.params["tau"]).collected
    parts = np.asarray(taus)[600:].reshape(24, 100).mean(1)  # 100 steps apart they are independent
    assert abs(parts.mean() - 0.3567) < 5 * parts.std() / np.sqrt(len(parts)) + 0.003  # the curvature's share, about 1 / 200
    assert parts.std() / np.sqrt(len(parts)) < 0.005


@pytest.mark.parametrize("drift", ["sum", "mean"])
def test_the_gradient_of_a_tilted_prior_is_that_of_quadrature(drift):
    # f = a x - b x^2/2 + c tanh x over N(0, 1), y ~ N(w x, s2). Guards against: the sign of the normaliser's gradient
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
        engine = ParticleMMLE(phase, optax.sgd(1.0), 1, 0.1, drift=drift)
        state = engine.init(KEY, jnp.array([y]))
        new, _, _ = engine._step(state._replace(particles={"x": x[None, None]}), (jnp.array([y]),), {})
        return jax.tree.map(jnp.subtract, new.unconstrained, state.unconstrained)

    grid = jnp.linspace(-12, 12, 2001)
    prior = tilt(params, grid) - grid**2 / 2
    posterior = prior - (y - params["w"] * grid) ** 2 / (2 * s2)
    zero = jnp.zeros_like(grid)
    by_particle, by_chain, none = (jax.jit(jax.vmap(gradient))(*at) for at in ((grid, zero), (zero, grid), (zero, zero)))
    for name, value in told.items():
        mean = jax.nn.softmax(posterior) @ by_particle[name] + jax.nn.softmax(prior) @ by_chain[name] - none[name][0]
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

    squares = []
    for h in (0.05, 1e-5):
        engine = ParticleMMLE.pgd(model, optax.sgd(1.0), num_particles=2, step_size=h)
        squares.append(root(engine, (y,), "w", 0.5, 2.0) ** 2)
        np.testing.assert_allclose(squares[-1], s2 * (spread / (s2 + h * spread / 2) - 1), rtol=1e-8)
    assert squares[0] == pytest.approx(1.7222, abs=6e-5)
    assert (squares[1] - 2) / 1e-5 == pytest.approx(-(spread**2) / (2 * s2), rel=1e-3)  # O(h)


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
    engine = ParticleMMLE(model, optax.sgd(0.05), 20, 0.004, drift="mean")
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
        noise = normal_like(jax.random.split(move_key, 1)[0], {"x": x})["x"]
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
    def model(y, scale):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, scale), obs=y)

    scale, order = np.array([0.5, 1.0, 1.5, 2.0]), np.array([2, 0, 3, 1])
    engine = ParticleMMLE.ipla(model, num_particles=2, step_size=0.05)
    plain, permuted = law(engine, Y, scale), law(engine, Y[order], scale[order])
    z = np.arange(len(plain.offset))
    z[_places(plain.at["particles"])] = plain.at["particles"]["x"][:, order].ravel()
    np.testing.assert_allclose(permuted.matrix, plain.matrix[np.ix_(z, z)], atol=1e-12)
    np.testing.assert_allclose(permuted.noise, plain.noise[np.ix_(z, z)], atol=1e-12)
    np.testing.assert_allclose(permuted.offset, plain.offset[z], atol=1e-12)


def _regression(t):
    """Two parameters whose Hessian is not diagonal: the maximum for a cloud is least squares on its mean."""
    a, b = numpyro.param("a", 0.5), numpyro.param("b", -1.0)
    with numpyro.plate("data", len(t)):
        x = numpyro.sample("x", dist.Normal(a + b * t, 0.7))
        numpyro.sample("y", dist.Normal(x, 1), obs=jnp.sin(t))


T = np.array([-1.0, 0.2, 1.5, 4.0])


def _least_squares(x):
    return np.linalg.lstsq(np.stack([np.ones(4), T], 1), np.asarray(x).mean(0), rcond=None)[0]


@pytest.mark.parametrize("drift", ["sum", "mean"])
def test_pqn_goes_a_step_towards_least_squares(drift):
    # guards against: a diagonal Hessian, a direction divided by the number of data, the cloud after its move
    engine = ParticleMMLE.pqn(_regression, num_particles=3, step_size=0.2, drift=drift)
    start = engine.init(KEY, T)
    end, _ = engine.update(start, T)
    before = np.array([0.5, -1.0])
    target = before + 0.2 * (_least_squares(start.particles["x"]) - before)
    np.testing.assert_allclose([end.params["a"], end.params["b"]], target, rtol=1e-10)


def test_pmgd_stands_at_the_maximum_for_its_cloud():
    # guards against: the cloud before its move, L-BFGS stopped early
    engine = ParticleMMLE.pmgd(_regression, num_particles=3, step_size=0.2)
    state, _ = engine.update(engine.init(KEY, T), T)
    np.testing.assert_allclose([state.params["a"], state.params["b"]], _least_squares(state.particles["x"]), rtol=1e-8)


def test_pmgd_finds_a_maximum_that_is_not_of_a_quadratic():
    # sd^2 = mean of x^2, through the log transform of sd. Guards against: a single Newton step
    def model(y):
        sd = numpyro.param("sd", 5.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, sd))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    engine = ParticleMMLE.pmgd(model, num_particles=3, step_size=0.1)
    state, _ = engine.update(engine.init(KEY, Y), Y)
    np.testing.assert_allclose(state.params["sd"], np.sqrt(np.mean(np.square(state.particles["x"]))), rtol=1e-7)


# ---- Kinetic dynamics ----------------------------------------------------------------------------------------------------

KINETIC = {"kiplmc1": [(0.1, 0.10555), (0.05, 0.10263), (0.01, 0.10051)], "kiplmc2": [(0.1, 0.100505), (0.05, 0.100125), (0.01, 0.100005)]}


@pytest.mark.parametrize("name", KINETIC)
def test_kinetic_parameters_have_the_known_variances(name):
    # exact .1; bias O(h) and O(h^2). Guards against: covariances of position and velocity exchanged, and every factor in them
    for h, told in KINETIC[name]:
        engine = getattr(ParticleMMLE, name)(hierarchical, num_particles=N, step_size=h, friction=2.0)
        affine = law(engine, Y)
        assert _theta(affine) == pytest.approx(told, abs=6e-6 if name == "kiplmc1" else 6e-7)
    variances = [_x(affine), affine.variance(affine.at["optim_state"]), affine.variance(affine.at["dynamics_state"])]
    np.testing.assert_allclose(variances, [1 / 2 + 1 / (2 * N * D), 1 / N, 1], rtol=0.011)  # h = .01


def test_mpd_approaches_the_law_of_its_diffusion():
    # guards against: noise on the parameters, the look-ahead on the particles, the inverse mass on one of both
    gamma, eta = 0.9, 2.0
    drift = np.array([[0, eta, 0, 0], [-D, -gamma * eta, D, 0], [0, 0, 0, eta], [1, 0, -2, -gamma * eta]])  # loc, m, mean x, mean u
    exact = solve_continuous_lyapunov(drift, -np.diag([0, 0, 0, 2 * gamma / (D * N)]))
    coarse, fine = (
        _theta(law(ParticleMMLE.mpd(hierarchical, num_particles=N, step_size=h, friction=gamma, inverse_mass=eta), Y))
        for h in (4e-3, 2e-3)
    )
    np.testing.assert_allclose(2 * fine - coarse, exact[0, 0], rtol=1e-3)


def test_parameters_that_look_ahead_have_no_noise():
    engine = ParticleMMLE.mpd(hierarchical, kinetic_langevin(0.1, 2.0), num_particles=2, step_size=0.1)
    with_noise, without = law(engine, Y), law(ParticleMMLE.mpd(hierarchical, num_particles=2, step_size=0.1), Y)
    at = _places(without.at["unconstrained"])
    assert without.noise[at, at] == 0 < with_noise.noise[at, at]
