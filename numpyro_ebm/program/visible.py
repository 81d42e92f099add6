# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The visible of a model: the site that its first argument is the data of, whose log density has a score.

Engines that match scores perturb a batch of the visible and differentiate the model in it. They need to know where it goes:
to one continuous site, row by row, unchanged but for a linear map (any other would add its Jacobian to the log density).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_ebm.program.batch import run_at_zero
from numpyro_ebm.program.provenance import mark, sources
from numpyro_ebm.program.rows import leading_plate
from numpyro_ebm.program.run import Run
from numpyro_ebm.program.sites import Model, Site, is_unbounded, kind_of


class Visible(NamedTuple):
    """Where the first argument of a model goes."""

    #: name of the site that observes it
    site: str
    #: name of the plate of its rows; None where the model has no plate around it
    plate: str | None


def find_visible(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], rng_key: Array, *, data: dict[str, Any]
) -> tuple[Visible, Run]:
    """The visible of a model, and a run of the model.

    :param args: arguments of the model, the first a batch of the visible, ``(batch,) + event_shape``.
    :param data: values of sites by name. Latent sites that are missing are 0, or what of their support is near.
    :raises ValueError: if the first argument reaches no observed site or two, a discrete or bounded one, or one by a map that
        is not linear; if its rows are not those of one plate; naming the site and the fix.
    """
    visible = require_batch(args)
    program = run_at_zero(model, args, kwargs, rng_key, data)

    def observe(v: Array) -> dict[str, Array]:
        return _observations(run_at_zero(model, (v, *args[1:]), kwargs, rng_key, data))

    name = _the_only(_reached(observe, visible), _observations(program))
    site = program.sites[name]
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"site '{name}': a visible with {kind_of(site['fn'])} is discrete and has no score. Learn its parameters by likelihood "
            "(SVI, under negative_phase where the normalizer is unknown), or give the data noise and a continuous distribution."
        )

    if not is_unbounded(site["fn"].support):
        raise ValueError(
            f"site '{name}': its support is {site['fn'].support}, and scores are matched on all of real space (there would be "
            "terms on the boundary). Transform the data to real space before, as by a log or a logit."
        )

    def tangent(v: Array) -> Array:
        return jax.jvp(lambda v: observe(v)[name], (v,), (jnp.ones_like(v),))[1]

    if sources(lambda: tangent(mark(visible, "v"))):
        raise ValueError(
            f"site '{name}': its data are a function of the first argument that is not linear, whose Jacobian the log density "
            "lacks. Transform the data before, and pass what the site observes."
        )
    return Visible(name, _row_plate(program, site, len(visible))), program


def require_reached(
    site: str, what: str, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], rng_key: Array, *, data: dict[str, Any]
) -> None:
    """Refuses a program whose first argument does not reach an observed site, which would then see the same data always.

    :param what: the program in words.
    :raises ValueError: naming the site.
    """

    def observe(v: Array) -> dict[str, Array]:
        return _observations(run_at_zero(model, (v, *args[1:]), kwargs, rng_key, data))

    if site not in _reached(observe, args[0]):
        raise ValueError(
            f"site '{site}': {what} observes something else there than the first argument, the visible: condition or a global "
            "value has taken its place. Write numpyro.sample(..., obs=the first argument)."
        )


def require_rows(program: Run, visible: Visible) -> None:
    """Refuses a model whose latents do not belong to one row of the visible each.

    :raises ValueError: naming the site.
    """
    for name, latent in program.latents.items():
        if visible.plate is None or visible.plate not in {plate for plate, _ in latent.plates}:
            where = f"plate '{visible.plate}'" if visible.plate else "a plate around the visible"
            raise ValueError(
                f"site '{name}': a latent outside {where} belongs to all rows at once, and scores are matched row by row. Put it "
                f"and site '{visible.site}' into one plate, or make it a numpyro.param."
            )


def require_unscaled(program: Run) -> None:
    """Refuses a program under :class:`numpyro.handlers.scale`: a score is that of the density, and of its power where it is scaled.

    :raises ValueError: naming the site.
    """
    for name, site in program.sites.items():
        scale = site.get("scale") if site["type"] == "sample" else None
        if scale is None or not (isinstance(scale, jax.core.Tracer) or not np.allclose(scale, 1)):
            continue
        by = "" if isinstance(scale, jax.core.Tracer) else f" by {np.ravel(scale)[0]:g}"
        raise ValueError(
            f"site '{name}': scale multiplies its log density{by}. That weighs data in a likelihood, and in a score it makes "
            "another density, whose parameters are others: leave it out, and repeat rows to weigh them."
        )


def require_batch(args: tuple[Any, ...], of: str = "the model", why: str = "scores are derivatives in it") -> Array:
    """The first argument, which must be an array of floating-point rows.

    :raises ValueError: with what it is.
    """
    what = f"the first argument of {of} must be the batch of the visible, an array of floating-point numbers"
    if not args or not isinstance(args[0], (jax.Array, jax.core.Tracer)):
        raise ValueError(f"{what}, got {type(args[0]).__name__ if args else 'no argument'}.")
    v = args[0]
    if v.ndim == 0 or len(v) == 0:
        raise ValueError(f"{what}, got shape {v.shape}: it has no rows.")
    if not jnp.issubdtype(v.dtype, jnp.floating):
        raise ValueError(f"{what}, got {v.dtype}: {why}. Convert it.")
    return v


def _observations(program: Run) -> dict[str, Array]:
    """The data of observed sites; a factor has none."""
    return {name: jnp.asarray(site["value"]) for name, site in program.observed.items() if jnp.size(site["value"])}


def _reached(observe: Callable[[Array], dict[str, Array]], v: Array) -> list[str]:
    """The observed sites whose data depend on the visible."""
    return [name for name, marks in sorted(sources(lambda: observe(mark(v, "v"))).items()) if marks]


def _the_only(sites: list[str], values: dict[str, Array]) -> str:
    if len(sites) == 1:
        return sites[0]
    what = "the first argument of the model is the visible, and"
    if sites:
        raise ValueError(f"{what} sites {', '.join(map(repr, sites))} all observe it: observe it once, as one event per row.")
    others = f": its observed sites are {', '.join(map(repr, sorted(values)))}" if values else ""
    raise ValueError(f"{what} no site observes it{others}. Write numpyro.sample(..., obs=the first argument).")


def _row_plate(program: Run, site: Site, num_rows: int) -> str | None:
    shape, plate = site["fn"].batch_shape, leading_plate(program, site["name"], num_rows)
    if plate is None and (site["cond_indep_stack"] or not shape or shape[0] != num_rows):
        raise ValueError(
            f"site '{site['name']}': its batch shape is {shape}, and the first argument has {num_rows} rows: its leftmost "
            f"dimension must be that of the rows, as in `with numpyro.plate('data', {num_rows})`."
        )
    return plate
