# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""check_model: the guard's verdict before anything runs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module, random_eqx_module
from numpyro.distributions import constraints, transforms
from numpyro.handlers import block, condition, do, lift, mask, reparam, scope, substitute
from numpyro.infer.reparam import LocScaleReparam

from numpyro_ebm import (
    BaseMeasure,
    EnergyDistribution,
    NormalizerError,
    TiltedDistribution,
    check_model,
    negative_phase,
    unnormalized,
)

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


# ---- One model in many forms --------------------------------------------------------------------------------------------

Y = jnp.array([0.3, -0.4, 1.0])


def _with_rate(rate):
    """x ~ exp(-rate x^2 / 2) / Z(rate), y ~ N(x, 1), beside a latent, a param and a random network that are no part of it."""

    def model(y):
        k = rate()
        loc = numpyro.sample("loc", dist.Normal(numpyro.param("mu", 0.0), 1))
        decoder = random_eqx_module("decoder", eqx.nn.Linear("scalar", "scalar", key=jax.random.key(0)), prior=STANDARD)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", EnergyDistribution(lambda x: k * x**2 / 2, initial=STANDARD))
            numpyro.sample("y", dist.Normal(jax.vmap(decoder)(x) + loc, 1), obs=y)

    return model


def _network_rate():
    return eqx_module("t", eqx.nn.Linear("scalar", "scalar", key=jax.random.key(0)))(jnp.ones(()))


def _param():
    return numpyro.param("t", 1.0)


def _latent():
    return numpyro.sample("w", dist.HalfNormal(1.0))


def _thrice(rate):
    """Through two deterministic sites and a jitted function with other arguments and a derivative of its own."""
    first = numpyro.deterministic("first", jnp.exp(rate))
    return numpyro.deterministic("second", jax.jit(lambda a, b: (a, jax.nn.relu(b)))(numpyro.param("no", 1.0), 2 * first)[1])


def _stepwise(rate):
    """A carry that needs two turns to reach the second place, beside one that never does."""
    return jax.lax.scan(lambda c, _: ((rate, c[0], c[2]), None), (0.0, 0.0, numpyro.param("no", 1.0)), None, 3)[0][1]


FORMS = {
    "plain": lambda rate: _with_rate(rate),
    "deterministic": lambda rate: _with_rate(lambda: numpyro.deterministic("t_positive", jnp.exp(rate()))),
    "two deterministic sites": lambda rate: _with_rate(lambda: _thrice(rate())),
    "scan": lambda rate: _with_rate(lambda: _stepwise(rate())),
    "cond": lambda rate: _with_rate(lambda: (lambda k: jax.lax.cond(k > 0, lambda: k, lambda: -k))(rate())),
    "scope": lambda rate: scope(_with_rate(lambda: numpyro.deterministic("d", rate())), prefix="m"),
    "condition": lambda rate: condition(_with_rate(rate), data={"loc": jnp.array(0.1)}),
    "do": lambda rate: do(_with_rate(rate), data={"loc": jnp.array(0.1)}),
    "lambda": lambda rate: lambda y: _with_rate(rate)(y),
    "mask": lambda rate: mask(_with_rate(rate), mask=jnp.array(True)),
    "reparam": lambda rate: reparam(_with_rate(rate), config={"loc": LocScaleReparam(0.0)}),
    "substitute": lambda rate: substitute(_with_rate(rate), data={"mu": jnp.array(0.1)}),
    "unnormalized": lambda rate: unnormalized(_with_rate(rate)),
}
RATES = {
    "param": (_param, ("t",), ()),
    "param in a dict": (lambda: numpyro.param("t", {"a": jnp.ones(()), "b": jnp.zeros(())})["a"], ("t",), ()),
    "param by a function": (lambda: numpyro.param("t", lambda key: jax.random.normal(key)), ("t",), ()),
    "network": (_network_rate, ("t$params",), ()),
    "latent": (_latent, (), ("w",)),
    "discrete latent": (lambda: jnp.array([1.0, 2.0])[numpyro.sample("w", dist.Bernoulli(0.5))], (), ("w",)),
    "latent of a param": (lambda: numpyro.sample("w", dist.LogNormal(_param(), 1.0)), (), ("w",)),
    "both": (lambda: _param() * _latent(), ("t",), ("w",)),
    "nothing": (lambda: 2.0 + 0 * numpyro.param("t", jnp.ones(3)).shape[0], (), ()),
}


@pytest.mark.parametrize("rate", RATES)
def test_what_an_energy_depends_on_is_the_same_in_every_form_of_a_model(rate):
    # guards against: deterministic sites, handlers and functions that hide a param or a latent from the check
    rate, params, latents = RATES[rate]
    for name, form in FORMS.items():
        prefix = "m/" if name == "scope" else ""
        report = check_model(form(rate), Y)
        site = {site.name: site for site in report.sites}[prefix + "x"]
        assert (name, site.params, site.latents) == (name, tuple(prefix + p for p in params), tuple(prefix + p for p in latents))
        assert (site.refused, report.needs_negative_phase) == (bool(latents), bool(params))
        assert ("fixed: every engine is right" in site.verdict) == (not params and not latents)


def test_handlers_that_fix_a_latent_or_free_a_param_change_the_answer():
    # guards against: a report of the model as it is written, and not as handlers make it
    latent = _with_rate(lambda: numpyro.deterministic("d", _latent()))
    for fixed in (condition(latent, data={"w": jnp.ones(())}), do(latent, data={"w": jnp.ones(())})):
        assert (_sites(fixed, Y)["x"].latents, _sites(fixed, Y)["x"].refused) == ((), False)
    param = _with_rate(lambda: numpyro.deterministic("d", _param()))
    assert _sites(block(param, hide=["t"]), Y)["x"].params == ()
    lifted = _sites(lift(param, prior={"t": dist.HalfNormal(1.0)}), Y)["x"]
    assert (lifted.params, lifted.latents, lifted.refused) == ((), ("t",), True)


def test_a_param_behind_a_stopped_gradient_is_not_learned():
    # guards against: chains for a gradient that nobody takes; a latent's value counts all the same
    assert _sites(_with_rate(lambda: jax.lax.stop_gradient(_param())), Y)["x"].params == ()
    assert _sites(_with_rate(lambda: jax.lax.stop_gradient(_latent())), Y)["x"].latents == ("w",)


def test_a_field_is_told_through_deterministic_sites_and_params_of_what_it_couples():
    # guards against: a joint normalizer that depends on a param by a deterministic site, or by the prior of a coupled latent
    def model(v, prior):
        w = 1.0 if prior else numpyro.deterministic("w_positive", jnp.exp(numpyro.param("w", 0.0)))
        z = numpyro.deterministic("twice", 2 * numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0) if prior else 0.0, 1)))
        v = numpyro.sample("v", BaseMeasure(), obs=v)
        numpyro.factor("coupling", -w * (numpyro.deterministic("d", v) - z) ** 2)

    for prior, param in ((False, "w"), (True, "loc")):
        report = check_model(model, jnp.array(0.3), prior)
        assert report.sites[-1].couples == ("v",)
        assert f"normalizer depends on param '{param}': learn it under negative_phase" in report.sites[-1].verdict


def test_an_energy_inside_scan_is_refused_only_where_its_normalizer_moves():
    # guards against: a fixed energy of a time series taken for one that depends on the carry, and the reverse
    def model(y, kind, prior=None):
        slope = numpyro.param("slope", 0.5)

        def step(carry, y_t):
            rate = {"fixed": 2.0, "param": slope, "carry": carry}[kind]
            z = numpyro.sample("z", TiltedDistribution(STANDARD, lambda k, z: k * z**2, params=jnp.asarray(rate)))
            numpyro.sample("y", dist.Normal(slope * z, 1), obs=y_t)
            return z, None

        scan(step, 0.0, y)

    for form in (model, scope(model, prefix="m", divider=".")):
        energies = {kind: check_model(form, Y, kind).sites[0] for kind in ("fixed", "param", "carry")}
        assert [energies[kind].refused for kind in energies] == [False, True, True]
        assert "fixed" in energies["fixed"].verdict
        assert all("inside scan" in energies[kind].verdict for kind in ("param", "carry"))


def test_dependence_on_the_first_argument_is_told():
    # guards against: a normalizer Z(v) called fixed, whose derivative is missing from a score in v; values needed by the model
    def model(v, x, by_value=False):
        rate = float(np.asarray(v)[0]) if by_value else jnp.exp(v[0])
        numpyro.sample("of_v", EnergyDistribution(lambda z: rate * z**2, initial=STANDARD))
        numpyro.sample("of_x", EnergyDistribution(lambda z: x * z**2 * len(v), initial=STANDARD))

    sites = _sites(model, Y, 2.0)
    assert (sites["of_v"].of_first_argument, sites["of_x"].of_first_argument) == (True, False)
    assert sites["of_v"].verdict.endswith("not for the score of that argument")
    assert sites["of_x"].verdict.endswith("every engine is right as it is")
    assert not _sites(model, Y, 2.0, True)["of_v"].of_first_argument


def _of_effects(enters, *, learned=True, global_scale=False):
    """A latent with a learned prior, 6 rows, which enters by a function of itself, a free scale, a free shift and a covariate."""

    def model(y):
        tilt = numpyro.param("tilt", 0.0) if learned else 1.0
        shift = numpyro.param("shift", 0.0)
        scale = numpyro.sample("scale", dist.HalfNormal(5)) if global_scale else jnp.exp(numpyro.param("scale", 0.0))
        with numpyro.plate("data", 6):
            z = numpyro.sample("z", TiltedDistribution(STANDARD, lambda z: -tilt * z))
            local = numpyro.sample("local", STANDARD)
            mean = numpyro.deterministic("mean", enters(z, scale, shift, jnp.arange(6.0), local))
            numpyro.sample("y", dist.Normal(mean, numpyro.param("noise", 1.0)), obs=y)

    return _sites(model, jnp.zeros(6))["z"]


ENTERS = {
    "scaled and shifted": (lambda z, a, b, x, e: a * z + b, ("scale", "shift")),
    "shifted first": (lambda z, a, b, x, e: (z - b) / a, ("scale", "shift")),
    "in other units": (lambda z, a, b, x, e: 2 * (a * z + b) - 1, ("scale", "shift")),
    "beside a covariate": (lambda z, a, b, x, e: b + x + z * a, ("scale", "shift")),
    "rows in another order": (lambda z, a, b, x, e: (a * z + b)[jnp.array([5, 4, 3, 2, 1, 0])], ("scale", "shift")),
    "shifted": (lambda z, a, b, x, e: z + b, ("shift",)),
    "scaled": (lambda z, a, b, x, e: a * z, ("scale",)),
    "slope of a covariate": (lambda z, a, b, x, e: a * z * x + b, ("scale",)),
    "as it is": (lambda z, a, b, x, e: z, ()),
    "as it is, with a covariate": (lambda z, a, b, x, e: z + a * x, ()),
    "beside a latent of each row": (lambda z, a, b, x, e: z + e, ()),
    "scaled with the covariate": (lambda z, a, b, x, e: a * (z + x), ()),
    "in a curve": (lambda z, a, b, x, e: a * jnp.tanh(z) + b, ()),
    "both ways": (lambda z, a, b, x, e: a * z + b + z**2, ()),
}


@pytest.mark.parametrize("how", ENTERS)
def test_what_a_learned_prior_could_do_itself_is_told(how):
    """A prior that can move and stretch, and a model that moves and stretches what it gives, learn either: mu of 3 for 10."""
    enters, wanted = ENTERS[how]
    assert _of_effects(enters).absorbed == wanted


def test_a_fixed_prior_is_identified_and_a_shared_latent_is_as_free_as_a_param():
    enters = ENTERS["scaled and shifted"][0]
    assert _of_effects(enters, learned=False).absorbed == ()
    site = _of_effects(enters, global_scale=True)
    assert site.absorbed == ("scale", "shift")
    assert "learn it under negative_phase. The model scales or shifts it by 'scale', 'shift' wherever it uses it" in site.verdict


def test_arrays_of_numpy_are_taken_by_subsampled_rows():
    def model(v):
        tilt = numpyro.param("tilt", 0.0)
        with numpyro.plate("data", 6, subsample_size=2):
            numpyro.sample("v", TiltedDistribution(STANDARD, lambda v: -tilt * v), obs=numpyro.subsample(v, event_dim=0))

    assert _sites(model, np.zeros(6))["v"].params == ("tilt",)


def test_a_learned_base_under_a_learned_energy_is_told_too():
    def model(y, tilted):
        base = dist.Normal(numpyro.param("loc", 0.0), numpyro.param("scale", 1.0))
        tilt = numpyro.param("tilt", 0.0) if tilted else 1.0
        with numpyro.plate("data", 6):
            z = numpyro.sample("z", TiltedDistribution(base, lambda z: -tilt * z))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    assert _sites(model, jnp.zeros(6), True)["z"].absorbed == ("loc", "scale")
    assert _sites(model, jnp.zeros(6), False)["z"].absorbed == ()


def _transformed(*made_by, learned=True, after=lambda z: z):
    """A learned prior of vectors of two, transformed by what is made of ``loc`` and ``scale``."""

    def model(y):
        tilt = numpyro.param("tilt", 0.0) if learned else 1.0
        loc, scale = numpyro.param("loc", jnp.zeros(2)), jnp.exp(numpyro.param("scale", 0.0))
        prior = TiltedDistribution(STANDARD.expand([2]).to_event(1), lambda z: -tilt * z[0])
        with numpyro.plate("data", 6):
            z = numpyro.sample("z", dist.TransformedDistribution(prior, [of(loc, scale) for of in made_by]))
            numpyro.sample("y", dist.Normal(after(z), 1).to_event(1), obs=y)

    return _sites(model, jnp.zeros((6, 2)))


def _affine(loc, scale):
    return transforms.AffineTransform(loc, scale)


TRANSFORMED = {
    "scaled and shifted": ((_affine,), ("scale", "loc")),
    "shifted": ((lambda loc, scale: _affine(loc, 2.0),), ("loc",)),
    "fixed": ((lambda loc, scale: _affine(1.0, 2.0),), ()),
    "before a curve": ((_affine, lambda loc, scale: transforms.ExpTransform()), ("scale", "loc")),
    "after a curve": ((lambda loc, scale: transforms.ExpTransform(), _affine), ()),
}


@pytest.mark.parametrize("how", TRANSFORMED)
def test_what_transforms_around_a_learned_prior_do_is_told_too(how):
    """By the transforms alone, whatever the site itself does then; what else depends on the site is of it, not of them."""
    made_by, wanted = TRANSFORMED[how]
    sites = _transformed(*made_by, after=jnp.tanh)
    assert sites["z"].absorbed == wanted
    assert (sites["z"].params, sites["y"].params, sites["y"].latents) == (("tilt",), (), ("z",))


def test_transforms_around_a_fixed_prior_are_identified():
    assert _transformed(_affine, learned=False)["z"].absorbed == ()
