# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Energy-based priors and energy-based latent variable models in NumPyro."""

from numpyro_ebm.distributions import (
    BaseMeasure,
    BernoulliRBM,
    EnergyDistribution,
    GaussianBernoulliRBM,
    GumbelBernoulli,
    NormalizerError,
    TiltedDistribution,
    amortized_bernoulli,
    amortized_normal,
)
from numpyro_ebm.evaluate import LogNormalizer, log_normalizer
from numpyro_ebm.handlers import negative_phase, unnormalized
from numpyro_ebm.infer import (
    BiSM,
    BiSMState,
    ConvergenceReport,
    MapEstimate,
    NonFiniteError,
    ParticleMMLE,
    ParticleState,
    RunResult,
    ScoreMatching,
    ScoreMatchingState,
    StandardErrors,
    convergence,
    find_map,
    sample_posterior,
    standard_errors,
)
from numpyro_ebm.inference_data import to_inference_data
from numpyro_ebm.model_check import ModelReport, SiteReport, check_model
from numpyro_ebm.objectives import (
    DenoisingScoreMatching,
    ExactScoreMatching,
    MultiscaleDenoisingScoreMatching,
    PosteriorFisher,
    SlicedScoreMatching,
)
from numpyro_ebm.optim import kinetic_langevin, kinetic_langevin_splitting, langevin
from numpyro_ebm.samplers import (
    MALA,
    BlockGibbs,
    UnadjustedLangevin,
    annealed_langevin,
    annealing_schedule,
    block_gibbs,
    denoise,
)

__version__ = "0.1.0"

__all__ = [
    "MALA",
    "BaseMeasure",
    "BernoulliRBM",
    "BiSM",
    "BiSMState",
    "BlockGibbs",
    "ConvergenceReport",
    "DenoisingScoreMatching",
    "EnergyDistribution",
    "ExactScoreMatching",
    "GaussianBernoulliRBM",
    "GumbelBernoulli",
    "LogNormalizer",
    "MapEstimate",
    "ModelReport",
    "MultiscaleDenoisingScoreMatching",
    "NonFiniteError",
    "NormalizerError",
    "ParticleMMLE",
    "ParticleState",
    "PosteriorFisher",
    "RunResult",
    "ScoreMatching",
    "ScoreMatchingState",
    "SiteReport",
    "SlicedScoreMatching",
    "StandardErrors",
    "TiltedDistribution",
    "UnadjustedLangevin",
    "amortized_bernoulli",
    "amortized_normal",
    "annealed_langevin",
    "annealing_schedule",
    "block_gibbs",
    "check_model",
    "convergence",
    "denoise",
    "find_map",
    "kinetic_langevin",
    "kinetic_langevin_splitting",
    "langevin",
    "log_normalizer",
    "negative_phase",
    "sample_posterior",
    "standard_errors",
    "to_inference_data",
    "unnormalized",
]
