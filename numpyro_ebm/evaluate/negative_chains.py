# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether the negative chains of a fit are worth believing, and with them the energy that they have taught.

Chains that learn an energy look right by construction: the energy is changed until they match the data. What tells is

* whether they *mix* at the final parameters: R-hat and the effective sample size of chains that are moved on from the fit;
* whether they are distributed as the *density* says that they teach: by quadrature for events of one or two dimensions, else by
  importance weights of samples of the reference, :math:`w = \tilde p / b`, where these are worth enough;
* of weighted chains, which need not mix, whether their *weights* are worth something from step to step, and whether chains that
  teach agree with monitors that do not.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_ebm.chains import chains_of, positions
from numpyro_ebm.evaluate.capacity import capacity_findings
from numpyro_ebm.evaluate.density import KnownDensity, distance_from, known_density, why_unknown
from numpyro_ebm.evaluate.mixing import R_HAT_OF_AGREEING, R_HAT_OF_CHAINS, least_sample_size, worst_r_hat
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.evaluate.stationarity import Distance, RunOf, Unknown, distances, has_likelihood, stationarity_findings
from numpyro_ebm.evaluate.yardstick import OF_OTHERS
from numpyro_ebm.handlers import chains_target, explain_chains, frozen_chains, innermost, negative_phase
from numpyro_ebm.program.sites import FIELD
from numpyro_ebm.weighted import is_weighted
from numpyro_ebm.weights import effective_sample_size, normalized_weights

DISTANCE = "distance of chains from density"
UNADJUSTED = "h times the curvature of unadjusted chains"
NUM_SAMPLES = 50  # of every chain, each after one run of its sampler
# How far chains may be from the density: a mode of 50 % may have 45. The error of both sides is added, three times over.
TOLERANCE = 0.05
# Weighted chains may lose half of what they are worth in a step, on average, and not more.
KEPT_BY_WEIGHTS = 0.5
GIVE_REFERENCE = "Give reference= one, wide enough"
NOT_OF_OTHERS = (
    "it is no density of rows that is known: of a latent, of more than two dimensions, or the distance above is not told"
)
ASK_MONITORS = (
    "Monitors tell it, negative_phase(weights=Weighted(num_monitor_chains=...)); of an RBM log_normalizer gives the likelihood of "
    "other rows"
)
MAX_DRAWN = 2**22  # numbers that are looked at of a site


class ChainNumbers(NamedTuple):
    """What is measured of chains that are moved on from a fit."""

    #: by sample site, ``(num_samples, chains) + shape``: where some of the chains stood
    draws: dict[str, Array]
    #: by site of chains: what mutable sites keep of them after that
    chains: dict[str, Any]
    #: by energy site, of the shape of its stack: the distance from the density, how many samples this is known by;
    #: None where there are no samples
    distance: dict[str, tuple[Array, Array] | None]
    #: by site of chains: whether there is a reference
    has_reference: dict[str, Any]
    #: by energy site: how far its density is from what it learns from
    from_learned: dict[str, Distance | Unknown]


def chain_numbers(
    rng_key: Array,
    phase: negative_phase,
    num_samples: int,
    params: dict[str, Any],
    mutable_state: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run_of: RunOf | None = None,
    *,
    of_posterior: bool = True,
    validation: tuple[Any, ...] | None = None,
) -> ChainNumbers:
    """Moves the chains of a fit on at its parameters, and measures them; traced.

    :param run_of: a run of the model by a key, with latents from their posterior; None where that is not known.
    :param of_posterior: whether these are samples of the posterior itself, not of a guide.
    :param validation: the arguments of the model with rows that were not learned from.
    """
    move_key, judge_key, learn_key = jax.random.split(rng_key, 3)

    def some(x: Array) -> Array:
        return x[:: _stride(x, num_samples)]

    def some_of_field(x: Array) -> Array:
        x = some(x).reshape(*some(x).shape[:1], -1)
        return x[:, :: math.ceil(num_samples * x.size / MAX_DRAWN)]

    def look(chains: Mapping[str, Any]) -> dict[str, Array]:
        of_field = chains.get(FIELD, {}).get("x", {})
        return {name: (some_of_field if name in of_field else some)(x) for name, x in positions(chains).items()}

    state, draws = frozen_chains(move_key, phase, num_samples, params, mutable_state, args, kwargs, look)
    distance, has_reference, known = {}, {}, {}
    for site in chains_of(state):
        energy, sampler = chains_target(phase, site, args, kwargs, {**params, **state})
        if site == FIELD:
            has_reference[site] = False
        else:
            has_reference[site] = energy.chain_log_prob(sampler).reference is not None
            x = energy.to_chain(draws[site].reshape(-1, *draws[site].shape[2:]), sampler)
            known[site] = known_density(judge_key, energy, sampler, x)
            distance[site] = _distance(known[site], x, is_discrete=energy.support.is_discrete)
    from_learned = distances(
        learn_key, phase, run_of, draws, known, params, state, args, kwargs, of_posterior=of_posterior, validation=validation
    )
    return ChainNumbers(draws, chains_of(state), distance, has_reference, from_learned)


def _stride(x: Any, num_samples: int) -> int:
    """Every how many chains are looked at."""
    return min(len(x), math.ceil(num_samples * x.size / MAX_DRAWN))


def chain_findings(
    phase: negative_phase,
    numbers: ChainNumbers,
    params: dict[str, Any],
    mutable_state: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_validated: bool | None = None,
) -> list[Finding]:
    """What these numbers say.

    :param mutable_state: that of the fit, before its chains were moved on.
    :param is_validated: whether rows were given that were not learned from; None where they cannot be.
    """
    phase, findings = innermost(phase), list[Finding]()
    of_rows = {site for site, found in numbers.from_learned.items() if is_validated is not None and has_likelihood(found)}
    by_site = {name: np.moveaxis(np.asarray(draws), 1, 0) for name, draws in numbers.draws.items()}
    for site, kept in numbers.chains.items():
        if (status := int(kept["status"])) > 1:
            why = explain_chains(phase, site, status, args, kwargs, {**params, **mutable_state})
            findings.append(not_told(site, "R-hat", f"moved on at the final parameters, its chains fail: {why}"))
            continue
        fix = _more_jumps(site, kept, bool(numbers.has_reference[site]))
        draws = {name: by_site[name] for name in (kept["x"] if site == FIELD else [site])}
        weighted = is_weighted(kept)
        if site == FIELD:
            density = _density_unknown(site, "a random field has no reference distribution whose samples could be weighed by it")
        else:
            density = _from_density(site, draws[site], numbers.distance[site], fix)
        if phase.persistent:
            agrees = density.is_told and density.is_well
            most = None if weighted else R_HAT_OF_AGREEING if agrees else R_HAT_OF_CHAINS
            findings += _mixing(site, draws, most, fix)
        findings += _acceptance(site, kept, bool(numbers.has_reference[site]))
        if weighted:
            before = chains_of(mutable_state)[site]
            findings.append(_collapse(site, before, phase.num_chains))
            if len(before["x"]) > phase.num_chains:
                num_taught = math.ceil(phase.num_chains / _stride(before["x"], draws[site].shape[1]))
                findings.append(_agreement(site, draws[site][:num_taught], draws[site][num_taught:]))
        findings.append(density)
        if site in numbers.from_learned:
            are_well = all(finding.is_well for finding in findings if finding.site == site)
            findings += stationarity_findings(site, numbers.from_learned[site], are_well=are_well)
        if is_validated and site not in of_rows:
            findings.append(not_told(site, OF_OTHERS, NOT_OF_OTHERS))
    if is_validated:
        return findings
    are_well = all(finding.is_well for finding in findings)
    capacity = capacity_findings(phase, params, mutable_state, args, kwargs, can_be_given=of_rows, are_well=are_well)
    return findings + [finding for site in numbers.chains for finding in capacity.get(site, [])]


def _mixing(site: str, draws: dict[str, np.ndarray], most: float | None, more: str) -> list[Finding]:
    """R-hat and effective sample size of the worst element of chains, ``(num_chains, num_samples) + shape``."""
    found = max(map(worst_r_hat, draws.values()))
    size = min(map(least_sample_size, draws.values()))
    fix = f"the chains do not mix, and the weights of modes that they do not cross between are not determined. {more}"
    return [Finding(site, "R-hat", found, None, most, fix), Finding(site, "effective sample size", size, None, None, "")]


# H times the curvature of unadjusted chains: a precision is learned 12 % too large at .2, and 5 % at the .1 of ebipla.
STIFF = 0.15


def _acceptance(site: str, kept: Mapping[str, Any], has_reference: bool) -> list[Finding]:
    """Of the sampler's steps and jumps, where it keeps it."""
    if "stiffness" in kept:  # of unadjusted chains
        fix = (
            "their variance is too large by a fraction of half this number, which biases the energy: take a smaller step_size, "
            "or MALA"
        )
        return [Finding(site, UNADJUSTED, float(np.max(kept["stiffness"])), None, STIFF, fix)]
    if "acceptance" not in kept:
        return []
    steps = float(np.min(kept["acceptance"]))
    found = [Finding(site, "acceptance of steps", steps, 0.15, None, "take a smaller step_size, or adapt=True")]
    if has_reference:
        return [*found, Finding(site, "acceptance of jumps", _jumps(kept), None, None, "")]
    why = "there is no reference to jump from, so that only R-hat tells whether chains cross between modes"
    return [*found, not_told(site, "acceptance of jumps", why)]


def _jumps(kept: Mapping[str, Any]) -> float:
    return float(np.min(kept.get("jump_acceptance", 0.0)))


def _more_jumps(site: str, kept: Mapping[str, Any], has_reference: bool) -> str:
    if site == FIELD:  # a pool of whole fields, which has neither a reference nor weights
        return (
            "Move them for longer, negative_phase(model, sampler=MALA(num_steps=...)) with more steps than now, or take more chains"
        )
    if "acceptance" not in kept:  # of block Gibbs, and of other samplers that reject nothing
        return "Take more num_steps of the sampler, more chains, a smaller learning rate, or weights=Weighted()"
    if not has_reference:
        return "Take more num_steps, or more chains, or give reference= a distribution that reaches all modes, to jump from"
    if _jumps(kept) > 0.01:
        return "Take more num_steps or num_jumps in MALA, or more chains"
    return (
        "Hardly a jump is accepted: if the sampler makes none, give MALA its num_jumps; else take a reference= as wide as what is "
        "learned, a base closer to it, more num_steps, or weights=Weighted()"
    )


def _collapse(site: str, kept: Mapping[str, Any], num_chains: int) -> Finding:
    """What weighted chains have kept of their worth in a step, on average over the fit, of the worst energy of a stack.

    It is known by the variance of log Z that all resamplings and the present weights have spent.
    """
    log_weight = np.asarray(kept["log_weight"])[:num_chains]
    now = num_chains / np.asarray(effective_sample_size(normalized_weights(jnp.asarray(log_weight)))) - 1
    spent = num_chains * np.asarray(kept["spent_variance"])[0] + now
    value = float(np.min(1 / (1 + spent / max(1, int(kept["num_updates"])))))
    fix = (
        "the energy changes faster than weights can follow, and few chains have them all: take a smaller learning rate, or more "
        "num_steps of the sampler, or more chains"
    )
    return Finding(site, "fraction that weights keep in a step", value, KEPT_BY_WEIGHTS, None, fix)


def _agreement(site: str, taught: np.ndarray, monitors: np.ndarray) -> Finding:
    """The largest difference of the distribution functions of an element between chains that teach and monitors."""
    noise = sum(_noise(x) for x in (taught, monitors))
    a, b = (x.reshape(x.shape[0] * x.shape[1], -1) for x in (taught, monitors))
    deciles = np.quantile(np.concatenate([a, b]), np.linspace(0.1, 0.9, 9), axis=0)
    found = max(float(abs((a <= decile).mean(0) - (b <= decile).mean(0)).max()) for decile in deciles)
    fix = (
        "the chains that teach and those that do not have other distributions, so that weights do not tell the right one: take "
        "a smaller learning rate, more num_steps or num_jumps of the sampler, or more chains"
    )
    return Finding(site, "distance of chains from monitors", found, None, TOLERANCE + 3 * noise, fix)


def _noise(draws: np.ndarray) -> float:
    """The error of a distribution function of these chains, each of which is worth a sample at least."""
    return 0.5 / math.sqrt(max(least_sample_size(draws), len(draws)))


def _density_unknown(site: str, why: str) -> Finding:
    """What is said of chains whose density is not known."""
    return not_told(site, DISTANCE, f"whether the chains are distributed as the energy says is not known, since {why}")


def _from_density(site: str, draws: np.ndarray, known: Any, more: str) -> Finding:
    """The largest difference between chains and density in the distribution function of an element."""
    worth = None if known is None else float(np.asarray(known[1]).min())
    if why := why_unknown(worth):
        return _density_unknown(site, f"{why}. {GIVE_REFERENCE if known is None else ASK_MONITORS}")
    distance, size = (np.asarray(x) for x in known)
    noise = _noise(draws) + 0.5 / math.sqrt(float(size.min()))
    fix = f"the chains that have taught the energy are not distributed as it says. {more}, or a smaller learning rate"
    return Finding(site, DISTANCE, float(distance.max()), None, TOLERANCE + 3 * noise, fix)


def _distance(known: KnownDensity | None, x: Array, *, is_discrete: bool) -> tuple[Array, Array] | None:
    """That distance, and how many samples the density is known by; of shape ``batch_shape``."""
    return None if known is None else (distance_from(known, x, is_discrete=is_discrete), known.worth)
