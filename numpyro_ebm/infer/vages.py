# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Score matching of energy-based latent variable models by variational estimates of the score and of its gradient (VaGES).

.. math::

    s(v; \theta) = E_{p(h|v)}[\nabla_v f], \qquad
    \partial_\theta s = E_{p(h|v)}[\partial_\theta \nabla_v f] + \mathrm{Cov}_{p(h|v)}(\nabla_v f, \nabla_\theta f),
    \qquad f = \log \tilde p(v, h; \theta),

with samples of a guide for those of the posterior. Where bi-level score matching finds the covariance in the derivative of the
guide's optimum, here it is estimated directly: nothing is differentiated through the guide or its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer import TraceGraph_ELBO

from numpyro_ebm._checks import require_bool, require_count, require_instance, require_one_of, require_setting
from numpyro_ebm.evaluate.guide_weights import FRACTION, SHAPE, UNWEIGHTED
from numpyro_ebm.evaluate.report import Warned
from numpyro_ebm.infer.bilevel import BilevelEngine, Levels, Upper
from numpyro_ebm.objectives.latent import (
    Drawn,
    Draws,
    Latents,
    ScoreFn,
    draw,
    drawn_density,
    row_density,
    variational_score,
    weighted_score,
)
from numpyro_ebm.objectives.score import ScoreObjective, objective_keys
from numpyro_ebm.program.batch import Batch
from numpyro_ebm.program.sites import Model, is_unbounded, kind_of
from numpyro_ebm.weights import effective_sample_size, normalized_weights

COVARIANCES = ("unbiased", "biased", "none")
#: an effective sample size below which weights are those of one sample
DEGENERATE = 1.05
LACKS = "the gradient would lack that of the posterior. Take 2 or more."


class VaGESState(NamedTuple):
    """State of :class:`~numpyro_ebm.VaGES`."""

    #: values of the param sites of model and guide, constrained
    params: dict[str, Any]
    #: param sites of the model, unconstrained
    theta: dict[str, Any]
    #: param sites of the guide, unconstrained
    phi: dict[str, Any]
    #: of the model's optimizer
    optim_state: Any
    #: of the guide's optimizer
    guide_optim_state: Any
    #: key of the next step
    rng_key: Array
    #: (), int32, steps made
    num_steps: Array
    #: (), int32, steps that ``stable_update`` did not make
    num_skipped: Array
    #: (), of the samples in the last step, a mean over rows: L where they are not weighted
    effective_sample_size: Array
    #: :class:`~numpyro_ebm.infer.IterateAverage` of the iterates, where the engine averages
    average: Any = ()


Refine = Callable[[Array, Callable[[Latents], Array], Latents], Latents]


@dataclass(frozen=True)
class Variational:
    r"""An estimate of the score by samples of the guide, as published (Bao et al. 2021).

    L samples for each of three factors: the score itself, and the expectation and the covariance in its gradient. The bias of
    the gradient is bounded by the guide's divergence from the posterior, and does not fall with L.

    :param int num_samples: samples L for each factor.
    :param str covariance: ``"unbiased"``, ``"biased"`` (divided by L instead of L - 1) or ``"none"``, for comparison: the
        gradient then lacks what BiSM's lacks without unrolling.
    :param bool shared_samples: whether the covariance is over the samples of the expectation: 2 L samples in place of 3 L.
    :param bool variance_reduced: whether the score's value is the mean of :math:`\nabla_v \log(\tilde p / q)`, which has the
        same expectation and no variance where the guide is the posterior.
    :param bool relaxed: whether bits stay relaxed in the upper level, as in the paper; their covariance is too small then.
    :param refine: moves samples of the guide towards the posterior: ``refine(rng_key, log_prob, h)`` of a dictionary of latents
        with samples along axis 0, and of their log density, ``(num_draws,)``. With :func:`~numpyro_ebm.annealed_langevin`:
        ``functools.partial(annealed_langevin, step_size=5e-3, temperatures=np.full(5, 1e-6))`` is the paper's correction.
    :raises ValueError: for settings out of range, one sample with a covariance, samples shared with a covariance that is left
        out, or ``refine`` with ``variance_reduced``.
    """

    num_samples: int = 2
    covariance: str = "unbiased"
    shared_samples: bool = False
    variance_reduced: bool = False
    relaxed: bool = False
    refine: Refine | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_samples", require_count("num_samples", self.num_samples))
        object.__setattr__(self, "covariance", require_one_of("covariance", self.covariance, COVARIANCES))
        object.__setattr__(self, "shared_samples", require_bool("shared_samples", self.shared_samples))
        object.__setattr__(self, "variance_reduced", require_bool("variance_reduced", self.variance_reduced))
        object.__setattr__(self, "relaxed", require_bool("relaxed", self.relaxed))
        if self.refine is not None:
            require_instance("refine", self.refine, ("__call__",), "a function refine(rng_key, log_prob, h)")
        if self.num_samples == 1 and self.covariance != "none":
            raise ValueError(f"num_samples=1: a covariance needs two samples, and {LACKS}")
        if self.shared_samples and self.covariance == "none":
            raise ValueError("shared_samples=True shares samples with the covariance, which covariance='none' leaves out.")
        if self.variance_reduced and self.refine is not None:
            raise ValueError(
                "refine does not go with variance_reduced, which needs the density of the samples: that of moved samples is not "
                "known."
            )


@dataclass(frozen=True)
class ImportanceWeighted:
    r"""An estimate of the score by samples of the guide with weights :math:`\tilde p / q`, which is not in the paper.

    The weights of L samples are normalized by their sum, which makes value and gradient those of
    :math:`\log \tfrac1L \sum_i \tilde p(v, h_i) / q(h_i)` with the samples fixed. The bias is of order 1/L for *any* guide that
    covers the posterior. Bits are never relaxed here: the weights are of the distribution that samples are from.

    :param int num_samples: samples L, for all factors together.
    :param bool jackknife: whether the leading term of the bias is removed, by :math:`L J_L - (L - 1) \bar J_{L - 1}` over the
        means that leave out one sample, at the price of a higher variance.
    :raises ValueError: for settings out of range, or one sample.
    """

    num_samples: int = 10
    jackknife: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_samples", require_count("num_samples", self.num_samples))
        object.__setattr__(self, "jackknife", require_bool("jackknife", self.jackknife))
        if self.num_samples == 1:
            raise ValueError(f"num_samples=1: one sample has the weight 1 whatever it is, and {LACKS}")


class VaGES(BilevelEngine):
    r"""Score matching of a model with latents by variational (gradient) estimates of the score (Bao et al. 2021).

    One step on a batch of the visible: ``num_inner_steps`` steps of the guide, as in :class:`~numpyro_ebm.BiSM`; then one step of
    the model's, by the gradient of the objective at a score that is estimated from samples of the guide: as published,
    :class:`~numpyro_ebm.Variational`, or with weights, :class:`~numpyro_ebm.ImportanceWeighted`.

    For denoising objectives the published gradient is unbiased where the guide is the posterior, at every number L of samples
    from 2 on. The same holds for objectives that differentiate the score in the visible, and for the Stein discrepancy between
    different rows. The reported loss is the objective at the estimated score; the variance of the estimate, which falls as 1/L,
    is in it.

    Samples have no gradient: binary latents are sampled as bits in the upper level, though the guide relaxes them in the lower
    (:class:`~numpyro_ebm.GumbelBernoulli`), and memory does not grow with the number of inner steps.

    Model, guide, their plates and their optimizers are as for :class:`~numpyro_ebm.BiSM`.

    :param model: a NumPyro model.
    :param guide: a NumPyro guide with the latent sites of the model.
    :param optim: an optax transformation for the model, or an optimizer of :mod:`numpyro.optim`.
    :param guide_optim: the same for the guide.
    :param objective: a score objective, such as :class:`~numpyro_ebm.DenoisingScoreMatching` or
        :class:`~numpyro_ebm.KernelSteinDiscrepancy`.
    :param lower_loss: NumPyro's ``Trace_ELBO()``, or :class:`~numpyro_ebm.PosteriorFisher`.
    :param int num_inner_steps: steps K of the guide per step; 0 for a guide that is not learned.
    :param estimate: :class:`~numpyro_ebm.Variational` or :class:`~numpyro_ebm.ImportanceWeighted`.
    :param int batch_size: where no plate is subsampled, rows of the first argument in every step, drawn with replacement,
        or without where the objective compares rows; all of them, in order, if not given or if it is their number. Arguments
        with a row for each are refused beside it.
    :param average_iterates: whether the parameters that ``run`` and ``get_params`` return are an average of the iterates, weighed
        by about the cube of the step, instead of the last; or another power than 3. ``state.params`` is the last.
    :raises ValueError: for settings out of range; from ``init``, as for :class:`~numpyro_ebm.BiSM`.

    **References**

    1. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
       arXiv:2010.08258.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import DenoisingScoreMatching, VaGES
        >>> def model(v):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(v)):
        ...         h = numpyro.sample("h", dist.Normal(loc, 1))
        ...         numpyro.sample("v", dist.Normal(h, 1), obs=v)
        >>> def guide(v):
        ...     slope, shift = numpyro.param("slope", 0.0), numpyro.param("shift", 0.0)
        ...     with numpyro.plate("data", len(v)):
        ...         numpyro.sample("h", dist.Normal(slope * v + shift, jnp.sqrt(0.5)))
        >>> v = 2.9 + jnp.sqrt(2.0) * jax.random.normal(jax.random.key(0), (1000,))
        >>> engine = VaGES(
        ...     model, guide, optax.adam(0.01), optax.adam(0.01), DenoisingScoreMatching(0.3)
        ... )
        >>> result = engine.run(jax.random.key(1), 1500, v, progress_bar=False)
        >>> print(f"learned {result.params['loc']:.1f}, exact {v.mean():.1f}")
        learned 2.9, exact 2.9
    """

    state_class = VaGESState

    def __init__(
        self,
        model: Model,
        guide: Model,
        optim: Any,
        guide_optim: Any,
        objective: ScoreObjective,
        lower_loss: Any = None,
        num_inner_steps: int = 5,
        *,
        estimate: Variational | ImportanceWeighted = ImportanceWeighted(),
        batch_size: int | None = None,
        average_iterates: bool | float = False,
    ) -> None:
        super().__init__(model, guide, optim, guide_optim, objective, lower_loss, num_inner_steps, batch_size, average_iterates)
        self.estimate: Variational | ImportanceWeighted = require_setting("estimate", estimate, (Variational, ImportanceWeighted))
        if estimate.num_samples == 1 and getattr(self.objective, "differentiates_score", False):
            raise ValueError(f"num_samples=1: this objective differentiates the score, which has a covariance, and {LACKS}")

    def _first_state(self, **fields: Any) -> VaGESState:
        return VaGESState(**fields, effective_sample_size=_unweighted_size(self.estimate))

    def _levels(self, state: VaGESState, batch: Batch, kwargs: dict[str, Any]) -> "_Levels":
        return _Levels(self, state, batch, kwargs)

    def _require_draws(self, name: str, fn: Any) -> None:
        if self.num_inner_steps and not fn.has_rsample and not isinstance(self.lower_loss, TraceGraph_ELBO):
            raise ValueError(
                f"site '{name}': the guide draws it from {kind_of(fn)}, which is not reparametrized, and its steps differentiate "
                "through the draw. Use GumbelBernoulli for binary latents (they are drawn as bits in the upper level), or "
                "lower_loss=TraceGraph_ELBO()."
            )
        if isinstance(self.estimate, Variational) and self.estimate.refine is not None and not is_unbounded(fn.support):
            raise ValueError(
                f"site '{name}': refine moves latents freely, and {kind_of(fn)} has the support {fn.support}. Leave refine out, or "
                "sample a real latent and transform it with numpyro.deterministic."
            )

    def _warnings(self, state: VaGESState, before: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        if isinstance(self.estimate, Variational) or state.effective_sample_size >= DEGENERATE:
            return []
        text = (
            f"the importance weights have an effective sample size of less than {DEGENERATE} of {self.estimate.num_samples} "
            "samples: one sample has all the weight, so that the gradient lacks the posterior's covariance. Take a guide nearer to "
            "the posterior (more inner steps, a larger family), or more samples."
        )
        return [Warned(text, FRACTION, SHAPE)]

    def _wanted_of_guide(self) -> tuple[float, str]:
        if isinstance(self.estimate, Variational):
            biased = "the guide is far from the posterior, and estimate=Variational() is biased by that at every number of samples:"
            return UNWEIGHTED, f"{biased} estimate=ImportanceWeighted() is not."
        return 1 / (1 + self.estimate.num_samples), (
            "the guide is far from the posterior, and the bias of weighted samples large: take more of them, too."
        )

    def _upper(self, levels: "_Levels", theta: Any, phi: Any, guide_optim_state: Any, rng_key: Array) -> Upper:
        upper = partial(levels.upper, phi=phi, rng_key=rng_key)
        (value, size), gradient = jax.value_and_grad(upper, has_aux=True)(theta)
        # The estimate of the gradient is no derivative of that of the loss but where both are of the same weighted samples.
        value_fn = (lambda theta: upper(theta)[0]) if isinstance(self.estimate, ImportanceWeighted) else None
        return Upper(value, gradient, value_fn, {"effective_sample_size": size.astype(jnp.result_type(float))})

    def _batch_loss(self, state: VaGESState, batch: Batch, kwargs: dict[str, Any]) -> Array:
        return self._levels(state, batch, kwargs).upper(state.theta, state.phi, state.rng_key)[0]

    def _fix(self) -> str:
        if isinstance(self.estimate, ImportanceWeighted):
            return "take smaller learning rates; or, where all weights underflow, a guide that covers the posterior."
        return (
            "take smaller learning rates, or more inner steps for a guide that has lost the posterior. An objective that takes the "
            "score elsewhere than at v_tilde needs estimate=ImportanceWeighted(): samples of a guide are for those rows."
        )


def _unweighted_size(estimate: Variational | ImportanceWeighted) -> Array:
    return jnp.full((), estimate.num_samples, jnp.result_type(float))


class _Levels(Levels):
    """The lower level, and the objective at an estimated score."""

    def __init__(self, engine: VaGES, state: VaGESState, batch: Batch, kwargs: dict[str, Any]) -> None:
        super().__init__(engine, state, batch, kwargs)
        self.estimate = engine.estimate
        self.log_p = row_density(self.model, tuple(self.rest), kwargs, self.model_key, self.plate, self._of_theta)
        self.log_q = drawn_density(self.guide, tuple(self.rest), kwargs, self.plate)

    def upper(self, theta: Any, phi: Any, rng_key: Array) -> tuple[Array, Array]:
        """The objective, a mean over rows, and the effective sample size of the weights."""
        keys = objective_keys(rng_key)
        v_tilde = self.objective.perturb(keys.noise, self.v)

        def loss(score_fn: ScoreFn) -> Array:
            return self.objective.loss(score_fn, keys.loss, self.v, v_tilde).mean()

        estimate = self.estimate
        if isinstance(estimate, ImportanceWeighted):
            return self._weighted(estimate, loss, theta, self.phi_of(phi), v_tilde, keys.draw)
        settings: dict[str, Any] = {"covariance": estimate.covariance}
        if estimate.variance_reduced:
            q = self.phi_of(phi)
            settings["log_ratio"] = lambda theta, v, h: self.log_p(theta, v, h.latents) - self.log_q(q, v, h)
        draws = self._draws(estimate, theta, self.phi_of(phi), v_tilde, keys.draw)
        return loss(variational_score(self.log_p, theta, v_tilde, draws, **settings)), _unweighted_size(estimate)

    def _draws(self, estimate: Variational, theta: Any, phi: Any, v: Array, rng_key: Array) -> Draws:
        """All samples in one call, then split."""
        draw_key, refine_key = jax.random.split(rng_key)
        num_sets = 2 if estimate.shared_samples or estimate.covariance == "none" else 3
        size = estimate.num_samples
        drawn = self._draw(phi, v, draw_key, num_sets * size, relaxed=estimate.relaxed)
        h = drawn.latents
        if estimate.refine is not None:
            theta = jax.lax.stop_gradient(theta)
            h = estimate.refine(refine_key, lambda h: jax.vmap(lambda h: self.log_p(theta, v, h).sum())(h), h)
            h = jax.lax.stop_gradient(h)
        value, mean, covariance = (jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], h) for i in (0, 1, num_sets - 1))
        return Draws(Drawn(value, drawn.keys[:size]) if estimate.variance_reduced else value, mean, covariance)

    def _weighted(
        self, estimate: ImportanceWeighted, loss: Callable[[ScoreFn], Array], theta: Any, phi: Any, v: Array, rng_key: Array
    ) -> tuple[Array, Array]:
        num_samples = estimate.num_samples
        drawn = self._draw(phi, v, rng_key, num_samples)
        h, log_q = drawn.latents, jax.lax.stop_gradient(self._log_q_of(phi, v, drawn))

        def of(keep: Array | None) -> Array:
            return loss(weighted_score(self.log_p, theta, log_q, h, keep))

        if estimate.jackknife:  # in one map, out of which the scores of the samples are taken, once for all sets
            all_of_them = jnp.ones((1, num_samples), bool)
            values = jax.vmap(of)(jnp.concatenate([all_of_them, ~jnp.eye(num_samples, dtype=bool)]))
            value = num_samples * values[0] - (num_samples - 1) * values[1:].mean()
        else:
            value = of(None)
        log_p = jax.lax.stop_gradient(jax.vmap(lambda h: self.log_p(theta, v, h))(h))
        return value, effective_sample_size(normalized_weights(log_p - log_q)).mean()

    def _log_q_of(self, phi: Any, v: Array, drawn: Drawn) -> Array:
        """The guide's log density at its samples, row by row.

        :raises ValueError: for a guide that has none, as NumPyro's automatic guides of a joint latent.
        """
        try:
            return jax.vmap(lambda h: self.log_q(phi, v, h))(drawn)
        except ValueError as error:
            if f"plate '{self.plate}'" not in str(error):
                raise
            raise ValueError(
                "the guide draws the latents of all rows together, and weights are one for each row: write a guide whose latents "
                f"are in plate '{self.plate}' (AutoNormal is one), or take estimate=Variational()."
            ) from error

    def _draw(self, phi: Any, v: Array, rng_key: Array, num_samples: int, *, relaxed: bool = False) -> Drawn:
        return draw(self.guide, (v, *self.rest), self.kwargs, rng_key, num_samples, params=phi, relaxed=relaxed)
