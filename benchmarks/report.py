# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the report of a run costs: CPU seconds of ``diagnose`` after a fit, beside those of the fit.

The first report of an engine compiles (cold), later ones do not (warm). Engines are ``ParticleMMLE`` with an energy prior of one,
two and 64 dimensions, ``SVI`` with one and a guide, ``ScoreMatching`` of an energy of two, ``BiSM`` and ``VaGES``.

Run ``python benchmarks/report.py``: about three minutes of one core.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import _timing
import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import (
    BiSM,
    DenoisingScoreMatching,
    Implicit,
    ImportanceWeighted,
    ParticleMMLE,
    ScoreMatching,
    TiltedDistribution,
    VaGES,
    diagnose,
    negative_phase,
)

ROWS, BATCH = 1000, 200


def energy_prior(dim):
    network = eqx.nn.MLP(dim, "scalar", 64, 2, jax.nn.silu, key=jax.random.key(1))
    return TiltedDistribution(dist.Normal(0, 1).expand([dim]).to_event(1), eqx_module("energy", network))


def hierarchy(dim, batch_size=None):
    def model(y):
        prior = energy_prior(dim)
        with numpyro.plate("data", ROWS, subsample_size=batch_size):
            z = numpyro.sample("z", prior)
            numpyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=numpyro.subsample(y, event_dim=1))

    return model, jax.random.normal(jax.random.key(0), (ROWS, dim)) * 1.2


def particles(dim):
    model, y = hierarchy(dim, BATCH)
    return ParticleMMLE(model, optax.adam(1e-3), num_particles=4, step_size=0.05), y


def scores(dim):
    def model(x):
        energy = energy_prior(dim)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", energy, obs=x)

    y = jax.random.normal(jax.random.key(0), (ROWS, dim))
    return ScoreMatching(model, optax.adam(1e-3), DenoisingScoreMatching(0.3), batch_size=BATCH), y


def with_guide(make, visible, latent):
    y = jax.random.normal(jax.random.key(0), (ROWS, visible)) * 1.5
    start = jax.random.normal(jax.random.key(1), (visible, latent)) / latent**0.5

    def model(v):
        weights = numpyro.param("weights", start)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1).expand([latent]).to_event(1))
            numpyro.sample("v", dist.Normal(h @ weights.T, 1).to_event(1), obs=v)

    def guide(v):
        mean, log_scale = numpyro.param("mean", jnp.zeros((latent, visible))), numpyro.param("log_scale", jnp.zeros(latent))
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(v @ mean.T, jnp.exp(log_scale)).to_event(1))

    return make(model, guide, optax.adam(1e-2), optax.adam(1e-2), DenoisingScoreMatching(0.3)), y


def bism(*programs):
    return BiSM(*programs, hypergradient=Implicit(), batch_size=BATCH)


def vages(*programs):
    return VaGES(*programs, estimate=ImportanceWeighted(10), batch_size=BATCH)


def by_svi(dim):
    """``SVI`` with a guide, of the same prior."""
    model, y = hierarchy(dim)

    def guide(y):
        slope, log_scale = numpyro.param("slope", jnp.ones(dim)), numpyro.param("log_scale", jnp.zeros(dim))
        with numpyro.plate("data", len(y)):
            numpyro.sample("z", dist.Normal(slope * y, jnp.exp(log_scale)).to_event(1))

    return ByGuide(negative_phase(model), guide), y


class ByGuide(NamedTuple):
    """A fit by ``SVI``, asked for like that of an engine."""

    phase: negative_phase
    guide: Callable[..., Any]

    def run(self, rng_key, num_steps, y, **_):
        svi = SVI(self.phase, self.guide, optax.adam(1e-3), Trace_ELBO())
        return svi.run(rng_key, num_steps, y, progress_bar=False)


PROBLEMS = {
    "ParticleMMLE, prior of 1 dimension": lambda: particles(1),
    "ParticleMMLE, prior of 2 dimensions": lambda: particles(2),
    "ParticleMMLE, prior of 64 dimensions": lambda: particles(64),
    "ScoreMatching, energy of 2 dimensions": lambda: scores(2),
    "SVI with a guide, prior of 2 dimensions": lambda: by_svi(2),
    "BiSM, 5 visibles, 2 latents": lambda: with_guide(bism, 5, 2),
    "BiSM, 784 visibles, 50 latents": lambda: with_guide(bism, 784, 50),
    "VaGES, 5 visibles, 2 latents": lambda: with_guide(vages, 5, 2),
    "VaGES, 784 visibles, 50 latents": lambda: with_guide(vages, 784, 50),
}


def cpu_seconds(function):
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def main(args):
    print(f"{'CPU seconds of':<40}{'fit':>8}{'cold':>8}{'warm':>8}{'warm / fit of a minute':>26}")
    for name, problem in PROBLEMS.items():
        engine, y = problem()
        fit, result = cpu_seconds(
            lambda engine=engine, y=y: engine.run(jax.random.key(2), args.num_steps, y, progress_bar=False, report=False)
        )
        program, more = (engine.phase, {"guide": engine.guide}) if isinstance(engine, ByGuide) else (engine, {})
        ask = partial(diagnose, result, program, y, warn=False, **more)
        times = [cpu_seconds(partial(ask, rng_key=jax.random.key(i)))[0] for i in range(3)]
        warm = min(times[1:])
        print(f"{name:<40}{fit:8.1f}{times[0]:8.2f}{warm:8.2f}{warm / 60:26.1%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps = 2
    _timing.use_one_core()
    main(args)
