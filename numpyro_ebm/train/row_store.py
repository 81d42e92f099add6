# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What an engine keeps for every row of the data, on the host or on disk: the device holds the rows of one stack of minibatches.

Between two visits of a row nothing happens to what is kept for it, but for noise that an engine gives to all rows in every step:
a sum of independent normal numbers, which is made up for in one when the row is visited again. It has the same distribution and
other random numbers.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

State = Any

MAX_ROWS = 2**14  # that are looked at at once


class _Field(NamedTuple):
    """One array of the state, with a row for all data."""

    path: Any
    axis: int  # of the rows
    site: str | None  # that noise is given to, if it is


class RowStore:
    """The rows of the fields of states that have one for all data.

    :param state: a state with some rows.
    :param axes: by field of the state, the axes of the rows in its leaves, or None.
    :param num_rows: of the data.
    :param folder: where to keep them in files; in the host's memory if not given.
    """

    def __init__(self, state: State, axes: dict[str, Any], num_rows: int, folder: Path | None = None) -> None:
        self.num_rows = num_rows
        self.fields: list[_Field] = []
        self.arrays: list[np.ndarray] = []  # (num_rows, ...), the axis of rows first
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        trees = {name: getattr(state, name) for name in axes}
        leaves = jax.tree_util.tree_flatten_with_path(trees)[0]
        where = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
        for i, ((path, leaf), axis) in enumerate(zip(leaves, where, strict=True)):
            if not isinstance(axis, int):
                continue
            shape = (num_rows, *np.delete(leaf.shape, axis))
            if folder is None:
                array = np.zeros(shape, leaf.dtype)
            else:
                array = np.memmap(folder / f"rows_{i}.bin", leaf.dtype, "w+", shape=shape)
            self.arrays.append(array)
            site = path[1].key if path[0].key == "particles" else None
            self.fields.append(_Field(path, axis, site))
        self.visited = np.zeros(num_rows, bool)
        self.noise: dict[str, float] = {f.site: 0.0 for f in self.fields if f.site}  # variance that a row at rest has got so far
        self.noise_then = {site: np.zeros(num_rows) for site in self.noise}  # when each row was here last
        self._rows, self._size = np.empty(0, int), 0  # those that are on the device, and how many have room there

    @property
    def num_on_device(self) -> int:
        """Rows that the device has room for."""
        return self._size

    def tree(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, beside :meth:`over` of the state."""
        noise = {site: np.float64(x) for site, x in self.noise.items()}
        return {"visited": self.visited, "noise": noise, "noise_then": self.noise_then}

    def over(self, state: State) -> State:
        """A state with the rows of all data, which stay on the host."""
        for field, array in zip(self.fields, self.arrays, strict=True):
            state = _with_leaf(state, field.path, np.moveaxis(array, 0, field.axis))
        return state

    def load(self, state: State, tree: dict[str, Any] | None = None) -> None:
        """Takes over a state with the rows of all data."""
        for field, array in zip(self.fields, self.arrays, strict=True):
            given = np.moveaxis(np.asarray(_leaf(state, field.path)), field.axis, 0)
            if not np.shares_memory(array, given):  # as what a checkpoint is read into does
                array[:] = given
        self.visited[:] = True if tree is None else tree["visited"]
        if tree is not None:
            self.noise = {site: float(x) for site, x in tree["noise"].items()}
            self.noise_then = {site: np.array(x) for site, x in tree["noise_then"].items()}

    def fresh(self, index: np.ndarray) -> np.ndarray:
        """Which of these rows have never been visited."""
        return ~self.visited[index]

    def begin(self, index: np.ndarray, state: State) -> None:
        """Puts rows in that are visited for the first time.

        :param index: (B,) which rows they are.
        :param state: a state that holds these rows.
        """
        new = self.fresh(index)
        for field, array in zip(self.fields, self.arrays, strict=True):
            array[index[new]] = np.moveaxis(np.asarray(_leaf(state, field.path)), field.axis, 0)[new]
        self.visited[index] = True
        for site, then in self.noise_then.items():
            then[index[new]] = self.noise[site]

    def take(self, state: State, index: np.ndarray, rng_key: Array) -> tuple[State, np.ndarray]:
        """The state with the rows of a stack on the device, as many in every stack.

        :param index: (num_steps, B) which rows they are.
        :return: the state, and (num_steps, B) at which places of it the rows are.
        """
        self._rows, places = np.unique(index, return_inverse=True)
        size = min(index.size, self.num_rows)
        self._size = size
        padded = np.concatenate([self._rows, np.repeat(self._rows[:1], size - len(self._rows))])
        numbers = np.random.Generator(np.random.Philox(key=np.asarray(jax.random.key_data(rng_key)).ravel()[:2].astype(np.uint64)))
        for field, array in zip(self.fields, self.arrays, strict=True):
            rows = np.asarray(array[padded])
            if field.site is not None and self.noise[field.site]:
                variance = np.maximum(self.noise[field.site] - self.noise_then[field.site][padded], 0)
                scale = np.sqrt(variance).astype(rows.dtype).reshape(-1, *(1,) * (rows.ndim - 1))
                if scale.any():
                    rows = rows + scale * numbers.standard_normal(rows.shape).astype(rows.dtype)
            state = _with_leaf(state, field.path, jnp.asarray(np.moveaxis(rows, 0, field.axis)))
        return state, places.reshape(index.shape).astype(np.int32)

    def put(self, state: State) -> None:
        """Takes over the rows that are on the device, which stay there."""
        for field, array in zip(self.fields, self.arrays, strict=True):
            array[self._rows] = np.moveaxis(np.asarray(_leaf(state, field.path)), field.axis, 0)[: len(self._rows)]
        for site, then in self.noise_then.items():
            then[self._rows] = self.noise[site]

    def rest(self, noise: dict[str, float]) -> None:
        """Learns the variance of the noise of the rows at rest in some steps."""
        for site, variance in noise.items():
            if site in self.noise:
                self.noise[site] += variance

    def whole(self, state: State, rng_key: Array) -> State:
        """The same as :meth:`over`, with the noise that rows at rest still lack."""
        for start in range(0, self.num_rows if any(self.noise.values()) else 0, MAX_ROWS):
            rows = np.arange(start, min(start + MAX_ROWS, self.num_rows))
            self.put(self.take(state, rows[None], jax.random.fold_in(rng_key, start))[0])
        return self.over(state)


def _leaf(state: State, path: Any) -> Any:
    part = getattr(state, path[0].key)
    return next(leaf for at, leaf in jax.tree_util.tree_flatten_with_path(part)[0] if at == path[1:])


def _with_leaf(state: State, path: Any, value: Any) -> State:
    name = path[0].key
    part = jax.tree_util.tree_map_with_path(lambda at, leaf: value if at == path[1:] else leaf, getattr(state, name))
    return state._replace(**{name: part})
