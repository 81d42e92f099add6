# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.evaluate.normalizer import LogNormalizer, log_normalizer

__all__ = ["LogNormalizer", "log_normalizer"]
