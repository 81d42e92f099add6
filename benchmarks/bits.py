# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What is lost on bits: by the bits of BiSM's guide, or by its objective.

The restricted Boltzmann machine of ``report_table.py`` is learned by ``BiSM`` with the posterior's family as guide, and by
denoising of the same density with its bits summed out, by the same optimizer; and by exact maximum likelihood. All are judged by
the exact log likelihood of the rows.

Run ``python benchmarks/bits.py``: about four minutes of one core.
"""

import argparse
import itertools
import math

import _timing
import jax
import jax.numpy as jnp
import numpyro
import optax
from jax import lax
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from report_table import DENOISING, OF_BITS, bits, machine, trained

from numpyro_ebm import BiSM, EnergyDistribution, ScoreMatching

CORNERS = jnp.array(list(itertools.product([0.0, 1.0], repeat=6)))


def summed(v):
    coupling = numpyro.param("coupling", lambda key: 0.1 * jax.random.normal(key, (8, 6)))
    bias, shift = numpyro.param("bias", jnp.zeros(6)), numpyro.param("shift", jnp.zeros(8))
    scale = numpyro.param("scale", jnp.ones(8), constraint=constraints.positive)

    def energy(v):
        return (((v - shift) / scale) ** 2).sum() / 2 - jax.nn.softplus(bias + v @ coupling).sum()

    with numpyro.plate("data", len(v)):
        numpyro.sample("v", EnergyDistribution(energy, event_shape=(8,)), obs=v)


def log_likelihood(params):
    """Of the rows, exactly: given bits the visibles are normal."""
    coupling, bias, shift, scale = (params[name] for name in ("coupling", "bias", "shift", "scale"))
    pull = CORNERS @ coupling.T
    log_masses = CORNERS @ bias + (shift * pull + (scale * pull) ** 2 / 2).sum(1)
    log_normalizer = logsumexp(log_masses) + jnp.log(scale).sum() + 4 * math.log(2 * math.pi)
    visible = -(((OF_BITS - shift) / scale) ** 2).sum(1) / 2 + jax.nn.softplus(bias + OF_BITS @ coupling).sum(1)
    return visible.mean() - log_normalizer


def by_likelihood(num_steps, num_seeds, optim):
    def one(key):
        start = {"coupling": 0.1 * jax.random.normal(key, (8, 6)), "bias": jnp.zeros(6), "shift": jnp.zeros(8), "log": jnp.zeros(8)}

        def step(carry, _):
            theta, state = carry
            gradient = jax.grad(lambda theta: -log_likelihood({**theta, "scale": jnp.exp(theta["log"])}))(theta)
            change, state = optim.update(gradient, state)
            return (optax.apply_updates(theta, change), state), None

        theta = lax.scan(step, (start, optim.init(start)), None, num_steps)[0][0]
        return log_likelihood({**theta, "scale": jnp.exp(theta["log"])})

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), num_seeds))


def main(args):
    print(f"log likelihood of a row, {args.num_seeds} keys")
    for num_steps in (3000, 20_000):
        num_steps = min(num_steps, args.max_steps or num_steps)
        for name, rate in (("a constant rate", 1e-2), ("a rate that falls", optax.cosine_decay_schedule(1e-2, num_steps))):
            optims = optax.adam(rate), optax.adam(2e-2)
            engines = {
                "BiSM": BiSM(machine, bits, *optims, DENOISING, batch_size=100),
                "its bits summed out": ScoreMatching(summed, optims[0], DENOISING, batch_size=100),
            }
            for engine_name, engine in engines.items():
                states = trained(engine, num_steps, args.num_seeds, OF_BITS)
                found = jax.vmap(lambda state, engine=engine: log_likelihood(engine.get_params(state)))(states)
                print(f"{num_steps} steps, {name:<18} {engine_name:<20} {found.round(2)}", flush=True)
        found = by_likelihood(num_steps, args.num_seeds, optims[0])
        print(f"{num_steps} steps, {name:<18} {'maximum likelihood':<20} {found.round(2)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    if args.smoke:
        args.num_seeds, args.max_steps = 2, 2
    _timing.use_one_core()
    main(args)
