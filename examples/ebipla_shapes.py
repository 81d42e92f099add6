# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Example: A Swiss roll, half-moons and a circle by EBIPLA
========================================================

Points in the plane are a linear image of a latent with a learnt energy, and noise [1]:

.. math::

    p(z) = \frac{e^{-E(z)}}{Z} N(z; 0, I_2), \qquad x \mid z \sim N(W z + b, .05^2 I_2),

so that the energy must learn the whole shape: a spiral, two moons or a ring. :math:`E` is a network with 3 layers of 128;
the posterior is a cloud of particles for each of 10 000 points, of which 1000 move at a step.

What differs from [1], and why:

* *The step of the particles.* The table of [1] has h = .7 to 1, at which a likelihood with noise .05 and plain Langevin diverge:
  the limit is :math:`2 \sigma^2 / |W|^2`, about .005 at :math:`|W| = 1`. A gradient averaged over the batch of 1000 would make
  their h about .001, which is our guess at what was run. Here h = .0005 (.0001 for the circle, whose :math:`|W|` is 3).
* *The negative chains.* Theirs are 500 unadjusted steps from N(0, I) at every step, of size .004 to .009. No unadjusted chain
  of step h is narrower than variance 2h, and the roll's cross-section needs less: training then sharpens the energy
  without end. Here 1000 persistent chains make 20 steps of MALA, which has no such floor. ``--paper`` runs theirs, with a
  step of .002, which is stable (more than a second for each of 2000 steps: not run here to the end).
* *The tilt.* They drop the Gaussian. An energy network alone need not be integrable, so it is kept.

Judged by the sliced Wasserstein-2 distance between 2000 decoded draws of the learnt prior and 2000 fresh points, beside that
of two sets of fresh points, and of the same model with its normal prior alone (fitted in closed form: probabilistic PCA). The
reconstruction error :math:`V = |x - Wz - b|^2 / (2 \sigma^2)`, averaged over the particles of a whole epoch, should be near 1.

What to expect: a minute and a half for each shape on two cores. The script writes ``shapes.png`` to ``--output``.

**References**

1. Marks, Wang and Akyildiz, *Energy-based interacting particle Langevin algorithm*, UAI 2026, arXiv:2510.12311, Section 6.1.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array
from numpyro.contrib.module import eqx_module
from sklearn.datasets import make_moons

from numpyro_ebm import MALA, ParticleMMLE, TiltedDistribution, negative_phase

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_POINTS, BATCH_SIZE, NOISE = 10_000, 1000, 0.05
STEP_SIZES = {"Swiss roll": 5e-4, "half-moons": 5e-4, "circle": 1e-4}
NUM_STEPS, NUM_PARTICLES, NUM_CHAINS = 800, 4, 1000


class Fit(NamedTuple):
    """A learnt shape."""

    samples: np.ndarray  # (2000, 2), decoded draws of the prior
    latents: np.ndarray  # (2000, 2)
    energy: eqx.nn.MLP
    reconstruction: float  # V
    seconds: float


def make_points(shape: str, seed: int, num_points: int = NUM_POINTS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if shape == "Swiss roll":
        # uniform in arc length, of which t^2 / 2 is the leading term
        t = 4.5 * np.pi * np.sqrt(rng.uniform(1 / 9, 1, num_points))
        points = np.stack([t * np.cos(t), t * np.sin(t)], 1) / 8 + 0.1 * rng.normal(size=(num_points, 2))
        return points @ rotation(np.pi / 4).T
    if shape == "half-moons":
        points = make_moons(num_points, random_state=seed)[0] + 0.1 * rng.normal(size=(num_points, 2))
        return points @ rotation(np.pi / 3).T
    angle = rng.uniform(0, 2 * np.pi, num_points)
    return 3 * (np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * rng.normal(size=(num_points, 2)))


def rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def make_nets(rng_key: Array, points: np.ndarray) -> tuple[eqx.nn.Linear, eqx.nn.MLP]:
    """The decoder starts at the scale of the data, the energy near 0."""
    decoder_key, energy_key = jax.random.split(rng_key)
    decoder = eqx.nn.Linear(2, 2, key=decoder_key)
    weight, bias = jnp.eye(2) * points.std(), jnp.asarray(points.mean(0), jnp.float32)
    decoder = eqx.tree_at(lambda net: (net.weight, net.bias), decoder, (weight.astype(jnp.float32), bias))
    return decoder, eqx.nn.MLP(2, "scalar", 128, 3, jax.nn.silu, key=energy_key)


def model(points: Array, decoder: eqx.nn.Linear, energy: eqx.nn.MLP, batch_size: int | None = None) -> None:
    decoder = eqx_module("decoder", decoder)
    prior = TiltedDistribution(dist.Normal(0, 1).expand([2]).to_event(1), eqx_module("energy", energy))
    with numpyro.plate("points", len(points), subsample_size=batch_size):
        batch = numpyro.subsample(points, event_dim=1)
        z = numpyro.sample("z", prior)
        numpyro.sample("x", dist.Normal(jax.vmap(decoder)(z), NOISE).to_event(1), obs=batch)


def learn(rng_key: Array, shape: str, points: np.ndarray, args: argparse.Namespace) -> Fit:
    net_key, run_key, chain_key = jax.random.split(rng_key, 3)
    decoder, energy = make_nets(net_key, points)
    data = jnp.asarray(points, jnp.float32), decoder, energy
    optim = optax.adam(optax.cosine_decay_schedule(3e-3, args.num_steps, 0.02), b1=0.5)
    settings = {"num_particles": args.num_particles, "step_size": STEP_SIZES[shape], "order": "gauss_seidel"}
    if args.paper:
        optim = optax.adam(1e-2, b1=0.5)
        program = model
        settings |= {"num_chains": BATCH_SIZE, "prior_step_size": 0.002, "num_prior_steps": 500}
    else:
        program = negative_phase(model, num_chains=NUM_CHAINS, sampler=MALA(step_size=0.01, num_steps=20))
    engine = ParticleMMLE.ebipla(program, optim, **settings)
    start = time.perf_counter()
    result = engine.run(run_key, args.num_steps, *data, batch_size=args.batch_size)
    seconds = time.perf_counter() - start

    # draws of the prior: persistent chains run on at the learnt weights
    phase = program if isinstance(program, negative_phase) else negative_phase(model, num_chains=NUM_CHAINS)
    state = result.state.mutable_state if isinstance(program, negative_phase) else {}
    if not state:
        state = negative_state(phase, run_key, result.params, data)
    draws, _ = phase.sample_chains(chain_key, result.params, state, args.num_draws, *data)
    latents = draws["z"][:, args.num_draws // 2 :].reshape(-1, 2)
    latents = jax.random.permutation(chain_key, latents)[:2000]
    decoder = eqx.combine(result.params["decoder$params"], decoder)
    particles = engine.get_particles(result.state, *data)["z"]
    residual = data[0] - jax.vmap(jax.vmap(decoder))(particles)
    reconstruction = float((residual**2).sum(-1).mean() / (2 * NOISE**2))
    samples = jax.vmap(decoder)(latents) + NOISE * jax.random.normal(chain_key, latents.shape)
    energy = eqx.combine(result.params["energy$params"], energy)
    return Fit(np.asarray(samples), np.asarray(latents), energy, reconstruction, seconds)


def negative_state(phase: negative_phase, rng_key: Array, params: dict, data: tuple) -> dict:
    """Fresh chains of a handler."""
    with numpyro.handlers.trace() as sites, numpyro.handlers.seed(rng_seed=rng_key):
        numpyro.handlers.substitute(phase, data=params)(*data)
    return {name: site["value"] for name, site in sites.items() if site["type"] == "mutable"}


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, num_directions: int = 200) -> float:
    """W2 between projections, root mean square over directions; sets of the same size."""
    angles = np.pi * np.arange(num_directions) / num_directions
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.sqrt(((np.sort(x @ directions, 0) - np.sort(y @ directions, 0)) ** 2).mean()))


def plot_shapes(path: Path, shapes: dict[str, tuple[np.ndarray, Fit]]) -> None:
    figure, axes = plt.subplots(len(shapes), 3, figsize=(10.5, 3.5 * len(shapes)), layout="constrained", squeeze=False)
    for row, (shape, (points, fit)) in zip(axes, shapes.items(), strict=True):
        limit = 1.15 * np.abs(points).max()
        for axis, title, cloud in ((row[0], "data", points[:2000]), (row[1], "draws of the model", fit.samples)):
            axis.scatter(*cloud.T, s=2, linewidth=0, color="k", alpha=0.5)
            axis.set(title=f"{shape}: {title}", xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        limit = 1.25 * np.abs(fit.latents).max()
        ticks = jnp.linspace(-limit, limit, 150)
        grid = jnp.stack(jnp.meshgrid(ticks, ticks), -1)
        energy = np.asarray(jax.vmap(jax.vmap(fit.energy))(grid) + (grid**2).sum(-1) / 2)
        contour = row[2].contourf(ticks, ticks, np.minimum(energy - energy.min(), 8), 16, cmap="viridis_r")
        row[2].set(title="energy of the latent", aspect="equal")
        figure.colorbar(contour, ax=row[2], label="above its minimum (8 or more)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    args.batch_size, args.num_draws, num_points = BATCH_SIZE, 100, NUM_POINTS
    if args.paper:
        args.num_steps = 2000
    if args.smoke:
        args.num_steps, args.batch_size, args.num_draws, num_points = 5, 100, 10, 500
        args.shapes = args.shapes[:1]  # they compile alike
    fits = {}
    for shape in args.shapes:
        points = make_points(shape, args.seed, num_points)
        fits[shape] = points, learn(jax.random.key(args.seed), shape, points, args)
    title = "sliced W2 to 2000 fresh points"
    print(f"\n{'':<12}{title}: {'energy prior':>14}{'normal prior':>14}{'fresh points':>14}{'V':>7}{'seconds':>9}")
    for shape, (points, fit) in fits.items():
        size = len(fit.samples)
        fresh, more = make_points(shape, args.seed + 1000, size), make_points(shape, args.seed + 2000, size)
        gaussian = np.random.default_rng(args.seed).multivariate_normal(points.mean(0), np.cov(points.T), size)
        distances = [sliced_wasserstein(cloud, fresh) for cloud in (fit.samples, gaussian, more)]
        columns = "".join(f"{distance:>14.3f}" for distance in distances)
        print(f"{shape:<12}{'':<{len(title) + 2}}{columns}{fit.reconstruction:>7.2f}{fit.seconds:>9.0f}")
    plot_shapes(args.output / "shapes.png", fits)
    print(f"The figure is in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Swiss roll, half-moons and a circle by EBIPLA")
    parser.add_argument("--shapes", nargs="+", choices=list(STEP_SIZES), default=list(STEP_SIZES))
    parser.add_argument("--num-particles", type=int, default=NUM_PARTICLES)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper", action="store_true", help="the settings of the paper: 2000 steps with 500 prior steps each")
    parser.add_argument("--output", type=Path, default=Path("outputs/ebipla_shapes"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
