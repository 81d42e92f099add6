# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.infer.engine import NonFiniteError, RunResult
from numpyro_ebm.infer.latents import MapEstimate, find_map, sample_posterior
from numpyro_ebm.infer.particle_mmle import ParticleMMLE, ParticleState
from numpyro_ebm.infer.uncertainty import ConvergenceReport, StandardErrors, convergence, standard_errors

__all__ = [
    "ConvergenceReport",
    "MapEstimate",
    "NonFiniteError",
    "ParticleMMLE",
    "ParticleState",
    "RunResult",
    "StandardErrors",
    "convergence",
    "find_map",
    "sample_posterior",
    "standard_errors",
]
