# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The guard: a gradient that needs an unknown normalizer raises, every other gradient passes untouched."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module, nnx_module
from numpyro.distributions import constraints
from numpyro.handlers import substitute
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from numpyro_ebm import EnergyDistribution, NormalizerError, TiltedDistribution, negative_phase, unnormalized

Y = jnp.array([0.3, 1.2, 2.1])
STANDARD = dist.Normal(0, 1)


class _NnxEnergy(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    def __call__(self, z):
        return self.linear(z[None])[0]


def _equinox_energy():
    return eqx_module("net", eqx.nn.MLP("scalar", "scalar", 4, 1, key=jax.random.key(0)))


def _nnx_energy():
    return nnx_module("net", _NnxEnergy())


def _closure():
    tilt = numpyro.param("tilt", 0.1)
    return lambda z: -tilt * z


PRIORS = {
    "Equinox module": lambda: TiltedDistribution(STANDARD, _equinox_energy()),
    "Flax NNX module": lambda: TiltedDistribution(STANDARD, _nnx_energy()),
    "bare closure": lambda: TiltedDistribution(STANDARD, _closure()),
    "params": lambda: TiltedDistribution(STANDARD, lambda a, z: -a * z, params=numpyro.param("tilt", 0.1)),
    "learnable base": lambda: TiltedDistribution(dist.Normal(numpyro.param("loc", 0.0), 1), lambda z: z**4),
    "flat base": lambda: EnergyDistribution(lambda k, z: k * z**2, params=numpyro.param("k", 1.0), initial=STANDARD),
}


def _model_with(prior, wrap=lambda fn: fn):
    def model(y):
        fn = wrap(prior())
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", fn)
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    return model


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
def test_plain_svi_with_learnable_energy_raises_naming_the_site(prior):
    # guards against: the silent wrong answer this package exists for
    model = _model_with(prior)
    svi = SVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO())
    with pytest.raises(NormalizerError, match=r"site 'z'.*d log Z.*negative_phase"):
        svi.run(jax.random.key(0), 1, Y, progress_bar=False)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda fn: fn.mask(jnp.array([True, False, True])),
        lambda fn: dist.TransformedDistribution(fn, dist.transforms.AffineTransform(1.0, 2.0)),
        lambda fn: fn.expand([3]),
    ],
    ids=["mask", "transform", "expand"],
)
def test_guard_holds_through_every_wrapper(wrap):
    # guards against: a wrapper that hides the energy from the guard
    model = _model_with(PRIORS["bare closure"], wrap)
    svi = SVI(model, AutoNormal(model), optax.sgd(0.1), TraceMeanField_ELBO())
    with pytest.raises(NormalizerError, match="site 'z'"):
        svi.run(jax.random.key(0), 1, Y, progress_bar=False)


def test_learnable_energy_inside_control_flow_raises():
    # guards against: a scan body, whose sites no handler outside sees, slipping through
    def model(y):
        tilt = numpyro.param("tilt", 0.1)

        def step(carry, y_t):
            z = numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -tilt * z))
            numpyro.sample("y", dist.Normal(z, 1), obs=y_t)
            return carry, None

        scan(step, 0.0, y)

    def loss(tilt):
        return log_density(model, (Y,), {}, {"tilt": tilt, "z": jnp.zeros(3)})[0]

    with pytest.raises(NormalizerError, match="d log Z"):
        jax.grad(loss)(0.1)


def test_prior_on_energy_parameters_raises_under_nuts():
    # guards against: the posterior of -1.86 where 1.02 is right that NumPyro gives in silence
    def model(y):
        tilt = numpyro.sample("tilt", dist.Normal(0, 3))
        numpyro.sample("y", TiltedDistribution(STANDARD, lambda z: -tilt * z).expand([3]).to_event(1), obs=y)

    with pytest.raises(NormalizerError, match="site 'y'"):
        MCMC(NUTS(model), num_warmup=2, num_samples=2, progress_bar=False).run(jax.random.key(0), Y)


def test_fixed_energy_passes_svi_and_learns_the_closed_form():
    # guards against: a guard that fires on what needs no normalizer (tilt 2: posterior mean (y + 2) / 2)
    def model(y):
        z = numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -2.0 * z))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    def guide(y):
        loc = numpyro.param("loc", 0.0)
        numpyro.sample("z", dist.Normal(loc, numpyro.param("scale", 0.7, constraint=constraints.positive)))

    result = SVI(model, guide, optax.adam(0.05), Trace_ELBO(num_particles=50)).run(
        jax.random.key(0), 800, jnp.array(1.0), progress_bar=False
    )
    # the last iterate of Adam wanders by about learning rate * sd of the gradient = .05 * .1
    np.testing.assert_allclose(result.params["loc"], 1.5, atol=0.05)
    np.testing.assert_allclose(result.params["scale"], np.sqrt(0.5), atol=0.05)


def test_nuts_over_the_latent_passes_with_energy_parameters_held_fixed():
    # guards against: a guard that fires on x-gradients of an energy with numpyro.param parameters
    model = _model_with(PRIORS["bare closure"])
    mcmc = MCMC(NUTS(model), num_warmup=100, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    z = mcmc.get_samples()["z"]  # posterior N((y + .1) / 2, 1/2); 1000 draws, ESS at least 500: sd of a mean .032
    np.testing.assert_allclose(z.mean(0), (Y + 0.1) / 2, atol=4.5 * 0.032)


def _score_matching_loss(theta, x):
    """Hyvarinen's objective of the energy theta x^2 / 2: theta^2 x^2 / 2 - theta, minimized at 1 / mean x^2."""
    energy = EnergyDistribution(lambda x: theta * x**2 / 2)
    score = jax.grad(lambda x: energy.log_prob(x))
    return score(x) ** 2 / 2 + jax.grad(score)(x)


@pytest.mark.parametrize("transform", ["plain", "jit", "vmap", "scan", "float64"])
def test_score_matching_through_the_parameters_passes(transform):
    # guards against: a guard that fires where log Z has no gradient in x
    x, theta = jnp.array([0.5, -1.0, 2.0]), 0.7
    expected = (theta * x**2 - 1).mean()

    def loss(theta):
        if transform == "scan":
            step = lambda total, x: (total + _score_matching_loss(theta, x), None)  # noqa: E731
            return jax.lax.scan(step, 0.0, x)[0] / len(x)
        if transform == "vmap":
            return jax.vmap(_score_matching_loss, in_axes=(None, 0))(theta, x).mean()
        return jnp.stack([_score_matching_loss(theta, x_i) for x_i in x]).mean()

    if transform == "float64":
        with jax.enable_x64(True):
            x = jnp.asarray(x, jnp.float64)
            gradient = jax.grad(loss)(jnp.asarray(theta, jnp.float64))
            assert gradient.dtype == jnp.float64
    else:
        gradient = (jax.jit(jax.grad(loss)) if transform == "jit" else jax.grad(loss))(theta)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("whole", ["MixtureGeneral", "MixtureSameFamily", "ZeroInflated"])
def test_energies_inside_mixtures_are_refused(whole):
    # guards against: components with unknown normalizers, whose weights come out wrong even where all is fixed
    stack = EnergyDistribution(lambda k, x: k * x**2, params=jnp.array([1.0, 10.0]), batch_shape=(2,))
    parts = [EnergyDistribution(lambda x: x**2), EnergyDistribution(lambda x: 10 * x**2)]
    bit = EnergyDistribution(lambda x: x * 1.0, support=constraints.boolean)
    fn = {
        "MixtureGeneral": lambda: dist.MixtureGeneral(dist.Categorical(probs=jnp.ones(2) / 2), parts),
        "MixtureSameFamily": lambda: dist.MixtureSameFamily(dist.Categorical(probs=jnp.ones(2) / 2), stack),
        "ZeroInflated": lambda: dist.ZeroInflatedDistribution(bit, gate=0.3),
    }[whole]()

    def model():
        numpyro.sample("x", fn, obs=jnp.array(1))

    with pytest.raises(NormalizerError, match=r"site 'x': .* mixes densities"):
        log_density(model, (), {}, {})


def test_per_example_gradients_by_vmap_of_grad_still_raise():
    # guards against: vmap hiding the cotangent from the guard
    def loss(theta, x):
        return EnergyDistribution(lambda x: theta * x**2).log_prob(x)

    with pytest.raises(NormalizerError):
        jax.vmap(jax.grad(loss), in_axes=(None, 0))(1.0, Y)


def test_gradient_outside_a_model_raises_without_a_site_to_name():
    # guards against: the guard depending on a model around it
    with pytest.raises(NormalizerError, match="a distribution at no site"):
        jax.grad(lambda theta: EnergyDistribution(lambda x: theta * x**2).log_prob(1.0))(1.0)


def test_guard_changes_no_value():
    # guards against: a guard that is not exactly zero
    fn = TiltedDistribution(STANDARD, lambda z: z**4)
    np.testing.assert_array_equal(fn.log_prob(Y), fn.unguarded().log_prob(Y))


def test_unnormalized_lets_forward_mode_scores_through():
    # guards against: engines that differentiate scores forward being stopped by the guard
    def model(theta, x):
        numpyro.sample("x", EnergyDistribution(lambda x: theta * x**2 / 2), obs=x)

    def score(theta):
        return jax.grad(lambda x: log_density(unnormalized(model), (theta, x), {}, {})[0])(2.0)

    tangent = jax.jvp(score, (0.7,), (1.0,))[1]
    np.testing.assert_allclose(tangent, -2.0, rtol=1e-6)


# A guide that does not go with the model.


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("missing", ["mu", "z"])
@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_svi_is_refused_a_guide_that_lacks_a_latent(missing, loss):
    # NumPyro warns, or raises KeyError: 'mu', and takes samples of the prior, which pulled the energy elsewhere.
    def joint(y):
        tilt = numpyro.param("tilt", 0.3)
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
            numpyro.sample("y", dist.Normal(z + mu, 1), obs=y)

    def guide(y, hidden=()):
        loc = numpyro.param("loc", 0.0)
        if "mu" not in hidden:
            numpyro.sample("mu", dist.Normal(loc, 1))
        with numpyro.plate("data", len(y)):
            if "z" not in hidden:
                numpyro.sample("z", dist.Normal(loc, 1))

    def init(model, guide):
        return SVI(negative_phase(model, num_chains=4), guide, optax.sgd(0.1), loss()).init(jax.random.key(0), jnp.ones(3))

    init(joint, guide)
    with pytest.raises(ValueError, match=f"site '{missing}': the guide has no such site.*Sample it in the guide too"):
        init(joint, partial(guide, hidden=(missing,)))
    init(substitute(joint, data={missing: jnp.zeros(() if missing == "mu" else 3)}), partial(guide, hidden=(missing,)))
