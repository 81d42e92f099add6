# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.samplers.annealed import annealed_langevin, annealing_schedule, denoise
from numpyro_ebm.samplers.base import ChainState, Reference, Sampler, Target
from numpyro_ebm.samplers.gibbs import BlockGibbs, BlockGibbsState, Layers, block_gibbs
from numpyro_ebm.samplers.mala import MALA, MALAState
from numpyro_ebm.samplers.nuts import NUTS
from numpyro_ebm.samplers.unadjusted import UnadjustedLangevin, UnadjustedLangevinState

__all__ = [
    "MALA",
    "NUTS",
    "BlockGibbs",
    "BlockGibbsState",
    "ChainState",
    "Layers",
    "MALAState",
    "Reference",
    "Sampler",
    "Target",
    "UnadjustedLangevin",
    "UnadjustedLangevinState",
    "annealed_langevin",
    "annealing_schedule",
    "block_gibbs",
    "denoise",
]
