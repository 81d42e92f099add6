# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Relaxed bits against quadrature over their logistic variable, and amortized guides."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.handlers import seed, trace

from numpyro_ebm import GumbelBernoulli, amortized_bernoulli, amortized_normal

KEY = jax.random.key(5)
LOGITS = np.array([-3.0, -0.4, 0.0, 1.7])


def quantiles(num=20001):
    """Midpoints of equal parts of (0, 1): their mean is an integral over the uniform behind a draw."""
    return (np.arange(num) + 0.5)[:, None] / num


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_a_draw_exceeds_one_half_with_the_probability_of_the_bit(temperature):
    # Catches logits divided by the temperature twice or not at all: P(h > 1/2) = sigmoid(l) at every temperature.
    q = GumbelBernoulli(LOGITS, temperature)
    np.testing.assert_allclose((q.icdf(quantiles()) > 0.5).mean(0), sigmoid(LOGITS), atol=1e-4)
    np.testing.assert_allclose(1 - q.cdf(0.5), sigmoid(LOGITS), rtol=1e-12)
    np.testing.assert_allclose(q.probs, sigmoid(LOGITS), rtol=1e-12)


@pytest.mark.usefixtures("double_precision")
def test_moments_of_a_draw_are_those_of_its_expansion_in_the_temperature():
    # Catches a wrong temperature scale. With L, L1, L2 logistic and M = max(L1, L2): E h = E sigma(l - tau L) and
    # E h^2 = E sigma(l - tau M), where E M = 1, E L^2 = E M^2 = pi^2 / 3 and E M^3 = pi^2. Both to O(tau^4).
    p, c = sigmoid(LOGITS), np.pi**2 / 6
    for tau in (0.1, 0.05):
        h = GumbelBernoulli(LOGITS, tau).icdf(quantiles(200001))
        np.testing.assert_allclose(h.mean(0), p + c * tau**2 * p * (1 - p) * (1 - 2 * p), atol=tau**4)
        shrink = 1 - tau + c * tau**2 * (1 - 2 * p) ** 2 - c * tau**3 * (1 - 6 * p * (1 - p))
        np.testing.assert_allclose(h.var(0) / (p * (1 - p)), shrink, atol=5 * tau**4)


@pytest.mark.usefixtures("double_precision")
def test_a_draw_has_the_distribution_of_two_gumbels_through_a_softmax():
    # Catches a scale of the logistic that is off: the papers' draw, with its own noise, against this cdf (Kolmogorov-Smirnov).
    n, temperature = 20000, 0.4
    gumbels = jax.random.gumbel(KEY, (n, len(LOGITS), 2))
    pairs = jax.nn.log_softmax(jnp.stack([LOGITS, np.zeros_like(LOGITS)], -1))
    h = jax.nn.softmax((pairs + gumbels) / temperature)[..., 0]
    u = np.sort(GumbelBernoulli(LOGITS, temperature).cdf(h), 0)
    assert np.abs(u - quantiles(n)).max() < 1.95 / np.sqrt(n)  # exceeded once in a thousand per column


@pytest.mark.usefixtures("double_precision")
def test_draws_follow_the_quantile_function():
    # Catches a sampler that does not use its uniforms well: cdf(draw) must be uniform.
    n = 20000
    u = np.sort(GumbelBernoulli(LOGITS, 0.5).cdf(GumbelBernoulli(LOGITS, 0.5).sample(KEY, (n,))), 0)
    assert np.abs(u - quantiles(n)).max() < 1.95 / np.sqrt(n)


@pytest.mark.usefixtures("double_precision")
def test_quantile_and_distribution_function_are_inverse():
    # Catches a sign or a temperature on one side of the two.
    q = GumbelBernoulli(LOGITS, 0.7)
    np.testing.assert_allclose(q.cdf(q.icdf(quantiles(99))), np.broadcast_to(quantiles(99), (99, 4)), rtol=1e-10)


@pytest.mark.usefixtures("double_precision")
def test_log_prob_is_the_bits_density_with_a_soft_value():
    # Catches the Concrete density in its place, and a factor of the temperature.
    q = GumbelBernoulli(LOGITS, 0.3)
    for h in (np.zeros(4), np.ones(4)):
        np.testing.assert_allclose(q.log_prob(h), dist.BernoulliLogits(LOGITS).log_prob(h), rtol=1e-12)
        np.testing.assert_allclose(q.log_prob(h), q.hard().log_prob(h), rtol=1e-12)
    h = np.array([0.2, 0.9, 0.5, 0.1])
    np.testing.assert_allclose(q.log_prob(h), h * LOGITS - np.log1p(np.exp(LOGITS)), rtol=1e-12)
    assert np.abs(q.log_prob(h) - dist.RelaxedBernoulliLogits(jnp.array(0.3), LOGITS).log_prob(h)).min() > 0.05
    np.testing.assert_allclose(
        jax.vmap(jax.grad(lambda h, logit: GumbelBernoulli(logit).log_prob(h)))(h, LOGITS), LOGITS, rtol=1e-12
    )


def test_hard_draws_are_bits_with_the_same_probability():
    # Catches a hard form of other logits.
    draws = GumbelBernoulli(jnp.array(LOGITS)).hard().sample(KEY, (10000,))
    assert set(np.unique(draws)) == {0, 1}
    p = sigmoid(LOGITS)
    assert (np.abs(draws.mean(0) - p) < 4.5 * np.sqrt(p * (1 - p) / 10000)).all()


@pytest.mark.usefixtures("double_precision")
def test_a_draw_is_differentiable_in_its_logits_and_temperature():
    # Catches a stopped gradient: dh/dl = h (1 - h) / tau, dh/dtau = -h (1 - h) logit(h) / tau.
    def draw(logits, tau):
        return GumbelBernoulli(logits, tau).rsample(KEY)

    tau = 0.6
    h = draw(jnp.array(LOGITS), tau)
    in_logits = jax.grad(lambda logits: draw(logits, tau).sum())(jnp.array(LOGITS))
    np.testing.assert_allclose(in_logits, h * (1 - h) / tau, rtol=1e-10)
    in_temperature = jax.jacfwd(lambda tau: draw(jnp.array(LOGITS), tau))(tau)
    np.testing.assert_allclose(in_temperature, -h * (1 - h) * np.log(h / (1 - h)) / tau, rtol=1e-10)
    assert GumbelBernoulli(LOGITS).has_rsample
    assert GumbelBernoulli(LOGITS).to_event(1).expand([3]).has_rsample


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("logit", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_nothing_is_infinite_at_the_ends_of_the_uniform(dtype, logit):
    # Catches a logarithm of 0: generators return 0 exactly, and 1 - eps; the gradient and the density must be finite too.
    with jax.enable_x64(dtype == jnp.float64):
        ends = jnp.array([0.0, jnp.finfo(dtype).tiny, 0.5, 1 - jnp.finfo(dtype).epsneg, 1.0], dtype)

        def draw(logit, temperature=0.1):
            return GumbelBernoulli(logit, temperature).icdf(ends)

        logit = jnp.asarray(logit, dtype)
        h, slope, reverse = draw(logit), jax.jacfwd(draw)(logit), jax.grad(lambda logit: draw(logit).sum())(logit)
        density, score = jax.value_and_grad(lambda logit: GumbelBernoulli(logit).log_prob(h).sum())(logit)
        warmer = jax.jacfwd(lambda temperature: draw(logit, temperature))(jnp.asarray(0.1, dtype))  # 0 times infinity at the ends
        assert h.dtype == dtype
        assert ((h >= 0) & (h <= 1)).all()
        assert all(np.isfinite(x).all() for x in (h, slope, density, score, reverse, warmer))


def test_dtype_of_a_draw_is_that_of_the_logits():
    # Catches float32 logits that come back as float64, and integers that cannot be drawn at.
    with jax.enable_x64(True):
        assert GumbelBernoulli(jnp.zeros(2, jnp.float32)).sample(KEY).dtype == jnp.float32
        assert GumbelBernoulli(jnp.zeros(2, jnp.float32)).log_prob(jnp.ones(2, jnp.float32)).dtype == jnp.float32
        assert GumbelBernoulli(0).sample(KEY).dtype == jnp.float64


def test_shapes_are_those_of_a_numpyro_distribution():
    # Catches a temperature or logits that are not broadcast against the other, in draws or in the density.
    q = GumbelBernoulli(jnp.zeros((3, 1)), jnp.ones(2))
    assert q.batch_shape == (3, 2)
    assert q.event_shape == ()
    assert q.sample(KEY, (5,)).shape == (5, 3, 2)
    assert q.log_prob(0.5).shape == q.hard().batch_shape == (3, 2)
    event = GumbelBernoulli(jnp.zeros(4), 1.0).to_event(1).expand([6])
    assert (event.batch_shape, event.event_shape) == ((6,), (4,))
    assert event.sample(KEY, (2,)).shape == (2, 6, 4)
    assert event.log_prob(event.sample(KEY, (2,))).shape == (2, 6)
    draws = event.sample(KEY)
    assert len(np.unique(draws)) == draws.size  # rows of an expanded distribution draw by themselves


def test_it_crosses_jit_vmap_and_scan():
    # Catches a field that is no pytree leaf, a validation that reads a tracer, and a batch shape that vmap leaves behind.
    q = GumbelBernoulli(jnp.array(LOGITS), 0.5)
    np.testing.assert_allclose(jax.jit(lambda q: q.sample(KEY))(q), q.sample(KEY), rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda logits, tau: GumbelBernoulli(logits, tau).sample(KEY))(jnp.array(LOGITS), 0.5), q.sample(KEY), rtol=1e-6
    )
    stacked = jax.vmap(GumbelBernoulli)(jnp.zeros((3, 4)), jnp.ones(3))
    assert jax.vmap(lambda q: q.log_prob(jnp.ones(4)))(stacked).shape == (3, 4)

    def steps(carry, logits):
        return numpyro.sample("h", GumbelBernoulli(logits, 0.5)), None

    sites = trace(seed(lambda: scan(steps, jnp.zeros(4), jnp.tile(LOGITS, (3, 1))), KEY)).get_trace()
    assert sites["h"]["value"].shape == (3, 4)
    assert sites["h"]["fn"].log_prob(sites["h"]["value"]).shape == (3, 4)


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan"), float("inf"), np.array([0.1, 0.0])])
def test_bad_temperatures_are_refused(temperature):
    # Catches a temperature of 0, at which every draw is nan.
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        GumbelBernoulli(jnp.zeros(2), temperature)


def test_values_outside_the_interval_are_told_of_when_validation_is_on():
    # Catches a support that NumPyro does not check.
    q = GumbelBernoulli(jnp.zeros(()), validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        q.log_prob(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q.log_prob(1.0)


def test_amortized_normal_gives_every_row_its_own_normal():
    # Catches a variance in place of a scale, rows mixed up, and an event that is not one vector.
    A = jnp.array([[1.0, 2.0], [0.0, 1.0], [-1.0, 0.5]])
    v = jax.random.normal(KEY, (4, 2))
    q = amortized_normal(lambda v: (A @ v, jnp.array([0.0, 1.0, -1.0]) + v[0]), v)
    assert (q.batch_shape, q.event_shape) == ((4,), (3,))
    h = jax.random.normal(jax.random.key(1), (4, 3))
    want = dist.Normal(v @ A.T, jnp.exp(jnp.array([0.0, 1.0, -1.0]) + v[:, :1])).log_prob(h).sum(-1)
    np.testing.assert_allclose(q.log_prob(h), want, rtol=1e-5)


def test_amortized_bernoulli_gives_every_row_its_own_bits():
    # Catches a lost temperature, and rows mixed up; a visible may be an image, a network an Equinox module.
    images = jax.random.normal(KEY, (5, 2, 3))
    network = eqx.nn.Linear(6, 4, key=KEY)
    q = amortized_bernoulli(lambda v: network(v.reshape(-1)), images, temperature=0.7)
    want = GumbelBernoulli(jax.vmap(network)(images.reshape(5, 6)), 0.7).to_event(1)
    assert (q.batch_shape, q.event_shape) == ((5,), (4,))
    np.testing.assert_allclose(q.sample(KEY), want.sample(KEY), rtol=1e-5)
    np.testing.assert_allclose(q.log_prob(jnp.full((5, 4), 0.3)), want.log_prob(jnp.full((5, 4), 0.3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (lambda v: v, r"must return \(loc, log_scale\), each of shape \(num_latents,\); it returned .* with shape \(2,\)"),
        (lambda v: (v,), r"it returned tuple of 1 with shape \(2,\)"),
        (lambda v: (v, v.sum()), r"it returned tuple of 2 with shape \(2,\), \(\)"),
        (lambda v: (v, jnp.zeros(3)), r"with shape \(2,\), \(3,\)"),
        (lambda v: (v[None], v[None]), r"with shape \(1, 2\), \(1, 2\)"),
        (lambda v: (v, v, v), "it returned tuple of 3"),
        (lambda v: {"loc": v, "log_scale": v}, "it returned dict of 2"),
    ],
)
def test_networks_of_other_outputs_are_refused_for_normals(network, text):
    # Catches an output that would be unpacked along its rows, or broadcast.
    with pytest.raises(ValueError, match=text):
        amortized_normal(network, jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (lambda v: (v, v), r"must return logits of shape \(num_latents,\); it returned tuple of 2"),
        (lambda v: v.sum(), r"with shape \(\)"),
        (lambda v: v[None], r"for one visible of shape \(2,\) .* with shape \(1, 2\)"),
    ],
)
def test_networks_of_other_outputs_are_refused_for_bits(network, text):
    # Catches logits that are not one vector for one visible.
    with pytest.raises(ValueError, match=text):
        amortized_bernoulli(network, jnp.ones((4, 2)))


def test_a_visible_without_a_batch_is_refused():
    # Catches an error from deep inside vmap.
    with pytest.raises(ValueError, match="add the batch axis in front"):
        amortized_bernoulli(lambda v: v, jnp.ones(()))
