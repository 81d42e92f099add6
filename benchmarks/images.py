# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a step of ``examples/energy_prior_images.py`` costs: a latent energy-based prior of images of 32 x 32 by EBIPLA.

* ``step``: seconds per step of ``ParticleMMLE.ebipla`` over the same mathematics by hand in JAX (the same networks, batch,
  particles and moves of the prior's chains in one compiled ``scan``), and over eager PyTorch where it can be imported; each with
  networks of float32 multiplied in full, of float32 as the device multiplies by default (TF32 on a GPU), and of bfloat16.
* ``decoder``: the generator forward and backward inside a compiled loop, its transposed convolutions written in several ways:
  ``deconv``, one call of XLA's convolution; ``subpixel``, the same as a convolution of the small image to four times the
  channels; ``matmul``, the same as a matrix product and a sum. ``resize`` is another function: nearest pixels, then a convolution
  of 3 x 3; ``resize, windows`` is that with the convolution as a matrix product.

On a CPU seconds are those of the processors. What is compared runs in turn, A B A B. On a CPU it takes a small size; ``--full``
takes the published one, as on a GPU. ``python benchmarks/images.py --help``.
"""

import argparse
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _timing import compiled, in_turn, show_ratio, timed, timed_eagerly
from jax import lax
from numpyro.contrib.module import eqx_module

from numpyro_ebm import ParticleMMLE, TiltedDistribution

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from nets import lebm

NOISE, PARTICLE_STEP, PRIOR_STEP, LATENTS = 0.3, 1e-3, 0.1, 100
PRECISIONS = {"float32, in full": ("highest", jnp.float32), "float32, default": ("default", jnp.float32)}
PRECISIONS["bfloat16 networks"] = ("default", jnp.bfloat16)


def optimizer():
    rates = {"generator": optax.adam(1e-3), "energy": optax.adam(2e-4, b1=0.5)}
    return optax.partition(rates, lambda params: {name: name.split("$")[0] for name in params})


def networks(args, dtype):
    keys = jax.random.split(jax.random.key(0))
    return lebm.Generator(keys[0], LATENTS, args.width, args.form, dtype), lebm.Energy(keys[1], LATENTS, 200, dtype)


def pixels(images):
    return images / np.float32(127.5) - 1


def model(images, nets, batch_size):
    generator, energy = eqx_module("generator", nets[0]), eqx_module("energy", nets[1])
    with numpyro.plate("images", len(images), subsample_size=batch_size):
        batch = numpyro.subsample(images, event_dim=3)
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1).expand([LATENTS]).to_event(1), energy))
        numpyro.sample("image", dist.Normal(generator(z), NOISE).to_event(3), obs=pixels(batch))


def by_engine(images, nets, args):
    """A state, and the engine's step as a function of it."""
    engine = ParticleMMLE.ebipla(
        model,
        optimizer(),
        num_particles=args.num_particles,
        step_size=PARTICLE_STEP,
        num_chains=args.batch_size,
        prior_step_size=PRIOR_STEP,
        num_prior_steps=args.num_prior_steps,
        noise="batch",
    )
    state = engine.init(jax.random.key(1), images, nets, args.batch_size)
    return state, lambda state: engine.update(state, images, nets, args.batch_size)


def by_hand(images, nets, args):
    optim, num, batch_size = optimizer(), args.num_particles, args.batch_size
    (of_generator, generator), (of_energy, energy) = (eqx.partition(net, eqx.is_inexact_array) for net in nets)
    params, scale = {"generator": of_generator, "energy": of_energy}, len(images) / batch_size

    def energies(params, z):
        return jax.vmap(eqx.combine(params["energy"], energy))(z)

    def log_joint(params, z, y):
        """The sum over particles and images."""
        flat = z.reshape(-1, LATENTS)
        means = eqx.combine(params["generator"], generator)(flat).reshape(*z.shape[:-1], 32, 32, 3)
        of_images = -(((y - means) / NOISE) ** 2 + jnp.log(2 * jnp.pi * NOISE**2)).sum() / 2
        return of_images - (z**2 + jnp.log(2 * jnp.pi)).sum() / 2 - energies(params, flat).sum()

    def chains_of(params, key):
        start_key, run_key = jax.random.split(key)
        score = jax.grad(lambda z: -energies(params, z).sum() - (z**2).sum() / 2)

        def move(z, key):
            return z + PRIOR_STEP * score(z) + jnp.sqrt(2 * PRIOR_STEP) * jax.random.normal(key, z.shape), None

        start = jax.random.normal(start_key, (batch_size, LATENTS))
        return lax.scan(move, start, jax.random.split(run_key, args.num_prior_steps))[0]

    def update(state):
        params, optim_state, z, key = state
        key, batch_key, noise_key, chain_key = jax.random.split(key, 4)
        with numpyro.handlers.seed(rng_seed=batch_key), numpyro.plate("images", len(images), batch_size) as rows:
            pass  # the same sample of a batch
        here, y = z[:, rows], pixels(images[rows])
        value, (of_params, score) = jax.value_and_grad(log_joint, (0, 1))(params, here, y)
        chains = chains_of(params, chain_key)
        of_normalizer = jax.grad(lambda params: -energies(params, chains).mean())(params)
        gradient = jax.tree.map(lambda g, n: n - g / (num * batch_size), of_params, of_normalizer)  # of the mean over images
        updates, optim_state = optim.update(gradient, optim_state, params)
        noise = jax.random.normal(noise_key, here.shape)
        z = z.at[:, rows].set(here + PARTICLE_STEP * score + jnp.sqrt(2 * PARTICLE_STEP) * noise)
        return (optax.apply_updates(params, updates), optim_state, z, key), -scale * value / num

    z = jax.random.normal(jax.random.key(2), (num, len(images), LATENTS))
    return (params, optim.init(params), z, jax.random.key(1)), update


def by_torch(images, args, precision):
    """The same step of PyTorch, or None without it."""
    try:
        import torch
        from torch import nn
    except ImportError:
        return None
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32, in full"
    is_coarse, width, num = precision == "bfloat16 networks", args.width, args.num_particles
    layers, channels = [], (8 * width, 4 * width, 2 * width, 3)
    for num_in, num_out in pairwise(channels):
        layers += [nn.LeakyReLU(lebm.SLOPE), nn.ConvTranspose2d(num_in, num_out, 4, 2, 1)]
    generator = nn.Sequential(nn.ConvTranspose2d(LATENTS, 8 * width, 4, 1, 0), *layers).to(device)
    hidden = [nn.Linear(LATENTS, 200), nn.LeakyReLU(lebm.SLOPE), nn.Linear(200, 200), nn.LeakyReLU(lebm.SLOPE)]
    hidden, last = nn.Sequential(*hidden).to(device), nn.Linear(200, 1).to(device)
    of_energy = [*hidden.parameters(), *last.parameters()]
    optims = torch.optim.Adam(generator.parameters(), 1e-3), torch.optim.Adam(of_energy, 2e-4, (0.5, 0.999))
    y_all = torch.tensor(np.asarray(images), device=device)
    z_all = torch.randn(num, len(images), LATENTS, device=device)
    networks_in = partial(torch.autocast, device, torch.bfloat16, enabled=is_coarse)

    def energies(z):
        with networks_in():
            x = hidden(z)
        return last(x.float()).squeeze(-1)

    def decoded(z):
        with networks_in():
            x = generator(z.reshape(-1, LATENTS, 1, 1))
        return torch.tanh(x.float()).reshape(*z.shape[:-1], 3, 32, 32)

    def chains():
        z = torch.randn(args.batch_size, LATENTS, device=device)
        for _ in range(args.num_prior_steps):
            z.requires_grad_()
            (of_z,) = torch.autograd.grad(energies(z).sum() + (z**2).sum() / 2, z)
            z = z.detach() - PRIOR_STEP * of_z + (2 * PRIOR_STEP) ** 0.5 * torch.randn_like(z)
        return z

    def step():
        rows = torch.randperm(len(images), device=device)[: args.batch_size]
        y, z = y_all[rows].permute(0, 3, 1, 2) / 127.5 - 1, z_all[:, rows].requires_grad_()
        of_latents = energies(z)
        joint = (((y - decoded(z)) / NOISE) ** 2).sum() / 2 + (z**2).sum() / 2 + of_latents.sum()
        normalizer = -energies(chains()).mean()
        for optim in optims:
            optim.zero_grad()
        (joint / (num * args.batch_size) + normalizer).backward()
        with torch.no_grad():
            score = -z.grad * num * args.batch_size
            z_all[:, rows] = z + PARTICLE_STEP * score + (2 * PARTICLE_STEP) ** 0.5 * torch.randn_like(z)
        for optim in optims:
            optim.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


# The decoder's transposed convolutions, in other ways.


def by_subpixels(x, weight):
    """A convolution of 3 x 3 to the four pixels of each, 20 of whose 36 weights are 0."""
    num_in, _, _, num_out = weight.shape
    kernel = jnp.zeros((3, 3, num_in, 2, 2, num_out), weight.dtype)
    taps = [(0, 0, 3), (1, 0, 1), (1, 1, 2), (2, 1, 0)]  # pixel of the small image, of the large one, and the weight between them
    for i, a, up in taps:
        for j, b, across in taps:
            kernel = kernel.at[i, j, :, a, b].set(weight[:, up, across])
    y = convolved(x, kernel.reshape(3, 3, num_in, 4 * num_out))
    n, height, width, _ = x.shape
    return y.reshape(n, height, width, 2, 2, num_out).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, num_out)


def convolved(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def by_resizing(x, weight):
    return convolved(doubled(x), weight[:, :3, :3].transpose(1, 2, 0, 3))


def by_resizing_in_windows(x, weight):
    x = doubled(x)
    _, height, width, num_in = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(windows, -1) @ weight[:, :3, :3].transpose(1, 2, 0, 3).reshape(9 * num_in, -1)


def doubled(x):
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


FORMS = {"matmul": lebm.by_matmul, "deconv": lebm.by_convolution, "subpixel": by_subpixels}
FORMS |= {"resize": by_resizing, "resize, windows": by_resizing_in_windows}


def decoding(form, args, dtype):
    """Weights and latents that a compiled loop moves a little along the gradient, forward and backward through the generator."""
    keys = jax.random.split(jax.random.key(0), 5)
    channels = (8 * args.width, 4 * args.width, 2 * args.width, 3)
    weights = [lebm.xavier(keys[0], (LATENTS, 4, 4, channels[0]))]
    weights += [lebm.xavier(k, (a, 4, 4, b)) for k, (a, b) in zip(keys[1:4], pairwise(channels), strict=True)]
    z = jax.random.normal(keys[4], (args.num_decoded, LATENTS))

    def loss(state):
        (first, *rest), z = jax.tree.map(lambda x: x.astype(dtype), state)
        x = jnp.einsum("nc,chwd->nhwd", z, first)
        for weight in rest:
            x = form(lebm.leaky_relu(x), weight)
        return (jnp.tanh(x.astype(jnp.float32)) ** 2).sum()

    def update(state):
        value, gradient = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda x, g: x - 1e-9 * g, state, gradient), value

    return (weights, z), update


def compare_steps(args, clock):
    images = jax.random.randint(jax.random.key(3), (args.num_images, 32, 32, 3), 0, 256).astype(jnp.uint8)
    for name in args.precisions:
        precision, dtype = PRECISIONS[name]
        with jax.default_matmul_precision(precision):
            nets = networks(args, dtype)
            problems = [make(images, nets, args) for make in (by_engine, by_hand)]
            timers = [timed(*problem, args.num_steps, clock) for problem in problems]
            step = by_torch(images, args, name)
            if step is not None:
                timers.append(timed_eagerly(step, args.num_steps, clock))
            times = in_turn(*timers, repeats=args.repeats)
            show_ratio(f"step, {name}: the engine over JAX by hand", times)
            if step is None:
                print("PyTorch is not installed: not run")
            else:
                show_ratio(f"step, {name}: the engine over eager PyTorch", times, 0, 2)
            (ours, memory), (hand, its_memory) = (compiled(*problem) for problem in problems)
            print(f"  compiles in {ours:.1f} against {hand:.1f} s; buffers of {memory:.0f} against {its_memory:.0f} MB", flush=True)


def compare_decoders(args, clock):
    for dtype in (jnp.float32,) if args.smoke else (jnp.float32, jnp.bfloat16):
        timers = [timed(*decoding(form, args, dtype), args.num_decoder_steps, clock) for form in FORMS.values()]
        times = np.median(in_turn(*timers, repeats=args.repeats), 0) * 1e3
        for name, time_of_one in zip(FORMS, times, strict=True):
            print(f"decoder, {jnp.dtype(dtype).name}: {name:<18}{time_of_one:10.2f} ms for {args.num_decoded} images", flush=True)


def main(args):
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    args.form = args.form or ("matmul" if jax.default_backend() == "cpu" else "deconv")
    print(f"device {jax.devices()[0].device_kind}; {vars(args)}")
    if not args.no_step:
        compare_steps(args, clock)
    if not args.no_decoder:
        compare_decoders(args, clock)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the published size")
    parser.add_argument("--form", choices=["deconv", "matmul"], help="of the generator; by the device if not given")
    parser.add_argument("--num-steps", type=int, default=5, help="steps in one timed loop")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of timed loops")
    parser.add_argument("--no-step", action="store_true", help="leave the steps out")
    parser.add_argument("--no-decoder", action="store_true", help="leave the decoders out")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    small = {"width": 16, "batch_size": 64, "num_particles": 4, "num_prior_steps": 60, "num_images": 4000, "num_decoded": 64}
    full = {"width": 64, "batch_size": 128, "num_particles": 10, "num_prior_steps": 60, "num_images": 50_000, "num_decoded": 1280}
    args.num_decoder_steps, args.precisions = args.num_steps, list(PRECISIONS)
    vars(args).update(full if args.full or (jax.default_backend() != "cpu" and not args.smoke) else small)
    if args.smoke:
        vars(args).update(width=1, batch_size=4, num_particles=2, num_prior_steps=2, num_images=40, num_decoded=2)
        args.num_steps, args.num_decoder_steps, args.repeats, args.precisions = 1, 1, 1, ["bfloat16 networks"]
    main(args)
