# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the score engines learn as they come, and with other settings, on a model whose maximum likelihood is known.

Factor analysis with one noise scale, 5 visibles and 2 latents (probabilistic principal components): the maximum of the likelihood
is in closed form. For every engine, objective and guide the script prints how many nats per row the learned model lies below it on
the data. The first line of an objective says how far below its own optimum lies: that of the marginal model, learned by
``ScoreMatching``. Guides are

* ``full``: the posterior is among them (a linear mean, one covariance),
* ``mean-field``: a linear mean, one diagonal covariance,
* ``blind``: it does not see the row.

Run ``python benchmarks/defaults.py``: about half an hour of one core; ``--only`` selects by words of a line.
"""

import argparse
import warnings

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints

from numpyro_ebm import (
    BiSM,
    DenoisingScoreMatching,
    ExactScoreMatching,
    Implicit,
    ImportanceWeighted,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
    VaGES,
    Variational,
)

VISIBLE, LATENT, ROWS, BATCH = 5, 2, 2000, 200
OBJECTIVES = {"exact": ExactScoreMatching(), "sliced": SlicedScoreMatching(), "denoising .3": DenoisingScoreMatching(0.3)}
ENGINES = {
    "BiSM unrolled N=5": (BiSM, {"hypergradient": Unrolled()}),
    "BiSM implicit": (BiSM, {"hypergradient": Implicit()}),
    "BiSM implicit fisher": (BiSM, {"hypergradient": Implicit(curvature="fisher", num_cg_steps=3, num_draws=2)}),
    "VaGES variational L=2": (VaGES, {"estimate": Variational()}),
    "VaGES weighted L=2": (VaGES, {"estimate": ImportanceWeighted(2)}),
    "VaGES weighted L=10": (VaGES, {"estimate": ImportanceWeighted(10)}),
    "VaGES weighted L=10 jackknife": (VaGES, {"estimate": ImportanceWeighted(10, jackknife=True)}),
    "VaGES weighted L=30": (VaGES, {"estimate": ImportanceWeighted(30)}),
}


def make_data():
    weights = jax.random.normal(jax.random.key(1), (VISIBLE, LATENT))
    factors, noise = jax.random.normal(jax.random.key(2), (ROWS, LATENT)), jax.random.normal(jax.random.key(3), (ROWS, VISIBLE))
    return factors @ weights.T + 0.7 * noise


def params():
    start = 0.3 * jax.random.normal(jax.random.key(4), (VISIBLE, LATENT))
    return numpyro.param("A", start), jnp.exp(numpyro.param("log_noise", 0.0))


def joint(v):
    a, noise = params()
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1).expand([LATENT]).to_event(1))
        numpyro.sample("v", dist.Normal(h @ a.T, noise).to_event(1), obs=v)


def marginal(v):
    a, noise = params()
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", dist.LowRankMultivariateNormal(jnp.zeros(VISIBLE), a, noise**2 * jnp.ones(VISIBLE)), obs=v)


def mean_field(v):
    slope, log_scale = numpyro.param("slope", jnp.zeros((LATENT, VISIBLE))), numpyro.param("log_scale", jnp.zeros(LATENT))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(v @ slope.T, jnp.exp(log_scale)).to_event(1))


def full(v):
    slope = numpyro.param("slope", jnp.zeros((LATENT, VISIBLE)))
    scale = numpyro.param("scale", jnp.eye(LATENT), constraint=constraints.lower_cholesky)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.MultivariateNormal(v @ slope.T, scale_tril=scale))


def blind(v):
    shift, log_scale = numpyro.param("shift", jnp.zeros(LATENT)), numpyro.param("log_scale", jnp.zeros(LATENT))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(shift, jnp.exp(log_scale)).to_event(1))


def log_likelihood(a, noise, v):
    covariance = a @ a.T + noise**2 * jnp.eye(VISIBLE)
    return float(dist.MultivariateNormal(0, covariance).log_prob(v).mean())


def best(v):
    """The maximum of the log-likelihood, of which the mean is 0: the largest eigenvalues, and the mean of the others."""
    values, vectors = jnp.linalg.eigh(v.T @ v / len(v))
    noise = values[:-LATENT].mean()
    return log_likelihood(vectors[:, -LATENT:] * jnp.sqrt(values[-LATENT:] - noise), jnp.sqrt(noise), v)


def main(args):
    v = make_data()
    top, num_steps = best(v), args.num_steps
    optim, guide_optim = optax.adam(optax.cosine_decay_schedule(0.02, num_steps)), optax.adam(0.01)

    def show(line, run):
        if not all(word in line for word in args.only):
            return
        found = []
        for seed in range(args.num_seeds):
            try:
                with warnings.catch_warnings(action="ignore"):
                    learned = run(jax.random.key(5 + seed)).params
                a, noise = learned["A"], jnp.exp(learned["log_noise"])
                is_density = bool(jnp.isfinite(a).all() and noise > 1e-3)
                found.append(f"{top - log_likelihood(a, noise, v):8.4f}" if is_density else "collapsed")
            except RuntimeError as error:  # a fit that stops says so
                found.append(f"stopped: {str(error)[:60]}")
        print(f"{line:<55}{'  '.join(found)}", flush=True)

    for name, objective in OBJECTIVES.items():
        engine = ScoreMatching(marginal, optim, objective, batch_size=BATCH)
        show(f"{name}, its own optimum", lambda key, engine=engine: engine.run(key, num_steps, v, progress_bar=False))
        for guide in (full, mean_field, blind):
            for words, (make, settings) in ENGINES.items():
                engine = make(joint, guide, optim, guide_optim, objective, batch_size=BATCH, **settings)
                line = f"{name}, {guide.__name__.replace('_', '-')}, {words}"
                show(line, lambda key, engine=engine: engine.run(key, num_steps, v, progress_bar=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=2500)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="words that a line must have")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a few lines, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps, args.only = 2, ["denoising", "full"]
    main(args)
