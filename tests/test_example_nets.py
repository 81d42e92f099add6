# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The networks of the examples against the published architecture."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

eqx = pytest.importorskip("equinox", reason="the examples' networks are Equinox modules")
KEY, MNIST = jax.random.key(0), (32, 32, 1)


@pytest.fixture(scope="module")
def nets(example_nets):
    return example_nets("eblvm")


def num_params(make, *args, **kwargs):
    """The number of parameters, from shapes alone: nothing is drawn."""
    net = eqx.filter_eval_shape(make, KEY, *args, **kwargs)
    return sum(leaf.size for leaf in jax.tree.leaves(net) if hasattr(leaf, "size"))


def test_numbers_of_parameters_are_the_published_ones(nets):
    # Catches a bias, a shortcut, a block or a width that is not that of the papers: any of them changes a count.
    assert num_params(nets.image_energy, MNIST) == 9_859_250
    assert num_params(lambda key: nets.ResNet(1, 64, 2, key)) == 9_035_904
    assert num_params(nets.image_guide, MNIST) == 779_364
    assert num_params(nets.point_energy) == 64_316
    assert num_params(nets.point_guide) == 63_226


@pytest.mark.parametrize(
    ("data", "side", "energy", "guide"), [("CIFAR-10", 32, 63_936_562, 780_516), ("CelebA", 64, 68_876_338, 2_009_316)]
)
def test_numbers_of_parameters_are_the_published_ones_for_color_images(nets, data, side, energy, guide):
    # Catches a number of channels, of blocks or of cells that is right for one image size only.
    assert num_params(nets.image_energy, (side, side, 3), channels=128, blocks_per_stage=3) == energy
    assert num_params(nets.image_guide, (side, side, 3)) == guide


def elu(x):
    return np.where(x > 0, x, np.expm1(x))


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def linear(layer, x):
    return np.asarray(layer.weight, np.float64) @ x + np.asarray(layer.bias, np.float64)


def dense_features(net, v, activation):
    for i, block in enumerate(net.blocks):
        x = activation(v) if i else v
        v = linear(block.shortcut, x) + elu(linear(block.outer, elu(linear(block.inner, x))))
    return v


def test_the_energy_of_points_is_that_of_the_papers(nets):
    # Catches a latent in one half of (g1(v) + h, h) only, a sum without squares, and an activation in a wrong place.
    net, rng = nets.point_energy(KEY, num_latents=3, width=8), np.random.default_rng(0)
    for v, h in zip(rng.normal(size=(4, 2)), rng.normal(size=(4, 3)), strict=True):
        u = linear(net.project, dense_features(net.features, v, elu))
        wanted = (elu(linear(net.mix, np.concatenate([u + h, h]))) ** 2).sum()
        np.testing.assert_allclose(net(jnp.asarray(v), jnp.asarray(h)), wanted, rtol=1e-5)


def test_the_guide_of_points_is_that_of_the_papers(nets):
    # Catches heads without their activation, ELUs between the blocks of a guide, and a mean and a log scale in exchange.
    net, v = nets.point_guide(KEY, num_latents=3, width=8), np.array([0.4, -1.1])
    x = leaky(dense_features(net.features, v, leaky))
    for given, head in zip(net(jnp.asarray(v)), (net.loc, net.log_scale), strict=True):
        np.testing.assert_allclose(given, linear(head, x), rtol=1e-5, atol=1e-6)


def convolved(layer, x):
    """A convolution with zero padding, by sums over the pixels of its window."""
    weight = np.asarray(layer.weight, np.float64)
    size, (height, width, _) = len(weight), x.shape
    padded = np.pad(x, [(size // 2, size // 2)] * 2 + [(0, 0)])
    out = sum(padded[i : i + height, j : j + width] @ weight[i, j] for i, j in np.ndindex(size, size))
    return out[:: layer.stride, :: layer.stride] + (0 if layer.bias is None else np.asarray(layer.bias, np.float64))


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_both_forms_of_a_convolution_are_one(nets, size, stride):
    # Catches windows in another order than the weights, and a padding that differs: a CPU and a GPU would learn other networks.
    layer, x = nets.Conv(2, 3, size, KEY, stride), np.random.default_rng(0).normal(size=(8, 6, 2))
    for form in (nets.by_windows, nets.by_xla):
        given = form(jnp.asarray(x), layer.weight, stride) + layer.bias
        np.testing.assert_allclose(given, convolved(layer, x), rtol=1e-4, atol=1e-6)


def test_the_convolutional_features_are_those_of_the_papers(nets):
    # Catches a shortcut from after the activation, a mean over cells before the convolutions, an activation after the last block.
    net, image = nets.ResNet(1, 2, 2, KEY), np.random.default_rng(1).normal(size=(8, 8, 1))
    x = convolved(net.stem, image)
    for place, block in enumerate(net.blocks):
        y = convolved(block.outer, elu(convolved(block.inner, elu(x))))
        if place % 2 == 0:
            x, y = (a.reshape(a.shape[0] // 2, 2, -1, 2, a.shape[2]).mean((1, 3)) for a in (x, y))
        x = convolved(block.shortcut, x) + y
    np.testing.assert_allclose(net(jnp.asarray(image)), x, rtol=1e-4, atol=1e-6)


def test_the_guide_of_images_is_that_of_the_papers(nets):
    # Catches strides and paddings of another network with as many parameters, and an activation more before its heads.
    net, x = nets.image_guide(KEY, (8, 8, 1), num_latents=3, channels=2), np.random.default_rng(2).normal(size=(8, 8, 1))
    image = jnp.asarray(x)
    for layer in net.features.layers:
        x = leaky(convolved(layer, x))
    np.testing.assert_allclose(net(image)[0], linear(net.loc, x.reshape(-1)), rtol=1e-4, atol=1e-6)


def test_an_image_that_cannot_be_halved_three_times_is_refused(nets):
    # Catches a wrong number of features, which would show as a shape error deep inside.
    with pytest.raises(ValueError, match="28"):
        nets.image_energy(KEY, (28, 28, 1))


@pytest.fixture(scope="module")
def lebm(example_nets):
    return example_nets("lebm")


def test_latent_energy_prior_has_the_published_sizes(lebm):
    # Catches another width, number of layers or kernel than those of Pang et al. for SVHN.
    generator = sum(16 * a * b + b for a, b in ((100, 512), (512, 256), (256, 128), (128, 3)))
    assert num_params(lebm.Generator, 100, 64) == generator
    assert num_params(lebm.Energy, 100, 200) == 100 * 200 + 200 + 200 * 200 + 200 + 200 + 1


@pytest.mark.parametrize("num_in", [1, 3])
def test_a_transposed_convolution_is_the_same_as_a_matrix_product(lebm, num_in):
    # Catches a pixel that is added to the wrong neighbor, or dropped at an edge; and a kernel that is turned around.
    x = jax.random.normal(KEY, (2, 4, 5, num_in))
    weight = jax.random.normal(jax.random.key(1), (num_in, 4, 4, 2))
    wanted = np.zeros((2, 12, 14, 2))  # with a border of two, of which the kernel meets one
    for i in range(4):
        for j in range(5):
            wanted[:, 2 * i + 1 : 2 * i + 5, 2 * j + 1 : 2 * j + 5] += np.einsum("nc,cijd->nijd", x[:, i, j], weight)
    for form in (lebm.by_matmul, lebm.by_convolution):
        np.testing.assert_allclose(form(x, weight), wanted[:, 2:-2, 2:-2], atol=1e-5)


def test_networks_of_bfloat16_leave_float32_and_weights_of_float32(lebm):
    # Catches an image or an energy that leaves as bfloat16, or weights that are kept in it.
    nets = lebm.Generator(KEY, 8, 2, dtype=jnp.bfloat16), lebm.Energy(KEY, 8, 16, dtype=jnp.bfloat16)
    z = jax.random.normal(KEY, (3, 8))
    assert nets[0](z).dtype == jax.vmap(nets[1])(z).dtype == jnp.float32
    assert nets[0](z[0]).shape == (32, 32, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(nets) if eqx.is_inexact_array(leaf)} == {jnp.dtype("float32")}
    plain = lebm.Generator(KEY, 8, 2), lebm.Energy(KEY, 8, 16)
    for net, other in zip(nets, plain, strict=True):
        of_one = (jax.vmap(net)(z), jax.vmap(other)(z))
        assert 0 < float(jnp.abs(of_one[0] - of_one[1]).max()) < 0.02


def test_frechet_distance_of_normal_features_is_that_of_their_distributions(example_nets, monkeypatch):
    # Catches the mean of one set, a root of a product that is not symmetric, and a covariance counted once.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")  # it takes a layer from a file beside it
    frechet_distance = example_nets("features").frechet_distance
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4000, 3)) @ np.diag([1.0, 2, 3])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shift = np.array([1.0, 0, 0])
    assert frechet_distance(a, 2 * a + shift) == pytest.approx(((a.mean(0) + shift) ** 2).sum() + np.trace(np.cov(a.T)))
