# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Processor seconds of what is called eagerly: its first call, its second, and one that ``jax.jit`` has compiled.

``python benchmarks/eager.py``
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from numpyro_ebm import BernoulliRBM, EnergyDistribution, find_map, log_normalizer, sample_posterior


def model(y):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def cases(num_samples):
    energy = EnergyDistribution(lambda x: (x**2 - 1) ** 2, initial=dist.Normal(0, 1))
    weights = jax.random.normal(jax.random.key(1), (20, 10))
    rbm, y = BernoulliRBM(weights, jnp.zeros(20), jnp.zeros(10)), jnp.arange(20.0)
    yield "EnergyDistribution.sample", lambda key: energy.sample(key, (num_samples,)), True
    yield "BernoulliRBM.sample", lambda key: rbm.sample(key, (num_samples,)), True
    yield "log_normalizer", lambda key: log_normalizer(rbm).log_normalizer, True
    yield "sample_posterior", lambda key: sample_posterior(key, model, {"loc": 1.0}, y, num_samples=num_samples), False
    yield "find_map", lambda key: find_map(key, model, {"loc": 1.0}, y).latents, False


def processor_seconds(call, seed):
    key = jax.random.key(seed)
    start = time.process_time()
    jax.block_until_ready(call(key))
    return time.process_time() - start


def main(args):
    print(f"{'':<28}{'first':>8}{'second':>8}{'jitted':>8}")
    for name, call, is_pure in cases(args.num_samples):
        seconds = [processor_seconds(call, seed) for seed in range(2)]
        if is_pure:
            jitted = jax.jit(call)
            processor_seconds(jitted, 0)
            seconds.append(processor_seconds(jitted, 1))
        print(f"{name:<28}" + "".join(f"{each:8.3f}" for each in seconds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-samples", type=int, default=1000, help="of every sampler")
    parser.add_argument("--smoke", action="store_true", help="few samples, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_samples = 10
    main(args)
