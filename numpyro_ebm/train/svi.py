# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""NumPyro's ``SVI`` as a learner of the loop: its steps, with a health of their own."""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState

from numpyro_ebm._compat import one_at_a_time
from numpyro_ebm._pytree import Rest, arrays_and_rest, as_array, join, require_hashable
from numpyro_ebm.program.minibatch import Minibatch, taking_rows
from numpyro_ebm.train.health import Health, NonFiniteError, Part, health_of, named
from numpyro_ebm.train.steps import Steps


class SVIProgress(NamedTuple):
    """A state of SVI that counts its steps."""

    optim_state: Any
    mutable_state: Any
    rng_key: Array
    num_steps: Array
    num_skipped: Array


class SVISteps:
    """SVI on minibatches."""

    state_class = SVIProgress

    def __init__(self, svi: SVI) -> None:
        self._given, self.svi = svi, copy.copy(svi)
        self.svi.model, self.svi.guide = taking_rows(svi.model), svi.guide
        if isinstance(svi.guide, AutoGuide):  # which is called as it is, and runs a model of its own
            svi.guide.model = taking_rows(svi.guide.model)
        else:
            self.svi.guide = taking_rows(svi.guide)
        self._steps = Steps(self._propose)
        self._loss = jax.jit(self._evaluate, static_argnames="static")

    def __getstate__(self) -> dict[str, Any]:
        return {"svi": self._given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["svi"])  # type: ignore[misc]

    def init(self, rng_key: Array, batch: Minibatch, init_params: dict[str, Any] | None = None) -> SVIProgress:
        """The state to start from."""
        with one_at_a_time:
            state = self.svi.init(rng_key, batch, init_params=init_params)
        self._given.constrain_fn = self.svi.constrain_fn  # as init of its own would have done
        return counting(state)

    def evaluate(self, state: SVIProgress, batch: Minibatch) -> Array:
        """The loss at a state."""
        return self._loss(state, *self._split((batch,), {}))

    def get_params(self, state: SVIProgress) -> dict[str, Any]:
        return self.svi.get_params(plain(state))

    def _require_state(self, state: Any, name: str = "state") -> SVIProgress:
        if isinstance(state, SVIProgress):
            return state
        if not isinstance(state, SVIState):
            raise TypeError(f"{name} must be an SVIState, got a {type(state).__name__}: pass result.state of a fit of this SVI.")
        return counting(state)

    def _of_minibatch(self, batch: Minibatch, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch,), kwargs

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Array], Rest]:
        arrays, rest = arrays_and_rest((args, kwargs))
        return [as_array("an argument of the model", x) for x in arrays], require_hashable("an argument of the model", rest)

    def _propose(self, state: SVIProgress, dynamic: Any, *, static: Rest) -> tuple[SVIProgress, Array, Health]:
        (batch,), _ = join(dynamic, static)
        with one_at_a_time:
            new, loss = self.svi.update(plain(state), batch)
        health = health_of("loss", loss) | health_of("param", self.svi.optim.get_params(new.optim_state))
        made = state._replace(optim_state=new.optim_state, mutable_state=new.mutable_state, rng_key=new.rng_key)
        return made, loss, health

    def _evaluate(self, state: SVIProgress, dynamic: Any, static: Rest) -> Array:
        (batch,), _ = join(dynamic, static)
        with one_at_a_time:
            return self.svi.evaluate(plain(state), batch)

    def _warnings(self, state: SVIProgress, before: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        return []

    def _error(
        self, state: SVIProgress, bad: dict[Part, int], step: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NonFiniteError:
        (batch,) = args
        leaves = jax.tree_util.tree_flatten_with_path((batch.args, batch.kwargs))[0]
        numbers = [(path, x) for path, x in leaves if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)]
        in_data = [path for path, x in numbers if not jnp.isfinite(x).all()]
        if in_data:
            where = f"argument {jax.tree_util.keystr(in_data[0][1:])} of this batch has values that are not finite"
            text = f"{named(bad)} would no longer be finite: {where}"
        else:
            text = (
                "the likely cause is too large a learning rate: take a smaller one, or clip the gradient. What was seen: "
                f"{named(bad)} would no longer be finite"
            )
        return NonFiniteError(f"step {step}: {text}. The state before is in .state.", state, step, bad)


def counting(state: SVIState) -> SVIProgress:
    """A state of SVI whose steps are counted from here on."""
    none = jnp.zeros((), jnp.int32)
    return SVIProgress(state.optim_state, state.mutable_state, state.rng_key, none, none)


def plain(state: Any) -> SVIState:
    """A state as SVI has it."""
    return SVIState(state.optim_state, state.mutable_state, state.rng_key)


def steps_of(svi: SVI) -> SVISteps:
    """The steps of an SVI, compiled once for it."""
    return vars(svi).setdefault("_numpyro_ebm_steps", SVISteps(svi))
