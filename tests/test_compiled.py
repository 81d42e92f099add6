# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a compiled function has frozen: it is compiled again where that has changed, and not otherwise.

Compilations are counted, and never timed.
"""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import hierarchical
from jax.tree_util import Partial

from numpyro_ebm import (
    MALA,
    BernoulliRBM,
    EnergyDistribution,
    ParticleMMLE,
    TiltedDistribution,
    _compiled,
    find_map,
    fisher_divergence,
    log_normalizer,
    negative_phase,
    sample_posterior,
    standard_errors,
)
from numpyro_ebm._compiled import Watch
from numpyro_ebm.infer.engine import Engine
from numpyro_ebm.samplers import Sampler

KEY = jax.random.key(0)
Y = jnp.array([1.0, -0.5, 2.0])
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
)


def compilations(call):
    """How many programs a call compiles."""
    before = len(COMPILED)
    jax.block_until_ready(call())
    return len(COMPILED) - before


# What is looked at.


SCALE, TABLE = 1.0, np.ones(3)


def reads_a_global():
    return SCALE


def calls_another():
    return reads_a_global()


def reads_a_table():
    return TABLE.sum()


def reads_itself():
    return reads_itself.w


reads_itself.w = 1.0


class Config:
    def __init__(self, w):
        self.w = w

    def model(self):
        return self.w

    def reads_a_global(self):
        return SCALE


class Slots:
    __slots__ = ("w",)

    def __init__(self, w):
        self.w = w


def _closure(value):
    def call():
        return value

    def change(new):
        nonlocal value
        value = new

    return call, change


def _global(name, value):
    globals()[name] = value


def _cases():
    config, names, slots, settings, values = Config(1.0), SimpleNamespace(w=1.0), Slots(1.0), {"w": 1.0}, [1.0, 2.0]
    closure, change = _closure(1.0)
    arrays, change_array = _closure(jnp.ones(2))
    nested = Config(Config(1.0))
    substituted, seeded = numpyro.handlers.substitute(reads_a_global, {"loc": 1.0}), numpyro.handlers.seed(reads_a_global, 0)
    return {
        "a global": (reads_a_global, partial(_global, "SCALE", 2.0)),
        "a global of a function that is called": (calls_another, partial(_global, "SCALE", 3.0)),
        "a global of a lambda inside": (lambda: (lambda: SCALE)(), partial(_global, "SCALE", 4.0)),
        "a global of a method": (Config(1.0), partial(_global, "SCALE", 5.0)),
        "a table of NumPy that is changed in place": (reads_a_table, lambda: TABLE.__setitem__(1, 7.0)),
        "a variable of a closure": (closure, lambda: change(2.0)),
        "an array of a closure": (arrays, lambda: change_array(jnp.ones(2))),
        "an attribute of a function": (reads_itself, lambda: setattr(reads_itself, "w", 2.0)),
        "an attribute": (config, lambda: setattr(config, "w", 2.0)),
        "an attribute behind a bound method": (config.model, lambda: setattr(config, "w", 3.0)),
        "an attribute behind a partial": (partial(calls_another, config), lambda: setattr(config, "w", 4.0)),
        "a new attribute": (config, lambda: setattr(config, "v", 4.0)),
        "an attribute of an attribute": (nested, lambda: setattr(nested.w, "w", 2.0)),
        "a namespace in a closure": (lambda: names.w, lambda: setattr(names, "w", 2.0)),
        "a slot": (slots, lambda: setattr(slots, "w", 2.0)),
        "a dictionary": (lambda: settings["w"], lambda: settings.update(w=2.0)),
        "a list that is an argument": (values, lambda: values.append(3.0)),
        "a global behind a handler": (numpyro.handlers.scale(reads_a_global, scale=2.0), partial(_global, "SCALE", 6.0)),
        "a setting of a handler": (substituted, lambda: setattr(substituted, "data", {"loc": 2.0})),
        "the key of a seed": (seeded, lambda: setattr(seeded, "rng_key", jax.random.key(1))),
        "a default": (_with_default, lambda: setattr(_with_default, "__defaults__", (2.0,))),
    }


def _closure_at(value):
    return _closure(value)[0]


def _with_default(w=1.0):
    return w


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_tells_what_has_changed(name):
    # Catches a value that a compiled program would go on with.
    value, change = CASES[name]
    watch = Watch(value)
    before = watch.snapshot()
    assert watch.snapshot() is before
    assert Watch(value).snapshot() == before
    assert hash(Watch(value).snapshot()) == hash(before)
    change()
    assert watch.snapshot() != before
    assert Watch(value).snapshot() == watch.snapshot()


def test_zero_is_not_minus_zero():
    assert Watch(_closure_at(0.0)).snapshot() == Watch(_closure_at(0.0)).snapshot()
    assert Watch(_closure_at(0.0)).snapshot() != Watch(_closure_at(-0.0)).snapshot()


def test_records_of_a_function_are_no_settings():
    # Catches a model that counts its runs, or keeps what it sees, and is compiled anew in every call.
    seen, count, counter = [], 0, SimpleNamespace(n=0)

    def records():
        nonlocal count
        seen.append(1)
        count += 1
        counter.n += 1

    watch = Watch(records)
    before = watch.snapshot()
    records()
    assert watch.snapshot() == before == Watch(records).snapshot()


# Engines.


def _model(scale, runs):
    """The mean of y is scale() times loc."""

    def model(y, *args):
        runs.append(1)
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(scale(*args) * loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    return model


def _loss_and_runs(engine, runs, *args):
    runs.clear()
    state = engine.init(KEY, Y, *args, init_params={"loc": 1.0})
    return float(engine.evaluate(state, Y, *args)), len(runs)


def _of_global():
    return reads_a_global, (), partial(_global, "SCALE", 9.0)


def _of_closure():
    call, change = _closure(1.0)
    return call, (), lambda: change(9.0)


def _of_argument():
    config = Config(1.0)
    return lambda config: config.w, (config,), lambda: setattr(config, "w", 9.0)


@pytest.mark.parametrize("make", [_of_global, _of_closure, _of_argument])
def test_an_engine_goes_on_with_the_values_of_now(make):
    # Catches a compiled program that goes on with an old value, which learned another answer in silence.
    _global("SCALE", 1.0)
    scale, args, change = make()
    runs = []
    engine = ParticleMMLE(_model(scale, runs), optax.sgd(0.1), num_particles=2, step_size=0.1)
    old, _ = _loss_and_runs(engine, runs, *args)
    assert _loss_and_runs(engine, runs, *args) == (old, 0)
    change()
    new, count = _loss_and_runs(engine, runs, *args)
    assert count > 0
    assert new != old
    fresh = ParticleMMLE(_model(scale, runs), optax.sgd(0.1), num_particles=2, step_size=0.1)
    assert _loss_and_runs(fresh, runs, *args)[0] == new
    assert _loss_and_runs(engine, runs, *args) == (new, 0)


def _new_scale(handler):
    handler.scale = 3.0


def _new_data(handler):
    handler.data = {"shift": jnp.array(2.0)}


def _data_in_place(handler):
    handler.data["shift"] = jnp.array(3.0)


def _shifted(y):
    loc = numpyro.param("loc", 0.0)
    shift = numpyro.sample("shift", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc + shift, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


SETTINGS_OF_HANDLERS = {
    "scale": (lambda: numpyro.handlers.scale(_model(lambda: 1.0, []), scale=2.0), _new_scale),
    "condition": (lambda: numpyro.handlers.condition(_shifted, data={"shift": jnp.array(1.0)}), _new_data),
    "condition, in place": (lambda: numpyro.handlers.condition(_shifted, data={"shift": jnp.array(1.0)}), _data_in_place),
}


@pytest.mark.parametrize("name", SETTINGS_OF_HANDLERS)
def test_an_engine_sees_the_settings_of_handlers(name):
    # Catches a handler that is looked through, to the model that it wraps.
    make, change = SETTINGS_OF_HANDLERS[name]
    handler = make()
    engine = ParticleMMLE(handler, optax.sgd(0.1), num_particles=2, step_size=0.1)
    state = engine.init(KEY, Y)
    old = engine.evaluate(state, Y)
    change(handler)
    assert engine.evaluate(state, Y) != old
    fresh = ParticleMMLE(handler, optax.sgd(0.1), num_particles=2, step_size=0.1)
    assert engine.evaluate(state, Y) == fresh.evaluate(state, Y)


def test_what_a_handler_keeps_of_its_runs_is_no_setting():
    # Catches an engine that is compiled anew in every call, since a trace has seen more.
    runs = []
    handler = numpyro.handlers.scale(numpyro.handlers.trace(numpyro.handlers.seed(_model(lambda: 1.0, runs), 0)), scale=2.0)
    watch = Watch(handler)
    before = watch.snapshot()
    handler(Y)
    assert runs
    assert watch.snapshot() == before == Watch(handler).snapshot()


def test_settings_of_an_engine_are_read_only():
    # Catches a setting that reads as changed while the compiled one is used.
    engine = ParticleMMLE(hierarchical, optax.sgd(0.1), num_particles=2, step_size=0.1)
    with pytest.raises(AttributeError, match=r"step_size of a ParticleMMLE cannot be changed, and 0.2 .* a new engine"):
        engine.step_size = 0.2
    with pytest.raises(AttributeError, match="stepsize of a ParticleMMLE cannot be changed"):
        engine.stepsize = 0.2
    assert engine.step_size == 0.1
    assert Engine._is_made is False  # of no other engine


# What is called eagerly.


PARAMS = {"loc": 0.5}
NET = eqx.nn.MLP(2, "scalar", 4, 1, key=KEY)
RBM = BernoulliRBM(0.1 * jnp.ones((4, 3)), jnp.zeros(4), jnp.zeros(3))


def _bowl(x):
    return x**2 / 2


class Drift(Sampler):
    """A sampler by a user, which is compared by identity and can be changed."""

    def __init__(self, by):
        self.by = by

    def run(self, rng_key, target, state):
        return state._replace(position=state.position + self.by)


def _learned(x):
    p = numpyro.param("p", 1.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", EnergyDistribution(lambda x: p * x**2 / 2, initial=dist.Normal(0, 1)), obs=x)


CHAINS = negative_phase(_learned, num_chains=4, sampler=MALA(num_steps=2))
STATE = {"x/chains": {"x": jnp.arange(4.0), "num_updates": jnp.array(1), "status": jnp.array(0)}}
STATE["x/chains"] |= {"step_size": jnp.array(0.1), "acceptance": jnp.array(0.5), "jump_acceptance": jnp.array(0.0)}
DRAWS = {"x": jnp.asarray(0.5 * np.random.default_rng(0).normal(size=(2, 50, 3)), jnp.float32)}
FAST = MALA(num_steps=2)
EAGER = {
    "sample": lambda a: EnergyDistribution(_bowl, initial=dist.Normal(a, 1), sampler=FAST).sample(KEY, (5,)),
    "sample, network": lambda a: TiltedDistribution(
        dist.Normal(0, 1).expand([2]).to_event(1), jax.tree.map(lambda x: x + a if eqx.is_array(x) else x, NET), sampler=FAST
    ).sample(KEY, (5,)),
    "sample, rbm": lambda a: BernoulliRBM(RBM.weights + a, RBM.visible_bias, RBM.hidden_bias).sample(KEY, (5,)),
    "log_normalizer": lambda a: log_normalizer(BernoulliRBM(RBM.weights + a, RBM.visible_bias, RBM.hidden_bias)),
    "log_normalizer, AIS": lambda a: log_normalizer(
        BernoulliRBM(RBM.weights + a, RBM.visible_bias, RBM.hidden_bias), "ais", rng_key=KEY, num_chains=4, num_temperatures=5
    ),
    "sample_chains": lambda a: CHAINS.sample_chains(KEY, {"p": jnp.exp(a)}, STATE, 3, Y)[0],
    "sample_posterior": lambda a: sample_posterior(KEY, hierarchical, {"loc": a}, Y, num_samples=5, num_warmup=3),
    "find_map": lambda a: find_map(KEY, hierarchical, {"loc": a}, Y),
    "standard_errors": lambda a: standard_errors(hierarchical, {"loc": a}, DRAWS, Y).standard_errors,
}
EAGER["sample, params"] = partial(
    lambda energy, a: EnergyDistribution(energy, params=jnp.exp(a), initial=dist.Normal(0, 1), sampler=FAST).sample(KEY, (5,)),
    lambda p, x: p * x**2,
)


@pytest.mark.parametrize("name", EAGER)
def test_a_second_eager_call_compiles_nothing(name):
    # Catches functions that are made anew in every call, which jax.jit compiles anew. Values may be others, shapes not.
    call = EAGER[name]
    a, b = jnp.array(0.2), jnp.array(0.3)
    assert compilations(lambda: call(a)) > 0
    assert compilations(lambda: call(a)) == 0
    assert compilations(lambda: call(b)) == 0


def test_an_energy_that_has_changed_is_compiled_again():
    # Catches samples of an old energy, in silence.
    k = 1.0
    energy = EnergyDistribution(lambda x: k * x**2 / 2, initial=dist.Normal(0, 1), sampler=MALA(num_steps=20))
    first, again = energy.sample(KEY, (2000,)), energy.sample(KEY, (2000,))
    np.testing.assert_array_equal(first, again)
    k = 100.0
    assert energy.sample(KEY, (2000,)).std() == pytest.approx(0.1, rel=0.1)
    k = 1.0
    np.testing.assert_array_equal(energy.sample(KEY, (2000,)), first)


def test_a_sampler_that_has_changed_is_compiled_again():
    sampler = Drift(1.0)
    energy = EnergyDistribution(_bowl, initial=dist.Delta(0.0), sampler=sampler)
    assert energy.sample(KEY, (2,)).tolist() == [1.0, 1.0]
    sampler.by = 3.0
    assert energy.sample(KEY, (2,)).tolist() == [3.0, 3.0]


def test_what_cannot_be_seen_is_compiled_anew(monkeypatch):
    # Catches a module of the user's, whose attributes are read by an energy, taken for fixed.
    import helpers

    monkeypatch.setattr(helpers, "shift", 1.0, raising=False)
    at = Drift(0.0)
    energy = EnergyDistribution(lambda x: x**2 * helpers.shift, initial=dist.Delta(1.0), sampler=at)
    monkeypatch.setattr(Drift, "run", lambda self, key, log_prob, state: state._replace(position=-log_prob(state.position)))
    assert energy.sample(KEY, (1,)).tolist() == [1.0]
    monkeypatch.setattr(helpers, "shift", 2.0)
    assert energy.sample(KEY, (1,)).tolist() == [2.0]


def test_a_sample_inside_a_transformation_has_the_numbers_of_one_outside():
    energy = EnergyDistribution(_bowl, initial=dist.Normal(0, 1), sampler=FAST)
    jitted = jax.jit(lambda key: energy.sample(key, (5,)))(KEY)
    np.testing.assert_array_equal(energy.sample(KEY, (5,)), jitted)


def test_an_error_of_a_sample_names_the_site():
    # Catches the name that is lost where a copy of the distribution is compiled.
    def model():
        numpyro.sample("z", EnergyDistribution(_bowl))

    with pytest.raises(NotImplementedError, match="site 'z'"):
        numpyro.handlers.seed(model, 0)()


def test_a_score_that_has_changed_gives_its_own_divergence():
    # Catches a critic that is trained on the score of an earlier call.
    shift = 0.0
    v = jax.random.normal(KEY, (3, 64, 1))
    critic = Partial(lambda a, x: a * x, jnp.zeros(()))
    call = partial(fisher_divergence, KEY, lambda v, rng_key: shift - v, v, critic, optax.adam(0.1), 2, progress_bar=False)
    first = call(batch_size=8).estimate
    shift = 5.0
    assert call(batch_size=8).estimate != first


class Holder:
    table = (1.0,)

    def __call__(self, x):
        return self.table[0] * x**2 / 2


class Named(NamedTuple):
    a: float

    def __call__(self, x):
        return SCALE * self.a * x**2 / 2


def _imports(x):
    import helpers

    return helpers.CURVATURE * x**2 / 2


def _shared():
    settings = SimpleNamespace(a=(1.0,), b=(2.0,))
    settings.current = settings.a
    return (lambda x: settings.current[0] * x**2 / 2), lambda: setattr(settings, "current", settings.b)


UNSEEN = {
    "an attribute of a class": lambda: (Holder(), lambda: setattr(Holder, "table", (2.0,))),
    "a method of a named tuple": lambda: (Named(1.0), partial(_global, "SCALE", 2.0)),
    "an import inside": lambda: (_imports, lambda: setattr(helpers, "CURVATURE", 2.0)),
    "the same object by another name": _shared,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_samples_are_of_what_an_energy_is_now(name):
    # Catches samples of what an energy was: a cache may only be used where nothing is hidden.
    Holder.table, helpers.CURVATURE = (1.0,), 1.0
    _global("SCALE", 1.0)
    energy, change = UNSEEN[name]()
    fn = EnergyDistribution(energy, initial=dist.Normal(0, 1), sampler=FAST)
    before = fn.sample(KEY, (5,))
    np.testing.assert_array_equal(before, fn.sample(KEY, (5,)))
    change()
    after = fn.sample(KEY, (5,))
    fresh = jax.jit(lambda key: fn.sample(key, (5,)))(KEY)
    np.testing.assert_allclose(after, fresh, rtol=1e-5)
    assert (before != after).any()


def test_few_programs_are_kept():
    # Catches memory that grows by every new energy for ever.
    assert _compiled._program.cache_info().maxsize <= 128
