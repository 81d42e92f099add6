# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether a density is as good at the values that it learns from as two estimates that need hardly any training.

A normal distribution with their moments, and a mixture of normal distributions, by EM on the other half of the values. A density
that is many nats below one of them has not converged, or is of a family too small. Both are honest: each half is told by a mixture
that has not seen it, and from the first estimate the :math:`p / 2n` nats are taken away that p moments gain at the n values
they are estimated from (Akaike 1974). A mixture takes few elements; of more the normal distribution has to do.

A prior p is compared at samples of the posterior under it, of which each row has some. With another prior q the likelihood of the
row would be so many times larger,

.. math:: \frac{\int q(z) p(y | z) dz}{\int p(z) p(y | z) dz} = E_{p(z | y)} \Big[\frac{q(z)}{p(z)}\Big],

and the mixture is fitted by EM to that, with each sample weighted by the ratio among those of its row. Of samples of a guide, which
stand for a bound, it is the mean of the logarithm instead, and all weights are equal.

What may pass for chance: by Markov's inequality no density that is fixed before exceeds the true one by many nats in all, so that
of n rows the difference to a density that is :math:`\epsilon` nats short of the truth has about the mean :math:`\epsilon` and the
variance :math:`2 \epsilon / n`.
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
OF_OTHERS = "log likelihood of validation rows"
OF_PRIOR = "nats that a row would gain by another prior"
MAX_VALUES = 2000  # that are looked at
MIN_OWNERS = 20  # of values, to compare with
ROWS_PER_DIM = 10  # of fewer, a covariance describes them far better than any others
MAX_SIZE = 10  # elements that mixtures are of
COMPONENTS = (2, 4, 12)  # of a mixture
NUM_STARTS, NUM_EM = 2, 30
SPREAD = 5  # prime to the largest number of components
PRIOR, PRIOR_VARIANCE = 2.0, 0.1  # of so many values, of the covariance of a component
LEAST_VARIANCE = 1e-3  # of a component, where the values have 1: rounded data look like spikes
NATS = 0.05  # that a density may be short, for each value
ERRORS = 3  # and so many standard errors of that
ESTIMATES = "a normal distribution", "a mixture of normal distributions"
HOW = "{} with their moments", "{} fitted to the other half of them"
WORSE = "{} has {:.3g} there. {}"
BETTER = "so much is the gain of {}. {}"
BY_HEART = (
    "{}, of the rows that were learned from, has {:.3g} there. The model has learned these rows by heart: take fewer steps, weight "
    "decay (optax.adamw), a smaller network or more rows"
)


class Shortfall(NamedTuple):
    """How a density compares with these estimates: means over owners of values, in nats."""

    #: (), its log density
    log_density: Array
    #: (estimates,), how much more a normal distribution has, and mixtures of few elements
    gains: Array
    #: (), the standard error of the gain where it is what is tolerated
    error: Array


def thinned(x: Array) -> Array:
    """Of values ``(copies, owners) + shape`` as many as are looked at, of all owners if that can be."""
    owners = x.shape[1]
    return x[: max(1, MAX_VALUES // owners), :: -(-owners // MAX_VALUES)]


def shortfall(log_density: Array, x: Array, variance: Array | float = 0.0, *, of_posterior: bool = True) -> Shortfall:
    """The comparison; traced.

    :param log_density: ``(copies, owners)``, of the model at these values, normalized.
    :param x: ``(copies, owners) + event_shape``. Samples of the latent of one row, which is their owner, say nothing of another,
        and belong to the same half.
    :param variance: of the log normalizer, which may be an estimate.
    :param of_posterior: whether several copies are samples of the posterior; else of a guide.
    """
    owners = x.shape[1] // 4 * 4
    x, log_density = x[:, :owners].reshape(len(x), owners, -1), log_density[:, :owners]
    normal = normal_of(x.reshape(-1, x.shape[2]))
    estimates = [normal.log_prob(x) - normal.num_moments / 2 / owners]
    if x.shape[2] <= MAX_SIZE:
        least = _least_variance(x.reshape(-1, x.shape[2]))
        of_mixture = _of_mixture(normal.whiten(x), log_density if of_posterior else None, least)
        estimates.append(of_mixture - jnp.log(normal.scales).sum())
    ratios = jnp.stack(estimates) - log_density
    gains = logsumexp(ratios, 1) - math.log(len(x)) if of_posterior else ratios.mean(1)
    return Shortfall(log_density.mean(), gains.mean(1), jnp.sqrt(2 * NATS / owners + variance))


def shortfall_of(target: Callable[[Array], Array], known: KnownDensity, x: Array, *, of_posterior: bool = True) -> Shortfall | None:
    """The same of an energy, None of few owners; traced.

    :param target: its log density at positions of chains, without the normalizer.
    :param x: positions of chains, ``(copies, owners) + event_shape``.
    """
    if x.shape[1] < MIN_OWNERS:
        return None
    x = thinned(x)
    log_density = target(x.reshape(-1, *x.shape[2:])).reshape(x.shape[:2]) - known.log_normalizer
    return shortfall(log_density, x, 1 / known.worth, of_posterior=of_posterior)


def shortfall_elsewhere(target: Callable[[Array], Array], known: KnownDensity, x: Array, learned: Array) -> Shortfall | None:
    """The same at rows that neither the energy nor the estimates have seen, None of few; traced.

    :param x: positions of chains, ``(rows,) + event_shape``.
    :param learned: positions of the rows that were learned from, which make the estimates.
    """
    if min(len(x), len(learned)) < MIN_OWNERS:
        return None
    x, learned = thinned(x[None])[0], thinned(learned[None])[0]
    log_density = target(x) - known.log_normalizer
    x, learned = x.reshape(len(x), -1), learned.reshape(len(learned), -1)
    normal = normal_of(learned)
    estimates = [normal.log_prob(x)]
    if x.shape[1] <= MAX_SIZE:
        fitted = _mixtures_of(normal.whiten(learned)[None], None, _least_variance(learned))
        by_number = jax.vmap(lambda mixture: mixture.log_prob(normal.whiten(x)))(fitted)
        estimates.append(by_number[jnp.argmax(by_number.mean(1))] - jnp.log(normal.scales).sum())
    gains = jnp.stack(estimates).mean(1) - log_density.mean()
    return Shortfall(log_density.mean(), gains, jnp.sqrt(2 * NATS / len(x) + 1 / known.worth))


def rows_finding(site: str, found: Shortfall, fix: str, *, are_well: bool = True) -> Finding:
    """Whether a density of rows is as good as the better of the two.

    :param fix: what to do where it is not.
    :param are_well: whether what the values came from is right. Where it is not, that is the cause to tell.
    """
    value, best, gain, tolerated = _best(found)
    text = WORSE.format(HOW[best].format(ESTIMATES[best]), value + gain, fix)
    return Finding(site, LIKELIHOOD, value, value + gain - tolerated if are_well else None, None, text)


def prior_finding(site: str, found: Shortfall, fix: str, *, are_well: bool = True) -> Finding:
    """The same of a prior, at samples of the posterior."""
    _, best, gain, tolerated = _best(found)
    return Finding(
        site, OF_PRIOR, gain, None, tolerated if are_well else None, BETTER.format(HOW[best].format(ESTIMATES[best]), fix)
    )


def others_finding(site: str, found: Shortfall, *, are_well: bool) -> Finding:
    """The same of rows that were not learned from."""
    value, best, gain, tolerated = _best(found)
    text = BY_HEART.format(ESTIMATES[best], value + gain)
    return Finding(site, OF_OTHERS, value, value + gain - tolerated if are_well else None, None, text)


def _best(found: Shortfall) -> tuple[float, int, float, float]:
    """The log density, which estimate is the best, what it gains, and what is tolerated."""
    gains = np.asarray(found.gains, float)
    best = int(gains.argmax())
    return float(found.log_density), best, float(gains[best]), NATS + ERRORS * float(found.error)


class Normal(NamedTuple):
    """A normal distribution by its axes and the standard deviations along them."""

    mean: Array
    axes: Array
    scales: Array
    num_moments: int

    def whiten(self, x: Array) -> Array:
        return jnp.matmul(x - self.mean, self.axes, precision="highest") / self.scales

    def log_prob(self, x: Array, widths: tuple[float, ...] = (1.0,)) -> Array:
        """Along the last axis; of a mixture of some that are so many times as wide."""
        square, size = (self.whiten(x) ** 2).sum(-1), len(self.scales)
        by_width = jnp.stack([-0.5 * square / width**2 - size * math.log(width) for width in widths])
        log_constant = math.log(len(widths)) + size / 2 * math.log(2 * math.pi) + jnp.log(self.scales).sum()
        return logsumexp(by_width, 0) - log_constant

    def sample(self, rng_key: Array, num: int, widths: tuple[float, ...] = (1.0,)) -> Array:
        """``(num, size)``, of each width as many."""
        width = jnp.asarray(widths)[jnp.arange(num) % len(widths)][:, None]
        return self.unwhiten(width * jax.random.normal(rng_key, (num, len(self.scales)), self.scales.dtype))

    def unwhiten(self, x: Array) -> Array:
        return self.mean + jnp.matmul(x * self.scales, self.axes.T, precision="highest")


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
        """Along the last axis, the log density of each component with its weight."""
        white = jnp.einsum("...ki,kij->...kj", x[..., None, :] - self.means, self.roots)
        log_scale = jnp.log(jnp.abs(jnp.diagonal(self.roots, axis1=1, axis2=2))).sum(1)
        return self.log_weights + log_scale - (white**2).sum(-1) / 2 - x.shape[-1] / 2 * math.log(2 * math.pi)

    def log_prob(self, x: Array) -> Array:
        return logsumexp(self.log_probs(x), -1)


def _of_mixture(x: Array, log_prior: Array | None, least: Array) -> Array:
    """``(copies, owners)``, the log density of each half by a mixture of the other, with the number of components that is best.

    :param x: white, ``(copies, owners, size)``. Every other pair of owners is of the same half: a row and its twin, where rows
        are sorted so, or repeated.
    :param log_prior: ``(copies, owners)``, of the prior that is another; None of samples of a guide.
    :param least: :func:`_least_variance`.
    """
    copies, owners, _ = x.shape

    def halves(y: Array) -> Array:
        """``(2, copies, owners / 2) + shape``"""
        pairs = y.reshape(copies, owners // 4, 2, 2, *y.shape[2:])
        return jnp.moveaxis(pairs, 2, 0).reshape(2, copies, owners // 2, *y.shape[2:])

    values, before = halves(x), None if log_prior is None else halves(log_prior)
    fitted = jax.vmap(lambda values, before: _mixtures_of(values, before, least))(values, before)
    by_number = jax.vmap(jax.vmap(lambda mixture, others: mixture.log_prob(others), (0, None)))(fitted, values[::-1])
    found = jnp.swapaxes(by_number, 0, 1)
    best = found[jnp.argmax(_gained(found, None if before is None else before[::-1]))][::-1]  # of the values of each half
    return jnp.moveaxis(best.reshape(2, copies, owners // 4, 2), 0, 2).reshape(copies, owners)


def _gained(log_prob: Array, before: Array | None) -> Array:
    """By mixture, the mean over halves and owners, ``(..., 2, copies, owners)``."""
    ratios = log_prob if before is None else logsumexp(log_prob - before, -2)
    return ratios.mean(tuple(range(1, ratios.ndim)))


def _mixtures_of(x: Array, before: Array | None, least: Array) -> _Mixture:
    """Of each number of components, the better from some starts; as :func:`_mixture_of`."""
    is_used = jnp.arange(max(COMPONENTS)) < jnp.asarray(COMPONENTS)[:, None]
    starts = jnp.arange(NUM_STARTS) / NUM_STARTS

    def better(used: Array) -> _Mixture:
        fits, gained = jax.vmap(lambda start: _mixture_of(x, before, used, least, start))(starts)
        return jax.tree.map(lambda y: y[jnp.argmax(gained)], fits)

    return jax.vmap(better)(is_used)


def _mixture_of(x: Array, before: Array | None, used: Array, least: Array, offset: Array) -> tuple[_Mixture, Array]:
    """A mixture by EM, and its mean log likelihood, less a constant.

    :param x: ``(copies, owners, size)``.
    :param before: ``(copies, owners)``, their log density under the prior before; None if all copies count the same.
    :param used: ``(components,)``, whether there is such a component.
    :param least: variance of a component in every direction.
    :param offset: from 0 to 1, of the values that means start at, which are evenly spaced.
    """
    (copies, owners, size), number = x.shape, len(used)
    spread = jnp.arange(number) * SPREAD % number  # of which the first two are far apart, and the first four
    eye = jnp.eye(size, dtype=x.dtype)
    start = _Mixture(
        jnp.where(used, -jnp.log(used.sum()), -jnp.inf),
        x.reshape(-1, size)[((spread + offset) / number * (copies * owners)).astype(int)],
        jnp.tile(2 * eye, (number, 1, 1)),
    )

    def improve(mixture: _Mixture, _: None) -> tuple[_Mixture, Array]:
        log_probs = mixture.log_probs(x)
        total = logsumexp(log_probs, -1)
        ratios = total if before is None else total - before
        of_copies = jnp.full_like(ratios, 1 / copies) if before is None else jax.nn.softmax(ratios, 0)
        shares = jnp.exp(log_probs - total[..., None]) * of_copies[..., None]
        count = shares.sum((0, 1))
        means = jnp.einsum("cnk,cni->ki", shares, x, precision="highest") / jnp.maximum(count, 1e-6)[:, None]
        centered = x[:, :, None] - means
        squares = jnp.einsum("cnk,cnki,cnkj->kij", shares, centered, centered)
        covariances = (squares + PRIOR * PRIOR_VARIANCE * eye) / (count + PRIOR)[:, None, None] + least * eye
        roots = jnp.swapaxes(jnp.linalg.inv(jnp.linalg.cholesky(covariances)), 1, 2)
        gained = ratios.mean() if before is None else logsumexp(ratios, 0).mean()
        return _Mixture(jnp.log(count / owners), means, roots), gained

    mixture, gained = lax.scan(improve, start, None, NUM_EM)
    return mixture, gained[-1]


def _least_variance(x: Array) -> Array:
    """Of a component in every direction, where the values have 1: the gaps between neighbors, of which rounded data have few."""
    return jnp.maximum(_gaps(x).max() ** 2, LEAST_VARIANCE)


def _gaps(x: Array) -> Array:
    """By element, the median difference of values next to each other, in its standard deviations."""
    gaps = jnp.diff(jnp.sort(x, 0), axis=0)
    positive = jnp.sort(jnp.where(gaps > 0, gaps, jnp.inf), 0)
    middle = jnp.minimum((gaps > 0).sum(0, keepdims=True) // 2, len(gaps) - 1)
    median = jnp.take_along_axis(positive, middle, 0)[0]
    return jnp.where(jnp.isfinite(median), median / x.std(0), 0)
