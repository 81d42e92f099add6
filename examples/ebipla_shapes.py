# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A learned energy for a Swiss roll, half-moons and a circle
==========================================================

The synthetic experiments of EBIPLA [1]: 10,000 points in the plane, rotated and stretched, by a linear decoder and an energy
over a latent plane,

.. math::

    p(x) = \frac{e^{-E(x)}}{Z} \, N(x; 0, I), \qquad y \mid x \sim N(W x + b, \sigma^2 I), \quad \sigma = .05,

with a network :math:`E` of three hidden layers of 128. Every point has N particles, posterior samples of its latent that move
by Langevin while :math:`E, W, b` climb the marginal likelihood; negative chains give the gradient of :math:`\log Z`. A
linear decoder cannot bend anything: the shape has to be in the energy.

What is as in [1]: data, networks, :math:`\sigma`, N = 4, batches of 1000. What is not, unless ``--paper`` asks for
most of it (the page of this example says what a run gives):

* **Negative chains** persist and move by MALA. Those of [1] restart from the base at every step and make J = 500 moves
  of unadjusted Langevin, which is 25 times as many and biased: no unadjusted chain of step :math:`\gamma` is narrower
  than variance :math:`2 \gamma`, and with the published :math:`\gamma` of .005 to .009 training sharpens the energy without
  end where the data are narrower. ``--paper`` takes .002. Its 500 moves keep :math:`(1 - \gamma c)^{500}` of where they
  start, .37 in a direction of curvature c = 1: the engine warns as long as the energy is no steeper than that.
* **The tilt** by :math:`N(0, I)`: [1] drops it. Then :math:`e^{-E}` need not be integrable, which chains of 500 moves hide
  and persistent ones do not. The decoder's scale is free, so that the tilt costs nothing.
* **The learning rates** are smaller, and decay, so that the chains keep up; 100 epochs are enough, half of those of [1].

**The particles' step.** The posterior's curvature is about :math:`|W|^2 / \sigma^2` and Langevin stable only for
:math:`h < 2 \sigma^2 / |W|^2`, .005 for :math:`|W| = 1`. The published h of .7 to 1 cannot be meant on that scale; it may be
that of a mean over the batch of 1000. Here :math:`h = .2 \, \sigma^2 / |W|^2` with the decoder's first W, which has the
data's own scale, and the script prints the limit where the particles end.

All is judged by quadrature on a grid, without relying on chains: the log-likelihood of 10,000 new points under the learned
distribution is compared with that under the distribution that generated them (their difference is the Kullback-Leibler
divergence), and with the same model with a normal prior. V is the mean of :math:`|y - W x - b|^2 / (2 \sigma^2)` over all
particles. It is 1 for a plane if the model holds; unadjusted particles are wider by a fraction of about :math:`hc / 2` of their
variance.

The script writes to ``--output``: ``shapes.png``, data, samples and the learned energy of each shape; ``learning.png``, the
divergence and V during the fits.

**References**

1. Marks, Wang and Akyildiz, *Energy-based interacting particle Langevin algorithm*, UAI 2026, arXiv:2510.12311.
"""

# sphinx_gallery_thumbnail_path = "_static/ebipla_shapes.png"

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from scipy.ndimage import gaussian_filter, map_coordinates
from sklearn.datasets import make_moons

from numpyro_ebm import (
    MALA,
    EnergyDistribution,
    ParticleMMLE,
    ParticleState,
    TiltedDistribution,
    UnadjustedLangevin,
    negative_phase,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_POINTS, BATCH_SIZE, NUM_EPOCHS, NUM_PARTICLES = 10_000, 1000, 100, 4
SIGMA = 0.05  # of the likelihood
STEP = 0.2  # of the particles, in units of sigma^2 / |W|^2
NUM_CHAINS, CHAIN_MOVES = 1000, 20
ENERGY_RATE, DECODER_RATE = 5e-3, 2e-3
PAPER_RATE, PAPER_CHAIN_STEP, PAPER_CHAIN_MOVES = 1e-2, 0.002, 500
CELL = 0.025  # of the grid for quadrature


class Shape(NamedTuple):
    """A distribution of points in the plane: a curve, and normal noise around it."""

    curve: Callable[[np.random.Generator, int], np.ndarray]  # points on the curve, (num_points, 2)
    spread: float  # standard deviation of the noise, that of the likelihood with it

    def draw(self, rng: np.random.Generator, num_points: int) -> np.ndarray:
        return self.curve(rng, num_points) + self.spread * rng.standard_normal((num_points, 2))


class Task(NamedTuple):
    """Points to learn from, and how well they can be learned."""

    points: Array  # (10_000, 2)
    test: np.ndarray  # (10_000, 2), new points of the same distribution
    grid: "Grid"  # for quadrature
    best: float  # log-likelihood per new point under the distribution itself
    density: np.ndarray  # of the distribution itself, on the grid


class Nets(NamedTuple):
    """Decoder and energy; the energy is None for the normal prior."""

    decoder: eqx.nn.Linear  # R^2 -> R^2
    energy: eqx.nn.MLP | None  # R^2 -> scalar
    tilted: bool = True  # whether the energy tilts a normal, or stands alone as in the paper


class Grid(NamedTuple):
    """Cells of equal size that cover the plane where data and samples are."""

    low: np.ndarray  # (2,), center of the first cell
    shape: tuple[int, int]

    @property
    def points(self) -> np.ndarray:
        """Centers of the cells, of shape ``(rows, columns, 2)``."""
        return self.low + CELL * np.stack(np.meshgrid(*map(np.arange, self.shape), indexing="ij"), -1)


class Fit(NamedTuple):
    """A model learned, and how the fit went."""

    nets: Nets
    draws: np.ndarray  # (10_000, 2), of the model, with noise
    steps: list[int]
    curve: list[tuple[float, float]]  # divergence and V at these steps
    step_size: float
    limit: float  # of it, where the particles end
    seconds: float


def rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def swiss_roll(rng: np.random.Generator, num_points: int) -> np.ndarray:
    """The spiral (t cos t, t sin t) / 8 with t from 1.5 pi to 4.5 pi, uniform in arc length, turned by pi / 4."""
    t = np.linspace(1.5 * np.pi, 4.5 * np.pi, 2000)
    length = t * np.sqrt(1 + t**2) + np.arcsinh(t)
    t = np.interp(rng.uniform(length[0], length[-1], num_points), length, t)
    return np.stack([t * np.cos(t), t * np.sin(t)], 1) / 8 @ rotation(np.pi / 4).T


def half_moons(rng: np.random.Generator, num_points: int) -> np.ndarray:
    """Two half circles that reach into each other, turned by pi / 3."""
    points, _ = make_moons(num_points, random_state=int(rng.integers(2**31)))
    return points @ rotation(np.pi / 3).T


def circle(rng: np.random.Generator, num_points: int) -> np.ndarray:
    """The unit circle, stretched by 3."""
    t = rng.uniform(0, 2 * np.pi, num_points)
    return 3 * np.stack([np.cos(t), np.sin(t)], 1)


SHAPES = {  # noise of the latent, stretched, and of the likelihood
    "Swiss roll": Shape(swiss_roll, float(np.hypot(0.1, SIGMA))),
    "half-moons": Shape(half_moons, float(np.hypot(0.1, SIGMA))),
    "circle": Shape(circle, float(np.hypot(3 * 0.05, SIGMA))),
}


def make_nets(rng_key: Array, points: Array, energy_prior: bool, tilted: bool) -> Nets:
    """The decoder starts as a map from N(0, I) to the data's center and scale."""
    decoder = eqx.nn.Linear(2, 2, key=rng_key)
    scale = points.std() * jnp.eye(2)
    decoder = eqx.tree_at(lambda net: (net.weight, net.bias), decoder, (scale, points.mean(0)))
    energy = eqx.nn.MLP(2, "scalar", 128, 3, jax.nn.silu, key=rng_key) if energy_prior else None
    return Nets(decoder, energy, tilted)


def normal_prior() -> dist.Distribution:
    return dist.Normal(0, 1).expand([2]).to_event(1)


def model(points: Array, nets: Nets, batch_size: int | None = None) -> None:
    decoder = eqx_module("decoder", nets.decoder)
    prior = normal_prior()
    if nets.energy is not None:
        energy = eqx_module("energy", nets.energy)
        prior = TiltedDistribution(prior, energy) if nets.tilted else EnergyDistribution(energy, (2,), initial=prior)
    with numpyro.plate("points", len(points), subsample_size=batch_size):
        batch = numpyro.subsample(points, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(jax.vmap(decoder)(x), SIGMA).to_event(1), obs=batch)


def trained(nets: Nets, params: dict[str, Any]) -> Nets:
    """The networks with the weights of a fit."""
    fitted = {name.removesuffix("$params"): weights for name, weights in params.items()}
    return nets._replace(**{name: eqx.combine(weights, getattr(nets, name)) for name, weights in fitted.items()})


def make_engine(nets: Nets, num_particles: int, num_steps: int, paper: bool, num_jumps: int | None) -> ParticleMMLE:
    step_size = STEP * SIGMA**2 / float(jnp.linalg.norm(nets.decoder.weight, 2)) ** 2
    settings: dict[str, Any] = {"num_particles": num_particles, "step_size": step_size}
    if paper:
        sampler = UnadjustedLangevin(PAPER_CHAIN_STEP, PAPER_CHAIN_MOVES)
        program = negative_phase(model, num_chains=BATCH_SIZE, sampler=sampler, persistent=False)
        return ParticleMMLE.ebipla(program, optax.adam(PAPER_RATE, b1=0.5), **settings)
    rates = {"decoder$params": DECODER_RATE, "energy$params": ENERGY_RATE}
    adams = {name: optax.adam(optax.cosine_decay_schedule(rate, num_steps, alpha=0.02)) for name, rate in rates.items()}
    program = negative_phase(model, num_chains=NUM_CHAINS, sampler=MALA(num_steps=CHAIN_MOVES, num_jumps=num_jumps))
    optim = optax.partition(adams, lambda params: {name: name for name in params})
    return ParticleMMLE.ebipla(program, optim, order="gauss_seidel", noise="batch", **settings)


def fit(
    rng_key: Array, task: Task, nets: Nets, num_particles: int, num_steps: int, paper: bool, num_jumps: int | None = None
) -> Fit:
    run_key, chain_key, noise_key = jax.random.split(rng_key, 3)
    engine = make_engine(nets, num_particles, num_steps, paper, num_jumps)
    data, steps, curve = (task.points, nets, BATCH_SIZE), [], []

    def look(step: int, state: ParticleState, losses: Array) -> None:
        now = trained(nets, state.params)
        particles = engine.get_particles(state, *data)["x"]
        steps.append(step)
        curve.append((divergence(now, task), float(misfit(now.decoder, particles, task.points))))

    begin = time.perf_counter()
    result = engine.run(run_key, num_steps, *data, callbacks=[look], progress_bar=False)
    seconds = time.perf_counter() - begin
    fitted = trained(nets, result.params)
    if nets.energy is None:
        latents = normal_prior().sample(chain_key, (NUM_POINTS,))
    else:
        chains, _ = engine.model.sample_chains(chain_key, result, result, NUM_POINTS // NUM_CHAINS, *data)
        latents = chains["x"].reshape(-1, 2)
    means = jax.vmap(fitted.decoder)(latents)
    draws = np.asarray(means + SIGMA * jax.random.normal(noise_key, means.shape))
    return Fit(fitted, draws, steps, curve, float(engine.step_size), engine.stability_limit(result.state, *data), seconds)


@eqx.filter_jit
def misfit(decoder: eqx.nn.Linear, particles: Array, points: Array) -> Array:
    """V: half the squared error in units of sigma, averaged over particles and points."""
    return ((points - jax.vmap(jax.vmap(decoder))(particles)) ** 2).sum(-1).mean() / (2 * SIGMA**2)


def grid_over(points: np.ndarray, margin: float = 1.0) -> Grid:
    low, high = points.min(0) - margin, points.max(0) + margin
    rows, columns = np.ceil((high - low) / CELL).astype(int)
    return Grid(low, (int(rows), int(columns)))


def make_task(shape: Shape, seed: int) -> Task:
    rng = np.random.default_rng(seed)
    points, test = shape.draw(rng, NUM_POINTS), shape.draw(rng, NUM_POINTS)
    grid = grid_over(points)
    density = true_density(shape, grid)
    return Task(jnp.asarray(points, jnp.float32), test, grid, log_likelihood(density, grid, test), density)


def true_density(shape: Shape, grid: Grid) -> np.ndarray:
    """The density of the distribution that makes the data: its curve on the grid, blurred by its noise."""
    curve = shape.curve(np.random.default_rng(0), 1_000_000)
    edges = [low + CELL * (np.arange(n + 1) - 0.5) for low, n in zip(grid.low, grid.shape, strict=True)]
    counts, *_ = np.histogram2d(*curve.T, bins=edges)
    return gaussian_filter(counts / counts.sum() / CELL**2, shape.spread / CELL, mode="constant")


def model_density(nets: Nets, grid: Grid) -> np.ndarray:
    """The density of the model: its prior carried over to the plane, normalized on the grid and blurred by the likelihood."""
    p = np.exp(-energy_above_minimum(nets, grid))
    return gaussian_filter(p / p.sum() / CELL**2, SIGMA / CELL, mode="constant")


def energy_above_minimum(nets: Nets, grid: Grid) -> np.ndarray:
    """Minus the log prior density at the latents that decode to the cells of a grid, above its minimum."""
    energy = np.asarray(energy_of(nets, jnp.asarray(grid.points.reshape(-1, 2), jnp.float32))).reshape(grid.shape)
    return energy - energy.min()


@eqx.filter_jit
def energy_of(nets: Nets, points: Array) -> Array:
    x = jnp.linalg.solve(nets.decoder.weight, (points - nets.decoder.bias).T).T
    energy = 0.0 if nets.energy is None else jax.vmap(nets.energy)(x)
    return energy - normal_prior().log_prob(x) * nets.tilted


def log_likelihood(density: np.ndarray, grid: Grid, points: np.ndarray) -> float:
    """Mean log density of points, linear between the centers of cells."""
    p = map_coordinates(density, ((points - grid.low) / CELL).T, order=1)
    return float(np.log(p + 1e-30).mean())


def divergence(nets: Nets, task: Task) -> float:
    """The Kullback-Leibler divergence of the model from the distribution of the data, estimated on the new points."""
    return task.best - log_likelihood(model_density(nets, task.grid), task.grid, task.test)


def distance(nets: Nets, task: Task) -> float:
    """The integral of the absolute difference between the densities of model and data: 0 to 2."""
    return float(np.abs(model_density(nets, task.grid) - task.density).sum() * CELL**2)


def sliced_w2(a: np.ndarray, b: np.ndarray, num_directions: int = 100) -> float:
    """The Wasserstein distance of order 2 of equally many points, along directions averaged over the half circle."""
    angles = np.pi * np.arange(num_directions) / num_directions
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.sqrt(((np.sort(a @ directions, 0) - np.sort(b @ directions, 0)) ** 2).mean()))


def print_table(name: str, fits: dict[str, Fit], task: Task) -> None:
    print(f"\n{name}: log-likelihood per new point under the distribution that generated it {task.best:.3f}")
    print(
        f"{'':<14}{'log-likelihood':>15}{'KL':>8}{'|p - p*|':>10}{'sliced W2':>11}{'V':>8}{'h':>10}{'limit of h':>12}{'seconds':>9}"
    )
    for label, one in fits.items():
        kl = divergence(one.nets, task)
        row = (
            f"{label:<14}{task.best - kl:>15.3f}{kl:>8.3f}{distance(one.nets, task):>10.3f}{sliced_w2(one.draws, task.test):>11.4f}"
        )
        print(f"{row}{one.curve[-1][1]:>8.3f}{one.step_size:>10.1e}{one.limit:>12.1e}{one.seconds:>9.0f}")
    print(f"{'the data':<14}{'':>15}{'':>8}{'':>10}{sliced_w2(np.asarray(task.points), task.test):>11.4f}", flush=True)


def plot_shapes(path: Path, fits: dict[str, Fit], tasks: dict[str, Task]) -> None:
    figure, axes = plt.subplots(len(fits), 3, figsize=(10.5, 3.4 * len(fits)), layout="constrained", squeeze=False)
    for row, (name, one) in zip(axes, fits.items(), strict=True):
        grid = tasks[name].grid
        for axis, cloud, title in zip(row, (tasks[name].points, one.draws), ("data", "samples of the model"), strict=False):
            axis.scatter(*cloud[:5000].T, s=1, alpha=0.5, linewidth=0, color="tab:blue", rasterized=True)
            axis.set_title(f"{name}: {title}")
        x, y = grid.points[:, 0, 0], grid.points[0, :, 1]
        contour = row[2].contourf(
            x, y, energy_above_minimum(one.nets, grid).T, np.linspace(0, 12, 13), cmap="viridis", extend="max"
        )
        row[2].set_title("learned energy")
        figure.colorbar(contour, ax=row[2], label="above its minimum")
        for axis in row:
            axis.set(xlim=(x[0] + 0.5, x[-1] - 0.5), ylim=(y[0] + 0.5, y[-1] - 0.5), aspect="equal")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_learning(path: Path, fits: dict[str, Fit]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, one in fits.items():
        for axis, values in zip(axes, np.array(one.curve).T, strict=True):
            axis.plot(one.steps, values, marker=".", linewidth=1, label=name)
    axes[0].set(ylabel="divergence from the true distribution, nats", yscale="log")
    axes[1].set(ylabel="V per point", yscale="log")
    axes[1].axhline(1, color="black", linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps = 4 if args.smoke else args.num_epochs * NUM_POINTS // BATCH_SIZE
    tasks = {name: make_task(SHAPES[name], args.seed) for name in (args.shapes[:1] if args.smoke else args.shapes)}
    learned = {}
    for name, task in tasks.items():
        fits = {}
        for label, energy_prior in (("energy prior", True), ("normal prior", False)):
            paper = args.paper and energy_prior
            nets = make_nets(jax.random.key(args.seed), task.points, energy_prior, tilted=not paper)
            few = num_steps if energy_prior else min(num_steps, 500)  # the normal prior is learned long before
            fits[label] = fit(jax.random.key(args.seed + 1), task, nets, args.num_particles, few, paper, args.num_jumps)
        print_table(name, fits, task)
        learned[name] = fits["energy prior"]
    plot_shapes(args.output / "shapes.png", learned, tasks)
    plot_learning(args.output / "learning.png", learned)
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A learned energy for a Swiss roll, half-moons and a circle")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--num-particles", type=int, default=NUM_PARTICLES, help="per point")
    parser.add_argument("--num-epochs", type=int, default=NUM_EPOCHS)
    parser.add_argument("--paper", action="store_true", help="the negative chains and rates of the paper: an hour per shape")
    parser.add_argument("--num-jumps", type=int, help="of the negative chains; 0 for local moves only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/ebipla_shapes"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
