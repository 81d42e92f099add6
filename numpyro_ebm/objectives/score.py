# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Score-matching objectives: what is minimized so that a score fits that of the data, whatever the normalizer.

With the score :math:`s = \nabla_v \log p` of the model and :math:`s_*` that of the data, the Fisher divergence

.. math:: \tfrac12 E \|s(v) - s_*(v)\|^2 = E[\tfrac12 \|s(v)\|^2 + \mathrm{tr} \, \nabla s(v)] + \tfrac12 E \|s_*(v)\|^2

needs only samples of the data (Hyvärinen). An objective does not know the model: it is given ``score_fn``, which maps a batch of
visibles, of shape ``(batch,) + event_shape``, to their scores, row by row. Parameters are what ``score_fn`` closes over, and
every loss is differentiable in them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_ebm._checks import require_bool, require_count, require_nonnegative, require_one_of, require_positive

ScoreFn = Callable[[Array], Array]

NOISE = "it is the standard deviation of the noise"


class ObjectiveKeys(NamedTuple):
    """Who uses which randomness where an objective is taken at the score of a model."""

    #: of :meth:`ScoreObjective.perturb`
    noise: Array
    #: of :meth:`ScoreObjective.loss`
    loss: Array
    #: of the latents that the score is made of, where the model has them
    draw: Array


def objective_keys(rng_key: Array) -> ObjectiveKeys:
    """The keys of one evaluation of an objective: with the same key all engines see the same noise and directions."""
    return ObjectiveKeys(*jax.random.split(rng_key, 3))


class ScoreObjective(ABC):
    """What the score-based engines minimize: a custom objective defines ``_loss``, and overrides more where it differs.

    Objectives are frozen dataclasses: hashable, and compared by value.

    .. doctest::

        >>> from dataclasses import dataclass
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm.objectives import ScoreObjective
        >>> @dataclass(frozen=True)
        ... class RobustDenoising(ScoreObjective):  # absolute errors, not squared
        ...     sigma: float
        ...
        ...     def perturb(self, rng_key, v):
        ...         noise = self.sigma * jax.random.normal(rng_key, v.shape)
        ...         return super().perturb(rng_key, v) + noise
        ...
        ...     def _loss(self, score_fn, rng_key, v, v_tilde):
        ...         return jnp.abs(score_fn(v_tilde) + (v_tilde - v) / self.sigma**2).sum(-1)
        >>> v = jnp.zeros((1, 2))
        >>> RobustDenoising(0.5).loss(lambda v: -v, jax.random.key(0), v, v + 1)
        Array([6.], dtype=float32)
    """

    #: whether :meth:`loss` takes derivatives of the score in the visible
    differentiates_score: ClassVar[bool] = False
    #: whether the loss of a row is of pairs with others, so that a batch must not have a row twice
    compares_rows: ClassVar[bool] = False
    #: the smallest batch that has a loss
    min_batch_size: ClassVar[int] = 1

    @abstractmethod
    def _loss(self, score_fn: ScoreFn, rng_key: Array, v: Array, v_tilde: Array) -> Array:
        """The loss of every row, of arguments that :meth:`loss` has checked."""

    def loss(self, score_fn: ScoreFn, rng_key: Array, v: Array, v_tilde: Array) -> Array:
        """The loss of every row of a batch.

        :param score_fn: scores of a batch, ``(batch,) + event_shape`` to the same, rows independent.
        :param rng_key: a key of :func:`jax.random.key`.
        :param v: visibles, of shape ``(batch,) + event_shape``.
        :param v_tilde: the same rows as :meth:`perturb` gave them; the score is taken here.
        :return: losses, of shape ``(batch,)``.
        :raises ValueError: if the shapes of ``v``, ``v_tilde`` and the scores differ, or the batch is too small.
        """
        self._check_rows(v)
        if v_tilde.shape != v.shape:
            raise ValueError(f"v_tilde has shape {v_tilde.shape} and v {v.shape}: it must be v as perturb(rng_key, v) gave it.")
        return self._loss(_checked(score_fn), rng_key, v, v_tilde)

    def perturb(self, rng_key: Array, v: Array) -> Array:
        """The visibles at which the score is taken, of the shape of ``v``; ``v`` itself where the objective adds no noise.

        :param rng_key: a key of :func:`jax.random.key`.
        :param v: visibles, of shape ``(batch,) + event_shape``.
        :raises ValueError: if these are no rows of real numbers, or the batch is too small.
        """
        self._check_rows(v)
        return v

    def _check_rows(self, v: Array) -> None:
        """Refuses what has no loss: no rows of real numbers, or too few of them."""
        require_rows(v, self.min_batch_size)

    def refuse_data(self, v: Array) -> None:  # noqa: B027
        """Raises for rows, whose values are known, that have no loss: what a fit asks for where it has failed.

        :raises ValueError: with the cause.
        """

    def weight(self, batch_size: int) -> Array:
        """By row, of shape ``(batch_size,)``, what a guide's loss is multiplied by when it is learned together with this
        objective.
        """
        return jnp.ones(batch_size)


@dataclass(frozen=True)
class ExactScoreMatching(ScoreObjective):
    r"""Score matching with the exact trace, :math:`\tfrac12 \|s(v)\|^2 + \mathrm{tr} \, \nabla s(v)`.

    The trace costs one derivative of the score per coordinate of the event: for small dimension, and for reference.

    The score must have a derivative everywhere. A kink, as of :math:`|v|` or a network of ReLUs, has all of its curvature in one
    point, which no datum meets: what is learned then is wrong and nothing tells. Smooth it, or take a denoising objective.

    The objective has no minimum over all densities on finitely many rows: spikes at the data lower it without bound. A flexible
    energy finds them on a few hundred rows, or on rounded values, and the engines warn. More rows, an end of the training by
    ``run(..., validation=rows, patience=...)``, ``noise_scale`` and ``curvature_penalty`` are the cures, and
    :class:`DenoisingScoreMatching`.

    :param float noise_scale: standard deviation of noise that is added to the rows, anew in every step: what is learned is the
        density of the data with that noise.
    :param float curvature_penalty: what the sum :math:`\sum_i (\partial_i s_i(v))^2` of squared second derivatives is multiplied
        by and added (Kingma and LeCun 2010). On a normal distribution of independent coordinates it does what noise of twice its
        size as variance does.
    :raises ValueError: if one of them is negative or not finite.

    **References**

    1. Hyvärinen, *Estimation of non-normalized statistical models by score matching*, JMLR 6 (2005).
    2. Kingma and LeCun, *Regularized estimation of image statistics by score matching*, NIPS 2010.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import ExactScoreMatching
        >>> v = jnp.array([[0.0, 1.0], [2.0, 0.0]])
        >>> score = lambda v: -v  # of the standard normal, whose loss is |v|^2 / 2 - 2
        >>> ExactScoreMatching().loss(score, jax.random.key(0), v, v)
        Array([-1.5,  0. ], dtype=float32)
    """

    noise_scale: float = 0.0
    curvature_penalty: float = 0.0
    differentiates_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_regularization(self)

    def perturb(self, rng_key: Array, v: Array) -> Array:
        return _with_noise(super().perturb(rng_key, v), rng_key, self.noise_scale)

    def _loss(self, score_fn: ScoreFn, rng_key: Array, v: Array, v_tilde: Array) -> Array:
        if self.curvature_penalty:
            score, (trace, squares) = _score_and_sums(score_fn, v_tilde, lambda slope: jnp.stack([slope, slope**2]))
            return _half_square(score) + trace + self.curvature_penalty * squares
        score, trace = _score_and_sums(score_fn, v_tilde, lambda slope: slope)
        return _half_square(score) + trace


@dataclass(frozen=True)
class SlicedScoreMatching(ScoreObjective):
    r"""Sliced score matching, with :math:`E[u u^T] = I`: :math:`\tfrac12 (u^T s(v))^2 + u^T \nabla s(v) \, u`.

    The variance-reduced form replaces the first term by its mean, :math:`\tfrac12 \|s(v)\|^2`. Over the directions both have
    the expectation of :class:`ExactScoreMatching`. The variance of :math:`u^T \nabla s \, u` with :math:`H = \nabla s` is
    :math:`2 \sum_{i \neq j} H_{ij}^2` for Rademacher directions and :math:`2 \|H\|_F^2` for Gaussian ones.

    The derivative along ``u`` is taken forward over the score, which is itself a reverse-mode gradient as a rule. On an RBM's
    free energy and an MLP that compiles to the operations of two reverse passes, and the score comes with it.

    :param int num_projections: directions per row, over which the loss is averaged.
    :param str directions: ``"rademacher"`` or ``"normal"``.
    :param bool variance_reduced: whether to use the variance-reduced form.
    :param float noise_scale: as for :class:`ExactScoreMatching`, whose weakness on few and on rounded rows this shares.
    :param float curvature_penalty: what the mean of :math:`\|\nabla s(v) \, u\|^2` is multiplied by and added: the sum of all
        squared second derivatives, those of two coordinates included, which :class:`ExactScoreMatching` leaves out.
    :raises ValueError: if ``num_projections`` is not a positive integer, ``directions`` is neither, or one of the last two is
        negative or not finite.

    **References**

    1. Song, Garg, Shi and Ermon, *Sliced score matching: a scalable approach to density and score estimation*, UAI 2019,
       arXiv:1905.07088.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import SlicedScoreMatching
        >>> v = jnp.array([[0.0, 1.0], [2.0, 0.0]])
        >>> score = lambda v: -v  # its derivative is diagonal, so that slices are exact
        >>> SlicedScoreMatching().loss(score, jax.random.key(0), v, v)
        Array([-1.5,  0. ], dtype=float32)
    """

    num_projections: int = 1
    directions: str = "rademacher"
    variance_reduced: bool = True
    noise_scale: float = 0.0
    curvature_penalty: float = 0.0
    differentiates_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        count = require_count("num_projections", self.num_projections, why="1 direction per row is enough to learn")
        object.__setattr__(self, "num_projections", count)
        require_one_of("directions", self.directions, tuple(_DIRECTIONS))
        object.__setattr__(self, "variance_reduced", require_bool("variance_reduced", self.variance_reduced))
        _check_regularization(self)

    def perturb(self, rng_key: Array, v: Array) -> Array:
        return _with_noise(super().perturb(rng_key, v), rng_key, self.noise_scale)

    def _loss(self, score_fn: ScoreFn, rng_key: Array, v: Array, v_tilde: Array) -> Array:
        u = _DIRECTIONS[self.directions](rng_key, (self.num_projections, *v.shape), v_tilde.dtype)
        # One direction after the other along a score that is linearized once. A vmap over them, of one alone too, sets a second
        # mapped axis beside that of the rows, and XLA on the CPU then copies and transposes every layer between its products:
        # 1.5 times the cost for one direction, about twice for several. XLA unrolls the loop over one.
        score, push = jax.linearize(score_fn, v_tilde)

        def of(u: Array) -> tuple[Array, Array]:
            pushed = push(u)
            curvature = _sum_event(u * pushed)
            if self.curvature_penalty:
                curvature += self.curvature_penalty * _sum_event(pushed**2)
            return _sum_event(u * score), curvature

        along, curvature = lax.map(of, u)
        if self.variance_reduced:
            return _half_square(score) + curvature.mean(0)
        return (along**2 / 2 + curvature).mean(0)


@dataclass(frozen=True)
class DenoisingScoreMatching(ScoreObjective):
    r"""Denoising score matching, :math:`\tfrac12 \|s(\tilde v) + (\tilde v - v) / \sigma^2\|^2` at
    :math:`\tilde v = v + \sigma \epsilon`.

    Its optimum is the score of the data with noise added, not that of the data.

    :param float sigma: standard deviation of the noise.
    :raises ValueError: if ``sigma`` is not a positive finite number.

    **References**

    1. Vincent, *A connection between score matching and denoising autoencoders*, Neural Computation 23 (2011).

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import DenoisingScoreMatching
        >>> v, v_tilde = jnp.zeros((1, 2)), jnp.array([[0.5, 0.0]])
        >>> DenoisingScoreMatching(sigma=0.5).loss(lambda v: -v, jax.random.key(0), v, v_tilde)
        Array([1.125], dtype=float32)
    """

    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", require_positive("sigma", self.sigma, NOISE))

    def perturb(self, rng_key: Array, v: Array) -> Array:
        return super().perturb(rng_key, v) + self.sigma * jax.random.normal(rng_key, v.shape, v.dtype)

    def _loss(self, score_fn: ScoreFn, rng_key: Array, v: Array, v_tilde: Array) -> Array:
        return _half_square(score_fn(v_tilde) + (v_tilde - v) / self.sigma**2)


@dataclass(frozen=True)
class MultiscaleDenoisingScoreMatching(ScoreObjective):
    r"""Denoising at a spread of noise levels with one target,
    :math:`\tfrac12 \|s(\tilde v_i) / \sigma_i + (\tilde v_i - v_i) / (\sigma_i \sigma_0^2)\|^2`,
    :math:`\tilde v_i = v_i + \sigma_i \epsilon_i`.

    The score, which does not depend on the noise level, learns that of the data smoothed by ``sigma0``, at points near the data
    and far away, where the level of a row's noise can be told from the row, as in images. In a few dimensions it cannot, and the
    score is then that of no smoothed density unless the mean of :math:`\sigma_i^{-2}` is :math:`\sigma_0^{-2}`: take
    :class:`DenoisingScoreMatching` there. The report of a fit tells by how much the levels miss a Gaussian of the data. The level
    of a row is fixed by its place in the batch, from ``sigma_begin`` in the first row to ``sigma_end`` in the last: a stratified
    draw as long as the rows are shuffled, so do not sort them.

    :param float sigma0: the smoothing that the score learns.
    :param float sigma_begin: standard deviation of the noise on the first row.
    :param float sigma_end: standard deviation of the noise on the last row.
    :param str spacing: ``"geometric"`` or ``"linear"`` between them.
    :raises ValueError: if a standard deviation is not a positive finite number or ``spacing`` is neither; where it is used,
        for a batch of one row, which has no spread.

    **References**

    1. Li, Chen and Sommer, *Learning energy-based models in high-dimensional spaces with multi-scale denoising score
       matching*, 2019, arXiv:1910.07762.
    2. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020,
       arXiv:2010.07856: the levels by place in the batch.

    .. doctest::

        >>> from numpyro_ebm import MultiscaleDenoisingScoreMatching
        >>> objective = MultiscaleDenoisingScoreMatching(
        ...     sigma0=0.1, sigma_begin=0.05, sigma_end=0.2
        ... )
        >>> objective.weight(3)  # 1 / sigma
        Array([20., 10.,  5.], dtype=float32)
    """

    sigma0: float
    sigma_begin: float
    sigma_end: float
    spacing: str = "geometric"
    min_batch_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma0", require_positive("sigma0", self.sigma0, NOISE))
        object.__setattr__(self, "sigma_begin", require_positive("sigma_begin", self.sigma_begin, NOISE))
        object.__setattr__(self, "sigma_end", require_positive("sigma_end", self.sigma_end, NOISE))
        require_one_of("spacing", self.spacing, tuple(_SPACINGS))

    def perturb(self, rng_key: Array, v: Array) -> Array:
        return super().perturb(rng_key, v) + self._sigmas_like(v) * jax.random.normal(rng_key, v.shape, v.dtype)

    def _loss(self, score_fn: ScoreFn, rng_key: Array, v: Array, v_tilde: Array) -> Array:
        return _half_square((score_fn(v_tilde) + (v_tilde - v) / self.sigma0**2) / self._sigmas_like(v))

    def weight(self, batch_size: int) -> Array:
        return jnp.asarray(1 / self._sigmas(batch_size))

    def _sigmas(self, batch_size: int) -> np.ndarray:
        _require_spread(batch_size, self.min_batch_size)
        return _SPACINGS[self.spacing](self.sigma_begin, self.sigma_end, batch_size)

    def _sigmas_like(self, v: Array) -> Array:
        """The level of every row, of shape ``(batch, 1, ..., 1)``."""
        return jnp.asarray(self._sigmas(len(v)), v.dtype).reshape(-1, *[1] * (v.ndim - 1))


_DIRECTIONS: dict[str, Callable[..., Array]] = {"rademacher": jax.random.rademacher, "normal": jax.random.normal}
_SPACINGS: dict[str, Callable[..., Any]] = {"geometric": np.geomspace, "linear": np.linspace}


def _score_and_sums(score_fn: ScoreFn, x: Array, of_slope: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Scores of a batch, and sums over the coordinates of what is made of the diagonals of their Jacobians, ``(batch,)`` each:
    the trace of the diagonal itself. By forward mode along every coordinate.
    """
    # Rows are independent, so one tangent serves all rows. The score is linearized once and the coordinates are gone through
    # one by one: memory does not grow with the dimension, where vmap would hold all columns of the Jacobians. The checkpoint
    # keeps it so when the loss is differentiated in the parameters.
    score, push = jax.linearize(score_fn, x)
    shape, size = x.shape, math.prod(x.shape[1:])

    @jax.checkpoint
    def add(sums: Array, i: Array) -> tuple[Array, None]:
        direction = jnp.zeros(size, x.dtype).at[i].set(1).reshape(shape[1:])
        column = push(jnp.broadcast_to(direction, shape))
        return sums + of_slope(column.reshape(len(x), size)[:, i]), None

    start = jax.tree.map(jnp.zeros_like, of_slope(jnp.zeros(len(x), x.dtype)))
    sums, _ = lax.scan(add, start, jnp.arange(size))
    return score, sums


def _check_regularization(objective: Any) -> None:
    for name in ("noise_scale", "curvature_penalty"):
        object.__setattr__(objective, name, require_nonnegative(name, getattr(objective, name)))


def _with_noise(v: Array, rng_key: Array, scale: float) -> Array:
    """Rows with noise; they themselves where there is none."""
    return v + scale * jax.random.normal(rng_key, v.shape, v.dtype) if scale else v


def _checked(score_fn: ScoreFn) -> ScoreFn:
    """A score that must have the shape of the visible: another one would be broadcast, silently."""

    def score(x: Array) -> Array:
        value = score_fn(x)
        if jnp.shape(value) != x.shape:
            raise ValueError(
                f"score_fn returned shape {jnp.shape(value)} for visibles of shape {x.shape}: it must return d log p / d v, one "
                "number per coordinate. Differentiate the sum over rows of the log density in v."
            )
        return value

    return score


def require_rows(v: Array, min_batch_size: int = 1) -> None:
    """Refuses what has no scores.

    :raises ValueError: with the shape and dtype, or the number of rows.
    """
    if v.ndim == 0 or not jnp.issubdtype(v.dtype, jnp.floating):
        raise ValueError(
            f"a visible must be a floating array of shape (batch,) + event_shape, got {v.dtype} of shape {v.shape}: a score "
            "needs continuous rows. Convert counts and bytes, and add the batch axis in front."
        )
    _require_spread(len(v), min_batch_size)


def _require_spread(batch_size: int, min_batch_size: int) -> None:
    if batch_size < min_batch_size:
        fix = "Use a larger batch, or DenoisingScoreMatching with one level." if batch_size else "Give at least one row."
        raise ValueError(f"a batch of {batch_size}: the spread of noise levels or the mean over rows needs {min_batch_size}. {fix}")


def _half_square(x: Array) -> Array:
    """Half the squared norm of every row."""
    return _sum_event(x**2) / 2


def _sum_event(x: Array) -> Array:
    return x.sum(tuple(range(1, x.ndim)))
