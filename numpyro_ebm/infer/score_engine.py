# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the engines that match scores share: batches of the visible, and what they refuse.

The first argument of a model is the visible. A score is a derivative in it, which no normalizer has, so models run without
the guard of their energies.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_ebm._checks import require_count, require_instance
from numpyro_ebm.handlers import unnormalized
from numpyro_ebm.infer.engine import Engine
from numpyro_ebm.objectives.score import ScoreObjective
from numpyro_ebm.program.batch import Batch, drawn_batch, first_batch, over_rows, whole_batch
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.run import Run, own_key, require_unseeded, run_model
from numpyro_ebm.program.sites import Model, Site, events_inside, finite_events, has_density, require_data, require_density
from numpyro_ebm.program.visible import Visible, find_visible, require_batch, require_rows


class ScoreEngine(Engine):
    """An engine that learns a model by the scores of its visible."""

    def __init__(self, model: Model, objective: ScoreObjective, batch_size: int | None) -> None:
        super().__init__()
        wanted = "a score objective such as DenoisingScoreMatching(0.1)"
        self.model, self.objective = model, require_instance("objective", objective, ("perturb", "loss", "weight"), wanted)
        self.batch_size = None if batch_size is None else require_count("batch_size", batch_size)
        self._inner = unnormalized(model)
        require_unseeded("the model", model)

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

    def _inspect(self, rng_key: Array, data: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> tuple[Visible, Run]:
        """The visible and a run of the model, which is refused if no score could teach it."""
        model = batch.of(self._inner)
        visible, program = find_visible(model, batch.args, kwargs, rng_key, data=data)
        require_rows(program, visible)
        self.objective.perturb(rng_key, batch.args[0])  # which refuses a batch that is too small for it
        if program.mutable_state:
            raise ValueError(
                f"site '{next(iter(program.mutable_state))}': mutable sites are not kept by {type(self).__name__}: use a network "
                "without running statistics."
            )
        check_run(model, batch.args, kwargs, data=data, mark_visible=True).require_scores()
        return visible, program

    def _latents(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> dict[str, Array]:
        """Values of the latents for the rows of a batch, where there are any."""
        return {}

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

        def are_good(rows: Array, batch: Batch) -> Array:
            seen = self._seen(rng_key, params, batch._replace(args=(rows, *batch.args[1:])), kwargs)
            good = [f(site).all() for site in seen.values() for f in (finite_events, events_inside, has_density)]
            return jnp.asarray(good).all()

        def of_batch(batch: Batch) -> Array:
            v = batch.args[0]
            moved, _ = self._moved(rng_key, v)
            good = lax.map(partial(are_good, batch=batch), jnp.stack([v, moved])).all()
            return good & ~_is_lost(v, self.objective.perturb(rng_key, v))

        return over_rows(of_batch, batch, args[0]).all()

    def _moved(self, rng_key: Array, v: Array) -> tuple[Array, bool]:
        """Rows as the objective perturbs them, or beside the data where it does not; and whether it does."""
        perturbed = self.objective.perturb(rng_key, v)
        if perturbed is not v:
            return perturbed, True
        return v + v.std(0) * jax.random.normal(rng_key, v.shape, v.dtype), False

    def _refuse(self, rng_key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        whole = whole_batch((self._inner,), args, kwargs, rng_key, data=params)
        v = whole.args[0]
        for site in self._seen(rng_key, params, whole, kwargs).values():
            require_data(site)
            require_density(site)
        if _is_lost(v, self.objective.perturb(rng_key, v)):
            raise ValueError(
                f"objective={self.objective!r}: its noise is less than the rounding of the data, which reach {abs(v).max():.3g} in "
                f"{v.dtype}, so that most of them stay as they are. Take more noise, or double precision."
            )
        moved, is_noise = self._moved(rng_key, v)
        for site in self._seen(rng_key, params, whole._replace(args=(moved, *whole.args[1:])), kwargs).values():
            bad = ~np.asarray(has_density(site))
            if bad.any() and is_noise:
                raise ValueError(
                    f"site '{site['name']}': its log density is not finite at {bad.sum()} of {bad.size} events that the noise of "
                    f"{type(self.objective).__name__} has moved. Scores do not see where a density ends, and what is learned would be "
                    "wrong: transform the data to real space, as by a log, or take less noise."
                )
            if bad.any():
                warnings.warn(
                    f"site '{site['name']}': its log density is finite at the data, and not at {bad.sum()} of {bad.size} places beside "
                    "them. Scores do not see where a density ends: what is learned is right only if it goes to 0 there by itself. "
                    "Else transform the data to real space, as by a log.",
                    stacklevel=4,
                )


def _is_lost(v: Array, perturbed: Array) -> Array:
    """Whether noise has left most numbers as they were, because it is less than their rounding."""
    return jnp.asarray(False) if perturbed is v else (perturbed == v).mean() > 0.9


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
