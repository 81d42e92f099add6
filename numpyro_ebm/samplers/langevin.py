# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Langevin samplers: the unadjusted chain, and the Metropolis-adjusted one (MALA) with its step size adapted.

Both move by the same proposal, with the step size :math:`h` in its one convention throughout this package:

.. math:: x' = x + h \, \nabla \log p(x) + \sqrt{2 h} \, \xi, \qquad \xi \sim N(0, I).

A sampler is a frozen dataclass with two pure functions, ``init(position, log_prob) -> state`` and
``run(rng_key, log_prob, state) -> state``, in the shape of BlackJAX's kernels. Axis 0 of a position counts the chains;
``log_prob`` maps a batch of points to a batch of log densities, so a whole population costs one gradient call.

:func:`annealed_langevin` is no kernel but a whole run, from noise to draws, through a schedule of temperatures.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

LogProb = Callable[[Array], Array]

Position = TypeVar("Position")  # an array, or a pytree of arrays

HEALTHY, NEAR_FLOOR, RUNNING_AWAY = 0, 1, 2


class Sampler(Protocol):
    """What :class:`~numpyro_ebm.negative_phase` and the energy distributions ask of a sampler.

    The state is a :class:`~typing.NamedTuple` of arrays with a field ``position``, of shape
    ``(num_chains,) + batch_shape + event_shape``. A sampler may also have ``uses_score`` (whether it differentiates
    ``log_prob``: it is then given positions in unconstrained space and refused at discrete sites) and
    ``check(state) -> status``; see :meth:`UnadjustedLangevin.check <numpyro_ebm.UnadjustedLangevin.check>`.
    """

    def init(self, position: Array, log_prob: LogProb) -> Any:
        """The state of chains that stand at ``position``."""

    def run(self, rng_key: Array, log_prob: LogProb, state: Any) -> Any:
        """The state after this sampler's number of steps."""


class UnadjustedLangevinState(NamedTuple):
    """State of :class:`~numpyro_ebm.UnadjustedLangevin`."""

    #: (num_chains,) + batch_shape + event_shape
    position: Array
    #: (), h times the largest mean curvature that the chains felt in the last run
    stiffness: Array
    #: (), int32: runs in a row with a stiffness above NEAR_FLOOR_STIFFNESS
    runs_near_floor: Array
    #: (), int32: runs in a row with a stiffness above UNSTABLE_STIFFNESS
    runs_unstable: Array


# On a quadratic of curvature c the chain's variance is 1 / (c (1 - hc/2)): at hc = 1/2 it is a third too wide, at
# hc = 1 it is as narrow as it can ever be (2h), at hc = 2 it diverges.
NEAR_FLOOR_STIFFNESS, UNSTABLE_STIFFNESS = 0.5, 1.9
RUNS_TO_WARN, RUNS_TO_STOP = 20, 50


@dataclass(frozen=True)
class UnadjustedLangevin:
    r"""Unadjusted Langevin (ULA): :math:`x \leftarrow x + h \nabla \log p(x) + \sqrt{2h} \, \xi`, ``num_steps`` times.

    It is biased at every :math:`h > 0`. On a quadratic energy of curvature :math:`c` its stationary variance is exactly
    :math:`1 / (c (1 - hc/2))`, never less than :math:`2h`: **no chain of step** :math:`h` **is narrower than**
    :math:`2h`. Where the data want a narrower law, training sharpens the energy without end. The state therefore carries
    ``stiffness``, an estimate of :math:`hc` from the scores the chains met (:math:`\mathrm{Var}(s) = c / (1 - hc/2)`), and
    :meth:`check` tells when it comes near the floor. :class:`MALA` has no such floor.

    The convention of Pang et al. (2020), :math:`x + \tfrac{s^2}{2} \nabla \log p + s \xi`, is :math:`h = s^2 / 2`.

    :param float step_size: the step :math:`h`.
    :param int num_steps: steps in one run; 0 leaves the chains where they are.
    :raises ValueError: if ``step_size`` is not a positive finite number or ``num_steps`` is not a natural number.

    **References**

    1. Roberts and Tweedie, *Exponential convergence of Langevin distributions and their discrete approximations*,
       Bernoulli 2 (1996).
    2. Pang et al., *Learning latent space energy-based prior model*, NeurIPS 2020, arXiv:2006.08205.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import UnadjustedLangevin
        >>> sampler = UnadjustedLangevin(step_size=0.1, num_steps=100)
        >>> state = sampler.init(jnp.zeros((2000, 3)))
        >>> state = sampler.run(jax.random.key(0), lambda x: -(x**2).sum(-1) / 2, state)
        >>> state.position.shape
        (2000, 3)
    """

    step_size: float = 0.01
    num_steps: int = 10
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _validate(self.step_size, self.num_steps)

    def init(self, position: Array, log_prob: LogProb | None = None) -> UnadjustedLangevinState:
        """The state of chains that stand at ``position``, of shape ``(num_chains,) + batch_shape + event_shape``."""
        count = jnp.zeros((), jnp.int32)
        return UnadjustedLangevinState(position, jnp.zeros((), position.dtype), count, count)

    def run(self, rng_key: Array, log_prob: LogProb, state: UnadjustedLangevinState) -> UnadjustedLangevinState:
        """``num_steps`` steps of every chain.

        :param rng_key: a key of :func:`jax.random.key`.
        :param log_prob: maps ``(num_chains,) + batch_shape + event_shape`` to ``(num_chains,) + batch_shape``.
        :param state: where the chains stand.
        :return: the state after the last step, with gradients stopped.
        """
        if self.num_steps == 0:
            return state
        h = self.step_size
        score = jax.grad(lambda x: log_prob(x).sum())

        def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
            x, spread = carry
            s = score(x)
            x = x + h * s + math.sqrt(2 * h) * jax.random.normal(key, x.shape, x.dtype)
            # the variance over chains: what all chains share is travel towards the mode, not stiffness
            return (x, spread + (s.var(0, ddof=1) if len(s) > 1 else s[0] ** 2)), None

        start = lax.stop_gradient(state.position)
        keys = jax.random.split(rng_key, self.num_steps)
        (x, spread), _ = lax.scan(step, (start, jnp.zeros_like(start[0])), keys)
        return self._diagnose(state, x, h * spread.max() / self.num_steps)

    def _diagnose(self, state: UnadjustedLangevinState, x: Array, ratio: Array) -> UnadjustedLangevinState:
        # ratio = h Var(s) = hc / (1 - hc/2) on a quadratic, hence hc = 2 ratio / (2 + ratio); a ratio of inf or nan is 2
        stiffness = jnp.where(jnp.isfinite(ratio), 2 * ratio / (2 + ratio), 2.0).astype(x.dtype)
        near = jnp.where(stiffness > NEAR_FLOOR_STIFFNESS, state.runs_near_floor + 1, 0)
        unstable = jnp.where(stiffness > UNSTABLE_STIFFNESS, state.runs_unstable + 1, 0)
        return lax.stop_gradient(UnadjustedLangevinState(x, stiffness, near, unstable))

    def check(self, state: UnadjustedLangevinState) -> Array:
        """Whether the step suits the energy: 0 if it does, 1 near the variance floor, 2 when the chains run away.

        The stiffness must have been too high for many runs in a row: chains that start far away pass through steep
        places without harm.
        """
        near = jnp.where(state.runs_near_floor >= RUNS_TO_WARN, NEAR_FLOOR, HEALTHY)
        return jnp.where(state.runs_unstable >= RUNS_TO_STOP, RUNNING_AWAY, near)

    def explain(self, status: int) -> str:
        """What a status of :meth:`check` means, and the fix."""
        floor = f"no unadjusted chain of step h = {self.step_size:g} is narrower than variance 2h = {2 * self.step_size:g}"
        if status == NEAR_FLOOR:
            return f"the chains are near their variance floor ({floor}): take a smaller step_size, or MALA(), which has none"
        return (
            f"the chains run away: the energy has become too steep for the step ({floor}; "
            "training then sharpens the energy without end): take a step_size four times smaller, or MALA()"
        )


class MALAState(NamedTuple):
    """State of :class:`~numpyro_ebm.MALA`."""

    #: (num_chains,) + batch_shape + event_shape
    position: Array
    #: batch_shape, the step h in use, adapted if the sampler adapts
    step_size: Array
    #: batch_shape, running mean of the chains' acceptance probability at full steps
    acceptance: Array


@dataclass(frozen=True)
class MALA:
    r"""Metropolis-adjusted Langevin (MALA), its step size adapted to a target acceptance. The default of this package.

    The proposal is that of :class:`UnadjustedLangevin`; accepting it with the Metropolis-Hastings probability makes the
    energy's law exactly stationary at every :math:`h`, so there is no variance floor. The proposal is BlackJAX's. Every
    element of a batched site is accepted by itself and has a step of its own, so a stack of K energies may have K scales.

    The step is adapted by stochastic approximation with a constant gain,
    :math:`\log h \leftarrow \log h + \kappa (\bar a - a^*)`, :math:`\bar a` the mean acceptance over the chains. The gain
    does not decay (dual averaging's does) because during training the energy, and with it the right step, keeps moving.

    Where an energy is much steeper than elsewhere every full step is rejected, and a chain that training leaves there
    would be stuck for ever. So a share of the steps is small: :math:`h \, 10^{-G}` with :math:`G` geometric and drawn
    without regard to the chains, which keeps the law exactly stationary.

    :param float step_size: the step :math:`h` to start from.
    :param int num_steps: steps in one run; 0 leaves the chains where they are.
    :param bool adapt: whether to adapt the step; without, the chain is exactly reversible.
    :param float target_acceptance: the acceptance :math:`a^*` to adapt to; .574 is optimal in high dimension.
    :param float small_steps: the share of steps that are shrunk tenfold, the same share of those a hundredfold, and so on.
    :raises ValueError: if ``step_size`` is not a positive finite number, ``num_steps`` is not a natural number,
        ``target_acceptance`` is not between 0 and 1, or ``small_steps`` is not at least 0 and less than 1.

    **References**

    1. Roberts and Tweedie, *Exponential convergence of Langevin distributions and their discrete approximations*,
       Bernoulli 2 (1996): why MALA sticks where the energy is steep.
    2. Roberts and Rosenthal, *Optimal scaling of discrete approximations to Langevin diffusions*, JRSS B 60 (1998).

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import MALA
        >>> sampler = MALA(num_steps=300)
        >>> state = sampler.init(jnp.zeros((2000, 3)))
        >>> state = sampler.run(jax.random.key(0), lambda x: -50 * (x**2).sum(-1), state)
        >>> print(f"standard deviation {state.position.std():.2f}, step size {state.step_size:.2f}")
        standard deviation 0.10, step size 0.01
    """

    step_size: float = 0.1
    num_steps: int = 10
    adapt: bool = True
    target_acceptance: float = 0.574
    small_steps: float = 0.25
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _validate(self.step_size, self.num_steps)
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must lie between 0 and 1, got {self.target_acceptance!r}.")
        if not 0 <= self.small_steps < 1:
            raise ValueError(f"small_steps is a share of the steps, at least 0 and less than 1, got {self.small_steps!r}.")

    def init(self, position: Array, log_prob: LogProb | None = None) -> MALAState:
        """The state of chains that stand at ``position``, of shape ``(num_chains,) + batch_shape + event_shape``.

        :param log_prob: as for :meth:`run`; it tells the batch shape, ``()`` if not given.
        """
        batch_shape = () if log_prob is None else jax.eval_shape(log_prob, position).shape[1:]
        step_size, acceptance = (jnp.full(batch_shape, x, position.dtype) for x in (self.step_size, self.target_acceptance))
        return MALAState(position, step_size, acceptance)

    def run(self, rng_key: Array, log_prob: LogProb, state: MALAState) -> MALAState:
        """``num_steps`` steps of every chain.

        :param rng_key: a key of :func:`jax.random.key`.
        :param log_prob: maps ``(num_chains,) + batch_shape + event_shape`` to ``(num_chains,) + batch_shape``.
        :param state: where the chains stand, and the steps they move by.
        :return: the state after the last step, with gradients stopped.
        """
        if self.num_steps == 0:
            return state
        from blackjax.mcmc.diffusions import DiffusionState, overdamped_langevin  # on first use: BlackJAX is slow to import

        dtype, default = state.position.dtype, jnp.result_type(float)  # BlackJAX draws its noise in the default dtype
        start, step_size, acceptance = lax.stop_gradient(jax.tree.map(lambda x: x.astype(default), state))

        def value_and_score(x: Array) -> tuple[Array, Array]:
            log_p, pullback = jax.vjp(lambda x: log_prob(x.astype(dtype)).astype(default), x)
            return log_p, pullback(jnp.ones_like(log_p))[0]

        propose = overdamped_langevin(value_and_score)
        chains = DiffusionState(start, *value_and_score(start))
        batch_shape, event_dim = chains.logdensity.shape[1:], start.ndim - chains.logdensity.ndim

        def step(carry: tuple[Any, Array, Array], keys: tuple[Array, Array]) -> tuple[tuple[Any, Array, Array], None]:
            old, log_step, acceptance = carry
            key, shrink = keys
            noise_key, accept_key = jax.random.split(key)
            h = jnp.exp(log_step) * 10.0 ** -shrink.astype(default)
            new = propose(noise_key, old, _over_events(h, event_dim))
            probability = _acceptance(old, new, h)
            accept = jax.random.bernoulli(accept_key, probability)
            chains = jax.tree.map(lambda new, old: jnp.where(_over_events(accept, new.ndim - accept.ndim), new, old), new, old)
            gain, mean = jnp.where(shrink == 0, ADAPTATION_GAIN, 0.0), probability.mean(0)
            if self.adapt:
                log_step = log_step + gain * (mean - self.target_acceptance)
            return (chains, log_step, acceptance + gain * (mean - acceptance)), None

        move_key, shrink_key = jax.random.split(rng_key)
        shrink = jax.random.geometric(shrink_key, 1 - self.small_steps, (self.num_steps,)) - 1
        carry = chains, *(jnp.broadcast_to(x, batch_shape) for x in (jnp.log(step_size), acceptance))
        (chains, log_step, acceptance), _ = lax.scan(step, carry, (jax.random.split(move_key, self.num_steps), shrink))
        state = MALAState(chains.position, jnp.exp(log_step), acceptance)
        return lax.stop_gradient(jax.tree.map(lambda x: x.astype(dtype), state))


def _acceptance(old: Any, new: Any, h: Array) -> Array:
    """The Metropolis-Hastings probability of every element of every chain; 0 where the proposal's density is nan."""

    def log_proposal(to: Any, start: Any) -> Array:
        distance = to.position - start.position - _over_events(h, to.position.ndim - to.logdensity.ndim) * start.logdensity_grad
        return -(distance**2).reshape((*old.logdensity.shape, -1)).sum(-1) / (4 * h)

    log_ratio = new.logdensity - old.logdensity + log_proposal(old, new) - log_proposal(new, old)
    return jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))


def _over_events(x: Array, event_dim: int) -> Array:
    """``x`` with axes of size 1 for the event."""
    return x.reshape(x.shape + (1,) * event_dim)


# kappa: acceptance falls by about .3 per unit of log h near its target, so the step is right within 30 steps.
ADAPTATION_GAIN = 0.1


def annealed_langevin(
    rng_key: Array,
    log_prob: Callable[[Position], Array],
    start: Position,
    step_size: float = 2e-4,
    temperatures: Any = None,
) -> Position:
    r"""Unadjusted Langevin through a schedule of temperatures, from noise to draws.

    One step for every temperature :math:`T`,

    .. math:: x \leftarrow x + h \nabla \log p(x) + \sqrt{2 h T} \, \xi, \qquad \xi \sim N(0, I),

    whose stationary law at a fixed temperature is that of :math:`p^{1/T}`, up to the bias of :class:`UnadjustedLangevin`: on
    a quadratic energy of curvature :math:`c` its variance is exactly :math:`T / (c (1 - hc/2))`. The papers write
    :math:`x - \tfrac{\sigma^2}{2} \nabla E + \sqrt{T} \sigma \xi`, which is :math:`h = \sigma^2 / 2`; their :math:`\sigma = .02`
    is the default here.

    A model learned by denoising has the law of the data with noise on them: :func:`denoise` takes it off afterwards. A chain
    at a high temperature goes far from the data, and may not come back where :math:`p` is not integrable: look at the draws.

    :param rng_key: a key of :func:`jax.random.key`.
    :param log_prob: maps positions, with chains along axis 0, to log densities of shape ``(num_chains,)``.
    :param start: where the chains stand, an array of shape ``(num_chains,) + event_shape`` or a pytree of such arrays, which
        move together. The papers start at :math:`0.5 + N(0, I)`.
    :param float step_size: the step :math:`h`.
    :param temperatures: one temperature for every step, :func:`annealing_schedule` if not given.
    :return: where the chains stand after the last step, with gradients stopped.
    :raises ValueError: if ``step_size`` is not a positive finite number, a temperature is negative or not finite, or ``start``
        is not made of floating arrays with the same number of chains.

    **References**

    1. Song and Ermon, *Generative modeling by estimating gradients of the data distribution*, NeurIPS 2019, arXiv:1907.05600.
    2. Li, Chen and Sommer, *Learning energy-based models in high-dimensional spaces with multi-scale denoising score
       matching*, 2019, arXiv:1910.07762: the schedule and the last step.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import annealed_langevin, annealing_schedule
        >>> def log_prob(x):  # two far modes, which no chain crosses between at temperature 1
        ...     return jnp.logaddexp(-50 * ((x - 2) ** 2).sum(-1), -50 * ((x + 2) ** 2).sum(-1))
        >>> x = annealed_langevin(jax.random.key(0), log_prob, jnp.full((1000, 1), 2.0), step_size=2e-3)
        >>> print(f"{jnp.mean(x > 0):.1f} of the chains on the right, {jnp.mean(x < 0):.1f} on the left")
        0.5 of the chains on the right, 0.5 on the left
    """
    _validate_step(step_size)
    schedule = _require_temperatures(annealing_schedule() if temperatures is None else temperatures)
    _require_chains(start)
    score = jax.grad(lambda x: log_prob(x).sum())

    def step(x: Any, key_and_temperature: tuple[Array, Array]) -> tuple[Any, None]:
        key, temperature = key_and_temperature
        leaves, structure = jax.tree.flatten(x)
        keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

        def move(x: Array, s: Array, key: Array) -> Array:
            noise = jax.random.normal(key, x.shape, x.dtype)
            return (x + step_size * s + jnp.sqrt(2 * step_size * temperature) * noise).astype(x.dtype)

        return jax.tree.map(move, x, score(x), keys), None

    keys = jax.random.split(rng_key, len(schedule))
    x, _ = lax.scan(step, lax.stop_gradient(start), (keys, schedule))
    return lax.stop_gradient(x)


def annealing_schedule(num_hot: int = 500, num_cooling: int = 2000, num_freezing: int = 200, hottest: float = 100.0) -> np.ndarray:
    """Temperatures for :func:`annealed_langevin`: hot, then geometrically down to 1, then linearly from 1 to 0.

    The defaults are those of the papers. The last step, at temperature 0, has no noise.

    :param int num_hot: steps at the temperature ``hottest``.
    :param int num_cooling: steps from ``hottest`` down to 1, without the 1.
    :param int num_freezing: steps from 1 to 0, both included.
    :param float hottest: the first temperature.
    :return: temperatures, of shape ``(num_hot + num_cooling + num_freezing,)``.
    :raises ValueError: if a number of steps is not a natural number, or ``hottest`` is not a positive finite number.
    """
    for name, value in (("num_hot", num_hot), ("num_cooling", num_cooling), ("num_freezing", num_freezing)):
        _validate_count(name, value)
    _validate_positive("hottest", hottest, "a temperature, 1 for the density itself")
    cooling = np.geomspace(hottest, 1, num_cooling, endpoint=False)
    return np.concatenate([np.full(num_hot, float(hottest)), cooling, np.linspace(1, 0, num_freezing)])


def denoise(log_prob: LogProb, x: Array, sigma: float) -> Array:
    r"""The mean of what noise of standard deviation :math:`\sigma` has made ``x`` of, :math:`x + \sigma^2 \nabla \log p(x)`.

    It is exact where :math:`p` is the law of the noisy values (Tweedie's formula): the last step of sampling from what was
    learned by denoising score matching.

    :param log_prob: maps noisy values, of shape ``(num_chains,) + event_shape``, to their log densities, ``(num_chains,)``.
    :param x: noisy values.
    :param float sigma: standard deviation of the noise.
    :raises ValueError: if ``sigma`` is not a positive finite number.
    """
    _validate_positive("sigma", sigma, "the standard deviation of the noise")
    return x + sigma**2 * jax.grad(lambda x: log_prob(x).sum())(x)


def _require_temperatures(temperatures: Any) -> Array:
    if np.ndim(temperatures) != 1:
        raise ValueError(f"temperatures must be a vector, one for every step, got shape {np.shape(temperatures)}.")
    if not isinstance(temperatures, jax.core.Tracer):
        values = np.asarray(temperatures)
        if bad := [float(value) for value in values if not (np.isfinite(value) and value >= 0)]:
            raise ValueError(f"temperatures must be at least 0 and finite, got {bad[0]!r}.")
    return jnp.asarray(temperatures)


def _require_chains(start: Any) -> None:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(start)]
    shapes = [leaf.shape for leaf in leaves]
    if not leaves or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"start must be made of arrays with the same number of chains along axis 0, got shapes {shapes}.")
    if bad := [leaf.dtype for leaf in leaves if not jnp.issubdtype(leaf.dtype, jnp.floating)]:
        raise ValueError(f"start must be made of floating arrays, which have scores, got {bad[0]}.")


def _validate(step_size: float, num_steps: int) -> None:
    _validate_step(step_size)
    _validate_count("num_steps", num_steps)


def _validate_step(step_size: float) -> None:
    _validate_positive("step_size", step_size, "the h of x + h * score + sqrt(2 h) * noise")


def _validate_positive(name: str, value: float, what: str) -> None:
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {what}: it must be positive and finite, got {value!r}.")


def _validate_count(name: str, value: int) -> None:
    if not (isinstance(value, numbers.Integral) and value >= 0):
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}.")
