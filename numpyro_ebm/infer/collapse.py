# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether score matching has put spikes at the data, or has not even reached a normal distribution there.

An objective that differentiates the score, :math:`J = \tfrac12 \|s\|^2 + \mathrm{tr} \, \nabla s`, is minus half the Fisher
information of what is learned. On finitely many rows it has no minimum: a density with a narrow spike at every row has as much
information as it likes. Beside the rows it is then far worse than nothing: its objective is positive there, where a flat density
has 0. A density that the rows do support hardly changes within half the distance to the nearest other row.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from numpyro_ebm.evaluate import Finding
from numpyro_ebm.evaluate.report import not_told
from numpyro_ebm.objectives.score import ScoreFn

MAX_NEIGHBORS = 5000  # rows that neighbors are looked for in: of more, the nearest is hardly closer
SAME = 1e-3  # rows closer than this are taken for one, relative to their size
RIDGE = 1e-6  # added to a covariance, relative to its mean variance
MAX_ROWS = 10_000  # rows that a correlation is estimated from
ROWS_PER_DIM = 10  # so many there must be for each coordinate: of fewer, a covariance describes them far better than any others
LEAST_VARIANCE = 1e-3  # of standardized data: a direction with less has a precision that would be all of an objective
NUM_BATCHES = 8  # that the objective at the rows is compared on
MORE_BATCHES = 32  # the same of denoising, whose noise is most of the objective
MANY_ELEMENTS = 256  # of a row, over which noise averages
SHORT_OF = 0.2  # of what a Gaussian reaches there a model may be short
AT_ROWS, VALIDATION = "objective at the rows", "objective on validation rows"
FIX = (
    "The model has spikes at the data (or at the values that they are rounded to), which lower the objective without bound. Take "
    "more rows, noise_scale= or curvature_penalty= of the objective, validation= and patience= of run, or DenoisingScoreMatching"
)

LEAST_NOISE = 0.02  # of denoising: with .01 fits of 3000 steps were .6 to .9 nats below in the plane, at objectives all of noise
TOO_LITTLE = (
    "most of the objective, and of its gradient, is the noise, and a fit that looks right may have learned hardly anything. Take a "
    "sigma of a tenth of the standard deviation of the data or more, or many more steps than a larger one would need"
)

TOO_BAD = (
    "The model describes its own data worse than a normal distribution: it has not converged, or is too small. Take more steps, a "
    "larger or a falling learning rate, a guide that learns faster or has a larger family, or a larger model"
)


def beside(rng_key: Array, v: Array, data: Array) -> Array:
    """Rows moved in a random direction, by half the distance to the nearest other row of the data.

    In units in which the covariance of the data is 1, so that directions in which all rows are close are none to move far in.
    """
    shape, v, data = v.shape, v.reshape(len(v), -1), data.reshape(len(data), -1)
    center = jnp.nanmean(data, 0)
    some = data[:: -(-len(data) // MAX_NEIGHBORS)] - center
    some, rows = jnp.nan_to_num(some), jnp.nan_to_num(v - center)
    covariance = some.T @ some / len(some)
    ridge = jnp.maximum(RIDGE * jnp.diag(covariance).mean(), jnp.finfo(v.dtype).tiny)
    root = jnp.linalg.cholesky(covariance + ridge * jnp.eye(len(center), dtype=v.dtype))
    others, rows = (solve_triangular(root, x.T, lower=True).T for x in (some, rows))

    def distance(row: Array) -> Array:
        sizes = (others**2).sum(1) + (row**2).sum()
        squares = sizes - 2 * jnp.matmul(others, row, precision="highest")
        return jnp.sqrt(jnp.where(squares > SAME**2 * sizes, squares, jnp.inf).min())

    directions = jax.random.normal(rng_key, rows.shape, rows.dtype)
    length = lax.map(distance, rows, batch_size=64) / 2 / jnp.linalg.norm(directions, axis=1)
    length = jnp.where(jnp.isfinite(length), length, 0)  # of a row that has no other
    return (v + length[:, None] * directions @ root.T).reshape(shape)


def num_batches(size: int) -> int:
    """How many batches denoising is judged on, by rows of so many elements."""
    return max(NUM_BATCHES, min(MORE_BATCHES, MORE_BATCHES * MANY_ELEMENTS // size))


def gaussian_score(data: Array) -> ScoreFn:
    """The score of a normal distribution of independent coordinates, fitted to the data."""
    mean, variance = jnp.nanmean(data, 0), jnp.nanvar(data, 0)
    return lambda v: -(v - mean) / jnp.where(variance > 0, variance, 1)


def correlated_score(data: Array) -> ScoreFn:
    """The score of a normal distribution with the covariance of the data; of few rows :func:`gaussian_score`.

    Directions in which the data hardly vary get the variance 1, so that an objective is about the others.
    """
    some = data[:: -(-len(data) // MAX_ROWS)].reshape(-1, math.prod(data.shape[1:]))
    if len(some) < ROWS_PER_DIM * some.shape[1]:
        return gaussian_score(data)
    mean, scale = some.mean(0), some.std(0)
    scale = jnp.where(scale > 0, scale, 1)
    rows = (some - mean) / scale
    variances, axes = jnp.linalg.eigh(jnp.matmul(rows.T, rows, precision="highest") / len(rows))
    precisions = 1 / jnp.where(variances < LEAST_VARIANCE, 1, variances)

    def score(v: Array) -> Array:
        along = jnp.matmul((v.reshape(len(v), -1) - mean) / scale, axes, precision="highest")
        return (-jnp.matmul(along * precisions, axes.T, precision="highest") / scale).reshape(v.shape)

    return score


def collapse_finding(site: str, at_rows: float, beside_rows: float, of_gaussian: float) -> Finding:
    """Of a model that is better than a Gaussian at the rows: whether it is better than a flat density beside them."""
    overflows = math.isfinite(at_rows) and math.isnan(beside_rows)
    value, most, fix = (math.inf if overflows else beside_rows), None, ""
    if at_rows < of_gaussian:
        most, fix = 0.0, f"at the rows it is {at_rows:.3g}, where a Gaussian reaches {of_gaussian:.3g}. {FIX}"
    return Finding(site, "objective at half the distance to other rows", value, None, most, fix)


def level_finding(site: str, at_rows: np.ndarray, of_gaussian: np.ndarray, of_flat: np.ndarray | float = 0.0) -> Finding:
    """Whether a model comes near a Gaussian at the rows: by a part of what it reaches, and what the difference is uncertain by.

    :param at_rows: the objective in batches.
    :param of_gaussian: that of a Gaussian in the same.
    :param of_flat: that of a score of 0, from where it is counted what is reached.
    """
    value, reached = float(at_rows.mean()), float(of_gaussian.mean())
    if not math.isfinite(reached):
        return not_told(site, AT_ROWS, "a Gaussian has none there to compare with")
    differences = at_rows - of_gaussian
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if np.isfinite(differences).all() else 0.0
    most = reached + SHORT_OF * abs(float(np.mean(of_flat)) - reached) + 4 * error
    return Finding(site, AT_ROWS, value, None, most, f"a normal distribution fitted to the data reaches {reached:.3g}. {TOO_BAD}")


def noise_finding(site: str, sigma: float, data: np.ndarray) -> Finding:
    """The noise of denoising, in standard deviations of the data."""
    scale = math.sqrt(float(np.nanvar(data, axis=0).mean()))
    value = sigma / scale if scale > 0 else math.inf
    return Finding(site, "noise of denoising in standard deviations of the data", value, LEAST_NOISE, None, TOO_LITTLE)


def validation_finding(
    site: str, at_rows: float, value: float, of_gaussian: float, gaussian_value: float, of_flat: float = 0.0
) -> Finding:
    """Of a model that is better than a Gaussian at the rows: whether it comes near one at others.

    Half of what it reaches is near: a flexible model of Gaussian data is a little worse at other rows, which is no collapse.

    :param of_gaussian: of the Gaussian, at the rows; and ``gaussian_value`` at the others.
    :param of_flat: of a score of 0. What denoising has there is the noise, of which the best score takes little where it is small.
    """
    quantity, most, fix = VALIDATION, None, ""
    if of_gaussian > of_flat / 2 > 0:
        quantity = f"{VALIDATION} (most of it, and of what is wanted, is the noise of denoising, so that it tests little)"
    if at_rows < of_gaussian:
        most = gaussian_value + abs(of_gaussian) / 2
        fix = f"a Gaussian reaches {gaussian_value:.3g}, and at the rows that were learned from the model has {at_rows:.3g}. {FIX}"
    return Finding(site, quantity, value, None, most, fix)
