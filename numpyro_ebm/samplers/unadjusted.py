# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Unadjusted Langevin, with a check of the smallest variance that its step allows.

.. math:: x \leftarrow x + h \, \nabla \log p(x) + \sqrt{2 h} \, \xi, \qquad \xi \sim N(0, I).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm._checks import require_count, require_positive
from numpyro_ebm.samplers.base import WHAT_A_STEP_IS, LogProb, Sampler, langevin_move, real_positions, require_state

HEALTHY, NEAR_FLOOR, RUNNING_AWAY = 0, 1, 2


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
class UnadjustedLangevin(Sampler):
    r"""Unadjusted Langevin (ULA): :math:`x \leftarrow x + h \nabla \log p(x) + \sqrt{2h} \, \xi`, ``num_steps`` times.

    It is biased at every :math:`h > 0`. On a quadratic energy of curvature :math:`c` its stationary variance is exactly
    :math:`1 / (c (1 - hc/2))`, never less than :math:`2h`: **no chain of step** :math:`h` **is narrower than**
    :math:`2h`. Where the data need a narrower distribution, training sharpens the energy without end. The state therefore carries
    ``stiffness``, an estimate of :math:`hc` from the scores the chains met (:math:`\mathrm{Var}(s) = c / (1 - hc/2)`), and
    :meth:`check` tells when it comes near the floor. :class:`MALA` has no such floor.

    The convention of Pang et al. (2020), :math:`x + \tfrac{s^2}{2} \nabla \log p + s \xi`, is :math:`h = s^2 / 2`.

    :param float step_size: the step :math:`h`.
    :param int num_steps: steps in one run; 0 leaves the chains where they are.
    :raises ValueError: if ``step_size`` is not a positive finite number or ``num_steps`` is not an integer of 0 or more.

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
    is_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", require_positive("step_size", self.step_size, WHAT_A_STEP_IS))
        object.__setattr__(self, "num_steps", require_count("num_steps", self.num_steps, least=0))

    def init(self, position: Array, target: LogProb | None = None) -> UnadjustedLangevinState:
        """The state of chains that stand at ``position``, of shape ``(num_chains,) + batch_shape + event_shape``."""
        position, count = real_positions(position), jnp.zeros((), jnp.int32)
        return UnadjustedLangevinState(position, jnp.zeros((), position.dtype), count, count)

    def run(self, rng_key: Array, target: LogProb, state: UnadjustedLangevinState) -> UnadjustedLangevinState:
        """``num_steps`` steps of every chain.

        :param rng_key: a key of :func:`jax.random.key`.
        :param target: maps ``(num_chains,) + batch_shape + event_shape`` to ``(num_chains,) + batch_shape``.
        :param state: where the chains stand.
        :return: the state after the last step, with gradients stopped.
        """
        if self.num_steps == 0:
            return state
        h = self.step_size
        score = jax.grad(lambda x: target(x).sum())

        def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
            x, spread = carry
            s = score(x)
            x = langevin_move(key, x, s, h, math.sqrt(2 * h))
            # the variance over chains: what all chains share is travel towards the mode, not stiffness
            return (x, spread + (s.var(0, ddof=1) if len(s) > 1 else s[0] ** 2)), None

        start = lax.stop_gradient(require_state(state, UnadjustedLangevinState).position)
        keys = jax.random.split(rng_key, self.num_steps)
        (x, spread), _ = lax.scan(step, (start, jnp.zeros_like(start[0])), keys)
        return self._diagnose(state, x, h * spread.max() / self.num_steps)

    def _diagnose(self, state: UnadjustedLangevinState, x: Array, ratio: Array) -> UnadjustedLangevinState:
        # ratio = h Var(s) = hc / (1 - hc/2) on a quadratic, hence hc = 2 ratio / (2 + ratio); a ratio of inf or nan is 2
        stiffness = jnp.where(jnp.isfinite(ratio), 2 * ratio / (2 + ratio), 2.0).astype(x.dtype)
        near = jnp.where(stiffness > NEAR_FLOOR_STIFFNESS, state.runs_near_floor + 1, 0)
        unstable = jnp.where(stiffness > UNSTABLE_STIFFNESS, state.runs_unstable + 1, 0)
        return lax.stop_gradient(UnadjustedLangevinState(x, stiffness, near, unstable))

    def kept_of_start(self, state: UnadjustedLangevinState) -> Array:
        r"""What the mean of chains keeps of where they started, :math:`(1 - hc)^J`, along the steepest direction that they felt:
        along others it is more.
        """
        return jnp.abs(1 - state.stiffness) ** self.num_steps

    def check(self, state: UnadjustedLangevinState) -> Array:
        """Whether the step suits the energy: 0 if it does, 1 near the variance floor, 2 when the chains diverge.

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
