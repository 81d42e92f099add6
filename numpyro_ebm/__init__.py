# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Energy-based priors and energy-based latent variable models in NumPyro."""

from numpyro_ebm.distributions import BaseMeasure, EnergyDistribution, NormalizerError, TiltedDistribution
from numpyro_ebm.handlers import negative_phase, unnormalized
from numpyro_ebm.infer import (
    ConvergenceReport,
    MapEstimate,
    NonFiniteError,
    ParticleMMLE,
    ParticleState,
    RunResult,
    StandardErrors,
    convergence,
    find_map,
    sample_posterior,
    standard_errors,
)
from numpyro_ebm.inference_data import to_inference_data
from numpyro_ebm.model_check import ModelReport, SiteReport, check_model
from numpyro_ebm.optim import kinetic_langevin, kinetic_langevin_splitting, langevin
from numpyro_ebm.samplers import MALA, UnadjustedLangevin

__version__ = "0.1.0"

__all__ = [
    "MALA",
    "BaseMeasure",
    "ConvergenceReport",
    "EnergyDistribution",
    "MapEstimate",
    "ModelReport",
    "NonFiniteError",
    "NormalizerError",
    "ParticleMMLE",
    "ParticleState",
    "RunResult",
    "SiteReport",
    "StandardErrors",
    "TiltedDistribution",
    "UnadjustedLangevin",
    "check_model",
    "convergence",
    "find_map",
    "kinetic_langevin",
    "kinetic_langevin_splitting",
    "langevin",
    "negative_phase",
    "sample_posterior",
    "standard_errors",
    "to_inference_data",
    "unnormalized",
]
