# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Weighted persistent chains: right whatever the kernel, and log Z along the way."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import (
    MALA,
    BaseMeasure,
    BernoulliRBM,
    BlockGibbs,
    EnergyDistribution,
    ParticleMMLE,
    TiltedDistribution,
    UnadjustedLangevin,
    Weighted,
    diagnose,
    log_normalizer,
    negative_phase,
    to_inference_data,
)
from numpyro_ebm.samplers import Sampler
from numpyro_ebm.weights import normalized_weights, systematic

KEY = jax.random.key(0)
STANDARD = dist.Normal(0, 1)
STANDING = MALA(num_steps=0, num_jumps=0)  # the identity, which leaves every density as it is
X = jnp.zeros(2)


@dataclass(frozen=True)
class Exact(Sampler):
    """Independent samples of N(tilt, 1), the tilt read from the target."""

    def run(self, rng_key, target, state):
        x = state.position
        tilt = jax.grad(lambda x: target(x).sum())(jnp.zeros_like(x))
        return state._replace(position=tilt + jax.random.normal(rng_key, x.shape))


def tilted(x):
    """log Z is tilt^2 / 2, and the distribution N(tilt, 1)."""
    tilt = numpyro.param("tilt", 0.0)
    numpyro.sample("x", TiltedDistribution(STANDARD, lambda x: -tilt * x), obs=x)


def along(model, phase, path, *args, site="x", param="tilt", key=KEY):
    """The chains after updates at the parameters of a path."""
    name, state = f"{site}/chains", {}
    for i, value in enumerate(path):
        data = {param: value, **({} if i == 0 else {name: state})}
        with trace() as sites, seed(rng_seed=jax.random.fold_in(key, i)), substitute(data=data):
            phase(*args)
        state = sites[name]["value"]
    return {name: state}


def ran(model, phase, path, *args, **kwargs):
    return jax.jit(lambda path: along(model, phase, path, *args, **kwargs))(jnp.asarray(path))


def mean_of(state, size):
    weights = normalized_weights(state["x/chains"]["log_weight"][:size])
    return (weights * state["x/chains"]["x"][:size]).sum(0)


@pytest.mark.parametrize("sampler", [STANDING, Exact(), MALA(num_steps=2)], ids=["standing", "exact", "MALA"])
def test_mean_and_log_normalizer_are_right_at_the_end_of_a_path_whatever_the_kernel(sampler):
    # Catches weights of the moved chain: with exact moves log Z would be .5 + 5 * .2^2 / 2 = .6, and the mean of standing chains 0.
    n = 20_000
    phase = negative_phase(tilted, num_chains=n, sampler=sampler, weights=Weighted(resample_below=0.01))
    state = ran(tilted, phase, np.linspace(0, 1, 6), X)
    found = phase.log_normalizer(state)["x"]
    # standing chains are importance samples of N(0, 1), whose weights have variance e - 1; the others have less
    assert found.log_normalizer == pytest.approx(0.5, abs=4.5 * np.sqrt((np.e - 1) / n))
    assert float(found.standard_error) < 1.2 * np.sqrt((np.e - 1) / n)
    assert mean_of(state, n) == pytest.approx(1.0, abs=4.5 * np.sqrt(2 * np.e / n))
    if sampler is STANDING:
        assert state["x/chains"]["num_resampled"] == 0
        assert float(found.standard_error) == pytest.approx(np.sqrt((np.e - 1) / n), rel=0.1)
        assert float(found.effective_sample_size) == pytest.approx(n / np.e, rel=0.1)


def test_chains_are_resampled_when_they_are_worth_too_few():
    # Catches weights that are kept with the resampled chains or lost for log Z, and sites that resample together.
    n = 20_000
    phase = negative_phase(tilted, num_chains=n, sampler=STANDING, weights=Weighted(resample_below=0.5))
    state = ran(tilted, phase, [0.0, 1.0, 1.1], X)
    chains = state["x/chains"]
    assert chains["num_resampled"] == 1  # after the first step exp(-1) of them is left
    assert mean_of(state, n) == pytest.approx(1.1, abs=4.5 * np.sqrt(2 * np.e / n))
    assert phase.log_normalizer(state)["x"].log_normalizer == pytest.approx(1.1**2 / 2, abs=4.5 * np.sqrt(np.e / n))
    assert len(np.unique(chains["x"])) < n


def test_resampling_takes_each_as_often_as_it_weighs():
    # Catches multinomial noise, and columns of a batch that share their indices.
    weights = normalized_weights(jax.random.normal(KEY, (50, 3)))
    for key in (None, jax.random.key(1)):
        index = systematic(key, weights)
        counts = np.stack([np.bincount(column, minlength=50) for column in np.asarray(index).T], 1)
        assert (abs(counts - 50 * weights) < 1 + 1e-4).all()
        assert index.shape == (50, 3)


def test_chains_are_annealed_to_the_first_energy():
    # Catches one weighing from the base to an energy far from it: from N(0, 1) to N(4, 1) one in exp(16) samples would count.
    phase = negative_phase(tilted, num_chains=4000, weights=Weighted())
    state = ran(tilted, phase, [4.0], X)
    found = phase.log_normalizer(state)["x"]
    assert found.effective_sample_size > 1000
    assert abs(found.log_normalizer - 8.0) < 4.5 * found.standard_error < 0.2
    assert mean_of(state, 4000) == pytest.approx(4.0, abs=0.15)


def test_the_normalizer_of_a_machine_starts_from_the_uncoupled_one():
    # Catches a constant that is left out: the path of a machine does not begin at a normalized density.
    weights = jax.random.normal(jax.random.key(3), (4, 3))

    def model(v):
        scale = numpyro.param("scale", 1.0)
        numpyro.sample("v", BernoulliRBM(scale * weights, jnp.array([0.5, -0.5, 1.0, 0.0]), jnp.ones(3)), obs=v)

    phase = negative_phase(model, num_chains=2000, weights=Weighted(), sampler=BlockGibbs(1))
    state = ran(model, phase, [0.5, 1.0, 1.2], jnp.ones((1, 4), int), site="v", param="scale")
    exact = log_normalizer(BernoulliRBM(1.2 * weights, jnp.array([0.5, -0.5, 1.0, 0.0]), jnp.ones(3))).log_normalizer
    found = phase.log_normalizer(state)["v"]
    assert abs(found.log_normalizer - exact) < 4.5 * found.standard_error < 0.2


def test_stacks_have_weights_of_their_own():
    # Catches one weight for a row of chains of several energies.
    def model(x):
        tilt = numpyro.param("tilt", jnp.zeros(2))
        numpyro.sample("x", TiltedDistribution(STANDARD, lambda t, x: -t * x, params=tilt, batch_shape=(2,)), obs=x)

    phase = negative_phase(model, num_chains=20_000, sampler=STANDING, weights=Weighted(resample_below=0.6))
    state = ran(model, phase, [[0.0, 0.0], [0.5, -1.0]], X)
    np.testing.assert_allclose(phase.log_normalizer(state)["x"].log_normalizer, [0.125, 0.5], atol=0.05)
    np.testing.assert_allclose(mean_of(state, 20_000), [0.5, -1.0], atol=0.08)
    np.testing.assert_array_equal(state["x/chains"]["num_resampled"], [[0, 1]])


def test_monitors_know_log_z_that_the_chains_that_teach_have_bent():
    # Catches monitors in the gradient. Exact chains, N = 100, steps of .1: log Z of those that teach is too low by .1 / 100 at each
    # of 200 steps, .2 in all; the two have spreads of about .1 over runs.
    phase = negative_phase(tilted, num_chains=100, sampler=Exact(), weights=Weighted(num_monitor_chains=100))
    svi = SVI(phase, lambda x: None, optax.sgd(0.1), Trace_ELBO())

    def error(key):
        x = jnp.array(0.5)
        state = jax.lax.scan(lambda state, _: svi.update(state, x), svi.init(key, x), length=199)[0]
        tilt = svi.get_params(state)["tilt"]  # of the chains after the next update
        state = svi.update(state, x)[0]
        chains = state.mutable_state["x/chains"]
        taught = {**chains, "log_weight": chains["log_weight"][:100], "spent_variance": chains["spent_variance"][:1]}
        found = phase.log_normalizer(state)["x"], Weighted().log_normalizer(taught, 100)
        return jnp.stack([estimate.log_normalizer - tilt**2 / 2 for estimate in found])

    monitors, taught = np.asarray(jax.jit(jax.vmap(error))(jax.random.split(KEY, 300))).T
    assert abs(monitors.mean()) < 0.03
    assert taught.mean() == pytest.approx(-0.2, abs=0.05)


def two_modes(y):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        fn = TiltedDistribution(dist.Normal(0, 3), lambda x: 8 * (abs(x) - 2) ** 2 - tilt * jnp.tanh(x) / 2)
        numpyro.sample("y", fn, obs=y)


def test_weights_of_modes_are_learned_by_chains_that_never_cross():
    # Catches weights that are not used in the gradient: the tilt then runs away from any start. Three quarters of the data, and of
    # exp(tilt tanh(2)) in its logit, are on the right.
    sign, spread = jax.random.bernoulli(KEY, 0.75, (1000,)), jax.random.normal(jax.random.key(1), (1000,))
    y = jnp.where(sign, 2.0, -2.0) + 0.25 * spread
    phase = negative_phase(two_modes, num_chains=500, sampler=MALA(num_jumps=0), weights=Weighted())
    svi = SVI(phase, lambda y: None, optax.adam(optax.cosine_decay_schedule(0.05, 600)), Trace_ELBO())

    def fit(key):
        return jax.lax.scan(lambda state, _: svi.update(state, y), svi.init(key, y), length=600)[0]

    state = jax.jit(jax.vmap(fit))(jax.random.split(jax.random.key(2), 5))
    learned = 1 / (1 + np.exp(-np.asarray(svi.optim.get_params(state.optim_state)["tilt"]) * np.tanh(2.0)))
    np.testing.assert_allclose(learned, sign.mean(), atol=0.05)


def uneven(size=400, **settings):
    """Standing chains of N(0, 1) that weigh as N(1, 1), the parameters of which they are, and their handler."""
    phase = negative_phase(tilted, num_chains=size, sampler=STANDING, weights=Weighted(resample_below=0.01, **settings))
    return phase, ran(tilted, phase, [0.0, 1.0], X)


def test_readers_of_chains_resample_them():
    # Catches weighted chains that are read as they stand, with the mean of their start; and weights that are used twice.
    phase, state = uneven()
    assert abs(state["x/chains"]["x"].mean()) < 4.5 / np.sqrt(400)
    draws, after = phase.sample_chains(KEY, {"tilt": 1.0}, state, 3, X)
    shown = to_inference_data(state)["prior"]["x"].values
    for x in (draws["x"], shown):
        assert x.mean() == pytest.approx(1.0, abs=4.5 * np.sqrt(2 * np.e / 400))
    np.testing.assert_array_equal(draws["x"][:, 0], draws["x"][:, 2])
    assert (after["x/chains"]["log_weight"] == after["x/chains"]["log_weight"][0]).all()
    before, now = (phase.log_normalizer(s)["x"] for s in (state, after))
    np.testing.assert_allclose(before.log_normalizer, now.log_normalizer, rtol=1e-5)
    np.testing.assert_allclose(before.standard_error, now.standard_error, rtol=1e-4)


def test_monitors_are_samples_too():
    phase, state = uneven(num_monitor_chains=100)
    draws, _ = phase.sample_chains(KEY, {"tilt": 1.0}, state, 1, X)
    assert draws["x"].shape == (500, 1)
    # Catches monitors that are resampled from those that teach, whose errors they would share.
    assert set(np.asarray(draws["x"][400:, 0])) <= set(np.asarray(state["x/chains"]["x"][400:]))
    assert draws["x"][400:].mean() == pytest.approx(1.0, abs=4.5 * np.sqrt(2 * np.e / 100))


def test_weighted_chains_are_diagnosed():
    phase = negative_phase(tilted, num_chains=300, weights=Weighted())
    svi = SVI(phase, lambda x: None, optax.adam(0.02), Trace_ELBO())
    assert diagnose(svi.run(KEY, 20, X, progress_bar=False), phase, X).is_well


def test_particles_are_learned_with_weighted_chains():
    # Catches an engine that drops the weights; y ~ N(tilt, 2) has its maximum at the mean of y.
    def model(y):
        tilt = numpyro.param("tilt", 0.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -tilt * z))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    y = 1.5 + jnp.sqrt(2.0) * jax.random.normal(KEY, (200,))
    phase = negative_phase(model, num_chains=500, sampler=MALA(num_steps=2), weights=Weighted(num_monitor_chains=500))
    result = ParticleMMLE(phase, optax.adam(0.02), num_particles=10, step_size=0.1).run(KEY, 600, y, progress_bar=False)
    assert result.params["tilt"] == pytest.approx(float(y.mean()), abs=4.5 / np.sqrt(500))
    found = phase.log_normalizer(result)["z"]
    assert found.log_normalizer == pytest.approx(float(result.params["tilt"]) ** 2 / 2, abs=0.1 + 4.5 * float(found.standard_error))


def test_log_z_is_not_told_of_chains_that_were_told_where_to_start():
    phase = negative_phase(tilted, num_chains=50, weights=Weighted(), init_chains={"x": jnp.ones(50)})
    assert np.isnan(phase.log_normalizer(ran(tilted, phase, [1.0, 1.1], X))["x"].log_normalizer)


def flat(x):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", 2):
        x = numpyro.sample("x", BaseMeasure(), obs=x)
        numpyro.factor("energy", -precision * x**2 / 2)


def narrow(x):
    depth = numpyro.param("tilt", 1.0)
    fn = EnergyDistribution(lambda x: depth * x**2, initial=dist.Uniform(-1, 1))
    numpyro.sample("x", fn, obs=x)


REFUSED = {
    "a narrow start": (lambda: negative_phase(narrow, weights=Weighted()), "site 'x': its chains start from Uniform"),
    "unadjusted": (
        lambda: negative_phase(tilted, sampler=UnadjustedLangevin(), weights=Weighted()),
        "site 'x': UnadjustedLangevin",
    ),
    "a field": (
        lambda: negative_phase(flat, weights=Weighted()),
        "site 'random_field': weights are for the chains of energy sites",
    ),
    "short runs": (lambda: negative_phase(tilted, persistent=False, weights=Weighted()), "persistent=True"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_carry_weights_is_refused(case):
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words), seed(rng_seed=0):
        make()(X)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_monitor_chains=1"):
        Weighted(num_monitor_chains=1)
    with pytest.raises(ValueError, match="resample_below"):
        Weighted(resample_below=1.5)
    with pytest.raises(TypeError, match="weights must be"):
        negative_phase(tilted, weights=True)
    with pytest.raises(ValueError, match="only weighted chains know log Z"):
        negative_phase(tilted).log_normalizer({})


def test_a_state_without_weights_does_not_go_on_with_them():
    # Catches weights of chains that were never weighed, or an error of a dictionary.
    plain, weighted = negative_phase(tilted, num_chains=10), negative_phase(tilted, num_chains=10, weights=Weighted())
    state = along(tilted, plain, [0.0], X)
    with pytest.raises(ValueError, match=r"site 'x': the state keeps .* Use the same sampler and weights"), seed(rng_seed=0):
        substitute(weighted, data={"tilt": 0.0, **state})(X)


def test_a_positive_energy_is_weighed_in_its_own_space():
    # Catches the Jacobian of the chains in one of two densities: a Gamma(2, 1) tilted to Gamma(2, 1 + rate), Z = (1 + rate)^-2.
    def model(x):
        rate = numpyro.param("rate", 1.0)
        numpyro.sample("x", TiltedDistribution(dist.Gamma(2.0, 1.0), lambda x: rate * x), obs=x)

    phase = negative_phase(model, num_chains=4000, weights=Weighted())
    found = phase.log_normalizer(ran(model, phase, [1.0, 1.5], X + 1, param="rate"))["x"]
    assert abs(found.log_normalizer + 2 * np.log(2.5)) < 4.5 * found.standard_error < 0.1


def test_a_flat_energy_is_weighed_from_where_it_starts():
    def model(x):
        precision = numpyro.param("precision", 1.0)
        numpyro.sample("x", EnergyDistribution(lambda x: precision * x**2 / 2, initial=dist.Normal(0, 1.5)), obs=x)

    phase = negative_phase(model, num_chains=4000, weights=Weighted())
    found = phase.log_normalizer(ran(model, phase, [1.0, 2.0], X, param="precision"))["x"]
    assert abs(found.log_normalizer - 0.5 * np.log(np.pi)) < 4.5 * found.standard_error < 0.15
