# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether parameters of a likelihood, or of a known prior, stand at the maximum of the marginal likelihood.

By Fisher's identity the score of a row's marginal likelihood is the mean over its posterior, that of guide or particles,

.. math:: s_n = E_{q(x)} [\nabla_\theta \log p_\theta(x_n, y_n)], \qquad I = \sum_n (s_n - \bar s) (s_n - \bar s)^T,

and a step of Newton's method, :math:`I^{-1} \sum_n s_n`, is told in standard errors :math:`(I^{-1})_{ii}^{1/2}` of each parameter
(Berndt et al. 1974). Rows are the first axis of a term of the log joint density. Where rows of two plates depend on each other,
by a latent that both see, the information is thought larger than it is, and the distance smaller.

Energies have a distance of their own (:mod:`numpyro_ebm.evaluate.stationarity`), and networks too many parameters for this one.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from numpyro_ebm._map_over import map_over
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.program.rows import Indices, some_batches
from numpyro_ebm.program.run import Run

QUANTITY = "standard errors from the maximum of likelihood"
MOST_ERROR = 1.0  # of a distance that is told
OF_A_BATCH = "its error is {:.2g} standard errors, as that of a batch of rows: give diagnose all rows, in a plate that has them all"
MOST = 0.5  # of each param, and 3 errors: standard_errors warns from there on too
MAX_SIZE, MAX_ELEMENTS = 20, 50  # of a param, and of all together
MIN_ROWS = 10
NUM_COPIES = 16  # samples of the guide, or particles, that are looked at together
LEAST_COPIES = 4  # of fewer particles, which go their own ways from where they are
NUM_TIMES, MIN_TIMES, MAX_TIMES = 32, 4, 640  # others of them, of a batch and of all together
MOVES_BETWEEN, NUM_BURN = 8, 8  # moves of particles between these times, and times before them in which moves adapt
MAX_BATCHES = 50  # of subsampled plates that are looked at
MAX_COST = 2**24  # derivatives of numbers, at each time of all
MAX_NUMBERS = 2**25  # scores of all copies and rows
LEAST_INFORMATION = 1e-6  # of the largest in any direction: with less, data do not tell parameters apart
FIX = (
    "a Newton step would move the param by so many of its standard errors: the fit has not arrived, swings about the maximum, or "
    "unadjusted particles bias it. Take more steps, a larger learning rate or one that falls to 0, as by "
    "optax.cosine_decay_schedule(rate, num_steps), average_iterates=True of an engine, or kernel='mala' of ParticleMMLE"
)

#: (unconstrained params, latents) -> terms of the log joint density by site, and the run that has them
TermsAt = Callable[[dict[str, Any], Any], tuple[dict[str, Array], Run]]


class OfBatch(NamedTuple):
    """What there is to see in some rows of the data."""

    #: the log joint density at the params and one sample of the latents
    terms_at: TermsAt
    #: ``(carry, key) -> (carry, latents)`` with samples of the posterior along axis 0, two or more, each of which goes its own
    #: way: what they do not agree in is the error
    draw: Callable[[Any, Array], tuple[Any, Any]]
    #: the first carry
    start: Any


class ParamDistance(NamedTuple):
    """By element of the params that are told of, in the order of :func:`jax.flatten_util.ravel_pytree`."""

    #: (elements,), the Newton step in standard errors, and its own error; nan where data say nothing of a param
    steps: Array
    errors: Array
    #: by param site, of its size: nothing but its name is used
    params: dict[str, Array]


def told_params(theta: dict[str, Any], of_energies: Collection[str]) -> dict[str, Any]:
    """Those params of unconstrained ``theta`` that this distance is told of."""

    def is_small(name: str) -> bool:
        leaves = jax.tree.leaves(theta[name])
        is_real = all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves)
        return is_real and 0 < sum(jnp.size(x) for x in leaves) <= MAX_SIZE

    small = {name: theta[name] for name in sorted(theta) if name not in of_energies and is_small(name)}
    return small if sum(jnp.size(x) for x in jax.tree.leaves(small)) <= MAX_ELEMENTS else {}


def param_distance(
    of_batch: Callable[[Indices], OfBatch],
    batches: Indices,
    params: dict[str, Any],
    rng_key: Array,
    cost: int,
    num_burn: int = 0,
) -> ParamDistance | None:
    """The distance, or None where there is nothing to tell; traced.

    :param of_batch: by rows of the subsampled plates, how their latents are drawn and what they are worth.
    :param batches: that show all rows, as of :func:`~numpyro_ebm.program.rows.all_batches`.
    :param params: unconstrained, :func:`told_params`.
    :param cost: of a sample of a batch, in numbers.
    :param num_burn: how many of the first samples are no samples of the posterior yet.
    """
    theta, unravel = ravel_pytree(params)
    if not params:
        return None
    batches = some_batches(batches, min(MAX_BATCHES, MAX_COST // max(1, cost * theta.size * MIN_TIMES)))
    num_batches = len(next(iter(batches.values()))) if batches else 1
    num_times = min(NUM_TIMES, MAX_COST // max(1, cost * theta.size * num_batches), MAX_TIMES // num_batches)
    num_times = max(MIN_TIMES, num_times)
    weights: dict[str, float] = {}  # rows of the data for each row that is seen

    def scores(rng_key: Array, indices: Indices) -> dict[str, Array]:
        """Of each copy and row, ``(copies, rows, params)``: the mean over times."""
        terms_at, draw, start = of_batch(indices)
        keys = jax.random.split(rng_key, num_burn + num_times)

        def rows(theta: Array, latents: Any) -> dict[str, Array]:
            terms, run = terms_at(unravel(theta), latents)
            found: dict[str, Array] = {}
            for name, term in terms.items():
                plate, weights[plate], of_rows = _by_row(name, term, run)
                found[plate] = found.get(plate, jnp.zeros(())) + of_rows
            return found

        def at_time(latents: Any) -> dict[str, Array]:
            return map_over(partial(jax.jacfwd(rows), theta), latents)

        def add(carry: tuple[Any, Any], step: tuple[Array, Array]) -> tuple[Any, None]:
            (at, sums), (is_kept, key) = carry, step
            at, latents = draw(at, key)
            return (at, jax.tree.map(lambda sum, new: sum + jnp.where(is_kept, new, 0), sums, at_time(latents))), None

        latents = jax.eval_shape(draw, start, keys[0])[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(at_time, latents))
        (_, sums), _ = lax.scan(add, (start, zeros), (jnp.arange(len(keys)) >= num_burn, keys))
        return jax.tree.map(lambda sum: sum / num_times, sums)

    try:
        shapes = jax.eval_shape(scores, rng_key, jax.tree.map(lambda rows: rows[0], batches))
    except TypeError as error:
        if "forward-mode" in str(error):  # of a solver of differential equations that has a rule for gradients alone
            return None
        raise
    num_copies = min(x.shape[0] for x in shapes.values())
    is_large = num_batches * sum(x.size for x in shapes.values()) > MAX_NUMBERS
    if num_copies < 2 or is_large or num_batches * max(x.shape[1] for x in shapes.values()) < MIN_ROWS:
        return None
    batch_keys = jax.random.split(rng_key, num_batches) if batches else rng_key[None]
    by_batch = lax.map(lambda each: scores(*each), (batch_keys, batches))
    gradient = jnp.zeros(theta.shape, theta.dtype)
    information = noise = jnp.zeros((theta.size, theta.size), theta.dtype)
    for name, of_batches in by_batch.items():
        by_copy, weight = of_batches.mean(0), weights[name]
        if weight > 1:  # the rows of one batch after those of another: else they are the same in each
            by_copy, weight = jnp.concatenate(list(of_batches), 1), weight / num_batches
        mean = by_copy.mean(0)
        centered = _outer(mean - mean.mean(0))
        within = _outer((by_copy - mean).reshape(-1, theta.size)) / (num_copies - 1) / num_copies
        gradient += weight * mean.sum(0)
        information += weight * (centered - within)  # which noise adds
        noise += weight**2 * within + weight * max(weight - 1, 0) * centered  # of copies, and of rows that are not seen
    return ParamDistance(*_in_standard_errors(gradient, information, noise), jax.tree.map(jnp.zeros_like, params))


def _by_row(name: str, term: Array, run: Run) -> tuple[str, float, Array]:
    """The plate of the first axis of a term, how many rows of the data each of its rows stands for, and the term by row.

    The plates that subsample have multiplied the term, which is undone.
    """
    frames = {frame.dim: frame.name for frame in run.sites[name].get("cond_indep_stack", ())}
    sizes = [len(run.plates[plate].indices) / run.plates[plate].size for plate in frames.values() if plate in run.plates]
    term = term * math.prod(sizes)
    while term.ndim > 1 and len(term) == 1:
        term = term[0]
    plate = frames.get(-term.ndim, "")
    by_row = term.reshape(len(term), -1).sum(1) if term.ndim else term[None]
    return (plate if len(by_row) == _length(run, plate) else name), 1 / math.prod(sizes), by_row


def _length(run: Run, plate: str) -> int:
    return len(run.plates[plate].indices) if plate in run.plates else -1


def _outer(x: Array) -> Array:
    return jnp.matmul(x.T, x, precision="highest")


def _in_standard_errors(gradient: Array, information: Array, noise: Array) -> tuple[Array, Array]:
    """Newton's step for each param in its standard errors, and what is uncertain of it."""
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(information), 0))
    scale = jnp.where(scale > 0, scale, jnp.inf)
    values, axes = jnp.linalg.eigh(information / jnp.outer(scale, scale))
    kept = values > LEAST_INFORMATION * values.max()
    inverse = jnp.matmul(axes * jnp.where(kept, 1 / values, 0), axes.T, precision="highest")
    error = jnp.sqrt(jnp.diagonal(inverse))
    step = jnp.matmul(inverse, gradient / scale, precision="highest")
    variance = jnp.einsum("ij,jk,ki->i", inverse, noise / jnp.outer(scale, scale), inverse, precision="highest")
    return jnp.abs(step) / error, jnp.sqrt(jnp.maximum(variance, 0)) / error


def param_findings(found: ParamDistance | None, *, are_well: bool) -> list[Finding]:
    """What is said of the param that is farthest.

    :param are_well: whether the latents follow their posterior, as far as is known. Where they do not, that is the cause.
    """
    if found is None:
        return []
    names = [name for name, value in sorted(found.params.items()) for _ in range(ravel_pytree(value)[0].size)]
    steps, errors = np.asarray(found.steps, float), np.asarray(found.errors, float)
    excess = steps - MOST - 3 * errors
    if not np.isfinite(excess).any():
        return [not_told(names[0], QUANTITY, "the data do not depend on it, or the derivatives are not finite")]
    worst = int(np.nanargmax(excess))
    if excess[worst] <= 0 and np.nanmax(errors) > MOST_ERROR:
        widest = int(np.nanargmax(errors))
        return [not_told(names[widest], QUANTITY, OF_A_BATCH.format(errors[widest]))]
    most = MOST + 3 * float(errors[worst]) if are_well else None
    return [Finding(names[worst], QUANTITY, float(steps[worst]), None, most, FIX if are_well else "")]
