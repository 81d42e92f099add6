# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A deep energy-based latent variable model of MNIST
==================================================

Handwritten digits as an energy of an image and fifty latents, learned by bi-level score matching [1],

.. math::

    p(v, h) = \frac{e^{-E(v, h)}}{Z}, \qquad E(v, h) = g_3(g_2(g_1(v), h)),

with a residual network :math:`g_1` and the additive coupling :math:`g_2` of [1] (``nets/eblvm.py``). The upper level matches the
score of :math:`v` to denoised images at many levels of noise, for the distribution of the images with noise of :math:`\sigma_0 =
.1`; the lower level fits a convolutional Gaussian guide :math:`q(h \mid v)` to the posterior by their Fisher divergence, five
steps for each of the model's. The gradient does not pass through the guide (N = 0), as published: it lacks the posterior's
covariance.

``--engine vages`` learns the same networks by variational estimates of the score and of its gradient [2], from two samples of the
guide for every factor, each moved by five Langevin steps that are nearly without noise: its gradient has the covariance.

``--size full`` is the published setting (images of 32 x 32, 9.9 million weights, noise up to 3, 100,000 steps) and needs a GPU.
``--size reduced``, the default, is for two cores and ten minutes: images of 16 x 16, noise up to 1.2, 5000 steps at ten
times the rate, and two changes that take it from strokes to digits in that time:

* Images have the base distribution :math:`N(\bar v, \sigma_0^2)` about the mean image instead of the flat one. Far from the data,
  the best that denoising can do is to return the mean image, and that is the score of this distribution: the energy learns what
  is left, where the published network has to learn a bowl of curvature :math:`1 / \sigma_0^2 = 100` out of nothing.
* :math:`g_1` has dense blocks instead of convolutions, as for points in the plane: a fifth of the time for a step.

Images are samples :math:`v \mid h` by annealed Langevin dynamics from
noise, at the guide's mean :math:`h` of a random training image ("via q"), as in [1]; the last step takes off the noise of
:math:`\sigma_0`. Weights are exponential moving averages, by ``optax.ema``.

The script prints, on test images:

* the error of denoising, :math:`v + \sigma_0^2 \nabla_v \log p`, by level of noise: what the score is trained for;
* what the latents know of the digits: the accuracy of a linear classifier of the guide's means, compared with that of pixels.

It writes to ``--output``: ``samples.png``, training images and samples; ``given_latents.png``, images and samples given their
latents; ``latents.png``, the guide's means of test images in a plane; ``loss.png``; ``weights.eqx``, the networks.

**References**

1. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020, arXiv:2010.07856.
2. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
   arXiv:2010.08258.
"""

# sphinx_gallery_thumbnail_path = "_static/mnist_eblvm_samples.png"

import argparse
import time
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
from jax import Array
from nets.eblvm import CoupledEnergy, GaussianGuide, dense_energy, image_energy, image_guide
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from numpyro_ebm import (
    BaseMeasure,
    BiSM,
    MultiscaleDenoisingScoreMatching,
    PosteriorFisher,
    Unrolled,
    VaGES,
    Variational,
    amortized_normal,
    annealed_langevin,
    annealing_schedule,
    denoise,
)
from numpyro_ebm.datasets import LabeledImages, mnist

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_LATENTS, BATCH_SIZE, INNER_STEPS = 50, 100, 5
SIGMA0 = 0.1  # noise of what is learned, and the least that images are given
# what [2] moves samples of the guide by: gradient steps, nearly without noise
REFINE_STEPS, REFINE_STEP, REFINE_TEMPERATURE = 5, 5e-3, 1e-6
NUM_LABELLED, NUM_TEST = 10_000, 2000  # images for the classifiers, and to judge by


class Size(NamedTuple):
    """How large the problem is."""

    side: int  # of the images, 16 or 32
    energy: Callable[[Array, tuple[int, int, int], int], CoupledEnergy]  # of a key, the shape of an image, the number of latents
    guide_channels: int
    has_base: bool  # whether images have a base distribution about their mean, or a flat one
    largest_sigma: float
    spacing: str  # of the levels of noise
    num_steps: int
    num_warmup: int  # of them, with a rate that rises from 0
    learning_rate: float
    last_rate: float  # cosine decay
    ema_decay: float
    num_images: int  # in a grid of samples
    temperatures: np.ndarray


SIZES = {
    "smoke": Size(
        16, partial(dense_energy, width=8), 2, True, 1.2, "linear", 4, 1, 1e-3, 1e-5, 0.9, 9, annealing_schedule(2, 6, 2)
    ),
    "reduced": Size(
        16, partial(dense_energy, width=512), 16, True, 1.2, "linear", 5000, 100, 1e-3, 1e-5, 0.995, 64, annealing_schedule()
    ),
    "full": Size(32, image_energy, 64, False, 3.0, "geometric", 100_000, 0, 1e-4, 1e-6, 0.999, 100, annealing_schedule()),
}


class Nets(NamedTuple):
    """What the model and the guide are made of."""

    energy: CoupledEnergy  # (image, latents) -> scalar
    encoder: GaussianGuide  # image -> mean and log scale of the latents
    mean: Array | None  # the image that the base distribution is about; none if it is flat


class Images(NamedTuple):
    """Images with pixels in [0, 1], of shape ``(num_images, side, side, 1)``, and what they show."""

    pixels: Array
    labels: np.ndarray


def prepared(raw: LabeledImages, side: int) -> Images:
    """Images with a border of two pixels, as in the paper; halved if ``side`` is 16."""
    pixels = np.pad(raw.images.astype(np.float32) / 255, [(0, 0), (2, 2), (2, 2)])
    factor = 32 // side
    pixels = pixels.reshape(len(pixels), side, factor, side, factor).mean((2, 4))
    return Images(jnp.asarray(pixels[..., None]), raw.labels)


def load_data(smoke: bool) -> tuple[LabeledImages, LabeledImages]:
    try:
        train, test = mnist(train=True), mnist(train=False)
    except FileNotFoundError:
        if not smoke:
            raise
        print("MNIST is not there: random images of the same shape stand in, to see that everything runs.")
        rng = np.random.default_rng(0)
        train = test = LabeledImages(rng.integers(0, 255, (500, 28, 28)).astype(np.uint8), np.arange(500, dtype=np.uint8) % 10)
    if smoke:
        train, test = (LabeledImages(part.images[:500], part.labels[:500]) for part in (train, test))
    return train, test


def base_law(nets: Nets, image_shape: tuple[int, ...]) -> dist.Distribution:
    return BaseMeasure(constraints.real, image_shape) if nets.mean is None else dist.Normal(nets.mean, SIGMA0).to_event(3)


def log_joint(nets: Nets, v: Array, h: Array) -> Array:
    """The model's log density of images and latents, of shape ``(batch,)``, up to a constant."""
    return base_law(nets, v.shape[1:]).log_prob(v) - jax.vmap(nets.energy)(v, h)


def model(v: Array, nets: Nets) -> None:
    energy = eqx_module("energy", nets.energy)
    with numpyro.plate("images", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.real, (NUM_LATENTS,)))
        numpyro.sample("v", base_law(nets, v.shape[1:]), obs=v)
        numpyro.factor("coupling", -jax.vmap(energy)(v, h))


def guide(v: Array, nets: Nets) -> None:
    encoder = eqx_module("encoder", nets.encoder)
    with numpyro.plate("images", len(v)):
        numpyro.sample("h", amortized_normal(encoder, v))


def with_average(optim: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """An optimizer that keeps ``optax.ema`` of the parameters it makes in its state."""
    ema = optax.ema(decay)

    def follow(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, ema.update(optax.apply_updates(params, updates), state)[1]

    return optax.chain(optim, optax.GradientTransformation(ema.init, follow))


def make_engine(size: Size, name: str) -> BiSM | VaGES:
    def adam(steps_per_update: int) -> optax.GradientTransformation:
        warmup, total = size.num_warmup * steps_per_update, size.num_steps * steps_per_update
        schedule = optax.warmup_cosine_decay_schedule(0.0, size.learning_rate, warmup, total, size.last_rate)
        return with_average(optax.adam(schedule, b1=0.9, b2=0.95), size.ema_decay ** (1 / steps_per_update))

    objective = MultiscaleDenoisingScoreMatching(SIGMA0, SIGMA0, size.largest_sigma, size.spacing)
    shared = model, guide, adam(1), adam(INNER_STEPS), objective, PosteriorFisher(), INNER_STEPS
    if name == "bism":
        return BiSM(*shared, hypergradient=Unrolled(0), batch_size=BATCH_SIZE)
    refine = partial(annealed_langevin, step_size=REFINE_STEP, temperatures=np.full(REFINE_STEPS, REFINE_TEMPERATURE))
    return VaGES(*shared, estimate=Variational(num_samples=2, refine=refine), batch_size=BATCH_SIZE)


def averaged(nets: Nets, state: Any, size: Size) -> Nets:
    """The networks with the moving averages of their weights."""
    states = {"energy": (state.optim_state, 1), "encoder": (state.guide_optim_state, INNER_STEPS)}

    def average(name: str) -> Any:
        optim_state, steps_per_update = states[name]
        _, kept = optim_state
        weights = optax.tree.bias_correction(kept.ema, size.ema_decay ** (1 / steps_per_update), kept.count)
        return eqx.combine(weights[f"{name}$params"], getattr(nets, name))

    return nets._replace(**{name: average(name) for name in states})


@eqx.filter_jit
def latent_means(nets: Nets, v: Array) -> Array:
    return jax.lax.map(lambda v: nets.encoder(v)[0], v, batch_size=500)


@eqx.filter_jit
def denoised(rng_key: Array, nets: Nets, v: Array) -> Array:
    """Noisy images without their noise, by the score of the model at a sample of the guide, as it is learned."""

    def log_ratio(v: Array, key: Array) -> Array:
        q = amortized_normal(nets.encoder, v)
        h = jax.lax.stop_gradient(q.sample(key))
        return log_joint(nets, v, h) - q.log_prob(h)

    def chunk(v_and_key: tuple[Array, Array]) -> Array:
        v, key = v_and_key
        return denoise(lambda v: log_ratio(v, key), v, SIGMA0)

    chunks = v.reshape(-1, 100, *v.shape[1:])
    return jax.lax.map(chunk, (chunks, jax.random.split(rng_key, len(chunks)))).reshape(v.shape)


@eqx.filter_jit
def draw_given(rng_key: Array, nets: Nets, h: Array, image_shape: tuple[int, int, int], temperatures: np.ndarray) -> Array:
    """Images given latents, by annealed Langevin dynamics from noise, in [0, 1]."""
    start_key, run_key = jax.random.split(rng_key)

    def log_prob(v: Array) -> Array:
        return log_joint(nets, v, h)

    v = annealed_langevin(run_key, log_prob, 0.5 + jax.random.normal(start_key, (len(h), *image_shape)), temperatures=temperatures)
    return jnp.clip(denoise(log_prob, v, SIGMA0), 0, 1)


def print_denoising(rng_key: Array, nets: Nets, test: Array, largest_sigma: float) -> None:
    rest = float(jnp.sqrt(((test - test.mean(0)) ** 2).mean()))
    print(f"\nError of {len(test)} denoised test images per pixel, root mean square. The mean image has {rest:.3f}.")
    for sigma in (sigma for sigma in (0.1, 0.2, 0.3, 0.5, 1.0, 3.0) if sigma <= largest_sigma):
        noise_key, draw_key, rng_key = jax.random.split(rng_key, 3)
        noisy = test + sigma * jax.random.normal(noise_key, test.shape)
        error = jnp.sqrt(((denoised(draw_key, nets, noisy) - test) ** 2).mean())
        print(f"  noise {sigma:<4g} error {error:.3f}")


def print_accuracy(nets: Nets, train: Images, test: Images) -> None:
    """Of a linear classifier of latents and of pixels, fitted to training images and judged by test images."""
    train, test = (Images(part.pixels[:NUM_LABELLED], part.labels[:NUM_LABELLED]) for part in (train, test))
    features = {
        "the guide's means": [np.asarray(latent_means(nets, part.pixels)) for part in (train, test)],
        "pixels": [np.asarray(part.pixels).reshape(len(part.pixels), -1) for part in (train, test)],
    }
    for name, (x, x_test) in features.items():
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, train.labels)
        print(f"Linear classifier of {name}: accuracy {classifier.score(x_test, test.labels):.3f} on {len(x_test)} test images")


def plot_grids(path: Path, grids: dict[str, Array]) -> None:
    """Grids of images side by side; each has shape ``(rows, columns, side, side, 1)``."""
    figure, axes = plt.subplots(1, len(grids), figsize=(5 * len(grids), 5.2), layout="constrained", squeeze=False)
    for axis, (title, images) in zip(axes[0], grids.items(), strict=True):
        rows, columns, side = images.shape[:3]
        tiles = np.pad(1 - np.asarray(images[..., 0]), [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=1)
        axis.imshow(tiles.transpose(0, 2, 1, 3).reshape(rows * (side + 1), columns * (side + 1)), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_latents(path: Path, means: np.ndarray, labels: np.ndarray) -> None:
    """The guide's means along their two widest directions."""
    centered = means - means.mean(0)
    points = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T
    figure, axis = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    scatter = axis.scatter(*points.T, c=labels, cmap="tab10", s=5, linewidth=0, vmin=-0.5, vmax=9.5)
    axis.set(xlabel="first principal direction", ylabel="second", title="the guide's means of test images")
    figure.colorbar(scatter, ax=axis, label="digit", ticks=range(10))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_loss(path: Path, losses: np.ndarray) -> None:
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    axis.plot(np.arange(len(losses)) + 1, losses, linewidth=0.6)
    axis.set(xlabel="step", ylabel="multi-scale denoising loss", yscale="log")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    size = SIZES["smoke" if args.smoke else args.size]
    size = size if args.num_steps is None or args.smoke else size._replace(num_steps=args.num_steps)
    keys = jax.random.split(jax.random.key(args.seed), 8)
    train, test = (prepared(part, size.side) for part in load_data(args.smoke))
    shape = train.pixels.shape[1:]
    nets = Nets(
        size.energy(keys[0], shape, NUM_LATENTS),
        image_guide(keys[1], shape, NUM_LATENTS, size.guide_channels),
        train.pixels.mean(0) if size.has_base else None,
    )
    counts = [sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(net, eqx.is_array))) for net in nets[:2]]
    print(f"Images of {size.side} x {size.side}, {counts[0]:,} weights in the model, {counts[1]:,} in the guide")

    begin = time.perf_counter()
    result = make_engine(size, args.engine).run(keys[2], size.num_steps, train.pixels, nets)
    print(f"{size.num_steps} steps in {time.perf_counter() - begin:.0f} seconds, compilation included")
    fitted = averaged(nets, result.state, size)
    eqx.tree_serialise_leaves(args.output / "weights.eqx", fitted)
    plot_loss(args.output / "loss.png", np.asarray(result.losses))

    print_denoising(keys[3], fitted, test.pixels[:NUM_TEST], size.largest_sigma)
    print_accuracy(fitted, train, test)
    plot_latents(args.output / "latents.png", np.asarray(latent_means(fitted, test.pixels[:NUM_TEST])), test.labels[:NUM_TEST])

    begin, side = time.perf_counter(), int(size.num_images**0.5)
    chosen = train.pixels[jax.random.choice(keys[4], len(train.pixels), (size.num_images,), replace=False)]
    draws = draw_given(keys[5], fitted, latent_means(fitted, chosen), shape, size.temperatures)
    rows = test.pixels[:side]
    h = jnp.tile(latent_means(fitted, rows), (side - 1, 1))
    given = draw_given(keys[6], fitted, h, shape, size.temperatures).reshape(side - 1, side, *shape)
    print(f"Draws in {time.perf_counter() - begin:.0f} seconds")
    grids = {"training images": chosen, "samples given the latents of these": draws}
    plot_grids(args.output / "samples.png", {title: x.reshape(side, side, *shape) for title, x in grids.items()})
    plot_grids(
        args.output / "given_latents.png",
        {"test images, and below samples given their latents": jnp.concatenate([rows[None], given])},
    )
    print(f"The figures are in {args.output}. All of it took {time.process_time():.0f} seconds of processors.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A deep energy-based latent variable model of MNIST")
    parser.add_argument("--size", choices=["reduced", "full"], default="reduced")
    parser.add_argument("--engine", choices=["bism", "vages"], default="bism")
    parser.add_argument("--num-steps", type=int, help="instead of that of the size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/mnist_eblvm"))
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny networks, to see that everything runs")
    main(parser.parse_args())
