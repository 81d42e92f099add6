# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the rows of the data are those of their plate, by its indices or from outside: looked at before anything is learned."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.primitives import Messenger

from numpyro_ebm.program.batch import run_at_zero
from numpyro_ebm.program.minibatch import Minibatch
from numpyro_ebm.program.provenance import are_gathered, mark, sources
from numpyro_ebm.program.run import Run, terms_of
from numpyro_ebm.program.sites import Model, Site, is_factor, is_latent


def require_rows_taken(
    what: str, model: Model, batch: Minibatch, rng_key: Array, *, num_rows: int | None, data: dict[str, Any] | None = None
) -> Run:
    """A run of a model on a minibatch, which is refused where it would take the rows for all data, or others for them.

    :param str what: what the program is called: ``"the model"``.
    :param num_rows: rows of the data, if that is known.
    :raises ValueError: if a plate has the size of the minibatch, or another than the data; if the model takes rows out of its
        arguments by the indices of the plate, which are those of rows that are not there.
    """
    batch = jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "__array__") else x, batch)  # NumPy's refuse what JAX clamps
    program = run_at_zero(model, (batch,), {}, rng_key, data or {})
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
        return [term.sum() for term in terms_of(run_at_zero(model, (marked,), {}, rng_key, data or {})).values()]

    if batch.index is not None and are_gathered("rows", "index", lambda: densities(batch.index, batch.args, batch.kwargs)):
        raise ValueError(
            f"{what} takes rows out of an argument by the indices of a plate, as in y[index]: the argument holds the {size} rows "
            "of the minibatch alone, and JAX would take its last row for all others. Write numpyro.subsample(y, event_dim=...)."
        )
    return program


def require_own_rows(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], rng_key: Array, *, data: dict[str, Any] | None = None
) -> None:
    """Refuses data that stay the same while a plate draws other rows in each step, of whom each keeps something of its own.

    Data that the program makes, all rows equal, may stay; so may rows that it gives the indices of itself, or a minibatch does.

    :raises ValueError: naming site and plate.
    """
    rows, fixed = _MarkedRows(), list[tuple[str, Any]]()

    def observed(run: Run) -> dict[str, Any]:
        return {name: site["value"] for name, site in run.observed.items() if not is_factor(site["fn"])}

    def marked() -> dict[str, Any]:
        with rows:
            run = run_at_zero(model, args, kwargs, rng_key, data or {})
        fixed[:] = [(name, frame) for name in observed(run) for frame in run.sites[name]["cond_indep_stack"]]
        return observed(run)

    found = sources(marked)
    fixed = [at for at in fixed if at[1].name in rows.drawn and not found[at[0]] & {_PLATE + at[1].name, _LATENT}]
    if not fixed:
        return
    with jax.ensure_compile_time_eval():  # what depends on no argument is known while it is traced
        sites = run_at_zero(model, args, kwargs, rng_key, data or {}).sites
        for name, frame in fixed:
            site = sites[name]
            if _differ(site["value"], frame.dim - site["fn"].event_dim, frame.size):
                raise ValueError(
                    f"site '{name}': plate '{frame.name}' draws {frame.size} of {rows.drawn[frame.name]} rows in each step, and "
                    "the data do not depend on which: other particles would meet them every time. Give all rows, and take those of "
                    f"the step by numpyro.subsample(y, event_dim={site['fn'].event_dim}). If these are all, write "
                    f"numpyro.plate('{frame.name}', {frame.size}). If they are a minibatch, say of which rows: Minibatch(index, "
                    "(y,)), as Batches do in fit. A value for all rows is a scalar."
                )


_PLATE, _LATENT = "plate:", "latent"


class _MarkedRows(Messenger):
    """Marks what a program draws anew: the rows of its plates, and its latents."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, int] = {}  # by plate its number of rows

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate" and msg["value"] is None:  # nobody has given them
            size, subsample_size = msg["args"]
            self.drawn[msg["name"]] = size
            msg["value"] = mark(jnp.arange(subsample_size), _PLATE + msg["name"])

    def postprocess_message(self, msg: Site) -> None:
        if is_latent(msg):
            msg["value"] = mark(msg["value"], _LATENT)


def _differ(value: Any, axis: int, num_rows: int) -> bool:
    """Whether data have rows along an axis that are not all known to be the same."""
    if jnp.ndim(value) < -axis or jnp.shape(value)[axis] != num_rows:  # one for all rows
        return False
    if isinstance(value, jax.core.Tracer) or num_rows == 1:  # the next may be another
        return True
    first = jnp.take(value, jnp.asarray([0]), axis)
    return not bool(((value == first) | ((value != value) & (first != first))).all())


def _num_rows(batch: Minibatch) -> int | None:
    return next((len(x) for x in jax.tree.leaves((batch.args, batch.kwargs)) if jnp.ndim(x)), None)
