# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether unadjusted particles are stable where they stand, and what to say where they are not.

Langevin particles of step h diverge where h times the curvature of their negative log posterior is above 2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from numpyro_ebm.optim import normal_like
from numpyro_ebm.program.run import Run

Particles = dict[str, Array]  # by latent site, of shape (num_particles, ...)

# On a quadratic h Var(score) = hc / (1 - hc/2): 4 at hc = 4/3, where the particles' variance is three times too large.
STIFF, STIFFNESS_RATE, STIFFNESS_CLIP = 4.0, 0.02, 20.0
STIFFNESS_DELAY = 100  # visits of a row before its scores are taken for those of the posterior
NUM_POWER_ITERATIONS = 30


def largest_curvature(scores: Callable[[Particles], Particles], x: Particles, rng_key: Array) -> Array:
    """The largest eigenvalue of minus the derivative of ``scores`` at ``x``, by power iteration: an estimate from below."""

    def minus_score(x: Particles) -> Particles:
        return jax.tree.map(jnp.negative, scores(x))

    def iterate(v: Particles, _: None) -> tuple[Particles, Array]:
        v = jax.jvp(minus_score, (x,), (v,))[1]
        norm = optax.tree.norm(v)
        return jax.tree.map(lambda a: a / jnp.maximum(norm, 1e-30), v), norm

    v = normal_like(rng_key, x)
    norm = optax.tree.norm(v)
    return lax.scan(iterate, jax.tree.map(lambda a: a / norm, v), None, NUM_POWER_ITERATIONS)[1][-1]


def running_stiffness(
    run: Run, stiffness: dict[str, Array], num_steps: Array, scores: Particles, step_size: Any
) -> dict[str, Array]:
    """The running mean of h times the particles' variance of the score, by latent site and element of its event."""

    def of_site(name: str, score: Array) -> Array:
        # about the particles' mean: what all share is travel, or parameters that swing, and no stiffness of theirs
        variance = score.var(0, ddof=1) if len(score) > 1 else score[0] ** 2
        variance = variance.mean(tuple(range(variance.ndim - run.latents[name].event_dim)))
        new = jnp.minimum(step_size * variance, STIFFNESS_CLIP).astype(score.dtype)
        on_its_way = num_steps < STIFFNESS_DELAY * run.scale(name)  # steep places are passed, and not kept
        return stiffness[name] + jnp.where(on_its_way, 0, STIFFNESS_RATE) * (new - stiffness[name])

    return {name: of_site(name, score) for name, score in scores.items()}


def warnings_of(stiffness: dict[str, Array], step_size: float) -> list[str]:
    """A warning for every site whose stiffest element is near the limit."""
    worst = {name: float(jnp.max(ratio)) for name, ratio in stiffness.items()}
    return [
        f"site '{name}': step_size is h = {step_size:g}, and h times the curvature is about {2 * ratio / (2 + ratio):.2f} for the "
        "stiffest element: at 2 the particles diverge, and from 1 on they are more than twice as spread as the posterior. Take a "
        "smaller step_size."
        for name, ratio in worst.items()
        if ratio > STIFF
    ]


def fix_of(step_size: float, limit: float) -> str:
    """What to do about particles that are no longer finite, where they would be stable below ``limit``."""
    if not step_size < limit:
        return f"The step_size h = {step_size:g} is above the stability limit of about {limit:.2g} there: take half of that."
    return (
        f"Particles are stable there at fixed parameters (h = {step_size:g}, limit about {limit:.2g}): take a smaller learning "
        "rate, which is the step_size too where parameters move by it, or a smaller step_size for places that are steeper."
    )
