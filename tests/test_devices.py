# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Fits on many devices, and by several processes."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from several_processes import BATCHES, LEARNERS, ROWS
from test_engine_contract import CASES, KEY

from numpyro_ebm import Batches, Sharding, fit
from numpyro_ebm.train.devices import as_sharding

HERE = Path(__file__).parent


def _environment(**settings):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), **settings}


def test_fits_on_four_devices():
    """By the tests of ``on_four_devices.py``, in a process that has them."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "on_four_devices.py")]
    done = subprocess.run(command, env=_environment(XLA_FLAGS=flags), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module", params=[1, pytest.param(0, marks=pytest.mark.slow)])
def processes(request, tmp_path_factory):
    """What two processes say, and how the other ends when this one of them is killed in the middle of a run.

    Their seeds of hashes are not the same.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    logs = [tmp_path_factory.mktemp("processes") / f"{i}" for i in range(2)]
    started = []
    for i, log in enumerate(logs):
        command = [sys.executable, "-u", str(HERE / "several_processes.py"), str(i), "2", port, str(logs[0].parent)]
        with log.open("w") as file:
            environment = _environment(PYTHONHASHSEED=str(i), XLA_FLAGS="")
            started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    victim, other = request.param, 1 - request.param
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not all('"step"' in log.read_text() for log in logs):
            if any(process.poll() is not None for process in started):
                break
            time.sleep(0.2)
        else:
            started[victim].kill()
        begin = time.monotonic()
        code = started[other].wait(timeout=60)
        return [_facts(log) for log in logs], code, time.monotonic() - begin, logs[other].read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()


def _facts(log):
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    return {key: value for line in lines for key, value in json.loads(line).items()}


def test_two_processes_learn_what_one_does(processes):
    """To rounding, with half of the rows and of the chains in each. Catches chunks that each sizes by its own clock."""
    (first, second), _, _, log = processes
    alone = CASES["ebipla"].make().run(KEY, 10, jnp.asarray(ROWS), progress_bar=False)
    assert first["fit"] == second["fit"], log
    np.testing.assert_allclose(first["fit"]["losses"], alone.losses, rtol=2e-5)
    np.testing.assert_allclose(first["fit"]["loc"], alone.params["loc"], rtol=2e-5)
    assert first["fit"]["parts"] == [[3, 4], [4]]


@pytest.mark.parametrize("name", LEARNERS)
def test_two_processes_that_read_parts_of_minibatches_fit_what_one_does(processes, name):
    """To rounding, and bit for bit when cut and gone on with. Catches rows that are read twice, or not at all."""
    (first, second), _, _, log = processes
    alone = fit(LEARNERS[name](), KEY, BATCHES, num_steps=12, progress_bar=False)
    found = first[f"streamed {name}"]
    assert found == second[f"streamed {name}"], log
    np.testing.assert_allclose(found["losses"], alone.losses, rtol=2e-5)
    for site, value in alone.params.items():
        np.testing.assert_allclose(found["params"][site], value, rtol=2e-5)
    assert found["cut"] == found["losses"]


def test_validation_in_two_processes_is_that_of_one(processes):
    (first, second), *_ = processes
    held_out = Batches(ROWS, batch_size=4)
    alone = fit(LEARNERS["score"](), KEY, BATCHES, num_steps=6, chunk_size=3, validation=held_out, progress_bar=False).metrics[
        "validation"
    ]
    assert first["validation"] == second["validation"]
    np.testing.assert_allclose(first["validation"], alone, rtol=2e-5)


def test_a_fit_of_two_processes_ends_in_both(processes):
    """Where the shorter of two sources ends, or a callback of one says so. Catches one that waits for ever."""
    for said in processes[0]:
        assert said["ended"] == 5
        assert said["stopped"] == ["callback", 3]


def test_a_run_of_two_processes_is_saved_and_gone_on_with(processes):
    """Its rows are an argument of which each has a part. Catches a fingerprint that reads what is elsewhere."""
    for said in processes[0]:
        assert said["saved_run"] == said["fit"]["losses"]


def test_what_all_processes_have_is_collected(processes):
    (first, second), *_ = processes
    assert first["collected"] == second["collected"]
    assert len(first["collected"]) == 3


def test_processes_may_be_given_all_rows_and_a_state_each(processes):
    (first, second), *_ = processes
    assert first["given"] == second["given"]
    np.testing.assert_allclose(first["given"], first["fit"]["losses"], rtol=2e-5)


def test_processes_decide_together(processes):
    (first, second), *_ = processes
    assert first["anywhere"] == second["anywhere"] == [True, False]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "argument 0: the processes have different values.*joined"),
        ("key", r"rng_key.*: the processes have different values"),
        ("collect", r"what collect= returns, \['mine'\] of shape \(3, 8\) has parts in other processes"),
        ("unequal", r"rows of shapes \[\(2,\), \(3,\)\]: give each of them equally many"),
        ("no rows", r"an array of a minibatch has shape \(3,\), and not the 2 rows"),
        ("fit by a set", "different programs.*the same PYTHONHASHSEED"),
        ("fit key", r"rng_key.*: the processes have different values"),
        ("particles on the host", r"ParticleMMLE keeps the particles of all rows on the host of one process.*take run\(..., mesh"),
        ("parts", r"rows of shapes \[\(4,\), \(5,\)\]: give each of them equally many"),
        ("settings", "different programs.*the same PYTHONHASHSEED"),  # which differs here too, and may be why
        ("sets", "different programs.*the same PYTHONHASHSEED, as in PYTHONHASHSEED=0 python program.py"),
    ],
)
def test_what_differs_between_processes_is_refused_in_each(processes, what, message):
    """Catches two that wait for each other for ever, and a parameter that is not the same in both."""
    for said in processes[0]:
        assert re.search(message, said[what]), said[what]


def test_a_source_that_raises_in_one_process_ends_the_fit_in_all(processes):
    first, second = (said["broken"] for said in processes[0])
    assert second == "the disk is gone"
    assert "the source of another process has raised" in first


def test_a_process_that_is_killed_ends_the_other(processes):
    """Within the heartbeat's 10 seconds and some. Catches one that waits for ever, and an error that does not say why."""
    facts, code, seconds, log = processes
    assert all("step" in said for said in facts), log
    assert code != 0
    assert seconds < 60
    assert "Another of the processes has ended or cannot be reached" in log or "another task died" in log


# Settings, which need no more than one device.


MESH = jax.make_mesh((1, 1), ("data", "other"), devices=jax.devices()[:1])


def test_a_mesh_alone_has_rows_and_chains_on_its_axis():
    alone = as_sharding(jax.make_mesh((1,), ("hosts",), devices=jax.devices()[:1]))
    assert (alone.rows, alone.chains, alone.particles, alone.params) == (("hosts",), ("hosts",), None, None)
    assert as_sharding(MESH).rows == ("data",)
    assert as_sharding(alone) is alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": "row"}, r"rows='row': the mesh has no axis 'row', only 'data', 'other'"),
        ({"chains": ("data", "chain")}, r"chains=\('data', 'chain'\): the mesh has no axis 'chain'"),
        ({"particles": "data"}, r"rows and particles both go along axis 'data'.*particles=None"),
        ({"params": {"w": P("model")}}, r"params\['w'\]='model': the mesh has no axis 'model'"),
        ({"params": {"w": "data"}}, r"params\['w'\] must be a PartitionSpec, got 'data'"),
        ({"params": P("data")}, r"params must map names of param sites to PartitionSpecs, got P"),
    ],
)
def test_axes_that_are_not_there_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Sharding(MESH, **settings)


def test_what_is_no_mesh_is_refused():
    with pytest.raises(TypeError, match=r"mesh must be a mesh of devices such as jax.make_mesh\(.*got 4"):
        as_sharding(4)
