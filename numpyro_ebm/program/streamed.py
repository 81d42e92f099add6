# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a model takes rows that come from outside: looked at once, before anything is learned from them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebm.program.minibatch import Minibatch
from numpyro_ebm.program.provenance import are_gathered, mark
from numpyro_ebm.program.run import Run, run_model, terms_of
from numpyro_ebm.program.sites import Model


def require_rows_taken(
    what: str, model: Model, batch: Minibatch, rng_key: Array, *, num_rows: int | None, data: dict[str, Any] | None = None
) -> Run:
    """A run of a model on a minibatch, which is refused where it would take the rows for all data, or others for them.

    :param str what: what the program is called: ``"the model"``.
    :param num_rows: rows of the data, if that is known.
    :raises ValueError: if no plate is subsampled, or one of another size than the data; if the model takes rows out of its arguments
        by the indices of the plate, which are those of rows that are not there.
    """
    program = run_model(model, (batch,), {}, rng_key, data=data)
    size = len(batch.index) if batch.index is not None else _num_rows(batch)
    for name, plate in program.plates.items():
        if not plate.is_subsampled and plate.size == size and size != num_rows:
            raise ValueError(
                f"plate '{name}' of {what} has size {size}, which is that of the minibatch: it must be that of all data, for which "
                f"these rows stand. Write numpyro.plate('{name}', N, subsample_size={size}) with the number N of all rows"
                f"{'' if num_rows is None else f', {num_rows}'}."
            )
    for name, plate in program.subsampled.items():
        if num_rows is not None and plate.size != num_rows:
            raise ValueError(
                f"plate '{name}' of {what} has size {plate.size}, and the data have {num_rows} rows: make them the same."
            )

    def densities(index: Any, args: Any, kwargs: Any) -> Any:
        marked = Minibatch(mark(index, "index"), mark(args, "rows"), mark(kwargs, "rows"), batch.places)
        return [term.sum() for term in terms_of(run_model(model, (marked,), {}, rng_key, data=data)).values()]

    if batch.index is not None and are_gathered("rows", "index", lambda: densities(batch.index, batch.args, batch.kwargs)):
        raise ValueError(
            f"{what} takes rows out of an argument by the indices of a plate, as in y[index]: the argument holds the {size} rows of "
            "the minibatch alone, and JAX would take its last row for all others. Write numpyro.subsample(y, event_dim=...)."
        )
    return program


def _num_rows(batch: Minibatch) -> int | None:
    return next((len(x) for x in jax.tree.leaves((batch.args, batch.kwargs)) if jnp.ndim(x)), None)
