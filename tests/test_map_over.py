# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from numpyro_ebm import TiltedDistribution
from numpyro_ebm._map_over import map_over


def dimensions(jaxpr):
    """The largest number of dimensions of an array that is multiplied."""
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    return max(variable.aval.ndim for equation in products for variable in equation.invars)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_map_over_is_vmap(size):
    # Catches an axis that is lost, or put elsewhere, where its size is 1.
    x = {"a": jax.random.normal(jax.random.key(0), (size, 4)), "key": jax.random.split(jax.random.key(1), size)}

    def function(x):
        return x["a"].sum(), x["a"] * jax.random.normal(x["key"])

    for ours, wanted in zip(map_over(function, x), jax.vmap(function)(x), strict=True):
        assert ours.dtype == wanted.dtype
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)


def test_an_axis_of_size_1_is_no_axis_of_what_is_mapped():
    # Catches a vmap that stays: its axis costs transposes and copies of every layer.
    weight = jnp.ones((5, 4))
    of_one, of_two = (jax.make_jaxpr(lambda x: map_over(lambda x: weight @ x, x))(jnp.ones((size, 4))) for size in (1, 2))
    assert (dimensions(of_one.jaxpr), dimensions(of_two.jaxpr)) == (2, 2)
    assert [variable.aval.shape for equation in of_one.jaxpr.eqns for variable in equation.outvars][-2:] == [(5,), (1, 5)]


@pytest.mark.parametrize("batch", [(), (7,), (1, 7), (2, 7), (2, 1, 7)])
def test_an_energy_sees_all_batch_dimensions_as_one(batch):
    # Catches a map for each of them, and values that change places when they are flattened.
    weight = jax.random.normal(jax.random.key(0), (5, 4))
    tilted = TiltedDistribution(dist.Normal(0, 1).expand([4]).to_event(1), lambda x: (weight @ x).max())
    x = jax.random.normal(jax.random.key(1), (*batch, 4))
    wanted = -(x**2 + jnp.log(2 * jnp.pi)).sum(-1) / 2 - (x @ weight.T).max(-1)
    np.testing.assert_allclose(tilted.log_prob(x), wanted, rtol=1e-5)
    assert dimensions(jax.make_jaxpr(tilted._log_density)(x).jaxpr) == 2
