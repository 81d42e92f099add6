# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Minibatches in stacks, read and brought to the device by a thread while the device works on the stack before.

A chunk of steps sees one stack, whose length is always the same, so that there is one program. Stacks begin at the same steps in
every run: one that goes on from a checkpoint sees those that it would have seen.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ebm.program.minibatch import Minibatch
from numpyro_ebm.train.batches import Position, Stream

MAX_BYTES, MAX_STEPS = 2**24, 128  # of a stack
AHEAD = 2  # stacks that wait

Place = Callable[[Any], Any]  # brings a pytree of stacked NumPy arrays to the device


class Stack(NamedTuple):
    """Minibatches of consecutive steps."""

    #: the arguments of the model, arrays of them on the device and with a leading axis of steps
    batch: Minibatch
    #: (num_steps, B) which rows they are, on the host; None where that is not known
    rows: np.ndarray | None
    #: minibatches, without those that only fill it
    num_batches: int
    #: where the first of them is in the source
    position: Position


class Stacks:
    """The stacks of a source, in a context that ends the thread.

    :param stream: of minibatches.
    :param place: what brings stacked arrays to the device.
    :param first: a minibatch, which all are alike to.
    :param num_steps: minibatches in a stack; as many as fit if not given.
    """

    def __init__(self, stream: Stream, place: Place, first: Minibatch, num_steps: int | None = None) -> None:
        self.stream, self.place, self.first = stream, place, first
        self.shapes = shapes_of(first)
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves((first.args, first.kwargs)) if hasattr(x, "__array__"))
        self.num_steps = num_steps or max(1, min(MAX_STEPS, MAX_BYTES // max(size, 1)))
        self._made: queue.Queue[Stack | BaseException] = queue.Queue(AHEAD)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._work, name="numpyro_ebm.fit", daemon=True)

    def __enter__(self) -> "Stacks":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ends.set()
        while not self._made.empty():  # room for the stack that is made now, which would wait
            self._made.get_nowait()
        self._thread.join(timeout=5.0)  # a source may hang

    def next(self) -> Stack:
        """The next stack.

        :raises StopIteration: if there are no more.
        :raises Exception: what the source raises, after the stacks that it gave before.
        """
        while True:
            try:
                made = self._made.get(timeout=0.1)  # so that a signal is seen
            except queue.Empty:
                continue
            if isinstance(made, BaseException):
                self._made.put(made)  # and the next time again
                raise made
            return made

    def _work(self) -> None:
        try:
            while not self._ends.is_set():
                self._give(self._stack())
        except BaseException as error:
            self._give(error)

    def _stack(self) -> Stack:
        position, batches, failed = self.stream.position(), list[Minibatch](), None
        while len(batches) < self.num_steps and failed is None:
            try:
                batch = self.stream.next()
                require_same_shapes(self.shapes, batch)
                batches.append(batch)
            except Exception as error:
                failed = error
        if not batches and failed is not None:
            raise failed
        count = len(batches)
        stack = Stack(*_stacked(batches + [batches[-1]] * (self.num_steps - count), self.place), count, position)
        if failed is not None:
            self._give(stack)
            raise failed
        return stack

    def _give(self, made: Any) -> None:
        while not self._ends.is_set():
            try:
                return self._made.put(made, timeout=0.1)
            except queue.Full:
                continue


def _stacked(batches: list[Minibatch], place: Place) -> tuple[Minibatch, np.ndarray | None]:
    first = batches[0]
    index = None if first.index is None else np.stack([np.asarray(batch.index) for batch in batches])

    def stack(*leaves: Any) -> Any:
        return np.stack([np.asarray(x) for x in leaves]) if is_array(leaves[0]) else leaves[0]

    args, kwargs = jax.tree.map(stack, *((batch.args, batch.kwargs) for batch in batches))
    placed, args, kwargs = place((None if index is None else index.astype(np.int32), args, kwargs))
    return Minibatch(placed, args, kwargs), index


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a minibatch differs from batch to batch."""
    return hasattr(leaf, "__array__") and not isinstance(leaf, np.generic)


def shapes_of(batch: Minibatch) -> Any:
    """What all minibatches have in common: shapes and dtypes of arrays, and the rest as it is."""

    def shape(leaf: Any) -> Any:
        return (np.shape(leaf), np.asarray(leaf).dtype) if is_array(leaf) else leaf

    leaves, structure = jax.tree.flatten((batch.args, batch.kwargs))
    return structure, [shape(leaf) for leaf in leaves], None if batch.index is None else np.shape(batch.index)


def require_same_shapes(wanted: Any, batch: Minibatch) -> None:
    """Refuses a minibatch of other shapes than the first, for which all would be compiled again.

    :raises ValueError: with both shapes.
    """
    given = shapes_of(batch)
    if given[0] != wanted[0]:
        raise ValueError(f"a batch of the source has other parts than the first: {given[0]}, not {wanted[0]}.")
    if given != wanted:
        pairs = [(a, b) for a, b in zip(given[1], wanted[1], strict=True) if a != b] or [(given[2], wanted[2])]
        raise ValueError(
            f"a batch of the source has an argument of {_told(pairs[0][0])}, and the first had {_told(pairs[0][1])}. All must be "
            "alike: leave the last, smaller batch of an epoch out (drop_last=True of PyTorch's DataLoader, drop_remainder=True "
            "elsewhere)."
        )


def _told(shape: Any) -> str:
    if isinstance(shape, tuple) and len(shape) == 2 and isinstance(shape[0], tuple):
        return f"shape {shape[0]} and dtype {shape[1]}"
    return f"{shape!r}"
