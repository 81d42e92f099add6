# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Tools of JAX, of Python and of others work on engines: checks, transformations, pickles, threads, Ctrl-C."""

import copy
import io
import threading
from functools import partial

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from test_engine_contract import CASES, KEY, Y, _assert_same

from numpyro_ebm import (
    MALA,
    DenoisingScoreMatching,
    EnergyDistribution,
    GaussianBernoulliRBM,
    KernelSteinDiscrepancy,
    ScoreMatching,
    TiltedDistribution,
    VaGES,
    Variational,
    check_model,
    log_normalizer,
)
from numpyro_ebm.evaluate.posterior import Posterior
from numpyro_ebm.evaluate.standard_errors import _moments
from numpyro_ebm.train import loop as loop_module
from numpyro_ebm.train import steps as steps_module

FAMILIES = ("pgd", "ebipla", "score matching", "bism", "vages", "bidvl")
families = pytest.mark.parametrize("case", [CASES[name] for name in FAMILIES], ids=FAMILIES)


def _steps(case):
    """An engine, and what a first step gives."""
    engine = case.make()
    start = engine.init(KEY, *case.args)
    state, loss = engine.update(start, *case.args)
    return engine, state, loss, engine.evaluate(state, *case.args)


# JAX's checks.


@families
def test_steps_pass_the_checks_of_jax(case):
    # Catches nan in a branch that is not taken, and arrays of different rank in one operation.
    _, _, loss, value = _steps(case)
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
        _, _, checked, checked_value = _steps(case)
    np.testing.assert_allclose([checked, checked_value], [loss, value], rtol=1e-5)


@pytest.mark.parametrize("case", [CASES["ebipla"], CASES["score matching"]], ids=["ebipla", "score matching"])
def test_nothing_traced_outlives_its_trace(case):
    # Catches frames that were read, whose variables Python keeps until they end, and reports that keep the values of sites.
    with jax.checking_leaks():
        assert np.isfinite(_steps(case)[2])


def test_frames_are_read_without_a_leak():
    with jax.checking_leaks():
        energy = EnergyDistribution(lambda x: x**2 / 2, initial=dist.Normal(0, 1), sampler=MALA(num_steps=2))
        assert jax.jit(energy.log_prob)(1.0) == -0.5
        assert energy.sample(KEY, (3,)).shape == (3,)
        assert check_model(_energies, Y).sites


def _energies(y):
    a = numpyro.param("a", 1.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: a * y**2 / 2, initial=dist.Normal(0, 1)), obs=y)


def test_steps_and_samples_run_without_compilation():
    # To rounding. Catches what works on traced values alone.
    case, energy = CASES["score matching"], EnergyDistribution(lambda x: x**2, initial=dist.Normal(0, 1), sampler=MALA(num_steps=2))
    _, _, loss, value = _steps(case)
    with jax.disable_jit():
        _, _, plain, plain_value = _steps(case)
        draws = energy.sample(KEY, (3,))
    np.testing.assert_allclose([plain, plain_value], [loss, value], rtol=1e-4)
    np.testing.assert_allclose(draws, energy.sample(KEY, (3,)), rtol=1e-4)


@pytest.mark.parametrize("name", ["score matching", "vages"])
def test_dtypes_are_not_promoted_by_themselves(name):
    # NumPyro's own distributions refuse what particles and chains need of them, and the rest is ours.
    with jax.numpy_dtype_promotion("strict"):
        assert np.isfinite(_steps(CASES[name])[2])


# Transformations.


@families
def test_a_loss_can_be_mapped_and_differentiated_in_the_data(case):
    # Catches a derivative of our own that closes over what is traced.
    engine = case.make()
    state = engine.init(KEY, *case.args)
    loss = partial(engine.evaluate, state)
    np.testing.assert_allclose(jax.vmap(loss)(jnp.stack([Y, Y + 1])), [loss(Y), loss(Y + 1)], rtol=1e-4)
    direction = jnp.linspace(-1, 1, len(Y))
    slope = jax.grad(loss)(Y) @ direction
    np.testing.assert_allclose(jax.jvp(loss, (Y,), (direction,))[1], slope, rtol=1e-4, atol=1e-5)
    if case is not CASES["vages"]:  # whose derivative in the visible is an estimate: see below
        difference = (loss(Y + 0.01 * direction) - loss(Y - 0.01 * direction)) / 0.02
        np.testing.assert_allclose(slope, difference, rtol=2e-2, atol=2e-3)


def test_the_derivative_of_an_estimated_score_in_the_data_is_that_of_the_score():
    """The guide is the posterior, and the score -(v - offset) / 2. Ranks are not promoted. Catches a rule that closes over the
    offset, which is traced."""

    def model(v, offset):
        width = numpyro.param("width", 1.0)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1))
            numpyro.sample("v", dist.Normal(h + offset, width), obs=v)

    def guide(v, offset):
        slope = numpyro.param("slope", 0.5)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(slope * (v - offset), jnp.sqrt(0.5)))

    def marginal(v, offset):
        scale = numpyro.param("scale", jnp.sqrt(2.0))
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(offset, scale), obs=v)

    noise, offset = DenoisingScoreMatching(0.3), jnp.linspace(-1, 1, len(Y))
    engine = VaGES(model, guide, optax.sgd(0.0), optax.sgd(0.0), noise, estimate=Variational(4000))
    exact = ScoreMatching(marginal, optax.sgd(0.0), noise)
    state, same = engine.init(KEY, Y, offset), exact.init(KEY, Y, offset)
    with jax.numpy_rank_promotion("raise"):
        slope = jax.grad(lambda y: engine.evaluate(state, y, offset))(Y)
    wanted = jax.grad(lambda y: exact.evaluate(same._replace(rng_key=state.rng_key), y, offset))(Y)
    np.testing.assert_allclose(slope, wanted, atol=0.05)


def test_many_seeds_learn_at_once():
    # As the page shows it: a fit for each of some keys, by vmap over init and a scan of updates.
    engine = CASES["pgd"].make()

    @jax.jit
    @jax.vmap
    def fit(key):
        state = engine.init(key, Y)
        return jax.lax.scan(lambda state, _: engine.update(state, Y), state, None, length=5)

    keys = jax.random.split(KEY, 3)
    states, losses = fit(keys)
    assert losses.shape == (3, 5)
    alone = engine.run(keys[1], 5, Y, progress_bar=False)
    np.testing.assert_allclose(losses[1], alone.losses, rtol=1e-4)
    np.testing.assert_allclose(states.params["loc"][1], alone.params["loc"], rtol=1e-4)


# Python's tools, and those of others.


@pytest.mark.parametrize(
    "copied", [lambda engine: cloudpickle.loads(cloudpickle.dumps(engine)), copy.copy], ids=["cloudpickle", "copy"]
)
def test_an_engine_can_be_copied_after_it_has_run(copied):
    # Catches compiled functions in a pickle, and those of another engine in a copy.
    engine, state, _, value = _steps(CASES["pgd"])
    other = copied(engine)
    assert other._steps.one is not engine._steps.one
    np.testing.assert_allclose(other.evaluate(state, Y), value, rtol=1e-6)
    with pytest.raises(AttributeError, match="cannot be changed"):
        other.num_particles = 7


def _store(file, x):
    """For a random key the numbers in it, which Equinox's own rule refuses."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    eqx.default_serialise_filter_spec(file, jax.random.key_data(x) if is_key else x)


def _load(file, like):
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return eqx.default_deserialise_filter_spec(file, like)
    data = eqx.default_deserialise_filter_spec(file, jax.random.key_data(like))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))


@families
def test_equinox_stores_states(case):
    # As the page shows it.
    engine, state, *_ = _steps(case)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state, _store)
    file.seek(0)
    _assert_same(eqx.tree_deserialise_leaves(file, engine.init(jax.random.key(5), *case.args), _load), state)


def test_a_state_without_its_structure_is_refused():
    # Catches "'dict' object has no attribute", of a checkpoint that was read without a target.
    engine = CASES["pgd"].make()
    with pytest.raises(TypeError, match=r"got a dict: pass .* Restore a checkpoint into the structure of a state, jax.eval_shape"):
        engine.run(KEY, 2, Y, init_state={"params": {}})


def test_threads_learn_side_by_side():
    # Catches sites of one thread's model in another's: NumPyro has one stack of handlers.
    names = ("ebipla", "score matching", "bism", "pgd")
    wanted = {name: CASES[name].make().update(CASES[name].make().init(KEY, Y), Y)[1] for name in names}
    found, start = {}, threading.Barrier(len(names))

    def learn(name):
        start.wait()
        found[name] = _steps(CASES[name])[2]

    threads = [threading.Thread(target=learn, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


@pytest.mark.parametrize("asks_the_host", [False, True])
def test_ctrl_c_keeps_the_state(monkeypatch, asks_the_host):
    # Catches a run whose state is lost, or one that the loop has overwritten.
    monkeypatch.setattr(loop_module, "asks_the_host", lambda *trees: asks_the_host)
    engine, seen = CASES["pgd"].make(), []

    def stop(step, state, losses):
        seen.append(state)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        engine.run(KEY, 12, Y, progress_bar=False, callbacks=[stop], chunk_size=3)
    _assert_same(error.value.state, seen[-1])
    assert "after 6 steps is in .state" in error.value.__notes__[0]
    assert engine.run(KEY, 1, Y, progress_bar=False, init_state=error.value.state).state.num_steps == 7


def test_ctrl_c_while_the_device_works_keeps_the_state(monkeypatch):
    # The host waits for the device once a chunk, and the state before it has been overwritten.
    monkeypatch.setattr(loop_module, "asks_the_host", lambda *trees: True)
    engine = CASES["pgd"].make()
    wanted = engine.run(KEY, 3, Y, progress_bar=False, chunk_size=3).state

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps_module, "joined", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        engine.run(KEY, 12, Y, progress_bar=False, chunk_size=3)
    _assert_same(error.value.state, wanted)


# Full precision.


def _products(function, *args):
    """The precision of every matrix product of a function, those of functions inside it too."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.params["precision"]
            for value in equation.params.values():
                for part in value if isinstance(value, (tuple, list)) else [value]:
                    if hasattr(inner := getattr(part, "jaxpr", part), "eqns"):
                        yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*args).jaxpr))


RBM = GaussianBernoulliRBM(0.1 * jnp.ones((3, 2)), jnp.zeros(3), jnp.zeros(2), coupling="scaled")
ROWS = jax.random.normal(KEY, (8, 3))


def _population(y):
    loc, width = numpyro.param("loc", 0.0), numpyro.param("width", 1.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, width))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def _louis():
    posterior = Posterior(KEY, _population, {"loc": 0.0, "width": 1.0}, (Y,), {}, None)
    return _products(partial(_moments, posterior, (True, True)), jnp.zeros(2), {"x": jnp.ones((2, 3, len(Y)))})


OURS = {
    "energy of an RBM": lambda: _products(RBM.free_energy, ROWS),
    "joint energy": lambda: _products(RBM.joint_energy, ROWS, jnp.ones((8, 2))),
    "sweeps of Gibbs": lambda: _products(partial(RBM.sample, sample_shape=(2,)), KEY),
    "enumeration": lambda: _products(lambda w: GaussianBernoulliRBM(w, jnp.zeros(3), jnp.zeros(2)).log_normalizer(), RBM.weights),
    "AIS": lambda: _products(lambda key: log_normalizer(RBM, "ais", rng_key=key, num_chains=2, num_temperatures=3), KEY),
    "information": _louis,
    "Gram matrix": lambda: _products(lambda v: KernelSteinDiscrepancy().loss(jnp.negative, KEY, v, v), ROWS),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_products_are_of_full_precision(name):
    # Catches products in TF32, the default of GPUs, with relative errors of 3e-4.
    found = OURS[name]()
    assert found
    assert {str(part) for precision in found for part in precision or (None,)} == {"HIGHEST"}


def test_the_products_of_a_network_are_as_the_user_wants_them():
    net = eqx.nn.MLP(3, "scalar", 4, 1, key=KEY)
    tilted = TiltedDistribution(dist.Normal(0, 1).expand([3]).to_event(1), net)
    assert set(_products(tilted.log_prob, ROWS)) == {None}
    assert set(_products(tilted.score, ROWS)) == {None}
