# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a step of ``BiDVL`` costs over the same mathematics written by hand in JAX, without NumPyro, for two forms of the latent
term.

The size is that of the digits of scikit-learn: visibles of 64, latents of 8, batch 256; networks of two hidden layers, 256 wide
for generator and encoder, 128 for the energy. Both sides draw as many random numbers. All run on one core, timed in turn. Run
``make bench``, or ``python benchmarks/bidvl.py --help``.
"""

import argparse

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from _timing import in_turn, show_ratio, timed, use_one_core

from numpyro_ebm import BiDVL, EnergyDistribution
from numpyro_ebm.infer import LowerLevel

NUM_VISIBLE, NUM_LATENTS, SIGMA = 64, 8, 0.25
RATE = 1e-4  # which keeps the energies of noise finite over a few hundred steps
LATENT_WEIGHT, VAE_WEIGHT = 0.5, 0.7


def init_mlp(key, *sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(sizes[:-1], sizes[1:], keys, strict=True)
    return [(jax.random.normal(key, (fan_in, fan_out)) * fan_in**-0.5, jnp.zeros(fan_out)) for fan_in, fan_out, key in pairs]


def mlp(layers, x):
    *hidden, (W, b) = layers
    for weights, bias in hidden:
        x = jax.nn.silu(x @ weights + bias)
    return x @ W + b


def init_params(args):
    keys = jax.random.split(jax.random.key(0), 3)
    wide = args.width, args.width
    return (
        init_mlp(keys[0], NUM_VISIBLE, args.energy_width, args.energy_width, 1),
        init_mlp(keys[1], NUM_VISIBLE, *wide, 2 * NUM_LATENTS),
        init_mlp(keys[2], NUM_LATENTS, *wide, NUM_VISIBLE),
    )


def make_engine(args, latent):
    theta, phi, omega = init_params(args)

    def energy(v):
        layers = numpyro.param("theta", theta)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", EnergyDistribution(lambda v: mlp(layers, v)[0], event_shape=(NUM_VISIBLE,)), obs=v)

    def encoder(v):
        loc, log_scale = jnp.split(mlp(numpyro.param("phi", phi), v), 2, -1)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    def generator(v):
        layers = numpyro.param("omega", omega)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1).expand([NUM_LATENTS]).to_event(1))
            numpyro.sample("v", dist.Normal(mlp(layers, h), SIGMA).to_event(1), obs=v)

    optims = [optax.adam(RATE)] * 3
    return BiDVL(energy, encoder, generator, *optims, lower=LowerLevel(latent, LATENT_WEIGHT, VAE_WEIGHT))


def by_engine(v, args, latent):
    """A state, and the engine's step as a function of it."""
    engine = make_engine(args, latent)
    return engine.init(jax.random.key(1), v), lambda state: engine.update(state, v)


def by_hand(v, args, latent):
    adam = optax.adam(RATE)

    def log_normal(x, loc, log_scale):
        return (-(((x - loc) * jnp.exp(-log_scale)) ** 2) / 2 - log_scale - jnp.log(2 * jnp.pi) / 2).sum(-1)

    def encode(phi, v):
        return jnp.split(mlp(phi, v), 2, -1)

    def generate(omega, key):
        h_key, v_key = jax.random.split(key)
        h = jax.random.normal(h_key, (len(v), NUM_LATENTS))
        mean = mlp(omega, h)
        return h, mean, mean + SIGMA * jax.random.normal(v_key, v.shape)

    def upper(theta, omega, key):
        _, _, generated = generate(omega, key)
        return (mlp(theta, v) - mlp(theta, generated)).mean()

    def latent_term(phi, h, mean, generated):
        if latent == "offset":
            return ((encode(jax.lax.stop_gradient(phi), generated)[0] - h) ** 2).sum(-1)
        log_joint = log_normal(h, 0.0, 0.0) + log_normal(generated, mean, jnp.log(SIGMA))
        return log_joint - log_normal(h, *encode(phi, generated))

    def negative_elbo(phi, omega, key):
        loc, log_scale = encode(phi, v)
        h = loc + jnp.exp(log_scale) * jax.random.normal(key, loc.shape)
        divergence = (jnp.exp(2 * log_scale) + loc**2 - 1) / 2 - log_scale
        return divergence.sum(-1) - log_normal(v, mlp(omega, h), jnp.log(SIGMA))

    def lower(phi_omega, theta, key):
        phi, omega = phi_omega
        draw_key, vae_key = jax.random.split(key)
        h, mean, generated = generate(omega, draw_key)
        rest = LATENT_WEIGHT * latent_term(phi, h, mean, generated) + VAE_WEIGHT * negative_elbo(phi, omega, vae_key)
        return (mlp(theta, generated)[:, 0] + rest).mean()

    def step(gradient, optim_state, params):
        updates, optim_state = adam.update(gradient, optim_state)
        return optax.apply_updates(params, updates), optim_state

    def update(state):
        theta, phi_omega, of_theta, of_phi_omega, key = state
        key, upper_key, lower_key = jax.random.split(key, 3)
        value, gradient = jax.value_and_grad(upper)(theta, phi_omega[1], upper_key)
        theta, of_theta = step(gradient, of_theta, theta)
        lower_value, gradient = jax.value_and_grad(lower)(phi_omega, theta, lower_key)
        phi_omega, of_phi_omega = step(gradient, of_phi_omega, phi_omega)
        return (theta, phi_omega, of_theta, of_phi_omega, key), (value, lower_value)

    theta, *phi_omega = init_params(args)
    phi_omega = tuple(phi_omega)
    return (theta, phi_omega, adam.init(theta), adam.init(phi_omega), jax.random.key(1)), update


def main(args):
    use_one_core()
    sizes = f"{NUM_VISIBLE} visible, {NUM_LATENTS} latents, batch {args.batch_size}"
    print(f"device {jax.devices()[0].device_kind}; {sizes}; medians of {args.repeats} rounds")
    v = jax.random.normal(jax.random.key(3), (args.batch_size, NUM_VISIBLE))
    for latent in ("exact", "offset"):
        engine, hand = (timed(*make(v, args, latent), args.num_steps) for make in (by_engine, by_hand))
        show_ratio(f"hand: {latent}", in_turn(engine, hand, repeats=args.repeats))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="of generator and encoder")
    parser.add_argument("--energy-width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-steps", type=int, default=20, help="steps in one timed loop")
    parser.add_argument("--repeats", type=int, default=61, help="rounds of timed loops")
    parser.add_argument("--smoke", action="store_true", help="a few steps of small networks, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.energy_width, args.batch_size, args.num_steps, args.repeats = 8, 8, 4, 2, 2
    main(args)
