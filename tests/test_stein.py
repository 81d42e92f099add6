# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The kernelized Stein discrepancy against autodiff, quadrature, closed forms of Gaussians and enumeration of batches."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from helpers import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from numpyro_ebm import EnergyDistribution, IMQKernel, KernelSteinDiscrepancy, RBFKernel, ScoreMatching, ksd_test
from numpyro_ebm.objectives.stein import stein_matrix

KEY = jax.random.key(3)
KERNELS = (RBFKernel(0.8), IMQKernel(0.7), IMQKernel(1.3, -0.8))


pytestmark = pytest.mark.usefixtures("double_precision")


def value(kernel, x, y):
    """The kernel as it is written in the books."""
    r2 = ((x - y) ** 2).sum()
    if isinstance(kernel, RBFKernel):
        return jnp.exp(-r2 / (2 * kernel.bandwidth**2))
    return (1 + r2 / kernel.scale**2) ** kernel.exponent


def u_by_autodiff(kernel, x, y, s, t):
    def k(x, y):
        return value(kernel, x, y)

    trace = jnp.trace(jax.jacfwd(jax.grad(k, 1))(x, y))
    return k(x, y) * s @ t + s @ jax.grad(k, 1)(x, y) + t @ jax.grad(k, 0)(x, y) + trace


@partial(jax.jit, static_argnums=0)
def all_u_by_autodiff(kernel, v, s):
    over_second = jax.vmap(lambda x, y, s, t: u_by_autodiff(kernel, x, y, s, t), (None, 0, None, 0))
    return jax.vmap(over_second, (0, None, 0, None))(v, v, s, s)


def score_with(theta):
    """A score that is not linear, with a parameter."""
    return lambda v: -theta * v + jnp.sin(v) * theta**2 + 0.3


def loss(objective, score_fn, v):
    return objective.loss(score_fn, KEY, v, v)


def hermite(mean, covariance, degree):
    x, w = np.polynomial.hermite_e.hermegauss(degree)
    nodes = np.array(list(itertools.product(x, repeat=len(mean))))
    weights = np.prod(list(itertools.product(w, repeat=len(mean))), 1)
    return jnp.asarray(mean + nodes @ np.linalg.cholesky(covariance).T), jnp.asarray(weights / weights.sum())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("d", [1, 3])
def test_stein_matrix_is_its_definition_by_autodiff(kernel, d):
    # Catches a wrong sign or factor of any of the four terms, the dimension left out of the trace, and a wrong diagonal.
    v, s = normal(0, 5, d), normal(1, 5, d)
    u, length = stein_matrix(kernel, v, s)
    np.testing.assert_allclose(u, all_u_by_autodiff(kernel, v, s), rtol=1e-10, atol=1e-12)
    assert length == kernel.length


@pytest.mark.parametrize("kernel", KERNELS)
def test_profile_holds_the_derivatives_of_the_kernel_in_the_squared_distance(kernel):
    # Catches a chain rule half done in a kernel: the second derivative alone, say.
    def k(r2):
        return value(kernel, jnp.sqrt(r2)[None], jnp.zeros(1))

    for r2 in (0.3, 2.0):
        got = kernel.profile(jnp.asarray(r2), kernel.length)
        np.testing.assert_allclose(got, (k(r2), jax.grad(k)(r2), jax.grad(jax.grad(k))(r2)), rtol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mean_under_the_model_is_zero_in_either_argument(kernel):
    # Catches a Stein kernel that does not vanish at the truth: then the discrepancy is least somewhere else.
    def log_p(x):
        return jnp.logaddexp(-((x - 1) ** 2), -((x + 2) ** 2) / 1.5)

    grid = jnp.linspace(-14, 14, 1501)
    w = jax.nn.softmax(log_p(grid))  # the trapezoid rule of a smooth density on all of its mass: exact to rounding
    u, _ = stein_matrix(kernel, grid[:, None], jax.vmap(jax.grad(log_p))(grid)[:, None])
    assert jnp.abs(u).max() > 1
    np.testing.assert_allclose(u @ w, 0, atol=1e-9)
    np.testing.assert_allclose(w @ u, 0, atol=1e-9)


@pytest.mark.parametrize(
    ("mean", "covariance", "mu", "precision"),
    [
        ([0.4], [[1.2]], [-0.1], [[0.7]]),
        ([0.3, -0.5], [[1.2, 0.4], [0.4, 0.7]], [-0.2, 0.1], [[1.5, -0.3], [-0.3, 0.8]]),
    ],
)
def test_discrepancy_of_two_gaussians_is_the_closed_form(mean, covariance, mu, precision):
    # E k(v, v') (s - s*)(v) . (s - s*)(v') with s - s* = A v + c; v + v' and v - v' are independent, and the kernel is a Gaussian
    # factor on the second. Catches whatever the definition has wrong as a whole: no derivative of the kernel occurs here.
    mean, covariance, mu, precision = (np.array(x) for x in (mean, covariance, mu, precision))
    b, identity = 1.5, np.eye(len(mean))
    data_precision = np.linalg.inv(covariance)
    A, c = data_precision - precision, precision @ mu - data_precision @ mean
    tilted = np.linalg.inv(data_precision + 2 * identity / b**2)
    factor = np.linalg.det(identity + 2 * covariance / b**2) ** -0.5
    exact = factor * (np.trace(A.T @ A @ (covariance - tilted)) / 2 + np.sum((A @ mean + c) ** 2))
    v, w = hermite(mean, covariance, 60 if len(mean) == 1 else 30)
    u, _ = stein_matrix(RBFKernel(b), v, (mu - v) @ precision)
    np.testing.assert_allclose(w @ u @ w, exact, rtol=1e-6)
    assert exact > 0.01


SUPPORT, MASS = np.array([-1.0, 0.2, 1.5]), np.array([0.5, 0.2, 0.3])
POINTS = np.stack([SUPPORT, SUPPORT[::-1] ** 2], 1)  # three events in the plane


def over_batches(n, f):
    """The exact mean of ``f(batch)`` over all batches of independent draws from three points."""
    index = np.array(list(itertools.product(range(3), repeat=n)))
    values = jax.jit(jax.vmap(f))(POINTS[index])
    return jnp.tensordot(jnp.asarray(MASS[index].prod(1)), values, 1)


@pytest.mark.parametrize("pairs", ["all", "halves"])
@pytest.mark.parametrize("kernel", KERNELS[:2])
def test_u_statistic_and_its_gradient_are_unbiased_over_all_batches(kernel, pairs):
    # Catches a diagonal that is counted, a wrong number of pairs, and halves with another expectation than all pairs.
    objective = KernelSteinDiscrepancy(kernel, pairs=pairs)

    def population(theta):
        u, _ = stein_matrix(kernel, POINTS, score_with(theta)(POINTS))
        return MASS @ u @ MASS

    def statistic(theta, v):
        return loss(objective, score_with(theta), v).mean()

    found = over_batches(4, lambda v: jnp.stack(jax.value_and_grad(statistic)(1.2, v)))
    np.testing.assert_allclose(found, jax.value_and_grad(population)(1.2), rtol=1e-10)


def test_v_statistic_is_too_large_by_its_share_of_the_diagonal():
    # Catches a V that leaves the diagonal out, or a weight of it other than 1/n.
    kernel, n = IMQKernel(0.7), 3
    u, _ = stein_matrix(kernel, POINTS, score_with(1.2)(POINTS))
    found = over_batches(n, lambda v: loss(KernelSteinDiscrepancy(kernel, "V"), score_with(1.2), v).mean())
    np.testing.assert_allclose(found, MASS @ u @ MASS * (n - 1) / n + MASS @ jnp.diag(u) / n, rtol=1e-10)


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 1, 2)])
@pytest.mark.parametrize("kernel", KERNELS[:2])
def test_loss_of_a_row_is_its_mean_over_the_others(kernel, event_shape):
    # Catches rows and columns mixed up by a reshape, and a loss whose rows do not belong to the rows of the batch.
    v = normal(5, 6, *event_shape)
    u = np.array(all_u_by_autodiff(kernel, v.reshape(6, -1), score_with(1.2)(v).reshape(6, -1)))
    np.testing.assert_allclose(loss(KernelSteinDiscrepancy(kernel, "V"), score_with(1.2), v), u.mean(1), rtol=1e-9)
    halves = u[[0, 1, 2], [3, 4, 5]]
    found = loss(KernelSteinDiscrepancy(kernel, pairs="halves"), score_with(1.2), v)
    np.testing.assert_allclose(found, np.concatenate([halves, halves]), rtol=1e-9)
    np.fill_diagonal(u, 0)
    np.testing.assert_allclose(loss(KernelSteinDiscrepancy(kernel), score_with(1.2), v), u.sum(1) / 5, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.floats(0.05, 20), spread=st.floats(0.01, 100), which=st.sampled_from([0, 1]))
def test_v_statistic_is_never_negative(seed, length, spread, which):
    # Catches any error that breaks positive definiteness: scores here have nothing to do with the rows.
    with jax.enable_x64(True):
        kernel = (RBFKernel, IMQKernel)[which](length)
        v, s = normal(seed, 7, 2), spread * normal(seed + 1, 7, 2)
        u, _ = stein_matrix(kernel, v, s)
        assert jnp.linalg.eigvalsh(u)[0] >= -1e-10 * jnp.trace(u)
        assert loss(KernelSteinDiscrepancy(kernel, "V"), lambda v: s, v).mean() >= -1e-10 * jnp.trace(u)


def test_full_gradient_is_twice_the_surrogate_of_the_published_code():
    # The surrogate holds z = k s(v) + grad_v k and differentiates z . s(v') alone. Catches half a gradient passed off as all of it.
    kernel, v = RBFKernel(0.8), normal(6, 6, 2)

    def surrogate(theta, i, j):
        k, slope = jax.value_and_grad(lambda x: value(kernel, x, v[j]))(v[i])
        return jax.lax.stop_gradient(k * score_with(theta)(v[i]) + slope) @ score_with(theta)(v[j])

    def sum_over(pairs):
        return sum(jax.grad(surrogate)(1.2, i, j) for i, j in pairs)

    def full(objective):
        return jax.grad(lambda theta: loss(objective, score_with(theta), v).mean())(1.2)

    ordered = list(itertools.permutations(range(6), 2))
    np.testing.assert_allclose(full(KernelSteinDiscrepancy(kernel)), 2 * sum_over(ordered) / 30, rtol=1e-10)
    first, second = [(i, i + 3) for i in range(3)], [(i + 3, i) for i in range(3)]
    halves = (sum_over(first) + sum_over(second)) / 3
    np.testing.assert_allclose(full(KernelSteinDiscrepancy(kernel, pairs="halves")), halves, rtol=1e-10)


def noisy_score(theta, value_noise, slope_noise):
    """Unbiased estimates of the score -theta v and of its gradient, by row: what an estimate from draws of latents is."""
    return lambda v: (
        jax.lax.stop_gradient(-theta * v + value_noise) - v * (1 + slope_noise) * (theta - jax.lax.stop_gradient(theta))
    )


def over_noise(objective, v, shared):
    """Exact means of value and gradient over all signs of the noise of three rows, with value and slope of a row apart or one."""
    signs = jnp.asarray(list(itertools.product([-0.5, 0.5], repeat=3)))[:, :, None]

    def one(a, b):
        return jnp.stack(jax.value_and_grad(lambda theta: loss(objective, noisy_score(theta, a, b), v).mean())(1.2))

    if shared:
        return jax.vmap(one)(signs, signs).mean(0)
    return jax.vmap(lambda a: jax.vmap(lambda b: one(a, b))(signs))(signs).mean((0, 1))


@pytest.mark.parametrize("shared", [False, True])
def test_noise_of_the_score_biases_v_and_leaves_u_unbiased(shared):
    # Catches a U with the diagonal, and the claim of the docstring being wrong: noise of .5 in one of one dimension.
    v = normal(7, 3, 1) + 1
    for statistic in ("U", "V"):
        objective = KernelSteinDiscrepancy(RBFKernel(0.8), statistic)
        exact = jax.value_and_grad(lambda theta, o=objective: loss(o, lambda v: -theta * v, v).mean())(1.2)
        found, slope = over_noise(objective, v, shared)
        extra = 0.25 / 3 if statistic == "V" else 0  # k(v, v) = 1, variance of the noise 1/4, three rows
        # with one draw for both, E 2 (value noise) (gradient noise) = 2 * 1/4 * (-v) comes on top
        extra_slope = float(-2 * 0.25 * v.mean() / 3) if statistic == "V" and shared else 0
        np.testing.assert_allclose(found, exact[0] + extra, rtol=1e-10)
        np.testing.assert_allclose(slope, exact[1] + extra_slope, rtol=1e-9)
    assert abs(v.mean()) > 0.1


@pytest.mark.parametrize("pairs", ["all", "halves"])
def test_constant_of_the_energy_changes_nothing(pairs):
    # Catches a use of the energy's value, which is known up to log Z(theta) only.
    v, objective = normal(8, 6, 2), KernelSteinDiscrepancy(IMQKernel(), pairs=pairs)

    def statistic(theta, constant):
        energy = lambda v: (theta * v**4).sum() + constant(theta)  # noqa: E731
        return loss(objective, jax.vmap(jax.grad(lambda v: -energy(v))), v).mean()

    plain, shifted = (jax.value_and_grad(statistic)(0.7, constant) for constant in (jnp.zeros_like, jnp.exp))
    assert plain == shifted


@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("kernel", [RBFKernel, IMQKernel])
def test_median_heuristic_is_the_median_distance_of_the_pairs(kernel, n):
    # Catches the zeros of the diagonal in the median, squares for distances, and a wrong middle of an even number.
    v = normal(9, n, 3)
    distances = [np.linalg.norm(v[i] - v[j]) for i, j in itertools.combinations(range(n), 2)]
    u, length = stein_matrix(kernel(), v, -v)
    np.testing.assert_allclose(length, np.median(distances), rtol=1e-12)
    np.testing.assert_allclose(u, stein_matrix(kernel(float(length)), v, -v)[0], rtol=1e-12)
    if n % 2 == 0:
        median = float(np.median([np.linalg.norm(v[i] - v[i + n // 2]) for i in range(n // 2)]))
        found, fixed = (loss(KernelSteinDiscrepancy(k, pairs="halves"), score_with(1.2), v) for k in (kernel(), kernel(median)))
        np.testing.assert_allclose(found, fixed, rtol=1e-12)


def test_no_gradient_flows_through_the_median():
    # Catches a bandwidth that learns: rows may depend on parameters, as those of a generator.
    v = normal(10, 5, 2)
    length = float(stein_matrix(RBFKernel(), v, -v)[1])
    of_median, of_fixed = (jax.grad(lambda v, k=k: stein_matrix(k, v, -v)[0].sum())(v) for k in (RBFKernel(), RBFKernel(length)))
    np.testing.assert_allclose(of_median, of_fixed, rtol=1e-10)


def test_far_from_the_origin_single_precision_is_enough():
    # Catches distances as differences of squares that were not centered first: at 1000 they would be rounded to .06.
    with jax.enable_x64(False):
        v = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)), jnp.float32)
        near, far = (stein_matrix(RBFKernel(0.5), v + shift, -v)[0] for shift in (0.0, 1000.0))
        assert near.dtype == jnp.float32
        # v + 1000 itself is rounded to 3e-5, which the curvature 1 / .5^4 of the kernel enlarges
        np.testing.assert_allclose(far, near, atol=1e-2)


@pytest.mark.parametrize("objective", [KernelSteinDiscrepancy(IMQKernel()), KernelSteinDiscrepancy(pairs="halves")])
def test_memory_is_that_of_gram_matrices(objective):
    # Catches an array of all differences, (batch, batch, d), which a few thousand images have no memory for.
    v = jnp.ones((6, 784))
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda theta: loss(objective, score_with(theta), v).mean()))(1.2))
    assert "6,784" in jaxpr
    assert not re.findall(r"\[\d+,\d+,\d+", jaxpr)


@pytest.mark.parametrize("objective", [KernelSteinDiscrepancy(), KernelSteinDiscrepancy(IMQKernel(), pairs="halves")])
def test_jit_and_vmap_change_nothing(objective):
    # Catches a value read out while tracing, and a batch axis that vmap meets.
    v = normal(11, 3, 4, 2)
    one_by_one = jnp.stack([loss(objective, score_with(1.2), v) for v in v])
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda v: loss(objective, score_with(1.2), v)))(v), one_by_one, rtol=1e-10)


def test_engine_fits_a_gaussian_at_the_minimum_of_the_statistic():
    # With s = b - a v the statistic is quadratic in (a, b): its minimum is solved for by hand. Catches an engine that follows
    # another gradient.
    kernel, v = RBFKernel(1.0), 0.5 + normal(12, 60) / 2

    def model(v):
        a, b = numpyro.param("a", 1.0, constraint=numpyro.distributions.constraints.positive), numpyro.param("b", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", EnergyDistribution(lambda v: a * v**2 / 2 - b * v), obs=v)

    r = v[:, None] - v
    k = jnp.exp(-(r**2) / 2)
    w = jnp.ones((60, 60)) - jnp.eye(60)
    # u = k (b - a v)(b - a v') + k a (v - v') (v' - v) + const, for grad_v' k = k (v - v')
    aa, ab, bb = (w * k * v[:, None] * v).sum(), -(w * k * (v[:, None] + v)).sum() / 2, (w * k).sum()
    exact = jnp.linalg.solve(2 * jnp.array([[aa, ab], [ab, bb]]), jnp.array([(w * k * r**2).sum(), 0.0]))

    engine = ScoreMatching(model, optax.adam(optax.cosine_decay_schedule(0.1, 1500)), KernelSteinDiscrepancy(kernel))
    params = engine.run(KEY, 1500, v, progress_bar=False).params
    np.testing.assert_allclose([params["a"], params["b"]], exact, rtol=1e-4)
    assert 2.5 < exact[0] < 7  # precision 4, from 60 draws


def test_statistics_of_the_test_are_those_of_the_objective():
    # Catches a test of another statistic than is minimized, and a length that is reported and not used.
    v = normal(13, 9, 2)
    for kernel in (IMQKernel(), RBFKernel(0.8)):
        result = ksd_test(KEY, v, score_with(1.2)(v), kernel=kernel, num_bootstrap=10)
        by_function = ksd_test(KEY, v, score_with(1.2), kernel=kernel, num_bootstrap=10)
        for statistic, found in (("U", result.statistic), ("V", result.v_statistic)):
            exact = loss(KernelSteinDiscrepancy(kernel, statistic), score_with(1.2), v).mean()
            np.testing.assert_allclose(found, exact, rtol=1e-10)
        np.testing.assert_allclose(result.length, stein_matrix(kernel, v, v)[1])
        assert result.bootstrap.shape == (10,)
        for one, other in zip(result, by_function, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("change_probability", [0.5, 0.1])
def test_bootstrap_has_the_exact_distribution_of_the_signs(change_probability):
    # All 2^5 signs with their probabilities. Catches signs that flip with another probability, a diagonal in the bootstrap
    # and not in the statistic, a wrong scale, and a p-value that does not count the statistic itself.
    v, draws = normal(14, 5, 1) + 0.3, 20_000
    u = np.array(stein_matrix(IMQKernel(1.0), v, 0.2 - 0.5 * v)[0])
    np.fill_diagonal(u, 0)
    signs = np.array(list(itertools.product([-1, 1], repeat=5)))
    changes = (signs[:, 1:] != signs[:, :-1]).sum(1)
    distribution = change_probability**changes * (1 - change_probability) ** (4 - changes) / 2
    exact = np.einsum("ki,ij,kj->k", signs, u, signs) / 20
    result = ksd_test(KEY, v, 0.2 - 0.5 * v, kernel=IMQKernel(1.0), num_bootstrap=draws, change_probability=change_probability)
    for value in np.unique(exact.round(9)):
        share = distribution[np.isclose(exact, value)].sum()
        found = np.isclose(result.bootstrap, value).mean()
        assert abs(found - share) < 5 * np.sqrt(share * (1 - share) / draws)
    reached = np.isclose(result.bootstrap, result.statistic) | (np.asarray(result.bootstrap) > result.statistic)
    np.testing.assert_allclose(result.p_value, (1 + reached.sum()) / (1 + draws), rtol=1e-12)
    assert 0.05 < result.p_value < 0.99


def p_values(draw, score, *, num=1000, num_bootstrap=199, seed=0, **settings):
    """p-values of repeated tests, each with draws ``draw(key)`` and its own signs."""

    def one(key):
        data_key, test_key = jax.random.split(key)
        v = draw(data_key)
        return ksd_test(test_key, v, score(v, jax.random.fold_in(key, 1)), num_bootstrap=num_bootstrap, **settings).p_value

    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(seed), num)
        return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=50))(keys))


def exact_score(v, key):
    return -v


def noisy_estimate(v, key):
    return -v + jax.random.laplace(key, v.shape)


@pytest.mark.parametrize(
    ("kernel", "score"), [(RBFKernel(), exact_score), (IMQKernel(), exact_score), (IMQKernel(), noisy_estimate)]
)
def test_level_is_nominal_and_p_values_are_uniform_under_the_null(kernel, score):
    # Catches a bootstrap of another distribution than the statistic, and a test that a score with unbiased noise would break.
    p = p_values(lambda key: jax.random.normal(key, (50, 2)), score, kernel=kernel)
    for level in (0.01, 0.05, 0.1):
        assert abs((p <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 1000)
    assert stats.kstest(p, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("kernel", [RBFKernel(), IMQKernel()])
@pytest.mark.parametrize("alternative", ["shifted", "wide", "narrow", "laplace"])
def test_alternatives_are_found(kernel, alternative):
    # Catches a test without power, such as one whose bootstrap follows the statistic. Laplace of the model's variance.
    draw = {
        "shifted": lambda key: 0.5 + jax.random.normal(key, (100, 1)),
        "wide": lambda key: 1.5 * jax.random.normal(key, (100, 1)),
        "narrow": lambda key: 0.6 * jax.random.normal(key, (100, 1)),
        "laplace": lambda key: jax.random.laplace(key, (100, 1)) / np.sqrt(2),
    }[alternative]
    p = p_values(draw, exact_score, num=200, kernel=kernel)
    at_least = 0.2 if alternative == "laplace" else 0.8
    assert (p <= 0.05).mean() > at_least + 4 * np.sqrt(at_least * (1 - at_least) / 200)


def test_sign_chains_keep_the_level_of_correlated_draws():
    # Catches a change_probability without effect: an AR(1) chain of correlation .7, whose null is rejected with independent signs.
    def chain(key):
        noise = jax.random.normal(key, (150, 1))
        return jax.lax.scan(lambda x, e: (0.7 * x + np.sqrt(1 - 0.49) * e,) * 2, noise[0], noise)[1]

    independent, correlated = (
        (p_values(chain, exact_score, num=300, kernel=RBFKernel(), change_probability=c) <= 0.05).mean() for c in (0.5, 0.05)
    )
    assert independent > 0.4
    assert correlated < 0.12


def test_traced_test_marks_numbers_that_are_not_finite():
    # Catches the p-value 0 of comparisons with NaN: a misfit found with certainty, where there is nothing to say.
    v = normal(15, 2, 6, 1).at[1, 2].set(jnp.nan)
    p = jax.vmap(lambda v: ksd_test(KEY, v, -v, num_bootstrap=20).p_value)(v)
    assert jnp.isfinite(p).tolist() == [True, False]
    assert jnp.isnan(jax.jit(lambda v: ksd_test(KEY, v, v, num_bootstrap=20).p_value)(jnp.ones((4, 2))))


def test_the_diagonal_of_halves_is_refused():
    with pytest.raises(ValueError, match="statistic='V' has every row paired with itself"):
        KernelSteinDiscrepancy(RBFKernel(), "V", "halves")


def test_batches_without_pairs_are_refused_before_anything_is_compiled():
    # Catches a division by n - 1 = 0, and the last row of an odd batch left out in silence.
    with pytest.raises(TypeError, match="kernel must be a radial kernel"):
        KernelSteinDiscrepancy(kernel=1.0)
    for call in ("perturb", "loss"):
        for objective, n, words in (
            (KernelSteinDiscrepancy(), 1, "a batch of 1 row: the discrepancy compares pairs"),
            (KernelSteinDiscrepancy(pairs="halves"), 5, "a batch of 5 rows has no two halves"),
        ):
            arguments = (KEY, jnp.ones((n, 2))) if call == "perturb" else (lambda v: v, KEY, jnp.ones((n, 2)), jnp.ones((n, 2)))
            with pytest.raises(ValueError, match=words):
                getattr(objective, call)(*arguments)
    with pytest.raises(ValueError, match=r"score_fn returned shape \(4,\)"):
        loss(KernelSteinDiscrepancy(), lambda v: v[:, 0], jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("v", "score", "options", "words"),
    [
        (np.ones((1, 2)), lambda v: -v, {}, "1 sample: the discrepancy compares pairs"),
        (np.ones((4, 2), int), lambda v: -v, {}, "floating array"),
        (np.array([[0.0], [np.nan], [1.0]]), lambda v: -v, {}, "v: 1 of 3 rows are NaN or infinite"),
        (np.array([[0.0], [2.0], [1.0]]), lambda v: 1 / v, {}, "score: 1 of 3 rows are NaN or infinite"),
        (np.ones((4, 2)), np.ones((4, 1)), {}, r"score has shape \(4, 1\) and v \(4, 2\)"),
        (np.ones((4, 2)), lambda v: v[:, 0], {}, r"score has shape \(4,\) and v \(4, 2\)"),
        (np.ones((4, 2)), lambda v: -v, {}, "remove repeated samples, or give IMQKernel a length"),
        (np.eye(4), lambda v: -v, {"change_probability": 0.7}, "change_probability must be at most 0.5"),
    ],
)
def test_data_that_cannot_be_tested_are_refused(v, score, options, words):
    with pytest.raises(ValueError, match=words):
        ksd_test(KEY, v, score, **options)


def test_equal_rows_are_tested_with_a_length_of_ones_own():
    # Catches the fix of the message not being one: four equal draws, u is k(0) |s|^2 + d / b^2 of each pair.
    result = ksd_test(KEY, jnp.ones((4, 2)), lambda v: -v, kernel=RBFKernel(0.5), num_bootstrap=50)
    np.testing.assert_allclose(result.statistic, 2 + 2 / 0.25, rtol=1e-10)
