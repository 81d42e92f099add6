# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What all files of tests share: none leaves its compiled programs in memory, and some read the examples' networks."""

import gc
import importlib.util
from pathlib import Path

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _memory_of_one_file():
    """The programs of a file are of no use to the next one, and all together take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def example_nets():
    """``example_nets(name)``: the module of networks of that name beside the examples."""

    def load(name):
        path = Path(__file__).parents[1] / "examples" / "nets" / f"{name}.py"
        if not path.exists():
            pytest.skip("the package is installed without its examples")
        spec = importlib.util.spec_from_file_location(f"{name}_nets", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
