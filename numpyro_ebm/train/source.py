# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Where the steps of a fit come from: stacks of minibatches as the programs see them, with what is kept of their rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.multihost_utils import process_allgather

from numpyro_ebm._pytree import arrays_and_rest, join
from numpyro_ebm.program.minibatch import Minibatch
from numpyro_ebm.train.devices import Sharding
from numpyro_ebm.train.health import NonFiniteError
from numpyro_ebm.train.row_store import RowStore
from numpyro_ebm.train.stacks import Stack, Stacks, is_array
from numpyro_ebm.train.steps import Call
from numpyro_ebm.train.svi import SVIProgress, plain

State = Any


class Data:
    """How the programs are called with minibatches."""

    def __init__(self, learner: Any, always: tuple[tuple[Any, ...], dict[str, Any]], sharding: Sharding | None) -> None:
        self.learner, self.sharding, self.given = learner, sharding, always
        self.shared = sharding if sharding is not None and sharding.is_shared else None  # where several processes have the devices
        if sharding is not None:
            sharding.require_agreement("args, kwargs", always)
        placed: tuple[tuple[Any, ...], dict[str, Any]] = always if sharding is None else sharding.replicate(always)
        self.args, self.kwargs = placed

    def of(self, batch: Minibatch) -> Minibatch:
        """A minibatch with the arguments that are the same in every step."""
        return batch._replace(args=(*batch.args, *self.args), kwargs={**self.kwargs, **batch.kwargs})

    def first(self, part: Minibatch) -> tuple[Minibatch, Minibatch]:
        """The first minibatch whole, of the part that this process has; and with the arguments of all steps, to start from."""
        if self.shared is None:
            return part, self.of(part)
        batch = self.shared.whole(part)
        args, kwargs = self.given  # every process starts by itself, from the same
        return batch, batch._replace(args=(*batch.args, *args), kwargs={**kwargs, **batch.kwargs})

    def rows(self, batch: Minibatch) -> Minibatch:
        """A minibatch to look at, which every process has whole."""
        return self.of(batch if self.shared is None else self.shared.replicate(batch))

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
        (index, args), kwargs = self.sharding.place_data(
            (index, args), kwargs, num_rows, has_steps=True, is_part=self.shared is not None
        )
        return index, args, kwargs


class RowSource:
    """The minibatches of a fit, and what is kept of their rows: where the steps of the loop come from."""

    def __init__(
        self, data: Data, stacks: Stacks, stable: np.bool_, rows: RowStore | None, rng_key: Array, first: Minibatch, start: State
    ) -> None:
        self.data, self.stacks, self.stable, self.rows, self.rng_key = data, stacks, stable, rows, rng_key
        self.start = None if rows is None else start.params  # at which rows get their particles, as in a run in memory
        self.stack: Stack | None = None
        self.at, self.done = 0, 0  # the next step within the stack, and of all
        self._position = stacks.stream.position()
        self._failed: tuple[str, int] | None = None  # of rows whose particles cannot start: what to say, and the step
        self.call = self.call_of(first)

    def call_of(self, first: Minibatch) -> Call:
        """What a step sees, of a minibatch alone."""
        return self.data.call(own_places(first) if self.rows is not None else first, self.stable, is_stack=False)

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
        stack = self._next_stack()  # what it raises leaves the position at the end of the stack before
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

    def _next_stack(self) -> Stack:
        """The next stack, of as many minibatches in all processes: one that waited for more would wait for ever.

        :raises RuntimeError: if the source of another process has raised.
        """
        if self.data.shared is None:
            return self.stacks.next()
        stack, raised = None, None
        try:
            stack = self.stacks.next()
        except Exception as error:
            raised = error
        count = stack.num_batches if stack is not None else 0 if isinstance(raised, StopIteration) else -1
        least = int(np.min(process_allgather(np.asarray(count))))
        if count < 0 and raised is not None:
            raise raised
        if least < 0:
            raise RuntimeError("the source of another process has raised an error, which ends the fit in all: see what it printed.")
        if not least:
            raise StopIteration
        assert stack is not None
        return stack._replace(num_batches=least)

    def _begin(self, state: State, stack: Stack) -> int:
        """Particles for the rows that are seen for the first time; how many minibatches there are before one that has bad rows."""
        assert self.rows is not None
        assert stack.rows is not None
        arrays_of_all, rest = arrays_and_rest((stack.batch.args, stack.batch.kwargs))
        for i in range(stack.num_batches):
            if self.rows.fresh(stack.rows[i]).any():
                key, arrays = _of_one(self.rng_key, self.done - self.at + i, arrays_of_all, i)
                args, kwargs = join(arrays, rest)
                one = self.data.of(own_places(Minibatch(jnp.asarray(stack.rows[i]), args, kwargs)))
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
        return with_parts(state, parts_of(tree["state"], self.rows))

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


@jax.jit
def _of_one(rng_key: Array, step: Array, arrays: list[Array], at: Array) -> tuple[Array, list[Array]]:
    """The key and the arrays of one minibatch of a stack, by one program: one by one they take as long as all else."""
    return jax.random.fold_in(rng_key, step), [x[at] for x in arrays]


def own_places(batch: Minibatch) -> Minibatch:
    """A minibatch whose rows are all that there are on the device."""
    return batch._replace(places=np.arange(len(batch.index), dtype=np.int32))


def parts_of(state: State, rows: RowStore | None, learner: Any = None) -> dict[str, Any]:
    """The fields of a state without those that have a row for all data."""
    kept = getattr(learner, "kept_by_step", ()) if rows is None else {field.path[0].key for field in rows.fields}
    return {name: value for name, value in state._asdict().items() if name not in kept}


def with_parts(state: State, parts: dict[str, Any]) -> State:
    """A state with these fields."""
    return state._replace(**parts)
