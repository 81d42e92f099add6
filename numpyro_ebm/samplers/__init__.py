# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.samplers.annealed import annealed_langevin, annealing_schedule, denoise
from numpyro_ebm.samplers.base import ChainState as ChainState
from numpyro_ebm.samplers.base import Reference as Reference
from numpyro_ebm.samplers.base import Sampler as Sampler
from numpyro_ebm.samplers.base import Target as Target
from numpyro_ebm.samplers.base import over_events as over_events
from numpyro_ebm.samplers.gibbs import BlockGibbs, block_gibbs
from numpyro_ebm.samplers.gibbs import BlockGibbsState as BlockGibbsState
from numpyro_ebm.samplers.gibbs import Layers as Layers
from numpyro_ebm.samplers.mala import MALA
from numpyro_ebm.samplers.mala import MALAState as MALAState
from numpyro_ebm.samplers.nuts import NUTS as NUTS
from numpyro_ebm.samplers.unadjusted import UnadjustedLangevin
from numpyro_ebm.samplers.unadjusted import UnadjustedLangevinState as UnadjustedLangevinState

# What has an "as" is public here and not at the root: parts of the rest, and names that NumPyro, optax or JAX have too.
__all__ = [
    "MALA",
    "BlockGibbs",
    "UnadjustedLangevin",
    "annealed_langevin",
    "annealing_schedule",
    "block_gibbs",
    "denoise",
]
