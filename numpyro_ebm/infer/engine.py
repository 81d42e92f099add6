# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What every engine shares: SVI's verbs over a compiled loop.

An engine writes pure functions: where it starts, one step, the loss. The loop makes the steps, keeps the old state where the
health of a step is bad, counts, and explains. A step is traced once and compiled at most twice, by itself and inside the
loop, so that stepping and running give the same numbers and a second ``run`` compiles nothing. Nothing that depends on data is
kept on the engine: a state restored from disk goes on in a freshly built one.
"""

import re
import time
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from numpyro_ebm._checks import require_bool, require_count, require_key
from numpyro_ebm._compat import one_at_a_time
from numpyro_ebm._compiled import Watch, frozen
from numpyro_ebm._fit import fit_of
from numpyro_ebm._precision import tell_coarse_params
from numpyro_ebm._pytree import Rest, arrays_and_rest, as_array, join, read_params, require_hashable, require_no_lists
from numpyro_ebm.evaluate.report import Finding, FitReport, are_reports_enabled, report_of
from numpyro_ebm.infer.averaging import ParamSites, require_average, start_average
from numpyro_ebm.infer.init_params import InitParams
from numpyro_ebm.infer.step import Health, Part, is_bad, keep, named
from numpyro_ebm.program.run import own_key

State = Any
Method = TypeVar("Method", bound=Callable[..., Any])

MAX_STEPS_PER_CALL = 1024  # of the loop whose length is open, which has a buffer for their losses
FIXED_LENGTH = 250  # steps of the loop whose length is fixed
MAX_BUFFER = 2**24  # bytes that one call of a loop returns at most, where ``collect`` returns much
SECONDS_PER_CHUNK, SECONDS_WITHOUT_BAR = 1.0, 3.0  # how long a chunk may take: each allocates all that a step needs anew
MAX_GROWTH = 64  # of a chunk over the one before


class RunResult(NamedTuple):
    """What ``run`` of an engine returns. The first three fields are those of NumPyro's ``SVIRunResult``."""

    #: values of the param sites, constrained
    params: dict[str, Any]
    #: the state after the last step
    state: Any
    #: (num_steps,) the loss at every step, nan where ``stable_update`` skipped one
    losses: Array
    #: what ``collect`` returned after every step, stacked; None without it
    collected: Any = None
    #: what the fit says of itself; None where reports are off
    report: FitReport | None = None


class NonFiniteError(RuntimeError):
    """A run met numbers that are not finite, or chains that diverge, and stopped before it kept them."""

    def __init__(self, message: str, state: Any, step: int, health: dict[Part, int]) -> None:
        super().__init__(message)
        #: the last good state: ``run(..., init_state=error.state)`` goes on from it
        self.state = state
        #: the step, counted from 1 within the run, that was not made
        self.step = step
        #: what was bad about it: a code by ``(kind, site)``, such as ``{("param", "loc"): 1}``
        self.health = health


def compiled_method(method: Method, *, cheaply: bool = False) -> Method:
    """A method of a state, compiled once for all arguments that have the same shapes: arrays are traced, the rest compiled in.

    :param cheaply: whether it is to be compiled soon more than to run fast, as what a run calls once.
    """
    options: Any = {"xla_backend_optimization_level": 0} if cheaply else None

    @wraps(method)
    def call(self: "Engine", state: State, *args: Any, **kwargs: Any) -> Any:
        self._require_state(state)
        if method not in self._compiled:

            @partial(jax.jit, static_argnames="static", compiler_options=options)
            def on_arrays(dynamic: Any, static: Rest) -> Any:
                args, kwargs = join(dynamic, static)
                with one_at_a_time:
                    return method(self, *args, **kwargs)

            self._compiled[method] = on_arrays
        return self._compiled[method](*self._split((state, *args), kwargs))

    return cast(Method, call)


class _ReadOnly(ABCMeta):
    """A class whose instances cannot be changed once they are made."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made._is_made = True
        return made


class Engine(metaclass=_ReadOnly):
    """The verbs of NumPyro's ``SVI`` for an engine that gives :meth:`_start`, :meth:`_refuse`, :meth:`_step` and :meth:`_loss`.

    States are named tuples of arrays with at least the fields ``params`` (constrained), ``rng_key``, ``num_steps`` and
    ``num_skipped``. Attributes are read-only: what is compiled has read them.

    :param average_iterates: whether :meth:`get_params` and the result of :meth:`run` are averages of the iterates, as kept in
        ``state.average``, instead of the last; or the exponent of their weights, 3 for True.
    """

    #: Fields of the state that :meth:`_step` itself leaves as they were where its health is bad. They have a row for all data,
    #: of which a step changes those of its batch, in place: to choose between new and old in the loop would copy all rows.
    kept_by_step: ClassVar[frozenset[str]] = frozenset()
    #: the class of the states
    state_class: ClassVar[type[Any]] = tuple

    _is_made = False  # after __init__

    def __init__(self, average_iterates: bool | float = False) -> None:
        self.average_iterates = require_average(average_iterates)
        self._compile()

    def _compile(self) -> None:
        self._begin = jax.jit(self._start_arrays, static_argnames="static")
        self._proposed = jax.jit(self._propose, static_argnames="static")  # inside the next three, so that it is traced once
        self._one = jax.jit(self._make_one, static_argnames="static")
        self._open_loop = jax.jit(self._make_open, static_argnames=("static", "collect"))
        self._fixed_loop = jax.jit(self._make_fixed, static_argnames=("static", "collect", "length"), donate_argnames="state")
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}  # by method, when it is first called
        self._watch: Watch | None = None  # of the settings, from the first call on

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_made and not name.startswith("_"):
            raise AttributeError(
                f"{name} of a {type(self).__name__} cannot be changed, and {value!r} would not be used: make a new engine with "
                f"this {name}, and go on from the state of this one by run(..., init_state=...)."
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        compiled = ("_begin", "_proposed", "_one", "_open_loop", "_fixed_loop", "_compiled", "_watch")
        return {name: value for name, value in vars(self).items() if name not in compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compile()

    # What an engine writes.

    @abstractmethod
    def _start(
        self, rng_key: Array, init_params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[State, Array]:
        """The first state, and whether the data can be learned from; traced. Raises for a model that no data could teach."""

    @abstractmethod
    def _refuse(self, rng_key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises for data that :meth:`_start` cannot learn from, naming the site and the fix; not traced."""

    @abstractmethod
    def _step(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[State, Array, Health]:
        """The state after one step, the loss, and the health of both; traced.

        Only the step: the loop counts, and keeps the old state but for its ``rng_key`` where the health is bad.
        """

    @abstractmethod
    def _loss(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        """The loss at a state; traced."""

    def _unconstrained(self, state: State) -> dict[str, Any]:
        """The unconstrained values of all param sites at a state."""
        return cast(dict[str, Any], state.unconstrained)

    def _meet(self, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What there is to do before anything is traced."""

    def _explain(self, state: State, bad: dict[Part, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str]:
        """What is wrong with the step from a state, where its data are not to blame; and the fix."""
        return f"{named(bad)} would no longer be finite.", self._fix()

    def _fix(self) -> str:
        """What to do about numbers that are no longer finite."""
        return "Take a smaller learning rate, or clip the gradient (optax.clip_by_global_norm)."

    def _warnings(self, state: State, before: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """What to warn of after a chunk, which began when ``before`` steps were made."""
        return []

    def _findings(self, rng_key: Array, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Finding]:
        """What there is to say of a fit at its last state, which is not changed: what ``result.report`` and ``diagnose`` tell."""
        return []

    def _find(self, rng_key: Array, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Finding]:
        """The same for arguments as they are given by users."""
        args, kwargs = join(*self._split(args, kwargs))
        return self._findings(rng_key, state, args, kwargs)

    # What a user calls.

    def init(self, rng_key: Array, *args: Any, init_params: dict[str, Any] | None = None, **kwargs: Any) -> State:
        """The state to start from.

        :param rng_key: a key of :func:`jax.random.key`.
        :param args: arguments of the model; arrays are traced, everything else is static.
        :param dict init_params: values of :func:`numpyro.param` sites to start from, instead of the programs' own.
        :raises ValueError: for whatever the programs or data cannot be learned with, naming the site and the fix.
        :raises TypeError: for values that are no numbers, and arguments that can neither be traced nor compiled in.
        """
        rng_key = require_key("rng_key", rng_key)
        given = read_params("init_params", {} if init_params is None else init_params)
        dynamic, static = self._split(args, kwargs)
        args, kwargs = join(dynamic, static)
        self._meet(rng_key, args, kwargs)
        state, good, inside = self._begin(rng_key, given, dynamic, static)
        if outside := [name for name, is_inside in inside.items() if _is_false(is_inside)]:
            params = InitParams(given)
            with params:
                jax.eval_shape(partial(self._start_arrays, static=static), rng_key, given, dynamic)  # for the constraint
            raise ValueError(params.outside(outside[0]))
        if _is_false(good):
            self._refuse(rng_key, given, args, kwargs)
        tell_coarse_params(state.params)
        return state

    def update(self, state: State, *args: Any, **kwargs: Any) -> tuple[State, Array]:
        """One step.

        A step that would make anything non-finite is not made: the state stays as it is, but for its random key, and the
        loss is nan.

        :return: the new state, and the loss that the step met on its way. That is the loss at the old state, but where a step has
            parts: with ``order="gauss_seidel"`` it is at the particles moved (and with ``average_moves`` a mean over them), in
            :class:`~numpyro_ebm.BiSM` and :class:`~numpyro_ebm.VaGES` at the guide after its inner steps, unrolled ones too.
            :meth:`evaluate` gives the loss at a state.
        """
        state = self._require_state(state)
        made = self._one(state, np.False_, np.False_, *self._split(args, kwargs))
        return made.state, made.loss

    def stable_update(self, state: State, *args: Any, **kwargs: Any) -> tuple[State, Array]:
        """One step as by :meth:`update`, where a step that is not made is counted in ``state.num_skipped``."""
        state = self._require_state(state)
        made = self._one(state, np.False_, np.True_, *self._split(args, kwargs))
        return made.state, made.loss

    @compiled_method
    def evaluate(self, state: State, *args: Any, **kwargs: Any) -> Array:
        """The loss at a state, which is not changed."""
        return self._loss(state, args, kwargs)

    def get_params(self, state: State) -> dict[str, Any]:
        """Values of the :func:`numpyro.param` sites, constrained, as ``Predictive`` takes them; averaged if the engine averages."""
        state = self._require_state(state)
        params: dict[str, Any] = state.params if self.average_iterates is None else state.average.params
        return params

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        init_state: State | None = None,
        init_params: dict[str, Any] | None = None,
        collect: Callable[[State], Any] | None = None,
        callbacks: Sequence[Callable[[int, State, np.ndarray], Any]] = (),
        chunk_size: int | None = None,
        report: bool | None = None,
        **kwargs: Any,
    ) -> RunResult:
        """Many steps, in compiled chunks, and a report on whether the fit can be believed.

        On CPUs the numbers do not depend on the chunks, bit for bit; on accelerators to rounding. There a chunk is made of loops
        of fixed length (``chunk_size``, 250 steps at most), which the device runs without asking the host, and what is left over
        of single steps: a number of steps that is a multiple is fastest.

        :param rng_key: a key of :func:`jax.random.key`; not used with ``init_state``.
        :param int num_steps: steps to make.
        :param args: arguments of the model; arrays are traced, everything else is static.
        :param bool progress_bar: whether to show one; it moves once per chunk.
        :param bool stable_update: whether to skip and count steps that would make anything non-finite, instead of stopping.
        :param init_state: a state to continue from; it is not changed.
        :param dict init_params: values of :func:`numpyro.param` sites to start from.
        :param collect: a function of the state; what it returns is recorded after every step. Pass the same function again
            to avoid a second compilation.
        :param callbacks: functions ``callback(step, state, losses)`` called after every chunk, with the losses so far.
        :param int chunk_size: steps per chunk; if not given, a twentieth of the run with callbacks, and as many as take a
            fraction of a second without.
        :param bool report: whether ``result.report`` is made, by what :func:`~numpyro_ebm.diagnose` tells of this engine, with one
            warning for every number out of bounds; it does not change the state. As :func:`~numpyro_ebm.enable_reports` says if
            not given: for many short runs it may take longer than they do.
        :raises ValueError: if ``num_steps`` or ``chunk_size`` is not a positive integer.
        :raises TypeError: inside ``jit``, ``vmap`` or ``grad``.
        :raises NonFiniteError: with the last good state, if a step would make anything non-finite.
        :raises KeyboardInterrupt: with the last state in ``state``, if the user stops it.
        """
        num_steps = require_count("num_steps", num_steps)
        chunk_size = None if chunk_size is None else require_count("chunk_size", chunk_size)
        stable_update, progress_bar = require_bool("stable_update", stable_update), require_bool("progress_bar", progress_bar)
        reports = are_reports_enabled() if report is None else require_bool("report", report)
        _require_outermost((rng_key, args, kwargs, init_state, init_params))
        dynamic, static = self._split(args, kwargs)
        args, kwargs = join(dynamic, static)
        if init_state is None:
            state = self.init(rng_key, *args, init_params=init_params, **kwargs)
        else:
            state = self._require_state(init_state, "init_state")
        state = _copy(state)  # the loop overwrites what it is given
        call = _Call(dynamic, static, np.bool_(stable_update), collect)
        chunk_size = chunk_size or (max(1, num_steps // 20) if callbacks else None)
        length = self._length(state, call, chunk_size) if _asks_the_host(state, dynamic) else None
        chunk = self._open_chunk if length is None else partial(self._fixed_chunk, length=length)
        pace = _Pace(chunk_size, length, SECONDS_PER_CHUNK if progress_bar else SECONDS_WITHOUT_BAR)
        log, warned, before = _Log(num_steps), set[str](), int(state.num_steps)
        with tqdm(total=num_steps, disable=not progress_bar) as bar:
            try:
                while log.done < num_steps:
                    state, record, bad = chunk(state, min(pace.next(), num_steps - log.done), call)
                    log.add(record)
                    pace.tell(len(record.loss))
                    if bad:
                        raise self._error(state, bad, log.done + 1, args, kwargs)
                    for message in self._warnings(state, before, args, kwargs):
                        if (told := re.sub(r"[\d.]+", "", message)) not in warned:  # and not again with another number
                            warnings.warn(message, stacklevel=2)
                            warned.add(told)
                    before = int(state.num_steps)
                    bar.update(len(record.loss))
                    bar.set_postfix_str(f"loss: {record.loss[-1]:.4f}", refresh=False)
                    for callback in callbacks:
                        callback(log.done, _copy(state), log.losses[: log.done])
                said = report_of(lambda: self._findings(own_key(state.rng_key), state, args, kwargs)) if reports else None
            except KeyboardInterrupt as stop:
                _keep_state(stop, state)
                raise
        if said is not None:
            said.warn(stacklevel=2)
        return RunResult(self.get_params(state), state, jnp.asarray(log.losses), log.collected, said)

    def _require_state(self, state: Any, name: str = "state") -> State:
        """Refuses what is no state of this engine.

        :raises TypeError: saying what it is instead, and what to pass.
        """
        if isinstance(state, self.state_class):
            if self.average_iterates is not None and state.average == ():  # of a fit that did not average: from here on
                return state._replace(average=start_average(state.params, self._unconstrained(state)))
            return state
        fix = "pass what init or update of this engine gave, or .state of the result of its run"
        if isinstance(state, RunResult):
            fix = "it is what run returned: pass result.state"
        elif isinstance(state, dict):
            fix += ". Restore a checkpoint into the structure of a state, jax.eval_shape(lambda: engine.init(rng_key, ...))"
        elif isinstance(state, tuple) and state and isinstance(state[0], self.state_class):
            fix = "it is what update returned, a state and a loss: pass the first of the two"
        wanted, given = self.state_class.__name__, type(state).__name__
        raise TypeError(f"{name} must be a {wanted}, a state of {type(self).__name__}, got a {given}: {fix}.")

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Array], Rest]:
        """The arrays of a call's arguments, and what is compiled in, with what it and the programs hold and read now."""
        dynamic, static = _split(args, kwargs)
        if self._watch is None:
            self._watch = Watch(*(value for name, value in vars(self).items() if not name.startswith("_")))
        static = frozen(static)
        return dynamic, static._replace(frozen=(static.frozen, self._watch.snapshot()))

    # One step.

    def _make_one(self, state: State, stopped: Array, stable: Array, dynamic: Any, static: Rest) -> "_Made":
        """One step by itself, compiled as the loop of its device compiles it."""
        plain = partial(self._proposed, static=static)
        _, loss, health = jax.eval_shape(plain, state, dynamic)

        def in_open_loop(state: State, dynamic: Any) -> tuple[State, Array, Health]:
            once = (state.num_steps >= 0).astype(jnp.int32)  # one step, which XLA cannot know and so takes out of no loop
            seen = self._advance(state, once, 1, health, _Record(loss, None), dynamic, static=static, collect=None)
            return seen.state, seen.record.loss[0], seen.health

        apart = jax.custom_jvp(in_open_loop)  # a while loop has no gradient, a step has
        apart.defjvp(partial(jax.jvp, plain))
        proposal = lax.platform_dependent(state, dynamic, cpu=apart, default=plain)
        return self._kept(proposal, state, stopped, stable)

    def _kept(self, proposal: tuple[State, Array, Health], state: State, stopped: Array, stable: Array) -> "_Made":
        """The step that was proposed if it is healthy, else the state as it was; none where a run has ``stopped`` before."""
        proposed, loss, health = proposal
        bad = is_bad(health)
        new, old = proposed._asdict(), state._asdict()
        chosen = [field for field in old if field not in self.kept_by_step]
        new = proposed._replace(**{field: keep(~bad, new[field], old[field]) for field in chosen})
        new = new._replace(
            rng_key=proposed.rng_key,
            num_steps=state.num_steps + (~bad).astype(jnp.int32),
            num_skipped=state.num_skipped + (bad & stable).astype(jnp.int32),
        )
        return _Made(keep(~stopped, new, state), jnp.where(bad, jnp.nan, loss), health, stopped | (bad & ~stable))

    def _propose(self, state: State, dynamic: Any, *, static: Rest) -> tuple[State, Array, Health]:
        args, kwargs = join(dynamic, static)
        if self.average_iterates is None:
            with _meshes_explained(), one_at_a_time:
                return self._step(state, args, kwargs)
        sites = ParamSites()
        with _meshes_explained(), one_at_a_time, sites:
            new, loss, health = self._step(state, args, kwargs)
        average = sites.next(state.average, self._unconstrained(new), self.average_iterates)
        return new._replace(average=average), loss, health

    # Chunks of steps.

    def _open_chunk(self, state: State, num_steps: int, call: "_Call") -> tuple[State, "_Record", dict[Part, int]]:
        """``num_steps`` steps, or those before the first bad one and what is bad about it.

        By a loop that ends where it likes, whose condition costs a CPU nothing. It keeps no old state, which costs more than many
        a step. Where a step is bad it is run again, to the state before.
        """
        records, done = [], 0
        while done < num_steps:
            start = state
            state, record, count, stopped = self._looped(start, num_steps - done, call)
            records.append(record)
            done += count
            if stopped:
                before = self._looped(start, count, call)[0] if count else start
                made = self._one(before, np.False_, call.stable, call.dynamic, call.static)
                if made.stopped:
                    return made.state, _joined(records), _codes(jax.device_get(made.health))
                state = made.state
                records.append(jax.tree.map(lambda x: np.asarray(x)[None], _recorded(call.collect, made.loss, state)))
                done += 1
        return state, _joined(records), {}

    def _looped(self, state: State, num_steps: int, call: "_Call") -> tuple[State, "_Record", int, bool]:
        """The open loop, and what the host looks at: the records, how many, and whether a bad step stopped it."""
        seen = self._open_loop(state, num_steps, call.dynamic, static=call.static, collect=call.collect)
        count, stopped = jax.device_get((seen.num_good, seen.stopped))
        return seen.state, jax.tree.map(lambda x: np.asarray(x)[:count].copy(), seen.record), int(count), bool(stopped)

    def _make_open(self, state: State, num_steps: Array, dynamic: Any, *, static: Rest, collect: Any) -> "_Advanced":
        _, loss, health = jax.eval_shape(partial(self._proposed, static=static), state, dynamic)
        record = jax.eval_shape(partial(_recorded, collect), loss, state)
        size = min(MAX_STEPS_PER_CALL, _fitting(record))
        return self._advance(state, num_steps, size, health, record, dynamic, static=static, collect=collect)

    def _advance(
        self,
        state: State,
        num_steps: Array,
        size: int,
        health: Health,
        record: "_Record",
        dynamic: Any,
        *,
        static: Rest,
        collect: Any,
    ) -> "_Advanced":
        """Up to ``num_steps`` steps, as many as there is room for, or up to the first bad one, whose state is left as it is.

        :param health: of a step, its shapes.
        :param record: what is kept of a step, its shapes.
        """

        def going(carry: Any) -> Array:
            done, _, _, health = carry
            return (done < num_steps) & (done < size) & ~is_bad(health)

        def body(carry: Any) -> Any:
            done, state, buffer, _ = carry
            new, loss, health = self._proposed(state, dynamic, static=static)
            new = new._replace(num_steps=state.num_steps + 1)
            row = _recorded(collect, loss, new)
            buffer = jax.tree.map(lambda kept, x: lax.dynamic_update_index_in_dim(kept, x, done, 0), buffer, row)
            return done + 1, new, buffer, health

        buffer, health = jax.tree.map(partial(_buffer, size), record), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), health)
        # A while loop, not a scan: its body is compiled alike whatever the number of steps.
        done, state, buffer, health = lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state, buffer, health))
        return _Advanced(state, buffer, done - is_bad(health).astype(jnp.int32), is_bad(health), health)

    def _fixed_chunk(self, state: State, num_steps: int, call: "_Call", length: int) -> tuple[State, "_Record", dict[Part, int]]:
        """The same by loops of a fixed length and then by single steps, all of them queued before the host looks at any."""
        stopped: Any = np.False_
        seen: list[_Seen] = []
        while num_steps:
            if num_steps >= length:
                state, stopped, steps = self._fixed_loop(
                    state, stopped, call.stable, call.dynamic, static=call.static, collect=call.collect, length=length
                )
            else:
                before, made = stopped, self._one(state, stopped, call.stable, call.dynamic, call.static)
                state, stopped = made.state, made.stopped
                steps = _Seen(before, _recorded(call.collect, made.loss, state), made.health)
                steps = jax.tree.map(lambda x: jnp.asarray(x)[None], steps)
            seen.append(steps)
            num_steps -= length if num_steps >= length else 1
        try:
            before, record, health = _joined(jax.device_get(seen))
        except KeyboardInterrupt as stop:
            _keep_state(stop, state)
            raise
        count = int((~before).sum()) - bool(stopped)  # the last of those that were tried is the bad one
        return state, jax.tree.map(lambda x: x[:count], record), _codes(jax.tree.map(lambda x: x[count], health)) if stopped else {}

    def _make_fixed(
        self, state: State, stopped: Array, stable: Array, dynamic: Any, *, static: Rest, collect: Any, length: int
    ) -> tuple[State, Array, "_Seen"]:
        """``length`` steps, which all stay where they are after a bad one: no condition that a device would ask the host for."""

        def body(carry: tuple[State, Array], _: None) -> tuple[tuple[State, Array], _Seen]:
            state, stopped = carry
            made = self._kept(self._proposed(state, dynamic, static=static), state, stopped, stable)
            seen = _Seen(stopped, _recorded(collect, made.loss, made.state), made.health)
            return (made.state, made.stopped), seen

        (state, stopped), seen = lax.scan(body, (state, stopped), None, length=length)
        return state, stopped, seen

    def _length(self, state: State, call: "_Call", chunk_size: int | None) -> int:
        """Of the loop of fixed length in this run."""
        _, loss, _ = jax.eval_shape(partial(self._proposed, static=call.static), state, call.dynamic)
        record = jax.eval_shape(partial(_recorded, call.collect), loss, state)
        return min(FIXED_LENGTH, chunk_size or FIXED_LENGTH, _fitting(record))

    def _error(
        self, state: State, bad: dict[Part, int], step: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NonFiniteError:
        try:
            with numpyro.validation_enabled(False):  # parameters may be out of range by now: that is told below
                self._refuse(state.rng_key, fit_of(state).data, args, kwargs)
        except ValueError as error:  # a run that goes on from a state may be given other data
            what, fix = str(error), ""
        else:
            what, fix = self._explain(state, bad, args, kwargs)
        return NonFiniteError(f"step {step}: {what} The state before is in .state. {fix}".rstrip(), state, step, bad)

    def _start_arrays(
        self, rng_key: Array, init_params: dict[str, Any], dynamic: Any, static: Rest
    ) -> tuple[State, Array, dict[str, Array]]:
        args, kwargs = join(dynamic, static)
        params = InitParams(init_params)
        with _meshes_explained(), one_at_a_time, params:
            state, good = self._start(rng_key, init_params, args, kwargs)
        if self.average_iterates is not None:
            state = state._replace(average=start_average(state.params, self._unconstrained(state)))
        return state, good, params.are_inside()


class _Call(NamedTuple):
    """What the steps of one run have in common."""

    dynamic: Any  # arrays of the model's arguments
    static: Any  # the rest of them
    stable: np.bool_
    collect: Any


class _Made(NamedTuple):
    """What a step made."""

    state: Any
    loss: Array
    health: Health
    stopped: Array  # (), bool: whether no more steps are to be made


class _Record(NamedTuple):
    """What is kept of every step."""

    loss: Array
    collected: Any


class _Advanced(NamedTuple):
    """What an open loop made."""

    state: Any  # after the last step, the bad one where there was one
    record: _Record  # with a leading axis of steps
    num_good: Array  # (), int32: steps before a bad one
    stopped: Array  # (), bool: whether there was one
    health: Health  # of the last step


class _Seen(NamedTuple):
    """What the host looks at after a chunk of fixed length, with a leading axis of steps."""

    stopped: Any  # bool, before the step
    record: _Record
    health: Health


class _Log:
    """The records of a run so far."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.done = num_steps, 0
        self.losses: np.ndarray = np.empty(0)
        self._collected: list[Any] = []

    def add(self, record: _Record) -> None:
        if not self.done:
            self.losses = np.empty(self.num_steps, record.loss.dtype)
        self.losses[self.done : self.done + len(record.loss)] = record.loss
        self.done += len(record.loss)
        self._collected.append(record.collected)

    @property
    def collected(self) -> Any:
        return _joined(self._collected)


class _Pace:
    """How many steps the next chunk makes: as many as asked for, or as many as take a fraction of a second.

    Where several processes run, all must make the same chunks, so that none goes by its own clock.
    """

    def __init__(self, asked: int | None, length: int | None, seconds: float) -> None:
        self.seconds = seconds
        self.asked = asked or (FIXED_LENGTH if jax.process_count() > 1 else None)
        self.length = length or 1
        self.size = self.length
        self.start = time.perf_counter()

    def next(self) -> int:
        self.start = time.perf_counter()
        return self.asked or self.size

    def tell(self, count: int) -> None:
        seconds = time.perf_counter() - self.start
        size = min(MAX_GROWTH * self.size, max(1, int(count * self.seconds / max(seconds, 1e-9))))
        self.size = max(1, size // self.length) * self.length


def _keep_state(stop: Any, state: State) -> None:
    """Keeps the state of a run that the user stops, unless the device has overwritten it."""
    if not hasattr(stop, "state") and not any(x.is_deleted() for x in jax.tree.leaves(state)):
        stop.state = state
        stop.add_note(f"The state after {int(state.num_steps)} steps is in .state: run(..., init_state=...) goes on from it.")


def _require_outermost(given: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        raise TypeError(
            "run looks at numbers between its chunks, and so cannot be inside jit, vmap or grad: make the steps there by update, "
            "in a lax.scan."
        )


def _is_false(x: Array) -> bool:
    """Whether it is known to be, which of what is traced it is not."""
    return not isinstance(x, jax.core.Tracer) and not x


def _asks_the_host(*trees: Any) -> bool:
    """Whether the arrays are on a device that asks the host whether a loop goes on, or a branch is taken."""
    devices = {device.platform for x in jax.tree.leaves(trees) for device in x.devices()}
    return devices != {"cpu"}


@contextmanager
def _meshes_explained() -> Iterator[None]:
    """Says what to do about JAX's errors of type ``ShardingTypeError``, which has no public name."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "ShardingTypeError":
            error.add_note(
                "The arguments lie on a mesh with explicit axes, where JAX wants to be told how the result of this operation, of "
                "the model or of the engine, is laid out. Make the mesh with automatic axes: "
                "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))."
            )
        raise


def _buffer(size: int, x: jax.ShapeDtypeStruct) -> Array:
    """Room for ``size`` records, laid out over the devices as one of them is."""
    sharding = None if x.sharding is None else NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec))
    return jnp.zeros((size, *x.shape), x.dtype, out_sharding=sharding)


def _fitting(record: _Record) -> int:
    """How many records fit into the buffer."""
    return max(1, MAX_BUFFER // sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(record)))


def _joined(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *xs: np.concatenate(xs), *trees)


def _recorded(collect: Callable[[State], Any] | None, loss: Array, state: State) -> _Record:
    """What is kept of a step: its loss and what ``collect`` returns, of a random key its numbers."""

    def numbers(x: Any) -> Array:
        x = jnp.asarray(x)
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return _Record(loss, jax.tree.map(numbers, collect(state)) if collect else None)


def _codes(health: Any) -> dict[Part, int]:
    """What is bad, by host numbers."""
    return {part: int(code) for part, code in health.items() if code}


def _copy(state: State) -> State:
    return jax.tree.map(lambda x: jnp.asarray(x).copy(), state)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Array], Rest]:
    """The arrays of a call's arguments, and what is compiled in."""
    what = "an argument of the model"
    require_no_lists(what, args, kwargs)
    arrays, rest = arrays_and_rest((args, kwargs))
    return [as_array(what, array) for array in arrays], require_hashable(what, rest)
