# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The model that the benchmarks of long runs learn, where the model itself is not what is measured."""

import numpyro
import numpyro.distributions as dist


def hierarchical(num_rows, batch_size):
    """One latent number for each of so many rows, seen in minibatches if there is a size of them."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", num_rows, subsample_size=batch_size):
            y = numpyro.subsample(y, event_dim=0)
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    return model
