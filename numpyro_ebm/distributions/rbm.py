# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Restricted Boltzmann machines (RBMs) as NumPyro distributions over their visible units.

.. math::

    E(v, h) = E_0(v) - c^\top h - v^\top W h, \qquad h \in \{0, 1\}^m, \qquad
    F(v) = -\log \sum_h e^{-E(v, h)} = E_0(v) - \sum_j \mathrm{softplus}(c_j + (W^\top v)_j).

The hidden units are summed out in closed form: ``log_prob`` is :math:`-F(v)`, exact up to :math:`\log Z`. The two machines
here differ in :math:`E_0`, and with it in the distribution of the visible units at given hidden ones.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import softplus
from jax.scipy.special import logsumexp
from numpyro.distributions import BernoulliLogits, Distribution, Normal, constraints

from numpyro_ebm._checks import require_one_of
from numpyro_ebm._compiled import compiled
from numpyro_ebm._pytree import as_array
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.samplers import BlockGibbs, Reference, Sampler, Target

MAX_ENUMERATED_UNITS = 20

Coupling = Literal["plain", "scaled"]


class RestrictedBoltzmannMachine(EnergyDistribution):
    """What :class:`GaussianBernoulliRBM` and :class:`BernoulliRBM` share: everything but the visible units' own distribution.

    Shapes: ``d`` visible and ``m`` hidden units; every parameter may lead with batch dimensions, which broadcast.
    """

    _default_sampler = BlockGibbs(num_steps=1000)
    _default_chain_sampler = BlockGibbs()

    def __init__(
        self,
        params: dict[str, Array],
        support: constraints.Constraint,
        *,
        sampler: Sampler | None,
        initial: Distribution | None,
        validate_args: bool | None,
    ) -> None:
        *batch_shape, num_visible, _ = params["weights"].shape
        super().__init__(
            type(self).free_energy,  # named for what it is: this class maps it over batches itself, in _log_density
            (num_visible,),
            support=support,
            params=params,
            batch_shape=tuple(batch_shape),
            sampler=sampler,
            initial=initial,
            validate_args=validate_args,
        )
        if initial is None:
            self.initial = self.uncoupled_visible()

    @property
    def weights(self) -> Array:
        """The weights :math:`W`, of shape ``batch_shape + (d, m)``."""
        return self.params["weights"]

    @property
    def visible_bias(self) -> Array:
        """The biases :math:`b` of the visible units, of shape ``batch_shape + (d,)``."""
        return self.params["visible_bias"]

    @property
    def hidden_bias(self) -> Array:
        """The biases :math:`c` of the hidden units, of shape ``batch_shape + (m,)``."""
        return self.params["hidden_bias"]

    @property
    def _coupling_weights(self) -> Array:
        """What stands between ``v`` and ``h`` in the energy."""
        return self.weights

    def _visible_energy(self, v: Array) -> Array:
        raise NotImplementedError

    def _log_partition(self, field: Array) -> Array:
        r"""``log`` of the sum or integral of :math:`\exp(-E_0(v) + v^\top f)` over ``v``, at the field :math:`f = W h`."""
        raise NotImplementedError

    def visible_given_hidden(self, h: Array) -> Distribution:
        """The distribution of the visible units at hidden ones, independent units with ``to_event(1)``.

        :param h: of shape ``sample_shape + batch_shape + (m,)``; real values are taken as they are.
        :return: a distribution of event shape ``(d,)``.
        """
        raise NotImplementedError

    def hidden_given_visible(self, v: Array) -> Distribution:
        r"""The distribution of the hidden units at visible ones: independent, with logits :math:`c + W^\top v`.

        :param v: of shape ``sample_shape + batch_shape + (d,)``.
        :return: a :class:`~numpyro.distributions.BernoulliLogits` with ``to_event(1)``, of event shape ``(m,)``.
        """
        return BernoulliLogits(self.hidden_logits(v)).to_event(1)

    def hidden_logits(self, v: Array) -> Array:
        r""":math:`c + W^\top v`, of shape ``sample_shape + batch_shape + (m,)``.

        :param v: of shape ``sample_shape + batch_shape + (d,)``.
        """
        v = self._real(self.as_events(v))
        return self.hidden_bias + jnp.einsum("...i,...ij->...j", v, self._coupling_weights, precision="highest")

    @property
    def energy(self) -> Callable[[Any, Array], Array]:
        """The energy of an event, the free energy, as a function of the parameters and the visible units."""

        def energy(params: Any, v: Array) -> Array:
            machine = copy.copy(self)
            machine.params = params
            return machine.free_energy(v)

        return energy

    def joint_energy(self, v: Array, h: Array) -> Array:
        """The energy :math:`E(v, h)` of both layers.

        :param v: visible units, of shape ``sample_shape + batch_shape + (d,)``.
        :param h: hidden units, of shape ``sample_shape + batch_shape + (m,)``; relaxed ones are taken as they are.
        :return: of shape ``sample_shape + batch_shape``.
        """
        v, h = self._real(self.as_events(v)), self._hidden(h)
        return self._visible_energy(v) - (self.hidden_bias * h).sum(-1) - (v * self._field(h)).sum(-1)

    def free_energy(self, v: Array) -> Array:
        """The energy :math:`F(v)` of the visible units, the hidden ones summed out: ``-log_prob``, without its guard.

        :param v: of shape ``sample_shape + batch_shape + (d,)``.
        :return: of shape ``sample_shape + batch_shape``.
        """
        return self._visible_energy(self._real(self.as_events(v))) - softplus(self.hidden_logits(v)).sum(-1)

    def log_normalizer(self) -> Array:
        r""":math:`\log Z`, exact, by enumerating the hidden layer (or the visible one, if it is binary and smaller).

        It is differentiable in the parameters, which makes exact maximum likelihood possible for small machines.

        :return: of shape ``batch_shape``.
        :raises ValueError: if the layer has more than 20 units.
        """
        num_units, _ = self._enumerated_layer()
        if num_units > MAX_ENUMERATED_UNITS:
            raise ValueError(
                f"log_normalizer enumerates the 2^{num_units} states of a layer, at most {MAX_ENUMERATED_UNITS} units are "
                "allowed. Estimate it: numpyro_ebm.log_normalizer(rbm, method='ais', rng_key=...)."
            )
        return compiled(_enumerated, self)

    def uncoupled_log_normalizer(self) -> Array:
        r""":math:`\log Z` at :math:`W = 0, c = 0` (the visible biases and scale kept), of shape ``batch_shape``."""
        num_visible, num_hidden = self.weights.shape[-2:]
        return num_hidden * math.log(2) + self._log_partition(jnp.zeros(num_visible, self.weights.dtype))

    def uncoupled_visible(self) -> Distribution:
        """The distribution of the visible units at :math:`W = 0, c = 0`, where the layers are independent."""
        return self.visible_given_hidden(jnp.zeros(self.weights.shape[-1], self.weights.dtype))

    def chain_log_prob(self, sampler: Sampler) -> Target:
        r"""The log density of positions of ``sampler``, with the conditionals that :class:`~numpyro_ebm.BlockGibbs` draws from.

        The path to it scales :math:`W` and :math:`c` by :math:`\beta`, from the uncoupled machine.
        """
        log_prob, reference = self._of_positions(self._log_density, sampler), self._chain_reference(sampler)
        return Target(log_prob, reference) if self._unconstrains(sampler) else _LayeredTarget(log_prob, reference, self)

    def _reference(self) -> Distribution:
        return lax.stop_gradient(self.uncoupled_visible())

    def _enumerated_layer(self) -> tuple[int, Callable[[Array], Array]]:
        """A layer to enumerate: its number of units, and the log of the other layer's sum at given states of it."""

        def log_weight(h: Array) -> Array:
            return (self.hidden_bias * h).sum(-1) + self._log_partition(self._field(h))

        return self.weights.shape[-1], log_weight

    def _log_density(self, value: Array, beta: Any = 1.0) -> Array:
        return softplus(beta * self.hidden_logits(value)).sum(-1) - self._visible_energy(self._real(self.as_events(value)))

    def _field(self, h: Array) -> Array:
        """:math:`W h`, what the hidden units do to the visible ones."""
        return jnp.einsum("...j,...ij->...i", self._hidden(h), self._coupling_weights, precision="highest")

    def _hidden(self, h: Array) -> Array:
        num_hidden = self.weights.shape[-1]
        if jnp.shape(h)[-1:] != (num_hidden,):
            raise ValueError(f"hidden units of shape {jnp.shape(h)} do not end in ({num_hidden},), their number.")
        return self._real(jnp.asarray(h))

    def _real(self, units: Array) -> Array:
        """Binary units arrive as integers; they are computed with in the parameters' dtype."""
        return units if jnp.issubdtype(units.dtype, jnp.floating) else units.astype(self.weights.dtype)


class _LayeredTarget(Target):
    """The density of visible units, with each layer given the other. What is drawn has no gradient in the parameters."""

    def __init__(self, log_prob: Callable[..., Array], reference: Reference | None, rbm: RestrictedBoltzmannMachine) -> None:
        super().__init__(log_prob, reference)
        self._rbm: RestrictedBoltzmannMachine = lax.stop_gradient(rbm)

    def hidden_given_visible(self, v: Array) -> Distribution:
        return BernoulliLogits(self.beta * self._rbm.hidden_logits(v)).to_event(1)

    def visible_given_hidden(self, h: Array) -> Distribution:
        return self._rbm.visible_given_hidden(self.beta * self._rbm._hidden(h))


class GaussianBernoulliRBM(RestrictedBoltzmannMachine):
    r"""A restricted Boltzmann machine with real visible and binary hidden units, as a distribution over the visible.

    .. math::

        E(v, h) = \sum_i \frac{(v_i - b_i)^2}{2 \sigma_i^2} - c^\top h - v^\top W h, \qquad
        v \mid h \sim N(b + \sigma^2 \odot W h, \mathrm{diag}(\sigma^2)).

    This is the papers' coupling, ``"plain"``. The textbook one, ``"scaled"``, divides :math:`v` by :math:`\sigma^2` in the
    last term, so that the mean of :math:`v \mid h` is :math:`b + W h`; at unit scale they are the same. Summed over the
    hidden units it is a mixture of :math:`2^m` Gaussians.

    Weights of 0 are a saddle of the likelihood for both couplings, since all hidden units are then alike, and where clusters are
    narrow it takes long to leave it. On data of variance about 1 in clusters a tenth as wide, 10,000 steps of Adam at .003 from
    weights of .3 ended 2.8 nats above those from .01, with either coupling: start from weights of .3. Under plain gradient
    descent ``"plain"`` leaves the saddle more slowly where :math:`\sigma < 1`, because its gradient in :math:`W` is smaller by
    a factor of :math:`\sigma^2`: take Adam.

    ``log_prob`` is unnormalized, :math:`-F(v)`. Learn the parameters under :class:`~numpyro_ebm.negative_phase`, or by
    score matching, which needs no normalizer. ``sample`` runs block Gibbs from the uncoupled distribution :math:`N(b, \sigma^2)`
    and is approximate.

    :param weights: :math:`W`, of shape ``(d, m)``.
    :param visible_bias: :math:`b`, of shape ``(d,)``.
    :param hidden_bias: :math:`c`, of shape ``(m,)``.
    :param scale: :math:`\sigma`, a number or of shape ``(d,)``.
    :param str coupling: ``"plain"`` or ``"scaled"``.
    :param Sampler sampler: how :meth:`sample` draws, and how the chains of :class:`~numpyro_ebm.negative_phase` move unless it
        is given another; 1000 sweeps of :class:`~numpyro_ebm.BlockGibbs` for the former and 10 for the latter if not given.
    :param Distribution initial: where chains start; :math:`N(b, \sigma^2)` if not given.
    :raises ValueError: if shapes disagree, a parameter is not finite, or ``scale`` is not positive.

    Every parameter may lead with batch dimensions.

    **References**

    1. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020,
       arXiv:2010.07856.
    2. Hinton and Salakhutdinov, *Reducing the dimensionality of data with neural networks*, Science 313 (2006).

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import GaussianBernoulliRBM
        >>> rbm = GaussianBernoulliRBM(
        ...     weights=jnp.eye(2), visible_bias=jnp.zeros(2), hidden_bias=jnp.zeros(2)
        ... )
        >>> v = jnp.array([[0.0, 0.0], [3.0, -3.0]])
        >>> print(rbm.log_prob(v).round(1))
        [ 1.4 -5.9]
        >>> log_density = rbm.log_prob(v) - rbm.log_normalizer()  # of 2^2 hidden states
        >>> print(log_density.round(1))
        [-2.4 -9.7]
        >>> rbm.hidden_given_visible(v[1]).mean.round(1)
        Array([1., 0.], dtype=float32)
    """

    pytree_aux_fields: tuple[str, ...] = ("coupling",)

    def __init__(
        self,
        weights: Any,
        visible_bias: Any,
        hidden_bias: Any,
        scale: Any = 1.0,
        coupling: Coupling = "plain",
        *,
        sampler: Sampler | None = None,
        initial: Distribution | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.coupling = require_one_of("coupling", coupling, get_args(Coupling))
        params = _parameters(weights, visible_bias, hidden_bias, scale)
        super().__init__(params, constraints.real, sampler=sampler, initial=initial, validate_args=validate_args)

    @property
    def scale(self) -> Array:
        r"""The standard deviations :math:`\sigma` of the visible units, of shape ``batch_shape + (d,)``."""
        return self.params["scale"]

    @property
    def _coupling_weights(self) -> Array:
        return self.weights / self.scale[..., None] ** 2 if self.coupling == "scaled" else self.weights

    def _visible_energy(self, v: Array) -> Array:
        return (((v - self.visible_bias) / self.scale) ** 2).sum(-1) / 2

    def _log_partition(self, field: Array) -> Array:
        moved = self.visible_bias * field + (self.scale * field) ** 2 / 2
        return (moved + jnp.log(self.scale) + math.log(2 * math.pi) / 2).sum(-1)

    def visible_given_hidden(self, h: Array) -> Distribution:
        r"""The distribution of the visible units at hidden ones: :math:`N(b + \sigma^2 \odot W h, \mathrm{diag}(\sigma^2))`.

        :param h: of shape ``sample_shape + batch_shape + (m,)``; real values are taken as they are.
        :return: a :class:`~numpyro.distributions.Normal` with ``to_event(1)``, of event shape ``(d,)``.
        """
        return Normal(self.visible_bias + self.scale**2 * self._field(h), self.scale).to_event(1)


class BernoulliRBM(RestrictedBoltzmannMachine):
    r"""A restricted Boltzmann machine with binary visible and hidden units, as a distribution over the visible.

    .. math::

        E(v, h) = -b^\top v - c^\top h - v^\top W h, \qquad P(v_i = 1 \mid h) = \mathrm{sigmoid}(b_i + (W h)_i).

    ``log_prob`` is unnormalized, :math:`-F(v)`. Learn the parameters under :class:`~numpyro_ebm.negative_phase`. Its events
    are binary, so that it has no score. ``sample`` runs block Gibbs from the uncoupled distribution and is approximate.

    :param weights: :math:`W`, of shape ``(d, m)``.
    :param visible_bias: :math:`b`, of shape ``(d,)``.
    :param hidden_bias: :math:`c`, of shape ``(m,)``.
    :param Sampler sampler: how :meth:`sample` draws, and how the chains of :class:`~numpyro_ebm.negative_phase` move unless it
        is given another; 1000 sweeps of :class:`~numpyro_ebm.BlockGibbs` for the former and 10 for the latter if not given.
    :param Distribution initial: where chains start; independent units with logits :math:`b` if not given.
    :raises ValueError: if shapes disagree or a parameter is not finite.

    Every parameter may lead with batch dimensions.

    **References**

    1. Smolensky, *Information processing in dynamical systems: foundations of harmony theory*, 1986.
    2. Salakhutdinov and Murray, *On the quantitative analysis of deep belief networks*, ICML 2008.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import BernoulliRBM
        >>> rbm = BernoulliRBM(
        ...     weights=2 * jnp.ones((2, 1)),
        ...     visible_bias=-jnp.ones(2),
        ...     hidden_bias=jnp.zeros(1),
        ... )
        >>> v = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> print(jnp.exp(rbm.log_prob(v) - rbm.log_normalizer()).round(1))
        [0.1 0.2 0.2 0.5]
        >>> print(rbm.visible_given_hidden(jnp.array([1])).mean.round(1))
        [0.7 0.7]
    """

    def __init__(
        self,
        weights: Any,
        visible_bias: Any,
        hidden_bias: Any,
        *,
        sampler: Sampler | None = None,
        initial: Distribution | None = None,
        validate_args: bool | None = None,
    ) -> None:
        params = _parameters(weights, visible_bias, hidden_bias)
        super().__init__(params, constraints.boolean, sampler=sampler, initial=initial, validate_args=validate_args)

    def _visible_energy(self, v: Array) -> Array:
        return -(self.visible_bias * v).sum(-1)

    def _log_partition(self, field: Array) -> Array:
        return softplus(self.visible_bias + field).sum(-1)

    def visible_given_hidden(self, h: Array) -> Distribution:
        r"""The distribution of the visible units at hidden ones: independent, with logits :math:`b + W h`.

        :param h: of shape ``sample_shape + batch_shape + (m,)``; real values are taken as they are.
        :return: a :class:`~numpyro.distributions.BernoulliLogits` with ``to_event(1)``, of event shape ``(d,)``.
        """
        return BernoulliLogits(self.visible_bias + self._field(h)).to_event(1)

    def _enumerated_layer(self) -> tuple[int, Callable[[Array], Array]]:
        num_visible, num_hidden = self.weights.shape[-2:]
        return (num_visible, self._log_density) if num_visible < num_hidden else super()._enumerated_layer()


def _enumerated(rbm: RestrictedBoltzmannMachine) -> Array:
    num_units, log_weight = rbm._enumerated_layer()
    return log_sum_over_states(log_weight, num_units, rbm.weights.ndim - 2)


def log_sum_over_states(log_weight: Callable[[Array], Array], num_units: int, num_batch_dims: int) -> Array:
    r""":math:`\log \sum_s \exp(w(s))` over all binary states of ``num_units`` units, with at most 1024 of them held at once.

    :param log_weight: :math:`w`, from ``(num_states,) + (1,) * num_batch_dims + (num_units,)`` to ``(num_states,) + batch_shape``.
    """
    few, rest = _binary_states(min(num_units, 10)), _binary_states(max(num_units - 10, 0))
    ones = (1,) * num_batch_dims

    @jax.checkpoint  # so that a gradient holds no more states at once either
    def log_sum(tail: Array) -> Array:
        states = jnp.concatenate([few, jnp.broadcast_to(tail, (len(few), len(tail)))], axis=1)
        return logsumexp(log_weight(states.reshape(len(few), *ones, num_units)), axis=0)

    return logsumexp(lax.map(log_sum, jnp.asarray(rest)), axis=0)


def _binary_states(num_units: int) -> np.ndarray:
    return (np.arange(2**num_units)[:, None] >> np.arange(num_units)) & 1


def _parameters(weights: Any, visible_bias: Any, hidden_bias: Any, scale: Any = None) -> dict[str, Array]:
    """The parameters by name, checked, in one dtype and with one batch shape."""
    params = {"weights": weights, "visible_bias": visible_bias, "hidden_bias": hidden_bias}
    if scale is not None:
        params["scale"] = scale
    params = {name: as_array(name, value) for name, value in params.items()}
    weights, scale = params["weights"], params.get("scale")
    for name, value in params.items():
        _require_finite(name, value)
    if jnp.ndim(weights) < 2 or 0 in jnp.shape(weights):
        raise ValueError(f"weights must have shape (num_visible, num_hidden), got {jnp.shape(weights)}.")
    num_visible, num_hidden = jnp.shape(weights)[-2:]
    events = {"weights": (num_visible, num_hidden), "hidden_bias": (num_hidden,)}
    batches = []
    for name, value in params.items():
        shape = () if name == "scale" and jnp.ndim(value) == 0 else jnp.shape(value)
        event = () if name == "scale" and jnp.ndim(value) == 0 else events.get(name, (num_visible,))
        if shape[len(shape) - len(event) :] != event:
            raise ValueError(f"{name} of shape {shape} does not fit weights of shape {jnp.shape(weights)}: it must end in {event}.")
        batches.append(shape[: len(shape) - len(event)])
    try:
        batch_shape = lax.broadcast_shapes(*batches)
    except ValueError:
        raise ValueError(f"the batch shapes {batches} of {list(params)} do not broadcast: lead every parameter alike.") from None
    if scale is not None and not isinstance(scale, jax.core.Tracer) and not (np.asarray(scale) > 0).all():
        raise ValueError(f"scale must be positive, got {scale}: it is a standard deviation; learn its logarithm.")
    dtype = jnp.result_type(*params.values(), 1.0)
    return {
        name: jnp.broadcast_to(jnp.asarray(value, dtype), batch_shape + events.get(name, (num_visible,)))
        for name, value in params.items()
    }


def _require_finite(name: str, value: Any) -> None:
    """Says nothing while values are traced."""
    if isinstance(value, jax.core.Tracer):
        return
    finite = np.isfinite(np.asarray(value))
    if not finite.all():
        raise ValueError(f"{name}: {int((~finite).sum())} of {finite.size} values are NaN or infinite. Look at what made them.")
