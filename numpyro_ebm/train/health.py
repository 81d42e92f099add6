# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a step of every engine is made of: its health, and the choice between new and old values.

The health of a step is data: an integer for each part of it that can go wrong, 0 where all is well. What is wrong is put
into words only where a run has stopped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Part(NamedTuple):
    """What of a step can go wrong."""

    #: one of the keys of ``WORDS``
    kind: str
    #: the site that it belongs to, if there is one
    site: str = ""

    def __str__(self) -> str:
        return WORDS[self.kind].format(self.site)


WORDS = {
    "loss": "the loss",
    "lower loss": "the loss of the lower level",
    "param": "param '{}'",
    "mutable": "mutable site '{}'",
    "particles": "the particles of site '{}'",
    "chains": "the negative chains of site '{}'",
    "plate": "the indices of plate '{}'",
}

Health = dict[Part, Array]  # (), int32 each: 0 where all is well, else a code


def health_of(kind: str, value: Any) -> Health:
    """1 where numbers are not finite: one part for each site of a dictionary, or one for a pytree."""
    if isinstance(value, dict):
        return {Part(kind, site): _not_finite(x) for site, x in value.items()}
    return {Part(kind): _not_finite(value)}


def is_bad(health: Health) -> Array:
    """Whether anything is."""
    return jnp.any(jnp.stack(list(health.values())) > 0)


def named(bad: dict[Part, int]) -> str:
    """The words for what is bad."""
    return ", ".join(map(str, bad))


def _not_finite(tree: Any) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # the largest of absolute values is nan or infinite where any is, and XLA on the CPU finds it in a third of the time of isfinite
    finite = [jnp.isfinite(jnp.max(jnp.abs(leaf), initial=0)) for leaf in leaves]
    return 1 - jnp.all(jnp.array(finite)).astype(jnp.int32)  # 0 of integers alone


class NonFiniteError(RuntimeError):
    """A run met numbers that are not finite, or chains that diverge, and stopped before it kept them."""

    def __init__(self, message: str, state: Any, step: int, health: dict[Part, int]) -> None:
        super().__init__(message)
        #: the last good state: ``run(..., init_state=error.state)`` goes on from it
        self.state = state
        #: the step, counted from 1 within the run, that was not made
        self.step = step
        #: what was bad about it: a code by ``(kind, site)``, such as ``{("param", "loc"): 1}``
        self.health = health
