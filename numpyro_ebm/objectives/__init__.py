# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.objectives.guide import PosteriorFisher
from numpyro_ebm.objectives.score import (
    DenoisingScoreMatching,
    ExactScoreMatching,
    MultiscaleDenoisingScoreMatching,
    ScoreObjective,
    SlicedScoreMatching,
)
from numpyro_ebm.objectives.stein import IMQKernel, KernelSteinDiscrepancy, KSDTest, RadialKernel, RBFKernel, ksd_test

__all__ = [
    "DenoisingScoreMatching",
    "ExactScoreMatching",
    "IMQKernel",
    "KSDTest",
    "KernelSteinDiscrepancy",
    "MultiscaleDenoisingScoreMatching",
    "PosteriorFisher",
    "RBFKernel",
    "RadialKernel",
    "ScoreObjective",
    "SlicedScoreMatching",
    "ksd_test",
]
