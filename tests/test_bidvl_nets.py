# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The networks of the images of bi-level doubly variational learning, and their states in mutable sites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import seed, substitute, trace

eqx = pytest.importorskip("equinox", reason="the examples' networks are Equinox modules")
KEY, CIFAR = jax.random.key(0), (32, 32, 3)
V = jax.random.normal(KEY, (3, 4, 4, 1))


@pytest.fixture(scope="module")
def nets(example_nets):
    return example_nets("bidvl")


def num_params(make, *args):
    """The number of weights, from shapes alone: nothing is drawn."""
    net = eqx.filter_eval_shape(lambda key: eqx.nn.make_with_state(make)(key, *args)[0], KEY)
    return sum(leaf.size for leaf in jax.tree.leaves(net) if hasattr(leaf, "size"))


def conv(before, after, size, bias=True):
    return before * after * size**2 + bias * after


def test_numbers_of_parameters_are_those_of_the_published_layers(nets):
    # Catches a bias, a batch norm, a stage, a width or a kernel that is not that of the published CIFAR-10 networks.
    energy = [(3, 64, 3), (64, 64, 4), (64, 128, 3), (128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3), (512, 512, 4)]
    assert num_params(nets.conv_energy, CIFAR) == sum(conv(*layer) for layer in [*energy, (512, 512, 1), (512, 1, 1)])
    encoder, generator = (
        [(3, 48, 3), (48, 96, 4), (96, 192, 4), (192, 384, 4)],
        [(100, 384, 4), (384, 384, 4), (384, 192, 4), (192, 96, 4)],
    )
    norms = [[2 * after for _, after, _ in layers] for layers in (encoder, generator)]
    encoder, generator = (sum(conv(*layer, bias=False) for layer in layers) for layers in (encoder, generator))
    assert num_params(nets.conv_encoder, CIFAR) == encoder + sum(norms[0]) + 2 * conv(384, 100, 4)
    assert num_params(nets.conv_generator, CIFAR) == generator + sum(norms[1]) + conv(96, 3, 3)


@pytest.mark.parametrize("side", [16, 32])
def test_conv_networks_halve_and_double_images_down_to_4(nets, side):
    # Catches a padding or a stride that loses a row: the image that comes out would have another shape.
    shape = (side, side, 1)

    def outputs(key):
        energy, of_energy = eqx.nn.make_with_state(nets.conv_energy)(key, shape, 2)
        encoder, of_encoder = eqx.nn.make_with_state(nets.conv_encoder)(key, shape, 5, 2)
        generator, of_generator = eqx.nn.make_with_state(nets.conv_generator)(key, shape, 5, 2)
        encoder, generator = eqx.nn.inference_mode((encoder, generator))
        (mean, log_var), _ = encoder(jnp.zeros(shape), of_encoder)
        return energy(jnp.zeros(shape), of_energy)[0], mean, log_var, generator(mean, of_generator)[0]

    assert [x.shape for x in jax.eval_shape(outputs, KEY)] == [(), (5,), (5,), shape]


def test_sides_that_cannot_be_halved_down_to_4_are_refused(nets):
    with pytest.raises(ValueError, match=r"image of shape \(28, 28, 1\) must be equal, and 8, 16, 32"):
        nets.conv_energy(KEY, (28, 28, 1))


def run(program, data):
    """A run of a program, and the values of its sites."""
    with trace() as sites, substitute(data=jax.tree.map(lambda x: x, data)), seed(rng_seed=0):
        out = program()
    return out, {name: site["value"] for name, site in sites.items()}


@pytest.fixture(scope="module")
def dense(nets):
    """A dense energy, a hundred times too steep in every layer: as a program, its state after forty runs, and its layers."""
    net, state = eqx.filter_jit(eqx.nn.make_with_state(nets.dense_energy))(KEY, (4, 4, 1), 6)
    net = jax.tree.map(lambda x: 100 * x if eqx.is_inexact_array(x) else x, net)

    def program(training=True):
        return nets.energy_with_state("energy", net, state, training=training)

    def settled(_, sites):
        return {"energy$state": run(program, sites)[1]["energy$state"]}

    data = jax.jit(lambda data: jax.lax.fori_loop(0, 40, settled, data))({"energy$state": {"state": state}})
    return program, data, [layer.layer for layer in net.layers]


def test_energy_divides_every_layer_by_its_largest_singular_value(dense):
    # Catches a layer without its norm, a norm that has not settled, and another slope of the leaky units.
    program, data, layers = dense
    x = np.asarray(V, float).reshape(len(V), -1)
    for layer in layers:
        x = np.where(x > 0, x, 0.1 * x) if layer is not layers[0] else x
        x = x @ np.asarray(layer.weight / np.linalg.norm(layer.weight, 2)).T + np.asarray(layer.bias)
    energy, _ = run(lambda: program(training=False), data)
    np.testing.assert_allclose(jax.vmap(energy)(V), x[:, 0], rtol=1e-4)


def test_first_state_can_be_used_again(encoder, dense):
    # Catches a state that is spent by the first run: Equinox refuses it in the second.
    for program in (lambda: encoder(V), dense[0]):
        first, second = ([leaf.tolist() for leaf in jax.tree.leaves(run(program, {})[1])] for _ in range(2))
        assert first == second


@pytest.fixture(scope="module")
def encoder(nets):
    net, state = eqx.filter_jit(eqx.nn.make_with_state(nets.dense_encoder))(KEY, (4, 4, 1), 2, 6)
    return lambda v, training=True: nets.with_state("encoder", net, state, training=training)(v)


@pytest.mark.parametrize("name", ["encoder", "energy"])
def test_state_moves_in_training_alone(encoder, dense, name):
    # Catches statistics that are frozen in a fit, or that go on moving when a fit is used.
    program = {"encoder": lambda training=True: encoder(V, training), "energy": dense[0]}[name]

    def leaves(sites):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sites[f"{name}$state"])])

    _, before = run(lambda: program(training=False), {})
    _, after = run(program, before)
    _, still = run(lambda: program(training=False), after)
    assert not np.array_equal(leaves(before), leaves(after))
    np.testing.assert_array_equal(leaves(after), leaves(still))


@pytest.mark.parametrize("training", [True, False])
def test_an_image_depends_on_its_batch_in_training_alone(encoder, training):
    # Catches inference mode that is not switched on, and statistics of the batch that are not used in a fit.
    (mean, _), _ = run(lambda: encoder(V, training), {})
    (of_two, _), _ = run(lambda: encoder(V[:2], training), {})
    assert np.allclose(mean[:2], of_two, atol=1e-5) is not training
