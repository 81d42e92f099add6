# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""A small network of images trained on their labels, and the Frechet distance between two sets of images on its features.

Features :math:`f_1, f_2` of two sets with means :math:`m` and covariances :math:`S` are at a distance

.. math:: |m_1 - m_2|^2 + \mathrm{tr}\left(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2}\right).

It is not the FID of the literature, whose features are those of a network trained on ImageNet: its numbers cannot be set beside
published ones, and can be compared where the network is the same, with the same number of images, by which it is biased.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from nets.eblvm import Conv

NUM_FEATURES, CHUNK = 64, 100


class FeatureNet(eqx.Module):
    """Three convolutions of stride 2, the mean over pixels as features, and a linear map to the logits of the labels."""

    convolutions: list[Conv]
    last: eqx.nn.Linear

    def __init__(self, key: Array, num_labels: int = 10) -> None:
        keys, channels = jax.random.split(key, 4), (3, 32, 64, NUM_FEATURES)
        self.convolutions = [Conv(channels[i], channels[i + 1], 3, keys[i], stride=2) for i in range(3)]
        self.last = eqx.nn.Linear(NUM_FEATURES, num_labels, key=keys[3])

    def features(self, image: Array) -> Array:
        for convolution in self.convolutions:
            image = jax.nn.relu(convolution(image))
        return image.mean((0, 1))

    def __call__(self, image: Array) -> Array:
        return self.last(self.features(image))


def train_features(key: Array, images: np.ndarray, labels: np.ndarray, num_epochs: int, batch_size: int = 100) -> FeatureNet:
    """The network, trained to tell the labels of images in [-1, 1]; images are turned left to right at random."""
    net_key, order_key, turn_key = jax.random.split(key, 3)
    net, num_batches = FeatureNet(net_key), len(images) // batch_size
    orders = np.concatenate([jax.random.permutation(k, len(images)) for k in jax.random.split(order_key, num_epochs)])
    rows = orders[: num_epochs * num_batches * batch_size].reshape(-1, batch_size)
    optim = optax.adam(optax.cosine_decay_schedule(2e-3, len(rows)))

    @eqx.filter_jit
    def update(net: FeatureNet, state: optax.OptState, x: Array, y: Array, key: Array) -> tuple[FeatureNet, optax.OptState]:
        x = jnp.where(jax.random.bernoulli(key, shape=(len(x), 1, 1, 1)), x[:, :, ::-1], x)

        def loss(net: FeatureNet) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y).mean()

        updates, state = optim.update(eqx.filter_grad(loss)(net), state)
        return eqx.apply_updates(net, updates), state

    state = optim.init(eqx.filter(net, eqx.is_inexact_array))
    for i, key in zip(rows, jax.random.split(turn_key, len(rows)), strict=True):
        net, state = update(net, state, jnp.asarray(images[i]), jnp.asarray(labels[i]), key)
    return net


def features_of(net: FeatureNet, images: np.ndarray) -> np.ndarray:
    """The features of images, of ``(num_images, 64)``."""
    return _in_chunks(net.features, images)


def accuracy(net: FeatureNet, images: np.ndarray, labels: np.ndarray) -> float:
    return float((_in_chunks(net, images).argmax(-1) == labels).mean())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets of features, as of two normal distributions."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    s1, s2 = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * between)


def _in_chunks(function: Callable[[Array], Array], images: np.ndarray) -> np.ndarray:
    mapped = jax.jit(jax.vmap(function))
    return np.concatenate([np.asarray(mapped(jnp.asarray(images[i : i + CHUNK]))) for i in range(0, len(images), CHUNK)])
