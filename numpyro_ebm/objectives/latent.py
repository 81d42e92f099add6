# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""The score of the visible of a model with latents, from samples of a guide.

With :math:`f = \log \tilde p(v, h; \theta)` and expectations over the posterior :math:`p(h|v; \theta)`,

.. math::

    s(v; \theta) = E[\nabla_v f], \qquad
    \partial_\theta E[g] = E[\partial_\theta g] + \mathrm{Cov}(g, \nabla_\theta f) \; \text{ for any } g(v, h; \theta), \qquad
    \partial_v s \, u = E[\nabla_v^2 f \, u + \nabla_v f \, (\nabla_v f \cdot u)] - s \, (s \cdot u).

With samples of a guide in place of the posterior's, the first becomes the variational estimate of the score (VaES), and the
second, with :math:`g = \nabla_v f`, that of its gradient (VaGES) [1]. The third, which is not in the paper, is for objectives
that differentiate the score in the visible; its gradient follows from the second again.

What is returned here are functions of the visible whose value, gradient in the parameters and derivative in the visible are
those estimates by plain automatic differentiation, so that an objective needs to know nothing of latents.

**References**

1. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
   arXiv:2010.08258.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.lax import stop_gradient
from numpyro.primitives import Messenger

from numpyro_ebm._map_over import map_over
from numpyro_ebm.distributions.energy import with_core
from numpyro_ebm.distributions.relaxed import GumbelBernoulli
from numpyro_ebm.program.rows import per_row
from numpyro_ebm.program.run import constrain_params, log_density_terms, run_model
from numpyro_ebm.program.sites import Model, Site, core_of
from numpyro_ebm.weights import normalized_weights

#: values of latent sites by name, with samples along axis 0
Latents = dict[str, Array]
#: (parameters, visible, latents of one sample) -> log density of every row
RowDensity = Callable[[Any, Array, Any], Array]
ScoreFn = Callable[[Array], Array]


class Drawn(NamedTuple):
    """Samples of a guide, each with the key that it was drawn with: its density has what the guide drew beside it."""

    latents: Latents
    #: (num_samples,)
    keys: Array


def draw(
    guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any], rng_key: Array, num_samples: int, *, params: Any, relaxed: bool
) -> Drawn:
    """Independent samples of a guide, ``(num_samples,) + shape``; bits are 0 or 1 unless ``relaxed``. They have no gradient."""

    def one(key: Array) -> Latents:
        with nullcontext() if relaxed else hard_bits():
            return run_model(guide, args, kwargs, key, data=params).drawn

    keys = jax.random.split(rng_key, num_samples)
    return Drawn(stop_gradient(map_over(one, keys)), keys)


def row_density(
    program: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rng_key: Array,
    plate: str,
    transforms: dict[str, Any] | None = None,
) -> RowDensity:
    """The log density of every row of a model or a guide at given params and latents.

    :param args: the arguments after the visible.
    :param transforms: of params that are given unconstrained.
    """

    def log_density(params: Any, v: Array, h: Latents) -> Array:
        data = {**constrain_params(params, transforms or {}), **h}
        with numpyro.validation_enabled(False):  # a relaxed bit is not a bit, and would have the log density -inf
            terms, run = log_density_terms(program, (v, *args), kwargs, rng_key, data=data)
            return per_row(terms, run, plate)

    return log_density


def drawn_density(guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any], plate: str) -> Callable[[Any, Array, Drawn], Array]:
    """The log density of every row of a guide at one of its own samples, with the dropout that this was drawn with."""

    def log_density(params: Any, v: Array, h: Drawn) -> Array:
        return row_density(guide, args, kwargs, h.keys, plate)(params, v, h.latents)

    return log_density


def scores(log_density: RowDensity, v: Array, params: Any, h: Any) -> tuple[Array, Array]:
    """Log densities, ``(num_samples, batch)``, and scores, ``(num_samples,) + v.shape``, of every sample."""

    def total(v: Array, h: Any) -> tuple[Array, Array]:
        rows = log_density(params, v, h)
        return rows.sum(), rows

    score, rows = map_over(partial(jax.grad(total, has_aux=True), v), h)
    return rows, score


class Draws(NamedTuple):
    """Independent samples for each factor of the estimates: a product of one set with itself would be biased."""

    #: of the score's value: latents, or what else ``log_ratio`` takes
    value: Any
    #: of the expectation in its gradient
    mean: Latents
    #: of the covariance there
    covariance: Latents


def variational_score(
    log_p: RowDensity, params: Any, v: Array, draws: Draws, *, covariance: str = "unbiased", log_ratio: RowDensity | None = None
) -> ScoreFn:
    """VaES, whose gradient in ``params`` is VaGES.

    :param log_p: log density of every row.
    :param v: the visible that the samples are for, where alone there is a score: it is nan elsewhere.
    :param covariance: ``"unbiased"``, ``"biased"`` (divided by L, not L - 1) or ``"none"``.
    :param log_ratio: log p - log q, for the value by its scores: they have the same mean over the guide, and none of the
        variance where the guide is the posterior.
    """
    value, mean = (jax.tree.map(lambda x: x[0], samples) for samples in (draws.value, draws.mean))
    log_p, closed_over = _opened(log_p, "log_p", params, v, mean)
    of_value, also = (log_p, {}) if log_ratio is None else _opened(log_ratio, "log_ratio", params, v, value)

    # No function below closes over anything that is traced: a rule may be run when the trace that made it has ended.

    def there(value: Array, at: tuple[Array, Draws], x: Array) -> Array:
        return jnp.where(x == at[0], value, jnp.nan)  # an objective that takes differences would take them of one estimate

    def expectation(given: Any, draws: Draws, of: Callable[[Any, Latents], tuple[Array, Array]]) -> Array:
        """The mean over samples of what ``of`` gives next to log densities; its gradient has their covariance."""
        mean = of(given, draws.mean)[1].mean(0)
        if covariance == "none":
            return mean
        rows, g = of(given, draws.covariance)[0], of(stop_gradient(given), draws.covariance)[1]
        centered = g - g.mean(0, keepdims=True)
        divisor = len(g) - 1 if covariance == "unbiased" else len(g)
        return mean + (centered * _along(rows - stop_gradient(rows), g)).sum(0) / divisor

    def estimate(given: Any, at: tuple[Array, Draws]) -> Array:
        v, draws = at
        value = scores(of_value, v, given, draws.value)[1].mean(0)
        return _with_gradient(value, expectation(given, draws, partial(scores, log_p, v)))

    def slope(given: Any, at: tuple[Array, Draws], u: Array) -> Array:
        """The derivative of the score along ``u``: linear in ``u``, so that only the parameters may be stopped."""
        v, draws = at
        held = stop_gradient(given)
        (_, g), (_, curvature) = jax.jvp(lambda v: scores(of_value, v, held, draws.value), (v,), (u,))
        s, num_samples = g.mean(0), len(g)
        value = curvature.mean(0) + ((g - s[None]) * _dot(g - s[None], u)).sum(0) / (num_samples - 1)

        def moment(given: Any, h: Latents) -> tuple[Array, Array]:
            (rows, g), (_, curvature) = jax.jvp(lambda v: scores(log_p, v, given, h), (v,), (u,))
            return rows, curvature + g * _dot(g, u)

        def in_expectation(given: Any) -> Array:
            mean = expectation(given, draws, partial(scores, log_p, v))
            # of E[moment] - s (s.u), by the product rule: s is from other samples than the mean
            return expectation(given, draws, moment) - s * _dot(mean, u) - mean * _dot(s, u)

        return value + (in_expectation(given) - in_expectation(held))

    @jax.custom_jvp
    def score(given: Any, at: tuple[Array, Draws], x: Array) -> Array:
        return there(estimate(given, at), at, x)

    def rule(primals: tuple[Any, Any, Array], tangents: tuple[Any, Any, Any]) -> tuple[Array, Array]:
        (given, at, x), (d_given, _, d_x) = primals, tangents
        if _is_zero(d_given):
            value = estimate(given, at)
            tangent = jnp.zeros_like(value)
        else:
            value, tangent = _tangent(lambda given: estimate(given, at), given, d_given)
        return there(value, at, x), tangent if _is_zero(d_x) else tangent + slope(given, at, d_x)

    score.defjvp(rule, symbolic_zeros=True)
    return partial(score, {"params": params, **closed_over, **also}, (v, draws))


def _opened(log_density: RowDensity, name: str, params: Any, v: Array, h: Latents) -> tuple[RowDensity, dict[str, list[Any]]]:
    """A log density of what it closed over as well, by its name beside the parameters; and what that is."""
    closed = jax.make_jaxpr(log_density)(params, v, h)

    def opened(given: dict[str, Any], v: Array, h: Latents) -> Array:
        rows: Array
        (rows,) = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, given[name]))(*jax.tree.leaves((given["params"], v, h)))
        return rows

    return opened, {name: list(closed.consts)}


def weighted_score(log_p: RowDensity, params: Any, log_q: Array, h: Latents, keep: Array | None = None) -> ScoreFn:
    r"""The score of :math:`\log \tfrac1L \sum_i \tilde p(v, h_i) / q(h_i)` with the samples and their ``log_q`` held fixed.

    Samples are weighted by :math:`\tilde p / q`, normalized by their sum, so that it is consistent whatever the guide.

    :param log_q: log density of every sample and row, ``(num_samples, batch)``.
    :param keep: ``(num_samples,)``, whether each sample counts; all of them if not given.
    """

    def score(x: Array) -> Array:
        rows, g = scores(log_p, x, params, h)
        # A product of matrices for every row: the sets that a jackknife maps this over hold no weighted scores of their own.
        return jnp.einsum("ib,ib...->b...", normalized_weights(rows - log_q, keep), g, precision="highest")

    return score


class hard_bits(Messenger):
    """Draws bits in place of relaxed ones, of the same floating type."""

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and isinstance(core := core_of(msg["fn"]), GumbelBernoulli):
            msg["fn"] = with_core(msg["fn"], lambda fn: fn.hard())
            msg["infer"]["_bits_of"] = core.logits.dtype

    def postprocess_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and "_bits_of" in msg["infer"]:
            msg["value"] = msg["value"].astype(msg["infer"]["_bits_of"])


def _with_gradient(value: Array, surrogate: Array) -> Array:
    """``value``, with the gradient of ``surrogate``."""
    return stop_gradient(value) + (surrogate - stop_gradient(surrogate))


def _is_zero(tangents: Any) -> bool:
    return all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(tangents))


def _tangent(function: Callable[[Any], Array], x: Any, d_x: Any) -> tuple[Array, Array]:
    """The value of a function, and its derivative along a direction, of which a part may be known to be 0."""

    def instantiated(tangent: Any) -> Any:
        if not isinstance(tangent, SymbolicZero):
            return tangent
        no_number = tangent.dtype == jax.dtypes.float0  # the tangent of an integer or a key
        return np.zeros(tangent.shape, tangent.dtype) if no_number else jnp.zeros(tangent.shape, tangent.dtype)

    return jax.jvp(function, (x,), (jax.tree.map(instantiated, d_x),))


def _dot(a: Array, u: Array) -> Array:
    """The product of every row, with the axes of the event kept; a sample's axis in front of the rows' may lead."""
    axes = tuple(range(1 - u.ndim, 0))
    return (a * u.reshape((1,) * (a.ndim - u.ndim) + u.shape)).sum(axes, keepdims=True)


def _along(rows: Array, like: Array) -> Array:
    """``(num_samples, batch)``, with the axes of the event."""
    return rows.reshape(rows.shape + (1,) * (like.ndim - rows.ndim))
