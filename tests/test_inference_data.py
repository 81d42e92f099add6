# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""to_inference_data: groups, dims, coordinates and errors, on the ArviZ that is installed."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebm import (
    BiDVL,
    EnergyDistribution,
    ParticleMMLE,
    TiltedDistribution,
    negative_phase,
    sample_posterior,
    to_inference_data,
)

Y = jnp.arange(5.0)[:, None] + jnp.zeros(2)


def _model(y=None):
    tilt = numpyro.param("tilt", jnp.zeros(2))
    prior = TiltedDistribution(dist.Normal(0, 1).expand([2]).to_event(1), lambda z: -tilt @ z)
    with numpyro.plate("data", 5):
        z = numpyro.sample("z", prior)
        numpyro.sample("y", dist.Normal(z, 1).to_event(1), obs=y)


@pytest.fixture(scope="module")
def fit():
    model = negative_phase(_model, num_chains=4)
    guide = AutoNormal(model)
    result = SVI(model, guide, optax.adam(0.1), Trace_ELBO()).run(jax.random.key(0), 7, Y, progress_bar=False)
    posterior = Predictive(guide, params=result.params, num_samples=6)(jax.random.key(1))
    draws, _ = model.sample_chains(jax.random.key(2), result.params, result.state.mutable_state, 9, Y)
    return result, {"z": posterior["z"]}, draws


def _groups(data):
    return {name.strip("/") for name in (data.groups() if callable(data.groups) else data.groups)} - {""}


def test_groups_and_dims_are_as_documented(fit):
    # guards against: chains and draws exchanged, posterior draws taken for chains, lost losses
    result, posterior, draws = fit
    data = to_inference_data(result, chains=draws, posterior=posterior, observed_data={"y": Y})
    assert _groups(data) == {"posterior", "prior", "observed_data", "sample_stats_prior", "fit"}
    assert dict(data["posterior"]["z"].sizes) == {"chain": 1, "draw": 6, "z_dim_0": 5, "z_dim_1": 2}
    assert dict(data["prior"]["z"].sizes) == {"chain": 4, "draw": 9, "z_dim_1": 2}  # the posterior's z_dim_1, no plate
    assert dict(data["observed_data"]["y"].sizes) == {"y_dim_0": 5, "y_dim_1": 2}
    np.testing.assert_array_equal(data["prior"]["z"].values, draws["z"])
    np.testing.assert_array_equal(data["posterior"]["z"].values[0], posterior["z"])
    np.testing.assert_array_equal(data["fit"]["loss"].values, result.losses)
    statistics = data["sample_stats_prior"].sel(energy_site="z")
    assert statistics["num_updates"] == 8  # 7 steps and the one of init
    np.testing.assert_allclose(statistics["step_size"], result.state.mutable_state["z/chains"]["step_size"])


def test_without_draws_the_prior_is_where_the_chains_stand(fit):
    result, _, _ = fit
    for state in (result, result.state, result.state.mutable_state):
        data = to_inference_data(state)
        np.testing.assert_array_equal(data["prior"]["z"].values[:, 0], result.state.mutable_state["z/chains"]["x"])
    assert "fit" not in _groups(data)  # a mutable state has no losses


def test_dims_and_coords_are_named_by_the_user(fit):
    # guards against: the plate's name given to the chains, which have no plate
    result, posterior, _ = fit
    data = to_inference_data(
        result,
        posterior=posterior,
        posterior_predictive={"y": posterior["z"]},
        dims={"z": ["image", "latent"], "y": ["image", "pixel"]},
        coords={"latent": ["a", "b"]},
    )
    assert data["posterior"]["z"].dims == ("chain", "draw", "image", "latent")
    assert data["prior"]["z"].dims == ("chain", "draw", "latent")
    assert list(data["prior"]["latent"].values) == ["a", "b"]
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "image", "pixel")


def test_arviz_reads_and_writes_it(fit, tmp_path):
    # guards against: a container that ArviZ cannot summarize or save
    result, posterior, draws = fit
    data = to_inference_data(result, chains=draws, posterior=posterior)
    prior = data["prior"]["z"].to_dataset(name="z")  # one form for both ArviZ 0 and 1
    assert np.isfinite(az.ess(prior)["z"]).all()
    data.to_netcdf(tmp_path / "fit.nc")
    again = az.from_netcdf(tmp_path / "fit.nc")
    np.testing.assert_array_equal(again["prior"]["z"].values, draws["z"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": {"u": jnp.zeros((4, 1, 2))}}, r"chains names \['u'\], which is no site here: the sites are \['z'\]"),
        ({"coords": {"latent": [0, 1]}}, r"coords names \['latent'\], which is no dim here: the dims are .*'z_dim_0'"),
        ({"dims": {"u": ["latent"]}}, r"dims names \['u'\], which is no site here: the sites are \['z'\]"),
        ({"dims": {"z": ["a", "b"]}}, r"site 'z': dims gives 2 names \['a', 'b'\] to 1 dimensions"),
    ],
)
def test_unknown_sites_and_wrong_dims_are_refused(fit, options, message):
    with pytest.raises(ValueError, match=message):
        to_inference_data(fit[0], **options)


def test_what_sample_chains_returns_must_be_unpacked(fit):
    result, _, draws = fit
    with pytest.raises(TypeError, match=r"sample_chains returns \(draws, mutable_state\), pass the first"):
        to_inference_data(result, chains=(draws, {}))


def test_a_state_without_chains_is_refused():
    with pytest.raises(ValueError, match=r"no negative chains: pass the result of SVI on negative_phase"):
        to_inference_data({"batchnorm": {"mean": 0.0}})


# Particles.


def _schools(y=None, num_data=None, batch_size=None):
    loc = numpyro.param("loc", jnp.zeros(2))
    with numpyro.plate("school", num_data if y is None else len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(loc, 1).to_event(1))
        scale = numpyro.sample("scale", dist.Gamma(2, 2))
        numpyro.deterministic("twice", 2 * x)
        numpyro.factor("penalty", -(x**2).sum(-1))
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", dist.Normal(x, 1 + scale[:, None]).to_event(1), obs=y, infer={"event_dims": ["test"]})


@pytest.fixture(scope="module")
def cloud():
    engine = ParticleMMLE(_schools, optax.adam(0.1), num_particles=6, step_size=0.01)
    return engine, engine.run(jax.random.key(0), 12, Y, batch_size=3, collect=engine.get_params, progress_bar=False)


def _of(engine, result, **options):
    return to_inference_data(result, model=engine.model, model_args=(Y,), model_kwargs={"batch_size": 3}, **options)


def test_particles_are_draws_of_one_chain_with_the_names_of_plates(cloud):
    # catches particles as chains (R-hat would mean nothing), unconstrained values, a batch instead of all rows, factors as data
    engine, result = cloud
    data = _of(engine, result, coords={"school": list("abcde")})
    assert _groups(data) == {"posterior", "observed_data", "fit"}
    assert data["posterior"]["x"].dims == ("chain", "draw", "school", "x_dim_1")
    assert data["posterior"]["scale"].dims == ("chain", "draw", "school")
    particles = engine.get_particles(result.state, Y, batch_size=3)
    for name in ("x", "scale"):
        np.testing.assert_allclose(data["posterior"][name].values[0], particles[name], rtol=1e-6)
    assert list(data["observed_data"].data_vars) == ["y"]
    assert data["observed_data"]["y"].dims == ("school", "test")
    np.testing.assert_array_equal(data["observed_data"]["y"].values, Y)
    assert list(data["posterior"]["school"].values) == list("abcde")
    assert dict(data["fit"]["loc"].sizes) == {"step": 12, "loc_dim_0": 2}
    np.testing.assert_array_equal(data["fit"]["loc"].values[-1], result.params["loc"])
    np.testing.assert_array_equal(data["fit"]["loss"].values, result.losses)


def test_predictions_and_names_of_the_user_go_with_particles(cloud):
    engine, result = cloud
    particles = engine.get_particles(result.state, Y)
    predicted = Predictive(_schools, params=result.params, posterior_samples=particles)(jax.random.key(1), num_data=5)
    assert predicted["y"].shape == (6, 5, 2)
    data = _of(engine, result.state, posterior_predictive=predicted, dims={"x": ["school", "trait"]})
    assert data["posterior"]["x"].dims == ("chain", "draw", "school", "trait")
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "school", "test")
    assert data["posterior_predictive"]["twice"].dims == ("chain", "draw", "school", "twice_dim_1")
    np.testing.assert_array_equal(data["posterior_predictive"]["y"].values[0], predicted["y"])


@pytest.mark.parametrize("is_told_by", ["model", "particles"])
def test_samples_with_other_dims_in_front_than_they_are_said_to_have_are_refused(cloud, is_told_by):
    """Chains of samples were samples of an event with one dim more, and single samples would be chains of a smaller one."""
    engine, result = cloud
    settings = {"model": engine.model, "model_args": (Y,)} if is_told_by == "model" else {}
    samples = {"scale": jnp.ones((20, 5))}
    chains = {"scale": jnp.ones((3, 20, 5))}
    told = r"site 'scale': samples of shape .* must be of shape .* \+ \(5,\), which the site has in the model: pass batch_ndims="
    with pytest.raises(ValueError, match=told + "2"):
        to_inference_data(result, posterior=chains, **settings)
    with pytest.raises(ValueError, match=told + "1"):
        to_inference_data(result, posterior=samples, batch_ndims=2, **settings)
    for given, batch_ndims in ((samples, 1), (chains, 2)):
        data = to_inference_data(result, posterior=given, batch_ndims=batch_ndims, **settings)
        assert data["posterior"]["scale"].shape[2:] == (5,)


def _shown(y):
    """Five schools of two tests, and a site that is in no plate."""
    loc = numpyro.sample("loc", dist.Normal(0, 1).expand([2]).to_event(1))
    with numpyro.plate("school", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 1).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1).to_event(1), obs=y)


def _of_shown(**given):
    return to_inference_data({}, model=_shown, model_args=(jnp.ones((5, 2)),), **given)


WRONG_SHAPES = {
    "one sample of the prior": ({"prior": {"loc": jnp.ones(2)}}, r"\+ \(2,\), .*: x\[None\] is one sample x"),
    "one in a plate": (
        {"prior": {"x": jnp.ones((5, 2))}},
        r"\+ \(5, 2\), .*: x\[None\] is .* samples x of one row",
    ),
    "the data": ({"posterior_predictive": {"y": jnp.ones((5, 2))}}, r"\+ \(5, 2\), .*: x\[None\] is one sample x"),
    "one chain": (
        {"posterior": {"x": jnp.ones((5, 2))}, "batch_ndims": 2},
        r"\(num_chains, num_samples\).*: x\[None, None\] is",
    ),
    "transposed": ({"posterior": {"x": jnp.ones((9, 2, 5))}}, r"of shape \(9, 2, 5\), .*: transpose its dims"),
    "another dim": ({"posterior": {"x": jnp.ones((9, 5, 3))}}, r"\+ \(5, 2\), .*: pass samples of all of it"),
    "one row of the posterior": ({"posterior": {"x": jnp.ones((9, 2))}}, r"\+ \(5, 2\), .*: pass samples of all of it"),
    "a part of an event": ({"prior": {"x": jnp.ones(9)}}, r"\+ \(5, 2\), .*: pass samples of all of it"),
    "chains": ({"prior_predictive": {"y": jnp.ones((3, 9, 5, 2))}}, r"\+ \(5, 2\), .*: pass batch_ndims=2"),
    "other rows": ({"observed_data": {"y": jnp.ones((4, 2))}}, r"observed_data are of shape \(4, 2\), and the site has \(5, 2\)"),
    "another site": (
        {"posterior": {"u": jnp.ones(9)}},
        r"posterior has sites \['u'\] that the model does not have: .*'x', 'y'",
    ),
    "other data": ({"observed_data": {"u": jnp.ones(9)}}, r"observed_data has sites \['u'\] that the model does not have"),
}


@pytest.mark.parametrize(("given", "message"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_what_is_not_of_the_shape_of_its_site_is_refused(given, message):
    """Catches one sample whose rows are taken for draws, and values that stand at other schools and tests than theirs."""
    with pytest.raises(ValueError, match=message):
        _of_shown(**given)


def test_samples_of_the_prior_may_be_of_all_rows_or_of_one():
    for x in (jnp.ones((9, 5, 2)), jnp.ones((9, 2))):
        assert _of_shown(prior={"x": x})["prior"]["x"].shape == (1, *x.shape)
    assert _of_shown(prior={"x": jnp.ones((1, 5, 2))}, batch_ndims=2)["prior"]["x"].shape == (1, 5, 2)  # 5 of one row


def test_draws_at_fixed_parameters_are_chains_that_arviz_summarizes(cloud):
    # catches chains and draws exchanged, and a container that az.summary or az.plot_forest cannot read
    engine, result = cloud
    particles = engine.get_particles(result.state, Y)
    draws = sample_posterior(jax.random.key(1), _schools, result.params, Y, start=particles, num_samples=20, num_warmup=10)
    predicted = Predictive(_schools, params=result.params, posterior_samples=draws, batch_ndims=2)(jax.random.key(1), num_data=5)
    data = _of(engine, result, posterior=draws, posterior_predictive=predicted, batch_ndims=2)
    assert dict(data["posterior"]["scale"].sizes) == {"chain": 6, "draw": 20, "school": 5}
    assert dict(data["posterior_predictive"]["y"].sizes) == {"chain": 6, "draw": 20, "school": 5, "test": 2}
    summary = az.summary(data, var_names=["scale"], round_to="none")
    assert list(summary.index) == [f"scale[{i}]" for i in range(5)]
    np.testing.assert_allclose(summary["mean"].astype(float), draws["scale"].mean((0, 1)), rtol=1e-5)
    assert np.isfinite(summary["r_hat"].astype(float)).all()


def test_forest_of_particles_is_drawn(cloud):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    engine, result = cloud
    az.plot_forest(_of(engine, result), var_names=["scale"], combined=True)
    matplotlib.pyplot.close("all")


def test_every_run_of_a_stacked_state_is_a_chain():
    # catches runs flattened into draws, and negative chains of several runs taken for draws
    def step(state):
        state, losses = jax.lax.scan(lambda state, _: engine.update(state, Y), state, None, 4)
        return state, losses

    engine = ParticleMMLE(negative_phase(_model, num_chains=3), optax.adam(0.1), num_particles=6, step_size=0.01)
    states, losses = jax.vmap(lambda key: step(engine.init(key, Y)))(jax.random.split(jax.random.key(0), 2))
    data = to_inference_data(states, model=engine.model, model_args=(Y,), losses=losses)
    assert dict(data["posterior"]["z"].sizes) == {"chain": 2, "draw": 6, "data": 5, "z_dim_1": 2}
    np.testing.assert_allclose(data["posterior"]["z"].values, states.particles["z"], rtol=1e-6)
    assert dict(data["prior"]["z"].sizes) == {"chain": 6, "draw": 1, "z_dim_1": 2}
    np.testing.assert_array_equal(data["prior"]["z"].values[3, 0], states.mutable_state["z/chains"]["x"][1, 0])
    assert dict(data["fit"]["loss"].sizes) == {"chain": 2, "step": 4}


def test_plates_name_the_dims_of_an_svi_fit(fit):
    # catches names of plates given to negative chains, which have none
    result, posterior, _ = fit
    data = to_inference_data(result, model=negative_phase(_model), model_args=(Y,), posterior=posterior)
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_1")
    assert data["prior"]["z"].dims == ("chain", "draw", "z_dim_1")
    assert data["observed_data"]["y"].dims == ("data", "y_dim_1")
    prior = to_inference_data(result, model=negative_phase(_model), model_args=(Y,))["prior"]
    assert prior["z"].dims == ("chain", "draw", "z_dim_1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"the particles in the state are unconstrained: pass model=engine.model"),
        ({"posterior": {"x": jnp.zeros((6, 5, 2))}, "batch_ndims": 3}, r"batch_ndims must be 1, for draws, or 2"),
        (
            {"posterior": {"x": jnp.zeros((6, 5, 2))}, "trace": {"loss": jnp.zeros(12)}},
            r"param 'loss' has the name that the losses",
        ),
    ],
)
def test_what_particles_lack_is_told(cloud, options, message):
    with pytest.raises(ValueError, match=message):
        to_inference_data(cloud[1], **options)


def test_latents_and_data_of_a_generator_are_prior_groups():
    # catches draws taken for chains, and the encoder's draws of every row named unlike the generator's of none
    def energy(v):
        loc = numpyro.param("loc", jnp.zeros(2))
        with numpyro.plate("row", len(v)):
            numpyro.sample("v", EnergyDistribution(lambda v: ((v - loc) ** 2).sum(), (2,)), obs=v)

    def encoder(v):
        shift = numpyro.param("shift", 0.0)
        with numpyro.plate("row", len(v)):
            numpyro.sample("h", dist.Normal(v + shift, 1).to_event(1))

    def generator(v):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("row", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("v", dist.Normal(h + mean, 1).to_event(1), obs=v)

    v = jax.random.normal(jax.random.key(0), (7, 2))
    engine = BiDVL(energy, encoder, generator, *[optax.adam(0.1)] * 3)
    result = engine.run(jax.random.key(1), 3, v, progress_bar=False, collect=engine.get_params)
    latents = Predictive(engine.encoder, params=result.params, num_samples=4)(jax.random.key(2), v)
    drawn = engine.sample(jax.random.key(3), result.state, 5, v)
    data = to_inference_data(
        result,
        model=engine.model,
        model_args=(v,),
        posterior=latents,
        prior={"h": drawn["h"]},
        prior_predictive={"v": drawn["v"]},
        dims={"h": ["row", "latent"], "v": ["row", "pixel"]},
    )
    assert dict(data["posterior"]["h"].sizes) == {"chain": 1, "draw": 4, "row": 7, "latent": 2}
    assert dict(data["prior"]["h"].sizes) == {"chain": 1, "draw": 5, "latent": 2}
    assert dict(data["prior_predictive"]["v"].sizes) == {"chain": 1, "draw": 5, "pixel": 2}
    np.testing.assert_array_equal(data["prior"]["h"].values[0], drawn["h"])
    np.testing.assert_array_equal(data["observed_data"]["v"].values, v)
    assert set(data["fit"].data_vars) == {"loss", "loc", "shift", "mean"}
