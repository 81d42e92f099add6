# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What all files of tests share: none leaves its compiled programs in memory."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _memory_of_one_file():
    """The programs of a file are of no use to the next one, and all together take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
