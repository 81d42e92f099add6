# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A fit by several hosts
======================

One program, started once on every host, that fits one model to the data of all of them. Every host holds rows of its own, and the
particles that belong to them; the parameters are everywhere the same. The model is

.. math::

    x_n \sim N(\mu, \tau^2), \qquad y_n \mid x_n \sim N(x_n, 1),

whose maximum marginal likelihood is known: :math:`\mu` is the mean of the data, and :math:`\tau^2 + 1` their variance.

On a cluster under Slurm, Open MPI or with TPUs, JAX finds the hosts by itself::

    PYTHONHASHSEED=0 srun python several_hosts.py

Elsewhere, say who they are: one of the processes, number 0, is where the others find each other::

    PYTHONHASHSEED=0 python several_hosts.py --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0    # on 10.0.0.1
    PYTHONHASHSEED=0 python several_hosts.py --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 1    # on the other

With ``--local 2`` it starts both on this machine. A host that dies ends the others with a message, within ``--heartbeat`` seconds.

What to expect: with ``--local 2`` half a minute on two cores. The first process prints what was learned beside what is exact.
"""

# sphinx_gallery_thumbnail_path = "_static/several_hosts.png"

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array
from numpyro.distributions import constraints

from numpyro_ebm import ParticleMMLE, Sharding


def model(y: Array) -> None:
    mu = numpyro.param("mu", 0.0)
    tau = numpyro.param("tau", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):  # all rows: a program sees one array, wherever its parts lie
        x = numpyro.sample("x", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def own_rows(process: int, num_rows: int) -> np.ndarray:
    """The rows of this host, such as a memory map of a file that only it has: equally many on each."""
    return np.random.default_rng(process).normal(1.5, np.sqrt(1 + 1), num_rows).astype(np.float32)


def fit(num_rows: int, num_steps: int, output: Path) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))  # over the devices of all hosts
    sharding = Sharding(mesh)
    y = sharding.joined(own_rows(jax.process_index(), num_rows))  # of all hosts; nothing is sent

    engine = ParticleMMLE(model, optax.adam(0.02), num_particles=10, kernel="mala", average_iterates=True)
    is_first = jax.process_index() == 0
    result = engine.run(jax.random.key(0), num_steps, y, mesh=sharding, progress_bar=is_first, report=False)

    exact = {"mu": float(jnp.mean(y)), "tau": float(jnp.sqrt(jnp.maximum(jnp.var(y) - 1, 0)))}  # every process must ask
    if is_first:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices, {len(y)} rows")
        for name, value in exact.items():
            print(f"{name}: learned {result.params[name]:.3f}, exact {value:.3f}")
        output.mkdir(parents=True, exist_ok=True)
        np.savez(output / "several_hosts.npz", **{name: np.asarray(x) for name, x in result.params.items()})


def start_here(num_processes: int, arguments: list[str]) -> int:
    """All processes on this machine; where one dies, JAX ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *arguments, "--coordinator", address, "--num-processes", str(num_processes)]
    # Where the order of sets differs between processes, so may their programs.
    environment = {**os.environ, "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0")}
    started = [subprocess.Popen([*command, "--process-id", str(i)], env=environment) for i in range(num_processes)]
    return max(abs(process.wait()) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("===")[0].strip())
    parser.add_argument("--coordinator", help="address and port of process 0; found by itself on a cluster")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--local", type=int, default=0, help="start so many processes on this machine")
    parser.add_argument("--heartbeat", type=int, default=30, help="seconds without a sign of life after which a process is dead")
    parser.add_argument("--num-rows", type=int, default=20_000, help="rows of each host")
    parser.add_argument("--num-steps", type=int, default=2_000)
    parser.add_argument("--output", type=Path, default=Path("several_hosts"))
    parser.add_argument("--smoke", action="store_true", help="two processes here, few rows and steps")
    args = parser.parse_args()
    if args.local or args.smoke:
        sizes = (200, 20) if args.smoke else (args.num_rows, args.num_steps)
        arguments = ["--num-rows", str(sizes[0]), "--num-steps", str(sizes[1]), "--output", str(args.output)]
        sys.exit(start_here(args.local or 2, [*arguments, "--heartbeat", str(args.heartbeat)]))
    # Before anything else of JAX. On CPUs the processes talk by Gloo, which is JAX's default.
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id, heartbeat_timeout_seconds=args.heartbeat)
    fit(args.num_rows, args.num_steps, args.output)


if __name__ == "__main__":
    main()
