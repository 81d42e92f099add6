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

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.distributions import Distribution
from numpyro.distributions.util import sum_rightmost

from numpyro_ebm.distributions.energy import energy_site, with_core
from numpyro_ebm.distributions.known import is_known, log_prob_inside
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.infer.particle_batch import ParticleBatch, Particles
from numpyro_ebm.infer.particle_rows import Rows, rows_of
from numpyro_ebm.program.sites import transform_of
from numpyro_ebm.samplers.mala import metropolis

LogDensity = Callable[[Array], Array]


class _Weighed(NamedTuple):
    """Particles of a site, and the log density of each row and particle over that of the reference."""

    x: Array
    log_weight: Array


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

    def __call__(self, rng_key: Array, log_density: LogDensity, x: Array, value: Array, num_jumps: int) -> Array:
        """Particles after ``num_jumps`` jumps.

        :param log_density: of each row and particle.
        :param value: its value at ``x``.
        """

        def jump(at: _Weighed, key: Array) -> tuple[_Weighed, None]:
            return self.once(key, log_density, at)[0], None

        begin = _Weighed(x, self.log_weight(x, value))
        return lax.scan(jump, begin, jax.random.split(rng_key, num_jumps))[0].x

    def once(self, rng_key: Array, log_density: LogDensity, old: "_Weighed") -> tuple["_Weighed", Array]:
        """Particles after a jump, and with which probability each row and particle took it."""
        propose_key, accept_key = jax.random.split(rng_key)
        x = self.transform.inv(self.reference.sample(propose_key, (len(old.x),))).astype(old.x.dtype)
        new = _Weighed(x, self.log_weight(x, log_density(x)))
        log_ratio = new.log_weight - old.log_weight
        probability = metropolis(log_ratio)
        taken = jax.random.bernoulli(accept_key, probability)
        return jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, old), probability

    def log_weight(self, x: Array, log_density: Array) -> Array:
        """The log density of each row and particle over that of the reference; from where it is not known any jump is taken."""
        weight = log_density - jax.vmap(self._log_reference)(x).reshape(log_density.shape)
        return jnp.where(jnp.isnan(weight), -jnp.inf, weight)

    def _log_reference(self, x: Array) -> Array:
        """The log density of the reference at unconstrained values of one particle."""
        value = self.transform(x)
        log_det = self.transform.log_abs_det_jacobian(x, value)
        log_det = sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + self.reference.event_dim)
        return self.rows.by_row(log_prob_inside(self.reference, value) + log_det, self.rows.shape_of((1, *x.shape))[1:])


def jumped(batch: ParticleBatch, theta: Any, x: Particles, rng_key: Array, num_jumps: int) -> Particles:
    """Jumps alone, of one latent site after the other; sites that have nothing to jump from stay."""
    for i, (name, rows) in enumerate(rows_of(batch, theta).items()):
        if (jumps := Jumps.of(batch, rows)) is not None:
            log_density, key = rows.given_others(theta, x), jax.random.fold_in(rng_key, i)
            x = {**x, name: jumps(key, log_density, x[name], log_density(x[name]), num_jumps)}
    return x


# What jumps tell of a fit.

DISTANCE = "distance of particles from posterior"
NUM_JUMPS = 50
MOST_NUMBERS = 2**16  # that jump
TO_JUDGE = 1 / NUM_JUMPS  # mean acceptance: a particle has jumped about once
# A prior adapts to the particles, and hides most of what is wrong: where .48 was learned for .72, jumps took .07 of them across.
TOLERANCE, MORE_UNADJUSTED = 0.02, 0.01  # whose spread is too large by a sixth where h times the curvature is a third


class JumpNumbers(NamedTuple):
    """What jumps at fixed parameters, which do not change the posterior, do to the particles of a site."""

    #: (), mean acceptance probability
    acceptance: Array
    #: ``(values, elements)``, particles of all rows together
    before: Array
    #: the same after jumps
    after: Array
    #: (), whether rows are independent given the rest
    is_known: Array


def jump_numbers(rng_key: Array, batch: ParticleBatch, rows: dict[str, Rows], theta: Any, x: Particles) -> dict[str, JumpNumbers]:
    """By latent site that has something to jump from; traced.

    :param rows: of every latent site.
    """
    all_jumps = {name: jumps for name in rows if (jumps := Jumps.of(batch, rows[name])) is not None}
    if any(each.coupled for each in rows.values()):
        return dict.fromkeys(all_jumps, JumpNumbers(*map(jnp.asarray, (0.0, [[0.0]], [[0.0]], False))))
    most = max(1, MOST_NUMBERS // max(value[0].size for value in x.values()))
    numbers, x = {}, {name: value[:most] for name, value in x.items()}
    for i, (name, jumps) in enumerate(all_jumps.items()):
        log_density = rows[name].given_others(theta, x)
        after, acceptance, is_known = _while_accepted(jax.random.fold_in(rng_key, i), jumps, log_density, x[name])
        numbers[name] = JumpNumbers(acceptance, _together(rows[name], x[name]), _together(rows[name], after), is_known)
        x = {**x, name: after}
    return numbers


def _while_accepted(rng_key: Array, jumps: Jumps, log_density: LogDensity, x: Array) -> tuple[Array, Array, Array]:
    """Particles after so many jumps, or after the first if hardly one is accepted; the mean acceptance; and whether rows are
    independent: each was weighed where the others had jumped too, and weighs the same where they have not.
    """

    def goes_on(carry: tuple[Array, _Weighed, Array]) -> Array:
        count, _, total = carry
        return (count < NUM_JUMPS) & (total >= count * TO_JUDGE)

    def jump(carry: tuple[Array, _Weighed, Array]) -> tuple[Array, _Weighed, Array]:
        count, at, total = carry
        at, probability = jumps.once(jax.random.fold_in(rng_key, count), log_density, at)
        return count + 1, at, total + probability.mean()

    def weigh(x: Array) -> Array:
        return jumps.log_weight(x, log_density(x))

    begin = jnp.zeros((), jnp.int32), _Weighed(x, weigh(x)), jnp.zeros(())
    count, at, total = lax.while_loop(goes_on, jump, begin)
    is_known = jnp.isclose(weigh(at.x), at.log_weight, rtol=1e-3, atol=1e-2).all()
    return at.x, total / count, is_known


def _together(rows: Rows, x: Array) -> Array:
    """Particles of all rows, ``(values, elements)``."""
    kept = rows.shape_of(x.shape)
    axes = [axis for axis, size in enumerate(x.shape) if size == kept[axis]]
    return jnp.moveaxis(x, axes, range(len(axes))).reshape(math.prod(kept), -1)


def _distance(before: np.ndarray, after: np.ndarray) -> float:
    """The largest difference of the distribution functions of an element; here, since a sort takes long to compile."""
    deciles = np.quantile(before, np.linspace(0.1, 0.9, 9), axis=0).astype(before.dtype)
    return max(float(abs((before <= decile).mean(0) - (after <= decile).mean(0)).max()) for decile in deciles)


def jump_findings(numbers: dict[str, JumpNumbers], *, is_adjusted: bool) -> list[Finding]:
    """What these numbers say."""
    more = "take more num_jumps" if is_adjusted else "take kernel='mala', whose particles jump between modes"
    fix = (
        "particles do not cross between the modes of their posterior. The weights of these modes are then those of the start, in "
        f"the prior that has learned from them too: {more}"
    )
    tolerance = TOLERANCE if is_adjusted else TOLERANCE + MORE_UNADJUSTED
    found = []
    for site, of_site in numbers.items():
        acceptance = float(of_site.acceptance)
        if not of_site.is_known:
            found.append(not_told(site, DISTANCE, "the rows of its plates depend on each other"))
            continue
        found.append(Finding(site, "acceptance of jumps of particles", acceptance, None, None, ""))
        if acceptance < TO_JUDGE:
            why = "jumps from its reference are hardly accepted, and modes that particles do not cross between are not seen"
            found.append(not_told(site, DISTANCE, why))
            continue
        noise, distance = 0.5 * math.sqrt(2 / len(of_site.before)), _distance(*map(np.asarray, of_site[1:3]))
        found.append(Finding(site, DISTANCE, distance, None, tolerance + 3 * noise, fix))
    return found
