# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What every engine shares: SVI's verbs over a compiled loop.

An engine writes pure functions: where it starts, one step, the loss. The loop makes the steps, keeps the old state where the
health of a step is bad, counts, and explains. Stepping and running give the same numbers, and a second ``run`` compiles nothing.
Nothing that depends on data is kept on the engine: a state restored from disk goes on in a freshly built one.
"""

import inspect
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
from jax import Array

from numpyro_ebm._checks import require_bool, require_count, require_key
from numpyro_ebm._compat import one_at_a_time
from numpyro_ebm._compiled import Watch, cheap_options, frozen
from numpyro_ebm._fit import fit_of
from numpyro_ebm._precision import tell_coarse_params
from numpyro_ebm._pytree import Rest, arrays_and_rest, as_array, join, read_params, require_hashable, require_no_lists
from numpyro_ebm.evaluate.report import Finding, FitReport, are_reports_enabled, report_of
from numpyro_ebm.infer.averaging import ParamSites, require_average, start_average
from numpyro_ebm.infer.init_params import InitParams
from numpyro_ebm.program.minibatch import Minibatch, minibatch_of
from numpyro_ebm.program.run import own_key
from numpyro_ebm.program.sites import NoDensityError
from numpyro_ebm.train.devices import as_sharding, number_of_rows, spread_batches
from numpyro_ebm.train.fingerprint import fingerprint_of
from numpyro_ebm.train.health import Health, NonFiniteError, Part, named
from numpyro_ebm.train.loop import Always, at_multiples, calling, copied, drive, saved
from numpyro_ebm.train.steps import Call, Steps, keep_state

State = Any
Method = TypeVar("Method", bound=Callable[..., Any])


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


def compiled_method(method: Method, *, cheaply: bool = False, level: int = 0) -> Method:
    """A method of a state, compiled once for all arguments that have the same shapes: arrays are traced, the rest compiled in.

    :param cheaply: whether it is to be compiled soon more than to run fast, as what a run calls once.
    :param level: of optimization, of what is compiled cheaply.
    """

    @wraps(method)
    def call(self: "Engine", state: State, *args: Any, **kwargs: Any) -> Any:
        self._require_state(state)
        args, kwargs = self._opened(args, kwargs)
        if method not in self._compiled:
            options: Any = cheap_options(level) if cheaply else None

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

    @property
    def __signature__(cls) -> inspect.Signature:
        """What ``help`` and editors show: the parameters of ``__init__``."""
        return inspect.Signature([*inspect.signature(cls.__init__).parameters.values()][1:])  # type: ignore[misc]


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
        self._steps = Steps(self._propose, self.kept_by_step)
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
        compiled = ("_begin", "_steps", "_compiled", "_watch")
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

    def _explain(self, state: State, bad: dict[Part, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What is wrong with the step from a state, where its data are not to blame: cause and fix first, then what was seen."""
        return self._too_large(f"{named(bad)} would no longer be finite.")

    def _too_large(self, what: str) -> str:
        """The same where all was finite before."""
        return f"the likely cause is too large a learning rate: {self._fix()} What was seen: {what}"

    def _fix(self) -> str:
        """What to do about numbers that are no longer finite: the end of a sentence."""
        return "take a smaller learning rate, or clip the gradient (optax.clip_by_global_norm)."

    def _warnings(self, state: State, before: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """What to warn of after a chunk, which began when ``before`` steps were made."""
        return []

    def _findings(self, rng_key: Array, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Finding]:
        """What there is to say of a fit at its last state, which is not changed: what ``result.report`` and ``diagnose`` tell."""
        return []

    def _find(
        self, rng_key: Array, state: State, args: tuple[Any, ...], kwargs: dict[str, Any], validation: Any = None
    ) -> list[Finding]:
        """The same for arguments as they are given by users."""
        if validation is not None:
            raise ValueError(f"validation= rows are for engines that match scores, and a {type(self).__name__} does not.")
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
        made = self._steps.one(state, np.False_, np.False_, *self._split(args, kwargs))
        return made.state, made.loss

    def stable_update(self, state: State, *args: Any, **kwargs: Any) -> tuple[State, Array]:
        """One step as by :meth:`update`, where a step that is not made is counted in ``state.num_skipped``."""
        state = self._require_state(state)
        made = self._steps.one(state, np.False_, np.True_, *self._split(args, kwargs))
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
        checkpoint: Any = None,
        mesh: Any = None,
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
        :param callbacks: functions ``callback(step, state, losses)`` called after every chunk, with the losses so far. One that
            returns True ends the run.
        :param int chunk_size: steps per chunk; if not given, a twentieth of the run with callbacks, and as many as take a
            fraction of a second without.
        :param bool report: whether ``result.report`` is made, by what :func:`~numpyro_ebm.diagnose` tells of this engine, with one
            warning for every number out of bounds; it does not change the state. As :func:`~numpyro_ebm.enable_reports` says if
            not given: for many short runs it may take longer than they do.
        :param checkpoint: a folder, or :class:`~numpyro_ebm.Checkpoints`, where the run is saved as it goes, and goes on from what
            it finds there: ``num_steps`` are those of all its parts.
        :param mesh: devices to run on: a :class:`jax.sharding.Mesh` whose axis is that of the rows and of negative chains, or a
            :class:`~numpyro_ebm.Sharding`, which says what goes along which axis. The answer is the same, to rounding.
        :raises ValueError: if ``num_steps`` or ``chunk_size`` is not a positive integer, or the folder of ``checkpoint`` is that of
            another run.
        :raises TypeError: inside ``jit``, ``vmap`` or ``grad``.
        :raises NonFiniteError: with the last good state, if a step would make anything non-finite.
        :raises KeyboardInterrupt: with the last state in ``state``, if the user stops it.
        """
        num_steps = require_count("num_steps", num_steps)
        chunk_size = None if chunk_size is None else require_count("chunk_size", chunk_size)
        stable_update, progress_bar = require_bool("stable_update", stable_update), require_bool("progress_bar", progress_bar)
        reports = are_reports_enabled() if report is None else require_bool("report", report)
        if collect and checkpoint is not None:
            raise ValueError("collect with checkpoint=: its records are not saved. Leave one of them out.")
        _require_outermost((rng_key, args, kwargs, init_state, init_params))
        sharding = None if mesh is None else as_sharding(mesh)
        if sharding is not None:
            sharding.require_agreement("rng_key, init_params", (rng_key, init_params))
            args, kwargs = sharding.place_data(args, kwargs)
        dynamic, static = self._split(args, kwargs)
        args, kwargs = join(dynamic, static)
        if init_state is None:
            if sharding is not None:
                sharding.require_same_program(self._begin, rng_key, read_params("init_params", init_params or {}), dynamic, static)
            state = self.init(rng_key, *args, init_params=init_params, **kwargs)
        else:
            state = self._require_state(init_state, "init_state")
        if sharding is not None:
            num_rows = number_of_rows(args, kwargs)
            state, static = sharding.place_state(state, num_rows), sharding.with_layout(static, num_rows)
            sharding.require_same_program(self._steps.one, state, np.False_, np.False_, dynamic, static)
        call = Call(dynamic, static, np.bool_(stable_update), collect)
        every = chunk_size or (max(1, num_steps // 20) if callbacks else None)
        with saved(checkpoint, lambda: fingerprint_of(self, arguments=(args, kwargs)), self._steps, state, call) as run:
            state = state if run.found is None else run.found[0]["state"]
            look = at_multiples(calling(callbacks, run.log), run.log, every, num_steps)
            state, _ = drive(
                self,
                copied(state),  # the loop overwrites what it is given
                Always(call, args, kwargs),
                num_steps,
                run.log,
                between=(look, run.save_if_due),
                every=every,
                limit=run.steps_left,
                progress_bar=progress_bar,
            )
            run.save(state)
            try:
                said = report_of(lambda: self._findings(own_key(state.rng_key), state, args, kwargs)) if reports else None
            except KeyboardInterrupt as stop:
                keep_state(stop, state)
                raise
        if said is not None:
            said.warn(stacklevel=2, before=run.log.warned)
        return RunResult(self.get_params(state), state, jnp.asarray(run.log.losses), run.log.collected, said)

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
        dynamic, static = _split(*self._opened(args, kwargs))
        if self._watch is None:
            self._watch = Watch(*(value for name, value in vars(self).items() if not name.startswith("_")))
        static = frozen(static)
        return dynamic, static._replace(frozen=(static.frozen, self._watch.snapshot()))

    def _opened(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model, where a :class:`Minibatch` is given in their place."""
        batch = minibatch_of(args)
        return (args, kwargs) if batch is None else self._of_minibatch(batch, kwargs)

    def _of_minibatch(self, batch: Minibatch, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How the programs are called with a minibatch: by its rows alone, where it does not matter which they are."""
        return batch.args, {**kwargs, **batch.kwargs}

    def _propose(self, state: State, dynamic: Any, *, static: Rest) -> tuple[State, Array, Health]:
        args, kwargs = join(dynamic, static)
        if self.average_iterates is None:
            with _meshes_explained(), one_at_a_time, spread_batches(static):
                return self._step(state, args, kwargs)
        sites = ParamSites()
        with _meshes_explained(), one_at_a_time, spread_batches(static), sites:
            new, loss, health = self._step(state, args, kwargs)
        average = sites.next(state.average, self._unconstrained(new), self.average_iterates)
        return new._replace(average=average), loss, health

    def _error(
        self, state: State, bad: dict[Part, int], step: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NonFiniteError:
        try:
            # parameters may be out of range by now: that is told below, and what is a warning of a start is none of what stopped
            with numpyro.validation_enabled(False), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._refuse(state.rng_key, fit_of(state).data, args, kwargs)
        except NoDensityError as error:  # after some steps these have led there
            said = self._too_large(error.what) if int(state.num_steps) else str(error)
        except ValueError as error:  # a run that goes on from a state may be given other data
            said = str(error)
        else:
            said = self._explain(state, bad, args, kwargs)
        return NonFiniteError(f"step {step}: {said} The state before is in .state.", state, step, bad)

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


def _require_outermost(given: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        raise TypeError(
            "run looks at numbers between its chunks, and so cannot be inside jit, vmap or grad: make the steps there by update, "
            "in a lax.scan."
        )


def _is_false(x: Array) -> bool:
    """Whether it is known to be, which of what is traced it is not."""
    return not isinstance(x, jax.core.Tracer) and not x


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


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Array], Rest]:
    """The arrays of a call's arguments, and what is compiled in."""
    what = "an argument of the model"
    require_no_lists(what, args, kwargs)
    arrays, rest = arrays_and_rest((args, kwargs))
    return [as_array(what, array) for array in arrays], require_hashable(what, rest)
