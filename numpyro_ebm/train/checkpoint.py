# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of a run in a folder, written by orbax's ``CheckpointManager``.

A checkpoint is a folder ``step_N``: the arrays of a pytree, and what is said of them, with a checksum of every array and one of
what is said. It is written under another name and renamed when it is complete, in the background and from a copy. When it is read,
whatever is not as it was written makes it one that is passed over, with the reason; the one before is used.
"""

import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ebm._checks import require_bool, require_count, require_positive
from numpyro_ebm.train.fingerprint import differing
from numpyro_ebm.train.leaves import Leaf, checksum, is_spread, leaves_of, listed, on_host, read_leaves, rebuilt, require_same

DEFAULT_MINUTES = 10.0
PREFIX, UNFINISHED, ASIDE = "step_", ".orbax-checkpoint-tmp", "unreadable"
PACKAGES = ("numpyro_ebm", "numpyro", "jax", "optax", "orbax-checkpoint", "numpy")


class Restored(NamedTuple):
    """What was read from a checkpoint."""

    tree: Any
    step: int
    meta: dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """Where and when a run is saved: ``checkpoint=`` of ``run`` and ``fit``, which go on from what they find there.

    :param folder: a folder of one run, which is made if there is none. A run of another model or other settings is refused.
    :param int every_steps: how many steps lie between two checkpoints, at least.
    :param float every_minutes: how many minutes do; 10 if neither is given. With both, whatever comes first.
    :param int keep_last: how many of the last checkpoints are kept. Two or more, so that one that cannot be read has one before.
    :param int keep_best: how many of those with the lowest metric are kept beside them.
    :param bool overwrite: whether the checkpoints that are in the folder are deleted, and the run starts anew.
    """

    folder: str | os.PathLike[str]
    every_steps: int | None = field(default=None, kw_only=True)
    every_minutes: float | None = field(default=None, kw_only=True)
    keep_last: int = field(default=3, kw_only=True)
    keep_best: int = field(default=0, kw_only=True)
    overwrite: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike) or not os.fspath(self.folder) or "://" in os.fspath(self.folder):
            raise TypeError(f"folder must be a path of a folder, such as 'runs/a', got {self.folder!r}.")
        if self.every_steps is not None:
            object.__setattr__(self, "every_steps", require_count("every_steps", self.every_steps))
        if self.every_minutes is not None:
            object.__setattr__(self, "every_minutes", require_positive("every_minutes", self.every_minutes))
        elif self.every_steps is None:
            object.__setattr__(self, "every_minutes", DEFAULT_MINUTES)
        object.__setattr__(self, "keep_last", require_count("keep_last", self.keep_last))
        object.__setattr__(self, "keep_best", require_count("keep_best", self.keep_best, least=0))
        object.__setattr__(self, "overwrite", require_bool("overwrite", self.overwrite))

    def open(self, fingerprint: dict[str, str]) -> "CheckpointWriter":
        """The folder, ready to be read and written.

        :param fingerprint: what a run must have in common with the one whose checkpoints it goes on from.
        :raises OSError: if the folder cannot be written to.
        :raises ValueError: if it holds checkpoints of another run, with each line that differs.
        """
        return CheckpointWriter(self, fingerprint)


def as_checkpoints(given: Any) -> Checkpoints:
    """``checkpoint=`` of a run: a folder, or :class:`Checkpoints`."""
    return given if isinstance(given, Checkpoints) else Checkpoints(given)


class CheckpointWriter:
    """The checkpoints of one run: what :meth:`Checkpoints.open` returns."""

    def __init__(self, settings: Checkpoints, fingerprint: dict[str, str]) -> None:
        self._settings, self._fingerprint = settings, fingerprint
        self._folder = Path(settings.folder).expanduser().absolute()
        self._orbax = _orbax()
        _require_writable(self._folder)
        if settings.overwrite and _is_first():
            for old in _steps(self._folder).values():
                shutil.rmtree(old)
        self._unfinished = [] if settings.overwrite else sorted(path.name for path in self._folder.glob(f"{PREFIX}*{UNFINISHED}*"))
        self._metrics: dict[int, float] = {}  # by step, where there is one
        self._manager = self._opened()  # which removes what is unfinished
        self._pending: int | None = None  # the step that is being written
        self._last_good: int | None = None
        self._last_step, self._last_time = 0, time.monotonic()
        self._require_same_run()

    # What the loop asks.

    def restore(self, wanted: Any) -> Restored | None:
        """The newest checkpoint that is as it was written; None if there is none at all.

        :param wanted: a pytree of arrays or of their shapes and dtypes, with shardings if they are to have some. Its NumPy arrays
            are read as NumPy arrays; of :class:`~numpyro_ebm.train.leaves.OpenLength` any length is read.
        :raises ValueError: if it holds other arrays, naming them.
        :raises RuntimeError: if there are checkpoints, and none can be read.
        """
        steps, reasons = sorted(self._manager.all_steps(), reverse=True), {}
        found = None
        for step in steps:
            record, reason = self._read(step, wanted)
            if _agreed(reason is None):
                found = record
                break
            reasons[step] = reason or "another process could not read it"
        if steps and found is None:
            lines = listed([f"{PREFIX}{step}: {reason}" for step, reason in reasons.items()])
            raise RuntimeError(
                f"none of the checkpoints in '{self._folder}' can be read:\n{lines}\nTo start anew, pass another folder, or "
                f"Checkpoints('{self._settings.folder}', overwrite=True)."
            )
        self._tell(reasons, found)
        if found is not None:
            self._set_aside(list(reasons))
            self._last_step = self._last_good = found.step
        return found

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint; tells of the last one if it failed."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self._collect()
        if step <= self._last_step:
            return False
        every_steps, every_minutes = self._settings.every_steps, self._settings.every_minutes
        by_steps = every_steps is not None and step - self._last_step >= every_steps
        if every_minutes is None:
            return by_steps
        return _of_the_first(by_steps or time.monotonic() - self._last_time >= 60 * every_minutes)

    def steps_left(self, step: int) -> int | None:
        """How many steps are left until one is due by number; None if only time decides."""
        return None if self._settings.every_steps is None else max(1, self._last_step + self._settings.every_steps - step)

    def save(self, step: int, tree: Any, meta: dict[str, Any], metric: float | None = None) -> None:
        """Writes a checkpoint in the background, unless this step has one.

        What goes wrong with a disk does not end a run whose numbers are good: there is a warning, and the next checkpoint is tried
        when it is due.

        :param tree: a pytree of arrays, which may change as soon as this returns.
        :param meta: what JSON can hold.
        :param metric: how good the fit is at this step, low if good, for ``keep_best``.
        """
        self._collect()
        if step == self._last_good:
            return
        described = leaves_of(tree)
        for _, numbers in described:
            if isinstance(numbers, jax.Array) and not is_spread(numbers):
                numbers.copy_to_host_async()
        described = [(leaf, on_host(numbers)) for leaf, numbers in described]
        leaves = [leaf._replace(checksum=checksum(numbers)) for leaf, numbers in described]
        record = {
            "step": step,
            "metric": None if metric is None or not np.isfinite(metric) else float(metric),
            "versions": {name: version(name) for name in PACKAGES},
            "fingerprint": self._fingerprint,
            "leaves": leaves,
            "meta": meta,
        }
        text = json.dumps(record)
        # orbax has no arrays without numbers
        arrays = {_name(i): numbers for i, (_, numbers) in enumerate(described) if np.prod(numbers.shape)}
        self._pending, self._last_step, self._last_time = step, step, time.monotonic()
        if record["metric"] is not None:
            self._metrics[step] = float(metric or 0.0)
        args = self._orbax.args
        try:
            self._manager.save(
                step,
                args=args.Composite(
                    tree=args.PyTreeSave(arrays or {"none": np.zeros(1)}), meta=args.JsonSave({"text": text, "crc32": _crc(text)})
                ),
            )
        except Exception as error:
            self._failed(error)
            return
        if any(isinstance(numbers, np.memmap) for _, numbers in described):  # it is no copy
            self._collect()

    def close(self) -> None:
        """Waits until all is written."""
        self._collect()
        self._manager.close()

    # Of one checkpoint.

    def _read(self, step: int, wanted: Any) -> tuple[Restored | None, str | None]:
        try:
            record = self._record(step)
        except Exception as error:
            return None, _short(error)
        saved = read_leaves(record["leaves"])
        where = f"the checkpoint '{self._folder / f'{PREFIX}{step}'}'"
        require_same(where, _fix(self._settings), saved, wanted)
        try:
            numbers = self._numbers(step, saved, wanted)
            for leaf in saved:
                if checksum(numbers[leaf.path]) != leaf.checksum:
                    return None, f"the numbers of {leaf.path} are not those that were written (checksum)"
            return Restored(rebuilt(saved, numbers, wanted), step, record["meta"]), None
        except Exception as error:
            return None, _short(error)

    def _record(self, step: int) -> dict[str, Any]:
        args = self._orbax.args
        found = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        if _crc(found["text"]) != found["crc32"]:
            raise ValueError("its description is not what was written (checksum)")
        record: dict[str, Any] = json.loads(found["text"])
        if record["step"] != step:
            raise ValueError(f"it is of step {record['step']}")
        return record

    def _numbers(self, step: int, saved: Sequence[Leaf], wanted: Any) -> dict[str, Any]:
        orbax = self._orbax
        shardings = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(wanted)[0]}
        how, empty = {}, {}
        for i, leaf in enumerate(saved):
            sharding = getattr(shardings.get(leaf.path), "sharding", None)
            if not np.prod(leaf.shape):
                empty[leaf.path] = np.zeros(leaf.shape, leaf.dtype)
            elif sharding is not None and not (sharding.is_fully_addressable or sharding.is_fully_replicated):
                how[_name(i)] = orbax.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=np.dtype(leaf.dtype))
            else:
                how[_name(i)] = orbax.RestoreArgs(restore_type=np.ndarray)
        item = dict.fromkeys(how, 0) or {"none": 0}
        args = orbax.args
        restore = args.PyTreeRestore(item=item, restore_args=how or {"none": orbax.RestoreArgs(restore_type=np.ndarray)})
        arrays = self._manager.restore(step, args=args.Composite(tree=restore))["tree"]
        return empty | {leaf.path: arrays[_name(i)] for i, leaf in enumerate(saved) if _name(i) in arrays}

    # Of the folder.

    def _opened(self) -> Any:
        orbax = self._orbax
        return orbax.CheckpointManager(
            self._folder,
            options=orbax.CheckpointManagerOptions(
                step_prefix=PREFIX.rstrip("_"),
                cleanup_tmp_directories=True,
                preservation_policy=_Kept(self._settings.keep_last, self._settings.keep_best, self._metrics),
                save_root_metadata=False,
                lightweight_initialize=True,
            ),
            item_handlers={"tree": orbax.PyTreeCheckpointHandler(use_compression=False), "meta": orbax.JsonCheckpointHandler()},
        )

    def _require_same_run(self) -> None:
        """Refuses the folder of another run; finds the metrics of this one."""
        newest = None
        for step in sorted(self._manager.all_steps()):
            try:
                newest = self._record(step)
            except Exception:
                continue  # told when it is asked for
            if newest["metric"] is not None:
                self._metrics[step] = newest["metric"]
        lines = differing(newest["fingerprint"], self._fingerprint) if newest else []
        if lines:
            raise ValueError(f"'{self._folder}' has checkpoints of another run:\n{listed(lines)}\n{_fix(self._settings)}")

    def _tell(self, reasons: dict[int, str], found: Restored | None) -> None:
        told = [f"{PREFIX}{step}: {reason}" for step, reason in reasons.items()]
        told += [f"{name.partition(UNFINISHED)[0]}: it was not finished when the process ended" for name in self._unfinished]
        if told:
            instead = "There is no other: the run starts anew." if found is None else f"The run goes on from step {found.step}."
            aside = f" What cannot be read is in its folder '{ASIDE}'." if reasons else ""
            warnings.warn(
                f"not all checkpoints in '{self._folder}' can be used:\n{listed(told)}\n{instead}{aside}",
                RuntimeWarning,
                stacklevel=4,
            )
        self._unfinished = []

    def _set_aside(self, steps: list[int]) -> None:
        """Renames checkpoints that cannot be read, so that the run can write those steps again."""
        if not steps:
            return
        if _is_first():
            (self._folder / ASIDE).mkdir(exist_ok=True)
            for step in steps:
                aside = self._folder / ASIDE / f"{PREFIX}{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / f"{PREFIX}{step}").rename(aside)
        _agreed(True)  # all wait for the first
        self._manager.reload()

    # Of what is written in the background.

    def _collect(self) -> None:
        """Waits for the checkpoint that is being written, and tells if it failed."""
        if self._pending is None:
            return
        try:
            self._manager.wait_until_finished()
            if not (self._folder / f"{PREFIX}{self._pending}").is_dir():
                raise OSError("it was not written to its end")
        except Exception as error:
            self._failed(error)
        else:
            self._last_good, self._pending = self._pending, None

    def _failed(self, error: Exception) -> None:
        step, self._pending = self._pending, None
        if jax.process_count() > 1:  # which must agree on what there is
            raise error
        self._metrics.pop(step or 0, None)
        for unfinished in self._folder.glob(f"{PREFIX}{step}{UNFINISHED}*"):  # which keeps the disk full
            shutil.rmtree(unfinished, ignore_errors=True)
        self._manager = self._opened()
        last = "There is none yet." if self._last_good is None else f"The last good one is of step {self._last_good}."
        warnings.warn(
            f"the checkpoint of step {step} could not be written to '{self._folder}': {_short(error)}. {last} The run goes on and "
            "tries again when the next one is due.",
            RuntimeWarning,
            stacklevel=4,
        )


@dataclass
class _Kept:
    """Which checkpoints orbax keeps: the last ones, and those with the lowest metrics."""

    num_last: int
    num_best: int
    metrics: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(info.step for info in checkpoints)
        best = sorted((step for step in steps if step in self.metrics), key=lambda step: (self.metrics[step], -step))
        kept = {*steps[-self.num_last :], *best[: self.num_best]}
        return [info.step in kept for info in checkpoints]


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("checkpoints are written by orbax: pip install 'numpyro_ebm[checkpoint]'") from error
    return orbax.checkpoint


def _require_writable(folder: Path) -> None:
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"checkpoints cannot be written to '{folder}' ({error}): pass a folder that can be written to.") from error


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder."""
    paths = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdecimal()]
    return {int(path.name[len(PREFIX) :]): path for path in paths}


def _fix(settings: Checkpoints) -> str:
    return f"Pass another folder, or Checkpoints('{settings.folder}', overwrite=True) to delete what is there and start anew."


def _name(index: int) -> str:
    return f"leaf_{index}"


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def _short(error: Exception) -> str:
    """The first line of an error, which of orbax and tensorstore may be pages."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_first() -> bool:
    return jax.process_index() == 0


def _agreed(good: bool) -> bool:
    """Whether it is so in all processes, which wait for each other."""
    if jax.process_count() == 1:
        return good
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.all(process_allgather(np.asarray(good))))


def _of_the_first(yes: bool) -> bool:
    """What the first process says, whose clock decides."""
    if jax.process_count() == 1:
        return yes
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return bool(broadcast_one_to_all(np.asarray(yes)))
