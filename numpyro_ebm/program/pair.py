# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a guide and a model belong together: the same latents, of the same shapes, and params of their own."""

from collections.abc import Mapping

import jax.numpy as jnp

from numpyro_ebm._compat import is_auxiliary
from numpyro_ebm.program.rows import dim_of
from numpyro_ebm.program.run import Run
from numpyro_ebm.program.sites import Site

Names = tuple[str, str]  # what model and guide are called
NAMES = "model", "guide"


def require_pair(model: Run, guide: Run, names: Names = NAMES, *, auxiliary: bool = False) -> None:
    """Refuses a guide that does not sample the latents of a model, and nothing else.

    :param auxiliary: whether the guide may draw all latents at once, from a site of its own, as most AutoGuides do.
    :raises ValueError: naming the site.
    """
    for name in model.latents:
        require_latent(model.sites[name], guide, names)
    require_no_more(model, guide, names, auxiliary=auxiliary)


def require_latent(site: Site, guide: Run, names: Names = NAMES, *, plate: str | None = None) -> None:
    """Refuses a guide that does not sample one latent of a model as the model does.

    :param site: the latent in the model.
    :param plate: a plate that it must lie in as it does in the guide, where there is one.
    :raises ValueError: naming the site.
    """
    name, (model, other) = site["name"], names
    if name not in guide.latents:
        raise ValueError(
            f"site '{name}': the {model} samples it and the {other}, which samples {sorted(guide.latents)}, does not. Sample it in "
            f"the {other}, or observe it in the {model}."
        )
    given, wanted = jnp.shape(guide.sites[name]["value"]), site["fn"].shape()
    if given != wanted:
        raise ValueError(
            f"site '{name}': the {other} gives shape {given}, the {model} needs {wanted}: they must sample the same event shape in "
            "the same plates."
        )
    if plate is not None and dim_of(site, plate) != dim_of(guide.sites[name], plate):
        lacks, has = (model, other) if dim_of(site, plate) is None else (other, model)
        raise ValueError(
            f"site '{name}': it does not lie in plate '{plate}' in the {lacks} as it does in the {has}: they must sample the same "
            "event shape in the same plates."
        )


def require_no_more(model: Run, guide: Run, names: Names = NAMES, *, auxiliary: bool = False) -> None:
    """Refuses a guide that samples what is no latent of the model.

    :raises ValueError: naming the site.
    """
    if not auxiliary:
        require_no_auxiliary(guide, names)
    for name in guide.latents:
        if name not in model.latents and not is_auxiliary(guide.sites[name]):
            raise ValueError(
                f"site '{name}': the {names[1]} samples it and the {names[0]}, which samples {sorted(model.latents)}, does not. "
                f"Take it out: the {names[1]} must sample the latents of the {names[0]} and nothing else."
            )


def require_no_auxiliary(guide: Run, names: Names = NAMES) -> None:
    """Refuses a guide that draws all latents at once, as most AutoGuides do.

    :raises ValueError: naming the site.
    """
    for name in guide.latents:
        if is_auxiliary(guide.sites[name]):
            raise ValueError(
                f"site '{name}': the {names[1]} draws all latents at once from this site, which the {names[0]} does not have, so "
                "that it has no density of those latents alone. Sample them directly; of the AutoGuides, AutoNormal does."
            )


def require_apart(runs: Mapping[str, Run]) -> None:
    """Refuses programs that share params or mutable sites.

    :param runs: a run of each, by what it is called.
    :raises ValueError: with the sites and what has them.
    """
    seen: dict[str, str] = {}
    for what, run in runs.items():
        own = {**run.params, **run.mutable_state}
        if shared := sorted(own.keys() & seen.keys()):
            raise ValueError(f"{seen[shared[0]]} and {what} share {shared}, which belong to one of them: name them apart.")
        seen.update(dict.fromkeys(own, what))
