# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Networks of a latent energy-based prior on images of 32 x 32: those of Pang et al. for SVHN, of any width.

The generator maps 100 latents to an image: a transposed convolution to 4 x 4, and three that double it, with 8, 4, 2 times
``width`` channels and leaky rectifiers between them; no normalization of batches, which would couple particles. The energy is a
perceptron with two hidden layers. With ``width`` 64 and ``energy_width`` 200 these are the published sizes.

A transposed convolution of stride 2 is written in two ways, which are the same function of the same weights:

* ``"deconv"``: as one, by ``lax.conv_general_dilated``. The fastest on a GPU; XLA has no fast code for it on CPU.
* ``"matmul"``: a matrix product, from the channels of each pixel to the 4 x 4 pixels that it adds to, and the sum of these. On a
  CPU many times as fast.

``dtype`` is that of the computation inside a network: weights, which stay float32 for the optimizer, and latents are converted
where they enter. What leaves is float32 again: the generator's last activation, and the last layer of the energy, so that an
energy is not rounded. The sums over pixels and the differences of energies are then those of float32.

**References**

1. Pang et al., *Learning latent space energy-based prior model*, NeurIPS 2020, arXiv:2006.08205.
"""

import math
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

SLOPE = 0.2  # of the leaky rectifiers


class Deconvolution(eqx.Module):
    """A transposed convolution with a kernel of 4 x 4, stride 2 and padding 1: it doubles images of ``(n, h, w, channels)``."""

    weight: Array  # (channels in, 4, 4, channels out)
    bias: Array
    form: str = eqx.field(static=True)

    def __init__(self, key: Array, num_in: int, num_out: int, form: str) -> None:
        self.weight, self.bias, self.form = xavier(key, (num_in, 4, 4, num_out)), jnp.zeros(num_out), form

    def __call__(self, x: Array) -> Array:
        return (by_matmul if self.form == "matmul" else by_convolution)(x, self.weight) + self.bias


def by_convolution(x: Array, weight: Array) -> Array:
    kernel = weight[:, ::-1, ::-1].transpose(1, 2, 0, 3)
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2), dimension_numbers=layout)


def by_matmul(x: Array, weight: Array) -> Array:
    """Pixel i adds to the pixels 2i - 1 to 2i + 2 of each axis: the even ones are met by two, and the odd ones."""
    parts = jnp.einsum("nhwc,cijd->nhwijd", x, weight)
    rows = _interleaved(parts, 1, 3)  # (n, 2 h, w, 4, channels out)
    return _interleaved(rows, 2, 3)


def _interleaved(parts: Array, axis: int, tap: int) -> Array:
    """The sum of overlapping parts, from an axis of pixels and one of the four that each adds to."""
    before, even, odd, after = (lax.index_in_dim(parts, i, tap, keepdims=False) for i in range(4))
    both = jnp.stack([even + _moved(after, axis, 1), odd + _moved(before, axis, -1)], axis + 1)
    return both.reshape(*even.shape[:axis], -1, *even.shape[axis + 1 :])


def _moved(x: Array, axis: int, by: int) -> Array:
    """An array moved by a pixel, with 0 where it came from."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])


class Generator(eqx.Module):
    """The mean of an image, of (32, 32, 3) in [-1, 1], for one latent or for an array of them."""

    first: tuple[Array, Array]  # weight and bias of the transposed convolution of a single pixel, which is a matrix product
    layers: list[Deconvolution]
    dtype: Any = eqx.field(static=True)

    def __init__(self, key: Array, num_latents: int, width: int, form: str = "matmul", dtype: Any = jnp.float32) -> None:
        keys, channels = jax.random.split(key, 4), (8 * width, 4 * width, 2 * width, 3)
        self.first = xavier(keys[0], (num_latents, 4, 4, channels[0])), jnp.zeros(channels[0])
        self.layers = [Deconvolution(k, *pair, form) for k, pair in zip(keys[1:], pairwise(channels), strict=True)]
        self.dtype = dtype

    def __call__(self, z: Array) -> Array:
        net = converted(self, self.dtype)
        weight, bias = net.first
        x = jnp.einsum("nc,chwd->nhwd", z.reshape(-1, z.shape[-1]).astype(self.dtype), weight) + bias
        for layer in net.layers:
            x = layer(leaky_relu(x))
        return jnp.tanh(x.astype(jnp.float32)).reshape(*z.shape[:-1], 32, 32, 3)


class Energy(eqx.Module):
    """The energy of one latent, that tilts a normal prior. Its last layer is of float32, whatever those before are."""

    hidden: list[eqx.nn.Linear]
    last: eqx.nn.Linear
    dtype: Any = eqx.field(static=True)

    def __init__(self, key: Array, num_latents: int, width: int, dtype: Any = jnp.float32) -> None:
        keys = jax.random.split(key, 3)
        self.hidden = [eqx.nn.Linear(num_latents, width, key=keys[0]), eqx.nn.Linear(width, width, key=keys[1])]
        self.last, self.dtype = eqx.nn.Linear(width, "scalar", key=keys[2]), dtype

    def __call__(self, z: Array) -> Array:
        x = z.astype(self.dtype)
        for layer in converted(self.hidden, self.dtype):
            x = leaky_relu(layer(x))
        return self.last(x.astype(jnp.float32))


def leaky_relu(x: Array) -> Array:
    return jax.nn.leaky_relu(x, SLOPE)


def xavier(key: Array, shape: tuple[int, int, int, int]) -> Array:
    """The weights that a transposed convolution starts with, of (channels in, height, width, channels out)."""
    num_in, height, width, num_out = shape
    return math.sqrt(2 / (height * width * (num_in + num_out))) * jax.random.normal(key, shape)


def converted(net: Any, dtype: Any) -> Any:
    """The same network with weights of another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, net)
