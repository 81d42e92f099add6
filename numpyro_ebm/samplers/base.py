# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a sampler is, and what it is given: :class:`Sampler`, :class:`Target`.

A sampler is a pair of pure functions in the shape of BlackJAX's kernels, ``init(position, target) -> state`` and
``run(rng_key, target, state) -> state``. Axis 0 of a position counts the chains. A target maps a batch of positions to their log
densities, so that a whole population costs one call.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LogProb = Callable[[Array], Array]


class Reference(NamedTuple):
    """Where the path to a :class:`Target` starts: a distribution that can be sampled at once, in the space of the chains."""

    #: ``sample(rng_key, n)``: independent positions, of shape ``(n,) + batch_shape + event_shape``
    sample: Callable[[Array, int], Array]
    #: their normalized log density, of shape ``(n,) + batch_shape``
    log_prob: LogProb


class Target:
    """The density that chains are moved on: callable as the log density of a batch of positions.

    :meth:`Sampler.run` may be given any function of positions, and most samplers use no more of a target than that. The
    targets of distributions also have what jumps, annealing and tempering need: a reference, and the path from it.

    :param log_prob: ``log_prob(x, beta)`` maps positions of shape ``(num_chains,) + batch_shape + event_shape`` to log densities
        of shape ``(num_chains,) + batch_shape``: those of the reference at ``beta`` 0, up to a constant, of the target at 1.
    :param reference: what can be sampled at ``beta`` 0; None where that is a flat measure.
    """

    def __init__(self, log_prob: Callable[[Array, Any], Array], reference: Reference | None = None) -> None:
        self._log_prob, self.reference, self.beta = log_prob, reference, 1.0

    def __call__(self, x: Array) -> Array:
        return self._log_prob(x, self.beta)

    def at(self, beta: Any) -> Self:
        """The target at ``beta`` of the path from the reference, 0, to the density itself, 1.

        Of a :class:`~numpyro_ebm.TiltedDistribution` it is the base tilted by ``beta`` times the energy.
        """
        point = copy.copy(self)
        point.beta = beta
        return point


class ChainState(NamedTuple):
    """The state of a sampler that remembers nothing but where its chains stand."""

    #: (num_chains,) + batch_shape + event_shape
    position: Array


class Sampler:
    """How chains move: what all samplers are derived from, with defaults for all but :meth:`run`.

    A sampler should be hashable and equal to another of the same settings, as a frozen dataclass is: it is compiled in.

    .. doctest::

        >>> from dataclasses import dataclass
        >>> import jax, jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import EnergyDistribution
        >>> from numpyro_ebm.samplers import Sampler, over_events
        >>> @dataclass(frozen=True)
        ... class RandomWalk(Sampler):
        ...     scale: float = 2.0
        ...     num_steps: int = 50
        ...
        ...     def run(self, rng_key, target, state):
        ...         def step(x, key):
        ...             key, accept_key = jax.random.split(key)
        ...             new = x + self.scale * jax.random.normal(key, x.shape)
        ...             ratio = target(new) - target(x)
        ...             accept = jnp.log(jax.random.uniform(accept_key, ratio.shape)) < ratio
        ...             return jnp.where(over_events(accept, x.ndim), new, x), None
        ...
        ...         x, _ = jax.lax.scan(
        ...             step, state.position, jax.random.split(rng_key, self.num_steps)
        ...         )
        ...         return state._replace(position=x)
        >>> normal = EnergyDistribution(
        ...     lambda x: (x - 3) ** 2 / 2, initial=dist.Normal(0, 1), sampler=RandomWalk()
        ... )
        >>> print(normal.sample(jax.random.key(0), (2000,)).mean().round(1))
        3.0
    """

    uses_score: ClassVar[bool] = False
    """Whether it differentiates the target: its positions are then unconstrained, and it is refused at discrete sites."""
    is_exact: ClassVar[bool] = True
    """Whether it leaves the target as it is, at every step size: weights of chains need that."""

    def init(self, position: Array, target: LogProb | None = None) -> Any:
        """The state of chains that stand at ``position``, of shape ``(num_chains,) + batch_shape + event_shape``.

        :param target: as for :meth:`run`, where the state depends on it.
        :return: a :class:`~typing.NamedTuple` of arrays with a field ``position``.
        """
        return ChainState(position)

    def run(self, rng_key: Array, target: LogProb, state: Any) -> Any:
        """The state after this sampler's number of steps.

        :param rng_key: a key of :func:`jax.random.key`.
        :param target: the log density of a batch of positions; distributions give a :class:`Target`.
        :param state: where the chains stand.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its chains move: def run(self, rng_key, target, state).")

    def frozen(self) -> "Sampler":
        """The same sampler without adaptation, which goes on from the same states: what draws after a fit moves by it."""
        return self

    def kept_of_start(self, state: Any) -> Any:
        """The fraction that the mean of chains keeps, after a run, of where they started, of shape (); 0 where it is not known."""
        return 0.0

    def check(self, state: Any) -> Array:
        """Whether the chains are well, an int32 of shape (): 0 if they are, 1 to warn, 2 or more to stop the run."""
        return jnp.zeros((), jnp.int32)

    def explain(self, status: int) -> str:
        """What a status of :meth:`check` means, and the fix: a clause without a full stop."""
        return f"{type(self).__name__}.check gives the status {status}"


def require_sampler(name: str, value: Any, alternative: str = "") -> Sampler:
    """A sampler, and neither a class of samplers nor what only looks like one.

    :param str alternative: what else may be given, for the message.
    :raises TypeError: naming the setting, what it was and the fix.
    """
    if isinstance(value, Sampler):
        return value
    wanted = f"{name} must be a sampler such as MALA(){alternative}"
    if isinstance(value, type):
        raise TypeError(f"{wanted}, got the class {value.__name__}: pass an instance, {value.__name__}(...).")
    fix = ": derive it from numpyro_ebm.samplers.Sampler" if hasattr(value, "run") else ""
    raise TypeError(f"{wanted}, got {value!r}{fix}.")


def real_positions(position: Any) -> Array:
    """Positions for a sampler that differentiates in them: whole numbers, on which every move would be cut, are made real.

    :raises ValueError: if there is no chain along axis 0.
    """
    position = jnp.asarray(position)
    if position.ndim == 0 or len(position) == 0:
        raise ValueError(f"axis 0 of a position counts the chains, got shape {position.shape}: there is none.")
    return position if jnp.issubdtype(position.dtype, jnp.inexact) else position.astype(jnp.result_type(float))


def require_finite_chains(position: Any, why: str) -> Any:
    """The same positions, an array or a pytree of arrays, if they are finite or traced.

    :param str why: what it is that takes chains to infinity, for the message.
    :raises FloatingPointError: with how many chains are not.
    """
    leaves = jax.tree.leaves(position)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return position
    finite = np.all([np.isfinite(x).reshape(len(x), -1).all(1) for x in leaves], axis=0)
    if not finite.all():
        raise FloatingPointError(f"{int((~finite).sum())} of {finite.size} chains are NaN or infinite: {why}.")
    return position


def require_state(state: Any, kind: type) -> Any:
    """A state of a sampler, and not the positions that it is made from.

    :raises TypeError: with what to pass.
    """
    if not isinstance(state, kind):
        raise TypeError(f"state must be a {kind.__name__}, got {type(state).__name__}: pass sampler.init(position, target).")
    return state


def over_events(x: Array, ndim: int) -> Array:
    """What there is one of for each chain, such as an acceptance, as an array that goes with positions.

    :param x: of shape ``(num_chains,) + batch_shape``.
    :param int ndim: the number of axes of a position.
    :return: the same with axes of size 1 for the event.
    """
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def langevin_move(rng_key: Array, x: Array, score: Array, h: Any, noise_scale: Any) -> Array:
    r"""The step of all Langevin samplers, :math:`x + h \, s + \mathrm{noise\_scale} \, \xi`, in the dtype of ``x``."""
    noise = jax.random.normal(rng_key, (x.size,), x.dtype).reshape(x.shape)  # flat, as BlackJAX's: XLA then rounds alike
    return (x + h * score + noise_scale * noise).astype(x.dtype)


def log_langevin(to: Array, x: Array, score: Array, h: Array, shape: tuple[int, ...]) -> Array:
    r"""The log density of a move from ``x`` with :math:`\mathrm{noise\_scale} = \sqrt{2 h}`, but for what depends on ``h`` alone.

    :param shape: of what is returned; what of the shape of ``x`` is not in it is summed over.
    """
    distance = to - x - over_events(h, x.ndim - 1) * score
    return -(distance**2).reshape((*shape, -1)).sum(-1) / (4 * h)


WHAT_A_STEP_IS = "it is the h of x + h * score + sqrt(2 h) * noise"
