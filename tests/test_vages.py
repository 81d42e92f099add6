# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""VaES and VaGES against the marginal model, by enumeration of all draws, in double precision."""

import itertools
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import Frozen, normal
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints
from numpyro.infer import TraceGraph_ELBO

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    DenoisingScoreMatching,
    ExactScoreMatching,
    GumbelBernoulli,
    ImportanceWeighted,
    MultiscaleDenoisingScoreMatching,
    NonFiniteError,
    PosteriorFisher,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
    VaGES,
    Variational,
    annealed_langevin,
)
from numpyro_ebm.objectives.latent import Draws, draw, variational_score, weighted_score
from numpyro_ebm.program.batch import Batch
from numpyro_ebm.weights import effective_sample_size, normalized_weights

KEY = jax.random.key(5)
NUM_VISIBLE, NUM_HIDDEN, NUM_ROWS = 2, 3, 4
STATES = np.array(list(itertools.product([0.0, 1.0], repeat=NUM_HIDDEN)))


pytestmark = pytest.mark.usefixtures("double_precision")


OBJECTIVES = {
    "SM": ExactScoreMatching(),
    "SSM": SlicedScoreMatching(),
    "SSM, not reduced": SlicedScoreMatching(num_projections=2, variance_reduced=False),
    "DSM": DenoisingScoreMatching(0.3),
    "MDSM": MultiscaleDenoisingScoreMatching(0.2, 0.1, 0.5),
}


# A Gaussian-Bernoulli machine as a function, as a model with latents, and with them summed out.


def start():
    return {"W": normal(0, NUM_VISIBLE, NUM_HIDDEN), "b": normal(1, NUM_VISIBLE), "c": normal(2, NUM_HIDDEN)}


def log_joint(params, v, h):
    """Of every row, at the latents ``{"h": (batch, NUM_HIDDEN)}``."""
    W, b, c = params["W"], params["b"], params["c"]
    return -((v - b) ** 2).sum(-1) / 2 + h["h"] @ c + ((v @ W) * h["h"]).sum(-1)


def log_marginal(params, v):
    return -((v - params["b"]) ** 2).sum(-1) / 2 + jax.nn.softplus(params["c"] + v @ params["W"]).sum(-1)


def model(v):
    params = {name: numpyro.param(name, value) for name, value in start().items()}
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (NUM_HIDDEN,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
        numpyro.factor("coupling", log_joint(params, v, {"h": h}))


def marginal(v):
    params = {name: numpyro.param(name, value) for name, value in start().items()}
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
        numpyro.factor("free_energy", log_marginal(params, v))


def guide(v, distribution=GumbelBernoulli):
    """Starts at the posterior."""
    A, a = numpyro.param("A", start()["W"]), numpyro.param("a", start()["c"])
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", distribution(v @ A + a).to_event(1))


def bits(logits):
    return dist.BernoulliLogits(logits)


def pair(v, noise=1.0):
    """One real latent for every row, whose guide is far off."""
    weight = numpyro.param("weight", 1.0)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(weight * h, noise), obs=v)


def far_guide(v, noise=1.0):
    shift = numpyro.param("shift", 3.0)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(shift, 0.3).expand([len(v)]))


@pytest.fixture(name="v")
def _visible():
    return normal(3, NUM_ROWS, NUM_VISIBLE)


def log_guide(logits):
    """The log probability of each of the states, ``(8,)``."""
    return STATES @ logits - jax.nn.softplus(logits).sum()


def tuples(size):
    """All tuples of draws for one row, ``(8 ** size, size, 1, NUM_HIDDEN)``, and the states' numbers."""
    index = np.array(list(itertools.product(range(len(STATES)), repeat=size)))
    return {"h": jnp.asarray(STATES[index])[:, :, None]}, index


def expected(loss_of, logits, sizes):
    """The exact means of a loss and of its gradient over independent sets of draws of these sizes, for one row."""
    sets, log_q = [tuples(size) for size in sizes], log_guide(logits)
    weights = [jnp.exp(log_q[index].sum(-1)) for _, index in sets]
    grid = np.stack(np.meshgrid(*[np.arange(len(w)) for w in weights], indexing="ij"), -1).reshape(-1, len(sets))
    weight = jnp.prod(jnp.stack([w[grid[:, i]] for i, w in enumerate(weights)]), 0)

    def one(at):
        return jax.value_and_grad(loss_of)(start(), *[{"h": h["h"][at[i]]} for i, (h, _) in enumerate(sets)])

    values = jax.lax.map(one, jnp.asarray(grid), batch_size=512)
    return jax.tree.map(lambda x: jnp.tensordot(weight, x, 1), values)


def exact(objective, v, v_tilde):
    def loss(params):
        return objective.loss(jax.grad(lambda v: log_marginal(params, v).sum()), KEY, v, v_tilde).sum()

    return jax.value_and_grad(loss)(start())


def posterior_logits(v):
    return (start()["c"] + v @ start()["W"])[0]


def estimated(objective, v, v_tilde, **settings):
    """The objective of one row at the estimated score, as a function of the three sets of draws."""

    def loss(params, *sets):
        return objective.loss(variational_score(log_joint, params, v_tilde, Draws(*sets), **settings), KEY, v, v_tilde).sum()

    return loss


def assert_trees_close(actual, wanted, **tolerance):
    assert set(actual) == set(wanted)
    for name in wanted:
        np.testing.assert_allclose(actual[name], wanted[name], err_msg=name, **tolerance)


# --- The estimates in expectation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SM", "SSM", "SSM, not reduced", "DSM"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_is_unbiased_where_the_guide_is_the_posterior(name, shared):
    # Catches a wrong divisor of the covariance, draws used twice in one product, and a term of the derivative of the score
    # that is lost or not differentiated. One draw for the mean and two for the rest: every tuple is enumerated.
    v, v_tilde = normal(3, 1, NUM_VISIBLE), normal(4, 1, NUM_VISIBLE)
    objective = OBJECTIVES[name]
    v_tilde = v if objective.differentiates_score else v_tilde
    loss = estimated(objective, v, v_tilde)
    if shared:
        _, gradient = expected(lambda params, a, b: loss(params, a, b, b), posterior_logits(v_tilde), [2, 2])
    else:
        _, gradient = expected(loss, posterior_logits(v_tilde), [2, 1, 2])
    assert_trees_close(gradient, exact(objective, v, v_tilde)[1], rtol=1e-10, atol=1e-12)


def test_the_same_draws_in_both_factors_bias_the_gradient():
    # Without independent draws for value and gradient the test above must fail: it does not pass whatever is tested.
    v, v_tilde = normal(3, 1, NUM_VISIBLE), normal(4, 1, NUM_VISIBLE)
    loss = estimated(OBJECTIVES["DSM"], v, v_tilde)
    _, wanted = exact(OBJECTIVES["DSM"], v, v_tilde)
    _, biased = expected(lambda params, a: loss(params, a, a, a), posterior_logits(v_tilde), [2])
    assert np.abs(biased["W"] - wanted["W"]).max() > 1e-3 * np.abs(wanted["W"]).max()


@pytest.mark.parametrize(("covariance", "share"), [("biased", 0.5), ("none", 0.0)])
def test_the_covariance_is_scaled_or_left_out_as_asked(covariance, share):
    # Catches a divisor that is L - 1 whatever is asked for. At L = 2 the biased form has half of it.
    v, v_tilde = normal(3, 1, NUM_VISIBLE), normal(4, 1, NUM_VISIBLE)
    gradients = {}
    for kind in ("unbiased", "none", covariance):
        loss = estimated(OBJECTIVES["DSM"], v, v_tilde, covariance=kind)
        gradients[kind] = expected(loss, posterior_logits(v_tilde), [1, 1, 2])[1]
    wanted = jax.tree.map(lambda full, bare: bare + share * (full - bare), gradients["unbiased"], gradients["none"])
    assert_trees_close(gradients[covariance], wanted, rtol=1e-10, atol=1e-12)
    assert np.abs(gradients["unbiased"]["c"]).max() > 0.01  # there is a covariance to miss
    np.testing.assert_allclose(gradients["none"]["c"], 0)  # the hidden bias has nothing else


def test_the_score_of_any_guide_is_off_by_the_difference_of_its_means():
    # E_q VaES - s = W (q - p) for a machine of this kind. Catches weights where there should be none.
    v, logits = normal(3, 1, NUM_VISIBLE), normal(7, NUM_HIDDEN)

    def score(params, h):
        return variational_score(log_joint, params, v, Draws(h, h, h), covariance="none")(v)[0]

    value = jnp.stack([score(start(), {"h": jnp.asarray(state)[None, None]}) for state in STATES])
    mean = jnp.exp(log_guide(logits)) @ value
    s = jax.grad(lambda v: log_marginal(start(), v).sum())(v)[0]
    shift = start()["W"] @ (jax.nn.sigmoid(logits) - jax.nn.sigmoid(posterior_logits(v)))
    np.testing.assert_allclose(mean - s, shift, rtol=1e-10)


@pytest.mark.parametrize("name", ["SM", "DSM"])
def test_the_bias_of_a_wrong_guide_does_not_fall_with_the_number_of_draws(name):
    # The theory of the paper: unbiased for the guide's expectations, at every L. Catches a dependence on L.
    v, v_tilde = normal(3, 1, NUM_VISIBLE), normal(4, 1, NUM_VISIBLE)
    v_tilde = v if name == "SM" else v_tilde
    loss, logits = estimated(OBJECTIVES[name], v, v_tilde), normal(7, NUM_HIDDEN)
    _, two = expected(loss, logits, [2, 1, 2])
    _, three = expected(loss, logits, [2, 1, 3])
    assert_trees_close(two, three, rtol=1e-10, atol=1e-12)
    assert np.abs(ravel_pytree(jax.tree.map(jnp.subtract, two, exact(OBJECTIVES[name], v, v_tilde)[1]))[0]).max() > 0.01


def test_a_score_is_nan_where_its_samples_are_not():
    """Catches an objective that takes differences of one estimate, which are 0: the samples of a guide are for given rows."""
    v, draws = normal(3, 4, NUM_VISIBLE), {"h": jnp.ones((2, 4, NUM_HIDDEN))}
    score = variational_score(log_joint, start(), v, Draws(draws, draws, draws))
    assert jnp.isfinite(score(v)).all()
    elsewhere, slope = jax.jvp(score, (v.at[1, 0].add(0.1),), (jnp.ones_like(v),))
    np.testing.assert_array_equal(jnp.isnan(elsewhere).any(1), [False, True, False, False])
    np.testing.assert_array_equal(elsewhere[0], score(v)[0])
    assert jnp.isfinite(slope[0]).all()


def test_the_bias_obeys_the_bound_by_the_divergence():
    # |E_q VaES - s| <= A sqrt(2 KL) by Pinsker's inequality, A the largest gradient. Fails for a score of the wrong scale.
    v = normal(3, 1, NUM_VISIBLE)
    exact_logits = posterior_logits(v)
    log_p = log_guide(exact_logits)
    slopes = jnp.asarray(STATES) @ start()["W"].T - (v - start()["b"])
    s, draws = jnp.exp(log_p) @ slopes, {"h": jnp.asarray(STATES)[:, None]}
    each = jax.vmap(lambda h: variational_score(log_joint, start(), v, Draws({"h": h[None]}, draws, draws))(v)[0])(draws["h"])
    for scale in (0.01, 0.1, 1.0, 3.0):
        log_q = log_guide(exact_logits + scale * normal(7, NUM_HIDDEN))
        kl = jnp.exp(log_q) @ (log_q - log_p)
        bias = jnp.linalg.norm(jnp.exp(log_q) @ each - s)
        assert 0 < bias <= jnp.linalg.norm(slopes, axis=-1).max() * jnp.sqrt(2 * kl)


def test_the_derivative_of_the_score_in_the_visible_is_that_of_the_marginal():
    # E over draws of the posterior of the estimated Hessian of log p. Catches a missing covariance, or a divisor of L.
    v, u = normal(3, 1, NUM_VISIBLE), normal(6, 1, NUM_VISIBLE)
    h, index = tuples(2)
    weight = jnp.exp(log_guide(posterior_logits(v))[index].sum(-1))

    def slope(h):
        return jax.jvp(variational_score(log_joint, start(), v, Draws({"h": h}, {"h": h}, {"h": h})), (v,), (u,))[1]

    wanted = jax.jvp(jax.grad(lambda v: log_marginal(start(), v).sum()), (v,), (u,))[1]
    np.testing.assert_allclose(jnp.tensordot(weight, jax.lax.map(slope, h["h"], batch_size=64), 1), wanted, rtol=1e-10)


# --- The weighted form -------------------------------------------------------------------------------------------------------


def weighted(objective, v, v_tilde, logits):
    def loss(params, h, keep=None):
        rows = h["h"] @ logits - jax.nn.softplus(logits).sum()
        return objective.loss(weighted_score(log_joint, params, rows, h, keep), KEY, v, v_tilde).sum()

    return loss


@pytest.mark.parametrize("name", ["SM", "DSM"])
def test_all_states_as_draws_give_the_marginal_exactly(name):
    # The sum over states is a weighted mean over one draw of each: then weighted value and gradient are exact, whatever the
    # guide. Catches weights without the guide's density, and a log density held fixed in the parameters or in the visible.
    v, v_tilde = normal(3, 1, NUM_VISIBLE), normal(4, 1, NUM_VISIBLE)
    v_tilde = v if name == "SM" else v_tilde

    def loss(params):
        flat = jnp.zeros((len(STATES), 1))
        score = weighted_score(log_joint, params, flat, {"h": jnp.asarray(STATES)[:, None]})
        return OBJECTIVES[name].loss(score, KEY, v, v_tilde).sum()

    value, gradient = jax.value_and_grad(loss)(start())
    wanted, of_wanted = exact(OBJECTIVES[name], v, v_tilde)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    assert_trees_close(gradient, of_wanted, rtol=1e-10, atol=1e-12)


def bias_of(gradient, wanted):
    return np.linalg.norm(ravel_pytree(jax.tree.map(jnp.subtract, gradient, wanted))[0])


@pytest.fixture(scope="module", name="biases")
def _biases():
    """Bias of the weighted gradient by L for a wrong guide, without and with the jackknife, by enumeration."""
    with jax.enable_x64(True):
        v, v_tilde = normal(3, 1, NUM_VISIBLE), normal(4, 1, NUM_VISIBLE)
        objective, logits = OBJECTIVES["DSM"], 0.5 * normal(7, NUM_HIDDEN)
        loss, wanted = weighted(objective, v, v_tilde, logits), exact(objective, v, v_tilde)[1]

        def jackknifed(params, h):
            size = len(h["h"])
            left_out = jax.vmap(lambda keep: loss(params, h, keep))(~jnp.eye(size, dtype=bool))
            return size * loss(params, h) - (size - 1) * left_out.mean()

        sizes = (2, 3, 4)
        return {
            kind: [bias_of(expected(of, logits, [size])[1], wanted) for size in sizes]
            for kind, of in (("plain", loss), ("jackknife", jackknifed))
        }


def test_the_bias_of_the_weighted_form_falls_as_one_over_the_number_of_draws(biases):
    # Times L it is nearly constant, for a guide that is wrong. Catches a bias that stays.
    scaled = np.array(biases["plain"]) * np.array([2, 3, 4])
    assert np.all(np.diff(biases["plain"]) < 0)
    np.testing.assert_allclose(scaled / scaled[-1], 1, atol=0.25)


def test_the_jackknife_takes_most_of_the_bias(biases):
    # From order 1/L to 1/L^2: at L = 4 less than half remains. Catches weights L and L - 1 that are swapped or shifted.
    assert np.all(np.array(biases["jackknife"]) < 0.5 * np.array(biases["plain"])[: len(biases["jackknife"])])


def test_effective_sample_size_is_between_one_and_the_number_of_draws():
    even = normalized_weights(jnp.zeros((5, 2)))
    np.testing.assert_allclose(effective_sample_size(even), 5)
    one = normalized_weights(jnp.array([[0.0], [-2000.0], [-3000.0]]))
    np.testing.assert_allclose(effective_sample_size(one), 1)
    np.testing.assert_allclose(normalized_weights(jnp.zeros((3, 1)), jnp.array([True, False, True]))[:, 0], [0.5, 0, 0.5])


# --- The engine --------------------------------------------------------------------------------------------------------------


def make(objective=OBJECTIVES["DSM"], model=model, guide=guide, optim=None, guide_optim=None, **settings):
    optim, guide_optim = optim or optax.sgd(1.0), guide_optim or optax.sgd(0.0)
    return VaGES(model, guide, optim, guide_optim, objective, **{"num_inner_steps": 0, "estimate": Variational(), **settings})


def steps(engine, v, num):
    """Losses and gradients of many first steps with keys of their own, and the state after the last one."""
    state = engine.init(KEY, v)

    def one(key):
        new, loss = engine.update(state._replace(rng_key=key), v)
        return loss, jax.tree.map(jnp.subtract, state.theta, new.theta), new.effective_sample_size

    return jax.vmap(one)(jax.random.split(jax.random.key(0), num))


def marginal_step(objective, v):
    engine = ScoreMatching(marginal, optax.sgd(1.0), objective)
    state = engine.init(KEY, v)
    new, loss = engine.update(state, v)
    return loss, jax.tree.map(jnp.subtract, state.unconstrained, new.unconstrained)


def assert_mean(samples, wanted, num_errors=5):
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(samples)
    error = flat.std(0) / np.sqrt(len(flat))
    assert np.all(np.abs(flat.mean(0) - ravel_pytree(wanted)[0]) < num_errors * error + 1e-10)


@pytest.mark.parametrize("name", ["SSM", "MDSM"])
def test_a_step_with_the_posterior_as_guide_is_that_of_the_marginal(name, v):
    # On a batch, with the reduced variance: the value is exact, and gradients are so in the mean of 3000 steps, within 5
    # standard errors (4 % of the covariance). Catches rows that see each other's draws.
    engine = make(Frozen(OBJECTIVES[name]), estimate=Variational(variance_reduced=True))
    loss, gradient, size = steps(engine, v, 3000)
    wanted, of_wanted = marginal_step(Frozen(OBJECTIVES[name]), v)
    np.testing.assert_allclose(loss, wanted, rtol=1e-10)
    assert_mean(gradient, of_wanted)
    np.testing.assert_array_equal(size, 2)  # draws with equal weights


def test_without_covariance_a_step_is_that_of_bism_without_unrolling(v):
    # In expectation, for any guide. Catches an ablation that drops too much.
    wrong = {"A": 0.5 * normal(8, NUM_VISIBLE, NUM_HIDDEN), "a": normal(9, NUM_HIDDEN)}
    objective = Frozen(OBJECTIVES["DSM"])
    ours = make(objective, estimate=Variational(1, "none", variance_reduced=True, relaxed=True))
    theirs = BiSM(model, guide, optax.sgd(1.0), optax.sgd(0.0), objective, num_inner_steps=0, hypergradient=Unrolled(0))

    def gradients(engine):
        state = engine.init(KEY, v, init_params=wrong)

        def one(key):
            new, _ = engine.update(state._replace(rng_key=key), v)
            return jax.tree.map(jnp.subtract, state.theta, new.theta)["c"]

        return jax.vmap(one)(jax.random.split(jax.random.key(1), 500))

    np.testing.assert_allclose(gradients(ours), 0)  # the hidden bias has nothing but the covariance
    np.testing.assert_allclose(gradients(theirs), 0)


def test_bits_are_hard_in_the_upper_level_unless_asked_otherwise(v):
    # Catches a guide whose relaxed draws shrink the covariance.
    args = (guide, (v,), {}, KEY, 7)
    params = {"A": start()["W"], "a": start()["c"]}
    hard, relaxed = (draw(*args, params=params, relaxed=value).latents["h"] for value in (False, True))
    assert hard.shape == relaxed.shape == (7, NUM_ROWS, NUM_HIDDEN)
    assert hard.dtype == relaxed.dtype == v.dtype
    assert np.all((hard == 0) | (hard == 1))
    assert np.any((relaxed > 0) & (relaxed < 1))
    assert len(np.unique(hard.reshape(7, -1), axis=0)) > 1


def test_weighted_steps_report_their_effective_sample_size(v):
    # With the posterior as guide all weights are equal. Catches the density of relaxed bits, or of the model alone.
    engine = make(estimate=ImportanceWeighted(4, jackknife=False))
    np.testing.assert_allclose(steps(engine, v, 3)[2], 4, rtol=1e-5)
    state = engine.init(KEY, v, init_params={"A": -2 * start()["W"]})
    state, _ = engine.update(state, v)
    assert 1 < state.effective_sample_size < 3.9


def test_the_jackknife_of_a_step_is_that_of_its_losses(v):
    # Catches masks that keep the draw they should leave out: at L = 2 the jackknife is 2 J - mean of the two single losses.
    plain, corrected = (make(estimate=ImportanceWeighted(2, jackknife=value)) for value in (False, True))
    loss, gradient, _ = steps(plain, v, 4)
    loss_corrected, gradient_corrected, _ = steps(corrected, v, 4)
    assert np.all(loss != loss_corrected)
    # the correction has no covariance: a single draw's hidden bias has no gradient
    np.testing.assert_allclose(gradient_corrected["c"], 2 * gradient["c"], rtol=1e-10)


def test_the_jackknife_leaves_out_one_draw_at_a_time(v):
    # With three draws, against the losses of the three pairs. Catches masks that keep one draw in place of leaving it out.
    engine = make(estimate=ImportanceWeighted(3, jackknife=True))
    state = engine.init(KEY, v)
    levels = engine._levels(state, Batch((v,)), {})
    phi, (noise_key, loss_key, draw_key) = levels.phi_of(state.phi), jax.random.split(KEY, 3)
    v_tilde = engine.objective.perturb(noise_key, v)
    drawn = levels._draw(phi, v_tilde, draw_key, 3)

    def loss(of):
        part = jax.tree.map(lambda x: x[jnp.array(of)], drawn)
        log_q = jax.vmap(lambda one: levels.log_q(phi, v_tilde, one))(part)
        score = weighted_score(levels.log_p, state.theta, log_q, part.latents)
        return engine.objective.loss(score, loss_key, v, v_tilde).mean()

    pairs = np.mean([loss(of) for of in ([0, 1], [0, 2], [1, 2])])
    value, _ = levels.upper(state.theta, state.phi, KEY)
    np.testing.assert_allclose(value, 3 * loss([0, 1, 2]) - 2 * pairs, rtol=1e-10)


def test_a_constant_in_the_energy_changes_nothing(v):
    # A normalizer that moves with the parameters. Catches a covariance that is not centered.
    def in_plate(v):
        scale = numpyro.param("scale", 0.7)
        params = {name: numpyro.param(name, value) for name, value in start().items()}
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", BaseMeasure(constraints.boolean, (NUM_HIDDEN,)))
            v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
            numpyro.factor("coupling", log_joint(params, v, {"h": h}) + 100 * scale)

    for objective, settings in (("SSM", {}), ("DSM", {"estimate": ImportanceWeighted(3, jackknife=False)})):
        loss, gradient, _ = steps(make(OBJECTIVES[objective], **settings), v, 2)
        again, moved, _ = steps(make(OBJECTIVES[objective], model=in_plate, **settings), v, 2)
        np.testing.assert_allclose(again, loss, rtol=1e-9)
        np.testing.assert_allclose(moved.pop("scale"), 0, atol=1e-9)
        assert_trees_close(moved, gradient, rtol=1e-8, atol=1e-9)


def test_sets_of_draws_are_as_many_as_asked(v):
    # Catches draws that are made and not used, or used twice.
    seen = []

    def watch(rng_key, log_prob, h):
        seen.append(h["h"].shape[0])
        assert log_prob(h).shape == (len(h["h"]),)
        return h

    for settings in ({}, {"shared_samples": True}, {"covariance": "none"}):
        engine = make(model=pair, guide=far_guide, estimate=Variational(5, refine=watch, **settings))
        engine.evaluate(engine.init(KEY, v[:, 0]), v[:, 0])
        assert seen[-1] == (15 if not settings else 10)


def test_factors_that_are_multiplied_have_draws_of_their_own(v):
    # Catches one set in two roles, which biases the gradient by some per cent (see above) and no loss tells.
    v = v[:, 0]
    for shared in (False, True):
        engine = make(model=pair, guide=far_guide, estimate=Variational(5, shared_samples=shared))
        state = engine.init(KEY, v)
        levels = engine._levels(state, Batch((v,)), {})
        value, mean, covariance = (h["h"] for h in levels._draws(engine.estimate, state.theta, levels.phi_of(state.phi), v, KEY))
        assert value.shape == mean.shape == covariance.shape == (5, NUM_ROWS)
        assert not np.isin(value, mean).any()
        assert not np.isin(value, covariance).any()
        assert np.isin(mean, covariance).all() == shared


def test_refined_draws_reach_the_posterior(v):
    # A linear Gaussian model and a guide far off: the gradient with 100 steps of Langevin dynamics on the draws is that of the
    # marginal, without them it is not. Mean of 400 steps, 5 standard errors and 4 %: the step makes the variance 3 % too large.
    v = v[:, 0]

    def summed(v):
        weight = numpyro.param("weight", 1.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(0, jnp.sqrt(1 + weight**2)), obs=v)

    objective = Frozen(DenoisingScoreMatching(0.3))
    refine = partial(annealed_langevin, step_size=0.03, temperatures=np.ones(100))
    marginal_engine = ScoreMatching(summed, optax.sgd(1.0), objective)
    state = marginal_engine.init(KEY, v)
    wanted = state.unconstrained["weight"] - marginal_engine.update(state, v)[0].unconstrained["weight"]

    def mean(**settings):
        _, gradient, _ = steps(make(objective, model=pair, guide=far_guide, estimate=Variational(4, **settings)), v, 400)
        return gradient["weight"].mean(), gradient["weight"].std() / 20

    refined, error = mean(refine=refine)
    plain, _ = mean()
    assert abs(refined - wanted) < 5 * error + 0.04 * abs(wanted)
    assert abs(plain - wanted) > 10 * error


# --- What it refuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimate", "settings", "message"),
    [
        (Variational, {"num_samples": 1}, "num_samples=1: a covariance needs two samples"),
        (ImportanceWeighted, {"num_samples": 1}, "num_samples=1: one sample has the weight 1"),
        (Variational, {"shared_samples": True, "covariance": "none"}, "which covariance='none' leaves out"),
        (Variational, {"variance_reduced": True, "refine": annealed_langevin}, "needs the density of the samples"),
    ],
)
def test_settings_that_cannot_be(estimate, settings, message):
    with pytest.raises(ValueError, match=message):
        estimate(**settings)


@pytest.mark.parametrize("name", ["covariance", "shared_samples", "variance_reduced", "refine"])
def test_weighted_samples_have_no_settings_of_the_others(name):
    # All factors are of the same samples, whose density must be known. Catches a setting that is taken and not used.
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        ImportanceWeighted(**{name: None})


def test_only_weights_have_a_jackknife():
    with pytest.raises(TypeError, match="unexpected keyword argument 'jackknife'"):
        Variational(jackknife=True)


def test_one_sample_is_refused_where_the_objective_differentiates_the_score():
    with pytest.raises(ValueError, match="num_samples=1: this objective differentiates the score, which has a covariance"):
        make(SlicedScoreMatching(), estimate=Variational(1, "none"))


@pytest.mark.parametrize("refine", [3, "langevin", partial])
def test_what_refines_must_be_a_function(refine):
    with pytest.raises(TypeError, match=r"refine must be a function refine\(rng_key, log_prob, h\)"):
        Variational(refine=refine)


def test_a_guide_that_is_not_reparametrized_is_refused_where_it_is_learned(v):
    hard = partial(guide, distribution=bits)
    with pytest.raises(ValueError, match=r"site 'h': the guide draws it from BernoulliLogits.*GumbelBernoulli"):
        make(guide=hard, num_inner_steps=1).init(KEY, v)
    make(guide=hard).init(KEY, v)

    def proper(v):  # that loss draws the model's latents, for which a flat measure is no distribution
        weights = numpyro.param("weights", start()["W"])
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.BernoulliProbs(0.5).expand([NUM_HIDDEN]).to_event(1))
            numpyro.sample("v", dist.Normal(h @ weights.T, 1).to_event(1), obs=v)

    engine = make(model=proper, guide=hard, num_inner_steps=1, lower_loss=TraceGraph_ELBO())
    assert np.isfinite(engine.update(engine.init(KEY, v), v)[1])


def test_refining_bits_is_refused(v):
    with pytest.raises(ValueError, match="site 'h': refine moves latents freely"):
        make(estimate=Variational(refine=annealed_langevin)).init(KEY, v)


def test_a_guide_without_params_is_refused_where_it_should_learn(v):
    def fixed(v):
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.BernoulliLogits(jnp.zeros((len(v), NUM_HIDDEN))).to_event(1))

    with pytest.raises(ValueError, match="the guide has no param site"):
        make(guide=fixed, num_inner_steps=1).init(KEY, v)
    engine = make(guide=fixed, estimate=ImportanceWeighted(3, jackknife=False))
    assert engine.update(engine.init(KEY, v), v)[0].effective_sample_size > 1


def test_a_guide_that_misses_a_latent_is_refused(v):
    def other(v):
        numpyro.param("a", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("z", dist.Normal(0, 1).expand([len(v)]))

    with pytest.raises(ValueError, match=r"site 'h': the model samples it and the guide, which samples .* does not"):
        make(guide=other).init(KEY, v)


def test_degenerate_weights_are_said(v):
    # Catches a run that learns from one draw and says nothing: posteriors of width 1e-4, and a guide of width .3.
    engine = make(model=pair, guide=far_guide, estimate=ImportanceWeighted(3, jackknife=False), optim=optax.sgd(0.0))
    with pytest.warns(UserWarning, match=r"effective sample size of less than 1\.05 of 3 samples"):
        engine.run(KEY, 2, v[:, 0], noise=1e-4, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(KEY, 2, v[:, 0], progress_bar=False)


def test_weights_that_all_underflow_stop_the_run(v):
    # Catches a silent NaN: no draw of this guide is possible in the model.
    def nowhere(v):
        params = {name: numpyro.param(name, value) for name, value in start().items()}
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", BaseMeasure(constraints.boolean, (NUM_HIDDEN,)))
            v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
            numpyro.factor("coupling", log_joint(params, v, {"h": h}) - jnp.where(h[..., 0] < 2, jnp.inf, 0))

    engine = make(model=nowhere, estimate=ImportanceWeighted(3, jackknife=False))
    why = (
        "site 'coupling': its log density is -inf at .* at latents that the guide draws.*where all weights underflow, a guide that"
    )
    with pytest.raises(ValueError, match=why):
        engine.init(KEY, v)
    state = make(estimate=ImportanceWeighted(3, jackknife=False)).init(KEY, v)
    with pytest.raises(NonFiniteError, match=why):
        engine.run(KEY, 2, v, init_state=state, progress_bar=False)


def test_every_lower_loss_trains_the_guide_beside(v):
    # Catches a lower level that is skipped or fed the wrong key: the guide moves to the posterior from elsewhere.
    far = {"A": jnp.zeros((NUM_VISIBLE, NUM_HIDDEN)), "a": jnp.zeros(NUM_HIDDEN)}
    for lower_loss in (None, PosteriorFisher()):
        engine = make(optim=optax.sgd(0.0), guide_optim=optax.adam(0.02), num_inner_steps=5, lower_loss=lower_loss)
        result = engine.run(KEY, 300, v, init_params=far, progress_bar=False)
        wanted = start()["c"] + v @ start()["W"]
        gap = ((result.params["a"] + v @ result.params["A"] - wanted) ** 2).mean()
        assert gap < 0.4 * (wanted**2).mean()
