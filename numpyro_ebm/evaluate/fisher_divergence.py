# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""How far the score of a model is from that of data of unknown density.

With :math:`s = \nabla_v \log p` and data of density :math:`p_D`, integration by parts gives, for every vector field
:math:`c`,

.. math::

    E_{p_D}[s \cdot c + \mathrm{tr} \nabla c - \tfrac12 \|c\|^2]
    = F(p_D \| p) - \tfrac12 E_{p_D} \|c - c^*\|^2,
    \qquad c^* = s - \nabla \log p_D,
    \qquad F = \tfrac12 E_{p_D} \|s - \nabla \log p_D\|^2.

So every critic :math:`c` gives a lower bound, in which the density of the data does not occur, and the best one gives the Fisher
divergence itself. The score enters linearly: an unbiased estimate of it does as well.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm.auto import tqdm

from numpyro_ebm._checks import require_count, require_key
from numpyro_ebm._compiled import frozen
from numpyro_ebm._pytree import Rest, arrays_and_rest, join, require_hashable
from numpyro_ebm.optim import apply_gradient, as_transformation


class FisherDivergence(NamedTuple):
    """What :func:`~numpyro_ebm.fisher_divergence` found."""

    #: (), the critic's lower bound of the divergence, a mean over the test rows
    estimate: Array
    #: (), the standard error of that mean, the critic given
    standard_error: Array
    #: steps after which the critic was best on the validation rows, 0 for the critic as it was given
    best_step: int
    #: (num_looks,) steps after which the validation rows were looked at, the first of them 0
    steps: np.ndarray
    #: (num_looks,) the bound on the validation rows
    validation: np.ndarray
    #: the critic at the best step
    critic: Any


def fisher_divergence(
    rng_key: Array,
    score: Callable[..., Array],
    splits: Any,
    critic: Any,
    optim: Any,
    num_steps: int,
    *,
    batch_size: int = 100,
    num_probes: int = 1,
    num_test_probes: int | None = None,
    validate_every: int | None = None,
    progress_bar: bool = True,
) -> FisherDivergence:
    r"""The Fisher divergence from data to a model, :math:`\tfrac12 E \|\nabla \log p_D(v) - s(v)\|^2`, by a trained critic.

    A critic is trained to make :math:`E[s \cdot c + \mathrm{tr} \nabla c - \tfrac12 \|c\|^2]` large on the training rows. The
    critic that is best on the validation rows is kept, and its value on the test rows is reported: a **lower bound** in
    expectation for every critic, too low by :math:`\tfrac12 E \|c - c^*\|^2`. It may be negative where the divergence is small.
    The density of the data is not needed, nor a normalizer of the model, nor an exact score: the score enters linearly, so that
    one with noise gives the divergence of its mean, as long as every call draws new noise.

    Where the score comes from a guide, fit the guide first, by NumPyro's ``SVI`` of
    ``block(substitute(model, data=params), hide=list(params))``, whose parameters are fixed, and pass
    :func:`~numpyro_ebm.marginal_score` of it: the critic then has a fixed goal. The published
    estimator [1] trains the guide together with the critic.

    The trace is estimated by Rademacher probes :math:`u^\top \nabla c \, u`, and is exact on the test rows. The rows of the
    validation set keep their probes and their key for the score from one validation to the next, so that these differ only in the
    critic.

    Everything of ``score`` and ``critic`` that is an array is an argument of the compiled loop if they are pytrees: an
    Equinox module, or :class:`jax.tree_util.Partial` in the place of :func:`functools.partial`. A second call with other
    arrays then compiles nothing.

    :param rng_key: a key of :func:`jax.random.key`.
    :param score: ``score(v, rng_key=key)``, scores of a batch, ``(batch,) + event_shape`` to the same, rows independent:
        ``Partial(marginal_score, model, guide, params)``, or an exact score that takes the key and does not use it.
    :param splits: three sets of rows of the data, ``(v_train, v_validation, v_test)``, of shape ``(rows,) + event_shape`` each: to
        train the critic on, to choose the best step by, and for the estimate (2 rows or more).
    :param critic: a callable pytree such as an Equinox module, from one event to an array of its shape. Its floating arrays are
        learned, but for those it uses under :func:`jax.lax.stop_gradient`. The more of :math:`c^*` it contains, the tighter the
        bound: with the model's own score as a part of it, only that of the data has to be learned. It must be differentiable in
        the event.
    :param optim: an optax transformation.
    :param int num_steps: steps of the critic.
    :param int batch_size: training rows in every step, drawn with replacement.
    :param int num_probes: probes per row in training and validation.
    :param int num_test_probes: probes per row in the test; the exact trace if not given, which takes one derivative per
        coordinate of the event.
    :param int validate_every: steps between two looks at the validation rows; a fiftieth of the run if not given.
    :param bool progress_bar: whether to show one; it moves with the looks.
    :raises ValueError: before anything is compiled, for rows that are missing, non-finite or of different events, a critic
        that does not map one event to one of its shape or has nothing to learn, or settings out of range; before the first
        step, for scores that are non-finite or have another shape than the rows.
    :raises FloatingPointError: if the critic does not stay finite.

    **References**

    1. Bao et al., *Variational (gradient) estimate of the score function in energy-based latent variable models*, ICML 2021,
       arXiv:2010.08258.
    2. Hu et al., *Stein neural sampler*, 2018, arXiv:1810.03545: the bound.

    .. doctest::

        >>> import jax, jax.numpy as jnp, optax
        >>> from jax.tree_util import Partial
        >>> from numpyro_ebm import fisher_divergence
        >>> v = jax.random.normal(jax.random.key(0), (3, 4000, 2))
        >>> score = lambda v, rng_key: 1 - v  # of N(1, I); data of N(0, I) are 1 away
        >>> critic = Partial(lambda a, A, x: a + A @ x, jnp.zeros(2), jnp.zeros((2, 2)))
        >>> found = fisher_divergence(
        ...     jax.random.key(1), score, v, critic, optax.adam(0.01), 500, progress_bar=False
        ... )
        >>> bool(abs(found.estimate - 1) < 4 * found.standard_error)
        True
    """
    rng_key, splits = require_key("rng_key", rng_key), _by_name(splits)
    num_steps, batch_size = require_count("num_steps", num_steps), require_count("batch_size", batch_size)
    num_probes = require_count("num_probes", num_probes)
    num_test_probes = None if num_test_probes is None else require_count("num_test_probes", num_test_probes)
    every = math.ceil(num_steps / 50) if validate_every is None else require_count("validate_every", validate_every)
    transformation = as_transformation(optim)
    _require_splits(splits, batch_size)
    _require_critic(critic, splits["v_train"][0])
    train_key, validation_key, test_key, score_key = jax.random.split(rng_key, 4)
    learned, rest = _partition(critic)
    fixed, static = arrays_and_rest((rest, score))
    setup = _Setup(frozen(require_hashable("a part of the critic or of the score", static)), optim, batch_size, num_probes)
    optim_state = transformation.init(learned)
    for name, v in splits.items():
        _require_scores(name, score, v, _scores(fixed, v, score_key, setup))

    def validate(learned: Any, step: int) -> float:
        bound = float(_bounds(learned, fixed, splits["v_validation"], validation_key, setup, num_probes).mean())
        if not math.isfinite(bound):
            raise FloatingPointError(
                f"step {step}: the critic's bound on the validation rows is {bound}. Take a smaller learning rate, or clip the "
                "gradient."
            )
        return bound

    best, best_step = learned, 0
    steps, looks = [0], [validate(learned, 0)]
    with tqdm(total=num_steps, disable=not progress_bar) as bar:
        while steps[-1] < num_steps:
            until = min(steps[-1] + every, num_steps)
            learned, optim_state = _train(learned, optim_state, steps[-1], until, train_key, fixed, splits["v_train"], setup)
            bar.update(until - steps[-1])
            steps.append(until)
            looks.append(validate(learned, until))
            bar.set_postfix_str(f"validation: {looks[-1]:.4f}", refresh=False)
            if looks[-1] > max(looks[:-1]):
                best, best_step = learned, until
    bounds = _bounds(best, fixed, splits["v_test"], test_key, setup, num_test_probes)
    error = bounds.std(ddof=1) / math.sqrt(len(bounds))
    return FisherDivergence(bounds.mean(), error, best_step, np.array(steps), np.array(looks), _merge(best, rest))


class _Setup(NamedTuple):
    """What is compiled in."""

    static: Rest
    optim: Any  # as it was given: a transformation made of it would be another one, and compile anew, in every call
    batch_size: int
    num_probes: int


@partial(jax.jit, static_argnames="setup")
def _train(
    learned: Any, optim_state: Any, start: Any, stop: Any, rng_key: Array, fixed: list[Any], v_train: Array, setup: _Setup
) -> tuple[Any, Any]:
    """The critic's steps from one count to another."""
    rest, score = join(fixed, setup.static)
    transformation = as_transformation(setup.optim)

    def step(count: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        learned, optim_state = carry
        row_key, score_key, probe_key = jax.random.split(jax.random.fold_in(rng_key, count), 3)
        v = v_train[jax.random.randint(row_key, (setup.batch_size,), 0, len(v_train))]
        s = score(v, rng_key=score_key)

        def loss(learned: Any) -> Array:
            return -critic_bound(_merge(learned, rest), s, v, probe_key, setup.num_probes).mean()

        value, gradient = jax.value_and_grad(loss)(learned)
        return apply_gradient(transformation, gradient, optim_state, learned, value=value, value_fn=loss)

    return lax.fori_loop(start, stop, step, (learned, optim_state))


@partial(jax.jit, static_argnames=("setup", "num_probes"))
def _bounds(learned: Any, fixed: list[Any], v: Array, rng_key: Array, setup: _Setup, num_probes: int | None) -> Array:
    """The bound on every row."""
    rest, score = join(fixed, setup.static)

    def of_batch(v: Array, rng_key: Array) -> Array:
        score_key, probe_key = jax.random.split(rng_key)
        return critic_bound(_merge(learned, rest), score(v, rng_key=score_key), v, probe_key, num_probes)

    return _by_batches(of_batch, v, rng_key, setup.batch_size)


@partial(jax.jit, static_argnames="setup")
def _scores(fixed: list[Any], v: Array, rng_key: Array, setup: _Setup) -> Array:
    """Scores of all rows."""
    _, score = join(fixed, setup.static)
    _require_key_argument(score)
    return _by_batches(lambda v, key: score(v, rng_key=key), v, rng_key, setup.batch_size)


def critic_bound(critic: Callable[[Array], Array], s: Array, v: Array, rng_key: Array, num_probes: int | None) -> Array:
    r""":math:`s \cdot c + \mathrm{tr} \nabla c - \tfrac12 \|c\|^2` of every row, ``(batch,)``.

    :param critic: maps one event to one.
    :param s: scores at ``v``.
    :param num_probes: Rademacher probes of the trace; the exact one for None.
    """
    c, push = jax.linearize(jax.vmap(critic), v)
    axes = tuple(range(1, v.ndim))
    return (s * c - c**2 / 2).sum(axes) + _trace(push, v, rng_key, num_probes)


def _trace(push: Callable[[Array], Array], v: Array, rng_key: Array, num_probes: int | None) -> Array:
    """The traces of the Jacobians that ``push`` multiplies with, ``(batch,)``."""
    axes, size = tuple(range(1, v.ndim)), math.prod(v.shape[1:])

    def along(u: Array) -> Array:
        return (u * push(u)).sum(axes)

    if num_probes is not None:
        probes = jax.random.rademacher(rng_key, (num_probes, *v.shape), v.dtype)
        return jax.vmap(along)(probes).mean(0)

    def add(trace: Array, i: Array) -> tuple[Array, None]:  # one coordinate after the other: memory does not grow with them
        direction = jnp.zeros(size, v.dtype).at[i].set(1).reshape(v.shape[1:])
        return trace + along(jnp.broadcast_to(direction, v.shape)), None

    return lax.scan(add, jnp.zeros(len(v), v.dtype), jnp.arange(size))[0]


def _by_batches(function: Callable[[Array, Array], Array], v: Array, rng_key: Array, batch_size: int) -> Array:
    """``function(rows, key)`` of all rows, some at a time: memory does not grow with their number."""
    whole = len(v) // batch_size
    first, last = v[: whole * batch_size].reshape(whole, batch_size, *v.shape[1:]), v[whole * batch_size :]
    keys = jax.random.split(rng_key, whole + 1)
    parts = []
    if len(first):
        out = lax.map(lambda x: function(*x), (first, keys[:-1]))
        parts.append(out.reshape(-1, *out.shape[2:]))
    if len(last):
        parts.append(function(last, keys[-1]))
    return jnp.concatenate(parts)


def _is_learned(leaf: Any) -> bool:
    return isinstance(leaf, (Array, np.ndarray)) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _partition(critic: Any) -> tuple[Any, Any]:
    """The arrays to learn, and the rest; None where a leaf is in the other."""
    learned = jax.tree.map(lambda leaf: jnp.asarray(leaf) if _is_learned(leaf) else None, critic)
    return learned, jax.tree.map(lambda leaf: None if _is_learned(leaf) else leaf, critic)


def _merge(learned: Any, rest: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, learned, rest, is_leaf=lambda x: x is None)


def _by_name(splits: Any) -> dict[str, Array]:
    try:
        v_train, v_validation, v_test = splits
    except (TypeError, ValueError):
        found = f"{len(splits)} of them" if isinstance(splits, (tuple, list)) else f"shape {jnp.shape(splits)}"
        raise ValueError(f"splits must be three sets of rows, (v_train, v_validation, v_test), got {found}.") from None
    return {"v_train": jnp.asarray(v_train), "v_validation": jnp.asarray(v_validation), "v_test": jnp.asarray(v_test)}


def _require_splits(splits: dict[str, Array], batch_size: int) -> None:
    event = splits["v_train"].shape[1:]
    for name, least in (("v_train", batch_size), ("v_validation", 1), ("v_test", 2)):
        v = splits[name]
        if v.ndim == 0 or not jnp.issubdtype(v.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating rows of shape (rows,) + event_shape, got {v.dtype} of shape {v.shape}.")
        if len(v) < least:
            why = {"v_train": "a batch", "v_validation": "a choice of the best step", "v_test": "a standard error"}[name]
            raise ValueError(f"{name} has {len(v)} rows, and {why} needs {least}: give it more of the data.")
        if v.shape[1:] != event:
            raise ValueError(f"{name} has events of shape {v.shape[1:]} and v_train of {event}: split one set of data.")
        if bad := int((~jnp.isfinite(v)).reshape(len(v), -1).any(1).sum()):
            raise ValueError(f"{name}: {bad} of {len(v)} rows are NaN or infinite. Remove them.")


def _require_critic(critic: Any, v: Array) -> None:
    if not any(_is_learned(leaf) for leaf in jax.tree.leaves(critic)):
        raise ValueError(
            "the critic has no floating array to learn: it must be a pytree that holds its parameters, such as an Equinox "
            "module or jax.tree_util.Partial(function, parameters); what a plain function closes over cannot be seen."
        )
    out = jax.eval_shape(critic, v)
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape != v.shape:
        found = jax.tree.map(jnp.shape, out)
        raise ValueError(f"the critic must map one event of shape {v.shape} to one of the same shape, it returned {found}.")


def _require_key_argument(score: Any) -> None:
    try:
        inspect.signature(score).bind(None, rng_key=None)
    except TypeError:
        raise TypeError(
            "score must be a function score(v, rng_key=key) of rows; one without randomness takes it and leaves it."
        ) from None
    except ValueError:  # of what is written in C nothing is known
        pass


def _require_scores(name: str, score: Any, v: Array, s: Array) -> None:
    if s.shape != v.shape:
        raise ValueError(f"score returned shape {s.shape} for {name} of shape {v.shape}: it must return d log p / d v.")
    if bad := int((~jnp.isfinite(s)).reshape(len(s), -1).any(1).sum()):
        raise ValueError(f"score: {bad} of {len(s)} rows of {name} have a score that is NaN or infinite. Look at those rows.")
