# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether a density is as good at the values that it learns from as two estimates that need hardly any training.

A normal distribution with their moments, and a mixture of normal distributions, by EM on the other half of the values. A density
that is many nats below one of them has not converged, or is of a family too small. Both are honest: each half is told by a mixture
that has not seen it, and from the first estimate the :math:`p / 2n` nats are taken away that p moments gain at the n values
they are estimated from (Akaike 1974). A mixture takes few elements; of more the normal distribution has to do.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm.evaluate.density import KnownDensity
from numpyro_ebm.evaluate.report import Finding

LIKELIHOOD = "log likelihood of the rows"
OF_PRIOR = "log density of the prior at samples of the posterior"
MAX_VALUES = 2000  # that are looked at
MIN_OWNERS = 20  # of values, to compare with
ROWS_PER_DIM = 10  # of fewer, a covariance describes them far better than any others
MAX_SIZE = 10  # elements that mixtures are of
COMPONENTS = (2, 4, 12)  # of a mixture
NUM_STARTS, NUM_EM = 2, 30
PRIOR, PRIOR_VARIANCE = 2.0, 0.1  # of so many values, of the covariance of a component
LEAST_VARIANCE = 1e-3  # of a component, where the values have 1: rounded data look like spikes
NATS = 0.05  # that a density may be short, for each value
OTHERS = ("a normal distribution with their moments", "a mixture of normal distributions fitted to the other half of them")
WORSE = "{} has {:.3g} there. {}"


class Shortfall(NamedTuple):
    """How a density compares with these estimates: means over values, in nats."""

    #: (), its log density
    log_density: Array
    #: (estimates,), that of a normal distribution, and of mixtures of few elements
    of_others: Array
    #: (estimates,), the standard errors of the differences
    errors: Array


def thinned(x: Array) -> Array:
    """Of values ``(copies, owners) + shape`` as many as are looked at, of all owners if that can be."""
    owners = x.shape[1]
    return x[: max(1, MAX_VALUES // owners), :: -(-owners // MAX_VALUES)]


def shortfall(log_density: Array, x: Array, variance: Array | float = 0.0) -> Shortfall:
    """The comparison; traced.

    :param log_density: ``(copies, owners)``, of the model at these values, normalized.
    :param x: ``(copies, owners) + event_shape``. Samples of the latent of one row, which is their owner, say nothing of another,
        and belong to the same half.
    :param variance: of the log normalizer, which may be an estimate.
    """
    owners = x.shape[1] // 4 * 4
    x, log_density = x[:, :owners].reshape(len(x), owners, -1), log_density[:, :owners]
    normal = normal_of(x.reshape(-1, x.shape[2]))
    of_others = [normal.log_prob(x) - normal.num_moments / 2 / x.shape[1]]
    if x.shape[2] <= MAX_SIZE:
        of_others.append(_of_mixture(normal.whiten(x), _gaps(x.reshape(-1, x.shape[2])).max()) - jnp.log(normal.scales).sum())
    estimates = jnp.stack(of_others)
    errors = (estimates - log_density).mean(1).var(1) / x.shape[1]
    return Shortfall(log_density.mean(), estimates.mean((1, 2)), jnp.sqrt(errors + variance))


def shortfall_of(target: Callable[[Array], Array], known: KnownDensity, x: Array) -> Shortfall | None:
    """The same of an energy, None of few owners; traced.

    :param target: its log density at positions of chains, without the normalizer.
    :param x: positions of chains, ``(copies, owners) + event_shape``.
    """
    if x.shape[1] < MIN_OWNERS:
        return None
    x = thinned(x)
    log_density = target(x.reshape(-1, *x.shape[2:])).reshape(x.shape[:2]) - known.log_normalizer
    return shortfall(log_density, x, 1 / known.worth)


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


class _Mixture(NamedTuple):
    """Of normal distributions."""

    log_weights: Array  # (components,)
    means: Array  # (components, size)
    roots: Array  # (components, size, size), which whiten

    def log_probs(self, x: Array) -> Array:
        """``(values, components)``, the log density of each with its weight."""
        white = jnp.einsum("nki,kij->nkj", x[:, None] - self.means, self.roots)
        log_scale = jnp.log(jnp.abs(jnp.diagonal(self.roots, axis1=1, axis2=2))).sum(1)
        return self.log_weights + log_scale - (white**2).sum(2) / 2 - x.shape[1] / 2 * math.log(2 * math.pi)


def _of_mixture(x: Array, gap: Array) -> Array:
    """``(copies, owners)``, the log density of each half by a mixture of the other, with the number of components that is best.

    :param x: white, ``(copies, owners, size)``. Every other pair of owners is of the same half: a row and its twin, where rows
        are sorted so, or repeated.
    :param gap: between neighbors, of which rounded data have few.
    """
    copies, owners, size = x.shape
    pairs = x.reshape(copies, owners // 4, 2, 2, size)
    halves = jnp.moveaxis(pairs, 2, 0).reshape(2, -1, size)
    least = jnp.maximum(gap**2, LEAST_VARIANCE)
    is_used = jnp.arange(max(COMPONENTS)) < jnp.asarray(COMPONENTS)[:, None]
    keys = jax.random.split(jax.random.key(0), NUM_STARTS)

    def of_half(values: Array, others: Array, used: Array) -> Array:
        fits, gained = jax.vmap(lambda key: _mixture_of(values, used, least, key))(keys)
        best = jax.tree.map(lambda y: y[jnp.argmax(gained)], fits)
        return logsumexp(best.log_probs(others), 1)

    found = jax.vmap(jax.vmap(of_half, (0, 0, None)), (None, None, 0))(halves, halves[::-1], is_used)
    best = found[jnp.argmax(found.mean((1, 2)))][::-1]  # of the values of each half
    return jnp.moveaxis(best.reshape(2, copies, owners // 4, 2), 0, 2).reshape(copies, owners)


def _mixture_of(x: Array, used: Array, least: Array, rng_key: Array) -> tuple[_Mixture, Array]:
    """A mixture by EM, and the mean log density of its values.

    :param used: ``(components,)``, whether there is such a component.
    :param least: variance of a component in every direction.
    """
    number, size = len(used), x.shape[1]
    eye = jnp.eye(size, dtype=x.dtype)
    start = _Mixture(
        jnp.where(used, -jnp.log(used.sum()), -jnp.inf),
        x[jax.random.choice(rng_key, len(x), (number,))],
        jnp.tile(2 * eye, (number, 1, 1)),
    )

    def improve(mixture: _Mixture, _: None) -> tuple[_Mixture, Array]:
        log_probs = mixture.log_probs(x)
        total = logsumexp(log_probs, 1)
        shares = jnp.exp(log_probs - total[:, None])
        count = shares.sum(0)
        means = jnp.matmul(shares.T, x, precision="highest") / jnp.maximum(count, 1e-6)[:, None]
        centered = x[:, None] - means
        spread = jnp.einsum("nk,nki,nkj->kij", shares, centered, centered)
        spread = jnp.einsum("nk,nki,nkj->kij", shares, centered, centered)
        spread = jnp.einsum("nk,nki,nkj->kij", shares, centered, centered)
        covariances = (spread + PRIOR * PRIOR_VARIANCE * eye) / (count + PRIOR)[:, None, None] + least * eye
        roots = jnp.swapaxes(jnp.linalg.inv(jnp.linalg.cholesky(covariances)), 1, 2)
        return _Mixture(jnp.log(count / len(x)), means, roots), total.mean()

    mixture, gained = lax.scan(improve, start, None, NUM_EM)
    return mixture, gained[-1]


def _gaps(x: Array) -> Array:
    """By element, the median difference of values next to each other, in its standard deviations."""
    gaps = jnp.diff(jnp.sort(x, 0), axis=0)
    positive = jnp.sort(jnp.where(gaps > 0, gaps, jnp.inf), 0)
    middle = jnp.minimum((gaps > 0).sum(0, keepdims=True) // 2, len(gaps) - 1)
    median = jnp.take_along_axis(positive, middle, 0)[0]
    return jnp.where(jnp.isfinite(median), median / x.std(0), 0)
