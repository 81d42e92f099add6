# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A Gaussian restricted Boltzmann machine learns two squares
==========================================================

Points are uniform on two squares of a checkerboard. A Gaussian-Bernoulli restricted Boltzmann machine with 2 visible and 4
hidden units is learned from them by score matching: in exact form, where the hidden units are summed out, and as a model
with latents and a guide, by bi-level score matching (BiSM) [1], without using that they can be summed out.

The machine is so small that its normalizer is a sum over 16 states. So every fit is judged by its exact mean log-likelihood of
test points, in nats; no density can have more than log 2 = .693 there, and no mixture of 16 normal distributions comes near it.

What is compared, for denoising (DSM, noise .05) and sliced score matching (SSM):

* ``exact``: :class:`ScoreMatching` of the free energy;
* ``N = 0, 5, 10``: BiSM with K = 5 steps of the guide per step, and N more that are differentiated through. N = 0 is plain
  alternation, and is wrong: it ignores that the posterior changes with the model;
* ``implicit``: BiSM with the hypergradient by the implicit function theorem, which is not in the paper; ``Fisher``: the same
  with the guide's Fisher information for the Hessian, which is cheaper.

Settings are those of the code of [1]: batches of 100, Adam with rate 1e-3 and betas .9, .95, 100,000 steps. All seeds of a
method run side by side in one ``vmap``.

The script writes to ``--output``: ``densities.png``, data and the exact density of every method's first seed;
``curves.png``, the log-likelihood of the test points against the step.

**References**

1. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020, arXiv:2010.07856.
"""

# sphinx_gallery_thumbnail_path = "_static/checkerboard_densities.png"

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from jax import Array
from numpyro.distributions import constraints

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    DenoisingScoreMatching,
    GaussianBernoulliRBM,
    GumbelBernoulli,
    Implicit,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_VISIBLE, NUM_HIDDEN = 2, 4
NUM_TRAIN, NUM_TEST, BATCH_SIZE, NUM_INNER_STEPS, NUM_STEPS = 60_000, 10_000, 100, 5, 100_000
OBJECTIVES = {"DSM": DenoisingScoreMatching(0.05), "SSM": SlicedScoreMatching()}
METHODS = [
    f"{objective}, {method}" for objective in OBJECTIVES for method in ("exact", "N = 0", "N = 5", "N = 10", "implicit", "Fisher")
]
METHODS.remove("SSM, N = 10")


class Fit(NamedTuple):
    """One method with all its seeds."""

    steps: np.ndarray  # (num_looks,)
    log_likelihood: np.ndarray  # (num_looks, num_seeds), nats per test point
    params: dict[str, Array]  # (num_seeds, ...), at the end
    seconds: float


def machine() -> GaussianBernoulliRBM:
    bound = NUM_HIDDEN**-0.5

    def uniform(name: str, *shape: int) -> Array:
        return numpyro.param(name, lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound))

    weights, b, c = uniform("weights", NUM_VISIBLE, NUM_HIDDEN), uniform("b", NUM_VISIBLE), uniform("c", NUM_HIDDEN)
    scale = numpyro.param("scale", jnp.ones(NUM_VISIBLE), constraint=constraints.positive)
    return GaussianBernoulliRBM(weights, b, c, scale)


def marginal(v: Array) -> None:
    """The machine with its hidden units summed out."""
    with numpyro.plate("points", len(v)):
        numpyro.sample("v", machine(), obs=v)


def joint(v: Array) -> None:
    """The same machine as a random field of both layers."""
    rbm = machine()
    with numpyro.plate("points", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (NUM_HIDDEN,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
        numpyro.factor("coupling", -rbm.joint_energy(v, h))


def guide(v: Array) -> None:
    """Hidden units that are independent, with logits linear in v: the posterior's own form."""
    bound = NUM_VISIBLE**-0.5
    slope = numpyro.param("slope", lambda key: jax.random.uniform(key, (NUM_VISIBLE, NUM_HIDDEN), minval=-bound, maxval=bound))
    shift = numpyro.param("shift", lambda key: jax.random.uniform(key, (NUM_HIDDEN,), minval=-bound, maxval=bound))
    with numpyro.plate("points", len(v)):
        numpyro.sample("h", GumbelBernoulli(v @ slope + shift, temperature=0.1).to_event(1))


def make_engine(method: str) -> ScoreMatching | BiSM:
    objective, how = method.split(", ")
    adam = optax.adam(
        1e-3, b1=0.9, b2=0.95, eps_root=1e-24
    )  # eps_root: the guide's Adam is differentiated, and sqrt(0) has no slope
    if how == "exact":
        return ScoreMatching(marginal, adam, OBJECTIVES[objective], batch_size=BATCH_SIZE)
    hypergradient: Unrolled | Implicit = (
        Implicit("fisher", num_cg_steps=3, num_draws=2) if how == "Fisher" else Implicit("hessian", num_cg_steps=5, tol=1e-5)
    )
    if how.startswith("N"):
        hypergradient = Unrolled(int(how.removeprefix("N = ")))
    shared: dict[str, Any] = {"num_inner_steps": NUM_INNER_STEPS, "batch_size": BATCH_SIZE}
    return BiSM(joint, guide, adam, adam, OBJECTIVES[objective], hypergradient=hypergradient, **shared)


def make_points(num_points: int, seed: int) -> Array:
    """Uniform on the squares [0, 1/2]^2 and [1/2, 1]^2."""
    rng = np.random.default_rng(seed)
    square = rng.integers(2, size=(num_points, 1))
    return jnp.asarray((rng.uniform(size=(num_points, 2)) + square) / 2, jnp.float32)


def log_density(params: dict[str, Array], v: Array) -> Array:
    """Exact and normalized, ``(len(v),)``."""
    rbm = GaussianBernoulliRBM(params["weights"], params["b"], params["c"], params["scale"])
    return rbm.log_prob(v) - rbm.log_normalizer()


def fit(engine: Any, train: Array, test: Array, num_seeds: int, num_steps: int) -> Fit:
    every = max(1, num_steps // 20)
    begin = time.perf_counter()
    state = jax.jit(jax.vmap(lambda key: engine.init(key, train)))(jax.random.split(jax.random.key(0), num_seeds))

    @jax.jit
    def advance(state: Any) -> tuple[Any, Array]:
        def step(_: int, state: Any) -> Any:
            return jax.vmap(lambda one: engine.update(one, train)[0])(state)

        state = jax.lax.fori_loop(0, every, step, state)
        return state, jax.vmap(lambda params: log_density(params, test).mean())(state.params)

    looks = []
    for _ in range(num_steps // every):
        state, log_likelihood = advance(state)
        looks.append(np.asarray(log_likelihood))
    steps = every * np.arange(1, len(looks) + 1)
    return Fit(steps, np.stack(looks), state.params, time.perf_counter() - begin)


def print_head(num_steps: int, width: int = 15) -> None:
    heads = "".join(f"{int(share * num_steps):>9}" for share in (0.1, 0.2, 0.4, 0.6, 1.0))
    print(f"{'steps':<{width}}{heads}   {'range at the end':>17}{'seconds':>9}")


def print_row(method: str, result: Fit, width: int = 15) -> None:
    at = [np.argmin(np.abs(result.steps - share * result.steps[-1])) for share in (0.1, 0.2, 0.4, 0.6, 1.0)]
    means, last = result.log_likelihood.mean(1), result.log_likelihood[-1]
    row = "".join(f"{means[i]:>9.3f}" for i in at)
    print(f"{method:<{width}}{row}   {last.min():>8.3f} to {last.max():.3f}{result.seconds:>9.0f}", flush=True)


def plot_densities(path: Path, points: Array, fits: dict[str, Fit]) -> None:
    axis = jnp.linspace(-0.5, 1.5, 200)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    columns = (len(fits) + 2) // 2
    figure, axes = plt.subplots(2, columns, figsize=(2.4 * columns, 5.2), sharex=True, sharey=True)
    axes = axes.ravel()
    axes[0].plot(*np.asarray(points[:2000]).T, ".", markersize=1)
    axes[0].set_title("data")
    for ax, (method, result) in zip(axes[1:], fits.items(), strict=False):
        density = np.exp(log_density(jax.tree.map(lambda x: x[0], result.params), grid)).reshape(200, 200)
        ax.pcolormesh(axis, axis, density, vmin=0, vmax=2, rasterized=True)
        ax.set_title(method)
    for ax in axes:
        ax.set(xlim=(-0.5, 1.5), ylim=(-0.5, 1.5), xticks=(0, 1), yticks=(0, 1), aspect="equal")
    for ax in axes[1 + len(fits) :]:
        ax.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(path: Path, fits: dict[str, Fit]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for ax, objective in zip(axes, OBJECTIVES, strict=True):
        for method, result in fits.items():
            if method.startswith(objective):
                style = "--" if method.endswith(("10", "Fisher")) else "-"  # they lie on other curves
                ax.plot(result.steps, result.log_likelihood.mean(1), style, label=method.split(", ")[1])
        ax.set(xlabel="step", title=objective, ylim=(-0.8, 0.45))
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set_ylabel("log-likelihood of a test point, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    train, test = make_points(NUM_TRAIN, 0), make_points(NUM_TEST, 1)
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"Mean log-likelihood of a test point, {args.num_seeds} seeds; the bound is {np.log(2):.3f}")
    print_head(args.num_steps)
    fits = {}
    for method in args.methods:
        fits[method] = fit(make_engine(method), train, test, args.num_seeds, args.num_steps)
        print_row(method, fits[method])
    plot_densities(args.output / "densities.png", train, fits)
    plot_curves(args.output / "curves.png", fits)
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/checkerboard"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.methods, args.num_steps, args.num_seeds = ["DSM, exact", "DSM, N = 5", "SSM, Fisher"], 40, 2
    main(args)
