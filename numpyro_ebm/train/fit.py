# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""One loop for every engine, and NumPyro's ``SVI``, on data that come in minibatches."""

import math
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
from numpyro_ebm._pytree import arrays_and_rest, join
from numpyro_ebm.evaluate.report import FitReport, are_reports_enabled, report_of
from numpyro_ebm.program.minibatch import Minibatch
from numpyro_ebm.program.run import own_key
from numpyro_ebm.program.streamed import require_rows_taken
from numpyro_ebm.train.batches import Batches, stream_of
from numpyro_ebm.train.devices import Sharding, as_sharding, said_anywhere
from numpyro_ebm.train.fingerprint import fingerprint_of
from numpyro_ebm.train.health import NonFiniteError
from numpyro_ebm.train.loop import Between, at_multiples, calling, copied, drive, saved
from numpyro_ebm.train.row_store import RowStore
from numpyro_ebm.train.stacks import Stack, Stacks, is_array
from numpyro_ebm.train.steps import Call, Steps
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
        >>> y = 3 + np.sqrt(2) * np.random.default_rng(0).standard_normal(1000).astype(np.float32)
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", 1000, subsample_size=100):
        ...         y = numpyro.subsample(y, event_dim=0)
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> engine = ParticleMMLE(model, optax.sgd(0.0003), num_particles=20, step_size=0.1)
        >>> result = fit(engine, jax.random.key(1), Batches(y, batch_size=100), num_epochs=100, progress_bar=False)
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
        raise ValueError(f"patience={patience} with no validation=, of which to have some: give rows or a function of the state.")
    learner, stream, always = _learner(engine), stream_of(batches, num_epochs), (tuple(args), dict(kwargs or {}))
    if isinstance(batches, Batches):
        if num_steps is None and num_epochs is None:
            raise ValueError("fit has no end: give num_steps or num_epochs.")
        num_steps = num_steps or (num_epochs or 0) * len(batches)
    sharding = None if mesh is None else as_sharding(mesh)
    rng_key, first = require_key("rng_key", rng_key), stream.peek()
    data = _Data(learner, always, sharding)
    state, rows = _started(engine, learner, rng_key, data.of(first), stream.num_rows, init_state, init_params, row_folder)
    if sharding is not None:
        state = sharding.place_state(state, None if rows is None else len(first.index))
    source = _Source(data, Stacks(stream, data.place, first), np.bool_(stable_update), rows, rng_key, state)
    judge = _Judge(learner, validation, patience, data, has_rows=rows is not None)

    def describe(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
        tree, meta = source.describe(state), {**source.position(), **judge.meta()}
        if patience is not None:
            tree["best"] = judge.best if judge.best is not None else _parts(state, rows)
        return tree, meta

    def fingerprint() -> dict[str, str]:
        return fingerprint_of(engine, arguments=always, batches=repr(batches) if isinstance(batches, Batches) else "an iterable")

    with saved(checkpoint, fingerprint, learner._steps, state, source.call_of(first), describe) as run:
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
        said.warn(stacklevel=2)
    if patience is not None and judge.best is not None:
        state = _with_parts(state, judge.best)
    params = learner.get_params(state)
    state = source.whole(plain(state) if isinstance(state, SVIProgress) else state)
    metrics = {name: np.asarray(values) for name, values in judge.metrics.items()}
    return FitResult(params, state, jnp.asarray(run.log.losses), metrics, said, ended)


class _Data:
    """How the programs are called with minibatches."""

    def __init__(self, learner: Any, always: tuple[tuple[Any, ...], dict[str, Any]], sharding: Sharding | None) -> None:
        self.learner, self.sharding = learner, sharding
        placed: tuple[tuple[Any, ...], dict[str, Any]] = always if sharding is None else sharding.replicate(always)
        self.args, self.kwargs = placed

    def of(self, batch: Minibatch) -> Minibatch:
        """A minibatch with the arguments that are the same in every step."""
        return batch._replace(args=(*batch.args, *self.args), kwargs={**self.kwargs, **batch.kwargs})

    def call(self, batch: Minibatch, stable: np.bool_, *, is_stack: bool) -> Call:
        """What steps see of minibatches, which are stacked if ``is_stack``."""
        full = self.of(batch)
        dynamic, static = self.learner._split(*self.learner._of_minibatch(full, {}))
        if not is_stack:
            return Call(dynamic, static, stable)
        of_steps, of_all = (jax.tree.map(lambda _, flag=flag: flag, tree) for flag, tree in ((True, batch), (False, full)))
        mask = of_all._replace(
            index=of_steps.index,
            places=of_steps.places,
            args=(*of_steps.args, *of_all.args[len(batch.args) :]),
            kwargs={**of_all.kwargs, **of_steps.kwargs},
        )
        flags = jax.tree.leaves(self.learner._of_minibatch(mask, {}))
        leaves = jax.tree.leaves(self.learner._of_minibatch(full, {}))
        stacked = tuple(flag for flag, leaf in zip(flags, leaves, strict=True) if is_array(leaf))
        return Call(dynamic, static, stable, None, stacked)

    def place(self, stacked: Any) -> Any:
        """Stacked arrays on the device, or on those of the mesh."""
        index, args, kwargs = stacked
        if self.sharding is None:
            return jax.tree.map(lambda x: jnp.asarray(x) if is_array(x) else x, stacked)
        num_rows = next(x.shape[1] for x in jax.tree.leaves((index, args, kwargs)) if is_array(x))
        is_part = jax.process_count() > 1
        (index, args), kwargs = self.sharding.place_data((index, args), kwargs, num_rows, has_steps=True, is_part=is_part)
        return index, args, kwargs


class _Source:
    """The minibatches of a fit, and what is kept of their rows: where the steps of the loop come from."""

    def __init__(self, data: _Data, stacks: Stacks, stable: np.bool_, rows: RowStore | None, rng_key: Array, start: State) -> None:
        self.data, self.stacks, self.stable, self.rows, self.rng_key = data, stacks, stable, rows, rng_key
        self.start = None if rows is None else start.params  # at which rows get their particles, as in a run in memory
        self.stack: Stack | None = None
        self.at, self.done = 0, 0  # the next step within the stack, and of all
        self._position = stacks.stream.position()
        self._failed: tuple[str, int] | None = None  # of rows whose particles cannot start: what to say, and the step
        self.call = self.call_of(stacks.first)

    def call_of(self, first: Minibatch) -> Call:
        """What a step sees, of a minibatch alone."""
        return self.data.call(_own_places(first) if self.rows is not None else first, self.stable, is_stack=False)

    # Of the loop.

    def next(self, state: State, num_steps: int) -> tuple[State, Call, int, int]:
        while self.stack is None or self.at >= self.stack.num_batches:  # a run may go on from the end of a stack
            state = self._opened(state)
        return state, self.call, self.at, min(num_steps, self.stack.num_batches - self.at)

    def made(self, num_steps: int) -> None:
        if self.rows is not None:
            for _ in range(num_steps):
                self.rows.rest(self._noise)
        self.at, self.done = self.at + num_steps, self.done + num_steps

    def seen(self, *, next: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call, at = self.call, self.at if next else max(self.at - 1, 0)
        return join(call.at(at) if call.stacked else call.dynamic, call.static)

    def _opened(self, state: State) -> State:
        """The state with the rows of the next stack."""
        if self.stack is not None and self.rows is not None:
            self.rows.put(state)
        if self._failed is not None:
            message, step = self._failed
            raise NonFiniteError(message, state, step, {})
        stack = self.stacks.next()  # what it raises leaves the position at the end of the stack before
        if self.stack is not None:
            self.at = 0
        self._position, batch = stack.position, stack.batch
        if self.rows is not None:
            assert stack.rows is not None
            stack = stack._replace(num_batches=self._begin(state, stack))
            assert stack.rows is not None
            state, places = self.rows.take(state, stack.rows, jax.random.fold_in(state.rng_key, 1))
            batch = batch._replace(places=jnp.asarray(places))
            if self.data.sharding is not None:
                state = self.data.sharding.place_state(state, self.rows.num_on_device)
            noise = self.data.learner._noise_at_rest(state, self.rows.num_rows, stack.rows.shape[1])
            self._noise = {site: float(variance) for site, variance in noise.items()}  # once, not in every step
        self.stack, self.call = stack, self.data.call(batch, self.stable, is_stack=True)
        return state

    def _begin(self, state: State, stack: Stack) -> int:
        """Particles for the rows that are seen for the first time; how many minibatches there are before one that has bad rows."""
        assert self.rows is not None
        assert stack.rows is not None
        arrays_of_all, rest = arrays_and_rest((stack.batch.args, stack.batch.kwargs))
        for i in range(stack.num_batches):
            if self.rows.fresh(stack.rows[i]).any():
                key, arrays = _of_one(self.rng_key, self.done - self.at + i, arrays_of_all, i)
                args, kwargs = join(arrays, rest)
                one = self.data.of(_own_places(Minibatch(jnp.asarray(stack.rows[i]), args, kwargs)))
                try:
                    made = self.data.learner.init(key, one, init_params=self.start)
                except ValueError as error:
                    step = self.done - self.at + i + 1
                    self._failed = f"step {step}: {error}", step
                    if i == 0:
                        raise NonFiniteError(self._failed[0], state, step, {}) from error
                    return i
                self.rows.begin(stack.rows[i], made)
        return stack.num_batches

    # Of checkpoints and the result.

    def position(self) -> dict[str, Any]:
        """Where the next step is in the source: its stack, and how far in that."""
        return {"position": self._position, "at": self.at}

    def describe(self, state: State) -> dict[str, Any]:
        """What is saved of a state, and of all rows."""
        if isinstance(state, SVIProgress):
            return {"state": plain(state), "counts": [state.num_steps, state.num_skipped]}
        if self.rows is None:
            return {"state": state}
        if self.stack is not None:
            self.rows.put(state)
        return {"state": self.rows.over(state), "rows": self.rows.tree()}

    def restore(self, tree: dict[str, Any], meta: dict[str, Any], state: State) -> State:
        """Goes on from what was saved."""
        self.stacks.stream.seek(meta["position"], meta["at"])
        self._position, self.at, self.done = meta["position"], meta["at"], len(tree["losses"])
        if isinstance(state, SVIProgress):
            return SVIProgress(*tree["state"], *tree["counts"])
        if self.rows is None:
            return tree["state"]
        self.rows.load(tree["state"], tree["rows"])
        return _with_parts(state, _parts(tree["state"], self.rows))

    @contextmanager
    def with_all_rows(self) -> Iterator[None]:
        """Gives the state of an error all rows."""
        try:
            yield
        except BaseException as error:
            if self.rows is not None and hasattr(error, "state"):
                if self.stack is not None:
                    self.rows.put(error.state)
                    self.stack = None  # nothing is on the device any more
                error.state = self.rows.over(error.state)
            raise

    def whole(self, state: State) -> State:
        """The last state, with all rows."""
        if self.rows is None:
            return state
        if self.stack is not None:
            self.rows.put(state)
        return self.rows.whole(state, jax.random.fold_in(state.rng_key, 2))


class _Judge:
    """What is looked at on the way, and the best state by it."""

    def __init__(self, learner: Any, validation: Any, patience: int | None, data: _Data, *, has_rows: bool) -> None:
        self.learner, self.patience, self.data = learner, patience, data
        self.metrics: dict[str, list[float]] = {}
        self.best: Any = None
        self.waited = 0
        self._rows = None if validation is None or callable(validation) else self._read(validation, has_rows=has_rows)
        self._function = validation if callable(validation) else self._mean_loss

    def _read(self, validation: Any, *, has_rows: bool) -> Batches:
        if has_rows:
            raise ValueError(
                "validation= are rows, which have no particles: give a function of the state, such as one that estimates the log "
                "density of these rows."
            )
        if not isinstance(validation, Batches):
            raise TypeError(f"validation must be Batches or a function of the state, got a {type(validation).__name__}.")
        return validation

    def _mean_loss(self, state: State) -> float:
        """The mean of the loss, all with one key: else the noise of the engine decides."""
        assert self._rows is not None
        typed = jnp.issubdtype(state.rng_key.dtype, jax.dtypes.prng_key)
        key = jax.random.key(0, impl=jax.random.key_impl(state.rng_key)) if typed else jax.random.PRNGKey(0)
        state = state._replace(rng_key=key)
        return float(np.mean([float(self.learner.evaluate(state, self.data.of(batch))) for batch in self._rows]))

    def look(self, step: int, state: State) -> str | None:
        """Looks at a state after some steps."""
        given = plain(state) if isinstance(state, SVIProgress) and self._rows is None else state
        said = self._function(copied(given))
        values = {name: float(x) for name, x in (said.items() if isinstance(said, Mapping) else [("validation", said)])}
        name, value = next(iter(values.items()))
        before = [x for x in self.metrics.get(name, ()) if not math.isnan(x)]
        for key, x in {"step": step, **values}.items():
            self.metrics.setdefault(key, []).append(x)
        if not before or value < min(before):
            self.waited = 0
            self.best = None if self.patience is None else _parts(copied(state), None, self.learner)
        else:
            self.waited += 1
        return "patience" if self.patience is not None and self.waited >= self.patience else None

    def meta(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        names = [name for name in self.metrics if name != "step"]
        return {"metrics": self.metrics, "waited": self.waited, "metric": self.metrics[names[0]][-1] if names else None}

    def restore(self, tree: dict[str, Any], meta: dict[str, Any]) -> None:
        self.metrics.update(meta["metrics"])
        self.waited = meta["waited"]
        self.best = tree.get("best") if self.metrics else None


def _learner(engine: Any) -> Any:
    """An engine, or SVI as one.

    :raises TypeError: for anything else.
    """
    if isinstance(engine, SVI):
        return steps_of(engine)
    if not isinstance(getattr(engine, "_steps", None), Steps):
        raise TypeError(f"engine must be an engine of numpyro_ebm or numpyro.infer.SVI, got a {type(engine).__name__}.")
    return engine


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
        if jax.process_count() > 1:
            raise ValueError("particles on the host are those of one process: take run(..., mesh=...).")
    if has_rows or isinstance(engine, SVI):
        program = require_rows_taken("the model", engine.model, one, rng_key, num_rows=num_rows)
        if has_rows and not program.subsampled:
            raise ValueError(
                f"{type(engine).__name__} on minibatches needs a model with one subsampled plate, of which they have the rows: "
                f"numpyro.plate('data', N, subsample_size={len(one.index)})."
            )
    if not has_rows:
        if init_state is not None:
            return learner._require_state(init_state, "init_state"), None
        return learner.init(rng_key, one, init_params=init_params), None
    (plate,) = program.subsampled.values()
    own = _own_places(one)
    started = learner.init(rng_key, own, init_params=init_params)
    folder = None if row_folder is None else Path(row_folder)
    rows = RowStore(started, learner._rows_of(started, own), plate.size, folder)
    if init_state is None:
        rows.begin(np.asarray(one.index), started)
        return started, rows
    given = learner._require_state(init_state, "init_state")
    rows.load(given)
    return _with_parts(started, _parts(given, rows)), rows


@jax.jit
def _of_one(rng_key: Array, step: Array, arrays: list[Array], at: Array) -> tuple[Array, list[Array]]:
    """The key and the arrays of one minibatch of a stack, by one program: by themselves they take as long as all else at its start."""
    return jax.random.fold_in(rng_key, step), [x[at] for x in arrays]


def _own_places(batch: Minibatch) -> Minibatch:
    """A minibatch whose rows are all that there are on the device."""
    return batch._replace(places=np.arange(len(batch.index), dtype=np.int32))


def _parts(state: State, rows: RowStore | None, learner: Any = None) -> dict[str, Any]:
    """The fields of a state without those that have a row for all data."""
    kept = getattr(learner, "kept_by_step", ()) if rows is None else {field.path[0].key for field in rows.fields}
    return {name: value for name, value in state._asdict().items() if name not in kept}


def _with_parts(state: State, parts: dict[str, Any]) -> State:
    return state._replace(**parts)


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

    def asked(_: State) -> str | None:
        return (got or ["SIGTERM"])[0] if said_anywhere(bool(got)) else None

    if threading.current_thread() is not threading.main_thread():
        yield lambda state: None
        return
    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
