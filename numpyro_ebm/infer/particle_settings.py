# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How the parameters of :class:`~numpyro_ebm.ParticleMMLE` move, where not by an optimizer alone, and what they are told."""

from dataclasses import dataclass
from typing import Any

from numpyro_ebm._checks import require_count
from numpyro_ebm.optim import as_transformation


@dataclass(frozen=True)
class Newton:
    """An ``optim`` of :class:`~numpyro_ebm.ParticleMMLE`: an optimizer that gets the Newton direction in place of the gradient.

    The Hessian is that of the loss in the unconstrained parameters, ``(size, size)``, which must be few: Kuntz et al. (2023).

    :param optim: an optax transformation, or an optimizer of :mod:`numpyro.optim`.
    :raises TypeError: for anything else.
    """

    optim: Any

    def __post_init__(self) -> None:
        as_transformation(self.optim)


@dataclass(frozen=True)
class Maximize:
    """An ``optim`` of :class:`~numpyro_ebm.ParticleMMLE`: parameters go to the maximum for the current particles, by L-BFGS.

    :param int max_steps: steps of L-BFGS at most; it stops where a step is lost in rounding.
    :raises ValueError: if it is not a positive integer.
    """

    max_steps: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_steps", require_count("max_steps", self.max_steps))


@dataclass(frozen=True)
class Summed:
    """A ``drift`` of :class:`~numpyro_ebm.ParticleMMLE`: the optimizer gets the gradient of the loss, a sum over the data.

    The temperature of its noise is ``1 / num_particles``.
    """


@dataclass(frozen=True)
class Averaged:
    """A ``drift`` of :class:`~numpyro_ebm.ParticleMMLE`: what ``Summed`` gives, divided by the number of data.

    The gradient and the temperature of the noise both are.

    :param int num_data: that number; the rows of the plates that all latents share if not given.
    :raises ValueError: if it is not a positive integer.
    """

    num_data: int | None = None

    def __post_init__(self) -> None:
        if self.num_data is not None:
            object.__setattr__(self, "num_data", require_count("num_data", self.num_data, why="it divides the gradient"))
