# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""A pytree as a list of named arrays, each with a checksum: what is written to disk, and what is asked of it when it is read.

What is on disk says of every leaf where it is in the tree, which kind of array it is (JAX's, NumPy's, a typed random key, a number
of Python), its dtype and its shape. The structure itself, with its empty tuples and named tuples, is that of the reader's tree.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MAX_LINES = 20  # of what differs that an error lists
KINDS = {bool: "bool", int: "int", float: "float"}  # of Python's numbers


class Leaf(NamedTuple):
    """What is said of a leaf of a pytree beside its numbers."""

    path: str
    kind: str  # jax, numpy, or one of KINDS; of a typed key "key" and its implementation
    dtype: str  # of the numbers; of a typed key those of its data
    shape: tuple[int, ...]  # likewise
    checksum: int = 0

    def __str__(self) -> str:
        if self.kind in KINDS.values():
            return f"a Python {self.kind}"
        if self.kind.startswith("key "):
            return f"{self.kind[4:]} random key of shape {self.shape[:-1]}"
        return f"{self.dtype} of shape {self.shape}"


class OpenLength(NamedTuple):
    """Asks for a NumPy array whose first axis is as long as it was saved, as the losses so far are."""

    dtype: Any
    shape: tuple[int, ...] = ()  # without the first axis


def leaves_of(tree: Any) -> list[tuple[Leaf, Any]]:
    """Every leaf of a pytree of arrays, described, and its numbers: of a typed key its data; NumPy's as they are.

    :raises TypeError: for a leaf that holds no numbers, naming it.
    """
    return [_leaf(jax.tree_util.keystr(path), value) for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]]


def on_host(numbers: Any) -> Any:
    """A copy of an array that nothing changes; the array itself where it is on disk, or spread over processes."""
    if isinstance(numbers, np.memmap) or is_spread(numbers):
        return numbers
    host = np.array(numbers, order="C")  # a copy: the device may write its next state over a view
    return host.astype(host.dtype.newbyteorder("="), copy=False)


def is_spread(numbers: Any) -> bool:
    """Whether other processes have a part of an array that this one has not."""
    return isinstance(numbers, Array) and not (numbers.is_fully_addressable or numbers.is_fully_replicated)


def checksum(numbers: Any) -> int:
    """Of the bytes of an array, whatever it is sharded over."""
    if is_spread(numbers):
        return int(_sum_of_bits(numbers))
    if isinstance(numbers, np.memmap) and numbers.size and not numbers.flags.c_contiguous:  # block by block, as memory has no room
        found = 0
        for block in np.nditer(numbers, ["external_loop", "buffered"], order="C", buffersize=2**20):
            found = zlib.crc32(bytes_of(block), found)
        return found
    return zlib.crc32(bytes_of(numbers))


def bytes_of(numbers: Any) -> memoryview:
    """The bytes of an array, without a copy if they lie in order."""
    return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data


def read_leaves(fields: Sequence[Any]) -> list[Leaf]:
    """What JSON gives back of descriptions."""
    return [Leaf(path, kind, dtype, tuple(shape), crc) for path, kind, dtype, shape, crc in fields]


def require_same(what: str, fix: str, saved: Sequence[Leaf], wanted: Any) -> None:
    """Refuses what was saved from another pytree.

    :param str what: what holds it, for the message: ``"the checkpoint 'runs/a/step_100'"``.
    :param wanted: a pytree of arrays, of their shapes and dtypes (:func:`jax.eval_shape`) or of :class:`OpenLength`.
    :raises ValueError: naming each leaf that differs, with both shapes.
    """
    here = {leaf.path: (leaf, value) for leaf, value in _wanted(wanted)}
    there = {leaf.path: leaf for leaf in saved}
    lines = [f"{path}: saved {leaf}, here missing" for path, leaf in there.items() if path not in here]
    for path, (leaf, value) in here.items():
        if path not in there:
            lines.append(f"{path}: not saved, here {leaf}")
        elif not _fits(there[path], leaf, value):
            lines.append(f"{path}: saved {there[path]}, here {leaf}")
    if lines:
        raise ValueError(f"{what} holds other arrays:\n{listed(lines)}\n{fix}")


def listed(lines: Sequence[str]) -> str:
    """The lines of an error, as many as one reads."""
    more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:MAX_LINES], *more])


def rebuilt(saved: Sequence[Leaf], numbers: dict[str, Any], wanted: Any) -> Any:
    """The pytree ``wanted`` with the numbers that were saved, by path, where and as what they were."""
    by_path = {leaf.path: leaf for leaf in saved}
    paths, structure = jax.tree_util.tree_flatten_with_path(wanted, is_leaf=_is_open)
    keyed = [(jax.tree_util.keystr(path), value) for path, value in paths]
    return jax.tree.unflatten(structure, [_placed(by_path[path], numbers[path], value) for path, value in keyed])


def _leaf(path: str, value: Any) -> tuple[Leaf, Any]:
    kind = KINDS.get(type(value)) or ("numpy" if isinstance(value, np.ndarray | np.generic) else "jax")
    if isinstance(value, jax.ShapeDtypeStruct | Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        if isinstance(value, Array):
            return _key(path, str(jax.random.key_impl(value)), jax.random.key_data(value))
        return _key(path, str(value.dtype), jax.eval_shape(jax.random.key_data, value))
    if isinstance(value, jax.ShapeDtypeStruct):
        return Leaf(path, kind, value.dtype.name, tuple(value.shape)), value
    numbers = value if isinstance(value, Array | np.ndarray) else np.asarray(value)
    if not (numbers.dtype == bool or jnp.issubdtype(numbers.dtype, jnp.number)):
        raise TypeError(
            f"the leaf {path}, a {type(value).__name__} of dtype {numbers.dtype}, holds no numbers and cannot be saved."
        )
    return Leaf(path, kind, numbers.dtype.name, tuple(numbers.shape)), numbers


def _key(path: str, implementation: str, data: Any) -> tuple[Leaf, Any]:
    return Leaf(path, f"key {implementation}", data.dtype.name, tuple(data.shape)), data


def _is_open(value: Any) -> bool:
    return isinstance(value, OpenLength)


def _wanted(tree: Any) -> list[tuple[Leaf, Any]]:
    described = []
    for path, value in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_open)[0]:
        name = jax.tree_util.keystr(path)
        leaf = Leaf(name, "numpy", np.dtype(value.dtype).name, (-1, *value.shape)) if _is_open(value) else _leaf(name, value)[0]
        described.append((leaf, value))
    return described


def _fits(saved: Leaf, wanted: Leaf, value: Any) -> bool:
    if _is_open(value):
        return saved.dtype == wanted.dtype and len(saved.shape) == len(wanted.shape) and saved.shape[1:] == wanted.shape[1:]
    if wanted.kind.startswith("key "):  # the run goes on with the kind of key that it had, a raw one of an old program too
        return saved.dtype == "uint32" and saved.shape[:-1] == wanted.shape[:-1]
    return (saved.dtype, saved.shape) == (wanted.dtype, wanted.shape) and (saved.kind in KINDS.values()) == (
        wanted.kind in KINDS.values()
    )


def _placed(leaf: Leaf, numbers: Any, wanted: Any) -> Any:
    if leaf.kind in KINDS.values():
        return numbers.item()
    sharding = _sharding(wanted)
    if isinstance(wanted, np.generic):
        return numbers[()]
    if isinstance(wanted, np.ndarray | OpenLength) or (leaf.kind == "numpy" and not isinstance(wanted, Array) and sharding is None):
        return numbers
    if is_spread(numbers):
        return numbers
    if sharding is not None and not sharding.is_fully_addressable:  # every process has the numbers, and lays out its part
        laid_out = jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])
        return jax.random.wrap_key_data(laid_out, impl=leaf.kind[4:]) if leaf.kind.startswith("key ") else laid_out
    if leaf.kind.startswith("key "):
        key = jax.random.wrap_key_data(jnp.array(numbers), impl=leaf.kind[4:])
        return key if sharding is None else jax.device_put(key, sharding)
    # a copy: the device may not write over NumPy's memory
    return jnp.array(numbers) if sharding is None else jax.device_put(numbers, sharding, may_alias=False)


def _sharding(wanted: Any) -> Any:
    """Where an array is to be, if that is said: an array that is just on the default device may go wherever it is needed."""
    is_free = isinstance(wanted, Array) and not wanted.committed
    return None if is_free else getattr(wanted, "sharding", None)


@jax.jit
def _sum_of_bits(numbers: Array) -> Array:
    """A checksum that is the same for any layout over devices: a sum of the bits, weighted by position, modulo 2^32."""
    if jnp.iscomplexobj(numbers):
        return _sum_of_bits(numbers.real) + 3 * _sum_of_bits(numbers.imag)
    size = numbers.dtype.itemsize
    bits = numbers if numbers.dtype == bool else lax.bitcast_convert_type(numbers, jnp.dtype(f"uint{8 * min(size, 4)}"))
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, length in enumerate(bits.shape):
        position = position * length + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # weights that are linear in the position would not see two numbers that move towards each other
    mixed = position * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x85EBCA77)
    return jnp.sum(bits.astype(jnp.uint32) * (mixed ^ (mixed >> 13) | 1), dtype=jnp.uint32)
