# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Networks of deep energy-based latent variable models, as Equinox modules: those of BiSM (Bao et al. 2020) and VaGES (2021).

The energy couples the visible's features to the latents additively,

.. math:: E(v, h) = g_3(g_2(g_1(v), h)), \quad g_2(u, h) = (u + h, h), \quad g_3(x) = \sum_k \mathrm{ELU}(A x + a)_k^2,

with :math:`g_1` a residual network without normalization layers and a linear map on top. A Gaussian guide has a network of its
own with a mean and a log scale on top. All modules see one example; ``jax.vmap`` maps them over a batch. Images are
(height, width, channels). Energies are at least 0, and bounded where every ELU saturates: nothing forces :math:`e^{-E}` to be
integrable.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

leaky_relu = partial(jax.nn.leaky_relu, negative_slope=0.2)


class Conv(eqx.Module):
    """A convolution of an image of shape (height, width, in_channels) with zero padding, started as Equinox starts its own.

    On a CPU it is one matrix product with the windows of the image: XLA has no fast convolution there inside a compiled loop,
    where all training happens. Its derivative in the weights takes 70 times as long as outside (JAX issue 12868).
    """

    weight: Array  # (size, size, in_channels, out_channels)
    bias: Array | None
    stride: int = eqx.field(static=True)

    def __init__(self, in_channels: int, out_channels: int, size: int, key: Array, stride: int = 1, use_bias: bool = True) -> None:
        limit = (in_channels * size**2) ** -0.5
        weight_key, bias_key = jax.random.split(key)
        self.weight = jax.random.uniform(weight_key, (size, size, in_channels, out_channels), minval=-limit, maxval=limit)
        self.bias = jax.random.uniform(bias_key, (out_channels,), minval=-limit, maxval=limit) if use_bias else None
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        y = (by_windows if jax.default_backend() == "cpu" else by_xla)(x, self.weight, self.stride)
        return y if self.bias is None else y + self.bias


def by_windows(x: Array, weight: Array, stride: int) -> Array:
    """A convolution as a matrix product."""
    size, (height, width, _) = len(weight), x.shape
    x = jnp.pad(x, [(size // 2, size // 2)] * 2 + [(0, 0)])
    windows = [x[i : i + height : stride, j : j + width : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(windows, -1) @ weight.reshape(-1, weight.shape[-1])


def by_xla(x: Array, weight: Array, stride: int) -> Array:
    """A convolution as such."""
    padding, layout = [(len(weight) // 2,) * 2] * 2, ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], weight, (stride, stride), padding, dimension_numbers=layout)[0]


class ConvBlock(eqx.Module):
    """ELU, 3x3 convolution, ELU, 3x3 convolution, and a 1x1 convolution beside them; both halve the image if ``down``."""

    inner: Conv
    outer: Conv
    shortcut: Conv  # also where the number of channels stays
    down: bool = eqx.field(static=True)

    def __init__(self, in_channels: int, out_channels: int, down: bool, key: Array) -> None:
        keys = jax.random.split(key, 3)
        self.inner = Conv(in_channels, in_channels, 3, keys[0], use_bias=False)
        self.outer = Conv(in_channels, out_channels, 3, keys[1])
        self.shortcut = Conv(in_channels, out_channels, 1, keys[2])
        self.down = down

    def __call__(self, x: Array) -> Array:
        y = self.outer(jax.nn.elu(self.inner(jax.nn.elu(x))))
        if self.down:
            x, y = halved(x), halved(y)
        return self.shortcut(x) + y


class ResNet(eqx.Module):
    """A convolution and three stages, each of which doubles the channels, halves the image, and goes on at that size.

    :param in_channels: of the image, whose sides must be divisible by 8.
    :param channels: of the first convolution; the features are (height / 8, width / 8, 8 channels).
    :param blocks_per_stage: residual blocks in a stage.
    """

    stem: Conv
    blocks: list[ConvBlock]

    def __init__(self, in_channels: int, channels: int, blocks_per_stage: int, key: Array) -> None:
        stem_key, *keys = jax.random.split(key, 1 + 3 * blocks_per_stage)
        self.stem = Conv(in_channels, channels, 3, stem_key)
        self.blocks = []
        for i, block_key in enumerate(keys):
            stage, place = divmod(i, blocks_per_stage)
            wide = channels * 2 ** (stage + 1)
            self.blocks.append(ConvBlock(wide // 2 if place == 0 else wide, wide, down=place == 0, key=block_key))

    def __call__(self, v: Array) -> Array:
        x = self.stem(v)
        for block in self.blocks:
            x = block(x)
        return x


class DenseBlock(eqx.Module):
    """Two linear maps, each followed by an ELU, and a linear map beside them; the hidden width is that of the input."""

    inner: eqx.nn.Linear
    outer: eqx.nn.Linear
    shortcut: eqx.nn.Linear

    def __init__(self, in_size: int, out_size: int, key: Array) -> None:
        keys = jax.random.split(key, 3)
        self.inner = eqx.nn.Linear(in_size, in_size, key=keys[0])
        self.outer = eqx.nn.Linear(in_size, out_size, key=keys[1])
        self.shortcut = eqx.nn.Linear(in_size, out_size, key=keys[2])

    def __call__(self, x: Array) -> Array:
        return self.shortcut(x) + jax.nn.elu(self.outer(jax.nn.elu(self.inner(x))))


class DenseResNet(eqx.Module):
    """Residual blocks of linear maps with an activation between any two of them, for visibles taken as vectors.

    :param sizes: numbers of elements of the visible and of the blocks' outputs.
    :param activate_last: whether the activation follows the last block too.
    """

    blocks: list[DenseBlock]
    activation: Callable[[Array], Array] = eqx.field(static=True)
    activate_last: bool = eqx.field(static=True)

    def __init__(
        self, sizes: tuple[int, ...], activation: Callable[[Array], Array], key: Array, activate_last: bool = False
    ) -> None:
        keys = jax.random.split(key, len(sizes) - 1)
        self.blocks = [DenseBlock(*pair, key) for pair, key in zip(pairwise(sizes), keys, strict=True)]
        self.activation, self.activate_last = activation, activate_last

    def __call__(self, v: Array) -> Array:
        x = self.blocks[0](v.reshape(-1))
        for block in self.blocks[1:]:
            x = block(self.activation(x))
        return self.activation(x) if self.activate_last else x


class GuideConvNet(eqx.Module):
    """Three 3x3 convolutions of stride 2, each followed by a leaky ReLU."""

    layers: list[Conv]

    def __init__(self, in_channels: int, channels: int, key: Array) -> None:
        sizes = (in_channels, channels, 2 * channels, 4 * channels)
        keys = jax.random.split(key, 3)
        self.layers = [Conv(*pair, 3, key, stride=2) for pair, key in zip(pairwise(sizes), keys, strict=True)]

    def __call__(self, v: Array) -> Array:
        for layer in self.layers:
            v = leaky_relu(layer(v))
        return v


class CoupledEnergy(eqx.Module):
    """The energy of a visible and its latents, from features of the visible."""

    features: Callable[[Array], Array]
    project: eqx.nn.Linear  # features -> R^num_latents: with them, g_1
    mix: eqx.nn.Linear  # R^(2 num_latents) -> R^width, A and a of g_3

    def __init__(self, features: Callable[[Array], Array], num_features: int, num_latents: int, width: int, key: Array) -> None:
        project_key, mix_key = jax.random.split(key)
        self.features = features
        self.project = eqx.nn.Linear(num_features, num_latents, key=project_key)
        self.mix = eqx.nn.Linear(2 * num_latents, width, key=mix_key)

    def __call__(self, v: Array, h: Array) -> Array:
        """The energy, a scalar."""
        u = self.project(self.features(v).reshape(-1))
        return (jax.nn.elu(self.mix(jnp.concatenate([u + h, h]))) ** 2).sum()


class GaussianGuide(eqx.Module):
    """The mean and the log scale of the latents of one visible."""

    features: Callable[[Array], Array]
    loc: eqx.nn.Linear
    log_scale: eqx.nn.Linear

    def __init__(self, features: Callable[[Array], Array], num_features: int, num_latents: int, key: Array) -> None:
        loc_key, scale_key = jax.random.split(key)
        self.features = features
        self.loc = eqx.nn.Linear(num_features, num_latents, key=loc_key)
        self.log_scale = eqx.nn.Linear(num_features, num_latents, key=scale_key)

    def __call__(self, v: Array) -> tuple[Array, Array]:
        x = self.features(v).reshape(-1)
        return self.loc(x), self.log_scale(x)


def image_energy(
    key: Array, image_shape: tuple[int, int, int], num_latents: int = 50, channels: int = 64, blocks_per_stage: int = 2
) -> CoupledEnergy:
    """The energy of images, by default that of MNIST; the papers have 128 channels and 3 blocks for CIFAR-10 and CelebA.

    :param image_shape: ``(height, width, channels)``, with sides divisible by 8.
    """
    net_key, top_key = jax.random.split(key)
    cells = _cells(image_shape)
    net = ResNet(image_shape[-1], channels, blocks_per_stage, net_key)
    return CoupledEnergy(net, 8 * channels * cells, num_latents, 4 * channels * cells, top_key)


def image_guide(key: Array, image_shape: tuple[int, int, int], num_latents: int = 50, channels: int = 64) -> GaussianGuide:
    """The guide of images."""
    net_key, top_key = jax.random.split(key)
    net = GuideConvNet(image_shape[-1], channels, net_key)
    return GaussianGuide(net, 4 * channels * _cells(image_shape), num_latents, top_key)


def dense_energy(key: Array, shape: tuple[int, ...], num_latents: int, width: int) -> CoupledEnergy:
    """An energy without convolutions. Small images need no others, and a CPU goes through these faster."""
    net_key, top_key = jax.random.split(key)
    net = DenseResNet((math.prod(shape), width, width, width), jax.nn.elu, net_key)
    return CoupledEnergy(net, width, num_latents, width, top_key)


def point_energy(key: Array, num_latents: int = 10, width: int = 100) -> CoupledEnergy:
    """The energy of points in the plane."""
    return dense_energy(key, (2,), num_latents, width)


def point_guide(key: Array, num_latents: int = 10, width: int = 100) -> GaussianGuide:
    """The guide of points in the plane."""
    net_key, top_key = jax.random.split(key)
    net = DenseResNet((2, width, width, width), leaky_relu, net_key, activate_last=True)
    return GaussianGuide(net, width, num_latents, top_key)


def halved(image: Array) -> Array:
    """Means over cells of 2 x 2 pixels."""
    height, width, channels = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


def _cells(image_shape: tuple[int, int, int]) -> int:
    """Pixels of an image that is halved three times."""
    height, width, _ = image_shape
    if height % 8 or width % 8:
        raise ValueError(f"the sides of an image of shape {image_shape} must be divisible by 8, to be halved three times: pad it.")
    return height * width // 64
