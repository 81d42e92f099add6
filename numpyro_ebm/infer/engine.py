# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What every engine shares: SVI's verbs over a compiled loop.

An engine writes two pure functions, where it starts and one step; ``run`` compiles chunks of steps into one loop. All loops
have the same compiled body, whatever their number of steps, so that stepping and running give the same numbers, and a
second ``run`` compiles nothing. Nothing that depends on data is kept on the engine: a state restored from disk goes on in a
freshly built one.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from tqdm.auto import tqdm

State = Any
Health = dict[str, Array]  # by what it is the health of: 0 where all is well, else a code

MAX_STEPS_PER_CALL = 1024  # of the compiled loop, which has a buffer for their losses
MAX_BUFFER = 2**24  # bytes of that buffer where ``collect`` returns much
SECONDS_PER_CHUNK = 0.3  # how long a chunk may take before the bar moves


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


class NonFiniteError(RuntimeError):
    """A run met numbers that are not finite, or chains that run away, and stopped before it kept them."""

    def __init__(self, message: str, state: Any, step: int) -> None:
        super().__init__(message)
        #: the last good state: ``run(..., init_state=error.state)`` goes on from it
        self.state = state
        #: the step, counted from 1 within the run, that was not made
        self.step = step


class Engine(ABC):
    """The verbs of NumPyro's ``SVI`` for an engine that gives :meth:`_start` and :meth:`_step`.

    States are named tuples of arrays with at least the fields ``params`` (constrained), ``rng_key``, ``num_steps`` and
    ``num_skipped``.
    """

    def __init__(self) -> None:
        self._loop = jax.jit(self._run_chunk, static_argnames=("static", "stable", "collect"), donate_argnames=("state",))
        self._once = jax.jit(partial(self._run_chunk, collect=None, max_steps=1), static_argnames=("static", "stable"))
        self._begin = jax.jit(self._start_arrays, static_argnames="static")
        self._loss_now = compiled(self._loss)

    @abstractmethod
    def _start(
        self, rng_key: Array, init_params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[State, Array]:
        """The first state, and whether the data can be learned from; traced. Raises for a model that no data could teach."""

    @abstractmethod
    def _refuse(self, rng_key: Array, init_params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises for data that :meth:`_start` cannot learn from, naming the site and the fix; not traced."""

    @abstractmethod
    def _step(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[State, Array, Health]:
        """One step; traced. Where the health is bad, the state must be the old one but for its ``rng_key``."""

    @abstractmethod
    def _loss(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        """The loss at a state; traced."""

    @abstractmethod
    def _explain(self, state: State, health: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What bad health means, and the fix."""

    def _warnings(self, state: State) -> list[str]:
        """What to warn of between two chunks."""
        return []

    def init(self, rng_key: Array, *args: Any, init_params: dict[str, Any] | None = None, **kwargs: Any) -> State:
        """The state to start from.

        :param rng_key: a key of :func:`jax.random.key`.
        :param args: arguments of the model; arrays are traced, everything else is static.
        :param dict init_params: values of :func:`numpyro.param` sites to start from, instead of the model's own.
        :raises ValueError: for whatever the model or data cannot be learned with, naming the site and the fix.
        """
        init_params = dict(init_params or {})
        dynamic, static = _split(args, kwargs)
        state, good = self._begin(rng_key, init_params, dynamic, static)
        if not isinstance(good, jax.core.Tracer) and not good:
            self._refuse(rng_key, init_params, args, kwargs)
        return state

    def update(self, state: State, *args: Any, **kwargs: Any) -> tuple[State, Array]:
        """One step.

        A step that would make anything non-finite is not made: the state stays as it is, but for its random key, and the
        loss is nan.

        :return: the new state and the loss before the step.
        """
        return self._update(state, args, kwargs, stable=False)

    def stable_update(self, state: State, *args: Any, **kwargs: Any) -> tuple[State, Array]:
        """One step as by :meth:`update`, where a step that is not made is counted in ``state.num_skipped``."""
        return self._update(state, args, kwargs, stable=True)

    def evaluate(self, state: State, *args: Any, **kwargs: Any) -> Array:
        """The loss at a state, which is not changed."""
        return self._loss_now(state, args, kwargs)

    def get_params(self, state: State) -> dict[str, Any]:
        """Values of the :func:`numpyro.param` sites, constrained, as ``Predictive`` takes them."""
        return state.params

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
        callbacks: Sequence[Callable[[int, State, Array], Any]] = (),
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> RunResult:
        """Many steps, in compiled chunks.

        The numbers do not depend on the chunks, nor on the progress bar.

        :param rng_key: a key of :func:`jax.random.key`; not used with ``init_state``.
        :param int num_steps: steps to make.
        :param args: arguments of the model; arrays are traced, everything else is static.
        :param bool progress_bar: whether to show one; it moves once per chunk.
        :param bool stable_update: whether to skip and count steps that would make anything non-finite, instead of stopping.
        :param init_state: a state to go on from, which is kept.
        :param dict init_params: values of :func:`numpyro.param` sites to start from.
        :param collect: a function of the state; what it returns is recorded after every step. Pass the same function again
            to avoid a second compilation.
        :param callbacks: functions ``callback(step, state, losses)`` called after every chunk, with the losses so far.
        :param int chunk_size: steps per chunk; if not given, a twentieth of the run with callbacks, and as many as take a
            fraction of a second without.
        :raises ValueError: if ``num_steps`` or ``chunk_size`` is not a positive integer.
        :raises NonFiniteError: with the last good state, if a step would make anything non-finite.
        """
        _require_count("num_steps", num_steps)
        if chunk_size is not None:
            _require_count("chunk_size", chunk_size)
        state = self.init(rng_key, *args, init_params=init_params, **kwargs) if init_state is None else init_state
        state = _copy(state)  # the loop overwrites what it is given
        dynamic, static = _split(args, kwargs)
        settings = {"static": static, "stable": stable_update, "collect": collect}
        pace = _Pace(chunk_size or (max(1, num_steps // 20) if callbacks else None))
        records, done, warned = [], 0, set[str]()
        with tqdm(total=num_steps, disable=not progress_bar) as bar:
            while done < num_steps:
                state, record, health = self._chunk(state, min(pace.next(), num_steps - done), dynamic, settings)
                records.append(record)
                count = len(record.loss)
                pace.tell(count)
                done += count
                if health:
                    raise NonFiniteError(f"step {done + 1}: {self._explain(state, health, args, kwargs)}", state, done + 1)
                for message in set(self._warnings(state)) - warned:
                    warnings.warn(message, stacklevel=2)
                    warned.add(message)
                bar.update(count)
                bar.set_postfix_str(f"loss: {record.loss[-1]:.4f}", refresh=False)
                for callback in callbacks:
                    callback(done, _copy(state), _joined(records).loss)
        record = _joined(records)
        return RunResult(self.get_params(state), state, jnp.asarray(record.loss), record.collected)

    def _chunk(
        self, state: State, num_steps: int, dynamic: Any, settings: dict[str, Any]
    ) -> tuple[State, "_Record", dict[str, int]]:
        """``num_steps`` steps, or those before the first bad one and what is bad about it."""
        records, done, bad = [], 0, dict[str, int]()
        while done < num_steps and not bad:
            state, count, record, health = self._loop(state, num_steps - done, dynamic, **settings)
            count, health = jax.device_get((count, health))
            records.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count].copy(), record))
            done += int(count)
            if not settings["stable"]:
                bad = {name: int(code) for name, code in health.items() if code}
        return state, _joined(records), bad

    def _run_chunk(
        self,
        state: State,
        num_steps: Array,
        dynamic: Any,
        *,
        static: "_Static",
        stable: bool,
        collect: Any,
        max_steps: int = MAX_STEPS_PER_CALL,
    ) -> tuple[State, Array, "_Record", Health]:
        """Up to ``num_steps`` steps, as many as the buffer holds, stopped before the first bad one unless ``stable``."""
        args, kwargs = _join(dynamic, static)

        def one(state: State) -> tuple[State, _Record, Health]:
            new, loss, health = self._step(state, args, kwargs)
            bad = _is_bad(health)
            if stable:
                new = new._replace(num_skipped=new.num_skipped + bad)
            collected = jax.tree.map(_as_array, collect(new)) if collect else None
            return new, _Record(jnp.where(bad, jnp.nan, loss), collected), health

        def going(carry: Any) -> Array:
            done, _, _, health = carry
            return (done < num_steps) & (done < max_steps) & (stable | ~_is_bad(health))

        def body(carry: Any) -> Any:
            done, state, buffer, _ = carry
            state, record, health = one(state)
            buffer = jax.tree.map(lambda kept, x: lax.dynamic_update_index_in_dim(kept, x, done, 0), buffer, record)
            return done + 1, state, buffer, health

        _, record, health = jax.eval_shape(one, state)
        max_steps = min(max_steps, max(1, MAX_BUFFER // sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(record))))
        buffer = jax.tree.map(lambda x: jnp.zeros((max_steps, *x.shape), x.dtype), record)
        health = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), health)
        # A while loop, not a scan: its body is compiled alike whatever the number of steps.
        done, state, buffer, health = lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state, buffer, health))
        return state, done - (_is_bad(health) & (not stable)), buffer, health

    def _update(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any], stable: bool) -> tuple[State, Array]:
        dynamic, static = _split(args, kwargs)
        state, _, record, _ = self._once(state, 1, dynamic, static=static, stable=stable)
        return state, record.loss[0]

    def _start_arrays(self, rng_key: Array, init_params: Any, dynamic: Any, static: "_Static") -> tuple[State, Array]:
        args, kwargs = _join(dynamic, static)
        return self._start(rng_key, init_params, args, kwargs)


class _Record(NamedTuple):
    """What is kept of every step."""

    loss: Array
    collected: Any


def _joined(records: Sequence[_Record]) -> _Record:
    return jax.tree.map(lambda *xs: np.concatenate(xs), *records)


def _as_array(x: Any) -> Array:
    """What ``collect`` returned, and a random key by its numbers."""
    x = jnp.asarray(x)
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _copy(state: State) -> State:
    return jax.tree.map(lambda x: jnp.asarray(x).copy(), state)


def _is_bad(health: Health) -> Array:
    return jnp.any(jnp.stack(list(health.values())) > 0)


class _Pace:
    """How many steps the next chunk makes: as many as asked for, or as many as take a fraction of a second."""

    def __init__(self, fixed: int | None) -> None:
        self.fixed, self.size = fixed, 1
        self.start = time.perf_counter()

    def next(self) -> int:
        self.start = time.perf_counter()
        return self.fixed or self.size

    def tell(self, count: int) -> None:
        seconds = time.perf_counter() - self.start
        self.size = min(4 * self.size, max(1, int(count * SECONDS_PER_CHUNK / max(seconds, 1e-9))))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(state, args, kwargs)``, compiled once for all arguments of a model that have the same shapes."""

    @partial(jax.jit, static_argnames="static")
    def on_arrays(state: State, dynamic: Any, static: _Static) -> Any:
        return function(state, *_join(dynamic, static))

    return lambda state, args, kwargs: on_arrays(state, *_split(args, kwargs))


def as_transformation(optim: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer as an optax transformation: optax's own, or one of :mod:`numpyro.optim`.

    :raises TypeError: for anything else.
    """
    if isinstance(optim, optax.GradientTransformation):
        return optax.with_extra_args_support(optim)
    if not (hasattr(optim, "init") and hasattr(optim, "update") and hasattr(optim, "get_params")):
        raise TypeError(f"optim must be an optax transformation such as optax.adam(1e-3), got {optim!r}.")

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        state = optim.update(grads, state)
        return jax.tree.map(lambda new, old: new - old, optim.get_params(state), params), state

    return optax.GradientTransformationExtraArgs(optim.init, update)


class _Static(NamedTuple):
    """What of a call's arguments is compiled in: everything but arrays."""

    structure: Any
    leaves: tuple[Any, ...]
    types: tuple[type, ...]  # since 1 == 1.0 == True


_ARRAY = object()


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Array], _Static]:
    """The arrays of a call's arguments, and the rest."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    rest = tuple(_ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    static = _Static(structure, rest, tuple(type(leaf) for leaf in rest))
    for part in (*rest, structure):
        _require_hashable(part)
    return [jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array], static


def _require_hashable(part: Any) -> None:
    try:
        hash(part)
    except TypeError:
        raise TypeError(
            f"an argument of the model, a {type(part).__name__}, is neither an array nor hashable, and so cannot be compiled "
            "in. Pass arrays, numbers, strings, functions or pytrees of these."
        ) from None


def _join(dynamic: Sequence[Array], static: _Static) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arrays = iter(dynamic)
    return static.structure.unflatten([next(arrays) if leaf is _ARRAY else leaf for leaf in static.leaves])


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
