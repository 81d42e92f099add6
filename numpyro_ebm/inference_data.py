# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Fits and chains as ArviZ data.

The negative chains of a latent site are draws from its learnt prior, so they are the group ``prior``, with the chains
that the fit ran side by side as ArviZ's ``chain``: R-hat and ESS of that group say whether the chains mix.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array


def to_inference_data(
    state: Any,
    *,
    chains: Mapping[str, Array] | None = None,
    posterior: Mapping[str, Array] | None = None,
    posterior_predictive: Mapping[str, Array] | None = None,
    observed_data: Mapping[str, Array] | None = None,
    losses: Array | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """ArviZ data of a fit under :class:`~numpyro_ebm.negative_phase`.

    ========================  =========================================  ====================================================
    group                     dims of a variable                         what it holds
    ========================  =========================================  ====================================================
    ``posterior``             ``chain`` (1), ``draw``, site dims         draws from the guide
    ``posterior_predictive``  ``chain`` (1), ``draw``, site dims         draws of the data
    ``prior``                 ``chain``, ``draw``, site dims             the negative chains: draws from the learnt prior
    ``sample_stats_prior``    ``energy_site``                            ``num_updates``, the sampler's statistics (batch means)
    ``observed_data``         site dims                                  the data
    ``fit``                   ``step``                                   ``loss`` at every step
    ========================  =========================================  ====================================================

    The dims of a site are called ``<site>_dim_0``, ``<site>_dim_1`` and so on, unless ``dims`` names them. The chains of a
    site in a plate lack the plate's dim: they have the site's last ones. Only the groups that are given are made.

    :param state: an ``SVIRunResult``, an ``SVIState``, or a mutable state.
    :param chains: draws by site of :meth:`negative_phase.sample_chains <numpyro_ebm.negative_phase.sample_chains>`, of shape
        ``(num_chains, num_samples) + batch_shape + event_shape``; where the chains stand in ``state`` if not given.
    :param posterior: draws by site, of shape ``(num_samples,) + batch_shape + event_shape``.
    :param posterior_predictive: draws by site, of the same form.
    :param observed_data: data by site.
    :param losses: the loss at every step, of shape ``(num_steps,)``; those of ``state`` if it is an ``SVIRunResult``.
    :param coords: coordinate values by dim.
    :param dims: names of the dims of a site, plates first, without ``chain`` and ``draw``.
    :return: an ``arviz.InferenceData`` (ArviZ 0) or an ``xarray.DataTree`` (ArviZ 1).
    :raises ValueError: if ``state`` holds no negative chains; if ``chains`` or ``dims`` names an unknown site, or ``coords``
        an unknown dim; if ``dims`` gives a site the wrong number of names.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_ebm import to_inference_data
        >>> mutable_state = {"z/chains": {"x": jnp.zeros((100, 2)), "num_updates": jnp.array(50)}}
        >>> data = to_inference_data(mutable_state, dims={"z": ["latent"]})
        >>> data["prior"]["z"].dims
        ('chain', 'draw', 'latent')
    """
    kept = _negative_chains(state)
    losses = getattr(state, "losses", None) if losses is None else losses
    where_they_stand = {site: values["x"][:, None] for site, values in kept.items()}
    if chains is not None and not isinstance(chains, Mapping):
        raise TypeError("chains must map sites to draws: sample_chains returns (draws, mutable_state), pass the first.")
    _require_known("chains", chains or {}, kept)
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": _one_chain(posterior),
        "posterior_predictive": _one_chain(posterior_predictive),
        "prior": _as_numpy({**where_they_stand, **(chains or {})}),
        "observed_data": _as_numpy(observed_data),
    }
    _require_known("dims", dims or {}, {name for group in groups.values() for name in group})
    names = _dim_names(groups, dims or {})
    _require_known("coords", coords or {}, {"chain", "draw", *(dim for named in names.values() for dim in named)}, "dim")
    datasets = {group: _dataset(group, variables, names, coords or {}) for group, variables in groups.items() if variables}
    datasets["sample_stats_prior"] = _sampler_statistics(kept)
    if losses is not None:
        datasets["fit"] = _dataset("fit", {"loss": np.asarray(losses)}, {"loss": ()}, {})
    return _container(datasets)


def _negative_chains(state: Any) -> dict[str, dict[str, Any]]:
    state = getattr(state, "state", state)
    mutable_state = getattr(state, "mutable_state", state)
    names = [name for name in mutable_state if name.endswith("/chains")] if isinstance(mutable_state, Mapping) else []
    if not names:
        raise ValueError("the state holds no negative chains: pass the result of SVI on negative_phase(model).")
    return {name.removesuffix("/chains"): jax.device_get(mutable_state[name]) for name in names}


def _require_known(argument: str, named: Mapping[str, Any], known: Any, kind: str = "site") -> None:
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(f"{argument} names {unknown}, which is no {kind} here: the {kind}s are {sorted(known)}.")


def _as_numpy(variables: Mapping[str, Array] | None) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in (variables or {}).items()}


def _one_chain(variables: Mapping[str, Array] | None) -> dict[str, np.ndarray]:
    return {name: value[None] for name, value in _as_numpy(variables).items()}


_LEADING = {"observed_data": (), "fit": ("step",)}  # other groups lead with chain and draw


def _leading(group: str) -> tuple[str, ...]:
    return _LEADING.get(group, ("chain", "draw"))


def _dim_names(groups: dict[str, dict[str, np.ndarray]], dims: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The names of a site's dims. The chains of a site lack its plates, so the group that has most dims counts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group, variables in groups.items():
        for name, value in variables.items():
            shapes[name] = max(shapes.get(name, ()), value.shape[len(_leading(group)) :], key=len)
    for name, named in dims.items():
        if len(named) != len(shapes[name]):
            raise ValueError(
                f"site '{name}': dims gives {len(named)} names {list(named)} to {len(shapes[name])} dimensions "
                f"of shape {shapes[name]}."
            )
    return {name: tuple(dims.get(name, [f"{name}_dim_{i}" for i in range(len(shape))])) for name, shape in shapes.items()}


def _dataset(
    group: str, variables: dict[str, np.ndarray], names: Mapping[str, tuple[str, ...]], coords: Mapping[str, Sequence[Any]]
) -> Any:
    import xarray as xr

    leading, arrays = _leading(group), {}
    for name, value in variables.items():
        ndim = value.ndim - len(leading)
        dims = (*leading, *names[name][len(names[name]) - ndim :])  # the last ones, where plates are missing
        index = {dim: coords.get(dim, np.arange(size)) for dim, size in zip(dims, value.shape, strict=True)}
        arrays[name] = xr.DataArray(value, dims=dims, coords=index)
    return xr.Dataset(arrays)


def _sampler_statistics(kept: dict[str, dict[str, Any]]) -> Any:
    import xarray as xr

    sites = list(kept)
    statistics = sorted({key for values in kept.values() for key in values if key != "x"})
    columns = {key: ("energy_site", [float(np.mean(kept[site].get(key, np.nan))) for site in sites]) for key in statistics}
    return xr.Dataset(columns, coords={"energy_site": sites})


def _container(datasets: dict[str, Any]) -> Any:
    import arviz as az

    if "InferenceData" not in vars(az):  # ArviZ 1, where asking for the attribute warns
        import xarray as xr

        return xr.DataTree.from_dict(datasets)
    data = az.InferenceData(**{group: ds for group, ds in datasets.items() if group != "fit"})
    if "fit" in datasets:
        data.add_groups({"fit": datasets["fit"]}, warn_on_custom_groups=False)
    return data
