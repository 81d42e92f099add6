# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Particles that stand where the posterior hardly is: told in closed form, and nothing of heavy tails."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found

from numpyro_ebm import ParticleMMLE, diagnose
from numpyro_ebm.infer.particle_strays import GAIN, MOST, MOST_PER_ELEMENT

KEY = jax.random.key(0)
NUM_PARTICLES, NUM_ROWS, STRAY = 5, 6, 20.0


def pairs(y):
    """Two normal latents for each row, and a global one whose posterior is its prior."""
    loc = numpyro.param("loc", 0.0)
    numpyro.sample("w", dist.StudentT(1.0, loc, 1.0))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def reported(particles, kernel="mala"):
    settings = {} if kernel == "mala" else {"step_size": 0.1}
    y, num_particles = jnp.zeros((NUM_ROWS, 2)), len(particles["w"])
    engine = ParticleMMLE(pairs, optax.sgd(0.0), num_particles=num_particles, kernel=kernel, **settings)
    state = engine.init(KEY, y)._replace(particles=jax.tree.map(jnp.asarray, particles))
    return diagnose(state, engine, y, warn=False)


def clouds(num_particles=NUM_PARTICLES):
    return {"w": np.zeros(num_particles), "z": np.zeros((num_particles, NUM_ROWS, 2))}


@pytest.mark.parametrize("kernel", ["mala", "langevin"])
@pytest.mark.parametrize("which", [0, 3])
def test_one_particle_of_one_row_is_told_by_what_it_would_gain(kernel, which):
    # Catches a mean over particles or rows, in which it is lost, a plate's scale, and a particle that no other is compared with.
    particles = clouds()
    particles["z"][which, 2] = [STRAY, 0.0]
    report = reported(particles, kernel)
    told = found(report, GAIN)
    assert told.site == "z"
    assert told.value == pytest.approx(STRAY**2)  # of the precision 2
    assert told.most == pytest.approx(MOST + 2 * MOST_PER_ELEMENT, rel=1e-3)
    assert report.trouble == (told,)
    assert "init_strategy" in told.fix


def test_particles_that_are_all_together_gain_nothing():
    # A cloud that is far out as a whole has no stray; and the worst site is the one that is told.
    particles = clouds()
    particles["z"] += STRAY
    assert found(reported(particles), GAIN).value == 0
    particles["w"][0] = 1e15
    assert found(reported(particles), GAIN).site == "w"
    assert found(reported(particles), GAIN).value == pytest.approx(2 * np.log(1e15), rel=1e-3)


def test_samples_of_a_posterior_with_heavy_tails_are_no_strays():
    # Catches a bound by the spread of a cloud: the furthest of these is 5e3 of its median deviations away.
    num = 10_000
    particles = clouds(num)
    particles["w"] = np.tan(np.pi * ((np.arange(num) + 0.5) / num - 0.5))
    particles["z"] = np.sqrt(0.5) * np.random.default_rng(0).standard_normal((num, NUM_ROWS, 2))
    told = found(reported(particles), GAIN)
    assert told.value > 10
    assert told.is_well


def test_a_single_particle_has_no_other_to_be_compared_with():
    particles = clouds(1)
    particles["z"] += STRAY
    assert GAIN not in [finding.quantity for finding in reported(particles).findings]


def test_rounding_of_a_large_log_density_is_no_gain():
    # Catches a bound of 100 nats where a sum of 1e10 in single precision is known to 1e3.
    def model(y):
        loc = numpyro.param("loc", 0.0)
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.factor("constant", -1e10)
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = jnp.zeros(())
    engine = ParticleMMLE(model, optax.sgd(0.0), num_particles=4, kernel="mala")
    report = diagnose(engine.init(KEY, y), engine, y, warn=False)
    told = found(report, GAIN)
    assert told.is_well


def test_a_subsampled_plate_tells_a_stray_of_its_batch():
    y = jnp.zeros((NUM_ROWS, 2))

    def model(y):
        numpyro.param("loc", 0.0)
        with numpyro.plate("rows", NUM_ROWS, subsample_size=3):
            y = numpyro.subsample(y, 1)
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    engine = ParticleMMLE(model, optax.sgd(0.0), num_particles=NUM_PARTICLES, kernel="mala")
    particles = {"z": jnp.zeros((NUM_PARTICLES, NUM_ROWS, 2)).at[1, :, 0].set(STRAY)}
    told = found(diagnose(engine.init(KEY, y)._replace(particles=particles), engine, y, warn=False), GAIN)
    assert told.value == pytest.approx(STRAY**2)  # without the scale of the plate, 2


def test_a_particle_that_starts_where_no_move_is_accepted_is_warned_of():
    # A noise of 1e-3 where the data say 1 has a curvature of 4e7 in its logarithm, and moves fit the others of the cloud.
    y = jnp.asarray(np.random.default_rng(0).standard_normal(20))

    def model(y):
        loc = numpyro.param("loc", y.mean())
        noise = numpyro.sample("noise", dist.HalfNormal(3.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(loc, noise), obs=y)

    engine = ParticleMMLE(model, optax.sgd(0.0), num_particles=6, kernel="mala")
    state = engine.init(KEY, y)
    good = state._replace(particles={"noise": jnp.zeros(6)})
    bad = state._replace(particles={"noise": jnp.zeros(6).at[2].set(jnp.log(1e-4))})
    assert engine.run(KEY, 100, y, init_state=good, progress_bar=False, report=True).report.is_well
    with pytest.warns(UserWarning, match="site 'noise': nats that a particle would gain at another's place is") as told:
        engine.run(KEY, 100, y, init_state=bad, progress_bar=False, report=True)
    assert len(told) == 1


def test_particles_do_not_start_as_strays():
    # Catches a start that leaves a particle where it was drawn because those of its row, which stand right, are stiff too.
    y = jnp.asarray(np.random.default_rng(0).standard_normal((40, 5)))

    def model(y):
        numpyro.param("loc", 0.0)
        noise = numpyro.sample("noise", dist.HalfNormal(3.0))
        with numpyro.plate("groups", 40, dim=-2):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            with numpyro.plate("obs", 5, dim=-1):
                numpyro.sample("y", dist.Normal(z, noise), obs=y)

    engine = ParticleMMLE(model, optax.sgd(0.0), num_particles=10, kernel="mala")
    gains = [found(diagnose(engine.init(jax.random.key(i), y), engine, y, warn=False), GAIN) for i in range(10)]
    assert all(gain.is_well for gain in gains), [gain.value for gain in gains]
