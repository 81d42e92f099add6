# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The negative phase inside an engine, whichever it is: what an author of an engine calls."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_ebm import NormalizerError, TiltedDistribution, UnadjustedLangevin, negative_phase
from numpyro_ebm.infer.phase import Phase, has_chains, health_of_chains
from numpyro_ebm.program.run import log_density_terms
from numpyro_ebm.train.health import Part

KEY = jax.random.key(3)
Y = jnp.array([0.5, 1.0, 3.0])
Z = {"z": jnp.array([0.2, 1.0, 0.7])}


def tilted(y):
    tilt = numpyro.param("tilt", 0.3)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)


def fixed(y):
    loc = numpyro.param("loc", 0.3)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: z**4))
        numpyro.sample("y", dist.Normal(loc + z, 1), obs=y)


def start(model, params):
    phase = Phase(model)
    return phase, phase.start(phase.report(params, (Y,), {}), KEY, (Y,), {}, data=params, latents=Z)


def gradient_of(phase, params, mutable):
    def terms(model, params):
        return log_density_terms(model, (Y,), {}, KEY, data={**params, **mutable}, latents=Z)

    return phase.gradient(terms, params)


def test_gradient_is_minus_the_mean_over_the_chains_for_every_row():
    # Catches terms of the model itself among those of the normalizer, the plate's rows counted once, and chains that rest.
    phase, mutable = start(negative_phase(tilted, num_chains=50), {"tilt": 0.3})
    gradient, moved = gradient_of(phase, {"tilt": 0.3}, mutable)
    np.testing.assert_allclose(gradient["tilt"], -3 * moved["z/chains"]["x"].mean(), rtol=1e-5)
    assert (moved["z/chains"]["x"] != mutable["z/chains"]["x"]).any()


@pytest.mark.parametrize(("model", "wanted"), [(tilted, True), (fixed, False), (negative_phase(tilted, num_chains=7), True)])
def test_chains_are_kept_where_a_gradient_needs_them(model, wanted):
    # Catches chains of an energy without parameters, and a handler that is put around one that was given.
    params = {"loc": 0.3} if model is fixed else {"tilt": 0.3}
    _, mutable = start(model, params)
    assert has_chains(mutable) is wanted
    if isinstance(model, negative_phase):
        assert mutable["z/chains"]["x"].shape == (7,)


def test_what_chains_say_is_told_between_steps():
    # Catches a warning taken for an error, and an error for a warning.
    phase, mutable = start(negative_phase(tilted, num_chains=5, sampler=UnadjustedLangevin(0.1, 1)), {"tilt": 0.3})
    for status, health in ((0, 0), (1, 0), (2, 2)):
        mutable["z/chains"]["status"] = jnp.asarray(status)
        assert {part: int(code) for part, code in health_of_chains(mutable).items()} == {Part("chains", "z"): health}
        warned = phase.warnings(mutable, (Y,), {}, data={"tilt": 0.3, **mutable})
        assert len(warned) == (status == 1)
    assert phase.explain("z", 2, (Y,), {}, data={"tilt": 0.3, **mutable}).startswith("site 'z': ")


def test_normalizer_of_a_latent_is_refused():
    def nested(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: scale * z**2))

    with pytest.raises(NormalizerError, match="doubly intractable"):
        Phase(nested).report({}, (Y,), {})
