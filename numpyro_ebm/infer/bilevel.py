# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the engines share that learn a model from scores, together with a guide of its latents.

A step has two levels, on the same rows: some steps of the guide towards the posterior, the model's parameters fixed; then one
step of the model's. The engines differ in the upper level.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, lax
from numpyro.distributions import Distribution
from numpyro.handlers import scale
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoGuide

from numpyro_ebm._checks import require_count, require_instance
from numpyro_ebm._compat import has_seen_model
from numpyro_ebm._map_over import map_over
from numpyro_ebm.distributions.energy import energy_site
from numpyro_ebm.distributions.known import is_known
from numpyro_ebm.evaluate.guide_weights import LEAST_FRACTION, guide_findings, in_groups
from numpyro_ebm.evaluate.report import Finding
from numpyro_ebm.infer.annealed_joint import Annealed
from numpyro_ebm.infer.engine import compiled_method
from numpyro_ebm.infer.marginal_likelihood import (
    CONDITIONAL,
    FEW,
    MarginalLikelihood,
    batches_to_judge,
    joint_chains,
    likelihood_findings,
    marginal_likelihood,
)
from numpyro_ebm.infer.row_joint import RowJoint
from numpyro_ebm.infer.score_engine import ScoreEngine, require_params, require_same_params
from numpyro_ebm.objectives.guide import PosteriorFisher
from numpyro_ebm.objectives.latent import Drawn, draw, drawn_density, row_density
from numpyro_ebm.objectives.score import MultiscaleDenoisingScoreMatching, ScoreObjective
from numpyro_ebm.optim import apply_gradient, as_transformation
from numpyro_ebm.program.batch import Batch, at_rows, require_same_rows
from numpyro_ebm.program.pair import require_apart, require_latent, require_pair, same_supports
from numpyro_ebm.program.rows import dim_of, row_plate
from numpyro_ebm.program.run import Run, constrain_params, own_key, require_program, run_model, strong_types, unconstrain_params
from numpyro_ebm.program.sites import Model, Site, is_factor, is_masked
from numpyro_ebm.program.visible import Visible
from numpyro_ebm.train.health import Health, health_of


class BilevelEngine(ScoreEngine):
    """An engine with a guide. Its state has the fields of :class:`~numpyro_ebm.BiSMState`, and more if it likes."""

    def __init__(
        self,
        model: Model,
        guide: Model,
        optim: Any,
        guide_optim: Any,
        objective: ScoreObjective,
        lower_loss: Any,
        num_inner_steps: int,
        batch_size: int | None,
        average_iterates: bool | float,
    ) -> None:
        super().__init__(model, objective, batch_size, average_iterates)
        self.guide, self.optim, self.guide_optim = guide, optim, guide_optim
        require_program("the guide", guide)
        self.num_inner_steps = require_count("num_inner_steps", num_inner_steps, least=0)
        wanted = "one of NumPyro's ELBOs, such as Trace_ELBO(), or PosteriorFisher()"
        self.lower_loss = Trace_ELBO() if lower_loss is None else require_instance("lower_loss", lower_loss, ("loss",), wanted)
        if isinstance(lower_loss, TraceEnum_ELBO) or getattr(lower_loss, "multi_sample_guide", False):
            raise ValueError(
                f"lower_loss: {type(lower_loss).__name__} with enumeration or a multi-sample guide is not a loss of one sample of "
                "the latents for every row. Use Trace_ELBO()."
            )
        self._transformation = as_transformation(optim)
        self._guide_transformation = as_transformation(guide_optim, "guide_optim")

    @property
    def _unrolls(self) -> bool:
        """Whether steps of the guide are differentiated through."""
        return False

    @property
    def _checkpoints(self) -> bool:
        """Whether these steps are computed twice, to save their memory."""
        return False

    @abstractmethod
    def _first_state(self, **fields: Any) -> Any:
        """The state before the first step."""

    @property
    def _programs(self) -> tuple[Model, ...]:
        return self._inner, self.guide

    @abstractmethod
    def _levels(self, state: Any, batch: Batch, kwargs: dict[str, Any]) -> "Levels":
        """The two levels on one batch."""

    @abstractmethod
    def _upper(self, levels: Any, theta: Any, phi: Any, guide_optim_state: Any, rng_key: Array) -> "Upper":
        """The upper level at the model's parameters."""

    @abstractmethod
    def _require_draws(self, name: str, fn: Any) -> None:
        """Refuses a distribution of the guide that this engine cannot learn with."""

    def _unconstrained(self, state: Any) -> dict[str, Any]:
        return {**state.theta, **state.phi}

    def _meet(self, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(self.guide, AutoGuide) and not has_seen_model(self.guide):
            run_model(self.guide, args, kwargs, rng_key)  # it keeps what it sees first, which must not be traced values

    def _start(
        self, rng_key: Array, init_params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Array]:
        batch = self._first_batch(rng_key, init_params, args, kwargs)
        guide = run_model(batch.of(self.guide), batch.args, kwargs, rng_key, data=init_params)
        visible, model = self._inspect(rng_key, init_params, batch, kwargs)
        self._require_pair(model, guide, visible, init_params)
        theta = unconstrain_params(model.params, model.param_transforms)
        phi = unconstrain_params(guide.params, guide.param_transforms)
        count = jnp.zeros((), jnp.int32)
        state = self._first_state(
            params=constrain_params({**theta, **phi}, {**model.param_transforms, **guide.param_transforms}),
            theta=theta,
            phi=phi,
            optim_state=self._transformation.init(theta),
            guide_optim_state=self._guide_transformation.init(phi),
            rng_key=rng_key,
            num_steps=count,
            num_skipped=count,
        )
        good = self._are_good_rows(rng_key, state.params, batch, args, kwargs)
        return strong_types(state), good & same_supports(model, guide)

    def _require_pair(self, model: Run, guide: Run, visible: Visible, given: dict[str, Any]) -> None:
        """Refuses a guide that is none of the model's."""
        require_params(model, {name: value for name, value in given.items() if name not in guide.params})
        if self.num_inner_steps:
            require_params(guide, {}, "the guide")
        if not model.latents:
            raise ValueError("the model has no latent site: learn it by ScoreMatching, which needs no guide.")
        require_same_rows({"the model": model, "the guide": guide})
        require_apart({"the model": model, "the guide": guide})
        for what, params, other, sites in (
            ("guide", guide.params, "model", model.sites),
            ("model", model.params, "guide", guide.sites),
        ):
            if taken := sorted(name for name in params if name in sites):
                kind = sites[taken[0]]["type"]
                raise ValueError(
                    f"param site '{taken[0]}' of the {what} has the name of a {kind} site of the {other}: name them apart."
                )
        require_pair(model, guide, auxiliary=True)
        for name in guide.latents:
            self._require_draws(name, guide.sites[name]["fn"])

    def _latents(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> dict[str, Array]:
        return run_model(batch.of(self.guide), batch.args, kwargs, rng_key, data=params).drawn

    def _fix_of_density(self) -> str:
        return f"It is taken at latents that the guide draws. {super()._fix_of_density()}"

    def _seen(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> dict[str, Site]:
        with numpyro.validation_enabled(False):  # a relaxed bit is not a bit
            return super()._seen(rng_key, params, batch, kwargs)

    def _refuse_guide(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> None:
        guide = run_model(batch.of(self.guide), batch.args, kwargs, rng_key, data=params)
        with numpyro.validation_enabled(False):  # a relaxed bit is not a bit
            model = run_model(batch.of(self._inner), batch.args, kwargs, rng_key, data={**params, **guide.drawn})
        for name in model.latents:
            require_latent(model.sites[name], guide)

    def _step(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Array, Health]:
        rng_key, batch_key, inner_key, upper_key = jax.random.split(state.rng_key, 4)
        levels = self._levels(state, self._batch(batch_key, state.params, args, kwargs), kwargs)
        keys = jax.random.split(inner_key, self.num_inner_steps)
        phi, guide_optim_state = self._lower_steps(levels, state.theta, state.phi, state.guide_optim_state, keys)
        value, gradient, value_fn, others = self._upper(levels, state.theta, phi, guide_optim_state, upper_key)
        theta, optim_state = apply_gradient(
            self._transformation, gradient, state.optim_state, state.theta, value=value, value_fn=value_fn
        )
        new = state._replace(
            params={**levels.theta_of(theta), **levels.phi_of(phi)},
            theta=theta,
            phi=phi,
            optim_state=optim_state,
            guide_optim_state=guide_optim_state,
            rng_key=rng_key,
            **others,
        )
        return new, value, health_of("loss", value) | health_of("param", {**theta, **phi})

    def _findings(
        self,
        rng_key: Array,
        state: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        validation: tuple[Any, ...] | None = None,
    ) -> list[Finding]:
        found = super()._findings(rng_key, state, args, kwargs, validation)
        for site, log_weights in self._weigh_guide(state, rng_key, *args, **kwargs).items():
            least, fix = self._wanted_of_guide()
            found += guide_findings(site, log_weights, f"{fix} {NEARER}", least=least)
        are_well = all(finding.is_well for finding in found)
        return found + likelihood_findings(*self._likelihood_of(state, rng_key, args, kwargs), are_well=are_well)

    def _likelihood_of(
        self, state: Any, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, MarginalLikelihood | str]:
        """The site of the visible, and its likelihood, or why it is not known."""
        visible, program = self._visible(state, args, kwargs)
        site = visible.site
        if is_masked(program.sites[site]["fn"]):
            return site, "the site is masked"
        if isinstance(self.objective, MultiscaleDenoisingScoreMatching):
            return site, "rows have noise of many levels, and a density is of one"
        is_normalized = all(_is_normalized(site["fn"]) for site in program.sites.values() if site["type"] == "sample")
        if not is_normalized and any(jnp.ndim(x) for x in jax.tree.leaves((args[1:], kwargs))):
            return site, CONDITIONAL
        batch_size = len(self._first_batch(state.rng_key, state.params, args, kwargs).args[0])
        batches = batches_to_judge(len(args[0]), batch_size, args[0].size // len(args[0]))
        if batches is None:
            return site, FEW
        chains_key, rows_key = jax.random.split(rng_key)
        chains = self._joint_chains(state, chains_key, jnp.asarray(batches), *args, **kwargs)
        return site, self._likelihood(state, rows_key, jnp.asarray(batches), chains, is_normalized, *args, **kwargs)

    def _wanted_of_guide(self) -> tuple[float, str]:
        """The fraction of the guide's samples that should count at least; and what becomes of the fit where the guide is bad."""
        return LEAST_FRACTION, "the guide is far from the posterior, and the score of the marginal is then another."

    @partial(compiled_method, cheaply=True)
    def _weigh_guide(self, state: Any, rng_key: Array, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Log weights of samples of the guide on the rows of a step, ``(num_samples, rows)``, by the names of its sites."""
        batch_key, rng_key = jax.random.split(rng_key)
        levels = Levels(self, state, self._batch(batch_key, state.params, args, kwargs), kwargs)
        v, draw_key = levels.noisy(rng_key)
        found = in_groups(lambda key, num_samples: levels.log_weights(state.params, key, v, num_samples), draw_key, v)
        return {", ".join(levels.latents): found}

    @partial(compiled_method, cheaply=True, level=1)
    def _joint_chains(self, state: Any, rng_key: Array, batches: Array, *args: Any, **kwargs: Any) -> Annealed | None:
        return joint_chains(rng_key, self._levels_at(state, args, kwargs), state.params, batches)

    @partial(compiled_method, cheaply=True)
    def _likelihood(
        self,
        state: Any,
        rng_key: Array,
        batches: Array,
        chains: Annealed | None,
        is_normalized: bool,
        *args: Any,
        **kwargs: Any,
    ) -> MarginalLikelihood:
        own = {name: state.params[name] for name in state.theta}
        levels_at = self._levels_at(state, args, kwargs)
        return marginal_likelihood(rng_key, levels_at, own, state.params, batches, chains, is_normalized=is_normalized)

    def _levels_at(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Callable[[Array], Levels]":
        """The levels of as many rows as a step sees, by their indices."""
        first = self._first_batch(state.rng_key, state.params, args, kwargs)
        return lambda rows: Levels(self, state, at_rows(first, args[0], rows), kwargs)

    def _lower_steps(self, levels: "Levels", theta: Any, phi: Any, optim_state: Any, keys: Array) -> tuple[Any, Any]:
        """One step of the guide for every key, with gradients in ``theta`` if they are asked for."""
        if not len(keys):  # of a guide that is not learned, the lower level need not have a gradient
            return phi, optim_state

        def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            phi, optim_state = carry

            def lower(phi: Any) -> Array:
                return levels.lower(theta, phi, key)

            value, gradient = jax.value_and_grad(lower)(phi)
            value_fn = None if self._unrolls else lower  # a search along a line cannot be differentiated through
            return apply_gradient(self._guide_transformation, gradient, optim_state, phi, value=value, value_fn=value_fn), None

        return lax.scan(jax.checkpoint(step) if self._checkpoints else step, (phi, optim_state), keys)[0]


class Upper(NamedTuple):
    """What a step of the model's parameters is made of."""

    value: Array
    gradient: Any  # in the model's parameters
    value_fn: Callable[[Any], Array] | None = None  # what the gradient is the derivative of, if it is one
    others: dict[str, Array] = {}  # other fields of the state


class Levels:
    """A model and its guide on one batch, as functions of unconstrained parameters: theta of the model, phi of the guide."""

    def __init__(self, engine: BilevelEngine, state: Any, batch: Batch, kwargs: dict[str, Any]) -> None:
        self.model, self.guide = batch.of(engine._inner), batch.of(engine.guide)
        self.objective, self.lower_loss = engine.objective, engine.lower_loss
        args, self.kwargs = batch.args, kwargs
        self.v, *self.rest = args
        # of the model, whose every site has a value: for what networks draw, such as dropout
        self.model_key, guide_key = jax.random.split(own_key(state.rng_key))
        guide = run_model(self.guide, args, kwargs, guide_key, data=state.params)
        with numpyro.validation_enabled(False):
            model = run_model(self.model, args, kwargs, self.model_key, data={**state.params, **guide.drawn})
        require_same_params(model, state.theta)
        require_same_params(guide, state.phi, "the guide")
        self._of_theta, self._of_phi = model.param_transforms, guide.param_transforms
        self.latents = sorted(model.latents)
        plate = row_plate(model, model.latents, len(self.v))
        if plate is None:
            raise ValueError(f"no plate of the {len(self.v)} rows of the first argument is around all of {sorted(model.latents)}.")
        self.plate = plate
        self._program = model
        self.is_of_same_latents = model.latents.keys() == guide.latents.keys()
        self.has_discrete = any(model.sites[name]["fn"].support.is_discrete for name in model.latents)
        self._row_dim = next(dim for name in model.latents if (dim := dim_of(model.sites[name], plate)) is not None)

    @property
    def joint(self) -> RowJoint:
        """Where the latents of a row are one vector."""
        return RowJoint(self.model, tuple(self.rest), self.kwargs, self.model_key, self.plate, self._program)

    def theta_of(self, theta: Any) -> dict[str, Any]:
        """The model's params at unconstrained values."""
        return constrain_params(theta, self._of_theta)

    def phi_of(self, phi: Any) -> dict[str, Any]:
        """The guide's params at unconstrained values."""
        return constrain_params(phi, self._of_phi)

    def noisy(self, rng_key: Array) -> tuple[Array, Array]:
        """The visible as the lower level sees it, and the key for the guide's samples there."""
        noise_key, draw_key = jax.random.split(rng_key)
        return self.objective.perturb(noise_key, self.v), draw_key

    def lower(self, theta: Any, phi: Any, rng_key: Array) -> Array:
        """How far the guide is from the posterior: a mean over the rows, each with the weight of its noise level."""
        v, draw_key = self.noisy(rng_key)
        weight = self.objective.weight(len(v)).astype(v.dtype)
        params = {**self.theta_of(theta), **self.phi_of(phi)}
        with numpyro.validation_enabled(False):  # a relaxed bit is not a bit, and would have the log density -inf
            if isinstance(self.lower_loss, PosteriorFisher):
                args = v, *self.rest
                losses, _ = self.lower_loss.losses_of_rows(self.plate, draw_key, params, self.model, self.guide, args, self.kwargs)
                return (weight * losses).mean()
            by_row = weight.reshape(-1, *[1] * (-1 - self._row_dim))
            model, guide = scale(self.model, scale=by_row), scale(self.guide, scale=by_row)
            loss: Array = self.lower_loss.loss(draw_key, params, model, guide, v, *self.rest, **self.kwargs)
            return loss / len(v)

    def log_weights(self, params: dict[str, Any], rng_key: Array, v: Array, num_samples: int) -> Array:
        """Of samples of the guide at rows, ``(num_samples, rows)``."""
        return self.weigh(params, v, self.drawn(params, rng_key, v, num_samples))

    def drawn(self, params: dict[str, Any], rng_key: Array, v: Array, num_samples: int) -> Drawn:
        """Samples of the guide at rows, which stand for the posterior: bits are bits."""
        return draw(self.guide, (v, *self.rest), self.kwargs, rng_key, num_samples, params=params, relaxed=False)

    def weigh(self, params: dict[str, Any], v: Array, drawn: Drawn) -> Array:
        """Their log weights, ``(num_samples, rows)``."""
        log_p = row_density(self.model, tuple(self.rest), self.kwargs, self.model_key, self.plate)
        log_q = drawn_density(self.guide, tuple(self.rest), self.kwargs, self.plate)
        return map_over(lambda h: log_p(params, v, h.latents) - log_q(params, v, h), drawn)


def _is_normalized(fn: Distribution) -> bool:
    """Whether a site has the density that it says."""
    return energy_site(fn) is None and not is_factor(fn) and is_known(fn)


NEARER = "Take a guide nearer to the posterior: a larger family (a full covariance), more inner steps, a smaller learning rate."
