# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Networks of images for bi-level doubly variational learning: those of the paper's CIFAR-10, of any width, and dense ones.

All take images as ``(height, width, channels)`` with pixels in [-1, 1], and carry a state beside their weights: the energy the
vectors of its spectral norms, encoder and generator the running statistics of their batches. :func:`with_state` and
:func:`energy_with_state` keep it in a mutable site of a NumPyro program. The functions that make networks are for
``equinox.nn.make_with_state``.

The convolutional networks halve, or double, images as often as it takes from their side to 4: three times from 32.

**References**

1. Kan et al., *Bi-level doubly variational learning for energy-based latent variable models*, CVPR 2022, arXiv:2203.14702.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import BatchNorm, Conv2d, ConvTranspose2d, Linear, SpectralNorm, State
from jax import Array
from numpyro.contrib.module import eqx_module
from numpyro.primitives import mutable

BATCH = "batch"  # the axis that batch statistics are taken over
WEIGHT_SCALE = 0.02

ImageShape = tuple[int, int, int]


def with_state(name: str, net: eqx.Module, state: State, *, training: bool = True) -> Callable[[Array], Any]:
    """A network of one input as a function of a batch: its weights are a param site, its state a mutable site.

    :param bool training: whether the state moves on with every batch, or is used as it stands.
    """
    net = eqx.nn.inference_mode(eqx_module(name, net), not training)
    holder = mutable(f"{name}$state", {"state": _copied(state)})

    def batched(x: Array) -> Any:
        mapped = jax.vmap(net, axis_name=BATCH, in_axes=(0, None), out_axes=(0, None))
        y, new = mapped(x, _copied(holder["state"]))
        holder["state"] = jax.lax.stop_gradient(new)
        return y

    return batched


def energy_with_state(name: str, net: "Energy", state: State, *, training: bool = True) -> Callable[[Array], Array]:
    """The energy of one image; its spectral norms are made better once, and are then the same for a whole run of the program.

    :param bool training: whether they are made better, by one power iteration.
    """
    net = eqx_module(name, net)
    holder = mutable(f"{name}$state", {"state": _copied(state)})
    if training:  # at any image: a power iteration sees the weights alone
        _, holder["state"] = net(jnp.zeros(net.image_shape), _copied(holder["state"]))
    net, settled = eqx.nn.inference_mode(net), holder["state"]
    return lambda v: net(v, settled)[0]


class Energy(eqx.Module):
    """An energy of any sign, every layer of which is divided by its largest singular value."""

    layers: list[SpectralNorm]
    image_shape: ImageShape = eqx.field(static=True)
    is_dense: bool = eqx.field(static=True)

    def __call__(self, v: Array, state: State) -> tuple[Array, State]:
        x = _entered(v, self.is_dense)
        *hidden, last = self.layers
        for layer in hidden:
            x, state = layer(x, state)
            x = jax.nn.leaky_relu(x, 0.1)
        x, state = last(x, state)
        return x.reshape(()), state


class Encoder(eqx.Module):
    """Mean and log variance of the latents of an image."""

    layers: list[Conv2d] | list[Linear]
    norms: list[BatchNorm]
    mean: Conv2d | Linear
    log_var: Conv2d | Linear
    is_dense: bool = eqx.field(static=True)

    def __call__(self, v: Array, state: State) -> tuple[tuple[Array, Array], State]:
        x = _entered(v, self.is_dense)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x, state = norm(layer(x), state)
            x = jax.nn.leaky_relu(x, 0.2)
        return (self.mean(x).ravel(), self.log_var(x).ravel()), state


class Generator(eqx.Module):
    """The mean of an image given its latents, in [-1, 1]."""

    layers: list[ConvTranspose2d] | list[Linear]
    norms: list[BatchNorm]
    last: ConvTranspose2d | Linear
    image_shape: ImageShape = eqx.field(static=True)
    is_dense: bool = eqx.field(static=True)

    def __call__(self, h: Array, state: State) -> tuple[Array, State]:
        x = h if self.is_dense else h[:, None, None]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x, state = norm(layer(x), state)
            x = jax.nn.relu(x)
        image = jnp.tanh(self.last(x))
        return image.reshape(self.image_shape) if self.is_dense else jnp.moveaxis(image, 0, -1), state


def conv_energy(key: Array, image_shape: ImageShape, width: int = 64) -> Energy:
    """The energy of the paper: two convolutions for every halving, four on top."""
    num_halvings, channels, layers = _num_halvings(image_shape), image_shape[-1], []
    for i in range(num_halvings):
        layers += [(channels, width << i, 3, 1, 1), (width << i, width << i, 4, 2, 1)]
        channels = width << i
    top = width << num_halvings
    layers += [(channels, top, 3, 1, 1), (top, top, 4, 1, 0), (top, top, 1, 1, 0), (top, 1, 1, 1, 0)]
    return Energy(_normalized(key, Conv2d, layers), image_shape, is_dense=False)


def conv_encoder(key: Array, image_shape: ImageShape, num_latents: int = 100, width: int = 48) -> Encoder:
    """The encoder of the paper."""
    num_halvings = _num_halvings(image_shape)
    layers = [(image_shape[-1], width, 3, 1, 1)]
    layers += [(width << i, width << (i + 1), 4, 2, 1) for i in range(num_halvings)]
    *keys, mean_key, log_var_key = jax.random.split(key, len(layers) + 2)
    head = width << num_halvings, num_latents, 4, 1, 0
    heads = _layer(mean_key, Conv2d, head), _layer(log_var_key, Conv2d, head)
    return Encoder(*_with_norms(keys, Conv2d, layers), *heads, is_dense=False)


def conv_generator(key: Array, image_shape: ImageShape, num_latents: int = 100, width: int = 48) -> Generator:
    """The generator of the paper."""
    num_doublings = _num_halvings(image_shape)
    channels = [width << num_doublings, *(width << i for i in range(num_doublings, 0, -1))]
    layers = [(num_latents, channels[0], 4, 1, 0), *((before, after, 4, 2, 1) for before, after in pairwise(channels))]
    *keys, last_key = jax.random.split(key, len(layers) + 1)
    last = _layer(last_key, ConvTranspose2d, (channels[-1], image_shape[-1], 3, 1, 1))
    return Generator(*_with_norms(keys, ConvTranspose2d, layers), last, image_shape, is_dense=False)


def dense_energy(key: Array, image_shape: ImageShape, width: int) -> Energy:
    """An energy without convolutions. Small images need no others, and a CPU goes through these faster."""
    sizes = [math.prod(image_shape), width, width, width, 1]
    return Energy(_normalized(key, Linear, list(pairwise(sizes))), image_shape, is_dense=True)


def dense_encoder(key: Array, image_shape: ImageShape, num_latents: int, width: int) -> Encoder:
    """An encoder without convolutions."""
    *keys, mean_key, log_var_key = jax.random.split(key, 4)
    layers = _with_norms(keys, Linear, [(math.prod(image_shape), width), (width, width)])
    heads = (_layer(key, Linear, (width, num_latents)) for key in (mean_key, log_var_key))
    return Encoder(*layers, *heads, is_dense=True)


def dense_generator(key: Array, image_shape: ImageShape, num_latents: int, width: int) -> Generator:
    """A generator without convolutions."""
    *keys, last_key = jax.random.split(key, 4)
    layers = _with_norms(keys, Linear, [(num_latents, width), (width, width), (width, width)])
    return Generator(*layers, _layer(last_key, Linear, (width, math.prod(image_shape))), image_shape, is_dense=True)


def _normalized(key: Array, kind: Any, layers: list[tuple[int, ...]]) -> list[SpectralNorm]:
    keys = jax.random.split(key, (len(layers), 2))
    pairs = zip(layers, keys, strict=True)
    return [SpectralNorm(_layer(own_key, kind, layer), "weight", key=norm_key) for layer, (own_key, norm_key) in pairs]


def _with_norms(keys: list[Array], kind: Any, layers: list[tuple[int, ...]]) -> tuple[list[Any], list[BatchNorm]]:
    """Layers, and what makes batches of their outputs standard; it has the bias."""
    made = [_layer(key, kind, layer, use_bias=False) for key, layer in zip(keys, layers, strict=True)]
    return made, [BatchNorm(layer[1], BATCH, mode="batch") for layer in layers]


def _layer(key: Array, kind: Any, settings: tuple[int, ...], *, use_bias: bool = True) -> Any:
    """A layer of these sizes in and out, kernel, stride and padding; convolutions with the weights of the paper."""
    if kind is Linear:
        return Linear(*settings, use_bias=use_bias, key=key)
    *sizes, padding = settings
    layer = kind(*sizes, padding=padding, use_bias=use_bias, key=key)
    return eqx.tree_at(lambda layer: layer.weight, layer, WEIGHT_SCALE * jax.random.normal(key, layer.weight.shape))


def _entered(v: Array, is_dense: bool) -> Array:
    return v.ravel() if is_dense else jnp.moveaxis(v, -1, 0)


def _copied(state: State) -> State:
    """A state is spent when it is changed: this one may be."""
    return jax.tree.map(lambda x: x, state)


def _num_halvings(image_shape: ImageShape) -> int:
    """How often an image is halved until its sides are 4."""
    height, width, _ = image_shape
    if height != width or height < 8 or math.log2(height) % 1:
        raise ValueError(
            f"the sides of an image of shape {image_shape} must be equal, and 8, 16, 32 or another power of 2: pad it."
        )
    return int(math.log2(height)) - 2
