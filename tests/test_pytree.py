# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from numpyro_ebm._pytree import arrays_and_rest, join, require_hashable


def _double(x):
    return 2 * x


def test_join_gives_back_the_tree_and_its_own_arrays():
    # Catches leaves that change places or kinds, and arrays that are copied or converted.
    tree = {"b": (np.arange(3), 2, None, "word"), "a": [jnp.ones(2), _double, True, np.float32(0.5)], "c": Partial(_double, 1.5)}
    arrays, rest = arrays_and_rest(tree)
    back = join(arrays, rest)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(one is other for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    assert [type(array) for array in arrays] == [type(tree["a"][0]), np.ndarray]


def test_numbers_are_in_the_rest_with_their_types():
    # Catches 1, 1.0 and True taken for the same static argument, so that a compiled function of one serves the others.
    numbers = [1, 1.0, True, np.int64(1), np.float32(1), np.bool_(True)]
    rests = [arrays_and_rest((number,))[1] for number in numbers]
    assert all(not arrays_and_rest((number,))[0] for number in numbers)
    assert len(set(rests)) == len(numbers)
    assert rests[0] == arrays_and_rest((1,))[1]
    assert hash(rests[0]) == hash(arrays_and_rest((1,))[1])


def test_arrays_leave_no_trace_in_the_rest():
    # Catches a rest that knows shapes or values, which would compile anew for every batch; traced arrays are arrays too.
    def split(x):
        return arrays_and_rest({"x": x, "n": 3})

    rests = []
    jax.jit(lambda x: rests.append(split(x)[1]))(jnp.ones(4))
    assert rests[0] == split(np.zeros((2, 2)))[1] == split(jax.random.key(0))[1]


def test_rest_survives_a_pickle():
    # Catches a marker for arrays that is compared by identity: the arrays of a loaded distribution would not be put back.
    arrays, rest = arrays_and_rest([np.arange(2), "word", Partial(_double, np.ones(1))])
    loaded = cloudpickle.loads(cloudpickle.dumps(rest))
    assert loaded == rest
    np.testing.assert_array_equal(join(arrays, loaded)[0], np.arange(2))


@pytest.mark.parametrize(("part", "kind"), [({1}, "set"), (bytearray(b"x"), "bytearray")])
def test_unhashable_part_is_named(part, kind):
    # Catches "unhashable type" from inside jax.jit, which names neither the argument nor the fix.
    with pytest.raises(TypeError, match=f"an argument of the model, a {kind}, is neither an array nor hashable"):
        require_hashable("an argument of the model", arrays_and_rest((part, 1))[1])
