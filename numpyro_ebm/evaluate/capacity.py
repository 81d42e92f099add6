# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether an energy has more parameters than rows to learn them from.

Likelihood rewards an energy with a spike at every row, and a network that is trained for long enough gets there. Nothing else in a
report would see it: the chains of such an energy mix, and agree with its density. Only other rows tell, and where there are many
times more parameters than rows a report asks for them.
"""

import math
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.evaluate.yardstick import OF_OTHERS
from numpyro_ebm.handlers import innermost, negative_phase, undrawn, unnormalized
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.run import Run, run_model
from numpyro_ebm.program.sites import FIELD

MANY = 10  # times as many parameters as rows
BY_HEART = "its energy has {} parameters and has learned from {} rows, which it may have learned by heart. {}"
GIVE = "Give validation= rows that it has not learned from"
LEAVE_OUT = "Fit again without some of them: a density that holds for others is nearly the same"


def capacity_finding(site: str, params: Any, num_rows: int, *, can_be_given: bool, are_well: bool) -> list[Finding]:
    """Of an energy that has more parameters than rows, that it is not told whether it holds for others.

    :param can_be_given: whether ``validation=`` rows could tell it.
    :param are_well: whether all else is. Where it is not, that is to be told first.
    """
    num_params = sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params))
    if num_params <= num_rows:
        return []
    why = BY_HEART.format(num_params, num_rows, GIVE if can_be_given else LEAVE_OUT)
    return [not_told(site, OF_OTHERS, why, is_missing=can_be_given and are_well and num_params > MANY * num_rows)]


def capacity_findings(
    phase: negative_phase,
    params: dict[str, Any],
    mutable_state: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    can_be_given: Collection[str],
    are_well: bool,
) -> dict[str, list[Finding]]:
    """The same by site of chains.

    :param can_be_given: sites of which ``validation=`` rows could tell it.
    """
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
        name, values = FIELD if site.couples else site.name, [params[param] for param in site.params if param in params]
        found[name] = capacity_finding(name, values, num_rows[site.name], can_be_given=name in can_be_given, are_well=are_well)
    return found


def _num_events(run: Run, name: str) -> int:
    """Events of a site for all rows of the data, those that a subsampled plate leaves out too."""
    site = run.sites[name]
    seen = math.prod(np.shape(site["value"])[: np.ndim(site["value"]) - site["fn"].event_dim])
    return seen * math.prod(
        run.plates[frame.name].size // len(run.plates[frame.name].indices) for frame in site["cond_indep_stack"]
    )
