# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Handwritten digits by five engines
==================================

The 8 x 8 digits of scikit-learn by bi-level doubly variational learning (``BiDVL``) [1]: an energy of images :math:`E(v)`, an
encoder :math:`q(h|v)` and a generator :math:`N(h; 0, I) \, N(v; g(h), \sigma^2 I)`, all learned together without a Markov chain.
The generator draws, the encoder reconstructs, and the energy tells digits from other images.

It is compared, on the same split, with networks 256 wide, eight latents and 3000 steps, with other engines, each with the batches
and rates that suit it (``bism`` and ``vages`` 100 rows and five steps of the guide, the others 256 rows; no split was kept to
choose them by):

* ``vae``: generator and encoder alone, a variational autoencoder by NumPyro's ``SVI``;
* ``ebipla``: the same generator with a learned energy for the prior of its latents, by ``ParticleMMLE.ebipla`` (the example
  ``energy_prior_digits.py``);
* ``bism``, ``vages``: an energy of images and latents together, by score matching (``BiSM`` with N = 0, ``VaGES`` with L = 2);
* ``bidvl``: the symmetric divergence (``LowerLevel("exact")``); ``bidvl-offset``: terms as in the paper's code, means in place of
  samples, squared errors of pixels in [-1, 1] for likelihoods, the hinge of its residual networks with the latent weight of the
  others, both levels of weight 1.

All are judged on the 360 digits that none has seen:

* **MMD^2** between them and as many samples as there are training digits, unbiased, with the RBF kernel at the median distance;
  samples with the model's noise, and their means. ``bism`` and ``vages`` draw images by annealed Langevin dynamics given the
  latents of random training digits; the others draw from nothing.
* **Reconstruction**, the mean squared error per pixel: of the generator's mean at the encoder's mean; for ``ebipla``, which
  has no encoder, at the most probable latents; for ``bism`` and ``vages``, of samples given the guide's mean.
* **AUROC** of telling held-out digits from other images by a score that should be higher for those: the energy of ``bidvl``; minus
  an importance-weighted bound on :math:`\log p(v)` from 50 samples of the encoder (``vae``, ``bism``, ``vages``; up to a constant);
  minus the log density at the most probable latents (``ebipla``). The other images are the held-out digits with inverted pixels,
  turned by 90 degrees, with shuffled pixels, uniform noise, and images of one gray.

What a run gives is on this example's page. Every fit is kept in ``--output``; ``--reuse`` takes what is there. ``samples.png``
there shows samples of every model of the first seed, and ``energies.png`` the scores of digits and of other images.

**References**

1. Kan et al., *Bi-level doubly variational learning for energy-based latent variable models*, CVPR 2022, arXiv:2203.14702.
"""

# sphinx_gallery_thumbnail_path = "_static/bidvl_digits_samples.png"

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from energy_prior_digits import (
    LATENT_DIM,
    NUM_PIXELS,
    NUM_SEARCHES,
    SEARCH_STEPS,
    Digits,
    Nets,
    decode,
    encode,
    fit_by_svi,
    fit_energy_prior,
    load_data,
    make_nets,
    median_distance,
    mmd2,
    normal_prior,
    reconstruct,
    squared_distances,
    trained,
)
from energy_prior_digits import model as latent_model
from jax import Array
from jax.scipy.special import logsumexp
from nets.eblvm import CoupledEnergy, DenseResNet, GaussianGuide, dense_energy, leaky_relu
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints
from sklearn.metrics import roc_auc_score

from numpyro_ebm import (
    BaseMeasure,
    BiDVL,
    BiSM,
    MultiscaleDenoisingScoreMatching,
    NonFiniteError,
    PosteriorFisher,
    TiltedDistribution,
    Unrolled,
    VaGES,
    Variational,
    amortized_normal,
    annealed_langevin,
    annealing_schedule,
    denoise,
    find_map,
)
from numpyro_ebm.infer import Hinge, LowerLevel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODELS = ("vae", "ebipla", "bism", "vages", "bidvl", "bidvl-offset")
BATCH_SIZE, NUM_STEPS = 256, 3000
NOISE, BASE_SCALE, WIDTH = 0.12, 0.5, 256
RATE, ENERGY_RATE = 1e-3, 3e-4
SCORE_RATE, GUIDE_STEPS = 5e-4, 5
NUM_BOUND_DRAWS, NUM_PARTICLES = 50, 4
TEMPERATURES = annealing_schedule(100, 600, 100, hottest=10.0)


class Judged(NamedTuple):
    """A fit, and what it is worth; all arrays, to be kept in a file."""

    means: np.ndarray  # (num_draws, 64), samples without their noise
    mmd2_draws: float
    mmd2_means: float
    reconstruction: float
    scores: np.ndarray  # (6, 360), of the held-out digits and of the other images
    seconds: float  # of processors, compilation included

    @property
    def diverged(self) -> bool:
        return not np.isfinite(self.mmd2_draws)


class Fitted(NamedTuple):
    """What every engine gives."""

    draw: Callable[[Array, int], tuple[Array, Array]]  # draws and their means
    reconstruct: Callable[[Array], Array]
    score: Callable[[Array], Array]  # the higher, the less an image is like a digit


class EnergyNets(NamedTuple):
    """Networks of the three programs of BiDVL."""

    energy: eqx.nn.MLP  # image -> scalar
    encoder: eqx.nn.MLP  # image -> mean and scale of the latent
    generator: eqx.nn.MLP  # latent -> mean of the pixels
    mean: Array  # (64,), the image that the base distribution of the energy is about


def adam(rate: float, num_steps: int, **settings: float) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps, alpha=0.05), **settings)


def warm_adam(num_steps: int) -> optax.GradientTransformation:
    """A rate that rises from 0: at the full rate from the start two fits of ``vages`` in three diverged."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, SCORE_RATE, num_steps // 20, num_steps, SCORE_RATE / 20)
    return optax.adam(schedule, b2=0.95)


# BiDVL: three programs of the batch of images.


def energy(v: Array, nets: EnergyNets, noise: float) -> None:
    net = eqx_module("energy", nets.energy)
    with numpyro.plate("digits", len(v)):
        base = dist.Normal(nets.mean, BASE_SCALE).to_event(1)
        numpyro.sample("v", TiltedDistribution(base, net), obs=v)


def encoder(v: Array, nets: EnergyNets, noise: float) -> None:
    net = eqx_module("encoder", nets.encoder)
    with numpyro.plate("digits", len(v)):
        mean, scale = encode(net, v)
        numpyro.sample("h", dist.Normal(mean, scale).to_event(1))


def generator(v: Array, nets: EnergyNets, noise: float) -> None:
    net = eqx_module("generator", nets.generator)
    with numpyro.plate("digits", len(v)):
        h = numpyro.sample("h", normal_prior())
        numpyro.sample("v", dist.Normal(decode(net, h), noise).to_event(1), obs=v)


def make_bidvl(num_steps: int, offset: bool) -> tuple[BiDVL, float]:
    """The engine, and the noise of its generator."""
    settings: dict[str, Any] = {}
    noise = NOISE
    if offset:
        settings = {"upper": Hinge(), "lower": LowerLevel("offset", latent_weight=1 / LATENT_DIM), "noise": False}
        noise = 0.125**0.5  # squared errors of pixels in [-1, 1], which are half as large here
    rates = ENERGY_RATE, RATE, RATE
    optims = (adam(rate, num_steps, b1=0.5, b2=0.9) for rate in rates)
    return BiDVL(energy, encoder, generator, *optims, batch_size=BATCH_SIZE, **settings), noise


def fit_bidvl(rng_key: Array, digits: Digits, num_steps: int, offset: bool) -> Fitted:
    net_key, fit_key = jax.random.split(rng_key)
    keys = jax.random.split(net_key, 3)
    nets = EnergyNets(
        energy=eqx.nn.MLP(NUM_PIXELS, "scalar", WIDTH, 2, jax.nn.silu, key=keys[0]),
        encoder=eqx.nn.MLP(NUM_PIXELS, 2 * LATENT_DIM, WIDTH, 2, jax.nn.silu, key=keys[1]),
        generator=eqx.nn.MLP(LATENT_DIM, NUM_PIXELS, WIDTH, 2, jax.nn.silu, jax.nn.sigmoid, key=keys[2]),
        mean=digits.train.mean(0),
    )
    engine, noise = make_bidvl(num_steps, offset)
    result = engine.run(fit_key, num_steps, digits.train, nets, noise, progress_bar=False)

    def draw(rng_key: Array, num_draws: int) -> tuple[Array, Array]:
        of_model, means = (
            engine.sample(rng_key, result.state, num_draws, digits.train, nets, noise, noise=n) for n in (None, False)
        )
        return of_model["v"], means["v"]

    return Fitted(
        draw,
        lambda v: engine.reconstruct(result.state, v, nets, noise),
        lambda v: engine.energies(result.state, v, nets, noise),
    )


# The others.


def fit_vae(rng_key: Array, digits: Digits, num_steps: int) -> Fitted:
    net_key, fit_key, bound_key = jax.random.split(rng_key, 3)
    nets = make_nets(net_key, NOISE)
    result, _, _ = fit_by_svi(fit_key, latent_model, digits, nets, num_steps, energy_prior=False, progress_bar=False)
    nets = trained(nets, result.params)

    def draw(rng_key: Array, num_draws: int) -> tuple[Array, Array]:
        return with_noise(rng_key, decode(nets.decoder, normal_prior().sample(rng_key, (num_draws,))))

    def log_ratio(key: Array, v: Array) -> Array:
        mean, scale = encode(nets.encoder, v)
        q = dist.Normal(mean, scale).to_event(1)
        z = q.sample(key)
        return log_likelihood(nets, z, v) + normal_prior().log_prob(z) - q.log_prob(z)

    return Fitted(
        draw,
        lambda v: decode(nets.decoder, encode(nets.encoder, v)[0]),
        lambda v: -bound(log_ratio, bound_key, v),
    )


def fit_ebipla(rng_key: Array, digits: Digits, num_steps: int) -> Fitted:
    net_key, fit_key, map_key = jax.random.split(rng_key, 3)
    nets = make_nets(net_key, NOISE)
    fit, _ = fit_energy_prior(fit_key, digits, nets, num_steps, 300 if num_steps > 100 else 4, NUM_PARTICLES)
    latents = fit.posterior_draws

    def draw(rng_key: Array, num_draws: int) -> tuple[Array, Array]:
        return with_noise(rng_key, decode(fit.nets.decoder, fit.prior_draws[:num_draws]))

    def score(v: Array) -> Array:
        nearest = squared_distances(np.asarray(v), np.asarray(digits.train)).argsort(-1)[:, :NUM_SEARCHES]
        start = {"z": latents[0, nearest.T]}  # as for reconstructions
        with warnings.catch_warnings():  # of searches that are not at their end: far from digits they take long
            warnings.simplefilter("ignore", UserWarning)
            found = find_map(map_key, latent_model, fit.result.params, v, nets, start=start, num_steps=SEARCH_STEPS)
        return -found.log_density

    def rebuild(v: Array) -> Array:
        return reconstruct(map_key, fit.result.params, latents, digits._replace(held_out=v), nets)

    return Fitted(draw, rebuild, score)


class JointNets(NamedTuple):
    """An energy of images and latents, and a guide."""

    energy: CoupledEnergy
    encoder: GaussianGuide
    mean: Array


def log_joint(nets: JointNets, v: Array, h: Array) -> Array:
    return dist.Normal(nets.mean, NOISE).to_event(1).log_prob(v) - jax.vmap(nets.energy)(v, h)


def joint_model(v: Array, nets: JointNets) -> None:
    net = eqx_module("energy", nets.energy)
    with numpyro.plate("digits", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.real, (LATENT_DIM,)))
        numpyro.sample("v", dist.Normal(nets.mean, NOISE).to_event(1), obs=v)
        numpyro.factor("coupling", -jax.vmap(net)(v, h))


def joint_guide(v: Array, nets: JointNets) -> None:
    net = eqx_module("encoder", nets.encoder)
    with numpyro.plate("digits", len(v)):
        numpyro.sample("h", amortized_normal(net, v))


def fit_by_scores(rng_key: Array, digits: Digits, num_steps: int, name: str) -> Fitted:
    energy_key, guide_key, top_key, fit_key, bound_key = jax.random.split(rng_key, 5)
    features = DenseResNet((NUM_PIXELS, WIDTH, WIDTH), leaky_relu, guide_key, activate_last=True)
    guide = GaussianGuide(features, WIDTH, LATENT_DIM, top_key)
    nets = JointNets(dense_energy(energy_key, (NUM_PIXELS,), LATENT_DIM, WIDTH), guide, digits.train.mean(0))
    objective = MultiscaleDenoisingScoreMatching(NOISE, NOISE, 1.2, "linear")
    optims = (warm_adam(num_steps * steps) for steps in (1, GUIDE_STEPS))
    shared = joint_model, joint_guide, *optims, objective, PosteriorFisher(), GUIDE_STEPS
    truncated = BiSM(*shared, hypergradient=Unrolled(0), batch_size=100)
    engine = truncated if name == "bism" else VaGES(*shared, estimate=Variational(2), batch_size=100)
    result = engine.run(fit_key, num_steps, digits.train, nets, progress_bar=False)
    nets = nets._replace(
        energy=eqx.combine(result.params["energy$params"], nets.energy), encoder=eqx.combine(result.params["encoder$params"], guide)
    )

    @jax.jit
    def given(rng_key: Array, h: Array) -> Array:
        start_key, run_key = jax.random.split(rng_key)
        log_prob = partial(lambda h, v: log_joint(nets, v, h), h)
        start = nets.mean + jax.random.normal(start_key, (len(h), NUM_PIXELS))
        return denoise(log_prob, annealed_langevin(run_key, log_prob, start, temperatures=TEMPERATURES), NOISE)

    def latents(v: Array) -> Array:
        return jax.vmap(nets.encoder)(v)[0]

    def draw(rng_key: Array, num_draws: int) -> tuple[Array, Array]:
        return with_noise(rng_key, given(rng_key, latents(jax.random.choice(rng_key, digits.train, (num_draws,)))))

    def log_ratio(key: Array, v: Array) -> Array:
        q = amortized_normal(nets.encoder, v)
        h = q.sample(key)
        return log_joint(nets, v, h) - q.log_prob(h)

    return Fitted(draw, lambda v: given(bound_key, latents(v)), lambda v: -bound(log_ratio, bound_key, v))


def with_noise(rng_key: Array, means: Array) -> tuple[Array, Array]:
    return means + NOISE * jax.random.normal(jax.random.fold_in(rng_key, 1), means.shape), means


def log_likelihood(nets: Nets, z: Array, v: Array) -> Array:
    return dist.Normal(decode(nets.decoder, z), NOISE).to_event(1).log_prob(v)


def bound(log_ratio: Callable[[Array, Array], Array], rng_key: Array, v: Array) -> Array:
    """The importance-weighted bound on log p, of shape ``(batch,)``."""
    ratios = jax.lax.map(lambda key: log_ratio(key, v), jax.random.split(rng_key, NUM_BOUND_DRAWS))
    return logsumexp(ratios, 0) - jnp.log(NUM_BOUND_DRAWS)


FITS: dict[str, Callable[[Array, Digits, int], Fitted]] = {
    "vae": fit_vae,
    "ebipla": fit_ebipla,
    "bism": partial(fit_by_scores, name="bism"),
    "vages": partial(fit_by_scores, name="vages"),
    "bidvl": partial(fit_bidvl, offset=False),
    "bidvl-offset": partial(fit_bidvl, offset=True),
}


# What they are worth.


def others(digits: Array) -> dict[str, np.ndarray]:
    """Images that are no digits, as many as there are digits."""
    rng, v = np.random.default_rng(0), np.asarray(digits)
    return {
        "inverted": 1 - v,
        "turned": np.rot90(v.reshape(-1, 8, 8), axes=(1, 2)).reshape(v.shape),
        "shuffled": v[:, rng.permutation(NUM_PIXELS)],
        "noise": rng.random(v.shape, np.float32),
        "one gray": np.repeat(rng.random((len(v), 1), np.float32), NUM_PIXELS, 1),
    }


def judge(rng_key: Array, name: str, digits: Digits, num_steps: int) -> Judged:
    start = time.process_time()
    fit_key, draw_key = jax.random.split(rng_key)
    try:
        fit = FITS[name](fit_key, digits, num_steps)
    except NonFiniteError as error:
        print(f"{name}: {error}")
        nothing = np.full((6, len(digits.held_out)), np.nan)
        return Judged(np.zeros((81, NUM_PIXELS)), np.nan, np.nan, np.nan, nothing, np.nan)
    seconds = time.process_time() - start
    held_out, bandwidth = digits.held_out, median_distance(digits.held_out)
    draws, means = fit.draw(draw_key, len(digits.train))
    scores = np.stack([fit.score(jnp.asarray(v, jnp.float32)) for v in (held_out, *others(held_out).values())])
    error = float(((fit.reconstruct(held_out) - held_out) ** 2).mean())
    distances = (mmd2(x, held_out, bandwidth) for x in (draws, means))
    return Judged(np.asarray(means[:81]), *distances, error, scores, seconds)


def kept(path: Path, make: Callable[[], Judged], reuse: bool) -> Judged:
    """A fit from its file, or made and put there."""
    if reuse and path.exists():
        with np.load(path) as file:
            return Judged(*(file[name] if file[name].ndim else float(file[name]) for name in Judged._fields))
    judged = make()
    np.savez_compressed(path, **judged._asdict())
    return judged


def print_table(results: dict[str, list[Judged]], names: list[str]) -> None:
    print(f"\n{'':<13}{'MMD^2 x 1000':>22}{'':>12}{'reconstruction':>16}  AUROC against")
    print(f"{'':<13}{'draws':>17}{'means':>17}{'MSE x 1000':>16}  " + "".join(f"{name:>10}" for name in names) + f"{'seconds':>9}")
    for model, fits in results.items():
        good = [fit for fit in fits if not fit.diverged]
        if not good:
            print(f"{model:<13} all {len(fits)} diverged")
            continue

        def cell(values: list[float]) -> str:
            return f"{np.mean(values):.2f} +- {np.std(values, ddof=1) if len(values) > 1 else np.nan:.2f}"

        columns = [cell([1000 * getattr(fit, name) for fit in good]) for name in ("mmd2_draws", "mmd2_means", "reconstruction")]
        aurocs = np.mean([told_apart(fit.scores) for fit in good], 0)
        seconds = np.mean([fit.seconds for fit in good])
        columns[0] = "-" if model == "bidvl-offset" else columns[0]  # it has no noise
        line = f"{model:<13}{columns[0]:>17}{columns[1]:>17}{columns[2]:>16}  " + "".join(f"{x:>10.3f}" for x in aurocs)
        print(line + f"{seconds:>9.0f}")
        draws = [1000 * fit.mmd2_draws for fit in good]
        if len(fits) > 3 or len(good) < len(fits):
            print(
                f"{'':<13}of {len(fits)} fits {len(fits) - len(good)} diverged; MMD^2 of draws {min(draws):.2f} to {max(draws):.2f}"
            )


def print_floor(seeds: list[int]) -> None:
    """What the training digits score themselves, and a score that knows the mean digit alone."""
    splits = [load_data(seed) for seed in seeds]
    distances = [1000 * mmd2(d.train, d.held_out, median_distance(d.held_out)) for d in splits]
    aurocs = np.mean([told_apart(mean_distances(d)) for d in splits], 0)
    print(f"{'training data':<13}{np.mean(distances):>17.2f}{np.mean(distances):>17.2f}")
    print(f"{'|v - mean|':<13}{'':>50}  " + "".join(f"{x:>10.3f}" for x in aurocs))


def mean_distances(digits: Digits) -> np.ndarray:
    """How far the held-out digits and the other images are from the mean of the training digits, of shape ``(6, 360)``."""
    images = np.stack([np.asarray(digits.held_out), *others(digits.held_out).values()])
    return np.linalg.norm(images - np.asarray(digits.train.mean(0)), axis=-1)


def told_apart(scores: np.ndarray) -> np.ndarray:
    """AUROC of every kind of other images, from scores of the held-out digits and of these."""
    is_other = np.repeat([0, 1], len(scores[0]))
    return np.array([roc_auc_score(is_other, np.concatenate([scores[0], of_others])) for of_others in scores[1:]])


def plot_samples(path: Path, held_out: Array, first: dict[str, Judged], side: int = 9) -> None:
    grids = {"held-out digits": np.asarray(held_out), **{name: fit.means for name, fit in first.items()}}
    columns = -(-len(grids) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(2.6 * columns, 5.8), layout="constrained", squeeze=False)
    for axis, (title, images) in zip(axes.ravel(), grids.items(), strict=False):
        tiles = np.ones((side, 9, side, 9))  # 8 x 8 pixels and a white line
        tiles[:, :8, :, :8] = 1 - images[: side**2].reshape(side, side, 8, 8).transpose(0, 2, 1, 3)
        axis.imshow(tiles.reshape(9 * side, 9 * side)[:-1, :-1], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
    for axis in axes.ravel():
        axis.set_axis_off()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_scores(path: Path, first: dict[str, Judged], names: list[str]) -> None:
    """Scores of the held-out digits and of other images, from the median of the former, in units of their spread."""
    figure, axes = plt.subplots(1, len(first), figsize=(3 * len(first), 2.8), layout="constrained", sharey=True, squeeze=False)
    for axis, (title, fit) in zip(axes[0], first.items(), strict=True):
        center, spread = np.median(fit.scores[0]), fit.scores[0].std()
        axis.boxplot(list(np.arcsinh((fit.scores - center) / spread)), whis=(1, 99), showfliers=False, orientation="horizontal")
        axis.set_yticks(range(1, 7), ["digits", *names])
        ticks = np.array([-10, 0, 10, 100, 1000])
        axis.set_xticks(np.arcsinh(ticks), ticks)
        axis.set(title=title, xlabel="score, in standard deviations")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps = 4 if args.smoke else args.num_steps
    seeds = [0] if args.smoke else range(args.seeds)
    models = [name for name in args.models if not args.smoke or name not in ("bism", "bidvl-offset")]  # which run as others do
    results: dict[str, list[Judged]] = {name: [] for name in models}
    for seed in seeds:
        digits = load_data(seed)
        if args.smoke:
            digits = digits._replace(
                train=digits.train[:300], held_out=digits.held_out[:30], train_labels=digits.train_labels[:300]
            )
        for name in models:
            make = partial(judge, jax.random.key(seed), name, digits, num_steps)
            results[name].append(kept(args.output / f"{name}_{seed}_{num_steps}.npz", make, args.reuse))
            fit = results[name][-1]
            print(f"seed {seed}, {name}: MMD^2 {fit.mmd2_draws:.2e}, {fit.seconds:.0f} s", flush=True)
    names = list(others(load_data(0).held_out))
    print_table(results, names)
    print_floor(list(seeds))
    first = {name: fits[0] for name, fits in results.items()}
    plot_samples(args.output / "samples.png", load_data(0).held_out, first)
    plot_scores(args.output / "energies.png", first, names)
    print(f"The figures are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Handwritten digits by five engines")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, default=3, help="fits of each")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="steps of each fit")
    parser.add_argument("--reuse", action="store_true", help="take the fits that are in --output")
    parser.add_argument("--output", type=Path, default=Path("outputs/bidvl_digits"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
