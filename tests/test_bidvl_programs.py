# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Which programs bi-level doubly variational learning takes: networks with statistics of their own, and what is refused."""

import contextlib
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.contrib.module import eqx_module, nnx_module
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from numpyro.primitives import mutable

from numpyro_ebm import MALA, BaseMeasure, BiDVL, GumbelBernoulli
from numpyro_ebm.infer import Difference, Hinge, LowerLevel, Softplus

KEY = jax.random.key(11)
STEP = optax.sgd(1.0)
ROWS = np.arange(6.0)


pytestmark = pytest.mark.usefixtures("double_precision")


# Small programs, of which one thing can be changed.


def visible_normal(v, p):
    return dist.Normal(jnp.full(v.shape, p), 1.0)


def visible_pairs(v, p):
    return dist.Normal(jnp.full((len(v), 2), p), 1.0).to_event(1)


def bits(v, p):
    return dist.Bernoulli(jnp.full(v.shape, p))


def relaxed_bits(v, p):
    return GumbelBernoulli(jnp.full(v.shape, p))


def standard(v, p):
    return dist.Normal(jnp.full(v.shape, 0.0), 1.0)


def mixture(v, p):
    return dist.MixtureSameFamily(dist.Categorical(jnp.full((*v.shape, 2), 0.5)), dist.Normal(jnp.array([0.0, p]), 1.0))


def whole(n):
    return numpyro.plate("data", n)


def part(n):
    return numpyro.plate("data", 100, subsample_size=n)


PROGRAMS = {
    "energy": {"param": "of_energy", "plate": whole, "latents": {}, "observed": {"v": visible_normal}},
    "encoder": {"param": "of_encoder", "plate": whole, "latents": {"h": visible_normal}, "observed": {}},
    "generator": {"param": "of_generator", "plate": whole, "latents": {"h": standard}, "observed": {"v": visible_normal}},
}


def program(param, plate, latents, observed):
    def run(v):
        p = numpyro.param(param, 0.5) if param else 0.5
        with plate(len(v)):
            for name, distribution in latents.items():
                numpyro.sample(name, distribution(v, p))
            for name, distribution in observed.items():
                numpyro.sample(name, distribution(v, p), obs=v)

    return run


def programs(**changes):
    return [program(**(PROGRAMS[name] | changes.get(name, {}))) for name in PROGRAMS]


def engine_of(*three, **settings):
    return BiDVL(*(three or programs()), STEP, STEP, STEP, **settings)


# Mutable sites.


def counted(program, name):
    """A program that counts its own runs in a mutable site."""

    def counting(v):
        holder = mutable(name, {"count": jnp.zeros((), jnp.int32)})
        holder["count"] = holder["count"] + 1
        program(v)

    return counting


@pytest.mark.parametrize("num_unroll_steps", [0, 1])
def test_mutable_sites_keep_what_every_run_makes_of_them(num_unroll_steps):
    """Integers, whose finiteness nobody asks. Catches a state dropped by one of the runs of a step.

    The energy sees data and generated visibles in the upper level and generated ones in the lower; the encoder generated ones and
    data in the lower; the generator draws in each and scores data in the lower. Unrolled, the upper level has the rest as well.
    """
    names = ("energy runs", "encoder runs", "generator runs")
    three = [counted(program, name) for program, name in zip(programs(), names, strict=True)]
    engine = engine_of(*three, upper=Difference(num_unroll_steps=num_unroll_steps))
    first = engine.init(KEY, ROWS)
    state, _ = engine.update(first, ROWS)
    runs = [int(state.mutable_state[name]["count"] - first.mutable_state[name]["count"]) for name in names]
    assert runs == ([3, 4, 4] if num_unroll_steps else [3, 2, 3])


class Critic(eqx.Module):
    first: eqx.nn.SpectralNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.SpectralNorm(eqx.nn.Linear(2, 5, key=keys[0]), "weight", key=keys[1])
        self.last = eqx.nn.Linear(5, "scalar", key=keys[2])

    def __call__(self, x, state):
        x, state = self.first(x, state)
        return self.last(jnp.tanh(x)), state


class Normed(eqx.Module):
    """A linear map of what batch statistics have normalized."""

    norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(2, "batch", momentum=0.9, mode="batch")
        self.linear = eqx.nn.Linear(2, 2, key=key)

    def __call__(self, x, state):
        x, state = self.norm(x, state)
        return self.linear(x), state


def stateful(name, module, start, x):
    """The module on every row, its state kept in a mutable site."""
    net = eqx_module(name, module)
    holder = mutable(f"{name}$state", {"state": jax.tree.map(lambda x: x, start)})  # a copy, since use consumes it
    on_rows = jax.vmap(net, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    out, holder["state"] = on_rows(x, holder["state"])
    return out


def plane_programs(of_energy, of_encoder, of_generator):
    """Programs of points in the plane, from three networks."""

    def energy(v):
        with numpyro.plate("data", len(v)):
            v = numpyro.sample("v", BaseMeasure(constraints.real, (2,)), obs=v)
            numpyro.factor("energy", -(v**2).sum(-1) / 2 - of_energy(v))

    def generator(v):
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("v", dist.Normal(of_generator(h), 0.5).to_event(1), obs=v)

    def encoder(v):
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(of_encoder(v), 0.5).to_event(1))

    return energy, encoder, generator


@pytest.fixture(scope="module")
def plane():
    """Points, not at the origin."""
    return np.random.default_rng(2).normal([3.0, -1.0], [0.5, 2.0], (40, 2))


def test_networks_of_equinox_keep_their_statistics(plane):
    """Spectral norm 1 by NumPy's singular values; the encoder's running mean lies between those of data and of generated points."""
    critic, of_critic = eqx.nn.make_with_state(Critic)(jax.random.key(0))
    nets = {name: eqx.nn.make_with_state(Normed)(jax.random.key(i)) for i, name in enumerate(("encoder", "generator"))}
    of = [lambda x, name=name: stateful(name, *nets[name], x) for name in nets]
    programs = plane_programs(lambda v: stateful("critic", critic, of_critic, v), *of)
    engine, v = BiDVL(*programs, *[optax.sgd(0.01)] * 3), jnp.asarray(plane)
    half = engine.run(KEY, 30, v, progress_bar=False).state
    on_disk = pickle.dumps(jax.device_get(half))
    result = engine.run(KEY, 30, v, progress_bar=False, init_state=half)
    before, weight = (state.params["critic$params"].first.layer.weight for state in (half, result.state))
    assert jnp.abs(weight - before).max() > 1e-3
    left, right = result.state.mutable_state["critic$state"]["state"].get(critic.first.uv_index)
    norm = np.linalg.svd(weight / (left @ weight @ right), compute_uv=False)[0]
    np.testing.assert_allclose(norm, 1, rtol=1e-4)
    normed = nets["encoder"][0].norm
    statistics = result.state.mutable_state["encoder$state"]["state"]
    assert int(statistics.get(normed.batch_counter)) == 1 + 2 * 60  # at the start, and twice in every step
    running, _ = statistics.get(normed.batch_state_index)
    low, high = sorted((float(v[:, 0].mean()), float(engine.sample(KEY, result.state, 4_000, v)["v"][:, 0].mean())))
    assert high - low > 0.5
    assert low + 0.1 < float(running[0]) < high - 0.1
    again = engine.run(KEY, 30, v, progress_bar=False, init_state=pickle.loads(on_disk))
    jax.tree.map(np.testing.assert_array_equal, again.state.mutable_state, result.state.mutable_state)
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)


def test_networks_of_flax_keep_their_statistics(plane):
    """Spectral and batch normalization of NNX in single precision; NumPyro puts their states into mutable sites by itself."""
    with jax.enable_x64(False):
        rngs, v = nnx.Rngs(0), jnp.asarray(plane, jnp.float32)
        critic, last = nnx.SpectralNorm(nnx.Linear(2, 5, rngs=rngs), rngs=rngs), nnx.Linear(5, 1, rngs=rngs)
        nets = [nnx.Sequential(nnx.BatchNorm(2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)) for _ in range(2)]
        programs = plane_programs(
            lambda v: nnx_module("last", last)(jnp.tanh(nnx_module("critic", critic)(v)))[:, 0],
            lambda v: nnx_module("encoder", nets[0])(v),
            lambda h: nnx_module("generator", nets[1])(h),
        )
        engine = BiDVL(*programs, *[optax.sgd(0.01)] * 3)
        first = engine.init(KEY, v)
        state = engine.run(KEY, 60, v, progress_bar=False).state
        assert set(state.mutable_state) == {"critic$state", "encoder$state", "generator$state"}
        for name in state.mutable_state:
            moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.mutable_state[name], first.mutable_state[name])
            assert max(jax.tree.leaves(moved)) > 1e-3, name
        (kernel,) = (x for x in jax.tree.leaves(state.params["critic$params"]) if x.ndim == 2)
        (sigma,) = (x for x in jax.tree.leaves(state.mutable_state["critic$state"]) if x.size == 1)
        np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False)[0], sigma, rtol=1e-2)


# What is refused.

H, G, V = {"h": standard}, {"g": standard}, {"v": visible_normal}
WRONG_EVENTS = r"site 'v': its data are of shape \(6,\), and Normal has events of shape \(2,\) in a batch of \(6,\)"
NO_PLATE = {"plate": contextlib.nullcontext}
REFUSED = {
    "another latent": (
        "encoder",
        {"latents": H | G},
        r"site 'g': the encoder samples it and the generator, which samples \['h'\], does not",
    ),
    "missing latent": (
        "generator",
        {"latents": H | G},
        r"site 'g': the generator samples it and the encoder, which samples \['h'\], does not",
    ),
    "shape of a latent": (
        "encoder",
        {"latents": {"h": visible_pairs}},
        r"'h': the encoder gives shape \(6, 2\), the generator needs \(6,\)",
    ),
    "latent not reparametrized": ("pair", {"latents": {"h": bits}}, "'h': the encoder draws it from Bernoulli.*not reparametr"),
    "discrete prior": (
        "pair",
        {"generator": {"latents": {"h": bits}}, "encoder": {"latents": {"h": relaxed_bits}}},
        "'h': the generator draws it from Bernoulli.*is discrete",
    ),
    "support of a latent": (
        "encoder",
        {"latents": {"h": bits}},
        r"'h': the generator draws it from Normal with the support Real\(\), and the encoder from BernoulliProbs with Boolean\(\)",
    ),
    "no latents": ("generator", {"latents": {}}, "the generator has no latent site"),
    "energy with a latent": ("energy", {"latents": G}, "site 'g': the energy has a latent.*Put latents into encoder and generator"),
    "no visible": ("energy", {"observed": {}}, "the energy must observe the visible at one site, and it observes none"),
    "two visibles": ("energy", {"observed": V | {"w": visible_normal}}, "at one site, and it observes 'v', 'w'"),
    "discrete visible": ("energy", {"observed": {"v": bits}}, r"site 'v': a visible with Bernoulli.* is discrete"),
    "other visible": ("generator", {"observed": {"w": visible_normal}}, r"'v': the generator must observe it, .*observes \['w'\]"),
    "shape of the energy": ("energy", {"observed": {"v": visible_pairs}}, WRONG_EVENTS),
    "shape of the generator": ("generator", {"observed": {"v": visible_pairs}}, WRONG_EVENTS),
    "energy without plate": ("energy", NO_PLATE, "site 'v': there is no plate of the 6 rows"),
    "generator without plate": ("generator", NO_PLATE, "site 'v': there is no plate of the 6 rows"),
    "encoder without plate": ("encoder", NO_PLATE, "site 'h': the encoder draws it outside the plate of the 6 rows"),
    "subsampled generator": (
        "generator",
        {"plate": part},
        "plate 'data' shows 6 of 100 rows in the generator, and all in the energy",
    ),
    "shared by two": ("encoder", {"param": "of_energy"}, r"the energy and the encoder share \['of_energy'\], which"),
    "shared by the pair": ("generator", {"param": "of_encoder"}, r"the encoder and the generator share \['of_encoder'\]"),
    "energy at rest": ("energy", {"param": None}, "the energy has no param site"),
    "encoder at rest": ("encoder", {"param": None}, "the encoder has no param site"),
    "generator at rest": ("generator", {"param": None}, "the generator has no param site"),
    "mixed prior": ("generator", {"latents": {"h": mixture}}, "'h': the generator draws it from MixtureSameFamily.*not reparametr"),
    "bits generated": ("generator", {"observed": {"v": bits}}, "'v': the generator draws it from Bernoulli.*Pass noise=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_do_not_belong_together_are_refused(name):
    which, change, message = REFUSED[name]
    changes = {which: change} if which != "pair" else change if "encoder" in change else {"encoder": change, "generator": change}
    with numpyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        engine_of(*programs(**changes)).init(KEY, ROWS)


def test_latents_that_rows_share_are_refused():
    """Catches a term of all rows together that would be divided among them."""

    def encoder(v):
        numpyro.sample("z", dist.Normal(numpyro.param("of_encoder", 0.5), 1.0))

    def generator(v):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(numpyro.param("of_generator", 0.5) + z, 1.0), obs=v)

    with pytest.raises(ValueError, match="site 'z': the encoder draws it outside the plate of the 6 rows, and each needs latents"):
        engine_of(programs()[0], encoder, generator).init(KEY, ROWS)


def test_encoder_that_fails_on_the_visible_is_named():
    def of_images(v, p):
        return dist.Normal(v @ jnp.full((4, 1), p), 1.0)

    with pytest.raises(ValueError, match=r"the encoder failed on a batch of visibles of shape \(6,\): ."):
        engine_of(*programs(encoder={"latents": {"h": of_images}})).init(KEY, ROWS)


ARGUMENTS = {
    "none": ((), "got no argument"),
    "a tuple": (((1.0, 2.0),), "an array of floating-point numbers, got tuple"),
    "a number": ((np.array(2.0),), r"got shape \(\): it has no rows"),
    "no rows": ((np.zeros(0),), r"got shape \(0,\): it has no rows"),
    "integers": ((np.arange(3),), "got int64: energies are differentiated in it. Convert it"),
    "NaN": ((np.array([1.0, np.nan, 2.0]),), "site 'v': 1 of 3 observed events are NaN or infinite"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_no_visibles_are_refused(name):
    args, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        engine_of().init(KEY, *args)


@pytest.mark.parametrize("bounds", [(1.2, 0.8), (1.0,), 1.0])
def test_bounds_of_weights_that_are_no_pair_in_order_are_refused(bounds):
    with pytest.raises(ValueError, match=r"weight_bounds must be two positive numbers, the smaller first, got ") as caught:
        LowerLevel(weight_bounds=bounds)
    assert repr(bounds) in str(caught.value)
    with pytest.raises(ValueError, match=r"weight_bounds\[0\] must be a positive finite number, got 0"):
        LowerLevel(weight_bounds=(0, 1))


def test_wrong_types_are_refused():
    with pytest.raises(
        TypeError, match=r"elbo must be an ELBO of NumPyro that keeps mutable sites, such as Trace_ELBO\(\), got 'elbo'"
    ):
        LowerLevel(elbo="elbo")
    with pytest.raises(TypeError, match="elbo must be an ELBO of NumPyro that keeps mutable sites"):
        LowerLevel(elbo=TraceGraph_ELBO())  # it has the method from its base, which refuses


def test_batches_larger_than_the_data_are_refused():
    with pytest.raises(ValueError, match="batch_size=7 is more than the 6 rows"):
        engine_of(batch_size=7).init(KEY, ROWS)


def test_starting_values_of_nothing_are_refused():
    with pytest.raises(
        ValueError, match=r"init_params names \['of_enrgy'\].*the programs have \['of_encoder', 'of_energy', 'of_gen"
    ):
        engine_of().init(KEY, ROWS, init_params={"of_enrgy": 1.0})


def test_state_of_other_programs_is_refused():
    """Catches parameters that silently start anew."""
    state = engine_of().init(KEY, ROWS)
    for name in PROGRAMS:
        message = rf"state is of another program: its params are \['of_{name}'\], the {name} has \['renamed'\]"
        with pytest.raises(ValueError, match=message):
            engine_of(*programs(**{name: {"param": "renamed"}})).update(state, ROWS)


def test_moved_visibles_are_refused_where_the_upper_level_looks_ahead():
    with pytest.raises(ValueError, match="sampler does not go with num_unroll_steps: moved visibles have no gradient"):
        engine_of(sampler=MALA(0.1, 1), upper=Difference(num_unroll_steps=1))


def test_looking_ahead_is_refused_where_it_would_not_be_the_likelihood():
    with pytest.raises(ValueError, match="num_unroll_steps does not go with latent='complete'"):
        engine_of(upper=Difference(num_unroll_steps=1), lower=LowerLevel("complete"))
    for form in (Softplus, Hinge):
        with pytest.raises(TypeError, match="unexpected keyword argument 'num_unroll_steps'"):
            form(num_unroll_steps=1)


def test_moved_visibles_must_be_real():
    """Before compilation, and not at the first step."""

    def positive(v, p):
        return dist.LogNormal(jnp.full(v.shape, p), 1.0)

    of_positive = programs(energy={"observed": {"v": positive}}, generator={"observed": {"v": positive}})
    engine_of(*of_positive).init(KEY, ROWS + 1)
    with pytest.raises(ValueError, match=r"site 'v': its support is .*, which moved visibles would leave"):
        engine_of(*of_positive, sampler=MALA(0.1, 1)).init(KEY, ROWS + 1)


def test_elbos_that_drop_mutable_sites_are_refused():
    energy, encoder, generator = programs()
    several = Trace_ELBO(num_particles=3)
    engine_of(energy, encoder, generator, lower=LowerLevel(elbo=several)).init(KEY, ROWS)
    with pytest.raises(ValueError, match="site 'runs': NumPyro's ELBOs drop mutable sites with num_particles=3"):
        engine_of(energy, counted(encoder, "runs"), generator, lower=LowerLevel(elbo=several)).init(KEY, ROWS)
