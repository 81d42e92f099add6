# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the density whose scores were matched has the masses that its rows have.

Scores are local: between modes that hardly overlap they say nothing of the weights, and an objective is at its best with any. The
density tells, where it is known by quadrature or by samples of its reference. And a fit by scores may be slow where one by
likelihood is not, as with little noise: at the optimum of an objective a step of likelihood gains nothing, and
:func:`numpyro_ebm.evaluate.natural_distance.natural_distance` tells what it would.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from numpyro_ebm.evaluate.density import distance_from, known_density, samples_from, why_unknown
from numpyro_ebm.evaluate.mode_weights import ModeWeights, mode_weights, mode_weights_finding
from numpyro_ebm.evaluate.natural_distance import FROM_MAXIMUM, NUM_GROUPS, NUM_VALUES, natural_distance
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.evaluate.yardstick import Shortfall, others_finding, rows_finding, shortfall_elsewhere, shortfall_of

FROM_ROWS = "distance of density from rows"
MAX_ROWS = 10_000  # that are compared
TOLERANCE = 0.1  # of a distribution function: a mode of 50 % may have 40. A family may be too small for its rows, and a fit right
OTHER_MASSES = (
    "the density that is learned has other masses than the rows. Scores hardly see the weights of modes that do not overlap: learn "
    "by likelihood, SVI of negative_phase(model) from these parameters, or take more noise; more steps where the fit has not "
    "converged"
)
WORSE = (
    "The model has not converged, has not enough noise, or is too small: take more steps, a falling learning rate, "
    "DenoisingScoreMatching with more noise, or a larger model"
)
MOST = 0.25  # standard deviations to that maximum, which is .03 nats where the likelihood is quadratic, and up to .1 where not
TO_GAIN = (
    "along the natural gradient of the likelihood the density and the rows differ by so many standard deviations, and a step there "
    "would gain about {:.2g} nats for each row. Scores have not learned what likelihood would, or the model is so small that "
    "they want different parameters: take more steps, a falling learning rate, more noise (sigma= of DenoisingScoreMatching), or "
    "go on by likelihood, SVI of negative_phase(model) with bits summed out, from these parameters"
)
NO_NUMBER = "it is not finite: the density has spikes, or none of its parameters has a gradient"


class DensityNumbers(NamedTuple):
    """How the density of a visible compares with its rows."""

    #: (), the largest difference of the distribution functions of an element at the deciles of the rows
    distance: Array
    #: (), how many samples the density is known by
    worth: Array
    #: of a density that is known on a grid, the weights of its modes
    modes: ModeWeights | None
    #: nats per row, beside simple estimates; None of few rows
    likelihood: Shortfall | None
    #: the same of rows that were not learned from; None without them
    elsewhere: Shortfall | None
    #: (), standard deviations to the maximum of the likelihood along its natural gradient, and their standard error
    to_maximum: Array
    to_maximum_error: Array


def density_numbers(
    rng_key: Array,
    energy_of: Callable[[dict[str, Any]], Any],
    params: dict[str, Any],
    rows: Array,
    others: Array | None,
) -> DensityNumbers | None:
    """These numbers, or None where the density is not known; traced.

    :param energy_of: the energy distribution by parameters.
    :param rows: ``(rows,) + event_shape``, with the noise that the density was learned with.
    :param others: the same of rows that were not learned from.
    """
    energy = energy_of(params)
    sampler = energy.chain_sampler
    x = energy.to_chain(rows, sampler)
    known_key, samples_key = jax.random.split(rng_key)
    known = known_density(known_key, energy, sampler, x)
    if known is None:
        return None
    target, elsewhere = energy.chain_log_prob(sampler), None
    likelihood = shortfall_of(target, known, x[None])
    if others is not None:
        elsewhere = shortfall_elsewhere(target, known, energy.to_chain(others, sampler), x)
    distance = distance_from(known, x, is_discrete=False)
    samples = samples_from(samples_key, known, NUM_GROUPS, NUM_VALUES // NUM_GROUPS).reshape(NUM_GROUPS, -1, *x.shape[1:])
    to_maximum = natural_distance(
        jax.jit(lambda params, x: energy_of(params).chain_log_prob(sampler)(x)),  # traced once
        params,
        x[:: -(-len(x) // NUM_VALUES), None],
        samples,
        is_all=False,  # rows that scores have learned from are not at the maximum of their own likelihood
    )
    return DensityNumbers(distance, known.worth, mode_weights(known, x), likelihood, elsewhere, *to_maximum)


def density_findings(site: str, numbers: DensityNumbers | None, num_rows: int) -> list[Finding]:
    """What these numbers say."""
    why = why_unknown(None if numbers is None else float(numbers.worth))
    if numbers is None or why is not None:
        return [not_told(site, FROM_ROWS, str(why))]
    distance, worth, to_maximum, to_maximum_error = (
        float(np.asarray(x)) for x in (numbers.distance, numbers.worth, numbers.to_maximum, numbers.to_maximum_error)
    )
    noise = 0.5 / math.sqrt(num_rows) + 0.5 / math.sqrt(worth)
    found = [Finding(site, FROM_ROWS, distance, None, TOLERANCE + 3 * noise, OTHER_MASSES)]
    if numbers.modes is not None:
        found.append(mode_weights_finding(site, numbers.modes, num_rows, are_well=found[0].is_well))
    is_well = all(finding.is_well for finding in found)  # else the same cause is told already
    if numbers.likelihood is not None:
        found.append(rows_finding(site, numbers.likelihood, WORSE, are_well=is_well))
    is_well = all(finding.is_well for finding in found)
    if numbers.elsewhere is not None:
        found.append(others_finding(site, numbers.elsewhere, are_well=is_well))
    return [*found, maximum_finding(site, to_maximum, to_maximum_error, are_well=is_well)]


def maximum_finding(site: str, value: float, error: float, *, are_well: bool) -> Finding:
    """Whether the maximum of the likelihood is near.

    :param value: standard deviations to it, with their standard error.
    :param are_well: whether all else is. Where it is not, that is the cause to tell.
    """
    if math.isnan(value):
        return not_told(site, FROM_MAXIMUM, NO_NUMBER)
    most, fix = (MOST + 3 * error, TO_GAIN.format(value**2 / 2)) if are_well else (None, "")
    return Finding(site, FROM_MAXIMUM, value, None, most, fix)
