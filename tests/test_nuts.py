# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import numpyro.infer
import pytest

from numpyro_ebm import sample_posterior
from numpyro_ebm.samplers import NUTS

KEY = jax.random.key(3)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("settings", [{}, {"target_accept_prob": 0.99}, {"max_tree_depth": 1}, {"dense_mass": True}])
def test_draws_are_those_of_numpyros_mcmc(settings):
    # Catches a setting that does not arrive, and a warmup or a thinning of another length.
    precision = jnp.array([[2.0, 1.5, 0.0], [1.5, 2.0, 0.5], [0.0, 0.5, 9.0]])

    def log_density(x):
        return -jnp.einsum("...i,ij,...j", x, precision, x) / 2

    start = jnp.ones((1, 3))
    draws, diverged = NUTS(**settings).draw(KEY, log_density, start, 30, 10, 2)
    kernel = numpyro.infer.NUTS(potential_fn=lambda x: -log_density(x), **settings)
    mcmc = numpyro.infer.MCMC(kernel, num_warmup=30, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.split(KEY, 1)[0], init_params=start[0])
    assert draws.shape == (1, 10, 3)
    np.testing.assert_allclose(draws[0], mcmc.get_samples()[1::2], rtol=1e-9)
    assert diverged == 0
    if settings:
        assert (np.abs(draws - NUTS().draw(KEY, log_density, start, 30, 10, 2)[0]) > 1e-3).any()


def test_transitions_that_diverge_are_said():
    # A funnel, whose neck the step of a low acceptance does not fit. Catches a count that is lost.
    def funnel():
        width = numpyro.sample("width", dist.Normal(0, 6))
        numpyro.sample("x", dist.Normal(0, jnp.exp(width)).expand([5]).to_event(1))

    diverged = pytest.warns(UserWarning, match=r"^\d+ of 198 transitions of NUTS diverged: the draws may miss")
    with diverged:  # with fewer than 100 draws R-hat is not asked for
        sample_posterior(KEY, funnel, {}, num_samples=99, num_warmup=20, num_chains=2, sampler=NUTS(0.1))
