# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""check_model: the guard's verdict before anything runs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints

from numpyro_ebm import BaseMeasure, EnergyDistribution, NormalizerError, TiltedDistribution, check_model, negative_phase

STANDARD = dist.Normal(0, 1)


def _sites(model, *args):
    return {site.name: site for site in check_model(model, *args).sites}


def test_every_site_gets_its_verdict():
    # guards against: a report that misses a site, a parameter of a network, or the difference of fixed and learnable
    net = eqx.nn.MLP(2, "scalar", 4, 1, key=jax.random.key(0))

    def model(y):
        energy = eqx_module("net", net)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(STANDARD.expand([2]).to_event(1), energy))
            u = numpyro.sample("u", EnergyDistribution(lambda u: u**4))
            numpyro.sample("y", dist.Normal(z.sum(-1) + u, 1), obs=y)

    report = check_model(model, jnp.zeros(3))
    sites = {site.name: site for site in report.sites}
    assert list(sites) == ["z", "u", "y"]
    assert report.needs_negative_phase
    assert (sites["z"].is_energy, sites["z"].params, sites["z"].refused) == (True, ("net$params",), False)
    assert "learn it under negative_phase" in sites["z"].verdict
    assert (sites["u"].is_energy, sites["u"].params) == (True, ())
    assert "fixed" in sites["u"].verdict
    assert (sites["y"].is_energy, sites["y"].latents, sites["y"].verdict) == (False, ("z", "u"), "normalized")
    table = str(report).splitlines()
    assert len(table) == 4
    assert table[1].split()[:2] == ["z", "TiltedDistribution"]


def test_only_learnable_energies_need_the_negative_phase():
    def model():
        numpyro.sample("u", EnergyDistribution(lambda u: u**4))

    assert not check_model(model).needs_negative_phase


def test_dependence_on_a_latent_is_told_through_deterministic_sites():
    # guards against: a deterministic site in between hiding the latent
    def model():
        w = numpyro.deterministic("double", 2 * numpyro.sample("w", STANDARD))
        numpyro.sample("z", TiltedDistribution(dist.Normal(w, 1), lambda z: z**4))

    site = _sites(model)["z"]
    assert site.refused
    assert site.latents == ("w",)
    assert "latent site 'w' (doubly intractable)" in site.verdict


def test_dependence_on_observed_data_is_not_refused():
    # guards against: conditional energies of observed covariates being taken for doubly intractable ones
    def model(x):
        x = numpyro.sample("x", STANDARD, obs=x)
        numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -x * z))

    assert not _sites(model, jnp.array(0.5))["z"].refused


def _field(support):
    def model(v):
        W = numpyro.param("W", jnp.ones((2, 3)))
        h = numpyro.sample("h", BaseMeasure(support, (3,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (2,)), obs=v)
        numpyro.factor("coupling", v @ W @ h - (v**2).sum() / 2)

    return model


def test_random_field_with_parameters_is_told_and_needs_the_negative_phase():
    # guards against: a joint energy in a factor, which no guard sees, learned without its normalizer
    report = check_model(_field(constraints.real), jnp.zeros(2))
    sites = {site.name: site for site in report.sites}
    assert sites["h"].verdict == sites["v"].verdict == "flat"
    assert (sites["coupling"].couples, sites["coupling"].refused) == (("h", "v"), False)
    assert "random field" in sites["coupling"].verdict
    assert "learn it under negative_phase" in sites["coupling"].verdict
    assert report.is_random_field
    assert report.needs_negative_phase


def test_random_field_of_discrete_sites_is_refused_by_the_handler():
    # guards against: a discrete field, whose pool nothing moves, taken for one that is learned
    assert not check_model(_field(constraints.boolean), jnp.zeros(2)).is_random_field
    with pytest.raises(NormalizerError, match=r"site 'coupling': couples the flat sites 'h', 'v'.*site 'h' is discrete"):
        numpyro.handlers.seed(negative_phase(_field(constraints.boolean)), 0)(jnp.zeros(2))


def test_a_wrapped_random_field_has_its_normalizer():
    # guards against: a second wrapping that adds the normalizer again
    inner = numpyro.handlers.substitute(negative_phase(_field(constraints.real), num_chains=3), data={"h": jnp.ones(3)})
    report = check_model(inner, jnp.zeros(2))
    assert not report.is_random_field
    assert report.sites[-1].verdict.endswith("a handler adds it")


def test_fixed_random_field_needs_nothing():
    # guards against: chains for a normalizer that is a constant
    def model(v):
        h = numpyro.sample("h", BaseMeasure())
        numpyro.factor("coupling", -(h**4))
        numpyro.sample("v", dist.Normal(numpyro.param("w", 1.0) * h, 1), obs=v)

    report = check_model(model, jnp.array(0.3))
    assert not report.needs_negative_phase
    assert report.sites[1].verdict == "factor"


def test_a_factor_with_parameters_is_never_called_normalized():
    # guards against: a tilt written as a factor, whose normalizer nobody sees
    def model():
        z = numpyro.sample("z", STANDARD)
        numpyro.factor("tilt", numpyro.param("t", 0.7) * z)

    assert "right only if it is a normalized log density" in _sites(model)["tilt"].verdict


def test_nothing_is_computed():
    # guards against: a check that runs the model (an array of this size would not fit)
    def model():
        z = numpyro.sample("z", TiltedDistribution(STANDARD.expand([100_000]).to_event(1), lambda z: (z**4).sum()))
        numpyro.deterministic("huge", jnp.outer(z, z) @ jnp.outer(z, z))

    assert [site.name for site in check_model(model).sites] == ["z"]


def test_the_handler_leaves_the_sites_of_the_outer_trace_alone():
    # guards against: the handler's own check being recorded by, or taking keys from, what runs the model
    def model():
        numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: z**4))

    handler = negative_phase(model, num_chains=3)
    first, second = (
        numpyro.handlers.trace(numpyro.handlers.seed(handler, 0)).get_trace() for _ in range(2)
    )  # the check runs in the first call only
    assert list(first) == list(second) == ["z", "z/chains", "z/log_normalizer"]
    assert first["z"]["value"] == second["z"]["value"]


def test_a_wrapped_model_is_reported_as_such():
    # guards against: advice to do what is done, and rows for what the handler itself adds
    def model():
        tilt = numpyro.param("tilt", 0.1)
        numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -tilt * z))

    report = check_model(negative_phase(model, num_chains=3))
    assert [site.name for site in report.sites] == ["z"]
    assert report.sites[0].verdict.endswith("a handler has lifted the guard")
