# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the score engines learn as they come, and with other settings, on models whose maximum likelihood is known.

* ``normal``: factor analysis with one noise scale, 5 visibles and 2 normal latents (probabilistic principal components); the
  maximum of the likelihood is in closed form.
* ``bits``: a Gaussian-Bernoulli restricted Boltzmann machine of 5 visibles and 2 bits, a random field; its likelihood is a sum
  over 4 states, and the maximum is found by ascent.

For every engine, objective and guide the script prints how many nats per row the learned model lies below that maximum on the
data. The first line of an objective says how far below its own optimum lies: that of the marginal model, learned by
``ScoreMatching``. Guides are

* ``full``: the posterior is among them (linear means and one covariance; linear logits),
* ``mean-field``: linear means, one diagonal covariance, where the posterior's is not diagonal,
* ``partial``: logits that see 3 of 5 visibles,
* ``blind``: it does not see the row at all.

Run ``python benchmarks/defaults.py``: about half an hour of one core; ``--only`` selects by words of a line, ``--defaults`` the
lines of the defaults.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    DenoisingScoreMatching,
    ExactScoreMatching,
    GaussianBernoulliRBM,
    GumbelBernoulli,
    Implicit,
    ImportanceWeighted,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
    VaGES,
    Variational,
)

VISIBLE, LATENT, ROWS, BATCH, NOISE = 5, 2, 2000, 200, 0.7
OBJECTIVES = {"exact": ExactScoreMatching(), "sliced": SlicedScoreMatching(), "denoising .3": DenoisingScoreMatching(0.3)}
DEFAULTS = {"BiSM": (BiSM, {}), "VaGES": (VaGES, {})}
OTHERS = {
    "BiSM unrolled N=5": (BiSM, {"hypergradient": Unrolled(5)}),
    "BiSM hessian": (BiSM, {"hypergradient": Implicit("hessian")}),
    "BiSM fisher": (BiSM, {"hypergradient": Implicit("fisher")}),
    "VaGES variational L=2": (VaGES, {"estimate": Variational(2)}),
    "VaGES weighted L=2": (VaGES, {"estimate": ImportanceWeighted(2, jackknife=False)}),
    "VaGES weighted L=10": (VaGES, {"estimate": ImportanceWeighted(10, jackknife=False)}),
    "VaGES weighted L=30": (VaGES, {"estimate": ImportanceWeighted(30, jackknife=False)}),
    "VaGES jackknife L=30": (VaGES, {"estimate": ImportanceWeighted(30, jackknife=True)}),
}


class Problem(NamedTuple):
    """A model of rows ``v`` with what is known of it."""

    v: jax.Array
    joint: Callable[..., Any]
    marginal: Callable[..., Any]
    guides: dict[str, Callable[..., Any]]
    #: of the values of the param sites, a mean over rows
    log_likelihood: Callable[[dict[str, jax.Array]], jax.Array]
    #: its maximum
    best: Callable[[], jax.Array]


# ---- Normal latents -----------------------------------------------------------------------------------------------------


def normal_latents():
    weights = jax.random.normal(jax.random.key(1), (VISIBLE, LATENT))
    factors, noise = jax.random.normal(jax.random.key(2), (ROWS, LATENT)), jax.random.normal(jax.random.key(3), (ROWS, VISIBLE))
    v = factors @ weights.T + NOISE * noise

    def params():
        start = 0.3 * jax.random.normal(jax.random.key(4), (VISIBLE, LATENT))
        return numpyro.param("weights", start), jnp.exp(numpyro.param("log_noise", 0.0))

    def joint(v):
        weights, noise = params()
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1).expand([LATENT]).to_event(1))
            numpyro.sample("v", dist.Normal(h @ weights.T, noise).to_event(1), obs=v)

    def marginal(v):
        weights, noise = params()
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.LowRankMultivariateNormal(jnp.zeros(VISIBLE), weights, noise**2 * jnp.ones(VISIBLE)), obs=v)

    def full(v):
        slope = numpyro.param("slope", jnp.zeros((LATENT, VISIBLE)))
        scale = numpyro.param("scale", jnp.eye(LATENT), constraint=constraints.lower_cholesky)
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.MultivariateNormal(v @ slope.T, scale_tril=scale))

    def mean_field(v):
        slope, log_scale = numpyro.param("slope", jnp.zeros((LATENT, VISIBLE))), numpyro.param("log_scale", jnp.zeros(LATENT))
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(v @ slope.T, jnp.exp(log_scale)).to_event(1))

    def blind(v):
        shift, log_scale = numpyro.param("shift", jnp.zeros(LATENT)), numpyro.param("log_scale", jnp.zeros(LATENT))
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(shift, jnp.exp(log_scale)).to_event(1))

    def log_likelihood(params):
        weights, noise = params["weights"], jnp.exp(params["log_noise"])
        covariance = weights @ weights.T + noise**2 * jnp.eye(VISIBLE)
        return dist.MultivariateNormal(0, covariance, validate_args=False).log_prob(v).mean()

    def best():
        """The largest eigenvalues, and the mean of the others: the model's mean is 0."""
        values, vectors = jnp.linalg.eigh(v.T @ v / len(v))
        noise = values[:-LATENT].mean()
        weights = vectors[:, -LATENT:] * jnp.sqrt(values[-LATENT:] - noise)
        return log_likelihood({"weights": weights, "log_noise": jnp.log(noise) / 2})

    return Problem(v, joint, marginal, {"full": full, "mean-field": mean_field, "blind": blind}, log_likelihood, best)


# ---- Bits ---------------------------------------------------------------------------------------------------------------


def bits():
    weights = 1.3 * jax.random.normal(jax.random.key(1), (VISIBLE, LATENT))
    shown = jax.random.bernoulli(jax.random.key(2), 0.5, (ROWS, LATENT))
    v = (shown - 0.5) @ weights.T + NOISE * jax.random.normal(jax.random.key(3), (ROWS, VISIBLE))

    start = {
        "weights": 0.3 * jax.random.normal(jax.random.key(4), (VISIBLE, LATENT)),
        "visible_bias": jnp.zeros(VISIBLE),
        "hidden_bias": jnp.zeros(LATENT),
        "log_noise": jnp.zeros(()),
    }

    def machine(params):
        noise = jnp.exp(params["log_noise"]) * jnp.ones(VISIBLE)
        return GaussianBernoulliRBM(params["weights"], params["visible_bias"], params["hidden_bias"], noise, "scaled")

    def params():
        return {name: numpyro.param(name, value) for name, value in start.items()}

    def joint(v):
        rbm = machine(params())
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", BaseMeasure(constraints.boolean, (LATENT,)))
            v = numpyro.sample("v", BaseMeasure(constraints.real, (VISIBLE,)), obs=v)
            numpyro.factor("coupling", -rbm.joint_energy(v, h))

    def marginal(v):
        rbm = machine(params())
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", rbm, obs=v)

    def seeing(num_visible):
        def guide(v):
            slope, shift = numpyro.param("slope", jnp.zeros((num_visible, LATENT))), numpyro.param("shift", jnp.zeros(LATENT))
            with numpyro.plate("data", len(v)):
                numpyro.sample("h", GumbelBernoulli(v[:, :num_visible] @ slope + shift, temperature=0.1).to_event(1))

        return guide

    def blind(v):
        shift = numpyro.param("shift", jnp.zeros(LATENT))
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", GumbelBernoulli(jnp.broadcast_to(shift, (len(v), LATENT)), temperature=0.1).to_event(1))

    def log_likelihood(params):
        rbm = machine(params)
        return -rbm.free_energy(v).mean() - rbm.log_normalizer()

    def best():
        num_steps = 3000
        optim = optax.adam(optax.cosine_decay_schedule(0.05, num_steps))

        def step(carry, _):
            params, state = carry
            updates, state = optim.update(jax.grad(lambda params: -log_likelihood(params))(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = jax.jit(lambda: jax.lax.scan(step, (start, optim.init(start)), length=num_steps)[0][0])()
        return log_likelihood(params)

    guides = {"full": seeing(VISIBLE), "partial": seeing(3), "blind": blind}
    return Problem(v, joint, marginal, guides, log_likelihood, best)


# ---- The table ----------------------------------------------------------------------------------------------------------


def main(args):
    num_steps = args.num_steps
    optim, guide_optim = optax.adam(optax.cosine_decay_schedule(0.02, num_steps)), optax.adam(0.01)
    engines = DEFAULTS if args.defaults else {**DEFAULTS, **OTHERS}
    for kind, make_problem in {"normal": normal_latents, "bits": bits}.items():
        problem = make_problem()
        top = float(problem.best())

        def show(words, engine, problem=problem, top=top):
            line = ", ".join(words)
            if not all(word in line for word in args.only):
                return
            found = [f"{below(engine, jax.random.key(5 + seed), problem, top):8.4f}" for seed in range(args.num_seeds)]
            print(f"{line:<55}{'  '.join(found)}", flush=True)

        def below(engine, rng_key, problem, top):
            """Nats per row; nan where the run stopped, or the model is none any more."""
            try:
                with warnings.catch_warnings(action="ignore"):
                    return top - float(problem.log_likelihood(engine.run(rng_key, num_steps, problem.v, progress_bar=False).params))
            except RuntimeError:
                return float("nan")

        for name, objective in OBJECTIVES.items():
            show((kind, name, "its own optimum"), ScoreMatching(problem.marginal, optim, objective, batch_size=BATCH))
            for guide_name, guide in problem.guides.items():
                for words, (make, settings) in engines.items():
                    engine = make(problem.joint, guide, optim, guide_optim, objective, batch_size=BATCH, **settings)
                    show((kind, name, guide_name, words), engine)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=2500)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="words that a line must have")
    parser.add_argument("--defaults", action="store_true", help="the engines as they come alone")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a few lines, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps, args.only = 2, ["denoising", "full"]
    main(args)
