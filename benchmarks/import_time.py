# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Processor seconds of ``import numpyro_ebm`` over ``import numpyro, optax``, each in a fresh interpreter, in turn."""

import argparse
import resource
import subprocess
import sys

import numpy as np


def processor_seconds(statement):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main(args):
    statements = ["import numpyro_ebm", "import numpyro, optax"]
    times = np.array([[processor_seconds(statement) for statement in statements] for _ in range(args.repeats + 1)])[1:]
    ratios = times[:, 0] / times[:, 1]
    for statement, seconds in zip(statements, np.median(times, axis=0), strict=True):
        print(f"{statement:<24} {seconds:6.2f} s")
    print(f"{'ratio':<24} {np.median(ratios):6.3f} (from {ratios.min():.3f} to {ratios.max():.3f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of imports, after one that warms the disk")
    parser.add_argument("--smoke", action="store_true", help="one pair, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.repeats = 1
    main(args)
