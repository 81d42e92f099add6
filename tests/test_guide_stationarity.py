# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How far a guide stands from its optimum: in closed form for normal posteriors, and nothing where there is nothing but noise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found as told
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from numpyro_ebm import TiltedDistribution, diagnose, negative_phase
from numpyro_ebm.evaluate.guide_stationarity import DISTANCE, MOST, guide_distances, guide_stationarity_finding
from numpyro_ebm.program.run import run_model

KEY = jax.random.key(0)
Y = np.random.default_rng(0).standard_normal(200) * 2**0.5
SPREAD = 0.5**0.5  # of the posterior


def hierarchical(y):
    """z of N(tilt, 1), seen with as much noise."""
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


def away(y):
    """The posterior where the tilt is 0, but for a shift in standard deviations and a factor of them."""
    shift, factor = numpyro.param("shift", 0.0), numpyro.param("factor", 1.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("z", dist.Normal(y / 2 + shift * SPREAD, factor * SPREAD))


@pytest.fixture(scope="module")
def phase():
    return negative_phase(hierarchical, num_chains=200)


def report_of(phase, guide, init_params):
    """Of a fit that stays where it starts, with its chains."""
    svi = SVI(phase, guide, optax.sgd(0.0), Trace_ELBO())
    fit = svi.run(KEY, 50, Y, progress_bar=False, init_params=init_params)
    return diagnose(fit, phase, Y, guide=guide, warn=False)


@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1.0), (0.5, 1.0), (2.0, 1.0), (0.0, 0.2), (1.0, 0.5), (-1.0, 2.0)])
def test_distance_is_that_of_the_normal_posterior(phase, shift, factor):
    found = told(report_of(phase, away, {"tilt": 0.0, "shift": shift, "factor": factor}), DISTANCE)
    a, r = shift * factor, factor**2
    exact = np.sqrt(a**2 / min(r, 1) + r - 1 - np.log(r))
    error = (found.most - MOST) / 3
    assert found.value == pytest.approx(exact, abs=4 * error + 0.02), error
    assert error < 0.1
    assert found.is_well == (exact < MOST + 3 * error)


def test_guide_that_has_hardly_left_its_start_is_told():
    """Its prior follows it there: where only these two are compared all looks well."""
    phase = negative_phase(hierarchical, num_chains=200)
    guide = AutoNormal(phase, init_scale=0.1)
    fit = SVI(phase, guide, optax.adam(1e-3), Trace_ELBO()).run(KEY, 200, 30 + Y, progress_bar=False)
    report = diagnose(fit, phase, 30 + Y, guide=guide, warn=False)
    assert not told(report, DISTANCE).is_well
    assert any(str(finding).startswith("site 'z': distance of guide from its optimum") for finding in report.trouble)


def test_guide_of_one_value_has_no_width():
    phase = negative_phase(hierarchical, num_chains=200)
    guide = AutoDelta(phase)
    fit = SVI(phase, guide, optax.sgd(0.0), Trace_ELBO()).run(KEY, 50, Y, progress_bar=False)
    found = told(diagnose(fit, phase, Y, guide=guide, warn=False), DISTANCE)
    assert not found.is_told
    assert "one value alone" in found.fix


# A latent of all rows beside those of each, of which a batch has some; the posteriors given the others are normal.
SIZE, BATCH = 200, 50
SCALE = 0.5  # positive, and log normal in the guide


def in_batches(y):
    level = numpyro.sample("level", dist.LogNormal(0, SCALE))
    with numpyro.plate("data", SIZE, subsample_size=BATCH):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=numpyro.subsample(y, event_dim=0))
    numpyro.sample("seen", dist.Normal(jnp.log(level), SCALE), obs=0.0)


def guide_in_batches(y):
    shift = numpyro.param("shift", 0.0)
    numpyro.sample("level", dist.LogNormal(shift * SCALE * SPREAD, SCALE * SPREAD))
    with numpyro.plate("data", SIZE, subsample_size=BATCH):
        y = numpyro.subsample(y, event_dim=0)
        numpyro.sample("z", dist.Normal(y / 2 + shift * SPREAD, SPREAD))


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_rows_in_part_and_constrained_latents(shift):
    def sample_of(key, rows):
        with trace() as drawn, substitute(data={"shift": shift, **rows}), seed(rng_seed=key):
            guide_in_batches(Y)
        return run_model(replay(in_batches, drawn), (Y,), {}, key, data=rows)

    found = jax.jit(lambda key: guide_distances(key, in_batches, sample_of, {}, (Y,), {}))(KEY)
    assert sorted(found) == ["level", "z"]
    for name, distance in found.items():
        finding = guide_stationarity_finding(name, distance)
        error = (finding.most - MOST) / 3
        assert finding.value == pytest.approx(shift, abs=4 * error + 0.02), name
        assert error < 0.25, name
