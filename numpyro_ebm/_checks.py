# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a setting may be: one rule for every kind of setting.

Each function returns the setting as a plain Python value, so that settings hash, compare and print alike wherever they come
from: NumPy's and JAX's scalars are taken as the numbers they hold. Bools are not numbers and numbers are not bools. A traced
value is refused, because settings are compiled in.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def require_count(name: str, value: Any, least: int = 1, why: str = "") -> int:
    """An integer of ``least`` or more.

    :param str why: what the number is for, or what to pass: ends the message.
    :raises ValueError: naming the setting, what it was and what it must be.
    """
    number = _number(value)
    if not isinstance(number, numbers.Integral) or number < least:
        wanted = "a positive integer" if least == 1 else f"an integer of {least} or more"
        raise ValueError(_message(name, wanted, value, why))
    return int(number)


def require_positive(name: str, value: Any, why: str = "") -> float:
    """A positive finite number.

    :param str why: what the number is for, or what to pass: ends the message.
    :raises ValueError: naming the setting, what it was and what it must be.
    """
    number = _number(value)
    if number is None or not 0 < number < math.inf:
        raise ValueError(_message(name, "a positive finite number", value, why))
    return float(number)


def require_nonnegative(name: str, value: Any, why: str = "") -> float:
    """A finite number of 0 or more.

    :param str why: what the number is for, or what to pass: ends the message.
    :raises ValueError: naming the setting, what it was and what it must be.
    """
    number = _number(value)
    if number is None or not 0 <= number < math.inf:
        raise ValueError(_message(name, "a finite number of 0 or more", value, why))
    return float(number)


def require_negative(name: str, value: Any, why: str = "") -> float:
    """A negative finite number.

    :param str why: what the number is for, or what to pass: ends the message.
    :raises ValueError: naming the setting, what it was and what it must be.
    """
    number = _number(value)
    if number is None or not -math.inf < number < 0:
        raise ValueError(_message(name, "a negative finite number", value, why))
    return float(number)


def require_fraction(name: str, value: Any, why: str = "", *, zero: bool = False) -> float:
    """A number between 0 and 1, neither of them included; 0 too with ``zero``.

    :param str why: what the number is for, or what to pass: ends the message.
    :raises ValueError: naming the setting, what it was and what it must be.
    """
    number = _number(value)
    if number is None or not 0 <= number < 1 or (number == 0 and not zero):
        wanted = "a number of at least 0 and less than 1" if zero else "a number between 0 and 1"
        raise ValueError(_message(name, wanted, value, why))
    return float(number)


def require_bool(name: str, value: Any, why: str = "") -> bool:
    """True or False: neither 0 and 1, nor a word, which is true whatever it says.

    :param str why: what the setting is for: ends the message.
    :raises ValueError: naming the setting and what it was.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(_message(name, "True or False", value, why))
    return bool(value)


def require_one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of some words.

    :raises ValueError: naming them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(_message(name, f"one of {', '.join(map(repr, choices))}", value, ""))
    return value


def require_key(name: str, value: Any, why: str = "") -> Any:
    """One random key, typed or, as of :func:`jax.random.PRNGKey`, raw.

    :param str why: what the key is for: ends the message.
    :raises ValueError: naming the argument and what it was.
    """
    wanted = "one random key, such as jax.random.key(0)"
    if isinstance(value, (Array, np.ndarray)):
        is_raw = value.dtype == np.uint32
        num_dims = value.ndim - is_raw
        if num_dims >= 0 and (is_raw or jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
            if num_dims == 0:
                return value
            shape = value.shape[:num_dims]
            raise ValueError(f"{name} must be {wanted}, got keys of shape {shape}: pass one of them, or map over them by jax.vmap.")
    raise ValueError(_message(name, wanted, value, why))


def require_instance(name: str, value: Any, members: tuple[str, ...], wanted: str) -> Any:
    """An object that has some members, and no class of such objects.

    :param str wanted: what it must be, with an example: ``"a sampler such as MALA()"``.
    :raises TypeError: naming the setting, what it was and what it must be.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} must be {wanted}, got the class {value.__name__}: pass an instance, {value.__name__}(...).")
    if not all(hasattr(value, member) for member in members):
        raise TypeError(_message(name, wanted, value, ""))
    return value


def require_setting(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """An instance of one of some classes of settings.

    :raises TypeError: naming the setting, what it was and the classes.
    """
    if isinstance(value, type) and value in kinds:
        raise TypeError(f"{name} is the class {value.__name__}: pass an instance, {value.__name__}(...).")
    if not isinstance(value, kinds):
        *others, last = (f"{kind.__name__}(...)" for kind in kinds)
        raise TypeError(_message(name, f"{', '.join(others)} or {last}" if others else last, value, ""))
    return value


def _number(value: Any) -> Any:
    """The number that a value is or, of NumPy or JAX, holds; None of a bool, of what is traced and of what is no number."""
    if isinstance(value, (Array, np.ndarray, np.generic)):
        if isinstance(value, jax.core.Tracer) or np.ndim(value):
            return None
        is_real = jnp.issubdtype(value.dtype, jnp.floating)
        return float(value) if is_real else int(value) if jnp.issubdtype(value.dtype, jnp.integer) else None
    return value if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def _message(name: str, wanted: str, value: Any, why: str) -> str:
    found = "a traced value, which cannot be compiled in" if isinstance(value, jax.core.Tracer) else repr(value)
    return f"{name} must be {wanted}, got {found}{': ' + why if why else ''}."
