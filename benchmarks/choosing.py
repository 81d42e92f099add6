# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Every engine on the same data: how far below the exact maximum likelihood it ends, and what it costs.

The data are 2000 rows of 5 visibles, with 2 normal latents behind them. Every model has the density of factor analysis with one
noise scale, whose maximum likelihood is in closed form, and leaves its normalizer out:

* ``latents``: a random field of visibles and latents, ``exp(-|h|^2 / 2 - |v - W h|^2 / (2 s^2)) / Z``;
* ``visibles``: the energy of the visibles alone, with the latents summed out by hand.

A model's density is judged by its closed form, on the data. The guide has linear means and one covariance matrix, as the exact
posterior has. CPU seconds are those of a whole call of ``run`` in a fresh process without a compilation cache, and of a step.
Run ``python benchmarks/choosing.py``; it takes about five minutes.
"""

import argparse
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from defaults import BATCH, LATENT, ROWS, VISIBLE, normal_latents
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import (
    BaseMeasure,
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ParticleMMLE,
    ScoreMatching,
    SlicedScoreMatching,
    VaGES,
    negative_phase,
)

NUM_CHAINS = 500


def params():
    start = 0.3 * jax.random.normal(jax.random.key(4), (VISIBLE, LATENT))
    return numpyro.param("weights", start), jnp.exp(numpyro.param("log_noise", 0.0))


def field(v):
    weights, noise = params()
    with numpyro.plate("data", ROWS, subsample_size=BATCH):
        v = numpyro.subsample(v, event_dim=1)
        h = numpyro.sample("h", BaseMeasure(constraints.real, (LATENT,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (VISIBLE,)), obs=v)
        numpyro.factor("coupling", -(h**2).sum(-1) / 2 - ((v - h @ weights.T) ** 2).sum(-1) / (2 * noise**2))


def visibles(v):
    weights, noise = params()
    precision = jnp.linalg.inv(weights @ weights.T + noise**2 * jnp.eye(VISIBLE))
    with numpyro.plate("data", ROWS, subsample_size=BATCH):
        v = numpyro.subsample(v, event_dim=1)
        start = dist.Normal(0, 1).expand([VISIBLE]).to_event(1)
        numpyro.sample("v", EnergyDistribution(lambda v: v @ precision @ v / 2, (VISIBLE,), initial=start), obs=v)


def guide(v):
    slope = numpyro.param("slope", jnp.zeros((LATENT, VISIBLE)))
    scale = numpyro.param("scale", jnp.eye(LATENT), constraint=constraints.lower_cholesky)
    with numpyro.plate("data", ROWS, subsample_size=BATCH):
        v = numpyro.subsample(v, event_dim=1)
        numpyro.sample("h", dist.MultivariateNormal(v @ slope.T, scale_tril=scale))


def generator(v):
    weights, noise = numpyro.param("decoder", 0.3 * jnp.ones((VISIBLE, LATENT))), jnp.exp(numpyro.param("decoder_noise", 0.0))
    with numpyro.plate("data", ROWS, subsample_size=BATCH):
        v = numpyro.subsample(v, event_dim=1)
        h = numpyro.sample("h", dist.Normal(0, 1).expand([LATENT]).to_event(1))
        numpyro.sample("v", dist.Normal(h @ weights.T, noise).to_event(1), obs=v)


def no_latents(v):
    """The guide of a model without latents."""


def engines(num_steps):
    """By name: how it is made, and its number of steps."""
    optim, guide_optim = optax.adam(optax.cosine_decay_schedule(0.02, num_steps)), optax.adam(0.01)
    noisy, sliced = DenoisingScoreMatching(0.3), SlicedScoreMatching()

    def svi(model, guide):
        return SVI(negative_phase(model, num_chains=NUM_CHAINS), guide, optim, Trace_ELBO())

    return {
        "SVI, negative phase: visibles": lambda: svi(visibles, no_latents),
        "ScoreMatching, sliced: visibles": lambda: ScoreMatching(visibles, optim, sliced),
        "ScoreMatching, denoising .3: visibles": lambda: ScoreMatching(visibles, optim, noisy),
        "BiDVL: visibles": lambda: BiDVL(visibles, guide, generator, optim, guide_optim, guide_optim),
        "SVI, negative phase: latents": lambda: svi(field, guide),
        "ParticleMMLE: latents": lambda: ParticleMMLE(field, optim, num_particles=10, kernel="mala"),
        "BiSM, sliced: latents": lambda: BiSM(field, guide, optim, guide_optim, sliced),
        "BiSM, denoising .3: latents": lambda: BiSM(field, guide, optim, guide_optim, noisy),
        "VaGES, sliced: latents": lambda: VaGES(field, guide, optim, guide_optim, sliced),
        "VaGES, denoising .3: latents": lambda: VaGES(field, guide, optim, guide_optim, noisy),
    }


def measure(name, args):
    """One line: nats below the maximum for every seed, CPU seconds of the first run, and of a step."""
    problem, engine = normal_latents(), engines(args.num_steps)[name]()
    top, below, seconds = float(problem.best()), [], []
    for seed in range(args.num_seeds):
        start = time.process_time()
        settings = {} if isinstance(engine, SVI) else {"report": False}
        result = engine.run(jax.random.key(seed), args.num_steps, problem.v, progress_bar=False, **settings)
        jax.block_until_ready(result.losses)
        seconds.append(time.process_time() - start)
        below.append(top - float(problem.log_likelihood(result.params)))
    warm = min(seconds[1:], default=float("nan"))
    found = "  ".join(f"{x:7.4f}" for x in below)
    print(f"{name:<40}{found}   {seconds[0]:6.1f} s   {1e3 * warm / args.num_steps:6.2f} ms", flush=True)


def main(args):
    if args.one:
        with warnings.catch_warnings(action="ignore"):
            measure(args.one, args)
        return
    print(f"{'':<40}{'nats below maximum likelihood':<{9 * args.num_seeds}}first run   a step (CPU)", flush=True)
    for name in engines(args.num_steps):
        if all(word in name for word in args.only):
            sizes = ["--num-steps", str(args.num_steps), "--num-seeds", str(args.num_seeds)]
            subprocess.run([sys.executable, __file__, "--one", name, *sizes], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="words that an engine's line must have")
    parser.add_argument("--one", help="one line, in this process")
    parser.add_argument("--smoke", action="store_true", help="a few steps of some lines, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps, args.num_seeds, args.only = 2, 1, ["sliced"]
    main(args)
