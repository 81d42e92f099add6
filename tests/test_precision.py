# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Networks of bfloat16 inside energies of float32: what stays float32, and what is told."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO, init_to_sample, init_to_value
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebm import (
    EnergyDistribution,
    ParticleMMLE,
    ScoreMatching,
    SlicedScoreMatching,
    TiltedDistribution,
    find_map,
    negative_phase,
)
from numpyro_ebm.program.run import log_density_terms

Y = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)
COARSE = [jnp.bfloat16, jnp.float16]


def network(params, z, dtype=jnp.bfloat16, last=jnp.float32):
    """Two layers, the second of which can be of another dtype, and 100 on top, which bfloat16 rounds to a multiple of .5."""
    hidden = jnp.tanh(params["w"].astype(dtype) @ z.astype(dtype))
    return params["v"].astype(last) @ hidden.astype(last) + jnp.asarray(100, last)


def weights(dtype=jnp.float32):
    return {"w": jnp.array([[1.0, 0.5], [-0.5, 1.0]], dtype), "v": jnp.array([0.3, -0.2], dtype)}


def model(y, dtype=jnp.float32, last=jnp.float32):
    """Latents of a tilted normal in a plate, seen with noise; ``dtype`` is that of the parameters and of the base."""
    params = numpyro.param("energy", weights(dtype))
    base = dist.Normal(jnp.zeros(2, dtype), jnp.ones(2, dtype)).to_event(1)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(base, lambda params, z: network(params, z, last=last), params=params))
        numpyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


def engine(program, **settings):
    return ParticleMMLE(negative_phase(program, num_chains=4), optax.adam(1e-3), 3, 0.05, **settings)


def floats(tree):
    """The dtypes of all real numbers of a tree."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return {str(leaf.dtype) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}


@pytest.mark.parametrize("kernel", ["langevin", "mala"])
def test_everything_but_the_inside_of_a_network_stays_float32_in_particles(kernel):
    # Catches particles, chains or steps of the dtype that the energy was computed in; and a warning where nothing is wrong.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = engine(model, kernel=kernel).run(jax.random.key(0), 2, Y, progress_bar=False)
    assert floats((result.state, result.losses)) == {"float32"}


def test_everything_but_the_inside_of_a_network_stays_float32_in_svi():
    # Catches the same under NumPyro's own engine.
    program = negative_phase(model, num_chains=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi = SVI(program, AutoNormal(program), optax.adam(1e-3), Trace_ELBO())
        state, loss = svi.update(svi.init(jax.random.key(0), Y), Y)
    assert floats((state.mutable_state, svi.get_params(state), loss)) == {"float32"}


def test_energies_of_a_coarse_network_differ_by_no_more_than_its_inside_is_rounded():
    # Catches an energy rounded with what is added to it: at 100, bfloat16 would tell these events apart by 0 or by .5.
    def differences(dtype):
        tilted = TiltedDistribution(dist.Normal(0, 1).expand([2]).to_event(1), lambda z: network(weights(), z, dtype))
        log_prob = tilted.log_prob(jnp.asarray(Y))
        assert log_prob.dtype == jnp.float32
        return log_prob[1:] - log_prob[:-1]

    np.testing.assert_allclose(differences(jnp.bfloat16), differences(jnp.float32), atol=2e-3)


@pytest.mark.parametrize("dtype", COARSE)
def test_rounded_energy_is_told_with_its_site_and_is_float32_from_there_on(dtype):
    # Catches energies of 8 or 11 digits whose differences moves are accepted by in silence.
    with pytest.warns(UserWarning, match=rf"energy of site 'z' is of {jnp.dtype(dtype).name}, which rounds 100 to a multiple"):
        state = engine(lambda y: model(y, last=dtype)).init(jax.random.key(0), Y)
    assert floats(state) == {"float32"}


def test_events_of_less_than_float32_are_made_float32():
    # Catches a density that is summed over the dimensions of bfloat16 events in bfloat16.
    energy = EnergyDistribution(lambda x: (x**2).sum() / 2, (64,))
    x = jnp.linspace(0, 3, 64).astype(jnp.bfloat16)
    assert energy.log_prob(x).dtype == energy.score(x).dtype == jnp.float32
    np.testing.assert_allclose(energy.log_prob(x), -(np.asarray(x, np.float64) ** 2).sum() / 2, rtol=1e-6)


def test_latents_of_a_coarse_prior_are_float32():
    # Catches particles in which moves of less than 1/256 are lost, and searches as well.
    def coarse(y):
        scale = numpyro.param("scale", 1.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)).to_event(1))
            numpyro.sample("y", dist.Normal(scale * z, 0.5).to_event(1), obs=y)

    start = init_to_value(values={"z": jnp.zeros((6, 2), jnp.bfloat16)})
    for strategy in (init_to_sample, start):
        state = ParticleMMLE(coarse, optax.adam(1e-3), 3, 0.05, init_strategy=strategy).init(jax.random.key(0), Y)
        assert floats(state) == {"float32"}
    found = find_map(jax.random.key(0), coarse, {"scale": jnp.ones(())}, Y, num_starts=1, num_steps=200, init_strategy=start)
    assert found.latents["z"].dtype == jnp.float32


def test_rounded_density_of_a_site_is_told_with_its_name():
    # Catches a likelihood of bfloat16 data, which a sum of a thousand pixels would round to a multiple of 4.
    def coarse(y):
        scale = numpyro.param("scale", 1.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.Normal(0, scale).expand([2]).to_event(1))
            loc, noise = z.astype(jnp.bfloat16), jnp.asarray(0.5, jnp.bfloat16)
            numpyro.sample("y", dist.Normal(loc, noise).to_event(1), obs=y.astype(jnp.bfloat16))

    with pytest.warns(UserWarning, match="site 'y': its log density is of bfloat16, .* give its data or its parameters as float32"):
        ParticleMMLE(coarse, optax.adam(1e-3), 3, 0.05).init(jax.random.key(0), Y)
    with pytest.warns(UserWarning, match="site 'y'"):
        terms, _ = log_density_terms(coarse, (Y,), {}, jax.random.key(0), data={"scale": 1.0})
    assert floats(terms) == {"float32"}


def test_parameters_in_which_steps_are_lost_are_told_by_every_engine():
    # Catches weights of bfloat16, which Adam at 1e-3 does not move.
    with pytest.warns(UserWarning, match="param 'energy' is of bfloat16: a step of less than 0.0039"):
        engine(lambda y: model(y, jnp.bfloat16)).init(jax.random.key(0), Y)

    def visible(y):
        params = numpyro.param("energy", weights(jnp.bfloat16))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", EnergyDistribution(network, (2,), params=params), obs=y)

    with pytest.warns(UserWarning, match="param 'energy' is of bfloat16"):
        ScoreMatching(visible, optax.adam(1e-3), SlicedScoreMatching()).init(jax.random.key(0), Y)


def test_float64_network_makes_float64_particles_and_chains_under_x64():
    # Catches float32 made of what is finer.
    with jax.enable_x64(True):
        double = lambda y: model(y, jnp.float64, jnp.float64)  # noqa: E731
        state = engine(double).init(jax.random.key(0), Y.astype(np.float64))
    assert floats((state.particles, state.params, state.mutable_state["z/chains"]["x"])) == {"float64"}
