# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The flat measure: what an energy alone is a density of."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Distribution, ImproperUniform, constraints

from numpyro_ebm._compat import layers


class BaseMeasure(ImproperUniform):
    r"""The flat measure on a support: Lebesgue where it is continuous, counting where it is discrete.

    ``log_prob`` is 0 everywhere on the support. It is the base of :class:`EnergyDistribution`, and the distribution of a
    latent or visible that a :func:`numpyro.factor` couples into a random field. It has no normalizer and cannot be
    sampled.

    :param support: a NumPyro constraint on one event, or on its elements.
    :param tuple event_shape: the shape of one event.
    :raises ValueError: if the support needs more dimensions than the event has.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro.distributions import constraints
        >>> from numpyro_ebm import BaseMeasure
        >>> BaseMeasure(constraints.boolean, (3,)).log_prob(jnp.ones((5, 3), dtype=int)).shape
        (5,)
    """

    has_enumerate_support = False
    has_rsample = False
    pytree_data_fields = ("support",)

    def __init__(
        self,
        support: constraints.Constraint = constraints.real,
        event_shape: tuple[int, ...] = (),
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(event_shape, tuple | list):
            raise TypeError(f"event_shape must be a tuple, got {event_shape!r}.")
        if not isinstance(support, constraints.Constraint):
            raise TypeError(f"support must be a NumPyro constraint such as constraints.positive, got {support!r}.")
        if support.event_dim > len(event_shape):
            raise ValueError(
                f"{support} constrains events of {support.event_dim} dimensions or more, got event_shape={event_shape}."
            )
        super().__init__(support, (), tuple(event_shape), validate_args=validate_args)

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """0 on the support, in the dtype of ``value`` where that is real."""
        dtype = jnp.result_type(value)
        return super().log_prob(value).astype(dtype if jnp.issubdtype(dtype, jnp.floating) else float)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        raise NotImplementedError(
            f"A BaseMeasure ({self.support}, event_shape={self.event_shape}) is flat and cannot be sampled: condition on it, "
            "give it a value, or start chains elsewhere with EnergyDistribution(..., initial=a distribution to start from)."
        )


def is_flat(fn: Distribution) -> bool:
    """Whether a site's distribution is a flat measure, under what plates and masks wrap around it."""
    return isinstance(list(layers(fn))[-1], BaseMeasure)
