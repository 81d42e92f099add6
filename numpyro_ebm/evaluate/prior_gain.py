# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""What a prior would gain if it went on by the likelihood of the rows.

Rows that tell little of their latents leave samples of the posterior near the prior. A prior then agrees with them while it is far
from the maximum: a step towards it gains little of the bound, in which the samples stay, and much of the likelihood. With other
parameters, :math:`p'` for p, the likelihood of a row changes by

.. math:: \log E_{p(z | y)} \Big[\frac{p'(y | z)}{p(y | z)} e^{\delta(z)}\Big] - \log E_p [e^{\delta(z)}],
    \qquad \delta = \log \tilde p' - \log \tilde p.

Both means are taken over the same samples of p, with weights :math:`p(y | z)` for the first, so that no guide and no particles
have a part in them. Half of them are samples of the reference, which has room for another prior, and all are weighted as those
of a mixture of both are. Natural gradient steps are made, in the metric of the covariance of the gradients of rows, with one
half of the samples, and the other half tells what they have gained. The few parameters and latents that all rows share go with
the prior: a noise that is too large hides what the prior could learn. A network may have hardly a gradient where it is: so weights
of the samples are learned, too, without parameters, which tells what the best prior of all would gain.

Where rows tell much, few samples of the prior are samples of their posterior, and samples of a guide or particles tell what this
would.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

from numpyro_ebm.evaluate.natural_distance import NUM_CG, NUM_GROUPS, Data, halves, natural_direction, variance_of_mean
from numpyro_ebm.evaluate.param_distance import told_params
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.program.rows import ROUNDING, dim_of, per_row, row_plate
from numpyro_ebm.program.run import Run, constrain_params, log_density_terms, total, unconstrain_params
from numpyro_ebm.program.sites import Model, transform_of

GAIN = "nats that a row would gain by steps of likelihood"
MAX_SIZE = 3  # elements of a latent: in more dimensions hardly a sample of the prior is one of a posterior
MAX_SHARED = 10  # elements of a latent that rows share
MAX_VALUES = 2**20  # of the sites of rows, for all samples
MIN_ROWS, MAX_ROWS = 20, 2000
MIN_SAMPLES, MAX_SAMPLES = 500, 5000  # of the prior
MIN_WORTH = 10.0  # samples of the prior, in each half, that a row's posterior should be known by
ROWS_BELOW = 0.1  # the fraction of rows that may have fewer
MAX_STEPS, STALLED = 30, 2e-4  # nats that a step must gain for another one
LENGTHS = (0.0, 0.004, 0.016, 0.06, 0.25, 1.0)  # of a step, of which the best is taken
NATS, OFF = 0.04, 4  # that a row may gain, and params that may each be a standard error off: of n rows each loses 1 / 2n
FIX = (
    "so much would natural gradient steps of the likelihood of the rows gain, in the prior and in what all rows share. The fit has "
    "not arrived, or its guide or particles are not the posterior: take more steps, a learning rate that is larger at first and "
    "falls to 0, or another guide; or learn with ParticleMMLE(kernel='mala')"
)
BEST = "nats that a row would gain by the best prior"
FEW_PARAMS = 20  # whose best values steps find; that no better prior is among them is the user's choice
LEAST = 1e-30  # weight of a sample
NUM_EM = 50  # steps of the EM algorithm towards it
CHANCE = 2.5  # nats that all rows together gain by chance, for each value of the latent that a row tells apart
BEST_FIX = (
    "of all priors on samples of this one and its reference, the best gives the rows so much more. The fit has not arrived, its "
    "guide or particles are not the posterior, or the energy is too small: take more steps, a learning rate that is larger at "
    "first and falls to 0, another key, a larger network, or ParticleMMLE(kernel='mala')"
)
FEW = "samples of the prior do not tell the posterior of a row, as rows tell too much of it, or hang together"


class PriorGain(NamedTuple):
    """What steps of likelihood would gain."""

    #: (), nats a row
    value: Array
    #: (), its standard error
    error: Array
    #: (), how many samples of the prior a row's posterior is known by, in each half; 0 where rows have no posterior of their own
    worth: Array
    #: (), of rows
    number: Array
    #: (), nats that the best prior gives a row, and how many values of the latent a row tells apart; nan of more than one element
    of_best: Array
    num_told_apart: Array
    #: (), how many parameters it has
    num_params: Array


class _Seen(NamedTuple):
    """Log densities at some parameters."""

    prior: Array  # (samples,)
    rows: Array  # (samples, rows), of each row where its latent is the sample
    rest: Array  # (samples,), of what rows share


class _Steps(NamedTuple):
    """How far steps of likelihood have come."""

    num: Array
    at: Any  # parameters
    before: _Seen  # at the start
    gained: Array
    is_gaining: Array


def prior_gain(
    rng_key: Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: Data,
    data: Data,
    program: Run,
    name: str,
    samples: Array,
    log_weights: Array,
    log_density: Callable[[Data, Array], Array],
    params: Data,
    of_energies: Collection[str],
) -> PriorGain | None:
    """That of a latent site with a density of its own, None where it cannot be known; traced.

    :param model: with energies that are not normalized.
    :param data: values of param and mutable sites.
    :param program: a run of the model, which gives the other latents.
    :param samples: ``(groups, samples) + event_shape``, in groups that differ by nothing but noise.
    :param log_weights: ``(groups, samples)``, with which they are samples of the prior.
    :param params: its own parameters.
    :param of_energies: all params of energies.
    """
    site, plate = program.sites[name], row_plate(program, [name])
    if plate is None:
        return None
    shape, event_shape, size = site["fn"].batch_shape, samples.shape[2:], program.plates[plate].size
    num_rows = len(program.plates[plate].indices)
    is_one_each = math.prod(shape) == num_rows == shape[dim_of(site, plate)]
    if not is_one_each or num_rows < MIN_ROWS or math.prod(event_shape) > MAX_SIZE:
        return None
    of_rows = [other["value"] for other in program.sites.values() if other["type"] == "sample" and dim_of(other, plate) is not None]
    most = min(MAX_SAMPLES, MAX_VALUES // sum(jnp.size(value) for value in of_rows))
    if len(samples) < NUM_GROUPS or min(most, log_weights.size) < MIN_SAMPLES:
        return None
    every = -(-log_weights.size // most)
    samples, log_weights = samples[:, ::every], log_weights[:, ::every]
    every_row, transforms = -(-num_rows // MAX_ROWS), program.param_transforms
    theta = unconstrain_params({name: data[name] for name in transforms if name in data}, transforms)
    apart = [other for other in program.positions if dim_of(program.sites[other], plate) is None]
    shared = [other for other in apart if program.positions[other].size <= MAX_SHARED]
    start = params, told_params(theta, of_energies), {other: program.positions[other] for other in shared}
    given = {**data, **program.given(but=(name, *shared))}

    def seen(at: Any, x: Array) -> _Seen:
        prior, told, latents = at
        told = constrain_params(told, transforms)
        latents = {name: transform_of(program.sites[name])(value) for name, value in latents.items()}

        def where(z: Array) -> tuple[Array, Array]:
            value = jnp.broadcast_to(z, (*shape, *event_shape))
            terms, run = log_density_terms(model, args, kwargs, rng_key, data={**given, **told, **latents, name: value})
            of_rows = {other: terms.pop(other) for other in [*terms] if dim_of(run.sites[other], plate) is not None}
            del of_rows[name]
            found = per_row(of_rows, run, plate) if of_rows else jnp.zeros(num_rows)
            return found[::every_row], total(terms) / size

        return _Seen(log_density(prior, x), *jax.vmap(where)(x))

    is_part = program.plates[plate].is_subsampled or every_row > 1
    return _gain(seen, start, samples, log_weights, is_part=is_part)


def _gain(seen: Any, start: Any, samples: Array, log_weights: Array, *, is_part: bool) -> PriorGain:
    """Of either half of the samples by steps of the other.

    :param seen: log densities by parameters and samples.
    :param start: parameters, those of the prior first.
    :param is_part: whether there are more rows.
    """
    num_groups = len(samples) // 2
    x, log_weights = halves(samples).reshape(2, -1, *samples.shape[2:]), halves(log_weights).reshape(2, -1)

    def counts(now: _Seen, before: _Seen, log_weights: Array) -> tuple[Array, Array]:
        """The logarithms of what samples count for the prior and for each row."""
        of_prior = log_weights + now.prior - before.prior
        return of_prior, now.rows + of_prior[:, None]

    def gains(now: _Seen, before: _Seen, log_weights: Array) -> Array:
        """By row."""
        then, first = (counts(each, before, log_weights) for each in (now, before))
        of_prior, of_rows = (logsumexp(a, 0) - logsumexp(b, 0) for a, b in zip(then, first, strict=True))
        return of_rows - of_prior + now.rest.mean() - before.rest.mean()

    def stepped(half: tuple[Array, Array]) -> Any:
        """The parameters after the steps."""
        x, log_weights = half

        def step(carry: _Steps) -> _Steps:
            at = carry.at

            def at_start(now: _Seen) -> _Seen:
                return jax.tree.map(lambda now, before: jnp.where(carry.num == 0, now, before), now, carry.before)

            def measures(now: _Seen) -> tuple[Any, Any]:
                of_prior, of_rows = (jax.nn.softmax(found, 0) for found in counts(now, at_start(now), log_weights))

                def of_each(slopes: _Seen) -> Array:
                    return ((slopes.prior[:, None] + slopes.rows) * of_rows).sum(0)

                def gap(slopes: _Seen) -> Array:
                    return of_each(slopes).mean() - slopes.prior @ of_prior + slopes.rest.mean()

                def variance(slopes: _Seen) -> Array:
                    return of_each(slopes).var()

                return gap, variance

            towards, now = natural_direction(seen, at, x, measures, NUM_CG)
            before = at_start(now)
            tried = jax.tree.map(lambda a, b: a + jnp.asarray(LENGTHS).reshape(-1, *[1] * a.ndim) * b, at, towards)
            gained = lax.map(lambda at: gains(seen(at, x), before, log_weights).mean(), tried)
            best = jnp.argmax(jnp.where(jnp.isnan(gained), -jnp.inf, gained))
            at = jax.tree.map(lambda each: each[best], tried)
            return _Steps(carry.num + 1, at, before, gained[best], gained[best] >= carry.gained + STALLED)

        nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(seen, start, x))
        steps = _Steps(jnp.zeros((), int), start, nothing, jnp.zeros(()), jnp.ones((), bool))
        return lax.while_loop(lambda carry: carry.is_gaining & (carry.num < MAX_STEPS), step, steps).at

    def judged(half: tuple[Any, Array, Array]) -> PriorGain:
        """What other samples say of the gain, with the square of its error."""
        then, x, log_weights = half
        both = lax.map(lambda at: seen(at, x), jax.tree.map(lambda *each: jnp.stack(each), start, then))
        before, now = (jax.tree.map(lambda y, i=i: y[i], both) for i in range(2))
        gained = gains(now, before, log_weights)
        of_prior, of_rows = (jax.nn.softmax(found, 0) for found in counts(now, before, log_weights))
        was_of_prior, was_of_rows = (jax.nn.softmax(found, 0) for found in counts(before, before, log_weights))
        added = (of_rows - was_of_rows).mean(1) - (of_prior - was_of_prior)  # by each sample
        noise = variance_of_mean(len(x) * added.reshape(1, num_groups, -1).mean(2))[0]
        worth = jnp.quantile(1 / (was_of_rows**2).sum(0), ROWS_BELOW)
        is_apart = before.rest.max() - before.rest.min() <= ROUNDING * (1 + abs(before.rest).max())  # else by what is outside
        noise += gained.var() / len(gained) if is_part else 0
        best = _best_prior(was_of_prior, before.rows) if x[0].size == 1 else (jnp.asarray(jnp.nan),) * 2
        number, num_params = (jnp.asarray(size) for size in (len(gained), sum(x.size for x in jax.tree.leaves(start[0]))))
        return PriorGain(gained.mean(), noise, jnp.where(is_apart, worth, 0.0), number, *best, num_params)

    then = lax.map(stepped, (x[::-1], log_weights[::-1]))  # in each of these the model is compiled in as few places as can be
    found = lax.map(judged, (then, x, log_weights))
    return jax.tree.map(jnp.mean, found)._replace(error=jnp.sqrt(found.error.mean() / 2), worth=found.worth.min())


def _best_prior(weights: Array, of_rows: Array) -> tuple[Array, Array]:
    """What a row gains by the best weights of samples, and the exponential of the information that a row has of its latent.

    Rows of a prior itself gain by the best one, all together, about 2.2 times that number of values which they tell apart.

    :param weights: ``(samples,)``, of the prior.
    :param of_rows: ``(samples, rows)``, the log likelihood of each row.
    """
    log_likelihood, times = of_rows - of_rows.max(0), partial(jnp.matmul, precision="highest")
    likelihood, weights = jnp.exp(log_likelihood), jnp.maximum(weights, LEAST)  # the best prior may be where this one is not

    def step(_: Any, best: Array) -> Array:
        return best * times(likelihood, 1 / times(best, likelihood)) / likelihood.shape[1]

    best, before = lax.fori_loop(0, NUM_EM, step, weights), times(weights, likelihood)
    of_posterior = jnp.where(likelihood > 0, likelihood * (log_likelihood - jnp.log(before)), 0)
    information = (times(weights, of_posterior) / before).mean()
    return jnp.log(times(best, likelihood) / before).mean(), jnp.exp(information)


def prior_gain_findings(site: str, found: PriorGain, *, are_well: bool) -> list[Finding]:
    """What is said of these gains.

    :param are_well: whether all else is. Where it is not, that is the cause to tell.
    """
    value, error, worth, number, of_best, num_told_apart, num_params = map(float, found)
    if not worth >= MIN_WORTH or math.isnan(value):
        return [not_told(site, GAIN, FEW)]
    most = NATS + OFF / number / 2 + 3 * error if are_well else None
    of_steps = Finding(site, GAIN, value, None, most, FIX)
    if math.isnan(of_best):
        return [of_steps]
    by_chance = CHANCE * num_told_apart
    is_asked = num_params > FEW_PARAMS and of_steps.is_well and are_well
    most = NATS + (by_chance + 3 * math.sqrt(by_chance)) / number + 1 / worth if is_asked else None
    return [of_steps, Finding(site, BEST, of_best, None, most, BEST_FIX)]
