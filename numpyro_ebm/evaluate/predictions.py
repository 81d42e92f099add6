# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether data are as the model predicts them where its latents have been learned.

Parameters of a likelihood that have hardly left their start, as a noise of 2 in units in which 25 is right, are made up for by
latents, and by a prior that learns from them. The data then lie beyond what is predicted for them. With latents from the
posterior, and of the model the truth, a datum and 9 predictions of it are ten samples alike: in 2 of 10 it is the largest or the
smallest.

A noise that is too large may hide that: where a prior has become a spike, the noise takes up all that the latents should explain.
The data then pull all rows of a latent away from it. Given the latents the score of a likelihood has the mean 0 and the variance
that scores of predictions have,

.. math:: E_{p(y, z)} [(\partial_z \log p(y \mid z))^2] = E_{p(z)} E_{p(y' \mid z)} [(\partial_z \log p(y' \mid z))^2],

so that their sizes are compared, over the rows of a latent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.distributions import Distribution

from numpyro_ebm.distributions.energy import energy_site
from numpyro_ebm.distributions.known import is_known
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.evaluate.stationarity import RunOf
from numpyro_ebm.program.run import Run
from numpyro_ebm.program.sites import Site, is_factor, is_masked

BEYOND = "fraction of data beyond 9 predictions"
MOST = 0.5  # where .2 is right: a noise of half of what the data have gives .5
NUM_PREDICTIONS, NUM_RUNS = 9, 4
MOST_DATA = 2**22  # of a site in a run
FIX = (
    "2 of 10 data should be larger or smaller than all of 9 predictions that the model makes at its latents. Parameters or latents "
    "of the site have not arrived, as a noise that is far too small, or the model cannot describe these data. Take more steps, a "
    "larger learning rate, or a start near the data; standardize data in large units"
)

PULL = "size of the likelihood's scores to that of predictions"
MOST_PULL = 1.4  # a noise that stands for a prior of the same size gives 2 with five data for each latent
NUM_REPLICAS, MIN_ELEMENTS = 4, 10
PULLED = (
    "the data pull the latents away from where the fit has them, by more than the model says they would at the right place. The "
    "prior has not arrived, and may be a spike whose width the noise of the data makes up for; or the model cannot describe these "
    "data. Standardize data in large units, start guide and noise near them (a small noise, and init_loc_fn= of the guide), and "
    "take more steps, or a larger learning rate"
)

RunAt = Callable[[Array, Run, dict[str, Array]], Run]


class Beyond(NamedTuple):
    """How many data of a site lie beyond their predictions."""

    #: (), the fraction
    fraction: Array
    #: (), of how many data
    num_data: Array


class Pull(NamedTuple):
    """How much the data pull at the elements of a latent, to how much predictions do."""

    #: (), the ratio of the mean squares of scores
    ratio: Array
    #: (), the standard error that this has where it is 1
    error: Array


class Predictions(NamedTuple):
    """How data compare with predictions of them."""

    #: by observed site
    beyond: dict[str, Beyond]
    #: by latent site
    pulls: dict[str, Pull]


def predictions(rng_key: Array, run_of: RunOf, run_at: RunAt) -> Predictions:
    """By observed and latent site, for those whose predictions can be drawn; traced. Of masked data nothing is told.

    :param run_of: a run of the model by a key, with latents from their posterior.
    :param run_at: that run again, by the same key, with unconstrained latents that are given.
    """

    def one(key: Array) -> Predictions:
        run_key, predict_key, replicate_key = jax.random.split(key, 3)
        run = run_of(run_key)
        compared = {name: site for name, site in run.observed.items() if _is_compared(site)}
        beyond = {name: _beyond(predict_key, site["fn"], jnp.asarray(site["value"])) for name, site in compared.items()}
        latents = run.positions
        if not compared or not latents:
            return Predictions(beyond, {})

        def log_likelihood(latents: dict[str, Array], values: dict[str, Array]) -> Array:
            again = run_at(run_key, run, latents).sites
            return sum((again[name]["fn"].log_prob(value).sum() for name, value in values.items()), jnp.zeros(()))

        def scores(values: dict[str, Array]) -> dict[str, Array]:
            return jax.grad(log_likelihood)(latents, values)

        keys = jax.random.split(replicate_key, NUM_REPLICAS)
        drawn = {name: jax.vmap(site["fn"].sample)(keys) for name, site in compared.items()}
        values = {name: jnp.concatenate([jnp.asarray(compared[name]["value"])[None], x]) for name, x in drawn.items()}
        return Predictions(beyond, {name: _pull(x) for name, x in lax.map(scores, values).items() if x[0].size >= MIN_ELEMENTS})

    found = lax.map(one, jax.random.split(rng_key, NUM_RUNS))
    return jax.tree.map(lambda x: x.mean(0), found)


def _is_compared(site: Site) -> bool:
    fn, value = site["fn"], site["value"]
    if is_factor(fn) or energy_site(fn) is not None or is_masked(fn) or not is_known(fn):
        return False
    is_bits = jnp.issubdtype(jnp.result_type(value), jnp.bool_)
    return not is_bits and jnp.shape(value) == fn.shape() and 0 < jnp.size(value) <= MOST_DATA


def _beyond(rng_key: Array, fn: Distribution, value: Array) -> Beyond:

    def compare(extremes: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        drawn = fn.sample(key)
        return (jnp.minimum(extremes[0], drawn), jnp.maximum(extremes[1], drawn)), None

    keys = jax.random.split(rng_key, NUM_PREDICTIONS)
    drawn = fn.sample(keys[0])
    (least, most), _ = lax.scan(compare, (drawn, drawn), keys[1:])
    return Beyond(((value < least) | (value > most)).mean(), jnp.asarray(float(value.size)))


def _pull(scores: Array) -> Pull:
    """Of scores of the data, and of replicas, along axis 0."""
    squares = scores.reshape(len(scores), -1) ** 2
    of_data, of_replicas = squares[0], squares[1:]
    expected = of_replicas.mean()
    return Pull(of_data.mean() / expected, of_replicas.std() / math.sqrt(of_data.size) / expected)


def prediction_findings(found: Predictions, *, are_well: bool = True) -> list[Finding]:
    """What is said of these numbers. Where data lie beyond their predictions, that is the cause to tell.

    :param are_well: whether the latents follow their posterior, as far as is known. Where they do not, that is the cause.
    """
    of_data = [
        Finding(site, BEYOND, float(beyond.fraction), None, MOST + 1.5 / math.sqrt(float(beyond.num_data)), FIX)
        for site, beyond in found.beyond.items()
    ]
    are_well = are_well and all(finding.is_well for finding in of_data)
    of_latents = []
    for site, (ratio, error) in found.pulls.items():
        value = math.sqrt(float(ratio))
        most = MOST_PULL + 1.5 * float(error)  # three errors of the root
        if math.isnan(value):
            of_latents.append(not_told(site, PULL, "the data do not depend on it"))
        else:
            of_latents.append(Finding(site, PULL, value, None, most if are_well else None, PULLED if are_well else ""))
    return of_data + of_latents
