# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a run is, in lines that are the same in any process: its engine, settings, programs and what else it is told.

A run that goes on from a checkpoint must be the run that wrote it. Settings are told apart by what they print; programs, and all
else that does not print what it does, by a digest of what they are made of: bytecode, constants, defaults, closures, the functions
of the user that they call, attributes, and arrays by shape, dtype and checksum. Neither line numbers, paths, addresses nor the
order of sets are in it. Functions of libraries are taken by name.
"""

import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

from numpyro_ebm._compiled import LIBRARIES, PLAIN, Look, Same, is_library
from numpyro_ebm.train.leaves import checksum, listed

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MADE_BY_INIT = {"constrain_fn", "mutable_state"}  # attributes of NumPyro's SVI that are no settings
KEPT_BY_HANDLERS = {"rng_key", "trace"}  # attributes of NumPyro's handlers that change in every run
PROGRAMS = ("model", "guide", "energy", "encoder", "generator")  # attributes of engines
EXPANDED = ("numpyro", "optax", "numpyro_ebm")  # libraries whose objects hold settings in attributes
MAX_TEXT = 120


def fingerprint_of(engine: Any, **more: Any) -> dict[str, str]:
    """The lines of a run with an engine of this package or NumPyro's ``SVI``.

    :param more: what else must be the same, by name, such as ``num_rows=200_000``.
    """
    lines = {"engine": type(engine).__name__, "python": PYTHON}
    settings = {name: value for name, value in vars(engine).items() if not name.startswith("_") and name not in MADE_BY_INIT}
    for name, value in [*settings.items(), *more.items()]:
        lines |= dict(_lines(name, value))
    return lines


def programs_of(engine: Any) -> dict[str, str]:
    """The lines of its programs alone: a state may be read for other settings, and not for another model."""
    return {name: line for name, line in fingerprint_of(engine).items() if name in ("python", *PROGRAMS)}


def require_same_programs(what: str, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuses a state of other programs.

    :param str what: what holds the state, as an error calls it.
    :param there: lines of the fit that it is of.
    :param here: :func:`programs_of` the engine that it is read for.
    :raises ValueError: with each program that differs.
    """
    lines = differing({name: line for name, line in there.items() if name in here}, here, "there")
    if lines:
        raise ValueError(
            f"{what} holds the state of other programs:\n{listed(lines)}\nLoad it with the programs of its fit. What that gives "
            "may be given to another engine, as by run(..., init_state=...)."
        )


def differing(there: Mapping[str, str], here: Mapping[str, str], where: str = "in the folder") -> list[str]:
    """The lines in which two fingerprints differ, with both values.

    Digests are compared within one version of Python, whose compiler they depend on.
    """
    is_same_python = there.get("python") == here.get("python")
    lines = []
    for name in [*here, *(name for name in there if name not in here)]:
        before, now = there.get(name, "nothing"), here.get(name, "nothing")
        is_same = before == now if is_same_python else _without_digest(before) == _without_digest(now)
        if name != "python" and not is_same:
            lines.append(f"{name}: {before} {where}, {now} here")
    return lines


def describe(value: Any) -> str:
    """One value in a line."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Array | np.ndarray) and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{value.dtype.name} of shape {value.shape}, digest {_digest(value)}"
    return f"{_text(value)}, digest {_digest(value)}"


def _lines(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, Messenger):
        yield name, describe(value)
    else:  # what a handler is told has lines of its own
        yield name, f"{_text(value)}, digest {_digest(getattr(value, 'fn', None))}"
        for part in _settings(value):
            if part != "fn":
                yield f"{name}.{part}", describe(vars(value)[part])


def _text(value: Any) -> str:
    """What a value calls itself, without addresses."""
    if isinstance(value, Messenger):
        inner = getattr(value, "fn", None)
        return f"{type(value).__name__}({_text(inner)})" if callable(inner) else type(value).__name__
    if isinstance(value, FunctionType | type):
        return value.__qualname__.rpartition("<locals>.")[2]
    text = " ".join(re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", repr(value)).split()).replace("<locals>.", "")
    return type(value).__name__ if " at 0x" in text or len(text) > MAX_TEXT else text


def _without_digest(line: str) -> str:
    return re.sub(r", digest \w+", "", line)


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for token in _tokens(value, []):
        digest.update(token.encode() + b"\0")
    return digest.hexdigest()[:12]


def _tokens(value: Any, seen: list[Any]) -> Iterator[str]:
    """What a value is made of, as text.

    :param seen: what was looked into before, kept so that no other object is given its address.
    """
    look = _LookAtSettings(value)
    for found in look.snapshot.found:
        if isinstance(found, Same):
            yield from _tokens_of_one(found.value, seen)
        else:
            yield _plain(found)
    for function, code, _ in look._functions:  # what they take of modules of the user, where a look ends
        if not is_library(function.__globals__.get("__name__")):
            yield from _tokens_of_modules(function, code, seen)


class _LookAtSettings(Look):
    """A look at what handlers and automatic guides are told, and not at what they keep of the runs that they see."""

    def _into(self, x: Any, written: frozenset[str] | None) -> None:
        if isinstance(x, Messenger | AutoGuide):
            self._found.append(Same(type(x)))
            self._names_in(vars(x), _settings(x), written)
        else:
            super()._into(x, written)


def _settings(told: Any) -> list[str]:
    """The attributes of a handler or an automatic guide that are settings."""
    if isinstance(told, AutoGuide):
        params = {name for cls in type(told).__mro__ for name in inspect.signature(vars(cls).get("__init__", cls)).parameters}
        return [name for name in vars(told) if name.lstrip("_") in params]
    return [name for name in vars(told) if not name.startswith("_") and name not in KEPT_BY_HANDLERS]


def _tokens_of_one(value: Any, seen: list[Any]) -> Iterator[str]:
    if isinstance(value, CodeType):
        yield from _tokens_of_code(value)
    elif isinstance(value, np.memmap):
        yield f"memmap {value.dtype.name} {value.shape}"
    elif isinstance(value, Array | np.ndarray):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        numbers = jax.random.key_data(value) if is_key else value
        yield f"array {value.dtype} {value.shape} {checksum(numbers) if numbers.dtype != object else ''}"
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}"
        if hasattr(value, "__qualname__"):
            yield f"{value.__module__}.{value.__qualname__}"
        elif not any(value is other for other in seen):
            seen.append(value)
            yield from _tokens_of_parts(value, seen)


def _tokens_of_parts(value: Any, seen: list[Any]) -> Iterator[str]:
    if type(value).__module__.partition(".")[0] in EXPANDED and hasattr(value, "__dict__"):
        for name, part in sorted(vars(value).items()):
            yield name
            yield from _tokens(part, seen)
    else:
        for leaf in jax.tree.leaves(value):
            if leaf is not value:
                yield from _tokens(leaf, seen)


def _tokens_of_modules(function: FunctionType, code: CodeType, seen: list[Any]) -> Iterator[str]:
    for module_name in code.co_names:
        module = function.__globals__.get(module_name)
        if isinstance(module, ModuleType) and not is_library(module.__name__):
            for name in code.co_names:
                part = vars(module).get(name)
                if part is not None and not isinstance(part, ModuleType) and not any(part is other for other in seen):
                    seen.append(part)
                    yield name
                    yield from _tokens(part, seen)


def _tokens_of_code(code: CodeType) -> Iterator[str]:
    if root := _library_of(code.co_filename):
        yield f"{Path(code.co_filename).relative_to(root)} {code.co_qualname}"
        return
    yield repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags))
    yield repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_exceptiontable))
    is_function = code.co_flags & inspect.CO_NEWLOCALS and not code.co_name.startswith("<")
    for i, constant in enumerate(code.co_consts):
        if not (i == 0 and is_function and isinstance(constant, str)):  # the docstring
            yield from _tokens_of_code(constant) if isinstance(constant, CodeType) else [_plain(constant)]


def _plain(value: Any) -> str:
    """A value that a look or the compiler found, as text that does not depend on the process."""
    if isinstance(value, frozenset):
        return f"set {sorted(map(_plain, value))}"
    if isinstance(value, tuple):
        return f"tuple {[_plain(part) for part in value]}"
    if isinstance(value, PLAIN):
        return f"{type(value).__name__} {value!r}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


@lru_cache(4096)
def _library_of(file: str) -> str | None:
    """The folder that holds a library's files, if the file is one of those."""
    roots = {
        name: Path(str(sys.modules[name].__file__)).parent for name in LIBRARIES - sys.stdlib_module_names if name in sys.modules
    }
    if found := next((root for root in roots.values() if Path(file).is_relative_to(root)), None):
        return str(found)
    stdlib = sysconfig.get_path("stdlib")
    return stdlib if Path(file).is_relative_to(stdlib) and "-packages" not in file else None
