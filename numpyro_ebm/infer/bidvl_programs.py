# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether three programs are energy, encoder and generator of one visible: what :class:`~numpyro_ebm.BiDVL` can learn from.

All are runs of a program on the same rows of the visible, which have a plate of their own in each.
"""

import jax.numpy as jnp
from jax import Array

from numpyro_ebm.infer.score_engine import require_params
from numpyro_ebm.program.batch import require_same_rows
from numpyro_ebm.program.pair import require_apart, require_pair
from numpyro_ebm.program.rows import leading_plate, row_plate
from numpyro_ebm.program.run import Run
from numpyro_ebm.program.sites import is_unbounded, kind_of


def visible_of(energy: Run, v: Array) -> str:
    """The name of the one site that the energy observes, which must have the rows of the visible.

    :raises ValueError: naming the site.
    """
    if energy.latents:
        raise ValueError(
            f"site '{next(iter(energy.latents))}': the energy has a latent, and must be the marginal energy of the visible. "
            "Put latents into encoder and generator."
        )
    sites = _data_sites(energy)
    if len(sites) != 1:
        found = f"it observes {', '.join(map(repr, sites))}" if sites else "it observes none"
        raise ValueError(f"the energy must observe the visible at one site, and {found}.")
    (name,) = sites
    if energy.sites[name]["fn"].support.is_discrete:
        raise ValueError(
            f"site '{name}': a visible with {kind_of(energy.sites[name]['fn'])} is discrete, and a generator learns from the "
            "gradient of its energy. Give the data noise and a continuous distribution."
        )
    _require_rows(name, "the energy", energy, v)
    return name


def plate_of(program: Run, site: str, num_rows: int) -> str:
    """The plate of the rows, outermost around a site.

    :raises ValueError: naming the site.
    """
    rows = leading_plate(program, site, num_rows)
    if rows is None:
        raise ValueError(
            f"site '{site}': there is no plate of the {num_rows} rows of the first argument around it: write "
            f"`with numpyro.plate('data', {num_rows})`, outermost."
        )
    return rows


def require_together(energy: Run, encoder: Run, generator: Run, visible: str, v: Array, *, noise: bool) -> None:
    """Refuses programs that do not belong together, or cannot learn from each other.

    :param visible: the site that the energy observes.
    :param noise: whether visibles are drawn from the generator, or its means.
    :raises ValueError: naming the site.
    """
    runs = {"the energy": energy, "the encoder": encoder, "the generator": generator}
    require_same_rows(runs)
    if (observed := _data_sites(generator)) != [visible]:
        raise ValueError(f"site '{visible}': the generator must observe it, and no other site; it observes {observed}.")
    _require_rows(visible, "the generator", generator, v)
    if not generator.latents:
        raise ValueError("the generator has no latent site: it needs one to draw visibles from.")
    require_pair(generator, encoder, ("generator", "encoder"))
    _require_encoder(encoder, generator)
    _require_rows_of_latents(encoder, "the encoder", len(v))
    _require_rows_of_latents(generator, "the generator", len(v))
    for what, run in runs.items():
        require_params(run, {}, what)
    require_apart(runs)
    _require_generator(generator, visible, noise)


def require_real(energy: Run, visible: str) -> None:
    """Refuses a bounded visible, which chains would leave.

    :raises ValueError: naming the site.
    """
    support = energy.sites[visible]["fn"].support
    if not is_unbounded(support):
        raise ValueError(
            f"site '{visible}': its support is {support}, which moved visibles would leave. Write the energy of a real visible, "
            "transformed in the program."
        )


def _data_sites(program: Run) -> list[str]:
    """Observed sites but for factors, which have no data."""
    return [name for name, site in program.observed.items() if jnp.size(site["value"])]


def _require_rows(name: str, what: str, program: Run, v: Array) -> None:
    """Refuses a site that does not observe the visible, row by row."""
    fn, value = program.sites[name]["fn"], jnp.shape(program.sites[name]["value"])
    if fn.shape() != v.shape or value != v.shape:
        raise ValueError(
            f"site '{name}': {what} has visibles of shape {fn.shape()} there, observed with shape {value}, and the first argument "
            f"has {v.shape}: the three programs must share one visible."
        )
    plate_of(program, name, len(v))


def _require_rows_of_latents(program: Run, what: str, num_rows: int) -> None:
    """Refuses latents that rows share: the levels are means over rows, and their weights go to one row each."""
    for name in program.latents:
        if row_plate(program, [name], num_rows) is None:
            raise ValueError(
                f"site '{name}': {what} draws it outside the plate of the {num_rows} rows, and each needs latents of its own."
            )


def _require_encoder(encoder: Run, generator: Run) -> None:
    """Refuses draws of the encoder that it cannot learn from."""
    for name in generator.latents:
        fn = encoder.sites[name]["fn"]
        if not fn.has_rsample:
            raise ValueError(
                f"site '{name}': the encoder draws it from {kind_of(fn)}, which is not reparametrized: the lower level "
                "differentiates through the draw. Use a continuous distribution such as Normal."
            )
        if generator.sites[name]["fn"].support.is_discrete:
            raise ValueError(
                f"site '{name}': the generator draws it from {kind_of(generator.sites[name]['fn'])}, which is discrete: an "
                "encoder learns by its gradient. Make it continuous."
            )


def _require_generator(generator: Run, visible: str, noise: bool) -> None:
    """Refuses draws of the generator that it cannot learn from."""
    for name in generator.latents:
        if not generator.sites[name]["fn"].has_rsample:
            raise ValueError(
                f"site '{name}': the generator draws it from {kind_of(generator.sites[name]['fn'])}, which is not "
                "reparametrized: what it depends on would learn nothing from its samples. Use a distribution such as Normal."
            )
    fn = generator.sites[visible]["fn"]
    if noise and not fn.has_rsample:
        raise ValueError(
            f"site '{visible}': the generator draws it from {kind_of(fn)}, which is not reparametrized: the generator could "
            "not learn from the energy of its samples. Pass noise=False, for means, or use a distribution such as Normal."
        )
