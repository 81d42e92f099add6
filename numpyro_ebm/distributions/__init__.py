# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.distributions.base_measure import BaseMeasure
from numpyro_ebm.distributions.energy import EnergyDistribution, TiltedDistribution
from numpyro_ebm.distributions.guard import NormalizerError
from numpyro_ebm.distributions.rbm import BernoulliRBM, GaussianBernoulliRBM
from numpyro_ebm.distributions.rbm import RestrictedBoltzmannMachine as RestrictedBoltzmannMachine
from numpyro_ebm.distributions.relaxed import GumbelBernoulli, amortized_bernoulli, amortized_normal

# What has an "as" is public here and not at the root: parts of the rest, and names that NumPyro, optax or JAX have too.
__all__ = [
    "BaseMeasure",
    "BernoulliRBM",
    "EnergyDistribution",
    "GaussianBernoulliRBM",
    "GumbelBernoulli",
    "NormalizerError",
    "TiltedDistribution",
    "amortized_bernoulli",
    "amortized_normal",
]
