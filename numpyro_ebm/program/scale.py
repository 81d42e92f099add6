# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the base of an energy is where its data are: a network sees both, and learns where its inputs are of order one.

The data of an observed energy are compared with samples of its base; those of another site, whose density knows no parameter,
with what the model predicts for it where latents with an energy are samples of their bases.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import TransformedDistribution
from numpyro.handlers import block, seed
from numpyro.primitives import Messenger

from numpyro_ebm._compat import layers, one_at_a_time, scan_index
from numpyro_ebm.distributions.base_measure import is_flat
from numpyro_ebm.distributions.energy import energy_site, with_core
from numpyro_ebm.distributions.known import is_known
from numpyro_ebm.program.minibatch import taking_rows
from numpyro_ebm.program.sites import Model, Site, is_factor, is_unbounded

FAR, WIDE = 5.0, 20.0  # in standard deviations of what is predicted
FEW_ROWS = 10
# samples of the model, and numbers that they may be in all: of data that leave fewer samples nothing is said
NUM_SAMPLES, LEAST_SAMPLES, NUM_ELEMENTS = 64, 8, 2**23
HALF = (0.16, 0.84)  # the quantiles of a normal at one standard deviation; tails, which may be heavy, do not count


class Scales(NamedTuple):
    """Where data are, in units of what they were compared with."""

    #: the distance of the mean of the data from the median
    distance: float
    #: the standard deviation of the data
    width: float

    @property
    def are_far(self) -> bool:
        return self.distance > FAR or not 1 / WIDE <= self.width <= WIDE

    def __str__(self) -> str:
        return (
            f"the mean of the data is {self.distance:.3g} away (at most {FAR:g} is right), and their standard deviation is "
            f"{self.width:.3g} ({1 / WIDE:g} to {WIDE:g} is right)"
        )


def scales_of(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], names: Collection[str]) -> dict[str, Scales]:
    """How the data of sites lie to what is predicted for them, for those where that can be told: of real numbers, and known.

    :param names: observed sites.
    """

    def samples(key: jax.Array) -> dict[str, Any]:
        with one_at_a_time, block(), seed(rng_seed=key), predicting:
            taking_rows(model)(*args, **kwargs)
        found, predicting.found = predicting.found, {}  # what is traced ends with the trace
        return found

    predicting = _predicting(names)
    try:
        size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(samples, jax.random.key(0))))
        num_samples = min(NUM_SAMPLES, NUM_ELEMENTS // max(size, 1))
        if not size or num_samples < LEAST_SAMPLES:
            return {}
        found = jax.vmap(samples)(jax.random.split(jax.random.key(0), num_samples))
    except NotImplementedError:  # a latent that cannot be drawn
        return {}
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(found)):  # whose values are not known
        return {}
    dims = predicting.event_dims
    return {name: scales(np.asarray(data), np.asarray(drawn), dims[name]) for name, (data, drawn) in found.items()}


def scales(data: np.ndarray, drawn: np.ndarray, event_dim: int) -> Scales:
    """Of every coordinate of an event by itself: the farthest, and the widest.

    :param data: of shape ``(num_samples,) + batch_shape + event_shape``: the data, or batches of them.
    :param drawn: what was predicted for them, of the same shape.
    """
    event = data.shape[data.ndim - event_dim :]
    num_rows = math.prod(data.shape[1 : data.ndim - event_dim])
    num = math.prod(event)
    data, drawn = data.reshape(-1, num), drawn.reshape(-1, num)
    low, center, high = np.quantile(drawn, (HALF[0], 0.5, HALF[1]), axis=0)
    unit = (high - low) / 2
    if not (unit > 0).all():  # what is predicted is all but certain, and no scale
        return Scales(0.0, 1.0)
    width = (data.std(0) / unit).max()
    if width < 1 and (width == 0 or num_rows < FEW_ROWS):  # a constant has no spread, and that of few rows may be small by chance
        width = 1.0
    return Scales(float((abs(data.mean(0) - center) / unit).max()), float(width))


class _predicting(Messenger):
    """Runs a model on samples in the place of its data, and samples of the base in that of energies; notes both."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names
        self.event_dims: dict[str, int] = {}
        self.found: dict[str, tuple[Any, Any]] = {}

    def process_message(self, msg: Site) -> None:
        if msg["type"] != "sample" or is_factor(msg["fn"]) or (msg["value"] is not None and not msg["is_observed"]):
            return
        name, fn, energy = msg["name"], msg["fn"], energy_site(msg["fn"])
        if energy is not None:
            if any(isinstance(part, TransformedDistribution) for part in layers(fn)):  # whose own scale may be learned
                raise NotImplementedError
            fn = with_core(fn, _base_of)
        if msg["is_observed"] and name not in self.names:
            return
        if scan_index(msg) is not None or not is_known(fn):
            raise NotImplementedError
        value = fn.sample(numpyro.prng_key(), msg["kwargs"].get("sample_shape", ()))
        if msg["is_observed"]:
            if is_unbounded(fn.support) and np.shape(msg["value"]) == value.shape:
                self.found[name], self.event_dims[name] = (jnp.asarray(msg["value"]), value), fn.event_dim
            return
        msg["value"] = value


def _base_of(energy: Any) -> Any:
    starts = (energy.reference, energy.initial) if is_flat(energy.base) else (energy.base,)
    start = next((fn for fn in starts if fn is not None), None)
    if start is None:
        raise NotImplementedError
    return start.expand(energy.batch_shape)
