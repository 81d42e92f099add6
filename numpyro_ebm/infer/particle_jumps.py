# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Jumps of particles between the modes of their posterior.

Local moves do not cross between modes that are far apart, and particles that never do say nothing of how much weight a mode has in
the posterior: the prior that learns from them then gives it what they had at the start, and no chain of the prior tells. As for
negative chains (:class:`~numpyro_ebm.MALA`) a jump is a proposal from the reference of the energy, which does not depend on where
a particle stands. Every row and particle accepts it by itself, with the Metropolis-Hastings probability

.. math:: \min \Big( 1, \frac{p(x', y) \, b(x)}{p(x, y) \, b(x')} \Big),

which leaves the posterior exactly as it is. Of an energy prior :math:`b(x) \, e^{-E(x)}` it is that of energy and likelihood alone.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.distributions import Distribution
from numpyro.distributions.util import sum_rightmost

from numpyro_ebm.distributions.energy import energy_site, with_core
from numpyro_ebm.distributions.known import is_known, log_prob_inside
from numpyro_ebm.infer.particle_batch import ParticleBatch
from numpyro_ebm.infer.particle_rows import Rows
from numpyro_ebm.program.sites import transform_of


class Jumped(NamedTuple):
    """Particles of one site after jumps, and the acceptance probability of each row and particle, its mean over the jumps."""

    x: Array
    acceptance: Array


class Jumps:
    """The jumps of one latent site, of the batch's rows."""

    def __init__(self, batch: ParticleBatch, rows: Rows, reference: Distribution) -> None:
        self.rows, self.reference = rows, reference
        self.transform = transform_of(batch.program.sites[rows.name])

    @classmethod
    def of(cls, batch: ParticleBatch, rows: Rows) -> Self | None:
        """None where there is nothing to jump from: no energy, or one without a reference."""
        site = batch.program.sites[rows.name]
        energy = energy_site(site["fn"])
        reference = None if energy is None else energy._reference()
        if energy is None or reference is None:
            return None
        # with the plates around it; a masked row has no density, and stays
        fn = with_core(site["fn"], lambda core: reference.expand(core.batch_shape))
        is_whole = fn.shape() == jnp.shape(site["value"])  # which a site inside control_flow.scan is not
        return cls(batch, rows, fn) if is_known(fn) and is_whole else None

    def __call__(self, rng_key: Array, log_density: Callable[[Array], Array], x: Array, value: Array, num_jumps: int) -> Jumped:
        """Particles after ``num_jumps`` jumps.

        :param log_density: of each row and particle.
        :param value: its value at ``x``.
        """

        def jump(carry: tuple[Array, Array, Array], key: Array) -> tuple[tuple[Array, Array, Array], None]:
            x, weight, acceptance = carry
            propose_key, accept_key = jax.random.split(key)
            new = self.transform.inv(self.reference.sample(propose_key, (len(x),))).astype(x.dtype)
            new_weight = self._log_weight(new, log_density(new))
            log_ratio = new_weight - weight
            probability = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
            taken = jax.random.bernoulli(accept_key, probability)
            x, weight = jnp.where(taken, new, x), jnp.where(taken, new_weight, weight)
            return (x, weight, acceptance + probability / num_jumps), None

        weight = self._log_weight(x, value)
        (x, _, acceptance), _ = lax.scan(jump, (x, weight, jnp.zeros_like(weight)), jax.random.split(rng_key, num_jumps))
        return Jumped(x, acceptance)

    def _log_weight(self, x: Array, log_density: Array) -> Array:
        """The log density of each row and particle over that of the reference; from where it is not known any jump is taken."""
        weight = log_density - jax.vmap(self._log_reference)(x).reshape(log_density.shape)
        return jnp.where(jnp.isnan(weight), -jnp.inf, weight)

    def _log_reference(self, x: Array) -> Array:
        """The log density of the reference at unconstrained values of one particle."""
        value = self.transform(x)
        log_det = self.transform.log_abs_det_jacobian(x, value)
        log_det = sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + self.reference.event_dim)
        return self.rows.by_row(log_prob_inside(self.reference, value) + log_det, self.rows.shape_of((1, *x.shape))[1:])
