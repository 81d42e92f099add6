# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What bfloat16 and float16 cannot hold: values of fewer digits than float32 are fit for the inside of a network, and not for a log
density, whose differences decide, nor for parameters, to which small steps are added.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp


def is_coarse(value: Any) -> bool:
    """Whether a value is of real numbers with fewer digits than float32."""
    dtype = jnp.result_type(value)
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def tell_coarse_density(what: str, value: Any, fix: str) -> Any:
    """A log density or an energy as float32 at least, with a warning if it was rounded to less: while a program is traced.

    :param str what: what it is, and of which site.
    """
    if not is_coarse(value):
        return value
    dtype = jnp.result_type(value)
    warnings.warn(
        f"{what} is of {dtype}, which rounds 100 to a multiple of {64 * float(jnp.finfo(dtype).eps):g}, and the differences that "
        f"moves are accepted by and energies are compared by as well: {fix}",
        stacklevel=2,
    )
    return jnp.asarray(value, jnp.float32)


def tell_coarse_params(params: dict[str, Any]) -> None:
    """Warns of parameters to which the steps of an optimizer are lost in rounding."""
    for name, value in params.items():
        for leaf in filter(is_coarse, jax.tree.leaves(value)):
            warnings.warn(
                f"param '{name}' is of {leaf.dtype}: a step of less than {float(jnp.finfo(leaf.dtype).eps) / 2:g} of a weight is "
                "lost in rounding, and what is learned stands still. Keep it in float32, and convert it inside the network.",
                stacklevel=3,
            )
            break
