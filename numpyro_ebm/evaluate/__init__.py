# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.evaluate.convergence import ConvergenceReport, convergence
from numpyro_ebm.evaluate.diagnose import diagnose
from numpyro_ebm.evaluate.fisher_divergence import FisherDivergence, fisher_divergence
from numpyro_ebm.evaluate.marginal_score import marginal_score
from numpyro_ebm.evaluate.mode import MapEstimate, find_map
from numpyro_ebm.evaluate.normalizer import LogNormalizer, log_normalizer
from numpyro_ebm.evaluate.posterior import sample_posterior
from numpyro_ebm.evaluate.report import Finding, FitReport, enable_reports, reports_enabled
from numpyro_ebm.evaluate.standard_errors import StandardErrors, standard_errors

__all__ = [
    "ConvergenceReport",
    "Finding",
    "FisherDivergence",
    "FitReport",
    "LogNormalizer",
    "MapEstimate",
    "StandardErrors",
    "convergence",
    "diagnose",
    "enable_reports",
    "find_map",
    "fisher_divergence",
    "log_normalizer",
    "marginal_score",
    "reports_enabled",
    "sample_posterior",
    "standard_errors",
]
