# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether denoising at many noise levels learns the density of data smoothed by one of them.

With one score for all levels, the optimum of :class:`~numpyro_ebm.MultiscaleDenoisingScoreMatching` among normal distributions is
known: along a direction in which the data have the variance :math:`\lambda`, the learned variance is
:math:`\sigma_0^2 (1 + \lambda m)`, m the mean of :math:`\sigma_i^{-2}`, and should be :math:`\lambda + \sigma_0^2`. With
:math:`\sigma_0^2 m = .6` the density of wide directions is raised to the power 1.6. A score that can tell the level of a row from
the row does better. It is told by directions in which data have less variance than the noise, as images do in hundreds.
"""

import numpy as np
from jax import Array

from numpyro_ebm.evaluate.report import Finding
from numpyro_ebm.objectives.score import MultiscaleDenoisingScoreMatching

NATS = 0.05  # a row, that the optimum may miss
TELLING = 20.0  # directions without variance by which the level of a row is known to a third
MAX_ROWS = 2000
LEVELS = "nats by which these noise levels miss a Gaussian of the data"


def levels_finding(site: str, objective: MultiscaleDenoisingScoreMatching, batch_size: int, data: Array) -> Finding:
    """How far below the smoothed Gaussian with the covariance of the data its optimum is: out of bounds where no score can help.

    :param batch_size: rows of a step, over which the levels are spread.
    """
    variances, sigma0 = spectrum(data), objective.sigma0
    mean = float(np.mean(np.asarray(objective.weight(batch_size), float) ** 2))
    wanted, learned = variances + sigma0**2, sigma0**2 * (1 + variances * mean)
    nats = float((wanted / learned - 1 - np.log(wanted / learned)).sum() / 2)
    can_tell = ((sigma0**2 / wanted) ** 2).sum() >= TELLING
    fix = (
        f"the level of a row cannot be told from the row, and where it cannot the mean of sigma^-2, {mean:.3g}, must be sigma0^-2: "
        f"take sigma0={mean**-0.5:.3g}, other levels, or DenoisingScoreMatching({sigma0:.3g})"
    )
    return Finding(site, LEVELS, nats, None, None if can_tell else NATS, "" if can_tell else fix)


def spectrum(data: Array) -> np.ndarray:
    """The variances of rows along the eigenvectors of their covariance, all of them."""
    rows = np.asarray(data, float).reshape(len(data), -1)
    rows = rows[:: -(-len(rows) // MAX_ROWS)]
    rows = np.nan_to_num(rows - np.nanmean(rows, 0))
    found = np.linalg.svd(rows, compute_uv=False) ** 2 / len(rows)
    return np.pad(found, (0, rows.shape[1] - len(found)))
