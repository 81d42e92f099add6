# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Jumps of MALA's chains: exact for any reference, and what determines the weights of modes."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from scipy.stats import norm

from numpyro_ebm import MALA, EnergyDistribution, TiltedDistribution, negative_phase
from numpyro_ebm.samplers import Reference, Target

KEY = jax.random.key(0)


def jumped(sampler, target, state, key=KEY):
    return jax.jit(lambda key, state: sampler.run(key, target, state))(key, state)


def only(num_jumps):
    return MALA(num_steps=0, num_jumps=num_jumps, adapt=False)


@pytest.mark.parametrize("num_jumps", [1, 3])
def test_transition_matrix_is_that_of_metropolis_hastings(num_jumps):
    # Catches the reference's density left out or on the wrong side, and jumps whose weight is not that of where they stand.
    atoms, p, q, n = jnp.array([-1.0, 0.0, 2.0]), np.array([0.6, 0.1, 0.3]), np.array([0.2, 0.5, 0.3]), 40_000
    rates = np.minimum(q, p / p[:, None] * q[:, None])  # q_j min(1, p_j q_i / (p_i q_j))
    np.fill_diagonal(rates, 0)
    exact = np.linalg.matrix_power(rates + np.diag(1 - rates.sum(1)), num_jumps)
    np.testing.assert_allclose(p @ exact, p)

    def table(weights):
        return lambda x, beta=1.0: jnp.log(weights)[jnp.argmin(abs(x[..., None] - atoms), -1)]

    reference = Reference(lambda key, n: jax.random.choice(key, atoms, (n,), p=jnp.array(q)), table(jnp.array(q)))
    start = jnp.repeat(atoms, n)
    state = jumped(only(num_jumps), Target(table(jnp.array(p)), reference), only(num_jumps).init(start))
    found = (state.position.reshape(3, n, 1) == atoms).mean(1)
    np.testing.assert_allclose(found, exact, atol=4.5 * np.sqrt(0.25 / n))


SHAPES = {
    "real": (dist.Normal(0, 3), lambda x: x),
    "positive": (dist.LogNormal(0, 3), jnp.log),
    "vector": (dist.Normal(0, 3).expand([2]).to_event(1), lambda x: x[..., 0]),
    "unit interval": (dist.TransformedDistribution(dist.Normal(0, 3), dist.transforms.SigmoidTransform()), jax.scipy.special.logit),
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_chains_find_the_weights_of_modes_in_every_batch_and_support(shape):
    # Catches one acceptance for a whole batch, a proposal in the space of the events, and a Jacobian that does not cancel. Between
    # the modes at +-3, a tenth wide, no local step ever goes: all chains start on the right.
    base, place = SHAPES[shape]
    weights, n = jnp.array([0.2, 0.7]), 2000
    mode = dist.Normal(3.0, 0.3)

    def energy(weight, x):
        u = place(x)
        mixture = jnp.logaddexp(jnp.log1p(-weight) + mode.log_prob(u), jnp.log(weight) + mode.log_prob(-u))
        return dist.Normal(0, 3).log_prob(u) - mixture

    sampler = MALA(num_steps=20, num_jumps=60)
    fn = TiltedDistribution(base, energy, params=weights, batch_shape=(2,), sampler=sampler)
    target = fn.chain_log_prob(sampler)
    right = jnp.full((n, 2, *base.event_shape), 3.0)
    state = jumped(sampler, target, sampler.init(right, target))
    left = place(fn.from_chain(state.position, sampler)) < 0
    assert state.jump_acceptance.shape == (2,)
    np.testing.assert_allclose(left.mean(0), weights, atol=4.5 * np.sqrt(0.25 / n))
    still = jumped(MALA(num_steps=20, num_jumps=0), target, sampler.init(right, target))
    assert (place(fn.from_chain(still.position, sampler)) > 0).all()


@pytest.mark.parametrize(
    "reference", [dist.Uniform(-1, 1), dist.HalfNormal(1.0), dist.StudentT(3.0, 1.0, 2.0)], ids=["uniform", "half", "heavy"]
)
def test_chains_stay_where_they_are_distributed_whatever_they_jump_to(reference):
    # Catches a reference whose density goes on outside its support, as NumPyro's does without validation: chains gather inside.
    n = 40_000
    fn = EnergyDistribution(lambda x: x**2 / 2, initial=dist.Normal(0, 1), reference=reference)
    with numpyro.validation_enabled(False):
        start = jax.random.normal(KEY, (n,))
        x = jumped(only(10), fn.chain_log_prob(only(10)), only(10).init(start), jax.random.key(1)).position
    assert (x != start).mean() > 0.1
    assert abs(x.mean()) < 4.5 / np.sqrt(n)
    assert abs((x**2).mean() - 1) < 4.5 * np.sqrt(2 / n)


def test_acceptance_is_kept_with_the_chains():
    # Catches an acceptance of other moves. From N(a, 1) to N(0, 1) it is 2 P(y > x) = 2 Phi(-a / sqrt 2).
    fn = TiltedDistribution(dist.Normal(0, 1), lambda x: -1.5 * x)
    sampler = only(100)
    state = jumped(sampler, fn.chain_log_prob(sampler), sampler.init(1.5 + jax.random.normal(KEY, (4000,))))
    assert float(state.jump_acceptance) == pytest.approx(2 * norm.cdf(-1.5 / np.sqrt(2)), abs=0.01)


def test_where_there_is_no_reference_nothing_jumps():
    # Catches jumps of flat sites to anywhere, and a run that fails there; and numbers of the steps that jumps change.
    flat = EnergyDistribution(lambda x: x**2 / 2)
    start = jnp.linspace(-1, 1, 50)
    with_jumps, without = (jumped(s, flat.chain_log_prob(s), s.init(start)) for s in (MALA(), MALA(num_jumps=0)))
    np.testing.assert_array_equal(with_jumps.position, without.position)
    assert with_jumps.jump_acceptance == without.jump_acceptance == 0


@pytest.mark.parametrize(
    "base", [dist.ImproperUniform(constraints.real, (), ()), EnergyDistribution(lambda x: x**2)], ids=["flat", "energy"]
)
def test_bases_that_cannot_be_sampled_are_no_reference(base):
    # Catches a default that fails for models that were right without jumps.
    fn = TiltedDistribution(base, lambda x: x**2, initial=dist.Normal(0, 1))
    assert fn.chain_log_prob(MALA()).reference is None


def test_a_starting_distribution_of_whole_numbers_is_no_reference():
    # Catches the mass function of a start taken for a density: it is the same at every real number.
    fn = EnergyDistribution(lambda x: x**2, initial=dist.DiscreteUniform(-3, 3))
    assert fn.chain_log_prob(MALA()).reference is None


def test_a_flat_site_is_reached_from_its_reference():
    # Catches a path that does not begin at what is sampled, and 0 * inf at its end.
    initial = dist.Uniform(-2, 2)
    fn, x = EnergyDistribution(lambda x: x**4, initial=initial), jnp.array([-1.0, 0.5, 3.0])
    target = fn.chain_log_prob(MALA())
    start = jax.jit(target.at(0.0))(x)  # inside jit, where NumPyro does not warn of what is outside
    np.testing.assert_allclose(start, jax.jit(target.reference.log_prob)(x))
    np.testing.assert_allclose(start, [-np.log(4), -np.log(4), -np.inf], rtol=1e-6)
    np.testing.assert_allclose(target.at(0.25)(x[:2]), 0.75 * initial.log_prob(x[:2]) - 0.25 * x[:2] ** 4, rtol=1e-6)
    np.testing.assert_allclose(target(x), -(x**4), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda beta: target.at(beta)(x))(1.0), -(x**4), rtol=1e-6)


def test_a_chain_leaves_where_there_is_no_density():
    # Catches samples where the energy is infinite or no number: local moves cannot leave such a place.
    for energy in (lambda x: x - jnp.log(x), lambda x: jnp.where(x > 0, x, jnp.inf)):
        x = TiltedDistribution(dist.Normal(0, 2), energy).sample(KEY, (500,))
        assert (x > 0).all()


def test_number_of_jumps_follows_the_number_of_steps():
    # Catches a default that changes the cost of a run by more than a few percent, or moves chains that are to stand.
    assert [MALA(num_steps=n).num_jumps for n in (0, 1, 10, 11, 200)] == [0, 1, 1, 2, 20]
    assert MALA().frozen().num_jumps == 1
    assert MALA(num_jumps=3).frozen().num_jumps == 3


@pytest.mark.parametrize("setting", ["initial", "reference"])
def test_what_is_no_distribution_of_events_is_refused(setting):
    for value, error in ((1.0, TypeError), (dist.Normal(jnp.zeros(2), 1).to_event(1), ValueError)):
        with pytest.raises(error, match=f"^{setting} "):
            EnergyDistribution(lambda x: x**2, **{setting: value})


def two_modes(y):
    # the weight of the right mode is 1 / (1 + exp(-tilt))
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        fn = TiltedDistribution(dist.Normal(0, 3), lambda x: 8 * (abs(x) - 2) ** 2 - tilt * jnp.tanh(x) / 2)
        numpyro.sample("y", fn, obs=y)


def exact_tilt(y):
    """The maximum-likelihood tilt by quadrature: where the mean of tanh is that of the data."""
    x = np.linspace(-6, 6, 4001)
    log_p = norm.logpdf(x, 0, 3) - 8 * (abs(x) - 2) ** 2
    low, high = -10.0, 10.0
    for _ in range(60):
        tilt = (low + high) / 2
        p = np.exp(log_p + tilt * np.tanh(x) / 2)
        low, high = (tilt, high) if (p @ np.tanh(x)) / p.sum() < np.tanh(y).mean() else (low, tilt)
    return tilt


def test_weights_of_modes_are_learned_by_default():
    # Catches chains that never cross: the tilt then runs away from any start, as it does without jumps.
    sign, spread = jax.random.bernoulli(KEY, 0.75, (1000,)), jax.random.normal(jax.random.key(1), (1000,))
    y = jnp.where(sign, 2.0, -2.0) + 0.25 * spread

    def fit(sampler):
        svi = SVI(
            negative_phase(two_modes, sampler=sampler),
            lambda y: None,
            optax.adam(optax.cosine_decay_schedule(0.05, 600)),
            Trace_ELBO(),
        )

        def one(key):
            return jax.lax.scan(lambda state, _: svi.update(state, y), svi.init(key, y), length=600)[0]

        return svi.get_params(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 5)))["tilt"]

    exact, weight = exact_tilt(np.asarray(y)), lambda tilt: 1 / (1 + np.exp(-np.asarray(tilt) * np.tanh(2.0)))
    np.testing.assert_allclose(weight(fit(None)), weight(exact), atol=0.05)
    assert (abs(weight(fit(MALA(num_jumps=0))) - weight(exact)) > 0.05).any()
