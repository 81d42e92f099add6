# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the estimators of an EBLVM's gradient are worth: a Gaussian restricted Boltzmann machine, 3 x 4, whose gradient is known.

Three panels and a table, on ten rows, in double precision; the guide is moved away from the posterior along one direction.

1. The biases of VaES and VaGES, ||E_q VaES - s|| and ||E_q VaGES - d s / d theta||, means over rows by enumeration of the hidden
   units, against the guide's Kullback-Leibler divergence, with the bounds A sqrt(2 KL) and (C + 3 A B) sqrt(2 KL), where A, B, C
   are the largest ||d f / d v||, ||d f / d theta|| and ||d2 f / d theta d v|| over the hidden units.
2. The bias of the gradient of denoising score matching, with the same noise in every gradient, ||mean - exact|| / ||exact|| from
   ``--num-draws`` gradients, against the divergence: VaGES, and the weighted form at L = 2 and 10.
3. The same against L for a guide that ignores the visible: VaGES, the weighted form and its jackknife; what is below three times
   the error of the mean is left out.

The table has bias and spread, the root mean square of ||gradient - mean|| / ||exact||, of every estimator at the posterior and at
two guides off it, and of BiSM, whose guide moves by Adam with moments of 200 steps.

Run ``python benchmarks/vages_bias.py --help``.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from hypergradient_bias import KEY, NUM_HIDDEN, NUM_VISIBLE, OBJECTIVE, UNIT, exact_gradient, gradient, guide, joint, normal
from jax.flatten_util import ravel_pytree

from numpyro_ebm import BiSM, ImportanceWeighted, Unrolled, VaGES, Variational

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_ROWS = 10
DISTANCES = (0.03, 0.1, 0.3, 1.0, 2.0)
SAMPLES = (2, 4, 8, 16, 32)


def exact_guide():
    return {"A": normal(0, NUM_VISIBLE, NUM_HIDDEN), "a": normal(2, NUM_HIDDEN)}


def guide_at(distance):
    """The posterior's guide, moved along one direction."""
    moved = {"A": normal(7, NUM_VISIBLE, NUM_HIDDEN), "a": normal(8, NUM_HIDDEN)}
    return jax.tree.map(lambda exact, way: exact + distance * way, exact_guide(), moved)


def blind_guide():
    """The posterior at the mean of the rows, for every row."""
    return {"A": jnp.zeros((NUM_VISIBLE, NUM_HIDDEN)), "a": exact_guide()["a"]}


def divergence(phi, v):
    """Of the guide from the posterior at the noisy rows, a mean over them."""
    v = OBJECTIVE.perturb(KEY, v)
    q, p = v @ phi["A"] + phi["a"], v @ exact_guide()["A"] + exact_guide()["a"]
    return (jax.nn.sigmoid(q) * (q - p) - jax.nn.softplus(q) + jax.nn.softplus(p)).sum(-1).mean()


def log_joint(theta, v, h):
    """Of one row, as a function of a vector."""
    W, b, c = theta["W"], theta["b"], theta["c"]
    return -((v - b) ** 2 / jnp.array([0.8, 1.0, 1.3]) ** 2).sum() / 2 + h @ c + v @ W @ h


def biases_and_bounds(phi, v):
    """Of one row: the biases of VaES and VaGES by enumeration, and their bounds."""
    states = jnp.asarray(list(itertools.product([0.0, 1.0], repeat=NUM_HIDDEN)))
    theta, unravel = ravel_pytree(machine_params())

    def f(theta, v, h):
        return log_joint(unravel(theta), v, h)

    score = jax.vmap(jax.grad(f, 1), (None, None, 0))(theta, v, states)
    slope = jax.vmap(jax.grad(f), (None, None, 0))(theta, v, states)
    mixed = jax.vmap(jax.jacfwd(jax.grad(f, 1)), (None, None, 0))(theta, v, states)

    def estimates(logits):
        q = jnp.exp(states @ logits - jax.nn.softplus(logits).sum())
        covariance = jnp.einsum("h,hv,ht->vt", q, score - q @ score, slope)
        return q @ score, jnp.tensordot(q, mixed, 1) + covariance

    exact, wrong = v @ exact_guide()["A"] + exact_guide()["a"], v @ phi["A"] + phi["a"]
    gaps = [jnp.linalg.norm(a - b) for a, b in zip(estimates(wrong), estimates(exact), strict=True)]
    largest = [jnp.sqrt((x**2).reshape(len(x), -1).sum(-1)).max() for x in (score, slope, mixed)]
    kl = (jax.nn.sigmoid(wrong) * (wrong - exact) - jax.nn.softplus(wrong) + jax.nn.softplus(exact)).sum()
    A, B, C = largest
    return jnp.stack([*gaps, A * jnp.sqrt(2 * kl), (C + 3 * A * B) * jnp.sqrt(2 * kl)])


def machine_params():
    return {"W": normal(0, NUM_VISIBLE, NUM_HIDDEN), "b": normal(1, NUM_VISIBLE), "c": normal(2, NUM_HIDDEN)}


def make_vages(estimate):
    return VaGES(joint, guide, UNIT, optax.sgd(0.0), OBJECTIVE, num_inner_steps=0, estimate=estimate)


def make_bism(num_unroll_steps):
    adam = optax.adam(1e-3, b1=0.9, b2=0.95, eps_root=1e-24)
    return BiSM(joint, guide, UNIT, adam, OBJECTIVE, num_inner_steps=0, hypergradient=Unrolled(num_unroll_steps))


def warm_state(engine, v):
    """A state whose guide's Adam has made 200 steps at fixed parameters of the machine."""
    still = BiSM(joint, guide, optax.sgd(0.0), engine.guide_optim, OBJECTIVE, num_inner_steps=1, hypergradient=Unrolled(0))
    return still.run(KEY, 200, v, progress_bar=False).state


def moments(engine, phi, v, num_draws, size=200):
    """Mean, error of its norm, and spread of gradients with ``num_draws`` keys, in chunks."""
    state = (warm_state(engine, v) if isinstance(engine, BiSM) else engine.init(KEY, v))._replace(phi=phi)
    state = state._replace(params={**state.params, **phi})

    @jax.jit
    def chunk(keys):
        g = jax.vmap(lambda key: ravel_pytree(gradient(engine, state._replace(rng_key=key), v))[0])(keys)
        return g.sum(0), (g**2).sum(0)

    keys = jax.random.split(jax.random.key(2), num_draws).reshape(-1, size)
    first, second = (sum(parts) / num_draws for parts in zip(*[chunk(part) for part in keys], strict=True))
    spread = np.sqrt(np.maximum(second - first**2, 0).sum())
    return np.asarray(first), spread / np.sqrt(num_draws), spread


def relative(engine, phi, v, num_draws):
    """Bias, its error and the spread, over the exact gradient's norm."""
    exact = exact_gradient(v)
    mean, error, spread = moments(engine, phi, v, num_draws)
    return np.array([np.linalg.norm(mean - exact), error, spread]) / np.linalg.norm(exact)


def estimators():
    yield "BiSM, N = 0", make_bism(0)
    yield "BiSM, N = 5", make_bism(5)
    yield "VaGES, L = 2", make_vages(Variational(2))
    yield "VaGES, L = 2, shared", make_vages(Variational(shared_samples=True))
    yield "VaGES, L = 2, biased", make_vages(Variational(covariance="biased"))
    yield "VaGES, L = 2, reduced", make_vages(Variational(variance_reduced=True))
    yield "VaGES, L = 2, relaxed", make_vages(Variational(relaxed=True))
    yield "VaGES, L = 10", make_vages(Variational(10))
    yield "weighted, L = 2", make_vages(ImportanceWeighted(2, jackknife=False))
    yield "weighted, L = 10", make_vages(ImportanceWeighted(10, jackknife=False))
    yield "jackknife, L = 2", make_vages(ImportanceWeighted(2, jackknife=True))
    yield "jackknife, L = 10", make_vages(ImportanceWeighted(10, jackknife=True))


def print_table(v, num_draws, names):
    guides = {"posterior": exact_guide(), "near": guide_at(0.3), "blind": blind_guide()}
    print("bias (its error), spread; guides at a divergence of " + ", ".join(f"{divergence(g, v):.2g}" for g in guides.values()))
    print(f"{'':<24}" + "".join(f"{name:>26}" for name in guides))
    for name, engine in estimators():
        if names is None or name in names:
            cells = [relative(engine, phi, v, num_draws) for phi in guides.values()]
            print(f"{name:<24}" + "".join(f"{b:>10.4f} ({e:.4f}) {s:>6.2f}" for b, e, s in cells), flush=True)


def plot_bounds(ax, v, distances):
    kl = [divergence(guide_at(distance), v) for distance in distances]
    noisy = OBJECTIVE.perturb(KEY, v)
    values = np.array([jax.vmap(lambda v, d=d: biases_and_bounds(guide_at(d), v))(noisy).mean(0) for d in distances])
    for column, (name, style) in enumerate(
        (("VaES", "C0-o"), ("VaGES", "C1-o"), ("bound of VaES", "C0:"), ("bound of VaGES", "C1:"))
    ):
        ax.plot(kl, values[:, column], style, label=name)
        print(f"{name:<24}" + " ".join(f"KL {d:.2g}: {b:.4f}" for d, b in zip(kl, values[:, column], strict=True)), flush=True)
    ax.set(xscale="log", yscale="log", xlabel="KL(guide || posterior), nats per row", ylabel="bias, a mean over rows")
    ax.legend()


def plot_divergence(ax, v, num_draws, distances):
    engines = {"VaGES": make_vages(Variational(2)), "weighted, L = 2": make_vages(ImportanceWeighted(2, jackknife=False))}
    engines["weighted, L = 10"] = make_vages(ImportanceWeighted(10, jackknife=False))
    engines["jackknife, L = 10"] = make_vages(ImportanceWeighted(10, jackknife=True))
    kl = [divergence(guide_at(distance), v) for distance in distances]
    for name, engine in engines.items():
        values = np.array([relative(engine, guide_at(distance), v, num_draws) for distance in distances])
        ax.errorbar(kl, values[:, 0], values[:, 1], marker="o", label=name)
        print(
            f"{name:<24}" + " ".join(f"KL {d:.2g}: {b:.4f} ({e:.4f})" for d, (b, e, _) in zip(kl, values, strict=True)), flush=True
        )
    ax.set(xscale="log", yscale="log", xlabel="KL(guide || posterior), nats per row", ylabel="relative bias of the gradient")
    ax.legend()


def plot_samples(ax, v, num_draws, samples):
    phi = blind_guide()
    forms = {"VaGES": Variational(), "weighted": ImportanceWeighted(jackknife=False), "jackknife": ImportanceWeighted()}
    for name, form in forms.items():
        values = np.array([relative(make_vages(replace(form, num_samples=size)), phi, v, num_draws) for size in samples])
        seen = values[:, 0] > 3 * values[:, 1]
        ax.errorbar(np.array(samples)[seen], values[seen, 0], values[seen, 1], marker="o", label=name)
        cells = " ".join(f"L = {size}: {b:.4f} ({e:.4f}), {s:.2f};" for size, (b, e, s) in zip(samples, values, strict=True))
        print(f"{name:<12}{cells}", flush=True)
    ax.plot(samples, 1 / np.array(samples), ":", color="gray", label="1 / L")
    ax.plot(samples, 4 / np.array(samples) ** 2, "-.", color="gray", label=r"4 / L$^2$")
    ax.set(xscale="log", yscale="log", xlabel="samples L", ylabel="relative bias, guide ignores the visible")
    ax.set_xticks(samples, [str(size) for size in samples])
    ax.minorticks_off()
    ax.legend()


def main(args):
    v = normal(3, NUM_ROWS, NUM_VISIBLE)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2))
    plot_bounds(axes[0], v, args.distances)
    plot_divergence(axes[1], v, args.num_draws, args.distances)
    plot_samples(axes[2], v, args.num_draws, args.samples)
    print_table(v, args.num_draws, args.names)
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.tight_layout()
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "vages_bias.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-draws", type=int, default=40_000, help="gradients behind every mean")
    parser.add_argument("--output", type=Path, default=Path("outputs/vages_bias"))
    parser.add_argument("--smoke", action="store_true", help="few samples, to see that it runs")
    args = parser.parse_args()
    args.distances, args.samples, args.names = DISTANCES, SAMPLES, None
    if args.smoke:
        args.num_draws, args.distances, args.samples, args.names = 200, (0.3,), (2,), ("BiSM, N = 5", "VaGES, L = 2, relaxed")
    main(args)
