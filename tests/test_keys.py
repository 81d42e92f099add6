# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""No key is used for two purposes: what a program draws by itself is apart from noise, directions, rows and samples."""

from collections import defaultdict
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import normal

from numpyro_ebm import (
    BiDVL,
    BiSM,
    EnergyDistribution,
    ExactScoreMatching,
    Implicit,
    ImportanceWeighted,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
    VaGES,
    Variational,
    marginal_score,
)

KEY = jax.random.key(5)
ROWS = normal(0, 6)
USED = defaultdict(set)


def use(purpose, key):
    """Remembers a key when the compiled step uses it."""
    data = jax.random.key_data(key)
    jax.debug.callback(lambda data: USED[purpose].update(map(tuple, np.reshape(data, (-1, 2)).tolist())), data)
    return key


@dataclass(frozen=True)
class Watched(SlicedScoreMatching):
    def perturb(self, rng_key, v):
        return v + 0.1 * jax.random.normal(use("noise", rng_key), v.shape, v.dtype)

    def _loss(self, score_fn, rng_key, v, v_tilde):
        return super()._loss(score_fn, use("directions", rng_key), v, v_tilde)


def dropout(program, shape):
    return jax.random.bernoulli(use(program, numpyro.prng_key()), 0.5, shape)


def marginal(v):
    loc = numpyro.param("loc", 0.1)
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", dist.Normal(loc * dropout("model", v.shape), 1), obs=v)


def joint(v):
    loc = numpyro.param("loc", 0.1)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(loc * dropout("model", v.shape) + h, 1), obs=v)


def guide(v):
    slope = numpyro.param("slope", 0.1)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(slope * v * dropout("guide", v.shape), 1))


def energy(v):
    loc = numpyro.param("loc", 0.1)
    with numpyro.plate("data", len(v)):
        params = loc * dropout("model", v.shape)
        numpyro.sample("v", EnergyDistribution(lambda p, v: (v - p) ** 2 / 2, params=params, batch_shape=v.shape), obs=v)


def generator(v):
    shift = numpyro.param("shift", 0.1)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(h + shift * dropout("generator", v.shape), 1), obs=v)


PAIR = joint, guide, optax.sgd(0.1), optax.sgd(0.1), Watched()
ENGINES = {
    "ScoreMatching": lambda: ScoreMatching(marginal, optax.sgd(0.1), Watched(), batch_size=4),
    "BiSM": lambda: BiSM(*PAIR, hypergradient=Unrolled(), batch_size=4),
    "BiSM, implicit": lambda: BiSM(*PAIR, hypergradient=Implicit(), batch_size=4),
    "VaGES": lambda: VaGES(*PAIR, estimate=Variational(), batch_size=4),
    "VaGES, weighted": lambda: VaGES(*PAIR, estimate=ImportanceWeighted(3, jackknife=False), batch_size=4),
    "BiDVL": lambda: BiDVL(energy, guide, generator, *[optax.sgd(0.1)] * 3, batch_size=4),
}


@pytest.mark.parametrize("method", ["update", "evaluate"])
@pytest.mark.parametrize("name", ENGINES)
def test_no_key_has_two_purposes(name, method, monkeypatch):
    """Catches a program that is seeded with the key that its engine splits: the dropout mask was the slicing direction."""
    draw_rows = jax.random.randint
    monkeypatch.setattr(jax.random, "randint", lambda key, *args, **kwargs: draw_rows(use("rows", key), *args, **kwargs))
    engine = ENGINES[name]()
    state = engine.init(KEY, ROWS)
    jax.effects_barrier()
    USED.clear()
    jax.block_until_ready(getattr(engine, method)(state, ROWS))
    jax.effects_barrier()
    wanted = {"model"} | ({"rows"} if method == "update" else set())
    wanted |= {"guide", "generator"} if name == "BiDVL" else {"noise", "directions"}
    assert wanted <= USED.keys()
    purposes = defaultdict(set)
    for purpose, keys in USED.items():
        for key in keys:
            purposes[key].add(purpose)
    assert {key: found for key, found in purposes.items() if len(found) > 1} == {}


def test_sliced_loss_of_a_model_with_dropout_is_the_exact_one():
    """A mask drawn with the key of the directions agreed with them in every element: the loss was -2.3 where -.5 is exact."""

    def model(v):
        numpyro.param("unused", 0.0)
        keep = 2.0 * jax.random.bernoulli(numpyro.prng_key(), 0.5, v.shape[1:])
        with numpyro.plate("data", len(v)):
            fn = EnergyDistribution(lambda keep, v: (keep * v).sum() ** 2 / 2, v.shape[1:], params=keep)
            numpyro.sample("v", fn, obs=v)

    v = jnp.zeros((1, 6))  # the score is 0 there: the loss is the trace, - sum of keep^2, of mean -12
    engine = ScoreMatching(model, optax.sgd(0.0), SlicedScoreMatching())
    state = engine.init(KEY, v)
    losses = jax.vmap(lambda key: engine.evaluate(state._replace(rng_key=key), v))(jax.random.split(KEY, 4000))
    assert abs(losses.mean() + 12) < 5 * losses.std() / np.sqrt(4000)


# A guide that draws something beside its latents, such as dropout: its density at a draw is that of the same mask.


def _two_ways(v):
    numpyro.param("unused", 0.0)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(h, 1), obs=v)


def _guide_of_a_sign(sd):
    """N(v, sd^2) or N(-v, sd^2), by what the guide draws itself."""

    def guide(v):
        slope = numpyro.param("slope", 1.0)
        sign = jax.random.rademacher(numpyro.prng_key(), (), float)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(slope * sign * v, sd))

    return guide


@pytest.mark.parametrize(
    ("settings", "sd", "exact"), [({"variance_reduced": True}, 0.1, -1.0), ({"importance_weighted": True}, 1.0, -0.5)]
)
def test_scores_of_a_guide_with_dropout_are_by_the_mask_of_each_draw(settings, sd, exact):
    # the mean of d/dv log p(v, h) = h - v over h is -v (its own density takes nothing away), and over the posterior -v / 2
    v, params = jnp.array([1.0, -2.0]), {"slope": 1.0, "unused": 0.0}
    score = marginal_score(
        _two_ways, _guide_of_a_sign(sd), params, v, rng_key=KEY, num_samples=100_000 if sd == 1 else 400_000, **settings
    )
    np.testing.assert_allclose(score, exact * v, atol=0.07)  # with the mask of another draw: 99 v, or -.9 v


ESTIMATES = {
    "BiSM": lambda *pair: BiSM(*pair, num_inner_steps=0, hypergradient=Unrolled(0)),
    "VaGES, reduced": lambda *pair: VaGES(*pair, num_inner_steps=0, estimate=Variational(1, "none", variance_reduced=True)),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_engines_take_the_density_of_a_draw_with_its_mask(name):
    """Of h = sign v + e / 10 the score is -2 v or 0, and -9.9 e or 10.1 e; with another mask it is 200 v beside."""

    @dataclass(frozen=True)
    class Square(ExactScoreMatching):
        differentiates_score = False

        def _loss(self, score_fn, rng_key, v, v_tilde):
            return score_fn(v_tilde) ** 2

    engine = ESTIMATES[name](_two_ways, _guide_of_a_sign(0.1), optax.sgd(0.0), optax.sgd(0.0), Square())
    v = jnp.full(50, 2.0)
    state = engine.init(KEY, v)
    losses = jax.vmap(lambda key: engine.evaluate(state._replace(rng_key=key), v))(jax.random.split(KEY, 40))
    assert (losses < 300).all()
    exact = (9.9**2 + 10.1**2 + 4 * 2.0**2) / 2
    assert abs(losses.mean() - exact) < 5 * losses.std() / np.sqrt(40)
