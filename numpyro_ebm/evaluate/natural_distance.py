# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How far a density is from what it learns from along the natural gradient, which some steps of conjugate gradients find."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm._conjugate_gradient import conjugate_gradient, dot, square

FROM_MAXIMUM = "distance from the maximum of likelihood"
NUM_VALUES = 2000  # of rows and samples of the posterior together, and of chains
NUM_GROUPS = 16  # of chains, by which the error of the distance is estimated
NUM_CG, DAMPING = 5, 1e-6  # steps of conjugate gradients towards the natural gradient, and what is added to its metric

Data = dict[str, Any]
Slopes = Callable[[Any], Array]  # of derivatives along a direction


def natural_distance(
    log_density: Callable[[Data, Any], Array], params: Data, values: Any, chains: Any, *, is_all: bool, num_steps: int = NUM_CG
) -> tuple[Array, Array]:
    """The mean of the distances by either half of the samples along the gradient of the other, and its standard error.

    :param values: where an energy learns, ``(blocks, size) + shape + event_shape``; or a pytree of such arrays.
    :param chains: samples of its density, ``(groups, samples) + shape + event_shape``, in groups that differ by nothing but noise.
    :param is_all: whether ``values`` are all data, of which there is no other half.
    :param num_steps: of conjugate gradients.
    """
    values = jax.tree.map(lambda y: jnp.stack([y, y]), values) if is_all else halves(values)
    chains = halves(chains)
    (num_values, size), num_chains = jax.tree.leaves(values)[0].shape[1:3], jax.tree.leaves(chains)[0].shape[1]
    x = jax.tree.map(lambda *both: jnp.concatenate([y.reshape(2, -1, *y.shape[3:]) for y in both], 1), values, chains)

    def gap(slopes: Array) -> Array:
        return slopes[: num_values * size].mean() - slopes[num_values * size :].mean()

    def variance(slopes: Array) -> Array:
        return slopes[num_values * size :].var(0).mean()

    other = jax.tree.map(lambda y: y[::-1], x)
    directions, _ = lax.map(lambda x: natural_direction(log_density, params, x, lambda _: (gap, variance), num_steps), other)
    slopes = lax.map(lambda both: along(log_density, params, *both), (directions, x))
    of_values, of_chains = slopes[:, : num_values * size], slopes[:, num_values * size :]
    scale = jnp.sqrt(of_chains.var(1).reshape(2, -1).mean(1))[:, None]  # 0 of an energy without a gradient, of which nan is told
    of_values = of_values.reshape(2, num_values, -1).mean(2) / scale
    of_chains = of_chains.reshape(2, num_chains, -1).mean(2) / scale
    noise = variance_of_mean(of_chains) + (0 if is_all else variance_of_mean(of_values))
    return of_values.mean() - of_chains.mean(), jnp.sqrt(noise.mean() / 2)  # of two independent ones


def natural_direction(
    log_density: Callable[[Any, Any], Any], params: Any, x: Any, measures: Callable[[Any], tuple[Slopes, Slopes]], num_steps: int
) -> tuple[Any, Any]:
    """The step of the parameters that closes a gap the fastest, in the metric of a variance; and the log densities.

    :param log_density: by parameters and ``x``; or a pytree of log densities.
    :param measures: by the log densities the gap of their derivatives along a direction, in which it is linear, and the variance,
        in which it is quadratic.
    """
    found, slopes_of = jax.linearize(lambda params: log_density(params, x), params)  # once, which costs the time of a report
    gap, variance = measures(found)
    pull = jax.linear_transpose(slopes_of, params)
    gradient = pull(jax.grad(gap)(found))[0]

    def fisher(direction: Data) -> Data:
        return pull(jax.grad(lambda slopes: variance(slopes) / 2)(slopes_of(direction)))[0]

    tiny = jnp.finfo(jnp.result_type(float)).tiny
    damping = DAMPING * dot(gradient, fisher(gradient)) / jnp.maximum(square(gradient), tiny)

    def metric(direction: Data) -> Data:
        return jax.tree.map(lambda a, b: a + damping * b, fisher(direction), direction)

    return conjugate_gradient(metric, gradient, num_steps, tol=1e-5), found


def along(log_density: Callable[[Data, Any], Array], params: Data, direction: Data, x: Any) -> Array:
    """The derivatives at ``x`` along a direction."""
    return jax.jvp(lambda params: log_density(params, x), (params,), (direction,))[1]


def halves(x: Any) -> Any:
    """Every other one of the leading axis, ``(2, half) + shape``."""

    def of(x: Array) -> Array:
        size = len(x) // 2
        return jnp.stack([x[0 : 2 * size : 2], x[1 : 2 * size : 2]])

    return jax.tree.map(of, x)


def variance_of_mean(x: Array) -> Array:
    """Of the mean along axis 1."""
    return x.var(1, ddof=1) / x.shape[1]
