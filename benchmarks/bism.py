# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a step of ``BiSM`` costs: a Gaussian restricted Boltzmann machine of the size of the Frey faces (560 x 400), batch 100.

* ``hand``: one step over the same mathematics written by hand in JAX, no NumPyro: samples, two levels, Adam differentiated through.
* ``torch``: the same step over a plain PyTorch implementation on the CPU (``pip install torch==2.13.0``; left out without it).
* ``implicit``: one step with the implicit hypergradient over one with five unrolled steps.
* ``compile``: seconds to compile a step, and megabytes of its temporary buffers, against K, N and ``checkpoint``; the time of
  a step with ``checkpoint`` over that without.

All run on one core: the process is pinned to it, and PyTorch is given one thread. What is compared is timed in turn, A B A B,
so that the ratio holds when the machine's speed drifts. Run ``make bench``, or ``python benchmarks/bism.py --help``.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from _timing import compiled, in_turn, show_ratio, timed, timed_eagerly, use_one_core
from numpyro.distributions import constraints

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    DenoisingScoreMatching,
    GumbelBernoulli,
    Implicit,
    Unrolled,
)

SIGMA, TEMPERATURE, RATE, BETAS, EPS_ROOT = 0.3, 0.1, 2e-4, (0.9, 0.95), 1e-24


def make_model(num_visible, num_hidden):
    def uniform(key, shape, fan_in):
        return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)

    def model(v):
        W = numpyro.param("W", lambda key: uniform(key, (num_visible, num_hidden), num_hidden))
        b, c = numpyro.param("b", jnp.zeros(num_visible)), numpyro.param("c", jnp.zeros(num_hidden))
        log_scale = numpyro.param("log_scale", jnp.zeros(num_visible))
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", BaseMeasure(constraints.boolean, (num_hidden,)))
            v = numpyro.sample("v", BaseMeasure(constraints.real, (num_visible,)), obs=v)
            numpyro.factor("coupling", -energy(W, b, c, log_scale, v, h))

    def guide(v):
        A = numpyro.param("A", lambda key: uniform(key, (num_visible, num_hidden), num_visible))
        a = numpyro.param("a", jnp.zeros(num_hidden))
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", GumbelBernoulli(v @ A + a, TEMPERATURE).to_event(1))

    return model, guide


def energy(W, b, c, log_scale, v, h):
    return (((v - b) * jnp.exp(-log_scale)) ** 2).sum(-1) / 2 - h @ c - ((v @ W) * h).sum(-1)


def adam():
    return optax.adam(RATE, *BETAS, eps_root=EPS_ROOT)


def make_engine(num_visible, num_hidden, num_inner_steps, hypergradient):
    model, guide = make_model(num_visible, num_hidden)
    return BiSM(
        model,
        guide,
        adam(),
        adam(),
        DenoisingScoreMatching(SIGMA),
        num_inner_steps=num_inner_steps,
        hypergradient=hypergradient,
    )


def by_engine(v, *settings):
    """A state, and the engine's step as a function of it."""
    engine = make_engine(v.shape[1], *settings)
    return engine.init(jax.random.key(1), v), lambda state: engine.update(state, v)


def by_hand(v, num_hidden, num_inner_steps, num_unroll_steps):
    def noised(key):
        return v + SIGMA * jax.random.normal(key, v.shape)

    def draw(phi, x, key):
        logits = x @ phi["A"] + phi["a"]
        return jax.nn.sigmoid((logits + jax.random.logistic(key, logits.shape)) / TEMPERATURE), logits

    def log_ratio(theta, x, h, logits):
        log_q = (h * logits - jax.nn.softplus(logits)).sum(-1)
        return -energy(theta["W"], theta["b"], theta["c"], theta["log_scale"], x, h) - log_q

    def lower(theta, phi, key):
        noise_key, draw_key = jax.random.split(key)
        x = noised(noise_key)
        return -log_ratio(theta, x, *draw(phi, x, draw_key)).mean()

    def upper(theta, phi, key):
        noise_key, draw_key = jax.random.split(key)
        x = noised(noise_key)
        h, _ = draw(phi, x, draw_key)
        score = jax.grad(lambda x: log_ratio(theta, x, h, x @ phi["A"] + phi["a"]).sum())(x)
        return ((score + (x - v) / SIGMA**2) ** 2).sum(-1).mean() / 2

    def steps(theta, phi, optim_state, keys):
        def step(carry, key):
            phi, optim_state = carry
            updates, optim_state = adam().update(jax.grad(lower, 1)(theta, phi, key), optim_state)
            return (optax.apply_updates(phi, updates), optim_state), None

        return jax.lax.scan(step, (phi, optim_state), keys)[0]

    def update(state):
        theta, phi, of_theta, of_phi, key = state
        key, inner_key, unroll_key, upper_key = jax.random.split(key, 4)
        phi, of_phi = steps(theta, phi, of_phi, jax.random.split(inner_key, num_inner_steps))
        keys = jax.random.split(unroll_key, num_unroll_steps)
        value, gradient = jax.value_and_grad(lambda theta: upper(theta, steps(theta, phi, of_phi, keys)[0], upper_key))(theta)
        updates, of_theta = adam().update(gradient, of_theta)
        return (optax.apply_updates(theta, updates), phi, of_theta, of_phi, key), value

    state, _ = by_engine(v, num_hidden, num_inner_steps, Unrolled(num_unroll_steps))
    return (state.theta, state.phi, adam().init(state.theta), adam().init(state.phi), jax.random.key(1)), update


def by_torch(v, num_hidden, num_inner_steps, num_unroll_steps):
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
    optim = torch.optim.Adam(theta, RATE, BETAS)
    state = {
        "phi": [uniform((num_visible, num_hidden), num_visible), torch.zeros(num_hidden)],
        "moments": [(torch.zeros(num_visible, num_hidden),) * 2, (torch.zeros(num_hidden),) * 2],
        "count": 0,
    }

    def draw(phi, x):
        logits = x @ phi[0] + phi[1]
        u = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
        return torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / TEMPERATURE), logits

    def log_ratio(x, h, logits):
        W, b, c, log_scale = theta
        minus_energy = -(((x - b) * torch.exp(-log_scale)) ** 2).sum(-1) / 2 + h @ c + ((x @ W) * h).sum(-1)
        return minus_energy - (h * logits - torch.nn.functional.softplus(logits)).sum(-1)

    def lower_step(phi, moments, count, create_graph):
        x = v + SIGMA * torch.randn_like(v)
        gradient = torch.autograd.grad(-log_ratio(x, *draw(phi, x)).mean(), phi, create_graph=create_graph)
        moments = [
            (BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * s + (1 - BETAS[1]) * g**2)
            for (m, s), g in zip(moments, gradient, strict=True)
        ]
        corrected = [(m / (1 - BETAS[0] ** count), s / (1 - BETAS[1] ** count)) for m, s in moments]
        return [p - RATE * m / (torch.sqrt(s + EPS_ROOT) + 1e-8) for p, (m, s) in zip(phi, corrected, strict=True)], moments

    def step():
        phi, moments, count = state["phi"], state["moments"], state["count"]
        for _ in range(num_inner_steps):
            count += 1
            phi, moments = lower_step([p.detach().requires_grad_() for p in phi], moments, count, False)
        state.update(phi=phi, moments=moments, count=count)
        phi = [p.detach().requires_grad_() for p in phi]
        for _ in range(num_unroll_steps):
            count += 1
            phi, moments = lower_step(phi, moments, count, True)
        x = (v + SIGMA * torch.randn_like(v)).requires_grad_()
        h, _ = draw(phi, x.detach())
        score = torch.autograd.grad(log_ratio(x, h, x @ phi[0] + phi[1]).sum(), x, create_graph=True)[0]
        loss = ((score + (x - v) / SIGMA**2) ** 2).sum(-1).mean() / 2
        optim.zero_grad()
        loss.backward(inputs=theta)
        optim.step()
        return loss.item()

    return step


def main(args):
    use_one_core()
    size = f"{args.num_visible} x {args.num_hidden}, batch 100"
    print(f"device {jax.devices()[0].device_kind}; {size}; medians of {args.repeats} rounds")
    v = jax.random.uniform(jax.random.key(3), (100, args.num_visible))
    for num_unroll_steps in args.unroll:
        size = args.num_hidden, 5, num_unroll_steps
        engine = timed(*by_engine(v, args.num_hidden, 5, Unrolled(num_unroll_steps)), args.num_steps)
        rivals = {"hand": timed(*by_hand(v, *size), args.num_steps)}
        step = by_torch(v, *size)
        if step is None:
            print("torch: not installed, left out")
        else:
            rivals["torch"] = timed_eagerly(step, args.num_steps)
        for name, rival in rivals.items():
            show_ratio(f"{name}: K = 5, N = {num_unroll_steps}", in_turn(engine, rival, repeats=args.repeats))
    unrolled = timed(*by_engine(v, args.num_hidden, 5, Unrolled(5)), args.num_steps)
    for form in args.implicit:
        implicit = timed(*by_engine(v, args.num_hidden, 5, form), args.num_steps)
        title = f"implicit, {form.curvature}: {form.num_cg_steps} CG steps, {form.num_draws} draws, over N = 5"
        show_ratio(title, in_turn(implicit, unrolled, repeats=args.repeats))
    checkpointed = timed(*by_engine(v, args.num_hidden, 5, Unrolled(5, checkpoint=True)), args.num_steps)
    show_ratio("checkpoint: over none, N = 5", in_turn(checkpointed, unrolled, repeats=args.repeats))
    for inner, unroll, checkpoint in args.compile:
        seconds, megabytes = compiled(*by_engine(v, args.num_hidden, inner, Unrolled(unroll, checkpoint)))
        title = f"compile: K = {inner:>2}, N = {unroll:>2}, checkpoint {checkpoint!s:<5}"
        print(f"{title} {seconds:6.1f} s {megabytes:9.1f} MB of buffers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-visible", type=int, default=560)
    parser.add_argument("--num-hidden", type=int, default=400)
    parser.add_argument("--num-steps", type=int, default=20, help="steps in one timed loop")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of timed loops")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a small machine, to see that it runs")
    args = parser.parse_args()
    fisher = Implicit("fisher", num_cg_steps=3, num_draws=2)
    args.unroll, args.implicit = (
        (0, 5),
        (Implicit("hessian", num_cg_steps=5, tol=1e-5), Implicit("hessian", num_cg_steps=3, tol=1e-5, num_draws=2), fisher),
    )
    args.compile = ((5, 0, False), (5, 5, False), (50, 5, False), (5, 50, False), (5, 50, True))
    if args.smoke:
        args.unroll, args.implicit, args.compile = (5,), (fisher,), ((5, 5, True),)
        args.num_visible, args.num_hidden, args.num_steps, args.repeats = 20, 10, 2, 2
    main(args)
