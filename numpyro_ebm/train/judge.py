# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is looked at on the way of a fit, and the best state by it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.train.batches import Batches
from numpyro_ebm.train.loop import copied
from numpyro_ebm.train.source import Data, parts_of
from numpyro_ebm.train.svi import SVIProgress, plain

State = Any


class Judge:
    """What is looked at on the way, and the best state by it."""

    def __init__(self, learner: Any, validation: Any, patience: int | None, data: Data, *, has_rows: bool) -> None:
        self.learner, self.patience, self.data = learner, patience, data
        self.metrics: dict[str, list[float]] = {}
        self.best: Any = None
        self.waited = 0
        self._rows = None if validation is None or callable(validation) else self._read(validation, has_rows=has_rows)
        self._function = validation if callable(validation) else self._mean_loss

    def _read(self, validation: Any, *, has_rows: bool) -> Batches:
        if has_rows:
            raise ValueError(
                "validation= are rows, which have no particles: give a function of the state, such as one that estimates the log "
                "density of these rows."
            )
        if not isinstance(validation, Batches):
            raise TypeError(f"validation must be Batches or a function of the state, got a {type(validation).__name__}.")
        return validation

    def _mean_loss(self, state: State) -> float:
        """The mean of the loss, all with one key: else the noise of the engine decides."""
        assert self._rows is not None
        typed = jnp.issubdtype(state.rng_key.dtype, jax.dtypes.prng_key)
        key = jax.random.key(0, impl=jax.random.key_impl(state.rng_key)) if typed else jax.random.PRNGKey(0)
        state = state._replace(rng_key=key)
        return float(np.mean([float(self.learner.evaluate(state, self.data.rows(batch))) for batch in self._rows]))

    def look(self, step: int, state: State) -> str | None:
        """Looks at a state after some steps."""
        given = plain(state) if isinstance(state, SVIProgress) and self._rows is None else state
        said = self._function(copied(given))
        values = {name: float(x) for name, x in (said.items() if isinstance(said, Mapping) else [("validation", said)])}
        name, value = next(iter(values.items()))
        before = [x for x in self.metrics.get(name, ()) if not math.isnan(x)]
        for key, x in {"step": step, **values}.items():
            self.metrics.setdefault(key, []).append(x)
        if not before or value < min(before):
            self.waited = 0
            self.best = None if self.patience is None else parts_of(copied(state), None, self.learner)
        else:
            self.waited += 1
        return "patience" if self.patience is not None and self.waited >= self.patience else None

    def meta(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        names = [name for name in self.metrics if name != "step"]
        return {"metrics": self.metrics, "waited": self.waited, "metric": self.metrics[names[0]][-1] if names else None}

    def restore(self, tree: dict[str, Any], meta: dict[str, Any]) -> None:
        self.metrics.update(meta["metrics"])
        self.waited = meta["waited"]
        self.best = tree.get("best") if self.metrics else None
