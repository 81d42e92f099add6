# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""A release of JAX that computes wrong numbers without a word, told when the package is imported."""

import os
import warnings

import jaxlib

WRONG = "0.10.2"
FLAG = "--xla_cpu_experimental_ynn_fusion_type="
WHY = (
    f"jaxlib {WRONG} is installed, whose compiler for CPUs makes wrong numbers of some sums of products over many rows "
    "(jax-ml/jax issue 39103): log densities, gradients and fits may be wrong without any other sign. Install another, "
    f"pip install 'jax!={WRONG}' 'jaxlib!={WRONG}'; or start Python with the environment variable XLA_FLAGS={FLAG}"
)


def warn_of_wrong_numbers() -> None:
    """Warns where JAX would compute wrong numbers on a CPU."""
    if jaxlib.__version__ == WRONG and FLAG not in os.environ.get("XLA_FLAGS", "").split():
        warnings.warn(WHY, RuntimeWarning, stacklevel=3)
