# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The mode of the posterior of the latents, the parameters fixed."""

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from numpyro.infer import init_to_sample

from numpyro_ebm._checks import require_count, require_key
from numpyro_ebm._compiled import compiled
from numpyro_ebm.evaluate.posterior import Latents, Posterior
from numpyro_ebm.optim import apply_gradient, as_transformation
from numpyro_ebm.program.sites import Model


class MapEstimate(NamedTuple):
    """What :func:`find_map` found."""

    #: by latent site, constrained, of shape ``batch_shape + event_shape``
    latents: Latents
    #: log density of the latents and data there, up to unknown normalizers: ``(rows,)`` if the rows of a plate factorize,
    #: else a scalar
    log_density: Array


def find_map(
    rng_key: Array,
    model: Model,
    params: Mapping[str, Any],
    *args: Any,
    num_starts: int | None = None,
    num_steps: int = 1000,
    optim: Any = None,
    start: Mapping[str, Array] | None = None,
    mutable_state: Mapping[str, Any] | None = None,
    init_strategy: Callable[..., Any] = init_to_sample,
    **kwargs: Any,
) -> MapEstimate:
    r"""The most probable latents at fixed parameters, :math:`\arg\max_x \log p_\theta(x, y)`.

    The density is that of the constrained values: the search is in unconstrained space, without the Jacobian. Where the rows
    of a plate that all latents share factorize, the best start is kept row by row.

    :param rng_key: a key of :func:`jax.random.key`.
    :param model: a NumPyro model, under :class:`~numpyro_ebm.negative_phase` or not.
    :param dict params: values of all :func:`numpyro.param` sites, ``result.params``; others are ignored.
    :param args: arguments of the model.
    :param int num_starts: searches to begin; as many as ``start`` has if it is given, else 4.
    :param int num_steps: steps of the optimizer.
    :param optim: an optax transformation or an optimizer of :mod:`numpyro.optim`; Adam with a step that falls from 0.1 to 0
        along a cosine if not given.
    :param start: latents to start from, constrained, of shape ``(num_starts,) + batch_shape + event_shape``, such as
        particles.
    :param mutable_state: values of the model's own :func:`numpyro.primitives.mutable` sites.
    :param init_strategy: a NumPyro ``init_to_...`` strategy to start from without ``start``.
    :param kwargs: keyword arguments of the model.
    :return: latents by site and their log density. It warns if the density is still rising.
    :raises ValueError: as :func:`sample_posterior` does, and if no start reached a finite density.
    :raises NormalizerError: if an energy's normalizer depends on another latent.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import find_map
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> found = find_map(jax.random.key(0), model, {"loc": 1.0}, jnp.array([1.0, 5.0]))
        >>> print(found.latents["x"].round(1), found.log_density.shape)
        [1. 3.] (2,)
    """
    num_steps = require_count("num_steps", num_steps)
    optim = _falling_adam(num_steps) if optim is None else as_transformation(optim)
    model_key, start_key = jax.random.split(require_key("rng_key", rng_key))
    posterior = Posterior(model_key, model, params, args, kwargs, mutable_state)
    positions = posterior.start(start_key, start, num_starts, "num_starts", init_strategy)

    latents, value, gain = compiled(_search, posterior, positions, optim, num_steps)
    if not np.isfinite(value).all():
        raise ValueError(f"no start reached a finite log density{posterior.rows_where(~np.isfinite(value))}: give start=.")
    if (unfinished := ~(np.asarray(gain) < MAP_TOLERANCE)).any():
        warnings.warn(
            f"the log density still rises{posterior.rows_where(unfinished)}: take more num_steps, or a larger step of optim. "
            "A density without a mode rises for ever.",
            stacklevel=2,
        )
    return MapEstimate(latents, value)


MAP_TOLERANCE = 0.01  # nats that one more line search may gain before find_map warns


@lru_cache(64)
def _falling_adam(num_steps: int) -> Any:
    """The same object for the same number, so that a search is compiled once."""
    return as_transformation(optax.adam(optax.cosine_decay_schedule(0.1, num_steps)))


def _search(posterior: Posterior, positions: Array, optim: Any, num_steps: int) -> tuple[Latents, Array, Array]:
    """The best latents over all starts, their log density, and what one more step would gain; row by row."""

    def log_density(x: Array) -> Array:
        return posterior.row_log_density(posterior.from_rows(x), jacobian=False)

    x, value = jax.vmap(lambda x: _climb(log_density, x, optim, num_steps))(positions)
    best = value.argmax(0)
    x = jnp.take_along_axis(x, best[None, ..., None], 0)[0]
    return posterior.constrained(posterior.from_rows(x)), value.max(0), _gain_ahead(log_density, x)


def _climb(log_density: Callable[[Array], Array], x: Array, optim: Any, num_steps: int) -> tuple[Array, Array]:
    """The best position that an optimizer meets on its way, row by row, and its log density."""

    def descent(x: Array) -> tuple[Array, Array]:
        value = log_density(x)
        return -value.sum(), value

    def keep(best: tuple[Array, Array], x: Array, value: Array) -> tuple[Array, Array]:
        better = value >= best[1] - 4 * jnp.finfo(value.dtype).eps * jnp.abs(value)  # of equals, the later one
        return jnp.where(better[..., None], x, best[0]), jnp.where(better, value, best[1])

    def step(carry: tuple[Array, Any, tuple[Array, Array]], _: None) -> tuple[Any, None]:
        x, state, best = carry
        (loss, value), gradient = jax.value_and_grad(descent, has_aux=True)(x)
        best = keep(best, x, value)
        x, state = apply_gradient(optim, gradient, state, x, value=loss, value_fn=lambda x: descent(x)[0])
        return (x, state, best), None

    nothing = x, jnp.full(x.shape[:-1], -jnp.inf, jax.eval_shape(log_density, x).dtype)
    (x, _, best), _ = lax.scan(step, (x, optim.init(x), nothing), None, num_steps)
    return keep(best, x, log_density(x))


def _gain_ahead(log_density: Callable[[Array], Array], x: Array) -> Array:
    """What a Newton step along the gradient would gain, row by row; inf where the density does not bend down along it."""
    score = jax.grad(lambda x: log_density(x).sum())
    g, bend = jax.jvp(score, (x,), (score(x),))
    slope, bend = (g * g).sum(-1), -(g * bend).sum(-1)
    tiny = jnp.finfo(x.dtype).tiny
    return jnp.where(slope < tiny**0.25, 0.0, jnp.where(bend > 0, slope**2 / (2 * jnp.maximum(bend, tiny)), jnp.inf))
