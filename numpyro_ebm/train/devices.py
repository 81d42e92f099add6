# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Many devices: what of a fit lies where, and that all processes of it do the same.

A program of JAX gives the same numbers wherever its arrays lie, to rounding: random numbers too do not depend on the devices. So
a fit on many devices is one whose arrays are laid out before it starts. What compiles moves the numbers between devices; all
that is decided here is which axis of an array goes along which axis of the mesh.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.example_libraries.optimizers import OptimizerState
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, keystr
from numpyro.primitives import Messenger

from numpyro_ebm._pytree import Rest, arrays_and_rest, as_array, join
from numpyro_ebm.chains import chains_name, chains_of

__all__ = ["Sharding"]

Axes = str | tuple[str, ...] | None  # of a mesh
Path = tuple[Any, ...]  # of a leaf in a pytree


@dataclass(frozen=True, eq=False)
class Sharding:
    """Which parts of a fit are spread over which axes of a mesh of devices.

    What is not named here is there once on every device: parameters, what their optimizer keeps, and keys. The answer does not
    depend on it, but for rounding.

    :param mesh: of :func:`jax.make_mesh`, over the devices of one process or of several. Its axes are taken as automatic ones.
    :param rows: the axis of the rows of the data, and of the particles that belong to them; or several axes, a tuple.
    :param chains: the axis of the negative chains.
    :param particles: the axis of the particles of :class:`~numpyro_ebm.ParticleMMLE`, which is another than that of the rows.
    :param params: how parameters are spread: by the name of a param site a :class:`jax.sharding.PartitionSpec`, or a pytree of
        these that begins as the site's value does. What an optimizer keeps of a parameter is spread as the parameter is.
    :raises TypeError: if ``mesh`` is no mesh, or ``params`` no dictionary of specs.
    :raises ValueError: for an axis that the mesh does not have.

    .. doctest::

        >>> import jax
        >>> from numpyro_ebm import Sharding
        >>> mesh = jax.make_mesh((jax.device_count(), 1), ("data", "model"))
        >>> Sharding(mesh, particles="model").particles
        ('model',)
    """

    mesh: Mesh
    rows: Axes = "data"
    chains: Axes = "data"
    particles: Axes = None
    params: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"mesh must be a mesh of devices such as jax.make_mesh((4,), ('data',)), got {self.mesh!r}.")
        # Explicit axes, which jax.make_mesh gives, want to be told how every result is laid out: no model is written for that.
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names))
        for name in ("rows", "chains", "particles"):
            object.__setattr__(self, name, self._axes(name, getattr(self, name)))
        if both := set(self.rows or ()) & set(self.particles or ()):
            raise ValueError(
                f"rows and particles both go along axis '{both.pop()}' of the mesh, and the particles of a row are one array: give "
                "each an axis of its own, as with jax.make_mesh((2, 2), ('data', 'particles')), or leave particles=None."
            )
        if not isinstance(self.params or {}, dict):
            raise TypeError(f"params must map names of param sites to PartitionSpecs, got {self.params!r}.")
        for path, spec in _specs(self.params).items():
            if not isinstance(spec, PartitionSpec):
                raise TypeError(f"params{keystr(path)} must be a PartitionSpec, got {spec!r}.")
            for part in spec:
                self._axes(f"params{keystr(path)}", part)

    def _axes(self, name: str, given: Any) -> tuple[str, ...] | None:
        """Names of axes of this mesh, or None."""
        if given is None:
            return None
        axes = (given,) if isinstance(given, str) else tuple(given)
        for axis in axes:
            if axis not in self.mesh.axis_names:
                raise ValueError(
                    f"{name}={given!r}: the mesh has no axis {axis!r}, only {', '.join(map(repr, self.mesh.axis_names))}. Name one "
                    "of these, or None for what is to be there once on every device."
                )
        return axes

    # Where things go.

    def place_data(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_rows: int | None = None,
        *,
        has_steps: bool = False,
        is_part: bool = False,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a model with their arrays on the devices: those with a leading axis of rows spread, others on each.

        Arrays that lie on this mesh already stay as they are.

        :param num_rows: how many rows there are; as the first array has if not given.
        :param has_steps: whether the axis of rows comes after one of steps.
        :param is_part: whether what a process gives are the rows of its own, equally many in each, instead of all. No process asks
            another then, so that threads may call this.
        :raises ValueError: if rows do not go evenly on the devices, or several processes are given different arrays as all rows.
        """
        arrays, rest = arrays_and_rest((args, kwargs))
        arrays, axis = [_readable(x) for x in arrays], int(has_steps)
        if num_rows is None:
            num_rows = number_of_rows(args, kwargs, axis)
        if not is_part:
            paths = [path for path, _ in jax.tree_util.tree_flatten_with_path((args, kwargs))[0]]
            names = [_name(path) for path, leaf in zip(paths, rest.leaves, strict=True) if leaf is None]
            self._require_agreement(dict(zip(names, arrays, strict=True)))
        return join([self._place_rows(x, axis, num_rows, is_part=is_part) for x in arrays], rest)

    def _place_rows(self, x: Any, axis: int, num_rows: int | None, *, is_part: bool) -> Array:
        if isinstance(x, Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == self.mesh:
            return x
        if not self.rows or num_rows is None or x.shape[axis : axis + 1] != (num_rows,):
            return self._put(x, PartitionSpec())
        if is_part and self.is_shared:
            return self._join(x, axis)
        self.require_even("rows", num_rows, "rows", f"leave {num_rows % self._size(self.rows)} of them out")
        return self._put(x, _at(axis, self.rows))

    def place_state(self, state: Any, num_rows: int | None = None) -> Any:
        """A state of an engine, or of :class:`numpyro.infer.SVI`, on the devices.

        :param num_rows: how many rows the data have, which tells the axis of rows of particles; they have none if not given.
        :raises ValueError: if particles, chains or parameters do not go evenly on the devices, or ``params`` names no param site.
        """
        leaves, structure = jax.tree.flatten(state)
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(_opened(state))[0]]
        self._require_agreement({keystr(path): leaf for path, leaf in zip(paths, leaves, strict=True)})
        specs = self._specs_of_state(state, paths, leaves, num_rows)
        return jax.tree.unflatten(structure, [self._put(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)])

    def replicate(self, tree: Any) -> Any:
        """A pytree whose arrays are there on every device."""
        arrays, rest = arrays_and_rest(tree)
        return join([self._put(_readable(x), PartitionSpec()) for x in arrays], rest)

    def joined(self, part: Any) -> Array:
        """One array of the rows that every process has a part of: an argument for a fit by all of them.

        :param part: the rows of this process, as many as the others have.
        :raises ValueError: if some process has more rows than another.
        """
        if self.rows is None:
            raise ValueError("rows=None: the rows of the processes are joined along an axis of the mesh. Name it.")
        self.require_same_shapes([part])
        return self._join(part, 0)

    def whole(self, parts: Any) -> Any:
        """A pytree of the rows of all processes, NumPy's arrays in each, of the parts that they have.

        :raises ValueError: if some process has more rows than another, or an array has other rows than the first.
        """
        arrays, rest = arrays_and_rest(parts)
        for x in arrays:
            if np.shape(x)[:1] != np.shape(arrays[0])[:1]:
                raise ValueError(
                    f"an array of a minibatch has shape {np.shape(x)}, and not the {len(arrays[0])} rows that this process has: "
                    "several processes read rows alone. Give fit what is the same in every step by args= or kwargs=."
                )
        self.require_same_shapes(arrays)
        return join(process_allgather([np.asarray(x) for x in arrays], tiled=True), rest)

    def require_same_shapes(self, parts: Sequence[Any]) -> None:
        """Refuses parts of arrays that are not alike in all processes.

        :raises ValueError: with the shapes in each.
        """
        if not self.is_shared:
            return
        for shapes in zip(*map(json.loads, _from_all(json.dumps([np.shape(x) for x in parts]))), strict=True):
            if len(set(map(tuple, shapes))) > 1:
                told = [tuple(shape) for shape in shapes]
                raise ValueError(f"the processes have rows of shapes {told}: give each of them equally many.")

    def _join(self, part: Any, axis: int) -> Array:
        part = np.asarray(part)
        num_rows = part.shape[axis] * (self.mesh.devices.size // len(self.mesh.local_devices))
        self.require_even("rows", num_rows, "rows", "leave some of them out")
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, _at(axis, self.rows)), part)

    # What goes where.

    def _specs_of_state(self, state: Any, paths: list[Path], leaves: list[Any], num_rows: int | None) -> list[PartitionSpec]:
        clouds: dict[str, Array] = getattr(state, "particles", {})
        pools = {chains_name(site): kept for site, kept in chains_of(getattr(state, "mutable_state", None) or {}).items()}
        of_params, found, used = _specs(self.params), list[PartitionSpec](), set[Path]()
        for path, leaf in zip(paths, leaves, strict=True):
            keys = [key.key for key in path if isinstance(key, DictKey)]
            if pool := next((key for key in keys if key in pools), None):
                found.append(self._spec_of_chains(pool, pools[pool], leaf))
            elif latent := next((key for key in keys if key in clouds), None):
                found.append(self._spec_of_particles(latent, clouds[latent].shape, leaf, num_rows))
            else:
                where, spec = _spec_at(path, of_params)
                fits = self._fits(spec, leaf.shape)
                if not fits and path[0] == GetAttrKey("params"):
                    raise ValueError(
                        f"params{keystr(where)} is {spec}, and the parameter {keystr(path[1:])} of shape {leaf.shape} does not go "
                        f"evenly on the axes of the mesh, {dict(self.mesh.shape)}. Spread another of its axes, or none."
                    )
                found.append(spec if fits else PartitionSpec())
                used |= {where} if fits else set()
        for where, spec in of_params.items():
            if where not in used:
                known = f", only {sorted(state.params)}" if isinstance(getattr(state, "params", None), dict) else ""
                raise ValueError(f"params{keystr(where)} is {spec}, and there is no such parameter that it fits{known}.")
        return found

    def _spec_of_chains(self, pool: str, kept: dict[str, Any], leaf: Any) -> PartitionSpec:
        """Of what is kept of chains, ``(num_chains,)`` + the shape of one, or one number for all."""
        num_chains = len(jax.tree.leaves(kept["x"])[0])
        if not self.chains or leaf.shape[:1] != (num_chains,):
            return PartitionSpec()
        self.require_even("chains", num_chains, f"negative chains, '{pool}',", "take a num_chains that divides evenly")
        return PartitionSpec(self.chains)

    def _spec_of_particles(self, latent: str, cloud: tuple[int, ...], leaf: Any, num_rows: int | None) -> PartitionSpec:
        """Of particles, ``(num_particles,)`` + the shape of the site, and of what is kept of them, whole or of each row."""
        axes: list[Axes] = [None] * len(cloud)
        if self.particles:
            self.require_even("particles", cloud[0], f"particles, '{latent}',", "take a num_particles that divides evenly")
            axes[0] = self.particles
        if self.rows and num_rows in cloud[1:]:
            self.require_even("rows", num_rows, f"rows, of particles '{latent}',", "leave some of them out")
            axes[cloud.index(num_rows, 1)] = self.rows
        given = (1,) * (len(cloud) - leaf.ndim) + leaf.shape
        if len(given) > len(cloud):
            return PartitionSpec()
        fitting = [axis if n == size else None for axis, n, size in zip(axes, given, cloud, strict=True)]
        return PartitionSpec(*fitting[len(cloud) - leaf.ndim :])

    # The mesh.

    @property
    def is_shared(self) -> bool:
        """Whether several processes have the devices."""
        return bool(self.mesh.is_multi_process)

    def _size(self, axes: Axes) -> int:
        return int(np.prod([self.mesh.shape[axis] for axis in axes or ()], dtype=int))

    def _fits(self, spec: PartitionSpec, shape: tuple[int, ...]) -> bool:
        sizes = [self._size((part,) if isinstance(part, str) else part) for part in spec]
        return len(spec) <= len(shape) and all(n % size == 0 for n, size in zip(shape, sizes, strict=False))

    def require_even(self, setting: str, count: int, what: str, fix: str) -> None:
        """Refuses what does not go evenly along the axes of a setting.

        :raises ValueError: naming the axis, with the fix.
        """
        axes = getattr(self, setting)
        size = self._size(axes)
        if count % size:
            named = " x ".join(map(repr, axes))
            raise ValueError(
                f"{count} {what} do not go evenly on the {size} devices of axis {named} of the mesh: {fix}, or give Sharding(..., "
                f"{setting}=None), which has all of them on every device."
            )

    def _put(self, x: Any, spec: PartitionSpec) -> Array:
        sharding = NamedSharding(self.mesh, spec)
        if sharding.is_fully_addressable or (isinstance(x, Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        if isinstance(x, Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(self._put(jax.random.key_data(x), spec), impl=jax.random.key_impl(x))
        here = np.asarray(x)
        return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])

    def with_layout(self, static: Rest, num_rows: int | None) -> Rest:
        """What is compiled into the steps of a run, with where the rows go of batches that the model draws."""
        if self.rows is None or num_rows is None:
            return static
        return static._replace(frozen=(static.frozen, BatchLayout(self.mesh, self.rows, num_rows)))

    # Several processes.

    def require_agreement(self, what: str, tree: Any) -> None:
        """Refuses arrays that every process has by itself and that differ, of which JAX would take any for those of all.

        :param str what: what they are, for the message: ``"rng_key"``.
        """
        self._require_agreement({what + keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]})

    def _require_agreement(self, arrays: dict[str, Any]) -> None:
        if not self.is_shared:
            return
        local = {name: x for name, x in arrays.items() if not (isinstance(x, Array) and not x.is_fully_addressable)}
        if differing := _differing({name: _digest(x) for name, x in local.items()}):
            raise ValueError(
                f"{', '.join(differing)}: the processes have different values of this, which must be the same in each. Where every "
                "one has rows of its own, make them one array first, by Sharding(...).joined(rows)."
            )

    def require_same_program(self, program: Any, *args: Any, **static: Any) -> None:
        """Refuses to start where processes would run different programs, each waiting for what the others never send.

        :param program: a function of :func:`jax.jit`, which is called with the rest; not looked at where there is one process.
        :raises RuntimeError: with the reason, as far as it is known.
        """
        if not self.is_shared:
            return
        if not _differing({"program": hashlib.sha256(program.lower(*args, **static).as_text().encode()).hexdigest()}):
            return
        if _differing({"order of sets": str(hash("numpyro_ebm"))}):
            reason = (
                "Python orders sets differently in each of them, and a program may depend on that order: start each with the same "
                "PYTHONHASHSEED, as in PYTHONHASHSEED=0 python program.py, and with the same model, settings and packages"
            )
        else:
            reason = "Give each the same model, settings and shapes, and the same versions of packages"
        raise RuntimeError(f"the processes have different programs, and would wait for each other for ever. {reason}.")


class BatchLayout(NamedTuple):
    """Where rows go that a plate draws from all rows. A program is compiled for it, so that it is a part of what is compiled in."""

    mesh: Mesh
    rows: Axes
    num_rows: int


class _SpreadBatches(Messenger):
    def __init__(self, layout: BatchLayout) -> None:
        super().__init__()
        self.layout = layout

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate" or msg["args"][0] != self.layout.num_rows or msg["args"][1] in (None, self.layout.num_rows):
            return
        mesh, rows, _ = self.layout
        what = f"rows of a batch, plate '{msg['name']}',"
        Sharding(mesh, rows=rows, chains=None).require_even(
            "rows", msg["args"][1], what, "take a subsample_size that divides evenly"
        )
        msg["value"] = jax.lax.with_sharding_constraint(msg["value"], NamedSharding(mesh, PartitionSpec(rows)))


def spread_batches(static: Rest) -> AbstractContextManager[Any]:
    """Has every device compute rows of its own of the batch that a subsampled plate draws, where a :class:`BatchLayout` is given.

    Else each computes the whole batch: rows that are drawn from parts on all devices belong to none of them.
    """
    layout = static.frozen[-1] if isinstance(static.frozen, tuple) and static.frozen else None
    return _SpreadBatches(layout) if isinstance(layout, BatchLayout) else nullcontext()


@contextmanager
def processes_explained() -> Iterator[None]:
    """Says what it means that JAX cannot reach another process."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1 and re.search("gloo|nccl|connection|coordination|heartbeat|socket", str(error), re.IGNORECASE):
            error.add_note(
                "Another of the processes has ended or cannot be reached: what it has printed says why. None can go on alone: JAX "
                "ends this one, at the latest heartbeat_timeout_seconds of jax.distributed.initialize later. Start them all again."
            )
        raise


def as_sharding(mesh: Any) -> Sharding:
    """What is given as ``mesh=``: a :class:`Sharding`, or a mesh, whose only axis or else ``"data"`` is that of rows and chains.

    :raises ValueError: if explicit axes are set for all that is computed, which would not go with the mesh.
    """
    around = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in around.axis_types:
        raise ValueError(
            f"jax.set_mesh has set a mesh with explicit axes, {around.axis_names}, on which JAX wants to be told how each result "
            "is laid out. Leave it out, since mesh= says where arrays go, or set one with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(around.axis_names)}."
        )
    if isinstance(mesh, Mesh) and len(mesh.axis_names) == 1:
        (axis,) = mesh.axis_names
        return Sharding(mesh, rows=axis, chains=axis)
    return mesh if isinstance(mesh, Sharding) else Sharding(mesh)


def number_of_rows(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int = 0) -> int | None:
    """How many rows the data have: as many as the first array that has an axis for them; None if there is none."""
    arrays, _ = arrays_and_rest((args, kwargs))
    return next((int(np.shape(x)[axis]) for x in arrays if np.ndim(x) > axis), None)


def is_shared(tree: Any) -> bool:
    """Whether other processes have a part of some array."""
    return any(isinstance(x, Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree))


def require_readable(what: str, tree: Any) -> None:
    """Refuses arrays that no process can read whole.

    :raises ValueError: naming one.
    """
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(x, Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            raise ValueError(
                f"{what}{keystr(path)} of shape {x.shape} has parts in other processes, and no process could read it: return what "
                "all of them have, such as parameters, or a mean over the rows."
            )


def said_anywhere(flag: bool) -> bool:
    """Whether any process says so, told to all: what a process decides alone, by its clock or a signal, would part them."""
    return flag if jax.process_count() == 1 else bool(np.any(process_allgather(np.asarray(flag))))


# Pytrees.


def _specs(params: Any) -> dict[Path, Any]:
    """The specs of parameters by their path."""
    is_spec = lambda x: isinstance(x, PartitionSpec) or x is None  # noqa: E731
    leaves = jax.tree_util.tree_flatten_with_path(params or {}, is_leaf=is_spec)[0]
    return {path: PartitionSpec() if spec is None else spec for path, spec in leaves}


def _spec_at(path: Path, specs: dict[Path, PartitionSpec]) -> tuple[Path, PartitionSpec]:
    """The spec of the parameter that a leaf of a state belongs to, wherever its path begins: params have many names in a state."""
    for start in range(len(path)):
        for where, spec in specs.items():
            if path[start : start + len(where)] == where:
                return where, spec
    return (), PartitionSpec()


def _opened(state: Any) -> Any:
    """A state with the same leaves, where those of :mod:`numpyro.optim` lie under the names of their parameters too."""

    def open_one(x: Any) -> Any:
        return jax.tree.unflatten(x.tree_def, x.packed_state) if isinstance(x, OptimizerState) else x

    return jax.tree.map(open_one, state, is_leaf=lambda x: isinstance(x, OptimizerState))


def _at(axis: int, axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(None,) * axis, axes)


def _readable(x: Any) -> Any:
    """An array that can be laid out as it is, without a copy of the whole on one device; another is read as engines read it."""
    if type(x) in (np.ndarray, np.memmap) and x.dtype.kind in "biuf":
        return x
    return as_array("an argument of the model", x)


def _name(path: Path) -> str:
    """Of an argument, by its path in ``(args, kwargs)``."""
    return f"argument {keystr(path[1:2])[1:-1]}{keystr(path[2:])}"


# What processes tell each other.


def _digest(x: Any) -> str:
    x = jax.random.key_data(x) if isinstance(x, Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    here = np.asarray(x)
    content = np.ascontiguousarray(here).reshape(-1).view(np.uint8).data
    return f"{here.dtype} {here.shape} {hashlib.sha256(content).hexdigest()}"


def _differing(digests: dict[str, str]) -> list[str]:
    """The names of what is not the same in all processes."""
    told = [json.loads(text) for text in _from_all(json.dumps(digests))]
    names = dict.fromkeys(name for one in told for name in one)
    return [name for name in names if len({one.get(name) for one in told}) > 1]


def _from_all(text: str) -> list[str]:
    """What every process says, told to all."""
    said = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(process_allgather(np.asarray(len(said))))
    padded = process_allgather(np.pad(said, (0, int(sizes.max()) - len(said))))
    return [bytes(row[:size]).decode() for row, size in zip(padded, sizes, strict=True)]
