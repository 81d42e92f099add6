# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""How uncertain parameters learned by maximum marginal likelihood are.

Louis' identity gives the observed information of :math:`\theta` from the posterior of the latents,

.. math::

    -\nabla^2 \log p_\theta(y)
    = E[-\nabla_\theta^2 \log p_\theta(x, y)] - \mathrm{Cov}[\nabla_\theta \log p_\theta(x, y)],
    \qquad x \sim p_\theta(x \mid y).

Where the posterior is a product over rows of the data, the covariance is the sum of theirs, each from its own samples. The
covariance of the sum gives the same with far more noise.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from numpyro_ebm._compiled import compiled
from numpyro_ebm.distributions.energy import NormalizerError
from numpyro_ebm.evaluate.posterior import Latents, Posterior
from numpyro_ebm.program.run import total
from numpyro_ebm.program.sites import Model


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
    model: Model,
    params: Mapping[str, Any],
    samples: Mapping[str, Array],
    *args: Any,
    mutable_state: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> StandardErrors:
    """Standard errors of parameters learned by maximum marginal likelihood, by Louis' identity.

    They are those of large-sample theory, from the curvature of the log likelihood at ``params``, and hold for regular models
    at the maximum. The curvature is taken in unconstrained space and carried to constrained values by the delta method.

    :param model: a NumPyro model, under :class:`~numpyro_ebm.negative_phase` or not.
    :param dict params: values of all :func:`numpyro.param` sites, ``result.params``.
    :param samples: of the latents at these ``params`` and the same data, as :func:`~numpyro_ebm.sample_posterior` returns them:
        by site, of shape ``(num_chains, num_samples) + batch_shape + event_shape``. With many chains the Monte Carlo errors are
        themselves better known. A bias of the sampler goes into the result.
    :param args: arguments of the model.
    :param mutable_state: values of the model's own :func:`numpyro.primitives.mutable` sites.
    :param kwargs: keyword arguments of the model.
    :return: standard errors by param site, their Monte Carlo errors and the matrices behind them.
    :raises NormalizerError: if an energy or a random field has parameters to learn: the second derivative of its normalizer is
        not known.
    :raises ValueError: if ``samples`` are not those of the model's latents; if the information is not positive definite, naming
        the param site that it is worst for; for a model or params that :func:`~numpyro_ebm.sample_posterior` refuses.

    **References**

    1. Louis, *Finding the observed information matrix when using the EM algorithm*, JRSS B 44 (1982).

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import sample_posterior, standard_errors
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> y = jax.random.normal(jax.random.key(0), (50,))
        >>> samples = sample_posterior(jax.random.key(1), model, {"loc": y.mean()}, y, num_samples=500)
        >>> found = standard_errors(model, {"loc": y.mean()}, samples, y)
        >>> print(f"{found.standard_errors['loc']:.2f}, exact {(2 / 50) ** 0.5:.2f}")
        0.20, exact 0.20
    """
    posterior = Posterior(jax.random.key(0), model, params, args, kwargs, mutable_state)
    if not posterior.params:
        raise ValueError("the model has no param site, so that there is nothing to give standard errors of.")
    _require_known_normalizers(posterior)
    draws = posterior.unconstrained("samples", samples, _num_chains_and_samples(samples))
    theta, unravel = ravel_pytree(posterior.theta())
    moments = compiled(_moments, posterior, theta, draws)
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


def _num_chains_and_samples(samples: Mapping[str, Array]) -> tuple[int, ...]:
    shapes = {name: jnp.shape(value) for name, value in samples.items()}
    for name, shape in shapes.items():
        if len(shape) < 2 or 0 in shape[:2]:
            raise ValueError(
                f"site '{name}': samples has shape {shape}, it must begin with (num_chains, num_samples), as what sample_posterior "
                "returns does."
            )
    return next(iter(shapes.values()), ())[:2]


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


def _moments(posterior: Posterior, theta: Array, draws: Latents) -> _Moments:
    """What Louis' identity needs of the samples, ``(num_chains, num_samples) + ...``, one sample at a time."""
    unravel = ravel_pytree(posterior.theta())[1]

    def scores(x: Latents) -> Array:
        of_rows = jax.jacfwd(lambda theta: posterior.row_log_density(x, posterior.params_at(unravel(theta))))(theta)
        return jnp.atleast_2d(of_rows)

    def of_draw(x: Latents) -> _Moments:
        hessian = jax.hessian(lambda theta: total(posterior.terms(x, posterior.params_at(unravel(theta)))))(theta)
        of_rows = scores(x) - reference  # a covariance is the same about any point, and more exact about a near one
        return _Moments(-hessian, of_rows, jnp.matmul(of_rows.T, of_rows, precision="highest"))

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
