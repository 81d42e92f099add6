# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Annealed Langevin sampling against the closed forms of Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm import UnadjustedLangevin, annealed_langevin, annealing_schedule, denoise

KEY = jax.random.key(3)


def normal(precision, mean=0.0):
    return lambda x: -precision * ((x - mean) ** 2).sum(-1) / 2


def test_the_schedule_is_that_of_the_papers():
    # Catches a cooling that has 1 twice (with its endpoint), a freezing that does not end at 0, and other counts.
    t = annealing_schedule()
    assert t.shape == (2700,)
    assert (t[:500] == 100).all()
    np.testing.assert_allclose(t[500:2500], 100 ** (1 - np.arange(2000) / 2000), rtol=1e-12)
    np.testing.assert_allclose(t[2500:], 1 - np.arange(200) / 199, atol=1e-12)
    assert t[-1] == 0


@pytest.mark.parametrize(("c", "h", "temperature"), [(1.0, 0.1, 1.0), (3.0, 0.2, 100.0), (2.0, 0.05, 0.25)])
def test_stationary_variance_at_a_fixed_temperature_is_exact(c, h, temperature):
    # Catches sqrt(h), T for sqrt(T), T on the score: one step is x -> a x + b xi, and b^2 / (1 - a^2) = T / (c (1 - hc/2)).
    with jax.enable_x64(True):
        start = jnp.array([[0.0], [1.0]])
        out = annealed_langevin(KEY, normal(c), start, h, [temperature])
        cold = annealed_langevin(KEY, normal(c), start, h, [0.0])
        np.testing.assert_allclose(cold, (1 - h * c) * start, rtol=1e-12)
        key = jax.random.split(jax.random.split(KEY, 1)[0], 1)[0]  # of the first step, of its only array
        b = (out - cold) / jax.random.normal(key, start.shape)
        np.testing.assert_allclose(b**2 / (1 - (1 - h * c) ** 2), temperature / (c * (1 - h * c / 2)), rtol=1e-9)


def test_a_run_has_the_variance_that_the_recursion_propagates():
    # Catches temperatures in another order, one step too few, and noise that is shared by steps or chains.
    c, h, n, t = 2.0, 0.1, 40_000, annealing_schedule(5, 10, 5)
    variance = 0.0
    for temperature in t:
        variance = (1 - h * c) ** 2 * variance + 2 * h * temperature
    x = jax.jit(lambda key: annealed_langevin(key, normal(c), jnp.zeros((n, 1)), h, t))(KEY)
    assert abs(x.mean()) < 4.5 * np.sqrt(variance / n)
    assert abs(x.var() - variance) < 4.5 * variance * np.sqrt(2 / n)


def test_at_temperature_one_it_is_unadjusted_langevin():
    # Catches a step convention of its own: from the same start both chains have one distribution, here one variance after 30.
    h, n = 0.05, 40_000
    ours = annealed_langevin(KEY, normal(1.0), jnp.zeros((n, 1)), h, np.ones(30))
    sampler = UnadjustedLangevin(step_size=h, num_steps=30)
    theirs = sampler.run(jax.random.key(4), normal(1.0), sampler.init(jnp.zeros((n, 1)))).position
    assert abs(ours.var() - theirs.var()) < 4.5 * theirs.var() * np.sqrt(4 / n)


def test_coupled_parts_move_together():
    # Catches parts that see each other's old value, share their noise, or ignore the coupling: that of (v, h) is exact.
    n, h, precision = 40_000, 0.1, np.array([[2.0, -0.8], [-0.8, 1.0]])
    start = {"v": jnp.ones((n, 1)), "h": jnp.zeros((n,))}

    def log_prob(x):
        v, h = x["v"][:, 0], x["h"]
        return -(precision[0, 0] * v**2 + 2 * precision[0, 1] * v * h + precision[1, 1] * h**2) / 2

    x = annealed_langevin(KEY, log_prob, start, h, np.full(60, 3.0))
    a = np.eye(2) - h * precision
    mean, cov = np.array([1.0, 0.0]), np.zeros((2, 2))
    for _ in range(60):
        mean, cov = a @ mean, a @ cov @ a.T + 2 * h * 3.0 * np.eye(2)
    assert x["v"].shape == (n, 1)
    values = np.stack([x["v"][:, 0], x["h"]])
    errors = np.sqrt((np.outer(cov.diagonal(), cov.diagonal()) + cov**2) / n)
    assert (abs(np.cov(values) - cov) < 4.5 * errors).all()
    assert (abs(values.mean(1) - mean) < 4.5 * np.sqrt(cov.diagonal() / n)).all()


def test_denoising_gives_the_mean_of_the_clean_value():
    # Catches sigma for its square: at N(m, tau^2 + sigma^2), E[clean | x] = (m sigma^2 + x tau^2) / (tau^2 + sigma^2).
    mean, tau, sigma, x = 1.5, 0.7, 0.4, jnp.linspace(-2, 3, 5)[:, None]
    variance = tau**2 + sigma**2
    wanted = (mean * sigma**2 + x * tau**2) / variance
    np.testing.assert_allclose(denoise(normal(1 / variance, mean), x, sigma), wanted, rtol=1e-5)


def test_compiled_work_does_not_grow_with_the_schedule():
    # Catches a Python loop over temperatures.
    traces = []

    def log_prob(x):
        traces.append(1)
        return -(x**2).sum(-1)

    counts = []
    for num in (2, 50):
        traces.clear()
        annealed_langevin(KEY, log_prob, jnp.ones((3, 1)), 0.1, np.ones(num))
        counts.append(len(traces))
    assert counts[0] == counts[1]


def test_no_gradient_flows_through_a_run():
    # Catches memory that grows with the schedule where a loss is taken of draws.
    total = jax.grad(lambda c: annealed_langevin(KEY, normal(c), jnp.ones((3, 1)), 0.1, [1.0, 0.5]).sum())
    assert total(2.0) == 0


def test_positions_keep_their_dtype():
    # Catches temperatures in double precision that promote the chains, which a scan refuses.
    with jax.enable_x64(True):
        x = annealed_langevin(KEY, normal(1.0), jnp.ones((3, 1), jnp.float32), 0.1)
        assert x.dtype == jnp.float32


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"temperatures": [1.0, -0.5]}, "-0.5"),
        ({"temperatures": [np.inf]}, "inf"),
        ({"temperatures": 1.0}, "vector"),
        ({"start": jnp.ones((3, 1), int)}, "int"),
        ({"start": jnp.ones(())}, "axis 0"),
        ({"start": {"v": jnp.ones((3, 1)), "h": jnp.ones((2, 1))}}, "same number of chains"),
    ],
)
def test_bad_input_is_refused_by_value(kwargs, named):
    # Catches chains that are silently nan, and errors from deep inside the scan.
    with pytest.raises(ValueError, match=named):
        annealed_langevin(**{"rng_key": KEY, "log_prob": normal(1.0), "start": jnp.ones((3, 1)), **kwargs})
