# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.infer.engine import NonFiniteError, RunResult
from numpyro_ebm.infer.particle_mmle import ParticleMMLE, ParticleState

__all__ = ["NonFiniteError", "ParticleMMLE", "ParticleState", "RunResult"]
