# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What one step of particles sees: a run of the model on some rows of the data, and the log density there."""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from numpyro_ebm._map_over import map_over
from numpyro_ebm.program.rows import by_site, gather, scatter, subsampled_indices, subsampled_places
from numpyro_ebm.program.run import constrain_params, log_density_terms, run_model, total
from numpyro_ebm.program.sites import Model

Particles = dict[str, Array]  # by latent site, unconstrained, of shape (num_particles, ...)


class Gradients(NamedTuple):
    """The loss at a cloud, and its gradients."""

    loss: Array  # (), minus the mean over particles of the log joint density
    of_params: Any  # gradient of the loss
    scores: Particles  # of each particle, without the scale of its plates


class ParticleBatch:
    """One run of a model on some rows of the data: what a step needs to know, and its log joint density.

    :param data: values of param and mutable sites, and of the rows of subsampled plates if they are not to be drawn.
    :param particles: of all rows of the data, or of these.
    """

    def __init__(
        self,
        model: Model,
        data: dict[str, Any],
        particles: Particles,
        rng_key: Array,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.model = model
        self.terms = partial(log_density_terms, args=args, kwargs=kwargs, rng_key=rng_key)
        self.one = first(particles)
        self.program = run_model(model, args, kwargs, rng_key, data=data, latents=self.one)
        self.indices, self._places = subsampled_indices(self.program), subsampled_places(self.program)
        self._given = {**data, **self.indices}  # to another run on the same rows
        self.rows: dict[str, Any] = {}  # by latent site, once particle_rows.rows_of has looked

    def gather(self, stores: Any) -> Any:
        """The batch's rows of particles, or of what is kept with them."""
        return by_site(lambda name, x: gather(self.program, self._places, name, x), self.program.latents, stores)

    def scatter(self, stores: Any, rows: Any) -> Any:
        """All rows, with the batch's replaced."""
        return by_site(lambda name, *x: scatter(self.program, self._places, name, *x), self.program.latents, stores, rows)

    def data(self, theta: Any) -> dict[str, Any]:
        """What :attr:`terms` needs beside latents: values of param and mutable sites, and which rows."""
        return {**self._given, **constrain_params(theta, self.program.param_transforms)}

    def log_joint(self, theta: Any, x: Particles) -> Array:
        """The log joint density, summed over particles."""
        data = self.data(theta)
        return map_over(lambda x: total(self.terms(self.model, data=data, latents=x)[0]), x).sum()

    def loss(self, theta: Any, x: Particles) -> Array:
        return -self.log_joint(theta, x) / number_of(x)

    def gradients(self, theta: Any, x: Particles) -> Gradients:
        """One backward pass for parameters and particles together."""
        value, (of_params, of_x) = jax.value_and_grad(self.log_joint, (0, 1))(theta, x)
        of_params = jax.tree.map(lambda g: -g / number_of(x), of_params)
        return Gradients(-value / number_of(x), of_params, self._unscaled(of_x))

    def scores(self, theta: Any, x: Particles) -> Particles:
        """Scores of the particles alone."""
        return self._unscaled(jax.grad(self.log_joint, 1)(theta, x))

    def _unscaled(self, scores: Particles) -> Particles:
        # A plate's scale makes a batch stand for all data, which is meant for parameters: a row's own posterior has none.
        return {name: score / self.program.scale(name) for name, score in scores.items()}


def first(particles: Particles) -> Particles:
    """The first of them."""
    return {name: x[0] for name, x in particles.items()}


def number_of(particles: Particles) -> int:
    """How many there are."""
    return len(next(iter(particles.values())))
