# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a run says of its fit unasked: when it does, that it hurts nobody, and each number where it is out of bounds and not."""

import importlib.util
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import found
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import (
    MALA,
    Batches,
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    Finding,
    FitReport,
    GumbelBernoulli,
    Implicit,
    ImportanceWeighted,
    KernelSteinDiscrepancy,
    ParticleMMLE,
    ScoreMatching,
    TiltedDistribution,
    Unrolled,
    VaGES,
    Variational,
    Weighted,
    convergence,
    diagnose,
    enable_reports,
    fit,
    negative_phase,
    reports_enabled,
    sample_posterior,
)
from numpyro_ebm.evaluate import guide_weights
from numpyro_ebm.evaluate.guide_weights import FRACTION, SHAPE, guide_findings, num_guide_samples
from numpyro_ebm.evaluate.mixing import least_sample_size, r_hat, sample_size, worst_r_hat
from numpyro_ebm.evaluate.negative_chains import DISTANCE
from numpyro_ebm.evaluate.param_distance import QUANTITY as OF_PARAMS
from numpyro_ebm.evaluate.predictions import BEYOND, PULL
from numpyro_ebm.evaluate.report import Warned
from numpyro_ebm.evaluate.stationarity import FROM_DATA, FROM_POSTERIOR
from numpyro_ebm.infer import Hinge, LowerLevel
from numpyro_ebm.infer.bism import RESPONSE
from numpyro_ebm.infer.particle_strays import GAIN
from numpyro_ebm.infer.stability import STIFFEST

KEY = jax.random.key(0)
SD = 0.5**0.5  # of the posterior below


# R-hat and the effective sample size, once.


def test_samples_that_alternate_are_worth_no_more_than_n_log_n_whoever_asks():
    # Catches a reader with an estimate of its own, which is negative there.
    x = (-1.0) ** np.arange(400) + 0.1 * np.random.default_rng(0).normal(size=400)
    most = 400 * np.log10(400)
    assert sample_size(x[None]) == pytest.approx(most)
    assert convergence({"x": x}, burn_in=0).ess["x"] == pytest.approx(most)
    assert least_sample_size(x[None]) == 400  # of which errors are told, to be on the safe side


def test_what_stands_still_has_no_r_hat_and_in_two_places_an_infinite_one():
    still = np.zeros((4, 10, 1))
    assert np.isnan(r_hat(still)).all()
    assert (worst_r_hat(still), least_sample_size(still)) == (1.0, 40.0)
    assert worst_r_hat(still + np.arange(4.0)[:, None, None]) == np.inf


# When there is a report.


def tilted(y):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


Y = 0.5 + jnp.sqrt(2.0) * jax.random.normal(KEY, (50,))


@pytest.fixture(scope="module")
def engine():
    return ParticleMMLE(tilted, optax.adam(0.02), num_particles=4, step_size=0.1)


def test_a_run_reports_unless_it_is_told_not_to(engine):
    # Catches a switch that is read once, and one that overrules what a run is told. Tests have it off.
    def has_report(**settings):
        return engine.run(KEY, 200, Y, progress_bar=False, **settings).report is not None

    assert not has_report()
    assert has_report(report=True)
    with reports_enabled():
        assert has_report()
        assert not has_report(report=False)
        with reports_enabled(False):
            assert not has_report()
        assert has_report()
    assert not has_report()
    enable_reports()
    assert has_report()
    enable_reports(False)
    with pytest.raises(ValueError, match="report must be True or False"):
        has_report(report="no")


def test_nothing_is_said_of_a_fit_that_is_well(engine, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = engine.run(KEY, 200, Y, progress_bar=False, report=True)
    assert result.report.is_well
    assert found(result.report, "acceptance of jumps").value > 0.1
    assert found(result.report, DISTANCE).value < 0.1
    assert capsys.readouterr() == ("", "")


def test_a_fit_that_is_not_well_says_so_once_and_where():
    # Catches a report that nobody hears, and a warning that points into the package. Chains are shorter than their energy needs.
    sampler = MALA(0.01, 2, adapt=False, num_jumps=0)
    phase = negative_phase(tilted, num_chains=300, sampler=sampler, persistent=False)
    engine = ParticleMMLE(phase, optax.sgd(0.0), num_particles=4, step_size=0.1)
    with pytest.warns(UserWarning, match=r"site 'z': distance of chains from density is .* at most .* num_steps") as told:
        result = engine.run(KEY, 100, Y, progress_bar=False, report=True, init_params={"tilt": 3.0})
    assert [warning.filename for warning in told] == [__file__]
    assert [finding.quantity for finding in result.report.trouble] == [DISTANCE]
    assert found(result.report, FROM_POSTERIOR).value > 1  # and no second warning: chains that are wrong are its cause


def test_particles_report_how_stiff_they_are_or_how_often_they_are_accepted(engine):
    def normal(y):
        loc = numpyro.param("loc", y.mean())
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(loc, 1)), 1), obs=y)

    quantity = "h times the curvature of the stiffest row"  # every row has a curvature of 2
    stiff = ParticleMMLE(normal, optax.sgd(0.0), num_particles=4, step_size=0.7)
    with pytest.warns(UserWarning, match=rf"site 'z': {quantity} is 1.4 and should be at most 0.5: .*kernel='mala'"):
        result = stiff.run(KEY, 3, Y, progress_bar=False, report=True)
    assert found(result.report, quantity).value == pytest.approx(1.4, rel=1e-3)
    result = engine.run(KEY, 200, Y, progress_bar=False, report=True)
    assert found(result.report, quantity).value == pytest.approx(0.2, rel=1e-3)
    adjusted = ParticleMMLE(normal, optax.sgd(0.0), num_particles=4, kernel="mala")
    report = adjusted.run(KEY, 100, Y, progress_bar=False, report=True).report
    finding = found(report, "acceptance of moves in the row with the least")
    assert [each.quantity for each in report.findings] == [finding.quantity, GAIN, BEYOND, PULL, OF_PARAMS]
    assert 0.4 < finding.value < 0.7


def test_what_a_run_has_warned_of_its_report_does_not_say_again():
    # Catches two warnings of one step that is too large, and a report that then leaves the number out.
    y = jnp.zeros(10)

    def normal(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", 10, subsample_size=5):
            y = numpyro.subsample(y, 0)
            numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(loc, 1)), 1), obs=y)

    stiff = ParticleMMLE(normal, optax.sgd(0.0), num_particles=4, step_size=0.7)
    for run in (partial(stiff.run, KEY, 30, y), partial(fit, stiff, KEY, Batches(y, batch_size=5), num_steps=30)):
        with pytest.warns(UserWarning, match="step_size is h = 0.7") as told:
            result = run(progress_bar=False, report=True)
        assert len(told) == 1
        assert [finding.quantity for finding in result.report.trouble] == [STIFFEST]


def test_a_warning_is_of_one_quantity_and_site():
    findings = [Finding(site, "stiffness", 1.0, None, 0.15, "") for site in "ab"]
    report = FitReport((*findings, Finding("a", "R-hat", 3.0, None, 1.2, "")))

    def said(*before):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            report.warn(before=before)
        return [str(warning.message).split(" is ")[0] for warning in told]

    every = ["site 'a': stiffness", "site 'b': stiffness", "site 'a': R-hat"]
    assert said() == said("a text", Warned("a text", "acceptance")) == every
    assert said(Warned("a text", "stiffness", site="a")) == every[1:]
    assert said(Warned("a text", "stiffness")) == every[2:]
    assert said(Warned("a text", "stiffness", "R-hat", site="a")) == [every[1]]


def test_weights_that_one_sample_has_are_warned_of_once():
    # by the engine in the run, or by its report: the fraction that counts and the tail are of the same cause
    engine = VaGES(joint, Guide(shift=300.0), optax.sgd(0.0), optax.sgd(0.0), DenoisingScoreMatching(0.1))
    too_bad = pytest.warns(UserWarning, match="objective at the rows")
    with too_bad, pytest.warns(UserWarning, match="one sample has all the weight") as told:
        result = engine.run(KEY, 2, Y, progress_bar=False, report=True)
    assert SHAPE in [finding.quantity for finding in result.report.trouble]
    assert found(result.report, FRACTION).value < 0.01
    assert not [warning for warning in told if "site 'h'" in str(warning.message)]


def test_a_report_that_fails_is_said_and_no_error(engine, monkeypatch):
    # Catches a fit of hours that is lost because its report is.
    def fails(*args):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(type(engine), "_findings", fails)
    with pytest.warns(UserWarning, match="its report failed: RuntimeError: no memory is left"):
        result = engine.run(KEY, 2, Y, progress_bar=False, report=True)
    assert not result.report.is_well
    assert "RuntimeError: no memory is left" in str(result.report)
    with pytest.raises(RuntimeError, match="no memory"):
        diagnose(result, engine, Y)


def test_who_stops_a_report_keeps_the_fit(engine, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(engine), "_findings", stopped)
    with pytest.raises(KeyboardInterrupt) as stop:
        engine.run(KEY, 2, Y, progress_bar=False, report=True)
    assert int(stop.value.state.num_steps) == 2


def test_an_engine_without_anything_to_say_has_an_empty_report():
    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(loc, 1), obs=y)

    engine = ScoreMatching(model, optax.adam(0.02), KernelSteinDiscrepancy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is no reason to doubt the fit
        report = engine.run(KEY, 2, Y, progress_bar=False, report=True).report
    assert report == FitReport()
    assert report.trouble == ()
    for what in ("Nothing of this fit was checked", "result.losses", "another key", "validation="):
        assert what in str(report)


def test_a_report_is_well_only_where_something_was_checked():
    # Catches an all() over nothing: "well" of a fit of which nothing is known.
    def finding(value, least=None, most=None):
        return Finding("z", "number", value, least, most, "a reason")

    unchecked = [(), (finding(1.0),), (finding(float("nan")),), (finding(float("nan"), most=1.0), finding(1.0))]
    for findings in unchecked:
        report = FitReport(findings)
        assert not report.is_checked
        assert not report.is_well
        assert report.trouble == ()
        assert "Nothing of this fit was checked" in str(report)
    for right, wrong in ((finding(1.0, most=2.0), finding(1.0, most=0.5)), (finding(1.0, least=0.5), finding(1.0, least=2.0))):
        for extra in unchecked:
            assert FitReport((*extra, right)).is_checked
            assert FitReport((*extra, right)).is_well
            assert "Nothing of" not in str(FitReport((*extra, right)))
            assert FitReport((*extra, wrong, right)).is_checked
            assert not FitReport((*extra, wrong, right)).is_well
    assert not FitReport((finding(1.0, most=2.0),), failure="an error").is_well


def test_diagnose_asks_an_engine_as_its_runs_do(engine):
    result = engine.run(KEY, 100, Y, progress_bar=False, report=True)
    for given in (result, result.state):
        report = diagnose(given, engine, Y)
        assert [(f.site, f.quantity) for f in report.findings] == [(f.site, f.quantity) for f in result.report.findings]
    with pytest.raises(ValueError, match="num_samples is for the chains"):
        diagnose(result, engine, Y, num_samples=10)


@pytest.mark.parametrize(
    ("value", "bound", "value_shown", "bound_shown"),
    [
        (10_004.0, 10_000.0, "10004", "10000"),
        (0.2501, 0.25, "0.2501", "0.25"),
        (3.2, 1.2, "3.2", "1.2"),
        (np.nextafter(0.25, 1.0), 0.25, "0.2500000000000001", "0.25"),
        (0.25, 0.25, "0.25", "0.25"),  # which is in bounds
        (np.inf, 1.2, "inf", "1.2"),
    ],
)
def test_a_number_out_of_bounds_reads_otherwise_than_its_bound(value, bound, value_shown, bound_shown):
    # Catches "is 1e+04 and should be at most 1e+04", in the warning or in the table.
    for finding in (Finding("z", "number", value, None, bound, "fix"), Finding("z", "number", -value, -bound, None, "fix")):
        sign, should = ("", "at most ") if finding.least is None else ("-", "at least -")
        said = f"number is {sign}{value_shown} and should be {should}{bound_shown}: fix"
        assert str(finding) == f"site 'z': {said}"
        cells = str(FitReport((finding,))).splitlines()[1].split("  ")
        assert [cell.strip() for cell in cells if cell] == ["z", "number", f"{sign}{value_shown}", f"{should}{bound_shown}"]


def test_a_report_is_no_array():
    # Catches words among the leaves of a result, which JAX could not wait for, copy or save.
    report = FitReport((Finding("z", "R-hat", 3.2, None, 1.2, "do this"),))
    assert jax.tree.leaves(report) == []
    assert not report.is_well
    assert str(report).splitlines()[2].strip() == "do this"


# Guides.


class Guide(NamedTuple):
    """Of a normal posterior: how much wider its variance is, and how far its mean is off, in standard deviations."""

    width: float = 1.0
    shift: float = 0.0

    def __call__(self, v):
        numpyro.param("unused", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(v / 2 + self.shift * SD, SD * self.width**0.5))


def joint(v):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(loc, 1))
        numpyro.sample("v", dist.Normal(h, 1), obs=v)


def weighed(guide, make, model=joint, v=Y):
    engine = make(model, guide, optax.sgd(0.0), optax.sgd(0.0), DenoisingScoreMatching(0.1))
    return diagnose(engine.init(KEY, v), engine, v, warn=False)


def bism(*args):
    return BiSM(*args, hypergradient=Implicit())


def variational(*args):
    return VaGES(*args, estimate=Variational())


def weighted(*args):
    return VaGES(*args, estimate=ImportanceWeighted(10))


@pytest.mark.parametrize("make", [bism, variational, weighted])
def test_a_guide_that_is_the_posterior_is_well_and_one_that_is_too_narrow_is_not(make):
    # Catches weights q / p, and an engine that looks at its guide only where it uses weights. For variances in a ratio of s the
    # exact k is 1 - s, here .9 (found by 200 samples of each of 50 rows, of which the tenth that are worst are told).
    well = weighed(Guide(), make)
    assert well.is_well
    assert found(well, FRACTION).value > 0.99
    assert found(well, SHAPE).value < 0
    narrow = weighed(Guide(width=0.1), make)
    # Few of its samples count either, by the same cause: that is a number of the report, and no second warning.
    assert [finding.quantity for finding in narrow.trouble if finding.site == "h"] == [SHAPE]
    assert found(narrow, FRACTION).value < 0.05
    assert "guide nearer to the posterior" in narrow.trouble[-1].fix


def shifted(v):
    shift = numpyro.param("shift", 0.0)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(v / 2 + shift, SD))


@pytest.mark.parametrize("num_steps", [0, 5, 40])
def test_a_gradient_without_the_response_of_its_guide_is_told(num_steps):
    # The lower level is quadratic, of curvature 2: n steps of .05 leave .9^n of the way, and so much of the response is missing.
    settings = {"num_inner_steps": 0, "hypergradient": Unrolled(num_steps)}
    engine = BiSM(joint, shifted, optax.sgd(0.0), optax.sgd(0.05), DenoisingScoreMatching(0.5), **settings)
    report = diagnose(engine.init(KEY, Y), engine, Y, warn=False)
    told = found(report, RESPONSE)
    assert told.value == pytest.approx(0.9**num_steps, abs=2e-3)  # the curvature is damped by 1e-3
    assert told.is_well == (num_steps == 40)
    assert "hypergradient=Implicit()" in told.fix


def test_a_response_that_is_lost_in_noise_is_not_told():
    engine = BiSM(joint, shifted, optax.sgd(0.0), optax.sgd(0.05), DenoisingScoreMatching(0.01), hypergradient=Unrolled(1))
    told = found(diagnose(engine.init(KEY, Y), engine, Y, warn=False), RESPONSE)
    assert not told.is_told
    assert "standard error" in told.fix


def test_the_fraction_that_counts_is_that_of_the_chi_squared_divergence():
    # Catches a fraction of all rows together. 1 / (1 + chi^2) is exp(-d^2) for normals at a distance d.
    report = weighed(Guide(shift=0.5), weighted)
    assert found(report, FRACTION).value == pytest.approx(np.exp(-0.25), abs=0.05)
    assert report.is_well


def test_a_guide_of_which_a_tenth_counts_is_told_however_light_its_tail():
    # Catches a BiSM that looks at the tail alone: exp(-2.56) of the samples of a guide that is off by 1.6 count.
    far = weighed(Guide(shift=1.6), bism)
    assert FRACTION in [finding.quantity for finding in far.trouble]
    assert weighed(Guide(shift=1.0), bism).is_well


def test_samples_without_weights_must_be_nearer_than_those_with():
    # A guide that is off by a standard deviation moves every mean that Variational takes, and weights set it right.
    assert [finding.quantity for finding in weighed(Guide(shift=1.0), variational).trouble] == [FRACTION]
    assert weighed(Guide(shift=1.0), weighted).is_well
    assert "biased" in weighed(Guide(shift=1.0), variational).trouble[0].fix


@pytest.mark.parametrize("logit", [None, 6.0], ids=["posterior", "other bits"])
def test_guides_of_bits_are_weighed_as_bits(logit):
    # Catches a tail of few values that is taken for a heavy one, and a wrong guide that nothing else tells.
    def model(v):
        scale = numpyro.param("scale", 1.0)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Bernoulli(logits=jnp.zeros(3)).to_event(1))
            numpyro.sample("v", dist.Normal(h.sum(-1), 4 * scale), obs=v)

    def guide(v):
        numpyro.param("unused", 0.0)
        logits = jnp.broadcast_to(v[:, None] / 16 - 0.1 if logit is None else logit, (len(v), 3))
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", GumbelBernoulli(logits).to_event(1))

    report = weighed(guide, bism, model, 1.5 + 16.75**0.5 * (Y - Y.mean()) / Y.std())  # the moments of the model
    assert [finding.quantity for finding in report.trouble] == ([] if logit is None else [FRACTION])
    assert found(report, FRACTION).is_told
    assert not found(report, SHAPE).is_told
    assert "few values" in found(report, SHAPE).fix


def test_one_jump_of_weights_is_no_tail_however_small_it_is():
    # Catches a k of more than 3 where 995 weights are 1 and 5 are 1.5, of a guide that could hardly be better.
    jumps = jnp.where(jnp.arange(1000) < 5, jnp.log(1.5), 0.0)[:, None]
    fraction, shape = guide_findings("h", jumps, "fix")
    assert fraction.is_well
    assert fraction.value > 0.99
    assert not shape.is_told
    assert not guide_findings("h", 10 * jumps, "fix")[0].is_well  # 5 weights of 58


def test_the_tail_of_a_good_continuous_guide_is_told():
    # Catches values that are told apart by a fixed distance: weights that differ by thousandths have a tail all the same.
    fraction, shape = guide_findings("h", 3e-3 * jax.random.normal(KEY, (1000, 5)), "fix")
    assert shape.is_told
    assert shape.is_well
    assert fraction.is_well


def test_the_fraction_that_counts_of_bits_is_that_of_bits():
    # Catches weights of relaxed bits, which vary less. Three bits of probability q for one half have (.25 / q + .25 / (1 - q))^-3.
    def model(v):
        scale = numpyro.param("scale", 1e3)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Bernoulli(logits=jnp.zeros(3)).to_event(1))
            numpyro.sample("v", dist.Normal(h.sum(-1), scale), obs=v)

    def guide(v):
        numpyro.param("unused", 0.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", GumbelBernoulli(jnp.ones((len(v), 3)), temperature=1.0).to_event(1))

    q = jax.nn.sigmoid(1.0)
    exact = float((0.25 / q + 0.25 / (1 - q)) ** -3)
    assert found(weighed(guide, bism, model), FRACTION).value == pytest.approx(exact, abs=0.05)


def test_weights_that_underflow_or_are_no_numbers_are_told():
    # Catches the warning of NumPyro's estimate, and a k of nothing.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heavy = guide_findings("h", 1e5 * jax.random.normal(KEY, (200, 3)), "fix")
        none = guide_findings("h", jnp.full((200, 3), -jnp.inf), "fix")
        equal = guide_findings("h", jnp.zeros((200, 3)), "fix")
    assert not heavy[1].is_well
    assert [finding.is_told for finding in none] == [False, False]
    assert all(finding.is_well and finding.is_told for finding in equal)


def test_samples_of_a_guide_are_bounded(monkeypatch):
    assert [num_guide_samples(rows) for rows in (1, 200, 10**6)] == [1000, 655, 200]
    assert [num_guide_samples(rows, 784) for rows in (1, 100, 200, 10**6)] == [1000, 427, 213, 200]
    monkeypatch.setattr(guide_weights, "pareto_k", lambda log_weights: 1.0 if np.ptp(log_weights) > 1 else 0.0)
    bad = jnp.where(jnp.arange(1000) % 5 == 0, 1.0, 0.0)  # a fifth of the rows are bad, of which a tenth is enough
    assert guide_findings("h", bad * jax.random.normal(KEY, (200, 1000)), "fix")[1].value == 1.0


# Generators.


def agreeing(shift=0.0, num_rows=100, **settings):
    """The report of an energy N(shift, 1) on a generator whose visibles are N(0, 1), and its exact encoder."""
    subsampled = {"subsample_size": 20} if settings.pop("subsample", False) else {}

    def energy(v):
        loc = numpyro.param("loc", shift)
        with numpyro.plate("data", num_rows, **subsampled):
            rows = numpyro.subsample(v, event_dim=0)
            numpyro.sample("v", EnergyDistribution(lambda v: (v - loc) ** 2 / 2), obs=rows)

    def generator(v):
        gain = numpyro.param("gain", 0.8)
        with numpyro.plate("data", num_rows, **subsampled):
            h = numpyro.sample("h", dist.Normal(0, 1))
            numpyro.sample("v", dist.Normal(gain * h, 0.6), obs=numpyro.subsample(v, event_dim=0))

    def encoder(v):
        inverse = numpyro.param("inverse", 0.8)
        with numpyro.plate("data", num_rows, **subsampled):
            numpyro.sample("h", dist.Normal(inverse * numpyro.subsample(v, event_dim=0), 0.6))

    v = jax.random.normal(KEY, (num_rows,))
    engine = BiDVL(energy, encoder, generator, *[optax.sgd(0.0)] * 3, **settings)
    return diagnose(engine.init(KEY, v), engine, v, warn=False)


GENERATED = FRACTION.replace("guide", "generator")


@pytest.mark.parametrize("subsample", [False, True])
def test_a_generator_with_the_distribution_of_the_energy_is_well(subsample):
    # Catches an energy of the wrong sign, a prior or an encoder left out of the weights, and the scale of a subsampled plate.
    report = agreeing(subsample=subsample)
    assert report.is_well
    assert found(report, GENERATED).value > 0.999
    assert found(report, GENERATED).site == "v"


def test_the_fraction_of_a_generator_is_that_of_the_chi_squared_divergence():
    assert found(agreeing(shift=0.5), GENERATED).value == pytest.approx(np.exp(-0.25), abs=0.05)
    far = agreeing(shift=1.5)
    assert GENERATED in [finding.quantity for finding in far.trouble]
    assert "not the likelihood's" in far.trouble[0].fix


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"upper": Hinge()}, "Hinge"),
        ({"noise": False}, "noise=False"),
        ({"lower": LowerLevel("offset")}, "latent='exact'"),
        ({"lower": LowerLevel(latent_weight=0.5)}, "latent_weight=1"),
    ],
)
def test_a_generator_is_not_told_where_minus_the_energy_is_no_log_density(settings, why):
    # Catches a report that is empty, and so well.
    (finding,) = agreeing(**settings).findings
    assert not finding.is_told
    assert why in finding.fix


# Chains with weights.


def test_weighted_chains_need_not_mix():
    # Catches R-hat as an alarm where it is none, and monitors counted as chains that teach.
    def model(x):
        tilt = numpyro.param("tilt", 0.0)
        numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -tilt * x), obs=x)

    still = MALA(0.001, 1, adapt=False, num_jumps=0)
    phase = negative_phase(model, num_chains=400, sampler=still, weights=Weighted(num_monitor_chains=300))
    result = SVI(phase, lambda x: None, optax.sgd(1e-4), Trace_ELBO()).run(KEY, 20, Y, progress_bar=False)
    report = diagnose(result, phase, Y, warn=False)  # of 20 small steps, which have not arrived
    assert [finding.quantity for finding in report.trouble] == [FROM_DATA]
    assert found(report, "R-hat").value > 1.2
    assert found(report, "distance of chains from monitors").is_well
    assert found(report, "fraction that weights keep in a step").value > 0.8


def test_weights_that_collapse_are_told():
    # An energy that leaps by a tilt of 2 at each step leaves e^-4 of the chains, which cannot move.
    def model(x, tilt):
        numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -tilt * x), obs=x)

    still = MALA(0.001, 1, adapt=False, num_jumps=0)
    phase = negative_phase(model, num_chains=400, sampler=still, weights=Weighted(num_monitor_chains=300))
    state = numpyro.handlers.trace(numpyro.handlers.seed(phase, KEY)).get_trace(Y, 0.0)["x/chains"]["value"]
    for tilt in (2.0, 4.0, 6.0):
        given = numpyro.handlers.substitute(numpyro.handlers.seed(phase, KEY), {"x/chains": state})
        state = numpyro.handlers.trace(given).get_trace(Y, tilt)["x/chains"]["value"]
    report = diagnose({"x/chains": state}, phase, Y, 6.0, warn=False)
    assert not found(report, "fraction that weights keep in a step").is_well


def test_monitors_that_stand_elsewhere_are_told():
    def model(x):
        tilt = numpyro.param("tilt", 0.0)
        numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -tilt * x), obs=x)

    still = MALA(0.001, 1, adapt=False, num_jumps=0)
    start = {"x": jnp.where(jnp.arange(500) < 300, 0.0, 1.0) + jax.random.normal(KEY, (500,))}
    phase = negative_phase(model, num_chains=300, sampler=still, weights=Weighted(num_monitor_chains=200), init_chains=start)
    svi = SVI(phase, lambda x: None, optax.sgd(0.0), Trace_ELBO())
    report = diagnose(svi.run(KEY, 2, Y, progress_bar=False), phase, Y, warn=False)
    finding = found(report, "distance of chains from monitors")
    assert finding.value == pytest.approx(0.38, abs=0.1)  # 2 Phi(.5) - 1
    assert not finding.is_well


def test_chains_that_do_not_mix_are_told_of_posteriors_too():
    # The third who asks for R-hat.
    def model():
        numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.array([-9.0, 9.0]), 0.5)))

    with pytest.warns(UserWarning, match="R-hat is"):
        sample_posterior(KEY, model, {}, num_samples=100, num_warmup=5)


# How often it is right.


@pytest.fixture(scope="module")
def table():
    path = Path(__file__).parents[1] / "benchmarks" / "report_table.py"
    if not path.exists():
        pytest.skip("the package is installed without its benchmarks")
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("report_table", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))  # which workers share
def test_wrong_fits_are_told_and_right_ones_are_not(table, part):
    """From 10 keys each, of 100 in the table of the documentation."""
    counts = {name: table.told(name, 10)[0] for name in list(table.PROBLEMS)[part::8]}
    assert {name: count for name, count in counts.items() if count < 9} == {}
