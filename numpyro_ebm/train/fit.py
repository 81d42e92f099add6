# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""One loop for every engine, and NumPyro's ``SVI``, on data that come in minibatches."""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer import SVI

from numpyro_ebm._checks import require_bool, require_count, require_key
from numpyro_ebm._pytree import arrays_and_rest, join
from numpyro_ebm.evaluate.report import FitReport, are_reports_enabled, report_of
from numpyro_ebm.program.minibatch import Minibatch
from numpyro_ebm.program.run import own_key
from numpyro_ebm.program.streamed import require_rows_taken
from numpyro_ebm.train.batches import Batches, stream_of
from numpyro_ebm.train.devices import Sharding, as_sharding, said_anywhere
from numpyro_ebm.train.fingerprint import fingerprint_of
from numpyro_ebm.train.loop import Between, Log, calling, copied, drive, saved
from numpyro_ebm.train.row_store import RowStore
from numpyro_ebm.train.stacks import Stack, Stacks, is_array, shapes_of
from numpyro_ebm.train.steps import Call, Steps
from numpyro_ebm.train.svi import SVIProgress, plain, steps_of

State = Any


class FitResult(NamedTuple):
    """What :func:`fit` returns. The first three fields are those of NumPyro's ``SVIRunResult``."""

    #: values of the param sites, constrained
    params: dict[str, Any]
    #: the state after the last step, or the best one with ``patience``
    state: Any
    #: (num_steps,) the loss at every step, nan where ``stable_update`` skipped one
    losses: Array
    #: by name what ``validation`` gave, and under ``"step"`` after which steps: arrays of equal lengths
    metrics: dict[str, np.ndarray]
    #: what the fit says of itself; None where reports are off, and of SVI
    report: FitReport | None
    #: why it ended: ``"num_steps"``, ``"batches"``, ``"patience"``, ``"callback"``, ``"SIGINT"`` (Ctrl-C) or ``"SIGTERM"``
    ended: str


def fit(
    engine: Any,
    rng_key: Array,
    batches: Any,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    validation: Any = None,
    patience: int | None = None,
    init_state: Any = None,
    init_params: dict[str, Any] | None = None,
    callbacks: Sequence[Callable[..., Any]] = (),
    chunk_size: int | None = None,
    checkpoint: Any = None,
    row_folder: str | Path | None = None,
    mesh: Any = None,
    stable_update: bool = False,
    progress_bar: bool = True,
    report: bool | None = None,
) -> FitResult:
    """Learns from minibatches: of arrays larger than memory, or of what another library loads.

    The model is the one for data in memory: it says ``numpyro.plate("data", N, subsample_size=B)`` and takes its rows by
    :func:`numpyro.subsample`. It is called with ``B`` rows, and the plate is told which of the ``N`` they are.

    Minibatches are read and brought to the device in the background. Ctrl-C and SIGTERM end a fit after the steps that run: it
    is saved, and what there is is returned.

    :class:`~numpyro_ebm.ParticleMMLE` keeps the particles of all rows on the host, or in ``row_folder``; the device holds those of the
    rows at work. A row gets its particles when it is first seen.

    :param engine: an engine, or :class:`numpyro.infer.SVI`.
    :param rng_key: a key of :func:`jax.random.key`; not used with ``init_state``.
    :param batches: :class:`Batches`, or an iterable of minibatches: each a :class:`Minibatch` or ``(index, args, kwargs)``, or just
        an array, a tuple of arrays or a dictionary of them, where it does not matter which rows they are. One that can be iterated
        again, as PyTorch's ``DataLoader``, gives epoch after epoch. A generator ends the fit where it ends.
    :param args: arguments of the model after those of the batch, the same in every step.
    :param kwargs: arguments by name, the same in every step.
    :param int num_steps: steps in all, those before a checkpoint included.
    :param int num_epochs: passes through the data, instead.
    :param validation: a function of the state, which returns a number, low if good, or a dictionary of them of which the first
        counts; or rows that are not learned from, as :class:`Batches`: the mean of the engine's loss on them. Looked at after every
        ``chunk_size`` steps.
    :param int patience: so many looks without a better number end the fit, and the best state is returned.
    :param init_state: a state to continue from; it is not changed.
    :param dict init_params: values of :func:`numpyro.param` sites to start from.
    :param callbacks: functions ``callback(step, state, losses, metrics)`` called after every ``chunk_size`` steps. One that returns
        True ends the fit.
    :param int chunk_size: steps between looks and callbacks; an epoch if not given, or a twentieth of the fit if that is less.
    :param checkpoint: a folder, or :class:`Checkpoints`, where the fit is saved as it goes, and goes on from what it finds there.
    :param row_folder: where :class:`~numpyro_ebm.ParticleMMLE` keeps its particles in files, instead of in memory.
    :param mesh: devices to run on: a :class:`jax.sharding.Mesh` or a :class:`Sharding`. With several processes each reads its part of
        every minibatch.
    :param bool stable_update: whether to skip and count steps that would make anything non-finite, instead of stopping.
    :param bool progress_bar: whether to show one.
    :param bool report: whether ``result.report`` is made, as by an engine's ``run``.
    :raises ValueError: for settings that do not go together; for a model that does not take its rows as said above; for batches of
        different shapes.
    :raises TypeError: for what is no engine or no source.
    :raises NonFiniteError: with the last good state, if a step would make anything non-finite.

    .. doctest::

        >>> import jax, numpy as np, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import Batches, ParticleMMLE, fit
        >>> y = 3 + np.sqrt(2) * np.random.default_rng(0).standard_normal(1000).astype(np.float32)
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", 1000, subsample_size=100):
        ...         y = numpyro.subsample(y, event_dim=0)
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> engine = ParticleMMLE(model, optax.sgd(0.001), num_particles=10, step_size=0.1)
        >>> result = fit(engine, jax.random.key(1), Batches(y, batch_size=100), num_epochs=100, progress_bar=False)
        >>> print(f"learned {result.params['loc']:.1f}, exact {y.mean():.1f}")
        learned 3.0, exact 3.0
        >>> result.state.particles["x"].shape
        (10, 1000)
    """
    num_steps = None if num_steps is None else require_count("num_steps", num_steps)
    num_epochs = None if num_epochs is None else require_count("num_epochs", num_epochs)
    patience = None if patience is None else require_count("patience", patience)
    chunk_size = None if chunk_size is None else require_count("chunk_size", chunk_size)
    stable_update, progress_bar = require_bool("stable_update", stable_update), require_bool("progress_bar", progress_bar)
    reports = are_reports_enabled() if report is None else require_bool("report", report)
    if num_steps is not None and num_epochs is not None:
        raise ValueError(f"num_steps={num_steps} and num_epochs={num_epochs} both say when to end: leave one out.")
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} with no validation=, of which to have some: give rows or a function of the state.")
    learner = _learner(engine)
    stream = stream_of(batches, num_epochs)
    if isinstance(batches, Batches) and num_steps is None:
        if num_epochs is None:
            raise ValueError("fit has no end: give num_steps or num_epochs.")
        num_steps = num_epochs * len(batches)
    first = stream.peek()
    always = args, dict(kwargs or {})
    sharding = None if mesh is None else as_sharding(mesh)
    data = _Data(learner, first, always, sharding)
    key = require_key("rng_key", rng_key)
    one = data.of(first)
    state = _started(learner, key, one, stream.num_rows, init_state, init_params)
    rows = _row_store(learner, engine, state, one, stream.num_rows, row_folder)
    every = _every(chunk_size, batches, num_steps, bool(callbacks) or validation is not None)
    if sharding is not None:
        state = sharding.place_state(state, None if rows is None else len(first.index))
    with ExitStack() as stack:
        stacks = Stacks(stream, data.place, first)
        source = _Source(data, stacks, np.bool_(stable_update), rows, key)
        judge = _Judge(learner, validation, patience, data, source)
        run = stack.enter_context(
            saved(
                checkpoint,
                lambda: fingerprint_of(engine, arguments=always, batches=repr(batches) if isinstance(batches, Batches) else None),
                learner._steps,
                judge.best_or(source.whole(state)),
                source.call_of(first),
                source.parts,
            )
        )
        raise NotImplementedError
