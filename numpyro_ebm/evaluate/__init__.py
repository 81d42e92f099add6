# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.evaluate.divergence import FisherDivergence, fisher_divergence, marginal_score
from numpyro_ebm.evaluate.normalizer import LogNormalizer, log_normalizer

__all__ = ["FisherDivergence", "LogNormalizer", "fisher_divergence", "log_normalizer", "marginal_score"]
