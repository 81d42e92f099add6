# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Which optimizers can be passed, and what they are given: one rule for every engine."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

from numpyro_ebm import (
    BiSM,
    EnergyDistribution,
    ExactScoreMatching,
    Implicit,
    ImportanceWeighted,
    ParticleMMLE,
    ScoreMatching,
    Unrolled,
    VaGES,
    Variational,
    find_map,
    fisher_divergence,
)
from numpyro_ebm.optim import apply_gradient, as_transformation

KEY = jax.random.key(0)
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
CURVATURE = {"a": jnp.array([1.0, 30.0]), "b": jnp.array(4.0)}
V = 1.5 + jax.random.normal(KEY, (50,)) / 2
STEP = optax.sgd(0.1)


def quadratic(params):
    return sum((c * x**2).sum() / 2 for c, x in zip(jax.tree.leaves(CURVATURE), jax.tree.leaves(params), strict=True))


def gaussian(v):
    loc, precision = numpyro.param("loc", 0.0), numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", EnergyDistribution(lambda v: precision * (v - loc) ** 2 / 2), obs=v)


def latent(v):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(loc, 1))
        numpyro.sample("v", dist.Normal(h, 1), obs=v)


def guide(v):
    shift, scale = numpyro.param("shift", 0.0), numpyro.param("scale", 0.7, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(v / 2 + shift, scale))


def minimized(optim, num_steps=20):
    """A quadratic after some steps of an optimizer that is given all there is."""
    transformation = as_transformation(optim)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(quadratic)(params)
        return apply_gradient(transformation, gradient, state, params, value=value, value_fn=quadratic), None

    return jax.lax.scan(step, (PARAMS, transformation.init(PARAMS)), None, num_steps)[0][0]


SEARCHES = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)),
    "zoom": optax.chain(optax.scale(-1.0), optax.scale_by_zoom_linesearch(20)),
}
VALUES = {
    "polyak": optax.polyak_sgd(),
    "plateau": optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=1)),
    "momo": optax.contrib.momo(0.05),
}


@pytest.mark.parametrize("name", [*SEARCHES, *VALUES])
def test_optimizers_that_need_the_loss_are_given_it(name):
    # Catches a value or a function that is not that of the gradient: a search along a line would not end where it falls.
    end = minimized({**SEARCHES, **VALUES}[name])
    assert quadratic(end) < (1e-6 if name == "lbfgs" else 0.7) * quadratic(PARAMS)


def test_sharpness_aware_steps_are_those_of_optax():
    # Catches an optimizer broken by what it does not know (value, temperature, a key), alone and inside a chain.
    sam = optax.contrib.sam(optax.sgd(0.02), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))
    params, state = PARAMS, sam.init(PARAMS)
    for _ in range(4):
        updates, state = sam.update(jax.grad(quadratic)(params), state, params)
        params = optax.apply_updates(params, updates)
    for optim in (sam, optax.chain(sam, optax.identity())):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), minimized(optim, 4), params)
    moved = as_transformation(sam).update(PARAMS, sam.init(PARAMS), PARAMS, temperature=1.0, rng_key=KEY)[0]
    assert jax.tree.structure(moved) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("wrap", [lambda optim: optim, lambda optim: optax.chain(optax.clip(1.0), optim)], ids=["plain", "chain"])
@pytest.mark.parametrize(
    ("optim", "needed"),
    [
        (optax.lbfgs(), "'value', 'grad', and 'value_fn'"),
        (optax.polyak_sgd(), "'value'"),
        (optax.contrib.reduce_on_plateau(), "'value'"),
        (optax.contrib.momo(0.1), "'value'"),
        (optax.contrib.sam(STEP, STEP, opaque_mode=True), "grad_fn"),
        (optax.contrib.sophia(0.1), "obj_fn"),
    ],
)
def test_what_an_optimizer_lacks_is_told_by_name(optim, needed, wrap):
    # Catches optax's own words about a function of its inside, which name neither the argument nor the fix.
    transformation = as_transformation(wrap(optim), "guide_optim")
    state = transformation.init(PARAMS)
    with pytest.raises(TypeError, match=rf"^guide_optim needs {needed} beside the gradient.*such as optax.adam\(1e-3\)"):
        transformation.update(PARAMS, state, PARAMS, temperature=1.0, rng_key=KEY)


@pytest.mark.parametrize(
    "optim",
    [
        optax.lookahead(STEP, 5, 0.5),
        optax.multi_transform({"fast": STEP}, {"other": "fast"}),
        optax.multi_transform({"fast": STEP}, {"a": "fast", "b": "slow"}),
        optax.masked(STEP, {"other": True}),
        optax.multi_transform({"search": optax.lbfgs(), "step": STEP}, {"a": "search", "b": "step"}),
    ],
    ids=["lookahead", "other params", "unknown label", "mask", "search for some"],
)
def test_optimizers_of_other_params_are_refused_with_the_names(optim):
    # Catches an error from inside a tree map that does not say which params there are.
    transformation = as_transformation(optim)
    with pytest.raises(TypeError, match=r"optim does not fit the params \['a', 'b'\]: labels and masks must be trees"):
        apply_gradient(transformation, PARAMS, transformation.init(PARAMS), PARAMS, value=1.0, value_fn=quadratic)


def test_labels_of_params_give_each_its_own_step():
    optim = optax.multi_transform({"fast": optax.sgd(0.1), "still": optax.set_to_zero()}, {"a": "fast", "b": "still"})
    end = minimized(optim, 1)
    np.testing.assert_allclose(end["a"], PARAMS["a"] * (1 - 0.1 * CURVATURE["a"]), rtol=1e-6)
    assert end["b"] == PARAMS["b"]


def test_optimizers_of_numpyro_move_as_those_of_optax():
    # Catches updates that are the new values, and optax_to_numpyro, which NumPyro asserts is given a value.
    wrapped = numpyro.optim.optax_to_numpyro(STEP)
    for optim in (numpyro.optim.SGD(0.01), numpyro.optim.optax_to_numpyro(optax.sgd(0.01))):
        expected = minimized(optax.sgd(0.01), 5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), minimized(optim, 5), expected)
    transformation = as_transformation(wrapped)
    with pytest.raises(TypeError, match="pass the optax transformation that it was made of, without optax_to_numpyro"):
        transformation.update(PARAMS, transformation.init(PARAMS), PARAMS, temperature=1.0)


# The engines.


def run(engine, num_steps=3):
    return engine.run(KEY, num_steps, V, progress_bar=False)


def test_score_matching_by_lbfgs_is_exact():
    # Catches a search along a line of another loss than the one of the gradient: other rows, another key.
    params = run(ScoreMatching(gaussian, optax.lbfgs(), ExactScoreMatching()), 15).params
    np.testing.assert_allclose(params["loc"], V.mean(), rtol=1e-5)
    np.testing.assert_allclose(params["precision"], 1 / V.var(), rtol=1e-4)


def engine_by(name, optim=STEP, guide_optim=STEP):
    objective = ExactScoreMatching()
    return {
        "BiSM": lambda: BiSM(latent, guide, optim, guide_optim, objective, num_inner_steps=1, hypergradient=Unrolled(1)),
        "BiSM, implicit": lambda: BiSM(latent, guide, optim, guide_optim, objective, num_inner_steps=1, hypergradient=Implicit()),
        "VaGES": lambda: VaGES(latent, guide, optim, guide_optim, objective, num_inner_steps=1, estimate=Variational()),
        "VaGES, weighted": lambda: VaGES(
            latent, guide, optim, guide_optim, objective, num_inner_steps=1, estimate=ImportanceWeighted(3, jackknife=False)
        ),
        "ParticleMMLE": lambda: ParticleMMLE(latent, optim, num_particles=2, step_size=0.1),
    }[name]()


@pytest.mark.parametrize("name", ["BiSM", "VaGES, weighted"])
def test_searches_along_a_line_where_the_gradient_is_that_of_a_loss(name):
    assert jnp.isfinite(run(engine_by(name, optax.lbfgs())).losses).all()


@pytest.mark.parametrize("name", ["BiSM, implicit", "VaGES", "ParticleMMLE"])
def test_searches_are_refused_where_the_gradient_is_no_derivative_of_the_loss(name):
    # Catches a line searched by a loss whose slope is another one than the gradient's.
    with pytest.raises(TypeError, match=r"optim needs .*'value_fn' beside the gradient"):
        run(engine_by(name, optax.lbfgs()))


@pytest.mark.parametrize("name", ["BiSM, implicit", "VaGES"])
def test_guides_are_learned_by_a_search_where_their_steps_are_not_differentiated(name):
    assert jnp.isfinite(run(engine_by(name, guide_optim=optax.lbfgs())).losses).all()


def test_searches_of_a_guide_that_is_differentiated_through_are_refused():
    # Catches "reverse-mode differentiation does not work for while_loop", from inside optax.
    with pytest.raises(TypeError, match=r"guide_optim needs .*'value_fn' beside the gradient"):
        run(engine_by("BiSM", guide_optim=optax.lbfgs()))
    assert jnp.isfinite(run(engine_by("BiSM", guide_optim=VALUES["plateau"])).losses).all()


@pytest.mark.parametrize("name", ["BiSM", "BiSM, implicit", "VaGES"])
def test_the_value_of_the_loss_is_given_wherever_there_is_one(name):
    assert jnp.isfinite(run(engine_by(name, VALUES["plateau"])).losses).all()


def test_the_mode_is_found_by_lbfgs_in_a_few_steps():
    found = find_map(KEY, latent, {"loc": 1.0}, V, optim=optax.lbfgs(), num_steps=5)
    np.testing.assert_allclose(found.latents["h"], (1 + V) / 2, rtol=1e-5)


def test_a_critic_is_learned_by_any_optimizer():
    # Catches a rule of its own for the optimizer of a critic.
    v = jax.random.normal(KEY, (3, 200, 2))
    critic = jax.tree_util.Partial(lambda a, x: a + 0 * x, jnp.zeros(2))
    for optim in (numpyro.optim.Adam(0.1), optax.lbfgs()):
        found = fisher_divergence(KEY, lambda v, rng_key: 1 - v, v, critic, optim, 60, progress_bar=False)
        assert abs(found.estimate - 1) < 5 * found.standard_error
