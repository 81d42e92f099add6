# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Particle algorithms on a model that can be solved by hand
=========================================================

The toy hierarchical model of [1]: one parameter and D = 100 latents,

.. math::

    x_d \sim N(\theta, 1), \qquad y_d \mid x_d \sim N(x_d, 1), \qquad d = 1, \dots, D.

The marginal is :math:`y_d \sim N(\theta, 2)`, so that the maximum of the marginal likelihood is :math:`\theta^* = \bar y`,
with the standard error :math:`\sqrt{2 / D}`; the posterior is :math:`x_d \mid y \sim N((y_d + \theta) / 2, 1/2)`. Everything
is linear, and with it the algorithms: the centered pair :math:`z = (\theta - \bar y, \bar x - \bar y)` of the parameter and
the mean of all particles follows

.. math::

    z \leftarrow F z + \xi, \qquad \xi \sim N(0, Q), \qquad \Sigma = F \Sigma F^T + Q,

so that the stationary distribution of the parameter is known exactly at every step size h and number of particles N [2, 3]. For
IPLA it tends to :math:`N(\bar y, 2 / (ND))` as h falls, which is :math:`p_\theta(y)^N`: the parameter is known to one N-th of the
variance that the data leave.

Nine algorithms start at :math:`\theta = 0` and have to reach :math:`\bar y`, each with a step size that suits it. With a gradient
summed over data the step has to be below about 2 / (D + 2) although the particles alone would stand h = 1. Averaged gradients
(EBIPLA), Newton's direction (PQN) and the exact maximum (PMGD) stand steps that do not shrink with D. Of the kinetic forms,
the exponential integrator (KIPLMC1) needs h below about 2 * friction / (D + 1), and the splitting (KIPLMC2) below about
2 / sqrt(D + 1).

What to expect: a minute and a half of processor time. All means reach :math:`\bar y` within a few Monte Carlo errors. PGD
at 2.05 / (D + 2) grows by 3 % a step, and the engine stops it when numbers are no longer finite. The spread falls as
:math:`N^{-1/2}`, on the exact line and not only along it.

The script writes to ``--output``:

* ``trajectories.png``: the parameter against the step, for nine algorithms;
* ``step_limits.png``: PGD with steps above, at and below the limit;
* ``concentration.png``: the stationary spread of the parameter against the number of particles.

**References**

1. Kuntz, Lim and Johansen, *Particle algorithms for maximum likelihood training of latent variable models*, AISTATS 2023.
2. Akyildiz et al., *Interacting particle Langevin algorithm for maximum marginal likelihood estimation*, ESAIM: PS 29 (2025),
   arXiv:2303.13429.
3. Marks, Wang and Akyildiz, *Energy-based interacting particle Langevin algorithm*, UAI 2026, arXiv:2510.12311.
"""

# sphinx_gallery_thumbnail_path = "_static/toy_trajectories.png"

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.infer import init_to_value

from numpyro_ebm import NonFiniteError, ParticleMMLE, convergence, sample_posterior, standard_errors

matplotlib.use("Agg")
import matplotlib.pyplot as plt

D, N = 100, 10  # latents and particles, as in [1]
NUM_STEPS, NUM_SHOWN = 40_000, 1000  # of them in the figure
LIMIT = 4 / (D + 2 + np.sqrt(D**2 + 4))  # of h for a gradient summed over data: 2 / (largest eigenvalue)
STEP_SIZES = {"2.05": 2.05 / (D + 2), "2": 2 / (D + 2), "0.75": 0.75 / (D + 2)}  # over D + 2, as in [1]
CLOUDS = (1, 4, 16, 64)  # numbers of particles
NUM_LONG, NUM_BATCHES = 20_000, 20  # steps of a run that the stationary spread is measured on, and batches for errors
CONCENTRATION = {"IPLA": 1 / (D + 2), "PGD": 1 / (D + 2), "EBIPLA": 0.25}  # and their steps h


class Run(NamedTuple):
    """One algorithm's run."""

    theta: np.ndarray  # (num_steps,)
    particles: Array  # (num_particles, D), where they stand in the end
    seconds: float  # compilation included


def model(y: Array) -> None:
    theta = numpyro.param("theta", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(theta, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def make_engines() -> dict[str, ParticleMMLE]:
    """Every algorithm with a step that suits it."""
    at_zero = init_to_value(values={"x": jnp.zeros(D)})
    cloud: dict[str, Any] = {"num_particles": N, "init_strategy": at_zero}
    kinetic = {"friction": 2.0, **cloud}  # critical damping of the slowest direction, whose curvature is 1
    return {
        "PGD": ParticleMMLE.pgd(model, step_size=1 / (D + 2), **cloud),
        "IPLA": ParticleMMLE.ipla(model, step_size=1 / (D + 2), **cloud),
        "EBIPLA": ParticleMMLE.ebipla(model, step_size=0.25, **cloud),
        "PQN": ParticleMMLE.pqn(model, step_size=0.25, **cloud),
        "PMGD": ParticleMMLE.pmgd(model, step_size=0.25, **cloud),
        "SOUL": ParticleMMLE.soul(model, step_size=1 / (D + 2), num_moves=N, init_strategy=at_zero),
        "KIPLMC1": ParticleMMLE.kiplmc1(model, step_size=0.01, **kinetic),
        "KIPLMC2": ParticleMMLE.kiplmc2(model, step_size=0.05, **kinetic),
        "MPD": ParticleMMLE.mpd(model, step_size=0.01, **kinetic),
    }


def exact_variance(name: str, h: float, num_particles: int) -> float | None:
    """The stationary variance of the parameter at finite h; None where it needs more than the pair z."""
    noise = 2 * h / (D * num_particles)  # of the mean of all particles
    move = [h, 1 - 2 * h]
    pairs = {  # F, and Q / noise
        "IPLA": ([[1 - h * D, h * D], move], [[D, 0], [0, 1]]),
        "PGD": ([[1 - h * D, h * D], move], [[0, 0], [0, 1]]),
        "EBIPLA": ([[1 - h, h], move], [[1, 0], [0, 1]]),
        "PQN": ([[1 - h, h], move], [[0, 0], [0, 1]]),
        "PMGD": ([move, move], [[1, 1], [1, 1]]),  # theta is the mean of the cloud that has moved
    }
    if name not in pairs:
        return None
    f, q = (np.array(matrix, float) for matrix in pairs[name])
    sigma = np.linalg.solve(np.eye(4) - np.kron(f, f), noise * q.ravel())  # row by row
    return sigma[0]


def run_engine(rng_key: Array, engine: ParticleMMLE, y: Array, num_steps: int) -> Run:
    start = time.perf_counter()
    result = engine.run(rng_key, num_steps, y, progress_bar=False, collect=engine.get_params)
    seconds = time.perf_counter() - start
    return Run(result.collected["theta"], engine.get_particles(result.state, y)["x"], seconds)


def print_table(runs: dict[str, Run], engines: dict[str, ParticleMMLE], y: Array) -> None:
    limit = (2 / (N * D)) ** 0.5
    print(f"\nD = {D} latents, N = {N} particles (SOUL: one, {N} moves a step), {len(runs['PGD'].theta)} steps from theta = 0.")
    print(
        f"The exact maximum is theta* = {y.mean():.4f}. 'mean', its error by batches, and 'sd' are of the second half of the steps;"
    )
    print(f"'exact' is the stationary one, which for IPLA and the kinetic Langevin forms tends to {limit:.4f} as h falls.")
    print(f"{'':<9}{'h':>8}{'mean':>9}{'error':>9}{'sd':>9}{'exact':>9}{'seconds':>9}")
    for name, run in runs.items():
        late = run.theta[len(run.theta) // 2 :].astype(float)
        variance = exact_variance(name, engines[name].step_size, N)
        exact = "-" if variance is None else f"{variance**0.5:.4f}"
        print(
            f"{name:<9}{engines[name].step_size:>8.4f}{late.mean():>9.4f}{error_of_mean(late):>9.4f}"
            f"{late.std():>9.4f}{exact:>9}{run.seconds:>9.1f}"
        )


def print_standard_error(rng_key: Array, run: Run, y: Array) -> None:
    """What the data leave open, by Louis' identity, and IPLA's spread against it over sqrt(N)."""
    params = {"theta": run.theta[len(run.theta) // 2 :].mean()}
    samples = sample_posterior(rng_key, model, params, y, start={"x": run.particles}, num_samples=500)
    found = standard_errors(model, params, samples, y)
    print(f"\nThe standard error of theta* is {found.standard_errors['theta']:.3f} (exact: {(2 / D) ** 0.5:.3f}). IPLA against it:")
    print(convergence({"theta": run.theta}, num_particles=N, standard_errors=found))


def show_step_limits(rng_key: Array, y: Array, num_steps: int, step_sizes: dict[str, float]) -> dict[str, np.ndarray]:
    """PGD's trajectories above, at and below the limit. The first is run on until numbers are not finite."""
    print(f"\nPGD is stable below h = {LIMIT:.5f} = {LIMIT * (D + 2):.3f} / (D + 2). What the engine says when it stops a run:")
    at_zero = init_to_value(values={"x": jnp.zeros(D)})
    paths = {}
    for name, h in step_sizes.items():
        engine = ParticleMMLE.pgd(model, num_particles=N, step_size=h, init_strategy=at_zero)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if h > LIMIT else "error")  # the engine warns long before numbers overflow
            paths[name] = run_engine(rng_key, engine, y, num_steps).theta
            if h > LIMIT:
                print(f"h = {name} / (D + 2): {reason_of_stop(rng_key, engine, y)}")
    return paths


def reason_of_stop(rng_key: Array, engine: ParticleMMLE, y: Array) -> str:
    try:
        engine.run(rng_key, 10_000, y, progress_bar=False, collect=engine.get_params)
    except NonFiniteError as error:
        return str(error)
    return "the run came through"


def error_of_mean(theta: np.ndarray) -> float:
    """The standard error of the mean of correlated steps, by batch means."""
    means = np.array([batch.mean() for batch in np.array_split(theta, NUM_BATCHES)])
    return means.std(ddof=1) / np.sqrt(NUM_BATCHES)


def spread_and_error(theta: np.ndarray, center: float) -> tuple[float, float]:
    """The standard deviation about a known center, and its standard error by batch means of the squares."""
    squares = ((theta[len(theta) // 10 :] - center) ** 2).astype(float)
    sd = np.sqrt(squares.mean())
    return sd, error_of_mean(squares) / (2 * sd)


def measure_concentration(
    rng_key: Array, y: Array, num_steps: int, clouds: tuple[int, ...], names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """By algorithm: stationary spread, its standard error and the exact spread, of shape (len(clouds), 3)."""
    make = {"IPLA": ParticleMMLE.ipla, "PGD": ParticleMMLE.pgd, "EBIPLA": ParticleMMLE.ebipla}
    table = {}
    for name in names:
        rows = []
        for num_particles in clouds:
            engine = make[name](model, num_particles=num_particles, step_size=CONCENTRATION[name])
            start = {"theta": jnp.mean(y)}
            key = jax.random.fold_in(rng_key, num_particles)
            result = engine.run(key, num_steps, y, progress_bar=False, init_params=start, collect=engine.get_params)
            variance = exact_variance(name, CONCENTRATION[name], num_particles)
            rows.append((*spread_and_error(result.collected["theta"], float(y.mean())), variance**0.5))
        table[name] = np.array(rows)
    return table


def fitted_slope(clouds: tuple[int, ...], rows: np.ndarray) -> tuple[float, float]:
    """The slope of log spread on log N by weighted least squares, and its standard error."""
    x, weight = np.log(clouds), (rows[:, 0] / rows[:, 1]) ** 2
    x = x - np.average(x, weights=weight)
    return (weight * x * np.log(rows[:, 0])).sum() / (weight * x**2).sum(), (weight * x**2).sum() ** -0.5


def print_concentration(clouds: tuple[int, ...], table: dict[str, np.ndarray]) -> None:
    print(
        "\nStationary spread of theta against N: measured (standard error) and exact at this h; slope of the logs, in theory -0.5."
    )
    print(f"{'':<9}{'h':>8}" + "".join(f"{f'N = {n}':>26}" for n in clouds[:: len(clouds) - 1]) + f"{'slope':>18}")
    for name, rows in table.items():
        slope, error = fitted_slope(clouds, rows)
        ends = "".join(f"{f'{sd:.4f} ({se:.4f}) {exact:.4f}':>26}" for sd, se, exact in rows[:: len(rows) - 1])
        print(f"{name:<9}{CONCENTRATION[name]:>8.4f}{ends}{f'{slope:.3f} ({error:.3f})':>18}")


def plot_trajectories(path: Path, runs: dict[str, Run], engines: dict[str, ParticleMMLE], y: Array) -> None:
    figure, axes = plt.subplots(3, 3, figsize=(10, 7), sharex=True, sharey=True, layout="constrained")
    for axis, (name, run) in zip(axes.flat, runs.items(), strict=True):
        theta = run.theta[:NUM_SHOWN]
        half = len(theta) // 2
        running = np.cumsum(theta[half:]) / np.arange(1, len(theta) - half + 1)
        axis.axhline(y.mean(), color="black", linewidth=0.8, linestyle="--", label=r"$\theta^* = \bar y$")
        axis.plot(theta, linewidth=0.6, label=r"$\theta$")
        axis.plot(np.arange(half, len(theta)), running, linewidth=1.4, label=f"running mean from step {half}")
        axis.set_title(f"{name}, h = {engines[name].step_size:.3g}", fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel(r"$\theta$")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_step_limits(path: Path, paths: dict[str, np.ndarray], y: Array) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    center = float(y.mean())
    for name, theta in paths.items():
        label = f"h = {name} / (D + 2)"
        axes[0].plot(theta, linewidth=0.8, label=label)
        axes[1].semilogy(np.abs(theta - center), linewidth=0.8, label=label)
    axes[0].axhline(center, color="black", linewidth=0.8, linestyle="--")
    axes[0].set(xlabel="step", ylabel=r"$\theta$", xlim=(0, min(130, len(paths["2.05"]))), ylim=(center - 3, center + 3))
    growth = abs(1 - STEP_SIZES["2.05"] * 2 / LIMIT)
    steps = np.arange(len(paths["2.05"]))
    axes[1].plot(
        steps,
        np.abs(paths["2.05"][-1] - center) * growth ** (steps - steps[-1]),
        color="black",
        linewidth=0.8,
        linestyle=":",
        label=f"{growth:.3f}$^k$, exact",
    )
    axes[1].set(xlabel="step", ylabel=r"$|\theta - \theta^*|$")
    axes[1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_concentration(path: Path, clouds: tuple[int, ...], table: dict[str, np.ndarray]) -> None:
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for name, rows in table.items():
        points = axis.errorbar(clouds, rows[:, 0], 2 * rows[:, 1], fmt="o", markersize=4, label=name)
        axis.plot(clouds, rows[:, 2], color=points[0].get_color(), linewidth=1)
    axis.plot(
        clouds, [(2 / (n * D)) ** 0.5 for n in clouds], color="black", linewidth=0.8, linestyle="--", label=r"$\sqrt{2/(ND)}$"
    )
    axis.set(xscale="log", yscale="log", xlabel="particles N", ylabel=r"stationary standard deviation of $\theta$")
    axis.set_xticks(clouds, [str(n) for n in clouds])
    axis.minorticks_off()
    axis.set_title("lines: exact at this h; bars: two standard errors", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps, num_limit, num_long = NUM_STEPS, 300, NUM_LONG
    step_sizes, clouds, names = STEP_SIZES, CLOUDS, tuple(CONCENTRATION)
    if args.smoke:
        num_steps, num_limit, num_long = 2000, 20, 100  # long enough for standard errors: they warn away from a maximum
        step_sizes, clouds, names = {"2.05": STEP_SIZES["2.05"]}, (1, 4), ("IPLA",)
    data_key, run_key, error_key, limit_key, long_key = jax.random.split(jax.random.key(args.seed), 5)
    y = 1 + jnp.sqrt(2) * jax.random.normal(data_key, (D,))

    engines = make_engines()
    runs = {}
    for i, (name, engine) in enumerate(engines.items()):
        runs[name] = run_engine(jax.random.fold_in(run_key, i), engine, y, num_steps)
    print_table(runs, engines, y)
    print_standard_error(error_key, runs["IPLA"], y)
    plot_trajectories(args.output / "trajectories.png", runs, engines, y)

    plot_step_limits(args.output / "step_limits.png", show_step_limits(limit_key, y, num_limit, step_sizes), y)

    table = measure_concentration(long_key, y, num_long, clouds, names)
    print_concentration(clouds, table)
    plot_concentration(args.output / "concentration.png", clouds, table)
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Particle algorithms on a model that can be solved by hand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/toy_hierarchical"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
