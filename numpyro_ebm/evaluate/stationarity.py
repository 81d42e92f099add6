# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether the last step of a fit stands where the likelihood is stationary in an energy.

At a maximum the mean gradient of an energy is the same under its own density p as where it learns, at the data or under the
posterior of a latent: :math:`g = E_q [\nabla_\psi \log \tilde p] - E_p [\nabla_\psi \log \tilde p] = 0`. Steps of a constant rate
swing about that point, while chains mix and agree with whatever is learned at the moment. Along a direction u the two differ by

.. math:: d = \frac{E_q [s] - E_p [s]}{\mathrm{sd}_p [s]}, \qquad s(x) = \langle u, \nabla_\psi \log \tilde p(x) \rangle,

standard deviations: where a mode has the weight w under p and v where it learns, :math:`|v - w| / \sqrt{w (1 - w)}`. A step along
it would gain about :math:`d^2 / 2` nats for each row. That is the most for the natural gradient, :math:`u = F^{-1} g` with
:math:`F = \mathrm{cov}_p [\nabla_\psi \log \tilde p]`, of which some steps of conjugate gradients are taken. Half of the samples
gives the direction, and the other half the distance, so that noise alone has none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_ebm.chains import chains_of
from numpyro_ebm.evaluate.density import KnownDensity
from numpyro_ebm.evaluate.natural_distance import NUM_GROUPS, NUM_VALUES, Data, natural_distance
from numpyro_ebm.evaluate.prior_gain import PriorGain, prior_gain, prior_gain_findings
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.evaluate.yardstick import Shortfall, others_finding, prior_finding, rows_finding, shortfall_elsewhere, shortfall_of
from numpyro_ebm.handlers import chains_target, innermost, negative_phase, undrawn, unnormalized
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.rows import all_batches, some_batches
from numpyro_ebm.program.run import Run, run_model
from numpyro_ebm.program.sites import FIELD, is_masked

FROM_DATA, FROM_POSTERIOR = "distance of density from data", "distance of prior from posterior"
MOST = 0.15  # standard deviations: a mode of 50 % may have 43
MOST_ERROR = 1.0  # of right fits it is that of a mean of rows, in the standard deviations of one
MIN_RUNS = 16  # of the model, each with other samples of the posterior
MANY_ROWS = 500
SAMPLES_OF_CHAIN, MANY_OF_CHAIN = 10, 20
FIX = (
    "at the last step {} differ by so many standard deviations, along the natural gradient of the likelihood: the fit has not "
    "reached the maximum, or swings about it. Let the learning rate fall, as by optax.cosine_decay_schedule(rate, num_steps), take "
    "more steps, or average the last of them. Weight decay and priors of parameters keep a fit away from the maximum, and read the "
    "same"
)
WORSE = (
    "The last step is at no maximum that a network of this size has: it learns slowly, as where inputs are large, or it is too "
    "small. Take more steps, a learning rate that falls, standardized data with a base on their scale, or a larger network"
)
NO_GRADIENT = (
    "the energy has no gradient in its parameters where it learns or at its chains, or next to none, so that it stays what it is: "
    "a network is saturated where its inputs are large. Standardize the data, and take a base on their scale"
)

RunOf = Callable[[Array], Run]


@dataclass(frozen=True)
class Distance:
    """How far the density of a site is from what it learns from."""

    #: (), in standard deviations
    value: Array
    #: (), its standard error
    error: Array
    #: what a prior would gain by steps of likelihood; None where it is not known
    gain: PriorGain | None
    #: how its log density compares with simple estimates of what it learns from; None where it is not known
    shortfall: Shortfall | None
    #: the same at validation rows; None without them
    elsewhere: Shortfall | None
    is_observed: bool


jax.tree_util.register_dataclass(Distance, ["value", "error", "gain", "shortfall", "elsewhere"], ["is_observed"])


@jax.tree_util.register_static  # so that a compiled function may return it
@dataclass(frozen=True)
class Unknown:
    """Why that distance is not told."""

    why: str
    is_observed: bool
    is_missing: bool = False


def distances(
    rng_key: Array,
    phase: negative_phase,
    run_of: RunOf | None,
    draws: dict[str, Array],
    known: dict[str, KnownDensity | None],
    params: Data,
    mutable_state: Data,
    args: tuple[Any, ...],
    kwargs: Data,
    *,
    of_posterior: bool,
    validation: tuple[Any, ...] | None,
) -> dict[str, Distance | Unknown]:
    """By energy site that has chains; traced.

    :param run_of: a run of the model by a key, with latents from their posterior; None where that is not known.
    :param of_posterior: whether these are samples of the posterior itself, not of a guide.
    :param validation: the arguments of the model with rows that were not learned from.
    :param draws: of chains at these parameters, ``(num_samples, chains) + shape``.
    :param known: by site, its density.
    """
    model, data = unnormalized(innermost(phase).fn), {**params, **mutable_state}
    looked = check_run(model, args, kwargs, data=data)
    learned = {site.name: site for site in looked.sites}
    run = run_of or (lambda key: run_model(undrawn(model), args, kwargs, key, data=data))
    program = run(rng_key)
    of_energies = {param for site in looked.learned for param in site.params}
    found: dict[str, Distance | Unknown] = {}
    for name in chains_of(mutable_state):
        if name == FIELD:
            continue
        site, x = program.sites[name], draws[name]
        shape = x.shape[2 : x.ndim - site["fn"].event_dim]  # of energies with a density of their own
        others = {param for other in learned.values() if other.name != name for param in other.params}
        own = [param for param in learned[name].params if param not in others and _is_real(params.get(param))]
        is_observed = bool(site["is_observed"])
        is_part = any(frame.name in program.subsampled for frame in site["cond_indep_stack"])
        is_missing = False
        if not own:
            why = "it has no parameters, or shares them with other sites, whose gradients go into the same step"
        elif learned[name].latents or is_masked(site["fn"]) or (is_part and math.prod(shape) > 1):
            why = "its rows are masked, depend on latents, or have densities of their own of which a batch has some"
        elif not is_observed and run_of is None:
            why = "give diagnose(..., guide=) the guide of the fit, whose samples the prior has learned from"
            is_missing = True
        else:
            is_all = is_observed and not is_part
            values = _values(rng_key, run, name, site, shape, is_all=is_all)

            def log_density(params: Data, value: Array, name: str = name, own: list[str] = own) -> Array:
                given = {**data, **params}
                return chains_target(phase, name, args, kwargs, given)[0]._log_density(value)

            own_params = {param: params[param] for param in own}
            value, error = natural_distance(log_density, own_params, values, _groups(x, shape), is_all=is_all)
            energy, sampler = chains_target(phase, name, args, kwargs, data)
            gain = None
            if not (is_observed or shape):
                samples = _with_reference(rng_key, energy, sampler, known[name], _groups(x, shape, MANY_OF_CHAIN))
                call = model, args, kwargs, data, program, name, *samples
                gain = prior_gain(rng_key, *call, log_density, own_params, of_energies)
            apart = None if is_part or shape else _by_owner(values)
            if is_part and is_observed:
                apart = _in_batches(rng_key, model, args, kwargs, data, program, name)
            short = _shortfall(energy, sampler, known[name], apart, of_posterior=of_posterior)
            elsewhere = None
            if validation is not None and short is not None and is_observed:
                others = run_model(undrawn(model), validation, kwargs, rng_key, data=data).sites[name]["value"]
                elsewhere = _elsewhere(energy, sampler, known[name], others, apart)
            found[name] = Distance(value, error, gain, short, elsewhere, is_observed)
            continue
        found[name] = Unknown(why, is_observed, is_missing)
    return found


def has_likelihood(found: Distance | Unknown) -> bool:
    """Whether the likelihood of rows is known, and could be of others."""
    return isinstance(found, Distance) and found.is_observed and found.shortfall is not None


def _is_real(param: Any) -> bool:
    leaves = jax.tree.leaves(param)
    return bool(leaves) and all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves)


def _values(rng_key: Array, run: RunOf, name: str, site: Data, shape: tuple[int, ...], *, is_all: bool) -> Array:
    """Where an energy learns, ``(blocks, size) + shape + event_shape``, in blocks that differ by nothing but noise.

    All data are one block. Of latents, and of data in part, a block is a run; or a row, where there are many.
    """
    seen = np.shape(site["value"])  # more than the plates say where data stand without one
    batch = lax.broadcast_shapes(seen[: len(seen) - site["fn"].event_dim], site["fn"].batch_shape)
    num_rows = max(1, math.prod(batch) // max(math.prod(shape), 1))
    is_many = num_rows >= MANY_ROWS
    num_runs = 1 if is_all else 2 if is_many else max(MIN_RUNS, -(-NUM_VALUES // num_rows))
    found = lax.map(lambda key: jnp.asarray(run(key).sites[name]["value"]), jax.random.split(rng_key, num_runs))
    event_shape = found.shape[found.ndim - site["fn"].event_dim :]
    found = jnp.broadcast_to(found, (num_runs, *batch, *event_shape)).reshape(num_runs, -1, *shape, *event_shape)
    if is_all or not is_many:
        return lax.stop_gradient(found)
    every = -(-num_runs * num_rows // NUM_VALUES)
    starts = [at * every // num_runs for at in range(num_runs)]  # each run with other rows
    apart = [each[start::every][: num_rows // every] for start, each in zip(starts, found, strict=True)]
    return lax.stop_gradient(jnp.concatenate(apart)[:, None])


def _in_batches(rng_key: Array, model: Any, args: tuple[Any, ...], kwargs: Data, data: Data, program: Run, name: str) -> Array:
    """Rows of the data in a subsampled plate, ``(1, rows) + event_shape``, each of them once."""
    size = program.sites[name]["fn"].batch_shape
    num_rows = max(1, math.prod(size))
    batches = some_batches(all_batches(program), NUM_VALUES // num_rows)  # the last of all may begin again from the first row

    def rows(batch: Data) -> Array:
        return run_model(undrawn(model), args, kwargs, rng_key, data={**data, **batch}).sites[name]["value"]

    found = lax.map(rows, batches)
    return found.reshape(1, len(found) * num_rows, *found.shape[1 + len(size) :])


def _by_owner(values: Array) -> Array:
    """The values of the rows of :func:`_values` beside each other, ``(copies, rows) + event_shape``."""
    return jnp.moveaxis(values, 1, 0) if values.shape[1] == 1 else values


def _shortfall(
    energy: Any, sampler: Any, known: KnownDensity | None, values: Array | None, *, of_posterior: bool
) -> Shortfall | None:
    """How its density compares at values ``(copies, rows) + event_shape``, if both are known."""
    if known is None or values is None or energy.support.is_discrete:
        return None
    x = energy.to_chain(values.reshape(-1, *values.shape[2:]), sampler)
    x = x.reshape(*values.shape[:2], *x.shape[1:])
    return shortfall_of(energy.chain_log_prob(sampler), known, x, of_posterior=of_posterior)


def _elsewhere(energy: Any, sampler: Any, known: Any, others: Any, learned: Any) -> Shortfall | None:
    """The same at other rows."""
    event_shape = learned.shape[2:]
    x, rows = (energy.to_chain(jnp.asarray(y).reshape(-1, *event_shape), sampler) for y in (others, learned))
    return shortfall_elsewhere(energy.chain_log_prob(sampler), known, x, rows)


def _groups(draws: Array, shape: tuple[int, ...], samples_of_chain: int = SAMPLES_OF_CHAIN) -> Array:
    """Some samples of chains, ``(groups, samples) + shape + event_shape``: of different chains where there are enough."""
    some = draws[:: -(-len(draws) // samples_of_chain)]
    some = jnp.moveaxis(some, 1, 0) if some.shape[1] >= NUM_GROUPS else draws
    some = some[: len(some) // 2 * 2]
    num_groups = min(NUM_GROUPS, len(some))
    some = some[: len(some) // num_groups * num_groups]
    return lax.stop_gradient(some.reshape(num_groups, -1, *draws.shape[2:]))


def _with_reference(rng_key: Array, energy: Any, sampler: Any, known: KnownDensity | None, chains: Array) -> tuple[Array, Array]:
    """Samples of chains, and as many of the reference if there is one, with the log weights of samples of both together."""
    target, (groups, size) = energy.chain_log_prob(sampler), chains.shape[:2]
    if known is None or target.reference is None:
        return chains, jnp.zeros((groups, size))
    position = energy.to_chain(chains.reshape(-1, *chains.shape[2:]), sampler)
    both = jnp.concatenate([position, target.reference.sample(rng_key, groups * size)])
    log_prior, log_reference = target(both) - known.log_normalizer, target.reference.log_prob(both)
    log_weights = math.log(2) + log_prior - jnp.logaddexp(log_prior, log_reference)

    def in_groups(y: Array) -> Array:
        return jnp.concatenate(list(y.reshape(2, groups, size, *y.shape[1:])), 1)

    return in_groups(energy.from_chain(both, sampler)), in_groups(log_weights)


def stationarity_findings(site: str, found: Distance | Unknown, *, are_well: bool) -> list[Finding]:
    """What is said of that distance, and of its log density.

    :param are_well: whether the chains are, which stand for the density. Where they are not, that is the cause to tell.
    """
    quantity = FROM_DATA if found.is_observed else FROM_POSTERIOR
    if isinstance(found, Unknown):
        return [not_told(site, quantity, found.why, is_missing=found.is_missing)]
    value, error = float(found.value), float(found.error)
    if math.isnan(value) or error > MOST_ERROR:
        return [not_told(site, quantity, NO_GRADIENT, is_missing=are_well)]
    fix = FIX.format("the density and the data" if found.is_observed else "the prior and the posterior that it learns from")
    distance = Finding(site, quantity, value, None, MOST + 3 * error if are_well else None, fix if are_well else "")
    findings = [distance]

    def is_well() -> bool:  # else the same cause is told already
        return are_well and all(finding.is_well for finding in findings)

    if found.gain is not None:
        findings += prior_gain_findings(site, found.gain, are_well=is_well())
    if found.shortfall is not None:
        finding_of = rows_finding if found.is_observed else prior_finding
        findings.append(finding_of(site, found.shortfall, WORSE, are_well=is_well()))
    if found.elsewhere is not None:
        findings.append(others_finding(site, found.elsewhere, are_well=is_well()))
    return findings
