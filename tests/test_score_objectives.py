# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Score-matching objectives against closed forms. A Gaussian with a linear score has all of them by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm import (
    DenoisingScoreMatching,
    ExactScoreMatching,
    MultiscaleDenoisingScoreMatching,
    SlicedScoreMatching,
)
from numpyro_ebm.objectives import ScoreObjective
from numpyro_ebm.objectives import score as score_module

KEY = jax.random.key(7)
OBJECTIVES = (
    ExactScoreMatching(),
    SlicedScoreMatching(),
    SlicedScoreMatching(num_projections=3, directions="normal", variance_reduced=False),
    DenoisingScoreMatching(0.3),
    MultiscaleDenoisingScoreMatching(0.1, 0.05, 0.4),
)


pytestmark = pytest.mark.usefixtures("double_precision")


def hermite(mean, covariance, degree=20):
    """Nodes and weights that integrate polynomials over N(mean, covariance) exactly."""
    x, w = np.polynomial.hermite_e.hermegauss(degree)
    nodes = np.array(list(itertools.product(x, repeat=len(mean))))
    weights = np.prod(list(itertools.product(w, repeat=len(mean))), 1)
    return jnp.asarray(mean + nodes @ np.linalg.cholesky(covariance).T), jnp.asarray(weights / weights.sum())


def all_rademacher(d):
    return jnp.array(list(itertools.product([-1.0, 1.0], repeat=d)))


def log_density(params, v):
    """A log density that is neither quadratic nor a product over coordinates, of one event of any shape."""
    A, c = params
    x = v.reshape(-1)
    return -jnp.sum(x**4) / 12 + jax.nn.softplus(x @ A + c).sum()


def score_of(params):
    return jax.vmap(jax.grad(lambda v: log_density(params, v)))


def small_params(d, m=3):
    keys = jax.random.split(KEY)
    return jax.random.normal(keys[0], (d, m)), jax.random.normal(keys[1], (m,))


def with_directions(objective, score_fn, v, u):
    """The loss along given directions: what is random is the draw of them alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(score_module._DIRECTIONS, objective.directions, lambda key, shape, dtype: u.reshape(shape).astype(dtype))
        return objective.loss(score_fn, KEY, v, v)


def test_score_matching_of_a_gaussian_is_the_fisher_divergence_up_to_its_constant():
    # Catches a wrong sign of the trace, a lost half, and a trace over part of the coordinates.
    mean, covariance = np.array([0.3, -0.5]), np.array([[1.2, 0.4], [0.4, 0.7]])
    mu, precision = np.array([-0.2, 0.1]), np.array([[1.5, -0.3], [-0.3, 0.8]])
    v, w = hermite(mean, covariance)
    data_precision = np.linalg.inv(covariance)
    # s - s* = -(P - Q) v + P mu - Q m under N(m, C)
    slope, offset = data_precision - precision, precision @ mu - data_precision @ mean
    fisher = (np.trace(slope @ covariance @ slope) + np.sum((slope @ mean + offset) ** 2)) / 2
    loss = w @ ExactScoreMatching().loss(lambda v: (mu - v) @ precision, KEY, v, v)
    np.testing.assert_allclose(loss + np.trace(data_precision) / 2, fisher, rtol=1e-12)


def test_score_matching_is_least_at_the_data_distribution():
    # Catches an objective whose optimum is not the data's: the gradient in the parameters must vanish there.
    covariance = np.array([[1.2, 0.4], [0.4, 0.7]])
    v, w = hermite(np.zeros(2), covariance)

    def loss(precision):
        return w @ ExactScoreMatching().loss(lambda v: -v @ precision, KEY, v, v)

    best = jnp.asarray(np.linalg.inv(covariance))
    np.testing.assert_allclose(jax.grad(loss)(best), np.zeros((2, 2)), atol=1e-12)
    assert jax.hessian(loss)(best).reshape(4, 4).min() > -1e-12
    assert jnp.linalg.eigvalsh(jax.hessian(loss)(best).reshape(4, 4)).min() > 0.1


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3), (2, 1, 2)])
def test_trace_is_that_of_the_dense_jacobian_for_every_event_shape(event_shape):
    # Catches coordinates that are mixed up by a reshape, and rows that leak into each other.
    d = int(np.prod(event_shape))
    score = score_of(small_params(d))
    v = jax.random.normal(KEY, (4, *event_shape))
    jacobian = jax.vmap(jax.jacrev(lambda x: score(x[None])[0]))(v).reshape(4, d, d)
    want = (score(v).reshape(4, d) ** 2).sum(1) / 2 + jnp.trace(jacobian, axis1=1, axis2=2)
    np.testing.assert_allclose(ExactScoreMatching().loss(score, KEY, v, v), want, rtol=1e-12)


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_sliced_is_exact_score_matching_in_expectation(variance_reduced):
    # Catches a lost half, a wrong power of the directions, and a sum over them where a mean belongs. All 2^3 directions.
    score, v, u = score_of(small_params(3)), jax.random.normal(KEY, (4, 3)), all_rademacher(3)
    rows = jnp.broadcast_to(u[:, None], (8, 4, 3))
    objective = SlicedScoreMatching(num_projections=8, variance_reduced=variance_reduced)
    exact = ExactScoreMatching().loss(score, KEY, v, v)
    np.testing.assert_allclose(with_directions(objective, score, v, rows), exact, rtol=1e-12)


def test_sliced_is_exact_score_matching_in_expectation_over_gaussian_directions():
    # Catches directions of a wrong scale: Gauss-Hermite integrates the quadratic in u exactly.
    score, v = score_of(small_params(2)), jax.random.normal(KEY, (1, 2))
    u, w = hermite(np.zeros(2), np.eye(2), 4)
    for variance_reduced in (True, False):
        objective = SlicedScoreMatching(directions="normal", variance_reduced=variance_reduced)
        losses = jax.vmap(lambda u, objective=objective: with_directions(objective, score, v, u))(u)[:, 0]
        np.testing.assert_allclose(w @ losses, ExactScoreMatching().loss(score, KEY, v, v)[0], rtol=1e-12)


def test_variance_of_the_slices_is_the_closed_form():
    # Catches Gaussian directions passed off as Rademacher and the reverse: 2 sum_{i != j} H_ij^2 against 2 |H|^2.
    A = np.array([[1.0, 0.5, -0.2], [0.5, -0.3, 0.8], [-0.2, 0.8, 0.4]])
    v = jnp.zeros((1, 3))
    u = all_rademacher(3)
    losses = jax.vmap(lambda u: with_directions(SlicedScoreMatching(), lambda v: v @ A, v, u))(u)
    np.testing.assert_allclose(losses.var(), 2 * ((A**2).sum() - (np.diag(A) ** 2).sum()), rtol=1e-12)
    u, w = hermite(np.zeros(3), np.eye(3), 5)
    losses = jax.vmap(lambda u: with_directions(SlicedScoreMatching(directions="normal"), lambda v: v @ A, v, u))(u)[:, 0]
    np.testing.assert_allclose(w @ losses**2 - (w @ losses) ** 2, 2 * (A**2).sum(), rtol=1e-12)


def test_variance_reduction_removes_the_variance_of_the_first_term():
    # Catches the flag read the wrong way round: with a constant score nothing is left to vary in the reduced form.
    v, u = jnp.zeros((1, 3)), all_rademacher(3)
    for variance_reduced in (True, False):
        objective = SlicedScoreMatching(variance_reduced=variance_reduced)
        score = lambda v: jnp.broadcast_to(jnp.array([1.0, 2.0, -1.0]), v.shape)  # noqa: E731
        losses = jax.vmap(lambda u, objective=objective, score=score: with_directions(objective, score, v, u))(u)
        assert (losses.var() < 1e-20) == variance_reduced
        np.testing.assert_allclose(losses.mean(), 3.0, rtol=1e-12)


def test_one_direction_costs_what_the_derivative_by_hand_costs():
    # Catches a vmap over one direction: it copies and transposes every layer of a network that multiplies as weight @ x.
    weights = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(32, 2), (32, 32), (1, 32)])]
    v = jax.random.normal(KEY, (16, 2))

    def score_of_network(weights):
        def energy(x):
            return (weights[2] @ jax.nn.silu(weights[1] @ jax.nn.silu(weights[0] @ x)))[0]

        return jax.grad(lambda v: -jax.vmap(energy)(v).sum())

    def by_hand(weights):
        u = jax.random.rademacher(KEY, v.shape, v.dtype)
        score, slope = jax.jvp(score_of_network(weights), (v,), (u,))
        return ((score**2).sum(1) / 2 + (u * slope).sum(1)).mean()

    def by_objective(weights):
        return SlicedScoreMatching().loss(score_of_network(weights), KEY, v, v).mean()

    ours, hand = (jax.jit(jax.value_and_grad(f)).lower(weights).compile().cost_analysis() for f in (by_objective, by_hand))
    np.testing.assert_allclose(by_objective(weights), by_hand(weights), rtol=1e-12)
    assert ours["flops"] <= 1.01 * hand["flops"]
    assert ours["bytes accessed"] <= 1.02 * hand["bytes accessed"]


@pytest.mark.parametrize("directions", ["rademacher", "normal"])
def test_directions_have_the_identity_for_covariance_and_their_own_kurtosis(directions):
    # Catches directions shared by rows or projections, and of another kind. The score v -> A v shows u^T A u = 2 u_0 u_1 or u_0^2.
    v = jnp.zeros((3000, 2))
    objective = SlicedScoreMatching(num_projections=1, directions=directions)
    square = objective.loss(lambda v: v * jnp.array([1.0, 0.0]), KEY, v, v)
    cross = objective.loss(lambda v: v @ jnp.array([[0.0, 1.0], [0.0, 0.0]]), KEY, v, v)
    variance = {"rademacher": 0.0, "normal": 2.0}[directions]
    np.testing.assert_allclose(square.mean(), 1, atol=5 * np.sqrt(variance / 3000) + 1e-12)
    np.testing.assert_allclose(square.var(), variance, atol=5 * np.sqrt(56 / 3000) * variance)  # Var of (u^2 - 1)^2 is 56
    np.testing.assert_allclose(cross.mean(), 0, atol=5 / np.sqrt(3000))
    two = SlicedScoreMatching(num_projections=2, directions=directions)
    cross = two.loss(lambda v: v @ jnp.array([[0.0, 1.0], [0.0, 0.0]]), KEY, v, v)
    np.testing.assert_allclose(cross.var(), 0.5, rtol=5 * np.sqrt(8 / 3000))  # a mean of two independent products


@pytest.mark.parametrize(("mu", "s2"), [(0.2, 1.3), (-0.6, 0.5)])
def test_denoising_is_the_fisher_divergence_to_the_noised_data_up_to_its_minimum(mu, s2):
    # Catches the target's sign, sigma for sigma^2, and a minimum at the clean data.
    m, tau2, sigma = 0.4, 0.8, 0.3
    S = tau2 + sigma**2
    # the joint distribution of (v, v_tilde)
    joint, w = hermite(np.array([m, m]), np.array([[tau2, tau2], [tau2, S]]), 4)
    loss = w @ DenoisingScoreMatching(sigma).loss(lambda v: (mu - v) / s2, KEY, joint[:, 0], joint[:, 1])
    least = (1 / sigma**2 - 1 / S) / 2
    np.testing.assert_allclose(loss, ((S + (m - mu) ** 2) / s2**2 - 2 / s2 + 1 / sigma**2) / 2, rtol=1e-12)
    np.testing.assert_allclose(loss - least, ((S + (m - mu) ** 2) / s2**2 - 2 / s2 + 1 / S) / 2, rtol=1e-9)
    at_noised = w @ DenoisingScoreMatching(sigma).loss(lambda v: (m - v) / S, KEY, joint[:, 0], joint[:, 1])
    np.testing.assert_allclose(at_noised, least, rtol=1e-12)


def test_denoising_perturbs_with_its_own_sigma():
    # Catches sigma^2 for sigma, and noise that rows or coordinates share.
    v = jax.random.normal(KEY, (4000, 2)) + 3
    noise = (DenoisingScoreMatching(0.3).perturb(jax.random.key(1), v) - v) / 0.3
    np.testing.assert_allclose(np.cov(noise.T), np.eye(2), atol=5 * np.sqrt(2 / 4000))
    np.testing.assert_allclose(noise.mean(0), 0, atol=5 / np.sqrt(4000))


def test_multiscale_optimum_has_the_closed_slope_at_every_level():
    # Catches sigma_i in place of sigma0 in the target: the slope -(sigma^2 / (tau^2 + sigma^2)) / sigma0^2 has both.
    tau2, sigma0, sigmas = 0.8, 0.3, np.array([0.2, 0.3, 0.9])
    objective = MultiscaleDenoisingScoreMatching(sigma0, 0.2, 0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(score_module._SPACINGS, "geometric", lambda begin, end, n: sigmas)

        def loss(slopes):
            total = jnp.zeros(3)
            for eps, w in zip(*hermite(np.zeros(2), np.eye(2), 4), strict=True):
                v = jnp.full((3, 1), np.sqrt(tau2) * eps[0])
                total += w * objective.loss(lambda x: slopes[:, None] * x, KEY, v, v + sigmas[:, None] * eps[1])
            return total.sum()

        gradient = jax.grad(loss)
        # quadratic in the slopes, rows independent: one Newton step from 0 is the optimum
        best = -gradient(jnp.zeros(3)) / (gradient(jnp.ones(3)) - gradient(jnp.zeros(3)))
    np.testing.assert_allclose(best, -(sigmas**2 / (tau2 + sigmas**2)) / sigma0**2, rtol=1e-10)
    np.testing.assert_allclose(best[1], -1 / (tau2 + sigma0**2), rtol=1e-10)  # at sigma0: the score of the smoothed data


def test_multiscale_with_one_level_is_denoising_over_its_variance():
    # Catches a weight 1 / sigma where 1 / sigma^2 belongs, and noise drawn in another way.
    score, v = score_of(small_params(2)), jax.random.normal(KEY, (5, 2))
    one = DenoisingScoreMatching(0.4)
    v_tilde = one.perturb(KEY, v)
    for spacing in ("geometric", "linear"):
        many = MultiscaleDenoisingScoreMatching(0.4, 0.4, 0.4, spacing)
        np.testing.assert_allclose(many.perturb(KEY, v), v_tilde, rtol=1e-12)
        np.testing.assert_allclose(many.loss(score, KEY, v, v_tilde), one.loss(score, KEY, v, v_tilde) / 0.16, rtol=1e-12)


@pytest.mark.parametrize(
    ("spacing", "sigmas"),
    [("geometric", [0.05, 0.1, 0.2, 0.4, 0.8]), ("linear", [0.05, 0.2375, 0.425, 0.6125, 0.8])],
)
def test_levels_follow_the_place_in_the_batch(spacing, sigmas):
    # Catches levels at random, backwards, or without their ends; and a weight that is not 1 / sigma.
    objective = MultiscaleDenoisingScoreMatching(0.1, 0.05, 0.8, spacing)
    v = jax.random.normal(KEY, (5, 2, 2))
    noise = jax.random.normal(KEY, v.shape)
    np.testing.assert_allclose(
        (objective.perturb(KEY, v) - v) / noise, np.broadcast_to(np.reshape(sigmas, (5, 1, 1, 1))[:, 0], v.shape)
    )
    np.testing.assert_allclose(objective.weight(5), 1 / np.array(sigmas), rtol=1e-12)
    backwards = dataclasses.replace(objective, sigma_begin=0.8, sigma_end=0.05)
    np.testing.assert_allclose(backwards.weight(5), 1 / np.array(sigmas[::-1]), rtol=1e-12)


def test_multiscale_loss_by_hand():
    # Catches the divisor's order: s / sigma_i + noise / sigma0^2, with a score that has no special value.
    score, v = score_of(small_params(2)), jax.random.normal(KEY, (3, 2))
    objective = MultiscaleDenoisingScoreMatching(0.3, 0.1, 0.9)
    sigmas = np.array([0.1, 0.3, 0.9])[:, None]
    noise = jax.random.normal(jax.random.key(1), v.shape)
    v_tilde = v + sigmas * noise
    want = ((score(v_tilde) / sigmas + noise / 0.3**2) ** 2).sum(1) / 2
    np.testing.assert_allclose(objective.loss(score, KEY, v, v_tilde), want, rtol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_gradient_in_the_parameters_is_that_of_finite_differences(objective):
    # Catches a gradient stopped on its way, in the trace above all.
    v = jax.random.normal(KEY, (4, 2))
    v_tilde = objective.perturb(KEY, v)
    params = small_params(2)
    weight = jnp.arange(1.0, 5.0)

    @jax.jit
    def loss(params):
        return weight @ objective.loss(score_of(params), KEY, v, v_tilde)

    gradient = jax.grad(loss)(params)
    for direction in (small_params(2), jax.tree.map(jnp.ones_like, params)):
        step = 1e-5
        ahead, behind = (loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)) for s in (step, -step))
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7)
        assert abs(slope) > 0.05


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_one_loss_per_row_in_the_dtype_of_the_visible(objective):
    # Catches a float64 constant that promotes a float32 batch, a loss summed over rows, and a row that sees another.
    v = jax.random.normal(KEY, (4, 2, 3), jnp.float32)
    score = lambda v: -(v**3)  # noqa: E731
    v_tilde = objective.perturb(KEY, v)
    losses = objective.loss(score, KEY, v, v_tilde)
    assert v_tilde.dtype == losses.dtype == jnp.float32
    assert losses.shape == objective.weight(4).shape == (4,)
    changed = objective.loss(score, KEY, v.at[2].set(0), v_tilde.at[2].set(0))
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(changed != losses)), [2])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_objectives_are_values(objective):
    # Catches an objective that cannot be compiled in: two of the same settings must be one static argument.
    again = dataclasses.replace(objective)
    assert again == objective
    assert hash(again) == hash(objective)
    assert objective.differentiates_score == isinstance(objective, ExactScoreMatching | SlicedScoreMatching)
    assert objective.min_batch_size == (2 if isinstance(objective, MultiscaleDenoisingScoreMatching) else 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.sigma = 1.0
    if not hasattr(objective, "sigma0"):
        np.testing.assert_array_equal(objective.weight(3), np.ones(3))


def test_trace_needs_no_memory_that_grows_with_the_dimension():
    # Catches all columns of the Jacobians held at once, in the loss or in its gradient: 64 x (8, 64) x 50 units would be 13 MB.
    d, m, rows = 64, 50, 8
    A = jax.random.normal(KEY, (d, m))
    v = jax.random.normal(KEY, (rows, d))

    def loss(A):
        return ExactScoreMatching().loss(jax.vmap(jax.grad(lambda v: jax.nn.softplus(v @ A).sum())), KEY, v, v).sum()

    for function in (loss, jax.grad(loss)):
        temporaries = jax.jit(function).lower(A).compile().memory_analysis().temp_size_in_bytes
        assert temporaries < 10 * (A.size + rows * (d + m)) * 8


def test_an_objective_of_ones_own_gives_its_loss_alone():
    # Catches an abstract method too many: perturb and weight have defaults.
    class OnlyLoss(ScoreObjective):
        def _loss(self, score_fn, rng_key, v, v_tilde):
            return (score_fn(v_tilde) ** 2).sum(1)

    v = jnp.ones((2, 3))
    np.testing.assert_array_equal(OnlyLoss().loss(lambda v: 2 * v, KEY, v, v), [12, 12])
    with pytest.raises(ValueError, match=r"score_fn returned shape \(2,\) for visibles of shape \(2, 3\)"):
        OnlyLoss().loss(lambda v: v.sum(1), KEY, v, v)  # what a base class checks, no author need
    assert OnlyLoss().perturb(KEY, v) is v
    np.testing.assert_array_equal(OnlyLoss().weight(2), np.ones(2))
    assert not OnlyLoss.differentiates_score
    assert OnlyLoss.min_batch_size == 1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
@pytest.mark.parametrize(
    ("v", "text"),
    [
        (np.ones(()), r"shape \(batch,\) \+ event_shape, got float64 of shape \(\)"),
        (np.ones((4, 2), int), "must be a floating array"),
        (np.ones((0, 2)), "a batch of 0"),
    ],
    ids=["scalar", "integers", "empty"],
)
def test_bad_batches_are_refused(objective, v, text):
    # Catches the mean over no rows, which is nan, and bytes that have no score.
    with pytest.raises(ValueError, match=text):
        objective.perturb(KEY, v)
    with pytest.raises(ValueError, match=text):
        objective.loss(lambda v: -v, KEY, v, v)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_a_score_of_another_shape_is_refused(objective):
    # Catches a score that is broadcast: (4,) against (4, 1) would be a loss over (4, 4).
    v = jnp.ones((4, 1))
    with pytest.raises(ValueError, match=r"score_fn returned shape \(4,\) for visibles of shape \(4, 1\)"):
        objective.loss(lambda v: -v[:, 0], KEY, v, v)
    with pytest.raises(ValueError, match=r"v_tilde has shape \(4, 2\) and v \(4, 1\)"):
        objective.loss(lambda v: -v, KEY, v, jnp.ones((4, 2)))


def test_a_batch_of_one_has_no_spread_of_levels():
    # Catches the last batch of an epoch with one row, which would see sigma_begin alone.
    objective, v = MultiscaleDenoisingScoreMatching(0.1, 0.1, 1.0), jnp.ones((1, 2))
    for use in (
        lambda: objective.perturb(KEY, v),
        lambda: objective.loss(lambda v: -v, KEY, v, v),
        lambda: objective.weight(1),
    ):
        with pytest.raises(ValueError, match=r"a batch of 1: the spread of noise levels .* needs 2"):
            use()


# Noise and a curvature penalty.


@pytest.mark.parametrize("make", [ExactScoreMatching, SlicedScoreMatching])
def test_noise_of_an_objective_is_learned_with_the_data(make):
    """The precision that is best on N(0, 1.5) with noise of scale .5, by quadrature over both: 1 / (1.5 + .25)."""
    v, w = hermite(np.zeros(2), np.diag([1.5, 0.25]))
    objective = make(noise_scale=0.5)
    moved = objective.perturb(KEY, v)
    np.testing.assert_allclose(moved, v + 0.5 * jax.random.normal(KEY, v.shape), rtol=1e-12)
    rows = v.sum(1, keepdims=True)  # data plus noise
    gradient = jax.grad(lambda p: w @ objective.loss(lambda x: -p * x, KEY, rows, rows))
    np.testing.assert_allclose(gradient(1 / 1.75), 0, atol=1e-12)
    assert make().perturb(KEY, v) is v


@pytest.mark.parametrize("make", [ExactScoreMatching, SlicedScoreMatching])
def test_curvature_penalty_widens_a_gaussian_as_noise_of_twice_its_size_does(make):
    """p = 1 / (variance + 2 lambda), and 1 / (variance + sigma^2) by noise. Catches a lost square and a factor of 2."""
    v, w = hermite(np.zeros(2), np.diag([1.5, 0.4]))
    objective = make(curvature_penalty=0.2)
    gradient = jax.grad(lambda p: w @ objective.loss(lambda x: -p * x, KEY, v, v))
    np.testing.assert_allclose(gradient(1 / (jnp.array([1.5, 0.4]) + 0.4)), 0, atol=1e-12)


def test_curvature_penalties_are_sums_of_squared_second_derivatives():
    """Of the diagonal, or of all of them in the mean over directions. Catches a square of the trace."""
    score, v, u = score_of(small_params(3)), jax.random.normal(KEY, (4, 3)), all_rademacher(3)
    hessian = jax.vmap(jax.jacrev(lambda x: score(x[None])[0]))(v)
    exact, plain = (ExactScoreMatching(curvature_penalty=weight).loss(score, KEY, v, v) for weight in (0.7, 0.0))
    np.testing.assert_allclose(exact - plain, 0.7 * (jnp.diagonal(hessian, axis1=1, axis2=2) ** 2).sum(1), rtol=1e-9)
    rows = jnp.broadcast_to(u[:, None], (8, 4, 3))
    for reduced in (True, False):
        sliced, plain = (
            with_directions(SlicedScoreMatching(8, variance_reduced=reduced, curvature_penalty=weight), score, v, rows)
            for weight in (0.7, 0.0)
        )
        np.testing.assert_allclose(sliced - plain, 0.7 * (hessian**2).sum((1, 2)), rtol=1e-9)
