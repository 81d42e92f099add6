# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpyro.infer.svi import SVIRunResult, SVIState

from numpyro_ebm._fit import Fit, fit_of
from numpyro_ebm.infer.engine import RunResult

PARAMS, KEPT, LOSSES = {"loc": 1.0}, {"z/chains": {"x": 2.0}}, [0.5, 0.25]


class State(NamedTuple):
    params: Any
    mutable_state: Any
    num_steps: Any


STATE = State(PARAMS, KEPT, np.array(2))
FITS = {
    "result of an engine": RunResult(PARAMS, STATE, LOSSES),
    "its state": STATE,
    "result of SVI": SVIRunResult(PARAMS, SVIState((), KEPT, None), LOSSES),
    "state of SVI": SVIState((), KEPT, None),
    "mutable sites": KEPT,
    "nothing": None,
}


@pytest.mark.parametrize("name", FITS)
def test_what_is_known_of_a_fit_does_not_depend_on_how_it_is_given(name):
    # Catches a form of which params, chains or losses are not found, and things of no fit that are taken for one.
    known = fit_of(FITS[name])
    assert known.params == (None if name in ("state of SVI", "mutable sites", "nothing") else PARAMS)
    assert known.mutable_state == (None if name == "nothing" else KEPT)
    assert known.losses == (LOSSES if "result" in name else None)
    assert known.data == {**(known.params or {}), **(known.mutable_state or {})}
    assert name != "nothing" or known == Fit()


def test_a_state_with_a_number_of_steps_for_each_run_is_of_many_runs():
    # Catches runs that vmap stacked and that are taken for one.
    assert [fit_of(STATE._replace(num_steps=steps)).is_many_runs for steps in (np.array(2), np.array([2, 2]))] == [False, True]
