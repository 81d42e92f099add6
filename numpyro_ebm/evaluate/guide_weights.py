# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether a guide stands for the posterior, or a generator for an energy: what weights :math:`w = \tilde p / q` are worth.

Of every row of the data two numbers: the fraction of samples that count, :math:`1 / (1 + \chi^2(p \| q))` with many of them, and
the shape k of the generalized Pareto distribution that fits the largest weights. Where k is above .7, no practical number of
samples has a mean that can be trusted, and the fraction is no more than a lucky number (Vehtari et al. 2024). Weights of few
values, as those of bits, have no tail: a jump from one value to the next reads as a very heavy one, however small it is. Of
them the fraction alone is told. Both are blind to what no sample of the guide has seen.
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax import Array, lax

from numpyro_ebm._compat import pareto_k
from numpyro_ebm.evaluate.report import Finding, not_told

PARETO_K = 0.7
UNWEIGHTED = 0.5  # the fraction that should count at least where samples stand for the other distribution without weights
LEAST_FRACTION = 0.1  # that should count: with less a guide is another distribution, whatever its samples are used for
MIN_SAMPLES, MAX_SAMPLES, MAX_WEIGHTS = 200, 1000, 2**17  # of every row, and of all rows of a batch together
MAX_ELEMENTS = 2**25  # of the visible that are weighed, where the least number of samples allows
ROWS_AT_ONCE = 4096  # samples of rows that are weighed together: more take memory, and less are slow
MAX_ROWS = 200  # whose k is fitted
ROWS_BELOW = 0.9  # the fraction of rows that are no worse than what is told
NEVER = -1e30  # for the logarithm of 0, of which there is no difference
LEAST = -600.0  # of log weights below the largest: the exponential of less is no number
EQUAL = 1e-3  # weights are told apart by more than this, since rounding makes many of one; in a tail, by this fraction of it
FRACTION, SHAPE = "fraction of the guide's samples that count", "Pareto k of the guide's weights"


def num_guide_samples(num_rows: int, size: int = 1) -> int:
    """How many samples of the guide to weigh for each of so many rows, of so many elements."""
    return min(MAX_SAMPLES, max(MIN_SAMPLES, min(MAX_WEIGHTS, MAX_ELEMENTS // size) // num_rows))


def in_groups(weigh: Callable[[Array, int], Array], rng_key: Array, v: Array, num_samples: int | None = None) -> Array:
    """Log weights of as many samples as are wanted of every row, ``(num_samples, rows)``, several at once.

    :param weigh: log weights of so many samples by a key.
    :param v: the rows, of the visible.
    :param num_samples: or a few more, to fill the last group.
    """
    num_rows = len(v)
    num_samples = num_samples or num_guide_samples(num_rows, max(1, v.size // num_rows))
    at_once = min(num_samples, max(1, ROWS_AT_ONCE // num_rows))
    found = lax.map(lambda key: weigh(key, at_once), jax.random.split(rng_key, -(-num_samples // at_once)))
    return found.reshape(-1, num_rows)


def num_tail(num_samples: int) -> int:
    """How many of the largest weights the estimate of k takes for their tail."""
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def guide_findings(
    site: str, log_weights: Array, fix: str, *, least: float = LEAST_FRACTION, whose: str = "guide"
) -> list[Finding]:
    """What the log weights of samples of a guide say, ``(num_samples, rows)``.

    :param site: the latents that the guide draws.
    :param least: the fraction that should count at least.
    :param fix: what to do about a guide that is far from the posterior.
    :param whose: what the samples are drawn by.
    """
    count, tail = (name.replace("guide", whose) for name in (FRACTION, SHAPE))
    found = np.asarray(log_weights, np.float64)
    found = found[:, :: -(-found.shape[1] // MAX_ROWS)]
    if np.isnan(found).any() or not (found > -np.inf).any(0).all():
        why = "some weights are NaN, or all weights of a row are 0: the model has no density where the guide samples"
        return [not_told(site, name, why) for name in (count, tail)]
    weights = np.exp(found - found.max(0))
    fraction = weights.sum(0) ** 2 / (weights**2).sum(0) / len(weights)
    shape = np.array([_shape(row) for row in found.T])
    has_tail = ~np.isnan(shape)
    if has_tail.mean() < 0.5:
        of_tail = not_told(
            site, tail, "the weights take few values, as those of bits do, and have no tail: look at the fraction that counts."
        )
    else:
        of_tail = Finding(site, tail, float(np.quantile(shape[has_tail], ROWS_BELOW)), None, PARETO_K, fix)
    # of weights with too heavy a tail the fraction is a lucky number, and few count by the same cause
    bound = least if of_tail.is_well else None
    return [Finding(site, count, float(np.quantile(fraction, 1 - ROWS_BELOW)), bound, None, fix), of_tail]


def _shape(log_weights: np.ndarray) -> float:
    """Pareto's k, with equal weights spread evenly: a bound that many samples reach is a light tail. nan where there is no tail."""
    ordered = np.maximum(np.sort(log_weights), NEVER)
    tail = ordered[-num_tail(len(ordered)) :]
    span = tail[-1] - tail[0]
    if ordered[-1] - ordered[0] > EQUAL and (np.diff(tail) > EQUAL * span).sum() < len(tail) / 2:
        return math.nan
    above = np.maximum(ordered - ordered[-1], LEAST)
    return pareto_k(above + np.linspace(0, EQUAL, len(above)))
