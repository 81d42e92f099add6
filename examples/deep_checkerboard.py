# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A deep energy-based latent variable model of two squares
========================================================

Points of two diagonal squares of the plane, learned by bi-level score matching [1] as an energy of a point and ten latents,

.. math::

    p(v, h) = \frac{e^{-E(v, h)}}{Z}, \qquad v \in R^2, \; h \in R^{10},

with the networks of [1] for points (``nets/eblvm.py``): neither :math:`Z` nor :math:`p(v) = \int p(v, h) \, dh` is known. The
upper level matches the score of :math:`v` to denoised data at noise levels from .0175 to 1, the lower level fits a Gaussian guide
:math:`q(h \mid v)` to the posterior by their Fisher divergence. What is learned is the distribution of the data **with noise of
standard deviation .05**, whose density is known here in closed form.

How the model's gradient sees that the guide follows the model is the choice ``--hypergradient``:

* ``none``, the default, does not: as published for this model. It lacks the posterior's covariance, whatever the guide;
* ``unrolled`` differentiates through ``--num-unroll-steps`` steps of the guide;
* ``implicit`` uses the implicit function theorem, which is not in the paper.

The settings are those of [1] and [2] (K = 5, batches of 100, Adam with beta_2 = .95), but for two. They make 100,000 steps at a
rate of 1e-4, and here it is a tenth of them at ten times the rate: ``--num-steps 100000 --learning-rate 1e-4`` is theirs. And
their noise begins at .05 (``--smallest-sigma 0.05``). In the plane no network can tell how much noise a point has, and one score
for all levels is then that of the data smoothed by .05 only if the mean of :math:`\sigma^{-2}` is :math:`.05^{-2}` = 400. From
.05 on it is 67, and the density is learned to about the sixth power; from .0175 on it is 403.

All is judged in the plane: :math:`\log \tilde p(v)` is estimated by importance sampling with the guide, on a grid whose sum
gives the normalizer, and at new points. The estimate is only as good as its effective sample size, which is printed with it,
and the normalizer is that of the box of the grid: nothing forces the energy to be integrable beyond it.

The script writes to ``--output``: ``checkerboard.png``, data, the density of the noisy data, that of the model, and samples by
annealed Langevin dynamics of points and latents together. The published schedule, 2700 steps of 2e-4 from temperature 100, is
over before the latents have cooled; here it starts at 10, has steps of 1e-3, and 500 more of them at temperature 1.

**References**

1. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020, arXiv:2010.07856.
2. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
   arXiv:2010.08258: the networks for points are in its code.
"""

# sphinx_gallery_thumbnail_path = "_static/deep_checkerboard.png"

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from jax import Array
from nets.eblvm import CoupledEnergy, GaussianGuide, point_energy, point_guide
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints
from scipy.stats import norm

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    Implicit,
    MultiscaleDenoisingScoreMatching,
    PosteriorFisher,
    Unrolled,
    amortized_normal,
    annealed_langevin,
    annealing_schedule,
    denoise,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_POINTS, NUM_TEST, BATCH_SIZE = 60_000, 2000, 100
NUM_LATENTS, INNER_STEPS = 10, 5
SIGMA0, SMALLEST_SIGMA, LARGEST_SIGMA = 0.05, 0.0175, 1.0
NUM_DRAWS, NUM_CHAINS = 500, 2000  # of the guide for every point, and of Langevin
CHAIN_STEP, HOTTEST, NUM_WARM = 1e-3, 10.0, 500  # of annealed Langevin; steps at temperature 1
LOW, HIGH, CELLS = -0.75, 1.75, 100  # the box of the grid


class Nets(NamedTuple):
    """Networks of the model and of the guide."""

    energy: CoupledEnergy  # (R^2, R^10) -> scalar
    encoder: GaussianGuide  # R^2 -> mean and log scale of the latents


class Density(NamedTuple):
    """An unnormalized density at points, by importance sampling."""

    log_p: np.ndarray  # (num_points,)
    ess: np.ndarray  # (num_points,), effective number of the guide's samples


def checkerboard(rng: np.random.Generator, num_points: int) -> Array:
    """Points of the squares [0, .5]^2 and [.5, 1]^2."""
    square = rng.integers(0, 2, (num_points, 1))
    return jnp.asarray((rng.uniform(size=(num_points, 2)) + square) / 2, jnp.float32)


def noisy_density(points: np.ndarray) -> np.ndarray:
    """The density of the checkerboard with noise of standard deviation ``SIGMA0``."""
    lower, upper = (norm.cdf((points - a) / SIGMA0) - norm.cdf((points - a - 0.5) / SIGMA0) for a in (0, 0.5))
    return 2 * (lower.prod(-1) + upper.prod(-1))


def model(v: Array, nets: Nets) -> None:
    energy = eqx_module("energy", nets.energy)
    with numpyro.plate("points", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.real, (NUM_LATENTS,)))
        numpyro.sample("v", BaseMeasure(constraints.real, (2,)), obs=v)
        numpyro.factor("coupling", -jax.vmap(energy)(v, h))


def guide(v: Array, nets: Nets) -> None:
    encoder = eqx_module("encoder", nets.encoder)
    with numpyro.plate("points", len(v)):
        numpyro.sample("h", amortized_normal(encoder, v))


def make_engine(num_steps: int, learning_rate: float, hypergradient: Unrolled | Implicit, smallest_sigma: float) -> BiSM:
    def adam(num_steps: int) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps, alpha=0.01)
        return optax.adam(schedule, b2=0.95, eps_root=1e-16)  # eps_root: unrolled steps differentiate the square root

    objective = MultiscaleDenoisingScoreMatching(SIGMA0, smallest_sigma, LARGEST_SIGMA)
    return BiSM(
        model,
        guide,
        adam(num_steps),
        adam(num_steps * INNER_STEPS),
        objective,
        PosteriorFisher(),
        INNER_STEPS,
        hypergradient=hypergradient,
        batch_size=BATCH_SIZE,
    )


def trained(nets: Nets, params: dict[str, Any]) -> Nets:
    """The networks with the weights of a fit."""
    return Nets(*(eqx.combine(params[f"{name}$params"], net) for name, net in nets._asdict().items()))


def density(rng_key: Array, nets: Nets, points: Array, num_draws: int, chunk: int = 200) -> Density:
    """The marginal density of points, up to the normalizer, with the guide as the proposal."""

    @eqx.filter_jit
    def of_point(nets: Nets, key: Array, v: Array) -> tuple[Array, Array]:
        loc, log_scale = nets.encoder(v)
        noise = jax.random.normal(key, (num_draws, NUM_LATENTS))
        h = loc + jnp.exp(log_scale) * noise
        log_q = (jax.scipy.stats.norm.logpdf(noise) - log_scale).sum(-1)
        log_w = -jax.vmap(nets.energy, (None, 0))(v, h) - log_q
        log_sum, log_square = jax.nn.logsumexp(log_w), jax.nn.logsumexp(2 * log_w)
        return log_sum - np.log(num_draws), jnp.exp(2 * log_sum - log_square)

    keys = jax.random.split(rng_key, len(points))
    values = jax.lax.map(lambda x: of_point(nets, *x), (keys, points), batch_size=chunk)
    return Density(*map(np.asarray, values))


def draw(rng_key: Array, nets: Nets, num_chains: int, temperatures: np.ndarray) -> np.ndarray:
    """Points by annealed Langevin of points and latents together, from noise, with the noise of the data taken off."""
    keys = jax.random.split(rng_key, 3)
    start = {
        name: 0.5 + jax.random.normal(key, (num_chains, size))
        for name, size, key in zip("vh", (2, NUM_LATENTS), keys, strict=False)
    }

    @eqx.filter_jit
    def run(nets: Nets) -> Array:
        def log_prob(x: dict[str, Array]) -> Array:
            return -jax.vmap(nets.energy)(x["v"], x["h"])

        x = annealed_langevin(keys[2], log_prob, start, CHAIN_STEP, temperatures)
        return denoise(lambda v: log_prob({"v": v, "h": x["h"]}), x["v"], SIGMA0)

    return np.asarray(run(nets))


def grid() -> np.ndarray:
    """Centers of the cells of the box, of shape ``(CELLS^2, 2)``; the second coordinate runs first."""
    centers = LOW + (HIGH - LOW) * (np.arange(CELLS) + 0.5) / CELLS
    return np.stack(np.meshgrid(centers, centers, indexing="ij"), -1).reshape(-1, 2)


def report(on_grid: Density, at_test: Density, test: Array, num_draws: int) -> np.ndarray:
    """Prints what the fit is worth; the model's density on the grid."""
    area = ((HIGH - LOW) / CELLS) ** 2
    log_z = np.logaddexp.reduce(on_grid.log_p) + np.log(area)
    p, noisy = np.exp(on_grid.log_p - log_z), noisy_density(grid())
    kept = noisy > 1e-12
    kl = (noisy[kept] * (np.log(noisy[kept]) - on_grid.log_p[kept] + log_z)).sum() * area
    values, clean = at_test.log_p - log_z, np.asarray(test, np.float64)
    noise, error, ess = SIGMA0 * norm.rvs(size=clean.shape, random_state=0), values.std() / len(values) ** 0.5, at_test.ess
    rim = np.pad(np.zeros((CELLS - 2, CELLS - 2)), 1, constant_values=1).reshape(-1)
    print(f"\nMean log-likelihood of {len(test)} new points: {values.mean():.3f}, standard error {error:.3f}")
    print(f"  under the distribution of the noisy data: {np.log(noisy_density(clean)).mean():.3f} (of clean data: log 2 = .693)")
    print(f"  under that distribution, for new points with noise: {np.log(noisy_density(clean + noise)).mean():.3f}")
    print(f"Divergence of the model from the distribution of the noisy data, by quadrature: KL {kl:.3f}")
    print(f"Effective sample size of {num_draws} draws: mean {ess.mean():.0f}, 5 % quantile {np.quantile(ess, 0.05):.0f}", end="")
    print(f", least {ess.min():.0f}")
    print(f"Mass in the outermost cells of the box: {(p * rim).sum() * area:.1e}")
    return p


def plot(path: Path, data: Array, p: np.ndarray, draws: np.ndarray) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    shown = {"data": np.asarray(data[:2000]), "samples of the model": draws}
    for axis, (title, points) in zip(axes[[0, 3]], shown.items(), strict=True):
        axis.scatter(*points.T, s=2, alpha=0.6, linewidth=0)
        axis.set_title(title)
    densities = {"density of the noisy data": noisy_density(grid()), "density of the model": p}
    style = {"extent": (LOW, HIGH, LOW, HIGH), "vmin": 0, "vmax": max(map(np.max, densities.values())), "cmap": "viridis"}
    for axis, (title, values) in zip(axes[[1, 2]], densities.items(), strict=True):
        image = axis.imshow(values.reshape(CELLS, CELLS).T, origin="lower", **style)
        axis.set_title(title)
    figure.colorbar(image, ax=axes[2])
    for axis in axes:
        axis.set(xlim=(-0.5, 1.5), ylim=(-0.5, 1.5), aspect="equal")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps, num_chains, num_draws = (20, 50, 10) if args.smoke else (args.num_steps, NUM_CHAINS, NUM_DRAWS)
    cooling = annealing_schedule(num_freezing=0, hottest=HOTTEST)
    temperatures = cooling[::50] if args.smoke else np.append(cooling, np.ones(NUM_WARM))
    rng = np.random.default_rng(args.seed)
    data, test = checkerboard(rng, NUM_POINTS), checkerboard(rng, NUM_TEST)
    keys = jax.random.split(jax.random.key(args.seed), 6)
    nets = Nets(point_energy(keys[0], NUM_LATENTS), point_guide(keys[1], NUM_LATENTS))

    forms = {
        "none": Unrolled(0),
        "unrolled": Unrolled(args.num_unroll_steps),
        "implicit": Implicit("hessian", num_cg_steps=5, tol=1e-5),
    }
    engine = make_engine(num_steps, args.learning_rate, forms[args.hypergradient], args.smallest_sigma)
    begin = time.perf_counter()
    result = engine.run(keys[2], num_steps, data, nets)
    print(f"{num_steps} steps, hypergradient {args.hypergradient}: {time.perf_counter() - begin:.0f} seconds, compilation included")
    fitted = trained(nets, result.params)

    points = jnp.asarray(grid(), jnp.float32)
    on_grid, at_test = (density(key, fitted, v, num_draws) for key, v in zip(keys[3:5], (points, test), strict=True))
    p = report(on_grid, at_test, test, num_draws)
    draws = draw(keys[5], fitted, num_chains, temperatures)
    inside = ((np.abs(draws - 0.25) < 0.25 + SIGMA0).all(-1) | (np.abs(draws - 0.75) < 0.25 + SIGMA0).all(-1)).mean()
    print(f"Of {num_chains} samples by annealed Langevin {inside:.3f} lie in the squares, or within {SIGMA0} of them.")
    plot(args.output / "checkerboard.png", data, p, draws)
    print(f"The figure is in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A deep energy-based latent variable model of the checkerboard")
    parser.add_argument("--hypergradient", choices=["none", "unrolled", "implicit"], default="none")
    parser.add_argument("--num-unroll-steps", type=int, default=5, help="where the hypergradient is unrolled")
    parser.add_argument("--num-steps", type=int, default=10_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of model and guide; it decays to a hundredth")
    parser.add_argument("--smallest-sigma", type=float, default=SMALLEST_SIGMA, help="the least noise of the upper level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/deep_checkerboard"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
