# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Which rows of a latent site are accepted by themselves, and the terms of the log joint density that depend on each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebm._map_over import map_over
from numpyro_ebm.infer.particle_batch import ParticleBatch, Particles
from numpyro_ebm.program.provenance import mark, sources
from numpyro_ebm.program.rows import mixes_rows


class Rows:
    """The rows of one latent site that are accepted by themselves, and the terms of the density that depend on them."""

    def __init__(self, batch: ParticleBatch, name: str, behind: dict[str, "_Term"]) -> None:
        self.batch, self.name = batch, name
        program = batch.program
        self.terms = [term for term, found in behind.items() if name in found.sites]
        self.event_dim = program.latents[name].event_dim
        # NumPyro's word for independent rows: the plates that all of these terms are in
        self.plates = {
            plate: axis + self.event_dim
            for plate, axis in program.latents[name].plates
            if all(behind[term].has(plate, axis + self.event_dim, len(program.plates[plate].indices)) for term in self.terms)
        }
        subsampled = {plate for plate, _ in program.latents[name].plates if plate in program.subsampled}
        self.coupled = min(subsampled - set(self.plates), default=None)
        self._behind = behind

    def require_own(self) -> None:
        """Refuses rows of a subsampled plate that something outside it depends on.

        :raises ValueError: naming the sites and the plate.
        """
        if self.coupled is not None:
            outside = next(term for term in self.terms if self.coupled not in self._behind[term].dims)
            raise ValueError(
                f"site '{self.name}': site '{outside}' outside the subsampled plate '{self.coupled}' depends on it, so that its "
                "rows are not independent. Put it into the plate, or do not subsample."
            )

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of one number for each row and particle, from that of the particles."""
        kept = {dim - self.event_dim + len(shape) for dim in self.plates.values()}
        return tuple(size if axis == 0 or axis in kept else 1 for axis, size in enumerate(shape))

    def log_density(self, theta: Any, x: Particles) -> Array:
        """Of each row and particle, without the scale of its plates, of :meth:`shape_of` the particles."""
        data, shape = self.batch.data(theta), self.shape_of(x[self.name].shape)[1:]

        def one(x: Particles) -> Array:
            terms, _ = self.batch.terms(self.batch.model, data=data, latents=x)
            return sum((self.by_row(terms[term], shape) for term in self.terms), jnp.zeros(shape))

        return map_over(one, x) / self.batch.program.scale(self.name)

    def given_others(self, theta: Any, x: Particles) -> Callable[[Array], Array]:
        """The same as a function of this site, the others where they are."""
        others = {name: value for name, value in x.items() if name != self.name}
        return lambda value: self.log_density(theta, {**others, self.name: value})

    def by_row(self, term: Array, shape: tuple[int, ...]) -> Array:
        rest = tuple(axis for axis in range(term.ndim) if axis - term.ndim not in self.plates.values())
        return term.sum(rest).reshape(shape)


class _Term(NamedTuple):
    """A term of the log joint density."""

    sites: frozenset[str]  # latent sites that it depends on
    dims: dict[str, int]  # of the plates that it is in
    shape: tuple[int, ...]

    def has(self, plate: str, dim: int, size: int) -> bool:
        return self.dims.get(plate) == dim and len(self.shape) >= -dim and self.shape[dim] == size


def are_independent(batch: ParticleBatch, theta: Any, rng_key: Array) -> dict[str, Array]:
    """By latent site, whether its rows are independent given the rest, as its plates say, of which a sum over rows makes a lie.

    Where they are, weighing densities of rows weighs their scores by the same numbers, powers of two by which nothing is rounded;
    and no density of a row changes where others do, which tells of steps.

    :raises ValueError: as :meth:`Rows.require_own`.
    """
    mix_key, weigh_key = jax.random.split(rng_key)
    x = jax.tree.map(lambda x: x[None], batch.gather(batch.one))
    found = {}
    for name, rows in rows_of(batch, theta).items():
        rows.require_own()

        def weighed(value: Array, weights: Array, rows: Rows = rows, name: str = name) -> Array:
            return (weights * rows.log_density(theta, {**x, name: value})).sum()

        shape = rows.shape_of(x[name].shape)
        weights = 2.0 ** jax.random.randint(weigh_key, shape, 0, 16).astype(x[name].dtype)
        plain, seen = (jax.grad(weighed)(x[name], each) for each in (jnp.ones_like(weights), weights))
        event = tuple(i for i, (size, whole) in enumerate(zip(shape, plain.shape, strict=True)) if size != whole)
        tolerance = jnp.finfo(plain.dtype).eps ** 0.5 * jnp.abs(plain).max(event, keepdims=True, initial=0)
        found[name] = ~(jnp.abs(seen / weights - plain) > tolerance).any()
        for dim in rows.plates.values():
            found[name] &= ~_mixes(rows, theta, x, dim, mix_key)
    return found


def _mixes(rows: Rows, theta: Any, x: Particles, dim: int, rng_key: Array) -> Array:
    """Whether the log density of a row of the plate at ``dim`` changes where others do."""

    def of_rows(value: dict[str, Array]) -> Array:
        density = rows.log_density(theta, {**x, rows.name: value[rows.name][None]})
        axis = dim - rows.event_dim + density.ndim
        return density.sum(tuple(i for i in range(density.ndim) if i != axis))

    one = {rows.name: x[rows.name][0]}
    return mixes_rows(of_rows, one, {rows.name: dim - rows.event_dim}, rng_key)


def rows_of(batch: ParticleBatch, theta: Any) -> dict[str, Rows]:
    """By latent site, its rows; told from the trace of the model, once, and nothing is computed."""
    if batch.rows:
        return batch.rows
    data, particles = batch.data(theta), batch.one
    dims: dict[str, dict[str, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def terms() -> dict[str, Array]:
        marked = {name: mark(x, name) for name, x in particles.items()}
        found, run = batch.terms(batch.model, data=data, latents=marked)
        for name, term in found.items():
            dims[name] = {frame.name: frame.dim for frame in run.sites[name].get("cond_indep_stack", ())}
            shapes[name] = jnp.shape(term)
        return found

    behind = {name: _Term(marks, dims[name], shapes[name]) for name, marks in sources(terms).items()}
    batch.rows.update({name: Rows(batch, name, behind) for name in batch.program.latents})
    return batch.rows
