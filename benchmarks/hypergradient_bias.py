# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How much of BiSM's gradient is right: a Gaussian restricted Boltzmann machine, 3 x 4, whose exact gradient is known.

At the posterior BiSM's gradient without unrolling (N = 0) lacks the term z^T Cov(d f / d v, d f / d theta). Steps of the guide
that are differentiated through bring it back at the rate of the guide's optimizer. Steps that are not, K, never do. Two panels,
both for denoising with the same noise in every gradient, in double precision, all parameters of the machine in one vector:

1. The lower level is the exact Kullback-Leibler divergence, its optimizer gradient descent with rate alpha, the guide starts off
   the posterior. Bias: ||mean gradient - exact|| / ||exact||, the mean over samples of the hidden units.
2. As in practice: one-sample ELBO of bits relaxed at temperature .1, Adam at 1e-3 with moments of 2000 steps near the posterior.
   Recovered: the projection of g_N - g_0 on exact - g_0, which is 1 for all of what is missing and 0 for nothing, with its
   standard error. Spread: root mean square over samples of ||gradient - mean|| / ||exact||.

Both have the implicit form beside the unrolled. In the second panel it has BiSM's own settings, but for the curvature (the
Hessian of the lower level, or the guide's Fisher information) and the number of its samples.

Run ``python benchmarks/hypergradient_bias.py --help``.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    DenoisingScoreMatching,
    GaussianBernoulliRBM,
    GumbelBernoulli,
    Implicit,
    ScoreMatching,
    Unrolled,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

NUM_VISIBLE, NUM_HIDDEN, NUM_ROWS, SIGMA = 3, 4, 100, 0.3
KEY = jax.random.key(5)
UNROLLED = Unrolled()
UNIT = optax.sgd(1.0)  # so that a step of the model is its gradient


@dataclass(frozen=True)
class FrozenNoise:
    """Denoising with the same noise at every call, so that two gradients differ by their method alone."""

    objective: DenoisingScoreMatching

    def perturb(self, rng_key, v):
        return self.objective.perturb(KEY, v)

    def loss(self, score_fn, rng_key, v, v_tilde):
        return self.objective.loss(score_fn, rng_key, v, v_tilde)

    def weight(self, batch_size):
        return self.objective.weight(batch_size)


class ExactKL:
    """The divergence of the guide from the posterior, summed over the hidden units by hand: no draws."""

    def loss(self, rng_key, params, model, guide, v):
        q, p = v @ params["A"] + params["a"], v @ params["W"] + params["c"]
        return (jax.nn.sigmoid(q) * (q - p) - jax.nn.softplus(q) + jax.nn.softplus(p)).sum()


OBJECTIVE = FrozenNoise(DenoisingScoreMatching(SIGMA))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def machine():
    W, b, c = (
        numpyro.param(name, value)
        for name, value in (
            ("W", normal(0, NUM_VISIBLE, NUM_HIDDEN)),
            ("b", normal(1, NUM_VISIBLE)),
            ("c", normal(2, NUM_HIDDEN)),
        )
    )
    return GaussianBernoulliRBM(W, b, c, numpyro.param("scale", jnp.array([0.8, 1.0, 1.3]), constraint=constraints.positive))


def marginal(v):
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", machine(), obs=v)


def joint(v):
    rbm = machine()
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (NUM_HIDDEN,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
        numpyro.factor("coupling", -rbm.joint_energy(v, h))


def guide(v):
    """The posterior's own family, in which it is A = W, a = c."""
    A, a = numpyro.param("A", normal(0, NUM_VISIBLE, NUM_HIDDEN)), numpyro.param("a", normal(2, NUM_HIDDEN))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", GumbelBernoulli(v @ A + a, temperature=0.1).to_event(1))


def make_engine(guide_optim, lower_loss=None, hypergradient=UNROLLED):
    return BiSM(joint, guide, UNIT, guide_optim, OBJECTIVE, lower_loss, num_inner_steps=0, hypergradient=hypergradient)


def gradient(engine, state, v):
    """The gradient that a step of the engine follows, by site."""
    new, _ = engine.update(state, v)
    of = "theta" if hasattr(state, "theta") else "unconstrained"
    return jax.tree.map(jnp.subtract, getattr(state, of), getattr(new, of))


def exact_gradient(v):
    engine = ScoreMatching(marginal, UNIT, OBJECTIVE)
    return ravel_pytree(gradient(engine, engine.init(KEY, v), v))[0]


def draw_gradients(engine, v, num_draws):
    """A function of the state that gives ``(num_draws, size)``; the same samples of the upper level for every engine."""
    keys = jax.random.split(KEY, num_draws)

    @jax.jit
    def draws(state):
        return jax.vmap(lambda key: ravel_pytree(gradient(engine, state._replace(rng_key=key), v))[0])(keys)

    return lambda state: np.asarray(draws(state))


def after_inner_steps(num_steps, guide_optim, lower_loss, state, v):
    """The state after steps of the guide at fixed parameters of the machine."""
    if num_steps == 0:
        return state
    settings = {"num_inner_steps": num_steps, "hypergradient": Unrolled(0)}
    engine = BiSM(joint, guide, optax.sgd(0.0), guide_optim, OBJECTIVE, lower_loss, **settings)
    return engine.update(state, v)[0]


def relative_bias(draws, exact):
    return float(np.linalg.norm(draws.mean(0) - exact) / np.linalg.norm(exact))


def step_of_gradient_descent(state, v):
    """The rate at which the slowest direction contracts by a tenth per step, and the curvatures it comes from."""
    flat, unravel = ravel_pytree(state.phi)
    noised = OBJECTIVE.perturb(KEY, v)
    hessian = jax.hessian(lambda phi: ExactKL().loss(KEY, {**state.params, **unravel(phi)}, None, None, noised) / len(v))(flat)
    curvatures = jnp.linalg.eigvalsh(hessian)
    return float(min(0.1 / curvatures[0], 1 / curvatures[-1])), float(curvatures[0]), float(curvatures[-1])


def exact_lower_level(v, exact, args):
    """Biases ``(K, N)`` of the unrolled form and ``(K, conjugate gradient steps)`` of the implicit."""
    at_posterior = make_engine(UNIT, ExactKL()).init(KEY, v)
    alpha, smallest, largest = step_of_gradient_descent(at_posterior, v)
    print(
        f"1. Exact lower level, gradient descent: alpha mu = {alpha * smallest:.3f}, alpha L = {alpha * largest:.2f}. Relative bias"
    )
    off = {"A": at_posterior.params["A"] + 0.5 * normal(7, NUM_VISIBLE, NUM_HIDDEN), "a": jnp.zeros(NUM_HIDDEN)}

    start = at_posterior._replace(params={**at_posterior.params, **off}, phi=off)
    descent = optax.sgd(alpha)
    unroll = [Unrolled(n) for n in args.unroll]
    implicit = [Implicit("hessian", num_cg_steps=n, damping=0.0, tol=0.0, num_draws=1) for n in args.num_cg_steps]
    heads = [f"N = {n}" for n in args.unroll] + [f"{n} CG" for n in args.num_cg_steps]
    print(f"{'':<10}" + "".join(f"{head:>9}" for head in heads))
    draws = [draw_gradients(make_engine(descent, ExactKL(), one), v, args.num_draws) for one in unroll + implicit]
    table = {}
    for num_inner in args.inner:
        state = after_inner_steps(num_inner, descent, ExactKL(), start, v)
        row = [relative_bias(of_state(state), exact) for of_state in draws]
        table[num_inner] = row[: len(unroll)], row[len(unroll) :]
        print(f"{f'K = {num_inner}':<10}" + "".join(f"{value:>9.1e}" for value in row), flush=True)
    return table


def sampled_lower_level(v, exact, args):
    """What few unrolled steps of Adam recover, and the bias and spread of the implicit form."""
    adam = optax.adam(1e-3, b1=0.9, b2=0.95, eps_root=1e-24)  # as in the code of the paper
    start = make_engine(adam).init(KEY, v)
    state = after_inner_steps(args.warm_up, adam, None, start, v)

    def draws(hypergradient):
        return draw_gradients(make_engine(adam, hypergradient=hypergradient), v, args.num_sampled)(state)

    none = draws(Unrolled(0))
    missing = exact - none.mean(0)
    size = np.linalg.norm(exact)
    biases = ravel_pytree({name: jnp.full(jnp.shape(value), name == "c") for name, value in state.theta.items()})[0].astype(bool)

    def report(name, draws):
        row = [name, relative_bias(draws, exact), np.sqrt(((draws - draws.mean(0)) ** 2).sum(1).mean()) / size]
        for part in (np.ones_like(biases), biases):
            of_draw = ((draws - none) * part) @ (missing * part) / ((missing * part) @ missing)
            row += [of_draw.mean(), of_draw.std(ddof=1) / np.sqrt(len(of_draw))]
        print(f"{name:<24}{row[1]:>9.3f}{row[2]:>11.3f}{row[3]:>14.4f} +- {row[4]:.4f}{row[5]:>16.4f} +- {row[6]:.4f}", flush=True)
        return row

    print(f"\n2. One-sample ELBO, Adam at 1e-3, {args.num_sampled} samples of each gradient")
    print(f"{'':<24}{'bias':>9}{'spread':>11}{'recovered':>14}{'':>10}{'of hidden biases':>19}")
    unrolled = [report("unrolled, N = 0", none)]
    for n in args.adam:
        unrolled.append(report(f"unrolled, N = {n}", draws(Unrolled(n))))
    implicit = []
    for curvature, n in [("hessian", n) for n in args.hessian_draws] + [("fisher", n) for n in args.fisher_draws]:
        implicit.append(report(f"implicit, {curvature}, {n}", draws(Implicit(curvature, num_draws=n))))
    return unrolled, implicit


def plot(path, exact_table, sampled, args):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for num_inner, (unrolled, _) in exact_table.items():
        left.plot(args.unroll, unrolled, "o-", label=f"unrolled, K = {num_inner}")
    last = max(exact_table)
    left.axhline(
        max(exact_table[last][1][-1], 1e-16), color="k", ls="--", label=f"implicit, K = {last}, {args.num_cg_steps[-1]} CG steps"
    )
    left.set_xscale("symlog", linthresh=1)
    left.set_xlim(-0.3, 400)
    left.set_yscale("log")
    left.set(xlabel="unrolled steps N", ylabel="relative bias of the gradient", title="exact lower level, gradient descent")
    left.set_xticks(args.unroll, [str(n) for n in args.unroll])
    left.minorticks_off()
    left.legend(loc="lower left", bbox_to_anchor=(0, 0.1))
    rows = [row for part in sampled for row in part]
    places = np.arange(len(rows))
    colors = ["C0"] * len(sampled[0]) + ["C1"] * len(sampled[1])
    right.bar(places, [row[3] for row in rows], yerr=[2 * row[4] for row in rows], color=colors, capsize=3)
    right.axhline(1, color="k", ls="--", lw=1)
    names = [row[0].split(", ", 1)[1] for row in rows]
    right.set_xticks(places, names, rotation=45, ha="right", fontsize=8)
    right.set_ylim(-0.75, 1.75)
    right.set(
        ylabel="fraction of the missing part recovered",
        title="one-sample ELBO, Adam at 1e-3\nunrolled (blue), implicit by curvature and samples (orange)",
    )
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    v = normal(3, NUM_ROWS, NUM_VISIBLE)
    exact = np.asarray(exact_gradient(v))
    exact_table = exact_lower_level(v, exact, args)
    sampled = sampled_lower_level(v, exact, args)
    plot(args.output, exact_table, sampled, args)
    print(f"\nThe figure is {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-draws", type=int, default=400, help="samples of the hidden units in the first panel")
    parser.add_argument("--num-sampled", type=int, default=1000, help="samples of every gradient in the second panel")
    parser.add_argument("--output", type=Path, default=Path("outputs/hypergradient_bias.png"))
    parser.add_argument("--smoke", action="store_true", help="a few settings and samples, to see that it runs")
    args = parser.parse_args()
    args.unroll, args.inner, args.num_cg_steps = (0, 1, 5, 10, 50, 200), (0, 10, 100, 1000), (1, 2, 5, 16)
    args.adam, args.hessian_draws, args.warm_up = (1, 5, 10, 50), (1, 2, 8, 32), 2000
    args.fisher_draws = (1, 2, 8)
    if args.smoke:
        args.unroll, args.inner, args.num_cg_steps, args.num_draws = (5,), (0,), (5,), 20
        args.adam, args.hessian_draws, args.warm_up, args.num_sampled = (), (8,), 20, 20
        args.fisher_draws = ()
    main(args)
