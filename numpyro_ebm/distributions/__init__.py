# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.distributions.energy import BaseMeasure, EnergyDistribution, NormalizerError, TiltedDistribution

__all__ = ["BaseMeasure", "EnergyDistribution", "NormalizerError", "TiltedDistribution"]
