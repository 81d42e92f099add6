# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.infer.bidvl import BiDVL, BiDVLState
from numpyro_ebm.infer.bidvl_settings import Difference, Hinge, LowerLevel, Softplus
from numpyro_ebm.infer.bism import BiSM, BiSMState, Implicit, Unrolled
from numpyro_ebm.infer.engine import NonFiniteError, RunResult
from numpyro_ebm.infer.particle_mmle import ParticleMMLE, ParticleState
from numpyro_ebm.infer.particle_settings import Averaged, Maximize, Newton, Summed
from numpyro_ebm.infer.score_matching import ScoreMatching, ScoreMatchingState
from numpyro_ebm.infer.vages import ImportanceWeighted, VaGES, VaGESState, Variational

__all__ = [
    "Averaged",
    "BiDVL",
    "BiDVLState",
    "BiSM",
    "BiSMState",
    "Difference",
    "Hinge",
    "Implicit",
    "ImportanceWeighted",
    "LowerLevel",
    "Maximize",
    "Newton",
    "NonFiniteError",
    "ParticleMMLE",
    "ParticleState",
    "RunResult",
    "ScoreMatching",
    "ScoreMatchingState",
    "Softplus",
    "Summed",
    "Unrolled",
    "VaGES",
    "VaGESState",
    "Variational",
]
