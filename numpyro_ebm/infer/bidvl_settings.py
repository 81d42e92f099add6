# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""The two levels of :class:`~numpyro_ebm.BiDVL`, as settings.

The upper level compares the energies of data :math:`v` and of generated visibles :math:`\hat v`; the lower level makes the
generator follow the energy, and the encoder both of them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer.elbo import ELBO

from numpyro_ebm._checks import require_count, require_nonnegative, require_one_of, require_positive

LATENT_TERMS = ("exact", "offset", "complete")


@dataclass(frozen=True)
class _Upper:
    """What the forms of the upper level share."""

    num_steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", require_count("num_steps", self.num_steps))


@dataclass(frozen=True)
class Difference(_Upper):
    r"""The upper level of :class:`~numpyro_ebm.BiDVL` as a difference of energies, :math:`E(v) - E(\hat v)`: for a density.

    Its gradient is that of the likelihood where the generator has the energy's distribution.

    :param int num_steps: steps of the energy per step of the engine.
    :param int num_unroll_steps: steps N of the lower level that the upper level looks ahead, as a function of the energy. Minus
        the rest of the lower level is then added to the upper, which turns it into :math:`E(v)` minus the optimum of the lower
        level: otherwise its optimum would not be that of the likelihood.
    :raises ValueError: for settings out of range.
    """

    num_unroll_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "num_unroll_steps", require_count("num_unroll_steps", self.num_unroll_steps, least=0))

    def contrast(self, of_data: Array, of_generated: Array) -> Array:
        """The level, of shape ``()``, from energies of data and of generated visibles, of shape ``(batch,)`` each."""
        return jnp.mean(of_data) - jnp.mean(of_generated)


@dataclass(frozen=True)
class Softplus(_Upper):
    r"""The upper level of :class:`~numpyro_ebm.BiDVL` as :math:`\log(1 + e^{E(v)}) - \log(1 + e^{E(\hat v)})`.

    It stops lowering energies that are already low.

    :param int num_steps: steps of the energy per step of the engine.
    :raises ValueError: for settings out of range.
    """

    def contrast(self, of_data: Array, of_generated: Array) -> Array:
        """The level, of shape ``()``, from energies of data and of generated visibles, of shape ``(batch,)`` each."""
        return jnp.mean(jax.nn.softplus(of_data)) - jnp.mean(jax.nn.softplus(of_generated))


@dataclass(frozen=True)
class Hinge(_Upper):
    r"""The upper level of :class:`~numpyro_ebm.BiDVL` as :math:`\max(0, 1 + E(v)) + \max(0, 1 - E(\hat v))`.

    It is flat below -1 for data and above 1 for samples, whatever their likelihood.

    :param int num_steps: steps of the energy per step of the engine.
    :raises ValueError: for settings out of range.
    """

    def contrast(self, of_data: Array, of_generated: Array) -> Array:
        """The level, of shape ``()``, from energies of data and of generated visibles, of shape ``(batch,)`` each."""
        return jnp.mean(jax.nn.relu(1 + of_data)) + jnp.mean(jax.nn.relu(1 - of_generated))


@dataclass(frozen=True)
class LowerLevel:
    r"""The lower level of :class:`~numpyro_ebm.BiDVL`, which encoder and generator minimize.

    .. math::

        & E(\hat v) + \text{latent\_weight} \cdot \ell(\hat h, \hat v) \\
        & + \text{vae\_weight} \cdot \bigl( -\log p(v|h) + \mathrm{KL}(q(h|v) \| p(h)) \bigr), \quad h \sim q(h|v),

    with data :math:`v` for samples of the energy in the last term, and the latent term :math:`\ell` by ``latent``:

    * ``"exact"``: :math:`\log p(\hat h) + \log p(\hat v|\hat h) - \log q(\hat h|\hat v)`. With both weights 1 the level is the
      symmetric divergence :math:`\mathrm{KL}(p_\omega \| p_\theta) + \mathrm{KL}(p_\theta \| p_\omega)`.
    * ``"offset"``, as in the paper's code: :math:`|\mu(\hat v) - \hat h|^2` with the encoder's mean :math:`\mu`; it trains only
      the generator. The code's ``latent_weight`` is one over the dimension of :math:`h`, or 1e-4.
    * ``"complete"``: :math:`|h' - \hat h|^2` with :math:`h' \sim q(h|\hat v)`, which trains both; in addition, the encoder learns
      from ``latent_weight`` :math:`\mathrm{KL}(q(h|\hat v) \| p(h))` in the upper level, so that its optimizer steps in both.

    The published method (Kan et al. 2022) generates means, so that its term :math:`\log p(\hat v|\hat h)` is a constant, and its
    squared error in place of a likelihood is that of a generator with variance 1/2.

    :param str latent: ``"exact"``, ``"offset"`` or ``"complete"``.
    :param float latent_weight: of the latent term.
    :param float vae_weight: :math:`\lambda`, of the autoencoder's loss.
    :param tuple weight_bounds: least and largest :math:`r` of weights of the rows of data in the autoencoder's loss,
        :math:`r(v) \propto \exp(\bar E - E(v))`, before they are made to have mean 1 over the batch; rows are not weighted if not
        given. The weights replace :math:`p_\theta / p_\text{data}`, which would need the unknown density of the data, and so move
        the optimum where that is not flat.
    :param elbo: NumPyro's ELBO for the autoencoder; ``TraceMeanField_ELBO()`` if not given.
    :param int num_steps: steps of encoder and generator per step of the engine.
    :raises ValueError: for settings out of range.
    :raises TypeError: for an ELBO that does not keep mutable sites.
    """

    latent: str = "exact"
    latent_weight: float = 1.0
    vae_weight: float = 1.0
    weight_bounds: tuple[float, float] | None = None
    elbo: Any = None
    num_steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent", require_one_of("latent", self.latent, LATENT_TERMS))
        object.__setattr__(self, "latent_weight", require_nonnegative("latent_weight", self.latent_weight))
        object.__setattr__(self, "vae_weight", require_nonnegative("vae_weight", self.vae_weight))
        object.__setattr__(self, "num_steps", require_count("num_steps", self.num_steps))
        if self.weight_bounds is not None:
            object.__setattr__(self, "weight_bounds", _require_bounds(self.weight_bounds))
        if self.elbo is not None and not _keeps_mutable_state(self.elbo):
            raise TypeError(f"elbo must be an ELBO of NumPyro that keeps mutable sites, such as Trace_ELBO(), got {self.elbo!r}.")


def _require_bounds(bounds: Any) -> tuple[float, float]:
    try:
        least, largest = bounds
    except (TypeError, ValueError):
        raise ValueError(f"weight_bounds must be two positive numbers, the smaller first, got {bounds!r}.") from None
    least, largest = (require_positive(f"weight_bounds[{i}]", bound) for i, bound in enumerate((least, largest)))
    if least > largest:
        raise ValueError(f"weight_bounds must be two positive numbers, the smaller first, got {bounds!r}.")
    return least, largest


def _keeps_mutable_state(elbo: Any) -> bool:
    return isinstance(elbo, ELBO) and type(elbo).loss_with_mutable_state is not ELBO.loss_with_mutable_state
