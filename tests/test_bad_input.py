# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is refused, and that the error names the cause: tables of bad input by engine, which grow by one line a case.

Nothing here is compiled but where only the numbers can tell: an error comes before.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.svi import SVIState

from numpyro_ebm import (
    BernoulliRBM,
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ParticleMMLE,
    ScoreMatching,
    UnadjustedLangevin,
    VaGES,
    annealed_langevin,
    block_gibbs,
    find_map,
    fisher_divergence,
    ksd_test,
    log_normalizer,
    marginal_score,
    negative_phase,
    sample_posterior,
    to_inference_data,
)
from numpyro_ebm.infer.engine import RunResult, _split

KEY = jax.random.key(0)
Y = jnp.array([0.4, 2.9, 1.1, 3.2, -0.6, 1.4])


def model(y):
    loc, spread = numpyro.param("loc", 0.5), numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, spread), obs=y)


def guide(y):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("x", dist.Normal(slope * y, 1))


def marginal(y):
    loc, spread = numpyro.param("loc", 0.5), numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(loc, spread), obs=y)


def energy(y):
    center = numpyro.param("center", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: (y - center) ** 2 / 2), obs=y)


SGD, NOISE = optax.sgd(0.1), DenoisingScoreMatching(0.3)
ENGINES = {
    "ParticleMMLE": lambda model=model: ParticleMMLE(model, SGD, num_particles=2, step_size=0.1),
    "ScoreMatching": lambda model=marginal: ScoreMatching(model, SGD, NOISE),
    "BiSM": lambda model=model: BiSM(model, guide, SGD, SGD, NOISE),
    "VaGES": lambda model=model: VaGES(model, guide, SGD, SGD, NOISE),
    "BiDVL": lambda model=model: BiDVL(energy, guide, model, SGD, SGD, SGD),
}
engines = pytest.mark.parametrize("name", ENGINES)


def refused(message, call, *args, kind=ValueError, **kwargs):
    """``call`` ends in an error of this kind that says this."""
    with pytest.raises(kind, match=re.escape(message)):
        call(*args, **kwargs)


def untraced(*_, **__):
    pytest.fail("the model was run before its arguments were looked at")


KEYS = {
    "None": (None, "got None."),
    "an int": (0, "got 0."),
    "a float": (jnp.ones(2), "got "),
    "an array of an int": (jnp.asarray(3), "got "),
    "typed keys": (jax.random.split(KEY, 3), "got keys of shape (3,): pass one of them"),
    "raw keys": (jax.random.split(jax.random.PRNGKey(0), 3), "got keys of shape (3,): pass one of them"),
}
keys = pytest.mark.parametrize(("key", "got"), KEYS.values(), ids=KEYS)


@engines
@keys
def test_a_run_wants_one_key_before_anything_is_traced(name, key, got):
    engine = ENGINES[name](untraced)
    for verb in (engine.init, lambda key, y: engine.run(key, 2, y)):
        with pytest.raises(ValueError, match=re.escape("rng_key must be one random key, such as jax.random.key(0), got")) as error:
            verb(key, Y)
        assert got in str(error.value)


def test_an_autoguide_is_not_run_without_a_key():
    engine = BiSM(untraced, AutoNormal(untraced), SGD, SGD, NOISE)
    refused("rng_key must be one random key", engine.init, None, Y)


RBM = BernoulliRBM(jnp.zeros((3, 2)), jnp.zeros(3), jnp.zeros(2))
LATENT = {"loc": 0.0, "spread": 1.0}
SAMPLERS = {
    "sample_posterior": lambda key: sample_posterior(key, untraced, LATENT, Y, num_samples=2),
    "find_map": lambda key: find_map(key, untraced, LATENT, Y),
    "marginal_score": lambda key: marginal_score(untraced, untraced, {}, Y, rng_key=key),
    "sample_chains": lambda key: negative_phase(untraced, num_chains=2).sample_chains(key, {}, {}, 2, Y),
    "log_normalizer": lambda key: log_normalizer(RBM, "ais", rng_key=0 if key is None else key),  # None has its own words
    "fisher_divergence": lambda key: fisher_divergence(key, untraced, jnp.ones((3, 9, 2)), lambda v: v, SGD, 2, batch_size=3),
    "ksd_test": lambda key: ksd_test(key, jnp.ones((9, 2)), jnp.ones((9, 2))),
    "annealed_langevin": lambda key: annealed_langevin(key, lambda x: -(x**2), Y, 0.1, [1.0]),
    "block_gibbs": lambda key: block_gibbs(key, RBM, jnp.zeros((4, 3))),
    "EnergyDistribution.sample": lambda key: EnergyDistribution(jnp.square, initial=dist.Normal(0, 1)).sample(key, (3,)),
    "BiDVL.sample": lambda key: ENGINES["BiDVL"](untraced).sample(key, None, 3, Y),
    "BiDVL.refine": lambda key: ENGINES["BiDVL"](untraced).refine(key, None, UnadjustedLangevin(0.1, 2), Y),
}


@pytest.mark.parametrize("name", SAMPLERS)
@keys
def test_a_sampler_wants_one_key_before_anything_is_traced(name, key, got):
    refused("key must be one random key, such as jax.random.key(0), got", SAMPLERS[name], key)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0), np.asarray(jax.random.PRNGKey(0))], ids=["typed", "raw", "of NumPy"])
def test_one_key_is_one_in_every_form(key):
    assert jax.eval_shape(lambda: ENGINES["ScoreMatching"]().init(key, Y)).num_steps.shape == ()


INIT_PARAMS = {
    "a string": ("loc", TypeError, "init_params must map names of param sites to values, as {'loc': 0.5}, got 'loc'."),
    "a list": ([1.0], TypeError, "init_params must map names of param sites to values, as {'loc': 0.5}, got [1.0]."),
    "a value that is a string": (
        {"loc": "a"},
        TypeError,
        "init_params['loc'] must be an array of numbers, or a pytree of these, got 'a'.",
    ),
    "a bool": ({"loc": True}, TypeError, "init_params['loc'] must be an array of numbers"),
    "a key": ({"loc": KEY}, TypeError, "init_params['loc'] must be an array of numbers"),
    "NaN": ({"loc": jnp.nan}, ValueError, "init_params['loc']: it is nan."),
    "infinity": ({"loc": -jnp.inf}, ValueError, "init_params['loc']: it is -inf."),
    "NaN in an array": ({"loc": jnp.array([1.0, jnp.nan])}, ValueError, "init_params['loc']: 1 of 2 values are NaN or infinite."),
    "NaN in a pytree": ({"net": {"w": np.array([np.nan] * 3)}}, ValueError, "init_params['net']: 3 of 3 values are NaN"),
}


@engines
@pytest.mark.parametrize(("given", "kind", "message"), INIT_PARAMS.values(), ids=INIT_PARAMS)
def test_init_params_are_refused_before_anything_is_traced(name, given, kind, message):
    engine = ENGINES[name](untraced)
    refused(message, engine.init, KEY, Y, init_params=given, kind=kind)
    refused(message, engine.run, KEY, 2, Y, init_params=given, kind=kind)


WHILE_TRACED = {
    "unknown": ({"lco": 1.0}, "init_params names ['lco'], which is no param site: the "),
    "a sample site": ({"x": jnp.zeros(6)}, "init_params names ['x'], which is no param site"),
    "a plate": ({"data": jnp.arange(6)}, "init_params names ['data'], which is no param site but a plate site."),
    "a row of a scalar": ({"loc": jnp.zeros(6)}, "init_params['loc'] is of shape (6,), and the param of shape ()."),
    "another shape": ({"loc": jnp.zeros((2, 3))}, "init_params['loc'] is of shape (2, 3), and the param of shape ()."),
    "another structure": ({"loc": {"a": 1.0}}, "init_params['loc'] is of shape {'a': ()}, and the param of shape ()."),
    "a list of numbers": ({"loc": [1, 2.0]}, "init_params['loc'] is of shape (2,), and the param of shape ()."),
}


@engines
@pytest.mark.filterwarnings("ignore:init_to_median")
@pytest.mark.parametrize(("given", "message"), WHILE_TRACED.values(), ids=WHILE_TRACED)
def test_init_params_are_refused_before_anything_is_compiled(name, given, message):
    engine = ENGINES[name]()
    refused(message, jax.eval_shape, lambda: engine.init(KEY, Y, init_params=given))


def test_the_shape_of_a_param_that_is_drawn_is_known():
    def model(y):
        loc = numpyro.param("loc", lambda key: jax.random.normal(key, (2,)))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(loc.sum(), 1), obs=y)

    engine = ENGINES["ScoreMatching"](model)
    refused(
        "init_params['loc'] is of shape (3,), and the param of shape (2,).", engine.init, KEY, Y, init_params={"loc": jnp.ones(3)}
    )


def test_looking_at_a_param_draws_nothing():
    """Other params are drawn as they are where the value is substituted."""

    def model(y):
        loc, scale = numpyro.param("loc", jax.random.normal), numpyro.param("scale", jax.random.uniform)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(loc, scale), obs=y)

    state = ENGINES["ScoreMatching"](model).init(KEY, Y, init_params={"loc": 0.5})
    with trace() as sites, substitute(data={"loc": 0.5}), seed(rng_seed=KEY):
        model(Y)
    assert state.params["scale"] == sites["scale"]["value"]


@engines
def test_init_params_stay_inside_their_constraint(name):
    engine = ENGINES[name]()
    for value in (1.0, -1.0, 0.0):  # the first compiles, and the others are other numbers
        if value > 0:
            assert engine.init(KEY, Y, init_params={"spread": value}).params["spread"] == value
        else:
            message = f"init_params['spread'] must be inside the param's constraint, Positive(lower_bound=0.0): got {value}."
            refused(message, engine.init, KEY, Y, init_params={"spread": value})


def test_a_boundary_is_not_inside():
    def model(y):
        fraction = numpyro.param("fraction", 0.5, constraint=constraints.greater_than_eq(0.25))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(fraction, 1), obs=y)

    refused("init_params['fraction'] must be inside", ENGINES["ScoreMatching"](model).init, KEY, Y, init_params={"fraction": 0.25})


def test_init_params_may_be_traced():
    engine = ENGINES["ScoreMatching"]()
    states = jax.vmap(lambda loc: engine.init(KEY, Y, init_params={"loc": loc}))(jnp.arange(3.0))
    assert states.params["loc"].tolist() == [0, 1, 2]


def test_integers_are_numbers_to_start_from():
    state = ENGINES["ScoreMatching"]().init(KEY, Y, init_params={"loc": 2, "spread": np.array(3)})
    assert {name: (value.item(), value.dtype.kind) for name, value in state.params.items()} == {"loc": (2, "f"), "spread": (3, "f")}


def state_of(name):
    """A state with the shapes of one, which is all that there is to check of it before it is traced."""
    return jax.eval_shape(lambda: ENGINES[name]().init(KEY, Y))


NO_STATES = {
    "a result": (lambda state: RunResult({}, state, jnp.zeros(1)), "got a RunResult: it is what run returned: pass result.state."),
    "what update returns": (lambda state: (state, 0.1), "a state and a loss: pass the first of the two."),
    "params": (lambda state: state.params, "got a dict: pass what init or update of this engine gave, or .state of the result"),
    "of SVI": (lambda _: SVIState((), {}, None), "got a SVIState: pass what init"),
    "nothing": (lambda _: None, "got a NoneType: pass what init"),
}
VERBS = {
    **dict.fromkeys(ENGINES, ("update", "stable_update", "evaluate")),
    "ParticleMMLE": ("update", "stable_update", "evaluate", "get_particles", "stability_limit"),
    "BiDVL": ("update", "stable_update", "evaluate", "reconstruct", "energies"),
}


def require_refused(name, engine, state, message):
    for verb in VERBS[name]:
        refused(message, getattr(engine, verb), state, Y, kind=TypeError)
    refused(message, engine.get_params, state, kind=TypeError)
    if state is not None:
        refused(message, engine.run, KEY, 2, Y, init_state=state, kind=TypeError)


@engines
@pytest.mark.parametrize(("make", "message"), NO_STATES.values(), ids=NO_STATES)
def test_what_is_no_state_is_refused_before_anything_is_traced(name, make, message):
    engine = ENGINES[name](untraced)
    require_refused(name, engine, make(state_of(name)), message)


@engines
@pytest.mark.parametrize("other", ENGINES)
def test_a_state_of_another_engine_is_refused_by_name(name, other):
    engine, state = ENGINES[name](untraced), state_of(other)
    if other != name:
        message = f"must be a {engine.state_class.__name__}, a state of {name}, got a {type(state).__name__}: pass what init"
        require_refused(name, engine, state, message)


def test_what_is_no_state_is_not_replicated_refined_or_sampled_from():
    result = RunResult({}, None, jnp.zeros(1))
    particles, bidvl = ENGINES["ParticleMMLE"](untraced), ENGINES["BiDVL"](untraced)
    for call in (
        lambda: particles.replicate(result),
        lambda: bidvl.sample(KEY, result, 3, Y),
        lambda: bidvl.refine(KEY, result, UnadjustedLangevin(0.1, 2), Y),
    ):
        refused("got a RunResult: it is what run returned: pass result.state.", call, kind=TypeError)


def batches(y):
    loc = numpyro.param("loc", 0.5)
    with numpyro.plate("data", len(y), subsample_size=3) as index:
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y[index])


def vectors(y):
    x = numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), 1).expand([len(y)]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1).to_event(1), obs=y)


def halves(y):
    with numpyro.plate("two", 2, dim=-2), numpyro.plate("data", len(y), dim=-1):
        x = numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=jnp.stack([y, y]))


OF_PLATE = "site 'x': the state has 6 rows of plate 'data', and the data {}."
ROWS = {
    "a plate": (model, OF_PLATE),
    "a subsampled plate": (batches, OF_PLATE),
    "the inner of two plates": (halves, OF_PLATE),
    "no plate": (vectors, "site 'x': the state has values of shape (6,), and the model on these data of ({},)."),
}


@pytest.mark.parametrize("rows", [3, 4, 8])
@pytest.mark.parametrize(("model", "message"), ROWS.values(), ids=ROWS)
def test_particles_of_other_rows_than_the_data_are_refused(model, message, rows):
    engine = ENGINES["ParticleMMLE"](model)
    state = jax.eval_shape(lambda: engine.init(KEY, Y))._replace(rng_key=())
    state = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state)._replace(rng_key=KEY)
    y, message = jnp.linspace(0, 1, rows), message.format(rows)
    for verb in ("update", "stable_update", "evaluate", "get_particles", "stability_limit"):
        refused(message, getattr(engine, verb), state, y)
    refused(message, engine.run, KEY, 2, y, init_state=state)
    refused(message, to_inference_data, state, model=model, model_args=(y,))


def test_other_rows_may_have_a_posterior_of_their_own():
    state = ENGINES["ParticleMMLE"]().init(KEY, Y)
    data = to_inference_data(state, model=model, model_args=(Y[:4],), posterior={"x": jnp.zeros((5, 4))})
    assert dict(data["posterior"]["x"].sizes) == {"chain": 1, "draw": 5, "data": 4}


class Tensor:
    """What NumPy can read, and JAX cannot, such as a tensor of PyTorch."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)


def series(values):
    return pd.Series(np.asarray(values))


def frame(values):
    return pd.DataFrame({"a": np.asarray(values), "b": "word"})


@engines
@pytest.mark.parametrize("kind", [np.asarray, Tensor, series], ids=["NumPy", "a tensor", "pandas"])
def test_data_of_any_kind_are_the_same_to_every_engine(name, kind):
    engine = ENGINES[name]()
    wanted, given = (jax.eval_shape(lambda y=y: engine.init(KEY, y)) for y in (Y, kind(Y)))
    assert given == wanted
    arrays, rest = _split((kind(Y),), {})
    assert rest == _split((Y,), {})[1]  # a tensor would be compiled in by its class
    np.testing.assert_array_equal(arrays[0], Y)


LIST = "an argument of the model{} is a list of {}: pass jnp.asarray(...) of data, and a tuple of settings"
NO_ARRAYS = {
    "a list": (lambda y: y.tolist(), LIST.format("", 6)),
    "a list of integers": (lambda _: [1, 2, 3], LIST.format("", 3)),
    "a list of lists": (lambda y: [y.tolist(), y.tolist()], LIST.format("", 2)),
    "a list in a dict": (lambda y: {"y": y.tolist()}, LIST.format("", 6)),
    "an array of words": (
        lambda _: np.array(["a", "b"]),
        "an argument of the model, a ndarray of dtype <U1, does not hold numbers alone",
    ),
    "an array of objects": (
        lambda _: np.array([None]),
        "an argument of the model, a ndarray of dtype object, does not hold numbers",
    ),
    "a table with words": (
        frame,
        "an argument of the model, a DataFrame of dtype object, does not hold numbers alone: convert it.",
    ),
    "a set": (lambda y: set(y.tolist()), "an argument of the model, a set, is neither an array nor hashable"),
}


@engines
@pytest.mark.parametrize(("make", "message"), NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_what_is_no_array_is_refused_before_anything_is_traced(name, make, message):
    engine, data, state = ENGINES[name](untraced), make(Y), state_of(name)
    refused(message, engine.init, KEY, data, kind=TypeError)
    refused(message, engine.run, KEY, 2, data, init_state=state, kind=TypeError)
    for verb in VERBS[name]:
        refused(message, getattr(engine, verb), state, data, kind=TypeError)


def test_a_list_is_named_by_its_keyword():
    refused(LIST.format(", y,", 6), ENGINES["BiSM"](untraced).init, KEY, y=Y.tolist(), kind=TypeError)


def test_lists_of_arrays_and_tuples_of_settings_are_arguments():
    def stacked(parts, settings):
        model(jnp.concatenate(parts) * settings[0])

    state = ENGINES["ParticleMMLE"](stacked).init(KEY, [Y, Y], (1, 2))
    assert state.particles["x"].shape == (2, 12)
