# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Bi-level score matching (BiSM) of energy-based latent variable models.

With a guide :math:`q(h|v; \phi)` and :math:`w(v, h) = \log \tilde p(v, h; \theta) - \log q(h|v; \phi)`,

.. math::

    \min_\theta \; J\big(\theta, \phi^*(\theta)\big), \quad J = E_v E_{h \sim q} \, \mathrm{objective}\big(\nabla_v w(v, h)\big)
    \qquad \text{s.t.} \quad \phi^*(\theta) = \arg\min_\phi G(\theta, \phi),

where :math:`G` is a divergence between guide and posterior. At :math:`\phi^*` the score :math:`\nabla_v w` is that of the
marginal of :math:`v`, for every :math:`h`. Its gradient in :math:`\theta` is not: it lacks the posterior's covariance, which
is in :math:`d \phi^* / d \theta`. That is found through steps of the lower level, or by the implicit function theorem.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, lax
from jax.scipy.sparse.linalg import cg
from numpyro.handlers import scale
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoGuide

from numpyro_ebm._compat import layers
from numpyro_ebm.infer.engine import Health, as_transformation
from numpyro_ebm.infer.score_engine import (
    ScoreEngine,
    apply_gradient,
    finite_health,
    keep_if_healthy,
    require_natural,
    require_params,
    require_same_params,
)
from numpyro_ebm.objectives.posterior import PosteriorFisher
from numpyro_ebm.objectives.score import ScoreObjective
from numpyro_ebm.program import (
    Model,
    Program,
    constrain_params,
    log_density,
    log_density_terms,
    per_row,
    run_program,
    strong_types,
    unconstrain_params,
)
from numpyro_ebm.visible import Visible


class BiSMState(NamedTuple):
    """State of :class:`~numpyro_ebm.BiSM`."""

    #: values of the param sites of model and guide, constrained
    params: dict[str, Any]
    #: param sites of the model, unconstrained
    theta: dict[str, Any]
    #: param sites of the guide, unconstrained
    phi: dict[str, Any]
    #: of the model's optimiser
    optim_state: Any
    #: of the guide's optimiser
    guide_optim_state: Any
    #: key of the next step
    rng_key: Array
    #: (), int32, steps made
    num_steps: Array
    #: (), int32, steps that ``stable_update`` did not make
    num_skipped: Array


class BiSM(ScoreEngine):
    r"""Bi-level score matching (Bao et al. 2020): score matching of a model with latents, called like NumPyro's ``SVI``.

    One step on a batch of the visible, the same rows throughout: ``num_inner_steps`` steps of the guide at the model's
    parameters; then one step of the model's, by the gradient of the objective through :math:`\phi`, which is one of

    * ``hypergradient="unrolled"``, as published: ``num_unroll_steps`` more steps of the guide are made and differentiated
      through, state of the optimiser included, and forgotten. 0 is the truncated form: it lacks the posterior's covariance
      whatever the guide, and no number of inner steps replaces unrolling.
    * ``hypergradient="implicit"``, which is not in the paper: at :math:`\phi^*`,
      :math:`dJ/d\theta = \partial_\theta J - \partial_\phi J \, (\partial^2_{\phi\phi} G)^{-1} \partial^2_{\phi\theta} G`, by
      conjugate gradient on products with the Hessian of the lower level on ``num_hessian_draws`` draws of its noise. With
      ``curvature="fisher"`` it is replaced by the guide's Fisher information, which is the same where the guide is the
      posterior and the lower level a Kullback-Leibler divergence: never indefinite, and far less noisy for relaxed bits, so
      that 3 steps on 2 draws are enough. Bits relaxed at temperature :math:`\tau` have :math:`1 - \tau` of the variance of bits,
      which makes the implicit term larger by its inverse.

    Every step of the guide sees fresh noise. ``guide_optim`` counts its own steps: ``num_inner_steps`` of them per step.

    The first argument of model and guide is the batch of the visible, ``(batch,) + event_shape``. The latents lie in the plate
    of its rows, and the guide draws them reparametrised: :class:`~numpyro_ebm.GumbelBernoulli` where the model's are binary.
    The model is unnormalised: energies, or a random field of :class:`~numpyro_ebm.BaseMeasure` sites and a factor.

    :param model: a NumPyro model.
    :param guide: a NumPyro guide with the latent sites of the model; an autoguide only makes sense without batches.
    :param optim: an optax transformation for the model, or an optimiser of :mod:`numpyro.optim`.
    :param guide_optim: the same for the guide. Through unrolled steps it is differentiated: give ``optax.adam`` a small
        ``eps_root`` where a gradient can be exactly 0.
    :param objective: as for :class:`~numpyro_ebm.ScoreMatching`.
    :param lower_loss: NumPyro's ``Trace_ELBO()``, the Kullback-Leibler divergence up to a constant, or
        :class:`~numpyro_ebm.PosteriorFisher`.
    :param int num_inner_steps: steps K of the guide per step.
    :param int num_unroll_steps: steps N that are differentiated through; not used by the implicit form.
    :param str hypergradient: ``"unrolled"`` or ``"implicit"``.
    :param bool checkpoint: whether unrolled steps are computed twice, to save their memory.
    :param str curvature: ``"hessian"`` or ``"fisher"``, of the implicit form.
    :param int num_cg_steps: steps of conjugate gradient at most.
    :param float damping: added to the Hessian of the lower level.
    :param float tol: the residual, relative to the right-hand side, at which it stops.
    :param int num_hessian_draws: draws of the lower level's noise over which its Hessian is averaged.
    :param int batch_size: rows of the first argument in every step, drawn with replacement; all of them if not given.
    :raises ValueError: for settings out of range; from ``init``, naming the site and the mend, if the first argument does not
        reach exactly one continuous site, row by row, if a latent is missing from the guide, has another shape there, stands
        outside the plate of the rows or is drawn without reparametrisation, or if model and guide share a param.

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
        >>> engine = BiSM(model, guide, optax.adam(0.01), optax.adam(0.01), DenoisingScoreMatching(0.3), hypergradient="implicit")
        >>> result = engine.run(jax.random.key(1), 1500, v, progress_bar=False)
        >>> print(f"learnt {result.params['loc']:.1f}, exact {v.mean():.1f}")
        learnt 2.9, exact 2.9
    """

    def __init__(
        self,
        model: Model,
        guide: Model,
        optim: Any,
        guide_optim: Any,
        objective: ScoreObjective,
        lower_loss: Any = None,
        num_inner_steps: int = 5,
        num_unroll_steps: int = 5,
        *,
        hypergradient: str = "unrolled",
        checkpoint: bool = False,
        curvature: str = "hessian",
        num_cg_steps: int = 5,
        damping: float = 1e-3,
        tol: float = 1e-5,
        num_hessian_draws: int = 8,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, objective, batch_size)
        if hypergradient not in ("unrolled", "implicit"):
            raise ValueError(f"hypergradient must be 'unrolled' or 'implicit', got {hypergradient!r}.")
        if curvature not in ("hessian", "fisher"):
            raise ValueError(f"curvature must be 'hessian' or 'fisher', got {curvature!r}.")
        require_natural("num_inner_steps", num_inner_steps)
        require_natural("num_unroll_steps", num_unroll_steps)
        require_natural("num_cg_steps", num_cg_steps, least=1)
        require_natural("num_hessian_draws", num_hessian_draws, least=1)
        for name, value in (("damping", damping), ("tol", tol)):
            if not value >= 0:
                raise ValueError(f"{name} must be a number of 0 or more, got {value!r}.")
        self.guide, self.optim, self.guide_optim = guide, optim, guide_optim
        self.lower_loss = Trace_ELBO() if lower_loss is None else lower_loss
        if not hasattr(self.lower_loss, "loss"):
            raise TypeError(
                f"lower_loss must be one of NumPyro's ELBOs, such as Trace_ELBO(), or PosteriorFisher(), got {lower_loss!r}."
            )
        if curvature == "fisher" and isinstance(self.lower_loss, PosteriorFisher):
            raise ValueError("curvature='fisher' is that of a Kullback-Leibler divergence: take 'hessian' with PosteriorFisher.")
        self.num_inner_steps, self.num_unroll_steps = num_inner_steps, num_unroll_steps
        self.hypergradient, self.checkpoint, self.curvature = hypergradient, checkpoint, curvature
        self.num_cg_steps, self.damping, self.tol, self.num_hessian_draws = num_cg_steps, damping, tol, num_hessian_draws
        self._transformation, self._guide_transformation = as_transformation(optim), as_transformation(guide_optim)

    def init(self, rng_key: Array, *args: Any, init_params: dict[str, Any] | None = None, **kwargs: Any) -> BiSMState:
        """The state to start from.

        :param rng_key: a key of :func:`jax.random.key`.
        :param args: arguments of the model; arrays are traced, everything else is static.
        :param dict init_params: values of :func:`numpyro.param` sites to start from, instead of the model's and guide's own.
        :raises ValueError: for whatever model, guide or data cannot be learnt with, naming the site and the mend.
        """
        if isinstance(self.guide, AutoGuide) and self.guide.prototype_trace is None:
            run_program(self.guide, args, kwargs, rng_key)  # it keeps what it sees first, which must not be traced values
        return super().init(rng_key, *args, init_params=init_params, **kwargs)

    def _start(
        self, rng_key: Array, init_params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[BiSMState, Array]:
        batch = self._first_batch(args)
        guide = run_program(self.guide, batch, kwargs, rng_key, data=init_params)
        visible, model = self._inspect(rng_key, init_params, batch, kwargs)
        self._require_pair(model, guide, visible, init_params)
        theta = unconstrain_params(model.params, model.param_transforms)
        phi = unconstrain_params(guide.params, guide.param_transforms)
        params = constrain_params({**theta, **phi}, {**model.param_transforms, **guide.param_transforms})
        optim_states = self._transformation.init(theta), self._guide_transformation.init(phi)
        count = jnp.zeros((), jnp.int32)
        return strong_types(BiSMState(params, theta, phi, *optim_states, rng_key, count, count)), jnp.isfinite(args[0]).all()

    def _require_pair(self, model: Program, guide: Program, visible: Visible, given: dict[str, Any]) -> None:
        """Refuses a guide that is none of the model's."""
        require_params(model, {name: value for name, value in given.items() if name not in guide.params})
        require_params(guide, {}, "the guide")
        if not model.latents:
            raise ValueError("the model has no latent site: learn it by ScoreMatching, which needs no guide.")
        if shared := sorted(set(model.params) & set(guide.params)):
            raise ValueError(f"model and guide share the params {shared}, which belong to one level each: name them apart.")
        for name in model.latents:
            if name not in guide.latents:
                raise ValueError(f"site '{name}': the guide has no such site, it has {sorted(guide.latents)}. Sample it there.")
            given_shape, wanted = jnp.shape(guide.sites[name]["value"]), model.sites[name]["fn"].shape()
            if given_shape != wanted:
                raise ValueError(
                    f"site '{name}': the guide gives shape {given_shape}, the model needs {wanted}: they must sample the same "
                    "event shape in the same plates."
                )
        for name in guide.latents:
            site = guide.sites[name]
            if name not in model.latents and not site["infer"].get("is_auxiliary", False):
                raise ValueError(f"site '{name}': the guide samples it and the model has no such latent. Take it out.")
            if not site["fn"].has_rsample:
                self._refuse_score_function(name, site["fn"])

    def _refuse_score_function(self, name: str, fn: Any) -> None:
        *_, core = layers(fn)
        differentiated = self.hypergradient == "implicit" or self.num_unroll_steps > 0
        if differentiated or not isinstance(self.lower_loss, TraceGraph_ELBO):
            raise ValueError(
                f"site '{name}': the guide draws it from {type(core).__name__}, which is not reparametrised, and BiSM "
                "differentiates through the draw. Use GumbelBernoulli for binary latents, or num_unroll_steps=0 with "
                "lower_loss=TraceGraph_ELBO()."
            )

    def _step(self, state: BiSMState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BiSMState, Array, Health]:
        rng_key, batch_key, inner_key, upper_key = jax.random.split(state.rng_key, 4)
        levels = _Levels(self, state, self._batch(batch_key, args), kwargs)
        keys = jax.random.split(inner_key, self.num_inner_steps)
        phi, guide_optim_state = self._lower_steps(levels, state.theta, state.phi, state.guide_optim_state, keys)
        value, gradient = self._hypergradient(levels, state.theta, phi, guide_optim_state, upper_key)
        theta, optim_state = apply_gradient(self._transformation, gradient, state.optim_state, state.theta)
        new = BiSMState(
            params={**levels.theta_of(theta), **levels.phi_of(phi)},
            theta=theta,
            phi=phi,
            optim_state=optim_state,
            guide_optim_state=guide_optim_state,
            rng_key=rng_key,
            num_steps=state.num_steps + 1,
            num_skipped=state.num_skipped,
        )
        health = finite_health(loss=value, params={**theta, **phi})
        return keep_if_healthy(health, new, state._replace(rng_key=rng_key)), value, health

    def _lower_steps(self, levels: "_Levels", theta: Any, phi: Any, optim_state: Any, keys: Array) -> tuple[Any, Any]:
        """One step of the guide for every key, with gradients in ``theta`` if they are asked for."""

        def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            phi, optim_state = carry
            gradient = jax.grad(levels.lower, 1)(theta, phi, key)
            return apply_gradient(self._guide_transformation, gradient, optim_state, phi), None

        return lax.scan(jax.checkpoint(step) if self.checkpoint else step, (phi, optim_state), keys)[0]

    def _hypergradient(self, levels: "_Levels", theta: Any, phi: Any, optim_state: Any, rng_key: Array) -> tuple[Array, Any]:
        """The upper level and its gradient in the model's parameters, with the guide's a function of them."""
        lower_key, upper_key = jax.random.split(rng_key)
        if self.hypergradient == "implicit":
            return self._implicit(levels, theta, phi, lower_key, upper_key)
        keys = jax.random.split(lower_key, self.num_unroll_steps)

        def upper(theta: Any) -> Array:
            return levels.upper(theta, self._lower_steps(levels, theta, phi, optim_state, keys)[0], upper_key)

        return jax.value_and_grad(upper)(theta)

    def _implicit(self, levels: "_Levels", theta: Any, phi: Any, lower_key: Array, upper_key: Array) -> tuple[Array, Any]:
        value, (direct, of_phi) = jax.value_and_grad(levels.upper, (0, 1))(theta, phi, upper_key)
        keys = jax.random.split(lower_key, self.num_hessian_draws)

        def lower_gradient(theta: Any, phi: Any) -> Any:
            return jax.grad(lambda phi: jax.vmap(lambda key: levels.lower(theta, phi, key))(keys).mean())(phi)

        if self.curvature == "fisher":
            product = levels.fisher_product(phi, keys)
        else:
            _, product = jax.linearize(lambda phi: lower_gradient(theta, phi), phi)

        def damped(x: Any) -> Any:
            return jax.tree.map(lambda a, b: a + self.damping * b, product(x), x)

        x, _ = cg(damped, of_phi, tol=self.tol, maxiter=self.num_cg_steps)
        _, transposed = jax.vjp(lambda theta: lower_gradient(theta, phi), theta)
        return value, jax.tree.map(jnp.subtract, direct, transposed(x)[0])

    def _loss(self, state: BiSMState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        return _Levels(self, state, args, kwargs).upper(state.theta, state.phi, state.rng_key)

    def _mend(self, health: dict[str, int]) -> str:
        if self.hypergradient == "unrolled" and self.num_unroll_steps > 0:
            return (
                "Take smaller learning rates; or, since the guide's optimiser is differentiated, give one whose derivative is "
                "finite where a gradient is 0, as optax.adam(..., eps_root=1e-16)."
            )
        return "Take smaller learning rates, or more inner steps for a guide that has lost the posterior."


class _Levels:
    """The two levels on one batch, as functions of unconstrained parameters: theta of the model, phi of the guide."""

    def __init__(self, engine: BiSM, state: BiSMState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.guide = engine._inner, engine.guide
        self.objective, self.lower_loss = engine.objective, engine.lower_loss
        (self.v, *self.rest), self.kwargs = args, kwargs
        self.rng_key = state.rng_key  # of runs whose every site has a value
        guide = run_program(self.guide, args, kwargs, self.rng_key, data=state.params)
        with numpyro.validation_enabled(False):
            model = run_program(self.model, args, kwargs, self.rng_key, data={**state.params, **guide.drawn})
        require_same_params(model, state.theta)
        require_same_params(guide, state.phi, "the guide")
        self._of_theta, self._of_phi = model.param_transforms, guide.param_transforms
        self._plate, self._row_dim = _rows(model, len(self.v))

    def theta_of(self, theta: Any) -> dict[str, Any]:
        """The model's params at unconstrained values."""
        return constrain_params(theta, self._of_theta)

    def phi_of(self, phi: Any) -> dict[str, Any]:
        """The guide's params at unconstrained values."""
        return constrain_params(phi, self._of_phi)

    def lower(self, theta: Any, phi: Any, rng_key: Array) -> Array:
        """How far the guide is from the posterior: a mean over the rows, each with the weight of its noise level."""
        noise_key, draw_key = jax.random.split(rng_key)
        v = self.objective.perturb(noise_key, self.v)
        weight = self.objective.weight(len(v)).astype(v.dtype)
        params = {**self.theta_of(theta), **self.phi_of(phi)}
        with numpyro.validation_enabled(False):  # a relaxed bit is no bit, and would have the log density -inf
            if hasattr(self.lower_loss, "losses"):
                losses = self.lower_loss.losses(draw_key, params, self.model, self.guide, v, *self.rest, **self.kwargs)
                return (weight * losses).mean()
            by_row = weight.reshape(-1, *[1] * (-1 - self._row_dim))
            model, guide = scale(self.model, scale=by_row), scale(self.guide, scale=by_row)
            loss: Array = self.lower_loss.loss(draw_key, params, model, guide, v, *self.rest, **self.kwargs)
            return loss / len(v)

    def fisher_product(self, phi: Any, keys: Array) -> Callable[[Any], Any]:
        """Products with the Fisher information of the guide, at one draw for every row and key."""
        weight = self.objective.weight(len(self.v)).astype(self.v.dtype)

        def log_q(phi: Any, key: Array) -> Array:
            noise_key, draw_key = jax.random.split(key)
            args = self.objective.perturb(noise_key, self.v), *self.rest
            h = run_program(self.guide, args, self.kwargs, draw_key, data=self.phi_of(phi)).drawn
            data = {**self.phi_of(phi), **lax.stop_gradient(h)}
            terms, program = log_density_terms(self.guide, args, self.kwargs, draw_key, data=data, latents={})
            return per_row(terms, program, self._plate)

        rows, slopes = jax.linearize(lambda phi: jax.vmap(lambda key: log_q(phi, key))(keys), phi)
        transposed = jax.linear_transpose(slopes, phi)
        return lambda x: transposed(weight * slopes(x) / rows.size)[0]

    def upper(self, theta: Any, phi: Any, rng_key: Array) -> Array:
        """The objective of the score of w(v, h), h a draw of the guide that does not move with v."""
        noise_key, loss_key, draw_key = jax.random.split(rng_key, 3)  # the first two as ScoreMatching has them
        v_tilde = self.objective.perturb(noise_key, self.v)
        model, guide = self.theta_of(theta), self.phi_of(phi)
        h = run_program(self.guide, (v_tilde, *self.rest), self.kwargs, draw_key, data=guide).drawn

        def log_ratio(v: Array) -> Array:
            with numpyro.validation_enabled(False):
                log_p, _ = log_density(self.model, (v, *self.rest), self.kwargs, self.rng_key, data={**model, **h})
                log_q, _ = log_density(self.guide, (v, *self.rest), self.kwargs, self.rng_key, data={**guide, **h})
            return log_p - log_q

        return self.objective.loss(jax.grad(log_ratio), loss_key, self.v, v_tilde).mean()


def _rows(model: Program, num_rows: int) -> tuple[str, int]:
    """Name and dimension of the plate of the rows, in which all latents lie."""
    frames = [{(f.dim, f.name) for f in model.sites[name]["cond_indep_stack"] if f.size == num_rows} for name in model.latents]
    dim, name = min(set.intersection(*frames))
    return name, dim
