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

from numpyro_ebm import TiltedDistribution, negative_phase, to_inference_data

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
    # guards against: a container that ArviZ cannot summarise or save
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
