# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints and files of states: what is read is what was written, bit for bit, or it is refused with the reason."""

import builtins
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebm import Checkpoints, ParticleMMLE, load, save
from numpyro_ebm.train.checkpoint import _versions
from numpyro_ebm.train.leaves import OpenLength, _sum_of_bits, checksum, leaves_of
from numpyro_ebm.train.store import Store

pytest.importorskip("orbax.checkpoint")
# When orbax cannot read or write an array it stops waiting for the others, which then find that nobody listens.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")

RUN = {"engine": "ParticleMMLE", "num_particles": "10"}


class Pair(NamedTuple):
    left: object
    right: object


def every_kind(seed=0):
    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (3, 4)), "half": jnp.arange(5, dtype=jnp.bfloat16) + seed, "none": None}
    return {
        "state": Pair(params, optax.adam(1e-3).init(params)),
        "keys": (key, jax.random.key(seed, impl="rbg"), jax.random.split(key, 3), jax.random.PRNGKey(seed)),
        "flags": [
            jnp.array([True, False]),
            jnp.int8(-3),
            jnp.uint32(2**32 - 1),
            jnp.complex64(1 + 2j),
            jnp.float32("nan"),
            -jnp.zeros(2),
        ],
        "numpy": (
            rng.normal(size=(4, 2)),
            rng.integers(9, size=3),
            np.array([True]),
            np.zeros((0, 3)),
            np.float64(0.1),
            np.arange(6)[::2],
        ),
        "python": (3, 0.1, True),
        "rows": jnp.arange(20_000.0) + seed,
        "empty": ((), {}, jnp.zeros((2, 0))),
    }


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for (leaf, numbers), (again, found) in zip(leaves_of(tree), leaves_of(other), strict=True):
        assert (leaf, checksum(numbers)) == (again, checksum(found))  # where, what, dtype, shape and bits


def written(folder, steps=(1, 2), run=RUN, **settings):
    writer = Checkpoints(folder, every_steps=1, **settings).open(run)
    for step in steps:
        writer.save(step, every_kind(step), {"position": step})
    writer.close()
    return folder


def restored(folder, wanted=None, run=RUN, **settings):
    writer = Checkpoints(folder, **settings).open(run)
    try:
        return writer.restore(every_kind() if wanted is None else wanted)
    finally:
        writer.close()


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


def until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline


def run_python(script, *args, **environment):
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, env=os.environ | environment
    )
    return done


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    # Catches keys that come back as numbers, NumPy arrays as JAX's, bfloat16 by way of float32, 0 for -0, and empty arrays.
    found = restored(written(tmp_path / "runs" / "a"))
    assert (found.step, found.meta) == (2, {"position": 2})
    assert_same(found.tree, every_kind(2))
    assert found.tree["numpy"][0].flags.writeable


IN_FRESH_PROCESS = """
import sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint import every_kind, assert_same, restored
import jax, pathlib
wanted = jax.eval_shape(lambda: every_kind(2)["state"])
assert_same(restored(pathlib.Path(sys.argv[1]), {**every_kind(), "state": wanted}).tree, every_kind(2))
print("same")
"""


def test_a_fresh_process_reads_the_same_into_shapes_alone(tmp_path):
    # Catches what only the process that wrote it can read, and a structure that is needed as arrays.
    done = run_python(IN_FRESH_PROCESS, written(tmp_path), os.path.dirname(__file__))
    assert done.stdout == "same\n", done.stderr


def test_what_is_saved_may_change_at_once(tmp_path):
    # Catches a background write from the run's own memory, over which the next steps are written.
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    numbers, state = np.zeros(1_000_000), jnp.zeros(1_000_000)
    writer = Checkpoints(tmp_path, every_steps=1).open(RUN)
    writer.save(1, {"numbers": numbers, "state": state}, {})
    numbers += 1
    state = step(state)
    writer.close()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(restored(tmp_path, {"numbers": numbers, "state": state}).tree))


def test_a_memmap_is_written_before_save_returns(tmp_path):
    # Catches the same for arrays on disk, of which no copy is made.
    rows = np.memmap(tmp_path / "rows", "f4", "w+", shape=(1_000_000,))
    writer = Checkpoints(tmp_path / "run", every_steps=1).open(RUN)
    writer.save(1, {"rows": rows}, {})
    rows += 1
    writer.close()
    assert not np.any(restored(tmp_path / "run", {"rows": rows}).tree["rows"])


def test_a_memmap_is_read_into_the_one_on_disk(tmp_path, monkeypatch):
    """In parts, and with another order of axes. Catches a copy of it in memory, and parts that change places."""
    monkeypatch.setattr("numpyro_ebm.train.store.MAX_PART", 100)
    arrays = [np.memmap(tmp_path / name, np.float32, "w+", shape=(50, 3)) for name in ("before", "after")]
    arrays[0][:] = np.random.default_rng(0).normal(size=(50, 3))
    for axis in (0, 1):
        folder = tmp_path / f"saved {axis}"
        trees = [{"x": np.moveaxis(array, 0, axis), "y": np.arange(3)} for array in arrays]
        writer = Checkpoints(folder).open({})
        writer.save(1, trees[0], {})
        writer.close()
        arrays[1][:] = 0
        reader = Checkpoints(folder).open({})
        found = reader.restore(trees[1]).tree
        reader.close()
        assert np.shares_memory(found["x"], arrays[1])
        np.testing.assert_array_equal(arrays[1], arrays[0])
        np.testing.assert_array_equal(found["y"], np.arange(3))
    assert checksum(trees[0]["x"]) == checksum(np.ascontiguousarray(trees[0]["x"]))


def test_other_versions_are_told_once(tmp_path, monkeypatch):
    written(tmp_path)
    versions = {**_versions(), "jax": "0.0.1"}
    monkeypatch.setattr("numpyro_ebm.train.checkpoint._versions", lambda: versions)
    with pytest.warns(RuntimeWarning, match=r"jax \S+, and 0.0.1 is here\. The run goes on") as told:
        restored(tmp_path)
    assert len(told) == 1


def test_the_array_that_was_read_can_be_donated(tmp_path):
    # Catches an array of JAX in NumPy's memory.
    tree = restored(written(tmp_path)).tree
    step = jax.jit(lambda x: x * 2, donate_argnums=0)
    assert bool((step(tree["state"].left["w"]) == 2 * every_kind(2)["state"].left["w"]).all())
    assert not tree["flags"][5].committed  # else it could not meet an array on another device


def test_losses_are_as_long_as_they_were_saved(tmp_path):
    writer = Checkpoints(tmp_path).open(RUN)
    writer.save(7, {"losses": np.arange(7, dtype="f4")}, {})
    writer.close()
    assert restored(tmp_path, {"losses": OpenLength("f4")}).tree["losses"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"\['losses'\]: saved float32 of shape \(7,\), here float64"):
        restored(tmp_path, {"losses": OpenLength("f8")})


def test_arrays_go_to_the_devices_that_are_asked_for(tmp_path):
    # Catches a checkpoint that can only be read onto the mesh that wrote it.
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    wanted = every_kind()
    wanted["state"].left["w"] = jax.ShapeDtypeStruct((3, 4), "float32", sharding=sharding)
    found = restored(written(tmp_path), wanted).tree["state"].left["w"]
    assert found.sharding == sharding
    assert bool((found == every_kind(2)["state"].left["w"]).all())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "bool", "int8", "uint32", "complex64"])
def test_the_checksum_of_an_array_spread_over_processes_sees_every_bit_and_place(dtype):
    # Catches a sum in which two rows change places, or 0 becomes -0, and nobody sees.
    with jax.enable_x64(True):
        x = (jnp.arange(12).reshape(4, 3) % 5).astype(dtype)
        others = [x, x.at[3, 2].set(jnp.zeros((), dtype)), x.at[jnp.array([0, 1])].set(x[jnp.array([1, 0])]), x.T.reshape(4, 3)]
        others += [x.at[0, 0].set(-x[0, 0])] if "float" in dtype else []
        sums = [int(_sum_of_bits(other)) for other in others]
        assert len(set(sums)) == len(sums)


# When, and which.


def test_due_by_steps_and_by_minutes(tmp_path, monkeypatch):
    # Catches a checkpoint that is left out because a chunk jumps over the multiple, and one after every chunk.
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    writer = Checkpoints(tmp_path / "a", every_steps=10).open(RUN)
    assert [step for step in range(0, 30, 7) if writer.is_due(step)] == [14, 21, 28]
    writer.save(14, {}, {})
    assert (writer.steps_left(14), writer.steps_left(21), writer.steps_left(30)) == (10, 3, 1)
    assert [step for step in range(14, 30, 7) if writer.is_due(step)] == [28]
    writer.close()
    writer = Checkpoints(tmp_path / "b").open(RUN)
    now[0] = 599.0
    assert writer.steps_left(1) is None
    assert not writer.is_due(5)
    now[0] = 600.0
    assert writer.is_due(5)
    assert not writer.is_due(0)  # nothing was done
    writer.save(5, {}, {})
    now[0] = 1199.0
    assert not writer.is_due(6)
    writer.close()


def test_the_last_and_the_best_are_kept(tmp_path):
    # Catches a best one that is forgotten when the run goes on in another process, and nan as the best.
    metrics = {1: float("nan"), 2: 1.0, 3: 4.0, 4: 5.0, 5: 3.0, 6: None}
    settings = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    for some in ([1, 2, 3], [4, 5, 6]):
        writer = settings.open(RUN)
        for step in some:
            writer.save(step, {"x": np.zeros(2)}, {}, metrics[step])
        writer.close()
    assert steps(tmp_path) == [2, 5, 6]


def test_a_step_is_written_once(tmp_path):
    writer = Checkpoints(tmp_path).open(RUN)
    writer.save(3, {"x": np.zeros(2)}, {})
    writer.save(3, {"x": np.ones(2)}, {})
    writer.close()
    writer = Checkpoints(tmp_path).open(RUN)
    writer.restore({"x": np.zeros(2)})
    writer.save(3, {"x": np.ones(2)}, {})
    writer.close()
    assert not restored(tmp_path, {"x": np.zeros(2)}).tree["x"].any()


# What is refused.


def test_another_run_is_refused_line_by_line(tmp_path):
    with pytest.raises(ValueError, match="checkpoints of another run") as error:
        restored(written(tmp_path), run={"engine": "ParticleMMLE", "num_particles": "20", "order": "'jacobi'"})
    assert "num_particles: 10 in the folder, 20 here\n  order: nothing in the folder, 'jacobi' here\n" in str(error.value)
    assert "overwrite=True" in str(error.value)
    assert steps(tmp_path) == [1, 2]


def test_other_shapes_are_refused_leaf_by_leaf(tmp_path):
    # Catches a tree that is filled in order, whatever it is.
    wanted = every_kind()
    wanted["state"].left["w"] = jnp.zeros((3, 5))
    wanted["numpy"] = wanted["numpy"][:-1]
    wanted["python"] = (3, 0.1, jnp.array(True))
    wanted["new"] = jnp.zeros(2)
    with pytest.raises(ValueError, match="holds other arrays") as error:
        restored(written(tmp_path), wanted)
    for line in (
        "['state'].left['w']: saved float32 of shape (3, 4), here float32 of shape (3, 5)",
        "['numpy'][5]: saved int64 of shape (3,), here missing",
        "['python'][2]: saved a Python bool, here bool of shape ()",
        "['new']: not saved, here float32 of shape (2,)",
    ):
        assert line in str(error.value)


def test_overwriting_deletes_checkpoints_and_nothing_else(tmp_path):
    written(tmp_path)
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "2024").mkdir()
    assert restored(tmp_path, run={"engine": "VaGES"}, overwrite=True) is None
    assert sorted(os.listdir(tmp_path)) == ["2024", "step_notes"]


def test_an_unwritable_folder_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a' .*Not a directory.*: pass a folder that can be written to"):
        Checkpoints(tmp_path / "file" / "a").open(RUN)


def test_settings_are_checked(tmp_path):
    for bad in ({"every_steps": 0}, {"every_minutes": -1.0}, {"keep_last": 0}, {"keep_best": -1}, {"overwrite": "no"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Checkpoints(tmp_path, **bad)
    for folder in (3, "", None, "gs://bucket/a"):
        with pytest.raises(TypeError, match="path of a folder"):
            Checkpoints(folder)


def test_a_leaf_without_numbers_is_refused_by_name(tmp_path):
    writer = Checkpoints(tmp_path).open(RUN)
    with pytest.raises(TypeError, match=r"\['name'\], a str .* holds no numbers"):
        writer.save(1, {"name": "x"}, {})
    with pytest.raises(TypeError, match="JSON"):
        writer.save(1, {"x": np.zeros(1)}, {"when": object()})
    writer.close()
    assert steps(tmp_path) == []


def test_without_orbax_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_orbax(name, *args, **kwargs):
        if name.startswith("orbax"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_orbax)
    with pytest.raises(ImportError, match=r"pip install 'numpyro_ebm\[checkpoint\]'"):
        Checkpoints(tmp_path).open(RUN)


# What is damaged.


def largest(folder):
    return max((path for path in (folder / "tree").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def the_record(folder):
    return folder / "meta" / "metadata"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def change_a_number(path):
    path.write_text(path.read_text().replace("position", "positiom"))


DAMAGES = {
    "a number that is no longer the same": (largest, flip, r"the numbers of .* \(checksum\)"),
    "numbers cut short": (largest, lambda path: os.truncate(path, path.stat().st_size // 2), "its arrays cannot be read"),
    "numbers that are gone": (largest, lambda path: path.unlink(), "its arrays cannot be read"),
    "a record that says something else": (the_record, change_a_number, r"its record is not what was written \(checksum\)"),
    "a record cut short": (the_record, lambda path: os.truncate(path, 100), "its record cannot be read"),
    "a record that is gone": (the_record, lambda path: path.unlink(), "its record cannot be read"),
    "a checkpoint of nothing": (
        lambda folder: folder,
        lambda path: [shutil.rmtree(path), path.mkdir()],
        "its record cannot be read",
    ),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("of", "damage", "why"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(two_checkpoints, tmp_path, of, damage, why):
    # Catches wrong numbers that are taken for good, a run that ends because of them, and one that starts from zero in silence.
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    damage(of(folder / "step_2"))
    with pytest.warns(RuntimeWarning, match=rf"step_2: {why}(.|\n)*The run goes on from step 1") as told:
        found = restored(folder)
    assert len(told) == 1
    assert (found.step, found.meta) == (1, {"position": 1})
    assert_same(found.tree, every_kind(1))
    assert steps(folder) == [1]
    assert (folder / "unreadable" / "step_2").is_dir()
    written(folder, [2])  # the step can be written again
    assert_same(restored(folder).tree, every_kind(2))


def test_if_no_checkpoint_is_good_there_is_an_error(two_checkpoints, tmp_path):
    # Catches weeks of work that are begun anew in silence.
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    the_record(folder / "step_1").unlink()
    flip(largest(folder / "step_2"))
    with pytest.raises(
        RuntimeError, match=r"none of the checkpoints .*\n  step_2: the numbers .*\n  step_1: its record(.|\n)*overwrite=True"
    ):
        restored(folder)
    assert steps(folder) == [1, 2]  # nothing is moved
    flip(the_record(folder / "step_2"))
    with pytest.raises(ValueError, match=r"no checkpoint that can be read:\n  step_2: its record"):
        load(folder, Started())


KILLED = """
import os, signal, sys, pathlib, numpy as np
from numpyro_ebm import Checkpoints
folder = pathlib.Path(sys.argv[1])
writer = Checkpoints(folder).open({"engine": "A"})
if sys.argv[2] == "second":
    writer.save(1, {"x": np.ones(3), "big": np.ones(20_000_000)}, {})
writer.save(2, {"x": np.zeros(3), "big": np.zeros(20_000_000)}, {})
while not list(folder.glob("step_2.*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_checkpoint_whose_writer_was_killed_is_told(tmp_path, which):
    # Catches half a checkpoint that is taken for one, and a silent new start.
    assert run_python(KILLED, tmp_path, which).returncode == -signal.SIGKILL
    instead = "There is no other: the run starts anew" if which == "first" else "The run goes on from step 1"
    with pytest.warns(RuntimeWarning, match=rf"step_2: it was not finished when a process ended\n{instead}") as told:
        found = restored(tmp_path, {"x": np.zeros(3), "big": np.zeros(20_000_000)}, {"engine": "A"})
    assert len(told) == 1
    assert found is None if which == "first" else found.tree["x"].tolist() == [1, 1, 1]
    assert not list(tmp_path.glob("*tmp*"))


def test_a_full_disk_is_told_and_the_next_checkpoint_is_written(tmp_path):
    # Catches an error of the background that nobody sees, a torn checkpoint, and a run that is lost because of its disk.
    small, big = {"x": np.ones(3)}, {"x": np.ones(1_000_000)}
    writer = Checkpoints(tmp_path, every_steps=1).open(RUN)
    writer.save(1, small, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        writer.save(2, big, {})
        with pytest.warns(RuntimeWarning, match="step 2 could not be written .*: File too large. The last good one is of step 1"):
            until(lambda: writer.is_due(3) and writer._pending is None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*tmp*"))  # which would keep it full
    writer.save(3, small, {})
    writer.close()
    assert restored(tmp_path, small).step == 3


def test_what_cannot_even_begin_to_be_written_is_told(tmp_path, monkeypatch):
    writer = Checkpoints(tmp_path).open(RUN)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "write", fail)
    with pytest.warns(RuntimeWarning, match="step 1 .*No space left on device. There is none yet"):
        writer.save(1, {"x": np.zeros(1)}, {})
    writer.close()


IN_TWO_PROCESSES = """
import pathlib, sys, warnings
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec
folder, rank = pathlib.Path(sys.argv[2]), int(sys.argv[4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, rank)
sys.path.insert(0, sys.argv[1])
from test_checkpoint import flip, largest
from numpyro_ebm import Checkpoints
from numpyro_ebm.train.store import DamagedError, Store
rows = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))
numbers = np.arange(40_000, dtype="f4").reshape(8, 5000)

def at(step):
    return {"rows": jax.make_array_from_process_local_data(rows, step * numbers[4 * rank : 4 * rank + 4], numbers.shape)}

def restored():
    writer = Checkpoints(folder).open({})
    with warnings.catch_warnings(record=True) as told:
        found = writer.restore(at(0))
    writer.close()
    assert found.tree["rows"].sharding == rows
    for shard in found.tree["rows"].addressable_shards:
        np.testing.assert_array_equal(shard.data, found.step * numbers[shard.index])
    return found.step, len(told)

writer = Checkpoints(folder).open({})
for step in (1, 2, 3):
    writer.save(step, at(step), {})
writer.close()
whole = restored()
if rank == 0:
    flip(largest(folder / "step_3"))
sync_global_devices("damaged")
read = Store.read

def read_by_one(self, step, *args):
    tree = read(self, step, *args)
    if (rank, step) == (1, 2):
        raise DamagedError("this process cannot read it")
    return tree

Store.read = read_by_one
print(whole, restored())
"""


def test_processes_write_and_read_their_parts_and_agree_on_what_is_damaged(tmp_path):
    # Catches a process that goes on from another checkpoint than the others, and damage to a part that only one of them holds.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "always", "-c", IN_TWO_PROCESSES, os.path.dirname(__file__), str(tmp_path), port]
    started = [
        subprocess.Popen(
            [*command, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""}
        )
        for rank in "01"
    ]
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert out.splitlines()[-1:] == ["(3, 0) (1, 1)"], errors[-2000:]


# A state in one file.


def scale_model(y=None, size=6):
    mu = numpyro.param("mu", jnp.zeros(()))
    with numpyro.plate("rows", size):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


Y = jnp.arange(6.0)


def particles(num_particles=3):
    return ParticleMMLE(scale_model, optax.adam(0.1), num_particles=num_particles, step_size=0.1)


class Started:
    """An engine by its verb alone."""

    def init(self, rng_key, scale=1):
        return {"x": jnp.zeros(3 * scale), "rng_key": rng_key, "buffer": jnp.zeros((0, 2))}


def test_a_run_goes_on_from_a_file_as_if_it_had_not_ended(tmp_path):
    # Catches a state that loses its key, its optimizer or the bits of its particles.
    path = tmp_path / "state.ebm"
    state = particles().run(jax.random.key(1), 5, Y, progress_bar=False).state
    save(state, path, particles())
    on, again = (
        particles().run(jax.random.key(0), 5, Y, init_state=s, progress_bar=False) for s in (state, load(path, particles(), Y))
    )
    assert_same(on.state, again.state)


def test_the_state_of_another_engine_or_of_other_shapes_is_refused_by_name(tmp_path):
    path = tmp_path / "state.ebm"
    save(particles().init(jax.random.key(1), Y), path)
    with pytest.raises(ValueError, match=r"\.particles\['z'\]: saved float32 of shape \(3, 6\), here float32 of shape \(4, 6\)"):
        load(path, particles(4), Y)
    with pytest.raises(
        ValueError, match=r"\.particles\['z'\]: saved .*, here missing\n(.|\n)*a ParticleState; this Started makes a dict"
    ):
        load(path, Started())


def other_model(y):
    mu = numpyro.param("mu", jnp.zeros(()))
    with numpyro.plate("rows", y.size):
        z = numpyro.sample("z", dist.LogNormal(mu, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def of_other_model(model=other_model, **settings):
    return ParticleMMLE(model, optax.adam(0.3), num_particles=3, step_size=0.2, **settings)


def test_the_state_of_another_model_with_the_same_shapes_is_refused(tmp_path):
    """Catches the particles of a normal latent that are taken for those of a log-normal one."""
    state = particles().init(jax.random.key(1), Y)
    save(state, tmp_path / "a", particles())
    message = r"holds the state of other programs:\n  model: scale_model, digest \w+ there, other_model, digest \w+ here\nLoad it"
    with pytest.raises(ValueError, match="a' " + message):
        load(tmp_path / "a", of_other_model(), Y)
    assert_same(load(tmp_path / "a", of_other_model(scale_model), Y), state)  # other settings may go on from it
    save(state, tmp_path / "b")
    with pytest.warns(RuntimeWarning, match=r"b' does not say of which model its state is.*save\(state, path, engine\)"):
        load(tmp_path / "b", of_other_model(), Y)
    particles().run(jax.random.key(1), 2, Y, progress_bar=False, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="step_2' " + message):
        load(tmp_path / "run", of_other_model(), Y)


def test_svi_goes_on_from_a_file_in_a_fresh_object(tmp_path):
    # Catches get_params of an SVI that was never initialized: 'NoneType' object is not callable.
    def svi():
        return SVI(scale_model, AutoNormal(scale_model), numpyro.optim.Adam(0.1), Trace_ELBO())

    first = svi()
    state, _ = first.update(first.init(jax.random.key(2), Y), Y)
    save(state, tmp_path / "svi", first)
    other = svi()
    again = load(tmp_path / "svi", other, Y)
    assert_same(first.update(state, Y), other.update(again, Y))
    assert_same(first.get_params(state), other.get_params(again))


def test_every_kind_of_leaf_comes_back_from_a_file(tmp_path):
    class Kinds:
        def init(self, rng_key):
            return {name: part for name, part in every_kind(3).items() if name not in ("numpy", "python")}

    save(Kinds().init(None), tmp_path / "a")
    assert_same(load(tmp_path / "a", Kinds()), Kinds().init(None))


@pytest.mark.parametrize("key", [jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")], ids=["raw", "rbg"])
def test_a_key_stays_of_its_kind(tmp_path, key):
    # Catches the state of a run begun with PRNGKey, or with another kind of key than the default, that is refused.
    state = Started().init(key)
    save(state, tmp_path / "a")
    assert_same(load(tmp_path / "a", Started()), state)


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 300), lambda path: path.write_text("no zip")])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "a"
    save(Started().init(jax.random.key(0)) | {"x": jnp.arange(3000.0)}, path)
    damage(path)
    with pytest.raises(ValueError, match="a' is no file of save, or it is damaged"):
        load(path, Started(), 1000)


def test_numbers_of_another_file_are_refused(tmp_path):
    # Catches members that are each whole and do not belong together: the archive's own checksums see nothing.
    path = tmp_path / "a"
    save(Started().init(jax.random.key(0)), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    record = json.loads(members["state.json"])
    members[f"leaf_{[leaf[0] for leaf in record['leaves']].index('[' + repr('x') + ']')}"] = np.ones(3, "f4").tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"the numbers of \['x'\] are not those"):
        load(path, Started())


def test_a_file_that_cannot_be_completed_leaves_the_old_one(tmp_path, monkeypatch):
    # Catches a state that is lost because the new one did not fit on the disk.
    state = Started().init(jax.random.key(0))
    save(state, tmp_path / "a")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save(state | {"x": jnp.ones(3)}, tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert not load(tmp_path / "a", Started())["x"].any()


def test_load_reads_the_state_of_a_run(tmp_path):
    # Catches a run whose fit cannot be looked at without running on.
    for step in (1, 2):
        writer = Checkpoints(tmp_path).open(RUN)
        writer.save(step, {"state": Started().init(jax.random.key(step)), "losses": np.zeros(step)}, {})
        writer.close()
    assert_same(load(tmp_path, Started()), Started().init(jax.random.key(2)))
    flip(the_record(tmp_path / "step_2"))
    with pytest.warns(RuntimeWarning, match="step 1 is loaded, because\n  step_2: its record"):
        assert_same(load(tmp_path, Started())["rng_key"], jax.random.key(1))
    assert steps(tmp_path) == [1, 2]  # who only reads moves nothing
    with pytest.raises(ValueError, match=r"\['state'\]\['x'\]: saved float32 of shape \(3,\), here float32 of shape \(6,\)"):
        load(tmp_path, Started(), 2)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing", Started())


def test_nothing_warns(tmp_path):
    # Catches a warning of orbax, which every user would meet.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restored(written(tmp_path)).step == 2
