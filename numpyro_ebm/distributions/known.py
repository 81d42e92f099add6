# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions that are known: sampled at once, with a normalized density that ends where their support does."""

import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Distribution, ImproperUniform, MaskedDistribution

from numpyro_ebm._compat import layers
from numpyro_ebm.distributions.relaxed import GumbelBernoulli


def is_known(fn: Distribution) -> bool:
    """Whether a distribution can be sampled at once, and has a normalized density."""
    # a masked element has no density, that of relaxed bits is the one of bits, and a flat measure cannot be sampled
    unknown = MaskedDistribution, GumbelBernoulli, ImproperUniform
    return all(
        not isinstance(part, unknown)
        and type(part).sample is not Distribution.sample
        and type(part).log_prob is not Distribution.log_prob
        for part in layers(fn)
    )


def log_prob_inside(fn: Distribution, value: Array) -> Array:
    """A log density that is minus infinity outside its support, which NumPyro's is not without validation."""
    return jnp.where(is_inside(fn, value), fn.log_prob(value), -jnp.inf)


def is_inside(fn: Distribution, value: Array) -> Array:
    """Whether events lie in the support of a distribution, which may be one of their elements."""
    inside: Array = fn.support(value)
    return inside.reshape((*value.shape[: value.ndim - fn.event_dim], -1)).all(-1)
