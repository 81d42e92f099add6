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
from collections.abc import Callable, Hashable, Sequence
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

BUFFER = 512  # steps that one call of the compiled loop can make
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
        self._once = jax.jit(partial(self._run_chunk, collect=None, size=1), static_argnames=("static", "stable"))
        self._begin = jax.jit(self._start_arrays, static_argnames="static")
        self._loss_now = jax.jit(self._evaluate_arrays, static_argnames="static")

    @abstractmethod
    def _check(self, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any], init_params: dict[str, Any] | None) -> Any:
        """What can be told before anything is compiled: raises for bad input; returns the parameters to start from."""

    @abstractmethod
    def _start(self, rng_key: Array, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
        """The first state; traced."""

    @abstractmethod
    def _step(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[State, Array, Health]:
        """One step; traced. Where the health is bad, the state must be the old one but for its ``rng_key``."""

    @abstractmethod
    def _loss(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        """The loss at a state; traced."""

    @abstractmethod
    def _explain(self, state: State, health: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What bad health means, and the mend."""

    def _warnings(self, state: State) -> list[str]:
        """What to warn of between two chunks."""
        return []

    def init(self, rng_key: Array, *args: Any, init_params: dict[str, Any] | None = None, **kwargs: Any) -> State:
        """The state to start from.

        :param rng_key: a key of :func:`jax.random.key`.
        :param args: arguments of the model; arrays are traced, everything else is static.
        :param dict init_params: values of :func:`numpyro.param` sites to start from, instead of the model's own.
        :raises ValueError: for whatever the model or data cannot be learnt with, naming the site and the mend.
        """
        params = self._check(rng_key, args, kwargs, init_params)
        dynamic, static = _split(args, kwargs)
        return self._begin(rng_key, params, dynamic, static)

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
        dynamic, static = _split(args, kwargs)
        return self._loss_now(state, dynamic, static)

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
        :param callbacks: functions ``callback(step, state, losses)`` called after every chunk, with the losses so far, which
            must not keep the state: it is overwritten.
        :param int chunk_size: steps per chunk; if not given, a twentieth of the run with callbacks, and as many as take a
            fraction of a second without.
        :raises ValueError: if ``num_steps`` or ``chunk_size`` is not a positive integer.
        :raises NonFiniteError: with the last good state, if a step would make anything non-finite.
        """
        _require_count("num_steps", num_steps)
        if chunk_size is not None:
            _require_count("chunk_size", chunk_size)
        state = self.init(rng_key, *args, init_params=init_params, **kwargs) if init_state is None else init_state
        state = jax.tree.map(lambda x: jnp.asarray(x).copy(), state)  # the loop overwrites what it is given
        dynamic, static = _split(args, kwargs)
        pace = _Pace(chunk_size or (max(1, num_steps // 20) if callbacks else None))
        losses, collected, done, warned = [], [], 0, set[str]()
        with tqdm(total=num_steps, disable=not progress_bar) as bar:
            while done < num_steps:
                size = min(pace.next(), num_steps - done)
                state, count, chunk, extra, health = self._chunk(state, size, dynamic, static, stable_update, collect)
                pace.tell(count)
                done += count
                losses.append(chunk)
                collected.append(extra)
                if count < size:
                    bad = {name: int(code) for name, code in health.items() if code}
                    raise NonFiniteError(f"step {done + 1}: {self._explain(state, bad, args, kwargs)}", state, done + 1)
                for message in set(self._warnings(state)) - warned:
                    warnings.warn(message, stacklevel=2)
                    warned.add(message)
                bar.update(count)
                bar.set_postfix_str(f"loss: {chunk[-1]:.4f}", refresh=False)
                for callback in callbacks:
                    callback(done, state, np.concatenate(losses))
        stacked = jax.tree.map(lambda *xs: np.concatenate(xs), *collected) if collect else None
        return RunResult(self.get_params(state), state, jnp.asarray(np.concatenate(losses)), stacked)

    def _chunk(
        self, state: State, size: int, dynamic: Any, static: Any, stable: bool, collect: Any
    ) -> tuple[State, int, np.ndarray, Any, dict[str, Any]]:
        """``size`` steps, by as many calls of the compiled loop as its buffer asks for."""
        losses, collected, done, health = [], [], 0, {}
        while done < size:
            part = min(size - done, BUFFER)
            state, count, loss, extra, health = self._loop(state, part, dynamic, static=static, stable=stable, collect=collect)
            count, health = jax.device_get((count, health))
            losses.append(np.asarray(loss[:count]))
            collected.append(jax.tree.map(lambda x, count=count: np.asarray(x[:count]), extra))
            done += int(count)
            if count < part:
                break
        return state, done, np.concatenate(losses), jax.tree.map(lambda *xs: np.concatenate(xs), *collected), health

    def _run_chunk(
        self, state: State, num_steps: Array, dynamic: Any, *, static: Hashable, stable: bool, collect: Any, size: int = BUFFER
    ) -> tuple[State, Array, Array, Any, Health]:
        """Up to ``num_steps`` steps, stopped before the first bad one unless ``stable``."""
        args, kwargs = _join(dynamic, static)

        def one(state: State) -> tuple[State, tuple[Array, Health, Any]]:
            new, loss, health = self._step(state, args, kwargs)
            bad = _is_bad(health)
            if stable:
                new = new._replace(num_skipped=new.num_skipped + bad)
            loss = jnp.where(bad, jnp.nan, loss)
            return new, (loss, health, collect(new) if collect else None)

        _, (loss, health, extra) = jax.eval_shape(one, state)
        buffers = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), (loss, extra))
        healthy = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), health)

        def going(carry: Any) -> Array:
            done, _, _, health = carry
            bad = _is_bad(health)
            return (done < num_steps) & (~bad | stable)

        def body(carry: Any) -> Any:
            done, state, buffers, _ = carry
            state, (loss, health, extra) = one(state)
            buffers = jax.tree.map(lambda buffer, x: buffer.at[done].set(x), buffers, (loss, extra))
            return done + 1, state, buffers, health

        # A while loop, not a scan: its body is compiled alike whatever the number of steps.
        start = (jnp.zeros((), jnp.int32), state, buffers, healthy)
        done, state, (losses, collected), health = lax.while_loop(going, body, start)
        bad = _is_bad(health)
        return state, done - (bad & (not stable)), losses, collected, health

    def _update(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any], stable: bool) -> tuple[State, Array]:
        dynamic, static = _split(args, kwargs)
        state, _, losses, _, _ = self._once(state, jnp.ones((), jnp.int32), dynamic, static=static, stable=stable)
        return state, losses[0]

    def _start_arrays(self, rng_key: Array, params: Any, dynamic: Any, static: Hashable) -> State:
        args, kwargs = _join(dynamic, static)
        return self._start(rng_key, params, args, kwargs)

    def _evaluate_arrays(self, state: State, dynamic: Any, static: Hashable) -> Array:
        args, kwargs = _join(dynamic, static)
        return self._loss(state, args, kwargs)


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
        self.size = min(4 * self.size, max(1, int(count * SECONDS_PER_CHUNK / max(seconds, 1e-9))), BUFFER)


def as_transformation(optim: Any) -> optax.GradientTransformationExtraArgs:
    """An optimiser as an optax transformation: optax's own, or one of :mod:`numpyro.optim`.

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


_ARRAY = object()


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Array], _Static]:
    """The arrays of a call's arguments, and the rest."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    static = tuple(_ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    try:
        hash(static)
    except TypeError:
        unhashable = next(leaf for leaf in static if not isinstance(leaf, Hashable))
        raise TypeError(
            f"an argument of the model, a {type(unhashable).__name__}, is neither an array nor hashable, and so cannot be compiled "
            "in. Pass arrays, numbers, strings, functions or pytrees of these."
        ) from None
    return [jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array], _Static(structure, static)


def _join(dynamic: Sequence[Array], static: _Static) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arrays = iter(dynamic)
    return static.structure.unflatten([next(arrays) if leaf is _ARRAY else leaf for leaf in static.leaves])


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
