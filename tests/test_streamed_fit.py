# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""``fit``: minibatches from outside give what the same rows give in memory, and nothing is lost where a fit ends."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from numpyro_ebm import (
    Batches,
    Checkpoints,
    DenoisingScoreMatching,
    EnergyDistribution,
    Minibatch,
    NonFiniteError,
    ParticleMMLE,
    ScoreMatching,
    fit,
    langevin,
    load,
    negative_phase,
)

KEY = jax.random.key(3)
N, B = 60, 12
Y = np.random.default_rng(0).normal(1.0, 1.5, N).astype(np.float32)


def hierarchical(y):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", N, subsample_size=B):
        y = numpyro.subsample(y, event_dim=0)
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def with_energy(y):
    """A learned energy, whose gradient needs negative chains."""
    b = numpyro.param("b", 0.3)
    with numpyro.plate("data", N, subsample_size=B):
        y = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", EnergyDistribution(lambda x: 0.5 * x**2 - b * x, initial=dist.Normal(0, 2)), obs=y)


def with_given_rows(y, index):
    with numpyro.handlers.substitute(data={"data": jnp.asarray(index)}):
        with_energy(y)


def particles(**settings):
    return ParticleMMLE(hierarchical, optax.sgd(0.002), **{"num_particles": 3, "step_size": 0.1, **settings})


def svi():
    model = negative_phase(with_energy, num_chains=16)
    return SVI(model, AutoDelta(model), optax.adam(0.02), Trace_ELBO())


def score_engine():
    return ScoreMatching(with_energy, optax.adam(0.02), DenoisingScoreMatching(0.3))


def batches(**settings):
    return Batches(Y, batch_size=B, **{"seed": 1, **settings})


def quietly(engine, *args, **settings):
    return fit(engine, KEY, *args, **{"progress_bar": False, **settings})


def same(a, b):
    def equal(x, y):
        x, y = (jax.random.key_data(z) if jnp.issubdtype(jnp.asarray(z).dtype, jax.dtypes.prng_key) else z for z in (x, y))
        np.testing.assert_array_equal(x, y)

    jax.tree.map(equal, a, b)


# The same as in memory.


@pytest.mark.parametrize("settings", [{}, {"kernel": "mala"}, {"dynamics": langevin(0.1)}], ids=["langevin", "mala", "dynamics"])
def test_streamed_particles_are_those_of_a_run_in_memory(settings):
    """The same keys, the same rows: to rounding. Catches rows that are exchanged wrongly, or moved twice."""
    engine, source = particles(**settings), batches()
    start = engine.init(KEY, Y)
    here = ParticleMMLE(_on_given_rows, optax.sgd(0.002), **{"num_particles": 3, "step_size": 0.1, **settings})
    state, losses = start, []
    for step in range(11):
        state, loss = here.update(state, Y, jnp.asarray(source.at(step).index))
        losses.append(loss)
    result = quietly(engine, source, num_steps=11, init_state=start)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(result.params["loc"], state.params["loc"], rtol=1e-5)
    np.testing.assert_allclose(result.state.particles["x"], state.particles["x"], rtol=1e-4, atol=1e-5)


def _on_given_rows(y, index):
    with numpyro.handlers.substitute(data={"data": index}):
        hierarchical(y)


def test_noise_on_all_rows_is_made_up_for(tmp_path, monkeypatch):
    """A row of a flat posterior does nothing else: its variance grows by 2h / L a step. Catches rows that rest without."""

    def flat(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", 4000, subsample_size=40):
            y = numpyro.subsample(y, event_dim=0)
            x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
            numpyro.sample("y", dist.Normal(loc, 1), obs=y + 0 * x)

    monkeypatch.setattr("numpyro_ebm.train.stacks.MAX_STEPS", 2)  # so that almost all rows are at rest on the host
    y, h, num_steps = np.zeros(4000, np.float32), 0.05, 30
    engine = ParticleMMLE(
        flat,
        optax.sgd(1e-6),
        num_particles=2,
        step_size=h,
        noise="all",
        init_strategy=numpyro.infer.init_to_value(values={"x": jnp.zeros(40)}),
    )
    start = engine.init(KEY, y)
    start = start._replace(particles={"x": jnp.zeros((2, 4000))})
    result = quietly(engine, Batches(y, batch_size=40), num_steps=num_steps, init_state=start, row_folder=tmp_path, report=False)
    x = np.asarray(result.state.particles["x"])
    in_memory = engine.run(KEY, num_steps, y, init_state=start, progress_bar=False).state.particles["x"]
    for found in (x, in_memory):
        np.testing.assert_allclose(found.var(), num_steps * 2 * h / 100, rtol=5 * np.sqrt(2 / 8000))


@pytest.mark.parametrize("name", ["svi", "score"])
def test_minibatches_of_all_other_engines_are_single_updates(name):
    engine = svi() if name == "svi" else score_engine()
    source = batches()
    result = quietly(engine, source, num_steps=9)
    if name == "svi":
        model = negative_phase(with_given_rows, num_chains=16)
        engine = SVI(model, AutoDelta(model), optax.adam(0.02), Trace_ELBO())
        state, losses = engine.init(KEY, Y, source.at(0).index), []
        for step in range(9):
            state, loss = engine.update(state, Y, jnp.asarray(source.at(step).index))
            losses.append(loss)
        params = engine.get_params(state)
    else:
        state, losses = engine.init(KEY, source.at(0)), []
        for step in range(9):
            state, loss = engine.update(state, source.at(step))
            losses.append(loss)
        params = state.params
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    for site, value in params.items():
        np.testing.assert_allclose(result.params[site], value, rtol=1e-5)


def test_svi_learns_from_rows_of_a_file(tmp_path):
    """Scaled by N / B, as in memory. Catches a plate that takes the rows of a minibatch for all."""
    np.save(tmp_path / "y.npy", Y)
    result = quietly(svi(), Batches(np.load(tmp_path / "y.npy", mmap_mode="r"), batch_size=B), num_epochs=100)
    assert abs(result.params["b"] - Y.mean()) < 0.15
    # the loss is that of all rows: minus the log density up to the normalizer, about N times that of one
    assert 0.3 < result.losses[-20:].mean() / (N * np.mean(0.5 * Y**2 - Y.mean() * Y)) < 3


# One program.


def test_a_second_fit_compiles_nothing():
    engine = particles()
    quietly(engine, batches(), num_steps=7)
    counts = engine._steps.open_loop._cache_size(), engine._steps.proposed._cache_size()
    quietly(engine, batches(seed=5), num_epochs=3)
    assert (engine._steps.open_loop._cache_size(), engine._steps.proposed._cache_size()) == counts
    assert counts[0] == 1


# Saved, ended and gone on with.


@pytest.mark.parametrize("make", [particles, lambda: particles(noise="all"), svi, score_engine], ids=["pgd", "all", "svi", "score"])
def test_a_fit_that_is_cut_goes_on_bit_for_bit(make, tmp_path, monkeypatch):
    """Also at the end of a stack of minibatches. Catches rows that are read twice, and a stack of no steps."""
    monkeypatch.setattr("numpyro_ebm.train.stacks.MAX_STEPS", 4)
    whole = quietly(make(), batches(), num_steps=23)
    for num_steps in (4, 9, 12, 23):
        result = quietly(make(), batches(), num_steps=num_steps, checkpoint=Checkpoints(tmp_path, every_steps=3))
    same(whole.params, result.params)
    same(whole.losses, result.losses)
    same(whole.state, result.state)


def saved_slowly(folder):
    """What the next test kills."""
    slowly = [lambda *_: time.sleep(0.05)]
    quietly(particles(), batches(), num_steps=60, checkpoint=Checkpoints(folder, every_steps=2), callbacks=slowly, chunk_size=2)


def test_a_fit_that_is_killed_goes_on_bit_for_bit(tmp_path):
    """By kill -9, in the middle. Catches a checkpoint that is complete by its name and not by its numbers."""
    program = f"import sys, test_streamed_fit; test_streamed_fit.saved_slowly({str(tmp_path)!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    started = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths})
    try:
        deadline = time.monotonic() + 200
        while len(list(tmp_path.glob("step_?*[0-9]"))) < 3 and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        started.kill()
    assert started.wait() == -signal.SIGKILL
    assert len(list(tmp_path.glob("step_*"))) >= 3
    assert not (tmp_path / "step_60").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a checkpoint that was being written
        result = quietly(particles(), batches(), num_steps=60, checkpoint=tmp_path)
    whole = quietly(particles(), batches(), num_steps=60)
    same((whole.params, whole.losses, whole.state), (result.params, result.losses, result.state))


def test_a_run_that_is_cut_goes_on_bit_for_bit(tmp_path):
    whole = particles().run(KEY, 15, Y, progress_bar=False)
    for num_steps in (4, 9, 15):
        result = particles().run(KEY, num_steps, Y, progress_bar=False, checkpoint=tmp_path)
    same(whole.state, result.state)
    same(whole.losses, result.losses)
    state = load(tmp_path, particles(), Y)
    same(state, result.state)


def test_other_data_or_settings_are_refused(tmp_path):
    quietly(particles(), batches(), num_steps=4, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="num_particles: 3 in the folder, 4 here"):
        quietly(particles(num_particles=4), batches(), num_steps=6, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"batches: .*seed=1.* in the folder, .*seed=2"):
        quietly(particles(), batches(seed=2), num_steps=6, checkpoint=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_fit_which_is_saved(number, tmp_path):
    before = signal.getsignal(number)

    def stop(step, state, losses, metrics):
        if step == 8:
            os.kill(os.getpid(), number)

    whole = quietly(score_engine(), batches(), num_steps=20)
    cut = quietly(score_engine(), batches(), num_steps=20, checkpoint=tmp_path, callbacks=[stop], chunk_size=4)
    assert cut.ended == number.name
    assert len(cut.losses) == 8
    assert signal.getsignal(number) is before
    result = quietly(score_engine(), batches(), num_steps=20, checkpoint=tmp_path)
    same(whole.state, result.state)


def test_fit_outside_the_main_thread_leaves_signals_alone():
    found = []
    thread = threading.Thread(target=lambda: found.append(quietly(score_engine(), batches(), num_steps=3)))
    thread.start()
    thread.join()
    assert found[0].ended == "num_steps"


def test_a_source_that_raises_loses_nothing(tmp_path):
    def source(end):
        for step in range(end):
            yield Y[:B] + step
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as error:
        quietly(score_engine(), source(7), num_steps=20, checkpoint=tmp_path)
    assert error.value.state.num_steps == 7
    state = load(tmp_path, score_engine(), Y[:B])
    same(state, error.value.state)


class Failing(list):
    """Minibatches, of which one cannot be read."""

    def __getitem__(self, index):
        if 0 in np.atleast_1d(index):
            raise OSError("the disk is gone")
        return np.stack([super(Failing, self).__getitem__(int(i)) for i in index])


@pytest.mark.parametrize("make", [particles, score_engine], ids=["particles", "score"])
def test_a_source_that_raised_is_gone_on_with_bit_for_bit(make, tmp_path, monkeypatch):
    """Catches a place in the data that is not that of the state."""
    monkeypatch.setattr("numpyro_ebm.train.stacks.MAX_STEPS", 2)
    with pytest.raises((OSError, TypeError)):
        quietly(make(), Batches(Failing(Y), batch_size=B, seed=1), num_steps=20, checkpoint=tmp_path)
    result = quietly(make(), batches(), num_steps=20, checkpoint=tmp_path)
    whole = quietly(make(), batches(), num_steps=20)
    same(whole.losses, result.losses)
    same(whole.state, result.state)


@pytest.mark.parametrize("make", [particles, svi, score_engine], ids=["particles", "svi", "score"])
def test_nan_in_the_data_is_told_with_its_step(make, tmp_path):
    y = Y.copy()
    order = batches(shuffle=False)
    y[order.at(3).index[2]] = np.nan
    with pytest.raises(NonFiniteError, match=r"^step 4: ") as error:
        quietly(make(), Batches(y, batch_size=B, shuffle=False), num_steps=9, checkpoint=tmp_path)
    assert error.value.step == 4
    assert error.value.state.num_steps == 3
    if make is particles:
        assert error.value.state.particles["x"].shape == (3, N)
    y[order.at(3).index[2]] = 0.0  # the row is put right, in place
    again = quietly(make(), Batches(y, batch_size=B, shuffle=False), num_steps=9, checkpoint=tmp_path)
    whole = quietly(make(), Batches(y, batch_size=B, shuffle=False), num_steps=9)
    if make is not particles:  # whose rows get their particles when a stack of minibatches is opened
        np.testing.assert_array_equal(again.losses[:3], whole.losses[:3])
    assert np.isfinite(again.losses).all()
    assert len(again.losses) == 9


# Looks on the way.


def test_patience_returns_the_best_state(tmp_path):
    values = iter([5.0, 3.0, 4.0, 4.0, 1.0])
    seen = []

    def judge(state):
        seen.append(state)
        return {"distance": next(values), "other": 0.0}

    result = quietly(score_engine(), batches(), num_steps=100, validation=judge, patience=2, chunk_size=2)
    assert result.ended == "patience"
    assert result.metrics["step"].tolist() == [2, 4, 6, 8]
    assert result.metrics["distance"].tolist() == [5.0, 3.0, 4.0, 4.0]
    assert result.state.num_steps == 4
    same(result.state, seen[1])


def test_validation_rows_are_judged_by_the_loss_of_the_engine():
    engine = score_engine()
    held_out = Batches(Y[:24], batch_size=B, shuffle=False)
    result = quietly(engine, batches(), num_steps=8, validation=held_out, chunk_size=4)
    state = result.state._replace(rng_key=jax.random.key(0))
    losses = [engine.evaluate(state, batch) for batch in held_out]
    np.testing.assert_allclose(result.metrics["validation"][-1], np.mean(losses), rtol=1e-6)


def test_a_callback_ends_a_fit():
    result = quietly(score_engine(), batches(), num_steps=90, callbacks=[lambda step, *_: step >= 6], chunk_size=3)
    assert (result.ended, len(result.losses)) == ("callback", 6)


# Sources.


def test_generators_end_a_fit_and_loaders_begin_again():
    once = (Y[i : i + B] for i in range(0, N, B))
    assert quietly(score_engine(), once).ended == "batches"
    loader = [(Y[i : i + B],) for i in range(0, N, B)]
    assert len(quietly(score_engine(), loader, num_epochs=3).losses) == 15
    assert len(quietly(score_engine(), loader, num_steps=12).losses) == 12


def test_a_source_without_a_position_is_read_again_and_says_so(tmp_path):
    def loader():
        return [Y[i : i + B] for i in range(0, N, B)]

    whole = quietly(score_engine(), loader(), num_steps=14)
    quietly(score_engine(), loader(), num_steps=7, checkpoint=tmp_path)
    with pytest.warns(UserWarning, match="cannot say where it is: 0 batches|batches are read and thrown away") as told:
        result = quietly(score_engine(), (x for x in loader() * 3), num_steps=14, checkpoint=tmp_path)
    assert told
    same(whole.state, result.state)


class Positioned:
    """A loader that says where it is, as grain's do."""

    def __init__(self):
        self.step = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return Minibatch(np.arange(B), (Y[:B] + self.step,))

    def get_state(self):
        return str(self.step).encode()

    def set_state(self, state):
        self.step = int(state)


def test_a_loader_that_says_where_it_is_goes_on_from_there(tmp_path):
    whole = quietly(score_engine(), Positioned(), num_steps=9)
    quietly(score_engine(), Positioned(), num_steps=4, checkpoint=tmp_path)
    result = quietly(score_engine(), Positioned(), num_steps=9, checkpoint=tmp_path)
    same(whole.state, result.state)


def test_a_smaller_last_batch_is_refused():
    with pytest.raises(ValueError, match=r"shape \(10,\) .* had shape \(12,\) .*drop_last=True"):
        quietly(score_engine(), [Y[:12], Y[12:24], Y[24:34]], num_steps=5)


# Models that do not take their rows from outside.


def test_a_gather_by_the_indices_of_the_plate_is_refused():
    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", N, subsample_size=B) as index:
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y[index])

    with pytest.raises(ValueError, match=r"takes rows out of an argument by the indices of a plate, as in y\[index\]"):
        quietly(ParticleMMLE(model, optax.sgd(0.01), 3, 0.1), batches(), num_steps=3)


def test_a_table_of_all_rows_is_gathered_as_in_memory():
    """It is not part of the minibatch, so that its rows are there."""
    table = jnp.asarray(Y)

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", N, subsample_size=B) as index:
            x = numpyro.sample("x", dist.Normal(loc, 1))
            y = numpyro.subsample(y, event_dim=0)
            numpyro.sample(
                "y", dist.Normal(x + table[index] - y, 1), obs=y
            )  # the same as y ~ Normal(x, 1), if they belong together

    found = quietly(ParticleMMLE(model, optax.sgd(0.002), 3, 0.1), batches(), num_steps=7)
    same(found.losses, quietly(particles(), batches(), num_steps=7).losses)


def test_a_plate_of_the_size_of_the_batch_is_refused():
    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    with pytest.raises(ValueError, match=f"plate 'data' of the model has size {B}, which is that of the minibatch.*{N}"):
        quietly(ParticleMMLE(model, optax.sgd(0.01), 3, 0.1), batches(), num_steps=3)


def test_a_plate_of_another_size_than_the_data_is_refused():
    with pytest.raises(ValueError, match=f"plate 'data' of the model has size {N}, and the data have 48 rows"):
        quietly(particles(), Batches(Y[:48], batch_size=B), num_steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "fit has no end"),
        ({"num_steps": 3, "num_epochs": 2}, "both say when to end"),
        ({"num_steps": 3, "patience": 2}, "patience=2 with no validation="),
        ({"num_steps": 3, "row_folder": "x"}, "ScoreMatching keeps nothing for each row"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        quietly(score_engine(), batches(), **settings)


def test_rows_without_indices_have_no_particles():
    with pytest.raises(ValueError, match="does not say which rows it has"):
        quietly(particles(), [Y[:B]], num_steps=3)


# Batches.


def test_an_epoch_shows_every_row_once():
    for shuffle in (True, "batches", False):
        source = Batches(Y, batch_size=B, shuffle=shuffle)
        for epoch in range(3):
            seen = np.concatenate([source.at(epoch * len(source) + i).index for i in range(len(source))])
            np.testing.assert_array_equal(np.sort(seen), np.arange(N))
    orders = [np.concatenate([batches(seed=seed).at(i).index for i in range(5)]) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


def test_rows_that_are_left_over_are_others_in_every_epoch():
    source = Batches(np.arange(10), batch_size=4)
    seen = {frozenset(range(10)) - {int(i) for s in (0, 1) for i in source.at(2 * epoch + s).index} for epoch in range(30)}
    assert len(seen) > 10
    in_turn = np.concatenate([Batches(np.arange(10), batch_size=4, shuffle=False).at(i).args[0] for i in range(5)])
    np.testing.assert_array_equal(in_turn, np.tile(np.arange(10), 2))


class ReadForwards:
    """What takes sorted indices alone, as HDF5 does."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        assert (np.diff(index) > 0).all()
        return self.x[index]


@pytest.mark.parametrize("wrap", [ReadForwards, list, jnp.asarray], ids=["forwards", "list", "jax"])
def test_rows_come_in_the_order_of_their_indices(wrap):
    source = Batches(wrap(Y), batch_size=B)
    batch = source.at(2)
    np.testing.assert_array_equal(batch.args[0], Y[batch.index])


def test_parts_of_a_batch_are_those_of_processes():
    whole, parts = batches().at(2), [batches().at(2, (i, 3)) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([part.index for part in parts]), whole.index)
    with pytest.raises(ValueError, match="does not divide by the 5 processes"):
        batches().at(0, (0, 5))


def test_bad_arrays_are_refused():
    with pytest.raises(ValueError, match="array 0 has 60, 'x' has 5"):
        Batches(Y, batch_size=3, kwargs={"x": Y[:5]})
    with pytest.raises(ValueError, match="batch_size=61 is more than the 60 rows"):
        Batches(Y, batch_size=61)
    with pytest.raises(TypeError, match="has no length"):
        Batches(3.0, batch_size=1)
