# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What every engine costs by its ``run``, as a user calls it, over the same maths by hand in one compiled ``lax.scan``.

Both sides have the same network, the same data and as many random numbers of the same kind; the hand-written one knows nothing
of NumPyro, keeps no old state and looks at nothing's health. Runs make no report, whose cost ``report.py`` has. NumPyro's ``SVI``
has no engine of ours around it: its ``update`` under :class:`~numpyro_ebm.negative_phase` stands in a ``scan``.

* ``denoising``, ``sliced``: score matching of 128 points of a plane by an energy of two hidden layers, 128 wide.
* ``CD-20``: the same energy by ``SVI(negative_phase)``, 256 persistent chains, 20 unadjusted Langevin moves a step.
* ``particles``: ``ParticleMMLE`` of a latent energy prior: 128 images of 64 pixels, latents of 10, 4 particles, 256 chains.
* ``BiSM``, ``VaGES``: a Gaussian restricted Boltzmann machine of 560 x 400, batch 100, as in ``bism.py`` and ``vages.py``.
* ``BiDVL``: the digits of ``bidvl.py``.

CPU seconds on one core, the two sides in turn, medians of ratios. A run has as many steps as take about a second: what ``run``
does once, such as ``init``, takes some 10 ms. The first call, which compiles, is reported apart, without the compilation cache.
``losses`` are the means over the run, to see that both sides do the same. Run ``make bench``, or ``python benchmarks/engines.py
--help``.
"""

import argparse
import time
from functools import partial

import bidvl
import bism
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import vages
from _timing import use_one_core
from jax import lax
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import (
    DenoisingScoreMatching,
    ParticleMMLE,
    ScoreMatching,
    SlicedScoreMatching,
    TiltedDistribution,
    UnadjustedLangevin,
    Unrolled,
    Variational,
    negative_phase,
)

RATE, SIGMA, NUM_CHAINS, NUM_MOVES, STEP_SIZE = 1e-3, 0.3, 256, 20, 0.01
LATENT, PIXELS, NOISE, NUM_PARTICLES, PARTICLE_STEP = 10, 64, 0.25, 4, 1e-3


def mlp(key, num_in, num_out):
    return eqx.nn.MLP(num_in, num_out, 128, 2, jax.nn.silu, key=jax.random.key(key))


def points():
    return jax.random.normal(jax.random.key(3), (128, 2))


def energy_of_points(net):
    """The model of a plane's points, with the network as the energy of a tilted standard normal."""

    def model(v):
        energy = eqx_module("energy", net)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", TiltedDistribution(dist.Normal(0, 1).expand([2]).to_event(1), energy), obs=v)

    return model


def images():
    return jax.random.uniform(jax.random.key(3), (128, PIXELS))


def in_scan(update, state):
    """``num_steps`` steps from ``state`` in one compiled loop, as a function that returns their losses."""
    run = jax.jit(lambda state, num_steps: lax.scan(lambda state, _: update(state), state, None, num_steps)[1], static_argnums=1)
    return lambda num_steps: run(state, num_steps)


def in_run(engine, data):
    """The same by an engine's own ``run``."""
    return lambda num_steps: engine.run(jax.random.key(1), num_steps, data, progress_bar=False, report=False).losses


def adam_step(gradient, optim_state, params):
    updates, optim_state = optax.adam(RATE).update(gradient, optim_state)
    return optax.apply_updates(params, updates), optim_state


# Every case is a pair of functions from a number of steps to losses: by the engine, by hand.


def score_matching(objective, loss_by_hand):
    """Keys are split as the engine splits them, so that the losses are the same."""
    net, v = mlp(0, 2, "scalar"), points()
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def update(state):
        params, optim_state, key = state
        key, _, loss_key = jax.random.split(key, 3)
        noise_key, loss_key, _ = jax.random.split(loss_key, 3)

        def loss(params):
            score = jax.grad(lambda v: log_prior(eqx.combine(params, static), v).sum())
            return loss_by_hand(score, v, noise_key, loss_key).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return (*adam_step(gradient, optim_state, params), key), value

    engine = ScoreMatching(energy_of_points(net), optax.adam(RATE), objective)
    return in_run(engine, v), in_scan(update, (params, optax.adam(RATE).init(params), jax.random.key(1)))


def denoising():
    def loss(score, v, noise_key, loss_key):
        x = v + SIGMA * jax.random.normal(noise_key, v.shape)
        return ((score(x) + (x - v) / SIGMA**2) ** 2).sum(-1) / 2

    return score_matching(DenoisingScoreMatching(SIGMA), loss)


def sliced():
    def loss(score, v, noise_key, loss_key):
        u = jax.random.rademacher(loss_key, v.shape, v.dtype)
        s, slope = jax.jvp(score, (v,), (u,))
        return (s**2).sum(-1) / 2 + (u * slope).sum(-1)

    return score_matching(SlicedScoreMatching(), loss)


def log_prior(energy, z):
    """The log density of a standard normal tilted by an energy, by row."""
    return -(z**2 + jnp.log(2 * jnp.pi)).sum(-1) / 2 - jax.vmap(energy)(z)


def unadjusted(energy, x, key):
    """Chains after their moves; nothing is differentiated through them."""
    score = jax.grad(lambda x: log_prior(energy, x).sum())

    def move(x, key):
        return x + STEP_SIZE * score(x) + jnp.sqrt(2 * STEP_SIZE) * jax.random.normal(key, x.shape), None

    return lax.scan(move, x, jax.random.split(key, NUM_MOVES))[0]


def contrastive_divergence():
    net, v = mlp(0, 2, "scalar"), points()
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def update(state):
        params, optim_state, chains, key = state
        key, chain_key = jax.random.split(key)
        chains = unadjusted(eqx.combine(params, static), chains, chain_key)

        def loss(params):
            energy = eqx.combine(params, static)
            negative = log_prior(energy, chains).mean()
            return -(log_prior(energy, v) - (negative - lax.stop_gradient(negative))).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        return (*adam_step(gradient, optim_state, params), chains, key), value

    phase = negative_phase(energy_of_points(net), num_chains=NUM_CHAINS, sampler=UnadjustedLangevin(STEP_SIZE, NUM_MOVES))
    svi = SVI(phase, lambda v: None, optax.adam(RATE), Trace_ELBO())
    chains = jax.random.normal(jax.random.key(2), (NUM_CHAINS, 2))
    by_svi = in_scan(lambda state: svi.update(state, v), svi.init(jax.random.key(1), v))
    return by_svi, in_scan(update, (params, optax.adam(RATE).init(params), chains, jax.random.key(1)))


def particles():
    nets, y = {"energy": mlp(0, LATENT, "scalar"), "decoder": mlp(1, LATENT, PIXELS)}, images()
    params, static = eqx.partition(nets, eqx.is_inexact_array)

    def model(y):
        energy, decoder = eqx_module("energy", nets["energy"]), eqx_module("decoder", nets["decoder"])
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1).expand([LATENT]).to_event(1), energy))
            numpyro.sample("y", dist.Normal(jax.vmap(decoder)(z), NOISE).to_event(1), obs=y)

    def log_joint(params, z):
        nets = eqx.combine(params, static)
        error = ((y - jax.vmap(nets["decoder"])(z)) / NOISE) ** 2 + jnp.log(2 * jnp.pi * NOISE**2)
        return log_prior(nets["energy"], z).sum() - error.sum() / 2

    def update(state):
        params, optim_state, z, chains, key = state
        key, noise_key, chain_key = jax.random.split(key, 3)
        log_joints = lambda params, z: jax.vmap(log_joint, (None, 0))(params, z).sum()  # noqa: E731
        value, (gradient, score) = jax.value_and_grad(log_joints, (0, 1))(params, z)
        chains = unadjusted(eqx.combine(params, static)["energy"], chains, chain_key)
        negative = jax.grad(lambda params: log_prior(eqx.combine(params, static)["energy"], chains).mean())(params)
        gradient = jax.tree.map(lambda g, n: len(y) * n - g / NUM_PARTICLES, gradient, negative)
        params, optim_state = adam_step(gradient, optim_state, params)
        z = z + PARTICLE_STEP * score + jnp.sqrt(2 * PARTICLE_STEP) * jax.random.normal(noise_key, z.shape)
        return (params, optim_state, z, chains, key), -value / NUM_PARTICLES

    phase = negative_phase(model, num_chains=NUM_CHAINS, sampler=UnadjustedLangevin(STEP_SIZE, NUM_MOVES))
    engine = ParticleMMLE(phase, optax.adam(RATE), NUM_PARTICLES, PARTICLE_STEP)
    z, chains = (jax.random.normal(jax.random.key(2), (*size, LATENT)) for size in ((NUM_PARTICLES, len(y)), (NUM_CHAINS,)))
    return in_run(engine, y), in_scan(update, (params, optax.adam(RATE).init(params), z, chains, jax.random.key(1)))


def boltzmann_machine(benchmark, setting, by_hand, args):
    """With five steps of the guide to one of the model."""
    v = jax.random.uniform(jax.random.key(3), (100, args.num_visible))
    state, update = benchmark.by_hand(v, args.num_hidden, 5, by_hand)
    return in_run(benchmark.make_engine(args.num_visible, args.num_hidden, 5, setting), v), in_scan(update, state)


def divergence_triangle(args):
    v = jax.random.normal(jax.random.key(3), (args.batch_size, bidvl.NUM_VISIBLE))
    state, update = bidvl.by_hand(v, args, "exact")
    return in_run(bidvl.make_engine(args, "exact"), v), in_scan(lambda state: (lambda s, loss: (s, loss[0]))(*update(state)), state)


def timed(run, num_steps):
    """CPU seconds of one call, and its losses."""
    start = time.process_time()
    losses = jax.block_until_ready(run(num_steps))
    return time.process_time() - start, losses


def compare(title, runs, num_steps, repeats):
    """Prints the ratio of two ways to make the same steps, and that of their first calls but for the steps."""
    first = np.array([timed(run, num_steps)[0] for run in runs])
    timed_runs = [[timed(run, num_steps) for run in runs] for _ in range(repeats)]
    times = np.array([[seconds for seconds, _ in row] for row in timed_runs])
    ours, hand = np.median(times, 0) / num_steps * 1e3
    ratios = times[:, 0] / times[:, 1]
    ours_first, hand_first = first - np.median(times, 0)
    losses = [float(losses.mean()) for _, losses in timed_runs[-1]]
    print(
        f"{title:<14}{np.median(ratios):7.3f} (from {ratios.min():.3f} to {ratios.max():.3f}); {ours:8.3f} against {hand:8.3f} ms; "
        f"compilation {ours_first / hand_first:5.2f}: {ours_first:5.2f} against {hand_first:5.2f} s; "
        f"losses {losses[0]:.4g} and {losses[1]:.4g}",
        flush=True,
    )


def main(args):
    use_one_core()
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"device {jax.devices()[0].device_kind}; CPU seconds, medians of {args.repeats} rounds")
    small, medium, large = args.num_steps, max(2, args.num_steps // 8), max(2, args.num_steps // 20)
    cases = {
        "denoising": (denoising, small),
        "sliced": (sliced, small),
        "CD-20": (contrastive_divergence, medium),
        "particles": (particles, large),
        "BiSM, N = 0": (partial(boltzmann_machine, bism, Unrolled(0), 0, args), large),
        "BiSM, N = 5": (partial(boltzmann_machine, bism, Unrolled(5), 5, args), large),
        "VaGES, L = 2": (partial(boltzmann_machine, vages, Variational(2), 2, args), large),
        "BiDVL": (partial(divergence_triangle, args), medium),
    }
    for title, (make, num_steps) in cases.items():
        if args.only in title:
            compare(title, make(), num_steps, args.repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--num-steps", type=int, default=2000, help="steps of the small networks; of the large ones an 8th or a 20th"
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds of runs")
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    parser.add_argument("--smoke", action="store_true", help="a few steps of small machines, to see that it runs")
    args = parser.parse_args()
    args.num_visible, args.num_hidden, args.width, args.energy_width, args.batch_size = 560, 400, 256, 128, 256
    if args.smoke:
        args.num_steps, args.repeats = 2, 1
        args.num_visible, args.num_hidden, args.width, args.energy_width, args.batch_size = 20, 10, 8, 8, 4
    main(args)
