# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""The kernelized Stein discrepancy (KSD) of samples from a model known by its score: an objective, and a goodness-of-fit test.

For the score :math:`s = \nabla_v \log p` of a model and a positive definite kernel :math:`k`,

.. math:: u(v, v') = k \, s(v)^\top s(v') + s(v)^\top \nabla_{v'} k + s(v')^\top \nabla_v k + \mathrm{tr} \, \nabla_v \nabla_{v'} k

has mean zero under the model in either argument (Stein's identity). Its mean over two samples of the data is a squared distance
of their distribution from the model, in which no normalizer occurs. For a kernel of the squared distance alone,
:math:`k = \varphi(r^2)`, :math:`r^2 = \|v - v'\|^2`, and events of :math:`d` numbers,

.. math::

    u = \varphi \, s^\top s' - 2 \varphi' \, (s - s')^\top (v - v') - 2 d \, \varphi' - 4 r^2 \varphi''.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_ebm._checks import require_count, require_fraction, require_key, require_negative, require_one_of, require_positive
from numpyro_ebm.objectives.score import ScoreFn, ScoreObjective, require_rows


class RadialKernel(ABC):
    r"""A kernel :math:`k(v, v') = \varphi(\|v - v'\|^2)`; a custom one is a frozen dataclass with these two members."""

    @property
    @abstractmethod
    def length(self) -> float | None:
        """The distance over which the kernel falls; ``None`` for the median distance of the rows it is used on."""

    @abstractmethod
    def profile(self, r2: Array, length: Array | float) -> tuple[Array, Array, Array]:
        r""":math:`\varphi`, :math:`\varphi'` and :math:`\varphi''` at squared distances.

        :param r2: squared distances, of any shape.
        :param length: the length in use.
        :return: three arrays of the shape of ``r2``.
        """


def _require_length(name: str, value: Any) -> float | None:
    return None if value is None else require_positive(name, value, "or None, for the median distance of the rows")


@dataclass(frozen=True)
class RBFKernel(RadialKernel):
    r"""The Gaussian kernel :math:`\exp(-\|v - v'\|^2 / 2 b^2)`.

    :param float bandwidth: :math:`b`; if not given, the median distance of the rows in hand.
    :raises ValueError: if ``bandwidth`` is given and is not a positive finite number.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_ebm import RBFKernel
        >>> k, slope, curvature = RBFKernel(bandwidth=1.0).profile(jnp.zeros(()), 1.0)
        >>> print(k, slope, curvature)
        1.0 -0.5 0.25
    """

    bandwidth: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", _require_length("bandwidth", self.bandwidth))

    @property
    def length(self) -> float | None:
        return self.bandwidth

    def profile(self, r2: Array, length: Array | float) -> tuple[Array, Array, Array]:
        rate = 1 / (2 * length**2)
        k = jnp.exp(-rate * r2)
        return k, -rate * k, rate**2 * k


@dataclass(frozen=True)
class IMQKernel(RadialKernel):
    r"""The inverse multiquadric kernel :math:`(1 + \|v - v'\|^2 / c^2)^\beta`.

    Its tails are heavy. With an exponent in :math:`(-1, 0)`, and for a model whose log density is strongly concave far out, a
    discrepancy that goes to zero means convergence in distribution, which that of an RBF kernel does not from three dimensions on.

    :param float scale: :math:`c`; if not given, the median distance of the rows in hand.
    :param float exponent: :math:`\beta`, negative.
    :raises ValueError: if ``scale`` is given and is not a positive finite number, or ``exponent`` is not a negative finite number.

    **References**

    1. Gorham and Mackey, *Measuring sample quality with kernels*, ICML 2017, arXiv:1703.01717, theorems 6 and 8.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_ebm import IMQKernel
        >>> k, slope, curvature = IMQKernel(scale=1.0).profile(jnp.zeros(()), 1.0)
        >>> print(k, slope, curvature)
        1.0 -0.5 0.75
    """

    scale: float | None = None
    exponent: float = -0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _require_length("scale", self.scale))
        object.__setattr__(self, "exponent", require_negative("exponent", self.exponent, "-0.5 is usual"))

    @property
    def length(self) -> float | None:
        return self.scale

    def profile(self, r2: Array, length: Array | float) -> tuple[Array, Array, Array]:
        base, beta = 1 + r2 / length**2, self.exponent
        k = base**beta
        slope = beta * k / (base * length**2)
        return k, slope, (beta - 1) * slope / (base * length**2)


@dataclass(frozen=True)
class KernelSteinDiscrepancy(ScoreObjective):
    r"""The kernelized Stein discrepancy of the rows of a batch.

    ``pairs="all"``: the loss of row :math:`i` is the mean of :math:`u(v_i, v_j)` over the other rows (``statistic="U"``) or over
    all rows, itself among them (``"V"``). The mean over rows is the statistic. U is unbiased and may be negative; V is at least
    zero and larger, by a fraction of the mean of :math:`u(v, v)`.

    ``pairs="halves"``: row :math:`i` of the first half is paired with row :math:`i` of the second, and both have the loss of the
    pair. Unbiased too, with the cost of a pair per row, and much noisier. Of batches they are unbiased where no row is twice in
    one: ``batch_size`` of the engines draws rows without replacement for this objective.

    Where the score is an estimate with independent noise in every row, as that of latents drawn for it, pairs of two rows keep
    value and gradient unbiased: a product of independent estimates. On the diagonal an estimate is multiplied by itself. The
    value of V is then too large by :math:`k(v, v)` times the noise's variance over the batch size, and its gradient is biased
    unless the value and the gradient of a row's score come from independent samples. Prefer U with latents.

    The gradient in the parameters is the full one. Published code of VaGES differentiates the score of one row of each pair
    only, which over all ordered pairs is half of it: learning rates differ by that factor.

    A kernel without a length takes the median distance of the pairs in use, recomputed for every batch. Where half of them are
    equal that is 0, and the loss NaN.

    :param kernel: an :class:`RBFKernel` or :class:`IMQKernel`.
    :param str statistic: ``"U"`` or ``"V"``.
    :param str pairs: ``"all"`` or ``"halves"``.
    :raises ValueError: if a name is unknown, or ``"V"`` is asked of ``"halves"``; where it is used, for a batch of one row, and
        for halves of an odd batch.

    **References**

    1. Liu, Lee and Jordan, *A kernelized Stein discrepancy for goodness-of-fit tests*, ICML 2016, arXiv:1602.03253.
    2. Chwialkowski, Strathmann and Gretton, *A kernel test of goodness of fit*, ICML 2016, arXiv:1602.02964.
    3. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
       arXiv:2010.08258: the halves.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> from numpyro.distributions import constraints
        >>> from numpyro_ebm import EnergyDistribution, ScoreMatching
        >>> from numpyro_ebm import KernelSteinDiscrepancy, RBFKernel
        >>> def model(v):
        ...     precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("data", len(v)):
        ...         numpyro.sample(
        ...             "v", EnergyDistribution(lambda v: precision * v**2 / 2), obs=v
        ...         )
        >>> v = jax.random.normal(jax.random.key(0), (400,)) / 2
        >>> engine = ScoreMatching(
        ...     model, optax.adam(0.05), KernelSteinDiscrepancy(RBFKernel(bandwidth=1.0))
        ... )
        >>> result = engine.run(jax.random.key(1), 500, v, progress_bar=False)
        >>> print(f"learned {result.params['precision']:.1f}, true 4")
        learned 4.3, true 4
    """

    kernel: RadialKernel = RBFKernel()
    statistic: str = "U"
    pairs: str = "all"
    compares_rows: ClassVar[bool] = True
    min_batch_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _require_kernel(self.kernel)
        require_one_of("statistic", self.statistic, ("U", "V"))
        require_one_of("pairs", self.pairs, ("all", "halves"))
        if (self.statistic, self.pairs) == ("V", "halves"):
            raise ValueError(
                "statistic='V' has every row paired with itself, which pairs='halves' never does: use pairs='all', or 'U'."
            )

    def _loss(self, score_fn: ScoreFn, rng_key: Array, v: Array, v_tilde: Array) -> Array:
        x, score = _flat(v_tilde), _flat(score_fn(v_tilde))
        if self.pairs == "halves":
            return jnp.tile(_stein_halves(self.kernel, x, score), 2)
        u, _ = stein_matrix(self.kernel, x, score)
        return u.mean(1) if self.statistic == "V" else _without_diagonal(u).sum(1) / (len(u) - 1)

    def refuse_data(self, v: Array) -> None:
        if self.kernel.length is None and len(np.unique(np.asarray(_flat(v)), axis=0)) < len(v):
            rows = _flat(v)
            if stein_matrix(self.kernel, rows, jnp.zeros_like(rows))[1] == 0:
                raise ValueError(
                    "half or more of the pairs of rows are equal, so that their median distance, the kernel's length, is 0: remove "
                    f"repeated rows, or give {type(self.kernel).__name__} a length."
                )

    def _check_rows(self, v: Array) -> None:
        require_rows(v)
        if len(v) < 2:
            raise ValueError(f"a batch of {len(v)} row: the discrepancy compares pairs of rows. Use a larger batch.")
        if self.pairs == "halves" and len(v) % 2:
            raise ValueError(f"a batch of {len(v)} rows has no two halves: use an even batch, or pairs='all'.")


class KSDTest(NamedTuple):
    """What :func:`~numpyro_ebm.ksd_test` found."""

    #: (), the U-statistic: unbiased, near 0 (or below) where the model fits
    statistic: Array
    #: (), the fraction of itself and the bootstrapped statistics that reaches it
    p_value: Array
    #: (), the V-statistic: at least 0
    v_statistic: Array
    #: (), the kernel's length in use
    length: Array
    #: (num_bootstrap,), the U-statistic as it may come out where the model fits
    bootstrap: Array


def ksd_test(
    rng_key: Array,
    v: Array,
    score: Array | ScoreFn,
    *,
    kernel: RadialKernel = IMQKernel(),
    num_bootstrap: int = 1000,
    change_probability: float = 0.5,
) -> KSDTest:
    r"""Tests whether samples come from the distribution that has a given score, by the kernelized Stein discrepancy.

    If they do, :math:`\frac{1}{n(n-1)} \sum_{i \neq j} w_i w_j u(v_i, v_j)` with random signs :math:`w` has asymptotically the
    distribution of the statistic, which has all :math:`w = 1` (wild bootstrap). The p-value is the fraction that reaches the
    statistic, itself counted: at least ``1 / (num_bootstrap + 1)``. With signs, U and V differ by the same constant, so that both
    have this p-value.

    The test remains valid if the score is an unbiased estimate with independent noise in every row. Given enough rows, it takes a
    biased estimate for a misfit.

    Samples of a Markov chain are correlated, and independent signs would reject too often. With ``change_probability`` below one
    half the signs are a chain too, which keeps its sign for ``1 / change_probability`` rows on average: take this
    well above the correlation length of the samples and well below their number, or thin them. Rows are then in order of time.

    The kernel matrix of all pairs is held: memory grows with the square of the number of rows.

    :param rng_key: a key of :func:`jax.random.key`, for the signs.
    :param v: samples, of shape ``(n,) + event_shape``.
    :param score: the model's scores at the samples, of the shape of ``v``, or a function that gives them.
    :param kernel: an :class:`~numpyro_ebm.RBFKernel` or :class:`~numpyro_ebm.IMQKernel`.
    :param int num_bootstrap: samples of the signs.
    :param float change_probability: probability that two neighboring rows have different signs; .5 is for independent rows.
    :return: a :class:`KSDTest`. Under ``jit`` and ``vmap`` values cannot be refused: the p-value is NaN where they are not finite.
    :raises ValueError: if there are fewer than two rows, a number is not finite, shapes differ, half of the pairs are equal
        and the kernel has no length of its own, or the statistic overflows.

    **References**

    1. Chwialkowski, Strathmann and Gretton, *A kernel test of goodness of fit*, ICML 2016, arXiv:1602.02964.
    2. Liu, Lee and Jordan, *A kernelized Stein discrepancy for goodness-of-fit tests*, ICML 2016, arXiv:1602.03253.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import ksd_test
        >>> v = jax.random.normal(jax.random.key(0), (300, 2))
        >>> key, normal, narrow = jax.random.key(1), lambda v: -v, lambda v: -2 * v
        >>> bool(ksd_test(key, v, normal).p_value > 0.05)  # a standard normal
        True
        >>> bool(ksd_test(key, v, narrow).p_value < 0.01)  # half the variance
        True
    """
    _require_kernel(kernel)
    num_bootstrap = require_count("num_bootstrap", num_bootstrap, why="1000 resolve a p-value of .01")
    change_probability = _require_change(change_probability)
    v = jnp.asarray(v)
    require_rows(v)
    if len(v) < 2:
        raise ValueError(f"{len(v)} sample: the discrepancy compares pairs of samples. A test with power needs some tens of them.")
    scores = jnp.asarray(score(v) if callable(score) else score)
    if scores.shape != v.shape:
        raise ValueError(f"score has shape {scores.shape} and v {v.shape}: it must be d log p / d v, one number per coordinate.")
    _require_finite(v=v, score=scores)
    result = _ksd_test(require_key("rng_key", rng_key), _flat(v), _flat(scores), change_probability, kernel, num_bootstrap)
    if not isinstance(result.length, jax.core.Tracer) and result.length == 0:
        raise ValueError(
            "half or more of the pairs of samples are equal, so that their median distance, the kernel's length, is 0: remove "
            f"repeated samples, or give {type(kernel).__name__} a length."
        )
    if not isinstance(result.p_value, jax.core.Tracer) and not np.isfinite(result.p_value):
        raise ValueError(
            f"the statistic is {result.statistic}: the kernel's length, {result.length:.3g}, is so small, or scores and distances "
            f"are so large, that it is lost in {v.dtype}. Take a length near the distances of samples, or scale the samples."
        )
    return result


@partial(jax.jit, static_argnames=("kernel", "num_bootstrap"))
def _ksd_test(
    rng_key: Array, v: Array, score: Array, change_probability: float, kernel: RadialKernel, num_bootstrap: int
) -> KSDTest:
    u, length = stein_matrix(kernel, v, score)
    n, off_diagonal = len(u), _without_diagonal(u)
    changes = jax.random.bernoulli(rng_key, change_probability, (num_bootstrap, n))
    signs = jnp.cumprod(jnp.where(changes, -1, 1).astype(jnp.int8), axis=1)
    signs = jnp.concatenate([jnp.ones_like(signs[:1]), signs]).astype(u.dtype)  # the first is the statistic's own
    sums = lax.map(lambda w: _dot(_dot(w, off_diagonal), w), signs, batch_size=256)
    statistics = sums / (n * (n - 1))
    p_value = jnp.where(jnp.isfinite(statistics[0]), (statistics >= statistics[0]).mean(dtype=u.dtype), jnp.nan)
    return KSDTest(statistics[0], p_value, u.mean(), length, statistics[1:])


def stein_matrix(kernel: RadialKernel, v: Array, score: Array) -> tuple[Array, Array]:
    """:math:`u(v_i, v_j)` for all pairs of rows, from Gram matrices: no array is larger than ``(n, n)`` or ``(n, d)``.

    :param kernel: a radial kernel.
    :param v: rows, of shape ``(n, d)``.
    :param score: their scores, of shape ``(n, d)``.
    :return: an array of shape ``(n, n)``, and the kernel's length in use.
    """
    n, dim = v.shape
    centered = v - v.mean(0)  # u knows differences of rows alone, and Gram matrices cancel less near the origin
    gram, cross = _dot(centered, centered.T), _dot(score, centered.T)
    r2 = _without_diagonal(jnp.maximum(_sums(jnp.diag(gram)) - 2 * gram, 0))
    contrast = _sums(jnp.diag(cross)) - cross - cross.T  # (s - s') . (v - v')
    length = _length(kernel, r2, skip=n)  # the smallest are the n zeros of the diagonal
    return _stein(kernel.profile(r2, length), r2, _dot(score, score.T), _without_diagonal(contrast), dim), length


def _stein_halves(kernel: RadialKernel, v: Array, score: Array) -> Array:
    """:math:`u` of row ``i`` of the first half and row ``i`` of the second, of shape ``(n / 2,)``."""
    (v, v_), (s, s_) = jnp.split(v, 2), jnp.split(score, 2)
    r2 = ((v - v_) ** 2).sum(1)
    length = _length(kernel, r2)
    return _stein(kernel.profile(r2, length), r2, (s * s_).sum(1), ((s - s_) * (v - v_)).sum(1), v.shape[1])


def _stein(profile: tuple[Array, Array, Array], r2: Array, product: Array, contrast: Array, dim: int) -> Array:
    """:math:`u` from what it needs of two rows: ``r2``, ``s . s'`` and ``(s - s') . (v - v')``."""
    k, dk, d2k = profile  # grad_v k = 2 dk (v - v') = -grad_v' k
    gradients = -2 * dk * contrast  # s . grad_v' k + s' . grad_v k
    trace = -2 * dim * dk - 4 * d2k * r2  # tr grad_v grad_v' k
    return k * product + gradients + trace


def _length(kernel: RadialKernel, r2: Array, skip: int = 0) -> Array:
    """The kernel's own length, or the median of the distances but for the ``skip`` smallest."""
    if kernel.length is not None:
        return jnp.asarray(kernel.length)
    last = r2.size - 1 + skip
    return (jnp.sqrt(_order_statistic(r2, last // 2)) + jnp.sqrt(_order_statistic(r2, last - last // 2))) / 2


def _order_statistic(x: Array, rank: int) -> Array:
    """The element of that rank, from 0, of an array of numbers of at least 0."""
    # Bisection on the bits, which are in the order of the numbers: a pass per bit. XLA's sort on the CPU costs five times more.
    # No gradient passes them: the median is a constant.
    whole = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, whole)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        reached = (bits <= middle).sum() > rank
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    low, _ = lax.fori_loop(0, jnp.iinfo(whole).bits, halve, (bits.min(), bits.max()))
    return lax.bitcast_convert_type(low, x.dtype)


def _sums(x: Array) -> Array:
    return x[:, None] + x[None]


def _dot(a: Array, b: Array) -> Array:
    # distances are differences of large numbers: an accelerator's short floats would lose those of close rows
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _without_diagonal(x: Array) -> Array:
    return jnp.where(jnp.eye(len(x), dtype=bool), 0, x)


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def _require_kernel(kernel: Any) -> None:
    if not isinstance(kernel, RadialKernel):
        raise TypeError(f"kernel must be a radial kernel such as IMQKernel() or RBFKernel(bandwidth=1.0), got {kernel!r}.")


def _require_change(probability: Any) -> float:
    why = "at most 0.5, which is for independent rows, less for a chain"
    if (value := require_fraction("change_probability", probability, why)) > 0.5:
        raise ValueError(f"change_probability must be {why}, got {probability!r}.")
    return value


def _require_finite(**arrays: Array) -> None:
    """Refuses numbers that are NaN or infinite; says nothing while they are traced."""
    for name, x in arrays.items():
        if not isinstance(x, jax.core.Tracer) and not np.isfinite(x).all():
            bad = int((~np.isfinite(np.asarray(_flat(x))).all(1)).sum())
            raise ValueError(f"{name}: {bad} of {len(x)} rows are NaN or infinite. Remove those samples, or fix the score.")
