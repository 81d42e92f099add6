# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How much weight a learned density gives to its modes, by how its negative chains move.

Local moves do not cross between modes. Chains that make no others keep the weights that they have, and look right whatever the
density is that they teach; that is judged here by quadrature or enumeration, and beside it stands what the chains show. The columns
are seeds, density / chains; the error is the largest of all seeds from the weight of the maximum-likelihood density on the same
data (of the true latents for ``hierarchical``); the cost is in CPU seconds of a fit, compilation and all.

* ``quickstart``: the README's, a latent with two modes, seen with little noise, under a tilt by a network;
* ``hierarchical``: 30 groups with effects of two kinds, a slope and a scale of the noise;
* ``T1``, ``T2``: two wells of one parameter, which the data tell at once, with a low and a high barrier between them;
* ``field``: T2 as a random field, which has no reference to jump to and no weights;
* ``rbm``: 16 bits in two patterns, moved by block Gibbs, which has no jumps;
* ``posterior``: T2 as a latent, seen with so much noise that both modes are possible, by particles: what must cross is not the
  chains but they, and the second number of a column is theirs.

Run ``python benchmarks/mode_weights.py``: about a quarter of an hour of one core; ``--only quickstart,T2`` for some.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.scipy.special import logsumexp
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, autoguide
from scipy.optimize import minimize_scalar

from numpyro_ebm import MALA, BaseMeasure, BernoulliRBM, BlockGibbs, ParticleMMLE, TiltedDistribution, Weighted, negative_phase

WEIGHTS = Weighted(resample_below=0.5, num_monitor_chains=200)
CHAINS = {
    "no jumps": {"sampler": MALA(num_jumps=0)},
    "default": {},
    "3 jumps": {"sampler": MALA(num_jumps=3)},
    "weights": {"sampler": MALA(num_jumps=0), "weights": WEIGHTS},
    "weights and jumps": {"weights": WEIGHTS},
}
FIELD_CHAINS = {name: CHAINS[name] for name in ("no jumps", "default")}
RBM_CHAINS = {
    "1 sweep": {"sampler": BlockGibbs(1)},
    "10 sweeps": {"sampler": BlockGibbs(10)},
    "1 sweep, weights": {"sampler": BlockGibbs(1), "weights": WEIGHTS},
}
PARTICLES = {
    "unadjusted": {"step_size": 0.01},
    "adjusted, no jumps": {"kernel": "mala", "num_jumps": 0},
    "adjusted, default": {"kernel": "mala"},
}
NETWORK = eqx.nn.MLP("scalar", "scalar", 32, 2, jax.nn.silu, key=jax.random.key(1))
GRID = jnp.linspace(-8, 8, 3201)


class Problem(NamedTuple):
    """A model, its data, and how to judge what is learned."""

    model: Callable[..., Any]
    data: Any
    weight: Callable[[dict[str, Any]], float]  # of the upper mode, under the learned density
    of_chains: Callable[[Any], float]  # of the upper mode, among the chains
    wanted: float
    chains: dict[str, dict[str, Any]]
    site: str
    optim: Any
    num_steps: int
    num_chains: int = 1000


def _upper(z):
    return float((z > 0).mean())


def _above(log_density):
    return float(jax.nn.softmax(log_density)[GRID > 0].sum())


def _of_network(params):
    energy = eqx.combine(params["energy$params"], NETWORK)
    return _above(_log_tilted(energy))


def _log_tilted(energy):
    return dist.Normal(0, 1).log_prob(GRID) - jax.vmap(energy)(GRID)


def quickstart():
    mode, spread, noise = jax.random.normal(jax.random.key(0), (3, 1000))
    latent = 1.5 * jnp.sign(mode) + 0.3 * spread
    y = latent + 0.2 * noise

    def model(y):
        energy = eqx_module("energy", NETWORK)
        with numpyro.plate("data", 1000):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), energy))
            numpyro.sample("y", dist.Normal(z, 0.2), obs=y)

    seen = dist.Normal(GRID, 0.2).log_prob(y[:, None])

    def loss(arrays):  # of maximum likelihood, by quadrature
        log_density = _log_tilted(eqx.combine(arrays, NETWORK))
        return logsumexp(log_density) - logsumexp(log_density + seen, axis=1).mean()

    arrays, optim = eqx.filter(NETWORK, eqx.is_array), optax.adam(optax.linear_schedule(5e-3, 0.0, 3000))

    def step(carry, _):
        arrays, state = carry
        updates, state = optim.update(jax.grad(loss)(arrays), state)
        return (optax.apply_updates(arrays, updates), state), None

    (arrays, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3000))((arrays, optim.init(arrays)))
    best = _of_network({"energy$params": arrays})
    return Problem(model, y, _of_network, _upper, best, CHAINS, "z", optax.adam(5e-3), 1500)


def hierarchical():
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

    return Problem(model, y, _of_network, _upper, float(kind.mean()), CHAINS, "z", optax.adam(5e-3), 1500)


def _wells(height, tilt, x):
    return height * (x**2 - 4) ** 2 / 8 - tilt * x


def _log_wells(height, tilt):
    return dist.Normal(0, 2).log_prob(GRID) - _wells(height, tilt, GRID)


def _two_wells(height, as_field):
    cells = np.asarray(jax.nn.softmax(_log_wells(height, 0.5)), float)
    x = jnp.asarray(np.random.default_rng(0).choice(np.asarray(GRID), 1000, p=cells / cells.sum()))

    def energies(x):
        tilt = numpyro.param("tilt", 0.0)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", TiltedDistribution(dist.Normal(0, 2), lambda x: _wells(height, tilt, x)), obs=x)

    def field(x):
        tilt = numpyro.param("tilt", 0.0)
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", BaseMeasure(constraints.real), obs=x)
            numpyro.factor("wells", dist.Normal(0, 2).log_prob(x) - _wells(height, tilt, x))

    def weight(params):
        return _above(_log_wells(height, params["tilt"]))

    low, high = -2.0, 3.0  # the tilt of maximum likelihood has the mean of the data
    for _ in range(50):
        middle = (low + high) / 2
        mean = float((jax.nn.softmax(_log_wells(height, middle)) * GRID).sum())
        low, high = (middle, high) if mean < float(x.mean()) else (low, middle)
    model, chains = (field, FIELD_CHAINS) if as_field else (energies, CHAINS)
    rate = optax.sgd(optax.linear_schedule(0.05, 0.0, 600))
    return Problem(model, x, weight, _upper, weight({"tilt": low}), chains, "x", _per_row(rate, len(x)), 600)


def _per_row(optim, num_rows):
    """An optimizer of the mean over rows."""
    return optax.chain(optax.scale(1 / num_rows), optim)


def rbm():
    rng = np.random.default_rng(0)
    pattern = (rng.random(1000) < 0.7)[:, None] == (np.arange(16) < 8)
    v = jnp.asarray((pattern ^ (rng.random((1000, 16)) < 0.05)).astype(np.float32))
    every = jnp.asarray((np.arange(2**16)[:, None] >> np.arange(16)) & 1, jnp.float32)
    is_upper = every[:, :8].sum(1) > every[:, 8:].sum(1)

    def distribution(params):
        return BernoulliRBM(params["W"], params["b"], params["c"])

    def model(v):
        start = {"W": 0.01 * jax.random.normal(jax.random.key(5), (16, 6)), "b": jnp.log(v.mean(0) / (1 - v.mean(0)))}
        params = {name: numpyro.param(name, value) for name, value in (start | {"c": jnp.zeros(6)}).items()}
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", distribution(params), obs=v)

    @jax.jit
    def cells(params):
        return jax.nn.softmax(distribution(params).log_prob(every))

    def weight(params):
        return float(cells(params)[is_upper].sum())

    def of_chains(v):
        return float((v[:, :8].sum(1) > v[:, 8:].sum(1)).mean())

    wanted = of_chains(v)  # a likelihood that has the patterns at all has their weights, to a hundredth
    optim = _per_row(optax.sgd(0.05), len(v))
    return Problem(model, v, weight, of_chains, wanted, RBM_CHAINS, "v", optim, 3000, 200)


def posterior():
    rng = np.random.default_rng(0)
    cells = np.asarray(jax.nn.softmax(_log_wells(3.0, 0.2)), float)
    y = rng.choice(np.asarray(GRID), 500, p=cells / cells.sum()) + 2.0 * rng.normal(size=500)
    likelihood = np.exp(-((y[:, None] - np.asarray(GRID)) ** 2) / 8)

    def model(y):
        tilt = numpyro.param("tilt", 0.0)
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 2), lambda z: _wells(3.0, tilt, z)))
            numpyro.sample("y", dist.Normal(z, 2.0), obs=y)

    def weight(params):
        return _above(_log_wells(3.0, params["tilt"]))

    def loss(tilt):  # of maximum likelihood, by quadrature
        return -float(np.log(likelihood @ np.asarray(jax.nn.softmax(_log_wells(3.0, tilt)), float)).sum())

    best = weight({"tilt": minimize_scalar(loss, bounds=(-2, 2), method="bounded").x})
    return Problem(model, jnp.asarray(y, jnp.float32), weight, _upper, best, PARTICLES, "z", optax.adam(0.01), 1500)


PROBLEMS = {
    "quickstart": quickstart,
    "hierarchical": hierarchical,
    "T1": lambda: _two_wells(1.0, False),
    "T2": lambda: _two_wells(3.0, False),
    "field": lambda: _two_wells(3.0, True),
    "rbm": rbm,
    "posterior": posterior,
}


def by_svi(problem, has_latents, settings, key, num_steps):
    """A fit, and its chains."""
    phase = negative_phase(problem.model, num_chains=problem.num_chains, **settings)
    guide = autoguide.AutoNormal(phase) if has_latents else lambda data: None
    svi = SVI(phase, guide, problem.optim, Trace_ELBO())
    result = svi.run(key, num_steps, problem.data, progress_bar=False)
    kept = phase.sample_chains(jax.random.key(0), result.params, result, 1, problem.data)[0]
    return result.params, kept[problem.site].reshape(-1, *problem.data.shape[1:])


def by_particles(problem, settings, key, num_steps):
    """A fit, and its particles."""
    phase = negative_phase(problem.model, num_chains=problem.num_chains)
    engine = ParticleMMLE(phase, problem.optim, num_particles=20, average_iterates=True, **settings)
    result = engine.run(key, num_steps, problem.data, progress_bar=False, report=False)
    return result.params, result.state.particles[problem.site]


def main(args):
    for name in args.only:
        problem = PROBLEMS[name]()
        print(f"{name}: {problem.wanted:.3f} of the weight is in the upper mode; density / chains", flush=True)
        for words, settings in problem.chains.items():
            found, seconds = [], []
            for seed in range(2, 2 + args.num_seeds):
                begin, key = time.process_time(), jax.random.key(seed)
                num_steps = args.num_steps or problem.num_steps
                if problem.chains is PARTICLES:
                    params, chains = by_particles(problem, settings, key, num_steps)
                else:
                    params, chains = by_svi(problem, name in ("quickstart", "hierarchical"), settings, key, num_steps)
                jax.block_until_ready((params, chains))
                seconds.append(time.process_time() - begin)
                jax.clear_caches()  # every fit compiles anew, and what it has compiled fills the memory
                found.append((problem.weight(params), problem.of_chains(chains)))
            columns = "  ".join(f"{density:.3f} / {chains:.3f}" for density, chains in found)
            worst = max(abs(density - problem.wanted) for density, _ in found)
            print(f"  {words:<20}{columns}   error {worst:.3f}   {np.median(seconds):.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PROBLEMS))
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps, args.num_seeds = 2, 1
    main(args)
