# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Importance weights, and what they are worth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class LogNormalizer(NamedTuple):
    """What :func:`~numpyro_ebm.log_normalizer` found."""

    #: batch_shape, log Z
    log_normalizer: Array
    #: batch_shape, the standard error of log Z, 0 where it is exact
    standard_error: Array
    #: batch_shape, how many equally weighted chains the estimate is worth, infinite where it is exact
    effective_sample_size: Array


def normalized_weights(log_weights: Array, keep: Array | None = None) -> Array:
    """Weights of samples along axis 0, which sum to 1."""
    if keep is not None:
        log_weights = jnp.where(keep[:, None], log_weights, -jnp.inf)
    return jax.nn.softmax(log_weights, 0)


def effective_sample_size(weights: Array) -> Array:
    """How many samples the normalized ``weights`` along axis 0 are worth, between 1 and their number."""
    return 1 / (weights**2).sum(0)
