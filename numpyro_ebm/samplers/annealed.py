# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""From noise to samples: a whole run of Langevin steps through a schedule of temperatures, and the denoising that ends it.

.. math:: x \leftarrow x + h \, \nabla \log p(x) + \sqrt{2 h T} \, \xi, \qquad \xi \sim N(0, I).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.distributions import Distribution

from numpyro_ebm._checks import require_count, require_key, require_positive
from numpyro_ebm.samplers.base import WHAT_A_STEP_IS, LogProb, langevin_move, real_positions, require_finite_chains

Position = TypeVar("Position")  # an array, or a pytree of arrays


def annealed_langevin(
    rng_key: Array,
    log_prob: Callable[[Position], Array],
    start: Position,
    step_size: float = 2e-4,
    temperatures: Any = None,
) -> Position:
    r"""Unadjusted Langevin through a schedule of temperatures, from noise to samples.

    One step for every temperature :math:`T`,

    .. math:: x \leftarrow x + h \nabla \log p(x) + \sqrt{2 h T} \, \xi, \qquad \xi \sim N(0, I),

    whose stationary distribution at a fixed temperature is :math:`p^{1/T}`, up to the bias of :class:`UnadjustedLangevin`: on
    a quadratic energy of curvature :math:`c` its variance is exactly :math:`T / (c (1 - hc/2))`. The papers write
    :math:`x - \tfrac{\sigma^2}{2} \nabla E + \sqrt{T} \sigma \xi`, which is :math:`h = \sigma^2 / 2`; their :math:`\sigma = .02`
    is the default here.

    A model learned by denoising has the distribution of the data with noise added: :func:`denoise` removes it afterwards. A chain
    at a high temperature moves far from the data, and may not come back if :math:`p` is not integrable: look at the samples.

    :param rng_key: a key of :func:`jax.random.key`.
    :param log_prob: maps positions, with chains along axis 0, to log densities of shape ``(num_chains,)``.
    :param start: where the chains stand, an array of shape ``(num_chains,) + event_shape`` or a pytree of such arrays, which
        move together. The papers start at :math:`0.5 + N(0, I)`.
    :param float step_size: the step :math:`h`.
    :param temperatures: one temperature for every step, :func:`annealing_schedule` if not given.
    :return: where the chains stand after the last step, with gradients stopped.
    :raises ValueError: if ``step_size`` is not a positive finite number, a temperature is negative or not finite, or ``start``
        is not made of floating arrays with the same number of chains.
    :raises FloatingPointError: if chains run away, or leave the support of the distribution whose ``log_prob`` it is; under
        ``jit``, which cannot raise, they are NaN or infinite.

    **References**

    1. Song and Ermon, *Generative modeling by estimating gradients of the data distribution*, NeurIPS 2019, arXiv:1907.05600.
    2. Li, Chen and Sommer, *Learning energy-based models in high-dimensional spaces with multi-scale denoising score
       matching*, 2019, arXiv:1910.07762: the schedule and the last step.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import annealed_langevin, annealing_schedule
        >>> def log_prob(x):  # two modes; no chain crosses between them at temperature 1
        ...     return jnp.logaddexp(-50 * ((x - 2) ** 2).sum(-1), -50 * ((x + 2) ** 2).sum(-1))
        >>> x = annealed_langevin(
        ...     jax.random.key(0), log_prob, jnp.full((1000, 1), 2.0), step_size=2e-3
        ... )
        >>> right, left = jnp.mean(x > 0), jnp.mean(x < 0)
        >>> print(f"{right:.1f} of the chains on the right, {left:.1f} on the left")
        0.5 of the chains on the right, 0.5 on the left
    """
    step_size = require_positive("step_size", step_size, WHAT_A_STEP_IS)
    schedule = _require_temperatures(annealing_schedule() if temperatures is None else temperatures)
    _require_chains(start)
    score = jax.grad(lambda x: log_prob(x).sum())

    def step(x: Any, key_and_temperature: tuple[Array, Array]) -> tuple[Any, None]:
        key, temperature = key_and_temperature
        leaves, structure = jax.tree.flatten(x)
        keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

        def move(x: Array, s: Array, key: Array) -> Array:
            return langevin_move(key, x, s, step_size, jnp.sqrt(2 * step_size * temperature))

        return jax.tree.map(move, x, score(x), keys), None

    keys = jax.random.split(require_key("rng_key", rng_key), len(schedule))
    x, _ = lax.scan(step, lax.stop_gradient(start), (keys, schedule))
    x = lax.stop_gradient(x)
    _require_inside(log_prob, x)
    return require_finite_chains(x, f"step_size={step_size:g} is too large for how steep the density is, or it is not integrable")


def _require_inside(log_prob: Any, x: Any) -> None:
    """Refuses chains outside the support of a distribution, where it is the method of one: nothing keeps them inside."""
    fn = getattr(log_prob, "__self__", None)
    if not isinstance(fn, Distribution) or not isinstance(x, Array) or isinstance(x, jax.core.Tracer):
        return
    inside = fn.support(x).reshape(len(x), -1).all(-1)
    if not inside.all():
        raise FloatingPointError(
            f"{int((~inside).sum())} of {len(x)} chains have left the support, {fn.support}: nothing keeps them inside. Draw by "
            ".sample(key, shape), which moves in unconstrained space."
        )


def annealing_schedule(num_hot: int = 500, num_cooling: int = 2000, num_freezing: int = 200, hottest: float = 100.0) -> np.ndarray:
    """Temperatures for :func:`annealed_langevin`: hot, then geometrically down to 1, then linearly from 1 to 0.

    The defaults are those of the papers. The last step, at temperature 0, has no noise.

    :param int num_hot: steps at the temperature ``hottest``.
    :param int num_cooling: steps from ``hottest`` down to 1, without the 1.
    :param int num_freezing: steps from 1 to 0, both included.
    :param float hottest: the first temperature.
    :return: temperatures, of shape ``(num_hot + num_cooling + num_freezing,)``.
    :raises ValueError: if a number of steps is not an integer of 0 or more, or ``hottest`` is not a positive finite number.
    """
    num_hot = require_count("num_hot", num_hot, least=0)
    num_cooling = require_count("num_cooling", num_cooling, least=0)
    num_freezing = require_count("num_freezing", num_freezing, least=0)
    hottest = require_positive("hottest", hottest, "it is a temperature, 1 for the density itself")
    cooling = np.geomspace(hottest, 1, num_cooling, endpoint=False)
    return np.concatenate([np.full(num_hot, hottest), cooling, np.linspace(1, 0, num_freezing)])


def denoise(log_prob: LogProb, x: Array, sigma: float) -> Array:
    r"""The mean of what noise of standard deviation :math:`\sigma` turned into ``x``, :math:`x + \sigma^2 \nabla \log p(x)`.

    It is exact where :math:`p` is the distribution of the noisy values (Tweedie's formula): the last step of sampling from what was
    learned by denoising score matching.

    :param log_prob: maps noisy values, of shape ``(num_chains,) + event_shape``, to their log densities, ``(num_chains,)``.
    :param x: noisy values.
    :param float sigma: standard deviation of the noise.
    :raises ValueError: if ``sigma`` is not a positive finite number.
    """
    sigma, x = require_positive("sigma", sigma, "it is the standard deviation of the noise"), real_positions(x)
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
