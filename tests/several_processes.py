# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""One of several processes that fit a model together. ``test_devices.py`` starts them and reads what they say, a line for a fact.

``python several_processes.py PROCESS NUM_PROCESSES PORT FOLDER``
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from numpyro_ebm import Batches, DenoisingScoreMatching, ParticleMMLE, ScoreMatching, fit

ROWS = np.linspace(-1, 3.8, 8, dtype=np.float32)
BATCHES = Batches(ROWS, batch_size=4, seed=1)


def _say(**what):
    print(json.dumps(what), flush=True)


def _refused(what, run):
    try:
        run()
    except (ValueError, RuntimeError, OSError) as error:
        _say(**{what: str(error)})


def _by_a_set(y):
    """A sum in the order of a set, which is that of the hashes of its members."""
    loc = numpyro.param("loc", 0.0)
    for name in {"a", "b", "c", "d", "e", "f"}:
        loc = loc + numpyro.param(name, 1.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(loc, 1), obs=y)


def _streamed(y):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(ROWS), subsample_size=4):
        y = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(loc, 1), obs=y)


def _with_latents(y):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(ROWS), subsample_size=4):
        y = numpyro.subsample(y, event_dim=0)
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def _svi():
    return SVI(_streamed, AutoDelta(_streamed), optax.sgd(0.002), Trace_ELBO())


def _score_engine():
    return ScoreMatching(_streamed, optax.sgd(0.02), DenoisingScoreMatching(0.3))


LEARNERS = {"score": _score_engine, "svi": _svi}


def _of_each(num_batches):
    """A source of each process's own, one of which is shorter than the other."""
    return ((None, (ROWS[:2] + i,), {}) for i in range(num_batches))


def _fits(process, sharding, folder, key):
    """What ``fit`` says, on minibatches whose rows the processes share."""
    settings = {"mesh": sharding, "progress_bar": False}
    for name, make in LEARNERS.items():
        learner = make()
        result = fit(learner, key, BATCHES, num_steps=12, **settings)
        for num_steps in (5, 12):
            cut = fit(learner, key, BATCHES, num_steps=num_steps, checkpoint=Path(folder) / name, **settings)
        params = {site: np.asarray(x).tolist() for site, x in result.params.items()}
        _say(**{f"streamed {name}": {"losses": result.losses.tolist(), "params": params, "cut": cut.losses.tolist()}})
    engine, by_a_set = _score_engine(), ScoreMatching(_by_a_set, optax.sgd(0.02), DenoisingScoreMatching(0.3))
    held_out = fit(engine, key, BATCHES, num_steps=6, chunk_size=3, validation=Batches(ROWS, batch_size=4), **settings)
    _say(validation=held_out.metrics["validation"].tolist())
    _say(ended=len(fit(engine, key, _of_each(5 + process), **settings).losses))
    stopped = fit(engine, key, BATCHES, num_steps=90, chunk_size=3, callbacks=[lambda *_: process == 1], **settings)
    _say(stopped=[stopped.ended, len(stopped.losses)])

    def broken():
        yield from _of_each(3)
        if process == 1:
            raise OSError("the disk is gone")
        yield from _of_each(3)

    _refused("broken", lambda: fit(engine, key, broken(), **settings))
    _refused("unequal", lambda: fit(engine, key, [ROWS[: 2 + process]], num_steps=3, **settings))
    _refused("no rows", lambda: fit(engine, key, [(ROWS[:2], np.zeros(3))], num_steps=3, **settings))
    _refused("fit by a set", lambda: fit(by_a_set, key, [ROWS[:2]], num_steps=3, **settings))
    _refused("fit key", lambda: fit(engine, jax.random.key(process), BATCHES, num_steps=3, **settings))
    on_rows = ParticleMMLE(_with_latents, optax.sgd(0.02), num_particles=3, step_size=0.05)
    _refused("particles on the host", lambda: fit(on_rows, key, BATCHES, num_steps=3, **settings))


def main(process, num_processes, port, folder):
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes, process, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
    )
    from test_engine_contract import CASES, KEY, _normal

    from numpyro_ebm import Sharding, enable_reports
    from numpyro_ebm.train.devices import said_anywhere

    enable_reports(False)
    sharding = Sharding(jax.make_mesh((num_processes,), ("data",)))
    y = sharding.joined(ROWS.reshape(num_processes, -1)[process])
    settings = {"progress_bar": False, "mesh": sharding}

    engine = CASES["ebipla"].make()
    result = engine.run(KEY, 10, y, **settings)
    arrays = result.state.particles["x"], result.state.mutable_state["x/chains"]["x"]
    parts = [x.addressable_shards[0].data.shape for x in arrays]
    _say(fit={"losses": result.losses.tolist(), "loc": float(result.params["loc"]), "parts": parts})
    here = jax.device_get(engine.init(KEY, ROWS))  # every process by itself, as from a file
    _say(given=engine.run(KEY, 10, ROWS, init_state=here, **settings).losses.tolist())
    _say(anywhere=[said_anywhere(process == 1), said_anywhere(False)])

    _fits(process, sharding, folder, KEY)
    saved = Path(folder) / "run"
    for num_steps in (4, 10):
        gone_on = engine.run(KEY, num_steps, y, checkpoint=saved, **settings)
    _say(saved_run=gone_on.losses.tolist())
    _refused("collect", lambda: engine.run(KEY, 3, y, collect=lambda state: {"mine": state.particles["x"]}, **settings))
    _say(collected=engine.run(KEY, 3, y, collect=lambda state: state.particles["x"].mean(), **settings).collected.tolist())

    _refused("rows", lambda: engine.run(KEY, 10, ROWS + process, **settings))
    _refused("key", lambda: engine.run(jax.random.key(process), 10, y, **settings))
    _refused("parts", lambda: sharding.joined(ROWS[: 4 + process]))
    other = ParticleMMLE(_normal, optax.sgd(0.02), num_particles=3, step_size=0.05 + process / 100)
    _refused("settings", lambda: other.run(KEY, 10, y, **settings))
    by_a_set = ScoreMatching(_by_a_set, optax.sgd(0.02), DenoisingScoreMatching(0.3))
    _refused("sets", lambda: by_a_set.run(KEY, 10, y, **settings))

    def running(step, state, losses):
        _say(step=step)
        time.sleep(0.1)

    engine.run(KEY, 10**7, y, chunk_size=100, callbacks=[running], **settings)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
