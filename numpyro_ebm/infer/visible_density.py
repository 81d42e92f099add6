# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the density whose scores were matched has the masses that its rows have.

Scores are local: between modes that hardly overlap they say nothing of the weights, and an objective is at its best with any. The
density tells, where it is known by quadrature or by samples of its reference.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_ebm.evaluate.density import distance_from, known_density, why_unknown
from numpyro_ebm.evaluate.report import Finding, not_told

FROM_ROWS, LIKELIHOOD = "distance of density from rows", "log likelihood of the rows"
MAX_ROWS = 10_000  # that are compared
TOLERANCE = 0.1  # of a distribution function: a mode of 50 % may have 40. A family may be too small for its rows, and a fit right
NATS = 0.1  # that a density may be worse than a normal distribution with the moments of the rows
OTHER_MASSES = (
    "the density that is learned has other masses than the rows. Scores hardly see the weights of modes that do not overlap: learn "
    "by likelihood, SVI of negative_phase(model) from these parameters, or take more noise; more steps where the fit has not "
    "converged"
)
WORSE = (
    "a normal distribution with the moments of the rows has {:.3g}. The model has not converged, has not enough noise, or is too "
    "small: take more steps, a falling learning rate, DenoisingScoreMatching with more noise, or a larger model"
)
LATENTS = "its marginal density, over latents, is not known"


class DensityNumbers(NamedTuple):
    """How the density of a visible compares with its rows."""

    #: (), the largest difference of the distribution functions of an element at the deciles of the rows
    distance: Array
    #: (), how many samples the density is known by
    worth: Array
    #: (), nats per row
    log_likelihood: Array
    #: (), the same of a normal distribution with the moments of the rows
    of_gaussian: Array
    #: (), the standard error of their difference
    error: Array


def density_numbers(rng_key: Array, energy: Any, rows: Array) -> DensityNumbers | None:
    """These numbers, or None where the density is not known; traced.

    :param rows: ``(rows,) + event_shape``, with the noise that the density was learned with.
    """
    sampler = energy.chain_sampler
    x = energy.to_chain(rows, sampler)
    known = known_density(rng_key, energy, sampler, x)
    if known is None:
        return None
    log_density = energy.chain_log_prob(sampler)(x) - known.log_normalizer
    flat = x.reshape(len(x), -1)
    centered = flat - flat.mean(0)
    variances, axes = jnp.linalg.eigh(jnp.matmul(centered.T, centered, precision="highest") / len(flat))
    variances = jnp.maximum(variances, jnp.finfo(flat.dtype).eps * variances.max())
    along = jnp.matmul(centered, axes, precision="highest")
    of_gaussian = -0.5 * (along**2 / variances + jnp.log(2 * jnp.pi * variances)).sum(1)
    variance = (log_density - of_gaussian).var() / len(x) + jnp.where(jnp.isinf(known.worth), 0, 1 / known.worth)
    distance = distance_from(known, x, is_discrete=False)
    return DensityNumbers(distance, known.worth, log_density.mean(), of_gaussian.mean(), jnp.sqrt(variance))


def density_findings(site: str, numbers: DensityNumbers | None, num_rows: int) -> list[Finding]:
    """What these numbers say."""
    why = why_unknown(None if numbers is None else float(numbers.worth))
    if numbers is None or why is not None:
        return [not_told(site, FROM_ROWS, str(why))]
    distance, worth, value, of_gaussian, error = (float(np.asarray(x)) for x in numbers)
    noise = 0.5 / math.sqrt(num_rows) + 0.5 / math.sqrt(worth)
    least = of_gaussian - NATS - 4 * error
    return [
        Finding(site, FROM_ROWS, distance, None, TOLERANCE + 3 * noise, OTHER_MASSES),
        Finding(site, LIKELIHOOD, value, least, None, WORSE.format(of_gaussian)),
    ]
