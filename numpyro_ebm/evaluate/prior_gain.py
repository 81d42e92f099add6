# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""What a prior would gain if it went on by the likelihood of the rows.

Rows that tell little of their latents leave samples of the posterior near the prior. A prior then agrees with them while it is far
from the maximum: a step towards it gains little of the bound, in which the samples stay, and much of the likelihood. With
:math:`p'` for the prior p the likelihood of a row changes by

.. math:: \log \frac{\int p'(z) p(y | z) dz}{\int p(z) p(y | z) dz} = \log E_{p(z | y)} [e^{\delta(z)}] - \log E_p [e^{\delta(z)}],
    \qquad \delta = \log \tilde p' - \log \tilde p.

Both means are taken over the same samples of p, chains, with weights :math:`p(y | z)` for the first, so that no guide and no
particles have a part in them. Some natural gradient steps are made, in the metric of the covariance over the rows of their
gradients,

.. math:: E_{p'(z | y)} [\nabla_\psi \log \tilde p'(z)] - E_{p'} [\nabla_\psi \log \tilde p'],

with one half of the samples, and the other half tells what they have gained. Where rows tell much, few samples of the prior are
samples of their posterior, and samples of a guide or particles tell what this would.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm.evaluate.natural_distance import NUM_CG, NUM_GROUPS, Data, halves, natural_direction, variance_of_mean
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.program.rows import ROUNDING, dim_of, per_row, row_plate
from numpyro_ebm.program.run import Run, log_density_terms, total
from numpyro_ebm.program.sites import Model

GAIN = "nats that a row would gain by steps of likelihood"
MAX_SIZE = 3  # elements of a latent: in more dimensions hardly a sample of the prior is one of a posterior
MAX_VALUES = 2**22  # of the sites of rows, for all samples
MIN_ROWS, MAX_ROWS = 20, 2000
MIN_SAMPLES, MAX_SAMPLES = 500, 5000  # of the prior
MIN_WORTH = 10.0  # samples of the prior, in each half, that a row's posterior should be known by
ROWS_BELOW = 0.1  # the fraction of rows that may have fewer
NUM_STEPS, LENGTHS = 6, (0.0, 0.004, 0.016, 0.06, 0.25, 1.0)  # and of each the best length
NATS = 0.05  # that a row may gain
FIX = (
    "so much is gained by {} natural gradient steps of the likelihood of the rows in the prior, with all else as it is. The fit has "
    "not arrived, or its guide or particles are not the posterior: take more steps, a learning rate that is larger at first and "
    "falls to 0, or another guide; or learn with ParticleMMLE(kernel='mala')"
)


class PriorGain(NamedTuple):
    """What steps of likelihood would gain."""

    #: (), nats a row
    value: Array
    #: (), its standard error
    error: Array
    #: (), how many samples of the prior a row's posterior is known by, in each half; 0 where rows have no posterior of their own
    worth: Array


def prior_gain(
    rng_key: Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: Data,
    data: Data,
    program: Run,
    name: str,
    chains: Array,
    log_density: Callable[[Data, Array], Array],
    params: Data,
) -> PriorGain | None:
    """That of a latent site with a density of its own, None where it cannot be known; traced.

    :param model: with energies that are not normalized.
    :param data: values of param and mutable sites.
    :param program: a run of the model, which gives the other latents.
    :param chains: samples of the prior, ``(groups, samples) + event_shape``.
    :param log_density: of the prior, by parameters and samples.
    :param params: its own.
    """
    site, plate = program.sites[name], row_plate(program, [name])
    if plate is None:
        return None
    shape, num_rows = site["fn"].batch_shape, len(program.plates[plate].indices)
    event_shape = chains.shape[2:]
    is_one_each = math.prod(shape) == num_rows == shape[dim_of(site, plate)]
    if not is_one_each or num_rows < MIN_ROWS or math.prod(event_shape) > MAX_SIZE:
        return None
    of_rows = [other["value"] for other in program.sites.values() if other["type"] == "sample" and dim_of(other, plate) is not None]
    most = MAX_VALUES // sum(jnp.size(value) for value in of_rows)
    chains = chains[:, : min(MAX_SAMPLES, most) // len(chains)]
    if len(chains) < NUM_GROUPS or chains.shape[1] * len(chains) < MIN_SAMPLES:
        return None
    given = {**data, **program.given(but=(name,))}

    def seen(z: Array) -> tuple[Array, Array]:
        """The log likelihood of rows whose latent is all the same, and the rest."""
        value = jnp.broadcast_to(z, (*shape, *event_shape))
        terms, run = log_density_terms(model, args, kwargs, rng_key, data={**given, name: value})
        of_rows = {other: terms.pop(other) for other in [*terms] if dim_of(run.sites[other], plate) is not None}
        del of_rows[name]
        return per_row(of_rows, run, plate) if of_rows else jnp.zeros(num_rows), total(terms)

    log_likelihood, rest = lax.map(seen, chains.reshape(-1, *event_shape))
    log_likelihood = log_likelihood[:, :: -(-num_rows // MAX_ROWS)]
    is_part = program.plates[plate].is_subsampled or log_likelihood.shape[1] < num_rows
    found = _gain(log_density, params, chains, log_likelihood.reshape(*chains.shape[:2], -1), is_part=is_part)
    is_apart = rest.max() - rest.min() <= ROUNDING * (1 + abs(rest).max())  # else rows hang together by what is outside
    return found._replace(worth=jnp.where(is_apart, found.worth, 0.0))


def _gain(
    log_density: Callable[[Data, Array], Array], params: Data, chains: Array, log_likelihood: Array, *, is_part: bool
) -> PriorGain:
    """Of either half of the chains by steps of the other.

    :param log_likelihood: ``(groups, samples, rows)``.
    :param is_part: whether there are more rows.
    """
    num_groups, num_rows = len(chains) // 2, log_likelihood.shape[2]
    x, seen = (y.reshape(2, -1, *y.shape[3:]) for y in (halves(chains), halves(log_likelihood)))
    seen = jax.nn.log_softmax(seen, 1)  # (2, samples, rows), log weights

    def change(params: Data, x: Array, before: Array) -> Array:
        return log_density(params, x) - before

    def gains(delta: Array, seen: Array) -> Array:
        """By row, of a change at the samples."""
        return logsumexp(seen + delta[:, None], 0) - logsumexp(delta) + math.log(len(delta))

    def stepped(at: tuple[Array, Array]) -> Data:
        """The parameters after the steps."""
        x, seen = at
        before = log_density(params, x)

        def step(now: Data, _: None) -> tuple[Data, None]:
            delta = change(now, x, before)
            of_prior, of_rows = jax.nn.softmax(delta), jax.nn.softmax(seen + delta[:, None], 0)

            def gap(slopes: Array) -> Array:
                return (slopes @ of_rows).mean() - slopes @ of_prior

            def variance(slopes: Array) -> Array:
                return (slopes @ of_rows).var()

            towards = natural_direction(log_density, now, x, gap, variance, NUM_CG)
            tried = [jax.tree.map(lambda a, b, length=length: a + length * b, now, towards) for length in LENGTHS]
            tried = jax.tree.map(lambda *each: jnp.stack(each), *tried)
            gained = lax.map(lambda params: gains(change(params, x, before), seen).mean(), tried)
            best = jnp.argmax(jnp.where(jnp.isnan(gained), -jnp.inf, gained))
            return jax.tree.map(lambda each: each[best], tried), None

        return lax.scan(step, params, None, NUM_STEPS)[0]

    def judged(at: tuple[Data, Array, Array]) -> tuple[Array, Array]:
        """What other samples say that they gain, and the square of its error."""
        params_then, x, seen = at
        delta = change(params_then, x, log_density(params, x))
        gained, number = gains(delta, seen), len(delta)
        # what a sample adds: to the mean over each posterior before and after, and to that over the prior
        added = (jax.nn.softmax(seen + delta[:, None], 0) - jnp.exp(seen)).mean(1) - (jax.nn.softmax(delta) - 1 / number)
        noise = variance_of_mean(number * added.reshape(1, num_groups, -1).mean(2))[0]
        return gained.mean(), noise + (gained.var() / num_rows if is_part else 0)

    then = lax.map(stepped, (x[::-1], seen[::-1]))
    value, noise = lax.map(judged, (then, x, seen))
    worth = jnp.quantile(1 / jnp.exp(2 * seen).sum(1), ROWS_BELOW, axis=1).min()
    return PriorGain(value.mean(), jnp.sqrt(noise.mean() / 2), worth)


def prior_gain_finding(site: str, found: PriorGain, *, are_well: bool) -> Finding:
    """What is said of that gain.

    :param are_well: whether all else is. Where it is not, that is the cause to tell.
    """
    value, error, worth = map(float, found)
    if not worth >= MIN_WORTH or math.isnan(value):
        why = "samples of the prior do not tell the posterior of a row, as rows tell too much of it, or are not independent"
        return not_told(site, GAIN, why)
    return Finding(site, GAIN, value, None, NATS + 3 * error if are_well else None, FIX.format(NUM_STEPS))
