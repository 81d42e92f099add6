# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""A folder of checkpoints, written and read by orbax's ``CheckpointManager``.

A checkpoint is a folder ``step_N``: the arrays of a pytree, and a record that describes them, with a checksum of every array and
one of the record itself. It is written under another name and renamed when it is complete.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from numpyro_ebm.train.leaves import Leaf, checksum, read_leaves, rebuilt, require_same

PREFIX, UNFINISHED = "step_", ".orbax-checkpoint-tmp"
NO_ARRAYS = {"none": np.zeros(1)}  # of a pytree without numbers, which orbax refuses
MAX_REASON = 200
MAX_PART = 2**26  # bytes of an array on disk that are read at once


class DamagedError(Exception):
    """A checkpoint is not as it was written."""


class Store:
    """The checkpoints in a folder.

    :param folder: which exists.
    :param kept: of some steps those that are kept, for a store that is written to.
    """

    def __init__(self, folder: Path, kept: Callable[[list[int]], set[int]] | None = None) -> None:
        self.folder, self._kept = folder, kept
        self._orbax = _orbax()
        self._open()

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step}"

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    # Writing.

    def write(self, step: int, described: Sequence[tuple[Leaf, Any]], record: dict[str, Any]) -> None:
        """Begins to write a checkpoint in the background.

        :param described: every leaf and its numbers, which must not change until it is written.
        """
        in_parts = {str(i): _num_parts(numbers) for i, (_, numbers) in enumerate(described) if isinstance(numbers, np.memmap)}
        text = json.dumps({**record, "step": step, "leaves": [leaf for leaf, _ in described], "in_parts": in_parts})
        arrays: dict[str, Any] = {}
        for i, (leaf, numbers) in enumerate(described):
            if str(i) in in_parts:
                arrays |= {_name(i, k): part for k, part in enumerate(np.array_split(numbers, in_parts[str(i)]))}
            elif np.prod(leaf.shape):
                arrays[_name(i)] = numbers
        arrays = arrays or NO_ARRAYS
        args = self._orbax.args
        items = args.Composite(tree=args.PyTreeSave(arrays), meta=args.JsonSave({"text": text, "crc32": _crc(text)}))
        self._manager.save(step, args=items, force=True)  # else orbax may think that it is not due, and say nothing

    def is_writing(self) -> bool:
        return bool(self._manager.is_saving_in_progress())

    def wait(self, step: int) -> None:
        """Returns when a checkpoint is complete; raises if it was not written."""
        self._manager.wait_until_finished()
        if not self.path(step).is_dir():
            raise OSError("it was not written to its end")

    def give_up(self, step: int) -> None:
        """Goes on after a checkpoint that could not be written: what there is of it would keep a disk full."""
        with suppress(Exception):  # which is the one that was met
            self._manager.close()
        for unfinished in self.folder.glob(f"{PREFIX}{step}{UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        self._open()

    def set_aside(self, step: int, folder: Path) -> None:
        """Renames a checkpoint, so that its step can be written again."""
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / self.path(step).name, ignore_errors=True)
        self.path(step).rename(folder / self.path(step).name)

    def reload(self) -> None:
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()

    # Reading.

    def record(self, step: int) -> dict[str, Any]:
        """The record of a checkpoint.

        :raises DamagedError: if it is not what was written.
        """
        args = self._orbax.args
        try:
            found = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
            text, crc = found["text"], found["crc32"]
        except Exception as error:
            raise DamagedError(f"its record cannot be read: {reason(error)}") from error
        if _crc(text) != crc:
            raise DamagedError("its record is not what was written (checksum)")
        record: dict[str, Any] = json.loads(text)
        if record["step"] != step:
            raise DamagedError(f"it is of step {record['step']}")
        record["leaves"] = read_leaves(record["leaves"])
        return record

    def read(self, step: int, record: dict[str, Any], wanted: Any, fix: str, within: str = "") -> Any:
        """The numbers of a checkpoint.

        :param wanted: a pytree of the arrays that are read, or of what is known of them.
        :param str fix: the end of the message for other arrays than these.
        :param str within: the beginning of the paths of the leaves that are wanted, for a part of what was written.
        :raises ValueError: if it has other arrays, naming them.
        :raises DamagedError: if they are not what was written.
        """
        saved = [leaf if leaf.path.startswith(within) else None for leaf in record["leaves"]]
        wanted_leaves = [leaf for leaf in saved if leaf is not None]
        require_same(f"the checkpoint '{self.path(step)}'", fix, wanted_leaves, wanted)
        try:
            numbers = self._numbers(step, saved, record.get("in_parts", {}), wanted)
            for leaf in wanted_leaves:
                if checksum(numbers[leaf.path]) != leaf.checksum:
                    raise DamagedError(f"the numbers of {leaf.path} are not those that were written (checksum)")
        except DamagedError:
            raise
        except Exception as error:
            raise DamagedError(f"its arrays cannot be read: {reason(error)}") from error
        return rebuilt(wanted_leaves, numbers, wanted)

    def _numbers(self, step: int, saved: Sequence[Leaf | None], in_parts: dict[str, int], wanted: Any) -> dict[str, Any]:
        orbax = self._orbax
        by_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(wanted)[0]}
        how: dict[str, Any] = {}
        numbers: dict[str, Any] = {}
        for i, leaf in enumerate(saved):
            if leaf is None:
                continue
            value = by_path.get(leaf.path)
            sharding = getattr(value, "sharding", None)
            if str(i) in in_parts:
                numbers[leaf.path] = self._read_parts(step, i, leaf, in_parts[str(i)], value)
            elif not np.prod(leaf.shape):
                numbers[leaf.path] = np.zeros(leaf.shape, leaf.dtype)
            elif sharding is None or sharding.is_fully_addressable or sharding.is_fully_replicated:
                how[_name(i)] = orbax.RestoreArgs(restore_type=np.ndarray)
            else:  # other processes read the other parts
                how[_name(i)] = orbax.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=np.dtype(leaf.dtype))
        arrays = self._restored(step, how) if how else {}
        return numbers | {leaf.path: arrays[_name(i)] for i, leaf in enumerate(saved) if leaf is not None and _name(i) in how}

    def _read_parts(self, step: int, index: int, leaf: Leaf, num_parts: int, wanted: Any) -> np.ndarray:
        """An array that was on disk, read into the one that is wanted if that is on disk too: memory may have no room for it."""
        found = wanted if isinstance(wanted, np.memmap) else np.empty(leaf.shape, leaf.dtype)
        for k, part in enumerate(np.array_split(found, num_parts)):
            name = _name(index, k)
            part[...] = self._restored(step, {name: self._orbax.RestoreArgs(restore_type=np.ndarray)})[name]
        return found

    def _restored(self, step: int, how: dict[str, Any]) -> dict[str, Any]:
        args = self._orbax.args
        restore = args.PyTreeRestore(item=dict.fromkeys(how, 0), restore_args=how, partial_restore=True)
        found: dict[str, Any] = self._manager.restore(step, args=args.Composite(tree=restore))["tree"]
        return found

    def _open(self) -> None:
        orbax = self._orbax
        self._manager = orbax.CheckpointManager(
            self.folder,
            options=orbax.CheckpointManagerOptions(
                create=False,
                step_prefix=PREFIX.rstrip("_"),
                preservation_policy=None if self._kept is None else _Preserved(self._kept),
                save_root_metadata=False,
                lightweight_initialize=True,  # what orbax notes for itself is not needed, and may be damaged
            ),
            item_handlers={"tree": self._arrays_handler(), "meta": orbax.JsonCheckpointHandler()},
        )

    def _arrays_handler(self) -> Any:
        """Orbax's, without what takes most of its time: a second copy, and compression, to which numbers do not yield."""
        handlers = self._orbax.type_handlers
        types = handlers.create_type_handler_registry(
            (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, handlers.get_type_handler(jax.Array)),
        )
        return self._orbax.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)


@dataclass
class _Preserved:
    """What orbax is told of the checkpoints that are kept."""

    kept: Callable[[list[int]], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


def unfinished(folder: Path) -> list[str]:
    """The names of checkpoints that were being written when a process ended."""
    return sorted(path.name.partition(UNFINISHED)[0] for path in folder.glob(f"{PREFIX}*{UNFINISHED}*"))


def delete_checkpoints(folder: Path, *, complete: bool) -> None:
    """Deletes the unfinished checkpoints in a folder, or also the complete ones, and nothing else."""
    for path in folder.glob(f"{PREFIX}*"):
        name, mark, _ = path.name.partition(UNFINISHED)
        if name[len(PREFIX) :].isdecimal() and (mark or complete):
            shutil.rmtree(path)


def require_writable(folder: Path) -> None:
    """Makes a folder, if there is none.

    :raises OSError: if nothing can be written to it.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"?")
        probe.unlink()
    except OSError as error:
        raise OSError(f"checkpoints cannot be written to '{folder}' ({error}): pass a folder that can be written to.") from error


def reason(error: Exception) -> str:
    """An error in a line. Those of tensorstore are pages, with the operating system's number at the end."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    text = (str(error).strip() or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec")[0]
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("checkpoints are written by orbax: pip install 'numpyro_ebm[checkpoint]'") from error
    return orbax.checkpoint


def _name(index: int, part: int | None = None) -> str:
    return f"leaf_{index}" if part is None else f"leaf_{index}_{part}"


def _num_parts(on_disk: np.memmap[Any, Any]) -> int:
    """In how many parts an array is written and read that is on disk, for which memory may have no room."""
    return max(1, min(len(on_disk), -(-on_disk.nbytes // MAX_PART)))


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())
