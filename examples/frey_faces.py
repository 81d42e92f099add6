# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A Gaussian restricted Boltzmann machine learns faces
====================================================

A Gaussian-Bernoulli restricted Boltzmann machine with 560 visible and 400 hidden units is learned from the Frey faces, 1965
frames of 28 x 20 pixels, divided by 255 and shuffled with a fixed seed: 1400 to learn from, 300 for validation (not used),
265 for testing. The same machine is learned

* by denoising (DSM, noise .3) and sliced score matching (SSM), ``exact``: :class:`ScoreMatching` of the free energy;
* by the same objectives as a model with latents and a guide, by bi-level score matching (BiSM) [1]: K = 5 steps of the guide
  per step, ``N`` more that are differentiated through, or the ``implicit`` hypergradient, which is not in the paper; and by
  variational estimates of the score and of its gradient (``VaGES``) [2] from two samples of the guide;
* by contrastive divergence from the data (``CD-1``) and with persistent chains (``PCD-1``, NumPyro's ``SVI`` under
  :class:`negative_phase`), one sweep of block Gibbs each.

Every machine is judged on the test faces by

* its log-likelihood in nats, with the normalizer by annealed importance sampling. Machines learned by DSM model the *noised*
  density, and are judged here on clean images. One state of the hidden units bounds it from above, without sampling: the
  normalizer is more than the weight of the heaviest state that is found;
* its sliced score matching loss with one Rademacher sample, the same for all: the Fisher divergence from the data less an
  unknown constant. Lower is better; negative is normal.

Settings are those of the code of [1] (batches of 100, Adam with rate 2e-4 and betas .9, .95) but for the number of steps,
which it has at 20,000: ``--num-steps 20000``.

The script writes to ``--output``: ``faces.png``, test faces and samples of every method, E[v|h] after 1000 sweeps from
uniform noise, and last the face of its heaviest state; ``curves.png``, the sliced score matching loss on the test faces against
the step.

**References**

1. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020, arXiv:2010.07856.
2. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
   arXiv:2010.08258.
"""

# sphinx_gallery_thumbnail_path = "_static/frey_faces.png"

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from jax import Array
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    BlockGibbs,
    DenoisingScoreMatching,
    GaussianBernoulliRBM,
    GumbelBernoulli,
    Implicit,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
    VaGES,
    Variational,
    block_gibbs,
    log_normalizer,
    negative_phase,
)
from numpyro_ebm.datasets import frey_faces

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEIGHT, WIDTH = 28, 20
NUM_VISIBLE, NUM_HIDDEN = HEIGHT * WIDTH, 400
NUM_TRAIN, NUM_VALIDATION, BATCH_SIZE, NUM_INNER_STEPS, NUM_STEPS = 1400, 300, 100, 5, 2_000
NUM_SWEEPS, NUM_FACES = 1000, 12
OBJECTIVES = {"DSM": DenoisingScoreMatching(0.3), "SSM": SlicedScoreMatching()}
METHODS = ["DSM, exact", "DSM, N = 0", "DSM, N = 5", "DSM, implicit", "DSM, VaGES, L = 2"]
METHODS += ["SSM, exact", "SSM, N = 5", "SSM, VaGES, L = 2", "CD-1", "PCD-1"]


class Learner(NamedTuple):
    """One method: where it starts, how it goes on, and what it has learned."""

    init: Callable[[Array], Any]  # of a key
    update: Callable[[Any], Any]  # of a state
    params: Callable[[Any], dict[str, Array]]  # of a state


class Fit(NamedTuple):
    """One method with all its seeds."""

    steps: np.ndarray  # (num_looks,)
    ssm: np.ndarray  # (num_seeds, num_looks), on the test faces
    log_likelihood: np.ndarray  # (num_seeds,), nats per test face, at the end
    error: np.ndarray  # (num_seeds,), of the normalizer
    sample_size: np.ndarray  # (num_seeds,), effective, of annealed importance sampling
    seconds: np.ndarray  # (), of the processor, of learning all seeds, compilation included
    weights: np.ndarray  # of the first seed, as all that follows
    visible_bias: np.ndarray
    hidden_bias: np.ndarray
    scale: np.ndarray

    @property
    def machine(self) -> GaussianBernoulliRBM:
        return GaussianBernoulliRBM(*map(jnp.asarray, (self.weights, self.visible_bias, self.hidden_bias, self.scale)))


def init_machine(rng_key: Array) -> dict[str, Array]:
    bound = NUM_HIDDEN**-0.5
    shapes = {"weights": (NUM_VISIBLE, NUM_HIDDEN), "visible_bias": (NUM_VISIBLE,), "hidden_bias": (NUM_HIDDEN,)}
    keys = dict(zip(shapes, jax.random.split(rng_key, 3), strict=True))
    uniform = {name: jax.random.uniform(keys[name], shape, minval=-bound, maxval=bound) for name, shape in shapes.items()}
    return uniform | {"scale": jnp.ones(NUM_VISIBLE)}


def machine() -> GaussianBernoulliRBM:
    bound = NUM_HIDDEN**-0.5

    def uniform(name: str, *shape: int) -> Array:
        return numpyro.param(name, lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound))

    weights, b, c = (
        uniform("weights", NUM_VISIBLE, NUM_HIDDEN),
        uniform("visible_bias", NUM_VISIBLE),
        uniform("hidden_bias", NUM_HIDDEN),
    )
    scale = numpyro.param("scale", jnp.ones(NUM_VISIBLE), constraint=constraints.positive)
    return GaussianBernoulliRBM(weights, b, c, scale)


def marginal(v: Array) -> None:
    """The machine with its hidden units summed out."""
    with numpyro.plate("faces", len(v)):
        numpyro.sample("v", machine(), obs=v)


def joint(v: Array) -> None:
    """The same machine as a random field of both layers."""
    rbm = machine()
    with numpyro.plate("faces", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (NUM_HIDDEN,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (NUM_VISIBLE,)), obs=v)
        numpyro.factor("coupling", -rbm.joint_energy(v, h))


def guide(v: Array) -> None:
    """Hidden units that are independent, with logits linear in v: the posterior's own form."""
    bound = NUM_VISIBLE**-0.5
    slope = numpyro.param("slope", lambda key: jax.random.uniform(key, (NUM_VISIBLE, NUM_HIDDEN), minval=-bound, maxval=bound))
    shift = numpyro.param("shift", lambda key: jax.random.uniform(key, (NUM_HIDDEN,), minval=-bound, maxval=bound))
    with numpyro.plate("faces", len(v)):
        numpyro.sample("h", GumbelBernoulli(v @ slope + shift, temperature=0.1).to_event(1))


def make_learner(method: str, train: Array) -> Learner:
    # eps_root: the guide's Adam is differentiated, and sqrt(0) has no slope
    adam = optax.adam(2e-4, b1=0.9, b2=0.95, eps_root=1e-24)
    if method == "CD-1":
        return contrastive_divergence(adam, train)
    if method == "PCD-1":
        return persistent_contrastive_divergence(adam, train)
    objective, how = method.split(", ", 1)
    shared: dict[str, Any] = {"num_inner_steps": NUM_INNER_STEPS, "batch_size": BATCH_SIZE}
    engine: ScoreMatching | BiSM | VaGES
    if how.startswith("VaGES"):
        engine = VaGES(joint, guide, adam, adam, OBJECTIVES[objective], estimate=Variational(int(how[-1])), **shared)
    elif how == "exact":
        engine = ScoreMatching(marginal, adam, OBJECTIVES[objective], batch_size=BATCH_SIZE)
    else:
        hypergradient: Unrolled | Implicit = Implicit("fisher", num_cg_steps=3, num_draws=2)
        if how != "implicit":
            hypergradient = Unrolled(int(how.removeprefix("N = ")))
        engine = BiSM(joint, guide, adam, adam, OBJECTIVES[objective], hypergradient=hypergradient, **shared)
    return Learner(lambda key: engine.init(key, train), lambda state: engine.update(state, train)[0], engine.get_params)


def contrastive_divergence(optim: optax.GradientTransformation, train: Array) -> Learner:
    """Chains that start at the batch in every step; the log of the scale is learned, as everywhere."""

    def constrained(theta: dict[str, Array]) -> dict[str, Array]:
        return theta | {"scale": jnp.exp(theta["scale"])}

    def loss(theta: dict[str, Array], rng_key: Array, v: Array) -> Array:
        rbm = GaussianBernoulliRBM(**constrained(theta))
        end = jax.lax.stop_gradient(block_gibbs(rng_key, rbm, v))
        return rbm.free_energy(v).mean() - rbm.free_energy(end).mean()

    def init(rng_key: Array) -> Any:
        params_key, rng_key = jax.random.split(rng_key)
        params = init_machine(params_key)
        theta = params | {"scale": jnp.log(params["scale"])}
        return theta, optim.init(theta), rng_key

    def update(state: Any) -> Any:
        theta, optim_state, rng_key = state
        rng_key, batch_key, chain_key = jax.random.split(rng_key, 3)
        gradient = jax.grad(loss)(theta, chain_key, draw_batch(batch_key, train))
        updates, optim_state = optim.update(gradient, optim_state, theta)
        return optax.apply_updates(theta, updates), optim_state, rng_key

    return Learner(init, update, lambda state: constrained(state[0]))


def persistent_contrastive_divergence(optim: optax.GradientTransformation, train: Array) -> Learner:
    """As many chains as faces in a batch, that go on from step to step."""
    wrapped = negative_phase(marginal, num_chains=BATCH_SIZE, sampler=BlockGibbs(num_steps=1))
    svi = SVI(wrapped, lambda v: None, optim, Trace_ELBO())

    def init(rng_key: Array) -> Any:
        svi_key, rng_key = jax.random.split(rng_key)
        return svi.init(svi_key, train[:BATCH_SIZE]), rng_key

    def update(state: Any) -> Any:
        svi_state, rng_key = state
        rng_key, batch_key = jax.random.split(rng_key)
        return svi.update(svi_state, draw_batch(batch_key, train))[0], rng_key

    return Learner(init, update, lambda state: svi.get_params(state[0]))


def draw_batch(rng_key: Array, train: Array) -> Array:
    return train[jax.random.randint(rng_key, (BATCH_SIZE,), 0, len(train))]


def machine_of(params: dict[str, Array]) -> GaussianBernoulliRBM:
    return GaussianBernoulliRBM(params["weights"], params["visible_bias"], params["hidden_bias"], params["scale"])


def ssm_loss(rbm: GaussianBernoulliRBM, v: Array) -> Array:
    """The sliced score matching loss on clean images, with the same Rademacher sample for every method and step."""
    score = jax.grad(lambda v: rbm.log_prob(v).sum())
    return SlicedScoreMatching().loss(score, jax.random.key(0), v, v).mean()


def fit(method: str, train: Array, test: Array, args: argparse.Namespace) -> Fit:
    learner = make_learner(method, train)
    every = max(1, args.num_steps // 20)
    begin = time.process_time()
    init = jax.jit(learner.init)

    @jax.jit
    def advance(state: Any) -> tuple[Any, Array]:
        state = jax.lax.fori_loop(0, every, lambda _, state: learner.update(state), state)
        return state, ssm_loss(machine_of(learner.params(state)), test)

    ssm, machines = [], []
    for key in jax.random.split(jax.random.key(0), args.num_seeds):
        state, looks = init(key), []
        for _ in range(args.num_steps // every):
            state, loss = advance(state)
            looks.append(float(loss))
        ssm.append(looks)
        machines.append(machine_of(learner.params(state)))
    seconds = time.process_time() - begin
    normalizers = [
        log_normalizer(rbm, "ais", rng_key=jax.random.key(1), num_chains=args.num_chains, num_temperatures=args.num_temperatures)
        for rbm in machines
    ]
    log_likelihood = [float(rbm.log_prob(test).mean() - z.log_normalizer) for rbm, z in zip(machines, normalizers, strict=True)]
    first = machines[0]
    fields = {
        "steps": every * np.arange(1, len(ssm[0]) + 1),
        "ssm": ssm,
        "log_likelihood": log_likelihood,
        "error": [z.standard_error for z in normalizers],
        "sample_size": [z.effective_sample_size for z in normalizers],
        "seconds": seconds,
        "weights": first.weights,
        "visible_bias": first.visible_bias,
        "hidden_bias": first.hidden_bias,
        "scale": first.scale,
    }
    return Fit(**{name: np.asarray(value) for name, value in fields.items()})


def fit_once(method: str, train: Array, test: Array, args: argparse.Namespace) -> Fit:
    """The fit, from ``--output`` if an earlier call has left it there and ``--reuse`` is given."""
    path = args.output / f"{method.replace(', ', ' ').replace(' ', '_')}.npz"
    if args.reuse and path.exists():
        with np.load(path) as kept:
            return Fit(**kept)
    result = fit(method, train, test, args)
    np.savez(path, **result._asdict())
    return result


def heaviest_state(rbm: GaussianBernoulliRBM, num_starts: int = 20) -> tuple[float, np.ndarray]:
    """The log weight of one state of the hidden units with the visible ones integrated out, and its mean face.

    By coordinate ascent from random starts. The normalizer is a sum over states, so that this is less than its logarithm,
    whatever annealed importance sampling says.
    """
    weights, b, c, scale = (np.asarray(x, np.float64) for x in (rbm.weights, rbm.visible_bias, rbm.hidden_bias, rbm.scale))
    pairs, field = weights.T @ (scale[:, None] ** 2 * weights), c + b @ weights
    rng, best, best_state = np.random.default_rng(0), -np.inf, np.zeros(len(c))
    for _ in range(num_starts):
        h, before = (rng.uniform(size=len(c)) < rng.uniform()).astype(float), -np.inf
        while (value := field @ h + h @ pairs @ h / 2) > before:
            before = value
            for j in range(len(h)):
                h[j] = field[j] + pairs[j] @ h + pairs[j, j] * (0.5 - h[j]) > 0
        if before > best:
            best, best_state = before, h.copy()
    gaussian = np.log(scale).sum() + len(b) * np.log(2 * np.pi) / 2
    return best + gaussian, b + scale**2 * (weights @ best_state)


def print_head() -> None:
    print(f"{'':<18}{'log-likelihood':>14}{'range':>21}{'error':>7}{'ESS':>5}{'bound':>9}{'SSM':>7}{'range':>16}{'seconds':>9}")


def print_row(method: str, result: Fit, test: Array) -> None:
    bound = float(result.machine.log_prob(test).mean()) - heaviest_state(result.machine)[0]
    likelihood, ssm = result.log_likelihood, result.ssm[:, -1]
    likelihood_range, ssm_range = f"{likelihood.min():.1f} to {likelihood.max():.1f}", f"{ssm.min():.0f} to {ssm.max():.0f}"
    print(
        f"{method:<18}{likelihood.mean():>14.1f}{likelihood_range:>21}{result.error.max():>7.2f}{result.sample_size.min():>5.0f}"
        f"{bound:>9.1f}{ssm.mean():>7.0f}{ssm_range:>16}{result.seconds:>9.0f}",
        flush=True,
    )


def sample_faces(rbm: GaussianBernoulliRBM) -> Array:
    start_key, chain_key, hidden_key = jax.random.split(jax.random.key(2), 3)
    v = block_gibbs(chain_key, rbm, jax.random.uniform(start_key, (NUM_FACES, NUM_VISIBLE)), NUM_SWEEPS)
    return rbm.visible_given_hidden(rbm.hidden_given_visible(v).sample(hidden_key)).mean


def plot_faces(path: Path, test: Array, fits: dict[str, Fit]) -> None:
    rows = {"test faces": test[:NUM_FACES]}
    for method, result in fits.items():
        heaviest = jnp.asarray(heaviest_state(result.machine)[1], jnp.float32)
        rows[method] = jnp.concatenate([sample_faces(result.machine)[:-1], heaviest[None]])
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.05 * len(rows)))
    for ax, (name, faces) in zip(np.atleast_1d(axes), rows.items(), strict=True):
        strip = np.asarray(faces).reshape(NUM_FACES, HEIGHT, WIDTH).transpose(1, 0, 2).reshape(HEIGHT, NUM_FACES * WIDTH)
        ax.imshow(strip, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(path: Path, fits: dict[str, Fit]) -> None:
    figure, ax = plt.subplots(figsize=(7, 4.5))
    for method, result in fits.items():
        ax.plot(result.steps, result.ssm.mean(0), label=method)
    ax.set(xlabel="step", ylabel="sliced score matching loss on test faces", ylim=(None, 500))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    faces = frey_faces().reshape(-1, NUM_VISIBLE)[np.random.default_rng(0).permutation(1965)]
    v = jnp.asarray(faces / 255, jnp.float32)
    train, test = v[:NUM_TRAIN], v[NUM_TRAIN + NUM_VALIDATION :]
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"{args.num_steps} steps, {args.num_seeds} seeds, on {len(test)} test faces. Error and ESS are of the worst seed's")
    print(f"annealed importance sampling, with {args.num_chains} chains; processor seconds of learning all seeds, without it.")
    print("Bound: no log-likelihood of the first seed is more, by one state of its hidden units.")
    print_head()
    fits = {}
    for method in args.methods:
        fits[method] = fit_once(method, train, test, args)
        print_row(method, fits[method], test)
    plot_faces(args.output / "faces.png", test, fits)
    plot_curves(args.output / "curves.png", fits)
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--num-chains", type=int, default=500, help="of annealed importance sampling")
    parser.add_argument("--num-temperatures", type=int, default=1000, help="of annealed importance sampling")
    parser.add_argument("--output", type=Path, default=Path("outputs/frey_faces"))
    parser.add_argument("--reuse", action="store_true", help="take from --output what an earlier call has learned")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.methods, args.num_steps, args.num_seeds = ["DSM, exact", "SSM, N = 5", "DSM, VaGES, L = 2", "PCD-1"], 4, 1
        args.num_chains, args.num_temperatures = 10, 10
    main(args)
