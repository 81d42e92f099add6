# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""One loop for every engine, and NumPyro's ``SVI``, on data that come in minibatches."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer import SVI

from numpyro_ebm._checks import require_bool, require_count, require_key
from numpyro_ebm.evaluate.report import FitReport, are_reports_enabled, report_of
from numpyro_ebm.program.minibatch import Minibatch
from numpyro_ebm.program.run import own_key
from numpyro_ebm.program.streamed import require_rows_taken
from numpyro_ebm.train.batches import Batches, stream_of
from numpyro_ebm.train.devices import as_sharding, is_shared, said_anywhere
from numpyro_ebm.train.fingerprint import fingerprint_of
from numpyro_ebm.train.judge import Judge
from numpyro_ebm.train.loop import Between, at_multiples, calling, copied, drive, saved
from numpyro_ebm.train.row_store import RowStore
from numpyro_ebm.train.source import Data, RowSource, own_places, parts_of, with_parts
from numpyro_ebm.train.stacks import Stacks
from numpyro_ebm.train.steps import Steps
from numpyro_ebm.train.svi import SVIProgress, plain, steps_of

State = Any


class FitResult(NamedTuple):
    """What :func:`fit` returns. The first three fields are those of NumPyro's ``SVIRunResult``."""

    #: values of the param sites, constrained
    params: dict[str, Any]
    #: the state after the last step, or the best one with ``patience``
    state: Any
    #: (num_steps,) the loss at every step, nan where ``stable_update`` skipped one
    losses: Array
    #: by name what ``validation`` gave, and under ``"step"`` after which steps: arrays of equal lengths
    metrics: dict[str, np.ndarray]
    #: what the fit says of itself; None where reports are off, and of SVI
    report: FitReport | None
    #: why it ended: ``"num_steps"``, ``"batches"``, ``"patience"``, ``"callback"``, ``"SIGINT"`` (Ctrl-C) or ``"SIGTERM"``
    ended: str


def fit(
    engine: Any,
    rng_key: Array,
    batches: Any,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    validation: Any = None,
    patience: int | None = None,
    init_state: Any = None,
    init_params: dict[str, Any] | None = None,
    callbacks: Sequence[Callable[..., Any]] = (),
    chunk_size: int | None = None,
    checkpoint: Any = None,
    row_folder: str | Path | None = None,
    mesh: Any = None,
    stable_update: bool = False,
    progress_bar: bool = True,
    report: bool | None = None,
) -> FitResult:
    """Learns from minibatches: of arrays larger than memory, or of what another library loads.

    The model is the one for data in memory: it says ``numpyro.plate("data", N, subsample_size=B)`` and takes its rows by
    :func:`numpyro.subsample`. It is called with ``B`` rows, and the plate is told which of the ``N`` they are.

    Minibatches are read and brought to the device in the background. Ctrl-C and SIGTERM end a fit after the steps that run: it
    is saved, and what there is is returned.

    :class:`~numpyro_ebm.ParticleMMLE` keeps the particles of all rows on the host, or in ``row_folder``; the device holds those of
    the rows at work. A row gets its particles when it is first seen, at the parameters to start from.

    :param engine: an engine, or :class:`numpyro.infer.SVI`.
    :param rng_key: a key of :func:`jax.random.key`; not used with ``init_state``.
    :param batches: :class:`Batches`, or an iterable of minibatches: each a :class:`Minibatch` or ``(index, args, kwargs)``, or just
        an array, a tuple of arrays or a dictionary of them, where it does not matter which rows they are. One that can be iterated
        again, as PyTorch's ``DataLoader``, gives epoch after epoch. A generator ends the fit where it ends.
    :param args: arguments of the model after those of the batch, the same in every step.
    :param kwargs: arguments by name, the same in every step.
    :param int num_steps: steps in all, those before a checkpoint included.
    :param int num_epochs: passes through the data, instead.
    :param validation: a function of the state, which returns a number, low if good, or a dictionary of them of which the first
        counts; or rows that are not learned from, as :class:`Batches`: the mean of the engine's loss on them. Looked at after every
        ``chunk_size`` steps.
    :param int patience: so many looks without a better number end the fit, and the best state is returned.
    :param init_state: a state to continue from; it is not changed.
    :param dict init_params: values of :func:`numpyro.param` sites to start from.
    :param callbacks: functions ``callback(step, state, losses, metrics)`` called after every ``chunk_size`` steps. One that returns
        True ends the fit.
    :param int chunk_size: steps between looks and callbacks; an epoch if not given, or a twentieth of the fit if that is less.
    :param checkpoint: a folder, or :class:`Checkpoints`, where the fit is saved as it goes, and goes on from what it finds there.
    :param row_folder: where :class:`~numpyro_ebm.ParticleMMLE` keeps its particles in files, instead of in memory.
    :param mesh: devices to run on: a :class:`jax.sharding.Mesh` or a :class:`Sharding`. With several processes each reads its part
        of every minibatch.
    :param bool stable_update: whether to skip and count steps that would make anything non-finite, instead of stopping.
    :param bool progress_bar: whether to show one.
    :param bool report: whether ``result.report`` is made, as by an engine's ``run``.
    :raises ValueError: for settings that do not go together; for a model that does not take its rows as said above; for batches of
        different shapes.
    :raises TypeError: for what is no engine or no source.
    :raises NonFiniteError: with the last good state, if a step would make anything non-finite.

    .. doctest::

        >>> import jax, numpy as np, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import Batches, ParticleMMLE, fit
        >>> y = 3 + np.sqrt(2) * np.random.default_rng(0).standard_normal(1000).astype(
        ...     np.float32
        ... )
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", 1000, subsample_size=100):
        ...         y = numpyro.subsample(y, event_dim=0)
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> engine = ParticleMMLE(model, optax.sgd(0.0003), num_particles=20, step_size=0.1)
        >>> result = fit(
        ...     engine,
        ...     jax.random.key(1),
        ...     Batches(y, batch_size=100),
        ...     num_epochs=100,
        ...     progress_bar=False,
        ... )
        >>> print(f"learned {result.params['loc']:.1f}, exact {y.mean():.1f}")
        learned 2.9, exact 2.9
        >>> result.state.particles["x"].shape
        (20, 1000)
    """
    num_steps = None if num_steps is None else require_count("num_steps", num_steps)
    num_epochs = None if num_epochs is None else require_count("num_epochs", num_epochs)
    patience = None if patience is None else require_count("patience", patience)
    chunk_size = None if chunk_size is None else require_count("chunk_size", chunk_size)
    stable_update, progress_bar = require_bool("stable_update", stable_update), require_bool("progress_bar", progress_bar)
    reports = are_reports_enabled() if report is None else require_bool("report", report)
    if num_steps is not None and num_epochs is not None:
        raise ValueError(f"num_steps={num_steps} and num_epochs={num_epochs} both say when to end: leave one out.")
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} with no validation= to watch: give rows or a function of the state.")
    sharding = None if mesh is None else as_sharding(mesh)
    part = (jax.process_index(), jax.process_count()) if sharding is not None and sharding.is_shared else (0, 1)
    learner, stream, always = _learner(engine), stream_of(batches, num_epochs, part), (tuple(args), dict(kwargs or {}))
    if isinstance(batches, Batches):
        if num_steps is None and num_epochs is None:
            raise ValueError("fit has no end: give num_steps or num_epochs.")
        num_steps = num_steps or (num_epochs or 0) * len(batches)
    rng_key, own = require_key("rng_key", rng_key), stream.peek()
    data = Data(learner, always, sharding)
    if data.shared is not None:
        _require_shareable(engine, learner)
    first, one = data.first(own)
    state, rows = _started(engine, learner, rng_key, one, stream.num_rows, init_state, init_params, row_folder)
    if sharding is not None:
        state = sharding.place_state(state, None if rows is None else len(first.index))
    source = RowSource(data, Stacks(stream, data.place, own), np.bool_(stable_update), rows, rng_key, first, state)
    if sharding is not None:
        shapes = jax.eval_shape(lambda: (state, source.call.dynamic))
        sharding.require_same_program(learner._steps.proposed, *shapes, static=source.call.static)
    judge = Judge(learner, validation, patience, data, has_rows=rows is not None)

    def describe(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
        tree, meta = source.describe(state), {**source.position(), **judge.meta()}
        if patience is not None:
            tree["best"] = judge.best if judge.best is not None else parts_of(state, rows)
        return tree, meta

    def fingerprint() -> dict[str, str]:
        return fingerprint_of(engine, arguments=always, batches=repr(batches) if isinstance(batches, Batches) else "an iterable")

    with saved(checkpoint, fingerprint, learner._steps, state, source.call, describe) as run:
        if run.found is not None:
            state = source.restore(*run.found, state)
            judge.restore(*run.found)
        every = chunk_size or (_every(batches, num_steps) if callbacks or validation is not None else None)
        looks = [calling(callbacks, run.log, judge.metrics)] if callbacks else []
        looks = [lambda state: judge.look(run.log.done, state), *looks] if validation is not None else looks
        with source.with_all_rows(), source.stacks, _signals() as asked:
            between = [at_multiples(look, run.log, every, num_steps) for look in looks]
            state, ended = drive(
                learner,
                copied(state),  # the loop overwrites what it is given
                source,
                num_steps,
                run.log,
                between=(*between, run.save_if_due, asked),
                every=every,
                limit=run.steps_left,
                progress_bar=progress_bar,
            )
        run.save(state)
        said = None
        if reports and hasattr(learner, "_findings"):
            said = report_of(lambda: learner._findings(own_key(state.rng_key), state, *source.seen()))
    if said is not None:
        said.warn(stacklevel=2, before=run.log.warned)
    if patience is not None and judge.best is not None:
        state = with_parts(state, judge.best)
    params = learner.get_params(state)
    state = source.whole(plain(state) if isinstance(state, SVIProgress) else state)
    metrics = {name: np.asarray(values) for name, values in judge.metrics.items()}
    return FitResult(params, state, jnp.asarray(run.log.losses), metrics, said, ended)


def _learner(engine: Any) -> Any:
    """An engine, or SVI as one.

    :raises TypeError: for anything else.
    """
    if isinstance(engine, SVI):
        return steps_of(engine)
    if not isinstance(getattr(engine, "_steps", None), Steps):
        raise TypeError(f"engine must be an engine of numpyro_ebm or numpyro.infer.SVI, got a {type(engine).__name__}.")
    return engine


def _require_shareable(engine: Any, learner: Any) -> None:
    """Refuses an engine whose rows several processes cannot keep.

    :raises ValueError: with what to do instead.
    """
    if getattr(learner, "kept_by_step", ()):
        raise ValueError(
            f"{type(engine).__name__} keeps the particles of all rows on the host of one process, and this mesh is of "
            f"{jax.process_count()}: take run(..., mesh=...), which spreads particles over the devices of all, with the rows of "
            "each process joined by Sharding(...).joined."
        )


def _started(
    engine: Any,
    learner: Any,
    rng_key: Array,
    one: Minibatch,
    num_rows: int | None,
    init_state: Any,
    init_params: dict[str, Any] | None,
    row_folder: str | Path | None,
) -> tuple[State, RowStore | None]:
    """The state to start from, and the store of what is kept for every row, where the engine keeps something."""
    has_rows = bool(getattr(learner, "kept_by_step", ()))
    if not has_rows and row_folder is not None:
        raise ValueError(f"row_folder is for particles, and {type(engine).__name__} keeps nothing for each row: leave it out.")
    if has_rows:
        learner._of_minibatch(one, {})  # which says that it needs indices
    if has_rows or isinstance(engine, SVI):
        program = require_rows_taken("the model", engine.model, one, rng_key, num_rows=num_rows)
        if has_rows and not program.subsampled:
            raise ValueError(
                f"{type(engine).__name__} on minibatches needs a model with one subsampled plate, whose rows the minibatches are: "
                f"numpyro.plate('data', N, subsample_size={len(one.index)})."
            )
    if not has_rows:
        if init_state is not None:
            return learner._require_state(init_state, "init_state"), None
        return learner.init(rng_key, one, init_params=init_params), None
    (plate,) = program.subsampled.values()
    own = own_places(one)
    started = learner.init(rng_key, own, init_params=init_params)
    folder = None if row_folder is None else Path(row_folder)
    rows = RowStore(started, learner._rows_of(started, own), plate.size, folder)
    if init_state is None:
        rows.begin(np.asarray(one.index), started)
        return started, rows
    given = learner._require_state(init_state, "init_state")
    rows.load(given)
    return with_parts(started, parts_of(given, rows)), rows


def _every(batches: Any, num_steps: int | None) -> int:
    """Steps between two looks."""
    epoch = len(batches) if isinstance(batches, Batches) else 100
    return epoch if num_steps is None else max(1, min(epoch, num_steps // 20))


@contextmanager
def _signals() -> Iterator[Between]:
    """Whether Ctrl-C or SIGTERM has asked for the end, the second of which ends at once; in the main thread, which gets them."""
    got: list[str] = []

    def take(number: int, _: Any) -> None:
        if got:
            raise KeyboardInterrupt
        got.append(signal.Signals(number).name)

    def asked(state: State) -> str | None:
        return (got or ["SIGTERM"])[0] if (said_anywhere(bool(got)) if is_shared(state) else got) else None

    if threading.current_thread() is not threading.main_thread():
        yield lambda state: None
        return
    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
