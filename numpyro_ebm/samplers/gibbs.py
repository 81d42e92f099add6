# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Block Gibbs sampling of two layers: every hidden unit at once given the visible, then every visible given the hidden.

.. math:: h \sim p(h \mid v), \qquad v' \sim p(v' \mid h).

Within a layer the units of a restricted Boltzmann machine are independent given the other layer, so a sweep of a whole
population is two matrix products and has no step size, no rejection and no score: it also moves binary events.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.distributions import Distribution

from numpyro_ebm._checks import require_count, require_instance, require_key
from numpyro_ebm.samplers.base import LogProb, Sampler, real_positions


@runtime_checkable
class Layers(Protocol):
    """What block Gibbs needs to know of two layers: the distribution of each given the other."""

    def hidden_given_visible(self, v: Array) -> Distribution:
        """The distribution of the hidden units at visible units ``v``."""

    def visible_given_hidden(self, h: Array) -> Distribution:
        """The distribution of the visible units at hidden units ``h``."""


def block_gibbs(rng_key: Array, layers: Layers, v: Array, num_steps: int = 1) -> Array:
    r"""``num_steps`` sweeps :math:`v \to h \to v'` of every chain, which leave :math:`p(v)` as it is.

    From a batch of data this is the negative phase of CD-k; from where the last call ended, that of persistent CD.

    :param rng_key: a key of :func:`jax.random.key`.
    :param layers: the conditionals, for instance a :class:`~numpyro_ebm.GaussianBernoulliRBM`.
    :param v: where the chains stand, of shape ``(num_chains,) + batch_shape + (num_visible,)``.
    :param int num_steps: sweeps; 0 leaves the chains where they are.
    :return: where they end, of the shape of ``v``, and real where the units are. Gradients are not stopped.
    :raises ValueError: if ``num_steps`` is not an integer of 0 or more, or ``v`` has NaN or is outside its support; under ``jit``,
        which cannot raise, a chain with NaN ends NaN too.
    :raises TypeError: if ``layers`` has no layers.

    **References**

    1. Hinton, *Training products of experts by minimizing contrastive divergence*, Neural Computation 14 (2002).

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import GaussianBernoulliRBM, block_gibbs
        >>> weights, hidden_bias = jnp.array([[2.0], [0.0]]), jnp.array([-2.0])
        >>> rbm = GaussianBernoulliRBM(weights, jnp.zeros(2), hidden_bias)  # h is 0 or 1 evenly
        >>> v = block_gibbs(jax.random.key(0), rbm, jnp.zeros((10_000, 2)), num_steps=100)
        >>> v.mean(0).round(1) + 0.0
        Array([1., 0.], dtype=float32)
    """
    num_steps = require_count("num_steps", num_steps, least=0)
    require_instance(
        "layers", layers, ("hidden_given_visible", "visible_given_hidden"), "an RBM, such as GaussianBernoulliRBM(...)"
    )
    v, rng_key = jnp.asarray(v), require_key("rng_key", rng_key)
    support = _support(layers, v)
    if not support.is_discrete:
        v = real_positions(v)
    elif not isinstance(v, jax.core.Tracer) and not jnp.isnan(v).any() and not support(v).all():
        raise ValueError(f"v: its values must lie in the support, {support}, and some do not.")
    is_nan = jnp.isnan(v).any(-1, keepdims=True)
    if not isinstance(is_nan, jax.core.Tracer) and is_nan.any():
        raise ValueError(
            f"v: {int(is_nan.sum())} of {is_nan.size} chains have NaN, and the units drawn from NaN would look like valid ones."
        )
    return jnp.where(is_nan, jnp.nan, _sweeps(rng_key, layers, v, num_steps)).astype(v.dtype)


def _support(layers: Layers, v: Array) -> Any:
    """Of the visible units."""
    found: list[Any] = []

    def look(v: Array, key: Array) -> None:
        found.append(layers.visible_given_hidden(layers.hidden_given_visible(v).sample(key)).support)

    jax.eval_shape(look, v, jax.random.key(0))
    return found[0]


def _sweeps(rng_key: Array, layers: Layers, v: Array, num_steps: int) -> Array:
    def sweep(v: Array, key: Array) -> tuple[Array, None]:
        hidden_key, visible_key = jax.random.split(key)
        h = layers.hidden_given_visible(v).sample(hidden_key)
        return layers.visible_given_hidden(h).sample(visible_key).astype(v.dtype), None

    return lax.scan(sweep, v, jax.random.split(rng_key, num_steps))[0]


class BlockGibbsState(NamedTuple):
    """State of :class:`~numpyro_ebm.BlockGibbs`."""

    #: (num_chains,) + batch_shape + (num_visible,)
    position: Array


@dataclass(frozen=True)
class BlockGibbs(Sampler):
    """Block Gibbs as a sampler: ``num_steps`` sweeps over both layers in one run. The default of the RBMs.

    It moves sites of two layers, each of which can be drawn given the other (:class:`~numpyro_ebm.GaussianBernoulliRBM`,
    :class:`~numpyro_ebm.BernoulliRBM`). Under :class:`~numpyro_ebm.negative_phase` its chains are persistent contrastive
    divergence.

    :param int num_steps: sweeps in one run; 0 leaves the chains where they are.
    :raises ValueError: if ``num_steps`` is not an integer of 0 or more.

    **References**

    1. Tieleman, *Training restricted Boltzmann machines using approximations to the likelihood gradient*, ICML 2008.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import BernoulliRBM, BlockGibbs
        >>> rbm = BernoulliRBM(
        ...     jnp.zeros((3, 2)),
        ...     jnp.array([-20.0, 0.0, 20.0]),
        ...     jnp.zeros(2),
        ...     sampler=BlockGibbs(num_steps=5),
        ... )
        >>> rbm.sample(jax.random.key(0), (1000,)).mean(0).round(1)
        Array([0. , 0.5, 1. ], dtype=float32)
    """

    num_steps: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", require_count("num_steps", self.num_steps, least=0))

    def init(self, position: Array, target: LogProb | None = None) -> BlockGibbsState:
        """The state of chains that stand at ``position``, of shape ``(num_chains,) + batch_shape + (num_visible,)``."""
        return BlockGibbsState(position)

    def run(self, rng_key: Array, target: Any, state: BlockGibbsState) -> BlockGibbsState:
        """``num_steps`` sweeps of every chain.

        :param rng_key: a key of :func:`jax.random.key`.
        :param target: the log density of one of two layers, with the methods of :class:`Layers`.
        :param state: where the chains stand.
        :return: the state after the last sweep, with gradients stopped.
        :raises TypeError: if ``target`` has no layers.
        """
        if not isinstance(target, Layers):
            raise TypeError(
                "BlockGibbs draws each layer of an RBM given the other, and this energy has no layers. "
                "Use GaussianBernoulliRBM or BernoulliRBM, or another sampler, such as MALA()."
            )
        position = lax.stop_gradient(state.position)
        return BlockGibbsState(lax.stop_gradient(_sweeps(rng_key, target, position, self.num_steps)))
