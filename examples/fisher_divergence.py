# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
The Fisher divergence of Gaussian restricted Boltzmann machines
===============================================================

The toy of [1]. Data are samples of N(0, I) in 200 dimensions. A Gaussian-Bernoulli restricted Boltzmann machine with unit
variances and all parameters 0 is exactly that distribution; then rho times standard normal noise is added to its weights and
biases. Its Fisher divergence from the data is known up to a mean over N(0, I):

.. math::

    F = \frac{1}{2} E \|c^*(v)\|^2, \qquad c^*(v) = \nabla_v \log p(v) + v = b + W \, \sigma(c + W^T v).

A critic estimates it without using the density of the data, from 16,000 rows to learn on, 2000 to choose the best step by
and 2000 for the estimate. Two scores are given to it: the exact one, and VaES with one sample of a guide, which is fitted
before. Two critics are compared:

* the network of [1]: three linear layers with ELUs between, Adam with rate 2e-4;
* the model's own score at the guide's mean bits, plus a linear map that is learned: what it has to learn is the score of the
  data alone, which is linear here.

Since c* is known, what every bound loses is known too: :math:`\frac{1}{2} E \|c - c^*\|^2`.

The script writes ``divergence.png`` to ``--output``: the bounds as fractions of the truth, and what each loses, against rho.

**References**

1. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
   arXiv:2010.08258.
"""

# sphinx_gallery_thumbnail_path = "_static/fisher_divergence.png"

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from jax import Array, lax
from jax.tree_util import Partial
from numpyro.distributions import constraints
from numpyro.handlers import block, substitute
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import BaseMeasure, GaussianBernoulliRBM, GumbelBernoulli, fisher_divergence, marginal_score

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RHOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NUM_TRAIN, NUM_VALIDATION, NUM_TEST, NUM_TRUTH, BATCH_SIZE = 16_000, 2_000, 2_000, 100_000, 100
CRITICS = ("network", "score + linear")
SCORES = ("exact", "VaES")


class Bound(NamedTuple):
    """One critic with one score."""

    truth: float  # of the mean of the score that the critic is given: the exact one, or that of VaES
    truth_error: float  # its standard error
    estimate: float
    standard_error: float
    lost: float  # :math:`\frac{1}{2} E \|c - c^*\|^2` on the test rows
    best_step: int
    seconds: float  # of the processor


def model(v: Array) -> None:
    """The machine as a random field of both layers."""
    d = v.shape[1]
    weights, b, c = (numpyro.param(name, jnp.zeros(shape)) for name, shape in (("weights", (d, d)), ("b", (d,)), ("c", (d,))))
    rbm = GaussianBernoulliRBM(weights, b, c)
    with numpyro.plate("rows", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (d,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (d,)), obs=v)
        numpyro.factor("coupling", -rbm.joint_energy(v, h))


def guide(v: Array) -> None:
    """Independent bits with logits linear in v: the posterior's own form."""
    d = v.shape[1]
    slope, shift = numpyro.param("slope", jnp.zeros((d, d))), numpyro.param("shift", jnp.zeros(d))
    with numpyro.plate("rows", len(v)):
        numpyro.sample("h", GumbelBernoulli(v @ slope + shift, temperature=0.1).to_event(1))


def make_machine(rng_key: Array, rho: float, d: int) -> dict[str, Array]:
    shapes = {"weights": (d, d), "b": (d,), "c": (d,)}
    keys = jax.random.split(rng_key, len(shapes))
    return {name: rho * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def fit_guide(machine: dict[str, Array], v: Array, num_steps: int) -> dict[str, Array]:
    """The guide's params by NumPyro's SVI, those of the machine fixed and out of its sight."""
    fixed = block(substitute(model, data=machine), hide=list(machine))
    svi = SVI(fixed, guide, optax.adam(optax.cosine_decay_schedule(0.005, num_steps)), Trace_ELBO())

    @jax.jit
    def run(v: Array) -> Any:
        def step(i: Array, state: Any) -> Any:
            rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), i), (BATCH_SIZE,), 0, len(v))
            return svi.update(state, v[rows])[0]

        return lax.fori_loop(0, num_steps, step, svi.init(jax.random.key(0), v[:BATCH_SIZE]))

    with numpyro.validation_enabled(False), warnings.catch_warnings():  # a relaxed bit is no bit
        warnings.filterwarnings("ignore", "Currently, SVI with Trace_ELBO")  # which is about bits that the guide does not relax
        return svi.get_params(run(v))


def exact_score(machine: dict[str, Array], v: Array, rng_key: Array) -> Array:
    return jax.grad(lambda v: GaussianBernoulliRBM(machine["weights"], machine["b"], machine["c"]).log_prob(v).sum())(v)


def best_critic(machine: dict[str, Array], bits: dict[str, Array], v: Array) -> Array:
    """c*, what the mean score at these bits has more than the score of N(0, I)."""
    return machine["b"] + jax.nn.sigmoid(bits["shift"] + v @ bits["slope"]) @ machine["weights"].T


def best_linear_loss(v: Array, c: Array) -> float:
    """Half the mean square of what the best linear critic lacks of c*, of shape (rows, d) as v is."""
    num_rows, d = v.shape
    v, c = v - v.mean(0), c - c.mean(0)
    slope = jnp.linalg.solve(v.T @ v, v.T @ c)
    return float(((c - v @ slope) ** 2).sum() / (num_rows - d - 1) / 2)


class ScoreAndLinear(eqx.Module):
    """The machine's score at given mean bits, which is fixed, and a linear map, which is learned."""

    machine: dict[str, Array]
    bits: dict[str, Array]
    slope: Array
    shift: Array

    def __call__(self, v: Array) -> Array:
        machine, bits = lax.stop_gradient((self.machine, self.bits))
        mean_bits = jax.nn.sigmoid(bits["shift"] + v @ bits["slope"])
        return machine["b"] - v + machine["weights"] @ mean_bits + self.shift + self.slope @ v


def make_critic(kind: str, machine: dict[str, Array], bits: dict[str, Array], d: int) -> Any:
    if kind == "network":
        return eqx.nn.MLP(d, d, d, 2, jax.nn.elu, key=jax.random.key(2))
    return ScoreAndLinear(machine, bits, jnp.zeros((d, d)), jnp.zeros(d))


def find_bounds(rho: float, seed: int, args: argparse.Namespace, optims: dict[str, Any]) -> dict[tuple[str, str], Bound]:
    """Every bound by score and critic."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), round(10 * rho)), 6)
    machine = make_machine(keys[0], rho, args.dimension)
    sizes = (NUM_TRAIN, NUM_VALIDATION, NUM_TEST, NUM_TRUTH)
    *splits, many = (jax.random.normal(key, (size, args.dimension)) for key, size in zip(keys[1:5], sizes, strict=True))
    fitted = fit_guide(machine, splits[0], args.num_guide_steps)
    scores = {
        "exact": (Partial(exact_score, machine), {"slope": machine["weights"], "shift": machine["c"]}),
        "VaES": (Partial(marginal_score, model, guide, {**machine, **fitted}, num_samples=1), fitted),
    }
    found = {}
    for name, (score, bits) in scores.items():
        truths = (best_critic(machine, bits, many) ** 2).sum(1) / 2
        for kind in CRITICS:
            begin = time.process_time()
            critic = make_critic(kind, machine, bits, args.dimension)
            settings = {"batch_size": BATCH_SIZE, "progress_bar": False}
            result = fisher_divergence(keys[5], score, splits, critic, optims[kind], args.num_steps, **settings)
            lost = ((jax.vmap(result.critic)(splits[2]) - best_critic(machine, bits, splits[2])) ** 2).sum(1).mean() / 2
            numbers = map(float, (truths.mean(), truths.std() / NUM_TRUTH**0.5, result.estimate, result.standard_error, lost))
            found[name, kind] = Bound(*numbers, result.best_step, time.process_time() - begin)
    linear = best_linear_loss(many, best_critic(machine, scores["exact"][1], many))
    print(f"{rho:>4}{seed:>5}  the best linear critic loses {linear:.2f}")
    return found


def print_rows(rho: float, seed: int, found: dict[tuple[str, str], Bound]) -> None:
    for (score, kind), at in found.items():
        numbers = f"{at.truth:>10.2f} ± {at.truth_error:<5.2f}{at.estimate:>10.2f} ± {at.standard_error:<5.2f}{at.lost:>9.2f}"
        print(f"{rho:>4}{seed:>5}  {f'{score}, {kind}':<22}{numbers}{at.best_step:>9}{at.seconds:>9.0f}", flush=True)


def plot(path: Path, rhos: list[float], bounds: list[dict[tuple[str, str], Bound]]) -> None:
    """The first seed's bounds against rho."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    axes[0].axhline(1, color="black", linewidth=1, label="truth")
    for (score, kind), style in zip(bounds[0], ("C0o-", "C1o-", "C0s--", "C1s--"), strict=True):
        rows = [at[score, kind] for at in bounds]
        label = f"{kind}; {score}"
        parts = [(x, at.estimate / at.truth, 2 * at.standard_error / at.truth) for x, at in zip(rhos, rows, strict=True) if x > 0]
        if parts:
            x, y, error = np.array(parts).T
            axes[0].errorbar(x, y, error, fmt=style, capsize=3, markersize=4, label=label)
        axes[1].plot(rhos, [at.lost for at in rows], style, markersize=4, label=label)
    axes[0].set(xlabel="rho", ylabel="bound / truth, ± 2 standard errors")
    axes[1].set(xlabel="rho", ylabel="what the bound loses, half E |c - c*|²", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    # the same transformations for all fits, so that they are compiled once
    optims = {"network": optax.adam(2e-4), "score + linear": optax.adam(optax.cosine_decay_schedule(2e-3, args.num_steps))}
    print(f"d = {args.dimension}, {args.num_steps} steps of the critic, {args.num_guide_steps} of the guide before")
    heads = f"{'truth':>10}{'':8}{'bound':>10}{'':8}{'loses':>9}{'at step':>9}{'seconds':>9}"
    print(f"{'rho':>4}{'seed':>5}  {'score, critic':<22}{heads}")
    bounds = []
    for rho in args.rhos:
        for seed in range(args.num_seeds if rho == 0.2 else 1):
            found = find_bounds(rho, seed, args, optims)
            print_rows(rho, seed, found)
            if seed == 0:
                bounds.append(found)
    plot(args.output / "divergence.png", args.rhos, bounds)
    print(f"The figure is in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--dimension", type=int, default=200, help="visible and hidden units; 200 and 500 in the paper")
    parser.add_argument("--rhos", type=float, nargs="+", default=list(RHOS))
    parser.add_argument("--num-seeds", type=int, default=3, help="at rho = .2; one seed elsewhere")
    parser.add_argument("--num-steps", type=int, default=5_000, help="of the critic; 20,000 in the paper")
    parser.add_argument("--num-guide-steps", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=Path("outputs/fisher_divergence"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.dimension, args.rhos, args.num_seeds, args.num_steps, args.num_guide_steps = 5, [0.0, 0.2], 1, 20, 20
    main(args)
