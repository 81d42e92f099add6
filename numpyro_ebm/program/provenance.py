# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a traced function's outputs depend on, told from its jaxpr: nothing is computed.

Values of interest are marked where they arise, by a name that JAX carries along; an output depends on those marks from which
a path of equations leads to it. NumPyro has the like, but it takes all of a ``scan``, a ``cond`` or a function with a
derivative of its own together, and knows nothing of stopped gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core.primitives import cond_p, dynamic_slice_p, gather_p, name_p, scan_p, stop_gradient_p

Sources = frozenset[str]
See = Callable[[Any, list[Sources]], None]

_PREFIX, _LEARNED = "numpyro_ebm.source:", "numpyro_ebm.learned:"


def mark(value: Any, name: str, *, learned: bool = False) -> Any:
    """The same arrays and numbers, known by ``name`` from here on and no longer by what they are made of.

    :param learned: whether they only count where a gradient reaches them: not behind :func:`jax.lax.stop_gradient`.
    """
    tag = (_LEARNED if learned else _PREFIX) + name
    numeric = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
    return jax.tree.map(lambda x: checkpoint_name(x, tag) if isinstance(x, numeric) else x, value)


def sources(fn: Callable[[], Any]) -> Any:
    """The names of the marks that each output of a function depends on, in the structure of what it returns."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shapes), sources_of(closed))


def sources_of(jaxpr: Any) -> list[Sources]:
    """The same of every output of a jaxpr."""
    return [_names(tags) for tags in _of_outputs(jaxpr, [])]


def are_gathered(values: str, places: str, fn: Callable[[], Any]) -> bool:
    """Whether a function takes parts out of what is made of the values marked ``values``, at places made of those marked ``places``."""
    found: list[bool] = []

    def see(equation: Any, inputs: list[Sources]) -> None:
        if equation.primitive in (gather_p, dynamic_slice_p):
            out_of, at = _names(inputs[0]), frozenset().union(*map(_names, inputs[1:]))
            found.append(values in out_of and places in at)

    closed = jax.make_jaxpr(fn)()
    _of_outputs(closed, [], see)
    return any(found)


def marked_by(equation: Any) -> str | None:
    """The name that an equation marks a value by, if it does."""
    if equation.primitive is name_p and equation.params["name"].startswith((_PREFIX, _LEARNED)):
        return str(equation.params["name"].split(":", 1)[1])
    return None


def inner_jaxpr(equation: Any) -> Jaxpr | None:
    """That of jit, remat or a function with a derivative of its own, whose inputs and outputs are those of the equation."""
    inner = opened(equation.params.get("jaxpr", equation.params.get("call_jaxpr")))
    sizes = len(equation.invars), len(equation.outvars)
    is_call = isinstance(inner, Jaxpr) and equation.primitive is not scan_p and (len(inner.invars), len(inner.outvars)) == sizes
    return inner if is_call else None


def opened(jaxpr: Any) -> Any:
    """A jaxpr without the constants that it is closed over."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _names(tags: Sources) -> Sources:
    return frozenset(tag.split(":", 1)[1] for tag in tags)


def _of_outputs(jaxpr: Any, inputs: Sequence[Sources], see: See | None = None) -> list[Sources]:
    """The marks of the outputs from those of the inputs.

    :param see: called with every equation, and the marks of its inputs.
    """
    jaxpr = opened(jaxpr)
    known: dict[Any, Sources] = dict(zip(jaxpr.invars, inputs, strict=False))

    def read(x: Any) -> Sources:
        return frozenset() if isinstance(x, Literal) else known.get(x, frozenset())

    for equation in jaxpr.eqns:
        marks = [read(x) for x in equation.invars]
        if see is not None:
            see(equation, marks)
        known.update(zip(equation.outvars, _of_equation(equation, marks, see), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _of_equation(equation: Any, inputs: list[Sources], see: See | None = None) -> list[Sources]:
    params, num_outputs = equation.params, len(equation.outvars)
    if marked_by(equation) is not None:
        return [frozenset({params["name"]})]
    if equation.primitive is stop_gradient_p:
        return [frozenset(tag for tag in inputs[0] if tag.startswith(_PREFIX))]
    if equation.primitive is scan_p:
        return _of_scan(equation, inputs, see)
    if equation.primitive is cond_p:
        branches = [_of_outputs(branch, inputs[1:], see) for branch in params["branches"]]
        return [inputs[0].union(*outputs) for outputs in zip(*branches, strict=True)]
    if (inner := inner_jaxpr(equation)) is not None:
        return _of_outputs(inner, inputs, see)
    return [frozenset().union(*inputs)] * num_outputs


def _of_scan(equation: Any, inputs: list[Sources], see: See | None = None) -> list[Sources]:
    body = opened(equation.params["jaxpr"])
    # what is stacked has an axis less inside; the params that count the rest have other names in every version of JAX
    num_xs = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(equation.invars, body.invars, strict=True))
    num_carry = sum(outer.aval.ndim == inner.aval.ndim for outer, inner in zip(equation.outvars, body.outvars, strict=True))
    num_consts = len(inputs) - num_carry - num_xs
    consts, carry, xs = inputs[:num_consts], inputs[num_consts : num_consts + num_carry], inputs[num_consts + num_carry :]
    while True:
        outputs = _of_outputs(body, [*consts, *carry, *xs], see)
        grown = [old | new for old, new in zip(carry, outputs[:num_carry], strict=True)]
        if grown == carry:
            return [*carry, *outputs[num_carry:]]
        carry = grown
