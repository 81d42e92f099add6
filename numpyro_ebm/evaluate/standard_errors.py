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

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from numpyro_ebm._compiled import compiled
from numpyro_ebm.distributions.guard import NormalizerError
from numpyro_ebm.evaluate.posterior import Latents, Posterior
from numpyro_ebm.program.provenance import mark, sources
from numpyro_ebm.program.run import total
from numpyro_ebm.program.sites import Model

MOST_STEP = 0.5  # standard errors that a Newton step to the maximum may move a param


class StandardErrors(NamedTuple):
    """What :func:`standard_errors` estimated."""

    #: by param site, of the param's shape: standard errors of the constrained values; nan for what the density does not depend
    #: on, as the weights that a random module replaces by sample sites
    standard_errors: dict[str, Any]
    #: of the same form: what the number of samples leaves uncertain of them, one standard deviation, from as many degrees of
    #: freedom as there are chains less one: errors are Student t, and of 4 chains 1 of 20 is more than 3.2 of them; nan with one
    monte_carlo_errors: dict[str, Any]
    #: covariance of all constrained values that the density depends on, in the order of :func:`jax.flatten_util.ravel_pytree`
    covariance: Array
    #: observed information of the unconstrained values, in the same order
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

    The same samples give the gradient of the log likelihood, by Fisher's identity. Where a Newton step with it moves a param by
    more than half its standard error, ``params`` are not at the maximum, and a warning names the param that it moves farthest.

    :param model: a NumPyro model, under :class:`~numpyro_ebm.negative_phase` or not.
    :param dict params: values of all :func:`numpyro.param` sites, ``result.params``.
    :param samples: of the latents at these ``params`` and the same data, as :func:`~numpyro_ebm.sample_posterior` returns them:
        by site, of shape ``(num_chains, num_samples) + batch_shape + event_shape``. The Monte Carlo errors come from the spread
        of the chains: of the default of 4 they are themselves known to 40 %, of 16 to 18 %. A bias of the sampler goes into the
        result.
    :param args: arguments of the model.
    :param mutable_state: values of the model's own :func:`numpyro.primitives.mutable` sites.
    :param kwargs: keyword arguments of the model.
    :return: standard errors by param site, their Monte Carlo errors and the matrices behind them.
    :raises NormalizerError: if an energy or a random field has parameters to learn: the second derivative of its normalizer is
        not known.
    :raises ValueError: if ``samples`` are not those of the model's latents, or only one; if no param site reaches the density; for
        a batch of the rows of a plate, as a data loader gives it; if the information is not positive definite, naming the param
        site that it is worst for; for a model or params that :func:`~numpyro_ebm.sample_posterior` refuses.

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
        >>> samples = sample_posterior(
        ...     jax.random.key(1), model, {"loc": y.mean()}, y, num_samples=500
        ... )
        >>> found = standard_errors(model, {"loc": y.mean()}, samples, y)
        >>> print(f"{found.standard_errors['loc']:.2f}, exact {(2 / 50) ** 0.5:.2f}")
        0.20, exact 0.20
    """
    posterior = Posterior(jax.random.key(0), model, params, args, kwargs, mutable_state)
    if not posterior.params:
        raise ValueError("the model has no param site, so that there is nothing to give standard errors of.")
    _require_known_normalizers(posterior)
    _require_whole_plates(posterior)
    draws = posterior.unconstrained("samples", samples, num_samples := _num_chains_and_samples(samples))
    if math.prod(num_samples) < 2:
        raise ValueError("one sample of the latents has no covariance, which the information lacks then: take more num_samples.")
    learned = _Learned.of(posterior, jax.tree.map(lambda x: x[0, 0], draws))
    theta = learned.theta
    moments = compiled(_moments, posterior, learned.used, theta, draws)
    information, of_chains = _information(jax.tree.map(lambda x: np.asarray(x, np.float64), moments))
    _require_positive_definite(information, moments.information.mean(0), learned.names)
    to_params = np.asarray(jax.jacfwd(learned.params_at)(theta), np.float64)
    spread = to_params @ np.linalg.inv(information)
    covariance = spread @ to_params.T
    errors = np.sqrt(covariance.diagonal())
    # to first order an error dI of the information changes its inverse by -V dI V
    changes = np.einsum("ij,cjk,ik->ci", spread, of_chains - information, spread) / (2 * np.maximum(errors, 1e-300))
    noise = changes.std(0, ddof=1) / np.sqrt(len(changes)) if len(changes) > 1 else np.full_like(errors, np.nan)
    _warn_off_maximum(spread, information, moments, errors, math.prod(num_samples), learned.names)
    dtype = theta.dtype
    return StandardErrors(
        learned.by_site(jnp.asarray(errors, dtype)),
        learned.by_site(jnp.asarray(noise, dtype)),
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


def _require_whole_plates(posterior: Posterior) -> None:
    """Refuses a batch of rows, of which the rest is unknown: its scale is not that of the posterior of its latents."""
    for name, plate in posterior.program.subsampled.items():
        raise ValueError(
            f"plate '{name}': the model is given {len(plate.indices)} of its {plate.size} rows, as a data loader does, and the "
            "information is that of all data: pass all rows."
        )


class _Learned:
    """The leaves of the unconstrained params that the density depends on, as one array.

    The weights of a random module are a param site whose values sample sites replace: nothing bends in it, and it may be large.

    :param used: of every leaf, whether the density depends on it.
    """

    def __init__(self, posterior: Posterior, used: tuple[bool, ...]) -> None:
        self.posterior, self.used = posterior, used
        unconstrained = posterior.theta()
        self._leaves, self._structure = jax.tree.flatten(unconstrained)
        self.theta, self._unravel = ravel_pytree(self._of_used(self._leaves))
        sites = [site for site in sorted(unconstrained) for _ in jax.tree.leaves(unconstrained[site])]
        sized = zip(self._of_used(sites), self._of_used(self._leaves), strict=True)
        self.names = [site for site, leaf in sized for _ in range(leaf.size)]

    @classmethod
    def of(cls, posterior: Posterior, latents: Latents) -> "_Learned":
        """Those that the density at latents depends on."""
        leaves, structure = jax.tree.flatten(posterior.theta())

        def terms() -> dict[str, Array]:
            marked = [mark(leaf, str(i)) for i, leaf in enumerate(leaves)]
            return posterior.terms(latents, posterior.params_at(jax.tree.unflatten(structure, marked)))

        found = frozenset[str]().union(*jax.tree.leaves(sources(terms)))
        if not found:
            raise ValueError("the density depends on no param site, so that there is nothing to give standard errors of.")
        return cls(posterior, tuple(str(i) in found for i in range(len(leaves))))

    def _of_used(self, leaves: list[Any]) -> list[Any]:
        return [leaf for leaf, is_used in zip(leaves, self.used, strict=True) if is_used]

    def unravel(self, theta: Array) -> Any:
        """All unconstrained params: the others are where they were."""
        given = iter(self._unravel(theta))
        leaves = zip(self._leaves, self.used, strict=True)
        return jax.tree.unflatten(self._structure, [next(given) if is_used else leaf for leaf, is_used in leaves])

    def params_at(self, theta: Array) -> Array:
        """Their constrained values, as one array."""
        return ravel_pytree(self._of_used(jax.tree.leaves(self.posterior.params_at(self.unravel(theta)))))[0]

    def by_site(self, values: Array) -> dict[str, Any]:
        """Something of each of these by param site, and nan for the others."""
        leaves, structure = jax.tree.flatten(self.posterior.params)
        given = iter(ravel_pytree(self._of_used(leaves))[1](values))
        filled = zip(leaves, self.used, strict=True)
        return jax.tree.unflatten(structure, [next(given) if is_used else jnp.full_like(leaf, jnp.nan) for leaf, is_used in filled])


class _Moments(NamedTuple):
    """Means over the samples of every chain."""

    score: Any  # (num_chains, p), of the gradient of the log joint density
    information: Any  # (num_chains, p, p), of minus its Hessian
    scores: Any  # (num_chains, rows, p), of the rows' scores, less those of a reference draw
    products: Any  # (num_chains, p, p), of the sum over rows of these scores times themselves


def _moments(posterior: Posterior, used: tuple[bool, ...], theta: Array, draws: Latents) -> _Moments:
    """What Louis' identity needs of the samples, ``(num_chains, num_samples) + ...``, one sample at a time."""
    unravel = _Learned(posterior, used).unravel

    def scores(x: Latents) -> Array:
        of_rows = jax.jacfwd(lambda theta: posterior.row_log_density(x, posterior.params_at(unravel(theta))))(theta)
        return jnp.atleast_2d(of_rows)

    def of_draw(x: Latents) -> _Moments:
        def log_density(theta: Array) -> Array:
            return total(posterior.terms(x, posterior.params_at(unravel(theta))))

        score, hessian = jax.grad(log_density)(theta), jax.hessian(log_density)(theta)
        of_rows = scores(x) - reference  # a covariance is the same about any point, and more exact about a near one
        return _Moments(score, -hessian, of_rows, jnp.matmul(of_rows.T, of_rows, precision="highest"))

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


def _warn_off_maximum(
    spread: np.ndarray, information: np.ndarray, moments: _Moments, errors: np.ndarray, num_samples: int, names: list[str]
) -> None:
    """Warns of the param that a Newton step moves farthest in its standard errors, if that is more than chance.

    :param spread: what a gradient is multiplied by for the step of constrained values.
    """
    step = spread @ moments.score.mean(0)
    # scores of the complete data have the covariance that Louis' identity takes away; a chain's samples may depend on each other
    missing = np.maximum(np.einsum("ij,jk,ik->i", spread, moments.information.mean(0) - information, spread), 0) / num_samples
    of_chains = moments.score @ spread.T
    between = of_chains.var(0, ddof=1) / len(of_chains) if len(of_chains) > 1 else np.zeros_like(missing)
    scale = np.maximum(errors, 1e-300)
    moved, noise = np.abs(step) / scale, np.sqrt(np.maximum(missing, between)) / scale
    if ((excess := moved - MOST_STEP - 4 * noise) <= 0).all():
        return
    worst = int(excess.argmax())
    warnings.warn(
        f"param '{names[worst]}': params are not at a maximum of the likelihood. A Newton step would move it by "
        f"{moved[worst]:.2g} (+- {noise[worst]:.1g}) of its standard errors, which hold where that is at most {MOST_STEP}. Fit for "
        "longer, average the iterates (average_iterates=True), or take kernel='mala' where unadjusted particles have biased them; "
        "and take samples at the new params.",
        stacklevel=3,
    )


def _require_positive_definite(information: np.ndarray, complete: Any, names: list[str]) -> None:
    """Refuses an information that tells nothing in some direction, in units of that of the complete data."""
    if not np.isfinite(information).all():
        raise ValueError("the derivatives of the log density in the parameters are not finite: look at params and data.")
    scale = np.sqrt(np.abs(np.asarray(complete, np.float64).diagonal()))
    if (flat := scale == 0).any():
        raise ValueError(
            f"param '{names[int(flat.argmax())]}': the log density has no curvature in it, and gives it no standard error."
        )
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    if values[0] <= 10 * len(values) * np.finfo(np.asarray(complete).dtype).eps:
        worst = names[int(np.abs(vectors[:, 0]).argmax())]
        raise ValueError(
            f"param '{worst}': the observed information is not positive definite (smallest eigenvalue {values[0]:.2g} of the "
            "information of the complete data), most of all in this param. Either params are not at a maximum, or the data do "
            "not tell some parameters apart (the model is not regular), or the draws are too few: take more num_samples."
        )
