# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Energy-based priors and energy-based latent variable models in NumPyro."""

from numpyro_ebm import distributions, evaluate, handlers, infer, inference_data, objectives, optim, program, samplers, train
from numpyro_ebm._jaxlib import warn_of_wrong_numbers
from numpyro_ebm.distributions import *
from numpyro_ebm.evaluate import *
from numpyro_ebm.handlers import *
from numpyro_ebm.infer import *
from numpyro_ebm.inference_data import *
from numpyro_ebm.objectives import *
from numpyro_ebm.optim import *
from numpyro_ebm.program import *
from numpyro_ebm.samplers import *
from numpyro_ebm.train import *

__version__ = "0.1.0"

__all__ = sorted(
    name
    for part in (distributions, evaluate, handlers, infer, inference_data, objectives, optim, program, samplers, train)
    for name in part.__all__
)

warn_of_wrong_numbers()
