# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether a model whose latents were learned by scores gives its rows the likelihood that a normal distribution gives them.

An objective of scores says little of nats, and less where elements have different units. A guide tells the marginal density of a
row, by importance weights, up to the normalizer,

.. math:: \tilde p(v) = E_{q(h|v)} [\tilde p(v, h) / q(h|v)],

and the normalizer is the mean of :math:`\tilde p(v) / b(v)` over samples of normal distributions b with the moments of the rows,
one of them twice as wide. It is 1 of a model that has a known distribution at every site.
"""

import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm.evaluate.density import SAMPLES_TO_JUDGE
from numpyro_ebm.evaluate.guide_weights import MAX_ELEMENTS, MIN_SAMPLES
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.evaluate.yardstick import (
    LIKELIHOOD,
    MAX_VALUES,
    MIN_OWNERS,
    ROWS_PER_DIM,
    Shortfall,
    normal_of,
    rows_finding,
    shortfall,
    thinned,
)
from numpyro_ebm.weights import effective_sample_size, normalized_weights

NUM_OF_NORMALIZER = 4096  # samples of the normal distributions
WIDER = 2.0
WORSE = (
    "The model has not converged, has learned from a guide that is not the posterior, or is too small: take more steps, a learning "
    "rate that falls to 0, or more inner steps. Scale data whose elements have different standard deviations: scores learn "
    "those with the smallest first"
)
CONDITIONAL = "the normalizer is unknown, and as the model has arguments beside the visible, each row may have its own"
FEW = f"it takes {MIN_OWNERS} rows, and {ROWS_PER_DIM} for each element, that can be looked at together"
UNKNOWN = "of {} samples of normal distributions with the moments of the rows about {:.0f} stand where the energy is low"


class DensityOfRows(Protocol):
    """The log density of every row of a batch up to the normalizer, and these rows with their noise."""

    def __call__(self, rng_key: Array, rows: Array, v: Array | None = None, num_samples: int = 1) -> tuple[Array, Array]:
        """By so many samples of the guide.

        :param rows: indices of the rows of the batch.
        :param v: what stands in the place of the rows.
        """
        ...


class MarginalLikelihood(NamedTuple):
    """What there is to know of it."""

    shortfall: Shortfall
    #: (), how many samples the normalizer is known by; infinite where it is known
    worth: Array


def batches_to_judge(num_rows: int, batch_size: int, size: int) -> np.ndarray | None:
    """Indices of rows, ``(batches, batch_size)``; None of too few, or of too many at once.

    :param size: elements of a row.
    """
    most = min(MAX_VALUES, MAX_ELEMENTS // (size * MIN_SAMPLES))
    found = np.arange(num_rows // batch_size * batch_size).reshape(-1, batch_size)
    num = min(len(found), max(1, most // batch_size))
    found = found[np.arange(num) * len(found) // max(1, num)]
    is_small = batch_size * size * MIN_SAMPLES <= MAX_ELEMENTS
    return found if is_small and found.size >= max(MIN_OWNERS, ROWS_PER_DIM * size) else None


def marginal_likelihood(rng_key: Array, density: DensityOfRows, batches: Array, *, is_normalized: bool) -> MarginalLikelihood:
    """The likelihood of some rows, beside that of estimates which need no training; traced.

    :param batches: which rows, :func:`batches_to_judge`.
    :param is_normalized: whether the normalizer is 1.
    """
    rows_key, normal_key, guide_key = jax.random.split(rng_key, 3)

    def of_batch(at: tuple[Array, Array]) -> tuple[Array, Array]:
        return density(*at, num_samples=MIN_SAMPLES)

    log_density, v = lax.map(of_batch, (jax.random.split(rows_key, len(batches)), batches))
    log_normalizer, variance, worth = jnp.zeros(()), jnp.zeros(()), jnp.array(jnp.inf)
    if not is_normalized:
        normal, size = normal_of(v.reshape(-1, math.prod(v.shape[2:]))), batches.shape[1]
        num = -(-NUM_OF_NORMALIZER // size)
        drawn = normal.sample(normal_key, num * size, WIDER)
        places = drawn.reshape(num, size, *v.shape[2:])

        def there(at: tuple[Array, Array]) -> Array:
            return density(at[0], batches[0], at[1])[0]

        found = lax.map(there, (jax.random.split(guide_key, num), places)).reshape(-1)
        log_weights = found - normal.log_prob(drawn, WIDER)
        log_normalizer = logsumexp(log_weights) - math.log(num * size)
        worth = effective_sample_size(normalized_weights(log_weights))
        variance = 1 / worth - 1 / (num * size)
    x, seen = (thinned(y.reshape(1, -1, *y.shape[2:])) for y in (v, log_density - log_normalizer))
    return MarginalLikelihood(shortfall(seen, x, variance), worth)


def likelihood_finding(site: str, found: MarginalLikelihood | str, *, are_well: bool) -> Finding:
    """What is said of it.

    :param found: or why it is not known.
    :param are_well: whether guide and objective are. Where they are not, that is the cause to tell.
    """
    if isinstance(found, str):
        return not_told(site, LIKELIHOOD, found)
    worth = float(found.worth)
    if not worth >= SAMPLES_TO_JUDGE:
        return not_told(site, LIKELIHOOD, UNKNOWN.format(NUM_OF_NORMALIZER, worth))
    return rows_finding(site, found.shortfall, WORSE, are_well=are_well)
