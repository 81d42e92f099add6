# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What all samplers have in common, what they are given, and which of them moves the chains of a site."""

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import (
    MALA,
    BaseMeasure,
    BernoulliRBM,
    BlockGibbs,
    EnergyDistribution,
    GaussianBernoulliRBM,
    ParticleMMLE,
    TiltedDistribution,
    UnadjustedLangevin,
    negative_phase,
    sample_posterior,
)
from numpyro_ebm.samplers import Sampler, Target
from numpyro_ebm.samplers.base import require_sampler

KEY = jax.random.key(12)
STANDARD = dist.Normal(0, 1)
RBM = GaussianBernoulliRBM(jnp.array([[1.5, -1.0], [-0.8, 1.2], [0.6, 0.9]]), jnp.zeros(3), jnp.array([-0.5, 0.4]))


@dataclass(frozen=True)
class RandomWalk(Sampler):
    """A user's own sampler, in ten lines: Metropolis."""

    num_steps: int = 20

    def run(self, rng_key, target, state):
        def step(x, key):
            move_key, accept_key = jax.random.split(key)
            new = x + 1.5 * jax.random.normal(move_key, x.shape, x.dtype)
            ratio = target(new) - target(x)
            accept = jnp.log(jax.random.uniform(accept_key, ratio.shape)) < ratio
            return jnp.where(accept.reshape(ratio.shape + (1,) * (x.ndim - ratio.ndim)), new, x), None

        return state._replace(position=jax.lax.scan(step, state.position, jax.random.split(rng_key, self.num_steps))[0])


class _Counted(NamedTuple):
    position: jax.Array
    runs: jax.Array


@dataclass(frozen=True)
class Count(Sampler):
    """Moves nothing, counts the runs in which it adapts, and has a status and words of its own."""

    adapts: bool = True
    status: int = 0

    def init(self, position, target=None):
        return _Counted(position, jnp.zeros((), jnp.int32))

    def run(self, rng_key, target, state):
        return state._replace(runs=state.runs + self.adapts)

    def frozen(self):
        return Count(False, self.status)

    def check(self, state):
        return jnp.asarray(self.status, jnp.int32)

    def explain(self, status):
        return f"the words of Count for {status}"


# ---- The protocol --------------------------------------------------------------------------------------------------------------

ALL = {
    "ula": UnadjustedLangevin(0.1, 4),
    "mala": MALA(0.1, 4),
    "mala fixed": MALA(0.1, 4, adapt=False),
    "gibbs": BlockGibbs(4),
    "random walk": RandomWalk(4),
    "count": Count(),
}
every_sampler = pytest.mark.parametrize("sampler", ALL.values(), ids=ALL)


def _target(sampler):
    return RBM.chain_log_prob(sampler)


def _start(sampler):
    return sampler.init(jnp.ones((5, 3)), _target(sampler))


@every_sampler
def test_state_is_a_named_tuple_of_arrays_that_a_run_keeps_in_shape_and_dtype(sampler):
    # Catches a state that a scan over runs, or the mutable site of negative chains, would refuse.
    state = _start(sampler)
    new = jax.jit(lambda key, state: sampler.run(key, _target(sampler), state))(KEY, state)
    assert type(new) is type(state)
    assert isinstance(state, tuple)
    np.testing.assert_array_equal(state.position, 1)
    assert all(isinstance(leaf, jax.Array) for leaf in state)
    assert [(x.shape, x.dtype) for x in new] == [(x.shape, x.dtype) for x in state]


@every_sampler
def test_run_is_compiled_once(sampler):
    # Catches a run whose program depends on the values of the state or of the key.
    num_traces = []

    @jax.jit
    def run(key, state):
        num_traces.append(1)
        return sampler.run(key, _target(sampler), state)

    state = _start(sampler)
    for i in range(3):
        state = run(jax.random.key(i), state)
    assert len(num_traces) == 1


@every_sampler
def test_run_needs_no_compiler(sampler):
    # Catches code that works on tracers only, which jax.disable_jit finds when a user looks for an error of their own.
    state = _start(sampler)
    compiled = jax.jit(lambda key, state: sampler.run(key, _target(sampler), state))(KEY, state)
    with jax.disable_jit():
        eager = sampler.run(KEY, _target(sampler), state)
    for one, other in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@every_sampler
def test_frozen_sampler_goes_on_from_the_same_state_and_adapts_nothing(sampler):
    # Catches draws after a fit whose step still follows the chains, which are then none of the posterior.
    held, state = sampler.frozen(), _start(sampler)
    assert held.frozen() == held
    assert hash(held.frozen()) == hash(held)
    new = held.run(KEY, _target(held), state)
    for field in {"step_size", "runs"} & set(state._fields):
        np.testing.assert_array_equal(getattr(new, field), getattr(state, field))
        changed = getattr(sampler.run(KEY, _target(sampler), state), field) != getattr(state, field)
        assert changed == (held != sampler)  # what is held would have moved


@every_sampler
def test_every_status_is_a_number_with_words(sampler):
    # Catches a sampler whose check stops a run and whose words are missing: AttributeError in place of the fix.
    status = sampler.check(_start(sampler))
    assert status.shape == ()
    assert status.dtype == jnp.int32
    assert int(status) == 0
    assert all(sampler.explain(code) for code in (1, 2))


@pytest.mark.parametrize("sampler", [sampler for sampler in ALL.values() if sampler.uses_score])
def test_whole_numbers_are_made_real_where_the_score_is_taken(sampler):
    # Catches moves that are cut to integers: chains stand still for ever.
    state = sampler.init([0, 1, 2])
    new = sampler.run(KEY, lambda x: -(x**2), state)
    assert new.position.dtype == jnp.float32
    assert (new.position != jnp.arange(3)).all()
    with pytest.raises(ValueError, match=r"counts the chains, got shape \(0,\)"):
        sampler.init(jnp.zeros(0))


def test_target_that_is_not_one_log_density_per_chain_is_refused():
    # Catches an IndexError from inside the step.
    for log_prob in (lambda x: -(x**2).sum(), lambda x: -(x**2).sum(0)):
        with pytest.raises(ValueError, match=r"log densities of shape \(.*\) for positions of shape \(5, 3\)"):
            MALA().init(jnp.zeros((5, 3)), log_prob)


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        (MALA, r"got the class MALA: pass an instance, MALA\(...\)"),
        (SimpleNamespace(init=len, run=len), "derive it from numpyro_ebm.samplers.Sampler"),
        ("MALA", "got 'MALA'"),
    ],
    ids=["class", "look-alike", "word"],
)
def test_what_is_no_sampler_is_refused_everywhere_with_the_fix(value, fix):
    # Catches a look-alike that fails later for want of frozen, check or explain, and a class that fails inside a trace.
    rbm = {"weights": jnp.ones((2, 1)), "visible_bias": jnp.zeros(2), "hidden_bias": jnp.zeros(1)}
    for use in (
        lambda: require_sampler("sampler", value),
        lambda: negative_phase(_latent, sampler=value),
        lambda: negative_phase(_latent, sampler={"z": value}),
        lambda: TiltedDistribution(STANDARD, lambda x: x, sampler=value),
        lambda: EnergyDistribution(lambda x: x, sampler=value),
        lambda: BernoulliRBM(**rbm, sampler=value),
        lambda: sample_posterior(KEY, _latent, {"tilt": 0.0}, Y, num_samples=1, sampler=value),
    ):
        with pytest.raises(TypeError, match=rf"sampler must be a sampler such as MALA\(\).*{fix}"):
            use()


# ---- Targets -------------------------------------------------------------------------------------------------------------------


def _gamma():
    base = dist.Gamma(2.0, 1.5).expand([2]).to_event(1)
    return TiltedDistribution(base, lambda x: (x**2).sum() + x[0])


@pytest.mark.parametrize("sampler", [MALA(), RandomWalk()], ids=["unconstrained", "constrained"])
def test_path_of_a_tilted_distribution_goes_from_its_base_to_itself(sampler):
    # Catches beta on the wrong term, a Jacobian that is missing or tempered, and a reference in the space of the events.
    fn, x = _gamma(), jnp.array([[0.3, 1.2], [2.0, 0.1], [0.7, 0.7]])
    position = fn.to_chain(x, sampler)
    jacobian = position.sum(-1) if sampler.uses_score else 0.0  # of x = exp(position)
    target = fn.chain_log_prob(sampler)
    assert isinstance(target, Target)
    for beta in (0.0, 0.3, 1.0):
        by_hand = fn.base.log_prob(x) - beta * ((x**2).sum(-1) + x[:, 0]) + jacobian
        np.testing.assert_allclose(target.at(beta)(position), by_hand, rtol=1e-5)
    np.testing.assert_allclose(target(position), target.at(1.0)(position), rtol=1e-6)
    np.testing.assert_allclose(target.reference.log_prob(position), target.at(0.0)(position), rtol=1e-6)
    drawn = target.reference.sample(KEY, 4000)
    np.testing.assert_allclose(fn.from_chain(drawn, sampler).mean(0), 2 / 1.5, atol=4.5 * np.sqrt(2) / 1.5 / np.sqrt(4000))


def test_flat_and_unnormalized_bases_are_no_reference():
    # Catches a reference that cannot be sampled, or that is sampled by chains of its own.
    sampler, x = MALA(), jnp.array([0.5, 2.0])
    flat = EnergyDistribution(lambda x: x**2, support=constraints.positive).chain_log_prob(sampler)
    assert flat.reference is None
    np.testing.assert_allclose(flat.at(0.25)(jnp.log(x)), -0.25 * x**2 + jnp.log(x), rtol=1e-6)
    inner = EnergyDistribution(lambda x: x**2, initial=STANDARD)
    assert TiltedDistribution(inner, lambda x: x).chain_log_prob(sampler).reference is None


@pytest.mark.parametrize("kind", ["plain", "scaled", "bernoulli"])
def test_path_of_an_rbm_is_the_machine_with_weights_and_hidden_biases_scaled(kind):
    # Catches visible biases that are scaled too, and conditionals that are not those of the density at beta.
    w, b, c = RBM.weights, jnp.array([0.2, -0.3, 0.1]), RBM.hidden_bias

    def make(beta):
        parts = beta * w, b, beta * c
        return BernoulliRBM(*parts) if kind == "bernoulli" else GaussianBernoulliRBM(*parts, scale=0.7, coupling=kind)

    target, beta = make(1.0).chain_log_prob(BlockGibbs()), 0.4
    v, h = jnp.array([[0, 1, 1], [1, 0, 0]]), jnp.array([[1, 0], [1, 1]])
    v = v if kind == "bernoulli" else v.astype(float)
    ours, tempered = target.at(beta), make(beta)
    np.testing.assert_allclose(ours(v), -tempered.free_energy(v), rtol=1e-6)
    np.testing.assert_allclose(ours.hidden_given_visible(v).mean, tempered.hidden_given_visible(v).mean, rtol=1e-6)
    np.testing.assert_allclose(ours.visible_given_hidden(h).mean, tempered.visible_given_hidden(h).mean, rtol=1e-6)
    constant = target.at(0.0)(v) - target.reference.log_prob(v)
    np.testing.assert_allclose(constant, make(1.0).uncoupled_log_normalizer(), rtol=1e-6)


def test_path_of_a_random_field_scales_its_terms_and_not_its_jacobians():
    # Catches a tempered Jacobian, under which the chains are of no density at all.
    seen = {}

    class Spy(MALA):
        def run(self, rng_key, target, state):
            seen["target"], seen["position"] = target, state.position
            return state

    def model(y):
        w = numpyro.param("w", 0.7)
        with numpyro.plate("data", 2):
            h = numpyro.sample("h", BaseMeasure(constraints.positive))
            numpyro.sample("y", BaseMeasure(), obs=y)
            numpyro.factor("coupling", -w * h * y**2)

    with seed(rng_seed=0), substitute(data={"h": jnp.array([0.5, 2.0])}):
        negative_phase(model, num_chains=2, sampler=Spy())(jnp.array([1.0, 3.0]))
    log_h, y = seen["position"].T
    assert seen["target"].reference is None
    np.testing.assert_allclose(seen["target"].at(0.3)(seen["position"]), -0.3 * 0.7 * jnp.exp(log_h) * y**2 + log_h, rtol=1e-5)


def test_chains_in_the_space_of_the_events_stay_in_the_support():
    # Catches a flat base whose density is 1 outside its support, as NumPyro's is without validation: a random walk leaves at once.
    start = dist.Exponential(1.0)
    with numpyro.validation_enabled(False):
        x = EnergyDistribution(lambda x: 2 * x, support=constraints.positive, initial=start, sampler=RandomWalk(60)).sample(
            KEY, (4000,)
        )
    assert (x > 0).all()
    assert abs(x.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(4000)


# ---- Which sampler moves a site ------------------------------------------------------------------------------------------------

Y = jnp.array([0.5, 1.5, 1.0])


def _latent(y, sampler=None):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -tilt * z, sampler=sampler))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


def _chains(model, *args, name="z", **kwargs):
    with trace() as sites, seed(rng_seed=0), substitute(data={"z": jnp.zeros(3)}):
        model(*args, **kwargs)
    return sites[f"{name}/chains"]["value"]


def test_chains_move_by_the_sampler_named_else_by_the_distributions_own_else_by_the_default():
    # Catches the distribution's own sampler ignored in the negative phase, or put before the one that was named there.
    def fields(*, named=None, own=None):
        return set(_chains(negative_phase(_latent, num_chains=3, sampler=named), Y, own)) - {"x", "num_updates", "status"}

    ula = {"stiffness", "runs_near_floor", "runs_unstable"}
    assert fields() == {"step_size", "acceptance", "jump_acceptance"}
    assert fields(own=Count()) == {"runs"}
    assert fields(own=Count(), named=UnadjustedLangevin()) == ula
    assert fields(own=Count(), named={"z": UnadjustedLangevin()}) == ula
    assert fields(own=Count(), named={}) == {"runs"}


def test_rbm_given_no_sampler_moves_by_few_sweeps_and_is_drawn_by_many():
    # Catches the 1000 sweeps of a draw at every step of a fit.
    assert RBM.chain_sampler == BlockGibbs()
    own = GaussianBernoulliRBM(RBM.weights, jnp.zeros(3), jnp.zeros(2), sampler=BlockGibbs(3))
    assert own.chain_sampler == BlockGibbs(3)


def test_particle_engine_tells_what_a_sites_own_sampler_says():
    # Catches the words of another sampler, or an AttributeError, where the site brought the sampler that found trouble.
    engine = ParticleMMLE.ipla(negative_phase(_latent, num_chains=4), num_particles=3, step_size=0.01)
    with pytest.warns(UserWarning, match="site 'z': the words of Count for 1"):
        result = engine.run(KEY, 2, Y, Count(status=1), progress_bar=False)
    assert int(result.state.mutable_state["z/chains"]["runs"]) > 0
    with pytest.raises(RuntimeError, match="site 'z': the words of Count for 2"):
        engine.run(KEY, 2, Y, Count(status=2), progress_bar=False)
    named = negative_phase(_latent, num_chains=4, sampler={"z": Count(status=1)})  # by the handler, and not its own
    engine = ParticleMMLE.ipla(named, num_particles=3, step_size=0.01)
    with pytest.warns(UserWarning, match="site 'z': the words of Count for 1"):
        engine.run(KEY, 1, Y, progress_bar=False)


def test_draws_after_a_fit_are_of_frozen_samplers():
    # Catches chains that go on adapting in sample_chains or sample_posterior, under whatever name they do.
    handler = negative_phase(_latent, num_chains=4, sampler=Count())
    state = {"z/chains": _chains(handler, Y)}
    _, after = handler.sample_chains(KEY, {"tilt": 0.3}, state, 3, Y)
    assert int(state["z/chains"]["runs"]) == int(after["z/chains"]["runs"]) == 1
    assert int(_chains(handler, Y)["runs"]) == 1  # and the handler itself still adapts


# ---- Whole numbers as starts ----------------------------------------------------------------------------------------------------


def test_whole_numbers_where_chains_start_are_made_real():
    # Catches chains of integers, which no move changes: a fit then learns from chains that stand still.
    for fn in (
        EnergyDistribution(lambda x: x**2 / 2, initial=dist.Delta(0)),
        EnergyDistribution(lambda x: x**2 / 2, initial=dist.DiscreteUniform(-3, 3)),
        EnergyDistribution(lambda x: x**2 / 2, initial=dist.Delta(0), sampler=RandomWalk()),
    ):
        x = fn.sample(KEY, (50,))
        assert x.dtype == fn.initial_chains(KEY, 2).dtype == jnp.float32
        assert len(np.unique(x)) > 20
    for sampler in (MALA(), RandomWalk()):
        chains = _chains(negative_phase(_latent, num_chains=4, sampler=sampler, init_chains={"z": jnp.arange(4)}), Y)["x"]
        assert chains.dtype == jnp.float32
        assert (chains != jnp.arange(4)).any()
        start = {"z": jnp.arange(6).reshape(2, 3)}
        draws = sample_posterior(KEY, _latent, {"tilt": 0.0}, Y, num_samples=20, num_warmup=0, sampler=sampler, start=start)["z"]
        assert draws.dtype == jnp.float32
        assert len(np.unique(draws)) > 20


def test_whole_numbers_stay_so_at_discrete_sites():
    # Catches bits made real, at which a discrete energy would be evaluated.
    fn = EnergyDistribution(lambda s: s.sum().astype(float), (2,), support=constraints.boolean, sampler=Count())
    assert fn.to_chain(jnp.ones((3, 2), int), Count()).dtype == jnp.int32


# ---- A sampler of ten lines ------------------------------------------------------------------------------------------------------


def test_ten_line_sampler_draws_learns_and_follows_the_posterior():
    # Catches a part of the package that asks more of a sampler than run(rng_key, target, state). BiDVL: see its own tests.
    sampler, n = RandomWalk(), 2000
    x = TiltedDistribution(STANDARD, lambda z: -2 * z, sampler=RandomWalk(60)).sample(KEY, (n,))
    assert abs(x.mean() - 2) < 4.5 / np.sqrt(n)

    draws = sample_posterior(KEY, _latent, {"tilt": 1.0}, Y, num_samples=400, sampler=RandomWalk(20), num_chains=8)["z"]
    np.testing.assert_allclose(draws.mean((0, 1)), (Y + 1) / 2, atol=0.1)

    def visible(y):
        tilt = numpyro.param("tilt", 0.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", TiltedDistribution(STANDARD, lambda z: -tilt * z, sampler=sampler), obs=y)

    svi = SVI(negative_phase(visible, num_chains=500), lambda y: None, optax.adam(0.05), Trace_ELBO())
    assert svi.run(KEY, 200, Y, progress_bar=False).params["tilt"] == pytest.approx(1.0, abs=0.15)

    engine = ParticleMMLE.pgd(negative_phase(_latent, num_chains=500, sampler=sampler), num_particles=50, step_size=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tilts = engine.run(KEY, 400, Y, progress_bar=False, collect=lambda state: state.params["tilt"]).collected
    assert tilts[100:].mean() == pytest.approx(1.0, abs=0.15)
