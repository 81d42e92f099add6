# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Jumps of particles: posteriors with modes far apart are exact, and the weights that a prior learns for them are right."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import mask
from scipy.optimize import minimize_scalar

from numpyro_ebm import ParticleMMLE, TiltedDistribution, diagnose, negative_phase

KEY = jax.random.key(3)
STILL = optax.sgd(1e-30)  # parameters that stay where they are
Y = jnp.array([-1.0, 0.0, 0.4, 2.0])
GRID = np.linspace(-7, 7, 2801)
BARRIER = 8.0  # e^-8 of the density is left between the modes at -1.5 and 1.5


def _wells(z):
    return BARRIER * ((z / 1.5) ** 2 - 1) ** 2


def _model(y, batch_size=None, reference=None):
    tilt = numpyro.param("tilt", 0.3)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as index:
        prior = TiltedDistribution(dist.Normal(0.8, 2), lambda z: _wells(z) - tilt * z, reference=reference)
        z = numpyro.sample("z", prior)
        numpyro.sample("y", dist.Normal(z, 2.0), obs=y[index])


def _seen_well(y):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0.8, 2), lambda z: _wells(z) - tilt * z))
        numpyro.sample("y", dist.Normal(z, 1.5), obs=y)


def _positive(y, batch_size=None):
    """The same latent as log z, with a base on half a line: its Jacobian counts on both sides of the ratio."""
    tilt = numpyro.param("tilt", 0.3)
    with numpyro.plate("data", len(y), subsample_size=batch_size) as index:
        z = numpyro.sample("z", TiltedDistribution(dist.LogNormal(0.8, 2), lambda z: _wells(jnp.log(z)) - tilt * jnp.log(z)))
        numpyro.sample("y", dist.Normal(jnp.log(z), 2.0), obs=y[index])


def _in_the_plane(y, batch_size=None):
    """The same latent as the first of two elements, in two plates, of which one has a single row."""
    tilt = numpyro.param("tilt", 0.3)
    base = dist.Normal(0.8, jnp.array([2.0, 1.0])).to_event(1)
    with numpyro.plate("one", 1, dim=-2), numpyro.plate("data", len(y), subsample_size=batch_size, dim=-1) as index:
        z = numpyro.sample("z", TiltedDistribution(base, lambda z: _wells(z[0]) - tilt * z[0]))
        numpyro.sample("y", dist.Normal(z[..., 0], 2.0), obs=y[index][None])


def _log_prior(tilt):
    return -_wells(GRID) + tilt * GRID - (GRID - 0.8) ** 2 / 8


def _right(y, tilt):
    """The probability that z > 0, of the posterior of every y, by quadrature."""
    density = np.exp(_log_prior(tilt) - (np.asarray(y)[:, None] - GRID) ** 2 / 8)
    return density[:, GRID > 0].sum(1) / density.sum(1)


def _from_the_left(engine, num_steps, **settings):
    """Particles after so many steps from the left mode."""
    state = engine.init(KEY, Y, **settings)
    state = state._replace(particles={"z": jnp.full_like(state.particles["z"], -1.5)})
    return np.asarray(
        engine.run(KEY, num_steps, Y, init_state=state, progress_bar=False, report=False, **settings).state.particles["z"]
    )


CASES = {
    "a line": (_model, {}, lambda z: z),
    "a wide reference": (_model, {"reference": dist.StudentT(3.0, 0.8, 3.0)}, lambda z: z),
    "a batch": (_model, {"batch_size": 2}, lambda z: z),
    "half a line": (_positive, {}, lambda z: z),  # particles are unconstrained: log z
    "a plane, two plates": (_in_the_plane, {}, lambda z: z[:, 0, :, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_modes_of_every_posterior_have_their_weights(case):
    """Guards against a ratio without the reference, the prior, the likelihood or a Jacobian."""
    model, settings, of_interest = CASES[case]
    engine = ParticleMMLE(model, STILL, 4000, kernel="mala", num_jumps=3)
    found, exact = of_interest(_from_the_left(engine, 100 if "batch_size" in settings else 60, **settings)) > 0, _right(Y, 0.3)
    np.testing.assert_array_less(abs(found.mean(0) - exact), 4.5 * np.sqrt(exact * (1 - exact) / 4000))


@pytest.mark.parametrize("settings", [{"num_moves": 2, "average_moves": True}, {"order": "gauss_seidel"}])
def test_jumps_go_with_every_order_of_moves(settings):
    engine = ParticleMMLE(_model, STILL, 2000, kernel="mala", num_jumps=3, **settings)
    found, exact = _from_the_left(engine, 60) > 0, _right(Y, 0.3)
    np.testing.assert_array_less(abs(found.mean(0) - exact), 4.5 * np.sqrt(exact * (1 - exact) / 2000))


def test_without_jumps_particles_stay_in_their_mode():
    assert (_from_the_left(ParticleMMLE(_model, STILL, 50, kernel="mala", num_jumps=0), 60) < 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_learns_the_weights_of_modes_that_moves_do_not_cross_between(seed):
    """Against the maximum of the likelihood by quadrature; without jumps it is the weight of the start that is learned."""
    rng = np.random.default_rng(seed)
    prior = np.exp(_log_prior(0.1))
    y = rng.choice(GRID, size=500, p=prior / prior.sum()) + 1.5 * rng.normal(size=500)
    likelihood = np.exp(-((y[:, None] - GRID) ** 2) / 4.5)

    def log_likelihood(tilt):
        density = np.exp(_log_prior(tilt))
        return np.log(likelihood @ density / density.sum()).sum()

    def weight(tilt):
        density = np.exp(_log_prior(tilt))
        return density[GRID > 0].sum() / density.sum()

    best = minimize_scalar(lambda tilt: -log_likelihood(tilt), bounds=(-2, 2), method="bounded").x

    phase = negative_phase(_seen_well, num_chains=1000)
    engine = ParticleMMLE(phase, optax.adam(0.02), num_particles=20, kernel="mala", average_iterates=True)
    learned = engine.run(jax.random.key(seed), 600, jnp.asarray(y, jnp.float32), progress_bar=False, report=False).params["tilt"]
    assert abs(weight(float(learned)) - weight(best)) < 0.03


@pytest.mark.parametrize("settings", [{"kernel": "mala", "num_jumps": 0}, {"kernel": "mala"}, {"step_size": 0.01}])
def test_a_report_tells_particles_that_do_not_cross(settings):
    """Of which those that make jumps are not."""
    y = 1.5 * jnp.where(jnp.arange(500) < 350, -1.0, 1.0) + 1.5 * jax.random.normal(KEY, (500,))
    engine = ParticleMMLE(_seen_well, optax.adam(0.03), num_particles=20, **settings)
    state = engine.run(KEY, 150, y, progress_bar=False, report=False).state
    report = diagnose(state, engine, y, warn=False)
    (found,) = [finding for finding in report.findings if finding.quantity == "distance of particles from posterior"]
    assert found.is_told
    assert found.is_well == (settings == {"kernel": "mala"}), report
    assert found.is_well or ("num_jumps" in found.fix) == ("num_jumps" in settings)


def test_one_jump_for_every_ten_moves():
    assert ParticleMMLE(_model, STILL, 2, kernel="mala").num_jumps == 1
    assert ParticleMMLE(_model, STILL, 2, kernel="mala", num_moves=25).num_jumps == 3
    assert ParticleMMLE(_model, STILL, 2, 0.1).num_jumps == 0
    with pytest.raises(ValueError, match=r"num_jumps=2 goes with kernel='mala'"):
        ParticleMMLE(_model, STILL, 2, 0.1, num_jumps=2)
    with pytest.raises(ValueError, match="num_jumps"):
        ParticleMMLE(_model, STILL, 2, kernel="mala", num_jumps=-1)


def _normal_prior(y):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(loc, 1)), 1), obs=y)


def _masked(y):
    with mask(mask=jnp.arange(len(y)) > 0):
        _model(y)


@pytest.mark.parametrize("model", [_normal_prior, _masked])
def test_what_has_nothing_to_jump_from_moves_as_without_jumps(model):
    """No energy, and an energy that some rows do not have."""
    engines = (ParticleMMLE(model, STILL, 3, kernel="mala", num_jumps=num_jumps) for num_jumps in (2, 0))
    with_jumps, without = (_from_the_left(engine, 3) for engine in engines)
    np.testing.assert_array_equal(with_jumps, without)


def _lies(y):
    """The plate says that rows are independent, and the scale of each is of all."""
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 2), lambda z: -tilt * z))
        numpyro.sample("y", dist.Normal(z, 1 + 0.1 * (z**2).sum()), obs=y)


def _sums(y):
    """A site outside the plate depends on all rows, which then jump together or not at all."""
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 2), lambda z: -tilt * z))
    numpyro.sample("y", dist.Normal(z.sum(), 3.0), obs=y.sum())


@pytest.mark.parametrize(("model", "is_told"), [(_lies, False), (_sums, True)])
def test_rows_that_depend_on_each_other_are_seen_in_the_report(model, is_told):
    engine = ParticleMMLE(model, STILL, 200, 0.01)
    state = engine.run(KEY, 50, Y, progress_bar=False, report=False).state
    (found,) = [
        each for each in diagnose(state, engine, Y, warn=False).findings if each.quantity == "distance of particles from posterior"
    ]
    assert found.is_told == is_told, found
    assert found.is_told or found.fix == "the rows of its plates depend on each other"
