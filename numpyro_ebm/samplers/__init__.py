# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.samplers.gibbs import BlockGibbs, BlockGibbsState, Layers, block_gibbs
from numpyro_ebm.samplers.langevin import (
    MALA,
    MALAState,
    Sampler,
    UnadjustedLangevin,
    UnadjustedLangevinState,
    annealed_langevin,
    annealing_schedule,
    denoise,
)

__all__ = [
    "MALA",
    "BlockGibbs",
    "BlockGibbsState",
    "Layers",
    "MALAState",
    "Sampler",
    "UnadjustedLangevin",
    "UnadjustedLangevinState",
    "annealed_langevin",
    "annealing_schedule",
    "block_gibbs",
    "denoise",
]
