# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""The density that an energy says, known by points with weights.

Of real events of one or two dimensions by quadrature, as far as the reference reaches, or three times as far as the samples do
where there is none; of others by samples of the
reference, whose importance weights :math:`w = \tilde p / b` are worth as many as the effective sample size tells.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm.samplers import Target
from numpyro_ebm.weights import effective_sample_size, normalized_weights

NUM_REFERENCE = 10_000
POINTS_PER_SIDE = {1: 1000, 2: 100}  # of samples, and as many of the reference
WIDER = 3  # times as far from their mean as samples a density is looked for that has no reference
MIN_POINTS_PER_SIDE = 30
FLAT, NOTHING = 1e3, -1e30  # nats below its maximum a density is nothing, and the log of nothing, which has differences
MAX_POINTS = 2**20  # of a grid or of samples of the reference, of all energies of a stack together
SAMPLES_TO_JUDGE = 100  # that weights must be worth


class KnownDensity(NamedTuple):
    """Points and weights, ``(points,) + batch_shape``."""

    #: positions of chains, ``(points,) + batch_shape + event_shape``
    points: Array
    #: sum to one
    weights: Array
    #: ``batch_shape``, the log normalizer
    log_normalizer: Array
    #: ``batch_shape``, how many samples these are worth; infinite for a quadrature
    worth: Array
    #: of a grid, an axis for each element and ``batch_shape``: the log of the target. Of samples None
    log_density: Array | None = None


def why_unknown(worth: float | None) -> str | None:
    """Why nothing can be judged by a density that is known by so many samples, or None of it is; None where it can."""
    if worth is None:
        return "the energy has no reference distribution whose samples could be weighed by it"
    if worth < SAMPLES_TO_JUDGE:
        return f"of {NUM_REFERENCE} samples of its reference about {worth:.0f} stand where the energy is low"
    return None


def known_density(rng_key: Array, energy: Any, sampler: Any, x: Array) -> KnownDensity | None:
    """The density, or None where it cannot be known; traced.

    :param x: positions of chains, ``(samples,) + batch_shape + event_shape``, from where the density is thought to be.
    """
    target = energy.chain_log_prob(sampler)
    batch_shape = jax.eval_shape(target, x).shape[1:]
    event_shape = x.shape[1 + len(batch_shape) :]
    size, is_discrete = math.prod(event_shape), energy.support.is_discrete
    most = MAX_POINTS // math.prod(batch_shape)
    per_side = min(POINTS_PER_SIDE.get(size, 0), int(most ** (1 / max(size, 1)) / 2))
    if size <= 2 and not is_discrete and per_side >= MIN_POINTS_PER_SIDE:
        points, log_density, log_weights = _on_grid(rng_key, target, x, event_shape, per_side)
        weights, infinite = normalized_weights(log_weights), jnp.full(batch_shape, jnp.inf)
        return KnownDensity(points, weights, logsumexp(log_weights, 0), infinite, log_density)
    if target.reference is None:
        return None
    points = target.reference.sample(rng_key, min(NUM_REFERENCE, max(most, 1)))
    log_weights = target(points) - target.reference.log_prob(points)
    weights = normalized_weights(log_weights)
    return KnownDensity(points, weights, logsumexp(log_weights, 0) - math.log(len(points)), effective_sample_size(weights))


def samples_from(rng_key: Array, known: KnownDensity, num_groups: int, size: int) -> Array:
    """Samples of a density without batch axes, ``(num_groups, size) + event_shape``, by systematic resampling.

    Groups differ by nothing but noise, and those of a reference share none of its samples but at their ends.
    """
    order_key, start_key = jax.random.split(rng_key)
    order = jax.random.permutation(order_key, len(known.weights))  # of a grid, whose neighbors are alike
    num = num_groups * size
    places = (jnp.arange(num) + jax.random.uniform(start_key)) / num
    below = jnp.cumsum(known.weights[order])
    at = jnp.searchsorted(below / below[-1], places)
    points = known.points[order[jnp.minimum(at, len(order) - 1)]]
    return points.reshape(num_groups, size, *points.shape[1:])


def distance_from(known: KnownDensity, x: Array, *, is_discrete: bool) -> Array:
    """``batch_shape``, the largest difference of the distribution functions of an element at its deciles (of means of bits)."""
    batch_shape = known.worth.shape
    size = math.prod(x.shape[1 + len(batch_shape) :])
    x, points = (jnp.moveaxis(y.reshape(-1, *batch_shape, size), -1, 0).astype(known.weights.dtype) for y in (x, known.points))

    def of_element(x_and_points: tuple[Array, Array]) -> Array:
        x, points = x_and_points
        if is_discrete:
            return abs(x.mean(0) - (known.weights * points).sum(0))
        deciles = quantile(x, jnp.linspace(0.1, 0.9, 9))
        below = jax.vmap(lambda decile: (known.weights * (points <= decile)).sum(0) - (x <= decile).mean(0))(deciles)
        return jnp.max(jnp.abs(below), 0)

    return lax.map(of_element, (x, points)).max(0)


def _on_grid(rng_key: Array, target: Target, x: Array, event_shape: tuple[int, ...], per_side: int) -> tuple[Array, Array, Array]:
    """A grid where samples and reference are, with the log of the target, and of the mass that each point stands for."""
    seen = x.reshape(*x.shape[: x.ndim - len(event_shape)], -1)
    if target.reference is None:
        center = seen.mean(0)
        more = center + WIDER * (seen - center)
    else:
        more = target.reference.sample(rng_key, NUM_REFERENCE)
        more = more.reshape(len(more), *seen.shape[1:])
    sides = jnp.concatenate([_quantiles(seen, per_side), _quantiles(more, per_side // 2)])
    between = jnp.linspace(sides.min(0), sides.max(0), per_side - per_side // 2 + 2)[1:-1]  # modes, where no quantiles are
    points = jnp.sort(jnp.concatenate([sides, between]), 0)
    return _product(points, event_shape, target)


def _quantiles(x: Array, per_side: int) -> Array:
    """Quantiles of every element along axis 0, close where values are, and a tenth of their range beyond them."""
    inner = quantile(x, jnp.linspace(5e-4, 1 - 5e-4, per_side))
    beyond = 0.1 * (inner[-1] - inner[0])
    return jnp.concatenate([inner[:1] - beyond, inner, inner[-1:] + beyond])


def quantile(x: Array, q: Array) -> Array:
    """:func:`jax.numpy.quantile` along axis 0 of numbers that are none of them nan, to the last digit.

    They are sorted as integers in the same order: a program that is compiled soon sorts floats seven times as slowly.
    """
    kind = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    turned = jnp.array(jnp.iinfo(kind).max, kind)  # of a negative number a larger size is less

    def turn(bits: Array) -> Array:
        return jnp.where(bits < 0, bits ^ turned, bits)

    ordered = lax.sort(turn(lax.bitcast_convert_type(x, kind)), dimension=0, is_stable=False)
    ordered = lax.bitcast_convert_type(turn(ordered), x.dtype)
    at = (q * (len(x) - 1)).reshape(-1, *[1] * (x.ndim - 1))
    below, above = (ordered[to(at).reshape(-1).astype(int)] for to in (jnp.floor, jnp.ceil))
    part = at - jnp.floor(at)
    return below * (1 - part).astype(x.dtype) + above * part.astype(x.dtype)


def _product(sides: Array, event_shape: tuple[int, ...], target: Target) -> tuple[Array, Array, Array]:
    """All points with one element of each side, the log of the target, and of the mass that each point stands for."""
    size, length = sides.shape[-1], len(sides)
    index = jnp.stack(jnp.meshgrid(*[jnp.arange(length)] * size, indexing="ij"), -1).reshape(-1, size)
    points = jnp.stack([sides[index[:, i], ..., i] for i in range(size)], -1)
    log_density = target(points.reshape(*points.shape[:-1], *event_shape))
    log_density = log_density.reshape(*[length] * size, *log_density.shape[1:])
    log_weights, marginal = jnp.zeros(()), log_density
    for axis in reversed(range(size)):  # the mass of each point of this axis, given those before it, and of all of them together
        mass = _masses(marginal, sides[..., axis], axis)
        marginal = logsumexp(mass, axis)
        given_before = mass - jnp.expand_dims(marginal, axis)
        log_weights = log_weights + given_before.reshape(*[length] * (axis + 1), *[1] * (size - axis - 1), *marginal.shape[axis:])
    return points, log_density, (log_weights + marginal).reshape(len(points), *marginal.shape)


def _masses(log_density: Array, side: Array, axis: int) -> Array:
    r"""Log masses of the points of one axis, between which the log density is linear.

    So it is near to it also where points are far apart, as at the foot of a mode, where the trapezoidal rule sees far too much.
    Of a line by :math:`d` the first of two points has the share :math:`\int_0^1 (1 - t) e^{d t} dt` of their distance.

    :param side: ``(points,) + batch_shape``, where the points are.
    """
    log_density = jnp.moveaxis(log_density, axis, 0)
    log_density = jnp.maximum(log_density, jnp.maximum(log_density.max(0) - FLAT, NOTHING))
    first, second = log_density[:-1], log_density[1:]
    apart = jnp.log(jnp.diff(side, axis=0)).reshape(-1, *[1] * axis, *side.shape[1:])
    nothing = jnp.full((1, *log_density.shape[1:]), -jnp.inf)
    of_first = jnp.concatenate([first + _log_share(second - first) + apart, nothing])
    of_second = jnp.concatenate([nothing, second + _log_share(first - second) + apart])
    return jnp.moveaxis(jnp.logaddexp(of_first, of_second), 0, axis)


def _log_share(d: Array) -> Array:
    """The log of (exp(d) - 1 - d) / d^2."""
    near = jnp.where(abs(d) < 0.5, d, 0.0)
    series = 1 / 2 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near * (1 / 720 + near / 5040))))
    far = jnp.where(abs(d) < 0.5, 1.0, abs(d))
    up, down = jnp.log1p(-(1 + far) * jnp.exp(-far)) + far, jnp.log(jnp.expm1(-far) + far)
    return jnp.where(abs(d) < 0.5, jnp.log(series), jnp.where(d > 0, up, down) - 2 * jnp.log(far))
