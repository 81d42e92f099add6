# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Rows that come from outside: arguments that hold a batch, of a model that was written for all rows.

Under ``numpyro.plate("data", N, subsample_size=B)`` the model takes its rows by :func:`numpyro.subsample`. Where the arguments hold
``B`` rows already, the plate keeps its size ``N`` and is told which of its rows they are; nothing is taken out of them again.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from numpyro.primitives import Messenger

from numpyro_ebm._compat import PLACES, open_plate
from numpyro_ebm.program.sites import Model, Site


class Minibatch(NamedTuple):
    """Rows of the data, what a model is called with for them.

    ``engine.update(state, Minibatch(index, (y[index],)))`` is a step on these rows alone, of a model with
    ``numpyro.plate("data", N, subsample_size=B)`` and ``numpyro.subsample(y, event_dim=...)``.
    """

    #: (B,) which rows of the plate they are; None where that is not known and does not matter
    index: Any
    #: arguments of the model, arrays of them with B rows
    args: tuple[Any, ...] = ()
    #: arguments by name
    kwargs: dict[str, Any] = {}
    #: (B,) where the state of :class:`~numpyro_ebm.ParticleMMLE` keeps their particles, if it has not those of all rows
    places: Any = None


def minibatch_of(args: tuple[Any, ...]) -> Minibatch | None:
    """The minibatch that a model is called with, if it is."""
    return args[0] if len(args) == 1 and isinstance(args[0], Minibatch) else None


def taking_rows(model: Model) -> Model:
    """A model that may be called with a :class:`Minibatch` in the place of its arguments."""

    def on_rows(*args: Any, **kwargs: Any) -> Any:
        batch = minibatch_of(args)
        if batch is None:
            return model(*args, **kwargs)
        with rows_given(batch):
            return model(*batch.args, **{**kwargs, **batch.kwargs})

    return on_rows


class rows_given(Messenger):
    """Tells the subsampled plate of a model which rows the arguments hold.

    :raises ValueError: if two plates are subsampled, of which either could be that of the rows.
    """

    def __init__(self, batch: Minibatch) -> None:
        super().__init__()
        self.index, self.places = batch.index, batch.places
        self.num_rows = None if batch.index is None else len(batch.index)
        self.plate: str | None = None

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate" and msg["args"][1] not in (None, msg["args"][0]):
            self._take(msg)
        elif msg["type"] == "subsample" and self._are_rows(msg["value"], msg["kwargs"]["event_dim"]):
            msg["kwargs"] = {**msg["kwargs"], "event_dim": None}  # no plate takes rows out of these

    def _take(self, msg: Site) -> None:
        name, (size, subsample_size) = msg["name"], msg["args"]
        if self.plate not in (None, name):
            raise ValueError(
                f"plates '{self.plate}' and '{name}' are subsampled, and the rows of a minibatch are those of one: leave "
                "subsample_size out of the other."
            )
        if self.num_rows not in (None, subsample_size):
            raise ValueError(
                f"plate '{name}' shows {subsample_size} of {size} rows, and the minibatch has {self.num_rows}: give the plate "
                f"subsample_size={self.num_rows}, or take batches of {subsample_size}."
            )
        self.plate, self.num_rows = name, subsample_size
        if self.index is not None:
            msg["value"] = jnp.asarray(self.index)
        if self.places is not None:
            msg[PLACES] = jnp.asarray(self.places)

    def _are_rows(self, value: Any, event_dim: int) -> bool:
        plate, shape = open_plate(self.plate), jnp.shape(value)
        return plate is not None and len(shape) >= event_dim - plate.dim and shape[plate.dim - event_dim] == self.num_rows
