# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The lines that say what a run is: the same in any process, and others as soon as the run is another."""

import json
import os
import subprocess
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebm import MALA, ExactScoreMatching, ParticleMMLE, ScoreMatching, negative_phase
from numpyro_ebm.train import fingerprint
from numpyro_ebm.train.fingerprint import describe, differing, fingerprint_of

SOURCE = '''
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

WIDTH = 2.0

def spread(x, factor=3.0):
    return factor * x * WIDTH

def make(offset, weights=None):
    def model(y=None):
        """A model."""
        names = {"loc", "scale", "other"}
        loc = numpyro.param("loc", jnp.zeros(())) + offset
        if "loc" in {"loc", "scale", "other", "one more"} and names:
            loc = jax.nn.softplus(loc) + (0 if weights is None else weights.sum())
        with numpyro.plate("rows", 3):
            shift = [spread(x) for x in (1.0, 2.0)][0]
            numpyro.sample("y", dist.Normal(loc + shift, 1.0), obs=y)
    return model
'''


def made(*changes, offset=1.5, weights=None, before="", file="model.py"):
    """The model of a script in which something is another."""
    source = before + SOURCE
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    namespace = {"__name__": "user_script"}
    exec(compile(source, file, "exec"), namespace)
    return namespace["make"](offset, weights)


def test_where_a_model_stands_does_not_matter():
    # Catches a run that is refused because a comment was added, a file moved, or a docstring corrected.
    moved = made(('"""A model."""', '"""A model, explained."""'), before="# a comment\n\n", file="/elsewhere/models.py")
    assert describe(moved) == describe(made())


@pytest.mark.parametrize(
    "other",
    [
        made(("WIDTH = 2.0", "WIDTH = 2.5")),
        made(("factor=3.0", "factor=3.5")),
        made(("factor * x", "factor + x")),
        made(("+ shift, 1.0", "+ shift, 2.0")),
        made(("softplus", "sigmoid")),
        made(("[spread(x) for", "[spread(-x) for")),
        made(('"one more"', '"one less"')),
        made(offset=1.25),
        made(offset=np.float32(1.5)),
        made(weights=jnp.arange(3.0)),
    ],
    ids=[
        "a global",
        "a default of a function that it calls",
        "such a function",
        "a constant",
        "a function of a library",
        "a comprehension",
        "a set of constants",
        "a number of the closure",
        "the type of that number",
        "an array of the closure",
    ],
)
def test_another_model_has_another_digest(other):
    # Catches a checkpoint of a model that was edited since, with which a run would go on in silence.
    assert describe(other) != describe(made())


def test_arrays_are_told_apart_by_their_numbers():
    big = np.arange(100_000.0)
    other = big.copy()
    other[-1] += 1
    digests = [describe(made(weights=w)) for w in (jnp.arange(3.0), jnp.arange(3.0) + 1, jnp.arange(3), big, other)]
    assert len(set(digests)) == 5
    assert describe(made(weights=jnp.arange(3.0))) == digests[0]
    assert describe(jnp.zeros((2, 3))).startswith("float32 of shape (2, 3), digest ")
    assert describe(jax.random.key(0)) != describe(jax.random.key(1))


def test_functions_of_a_module_of_the_user_are_followed():
    # Catches networks.energy, edited in a module of their own.
    def model_with(body):
        module = ModuleType("user_networks")
        exec(f"def energy(x):\n    return {body}\n\ndef unused(x):\n    return x", vars(module))
        namespace = {"__name__": "user_script", "networks": module}
        exec("def model(x):\n    return networks.energy(x)", namespace)
        return namespace["model"]

    assert describe(model_with("x * x")) == describe(model_with("x * x"))
    assert describe(model_with("x * x")) != describe(model_with("x + x"))


def model(y=None):
    loc = numpyro.param("loc", jnp.zeros(()))
    with numpyro.plate("rows", 3):
        z = numpyro.sample("z", numpyro.distributions.Normal(loc, 1.0))
        numpyro.sample("y", numpyro.distributions.Normal(z, 1.0), obs=y)


def particles(learning_rate=0.1, **settings):
    settings = {"num_particles": 3, "step_size": 0.1} | settings
    return ParticleMMLE(model, optax.adam(learning_rate), **settings)


def svi(handled=model, learning_rate=0.1, **settings):
    return SVI(handled, AutoNormal(model), numpyro.optim.Adam(learning_rate), Trace_ELBO(**settings))


def lines(one, other):
    return [line.partition(":")[0] for line in differing(fingerprint_of(one), fingerprint_of(other))]


def test_lines_name_the_setting_that_differs():
    # Catches a mismatch that nobody can read, settings of handlers and of NumPyro's optimizers that are left out.
    assert lines(particles(), particles()) == []
    assert lines(particles(), particles(num_particles=4)) == ["num_particles"]
    assert differing(fingerprint_of(particles()), fingerprint_of(particles(num_particles=4))) == [
        "num_particles: 3 in the folder, 4 here"
    ]
    assert lines(particles(), particles(learning_rate=0.2)) == ["optim"]
    assert lines(svi(), svi()) == []
    assert lines(svi(), svi(learning_rate=0.2)) == ["optim"]
    assert lines(svi(), svi(num_particles=2)) == ["loss"]
    phase = negative_phase(model, num_chains=8)
    assert lines(svi(phase), svi(negative_phase(model, num_chains=8))) == []
    assert lines(svi(phase), svi(negative_phase(model, num_chains=9))) == ["model.num_chains"]
    assert lines(svi(phase), svi(negative_phase(model, num_chains=8, sampler={"z": MALA(0.1)}))) == ["model.sampler"]
    assert "engine" in lines(particles(), svi())
    one, two = (ScoreMatching(model, optax.adam(0.1), ExactScoreMatching(), batch_size=size) for size in (None, 2))
    assert lines(one, two) == ["batch_size"]


def test_handlers_inside_a_model_are_part_of_it():
    # Catches a scale that was changed: NumPyro's handlers call themselves wrappers of the function.
    scaled, same, other = (numpyro.handlers.scale(model, scale=s) for s in (0.5, 0.5, 0.25))
    assert describe(scaled) == describe(same)
    assert describe(scaled) != describe(other)


def test_what_init_and_update_leave_on_svi_is_no_setting():
    # Catches a run that is refused because its SVI was used before.
    used = svi()
    used.init(jax.random.key(0), jnp.zeros(3))
    assert fingerprint_of(used) == fingerprint_of(svi())
    engine = particles()
    engine.update(engine.init(jax.random.key(0), jnp.zeros(3)), jnp.zeros(3))
    assert fingerprint_of(engine) == fingerprint_of(particles())


def test_other_things_can_be_part_of_it():
    told = fingerprint_of(particles(), num_rows=200, args=(jnp.zeros(3),))
    assert told["num_rows"] == "200"
    assert told["args"] != fingerprint_of(particles(), args=(jnp.ones(3),))["args"]


def test_digests_are_compared_within_one_version_of_python(monkeypatch):
    # Catches a run that is refused on a machine with a newer Python, whose compiler makes other bytecode.
    here = fingerprint_of(particles())
    monkeypatch.setattr(fingerprint, "PYTHON", "3.99")
    there = fingerprint_of(particles()) | {"model": "model, digest 0123456789ab"}
    assert differing(there, here) == []
    assert differing(there | {"num_particles": "5", "model": "other, digest 0123456789ab"}, here) == [
        "num_particles: 5 in the folder, 3 here",
        "model: other, digest 0123456789ab in the folder, " + here["model"] + " here",
    ]


IN_FRESH_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_fingerprint import *
print(json.dumps(several()))
"""


def several():
    return [fingerprint_of(particles()), fingerprint_of(svi(negative_phase(model))), describe(made(weights=jnp.arange(3.0)))]


def test_the_same_in_processes_that_hash_strings_otherwise():
    # Catches addresses, and the order of sets: a run that no other process would go on with.
    def told(seed):
        done = subprocess.run(
            [sys.executable, "-c", IN_FRESH_PROCESS, os.path.dirname(__file__)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert (
        told("1")
        == told("2")
        == json.loads(
            json.dumps(
                [fingerprint_of(particles()), fingerprint_of(svi(negative_phase(model))), describe(made(weights=jnp.arange(3.0)))]
            )
        )
    )
