# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether the modes of a density that is known on a grid have the weights of its rows.

A mode is all from where the steepest ascent ends at the same maximum. With fractions :math:`r_k` of the rows and :math:`p_k` of
the density in mode :math:`k` the weights alone lose :math:`\sum_k r_k \log(r_k / p_k)` nats for each row. For rows that are
samples of the density this is :math:`\chi^2_{K - 1} / 2n`.
"""

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_ebm.evaluate.density import KnownDensity
from numpyro_ebm.evaluate.report import Finding

WEIGHTS_LOSE = "nats for each row lost by the weights of modes"
MOST = 0.015  # modes of 50 and 50 % may have 41 and 59, and one of 10 % may have 5 or 16
OTHER_WEIGHTS = (
    "of the rows {:.2g} stand at the mode about {}, and of the density that is learned {:.2g}. Scores hardly see the weights of "
    "modes that do not overlap: learn by likelihood, SVI of negative_phase(model) from these parameters, or take more noise; more "
    "steps where the fit has not converged"
)
LEAST_ROWS = 0.5  # that a mode is taken to stand for, so that an outlier is none


class ModeWeights(NamedTuple):
    """How the weights of modes of a density compare with those of its rows."""

    #: (), nats that they lose for each row
    lost: Array
    #: (), modes that have rows, or are likely to
    num_modes: Array
    #: (size,), the mode whose weight differs most, and what rows and density have there
    place: Array
    of_rows: Array
    of_density: Array


def mode_weights(known: KnownDensity, rows: Array) -> ModeWeights | None:
    """The weights of modes, or None of a density that is known by samples; traced.

    :param known: without batch axes.
    :param rows: ``(rows,) + event_shape``.
    """
    if known.log_density is None:
        return None
    modes, num_rows = _maxima_above(known.log_density), len(rows)
    of_density = jnp.zeros(modes.size).at[modes].add(known.weights)
    of_rows = jnp.zeros(modes.size).at[modes[_nearest(known, rows.reshape(num_rows, -1))]].add(1 / num_rows)
    lost = jnp.where(of_rows > 0, of_rows * jnp.log(of_rows / jnp.maximum(of_density, LEAST_ROWS / num_rows)), 0.0).sum()
    num_modes = ((of_rows > 0) | (of_density > 1 / num_rows)).sum()
    most = jnp.argmax(abs(of_rows - of_density))
    return ModeWeights(lost, num_modes, known.points[most], of_rows[most], of_density[most])


def mode_weights_finding(site: str, found: ModeWeights, num_rows: int, *, are_well: bool) -> Finding:
    """What these numbers say.

    :param are_well: whether all else is. Where it is not, that is the cause to tell.
    """
    lost, num_modes, of_rows, of_density = (float(x) for x in (found.lost, found.num_modes, found.of_rows, found.of_density))
    noise = (num_modes - 1 + 3 * math.sqrt(2 * (num_modes - 1))) / (2 * num_rows)
    place = ", ".join(f"{x:.3g}" for x in np.ravel(found.place))
    fix = OTHER_WEIGHTS.format(of_rows, f"({place})" if np.size(found.place) > 1 else place, of_density)
    return Finding(site, WEIGHTS_LOSE, lost, None, MOST + noise if are_well else None, fix)


def _maxima_above(log_density: Array) -> Array:
    """``(points,)``, to which maximum each point of a grid belongs: by steps to the highest of its neighbors."""
    points = jnp.arange(log_density.size).reshape(log_density.shape)
    # the largest offset first: from a neighbor as high, as where rows are tied, only forwards, so that steps end
    offsets = list(itertools.product((1, 0, -1), repeat=log_density.ndim))
    heights = jnp.maximum(log_density, jnp.finfo(log_density.dtype).min)  # above those around the grid
    around, numbers = jnp.pad(heights, 1, constant_values=-jnp.inf), jnp.pad(points, 1)

    def at(x: Array, offset: tuple[int, ...]) -> Array:
        return lax.slice(x, [1 + o for o in offset], [1 + o + n for o, n in zip(offset, log_density.shape, strict=True)])

    highest = jnp.argmax(jnp.stack([at(around, offset) for offset in offsets]), 0)
    steps = jnp.take_along_axis(jnp.stack([at(numbers, offset) for offset in offsets]), highest[None], 0).reshape(-1)
    return lax.fori_loop(0, math.ceil(math.log2(steps.size)), lambda _, far: far[far], steps)


def _nearest(known: KnownDensity, rows: Array) -> Array:
    """``(rows,)``, the point of the grid that is nearest to each row."""
    shape = known.log_density.shape  # type: ignore[union-attr]
    grid, at = known.points.reshape(*shape, len(shape)), jnp.zeros(len(rows), int)
    for axis, length in enumerate(shape):
        side = jnp.moveaxis(grid[..., axis], axis, 0).reshape(length, -1)[:, 0]
        at = at * length + jnp.searchsorted((side[1:] + side[:-1]) / 2, rows[:, axis])
    return at
