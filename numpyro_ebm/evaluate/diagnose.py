# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a fit can be believed, for whoever asks."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jax import Array
from numpyro.handlers import replay, seed, substitute, trace

from numpyro_ebm._checks import require_bool, require_count, require_key
from numpyro_ebm._compat import sites_named
from numpyro_ebm._compiled import compiled
from numpyro_ebm._fit import fit_of
from numpyro_ebm.chains import chains_of
from numpyro_ebm.evaluate.guide_stationarity import GuideDistance, guide_distances, guide_stationarity_finding
from numpyro_ebm.evaluate.negative_chains import NUM_SAMPLES, ChainNumbers, chain_findings, chain_numbers
from numpyro_ebm.evaluate.param_distance import (
    NUM_COPIES,
    OfBatch,
    ParamDistance,
    param_distance,
    param_findings,
    told_params,
)
from numpyro_ebm.evaluate.predictions import Predictions, prediction_findings, predictions
from numpyro_ebm.evaluate.report import Finding, FitReport
from numpyro_ebm.handlers import innermost, negative_phase, undrawn, unnormalized
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.rows import all_batches
from numpyro_ebm.program.run import Run, constrain_params, log_density_terms, run_model, unconstrain_params


@runtime_checkable
class Reporting(Protocol):
    """An engine, which knows what there is to be said of its fits."""

    def _require_state(self, state: Any) -> Any: ...

    def _find(
        self, rng_key: Array, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any], validation: Any = None
    ) -> list[Finding]: ...


def diagnose(
    result: Any,
    program: negative_phase | Reporting,
    *args: Any,
    rng_key: Array | None = None,
    num_samples: int | None = None,
    warn: bool = True,
    guide: Callable[..., Any] | None = None,
    validation: Any = None,
    **kwargs: Any,
) -> FitReport:
    r"""Whether a fit can be believed. Engines ask by themselves, after every run: ``result.report``. Of a fit by ``SVI`` you ask.

    **Negative chains**, and with them the energy that they have taught. Of every energy site and random field: R-hat and the
    effective sample size of the chains, which are moved on from the fit; the acceptance of their steps and jumps, where the
    sampler keeps it; and their distance from the density, the largest difference of the distribution functions of an element at
    the deciles (of the means of bits). That density is known by quadrature for real events of one or two dimensions, as far as
    the reference reaches, or three times as far as the chains where there is none, and by importance weights of samples of the
    reference where these are worth 100 or more; elsewhere it is not told, and a mode that neither chains nor reference have found
    is not seen. A random field has neither.

    Chains that restart at every step (``persistent=False``) have no R-hat: what they are distant from the density is the bias of
    short runs. Chains with weights need not mix: of them it is told what their weights keep in a step, and how far they are from
    monitors, where there are some.

    **Energies**, and whether the last step stands where the likelihood is stationary in them: how far the density is from what it
    learns from, the data or the posterior of a latent, in standard deviations along the natural gradient. Steps of a constant
    rate swing about the maximum, while chains mix and agree with whatever is learned at the moment. The posterior under ``SVI`` is
    that of its ``guide``, which is compared with its own optimum, the evidence lower bound's: how far in standard deviations the
    mean and width of its latents stand from there. And data are compared with what the model predicts for them at these latents:
    2 of 10 should be beyond all of 9 predictions. A density that is known as above is compared, where it learns, with a normal
    distribution and mixtures of normal distributions, which need hardly any training. Params of likelihoods and of known priors
    have their own number, by how many standard errors a Newton step would move them.

    **Guides** of :class:`~numpyro_ebm.BiSM` and :class:`~numpyro_ebm.VaGES`: the importance weights :math:`\tilde p / q` of
    samples of the guide, row by row, whether the engine uses them or not: which fraction of them counts, and the shape k of
    the generalized Pareto distribution that fits the largest of them; bits have few weights, and no k. What the guide misses
    altogether is not seen.

    **Scores**: objectives at the rows and beside them, in comparison with a normal distribution; and of an energy of the visible
    whose density is known as above, whether it has the masses of the rows, since scores hardly see the weights of modes. With
    latents, the marginal likelihood of the rows by the weights of the guide, beside that of a normal distribution.

    **Generators** of :class:`~numpyro_ebm.BiDVL`: the same of the weights of energy and encoder over the generator.

    :param result: the result or the state of a fit, of ``SVI`` or an engine.
    :param program: the :class:`~numpyro_ebm.negative_phase` that ``SVI`` has learned, or the engine.
    :param args: arguments of the model.
    :param rng_key: a key of :func:`jax.random.key`; ``jax.random.key(0)`` if not given.
    :param int num_samples: samples of every negative chain, 4 or more, each after one run of its sampler; 50 if not given.
    :param bool warn: whether what is out of bounds is warned of.
    :param guide: the guide of a fit by ``SVI`` with a prior that is learned: its samples are what the prior learns from. Without
        it the report is not well, and says what is missing.
    :param validation: rows that were not learned from, in the place of the first argument; or all arguments, a tuple, where others
        have rows too. Of an energy of the rows by ``SVI``, and of engines that match scores: whether it has learned its own rows by
        heart, by the log likelihood of these. Where an energy has 10 times more parameters than rows, a report without it asks.
    :param kwargs: keyword arguments of the model.
    :return: a :class:`FitReport`; ``print`` it.
    :raises TypeError: if ``program`` is neither.
    :raises ValueError: if the fit has no chains, the guide lacks a latent of the model, or ``num_samples`` is out of range;
        if ``num_samples`` or ``guide`` is given with an engine, or ``validation`` with one that matches no scores.
    :raises RuntimeError: as :meth:`negative_phase.check_chains`.

    **References**

    1. Gelman et al., *Bayesian data analysis*, 3rd edition (2013), section 11.4: R-hat of split chains.
    2. Vehtari et al., *Pareto smoothed importance sampling*, JMLR 25 (2024), arXiv:1507.02646: k.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_ebm import TiltedDistribution, diagnose, negative_phase
        >>> def model(x):
        ...     tilt = numpyro.param("tilt", 0.0)
        ...     numpyro.sample(
        ...         "x", TiltedDistribution(dist.Normal(0, 1), lambda x: -tilt * x), obs=x
        ...     )
        >>> x, program = 1 + jax.random.normal(jax.random.key(0), (200,)), negative_phase(model)
        >>> result = SVI(program, lambda x: None, optax.adam(0.02), Trace_ELBO()).run(
        ...     jax.random.key(1), 300, x, progress_bar=False
        ... )
        >>> diagnose(result, program, x).is_well
        True
    """
    warn, rng_key = require_bool("warn", warn), jax.random.key(0) if rng_key is None else require_key("rng_key", rng_key)
    if isinstance(program, negative_phase):
        num_samples = NUM_SAMPLES if num_samples is None else require_count("num_samples", num_samples, least=4)
        findings = _of_phase(rng_key, result, program, guide, num_samples, validation, args, kwargs)
    elif isinstance(program, Reporting):
        if num_samples is not None:
            raise ValueError("num_samples is for the chains of a negative_phase(model): pass that, or leave num_samples out.")
        if guide is not None:
            raise ValueError("guide is for SVI with a negative_phase(model): the engine has its own, leave guide out.")
        state = program._require_state(getattr(result, "state", result))
        findings = program._find(rng_key, state, args, kwargs, validation)
    else:
        what = type(program).__name__
        raise TypeError(f"program must be the negative_phase(model) that was learned, or the engine that has learned, got {what}.")
    report = FitReport(tuple(findings))
    if warn:
        report.warn(stacklevel=2)
    return report


def with_rows(validation: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with validation rows, which are given in the place of the first; or all, in a tuple."""
    return validation if isinstance(validation, tuple) else (validation, *args[1:])


def _of_phase(
    rng_key: Array,
    result: Any,
    phase: negative_phase,
    guide: Callable[..., Any] | None,
    num_samples: int,
    validation: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Finding]:
    fit = fit_of(result)
    params, mutable_state = fit.params or {}, dict(fit.mutable_state or {})
    if not chains_of(mutable_state):
        raise ValueError("the fit has no negative chains to diagnose: pass the result of a fit of negative_phase(model).")
    phase.check_chains(params, mutable_state, *args, **kwargs)
    others = None if validation is None else with_rows(validation, args)
    call = phase, guide, num_samples, params, mutable_state, others, args, kwargs
    numbers, of_guide, of_data, of_params = compiled(_numbers, rng_key, *call, cheaply=True)
    findings = chain_findings(phase, numbers, params, mutable_state, args, kwargs, is_validated=others is not None)
    if of_data is None:
        return findings
    of_latents = [guide_stationarity_finding(site, found) for site, found in of_guide.items()]
    are_well = all(finding.is_well for finding in of_latents)
    findings += of_latents + prediction_findings(of_data, are_well=are_well)
    return findings + param_findings(of_params, are_well=all(finding.is_well for finding in findings))


def _numbers(
    rng_key: Array,
    phase: negative_phase,
    guide: Callable[..., Any] | None,
    num_samples: int,
    params: dict[str, Any],
    mutable_state: dict[str, Any],
    validation: tuple[Any, ...] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[ChainNumbers, dict[str, GuideDistance], Predictions | None, ParamDistance | None]:
    data, model = {**params, **mutable_state}, unnormalized(innermost(phase).fn)

    def run(key: Array, rows: dict[str, Array] | None = None) -> Run:
        """The model with a sample of the guide, on these rows of subsampled plates if they are given."""
        guide_key, model_key = jax.random.split(key)
        given = {**data, **(rows or {})}
        with sites_named(), trace() as drawn, substitute(data=given), seed(rng_seed=guide_key):
            guide(*args, **kwargs)  # type: ignore[misc]
        found = run_model(undrawn(replay(model, drawn)), args, kwargs, model_key, data=given)
        if missing := sorted(set(found.latents) - set(drawn)):
            raise ValueError(f"the guide has no value of {missing}, latent sites of the model that it must draw.")
        return found

    run_of = None if guide is None else run
    call = phase, num_samples, params, mutable_state, args, kwargs, run_of
    numbers = chain_numbers(rng_key, *call, of_posterior=False, validation=validation)
    if guide is None:
        return numbers, {}, None, None

    def run_at(key: Array, seen: Run, latents: dict[str, Array]) -> Run:
        return run_model(model, args, kwargs, key, data={**data, **seen.given(but=latents)}, latents=latents)

    guide_key, predict_key, params_key = jax.random.split(jax.random.fold_in(rng_key, 1), 3)
    of_guide, of_data = guide_distances(guide_key, model, run, data, args, kwargs), predictions(predict_key, run, run_at)
    first = run(params_key)
    transforms = {name: transform for name, transform in first.param_transforms.items() if name in params}
    theta = unconstrain_params({name: params[name] for name in transforms}, transforms)
    learned = check_run(model, args, kwargs, data=data).learned

    def of_batch(rows: dict[str, Array]) -> OfBatch:
        def terms_at(told: dict[str, Any], key: Array) -> tuple[dict[str, Array], Run]:
            given = {**data, **constrain_params({**theta, **told}, transforms), **run(key, rows).given(but=())}
            return log_density_terms(model, args, kwargs, key, data=given)

        def draw(carry: None, key: Array) -> tuple[None, Array]:
            return carry, jax.random.split(key, NUM_COPIES)  # which the latents are drawn with

        return OfBatch(terms_at, draw, None)

    told = told_params(theta, {param for site in learned for param in site.params})
    size = sum(x.size for x in first.drawn.values())
    of_params = param_distance(of_batch, all_batches(first), told, params_key, NUM_COPIES * size)
    return numbers, of_guide, of_data, of_params
