# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a step of ``ParticleMMLE`` costs: over the same mathematics by hand, against the number of particles and of data.

The model is a decoder of 2 layers from a latent of 10 to 64 pixels, learned with Adam.

* ``hand``: seconds per ``update`` over the same mathematics written by hand in JAX (particles, decoder, optimizer; no NumPyro).
* ``particles``, ``data``: seconds per step and megabytes of the state against the number of particles and of data, and the
  slope of log seconds against log size: 1 is linear, less where a fixed cost still counts.
* ``minibatch``: batches of 256 out of 100 000 data with 10 particles each, over batches of 256 out of 1 000: 1 if a step
  costs what its batch costs. The second ratio is over the same mathematics by hand, with NumPyro's sampling of the batch.
* ``jump``: a step with ``kernel="mala"`` and its jump under an energy prior, over one without the jump; the energy is fixed, so
  that there are no negative chains, whose cost would hide it.

What is compared is timed in turn, A B A B, so that the ratio holds when the machine's speed drifts. Run ``make bench``, or
``python benchmarks/particle_mmle.py --help``.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _timing import in_turn, show_ratio, timed
from numpyro.contrib.module import eqx_module

from numpyro_ebm import ParticleMMLE, TiltedDistribution

LATENT, PIXELS, NOISE, STEP_SIZE = 10, 64, 0.25, 1e-3
OPTIM = optax.adam(1e-3)
ENERGY = eqx.nn.MLP(LATENT, "scalar", 128, 2, jax.nn.silu, key=jax.random.key(4))
DECODER = eqx.nn.MLP(LATENT, PIXELS, 128, 2, jax.nn.silu, key=jax.random.key(0))


def model(images, batch_size=None):
    decoder = eqx_module("decoder", DECODER)
    with numpyro.plate("data", len(images), subsample_size=batch_size):
        batch = numpyro.subsample(images, event_dim=1)
        z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENT]).to_event(1))
        numpyro.sample("y", dist.Normal(jax.vmap(decoder)(z), NOISE).to_event(1), obs=batch)


def with_energy(images):
    decoder = eqx_module("decoder", DECODER)
    with numpyro.plate("data", len(images)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1).expand([LATENT]).to_event(1), ENERGY))
        numpyro.sample("y", dist.Normal(jax.vmap(decoder)(z), NOISE).to_event(1), obs=images)


def with_jumps(images, num_jumps):
    engine = ParticleMMLE(with_energy, OPTIM, 10, kernel="mala", num_jumps=num_jumps)
    return engine.init(jax.random.key(1), images), lambda state: engine.update(state, images)


def by_engine(images, num_particles, batch_size=None):
    """A state, and the engine's step as a function of it."""
    engine = ParticleMMLE(model, OPTIM, num_particles, STEP_SIZE)
    state = engine.init(jax.random.key(1), images, batch_size=batch_size)
    return state, lambda state: engine.update(state, images, batch_size=batch_size)


def by_hand(images, num_particles, batch_size=None):
    params, static = eqx.partition(DECODER, eqx.is_inexact_array)
    scale = 1 if batch_size is None else len(images) / batch_size

    def log_joint(params, z, images):
        mean = jax.vmap(eqx.combine(params, static))(z)
        log_prior = -(z**2 + jnp.log(2 * jnp.pi)).sum() / 2
        return log_prior - (((images - mean) / NOISE) ** 2 + jnp.log(2 * jnp.pi * NOISE**2)).sum() / 2

    def step(params, optim_state, z, images, noise_key):
        def log_joints(params, z):
            return jax.vmap(log_joint, (None, 0, None))(params, z, images).sum()

        value, (of_params, score) = jax.value_and_grad(log_joints, (0, 1))(params, z)
        gradient = jax.tree.map(lambda g: -scale * g / num_particles, of_params)
        updates, optim_state = OPTIM.update(gradient, optim_state, params)
        z = z + STEP_SIZE * score + jnp.sqrt(2 * STEP_SIZE) * jax.random.normal(noise_key, z.shape)
        return optax.apply_updates(params, updates), optim_state, z, -scale * value / num_particles

    def update(state):
        params, optim_state, z, key = state
        key, noise_key, batch_key = jax.random.split(key, 3)
        if batch_size is None:
            params, optim_state, z, loss = step(params, optim_state, z, images, noise_key)
            return (params, optim_state, z, key), loss
        with numpyro.handlers.seed(rng_seed=batch_key), numpyro.plate("data", len(images), batch_size) as rows:
            pass  # the same sample of a batch
        params, optim_state, batch, loss = step(params, optim_state, z[:, rows], images[rows], noise_key)
        return (params, optim_state, z.at[:, rows].set(batch), key), loss

    z = jax.random.normal(jax.random.key(2), (num_particles, len(images), LATENT))
    return (params, OPTIM.init(params), z, jax.random.key(1)), update


def megabytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)) / 1e6


def slope(sizes, seconds):
    return np.polyfit(np.log(sizes), np.log(seconds), 1)[0]


def main(args):
    print(f"device {jax.devices()[0].device_kind}; medians of {args.repeats} rounds of {args.num_steps} steps")
    key, size = jax.random.key(3), 256
    images = jax.random.uniform(key, (size, PIXELS))
    times = in_turn(*(timed(*make(images, 10), args.num_steps) for make in (by_engine, by_hand)), repeats=args.repeats)
    show_ratio("hand: one step of the engine over the mathematics by hand", times)
    times = in_turn(*(timed(*with_jumps(images, n), args.num_steps) for n in (1, 0)), repeats=args.repeats)
    show_ratio("jump: an adjusted step with its jump over one without", times)

    for title, sizes, make in (
        ("particles", args.particles, lambda n: by_engine(images, n)),
        ("data", args.data, lambda n: by_engine(jax.random.uniform(key, (n, PIXELS)), 4)),
    ):
        problems = [make(n) for n in sizes]
        times = np.median(in_turn(*(timed(*p, max(args.num_steps // 5, 1)) for p in problems), repeats=args.repeats), 0)
        for n, (state, _), seconds in zip(sizes, problems, times, strict=True):
            print(f"{title}: {n:>7} {seconds * 1e3:9.2f} ms a step {megabytes(state):9.2f} MB of state")
        print(f"{title}: slope of log seconds {slope(sizes, times):.2f}")

    many = jax.random.uniform(key, (args.many, PIXELS))
    problems = by_engine(many, 10, size), by_engine(many[:1000], 10, size), by_hand(many, 10, size)
    times = in_turn(*(timed(*p, args.num_steps) for p in problems), repeats=args.repeats)
    show_ratio(f"minibatch: {args.many} data over 1000", times)
    show_ratio(f"minibatch: {args.many} data over the mathematics by hand", times, 0, 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=50, help="steps in one timed loop")
    parser.add_argument("--repeats", type=int, default=11, help="rounds of timed loops")
    parser.add_argument("--many", type=int, default=100_000, help="data of the minibatch comparison")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.particles, args.data = (1, 2, 4, 8, 16, 32), (256, 1024, 4096, 16384)
    if args.smoke:
        args.num_steps, args.repeats, args.many, args.particles, args.data = 2, 2, 2000, (1, 2), (256, 512)
    main(args)
