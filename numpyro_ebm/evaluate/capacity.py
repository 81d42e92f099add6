# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether an energy has more parameters than rows to learn them from.

Likelihood rewards an energy with a spike at every row, and a network that is trained for long enough gets there. Nothing else in a
report would see it: the chains of such an energy mix, and agree with its density.
"""

import math
from typing import Any

import jax
import numpy as np

from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.handlers import innermost, negative_phase, undrawn, unnormalized
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.run import Run, run_model
from numpyro_ebm.program.sites import FIELD

OTHER_ROWS = "density of rows that were not learned from"


def capacity_findings(
    phase: negative_phase, params: dict[str, Any], mutable_state: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Finding]:
    """By site of chains, of the energies that have more parameters than rows: that it is not told whether they hold for others."""
    model, data = unnormalized(innermost(phase).fn), {**params, **mutable_state}
    learned = check_run(model, args, kwargs, data=data).learned
    if not learned:
        return {}
    num_rows: dict[str, int] = {}

    def count() -> None:
        run = run_model(undrawn(model), args, kwargs, jax.random.key(0), data=data)
        num_rows.update({site.name: _num_events(run, site.couples[0] if site.couples else site.name) for site in learned})

    jax.eval_shape(count)  # nothing is computed
    found = {}
    for site in learned:
        values = [params[name] for name in site.params if name in params]
        num_params = sum(math.prod(np.shape(x)) for x in jax.tree.leaves(values))
        if num_params > num_rows[site.name]:
            name = FIELD if site.couples else site.name
            why = (
                f"its energy has {num_params} parameters and has learned from {num_rows[site.name]} rows, which it may have "
                "learned by heart. Fit again without some of them: a density that holds for others is nearly the same"
            )
            found[name] = not_told(name, OTHER_ROWS, why)
    return found


def _num_events(run: Run, name: str) -> int:
    """Events of a site for all rows of the data, those that a subsampled plate leaves out too."""
    site = run.sites[name]
    seen = math.prod(np.shape(site["value"])[: np.ndim(site["value"]) - site["fn"].event_dim])
    return seen * math.prod(
        run.plates[frame.name].size // len(run.plates[frame.name].indices) for frame in site["cond_indep_stack"]
    )
