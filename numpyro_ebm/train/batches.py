# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Minibatches from data that are larger than memory, or that another library loads; and where in them a run is."""

import base64
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from jax import Array

from numpyro_ebm._checks import require_bool, require_count
from numpyro_ebm.program.minibatch import Minibatch

Position = dict[str, Any]  # which JSON can hold


class Batches:
    """Minibatches of arrays, in an order that depends on a seed alone.

    Arrays are whatever has ``len`` and gives rows by their indices: NumPy's, memory-mapped files, datasets of HDF5 or Zarr, lists
    of rows. A row is read when a step needs it.

    An epoch shows every row once, in a new order, but for less than ``batch_size`` rows that are left over, other ones in every
    epoch. Without shuffling the rows go round: those that are left over begin the next batch.

    :param arrays: arguments of the model, with equally many rows.
    :param int batch_size: rows per batch.
    :param dict kwargs: arguments of the model by name, with as many rows.
    :param shuffle: whether every epoch has the rows in another order: True for any order, which keeps 8 bytes per row in memory;
        ``"batches"`` for batches of neighboring rows in any order, for files that are slow to jump in; False for none.
    :param int seed: of the order.
    :raises ValueError: for arrays of different lengths, or less than ``batch_size`` rows.
    :raises TypeError: for what has no length.

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_ebm import Batches
        >>> batches = Batches(np.arange(10.0), batch_size=4, seed=0)
        >>> batches.num_rows, len(batches)
        (10, 2)
        >>> [batch.args[0].shape for batch in batches]
        [(4,), (4,)]
    """

    def __init__(
        self,
        *arrays: Any,
        batch_size: int,
        kwargs: Mapping[str, Any] | None = None,
        shuffle: bool | str = True,
        seed: int = 0,
    ) -> None:
        self.arrays, self.kwargs = arrays, dict(kwargs or {})
        self.batch_size = require_count("batch_size", batch_size)
        self.shuffle = shuffle if shuffle == "batches" else require_bool("shuffle", shuffle)
        self.seed = require_count("seed", seed, least=0)
        named = {f"array {i}": x for i, x in enumerate(arrays)} | {f"'{name}'": x for name, x in self.kwargs.items()}
        if not named:
            raise ValueError("Batches needs at least one array: Batches(y, batch_size=...).")
        sizes = {name: _length(name, x) for name, x in named.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise ValueError(f"the arrays have different numbers of rows: {told}.")
        #: rows of the data
        self.num_rows: int = next(iter(sizes.values()))
        if self.num_rows < self.batch_size:
            raise ValueError(f"batch_size={self.batch_size} is more than the {self.num_rows} rows of the data.")
        self._epoch: tuple[int, np.ndarray] | None = None  # its number, and the order of its rows or batches

    def __repr__(self) -> str:
        settings = f"batch_size={self.batch_size}, shuffle={self.shuffle!r}, seed={self.seed}"
        return f"Batches({self.num_rows} rows, {settings})"

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[Minibatch]:
        return (self.at(step) for step in range(len(self)))

    def at(self, step: int, part: tuple[int, int] = (0, 1)) -> Minibatch:
        """The minibatch of a step, counted from 0 over all epochs.

        :param part: which of how many equal parts of it, for processes that each read their own.
        """
        index = self._index(step)
        which, num_parts = part
        size, left = divmod(len(index), num_parts)
        if left:
            raise ValueError(f"batch_size={self.batch_size} does not divide by the {num_parts} processes: take a multiple.")
        index = index[which * size : (which + 1) * size]
        args = tuple(_rows(f"array {i}", x, index) for i, x in enumerate(self.arrays))
        return Minibatch(index, args, {name: _rows(f"'{name}'", x, index) for name, x in self.kwargs.items()})

    def _index(self, step: int) -> np.ndarray:
        if self.shuffle is False:
            return (step * self.batch_size + np.arange(self.batch_size)) % self.num_rows
        epoch, step = divmod(step, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            numbers = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch]))
            if self.shuffle == "batches":
                first = numbers.integers(self.num_rows)  # so that not always the same rows are left over
                self._epoch = epoch, (first + self.batch_size * numbers.permutation(len(self))) % self.num_rows
            else:
                self._epoch = epoch, numbers.permutation(self.num_rows)
        order = self._epoch[1]
        if self.shuffle == "batches":
            return (order[step] + np.arange(self.batch_size)) % self.num_rows
        return order[step * self.batch_size : (step + 1) * self.batch_size]


def minibatch_from(item: Any) -> Minibatch:
    """What a loader gives, as a minibatch: ``(index, args, kwargs)``, an array, a tuple or list of them, or a dictionary."""
    if isinstance(item, Minibatch):
        return item
    is_named = isinstance(item, tuple) and len(item) == 3 and isinstance(item[1], tuple) and isinstance(item[2], dict)
    if is_named:
        index, args, kwargs = item
        return Minibatch(None if index is None else np.asarray(index), args, kwargs)
    if isinstance(item, Mapping):
        return Minibatch(None, (), dict(item))
    return Minibatch(None, tuple(item) if isinstance(item, (tuple, list)) else (item,), {})


class Stream(Protocol):
    """Minibatches one after another, and where in them a run is."""

    @property
    def num_rows(self) -> int | None:
        """Rows of the data, if that is known."""

    def peek(self) -> Minibatch:
        """The first one, which is still to come."""

    def next(self) -> Minibatch:
        """The next one.

        :raises StopIteration: if there are no more.
        """

    def position(self) -> Position:
        """Where the next one is."""

    def seek(self, position: Position, ahead: int) -> None:
        """Goes on from there.

        :param ahead: how many of those that follow the run has seen too.
        """


def stream_of(source: Any, num_epochs: int | None, part: tuple[int, int] = (0, 1)) -> Stream:
    """The minibatches of :class:`Batches`, or of anything that can be iterated.

    :param part: which of how many equal parts of those of :class:`Batches` this process reads; others give each its own.
    :raises TypeError: for what cannot be.
    """
    if isinstance(source, Batches):
        return _Indexed(source, num_epochs, part)
    if isinstance(source, (Array, np.ndarray)):
        raise TypeError("batches must be Batches(array, batch_size=...) or an iterable of minibatches, got an array.")
    if not isinstance(source, Iterable):
        raise TypeError(f"batches must be Batches or an iterable of minibatches, got a {type(source).__name__}.")
    return _Iterated(source, num_epochs)


class _Indexed:
    """Of :class:`Batches`, whose position is a number."""

    def __init__(self, batches: Batches, num_epochs: int | None, part: tuple[int, int]) -> None:
        self.batches, self.num_rows, self.step = batches, batches.num_rows, 0
        self.end = None if num_epochs is None else num_epochs * len(batches)
        self.part = part

    def peek(self) -> Minibatch:
        return self.batches.at(0, self.part)

    def next(self) -> Minibatch:
        if self.end is not None and self.step >= self.end:
            raise StopIteration
        self.step += 1
        return self.batches.at(self.step - 1, self.part)

    def position(self) -> Position:
        return {"step": self.step}

    def seek(self, position: Position, ahead: int) -> None:
        self.step = position["step"]


class _Iterated:
    """Of an iterable, which begins again if it can; or an iterator, which ends."""

    num_rows = None

    def __init__(self, source: Iterable[Any], num_epochs: int | None) -> None:
        self.source, self.num_epochs = source, num_epochs
        self.iterator, self.epoch, self.step = iter(source), 0, 0
        self.begins_again = self.iterator is not source
        self._held: tuple[Position, Minibatch] | None = None  # read and not yet given, and where it was

    def peek(self) -> Minibatch:
        position = self.position()
        self._held = position, self.next()
        return self._held[1]

    def next(self) -> Minibatch:
        if self._held is not None:
            (_, batch), self._held = self._held, None
            return batch
        try:
            item = next(self.iterator)
        except StopIteration:
            if self.step == 0 and self.begins_again:
                raise ValueError(f"the source, a {type(self.source).__name__}, has no batches.") from None
            if not self.begins_again or self.epoch + 1 == self.num_epochs:
                raise
            self.iterator, self.epoch, self.step = iter(self.source), self.epoch + 1, 0
            return self.next()
        self.step += 1
        return minibatch_from(item)

    def position(self) -> Position:
        if self._held is not None:
            return self._held[0]
        position: Position = {"epoch": self.epoch, "step": self.step}
        if hasattr(self.iterator, "get_state"):
            state = self.iterator.get_state()
            position["state"] = {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else state
        return position

    def seek(self, position: Position, ahead: int) -> None:
        if self.begins_again:
            self.iterator, self._held = iter(self.source), None
        if "state" in position:
            self._held = None
            self.epoch, self.step = position["epoch"], position["step"]
            state = position["state"]
            is_bytes = isinstance(state, dict) and set(state) == {"base64"}
            self.iterator.set_state(base64.b64decode(state["base64"]) if is_bytes else state)  # type: ignore[attr-defined]
            return
        num_read = position["step"]
        if num_read + ahead:
            warnings.warn(
                f"the source, a {type(self.source).__name__}, cannot say where it is: {num_read + ahead} batches are read and "
                "thrown away. "
                "The rows that follow are those that would have followed only if it gives the same order each time; Batches, or "
                "loaders with get_state and set_state, do not need to.",
                stacklevel=4,
            )
        self.epoch, self.step = position["epoch"], int(self._held is not None)
        for _ in range(num_read):
            try:
                self.next()
            except StopIteration:
                raise ValueError(
                    f"the source, a {type(self.source).__name__}, has fewer batches than the {num_read} that the run had read."
                ) from None


def _length(name: str, x: Any) -> int:
    try:
        return len(x)
    except TypeError:
        raise TypeError(f"{name} of Batches, a {type(x).__name__}, has no length: give an array of rows.") from None


def _rows(name: str, x: Any, index: np.ndarray) -> np.ndarray:
    if isinstance(x, (np.ndarray, Array)):
        return np.asarray(x[index])
    order = np.argsort(index)  # files are read forwards, and HDF5 takes nothing else
    try:
        read = np.asarray(x[index[order]])
    except Exception:
        try:
            read = np.stack([np.asarray(x[int(i)]) for i in index[order]])
        except Exception as error:
            raise TypeError(
                f"{name} of Batches, a {type(x).__name__}, gives no rows by x[indices] or x[i]: pass np.asarray(x)."
            ) from error
    rows = np.empty_like(read)
    rows[order] = read
    return rows
