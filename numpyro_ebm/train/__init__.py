# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

from numpyro_ebm.train.devices import Sharding

__all__ = ["Sharding"]
