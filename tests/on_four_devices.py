# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What needs several devices. ``test_devices.py`` runs this file in a process of its own, with four forced devices of the CPU."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro.infer import SVI, Trace_ELBO
from test_engine_contract import CASES, KEY, RATE, _guide, _normal, _tilted
from test_streamed_fit import batches, particles, quietly, svi

from numpyro_ebm import (
    MALA,
    DenoisingScoreMatching,
    ParticleMMLE,
    ScoreMatching,
    Sharding,
    UnadjustedLangevin,
    negative_phase,
)
from numpyro_ebm.infer.engine import NonFiniteError
from numpyro_ebm.optim import as_transformation
from numpyro_ebm.train.devices import number_of_rows

Y = np.linspace(-1, 3.8, 8, dtype=np.float32)


def _mala():
    return ParticleMMLE(_normal, optax.adam(RATE), num_particles=4, kernel="mala")


def _persistent():
    model = negative_phase(_tilted, num_chains=8, sampler=MALA(num_steps=2))
    return ParticleMMLE(model, optax.sgd(RATE), num_particles=3, step_size=0.1)


def _drawn(y, subsample_size=None):
    loc = numpyro.param("loc", 0.5)
    with numpyro.plate("data", len(y), subsample_size=subsample_size):
        batch = numpyro.subsample(y, event_dim=0)
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=batch)


def _subsampled():
    return ParticleMMLE.kiplmc1(partial(_drawn, subsample_size=4), num_particles=3, step_size=0.1, friction=1.5)


ENGINES = {
    **{name: CASES[name].make for name in ("pgd", "ebipla", "score matching", "bism, implicit", "vages, weighted", "bidvl")},
    "kinetic and subsampled": _subsampled,
    "mala": _mala,
    "persistent chains": _persistent,
}
SPREAD = {  # by field of a state, or site of chains, where its rows, particles or chains lie on a mesh of one axis
    "pgd": {"particles": P(None, "data")},
    "mala": {"particles": P(None, "data"), "dynamics_state": P("data")},
    "kinetic and subsampled": {"particles": P(None, "data"), "dynamics_state": P(None, "data")},
    "ebipla": {"particles": P(None, "data"), "mutable_state": P("data")},
    "persistent chains": {"particles": P(None, "data"), "mutable_state": P("data")},
}


@cache
def _engine(name):
    return ENGINES[name]()


@cache
def _start(name):
    """Its first state, on one device."""
    return _engine(name).init(KEY, Y)


def _mesh(*shape, names=("data", "other")):
    return jax.make_mesh(shape, names[: len(shape)], devices=jax.devices()[: np.prod(shape)])


def _run(engine, num_steps=8, **settings):
    return engine.run(KEY, num_steps, Y, **{"progress_bar": False, "report": False, "chunk_size": 4, **settings})


def _assert_close(found, wanted):
    def close(path, x, y):
        x, y = (jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, found, wanted)


def _assert_spread(tree, spec, num_devices):
    """Every array of a tree lies in parts on all devices, but for numbers that are one for all."""
    arrays = [x for x in jax.tree.leaves(tree) if x.size > 1]
    assert arrays
    for x in arrays:
        assert x.sharding.spec == spec
        assert len({shard.device for shard in x.addressable_shards}) == num_devices
        assert x.addressable_shards[0].data.size * num_devices == x.size


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_learns_the_same_on_any_number_of_devices(name):
    """To rounding, with what is large still in parts after the run. Catches what depends on where arrays lie, a place that is not
    kept, and chunks that compile again."""
    engine, start = _engine(name), _start(name)
    alone = _run(engine, init_state=start, mesh=_mesh(1))
    for num_devices, settings in ((2, {"init_state": start}), (4, {})):
        fit = _run(engine, mesh=_mesh(num_devices), **settings)
        _assert_close((fit.state, fit.losses), (alone.state, alone.losses))
        for field, spec in SPREAD.get(name, {}).items():
            _assert_spread(getattr(fit.state, field), spec, num_devices)
        assert all(x.sharding.spec == P() for x in jax.tree.leaves(fit.params))
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(start))


@pytest.mark.parametrize(("subsample_size", "own", "whole"), [(None, "f32[3,11]", "f32[3,44]"), (20, "f32[3,5]", "f32[3,20]")])
def test_a_device_computes_its_own_rows_alone(subsample_size, own, whole):
    """Of 44 rows, of which each has 11, or of a batch of 20. Catches a step that each makes for all: right, and no faster."""
    engine, y = ParticleMMLE(_drawn, optax.sgd(RATE), num_particles=3, step_size=0.05), np.linspace(-1, 4, 44, dtype=np.float32)
    texts = []

    def kept(program):
        return lambda *args, **static: texts.append(program.lower(*args, **static).compile().as_text()) or program(*args, **static)

    engine._steps.open_loop = kept(engine._steps.open_loop)
    alone, fit = (
        engine.run(KEY, 4, y, subsample_size=subsample_size, chunk_size=4, progress_bar=False, mesh=_mesh(num_devices))
        for num_devices in (1, 4)
    )
    _assert_close(fit.state, alone.state)
    on_one, on_four = texts[0], texts[-1]
    assert on_one.count(whole) > 20
    assert on_four.count(own) > 20
    assert on_four.count(whole) < 0.2 * on_one.count(whole)  # a batch of particles is gathered from where they are


def test_a_batch_that_does_not_go_evenly_is_refused():
    engine = ParticleMMLE(_drawn, optax.sgd(RATE), num_particles=3, step_size=0.05)
    with pytest.raises(ValueError, match=r"6 rows of a batch, plate 'data', .* 4 devices of axis 'data'.* take a subsample_size"):
        _run(engine, mesh=_mesh(4), subsample_size=6)


def test_svi_learns_the_same():
    """A normal guide and an energy prior, by NumPyro's own SVI."""
    model = negative_phase(_tilted, num_chains=8, sampler=UnadjustedLangevin(0.5, 5))
    svi = SVI(model, _guide, optax.adam(RATE), Trace_ELBO())

    def fit(state, y):
        return jax.lax.scan(lambda state, _: svi.update(state, y), state, None, length=5)

    start = svi.init(KEY, Y)
    alone = jax.jit(fit)(start, Y)
    sharding = Sharding(_mesh(4))
    (y,), _ = sharding.place_data((Y,), {})
    state, losses = jax.jit(fit)(sharding.place_state(start, number_of_rows((y,), {})), y)
    _assert_close((state, losses), alone)
    assert state.mutable_state["x/chains"]["x"].sharding.spec == P("data")
    assert all(x.sharding.spec == P() for x in jax.tree.leaves(svi.get_params(state)))


# Meshes of two axes.


def test_particles_and_rows_go_along_axes_of_their_own():
    fit = _run(_engine("mala"), init_state=_start("mala"), mesh=Sharding(_mesh(2, 2), particles="other"))
    _assert_close(fit.state, _run(_engine("mala"), init_state=_start("mala")).state)
    _assert_spread(fit.state.particles, P("other", "data"), 4)
    assert fit.state.dynamics_state.step_size["x"].sharding.spec == P("data")


def test_chains_can_go_along_all_axes():
    fit = _run(_engine("ebipla"), init_state=_start("ebipla"), mesh=Sharding(_mesh(2, 2), chains=("data", "other")))
    _assert_close(fit.state, _run(_engine("ebipla"), init_state=_start("ebipla")).state)
    _assert_spread(fit.state.mutable_state, P(("data", "other")), 4)


def _wide(y):
    weights = numpyro.param("weights", jnp.linspace(-1, 1, 32).reshape(4, 8))
    bias = numpyro.param("bias", jnp.zeros(8))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(jnp.tanh(weights + bias).sum(), 1), obs=y)


OF_PARAMS = {"weights": P(None, "other"), "bias": P("other")}


def test_parameters_can_be_spread():
    """What is learned is the same, and after the run they and their moments lie as before it."""
    engine = ScoreMatching(_wide, optax.adam(0.01), DenoisingScoreMatching(0.3))
    start = engine.init(KEY, Y)
    fit = _run(engine, init_state=start, mesh=Sharding(_mesh(2, 2), params=OF_PARAMS))
    _assert_close(fit.state, _run(engine, init_state=start).state)
    moments = fit.state.optim_state[0]
    for values in (fit.params, fit.state.unconstrained, moments.mu, moments.nu):
        assert {name: x.sharding.spec for name, x in values.items()} == OF_PARAMS


@pytest.mark.parametrize(
    ("optim", "num_spread"), [(numpyro.optim.Adam(0.01), 3), (optax.adafactor(0.01), 0)], ids=["of numpyro", "factored"]
)
def test_what_an_optimizer_keeps_lies_where_its_parameter_does(optim, num_spread):
    """Catches moments without names, those of NumPyro's optimizers, and a factor of them that has another shape."""
    params = {"weights": jnp.ones((256, 128)), "bias": jnp.ones(128)}
    state = {"params": params, "optim_state": as_transformation(optim).init(params)}
    placed = Sharding(_mesh(2, 2), params=OF_PARAMS).place_state(state)
    large = [x for x in jax.tree.leaves(placed["optim_state"]) if x.shape == (256, 128)]
    assert [x.sharding.spec for x in large] == [P(None, "other")] * num_spread
    assert placed["params"]["bias"].sharding.spec == P("other")


# Whatever meshes and arrays are given.


def test_explicit_axes_are_taken_as_automatic_ones():
    """Those of jax.make_mesh by default, of the mesh and of data that lie on it already."""
    engine, explicit = _engine("pgd"), _mesh(4)
    assert explicit.axis_types == (AxisType.Explicit,)
    there = jax.device_put(Y, NamedSharding(explicit, P("data")))
    fit = engine.run(KEY, 3, there, mesh=explicit, progress_bar=False)
    _assert_close(fit.state, engine.run(KEY, 3, Y, progress_bar=False).state)


def test_explicit_axes_that_are_set_around_a_run_are_refused():
    with jax.set_mesh(_mesh(4)), pytest.raises(ValueError, match=r"explicit axes, \('data',\).*AxisType.Auto"):
        _run(_engine("pgd"), mesh=_mesh(4))
    with jax.set_mesh(Mesh(jax.devices(), ("data",))):
        _run(_engine("pgd"), 1, mesh=_mesh(4))


def test_a_fit_goes_on_where_it_is_taken():
    """From four devices to two, to one, and from data that lie on one. Catches devices that do not go together."""
    engine = _engine("score matching")
    there = jax.device_put(Y, jax.devices()[2])
    first = engine.run(KEY, 4, there, mesh=_mesh(4), progress_bar=False, validation=there[:5], report=True)
    wanted = _run(engine, 8).state
    _assert_close(_run(engine, 4, init_state=first.state, mesh=_mesh(2)).state, wanted)
    _assert_close(_run(engine, 4, init_state=jax.device_get(first.state)).state, wanted)


def test_rows_go_to_their_devices_from_where_they_are(tmp_path):
    """Catches a copy of all rows on the first device, which may be too small for them, and labels that stay behind."""
    rows = np.memmap(tmp_path / "rows", "f4", "w+", shape=(8, 3))
    rows[:] = np.arange(24).reshape(8, 3)
    (x, scale), others = Sharding(_mesh(4)).place_data((rows, np.float32(2)), {"labels": np.arange(8), "table": np.ones((5, 2))})
    np.testing.assert_array_equal(x, rows)
    assert (x.sharding.spec, others["labels"].sharding.spec, others["table"].sharding.spec) == (P("data"), P("data"), P())
    assert isinstance(scale, np.float32)
    (batches,), _ = Sharding(_mesh(4)).place_data((np.ones((3, 8, 2)),), {}, has_steps=True)
    assert batches.sharding.spec == P(None, "data")


def test_a_bad_row_is_told_as_on_one_device():
    engine, bad = _engine("pgd"), np.where(Y > 3, np.nan, Y)
    start = _run(engine, 1, mesh=_mesh(4)).state
    with pytest.raises(NonFiniteError, match="step 1: site 'y'"):
        engine.run(KEY, 3, bad, init_state=start, mesh=_mesh(4), progress_bar=False)


# What does not go evenly.


def test_what_does_not_go_evenly_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"6 rows do not go evenly on the 4 devices of axis 'data'.*: leave 2 of them out, .*rows=None"
    ):
        _engine("pgd").run(KEY, 2, Y[:6], mesh=_mesh(4), progress_bar=False)
    with pytest.raises(ValueError, match=r"3 particles, 'x', .* 2 devices of axis 'other'.* num_particles .*particles=None"):
        Sharding(_mesh(2, 2), particles="other").place_state(_start("pgd"))
    with pytest.raises(ValueError, match=r"8 rows, of particles 'x', .* 3 devices of axis 'data'"):
        Sharding(_mesh(3)).place_state(_start("pgd"), 8)
    with pytest.raises(ValueError, match=r"8 negative chains, 'x/chains', .* 3 devices of axis 'data'.* num_chains .*chains=None"):
        Sharding(_mesh(3), rows=None).place_state(_start("ebipla"))
    state = _start("pgd")._replace(params={"bias": jnp.ones(8), "loc": jnp.ones(())})
    with pytest.raises(
        ValueError, match=r"params\['bias'\] is .*'data'.*the parameter \['bias'\] of shape \(8,\) .* \{'data': 3\}"
    ):
        Sharding(_mesh(3), rows=None, params={"bias": P("data")}).place_state(state)
    with pytest.raises(ValueError, match=r"params\['scale'\] .* no such parameter that it fits, only \['bias', 'loc'\]"):
        Sharding(_mesh(4), params={"scale": P("data")}).place_state(state)


def test_what_does_not_go_evenly_can_be_everywhere():
    sharding = Sharding(_mesh(3), rows=None, chains=None)
    fit = _run(_engine("ebipla"), init_state=_start("ebipla"), mesh=sharding)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(fit.state))


@pytest.mark.parametrize("make", [particles, svi], ids=["particles", "svi"])
def test_minibatches_from_outside_are_spread_over_the_devices(make):
    """Catches stacks of minibatches, or rows that are exchanged with the host, that come to other devices than their particles."""
    wanted = quietly(make(), batches(), num_steps=5)
    found = quietly(make(), batches(), num_steps=5, mesh=_mesh(4, 1))
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-5)
    for site, value in wanted.params.items():
        np.testing.assert_allclose(found.params[site], value, rtol=1e-5)
