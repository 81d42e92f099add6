# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Empirical Bayes for batters and for schools
===========================================

Many similar units with one noisy measurement each, and a population they are drawn from that is unknown:

.. math::

    x_j \sim N(\mu, \tau^2), \qquad y_j \mid x_j \sim N(x_j, s_j^2), \quad s_j \text{ known}.

Empirical Bayes learns :math:`\mu` and :math:`\tau` by maximum marginal likelihood and plugs them in. Here the marginal
likelihood has a closed form, which shows what ``ParticleMMLE`` finds and what plugging in costs.

*Batters* (Efron and Morris [1]): averages of 18 players over their first 45 at-bats, on the variance-stabilized scale
:math:`\sqrt{45} \arcsin(2y - 1)`, where the noise has variance 1. Shrinking them predicts the rest of the season far better.
The particles are the standardized effects :math:`z = (x - \mu) / \tau`. With the effects themselves and h = .1 the fit ends at
:math:`\tau = .73` instead of .23: unadjusted particles are too wide by a fraction of about hc/2, the curvature is :math:`1 +
1/\tau^2`, and the likelihood is too flat in :math:`\tau` to outweigh that.

*Schools* (Rubin [2]): the marginal likelihood of eight schools is highest at :math:`\tau = 0`, where all effects are equal. No
engine can do better than the likelihood it maximizes. With standardized effects the particles head for 0; with the effects
themselves they stall near 3, where the likelihood is so flat that the bias of the step outweighs it. The intervals that follow
from plugging :math:`\tau = 0` in are far too narrow, which the full Bayesian draws show. This is a limit of maximum likelihood
and not of particles: with eight units, put a prior on :math:`\tau` and use MCMC.

What to expect: half a minute on two cores. It prints two tables and writes ``batters.png`` and ``schools.png`` to ``--output``.

**References**

1. Efron and Morris, *Data analysis using Stein's estimator and its generalizations*, JASA 70 (1975).
2. Rubin, *Estimation in parallel randomized experiments*, Journal of Educational Statistics 6 (1981).
"""

# sphinx_gallery_thumbnail_path = "_static/empirical_bayes_batters.png"

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array
from numpyro.distributions import constraints
from scipy.optimize import minimize_scalar

from numpyro_ebm import ParticleMMLE, sample_posterior, standard_errors
from numpyro_ebm.datasets import Batters, EightSchools, efron_morris, eight_schools

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AT_BATS = 45
NUM_PARTICLES, NUM_STEPS = 100, 4000


class Exact(NamedTuple):
    """The maximum of the closed-form marginal likelihood."""

    mu: float
    tau: float


def model(y: Array, scale: Array, standardized: bool = False) -> None:
    mu = numpyro.param("mu", 0.0)
    tau = numpyro.param("tau", 5.0, constraint=constraints.positive)
    with numpyro.plate("units", len(y)):
        if standardized:
            z = numpyro.sample("z", dist.Normal(0, 1))
            x = numpyro.deterministic("x", mu + tau * z)
        else:
            x = numpyro.sample("x", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


def log_likelihood(y: np.ndarray, scale: np.ndarray, tau: float) -> tuple[float, float]:
    """The log marginal likelihood at ``tau`` and the best ``mu`` for it, and that ``mu``."""
    variance = scale**2 + tau**2
    mu = (y / variance).sum() / (1 / variance).sum()
    return float(-0.5 * (np.log(2 * np.pi * variance) + (y - mu) ** 2 / variance).sum()), float(mu)


def maximize(y: np.ndarray, scale: np.ndarray) -> Exact:
    found = minimize_scalar(lambda tau: -log_likelihood(y, scale, tau)[0], bounds=(0, 50), method="bounded")
    best = max([0.0, float(found.x)], key=lambda tau: log_likelihood(y, scale, tau)[0])
    return Exact(log_likelihood(y, scale, best)[1], best)


def to_normal(average: np.ndarray) -> np.ndarray:
    return np.sqrt(AT_BATS) * np.arcsin(2 * average - 1)


def to_average(x: np.ndarray) -> np.ndarray:
    return (np.sin(x / np.sqrt(AT_BATS)) + 1) / 2


def fit(rng_key: Array, y: np.ndarray, scale: np.ndarray, step_size: float, num_steps: int, standardized: bool = False):
    """A run of the particle engine, with its parameters at every step."""
    engine = ParticleMMLE(model, optax.adam(optax.cosine_decay_schedule(0.05, num_steps, 0.02)), NUM_PARTICLES, step_size)
    data = jnp.asarray(y), jnp.asarray(scale)
    result = engine.run(
        rng_key, num_steps, *data, standardized=standardized, progress_bar=False, collect=engine.get_params,
        init_params={"mu": float(y.mean()), "tau": float(y.std())},
    )  # fmt: skip
    return result, engine.get_particles(result.state, *data, standardized=standardized)


def late_mean(trace: dict[str, np.ndarray]) -> dict[str, float]:
    """Parameters averaged over the last half of the steps, which takes the particles' noise out."""
    return {name: float(value[len(value) // 2 :].mean()) for name, value in trace.items()}


def batters(rng_key: Array, data: Batters, num_steps: int, path: Path) -> None:
    y, scale = to_normal(data.early), np.ones(len(data.early))
    exact = maximize(y, scale)
    keys = jax.random.split(rng_key, 3)
    result, _ = fit(keys[0], y, scale, 0.02, num_steps, standardized=True)
    found = late_mean(result.collected)
    settings = {"num_samples": max(num_steps // 8, 10), "num_chains": 20}
    draws = sample_posterior(keys[1], model, found, jnp.asarray(y), jnp.asarray(scale), **settings)["x"].reshape(-1, len(y))
    args = jnp.asarray(y), jnp.asarray(scale)
    standardized = sample_posterior(keys[2], model, found, *args, standardized=True, **settings)
    error = standard_errors(model, found, standardized, *args, standardized=True)

    shrunk = to_average(np.asarray(draws)).mean(0)
    plug_in = exact.mu + exact.tau**2 / (exact.tau**2 + 1) * (y - exact.mu)
    james_stein = y.mean() + (1 - (len(y) - 3) / ((y - y.mean()) ** 2).sum()) * (y - y.mean())
    predictions = {
        "first 45 at-bats": data.early,
        "James-Stein": to_average(james_stein),
        "exact maximum, plugged in": to_average(plug_in),
        "particles": shrunk,
    }
    print(f"Batters: mu {found['mu']:.3f} (exact {exact.mu:.3f}), tau {found['tau']:.3f} (exact {exact.tau:.3f});")
    errors = {name: float(value) for name, value in error.standard_errors.items()}
    print(f"standard errors by Louis' identity: mu {errors['mu']:.3f}, tau {errors['tau']:.3f}.")
    print("Root mean squared error for the rest of the season:")
    for name, prediction in predictions.items():
        print(f"  {name:<28}{np.sqrt(((prediction - data.rest) ** 2).mean()):.4f}")

    low, high = np.quantile(to_average(np.asarray(draws)), [0.05, 0.95], axis=0)
    order = np.argsort(data.early)
    figure, axis = plt.subplots(figsize=(6, 5.5), layout="constrained")
    rows = np.arange(len(order))
    axis.hlines(rows, low[order], high[order], color="0.75", linewidth=4, label="90% of the particles' posterior")
    axis.plot(data.early[order], rows, "x", color="C3", label="first 45 at-bats")
    axis.plot(shrunk[order], rows, "o", color="C0", label="posterior mean")
    axis.plot(data.rest[order], rows, "D", color="k", markersize=4, label="rest of the season")
    axis.set_yticks(rows, np.array(data.name)[order], fontsize=8)
    axis.set_xlabel("batting average")
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def schools(rng_key: Array, data: EightSchools, num_steps: int, path: Path) -> None:
    y, scale = data.effect, data.standard_error
    exact = maximize(y, scale)
    keys = jax.random.split(rng_key, 2)
    centered, _ = fit(keys[0], y, scale, 0.5, num_steps)
    standardized, particles = fit(keys[1], y, scale, 0.1, num_steps, standardized=True)
    end = {name: float(value[-1]) for name, value in standardized.collected.items()}
    plugged = end["mu"] + end["tau"] * np.asarray(particles["z"])  # (particles, schools)
    reference = data.draws["theta"].reshape(-1, 8)

    print(f"\nSchools: the marginal likelihood is highest at tau = {exact.tau:.2f}, mu = {exact.mu:.2f}.")
    print(f"After {num_steps} steps: tau {centered.params['tau']:.3f} with effects as latents, {end['tau']:.3f} standardized.")
    print(f"Full Bayes (reference draws): E mu {data.draws['mu'].mean():.2f}, E tau {data.draws['tau'].mean():.2f}.")
    print("Width of the 90 % interval of each school's effect:")
    widths = [np.diff(np.quantile(draws, [0.05, 0.95], axis=0), axis=0)[0] for draws in (plugged, reference)]
    for name, width in zip(("plugged in", "full Bayes"), widths, strict=True):
        print(f"  {name:<12}" + " ".join(f"{w:5.1f}" for w in width))

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    taus = np.linspace(0, 25, 200)
    values = np.array([log_likelihood(y, scale, tau)[0] for tau in taus])
    axes[0].plot(taus, values - values.max())
    axes[0].set(xlabel=r"$\tau$", ylabel="log marginal likelihood (best $\\mu$)", title="exact")
    for name, run in (("effects as latents", centered), ("standardized", standardized)):
        axes[1].semilogy(run.collected["tau"], label=name)
    axes[1].set(xlabel="step", ylabel=r"$\tau$", title="particles")
    axes[1].legend(frameon=False)
    for shift, name, draws in ((-0.15, "plugged in", plugged), (0.15, "full Bayes", reference)):
        low, middle, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
        axes[2].errorbar(np.arange(8) + shift, middle, [middle - low, high - middle], fmt="o", capsize=2, label=name)
    axes[2].plot(np.arange(8), y, "x", color="k", label="measured")
    axes[2].set_xticks(range(8), "ABCDEFGH")
    axes[2].set(xlabel="school", ylabel="effect", title="90% intervals")
    axes[2].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def load(smoke: bool) -> tuple[Batters, EightSchools]:
    try:
        return efron_morris(), eight_schools()
    except FileNotFoundError:
        if not smoke:
            raise
        print("The data are not there: random numbers of the same shape stand in, to see that everything runs.")
        rng = np.random.default_rng(0)
        early, rest = rng.uniform(0.2, 0.4, (2, 18))
        draws = {"theta": rng.normal(size=(10, 100, 8)), "mu": rng.normal(size=(10, 100)), "tau": rng.exponential(size=(10, 100))}
        stand_in = EightSchools(rng.normal(8, 10, 8), rng.uniform(9, 18, 8), draws)
        return Batters([f"player {i}" for i in range(18)], early, rest, np.full(18, 400.0)), stand_in


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps = 40 if args.smoke else NUM_STEPS
    players, coached = load(args.smoke)
    keys = jax.random.split(jax.random.key(args.seed))
    batters(keys[0], players, num_steps, args.output / "batters.png")
    schools(keys[1], coached, num_steps, args.output / "schools.png")
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Empirical Bayes for batters and for schools")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/empirical_bayes"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
