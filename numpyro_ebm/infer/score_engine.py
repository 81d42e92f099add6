# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the engines that match scores share: batches of the visible, and what they refuse.

The first argument of a model is the visible. A score is a derivative in it, which no normalizer has, so models run without
the guard of their energies.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_ebm._checks import require_bool, require_count, require_instance
from numpyro_ebm._pytree import join
from numpyro_ebm.distributions.energy import energy_site
from numpyro_ebm.evaluate.capacity import capacity_finding
from numpyro_ebm.evaluate.diagnose import with_rows
from numpyro_ebm.evaluate.report import Finding, are_reports_enabled, not_told, report_of
from numpyro_ebm.handlers import unnormalized
from numpyro_ebm.infer.collapse import (
    AT_ROWS,
    NUM_BATCHES,
    beside,
    collapse_finding,
    correlated_score,
    gaussian_score,
    level_finding,
    noise_finding,
    num_batches,
    validation_finding,
)
from numpyro_ebm.infer.engine import Engine, RunResult, compiled_method
from numpyro_ebm.infer.noise_levels import levels_finding
from numpyro_ebm.infer.visible_density import MAX_ROWS, DensityNumbers, density_findings, density_numbers
from numpyro_ebm.objectives.score import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
    ScoreFn,
    ScoreObjective,
    objective_keys,
)
from numpyro_ebm.program.batch import Batch, drawn_batch, first_batch, over_rows, run_at_zero, whole_batch
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.rows import ROUNDING
from numpyro_ebm.program.run import Run, log_density_terms, own_key, require_program, run_model, total
from numpyro_ebm.program.sites import (
    Model,
    NoDensityError,
    Site,
    are_possible,
    core_of,
    has_density,
    is_masked,
    require_data,
    require_possible,
)
from numpyro_ebm.program.visible import Visible, find_visible, require_batch, require_rows, require_unscaled
from numpyro_ebm.train.devices import as_sharding
from numpyro_ebm.train.health import Part, named

NO_DERIVATIVE = (
    "the objective is not finite at the parameters that the fit starts from, though the log density is: the objective is of its "
    "derivatives, and a root at 0, a power of 0, or jnp.where around what is not finite has none. Look for these in the energy, or "
    "start elsewhere, by init_params."
)


class ScoreEngine(Engine):
    """An engine that learns a model by the scores of its visible."""

    def __init__(self, model: Model, objective: ScoreObjective, batch_size: int | None, average_iterates: bool | float) -> None:
        super().__init__(average_iterates)
        wanted = "a score objective such as DenoisingScoreMatching(0.1)"
        self.model, self.objective = model, require_instance("objective", objective, ("perturb", "loss", "weight"), wanted)
        self.batch_size = None if batch_size is None else require_count("batch_size", batch_size)
        self._inner = unnormalized(model)
        require_program("the model", model)

    @property
    def _programs(self) -> tuple[Model, ...]:
        """What runs on the rows of a batch, the model first."""
        return (self._inner,)

    def _batch(self, rng_key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The rows of the visible that a step sees."""
        distinct = getattr(self.objective, "compares_rows", False)
        return drawn_batch(self._programs, args, kwargs, rng_key, data=params, batch_size=self.batch_size, distinct=distinct)

    def _first_batch(self, rng_key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The first rows of the visible: what there is to check of a model."""
        require_batch(args)
        return first_batch(self._programs, args, kwargs, rng_key, data=params, batch_size=self.batch_size)

    def _all_rows(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """All rows of the visible, which the loss at a state is of."""
        return whole_batch(self._programs, args, kwargs, own_key(state.rng_key), data=state.params)

    @abstractmethod
    def _batch_loss(self, state: Any, batch: Batch, kwargs: dict[str, Any]) -> Array:
        """The loss at a state on a batch; traced."""

    def _loss(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        return self._batch_loss(state, self._all_rows(state, args, kwargs), kwargs)

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        init_state: Any = None,
        init_params: dict[str, Any] | None = None,
        collect: Callable[[Any], Any] | None = None,
        callbacks: Sequence[Callable[[int, Any, np.ndarray], Any]] = (),
        chunk_size: int | None = None,
        report: bool | None = None,
        checkpoint: Any = None,
        mesh: Any = None,
        validation: Any = None,
        patience: int | None = None,
        **kwargs: Any,
    ) -> RunResult:
        """Many steps, in compiled chunks, and a report on whether the fit can be believed, as of every engine.

        :param validation: rows that are not learned from, in the place of the first argument; or all arguments, a tuple, where
            others have rows too. The report compares the objective on them with that of a Gaussian.
        :param int patience: so many chunks without a better objective on the validation rows end the run, and the best state that
            was seen is returned; of all chunks if not given. A chunk is ``chunk_size`` steps, a twentieth of the run if not given.
        :raises ValueError: for ``patience`` without ``validation``, or with ``collect`` or ``checkpoint``.

        All other settings are those of the other engines' ``run``.
        """
        patience = None if patience is None else require_count("patience", patience)
        if patience and (validation is None or collect):
            fix = "collect, whose records would be lost" if collect else "no validation= rows: give some, or leave it out"
            raise ValueError(f"patience={patience} with {fix}.")
        if patience and checkpoint is not None:
            raise ValueError(f"patience={patience} with checkpoint=, which keeps no best state: take numpyro_ebm.fit, which does.")
        reports = are_reports_enabled() if report is None else require_bool("report", report)
        if mesh is not None:  # here, for what looks at the rows before and after the run
            sharding = as_sharding(mesh)
            args, kwargs = sharding.place_data(args, kwargs)
            validation = sharding.replicate(validation)
        settings: dict[str, Any] = {
            "progress_bar": progress_bar,
            "stable_update": stable_update,
            "init_state": init_state,
            "init_params": init_params,
            "chunk_size": chunk_size,
            "report": False,  # which is made below, of the state that is returned
            "checkpoint": checkpoint,
            "mesh": mesh,
            **kwargs,
        }
        if patience:
            watch = _Watch(lambda state: self.evaluate(_judged(state), *with_rows(validation, args), **kwargs), patience)
            losses = super().run(rng_key, num_steps, *args, callbacks=(*callbacks, watch), **settings).losses
            result = RunResult(self.get_params(watch.state), watch.state, losses)
        else:
            result = super().run(rng_key, num_steps, *args, collect=collect, callbacks=callbacks, **settings)
        if not reports:
            return result
        arrays, of_model = join(*self._split(args, kwargs))  # as the run has read them
        said = report_of(lambda: self._told(own_key(result.state.rng_key), result.state, arrays, of_model, validation))
        num_steps = int(result.state.num_steps)
        said.warn(stacklevel=2, before=self._warnings(result.state, num_steps, arrays, of_model))  # as after the last chunk

        return result._replace(report=said)

    def _find(
        self, rng_key: Array, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any], validation: Any = None
    ) -> list[Finding]:
        args, kwargs = join(*self._split(args, kwargs))
        return self._told(rng_key, state, args, kwargs, validation)

    def _told(self, rng_key: Array, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any], validation: Any) -> list[Finding]:
        """What there is to say of a fit, with rows that it has not learned from or without."""
        rows = None if validation is None else with_rows(validation, args)
        found = self._findings(rng_key, state, args, kwargs, rows)
        if rows is None:
            return found
        state = _judged(state)
        numbers = self.evaluate(state, *args, **kwargs), self.evaluate(state, *rows, **kwargs)
        gaussians = self._gaussian(state, args[0], args[0]), self._gaussian(state, args[0], rows[0])
        (here, there), (at_rows, at_validation) = (map(float, pair) for pair in (numbers, gaussians))
        of_flat = float(self._loss_of_score(state.rng_key, jnp.asarray(args[0]), jnp.zeros_like))
        site = self._visible_site(state, args, kwargs)
        return [*found, validation_finding(site, here, there, at_rows, at_validation, of_flat)]

    def _findings(
        self,
        rng_key: Array,
        state: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        validation: tuple[Any, ...] | None = None,
    ) -> list[Finding]:
        """Of an objective that can collapse: whether it has, or is bad at the rows; of one with many noise levels: whether they go
        together.

        :param validation: the arguments with rows that were not learned from.
        """
        if isinstance(self.objective, MultiscaleDenoisingScoreMatching):
            num_rows = len(self._first_batch(state.rng_key, state.params, args, kwargs).args[0])
            return [levels_finding(self._visible_site(state, args, kwargs), self.objective, num_rows, args[0])]
        visible, program = self._visible(state, args, kwargs)
        found = self._of_objective(rng_key, state, visible.site, program, args, kwargs)
        more = self._of_density(rng_key, state, visible.site, program, args, kwargs, validation)
        is_well = all(finding.is_well for finding in found)  # else the density is far from the rows by the same cause
        return found + (more if is_well else [finding._replace(least=None, most=None, is_missing=False) for finding in more])

    def _of_objective(
        self, rng_key: Array, state: Any, site: str, program: Run, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Finding]:
        state, has_all_rows = state._replace(rng_key=rng_key), not is_masked(program.sites[site]["fn"])
        masked = not_told(site, AT_ROWS, "the site is masked, and a Gaussian is not")  # a masked row has the objective 0
        if isinstance(self.objective, DenoisingScoreMatching):
            if not has_all_rows:
                return [masked]
            numbers = jax.device_get(self._at_rows(state, *args, **kwargs))
            noise = noise_finding(site, self.objective.sigma, np.asarray(args[0], float))
            return [level_finding(site, *(np.asarray(x, float) for x in numbers)), noise]
        if not getattr(self.objective, "differentiates_score", False):
            return []
        at_rows, beside_rows, of_gaussian, of_correlated = jax.device_get(self._beside(state, *args, **kwargs))
        collapse = collapse_finding(site, float(at_rows[0]), float(beside_rows[0]), float(of_gaussian[0]))
        level = level_finding(site, np.asarray(at_rows, float), np.asarray(of_correlated, float)) if has_all_rows else masked
        return [collapse, level]

    def _of_density(
        self,
        rng_key: Array,
        state: Any,
        site: str,
        program: Run,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        validation: tuple[Any, ...] | None,
    ) -> list[Finding]:
        """Of an energy whose visible has no latents, whether it has the masses of the rows, and those of others."""
        fn = program.sites[site]["fn"]
        if energy_site(fn) is None or is_masked(fn) or math.prod(core_of(fn).batch_shape) > 1:
            return []
        numbers = jax.device_get(self._density(state, rng_key, site, validation, *args, **kwargs))
        found = density_findings(site, numbers, min(len(args[0]), MAX_ROWS))
        if validation:
            return found
        has_likelihood = numbers is not None and numbers.likelihood is not None
        is_well = all(finding.is_well for finding in found)
        return found + capacity_finding(site, state.params, len(args[0]), can_be_given=has_likelihood, are_well=is_well)

    @partial(compiled_method, cheaply=True)
    def _density(
        self, state: Any, rng_key: Array, site: str, validation: tuple[Any, ...] | None, *args: Any, **kwargs: Any
    ) -> DensityNumbers | None:
        noise_key, others_key, judge_key = jax.random.split(rng_key, 3)

        def seen(key: Array, params: dict[str, Any], args: tuple[Any, ...]) -> Site:
            whole = self._all_rows(state, args, kwargs)
            moved = self.objective.perturb(key, whole.args[0]), *whole.args[1:]
            return run_at_zero(whole._replace(args=moved).of(self._inner), moved, kwargs, state.rng_key, params).observed[site]

        def energy_of(params: dict[str, Any]) -> Any:
            return energy_site(seen(noise_key, params, args)["fn"])

        def rows_of(key: Array, args: tuple[Any, ...]) -> Array:
            rows = jnp.asarray(seen(key, state.params, args)["value"])
            return rows[:: -(-len(rows) // MAX_ROWS)]

        others = None if validation is None else rows_of(others_key, validation)
        return density_numbers(judge_key, energy_of, state.params, rows_of(noise_key, args), others)

    @partial(compiled_method, cheaply=True)
    def _at_rows(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Array, Array, Array]:
        """Of some batches, the loss; that of a Gaussian with the covariance of the data; and that of no score at all."""
        of_data = self._fitted(state.rng_key, args[0], correlated_score)

        def of_batch(rng_key: Array) -> tuple[Array, Array, Array]:
            batch = self._batch(rng_key, state.params, args, kwargs)
            loss = self._batch_loss(state._replace(rng_key=rng_key), batch, kwargs)
            of_gaussian, of_flat = (self._loss_of_score(rng_key, batch.args[0], score) for score in (of_data, jnp.zeros_like))
            return loss, of_gaussian, of_flat

        return lax.map(of_batch, jax.random.split(state.rng_key, num_batches(args[0].size // len(args[0]))))

    @compiled_method
    def _beside(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Array, Array, Array, Array]:
        """Of some batches, the loss on their rows, and beside those of the first; that of a Gaussian of independent coordinates,
        and of one with the covariance of the data.
        """
        scores = [self._fitted(state.rng_key, args[0], fit) for fit in (gaussian_score, correlated_score)]

        def of_batch(at: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
            is_first, rng_key = at
            batch_key, move_key = jax.random.split(rng_key)
            batch = self._batch(batch_key, state.params, args, kwargs)
            v, *rest = batch.args

            def loss(v: Array) -> Array:
                return self._batch_loss(state._replace(rng_key=rng_key), batch._replace(args=(v, *rest)), kwargs)

            moved = lax.cond(is_first, lambda: beside(move_key, v, args[0]), lambda: v)  # which is expensive
            here, there = lax.map(loss, jnp.stack([v, moved]))
            return here, there, *(self._loss_of_score(rng_key, v, score) for score in scores)

        others = jax.random.split(jax.random.fold_in(state.rng_key, 2), NUM_BATCHES - 1)
        keys = jnp.concatenate([state.rng_key[None], others])
        return lax.map(of_batch, (jnp.arange(NUM_BATCHES) == 0, keys))

    @compiled_method
    def _gaussian(self, state: Any, data: Array, v: Array) -> Array:
        return self._loss_of_score(state.rng_key, v, self._fitted(state.rng_key, data, gaussian_score))

    def _fitted(self, rng_key: Array, data: Array, fit: Callable[[Array], ScoreFn]) -> ScoreFn:
        """The score of a Gaussian that is fitted to the data, with their noise."""
        return fit(self.objective.perturb(objective_keys(rng_key).draw, data))

    def _loss_of_score(self, rng_key: Array, v: Array, score: ScoreFn) -> Array:
        """The objective of a score on rows, with their noise."""
        keys = objective_keys(rng_key)
        return self.objective.loss(score, keys.loss, v, self.objective.perturb(keys.noise, v)).mean()

    def _visible_site(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The name of the site of the visible."""
        return self._visible(state, args, kwargs)[0].site

    def _visible(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Visible, Run]:
        """The visible, and the run of the model that it was found in, of whose values the shapes are known."""
        found: list[tuple[Visible, Run]] = []

        def look(state: Any) -> None:
            batch = self._first_batch(state.rng_key, state.params, args, kwargs)
            found.append(find_visible(batch.of(self._inner), batch.args, kwargs, state.rng_key, data=state.params))

        jax.eval_shape(look, state)  # nothing is computed
        return found[0]

    def _inspect(self, rng_key: Array, data: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> tuple[Visible, Run]:
        """The visible and a run of the model, which is refused if no score could teach it."""
        model = batch.of(self._inner)
        visible, program = find_visible(model, batch.args, kwargs, rng_key, data=data)
        require_rows(program, visible)
        require_unscaled(program)
        self.objective.perturb(rng_key, batch.args[0])  # which refuses a batch that is too small for it
        if program.mutable_state:
            raise ValueError(
                f"site '{next(iter(program.mutable_state))}': mutable sites are not kept by {type(self).__name__}: use a network "
                "without running statistics."
            )
        check_run(model, batch.args, kwargs, data=data, mark_visible=True).require_scores()
        if getattr(self.objective, "compares_rows", False) and is_masked(program.sites[visible.site]["fn"]):
            raise ValueError(
                f"site '{visible.site}': it is masked, and {type(self.objective).__name__} compares all rows, those that are "
                "masked too: leave them out of the data."
            )
        return visible, program

    def _latents(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> dict[str, Array]:
        """Values of the latents for the rows of a batch, where there are any."""
        return {}

    def _fix_of_density(self) -> str:
        """What to do where the density is no longer finite after some steps."""
        return f"Where it was finite before: {self._fix()}"

    def _seen(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> dict[str, Site]:
        """The observed sites of the model on the rows of a batch."""
        data = {**params, **self._latents(rng_key, params, batch, kwargs)}
        return run_model(batch.of(self._inner), batch.args, kwargs, rng_key, data=data).observed

    def _are_good_rows(
        self, rng_key: Array, params: dict[str, Any], batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Array:
        """Whether the model has a log density at every row of the data, and beside it; traced.

        :param batch: the first rows.
        """

        def are_good(v: Array, batch: Batch) -> Array:
            return are_possible(self._seen(rng_key, params, batch._replace(args=(v, *batch.args[1:])), kwargs))

        def of_batch(batch: Batch) -> Array:
            v = batch.args[0]
            places = jnp.stack([v, *(self._moved(key, v) for key in _keys_of_moves(rng_key, v))])
            return lax.map(partial(are_good, batch=batch), places).all() & ~self._loses_noise(rng_key, v)

        return over_rows(of_batch, batch, args[0]).all() & ~self._mixes_rows(rng_key, params, batch, kwargs)

    def _mixes_rows(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> Array:
        """Whether the score of some row of a batch changes where every second row is another."""
        model, (v, *rest) = batch.of(self._inner), batch.args
        data = {**params, **self._latents(rng_key, params, batch, kwargs)}
        score = jax.grad(lambda v: total(log_density_terms(model, (v, *rest), kwargs, own_key(rng_key), data=data)[0]))
        stays = (jnp.arange(len(v)) % 2 == 0).reshape(-1, *(1,) * (v.ndim - 1))
        here, there = score(v), score(jnp.where(stays, v, v + jnp.nanstd(v, 0)))
        return (stays & (jnp.abs(here - there) > ROUNDING * (1 + jnp.abs(here)))).any()

    def _moved(self, rng_key: Array, v: Array) -> Array:
        """Rows as the objective perturbs them, or as far from the data as these are from each other where it does not."""
        moved = self.objective.perturb(rng_key, v)
        return v + jnp.nanstd(v, 0) * jax.random.normal(rng_key, v.shape, v.dtype) if moved is v else moved

    def _loses_noise(self, rng_key: Array, v: Array) -> Array:
        """Whether the objective's noise leaves most of the numbers that it is for as they were, being less than their rounding."""
        moved, noise = (self.objective.perturb(rng_key, x) for x in (v, jnp.zeros_like(v)))
        return 2 * ((noise != 0) & (moved == v)).sum() > (noise != 0).sum()

    def _refuse(self, rng_key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        whole = whole_batch(self._programs, args, kwargs, rng_key, data=params)
        v = whole.args[0]
        for site in run_at_zero(whole.of(self._inner), whole.args, kwargs, rng_key, params).observed.values():
            require_data(site)
        if hasattr(self.objective, "refuse_data"):
            self.objective.refuse_data(v)
        self._refuse_guide(rng_key, params, whole, kwargs)
        require_possible(self._seen(rng_key, params, whole, kwargs), self._fix_of_density())
        if self._loses_noise(rng_key, v):
            raise ValueError(
                f"objective={self.objective!r}: its noise is less than the rounding of the data, which reach {abs(v).max():.3g} in "
                f"{v.dtype}, so that most of them stay as they are. Take more noise, or double precision."
            )
        first = self._first_batch(rng_key, params, args, kwargs)
        if self._mixes_rows(rng_key, params, first, kwargs):
            raise ValueError(
                "the score of one row of the first argument depends on other rows, by a factor outside their plate or by what the "
                "model makes of all of them, as a mean; and scores are matched row by row. Compute such things before, and pass "
                "them as arguments; put factors into the plate."
            )
        for key in _keys_of_moves(rng_key, v):
            places = whole._replace(args=(self._moved(key, v), *whole.args[1:]))
            for name, site in self._seen(rng_key, params, places, kwargs).items():
                bad = ~np.asarray(has_density(site))
                if bad.any():
                    has_noise = self.objective.perturb(rng_key, v) is not v
                    return self._refuse_boundary(name, f"{bad.sum()} of {bad.size}", has_noise=has_noise)

    def _explain(self, state: Any, bad: dict[Part, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if int(state.num_steps) or np.isfinite(self.evaluate(state, *args, **kwargs)):
            return super()._explain(state, bad, args, kwargs)
        return f"{NO_DERIVATIVE} What was seen: {named(bad)}."

    def _refuse_guide(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> None:
        """Raises for a guide that does not go with the model, where there is one; not traced."""

    def _refuse_boundary(self, site: str, where: str, *, has_noise: bool) -> None:
        """Refuses a density that ends beside the data; warns where that may be right.

        :raises ValueError: naming the site.
        """
        fix = "transform the data to real space, as by a log"
        if has_noise:
            raise NoDensityError(
                f"site '{site}': its log density is finite at the data, and not at {where} events that the noise of "
                f"{type(self.objective).__name__} has moved.",
                f"Scores do not see where a density ends, so that what is learned would be wrong: {fix}, or take less noise.",
            )
        warnings.warn(
            f"site '{site}': its log density is finite at the data, and not at {where} places beside them. Scores do not see where "
            f"a density ends: what is learned is right only if it goes to 0 there by itself. Else {fix}.",
            stacklevel=5,
        )


class _Watch:
    """A callback that keeps the state that is best on the validation rows, and ends a run that has found none for long enough."""

    def __init__(self, loss: Callable[[Any], Array], patience: int) -> None:
        self.loss, self.patience = loss, patience
        self.best, self.waited = math.inf, 0
        self.state: Any = None

    def __call__(self, step: int, state: Any, losses: np.ndarray) -> bool:
        value = float(self.loss(state))
        if self.state is None or value < self.best:
            self.best, self.state, self.waited = value, state, 0
        else:
            self.waited += 1
        return self.waited >= self.patience


def _judged(state: Any) -> Any:
    """A state with the one key that all of a run are compared with: else the noise of the objective decides."""
    return state._replace(rng_key=jax.random.key(0))


def _keys_of_moves(rng_key: Array, v: Array) -> Array:
    """Keys of so many moves of a batch that a boundary is met from few rows too, and a pass over many costs no more than two."""
    return jax.random.split(rng_key, min(32, max(1, 1024 // len(v))))


def require_params(program: Run, given: dict[str, Any], what: str = "the model") -> None:
    """Refuses a program without anything to learn, and starting values of what it does not have.

    :raises ValueError: naming the values.
    """
    if not program.params:
        raise ValueError(f"{what} has no param site, so that there is nothing to learn.")
    if unknown := sorted(set(given) - set(program.params)):
        raise ValueError(f"init_params names {unknown}, which is no param site: {what} has {sorted(program.params)}.")


def require_same_params(program: Run, params: dict[str, Any], what: str = "the model") -> None:
    """Refuses a state of another program.

    :raises ValueError: with the param sites of both.
    """
    if program.params.keys() != params.keys():
        raise ValueError(f"the state is of another program: its params are {sorted(params)}, {what} has {sorted(program.params)}.")
