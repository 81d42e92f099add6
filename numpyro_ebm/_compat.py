# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the package needs of NumPyro that NumPyro does not offer as an API.

NumPyro tells a distribution neither the name of its site nor what it is part of, and a handler neither what runs it nor
which scopes and plates are open. The former are in the local variables of the calling frames while a model is traced, the
latter on NumPyro's stack of handlers. They are read here to name sites and to refuse what would be silently wrong: never
to compute anything.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import block, replay, scope, substitute
from numpyro.infer import AIES, ESS, MCMC, SA, SVI, DiscreteHMCGibbs, MixedHMC
from numpyro.infer.autoguide import AutoGuide, AutoSemiDAIS
from numpyro.infer.elbo import ELBO
from numpyro.infer.importance import _psis_khat
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import _PYRO_STACK, Messenger, plate

Handler = TypeVar("Handler", bound=Messenger)

PLACES = "numpyro_ebm.places"
"""Where the message of a plate says at which places of a store the rows are that it shows, if not at their own."""

one_at_a_time = threading.RLock()
"""Who runs a model holds it: NumPyro's stack of handlers is one for all threads."""

# They move latents, or some of them, by ratios of densities alone
_COMPARING = (SA, AIES, ESS, DiscreteHMCGibbs, MixedHMC)

WRAPPERS = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution, dist.TransformedDistribution)


def pareto_k(log_weights: np.ndarray) -> float:
    """What :func:`numpyro.infer.psis_diagnostic` finds in the log weights of samples, ``(num_samples,)``."""
    return float(_psis_khat(log_weights))


def calling_site(fn: dist.Distribution) -> str | None:
    """The name of the sample site at which ``fn`` stands, if it is being sampled or its ``log_prob`` computed there."""
    for site in _locals_called("site", "msg"):
        if isinstance(site, dict) and "name" in site and any(fn is part for part in layers(site.get("fn"))):
            return site["name"]
    return None


@contextmanager
def sites_named() -> Iterator[None]:
    """Names the sample site, the plate and the fix in place of NumPyro's errors of shapes, which name none.

    :raises ValueError: for a distribution whose batch does not fit a plate around it.
    """
    try:
        yield
    except ValueError as error:
        if (found := _failing_site(error)) is None:
            raise
        name, fn, plate = found
        raise ValueError(
            f"site '{name}': {type(fn).__name__} has batch_shape {fn.batch_shape} and event_shape {fn.event_shape}, which does not "
            f"fit plate '{plate.name}' of {plate.subsample_size} around it. Dimensions that belong to one event are no batch: give "
            f"the distribution, or the base of an energy, .to_event(n), and an EnergyDistribution its event_shape."
        ) from error


def _failing_site(error: BaseException) -> tuple[str, dist.Distribution, numpyro.plate] | None:
    """The name and the distribution of the sample site that raised an error of shapes, and the plate that it does not fit."""
    if "Incompatible shapes for broadcasting" not in str(error):
        return None
    site, plate, frame = None, None, error.__traceback__
    while frame is not None:
        seen = frame.tb_frame.f_locals
        if frame.tb_frame.f_code is numpyro.sample.__code__:
            site = seen["name"], seen["fn"]
        if frame.tb_frame.f_code is numpyro.plate.process_message.__code__:
            plate = seen["self"]
        frame = frame.tb_next
    if site is None or plate is None or not isinstance(site[1], dist.Distribution) or not site[1].batch_shape:
        return None
    return *site, plate


def calling_objective() -> ELBO | None:
    """The objective of the SVI that is tracing the model right now, if there is one."""
    for self in _locals_called("self"):
        if isinstance(self, (ELBO, SVI)):
            return self.loss if isinstance(self, SVI) else self
    return None


def guide_lacks(latent: dict[str, Any]) -> bool:
    """Whether SVI is running the model on samples of a guide that has none of this latent, and nothing else gives it a value.

    One that a block hides is the user's own noise: its density is not counted.
    """
    guide, name = open_handler(replay), latent["name"]
    if latent.get("stop") or guide is None or guide.trace is None or name in guide.trace or calling_objective() is None:
        return False
    given = (handler for handler in _PYRO_STACK if isinstance(handler, substitute))
    is_given = any(name in (handler.data or ()) or handler.substitute_fn is not None for handler in given)
    return not is_given and "enumerate" not in latent["infer"]


def called_by_mcmc() -> bool:
    """Whether a NumPyro kernel is tracing the model right now."""
    return any(isinstance(self, (MCMC, MCMCKernel)) for self in _locals_called("self"))


def comparing_kernel() -> str | None:
    """The kind of the NumPyro kernel that is tracing the model right now, if it compares densities without their gradient."""
    kernels = (self.sampler if isinstance(self, MCMC) else self for self in _locals_called("self"))
    return next((type(kernel).__name__ for kernel in kernels if isinstance(kernel, _COMPARING)), None)


def calling_local_model() -> Any:
    """The model that an ``AutoSemiDAIS`` runs inside a loop, if one is being run right now."""
    return next((self.local_model for self in _locals_called("self") if isinstance(self, AutoSemiDAIS)), None)


def calling_distribution(transparent: tuple[type, ...]) -> dist.Distribution | None:
    """A distribution that is computing its own density from this one's, other than by the ``transparent`` types."""
    for self in _locals_called("self"):
        if isinstance(self, dist.Distribution) and not isinstance(self, (*WRAPPERS, *transparent)):
            return self
    return None


def in_subsampled_plate(batch_shape: tuple[int, ...]) -> str | None:
    """The subsampling plate, of those open now, along which a batch shape has elements of its own."""
    subsampled = [handler for handler in _PYRO_STACK if isinstance(handler, plate) and handler.subsample_size < handler.size]
    for handler in subsampled:
        if len(batch_shape) >= -handler.dim and batch_shape[handler.dim] > 1:
            return handler.name
    return None


def open_plate(name: str | None) -> plate | None:
    """The plate of a name, if it is open now."""
    return next((handler for handler in reversed(_PYRO_STACK) if isinstance(handler, plate) and handler.name == name), None)


def open_handler(kind: type[Handler]) -> Handler | None:
    """The innermost handler of a kind, of those open now."""
    return next((handler for handler in reversed(_PYRO_STACK) if isinstance(handler, kind)), None)


def name_inside(handler: Messenger, name: str) -> str:
    """A site's name without the prefixes of the scopes inside ``handler``, which a site made there will be given again."""
    for inner in _PYRO_STACK[_PYRO_STACK.index(handler) + 1 :]:
        if isinstance(inner, scope):
            name = name.removeprefix(f"{inner.prefix}{inner.divider}")
    return name


def handlers_of(fn: Any) -> list[Messenger]:
    """The handlers around a model, outermost first."""
    found = []
    while isinstance(fn, Messenger):
        found.append(fn)
        fn = fn.fn
    return found


def hides_one_of(handler: Messenger, msg: dict[str, Any], factor: str) -> bool:
    """Whether a block, inside ``handler`` or outside, hides a sample site and not the factor of another name, or the reverse.

    :param factor: its name without the prefixes of open scopes.
    """
    site, other = name_inside(handler, msg["name"]), factor
    for opened in reversed(_PYRO_STACK):
        if isinstance(opened, scope) and "sample" not in opened.hide_types:
            site, other = (f"{opened.prefix}{opened.divider}{name}" for name in (site, other))
        if isinstance(opened, block):
            hidden = {bool(opened.hide_fn(seen)) for seen in ({**msg, "name": site}, {**msg, "name": other, "is_observed": True})}
            if hidden != {False}:
                return hidden != {True}
    return False


def is_in_scan(msg: dict[str, Any]) -> bool:
    """Whether a message comes out of a ``scan`` or ``cond`` that has run its steps already."""
    return bool(msg.get("_control_flow_done", False))


def scan_index(site: dict[str, Any]) -> Any:
    """Which step of a ``scan`` a site belongs to, while it runs; None outside."""
    return site["infer"].get("_scan_current_index")


def mask_of(fn: Any) -> Any:
    """What a distribution is masked with at its outermost layer, or None."""
    return fn._mask if isinstance(fn, dist.MaskedDistribution) else None


def has_seen_model(guide: AutoGuide) -> bool:
    """Whether an AutoGuide has been called: it keeps what it sees first."""
    return guide.prototype_trace is not None


def is_auxiliary(site: dict[str, Any]) -> bool:
    """Whether a guide draws all latents at once at this site, which the model does not have."""
    return bool(site["infer"].get("is_auxiliary"))


def marked_factor(name: str, log_factor: Any, mark: str) -> None:
    """A :func:`numpyro.factor` whose site is known by a mark in its ``infer``, whatever handlers make of its name."""
    unit = dist.Unit(log_factor)
    numpyro.sample(name, unit, obs=unit.sample(None), infer={"is_auxiliary": True, mark: True})


def layers(fn: Any) -> Iterator[Any]:
    """A distribution, then what it wraps, outermost first (plates wrap a site's distribution)."""
    yield fn
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
        yield fn


def _locals_called(*names: str) -> Iterator[Any]:
    """The values of local variables of these names, of the innermost frame first.

    Before Python 3.13 to read a frame's variables is to keep them alive until it ends, which JAX would take for leaked tracers: no
    other frame is read than one that has such a variable, and none of JAX's.
    """
    frame = sys._getframe(2)
    while frame is not None:
        known = frame.f_code.co_varnames + frame.f_code.co_cellvars
        if not frame.f_globals.get("__name__", "").startswith("jax.") and any(name in known for name in names):
            variables = frame.f_locals
            yield from (variables[name] for name in names if name in variables)
        frame = frame.f_back  # type: ignore[assignment]
