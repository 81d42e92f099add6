# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The loop on the host, which every run and :func:`~numpyro_ebm.fit` goes through: chunk after chunk, and what comes between them.

What comes between two chunks is a function of the state that says whether to end there, and why: callbacks, validation, a
checkpoint, a signal.
"""

import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from numpyro_ebm.train.checkpoint import CheckpointWriter, as_checkpoints
from numpyro_ebm.train.devices import is_shared, processes_explained, require_readable, said_anywhere
from numpyro_ebm.train.health import Part
from numpyro_ebm.train.leaves import OpenLength
from numpyro_ebm.train.steps import FIXED_LENGTH, Call, Record, State, Steps, asks_the_host, joined, keep_state

SECONDS_PER_CHUNK, SECONDS_WITHOUT_BAR = 1.0, 3.0  # how long a chunk may take: each allocates all that a step needs anew
MAX_GROWTH = 64  # of a chunk over the one before

Between = Callable[[State], str | None]  # why the run ends here, if it does


class Learner(Protocol):
    """What learns step by step: an engine, or NumPyro's SVI."""

    _steps: Steps

    def _warnings(self, state: State, before: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """What to warn of after a chunk, which began when ``before`` steps were made."""

    def _error(self, state: State, bad: dict[Part, int], step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception:
        """What to raise for a step that is bad."""


class Source(Protocol):
    """Where the data of the next steps come from."""

    #: what they see, the next of them at least
    call: Call

    def next(self, state: State, num_steps: int) -> tuple[State, Call, int, int]:
        """The state to go on from, what the next steps see, the first of them there, and how many there are: ``num_steps`` at most.

        :raises StopIteration: if there are no more.
        """

    def made(self, num_steps: int) -> None:
        """Learns that so many steps of those are made."""

    def seen(self, *, next: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the last step that was made, or of the next."""


Describe = Callable[[State], tuple[dict[str, Any], dict[str, Any]]]  # what is saved: arrays, and what JSON can hold


class Saved:
    """A run that is saved as it goes, if it is: its log, and what it goes on from.

    :param describe: what is saved beside the losses.
    """

    def __init__(self, writer: CheckpointWriter | None, loss: Any, state: State, describe: Describe) -> None:
        self._writer, self._describe = writer, describe
        self.log = Log()
        #: the arrays and the rest that were found, if any were
        self.found: tuple[dict[str, Any], dict[str, Any]] | None = None
        if writer is None:
            return
        restored = writer.restore({**describe(state)[0], "losses": OpenLength(loss.dtype)})
        if restored is not None:
            self.found, self.log = (restored.tree, restored.meta), Log(restored.tree["losses"])

    def steps_left(self) -> int | None:
        """Until a checkpoint is due."""
        return None if self._writer is None else self._writer.steps_left(self.log.done)

    def save_if_due(self, state: State) -> None:
        """Saves it if it is time."""
        if self._writer is not None and self._writer.is_due(self.log.done):
            self.save(state)

    def save(self, state: State) -> None:
        """Saves it as it is now."""
        if self._writer is not None:
            tree, meta = self._describe(state)
            self._writer.save(self.log.done, {**tree, "losses": self.log.losses}, meta, meta.get("metric"))


def state_alone(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is saved of a run whose data are in memory."""
    return {"state": state}, {}


@contextmanager
def saved(
    checkpoint: Any,
    fingerprint: Callable[[], dict[str, str]],
    steps: Steps,
    state: State,
    call: Call,
    describe: Describe = state_alone,
) -> Iterator[Saved]:
    """A run that is saved where ``checkpoint`` says, if it is given: also where an error ends it, at its last good state."""
    if checkpoint is None:
        yield Saved(None, None, state, describe)
        return
    writer = as_checkpoints(checkpoint).open(fingerprint())
    try:
        run = Saved(writer, steps.loss(state, call), state, describe)
        try:
            yield run
        except BaseException as error:
            if (last := getattr(error, "state", None)) is not None:
                run.save(last)
            raise
    finally:
        writer.close()


class Always:
    """The same data in every step."""

    def __init__(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call, self.args, self.kwargs = call, args, kwargs

    def next(self, state: State, num_steps: int) -> tuple[State, Call, int, int]:
        return state, self.call, 0, num_steps

    def made(self, num_steps: int) -> None:
        pass

    def seen(self, *, next: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.args, self.kwargs


class Log:
    """The records of a run so far."""

    def __init__(self, losses: Sequence[float] | np.ndarray = ()) -> None:
        self._losses = np.asarray(losses)
        self.done = len(self._losses)
        self._collected: list[Any] = []
        self.warned: list[str] = []

    def add(self, record: Record) -> None:
        """Adds those of a chunk."""
        end = self.done + len(record.loss)
        if not self.done:
            self._losses = self._losses.astype(record.loss.dtype)
        if end > len(self._losses):
            self._losses = np.concatenate([self._losses, np.empty(max(end, 1024), self._losses.dtype)])
        self._losses[self.done : end] = record.loss
        self.done = end
        self._collected.append(record.collected)

    @property
    def losses(self) -> np.ndarray:
        """(num_steps,) of all steps so far."""
        return self._losses[: self.done]

    @property
    def collected(self) -> Any:
        """What was collected of all steps, stacked."""
        return joined(self._collected) if self._collected else None


class Pace:
    """How many steps the next chunk makes: as many as asked for, or as many as take a fraction of a second.

    Where several processes run, all must make the same chunks, so that none goes by its own clock.
    """

    def __init__(self, asked: int | None, length: int | None, seconds: float) -> None:
        self.seconds = seconds
        self.asked = asked or (FIXED_LENGTH if jax.process_count() > 1 else None)
        self.length = length or 1
        self.size = self.length
        self.start = time.perf_counter()

    def next(self) -> int:
        """The number of steps of a chunk that begins now."""
        self.start = time.perf_counter()
        return self.asked or self.size

    def tell(self, count: int) -> None:
        """Learns how many steps there were since."""
        seconds = time.perf_counter() - self.start
        size = min(MAX_GROWTH * self.size, max(1, int(count * self.seconds / max(seconds, 1e-9))))
        self.size = max(1, size // self.length) * self.length


def drive(
    learner: Learner,
    state: State,
    source: Source,
    num_steps: int | None,
    log: Log,
    *,
    between: Sequence[Between] = (),
    every: int | None = None,
    limit: Callable[[], int | None] = lambda: None,
    progress_bar: bool = True,
    stacklevel: int = 3,
) -> tuple[State, str]:
    """Steps until ``num_steps`` are in the log, the data end, or something between chunks ends it.

    :param state: where to start from, which is overwritten.
    :param num_steps: steps in all, those in the log included; no end if not given.
    :param between: called after every chunk.
    :param every: no chunk goes over a multiple of it.
    :param limit: how many steps the next chunk has at most.
    :return: the last state, and why it ended: ``"num_steps"``, ``"batches"``, or what ``between`` says.
    """
    steps, warned, before = learner._steps, set[str](), int(state.num_steps)
    length = steps.length(state, source.call, every) if asks_the_host(state, source.call.dynamic) else None
    chunk = steps.open_chunk if length is None else partial(steps.fixed_chunk, length=length)
    if source.call.collect is not None and is_shared(state):
        require_readable("what collect= returns, ", jax.jit(source.call.collect)(state))
    pace = Pace(every, length, SECONDS_PER_CHUNK if progress_bar else SECONDS_WITHOUT_BAR)
    with tqdm(total=num_steps, initial=log.done, disable=not progress_bar) as bar, processes_explained():
        while num_steps is None or log.done < num_steps:
            try:
                wanted = pace.next()
                left = (num_steps and num_steps - log.done, every and every - log.done % every, limit())
                wanted = min([wanted, *(bound for bound in left if bound)])
                try:
                    state, call, first, wanted = source.next(state, wanted)
                except StopIteration:
                    return state, "batches"
                state, record, bad = chunk(state, wanted, call, first=first)
                log.add(record)
                pace.tell(len(record.loss))
                source.made(len(record.loss))
                if bad:
                    raise learner._error(state, bad, log.done + 1, *source.seen(next=True))
                for message in learner._warnings(state, before, *source.seen()):
                    if (told := re.sub(r"[\d.]+", "", message)) not in warned:  # and not again with another number
                        warnings.warn(message, stacklevel=stacklevel)
                        warned.add(told)
                        log.warned.append(message)
                before = int(state.num_steps)
                bar.update(len(record.loss))
                bar.set_postfix_str(f"loss: {record.loss[-1]:.4f}", refresh=False)
                for look in between:
                    if (why := look(state)) is not None:
                        return state, why
            except (Exception, KeyboardInterrupt) as stop:
                keep_state(stop, state)
                raise
    return state, "num_steps"


def at_multiples(look: Between, log: Log, every: int | None, num_steps: int | None) -> Between:
    """What is looked at only after a multiple of some steps, and at the end."""
    return lambda state: None if log.done != num_steps and every and log.done % every else look(state)


def calling(callbacks: Sequence[Callable[..., Any]], log: Log, *more: Any) -> Between:
    """Callbacks ``callback(step, state, losses, *more)``, one of which may return True to end the run."""

    def look(state: State) -> str | None:
        ends = [callback(log.done, copied(state), log.losses, *more) is True for callback in callbacks]
        return "callback" if (said_anywhere(any(ends)) if is_shared(state) else any(ends)) else None

    return look


def copied(state: State) -> State:
    """A copy, which the loop does not overwrite."""
    return jax.tree.map(lambda x: jnp.asarray(x).copy(), state)
