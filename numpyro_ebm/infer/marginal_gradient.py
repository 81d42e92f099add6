# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether a model with a guide learns by the gradient of its marginal.

Weights of the guide's samples speak of guide and posterior at one model. A model may have learned to have a posterior that the
guide can be, or run ahead of a guide that is always near: the weights are then good, and the gradient that has brought it there
is that of another objective. What a step takes, :math:`g`, is therefore compared with the gradient of the objective at weighted
samples :math:`\hat g`, which is right to the order of one over their number for any guide that covers the posterior. The unit is
the part of :math:`\hat g` that goes through the posterior, :math:`\hat g - \hat g_0`, with the weights held in
:math:`\hat g_0`: a guide is there to give it, and a gradient that lacks it is off by 1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm.evaluate.guide_weights import ROWS_BELOW
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.objectives.latent import ScoreFn, draw, drawn_density, row_density, scores
from numpyro_ebm.objectives.score import ObjectiveKeys
from numpyro_ebm.weights import effective_sample_size, normalized_weights

NUM_STEPS = 16  # gradients that are compared, each on the rows of a step
MIN_SAMPLES, MAX_SAMPLES, MAX_ROWS = 16, 64, 2**14  # of every row, and of all rows of a step together
FEWEST = 0.25  # of the samples that must count: the gradient is that of some of them otherwise, and the weights say so
MOST = 0.5  # of the part through the posterior
QUANTITY = "error of the gradient, of its part through the posterior"


class Compared(NamedTuple):
    """Mean squares over the gradients that are compared, and the fraction of weighted samples that count."""

    #: of the mean of the error, without what is its noise
    error: Array
    #: of the mean of the part through the posterior, without what is its noise
    part: Array
    #: the noise of both: what the mean square of a mean of as many gradients is where their expectation is 0
    error_noise: Array
    part_noise: Array
    fraction: Array


def by_weights(levels: Any, theta: Any, phi: Any, keys: ObjectiveKeys) -> tuple[Any, Any, Array]:
    """The gradient of the objective at weighted samples, its part through the posterior, and which fraction of them counts."""
    rest, q = tuple(levels.rest), levels.phi_of(phi)
    v_tilde = levels.objective.perturb(keys.noise, levels.v)
    log_p = row_density(levels.model, rest, levels.kwargs, levels.model_key, levels.plate, levels.of_theta)
    log_q = drawn_density(levels.guide, rest, levels.kwargs, levels.plate)
    num_samples = min(MAX_SAMPLES, max(MIN_SAMPLES, MAX_ROWS // len(levels.v)))
    drawn = draw(levels.guide, (v_tilde, *rest), levels.kwargs, keys.draw, num_samples, params=q, relaxed=False)
    of_guide = jax.vmap(lambda h: log_q(q, v_tilde, h))(drawn)

    def weights(theta: Any, x: Array) -> Array:
        return normalized_weights(jax.vmap(lambda h: log_p(theta, x, h))(drawn.latents) - of_guide)

    def score(weights: Array, theta: Any, x: Array) -> Array:
        return jnp.einsum("ib,ib...->b...", weights, scores(log_p, x, theta, drawn.latents)[1], precision="highest")

    def loss(score: ScoreFn) -> Array:
        return levels.objective.loss(score, keys.loss, levels.v, v_tilde).mean()

    def of_all(theta: Any) -> Array:
        return loss(lambda x: score(weights(theta, x), theta, x))

    now = weights(theta, v_tilde)

    def of_scores(moved: Any) -> Array:
        return loss(lambda x: score(weights(theta, x), theta, x) + score(now, moved, x) - score(now, theta, x))

    gradient = jax.grad(of_all)(theta)
    through = jax.tree.map(jnp.subtract, gradient, jax.grad(of_scores)(theta))
    return gradient, through, jnp.quantile(effective_sample_size(now) / num_samples, 1 - ROWS_BELOW)


def compared(gradients: Any, rng_key: Array) -> Compared:
    """Of gradients with independent keys.

    :param gradients: from a key, the gradient of a step, the two of :func:`by_weights`, and the fraction.
    """

    def add(sums: Any, key: Array) -> tuple[Any, Array]:
        taken, wanted, through, fraction = gradients(key)
        found = jax.tree.map(jnp.subtract, taken, wanted), through
        return jax.tree.map(jnp.add, sums, (found, tuple(map(_square, found)))), fraction

    like = jax.eval_shape(lambda key: gradients(key)[2], rng_key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    start = (zeros, zeros), (jnp.zeros(()), jnp.zeros(()))
    (sums, squares), fractions = lax.scan(add, start, jax.random.split(rng_key, NUM_STEPS))
    # the square of a mean, of pairs of different gradients
    error, part = ((_square(total) - square) / (NUM_STEPS * (NUM_STEPS - 1)) for total, square in zip(sums, squares, strict=True))
    noises = (square / NUM_STEPS**2 - mean / NUM_STEPS for square, mean in zip(squares, (error, part), strict=True))
    return Compared(error, part, *noises, fractions.mean())


def _square(x: Any) -> Array:
    return sum(((leaf.astype(float) ** 2).sum() for leaf in jax.tree.leaves(x)), jnp.zeros(()))
