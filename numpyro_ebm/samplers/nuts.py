# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""NumPyro's No-U-Turn sampler, for a posterior at fixed parameters.

It is no :class:`~numpyro_ebm.samplers.Sampler`: its step size and its masses are adapted in windows of a warmup of known length,
and not from run to run, so that it cannot move the chains of a fit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpyro.infer
from jax import Array, lax

from numpyro_ebm._checks import require_bool, require_count, require_fraction


@dataclass(frozen=True)
class NUTS:
    """The No-U-Turn sampler (Hoffman and Gelman 2014) in :func:`~numpyro_ebm.sample_posterior`: NumPyro's, and with its settings.

    It moves all latents of a chain together. Every chain is adapted by itself, in the windows of NumPyro's warmup.

    :param float target_accept_prob: the mean acceptance that the step size is adapted to.
    :param int max_tree_depth: a transition makes up to ``2**max_tree_depth`` steps.
    :param bool dense_mass: whether the masses are adapted with their correlations, which costs the square of the dimension.
    :raises ValueError: for settings out of range.

    **References**

    1. Hoffman and Gelman, *The No-U-Turn sampler*, JMLR 15 (2014), arXiv:1111.4246.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import sample_posterior, samplers
        >>> def model(y):
        ...     top = numpyro.sample("top", dist.Normal(0, 1))
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(top, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> y = jnp.array([1.0, 5.0])
        >>> draws = sample_posterior(
        ...     jax.random.key(0), model, {}, y, num_samples=1000, sampler=samplers.NUTS()
        ... )
        >>> print(draws["top"].mean().round(1), draws["x"].shape)
        1.5 (4, 1000, 2)
    """

    target_accept_prob: float = 0.8
    max_tree_depth: int = 10
    dense_mass: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_accept_prob", require_fraction("target_accept_prob", self.target_accept_prob))
        object.__setattr__(self, "max_tree_depth", require_count("max_tree_depth", self.max_tree_depth))
        object.__setattr__(self, "dense_mass", require_bool("dense_mass", self.dense_mass))

    def draw(
        self,
        rng_key: Array,
        log_density: Callable[[Array], Array],
        positions: Array,
        num_warmup: int,
        num_samples: int,
        thinning: int,
    ) -> tuple[Array, Array]:
        """Chains from the warmup on.

        :param rng_key: a key of :func:`jax.random.key`.
        :param log_density: maps ``(num_chains,) + shape`` to log densities with axis 0, all of which are summed for a chain.
        :param positions: where the chains start, ``(num_chains,) + shape``.
        :return: draws, ``(num_chains, num_samples) + shape``, and the number of transitions that diverged, ``()``.
        """
        shape = positions.shape[1:]

        def potential(position: Array) -> Array:
            return -log_density(position.reshape(1, *shape)).sum()

        def chain(key: Array, position: Array) -> tuple[Array, Array]:
            kernel = numpyro.infer.NUTS(
                potential_fn=potential,
                target_accept_prob=self.target_accept_prob,
                max_tree_depth=self.max_tree_depth,
                dense_mass=self.dense_mass,
            )

            def move(state: Any, _: None) -> tuple[Any, Array]:
                state = kernel.sample(state, (), {})
                return state, state.diverging

            def draw(state: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
                state, diverging = lax.scan(move, state, None, thinning)
                return state, (state.z, diverging.sum())

            state = kernel.init(key, num_warmup, position.reshape(-1), (), {})
            state, _ = lax.scan(move, state, None, num_warmup)
            _, (draws, diverging) = lax.scan(draw, state, None, num_samples)
            return draws.reshape(num_samples, *shape), diverging.sum()

        draws, diverging = jax.vmap(chain)(jax.random.split(rng_key, len(positions)), positions)
        return draws, diverging.sum()
