# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether the negative chains of a fit are worth believing, and with them the energy that they have taught.

Chains that learn an energy look right by construction: the energy is changed until they match the data. What tells is

* whether they *mix* at the final parameters: R-hat and the effective sample size of chains that are moved on from the fit;
* whether they are distributed as the *density* says that they teach: by quadrature for events of one or two dimensions, else by
  importance weights of samples of the reference, :math:`w = \tilde p / b`, where these are worth enough.
"""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.diagnostics import effective_sample_size as chain_sample_size
from numpyro.diagnostics import split_gelman_rubin

from numpyro_ebm._checks import require_bool, require_count, require_key
from numpyro_ebm._fit import fit_of
from numpyro_ebm.chains import chains_of
from numpyro_ebm.handlers import chains_target, negative_phase
from numpyro_ebm.program.sites import FIELD
from numpyro_ebm.samplers import Target
from numpyro_ebm.weights import effective_sample_size, normalized_weights


class Finding(NamedTuple):
    """One number of a :class:`FitReport`."""

    #: the site that it is of
    site: str
    #: what was measured
    quantity: str
    #: its value, nan where it cannot be told
    value: float
    #: the least or the most that it should be, or None where the number has no threshold
    least: float | None
    most: float | None
    #: what to do where it is not
    fix: str

    @property
    def is_well(self) -> bool:
        """Whether the value is in bounds, or cannot be told."""
        too_small = self.least is not None and self.value < self.least
        return not too_small and not (self.most is not None and self.value > self.most)

    @property
    def wanted(self) -> str:
        """What the value should be, in words."""
        if self.least is not None:
            return f"at least {self.least:.3g}"
        return "" if self.most is None else f"at most {self.most:.3g}"

    def __str__(self) -> str:
        should = f" and should be {self.wanted}: {self.fix}" if self.wanted else ""
        return f"site '{self.site}': {self.quantity} is {self.value:.3g}{should}"


class FitReport(NamedTuple):
    """What :func:`diagnose` found; ``print`` it as a table."""

    findings: tuple[Finding, ...]

    @property
    def is_well(self) -> bool:
        """Whether every number is in bounds."""
        return all(finding.is_well for finding in self.findings)

    @property
    def trouble(self) -> tuple[Finding, ...]:
        """The findings out of bounds."""
        return tuple(finding for finding in self.findings if not finding.is_well)

    def __str__(self) -> str:
        rows = [("site", "quantity", "value", "wanted", "")]
        for finding in self.findings:
            value = "not told" if math.isnan(finding.value) else f"{finding.value:.3g}"
            rows.append((finding.site, finding.quantity, value, finding.wanted, "" if finding.is_well else finding.fix))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def diagnose(
    result: Any,
    model: negative_phase,
    *args: Any,
    rng_key: Array | None = None,
    num_samples: int = 50,
    warn: bool = True,
    **kwargs: Any,
) -> FitReport:
    """Whether the negative chains of a fit are worth believing, and with them the energy that they have taught.

    Of every energy site and random field: R-hat and the effective sample size of the chains, which are moved on from the fit; the
    acceptance of their steps and jumps, where the sampler keeps it; and their distance from the density, the largest difference of
    the distribution functions of an element at the deciles (of the means of bits). That density is known by quadrature for real
    events of one or two dimensions, as far as chains and reference reach, and by importance weights of samples of the reference
    where these are worth 100 or more; elsewhere it is not told, and a mode that neither chains nor reference have found is not
    seen. A random field has neither.

    Chains that restart at every step (``persistent=False``) have no R-hat: what they are distant from the density is the bias of
    short runs.

    :param result: the result or the state of a fit, of ``SVI`` or an engine.
    :param model: the :class:`~numpyro_ebm.negative_phase` that was learned.
    :param args: arguments of the model.
    :param rng_key: a key of :func:`jax.random.key`; ``jax.random.key(0)`` if not given.
    :param int num_samples: samples of every chain, 4 or more, each after one run of its sampler.
    :param bool warn: whether what is out of bounds is warned of.
    :param kwargs: keyword arguments of the model.
    :return: a :class:`FitReport`; ``print`` it.
    :raises TypeError: if ``model`` is not a :class:`~numpyro_ebm.negative_phase`.
    :raises ValueError: if the fit has no chains.
    :raises RuntimeError: as :meth:`negative_phase.check_chains`.

    **References**

    1. Gelman et al., *Bayesian data analysis*, 3rd edition (2013), section 11.4: R-hat of split chains.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_ebm import TiltedDistribution, diagnose, negative_phase
        >>> def model(x):
        ...     tilt = numpyro.param("tilt", 0.0)
        ...     numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -tilt * x), obs=x)
        >>> x, program = 1 + jax.random.normal(jax.random.key(0), (200,)), negative_phase(model)
        >>> result = SVI(program, lambda x: None, optax.adam(0.02), Trace_ELBO()).run(jax.random.key(1), 300, x, progress_bar=False)
        >>> diagnose(result, program, x).is_well
        True
    """
    if not isinstance(model, negative_phase):
        raise TypeError(f"model must be the negative_phase(model) that was learned, got {type(model).__name__}.")
    num_samples, warn = require_count("num_samples", num_samples, least=4), require_bool("warn", warn)
    move_key, judge_key = jax.random.split(jax.random.key(0) if rng_key is None else require_key("rng_key", rng_key))
    fit = fit_of(result)
    params, mutable_state = fit.params or {}, dict(fit.mutable_state or {})
    if not chains_of(mutable_state):
        raise ValueError("the fit has no negative chains to diagnose: pass the result of a fit of negative_phase(model).")
    draws, mutable_state = model.sample_chains(move_key, params, mutable_state, num_samples, *args, **kwargs)
    findings: list[Finding] = []
    for site, kept in chains_of(mutable_state).items():
        jumps = float(np.min(kept.get("jump_acceptance", 0.0)))
        if model.persistent:
            findings += _mixing(site, {name: draws[name] for name in (kept["x"] if site == FIELD else [site])}, jumps)
        if "acceptance" in kept:
            acceptance = float(np.min(kept["acceptance"]))
            findings.append(Finding(site, "acceptance of steps", acceptance, 0.15, None, "take a smaller step_size, or adapt=True"))
            findings.append(Finding(site, "acceptance of jumps", jumps, None, None, ""))
        if site != FIELD:
            call = model, site, args, kwargs, {**params, **mutable_state}
            findings.append(_distance(call, judge_key, draws[site], jumps))
    report = FitReport(tuple(findings))
    if warn:
        for finding in report.trouble:
            warnings.warn(str(finding), stacklevel=2)
    return report


def _mixing(site: str, draws: dict[str, Array], jumps: float) -> list[Finding]:
    """R-hat and effective sample size of the worst element of chains, ``(num_chains, num_samples) + shape``."""
    with np.errstate(invalid="ignore", divide="ignore"):  # what does not move has neither
        r_hat = max(float(np.nanmax(split_gelman_rubin(np.asarray(x, float)), initial=1.0)) for x in draws.values())
        size = min(
            float(np.nanmin(chain_sample_size(np.asarray(x, float)), initial=x.shape[0] * x.shape[1])) for x in draws.values()
        )
    fix = f"the chains do not mix, and the weights of modes that they do not cross between are not determined. {_more_jumps(jumps)}"
    return [Finding(site, "R-hat", r_hat, None, R_HAT, fix), Finding(site, "effective sample size", max(size, 1.0), None, None, "")]


def _more_jumps(jumps: float) -> str:
    if jumps > 0.01:
        return "Take more num_steps or num_jumps in MALA, or more chains"
    return "Hardly a jump is accepted: take a reference= as wide as what is learned, a base closer to it, or more num_steps"


def _distance(call: tuple[Any, ...], rng_key: Array, draws: Array, jumps: float) -> Finding:
    """The largest difference between chains and density in the distribution function of an element."""
    own = np.asarray(draws, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        worth = float(np.nanmin(chain_sample_size(own), initial=own.shape[0] * own.shape[1]))
    distance, size = (np.asarray(x) for x in jax.jit(lambda key, draws: _compare(call, key, draws))(rng_key, draws))
    found = float(np.max(np.where(size < SAMPLES_TO_JUDGE, np.nan, distance)))
    noise = 0.5 / math.sqrt(max(worth, own.shape[0])) + 0.5 / math.sqrt(max(float(size.min()), SAMPLES_TO_JUDGE))
    fix = f"the chains that have taught the energy are not distributed as it says. {_more_jumps(jumps)}, or a smaller learning rate"
    return Finding(call[1], "distance of chains from density", found, None, TOLERANCE + 3 * noise, fix)


def _compare(call: tuple[Any, ...], rng_key: Array, draws: Array) -> tuple[Array, Array]:
    """That distance, and how many samples the density is known by; of shape ``batch_shape``."""
    energy, sampler = chains_target(*call)
    target = energy.chain_log_prob(sampler)
    x = energy.to_chain(draws.reshape(-1, *draws.shape[2:]), sampler)
    batch_shape = jax.eval_shape(target, x).shape[1:]
    event_shape = x.shape[1 + len(batch_shape) :]
    size, is_discrete = math.prod(event_shape), energy.support.is_discrete
    on_grid = size <= 2 and not is_discrete
    known = _weighted(rng_key, target, x, event_shape, on_grid)
    if known is None:
        return jnp.zeros(batch_shape), jnp.zeros(batch_shape)
    points, log_weights = known
    weights = normalized_weights(log_weights)
    chains, points = (jnp.moveaxis(y.reshape(-1, *batch_shape, size), -1, 0).astype(weights.dtype) for y in (x, points))

    def of_element(chains_and_points: tuple[Array, Array]) -> Array:
        chains, points = chains_and_points
        if is_discrete:
            return abs(chains.mean(0) - (weights * points).sum(0))
        deciles = jnp.quantile(chains, jnp.linspace(0.1, 0.9, 9), axis=0)
        below = [(weights * (points <= decile)).sum(0) - (chains <= decile).mean(0) for decile in deciles]
        return jnp.max(jnp.abs(jnp.stack(below)), 0)

    worth = jnp.full(batch_shape, jnp.inf) if on_grid else effective_sample_size(weights)
    return lax.map(of_element, (chains, points)).max(0), worth


def _weighted(rng_key: Array, target: Target, x: Array, event_shape: tuple[int, ...], on_grid: bool) -> tuple[Array, Array] | None:
    """Points with log weights that the target is known by: a grid where chains and reference are, or samples of the reference."""
    reference = target.reference
    if not on_grid:
        if reference is None:
            return None
        points = reference.sample(rng_key, NUM_REFERENCE)
        return points, target(points) - reference.log_prob(points)
    seen = x.reshape(*x.shape[: x.ndim - len(event_shape)], -1)
    points = _quantiles(seen)
    if reference is not None:
        more = reference.sample(rng_key, NUM_REFERENCE)
        points = jnp.sort(jnp.concatenate([points, _quantiles(more.reshape(len(more), *seen.shape[1:]))]), 0)
    return _product(points, event_shape, target)


def _quantiles(x: Array) -> Array:
    """Quantiles of every element along axis 0, close where values are, and a tenth of their range beyond them."""
    size = x.shape[-1]
    inner = jnp.quantile(x, jnp.linspace(5e-4, 1 - 5e-4, POINTS_PER_SIDE[size]), axis=0)
    beyond = 0.1 * (inner[-1] - inner[0])
    return jnp.concatenate([inner[:1] - beyond, inner, inner[-1:] + beyond])


def _product(sides: Array, event_shape: tuple[int, ...], target: Target) -> tuple[Array, Array]:
    """All points with one element of each side, and the log of the target times the cell of each, by the trapezoidal rule."""
    widths = jnp.diff(sides, axis=0, prepend=sides[:1]) / 2 + jnp.diff(sides, axis=0, append=sides[-1:]) / 2
    size, length = sides.shape[-1], len(sides)
    index = jnp.stack(jnp.meshgrid(*[jnp.arange(length)] * size), -1).reshape(-1, size)
    points, cells = (jnp.stack([side[index[:, i], ..., i] for i in range(size)], -1) for side in (sides, widths))
    log_density = target(points.reshape(*points.shape[:-1], *event_shape))
    return points, log_density + jnp.log(cells).sum(-1)


# How far chains may be from the density: a mode of 50 % may have 45. The error of both sides is added, three times over.
TOLERANCE = 0.05
# Of chains that forget where they were within 22 of 50 samples; training moves an energy more slowly than that.
R_HAT = 1.2
SAMPLES_TO_JUDGE = 100
NUM_REFERENCE = 10_000
POINTS_PER_SIDE = {1: 1000, 2: 100}  # of chains, and as many of the reference
