# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Averages of the iterates of a fit, which vary less about the optimum than the last one does.

The average of Shamir and Zhang (2013), of unconstrained parameters after step t,

.. math:: \bar\theta_t = (1 - w_t) \, \bar\theta_{t-1} + w_t \, \theta_t, \qquad w_t = (1 + \eta) / (t + \eta),

weighs an iterate by about :math:`t^\eta`, so that the first ones fade however long a run goes on: no number of steps has to
be known. With :math:`\eta = 0` it is the mean of all of them (Polyak and Ruppert); with 3 half of the weight is in the last 16
percent.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.primitives import Messenger

from numpyro_ebm._checks import require_nonnegative
from numpyro_ebm.program.run import constrain_params
from numpyro_ebm.program.sites import Site

ETA = 3.0


class IterateAverage(NamedTuple):
    """The average of the iterates of a fit so far."""

    #: param sites, constrained: the image of the next field
    params: dict[str, Any]
    #: the average of the unconstrained param sites
    unconstrained: dict[str, Any]
    #: (), int32: how many
    num_iterates: Array


def require_average(average_iterates: Any) -> float | None:
    """The exponent of an average: 3 for True, None for False, or what it is given.

    :raises ValueError: for anything else.
    """
    if average_iterates is True or average_iterates is False:
        return ETA if average_iterates else None
    return require_nonnegative("average_iterates", average_iterates, "it is True, False, or the exponent of the weights")


def start_average(params: dict[str, Any], unconstrained: dict[str, Any]) -> IterateAverage:
    """An average of nothing yet, which is where the parameters stand."""
    return IterateAverage(params, unconstrained, jnp.zeros((), jnp.int32))


class ParamSites(Messenger):
    """Notes the transforms of the param sites of the programs that run inside, as they are first seen."""

    def __init__(self) -> None:
        super().__init__()
        self.transforms: dict[str, Any] = {}

    def postprocess_message(self, msg: Site) -> None:
        if msg["type"] == "param" and msg["name"] not in self.transforms:
            self.transforms[msg["name"]] = biject_to(msg["kwargs"].get("constraint", constraints.real))

    def next(self, average: IterateAverage, unconstrained: dict[str, Any], eta: float) -> IterateAverage:
        """The average with one iterate more."""
        count = average.num_iterates + 1
        weight = (1 + eta) / (count + eta)

        def mean(old: Array, new: Array) -> Array:
            return old + weight.astype(old.dtype) * (new - old)

        means = jax.tree.map(mean, average.unconstrained, unconstrained)
        return IterateAverage(constrain_params(means, self.transforms), means, count)
