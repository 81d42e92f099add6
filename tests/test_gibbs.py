# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Block Gibbs against transition matrices and enumerated moments; contrastive divergence against the exact gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.special import logsumexp
from numpyro.handlers import seed
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

from numpyro_ebm import (
    BernoulliRBM,
    BlockGibbs,
    EnergyDistribution,
    GaussianBernoulliRBM,
    NormalizerError,
    block_gibbs,
    negative_phase,
)

W = np.array([[1.5, -1.0], [-0.8, 1.2], [0.6, 0.9]])  # three visible, two hidden
B, C, SCALE = np.array([0.2, -0.3, 0.1]), np.array([-0.5, 0.4]), np.array([0.6, 1.1, 0.8])


def _states(num_units):
    return np.array(list(itertools.product((0, 1), repeat=num_units)))


def _close(found, expected, standard_error):
    np.testing.assert_array_less(np.abs(np.asarray(found) - expected), 4.5 * np.asarray(standard_error) + 1e-12)


def _transition(rbm):
    """One sweep of a binary machine as a matrix, from the visible state of the row to that of the column."""
    v, h = _states(3), _states(len(rbm.hidden_bias))
    to_hidden = jnp.exp(rbm.hidden_given_visible(v[:, None]).log_prob(h))
    return to_hidden @ jnp.exp(rbm.visible_given_hidden(h[:, None]).log_prob(v))


def _exact_draws(key, rbm, num_draws):
    """Draws of a Gaussian machine from its mixture over all hidden states."""
    h = jnp.asarray(_states(2))
    hidden_key, visible_key = jax.random.split(key)
    log_weight = h @ rbm.hidden_bias + rbm._log_partition(h @ rbm.weights.T)
    return rbm.visible_given_hidden(h[jax.random.categorical(hidden_key, log_weight, shape=(num_draws,))]).sample(visible_key)


def _moments(rbm):
    """The exact mean and second moments of a Gaussian machine."""
    h = _states(2)
    log_weight = h @ rbm.hidden_bias + rbm._log_partition(h @ rbm.weights.T)
    p, mean = jnp.exp(log_weight - logsumexp(log_weight)), rbm.visible_given_hidden(h).mean
    return p @ mean, jnp.einsum("s,si,sj->ij", p, mean, mean) + jnp.diag(rbm.scale**2)


def _check_moments(v, rbm):
    pairs = v[:, :, None] * v[:, None, :]
    mean, second = _moments(rbm)
    _close(v.mean(0), mean, v.std(0) / np.sqrt(len(v)))
    _close(pairs.mean(0), second, pairs.std(0) / np.sqrt(len(v)))


# ---- The kernel -------------------------------------------------------------------------------------------------------------


class _Counting:
    """Layers without noise: a sweep takes v to 10 (v + 1)."""

    def hidden_given_visible(self, v):
        return dist.Delta(v + 1, event_dim=1)

    def visible_given_hidden(self, h):
        return dist.Delta(10 * h, event_dim=1)


@pytest.mark.parametrize(("num_steps", "expected"), [(0, 2.0), (1, 30.0), (3, 3110.0)])
def test_sweep_draws_hidden_then_visible_and_sweeps_are_counted(num_steps, expected):
    # Catches layers drawn in the wrong order or from the old visible units, and one sweep too many or too few.
    v = block_gibbs(jax.random.key(0), _Counting(), jnp.full((2, 1), 2.0), num_steps)
    np.testing.assert_array_equal(v, [[expected]] * 2)
    log_prob = type("LogProb", (_Counting,), {"__call__": lambda self, v: v.sum(-1)})()
    state = BlockGibbs(num_steps).run(jax.random.key(0), log_prob, BlockGibbs(num_steps).init(jnp.full((2, 1), 2.0)))
    np.testing.assert_array_equal(state.position, [[expected]] * 2)


def test_sweep_leaves_the_distribution_of_a_binary_machine_as_it_is():
    # Catches conditionals that are not those of one joint distribution.
    with jax.enable_x64(True):
        rbm = BernoulliRBM(W, B, C)
        p = jnp.exp(rbm.log_prob(_states(3)) - rbm.log_normalizer())
        np.testing.assert_allclose(p @ _transition(rbm), p, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_draws_move_by_the_transition_matrix(num_steps):
    # Catches a key used for both layers or for every sweep, and means passed on instead of draws. The layers are of one
    # size, so that the same key gives both the same noise.
    rbm, num_draws = BernoulliRBM(np.column_stack([W, [-0.7, 0.5, -1.0]]), B, np.append(C, 0.3)), 20_000
    start = jnp.broadcast_to(_states(3), (num_draws, 8, 3))  # as many chains from every state
    v = block_gibbs(jax.random.key(1), rbm, start, num_steps)
    found = np.stack([np.bincount(row, minlength=8) for row in (v @ jnp.array([4, 2, 1])).T]) / num_draws
    expected = np.linalg.matrix_power(np.asarray(_transition(rbm), float), num_steps)
    _close(found, expected, np.sqrt(expected * (1 - expected) / num_draws))


@pytest.mark.parametrize("coupling", ["plain", "scaled"])
def test_sweeps_leave_the_moments_of_a_gaussian_machine_as_they_are(coupling):
    # Catches draws of scale sigma^2, and a mean without its variance factor.
    rbm = GaussianBernoulliRBM(W, B, C, SCALE, coupling)
    if coupling == "plain":
        start = _exact_draws(jax.random.key(2), rbm, 40_000)
    else:  # the textbook coupling is the plain one with W / sigma^2
        start = _exact_draws(jax.random.key(2), GaussianBernoulliRBM(W / SCALE[:, None] ** 2, B, C, SCALE), 40_000)
        plain = GaussianBernoulliRBM(W / SCALE[:, None] ** 2, B, C, SCALE)
        np.testing.assert_allclose(plain.log_normalizer(), rbm.log_normalizer(), rtol=1e-5)
        rbm, plain = plain, rbm
        _check_moments(block_gibbs(jax.random.key(3), plain, start, 3), rbm)
    _check_moments(block_gibbs(jax.random.key(3), rbm, start, 3), rbm)


def test_sample_reaches_the_distribution_from_its_uncoupled_start():
    # Catches a sample that returns its start, and draws that share one chain.
    rbm = GaussianBernoulliRBM(W, B, C, SCALE, sampler=BlockGibbs(num_steps=100))
    draws = rbm.sample(jax.random.key(4), (200, 100))
    assert draws.shape == (200, 100, 3)
    assert draws.dtype == jnp.float32
    _check_moments(draws.reshape(-1, 3), rbm)
    start = rbm.initial_chains(jax.random.key(5), 20_000)
    assert abs(start.mean(0) - _moments(rbm)[0]).max() > 0.1


def test_chains_keep_their_dtype_under_x64():
    # Catches NumPyro's draws in the default dtype, which would stop the scan or widen the chains.
    with jax.enable_x64(True):
        rbm = GaussianBernoulliRBM(*[np.float32(x) for x in (W, B, C, SCALE)])
        assert block_gibbs(jax.random.key(0), rbm, jnp.zeros((5, 3), jnp.float32), 2).dtype == jnp.float32
        binary = BernoulliRBM(W, B, C)
        assert block_gibbs(jax.random.key(0), binary, jnp.zeros((5, 3), jnp.int32), 2).dtype == jnp.int32


def test_chains_map_over_keys_and_compile_once():
    rbm, count = GaussianBernoulliRBM(W, B, C), 0

    @jax.jit
    def run(key, v):
        nonlocal count
        count += 1
        return block_gibbs(key, rbm, v, 3)

    keys = jax.random.split(jax.random.key(0), 2)
    v = jnp.zeros((4, 3))
    mapped = jax.vmap(lambda key: block_gibbs(key, rbm, v, 3))(keys)
    np.testing.assert_allclose(mapped, jnp.stack([run(key, v) for key in keys]), rtol=1e-5, atol=1e-5)
    assert count == 1


# ---- The negative phase -------------------------------------------------------------------------------------------------------


def _program(kind, data, params):
    made = {name: numpyro.param(name, jnp.asarray(value)) for name, value in params.items()}
    rbm = BernoulliRBM(**made) if kind == "bernoulli" else GaussianBernoulliRBM(**made, coupling=kind)
    with numpyro.plate("data", len(data)):
        numpyro.sample("v", rbm, obs=data)


def _params(kind):
    params = {"weights": W, "visible_bias": B, "hidden_bias": C}
    return params if kind == "bernoulli" else {**params, "scale": SCALE}


@pytest.mark.parametrize("kind", ["plain", "scaled", "bernoulli"])
def test_persistent_chains_give_the_gradient_of_the_exact_likelihood(kind):
    # Catches a normalizer paid once for all rows, a gradient of the wrong sign, and chains of another distribution.
    data = jnp.array([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
    data, params = data if kind != "bernoulli" else data.astype(int), {k: jnp.asarray(v) for k, v in _params(kind).items()}
    make = BernoulliRBM if kind == "bernoulli" else lambda **p: GaussianBernoulliRBM(**p, coupling=kind)
    model = negative_phase(lambda: _program(kind, data, params), num_chains=20_000, sampler=BlockGibbs(60))

    def log_joint(params):
        value, sites = log_density(seed(model, 0), (), {}, params)
        return value, sites["v/chains"]["value"]["x"]

    found, chains = jax.jit(jax.grad(log_joint, has_aux=True))(params)
    exact = jax.jit(jax.grad(lambda p: -make(**p).free_energy(data).sum() - len(data) * make(**p).log_normalizer()))(params)
    per_chain = jax.vmap(lambda v: jax.grad(lambda p: make(**p).free_energy(v))(params))(chains)
    for name in params:
        _close(found[name], exact[name], len(data) * per_chain[name].std(0) / np.sqrt(len(chains)))


def test_rbm_site_moves_by_gibbs_without_being_told_and_its_chains_persist():
    # Catches MALA at a binary site, which has no score, and chains that start afresh at every step.
    data = jnp.array([[1, 0, 0], [1, 1, 0]])
    model = negative_phase(lambda: _program("bernoulli", data, _params("bernoulli")), num_chains=50)
    svi = SVI(model, lambda: None, optax.sgd(0.0), Trace_ELBO())
    state = svi.init(jax.random.key(0))
    first = state.mutable_state["v/chains"]
    assert set(first) == {"x", "num_updates", "status"}  # no step size of MALA
    still = negative_phase(lambda: _program("bernoulli", data, _params("bernoulli")), num_chains=50, sampler=BlockGibbs(0))
    stays = SVI(still, lambda: None, optax.sgd(0.0), Trace_ELBO())
    stays.init(jax.random.key(1))
    after = stays.update(state)[0].mutable_state["v/chains"]
    np.testing.assert_array_equal(after["x"], first["x"])
    moved = svi.update(state)[0].mutable_state["v/chains"]
    assert (moved["x"] != first["x"]).any()


def test_no_gradient_flows_through_the_chains():
    # Catches a reparametrized draw of the Gaussian layer that adds its own gradient to the negative phase.
    def position(w):
        rbm = GaussianBernoulliRBM(w, B, C)
        sampler = BlockGibbs(3)
        return sampler.run(jax.random.key(0), rbm.chain_log_prob(sampler), sampler.init(jnp.zeros((4, 3)))).position.sum()

    np.testing.assert_array_equal(jax.grad(position)(jnp.asarray(W)), 0)
    by_sample = jax.grad(lambda w: GaussianBernoulliRBM(w, B, C, sampler=BlockGibbs(3)).sample(jax.random.key(0), (4,)).sum())
    with pytest.raises(NormalizerError, match="samples of an energy have no gradient"):  # a 0 would be learned from
        by_sample(jnp.asarray(W))


def test_contrastive_divergence_is_zero_on_average_at_the_models_own_data():
    # Catches a negative phase from another distribution than the kernel's own; elsewhere its gradient must not vanish.
    rbm, num_draws = GaussianBernoulliRBM(W, B, C, SCALE), 40_000

    def contrast(data):
        end = block_gibbs(jax.random.key(7), rbm, data, 1)
        per_row = jax.vmap(jax.grad(lambda w, v: GaussianBernoulliRBM(w, B, C, SCALE).free_energy(v)), (None, 0))
        difference = per_row(jnp.asarray(W), data) - per_row(jnp.asarray(W), end)
        return difference.mean(0), difference.std(0) / np.sqrt(num_draws)

    mean, error = contrast(_exact_draws(jax.random.key(6), rbm, num_draws))
    _close(mean, 0.0, error)
    mean, error = contrast(rbm.initial_chains(jax.random.key(6), num_draws))
    assert (abs(mean) > 10 * error).any()


def test_persistent_contrastive_divergence_learns_the_maximum_likelihood():
    # Catches a training loop that moves parameters but not to the maximum: the normalizer's gradient scaled or stale.
    truth = BernoulliRBM(W, B, C)
    counts = np.round(1000 * jnp.exp(truth.log_prob(_states(3)) - truth.log_normalizer())).astype(int)
    data, probability = jnp.asarray(np.repeat(_states(3), counts, axis=0)), counts / counts.sum()
    start = {name: 0.1 * jnp.asarray(value) for name, value in _params("bernoulli").items()}
    model = negative_phase(lambda: _program("bernoulli", data, start), num_chains=2000, sampler=BlockGibbs(2))
    svi = SVI(model, lambda: None, optax.adam(optax.cosine_decay_schedule(0.05, 600)), Trace_ELBO())
    learned = svi.run(jax.random.key(0), 600, progress_bar=False).params

    def divergence(params):  # of the data from the model, which the machine that made the data brings to 0
        rbm = BernoulliRBM(**params)
        return probability @ (np.log(probability) + rbm.free_energy(_states(3)) + rbm.log_normalizer())

    assert divergence(start) > 0.05
    assert divergence(learned) < 3e-3  # 11 parameters learned with 2000 chains cost about 11 / 2 / 2000


# ---- Bad input ------------------------------------------------------------------------------------------------------------------


def test_energy_without_layers_is_refused_with_the_fix():
    energy = EnergyDistribution(lambda x: x**2, initial=dist.Normal(0, 1), sampler=BlockGibbs())
    with pytest.raises(TypeError, match=r"this energy has no layers. Use GaussianBernoulliRBM"):
        energy.sample(jax.random.key(0), (3,))
