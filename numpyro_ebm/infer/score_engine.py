# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the engines that match scores share: batches of the visible, and what they refuse.

The first argument of a model is the visible. A score is a derivative in it, which no normalizer has, so models run without
the guard of their energies.
"""

from typing import Any

from jax import Array

from numpyro_ebm._checks import require_count, require_instance
from numpyro_ebm.handlers import unnormalized
from numpyro_ebm.infer.engine import Engine
from numpyro_ebm.objectives.score import ScoreObjective
from numpyro_ebm.program.batch import Batch, drawn_batch, first_batch, whole_batch
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.run import Run, own_key
from numpyro_ebm.program.sites import Model, require_finite
from numpyro_ebm.program.visible import Visible, find_visible, require_batch, require_rows


class ScoreEngine(Engine):
    """An engine that learns a model by the scores of its visible."""

    def __init__(self, model: Model, objective: ScoreObjective, batch_size: int | None) -> None:
        super().__init__()
        wanted = "a score objective such as DenoisingScoreMatching(0.1)"
        self.model, self.objective = model, require_instance("objective", objective, ("perturb", "loss", "weight"), wanted)
        self.batch_size = None if batch_size is None else require_count("batch_size", batch_size)
        self._inner = unnormalized(model)

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

    def _refuse(self, rng_key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = whole_batch((self._inner,), args, kwargs, rng_key, data=params)
        _, program = find_visible(batch.of(self._inner), args, kwargs, rng_key, data=params)
        for site in program.observed.values():
            require_finite(site)


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
