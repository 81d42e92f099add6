# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Seconds per step of ``SVI(negative_phase(model))`` over the same mathematics written by hand in JAX.

The model is a latent energy-based prior on 64 pixels: 128 images a step, a latent of 10, a decoder, an encoder and an
energy, 256 persistent chains moved by 10 steps of MALA. The hand-written step knows nothing of NumPyro: it draws from the
encoder, evaluates the evidence lower bound, moves all chains with one batched gradient and steps Adam.

Both are compiled into one loop of steps and timed in turn, A B A B, so that the ratio holds when the machine's speed
drifts. So is the same step without the reports of chains in trouble, which on a CPU are a condition in every step, and with the
jump that a run of 10 steps makes by default. Run ``make bench``, or ``python benchmarks/negative_phase.py --help``.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from _timing import in_turn, show_ratio, timed
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import MALA, TiltedDistribution, negative_phase

LATENT, PIXELS, BATCH, NUM_CHAINS, NUM_STEPS, NOISE = 10, 64, 128, 256, 10, 0.25
GAIN, TARGET, SMALL = 0.1, 0.574, 0.25  # of MALA
OPTIM = optax.adam(1e-3)


def networks():
    keys = jax.random.split(jax.random.key(0), 3)
    energy = eqx.nn.MLP(LATENT, "scalar", 128, 2, jax.nn.silu, key=keys[0])
    decoder = eqx.nn.MLP(LATENT, PIXELS, 128, 2, jax.nn.silu, key=keys[1])
    encoder = eqx.nn.MLP(PIXELS, 2 * LATENT, 128, 2, jax.nn.silu, key=keys[2])
    return energy, decoder, encoder


def by_numpyro_ebm(images, reports=True, num_jumps=0):
    energy_net, decoder_net, encoder_net = networks()

    def model(y):
        energy, decoder = eqx_module("energy", energy_net), eqx_module("decoder", decoder_net)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1).expand([LATENT]).to_event(1), energy))
            numpyro.sample("y", dist.Normal(jax.vmap(decoder)(z), NOISE).to_event(1), obs=y)

    def guide(y):
        loc, log_scale = jnp.split(jax.vmap(eqx_module("encoder", encoder_net))(y), 2, axis=-1)
        with numpyro.plate("data", len(y)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    phase = negative_phase(model, num_chains=NUM_CHAINS, sampler=MALA(num_steps=NUM_STEPS, num_jumps=num_jumps))
    svi = SVI(phase if reports else phase.without_reports(), guide, OPTIM, Trace_ELBO())
    return svi.init(jax.random.key(1), images), lambda state: svi.update(state, images)


def by_hand(images):
    params, static = eqx.partition(networks(), eqx.is_inexact_array)

    def log_prior(energy, z):
        return -(z**2).sum(-1) / 2 - jax.vmap(energy)(z)

    def move(key, energy, x, log_h):
        def value_and_score(x):
            log_p, pullback = jax.vjp(lambda x: log_prior(energy, x), x)
            return log_p, pullback(jnp.ones_like(log_p))[0]

        def step(carry, keys):
            x, log_p, score, log_h = carry
            key, shrink = keys
            h = jnp.exp(log_h) * 10.0**-shrink
            noise_key, accept_key = jax.random.split(key)
            y = x + h * score + jnp.sqrt(2 * h) * jax.random.normal(noise_key, x.shape)
            log_p_y, score_y = value_and_score(y)
            forward, backward = ((y - x - h * score) ** 2).sum(-1), ((x - y - h * score_y) ** 2).sum(-1)
            log_a = log_p_y - log_p + (forward - backward) / (4 * h)
            accept = jnp.log(jax.random.uniform(accept_key, log_a.shape)) < log_a
            pick = lambda new, old: jnp.where(accept.reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
            mean = jnp.minimum(1, jnp.exp(log_a)).mean()
            log_h = log_h + jnp.where(shrink == 0, GAIN, 0.0) * (mean - TARGET)
            return (pick(y, x), pick(log_p_y, log_p), pick(score_y, score), log_h), None

        key, shrink_key = jax.random.split(key)
        keys = jax.random.split(key, NUM_STEPS)
        shrink = jax.random.geometric(shrink_key, 1 - SMALL, (NUM_STEPS,)) - 1
        (x, _, _, log_h), _ = jax.lax.scan(step, (x, *value_and_score(x), log_h), (keys, shrink))
        return x, log_h

    def loss(params, key, chains, log_h):
        energy, decoder, encoder = eqx.combine(params, static)
        chain_key, noise_key = jax.random.split(key)
        held = eqx.combine(jax.lax.stop_gradient(params), static)[0]  # nothing is differentiated through the chains
        chains, log_h = jax.lax.stop_gradient(move(chain_key, held, chains, log_h))
        negative = log_prior(energy, chains).mean()
        loc, log_scale = jnp.split(jax.vmap(encoder)(images), 2, axis=-1)
        noise = jax.random.normal(noise_key, loc.shape)
        z = loc + jnp.exp(log_scale) * noise
        log_q = -(noise**2 / 2 + log_scale).sum(-1)
        log_likelihood = -((images - jax.vmap(decoder)(z)) ** 2).sum(-1) / (2 * NOISE**2)
        elbo = (log_prior(energy, z) + log_likelihood - log_q - (negative - jax.lax.stop_gradient(negative))).sum()
        return -elbo, (chains, log_h)

    def update(state):
        params, optim_state, chains, log_h, key = state
        key, step_key = jax.random.split(key)
        (value, (chains, log_h)), gradient = jax.value_and_grad(loss, has_aux=True)(params, step_key, chains, log_h)
        updates, optim_state = OPTIM.update(gradient, optim_state, params)
        return (optax.apply_updates(params, updates), optim_state, chains, log_h, key), value

    chains = jax.random.normal(jax.random.key(2), (NUM_CHAINS, LATENT))
    return (params, OPTIM.init(params), chains, jnp.log(0.1), jax.random.key(1)), update


def main(args):
    images = jax.random.uniform(jax.random.key(3), (BATCH, PIXELS))
    steps = (
        by_numpyro_ebm(images),
        by_hand(images),
        by_numpyro_ebm(images, reports=False),
        by_numpyro_ebm(images, num_jumps=None),
    )
    times = in_turn(*(timed(*step, args.num_steps) for step in steps), repeats=args.repeats)
    print(f"device {jax.devices()[0].device_kind}; {args.repeats} pairs of {args.num_steps} steps; medians")
    show_ratio("SVI(negative_phase(model)) over the maths by hand", times)
    show_ratio("with reports over without", times, over=2)
    show_ratio("with a jump over without", times, column=3, over=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=200, help="steps in one timed loop")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of timed loops")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps, args.repeats = 2, 2
    main(args)
