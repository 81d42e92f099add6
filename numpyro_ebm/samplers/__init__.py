# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.samplers.langevin import MALA, MALAState, Sampler, UnadjustedLangevin, UnadjustedLangevinState

__all__ = ["MALA", "MALAState", "Sampler", "UnadjustedLangevin", "UnadjustedLangevinState"]
