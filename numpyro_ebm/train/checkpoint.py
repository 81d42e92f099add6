# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of a run: when they are written, which are kept, and which one a run goes on from.

They are written in the background, from a copy. What is read is the newest one that is as it was written; there is a warning of
those that are not, with the reason. The folder of another run is refused.
"""

import os
import time
import warnings
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ebm._checks import require_bool, require_count, require_positive
from numpyro_ebm.train.fingerprint import differing, require_same_programs
from numpyro_ebm.train.leaves import Leaf, checksum, is_spread, leaves_of, listed, on_host
from numpyro_ebm.train.store import PREFIX, DamagedError, Store, delete_checkpoints, reason, require_writable, unfinished

DEFAULT_MINUTES = 10.0
ASIDE = "unreadable"
PACKAGES = ("numpyro_ebm", "numpyro", "jax", "optax", "orbax-checkpoint", "numpy")

COMPUTING = ("numpyro_ebm", "numpyro", "jax")  # those that the numbers of a run depend on


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

    @property
    def path(self) -> Path:
        """The folder, as an absolute path."""
        return Path(self.folder).expanduser().absolute()

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
        self._folder = settings.path
        require_writable(self._folder)
        self._unfinished = [] if settings.overwrite else unfinished(self._folder)
        if _is_first():
            delete_checkpoints(self._folder, complete=settings.overwrite)
        _agreed(True)  # all wait for the first
        self._metrics: dict[int, float] = {}  # by step, where there is one
        self._store = Store(self._folder, self._kept)
        self._pending: int | None = None  # the step that is being written
        self._last_good: int | None = None
        self._last_step, self._last_time = 0, time.monotonic()
        self._require_same_run()

    def restore(self, wanted: Any) -> Restored | None:
        """The newest checkpoint that is as it was written; None if there is none at all.

        :param wanted: a pytree of arrays or of their shapes and dtypes, with shardings if they are to have some. Its NumPy arrays
            are read as NumPy arrays; of :class:`~numpyro_ebm.train.leaves.OpenLength` any length is read.
        :raises ValueError: if it holds other arrays, naming them.
        :raises RuntimeError: if there are checkpoints, and none can be read.
        """
        steps, reasons, found = self._store.steps(), dict[int, str](), None
        for step in steps:
            reason = None
            try:
                record = self._store.record(step)
                tree = self._store.read(step, record, wanted, _fix(self._settings))
            except DamagedError as error:
                reason = str(error)
            if _agreed(reason is None):
                found = Restored(tree, step, record["meta"])
                break
            reasons[step] = reason or "another process could not read it"
        if steps and found is None:
            raise RuntimeError(
                f"none of the checkpoints in '{self._folder}' can be read:\n{_by_step(reasons)}\nTo start anew, pass another "
                f"folder, or Checkpoints('{self._settings.folder}', overwrite=True)."
            )
        self._tell(reasons, found)
        if found is not None:
            self._tell_versions(found.step, record["versions"])
            self._set_aside(list(reasons))
            self._last_step = self._last_good = found.step
        return found

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint; warns of the last one if it failed."""
        if self._pending is not None and not self._store.is_writing():
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
        :raises TypeError: for a leaf that holds no numbers, naming it.
        """
        self._collect()
        if step == self._last_good:
            return
        described = _described(tree)
        metric = None if metric is None or not np.isfinite(metric) else float(metric)
        record = {"meta": meta, "metric": metric, "fingerprint": self._fingerprint, "versions": _versions()}
        self._last_step, self._last_time = step, time.monotonic()
        if metric is not None:
            self._metrics[step] = metric
        try:
            self._store.write(step, described, record)
        except (OSError, RuntimeError, ValueError) as error:
            self._failed(step, error)
            return
        self._pending = step
        if any(isinstance(numbers, np.memmap) for _, numbers in described):  # which is no copy
            self._collect()

    def close(self) -> None:
        """Waits until all is written."""
        self._collect()
        self._store.close()

    # Of the folder.

    def _kept(self, steps: list[int]) -> set[int]:
        """Which checkpoints are kept: the last ones, and those with the lowest metrics."""
        best = sorted((step for step in steps if step in self._metrics), key=lambda step: (self._metrics[step], -step))
        return {*sorted(steps)[-self._settings.keep_last :], *best[: self._settings.keep_best]}

    def _require_same_run(self) -> None:
        """Refuses the folder of another run; finds the metrics of this one."""
        newest = None
        for step in self._store.steps():
            try:
                record = self._store.record(step)
            except DamagedError:
                continue  # told when it is asked for
            newest = newest or record
            if record["metric"] is not None:
                self._metrics[step] = record["metric"]
        lines = differing(newest["fingerprint"], self._fingerprint) if newest else []
        if lines:
            raise ValueError(f"'{self._folder}' has checkpoints of another run:\n{listed(lines)}\n{_fix(self._settings)}")

    def _tell(self, reasons: dict[int, str], found: Restored | None) -> None:
        told = [_by_step(reasons)] if reasons else []
        told += [f"  {name}: it was not finished when a process ended" for name in self._unfinished]
        if told:
            instead = "There is no other: the run starts anew." if found is None else f"The run goes on from step {found.step}."
            aside = f" What cannot be read is moved to the folder '{self._folder / ASIDE}'." if reasons else ""
            text = "\n".join([f"not all checkpoints in '{self._folder}' can be used:", *told, instead + aside])
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        self._unfinished = []

    def _tell_versions(self, step: int, there: dict[str, str]) -> None:
        """Warns of other versions of what computes, whose numbers are the same to rounding and not in their bits."""
        here = _versions()
        lines = [f"{name} {there.get(name)}, and {here[name]} is here" for name in COMPUTING if there.get(name) != here[name]]
        if lines:
            warnings.warn(
                f"the checkpoint of step {step} in '{self._folder}' was written with {'; '.join(lines)}. The run goes on, "
                "to rounding as it would have before; where a version draws other random numbers, with others that are as good.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _set_aside(self, steps: list[int]) -> None:
        """Makes room for the steps of checkpoints that cannot be read."""
        if steps and _is_first():
            for step in steps:
                self._store.set_aside(step, self._folder / ASIDE)
        if steps:
            _agreed(True)  # all wait for the first
            self._store.reload()

    # Of what is written in the background.

    def _collect(self) -> None:
        """Waits for the checkpoint that is being written, and warns if it failed."""
        if self._pending is None:
            return
        try:
            self._store.wait(self._pending)
        except Exception as error:
            self._failed(self._pending, error)
        else:
            self._last_good, self._pending = self._pending, None

    def _failed(self, step: int, error: Exception) -> None:
        self._pending = None
        if jax.process_count() > 1:  # processes must agree on what there is
            raise error
        self._metrics.pop(step, None)
        self._store.give_up(step)
        last = "There is none yet." if self._last_good is None else f"The last good one is of step {self._last_good}."
        warnings.warn(
            f"the checkpoint of step {step} could not be written to '{self._folder}': {reason(error)}. {last} The run goes on and "
            "tries again when the next one is due.",
            RuntimeWarning,
            stacklevel=4,
        )


def newest_state(folder: Path, wanted: Any, programs: dict[str, str]) -> Any:
    """The state in the newest checkpoint of a run that can be read, of any fit with such a state.

    :param programs: of the engine that it is read for.
    """
    store, reasons = Store(folder), dict[int, str]()
    for step in store.steps():
        try:
            record = store.record(step)
            tree = store.read(step, record, {"state": wanted}, "Load it with the engine and the arguments of its fit.", "['state']")
        except DamagedError as error:
            reasons[step] = str(error)
            continue
        require_same_programs(f"'{store.path(step)}'", record["fingerprint"], programs)
        if reasons:
            warnings.warn(f"'{folder}': step {step} is loaded, because\n{_by_step(reasons)}", RuntimeWarning, stacklevel=3)
        return tree["state"]
    raise ValueError(f"'{folder}' has no checkpoint that can be read{':' if reasons else '.'}\n{_by_step(reasons)}".rstrip())


def _described(tree: Any) -> list[tuple[Leaf, Any]]:
    """Every leaf with its checksum, and a copy of its numbers."""
    described = leaves_of(tree)
    for _, numbers in described:
        if isinstance(numbers, jax.Array) and not is_spread(numbers):
            numbers.copy_to_host_async()
    copies = [(leaf, on_host(numbers)) for leaf, numbers in described]
    return [(leaf._replace(checksum=checksum(numbers)), numbers) for leaf, numbers in copies]


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def _by_step(reasons: dict[int, str]) -> str:
    return listed([f"{PREFIX}{step}: {reason}" for step, reason in reasons.items()])


def _fix(settings: Checkpoints) -> str:
    return f"Pass another folder, or Checkpoints('{settings.folder}', overwrite=True) to delete what is there and start anew."


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
