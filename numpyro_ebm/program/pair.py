# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a guide and a model belong together: the same latents, of the same shapes and supports, and params of their own."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import (
    Delta,
    Distribution,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    RelaxedBernoulliLogits,
    TransformedDistribution,
    constraints,
)
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IdentityTransform,
    IndependentTransform,
    PermuteTransform,
    Transform,
)

from numpyro_ebm._compat import is_auxiliary, layers
from numpyro_ebm.distributions.relaxed import GumbelBernoulli
from numpyro_ebm.program.rows import dim_of
from numpyro_ebm.program.run import Run
from numpyro_ebm.program.sites import Site, core_of, is_factor

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
    if not _is_true_or_traced(same_support(site["fn"], guide.sites[name]["fn"])):
        of_model, of_guide = site["fn"], guide.sites[name]["fn"]
        raise ValueError(
            f"site '{name}': the {model} draws it from {_kind(of_model)} with the support {_support(of_model)}, and the {other} "
            f"from {_kind(of_guide)} with {_support(of_guide)}. They must be the same: where one of the densities is 0 the "
            f"formula of the other means nothing. {_fix(of_model, other)}"
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
    if seen := [name for name, site in guide.observed.items() if not is_factor(site["fn"])]:
        raise ValueError(
            f"site '{seen[0]}': the {names[1]} observes it, and its density would count as that of latents. Take it out: data "
            f"belong to the {names[0]}."
        )
    for name in guide.latents:
        if name not in model.latents and not is_auxiliary(guide.sites[name]):
            raise ValueError(
                f"site '{name}': the {names[1]} samples it and the {names[0]}, which samples {sorted(model.latents)}, does not. "
                f"Take it out: the {names[1]} must sample the latents of the {names[0]} and nothing else."
            )


def same_supports(model: Run, guide: Run) -> Array:
    """Whether all latents of both have the same support, as far as that can be told; traced where bounds are."""
    names = model.latents.keys() & guide.latents.keys()
    return jnp.asarray([same_support(model.sites[name]["fn"], guide.sites[name]["fn"]) for name in sorted(names)]).all()


def same_support(model: Distribution, guide: Distribution) -> Any:
    """Whether a guide draws a latent on the support that it has in the model: a bool, or an array where bounds are traced.

    Bits may be relaxed. A point, of which a guide may make what it drew at once, lies anywhere, and of supports that are a user's
    own nothing is known, nor of what a transform makes of less than its domain.
    """
    if isinstance(core_of(guide), Delta):
        return True
    is_relaxed = any(isinstance(part, GumbelBernoulli | RelaxedBernoulliLogits) for part in layers(guide))
    if is_relaxed and _as_set(model.support) == ("integers", (0, 1)):
        return True
    of_model, of_guide = _as_set(_support(model)), _as_set(_support(guide))
    return of_model is None or of_guide is None or _same(of_model, of_guide)


def _support(fn: Distribution) -> Any:
    """Where a distribution draws, which NumPyro says of transforms as if they were of their whole domain; None if not known."""
    part = next(part for part in layers(fn) if not isinstance(part, _AROUND))
    if getattr(type(part), "support", None) is not TransformedDistribution.support:
        return fn.support
    support = _support(part.base_dist)
    for transform in _flat(part.transforms):
        support = _image(support, transform)
    return support


def _flat(transforms: Iterable[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flat(transform.parts)
        elif isinstance(transform, IndependentTransform):
            yield from _flat([transform.base_transform])
        else:
            yield transform


def _image(support: Any, transform: Transform) -> Any:
    """What a transform makes of a support; None if not known."""
    of_input = _as_set(support)
    if of_input is None:
        return None
    if isinstance(transform, IdentityTransform):
        return support
    kind, bounds = of_input
    if isinstance(transform, AffineTransform):
        return _affine(transform, *bounds) if kind == "reals" else None
    if isinstance(transform, PermuteTransform):
        is_symmetric = kind in _SYMMETRIC or (kind == "reals" and all(np.ndim(bound) == 0 for bound in bounds))
        return support if is_symmetric else None
    if isinstance(transform, ExpTransform) and kind is type(constraints.ordered_vector):
        return constraints.positive_ordered_vector
    domain = _as_set(transform.domain)
    return transform.codomain if domain is not None and _same(domain, of_input) is True else None


_SYMMETRIC = [type(constraints.simplex), type(constraints.l1_ball), type(constraints.sphere), constraints.zero_sum]


def _affine(transform: AffineTransform, lower: Any, upper: Any) -> Any:
    """The interval that an affine transform makes of one, either of which may be without an end."""
    if isinstance(lower, float) and isinstance(upper, float) and (lower, upper) == (-math.inf, math.inf):
        return constraints.real
    numbers = transform.loc, transform.scale, lower, upper
    is_traced = any(isinstance(x, jax.core.Tracer) for x in numbers)
    xp: Any = jnp if is_traced else np  # JAX would trace what is known
    loc, scale, lower, upper = map(xp.asarray, numbers)
    ends = loc + scale * lower, loc + scale * upper
    return constraints.interval(xp.where(scale > 0, *ends), xp.where(scale > 0, *ends[::-1]))


_AROUND = (ExpandedDistribution, Independent, MaskedDistribution)
_Set = tuple[Any, tuple[Any, ...]]  # of one element of an event, or of the whole: its kind, and its bounds


def _as_set(support: Any) -> _Set | None:
    """What two supports that are the same have in common, up to their boundaries; None of one that is not NumPyro's."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if type(support).__module__ != constraints.__name__:
        return None
    if isinstance(support, type(constraints.boolean)):
        return "integers", (0, 1)
    if isinstance(support, type(constraints.real)):
        return "reals", (-math.inf, math.inf)
    for kind, of, lower, upper in _BOUNDED:
        if isinstance(support, of):
            return kind, (getattr(support, lower, -math.inf), getattr(support, upper, math.inf))
    for of in _ALIKE:
        if isinstance(support, of):
            return of[0], ()
    return type(support), tuple(jax.tree.leaves(support))


_BOUNDED = [
    ("reals", constraints.interval, "lower_bound", "upper_bound"),
    ("reals", constraints.greater_than, "lower_bound", ""),
    ("reals", constraints.less_than, "", "upper_bound"),
    ("integers", constraints.integer_interval, "lower_bound", "upper_bound"),
    ("integers", constraints.integer_greater_than, "lower_bound", ""),
]


_ALIKE = [  # by other transforms, or with their boundary
    (type(constraints.lower_cholesky),),
    (type(constraints.positive_definite), type(constraints.positive_semidefinite)),
]


def _same(a: _Set, b: _Set) -> Any:
    if a[0] != b[0] or len(a[1]) != len(b[1]):
        return False
    pairs = list(zip(a[1], b[1], strict=True))
    is_traced = [any(isinstance(bound, jax.core.Tracer) for bound in pair) for pair in pairs]
    if not all(np.allclose(*pair, rtol=1e-4) for pair, traced in zip(pairs, is_traced, strict=True) if not traced):
        return False
    traced = [jnp.isclose(*pair, rtol=1e-4).all() for pair, traced in zip(pairs, is_traced, strict=True) if traced]
    return jnp.asarray(traced).all() if traced else True


def _is_true_or_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer) or bool(x)


def _kind(fn: Distribution) -> str:
    """What a user called the distribution of a site: of a LogNormal, not that it is transformed from a Normal."""
    return type(next(part for part in layers(fn) if not isinstance(part, _AROUND))).__name__


def _fix(model: Distribution, guide: str) -> str:
    support = model.support
    of_model = _as_set(_support(model))
    if of_model is not None and _same(of_model, _as_set(support) or (None, ())) is False:
        return f"Give the transform of {_kind(model)} its domain=, as NumPyro takes its support for {support}."
    if _as_set(support) == ("integers", (0, 1)):
        return f"Draw bits in the {guide} relaxed, with GumbelBernoulli."
    if support.is_discrete:
        return f"Sum the latent out, or draw it in the {guide} from {_kind(model)}."
    return (
        f"Give the {guide} a distribution with that of {_kind(model)}: any other becomes one by "
        "dist.TransformedDistribution(dist.Normal(...), dist.biject_to(support))."
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
