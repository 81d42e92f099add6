# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Settings that have settings of their own. What each may be is in the table of ``test_checks.py``."""

import re
from dataclasses import FrozenInstanceError, replace
from functools import partial

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.infer
import optax
import pytest

import numpyro_ebm
from numpyro_ebm import (
    BiDVL,
    BiSM,
    ExactScoreMatching,
    Implicit,
    ImportanceWeighted,
    ParticleMMLE,
    ScoreMatching,
    Unrolled,
    VaGES,
    Variational,
    negative_phase,
    sample_posterior,
)
from numpyro_ebm.infer import Averaged, Difference, Hinge, LowerLevel, Maximize, Newton, Softplus
from numpyro_ebm.samplers import NUTS

STEP = optax.sgd(0.1)
SETTINGS = {
    "Unrolled(num_steps=3, checkpoint=False)": lambda: Unrolled(3),
    "Implicit(curvature='fisher', num_cg_steps=3, damping=0.0, tol=0.1, num_draws=2)": lambda: Implicit(
        "fisher", np.int64(3), 0, num_draws=jnp.array(2)
    ),
    "Variational(num_samples=1, covariance='none', shared_samples=False, variance_reduced=True, relaxed=False, refine=None)": (
        lambda: Variational(np.int64(1), "none", variance_reduced=np.True_)
    ),
    "Difference(num_steps=2, num_unroll_steps=3)": lambda: Difference(2, np.int64(3)),
    "Softplus(num_steps=2)": lambda: Softplus(jnp.array(2)),
    "Hinge(num_steps=2)": lambda: Hinge(np.uint8(2)),
    "LowerLevel(latent='offset', latent_weight=0.5, vae_weight=2.0, weight_bounds=(0.5, 2.0), elbo=None, num_steps=3)": (
        lambda: LowerLevel("offset", jnp.float32(0.5), 2, np.array([0.5, 2]), num_steps=3)
    ),
    "Averaged(num_data=6)": lambda: Averaged(np.int64(6)),
    "Maximize(max_steps=9)": lambda: Maximize(jnp.array(9)),
    "NUTS(target_accept_prob=0.9, max_tree_depth=5, dense_mass=True)": lambda: NUTS(np.float64(0.9), jnp.array(5), np.True_),
    "ImportanceWeighted(num_samples=3, jackknife=True)": lambda: ImportanceWeighted(jnp.array(3), jackknife=True),
}


def model(v=None):
    """Never run: settings are refused before."""
    raise AssertionError("the model was run")


def bism(**settings):
    return BiSM(model, model, STEP, STEP, ExactScoreMatching(), **settings)


def vages(**settings):
    return VaGES(model, model, STEP, STEP, ExactScoreMatching(), **settings)


def bidvl(**settings):
    return BiDVL(model, model, model, STEP, STEP, STEP, **settings)


def particles(**settings):
    return ParticleMMLE(model, STEP, 2, 0.1, **settings)


def posterior(**settings):
    return sample_posterior(jax.random.key(0), model, {}, num_samples=1, **settings)


@pytest.mark.parametrize("words", SETTINGS)
def test_a_setting_prints_as_it_is_written(words):
    # Catches numbers of NumPy or JAX that are kept as they are.
    assert repr(SETTINGS[words]()) == words


@pytest.mark.parametrize("words", SETTINGS)
def test_a_setting_is_a_value(words):
    # Catches settings that compare by identity, do not hash or pickle, can be changed after the first run, or compile twice.
    setting, equal = SETTINGS[words](), SETTINGS[words]()
    assert setting == equal == cloudpickle.loads(cloudpickle.dumps(setting))
    assert setting != type(setting)()
    assert replace(setting) == setting
    with pytest.raises(FrozenInstanceError):
        setattr(setting, next(iter(vars(setting))), None)
    runs = []

    @jax.jit(static_argnums=0)
    def traced(setting):
        runs.append(setting)
        return jnp.zeros(())

    traced(setting), traced(equal)
    assert len(runs) == 1


OLD = {
    "hypergradient": (bism, {"hypergradient": "implicit"}, "hypergradient must be Unrolled(...) or Implicit(...), got 'implicit'"),
    "a class": (bism, {"hypergradient": Implicit}, "hypergradient is the class Implicit: pass an instance, Implicit(...)"),
    "estimate": (vages, {"estimate": "jackknife"}, "estimate must be Variational(...) or ImportanceWeighted(...), got 'jackknife'"),
    "importance_weighted": (vages, {"importance_weighted": True}, "unexpected keyword argument 'importance_weighted'"),
    "drift": (particles, {"drift": "mean"}, "drift must be Summed(...) or Averaged(...), got 'mean'"),
    "m_step": (particles, {"m_step": "newton"}, "unexpected keyword argument 'm_step'"),
    "Newton elsewhere": (partial(ScoreMatching, model, Newton(STEP)), {"objective": ExactScoreMatching()}, "got Newton(optim="),
    "nuts": (posterior, {"sampler": "nuts"}, "sampler must be a sampler such as MALA(), or samplers.NUTS(), got 'nuts'"),
    "NUTS of NumPyro": (posterior, {"sampler": numpyro.infer.NUTS(model)}, "MALA(), or samplers.NUTS(), got <numpyro.infer"),
    "a class of NUTS": (posterior, {"sampler": NUTS}, "got the class NUTS: pass an instance, NUTS(...)"),
    "NUTS in a fit": (partial(negative_phase, model), {"sampler": NUTS()}, "to samplers, got NUTS("),
    "upper": (bidvl, {"upper": "hinge"}, "upper must be Difference(...), Softplus(...) or Hinge(...), got 'hinge'"),
    "lower": (bidvl, {"lower": "offset"}, "lower must be LowerLevel(...), got 'offset'"),
    "variant": (bidvl, {"variant": "offset"}, "unexpected keyword argument 'variant'"),
    "num_unroll_steps": (bism, {"num_unroll_steps": 5}, "unexpected keyword argument 'num_unroll_steps'"),
}


@pytest.mark.parametrize("name", OLD)
def test_old_forms_are_refused_with_the_new_one(name):
    # Catches a word taken for a setting, whose fields are then missing much later.
    make, settings, message = OLD[name]
    with pytest.raises(TypeError, match=re.escape(message)):
        make(**settings)


def test_no_setting_has_a_name_of_others_at_the_root():
    assert not {"NUTS", "Hinge"} & set(vars(numpyro_ebm))
