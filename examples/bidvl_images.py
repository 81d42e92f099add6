# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
An energy of images, with an encoder and a generator
====================================================

An energy :math:`E(v)` of images, learned using bi-level doubly variational learning [1] without Markov chains: a generator
replaces samples of the energy, and an encoder :math:`q(h \mid v)` its posterior. Afterwards the generator makes new images,
encoder and generator reconstruct, and the energy tells images of the kind it has seen from others.

* ``--size full`` is the published setting for CIFAR-10: convolutional networks with spectral and batch normalization
  (``nets/bidvl.py``), the softplus of the energy, means instead of samples (``noise=False``), 600 epochs. It needs a GPU. MNIST is
  padded to 32 x 32 for the same networks.
* ``--size reduced``, the default, is for two cores and some minutes: images of 16 x 16, dense networks, and the hinge of the
  paper's residual networks as upper level, with ``SCALE`` times a network of spectral norm 1 as energy.

Spectral norms and batch statistics are kept in mutable sites of the three programs. Pixels are in [-1, 1].

The hinge asks for an energy below -1 of data and above 1 of generated images. Such an energy ranks images, and
its scale is that of the hinge, not that of a log density. Samples are refined by Langevin dynamics at a low temperature, which the
energy's program takes as an argument.

The script prints the error of reconstruction, and by the kind of other images the area under the ROC curve (AUROC) of telling
them from test images: by the energy, and for comparison by the error of reconstruction. The paper also has SVHN, CelebA and
textures, which this package does not load.

It writes to ``--output``: ``images.png``, ``energies.png``, ``loss.png``, and ``weights.eqx``, params and mutable sites.

**References**

1. Kan et al., *Bi-level doubly variational learning for energy-based latent variable models*, CVPR 2022, arXiv:2203.14702.
"""

# sphinx_gallery_thumbnail_path = "_static/bidvl_images.png"

import argparse
import time
from collections.abc import Callable
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
from equinox.nn import State
from jax import Array
from nets.bidvl import (
    Encoder,
    Energy,
    Generator,
    conv_encoder,
    conv_energy,
    conv_generator,
    dense_encoder,
    dense_energy,
    dense_generator,
    energy_with_state,
    with_state,
)
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from numpyro_ebm import BiDVL, EnergyDistribution, UnadjustedLangevin
from numpyro_ebm.datasets import cifar10, frey_faces, mnist
from numpyro_ebm.infer import Difference, Hinge, LowerLevel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GENERATOR_SCALE = 0.5**0.5  # makes the likelihood the squared error of the paper
NUM_TEST, CHUNK = 1000, 100  # images of every kind to judge by, and at a time
SCALE = 20.0  # of the energy without softplus
TEMPERATURE = 1e-3
LANGEVIN = UnadjustedLangevin(step_size=1e-5, num_steps=50)


class Size(NamedTuple):
    """How large the problem is."""

    side: int  # of the images, 16 or 32
    makers: tuple[Callable[..., Energy], Callable[..., Encoder], Callable[..., Generator]]
    energy_width: int
    width: int  # of encoder and generator
    num_latents: int
    softplus: bool  # of the energy, as published; else it is scaled
    upper: Difference | Hinge
    batch_size: int
    num_epochs: int
    rates: tuple[float, float]  # of the energy; of encoder and generator
    epoch_decay: float | None  # of the rates; down to a twentieth by a cosine if none
    weight_decay: float  # of encoder and generator


DENSE, CONV = (dense_energy, dense_encoder, dense_generator), (conv_energy, conv_encoder, conv_generator)
SIZES = {
    "reduced": Size(16, DENSE, 384, 384, 20, False, Hinge(), 64, 8, (1e-3, 1e-3), None, 0.0),
    "full": Size(32, CONV, 64, 48, 100, True, Difference(), 100, 600, (1e-4, 3e-4), 0.998, 1e-4),
}


class Nets(NamedTuple):
    """The networks, each with its state."""

    energy: tuple[Energy, State]
    encoder: tuple[Encoder, State]
    generator: tuple[Generator, State]


def energy(v: Array, nets: Nets, size: Size, *, training: bool = True, temperature: float = 1.0) -> None:
    net = energy_with_state("energy", *nets.energy, training=training)

    def of_image(v: Array) -> Array:
        return (jax.nn.softplus(net(v)) if size.softplus else SCALE * net(v)) / temperature

    with numpyro.plate("images", len(v)):
        numpyro.sample("v", EnergyDistribution(of_image, event_shape=v.shape[1:]), obs=v)


def encoder(v: Array, nets: Nets, size: Size, *, training: bool = True, **_: Any) -> None:
    mean, log_var = with_state("encoder", *nets.encoder, training=training)(v)
    with numpyro.plate("images", len(v)):
        numpyro.sample("h", dist.Normal(mean, jnp.exp(log_var / 2)).to_event(1))


def generator(v: Array, nets: Nets, size: Size, *, training: bool = True, **_: Any) -> None:
    net = with_state("generator", *nets.generator, training=training)
    with numpyro.plate("images", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1).expand([size.num_latents]).to_event(1))
        numpyro.sample("v", dist.Normal(net(h), GENERATOR_SCALE).to_event(3), obs=v)


@eqx.filter_jit
def make_nets(key: Array, size: Size, shape: tuple[int, int, int]) -> Nets:
    keys, (make_energy, make_encoder, make_generator) = jax.random.split(key, 3), size.makers
    make = eqx.nn.make_with_state
    return Nets(
        make(make_energy)(keys[0], shape, size.energy_width),
        make(make_encoder)(keys[1], shape, size.num_latents, size.width),
        make(make_generator)(keys[2], shape, size.num_latents, size.width),
    )


def make_engine(size: Size, num_steps: int, steps_per_epoch: int) -> BiDVL:
    def adam(rate: float, weight_decay: float = 0.0) -> optax.GradientTransformation:
        if size.epoch_decay is None:
            schedule = optax.cosine_decay_schedule(rate, num_steps, alpha=0.05)
        else:
            schedule = optax.exponential_decay(rate, steps_per_epoch, size.epoch_decay, staircase=True)
        return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(schedule, b1=0.0, b2=0.9))

    of_energy, of_others = size.rates
    return BiDVL(
        energy,
        encoder,
        generator,
        adam(of_energy),
        adam(of_others, size.weight_decay),
        adam(of_others, size.weight_decay),
        upper=size.upper,
        lower=LowerLevel("offset", latent_weight=1 / size.num_latents, vae_weight=0.05),
        noise=False,
        batch_size=size.batch_size,
    )


def prepared(images: np.ndarray, side: int) -> np.ndarray:
    """Images of ``(num_images, height, width)`` or with colors, as ``(num_images, side, side, channels)`` in [-1, 1]."""
    pixels = np.asarray(images, np.float32).reshape(*images.shape[:3], -1) / 127.5 - 1
    border = (32 - pixels.shape[1]) // 2 if pixels.shape[1] == 28 and pixels.shape[2] == 28 else 0  # of MNIST
    pixels = np.pad(pixels, [(0, 0), (border, border), (border, border), (0, 0)], constant_values=-1)
    return np.asarray(jax.image.resize(pixels, (len(pixels), side, side, pixels.shape[-1]), "linear"))


def load_data(name: str, smoke: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images to learn from and to test on, with pixels from 0 to 255."""
    load = {"mnist": mnist, "cifar10": cifar10}[name]
    try:
        train, test = load(train=True).images, load(train=False).images
    except FileNotFoundError:
        if not smoke:
            raise
        print(f"{name} is not there: random images of the same shape stand in, to see that everything runs.")
        shape = {"mnist": (500, 28, 28), "cifar10": (500, 32, 32, 3)}[name]
        train = test = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    return (train[:500], test[:500]) if smoke else (train, test)


def other_images(name: str, test: np.ndarray, side: int, rng: np.random.Generator, smoke: bool) -> dict[str, np.ndarray]:
    """Images of other kinds, by what they are; sets that are nowhere are left out."""
    num_channels = test.shape[-1]
    sources: dict[str, Callable[[], np.ndarray]] = {"Frey faces": lambda: rng.permutation(frey_faces())}
    if name == "mnist":
        sources["digits of scikit-learn"] = lambda: load_digits().images * (255 / 16)
        if not smoke:  # a download of 170 MB where it is not there
            sources["CIFAR-10 in gray"] = lambda: cifar10(train=False).images.mean(-1)
    else:
        sources["MNIST"] = lambda: mnist(train=False).images
    found = {}
    for kind, load in sources.items():
        try:
            images = prepared(load()[: len(test)], side)
        except FileNotFoundError as error:
            print(f"{kind}: left out. {error}")
            continue
        found[kind] = np.broadcast_to(images, (*images.shape[:3], num_channels))
    found["turned by a quarter"] = np.rot90(test, axes=(1, 2))
    found["negatives"] = -test
    found["constant images"] = np.broadcast_to(rng.uniform(-1, 1, (len(test), 1, 1, num_channels)), test.shape)
    found["uniform noise"] = rng.uniform(-1, 1, test.shape)
    return {kind: np.asarray(images, np.float32) for kind, images in found.items()}


def in_chunks(function: Callable[[Array], Array], images: np.ndarray) -> np.ndarray:
    """A function of a batch, a few rows at a time."""
    return np.concatenate([np.asarray(function(jnp.asarray(images[i : i + CHUNK]))) for i in range(0, len(images), CHUNK)])


def print_auroc(energies: dict[str, np.ndarray], errors: dict[str, np.ndarray]) -> None:
    """Of telling test images, the first kind, from the others."""
    first, *others = energies
    print(f"\n{'AUROC of test images against':<32}{'energy':>8}{'error of reconstruction':>26}")
    for kind in others:
        truth = np.repeat([0, 1], [len(energies[first]), len(energies[kind])])
        values = [roc_auc_score(truth, np.concatenate([by[first], by[kind]])) for by in (energies, errors)]
        print(f"{kind:<32}{values[0]:>8.3f}{values[1]:>26.3f}")


def plot_images(path: Path, grids: dict[str, np.ndarray]) -> None:
    """Grids of images side by side; each has shape ``(rows, columns, side, side, channels)``."""
    figure, axes = plt.subplots(1, len(grids), figsize=(3.6 * len(grids), 3.9), layout="constrained")
    for axis, (title, images) in zip(axes, grids.items(), strict=True):
        rows, columns, side, _, channels = images.shape
        tiles = np.clip((1 + np.asarray(images)) / 2, 0, 1)
        tiles = np.pad(1 - tiles if channels == 1 else tiles, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)], constant_values=1)
        axis.imshow(tiles.swapaxes(1, 2).reshape(rows * (side + 1), columns * (side + 1), channels), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.get_layout_engine().set(wspace=0.03)
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


def plot_energies(path: Path, energies: dict[str, np.ndarray]) -> None:
    figure, axis = plt.subplots(figsize=(7.6, 3.6), layout="constrained")
    for kind, values in energies.items():
        style = {"color": "black", "linewidth": 2.0} if kind == next(iter(energies)) else {"linewidth": 1.2}
        edges = np.linspace(values.min() - 1e-3, values.max() + 1e-3, 31)
        axis.hist(values, bins=edges, density=True, histtype="step", label=kind, **style)
    axis.set(xlabel="energy", ylabel="density", yscale="log")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def plot_loss(path: Path, losses: np.ndarray) -> None:
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    axis.plot(np.arange(len(losses)) + 1, losses, linewidth=0.4)
    axis.set(xlabel="step", ylabel="upper level")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.size]
    if args.smoke:
        size = size._replace(side=16, energy_width=4, width=4, batch_size=20)
    keys = jax.random.split(jax.random.key(args.seed), 4)
    train, test = (prepared(part, size.side) for part in load_data(args.data, args.smoke))
    test, shape = test[:NUM_TEST], train.shape[1:]
    steps_per_epoch = len(train) // size.batch_size
    num_steps = 4 if args.smoke else args.num_steps or size.num_epochs * steps_per_epoch
    nets = make_nets(keys[0], size, shape)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array))) for net, _ in nets]
    print(f"{len(train)} images of {shape}; weights of energy, encoder, generator: {counts[0]:,}, {counts[1]:,}, {counts[2]:,}")

    begin, engine = time.perf_counter(), make_engine(size, num_steps, steps_per_epoch)
    result = engine.run(keys[1], num_steps, jnp.asarray(train), nets, size)
    print(f"{num_steps} steps in {time.perf_counter() - begin:.0f} seconds, compilation included")
    eqx.tree_serialise_leaves(args.output / "weights.eqx", (result.params, result.state.mutable_state))
    plot_loss(args.output / "loss.png", np.asarray(result.losses))

    state, fixed = result.state, {"training": False}
    kinds = {"test images": test, **other_images(args.data, test, size.side, np.random.default_rng(args.seed), args.smoke)}
    draws = engine.sample(keys[2], state, len(test), test, nets, size, **fixed)["v"]
    refined = engine.refine(keys[3], state, LANGEVIN, draws, nets, size, temperature=TEMPERATURE, **fixed)
    kinds |= {"samples of the generator": np.asarray(draws), "the same, refined": np.asarray(refined)}
    energies = {kind: in_chunks(lambda v: engine.energies(state, v, nets, size, **fixed), v) for kind, v in kinds.items()}
    found = {kind: in_chunks(lambda v: engine.reconstruct(state, v, nets, size, **fixed), v) for kind, v in kinds.items()}
    errors = {kind: ((found[kind] - v) ** 2).mean((1, 2, 3)) for kind, v in kinds.items()}
    rest = ((test - train.mean(0)) ** 2).mean()
    print(f"\nError of reconstruction of {len(test)} test images, root mean square: {errors['test images'].mean() ** 0.5:.3f}")
    print(f"in [-1, 1], where the mean image has {rest**0.5:.3f}")
    print("Mean energies: " + ", ".join(f"{kind} {values.mean():.2f}" for kind, values in energies.items()))
    print_auroc(energies, errors)
    plot_energies(args.output / "energies.png", energies)
    pairs = np.stack([test[:32].reshape(4, 8, *shape), found["test images"][:32].reshape(4, 8, *shape)], 1)
    square = {"training images": train[:64], "samples of the generator": draws[:64], "samples, refined": refined[:64]}
    grids = {title: np.asarray(images).reshape(8, 8, *shape) for title, images in square.items()}
    plot_images(args.output / "images.png", grids | {"test images, and reconstructions below": pairs.reshape(8, 8, *shape)})
    print(f"\nThe figures are in {args.output}. All of it took {time.process_time():.0f} seconds of processors.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An energy of images, with an encoder and a generator")
    parser.add_argument("--data", choices=["mnist", "cifar10"], default="mnist")
    parser.add_argument("--size", choices=list(SIZES), default="reduced")
    parser.add_argument("--num-steps", type=int, help="instead of the epochs of the size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/bidvl_images"))
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny networks, to see that everything runs")
    main(parser.parse_args())
