# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A learned energy prior for color images
=======================================

The model of ``energy_prior_digits.py`` on photographs of 32 x 32 pixels, with the networks of Pang et al. [1], learned by EBIPLA
[2]: a run of hours on a GPU, which is saved as it goes and goes on where it was ended.

.. math::

    p(z) = \frac{e^{-E(z)}}{Z} \, N(z; 0, I), \qquad x \mid z \sim N(g(z), \sigma^2 I), \qquad \sigma = 0.3,

with pixels in [-1, 1], 100 latents, a generator :math:`g` of four transposed convolutions and an energy :math:`E` with two hidden
layers (``nets/lebm.py``). Each training image has ``--num-particles`` latents, which follow its posterior by Langevin dynamics.
As in the paper the fit starts with one particle for each image and ten moves of it at every step, and then every particle is
copied; the energy has short-run chains, of 60 moves from N(0, I). Other than there, particles rest between their batches.

* ``--size full`` is the published setting, for a GPU: 200 epochs of batches of 128 with 10 particles each.
* ``--size small`` is for two cores and some ten minutes: a quarter of the generator's channels, and smaller batches.

``--precision`` is that of the networks: ``float32``; ``tf32``, by which a GPU multiplies float32 matrices faster, with 10 bits
behind the point; ``bfloat16`` for everything inside them. Weights, latents, energies and sums over pixels are float32 always.
``--decoder`` says how the transposed convolutions are written, which changes their speed alone: ``matmul`` on a CPU, ``deconv``
on a GPU if it is not given.

The data are CIFAR-10, or the 5000 images of it that the data folder may hold; ``--data`` is an ``.npy`` file of other images, uint8
of ``(num_images, 32, 32, 3)``, of which the last tenth is held out.

After every run the script judges the fit, on images that it has not seen:

* the error of reconstruction, a mean square per pixel and color, of training images from their particles and of test images
  from samples of the posterior of their latents, by MALA;
* a Frechet distance on the features of a small network that is trained here on the labels (``nets/features.py``), between the test
  images and samples: decoded from short chains like those of the fit, and from 1000 moves of MALA, which are of the prior itself.
  It is not the FID of the literature. Without labels it is left out.

It writes to ``--output``: ``images.png``, ``loss.png``, ``metrics.json`` with an entry for every run, and ``checkpoints``, every
ten minutes and at the end. Run again with the same folder it goes on from there, to ``--num-steps`` in all: after Ctrl-C, after a
crash, or for longer. Other networks or settings in the same folder are refused.

**References**

1. Pang et al., *Learning latent space energy-based prior model*, NeurIPS 2020, arXiv:2006.08205.
2. Marks et al., *Energy-based interacting particle Langevin algorithm*, UAI 2026, arXiv:2510.12311, algorithm 3.
"""

# sphinx_gallery_thumbnail_path = "_static/energy_prior_images.png"

import argparse
import json
import time
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
from nets.features import FeatureNet, accuracy, features_of, frechet_distance, train_features
from nets.lebm import Energy, Generator
from numpyro.contrib.module import eqx_module

from numpyro_ebm import MALA, ParticleMMLE, TiltedDistribution, UnadjustedLangevin, sample_posterior
from numpyro_ebm.datasets import cifar10

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE = 0.3  # sigma of the likelihood
WARMUP_STEP, NUM_WARMUP_MOVES = 0.005, 10  # as published: the s = .1 of Pang et al. is h = s^2 / 2
PARTICLE_STEP = 0.001  # the published .1 would be a hundred times above the limit of stability
PRIOR_STEP = 0.1
RATES, EPOCH_DECAY = {"generator": 1e-3, "energy": 2e-4}, 0.999
MOMENTA = {"generator": (0.9, 0.999), "energy": (0.5, 0.999)}
NUM_FEATURE_EPOCHS, CHUNK = 10, 100


class Size(NamedTuple):
    """How large the problem is."""

    num_latents: int
    width: int  # of the generator
    energy_width: int
    batch_size: int
    num_particles: int
    num_prior_steps: int
    num_warmup: int  # steps with one particle
    num_steps: int  # all of them
    num_test: int  # images that samples are judged by
    num_reconstructed: int  # of them
    num_long_moves: int  # of chains of the prior, and a fifth as many of the posterior


SIZES = {
    "full": Size(100, 64, 200, 128, 10, 60, 10_000, 78_000, 5000, 1000, 1000),
    "small": Size(100, 16, 200, 64, 4, 60, 300, 3000, 1000, 128, 1000),
    "smoke": Size(8, 2, 16, 20, 2, 5, 4, 8, 64, 64, 50),
}


class Nets(NamedTuple):
    """The networks as they are before the fit."""

    generator: Generator
    energy: Energy


class Data(NamedTuple):
    """Images, uint8, to learn from and to judge by, and their labels if they have any."""

    train: np.ndarray
    test: np.ndarray
    labels: tuple[np.ndarray, np.ndarray] | None


def model(images: Array, nets: Nets, batch_size: int | None = None) -> None:
    generator, energy = eqx_module("generator", nets.generator), eqx_module("energy", nets.energy)
    with numpyro.plate("images", len(images), subsample_size=batch_size):
        batch = numpyro.subsample(images, event_dim=3)
        z = numpyro.sample("z", prior(nets, energy))
        numpyro.sample("image", dist.Normal(generator(z), NOISE).to_event(3), obs=pixels(batch))


def prior(nets: Nets, energy: Energy, **settings: Any) -> TiltedDistribution:
    num_latents = nets.generator.first[0].shape[0]
    return TiltedDistribution(dist.Normal(0, 1).expand([num_latents]).to_event(1), energy, **settings)


def pixels(images: Any) -> Any:
    """Pixels from 0 to 255 as numbers in [-1, 1]."""
    return images / np.float32(127.5) - 1


@eqx.filter_jit
def make_nets(key: Array, size: Size, form: str, dtype: Any) -> Nets:
    generator_key, energy_key = jax.random.split(key)
    generator = Generator(generator_key, size.num_latents, size.width, form, dtype)
    return Nets(generator, Energy(energy_key, size.num_latents, size.energy_width, dtype))


def trained(nets: Nets, params: dict[str, Any]) -> Nets:
    """The networks with the weights of a fit."""
    return Nets(*(eqx.combine(params[f"{name}$params"], net) for name, net in nets._asdict().items()))


def make_optimizer(steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam for both networks, whose rates fall a little with each epoch."""

    def adam(name: str) -> optax.GradientTransformation:
        b1, b2 = MOMENTA[name]
        return optax.adam(optax.exponential_decay(RATES[name], steps_per_epoch, EPOCH_DECAY, staircase=True), b1, b2)

    return optax.partition({name: adam(name) for name in RATES}, lambda params: {name: name.split("$")[0] for name in params})


def make_engine(size: Size, num_images: int, **settings: Any) -> ParticleMMLE:
    return ParticleMMLE.ebipla(
        model,
        make_optimizer(num_images // size.batch_size),
        num_chains=size.batch_size,
        prior_step_size=PRIOR_STEP,
        num_prior_steps=size.num_prior_steps,
        noise="batch",
        **settings,
    )


def load_data(path: Path | None, smoke: bool) -> Data:
    if path is not None:
        images = np.load(path, mmap_mode="r")
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
            raise ValueError(f"{path} has {images.dtype} of shape {images.shape}: uint8 of (num_images, 32, 32, 3) is wanted.")
        num_train = len(images) - len(images) // 10
        return Data(np.asarray(images[:num_train]), np.asarray(images[num_train:]), None)
    try:
        train, test = cifar10(train=True), cifar10(train=False)
    except FileNotFoundError:
        if not smoke:
            raise
        print("CIFAR-10 is not there: random images stand in, to see that everything runs.")
        images = np.random.default_rng(0).integers(0, 255, (400, 32, 32, 3)).astype(np.uint8)
        return Data(images[:300], images[300:], (np.arange(300) % 10, np.arange(100) % 10))
    num = 300 if smoke else None
    return Data(train.images[:num], test.images[:num], (train.labels[:num], test.labels[:num]))


def decoded(generator: Generator, z: Array) -> np.ndarray:
    """The means of images, a few at a time."""
    decode = eqx.filter_jit(generator)
    return np.concatenate([np.asarray(decode(z[i : i + CHUNK])) for i in range(0, len(z), CHUNK)])


def mean_square(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean())


def judge(
    key: Array, params: dict[str, Any], particles: Array, data: Data, nets: Nets, size: Size, features: FeatureNet | None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The numbers of a fit, and the images to look at."""
    posterior_key, short_key, long_key = jax.random.split(key, 3)
    train, test = data.train[: size.num_test], data.test[: size.num_test]
    fitted = trained(nets, params)
    samplers = {
        "short chains": UnadjustedLangevin(PRIOR_STEP, size.num_prior_steps),
        "long chains": MALA(num_steps=size.num_long_moves),
    }
    moves = {"num_chains": 1, "num_samples": 1, "num_warmup": size.num_long_moves // 50}  # runs of 10 moves each
    some = test[: size.num_reconstructed]
    latents = {"test images": sample_posterior(posterior_key, model, params, jnp.asarray(some), nets, **moves)["z"][0, 0]}
    latents["training images"] = particles[0, : len(some)]
    for (name, sampler), sample_key in zip(samplers.items(), (short_key, long_key), strict=True):
        latents[name] = prior(nets, fitted.energy, sampler=sampler).sample(sample_key, (len(test),))
    images = {name: decoded(fitted.generator, z) for name, z in latents.items()}
    numbers = {
        "MSE of training images": mean_square(images["training images"], pixels(train[: len(some)])),
        "MSE of test images": mean_square(images["test images"], pixels(some)),
        "MSE of the mean image": mean_square(pixels(data.train).mean(0), pixels(some)),
    }
    if features is not None:
        of_test = features_of(features, pixels(test))
        sets = {"training images": pixels(train)} | {f"samples of {name}": images[name] for name in samplers}
        for name, others in sets.items():
            numbers[f"Frechet distance of {name}"] = frechet_distance(features_of(features, others), of_test)
    return numbers, images


def plot_images(path: Path, grids: dict[str, np.ndarray]) -> None:
    """Grids of 64 images in [-1, 1] side by side."""
    figure, axes = plt.subplots(1, len(grids), figsize=(3.9 * len(grids), 4.2), layout="constrained")
    for axis, (title, images) in zip(axes, grids.items(), strict=True):
        side = int(min(len(images), 64) ** 0.5)
        tiles = np.clip((1 + np.asarray(images[: side**2])) / 2, 0, 1).reshape(side, side, 32, 32, 3)
        tiles = np.pad(tiles, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)], constant_values=1)
        axis.imshow(tiles.swapaxes(1, 2).reshape(side * 33, side * 33, 3))
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)


def plot_loss(path: Path, losses: np.ndarray, start: int) -> None:
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    axis.plot(start + np.arange(len(losses)) + 1, losses, linewidth=0.4)
    axis.set(xlabel="step", ylabel="loss per image, up to log Z")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def fit_images(key: Array, images: Array, nets: Nets, size: Size, folder: Path) -> Any:
    """One particle for each image at first, with ten moves at every step; then all of them, with one.

    Both runs are saved as they go, and go on from what there is in the folder; one that is done is read and makes no step.
    """
    first = make_engine(size, len(images), num_particles=1, num_moves=NUM_WARMUP_MOVES, step_size=WARMUP_STEP)
    engine = make_engine(size, len(images), num_particles=size.num_particles, step_size=PARTICLE_STEP)
    data, num_warmup = (images, nets, size.batch_size), min(size.num_steps, size.num_warmup)
    result = first.run(key, num_warmup, *data, report=False, checkpoint=folder / "warmup")
    if size.num_steps == num_warmup:
        return result
    state = engine.replicate(result.state)
    return engine.run(key, size.num_steps - num_warmup, *data, init_state=state, checkpoint=folder / "fit")


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if args.precision == "tf32" else "highest")
    name = "smoke" if args.smoke else args.size
    size = SIZES[name]
    given = {field: getattr(args, field) for field in ("num_steps", "num_particles", "batch_size", "num_warmup")}
    size = size._replace(**{field: value for field, value in given.items() if value is not None})
    form = args.decoder or ("matmul" if jax.default_backend() == "cpu" else "deconv")
    net_key, fit_key, judge_key, feature_key = jax.random.split(jax.random.key(args.seed), 4)
    data = load_data(args.data, name == "smoke")
    nets = make_nets(net_key, size, form, jnp.bfloat16 if args.precision == "bfloat16" else jnp.float32)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array))) for net in nets]
    print(f"{len(data.train)} images; weights of generator and energy: {counts[0]:,} and {counts[1]:,}; {size}")

    begin = time.perf_counter()
    result = fit_images(fit_key, jnp.asarray(data.train), nets, size, args.output / "checkpoints")
    seconds, step = time.perf_counter() - begin, int(result.state.num_steps)
    print(f"at step {step}, after {seconds:.0f} seconds, compilation included")
    plot_loss(args.output / "loss.png", np.asarray(result.losses) / len(data.train), step - len(result.losses))

    features, numbers = None, {"step": step, "seconds": seconds, "processor seconds": time.process_time()}
    if data.labels is not None:
        labels, test_labels = data.labels
        features = train_features(feature_key, pixels(data.train), labels, 1 if name == "smoke" else NUM_FEATURE_EPOCHS)
        numbers["accuracy of the features' network"] = accuracy(features, pixels(data.test), test_labels)
    found, images = judge(judge_key, result.params, result.state.particles["z"], data, nets, size, features)
    numbers |= found
    for what, value in numbers.items():
        print(f"{what:<55}{value:>12.5g}")
    settings = {"size": size._asdict(), "precision": args.precision, "decoder": form, "device": jax.devices()[0].device_kind}
    path = args.output / "metrics.json"
    history = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*history, settings | numbers], indent=1))
    pairs = np.stack([pixels(data.test[:32]).reshape(4, -1, 32, 32, 3), images["test images"][:32].reshape(4, -1, 32, 32, 3)], 1)
    grids = {"test images, reconstructions below": pairs.reshape(-1, 32, 32, 3), "samples of short chains": images["short chains"]}
    plot_images(args.output / "images.png", grids | {"samples of long chains": images["long chains"]})
    print(f"The figures and metrics.json are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A learned energy prior for color images")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--num-steps", type=int, help="all steps, those of earlier runs in the same folder included")
    parser.add_argument("--num-warmup", type=int, help="steps with one particle for each image")
    parser.add_argument("--num-particles", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32")
    parser.add_argument("--decoder", choices=["deconv", "matmul"], help="how transposed convolutions are computed")
    parser.add_argument("--data", type=Path, help="an .npy file of images, in place of CIFAR-10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/energy_prior_images"))
    parser.add_argument("--smoke", action="store_true", help="the same as --size smoke: a few steps of tiny networks")
    main(parser.parse_args())
