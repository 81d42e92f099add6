# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether data are as the model predicts them where its latents have been learned.

Parameters of a likelihood that have hardly left their start, as a noise of 2 in units in which 25 is right, are made up for by
latents, and by a prior that learns from them. The data then lie beyond what is predicted for them. With latents from the
posterior, and of the model the truth, a datum and 9 predictions of it are ten samples alike: in 2 of 10 it is the largest or the
smallest.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm.distributions.energy import energy_site
from numpyro_ebm.distributions.known import is_known
from numpyro_ebm.evaluate.report import Finding
from numpyro_ebm.evaluate.stationarity import RunOf
from numpyro_ebm.program.sites import is_factor, is_masked

BEYOND = "fraction of data beyond 9 predictions"
MOST = 0.5  # where .2 is right: a noise of half of what the data have gives .5
NUM_PREDICTIONS, NUM_RUNS = 9, 4
MAX_DATA = 2**24  # of a site, in all runs
FIX = (
    "2 of 10 data should be larger or smaller than all of 9 predictions that the model makes at its latents. Parameters or latents "
    "of the site have not arrived, as a noise that is far too small, or the model cannot describe these data. Take more steps, a "
    "larger learning rate, or a start near the data; standardize data in large units"
)


class Beyond(NamedTuple):
    """How many data of a site lie beyond their predictions."""

    #: (), the fraction
    fraction: Array
    #: (), of how many data
    num_data: Array


def beyond_predictions(rng_key: Array, run_of: RunOf) -> dict[str, Beyond]:
    """By observed site whose predictions can be drawn; traced. Of masked data it is not told.

    :param run_of: a run of the model by a key, with latents from their posterior.
    """

    def one(key: Array) -> dict[str, Beyond]:
        run_key, predict_key = jax.random.split(key)
        found = {}
        for name, site in run_of(run_key).observed.items():
            fn, value = site["fn"], jnp.asarray(site["value"])
            is_one = not is_factor(fn) and energy_site(fn) is None and not is_masked(fn) and is_known(fn)
            if not is_one or value.dtype == bool or not 0 < value.size <= MAX_DATA // NUM_RUNS or value.shape != fn.shape():
                continue

            def compare(extremes: tuple[Array, Array], key: Array, fn: Any = fn) -> tuple[tuple[Array, Array], None]:
                drawn = fn.sample(key)
                return (jnp.minimum(extremes[0], drawn), jnp.maximum(extremes[1], drawn)), None

            first, *_ = keys = jax.random.split(predict_key, NUM_PREDICTIONS)
            drawn = fn.sample(first)
            (least, most), _ = lax.scan(compare, (drawn, drawn), keys[1:])
            found[name] = Beyond(((value < least) | (value > most)).mean(), jnp.asarray(value.size))
        return found

    found = lax.map(one, jax.random.split(rng_key, NUM_RUNS))
    return {name: Beyond(beyond.fraction.mean(), beyond.num_data[0]) for name, beyond in found.items()}


def prediction_findings(found: dict[str, Beyond]) -> list[Finding]:
    """What is said of these fractions."""
    return [
        Finding(site, BEYOND, float(beyond.fraction), None, MOST + 1.5 / math.sqrt(float(beyond.num_data)), FIX)
        for site, beyond in found.items()
    ]
