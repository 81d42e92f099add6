# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of a pure function, compiled: one by itself, and many in a loop that keeps the old state where a step is bad.

A step is traced once and compiled at most twice, by itself and inside the loop of its device, so that stepping and running give
the same numbers. On CPUs the loop ends where it likes. A device that asks the host whether a loop goes on, or which branch is
taken, has loops of a fixed length without a condition. What a step sees of the data is the same in every step, or one of a stack.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from numpyro_ebm._pytree import Rest, keep
from numpyro_ebm.train.health import Health, Part, is_bad

State = Any

MAX_STEPS_PER_CALL = 1024  # of the loop whose length is open, which has a buffer for their losses
FIXED_LENGTH = 250  # steps of the loop whose length is fixed
MAX_BUFFER = 2**24  # bytes that one call of a loop returns at most, where ``collect`` returns much


class Call(NamedTuple):
    """What the steps of one call have in common, or in turn."""

    dynamic: Any  # arrays of the model's arguments
    static: Any  # the rest of them
    stable: np.bool_
    collect: Any = None
    stacked: tuple[bool, ...] = ()  # by array, whether it has a leading axis of steps, of which each sees its own; none if empty

    @property
    def num_steps(self) -> int | None:
        """How many steps there are in the stack, if it is one."""
        return next((len(x) for x, has_steps in zip(self.dynamic, self.stacked, strict=False) if has_steps), None)

    def at(self, step: int) -> Any:
        """The arrays that a step sees."""
        return _at(self.dynamic, self.stacked, step)


class Steps:
    """The steps that a function proposes, compiled.

    :param propose: a pure function ``(state, dynamic, *, static) -> (new_state, loss, health)``, whose states are named tuples with
        at least the fields ``rng_key``, ``num_steps`` and ``num_skipped``.
    :param kept_by_step: fields of the state that the step itself leaves as they were where its health is bad.
    """

    def __init__(self, propose: Callable[..., Any], kept_by_step: frozenset[str] = frozenset()) -> None:
        self.kept_by_step = kept_by_step
        self.proposed = jax.jit(propose, static_argnames="static")  # inside the next three, so that it is traced once
        self.one = jax.jit(self._make_one, static_argnames="static")
        self.open_loop = jax.jit(self._make_open, static_argnames=("static", "collect", "stacked"))
        self.fixed_loop = jax.jit(
            self._make_fixed, static_argnames=("static", "collect", "length", "stacked"), donate_argnames="state"
        )

    # One step.

    def _make_one(self, state: State, stopped: Array, stable: Array, dynamic: Any, static: Rest) -> "Made":
        """One step by itself, compiled as the loop of its device compiles it."""
        plain = partial(self.proposed, static=static)
        _, loss, health = jax.eval_shape(plain, state, dynamic)

        def in_open_loop(state: State, dynamic: Any) -> tuple[State, Array, Health]:
            once = (state.num_steps >= 0).astype(jnp.int32)  # one step, which XLA cannot know and so takes out of no loop
            seen = self._advance(state, once, 1, health, Record(loss, None), lambda step: dynamic, static=static, collect=None)
            return seen.state, seen.record.loss[0], seen.health

        apart = jax.custom_jvp(in_open_loop)  # a while loop has no gradient, a step has
        apart.defjvp(partial(jax.jvp, plain))
        proposal = lax.platform_dependent(state, dynamic, cpu=apart, default=plain)
        return self._kept(proposal, state, stopped, stable)

    def _kept(self, proposal: tuple[State, Array, Health], state: State, stopped: Array, stable: Array) -> "Made":
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
        return Made(keep(~stopped, new, state), jnp.where(bad, jnp.nan, loss), health, stopped | (bad & ~stable))

    # Chunks of steps.

    def open_chunk(self, state: State, num_steps: int, call: Call, *, first: int = 0) -> tuple[State, "Record", dict[Part, int]]:
        """``num_steps`` steps, or those before the first bad one and what is bad about it.

        By a loop that ends where it likes, whose condition costs a CPU nothing. It keeps no old state, which costs more than many
        a step. Where a step is bad it is run again, to the state before.

        :param first: of a stack, the first of its steps to make.
        """
        records, done = [], 0
        while done < num_steps:
            start = state
            state, record, count, stopped = self._looped(start, first + done, num_steps - done, call)
            records.append(record)
            if stopped:
                before = self._looped(start, first + done, count, call)[0] if count else start
                made = self.one(before, np.False_, call.stable, call.at(first + done + count), call.static)
                if made.stopped:
                    return made.state, joined(records), _codes(jax.device_get(made.health))
                state = made.state
                records.append(jax.tree.map(lambda x: np.asarray(x)[None], _recorded(call.collect, made.loss, state)))
                done += 1
            done += count
        return state, joined(records), {}

    def _looped(self, state: State, first: int, num_steps: int, call: Call) -> tuple[State, "Record", int, bool]:
        """The open loop, and what the host looks at: the records, how many, and whether a bad step stopped it."""
        seen = self.open_loop(state, first, num_steps, call.dynamic, static=call.static, collect=call.collect, stacked=call.stacked)
        count, stopped = jax.device_get((seen.num_good, seen.stopped))
        return seen.state, jax.tree.map(lambda x: np.asarray(x)[:count].copy(), seen.record), int(count), bool(stopped)

    def _make_open(
        self, state: State, first: Array, num_steps: Array, dynamic: Any, *, static: Rest, collect: Any, stacked: tuple[bool, ...]
    ) -> "Advanced":
        _, loss, health = jax.eval_shape(partial(self.proposed, static=static), state, _at(dynamic, stacked, 0))
        record = jax.eval_shape(partial(_recorded, collect), loss, state)
        size = min(MAX_STEPS_PER_CALL, _fitting(record))
        seen = partial(_at, dynamic, stacked)
        return self._advance(
            state, num_steps, size, health, record, lambda done: seen(first + done), static=static, collect=collect
        )

    def _advance(
        self,
        state: State,
        num_steps: Array,
        size: int,
        health: Health,
        record: "Record",
        seen: Callable[[Array], Any],
        *,
        static: Rest,
        collect: Any,
    ) -> "Advanced":
        """Up to ``num_steps`` steps, as many as there is room for, or up to the first bad one, whose state is left as it is.

        :param health: of a step, its shapes.
        :param record: what is kept of a step, its shapes.
        :param seen: the arrays that a step sees, by its number.
        """

        def going(carry: Any) -> Array:
            done, _, _, health = carry
            return (done < num_steps) & (done < size) & ~is_bad(health)

        def body(carry: Any) -> Any:
            done, state, buffer, _ = carry
            new, loss, health = self.proposed(state, seen(done), static=static)
            new = new._replace(num_steps=state.num_steps + 1)
            row = _recorded(collect, loss, new)
            buffer = jax.tree.map(lambda kept, x: lax.dynamic_update_index_in_dim(kept, x, done, 0), buffer, row)
            return done + 1, new, buffer, health

        buffer, health = jax.tree.map(partial(_buffer, size), record), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), health)
        # A while loop, not a scan: its body is compiled alike whatever the number of steps.
        done, state, buffer, health = lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state, buffer, health))
        return Advanced(state, buffer, done - is_bad(health).astype(jnp.int32), is_bad(health), health)

    def fixed_chunk(
        self, state: State, num_steps: int, call: Call, *, length: int, first: int = 0
    ) -> tuple[State, "Record", dict[Part, int]]:
        """The same by loops of a fixed length and then by single steps, all of them queued before the host looks at any."""
        stopped: Any = np.False_
        seen: list[Seen] = []
        while num_steps:
            if num_steps >= length:
                state, stopped, steps = self.fixed_loop(
                    state,
                    stopped,
                    call.stable,
                    first,
                    call.dynamic,
                    static=call.static,
                    collect=call.collect,
                    length=length,
                    stacked=call.stacked,
                )
            else:
                before, made = stopped, self.one(state, stopped, call.stable, call.at(first), call.static)
                state, stopped = made.state, made.stopped
                steps = Seen(before, _recorded(call.collect, made.loss, state), made.health)
                steps = jax.tree.map(lambda x: jnp.asarray(x)[None], steps)
            seen.append(steps)
            count = length if num_steps >= length else 1
            num_steps, first = num_steps - count, first + count
        try:
            before, record, health = joined(jax.device_get(seen))
        except KeyboardInterrupt as stop:
            keep_state(stop, state)
            raise
        count = int((~before).sum()) - bool(stopped)  # the last of those that were tried is the bad one
        return state, jax.tree.map(lambda x: x[:count], record), _codes(jax.tree.map(lambda x: x[count], health)) if stopped else {}

    def _make_fixed(
        self,
        state: State,
        stopped: Array,
        stable: Array,
        first: Array,
        dynamic: Any,
        *,
        static: Rest,
        collect: Any,
        length: int,
        stacked: tuple[bool, ...],
    ) -> tuple[State, Array, "Seen"]:
        """``length`` steps, which all stay where they are after a bad one: no condition that a device would ask the host for."""

        def body(carry: tuple[State, Array], step: Array) -> tuple[tuple[State, Array], Seen]:
            state, stopped = carry
            made = self._kept(self.proposed(state, _at(dynamic, stacked, step), static=static), state, stopped, stable)
            seen = Seen(stopped, _recorded(collect, made.loss, made.state), made.health)
            return (made.state, made.stopped), seen

        (state, stopped), seen = lax.scan(body, (state, stopped), first + jnp.arange(length))
        return state, stopped, seen

    def loss(self, state: State, call: Call) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the loss of a step."""
        return jax.eval_shape(partial(self.proposed, static=call.static), state, call.at(0))[1]

    def length(self, state: State, call: Call, chunk_size: int | None) -> int:
        """Of the loop of fixed length in a run."""
        record = jax.eval_shape(partial(_recorded, call.collect), self.loss(state, call), state)
        return min(FIXED_LENGTH, chunk_size or FIXED_LENGTH, call.num_steps or FIXED_LENGTH, _fitting(record))


class Made(NamedTuple):
    """What a step made."""

    state: Any
    loss: Array
    health: Health
    stopped: Array  # (), bool: whether no more steps are to be made


class Record(NamedTuple):
    """What is kept of every step."""

    loss: Array
    collected: Any


class Advanced(NamedTuple):
    """What an open loop made."""

    state: Any  # after the last step, the bad one where there was one
    record: Record  # with a leading axis of steps
    num_good: Array  # (), int32: steps before a bad one
    stopped: Array  # (), bool: whether there was one
    health: Health  # of the last step


class Seen(NamedTuple):
    """What the host looks at after a chunk of fixed length, with a leading axis of steps."""

    stopped: Any  # bool, before the step
    record: Record
    health: Health


def keep_state(stop: Any, state: State) -> None:
    """Keeps the state of a run that the user stops, unless the device has overwritten it."""
    if not hasattr(stop, "state") and jax.process_count() == 1 and not any(x.is_deleted() for x in jax.tree.leaves(state)):
        stop.state = state
        stop.add_note(f"The state after {int(state.num_steps)} steps is in .state: run(..., init_state=...) goes on from it.")


def _at(dynamic: Any, stacked: tuple[bool, ...], step: Any) -> Any:
    """The arrays that a step sees of those that may have a leading axis of steps."""
    if not any(stacked):
        return dynamic
    return [lax.dynamic_index_in_dim(x, step, 0, False) if has_steps else x for x, has_steps in zip(dynamic, stacked, strict=True)]


def asks_the_host(*trees: Any) -> bool:
    """Whether the arrays are on a device that asks the host whether a loop goes on, or a branch is taken."""
    devices = {device.platform for x in jax.tree.leaves(trees) for device in x.devices()}
    return devices != {"cpu"}


def _buffer(size: int, x: jax.ShapeDtypeStruct) -> Array:
    """Room for ``size`` records, laid out over the devices as one of them is."""
    sharding = None if x.sharding is None else NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec))
    return jnp.zeros((size, *x.shape), x.dtype, out_sharding=sharding)


def _fitting(record: Record) -> int:
    """How many records fit into the buffer."""
    return max(1, MAX_BUFFER // sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(record)))


def joined(trees: Sequence[Any]) -> Any:
    """Records of chunks that follow each other, as of one."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *trees)


def _recorded(collect: Callable[[State], Any] | None, loss: Array, state: State) -> Record:
    """What is kept of a step: its loss and what ``collect`` returns, of a random key its numbers."""

    def numbers(x: Any) -> Array:
        x = jnp.asarray(x)
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return Record(loss, jax.tree.map(numbers, collect(state)) if collect else None)


def _codes(health: Any) -> dict[Part, int]:
    """What is bad, by host numbers."""
    return {part: int(code) for part, code in health.items() if code}
