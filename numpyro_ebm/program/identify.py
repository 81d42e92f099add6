# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What scales and shifts a latent wherever it enters a model, told from the jaxpr of its densities: nothing is computed.

A latent with a learned prior that enters as ``a * z + b`` alone has two scales and two locations: the prior's, and ``a`` and ``b``.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from numpyro_ebm.program.provenance import inner_jaxpr, marked_by, opened


class _Form(NamedTuple):
    """How a value is made of the latent: ``scale * z + shift`` so far."""

    scale: str = ""  # the free value that scales it, "" for none
    shift: str = ""
    can_scale: bool = True  # whether a factor from here on scales the latent, and nothing else with it
    can_shift: bool = True

    @property
    def used(self) -> "_Form":
        """The same of what is made of the value otherwise."""
        return self._replace(can_scale=False, can_shift=False)


class _Value(NamedTuple):
    """What is known of a value."""

    form: _Form | None = None  # where the latent is in it
    free: str = ""  # the free value that it is a function of, and of nothing else
    summand: str = ""  # a free value that it is the sum of something with
    is_number: bool = False  # a literal


def scale_and_shift(jaxpr: Any, site: str, free: Collection[str]) -> tuple[str, ...]:
    """The values that scale and shift a latent in everything that depends on it.

    :param jaxpr: of log densities, the latent's own left out, with every value marked by its site.
    :param free: sites whose values are free to do so.
    """
    forms = [value.form for value in _of_outputs(jaxpr, [], site, frozenset(free)) if value.form is not None]
    if not forms:
        return ()
    met = _met(forms)
    return tuple(name for name in (met.scale, met.shift) if name)


def _of_outputs(jaxpr: Any, inputs: Sequence[_Value], site: str, free: frozenset[str]) -> list[_Value]:
    jaxpr = opened(jaxpr)
    known: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=False))

    def read(x: Any) -> _Value:
        return _Value(is_number=jnp.ndim(x.val) == 0) if isinstance(x, Literal) else known.get(x, _Value())

    for equation in jaxpr.eqns:
        values = [read(x) for x in equation.invars]
        known.update(zip(equation.outvars, _of_equation(equation, values, site, free), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _of_equation(equation: Any, values: list[_Value], site: str, free: frozenset[str]) -> list[_Value]:
    name = marked_by(equation)
    if name == site:
        return [_Value(_Form())]
    if name is not None:
        return [_Value(values[0].form, name, name) if name in free else _Value(values[0].form)]
    inner = inner_jaxpr(equation)
    if isinstance(inner, Jaxpr):
        return _of_outputs(inner, values, site, free)
    return [_made(equation.primitive.name, values)] * len(equation.outvars)


def _made(operation: str, values: list[_Value]) -> _Value:
    forms = [value.form for value in values if value.form is not None]
    if not forms:
        return _Value(None, _only_free(values), _summand(operation, values))
    first, *rest = values
    if operation in _SAME_ELEMENTS and first.form is not None:
        return first
    if operation in ("add", "add_any", "sub") and len(forms) == 1:
        other = rest[0] if first.form is not None else first
        return _Value(_shifted(forms[0], other))
    if (operation == "mul" and len(forms) == 1) or (operation == "div" and len(forms) == 1 and first.form is not None):
        other = rest[0] if first.form is not None else first
        return _Value(_scaled(forms[0], other))
    return _Value(_met(forms).used)


def _only_free(values: list[_Value]) -> str:
    """The free value that all are functions of, if there is one."""
    found = {value.free for value in values if not value.is_number}
    return found.pop() if len(found) == 1 else ""


def _summand(operation: str, values: list[_Value]) -> str:
    if operation in ("add", "add_any", "sub"):
        return next((value.summand for value in values if value.summand), "")
    return values[0].summand if operation in _SAME_ELEMENTS else _only_free(values)


def _shifted(form: _Form, other: _Value) -> _Form:
    if other.is_number:
        return form
    if other.summand and form.can_shift:
        form = form._replace(shift=other.summand)
    return form if other.free else form._replace(can_scale=False)  # a scale would be that of the data too


def _scaled(form: _Form, other: _Value) -> _Form:
    if other.is_number:
        return form
    if other.free:
        return form._replace(scale=other.free) if form.can_scale else form.used
    return form._replace(can_shift=False)  # a shift would be that of a product with the data


def _met(forms: list[_Form]) -> _Form:
    """What holds in all of several places."""
    met = forms[0]
    for form in forms[1:]:
        met = _Form(
            met.scale if form.scale else "",
            met.shift if form.shift else "",
            met.can_scale and form.can_scale,
            met.can_shift and form.can_shift,
        )
    return met


_SAME_ELEMENTS = frozenset(
    {"neg", "copy", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type", "transpose"}
    | {"slice", "dynamic_slice", "gather", "rev"}
)
