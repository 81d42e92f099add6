# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is to be known of one site of a model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, Unit, biject_to, constraints
from numpyro.infer.util import helpful_support_errors

from numpyro_ebm._compat import layers, mask_of

Model = Callable[..., Any]
Site = dict[str, Any]

FIELD = "random_field"  # the site that the chains and the normalizer of coupled flat sites are named after
_NORMALIZER = "/log_normalizer"


def is_latent(site: Site) -> bool:
    """Whether a site is a sample site without data."""
    return site["type"] == "sample" and not site["is_observed"]


def normalizer_name(site: str) -> str:
    """The factor that adds the log normalizer of a site's distribution."""
    return site + _NORMALIZER


def is_normalizer(name: str) -> bool:
    """Whether a site is such a factor."""
    return name.endswith(_NORMALIZER)


def transform_of(site: Site) -> Any:
    """The transform from an unconstrained array to a latent site; an error that names the site if there is none."""
    with helpful_support_errors(site):
        return biject_to(site["fn"].support)


def kind_of(fn: Distribution) -> str:
    """The name of a site's distribution, under what plates and masks wrap around it."""
    return type(core_of(fn)).__name__


def core_of(fn: Distribution) -> Any:
    """A site's distribution, under what plates, masks and users wrapped around it."""
    *_, core = layers(fn)
    return core


def is_factor(fn: Distribution) -> bool:
    """Whether a site is a :func:`numpyro.factor`."""
    return isinstance(core_of(fn), Unit)


def stand_in(fn: Distribution, sample_shape: tuple[int, ...] = ()) -> Array:
    """A value of a site where its draw is not wanted, or there is none: 0, or what of the support is near."""
    return fn.support.feasible_like(jnp.zeros(fn.shape(sample_shape)))


def is_unbounded(support: Any) -> bool:
    """Whether every real array is in a support."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return type(support) is type(constraints.real)


def finite_events(site: Site, xp: Any = jnp) -> Any:
    """Whether each event of an observed site is finite or masked.

    :param xp: :mod:`numpy` for an answer that is known while a program is traced.
    """
    value, fn = site["value"], site["fn"]
    finite = xp.isfinite(xp.asarray(value))
    finite = finite.all(tuple(range(finite.ndim - fn.event_dim, finite.ndim)))
    mask = mask_of(fn)
    return finite if mask is None else finite | ~xp.asarray(mask)


def require_finite(site: Site) -> None:
    """Refuses data that are NaN or infinite and not masked; says nothing while data are traced.

    :raises ValueError: naming the site.
    """
    if isinstance(site["value"], jax.core.Tracer) or isinstance(mask_of(site["fn"]), jax.core.Tracer):
        return
    finite = finite_events(site, np)
    if not finite.all():
        raise ValueError(
            f"site '{site['name']}': {int((~finite).sum())} of {finite.size} observed events are NaN or infinite. "
            "Remove them, or mask them out with numpyro.handlers.mask."
        )
