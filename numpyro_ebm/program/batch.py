# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The rows of the visible that one step sees: those of a subsampled plate, or ``batch_size`` of them.

A score engine perturbs the rows of the first argument that its model sees, so that they cannot stay where the model takes them.
Under ``numpyro.plate("data", N, subsample_size=B)`` the model is given all rows as it was written for, and gets the perturbed
ones where it passes the argument through :func:`numpyro.subsample`. The plate then shows ``B`` of ``B`` rows: a mean over rows
knows no scale. Other arguments are gathered by the plate's indices as in NumPyro.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.handlers import substitute
from numpyro.primitives import Messenger

from numpyro_ebm._compat import open_plate
from numpyro_ebm.program.provenance import mark, sources
from numpyro_ebm.program.run import Run, run_model, terms_of
from numpyro_ebm.program.sites import Model, Site, is_latent, stand_in

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Batch(NamedTuple):
    """Rows of the visible, and how programs see them."""

    #: arguments of the programs, the first with the rows of the batch
    args: tuple[Any, ...]
    #: the subsampled plate of the rows; None where the programs have none
    plate: str | None = None
    #: (rows,) indices of the rows in the plate
    indices: Array | None = None
    #: the first argument that programs are called with, where they take the rows out of it
    whole: Array | None = None

    def of(self, program: Model) -> Model:
        """A program on these rows: a function of the arguments whose first is rows, as many as the batch has."""
        if self.plate is None:
            return program

        def on_rows(v: Array, *args: Any, **kwargs: Any) -> Any:
            with _Rows(self, v):
                return program(v if self.whole is None else self.whole, *args, **kwargs)

        return on_rows


class _Rows(Messenger):
    """Shows a program the rows of a batch in the place of those that its plate would take."""

    def __init__(self, batch: Batch, v: Array) -> None:
        super().__init__()
        self.batch, self.v, self.scale = batch, v, 1.0

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate" and msg["name"] == self.batch.plate:
            num_rows = len(self.v)
            self.scale = msg["args"][0] / num_rows
            msg["args"], msg["value"] = (num_rows, num_rows), self.batch.indices
        elif msg["type"] == "sample" and any(frame.name == self.batch.plate for frame in msg["cond_indep_stack"]):
            if self.scale != 1:
                msg["scale"] = msg["scale"] / self.scale
        elif msg["type"] == "subsample" and self._are_rows(msg["value"], msg["kwargs"]["event_dim"]):
            msg["value"] = self.v if msg["value"] is self.batch.whole else msg["value"]
            msg["kwargs"] = {**msg["kwargs"], "event_dim": None}  # no plate takes rows out of these

    def _are_rows(self, value: Array, event_dim: int) -> bool:
        """Whether a value stands for the rows of the batch: the first argument, or any where only these rows are given."""
        if self.batch.whole is not None:
            return value is self.batch.whole
        plate, shape = open_plate(self.batch.plate), jnp.shape(value)
        return plate is not None and len(shape) >= event_dim - plate.dim and shape[plate.dim - event_dim] == len(self.v)


Programs = Sequence[Model]  # of which the first has the plate of the rows, and the others may have


class _Plan(_Rows):
    """Finds the subsampled plates, and how many rows each says it has.

    A program is run as it is where the first argument has all rows. Where it has those that the plate shows, or are all to be
    shown that it has, NumPyro's plate would refuse them.
    """

    def __init__(self, v: Array, all_rows: bool) -> None:
        super().__init__(Batch((), None, jnp.arange(len(v))), v)
        self.all_rows, self.sizes = all_rows, dict[str, int]()

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate" and msg["args"][1] not in (None, msg["args"][0]):
            size, subsample_size = msg["args"]
            self.sizes[msg["name"]] = size
            if self.all_rows or len(self.v) == subsample_size:
                self.batch = self.batch._replace(plate=msg["name"])
        super().process_message(msg)


def drawn_batch(
    programs: Programs,
    args: Args,
    kwargs: Kwargs,
    rng_key: Array,
    *,
    data: dict[str, Any],
    batch_size: int | None,
    distinct: bool = False,
) -> Batch:
    """The rows of one step: those that the subsampled plate draws, else ``batch_size`` rows, else all.

    A ``batch_size`` of all rows gives them as they are: drawn again, they would meet what belongs to others wherever the program
    has covariates of its own, whose number is right.

    :param data: values of param and mutable sites by name.
    :param distinct: whether the ``batch_size`` rows are drawn without replacement, which costs an ordering of all rows; those of
        a plate always are.
    :raises ValueError: as :func:`first_batch`.
    """
    if batch_size is not None:
        _require_drawable(args, kwargs, batch_size)
        num_rows = len(args[0])
        if batch_size == num_rows:
            return Batch(args)
        if distinct:
            index = jax.random.choice(rng_key, num_rows, (batch_size,), replace=False)
        else:
            index = jax.random.randint(rng_key, (batch_size,), 0, num_rows)
        return Batch((args[0][index], *args[1:]))
    plate = _subsampled(programs[0], args, kwargs, rng_key, data)
    if plate is None:
        return Batch(args)
    return _own(programs, _in_plate(plate, args, plate.indices), kwargs, rng_key, data)


def first_batch(
    programs: Programs, args: Args, kwargs: Kwargs, rng_key: Array, *, data: dict[str, Any], batch_size: int | None
) -> Batch:
    """The first rows, as many as a step has: what there is to check of a program.

    :raises ValueError: if there are less; if another argument has rows beside ``batch_size``; if more than one plate is
        subsampled, or one beside ``batch_size``; if a program takes its rows out of the first argument otherwise than by
        :func:`numpyro.subsample`; naming the argument, the plate or the site, and the fix.
    """
    if batch_size is not None:
        _require_drawable(args, kwargs, batch_size)
    plate = _subsampled(programs[0], args, kwargs, rng_key, data)
    if plate is None:
        return Batch((args[0][:batch_size], *args[1:]))
    if batch_size is not None:
        raise ValueError(
            f"plate '{plate.name}' is subsampled, and batch_size={batch_size} would take a batch of that: leave batch_size out."
        )
    return _own(programs, _in_plate(plate, args, jnp.arange(len(plate.indices))), kwargs, rng_key, data)


def whole_batch(programs: Programs, args: Args, kwargs: Kwargs, rng_key: Array, *, data: dict[str, Any]) -> Batch:
    """All rows of the first argument, whatever their number.

    :raises ValueError: as :func:`first_batch`.
    """
    plate = _subsampled(programs[0], args, kwargs, rng_key, data, all_rows=True)
    if plate is None:
        return Batch(args)
    batch = Batch(args, plate.name, jnp.arange(len(args[0])))
    return batch if plate.size == len(args[0]) else _own(programs, batch, kwargs, rng_key, data)


def over_rows(fn: Callable[[Batch], Array], batch: Batch, v: Array) -> Array:
    """A function of batches like the first one, at batches that show every row of the visible at least once; stacked.

    :param v: all rows.
    """
    size, num_rows = len(batch.args[0]), len(v)
    if size == num_rows:
        return fn(batch)[None]
    index = (np.arange(0, num_rows, size)[:, None] + np.arange(size)) % num_rows  # the last begins again from the first row

    return lax.map(lambda rows: fn(at_rows(batch, v, rows)), jnp.asarray(index))


def at_rows(batch: Batch, v: Array, rows: Array) -> Batch:
    """A batch like the first one, of other rows of the visible.

    :param v: all rows.
    :param rows: indices of as many as the batch has.
    """
    return batch._replace(args=(v[rows], *batch.args[1:]), indices=None if batch.plate is None else rows)


def run_at_zero(program: Model, args: Args, kwargs: Kwargs, rng_key: Array, data: dict[str, Any]) -> Run:
    """A run of a program whose latent sites are 0, or what of their support is near, but for those in ``data``."""

    def value(site: Site) -> Array | None:
        return stand_in(site["fn"]) if is_latent(site) and site["name"] not in data else None

    with substitute(substitute_fn=value):
        return run_model(program, args, kwargs, rng_key, data=data)


def _require_drawable(args: Args, kwargs: Kwargs, batch_size: int) -> None:
    """Refuses rows that are too few, or would be drawn without what belongs to them in other arguments."""
    num_rows = len(args[0])
    if batch_size > num_rows:
        raise ValueError(f"batch_size={batch_size} is more than the {num_rows} rows of the first argument.")
    others = {f"argument {i}": arg for i, arg in enumerate(args) if i} | {f"argument '{name}'": arg for name, arg in kwargs.items()}
    for what, arg in others.items():
        # not of a network: how wide its layers are says nothing of rows
        arrays = jax.tree.leaves(arg, is_leaf=lambda x: not isinstance(x, (dict, list, tuple)))
        if any(x.shape[:1] == (num_rows,) for x in arrays if isinstance(x, (Array, np.ndarray))):
            raise ValueError(
                f"{what} has {num_rows} rows, as the first argument has, but batch_size={batch_size} draws rows of the first "
                "argument alone, and would pair them with rows that belong to others. Leave batch_size out and subsample the "
                f"plate, numpyro.plate(name, {num_rows}, subsample_size={batch_size}), with "
                "numpyro.subsample(x, event_dim=...) of each of these arguments."
            )


class _Plate(NamedTuple):
    name: str
    size: int
    indices: Array


def _subsampled(
    program: Model, args: Args, kwargs: Kwargs, rng_key: Array, data: dict[str, Any], *, all_rows: bool = False
) -> _Plate | None:
    """The one subsampled plate of a program, with the rows that it shows in this run, if there is one."""
    plan = _Plan(args[0], all_rows)
    with plan:
        run = run_at_zero(program, args, kwargs, rng_key, data)
    if len(plan.sizes) > 1:
        raise ValueError(
            f"plates {', '.join(map(repr, sorted(plan.sizes)))} are subsampled, and scores are matched row by row: subsample the "
            "plate of the rows of the first argument alone."
        )
    return next((_Plate(name, size, run.plates[name].indices) for name, size in plan.sizes.items()), None)


def _in_plate(plate: _Plate, args: Args, indices: Array) -> Batch:
    """The rows at the indices of a plate; those given, where the first argument has as many as the plate shows."""
    v, *rest = args
    if len(v) == plate.size:
        return Batch((v[indices], *rest), plate.name, indices, v)
    if len(v) == len(indices):
        return Batch(args, plate.name, indices)
    raise ValueError(
        f"plate '{plate.name}' shows {len(indices)} of {plate.size} rows, and the first argument has {len(v)}: it must have all "
        "rows, or those that the plate shows."
    )


def _own(programs: Programs, batch: Batch, kwargs: Kwargs, rng_key: Array, data: dict[str, Any]) -> Batch:
    """Refuses a program that takes its rows otherwise than a batch gives them: it would see other rows, in silence."""

    def densities(program: Model) -> dict[str, Array]:
        if batch.whole is None:
            marked = batch._replace(indices=mark(batch.indices, "indices"))
        else:  # the indices are those of the rows, and other arguments may be taken by them
            marked = batch._replace(whole=mark(batch.whole, "whole"))
        run = run_at_zero(marked.of(program), batch.args, kwargs, rng_key, data)
        return {name: term.sum() for name, term in terms_of(run).items()}

    for program in programs:
        for name, marks in sources(partial(densities, program)).items():
            if "whole" in marks:
                raise ValueError(
                    f"site '{name}': it uses the first argument in another way than by the rows that plate '{batch.plate}' shows. "
                    "Write numpyro.subsample(v, event_dim=...) of the argument v as it is, and use only the shape of v besides."
                )
            if "indices" in marks:
                raise ValueError(
                    f"site '{name}': it depends on the indices of plate '{batch.plate}', and nothing says which of its "
                    f"rows the {len(batch.args[0])} rows of the first argument are. Pass all rows of the plate."
                )
    return batch


def require_same_rows(runs: dict[str, Run]) -> None:
    """Refuses programs of which some show a part of the rows that the first shows, by their names.

    :raises ValueError: naming the plate.
    """
    first = next(iter(runs))
    for what, run in runs.items():
        for name, plate in run.subsampled.items():
            raise ValueError(
                f"plate '{name}' shows {len(plate.indices)} of {plate.size} rows in {what}, and all in {first}: subsample it in "
                "each, or give the engine batch_size instead."
            )
