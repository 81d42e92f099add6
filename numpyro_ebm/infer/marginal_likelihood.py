# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether a model whose latents were learned by scores gives its rows the likelihood that it could give them.

An objective of scores says little of nats, and less where elements have different units; and it says nothing of where there are no
rows, where a mode may be left. A guide tells the marginal density of a row, by importance weights, up to the normalizer,

.. math:: \tilde p(v) = E_{q(h|v)} [\tilde p(v, h) / q(h|v)],

and annealing tells the normalizer, and samples of the joint density. The log density of the rows is compared with that of simple
estimates; and along the natural gradient of the likelihood in the model's parameters, rows with samples. At a sample that
gradient is the mean over its own latents and others of the guide, by their weights, whose expectation is exact.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm._map_over import map_over
from numpyro_ebm.evaluate.density import SAMPLES_TO_JUDGE
from numpyro_ebm.evaluate.guide_weights import MAX_ELEMENTS, MIN_SAMPLES, in_groups
from numpyro_ebm.evaluate.natural_distance import FROM_MAXIMUM, NUM_GROUPS, NUM_VALUES, natural_distance
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.evaluate.yardstick import (
    LIKELIHOOD,
    MAX_VALUES,
    MIN_OWNERS,
    ROWS_PER_DIM,
    Shortfall,
    normal_of,
    rows_finding,
    shortfall,
    thinned,
)
from numpyro_ebm.infer.annealed_joint import NUM_CHAINS, Annealed, anneal
from numpyro_ebm.infer.row_joint import RowJoint
from numpyro_ebm.infer.visible_density import maximum_finding
from numpyro_ebm.objectives.latent import Drawn
from numpyro_ebm.weights import systematic

NUM_HIDDEN = 16  # samples of the latents of a row, for its gradient
NUM_CG = 12  # steps towards the natural gradient: the metric of parameters that latents share is far from round
MAX_SIZE = 100  # elements of a row and its latents that are annealed
WORSE = (
    "The model has not converged, has learned from a guide that is not the posterior, or is too small: take more steps, a learning "
    "rate that falls to 0, or more inner steps. Scale data whose elements have different standard deviations: scores learn "
    "those with the smallest first. A mode may be left where there are no rows, of which scores say nothing: go on by likelihood, "
    "SVI of negative_phase(model) with bits summed out, from these parameters"
)
CONDITIONAL = "the normalizer is unknown, and as the model has arguments beside the visible, each row may have its own"
FEW = f"it takes {MIN_OWNERS} rows, and {ROWS_PER_DIM} for each element, that can be looked at together"
UNKNOWN = (
    "{} chains from a wide normal distribution to the density are worth about {:.0f} samples of it, which is too few: there may be "
    "modes far from all rows, of which scores say nothing. Compare fits from other keys, or learn by likelihood, SVI of "
    "negative_phase(model) with bits summed out"
)
UNKNOWN_JOINT = "{} chains from a wide normal distribution to the joint density are worth about {:.0f} samples of it"
NO_CHAINS = (
    f"it takes latents that are real numbers or bits, at most {MAX_SIZE} elements of a row and its latents, and a guide without "
    "latents of its own"
)

Params = dict[str, Any]
LevelsAt = Callable[[Array], "Levels"]  # by the indices of as many rows as a batch has


class Levels(Protocol):
    """Model and guide on one batch of rows."""

    v: Array
    is_of_same_latents: bool  # whether the guide has no more latents than the model

    @property
    def joint(self) -> RowJoint:
        """Their density together with their latents."""
        ...

    def noisy(self, rng_key: Array) -> tuple[Array, Array]:
        """The visible of the rows with the noise that was learned with, and another key."""
        ...

    def drawn(self, params: Params, rng_key: Array, v: Array, num_samples: int) -> Drawn:
        """Samples of the guide."""
        ...

    def weigh(self, params: Params, v: Array, drawn: Drawn) -> Array:
        """Their log weights, ``(num_samples, rows)``."""
        ...

    def log_weights(self, params: Params, rng_key: Array, v: Array, num_samples: int) -> Array:
        """Both."""
        ...


class ToMaximum(NamedTuple):
    """How far the maximum of the likelihood is."""

    #: (), standard deviations along the natural gradient
    value: Array
    #: (), their standard error
    error: Array
    #: (), how many samples the joint density is known by
    worth: Array


class MarginalLikelihood(NamedTuple):
    """What there is to know of it."""

    #: None where nothing is known of the normalizer
    shortfall: Shortfall | None
    #: (), how many samples the normalizer is known by; infinite where it is known
    worth: Array
    #: None where there are no samples of the joint density
    to_maximum: ToMaximum | None


def batches_to_judge(num_rows: int, batch_size: int, size: int) -> np.ndarray | None:
    """Indices of rows, ``(batches, batch_size)``; None of too few, or of too many at once.

    :param size: elements of a row.
    """
    most = min(MAX_VALUES, MAX_ELEMENTS // (size * MIN_SAMPLES))
    found = np.arange(num_rows // batch_size * batch_size).reshape(-1, batch_size)
    num = min(len(found), max(1, most // batch_size))
    found = found[np.arange(num) * len(found) // max(1, num)]
    is_small = batch_size * size * MIN_SAMPLES <= MAX_ELEMENTS
    return found if is_small and found.size >= max(MIN_OWNERS, ROWS_PER_DIM * size) else None


def joint_chains(rng_key: Array, levels_at: LevelsAt, params: Params, batches: Array) -> Annealed | None:
    """Chains of the joint density of rows and latents, None where there can be none; traced.

    :param batches: which rows, :func:`batches_to_judge`; of chains too.
    """
    levels, (rows_key, anneal_key) = levels_at(batches[0]), jax.random.split(rng_key)
    joint, size = levels.joint, math.prod(levels.v.shape[1:])
    if not (levels.is_of_same_latents and joint.is_of_bits and size + joint.size <= MAX_SIZE):
        return None

    def of_batch(at: tuple[Array, Array]) -> Array:
        key, rows = at
        levels = levels_at(rows)
        v, draw_key = levels.noisy(key)
        (h,) = map_over(levels.joint.vectors, levels.drawn(params, draw_key, v, 1).latents)
        return jnp.concatenate([v.reshape(len(v), -1), h[:, ~joint.are_bits]], 1)

    start = lax.map(of_batch, (jax.random.split(rows_key, len(batches)), batches))
    blocks, rows = _Blocks(levels_at, batches.shape[1]), _rows_of_chains(batches)

    def log_density(x: Array, bits: Array) -> Array:
        v, h = _split(x, bits, levels)
        return blocks.map(lambda rows, v, h: levels_at(rows).joint.log_prob(params, v, h), rows, v, h)

    return anneal(anneal_key, log_density, normal_of(start.reshape(-1, start.shape[2])), int(joint.are_bits.sum()), len(rows))


def marginal_likelihood(
    rng_key: Array,
    levels_at: LevelsAt,
    own: Params,
    params: Params,
    batches: Array,
    chains: Annealed | None,
    *,
    is_normalized: bool,
) -> MarginalLikelihood:
    """The likelihood of some rows, beside that of estimates which need no training, and what a step along it would gain; traced.

    :param own: the parameters of the model.
    :param params: these, and those of the guide.
    :param batches: which rows, :func:`batches_to_judge`.
    :param chains: :func:`joint_chains`.
    :param is_normalized: whether the normalizer is 1.
    """
    rows_key, to_maximum_key = jax.random.split(rng_key)

    def of_batch(at: tuple[Array, Array]) -> tuple[Array, Array]:
        key, rows = at
        levels = levels_at(rows)
        v, draw_key = levels.noisy(key)
        found = in_groups(lambda key, num: levels.log_weights(params, key, v, num), draw_key, v, MIN_SAMPLES)
        return logsumexp(found, 0) - math.log(len(found)), v

    log_density, v = lax.map(of_batch, (jax.random.split(rows_key, len(batches)), batches))
    x, seen = (thinned(y.reshape(1, -1, *y.shape[2:])) for y in (v, log_density))
    if chains is None:
        return MarginalLikelihood(shortfall(seen, x) if is_normalized else None, jnp.array(jnp.inf), None)
    to_maximum = _to_maximum(to_maximum_key, levels_at, own, params, batches, v, chains)
    if is_normalized:
        return MarginalLikelihood(shortfall(seen, x), jnp.array(jnp.inf), to_maximum)
    variance = 1 / chains.worth - 1 / len(chains.weights)
    return MarginalLikelihood(shortfall(seen - chains.log_normalizer, x, variance), chains.worth, to_maximum)


def _to_maximum(
    rng_key: Array, levels_at: LevelsAt, own: Params, params: Params, batches: Array, v: Array, chains: Annealed
) -> ToMaximum:
    """How chains of the joint density differ from the rows."""
    points_key, samples_key = jax.random.split(rng_key)
    blocks, rows = _Blocks(levels_at, batches.shape[1]), _rows_of_chains(batches)
    of_rows = blocks.points(points_key, params, batches.reshape(-1), v.reshape(-1, *v.shape[2:]))
    every = np.arange(NUM_VALUES // NUM_GROUPS * NUM_GROUPS) * len(rows) // NUM_VALUES
    index = systematic(None, chains.weights)[every]
    at_chains = _split(chains.x[index], chains.bits[index], levels_at(batches[0]))
    of_chains = blocks.points(samples_key, params, rows[index], *at_chains)
    value, error = natural_distance(
        jax.jit(lambda own, points: blocks.log_marginal({**params, **own}, points)),  # traced once
        own,
        jax.tree.map(lambda y: y[:, None], of_rows),
        jax.tree.map(lambda y: y.reshape(NUM_GROUPS, -1, *y.shape[1:]), of_chains),
        is_all=False,  # rows that scores have learned from are not at the maximum of their own likelihood
        num_steps=NUM_CG,
    )
    return ToMaximum(value, error, chains.worth)


def _rows_of_chains(batches: Array) -> Array:
    """The row of each chain: all rows alike, as the model may depend on them."""
    size = batches.shape[1]
    return jnp.resize(batches, (-(-NUM_CHAINS // size), size)).reshape(-1)


def _split(x: Array, bits: Array, levels: Levels) -> tuple[Array, Array]:
    """The visible of each chain, and the vector of its latents."""
    event_shape = levels.v.shape[1:]
    size = math.prod(event_shape)
    order = np.argsort(np.argsort(levels.joint.are_bits, kind="stable"))  # of what are first the real numbers, and then the bits
    return x[:, :size].reshape(-1, *event_shape), jnp.concatenate([x[:, size:], bits], 1)[:, order]


class _Points(NamedTuple):
    """Rows, each with some samples of its latents, whose weighted mean stands for the posterior."""

    rows: Array  # (points,), which rows they are
    v: Array  # (points,) + event_shape
    vectors: Array  # (points, samples, size)
    log_q: Array  # (points, samples), the density that they were drawn by


class _Blocks(NamedTuple):
    """Any number of rows, of which model and guide see as many at once as they have learned with."""

    levels_at: LevelsAt
    size: int

    def map(self, fn: Callable[..., Any], *x: Array) -> Any:
        """A function of the rows of a block at those of all; the last block is filled up by the first rows."""
        num_rows = len(x[0])
        index = np.arange(-(-num_rows // self.size) * self.size).reshape(-1, self.size) % num_rows
        found = map_over(lambda x: fn(*x), tuple(y[index] for y in x))
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:num_rows], found)

    def points(self, rng_key: Array, params: Params, rows: Array, v: Array, own: Array | None = None) -> _Points:
        """Samples of the guide at rows.

        :param own: vectors of latents that stand in the place of the first sample: those of a sample of the joint density.
        """
        keys = jax.random.split(rng_key, len(rows))

        def of_block(keys: Array, rows: Array, v: Array, *own: Array) -> tuple[Array, Array]:
            levels = self.levels_at(rows)
            drawn = levels.drawn(params, keys[0], v, NUM_HIDDEN)
            if own:
                latents = {name: drawn.latents[name].at[0].set(x) for name, x in levels.joint.latents(own[0]).items()}
                drawn = drawn._replace(latents={**drawn.latents, **latents})
            vectors = map_over(levels.joint.vectors, drawn.latents)
            log_p = map_over(lambda h: levels.joint.log_prob(params, v, h), vectors)
            return jnp.moveaxis(vectors, 0, 1), (log_p - levels.weigh(params, v, drawn)).T

        return lax.stop_gradient(_Points(rows, v, *self.map(of_block, keys, rows, v, *([] if own is None else [own]))))

    def log_marginal(self, params: Params, points: _Points) -> Array:
        """An estimate of the log density of the visible, whose gradient is the mean over the latents by their weights."""

        def of_block(rows: Array, v: Array, vectors: Array, log_q: Array) -> Array:
            joint = self.levels_at(rows).joint
            log_p = map_over(lambda h: joint.log_prob(params, v, h), jnp.moveaxis(vectors, 1, 0))
            return logsumexp(log_p - log_q.T, 0)

        return self.map(of_block, *points)


def likelihood_findings(site: str, found: MarginalLikelihood | str, *, are_well: bool) -> list[Finding]:
    """What is said of it.

    :param found: or why it is not known.
    :param are_well: whether guide and objective are. Where they are not, that is the cause to tell.
    """
    if isinstance(found, str):
        return [not_told(site, LIKELIHOOD, found)]
    if found.shortfall is None:
        return [not_told(site, LIKELIHOOD, NO_CHAINS)]
    worth = float(found.worth)
    if not worth >= SAMPLES_TO_JUDGE:
        return [not_told(site, LIKELIHOOD, UNKNOWN.format(NUM_CHAINS, worth), is_missing=are_well)]
    likelihood = rows_finding(site, found.shortfall, WORSE, are_well=are_well)
    if found.to_maximum is None:
        return [likelihood, not_told(site, FROM_MAXIMUM, NO_CHAINS)]
    value, error, worth = map(float, found.to_maximum)
    if not worth >= SAMPLES_TO_JUDGE:
        return [likelihood, not_told(site, FROM_MAXIMUM, UNKNOWN_JOINT.format(NUM_CHAINS, worth))]
    return [likelihood, maximum_finding(site, value, error, are_well=are_well and likelihood.is_well)]
