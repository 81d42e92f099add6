# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Linear equations of pytrees, solved by conjugate gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm._pytree import keep

# Of conjugate gradient: the solution so far, its residual, the next direction, the residual's square.
_Solving = tuple[Any, Any, Any, Array]


def conjugate_gradient(product: Callable[[Any], Any], b: Any, num_steps: int, tol: float) -> Any:
    """``x`` with ``product(x) = b``, of a positive definite product of pytrees, to a residual of ``tol`` times that of 0.

    Of a product that is not it is the last ``x`` before a direction of negative curvature (Steihaug 1983): what samples make of a
    curvature near 0 has no inverse worth taking. The numbers are those of :func:`jax.scipy.sparse.linalg.cg`, which is a loop of
    open length: a GPU asks the host after every step of it whether to go on. Here all steps are gone through, and none changes
    anything once the residual is small.
    """
    enough = tol**2 * square(b)

    def advance(carry: _Solving) -> _Solving:
        x, residual, direction, size = carry
        curved = product(direction)
        curvature = dot(direction, curved)
        length = size / curvature
        new_residual = jax.tree.map(lambda r, c: r - length * c, residual, curved)
        new_size = square(new_residual)
        new_direction = jax.tree.map(lambda r, p: r + (new_size / size) * p, new_residual, direction)
        new = jax.tree.map(lambda x, p: x + length * p, x, direction), new_residual, new_direction, new_size
        return keep(curvature <= 0, (x, residual, direction, jnp.zeros_like(size)), new)  # what is nan stays so

    def on_cpu(carry: _Solving) -> _Solving:  # a branch costs nothing there
        return lax.cond(carry[3] > enough, advance, lambda carry: carry, carry)

    def elsewhere(carry: _Solving) -> _Solving:  # a branch asks the host
        return keep(carry[3] > enough, advance(carry), carry)

    def step(carry: _Solving, _: None) -> tuple[_Solving, None]:
        return lax.platform_dependent(carry, cpu=on_cpu, default=elsewhere), None

    begin = jax.tree.map(jnp.zeros_like, b), b, b, square(b)
    return lax.scan(step, begin, None, length=num_steps)[0][0]


def dot(a: Any, b: Any) -> Array:
    """The inner product of two pytrees."""
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y, precision="highest"), a, b)
    return sum(jax.tree.leaves(products), jnp.zeros(()))


def square(x: Any) -> Array:
    """The inner product of a pytree with itself."""
    return dot(x, x)
