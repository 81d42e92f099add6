# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""How uncertain parameters learned by maximum marginal likelihood are, and whether a run has reached them.

Louis' identity gives the observed information of :math:`\theta` from the posterior of the latents,

.. math::

    -\nabla^2 \log p_\theta(y)
    = E[-\nabla_\theta^2 \log p_\theta(x, y)] - \mathrm{Cov}[\nabla_\theta \log p_\theta(x, y)],
    \qquad x \sim p_\theta(x \mid y).

Where the posterior is a product over rows of the data, the covariance is the sum of theirs, each from its own samples. The
covariance of the sum gives the same with far more noise.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import init_to_sample

from numpyro_ebm._checks import require_count
from numpyro_ebm.distributions.energy import NormalizerError
from numpyro_ebm.infer.latents import Latents, Posterior, draw_posterior
from numpyro_ebm.program import Model, total
from numpyro_ebm.samplers import Sampler


class StandardErrors(NamedTuple):
    """What :func:`standard_errors` estimated."""

    #: by param site, of the param's shape: standard errors of the constrained values
    standard_errors: dict[str, Any]
    #: of the same form: what the number of samples leaves uncertain of them, one standard deviation; nan with one chain
    monte_carlo_errors: dict[str, Any]
    #: covariance of all constrained values, in the order of :func:`jax.flatten_util.ravel_pytree` of the params
    covariance: Array
    #: observed information of all unconstrained values, in the same order
    information: Array


def standard_errors(
    rng_key: Array,
    model: Model,
    params: Mapping[str, Any],
    *args: Any,
    num_samples: int = 500,
    num_warmup: int = 200,
    num_chains: int | None = None,
    thinning: int = 1,
    sampler: Sampler | Literal["nuts"] | None = None,
    start: Mapping[str, Array] | None = None,
    mutable_state: Mapping[str, Any] | None = None,
    init_strategy: Callable[..., Any] = init_to_sample,
    **kwargs: Any,
) -> StandardErrors:
    """Standard errors of parameters learned by maximum marginal likelihood, by Louis' identity.

    They are those of large-sample theory, from the curvature of the log likelihood at ``params``, and hold for regular models
    at the maximum. The curvature is taken in unconstrained space and carried to constrained values by the delta method.
    Latents are drawn by :func:`~numpyro_ebm.sample_posterior`, whose arguments these are.

    :param rng_key: a key of :func:`jax.random.key`.
    :param model: a NumPyro model, under :class:`~numpyro_ebm.negative_phase` or not.
    :param dict params: values of all :func:`numpyro.param` sites, ``result.params``.
    :param args: arguments of the model.
    :param int num_samples: samples of every chain.
    :param int num_warmup: transitions before the first sample.
    :param int num_chains: independent chains; as many as ``start`` has if it is given, else 4. With many the Monte Carlo errors
        are themselves better known.
    :param int thinning: transitions per sample.
    :param sampler: :class:`~numpyro_ebm.MALA` if not given, or ``"nuts"``. A sampler with a bias puts it into the result.
    :param start: latents to start from, constrained, such as the particles of the fit.
    :param mutable_state: values of the model's own :func:`numpyro.primitives.mutable` sites.
    :param init_strategy: a NumPyro ``init_to_...`` strategy to start from without ``start``.
    :param kwargs: keyword arguments of the model.
    :return: standard errors by param site, their Monte Carlo errors and the matrices behind them.
    :raises NormalizerError: if an energy or a random field has parameters to learn: the second derivative of its normalizer is
        not known.
    :raises ValueError: if the information is not positive definite, naming the param site that it is worst for; for what
        :func:`~numpyro_ebm.sample_posterior` refuses.

    **References**

    1. Louis, *Finding the observed information matrix when using the EM algorithm*, JRSS B 44 (1982).

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import standard_errors
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> y = jax.random.normal(jax.random.key(0), (50,))
        >>> found = standard_errors(jax.random.key(1), model, {"loc": y.mean()}, y)
        >>> print(f"{found.standard_errors['loc']:.2f}, exact {(2 / 50) ** 0.5:.2f}")
        0.20, exact 0.20
    """
    posterior, draws = draw_posterior(
        rng_key,
        model,
        params,
        args,
        kwargs,
        num_samples=num_samples,
        num_warmup=num_warmup,
        num_chains=num_chains,
        thinning=thinning,
        sampler=sampler,
        start=start,
        mutable_state=mutable_state,
        init_strategy=init_strategy,
    )
    if not posterior.params:
        raise ValueError("the model has no param site, so that there is nothing to give standard errors of.")
    _require_known_normalizers(posterior)
    theta, unravel = ravel_pytree(posterior.theta())
    moments = jax.jit(lambda theta, draws: _moments(posterior, unravel, theta, draws))(theta, draws)
    information, of_chains = _information(jax.tree.map(lambda x: np.asarray(x, np.float64), moments))
    _require_positive_definite(information, moments.information.mean(0), _names(posterior.theta()))
    to_params = np.asarray(jax.jacfwd(lambda theta: ravel_pytree(posterior.params_at(unravel(theta)))[0])(theta), np.float64)
    spread = to_params @ np.linalg.inv(information)
    covariance = spread @ to_params.T
    errors = np.sqrt(covariance.diagonal())
    # to first order an error dI of the information changes its inverse by -V dI V
    changes = np.einsum("ij,cjk,ik->ci", spread, of_chains - information, spread) / (2 * np.maximum(errors, 1e-300))
    noise = changes.std(0, ddof=1) / np.sqrt(len(changes)) if len(changes) > 1 else np.full_like(errors, np.nan)
    by_site = ravel_pytree(posterior.params)[1]
    dtype = theta.dtype
    return StandardErrors(
        by_site(jnp.asarray(errors, dtype)),
        by_site(jnp.asarray(noise, dtype)),
        jnp.asarray(covariance, dtype),
        jnp.asarray(information, dtype),
    )


def _require_known_normalizers(posterior: Posterior) -> None:
    """Refuses energies and random fields with parameters to learn."""
    for site in posterior.report.learned:
        field = "it makes the model a random field, and " if site.couples else ""
        raise NormalizerError(
            f"site '{site.name}': {field}the second derivative of its unknown normalizer in the parameters is not known, so that "
            "Louis' identity cannot be used. Hold the parameters of the energy fixed, or repeat the fit on resampled data."
        )


class _Moments(NamedTuple):
    """Means over the samples of every chain."""

    information: Any  # (num_chains, p, p), of minus the Hessian of the log joint density
    scores: Any  # (num_chains, rows, p), of the rows' scores, less those of a reference draw
    products: Any  # (num_chains, p, p), of the sum over rows of these scores times themselves


def _moments(posterior: Posterior, unravel: Callable[[Array], Any], theta: Array, draws: Latents) -> _Moments:
    """What Louis' identity needs of the samples, ``(num_chains, num_samples) + ...``, one sample at a time."""

    def scores(x: Latents) -> Array:
        of_rows = jax.jacfwd(lambda theta: posterior.row_log_density(x, posterior.params_at(unravel(theta))))(theta)
        return jnp.atleast_2d(of_rows)

    def of_draw(x: Latents) -> _Moments:
        hessian = jax.hessian(lambda theta: total(posterior.terms(x, posterior.params_at(unravel(theta)))))(theta)
        of_rows = scores(x) - reference  # a covariance is the same about any point, and more exact about a near one
        return _Moments(-hessian, of_rows, of_rows.T @ of_rows)

    def add(sums: _Moments, x: Latents) -> tuple[_Moments, None]:
        return jax.tree.map(jnp.add, sums, jax.vmap(of_draw)(x)), None

    by_draw = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), draws)
    num_samples = len(jax.tree.leaves(by_draw)[0])
    reference = scores(jax.tree.map(lambda x: x[0, 0], by_draw))
    shapes = jax.eval_shape(lambda x: jax.vmap(of_draw)(jax.tree.map(lambda x: x[0], x)), by_draw)
    sums = lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), by_draw)[0]
    return jax.tree.map(lambda x: x / num_samples, sums)


def _information(moments: _Moments) -> tuple[np.ndarray, np.ndarray]:
    """The observed information, and what every chain alone says of it about the mean scores of all."""
    mean = moments.scores.mean(0)
    cross = np.einsum("crp,rq->cpq", moments.scores, mean)
    covariance = moments.products - cross - cross.transpose(0, 2, 1) + mean.T @ mean
    of_chains = moments.information - covariance
    of_chains = (of_chains + of_chains.transpose(0, 2, 1)) / 2
    return of_chains.mean(0), of_chains


def _require_positive_definite(information: np.ndarray, complete: Any, names: list[str]) -> None:
    """Refuses an information that tells nothing in some direction, in units of that of the complete data."""
    if not np.isfinite(information).all():
        raise ValueError("the derivatives of the log density in the parameters are not finite: look at params and data.")
    scale = np.sqrt(np.abs(np.asarray(complete, np.float64).diagonal()))
    if (flat := scale == 0).any():
        raise ValueError(
            f"param '{names[int(flat.argmax())]}': the log density does not bend in it, and gives it no standard error."
        )
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    if values[0] <= 10 * len(values) * np.finfo(np.asarray(complete).dtype).eps:
        worst = names[int(np.abs(vectors[:, 0]).argmax())]
        raise ValueError(
            f"param '{worst}': the observed information is not positive definite (smallest eigenvalue {values[0]:.2g} of the "
            "information of the complete data), most of all in this param. Either params are not at a maximum, or the data do "
            "not tell some parameters apart (the model is not regular), or the draws are too few: take more num_samples."
        )


def _names(params: Mapping[str, Any]) -> list[str]:
    """The name of the site of every element, in the order of ``ravel_pytree``."""
    return [name for name in sorted(params) for _ in range(ravel_pytree(params[name])[0].size)]


@dataclass(frozen=True)
class ConvergenceReport:
    """What :func:`convergence` found; printed as a table. Every field by param site, of the param's shape."""

    #: of shape ``(kept steps,) + shape``: mean of the steps kept so far
    running_mean: dict[str, np.ndarray]
    #: mean of the kept steps
    mean: dict[str, np.ndarray]
    #: Monte Carlo standard error of that mean, with autocorrelation
    mcse: dict[str, np.ndarray]
    #: standard deviation of the kept steps, the stationary spread
    sd: dict[str, np.ndarray]
    #: effective number of independent steps
    ess: dict[str, np.ndarray]
    #: split R-hat of the kept steps: above 1.01 the two halves differ, and the run has not settled
    r_hat: dict[str, np.ndarray]
    #: the theory's spread, standard error / sqrt(num_particles); None without standard errors
    theory: dict[str, np.ndarray] | None
    #: sd / theory; None without standard errors
    ratio: dict[str, np.ndarray] | None

    def __str__(self) -> str:
        columns = {"mean": self.mean, "mcse": self.mcse, "sd": self.sd, "ess": self.ess, "r_hat": self.r_hat}
        if self.theory is not None and self.ratio is not None:
            columns |= {"theory": self.theory, "ratio": self.ratio}
        rows = [("param", *columns), *_rows(columns)]
        widths = [max(len(row[i]) for row in rows if len(row) > 1) for i in range(len(rows[0]))]
        widths[0] = max(len(row[0]) for row in rows)
        return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)


def convergence(
    trace: Mapping[str, Any],
    *,
    burn_in: int | None = None,
    num_particles: int | None = None,
    standard_errors: StandardErrors | Mapping[str, Any] | None = None,
) -> ConvergenceReport:
    r"""Whether the parameters of a run have settled, how well their mean is known, and whether they spread as they should.

    The parameters of IPLA have the stationary distribution :math:`\propto p_\theta(y)^N` for small steps, so that their standard
    deviation is the standard error over :math:`\sqrt N`. A ``ratio`` near 1 says so. It is less than 1 where parameters have
    no noise of their own (PGD, Adam), and larger where the step is large or the negative chains are noisy.

    :param trace: parameters after every step, ``engine.run(..., collect=engine.get_params).collected``: by param site, of shape
        ``(num_steps,) + shape``.
    :param int burn_in: steps at the start that are left out, half of them if not given.
    :param int num_particles: particles of the run, which the theory's spread needs.
    :param standard_errors: of :func:`~numpyro_ebm.standard_errors`, or by param site.
    :return: a :class:`ConvergenceReport`; ``print`` it.
    :raises ValueError: if fewer than 4 steps are left, ``num_particles`` is missing or out of range, or ``standard_errors`` has
        other sites or shapes.

    **References**

    1. Akyildiz et al., *Interacting particle Langevin algorithm for maximum marginal likelihood estimation*, ESAIM: PS 29
       (2025), arXiv:2303.13429.
    2. Geyer, *Practical Markov chain Monte Carlo*, Statistical Science 7 (1992): the effective sample size.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import ParticleMMLE, convergence
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> engine = ParticleMMLE.ipla(model, num_particles=10, step_size=0.05)
        >>> result = engine.run(jax.random.key(0), 4000, jnp.arange(4.0), collect=engine.get_params, progress_bar=False)
        >>> report = convergence(result.collected, num_particles=10, standard_errors={"loc": (2 / 4) ** 0.5})
        >>> print(f"mean {report.mean['loc']:.1f}, sd {report.sd['loc']:.1f}, in theory {report.theory['loc']:.1f}")
        mean 1.5, sd 0.2, in theory 0.2
    """
    if not isinstance(trace, Mapping):
        raise TypeError("trace must map param sites to their values: run(..., collect=engine.get_params).collected.")
    values = _by_name(trace)
    num_steps = min(len(value) for value in values.values())
    burn_in = num_steps // 2 if burn_in is None else require_count("burn_in", burn_in, least=0)
    if burn_in > num_steps - 4:
        raise ValueError(f"burn_in={burn_in} leaves {num_steps - burn_in} of {num_steps} steps: at least 4 are needed.")
    kept = {name: value[burn_in:].astype(np.float64) for name, value in values.items()}
    sd = {name: value.std(0, ddof=1) for name, value in kept.items()}
    with np.errstate(invalid="ignore", divide="ignore"):  # a parameter that does not move has neither ESS nor R-hat
        ess = {name: effective_sample_size(value[None]) for name, value in kept.items()}
        r_hat = {name: split_gelman_rubin(value[None]) for name, value in kept.items()}
        mcse = {name: np.where(sd[name] > 0, sd[name] / np.sqrt(ess[name]), 0.0) for name in kept}
        theory = None if standard_errors is None else _theory(standard_errors, num_particles, sd)
        ratio = None if theory is None else {name: sd[name] / theory[name] for name in sd}
    counts = np.arange(1, num_steps - burn_in + 1)
    running = {name: value.cumsum(0) / counts.reshape(-1, *(1,) * (value.ndim - 1)) for name, value in kept.items()}
    return ConvergenceReport(running, {name: value[-1] for name, value in running.items()}, mcse, sd, ess, r_hat, theory, ratio)


def _theory(
    standard_errors: StandardErrors | Mapping[str, Any], num_particles: int | None, sd: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    num_particles = require_count("num_particles", num_particles, why="standard errors are compared at that many particles")
    given = standard_errors.standard_errors if isinstance(standard_errors, StandardErrors) else standard_errors
    errors = _by_name(given)
    for name, value in sd.items():
        if name not in errors or errors[name].shape != value.shape:
            found = f"has shape {errors[name].shape}" if name in errors else "is missing"
            raise ValueError(f"param '{name}': its standard error {found}, it must have shape {value.shape}.")
    return {name: errors[name] / np.sqrt(num_particles) for name in sd}


def _by_name(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of param sites by name; those of a site that holds a pytree by ``site.path``."""
    leaves = jax.tree_util.tree_flatten_with_path(dict(tree))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


MAX_ROWS = 10  # elements of a site that are printed


def _rows(columns: dict[str, dict[str, np.ndarray]]) -> Iterator[tuple[str, ...]]:
    for name, mean in columns["mean"].items():
        for index in list(np.ndindex(mean.shape))[:MAX_ROWS]:
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            yield (label, *(f"{values[name][index]:.4g}" for values in columns.values()))
        if mean.size > MAX_ROWS:
            yield (f"{name}: {mean.size - MAX_ROWS} more",)
