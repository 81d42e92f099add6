# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether check_model sees data that are far from the base of an energy, and is silent where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_ebm import EnergyDistribution, TiltedDistribution, check_model
from numpyro_ebm.program.scale import Scales, scales

STANDARD = dist.Normal(0, 1)
X = jax.random.normal(jax.random.key(0), (100,))


def distant(model, *args):
    return {site.name: site.distant for site in check_model(model, *args).sites if site.distant}


def observed(x, make=lambda energy: TiltedDistribution(STANDARD, energy), size=None):
    w = numpyro.param("w", 0.3)
    with numpyro.plate("data", len(x), subsample_size=size):
        batch = numpyro.subsample(x, 0)
        numpyro.sample("x", make(lambda x: w * jnp.tanh(x).sum()), obs=batch)


def latent(y, noise=1.0, base=STANDARD, loc=lambda: 0.0):
    w, loc = numpyro.param("w", 0.3), loc()
    with numpyro.plate("groups", len(y)):
        z = numpyro.sample("z", TiltedDistribution(base, lambda z: w * jnp.tanh(z)))
        numpyro.sample("y", dist.Normal(loc + z, noise), obs=y)


@pytest.mark.parametrize("size", [None, 20])
@pytest.mark.parametrize(
    ("x", "is_far"),
    [
        (X, False),
        (X + 4, False),
        (15 * X, False),
        (X / 15, False),
        (X + 6, True),
        (30 * X, True),
        (X / 40, True),
        (1e3 + 1e2 * X, True),
    ],
)
def test_data_are_compared_with_the_base_of_their_energy(x, is_far, size):
    # Catches a comparison with the energy's own samples, in units of the data, or of a batch that is traced.
    report = check_model(lambda x: observed(x, size=size), x)
    (said,) = (site.distant for site in report.sites)
    assert bool(said) == is_far
    assert said in str(report)
    if is_far:
        assert "Standardize the data, or give a base on their scale" in said


def test_the_numbers_are_those_of_the_data_in_units_of_the_base():
    model = lambda x: observed(x, lambda energy: TiltedDistribution(dist.Normal(3, 2), energy))  # noqa: E731
    site = check_model(model, 43 + 50 * (X - X.mean()) / X.std()).sites[0]
    assert "the mean of the data is 2" in site.distant
    assert "their standard deviation is 2" in site.distant
    drawn = np.random.default_rng(0).normal(3, 2, (1, 10**5))
    found = scales(np.asarray(43 + 50 * (X - X.mean()) / X.std())[None], drawn, 0)
    assert found.distance == pytest.approx(20, rel=0.02)
    assert found.width == pytest.approx(25, rel=0.02)


def test_a_flat_base_has_the_scale_of_its_reference():
    def flat(**settings):
        return lambda x: observed(x, lambda energy: EnergyDistribution(energy, **settings))

    far = 1e3 + 1e2 * X
    assert distant(flat(initial=STANDARD), far)
    assert not distant(flat(initial=dist.Normal(1e3, 1e2)), far)
    assert not distant(flat(initial=STANDARD, reference=dist.Normal(1e3, 1e2)), far)
    assert not distant(flat(), far)  # there is none
    # what chains jump to does not move the base, which the energy would have to overcome
    assert distant(lambda x: observed(x, lambda e: TiltedDistribution(STANDARD, e, initial=dist.Normal(1e3, 1e2))), far)


def test_the_farthest_coordinate_counts_and_the_widest():
    # Catches an average over coordinates, of which one is in other units; and an alarm about one that is constant.
    drawn = np.random.default_rng(0).normal(size=(1, 10**4, 3))
    x = np.random.default_rng(1).normal(size=(1, 100, 3))
    assert not scales(x, drawn, 1).are_far
    assert scales(x + np.array([0, 9, 0]), drawn, 1).are_far
    assert scales(x * np.array([1, 30, 1]), drawn, 1).are_far
    assert not scales(x * np.array([1, 0, 1]), drawn, 1).are_far
    assert scales(x / 99, drawn, 1).are_far
    repeated = np.repeat(x[:, :1], 64, 0)
    assert not scales(repeated, drawn, 1).are_far  # one row has no spread, however often it is shown
    assert not scales(np.ones((64, 100, 3)), drawn, 1).are_far  # nor has a constant
    assert not scales(x + 9, 0 * drawn, 1).are_far  # a certain value has no scale


def test_tails_are_no_scale():
    drawn = np.asarray(dist.Cauchy(0, 1).sample(jax.random.key(1), (1, 10**4)))
    assert scales(np.asarray(X)[None] + 30, drawn, 0).distance > 10


def test_data_of_latents_are_compared_with_what_the_model_predicts():
    far = 1e3 + 1e2 * X
    assert not distant(latent, X)
    (said,) = distant(latent, far).values()
    assert "what the model predicts at samples of its base for site 'y'" in said
    assert distant(latent, far, 100.0)  # noise as wide as the data, which are 10 of it away
    assert not distant(latent, far, 20.0, dist.Normal(0, 1e3))
    assert not distant(latent, (far - 1e3) / 1e2, 0.2)
    assert distant(latent, far, 1.0, STANDARD, lambda: numpyro.sample("loc", STANDARD))
    assert not distant(latent, far, 1.0, STANDARD, lambda: numpyro.sample("loc", dist.Normal(0, 1e3)))


def test_nothing_is_said_where_a_param_may_move_it():
    # Catches alarms about models that are on their way: a location that is learned, or a base.
    far = 1e3 + 1e2 * X
    assert not distant(latent, far, 1.0, STANDARD, lambda: numpyro.param("loc", 0.0))
    assert not distant(latent, far, 1.0, STANDARD, lambda: numpyro.sample("loc", dist.Normal(numpyro.param("mean", 0.0), 1)))
    assert not distant(lambda x: observed(x, lambda e: TiltedDistribution(dist.Normal(numpyro.param("b", 0.0), 1), e)), far)


def test_nothing_is_said_of_an_energy_that_is_not_learned_nor_where_values_are_not_known():
    def fixed(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", TiltedDistribution(STANDARD, jnp.sin), obs=x)

    far = 1e3 + 1e2 * X
    assert not distant(fixed, far)

    def traced(x):
        assert not distant(observed, x)
        return x

    jax.jit(traced)(far)


def test_scales_that_are_right_have_bounds():
    assert not Scales(5.0, 20.0).are_far
    assert not Scales(0.0, 0.05).are_far
    assert Scales(5.1, 1.0).are_far
    assert Scales(0.0, 20.1).are_far
    assert Scales(0.0, 0.049).are_far
