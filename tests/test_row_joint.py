# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Rows and latents as vectors: no number is lost, and densities are those of the unconstrained numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from numpyro_ebm.infer.row_joint import RowJoint
from numpyro_ebm.program.run import run_model

ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
KEY = jax.random.key(0)


def model(v):
    """Latents of all kinds: bits, positive numbers of items that are inside of rows or around them, a vector."""
    scale = numpyro.param("scale", 1.5)
    with numpyro.plate("data", 5, dim=-1):
        bits = numpyro.sample("bits", dist.Bernoulli(0.3).expand([3]).to_event(1))
        loc = numpyro.sample("loc", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
        with numpyro.plate("items", 4, dim=-2):
            rates = numpyro.sample("rates", dist.Gamma(2.0, 1.0))
        shift = loc + bits.sum(-1, keepdims=True) + jnp.log(rates).sum(0)[:, None]
        numpyro.sample("v", dist.Normal(shift, scale).to_event(1), obs=v)


def joint_of(program):
    return RowJoint(model, (), {}, KEY, "data", program)


def test_vectors_are_the_latents_and_their_density_has_the_jacobians():
    program = run_model(model, (ROWS,), {}, KEY, data={})
    joint, drawn = joint_of(program), program.drawn
    assert joint.size == 3 + 2 + 4
    assert joint.are_bits.sum() == 3
    assert joint.is_of_bits
    vectors = joint.vectors(drawn)
    assert vectors.shape == (5, 9)
    for name, value in joint.latents(vectors).items():
        np.testing.assert_allclose(value, drawn[name], rtol=1e-5)
        assert value.dtype == drawn[name].dtype
    shift = drawn["loc"] + drawn["bits"].sum(-1, keepdims=True) + jnp.log(drawn["rates"]).sum(0)[:, None]
    exact = (
        dist.Normal(shift, 2.0).log_prob(ROWS).sum(-1)
        + dist.Bernoulli(0.3).log_prob(drawn["bits"]).sum(-1)
        + dist.Normal(0, 1).log_prob(drawn["loc"]).sum(-1)
        + (dist.Gamma(2.0, 1.0).log_prob(drawn["rates"]) + jnp.log(drawn["rates"])).sum(0)
    )
    np.testing.assert_allclose(joint.log_prob({"scale": 2.0}, ROWS, vectors), exact, rtol=1e-5)


def test_discrete_latents_that_are_no_bits_are_known_as_such():
    def counts(v):
        with numpyro.plate("data", 5):
            numpyro.sample("count", dist.Poisson(1.0))

    program = run_model(counts, (ROWS,), {}, KEY, data={})
    assert not RowJoint(counts, (), {}, KEY, "data", program).is_of_bits
