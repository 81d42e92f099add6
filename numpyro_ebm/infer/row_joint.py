# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The joint density of rows and their latents, where the latents of a row are one vector of real numbers and bits."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import IdentityTransform

from numpyro_ebm.objectives.latent import Latents
from numpyro_ebm.program.rows import dim_of, per_row
from numpyro_ebm.program.run import Run, log_density_terms
from numpyro_ebm.program.sites import Model, Site, transform_of


class RowJoint:
    """Of the rows of one batch.

    :param args: the arguments of the model after the visible.
    :param plate: that of the rows.
    :param program: a run of the model on such a batch.
    """

    def __init__(
        self, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], rng_key: Array, plate: str, program: Run
    ) -> None:
        self._model, self._args, self._kwargs, self._rng_key, self._plate = model, args, kwargs, rng_key, plate
        self._latents = {name: _Latent(program.sites[name], plate) for name in sorted(program.latents)}

    @property
    def is_of_bits(self) -> bool:
        """Whether every discrete latent is a bit."""
        return all(latent.is_real or _are_bits(latent.support) for latent in self._latents.values())

    @property
    def size(self) -> int:
        """Elements of a vector."""
        return sum(latent.size for latent in self._latents.values())

    @property
    def are_bits(self) -> np.ndarray:
        """Whether an element of a vector is discrete, ``(size,)``."""
        return np.concatenate([np.full(latent.size, not latent.is_real) for latent in self._latents.values()])

    def vectors(self, h: Latents) -> Array:
        """Latents as unconstrained vectors, ``(rows, size)``."""
        return jnp.concatenate([latent.vectors(h[name]) for name, latent in self._latents.items()], 1)

    def latents(self, vectors: Array) -> Latents:
        """The latents that vectors stand for."""
        reals, bits = self._positions(vectors)
        return {name: self._latents[name].transform(value) for name, value in reals.items()} | bits

    def log_prob(self, params: dict[str, Any], v: Array, vectors: Array) -> Array:
        """The log density of every row and its vector."""
        reals, bits = self._positions(vectors)
        call = self._model, (v, *self._args), self._kwargs, self._rng_key
        with numpyro.validation_enabled(False):
            terms, program = log_density_terms(*call, data={**params, **bits}, latents=reals)
            return per_row(terms, program, self._plate)

    def _positions(self, vectors: Array) -> tuple[Latents, Latents]:
        """Unconstrained values of real sites, and values of others."""
        ends = np.cumsum([latent.size for latent in self._latents.values()])[:-1].tolist()
        reals, bits = Latents(), Latents()
        for (name, latent), part in zip(self._latents.items(), jnp.split(vectors, ends, 1), strict=True):
            (reals if latent.is_real else bits)[name] = latent.positions(part)
        return reals, bits


class _Latent:
    """One site, and where it stands in the vector of its row."""

    def __init__(self, site: Site, plate: str) -> None:
        fn = site["fn"]
        self.support, self.dtype = fn.support, jnp.result_type(site["value"])
        self.is_real = not fn.support.is_discrete
        self.transform: Any = transform_of(site) if self.is_real else IdentityTransform()
        self._constrained = fn.shape()
        shape = self.transform.inverse_shape(fn.shape())
        self._axis = len(fn.batch_shape) + (dim_of(site, plate) or 0)
        self._shape = shape[self._axis], *shape[: self._axis], *shape[self._axis + 1 :]
        self.size = math.prod(self._shape[1:])

    def vectors(self, value: Array) -> Array:
        value = jnp.broadcast_to(value, self._constrained)
        value = self.transform.inv(value).astype(jnp.result_type(float))
        return jnp.moveaxis(value, self._axis, 0).reshape(self._shape[0], -1)

    def positions(self, vectors: Array) -> Array:
        value = jnp.moveaxis(vectors.reshape(self._shape), 0, self._axis)
        return value if self.is_real else value.astype(self.dtype)


def _are_bits(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.boolean))
