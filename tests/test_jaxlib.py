# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""JAX itself: what it computes when it compiles, and the release that is known to compute something else."""

import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from numpyro_ebm._jaxlib import FLAG, WHY, WRONG, warn_of_wrong_numbers


def test_compiled_sums_over_many_rows_are_right():
    """The square of a product for each of many rows, as of any energy of a Gaussian: jaxlib 0.10.2 is wrong by 63."""
    rng = np.random.default_rng(0)
    rows, matrix = (rng.normal(size=shape).astype(np.float32) for shape in ((33_000, 3), (3, 3)))
    found = jax.jit(lambda matrix, rows: jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows))(matrix, rows)
    np.testing.assert_allclose(found, ((rows @ matrix.T) ** 2).sum(1), rtol=1e-3, atol=1e-3)


def test_a_jaxlib_of_wrong_numbers_is_told(monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", WRONG)
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.warns(RuntimeWarning) as warned:
        warn_of_wrong_numbers()
    assert str(warned[0].message) == WHY
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_math=false {FLAG}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_wrong_numbers()


def test_it_is_told_on_import_and_not_installed():
    program = f"import jaxlib; jaxlib.__version__ = {WRONG!r}\nimport numpyro_ebm"
    found = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=True
    )
    assert "makes wrong numbers of some sums of products" in found.stderr
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert {f"{name}>=0.10,!={WRONG}" for name in ("jax", "jaxlib")} <= set(project["dependencies"])
