# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions that are known: sampled at once, with a normalized density that ends where their support does."""

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Distribution, MaskedDistribution

from numpyro_ebm._compat import layers
from numpyro_ebm.distributions.relaxed import GumbelBernoulli


def is_known(fn: Distribution) -> bool:
    """Whether a distribution can be sampled at once, and has a normalized density."""
    # a masked element has no density, and that of relaxed bits is the one of bits
    if any(isinstance(part, MaskedDistribution | GumbelBernoulli) for part in layers(fn)):
        return False
    try:
        jax.eval_shape(lambda key: fn.log_prob(fn.sample(key)), jax.random.key(0))
    except NotImplementedError:
        return False
    return True


def log_prob_inside(fn: Distribution, value: Array) -> Array:
    """A log density that is minus infinity outside its support, which NumPyro's is not without validation."""
    return jnp.where(is_inside(fn, value), fn.log_prob(value), -jnp.inf)


def is_inside(fn: Distribution, value: Array) -> Array:
    """Whether events lie in the support of a distribution, which may be one of their elements."""
    inside: Array = fn.support(value)
    return inside.reshape((*value.shape[: value.ndim - fn.event_dim], -1)).all(-1)
