# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The guard: a gradient that would need an unknown normalizer raises :class:`NormalizerError`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


class NormalizerError(RuntimeError):
    """A gradient needs ``d log Z / d theta``, which ``log_prob`` does not contain."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def refuse_gradient(message: str, dtype: Any, params: list[Array]) -> Array:
    """0, with a backward pass in ``params`` that raises :class:`NormalizerError`."""
    return jnp.zeros((), dtype)


def _refuse(message: str, dtype: Any, residuals: None, cotangent: Array) -> Any:
    raise NormalizerError(message)


refuse_gradient.defvjp(lambda message, dtype, params: (jnp.zeros((), dtype), None), _refuse)


def unknown_log_normalizer(site: str | None, dtype: Any, params: list[Array]) -> Array:
    """What stands for minus log Z in a log density that lacks it: 0, with a backward pass that raises."""
    return refuse_gradient(
        f"{place(site)}: this gradient needs d log Z / d theta, the derivative of an unknown normalizer. "
        "Wrap the model in numpyro_ebm.negative_phase, or hold what the energy depends on fixed; numpyro_ebm.check_model "
        "tells what that is.",
        dtype,
        params,
    )


def place(site: str | None) -> str:
    """Where a distribution stands, for a message."""
    return "a distribution at no site" if site is None else f"site '{site}'"
