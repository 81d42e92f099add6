# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""A map over one leading axis that costs nothing where the axis has size 1."""

from collections.abc import Callable
from typing import Any

import jax


def map_over(function: Callable[[Any], Any], x: Any) -> Any:
    """``jax.vmap(function)(x)`` for a pytree of arrays ``x``, by a plain call where their leading axis has size 1.

    A mapped axis is not free because it has size 1. Inside ``function`` it meets the axis of the rows that the model maps its
    networks over. A network that multiplies as ``weight @ x`` then has products whose result has its axes in another order than
    the next operation wants them. XLA on the CPU does not take an axis of size 1 out of that order: it transposes and copies
    every layer, forward and backward. A step of one particle costs 1.5 times as much with the axis as without.
    """
    if len(jax.tree.leaves(x)[0]) != 1:
        return jax.vmap(function)(x)
    return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], x)))
