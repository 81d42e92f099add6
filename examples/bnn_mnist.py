# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A Bayesian neural network with learned priors
=============================================

Is this digit a 4 or a 9? A network of 40 hidden units without biases, whose two layers have weights from priors of unknown
scale, as in Section 3.2 of [1]:

.. math::

    w \sim N(0, e^{2\alpha})^{784 \times 40}, \quad v \sim N(0, e^{2\beta})^{40 \times 2}, \qquad
    y_m \mid w, v \sim \mathrm{Categorical}(\mathrm{softmax}(\tanh(x_m^T w) \, v)).

Maximum marginal likelihood of :math:`(\alpha, \beta)` is empirical Bayes for a network: the data say how strongly each
layer is to be regularized. A particle is a whole network of 31 440 weights, and a prediction averages over 100 of them.
They start as samples of the prior at :math:`\alpha = \beta = 0`.

The settings are those of [1]: 1000 random images of MNIST, 80 % to learn from, h = .1, 500 steps, 100 particles. The
gradient in :math:`\alpha` is a sum over all weights of its layer, and a step of .1 on it diverges at once; as in [1] it is
divided by their number, which is a rate per parameter in optax. PQN scales by the curvature and PMGD maximizes: both
need no rate.

The code of [1] standardizes pixels with the test images among them. Here the mean and standard deviation are those of the
images that are learned from. That leaves a trap: a pixel that is almost always black has a tiny deviation, and a test image
that lights it lies hundreds of deviations out, so test pixels are clipped to the range seen in training (a pixel that is
constant there tells nothing, and is 0).

What to expect: test errors of 3 to 5 % and an LPPD of about -.11 in every particle method, with differences between methods
that are small compared with those between splits. SOUL is behind, because its one chain is one mode of the posterior. The page
of this example has the table, and the published one.

The script writes to ``--output``: ``parameters.png``, alpha and beta against the step; ``learning.png``, test error and LPPD
against the step; ``digits.png``, test images that the networks get wrong or are least sure of.

**References**

1. Kuntz, Lim and Johansen, *Particle algorithms for maximum likelihood training of latent variable models*, AISTATS 2023.
2. De Bortoli et al., *Efficient stochastic optimisation by unadjusted Langevin Monte Carlo*, Statistics and Computing (2021).
"""

# sphinx_gallery_thumbnail_path = "_static/bnn_parameters.png"

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
import optax
from jax import Array

from numpyro_ebm import ParticleMMLE, ParticleState, UnadjustedLangevin, sample_posterior
from numpyro_ebm.datasets import LabeledImages, mnist

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = (4, 9)
NUM_IMAGES, NUM_TRAIN = 1000, 800
NUM_PIXELS, NUM_HIDDEN = 784, 40
STEP_SIZE, NUM_STEPS, NUM_PARTICLES = 0.1, 500, 100
EVERY = 10  # steps between two looks at the test images
PUBLISHED = {  # Kuntz et al.: LPPD, test error, seconds
    "PGD": ("-.0954", ".0235", "75"),
    "PQN": ("-.0975", ".0255", "78"),
    "PMGD": ("-.0954", ".0245", "76"),
    "SOUL": ("-.394", ".0585", "185"),
}


class Split(NamedTuple):
    """Images to learn from and to test on, each pixel standardized by the former."""

    x: Array  # (800, 784)
    y: Array  # (800,), index into CLASSES
    x_test: Array  # (200, 784)
    y_test: Array  # (200,)
    pictures: np.ndarray  # (200, 28, 28), the test images as they are


class Score(NamedTuple):
    """How well networks predict the test images."""

    lppd: Array  # (), log pointwise predictive density per image
    error: Array  # (), fraction of the images that are misclassified
    probabilities: Array  # (200, 2), averaged over the networks


class Run(NamedTuple):
    """One method on one split."""

    params: dict[str, np.ndarray]  # alpha and beta, each (num_steps,)
    steps: np.ndarray  # (num_looks,), when the test images were looked at
    curve: np.ndarray  # (num_looks, 2), LPPD and error of the particles
    score: Score  # at the end
    seconds: float


def model(x: Array, y: Array | None = None) -> None:
    alpha, beta = numpyro.param("alpha", 0.0), numpyro.param("beta", 0.0)
    w = numpyro.sample("w", dist.Normal(0, jnp.exp(alpha)).expand([NUM_PIXELS, NUM_HIDDEN]).to_event(2))
    v = numpyro.sample("v", dist.Normal(0, jnp.exp(beta)).expand([NUM_HIDDEN, 2]).to_event(2))
    with numpyro.plate("images", len(x)):
        numpyro.sample("digit", dist.Categorical(logits=logits(x, w, v)), obs=y)


def logits(x: Array, w: Array, v: Array) -> Array:
    return jnp.tanh(x @ w) @ v


def make_split(data: LabeledImages, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.flatnonzero(np.isin(data.labels, CLASSES)))[:NUM_IMAGES]
    pictures, y = data.images[chosen], jnp.asarray(data.labels[chosen] == CLASSES[1], jnp.int32)
    pixels = pictures.reshape(NUM_IMAGES, NUM_PIXELS) / 255.0
    train = pixels[:NUM_TRAIN]
    sd = train.std(0)
    x = (np.clip(pixels, train.min(0), train.max(0)) - train.mean(0)) / np.where(sd > 0, sd, 1)
    x = jnp.asarray(x, jnp.float32)
    return Split(x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN:], y[NUM_TRAIN:], pictures[NUM_TRAIN:])


def make_engines(step_size: float, num_particles: int) -> dict[str, ParticleMMLE]:
    rates = {"alpha": optax.sgd(step_size / (NUM_PIXELS * NUM_HIDDEN)), "beta": optax.sgd(step_size / (2 * NUM_HIDDEN))}
    per_weight = optax.partition(rates, {name: name for name in rates})
    cloud: dict[str, Any] = {"num_particles": num_particles, "step_size": step_size}
    return {
        "PGD": ParticleMMLE.pgd(model, per_weight, **cloud),
        "PQN": ParticleMMLE.pqn(model, **cloud),
        "PMGD": ParticleMMLE.pmgd(model, **cloud),
        "SOUL": ParticleMMLE.soul(model, per_weight, num_moves=num_particles, step_size=step_size),
    }


@jax.jit
def judge(w: Array, v: Array, x: Array, y: Array) -> Score:
    """The networks' prediction averaged, on test images."""
    log_p = jax.nn.log_softmax(jax.vmap(logits, (None, 0, 0))(x, w, v))
    log_p = jax.scipy.special.logsumexp(log_p, 0, b=1 / len(w))
    lppd = jnp.take_along_axis(log_p, y[:, None], 1).mean()
    return Score(lppd, (log_p.argmax(1) != y).mean(), jnp.exp(log_p))


def run_engine(rng_key: Array, engine: ParticleMMLE, split: Split, num_steps: int) -> Run:
    run_key, draw_key = jax.random.split(rng_key)
    steps, curve = [], []

    def look(step: int, state: ParticleState, losses: Array) -> None:
        score = judge(state.particles["w"], state.particles["v"], split.x_test, split.y_test)
        steps.append(step)
        curve.append((score.lppd, score.error))

    begin = time.perf_counter()
    settings: dict[str, Any] = {"collect": engine.get_params, "callbacks": [look], "chunk_size": EVERY, "progress_bar": False}
    result = engine.run(run_key, num_steps, split.x, split.y, **settings)
    weights = engine.get_particles(result.state, split.x, split.y)
    if engine.num_particles == 1:  # SOUL's posterior is the last stretch of its chain
        sampler = UnadjustedLangevin(engine.step_size, num_steps=1)
        more: dict[str, Any] = {"num_samples": engine.num_moves, "num_warmup": 0, "sampler": sampler, "start": weights}
        draws = sample_posterior(draw_key, model, result.params, split.x, split.y, **more)
        weights = {name: values[0] for name, values in draws.items()}
    score = jax.block_until_ready(judge(weights["w"], weights["v"], split.x_test, split.y_test))
    return Run(result.collected, np.array(steps), np.array(curve), score, time.perf_counter() - begin)


def warn_of_step(engine: ParticleMMLE, split: Split, step_size: float) -> None:
    """Tells once what the engine would say at every run: that the step is too large for the particles."""
    data = split.x, split.y
    limit = engine.stability_limit(engine.init(jax.random.key(0), *data), *data)
    print(f"h = {step_size:g}; where the particles start, the stiffest of them is stable only below h = {limit:.1g}.")
    if step_size > limit:
        warnings.filterwarnings("ignore", "site 'v'|site 'w'|the chains", UserWarning)


def print_table(runs: dict[str, list[Run]], step_size: float, num_steps: int) -> None:
    num_test = NUM_IMAGES - NUM_TRAIN
    print(
        f"\nMNIST {CLASSES[0]} against {CLASSES[1]}: {NUM_TRAIN} images to learn from and {num_test} to test on, drawn per split."
    )
    print(f"h = {step_size:g}, {num_steps} steps. Mean +- standard deviation over splits; the median of seconds.")
    columns = f"{'LPPD':>19}{'test error':>19}{'alpha':>16}{'beta':>16}{'seconds':>9}"
    print(f"{'':<6}{'splits':>6}{columns}   published: LPPD, error, s")
    for name, rows in runs.items():
        texts = [spread([run.score.lppd for run in rows], 4), spread([run.score.error for run in rows], 4)]
        texts += [spread([run.params[which][-1] for run in rows], 3) for which in ("alpha", "beta")]
        seconds = np.median([run.seconds for run in rows])
        row = f"{name:<6}{len(rows):>6}{texts[0]:>19}{texts[1]:>19}{texts[2]:>16}{texts[3]:>16}{seconds:>9.0f}"
        print(f"{row}   {', '.join(PUBLISHED[name])}")


def spread(values: Any, digits: int) -> str:
    return f"{np.mean(values):.{digits}f} +- {np.std(values):.{digits}f}"


def plot_parameters(path: Path, runs: dict[str, Run]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name, label in zip(axes, ("alpha", "beta"), (r"$\alpha$, first layer", r"$\beta$, second layer"), strict=True):
        for method, run in runs.items():
            axis.plot(np.arange(len(run.params[name])) + 1, run.params[name], label=method, linewidth=1.2)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_learning(path: Path, runs: dict[str, Run]) -> None:
    """The test metrics of the particles; SOUL's are those of the one network where its chain stands."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for column, (axis, label) in enumerate(zip(axes, ("LPPD per test image", "test error"), strict=True)):
        for method, run in runs.items():
            one = ", one network" if method == "SOUL" else ""
            axis.plot(run.steps, run.curve[:, column], label=method + one, linewidth=1.2)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=max(-1.0, axes[0].get_ylim()[0]))
    axes[1].set_ylim(0, min(0.3, axes[1].get_ylim()[1]))
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_digits(path: Path, run: Run, split: Split, num_digits: int = 10) -> None:
    """The test images whose true class the networks find least probable."""
    p = np.asarray(run.score.probabilities)
    y = np.asarray(split.y_test)
    hardest = np.argsort(p[np.arange(len(y)), y])[:num_digits]
    figure, axes = plt.subplots(2, num_digits // 2, figsize=(1.75 * num_digits // 2, 4), layout="constrained")
    for axis, index in zip(axes.flat, hardest, strict=True):
        wrong = p[index].argmax() != y[index]
        axis.imshow(255 - split.pictures[index], cmap="gray", vmin=0, vmax=255)
        axis.set_title(
            f"it is a {CLASSES[y[index]]}\nP(9) = {p[index, 1]:.2f}", color="firebrick" if wrong else "black", fontsize=10
        )
        axis.set_axis_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def load(smoke: bool) -> LabeledImages:
    try:
        return mnist()
    except FileNotFoundError:
        if not smoke:
            raise
        print("MNIST is not there: random images of the same shape stand in, to see that everything runs.")
        rng = np.random.default_rng(0)
        labels = rng.choice(np.array(CLASSES, np.uint8), 2 * NUM_IMAGES)
        images = rng.integers(0, 128, (len(labels), 28, 28)) + 100 * (labels == CLASSES[1])[:, None, None]
        return LabeledImages(images.astype(np.uint8), labels)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    data, engines = load(args.smoke), make_engines(args.step_size, 5 if args.smoke else NUM_PARTICLES)
    num_steps = 2 if args.smoke else args.num_steps
    engines = {name: engines[name] for name in args.methods}
    splits = [make_split(data, args.seed + i) for i in range(1 if args.smoke else args.num_splits)]
    warn_of_step(next(iter(engines.values())), splits[0], args.step_size)

    runs: dict[str, list[Run]] = {}
    for name, engine in engines.items():
        num_splits = len(splits) if name == "PGD" else min(len(splits), args.num_other_splits)
        runs[name] = []
        for i, split in enumerate(splits[:num_splits]):
            run = run_engine(jax.random.key(args.seed + i), engine, split, num_steps)
            runs[name].append(run)
            print(
                f"{name}, split {i}: LPPD {run.score.lppd:.4f}, test error {run.score.error:.4f}, {run.seconds:.0f} s", flush=True
            )
    print_table(runs, args.step_size, num_steps)

    first = {name: rows[0] for name, rows in runs.items()}
    plot_parameters(args.output / "parameters.png", first)
    plot_learning(args.output / "learning.png", first)
    plot_digits(args.output / "digits.png", next(iter(first.values())), splits[0])
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Bayesian neural network with learned priors")
    parser.add_argument("--methods", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--num-splits", type=int, default=5, help="of PGD")
    parser.add_argument("--num-other-splits", type=int, default=2, help="of the other methods")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--step-size", type=float, default=STEP_SIZE, help="h, of particles and parameters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/bnn_mnist"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
