# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The score of the visible of a model with latents, its parameters fixed, from samples of a guide."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_ebm._checks import require_bool, require_count, require_key
from numpyro_ebm._pytree import as_array
from numpyro_ebm.handlers import unnormalized
from numpyro_ebm.objectives.latent import draw, drawn_density, row_density, scores
from numpyro_ebm.program.batch import whole_batch
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.pair import require_pair
from numpyro_ebm.program.run import Run, run_model
from numpyro_ebm.program.sites import Model
from numpyro_ebm.program.visible import find_visible, require_rows
from numpyro_ebm.weights import normalized_weights


def marginal_score(
    model: Model,
    guide: Model,
    params: dict[str, Any],
    v: Any,
    *args: Any,
    rng_key: Array,
    num_samples: int = 10,
    importance_weighted: bool = False,
    variance_reduced: bool = False,
    relaxed: bool = False,
    **kwargs: Any,
) -> Array:
    r"""The score of the marginal of the visible, :math:`\nabla_v \log p(v)`, from samples of a guide.

    The variational estimate of the score (VaES [1]) of every row, with :math:`h_i \sim q(h|v)`,

    .. math:: \frac1L \sum_{i=1}^L \nabla_v \log \tilde p(v, h_i).

    It is unbiased where the guide is the posterior. Elsewhere it has a bias that no number of samples removes, and which
    ``importance_weighted`` replaces by one of order 1/L: the samples then have the weights
    :math:`\mathrm{softmax}_i(\log \tilde p(v, h_i) - \log q(h_i|v))` in place of 1/L. ``variance_reduced`` subtracts the mean of
    :math:`\nabla_v \log q(h_i|v)`, whose expectation is 0: what is left has no variance at all where the guide is the posterior.
    The control variate has no weights, so that the two go together.

    Nothing is checked of values here, and everything of shapes and names, so that this can be compiled and mapped.

    :param model: a NumPyro model whose first argument is the visible; it may be unnormalized.
    :param guide: a NumPyro guide with the latent sites of the model, in the plate of its rows.
    :param dict params: values of the param sites of both, constrained, as ``get_params`` of an engine gives them.
    :param v: visibles, of shape ``(batch,) + event_shape``.
    :param args: further arguments of model and guide.
    :param rng_key: a key of :func:`jax.random.key`.
    :param int num_samples: samples L of the guide for every row.
    :param bool importance_weighted: whether samples are weighted.
    :param bool variance_reduced: whether the guide's own score is subtracted.
    :param bool relaxed: whether relaxed bits (:class:`~numpyro_ebm.GumbelBernoulli`) are left so; else they are drawn as bits.
        Not with ``importance_weighted``.
    :param kwargs: further arguments of model and guide.
    :return: scores, of the shape of ``v``.
    :raises ValueError: naming the site, if the visible has no score (see :class:`~numpyro_ebm.ScoreMatching`), if model and
        guide do not have the same latents in the plate of the rows, or if ``params`` lacks one of their param sites;
        for weights of relaxed bits.
    :raises NormalizerError: naming the site, if an unknown normalizer depends on a latent or on the visible.

    **References**

    1. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
       arXiv:2010.08258.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import marginal_score
        >>> def model(v):
        ...     with numpyro.plate("data", len(v)):
        ...         h = numpyro.sample("h", dist.Normal(0, 1))
        ...         numpyro.sample("v", dist.Normal(h, 1), obs=v)  # v has N(0, 2)
        >>> def guide(v):
        ...     slope = numpyro.param("slope", 0.0)
        ...     with numpyro.plate("data", len(v)):
        ...         numpyro.sample("h", dist.Normal(slope * v, jnp.sqrt(0.5)))
        >>> v = jnp.array([-2.0, 0.0, 1.0])
        >>> settings = {"rng_key": jax.random.key(0), "variance_reduced": True}
        >>> marginal_score(model, guide, {"slope": 0.5}, v, **settings).round(3) + 0.0  # -v / 2
        Array([ 1. ,  0. , -0.5], dtype=float32)
    """
    num_samples = require_count("num_samples", num_samples)
    importance_weighted = require_bool("importance_weighted", importance_weighted)
    variance_reduced, relaxed = require_bool("variance_reduced", variance_reduced), require_bool("relaxed", relaxed)
    if importance_weighted and relaxed:
        raise ValueError(
            "relaxed=True does not go with importance_weighted=True: the guide's density of a relaxed bit is that of a bit, and "
            "not of what was drawn, so that no number of samples would give the score."
        )
    v, model = as_array("v", v), unnormalized(model)
    if not isinstance(v, jax.core.Tracer) and not (finite := np.isfinite(v)).all():
        raise ValueError(f"v: {int((~finite).sum())} of {finite.size} numbers are NaN or infinite: remove those rows.")
    draw_key, run_key = jax.random.split(require_key("rng_key", rng_key))
    batch = whole_batch((model, guide), (v, *args), kwargs, run_key, data=params)
    model, guide = batch.of(model), batch.of(guide)
    plate = _require_pair(model, guide, params, (v, *args), kwargs, run_key)
    check_run(model, (v, *args), kwargs, data=params, mark_visible=True).require_scores()
    drawn = draw(guide, (v, *args), kwargs, draw_key, num_samples, params=params, relaxed=relaxed)
    log_p, score = scores(row_density(model, args, kwargs, run_key, plate), v, params, drawn.latents)
    if not importance_weighted and not variance_reduced:
        return score.mean(0)
    log_q, score_of_guide = scores(drawn_density(guide, args, kwargs, plate), v, params, drawn)
    weights = normalized_weights(log_p - log_q) if importance_weighted else jnp.full_like(log_p, 1 / num_samples)
    mean = jnp.einsum("lb,lb...->b...", weights, score, precision="highest")
    return mean - score_of_guide.mean(0) if variance_reduced else mean


def _require_pair(
    model: Model, guide: Model, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], rng_key: Array
) -> str:
    """The plate of the rows, in which all latents of both programs lie."""
    visible, of_model = find_visible(model, args, kwargs, rng_key, data=params)
    _require_params(of_model, params, "the model")
    require_rows(of_model, visible)
    if visible.plate is None or not of_model.latents:
        raise ValueError("the model has no latent site: its score is the gradient of its own log density.")
    of_guide = run_model(guide, args, kwargs, rng_key, data=params)
    _require_params(of_guide, params, "the guide")
    require_rows(of_guide, visible)
    require_pair(of_model, of_guide)
    return visible.plate


def _require_params(program: Run, params: dict[str, Any], what: str) -> None:
    """Refuses params that lack one of a program's, whose own starting value would take its place."""
    if missing := sorted(set(program.params) - set(params)):
        raise ValueError(f"params lacks {missing}, which {what} has: pass get_params(state) of a fit, all of it.")
