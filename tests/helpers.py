# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Numbers, an objective and a model that several files of tests use."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist


def normal(seed, *shape):
    """Standard normal numbers of any shape, in the precision that is set."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@dataclass(frozen=True)
class Frozen:
    """A score objective with the same noise at every call."""

    objective: Any
    seed: int = 5

    def perturb(self, rng_key, v):
        return self.objective.perturb(jax.random.key(self.seed), v)

    def loss(self, score_fn, rng_key, v, v_tilde):
        return self.objective.loss(score_fn, jax.random.key(self.seed), v, v_tilde)

    def weight(self, batch_size):
        return self.objective.weight(batch_size)

    @property
    def differentiates_score(self):
        return self.objective.differentiates_score


def hierarchical(y, scale=1.0):
    """x ~ N(loc, 1), y ~ N(x, scale^2): the marginal distribution of y is N(loc, 1 + scale^2), the maximum is the mean of y."""
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


def found(report, quantity):
    """The one finding of a quantity."""
    (finding,) = [finding for finding in report.findings if finding.quantity == quantity]
    return finding
