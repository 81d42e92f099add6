# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""The normalizer of a restricted Boltzmann machine, exact or by annealed importance sampling (AIS).

AIS moves chains along machines whose weights and hidden biases are scaled by :math:`\beta`, from the uncoupled one
(:math:`\beta = 0`, whose normalizer is known) to the one in question (:math:`\beta = 1`). On the way from
:math:`\beta_{k-1}` to :math:`\beta_k` a chain's weight grows by

.. math::

    \log w \leftarrow \log w + F_{k-1}(v) - F_k(v)
    = \log w + \sum_j \mathrm{softplus}(\beta_k a_j) - \mathrm{softplus}(\beta_{k-1} a_j), \qquad a = c + W^\top v,

and the chain makes one sweep of block Gibbs at :math:`\beta_k`. The mean weight is an unbiased estimate of
:math:`Z / Z_0`.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn import softplus
from jax.scipy.special import logsumexp
from numpyro.distributions import BernoulliLogits

from numpyro_ebm._checks import require_count, require_key, require_one_of
from numpyro_ebm._compiled import compiled
from numpyro_ebm.distributions.guard import refuse_gradient
from numpyro_ebm.distributions.rbm import RestrictedBoltzmannMachine
from numpyro_ebm.weights import LogNormalizer, effective_sample_size, normalized_weights

Method = Literal["exact", "ais"]


def log_normalizer(
    rbm: RestrictedBoltzmannMachine,
    method: Method = "exact",
    *,
    rng_key: Array | None = None,
    num_chains: int = 2000,
    num_temperatures: int = 2000,
) -> LogNormalizer:
    r""":math:`\log Z` of a restricted Boltzmann machine, with its standard error.

    ``"exact"`` enumerates a layer of at most 20 units. ``"ais"`` is annealed importance sampling; its cost is one sweep of all
    chains per temperature, its memory does not depend on the number of temperatures. The standard error is that of the mean
    weight, by the delta method. It can be trusted while the effective sample size is a fair fraction of ``num_chains``; where few
    chains carry most of the weight, :math:`\log Z` tends to be **too low** and likelihoods too high: use more temperatures.

    The log-likelihood of data is ``rbm.log_prob(v) - log_normalizer(rbm).log_normalizer``.

    :param rbm: a :class:`~numpyro_ebm.GaussianBernoulliRBM` or :class:`~numpyro_ebm.BernoulliRBM`.
    :param str method: ``"exact"`` or ``"ais"``.
    :param rng_key: a key of :func:`jax.random.key`, for AIS.
    :param int num_chains: chains of AIS, 2 or more.
    :param int num_temperatures: values of :math:`\beta`, evenly from 0 to 1, both included; 2 or more.
    :return: a :class:`LogNormalizer`; each field has the shape ``rbm.batch_shape``.
    :raises ValueError: if the method is unknown, AIS has no key, a number is too small, or a layer is too large to enumerate.
    :raises TypeError: if ``rbm`` is not a restricted Boltzmann machine.
    :raises NormalizerError: if the estimate of AIS is differentiated.

    **References**

    1. Neal, *Annealed importance sampling*, Statistics and Computing 11 (2001).
    2. Salakhutdinov and Murray, *On the quantitative analysis of deep belief networks*, ICML 2008.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import GaussianBernoulliRBM, log_normalizer
        >>> weights = 0.5 * jax.random.normal(jax.random.key(0), (6, 10))
        >>> rbm = GaussianBernoulliRBM(weights, jnp.zeros(6), jnp.zeros(10))
        >>> exact = log_normalizer(rbm)
        >>> estimate = log_normalizer(
        ...     rbm, "ais", rng_key=jax.random.key(1), num_chains=500, num_temperatures=200
        ... )
        >>> bool(
        ...     abs(estimate.log_normalizer - exact.log_normalizer)
        ...     < 4 * estimate.standard_error
        ... )
        True
    """
    if not isinstance(rbm, RestrictedBoltzmannMachine):
        raise TypeError(f"log_normalizer is for GaussianBernoulliRBM and BernoulliRBM, got {type(rbm).__name__}.")
    require_one_of("method", method, get_args(Method))
    num_chains = require_count("num_chains", num_chains, least=2)
    num_temperatures = require_count("num_temperatures", num_temperatures, least=2)
    if method == "exact":
        exact = rbm.log_normalizer()
        return LogNormalizer(exact, jnp.zeros_like(exact), jnp.full_like(exact, jnp.inf))
    if rng_key is None:
        raise ValueError("method='ais' draws chains: pass rng_key=jax.random.key(...).")
    fixed = lax.stop_gradient(rbm)
    log_weights = compiled(_anneal, require_key("rng_key", rng_key), fixed, num_chains, num_temperatures)
    log_mean = logsumexp(log_weights, axis=0) - math.log(num_chains)
    weights = normalized_weights(log_weights)
    no_gradient = refuse_gradient(
        "an AIS estimate of log Z has no gradient in the parameters: learn them under numpyro_ebm.negative_phase or by score "
        "matching, or use method='exact' for a small machine.",
        log_mean.dtype,
        jax.tree.leaves(rbm.params),
    )
    return LogNormalizer(
        log_normalizer=fixed.uncoupled_log_normalizer() + log_mean + no_gradient,
        standard_error=jnp.sqrt(num_chains * weights.var(axis=0, ddof=1)),  # of weights with mean 1, over sqrt(num_chains)
        effective_sample_size=effective_sample_size(weights),
    )


def _anneal(rng_key: Array, rbm: RestrictedBoltzmannMachine, num_chains: int, num_temperatures: int) -> Array:
    """The log weights of AIS, of shape ``(num_chains,) + batch_shape``."""
    start_key, sweeps_key = jax.random.split(rng_key)
    *batch_shape, _, num_hidden = rbm.weights.shape
    dtype = rbm.weights.dtype
    start = rbm.visible_given_hidden(jnp.zeros(num_hidden, dtype)).sample(start_key, (num_chains,))
    start = start.astype(dtype) if jnp.issubdtype(start.dtype, jnp.floating) else start

    def step(carry: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        (v, log_weight), (k, last, beta) = carry, xs
        hidden_key, visible_key = jax.random.split(jax.random.fold_in(sweeps_key, k))
        logits = rbm.hidden_logits(v)
        log_weight = log_weight + (softplus(beta * logits) - softplus(last * logits)).sum(-1)
        h = BernoulliLogits(beta * logits).sample(hidden_key)
        v = rbm.visible_given_hidden(beta * h).sample(visible_key).astype(v.dtype)  # beta W h = W (beta h)
        return (v, log_weight), None

    beta = jnp.linspace(0, 1, num_temperatures, dtype=dtype)
    xs = jnp.arange(num_temperatures - 1), beta[:-1], beta[1:]
    (_, log_weights), _ = lax.scan(step, (start, jnp.zeros((num_chains, *batch_shape), dtype)), xs)
    return log_weights
