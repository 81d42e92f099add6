# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The page on many seeds runs as pasted, and its fits are those of single runs."""

import re

import jax
import numpy as np
import pytest
from test_readme import ROOT, run


@pytest.fixture(scope="module")
def page():
    return run("docs/how_to/many_seeds.md")


def test_many_seeds_page_prints_what_it_says(capsys):
    run("docs/how_to/many_seeds.md")
    text = (ROOT / "docs/how_to/many_seeds.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip().splitlines() == [
        line for said in re.findall(r"It prints (`[^`]*`(?: and `[^`]*`)?)", text) for line in re.findall("`([^`]*)`", said)
    ]


def test_a_seed_of_many_is_a_run_by_itself(page):
    """To rounding. Catches keys or data that seeds share."""
    engine, y = page["engine"], page["y"]
    alone = engine.run(page["keys"][3], 300, y, init_state=engine.init(page["keys"][3], y), progress_bar=False, report=False)
    np.testing.assert_allclose(page["losses"][3], alone.losses, rtol=1e-3)
    np.testing.assert_allclose(page["params"]["mu"][3, -1], alone.params["mu"], rtol=1e-3, atol=1e-4)
    assert len(np.unique(page["last"])) == 8


def test_seeds_find_the_maximum_from_anywhere(page):
    mu = np.asarray(page["from_afar"].params["mu"])
    assert mu.shape == (8,)
    np.testing.assert_allclose(mu, page["y"].mean(), atol=0.2)
    assert page["result"].state.num_steps == 400
    assert page["report"].findings
    assert set(page["r_hat"]) == {"mu", "tau"}


def test_what_looks_at_numbers_says_so_inside_vmap(page):
    engine, y = page["engine"], page["y"]
    with pytest.raises(TypeError, match="run looks at numbers between its chunks"):
        jax.vmap(lambda key: engine.run(key, 3, y, progress_bar=False).params)(page["keys"])
