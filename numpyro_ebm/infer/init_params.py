# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Values of param sites to start from: what they may be, and whether they are those of the programs.

A value that no program could use is refused as it is given; the name and the shape where a program asks for the param while it
is traced; what lies outside a constraint when the numbers are known.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import block, seed
from numpyro.primitives import Messenger

from numpyro_ebm.program.sites import Site


class InitParams(Messenger):
    """Looks at the params of the programs that run inside: a value to start from must be one of theirs.

    :raises ValueError: naming the site, for a value of a site that is no param, or of another shape than the program's own.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given
        #: of the params that were seen
        self.constraints: dict[str, Any] = {}

    def process_message(self, msg: Site) -> None:
        name = msg.get("name")
        if name not in self.given or msg["type"] not in ("param", "sample", "deterministic", "mutable", "plate"):
            return
        if msg["type"] != "param":
            raise ValueError(f"init_params names ['{name}'], which is no param site but a {msg['type']} site.")
        self.constraints[name] = msg["kwargs"].get("constraint", constraints.real)
        own, given = _own_shapes(msg), jax.tree.map(np.shape, self.given[name])
        if own is not None and own != given:
            raise ValueError(f"init_params['{name}'] is of shape {given}, and the param of shape {own}.")

    def postprocess_message(self, msg: Site) -> None:
        if msg["type"] != "param" or msg["name"] in self.given or not jax.tree_util.all_leaves([msg["value"]]):
            return
        value, name = msg["value"], msg["name"]
        if isinstance(value, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return
        if not np.isfinite(value).all():
            raise ValueError(f"param site '{name}': its own value to start from is NaN or infinite.")
        constraint = msg["kwargs"].get("constraint", constraints.real)
        is_known = not any(isinstance(bound, jax.core.Tracer) for bound in jax.tree.leaves(constraint))
        if is_known and not np.all(constraint(np.asarray(value))):
            raise ValueError(f"param site '{name}': its own value to start from, {value}, is outside its constraint, {constraint}.")

    def are_inside(self) -> dict[str, Array]:
        """Whether each value is in its param's constraint, and not on a boundary, which no unconstrained value is mapped to."""
        return {name: _is_inside(self.given[name], constraint) for name, constraint in self.constraints.items()}

    def outside(self, name: str) -> str:
        """That a value is not."""
        value = self.given[name]
        got = f" got {value}" if np.ndim(value) == 0 else " got values that are not in it"
        return f"init_params['{name}'] must be inside the param's constraint, {self.constraints[name]}:{got}."


def _is_inside(value: Any, constraint: Any) -> Array:
    if any(isinstance(bound, jax.core.Tracer) for bound in jax.tree.leaves(constraint)):
        return jnp.asarray(True)  # of a bound inside another trace nothing can be said
    finite = jax.tree.map(lambda x: jnp.isfinite(x).all(), biject_to(constraint).inv(value))
    inside = jnp.asarray(constraint(value)).all() if jax.tree_util.all_leaves([value]) else True  # pytrees are real
    return jnp.asarray([inside, *jax.tree.leaves(finite)]).all()


def _own_shapes(msg: Site) -> Any:
    """The shapes of a param as the program has it; None where it leaves them open, as a network that is made elsewhere."""

    def own() -> Any:
        with block(), seed(rng_seed=0):  # keys of its own: those of the program stay as they are
            return msg["fn"](*msg["args"], **msg["kwargs"])

    shapes = jax.eval_shape(own)
    return None if shapes is None else jax.tree.map(lambda x: x.shape, shapes)
