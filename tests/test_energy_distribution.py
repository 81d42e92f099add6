# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Energy distributions as NumPyro distributions: shapes, distributions, transforms of JAX, and the errors that users meet."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from flax import nnx
from numpyro.contrib.control_flow import scan
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.handlers import seed
from numpyro.infer import HMC, MCMC, NUTS, Predictive, init_to_median, init_to_sample
from numpyro.infer.util import log_density

from numpyro_ebm import (
    MALA,
    BaseMeasure,
    BernoulliRBM,
    EnergyDistribution,
    GaussianBernoulliRBM,
    NormalizerError,
    TiltedDistribution,
    UnadjustedLangevin,
)

KEY = jax.random.key(10)
NORMAL = dist.Normal(0, 1)
NORMAL2 = dist.Normal(0, 1).expand([2]).to_event(1)


def bowl(x):
    return (x**2).sum() / 2 + x[0]


def scaled_bowl(k, x):
    return k * (x**2).sum()


def log_normal(x, loc=0.0, scale=1.0):
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


# What nobody knows of an energy

MOMENTLESS = {
    "EnergyDistribution": lambda: EnergyDistribution(bowl, (2,)),
    "TiltedDistribution": lambda: TiltedDistribution(NORMAL2, bowl),
    "GaussianBernoulliRBM": lambda: GaussianBernoulliRBM(jnp.eye(2), jnp.zeros(2), jnp.zeros(2)),
    "BernoulliRBM": lambda: BernoulliRBM(jnp.eye(2), jnp.zeros(2), jnp.zeros(2)),
}


@pytest.mark.parametrize("name", MOMENTLESS)
@pytest.mark.parametrize(("moment", "method"), [("mean", "mean"), ("variance", "var")])
def test_moments_that_are_not_known_say_what_to_take_in_their_place(name, moment, method):
    wrapped = MOMENTLESS[name]().expand([3])
    with pytest.raises(NotImplementedError, match=rf"the {moment} of {name} is not known.*normalizer is not\.") as error:
        getattr(wrapped, moment)
    assert f".sample(key, (1000,)).{method}(0)" in str(error.value)


def test_a_normalized_subclass_keeps_its_moments_and_does_not_blame_its_normalizer():
    class Shifted(TiltedDistribution):
        is_normalized = True
        mean = 1.0

    shifted = Shifted(NORMAL, lambda x: 0.5 - x)
    assert shifted.mean == 1
    with pytest.raises(NotImplementedError, match=r"the variance of Shifted is not known in closed form\. Estimate"):
        _ = shifted.variance


# The flat measure

SUPPORTS = [
    (constraints.real, (), jnp.array([0.5, -2.0])),
    (constraints.real, (3, 2), jnp.zeros((2, 3, 2))),
    (constraints.positive, (3,), jnp.ones((2, 3))),
    (constraints.simplex, (3,), jnp.full((2, 3), 1 / 3)),
    (constraints.simplex, (4, 3), jnp.full((2, 4, 3), 1 / 3)),
    (constraints.boolean, (3,), jnp.array([[0, 1, 1], [1, 0, 0]])),
    (constraints.nonnegative_integer, (2,), jnp.array([[0, 7], [3, 1]])),
]


@pytest.mark.parametrize(("support", "event_shape", "value"), SUPPORTS)
def test_base_measure_is_zero_on_every_support(support, event_shape, value):
    # Catches an event dimension counted as a batch dimension, which multiplies a model's terms.
    base = BaseMeasure(support, event_shape, validate_args=True)
    assert (base.batch_shape, base.event_shape, base.event_dim) == ((), event_shape, len(event_shape))
    expected = np.zeros(2)
    np.testing.assert_array_equal(base.log_prob(value), expected)
    np.testing.assert_array_equal(jax.jit(base.log_prob)(value), expected)
    np.testing.assert_array_equal(jax.vmap(base.log_prob)(value), expected)
    assert base.log_prob(value[0]).shape == ()


def test_base_measure_stands_in_a_plate():
    # Catches a flat site that breaks the model it stands in, or that adds anything to its density.
    def model():
        with numpyro.plate("data", 4):
            v = numpyro.sample("v", BaseMeasure(constraints.real, (3,)))
            numpyro.factor("coupling", -(v**2).sum(-1))

    v = jnp.arange(12.0).reshape(4, 3)
    log_joint, sites = log_density(model, (), {}, {"v": v})
    assert log_joint == -(v**2).sum()
    assert sites["v"]["fn"].batch_shape == (4,)


def test_base_measure_says_that_it_cannot_be_sampled():
    # Catches another type of error: NumPyro's initialization falls back on exactly NotImplementedError.
    with pytest.raises(NotImplementedError, match="initial=") as caught:
        BaseMeasure(constraints.real, (2,)).sample(KEY)
    assert type(caught.value) is NotImplementedError
    assert "condition on it" in str(caught.value)


def test_predictive_on_a_flat_latent_says_what_to_do():
    # Catches a bare NotImplementedError from the prior predictive of a random field.
    def model():
        numpyro.sample("v", BaseMeasure(constraints.real, (2,)))

    with pytest.raises(NotImplementedError, match="cannot be sampled: condition on it"):
        Predictive(model, num_samples=2)(KEY)


def test_base_measure_warns_out_of_its_support_as_numpyro_does():
    # Catches a support that is not passed on: NumPyro's checks of values would see nothing.
    base = BaseMeasure(constraints.positive, (2,), validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        assert base.log_prob(jnp.array([1.0, -1.0])) == -jnp.inf


def test_base_measure_refuses_an_event_smaller_than_its_support():
    # Catches a simplex of scalars, which NumPyro accepts and fails on later.
    with pytest.raises(ValueError, match=r"1 dimensions or more, got event_shape=\(\)"):
        BaseMeasure(constraints.simplex, ())


def test_base_measure_has_the_dtype_of_its_value():
    # Catches float64 that creeps into float32 chains under x64.
    with jax.enable_x64(True):
        assert BaseMeasure().log_prob(jnp.ones(2, jnp.float32)).dtype == jnp.float32
        assert EnergyDistribution(lambda x: x**2).log_prob(jnp.ones(2, jnp.float32)).dtype == jnp.float32


# What an energy may be


class EquinoxBowl(eqx.Module):
    weight: jax.Array
    power: int = eqx.field(static=True)

    def __call__(self, x):
        return (self.weight * x**self.power).sum()


class FlaxBowl(nnx.Module):
    def __init__(self, weight):
        self.weight = nnx.Param(weight)

    def __call__(self, x):
        return (self.weight[...] * x**2).sum()


WEIGHT = jnp.array([1.0, 3.0])

ENERGIES = {
    "closure": lambda: EnergyDistribution(lambda x: (WEIGHT * x**2).sum(), (2,), initial=NORMAL2),
    "equinox": lambda: EnergyDistribution(EquinoxBowl(WEIGHT, 2), (2,), initial=NORMAL2),
    "partial": lambda: EnergyDistribution(jax.tree_util.Partial(lambda w, x: (w * x**2).sum(), WEIGHT), (2,), initial=NORMAL2),
    "nnx": lambda: EnergyDistribution(FlaxBowl(WEIGHT), (2,), initial=NORMAL2),
    "params": lambda: EnergyDistribution(
        lambda p, x: (p["w"] * x**2).sum(), (2,), params={"w": WEIGHT, "unused": None}, initial=NORMAL2
    ),
    "tilted": lambda: TiltedDistribution(
        dist.ImproperUniform(constraints.real, (), (2,)), lambda x: (WEIGHT * x**2).sum(), initial=NORMAL2
    ),
}


@pytest.fixture(scope="module", params=ENERGIES)
def same_energy(request):
    """The same density, written in every way the package takes: log p~(x) = -(x_0^2 + 3 x_1^2)."""
    return ENERGIES[request.param]()


X = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


def test_every_way_to_write_an_energy_is_the_same_distribution(same_energy):
    # Catches a module whose arrays get lost, mixed up or mapped over when the distribution takes it apart.
    expected = -(X**2 @ np.array([1.0, 3.0]))
    np.testing.assert_allclose(same_energy.log_prob(X), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda d, x: d.log_prob(x))(same_energy, X), expected, rtol=1e-5)
    np.testing.assert_allclose(same_energy.score(X), -2 * X * np.array([1.0, 3.0]), rtol=1e-5)
    np.testing.assert_allclose(same_energy.energy(X[0]) if same_energy.params is None else -expected[0], -expected[0], rtol=1e-5)


def test_a_distribution_survives_a_pytree_round_trip(same_energy):
    # Catches a field that is neither data nor aux (lost in jit), and aux data that jit cannot hash or compares by identity.
    leaves, treedef = jax.tree.flatten(same_energy)
    back = jax.tree.unflatten(treedef, leaves)
    assert type(back) is type(same_energy)
    for field in ("batch_shape", "event_shape", "sampler", "guarded", "support"):
        assert getattr(back, field) == getattr(same_energy, field)
    np.testing.assert_array_equal(back.log_prob(X), same_energy.log_prob(X))
    assert hash(treedef) == hash(jax.tree.structure(back))
    assert treedef == jax.tree.structure(back)
    assert all(isinstance(leaf, jax.Array | np.ndarray | float | int) for leaf in leaves)


@pytest.mark.parametrize("name", ["equinox", "nnx", "params"])
def test_equal_distributions_do_not_compile_again(name):
    # Catches aux data that differ between two models of equal structure: every step of a training loop would compile.
    def energy(w, x):
        return (w * x**2).sum()

    build = {
        "equinox": lambda w: EnergyDistribution(EquinoxBowl(w, 2), (2,), initial=NORMAL2),
        "nnx": lambda w: EnergyDistribution(FlaxBowl(w), (2,), initial=NORMAL2),
        "params": lambda w: EnergyDistribution(energy, (2,), params=w, initial=NORMAL2),
    }[name]
    traces = []

    @jax.jit
    def log_prob(d, x):
        traces.append(1)
        return d.log_prob(x)

    one, two = (log_prob(build(w), X[0]) for w in (WEIGHT, 2 * WEIGHT))
    assert len(traces) == 1
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_a_distribution_passes_out_of_jit():
    # Catches a constructor that needs concrete arrays.
    d = jax.jit(lambda k: EnergyDistribution(scaled_bowl, (2,), params=k))(3.0)
    np.testing.assert_allclose(d.log_prob(X), -3 * (X**2).sum(-1), rtol=1e-6)


ORDER = """
import jax.numpy as jnp, numpyro.distributions as dist
from numpyro_ebm import TiltedDistribution
d = TiltedDistribution(dist.Normal(0, 1), lambda p, x: p * x, params=jnp.ones(5)[0], initial=dist.Cauchy(0, 1))
print([type(leaf).__name__ for leaf in d.tree_flatten()[0]], TiltedDistribution.gather_pytree_aux_fields())
"""


def test_leaf_order_does_not_depend_on_the_hash_seed():
    # Catches field names collected through a set: between processes a distribution's arrays would trade places silently.
    runs = [
        subprocess.Popen([sys.executable, "-c", ORDER], env={**os.environ, "PYTHONHASHSEED": str(i)}, stdout=subprocess.PIPE)
        for i in range(3)
    ]
    printed = {run.communicate()[0] for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert len(printed) == 1


# Shapes


@pytest.mark.parametrize(("sample_shape", "batch_shape"), [((), ()), ((4,), ()), ((4, 5), ()), ((), (3,)), ((4, 5), (2, 3))])
def test_log_prob_and_score_have_numpyro_shapes(sample_shape, batch_shape):
    # Catches a vmap over the wrong number of dimensions, or in the wrong order.
    base = dist.Normal(jnp.zeros((*batch_shape, 2)), 1).to_event(1)
    d = TiltedDistribution(base, lambda x: x[0] - x[1] ** 2)
    assert (d.batch_shape, d.event_shape) == (batch_shape, (2,))
    x = np.random.default_rng(1).normal(size=sample_shape + batch_shape + (2,)).astype(np.float32)
    expected = log_normal(x).sum(-1) - x[..., 0] + x[..., 1] ** 2
    np.testing.assert_allclose(jax.jit(d.log_prob)(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(d.score)(x), np.stack([-x[..., 0] - 1, x[..., 1]], -1), rtol=1e-4, atol=1e-5)


def _stack_of(form):
    k = jnp.array([1.0, 2.0, 5.0])
    if form == "params":
        return EnergyDistribution(scaled_bowl, (2,), params=k, batch_shape=(3,), initial=NORMAL2)
    nets = eqx.filter_vmap(lambda k: EquinoxBowl(k * jnp.ones(2), 2))(k)
    return EnergyDistribution(nets, (2,), batch_shape=(3,), initial=NORMAL2)


@pytest.mark.parametrize("form", ["params", "equinox"])
@pytest.mark.parametrize("value_shape", [(2,), (3, 2), (1, 2), (5, 3, 2), (5, 1, 2)])
def test_a_stack_of_energies_broadcasts_against_values(form, value_shape):
    # Catches energies that are paired with the wrong values, or a value that is not broadcast against the batch.
    x = np.random.default_rng(2).normal(size=value_shape).astype(np.float32)
    expected = -np.array([1.0, 2.0, 5.0]) * (x**2).sum(-1)
    d = _stack_of(form)
    assert d.batch_shape == (3,)
    np.testing.assert_allclose(d.log_prob(x), expected, rtol=1e-5)


def test_a_stack_of_energies_meets_a_batch_of_bases():
    # Catches a batch of energies aligned with the first batch dimension of the base and not with the last.
    loc = jnp.arange(4.0)[:, None]
    d = TiltedDistribution(dist.Normal(loc, 1), lambda k, x: k * x, params=jnp.array([1.0, 10.0]), batch_shape=(2,))
    assert d.batch_shape == (4, 2)
    x = np.random.default_rng(3).normal(size=(4, 2)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(d.log_prob)(x), log_normal(x, np.arange(4.0)[:, None]) - np.array([1, 10]) * x, rtol=1e-4, atol=1e-4
    )
    assert jax.eval_shape(d.sample, KEY).shape == (4, 2)


def test_wrappers_keep_their_meaning():
    # Catches an expand, to_event or mask that sums, repeats or drops the wrong terms.
    d = EnergyDistribution(bowl, (2,), initial=NORMAL2)
    x = np.random.default_rng(4).normal(size=(4, 3, 2)).astype(np.float32)
    expected = -(x**2).sum(-1) / 2 - x[..., 0]
    mask = np.array([[True, False, True]] * 4)
    cases = [
        (d.expand([4, 3]), (4, 3), (2,), expected),
        (d.expand([3]), (3,), (2,), expected),
        (d.expand([3]).expand_by((4,)), (4, 3), (2,), expected),
        (d.expand([4, 3]).to_event(1), (4,), (3, 2), expected.sum(-1)),
        (d.expand([3]).mask(mask[0]), (3,), (2,), np.where(mask, expected, 0)),
        (_stack_of("params").to_event(1), (), (3, 2), -(np.array([1.0, 2.0, 5.0]) * (x**2).sum(-1)).sum(-1)),
    ]
    for wrapped, batch_shape, event_shape, log_prob in cases:
        assert (wrapped.batch_shape, wrapped.event_shape) == (batch_shape, event_shape)
        assert not wrapped.has_rsample
        assert not wrapped.has_enumerate_support
        np.testing.assert_allclose(wrapped.log_prob(x), log_prob, rtol=1e-4, atol=1e-5)


def test_transformed_distribution_on_top_has_the_jacobian():
    # Catches an event dimension that the transform cannot see: y = exp(x) has log p(log y) - sum log y.
    d = dist.TransformedDistribution(EnergyDistribution(bowl, (2,), initial=NORMAL2), dist.transforms.ExpTransform())
    x = X[0]
    assert (d.event_shape, d.has_rsample) == ((2,), False)
    np.testing.assert_allclose(d.log_prob(np.exp(x)), -(x**2).sum() / 2 - x[0] - x.sum(), rtol=1e-5)
    draws = jax.jit(lambda key: d.sample(key, (3,)))(KEY)
    assert draws.shape == (3, 2)
    assert (draws > 0).all()


def test_no_energy_distribution_offers_reparametrized_or_enumerated_draws():
    # Catches NumPyro's defaults: has_rsample is vacuously true for empty arg_constraints, enumeration silently wrong.
    discrete = EnergyDistribution(lambda x: x.sum() * 1.0, (2,), support=constraints.boolean)
    for d in (BaseMeasure(), EnergyDistribution(bowl, (2,)), TiltedDistribution(NORMAL2, bowl), discrete):
        for wrapped in (d, d.expand([3]), d.expand([3]).to_event(1), d.mask(np.array(True)), d.mask(False)):
            assert wrapped.has_rsample is False
            assert wrapped.has_enumerate_support is False
        with pytest.raises(NotImplementedError):
            d.rsample(KEY)
        with pytest.raises(NotImplementedError):
            d.enumerate_support()


# Densities and scores


@pytest.mark.parametrize(
    ("support", "x"),
    [
        (constraints.real, [0.3, -1.2]),
        (constraints.positive, [0.3, 1.2]),
        (constraints.interval(-1.0, 2.0), [0.3, -0.9]),
        (constraints.simplex, [0.3, 0.7]),
    ],
    ids=str,
)
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "tilted"])
def test_score_is_the_gradient_of_log_prob_by_finite_differences(support, x, flat):
    # Catches a sign, a base whose score is left out, and a normalizer guard that changes gradients in the value.
    def energy(x):
        return jnp.sin(x[0]) * x[1] ** 2 + x[0] ** 2

    with jax.enable_x64(True):
        x = jnp.array(x)
        if flat:
            d, log_base = EnergyDistribution(energy, (2,), support=support), lambda x: 0.0
        else:
            base = BaseMeasure(support, (2,)) if support is not constraints.real else NORMAL2
            d, log_base = TiltedDistribution(base, energy), lambda x: base.log_prob(x)

        def log_prob(x):  # by hand, and off the simplex too
            return log_base(x) - np.sin(x[0]) * x[1] ** 2 - x[0] ** 2

        np.testing.assert_allclose(d.log_prob(x), log_prob(x), rtol=1e-12)
        assert d.support(x)
        steps = 1e-6 * np.eye(2)
        with numpyro.validation_enabled(False):
            numeric = [(log_prob(x + e) - log_prob(x - e)) / 2e-6 for e in steps]
        np.testing.assert_allclose(d.score(x), numeric, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(jax.grad(d.log_prob)(x), numeric, rtol=1e-7, atol=1e-8)
        exact = d.score(x)
    np.testing.assert_allclose(d.score(np.asarray(x, np.float32)), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_follows_the_value(dtype):
    # Catches float32 constants in a float64 run, and float64 that creeps into a float32 one.
    with jax.enable_x64(True):
        d = TiltedDistribution(NORMAL, lambda x: x**4)
        x = jnp.ones(3, dtype)
        assert d.log_prob(x).dtype == d.score(x).dtype == jnp.dtype(dtype)
    with jax.enable_x64(dtype == "float64"):
        d = EnergyDistribution(lambda x: x**4, initial=NORMAL, sampler=UnadjustedLangevin(num_steps=1))
        x = jnp.ones(3, dtype)
        assert d.log_prob(x).dtype == d.score(x).dtype == d.sample(KEY).dtype == jnp.dtype(dtype)


def test_values_may_be_numbers_of_python():
    # Catches an energy that is handed an integer: x ** -1 or a gradient would fail.
    d = EnergyDistribution(lambda x: x**2)
    assert d.log_prob(2) == -4.0
    assert d.log_prob(2).dtype == jnp.float32
    assert d.score(1.5) == -3.0


def test_values_out_of_the_support_warn_and_have_no_density():
    # Catches a support that the base knows and the energy distribution does not.
    d = EnergyDistribution(lambda x: x, support=constraints.positive, validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        assert d.log_prob(-1.0) == -jnp.inf


def test_validation_can_be_switched_off():
    # Catches a base that goes on validating: dist.Exponential(1., validate_args=False).log_prob(-1.) is 1, not -inf.
    d = EnergyDistribution(lambda x: x, support=constraints.positive, validate_args=False)
    assert d.log_prob(-1.0) == 1.0


class NormalizedTilt(TiltedDistribution):
    """exp(alpha x) N(x; 0, 1) / exp(alpha^2 / 2), a tilt that knows its normalizer."""

    is_normalized = True

    def __init__(self, alpha):
        super().__init__(NORMAL, lambda alpha, x: -alpha * x, params=alpha)

    def log_prob(self, value, intermediates=None):
        return super().log_prob(value) - self.params**2 / 2


def test_a_subclass_that_knows_its_normalizer_is_not_guarded():
    # Catches a guard that ignores is_normalized: d/d alpha of log N(x; alpha, 1) is x - alpha.
    value, grad = jax.value_and_grad(lambda alpha: NormalizedTilt(alpha).log_prob(2.0))(0.5)
    np.testing.assert_allclose(value, log_normal(2.0, 0.5), rtol=1e-6)
    np.testing.assert_allclose(grad, 1.5, rtol=1e-6)
    assert not NormalizedTilt(0.5).guarded
    back = jax.tree.unflatten(*reversed(jax.tree.flatten(NormalizedTilt(0.5))))
    np.testing.assert_allclose(back.log_prob(2.0), value, rtol=1e-6)


# vmap and scan: leading dimensions that the constructor did not see


def test_vmapped_construction_is_a_batch_of_energies():
    # Catches an unregistered promote_batch_shape: NumPyro then takes the batch dimension for an event's.
    k = jnp.array([1.0, 2.0, 3.0])
    d = promote_batch_shape(jax.vmap(lambda k: EnergyDistribution(scaled_bowl, (2,), params=k, initial=NORMAL2))(k))
    assert (d.batch_shape, d.event_shape) == ((3,), (2,))
    expected = -np.array([1.0, 2.0, 3.0]) * (X**2).sum(-1)
    np.testing.assert_allclose(d.log_prob(X), expected, rtol=1e-5)
    np.testing.assert_allclose(d.expand([4, 3]).log_prob(X), np.broadcast_to(expected, (4, 3)), rtol=1e-5)


def test_vmapped_construction_can_be_sampled():
    # Catches a start that keeps the batch shape it had inside vmap.
    k = jnp.array([1.0, 2.0, 3.0])
    d = promote_batch_shape(jax.vmap(lambda k: EnergyDistribution(scaled_bowl, (2,), params=k, initial=NORMAL2))(k))
    assert jax.eval_shape(lambda key: d.sample(key, (5,)), KEY).shape == (5, 3, 2)


@pytest.mark.parametrize("as_base", [True, False], ids=["base", "initial"])
def test_starts_of_a_vmapped_construction_stay_with_their_rows(as_base):
    # Catches samples of a distribution expanded inside vmap in the order in which NumPyro gives them: (n, event, batch, 1).
    def make(loc):
        start = dist.Normal(loc, 0.01).expand([2]).to_event(1)
        return TiltedDistribution(start if as_base else NORMAL2, jnp.sum, initial=None if as_base else start)

    loc = jnp.array([0.0, 1.0, 2.0])
    starts = promote_batch_shape(jax.vmap(make)(loc)).initial_chains(KEY, 50)
    assert starts.shape == (50, 3, 2)
    np.testing.assert_allclose(starts, jnp.broadcast_to(loc[:, None], (50, 3, 2)), atol=0.06)


def test_vmap_of_log_prob_over_parameters():
    # Catches a rank of parameters that is recorded under vmap and used outside of it.
    k = jnp.array([1.0, 2.0, 3.0])
    log_prob = jax.vmap(lambda k, x: EnergyDistribution(scaled_bowl, (2,), params=k).log_prob(x))
    np.testing.assert_allclose(log_prob(k, X), -np.array([1.0, 2.0, 3.0]) * (X**2).sum(-1), rtol=1e-5)


def test_vmapped_bases_and_vector_parameters_promote_together():
    # Catches an event dimension of a parameter that is taken for a batch dimension.
    loc, w = jnp.array([0.0, 1.0, 2.0]), jnp.arange(6.0).reshape(3, 2)
    d = jax.vmap(lambda loc, w: TiltedDistribution(dist.Normal(loc * jnp.ones(2), 1).to_event(1), jnp.dot, params=w))(loc, w)
    d = promote_batch_shape(d)
    assert d.batch_shape == (3,)
    np.testing.assert_allclose(
        d.log_prob(X), log_normal(X, np.arange(3.0)[:, None]).sum(-1) - (X * np.asarray(w)).sum(-1), rtol=1e-5
    )


@pytest.mark.parametrize("batched", ["base", "energy"])
def test_vmapped_construction_keeps_new_dimensions_in_front(batched):
    # Catches a batch of energies that lands on the base's old batch dimension: wrong densities without an error.
    k = jnp.array([1.0, 10.0])
    if batched == "base":
        d = jax.vmap(lambda k: TiltedDistribution(dist.Normal(jnp.zeros(2), 1), lambda k, x: k * x, params=k))(k)
        expected = log_normal(1.0) - np.array([[1.0, 1.0], [10.0, 10.0]])
    else:
        d = jax.vmap(lambda m: TiltedDistribution(dist.Normal(m, 1), lambda k, x: k * x, params=k, batch_shape=(2,)))(k)
        expected = log_normal(1.0, np.array([[1.0], [10.0]])) - np.array([1.0, 10.0])
    d = promote_batch_shape(d)
    assert d.batch_shape == (2, 2)
    np.testing.assert_allclose(d.log_prob(jnp.ones((2, 2))), expected, rtol=1e-5)


def test_scan_over_an_energy_site_is_the_product_of_its_steps():
    # Catches a site that NumPyro's scan stacks without its base's or parameters' time dimension.
    strength = jnp.array([0.1, 0.2, 0.3])

    def model():
        def step(z, k):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(z, 1), lambda k, x: k * x**4, params=k))
            with numpyro.plate("twice", 2):
                w = numpyro.sample("w", TiltedDistribution(dist.Normal(z, 1), lambda x: 0.1 * x**4))
            return z + w.sum(), z

        return scan(step, 0.0, strength)[1]

    z, w = jnp.array([0.5, -0.3, 1.0]), jnp.asarray(X)
    mean = jnp.concatenate([jnp.zeros(1), (z + w.sum(-1))[:-1]])
    expected = (log_normal(z, mean) - strength * z**4).sum() + (log_normal(w, z[:, None]) - 0.1 * w**4).sum()
    np.testing.assert_allclose(log_density(model, (), {}, {"z": z, "w": w})[0], expected, rtol=1e-5)
    assert seed(model, 0)().shape == (3,)


# Draws


def _two_wells(x):
    return 2 * (x**2 - 1) ** 2 + 0.5 * x


def _quadrature(energy, lower, upper):
    grid = np.linspace(lower, upper, 20_001)
    density = np.exp(-energy(grid))
    cdf = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return lambda x: np.interp(x, grid, cdf / cdf[-1])


LAWS = {
    "linear tilt": (lambda: TiltedDistribution(NORMAL, lambda x: -1.5 * x), scipy.stats.norm(1.5, 1).cdf),
    "quadratic tilt": (lambda: TiltedDistribution(NORMAL, lambda x: 1.5 * x**2 - 2 * x), scipy.stats.norm(0.5, 0.5).cdf),
    "exponential": (
        lambda: EnergyDistribution(lambda x: 3 * x, support=constraints.positive, initial=dist.Exponential(1.0)),
        scipy.stats.expon(scale=1 / 3).cdf,
    ),
    "exponentials": (
        lambda: EnergyDistribution(
            lambda x: 3 * x.sum(), (2,), support=constraints.positive, initial=dist.Exponential(jnp.ones(2)).to_event(1)
        ),
        scipy.stats.expon(scale=1 / 3).cdf,
    ),
    "dirichlet": (
        lambda: EnergyDistribution(
            lambda x: -(jnp.array([1.0, 2.0, 3.0]) * jnp.log(x)).sum(),  # concentrations 2, 3, 4
            (3,),
            support=constraints.simplex,
            initial=dist.Dirichlet(jnp.ones(3)),
        ),
        scipy.stats.beta(2, 7).cdf,
    ),
    "two wells": (lambda: EnergyDistribution(_two_wells, initial=dist.Normal(0, 1.5)), _quadrature(_two_wells, -4, 4)),
}


@pytest.mark.parametrize("distribution", LAWS)
def test_sample_follows_its_distribution(distribution):
    # Catches a flipped energy, a missing Jacobian of the support, sqrt(h) for sqrt(2h), and a chain that starts and stays.
    build, cdf = LAWS[distribution]
    draws = np.asarray(jax.jit(lambda key: build().sample(key, (4000,)))(KEY))
    for x in [draws] if draws.ndim == 1 else [draws[:, 0]]:
        assert scipy.stats.kstest(x, cdf).pvalue > 1e-4
        # u = cdf(x) is uniform: mean 1/2 and variance 1/12, within 4.5 standard errors
        u = cdf(x)
        assert abs(u.mean() - 1 / 2) < 4.5 * np.sqrt(1 / 12 / len(u))
        assert abs(u.var() - 1 / 12) < 4.5 * np.sqrt(1 / 180 / len(u))


def test_draws_of_a_dirichlet_energy_have_its_moments():
    # Catches a Jacobian of the simplex that is right in one coordinate only.
    a = np.array([2.0, 3.0, 4.0])
    exact = scipy.stats.dirichlet(a)
    draws = np.asarray(jax.jit(lambda key: LAWS["dirichlet"][0]().sample(key, (4000,)))(jax.random.key(11)))
    np.testing.assert_allclose(draws.sum(-1), 1, rtol=1e-5)
    assert (abs(draws.mean(0) - exact.mean()) < 4.5 * np.sqrt(exact.var() / 4000)).all()


def test_a_stack_of_energies_is_sampled_each_by_its_own_distribution():
    # Catches energies of a batch that share their draws or trade places.
    d = EnergyDistribution(lambda k, x: k * x**2, params=jnp.array([0.5, 2.0, 8.0]), batch_shape=(3,), initial=NORMAL)
    draws = np.asarray(jax.jit(lambda key: d.sample(key, (4000,)))(KEY))
    variance = 1 / np.array([1.0, 4.0, 16.0])
    assert (abs(draws.var(0) - variance) < 4.5 * variance * np.sqrt(2 / 4000)).all()
    correlation = np.corrcoef(draws.T)
    assert (abs(correlation - np.eye(3)) < 4.5 / np.sqrt(4000)).all()


def test_draws_are_independent_and_reproducible():
    # Catches one chain behind all draws, noise shared by the chains, and a key that is not used.
    sample = jax.jit(lambda key: TiltedDistribution(NORMAL2, bowl).sample(key, (2000, 2)))
    draws = sample(KEY)
    assert draws.shape == (2000, 2, 2)
    flat = np.asarray(draws).reshape(2000, 4)
    correlation = np.corrcoef(flat.T) - np.eye(4)
    assert (abs(correlation) < 4.5 / np.sqrt(2000)).all()
    assert abs(np.corrcoef(flat[:-1, 0], flat[1:, 0])[0, 1]) < 4.5 / np.sqrt(2000)
    np.testing.assert_array_equal(draws, sample(KEY))
    assert (draws != sample(jax.random.key(12))).any()


@pytest.mark.parametrize(
    "sample_shape",
    [(), (1,), (0,), (2, 3)],
)
def test_draws_have_sample_batch_and_event_shape(sample_shape):
    # Catches chains that are reshaped into the wrong order, and an empty product that is not 1.
    d = EnergyDistribution(
        scaled_bowl, (2,), params=jnp.ones((4, 1)), batch_shape=(4, 1), initial=NORMAL2, sampler=UnadjustedLangevin(num_steps=1)
    )
    assert jax.eval_shape(lambda: d.sample(KEY, sample_shape)).shape == (*sample_shape, 4, 1, 2)
    assert jax.eval_shape(lambda: d.sample(key=KEY, sample_shape=sample_shape)).shape == d.shape(sample_shape)
    assert jax.eval_shape(lambda: d.expand([3, 4, 1]).sample(KEY, sample_shape)).shape == (*sample_shape, 3, 4, 1, 2)


def test_a_gradient_through_samples_is_refused_and_costs_nothing_where_it_is_stopped():
    # Catches a reparametrized-looking sample: its gradient would be biased and cost all steps, and 0 is wrong too.
    def draw(loc):
        d = TiltedDistribution(dist.Normal(loc, 1), lambda x: loc * x, sampler=UnadjustedLangevin(num_steps=2))
        return d.sample(KEY)

    with pytest.raises(NormalizerError, match="samples of an energy have no gradient in what it depends on"):
        jax.grad(draw)(1.0)
    assert jax.grad(lambda loc: jax.lax.stop_gradient(draw(loc)))(1.0) == 0.0


def test_sample_without_a_start_says_to_pass_initial():
    # Catches another type of error: initialization, ArviZ and inspection fall back on exactly NotImplementedError.
    with pytest.raises(NotImplementedError, match="initial=") as caught:
        EnergyDistribution(bowl, (2,)).sample(KEY)
    assert type(caught.value) is NotImplementedError


def test_sample_of_a_discrete_support_needs_a_sampler_for_it():
    # Catches a Langevin chain that leaves the grid.
    discrete = EnergyDistribution(lambda x: 1.0 * x, support=constraints.boolean, initial=dist.Bernoulli(0.5))
    for d in (discrete, TiltedDistribution(dist.Bernoulli(0.5), lambda x: 1.0 * x)):
        with pytest.raises(NotImplementedError, match="sampler=") as caught:
            d.sample(KEY)
        assert type(caught.value) is NotImplementedError
        np.testing.assert_allclose(
            d.log_prob(jnp.array([0, 1])) - d.base.log_prob(jnp.array([0, 1])), np.array([0.0, -1.0]), atol=1e-6
        )


# Inside NumPyro


def _gaussian_model(y=None):
    with numpyro.plate("data", 2):
        z = numpyro.sample("z", TiltedDistribution(NORMAL, lambda z: -z))  # N(1, 1)
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


def test_an_energy_site_is_a_hand_written_factor():
    # Catches a term that is added twice, or scaled unlike its site, in a plate.
    def by_hand(y):
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", NORMAL)
            numpyro.factor("energy", z)
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    y, z = jnp.array([2.0, -1.0]), jnp.array([0.4, 0.7])
    ours, theirs = (
        jax.value_and_grad(lambda z, m=model: log_density(m, (y,), {}, {"z": z})[0])(z) for model in (_gaussian_model, by_hand)
    )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6)


def _run(kernel, *args, num_samples=400):
    mcmc = MCMC(kernel, num_warmup=200, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(13), *args)
    return mcmc.get_samples()["z"]


def _assert_posterior(z, mean, variance):
    """Mean and variance of MCMC draws, within 4.5 standard errors at their effective sample size."""
    ess, ess_square = (min(effective_sample_size(np.asarray(x)[None]), len(z)) for x in (z, (z - mean) ** 2))
    assert abs(z.mean() - mean) < 4.5 * np.sqrt(variance / ess)
    assert abs(((z - mean) ** 2).mean() - variance) < 4.5 * variance * np.sqrt(2 / ess_square)


@pytest.mark.parametrize("kernel", [NUTS, lambda model: HMC(model, trajectory_length=1.5)], ids=["NUTS", "HMC"])
def test_hamiltonian_samplers_draw_the_posterior_under_an_energy_prior(kernel):
    # Catches a guard that fires or changes gradients in the latents: z ~ N(1, 1), y | z ~ N(z, 1) is N((1 + y)/2, 1/2).
    z = _run(kernel(_gaussian_model), jnp.array([2.0, -1.0]))
    _assert_posterior(z[:, 0], 1.5, 0.5)
    _assert_posterior(z[:, 1], 0.0, 0.5)


@pytest.mark.parametrize("init", [init_to_median, init_to_sample])
def test_nuts_starts_where_an_energy_cannot_be_sampled(init):
    # Catches an error of another type from sample: NumPyro's initialization would not fall back on uniform starts.
    def model():
        numpyro.sample("z", EnergyDistribution(lambda x: 2 * x, support=constraints.positive))

    z = _run(NUTS(model, init_strategy=init))
    assert (z > 0).all()
    ess = min(effective_sample_size(np.asarray(z)[None]), len(z))
    assert abs(z.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(ess)


def test_predictive_draws_prior_and_posterior():
    # Catches a sample method that ignores the plate's expansion or Predictive's vmap over draws.
    prior = Predictive(_gaussian_model, num_samples=6)(KEY)
    assert {name: value.shape for name, value in prior.items()} == {"z": (6, 2), "y": (6, 2)}
    assert len(np.unique(prior["z"])) == 12
    posterior = Predictive(_gaussian_model, {"z": jnp.ones((5, 2))})(KEY)
    assert {name: value.shape for name, value in posterior.items()} == {"y": (5, 2)}


def test_render_model_draws_energy_sites():
    # Catches an energy site that NumPyro's inspection cannot trace; only the source is built.
    def model():
        z = numpyro.sample("z", EnergyDistribution(bowl, (2,)))
        numpyro.sample("y", dist.Normal(z, 1).to_event(1), obs=jnp.zeros(2))

    source = numpyro.render_model(model, render_distributions=True).source
    assert "z -> y" in source
    assert "z ~ EnergyDistribution" in source
    source = numpyro.render_model(_gaussian_model, model_args=(jnp.zeros(2),), render_distributions=True).source
    assert "z ~ TiltedDistribution" in source


# What bad input gets


def _log_prob(value, energy, event_shape=(2,)):
    return lambda: EnergyDistribution(energy, event_shape).log_prob(value)


ONES = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_log_prob(ONES, lambda x: x[:1]), ValueError, r"must return a scalar for one event of shape \(2,\), it returned \(1,\)"),
        (_log_prob(ONES, lambda x: (x**2).sum(-1)[:, 0]), ValueError, "write it for one event"),
        (_log_prob(ONES, lambda x: x[:, 0]), ValueError, "write it for one event"),
        (_log_prob(ONES, lambda x: 1), ValueError, "it returned dtype int32: convert it to float"),
        (_log_prob(ONES, lambda x: x[0] > 0), ValueError, "it returned dtype bool: convert it to float"),
        (_log_prob(ONES, lambda x: None), ValueError, "failed on one event"),
        (_log_prob(np.ones(3), lambda x: x[0]), ValueError, r"shape \(3,\) does not end in the event shape \(2,\)"),
        (_log_prob(1.0, lambda x: x[0]), ValueError, r"shape \(\) does not end in the event shape \(2,\)"),
        (lambda: EnergyDistribution(lambda x: x**2).score(np.ones(2, int)), TypeError, "needs real events, got dtype int"),
        (
            lambda: EnergyDistribution(lambda x: x * 1.0, support=constraints.boolean).score(np.ones(2, np.float32)),
            TypeError,
            "sampler for discrete events",
        ),
        (lambda: EnergyDistribution(3.0), TypeError, "energy must be a function of one event, got float"),
        (
            lambda: EnergyDistribution(scaled_bowl, (2,), params=jnp.ones(3), batch_shape=(2,)),
            ValueError,
            r"batch_shape=\(2,\) every array of the energy must lead with it, one has shape \(3,\)",
        ),
        (
            lambda: EnergyDistribution(bowl, (2,), initial=NORMAL),
            ValueError,
            r"initial has event_shape \(\), the base has \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused_with_what_was_found_and_wanted(call, error, message):
    # Catches an error from deep inside vmap, which names neither the energy nor the shape of one event.
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("in_plate", [False, True])
def test_errors_inside_a_model_name_the_site(in_plate):
    # Catches a model of twenty sites whose error says "an energy distribution".
    def model():
        if in_plate:
            with numpyro.plate("data", 3):
                numpyro.sample("z", EnergyDistribution(lambda x: x[:1], (2,)))
        else:
            numpyro.sample("z", EnergyDistribution(lambda x: x[:1], (2,)))

    with pytest.raises(ValueError, match=r"energy of site 'z' must return a scalar for one event of shape \(2,\)"):
        log_density(model, (), {}, {"z": jnp.ones((3, 2) if in_plate else (2,))})


def test_a_failing_energy_is_named_with_its_own_message():
    # Catches an original error that is swallowed.
    def model():
        numpyro.sample("z", EnergyDistribution(lambda x: x @ jnp.ones(3), (2,)))

    with pytest.raises(ValueError, match="energy of site 'z' failed on one event of shape") as caught:
        log_density(model, (), {}, {"z": jnp.ones(2)})
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("in_plate", [False, True])
def test_a_site_that_cannot_be_sampled_is_named(in_plate):
    # Catches a prior predictive that says "a distribution at no site" of a site.
    def model():
        if in_plate:
            with numpyro.plate("data", 3):
                numpyro.sample("z", EnergyDistribution(bowl, (2,)))
        else:
            numpyro.sample("z", EnergyDistribution(bowl, (2,)))

    with pytest.raises(NotImplementedError, match="site 'z'"):
        seed(model, 0)()


class _Well(EnergyDistribution):
    """Two wells at -sqrt(a) and sqrt(a), as a distribution of one's own is written."""

    arg_constraints = {"a": constraints.positive}

    def __init__(self, a, *, validate_args=None):
        settings = {"batch_shape": jnp.shape(a), "params": {"a": a}, "validate_args": validate_args}
        super().__init__(lambda params, x: (x**2 - params["a"]) ** 2, initial=dist.Normal(0, 2), **settings)

    @property
    def a(self):
        return self.params["a"]


def test_a_constrained_parameter_may_be_a_property():
    # Catches NumPyro's rule that all names of arg_constraints are attributes to be set: no round trip, jit or vmap.
    a = jnp.array([1.0, 2.0])
    leaves, structure = jax.tree.flatten(_Well(a))
    np.testing.assert_array_equal(jax.tree.unflatten(structure, leaves).a, a)
    np.testing.assert_array_equal(jax.jit(lambda well: well.log_prob(0.0))(_Well(a)), -(a**2))
    np.testing.assert_array_equal(jax.vmap(lambda a: _Well(a).log_prob(0.0))(a), -(a**2))
    with pytest.raises(ValueError, match="invalid a parameter"):
        _Well(-1.0, validate_args=True)


def test_a_narrow_distribution_is_right_one_sample_at_a_time_with_a_start_and_a_step_of_its_own():
    # the cure that sample's docstring gives: with its defaults seven of ten such samples are left where they started
    sd = 0.001
    fn = EnergyDistribution(lambda x: x**2 / (2 * sd**2), initial=dist.Normal(0, 10 * sd), sampler=MALA(sd**2, 200, adapt=False))
    x = jax.jit(jax.vmap(fn.sample))(jax.random.split(jax.random.key(0), 1000))
    assert abs(x.std() / sd - 1) < 4 / 2000**0.5
