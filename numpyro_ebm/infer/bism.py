# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Bi-level score matching (BiSM) of energy-based latent variable models.

With a guide :math:`q(h|v; \phi)` and :math:`w(v, h) = \log \tilde p(v, h; \theta) - \log q(h|v; \phi)`,

.. math::

    \min_\theta \; J(\theta, \phi^*(\theta)), \quad J = E_v E_{h \sim q} \, \mathrm{objective}(\nabla_v w(v, h))
    \qquad \text{s.t.} \quad \phi^*(\theta) = \arg\min_\phi G(\theta, \phi),

where :math:`G` is a divergence between guide and posterior. At :math:`\phi^*` the score :math:`\nabla_v w` is that of the
marginal of :math:`v`, for every :math:`h`. Its gradient in :math:`\theta` is not: it lacks the posterior's covariance, which
is in :math:`d \phi^* / d \theta`. That is found through steps of the lower level, or by the implicit function theorem.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, lax
from numpyro.infer import TraceGraph_ELBO

from numpyro_ebm._checks import require_bool, require_count, require_nonnegative, require_one_of, require_setting
from numpyro_ebm._conjugate_gradient import conjugate_gradient, square
from numpyro_ebm._map_over import map_over
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.evaluate.yardstick import LIKELIHOOD
from numpyro_ebm.infer.bilevel import BilevelEngine, Levels, Upper
from numpyro_ebm.infer.engine import compiled_method
from numpyro_ebm.objectives.guide import PosteriorFisher
from numpyro_ebm.objectives.latent import hard_bits
from numpyro_ebm.objectives.score import ScoreObjective, objective_keys
from numpyro_ebm.program.batch import Batch
from numpyro_ebm.program.rows import per_row
from numpyro_ebm.program.run import log_density_terms, own_key, run_model, total
from numpyro_ebm.program.sites import Model, kind_of

CURVATURES = ("auto", "hessian", "fisher")
# How far the guide's response may be from that of Implicit, relative to it, over so many batches; and how many of its standard
# errors that must be large for this to be told.
RESPONSE_ERROR, RESPONSE_BATCHES, RESPONSE_ERRORS = 0.25, 100, 2.0
RESPONSE = "relative error of the guide's response to the model"
WITHOUT_RESPONSE = (
    "the guide follows the model, and unrolled steps see little of that: the gradient lacks the posterior's covariance, and what "
    "is learned is biased however good the guide is. Take hypergradient=Implicit()"
)


class BiSMState(NamedTuple):
    """State of :class:`~numpyro_ebm.BiSM`."""

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
    #: :class:`~numpyro_ebm.infer.IterateAverage` of the iterates, where the engine averages
    average: Any = ()


@dataclass(frozen=True)
class Unrolled:
    r"""A hypergradient of :class:`~numpyro_ebm.BiSM`: through steps of the guide, as published (Bao et al. 2020, algorithm 1).

    :math:`d J(\theta, \phi_N(\theta)) / d \theta`, where :math:`\phi_N` is what N more steps of the guide make of its parameters,
    state of the optimizer included; they are forgotten afterwards. N = 0 is the truncated form: it lacks the posterior's
    covariance whatever the guide, and no number of inner steps replaces unrolling. A report always warns of N = 0, and of other N
    where these steps are far from what :class:`Implicit` has; ``run(..., report=False)`` is silent.

    :param int num_steps: steps N that are differentiated through; 0 for the truncated form.
    :param bool checkpoint: whether they are computed twice, to save their memory.
    :raises ValueError: for settings out of range.
    """

    num_steps: int = 5
    checkpoint: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", require_count("num_steps", self.num_steps, least=0))
        object.__setattr__(self, "checkpoint", require_bool("checkpoint", self.checkpoint))


@dataclass(frozen=True)
class Implicit:
    r"""A hypergradient of :class:`~numpyro_ebm.BiSM`: by the implicit function theorem, which is not in the paper.

    At :math:`\phi^*`, where :math:`\partial_\phi G = 0` (Lorraine et al. 2020),

    .. math:: dJ/d\theta = \partial_\theta J - \partial_\phi J \, (\partial^2_{\phi\phi} G)^{-1} \partial^2_{\phi\theta} G,

    by conjugate gradient on products with the curvature of the lower level, averaged over samples of its noise. It stops where
    these make the curvature negative.

    The curvature is the Hessian, or the guide's Fisher information, which is the same where the guide is the posterior and the
    lower level a Kullback-Leibler divergence. ``"auto"`` takes

    * the Fisher information where the model has discrete latents: never indefinite, and far less noisy for relaxed bits. The
      Hessian is useless there on few rows (on 5 the mean of many gradients is off by .68 of itself, for .05). The information is
      that of bits: samples for it are not relaxed;
    * the Hessian otherwise, since a guide need not reach the posterior: the information is then another matrix;
    * the Hessian with :class:`~numpyro_ebm.PosteriorFisher`, of which the information is not the curvature.

    It is the derivative of the guide's *optimum*: the guide has to be there, and to stay there as the model moves. A learning rate
    of ``guide_optim`` that decays to 0 before the model's does leaves the model without a direction: its schedule counts
    ``num_inner_steps`` for every step of the model.

    :param str curvature: ``"auto"``, ``"hessian"``, or ``"fisher"``, not with :class:`~numpyro_ebm.PosteriorFisher`.
    :param int num_cg_steps: steps of conjugate gradient at most.
    :param float damping: added to the curvature.
    :param float tol: the residual, relative to the right-hand side, at which the steps stop.
    :param int num_draws: samples of the lower level's noise over which its curvature is averaged, over the rows of the batch too;
        8 for the Hessian and 2 for the information if not given.
    :raises ValueError: for settings out of range.
    """

    curvature: str = "auto"
    num_cg_steps: int = 10
    damping: float = 1e-3
    tol: float = 0.1
    num_draws: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "curvature", require_one_of("curvature", self.curvature, CURVATURES))
        object.__setattr__(self, "num_cg_steps", require_count("num_cg_steps", self.num_cg_steps))
        object.__setattr__(self, "damping", require_nonnegative("damping", self.damping))
        object.__setattr__(self, "tol", require_nonnegative("tol", self.tol))
        if self.num_draws is not None:
            object.__setattr__(self, "num_draws", require_count("num_draws", self.num_draws))


class BiSM(BilevelEngine):
    r"""Bi-level score matching (Bao et al. 2020): score matching of a model with latents, used like NumPyro's ``SVI``.

    One step on a batch of the visible, the same rows throughout: ``num_inner_steps`` steps of the guide at the model's
    parameters; then one step of the model's, by the gradient of the objective through :math:`\phi`: through steps of the guide,
    :class:`~numpyro_ebm.Unrolled`, or by the implicit function theorem, :class:`~numpyro_ebm.Implicit`.

    Every step of the guide sees fresh noise. ``guide_optim`` counts its own steps: ``num_inner_steps`` of them per step.

    The first argument of model and guide is the visible, ``(rows,) + event_shape``. The latents lie in the plate of its rows, and
    the guide draws them reparametrized: :class:`~numpyro_ebm.GumbelBernoulli` where the model's are binary. The model is
    unnormalized: energies, or a random field of :class:`~numpyro_ebm.BaseMeasure` sites and a factor. Where the plate is
    subsampled, in the model and in the guide, both take the rows of a step as in :class:`~numpyro_ebm.ScoreMatching`.

    :param model: a NumPyro model.
    :param guide: a NumPyro guide with the latent sites of the model. An autoguide has params for every row of the data: it goes
        with all rows or a subsampled plate, and not with ``batch_size``.
    :param optim: an optax transformation for the model, or an optimizer of :mod:`numpyro.optim`.
    :param guide_optim: the same for the guide. Through unrolled steps it is differentiated: give ``optax.adam`` a small
        ``eps_root`` where a gradient can be exactly 0.
    :param objective: as for :class:`~numpyro_ebm.ScoreMatching`.
    :param lower_loss: NumPyro's ``Trace_ELBO()``, the Kullback-Leibler divergence up to a constant, or
        :class:`~numpyro_ebm.PosteriorFisher`.
    :param int num_inner_steps: steps K of the guide per step.
    :param hypergradient: :class:`~numpyro_ebm.Implicit`, or :class:`~numpyro_ebm.Unrolled`, the published form.
    :param int batch_size: where no plate is subsampled, rows of the first argument in every step, drawn with replacement,
        or without where the objective compares rows; all of them, in order, if not given or if it is their number. Arguments
        with a row for each are refused beside it.
    :param average_iterates: whether the parameters that ``run`` and ``get_params`` return are an average of the iterates, weighed
        by about the cube of the step, instead of the last; or another power than 3. ``state.params`` is the last.
    :raises ValueError: for settings out of range; from ``init``, naming the site and the fix, if the first argument does not
        reach exactly one continuous site, row by row, if a latent is missing from the guide, has another shape there, stands
        outside the plate of the rows, has another support or is drawn without reparametrization, or if model and guide share a
        param.

    **References**

    1. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020,
       arXiv:2010.07856, algorithm 1.
    2. Lorraine, Vicol and Duvenaud, *Optimizing millions of hyperparameters by implicit differentiation*, AISTATS 2020,
       arXiv:1911.02590.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import BiSM, DenoisingScoreMatching
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
        >>> engine = BiSM(
        ...     model, guide, optax.adam(0.01), optax.adam(0.01), DenoisingScoreMatching(0.3)
        ... )
        >>> result = engine.run(jax.random.key(1), 1500, v, progress_bar=False)
        >>> print(f"learned {result.params['loc']:.1f}, exact {v.mean():.1f}")
        learned 2.9, exact 2.9
    """

    state_class = BiSMState

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
        hypergradient: Unrolled | Implicit = Implicit(),
        batch_size: int | None = None,
        average_iterates: bool | float = False,
    ) -> None:
        super().__init__(model, guide, optim, guide_optim, objective, lower_loss, num_inner_steps, batch_size, average_iterates)
        self.hypergradient: Unrolled | Implicit = require_setting("hypergradient", hypergradient, (Unrolled, Implicit))
        is_fisher = isinstance(hypergradient, Implicit) and hypergradient.curvature == "fisher"
        if is_fisher and isinstance(self.lower_loss, PosteriorFisher):
            raise ValueError("curvature='fisher' is that of a Kullback-Leibler divergence: take 'hessian' with PosteriorFisher.")

    @property
    def _unrolls(self) -> bool:
        return isinstance(self.hypergradient, Unrolled) and self.hypergradient.num_steps > 0

    @property
    def _checkpoints(self) -> bool:
        return isinstance(self.hypergradient, Unrolled) and self.hypergradient.checkpoint

    def _first_state(self, **fields: Any) -> BiSMState:
        return BiSMState(**fields)

    def _levels(self, state: BiSMState, batch: Batch, kwargs: dict[str, Any]) -> "_Levels":
        return _Levels(self, state, batch, kwargs)

    def _require_draws(self, name: str, fn: Any) -> None:
        differentiated = self._unrolls or isinstance(self.hypergradient, Implicit)
        if not fn.has_rsample and (differentiated or not isinstance(self.lower_loss, TraceGraph_ELBO)):
            raise ValueError(
                f"site '{name}': the guide draws it from {kind_of(fn)}, which is not reparametrized, and BiSM "
                "differentiates through the draw. Use GumbelBernoulli for binary latents, or hypergradient=Unrolled(0) with "
                "lower_loss=TraceGraph_ELBO()."
            )

    def _upper(self, levels: "_Levels", theta: Any, phi: Any, guide_optim_state: Any, rng_key: Array) -> Upper:
        lower_key, upper_key = jax.random.split(rng_key)
        if isinstance(self.hypergradient, Implicit):
            return Upper(*_implicit(self.hypergradient, levels, theta, phi, lower_key, upper_key))
        keys = jax.random.split(lower_key, self.hypergradient.num_steps)

        def upper(theta: Any) -> Array:
            return levels.upper(theta, self._lower_steps(levels, theta, phi, guide_optim_state, keys)[0], upper_key)

        return Upper(*jax.value_and_grad(upper)(theta), upper)

    def _batch_loss(self, state: BiSMState, batch: Batch, kwargs: dict[str, Any]) -> Array:
        return self._levels(state, batch, kwargs).upper(state.theta, state.phi, state.rng_key)

    def _findings(
        self,
        rng_key: Array,
        state: BiSMState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        validation: tuple[Any, ...] | None = None,
    ) -> list[Finding]:
        found = super()._findings(rng_key, state, args, kwargs, validation)
        response = self._of_response(rng_key, state, args, kwargs)
        if not all(finding.is_well for finding in response):  # what is short of likelihood is so by the same cause
            found = [finding._replace(least=None) if finding.quantity == LIKELIHOOD else finding for finding in found]
        return [*found, *response]

    def _of_response(self, rng_key: Array, state: BiSMState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Finding]:
        if isinstance(self.hypergradient, Implicit):
            return []
        if not self.hypergradient.num_steps:
            return [Finding("", RESPONSE, 1.0, None, RESPONSE_ERROR, WITHOUT_RESPONSE)]
        missed, size, error = map(float, jax.device_get(self._response(state, rng_key, *args, **kwargs)))
        if not size > RESPONSE_ERRORS * error:
            why = f"in {RESPONSE_BATCHES} batches the response is {size:.2g}, with a standard error of {error:.2g}"
            return [not_told("", RESPONSE, why)]
        return [Finding("", RESPONSE, missed / size, None, RESPONSE_ERROR, WITHOUT_RESPONSE)]

    @partial(compiled_method, cheaply=True)
    def _response(self, state: BiSMState, rng_key: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array, Array]:
        """What :class:`Implicit` adds to the gradient for the guide's response to the model: how far from it is what unrolled steps
        add, how large it is, and its standard error.
        """

        def add(sums: Any, key: Array) -> tuple[Any, None]:
            batch_key, lower_key, upper_key = jax.random.split(key, 3)
            levels = self._levels(state, self._batch(batch_key, state.params, args, kwargs), kwargs)
            steps = jax.random.split(lower_key, self.hypergradient.num_steps)  # type: ignore[union-attr]

            def moved(theta: Any) -> Any:
                return self._lower_steps(levels, theta, state.phi, state.guide_optim_state, steps)[0]

            phi, pull = jax.vjp(moved, state.theta)
            direct, of_phi = jax.grad(levels.upper, (0, 1))(state.theta, phi, upper_key)
            _, whole = _implicit(Implicit(), levels, state.theta, phi, lower_key, upper_key)
            wanted = jax.tree.map(jnp.subtract, whole, direct)
            missed = jax.tree.map(jnp.subtract, wanted, pull(of_phi)[0])
            return jax.tree.map(jnp.add, sums, ((missed, square(missed)), (wanted, square(wanted)))), None

        nothing = jax.tree.map(jnp.zeros_like, state.theta), jnp.zeros(())
        (missed, missed_squares), (wanted, squares) = lax.scan(
            add, (nothing, nothing), jax.random.split(rng_key, RESPONSE_BATCHES)
        )[0]

        def unbiased(total: Any, squares: Array) -> Array:  # of the length of a mean, from pairs of different batches
            return (square(total) - squares) / (RESPONSE_BATCHES * (RESPONSE_BATCHES - 1))

        size, error = unbiased(wanted, squares), squares / RESPONSE_BATCHES**2
        return jnp.sqrt(jnp.maximum(unbiased(missed, missed_squares), 0)), jnp.sqrt(jnp.maximum(size, 0)), jnp.sqrt(error)

    def _fix(self) -> str:
        if self._unrolls:
            return (
                "take smaller learning rates; or, since the guide's optimizer is differentiated, give one whose derivative is "
                "finite where a gradient is 0, as optax.adam(..., eps_root=1e-16)."
            )
        return "take smaller learning rates, or more inner steps for a guide that has lost the posterior."


def _implicit(settings: Implicit, levels: "_Levels", theta: Any, phi: Any, lower_key: Array, upper_key: Array) -> tuple[Array, Any]:
    """The upper level and its derivative by the implicit function theorem."""
    value, (direct, of_phi) = jax.value_and_grad(levels.upper, (0, 1))(theta, phi, upper_key)
    is_fisher = levels.has_discrete and not isinstance(levels.lower_loss, PosteriorFisher)
    is_fisher = is_fisher if settings.curvature == "auto" else settings.curvature == "fisher"
    keys = jax.random.split(lower_key, settings.num_draws or (2 if is_fisher else 8))

    def lower(theta: Any, phi: Any) -> Array:
        return map_over(partial(levels.lower, theta, phi), keys).mean()

    lower_gradient = jax.grad(lower, 1)
    if is_fisher:
        product = levels.fisher_product(phi, keys)
    else:
        _, product = jax.linearize(partial(lower_gradient, theta), phi)

    def damped(x: Any) -> Any:
        return jax.tree.map(lambda a, b: a + settings.damping * b, product(x), x)

    x = conjugate_gradient(damped, of_phi, settings.num_cg_steps, settings.tol)
    _, transposed = jax.vjp(lambda theta: lower_gradient(theta, phi), theta)
    return value, jax.tree.map(jnp.subtract, direct, transposed(x)[0])


class _Levels(Levels):
    """The lower level with its curvature, and the upper level."""

    def fisher_product(self, phi: Any, keys: Array) -> Callable[[Any], Any]:
        """Products with the Fisher information of the guide, at one sample for every row and key."""
        weight = self.objective.weight(len(self.v)).astype(self.v.dtype)

        def log_q(phi: Any, key: Array) -> Array:
            v, draw_key = self.noisy(key)
            args, draw_key = (v, *self.rest), own_key(draw_key)  # the lower loss splits its key: these are other draws
            with hard_bits():  # relaxed at a temperature of t they have 1 - t of the variance
                h = run_model(self.guide, args, self.kwargs, draw_key, data=self.phi_of(phi)).drawn
            data = {**self.phi_of(phi), **lax.stop_gradient(h)}
            terms, program = log_density_terms(self.guide, args, self.kwargs, draw_key, data=data)
            return per_row(terms, program, self.plate)

        rows, slopes = jax.linearize(lambda phi: map_over(lambda key: log_q(phi, key), keys), phi)
        transposed = jax.linear_transpose(slopes, phi)
        return lambda x: transposed(weight * slopes(x) / rows.size)[0]

    def upper(self, theta: Any, phi: Any, rng_key: Array) -> Array:
        """The objective of the score of w(v, h), h a sample of the guide that does not move with v."""
        keys = objective_keys(rng_key)
        v_tilde = self.objective.perturb(keys.noise, self.v)
        model, guide = self.theta_of(theta), self.phi_of(phi)
        h = run_model(self.guide, (v_tilde, *self.rest), self.kwargs, keys.draw, data=guide).drawn

        def log_ratio(v: Array) -> Array:
            with numpyro.validation_enabled(False):
                log_p, _ = log_density_terms(self.model, (v, *self.rest), self.kwargs, self.model_key, data={**model, **h})
                # at the key of the draw: the density is then that of what the guide drew by itself, such as dropout
                log_q, _ = log_density_terms(self.guide, (v, *self.rest), self.kwargs, keys.draw, data={**guide, **h})
            return total(log_p) - total(log_q)

        return self.objective.loss(jax.grad(log_ratio), keys.loss, self.v, v_tilde).mean()
