# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Random fields: the gradient of their joint normalizer, exactly where the pool is given, and what is learned with it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import lift, mask, scope, seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from numpyro_ebm import (
    MALA,
    BaseMeasure,
    EnergyDistribution,
    NormalizerError,
    ParticleMMLE,
    TiltedDistribution,
    UnadjustedLangevin,
    check_model,
    negative_phase,
    to_inference_data,
)
from numpyro_ebm.program.random_field import RandomField, record_run
from numpyro_ebm.samplers import Sampler

KEY = jax.random.key(11)
STILL = MALA(num_steps=0)  # a pool that stays where init_chains puts it makes the added gradient a plain number
REAL = constraints.real


def _gradient(model, params, latents, *args, key=0):
    """The gradient of the model's log density in its parameters."""

    def log_joint(params):
        return log_density(seed(model, jax.random.key(key)), args, {}, {**params, **latents})[0]

    return jax.jit(jax.grad(log_joint))(params)


# ---- Quadratic fields, whose log Z is known ----------------------------------------------------------------------------

PARAMS = {"a": jnp.array(0.3), "b": jnp.array([0.5, -1.0, 0.2])}


def _precision(a):
    """Of (v0, v1, h), positive definite for |a| < 1."""
    return jnp.array([[2.0, 0.1, a], [0.1, 1.5, -a], [a, -a, 2.5]]) * jnp.exp(a)


def _log_z(params):
    precision, b = _precision(params["a"]), params["b"]
    return b @ jnp.linalg.solve(precision, b) / 2 - jnp.linalg.slogdet(precision)[1] / 2


def _log_p(params, v, h):
    u = jnp.concatenate([v, h], -1)
    return u @ params["b"] - jnp.einsum("...i,ij,...j->...", u, _precision(params["a"]), u) / 2


def _quadratic_field(v, subsample_size=None):
    params = {name: numpyro.param(name, value) for name, value in PARAMS.items()}
    with numpyro.plate("data", len(v), subsample_size=subsample_size) as index:
        h = numpyro.sample("h", BaseMeasure(REAL, (1,)))
        v = numpyro.sample("v", BaseMeasure(REAL, (2,)), obs=v[index])
        numpyro.factor("coupling", _log_p(params, v, h))


def _cubature():
    """Six points with exactly the mean and covariance of the field: on them every quadratic has its exact expectation."""
    cov = jnp.linalg.inv(_precision(PARAMS["a"]))
    spread = jnp.sqrt(3.0) * jnp.linalg.cholesky(cov).T
    return cov @ PARAMS["b"] + jnp.concatenate([spread, -spread])


def _still(model, pool, num_chains):
    return negative_phase(model, num_chains=num_chains, sampler=STILL, init_chains={"random_field": pool})


V, H = jnp.array([[0.4, 1.0], [-0.2, 0.3], [1.1, -0.7]]), jnp.array([[0.2], [-0.5], [0.9]])


@pytest.mark.parametrize("num_data", [3, 12])
def test_gradient_of_a_quadratic_field_is_exact_in_a_plate_and_scaled_under_subsampling(num_data):
    # guards against: the sign, one normalizer for all rows, a missing plate scale, a pool in which the data are not free
    subsample_size = None if num_data == 3 else 3
    pool = jnp.repeat(_cubature()[:, None], 3, 1)
    model = _still(_quadratic_field, {"v": pool[..., :2], "h": pool[..., 2:]}, 18)
    data = jnp.tile(V, (num_data // 3, 1))
    latents = {"h": H} if subsample_size is None else {"h": H, "data": jnp.arange(3)}
    found = _gradient(model, PARAMS, latents, data, subsample_size)
    scale = num_data / 3
    exact = jax.grad(lambda params: scale * (_log_p(params, V, H).sum() - 3 * _log_z(params)))(PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(found[name], exact[name], rtol=2e-5, atol=2e-5)


def test_gradient_of_a_field_without_a_plate_has_one_normalizer():
    # guards against: code that needs a plate
    def model(v):
        params = {name: numpyro.param(name, value) for name, value in PARAMS.items()}
        v = numpyro.sample("v", BaseMeasure(REAL, (2,)), obs=v)
        h = numpyro.sample("h", BaseMeasure(REAL, (1,)))
        numpyro.factor("coupling", _log_p(params, v, h))

    pool = _cubature()
    found = _gradient(_still(model, {"v": pool[:, :2], "h": pool[:, 2:]}, 6), PARAMS, {"h": H[0]}, V[0])
    exact = jax.grad(lambda params: _log_p(params, V[0], H[0]) - _log_z(params))(PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(found[name], exact[name], rtol=2e-5, atol=2e-5)


def test_normalized_sites_and_several_factors_are_in_the_field_too():
    # guards against: a pool density of the factors alone. exp(a h v - h^2/2) N(v; b, 1): log Z in closed form
    def model(v):
        a, b = numpyro.param("a", 0.5), numpyro.param("b", 0.3)
        h = numpyro.sample("h", BaseMeasure())
        v = numpyro.sample("v", dist.Normal(b, 1), obs=v)
        numpyro.factor("coupling", a * h * v)
        numpyro.factor("confine", -(h**2) / 2)

    def log_z(params):  # over h: exp(a^2 v^2 / 2); over v: N(b, 1) against it
        a, b = params["a"], params["b"]
        return b**2 * a**2 / (2 * (1 - a**2)) - jnp.log(1 - a**2) / 2

    params = {"a": 0.5, "b": 0.3}
    precision = jnp.array([[1.0, -0.5], [-0.5, 1.0]])  # of (h, v)
    cov = jnp.linalg.inv(precision)
    spread = jnp.sqrt(2.0) * jnp.linalg.cholesky(cov).T
    pool = cov @ jnp.array([0.0, 0.3]) + jnp.concatenate([spread, -spread])
    found = _gradient(_still(model, {"h": pool[:, 0], "v": pool[:, 1]}, 4), params, {"h": 0.7}, jnp.array(-0.4))
    exact = jax.grad(lambda p: p["a"] * 0.7 * -0.4 - (-0.4 - p["b"]) ** 2 / 2 - log_z(p))(params)
    for name in params:
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-5)


def test_parameters_behind_a_fixed_factor_make_a_field():
    # guards against: a coupling without parameters of its own that makes log Z depend on those of its parents
    def model(v):
        h = numpyro.sample("h", BaseMeasure())
        v = numpyro.sample("v", dist.Normal(numpyro.param("b", 0.3), 1), obs=v)
        numpyro.factor("coupling", 0.5 * h * v - h**2 / 2)

    report = check_model(model, jnp.array(1.0))
    assert report.is_random_field
    assert report.needs_negative_phase
    assert "param 'b'" in report.sites[-1].verdict


# ---- A field that is not Gaussian, by quadrature -------------------------------------------------------------------------

THETA = {"a": jnp.array(0.8), "b": jnp.array(0.4), "c": jnp.array(1.0)}


def _log_quartic(params, v, h):
    return -params["a"] * (v**2 - 1) ** 2 - params["b"] * h**2 + params["c"] * h * jnp.tanh(v) - h / 2


def _quartic_field(v):
    params = {name: numpyro.param(name, value) for name, value in THETA.items()}
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.positive))
        v = numpyro.sample("v", BaseMeasure(), obs=v)
        numpyro.factor("coupling", _log_quartic(params, v, h))


def _quartic_expectations():
    v, h = np.meshgrid(np.linspace(-4, 4, 801), np.linspace(0, 9, 801)[1:] - 9 / 1600, indexing="ij")
    weight = np.exp(_log_quartic({name: float(x) for name, x in THETA.items()}, v, h))
    terms = -((v**2 - 1) ** 2), -(h**2), h * np.tanh(v)
    return np.array([(term * weight).sum() / weight.sum() for term in terms])


@pytest.mark.parametrize("num_rows", [1, 100])
def test_pool_moved_by_the_default_sampler_has_the_distribution_of_the_field(num_rows):
    # guards against: a missing log Jacobian of a constrained site, rows accepted together, chains that keep the data fixed
    v, h = jnp.full(num_rows, 0.5), jnp.full(num_rows, 1.0)
    num_chains = 8000
    model = negative_phase(_quartic_field, num_chains=num_chains, sampler=MALA(num_steps=150))
    found = _gradient(model, THETA, {"h": h}, v)
    here = jax.grad(lambda params: _log_quartic(params, 0.5, 1.0))(THETA)
    expectations = np.array([here[name] - found[name] / num_rows for name in "abc"])
    # standard deviations of the three terms are at most 1.1, 2.4 and 0.9, and the draws of 8000 chains are independent
    sd = np.array([1.1, 2.4, 0.9]) / np.sqrt(num_chains)
    assert (np.abs(expectations - _quartic_expectations()) < 4.5 * sd).all()


class _Probed(NamedTuple):
    position: jax.Array
    log_p: jax.Array


class _Probe(Sampler):
    """A sampler that moves nothing and keeps the log density of every chain."""

    uses_score = True

    def init(self, position, log_prob):
        return _Probed(position, log_prob(position))

    def run(self, rng_key, log_prob, state):
        return _Probed(state.position, log_prob(state.position))


def _chains(model, *args, state=None, latents=None):
    @jax.jit
    def run(given):
        with trace() as sites, seed(rng_seed=0), substitute(data=given):
            model(*args)
        return sites["random_field/chains"]["value"]

    return run({**(state or {}), **(latents or {})})


def test_every_row_of_every_replicate_is_a_chain_with_its_own_density():
    # guards against: rows and elements exchanged where a plate is not the first axis, a scale left in the density
    def model(y):
        w = numpyro.param("w", jnp.array(0.7))
        with numpyro.plate("data", 8, subsample_size=4, dim=-1):
            with numpyro.plate("parts", 3, dim=-2):
                s = numpyro.sample("s", BaseMeasure(REAL, (2,)))
            h = numpyro.sample("h", BaseMeasure(constraints.positive))
            y = numpyro.sample("y", BaseMeasure(), obs=y)
            numpyro.factor("coupling", -w * (s**2 * jnp.arange(1.0, 4.0)[:, None, None]).sum((0, 2)) - h * y**2)

    keys = jax.random.split(jax.random.key(0), 3)
    s, y = jax.random.normal(keys[0], (2, 3, 4, 2)), jax.random.normal(keys[1], (2, 4))
    h = jnp.exp(jax.random.normal(keys[2], (2, 4)))
    pool = {"s": s, "h": h, "y": y}
    model = negative_phase(model, num_chains=7, sampler=_Probe(), init_chains={"random_field": pool})
    latents = {"s": jnp.zeros((3, 4, 2)), "h": jnp.ones(4)}
    chains = _chains(model, jnp.zeros(4), latents=latents)
    for name, value in pool.items():
        np.testing.assert_allclose(chains["x"][name], value, rtol=1e-6)
    exact = -0.7 * (s**2 * jnp.arange(1.0, 4.0)[:, None, None]).sum((1, 3)) - h * y**2 + jnp.log(h)
    np.testing.assert_allclose(chains["log_p"], exact.reshape(-1), rtol=1e-5)


# ---- Learning ----------------------------------------------------------------------------------------------------------

NUM = 60


def _boltzmann_field(v, subsample_size=None):
    """E = tau |v|^2 / 2 + h^2 / 2 - h w.v: the marginal precision of v is tau I - w w', that of h | v is 1."""
    w = numpyro.param("w", jnp.array([0.3, 0.3]))
    tau = numpyro.param("tau", 1.5, constraint=constraints.positive)
    with numpyro.plate("data", NUM, subsample_size=subsample_size) as index:
        h = numpyro.sample("h", BaseMeasure())
        v = numpyro.sample("v", BaseMeasure(REAL, (2,)), obs=v[index])
        numpyro.factor("coupling", h * (v @ w) - tau * (v**2).sum(-1) / 2 - h**2 / 2)


def _boltzmann_data():
    """Data whose second moments are .5 across and 1 along (1, 1), and so the best tau 2 and w.w 1."""
    x = np.random.default_rng(0).normal(size=(NUM, 2))
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / NUM)).T
    axes = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    return jnp.asarray((x * np.sqrt([1.0, 0.5])) @ axes, jnp.float32)


def _statistics(params):
    """What is identified: tau and the elements of w w'."""
    w = params["w"]
    return jnp.stack([params["tau"], w[0] ** 2, w[1] ** 2, w[0] * w[1]])


BEST = np.array([2.0, 0.5, 0.5, 0.5])


def _assert_at_the_best(found):
    """Within 5 standard errors of the mean over a run, by batch means, and those standard errors small."""
    batches = np.asarray(found).reshape(10, -1, 4).mean(1)
    error = batches.std(0, ddof=1) / np.sqrt(10)
    assert (error < 0.02).all()
    np.testing.assert_array_less(np.abs(batches.mean(0) - BEST), 5 * error + 0.005)  # .005: bias of noisy iterates


@pytest.mark.parametrize("subsample_size", [None, 20])
def test_particles_learn_the_maximum_likelihood_estimate(subsample_size):
    # guards against: an engine that leaves out the normalizer (w grows without end), a pool lost between steps
    y = _boltzmann_data()
    model = _boltzmann_field if subsample_size is None else negative_phase(_boltzmann_field, num_chains=300)
    engine = ParticleMMLE(model, optax.adam(0.005), num_particles=20, step_size=0.3)
    result = engine.run(
        jax.random.key(1), 3000, y, subsample_size, progress_bar=False, collect=lambda state: _statistics(state.params)
    )
    _assert_at_the_best(result.collected[500:])


def test_svi_learns_the_maximum_likelihood_estimate():
    # guards against: a field that autoguides cannot trace, or whose pool SVI drops
    y = _boltzmann_data()
    model = negative_phase(_boltzmann_field, num_chains=300)
    svi = SVI(model, AutoNormal(_boltzmann_field), optax.adam(0.01), Trace_ELBO())

    def step(state, _):
        state, _ = svi.update(state, y)
        return state, _statistics(svi.get_params(state))

    state = jax.jit(svi.init)(jax.random.key(0), y)
    state, found = jax.jit(lambda state: jax.lax.scan(step, state, length=5000))(state)
    _assert_at_the_best(found[2000:])
    assert state.mutable_state["random_field/chains"]["num_updates"] == 5001


# ---- Against EBIPLA: an energy prior and a normalized decoder --------------------------------------------------------------

SIGMA = 0.3


def _decoder(beta, z):
    return jnp.stack([jnp.sin(beta * z), beta * z**2], -1)


def _tilt(alpha, z):
    return alpha * jnp.tanh(z) + z**4 / 10


def _as_prior_and_decoder(x):
    alpha, beta = numpyro.param("alpha", 0.4), numpyro.param("beta", 0.8)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: _tilt(alpha, z)))
        numpyro.sample("x", dist.Normal(_decoder(beta, z), SIGMA).to_event(1), obs=x)


def _as_field(x):
    alpha, beta = numpyro.param("alpha", 0.4), numpyro.param("beta", 0.8)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", BaseMeasure())
        x = numpyro.sample("x", BaseMeasure(REAL, (2,)), obs=x)
        numpyro.factor("prior", -_tilt(alpha, z) - z**2 / 2)
        numpyro.factor("decoder", -((x - _decoder(beta, z)) ** 2).sum(-1) / (2 * SIGMA**2))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_step_with_a_normalized_decoder_is_that_of_ebipla(num_rows):
    # guards against: any difference of the two negative phases. x = g(z) +- sigma eps: the decoder's term cancels in pairs
    x = jnp.array([[0.5, 1.0], [-0.2, 0.1], [0.8, 0.9]])[:num_rows]
    prior_chains = jnp.array([-1.2, 0.3, 0.9, 2.0])
    noise = SIGMA * jax.random.normal(jax.random.key(3), (4, num_rows, 2))
    z = jnp.tile(prior_chains[:, None], (2, num_rows))
    pool = {"z": z, "x": _decoder(0.8, z) + jnp.concatenate([noise, -noise])}
    field = negative_phase(_as_field, num_chains=8 * num_rows, sampler=STILL, init_chains={"random_field": pool})
    prior = negative_phase(_as_prior_and_decoder, num_chains=4, sampler=STILL, init_chains={"z": prior_chains})
    start = init_to_value(values={"z": jnp.array([0.3, -0.4, 1.0])[:num_rows]})
    moved = []
    for model in (field, prior):
        engine = ParticleMMLE.ebipla(model, optax.sgd(10.0), num_particles=5, step_size=0.01, init_strategy=start)
        moved.append(engine.run(jax.random.key(0), 1, x, progress_bar=False))
    for name, value in {"alpha": 0.4, "beta": 0.8}.items():
        assert abs(moved[0].params[name] - value) > 0.01
        np.testing.assert_allclose(moved[0].params[name], moved[1].params[name], rtol=2e-5)
    np.testing.assert_allclose(moved[0].state.particles["z"], moved[1].state.particles["z"], rtol=1e-5)


# ---- The pool ------------------------------------------------------------------------------------------------------------


def test_pool_starts_at_the_data_and_latents_of_the_run():
    # guards against: a start that nothing in the documentation tells
    chains = _chains(negative_phase(_quadratic_field, num_chains=7, sampler=STILL), V, latents={"h": H})
    np.testing.assert_allclose(chains["x"]["v"], jnp.broadcast_to(V, (3, 3, 2)))  # 3 rows, and so 3 replicates for 7 chains
    np.testing.assert_allclose(chains["x"]["h"], jnp.broadcast_to(H, (3, 3, 1)))


def test_data_on_the_edge_of_their_support_start_inside():
    # guards against: chains at infinity from data that are exactly 0
    def model(v):
        w = numpyro.param("w", 1.0)
        h = numpyro.sample("h", BaseMeasure())
        v = numpyro.sample("v", BaseMeasure(constraints.unit_interval, (2,)), obs=v)
        numpyro.factor("coupling", -(h**2) - w * h * v.sum())

    chains = _chains(negative_phase(model, num_chains=5), jnp.array([0.0, 0.5]), latents={"h": jnp.array(0.1)})
    assert chains["status"] == 0
    assert jnp.isfinite(chains["x"]["v"]).all()


def test_persistent_pools_go_on_and_short_run_pools_start_afresh():
    # guards against: persistence without an effect, a pool that does not move
    far = {"random_field/chains": None}

    def after(persistent):
        model = negative_phase(_quadratic_field, num_chains=6, sampler=UnadjustedLangevin(0.05, 2), persistent=persistent)
        first = _chains(model, V, latents={"h": H})
        assert (first["x"]["v"] != V).any(-1).mean() > 0.5
        far["random_field/chains"] = {**first, "x": jax.tree.map(lambda x: x + 50.0, first["x"])}
        return _chains(model, V, latents={"h": H}, state=far)

    assert after(persistent=True)["x"]["v"].mean() > 10
    short = after(persistent=False)
    assert abs(short["x"]["v"].mean()) < 3
    assert short["num_updates"] == 2


def test_pool_value_is_zero_and_no_gradient_goes_through_its_moves():
    # guards against: a loss changed in value, a gradient through the sampler
    model = negative_phase(_quadratic_field, num_chains=30)

    def log_joint(params):
        value, sites = log_density(seed(model, 0), (V,), {}, {**params, "h": H})
        return value, (sites["random_field/chains"]["value"]["x"], sites["random_field/log_normalizer"]["fn"].log_factor)

    (value, (pool, factor)), gradient = jax.jit(jax.value_and_grad(log_joint, has_aux=True))(PARAMS)
    assert factor == 0
    np.testing.assert_allclose(value, _log_p(PARAMS, V, H).sum(), rtol=1e-6)

    def at_the_pool(params):
        return _log_p(params, V, H).sum() - _log_p(params, pool["v"], pool["h"]).sum(-1).mean()

    for name, exact in jax.grad(at_the_pool)(PARAMS).items():
        np.testing.assert_allclose(gradient[name], exact, rtol=1e-4, atol=1e-5)


def test_scopes_and_outer_scales_and_a_second_wrapping_leave_the_normalizer_right():
    # guards against: names and weights of handlers around the model lost or counted twice
    pool = jnp.repeat(_cubature()[:, None], 3, 1)
    inner = _still(_quadratic_field, {"v": pool[..., :2], "h": pool[..., 2:]}, 18)
    once = _gradient(inner, PARAMS, {"h": H}, V)
    twice = _gradient(negative_phase(inner), PARAMS, {"h": H}, V)
    half = _gradient(numpyro.handlers.scale(inner, scale=0.5), PARAMS, {"h": H}, V)
    named = {f"out/{name}": value for name, value in PARAMS.items()}
    scoped = _gradient(scope(inner, prefix="out"), named, {"out/h": H}, V)
    for name, exact in once.items():
        for found in (twice[name], 2 * half[name], scoped[f"out/{name}"]):
            np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


def test_pool_is_sampled_on_and_read_as_the_group_prior():
    # guards against: a pool whose sites cannot be read by name. The exact mean of v is that of the field
    model = negative_phase(_quadratic_field, num_chains=2000, sampler=MALA(num_steps=20))
    svi = SVI(model, AutoNormal(_quadratic_field), optax.sgd(0.0), Trace_ELBO())
    start = jax.jit(svi.init)(jax.random.key(0), V)
    draws, state = model.sample_chains(jax.random.key(1), svi.get_params(start), start, 20, V)
    assert {name: x.shape for name, x in draws.items()} == {"h": (667, 20, 3, 1), "v": (667, 20, 3, 2)}
    np.testing.assert_array_equal(draws["v"][:, -1], state["random_field/chains"]["x"]["v"])
    cov = jnp.linalg.inv(_precision(PARAMS["a"]))
    error = jnp.sqrt(jnp.diag(cov)[:2] / 2001)  # 2001 chains are independent
    assert (jnp.abs(draws["v"][:, 10:].mean((0, 1, 2)) - (cov @ PARAMS["b"])[:2]) < 4.5 * error).all()
    data = to_inference_data(start, chains=draws)
    assert data["prior"]["v"].shape == (667, 20, 3, 2)
    assert to_inference_data(start)["prior"]["h"].shape == (667, 1, 3, 1)
    assert list(data["sample_stats_prior"]["energy_site"].values) == ["random_field"]


# ---- What is refused -------------------------------------------------------------------------------------------------------


def _run(model, *args, **settings):
    return seed(negative_phase(model, num_chains=4, **settings), 0)(*args)


def _with(extra):
    """A small field with something more in it."""

    def model(v):
        w = numpyro.param("w", 1.0)
        h = numpyro.sample("h", BaseMeasure(), obs=jnp.array(0.5))
        v = numpyro.sample("v", BaseMeasure(), obs=v)
        numpyro.factor("coupling", -w * (v**2 + h**2))
        extra()

    return model


def test_energy_sites_in_a_field_are_refused():
    # guards against: two normalizers for one field
    model = _with(lambda: numpyro.sample("z", EnergyDistribution(lambda z: z**2)))
    with pytest.raises(NormalizerError, match=r"'coupling'.*site 'z' is an energy site: make it a BaseMeasure"):
        _run(model, jnp.array(1.0))


def test_discrete_sites_in_a_field_are_refused():
    # guards against: a pool whose discrete sites never move
    model = _with(lambda: numpyro.sample("k", dist.Bernoulli(0.5), obs=1))
    with pytest.raises(NormalizerError, match="site 'k' is discrete"):
        _run(model, jnp.array(1.0))
    assert not check_model(model, jnp.array(1.0)).is_random_field


@pytest.mark.parametrize("outside", [True, False])
def test_masked_rows_are_refused(outside):
    # guards against: chains of rows without a density, which run away
    keep = jnp.array([True, False, True])
    if outside:
        model = mask(negative_phase(substitute(_quadratic_field, data={"h": H})), mask=keep)
    else:
        model = negative_phase(mask(substitute(_quadratic_field, data={"h": H}), mask=keep))
    with pytest.raises(ValueError, match="site 'h' of a random field is masked"):
        seed(model, 0)(V)


def test_sites_outside_the_subsampled_plate_are_refused():
    # guards against: a batch taken for a field of its own
    def model(v):
        h = numpyro.sample("h", BaseMeasure(), obs=jnp.array(0.5))
        with numpyro.plate("data", 6, subsample_size=3):
            v = numpyro.sample("v", BaseMeasure(), obs=v)
            numpyro.factor("coupling", -numpyro.param("w", 1.0) * (v**2 + h**2 + (v - h) ** 2))

    with pytest.raises(ValueError, match="site 'h' of a random field stands outside the subsampled plate 'data'"):
        _run(model, jnp.zeros(3))


def _conditional_field(v, x, subsample_size, w=None):
    w = numpyro.param("w", 0.5)
    with numpyro.plate("data", len(v), subsample_size=subsample_size) as index:
        h = numpyro.sample("h", BaseMeasure())
        v = numpyro.sample("v", BaseMeasure(), obs=v[index])
        numpyro.factor("coupling", -(v**2) - h**2 - w * v * x[index])


def test_covariates_under_a_subsampled_plate_stop_the_run():
    # guards against: persistent chains that belong to another row's field at every step
    v, x = jnp.linspace(-1, 1, 8), jnp.arange(8.0)
    model = negative_phase(_conditional_field, sampler=STILL)
    engine = ParticleMMLE(model, optax.adam(0.01), num_particles=2, step_size=0.1)
    with pytest.raises(RuntimeError, match=r"site 'random_field'.*fields of their own.*persistent=False"):
        engine.run(jax.random.key(0), 3, v, x, 4, progress_bar=False)


def test_covariates_are_no_trouble_where_every_row_has_chains_of_its_own():
    # guards against: conditional fields refused where nothing is wrong with them
    v, x = jnp.linspace(-1, 1, 8), jnp.arange(8.0)
    short = negative_phase(_conditional_field, sampler=STILL, persistent=False)
    assert _chains(short, v, x, 4, latents={"h": jnp.zeros(4)})["status"] == 0
    whole = negative_phase(_conditional_field, sampler=STILL)
    assert _chains(whole, v, x, 8, latents={"h": jnp.zeros(8)})["status"] == 0


def test_parameter_lifted_to_a_latent_is_refused():
    # guards against: a doubly intractable posterior learned in silence
    model = lift(negative_phase(_with(lambda: None)), prior={"w": dist.HalfNormal(1)})
    with pytest.raises(NormalizerError, match="param 'w' of a random field has become a latent"):
        seed(model, 0)(jnp.array(1.0))


def test_objectives_and_kernels_that_cannot_keep_the_pool_are_refused():
    model = negative_phase(_quadratic_field, num_chains=4)
    svi = SVI(model, AutoNormal(_quadratic_field), optax.adam(0.1), Trace_ELBO(num_particles=2))
    with pytest.raises(ValueError, match=r"site 'random_field'.*drops mutable state"):
        svi.init(jax.random.key(0), V)
    mcmc = MCMC(NUTS(model), num_warmup=1, num_samples=1, progress_bar=False)
    with pytest.raises(ValueError, match=r"site 'random_field'.*MCMC needs the density"):
        mcmc.run(jax.random.key(0), V)


@pytest.mark.parametrize(
    ("init_chains", "message"),
    [
        ({"field": {}}, r"no energy site is called \['field'\]: the model has \['random_field'\]"),
        ({"random_field": {"u": jnp.zeros(4)}}, r"names \['u'\]: the sites of the field are \['h', 'v'\]"),
        ({"random_field": {"v": jnp.zeros(3)}}, r"site 'v'.*has shape \(3,\), it must be \(4,\)"),
        ({"random_field": {"v": jnp.full(4, jnp.nan)}}, r"site 'v'.*outside the support, or nan"),
    ],
)
def test_bad_init_chains_are_refused(init_chains, message):
    with pytest.raises(ValueError, match=message):
        _run(_with(lambda: None), jnp.array(1.0), init_chains=init_chains)


def test_a_pool_of_another_size_is_refused():
    # guards against: a state of another batch or another num_chains broadcast in silence
    state = {"random_field/chains": _chains(negative_phase(_quadratic_field, num_chains=6), V, latents={"h": H})}
    with pytest.raises(ValueError, match="the state holds chains of shape"):
        _chains(negative_phase(_quadratic_field, num_chains=9), V, latents={"h": H}, state=state)


@pytest.mark.filterwarnings("ignore:site 'random_field'. when its chains started its density did not fall off")
def test_field_that_is_not_integrable_stops_the_run():
    # guards against: a pool that runs off to infinity unnoticed
    def model(v):
        w = numpyro.param("w", 1.0)
        h = numpyro.sample("h", BaseMeasure())
        v = numpyro.sample("v", BaseMeasure(), obs=v)
        numpyro.factor("coupling", w * v**4 - h**2)

    model = negative_phase(model, sampler=UnadjustedLangevin(0.1, 50))
    with pytest.raises(Exception, match=r"site 'random_field', update 1: the negative chains.*no longer finite"):
        jax.block_until_ready(_chains(model, jnp.array(1.0), latents={"h": jnp.array(0.0)}))


def test_the_jacobians_of_a_field_are_not_tempered_whatever_its_sites_are_called():
    """Where the path starts the density is that of the supports alone, d exp(u) = exp(u) du: scope renames the log Jacobian."""

    def model(x):
        rate = numpyro.param("rate", 2.0)
        with numpyro.plate("rows", 3):
            x = numpyro.sample("x", BaseMeasure(constraints.positive), obs=x)
        numpyro.factor("f", -rate * x.sum())

    def field(model):
        seen = record_run()
        with seed(rng_seed=KEY), seen:
            model(jnp.ones(3))
        return RandomField(model, (jnp.ones(3),), {}, KEY, seen, 5).chain_log_prob()

    u = jax.random.normal(KEY, (5, 3))
    for scoped in (model, scope(model, prefix="m")):
        for beta in (0.0, 0.3, 1.0):
            np.testing.assert_allclose(field(scoped).at(beta)(u), (u - beta * 2 * jnp.exp(u)).sum(-1), rtol=1e-4, atol=1e-5)
