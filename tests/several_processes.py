# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""One of several processes that fit a model together. ``test_devices.py`` starts them and reads what they say, a line for a fact.

``python several_processes.py PROCESS NUM_PROCESSES PORT``
"""

import json
import sys
import time

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

ROWS = np.linspace(-1, 3.8, 8, dtype=np.float32)


def _say(**what):
    print(json.dumps(what), flush=True)


def _refused(what, run):
    try:
        run()
    except (ValueError, RuntimeError) as error:
        _say(**{what: str(error)})


def _by_a_set(y):
    """A sum in the order of a set, which is that of the hashes of its members."""
    loc = numpyro.param("loc", 0.0)
    for name in {"a", "b", "c", "d", "e", "f"}:
        loc = loc + numpyro.param(name, 1.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(loc, 1), obs=y)


def main(process, num_processes, port):
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes, process, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
    )
    from test_engine_contract import CASES, KEY, _normal

    from numpyro_ebm import DenoisingScoreMatching, ParticleMMLE, ScoreMatching, Sharding, enable_reports
    from numpyro_ebm.train.devices import said_anywhere

    enable_reports(False)
    sharding = Sharding(jax.make_mesh((num_processes,), ("data",)))
    y = sharding.joined(ROWS.reshape(num_processes, -1)[process])
    settings = {"progress_bar": False, "mesh": sharding}

    engine = CASES["ebipla"].make()
    fit = engine.run(KEY, 10, y, **settings)
    arrays = fit.state.particles["x"], fit.state.mutable_state["x/chains"]["x"]
    parts = [x.addressable_shards[0].data.shape for x in arrays]
    _say(fit={"losses": fit.losses.tolist(), "loc": float(fit.params["loc"]), "parts": parts})
    here = jax.device_get(engine.init(KEY, ROWS))  # every process by itself, as from a file
    _say(given=engine.run(KEY, 10, ROWS, init_state=here, **settings).losses.tolist())
    _say(anywhere=[said_anywhere(process == 1), said_anywhere(False)])

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
    main(*map(int, sys.argv[1:]))
