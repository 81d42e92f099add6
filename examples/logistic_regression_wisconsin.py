# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Bayesian logistic regression with a learned prior
=================================================

Is a tumor malignant? Nine scores of a biopsy, 683 patients of Wisconsin, and a logistic regression whose weights share a
prior mean that is learned by maximum marginal likelihood, as in Section 3.1 of [1]:

.. math::

    w \sim N(\theta 1, 5 I_9), \qquad y_m \mid w \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(x_m^T w)).

The weights are one latent that all patients share, so that each particle is a whole classifier; a prediction averages over
them. PGD, PQN, PMGD and SOUL run with the settings of [1] (h = .01, 400 steps, 100 particles, SOUL's chain makes 100
moves a step), and IPLA and NumPyro's ``SVI`` with ``AutoNormal`` for comparison.

The numbers of [1] come from one split of the data, on features that were standardized with the test rows. Here every row of
the table is over random splits of its own, and features are standardized by the rows that are learned from.

What to expect: the same log pointwise predictive density (LPPD) for all methods, about -.09, and a test error of 3 to 4 %;
the spread over splits is far larger than any difference between methods. All reach the same parameter from both starts. Two
minutes on two cores.

The script writes to ``--output``: ``trajectories.png``, the parameter against the step from two starts, and
``predictions.png``, the distribution of the test metrics over the splits.

**References**

1. Kuntz, Lim and Johansen, *Particle algorithms for maximum likelihood training of latent variable models*, AISTATS 2023.
"""

# sphinx_gallery_thumbnail_path = "_static/wisconsin_trajectories.png"

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal
from sklearn.model_selection import train_test_split

from numpyro_ebm import ParticleMMLE, UnadjustedLangevin, sample_posterior
from numpyro_ebm.datasets import Patients, breast_cancer_wisconsin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEP_SIZE, NUM_STEPS, NUM_PARTICLES = 1e-2, 400, 100
PUBLISHED = {  # Kuntz et al.: LPPD, test error, seconds
    "PGD": ("-.0939", ".0353", "1.7"),
    "PQN": ("-.0940", ".0349", "1.6"),
    "PMGD": ("-.0937", ".0345", "1.6"),
    "SOUL": ("-.0940", ".0351", "27.9"),
    "SVI": ("-.0934", ".0365", "7.5"),
}


class Split(NamedTuple):
    """Patients to learn from and to test on, features standardized by the former."""

    x: Array  # (546, 9)
    y: Array  # (546,)
    x_test: Array  # (137, 9)
    y_test: Array  # (137,)


class Run(NamedTuple):
    """One method on one split."""

    theta: np.ndarray  # (num_steps,)
    weights: Array  # (num_draws, 9)
    seconds: float


def model(x: Array, y: Array | None = None) -> None:
    theta = numpyro.param("theta", 0.0)
    w = numpyro.sample("w", dist.Normal(theta, jnp.sqrt(5)).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("patients", len(x)):
        numpyro.sample("malignant", dist.Bernoulli(logits=x @ w), obs=y)


def make_split(patients: Patients, seed: int) -> Split:
    order = np.random.default_rng(seed).permutation(len(patients.features))
    train, test = np.split(order, [len(order) * 4 // 5])
    mean, sd = patients.features[train].mean(0), patients.features[train].std(0)
    x, y = jnp.asarray((patients.features - mean) / sd, jnp.float32), jnp.asarray(patients.malignant)
    return Split(x[train], y[train], x[test], y[test])


def make_published_split(patients: Patients) -> Split:
    """The split of Kuntz et al.: scikit-learn's with seed 0, features standardized by all rows, the test rows included."""
    x = (patients.features - patients.features.mean(0)) / patients.features.std(0)
    train, test, y, y_test = train_test_split(x, patients.malignant, test_size=0.2, random_state=0)
    x, x_test = jnp.asarray(train, jnp.float32), jnp.asarray(test, jnp.float32)
    return Split(x, jnp.asarray(y), x_test, jnp.asarray(y_test))


def make_engines(start: float) -> dict[str, ParticleMMLE]:
    settings: dict[str, Any] = {"step_size": STEP_SIZE, "init_strategy": init_to_value(values={"w": jnp.full(9, start)})}
    cloud = {"num_particles": NUM_PARTICLES, **settings}
    return {
        "PGD": ParticleMMLE.pgd(model, **cloud),
        "PQN": ParticleMMLE.pqn(model, **cloud),
        "PMGD": ParticleMMLE.pmgd(model, **cloud),
        "SOUL": ParticleMMLE.soul(model, num_moves=NUM_PARTICLES, **settings),
        "IPLA": ParticleMMLE.ipla(model, **cloud),
    }


def run_engine(rng_key: Array, engine: ParticleMMLE, split: Split, num_steps: int, start: float = 0.0) -> Run:
    run_key, draw_key = jax.random.split(rng_key)
    begin = time.perf_counter()
    result = engine.run(
        run_key, num_steps, split.x, split.y, progress_bar=False, init_params={"theta": start}, collect=engine.get_params
    )
    weights = engine.get_particles(result.state, split.x, split.y)["w"]
    if engine.num_particles == 1:  # SOUL's posterior is the last stretch of its chain
        sampler = UnadjustedLangevin(STEP_SIZE, num_steps=1)
        more = {"num_samples": NUM_PARTICLES, "num_warmup": 0, "sampler": sampler, "start": {"w": weights}}
        weights = sample_posterior(draw_key, model, result.params, split.x, split.y, **more)["w"][0]
    weights = jax.block_until_ready(weights)
    return Run(result.collected["theta"], weights, time.perf_counter() - begin)


def run_svi(rng_key: Array, svi: SVI, split: Split, num_steps: int) -> Run:
    run_key, draw_key = jax.random.split(rng_key)
    begin = time.perf_counter()
    result = svi.run(run_key, num_steps, split.x, split.y, progress_bar=False)
    draws = Predictive(svi.guide, params=result.params, num_samples=NUM_PARTICLES)(draw_key, split.x, split.y)
    weights = jax.block_until_ready(draws["w"])
    return Run(np.full(1, result.params["theta"]), weights, time.perf_counter() - begin)


def judge(weights: Array, split: Split) -> tuple[float, float]:
    """Log pointwise predictive density per test patient, and the fraction that is misclassified."""
    logits = split.x_test @ weights.T
    log_p = dist.Bernoulli(logits=logits).log_prob(split.y_test[:, None])
    lppd = jax.scipy.special.logsumexp(log_p, axis=1, b=1 / log_p.shape[1])
    malignant = jax.nn.sigmoid(logits).mean(1) > 0.5
    return float(lppd.mean()), float((malignant != split.y_test).mean())


def print_table(metrics: dict[str, np.ndarray], num_splits: int) -> None:
    print(f"\n{num_splits} random splits of 683 patients, 80 % to learn from: mean +- standard deviation over splits,")
    print("and beside it what Kuntz et al. (2023) publish for one split. Seconds are the median, and so without compilation.")
    columns = f"{'LPPD':>18}{'test error':>18}{'theta':>16}{'variance of it':>17}{'seconds':>9}"
    print(f"The variance of theta is that over the second half of the steps.\n{'':<6}{columns}   published: LPPD, error, s")
    for name, rows in metrics.items():
        lppd, error, theta, spread, seconds = rows.T
        published = ", ".join(PUBLISHED[name]) if name in PUBLISHED else "-"
        print(
            f"{name:<6}{lppd.mean():>9.4f} +- {lppd.std():.4f}{error.mean():>9.4f} +- {error.std():.4f}"
            f"{theta.mean():>8.3f} +- {theta.std():.3f}{spread.mean():>14.1e}{np.median(seconds):>12.2f}   {published}"
        )


def plot_trajectories(path: Path, runs: dict[str, tuple[Run, Run]]) -> None:
    figure, axes = plt.subplots(1, len(runs), figsize=(2 * len(runs), 2.8), sharey=True, layout="constrained")
    for axis, (name, pair) in zip(axes, runs.items(), strict=True):
        for run, start in zip(pair, ("from 0", "from 10"), strict=True):
            axis.plot(run.theta, label=start, linewidth=1)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(r"$\theta$")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_predictions(path: Path, metrics: dict[str, np.ndarray]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for column, (axis, label) in enumerate(zip(axes, ("LPPD per test patient", "test error"), strict=True)):
        axis.boxplot([rows[:, column] for rows in metrics.values()])
        axis.set_xticks(range(1, len(metrics) + 1), list(metrics))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def load(smoke: bool) -> Patients:
    try:
        return breast_cancer_wisconsin()
    except FileNotFoundError:
        if not smoke:
            raise
        print("The data are not there: random numbers of the same shape stand in, to see that everything runs.")
        rng = np.random.default_rng(0)
        features = rng.integers(1, 11, (683, 9)).astype(float)
        return Patients(features, (features.mean(1) > 5.5).astype(int))


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        args.num_splits, args.num_steps = 2, 20
    burn_in = args.num_steps // 2
    patients = load(args.smoke)
    splits = [make_split(patients, seed) for seed in range(args.num_splits)]
    engines = make_engines(start=0.0)
    svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO(num_particles=10))

    metrics = {}
    for name in (*engines, "SVI"):
        rows = []
        for seed, split in enumerate(splits):
            key = jax.random.key(seed)
            if name == "SVI":
                run = run_svi(key, svi, split, 5 * args.num_steps)
            else:
                run = run_engine(key, engines[name], split, args.num_steps)
            late = run.theta[burn_in:] if len(run.theta) > 1 else run.theta
            rows.append([*judge(run.weights, split), late.mean(), late.var(), run.seconds])
        metrics[name] = np.array(rows)
        print(f"{name}: done, {sum(row[-1] for row in rows):.1f} s")
    print_table(metrics, len(splits))

    key = jax.random.key(0)
    print("\nThe one split of the paper, on features standardized with the test rows: LPPD, test error")
    published = make_published_split(patients)
    for name, engine in engines.items():
        lppd, error = judge(run_engine(key, engine, published, args.num_steps).weights, published)
        print(f"{name:<6}{lppd:>9.4f}{error:>9.4f}")

    far = make_engines(start=10.0)
    trajectories = {
        name: (
            run_engine(key, engines[name], splits[0], args.num_steps),
            run_engine(key, far[name], splits[0], args.num_steps, start=10.0),
        )
        for name in engines
    }
    plot_trajectories(args.output / "trajectories.png", trajectories)
    plot_predictions(args.output / "predictions.png", metrics)
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bayesian logistic regression with a learned prior")
    parser.add_argument("--num-splits", type=int, default=20)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--output", type=Path, default=Path("outputs/logistic_regression_wisconsin"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
