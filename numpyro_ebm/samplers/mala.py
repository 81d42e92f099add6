# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""The Metropolis-adjusted Langevin algorithm (MALA), with its step size adapted, and jumps between modes.

.. math::

    x' = x + h \, \nabla \log p(x) + \sqrt{2 h} \, \xi, \qquad
    a(x, x') = \min \Big(1, \frac{p(x') \, q(x \mid x')}{p(x) \, q(x' \mid x)} \Big),

with :math:`q(x' \mid x) \propto \exp(-\|x' - x - h \nabla \log p(x)\|^2 / 4h)` the density of the proposal. Of a jump it is the
density :math:`b(x')` of the target's reference, wherever the chain stands.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm._checks import require_bool, require_count, require_fraction, require_positive
from numpyro_ebm.samplers.base import (
    WHAT_A_STEP_IS,
    LogProb,
    Sampler,
    Target,
    langevin_move,
    log_langevin,
    over_events,
    real_positions,
    require_state,
)


class MALAState(NamedTuple):
    """State of :class:`~numpyro_ebm.MALA`."""

    #: (num_chains,) + batch_shape + event_shape
    position: Array
    #: batch_shape, the step h in use, adapted if the sampler adapts
    step_size: Array
    #: batch_shape, running mean of the chains' acceptance probability at full steps
    acceptance: Array
    #: batch_shape, the same of their jumps; it starts at 1, and is 0 where there is nothing to jump from
    jump_acceptance: Array


@dataclass(frozen=True)
class MALA(Sampler):
    r"""Metropolis-adjusted Langevin (MALA), its step size adapted to a target acceptance, and jumps. The default of this package.

    The proposal is that of :class:`UnadjustedLangevin`; accepting it with the Metropolis-Hastings probability makes the
    energy's distribution exactly stationary at every fixed :math:`h`, so there is no variance floor. Every element of a
    batched site is accepted by itself and has a step of its own, so a stack of K energies may have K scales.

    The step is adapted by stochastic approximation with a constant gain,
    :math:`\log h \leftarrow \log h + \kappa (\bar a - a^*)`, :math:`\bar a` the mean acceptance over the chains. The gain
    does not decay (dual averaging's does) because during training the energy, and with it the right step, keeps moving.
    A step that follows the chains is no longer fixed, and **few chains are then not exact**: on the energy
    :math:`x^4 / 4` the mean of :math:`x^2` is 3 percent too small with one chain, half a percent with 16, and a fifth of a
    percent with 64. :meth:`frozen`, by which draws after a fit are made, and ``adapt=False`` are exact with any number.

    Where an energy is much steeper than elsewhere every full step is rejected, and a chain that training leaves there
    would be stuck forever. So a fraction of the steps is small: :math:`h \, 10^{-G}` with :math:`G` geometric and drawn
    without regard to the chains, which keeps the distribution exactly stationary.

    Local moves do not cross between modes that are far apart, and chains that never do say nothing of how much weight each mode
    has: training then leaves the weights of a learned density anywhere, while the chains look right. So every run ends with a few
    **jumps**, proposals from the target's reference (the base of a :class:`~numpyro_ebm.TiltedDistribution`) that do not depend
    on where a chain stands, accepted by Metropolis-Hastings, which is exact and costs one energy each and no score. Jumps need a
    reference that reaches the modes: far from it, as in high dimension, nearly all are rejected (``jump_acceptance`` in the
    state says so), and chains then only move locally. A flat site has no reference unless it is given one, a random field has none.

    :param float step_size: the step :math:`h` to start from.
    :param int num_steps: steps in one run; 0 leaves the chains where they are.
    :param bool adapt: whether to adapt the step; without, the chain is exactly reversible.
    :param float target_acceptance: the acceptance :math:`a^*` to adapt to; .574 is optimal in high dimension.
    :param float small_steps: the fraction of steps that are shrunk tenfold, the same fraction of those a hundredfold, and so
        on; if not given, a quarter while the step adapts, and none with ``adapt=False``, where every step is ``step_size``.
    :param int num_jumps: jumps in one run, after its steps, where the target has a reference; one for every 10 steps, rounded up,
        if not given.
    :raises ValueError: if ``step_size`` is not a positive finite number, ``num_steps`` or ``num_jumps`` is not an integer of 0 or
        more, ``adapt`` is not a bool, ``target_acceptance`` is not between 0 and 1, or ``small_steps`` is not at least 0 and less
        than 1.

    **References**

    1. Roberts and Tweedie, *Exponential convergence of Langevin distributions and their discrete approximations*,
       Bernoulli 2 (1996): why MALA sticks where the energy is steep.
    2. Roberts and Rosenthal, *Optimal scaling of discrete approximations to Langevin diffusions*, JRSS B 60 (1998).
    3. Tierney, *Markov chains for exploring posterior distributions*, Annals of Statistics 22 (1994): proposals that do not depend
       on where a chain stands.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import MALA
        >>> sampler = MALA(num_steps=300)
        >>> state = sampler.init(jnp.zeros((2000, 3)))
        >>> state = sampler.run(jax.random.key(0), lambda x: -50 * (x**2).sum(-1), state)
        >>> sd, step_size = state.position.std(), state.step_size
        >>> print(f"standard deviation {sd:.2f}, step size {step_size:.2f}")
        standard deviation 0.10, step size 0.01
    """

    step_size: float = 0.1
    num_steps: int = 10
    adapt: bool = True
    target_acceptance: float = 0.574
    small_steps: float | None = None
    num_jumps: int | None = None
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        small_steps = (0.25 if self.adapt else 0.0) if self.small_steps is None else self.small_steps
        num_steps = require_count("num_steps", self.num_steps, least=0)
        num_jumps = -(-num_steps // STEPS_PER_JUMP) if self.num_jumps is None else self.num_jumps
        settings = {
            "step_size": require_positive("step_size", self.step_size, WHAT_A_STEP_IS),
            "num_steps": num_steps,
            "adapt": require_bool("adapt", self.adapt),
            "target_acceptance": require_fraction("target_acceptance", self.target_acceptance),
            "small_steps": require_fraction("small_steps", small_steps, "it is a fraction of the steps", zero=True),
            "num_jumps": require_count("num_jumps", num_jumps, least=0),
        }
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def init(self, position: Array, target: LogProb | None = None) -> MALAState:
        """The state of chains that stand at ``position``, of shape ``(num_chains,) + batch_shape + event_shape``.

        :param target: as for :meth:`run`; it tells the batch shape, ``()`` if not given.
        """
        position = real_positions(position)
        batch_shape = () if target is None else _batch_shape(position, jax.eval_shape(target, position))
        dtype = jnp.promote_types(position.dtype, jnp.float32)  # a step of half precision could not adapt: changes round away
        return MALAState(position, *(jnp.full(batch_shape, x, dtype) for x in (self.step_size, self.target_acceptance, 1.0)))

    def run(self, rng_key: Array, target: LogProb, state: MALAState) -> MALAState:
        """``num_steps`` steps of every chain, and ``num_jumps`` jumps where the target has a reference.

        :param rng_key: a key of :func:`jax.random.key`.
        :param target: maps ``(num_chains,) + batch_shape + event_shape`` to ``(num_chains,) + batch_shape``.
        :param state: where the chains stand, and the steps they move by.
        :return: the state after the last move, with gradients stopped.
        """
        if self.num_steps == self.num_jumps == 0:
            return state
        start, step_size, acceptance, jump_acceptance = lax.stop_gradient(require_state(state, MALAState))
        dtype = step_size.dtype  # of densities and acceptance; positions may have half of its precision

        def chains_at(x: Array) -> _Chains:
            log_density, pullback = jax.vjp(lambda x: target(x).astype(dtype), x)
            return _Chains(x, log_density, pullback(jnp.ones_like(log_density))[0])

        chains = chains_at(start)
        batch_shape = _batch_shape(start, chains.log_density)

        def step(carry: tuple[_Chains, Array, Array], keys: tuple[Array, Array]) -> tuple[tuple[_Chains, Array, Array], None]:
            old, log_step, acceptance = carry
            key, shrink = keys
            noise_key, accept_key = jax.random.split(key)
            h = jnp.exp(log_step) * 10.0 ** -shrink.astype(dtype)
            step = over_events(h, start.ndim - 1)
            new = chains_at(langevin_move(noise_key, old.position, old.score, step, jnp.sqrt(2 * step)))
            probability = _acceptance(old, new, h)
            chains = _where(jax.random.bernoulli(accept_key, probability), new, old)
            gain, mean = jnp.where(shrink == 0, ADAPTATION_GAIN, 0.0).astype(dtype), probability.mean(0)
            if self.adapt:
                log_step = log_step + gain * (mean - self.target_acceptance)
            return (chains, log_step, acceptance + gain * (mean - acceptance)), None

        move_key, shrink_key, jump_key = jax.random.split(rng_key, 3)
        shrink = jax.random.geometric(shrink_key, 1 - (self.small_steps or 0.0), (self.num_steps,)) - 1
        log_step, acceptance, jumped = (jnp.broadcast_to(x, batch_shape) for x in (jnp.log(step_size), acceptance, jump_acceptance))
        carry = chains, log_step, acceptance
        (chains, log_step, acceptance), _ = lax.scan(step, carry, (jax.random.split(move_key, self.num_steps), shrink))
        held = jnp.broadcast_to(step_size, batch_shape)  # to the last digit: exp(log(h)) would drift from run to run
        position, jumped = self._jump(jump_key, target, chains, jumped)
        return lax.stop_gradient(MALAState(position, jnp.exp(log_step) if self.adapt else held, acceptance, jumped))

    def _jump(self, rng_key: Array, target: LogProb, chains: "_Chains", acceptance: Array) -> tuple[Array, Array]:
        """Positions after ``num_jumps`` jumps, and the running mean of their acceptance."""
        reference = target.reference if isinstance(target, Target) else None
        if reference is None or self.num_jumps == 0:
            return chains.position, jnp.zeros_like(acceptance)

        def log_weight(x: Array, log_density: Array) -> Array:
            weight = log_density - reference.log_prob(x).astype(log_density.dtype)
            return jnp.where(jnp.isnan(weight), -jnp.inf, weight)  # where there is no density, any jump to some is taken

        def jump(carry: tuple[Array, Array, Array], key: Array) -> tuple[tuple[Array, Array, Array], None]:
            x, weight, acceptance = carry
            propose_key, accept_key = jax.random.split(key)
            new = reference.sample(propose_key, len(x)).astype(x.dtype)
            new_weight = log_weight(new, target(new).astype(weight.dtype))
            probability = metropolis(new_weight - weight)
            x, weight = _where(jax.random.bernoulli(accept_key, probability), (new, new_weight), (x, weight))
            return (x, weight, acceptance + ADAPTATION_GAIN * (probability.mean(0) - acceptance)), None

        carry = chains.position, log_weight(*chains[:2]), acceptance
        (position, _, acceptance), _ = lax.scan(jump, carry, jax.random.split(rng_key, self.num_jumps or 0))
        return position, acceptance

    def frozen(self) -> "MALA":
        """The same sampler with the step held where its state has it. Small steps and jumps go on."""
        return dataclasses.replace(self, adapt=False)


class _Chains(NamedTuple):
    position: Array  # (num_chains,) + batch_shape + event_shape
    log_density: Array  # (num_chains,) + batch_shape
    score: Array  # of the shape of the position


def _acceptance(old: _Chains, new: _Chains, h: Array) -> Array:
    """The Metropolis-Hastings probability of every element of every chain; 0 where the proposal's density is nan."""

    def log_proposal(to: _Chains, start: _Chains) -> Array:
        x, y = start.position.astype(h.dtype), to.position.astype(h.dtype)
        return log_langevin(y, x, start.score, h, old.log_density.shape)

    log_ratio = new.log_density - old.log_density + log_proposal(old, new) - log_proposal(new, old)
    return metropolis(log_ratio)


def metropolis(log_ratio: Array) -> Array:
    """The probability of accepting a proposal, of the log of its ratio; 0 where that is nan."""
    return jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))


def _where(accept: Array, new: Any, old: Any) -> Any:
    """What there is of each element of each chain: the new where it is accepted, the old where it is not."""
    return jax.tree.map(lambda new, old: jnp.where(over_events(accept, new.ndim), new, old), new, old)


def _batch_shape(position: Array, log_density: Any) -> tuple[int, ...]:
    """What of the shape of log densities is not the number of chains."""
    if log_density.shape[:1] != position.shape[:1]:
        raise ValueError(
            f"the target gives log densities of shape {log_density.shape} for positions of shape {position.shape}: it must "
            "map a batch of positions, with chains along axis 0, to one log density for each."
        )
    return log_density.shape[1:]


# kappa: acceptance falls by about .3 per unit of log h near its target, so the step is right within 30 steps.
ADAPTATION_GAIN = 0.1

# A jump costs an energy and a step about three, so that these cost a thirtieth of the run.
STEPS_PER_JUMP = 10
