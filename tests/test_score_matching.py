# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The score-matching engine against closed forms, and what every engine of scores refuses."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.primitives import mutable

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ExactScoreMatching,
    MultiscaleDenoisingScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
    VaGES,
)
from numpyro_ebm.objectives import ScoreObjective

KEY = jax.random.key(3)
V = jax.random.normal(jax.random.key(0), (300, 2)) @ jnp.array([[1.0, 0.6], [0.0, 0.8]]) + jnp.array([0.5, -1.0])
SGD = optax.sgd(0.1)


def gaussian(v):
    """An unnormalized normal distribution of the plane: exact score matching gives the sample's mean and covariance."""
    loc, precision = numpyro.param("loc", jnp.zeros(2)), numpyro.param("precision", jnp.eye(2))
    energy = EnergyDistribution(lambda x: (x - loc) @ precision @ (x - loc) / 2, event_shape=(2,))
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", energy, obs=v)


def fit(objective, num_steps, rate=0.1, model=gaussian, v=V, **settings):
    return ScoreMatching(model, optax.sgd(rate), objective, **settings).run(KEY, num_steps, v, progress_bar=False)


def test_exact_score_matching_of_a_normal_distribution_gives_the_samples_moments():
    """In double precision to 1e-8. Catches a score that is not the gradient row by row, and a missing trace."""
    with jax.enable_x64(True):
        v = jnp.asarray(np.asarray(V), jnp.float64)
        params = fit(ExactScoreMatching(), 4000, v=v).params
        centered = v - v.mean(0)
        np.testing.assert_allclose(params["loc"], v.mean(0), rtol=1e-8)
        np.testing.assert_allclose(params["precision"], jnp.linalg.inv(centered.T @ centered / len(v)), rtol=1e-8)


def test_gradient_of_sliced_score_matching_is_that_of_the_exact_form_in_expectation():
    """Both Rademacher directions of a plane, each with its opposite, have equal weight: the mean over many keys must agree."""
    exact, sliced = (
        ScoreMatching(gaussian, optax.sgd(1.0), objective) for objective in (ExactScoreMatching(), SlicedScoreMatching())
    )
    state = exact.init(KEY, V, init_params={"precision": jnp.array([[1.0, 0.3], [0.3, 2.0]])})

    def step(engine, key):
        return engine.update(state._replace(rng_key=key), V)[0].params["precision"]

    found = jax.vmap(lambda key: step(sliced, key))(jax.random.split(KEY, 400))
    error = found.std(0, ddof=1) / np.sqrt(400)
    assert (error < 0.02).all()
    assert (jnp.abs(found.mean(0) - step(exact, KEY)) < 5 * error + 1e-6).all()


def test_denoising_learns_the_distribution_with_its_noise():
    """The variance of noised data is 1 + .5^2 for data of variance 1. Catches noise of the wrong size or sign."""

    def model(v):
        variance = numpyro.param("variance", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", EnergyDistribution(lambda x: x**2 / (2 * variance)), obs=v)

    v = jax.random.normal(KEY, (2000,))
    result = ScoreMatching(model, optax.adam(0.01), DenoisingScoreMatching(0.5)).run(
        KEY, 1500, v, progress_bar=False, collect=lambda state: state.params["variance"]
    )
    means = result.collected[500:].reshape(10, -1).mean(1)
    error = means.std(ddof=1) / np.sqrt(10)
    assert error < 0.02  # the bugs are .25 and more away
    assert abs(means.mean() - ((v**2).mean() + 0.25)) < 5 * error


def test_batches_are_rows_of_the_data_and_their_mean_gradient_is_that_of_all():
    """The loss is linear in rows: batches must be unbiased. Catches a batch that repeats the first rows, or rows never seen."""
    whole, parts = (
        ScoreMatching(gaussian, SGD, ExactScoreMatching()),
        ScoreMatching(gaussian, SGD, ExactScoreMatching(), batch_size=7),
    )
    state = whole.init(KEY, V)
    found = jax.vmap(lambda key: parts.update(state._replace(rng_key=key), V)[0].params["loc"])(jax.random.split(KEY, 2000))
    error = found.std(0, ddof=1) / np.sqrt(2000)
    assert (error > 0).all()
    assert (jnp.abs(found.mean(0) - whole.update(state, V)[0].params["loc"]) < 5 * error).all()


@dataclass(frozen=True)
class Seen(ScoreObjective):
    """The rows as they were perturbed, and a number of the loss's own: nothing of the score."""

    def perturb(self, rng_key, v):
        return v + jax.random.normal(rng_key, v.shape, v.dtype)

    def _loss(self, score_fn, rng_key, v, v_tilde):
        return v_tilde + jax.random.normal(rng_key, v.shape, v.dtype)


def test_engines_with_the_same_key_see_the_same_noise():
    """Catches an engine that splits its key in another way: comparisons at the same noise would not be any."""

    def pair(v):
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(numpyro.param("loc", 0.0), 1))
            numpyro.sample("v", dist.Normal(h, 1), obs=v)

    def guide(v):
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(numpyro.param("shift", 0.0), jnp.ones(len(v))))

    def alone(v):
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(numpyro.param("loc", 0.0), jnp.ones(len(v))), obs=v)

    v, move = V[:8, 0], optax.sgd(0.1)
    engines = ScoreMatching(alone, move, Seen()), *(engine(pair, guide, move, move, Seen()) for engine in (BiSM, VaGES))
    losses = [engine.evaluate(engine.init(KEY, v)._replace(rng_key=KEY), v) for engine in engines]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_data_may_reach_their_site_by_a_linear_map():
    """Reshaped and scaled data have the score of the first argument: times 1/2 and back in shape."""

    def model(v):
        loc = numpyro.param("loc", jnp.zeros(4))
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(loc, 1).to_event(1), obs=v.reshape(len(v), 4) / 2)

    v = jax.random.normal(KEY, (50, 2, 2)) + 3
    result = fit(ExactScoreMatching(), 300, 1.0, model=model, v=v)
    np.testing.assert_allclose(result.params["loc"], v.reshape(50, 4).mean(0) / 2, rtol=1e-4)


def test_other_observed_sites_do_not_confuse_the_visible():
    def model(v, labels):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("label", dist.Bernoulli(0.5), obs=labels)
            numpyro.sample("v", dist.Normal(loc + labels, 1), obs=v)

    labels = jnp.arange(100) % 2
    v = jax.random.normal(KEY, (100,)) + labels
    result = ScoreMatching(model, SGD, ExactScoreMatching()).run(KEY, 300, v, labels, progress_bar=False)
    np.testing.assert_allclose(result.params["loc"], (v - labels).mean(), rtol=1e-4)


# What is refused.


def observing(*names, fn=None, of=lambda v: v, plate=True):
    """A model that observes a function of its first argument at sites of these names."""

    def model(v):
        loc = numpyro.param("loc", 0.0)
        where = fn or dist.Normal(loc, 1)
        if plate:
            with numpyro.plate("data", len(v)):
                for name in names:
                    numpyro.sample(name, where, obs=of(v))
        else:
            for name in names:
                numpyro.sample(name, where.expand([len(v)]).to_event(1), obs=of(v))

    return model


def latent_in_plate(v):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(loc, 1))
        numpyro.sample("v", dist.Normal(h, 1), obs=v)


def latent_outside(v):
    loc = numpyro.param("loc", 0.0)
    h = numpyro.sample("h", dist.Normal(loc, 1))
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", dist.Normal(h, 1), obs=v)


def with_mutable(v):
    count = mutable("count", {"n": jnp.zeros(())})
    count["n"] = count["n"] + 1
    observing("v")(v)


def no_params(v):
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", dist.Normal(0, 1), obs=v)


ROW = V[:, 0]
REFUSED = {
    "no site": (observing("v", of=lambda v: jnp.zeros_like(v)), ROW, r"no site observes it: its observed sites are 'v'"),
    "two sites": (observing("a", "b"), ROW, "sites 'a', 'b' all observe it"),
    "discrete": (
        observing("v", fn=dist.Bernoulli(0.3), of=lambda v: (v > 0).astype(jnp.int32)),
        ROW,
        "site 'v': a visible with Bernoulli(Probs)? is discrete and has no score",
    ),
    "bounded": (observing("v", fn=dist.LogNormal(0, 1)), jnp.abs(ROW), "site 'v': its support is .* on all of real space"),
    "not linear": (observing("v", of=jnp.exp), ROW, r"site 'v': its data are a function .* not linear"),
    "not in a plate": (observing("v", plate=False), ROW, r"site 'v': its batch shape is \(\), and the first argument has 300 rows"),
    "latents": (latent_in_plate, ROW, "site 'h': ScoreMatching has no latents"),
    "latent outside": (latent_outside, ROW, "site 'h': a latent outside plate 'data' belongs to all rows"),
    "mutable": (with_mutable, ROW, "site 'count': mutable sites are not kept"),
    "no params": (no_params, ROW, "no param site"),
    "integers": (observing("v"), jnp.arange(4), "floating-point numbers, got int32"),
    "no rows": (observing("v"), jnp.zeros((0,)), "has no rows"),
    "a scalar": (observing("v"), jnp.zeros(()), "has no rows"),
    "not an array": (observing("v"), (1.0, 2.0), "an array of floating-point numbers, got tuple"),
    "nan": (observing("v"), ROW.at[3].set(jnp.nan), "site 'v': 1 of 300 observed events are NaN or infinite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_no_score_can_teach_is_refused(name):
    model, v, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ScoreMatching(model, SGD, ExactScoreMatching()).init(KEY, v)


def test_plate_of_another_axis_is_not_that_of_the_rows():
    """As many columns as rows, in the plate. Catches a density of every column taken for that of a row."""

    def model(v):
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(numpyro.param("loc", 0.0), jnp.ones(v.shape)), obs=v)

    with pytest.raises(ValueError, match=r"site 'v': its batch shape is \(2, 2\).*its leftmost dimension must be that of the rows"):
        ScoreMatching(model, SGD, ExactScoreMatching()).init(KEY, V[:2])


def test_batch_of_one_has_no_spread_of_noise_levels():
    objective = MultiscaleDenoisingScoreMatching(0.1, 0.1, 1.0)
    with pytest.raises(ValueError, match="a batch of 1: the spread of noise levels"):
        ScoreMatching(observing("v"), SGD, objective).init(KEY, ROW[:1])


def test_batch_must_not_be_larger_than_the_data():
    with pytest.raises(ValueError, match="batch_size=301 is more than the 300 rows"):
        ScoreMatching(observing("v"), SGD, ExactScoreMatching(), batch_size=301).init(KEY, ROW)


def test_state_of_another_model_is_refused():
    state = ScoreMatching(observing("v"), SGD, ExactScoreMatching()).init(KEY, ROW)
    with pytest.raises(ValueError, match="the state is of another program"):
        ScoreMatching(gaussian, SGD, ExactScoreMatching()).update(state, V)


def test_flat_visible_with_a_factor_is_an_energy():
    """The joint form of a model without latents. Catches a guard that stops a score, or a factor that is not differentiated."""

    def model(v):
        precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(v)):
            v = numpyro.sample("v", BaseMeasure(), obs=v)
            numpyro.factor("energy", -precision * v**2 / 2)

    v = jax.random.normal(KEY, (500,)) * 2
    result = fit(ExactScoreMatching(), 2000, 0.05, model=model, v=v)
    np.testing.assert_allclose(result.params["precision"], 1 / (v**2).mean(), rtol=1e-3)
