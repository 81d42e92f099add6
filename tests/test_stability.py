# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Unadjusted particles: where they start, when their step is told to be too large, and what is said where they diverge."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import init_to_sample, init_to_value

from numpyro_ebm import NonFiniteError, ParticleMMLE
from numpyro_ebm.infer import stability
from numpyro_ebm.infer.stability import Look, Start, Stiffest, fix_of, stiffness_finding, warnings_of

KEY = jax.random.key(5)
STILL = optax.sgd(1e-30)  # parameters that stay where they are
ROWS = 40
SD = jnp.where(jnp.arange(ROWS) == 7, 0.1, 1.0)  # curvatures of 2, and of 101 in row 7
Y = jax.random.normal(jax.random.key(1), (ROWS,))


def _rows(y, batch_size=None, sd=SD):
    loc = numpyro.param("loc", 0.5)
    with numpyro.plate("data", ROWS, subsample_size=batch_size) as index:
        x = numpyro.sample("x", dist.Normal(loc, jnp.array([1.0, 1.0])).to_event(1))
        numpyro.sample("y", dist.Normal(x[:, 0], sd[index]), obs=y[index])


def _hierarchical(y):
    """Eight groups, whose spread is a latent: its score has no bound near 0."""
    mu = numpyro.param("mu", 0.0)
    spread = numpyro.sample("spread", dist.HalfNormal(1))
    with numpyro.plate("groups", 8):
        effect = numpyro.sample("effect", dist.Normal(mu, spread))
        with numpyro.plate("repeats", 5, dim=-2):
            numpyro.sample("y", dist.Normal(effect, 0.2), obs=y)


GROUPS = 0.3 * jax.random.normal(jax.random.key(3), (8,)) + 0.2 * jax.random.normal(jax.random.key(4), (5, 8))


def _told(engine, num_steps, *args, **kwargs):
    """What a run warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        engine.run(KEY, num_steps, *args, progress_bar=False, **kwargs)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("batch_size", [None, 20])
def test_the_stiffest_row_is_told_from_the_first_steps(batch_size):
    """At hc = 1.1, where the mean over rows is .05; guards against a mean, and against waiting with minibatches."""
    engine = ParticleMMLE(_rows, STILL, 5, 1.1 / 101)
    (message,) = set(_told(engine, 900, Y, batch_size=batch_size))
    assert message.startswith("site 'x': step_size is h = 0.0108911, and h times the curvature is about 1.10 for row 7 of plate ")
    assert "kernel='mala'" in message


@pytest.mark.parametrize("batch_size", [None, 20])
def test_nothing_is_told_where_all_rows_are_well(batch_size):
    assert not _told(ParticleMMLE(_rows, STILL, 5, 0.9 / 101), 300, Y, batch_size=batch_size)


def test_particles_on_their_way_are_not_stiff():
    """From 1000 standard deviations away, with a scale that all of a cloud shares on the way."""
    far = init_to_value(values={"x": jnp.full((ROWS, 2), 1e3)})
    assert not _told(ParticleMMLE(_rows, STILL, 5, 0.5 / 101, init_strategy=far), 300, Y)


def test_stiffness_is_that_of_the_stiffest_row():
    engine = ParticleMMLE(_rows, STILL, 5, 0.01)
    state = engine.init(KEY, Y)
    assert engine.stiffness(state, Y) == pytest.approx(1.01, rel=1e-3)
    assert engine.stability_limit(state, Y) == pytest.approx(2 / 101, rel=1e-3)


def test_stiffness_counts_the_step_of_each_site():
    """The site that is four times as stiff has a quarter of the step."""

    def model():
        numpyro.param("loc", 0.0)
        for name, sd in (("a", 1.0), ("b", 0.5)):
            numpyro.sample(name, dist.Normal(0, sd))
        numpyro.sample("y", dist.Normal(0, 1), obs=0.0)

    for b, stiff, site in ((0.1, 0.4, "b"), (0.025, 0.1, None), (0.3, 1.2, "b")):
        engine = ParticleMMLE(model, STILL, 5, {"a": 0.1, "b": b})
        state = engine.init(KEY)
        assert engine.stiffness(state) == pytest.approx(stiff, rel=1e-3)
        assert [message.split(":")[0] for message in _told(engine, 40)] == ([f"site '{site}'"] if stiff > 1 else [])


def test_clouds_that_lag_behind_the_parameters_are_told():
    """Every row moves once in 20 steps, and the parameters go round in a circle; with num_moves the clouds follow them."""

    def model(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", ROWS, subsample_size=2) as index:
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 3.0), obs=y[index])

    drifting = optax.stateless(lambda gradient, params: jax.tree.map(lambda g: 0.05 + 0 * g, gradient))
    messages = _told(ParticleMMLE(model, drifting, 10, 0.05), 1000, Y, chunk_size=1000)
    assert any(message.startswith("the particles of a row move num_moves = 1 times in 20 steps, and stand") for message in messages)
    assert any("take num_moves = 10 or more" in message for message in messages)
    assert not _told(ParticleMMLE(model, STILL, 10, 0.05), 1000, Y, chunk_size=1000)  # which have arrived by then


# Where particles start.


def test_particles_start_where_they_are_stable():
    """Of 40 starts from the prior of a half-normal scale about half diverge at once; guards against that start."""

    def num_failed(**settings):
        engine = ParticleMMLE(_hierarchical, optax.adam(1e-2), 20, 5e-3, **settings)

        def losses(key):
            return jax.lax.scan(lambda state, _: engine.update(state, GROUPS), engine.init(key, GROUPS), None, length=60)[1]

        return int(jnp.isnan(jax.vmap(losses)(jax.random.split(KEY, 40))).any(1).sum())

    assert num_failed() == 0
    assert num_failed(init_strategy=init_to_sample) > 10


def test_particles_that_are_stable_start_as_samples_of_the_prior():
    engine = ParticleMMLE(_rows, STILL, 5, 0.5 / 101)
    as_told = ParticleMMLE(_rows, STILL, 5, 0.5 / 101, init_strategy=init_to_sample)
    np.testing.assert_array_equal(engine.init(KEY, Y).particles["x"], as_told.init(KEY, Y).particles["x"])


def _told_at(ratio):
    """The warnings of a run at this h times the curvature, and whether its report is content."""
    look = Look(Stiffest(ratio, {"x": 1.0}, {}), ratio, 0.0, 1.0)
    return warnings_of(look, {"x": 0.1}, 100, 1), stiffness_finding(look).is_well


def test_a_run_warns_later_than_its_report_and_names_the_bounds_of_both(monkeypatch):
    """Who took a step at .9 to silence a run was told at its end that .5 is meant."""
    assert _told_at(0.4) == ([], True)
    assert _told_at(0.6) == ([], False)
    (message,), is_well = _told_at(1.0)
    assert not is_well
    assert "from 1 on" in message
    assert "wants 0.5 at most" in message
    monkeypatch.setattr(stability, "STIFF_IN_RUN", 0.8)
    monkeypatch.setattr(stability, "STIFF_AT_END", 0.3)
    (message,), _ = _told_at(0.9)
    assert "from 0.8 on" in message
    assert "wants 0.3 at most" in message
    assert _told_at(0.4) == ([], False)


# What is said where particles diverge.


def test_a_step_that_is_too_large_where_particles_start_is_said():
    """Counts in log space: a first step of .3 takes particles to where there is no curvature, or all overflows."""

    def counts(y):
        rate = numpyro.param("rate", 1.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Gamma(1.5, rate))
            numpyro.sample("y", dist.Poisson(x), obs=y)

    y = jax.random.poisson(KEY, jnp.where(jnp.arange(100) < 95, 1.5, 30.0))
    with pytest.raises(NonFiniteError) as error:
        _told(ParticleMMLE(counts, optax.adam(0.02), 20, 0.3), 300, y)
    assert "The step_size h = 0.3 is above the stability limit" in str(error.value)
    assert "inf" not in str(error.value).replace("finite", "")


def _start(ratio, local=np.nan, low=-1.0, high=1.0):
    return Start(Stiffest(ratio, {"x": 0.9, "y": 0.1}, {}), local, {"x": low, "y": 0.0}, {"x": high, "y": 0.0})


def test_the_limit_where_particles_start_is_said_where_there_is_none_to_tell():
    assert "h = 0.1 is above the stability limit of about 0.05 where particles start" in fix_of({"x": 0.1}, np.nan, _start(4.0))
    assert "above the stability limit by far where particles start" in fix_of({"x": 0.1}, np.nan, _start(np.inf))
    assert "h = 0.1 at 'x', 0.2 at 'y' is above the stability limit by a factor of 2 where they were" in fix_of(
        {"x": 0.1, "y": 0.2}, 4.0, _start(1.0)
    )


def test_a_limit_that_is_none_to_take_is_no_advice():
    """Where particles have diverged to, or start hopelessly: 4e-38 was the step to take half of."""
    assert "4e-38" not in (said := fix_of({"x": 0.1}, 5e36, _start(1.0)))
    assert "Particles are stable where they start at fixed parameters (h = 0.1)" in said
    start = "site 'x' starts at values from -3 to 1e+06, where the curvature of its negative log posterior is about "
    for steep in (_start(1e11, low=-3.0, high=1e6), _start(np.inf, 1e11, -3.0, 1e6)):
        assert f"{start}1e+12. A step" in (said := fix_of({"x": 0.1}, 5e36, steep))
        assert "init_strategy" in said
        assert "fifth" not in said
    assert "values of 2, where its first move is not finite." in fix_of({"x": 0.1}, np.nan, _start(np.inf, -1e7, 2.0, 2.0))
    assert f"all but flat for such a step where they start: {start}1e-29" in fix_of({"x": 0.1}, 1e-30, _start(1e-30, 0, -3.0, 1e6))
    assert "2e+29" not in fix_of({"x": 0.1}, 1e-30, _start(1e-30))


def test_a_hopeless_start_is_told_with_its_values_and_not_with_a_step():
    """Data in a unit of 1e-6 of the latent's: the limit was "about 2e-12 there: take half of that"."""

    def in_another_unit(y):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", 4):
            x = numpyro.sample("x", dist.LogNormal(loc, 1))
            numpyro.sample("y", dist.Normal(1e6 * x, 1), obs=y)

    there = init_to_value(values={"x": jnp.full(4, 2.0)})
    with pytest.raises(NonFiniteError, match="by far where particles start: site 'x' starts at values of 2, where the") as error:
        _told(ParticleMMLE(in_another_unit, STILL, 2, 0.1, init_strategy=there), 50, 1e6 * jnp.ones(4))
    assert "Start nearer to the posterior, by init_strategy" in str(error.value)
    assert "kernel='mala' is stable there too" in str(error.value)


def test_no_limit_that_is_not_known_is_printed():
    ratios = [np.nan, np.inf, -1.0, 0.0, 0.5, 4.0]
    for steps, there, at_start in itertools.product([{"x": 0.1}, {"x": 0.1, "y": 0.2}], ratios, ratios):
        said = fix_of(steps, there, _start(at_start)).replace("finite", "")
        assert "inf" not in said
        assert "nan" not in said
        assert "h = 0.1" in said
