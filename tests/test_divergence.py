# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The score of a marginal against enumeration, and the Fisher divergence by a critic against closed forms."""

import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import normal
from jax.tree_util import Partial
from numpyro.distributions import constraints

from numpyro_ebm import BaseMeasure, GaussianBernoulliRBM, GumbelBernoulli, fisher_divergence, marginal_score
from numpyro_ebm.evaluate.fisher_divergence import critic_bound
from numpyro_ebm.objectives.latent import Drawn

KEY = jax.random.key(3)
ADAM = optax.adam(0.03)  # the same object, so that tests share what is compiled
NUM_VISIBLE, NUM_HIDDEN = 3, 4


pytestmark = pytest.mark.usefixtures("double_precision")


# A Gaussian-Bernoulli restricted Boltzmann machine, and a guide of its posterior's form.


def make_params(num_hidden=NUM_HIDDEN, distance=1.0):
    """The machine's params, and the guide's at a distance from the posterior."""
    W, c = normal(0, NUM_VISIBLE, num_hidden), normal(2, num_hidden)
    params = {"W": W, "b": normal(1, NUM_VISIBLE), "c": c, "scale": jnp.array([0.8, 1.0, 1.3])}
    return {**params, "A": W + distance * normal(3, *W.shape), "a": c + distance * normal(4, num_hidden)}


def machine_of(params):
    return GaussianBernoulliRBM(params["W"], params["b"], params["c"], params["scale"])


def model(v, num_hidden=NUM_HIDDEN):
    zeros = {"W": jnp.zeros((NUM_VISIBLE, num_hidden)), "b": jnp.zeros(NUM_VISIBLE), "c": jnp.zeros(num_hidden)}
    params = {name: numpyro.param(name, value) for name, value in zeros.items()}
    params["scale"] = numpyro.param("scale", jnp.ones(NUM_VISIBLE), constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (num_hidden,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
        numpyro.factor("coupling", -machine_of(params).joint_energy(v, h))


def guide(v, num_hidden=NUM_HIDDEN):
    A, a = numpyro.param("A", jnp.zeros((NUM_VISIBLE, num_hidden))), numpyro.param("a", jnp.zeros(num_hidden))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", GumbelBernoulli(v @ A + a).to_event(1))


def exact_score(params, v):
    return jax.vmap(jax.grad(machine_of(params).log_prob))(v)


def find_score(params, v, num_samples, rng_key=KEY, **settings):
    """:func:`marginal_score`, compiled: operation by operation it takes far longer."""
    score = Partial(marginal_score, model, guide, num_samples=num_samples, **settings)
    return jax.jit(lambda params, v, rng_key: score(params, v, rng_key=rng_key))(params, v, rng_key)


def draws_are(monkeypatch, h):
    """The guide draws these latents, ``(num_samples, rows, num_hidden)``."""
    drawn = Drawn({"h": jnp.asarray(h, float)}, jax.random.split(jax.random.key(0), len(h)))
    monkeypatch.setattr(inspect.getmodule(marginal_score), "draw", lambda *args, **kwargs: drawn)


def mean_over_draws(monkeypatch, params, v, states, num_samples, **settings):
    """The exact expectation of marginal_score at one visible: every tuple of draws is a row, with its probability."""
    tuples = np.array(list(itertools.product(states, repeat=num_samples)))  # (tuples, num_samples, num_hidden)
    draws_are(monkeypatch, tuples.transpose(1, 0, 2))
    rows = jnp.tile(v, (len(tuples), 1))
    found = find_score(params, rows, num_samples, num_hidden=states.shape[1], **settings)
    log_q = GumbelBernoulli(v @ params["A"] + params["a"]).to_event(1).log_prob(jnp.asarray(states, float))
    weights = jnp.exp(jnp.array(list(itertools.product(log_q, repeat=num_samples))).sum(1))
    return weights @ found


def all_states(num_hidden):
    return np.array(list(itertools.product([0, 1], repeat=num_hidden)))


@pytest.mark.parametrize("variance_reduced", [False, True])
def test_expectation_over_the_guide_is_off_by_the_weights_times_the_units(monkeypatch, variance_reduced):
    # Catches a score of another density, a draw's axis mixed with the rows', and a control variate with a mean.
    params, v = make_params(), normal(5, NUM_VISIBLE)
    states = all_states(NUM_HIDDEN)
    mean = mean_over_draws(monkeypatch, params, v, states, 1, variance_reduced=variance_reduced)
    q, p = (jax.nn.sigmoid(v @ A + a) for A, a in ((params["A"], params["a"]), (params["W"], params["c"])))
    np.testing.assert_allclose(mean - exact_score(params, v[None])[0], params["W"] @ (q - p), atol=1e-12)


def test_score_has_no_variance_where_the_guide_is_the_posterior():
    # Catches a control variate that is not the guide's own score.
    params, v = make_params(distance=0.0), normal(6, 5, NUM_VISIBLE)
    for importance_weighted in (False, True):
        found = find_score(params, v, 2, variance_reduced=True, importance_weighted=importance_weighted)
        np.testing.assert_allclose(found, exact_score(params, v), atol=1e-12)
    plain = find_score(params, v, 2)
    assert jnp.abs(plain - exact_score(params, v)).max() > 0.1


@pytest.mark.parametrize("variance_reduced", [False, True])
def test_importance_weighted_bias_falls_with_every_draw(monkeypatch, variance_reduced):
    # Catches weights that are not those of the ratio, and a control variate with weights, whose mean is not 0.
    params, v, states = make_params(2), normal(7, NUM_VISIBLE), all_states(2)
    settings = {"importance_weighted": True, "variance_reduced": variance_reduced}
    exact = exact_score(params, v[None])[0]
    biases = [float(jnp.linalg.norm(mean_over_draws(monkeypatch, params, v, states, L, **settings) - exact)) for L in (1, 2, 3)]
    plain = mean_over_draws(monkeypatch, params, v, states, 3) - exact
    assert biases[0] == pytest.approx(float(jnp.linalg.norm(plain)), rel=1e-12)  # one draw has the weight 1
    assert biases[2] < 0.9 * biases[1] < 0.81 * biases[0]


def test_importance_weighted_bias_is_the_first_term_over_the_number_of_draws(monkeypatch):
    # Catches any error in the weights: L times the bias tends to -E_q[w^2 (g - s)], with w = p / q and g the score of a draw.
    params, v, exact = make_params(1), normal(8, NUM_VISIBLE), None
    exact = exact_score(params, v[None])[0]
    log_odds_q, log_odds_p = (v @ params["A"] + params["a"])[0], (v @ params["W"] + params["c"])[0]
    q, p = (jnp.array([jax.nn.sigmoid(-x), jax.nn.sigmoid(x)]) for x in (log_odds_q, log_odds_p))
    g = -(v - params["b"]) / params["scale"] ** 2 + jnp.outer(jnp.arange(2), params["W"][:, 0])
    limit = -((p**2 / q) @ (g - exact))

    def scaled_bias(L):  # one unit: draws count by how many are 1, so that every tuple is a row of L + 1
        h = (np.arange(L)[:, None] < np.arange(L + 1))[..., None]
        draws_are(monkeypatch, h)
        rows = jnp.tile(v, (L + 1, 1))
        found = find_score(params, rows, L, importance_weighted=True, num_hidden=1)
        weights = dist.Binomial(L, logits=log_odds_q).log_prob(jnp.arange(L + 1))
        return L * (jnp.exp(weights) @ found - exact)

    near, far = (float(jnp.linalg.norm(scaled_bias(L) - limit) / jnp.linalg.norm(limit)) for L in (100, 200))
    assert far < 0.05
    assert near / far == pytest.approx(2, rel=0.1)  # the next term is of order 1 / L


def test_draws_are_the_guides_own_and_independent_between_rows():
    # Catches draws from elsewhere (the prior, relaxed bits) and rows that share them: the standard error would be too small.
    params, v, num_rows = make_params(), normal(5, NUM_VISIBLE), 20_000
    rows = jnp.tile(v, (num_rows, 1))
    found = find_score(params, rows, 1)
    q, p = (jax.nn.sigmoid(v @ A + a) for A, a in ((params["A"], params["a"]), (params["W"], params["c"])))
    wanted = exact_score(params, v[None])[0] + params["W"] @ (q - p)
    assert jnp.all(jnp.abs(found.mean(0) - wanted) < 4.5 * found.std(0) / math.sqrt(num_rows))
    np.testing.assert_allclose(found.var(0), params["W"] ** 2 @ (q * (1 - q)), rtol=0.05)  # relaxed bits have .9 of it
    relaxed = find_score(params, rows, 1, relaxed=True)
    np.testing.assert_allclose(relaxed.var(0) / found.var(0), 0.9, rtol=0.05)


def test_marginal_score_compiles_and_maps_over_keys():
    params, v = make_params(), normal(9, 4, NUM_VISIBLE)
    keys = jax.random.split(KEY, 3)
    score = Partial(marginal_score, model, guide, num_samples=2, importance_weighted=True)
    found = jax.jit(jax.vmap(lambda key, params: score(params, v, rng_key=key), (0, None)))(keys, params)
    compiled = jax.jit(lambda key: score(params, v, rng_key=key))
    one_by_one = jnp.stack([compiled(key) for key in keys])
    np.testing.assert_allclose(found, one_by_one, rtol=1e-12)
    assert jnp.abs(found[0] - found[1]).max() > 1e-3


def guide_without_latent(v):
    numpyro.param("A", 0.0)


def guide_of_five(v):
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", GumbelBernoulli(jnp.zeros((len(v), 5))).to_event(1))


def guide_of_more(v):
    guide(v)
    with numpyro.plate("data", len(v)):
        numpyro.sample("g", dist.Normal(0, 1))


def guide_across_rows(v):
    numpyro.sample("h", GumbelBernoulli(jnp.zeros((len(v), NUM_HIDDEN))).to_event(2))


def without_latents(v):
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", dist.Normal(jnp.zeros(NUM_VISIBLE), 1).to_event(1), obs=v)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guide": guide_without_latent}, r"site 'h': the model samples it and the guide, which samples \[\], does not"),
        ({"guide": guide_of_more}, r"site 'g': the guide samples it and the model, which samples \['h'\], does not"),
        ({"guide": guide_of_five}, r"site 'h': the guide gives shape \(4, 5\), the model needs \(4, 4\)"),
        ({"guide": guide_across_rows}, "site 'h': a latent outside plate 'data'"),
        ({"model": without_latents, "guide": guide_without_latent}, "the model has no latent site"),
        ({"params": {name: make_params()[name] for name in "Aa"}}, r"params lacks \['W', 'b', 'c', 'scale'\], which the model has"),
        ({"v": jnp.zeros((4, 3), int)}, "of floating-point numbers"),
        ({"importance_weighted": True, "relaxed": True}, "relaxed=True does not go with importance_weighted=True"),
    ],
)
def test_marginal_score_refuses(change, message):
    given = {"model": model, "guide": guide, "params": make_params(), "v": jnp.zeros((4, NUM_VISIBLE)), "rng_key": KEY}
    with pytest.raises(ValueError, match=message):
        marginal_score(**(given | change))


# Fisher divergence


def hermite(mean, covariance, degree=20):
    """Nodes and weights that integrate polynomials over N(mean, covariance) exactly."""
    x, w = np.polynomial.hermite_e.hermegauss(degree)
    nodes = np.array(list(itertools.product(x, repeat=len(mean))))
    weights = np.prod(list(itertools.product(w, repeat=len(mean))), 1)
    return jnp.asarray(mean + nodes @ np.linalg.cholesky(covariance).T), jnp.asarray(weights / weights.sum())


MEAN, COVARIANCE = np.array([0.5, -0.3]), np.array([[1.0, 0.4], [0.4, 0.7]])
OTHER_MEAN, OTHER_COVARIANCE = np.array([0.0, 0.2]), np.array([[1.5, -0.2], [-0.2, 0.9]])


def gaussian_score(mean, covariance, v):
    return -(v - mean) @ jnp.asarray(np.linalg.inv(covariance))


def gaussian_divergence():
    """In closed form: half the mean square of the linear function that is the difference of the scores."""
    slope = np.linalg.inv(COVARIANCE) - np.linalg.inv(OTHER_COVARIANCE)
    shift = np.linalg.inv(OTHER_COVARIANCE) @ (OTHER_MEAN - MEAN)  # at the mean of the data
    return (np.trace(slope @ COVARIANCE @ slope) + shift @ shift) / 2


def linear(a, A, v):
    return a + A @ v


def make_linear(size=2):
    return Partial(linear, jnp.zeros(size), jnp.zeros((size, size)))


def make_rows(seed, num_rows, mean=MEAN, covariance=COVARIANCE):
    return jnp.asarray(np.random.default_rng(seed).multivariate_normal(mean, covariance, num_rows))


def other_score(v, rng_key):
    return gaussian_score(OTHER_MEAN, OTHER_COVARIANCE, v)


def find(score=other_score, num_rows=2000, num_steps=600, critic=None, optim=None, **settings):
    splits = [make_rows(seed, num_rows) for seed in (0, 1, 2)]
    given = {"critic": critic or make_linear(), "optim": optim or ADAM, "progress_bar": False} | settings
    return fisher_divergence(KEY, score, splits, num_steps=num_steps, **given)


def all_probes(monkeypatch):
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=2)))
    monkeypatch.setattr(jax.random, "rademacher", lambda key, shape, dtype: jnp.broadcast_to(signs[:, None], shape).astype(dtype))


@pytest.mark.parametrize("num_probes", [None, 4])
def test_bound_is_the_divergence_less_half_the_critics_error(monkeypatch, num_probes):
    # Catches a wrong sign or factor of any of the three terms, and probes whose mean is not the trace (all 4 of them here).
    all_probes(monkeypatch)
    v, weights = hermite(MEAN, COVARIANCE)

    def score(v):
        return jnp.stack([v[0] - v[1] ** 2, 0.3 * v[0] ** 3 - v[1]])

    def best(v):
        return score(v) - gaussian_score(MEAN, COVARIANCE, v)

    def other(v):
        return jnp.stack([v[0] * v[1] - 0.5, v[1] ** 3 / 4 + v[0]])

    s, c = jax.vmap(score)(v), jax.vmap(best)(v)
    divergence_of_scores = weights @ (c**2).sum(1) / 2
    for critic in (best, other, jnp.zeros_like):
        bound = weights @ critic_bound(critic, s, v, KEY, num_probes)
        error = weights @ ((jax.vmap(critic)(v) - c) ** 2).sum(1) / 2
        np.testing.assert_allclose(bound, divergence_of_scores - error, rtol=1e-10, atol=1e-10)


def test_trace_of_an_event_of_two_dims_is_that_of_its_elements():
    # Catches coordinates of an event that are taken in another order along the way.
    A = normal(11, 6, 6)
    v = normal(12, 3, 2, 3)

    def critic(x):
        return (A @ x.reshape(6)).reshape(2, 3)

    found = critic_bound(critic, jnp.zeros_like(v), v, KEY, None) + (jax.vmap(critic)(v) ** 2).sum((1, 2)) / 2
    np.testing.assert_allclose(found, jnp.trace(A), rtol=1e-12)


def test_linear_critic_finds_the_divergence_of_gaussians():
    # Catches a critic that is trained on another bound than it is tested by, and a wrong standard error.
    found = find()
    assert abs(found.estimate - gaussian_divergence()) < 4 * found.standard_error
    assert found.standard_error < 0.05 * gaussian_divergence()
    _, A = found.critic.args
    slope = np.linalg.inv(COVARIANCE) - np.linalg.inv(OTHER_COVARIANCE)
    np.testing.assert_allclose(A, slope, atol=0.15)  # the mean over 2000 rows has it to .03 and the last steps of Adam to .05
    assert jnp.abs(A - slope).max() < jnp.abs(slope).max() / 4


def test_standard_error_is_that_of_the_mean_over_the_test_rows():
    critic = Partial(lambda a, A, v: a + A @ v, jnp.array([0.3, -0.2]), jnp.array([[0.5, 0.1], [0.0, -0.4]]))
    found = find(critic=critic, optim=optax.sgd(0.0), num_steps=1)
    v = make_rows(2, 2000)
    bounds = critic_bound(critic, other_score(v, None), v, KEY, None)
    assert found.best_step == 0
    assert found.estimate == pytest.approx(float(bounds.mean()), rel=1e-12)
    assert found.standard_error == pytest.approx(float(bounds.std(ddof=1)) / math.sqrt(2000), rel=1e-12)


def test_divergence_of_a_distribution_from_itself_is_zero():
    # Catches a bound that training can push above the truth: no critic beats 0 but by chance. The critic begins at 0.
    found = find(score=lambda v, rng_key: gaussian_score(MEAN, COVARIANCE, v))
    assert found.validation[0] == 0 <= found.validation.max()
    assert abs(found.estimate) <= 4 * found.standard_error
    assert abs(found.estimate) < 0.02


def test_best_step_on_the_validation_rows_is_kept():
    # Catches the last critic in the place of the best, one kept a look late, and one kept at every rise. The training rows are
    # too narrow, so that the critic passes by the best one on its way; small batches make it shake.
    splits = make_rows(0, 2000, covariance=COVARIANCE / 3), make_rows(1, 2000), make_rows(2, 2000)
    settings = {"critic": make_linear(), "optim": ADAM, "batch_size": 5, "progress_bar": False}
    found = fisher_divergence(KEY, other_score, splits, num_steps=200, validate_every=7, **settings)
    assert found.steps.tolist() == [*range(0, 200, 7), 200]
    assert found.best_step == found.steps[found.validation.argmax()]
    assert 0 < found.best_step < 200
    assert found.validation[-1] < found.validation.max() / 2
    assert np.diff(found.validation[found.validation.argmax() :]).max() > 0
    stopped = fisher_divergence(KEY, other_score, splits, num_steps=found.best_step, validate_every=found.best_step, **settings)
    for kept, last in zip(found.critic.args, stopped.critic.args, strict=True):
        np.testing.assert_array_equal(kept, last)  # which also says that looks do not change the steps
    assert found.estimate == stopped.estimate


def test_key_decides_the_numbers():
    first, again = find(num_steps=20), find(num_steps=20)
    assert first.estimate == again.estimate
    np.testing.assert_array_equal(first.validation, again.validation)
    splits = [make_rows(seed, 2000) for seed in (0, 1, 2)]
    settings = {"critic": make_linear(), "optim": ADAM, "num_steps": 20, "progress_bar": False}
    assert fisher_divergence(jax.random.key(4), other_score, splits, **settings).estimate != first.estimate


def test_other_arrays_compile_nothing():
    # Catches a step that is compiled at every call or every look, and arrays of score or critic that are compiled in.
    traces = []

    def score(slope, v, rng_key):
        traces.append(1)
        return -slope * v

    optim = optax.adam(0.01)
    find(Partial(score, jnp.ones(2)), optim=optim, num_steps=5)
    count = len(traces)
    found = find(Partial(score, 2 * jnp.ones(2)), optim=optim, num_steps=70, critic=Partial(linear, jnp.ones(2), jnp.eye(2)))
    assert len(traces) == count
    assert len(found.steps) == 36


def test_scores_of_a_guide_give_the_divergence_of_the_marginal():
    # Catches a draw that is used twice: with one draw per row, and c* as the critic, the mean is still the divergence.
    params = make_params(distance=0.0) | {"scale": jnp.ones(NUM_VISIBLE)}
    v = normal(14, 3, 4000, NUM_VISIBLE)

    def best(W, b, c, v):  # less the score of N(0, I)
        return b + W @ jax.nn.sigmoid(c + v @ W)

    critic = Partial(best, params["W"], params["b"], params["c"])
    score = Partial(marginal_score, model, guide, params, num_samples=1)
    settings = {"critic": critic, "optim": optax.sgd(0.0), "num_steps": 1, "progress_bar": False}
    found = fisher_divergence(KEY, score, v, **settings)
    truth = (jax.vmap(critic)(normal(15, 100_000, NUM_VISIBLE)) ** 2).sum(1) / 2
    assert abs(found.estimate - truth.mean()) < 4 * found.standard_error
    assert found.standard_error < 0.05 * truth.mean()


def test_whatever_of_a_critic_is_no_floating_array_stays():
    # Catches integer arrays, functions or None in an optimizer, and a result that lacks them.
    def apply(a, order, activation, nothing, v):
        assert nothing is None
        return activation(a * v[order])

    found = find(critic=Partial(apply, jnp.ones(2), jnp.array([1, 0]), jnp.tanh, None), num_steps=3)
    a, order, activation, nothing = found.critic.args
    assert activation is jnp.tanh
    assert nothing is None
    assert order.tolist() == [1, 0]
    assert jnp.all(a != 1)
    assert found.critic(jnp.ones(2)).shape == (2,)


ROWS = jnp.zeros((200, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_train": ROWS[:99]}, "v_train has 99 rows, and a batch needs 100"),
        ({"v_validation": ROWS[:0]}, "v_validation has 0 rows, and a choice of the best step needs 1"),
        ({"v_test": ROWS[:1]}, "v_test has 1 rows, and a standard error needs 2"),
        ({"v_test": jnp.zeros((200, 3))}, r"v_test has events of shape \(3,\) and v_train of \(2,\)"),
        ({"v_validation": ROWS.at[3].set(jnp.nan)}, "v_validation: 1 of 200 rows are NaN or infinite"),
        ({"v_train": jnp.zeros((200, 2), int)}, "v_train must be floating rows"),
        ({"splits": (ROWS, ROWS)}, r"splits must be three sets of rows, \(v_train, v_validation, v_test\), got 2 of them"),
        ({"splits": ROWS}, r"splits must be three sets of rows, .*, got shape \(200, 2\)"),
        ({"critic": lambda v: v}, "the critic has no floating array to learn"),
        (
            {"critic": Partial(lambda a, v: a @ v, jnp.ones(2))},
            r"one event of shape \(2,\) to one of the same shape, it returned \(\)",
        ),
        ({"critic": Partial(lambda a, v: (a, v), jnp.ones(2))}, r"it returned \(\(2,\), \(2,\)\)"),
        ({"score": lambda v, rng_key: v.sum(1)}, r"score returned shape \(200,\) for v_train of shape \(200, 2\)"),
        ({"score": lambda v, rng_key: 1 / v}, "200 of 200 rows of v_train have a score that is NaN or infinite"),
    ],
)
def test_fisher_divergence_refuses(change, message):
    given = {"rng_key": KEY, "score": other_score, "critic": make_linear(), "optim": optax.sgd(0.1), "num_steps": 1} | change
    splits = [given.pop(name, ROWS) for name in ("v_train", "v_validation", "v_test")]
    with pytest.raises(ValueError, match=message):
        fisher_divergence(**{"splits": splits, "progress_bar": False, **given})


def test_a_critic_that_runs_away_stops_with_its_step():
    with pytest.raises(FloatingPointError, match="step 40: the critic's bound on the validation rows is"):
        find(optim=optax.sgd(-1e6), num_steps=200, validate_every=40)
    with pytest.raises(FloatingPointError, match="step 0: the critic's bound on the validation rows is nan"):
        find(critic=Partial(linear, jnp.full(2, jnp.nan), jnp.eye(2)))
