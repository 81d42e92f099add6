# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is to be known of one site of a model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, MaskedDistribution, Unit, biject_to, constraints
from numpyro.infer.util import helpful_support_errors

from numpyro_ebm._compat import layers, mask_of

Model = Callable[..., Any]
Site = dict[str, Any]

FIELD = "random_field"  # the site that the chains and the normalizer of coupled flat sites are named after
_NORMALIZER = "/log_normalizer"


def is_latent(site: Site) -> bool:
    """Whether a site is a sample site without data."""
    return site["type"] == "sample" and not site["is_observed"]


def normalizer_name(site: str) -> str:
    """The factor that adds the log normalizer of a site's distribution."""
    return site + _NORMALIZER


def is_normalizer(name: str) -> bool:
    """Whether a site is such a factor."""
    return name.endswith(_NORMALIZER)


def transform_of(site: Site) -> Any:
    """The transform from an unconstrained array to a latent site; an error that names the site if there is none."""
    with helpful_support_errors(site):
        return biject_to(site["fn"].support)


def kind_of(fn: Distribution) -> str:
    """The name of a site's distribution, under what plates and masks wrap around it."""
    return type(core_of(fn)).__name__


def core_of(fn: Distribution) -> Any:
    """A site's distribution, under what plates, masks and users wrapped around it."""
    *_, core = layers(fn)
    return core


def is_masked(fn: Distribution) -> bool:
    """Whether some of a site's elements have no density."""
    return any(isinstance(part, MaskedDistribution) and mask_of(part) is not True for part in layers(fn))


def is_factor(fn: Distribution) -> bool:
    """Whether a site is a :func:`numpyro.factor`."""
    return isinstance(core_of(fn), Unit)


def stand_in(fn: Distribution, sample_shape: tuple[int, ...] = ()) -> Array:
    """A value of a site where its draw is not wanted, or there is none: 0, or what of the support is near."""
    return fn.support.feasible_like(jnp.zeros(fn.shape(sample_shape)))


def is_unbounded(support: Any) -> bool:
    """Whether every real array is in a support."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return type(support) is type(constraints.real)


def is_without_end(support: Any) -> bool:
    """Whether a support is all real arrays, or those on one side of a bound."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    half_lines = constraints.positive, constraints.nonnegative, constraints.softplus_positive
    kinds = {type(constraint) for constraint in half_lines} | {constraints.greater_than, constraints.less_than}
    return type(support) in kinds | {type(constraints.real)}


def finite_events(site: Site, xp: Any = jnp) -> Any:
    """Whether each event of an observed site is finite or masked.

    :param xp: :mod:`numpy` for an answer that is known while a program is traced.
    """
    return _of_events(site, xp.isfinite(xp.asarray(site["value"])), xp)


def events_inside(site: Site, xp: Any = jnp) -> Any:
    """Whether each event of an observed site lies in the support of its distribution, or is masked.

    It is taken to where bounds are arrays of JAX, which may have been computed from a latent: :func:`has_density` tells; and where
    the distribution was made with ``validate_args=False``, by which a user says that other values are meant. So it is on a boundary
    that a support leaves out, where rounded data may lie, unless NumPyro validates them: it takes their density for 0.
    """
    support, value = site["fn"].support, xp.asarray(site["value"])
    if any(isinstance(bound, Array) for bound in jax.tree.leaves(support)) or any(
        vars(part).get("_validate_args") is False for part in layers(site["fn"])
    ):
        return xp.ones(value.shape[: value.ndim - site["fn"].event_dim], bool)
    is_validated = any(part._validate_args for part in layers(site["fn"]))
    return _of_events(site, xp.asarray(support(value)) if is_validated else _inside_or_beside(support, value, xp), xp)


def _inside_or_beside(support: Any, value: Any, xp: Any) -> Any:
    """Whether values lie in a support, or less than a rounding beside it, as those on its boundary do."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    inside = xp.asarray(support(value))
    if support.is_discrete or support.event_dim or xp.iscomplexobj(value):
        return inside
    value = value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)
    info = jnp.finfo(value.dtype)
    step = abs(value) * info.eps + info.tiny  # less than tiny counts as 0 on most devices
    return inside | xp.asarray(support(value - step)) | xp.asarray(support(value + step))


def has_density(site: Site) -> Array:
    """Whether the log density of every event of a site is finite, those that are masked left out."""
    return jnp.isfinite(site["fn"].log_prob(site["value"]))


def are_possible(observed: Mapping[str, Site]) -> Array:
    """Whether a model has a log density at all its data, which are finite and inside the supports; traced."""
    good = [f(site).all() for site in observed.values() for f in (finite_events, events_inside, has_density)]
    return jnp.asarray(good).all()


class NoDensityError(ValueError):
    """A model has no log density at its data: ``what`` says where."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what} {fix}".rstrip())
        self.what = what


def require_possible(observed: Mapping[str, Site], fix: str = "") -> None:
    """Refuses data at which a model has no log density; for values that are known.

    :param str fix: what else to do about a density that is not finite.
    :raises ValueError: naming the site; :class:`NoDensityError` if the data themselves are good.
    """
    for site in observed.values():
        require_data(site)
    for site in observed.values():
        _require_density(site, fix)


def _of_events(site: Site, good: Any, xp: Any) -> Any:
    """What holds of every element of the events, or of each whole, of the events that are not masked."""
    num_dims = np.ndim(site["value"]) - site["fn"].event_dim
    good, mask = good.all(tuple(range(num_dims, good.ndim))), mask_of(site["fn"])
    return good if mask is None else good | ~xp.asarray(mask)


def require_data(site: Site) -> None:
    """Refuses data whose shape does not fit a site, integers where an energy is of real numbers, and data that are NaN, infinite or
    outside the support, and not masked; of the values it says nothing while they are traced.

    :raises ValueError: naming the site.
    """
    _require_kind(site)
    if isinstance(site["value"], jax.core.Tracer) or isinstance(mask_of(site["fn"]), jax.core.Tracer):
        return
    finite = finite_events(site, np)
    if not finite.all():
        raise ValueError(
            f"site '{site['name']}': {int((~finite).sum())} of {finite.size} observed events are NaN or infinite. "
            "Remove them, or mask them out with numpyro.handlers.mask."
        )
    inside = events_inside(site, np)
    if not inside.all():
        on_boundary = _of_events(site, _inside_or_beside(site["fn"].support, np.asarray(site["value"]), np), np).all()
        where = (
            "They lie on its boundary, where NumPyro's validation takes the density for 0: where it is finite, make the "
            "distribution with validate_args=False. Else convert"
            if on_boundary
            else "Convert"
        )
        raise ValueError(
            f"site '{site['name']}': {int((~inside).sum())} of {inside.size} observed events are outside the support of "
            f"{kind_of(site['fn'])}, {site['fn'].support}: {_values(site, inside)}. {where} the data, or mask these out with "
            "numpyro.handlers.mask."
        )


def require_events(site: Site, *, enumerated: bool = False) -> None:
    """Refuses data that are not one event for every element of their site, which NumPyro would broadcast, with a warning at most.

    :param enumerated: whether dimensions to the left of all plates may be those of an enumerated latent.
    :raises TypeError: for complex data of a site of real events.
    """
    name, fn, shape = site["name"], site["fn"], jnp.shape(site["value"])
    if jnp.iscomplexobj(site["value"]) and not isinstance(fn.support, type(constraints.complex)):
        raise TypeError(
            f"site '{name}': its data are complex, of {jnp.result_type(site['value'])}, and {kind_of(fn)} has real events."
        )
    num_dims = len(shape) - fn.event_dim
    batch, events = shape[: max(num_dims, 0)], shape[max(num_dims, 0) :]
    if events != fn.event_shape:
        raise ValueError(
            f"site '{name}': its data are of shape {shape}, and {kind_of(fn)} has events of shape {fn.event_shape} in a batch of "
            f"{fn.batch_shape}: the last dimensions of data must be those of an event."
        )
    try:
        whole = jnp.broadcast_shapes(batch, fn.batch_shape)
    except ValueError:
        whole = ()
    for frame in site["cond_indep_stack"]:
        if len(batch) < -frame.dim and events and events[0] == frame.size:
            raise ValueError(
                f"site '{name}': {kind_of(fn)} has events of shape {fn.event_shape}, and the data, of shape {shape}, are one, "
                f"which plate '{frame.name}' of {frame.size} repeats for each of its rows. What belongs to one row is an event: "
                f"give the distribution, or the base of an energy, .to_event({fn.event_dim - 1}); or leave the plate out."
            )
    lacking = fn.batch_shape[: len(fn.batch_shape) - len(batch)]
    in_plates = {frame.dim + len(fn.batch_shape) for frame in site["cond_indep_stack"]}
    if not enumerated and batch and in_plates and any(size > 1 and dim not in in_plates for dim, size in enumerate(lacking)):
        raise ValueError(
            f"site '{name}': {kind_of(fn)} has a batch of {fn.batch_shape}, and the data, of shape {shape}, lack its first "
            f"{len(lacking)} dimensions, for which there is no plate: they would be compared with each element there. Is a latent "
            "that it depends on larger than meant, its base with too large an .to_event(n)?"
        )
    if whole == fn.batch_shape or (whole == batch and not site["cond_indep_stack"]):
        return
    for frame in site["cond_indep_stack"] if len(batch) == len(fn.batch_shape) else ():
        if (given := batch[frame.dim]) not in (1, frame.size):
            raise ValueError(
                f"site '{name}': plate '{frame.name}' is of {frame.size} and the data have {given} rows (they are of shape "
                f"{shape}). Give the plate the size of the data, as numpyro.plate('{frame.name}', len(y)); where it is "
                f"subsampled, take the rows of the batch by numpyro.subsample(y, event_dim={fn.event_dim})."
            )
    plates = ", ".join(f"'{frame.name}' of {frame.size}" for frame in site["cond_indep_stack"])
    raise ValueError(
        f"site '{name}': its data are of shape {shape}, and {kind_of(fn)} has a batch of {fn.batch_shape}"
        f"{f' in plate {plates}' if plates else ''}: every event would be compared with all others. Reshape the data, as by "
        "y[:, 0] for a table of one column; or write .to_event(n) for what belongs to one event, and a plate for each "
        "dimension that does not."
    )


def _require_kind(site: Site) -> None:
    """Refuses data by their shape and dtype."""
    fn, value = site["fn"], site["value"]
    num_dims = np.ndim(value) - fn.event_dim
    try:
        np.broadcast_shapes(np.shape(value)[:num_dims], fn.batch_shape)
    except ValueError:
        raise ValueError(
            f"site '{site['name']}': data of shape {np.shape(value)} do not fit {kind_of(fn)} of batch_shape {fn.batch_shape} and "
            f"event_shape {fn.event_shape}. Dimensions that belong to one event are no batch: give a base .to_event(...), and an "
            "EnergyDistribution its event_shape."
        ) from None
    is_energy = any(hasattr(part, "is_normalized") and not part.is_normalized for part in layers(fn))
    if is_energy and is_unbounded(fn.support) and hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.inexact):
        raise ValueError(
            f"site '{site['name']}': its data are {value.dtype}, and {kind_of(fn)} is of real numbers, over which it would be "
            "normalized. Give it the support of the data, as support=constraints.boolean, and a sampler for that; or convert data "
            "that are real numbers to float."
        )


def _require_density(site: Site, fix: str) -> None:
    log_density = np.asarray(site["fn"].log_prob(site["value"]))
    bad = log_density[~np.isfinite(log_density)]
    if bad.size:
        raise NoDensityError(
            f"site '{site['name']}': its log density is {bad[0]} at {bad.size} of {log_density.size} observed events: the model "
            "makes them impossible, or overflows there. Look at its energy at these values, or scale the data.",
            fix,
        )


def _values(site: Site, inside: np.ndarray) -> str:
    """The first of the values outside."""
    value = np.asarray(site["value"])
    if site["fn"].event_dim == 0:
        return (
            f"the first is {value[~inside].flat[0]}" if value.shape == inside.shape else f"such as {value.min()} or {value.max()}"
        )
    outside = value[~inside] if value.shape[: inside.ndim] == inside.shape else value
    return f"their values reach from {outside.min()} to {outside.max()}"
