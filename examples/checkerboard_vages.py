# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Two squares by variational estimates of the score
=================================================

The Gaussian-Bernoulli restricted Boltzmann machine of ``checkerboard.py``, with 2 visible and 4 hidden units, is learned as a
model with latents and a guide by variational estimates of the score and of its gradient (VaGES) [1], from L samples of the guide.
Every fit is judged by its exact mean log-likelihood of test points, in nats.

* ``DSM``: denoising score matching. ``L = 2, 10``: VaGES; ``no cov.``: without the covariance, for comparison; ``weighted``:
  L samples with importance weights, which is not in the paper, ``jackknife``: corrected for the leading term of its bias.
* ``KSD``: the kernelized Stein discrepancy with a Gaussian kernel of width .1 on pairs of points. ``exact``: with the hidden
  units summed out; ``L = 2, 10``: VaGES; ``uniform``: importance sampling with bits from a fair coin; ``weighted``: with bits
  of the learned guide. ``all pairs``: exact, over all pairs of a batch in place of 50. ``one-sided``: the published gradient, at
  the second point of every pair alone.
* ``blind``: denoising with a guide that ignores the visible, and so is never near the posterior.

Settings are those of the code of [1]: batches of 100, Adam with rate 1e-3 and betas .9, .95, K = 5 steps of the guide per
step, 100,000 steps. All seeds of a method run side by side in one ``vmap``.

The script writes to ``--output``: ``densities.png``, data and the exact density of every method's first seed;
``curves.png``, the log-likelihood of the test points against the step.

**References**

1. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
   arXiv:2010.08258.
"""

# sphinx_gallery_thumbnail_path = "_static/checkerboard_vages_densities.png"

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from checkerboard import (
    BATCH_SIZE,
    NUM_HIDDEN,
    NUM_STEPS,
    NUM_TEST,
    NUM_TRAIN,
    OBJECTIVES,
    Fit,
    fit,
    guide,
    joint,
    make_points,
    marginal,
    plot_densities,
    print_head,
    print_row,
)
from jax import Array

from numpyro_ebm import (
    GumbelBernoulli,
    ImportanceWeighted,
    KernelSteinDiscrepancy,
    RBFKernel,
    ScoreMatching,
    VaGES,
    Variational,
)
from numpyro_ebm.objectives import ScoreObjective

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ADAM = optax.adam(1e-3, b1=0.9, b2=0.95)
DSM = OBJECTIVES["DSM"]
KSD_WIDTH = 0.1
KSD = KernelSteinDiscrepancy(RBFKernel(KSD_WIDTH), pairs="halves")
WIDTH = 30


class OneSided(ScoreObjective):
    """The published gradient of the discrepancy: that of the score at the second point of a pair. Its value means nothing."""

    min_batch_size = 2

    def _loss(self, score_fn: Any, rng_key: Array, v: Array, v_tilde: Array) -> Array:
        (x, y), (s, of_y) = jnp.split(v_tilde, 2), jnp.split(score_fn(v_tilde), 2)
        kernel = jnp.exp(-((x - y) ** 2).sum(-1, keepdims=True) / (2 * KSD_WIDTH**2))
        z = jax.lax.stop_gradient(kernel * (s - (x - y) / KSD_WIDTH**2))
        return jnp.tile((z * of_y).sum(-1), 2)


def blind_guide(v: Array) -> None:
    """Hidden units whose distribution is the same for every point."""
    shift = numpyro.param("shift", jnp.zeros(NUM_HIDDEN))
    with numpyro.plate("points", len(v)):
        numpyro.sample("h", GumbelBernoulli(jnp.broadcast_to(shift, (len(v), NUM_HIDDEN))).to_event(1))


def uniform_guide(v: Array) -> None:
    """Fair coins."""
    with numpyro.plate("points", len(v)):
        numpyro.sample("h", dist.BernoulliLogits(jnp.zeros((len(v), NUM_HIDDEN))).to_event(1))


def exact(objective: Any) -> ScoreMatching:
    return ScoreMatching(marginal, ADAM, objective, batch_size=BATCH_SIZE)


def vages(objective: Any, estimate: Variational | ImportanceWeighted, guide: Any = guide, num_inner_steps: int = 5) -> VaGES:
    return VaGES(joint, guide, ADAM, ADAM, objective, num_inner_steps=num_inner_steps, estimate=estimate, batch_size=BATCH_SIZE)


METHODS: dict[str, Callable[[], Any]] = {
    "DSM, exact": lambda: exact(DSM),
    "DSM, L = 2": lambda: vages(DSM, Variational(2)),
    "DSM, L = 10": lambda: vages(DSM, Variational(10)),
    "DSM, L = 2, no cov.": lambda: vages(DSM, Variational(2, covariance="none")),
    "DSM, weighted, L = 2": lambda: vages(DSM, ImportanceWeighted(2, jackknife=False)),
    "DSM, weighted, L = 10": lambda: vages(DSM, ImportanceWeighted(10, jackknife=False)),
    "DSM, jackknife, L = 2": lambda: vages(DSM, ImportanceWeighted(2, jackknife=True)),
    "DSM, jackknife, L = 10": lambda: vages(DSM, ImportanceWeighted(10, jackknife=True)),
    "KSD, exact": lambda: exact(KSD),
    "KSD, exact, all pairs": lambda: exact(KernelSteinDiscrepancy(RBFKernel(KSD_WIDTH))),
    "KSD, L = 2": lambda: vages(KSD, Variational(2)),
    "KSD, L = 10": lambda: vages(KSD, Variational(10)),
    "KSD, one-sided": lambda: exact(OneSided()),
    "KSD, one-sided, L = 2": lambda: vages(OneSided(), Variational(2)),
    "KSD, one-sided, L = 10": lambda: vages(OneSided(), Variational(10)),
    "KSD, uniform, L = 2": lambda: vages(KSD, ImportanceWeighted(2, jackknife=False), uniform_guide, num_inner_steps=0),
    "KSD, uniform, L = 10": lambda: vages(KSD, ImportanceWeighted(10, jackknife=False), uniform_guide, num_inner_steps=0),
    "KSD, weighted, L = 2": lambda: vages(KSD, ImportanceWeighted(2, jackknife=False)),
    "KSD, weighted, L = 10": lambda: vages(KSD, ImportanceWeighted(10, jackknife=False)),
    "blind, L = 2": lambda: vages(DSM, Variational(2), blind_guide),
    "blind, L = 10": lambda: vages(DSM, Variational(10), blind_guide),
    "blind, weighted, L = 2": lambda: vages(DSM, ImportanceWeighted(2, jackknife=False), blind_guide),
    "blind, weighted, L = 10": lambda: vages(DSM, ImportanceWeighted(10, jackknife=False), blind_guide),
    "blind, weighted, L = 40": lambda: vages(DSM, ImportanceWeighted(40, jackknife=False), blind_guide),
    "blind, jackknife, L = 10": lambda: vages(DSM, ImportanceWeighted(10, jackknife=True), blind_guide),
}


# of which the density is shown
SHOWN = ["DSM, exact", "DSM, L = 2", "DSM, L = 2, no cov.", "DSM, jackknife, L = 2", "KSD, L = 10", "KSD, uniform, L = 2"]
SHOWN += ["blind, L = 2", "blind, weighted, L = 2", "blind, weighted, L = 40"]


def plot_curves(path: Path, fits: dict[str, Fit]) -> None:
    families = [family for family in ("DSM", "KSD", "blind") if any(method.startswith(family) for method in fits)]
    figure, axes = plt.subplots(1, len(families), figsize=(3.6 * len(families), 5), sharey=True, squeeze=False)
    for ax, family in zip(axes[0], families, strict=True):
        for method, result in fits.items():
            if method.startswith(family):
                style = ":" if "weighted" in method else "--" if "jackknife" in method else "-"
                ax.plot(result.steps, result.log_likelihood.mean(1), style, label=method.removeprefix(f"{family}, "))
        ax.set(xlabel="step", title=family, ylim=(-0.8, 0.45))
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:.0f}k")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=9, frameon=False)  # below its many curves
    axes[0, 0].set_ylabel("log-likelihood of a test point, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fit_once(method: str, train: Array, test: Array, args: argparse.Namespace) -> Fit:
    """The fit, from ``--output`` if an earlier call has left it there and ``--reuse`` is given."""
    path = args.output / f"{method.replace(', ', '_').replace(' ', '')}.npz"
    if args.reuse and path.exists():
        with np.load(path) as kept:
            params = {name.removeprefix("param "): kept[name] for name in kept if name.startswith("param ")}
            return Fit(kept["steps"], kept["log_likelihood"], params, float(kept["seconds"]))
    result = fit(METHODS[method](), train, test, args.num_seeds, args.num_steps)
    params = {f"param {name}": np.asarray(value) for name, value in result.params.items()}
    np.savez(path, steps=result.steps, log_likelihood=result.log_likelihood, seconds=result.seconds, **params)
    return result


def main(args: argparse.Namespace) -> None:
    train, test = make_points(NUM_TRAIN, 0), make_points(NUM_TEST, 1)
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"Mean log-likelihood of a test point, {args.num_seeds} seeds; the bound is {np.log(2):.3f}")
    print_head(args.num_steps, WIDTH)
    fits = {}
    for method in args.methods:
        fits[method] = fit_once(method, train, test, args)
        print_row(method, fits[method], WIDTH)
    plot_densities(args.output / "densities.png", train, {method: fits[method] for method in SHOWN if method in fits})
    plot_curves(args.output / "curves.png", fits)
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/checkerboard_vages"))
    parser.add_argument("--reuse", action="store_true", help="take from --output what an earlier call has learned")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.methods, args.num_steps, args.num_seeds = ["DSM, L = 2", "KSD, uniform, L = 2", "blind, jackknife, L = 10"], 40, 2
    main(args)
