# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the precision of a network does to what is learned, on the README's quickstart, whose likelihood is known by quadrature.

A latent with two modes, seen with little noise, under a normal prior tilted by a network. Each row is a precision, learned by
``SVI(negative_phase)`` and by ``ParticleMMLE`` with adjusted moves:

* ``float32``, ``float64``: everything (``jax_enable_x64``);
* ``bfloat16 hidden``: weights and latents are converted where they enter the network, and back before its last layer;
* ``bfloat16 network``: the last layer too, so that energies are rounded, of which the package warns;
* ``bfloat16 weights``: the parameters themselves, of which engines warn.

The error is the mean log likelihood per datum below that of maximum likelihood with the same network, in thousandths of a nat, by
seed; the upper mode's weight stands beside it. Cost: CPU seconds per step, compilation and all, and kilobytes of the state. Run
``python benchmarks/precision.py``: about ten minutes of one core.
"""

import argparse
import time
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.scipy.special import logsumexp
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO, autoguide

from numpyro_ebm import ParticleMMLE, TiltedDistribution, negative_phase

warnings.filterwarnings("ignore", "(energy of|param) .* is of bfloat16")  # which is what is measured
NOISE, ADAM = 0.2, optax.adam(5e-3)


class Network(eqx.Module):
    """An energy of one latent, with hidden layers of one dtype and a last layer of another."""

    hidden: list[eqx.nn.Linear]
    last: eqx.nn.Linear
    dtypes: tuple[Any, Any] = eqx.field(static=True)

    def __init__(self, hidden: Any, last: Any, weights: Any):
        keys, sizes = jax.random.split(jax.random.key(1), 3), (("scalar", 32), (32, 32), (32, "scalar"))
        layers = [eqx.nn.Linear(*size, dtype=jnp.float32, key=key) for size, key in zip(sizes, keys, strict=True)]
        *self.hidden, self.last = converted(layers, weights)  # the same weights in every row
        self.dtypes = hidden, last

    def __call__(self, z):
        hidden, last = self.dtypes
        x = z.astype(hidden)
        for layer in converted(self.hidden, hidden):
            x = jax.nn.silu(layer(x))
        return converted(self.last, last)(x.astype(last))


def converted(layers, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, layers)


PRECISIONS = {
    "float32": (jnp.float32, jnp.float32, jnp.float32),
    "float64": (jnp.float64, jnp.float64, jnp.float64),
    "bfloat16 hidden": (jnp.bfloat16, jnp.float32, jnp.float32),
    "bfloat16 network": (jnp.bfloat16, jnp.bfloat16, jnp.float32),
    "bfloat16 weights": (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
}


def data():
    mode, spread, noise = jax.random.normal(jax.random.key(0), (3, 1000), jnp.float32)
    return 1.5 * jnp.sign(mode) + 0.3 * spread + NOISE * noise


def model(y, network):
    energy = eqx_module("energy", network)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), energy))
        numpyro.sample("y", dist.Normal(z, NOISE), obs=y)


def by_svi(rng_key, num_steps, y, network):
    phase = negative_phase(model, num_chains=1000)
    svi = SVI(phase, autoguide.AutoNormal(phase), ADAM, Trace_ELBO())
    return svi.run(rng_key, num_steps, y, network, progress_bar=False)


def by_particles(rng_key, num_steps, y, network):
    engine = ParticleMMLE(negative_phase(model, num_chains=1000), ADAM, num_particles=10, kernel="mala")
    return engine.run(rng_key, num_steps, y, network, progress_bar=False, report=False)


ENGINES = {"SVI": by_svi, "particles": by_particles}


def tables(y):
    """The grid, and the log densities on it of the base and of each datum."""
    grid = jnp.linspace(-6, 6, 2401, dtype=jnp.float32)
    return grid, dist.Normal(0, 1).log_prob(grid), dist.Normal(grid, NOISE).log_prob(y[:, None])


def likelihood(network, table):
    """The mean log likelihood per datum, by quadrature."""
    grid, base, seen = table
    log_density = base - jax.vmap(network)(grid).astype(grid.dtype)
    return logsumexp(log_density + seen, axis=1).mean() - logsumexp(log_density)


def upper(network, table):
    grid, base, _ = table
    density = jax.nn.softmax(base - jax.vmap(network)(grid).astype(grid.dtype))
    return float(density[grid > 0].sum())


def best(table, num_steps):
    """Maximum likelihood with the same network, by quadrature."""
    network, optim = Network(*PRECISIONS["float32"]), optax.adam(optax.linear_schedule(5e-3, 0.0, num_steps))
    arrays, static = eqx.partition(network, eqx.is_inexact_array)

    def step(carry, _):
        arrays, state = carry
        gradient = jax.grad(lambda arrays: -likelihood(eqx.combine(arrays, static), table))(arrays)
        updates, state = optim.update(gradient, state)
        return (optax.apply_updates(arrays, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=num_steps)[0])
    return eqx.combine(run((arrays, optim.init(arrays)))[0], static)


def kilobytes(state):
    leaves = [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(leaf.nbytes for leaf in leaves) / 1e3


def main(args):
    y = data()
    table = tables(y)
    top = best(table, 2 if args.smoke else 3000)
    most = float(likelihood(top, table))
    print(f"maximum likelihood {most:.4f} a datum, {upper(top, table):.3f} in the upper mode; {args.num_steps} steps", flush=True)
    for name in args.only:
        with jax.enable_x64(name == "float64"):
            network = Network(*PRECISIONS[name])
            for engine, run in ENGINES.items():
                found, seconds = [], []
                for seed in range(args.num_seeds):
                    begin = time.process_time()
                    result = jax.block_until_ready(
                        run(jax.random.key(seed), args.num_steps, y.astype(network_dtype(name)), network)
                    )
                    seconds.append((time.process_time() - begin) / args.num_steps)
                    fitted = eqx.combine(result.params["energy$params"], network)
                    found.append((1e3 * (most - float(likelihood(fitted, table))), upper(fitted, table)))
                    size = kilobytes(result.state)
                    jax.clear_caches()
                errors, weights = np.array(found).T
                print(
                    f"{name:<18}{engine:<11}error {errors.mean():7.2f} ({', '.join(f'{e:.2f}' for e in errors)}); upper mode "
                    f"{weights.min():.3f} to {weights.max():.3f}; {np.median(seconds) * 1e3:.2f} ms a step; {size:.0f} kB",
                    flush=True,
                )


def network_dtype(name):
    return jnp.float64 if name == "float64" else jnp.float32


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PRECISIONS))
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps, args.num_seeds, args.only = 2, 1, ["float32", "float64", "bfloat16 hidden"]
    main(args)
