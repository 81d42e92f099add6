# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What many noise levels learn of a Gaussian, and when a report says so."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_ebm import EnergyDistribution, MultiscaleDenoisingScoreMatching, ScoreMatching, diagnose
from numpyro_ebm.infer.noise_levels import LEVELS, NATS, levels_finding, spectrum

KEY = jax.random.key(0)
PUBLISHED = MultiscaleDenoisingScoreMatching(0.1, 0.05, 1.2)  # whose mean of sigma^-2 is 62.8, for 100
MATCHED = MultiscaleDenoisingScoreMatching(0.126, 0.05, 1.2)


def normal(v):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", EnergyDistribution(lambda v: precision * v**2 / 2), obs=v)


def rows(num_wide, num_thin=0, num_rows=1000):
    """Rows with exactly the variances 1 and 0."""
    v = jax.random.normal(KEY, (num_rows, num_wide))
    v = np.linalg.qr(np.asarray(v - v.mean(0)))[0] * num_rows**0.5
    return jnp.asarray(np.pad(v, ((0, 0), (0, num_thin))), jnp.float32)


def test_the_nats_are_those_that_a_gaussian_learns():
    """The objective is minimized by steps over many samples of its noise, and the variance compared with that of smoothed data."""
    v = jnp.tile(jnp.array([1.0, -1.0]), 500)  # whose variance is 1 at every level, to which rows belong by their place
    engine = ScoreMatching(normal, optax.adam(optax.cosine_decay_schedule(0.03, 1500)), PUBLISHED)
    result = engine.run(KEY, 1500, v, progress_bar=False)
    ratio = 1.01 * float(result.params["precision"])  # of the smoothed variance and the learned one
    told = levels_finding("v", PUBLISHED, len(v), v)
    assert told.value == pytest.approx((ratio - 1 - np.log(ratio)) / 2, abs=0.01)
    assert told.value > NATS


@pytest.mark.parametrize(
    ("objective", "num_wide", "num_thin", "is_well"),
    [
        (PUBLISHED, 1, 0, False),
        (MATCHED, 2, 0, True),
        (PUBLISHED, 2, 10, False),
        (PUBLISHED, 2, 30, True),
        (PUBLISHED, 50, 0, False),
    ],
)
def test_levels_are_out_of_bounds_where_they_do_not_go_together_and_no_row_tells_its_own(objective, num_wide, num_thin, is_well):
    told = levels_finding("v", objective, 1000, rows(num_wide, num_thin))
    assert told.is_well == is_well
    if objective is MATCHED:
        assert told.value < 1e-3
    if not is_well:
        assert "take sigma0=0.126" in told.fix


def test_directions_that_few_rows_do_not_have_are_thin():
    v = jax.random.normal(KEY, (10, 30))
    found = spectrum(v)
    assert found.shape == (30,)
    np.testing.assert_allclose(np.sort(found)[:21], 0, atol=1e-9)
    assert found.sum() == pytest.approx(float(v.var(0).sum()), rel=1e-5)


def test_a_fit_tells_the_levels_of_its_batches():
    engine = ScoreMatching(normal, optax.adam(0.01), PUBLISHED, batch_size=10)
    v = dist.Normal(0, 1).sample(KEY, (100,))
    (told,) = diagnose(engine.init(KEY, v), engine, v, warn=False).findings
    assert (told.site, told.quantity) == ("v", LEVELS)
    assert told.value == levels_finding("v", PUBLISHED, 10, v).value != levels_finding("v", PUBLISHED, 100, v).value
