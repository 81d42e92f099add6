# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Data, supports and rows that a model makes impossible, and what tools return of them: right, or an error that names the cause.

Each test would have caught a fit or a sample that was silently wrong. Most compile nothing: the error comes before.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    OrderedTransform,
    PermuteTransform,
    SigmoidTransform,
)
from numpyro.handlers import mask, seed
from numpyro.infer import SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from test_bad_input import refused

from numpyro_ebm import (
    BaseMeasure,
    BernoulliRBM,
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ExactScoreMatching,
    GaussianBernoulliRBM,
    GumbelBernoulli,
    KernelSteinDiscrepancy,
    ParticleMMLE,
    PosteriorFisher,
    ScoreMatching,
    TiltedDistribution,
    UnadjustedLangevin,
    VaGES,
    amortized_normal,
    annealed_langevin,
    block_gibbs,
    check_model,
    convergence,
    denoise,
    fisher_divergence,
    kinetic_langevin,
    ksd_test,
    langevin,
    marginal_score,
    negative_phase,
    sample_posterior,
    standard_errors,
    to_inference_data,
)
from numpyro_ebm.infer.engine import RunResult
from numpyro_ebm.objectives import IMQKernel
from numpyro_ebm.program.pair import same_support
from numpyro_ebm.program.sites import are_possible, events_inside, require_possible
from numpyro_ebm.samplers import MALA
from numpyro_ebm.train.health import NonFiniteError

KEY = jax.random.key(0)
Y = jnp.array([0.4, 2.9, 1.1, 3.2, -0.6, 1.4])
SGD, NOISE = optax.sgd(0.1), DenoisingScoreMatching(0.3)
NORMAL = dist.Normal(0, 1)


def site(fn, *, observed=lambda x: dist.Normal(x, 1)):
    """A model of one latent, drawn from ``fn(params)``."""

    def model(y):
        loc = numpyro.param("loc", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", fn(loc))
            numpyro.sample("y", observed(x), obs=y)

    return model


def drawn(fn):
    """A guide of that latent."""

    def guide(y):
        slope = numpyro.param("slope", 0.5)
        with numpyro.plate("data", len(y)):
            numpyro.sample("x", fn(slope * y))

    return guide


def marginal(y):
    loc = numpyro.param("loc", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: (y - loc) ** 2 / 2), obs=y)


normal_model, normal_guide = site(lambda loc: dist.Normal(loc, 1)), drawn(lambda x: dist.Normal(x, 1))
exponential = site(lambda loc: dist.Exponential(1 / loc))
PAIRED = {
    "BiSM": lambda model, guide: BiSM(model, guide, SGD, SGD, NOISE).init(KEY, Y),
    "VaGES": lambda model, guide: VaGES(model, guide, SGD, SGD, NOISE).init(KEY, Y),
    "BiDVL": lambda model, guide: BiDVL(marginal_energy, guide, model, SGD, SGD, SGD).init(KEY, Y),
    "marginal_score": lambda model, guide: marginal_score(model, guide, {"loc": 1.0, "slope": 0.5}, Y, rng_key=KEY),
    "PosteriorFisher": lambda model, guide: PosteriorFisher().loss(KEY, {"loc": 1.0, "slope": 0.5}, model, guide, Y),
}
paired = pytest.mark.parametrize("name", PAIRED)


def marginal_energy(y):
    center = numpyro.param("center", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: (y - center) ** 2 / 2), obs=y)


# Supports.

OTHER_SUPPORTS = {
    "wider": (
        exponential,
        normal_guide,
        "Exponential with the support Positive(lower_bound=0.0), and the {} from Normal with Real()",
    ),
    "narrower": (
        normal_model,
        drawn(lambda x: dist.LogNormal(x, 1)),
        "Normal with the support Real(), and the {} from LogNormal with Pos",
    ),
    "an interval": (site(lambda loc: dist.Uniform(0, 2)), drawn(lambda x: dist.Beta(1 + x**2, 1)), "UnitInterval"),
}


@paired
@pytest.mark.parametrize(("model", "guide", "message"), OTHER_SUPPORTS.values(), ids=OTHER_SUPPORTS)
def test_guide_on_another_support_is_refused(name, model, guide, message):
    # Learned 15.34 where 1 is true: the formula of a density goes on where the density is 0.
    what = "encoder" if name == "BiDVL" else "guide"
    refused(message.format(what), PAIRED[name], model, guide)


@pytest.mark.parametrize("name", ["BiSM", "VaGES", "marginal_score"])
def test_bits_with_a_real_guide_are_refused(name):
    bits = site(lambda loc: dist.Bernoulli(logits=loc))
    refused("Draw bits in the guide relaxed, with GumbelBernoulli.", PAIRED[name], bits, normal_guide)


VECTOR = jnp.ones(3)
SAME = {
    "LogNormal of Exponential": (dist.Exponential(1.0), dist.LogNormal(0, 1)),
    "Beta of Uniform": (dist.Uniform(0, 1), dist.Beta(1.0, 1.0)),
    "a transform of Uniform": (
        dist.Uniform(-1, 3),
        dist.TransformedDistribution(NORMAL, biject_to(constraints.interval(-1.0, 3.0))),
    ),
    "an angle": (dist.VonMises(0, 1), dist.Uniform(-np.pi, np.pi)),
    "Gamma of HalfNormal": (dist.HalfNormal(1), dist.Gamma(1.0, 1.0)),
    "with and without a boundary": (dist.TruncatedNormal(low=0.0), dist.Exponential(1.0)),
    "shifted": (dist.Pareto(2.0, 1.0), dist.TransformedDistribution(NORMAL, biject_to(constraints.greater_than(2.0)))),
    "vectors": (dist.Normal(VECTOR, 1).to_event(1), dist.MultivariateNormal(VECTOR, jnp.eye(3))),
    "a flat measure": (BaseMeasure(constraints.positive, (3,)), dist.LogNormal(VECTOR, 1).to_event(1)),
    "relaxed bits": (dist.Bernoulli(0.5 * VECTOR).to_event(1), GumbelBernoulli(VECTOR).to_event(1)),
    "relaxed bits of NumPyro": (dist.Bernoulli(0.5), dist.RelaxedBernoulli(jnp.array(0.5), logits=jnp.array(0.0))),
    "a simplex": (dist.Dirichlet(VECTOR), dist.Dirichlet(2 * VECTOR)),
    "ordered vectors": (
        dist.ImproperUniform(constraints.positive_ordered_vector, (), (3,)),
        dist.TransformedDistribution(dist.Normal(VECTOR, 1).to_event(1), biject_to(constraints.positive_ordered_vector)),
    ),
    "of a user": (dist.ImproperUniform(type("Mine", (constraints.Constraint,), {})(), (), ()), NORMAL),
}
OTHERS = {
    "another bound": (dist.Uniform(0, 1), dist.Uniform(0, 1.1)),
    "categories": (dist.Categorical(VECTOR / 3), dist.Categorical(jnp.ones(4) / 4)),
    "a simplex": (dist.Dirichlet(VECTOR), dist.LogNormal(VECTOR, 1).to_event(1)),
    "counts": (dist.Poisson(1.0), dist.Exponential(1.0)),
    "bits by a Beta": (dist.Bernoulli(0.5), dist.Beta(1.0, 1.0)),
    "half a line": (dist.Exponential(1.0), dist.HalfNormal(1).mask(True), dist.Normal(0, 1)),
}


@pytest.mark.parametrize(("model", "guide"), SAME.values(), ids=SAME)
def test_same_support_in_other_words_is_the_same(model, guide):
    assert same_support(model, guide) is True


@pytest.mark.parametrize("name", OTHERS)
def test_other_supports_are_told_apart(name):
    model, *_, guide = OTHERS[name]
    assert same_support(model, guide) is False


def test_bounds_of_the_data_are_compared_where_their_numbers_are_known():
    # A uniform latent up to a bound that the data give: no name tells whether the guide's bound is the same.
    def pair(bound):
        def model(y):
            loc = numpyro.param("loc", 1.0)
            with numpyro.plate("data", len(y)):
                x = numpyro.sample("x", dist.Uniform(0, 1 + y**2))
                numpyro.sample("y", dist.Normal(x * loc, 1), obs=y)

        def guide(y):
            slope = numpyro.param("slope", 0.5)
            with numpyro.plate("data", len(y)):
                to_bounds = biject_to(constraints.interval(jnp.zeros(len(y)), bound(y)))
                numpyro.sample("x", dist.TransformedDistribution(dist.Normal(slope * y, 1), to_bounds))

        return model, guide

    BiSM(*pair(lambda y: 1 + y * y), SGD, SGD, NOISE, num_inner_steps=1).init(KEY, Y)
    model, guide = pair(lambda y: 2 + y * y)
    refused("They must be the same", BiSM(model, guide, SGD, SGD, NOISE, num_inner_steps=1).init, KEY, Y)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoDiagonalNormal])
def test_autoguides_have_the_supports_of_their_model(autoguide):
    def model(y):
        rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Exponential(rate))
            z = numpyro.sample("z", dist.Uniform(-1, 2))
            numpyro.sample("y", dist.Normal(x + z, 1), obs=y)

    engine = BiSM(model, autoguide(model), SGD, SGD, NOISE)
    assert jax.eval_shape(lambda: engine.init(KEY, Y)).params["rate"].shape == ()


@pytest.mark.parametrize("name", ["BiSM", "VaGES", "BiDVL", "marginal_score", "PosteriorFisher"])
def test_data_in_a_guide_are_refused(name):
    # They moved the guide's params by a density that is none of the latents'.
    def guide(y):
        slope = numpyro.param("slope", 0.5)
        with numpyro.plate("data", len(y)):
            numpyro.sample("x", dist.Normal(slope * y, 1))
            numpyro.sample("q", dist.Normal(slope, 1), obs=y)

    refused("observes it, and its density would count as that of latents. Take it out", PAIRED[name], normal_model, guide)


# Data.


def energy_of(energy, support=constraints.real):
    def model(y):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", EnergyDistribution(lambda y: energy(a, y), support=support), obs=y)

    return model


half = energy_of(lambda a, y: jnp.where(y > 0, a * y, jnp.inf))
IMPOSSIBLE = {
    "infinite": (half, Y, "site 'y': its log density is -inf at 1 of 6 observed events"),
    "NaN": (energy_of(lambda a, y: a * jnp.sqrt(y)), Y, "site 'y': its log density is nan at 1 of 6"),
    "overflow": (energy_of(lambda a, y: a * y**2), Y * 1e30, "site 'y': its log density is -inf at 6 of 6 observed events"),
}


@pytest.mark.parametrize(("model", "y", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_data_of_no_density_are_refused_by_score_engines(model, y, message):
    # Their score is that of the branch that is left out, 0: they were fitted.
    refused(message, ScoreMatching(model, SGD, ExactScoreMatching()).init, KEY, y)
    encoder, generator = (
        drawn(lambda x: dist.Normal(x, 1)),
        site(lambda loc: dist.Normal(0, 1), observed=lambda x: dist.Normal(x, 1)),
    )
    refused(message, BiDVL(model, encoder, generator, SGD, SGD, SGD).init, KEY, y)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", ["batch_size", "plate"])
def test_every_row_is_looked_at_in_batches_too(size, how):
    def subsampled(y):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", len(y), subsample_size=size):
            batch = numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", EnergyDistribution(lambda y: jnp.where(y == Y[4], jnp.inf, a * y**2)), obs=batch)

    steep = energy_of(lambda a, y: jnp.where(y == Y[4], jnp.inf, a * y**2))
    engine = (
        ScoreMatching(steep, SGD, ExactScoreMatching(), batch_size=size)
        if how == "batch_size"
        else ScoreMatching(subsampled, SGD, ExactScoreMatching())
    )
    refused("site 'y': its log density is -inf at 1 of 6", engine.init, KEY, Y)  # the fifth of the rows


def test_density_that_ends_where_noise_reaches_is_refused():
    # Learned .037 for 1: the score has no sign of a boundary that is written into an energy.
    y = jnp.abs(Y)
    refused("that the noise of DenoisingScoreMatching has moved. Scores do not see", ScoreMatching(half, SGD, NOISE).init, KEY, y)

    def latent(y):
        normal_model(y)
        with numpyro.plate("data", len(y)):
            numpyro.factor("limit", jnp.where(y > 0, 0, -jnp.inf))

    refused(
        "site 'limit': its log density is finite at the data, and not", BiSM(latent, normal_guide, SGD, SGD, NOISE).init, KEY, y
    )


def test_density_that_ends_beside_the_data_is_warned_of_without_noise():
    # There it may be right: a density that goes to 0 by itself has no term on its boundary.
    with pytest.warns(UserWarning, match="Scores do not see where a density ends"):
        ScoreMatching(half, SGD, ExactScoreMatching()).init(KEY, jnp.abs(Y))


def test_noise_below_the_rounding_of_the_data_is_refused():
    # v + sigma * noise == v: the loss was half the squared score, which goes to 0.
    model = energy_of(lambda a, y: a * y**2)
    refused("its noise is less than the rounding of the data", ScoreMatching(model, SGD, DenoisingScoreMatching(1e-9)).init, KEY, Y)
    ScoreMatching(model, SGD, DenoisingScoreMatching(1e-6)).init(KEY, Y)


def test_data_outside_a_support_are_refused_by_particles():
    model = site(lambda loc: dist.Normal(loc, 1), observed=lambda x: dist.Exponential(jnp.exp(x)))
    message = (
        "site 'y': 1 of 6 observed events are outside the support of Exponential, Positive(lower_bound=0.0): the first is -0.6"
    )
    refused(message, ParticleMMLE(model, SGD, 2, 0.1).init, KEY, Y)
    ParticleMMLE(mask(model, mask=Y > 0), SGD, 2, 0.1).init(KEY, Y)


def test_values_that_the_user_means_are_left_alone():
    gray = site(lambda loc: dist.Normal(loc, 1), observed=lambda x: dist.Bernoulli(logits=x, validate_args=False))
    refused("outside the support of BernoulliLogits", ParticleMMLE(bits_of(True), SGD, 2, 0.1).init, KEY, jnp.abs(Y) / 4)
    ParticleMMLE(gray, SGD, 2, 0.1).init(KEY, jnp.abs(Y) / 4)


def bits_of(validate):
    return site(lambda loc: dist.Normal(loc, 1), observed=lambda x: dist.Bernoulli(logits=x, validate_args=validate))


def test_particles_say_where_the_density_is_not_finite():
    # "take a smaller learning rate" was what they said.
    def model(y):
        loc = numpyro.param("loc", 1.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.factor("limit", jnp.where(y > 0, -((y - x) ** 2), -jnp.inf))

    engine = ParticleMMLE(model, SGD, 2, 0.1)
    with pytest.raises(
        NonFiniteError, match="step 1: site 'limit': its log density is not finite at 2 of 12 events and particles"
    ) as error:
        engine.run(KEY, 2, Y, progress_bar=False)
    # no step has been made
    assert "the model makes these values impossible, or overflows there. Scale the data" in str(error.value)


def test_a_density_that_a_step_has_lost_is_told_after_the_step():
    # "site 'y': its log density is -inf: the model makes them impossible" is what a diverged fit began with, as one without steps.
    model = energy_of(lambda a, y: jnp.exp(a * y**2))
    engine = ScoreMatching(model, optax.sgd(0.0), DenoisingScoreMatching(0.1))
    state = engine.init(KEY, Y)
    lost = state._replace(params={"a": jnp.array(1e3)}, unconstrained={"a": jnp.array(1e3)}, num_steps=jnp.int32(3))
    seen = r"site 'y': its log density is (-inf|nan) at \d of 6 observed events"
    cause = "the likely cause is too large a learning rate: take a smaller learning rate, or clip"
    with pytest.raises(NonFiniteError, match=rf"^step 1: {cause}.* What was seen: {seen}") as error:
        engine.run(KEY, 2, Y, progress_bar=False, init_state=lost)
    assert str(error.value).count("learning rate") == 2
    with pytest.raises(NonFiniteError, match=rf"^step 1: {seen}.*Where it was finite before: take a smaller learning rate"):
        engine.run(KEY, 2, Y, progress_bar=False, init_state=lost._replace(num_steps=jnp.int32(0)))


@pytest.mark.parametrize("objective", [DenoisingScoreMatching(0.5), ExactScoreMatching()])
def test_a_density_that_a_step_has_lost_beside_the_data_is_told_after_the_step(objective):
    # "Scores do not see where a density ends: transform the data" is what a fit that had overflown there was told, or warned of.
    engine = ScoreMatching(energy_of(lambda a, y: jnp.exp(a * y**2)), optax.sgd(0.0), objective)
    a = 87 / (Y**2).max()
    state = engine.init(KEY, Y)
    lost = state._replace(params={"a": a}, unconstrained={"a": a}, num_steps=jnp.int32(3))
    cause = "the likely cause is too large a learning rate: take a smaller learning rate, or clip"
    with pytest.raises(NonFiniteError, match=rf"^step 1: {cause}.* What was seen: ") as error:
        engine.run(KEY, 2, Y, progress_bar=False, init_state=lost)
    assert "transform" not in str(error.value)


@pytest.mark.parametrize("objective", [DenoisingScoreMatching(0.5), ExactScoreMatching()])
def test_an_energy_without_a_derivative_at_the_start_is_told_and_no_learning_rate(objective):
    # "the likely cause is too large a learning rate" was said before any step, though none would have helped.
    engine = ScoreMatching(energy_of(lambda a, y: a * y**2 + jnp.sqrt(jnp.maximum(y, 0))), optax.sgd(0.0), objective)
    with pytest.raises(NonFiniteError, match=r"^step 1: the objective is not finite .* root at 0.* What was seen: ") as error:
        engine.run(KEY, 2, Y, progress_bar=False)
    assert "learning rate" not in str(error.value)
    lost = engine.init(KEY, Y)._replace(num_steps=jnp.int32(3))
    with pytest.raises(NonFiniteError, match=r"^step 1: the likely cause is too large a learning rate"):
        engine.run(KEY, 2, Y, progress_bar=False, init_state=lost)


@pytest.mark.parametrize("dtype", [float, jnp.uint8])
def test_bytes_are_no_bits(dtype):
    # The losses were inf, and the weights moved by the chains alone.
    v = jnp.array([[0, 255, 3], [1, 0, 1]]).astype(dtype)

    def model(v):
        weights = numpyro.param("weights", jnp.zeros((3, 2)))
        with numpyro.plate("data", len(v)):
            x = numpyro.sample("x", NORMAL)
            numpyro.sample("v", BernoulliRBM(weights, jnp.zeros(3), jnp.zeros(2)), obs=v)
            numpyro.sample("w", dist.Normal(x, 1), obs=v[:, 0].astype(float))

    message = "site 'v': 1 of 2 observed events are outside the support of BernoulliRBM"
    refused(message, ParticleMMLE(model, SGD, 2, 0.1).init, KEY, v)
    svi = SVI(negative_phase(model, num_chains=4), lambda v: None, optax.adam(0.1), Trace_ELBO())
    refused(message, svi.init, KEY, v)


def test_complex_data_are_refused():
    refused("site 'y': its data are complex", ParticleMMLE(normal_model, SGD, 2, 0.1).init, KEY, Y + 1j, kind=TypeError)

    def model(y):
        loc = numpyro.param("loc", 0.5)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", EnergyDistribution(lambda y: (y - loc) ** 2, initial=NORMAL), obs=y)

    energy = EnergyDistribution(jnp.square)
    refused("a value of complex64 is complex, and events are real", energy.log_prob, jnp.array([1j]), kind=TypeError)
    svi = SVI(negative_phase(model, num_chains=4), lambda y: None, optax.adam(0.1), Trace_ELBO())
    refused("complex", svi.run, KEY, 2, Y + 1j, progress_bar=False, kind=TypeError)


# Rows.

COLUMN = (
    "its data are of shape (6, 1), and {} has a batch of (6,) in plate 'data' of 6: every event would be compared with all others"
)
ROWS = {
    "ParticleMMLE": lambda y: ParticleMMLE(normal_model, SGD, 2, 0.1).init(KEY, y),
    "ScoreMatching": lambda y: ScoreMatching(marginal, SGD, NOISE).init(KEY, y),
    "BiSM": lambda y: BiSM(normal_model, normal_guide, SGD, SGD, NOISE).init(KEY, y),
    "BiDVL": lambda y: BiDVL(marginal_energy, normal_guide, normal_model, SGD, SGD, SGD).init(KEY, y),
    "sample_posterior": lambda y: sample_posterior(KEY, normal_model, {"loc": 0.5}, y, num_samples=2),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_column_is_no_row_of_numbers(name):
    # Broadcast to (6, 6), every mean was wrong; NumPyro's SVI warns of a missing plate.
    fn = "EnergyDistribution" if name in ("ScoreMatching", "BiDVL") else "Normal"
    refused(COLUMN.format(fn), ROWS[name], Y[:, None])
    if name != "sample_posterior":  # a tool is given arrays
        refused(COLUMN.format(fn), ROWS[name], pd.DataFrame({"y": np.asarray(Y)}))


@pytest.mark.parametrize("size", [None, 2])
def test_a_plate_of_another_size_than_the_data_is_named_with_both(size):
    """They are no column to reshape."""

    def model(y):
        loc = numpyro.param("loc", 0.5)
        with numpyro.plate("data", 3, subsample_size=size):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(loc, 1)), 1), obs=y)

    wanted = f"plate 'data' is of {size or 3} and the data have 6 rows"
    refused(wanted, ParticleMMLE(model, SGD, 2, 0.1).init, KEY, Y)


WIDTHS = {
    "a vector": (lambda v: dist.Normal(numpyro.param("w", jnp.zeros(2)), 1).to_event(1), "Normal has events of shape (2,)"),
    "an RBM": (
        lambda v: GaussianBernoulliRBM(numpyro.param("w", jnp.zeros((2, 2))), jnp.zeros(2), jnp.zeros(2)),
        "GaussianBernoulliRBM has events of shape (2,)",
    ),
    "one": (
        lambda v: dist.Normal(numpyro.param("w", jnp.zeros(3)), 1).to_event(1),
        "of shape (6, 1), and Normal has events",
    ),
}


@pytest.mark.parametrize(("fn", "message"), WIDTHS.values(), ids=WIDTHS)
def test_events_of_another_width_do_not_speak_of_a_guide(fn, message):
    def model(v):
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", fn(v), obs=v)

    def with_latent(v):
        numpyro.sample("x", NORMAL)
        model(v)

    v = jnp.ones((6, 1 if "(6, 1)" in message else 3))
    refused(message, ScoreMatching(model, SGD, NOISE).init, KEY, v)
    refused(message, ParticleMMLE(with_latent, SGD, 2, 0.1).init, KEY, v)


def test_data_without_a_plate_need_none():
    def model(y):
        x = numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    assert jax.eval_shape(lambda: ParticleMMLE(model, SGD, 2, 0.1).init(KEY, Y)).particles["x"].shape == (2,)
    jax.eval_shape(lambda: ParticleMMLE(model, SGD, 2, 0.1).init(KEY, Y[:, None]))


def test_events_that_no_plate_is_of_are_refused_inside_one():
    # A dimension in front of the plate's, which NumPyro's SVI warns of.
    def model(y):
        with numpyro.plate("data", 6):
            x = numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    refused("site 'y': its data are of shape (4, 6)", ParticleMMLE(model, SGD, 2, 0.1).init, KEY, jnp.ones((4, 6)))


# Models.


def test_model_that_observes_nothing_is_refused():
    # A forgotten obs= makes the data a latent, and params drift.
    def forgotten(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.LogNormal(numpyro.param("loc", 0.5), 1))
            numpyro.sample("y", dist.Normal(x, 1))

    def by_factor(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), 1))
            numpyro.factor("y", -((x - y) ** 2))

    refused("the model observes nothing: its sites ['x', 'y'] are all latent", ParticleMMLE(forgotten, SGD, 2, 0.1).init, KEY, Y)
    jax.eval_shape(lambda: ParticleMMLE(by_factor, SGD, 2, 0.1).init(KEY, Y))


SEEDED = {
    "ParticleMMLE": lambda model, guide: ParticleMMLE(model, SGD, 2, 0.1),
    "under negative_phase": lambda model, guide: ParticleMMLE(negative_phase(model), SGD, 2, 0.1),
    "ScoreMatching": lambda model, guide: ScoreMatching(model, SGD, NOISE),
    "BiSM": lambda model, guide: BiSM(model, guide, SGD, SGD, NOISE),
    "BiDVL": lambda model, guide: BiDVL(marginal, guide, model, SGD, SGD, SGD),
}


@pytest.mark.parametrize("name", SEEDED)
def test_programs_with_a_key_of_their_own_are_refused(name):
    # Particles started alike, and of a subsampled plate half of the rows were never seen.
    what = "generator" if name == "BiDVL" else "model"
    refused(f"the {what} is wrapped in numpyro.handlers.seed", SEEDED[name], seed(normal_model, 0), normal_guide)


def test_guide_with_a_key_of_its_own_is_refused():
    refused("the guide is wrapped in numpyro.handlers.seed", SEEDED["BiSM"], normal_model, seed(normal_guide, 0))
    refused(
        "the model must be a NumPyro program, a function of its arguments, got None", SEEDED["BiSM"], None, None, kind=TypeError
    )


@pytest.mark.parametrize("dynamics", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_dynamics_without_noise_are_refused(dynamics):
    # The cloud came together at one point, where its sd is .7.
    refused("dynamics moves particles without noise", ParticleMMLE, normal_model, SGD, 2, 0.1, dynamics=dynamics)


@pytest.mark.parametrize(
    "dynamics",
    [langevin(0.1), kinetic_langevin(0.1, 1.0), optax.chain(optax.clip(1.0), langevin(0.1))],
    ids=["first", "second", "chain"],
)
def test_dynamics_with_noise_are_not(dynamics):
    assert ParticleMMLE(normal_model, SGD, 2, 0.1, dynamics=dynamics).dynamics is not None


def test_own_values_of_params_are_looked_at():
    def of(**settings):
        def model(y):
            with numpyro.plate("data", len(y)):
                numpyro.sample("y", dist.Normal(0, numpyro.param("scale", **settings)), obs=y)

        return ScoreMatching(model, SGD, NOISE).init

    positive = constraints.positive
    refused("param site 'scale': its own value to start from is NaN", of(init_value=jnp.nan), KEY, Y)
    refused("param site 'scale': its own value to start from, -1.0, is outside", of(init_value=-1.0, constraint=positive), KEY, Y)
    refused("param site 'scale': it has values of int32, which have no gradient", of(init_value=1), KEY, Y, kind=TypeError)


def test_schedules_give_one_positive_number():
    refused(
        "step_size must give one number for a step, got an array of shape (2,)", ParticleMMLE, normal_model, SGD, 2, lambda n: Y[:2]
    )
    with pytest.raises(NonFiniteError, match=r"step_size gives -0.1.* at step 0: it must be positive"):
        ParticleMMLE(normal_model, SGD, 2, lambda n: -0.1 + 0 * n).run(KEY, 2, Y, progress_bar=False)


def test_whole_numbers_to_start_from_are_real():
    engine = ParticleMMLE(normal_model, SGD, 2, 0.1, init_strategy=init_to_value(values={"x": jnp.zeros(6, int)}))
    assert engine.init(KEY, Y).particles["x"].dtype.kind == "f"


# What tools return.

SAMPLED = {
    "NaN everywhere": (lambda x: x * jnp.nan, MALA(0.1, 5), "5 of 5 samples are where the density is 0, NaN or inf"),
    "NaN on part": (lambda x: x - jnp.log(x), MALA(0.1, 5), "Chains that start there do not leave"),
    "infinite on part": (lambda x: jnp.where(x > 0, x**2, jnp.inf), MALA(0.1, 5), "Chains that start there do not leave"),
    "unadjusted": (lambda x: jnp.where(x > 0, x**2, jnp.inf), UnadjustedLangevin(0.1, 5), "unadjusted ones may step there"),
}


@pytest.mark.parametrize(("energy", "sampler", "message"), SAMPLED.values(), ids=SAMPLED)
def test_impossible_samples_are_said(energy, sampler, message):
    # 51 % of the samples had an energy of NaN.
    fn = EnergyDistribution(energy, initial=NORMAL, sampler=sampler)
    refused(message, fn.sample, KEY, (5,), kind=RuntimeError)
    draws = jax.jit(lambda key: fn.sample(key, (5,)))(KEY)
    assert np.isnan(draws).any()
    assert np.isfinite(energy(draws[~np.isnan(draws)])).all()


def test_chains_that_run_away_are_said():
    steep = lambda x: -(x**4).sum(-1)  # noqa: E731
    start, call = jnp.ones((3, 1)), lambda start: annealed_langevin(KEY, steep, start, 10.0, np.ones(9))
    refused("3 of 3 chains are NaN or infinite: step_size=10 is too large", call, start, kind=FloatingPointError)
    assert not np.isfinite(jax.jit(call)(start)).any()  # where nothing can be raised
    assert denoise(lambda x: -(x**2) / 2, jnp.arange(3), 0.5).tolist() == [0, 0.75, 1.5]


def test_refined_visibles_that_run_away_are_said():
    def quartic(y):
        center = numpyro.param("center", 0.5)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", EnergyDistribution(lambda y: (y - center) ** 4), obs=y)

    engine = BiDVL(quartic, normal_guide, normal_model, SGD, SGD, SGD)
    state = engine.init(KEY, Y)
    refused(
        "6 of 6 chains are NaN or infinite", engine.refine, KEY, state, UnadjustedLangevin(50.0, 20), Y, kind=FloatingPointError
    )


def test_block_gibbs_draws_nothing_at_nan():
    rbm, v = GaussianBernoulliRBM(jnp.zeros((2, 2)), jnp.zeros(2), jnp.zeros(2)), jnp.array([[jnp.nan, 0.0], [0.0, 0.0]])
    refused("v: 1 of 2 chains have NaN", block_gibbs, KEY, rbm, v)
    assert np.isnan(jax.jit(lambda v: block_gibbs(KEY, rbm, v))(v)).tolist() == [[True, True], [False, False]]
    refused("num_steps must be an integer of 0 or more, got -1", block_gibbs, KEY, rbm, v, -1)
    refused("layers must be an RBM", block_gibbs, KEY, NORMAL, v, kind=TypeError)


def test_statistic_that_is_lost_is_refused():
    v = Y[:, None]
    refused("the statistic is nan: the kernel's length, 1e-20", ksd_test, KEY, v, -v, kernel=IMQKernel(1e-20))


def test_repeated_rows_are_told_by_a_discrepancy():
    model = energy_of(lambda a, y: a * y**2)
    with pytest.raises(NonFiniteError, match="step 1: half or more of the pairs of rows are equal"):
        ScoreMatching(model, SGD, KernelSteinDiscrepancy()).run(KEY, 2, jnp.ones(6), progress_bar=False)


def test_convergence_of_what_is_no_trace():
    assert np.isnan(convergence({"loc": np.full(40, np.nan)}).mcse["loc"])  # it was 0
    refused("trace has no param site", convergence, {})
    refused("got shapes {'a': ()}", convergence, {"a": 1.0})
    refused("got shapes {'a': (70,), 'b': (50,)}", convergence, {"a": np.zeros(70), "b": np.zeros(50)})


def test_chains_of_a_fit_are_complete():
    # The model's own values took the place of params that were left out, and nothing was drawn without chains.
    model = negative_phase(
        lambda: numpyro.sample("x", EnergyDistribution(lambda x: (x - 1) ** 2 * scale(), initial=NORMAL)), num_chains=4
    )
    refused("params lacks ['scale'], of ['scale']", model.sample_chains, KEY, {}, {}, 2)
    refused("mutable_state lacks ['x/chains']", model.sample_chains, KEY, {"scale": 1.0}, {}, 2)
    refused("mutable_state must map sites to values", model.sample_chains, KEY, {"scale": 1.0}, None, 2, kind=TypeError)
    refused("init_chains must map energy sites to chains, got list", negative_phase, init_chains=[1], kind=TypeError)


def scale():
    return numpyro.param("scale", 1.0)


PARAMS = {
    "a list": ([1.0], TypeError, "params must map names of param sites to values, as {'loc': 0.5}, got [1.0]."),
    "a result": (RunResult({}, None, jnp.zeros(1)), TypeError, "got a RunResult: pass its params."),
    "a string": ({"loc": "a"}, TypeError, "params['loc'] must be an array of numbers"),
    "NaN": ({"loc": jnp.nan}, ValueError, "params['loc']: it is nan."),
}


@pytest.mark.parametrize(("params", "kind", "message"), PARAMS.values(), ids=PARAMS)
def test_params_of_tools_are_refused_before_anything_is_traced(params, kind, message):
    refused(message, sample_posterior, KEY, normal_model, params, Y, num_samples=2, kind=kind)


def test_other_arguments_of_sample_posterior_are_mappings():
    call, params = sample_posterior, {"loc": 1.0}
    refused("start must map latent sites, ['x']", call, KEY, normal_model, params, Y, num_samples=2, start=Y, kind=TypeError)
    refused("mutable_state must map", call, KEY, normal_model, params, Y, num_samples=2, mutable_state=3, kind=TypeError)


def test_marginal_score_of_nan_says_so():
    params = {"loc": 1.0, "slope": 0.5}
    refused("v: 1 of 6 numbers are NaN", marginal_score, normal_model, normal_guide, params, Y.at[0].set(jnp.nan), rng_key=KEY)


SHOWN = {
    "a site called chain": ({"chain": Y}, {}, ValueError, "a name cannot be that of a site and of a dim"),
    "a dim called draw": ({"x": jnp.ones((5, 3))}, {"dims": {"x": ["draw"]}}, ValueError, "or of two dims"),
    "a scalar": ({"x": jnp.ones(())}, {}, ValueError, "samples of shape (), with batch_ndims=1"),
    "no chains": ({"x": Y}, {"batch_ndims": 2}, ValueError, "they must be of shape (num_chains, num_samples)"),
    "keys": ({"x": jax.random.split(KEY, 3)}, {}, TypeError, "site 'x' holds random keys"),
    "other numbers": ({"x": Y, "z": Y[:3]}, {}, ValueError, "site 'z' has 3 elements along 'draw', and another site 6"),
}


@pytest.mark.parametrize(("posterior", "settings", "kind", "message"), SHOWN.values(), ids=SHOWN)
def test_what_cannot_be_shown_is_refused(posterior, settings, kind, message):
    refused(message, to_inference_data, {}, posterior=posterior, kind=kind, **settings)


def test_errors_of_an_energy_keep_its_site():
    def energy(y):
        raise KeyError("k")

    with pytest.raises(KeyError) as error:
        ScoreMatching(energy_of(lambda a, y: energy(y)), SGD, NOISE).init(KEY, Y)
    assert "In the energy of site 'y', on one event of shape () and dtype float32." in error.value.__notes__


def test_settings_of_an_energy_are_of_their_kind():
    fn = EnergyDistribution(jnp.square, initial=NORMAL)
    np.testing.assert_array_equal(fn.log_prob(pd.Series([1.0, 2.0])), [-1, -4])
    refused("a str of dtype <U1, does not hold numbers alone", fn.log_prob, "b", kind=TypeError)
    refused("initial must be a NumPyro distribution", EnergyDistribution, jnp.square, initial=1.0, kind=TypeError)
    refused("initial has the batch shape (3,)", EnergyDistribution, jnp.square, initial=dist.Normal(jnp.zeros(3), 1))
    refused("sample_shape must be a tuple, got 5: (5,)", fn.sample, KEY, 5, kind=TypeError)
    refused("support must be a NumPyro constraint", BaseMeasure, "real", kind=TypeError)
    assert BernoulliRBM([[1.0], [2.0]], [0.0, 0.0], [0.0]).weights.shape == (2, 1)
    with pytest.raises(TypeError) as error:
        amortized_normal(lambda v: (v @ jnp.ones((3, 2)),) * 2, jnp.ones((4, 2)))
    assert "The network was given one visible of shape (2,): it is mapped over the batch." in error.value.__notes__


@pytest.mark.parametrize("sampler", [MALA(num_steps=2), UnadjustedLangevin(0.1, 2)], ids=["MALA", "ULA"])
def test_positions_are_no_state(sampler):
    refused("pass sampler.init(position, target)", sampler.run, KEY, lambda x: -(x**2), Y, kind=TypeError)


def test_score_without_a_key_is_refused():
    critic, v = Partial(lambda a, x: a * x, jnp.ones(2)), jnp.ones((3, 8, 2))
    message = "score must be a function score(v, rng_key=key)"
    refused(message, fisher_divergence, KEY, lambda v: v, v, critic, SGD, 2, batch_size=4, kind=TypeError)


def test_errors_of_params_do_not_speak_of_the_encoder():
    engine = BiDVL(marginal_energy, normal_guide, normal_model, SGD, SGD, SGD)
    with pytest.raises(ValueError, match=r"^init_params\['slope'\] is of shape") as error:
        engine.init(KEY, Y, init_params={"slope": jnp.zeros(6)})
    assert "The encoder was run on a batch of visibles of shape (6,)." in error.value.__notes__


# ---- Rows that are not by themselves, and what a sample is not ------------------------------------------------------------------


def centered(y):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: precision * y**2 / 2), obs=y - y.mean())


def summed(y):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: precision * y**2 / 2), obs=y)
    numpyro.factor("sum", -precision * y.sum() ** 2)


@pytest.mark.parametrize("model", [centered, summed])
@pytest.mark.parametrize("objective", [ExactScoreMatching(), NOISE], ids=["exact", "denoising"])
def test_rows_that_depend_on_each_other_are_refused(model, objective):
    # Catches scores that are taken for those of one row: the precision of centered data went to 0.
    with pytest.raises(ValueError, match="one row of the first argument depends on other rows"):
        ScoreMatching(model, SGD, objective).init(KEY, Y)


def plain(y):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: precision * y**2 / 2), obs=y)


def test_masked_rows_do_not_enter_pairs():
    # Catches rows without a density whose kernels are summed.
    model = mask(plain, mask=jnp.arange(6) < 3)
    with pytest.raises(ValueError, match="site 'y': it is masked, and KernelSteinDiscrepancy compares all rows"):
        ScoreMatching(model, SGD, KernelSteinDiscrepancy()).init(KEY, Y)
    ScoreMatching(model, SGD, NOISE).init(KEY, Y)


def test_masked_arrays_of_numpy_are_refused():
    masked = np.ma.masked_array(np.array([1.0, 2.0, 99.0], np.float32), [0, 0, 1])
    with pytest.raises(TypeError, match="is a masked array of NumPy"):
        ScoreMatching(plain, SGD, NOISE).init(KEY, masked)
    with pytest.raises(TypeError, match="is a masked array of NumPy"):
        EnergyDistribution(lambda x: x**2).log_prob(masked)


def test_samples_that_never_leave_a_boundary_are_said():
    # Catches chains at infinity of the space that they move in, all of which stay where they start.
    fn = EnergyDistribution(lambda x: x, support=constraints.positive, initial=dist.Delta(0.0))
    with pytest.raises(RuntimeError, match=r"3 of 3 samples are .* on the boundary"):
        fn.sample(KEY, (3,))


@pytest.mark.parametrize("name", ["reference", "initial", "base"])
def test_masked_distributions_are_nothing_to_jump_to(name):
    # Catches jumps whose weights lack the density that their samples have: the mean was right and the variance not.
    masked = NORMAL.mask(False)
    if name == "reference":
        with pytest.raises(ValueError, match="reference, a MaskedDistribution, must be a normalized distribution"):
            EnergyDistribution(lambda x: x**2 / 2, reference=masked)
    elif name == "initial":
        assert EnergyDistribution(lambda x: x**2 / 2, initial=masked).chain_log_prob(MALA()).reference is None
    else:
        assert TiltedDistribution(masked, lambda x: x**2 / 2).chain_log_prob(MALA()).reference is None


def test_one_sample_has_no_covariance():
    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    with pytest.raises(ValueError, match="one sample of the latents has no covariance"):
        standard_errors(model, {"loc": Y.mean()}, {"x": Y[None, None]}, Y)


def test_block_gibbs_is_given_states_of_its_units():
    # Catches real units that are cut to whole numbers, and bits that are none.
    real = GaussianBernoulliRBM(jnp.ones((2, 1)), jnp.zeros(2), jnp.zeros(1))
    drawn = block_gibbs(KEY, real, jnp.zeros((3, 2), int))
    assert drawn.dtype == jnp.float32
    assert (drawn != drawn.round()).all()
    bits = BernoulliRBM(jnp.ones((2, 1)), jnp.zeros(2), jnp.zeros(1))
    with pytest.raises(ValueError, match="its values must lie in the support, "):
        block_gibbs(KEY, bits, jnp.full((3, 2), 0.5))


def test_negative_chains_on_a_boundary_are_said():
    # Catches chains at infinity of the space that they move in: the gradient was that of where they start, 1.2 for .2.
    def model(y):
        rate = numpyro.param("rate", 1.0)
        fn = EnergyDistribution(lambda y: rate * y, support=constraints.positive, initial=dist.Delta(0.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", fn, obs=y)

    phase = negative_phase(model, num_chains=4)
    svi = SVI(phase.without_reports(), lambda y: None, SGD, Trace_ELBO())
    state = jax.jit(svi.init)(KEY, jnp.abs(Y))  # where NumPyro does not warn
    assert int(state.mutable_state["y/chains"]["status"]) == 9
    assert jnp.isnan(jax.jit(svi.update)(state, jnp.abs(Y))[1])


def test_steps_that_alternate_have_a_sample_size():
    # Catches an effective number of steps that is negative, and an error that is none: x[t] = -.9 x[t-1] + noise.
    noise = np.random.default_rng(0).normal(size=400)
    x = [0.0]
    for e in noise:
        x.append(-0.9 * x[-1] + e)
    report = convergence({"loc": jnp.asarray(x)})
    assert 200 < report.ess["loc"] <= 201 * np.log10(201)
    assert 0 < report.mcse["loc"] < report.sd["loc"]
    with pytest.raises(ValueError, match="param 'loc': a standard error must be positive, got -1"):
        convergence({"loc": jnp.asarray(x)}, num_particles=10, standard_errors={"loc": -1.0})


def test_annealed_chains_of_a_distribution_stay_in_its_support():
    # Catches chains of which nothing keeps those of a flat base inside: the mean was -5.3 for 1.
    fn = EnergyDistribution(lambda x: x, support=constraints.positive)
    with pytest.raises(FloatingPointError, match="of 50 chains have left the support"):
        annealed_langevin(KEY, fn.log_prob, jnp.ones(50), 0.1, jnp.ones(100))


@pytest.mark.parametrize("engine", ["ScoreMatching", "BiSM", "VaGES"])
def test_scaled_densities_are_refused_by_score_engines(engine):
    # Catches a density that is tempered where its data were to be weighted: the precision was .042 for .211.
    def joint(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    def guide(y):
        shift = numpyro.param("shift", 0.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("x", dist.Normal(y / 2 + shift, 0.7))

    made = {
        "ScoreMatching": lambda: ScoreMatching(handlers.scale(plain, scale=5.0), SGD, NOISE),
        "BiSM": lambda: BiSM(handlers.scale(joint, scale=5.0), guide, SGD, SGD, NOISE),
        "VaGES": lambda: VaGES(handlers.scale(joint, scale=5.0), guide, SGD, SGD, NOISE),
    }[engine]()
    with pytest.raises(ValueError, match=r"site '[xy]': scale multiplies its log density by 5"):
        made.init(KEY, Y)


def test_relaxed_bits_are_nothing_to_jump_to():
    # Catches a log density that is that of the bits, and samples that are relaxed.
    fn = EnergyDistribution(lambda x: x.sum(), (2,), initial=GumbelBernoulli(jnp.zeros(2)).to_event(1))
    assert fn.chain_log_prob(MALA()).reference is None


def test_params_that_are_not_finite_are_said_by_name_before_chains_move():
    phase = negative_phase(plain, num_chains=4)
    with pytest.raises(ValueError, match=r"params\['precision'\]: it is nan"):
        phase.sample_chains(KEY, {"precision": jnp.nan}, {"y/chains": {}}, 2, Y)


def transformed(fn, *transforms):
    return dist.TransformedDistribution(fn, list(transforms))


POSITIVE_ORDERED = dist.ImproperUniform(constraints.positive_ordered_vector, (), (3,))
SWAP, SCALE = PermuteTransform(jnp.array([1, 2, 0])), AffineTransform(0.0, 2.0)
TRANSFORMED = {
    "a scaled Beta": (dist.Uniform(0, 2), transformed(dist.Beta(2.0, 2.0), SCALE)),
    "in a plate": (dist.Uniform(0, 2).expand([3]), transformed(dist.Beta(2.0, 2.0), SCALE).expand([3])),
    "an array of scales": (dist.Uniform(0, VECTOR), transformed(dist.Beta(2.0, 2.0), AffineTransform(0.0, VECTOR))),
    "signs of each": (
        dist.Uniform(jnp.array([-1.0, 0.0]), jnp.array([0.0, 1.0])),
        transformed(dist.Beta(2.0, 2.0), AffineTransform(0.0, jnp.array([-1.0, 1.0]))),
    ),
    "steps": (dist.Uniform(0, 2), transformed(NORMAL, SigmoidTransform(), SCALE)),
    "a composition": (dist.Uniform(0, 2), transformed(NORMAL, ComposeTransform([SigmoidTransform(), SCALE]))),
    "backwards": (dist.Uniform(-1, 1), transformed(dist.Beta(2.0, 2.0), AffineTransform(1.0, -2.0))),
    "half a line": (dist.Pareto(2.0, 1.0), transformed(dist.Exponential(1.0), AffineTransform(2.0, 1.0))),
    "the other half": (
        BaseMeasure(constraints.less_than(1.0), ()),
        transformed(dist.Exponential(1.0), AffineTransform(1.0, -3.0)),
    ),
    "a line": (NORMAL, transformed(dist.StudentT(3.0), AffineTransform(1.0, -3.0))),
    "in another order": (dist.Dirichlet(VECTOR), transformed(dist.Dirichlet(2 * VECTOR), SWAP)),
    "of both": (transformed(dist.Dirichlet(VECTOR), SWAP), dist.Dirichlet(2 * VECTOR)),
    "ordered": (POSITIVE_ORDERED, transformed(dist.Normal(VECTOR, 1), OrderedTransform(), ExpTransform())),
    "with a boundary": (
        dist.ImproperUniform(constraints.positive_semidefinite, (), (2, 2)),
        dist.Wishart(3.0, scale_matrix=jnp.eye(2)),
    ),
    "of a part of a domain": (dist.Pareto(1.0, 1.0), transformed(dist.Exponential(1.0), ExpTransform())),  # not known
}
NOT_COVERED = {
    "a Beta of half a line": (dist.Exponential(1.0), transformed(dist.Beta(2.0, 2.0), SCALE)),
    "a Beta of a line": (NORMAL, transformed(dist.Beta(2.0, 2.0), SCALE)),
    "another scale": (dist.Uniform(0, 2), transformed(dist.Beta(2.0, 2.0), AffineTransform(0.0, 3.0))),
    "another sign": (dist.Exponential(1.0), transformed(dist.Exponential(1.0), AffineTransform(0.0, -1.0))),
    "a Dirichlet in another order": (dist.LogNormal(VECTOR, 1).to_event(1), transformed(dist.Dirichlet(VECTOR), SWAP)),
    "LogNormal that is not ordered": (POSITIVE_ORDERED, dist.LogNormal(VECTOR, 1).to_event(1)),
    "Exponential that is not ordered": (POSITIVE_ORDERED, dist.Exponential(1.0).expand([3]).to_event(1)),
    "Gamma that is not ordered": (POSITIVE_ORDERED, dist.Gamma(2.0, 1.0).expand([3]).to_event(1)),
    "exponents that are not ordered": (POSITIVE_ORDERED, transformed(dist.Normal(VECTOR, 1).to_event(1), ExpTransform())),
}


@pytest.mark.parametrize(("model", "guide"), TRANSFORMED.values(), ids=TRANSFORMED)
def test_support_of_transforms_is_what_they_reach(model, guide):
    # Catches guides that were refused, as NumPyro says that what is shifted lies anywhere on the line.
    assert same_support(model, guide) is True
    assert jax.jit(lambda: jnp.asarray(same_support(model, guide)))()


@pytest.mark.parametrize(("model", "guide"), NOT_COVERED.values(), ids=NOT_COVERED)
def test_support_that_transforms_do_not_reach_is_another(model, guide):
    # Catches a guide over all positive vectors where the model's are ordered: it is six times too wide.
    assert same_support(model, guide) is False


@pytest.mark.filterwarnings("ignore:Out-of-support")
def test_model_of_a_support_that_numpyro_does_not_know_is_told_to_say_it():
    # Catches an AutoNormal over the line, which takes NumPyro's word for a latent that ends at 2.
    model = site(lambda loc: transformed(dist.Beta(2.0, loc), SCALE))
    message = "Interval(lower_bound=0.0, upper_bound=2.0), and the guide from Normal with Real()."
    refused(message, BiSM(model, AutoNormal(model), SGD, SGD, NOISE).init, KEY, Y)
    refused("Give the transform of TransformedDistribution its domain=", PAIRED["BiSM"], model, normal_guide)
    said = site(lambda loc: transformed(dist.Beta(2.0, loc), AffineTransform(0.0, 2.0, domain=constraints.unit_interval)))
    jax.eval_shape(lambda: BiSM(said, AutoNormal(said), SGD, SGD, NOISE).init(KEY, Y))


@pytest.mark.parametrize(
    ("support", "shape"),
    [
        (constraints.real, ()),
        (constraints.positive, ()),
        (constraints.nonnegative, ()),
        (constraints.softplus_positive, ()),
        (constraints.greater_than(1.0), ()),
        (constraints.greater_than_eq(1.0), ()),
        (constraints.less_than(1.0), ()),
        (constraints.less_than_eq(1.0), ()),
        (constraints.unit_interval, ()),
        (constraints.interval(-1.0, 3.0), ()),
        (constraints.open_interval(-1.0, 3.0), ()),
        (constraints.circular, ()),
        (constraints.real_vector, (3,)),
        (constraints.real_matrix, (2, 2)),
        (constraints.independent(constraints.positive, 1), (3,)),
        (constraints.independent(constraints.interval(-1.0, 3.0), 2), (2, 2)),
        (constraints.simplex, (3,)),
        (constraints.l1_ball, (3,)),
        (constraints.zero_sum(1), (3,)),
        (constraints.ordered_vector, (3,)),
        (constraints.positive_ordered_vector, (3,)),
        (constraints.corr_cholesky, (3, 3)),
        (constraints.corr_matrix, (3, 3)),
        (constraints.lower_cholesky, (2, 2)),
        (constraints.softplus_lower_cholesky, (2, 2)),
        (constraints.scaled_unit_lower_cholesky, (2, 2)),
        (constraints.positive_definite, (2, 2)),
        (constraints.positive_semidefinite, (2, 2)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, constraints.Constraint) else "",
)
def test_support_that_transforms_are_made_for_is_theirs(support, shape):
    to_support = biject_to(support)
    width = to_support.inverse_shape(shape)
    guide = transformed(dist.Normal(jnp.zeros(width), 1).to_event(len(width)), to_support)
    assert same_support(dist.ImproperUniform(support, (), shape), guide) is True


@pytest.fixture
def without_validation():
    numpyro.enable_validation(False)
    yield
    numpyro.enable_validation(True)


AT_BOUNDARY = {"Exponential": (dist.Exponential, True), "HalfNormal": (dist.HalfNormal, True), "LogNormal": (dist.LogNormal, False)}
AT_BOUNDARY |= {
    "Gamma": (lambda **kwargs: dist.Gamma(2.0, 1.0, **kwargs), False),
    "an energy": (lambda **kwargs: EnergyDistribution(lambda y: y, support=constraints.positive, **kwargs), True),
    "a vector": (lambda **kwargs: dist.Exponential(jnp.ones(2), **kwargs).to_event(1), True),
}


def waits(fn, first, dtype="float32"):
    value = np.array([first, 1, 3], dtype)
    return {"y": {"name": "y", "fn": fn, "value": np.stack([value, value + 1], -1) if fn.event_dim else value}}


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize(("fn", "is_finite"), AT_BOUNDARY.values(), ids=AT_BOUNDARY)
def test_data_on_a_boundary_are_inside_where_their_density_is_finite(fn, is_finite, dtype, without_validation):
    # Catches waiting times that were rounded to 0, which were refused where NumPyro has a density for them.
    observed = waits(fn(), 0, dtype)
    assert events_inside(observed["y"], np).all()
    assert events_inside(observed["y"]).all()
    assert bool(are_possible(observed)) is is_finite
    if is_finite:
        require_possible(observed)
    else:
        refused("its log density is", require_possible, observed)
    for first in (-1e-3, -1.0):
        refused("1 of 3 observed events are outside the support", require_possible, waits(fn(), first))
        assert not are_possible(waits(fn(), first))


@pytest.mark.filterwarnings("ignore:Out-of-support")  # of the Normal in a LogNormal, which validates
@pytest.mark.parametrize(("fn", "is_finite"), AT_BOUNDARY.values(), ids=AT_BOUNDARY)
def test_data_on_a_boundary_that_is_validated_are_refused_with_a_way_out(fn, is_finite):
    # NumPyro's log density is -inf there, of which no score is right.
    refused("They lie on its boundary, where NumPyro's validation takes the density for 0", require_possible, waits(fn(), 0))
    with pytest.raises(ValueError, match="Convert the data"):
        require_possible(waits(fn(), -1))
    observed = waits(fn(validate_args=False), 0)
    if is_finite:
        require_possible(observed)
    else:
        refused("its log density is", require_possible, observed)


def test_counts_have_no_boundary(without_validation):
    refused("outside the support of Poisson", require_possible, waits(dist.Poisson(1.0), np.nextafter(np.float32(1), 2)))


# Energies whose events are other than meant.


def _energy_of(fn):
    def model(v):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", fn(lambda x: precision * jnp.sum(x**2)), obs=v)

    return model


def _learn(model, v):
    model = negative_phase(model, num_chains=8)
    SVI(model, lambda v: None, SGD, Trace_ELBO()).init(KEY, v)


def _particles(model, v):
    ParticleMMLE.pgd(model, num_particles=2, step_size=0.1).init(KEY, v)


@pytest.mark.parametrize("base", [dist.Normal(0, 1).expand([2]), dist.Normal(jnp.zeros(2), 1)], ids=["expanded", "array"])
@pytest.mark.parametrize("who", [_learn, check_model, _particles], ids=["svi", "check", "particles"])
def test_a_forgotten_to_event_is_named(base, who):
    # Catches JAX's "Incompatible shapes for broadcasting", which names neither the site nor the fix.
    message = (
        "site 'v': TiltedDistribution has batch_shape (2,) and event_shape (), which does not fit plate 'data' of 5 around it. "
        "Dimensions that belong to one event are no batch: give the distribution, or the base of an energy, .to_event(n)"
    )
    refused(message, who, _energy_of(lambda energy: TiltedDistribution(base, energy)), jnp.zeros((5, 2)))


@pytest.mark.parametrize("who", [_learn, check_model], ids=["svi", "check"])
def test_a_network_of_vectors_on_events_that_are_numbers_is_told_their_batch(who):
    def model(v):
        w = numpyro.param("w", jnp.ones(2))
        numpyro.sample("v", TiltedDistribution(dist.Normal(jnp.zeros(2), 1), lambda x: x @ w), obs=v)

    message = (
        r"energy of site 'v' failed on one event of shape \(\).* Its batch_shape is \(2,\): where one event is of shape \(2,\), "
        r"give the base \.to_event\(1\)"
    )
    with pytest.raises(ValueError, match=message):
        who(model, jnp.zeros((5, 2)))


@pytest.mark.parametrize("who", [_learn, check_model, _particles], ids=["svi", "check", "particles"])
def test_rows_are_not_one_event_that_a_plate_repeats(who):
    # Catches data that count once for each row: their gradient was five times the right one.
    base = dist.Normal(jnp.zeros((5, 2)), 1)
    message = (
        "site 'v': TiltedDistribution has events of shape (5, 2), and the data, of shape (5, 2), are one, which plate 'data' of 5 "
        "repeats for each of its rows. What belongs to one row is an event: give the distribution, or the base of an energy, "
        ".to_event(1)"
    )
    refused(message, who, _energy_of(lambda energy: TiltedDistribution(base.to_event(2), energy)), jnp.ones((5, 2)))
    if who is not _particles:  # there is no latent for them
        who(_energy_of(lambda energy: TiltedDistribution(base.to_event(1), energy)), jnp.ones((5, 2)))


@pytest.mark.parametrize("who", [check_model, _particles], ids=["check", "particles"])
def test_data_are_not_compared_with_what_no_plate_is_for(who):
    def model(v, event_dim):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(v)):
            base = dist.Normal(jnp.zeros((5, 2)), 1).to_event(event_dim)
            z = numpyro.sample("z", TiltedDistribution(base, lambda z: precision * jnp.sum(z**2)))
            numpyro.sample("v", dist.Normal(z, 1).to_event(1), obs=v)

    message = (
        "site 'v': Normal has a batch of (5, 5), and the data, of shape (5, 2), lack its first 1 dimensions, for which there is no "
        "plate"
    )
    refused(message, who, lambda v: model(v, 2), jnp.ones((5, 2)))
    who(lambda v: model(v, 1), jnp.ones((5, 2)))


@pytest.mark.parametrize("who", [_learn, check_model], ids=["svi", "check"])
def test_a_table_of_one_column_is_told_by_every_program(who):
    model = _energy_of(lambda energy: TiltedDistribution(dist.Normal(0, 1), energy))
    refused("site 'v': its data are of shape (5, 1), and TiltedDistribution has a batch of (5,)", who, model, jnp.ones((5, 1)))


def test_a_forgotten_event_shape_is_named():
    model = _energy_of(lambda energy: EnergyDistribution(energy, initial=dist.Normal(0, 1)))
    message = "site 'v': data of shape (5, 2) do not fit EnergyDistribution of batch_shape (5,) and event_shape ()"
    refused(message, _learn, model, jnp.zeros((5, 2)))


@pytest.mark.parametrize("dtype", [int, np.uint8, bool])
def test_integers_are_no_events_of_an_energy_of_real_numbers(dtype):
    """Bits under an energy on the reals learned couplings without bound: it is normalized over what lies between them."""
    model = _energy_of(lambda energy: TiltedDistribution(dist.Normal(0, 1), energy))
    refused(
        f"site 'v': its data are {np.dtype(dtype)}, and TiltedDistribution is of real numbers", _learn, model, np.ones(5, dtype)
    )
    _learn(model, np.ones(5, np.float32))


def _start(precision, power=2, fn=EnergyDistribution):
    def model(v):
        a = numpyro.param("a", precision)
        wide = dist.Normal(0, 1).expand([2]).to_event(1)
        energy = fn(lambda x: a * jnp.sum(jnp.abs(x) ** power), (2,), initial=wide)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", energy, obs=v)

    return model


def _tilted(energy, event_shape, initial):
    return TiltedDistribution(initial, energy)


def _network(energy, event_shape, initial):
    return EnergyDistribution(lambda x: jnp.tanh(x).sum() + 0 * energy(x), event_shape, initial=initial)


def _heavy(energy, event_shape, initial):
    return EnergyDistribution(lambda x: 2 * jnp.log1p((x**2).sum()) + 0 * energy(x), event_shape, initial=initial)


def _on_simplex(fn):
    def model(v):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", 5):
            numpyro.sample("v", fn(lambda x: -a * x[0]), obs=jnp.full((5, 3), 1 / 3))

    return model


def _flat_on_simplex(energy):
    return EnergyDistribution(energy, (3,), support=constraints.simplex, initial=dist.Dirichlet(jnp.ones(3)))


STARTS = {
    "negative precision": (_start(-0.5), True),
    "slower than a power of its dimension": (_start(0.5, 0.01), True),
    "a base that loses": (_start(-1.0, fn=_tilted), True),
    "nothing confines": (_start(0.0, fn=_network), True),
    "positive precision": (_start(0.5), False),
    "small precision": (_start(1e-6), False),
    "heavy tails": (_start(0.0, fn=_heavy), False),
    "a simplex": (_on_simplex(lambda energy: TiltedDistribution(dist.Dirichlet(jnp.ones(3)), energy)), False),
    "flat on a simplex": (_on_simplex(_flat_on_simplex), False),
    "a base that wins": (_start(-0.4, fn=_tilted), False),
}


@pytest.mark.parametrize("how", STARTS)
def test_a_density_that_cannot_be_integrated_is_said_when_its_chains_start(how):
    """An unconstrained precision that began at -.5 sent the chains to 34 and was learned as .21 for .50."""
    model, is_improper = STARTS[how]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _learn(model, jnp.ones((5, 2)))
        jax.effects_barrier()
    assert any("site 'v': when its chains started its density did not fall off" in str(w.message) for w in seen) == is_improper


def test_an_engine_says_so_too():
    def model(y):
        a = numpyro.param("a", -1.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: a * z**2))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    engine = ParticleMMLE.pgd(model, num_particles=2, step_size=0.01)
    with pytest.warns(UserWarning, match="site 'z': when its chains started its density did not fall off"):
        engine.run(KEY, 1, jnp.ones(3), progress_bar=False)
