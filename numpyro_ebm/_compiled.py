# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What a compiled function has frozen, and :func:`compiled`, which compiles what is called eagerly.

JAX compiles a function for arrays of some shapes. Whatever else it reads while Python runs it is a constant from then on: closures
and globals of functions, attributes of objects. A :class:`Snapshot` holds what they were. As a part of what a program is compiled
for, it keeps a program from being used where they have changed.

Closures, defaults and globals of functions are followed, also of those that they call, and attributes of functions and objects.
What belongs to a library is taken to be fixed. What a function writes itself is its own record and no setting. So are, for an
engine, lists and sets that a function reads. Not all can be seen, as behind a class of the user's, an import inside a function or a
module: an engine then goes on with what it has compiled, and what is called eagerly is compiled anew.
"""

import dis
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import is_dataclass
from functools import lru_cache, partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jaxlib.version
import numpy as np
from jax import Array
from numpyro.distributions import Distribution
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform
from numpyro.handlers import seed
from numpyro.primitives import Messenger

from numpyro_ebm._pytree import Rest, arrays_and_rest, join

T = TypeVar("T")

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), np.generic, np.dtype, jax.ShapeDtypeStruct)
LIBRARIES = sys.stdlib_module_names | {"jax", "jaxlib", "numpy", "numpyro", "numpyro_ebm", "optax", "equinox", "flax", "scipy"}
FIXED = {"jax", "jaxlib", "numpy"}  # libraries whose functions and types do not change
LOOKING = {"globals", "locals", "vars", "getattr", "eval", "exec", "__import__", "__dict__"}
# objects of libraries that hold what users give them, beside dataclasses and our own
FOLLOWED = (Distribution, Constraint, Transform, Messenger, SimpleNamespace)
MAX_BYTES = 2**16  # of a NumPy array that is compared by its numbers

_Names = frozenset[str] | None


def compiled(function: Callable[..., T], *args: Any, cheaply: bool = False) -> T:
    """``function(*args)`` for pytrees of arrays and constants, compiled: once, or anew if that could freeze what may change.

    Inside another transformation it is run as it is. So it is where it fails: errors read the name of a site from the frames
    around it.

    :param cheaply: whether it is to be compiled soon more than to run fast.
    """
    arrays, rest = arrays_and_rest(args)
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return function(*args)
    program: Callable[[list[Array]], Any] = _jit(function, rest, cheaply)
    try:
        look = Look(function, rest, with_lists=True)
        if look.sees_all:
            program = _program(function, rest._replace(frozen=look.snapshot), cheaply)
    except Exception:  # of a pytree that does without its arrays, or of a part that does not hash
        pass
    try:
        return program(arrays)
    except Exception:
        return function(*args)


def cheap_options(level: int = 0) -> dict[str, Any]:
    """Options of XLA by which a program is compiled soon, however fast it runs: it then takes a third of the time on CPUs.

    XLA's emitter of fusions takes most of what is left at optimization level 0; later versions cannot do without it.

    :param level: of optimization; 1 for what runs as long as it is compiled.
    """
    cheap: dict[str, Any] = {"xla_backend_optimization_level": level}
    if jax.default_backend() == "cpu" and jaxlib.version.__version_info__ < (0, 11):
        cheap |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    return cheap


@lru_cache(maxsize=128)  # of which each may keep megabytes
def _program(function: Callable[..., Any], rest: Rest, cheaply: bool) -> Callable[[list[Array]], Any]:
    return _jit(function, rest, cheaply)


def _jit(function: Callable[..., Any], rest: Rest, cheaply: bool) -> Callable[[list[Array]], Any]:
    options: Any = cheap_options() if cheaply else None
    return jax.jit(lambda arrays: function(*join(arrays, rest)), compiler_options=options)


def frozen(rest: Rest) -> Rest:
    """What is compiled in, with what it holds and reads now, though it is the same object."""
    leaves = [leaf for leaf in rest.leaves if leaf is not None]
    return rest._replace(frozen=Watch(*leaves).snapshot()) if leaves else rest


class Snapshot:
    """What functions and objects held, equal to another snapshot of them where nothing has changed."""

    def __init__(self, found: tuple[Hashable, ...]) -> None:
        self.found, self._hash = found, hash(found)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Snapshot) and self.found == other.found)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        return Snapshot, ((),)  # in another process it is equal to none


class Watch:
    """Functions and objects that are looked at again and again."""

    def __init__(self, *values: Any) -> None:
        self._values = values
        self._look = Look(*values)

    def __reduce__(self) -> Any:
        return Watch, self._values

    def snapshot(self) -> Snapshot:
        """What they hold now: looked for only where something has become another object."""
        if not self._look.is_current():
            last, self._look = self._look.snapshot, Look(*self._values)
            if self._look.snapshot == last:
                self._look.snapshot = last  # the same object is compared at once
        return self._look.snapshot


class Same:
    """A value compared by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Look:
    """A walk through values and what they hold."""

    def __init__(self, *values: Any, with_lists: bool = False) -> None:
        self._with_lists = with_lists
        self.sees_all = True  # whether nothing may change that is not in the snapshot
        self._found: list[Hashable] = []
        self._seen: dict[int, tuple[int, Any]] = {}  # by id, with its number, and kept, so that nothing else is given the id
        self._places: list[tuple[Mapping[Any, Any], Any, Any]] = []  # a dictionary, a name in it, what is there
        self._sizes: list[tuple[Mapping[Any, Any], int]] = []  # a dictionary, how many names it has
        self._cells: list[tuple[CellType, Any]] = []  # a variable of a closure, its value
        self._functions: list[tuple[FunctionType, CodeType, Any]] = []  # a function, its code (which notebooks reload), defaults
        self._changes_inside = False  # whether something is seen that may change and be the same object
        for value in values:
            self._at(value, None)
        self.snapshot = Snapshot(tuple(self._found))

    def is_current(self) -> bool:
        """Whether it is known that another look would find the same."""
        if self._changes_inside or any(holder.get(name, self) is not value for holder, name, value in self._places):
            return False
        if any(f.__code__ is not code or f.__defaults__ is not defaults for f, code, defaults in self._functions):
            return False
        return all(len(holder) == size for holder, size in self._sizes) and all(_in(cell) is value for cell, value in self._cells)

    def _at(self, x: Any, written: _Names) -> None:
        """Looks at a value.

        :param written: names that the function writes which holds it; None of what no function holds.
        """
        if isinstance(x, PLAIN):
            self._found += cast(list[Hashable], [type(x), repr(x) if isinstance(x, (float, complex)) else x])  # -0.0 == 0.0
        elif isinstance(x, Array):
            self._found.append(Same(x))  # it cannot change
            self.sees_all &= not isinstance(x, jax.core.Tracer)
        elif id(x) in self._seen:
            self._found.append(self._seen[id(x)][0])  # the same as before: which of them it is
        else:
            self._seen[id(x)] = len(self._seen), x
            self._into(x, written)

    def _into(self, x: Any, written: _Names) -> None:
        if isinstance(x, FunctionType):
            self._function(x)
        elif isinstance(x, Rest):
            self._at(jax.tree.unflatten(x.structure, x.leaves), written)
        elif isinstance(x, (list, set)) and written is not None and not self._with_lists:
            pass
        elif isinstance(x, (tuple, list)):
            self.sees_all &= type(x) in (tuple, list) or is_library(type(x).__module__)  # those of users may have methods
            self._changes_inside |= isinstance(x, list)
            self._found += (type(x), len(x))
            for part in x:
                self._at(part, written)
        elif isinstance(x, (frozenset, set)):
            self.sees_all &= all(isinstance(part, PLAIN) for part in x)
            self._changes_inside |= isinstance(x, set)
            self._found.append(frozenset(x))
        elif isinstance(x, dict):
            self.sees_all &= type(x) in (dict, OrderedDict) and all(isinstance(name, str | int) for name in x)
            self._found.append(len(x))
            self._names_in(x, list(x), written)
            self._sizes.append((x, len(x)))
        elif isinstance(x, np.ndarray):
            small = x.nbytes <= MAX_BYTES and type(x) is np.ndarray and x.dtype != object
            self.sees_all, self._changes_inside = self.sees_all and small, self._changes_inside or small
            self._found += (x.shape, x.dtype, x.tobytes()) if small else (Same(x),)
        elif isinstance(x, MethodType):
            self._at(x.__func__, written)
            self._at(x.__self__, _outside(x.__func__.__code__).written)
        elif isinstance(x, partial):
            self.sees_all &= not vars(x)
            self._at((x.func, x.args, x.keywords), written)
        elif isinstance(x, type):
            self._class(x)
        elif isinstance(x, ModuleType):
            self.sees_all &= is_library(x.__name__)
        elif is_library(type(x).__module__) and hasattr(x, "__wrapped__") and not isinstance(x, Messenger):
            self._at(x.__wrapped__, written)
        else:
            self._object(x, written)

    def _function(self, function: FunctionType) -> None:
        code, variables = function.__code__, function.__globals__
        names, of_library = _outside(code), is_library(variables.get("__name__"))
        self._found.append(Same(code))
        self._functions.append((function, code, function.__defaults__))
        self.sees_all &= names.is_plain or of_library
        self._at((function.__defaults__, function.__kwdefaults__), names.written)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name in names.written:
                self.sees_all &= of_library
            else:
                self._cells.append((cell, _in(cell)))
                self._at(_in(cell), names.written)
        if not of_library:
            self._names_in(variables, [name for name in names.read if name in variables], names.written)
            attributes = vars(function)
            self._names_in(attributes, [name for name in attributes if name != "__wrapped__"], names.written)
            self._sizes.append((attributes, len(attributes)))

    def _class(self, cls: type) -> None:
        self._found.append(Same(cls))
        for owner in cls.__mro__:
            if not is_library(owner.__module__):
                self.sees_all = False  # a class holds whatever it likes
                for name, member in list(vars(owner).items()):
                    self._places.append((vars(owner), name, member))
                    value = getattr(member, "__func__", getattr(member, "fget", member))  # of static methods and properties
                    if isinstance(value, (FunctionType, *PLAIN)):
                        self._found.append(name)
                        self._at(value, frozenset())

    def _object(self, x: Any, written: _Names) -> None:
        cls = type(x)
        is_open = isinstance(x, FOLLOWED) or is_dataclass(x) or cls.__module__.startswith("numpyro_ebm.")
        if is_library(cls.__module__) and not is_open:
            is_fixed = _is_fixed(x)
            self._found.append(x if is_fixed and isinstance(x, Hashable) else Same(x))
            self.sees_all &= is_fixed
            return
        self._class(cls)
        if isinstance(x, Messenger):
            written = _written_in_runs(cast(Hashable, cls)) | (written or frozenset())
        elif callable(x) and isinstance(cls.__call__, FunctionType):  # it is a function that has its attributes
            written = _outside(cls.__call__.__code__).written | (written or frozenset())
        attributes = vars(x) if hasattr(x, "__dict__") else {name: getattr(x, name) for name in _slots(cls) if hasattr(x, name)}
        self._changes_inside |= not hasattr(x, "__dict__")
        names = list(attributes)
        if isinstance(x, Messenger):  # what it keeps for itself changes in every run, and the program in it is .fn as well
            names = [name for name in names if not name.startswith("_")]
        self._names_in(attributes, names, written)
        self._sizes.append((attributes, len(attributes)))

    def _names_in(self, holder: Mapping[Any, Any], names: Iterable[Any], written: _Names) -> None:
        for name in names:
            if written and name in written:
                self.sees_all = False
            else:
                self._places.append((holder, name, holder[name]))
                self._found.append(repr(name))
                self._at(holder[name], written)


class _Outside(NamedTuple):
    """What the code of a function, and of those defined in it, does with names outside of it."""

    read: tuple[str, ...]  # globals
    written: frozenset[str]  # globals, variables of closures and attributes
    is_plain: bool  # whether it reads nothing else: by an import, or by a look into names


@lru_cache(4096)
def _outside(code: CodeType) -> _Outside:
    read: dict[str, None] = {}
    written: set[str] = set()
    is_plain = True
    for instruction in dis.get_instructions(code):
        is_plain &= not (
            instruction.opname.startswith("IMPORT") or (isinstance(instruction.argval, str) and instruction.argval in LOOKING)
        )
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read[instruction.argval] = None
        elif instruction.opname in ("STORE_GLOBAL", "STORE_ATTR", "STORE_DEREF"):
            written.add(instruction.argval)
    for inside in code.co_consts:
        if isinstance(inside, CodeType):
            read |= dict.fromkeys(_outside(inside).read)
            written |= _outside(inside).written
            is_plain &= _outside(inside).is_plain
    return _Outside(tuple(read), frozenset(written.difference(code.co_cellvars)), is_plain)


@lru_cache(4096)
def _written_in_runs(cls: type) -> frozenset[str]:
    """The attributes that a handler's methods write, but for its constructor: as a trace what it has seen, and no setting."""
    if issubclass(cls, seed):  # what runs is a copy of it
        return frozenset()
    owners = [owner for owner in cls.__mro__ if owner is not Messenger]  # which writes .fn where it decorates, before any run
    methods = [(name, method) for owner in owners for name, method in vars(owner).items() if isinstance(method, FunctionType)]
    return frozenset[str]().union(*(_outside(method.__code__).written for name, method in methods if name != "__init__"))


def _in(cell: CellType) -> Any:
    """The value of a variable of a closure, which may have none yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _slots(cls: type) -> list[str]:
    return [name for owner in cls.__mro__ for name in getattr(owner, "__slots__", ())]


@lru_cache(4096)
def is_library(module: str | None) -> bool:
    """Whether a module is one of those that are taken to be fixed, and no file of the user's of the same name."""
    top = (module or "").partition(".")[0]
    if top not in LIBRARIES:
        return False
    if top not in sys.stdlib_module_names:
        return True
    origin = getattr(sys.modules.get(top), "__file__", None)
    return origin is None or origin.startswith(sysconfig.get_path("stdlib"))


def _is_fixed(x: Any) -> bool:
    """Whether an object of a library is a function or a type of it, and nothing that holds values."""
    if isinstance(x, BuiltinFunctionType):
        return x.__self__ is None or isinstance(x.__self__, ModuleType)
    return isinstance(x, np.ufunc) or (callable(x) and type(x).__module__.partition(".")[0] in FIXED and hasattr(x, "__name__"))
