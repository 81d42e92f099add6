# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is refused, and that the error names the cause: tables of bad input by engine, which grow by one line a case.

Nothing here is compiled but where only the numbers can tell: an error comes before.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebm import (
    BernoulliRBM,
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ParticleMMLE,
    ScoreMatching,
    UnadjustedLangevin,
    VaGES,
    annealed_langevin,
    block_gibbs,
    find_map,
    fisher_divergence,
    ksd_test,
    log_normalizer,
    marginal_score,
    negative_phase,
    sample_posterior,
)

KEY = jax.random.key(0)
Y = jnp.array([0.4, 2.9, 1.1, 3.2, -0.6, 1.4])


def model(y):
    loc, spread = numpyro.param("loc", 0.5), numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, spread), obs=y)


def guide(y):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("x", dist.Normal(slope * y, 1))


def marginal(y):
    loc, spread = numpyro.param("loc", 0.5), numpyro.param("spread", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(loc, spread), obs=y)


def energy(y):
    center = numpyro.param("center", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyDistribution(lambda y: (y - center) ** 2 / 2), obs=y)


SGD, NOISE = optax.sgd(0.1), DenoisingScoreMatching(0.3)
ENGINES = {
    "ParticleMMLE": lambda model=model: ParticleMMLE(model, SGD, num_particles=2, step_size=0.1),
    "ScoreMatching": lambda model=marginal: ScoreMatching(model, SGD, NOISE),
    "BiSM": lambda model=model: BiSM(model, guide, SGD, SGD, NOISE),
    "VaGES": lambda model=model: VaGES(model, guide, SGD, SGD, NOISE),
    "BiDVL": lambda model=model: BiDVL(energy, guide, model, SGD, SGD, SGD),
}
engines = pytest.mark.parametrize("name", ENGINES)


def refused(message, call, *args, kind=ValueError, **kwargs):
    """``call`` ends in an error of this kind that says this."""
    with pytest.raises(kind, match=re.escape(message)):
        call(*args, **kwargs)


def untraced(*_, **__):
    pytest.fail("the model was run before its arguments were looked at")


KEYS = {
    "None": (None, "got None."),
    "an int": (0, "got 0."),
    "a float": (jnp.ones(2), "got "),
    "an array of an int": (jnp.asarray(3), "got "),
    "typed keys": (jax.random.split(KEY, 3), "it is a batch of keys of shape (3,), pass one"),
    "raw keys": (jax.random.split(jax.random.PRNGKey(0), 3), "it is a batch of keys of shape (3,), pass one"),
}
keys = pytest.mark.parametrize(("key", "got"), KEYS.values(), ids=KEYS)


@engines
@keys
def test_a_run_wants_one_key_before_anything_is_traced(name, key, got):
    engine = ENGINES[name](untraced)
    for verb in (engine.init, lambda key, y: engine.run(key, 2, y)):
        with pytest.raises(ValueError, match=re.escape("rng_key must be one random key, such as jax.random.key(0), got")) as error:
            verb(key, Y)
        assert got in str(error.value)


def test_an_autoguide_is_not_run_without_a_key():
    engine = BiSM(untraced, AutoNormal(untraced), SGD, SGD, NOISE)
    refused("rng_key must be one random key", engine.init, None, Y)


RBM = BernoulliRBM(jnp.zeros((3, 2)), jnp.zeros(3), jnp.zeros(2))
LATENT = {"loc": 0.0, "spread": 1.0}
SAMPLERS = {
    "sample_posterior": lambda key: sample_posterior(key, untraced, LATENT, Y, num_samples=2),
    "find_map": lambda key: find_map(key, untraced, LATENT, Y),
    "marginal_score": lambda key: marginal_score(untraced, untraced, {}, Y, rng_key=key),
    "sample_chains": lambda key: negative_phase(untraced, num_chains=2).sample_chains(key, {}, {}, 2, Y),
    "log_normalizer": lambda key: log_normalizer(RBM, "ais", rng_key=0 if key is None else key),  # None has its own words
    "fisher_divergence": lambda key: fisher_divergence(key, untraced, jnp.ones((3, 9, 2)), lambda v: v, SGD, 2, batch_size=3),
    "ksd_test": lambda key: ksd_test(key, jnp.ones((9, 2)), jnp.ones((9, 2))),
    "annealed_langevin": lambda key: annealed_langevin(key, lambda x: -(x**2), Y, 0.1, [1.0]),
    "block_gibbs": lambda key: block_gibbs(key, RBM, jnp.zeros((4, 3))),
    "EnergyDistribution.sample": lambda key: EnergyDistribution(jnp.square, initial=dist.Normal(0, 1)).sample(key, (3,)),
    "BiDVL.sample": lambda key: ENGINES["BiDVL"](untraced).sample(key, None, 3, Y),
    "BiDVL.refine": lambda key: ENGINES["BiDVL"](untraced).refine(key, None, UnadjustedLangevin(0.1, 2), Y),
}


@pytest.mark.parametrize("name", SAMPLERS)
@keys
def test_a_sampler_wants_one_key_before_anything_is_traced(name, key, got):
    refused("key must be one random key, such as jax.random.key(0), got", SAMPLERS[name], key)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0), np.asarray(jax.random.PRNGKey(0))], ids=["typed", "raw", "of NumPy"])
def test_one_key_is_one_in_every_form(key):
    assert jax.eval_shape(lambda: ENGINES["ScoreMatching"]().init(key, Y)).num_steps.shape == ()
