# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""A pytree taken apart into what is traced, its arrays, and what is compiled in, the rest."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Rest(NamedTuple):
    """What of a pytree is not an array. Hashable if its parts are, and equal where these are equal and of one type."""

    structure: Any
    leaves: tuple[Any, ...]  # None where an array was: None is never a leaf
    types: tuple[type, ...]  # of the leaves, since 1 == 1.0 == True
    frozen: Hashable = None  # what else a program that is compiled for it reads


def arrays_and_rest(tree: Any) -> tuple[list[Any], Rest]:
    """The arrays of a pytree, and the rest: NumPy's, JAX's, and what NumPy can read, as a table of pandas or a tensor of PyTorch.

    NumPy's scalars are in the rest, as Python's numbers are: either may be the size of a plate.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_array = [_is_array(leaf) for leaf in leaves]
    rest = tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    return arrays, Rest(structure, rest, tuple(type(leaf) for leaf in rest))


def join(arrays: Sequence[Any], rest: Rest) -> Any:
    """The pytree of some arrays and the rest: the inverse of :func:`arrays_and_rest`."""
    given = iter(arrays)
    return jax.tree.unflatten(rest.structure, [next(given) if leaf is None else leaf for leaf in rest.leaves])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (Array, np.ndarray)) or (hasattr(type(leaf), "__array__") and not isinstance(leaf, np.generic))


def as_array(what: str, array: Any) -> Array:
    """An array as JAX's.

    :param str what: what it is, for the message: ``"an argument of the model"``.
    :raises TypeError: if it holds what are no numbers.
    """
    if isinstance(array, Array):
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{what} is a masked array of NumPy, whose masked values would be taken for data: fill them, or leave them out."
        )
    read = np.asarray(array)
    if not (read.dtype == bool or jnp.issubdtype(read.dtype, jnp.number)):
        raise TypeError(f"{what}, a {type(array).__name__} of dtype {read.dtype}, does not hold numbers alone: convert it.")
    return jnp.asarray(read)


def require_no_lists(what: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses lists of numbers, which may be meant for data, to be traced, or for settings, to be compiled in.

    :param str what: what the arguments are, for the message: ``"an argument of the model"``.
    :raises TypeError: with what to pass.
    """
    for name, value in (*enumerate(args), *kwargs.items()):
        for part in value.values() if isinstance(value, dict) else (value,):
            if isinstance(part, list) and part and all(isinstance(x, int | float | np.generic) for x in jax.tree.leaves(part)):
                named = f", {name}," if isinstance(name, str) else ""
                raise TypeError(
                    f"{what}{named} is a list of {len(part)}: pass jnp.asarray(...) of data, and a tuple of settings, which are "
                    "compiled in."
                )


def require_hashable(what: str, rest: Rest) -> Rest:
    """Refuses what cannot be compiled in.

    :param str what: what the pytree holds, for the message: ``"an argument of the model"``.
    :raises TypeError: naming the type of the part that is not hashable.
    """
    for part in rest.leaves:  # structures always hash
        try:
            hash(part)
        except TypeError:
            raise TypeError(
                f"{what}, a {type(part).__name__}, is neither an array nor hashable, and so cannot be compiled in. Pass arrays, "
                "numbers, strings, functions or pytrees of these."
            ) from None
    return rest


def read_params(what: str, given: Any) -> dict[str, Any]:
    """Values of param sites by name: integers as floating-point numbers, and lists of numbers as arrays.

    :param str what: what they are, for the message: ``"init_params"``.
    :raises TypeError: if it is no mapping, or a value holds what is no number; naming the param.
    :raises ValueError: if a value is NaN or infinite, naming the param.
    """
    if not isinstance(given, Mapping):
        fix = ": pass its params" if hasattr(given, "params") else ""
        raise TypeError(f"{what} must map names of param sites to values, as {{'loc': 0.5}}, got {_short(given)}{fix}.")
    return {name: _read_param(f"{what}['{name}']", value) for name, value in given.items()}


def _read_param(what: str, value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(isinstance(leaf, int | float) for leaf in jax.tree.leaves(value)):
        value = np.asarray(value, jnp.result_type(float))

    def read(leaf: Any) -> Any:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.number):
            raise TypeError(f"{what} must be an array of numbers, or a pytree of these, got {_short(leaf)}.")
        if jnp.issubdtype(dtype, jnp.integer):  # which have no gradient
            leaf = leaf.astype(jnp.result_type(float)) if hasattr(leaf, "astype") else float(leaf)
        if isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True):
            return leaf
        if num_bad := int((~np.isfinite(np.asarray(leaf))).sum()):
            where = f"{num_bad} of {np.size(leaf)} values are NaN or infinite" if np.ndim(leaf) else f"it is {leaf}"
            raise ValueError(f"{what}: {where}. Give finite values.")
        return leaf

    return jax.tree.map(read, value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"a {type(value).__name__}"


def keep(condition: Array, new: Any, old: Any) -> Any:
    """The new values where the condition holds, the old ones otherwise."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)
