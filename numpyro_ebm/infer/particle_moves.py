# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""How the particles of a batch move at fixed parameters: unadjusted Langevin, dynamics of the user, or Metropolis-adjusted.

Adjusted moves go site by site. A proposal :math:`x' = x + h \, \nabla \log p(x) + \sqrt{2h} \, \xi` is accepted with the
Metropolis-Hastings probability by every row of a site and every particle for itself, from the terms of the log joint density
that depend on this row, so that the posterior at these parameters is exactly stationary at every h. Each row has a step of its own,

.. math:: \log h \leftarrow \log h + \kappa_t \, (\bar a - .574), \qquad \kappa_t = \kappa_0 \, (1 + t / t_0)^{-.6},

with :math:`\bar a` the mean acceptance probability over the particles at the row's move t. The gain vanishes, and steps that
are fixed in the end leave no bias. As in :class:`~numpyro_ebm.MALA` a fraction of the moves is shrunk tenfold, and so on, for a
particle that stands where the posterior is much steeper than elsewhere. Moves end with the :class:`Jumps` of a site.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import numpyro_ebm.optim as optim_module
from numpyro_ebm.infer.particle_batch import Gradients, ParticleBatch, Particles
from numpyro_ebm.infer.particle_jumps import Jumps, jumped
from numpyro_ebm.infer.particle_rows import rows_of
from numpyro_ebm.samplers.mala import metropolis

TARGET_ACCEPTANCE = 0.574
GAIN, GAIN_DELAY, GAIN_POWER = 0.5, 20.0, 0.6  # kappa_0, t_0: 40 moves from .1 to 1e-4
LEAST_ACCEPTANCE = 0.15  # of a row that moves well enough to be believed
SLOW = "a row's moves are hardly accepted, and its particles may stand where they started: take more num_moves, or look at the row"
ACCEPTANCE_RATE = 0.02  # of its running mean
SMALL_MOVES = 0.25  # the fraction that is shrunk tenfold, the same of those a hundredfold, and so on
LOG_STEPS = (np.log(1e-20), np.log(1e8))  # where there is no density every step is accepted: it must not grow forever

Steps = dict[str, Array]  # by latent site, the step h


class AdaptedMoves(NamedTuple):
    """What Metropolis-adjusted moves keep, by latent site: one number for each row, of the particles' shape with 1 elsewhere."""

    #: the steps h in use
    step_size: dict[str, Array]
    #: running mean of the particles' acceptance probability at full steps; it starts at .574
    acceptance: dict[str, Array]

    @classmethod
    def start(cls, batch: ParticleBatch, theta: Any, particles: Particles, step_size: Steps) -> Self:
        """Before the first move of particles."""
        shapes = {name: rows.shape_of(particles[name].shape)[1:] for name, rows in rows_of(batch, theta).items()}
        like = {name: (shape, jnp.promote_types(particles[name].dtype, jnp.float32)) for name, shape in shapes.items()}
        steps = {name: jnp.full(shape, step_size[name], dtype) for name, (shape, dtype) in like.items()}
        return cls(steps, {name: jnp.full_like(step, TARGET_ACCEPTANCE) for name, step in steps.items()})


class Moved(NamedTuple):
    """What the moves of a step made."""

    x: Particles
    kept: Any  # by the dynamics, or AdaptedMoves
    seen: Particles  # the cloud that the parameters see
    gradients: Gradients  # there, or their mean along the way


class How(NamedTuple):
    """One move: what differs between those of a step."""

    rng_key: Array
    noise: Any  # with noise (1) or without (0)
    num_before: Array  # moves of the rows before


class Moves:
    """The moves of one step, by the settings of :class:`~numpyro_ebm.ParticleMMLE`."""

    def __init__(self, kernel: str, dynamics: Any, order: str, num_moves: int, average_moves: bool, num_jumps: int = 0) -> None:
        self.is_adjusted, self.dynamics = kernel == "mala", dynamics
        self.is_jacobi, self.num_moves, self.average_moves = order == "jacobi", num_moves, average_moves
        self.num_jumps = num_jumps

    def init(self, batch: ParticleBatch, theta: Any, particles: Particles, step_size: Steps) -> Any:
        """What moves keep between steps, for particles of all rows of the data."""
        if self.is_adjusted:
            return AdaptedMoves.start(batch, theta, particles, step_size)
        return () if self.dynamics is None else self.dynamics.init(particles)

    def __call__(
        self, batch: ParticleBatch, theta: Any, x: Particles, kept: Any, step_size: Steps, rng_key: Array, num_steps: Array,
        *, noise_on_all: bool = False
    ) -> Moved:  # fmt: skip
        """All moves of a step.

        :param num_steps: made before.
        :param noise_on_all: whether the noise of the last move comes with that on all particles, to the next visit of the batch.
        """
        keys = jax.random.split(rng_key, self.num_moves)
        noise = np.ones(self.num_moves)
        if noise_on_all:
            noise[-1] = 0
        if self.num_moves == 1 and self.is_jacobi and not self.is_adjusted:
            gradients = batch.gradients(theta, x)
            how = How(keys[0], noise[0], num_steps)
            return Moved(*self._push(batch, theta, x, kept, gradients.scores, step_size, how), x, gradients)
        moves = How(keys, jnp.asarray(noise), num_steps * self.num_moves + jnp.arange(self.num_moves))
        if self.average_moves:
            return self._and_average(batch, theta, x, kept, step_size, moves)
        if self.is_adjusted:
            new_x, new_kept = adjusted(batch, theta, x, kept, moves, self.num_jumps)
        else:

            def move(carry: tuple[Particles, Any], how: How) -> tuple[tuple[Particles, Any], None]:
                x, kept = carry
                return self._push(batch, theta, x, kept, batch.scores(theta, x), step_size, how), None

            (new_x, new_kept), _ = lax.scan(move, (x, kept), moves)
        seen = x if self.is_jacobi else new_x
        return Moved(new_x, new_kept, seen, batch.gradients(theta, seen))

    def _and_average(self, batch: ParticleBatch, theta: Any, x: Particles, kept: Any, step_size: Steps, moves: How) -> Moved:
        """The same with the mean gradient over the points before the moves (Jacobi) or after them (Gauss-Seidel)."""
        start = batch.gradients(theta, x)

        def move(carry: tuple[Particles, Any, Gradients, Any], how: How) -> tuple[Any, None]:
            x, kept, before, (loss, gradient) = carry
            x, kept = self._push(batch, theta, x, kept, before.scores, step_size, how)
            after = batch.gradients(theta, x)
            counted = before if self.is_jacobi else after
            mean = jax.tree.map(lambda sum, new: sum + new / self.num_moves, (loss, gradient), (counted.loss, counted.of_params))
            return (x, kept, after, mean), None

        nothing = jax.tree.map(jnp.zeros_like, (start.loss, start.of_params))
        (new_x, new_kept, last, (loss, gradient)), _ = lax.scan(move, (x, kept, start, nothing), moves)
        if self.num_jumps:
            new_x = jumped(batch, theta, new_x, moves.rng_key[-1], self.num_jumps)
        return Moved(new_x, new_kept, x if self.is_jacobi else new_x, Gradients(loss, gradient, last.scores))

    def _push(
        self, batch: ParticleBatch, theta: Any, x: Particles, kept: Any, scores: Particles, step_size: Steps, how: How
    ) -> tuple[Particles, Any]:
        """One move of the particles of a batch."""
        if self.is_adjusted:
            return adjusted(batch, theta, x, kept, jax.tree.map(lambda each: jnp.asarray(each)[None], how))
        if self.dynamics is not None:
            minus = jax.tree.map(jnp.negative, scores)
            moves, kept = self.dynamics.update(minus, kept, x, temperature=1.0, rng_key=how.rng_key)
            return optax.apply_updates(x, moves), kept
        h = {name: jnp.asarray(step_size[name]) for name in x}
        x = {name: x[name] + h[name].astype(x[name].dtype) * scores[name] for name in x}
        if isinstance(how.noise, Array) or how.noise:
            sd, xi = {name: how.noise * jnp.sqrt(2 * h[name]) for name in x}, optim_module.normal_like(how.rng_key, x)
            x = {name: x[name] + sd[name].astype(x[name].dtype) * xi[name] for name in x}
        return x, kept


# Metropolis-adjusted moves.


class _Chains(NamedTuple):
    x: Array  # of one site
    log_density: Array  # of each row and particle, with axes of size 1 elsewhere
    score: Array


def adjusted(
    batch: ParticleBatch, theta: Any, x: Particles, kept: AdaptedMoves, moves: How, num_jumps: int = 0
) -> tuple[Particles, AdaptedMoves]:
    """Metropolis-adjusted moves of one latent site after the other, and after those of a site its jumps.

    :param moves: with a leading axis, one for each move.
    """
    x, step_size, acceptance = dict(x), dict(kept.step_size), dict(kept.acceptance)
    for i, (name, rows) in enumerate(rows_of(batch, theta).items()):
        of_site = moves._replace(rng_key=jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(moves.rng_key))
        log_density = rows.given_others(theta, x)
        before = moves.num_before / batch.program.scale(name)  # a row moves in its batches
        adapted = step_size[name], acceptance[name]
        chains, step_size[name], acceptance[name] = _move_site(log_density, x[name], adapted, of_site._replace(num_before=before))
        x[name] = chains.x
        if num_jumps and (jumps := Jumps.of(batch, rows)) is not None:
            jump_key = jax.random.fold_in(of_site.rng_key[-1], 1)
            x[name] = jumps(jump_key, log_density, chains.x, chains.log_density, num_jumps)
    return x, AdaptedMoves(step_size, acceptance)


def _move_site(
    log_density: Callable[[Array], Array], x: Array, adapted: tuple[Array, Array], moves: How
) -> tuple[_Chains, Array, Array]:
    def chains_at(x: Array) -> _Chains:
        value, pullback = jax.vjp(log_density, x)
        score = pullback(jnp.ones_like(value))[0]
        return _Chains(x, jnp.where(jnp.isnan(value), -jnp.inf, value), score)

    def move(carry: tuple[_Chains, Array, Array], how: How) -> tuple[tuple[_Chains, Array, Array], None]:
        old, log_step, acceptance = carry
        noise_key, accept_key, shrink_key = jax.random.split(how.rng_key, 3)
        shrink = jax.random.geometric(shrink_key, 1 - SMALL_MOVES) - 1
        h = (jnp.exp(log_step) * 10.0 ** -shrink.astype(log_step.dtype)).astype(x.dtype)
        noise = optim_module.normal_like(noise_key, x)
        new = chains_at(old.x + h * old.score + jnp.sqrt(2 * h) * noise)
        log_ratio = new.log_density - old.log_density + _log_proposal(old, new, h) - _log_proposal(new, old, h)
        probability = metropolis(log_ratio)
        taken = jax.random.bernoulli(accept_key, probability)
        chains = jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, old)
        mean, is_full = probability.mean(0).astype(log_step.dtype), (shrink == 0).astype(log_step.dtype)
        gain = is_full * GAIN * (1 + how.num_before / GAIN_DELAY).astype(log_step.dtype) ** -GAIN_POWER
        log_step = jnp.clip(log_step + gain * (mean - TARGET_ACCEPTANCE), *LOG_STEPS)
        return (chains, log_step, acceptance + is_full * ACCEPTANCE_RATE * (mean - acceptance)), None

    step_size, acceptance = adapted
    carry = chains_at(x), jnp.log(step_size), acceptance
    (chains, log_step, acceptance), _ = lax.scan(move, carry, moves)
    return chains, jnp.exp(log_step), acceptance


def _log_proposal(to: _Chains, start: _Chains, h: Array) -> Array:
    """The log density of a proposal, of each row and particle, without its constant."""
    square = (to.x - start.x - h * start.score) ** 2 / (4 * h)
    event = tuple(i for i, (size, kept) in enumerate(zip(square.shape, to.log_density.shape, strict=True)) if size != kept)
    return -square.sum(event, keepdims=True)
