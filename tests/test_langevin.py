# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Langevin samplers against the closed forms of the Gaussian: see Roberts and Tweedie (1996) for the unadjusted chain."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.mcmc import mala

from numpyro_ebm import MALA, UnadjustedLangevin
from numpyro_ebm.samplers import MALAState, UnadjustedLangevinState
from numpyro_ebm.samplers.mala import ADAPTATION_GAIN

KEY = jax.random.key(20)


def quadratic(c, tilt=0.0):
    """The log density of N(tilt / c, 1 / c), one scalar per chain."""
    return lambda x: tilt * x - c * x**2 / 2


def moved(sampler, log_prob, state, key=KEY):
    """The state after one compiled run."""
    return jax.jit(lambda key, state: sampler.run(key, log_prob, state))(key, state)


def ula_moves(c, h, key=KEY):
    """One unadjusted step on a quadratic is x -> a x + b xi: both factors, read off the sampler itself."""
    sampler = UnadjustedLangevin(step_size=h, num_steps=1)
    x = sampler.run(key, quadratic(c), sampler.init(jnp.array([0.0, 1.0]))).position
    xi = jax.random.normal(jax.random.split(key, 1)[0], (2,))
    b = x[0] / xi[0]
    return x[1] - b * xi[1], b


def assert_moments(x, mean, variance, sigmas=4.5):
    """Mean and variance of independent Gaussian draws, within their standard errors."""
    n = len(x)
    assert abs(x.mean() - mean) < sigmas * np.sqrt(variance / n)
    assert abs(x.var() - variance) < sigmas * variance * np.sqrt(2 / n)


# The unadjusted chain


@pytest.mark.parametrize(("c", "h"), [(1.0, 0.1), (2.0, 0.25), (4.0, 0.4)])
def test_ula_stationary_variance_is_exact_at_finite_step(c, h):
    # Catches sqrt(h) for sqrt(2h), h/2 for h, a sign: the variance b^2 / (1 - a^2) of x -> a x + b xi is 1 / (c (1 - hc/2)).
    with jax.enable_x64(True):
        a, b = ula_moves(c, h)
        np.testing.assert_allclose(a, 1 - h * c, rtol=1e-12)
        np.testing.assert_allclose(b**2 / (1 - a**2), 1 / (c * (1 - h * c / 2)), rtol=1e-12)


def test_ula_simulated_variance_is_the_biased_one():
    # Catches a chain whose steps share their noise: one-step checks cannot see it. hc = .8: variance .833, the target's is .5.
    sampler = UnadjustedLangevin(step_size=0.4, num_steps=40)
    x = moved(sampler, quadratic(2.0), sampler.init(jnp.zeros(40_000))).position
    assert_moments(x, 0.0, 1 / (2 * (1 - 0.4)))


def test_ula_variance_never_falls_below_twice_the_step():
    # Catches a "correction" that would hide the floor: 1 / (c (1 - hc/2)) >= 2h, with equality at hc = 1.
    with jax.enable_x64(True):
        h, hc = 0.05, jnp.linspace(0.1, 1.9, 19)
        a, b = jax.vmap(lambda c: ula_moves(c, h))(hc / h)
        variance = b**2 / (1 - a**2)
        assert (variance > 2 * h - 1e-12).all()
        assert int(jnp.argmin(variance)) == 9  # hc = 1
        np.testing.assert_allclose(variance[9], 2 * h, rtol=1e-9)


def test_ula_weak_error_is_first_order():
    # Catches a scheme of another order, or noise that does not scale as sqrt(h): halving h must halve the bias of E[x^2].
    with jax.enable_x64(True):
        moves = [ula_moves(1.0, h) for h in (0.04, 0.02, 0.01)]
        bias = [float(b**2 / (1 - a**2)) - 1.0 for a, b in moves]
    assert bias[0] / bias[1] == pytest.approx(2.0, abs=0.05)
    assert bias[1] / bias[2] == pytest.approx(2.0, abs=0.03)


@pytest.mark.parametrize(("tilt", "tau", "num_steps"), [(1.5, 1.0, 8), (0.0, 3.0, 5), (-2.0, 2.0, 3)])
def test_short_run_moments_are_exact_at_finite_length(tilt, tau, num_steps):
    # Catches one step too many or too few: mean (tilt/tau)(1 - (1 - h tau)^J), variance q^J + 2h (1 - q^J)/(1 - q) from N(0, 1).
    h, q = 0.1, (1 - 0.1 * tau) ** 2
    sampler = UnadjustedLangevin(step_size=h, num_steps=num_steps)
    start = jax.random.normal(jax.random.key(1), (40_000,))
    x = moved(sampler, quadratic(tau, tilt), sampler.init(start)).position
    mean = tilt / tau * (1 - (1 - h * tau) ** num_steps)
    assert_moments(x, mean, q**num_steps + 2 * h * (1 - q**num_steps) / (1 - q))


def test_ula_agrees_with_the_other_step_convention():
    # Catches a factor 2 in the step: x + s^2/2 score + s xi at s = .4 is h = .08, with the same noise.
    s, log_prob = 0.4, quadratic(2.0, 1.0)
    sampler = UnadjustedLangevin(step_size=s**2 / 2, num_steps=6)
    x = start = jax.random.normal(jax.random.key(2), (5,))
    for key in jax.random.split(KEY, 6):
        x = x + s**2 / 2 * jax.vmap(jax.grad(log_prob))(x) + s * jax.random.normal(key, x.shape)
    np.testing.assert_allclose(moved(sampler, log_prob, sampler.init(start)).position, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        # x . grad U is tau |x|^2: d / (1 - h tau / 2) on the unadjusted chain, d on the adjusted one
        (UnadjustedLangevin(step_size=0.25, num_steps=30), 3 / (1 - 0.25)),
        (MALA(step_size=0.25, num_steps=120, adapt=False), 3.0),
    ],
    ids=["ula", "mala"],
)
def test_virial_identity(sampler, expected):
    # Catches a sampler that ignores part of an event: E[x . grad U] = d_x has all dimensions in it.
    tau, n = 2.0, 20_000
    state = moved(sampler, lambda x: -tau * (x**2).sum(-1) / 2, sampler.init(jnp.zeros((n, 3))))
    virial = tau * (state.position**2).sum(-1)
    assert abs(virial.mean() - expected) < 4.5 * expected * np.sqrt(2 / (3 * n))


@pytest.mark.parametrize("hc", [0.1, 0.6, 1.0])
def test_stiffness_estimates_step_times_curvature(hc):
    # Catches h E[s^2] reported without its inflation 1 / (1 - hc/2): at hc = 1 that reads 2.
    c, n, num_steps = 5.0, 4000, 20
    sampler = UnadjustedLangevin(step_size=hc / c, num_steps=num_steps)
    start = jax.random.normal(jax.random.key(3), (n,)) / np.sqrt(c * (1 - hc / 2))
    state = moved(sampler, quadratic(c), sampler.init(start))
    rho = (1 - hc) ** 2  # correlation of successive squares
    se = np.sqrt(2 / n * (1 + rho) / (1 - rho) / num_steps)
    assert float(state.stiffness) == pytest.approx(hc, rel=4.5 * se)


def test_travel_towards_the_mode_is_not_stiffness():
    # Catches E[s^2] for Var(s): chains that all start far away would warn although the step suits the energy.
    sampler = UnadjustedLangevin(step_size=0.1, num_steps=10)
    start = 30 + jax.random.normal(jax.random.key(3), (2000,))
    state = moved(sampler, quadratic(1.0), sampler.init(start))
    assert float(state.stiffness) == pytest.approx(0.1, rel=0.1)


def test_stiffness_is_that_of_the_steepest_direction():
    # Catches an average over the elements of an event, in which one sharp direction among many disappears.
    c = jnp.array([1.0, 1.0, 1.0, 60.0])
    sampler = UnadjustedLangevin(step_size=0.01, num_steps=20)
    state = moved(sampler, lambda x: -(c * x**2).sum(-1) / 2, sampler.init(jnp.zeros((2000, 4))))
    assert 0.5 < state.stiffness < 0.7


@pytest.mark.parametrize(("hc", "late"), [(0.1, 0), (0.7, 1), (2.5, 2)], ids=["healthy", "near the floor", "running away"])
def test_check_tells_the_three_regimes_apart(hc, late):
    # Catches a warning in the first runs (starts far away are steep) and a divergence that is never called one.
    sampler = UnadjustedLangevin(step_size=hc, num_steps=4)
    init = sampler.init(jax.random.normal(jax.random.key(4), (500,)))

    def run(state, key):
        state = sampler.run(key, quadratic(1.0), state)
        return state, sampler.check(state)

    status = jax.jit(lambda state: jax.lax.scan(run, state, jax.random.split(KEY, 60)))(init)[1]
    assert (status[:19] == 0).all()
    assert (status[20:49] == min(late, 1)).all()
    assert (status[50:] == late).all()


def test_check_forgives_one_calm_run():
    # Catches a count of all steep runs ever, which would stop every long training in the end.
    sampler = UnadjustedLangevin(step_size=0.7, num_steps=4)
    state = sampler.init(jax.random.normal(jax.random.key(4), (500,)))._replace(runs_near_floor=jnp.int32(19))
    assert int(sampler.check(moved(sampler, quadratic(1.0), state))) == 1
    assert int(moved(sampler, quadratic(0.1), state).runs_near_floor) == 0


def test_explanations_name_the_step_and_the_fix():
    # Catches a status that reaches the user without what to do.
    sampler = UnadjustedLangevin(step_size=0.05)
    for status in (1, 2):
        assert "0.05" in sampler.explain(status)
        assert "MALA" in sampler.explain(status)
    assert "2h = 0.1" in sampler.explain(1)


# The adjusted chain


def test_mala_variance_is_exact_where_ula_is_far_off():
    # Catches a missing or one-sided Metropolis correction: at hc = 1.5 the unadjusted variance is 4, not 1.
    sampler = MALA(step_size=1.5, num_steps=150, adapt=False)
    x = moved(sampler, quadratic(1.0), sampler.init(jnp.zeros(20_000))).position
    assert_moments(x, 0.0, 1.0)


def test_mala_satisfies_detailed_balance():
    # Catches a kernel that keeps moments but is not reversible: E[f(x0) g(x1)] = E[g(x0) f(x1)] from exact (logistic) draws.
    sampler, n = MALA(step_size=1.5, num_steps=1, adapt=False), 200_000
    x0 = jax.random.logistic(jax.random.key(5), (n,))
    x1 = moved(sampler, lambda x: -x - 2 * jax.nn.softplus(-x), sampler.init(x0)).position
    f, g = (lambda x: jnp.tanh(x + 1)), (lambda x: (x > 2.0).astype(x.dtype))
    gap = f(x0) * g(x1) - g(x0) * f(x1)
    assert (x0 != x1).any()
    assert abs(gap.mean()) < 4.5 * gap.std() / np.sqrt(n)


def test_mala_is_blackjax_step_by_step():
    # Catches a proposal or acceptance of our own that drifts from BlackJAX's: same keys, same chain.
    def log_density(x):
        return -((x[0] ** 2 - 1) ** 2) - (x[1] - x[0]) ** 2

    sampler, kernel = MALA(step_size=0.3, num_steps=8, adapt=False, small_steps=0.0), mala.build_kernel()
    start = jnp.array([0.5, -0.5])
    state, accepted, rate = mala.init(start, log_density), 0, sampler.target_acceptance
    for key in jax.random.split(jax.random.split(KEY)[0], 8):
        state, info = jax.jit(kernel, static_argnums=2)(key, state, log_density, 0.3)
        accepted, rate = accepted + int(info.is_accepted), rate + ADAPTATION_GAIN * (float(info.acceptance_rate) - rate)
    assert 0 < accepted < 8  # both branches were taken
    ours = moved(sampler, jax.vmap(log_density), sampler.init(start[None]))
    np.testing.assert_allclose(ours.position[0], state.position, rtol=1e-5, atol=1e-6)
    assert float(ours.acceptance) == pytest.approx(rate, abs=1e-5)


def test_small_steps_are_the_share_that_was_asked_for():
    # Catches a geometric distribution off by one: on a flat density E[moved^2] = 2h sum_g (1-p) p^g 10^-g = 2h (1-p) / (1 - p/10).
    p, h, n = 0.25, 0.5, 20_000
    sampler = MALA(step_size=h, num_steps=1, adapt=False, small_steps=p)
    init = sampler.init(jnp.zeros(1))
    squares = jax.vmap(lambda key: sampler.run(key, jnp.zeros_like, init).position[0] ** 2)(jax.random.split(KEY, n))
    assert abs(squares.mean() - 2 * h * (1 - p) / (1 - p / 10)) < 4.5 * squares.std() / np.sqrt(n)


def test_small_steps_free_a_chain_from_a_steep_place():
    # Catches a chain that training leaves where every full step is rejected: it would stay there for ever.
    for small_steps, home in ((0.25, True), (0.0, False)):
        sampler = MALA(step_size=0.1, num_steps=400, adapt=False, small_steps=small_steps)
        state = moved(sampler, lambda x: -(x**4), sampler.init(jnp.full(20, 10.0)))
        assert (abs(state.position) < 3).all() if home else (state.position == 10).all()


def test_mala_adapts_from_steps_far_too_small_and_too_large():
    # Catches a gain of the wrong sign (the step then runs away) and a target that is not used.
    precision, log_steps = jnp.array([1.0, 4.0, 4.0, 9.0]), []
    for start, target in ((1e-3, 0.574), (10.0, 0.574), (0.1, 0.8)):
        sampler = MALA(step_size=start, num_steps=250, target_acceptance=target)
        run = jax.jit(lambda key, state, s=sampler: s.run(key, lambda x: -(precision * x**2).sum(-1) / 2, state))
        state = run(jax.random.key(7), run(KEY, sampler.init(jnp.zeros((300, 4)))))
        assert float(state.acceptance) == pytest.approx(target, abs=0.01)
        log_steps.append(float(jnp.log(state.step_size)))
    assert log_steps[0] == pytest.approx(log_steps[1], abs=0.1)
    assert log_steps[2] < log_steps[0] - 0.3


def test_mala_without_adaptation_makes_every_step_alike_and_frozen_frees_stuck_chains_still():
    # Catches a quarter of the steps shrunk where a fixed step was asked for: on a flat density every square is 2h on average,
    # and E[x^4] = 3 (2h)^2; and a frozen sampler that loses its small steps, without which a chain that is stuck stays so.
    assert MALA(adapt=False) == MALA(adapt=False, small_steps=0.0)
    assert MALA().frozen() == MALA(adapt=False, small_steps=0.25)
    assert MALA(small_steps=0.1).frozen().small_steps == 0.1
    sampler, n = MALA(step_size=0.5, num_steps=1, adapt=False), 20_000
    init = sampler.init(jnp.zeros(1))
    x = jax.vmap(lambda key: sampler.run(key, jnp.zeros_like, init).position[0])(jax.random.split(KEY, n))
    assert_moments(x, 0.0, 1.0)
    assert abs((x**4).mean() - 3) < 4.5 * np.sqrt(96 / n)


def test_mala_without_adaptation_keeps_the_step():
    # Catches an adapt flag that is not read: the chain would no longer be reversible.
    sampler = MALA(step_size=2.0, num_steps=20, adapt=False)
    state = moved(sampler, quadratic(4.0), sampler.init(jnp.zeros(10)))
    assert state.step_size == 2.0
    assert 0 < state.acceptance < 1


@pytest.mark.parametrize(
    ("log_prob", "shape"),
    [(lambda x: jnp.where(x > 0, -x, -jnp.inf), 1.0), (lambda x: jnp.log(x) - x, 2.0)],
    ids=["minus infinity", "nan"],
)
def test_mala_rejects_a_move_out_of_the_support(log_prob, shape):
    # Catches an acceptance of -inf or nan that moves a chain there, or that turns the adapted step into nan.
    n = 20_000
    start = jax.random.gamma(jax.random.key(6), shape, (n,))  # exact draws: the distribution must stay
    for adapt in (True, False):
        sampler = MALA(step_size=1.0, num_steps=20, adapt=adapt)
        state = moved(sampler, log_prob, sampler.init(start))
        assert all(jnp.isfinite(leaf).all() for leaf in state)
        assert (state.position > 0).all()
    assert abs(state.position.mean() - shape) < 4.5 * np.sqrt(shape / n)


def test_elements_of_a_batched_site_are_accepted_by_themselves_and_have_steps_of_their_own():
    # Catches one acceptance or one step for all: the wide element, 100 times the narrow one, would hardly move from 0 to 3.
    curvature, n = jnp.array([1.0, 1e4]), 4000

    def log_prob(x):
        return -curvature * ((x - 3) ** 2).sum(-1) / 2

    sampler = MALA(num_steps=200)
    state = moved(sampler, log_prob, sampler.init(jnp.zeros((n, 2, 1)), log_prob))
    assert state.step_size.shape == state.acceptance.shape == (2,)
    assert state.step_size[0] > 1000 * state.step_size[1]
    scaled = (state.position[..., 0] - 3) * jnp.sqrt(curvature)  # standard normal
    np.testing.assert_allclose(scaled.mean(0), 0, atol=4.5 / np.sqrt(n))
    np.testing.assert_allclose(scaled.var(0), 1, atol=4.5 * np.sqrt(2 / n))


# Both


SAMPLERS = [UnadjustedLangevin, MALA]


@pytest.mark.parametrize("cls", SAMPLERS)
def test_zero_steps_leave_the_chains_where_they_are(cls):
    # Catches a scan of length 0 whose diagnostics divide by 0.
    sampler = cls(num_steps=0)
    state = sampler.init(jnp.array([0.3, -2.0]))
    for new, old in zip(sampler.run(KEY, quadratic(1.0), state), state, strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_samplers_are_frozen_and_hashable_by_value(cls):
    # Catches a sampler that cannot be static data of a distribution: jit would refuse it or compile afresh at every call.
    assert cls(step_size=0.2) == cls(step_size=0.2) != cls(step_size=0.3)
    assert hash(cls(step_size=0.2)) == hash(cls(step_size=0.2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().step_size = 1.0


@pytest.mark.parametrize(("cls", "state_cls"), [(UnadjustedLangevin, UnadjustedLangevinState), (MALA, MALAState)])
def test_states_are_named_tuples_that_jit_and_vmap(cls, state_cls):
    # Catches a Python number in a state, a dtype that changes in a run (a scan would refuse it), and chains that mix under vmap.
    sampler, precision = cls(step_size=0.1, num_steps=3), jnp.array([1.0, 4.0])

    def run(key, c, state):
        return sampler.run(key, quadratic(c), state)

    init = sampler.init(jnp.ones((2, 5)))
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, *leaf.shape)), sampler.init(jnp.ones(5)))
    assert isinstance(init, state_cls)
    assert all(isinstance(leaf, jax.Array) for leaf in init)
    keys = jax.random.split(KEY, 2)
    batched = jax.jit(jax.vmap(run))(keys, precision, state)
    assert isinstance(batched, state_cls)
    for i in range(2):
        alone = run(keys[i], precision[i], sampler.init(jnp.ones(5)))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), alone) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), sampler.init(jnp.ones(5))
        )
        for ours, theirs in zip(alone, batched, strict=True):
            np.testing.assert_allclose(ours, theirs[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_compiled_work_does_not_grow_with_steps_or_chains(cls):
    # Catches a Python loop over steps or chains, and a run that compiles again for equal shapes.
    traces = Counter()

    def traced(num_steps, num_chains):
        sampler = cls(num_steps=num_steps)

        def log_prob(x):
            traces[num_steps, num_chains] += 1
            return -(x**2).sum(-1)

        run = jax.jit(lambda key, state: sampler.run(key, log_prob, state))
        state = run(KEY, sampler.init(jnp.ones((num_chains, 2))))
        first = traces[num_steps, num_chains]
        run(jax.random.key(9), state)
        assert traces[num_steps, num_chains] == first
        return first

    assert traced(2, 1) == traced(40, 1) == traced(2, 64)


@pytest.mark.parametrize("num_chains", [1, 7])
def test_ula_takes_one_gradient_per_step_for_all_chains(num_chains):
    # Catches a gradient per chain, or a second evaluation of the energy in a step.
    calls, sampler = [], UnadjustedLangevin(num_steps=5)

    def log_prob(x):
        jax.debug.callback(lambda: calls.append(1))
        return -(x**2)

    sampler.run(KEY, log_prob, sampler.init(jnp.ones(num_chains))).position.block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 5


@pytest.mark.parametrize("cls", SAMPLERS)
def test_no_gradient_flows_through_a_run(cls):
    # Catches a negative phase that backpropagates through its chains: biased, and memory that grows with the steps.
    sampler = cls(num_steps=3)

    def total(c, start):
        state = sampler.run(KEY, quadratic(c), sampler.init(start))
        return sum(leaf.astype(float).sum() for leaf in state)

    grads = jax.grad(total, argnums=(0, 1))(2.0, jnp.ones(4))
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("cls", SAMPLERS)
def test_float64_chains_stay_float64(cls):
    # Catches a float32 constant in the step: under x64 the noise and the step would lose half their digits.
    with jax.enable_x64(True):
        sampler = cls(step_size=0.1, num_steps=4)
        start = jnp.ones(3)
        state = moved(sampler, quadratic(1.0), sampler.init(start))
        assert state.position.dtype == jnp.float64
        assert all(leaf.dtype in (jnp.float64, jnp.int32) for leaf in state)
        if cls is UnadjustedLangevin:
            x = np.ones(3)
            for key in jax.random.split(KEY, 4):
                x = x - 0.1 * x + np.sqrt(0.2) * np.asarray(jax.random.normal(key, (3,)))
            np.testing.assert_allclose(state.position, x, rtol=1e-13)


@pytest.mark.parametrize(
    "cls",
    [
        UnadjustedLangevin,
        MALA,
    ],
)
def test_float32_chains_on_a_float64_density_stay_float32(cls):
    # Catches a state whose dtype is that of the energy's parameters: the scan over steps then refuses its carry.
    with jax.enable_x64(True):
        sampler = cls(num_steps=2)
        precision = jnp.ones((), jnp.float64)
        state = moved(sampler, quadratic(precision), sampler.init(jnp.ones(3, jnp.float32)))
        assert state.position.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("cls", SAMPLERS)
def test_chains_of_half_precision_stay_so(cls, dtype):
    # Catches a run that ends in float32, which a scan over runs refuses.
    sampler = cls(num_steps=2)
    state = moved(sampler, quadratic(1.0), sampler.init(jnp.ones(3, dtype)))
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, sampler.init(jnp.ones(3, dtype)))
    assert state.position.dtype == dtype
    assert (state.position != 1).any()


def test_mala_adapts_at_half_precision_as_at_single():
    # Catches log h in bfloat16, whose digits end where a single adaptation begins: the step would stay at 1e-3.
    sampler = MALA(step_size=1e-3, num_steps=200)
    steps = [moved(sampler, quadratic(1.0), sampler.init(jnp.zeros(300, d))).step_size for d in (jnp.bfloat16, jnp.float32)]
    assert jnp.log(steps[0]) == pytest.approx(float(jnp.log(steps[1])), abs=0.3)
    assert steps[1] > 0.3


@pytest.mark.parametrize("cls", SAMPLERS)
def test_same_key_same_chains(cls):
    # Catches hidden state or a key that is not used.
    sampler = cls(num_steps=2)
    init = sampler.init(jnp.ones(5))
    one, two, other = (moved(sampler, quadratic(1.0), init, key).position for key in (KEY, KEY, jax.random.key(21)))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    assert len(np.unique(np.asarray(one))) > 1  # chains have noise of their own
