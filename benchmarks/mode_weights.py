# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How much weight a learned density gives to two modes, with and without jumps of the negative chains.

A latent has two modes, at -1.5 and 1.5, that no local move crosses between; its prior is a standard normal tilted by a network, and
is learned from data with little noise (the quickstart of the README). For several keys the script prints P(z > 0) of the *learned
density*, by quadrature, and of the negative chains that learned it, which look right whatever the density is. The true weight is
that of the data. Then the same for a hierarchical model of 30 groups with a slope and a scale of the noise.

Run ``python benchmarks/mode_weights.py``: about four minutes of one core.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO, autoguide

from numpyro_ebm import MALA, TiltedDistribution, negative_phase

SAMPLERS = {"no jumps": MALA(num_jumps=0), "default": None, "3 jumps": MALA(num_jumps=3)}
NETWORK = eqx.nn.MLP("scalar", "scalar", 32, 2, jax.nn.silu, key=jax.random.key(1))


def quickstart():
    mode, spread, noise = jax.random.normal(jax.random.key(0), (3, 1000))
    latent = 1.5 * jnp.sign(mode) + 0.3 * spread

    def model(y):
        energy = eqx_module("energy", NETWORK)
        with numpyro.plate("data", 1000):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), energy))
            numpyro.sample("y", dist.Normal(z, 0.2), obs=y)

    return model, latent + 0.2 * noise, 0.0, float((latent > 0).mean())


def hierarchical():
    """30 groups of 5, with effects of two kinds; the noise and a slope are latents too."""
    keys = jax.random.split(jax.random.key(3), 4)
    kind = jax.random.bernoulli(keys[0], 0.57, (30,))
    effect = jnp.where(kind, 1.2, -1.2) + 0.15 * jax.random.normal(keys[1], (30,))
    x, noise = jax.random.normal(keys[2], (2, 30, 5))
    y = effect[:, None] + 0.5 * x + 0.5 * noise

    def model(y):
        energy = eqx_module("energy", NETWORK)
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        with numpyro.plate("groups", 30):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), energy))
            numpyro.sample("y", dist.Normal(z[:, None] + slope * x, sigma).to_event(1), obs=y)

    return model, y, 0.0, float(kind.mean())


def right_of(middle, params):
    """P(z > middle) of the learned density."""
    energy = eqx.combine(params["energy$params"], NETWORK)
    z = jnp.linspace(-6, 6, 4001)
    density = jax.nn.softmax(dist.Normal(0, 1).log_prob(z) - jax.vmap(energy)(z))
    return float(density[z > middle].sum())


def main(args):
    for problem in (quickstart, hierarchical):
        model, y, middle, true = problem()
        print(f"{problem.__name__}: P(z > {middle:g}) is {true:.3f} of the true latents; density / chains")
        for name, sampler in SAMPLERS.items():
            phase = negative_phase(model, num_chains=1000, sampler=sampler)
            svi = SVI(phase, autoguide.AutoNormal(phase), optax.adam(5e-3), Trace_ELBO())
            found = []
            for seed in range(2, 2 + args.num_seeds):
                result = svi.run(jax.random.key(seed), args.num_steps, y, progress_bar=False)
                chains = result.state.mutable_state["z/chains"]["x"]
                found.append((right_of(middle, result.params), float((chains > middle).mean())))
            words = "  ".join(f"{density:.3f} / {chains:.3f}" for density, chains in found)
            worst = max(abs(density - true) for density, _ in found)
            print(f"  {name:<10}{words}   largest error {worst:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps, args.num_seeds = 2, 1
    main(args)
