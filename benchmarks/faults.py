# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What becomes of a fit that something happens to: how often nothing is lost and everything is said.

The model has one latent number for each of 600 rows and is learned by ``ParticleMMLE`` on minibatches. The losses, parameters,
particles, optimizer and key after the last step must be, bit for bit, those of a fit that nothing happened to:

* ``killed``: by ``kill -9`` at a random moment of a fit that is nearly always saving, then gone on with.
* ``torn``: a random file of the newest checkpoint is cut at a random place. There is a warning, and the one before is used, unless
  nothing is read from that file.
* ``full``: the disk has no room for a random number of steps. There is a warning, the fit goes on, and is saved when there is room.
* ``source``: it raises at a random step. The error is that of the source, and the fit goes on when the source is whole.

Or there must be an error that says what is wrong:

* ``folder``: it cannot be written to.
* ``nan``: in a random row, in the particle of a random row, in a parameter to start from, and in one by a learning rate that is too
  large. The error has the step, and the state before it, which is finite and that of the fit that nothing happened to.

Run ``make bench``, or ``python benchmarks/faults.py --help``. The table is what happened, how often it went right, and of how many.
"""

import argparse
import logging
import multiprocessing
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _models import hierarchical

from numpyro_ebm import Batches, Checkpoints, NonFiniteError, ParticleMMLE, fit, load

NUM_ROWS, BATCH_SIZE, NUM_STEPS, EVERY = 600, 20, 160, 4
Y = np.random.default_rng(0).normal(1.0, 1.5, NUM_ROWS).astype(np.float32)
BATCHES = Batches(Y, batch_size=BATCH_SIZE, seed=1)
NO_ROOM = 200  # bytes of a file


@cache
def engine_of(noise="batch", learning_rate=0.01):
    return ParticleMMLE(hierarchical(NUM_ROWS, BATCH_SIZE), optax.adam(learning_rate), num_particles=3, step_size=0.1, noise=noise)


def fitted(engine, batches=BATCHES, num_steps=NUM_STEPS, **settings):
    return fit(engine, jax.random.key(3), batches, num_steps=num_steps, progress_bar=False, report=False, **settings)


@cache
def undisturbed(engine, num_steps=NUM_STEPS):
    return fitted(engine, num_steps=num_steps)


def same(found, wanted):
    """Whether two pytrees are, bit for bit."""

    def equal(x, y):
        x, y = (jax.random.key_data(z) if jnp.issubdtype(jnp.asarray(z).dtype, jax.dtypes.prng_key) else z for z in (x, y))
        return np.array_equal(x, y)

    return all(jax.tree.leaves(jax.tree.map(equal, found, wanted)))


def is_whole(result, engine):
    """Whether a fit is the one that nothing happened to."""
    wanted = undisturbed(engine)
    return same((result.losses, result.params, result.state), (wanted.losses, wanted.params, wanted.state))


# In another process.


def saved_fit(folder, noise, in_files):
    """A fit that is nearly always saving; what ``kill -9`` ends."""
    warnings.simplefilter("ignore")  # of a checkpoint that another kill left unfinished
    return fitted(engine_of(noise), checkpoint=Checkpoints(folder / "saved", every_steps=EVERY), **rows(folder, in_files))


def rows(folder, in_files):
    return {"row_folder": folder / "rows"} if in_files else {}


def process(*args):
    """A process that makes a fit, when it has begun to save."""
    # one process imports all packages, before JAX starts its threads, and is copied
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpyro_ebm", "orbax.checkpoint"])
    made = context.Process(target=saved_fit, args=args)
    made.start()
    while made.is_alive() and not (args[0] / "saved").exists():
        time.sleep(0.01)
    return made


@cache
def seconds_of(noise, in_files):
    """How long a fit takes that is not killed, from its first look at the folder."""
    with tempfile.TemporaryDirectory() as folder:
        made, start = process(Path(folder), noise, in_files), time.perf_counter()
        made.join()
        return time.perf_counter() - start


def killed(folder, random, noise="batch", in_files=False, times=1):
    seconds = seconds_of(noise, in_files)
    for _ in range(times):
        made = process(folder, noise, in_files)
        time.sleep(random.uniform(0, seconds / times))
        made.kill()
        made.join()
        KILLED.append((made.exitcode == -signal.SIGKILL, len(list((folder / "saved").glob("step_*")))))
    return is_whole(saved_fit(folder, noise, in_files), engine_of(noise))


KILLED = []  # whether each one was, and what was in the folder then


# Of a folder of checkpoints.

UNTOLD = []  # of torn files, whether nothing was said: orbax writes some that it does not read


@cache
def half():
    folder = Path(tempfile.mkdtemp())
    fitted(engine_of(), num_steps=NUM_STEPS // 2, checkpoint=Checkpoints(folder / "saved", every_steps=30, keep_last=2))
    return folder / "saved"


def torn(folder, random):
    saved = shutil.copytree(half(), folder / "saved")
    before, newest = sorted(saved.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    file = files[random.integers(len(files))]
    with file.open("r+b") as opened:
        opened.truncate(random.integers(file.stat().st_size))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = fitted(engine_of(), checkpoint=saved)
    goes_on = f"from step {before.name.removeprefix('step_')}"
    UNTOLD.append(not any(newest.name in str(w.message) and goes_on in str(w.message) for w in told))
    return is_whole(result, engine_of())  # if it is not told, all numbers were read with their checksums right


def full(folder, random):
    begin = EVERY * random.integers(
        1, NUM_STEPS // EVERY - 4
    )  # at least two checkpoints: one alone may be written when there is room
    end = begin + EVERY * random.integers(2, NUM_STEPS // EVERY - 1 - begin // EVERY)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def disk(step, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (NO_ROOM if begin <= step < end else before[0], before[1]))

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            settings = {"checkpoint": Checkpoints(folder, every_steps=EVERY), "callbacks": [disk], "chunk_size": EVERY}
            result = fitted(engine_of(), **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = any("could not be written" in str(w.message) for w in told)
    return said and is_whole(result, engine_of()) and same(load(folder, engine_of(), Y), result.state)


def unwritable(folder, random):
    (folder / "file").write_text("no folder")
    try:
        fitted(engine_of(), checkpoint=folder / ("file", "file/below", "file/far/below")[random.integers(3)])
    except OSError as error:
        return "pass a folder that can be written to" in str(error)
    return False


def raising(folder, random):
    step = int(random.integers(1, NUM_STEPS))

    def source(end):
        for i in range(end):
            yield BATCHES.at(i)
        raise ConnectionError("the rows are elsewhere")

    try:
        fitted(engine_of(), source(step), checkpoint=folder)
    except ConnectionError as error:
        said = "the rows are elsewhere" in str(error) and error.state.num_steps == step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that batches are read and thrown away
        return said and is_whole(fitted(engine_of(), source(NUM_STEPS), checkpoint=folder), engine_of())


# Numbers that are not finite.


def is_told(error, step, engine):
    """Whether an error has its step, and the state before."""
    state = error.state
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.particles)))
    if error.step != step or state.num_steps != step - 1 or not finite:
        print(f"  step {error.step} for {step}, state of step {state.num_steps}, finite {finite}: {error}")
        return False
    return step == 1 or same(state.params, undisturbed(engine, step - 1).params)


def first_step(row):
    """The step that sees a row first, counted from 1."""
    return next(i for i in range(len(BATCHES)) if row in BATCHES.at(i).index) + 1


def nan_in_row(_folder, random):
    y, row = Y.copy(), random.integers(NUM_ROWS)
    y[row] = (np.nan, np.inf, -np.inf)[random.integers(3)]
    step = first_step(row)
    try:
        fitted(engine_of(), Batches(y, batch_size=BATCH_SIZE, seed=1))
    except NonFiniteError as error:
        return is_told(error, step, engine_of())
    except ValueError as error:  # before there is a state
        return step == 1 and "finite" in str(error)
    return False


def nan_in_particle(_folder, random):
    row, start = random.integers(NUM_ROWS), undisturbed(engine_of(), 30).state
    x = np.array(start.particles["x"])
    x[random.integers(3), row] = np.nan
    try:
        fitted(engine_of(), init_state=start._replace(particles={"x": x}))
    except NonFiniteError as error:
        return error.step == first_step(row) and "site 'x'" in str(error) and error.state.num_steps == 30 + error.step - 1
    return False


def nan_to_start_from(_folder, random):
    try:
        fitted(engine_of(), init_params={"loc": jnp.float32((np.nan, np.inf)[random.integers(2)])})
    except (NonFiniteError, ValueError) as error:
        return "loc" in str(error)
    return False


def overflowing(_folder, random):
    engine = engine_of(learning_rate=float(10 ** random.uniform(19.5, 38)))
    try:
        fitted(engine)
    except NonFiniteError as error:
        return is_told(error, error.step, engine)
    return False


CASES = {
    "killed by kill -9": killed,
    "killed, its particles in files": partial(killed, in_files=True),
    "killed, noise on all rows": partial(killed, noise="all"),
    "killed twice": partial(killed, times=2),
    "a file of the newest checkpoint is torn": torn,
    "the disk is full for a while": full,
    "a folder that cannot be written to": unwritable,
    "the source raises": raising,
    "nan or inf in a row": nan_in_row,
    "nan in the particle of a row": nan_in_particle,
    "nan or inf in a parameter to start from": nan_to_start_from,
    "a learning rate that is too large": overflowing,
}


def tried(case, random):
    """Whether it went right."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            return bool(case(Path(folder), random))
        except Exception:
            traceback.print_exc(limit=-3)
            return False


def main(args):
    logging.disable(logging.CRITICAL)  # orbax's pages about a full disk, of which there is a warning
    print(f"{'what happened':<42}{'right':>6}{'of':>6}", flush=True)
    for name, case in CASES.items():
        if not re.search(args.only, name):
            continue
        right = sum(tried(case, np.random.default_rng([args.seed, i])) for i in range(args.repeats))
        print(f"{name:<42}{right:>6}{args.repeats:>6}", flush=True)
    if UNTOLD:
        print(f"{sum(UNTOLD)} of {len(UNTOLD)} torn files were of those that nothing is read from")
    if KILLED:
        early = sum(not saved for _, saved in KILLED)
        print(f"{sum(was for was, _ in KILLED)} of {len(KILLED)} were killed before their end, {early} before a checkpoint")
    if half.cache_info().currsize:
        shutil.rmtree(half().parent)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="how often each thing happens")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--only", default="", help="what is to happen, as a regular expression")
    parser.add_argument("--smoke", action="store_true", help="once each, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.repeats = 1
    main(args)
