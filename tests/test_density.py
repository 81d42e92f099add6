# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Quadrature of densities whose normalizers are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from numpyro_ebm import EnergyDistribution, TiltedDistribution
from numpyro_ebm.evaluate.density import known_density

KEY = jax.random.key(0)


def modes(weights, places, scales):
    places, scales = jnp.asarray(places), jnp.asarray(scales)
    of_each = dist.Normal(places, scales) if places.ndim == 1 else dist.Normal(places, scales[:, None]).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(jnp.asarray(weights)), of_each)


# density, and how far the log of its normalizer may be from 0
DENSITIES = {
    "narrow modes": (modes([0.4, 0.6], [-4.0, 4.0], [0.05, 0.05]), 2e-3),
    "modes of two widths": (modes([0.1, 0.9], [-10.0, 4.0], [1.0, 0.1]), 2e-3),
    "a heavy tail": (dist.StudentT(3.0, 0.0, 0.8), 5e-3),
    "a heavier tail": (dist.Cauchy(0.0, 1.0), 5e-3),
    "modes in the plane": (modes([0.5, 0.3, 0.2], [[-3.0, 0.0], [3.0, 1.0], [0.0, 8.0]], [0.5, 0.5, 0.5]), 0.01),
    "narrow modes in the plane": (modes([0.5, 0.3, 0.2], [[-3.0, 0.0], [3.0, 1.0], [0.0, 8.0]], [0.1, 0.1, 0.1]), 0.05),
    "a narrow one in a wide one": (modes([0.5, 0.5], [[0.0, 0.0], [0.0, 0.0]], [0.1, 3.0]), 0.01),
}


@pytest.mark.parametrize("has_reference", [False, True])
@pytest.mark.parametrize("name", DENSITIES)
def test_normalizers(name, has_reference):
    """Between modes, where neither rows nor the reference have quantiles, the grid is coarse."""
    density, tolerance = DENSITIES[name]
    rows = density.sample(jax.random.key(1), (200,))
    energy = EnergyDistribution(lambda x: -density.log_prob(x), event_shape=density.event_shape)
    if has_reference:
        base = dist.Normal(0, 1).expand(density.event_shape).to_event(len(density.event_shape))
        energy = TiltedDistribution(base, lambda x: base.log_prob(x) - density.log_prob(x))
    known = jax.jit(partial(known_density, KEY, energy, energy.chain_sampler))(rows)
    assert abs(float(known.log_normalizer)) < tolerance
    assert float(known.weights.sum()) == pytest.approx(1, abs=1e-5)


def test_densities_of_a_stack_are_integrated_on_their_own():
    """Of p_1 x_1^2 / 2 + p_2 x_2^2 / 2 + c, whose normalizer is 2 pi / sqrt(p_1 p_2) exp(-c), far from that of others."""
    precisions, levels = jnp.array([[1.0, 4.0], [0.25, 1.0], [9.0, 9.0]]), jnp.array([0.0, 1e4, -1e4])
    params = precisions, levels
    energy = EnergyDistribution(lambda p, x: (p[0] * x**2).sum() / 2 + p[1], params=params, event_shape=(2,), batch_shape=(3,))
    rows = jax.random.normal(KEY, (500, 3, 2)) / precisions**0.5
    known = jax.jit(partial(known_density, KEY, energy, energy.chain_sampler))(rows)
    exact = np.log(2 * np.pi) - np.log(np.asarray(precisions)).sum(1) / 2 - np.asarray(levels)
    assert np.abs(np.asarray(known.log_normalizer) - exact).max() < 0.01
    variances = (known.weights[..., None] * known.points**2).sum(0)
    assert np.abs(np.asarray(variances * precisions) - 1).max() < 0.03
