# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Fits, particles and chains as ArviZ data.

The negative chains of a latent site are samples of its learned prior, so they are the group ``prior``, with the chains that the
fit ran side by side as ArviZ's ``chain``: R-hat and ESS of that group say whether the chains mix. Particles are different. They
share the parameters that they move, so they count as the samples of one run: ArviZ's ``draw``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer import init_to_sample

from numpyro_ebm._fit import Fit, fit_of
from numpyro_ebm.chains import chains_of, positions
from numpyro_ebm.handlers import unnormalized
from numpyro_ebm.program.run import constrained, draw_latents, run_model, whole_plates
from numpyro_ebm.program.sites import Site, is_factor
from numpyro_ebm.weighted import is_weighted, resampled

__all__ = ["to_inference_data"]


def to_inference_data(
    state: Any,
    *,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    chains: Mapping[str, Array] | None = None,
    posterior: Mapping[str, Array] | None = None,
    posterior_predictive: Mapping[str, Array] | None = None,
    prior: Mapping[str, Array] | None = None,
    prior_predictive: Mapping[str, Array] | None = None,
    batch_ndims: int = 1,
    observed_data: Mapping[str, Array] | None = None,
    losses: Array | None = None,
    trace: Mapping[str, Array] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """ArviZ data of a fit by an engine of this package, or by ``SVI`` under :class:`~numpyro_ebm.negative_phase`.

    ========================  =========================================  ====================================================
    group                     dims of a variable                         what it holds
    ========================  =========================================  ====================================================
    ``posterior``             ``chain``, ``draw``, site dims             samples of the latents; particles of a run as draws
    ``posterior_predictive``  ``chain``, ``draw``, site dims             samples of the data
    ``prior``                 ``chain``, ``draw``, site dims             samples of the learned prior: the negative chains, or given
    ``prior_predictive``      ``chain``, ``draw``, site dims             samples of the data under the prior, as of a generator
    ``sample_stats_prior``    ``energy_site``                            ``num_updates``, the sampler's statistics (batch means)
    ``observed_data``         site dims                                  the data
    ``fit``                   ``step``, site dims                        ``loss`` and param sites at every step
    ========================  =========================================  ====================================================

    With ``model`` the dims of a site are called after its plates, as ``from_numpyro`` calls them, and the posterior of
    :class:`~numpyro_ebm.ParticleMMLE` and the observed data need not be given. Dims that neither a plate nor ``dims`` names are
    called ``<site>_dim_0``, ``<site>_dim_1`` and so on. The chains of a site in a plate lack the plate's dim: they have the
    site's last ones. Only groups with content are created.

    Particles share the parameters of their run, so they count as draws and not as chains. In a state of several runs, made by
    :func:`jax.vmap` over the engine, every run is a ``chain``.

    :param state: the result of a run or its state, by ``ParticleMMLE`` or ``SVI``, or a mutable state.
    :param model: the model, such as ``engine.model``.
    :param tuple model_args: its arguments.
    :param dict model_kwargs: its keyword arguments.
    :param chains: samples by site of :meth:`negative_phase.sample_chains <numpyro_ebm.negative_phase.sample_chains>`, of shape
        ``(num_chains, num_samples) + batch_shape + event_shape``; where the chains stand in ``state`` if not given.
    :param posterior: samples by site, of shape ``(num_samples,) + batch_shape + event_shape``; the particles of ``state`` if not
        given.
    :param posterior_predictive: samples by site, of the same form.
    :param prior: samples by site of latents under their learned prior, of the same form, where there are no negative chains.
    :param prior_predictive: samples by site of data under it, of the same form: what :meth:`BiDVL.sample
        <numpyro_ebm.BiDVL.sample>` returns.
    :param int batch_ndims: leading dims of these samples, as in ``Predictive``: 2 for samples of
        :func:`~numpyro_ebm.sample_posterior`, of shape ``(num_chains, num_samples) + batch_shape + event_shape``.
    :param observed_data: data by site; those of ``model`` if not given.
    :param losses: the loss at every step, of shape ``(num_steps,)``; those of ``state`` if it is a result.
    :param trace: param sites at every step, of shape ``(num_steps,) + shape``; those that ``state`` collected if it is a result
        of ``run(..., collect=engine.get_params)``.
    :param coords: coordinate values by dim.
    :param dims: names of the dims of a site, plates first, without ``chain`` and ``draw``.
    :return: an ``arviz.InferenceData`` (ArviZ 0) or an ``xarray.DataTree`` (ArviZ 1).
    :raises ValueError: if there is nothing to show; if ``chains`` or ``dims`` names an unknown site, or ``coords``
        an unknown dim; if a site has the name of a dim, or sites differ in the number of samples; if ``dims`` gives a site the
        wrong number of names; if ``model`` has no such site, or samples or ``observed_data`` are of another shape than theirs in
        it; without ``model``, if samples of ``posterior`` have more or fewer dims than the particles and ``batch_ndims``; if the
        particles are of other rows than the data.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import ParticleMMLE, to_inference_data
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("school", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> y = jnp.array([1.0, 5.0, 3.0])
        >>> engine = ParticleMMLE(model, optax.adam(0.1), num_particles=20, step_size=0.1)
        >>> result = engine.run(
        ...     jax.random.key(0), 100, y, collect=engine.get_params, progress_bar=False
        ... )
        >>> data = to_inference_data(
        ...     result, model=model, model_args=(y,), coords={"school": ["a", "b", "c"]}
        ... )
        >>> dict(data["posterior"]["x"].sizes)
        {'chain': 1, 'draw': 20, 'school': 3}
        >>> data["observed_data"]["y"].sel(school="b").item(), dict(data["fit"]["loc"].sizes)
        (5.0, {'step': 100})
    """
    if batch_ndims not in (1, 2):
        raise ValueError(f"batch_ndims must be 1, for draws, or 2, for chains of draws, got {batch_ndims!r}.")
    if chains is not None and not isinstance(chains, Mapping):
        raise TypeError("chains must map sites to draws: sample_chains returns (draws, mutable_state), pass the first.")
    fit = fit_of(state)
    kept = _negative_chains(fit)
    where_they_stand = {site: x[:, None] for site, x in positions(kept).items()}
    _require_known("chains", chains or {}, where_they_stand)
    seen = (
        _Seen()
        if model is None
        else _look(fit if posterior is None else fit._replace(particles=None), model, model_args, dict(model_kwargs or {}))
    )
    samples = {
        "posterior": posterior,
        "posterior_predictive": posterior_predictive,
        "prior": prior,
        "prior_predictive": prior_predictive,
    }
    if model is not None:
        for argument, given in {**samples, "observed_data": observed_data}.items():
            _require_sites(argument, given or {}, seen.sites)
        for argument, given in samples.items():
            _require_shapes(given or {}, batch_ndims, seen, may_lack_plates=argument.startswith("prior"))
        _require_data(observed_data or {}, seen)
    else:
        _require_samples(posterior or {}, batch_ndims, _shapes_of_particles(fit))
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": seen.posterior if posterior is None else _by_chain(posterior, batch_ndims),
        "posterior_predictive": _by_chain(posterior_predictive, batch_ndims),
        "prior": {**_as_numpy({**where_they_stand, **(chains or {})}), **_by_chain(prior, batch_ndims)},
        "prior_predictive": _by_chain(prior_predictive, batch_ndims),
        "observed_data": seen.observed_data if observed_data is None else _as_numpy(observed_data),
        "fit": _by_step(fit, losses, trace),
    }
    _require_something(fit, groups)
    leading: dict[str, tuple[str, ...]] = dict.fromkeys(groups, ("chain", "draw"))
    leading |= {"observed_data": (), "fit": ("chain", "step") if fit.is_many_runs else ("step",)}
    _require_known("dims", dims or {}, {name for group in groups.values() for name in group} - {"loss"})
    names = _dim_names(groups, leading, seen.dims, dims or {})
    dim_names = {dim for of_group in leading.values() for dim in of_group} | {dim for named in names.values() for dim in named}
    _require_known("coords", coords or {}, dim_names, "dim")
    datasets = {group: _dataset(leading[group], variables, names, coords or {}) for group, variables in groups.items() if variables}
    if kept:
        datasets["sample_stats_prior"] = _sampler_statistics(kept)
    return _container(datasets)


class _Seen(NamedTuple):
    """What the model tells of its sites."""

    posterior: dict[str, np.ndarray] = {}
    observed_data: dict[str, np.ndarray] = {}
    dims: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    num_plates: dict[str, int] = {}  # by site, how many of its first dims are plates
    sites: frozenset[str] = frozenset()  # params too


def _look(fit: Fit, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Seen:
    """One run of the model on all its data, at the parameters of the fit."""
    model = unnormalized(model)  # whose chains are in the state
    key, data = jax.random.key(0), fit.data
    of_one = jax.tree.map(lambda x: x[0], data) if fit.is_many_runs else data
    with whole_plates():
        latents = draw_latents(model, args, kwargs, key, data=of_one, init_strategy=init_to_sample)
        sites = run_model(model, args, kwargs, key, data=of_one, latents=latents).sites
    posterior = {}
    if fit.particles is not None:
        cloud = jax.vmap(lambda data, x: constrained(model, args, kwargs, key, data=data, latents=x), (None, 0))
        cloud = jax.jit(jax.vmap(cloud) if fit.is_many_runs else cloud)
        posterior = _by_chain(cloud(data, fit.particles), 2 if fit.is_many_runs else 1)
    named = {name: _site_dims(site) for name, site in sites.items() if site["type"] in ("sample", "deterministic")}
    data_sites = [name for name, site in sites.items() if site["type"] == "sample" and site["is_observed"]]
    observed = {name: np.asarray(sites[name]["value"]) for name in data_sites if not is_factor(sites[name]["fn"])}
    shapes = {name: np.shape(sites[name]["value"]) for name in named}
    num_plates = {name: _num_plates(sites[name], dims) for name, dims in named.items()}
    known = frozenset(name for name, site in sites.items() if site["type"] in ("sample", "deterministic", "param"))
    return _Seen(posterior, observed, named, shapes, num_plates, known)


def _site_dims(site: Site) -> tuple[str, ...]:
    """The names of a site's dims: its plates where they stand, the site's ``infer={"event_dims": [...]}``, or numbers."""
    shape = np.shape(site["value"])
    names = [f"{site['name']}_dim_{i}" for i in range(len(shape))]
    named_events = list(site.get("infer", {}).get("event_dims", []))
    # the events of a deterministic site are what is right of its plates
    event_dims = [site["fn"].event_dim] if site["type"] == "sample" else range(len(shape))
    frames = {frame.dim: frame for frame in site["cond_indep_stack"]}
    for event_dim in event_dims:
        axes = {dim - event_dim + len(shape): frame for dim, frame in frames.items()}
        if all(axis >= 0 and shape[axis] == frame.size for axis, frame in axes.items()):
            for axis, frame in axes.items():
                names[axis] = frame.name
            if event_dim and event_dim == len(named_events):
                names[-event_dim:] = named_events
            break
    return tuple(names)


def _num_plates(site: Site, dims: tuple[str, ...]) -> int:
    plates = {frame.name for frame in site["cond_indep_stack"]}
    return next((i for i, dim in enumerate(dims) if dim not in plates), len(dims))


def _negative_chains(fit: Fit) -> dict[str, dict[str, Any]]:
    """What mutable sites keep of negative chains, by site; chains of several runs side by side."""
    kept = {site: dict(jax.device_get(chains)) for site, chains in chains_of(fit.mutable_state or {}).items()}
    if fit.is_many_runs:
        for values in kept.values():
            if is_weighted(values):
                values["x"] = jax.vmap(resampled)({name: values[name] for name in ("x", "log_weight")})
                del values["log_weight"]
            values["x"] = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values["x"])
    return kept


def _by_step(fit: Fit, losses: Array | None, trace: Mapping[str, Array] | None) -> dict[str, np.ndarray]:
    """The loss and param sites at every step."""
    losses = fit.losses if losses is None else losses
    if trace is None:
        trace = fit.collected if isinstance(fit.collected, Mapping) and set(fit.collected) <= set(fit.params or {}) else {}
        trace = {name: value for name, value in trace.items() if isinstance(value, (np.ndarray, Array))}
    if losses is not None and "loss" in trace:
        raise ValueError("param 'loss' has the name that the losses have in the group 'fit': pass trace= without it, or rename it.")
    return _as_numpy({**({} if losses is None else {"loss": losses}), **trace})


def _require_something(fit: Fit, groups: dict[str, dict[str, np.ndarray]]) -> None:
    if fit.particles is not None and not groups["posterior"]:
        raise ValueError(
            "the particles in the state are unconstrained: pass model=engine.model and model_args=(its arguments), or "
            "posterior=engine.get_particles(state, ...)."
        )
    if not any(variables for group, variables in groups.items() if group != "fit"):
        raise ValueError(
            "the state holds no negative chains: pass the result of SVI on negative_phase(model) or of ParticleMMLE, or draws as "
            "posterior=."
        )


def _require_known(argument: str, named: Mapping[str, Any], known: Any, kind: str = "site") -> None:
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(f"{argument} names {unknown}, which is no {kind} here: the {kind}s are {sorted(known)}.")


def _as_numpy(variables: Mapping[str, Array] | None) -> dict[str, np.ndarray]:
    if keys := [
        name for name, x in (variables or {}).items() if isinstance(x, Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]:
        raise TypeError(f"site '{keys[0]}' holds random keys, which are no data: leave it out, or give jax.random.key_data of it.")
    return {name: np.asarray(value) for name, value in (variables or {}).items()}


def _by_chain(variables: Mapping[str, Array] | None, batch_ndims: int) -> dict[str, np.ndarray]:
    values = _as_numpy(variables)
    for name, value in values.items():
        if value.ndim < batch_ndims:
            wanted = "(num_samples,)" if batch_ndims == 1 else "(num_chains, num_samples)"
            raise ValueError(
                f"site '{name}': samples of shape {value.shape}, with batch_ndims={batch_ndims} they must be of shape "
                f"{wanted} + its own."
            )
    return {name: value[None] if batch_ndims == 1 else value for name, value in values.items()}


def _shapes_of_particles(fit: Fit) -> dict[str, tuple[int, ...]]:
    """What is known of the shapes of latents without the model: those of their unconstrained values."""
    leading = 2 if fit.is_many_runs else 1
    return {name: np.shape(x)[leading:] for name, x in (fit.particles or {}).items()}


def _require_samples(posterior: Mapping[str, Array], batch_ndims: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses samples that have more or fewer dims in front of those of their site than they are said to have."""
    for name, value in posterior.items():
        given, shape = np.shape(value), shapes.get(name)
        if shape is None or len(given) == batch_ndims + len(shape):
            continue
        raise _of_other_shape(name, given, batch_ndims, shape)


def _require_sites(argument: str, named: Mapping[str, Any], sites: frozenset[str]) -> None:
    if unknown := sorted(set(named) - sites):
        raise ValueError(
            f"{argument} has sites {unknown} that the model does not have: its own are {sorted(sites)}. Pass the model that they "
            "are of, or leave out what is the guide's alone."
        )


def _require_shapes(samples: Mapping[str, Array], batch_ndims: int, seen: _Seen, *, may_lack_plates: bool) -> None:
    """Refuses samples that are not of the shape that their site has in the model, behind their own dims.

    :param may_lack_plates: whether they may be of one row, as negative chains are and what a generator gives. One sample of all
        rows, which looks as samples of one row do, is refused.
    """
    for name, value in samples.items():
        given, shape = np.shape(value), seen.shapes.get(name)
        if shape is None:
            continue
        num_lacking = seen.num_plates[name] if may_lack_plates else 0
        if given[batch_ndims:] in [shape[i:] for i in range(num_lacking + 1)] and len(given) >= batch_ndims and given != shape:
            continue
        raise _of_other_shape(name, given, batch_ndims, shape)


def _require_data(observed_data: Mapping[str, Array], seen: _Seen) -> None:
    """Refuses data of other rows than the model's."""
    for name, value in observed_data.items():
        given, shape = np.shape(value), seen.shapes.get(name)
        if shape is not None and given != shape:
            raise ValueError(
                f"site '{name}': observed_data are of shape {given}, and the site has {shape} in the model with these model_args: "
                "pass the data of the fit in both, or leave observed_data out."
            )


def _of_other_shape(name: str, given: tuple[int, ...], batch_ndims: int, shape: tuple[int, ...]) -> ValueError:
    wanted = "(num_samples,)" if batch_ndims == 1 else "(num_chains, num_samples)"
    other, own = 3 - batch_ndims, given[len(given) - len(shape) :]
    if given == shape:
        fix = f"x[{', '.join(['None'] * batch_ndims)}] is one sample x; x[None] with batch_ndims=2 are samples x of one row"
    elif len(given) == other + len(shape):
        fix = f"pass batch_ndims={other}"
    elif len(given) == batch_ndims + len(shape) and sorted(own) == sorted(shape):
        fix = "transpose its dims"
    else:
        fix = "pass samples of all of it"
    return ValueError(
        f"site '{name}': samples of shape {given}, with batch_ndims={batch_ndims} they must be of shape {wanted} + {shape}, "
        f"which the site has in the model: {fix}."
    )


def _dim_names(
    groups: dict[str, dict[str, np.ndarray]],
    leading: dict[str, tuple[str, ...]],
    seen: Mapping[str, tuple[str, ...]],
    dims: Mapping[str, Sequence[str]],
) -> dict[str, tuple[str, ...]]:
    """The names of a site's dims. The chains of a site lack its plates, so the group that has most dims counts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group, variables in groups.items():
        for name, value in variables.items():
            shapes[name] = max(shapes.get(name, ()), value.shape[len(leading[group]) :], key=len)
    for name, named in dims.items():
        if len(named) != len(shapes[name]):
            raise ValueError(
                f"site '{name}': dims gives {len(named)} names {list(named)} to {len(shapes[name])} dimensions "
                f"of shape {shapes[name]}."
            )

    def of_site(name: str, ndim: int) -> tuple[str, ...]:
        if name in dims:
            return tuple(dims[name])
        known = seen.get(name, ())
        return known[len(known) - ndim :] if len(known) >= ndim else tuple(f"{name}_dim_{i}" for i in range(ndim))

    return {name: of_site(name, len(shape)) for name, shape in shapes.items()}


def _dataset(
    leading: tuple[str, ...],
    variables: dict[str, np.ndarray],
    names: Mapping[str, tuple[str, ...]],
    coords: Mapping[str, Sequence[Any]],
) -> Any:
    import xarray as xr

    arrays: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, value in variables.items():
        ndim = value.ndim - len(leading)
        dims = (*leading, *names[name][len(names[name]) - ndim :])  # the last ones, where plates are missing
        if name in dims or len(set(dims)) < len(dims):
            raise ValueError(
                f"site '{name}' of dims {dims}: a name cannot be that of a site and of a dim, or of two dims. Rename the site, "
                "as by numpyro.handlers.scope, or name its dims by dims=."
            )
        for dim, size in zip(dims, value.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"site '{name}' has {size} elements along '{dim}', and another site {sizes[dim]}: they must be of one run."
                )
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
