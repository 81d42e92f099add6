# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the derivatives of a score cost: forward over reverse against reverse over reverse, and the trace by scan or vmap.

Two energies of 400 hidden units at batches of 100: the free energy of a Gaussian RBM, and an MLP of 2 hidden layers.

* ``product``: seconds of ``u^T H u`` by ``jvp`` of the score, over that by ``grad`` of ``u . score``.
* ``learning``: the same of the gradient in the parameters of sliced score matching, ``SlicedScoreMatching`` in the numerator.
* ``trace``: the exact trace and its gradient in the parameters, ``ExactScoreMatching`` (a scan over coordinates) over ``vmap``
  of ``jvp``. XLA counts the operations of a loop's body once, so here the operations cannot be compared.

Beside every ratio: the megabytes of temporaries and the operations that each side is compiled to.

What is compared is timed in turn, A B A B, so that the ratio holds when the machine's speed drifts. Run ``make bench``, or
``python benchmarks/score_objectives.py --help``.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm import ExactScoreMatching, SlicedScoreMatching

HIDDEN, KEY = 400, jax.random.key(0)


def grbm_energy(params, v):
    """Free energy of a Gaussian RBM of unit variance, for a batch of visibles."""
    (w, c), *_ = params
    return ((v**2).sum(-1) / 2 - jax.nn.softplus(v @ w + c).sum(-1)).sum()


def mlp_energy(params, v):
    (w, c), (w2, c2), (out, _) = params
    return (jax.nn.silu(jax.nn.silu(v @ w + c) @ w2 + c2) @ out).sum()


def problem(energy, dim, batch_size):
    """Parameters, visibles and directions, and the score of a batch as a function of parameters and visibles."""
    keys = jax.random.split(KEY, 5)
    sizes = (dim, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)
    layers = [(jax.random.normal(key, size) / np.sqrt(size[0]), jnp.zeros(size[1])) for key, size in zip(keys, sizes, strict=False)]
    params = layers[:1] if energy is grbm_energy else layers
    v, u = jax.random.normal(keys[3], (batch_size, dim)), jax.random.rademacher(keys[4], (batch_size, dim), float)
    return params, v, u, lambda params, v: jax.grad(lambda v: -energy(params, v))(v)


def sliced_by_reverse(score, params, u, v):
    """Sliced score matching, its Hessian product by a second reverse pass."""

    def slope(v):
        s = score(params, v)
        return (s * u).sum(), s

    product, s = jax.grad(slope, has_aux=True)(v)
    return ((s**2).sum(-1) / 2 + (product * u).sum(-1)).sum()


def exact_by_vmap(score, params, v):
    """Score matching, all columns of the Jacobian at once."""

    def diagonal(i):
        s, column = jax.jvp(lambda v: score(params, v), (v,), (jnp.zeros_like(v).at[:, i].set(1),))
        return s, column[:, i]

    s, trace = jax.vmap(diagonal, out_axes=(None, 0))(jnp.arange(v.shape[1]))
    return ((s**2).sum(-1) / 2 + trace.sum(0)).sum()


def product(energy, dim, batch_size):
    params, v, u, score = problem(energy, dim, batch_size)
    forward = jax.jit(lambda v: (u * jax.jvp(lambda v: score(params, v), (v,), (u,))[1]).sum(-1))
    reverse = jax.jit(lambda v: (u * jax.grad(lambda v: (u * score(params, v)).sum())(v)).sum(-1))
    return [(forward, (v,)), (reverse, (v,))]


def learning(energy, dim, batch_size):
    params, v, _, score = problem(energy, dim, batch_size)

    def package(params, key):
        return SlicedScoreMatching().loss(lambda v: score(params, v), key, v, v).sum()

    def by_hand(params, key):
        u = jax.random.rademacher(key, (1, *v.shape), v.dtype)[0]  # the directions that the objective draws
        return sliced_by_reverse(score, params, u, v)

    return [(jax.jit(jax.grad(f)), (params, KEY)) for f in (package, by_hand)]


def trace(energy, dim, batch_size, differentiate):
    params, v, _, score = problem(energy, dim, batch_size)
    package = lambda params: ExactScoreMatching().loss(lambda v: score(params, v), KEY, v, v).sum()  # noqa: E731
    by_vmap = lambda params: exact_by_vmap(score, params, v)  # noqa: E731
    change = jax.grad if differentiate else (lambda f: f)
    return [(jax.jit(change(f)), (params,)) for f in (package, by_vmap)]


def timed(function, args, num_calls):
    """A function that makes ``num_calls`` calls and returns the seconds per call."""
    jax.block_until_ready(function(*args))

    def seconds():
        start = time.perf_counter()
        for _ in range(num_calls):
            jax.block_until_ready(function(*args))
        return (time.perf_counter() - start) / num_calls

    return seconds


def require_same(pair):
    """Two ways to the same numbers, or there is nothing to compare."""
    got, wanted = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(f(*args))]) for f, args in pair)
    np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())


def compiled(function, args):
    """Millions of operations of a compiled function, and the megabytes it needs beside its arguments and results."""
    program = function.lower(*args).compile()
    return program.cost_analysis()["flops"] / 1e6, program.memory_analysis().temp_size_in_bytes / 1e6


def show(title, pair, args, num_calls):
    require_same(pair)
    timers = [timed(*one, num_calls) for one in pair]
    times = np.array([[timer() for timer in timers] for _ in range(args.repeats)])
    ratios, (ours, theirs) = times[:, 0] / times[:, 1], np.median(times, 0) * 1e3
    (flops, memory), (their_flops, their_memory) = (compiled(*one) for one in pair)
    print(
        f"{title:<30}{np.median(ratios):6.2f} (from {ratios.min():.2f} to {ratios.max():.2f}); {ours:.2f} against {theirs:.2f} ms; "
        f"{memory:.1f} against {their_memory:.1f} MB; {flops:.1f} against {their_flops:.1f} Mflop",
        flush=True,
    )


def main(args):
    print(f"device {jax.devices()[0].device_kind}; medians of {args.repeats} rounds, batches of {args.batch_size}")
    for energy in (grbm_energy, mlp_energy):
        for dim in args.dims:
            kind = f"{energy.__name__.removesuffix('_energy')} d = {dim}"
            show(f"product, {kind}", product(energy, dim, args.batch_size), args, args.num_calls)
            show(f"learning, {kind}", learning(energy, dim, args.batch_size), args, args.num_calls)
            calls = max(args.num_calls // dim, 1)
            show(f"trace, {kind}", trace(energy, dim, args.batch_size, False), args, calls)
            show(f"trace learned, {kind}", trace(energy, dim, args.batch_size, True), args, calls)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--num-calls", type=int, default=30, help="calls in one timed loop")
    parser.add_argument("--repeats", type=int, default=11, help="rounds of timed loops")
    parser.add_argument("--smoke", action="store_true", help="a few calls, to see that it runs")
    args = parser.parse_args()
    args.dims = (2, 64, 560)
    if args.smoke:
        args.batch_size, args.num_calls, args.repeats, args.dims = 4, 1, 2, (2, 8)
    main(args)
