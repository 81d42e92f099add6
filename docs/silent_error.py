# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What plain NumPyro learns when ``log_prob`` leaves out a normalizer that depends on parameters. It does not use numpyro_ebm.

Run it with ``python docs/silent_error.py``. Two models, each with an answer known in closed form:

* data of precision 4, modeled by ``exp(-precision * x**2 / 2)``, with and without the normalizer of that Gaussian;
* a latent with prior ``exp(tilt * z) * Normal(z; 0, 1)``, which is ``Normal(tilt, 1)`` once normalized.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal


class UnnormalizedNormal(dist.Distribution):
    """A centered normal, its log density known up to a constant: minus the energy ``precision * x**2 / 2``."""

    support = constraints.real
    arg_constraints = {"precision": constraints.positive}

    def __init__(self, precision, *, validate_args=None):
        self.precision = precision
        super().__init__(jnp.shape(precision), (), validate_args=validate_args)

    def log_prob(self, value):
        return -self.precision * value**2 / 2


class TiltedNormal(dist.Distribution):
    """A standard normal tilted by ``exp(tilt * x)``, its log density known up to a constant."""

    support = constraints.real
    arg_constraints = {"tilt": constraints.real}

    def __init__(self, tilt, *, validate_args=None):
        self.tilt = tilt
        super().__init__(jnp.shape(tilt), (), validate_args=validate_args)

    def log_prob(self, value):
        return self.tilt * value - value**2 / 2

    def sample(self, key, sample_shape=()):  # where SVI starts
        return jax.random.normal(key, sample_shape + self.batch_shape)


def normalized_precision(x):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    numpyro.sample("x", dist.Normal(0, 1 / jnp.sqrt(precision)), obs=x)


def unnormalized_precision(x):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    numpyro.sample("x", UnnormalizedNormal(precision), obs=x)


def normalized_tilt(y):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Normal(tilt, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


def unnormalized_tilt(y):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedNormal(tilt))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


def no_latents(x):
    """The guide of a model without latents."""


def fit(model, guide, data):
    svi = SVI(model, guide, optax.adam(0.01), Trace_ELBO())
    result = svi.run(jax.random.key(0), 3000, data, progress_bar=False)
    return result.params, result.losses[-200:].mean() / len(data)


if __name__ == "__main__":
    x = jax.random.normal(jax.random.key(1), (400,)) / jnp.sqrt(4.0)
    y = 1.5 + jnp.sqrt(2.0) * jax.random.normal(jax.random.key(2), (400,))
    print(f"NumPyro {numpyro.__version__}")
    for name, exact, data, normalized, unnormalized, guide in [
        ("precision", 1 / (x**2).mean(), x, normalized_precision, unnormalized_precision, lambda model: no_latents),
        ("tilt", y.mean(), y, normalized_tilt, unnormalized_tilt, AutoNormal),
    ]:
        print(f"{name}: maximum likelihood is {exact:.2f} in closed form")
        for how, model in [("normalized", normalized), ("unnormalized", unnormalized)]:
            params, loss = fit(model, guide(model), data)
            print(f"  SVI, {how:<13} {params[name]:10.4f}   loss per datum {loss:10.4f}")
