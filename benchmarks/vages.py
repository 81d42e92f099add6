# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a step of ``VaGES`` costs: a Gaussian restricted Boltzmann machine of the size of the Frey faces (560 x 400), batch 100.

* ``hand``: one step over the same mathematics written by hand in JAX, no NumPyro.
* ``torch``: the same step over a plain PyTorch implementation on the CPU (``pip install torch==2.13.0``; left out without it).
* ``estimators``: one step of ``BiSM`` and of the forms of ``VaGES``, over one of ``BiSM`` with N = 0, and megabytes of
  temporary buffers; what they are worth is in ``benchmarks/vages_bias.py``.
* ``memory``: megabytes of temporary buffers against the number K of steps of the guide.

All run on one core, timed in turn. Run ``make bench``, or ``python benchmarks/vages.py --help``.
"""

import argparse

import jax
import numpy as np
import optax
from _timing import compiled, in_turn, show_ratio, timed, timed_eagerly, use_one_core
from bism import BETAS, RATE, SIGMA, TEMPERATURE, adam, energy, make_model
from bism import by_engine as bism_engine

from numpyro_ebm import DenoisingScoreMatching, ImportanceWeighted, Unrolled, VaGES, Variational


def make_engine(num_visible, num_hidden, num_inner_steps, estimate):
    model, guide = make_model(num_visible, num_hidden)
    objective = DenoisingScoreMatching(SIGMA)
    return VaGES(model, guide, adam(), adam(), objective, num_inner_steps=num_inner_steps, estimate=estimate)


def by_engine(v, *settings):
    """A state, and the engine's step as a function of it."""
    engine = make_engine(v.shape[1], *settings)
    return engine.init(jax.random.key(1), v), lambda state: engine.update(state, v)


def by_hand(v, num_hidden, num_inner_steps, num_samples):
    def noised(key):
        return v + SIGMA * jax.random.normal(key, v.shape)

    def log_p(theta, x, h):
        return -energy(theta["W"], theta["b"], theta["c"], theta["log_scale"], x, h)

    def lower(theta, phi, key):
        noise_key, draw_key = jax.random.split(key)
        x = noised(noise_key)
        logits = x @ phi["A"] + phi["a"]
        h = jax.nn.sigmoid((logits + jax.random.logistic(draw_key, logits.shape)) / TEMPERATURE)
        return ((h * logits - jax.nn.softplus(logits)).sum(-1) - log_p(theta, x, h)).mean()

    def upper(theta, phi, key):
        noise_key, draw_key = jax.random.split(key)
        x = noised(noise_key)
        logits = x @ phi["A"] + phi["a"]
        h = jax.random.bernoulli(draw_key, jax.nn.sigmoid(logits), (3 * num_samples, *logits.shape)).astype(x.dtype)
        for_value, for_mean, for_covariance = h.reshape(3, num_samples, *logits.shape)

        def scores(h):
            return jax.vmap(jax.grad(lambda x, h: log_p(theta, x, h).sum()), (None, 0))(x, h)

        residual = scores(for_value).mean(0) + (x - v) / SIGMA**2
        z = jax.lax.stop_gradient(residual)
        along = jax.lax.stop_gradient((z * scores(for_covariance)).sum(-1))
        rows = jax.vmap(lambda h: log_p(theta, x, h))(for_covariance)
        covariance = ((along - along.mean(0)) * rows).sum(0) / (num_samples - 1)
        surrogate = ((z * scores(for_mean).mean(0)).sum(-1) + covariance).mean()
        value = (z**2).sum(-1).mean() / 2
        return value + surrogate - jax.lax.stop_gradient(surrogate)

    def update(state):
        theta, phi, of_theta, of_phi, key = state
        key, inner_key, upper_key = jax.random.split(key, 3)

        def step(carry, key):
            phi, optim_state = carry
            updates, optim_state = adam().update(jax.grad(lower, 1)(theta, phi, key), optim_state)
            return (optax.apply_updates(phi, updates), optim_state), None

        (phi, of_phi), _ = jax.lax.scan(step, (phi, of_phi), jax.random.split(inner_key, num_inner_steps))
        value, gradient = jax.value_and_grad(upper)(theta, phi, upper_key)
        updates, of_theta = adam().update(gradient, of_theta)
        return (optax.apply_updates(theta, updates), phi, of_theta, of_phi, key), value

    state, _ = by_engine(v, num_hidden, num_inner_steps, Variational(num_samples))
    return (state.theta, state.phi, adam().init(state.theta), adam().init(state.phi), jax.random.key(1)), update


def by_torch(v, num_hidden, num_inner_steps, num_samples):
    """A function that makes one step of a plain PyTorch implementation, or None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    v = torch.tensor(np.asarray(v))
    num_visible = v.shape[1]

    def uniform(shape, fan_in):
        return (2 * torch.rand(shape) - 1) * fan_in**-0.5

    W, b, c = uniform((num_visible, num_hidden), num_hidden), torch.zeros(num_visible), torch.zeros(num_hidden)
    theta = [x.requires_grad_() for x in (W, b, c, torch.zeros(num_visible))]
    phi = [x.requires_grad_() for x in (uniform((num_visible, num_hidden), num_visible), torch.zeros(num_hidden))]
    optim, guide_optim = torch.optim.Adam(theta, RATE, BETAS), torch.optim.Adam(phi, RATE, BETAS)

    def log_p(x, h):
        W, b, c, log_scale = theta
        return -(((x - b) * torch.exp(-log_scale)) ** 2).sum(-1) / 2 + h @ c + ((x @ W) * h).sum(-1)

    def lower_step():
        x = v + SIGMA * torch.randn_like(v)
        logits = x @ phi[0] + phi[1]
        u = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
        h = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / TEMPERATURE)
        loss = ((h * logits - torch.nn.functional.softplus(logits)).sum(-1) - log_p(x, h)).mean()
        guide_optim.zero_grad()
        loss.backward(inputs=phi)
        guide_optim.step()

    def step():
        for _ in range(num_inner_steps):
            lower_step()
        x = (v + SIGMA * torch.randn_like(v)).requires_grad_()
        with torch.no_grad():
            h = torch.bernoulli(torch.sigmoid(x @ phi[0] + phi[1]).expand(3 * num_samples, -1, -1))
        for_value, for_mean, for_covariance = h.reshape(3, num_samples, *h.shape[1:])

        def mean_score(h, create_graph):
            return torch.autograd.grad(log_p(x, h).mean(0).sum(), x, create_graph=create_graph)[0]

        z = (mean_score(for_value, False) + (x - v) / SIGMA**2).detach()
        expectation = (z * mean_score(for_mean, True)).sum(-1)
        each = torch.stack([torch.autograd.grad(log_p(x, h).sum(), x)[0] for h in for_covariance])
        along = (z * each).sum(-1)
        covariance = ((along - along.mean(0)) * log_p(x.detach(), for_covariance)).sum(0) / (num_samples - 1)
        optim.zero_grad()
        (expectation + covariance).mean().backward(inputs=theta)
        optim.step()
        return ((z**2).sum(-1).mean() / 2).item()

    return step


def main(args):
    use_one_core()
    size = f"{args.num_visible} x {args.num_hidden}, batch 100"
    print(f"device {jax.devices()[0].device_kind}; {size}; medians of {args.repeats} rounds")
    v = jax.random.uniform(jax.random.key(3), (100, args.num_visible))
    for num_samples in args.num_samples:
        size = args.num_hidden, 5, num_samples
        engine = timed(*by_engine(v, args.num_hidden, 5, Variational(num_samples)), args.num_steps)
        show_ratio(
            f"hand: K = 5, L = {num_samples}", in_turn(engine, timed(*by_hand(v, *size), args.num_steps), repeats=args.repeats)
        )
        step = by_torch(v, *size)
        if step is None:
            print("torch: not installed, left out")
        else:
            show_ratio(
                f"torch: K = 5, L = {num_samples}", in_turn(engine, timed_eagerly(step, args.num_steps), repeats=args.repeats)
            )
    truncated = timed(*bism_engine(v, args.num_hidden, 5, Unrolled(0)), args.num_steps)
    print(f"{'estimators: BiSM, N = 0':<52}{compiled(*bism_engine(v, args.num_hidden, 5, Unrolled(0)))[1]:56.1f} MB of buffers")
    for title, make in args.estimators.items():
        show_ratio(
            f"estimators: {title}", in_turn(timed(*make(v, args.num_hidden), args.num_steps), truncated, repeats=args.repeats)
        )
        print(f"{'':<52}{compiled(*make(v, args.num_hidden))[1]:56.1f} MB of buffers")
    for num_inner_steps in args.inner:
        seconds, megabytes = compiled(*by_engine(v, args.num_hidden, num_inner_steps, Variational(2)))
        print(f"memory: K = {num_inner_steps:>3} {megabytes:9.1f} MB of buffers, compiled in {seconds:.1f} s")


ESTIMATORS = {
    "BiSM, N = 5": lambda v, num_hidden: bism_engine(v, num_hidden, 5, Unrolled(5)),
    "VaGES, L = 2": lambda v, num_hidden: by_engine(v, num_hidden, 5, Variational(2)),
    "VaGES, L = 2, shared": lambda v, num_hidden: by_engine(v, num_hidden, 5, Variational(2, shared_samples=True)),
    "VaGES, L = 10": lambda v, num_hidden: by_engine(v, num_hidden, 5, Variational(10)),
    "weighted, L = 10": lambda v, num_hidden: by_engine(v, num_hidden, 5, ImportanceWeighted(10, jackknife=False)),
    "jackknife, L = 10": lambda v, num_hidden: by_engine(v, num_hidden, 5, ImportanceWeighted(10, jackknife=True)),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-visible", type=int, default=560)
    parser.add_argument("--num-hidden", type=int, default=400)
    parser.add_argument("--num-steps", type=int, default=20, help="steps in one timed loop")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of timed loops")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a small machine, to see that it runs")
    args = parser.parse_args()
    args.num_samples, args.estimators, args.inner = (2, 10), ESTIMATORS, (1, 5, 50)
    if args.smoke:
        args.num_samples, args.inner = (2,), (5,)
        args.estimators = {"jackknife, L = 10": ESTIMATORS["jackknife, L = 10"]}
        args.num_visible, args.num_hidden, args.num_steps, args.repeats = 20, 10, 2, 2
    main(args)
