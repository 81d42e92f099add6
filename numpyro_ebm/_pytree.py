# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""A pytree taken apart into what is traced, its arrays, and what is compiled in, the rest."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array


class Rest(NamedTuple):
    """What of a pytree is not an array. Hashable if its parts are, and equal where these are equal and of one type."""

    structure: Any
    leaves: tuple[Any, ...]  # None where an array was: None is never a leaf
    types: tuple[type, ...]  # of the leaves, since 1 == 1.0 == True


def arrays_and_rest(tree: Any) -> tuple[list[Any], Rest]:
    """The arrays of a pytree, NumPy's or JAX's, and the rest.

    NumPy's scalars are in the rest, as Python's numbers are: either may be the size of a plate.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, (Array, np.ndarray)) for leaf in leaves]
    rest = tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    return arrays, Rest(structure, rest, tuple(type(leaf) for leaf in rest))


def join(arrays: Sequence[Any], rest: Rest) -> Any:
    """The pytree of some arrays and the rest: the inverse of :func:`arrays_and_rest`."""
    given = iter(arrays)
    return jax.tree.unflatten(rest.structure, [next(given) if leaf is None else leaf for leaf in rest.leaves])


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
