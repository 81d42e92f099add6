# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What ``ksd_test`` rejects: its level where the model fits, and its power where it does not.

The model is a standard normal distribution in one and in ten dimensions. The level is the fraction of tests with a p-value of at
most .01, .05 and .1 for samples of the model itself; the power that with at most .05 for samples of another distribution, every
coordinate of which is

* shifted by ``size``;
* ``1 + size`` times as wide;
* a mixture, of mean 0 and variance 1, of the Laplace distribution with probability ``size`` and the normal distribution.

Kernels have the median heuristic. Every share is of as many tests as ``--num-tests`` says, each on data and signs of its own.
Run ``python benchmarks/ksd_test.py --help``.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from numpyro_ebm import IMQKernel, RBFKernel, ksd_test

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KERNELS = {"RBF": RBFKernel(), "IMQ": IMQKernel()}
LEVELS = (0.01, 0.05, 0.1)
ALTERNATIVES = {
    "mean shifted by": (0.0, 0.1, 0.2, 0.3, 0.5),
    "scale larger by": (0.0, 0.1, 0.2, 0.3, 0.5),
    "fraction of Laplace": (0.0, 0.25, 0.5, 0.75, 1.0),
}


def draw(alternative, size, rng_key, shape):
    normal_key, laplace_key, choice_key = jax.random.split(rng_key, 3)
    x = jax.random.normal(normal_key, shape)
    if alternative == "mean shifted by":
        return x + size
    if alternative == "scale larger by":
        return x * (1 + size)
    laplace = jax.random.laplace(laplace_key, shape) / jnp.sqrt(2)
    return jnp.where(jax.random.bernoulli(choice_key, size, shape), laplace, x)


@partial(jax.jit, static_argnames=("kernel", "num_bootstrap"))
def p_values(rng_key, v, kernel, num_bootstrap):
    """The p-values of ``(num_tests, n, d)`` samples as if from a standard normal distribution."""

    def one(args):
        key, v = args
        return ksd_test(key, v, -v, kernel=kernel, num_bootstrap=num_bootstrap).p_value

    return jax.lax.map(one, (jax.random.split(rng_key, len(v)), v), batch_size=20)


def shares(alternative, size, kernel, n, d, args):
    """The fraction of tests with a p-value of at most each of the levels."""
    data_key, test_key = jax.random.split(jax.random.key(n + d))
    v = draw(alternative, size, data_key, (args.num_tests, n, d))
    p = np.asarray(p_values(test_key, v, kernel, args.num_bootstrap))
    return [float((p <= level).mean()) for level in LEVELS]


def measure(args):
    """The power at .05 by alternative, dimension, kernel and number of samples, one number per size."""
    print(f"Level, {args.num_tests} tests. Standard errors .003, .007, .009 for 1000")
    print(f"{'':<22}" + "".join(f"{level:>8}" for level in LEVELS))
    for d, n, name in cases(args):
        level = shares("mean shifted by", 0.0, KERNELS[name], n, d, args)
        print(f"{f'{name}, n = {n}, d = {d}':<22}" + "".join(f"{share:>8.3f}" for share in level), flush=True)
    table = {}
    for alternative, sizes in args.alternatives.items():
        print(f"\nPower at .05, {alternative}\n{'':<22}" + "".join(f"{size:>8}" for size in sizes))
        for d, n, name in cases(args):
            power = [shares(alternative, size, KERNELS[name], n, d, args)[1] for size in sizes]
            table[alternative, d, n, name] = power
            print(f"{f'{name}, n = {n}, d = {d}':<22}" + "".join(f"{share:>8.3f}" for share in power), flush=True)
    return table


def cases(args):
    return [(d, n, name) for d in args.dimensions for n in args.sizes for name in KERNELS]


def plot(path, table, args):
    shape = len(args.dimensions), len(args.alternatives)
    figure, axes = plt.subplots(*shape, figsize=(11, 3.2 * shape[0]), sharey=True, squeeze=False)
    for (row, d), (column, alternative) in ((r, c) for r in enumerate(args.dimensions) for c in enumerate(args.alternatives)):
        ax = axes[row, column]
        for n, line in zip(args.sizes, ("--", "-"), strict=False):
            for name, color in zip(KERNELS, ("C0", "C1"), strict=True):
                power = table[alternative, d, n, name]
                ax.plot(args.alternatives[alternative], power, line, marker="o", ms=4, color=color, label=f"{name}, n = {n}")
        ax.axhline(0.05, color="k", lw=1, ls=":")
        ax.set(xlabel=alternative, title=f"d = {d}")
        ax.grid(alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("fraction rejected at .05")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    start = time.process_time()
    plot(args.output, measure(args), args)
    print(f"\n{time.process_time() - start:.0f} s of processor time. The figure is {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tests", type=int, default=1000, help="number of tests for every fraction")
    parser.add_argument("--num-bootstrap", type=int, default=199, help="samples of the signs in a test")
    parser.add_argument("--output", type=Path, default=Path("outputs/ksd_power.png"))
    parser.add_argument("--smoke", action="store_true", help="a few tests and sizes, to see that it runs")
    args = parser.parse_args()
    args.sizes, args.dimensions, args.alternatives = (50, 200), (1, 10), ALTERNATIVES
    if args.smoke:
        args.num_tests, args.sizes, args.dimensions = 20, (20,), (1,)
        args.alternatives = {name: sizes[::4] for name, sizes in ALTERNATIVES.items()}
    main(args)
