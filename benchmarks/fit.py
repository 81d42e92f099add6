# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What minibatches from outside and checkpoints cost: ``fit`` over ``run``, and steps per second against rows and particles.

* ``fit over run``: seconds of a step of ``fit`` on minibatches of arrays, over one of ``run`` on the same arrays in memory, where
  the model itself takes a minibatch. CPU seconds are of the whole process: a second core hides those of the thread that reads, and
  here they count.
* ``checkpoint``: seconds that saving a state costs the fit, and what that is of a minute.
* ``prefetch``: a source that takes 5 ms for a minibatch, over the same source that takes none, where a step takes longer.
* ``scaling`` (``--scaling``): steps per second of ``ParticleMMLE`` on 1, 2 and 4 devices that share the cores; against the rows of
  a file, of which every step reads 100, with the particles in files too; and against the particles of 10 rows in memory. With the
  slopes of the log seconds, and a figure.

What is compared is timed in turn, A B A B, so that the ratio holds when the machine's speed drifts. Run ``make bench``, or
``python benchmarks/fit.py --help``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _models import hierarchical
from _timing import in_turn, show_ratio
from numpyro.contrib.module import eqx_module

from numpyro_ebm import Batches, Checkpoints, DenoisingScoreMatching, EnergyDistribution, ParticleMMLE, ScoreMatching, fit

ROWS, BATCH_SIZE, PIXELS = 5000, 500, 784
KEY = jax.random.key(1)


def energy_model(images, width):
    energy = eqx_module("energy", eqx.nn.MLP(PIXELS, "scalar", width, 2, jax.nn.silu, key=jax.random.key(0)))
    with numpyro.plate("data", ROWS, subsample_size=BATCH_SIZE):
        images = numpyro.subsample(images, event_dim=1)
        numpyro.sample("v", EnergyDistribution(energy, (PIXELS,)), obs=images)


def decoder_model(images, width=64):
    decoder = eqx_module("decoder", eqx.nn.MLP(10, PIXELS, width, 1, jax.nn.silu, key=jax.random.key(0)))
    with numpyro.plate("data", ROWS, subsample_size=BATCH_SIZE):
        images = numpyro.subsample(images, event_dim=1)
        z = numpyro.sample("z", dist.Normal(0, 1).expand([10]).to_event(1))
        numpyro.sample("v", dist.Normal(jax.vmap(decoder)(z), 1).to_event(1), obs=images)


def learners(width):
    """By name, something that learns a network with so many hidden units in a layer."""
    return {
        "score matching": ScoreMatching(partial(energy_model, width=width), optax.adam(1e-3), DenoisingScoreMatching(0.3)),
        "particles": ParticleMMLE(partial(decoder_model, width=width), optax.adam(1e-3), 2, 1e-3),
    }


def fitted(learner, batches, num_steps, **settings):
    return fit(learner, KEY, batches, num_steps=num_steps, progress_bar=False, report=False, **settings)


def ran(learner, images, num_steps, **settings):
    return learner.run(KEY, num_steps, images, progress_bar=False, report=False, **settings)


def step_timer(make, num_steps, clock):
    """The seconds of a step, without what happens once: those of a long run less those of a short one."""

    def seconds(n):
        start = clock()
        make(n)
        return clock() - start

    make(2)
    return lambda: (seconds(num_steps + 2) - seconds(2)) / num_steps


def show_overhead(images, args):
    for name, learner in learners(args.width).items():
        batches, here = Batches(images, batch_size=BATCH_SIZE), jnp.asarray(images)
        for title, clock in (("wall", time.perf_counter), ("CPU", time.process_time)):
            timers = [
                step_timer(partial(make, learner, data), args.num_steps, clock) for make, data in ((fitted, batches), (ran, here))
            ]
            show_ratio(f"fit over run, {name}, {title} seconds", in_turn(*timers, repeats=args.repeats))


def show_checkpoint(images, args):
    """Saving after every step, less not saving: what the fit waits for, and what the disk does meanwhile."""
    num_saves, batches = 10, Batches(images, batch_size=BATCH_SIZE)
    for name, learner in learners(args.width).items():

        def seconds(*, saves, learner=learner):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                fitted(learner, batches, num_saves, checkpoint=Checkpoints(folder, every_steps=1) if saves else None)
                return (time.perf_counter() - start) / num_saves

        times = in_turn(partial(seconds, saves=True), partial(seconds, saves=False), repeats=args.repeats + 1)[1:]
        each = np.median(times[:, 0] - times[:, 1])
        print(f"checkpoint, {name}: {each * 1e3:.0f} ms each, {each / 60:.3%} of a minute")


class Slow:
    """Minibatches, each of which takes its time."""

    def __init__(self, batches, seconds):
        self.batches, self.seconds = batches, seconds

    def __iter__(self):
        for batch in self.batches:
            time.sleep(self.seconds)
            yield batch


def show_prefetch(images, args):
    learner, batches = ParticleMMLE(decoder_model, optax.adam(1e-3), 16, 1e-3), Batches(images, batch_size=BATCH_SIZE)
    timers = [
        step_timer(lambda n, seconds=seconds: fitted(learner, Slow(batches, seconds), n), args.num_steps, time.perf_counter)
        for seconds in (args.sleep, 0.0)
    ]
    show_ratio(f"prefetch: minibatches of {args.sleep * 1e3:.0f} ms over 0 ms", in_turn(*timers, repeats=args.repeats))


# Scaling.


def engine_for(num_rows, num_particles, batch_size=None):
    return ParticleMMLE(hierarchical(num_rows, batch_size), optax.adam(1e-3), num_particles, 0.1)


def between_callbacks(make, num_steps):
    """The seconds of a step, from the first call back to the second."""

    def seconds():
        stamps = []
        make(2 * num_steps, callbacks=[lambda *_: stamps.append(time.perf_counter())], chunk_size=num_steps)
        return (stamps[1] - stamps[0]) / num_steps

    return seconds


def rows_timer(num_rows, num_steps, folder, *, are_new):
    """A step on 100 rows of a file, whose 10 particles each are in files; of rows that have none yet, if ``are_new``."""
    np.save(folder / f"{num_rows}.npy", np.random.default_rng(0).standard_normal(num_rows, np.float32))
    y, engine = np.load(folder / f"{num_rows}.npy", mmap_mode="r"), engine_for(num_rows, 10, 100)
    batches, settings = Batches(y, batch_size=100), {"row_folder": folder / f"{num_rows} particles"}
    if not are_new:
        start = engine.init(KEY, batches.at(0)._replace(places=np.arange(100)))
        settings["init_state"] = start._replace(particles={"x": np.zeros((10, num_rows), np.float32)})
    return between_callbacks(partial(fitted, engine, batches, **settings), num_steps)


def particles_timer(num_particles, num_steps):
    """A step of that many particles for each of 10 rows, in memory."""
    engine, y = engine_for(10, num_particles), jnp.arange(10.0)
    return between_callbacks(partial(ran, engine, y), num_steps)


def slope(sizes, seconds):
    return np.polyfit(np.log(sizes), np.log(seconds), 1)[0]


def show_scaling(args):
    with tempfile.TemporaryDirectory() as folder:

        def rows(*, are_new):
            # rows that are new are so in the first epoch alone
            sizes = [n for n in args.rows if not are_new or n >= 200 * args.scaling_steps]
            timers = [rows_timer(n, args.scaling_steps, Path(folder), are_new=are_new) for n in sizes]
            return sizes, np.median(in_turn(*timers, repeats=args.repeats), 0) if sizes else np.empty(0)

        curves = [("rows of a file", *rows(are_new=False)), ("rows of a file, each for the first time", *rows(are_new=True))]
    timers = [particles_timer(n, max(3, args.scaling_steps * 10**4 // max(n, 10**4))) for n in args.particles]
    curves.append(("particles of each of 10 rows", args.particles, np.median(in_turn(*timers, repeats=args.repeats), 0)))
    curves = [curve for curve in curves if len(curve[1]) > 1]
    for title, sizes, seconds in curves:
        for size, each in zip(sizes, seconds, strict=True):
            print(f"scaling, {title}: {size:>8} {1 / each:10.1f} steps per second")
        last = slope(sizes[-2:], seconds[-2:])
        print(f"scaling, {title}: slope of log seconds {slope(sizes, seconds):.2f}, of the last two {last:.2f}")
    if args.figure is not None:
        draw(curves, args.figure)


def draw(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (title, sizes, seconds), marker in zip(curves, "os^", strict=False):
        last = f"slope {-slope(sizes[-2:], seconds[-2:]):.2f} at the end"
        axes.loglog(sizes, 1 / seconds, marker + "-", label=f"{title}: {last}")
    axes.set_xlabel("rows, or particles", fontsize=12)
    axes.set_ylabel("steps per second", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=10, loc="lower left")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 30)  # room for the legend
    figure.savefig(path, dpi=150, transparent=True)


def show_devices(args):
    """Of a run in memory, all rows in every step, each number of devices in a process of its own."""
    for num_devices in (1, 2, 4):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
        command = [sys.executable, __file__, "--num-steps", str(args.num_steps), "--repeats", str(args.repeats), "--on-all-devices"]
        subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)


def show_on_all_devices(images, args):
    y, mesh = jnp.asarray(images[:, :100].mean(1)), jax.make_mesh((jax.device_count(),), ("data",))
    engine = engine_for(len(y), 200)
    seconds = in_turn(between_callbacks(partial(ran, engine, y, mesh=mesh), args.num_steps), repeats=args.repeats)
    print(
        f"devices, {len(y)} rows x 200 particles: {jax.device_count()} {1 / np.median(seconds):10.1f} steps per second", flush=True
    )


def main(args):
    images = np.random.default_rng(0).standard_normal((ROWS, PIXELS), np.float32)
    if args.on_all_devices:
        show_on_all_devices(images, args)
        return
    print(f"device {jax.devices()[0].device_kind}; medians of {args.repeats} rounds of {args.num_steps} steps", flush=True)
    if args.scaling:
        show_devices(args)
        show_scaling(args)
        return
    show_overhead(images, args)
    show_checkpoint(images, args)
    show_prefetch(images, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=100, help="steps in one timed run")
    parser.add_argument("--width", type=int, default=64, help="hidden units in a layer of the networks")
    parser.add_argument("--repeats", type=int, default=11, help="rounds of timed runs")
    parser.add_argument("--sleep", type=float, default=0.005, help="seconds that a minibatch takes")
    parser.add_argument("--scaling", action="store_true", help="steps per second against devices, rows and particles, instead")
    parser.add_argument("--on-all-devices", action="store_true", help="steps per second on the devices that there are, and no more")
    parser.add_argument("--figure", type=Path, help="where to draw them")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.scaling_steps, args.rows, args.particles = 500, [10**n for n in range(3, 8)], [10**n for n in range(2, 7)]
    if args.smoke:
        args.num_steps, args.repeats, args.scaling_steps, args.rows, args.particles = 3, 1, 8, (10**3, 10**4), (10**2, 10**3)
        show_scaling(args)
    main(args)
