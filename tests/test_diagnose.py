# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is said of the negative chains of a fit: each number where it is out of bounds and where it is not."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from numpyro.optim import Adam

from numpyro_ebm import (
    MALA,
    BaseMeasure,
    BernoulliRBM,
    EnergyDistribution,
    Finding,
    FitReport,
    ParticleMMLE,
    TiltedDistribution,
    UnadjustedLangevin,
    diagnose,
    negative_phase,
)
from numpyro_ebm.evaluate.density import quantile
from numpyro_ebm.evaluate.yardstick import OF_OTHERS

KEY = jax.random.key(0)
DISTANCE = "distance of chains from density"


class Result(NamedTuple):
    params: dict[str, Any]
    state: Any


def begun(phase, *args):
    """What a fit has before its first step, and chains where they were told to start."""
    svi = SVI(phase, lambda *args: None, Adam(0.01), Trace_ELBO())
    state = svi.init(KEY, *args)
    return Result(svi.get_params(state), state)


def _on_one_line(report):
    return " ".join(str(report).split())


def found(report, quantity):
    return {finding.site: finding for finding in report.findings if finding.quantity == quantity}


def wells(x):
    """Two modes at +-2, of equal weight, that no local step crosses between."""
    depth = numpyro.param("depth", 8.0)
    numpyro.sample("x", TiltedDistribution(dist.Normal(0, 2), lambda x: depth * (abs(x) - 2) ** 2), obs=x)


X = jnp.array([2.0, -2.0])


def test_nothing_is_said_of_chains_that_are_well():
    # Catches a report that cries wolf: exact chains of both modes, which jump.
    phase, x = negative_phase(wells, num_chains=300), jnp.array([2.25, 1.75, -2.25, -1.75])  # of its weights, and of its widths
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = diagnose(begun(phase, x), phase, x, rng_key=jax.random.key(1))
    assert report.is_well
    assert report.trouble == ()
    assert found(report, "acceptance of jumps")["x"].value > 0.1
    assert found(report, "effective sample size")["x"].value > 300


@pytest.mark.parametrize("share", [0.5, 1.0], ids=["both modes", "one mode"])
def test_chains_that_do_not_cross_between_modes_are_told(share):
    # Catches a report that believes the chains: R-hat sees chains in both modes; where all are in one, only the density can tell.
    start = jnp.where(jnp.arange(300) < 300 * share, 2.0, -2.0)
    phase = negative_phase(wells, num_chains=300, sampler=MALA(num_jumps=0), init_chains={"x": start})
    with pytest.warns(UserWarning, match="site 'x': (R-hat|distance of chains from density) is .* Hardly a jump is accepted"):
        report = diagnose(begun(phase, X), phase, X)
    told = [finding.quantity for finding in report.trouble]
    assert told == (["R-hat"] if share == 0.5 else [DISTANCE])
    if share == 1.0:
        assert found(report, DISTANCE)["x"].value == pytest.approx(0.45, abs=0.02)  # .55 of the density at their first decile


def test_the_bias_of_short_runs_is_a_distance():
    # Catches R-hat of chains that restart, which is 1 whatever they are. Ten steps of .02 from N(0, 1) to N(3, 1) reach
    # 3 (1 - .98^10) = .55, and two normals of a standard deviation differ by 2 Phi(2.45 / 2) - 1 = .78.
    def model(x):
        tilt = numpyro.param("tilt", 3.0)
        numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -tilt * x), obs=x)

    phase = negative_phase(model, sampler=MALA(0.02, 10, adapt=False, num_jumps=0), persistent=False)
    report = diagnose(begun(phase, X), phase, X, warn=False)
    assert not found(report, "R-hat")
    assert [finding.quantity for finding in report.trouble] == [DISTANCE]
    assert found(report, DISTANCE)["x"].value == pytest.approx(0.78, abs=0.03)


def in_space(scale):
    def model(x):
        tilt = numpyro.param("tilt", jnp.full(8, scale))
        base = dist.Normal(0, 1).expand([8]).to_event(1)
        numpyro.sample("x", TiltedDistribution(base, lambda x: -(tilt * x).sum()), obs=x)

    return model


def test_unadjusted_chains_tell_how_stiff_they_are():
    """Chains of h = .35 have taught a precision of 1.28 for 1 while their deciles were within .05 of the density's."""

    def model(x):
        precision = numpyro.param("precision", 1.0)
        numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: (precision - 1) * x**2 / 2), obs=x)

    x, quantity = jnp.ones(2), "h times the curvature of unadjusted chains"
    for h, is_well in ((0.35, False), (0.05, True)):
        phase = negative_phase(model, num_chains=2000, sampler=UnadjustedLangevin(h, 10))
        finding = found(diagnose(begun(phase, x), phase, x, warn=False), quantity)["x"]
        assert finding.is_well == is_well
        assert finding.value == pytest.approx(h, rel=0.2)


def test_density_of_many_dimensions_is_told_by_weights_where_they_are_worth_it():
    # Catches a verdict of a few samples that carry all the weight, and weights that are not p / b.
    x, start = jnp.full((2, 8), 0.3), {"x": jax.random.normal(KEY, (200, 8)) - 2.0}
    near = negative_phase(in_space(0.3), num_chains=200)
    assert found(diagnose(begun(near, x), near, x), DISTANCE)["x"].value < 0.05
    stuck = negative_phase(in_space(0.3), num_chains=200, sampler=MALA(1e-6, adapt=False, num_jumps=0), init_chains=start)
    report = diagnose(begun(stuck, x), stuck, x, warn=False)
    assert report.trouble[-1].quantity == DISTANCE
    assert report.trouble[-1].value > 0.5
    far = negative_phase(in_space(3.0), num_chains=200)
    result = begun(far, x)
    report = diagnose(result, far, x, warn=False)
    assert np.isnan(found(report, DISTANCE)["x"].value)
    assert "not told" in str(report)


def test_stacks_are_judged_element_by_element():
    # Catches a good element that hides a bad one: chains of the second stand in one mode.
    def model(x):
        depth = numpyro.param("depth", jnp.array([0.5, 8.0]))
        fn = TiltedDistribution(dist.Normal(0, 2), lambda d, x: d * (abs(x) - 2) ** 2, params=depth, batch_shape=(2,))
        numpyro.sample("x", fn, obs=x)

    start = {"x": jnp.full((300, 2), 2.0)}
    phase = negative_phase(model, num_chains=300, sampler=MALA(num_steps=20, num_jumps=0), init_chains=start)
    report = diagnose(begun(phase, X), phase, X, warn=False)
    assert found(report, DISTANCE)["x"].value == pytest.approx(0.45, abs=0.02)


def test_planes_are_judged_by_quadrature():
    # Catches a grid in the wrong place or order: the logs lie on a ring of radius 3, and all chains in one place of it.
    def model(x):
        sharp = numpyro.param("sharp", 2.0)
        base = dist.LogNormal(0, 2).expand([2]).to_event(1)
        numpyro.sample("x", TiltedDistribution(base, lambda x: sharp * ((jnp.log(x) ** 2).sum() ** 0.5 - 3) ** 2), obs=x)

    x = jnp.ones((2, 2))
    phase = negative_phase(model, num_chains=300)
    assert found(diagnose(begun(phase, x), phase, x, warn=False), DISTANCE)["x"].is_well
    start = {"x": jnp.exp(jnp.stack([jnp.full(300, 3.0), jnp.zeros(300)], -1))}
    phase = negative_phase(model, num_chains=300, sampler=MALA(1e-4, adapt=False, num_jumps=0), init_chains=start)
    assert found(diagnose(begun(phase, x), phase, x, warn=False), DISTANCE)["x"].value > 0.5


def test_bits_are_judged_by_their_means():
    def model(v):
        bias = numpyro.param("bias", jnp.array([1.0, -1.0, 0.0]))
        numpyro.sample("v", BernoulliRBM(0.5 * jnp.eye(3), bias, jnp.zeros(3)), obs=v)

    v = jnp.ones((2, 3), int)
    phase = negative_phase(model, num_chains=400)
    report = diagnose(begun(phase, v), phase, v, warn=False)
    assert found(report, DISTANCE)["v"].value < 0.05
    assert found(report, DISTANCE)["v"].is_well


def test_random_fields_have_r_hat_only():
    def model(x):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", 2):
            x = numpyro.sample("x", BaseMeasure(), obs=x)
            numpyro.factor("energy", -precision * x**2 / 2)

    phase = negative_phase(model, num_chains=100)
    report = diagnose(begun(phase, X), phase, X)
    assert [finding.quantity for finding in report.findings] == [
        "R-hat",
        "effective sample size",
        "acceptance of steps",
        "acceptance of jumps",
        DISTANCE,
    ]
    assert [finding.is_told for finding in report.findings] == [True, True, True, False, False]
    assert "no reference to jump from" in _on_one_line(report)


def test_random_fields_with_latents_have_a_report():
    """Catches a run of the model that draws a flat latent, which cannot be drawn."""

    def model(x):
        w = numpyro.param("w", 0.3)
        with numpyro.plate("data", 2):
            h = numpyro.sample("h", BaseMeasure())
            x = numpyro.sample("x", BaseMeasure(), obs=x)
            numpyro.factor("coupling", -(x**2) / 2 - h**2 / 2 + w * h * x)

    engine = ParticleMMLE(negative_phase(model), Adam(0.01), num_particles=2, step_size=0.1)
    result = engine.run(KEY, 2, X, progress_bar=False, report=False)
    assert found(diagnose(result, engine, X, warn=False), "R-hat")["random_field"].is_told


def test_flat_energies_are_judged_around_their_chains():
    def model(x):
        precision = numpyro.param("precision", 1.0)
        numpyro.sample("x", EnergyDistribution(lambda x: precision * x**2 / 2, initial=dist.Normal(0, 1)), obs=x)

    phase, x = negative_phase(model), jnp.array([1.0, -1.0])
    assert diagnose(begun(phase, x), phase, x).is_well


def test_chains_of_a_random_field_that_do_not_mix_are_sent_to_longer_moves():
    """And not to jumps or a reference, which it does not have."""
    phase = negative_phase(lambda v: coupled(v, 1), num_chains=20, sampler=MALA(1e-4, 1, adapt=False))
    v = jnp.linspace(-2, 2, 40).reshape(20, 2)
    report = diagnose(begun(phase, v), phase, v, num_samples=20, warn=False)
    (told,) = [finding for finding in report.trouble if finding.quantity == "R-hat"]
    assert "negative_phase(model, sampler=MALA(num_steps=...))" in told.fix
    assert "reference" not in told.fix
    assert "jump" not in told.fix


NUM_ROWS, BATCH = 40, 10


def lines(y, num_params):
    slopes = numpyro.param("slopes", jnp.zeros(num_params))
    numpyro.param("of another site", jnp.zeros(100))
    with numpyro.plate("groups", NUM_ROWS, subsample_size=BATCH):
        y = numpyro.subsample(y, 0)
        energy = TiltedDistribution(dist.Normal(0, 1), lambda z: slopes.sum() * z)
        numpyro.sample("y", dist.Normal(numpyro.sample("z", energy), 1), obs=y)


def coupled(v, num_params):
    slopes = numpyro.param("slopes", jnp.zeros(num_params))
    with numpyro.plate("rows", len(v)):
        v = numpyro.sample("v", BaseMeasure(constraints.real, (2,)), obs=v)
        numpyro.factor("bell", -(v**2).sum(-1) / 2 + slopes.sum() * v[:, 0])


@pytest.mark.parametrize("num_params", [NUM_ROWS, NUM_ROWS + 1])
@pytest.mark.parametrize("model", [lines, coupled])
def test_an_energy_of_more_parameters_than_rows_may_have_learned_them_by_heart(model, num_params):
    """Catches a count of the rows of a batch, of all elements of an event, and of params that the energy does not have."""
    phase = negative_phase(lambda y: model(y, num_params), num_chains=100)
    y = jnp.zeros((NUM_ROWS, 2) if model is coupled else NUM_ROWS)
    svi = SVI(phase, AutoDelta(phase) if model is lines else lambda y: None, Adam(0.01), Trace_ELBO())
    state = svi.init(KEY, y)
    report = diagnose(Result(svi.get_params(state), state), phase, y, num_samples=4, warn=False)
    told = found(report, OF_OTHERS)
    if num_params == NUM_ROWS:
        assert not told
    else:
        (finding,) = told.values()
        assert finding.is_well
        assert not finding.is_told
        assert f"has {num_params} parameters and has learned from {NUM_ROWS} rows" in _on_one_line(report)


def test_a_report_is_a_table_and_a_finding_a_sentence():
    few = Finding("z", "R-hat", 3.2, None, 1.2, "do this")
    assert not few.is_well
    assert str(few) == "site 'z': R-hat is 3.2 and should be at most 1.2: do this"
    assert Finding("z", "acceptance of steps", float("nan"), 0.15, None, "").is_well
    assert not Finding("z", "acceptance of steps", 0.01, 0.15, None, "").is_well


def test_a_printed_report_is_a_hundred_columns_wide():
    """Catches what is to be done on the line of its number, which made it 300 columns wide, and words that are lost."""
    fix = "take a longer look at " + "this and " * 40 + "that."
    report = FitReport((Finding("latent", "R-hat", 3.2, None, 1.2, fix), Finding("latent", "size", 1.0, None, None, "")))
    header, first, *text, last = str(report).splitlines()
    assert max(map(len, [header, first, *text, last])) <= 100
    assert " ".join(" ".join(text).split()) == fix
    assert {line[:9] for line in text} == {" " * 8 + "t", *(" " * 8 + line[8] for line in text)}  # below the quantity
    assert header.index("quantity") == first.index("R-hat") == last.index("size") == 8
    assert max(map(len, str(FitReport()).splitlines())) <= 100


def test_what_cannot_be_diagnosed_is_refused():
    phase = negative_phase(wells)
    result = begun(phase, X)
    with pytest.raises(TypeError, match=r"must be the negative_phase.* or the engine"):
        diagnose(result, wells, X)
    with pytest.raises(ValueError, match="no negative chains"):
        diagnose(Result({}, None), phase, X)
    with pytest.raises(ValueError, match="num_samples"):
        diagnose(result, phase, X, num_samples=3)


@pytest.mark.parametrize(
    ("base", "energy"),
    [
        (dist.Cauchy(0, 1), lambda a, x: a * jnp.tanh(x)),
        (dist.Normal(0, 10), lambda a, x: a * (x - 1) ** 2 / 2 / 0.01**2),
        (dist.StudentT(1.5, 0, 1).expand([2]).to_event(1), lambda a, x: a * jnp.tanh(x).sum()),
    ],
    ids=["heavy tails", "narrow in a wide base", "heavy tails in a plane"],
)
def test_right_chains_are_well_where_a_grid_of_equal_steps_would_miss_the_density(base, energy):
    # Catches an alarm at exact chains: between the farthest of a Cauchy distribution two thousand even steps miss its middle.
    def model(x):
        a = numpyro.param("a", 1.0)
        numpyro.sample("x", TiltedDistribution(base, lambda x: energy(a, x), initial=start), obs=x)

    start = dist.Normal(1.0, 0.01) if isinstance(base, dist.Normal) else base
    x = jnp.ones((2, *base.event_shape))
    phase = negative_phase(model, num_chains=500, sampler=MALA(num_steps=20, num_jumps=20))
    report = diagnose(begun(phase, x), phase, x, warn=False)
    assert found(report, DISTANCE)["x"].is_well, report


def test_quantiles_are_those_of_jax():
    # Catches an order of integers that is not that of floats: negative numbers, and zeros of both signs.
    at_zero = jnp.array([0.0, -0.0, 1e-40, -1e30])[:, None, None] + jnp.zeros((4, 2, 3))
    x = jnp.concatenate([jax.random.normal(jax.random.key(3), (101, 2, 3)), at_zero])
    q = jnp.linspace(0.0, 1.0, 17)
    np.testing.assert_array_equal(quantile(x, q), jnp.quantile(x, q, axis=0))
    half = x.astype(jnp.bfloat16)
    assert quantile(half, q).dtype == jnp.bfloat16
    np.testing.assert_allclose(quantile(half, q).astype(float), jnp.quantile(half, q, axis=0).astype(float), rtol=0.01)
