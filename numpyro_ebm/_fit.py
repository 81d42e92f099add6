# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is to be read of a fit in whatever form it is given: the result of a run, a state of an engine or of SVI, mutable sites."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Fit(NamedTuple):
    """Of each what is known of it, else None."""

    #: values of param sites
    params: dict[str, Any] | None = None
    #: values of mutable sites, negative chains among them
    mutable_state: Mapping[str, Any] | None = None
    #: of an engine that has particles, unconstrained
    particles: dict[str, Any] | None = None
    #: steps made, one number for each of several runs
    num_steps: Any = None
    #: (num_steps,) the loss at every step
    losses: Any = None
    #: what a run collected after every step
    collected: Any = None

    @property
    def data(self) -> dict[str, Any]:
        """Values of all sites that are no samples, as a run of the model is given them."""
        return {**(self.params or {}), **(self.mutable_state or {})}

    @property
    def is_many_runs(self) -> bool:
        """Whether it is the state of several runs of an engine, stacked."""
        return np.ndim(self.num_steps) == 1


def fit_of(given: Any) -> Fit:
    """What is known of a fit from one of these; nothing from anything else."""
    known = _fields(given)
    known |= _fields(known.get("state"))
    return Fit(**{name: known[name] for name in Fit._fields if name in known})


def _fields(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return {"mutable_state": given}
    return given._asdict() if hasattr(given, "_asdict") else {}
