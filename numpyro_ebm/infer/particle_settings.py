# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Settings of :class:`~numpyro_ebm.ParticleMMLE`: the steps of its particles, and how parameters move where not by an optimizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax import Array

from numpyro_ebm._checks import require_count, require_positive
from numpyro_ebm.optim import Schedule, as_transformation, require_step
from numpyro_ebm.samplers.mala import STEPS_PER_JUMP

StepSize = float | Schedule | dict[str, float | Schedule]

START_STEP = 0.1  # where adapted steps start from if not told


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


def require_steps(step_size: Any, kernel: str) -> StepSize:
    """A step or a schedule of it, or one for each latent site.

    :raises ValueError: for anything else; without one where the kernel needs it, and for a schedule of steps that adapt.
    """
    if step_size is None:
        if kernel == "mala":
            return START_STEP
        raise ValueError("step_size is needed: the step h of unadjusted particles. With kernel='mala' they find one themselves.")
    if isinstance(step_size, Mapping):
        return {name: _require_one(f"step_size['{name}']", step, kernel) for name, step in step_size.items()}
    return _require_one("step_size", step_size, kernel)


def _require_one(name: str, step_size: Any, kernel: str) -> Any:
    if kernel == "mala" and callable(step_size):
        raise ValueError(f"{name} is a schedule, and the steps of kernel='mala' adapt: give the number that they start from.")
    return require_step(step_size) if callable(step_size) else require_positive(name, step_size)


def require_jumps(num_jumps: Any, kernel: str, num_moves: int) -> int:
    """The number of jumps per step.

    :raises ValueError: for anything else than an integer of 0 or more, and where moves are not accepted.
    """
    if kernel != "mala":
        if num_jumps:
            raise ValueError(
                f"num_jumps={num_jumps!r} goes with kernel='mala', whose particles accept what they move to: take it, or leave "
                "num_jumps out."
            )
        return 0
    return -(-num_moves // STEPS_PER_JUMP) if num_jumps is None else require_count("num_jumps", num_jumps, least=0)


def require_steps_of(step_size: StepSize, sites: Iterable[str]) -> None:
    """Refuses steps of other sites than the latent ones of a model.

    :raises ValueError: naming them.
    """
    if isinstance(step_size, dict) and (wrong := sorted(step_size.keys() ^ set(sites))):
        name = wrong[0]
        fault = "is no latent site of the model" if name in step_size else "has no step_size"
        raise ValueError(
            f"site '{name}' {fault}: step_size must name the latent sites {sorted(sites)}, it has {sorted(step_size)}."
        )


def require_one_step(step_size: StepSize | None, constructor: str) -> Any:
    """A step that parameters move by as well.

    :raises ValueError: for steps by latent site, and for none.
    """
    if step_size is None or isinstance(step_size, Mapping):
        raise ValueError(
            f"{constructor} moves the parameters by step_size as well, which must be one number or schedule, got {step_size!r}: "
            "pass optim where the constructor has it, or take ParticleMMLE(model, optim, ...)."
        )
    return step_size


def steps_at(step_size: StepSize, sites: Iterable[str], num_steps: Array) -> dict[str, Any]:
    """The step of each latent site after ``num_steps`` steps."""
    of_site = step_size if isinstance(step_size, dict) else dict.fromkeys(sites, step_size)
    return {name: step(num_steps) if callable(step) else step for name, step in of_site.items()}
