# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.objectives.guide import PosteriorFisher
from numpyro_ebm.objectives.score import (
    DenoisingScoreMatching,
    ExactScoreMatching,
    MultiscaleDenoisingScoreMatching,
    SlicedScoreMatching,
)
from numpyro_ebm.objectives.score import (
    ScoreObjective as ScoreObjective,
)
from numpyro_ebm.objectives.stein import IMQKernel, KernelSteinDiscrepancy, KSDTest, RBFKernel, ksd_test
from numpyro_ebm.objectives.stein import RadialKernel as RadialKernel

# What has an "as" is public here and not at the root: parts of the rest, and names that NumPyro, optax or JAX have too.
__all__ = [
    "DenoisingScoreMatching",
    "ExactScoreMatching",
    "IMQKernel",
    "KSDTest",
    "KernelSteinDiscrepancy",
    "MultiscaleDenoisingScoreMatching",
    "PosteriorFisher",
    "RBFKernel",
    "SlicedScoreMatching",
    "ksd_test",
]
