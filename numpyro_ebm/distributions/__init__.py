# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.distributions.energy import BaseMeasure, EnergyDistribution, NormalizerError, TiltedDistribution
from numpyro_ebm.distributions.rbm import BernoulliRBM, GaussianBernoulliRBM, RestrictedBoltzmannMachine
from numpyro_ebm.distributions.relaxed import GumbelBernoulli, amortized_bernoulli, amortized_normal

__all__ = [
    "BaseMeasure",
    "BernoulliRBM",
    "EnergyDistribution",
    "GaussianBernoulliRBM",
    "GumbelBernoulli",
    "NormalizerError",
    "RestrictedBoltzmannMachine",
    "TiltedDistribution",
    "amortized_bernoulli",
    "amortized_normal",
]
