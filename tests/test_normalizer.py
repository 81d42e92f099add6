# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Annealed importance sampling against enumeration: its value, its unbiasedness and its error bar."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm import BernoulliRBM, GaussianBernoulliRBM, NormalizerError, log_normalizer


def _rbm(kind, d, m, size=0.4, seed=0):
    draw = np.random.default_rng(seed).normal
    w, b, c, scale = size * draw(size=(d, m)), draw(size=d), draw(size=m), np.exp(0.2 * draw(size=d))
    return BernoulliRBM(w, b, c) if kind == "bernoulli" else GaussianBernoulliRBM(w, b, c, scale, kind)


def test_exact_is_enumeration_without_error():
    rbm = _rbm("plain", 3, 4)
    exact = log_normalizer(rbm)
    assert exact.log_normalizer == rbm.log_normalizer()
    assert exact.standard_error == 0
    assert jnp.isinf(exact.effective_sample_size)


@pytest.mark.parametrize("kind", ["plain", "scaled", "bernoulli"])
def test_uncoupled_machine_is_known_without_error(kind):
    # Catches a wrong constant at the start, which no error bar shows.
    rbm = _rbm(kind, 5, 3)
    args = (0 * rbm.weights, rbm.visible_bias, 0 * rbm.hidden_bias)
    rbm = BernoulliRBM(*args) if kind == "bernoulli" else GaussianBernoulliRBM(*args, rbm.scale, kind)
    d_part = jnp.logaddexp(rbm.visible_bias, 0).sum() if kind == "bernoulli" else jnp.log(rbm.scale * np.sqrt(2 * np.pi)).sum()
    found = log_normalizer(rbm, "ais", rng_key=jax.random.key(0), num_chains=10, num_temperatures=3)
    np.testing.assert_allclose(found.log_normalizer, d_part + 3 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-6)
    np.testing.assert_allclose(found.effective_sample_size, 10, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "d", "m"), [("plain", 6, 10), ("scaled", 6, 10), ("bernoulli", 30, 10), ("plain", 4, 20), ("bernoulli", 25, 20)]
)
def test_ais_agrees_with_enumeration(kind, d, m):
    # Catches weights of another path than the chains', on machines where the answer is far from the start's.
    rbm = _rbm(kind, d, m, size=0.5)
    exact = rbm.log_normalizer()
    found = log_normalizer(rbm, "ais", rng_key=jax.random.key(1), num_chains=500, num_temperatures=500)
    assert abs(exact - rbm.uncoupled_log_normalizer()) > 1
    assert found.standard_error < 0.1
    assert abs(found.log_normalizer - exact) < 5 * found.standard_error


@pytest.mark.parametrize("kind", ["plain", "scaled", "bernoulli"])
def test_estimate_of_z_is_unbiased_however_few_the_temperatures(kind):
    # Catches a sweep at the wrong temperature, a weight taken after the move, and a temperature left out: all of these
    # vanish as the temperatures become many, and show when there are five and the weights are large.
    with jax.enable_x64(True):
        rbm = _rbm(kind, 3, 4, size=1.2 if kind == "bernoulli" else 0.8)
        found = log_normalizer(rbm, "ais", rng_key=jax.random.key(2), num_chains=100_000, num_temperatures=5)
        ratio = jnp.exp(found.log_normalizer - rbm.log_normalizer())
        assert found.standard_error < 0.02
        assert abs(ratio - 1) < 4.5 * ratio * found.standard_error


def test_standard_error_is_that_of_repeated_runs():
    # Catches an error bar of the log weights, or one not divided by the number of chains.
    rbm, num_runs = _rbm("plain", 4, 6), 200

    def run(key):
        return log_normalizer(rbm, "ais", rng_key=key, num_chains=100, num_temperatures=30)

    runs = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(3), num_runs))
    spread = runs.log_normalizer.std(ddof=1)
    said = jnp.sqrt((runs.standard_error**2).mean())
    assert abs(spread / said - 1) < 4.5 / np.sqrt(2 * num_runs)
    bias = (runs.log_normalizer - rbm.log_normalizer()).mean() + said**2 / 2  # of the logarithm of an unbiased mean
    assert abs(bias) < 4.5 * spread / np.sqrt(num_runs)


def test_effective_sample_size_and_standard_error_are_one_fact():
    # Catches either of them computed from other weights: with weights of mean 1, n / ESS is their mean square.
    found = log_normalizer(_rbm("plain", 6, 10), "ais", rng_key=jax.random.key(4), num_chains=200, num_temperatures=10)
    assert 1 < found.effective_sample_size < 190
    np.testing.assert_allclose(found.standard_error**2, (200 / found.effective_sample_size - 1) / 199, rtol=1e-4)


def test_batch_of_machines_is_estimated_at_once_and_compiled():
    # Catches weights that mix the machines of a batch.
    one, two = _rbm("plain", 3, 4), _rbm("plain", 3, 4, seed=1)
    both = GaussianBernoulliRBM(*[jnp.stack([getattr(m, name) for m in (one, two)]) for name in FIELDS])

    @jax.jit
    def estimate(rbm):
        return log_normalizer(rbm, "ais", rng_key=jax.random.key(5), num_chains=1000, num_temperatures=100)

    found = estimate(both)
    assert [x.shape for x in found] == [(2,)] * 3
    exact = jnp.stack([one.log_normalizer(), two.log_normalizer()])
    assert (abs(found.log_normalizer - exact) < 5 * found.standard_error).all()
    assert (abs(found.log_normalizer - exact[::-1]) > 5 * found.standard_error).all()


FIELDS = ("weights", "visible_bias", "hidden_bias", "scale")


def test_memory_does_not_grow_with_the_temperatures():
    # Catches chains kept at every temperature.
    def temporaries(num_temperatures):
        def estimate(rbm, key):
            return log_normalizer(rbm, "ais", rng_key=key, num_chains=100, num_temperatures=num_temperatures)

        compiled = jax.jit(estimate).lower(_rbm("plain", 20, 10), jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2000) - temporaries(20) < 3 * 4 * 2000  # the temperatures themselves


def test_float32_machine_is_estimated_in_float32_under_x64():
    with jax.enable_x64(True):
        rbm = GaussianBernoulliRBM(*[np.float32(x) for x in (np.ones((2, 3)), np.zeros(2), np.zeros(3), np.ones(2))])
        found = log_normalizer(rbm, "ais", rng_key=jax.random.key(0), num_chains=10, num_temperatures=5)
        assert {str(x.dtype) for x in found} == {"float32"}


def test_estimate_refuses_a_gradient_that_it_does_not_have():
    # Catches a gradient of 0, or one through the Gaussian draws alone, that looks like an answer.
    def estimate(w, method):
        rbm = GaussianBernoulliRBM(w, jnp.zeros(2), jnp.zeros(3))
        return log_normalizer(rbm, method, rng_key=jax.random.key(0), num_chains=10, num_temperatures=5).log_normalizer

    with pytest.raises(NormalizerError, match="AIS estimate of log Z has no gradient"):
        jax.grad(estimate)(jnp.ones((2, 3)), "ais")
    assert (jax.grad(estimate)(jnp.ones((2, 3)), "exact") > 0).all()


def test_sampling_without_a_key_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="pass rng_key"):
        log_normalizer(_rbm("plain", 2, 3), method="ais")


def test_other_distributions_are_refused():
    with pytest.raises(TypeError, match="is for GaussianBernoulliRBM and BernoulliRBM, got ndarray"):
        log_normalizer(np.zeros(3))
