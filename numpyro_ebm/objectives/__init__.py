# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.objectives.posterior import PosteriorFisher
from numpyro_ebm.objectives.score import (
    DenoisingScoreMatching,
    ExactScoreMatching,
    MultiscaleDenoisingScoreMatching,
    ScoreObjective,
    SlicedScoreMatching,
)

__all__ = [
    "DenoisingScoreMatching",
    "ExactScoreMatching",
    "MultiscaleDenoisingScoreMatching",
    "PosteriorFisher",
    "ScoreObjective",
    "SlicedScoreMatching",
]
