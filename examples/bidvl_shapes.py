# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Density, energy and generator of points in the plane
====================================================

Bi-level doubly variational learning [1] of half-moons, a circle, and eight normal distributions on a ring: an energy over the plane

.. math::

    p(v) = \frac{e^{-E(v)}}{Z} \, N(v; m, (1.5 s)^2 I)

about the mean m and the scale s of the data, an encoder, and a generator :math:`N(h; 0, I) \, N(v; g(h), .1^2 I)` of two
latents, all networks with hidden layers of 64. In the plane everything can be judged by quadrature on a grid:

* the energy, by the Kullback-Leibler divergence from the distribution that generated the data, on 10,000 new points;
* the generator, by the sliced Wasserstein distance of its samples from those points;
* the same for samples that 200 moves of MALA on the energy have refined.

The generator replaces samples of the energy in the gradient of the likelihood, and makes hardly any where there are no data: no
gradient constrains the energy there. ``--sampler`` says how generated points move on the energy before the upper level sees
them: not at all (``none``, as in [1]), or by ten moves of ``MALA`` that restart from the generator at every step. By default both
are learned and compared.

The script writes ``shapes.png`` to ``--output``: data, samples, the learned energy and its density, for every shape.

**References**

1. Kan et al., *Bi-level doubly variational learning for energy-based latent variable models*, CVPR 2022, arXiv:2203.14702.
"""

# sphinx_gallery_thumbnail_path = "_static/bidvl_shapes.png"

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
from ebipla_shapes import NUM_POINTS, SHAPES, Grid, Shape, Task, log_likelihood, make_task, sliced_w2
from jax import Array
from numpyro.contrib.module import eqx_module

from numpyro_ebm import MALA, BiDVL, TiltedDistribution
from numpyro_ebm.infer import LowerLevel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH_SIZE, NUM_STEPS = 256, 10_000
NUM_LATENTS, WIDTH, NOISE = 2, 64, 0.1
RATE, ENERGY_RATE, ENERGY_RATE_ALONE = 1e-3, 5e-4, 1e-4  # the energy must be slow where nothing holds it far from data
VAE_WEIGHT = 0.3
SAMPLERS = {"none": None, "MALA": MALA(0.01, 10)}


class Nets(NamedTuple):
    """The networks, and where the base distribution of the energy is."""

    energy: eqx.nn.MLP  # R^2 -> scalar
    encoder: eqx.nn.MLP  # R^2 -> mean and scale of the latents
    generator: eqx.nn.MLP  # latents -> R^2
    center: Array  # (2,)
    scale: Array  # ()


class Fit(NamedTuple):
    """What was learned."""

    draws: np.ndarray  # (num_points, 2), of the generator
    refined: np.ndarray  # the same, moved on the energy
    log_density: np.ndarray  # over the grid, normalized there
    seconds: float  # of processors


def ring(rng: np.random.Generator, num_points: int) -> np.ndarray:
    """Eight points of the circle of radius 2."""
    angle = rng.integers(0, 8, num_points) * np.pi / 4
    return 2 * np.stack([np.cos(angle), np.sin(angle)], 1)


ALL_SHAPES = {"half-moons": SHAPES["half-moons"], "circle": SHAPES["circle"], "ring": Shape(ring, 0.15)}


def make_nets(rng_key: Array, points: Array) -> Nets:
    keys = jax.random.split(rng_key, 3)
    return Nets(
        energy=eqx.nn.MLP(2, "scalar", WIDTH, 3, jax.nn.silu, key=keys[0]),
        encoder=eqx.nn.MLP(2, 2 * NUM_LATENTS, WIDTH, 2, jax.nn.silu, key=keys[1]),
        generator=eqx.nn.MLP(NUM_LATENTS, 2, WIDTH, 3, jax.nn.silu, key=keys[2]),
        center=points.mean(0),
        scale=1.5 * points.std(),
    )


def energy(v: Array, nets: Nets) -> None:
    net = eqx_module("energy", nets.energy)
    with numpyro.plate("points", len(v)):
        numpyro.sample("v", TiltedDistribution(dist.Normal(nets.center, nets.scale).to_event(1), net), obs=v)


def encoder(v: Array, nets: Nets) -> None:
    net = eqx_module("encoder", nets.encoder)
    with numpyro.plate("points", len(v)):
        mean, scale = jnp.split(jax.vmap(net)(v), 2, axis=-1)
        numpyro.sample("h", dist.Normal(mean, jax.nn.softplus(scale) + 1e-3).to_event(1))


def generator(v: Array, nets: Nets) -> None:
    net = eqx_module("generator", nets.generator)
    with numpyro.plate("points", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1).expand([NUM_LATENTS]).to_event(1))
        numpyro.sample("v", dist.Normal(jax.vmap(net)(h), NOISE).to_event(1), obs=v)


def fit(rng_key: Array, task: Task, sampler: str, num_steps: int) -> Fit:
    net_key, run_key, draw_key, refine_key = jax.random.split(rng_key, 4)
    nets = make_nets(net_key, task.points)
    rates = (ENERGY_RATE if SAMPLERS[sampler] else ENERGY_RATE_ALONE), RATE, RATE
    optims = (optax.adam(optax.cosine_decay_schedule(rate, num_steps, alpha=0.05), b1=0.5, b2=0.9) for rate in rates)
    lower = LowerLevel(vae_weight=VAE_WEIGHT)
    engine = BiDVL(energy, encoder, generator, *optims, lower=lower, sampler=SAMPLERS[sampler], batch_size=BATCH_SIZE)
    begin = time.process_time()
    state = engine.run(run_key, num_steps, task.points, nets, progress_bar=False).state
    seconds = time.process_time() - begin
    draws = engine.sample(draw_key, state, NUM_POINTS, task.points, nets)["v"]
    refined = engine.refine(refine_key, state, MALA(0.01, 200), draws, nets)
    cells = jnp.asarray(task.grid.points.reshape(-1, 2), jnp.float32)
    energies = np.asarray(engine.energies(state, cells, nets)).reshape(task.grid.shape)
    return Fit(np.asarray(draws), np.asarray(refined), normalized(-energies, task.grid), seconds)


def normalized(log_p: np.ndarray, grid: Grid) -> np.ndarray:
    """A log density over the cells of a grid that integrates to 1."""
    cell = float(np.prod(grid.points[1, 1] - grid.points[0, 0]))
    log_p = log_p - log_p.max()
    return log_p - np.log(np.exp(log_p).sum() * cell)


def print_table(name: str, fits: dict[str, Fit], task: Task) -> None:
    print(f"\n{name}: log-likelihood per new point under the distribution that generated it {task.best:.3f}")
    print(f"{'sampler':<12}{'KL of the energy':>18}{'W2 of draws':>13}{'W2 refined':>12}{'seconds':>9}")
    for label, one in fits.items():
        kl = task.best - log_likelihood(np.exp(one.log_density), task.grid, task.test)
        distances = "".join(f"{sliced_w2(x, task.test):>{n}.4f}" for x, n in ((one.draws, 13), (one.refined, 12)))
        print(f"{label:<12}{kl:>18.3f}{distances}{one.seconds:>9.0f}")
    print(f"{'the data':<12}{'':>18}{sliced_w2(np.asarray(task.points), task.test):>13.4f}", flush=True)


def plot_shapes(path: Path, fits: dict[str, Fit], tasks: dict[str, Task]) -> None:
    figure, axes = plt.subplots(len(fits), 4, figsize=(13, 3.3 * len(fits)), layout="constrained", squeeze=False)
    for row, (name, one) in zip(axes, fits.items(), strict=True):
        grid = tasks[name].grid
        x, y = grid.points[:, 0, 0], grid.points[0, :, 1]
        for axis, cloud, title in zip(row, (tasks[name].points, one.draws), ("data", "generator"), strict=False):
            axis.scatter(*cloud[:5000].T, s=1, alpha=0.5, linewidth=0, color="tab:blue", rasterized=True)
            axis.set_title(f"{name}: {title}")
        above = one.log_density.max() - one.log_density
        contour = row[2].contourf(x, y, above.T, np.linspace(0, 12, 13), cmap="viridis", extend="max")
        row[2].set_title("learned energy")
        figure.colorbar(contour, ax=row[2], label="above its minimum")
        row[3].pcolormesh(x, y, np.exp(one.log_density).T, cmap="viridis", rasterized=True)
        row[3].set_title("its density")
        for axis in row:
            axis.set(xlim=(x[0] + 0.5, x[-1] - 0.5), ylim=(y[0] + 0.5, y[-1] - 0.5), aspect="equal")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps = 4 if args.smoke else args.num_steps
    shapes = args.shapes[:1] if args.smoke else args.shapes
    tasks = {name: make_task(ALL_SHAPES[name], args.seed) for name in shapes}
    shown = {}
    for name, task in tasks.items():
        fits = {label: fit(jax.random.key(args.seed), task, label, num_steps) for label in args.sampler}
        print_table(name, fits, task)
        shown[name] = fits[args.sampler[-1]]
    plot_shapes(args.output / "shapes.png", shown, tasks)
    print(f"The figure, of sampler {args.sampler[-1]}, is in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Density, energy and generator of points in the plane")
    parser.add_argument("--shapes", nargs="+", choices=list(ALL_SHAPES), default=list(ALL_SHAPES))
    parser.add_argument("--sampler", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/bidvl_shapes"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
