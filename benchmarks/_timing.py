# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How the benchmarks time: what is compared runs in turn, A B A B, so that the ratio holds when the machine's speed drifts."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np


def use_one_core():
    """Pins the process to one core; before JAX's first computation, which starts its threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def timed(state, update, num_steps, clock=time.perf_counter):
    """A function that makes ``num_steps`` steps in one compiled loop and returns the seconds per step, by a clock."""
    run = jax.jit(lambda state: jax.lax.scan(lambda state, _: update(state), state, length=num_steps), donate_argnums=0)
    box = [run(jax.tree.map(jnp.copy, state))[0]]

    def seconds():
        start = clock()
        box[0] = jax.block_until_ready(run(box[0])[0])
        return (clock() - start) / num_steps

    seconds()
    return seconds


def timed_eagerly(step, num_steps, clock=time.perf_counter):
    """The same for a step that is not JAX's."""

    def seconds():
        start = clock()
        for _ in range(num_steps):
            step()
        return (clock() - start) / num_steps

    seconds()
    return seconds


def in_turn(*timers, repeats):
    """Seconds, of shape ``(repeats, len(timers))``."""
    return np.array([[timer() for timer in timers] for _ in range(repeats)])


def show_ratio(title, times, column=0, over=1):
    ratios = times[:, column] / times[:, over]
    medians = np.median(times, 0) * 1e3
    print(
        f"{title:<52}{np.median(ratios):7.3f} (from {ratios.min():.3f} to {ratios.max():.3f}); "
        f"{medians[column]:.2f} against {medians[over]:.2f} ms"
    )


def compiled(state, update):
    """Seconds to compile a step, and megabytes of its temporary buffers."""
    start = time.perf_counter()
    program = jax.jit(update).lower(state).compile()
    seconds, analysis = time.perf_counter() - start, program.memory_analysis()
    return seconds, float("nan") if analysis is None else analysis.temp_size_in_bytes / 1e6
