# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Long and large runs: data from anywhere, any number of devices, saved and gone on with."""

from numpyro_ebm.train.checkpoint import Checkpoints
from numpyro_ebm.train.devices import Sharding
from numpyro_ebm.train.state_file import load, save

__all__ = ["Checkpoints", "Sharding", "load", "save"]
