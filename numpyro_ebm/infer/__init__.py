# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.infer.averaging import IterateAverage as IterateAverage
from numpyro_ebm.infer.bidvl import BiDVL, BiDVLState
from numpyro_ebm.infer.bidvl_settings import Difference as Difference
from numpyro_ebm.infer.bidvl_settings import Hinge as Hinge
from numpyro_ebm.infer.bidvl_settings import LowerLevel as LowerLevel
from numpyro_ebm.infer.bidvl_settings import Softplus as Softplus
from numpyro_ebm.infer.bism import BiSM, BiSMState, Implicit, Unrolled
from numpyro_ebm.infer.engine import RunResult
from numpyro_ebm.infer.particle_mmle import ParticleMMLE, ParticleState
from numpyro_ebm.infer.particle_moves import AdaptedMoves as AdaptedMoves
from numpyro_ebm.infer.particle_settings import Averaged as Averaged
from numpyro_ebm.infer.particle_settings import Maximize as Maximize
from numpyro_ebm.infer.particle_settings import Newton as Newton
from numpyro_ebm.infer.particle_settings import Summed as Summed
from numpyro_ebm.infer.score_matching import ScoreMatching, ScoreMatchingState
from numpyro_ebm.infer.vages import ImportanceWeighted, VaGES, VaGESState, Variational
from numpyro_ebm.train.health import NonFiniteError

# What has an "as" is public here and not at the root: parts of the rest, and names that NumPyro, optax or JAX have too.
__all__ = [
    "BiDVL",
    "BiDVLState",
    "BiSM",
    "BiSMState",
    "Implicit",
    "ImportanceWeighted",
    "NonFiniteError",
    "ParticleMMLE",
    "ParticleState",
    "RunResult",
    "ScoreMatching",
    "ScoreMatchingState",
    "Unrolled",
    "VaGES",
    "VaGESState",
    "Variational",
]
