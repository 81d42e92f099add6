# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""negative_phase: the gradient it adds, exactly where chains are fixed and within Monte Carlo error where they move."""

from contextlib import nullcontext
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module, random_eqx_module
from numpyro.distributions import constraints
from numpyro.handlers import lift, mask, scale, scope, seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from numpyro.infer.util import log_density

from numpyro_ebm import (
    MALA,
    EnergyDistribution,
    NormalizerError,
    TiltedDistribution,
    UnadjustedLangevin,
    negative_phase,
    unnormalized,
)
from numpyro_ebm.samplers import Sampler

STANDARD = dist.Normal(0, 1)
STILL = MALA(num_steps=0)  # chains that stay where init_chains puts them make the added gradient a plain number
CHAINS = jnp.array([-1.0, 0.5, 2.0, 4.0])  # mean 1.375


def _gradient(model, params, latents, *args, key=0):
    """The gradient of the model's log density in its parameters."""

    def log_joint(params):
        return log_density(seed(model, jax.random.key(key)), args, {}, {**params, **latents})[0]

    return jax.grad(log_joint)(params)


def _tilted():
    """The linear tilt: E = -tilt z over N(0, 1), so the prior is N(tilt, 1) and log Z = tilt^2 / 2."""
    tilt = numpyro.param("tilt", 0.0)
    return TiltedDistribution(STANDARD, lambda z: -tilt * z)


def _in_plate(y, subsample_size=None, wrap=lambda fn: fn):
    with numpyro.plate("data", len(y), subsample_size=subsample_size) as index:
        z = numpyro.sample("z", wrap(_tilted()))
        numpyro.sample("y", dist.Normal(z, 1), obs=y[index])


def _still(model, site="z", chains=CHAINS):
    return negative_phase(model, num_chains=len(chains), sampler=STILL, init_chains={site: chains})


# ---- The factor, exactly ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_data", [1, 2, 5])
def test_each_latent_in_a_plate_pays_its_own_normalizer(num_data):
    # guards against: one normalizer for the whole plate
    z, y = jnp.arange(num_data) / 4, jnp.zeros(num_data)
    gradient = _gradient(_still(_in_plate), {"tilt": 0.3}, {"z": z}, y)
    np.testing.assert_allclose(gradient["tilt"], z.sum() - num_data * CHAINS.mean(), rtol=1e-6)


def test_subsampling_scales_the_normalizer_like_the_site():
    # guards against: a factor outside the plate, which would weigh 1 where the site weighs M / B
    z, y, index = jnp.array([0.4, -0.2]), jnp.zeros(6), jnp.array([1, 4])
    gradient = _gradient(_still(_in_plate), {"tilt": 0.3}, {"z": z, "data": index}, y, 2)
    np.testing.assert_allclose(gradient["tilt"], 3 * (z.sum() - 2 * CHAINS.mean()), rtol=1e-6)


def test_subsampled_gradient_averages_to_the_full_one():
    # guards against: a plate scale that is right on average for the site but not for its normalizer
    z, y = jnp.array([0.4, -0.2, 1.0, 2.0]), jnp.zeros(4)
    full = _gradient(_still(_in_plate), {"tilt": 0.3}, {"z": z}, y)["tilt"]
    pairs = [jnp.array([i, j]) for i in range(4) for j in range(i)]
    parts = [_gradient(_still(_in_plate), {"tilt": 0.3}, {"z": z[pair], "data": pair}, y, 2)["tilt"] for pair in pairs]
    np.testing.assert_allclose(np.mean(parts), full, rtol=1e-6)


def test_masked_latents_pay_no_normalizer():
    # guards against: a normalizer for elements that the mask takes out of the model
    observed, z, y = jnp.array([True, False, True]), jnp.array([0.4, 7.0, 1.0]), jnp.zeros(3)
    expected = 1.4 - 2 * CHAINS.mean()
    inner = _still(lambda y: _in_plate(y, wrap=lambda fn: fn.mask(observed)))
    outer = mask(_still(_in_plate), mask=observed)
    for model in (inner, outer):
        np.testing.assert_allclose(_gradient(model, {"tilt": 0.3}, {"z": z}, y)["tilt"], expected, rtol=1e-6)


def test_scale_handler_weighs_the_normalizer():
    # guards against: annealed or weighted models whose normalizer is not weighed
    z, y = jnp.array([0.4, -0.2]), jnp.zeros(2)
    gradient = _gradient(scale(_still(_in_plate), scale=0.5), {"tilt": 0.3}, {"z": z}, y)
    np.testing.assert_allclose(gradient["tilt"], 0.5 * (z.sum() - 2 * CHAINS.mean()), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda fn: fn.expand([2, 3]).to_event(2), lambda fn: fn.expand([2, 3])], ids=["event", "batch"])
def test_expanded_site_outside_a_plate_pays_once_per_element(wrap):
    # guards against: a normalizer that follows the plates instead of the site's own shape
    def model():
        numpyro.sample("z", wrap(_tilted()))

    gradient = _gradient(_still(model), {"tilt": 0.3}, {"z": jnp.ones((2, 3))})
    np.testing.assert_allclose(gradient["tilt"], 6 - 6 * CHAINS.mean(), rtol=1e-6)


def test_observed_batch_without_a_plate_pays_once_per_observation():
    # guards against: one normalizer for all observations where the plate is left out, as NumPyro allows
    def model(z):
        numpyro.sample("z", _tilted(), obs=z)

    gradient = _gradient(_still(model), {"tilt": 0.3}, {}, jnp.ones((5, 2)))
    np.testing.assert_allclose(gradient["tilt"], 10 - 10 * CHAINS.mean(), rtol=1e-6)


def test_nested_plates_multiply():
    # guards against: the factor being broadcast over the inner plate alone
    def model():
        fn = _tilted()
        with numpyro.plate("rows", 4, subsample_size=2, dim=-2), numpyro.plate("columns", 3, dim=-1):
            numpyro.sample("z", fn)

    gradient = _gradient(_still(model), {"tilt": 0.3}, {"z": jnp.zeros((2, 3)), "rows": jnp.array([0, 3])})
    np.testing.assert_allclose(gradient["tilt"], -2 * 6 * CHAINS.mean(), rtol=1e-6)


def test_stack_of_energies_under_a_plate_pays_each_its_own():
    # guards against: averaging the chains of different energies together
    chains = jnp.stack([CHAINS, 10 * CHAINS], axis=1)

    def model():
        tilt = numpyro.param("tilt", jnp.zeros(2))
        with numpyro.plate("energies", 2):
            numpyro.sample("z", TiltedDistribution(STANDARD, lambda a, z: -a * z, params=tilt, batch_shape=(2,)))

    gradient = _gradient(_still(model, chains=chains), {"tilt": jnp.zeros(2)}, {"z": jnp.zeros(2)})
    np.testing.assert_allclose(gradient["tilt"], -chains.mean(0), rtol=1e-6)


def test_several_energy_sites_each_have_their_own_chains_and_gradient():
    # guards against: sites that share a population or a factor
    def model():
        a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
        numpyro.sample("u", TiltedDistribution(STANDARD, lambda z: -a * z))
        numpyro.sample("v", TiltedDistribution(STANDARD, lambda z: -b * z))

    handler = negative_phase(model, num_chains=4, sampler=STILL, init_chains={"u": CHAINS, "v": 2 * CHAINS})
    gradient = _gradient(handler, {"a": 0.0, "b": 0.0}, {"u": 0.0, "v": 0.0})
    np.testing.assert_allclose([gradient["a"], gradient["b"]], [-CHAINS.mean(), -2 * CHAINS.mean()], rtol=1e-6)


def test_learnable_base_is_in_the_normalizer_too():
    # guards against: a factor that holds the energy alone (d log b / d loc at the chains is their mean minus loc)
    def model():
        numpyro.sample("z", TiltedDistribution(dist.Normal(numpyro.param("loc", 0.0), 1), lambda z: z**4))

    gradient = _gradient(_still(model), {"loc": 0.3}, {"z": 1.0})
    np.testing.assert_allclose(gradient["loc"], (1.0 - 0.3) - (CHAINS.mean() - 0.3), rtol=1e-6)


def test_transformed_energy_has_the_normalizer_of_its_base():
    # guards against: chains moved or averaged in the transformed space
    shift = dist.transforms.AffineTransform(5.0, 2.0)

    def model():
        numpyro.sample("z", dist.TransformedDistribution(_tilted(), shift))

    gradient = _gradient(_still(model), {"tilt": 0.3}, {"z": 7.0})
    np.testing.assert_allclose(gradient["tilt"], 1.0 - CHAINS.mean(), rtol=1e-6)


class _Position(NamedTuple):
    position: jax.Array


class _Ascent(Sampler):
    """A user's own sampler, which neither adds noise nor stops gradients."""

    uses_score = True

    def init(self, position, log_prob):
        return _Position(position)

    def run(self, rng_key, log_prob, state):
        return _Position(state.position + 0.7 * jax.grad(lambda x: log_prob(x).sum())(state.position))


@pytest.mark.parametrize("sampler", [UnadjustedLangevin(0.1, 20), MALA(0.5, 20), _Ascent()], ids=lambda s: type(s).__name__)
def test_factor_has_value_zero_and_gradient_of_moving_chains_stops_at_their_positions(sampler):
    # guards against: a gradient that flows through the sampler, or a loss changed in value
    y, params, latents = jnp.zeros(2), {"tilt": 0.7}, {"z": jnp.ones(2)}
    model = negative_phase(_in_plate, num_chains=50, sampler=sampler)

    def log_joint(params):
        log_density_, sites = log_density(seed(model, 0), (y,), {}, {**params, **latents})
        return log_density_, (sites["z/chains"]["value"]["x"], sites["z/log_normalizer"]["fn"].log_factor)

    gradient, (chains, factor) = jax.grad(log_joint, has_aux=True)(params)
    np.testing.assert_array_equal(factor, 0)
    assert chains.mean() > 0.3  # they moved, towards the tilt
    np.testing.assert_allclose(gradient["tilt"], 2 - 2 * chains.mean(), rtol=1e-5)


def test_energy_tilted_by_another_has_one_normalizer_for_both():
    # guards against: the guard of the inner energy holding although the outer one's normalizer has its parameters too
    def model():
        a, b = numpyro.param("a", 0.2), numpyro.param("b", 0.1)
        inner = TiltedDistribution(STANDARD, lambda z: -a * z)
        numpyro.sample("z", TiltedDistribution(inner, lambda z: b * z**2))

    gradient = _gradient(_still(model), {"a": 0.2, "b": 0.1}, {"z": 3.0})
    np.testing.assert_allclose([gradient["a"], gradient["b"]], [3 - CHAINS.mean(), -9 + (CHAINS**2).mean()], rtol=1e-6)


def test_wrapping_twice_adds_the_normalizer_once():
    # guards against: a model wrapped by the user and again by an engine
    model = negative_phase(_still(_in_plate), num_chains=3)
    gradient = _gradient(model, {"tilt": 0.3}, {"z": jnp.ones(1)}, jnp.zeros(1))
    np.testing.assert_allclose(gradient["tilt"], 1 - CHAINS.mean(), rtol=1e-6)


def test_unnormalized_adds_nothing():
    # guards against: the engines' handler paying a normalizer that they supply themselves
    for model in (unnormalized(_in_plate), negative_phase(unnormalized(_in_plate))):
        gradient = _gradient(model, {"tilt": 0.3}, {"z": jnp.ones(2)}, jnp.zeros(2))
        np.testing.assert_allclose(gradient["tilt"], 2.0, rtol=1e-6)


def test_scopes_name_the_chains_once_wherever_they_stand():
    # guards against: a prefix given to the site and again to its chains, which are then not found by name
    def scoped(y):
        with scope(prefix="in"):
            _in_plate(y)

    model = scope(negative_phase(scoped, num_chains=4, sampler=STILL, init_chains={"in/z": CHAINS}), prefix="out")
    sites = trace(seed(model, 0)).get_trace(jnp.zeros(2))
    assert {"out/in/z", "out/in/z/chains", "out/in/z/log_normalizer"} < set(sites)
    np.testing.assert_array_equal(sites["out/in/z/chains"]["value"]["x"], CHAINS)


def test_short_run_chains_start_afresh_and_persistent_ones_go_on():
    # guards against: persistent and short-run being the same thing
    y, params = jnp.zeros(1), {"tilt": 0.0, "z": jnp.zeros(1)}
    state = {"z/chains": {**_chains_of(_still(_in_plate), y), "x": jnp.full(4, 9.0)}}

    def second(persistent):
        handler = negative_phase(_in_plate, num_chains=4, sampler=STILL, init_chains={"z": CHAINS}, persistent=persistent)
        with trace() as sites, seed(rng_seed=1), substitute(data={**params, **state}):
            handler(y)
        return sites["z/chains"]["value"]["x"]

    np.testing.assert_array_equal(second(persistent=True), jnp.full(4, 9.0))
    np.testing.assert_array_equal(second(persistent=False), CHAINS)


def _chains_of(model, *args):
    with trace() as sites, seed(rng_seed=0):
        model(*args)
    return sites["z/chains"]["value"]


# ---- The gradient against quadrature (note A1) --------------------------------------------------------------------------


def _quadrature():
    """f = a x - b x^2/2 + c tanh x over N(0, 1), y | x ~ N(w x, s2): moments of s = (x, -x^2/2, tanh x) on a grid."""
    a, b, c, w, s2, y = 0.3, 0.2, 0.5, 1.1, 0.3, 0.8
    x = np.linspace(-12, 12, 200_001)
    statistics = np.stack([x, -(x**2) / 2, np.tanh(x)])
    log_prior = np.array([a, b, c]) @ statistics - x**2 / 2
    log_posterior = log_prior - (y - w * x) ** 2 / (2 * s2)
    prior, posterior = (np.exp(log_p - log_p.max()) for log_p in (log_prior, log_posterior))
    moments = [(statistics * p).sum(-1) / p.sum() for p in (prior, posterior)]
    return x, posterior, *moments


def test_gradient_of_the_loss_equals_quadrature():
    # guards against: the sign of the normalizer, a wrong distribution of the chains (constants of the note: .1815, .1882, .2090)
    x, posterior, prior_moments, posterior_moments = _quadrature()
    exact = posterior_moments - prior_moments
    np.testing.assert_allclose(exact, [0.1815061, 0.1882431, 0.2089626], atol=1e-6)
    num = 40_000
    draws = np.interp((np.arange(num) + 0.5) / num, np.cumsum(posterior) / posterior.sum(), x)  # stratified: error O(1/num)

    def model():
        a, b, c = (numpyro.param(name, value) for name, value in zip("abc", (0.3, 0.2, 0.5), strict=True))
        fn = TiltedDistribution(STANDARD, lambda x: -(a * x - b * x**2 / 2 + c * jnp.tanh(x)))
        with numpyro.plate("data", num):
            x = numpyro.sample("x", fn)
            numpyro.sample("y", dist.Normal(1.1 * x, np.sqrt(0.3)), obs=jnp.full(num, 0.8))

    handler = negative_phase(model, num_chains=num, sampler=MALA(step_size=0.8, num_steps=100))
    gradient = _gradient(handler, {"a": 0.3, "b": 0.2, "c": 0.5}, {"x": jnp.asarray(draws, jnp.float32)})
    found = np.array([gradient[name] for name in "abc"]) / num
    # sd of the statistics under the prior is at most 1, so the standard error is at most .005; the terms are .2
    np.testing.assert_allclose(found, exact, atol=4.5 * 0.005)


# ---- Fixed points of SVI, as the notes predict them ---------------------------------------------------------------------


def _linear_gaussian_guide(y):
    """The exact family of posteriors of Gaussian priors under y ~ N(z, 1)."""
    weight, bias = numpyro.param("weight", 0.5), numpyro.param("bias", 0.0)
    sd = numpyro.param("sd", 0.7, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("z", dist.Normal(weight * y + bias, sd))


def _fit(model, guide, name, num_steps, y, learning_rate=0.02, loss=None):
    """The mean of a parameter over the last quarter of a run of SVI, which averages the noise of its last iterates."""
    svi = SVI(model, guide, optax.adam(learning_rate), loss or Trace_ELBO())

    def step(state, _):
        state, _ = svi.update(state, y)
        return state, svi.get_params(state)[name]

    state = svi.init(jax.random.key(0), y)
    return jax.jit(lambda state: jax.lax.scan(step, state, length=num_steps)[1])(state)[-num_steps // 4 :].mean(0)


def _warned_of_short_runs():
    # catches short runs that cannot have the right fixed point and say nothing under NumPyro's own SVI
    return pytest.warns(UserWarning, match=r"site 'z', update \d+: the chains restart at every step and keep more than a tenth")


MEAN_ONE = 1.0 + jnp.sqrt(2) * jnp.linspace(-1.7, 1.7, 64)


@pytest.mark.parametrize(("num_steps", "fixed_point"), [(20, 1.3213), (60, 1.0036)])
def test_short_run_fixed_point_of_the_linear_tilt_is_predicted(num_steps, fixed_point):
    # F3: short-run chains of step .1 from N(0, 1) reach alpha (1 - .9^J), so alpha_inf = ybar / (1 - 2 * .9^J), not ybar
    np.testing.assert_allclose(1 / (1 - 2 * 0.9**num_steps), fixed_point, atol=1e-4)
    sampler = UnadjustedLangevin(0.1, num_steps)
    model = negative_phase(_in_plate, num_chains=1000, sampler=sampler, persistent=False)
    # The chains' mean has a standard error of .032 a step; over 250 steps, correlated over about 20, .01
    with _warned_of_short_runs() if num_steps == 20 else nullcontext():  # of .9^20 = .12
        np.testing.assert_allclose(_fit(model, _linear_gaussian_guide, "tilt", 1000, MEAN_ONE), fixed_point, atol=0.05)


def test_short_run_linear_tilt_diverges_where_no_fixed_point_exists():
    # F3: (1 - gamma)^J = .9^5 = .59 >= 1/2: the bias outgrows the gradient and the tilt grows for ever
    model = negative_phase(_in_plate, num_chains=1000, sampler=UnadjustedLangevin(0.1, 5), persistent=False)
    with _warned_of_short_runs():
        assert _fit(model, _linear_gaussian_guide, "tilt", 1000, MEAN_ONE) > 4  # 1 is right


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()], ids=["Trace_ELBO", "TraceMeanField_ELBO"])
def test_persistent_chains_learn_the_exact_tilt(loss):
    # guards against: persistence that loses the chains (short runs of 10 steps would be off); exact answer ybar = 1
    model = negative_phase(_in_plate, num_chains=1000)
    np.testing.assert_allclose(_fit(model, _linear_gaussian_guide, "tilt", 1000, MEAN_ONE, loss=loss), 1.0, atol=0.05)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta])
def test_autoguides_learn_the_tilt(autoguide):
    # guards against: a handler that autoguides cannot trace. AutoDelta maximizes over z, which is exact for the mean too
    y = MEAN_ONE[::8]
    model = negative_phase(_in_plate, num_chains=1000)
    for guide in (autoguide(model), autoguide(_in_plate)) if autoguide is AutoNormal else (autoguide(model),):
        np.testing.assert_allclose(_fit(model, guide, "tilt", 1500, y), y.mean(), atol=0.1)


def _precision_model(y):
    """F4: E = tau x^2 / 2 with no tilt, y ~ N(x, 1); the likelihood is maximal at 1 / tau = S - 1."""
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    fn = EnergyDistribution(lambda x: tau * x**2 / 2, initial=STANDARD)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", fn)
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


VARIANCE_THREE = jnp.tile(jnp.array([-1.0, 1.0]), 32) * jnp.sqrt(3.0)


def _bias_of_ula(tau, variance_of_chain):
    """F4's fixed-point equation at h = 0: S / (s2^2 rho^2) + 1 / rho = variance of the chain, rho = tau + 1 / s2."""
    rho = tau + 1
    return 3 / rho**2 + 1 / rho - variance_of_chain(tau)


@pytest.mark.parametrize(
    ("sampler", "persistent", "fixed_point", "variance_of_chain"),
    [
        (MALA(0.5), True, 0.5, lambda tau: 1 / tau),
        (UnadjustedLangevin(0.1, 10), True, 0.53208, lambda tau: 1 / (tau * (1 - 0.1 * tau / 2))),
        (UnadjustedLangevin(0.2, 10), True, 0.57588, lambda tau: 1 / (tau * (1 - 0.2 * tau / 2))),
        (
            UnadjustedLangevin(0.1, 20),
            False,
            0.40303,
            lambda tau: (1 - 0.1 * tau) ** 40 + 0.2 * (1 - (1 - 0.1 * tau) ** 40) / (1 - (1 - 0.1 * tau) ** 2),
        ),
    ],
    ids=["MALA exact", "ULA h=.1", "ULA h=.2", "short-run ULA J=20"],
)
def test_quadratic_energy_reaches_the_fixed_point_its_sampler_implies(sampler, persistent, fixed_point, variance_of_chain):
    # F4: the learned precision is biased exactly as the chain's stationary (or J-step) variance says; MALA is exact
    np.testing.assert_allclose(_bias_of_ula(fixed_point, variance_of_chain), 0, atol=2e-4)
    model = negative_phase(_precision_model, num_chains=2000, sampler=sampler, persistent=persistent)
    # relative standard error of a variance of 2000 chains is .03 a step, .01 over the average
    with nullcontext() if persistent else _warned_of_short_runs():
        np.testing.assert_allclose(_fit(model, _linear_gaussian_guide, "tau", 1500, VARIANCE_THREE), fixed_point, atol=0.025)


def test_five_short_steps_have_no_fixed_point_and_the_precision_collapses():
    # F4: with J = 5 no precision balances the equation and tau falls towards 0 (at .15 and below here; exact .5)
    model = negative_phase(_precision_model, num_chains=2000, sampler=UnadjustedLangevin(0.1, 5), persistent=False)
    with _warned_of_short_runs():
        assert _fit(model, _linear_gaussian_guide, "tau", 1500, VARIANCE_THREE) < 0.15


def test_observed_energy_site_is_learned_by_maximum_likelihood_on_a_constrained_support():
    # guards against: a missing log-Jacobian in the chains of a positive site. x ~ rate exp(-rate x): rate = 1 / mean
    def model(x):
        rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
        fn = EnergyDistribution(lambda x: rate * x, support=constraints.positive, initial=dist.Exponential(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", fn, obs=x)

    x = jnp.array([0.1, 0.2, 0.3, 0.6])
    handler = negative_phase(model, num_chains=2000)
    np.testing.assert_allclose(_fit(handler, lambda x: None, "rate", 1000, x), 1 / 0.3, rtol=0.05)


class _Flip(Sampler):
    """Metropolis on bits: a sampler for discrete events, which uses no score."""

    def init(self, position, log_prob):
        return _Position(position)

    def run(self, rng_key, log_prob, state):
        def step(s, key):
            site_key, accept_key = jax.random.split(key)
            bit = jax.random.randint(site_key, (len(s),), 0, s.shape[-1])
            flipped = s ^ jax.nn.one_hot(bit, s.shape[-1], dtype=s.dtype)
            accept = jnp.log(jax.random.uniform(accept_key, (len(s),))) < log_prob(flipped) - log_prob(s)
            return jnp.where(accept[:, None], flipped, s), None

        return _Position(jax.lax.scan(step, state.position, jax.random.split(rng_key, 10))[0])


def test_discrete_energy_is_learned_with_a_sampler_of_the_users_own():
    # guards against: discrete sites taken to unconstrained space, or a sampler per site ignored. Bits with P(1) = .75, .5
    x = jnp.array([[1, 1], [1, 0], [1, 1], [0, 0]])
    fair = dist.Bernoulli(0.5).expand([2]).to_event(1)

    def model(x):
        k = numpyro.param("k", jnp.zeros(2))
        fn = EnergyDistribution(lambda s: -(k * s).sum(), (2,), support=constraints.boolean, initial=fair)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", fn, obs=x)

    handler = negative_phase(model, num_chains=2000, sampler={"x": _Flip()})
    np.testing.assert_allclose(_fit(handler, lambda x: None, "k", 1000, x), jax.scipy.special.logit(x.mean(0)), atol=0.06)


# ---- The state ----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_state_of_the_last():
    # guards against: chains that restart with every run. Two runs of 5 steps equal one of 10 bit for bit
    model = negative_phase(_in_plate, num_chains=20)
    svi = SVI(model, _linear_gaussian_guide, optax.adam(0.02), Trace_ELBO())
    whole = svi.run(jax.random.key(0), 10, MEAN_ONE, progress_bar=False)
    half = svi.run(jax.random.key(0), 5, MEAN_ONE, progress_bar=False)
    rest = svi.run(jax.random.key(9), 5, MEAN_ONE, progress_bar=False, init_state=half.state)
    assert whole.state.mutable_state["z/chains"]["num_updates"] == 11  # one more from init
    jax.tree.map(np.testing.assert_array_equal, rest.state.mutable_state, whole.state.mutable_state)
    np.testing.assert_array_equal(rest.params["tilt"], whole.params["tilt"])


def test_seeds_run_side_by_side_under_vmap():
    # guards against: state or reports that cannot be vectorized
    model = negative_phase(_in_plate, num_chains=20)
    svi = SVI(model, _linear_gaussian_guide, optax.adam(0.02), Trace_ELBO())
    states = jax.vmap(lambda key: svi.init(key, MEAN_ONE))(jax.random.split(jax.random.key(0), 3))
    states, losses = jax.jit(jax.vmap(lambda state: svi.update(state, MEAN_ONE)))(states)
    assert states.mutable_state["z/chains"]["x"].shape == (3, 20)
    assert len(np.unique(losses)) == 3


def test_float64_chains_stay_float64():
    # guards against: constants that demote the chains
    with jax.enable_x64(True):
        chains = _chains_of(negative_phase(_in_plate, num_chains=5), jnp.zeros(2))
        assert chains["x"].dtype == chains["step_size"].dtype == jnp.float64


def test_chains_sampled_after_the_fit_follow_the_learned_prior():
    # guards against: draws at initial instead of fitted parameters. The prior at tilt 3 is N(3, 1)
    handler = negative_phase(_in_plate, num_chains=200)
    state = {"z/chains": _chains_of(handler, jnp.zeros(2))}
    state = handler.sample_chains(jax.random.key(1), {"tilt": 3.0}, state, 50, jnp.zeros(2))[1]
    draws, after = handler.sample_chains(jax.random.key(2), {"tilt": 3.0}, state, 40, jnp.zeros(2))
    assert draws["z"].shape == (200, 40)
    np.testing.assert_array_equal(draws["z"][:, -1], after["z/chains"]["x"])
    # 200 chains of 40 draws, each with an effective size of at least 10: standard error .022
    np.testing.assert_allclose([draws["z"].mean(), draws["z"].var()], [3, 1], atol=4.5 * 0.03)


def test_the_model_is_traced_a_bounded_number_of_times():
    # guards against: a handler that makes every step trace the model anew
    traces = []

    def model(y):
        traces.append(None)
        _in_plate(y)

    svi = SVI(negative_phase(model, num_chains=5), _linear_gaussian_guide, optax.adam(0.02), Trace_ELBO())
    state = svi.init(jax.random.key(0), MEAN_ONE)
    assert len(traces) == 2  # once for init, once for the check
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state, MEAN_ONE)
    assert len(traces) == 3


def test_chains_go_on_after_the_fit_where_only_init_chains_told_where_to_start():
    # guards against: sample_chains drawing latents it does not need, from a prior that cannot be sampled
    def model(y):
        k = numpyro.param("k", 1.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", EnergyDistribution(lambda z: k * z**2 / 2))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    handler = _still(model)
    state = {"z/chains": _chains_of(substitute(handler, {"z": jnp.zeros(2)}), jnp.zeros(2))}
    draws, _ = handler.sample_chains(jax.random.key(0), {"k": 1.0}, state, 3, jnp.zeros(2))
    np.testing.assert_array_equal(draws["z"], jnp.broadcast_to(CHAINS[:, None], (4, 3)))


# ---- What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Trace_ELBO(num_particles=2), r"Trace_ELBO\(num_particles=2\) drops mutable state.*Use num_particles=1"),
        (Trace_ELBO(num_particles=3, vectorize_particles=False), r"\(num_particles=3\) drops mutable state"),
        (RenyiELBO(num_particles=1), r"RenyiELBO keeps no mutable state.*Use Trace_ELBO\(\)"),
        (TraceGraph_ELBO(), r"TraceGraph_ELBO keeps no mutable state"),
    ],
)
def test_objectives_that_drop_the_chains_are_refused_with_the_fix(loss, message):
    # guards against: chains that silently restart at every step
    svi = SVI(negative_phase(_in_plate, num_chains=5), _linear_gaussian_guide, optax.adam(0.02), loss)
    with pytest.raises(ValueError, match=f"site 'z': .*{message}"):
        svi.init(jax.random.key(0), MEAN_ONE)


def test_mcmc_is_refused():
    # guards against: a parameter lifted to a latent, whose density needs the value of log Z and not its gradient alone
    lifted = lift(negative_phase(_in_plate, num_chains=5), prior={"tilt": dist.Normal(0, 3)})
    with pytest.raises(ValueError, match=r"site 'z': negative_phase learns parameters.*MCMC"):
        MCMC(NUTS(lifted), num_warmup=2, num_samples=2, progress_bar=False).run(jax.random.key(0), MEAN_ONE)


def test_energy_inside_scan_is_refused():
    # guards against: a normalizer that depends on the carry
    def model(y):
        def step(z, y_t):
            z = numpyro.sample("z", TiltedDistribution(STANDARD, lambda carry, z: -carry * z, params=z))
            return z, None

        scan(step, 0.0, y)

    with pytest.raises(NormalizerError, match="site 'z': unknown normalizer inside scan"):
        seed(negative_phase(model), 0)(jnp.zeros(3))


def test_a_part_of_a_model_is_refused():
    # guards against: dependence on a latent outside the part that the handler sees
    with pytest.raises(ValueError, match="must see the whole model"), negative_phase(num_chains=3):
        pass


def test_every_form_of_a_model_is_checked():
    # guards against: a check of the first call alone
    def model(hierarchical):
        w = numpyro.sample("w", STANDARD) if hierarchical else 1.0
        numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -w * z))

    handler = negative_phase(model, num_chains=3)
    seed(handler, 0)(False)
    with pytest.raises(NormalizerError, match="latent site 'w'"):
        seed(handler, 0)(True)


def test_support_that_depends_on_a_parameter_is_refused():
    # guards against: the gradient of a boundary, which the chains do not have (exact -1 / b, found 0)
    def model():
        b = numpyro.param("b", 2.0, constraint=constraints.positive)
        fn = EnergyDistribution(lambda x: x, support=constraints.interval(0.0, b), initial=dist.Uniform(0, 1))
        numpyro.sample("z", fn, obs=jnp.array(0.5))

    svi = SVI(negative_phase(model, num_chains=5), lambda: None, optax.sgd(0.1), Trace_ELBO())
    with pytest.raises(NormalizerError, match=r"site 'z': its support depends on a parameter.*TransformedDistribution"):
        svi.run(jax.random.key(0), 1, progress_bar=False)


def test_persistent_chains_of_rows_that_come_and_go_are_refused():
    # guards against: a chain that belongs to another row's energy at every step (learned -.41 where 0 is right)
    def model():
        k = numpyro.param("k", jnp.ones(6), event_dim=0)
        with numpyro.plate("rows", 6, subsample_size=2) as index:
            fn = EnergyDistribution(lambda k, z: k * z**2, params=k[index], batch_shape=(2,), initial=STANDARD)
            numpyro.sample("z", fn, obs=jnp.ones(2))

    with pytest.raises(ValueError, match=r"site 'z': .* every row of the subsampled plate 'rows'.*persistent=False"):
        seed(negative_phase(model), 0)()
    assert _chains_of(negative_phase(model, num_chains=3, persistent=False))["x"].shape == (3, 2)


@pytest.mark.parametrize("sampler", [MALA, "MALA", {"z": MALA}])
def test_what_is_no_sampler_is_refused(sampler):
    with pytest.raises(TypeError, match="sampler must be a sampler such as MALA"):
        negative_phase(_in_plate, sampler=sampler)


def test_init_chains_outside_the_support_are_refused():
    def model():
        rate = numpyro.param("rate", 1.0)
        numpyro.sample("z", EnergyDistribution(lambda z: rate * z, support=constraints.positive), obs=1.0)

    with pytest.raises(ValueError, match="site 'z': init_chains has values outside the support"):
        seed(_still(model), 0)()


def _energy_depends(y):
    w = numpyro.sample("w", STANDARD)
    numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -w * z))


def _base_depends(y):
    w = numpyro.sample("w", STANDARD)
    numpyro.sample("z", TiltedDistribution(dist.Normal(w, 1), lambda z: z**4))


def _depends_through_deterministic(y):
    w = numpyro.deterministic("twice", 2 * numpyro.sample("w", STANDARD))
    numpyro.sample("z", EnergyDistribution(lambda z: (z - w) ** 2, initial=STANDARD))


@pytest.mark.parametrize("model", [_energy_depends, _base_depends, _depends_through_deterministic])
def test_energy_that_depends_on_a_latent_is_refused_naming_both_sites(model):
    # guards against: the doubly intractable case learned with the wrong gradient
    with pytest.raises(NormalizerError, match=r"site 'z'.*latent site 'w'"):
        seed(negative_phase(model), 0)(MEAN_ONE)


def test_bayesian_energy_network_is_refused():
    # guards against: priors on the weights, which are latent sites of their own
    net = eqx.nn.Linear("scalar", "scalar", key=jax.random.key(0))

    def model():
        energy = random_eqx_module("net", net, prior=STANDARD)
        numpyro.sample("z", TiltedDistribution(STANDARD, energy))

    with pytest.raises(NormalizerError, match=r"site 'z'.*latent site 'net/weight', 'net/bias'|site 'z'.*'net/"):
        seed(negative_phase(model), 0)()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_data_that_are_not_finite_are_refused_naming_the_site(bad):
    # guards against: a loss of nan for ever after
    y = MEAN_ONE.at[3].set(bad)
    with pytest.raises(ValueError, match=r"site 'y': 1 of 64 observed events are NaN or infinite.*mask"):
        seed(negative_phase(_in_plate), 0)(y)


def test_masked_data_may_be_nan():
    # guards against: refusing what NumPyro can handle
    y = jnp.array([0.1, jnp.nan])
    model = negative_phase(mask(_in_plate, mask=jnp.isfinite(y)), num_chains=3)
    assert _chains_of(model, y)["x"].shape == (3,)


def test_a_mask_made_inside_the_model_is_no_obstacle_to_a_run():
    # guards against: looking at the values of a mask that is traced
    y = jnp.array([0.1, jnp.nan, 0.4])

    def model(y):
        with numpyro.plate("data", 3):
            z = numpyro.sample("z", _tilted())
            with mask(mask=jnp.isfinite(y)):
                numpyro.sample("y", dist.Normal(z, 1), obs=y)

    def guide(y):
        with numpyro.plate("data", 3):
            numpyro.sample("z", STANDARD)

    svi = SVI(negative_phase(model, num_chains=5), guide, optax.adam(0.01), Trace_ELBO())
    assert jnp.isfinite(svi.run(jax.random.key(0), 3, y, progress_bar=False).losses).all()


def test_a_base_without_draws_and_without_initial_chains_is_refused():
    # guards against: chains that start at zero without a word
    def model():
        k = numpyro.param("k", 1.0)
        numpyro.sample("z", EnergyDistribution(lambda z: k * z**2))

    with pytest.raises(NotImplementedError, match=r"site 'z'.*BaseMeasure cannot be sampled.*initial="):
        seed(negative_phase(model), 0)()
    assert _chains_of(substitute(_still(model), {"z": 0.0}))["x"].shape == (4,)


def test_a_discrete_site_needs_a_sampler_of_its_own():
    def model():
        k = numpyro.param("k", jnp.ones(3))
        fn = EnergyDistribution(
            lambda s: -(k * s).sum(), (3,), support=constraints.boolean, initial=dist.Bernoulli(0.5).expand([3]).to_event(1)
        )
        numpyro.sample("s", fn, obs=jnp.ones(3, int))

    with pytest.raises(NotImplementedError, match=r"site 's': MALA needs the score.*discrete"):
        seed(negative_phase(model), 0)()


def test_init_chains_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"site 'z': init_chains has shape \(4,\), it must be \(5,\)"):
        seed(negative_phase(_in_plate, num_chains=5, init_chains={"z": CHAINS}), 0)(jnp.zeros(2))


def test_names_that_are_no_energy_site_are_refused():
    for options in ({"init_chains": {"u": CHAINS}}, {"sampler": {"u": MALA()}}):
        with pytest.raises(ValueError, match=r"no energy site is called \['u'\]: the model has \['z'\]"):
            seed(negative_phase(_in_plate, num_chains=4, **options), 0)(jnp.zeros(2))


def test_a_state_with_another_number_of_chains_is_refused():
    state = {"z/chains": _chains_of(negative_phase(_in_plate, num_chains=4), jnp.zeros(2))}
    with (
        pytest.raises(ValueError, match=r"site 'z': the state holds chains of shape \(4,\), this handler keeps \(5,\)"),
        seed(rng_seed=0),
    ):
        substitute(negative_phase(_in_plate, num_chains=5), state)(jnp.zeros(2))


def test_a_model_without_a_seed_is_refused():
    with pytest.raises(ValueError, match=r"site 'z'.*random key.*seed"):
        log_density(negative_phase(_in_plate), (jnp.zeros(2),), {}, {"tilt": 0.0, "z": jnp.zeros(2)})


@pytest.mark.filterwarnings("ignore:site 'z'. when its chains started its density did not fall off")
def test_a_chain_that_turns_non_finite_stops_the_run_naming_site_and_update():
    # guards against: a silent nan. The energy -z^4 is not integrable and the chain falls over its edge
    def model(y):
        k = numpyro.param("k", -1.0)
        numpyro.sample("z", EnergyDistribution(lambda z: k * z**4, initial=STANDARD))

    def guide(y):
        numpyro.sample("z", STANDARD)

    sampler = UnadjustedLangevin(0.1, num_steps=1)
    svi = SVI(negative_phase(model, num_chains=5, sampler=sampler), guide, optax.sgd(0.0), Trace_ELBO())
    with pytest.raises(
        RuntimeError, match=r"site 'z', update \d+: the negative chains, or the energy at them, are no longer finite.*step_size"
    ):
        jax.block_until_ready(svi.run(jax.random.key(0), 50, MEAN_ONE, progress_bar=False))


def test_parameters_that_turn_non_finite_stop_the_run_although_chains_stand_still():
    # guards against: MALA, which rejects every step into a nan, hiding that the fit is lost
    y = MEAN_ONE.at[-1].set(jnp.nan)

    def model(y):
        _in_plate(jnp.nan_to_num(y))  # finite where the handler looks, not in the factor
        numpyro.factor("lost", numpyro.param("scale", 1.0) * numpyro.param("tilt", 0.0) * y.sum())

    def guide(y):
        with numpyro.plate("data", len(y)):
            numpyro.sample("z", STANDARD)

    svi = SVI(negative_phase(model, num_chains=5), guide, optax.sgd(0.1), Trace_ELBO())
    with pytest.raises(RuntimeError, match=r"site 'z', update \d+: .* no longer finite.*data or parameters"):
        jax.block_until_ready(svi.run(jax.random.key(0), 3, y, progress_bar=False))


# ---- Unadjusted chains on a bimodal latent: the example that decided the default sampler ---------------------------------


@pytest.fixture(scope="module")
def bimodal():
    sign = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (1000, 1)), 1.5, -1.5)
    latent = sign + 0.3 * jax.random.normal(jax.random.key(1), (1000, 1))
    y = latent + 0.2 * jax.random.normal(jax.random.key(2), latent.shape)
    net = eqx.nn.MLP(1, "scalar", 64, 2, activation=jax.nn.silu, key=jax.random.key(0))

    def model(y, subsample_size=None):
        prior = TiltedDistribution(dist.Normal(jnp.zeros(1), 1.0).to_event(1), eqx_module("energy", net))
        with numpyro.plate("data", 1000, subsample_size=subsample_size) as index:
            z = numpyro.sample("z", prior)
            numpyro.sample("y", dist.Normal(z, 0.2).to_event(1), obs=y[index])

    def guide(y, subsample_size=None):
        weight, bias = numpyro.param("weight", 0.5), numpyro.param("bias", 0.0)
        sd = numpyro.param("sd", 0.5, constraint=constraints.positive)
        with numpyro.plate("data", 1000, subsample_size=subsample_size) as index:
            numpyro.sample("z", dist.Normal(weight * y[index] + bias, sd).to_event(1))

    def fit(sampler, num_steps):
        svi = SVI(negative_phase(model, num_chains=500, sampler=sampler), guide, optax.adam(2e-3), Trace_ELBO(), subsample_size=200)
        result = svi.run(jax.random.key(3), num_steps, y, progress_bar=False)
        return result.state.mutable_state["z/chains"]

    return fit, jnp.abs(latent).mean()


def test_unadjusted_chains_that_run_away_warn_and_then_stop_the_run(bimodal):
    # guards against: training that sharpens the energy without end in silence (h = .1, a mode's variance is .09 < 2h)
    fit, _ = bimodal
    with pytest.warns(UserWarning, match=r"site 'z', update \d+: the chains are near their variance floor.*2h = 0.2"):  # noqa: SIM117
        with pytest.raises(RuntimeError, match=r"site 'z', update \d+: the chains run away.*MALA"):
            jax.block_until_ready(fit(UnadjustedLangevin(0.1), 600))


def test_unadjusted_chains_with_a_small_step_do_not_warn(bimodal):
    # guards against: crying wolf (h = .01 learns the prior right)
    fit, _ = bimodal
    assert fit(UnadjustedLangevin(0.01), 400)["status"] == 0


@pytest.mark.slow
def test_default_sampler_learns_the_bimodal_prior(bimodal):
    # guards against: a default that runs away or loses a mode
    fit, truth = bimodal
    chains = fit(None, 2500)
    # 500 chains with sd .3 about each mode: standard error .013; the guide's bias adds a few hundredths
    np.testing.assert_allclose(jnp.abs(chains["x"]).mean(), truth, atol=0.1)
    assert 0.35 < (chains["x"] > 0).mean() < 0.65
    np.testing.assert_allclose(chains["acceptance"], 0.574, atol=0.05)


# ---- Trouble on accelerators, where no host looks at a step ------------------------------------------------------------


def test_a_step_compiled_for_a_gpu_does_not_ask_the_host():
    # guards against: a report, or a condition around it, for which a GPU waits for the host at every step
    y = jnp.zeros(3)
    svi = SVI(_still(_in_plate), AutoNormal(_still(_in_plate)), optax.sgd(0.1), Trace_ELBO())
    update = jax.jit(svi.update).trace(svi.init(jax.random.key(0), y), y)
    programs = {platform: update.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")}
    assert "callback" in programs["cpu"]
    assert "callback" not in programs["cuda"]


@pytest.mark.parametrize(("status", "is_finite"), [(0, True), (1, True), (2, False), (9, False)])
def test_chains_in_trouble_make_loss_and_gradient_nan(status, is_finite):
    # guards against: a fit that goes on where nothing reports: a nan loss is seen, whoever runs the steps
    model = _still(_in_plate).without_reports()
    with seed(rng_seed=0), trace() as sites:
        model(jnp.zeros(2))
    chains = {**sites["z/chains"]["value"], "status": jnp.int32(status)}

    def log_joint(tilt):
        data = {"tilt": tilt, "z": jnp.zeros(2), "z/chains": dict(chains)}
        return log_density(seed(model, jax.random.key(0)), (jnp.zeros(2),), {}, data)[0]

    value, gradient = jax.value_and_grad(log_joint)(0.5)
    assert jnp.isfinite(value) == jnp.isfinite(gradient) == is_finite


def test_check_chains_says_what_a_run_on_an_accelerator_could_not():
    # guards against: a nan loss without a cause, and samples of chains that had run away
    y, sampler = jnp.zeros(2), UnadjustedLangevin(0.1, 0)
    phase = negative_phase(_in_plate, sampler=sampler, num_chains=4)
    with seed(rng_seed=0), trace() as sites:
        phase(y)
    chains = sites["z/chains"]["value"]

    def state(status):
        return {"z/chains": {**chains, "status": jnp.int32(status)}}

    phase.check_chains({"tilt": 0.0}, state(0), y)
    with pytest.warns(UserWarning, match=r"site 'z', update 1: the chains are near their variance floor.*2h = 0.2"):
        phase.check_chains({"tilt": 0.0}, state(1), y)
    with pytest.raises(RuntimeError, match=r"site 'z', update 1: the chains run away.*MALA"):
        phase.check_chains({"tilt": 0.0}, state(2), y)
    with pytest.raises(RuntimeError, match=r"site 'z', update 1: the negative chains, or the energy at them, are no longer finite"):
        phase.sample_chains(jax.random.key(0), {"tilt": 0.0}, state(9), 3, y)


COUPLED = {"is": False}


@pytest.mark.parametrize("how", ["global", "number"])
def test_a_model_is_checked_again_where_what_it_reads_has_changed(how):
    # Catches a check that is kept by the shapes of arguments: the energy of y depends on x from the second call on, without a word.
    def model(y, coupling=0.0):
        x = numpyro.sample("x", dist.Normal(0, 1))
        couples = COUPLED["is"] or coupling > 0
        scale = jnp.exp(x) if couples else 1.0
        numpyro.sample("y", EnergyDistribution(lambda y: scale * y**2 / 2, initial=dist.Normal(0, 1)), obs=y)

    phase, y = negative_phase(model, num_chains=4), jnp.ones(3)
    COUPLED["is"] = False
    with seed(rng_seed=0):
        phase(y, 0.0)
    COUPLED["is"] = how == "global"
    with seed(rng_seed=0), pytest.raises(NormalizerError, match="site 'y'"):
        phase(y, 1.0 if how == "number" else 0.0)
    COUPLED["is"] = False


def test_new_groups_are_of_the_learned_prior():
    """``Predictive`` draws effects that posterior samples leave out from the energy, of as many groups as it is asked for."""

    def model(y=None, num_groups=30):
        tilt = numpyro.param("tilt", 0.0)
        loc = numpyro.sample("loc", dist.Normal(0, 10))
        with numpyro.plate("groups", num_groups):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: z**2 / 2 - tilt * z))
            numpyro.sample("y", dist.Normal(loc + z, 0.5), obs=y)

    num = 2000
    given = {"loc": jnp.linspace(-2, 2, num)}
    new = Predictive(model, params={"tilt": 1.5}, posterior_samples=given)(jax.random.key(0), num_groups=2)
    assert new["y"].shape == (num, 2)
    z, noise = new["z"], new["y"] - new["z"] - given["loc"][:, None]  # z is normal of variance 1/2 about tilt / 2
    for found, mean, sd in ((z, 0.75, 0.5**0.5), (noise, 0.0, 0.5)):
        np.testing.assert_allclose(found.mean(), mean, atol=5 * sd / (2 * num) ** 0.5)
        np.testing.assert_allclose(found.std(), sd, atol=5 * sd / (4 * num) ** 0.5)
