# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions for guides of energy-based latent variable models: relaxed bits, and amortized guides over a batch."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import logit
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import promote_shapes, validate_sample


class GumbelBernoulli(Distribution):
    r"""A Bernoulli whose samples are relaxed to :math:`(0, 1)`, and whose ``log_prob`` is still that of the Bernoulli.

    Samples are :math:`h = \sigma((l + L) / \tau)` with logits :math:`l`, a standard logistic :math:`L` and temperature
    :math:`\tau`, which has the distribution of two Gumbels through a softmax. They are differentiable in the logits, and
    :math:`P(h > 1/2) = \sigma(l)` at every temperature. The density is

    .. math:: \log q(h) = h l - \log(1 + e^l),

    the Bernoulli's with a soft value. **It is not the density of the samples and is not normalized on** :math:`(0, 1)`. The
    papers choose it because it is the bit's own density that a guide must learn: at the exact posterior of a model that is
    bilinear in its bits, :math:`\log \tilde p(v, h) - \log q(h)` is the same for every h, soft or hard, so that the guide's loss
    has its optimum there. NumPyro's ``RelaxedBernoulli``, the Concrete distribution, has the same samples with their own
    normalized density, which suits a model whose prior is Concrete too; with a Bernoulli's energy its ratio is constant for no
    guide.

    NumPyro validates by default, and a Bernoulli of the *model* is then impossible at a soft value: its log density is minus
    infinity and its gradient is lost. :class:`~numpyro_ebm.PosteriorFisher` handles this; elsewhere fit such a model under
    ``numpyro.validation_enabled(False)``.

    The relaxation shrinks the variance of a bit to about :math:`(1 - \tau)` of it, and moves its mean by
    :math:`\tfrac{\pi^2}{6} \tau^2 \sigma''(l)`.

    :param logits: log odds of 1.
    :param temperature: :math:`\tau`, 0.1 in the papers.
    :raises ValueError: if ``temperature`` is not positive and finite.

    **References**

    1. Jang, Gu and Poole, *Categorical reparameterization with Gumbel-softmax*, ICLR 2017, arXiv:1611.01144.
    2. Maddison, Mnih and Teh, *The Concrete distribution*, ICLR 2017, arXiv:1611.00712.
    3. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020,
       arXiv:2010.07856.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_ebm import GumbelBernoulli
        >>> q = GumbelBernoulli(logits=jnp.array([-2.0, 0.0, 2.0]))
        >>> q.log_prob(jnp.ones(3)) == q.hard().log_prob(jnp.ones(3))
        Array([ True,  True,  True], dtype=bool)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real, "temperature": constraints.positive}
    support = constraints.unit_interval
    reparametrized_params: ClassVar[list[str]] = ["logits", "temperature"]

    def __init__(self, logits: Any, temperature: Any = 0.1, *, validate_args: bool | None = None) -> None:
        if not isinstance(temperature, jax.core.Tracer) and not np.all((np.asarray(temperature) > 0) & np.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, got {temperature!r}: the papers use 0.1, .hard() has none.")
        dtype = jnp.result_type(logits, temperature, 1.0)
        self.logits, self.temperature = promote_shapes(jnp.asarray(logits, dtype), jnp.asarray(temperature, dtype))
        shape = jax.lax.broadcast_shapes(jnp.shape(logits), jnp.shape(temperature))
        super().__init__(batch_shape=shape, validate_args=validate_args)

    @property
    def probs(self) -> Array:
        """The probability of 1, and of a sample above one half."""
        return jax.nn.sigmoid(self.logits)

    def hard(self) -> dist.BernoulliLogits:
        """The Bernoulli itself, whose samples are 0 or 1 and not differentiable; it has the same ``log_prob``."""
        return dist.BernoulliLogits(jnp.broadcast_to(self.logits, self.batch_shape))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.icdf(jax.random.uniform(key, sample_shape + self.batch_shape, self.logits.dtype))

    @validate_sample
    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        return jnp.broadcast_to(
            value * self.logits - jax.nn.softplus(self.logits), jnp.broadcast_shapes(jnp.shape(value), self.batch_shape)
        )

    def cdf(self, value: Array) -> Array:
        """The probability of a sample up to ``value``."""
        return jax.nn.sigmoid(self.temperature * logit(value) - self.logits)

    def icdf(self, q: Array) -> Array:
        """The sample at a quantile. One of 0 or 1, which a generator of uniforms may return, is moved to the nearest inside."""
        finfo = jnp.finfo(jnp.result_type(q))
        q = jnp.clip(q, finfo.tiny, 1 - finfo.epsneg)
        return jax.nn.sigmoid((self.logits + logit(q)) / self.temperature)


def amortized_normal(network: Callable[[Array], tuple[Array, Array]], v: Array) -> Distribution:
    """The independent normals that a network gives for every visible, for a guide.

    :param network: maps one visible, of shape ``event_shape``, to the location and the log scale of its latents, both of
        shape ``(num_latents,)``.
    :param v: visibles, of shape ``(batch,) + event_shape``.
    :return: a distribution of batch shape ``(batch,)`` and event shape ``(num_latents,)``.
    :raises ValueError: if the network returns anything else.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> from numpyro_ebm import amortized_normal
        >>> def guide(v):
        ...     A = numpyro.param("A", jnp.ones((3, 2)))
        ...     log_scale = numpyro.param("log_scale", jnp.zeros(3))
        ...     with numpyro.plate("data", len(v)):
        ...         numpyro.sample("h", amortized_normal(lambda v: (A @ v, log_scale), v))
        >>> traced = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0))
        >>> traced.get_trace(jnp.ones((4, 2)))["h"]["value"].shape
        (4, 3)
    """
    loc, log_scale = _of_rows(network, v, ("loc", "log_scale"))
    return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)


def amortized_bernoulli(network: Callable[[Array], Array], v: Array, temperature: Any = 0.1) -> Distribution:
    """The independent relaxed bits that a network gives for every visible, for a guide.

    :param network: maps one visible, of shape ``event_shape``, to the logits of its latents, of shape ``(num_latents,)``.
    :param v: visibles, of shape ``(batch,) + event_shape``.
    :param temperature: that of :class:`GumbelBernoulli`.
    :return: a distribution of batch shape ``(batch,)`` and event shape ``(num_latents,)``.
    :raises ValueError: if the network returns anything else.
    """
    (logits,) = _of_rows(network, v, ("logits",))
    return GumbelBernoulli(logits, temperature).to_event(1)


def _of_rows(network: Callable[[Array], Any], v: Array, names: tuple[str, ...]) -> tuple[Array, ...]:
    """What a network returns for every row, by name; an error unless each is a vector of the same length."""
    if jnp.ndim(v) == 0:
        raise ValueError("v is a scalar, it must have shape (batch,) + event_shape: add the batch axis in front.")
    try:
        returned = jax.vmap(network)(v)
    except Exception as error:
        error.add_note(f"The network was given one visible of shape {jnp.shape(v)[1:]}: it is mapped over the batch.")
        raise
    parts = returned if len(names) > 1 else (returned,)
    shapes = [jnp.shape(part)[1:] for part in jax.tree.leaves(parts)]
    if not isinstance(parts, tuple | list) or [1] * len(names) != [len(shape) for shape in shapes] or len(set(shapes)) > 1:
        wanted = names[0] if len(names) == 1 else f"({', '.join(names)}), each"
        found = ", ".join(map(str, shapes))
        raise ValueError(
            f"for one visible of shape {jnp.shape(v)[1:]} the network must return {wanted} of shape (num_latents,); it returned "
            f"{type(returned).__name__} of {len(shapes)} with shape {found}. Reshape to one vector, and let the network see one "
            "visible: it is mapped over the batch."
        )
    return tuple(parts)
