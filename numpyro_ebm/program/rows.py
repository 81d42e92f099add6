# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Arrays with a row for all data, of which a step sees the rows of its batch.

An engine with ``batch_size`` draws rows of the first argument. Under a subsampled plate a latent site keeps
``(num_particles, size of the plate, ...)`` values. The plate's own indices say which rows a run of the model sees; they are
gathered before a step and scattered after it, in place when compiled, so that a step costs what its batch costs.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_ebm.program.run import Run
from numpyro_ebm.program.sites import Site

Values = dict[str, Array]  # by site
Indices = dict[str, Array]  # by subsampled plate, (subsample_size,)


def shared_plates(run: Run, names: Iterable[str]) -> list[str]:
    """The plates around all of these sites, outermost first."""
    sites = [run.sites[name] for name in names]
    dims = {frame.name: frame.dim for site in sites for frame in site["cond_indep_stack"]}
    seen = dims.keys() & run.plates.keys()  # those inside a scan are not
    shared = [plate for plate in sorted(seen) if all(dim_of(site, plate) is not None for site in sites)]
    return sorted(shared, key=lambda plate: dims[plate])


def row_plate(run: Run, names: Iterable[str], num_rows: int | None = None) -> str | None:
    """The plate whose rows are those of the data: the outermost around all of these sites, of ``num_rows`` rows if that is known.

    Every engine and objective asks here, so that what one of them takes for a row is a row for all of them. None if there is none.
    """
    plates = shared_plates(run, names)
    return next((plate for plate in plates if num_rows is None or len(run.plates[plate].indices) == num_rows), None)


def leading_plate(run: Run, name: str, num_rows: int) -> str | None:
    """The plate of the rows of a site that has them along the first axis of its value; None if there is none."""
    plate, site = row_plate(run, [name], num_rows), run.sites[name]
    return plate if plate is not None and dim_of(site, plate) == -len(site["fn"].batch_shape) else None


def dim_of(site: Site, plate: str) -> int | None:
    """Where a plate stands among the batch dims of a site, from the right; None where the site is not in it."""
    return next((frame.dim for frame in site["cond_indep_stack"] if frame.name == plate), None)


def per_row(terms: dict[str, Array], program: Run, plate: str) -> Array:
    """The log density of every row of a plate, of shape ``(rows,)``; every term must lie in that plate.

    The plate's own scale is taken out: the sum over rows is the log density of these rows alone.
    """
    frames = {name: {f.name: f.dim for f in site.get("cond_indep_stack", ())} for name, site in program.sites.items()}
    if plate not in program.plates:
        raise ValueError(
            f"there is no plate '{plate}', only {sorted(program.plates)}: model and guide need the same plate of rows."
        )
    size, rows = program.plates[plate].size, len(program.plates[plate].indices)
    if outside := [name for name in terms if plate not in frames[name]]:  # a site comes after its log Jacobian
        raise ValueError(f"site '{outside[-1]}' stands outside plate '{plate}': the rows of the plate do not factorize.")
    out = jnp.zeros(())
    for name, term in terms.items():
        term = jnp.moveaxis(jnp.atleast_1d(term), frames[name][plate], 0)
        out = out + term.reshape(len(term), -1).sum(-1)
    return jnp.broadcast_to(out * (rows / size), (rows,))


def mixes_rows(
    log_density: Callable[[dict[str, Array]], Array], x: dict[str, Array], axes: dict[str, int], rng_key: Array
) -> Array:
    """Whether the log density of a row changes where others do; told by differences between places near and far, traced.

    A derivative does not see a step, nor a term that is not there where it is taken.

    :param log_density: of every row, ``(rows,)``, at values by site.
    :param x: real values.
    :param axes: of each site's values, which is that of the rows.
    """
    num_rows = next(x[name].shape[axis] for name, axis in axes.items())
    is_even = jnp.arange(num_rows) % 2 == 0

    def along_rows(name: str, of_rows: Array) -> Array:
        return of_rows.reshape([-1 if i == axes[name] % x[name].ndim else 1 for i in range(x[name].ndim)])

    def elsewhere(key: Array, scale: Array) -> Values:
        keys = dict(zip(x, jax.random.split(key, len(x)), strict=True))
        return {name: scale * jax.random.normal(keys[name], value.shape, value.dtype) for name, value in x.items()}

    def changes(here: Values, there: Values) -> Array:
        changed = []
        for stays in (is_even, ~is_even):
            mixed = {name: jnp.where(along_rows(name, stays), here[name], there[name]) for name in here}
            before, after = log_density(here), log_density(mixed)
            differ = ~(abs(after - before) <= ROUNDING * (1 + abs(before))) & jnp.isfinite(before)
            changed.append((stays & differ).any())
        return jnp.stack(changed).any()

    next_to_each_other = {name: jnp.roll(value, 1, axes[name]) for name, value in x.items()}
    scales = jnp.repeat(jnp.asarray([0.3, 1.0, 3.0, 10.0]), 4)
    places = jax.vmap(elsewhere)(jax.random.split(rng_key, len(scales)), scales)

    def at(here_and_there: tuple[Values, Values]) -> Array:
        here, there = here_and_there
        return changes(x, here) | changes(here, there)

    following = jax.tree.map(lambda place: jnp.roll(place, 1, 0), places)
    return changes(x, next_to_each_other) | changes(next_to_each_other, x) | jax.lax.map(at, (places, following)).any()


def subsampled_indices(program: Run) -> Indices:
    """The rows that a run of the program saw, of the plates that do not show all."""
    return {name: plate.indices for name, plate in program.subsampled.items()}


def subsampled_places(program: Run) -> Indices:
    """Where what is kept for these rows lies."""
    return {name: plate.in_store for name, plate in program.subsampled.items()}


def gather(program: Run, places: Indices, name: str, store: Array) -> Array:
    """The rows of one site that a batch sees."""
    for plate, axis in program.latents[name].plates:
        if plate in places:
            store = jnp.take(store, places[plate], axis)
    return store


def scatter(program: Run, places: Indices, name: str, store: Array, rows: Array) -> Array:
    """The store of one site with the rows of a batch replaced."""
    axes = {axis % store.ndim: places[plate] for plate, axis in program.latents[name].plates if plate in places}
    if not axes:
        return rows
    if len(axes) == 1:
        ((axis, index),) = axes.items()
        return store.at[(slice(None),) * axis + (index,)].set(rows)
    return store.at[jnp.ix_(*(axes.get(i, jnp.arange(size)) for i, size in enumerate(store.shape)))].set(rows)


def by_site(function: Callable[..., Any], names: Any, *trees: Any) -> Any:
    """``function(name, *leaves)`` at the leaves that belong to a site, for pytrees that hold dictionaries of sites.

    Other leaves, such as counts, are those of the last tree.
    """

    def at(path: Any, *leaves: Any) -> Any:
        name = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in names), None)
        return leaves[-1] if name is None else function(name, *leaves)

    return jax.tree_util.tree_map_with_path(at, *trees)


def full_shape(shape: tuple[int, ...], program: Run, name: str) -> tuple[int, ...]:
    """The shape of a site's store, from that of the rows of a batch."""
    full = list(shape)
    for plate, axis in program.latents[name].plates:
        seen = program.plates[plate]
        full[axis] = seen.size if seen.places is None else len(seen.places)
    return tuple(full)


def all_batches(program: Run) -> Indices:
    """Batches that show every row at least once, stacked: by subsampled plate, ``(num_batches, subsample_size)``.

    Where the rows come from outside, it is the one batch that there is.
    """
    if any(plate.places is not None for plate in program.plates.values()):
        return {name: plate.indices[None] for name, plate in program.subsampled.items()}
    parts = []
    for plate in program.subsampled.values():
        size = len(plate.indices)
        starts = np.arange(0, plate.size, size)[:, None]
        parts.append((starts + np.arange(size)) % plate.size)  # the last batch begins again from the first row
    batches = list(itertools.product(*parts))
    return {name: jnp.asarray(np.stack([batch[i] for batch in batches])) for i, name in enumerate(program.subsampled)}


def some_batches(batches: Indices, most: int) -> Indices:
    """At most so many of these batches, evenly from the first to the last."""
    if not batches:
        return batches
    num_batches = len(next(iter(batches.values())))
    number = max(1, min(num_batches, most))
    some = np.arange(number) * num_batches // number
    return {name: indices[some] for name, indices in batches.items()}


# How much what is the same may differ by rounding, relative to 1 + its size.
ROUNDING = 1e-3
