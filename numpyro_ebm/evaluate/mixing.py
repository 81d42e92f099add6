# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""R-hat and the effective sample size of chains, with one answer for all who ask: fits, reports and posteriors."""

from typing import Any

import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

# Of independent chains of 100 draws R-hat is above 1.1 once in ten million times.
R_HAT_OF_DRAWS, DRAWS_TO_JUDGE = 1.1, 100
# Of chains that forget where they were within 22 of 50 samples; training moves an energy more slowly than that.
R_HAT_OF_CHAINS = 1.2
# Of chains that are known to be distributed as they should: they may be slower, as between modes, if they cross at all.
R_HAT_OF_AGREEING = 1.5


def r_hat(draws: Any) -> np.ndarray:
    """Split R-hat of every element of ``draws``, ``(num_chains, num_samples) + shape``.

    It is nan where nothing moves, and infinite where chains stand still in different places.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(split_gelman_rubin(np.asarray(draws, np.float64)))


def sample_size(draws: Any) -> np.ndarray:
    """The effective sample size of every element of ``draws``, ``(num_chains, num_samples) + shape``; nan where nothing moves.

    Samples that alternate are worth more than their number n, which gives the estimate a limit, n log10 n: NumPyro's has none, and
    becomes negative.
    """
    draws = np.asarray(draws, np.float64)
    num_draws = draws.shape[0] * draws.shape[1]
    most = num_draws * np.log10(num_draws)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.asarray(effective_sample_size(draws))
    return np.where((found < 0) | (found > most), most, found)


def worst_r_hat(draws: Any) -> float:
    """Of the worst element, 1 where nothing moves."""
    return float(np.nanmax(r_hat(draws), initial=1.0))


def least_sample_size(draws: Any) -> float:
    """Of the worst element, between 1 and the number of draws, which it is where nothing moves."""
    num_draws = np.shape(draws)[0] * np.shape(draws)[1]
    return max(1.0, float(np.nanmin(sample_size(draws), initial=num_draws)))
