# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Latents and the uncertainty of parameters after a fit, against closed forms and quadrature."""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import hierarchical
from numpyro.contrib.module import random_eqx_module
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.distributions import constraints
from numpyro.handlers import substitute
from numpyro.infer import Predictive, init_to_sample
from numpyro.infer.util import log_density

from numpyro_ebm import (
    MALA,
    BaseMeasure,
    NormalizerError,
    ParticleMMLE,
    TiltedDistribution,
    UnadjustedLangevin,
    convergence,
    find_map,
    negative_phase,
    sample_posterior,
    standard_errors,
)
from numpyro_ebm.evaluate.posterior import Posterior
from numpyro_ebm.samplers import NUTS, Sampler

KEY = jax.random.key(0)
Y = jnp.array([-1.0, 0.5, 2.0, 4.0])


def population(y, noise=1.0, batch_size=None):
    """x_d ~ N(loc, scale), y_d ~ N(x_d, noise): the posterior of a row is normal."""
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        y, noise = (numpyro.subsample(jnp.broadcast_to(a, y.shape), event_dim=0) for a in (y, noise))
        x = numpyro.sample("x", dist.Normal(loc, scale))
        numpyro.sample("y", dist.Normal(x, noise), obs=y)


def tree(y):
    """A global latent over local ones, all normal: no plate has all latents."""
    loc = numpyro.param("loc", 0.0)
    top = numpyro.sample("top", dist.Normal(loc, 1))
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(top, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def counts(y):
    """Rates and counts: the posterior of a rate is Gamma(3 + y, rate + 1)."""
    rate = numpyro.param("rate", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Gamma(3, rate))
        numpyro.sample("y", dist.Poisson(x), obs=y)


def assert_moments(draws, mean, cov):
    """Means and variances of draws (num_chains, num_samples, dim), within 5 standard errors by their effective number."""
    draws = np.asarray(draws, np.float64)
    sd = np.sqrt(np.diagonal(cov))
    z = (draws - mean) / sd
    assert np.all(np.abs(z.mean((0, 1))) < 5 / np.sqrt(effective_sample_size(draws)))
    products = np.einsum("csi,csj->csij", z, z)
    correlation = cov / np.outer(sd, sd)
    error = 5 * np.sqrt((1 + correlation**2) / effective_sample_size(products))
    assert np.all(np.abs(products.mean((0, 1)) - correlation) < error)


def tree_posterior(y, loc):
    """Mean and covariance of (top, x_1, ..., x_D)."""
    precision = np.diag([1.0 + len(y)] + [2.0] * len(y))
    precision[0, 1:] = precision[1:, 0] = -1
    cov = np.linalg.inv(precision)
    return cov @ np.concatenate([[loc], y]), cov


# Draws.


def test_every_row_of_a_plate_has_a_step_of_its_own():
    # catches one acceptance or one step size for all rows: posterior scales of .01 and 5 would not mix in 300 draws
    noise, params = jnp.array([0.01, 0.1, 1.0, 100.0]), {"loc": 1.0, "scale": 5.0}
    draws = sample_posterior(KEY, population, params, Y, noise, num_samples=300, num_chains=8)["x"]
    assert draws.shape == (8, 300, 4)
    variance = 1 / (1 / 25 + 1 / noise**2)
    assert_moments(draws, variance * (1 / 25 + Y / noise**2), np.diag(variance))
    assert np.all(split_gelman_rubin(np.asarray(draws)) < 1.05)
    assert np.all(effective_sample_size(np.asarray(draws)) > 1000)


def test_subsampled_plates_give_all_rows_without_their_scale():
    # catches a density that counts a row L times (variance 1/2L), or rows of one batch only
    draws = sample_posterior(KEY, population, {"loc": 1.0, "scale": 1.0}, Y, 1.0, batch_size=2, num_samples=300, num_chains=8)
    assert_moments(draws["x"], (Y + 1) / 2, np.eye(4) / 2)


@pytest.mark.parametrize("sampler", [MALA(num_steps=20), NUTS()], ids=["mala", "nuts"])
def test_latents_without_a_common_plate_move_jointly(sampler):
    # catches a global latent accepted row by row, and for NUTS latents taken apart in the wrong order
    draws = sample_posterior(KEY, tree, {"loc": 1.0}, Y, sampler=sampler, num_samples=500, num_chains=4)
    together = jnp.concatenate([draws["top"][..., None], draws["x"]], -1)
    assert_moments(together, *tree_posterior(np.asarray(Y), 1.0))


def test_rows_that_a_sum_couples_are_found_out():
    # catches trust in the plate: row by row acceptance would leave another distribution than the joint one
    def coupled(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.factor("coupling", -(x.sum() ** 2) / 4)
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    assert Posterior(KEY, coupled, {}, (Y,), {}, None).plate is None
    assert Posterior(KEY, population, {"loc": 0.0, "scale": 1.0}, (Y,), {}, None).plate == "data"
    cov = np.linalg.inv(2 * np.eye(4) + 4 / 2 * np.ones((4, 4)))  # the factor stands in the plate: four times
    draws = sample_posterior(KEY, coupled, {}, Y, num_samples=400, num_chains=8)["x"]
    assert_moments(draws, cov @ np.asarray(Y), cov)


@pytest.mark.parametrize("sd", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("size", [4, 300])
def test_rows_that_are_coupled_are_found_out_beside_rows_of_large_score(size, sd):
    # catches a tolerance from the largest score of any row: that of row 0 is 1 / sd^2, and the last two share their sum
    def model(y, sd, share):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(x + share * (share * x).sum(), sd), obs=y)

    y = jnp.linspace(-1, 3, size)
    noise, share = jnp.ones(size).at[0].set(sd), (jnp.arange(size) >= size - 2).astype(float)
    assert Posterior(KEY, model, {}, (y, noise, share), {}, None).plate is None
    assert Posterior(KEY, model, {}, (y, noise, 0 * share), {}, None).plate == "data"


def _coupled_by(term, *, inside):
    def model():
        with numpyro.plate("data", 5):
            x = numpyro.sample("x", dist.Normal(0, 1))
            if inside:
                numpyro.factor("coupling", term(x))
        if not inside:
            numpyro.factor("coupling", term(x))

    return model


NEXT = jnp.array([4, 0, 1, 2, 3])
COUPLINGS = {
    "a step of the sum": lambda x: jnp.where(x.sum() > 3, 0.0, -6.0),
    "a step of neighbors": lambda x: jnp.where(abs(x - x[NEXT]) < 0.7, 0.0, -4.0),
    "signs": lambda x: 2 * jnp.sign(x) * jnp.sign(x[NEXT]),
    "a hinge that is reached late": lambda x: -8 * jnp.maximum(abs(x - x[NEXT]) - 2.5, 0),
    "a hinge of the sum": lambda x: -8 * jnp.maximum(abs(x.sum()) - 9, 0),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("how", COUPLINGS)
def test_rows_that_are_coupled_where_no_gradient_is_are_found_out(how, inside):
    """Rows moved one by one by a step of all of them: the mean of the sum was 0, that of the prior, for 3.92."""
    term = COUPLINGS[how]
    model = _coupled_by(term if inside else lambda x: term(x).sum(), inside=inside)
    for seed in range(3):
        assert Posterior(jax.random.key(seed), model, {}, (), {}, None).plate is None


def test_a_step_of_all_rows_is_sampled_jointly():
    model = _coupled_by(COUPLINGS["a step of the sum"], inside=False)
    draws = sample_posterior(KEY, model, {}, num_samples=1000, num_warmup=300, num_chains=16, sampler=MALA(num_steps=5))["x"]
    sums = np.asarray(draws.sum(-1))
    bound = 3 / np.sqrt(5)  # the sum is normal of variance 5, and as likely beyond 3 as it is, below exp(-6) times that
    density, above = np.exp(-(bound**2) / 2) / np.sqrt(2 * np.pi), 0.5 * math.erfc(bound / np.sqrt(2))
    exact = np.sqrt(5) * density * (1 - np.exp(-6)) / (above + (1 - above) * np.exp(-6))
    error = 5 * sums.std() / np.sqrt(effective_sample_size(sums))
    assert error < 0.3
    np.testing.assert_allclose(sums.mean(), exact, atol=error)


def test_a_step_of_a_row_couples_nothing():
    model = _coupled_by(lambda x: jnp.where(x > 1, 0.0, -3.0) - 8 * jnp.maximum(abs(x) - 9, 0), inside=True)
    assert Posterior(KEY, model, {}, (), {}, None).plate == "data"


def test_rows_without_a_score_are_independent():
    # catches a tolerance that is 0, or below the rounding of what cancels: the score is that of a sum of two large terms
    def model(y):
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(y, 1e-3))
            numpyro.factor("apart", 1e6 * (x - y) ** 2 / 2 + jnp.tanh(x[:, None] @ jnp.ones((1, 7))).sum(1))

    y = jnp.linspace(-1, 1, 1000)
    assert Posterior(KEY, model, {}, (y,), {}, None).plate == "data"
    assert Posterior(KEY, population, {"loc": 0.0, "scale": 1e3}, (0 * y, 1e3), {}, None).plate == "data"


def test_a_term_outside_the_plate_does_not_couple_rows():
    # catches a penalty on parameters that makes all rows move jointly
    def penalized(y):
        loc = numpyro.param("loc", 0.0)
        numpyro.factor("penalty", -(jnp.asarray(loc) ** 2))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(loc, 1)), 1), obs=y)

    assert Posterior(KEY, penalized, {"loc": 0.0}, (Y,), {}, None).plate == "data"


def test_two_sites_and_two_plates_keep_their_elements():
    # catches rows mixed up between sites and axes: a row of the array must be that of the plate, and come back in its place
    def model():
        with numpyro.plate("columns", 3, dim=-1), numpyro.plate("rows", 2, dim=-2):
            u = numpyro.sample("u", dist.Normal(0, 1).expand([4]).to_event(1))
            numpyro.sample("v", dist.Normal(u.sum(-1), 1))

    posterior = Posterior(KEY, model, {}, (), {}, None)
    latents = posterior.draw(KEY, init_to_sample)
    rows = posterior.to_rows(latents)
    assert (posterior.plate, rows.shape) == ("columns", (3, 10))
    np.testing.assert_array_equal(jnp.sort(rows[1]), jnp.sort(jnp.append(latents["u"][:, 1], latents["v"][:, 1])))
    for name, values in posterior.from_rows(rows).items():
        np.testing.assert_array_equal(values, latents[name])
    by_hand = dist.Normal(0, 1).log_prob(latents["u"]).sum((0, 2)) + dist.Normal(latents["u"].sum(-1), 1).log_prob(
        latents["v"]
    ).sum(0)
    np.testing.assert_allclose(posterior.row_log_density(latents), by_hand, rtol=1e-5)


def test_constrained_latents_have_their_own_distribution():
    # catches a missing Jacobian, which would turn Gamma(3 + y, 3) into Gamma(2 + y, 3)
    y = jnp.array([0.0, 2.0, 7.0])
    draws = sample_posterior(KEY, counts, {"rate": 2.0}, y, num_samples=400, num_chains=8)["x"]
    assert_moments(draws, (3 + y) / 3, np.diag((3 + y) / 9))


def test_more_langevin_has_its_known_variance():
    # catches MALA's correction or adaptation under an unadjusted sampler: variance 1/(c(1 - hc/2)), here 5/6 and not 1/2
    sampler = UnadjustedLangevin(step_size=0.4, num_steps=5)
    with pytest.warns(UserWarning, match="variance floor"):
        draws = sample_posterior(
            KEY, population, {"loc": 1.0, "scale": 1.0}, Y, sampler=sampler, num_samples=400, num_chains=8, thinning=2
        )
    assert_moments(draws["x"], (Y + 1) / 2, np.eye(4) * 5 / 6)


class _CountState(NamedTuple):
    position: jax.Array


@dataclass(frozen=True)
class _Count(Sampler):
    """Moves by 1 at every run, by 100 while it adapts."""

    adapt: bool = True

    def init(self, position, log_prob):
        return _CountState(position)

    def run(self, rng_key, log_prob, state):
        return _CountState(state.position + (100 if self.adapt else 1))

    def frozen(self):
        return _Count(adapt=False)


def test_warmup_and_thinning_count_transitions():
    # catches adaptation after the warmup, thinning left out, draws before their moves, and chains that start elsewhere
    start = {"x": jnp.arange(12.0).reshape(3, 4)}
    params = {"loc": 0.0, "scale": 1.0}
    options = {"start": start, "sampler": _Count(), "num_samples": 2, "num_warmup": 5, "thinning": 3}
    draws = sample_posterior(KEY, population, params, Y, **options)["x"]
    np.testing.assert_allclose(draws, start["x"][:, None] + 500 + jnp.array([3.0, 6.0])[:, None])


def test_particles_and_draws_go_into_predictive():
    # catches draws or particles that Predictive cannot read, or reads with chains and draws exchanged
    engine = ParticleMMLE.pgd(population, num_particles=6, step_size=0.02)
    result = engine.run(KEY, 20, Y, progress_bar=False)
    particles = engine.get_particles(result.state, Y)
    by_particle = Predictive(_predicted, params=result.params, posterior_samples=particles)(KEY, 4)["y"]
    assert by_particle.shape == (6, 4)
    np.testing.assert_allclose(by_particle, particles["x"], atol=5e-3)
    draws = sample_posterior(KEY, engine.model, result.params, Y, start=particles, num_samples=3, sampler=_Count(), num_warmup=0)
    by_draw = Predictive(_predicted, params=result.params, posterior_samples=draws, batch_ndims=2)(KEY, 4)["y"]
    np.testing.assert_allclose(by_draw, particles["x"][:, None] + jnp.arange(1.0, 4)[:, None], atol=5e-3)


def _predicted(num_data):
    with numpyro.plate("data", num_data):
        x = numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), numpyro.param("scale", 1.0)))
        numpyro.sample("y", dist.Normal(x, 1e-3))


def test_energy_prior_at_fixed_parameters_gives_its_posterior():
    # catches a guard that refuses a fixed energy, and chains of negative_phase that need not run
    def model(y):
        tilt = numpyro.param("tilt", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", TiltedDistribution(dist.Normal(0, 1), lambda x: -tilt * x))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    draws = sample_posterior(KEY, negative_phase(model), {"tilt": 3.0}, Y, num_samples=300, num_chains=8)
    assert_moments(draws["x"], (Y + 3) / 2, np.eye(4) / 2)
    with pytest.raises(NormalizerError, match=r"site 'x': the second derivative of its unknown normalizer"):
        standard_errors(negative_phase(model), {"tilt": 3.0}, {"x": draws["x"][:, :2]}, Y)


def test_normalizer_that_depends_on_a_latent_is_refused():
    # catches draws of a latent whose posterior lacks the normalizer it decides
    def model(y):
        u = numpyro.sample("u", dist.Normal(0, 1))
        numpyro.sample("y", TiltedDistribution(dist.Normal(0, 1), lambda x: jnp.exp(u) * x**2), obs=y)

    with pytest.raises(NormalizerError, match=r"site 'y': its unknown normalizer depends on a latent"):
        sample_posterior(KEY, model, {}, 1.0, num_samples=2)


# The mode.


def test_map_is_the_mode_of_the_constrained_distribution():
    # catches a Jacobian in the density: the mode of Gamma(3 + y, 3) is (2 + y)/3, with the Jacobian (3 + y)/3
    y = jnp.array([0.0, 2.0, 7.0])
    found = find_map(KEY, counts, {"rate": 2.0}, y)
    np.testing.assert_allclose(found.latents["x"], (2 + y) / 3, rtol=1e-3)
    exact = dist.Gamma(3, 2).log_prob((2 + y) / 3) + dist.Poisson((2 + y) / 3).log_prob(y)
    np.testing.assert_allclose(found.log_density, exact, rtol=1e-4)


def test_map_under_scope_is_that_of_the_model():
    # catches a Jacobian that is told by its name, which scope changes
    y = jnp.array([0.0, 2.0, 7.0])
    found = find_map(KEY, numpyro.handlers.scope(counts, prefix="m"), {"m/rate": 2.0}, y)
    np.testing.assert_allclose(found.latents["m/x"], (2 + y) / 3, rtol=1e-3)


def test_best_start_is_kept_row_by_row():
    # catches one best start for all rows: 8 starts have no one with all 12 rows in their better well
    sign = jnp.where(jnp.arange(12) % 3 == 0, 1.0, -1.0)

    def wells():
        with numpyro.plate("data", 12):
            x = numpyro.sample("x", dist.Normal(0, 3))
            numpyro.factor("wells", -4 * (x**2 - 1) ** 2 + sign * x)

    found = find_map(KEY, wells, {}, num_starts=12, num_steps=400)
    assert jnp.sign(found.latents["x"]).tolist() == sign.tolist()


def test_joint_map_solves_the_normal_equations():
    # catches rows taken apart where a global latent joins them
    found = find_map(KEY, tree, {"loc": 1.0}, Y, num_starts=2)
    mean, _ = tree_posterior(np.asarray(Y), 1.0)
    np.testing.assert_allclose(jnp.append(found.latents["top"], found.latents["x"]), mean, atol=2e-3)
    whole = numpyro.handlers.substitute(tree, data={**found.latents, "loc": 1.0})
    np.testing.assert_allclose(found.log_density, log_density(whole, (Y,), {}, {})[0], rtol=1e-5)


def test_map_tells_where_it_has_not_arrived():
    with pytest.warns(UserWarning, match=r"still rises in rows 0, 1, 2 and 1 more of plate 'data': take more num_steps"):
        find_map(KEY, population, {"loc": 50.0, "scale": 1.0}, Y, start={"x": jnp.zeros((1, 4))}, num_steps=3)


# Standard errors.


def population_information(theta, y):
    """Of the exact marginal y ~ N(loc, scale^2 + 1), in loc and log scale."""

    def log_likelihood(theta):
        return dist.Normal(theta[0], jnp.sqrt(jnp.exp(2 * theta[1]) + 1)).log_prob(y).sum()

    return -jax.hessian(log_likelihood)(theta)


def assert_information(found, exact, names, most_noise=0.02):
    """The information and the standard errors from it, within 5 of their own Monte Carlo errors, which are small."""
    np.testing.assert_allclose(found.information, exact, atol=0.02 * np.abs(exact).max())
    cov = np.linalg.inv(exact)
    for i, (name, jacobian) in enumerate(names.items()):
        wanted = np.sqrt(cov[i, i]) * jacobian
        noise = found.monte_carlo_errors[name]
        assert noise < most_noise * wanted
        assert abs(found.standard_errors[name] - wanted) < 5 * noise


def errors_of(rng_key, model, params, *args, **settings):
    samples = sample_posterior(rng_key, model, params, *args, **settings)
    return standard_errors(model, params, samples, *args)


def test_information_is_that_of_the_marginal_off_the_maximum_too():
    # catches a missing covariance, second moments of scores in its place (they differ where the mean score is not 0), the
    # covariance of their sum (too noisy), and an error of log scale given for one of scale
    y, theta = 2 + 2 * jax.random.normal(jax.random.key(5), (50,)), jnp.array([2.5, jnp.log(2.2)])
    with pytest.warns(UserWarning, match="param 'loc': params are not at a maximum"):
        found = errors_of(KEY, population, {"loc": 2.5, "scale": 2.2}, y, num_samples=250, num_chains=16)
    exact = population_information(theta, y)
    assert abs(exact[0, 1]) > 0.1 * exact[0, 0]
    assert_information(found, exact, {"loc": 1, "scale": 2.2}, most_noise=0.005)  # .002 by rows, .008 to .011 by their sum
    assert found.standard_errors["scale"].shape == ()
    variances = [found.standard_errors["loc"] ** 2, found.standard_errors["scale"] ** 2]
    np.testing.assert_allclose(jnp.diagonal(found.covariance), jnp.array(variances), rtol=1e-5)


def of_normals(loc, scale, num_chains=4):
    """y ~ N(loc, scale^2 + 1), 200 rows, and exact samples of the posterior: at the maximum loc is 1 and scale sqrt 3."""
    y = jax.random.normal(jax.random.key(5), (200,))
    y = 1 + 2 * (y - y.mean()) / y.std()
    gain = scale**2 / (scale**2 + 1)
    noise = jax.random.normal(KEY, (num_chains, 100, 200))
    samples = {"x": loc + gain * (y - loc) + jnp.sqrt(gain) * noise}
    return standard_errors(population, {"loc": loc, "scale": scale}, samples, y)


@pytest.mark.parametrize("num_chains", [1, 4])
def test_params_off_the_maximum_are_told_by_their_newton_step(num_chains):
    """The standard error of loc is 2 / sqrt 200, and the likelihood is normal in it: the step is as long as the distance."""
    error = 2 / 200**0.5
    with pytest.warns(UserWarning, match=r"param 'loc': .* it by [12]\.\d* \(\+- 0\.0\d*\) of .* at most 0\.5.*average_iterates"):
        of_normals(1 + 1.5 * error, 3**0.5, num_chains)
    with pytest.warns(UserWarning, match="param 'scale': params are not at a maximum"):
        of_normals(1.0, 1.0, num_chains)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_normals(1 + 0.4 * error, 3**0.5, num_chains)


def test_a_step_that_few_samples_cannot_tell_is_not_told():
    """Two samples of one row: the step is 2 standard errors, and uncertain by .9 of them."""

    def one(y):
        numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), 1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        standard_errors(one, {"loc": 0.0}, {"x": jnp.array([[2.0, 0.4]])}, None)


def test_toy_has_standard_error_root_two_over_d():
    # F1 of the particle papers: I = D/2. Over 24 data sets of chains, errors are as large as the Monte Carlo error says.
    def toy(y):
        loc = numpyro.param("loc", jnp.zeros(24))
        with numpyro.plate("sets", 24), numpyro.plate("data", 10):
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    y = jax.random.normal(KEY, (10, 24))
    found = errors_of(jax.random.key(1), toy, {"loc": y.mean(0)}, y, num_samples=100, num_chains=16)
    z = (found.standard_errors["loc"] - np.sqrt(2 / 10)) / found.monte_carlo_errors["loc"]
    # z has Student's distribution with 15 degrees of freedom: standard deviation 1.07, its estimate from 24 off by .17
    assert 0.4 < np.sqrt((z**2).mean()) < 1.75
    np.testing.assert_allclose(found.standard_errors["loc"], np.sqrt(2 / 10), rtol=0.05)


def test_standard_errors_by_quadrature_where_posteriors_are_not_normal():
    # catches a Laplace approximation in disguise, and scores of one row given to another
    def schools(y, exposure):
        loc, scale = numpyro.param("loc", 0.0), numpyro.param("scale", 1.0, constraint=constraints.positive)
        with numpyro.plate("school", len(y)):
            x = numpyro.sample("x", dist.Normal(loc, scale))
            numpyro.sample("y", dist.Poisson(exposure * jnp.exp(x)), obs=y)

    y, exposure = jnp.array([1.0, 12.0, 0.0, 3.0, 40.0, 2.0, 9.0, 5.0]), jnp.array([1.0, 2, 1, 3, 4, 1, 1, 5])
    nodes = jnp.linspace(-8, 8, 401)[:, None]  # not Gauss-Hermite: its nodes are wider than the narrowest posterior here

    def log_likelihood(theta):
        terms = dist.Poisson(exposure * jnp.exp(theta[0] + jnp.exp(theta[1]) * nodes)).log_prob(y)
        return jax.nn.logsumexp(terms + dist.Normal(0, 1).log_prob(nodes), 0).sum()

    theta = jnp.array([0.6, jnp.log(0.9)])
    found = errors_of(KEY, schools, {"loc": 0.6, "scale": 0.9}, y, exposure, num_samples=400, num_chains=16)
    assert_information(found, -jax.hessian(log_likelihood)(theta), {"loc": 1, "scale": 0.9})


def test_standard_error_with_a_global_latent():
    # catches rows where there are none: y ~ N(loc, I + 11'), information D/(1 + D)
    def shared(y):
        x = numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), 1))
        numpyro.sample("y", dist.Normal(x, 1).expand([4]).to_event(1), obs=y)

    found = errors_of(KEY, shared, {"loc": 1.0}, Y, num_samples=1000, num_chains=16)
    assert_information(found, np.array([[4 / 5]]), {"loc": 1})


def test_simplex_params_get_as_many_standard_errors_as_they_have_elements():
    # catches errors of the two unconstrained values given for three shares; multinomial: var p_i = p_i (1 - p_i) / n
    def model(y):
        share = numpyro.param("share", jnp.ones(3) / 3, constraint=constraints.simplex)
        numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Multinomial(probs=share, total_count=10), obs=y)

    share = jnp.array([0.2, 0.3, 0.5])
    found = errors_of(KEY, model, {"share": share}, 10 * share, num_samples=2, num_warmup=1)
    np.testing.assert_allclose(found.standard_errors["share"], jnp.sqrt(share * (1 - share) / 10), rtol=1e-3)
    np.testing.assert_allclose(found.monte_carlo_errors["share"], 0, atol=1e-4)


def _unidentified(y):
    a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(a + b, 1)), 1), obs=y)


def _straight(y):
    numpyro.factor("line", numpyro.param("slope", 0.0))
    population(y)


def _field(y):
    w = numpyro.param("w", 1.0)
    with numpyro.plate("data", len(y)):
        h = numpyro.sample("h", BaseMeasure(constraints.real, ()))
        v = numpyro.sample("v", BaseMeasure(constraints.real, ()), obs=y)
        numpyro.factor("coupling", -(h**2) - v**2 + w * h * v)


@pytest.mark.parametrize(
    ("model", "params", "error", "message"),
    [
        (_unidentified, {"a": 1.0, "b": 0.5}, ValueError, r"param '[ab]': the observed information is not positive definite"),
        (population, {"loc": 1.0, "scale": 0.05}, ValueError, r"param 'scale': .* not at a maximum"),
        (_straight, {"loc": 1.0, "scale": 1.0, "slope": 0.0}, ValueError, r"param 'slope': the log density has no curvature in it"),
        (_field, {"w": 1.0}, NormalizerError, r"site 'coupling': it makes the model a random field"),
    ],
    ids=["unidentified", "far_from_a_maximum", "straight", "random_field"],
)
def test_information_that_is_none_is_refused(model, params, error, message):
    with pytest.raises(error, match=message):
        errors_of(KEY, model, params, Y, num_samples=40, num_chains=4)


def test_standard_errors_of_a_random_module_leave_out_the_weights_that_it_samples():
    # catches weights that sample sites replace taken for params in which the density must bend; y ~ N(0, tau^2 F F' + I / 4)
    x = jnp.linspace(-1, 1, 12)
    features, y = jnp.stack([x, jnp.ones(12)], 1), jnp.sin(5 * x) + 0.4
    network = eqx.nn.Linear(1, 1, key=KEY)

    def model(y):
        numpyro.param("idle", jnp.zeros(2))
        tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        net = random_eqx_module("net", network, prior=dist.Normal(0, tau))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(jax.vmap(net)(x[:, None])[:, 0], 0.5), obs=y)

    def log_likelihood(log_tau):
        cov = jnp.exp(2 * log_tau) * features @ features.T + jnp.eye(12) / 4
        return dist.MultivariateNormal(jnp.zeros(12), cov).log_prob(y)

    weights = eqx.filter(network, eqx.is_array)
    tau = float(jnp.exp(max(jnp.linspace(-3, 1, 401), key=log_likelihood)))
    params = {"idle": jnp.zeros(2), "tau": tau, "net$params": weights}
    found = errors_of(KEY, model, params, y, num_samples=500, num_chains=16)
    assert_information(found, -jax.hessian(log_likelihood)(jnp.log(tau)).reshape(1, 1), {"tau": tau}, most_noise=0.05)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves([found.standard_errors[name] for name in ("idle", "net$params")]))
    assert found.covariance.shape == (1, 1)


def of_batch(batch, rows, num_data):
    """A model as a data loader calls it: it is given its rows, and which they are."""
    loc = numpyro.param("loc", 0.0)
    with substitute(data={"data": rows}):
        data = numpyro.plate("data", num_data, subsample_size=len(rows))
    with data:
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=batch)


def test_a_batch_of_a_loader_has_the_posterior_of_its_rows():
    # catches a plate that shows all its rows though it is given some, and their scale of 2 in the density
    rows = jnp.array([3, 1])
    draws = sample_posterior(KEY, of_batch, {"loc": 1.0}, Y[rows], rows, 4, num_samples=2000)["x"]
    assert_moments(draws, (Y[rows] + 1) / 2, np.eye(2) / 2)
    np.testing.assert_allclose(find_map(KEY, of_batch, {"loc": 1.0}, Y[rows], rows, 4).latents["x"], (Y[rows] + 1) / 2, atol=1e-3)
    assert_moments(
        sample_posterior(KEY, of_batch, {"loc": 1.0}, Y, jnp.arange(4), 4, num_samples=2000)["x"], (Y + 1) / 2, np.eye(4) / 2
    )


def test_a_batch_of_a_loader_is_refused_where_it_is_not_the_whole_posterior():
    def shared(batch, rows, num_data):
        numpyro.sample("top", dist.Normal(0, 1))
        of_batch(batch, rows, num_data)

    rows = jnp.array([3, 1])
    with pytest.raises(ValueError, match=r"plate 'data': the model is given 2 of its 4 rows.* not a product over them"):
        sample_posterior(KEY, shared, {"loc": 1.0}, Y[rows], rows, 4, num_samples=2)
    with pytest.raises(ValueError, match=r"plate 'data': the model is given 2 of its 4 rows.* information is that of all data"):
        standard_errors(of_batch, {"loc": 1.0}, {"x": np.zeros((2, 3, 2))}, Y[rows], rows, 4)


def narrow(y):
    numpyro.param("unused", 0.0)
    x, z = numpyro.sample("x", dist.Normal(0, 1)), numpyro.sample("z", dist.Normal(jnp.zeros(2), 1).to_event(1))
    numpyro.sample("y", dist.Normal(x + z.sum(), 0.001), obs=y)


def test_chains_that_do_not_mix_are_said():
    # catches means of chains that stand far apart on a ridge, 1000 times longer than it is wide, returned in silence
    with pytest.warns(UserWarning, match=r"site '[xz]'.*: R-hat is \d+.*the 800 draws of 4 chains count as \d+: .*not mixed"):
        sample_posterior(KEY, narrow, {"unused": 0.0}, 1.0, num_samples=200)


def test_masked_latents_which_wander_are_not_said_to_mix_badly():
    # catches a warning of elements that have no density: what obs_mask calls unobserved is masked where there are data
    def model(y, is_seen):
        numpyro.param("unused", 0.0)
        with numpyro.plate("data", 4):
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y, obs_mask=is_seen)

    draws = sample_posterior(KEY, model, {"unused": 0.0}, Y, jnp.array([True, True, False, True]), num_samples=400)
    far = split_gelman_rubin(np.asarray(draws["y_unobserved"]))
    assert far[0] > 1.2
    assert far[2] < 1.1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"z": np.zeros((2, 3, 4))}, r"samples has the sites \['z'\], the latents of the model are \['x'\]"),
        ({"x": np.zeros((2, 3, 5))}, r"site 'x': samples has shape \(2, 3, 5\), it must be \(2, 3, 4\)"),
        ({"x": np.zeros(4)}, r"site 'x': samples has shape \(4,\), it must begin with \(num_chains, num_samples\)"),
        ({"x": np.full((2, 3, 4), np.nan)}, r"site 'x': samples has values that are not finite"),
        ({}, r"samples has the sites \[\]"),
    ],
)
def test_samples_of_something_else_are_refused(samples, message):
    # Catches draws without their chains, whose first two axes would be taken for chains and samples.
    with pytest.raises(ValueError, match=message):
        standard_errors(population, {"loc": 0.0, "scale": 1.0}, samples, Y)


def test_standard_errors_take_the_samples_as_they_are():
    """Latents on the half line: one sample per chain, by hand. Catches samples taken for unconstrained ones."""

    def model(y):
        rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Poisson(numpyro.sample("x", dist.Exponential(rate))), obs=y)

    x, y, rate = jnp.array([[[0.5, 2.0]], [[1.5, 0.3]]]), jnp.array([1.0, 2.0]), 0.8
    found = standard_errors(model, {"rate": rate}, {"x": x}, y)
    # with theta = log rate: score of a row 1 - rate x, minus its second derivative rate x
    score = 1 - rate * x[:, 0]
    information = (rate * x[:, 0]).mean(0).sum() - ((score - score.mean(0)) ** 2).mean(0).sum()
    np.testing.assert_allclose(found.information, [[information]], rtol=1e-5)


# Convergence.


def test_ipla_spreads_as_its_exact_discrete_distribution():
    # F1: Var loc = .1126761 at D = 4, N = 5, h = .1; the theory for h -> 0 is (2/D)/N = .1
    engine = ParticleMMLE.ipla(hierarchical, num_particles=5, step_size=0.1)
    result = engine.run(KEY, 60_000, Y, collect=engine.get_params, progress_bar=False)
    report = convergence(result.collected, burn_in=200, num_particles=5, standard_errors={"loc": np.sqrt(2 / 4)})
    np.testing.assert_allclose(report.theory["loc"], np.sqrt(0.1))
    # slowest eigenvalue 1 - .1 (3 - sqrt 5): squares forget in 12.6 steps, the standard deviation is known to 1.0 %
    np.testing.assert_allclose(report.ratio["loc"], np.sqrt(1.126761), rtol=0.041)
    assert abs(report.mean["loc"] - Y.mean()) < 4 * report.mcse["loc"]
    np.testing.assert_allclose(report.mcse["loc"], report.sd["loc"] * np.sqrt(25.2 / 59_800), rtol=0.2)
    assert report.r_hat["loc"] < 1.01


def test_error_of_the_mean_knows_autocorrelation():
    # catches sd / sqrt(n), which is 4.4 times too small here: AR(1), (1 + r)/(1 - r) = 19 for r = .9
    rng = np.random.default_rng(0)
    trace = np.zeros((40_000, 2))
    for t in range(1, len(trace)):
        trace[t] = 0.9 * trace[t - 1] + np.sqrt(1 - 0.81) * rng.normal(size=2)
    report = convergence({"a": trace}, burn_in=0)
    np.testing.assert_allclose(report.mcse["a"], np.sqrt(19 / 40_000), rtol=0.15)
    np.testing.assert_allclose(report.ess["a"], 40_000 / 19, rtol=0.3)
    assert report.theory is None


def test_report_has_exact_numbers_and_prints_a_table():
    # catches a wrong burn-in, ddof, or an order of elements that is not the param's
    trace = {"w": np.stack([np.arange(8.0), np.full(8, 3.0)], 1), "s": np.array([9.0, 9, 9, 9, 1, -1, 1, -1])}
    report = convergence(trace, num_particles=4, standard_errors={"w": np.array([1.0, 2.0]), "s": 0.5})
    np.testing.assert_allclose(report.running_mean["w"], [[4, 3], [4.5, 3], [5, 3], [5.5, 3]])
    np.testing.assert_allclose(report.sd["s"], np.sqrt(4 / 3))
    np.testing.assert_allclose(report.theory["w"], [0.5, 1.0])
    np.testing.assert_allclose(report.ratio["s"], np.sqrt(4 / 3) / 0.25)
    assert report.mcse["w"][1] == 0  # what does not move is known
    assert report.r_hat["w"][0] > 1.5  # a trend is no stationary distribution
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["param", "s"]
    assert lines[2].startswith("w[0]")
    assert lines[2].split()[1:4:2] == ["5.5", "1.291"]
    assert lines[3].split()[1] == "3"


def test_long_params_are_cut_in_print_and_nested_ones_named():
    trace = {"net$params": {"w": np.random.default_rng(0).normal(size=(50, 4, 5)), "b": np.zeros((50,))}}
    text = str(convergence(trace))
    assert "net$params.w[0, 1]" in text
    assert "net$params.w: 10 more" in text


# Bad input.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_samples": 1, "num_chains": 0}, r"num_chains must be a positive integer, got 0"),
        ({"num_samples": 1, "start": {"z": Y}}, r"start has the sites \['z'\], the latents of the model are \['x'\]"),
        ({"num_samples": 1, "start": {"x": Y}}, r"site 'x': start has shape \(4,\), with num_chains=4 it must be \(4, 4\)"),
        ({"num_samples": 1, "start": {"x": jnp.full((2, 4), jnp.nan)}}, r"site 'x': start has values that are not finite"),
        ({"num_samples": 1, "start": {"x": jnp.full((2, 4), 1e30)}}, r"not finite at 2 of 2|not finite at 8 of 8 places"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        sample_posterior(KEY, population, {"loc": 0.0, "scale": 1.0}, Y, **call)


def test_bad_models_are_refused():
    def discrete(y):
        numpyro.sample("k", dist.Bernoulli(0.5))

    def nothing(y):
        numpyro.sample("y", dist.Normal(0, 1).expand([4]).to_event(1), obs=y)

    call = {"num_samples": 1}
    with pytest.raises(ValueError, match=r"site 'k': a latent with Bernoulli\w* is discrete"):
        sample_posterior(KEY, discrete, {}, Y, **call)
    with pytest.raises(ValueError, match="no latent site"):
        sample_posterior(KEY, nothing, {}, Y, **call)
    with pytest.raises(ValueError, match=r"params lacks \['scale'\]"):
        sample_posterior(KEY, population, {"loc": 0.0}, Y, **call)
    with pytest.raises(ValueError, match=r"site 'y': 1 of 4 observed events are NaN"):
        sample_posterior(KEY, population, {"loc": 0.0, "scale": 1.0}, Y.at[0].set(jnp.nan), **call)
    with pytest.raises(TypeError, match=r"sampler must be a sampler such as MALA\(\), or samplers.NUTS\(\), got 'hmc'"):
        sample_posterior(KEY, population, {"loc": 0.0, "scale": 1.0}, Y, sampler="hmc", **call)


def test_chains_that_run_away_are_an_error():
    sampler = UnadjustedLangevin(step_size=50.0, num_steps=10)
    with pytest.raises(ValueError, match=r"site 'x': the draws are not finite"):
        sample_posterior(KEY, population, {"loc": 0.0, "scale": 1.0}, Y, sampler=sampler, num_samples=20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"burn_in": 7}, r"burn_in=7 leaves 3 of 10 steps"),
        ({"standard_errors": {"a": 1.0}}, r"num_particles must be a positive integer"),
        ({"standard_errors": {"b": 1.0}, "num_particles": 2}, r"param 'a': its standard error is missing"),
        ({"standard_errors": {"a": np.ones(2)}, "num_particles": 2}, r"param 'a': its standard error has shape \(2,\)"),
    ],
)
def test_bad_readouts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        convergence({"a": np.arange(10.0)}, **call)
    with pytest.raises(TypeError, match=r"run\(..., collect=engine.get_params\).collected"):
        convergence(None)
