# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What every engine promises. An engine joins by one line in CASES."""

import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI, Predictive

from numpyro_ebm import (
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    Implicit,
    ImportanceWeighted,
    ParticleMMLE,
    ScoreMatching,
    TiltedDistribution,
    UnadjustedLangevin,
    Unrolled,
    VaGES,
    Variational,
    negative_phase,
)
from numpyro_ebm.infer.engine import Engine, RunResult
from numpyro_ebm.train.health import NonFiniteError

pytestmark = pytest.mark.usefixtures("optimized")
Y = jnp.array([0.4, 2.9, 1.1, 3.2, -0.6, 1.4])  # mean 1.4
KEY = jax.random.key(7)
RATE = 0.02


class Case(NamedTuple):
    """One engine in one setting."""

    #: ``make(watch, optim)``: an engine with ``watch(model)`` for its model, and this optimizer, if it takes one
    make: Callable[..., Engine]
    #: arguments of the model; the first is the data, observed at site 'y', and a keyword ``times`` multiplies it
    args: tuple[Any, ...]
    #: what is learned in the long run, by param site; a param 'spread', which starts at 2, is positive
    exact: dict[str, float]
    #: whether it takes an optimizer, which is then ``optax.sgd(RATE)`` if not given
    takes_optim: bool
    #: latent sites of the model
    latents: tuple[str, ...] = ("x",)
    #: param sites beside 'loc' and 'spread', those of a guide or of an energy
    others: tuple[str, ...] = ()
    #: whether ``times=2`` is the same as data that are twice as large: noise that is added to data is not
    is_linear: bool = True


def _normal(y, times=1, subsample_size=None):
    """The marginal distribution of y is N(loc, 2), so loc = mean(y); spread is learned from data of its own."""
    loc = numpyro.param("loc", 0.5)
    _spread()
    with numpyro.plate("data", len(y), subsample_size=subsample_size) as index:
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=times * y[index])


def _minibatches(y, times=1):
    _normal(y, times, subsample_size=3)


def _tilted(y, times=1):
    """A prior N(loc, 1) as an energy with an unknown normalizer."""
    loc = numpyro.param("loc", 0.5)
    _spread()
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -loc * x, sampler=UnadjustedLangevin(0.5, 5)))
        numpyro.sample("y", dist.Normal(x, 1), obs=times * y)


def _spread():
    spread = numpyro.param("spread", 2.0, constraint=constraints.positive)
    numpyro.sample("w", dist.Normal(0, spread).expand([6]).to_event(1), obs=jnp.array([1.0, -2.0, 0.5, 1.5, -1.0, 0.7]))


def _marginal(y, times=1):
    """Noise of .3 on the data widens spread, and leaves loc as it is."""
    loc = numpyro.param("loc", 0.5)
    spread = numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(loc, spread), obs=times * y)


def _joint(y, times=1):
    loc = numpyro.param("loc", 0.5)
    spread = numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 0.5))
        numpyro.sample("y", dist.Normal(x, spread), obs=times * y)


def _guide(y, times=1):
    slope, shift = numpyro.param("slope", 0.0), numpyro.param("shift", 0.5)
    width = numpyro.param("width", 0.5, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("x", dist.Normal(slope * times * y + shift, width))


def _generator(y, times=1):
    """The distribution of y is N(loc, spread^2 + 1/4)."""
    loc = numpyro.param("loc", 0.5)
    spread = numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(loc + 0.5 * x, spread), obs=times * y)


def _energy(y, times=1):
    center = numpyro.param("center", 0.5)
    scale = numpyro.param("scale", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: ((y - center) / scale) ** 2 / 2), obs=times * y)


def _unwatched(model):
    return model


def _pgd(watch=_unwatched, optim=None):
    return ParticleMMLE(watch(_normal), optax.sgd(RATE) if optim is None else optim, num_particles=3, step_size=0.05)


def _ipla(watch=_unwatched):
    return ParticleMMLE.ipla(watch(_normal), num_particles=3, step_size=0.05)


def _kinetic(watch=_unwatched):
    return ParticleMMLE.kiplmc1(watch(_minibatches), num_particles=3, step_size=0.1, friction=1.5)


def _ebipla(watch=_unwatched, optim=None):
    chains = negative_phase(watch(_tilted), num_chains=8, sampler=UnadjustedLangevin(0.5, 12), persistent=False)
    return ParticleMMLE.ebipla(chains, optax.sgd(RATE) if optim is None else optim, num_particles=3, step_size=0.1)


def _score_matching(watch=_unwatched, optim=None):
    return ScoreMatching(watch(_marginal), optax.sgd(RATE) if optim is None else optim, DenoisingScoreMatching(0.3), batch_size=4)


def _bism(watch=_unwatched, optim=None, **settings):
    optim = optax.sgd(RATE) if optim is None else optim
    settings = {"num_inner_steps": 2, "hypergradient": Unrolled(10), **settings}
    return BiSM(watch(_joint), _guide, optim, optax.sgd(0.02), DenoisingScoreMatching(0.3), **settings)


def _implicit(watch=_unwatched, optim=None):
    return _bism(watch, optim, hypergradient=Implicit(), batch_size=4)


def _vages(watch=_unwatched, optim=None, **settings):
    optim = optax.sgd(RATE) if optim is None else optim
    settings = {"num_inner_steps": 2, "estimate": Variational(4), **settings}
    return VaGES(watch(_joint), _guide, optim, optax.sgd(0.02), DenoisingScoreMatching(0.3), **settings)


def _weighted(watch=_unwatched, optim=None):
    return _vages(watch, optim, estimate=ImportanceWeighted(4, jackknife=True), batch_size=4)


def _bidvl(watch=_unwatched, optim=None):
    """The energy by ``optim``; what is learned in the end is the generator."""
    optims = (optax.sgd(RATE) if optim is None else optim, optax.sgd(RATE), optax.sgd(RATE))
    return BiDVL(_energy, _guide, watch(_generator), *optims, batch_size=4)


EXACT = {"loc": 1.4}
OF_GUIDE = ("slope", "shift", "width")
CASES = {
    "pgd": Case(_pgd, (Y,), EXACT, True),
    "ipla": Case(_ipla, (Y,), EXACT, False),
    "ebipla": Case(_ebipla, (Y,), EXACT, True),
    "kinetic and subsampled": Case(_kinetic, (Y,), EXACT, False),
    "score matching": Case(_score_matching, (Y,), EXACT, True, (), is_linear=False),
    "bism": Case(_bism, (Y,), EXACT, True, others=OF_GUIDE, is_linear=False),
    "bism, implicit": Case(_implicit, (Y,), EXACT, True, others=OF_GUIDE, is_linear=False),
    "vages": Case(_vages, (Y,), EXACT, True, others=OF_GUIDE, is_linear=False),
    "vages, weighted": Case(_weighted, (Y,), EXACT, True, others=OF_GUIDE, is_linear=False),
    "bidvl": Case(_bidvl, (Y,), EXACT, True, others=(*OF_GUIDE, "center", "scale"), is_linear=False),
}


VARIANTS = ("ipla", "bism, implicit", "vages, weighted")  # of an engine that is there in another setting
ONE_OF_EACH = ("ebipla", "score matching", "bism", "vages", "bidvl")  # for what hangs on the engine's class and compiles it anew


def _cases(quick):
    """All cases, the others marked as slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module", params=_cases([name for name in CASES if name not in VARIANTS]))
def case(request):
    return CASES[request.param]


by_class = pytest.mark.parametrize("case", _cases(ONE_OF_EACH), indirect=True, scope="module")


@pytest.fixture(scope="module")
def calls():
    """The type of ``times`` at every call of the model by Python."""
    return []


@pytest.fixture(scope="module")
def engine(case, calls):
    def watch(model):
        def watched(*args, times=1):
            calls.append(type(times))
            return model(*args, times=times)

        return watched

    calls.clear()
    return case.make(watch)


@pytest.fixture(scope="module")
def start(case, engine):
    return engine.init(KEY, *case.args)


@pytest.fixture(scope="module")
def by_hand(case, engine, start):
    """States and losses of twelve updates, the start first."""
    states, losses = [start], []
    for _ in range(12):
        state, loss = engine.update(states[-1], *case.args)
        states.append(state)
        losses.append(loss)
    return states, jnp.stack(losses)


def _key_data(state):
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)


def _assert_same(a, b, but=()):
    """The same numbers, bit for bit."""
    for name, x, y in zip(a._fields, a, b, strict=True):
        if name not in but:
            jax.tree.map(np.testing.assert_array_equal, _key_data(x), _key_data(y))


def _is_finite(tree):
    return all(jnp.isfinite(x).all() for x in jax.tree.leaves(_key_data(tree)) if jnp.issubdtype(x.dtype, jnp.inexact))


def _keep(state):
    return {"params": state.params, "key": state.rng_key}


def _run(engine, num_steps, case, **settings):
    return engine.run(KEY, num_steps, *case.args, **{"progress_bar": False, **settings})


# The verbs.


def test_help_of_an_engine_shows_its_settings():
    # Catches a metaclass whose __call__ hides them: help() and editors then say (*args, **kwargs).
    for engine, first in ((ParticleMMLE, "model"), (BiSM, "model"), (BiDVL, "energy")):
        names = list(inspect.signature(engine).parameters)
        assert names == list(inspect.signature(engine.__init__).parameters)[1:]
        assert names[0] == first


@pytest.mark.parametrize("verb", ["init", "update", "stable_update", "run", "evaluate", "get_params"])
def test_verbs_have_the_signatures_of_svi(engine, verb):
    """Catches an argument renamed, moved, or with another default: SVI's calls must work as they are."""
    ours, svis = (inspect.signature(getattr(owner, verb)).parameters for owner in (type(engine), SVI))
    not_in_svi = ("collect", "callbacks", "chunk_size", "report", "checkpoint", "mesh", "validation", "patience")
    ours = [p for p in ours.values() if p.name not in not_in_svi]
    svis = [p for p in svis.values() if p.name != "forward_mode_differentiation"]
    renamed = {"svi_state": "state"}
    assert [(p.name, p.kind, p.default) for p in ours] == [(renamed.get(p.name, p.name), p.kind, p.default) for p in svis]


def test_result_begins_with_the_fields_of_svis(case, engine):
    assert RunResult._fields[:3] == ("params", "state", "losses")
    result = _run(engine, 5, case)
    assert result.losses.shape == (5,)
    assert result.losses.dtype == jnp.float32
    assert isinstance(result.losses, jax.Array)
    assert result.collected is None
    assert set(result.params) == {"loc", "spread", *case.others}
    jax.tree.map(np.testing.assert_array_equal, result.params, engine.get_params(result.state))


def test_state_is_a_named_tuple_of_arrays(start):
    assert isinstance(start, tuple)
    assert {"params", "rng_key", "num_steps", "num_skipped"} <= set(start._fields)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(start))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(_key_data(start)))  # a weak type would compile twice
    _assert_same(start, jax.jit(lambda state: state)(start))


# The same numbers, however they are made.


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 12])
@pytest.mark.parametrize("progress_bar", [False, True])
def test_run_gives_the_numbers_of_repeated_updates(case, engine, by_hand, chunk_size, progress_bar):
    """Bit for bit. Catches keys that depend on the chunk, and steps lost or made twice where chunks meet."""
    states, losses = by_hand
    result = _run(engine, 12, case, chunk_size=chunk_size, progress_bar=progress_bar)
    _assert_same(result.state, states[-1])
    np.testing.assert_array_equal(result.losses, losses)
    assert int(result.state.num_steps) == 12


@pytest.mark.filterwarnings("ignore:site '")
def test_a_report_leaves_the_state_as_it_is(case, engine, by_hand):
    """Bit for bit, of runs that are too short to be believed. Catches one that fails, which a report must not let on."""
    states, losses = by_hand
    result = _run(engine, 12, case, report=True)
    _assert_same(result.state, states[-1])
    np.testing.assert_array_equal(result.losses, losses)
    assert not result.report.failure, result.report
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(result))
    assert _run(engine, 12, case).report is None


def test_stable_update_gives_the_same_numbers_where_all_is_finite(case, engine, by_hand):
    states, losses = by_hand
    state, loss = engine.stable_update(states[4], *case.args)
    np.testing.assert_array_equal(loss, losses[4])
    _assert_same(state, states[5])


def test_two_halves_are_one_run_and_keep_the_state_they_start_from(case, engine, by_hand):
    """Catches a donated init_state, which JAX would have deleted, and keys that begin again."""
    states, _ = by_hand
    first = _run(engine, 7, case)
    second = _run(engine, 5, case, init_state=first.state)
    _assert_same(second.state, states[-1])
    _assert_same(first.state, states[7])
    again = _run(engine, 5, case, init_state=first.state)
    _assert_same(again.state, second.state)


def test_pickled_state_goes_on_in_a_new_engine(case, by_hand):
    """Catches anything about data or model kept on the engine instead of in the state."""
    states, losses = by_hand
    restored = pickle.loads(pickle.dumps(jax.device_get(states[7])))
    result = _run(case.make(), 5, case, init_state=restored)
    _assert_same(result.state, states[-1])
    np.testing.assert_array_equal(result.losses, losses[7:])


def test_state_of_numpy_arrays_goes_on(case, engine, by_hand):
    states, _ = by_hand
    plain = jax.tree.map(np.asarray, _key_data(states[11]))
    state, _ = engine.update(plain, *case.args)
    _assert_same(state, states[-1])


@by_class
def test_steps_compile_inside_users_loops(case, engine, by_hand):
    """Catches a host read, or a carry that changes its type, in a step."""
    states, losses = by_hand

    @jax.jit
    def twelve(state, y):
        return jax.lax.scan(lambda state, _: jax.jit(engine.update)(state, y), state, None, length=12)

    state, found = twelve(states[0], *case.args)
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(_key_data(state)), jax.tree.leaves(_key_data(states[-1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@by_class
def test_seeds_under_vmap_are_seeds_one_by_one(case, engine):
    """To rounding. Catches a key shared by a batch of fits."""
    keys = jax.random.split(jax.random.key(1), 2)
    states = jax.vmap(lambda key: engine.init(key, *case.args))(keys)
    states, losses = jax.vmap(lambda state: engine.update(state, *case.args))(states)
    assert losses[0] != losses[1]
    for i, key in enumerate(keys):
        state, loss = engine.update(engine.init(key, *case.args), *case.args)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-5)
        for name in state.params:
            np.testing.assert_allclose(states.params[name][i], state.params[name], rtol=1e-5)


def test_double_precision_throughout(case):
    """Nothing is compiled to see it. Catches a float32 constant that makes a loop's carry change its type, or a state of less
    precision than the data."""
    engine = case.make()
    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), case.args)
        start = jax.eval_shape(lambda *args: engine.init(KEY, *args), *args)
        after, loss = jax.eval_shape(engine.update, start, *args)
    numbers = [leaf.dtype for leaf in jax.tree.leaves((start, loss)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    assert set(numbers) == {jnp.dtype("float64")}
    assert jax.tree.map(_kind, after) == jax.tree.map(_kind, start)


def _kind(leaf):
    return leaf.shape, leaf.dtype, leaf.weak_type


def test_model_is_traced_a_few_times_and_then_never_again(case, engine, by_hand, calls):
    """Catches anything compiled anew by another length, chunk, data, key, or a state from disk."""
    state = by_hand[0][3]
    _run(engine, 3, case)
    engine.stable_update(state, *case.args)
    engine.evaluate(state, *case.args)
    assert 0 < len(calls) < 60
    calls.clear()
    other = (case.args[0] + 1, *case.args[1:])
    engine.run(jax.random.key(1), 3, *case.args, progress_bar=False)
    engine.run(jax.random.key(1), 1_500, *other, progress_bar=False)
    engine.run(KEY, 4, *case.args, progress_bar=False, init_state=jax.device_get(state), chunk_size=3)
    state, _ = engine.update(engine.init(jax.random.key(2), *other), *other)
    engine.stable_update(state, *other)
    engine.evaluate(state, *other)
    assert calls == []


# What a run shows and keeps.


def test_collect_and_callbacks_see_every_step_and_chunk(case, engine, by_hand):
    states, losses = by_hand
    seen = []
    result = _run(engine, 12, case, collect=_keep, callbacks=[lambda *what: seen.append(what)], chunk_size=5)
    np.testing.assert_array_equal(result.collected["params"]["loc"], jnp.stack([state.params["loc"] for state in states[1:]]))
    np.testing.assert_array_equal(result.collected["key"][-1], jax.random.key_data(states[-1].rng_key))
    assert [step for step, _, _ in seen] == [5, 10, 12]
    for step, state, so_far in seen:  # kept by the callback, and not overwritten by later chunks
        _assert_same(state, states[step])
        np.testing.assert_array_equal(so_far, losses[:step])


def test_parameters_feed_predictive(case, engine, start):
    params = engine.get_params(start)
    draws = Predictive(engine.model, params=params, num_samples=2)(KEY, *case.args)
    assert set(case.latents) <= set(draws)
    assert {len(value) for value in draws.values()} == {2}
    with trace() as sites, substitute(data=params), seed(rng_seed=KEY):
        engine.model(*case.args)
    assert {name for name, site in sites.items() if site["type"] == "param"} == set(params) - set(case.others)


# Parameters.


@pytest.fixture(scope="module")
def long_run(case, engine):
    return _run(engine, 12_000, case, collect=_keep).collected["params"]


def test_constraints_of_params_hold(long_run):
    """Catches a step in constrained space, which would cross zero, and a constrained param that does not move."""
    assert (long_run["spread"] > 0).all()
    assert 0.9 < np.median(long_run["spread"]) < 1.6  # its data have a standard deviation of 1.2


def test_exact_answer(case, long_run):
    """The mean over a long run, within five standard errors by batch means, which are small."""
    for name, exact in case.exact.items():
        means = long_run[name][2_000:].reshape(20, -1).mean(1)
        error = means.std(ddof=1) / np.sqrt(20)
        assert error < 0.05
        assert abs(means.mean() - exact) < 5 * error


def test_init_params_are_where_the_run_starts(case, engine):
    """Constrained values; the others start where the model says."""
    state = engine.init(KEY, *case.args, init_params={"spread": 2.5})
    np.testing.assert_allclose(state.params["spread"], 2.5, rtol=1e-6)
    np.testing.assert_allclose(state.params["loc"], 0.5)
    result = _run(engine, 1, case, init_params={"spread": 2.5})
    np.testing.assert_array_equal(result.params["spread"], engine.update(state, *case.args)[0].params["spread"])


def test_init_params_must_be_params(case, engine):
    with pytest.raises(ValueError, match="init_params names"):
        engine.init(KEY, *case.args, init_params={"sprad": 2.5})


@pytest.fixture(scope="module")
def reckless(case):
    """The same engine with an optimizer of NumPyro that makes six steps at RATE and then one to infinity."""
    return case.make(optim=numpyro.optim.SGD(lambda step: jnp.where(step < 6, RATE, jnp.inf)))


@by_class
def test_optimizers_of_numpyro_and_optax_make_the_same_steps(case, by_hand, request):
    if case.takes_optim:
        state = _run(request.getfixturevalue("reckless"), 6, case).state
        for name, value in by_hand[0][6].params.items():
            np.testing.assert_allclose(state.params[name], value, rtol=1e-4)


# Arguments.


def test_numpy_data_are_traced_as_jax_arrays_are(case, engine, by_hand):
    states, losses = by_hand
    state, loss = engine.update(states[0], *jax.tree.map(np.asarray, case.args))
    np.testing.assert_array_equal(loss, losses[0])
    _assert_same(state, states[1])


def test_numbers_and_flags_are_static(case, engine, start, calls):
    """``times`` is used as a Python number; 1, 1.0 and True are not taken for one another."""
    if case.is_linear:
        doubled = (2 * case.args[0], *case.args[1:])
        np.testing.assert_allclose(engine.evaluate(start, *case.args, times=2), engine.evaluate(start, *doubled), rtol=1e-5)
    assert engine.evaluate(start, *case.args, times=2) != engine.evaluate(start, *case.args)
    calls.clear()
    engine.evaluate(start, *case.args, times=2.0)
    engine.evaluate(start, *case.args, times=True)
    assert set(calls) == {float, bool}


def test_raw_keys_work(case, engine):
    state, loss = engine.update(engine.init(jax.random.PRNGKey(7), *case.args), *case.args)
    np.testing.assert_array_equal(loss, engine.update(engine.init(KEY, *case.args), *case.args)[1])
    assert state.rng_key.dtype == jnp.uint32


def test_argument_that_cannot_be_compiled_in_is_refused(case, engine, start):
    with pytest.raises(TypeError, match="a set, is neither an array nor hashable"):
        engine.init(KEY, *case.args, {1, 2})
    with pytest.raises(TypeError, match="a bytearray, is neither an array nor hashable"):
        engine.update(start, *case.args, times=bytearray(b"1"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_data_that_are_not_finite_are_refused(case, engine, bad):
    with pytest.raises(ValueError, match=r"site 'y': 1 of \d observed events are NaN or infinite"):
        engine.init(KEY, case.args[0].at[2].set(bad), *case.args[1:])


# Numbers that are not finite.


@pytest.fixture(scope="module")
def bad_args(case):
    return (jnp.full_like(case.args[0], jnp.nan), *case.args[1:])


def test_bad_step_is_not_made(case, engine, by_hand, bad_args):
    state, loss = engine.update(by_hand[0][3], *bad_args)
    assert jnp.isnan(loss)
    _assert_same(state, by_hand[0][3], but=("rng_key",))
    assert (jax.random.key_data(state.rng_key) != jax.random.key_data(by_hand[0][3].rng_key)).any()


def test_stable_update_counts_what_it_skips(case, engine, by_hand, bad_args):
    state, loss = engine.stable_update(by_hand[0][3], *bad_args)
    assert jnp.isnan(loss)
    _assert_same(state, by_hand[0][3], but=("rng_key", "num_skipped"))
    assert int(state.num_skipped) == 1
    result = engine.run(KEY, 4, *bad_args, progress_bar=False, stable_update=True, init_state=state)
    assert int(result.state.num_skipped) == 5
    assert np.isnan(result.losses).all()
    good, _ = engine.update(result.state, *case.args)
    assert _is_finite(good)


def test_run_with_bad_data_stops_and_names_them(case, engine, by_hand, bad_args):
    """A run that goes on from a state is not checked beforehand."""
    with pytest.raises(NonFiniteError, match=r"step 1: site 'y': \d of \d observed events are NaN") as error:
        engine.run(KEY, 4, *bad_args, progress_bar=False, init_state=by_hand[0][3])
    assert error.value.step == 1
    _assert_same(error.value.state, by_hand[0][3], but=("rng_key",))


@by_class
def test_run_that_diverges_stops_with_the_last_good_state(case, by_hand, request):
    """Catches a state that was overwritten by the bad step, and a step counted from the chunk instead of the run."""
    if not case.takes_optim:
        return
    engine = request.getfixturevalue("reckless")
    with pytest.raises(NonFiniteError, match=r"no longer (be )?finite") as error:
        _run(engine, 50, case, chunk_size=4)
    assert error.value.step == 7
    cause, seen = str(error.value).split("What was seen: ")  # Catches a symptom told first, which is taken for the cause.
    assert re.match(r"step 7: (the likely cause is too large a |The step_size h = |Particles are stable )", cause)
    assert "learning rate" in cause or "step_size" in cause
    assert re.search("no longer (be )?finite|density is not finite", seen)
    assert _is_finite(error.value.state)
    _assert_same(error.value.state, _run(engine, 6, case).state, but=("rng_key",))
    stable = _run(engine, 20, case, stable_update=True)
    np.testing.assert_array_equal(np.isnan(stable.losses), np.arange(20) >= 6)  # though the loss before the step was finite
    assert (int(stable.state.num_steps), int(stable.state.num_skipped)) == (6, 14)
    assert _is_finite(stable.state)


# The loop itself.


@pytest.fixture(scope="module")
def any_engine():
    return _pgd()


def test_large_collected_values_are_kept_in_a_bounded_buffer(any_engine, monkeypatch):
    """Catches steps lost where the buffer of the compiled loop is shorter than a chunk."""
    monkeypatch.setattr("numpyro_ebm.train.steps.MAX_BUFFER", 200)  # bytes: four steps of the record below
    result = any_engine.run(KEY, 10, Y, progress_bar=False, collect=lambda state: jnp.full(11, state.num_steps), chunk_size=10)
    np.testing.assert_array_equal(result.collected, np.repeat(np.arange(1, 11)[:, None], 11, 1))


def test_progress_bar_is_shown_once_per_chunk_and_says_the_loss(any_engine, capsys):
    result = any_engine.run(KEY, 12, Y, chunk_size=4)
    assert f"loss: {result.losses[-1]:.4f}" in capsys.readouterr().err
    any_engine.run(KEY, 12, Y, progress_bar=False)
    assert capsys.readouterr().err == ""


def test_light_steps_share_their_calls_of_the_compiled_loop(any_engine, monkeypatch):
    """Catches a host round trip per step, which takes far longer than a light step."""
    calls, loop = [], any_engine._steps.open_loop
    monkeypatch.setattr(any_engine._steps, "open_loop", lambda *args, **kwargs: calls.append(1) or loop(*args, **kwargs))
    any_engine.run(KEY, 20_000, Y, progress_bar=False)
    assert len(calls) < 2000
