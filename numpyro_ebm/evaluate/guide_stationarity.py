# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether the guide of a fit stands where the evidence lower bound is stationary in it.

A prior learns from the samples of a guide. Where these have hardly left their start, as in units in which the data are far from
0, the prior learns the start, and agrees with them. A step of a latent by a constant, and of its deviations by a factor, is
in the family of nearly every guide, so that at its optimum every unconstrained element of a latent has

.. math:: a = s \, E_q [\partial_u \log \tilde p] = 0, \qquad r = -E_q [(u - m) \, \partial_u \log \tilde p] = 1

with m and s its mean and standard deviation under the guide. A normal distribution of precision :math:`r / s^2` has these gradients
where its mean is :math:`s a / r` away, and the divergence of the guide from it is :math:`(a^2 / r + r - 1 - \log r) / 2` nats.
What is told is :math:`d = \sqrt{a^2 / \min(r, 1) + r - 1 - \log r}`, in standard deviations as a distance of means alone would be
(of the guide where it is the narrower one), from the means of :math:`a^2` and r over the elements of a site.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.program.run import Run, log_density_terms, total
from numpyro_ebm.program.sites import Model

DISTANCE = "distance of guide from its optimum"
MOST = 0.5  # standard deviations, an eighth of a nat for each element: fits that had a third or more to go have .6 and more
LEAST_PRECISION = 0.01  # for r: below it, or negative, where the guide stands between modes
NUM_GROUPS, PER_GROUP = 16, 4  # samples of the guide; groups tell the error of their mean
MAX_ELEMENTS = 2**14  # that are looked at of a site
FIX = (
    "so many standard deviations away the bound is stationary in the mean and width of the guide: it has not arrived, or swings "
    "about there, and a prior that learns from its samples learns where the guide stands. Take more steps, or a learning rate that "
    "is larger at first and falls to 0. Where data are in large units standardize them, or start the guide near them, as by "
    "AutoNormal(program, init_loc_fn=init_to_value(values=...))"
)

Rows = dict[str, Array]  # of subsampled plates
SampleOf = Callable[[Array, Rows], Run]


@dataclass(frozen=True)
class GuideDistance:
    """How far the guide of a latent is from its optimum."""

    #: (), in squared standard deviations; noise alone has none, so that it may be negative
    square: Array
    #: (), its standard error
    error: Array
    #: (), the smallest standard deviation of the guide
    width: Array


jax.tree_util.register_dataclass(GuideDistance, ["square", "error", "width"], [])


def guide_distances(
    rng_key: Array,
    model: Model,
    sample_of: SampleOf,
    data: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, GuideDistance]:
    """By latent site; traced.

    :param model: with energies that are not normalized.
    :param sample_of: a run of the model with latents from the guide, by a key, on these rows where they are not left to it.
    :param data: values of param and mutable sites.
    """
    once = sample_of(rng_key, {})
    rows = {name: plate.indices for name, plate in once.subsampled.items()}
    known = list(once.positions)
    in_part = [name for name in known if any(plate in rows for plate, _ in once.latents[name].plates)]
    whole = [name for name in known if name not in in_part]

    def samples(rows: Rows, names: list[str]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Unconstrained samples of the guide and their scores, ``(num_samples, elements)``."""

        def one(key: Array) -> tuple[dict[str, Array], dict[str, Array]]:
            run = sample_of(key, rows)
            positions, given = run.positions, {**data, **run.given(but=names)}
            latents = {name: positions[name] for name in names}

            def log_density(latents: dict[str, Array]) -> Array:
                return total(log_density_terms(model, args, kwargs, key, data=given, latents=latents)[0])

            scores = jax.grad(log_density)(latents)
            scores = {name: _some(score / run.scale(name)) for name, score in scores.items()}  # a row's own posterior has no scale
            return {name: _some(x) for name, x in latents.items()}, scores

        return lax.map(one, jax.random.split(rng_key, NUM_GROUPS * PER_GROUP))

    found = {}
    for names, given in ((in_part, rows), (whole, {})):  # of a plate in part the same rows in every sample
        if names:
            x, scores = samples(given, names)
            found.update({name: _distance(x[name], scores[name]) for name in names})
    return found


def _some(x: Array) -> Array:
    x = x.reshape(-1)
    return x[:: math.ceil(x.size / MAX_ELEMENTS)]


def _distance(x: Array, scores: Array) -> GuideDistance:
    mean, width = x.mean(0), x.std(0, ddof=1)
    count = len(x) / (len(x) - 1)  # deviations from the mean of these samples are too small
    steps = jnp.stack([width * scores, -count * (x - mean) * (scores - scores.mean(0))])
    of_groups = steps.reshape(2, NUM_GROUPS, PER_GROUP, -1).mean(2)

    def square(means: Array) -> Array:
        shift, precision = (means[0] ** 2).mean(), jnp.maximum(means[1].mean(), LEAST_PRECISION)
        return shift / jnp.minimum(precision, 1) + precision - 1 - jnp.log(precision)

    whole = square(of_groups.mean(1))
    without = jax.vmap(lambda one: square((of_groups.sum(1) - one) / (NUM_GROUPS - 1)), 1)(of_groups)
    bias = (NUM_GROUPS - 1) * (without.mean() - whole)  # by the jackknife: the square of a mean has its noise
    return GuideDistance(whole - bias, jnp.sqrt((NUM_GROUPS - 1) * without.var()), width.min())


def guide_stationarity_finding(site: str, found: GuideDistance) -> Finding:
    """What is said of that distance."""
    if not float(found.width) > 0:
        return not_told(site, DISTANCE, "the guide draws one value alone, and has no standard deviation")
    value, error = math.sqrt(max(0.0, float(found.square))), float(found.error)
    error = min(math.sqrt(error), error / (2 * value)) if value else math.sqrt(error)  # of the root
    return Finding(site, DISTANCE, value, None, MOST + 3 * error, FIX)
