# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.program.check import ModelReport, SiteReport, check_model

__all__ = ["ModelReport", "SiteReport", "check_model"]
