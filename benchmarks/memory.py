# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The memory of each engine: what a formula of its sizes says, beside what XLA says of the compiled step.

``holds`` is what a step is given: data, particles or chains, parameters and what Adam keeps of them. ``works`` is what it needs for
itself while it runs, over the formula for what the networks keep for their gradients. Last, the growth of a whole process (the
largest resident set) that fits more and more rows of a file, with the particles in files too.

Run ``make bench``, or ``python benchmarks/memory.py``.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _models import hierarchical
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from numpyro_ebm import (
    Batches,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ParticleMMLE,
    ScoreMatching,
    VaGES,
    fit,
    negative_phase,
)

R, H, D = 200, 300, 16  # numbers in a row, hidden units, numbers in a latent
KEY = jax.random.key(0)
# Adam has two moments of each parameter; a state holds it twice beside them, constrained and not, and that of SVI once.


def network(name, size_in, size_out):
    return eqx_module(name, eqx.nn.MLP(size_in, size_out, H, 1, jax.nn.silu, key=KEY))


def weights(size_in, size_out):
    return size_in * H + H + H * size_out + size_out


def decoded(y, num_rows, batch_size):
    decoder = network("decoder", D, R)
    with numpyro.plate("data", num_rows, subsample_size=batch_size):
        y = numpyro.subsample(y, event_dim=1)
        z = numpyro.sample("z", dist.Normal(0, 1).expand([D]).to_event(1))
        numpyro.sample("y", dist.Normal(jax.vmap(decoder)(z), 1).to_event(1), obs=y)


def guided(y, num_rows, batch_size):
    encoder = network("encoder", R, D)
    with numpyro.plate("data", num_rows, subsample_size=batch_size):
        y = numpyro.subsample(y, event_dim=1)
        numpyro.sample("z", dist.Normal(jax.vmap(encoder)(y), 0.5).to_event(1))


def energetic(y, num_rows, batch_size):
    net = network("energy", R, "scalar")

    def energy(y):
        return net(y) + 0.5 * (y**2).sum()

    with numpyro.plate("data", num_rows, subsample_size=batch_size):
        y = numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", EnergyDistribution(energy, (R,), initial=dist.Normal(0, 1).expand([R]).to_event(1)), obs=y)


def bound(program, num_rows, batch_size):
    return lambda y: program(y, num_rows, batch_size)


def cases(n, b, p, c):
    """By name an engine, and the numbers that it holds and works with, by the page's formulas."""
    model, guide, energy = (bound(program, n, b) for program in (decoded, guided, energetic))
    w, g, e = weights(D, R), weights(R, D), weights(R, 1)
    adam, objective = optax.adam(1e-3), DenoisingScoreMatching(0.3)
    program = negative_phase(energy, num_chains=c)
    chains = SVI(program, AutoDelta(program), adam, Trace_ELBO())
    return {
        "ParticleMMLE": (ParticleMMLE(model, adam, p, 1e-3), n * R + n * p * D + 4 * w, b * p * (H + R)),
        "SVI, negative chains": (chains, n * R + c * R + 3 * e, (b + c) * (H + R)),
        "ScoreMatching": (ScoreMatching(energy, adam, objective), n * R + 4 * e, b * (H + R)),
        "BiSM": (BiSM(model, guide, adam, adam, objective, num_inner_steps=1), n * R + 4 * (w + g), b * (H + R)),
        "VaGES": (VaGES(model, guide, adam, adam, objective), n * R + 4 * (w + g), b * 10 * (H + R)),
    }


def show_steps(sizes):
    print(f"{'engine':<22}{'N':>7}{'B':>5}{'P':>4}{'C':>6}{'holds, MB':>11}{'formula':>9}{'works, MB':>11}{'over formula':>13}")
    for n, b, p, c in sizes:
        y = jnp.zeros((n, R))
        for name, (engine, held, working) in cases(n, b, p, c).items():
            state = engine.init(KEY, y)
            if isinstance(engine, SVI):
                step = jax.jit(engine.update).lower(state, y)
            else:
                step = engine._steps.one.lower(state, np.False_, np.False_, *engine._split((y,), {}))
            said = step.compile().memory_analysis()
            holds, works = said.argument_size_in_bytes / 1e6, said.temp_size_in_bytes / 1e6
            ratio = works / (working * 4e-6)
            print(f"{name:<22}{n:>7}{b:>5}{p:>4}{c:>6}{holds:>11.2f}{held * 4e-6:>9.2f}{works:>11.2f}{ratio:>13.1f}", flush=True)


def peak(num_rows):
    """The largest resident set of this process, which fits that many rows of a file; what this makes of them is on disk."""
    with tempfile.TemporaryDirectory() as folder:
        y = np.lib.format.open_memmap(Path(folder) / "y.npy", "w+", np.float32, (num_rows,))
        del y
        y = np.load(Path(folder) / "y.npy", mmap_mode="r")
        engine = ParticleMMLE(hierarchical(num_rows, 500), optax.adam(1e-3), 10, 0.1)
        settings = {"num_steps": 500, "row_folder": Path(folder) / "rows", "progress_bar": False, "report": False}
        fit(engine, KEY, Batches(y, batch_size=500, shuffle="batches"), **settings)
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    anonymous = [int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("RssAnon")]
    return anonymous[0] if anonymous else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main(args):
    if args.peak:
        print(f"{peak(args.peak):.0f}")
        return
    show_steps(args.sizes)
    for num_rows in args.rows:
        done = subprocess.run([sys.executable, __file__, "--peak", str(num_rows)], check=True, capture_output=True, text=True)
        on_disk = num_rows * (1 + 10) * 4 / 1e6
        print(f"{num_rows:>9} rows, 10 particles each, {on_disk:.0f} MB of files: {done.stdout.strip()} MB of memory", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", type=int, help="the memory of a fit of so many rows, and no more")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    args.sizes = [(2000, 100, 5, 100), (8000, 100, 5, 100), (2000, 400, 5, 400), (2000, 100, 20, 100)]
    args.rows = [100_000, 1_000_000, 10_000_000]
    if args.smoke:
        args.sizes, args.rows = args.sizes[:1], args.rows[:1]
    main(args)
