# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether a density is as good at the values that it learns from as two estimates that need no training.

A normal distribution with their moments, and a Gaussian kernel density estimate that leaves out the value it is asked of. A density
that is many nats below one of them has not converged, or is of a family too small. Both are honest: leaving out makes the
second what other values would have, and of the first the :math:`p / 2n` nats are taken away that p moments gain at the n values
they are estimated from (Akaike 1974). In many dimensions kernels are far below any good fit, and only the first says something.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm.evaluate.report import Finding

LIKELIHOOD = "log likelihood of the rows"
OF_PRIOR = "log density of the prior at samples of the posterior"
MAX_VALUES = 2000  # that kernels stand at
MIN_OWNERS = 20  # of values, to compare with
ROWS_PER_DIM = 10  # of fewer, a covariance describes them far better than any others
BANDWIDTHS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.1)  # of Scott's rule, which is right for a bell
NATS = 0.05  # that a density may be short, for each value


OTHERS = ("a normal distribution with their moments", "a kernel density estimate that leaves each out")
WORSE = "{} has {:.3g} there. {}"


class Shortfall(NamedTuple):
    """How a density compares with these estimates: means over values, in nats."""

    #: (), its log density
    log_density: Array
    #: (2,), that of a normal distribution and that of kernels
    of_others: Array
    #: (2,), the standard errors of the differences
    errors: Array


def thinned(x: Array) -> Array:
    """Of values ``(copies, owners) + shape`` as many as kernels can stand at, of all owners if that can be."""
    owners = x.shape[1]
    return x[: max(1, MAX_VALUES // owners), :: -(-owners // MAX_VALUES)]


def shortfall(log_density: Array, x: Array, variance: Array | float = 0.0, raw: Array | None = None) -> Shortfall:
    """The comparison; traced.

    :param log_density: ``(copies, owners)``, of the model at these values, normalized.
    :param x: ``(copies, owners) + event_shape``. Samples of the latent of one row, which is their owner, say nothing of another,
        so that kernels leave out all of them.
    :param variance: of the log normalizer, which may be an estimate.
    :param raw: the values before there was noise on them, by which it is seen that two are the same row.
    """
    x = x.reshape(*x.shape[:2], -1)
    raw = x if raw is None else raw.reshape(x.shape)
    normal = normal_of(x.reshape(-1, x.shape[2]))
    of_gaussian = normal.log_prob(x) - normal.num_moments / 2 / x.shape[1]
    of_others = jnp.stack([of_gaussian, _kernels(x, raw, normal)])
    errors = (of_others - log_density).mean(1).var(1) / x.shape[1]
    return Shortfall(log_density.mean(), of_others.mean((1, 2)), jnp.sqrt(errors + variance))


def shortfall_finding(site: str, quantity: str, found: Shortfall, fix: str, *, are_well: bool = True) -> Finding:
    """Whether a density is as good as the better of the two.

    :param fix: what to do where it is not.
    :param are_well: whether what the values came from is right. Where it is not, that is the cause to tell.
    """
    value, others, errors = (np.asarray(x, float) for x in found)
    least = others - NATS - 4 * errors
    best = int(least.argmax())
    text = WORSE.format(OTHERS[best], others[best], fix)
    return Finding(site, quantity, float(value), float(least[best]) if are_well else None, None, text)


class Normal(NamedTuple):
    """A normal distribution by its axes and the standard deviations along them."""

    mean: Array
    axes: Array
    scales: Array
    num_moments: int

    def whiten(self, x: Array) -> Array:
        return jnp.matmul(x - self.mean, self.axes, precision="highest") / self.scales

    def log_prob(self, x: Array, wider: float = 1.0) -> Array:
        """Along the last axis; half and half with one that is so much wider."""
        square, size = (self.whiten(x) ** 2).sum(-1), len(self.scales)
        here, there = (-0.5 * square / factor**2 - size * math.log(factor) for factor in (1.0, wider))
        return jnp.logaddexp(here, there) - math.log(2) - jnp.log(self.scales).sum() - size / 2 * math.log(2 * math.pi)

    def sample(self, rng_key: Array, num: int, wider: float = 1.0) -> Array:
        """``(num, size)``, every second one of the distribution that is so much wider."""
        factor = jnp.where(jnp.arange(num) % 2 == 0, 1.0, wider)[:, None]
        drawn = factor * jax.random.normal(rng_key, (num, len(self.scales)), self.scales.dtype) * self.scales
        return self.mean + jnp.matmul(drawn, self.axes.T, precision="highest")


def normal_of(x: Array) -> Normal:
    """With the moments of values ``(values, size)``; without correlations of fewer than 10 for each element."""
    size, mean, scale = x.shape[1], x.mean(0), x.std(0)
    if len(x) < ROWS_PER_DIM * size:
        return Normal(mean, jnp.eye(size, dtype=x.dtype), scale, 2 * size)
    variances, axes = jnp.linalg.eigh(jnp.matmul((x - mean).T, x - mean, precision="highest") / len(x))
    scales = jnp.sqrt(jnp.maximum(variances, jnp.finfo(x.dtype).eps * variances.max()))
    return Normal(mean, axes, scales, size * (size + 3) // 2)


def _kernels(x: Array, raw: Array, normal: Normal) -> Array:
    """``(copies, owners)``, the log density of kernels at values of other owners, with the bandwidth that is best.

    Equal values are left out too, and no bandwidth is below the gaps between neighbors, of which rounded data have few.
    """
    copies, owners, size = x.shape
    owner = jnp.tile(jnp.arange(owners), copies)
    squares, rounding = _squares(normal.whiten(raw).reshape(-1, size))
    is_other = (owner[:, None] != owner) & (squares > rounding)
    if raw is not x:
        squares, _ = _squares(normal.whiten(x).reshape(-1, size))
    squares = jnp.where(is_other, squares, jnp.inf)
    rule, least = owners ** (-1 / (size + 4)), _gaps(x.reshape(-1, size)).max()

    def of_bandwidth(factor: Array) -> Array:
        h = jnp.maximum(factor * rule, least)
        found = logsumexp(-squares / (2 * h**2), 1) - math.log(copies * (owners - 1))
        return found - size * (jnp.log(h) + math.log(2 * math.pi) / 2) - jnp.log(normal.scales).sum()

    found = lax.map(of_bandwidth, jnp.asarray(BANDWIDTHS, x.dtype))
    return found[jnp.argmax(found.mean(1))].reshape(copies, owners)


def _squares(x: Array) -> tuple[Array, Array]:
    """Squared distances of all pairs, and what rounding makes of those that are 0."""
    norms = (x**2).sum(1)
    squares = norms[:, None] + norms - 2 * jnp.matmul(x, x.T, precision="highest")
    return squares, 16 * jnp.finfo(x.dtype).eps * (1 + norms[:, None])


def _gaps(x: Array) -> Array:
    """By element, the median difference of values next to each other, in its standard deviations."""
    gaps = jnp.diff(jnp.sort(x, 0), axis=0)
    positive = jnp.sort(jnp.where(gaps > 0, gaps, jnp.inf), 0)
    middle = jnp.minimum((gaps > 0).sum(0, keepdims=True) // 2, len(gaps) - 1)
    median = jnp.take_along_axis(positive, middle, 0)[0]
    return jnp.where(jnp.isfinite(median), median / x.std(0), 0)
