# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The compiled loop of all engines: what it compiles, where the host takes part, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_engine_contract import CASES, KEY, RATE, Y, _assert_same, _keep, _pgd

from numpyro_ebm import EnergyDistribution, ExactScoreMatching, ScoreMatching
from numpyro_ebm._conjugate_gradient import conjugate_gradient
from numpyro_ebm.infer import engine as engine_module
from numpyro_ebm.train import loop as loop_module
from numpyro_ebm.train import steps as steps_module
from numpyro_ebm.train.health import NonFiniteError, Part, health_of, is_bad, named

pytestmark = pytest.mark.usefixtures("optimized")
FAMILIES = ("pgd", "ebipla", "kinetic and subsampled", "score matching", "bism", "vages", "bidvl")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def runs():
    """One item for every run of the model by Python."""
    return []


@pytest.fixture(scope="module")
def engine(case, runs):
    def watch(model):
        return lambda *args, **kwargs: runs.append(1) or model(*args, **kwargs)

    return case.make(watch)


@pytest.fixture(scope="module")
def start(case, engine):
    return engine.init(KEY, *case.args)


@pytest.fixture(scope="module")
def updated(case, engine, start, runs):
    """States and losses of twelve updates, and how often the first ran the model."""
    states, losses = [start], []
    runs.clear()
    for _ in range(12):
        state, loss = engine.update(states[-1], *case.args)
        states.append(state)
        losses.append(loss)
    return states, jnp.stack(losses), len(runs)


def _run(engine, case, start, num_steps=12, **settings):
    return engine.run(KEY, num_steps, *case.args, **{"progress_bar": False, "init_state": start, **settings})


# What is traced and compiled.


def test_a_step_is_traced_once_and_compiled_twice(case, engine, start, updated, runs):
    """Catches a trace for shapes, a loop or ``stable`` that trace the model anew, and a program for each of them."""
    assert 0 < updated[2] <= 6
    runs.clear()
    _run(engine, case, start)
    _run(engine, case, start, 7, stable_update=True)
    _run(engine, case, start, collect=_keep)
    engine.stable_update(start, *case.args)
    assert runs == []
    assert engine._steps.one._cache_size() == 1
    assert engine._steps.open_loop._cache_size() == 2  # without and with a function to collect


# Loops of fixed length, as accelerators have them.


@pytest.fixture
def fixed(monkeypatch):
    monkeypatch.setattr(loop_module, "asks_the_host", lambda *trees: True)
    monkeypatch.setattr(steps_module, "FIXED_LENGTH", 5)


@pytest.mark.parametrize("chunk_size", [None, 4, 12])
def test_loops_of_fixed_length_give_the_numbers_of_updates(case, engine, start, updated, fixed, chunk_size):
    """Bit for bit. Catches steps lost or made twice where loops and single steps meet."""
    result = _run(engine, case, start, chunk_size=chunk_size, collect=_keep)
    states, losses, _ = updated
    _assert_same(result.state, states[-1])
    np.testing.assert_array_equal(result.losses, losses)
    np.testing.assert_array_equal(result.collected["params"]["loc"], [state.params["loc"] for state in states[1:]])


@pytest.mark.parametrize("name", CASES)
def test_a_fixed_loop_never_asks_the_host(name):
    """No ``while`` and no ``cond`` in the program: a device asks the host which way either goes."""
    engine, args = CASES[name].make(), CASES[name].args
    dynamic, static = engine_module._split(args, {})
    program = jax.make_jaxpr(
        lambda state: engine._steps._make_fixed(
            state, np.False_, np.False_, 0, dynamic, static=static, collect=None, length=3, stacked=()
        )
    )(jax.eval_shape(lambda: engine.init(KEY, *args)))
    assert "scan" in _primitives(program)
    assert not {"while", "cond"} & _primitives(program)


def _primitives(program):
    found, of_platform = set(), set()
    for equation in program.eqns if hasattr(program, "eqns") else program.jaxpr.eqns:
        if equation.primitive.name == "platform_index":
            of_platform |= set(equation.outvars)
        elif equation.primitive.name == "cond" and equation.invars[0] in of_platform:
            found |= _primitives(
                equation.params["branches"][-1]
            )  # which one is known when it is compiled: the default, not a CPU's
            continue
        found.add(equation.primitive.name)
        for inside in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inside, "eqns") or hasattr(inside, "jaxpr"):
                found |= _primitives(inside)
    return found


def test_the_walk_through_programs_sees_conditions_inside_functions():
    """The test before this one must be able to fail."""
    inside = jax.jit(lambda x: jax.lax.cond(x > 0, lambda: x, lambda: jax.lax.while_loop(lambda y: y < 0, lambda y: y + 1, x)))
    program = jax.make_jaxpr(lambda x: jax.lax.scan(lambda x, _: (inside(x), None), x, None, length=2))(1.0)
    assert {"while", "cond", "scan"} <= _primitives(program)


@pytest.mark.parametrize("chunk_size", [3, 20])
def test_loops_of_fixed_length_stop_before_a_bad_step(fixed, chunk_size):
    """Catches steps that are made after a bad one in the same loop, or by the single steps that follow it."""
    engine = _pgd(optim=numpyro.optim.SGD(lambda step: jnp.where(step < 6, RATE, jnp.inf)))
    with pytest.raises(NonFiniteError, match=r"^step 7: .* learning rate.* What was seen: param 'loc'") as error:
        engine.run(KEY, 18, Y, progress_bar=False, chunk_size=chunk_size)
    assert error.value.step == 7
    assert error.value.health == {Part("param", "loc"): 1, Part("param", "spread"): 1}
    _assert_same(error.value.state, engine.run(KEY, 6, Y, progress_bar=False).state, but=("rng_key",))
    stable = engine.run(KEY, 18, Y, progress_bar=False, chunk_size=chunk_size, stable_update=True)
    np.testing.assert_array_equal(np.isnan(stable.losses), np.arange(18) >= 6)
    assert (int(stable.state.num_steps), int(stable.state.num_skipped)) == (6, 12)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_run_that_skips_makes_the_stable_updates(chunk_size):
    """Bit for bit, where batches are good and bad in turn. Catches a loop that is not run again to the state before a bad step,
    or one step too far, and a step that was skipped and is not recorded."""
    engine, bad = CASES["score matching"].make(), Y.at[2].set(jnp.nan)
    start = state = engine.init(KEY, Y)
    states, losses = [], []
    for _ in range(20):
        state, loss = engine.stable_update(state, bad)
        states.append(state)
        losses.append(loss)
    skipped = np.isnan(np.array(losses))
    assert (skipped[:-1] & ~skipped[1:]).any()
    assert (~skipped[:-1] & skipped[1:]).any()
    settings = {"progress_bar": False, "init_state": start, "stable_update": True, "collect": _keep, "chunk_size": chunk_size}
    result = engine.run(KEY, 20, bad, **settings)
    np.testing.assert_array_equal(result.losses, losses)
    _assert_same(result.state, state)
    np.testing.assert_array_equal(result.collected["params"]["loc"], [state.params["loc"] for state in states])
    assert int(result.state.num_skipped) == skipped.sum()


@pytest.mark.parametrize("chunk_size", [4, 20])
def test_no_step_is_made_after_a_bad_one_though_it_would_be_good(monkeypatch, chunk_size):
    """One row is bad, and a batch of four has it or not. Catches steps that are made after the run has stopped."""
    engine = CASES["score matching"].make()
    start, bad = engine.init(KEY, Y), Y.at[2].set(jnp.nan)
    losses = engine.run(KEY, 20, bad, progress_bar=False, init_state=start, stable_update=True).losses
    first = int(np.isnan(losses).argmax())
    assert np.isfinite(losses[:first]).all()
    assert np.isfinite(losses[first + 1 :]).any()
    good = engine.run(KEY, first, bad, progress_bar=False, init_state=start).state if first else start
    monkeypatch.setattr(loop_module, "asks_the_host", lambda *trees: True)
    for length in (5, 30):  # one of loops and single steps, one of single steps alone
        monkeypatch.setattr(steps_module, "FIXED_LENGTH", length)
        with pytest.raises(NonFiniteError, match=f"^step {first + 1}: site 'y'") as error:
            engine.run(KEY, 20, bad, progress_bar=False, init_state=start, chunk_size=chunk_size)
        _assert_same(error.value.state, good, but=("rng_key",))


def test_rows_kept_by_the_step_stay_after_a_bad_one(fixed):
    """With a subsampled plate, and noise on all rows. Catches particles that move on after the run has stopped."""
    case = CASES["kinetic and subsampled"]
    engine, bad = case.make(), jnp.full_like(Y, jnp.nan)
    state = engine.init(KEY, Y)
    for chunk_size in (2, 5):
        with pytest.raises(NonFiniteError, match="step 1: site 'y'") as error:
            engine.run(KEY, 5, bad, progress_bar=False, init_state=state, chunk_size=chunk_size)
        _assert_same(error.value.state, state, but=("rng_key",))


# Callbacks, processes and meshes.


def test_callbacks_share_the_losses_and_do_not_join_them(monkeypatch):
    """Catches a callback whose cost grows with the steps made before: all losses so far were joined at each."""
    seen = []
    _pgd().run(KEY, 12, Y, progress_bar=False, chunk_size=2, callbacks=[lambda step, state, losses: seen.append(losses)])
    assert [len(losses) for losses in seen] == [2, 4, 6, 8, 10, 12]
    assert all(np.shares_memory(losses, seen[-1]) for losses in seen)


def test_chunks_do_not_go_by_the_clock_where_several_processes_run(monkeypatch):
    """Catches chunks that differ between processes, which then wait for each other for ever."""
    clock = iter(range(0, 10**6, 1000))  # very slow steps, which one process alone would make one by one
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: next(clock))
    assert _sizes(loop_module.Pace(None, None, 3.0)) == [1, 1, 1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert _sizes(loop_module.Pace(None, None, 3.0)) == [steps_module.FIXED_LENGTH] * 3
    assert _sizes(loop_module.Pace(7, None, 3.0)) == [7, 7, 7]


def _sizes(pace):
    sizes = []
    for _ in range(3):
        sizes.append(pace.next())
        pace.tell(sizes[-1])
    return sizes


def test_chunks_of_loops_of_fixed_length_are_multiples_of_it(monkeypatch):
    clock = iter(np.arange(0, 1000, 0.01))
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: next(clock))
    assert all(size % 5 == 0 for size in _sizes(loop_module.Pace(None, 5, 3.0)))


# Health.


def test_health_names_what_is_not_finite():
    """Catches integers taken for bad, and a site that loses its name."""
    health = health_of("loss", jnp.array(jnp.inf)) | health_of("param", {"a": jnp.ones(3), "b": {"w": jnp.array([0.0, jnp.nan])}})
    health |= health_of("mutable", {"count": jnp.zeros((), jnp.int32)})
    assert is_bad(health)
    bad = {part: int(code) for part, code in health.items() if code}
    assert bad == {("loss", ""): 1, ("param", "b"): 1}
    assert named(bad) == "the loss, param 'b'"
    assert not is_bad(health_of("mutable", {"count": jnp.zeros((), jnp.int32)}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_seen_anywhere(bad):
    """Catches a maximum that loses a nan, or an overflow of what is finite."""
    largest = np.finfo(np.float32).max
    at = jax.jit(lambda x: is_bad(health_of("loss", x)))
    for place in (0, 7, 16):
        x = np.full(17, -largest, np.float32)
        assert not at(x)
        x[place] = bad
        assert at(x)
    assert not at(np.zeros(0, np.float32))


def test_conjugate_gradient_is_that_of_jax():
    """To rounding, at every number of steps, also past the tolerance. Catches a step that is made after the end."""
    root = jax.random.normal(KEY, (6, 6))
    matrix, b = root @ root.T + jnp.eye(6), {"x": jnp.arange(4.0), "y": jnp.array([1.0, -1.0])}

    def product(tree):
        y = matrix @ jnp.concatenate([tree["x"], tree["y"]])
        return {"x": y[:4], "y": y[4:]}

    for num_steps, tol in ((1, 0.0), (3, 1e-5), (6, 1e-5), (30, 1e-3)):
        ours = conjugate_gradient(product, b, num_steps, tol)
        theirs, _ = jax.scipy.sparse.linalg.cg(product, b, tol=tol, maxiter=num_steps)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), ours, theirs)


def test_conjugate_gradient_stops_before_a_direction_of_negative_curvature():
    """By hand: the first step has curvature 2 - 1 and reaches (2, 2), the next direction is (6, 12). Catches the step along it,
    which JAX's makes, and numbers that are nan and lost.
    """
    b = jnp.ones(2)
    np.testing.assert_allclose(conjugate_gradient(lambda x: jnp.array([2.0, -1.0]) * x, b, 10, 0.0), [2, 2])
    np.testing.assert_array_equal(conjugate_gradient(lambda x: -x, b, 10, 0.0), [0, 0])
    assert jnp.isnan(conjugate_gradient(lambda x: jnp.nan * x, b, 10, 0.0)).all()


# Where the loop cannot be, and meshes.


def test_updates_can_be_differentiated():
    """Exact, after one step of a Gaussian's precision. Catches a step inside a loop, which has no reverse mode."""
    v, precision = jnp.array([0.5, -1.0, 2.0]), 1.3

    def model(v):
        p = numpyro.param("precision", precision)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", EnergyDistribution(lambda v: p * v**2 / 2), obs=v)

    engine = ScoreMatching(model, optax.sgd(RATE), ExactScoreMatching())
    state = engine.init(KEY, v)
    gradient = jax.grad(lambda v: engine.update(state, v)[0].params["precision"])(v)
    np.testing.assert_allclose(gradient, -2 * RATE * precision * v / len(v), rtol=1e-5)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_a_run_inside_a_transformation_is_refused(transform):
    """Catches JAX's error about a traced array somewhere inside, which names neither run nor update."""
    engine = _pgd()
    with pytest.raises(TypeError, match=r"run looks at numbers between its chunks, .* by update, in a lax.scan"):
        transform(lambda y: engine.run(KEY, 3, y, progress_bar=False).params["loc"])(jnp.stack([Y, Y]))


@pytest.fixture
def explicit():
    """Data on a mesh whose axes are explicit, as :func:`jax.make_mesh` makes them."""
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Explicit,))
    return jax.device_put(Y, NamedSharding(mesh, PartitionSpec("rows")))


def test_runs_on_explicit_meshes(explicit):
    """Catches a buffer of losses that is not laid out as the losses are."""

    def model(y):
        loc = numpyro.param("loc", 0.5)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(loc, 1), obs=y)

    engine = ScoreMatching(model, optax.sgd(RATE), ExactScoreMatching())
    there, here = (engine.run(KEY, 5, y, progress_bar=False, collect=_keep) for y in (explicit, Y))
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-6)


def test_what_explicit_meshes_refuse_says_what_to_do(explicit):
    with pytest.raises(Exception, match="sharding") as error:
        _pgd().run(KEY, 5, explicit, progress_bar=False)
    assert "AxisType.Auto" in error.value.__notes__[0]
