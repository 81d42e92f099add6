# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Example: a latent energy-based prior for handwritten digits
"""

import argparse
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import numpyro
import numpyro.distributions as dist
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import MALA, TiltedDistribution, check_model, negative_phase, to_inference_data

LATENT_DIM = 16
WIDTH = 256
ENERGY_WIDTH = 128
NOISE = 0.15
BATCH = 256
NUM_CHAINS = 512
NUM_STEPS = 3000
LR = 1e-3
ENERGY_LR = 3e-4
MALA_STEPS = 10
WD = 0.0
DEPTH = 2


def make_nets(key):
    keys = jax.random.split(key, 3)
    return {
        "decoder": eqx.nn.MLP(LATENT_DIM, 64, WIDTH, DEPTH, jax.nn.silu, jax.nn.sigmoid, key=keys[0]),
        "encoder": eqx.nn.MLP(64, 2 * LATENT_DIM, WIDTH, DEPTH, jax.nn.silu, key=keys[1]),
        "energy": eqx.nn.MLP(LATENT_DIM, "scalar", ENERGY_WIDTH, 2, jax.nn.silu, key=keys[2]),
    }


def model(images, nets, energy_prior=True):
    decoder = eqx_module("decoder", nets["decoder"])
    prior = dist.Normal(0, 1).expand([LATENT_DIM]).to_event(1)
    if energy_prior:
        prior = TiltedDistribution(prior, eqx_module("energy", nets["energy"]))
    with numpyro.plate("digits", len(images), subsample_size=min(BATCH, len(images))):
        batch = numpyro.subsample(images, event_dim=1)
        z = numpyro.sample("z", prior)
        numpyro.sample("image", dist.Normal(jax.vmap(decoder)(z), NOISE).to_event(1), obs=batch)


def encode(encoder, images):
    loc, scale = jnp.split(jax.vmap(encoder)(images), 2, axis=-1)
    return loc, jax.nn.softplus(scale)


def guide(images, nets, energy_prior=True):
    encoder = eqx_module("encoder", nets["encoder"])
    with numpyro.plate("digits", len(images), subsample_size=min(BATCH, len(images))):
        loc, scale = encode(encoder, numpyro.subsample(images, event_dim=1))
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


def make_optimizer(num_steps):
    def adam(rate):
        return optax.chain(optax.clip_by_global_norm(1e4), optax.adamw(optax.cosine_decay_schedule(rate, num_steps, 0.05), weight_decay=WD))
    label = lambda params: {name: "energy" if name.startswith("energy") else "nets" for name in params}
    return optax.multi_transform({"energy": adam(ENERGY_LR), "nets": adam(LR)}, label)


def mmd2(x, y, sd):
    def k(a, b):
        d = ((a**2).sum(-1)[:, None] + (b**2).sum(-1) - 2 * a @ b.T)
        return np.exp(-d / (2 * sd**2))
    n, m = len(x), len(y)
    xx, yy = k(x, x), k(y, y)
    return (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * k(x, y).mean()
