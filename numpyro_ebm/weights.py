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


def systematic(rng_key: Array | None, weights: Array) -> Array:
    """Indices along axis 0 by systematic resampling: each as often as its normalized weight times their number, up to one.

    :param rng_key: for the one offset of each column; a half without.
    :param weights: of shape ``(num_samples,) + batch_shape``, which sum to 1.
    """
    size = len(weights)
    offset = jnp.full(weights.shape[1:], 0.5) if rng_key is None else jax.random.uniform(rng_key, weights.shape[1:])
    wanted = (jnp.arange(size).reshape(-1, *(1,) * offset.ndim) + offset.astype(weights.dtype)) / size
    columns = weights.cumsum(0).reshape(size, -1), wanted.reshape(size, -1)
    found = jax.vmap(lambda cumulated, wanted: jnp.searchsorted(cumulated, wanted), 1, 1)(*columns)
    return jnp.clip(found, 0, size - 1).reshape(weights.shape)
