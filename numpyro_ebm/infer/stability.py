# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether unadjusted particles are stable where they stand, and what to say where they are not.

Langevin particles of step :math:`h` diverge where h times the curvature :math:`c` of their negative log posterior is above 2, and
have twice the variance of the posterior at :math:`hc = 1`. Rows whose posteriors are independent have a curvature each, and of
many rows it is the stiffest that counts. Curvature is measured over the length of a move, by differences of scores,

.. math:: hc(v) = -h \, v \cdot [s(x + v) - s(x)] / |v|^2,

first along a move of the particle and then by power iteration: it is no more than the largest on the way, so that nothing is said
of particles that are on their way through places where hc is below 1, and what hops to and fro between flat places is seen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_ebm.evaluate.report import Finding, Warned
from numpyro_ebm.infer.particle_batch import Particles
from numpyro_ebm.optim import normal_like
from numpyro_ebm.program.rows import shared_plates
from numpyro_ebm.program.run import Run

STIFFEST = "h times the curvature of the stiffest row"
FIX = "take a smaller step_size, or kernel='mala', which is right at every step"
# Thresholds of h times the curvature, hc, at which the variance of particles is 1 / (1 - hc/2) of the posterior's. A report says
# whether what was learned can be believed: from .5 on, a third too widely spread, parameters are off by about a standard error. A
# run is still on its way, through places that may be steeper, and is looked at less closely: it says what is on the way to diverge,
# from 1 on, where the spread is doubled, and particles that would start there are moved on before it.
STIFF_IN_RUN, STIFF_AT_END = 1.0, 0.5
# A limit that is further from the step than by this factor tells of a bad place to stand, not of a better step.
HOPELESS = 1e4
ELSEWHERE = "Start nearer to the posterior, by init_strategy, or give the data in a unit in which latents are of order 1"
NUM_POWER_ITERATIONS = 30
NUM_SCORES, SCORES_AT_START = 6, 2  # power iterations, a score each, of a look at particles in a run, and before it
ALL_BATCHES = 2**30
# A run looks at its particles at these numbers of steps: 20, 80, 320, 1280, and then every 1280.
FIRST_LOOK, LOOK_EVERY = 20, 1280
STEPS_PER_BATCH = 100  # steps between looks for each batch that is looked at: its scores are a tenth of theirs
# Clouds of data in this many batches are told to lag by more than this, after two rounds of the data and as many steps.
MANY_BATCHES, LAG, STEPS_TO_ARRIVE = 10, 0.5, 500

Scores = Callable[[Particles], Particles]


class Stiffest(NamedTuple):
    """The stiffest row of a batch: the median over its particles."""

    #: (), h times its curvature
    ratio: Array
    #: by site, (): its share of the direction that is curved most
    share: dict[str, Array]
    #: by plate that all latents share, (): the index of the row
    rows: dict[str, Array]


class Look(NamedTuple):
    """What is seen of the particles of some batches."""

    #: the stiffest row
    row: Stiffest
    #: (), h times the curvature of the stiffest particle of all
    wildest: Array
    #: (), the largest :func:`lag` of a batch
    lag: Array
    #: (), batches in the data
    num_batches: Array

    def worse(self, other: "Look") -> "Look":
        """What is worse in either."""
        row = jax.tree.map(partial(jnp.where, other.row.ratio > self.row.ratio), other.row, self.row)
        return Look(row, jnp.maximum(self.wildest, other.wildest), jnp.maximum(self.lag, other.lag), other.num_batches)


class Start(NamedTuple):
    """Where particles start."""

    #: the stiffest row there
    row: Stiffest
    #: (), h times the curvature by derivatives, which is known where a move is not finite
    local: Array
    #: by site, (): the least and the largest value, constrained
    low: dict[str, Array]
    high: dict[str, Array]


class Blocks:
    """The independent rows of a cloud: what one element of the plates that all latents share holds, for each particle."""

    def __init__(self, program: Run) -> None:
        self.program, self.plates = program, shared_plates(program, program.latents)

    def parts(self, a: Particles, b: Particles) -> dict[str, Array]:
        """Inner products, by site and block."""
        return {name: self._sum(name, a[name] * b[name]) for name in a}

    def dot(self, a: Particles, b: Particles) -> Array:
        """Inner products, by block: of shape ``(num_particles,) + sizes of the shared plates``."""
        return sum(self.parts(a, b).values(), jnp.zeros(()))

    def spread(self, of_blocks: Array, like: Particles) -> Particles:
        """What there is one of for each block, for each site: of shapes that go with positions."""
        return {name: of_blocks.reshape(self._kept(name, x.shape)) for name, x in like.items()}

    def _sum(self, name: str, x: Array) -> Array:
        kept = self._kept(name, x.shape)
        outside = tuple(axis for axis, (size, whole) in enumerate(zip(kept, x.shape, strict=True)) if size != whole)
        return x.sum(outside).reshape((len(x), *(len(self.program.plates[plate].indices) for plate in self.plates)))

    def _kept(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with 1 at the axes of an event, and of plates that not all sites are in."""
        axes = {axis % len(shape) for plate, axis in self.program.latents[name].plates if plate in self.plates}
        return tuple(size if axis == 0 or axis in axes else 1 for axis, size in enumerate(shape))


def looks_due(before: int, now: int) -> int:
    """How many batches to look at when ``now`` steps are made and ``before`` were at the last occasion; 0 if there is no need."""
    due = now >= FIRST_LOOK and _num_looks(now) > _num_looks(before)
    return 1 + min(now, LOOK_EVERY) // STEPS_PER_BATCH if due else 0


def _num_looks(num_steps: int) -> int:
    """Numbers to look at that are not more than this."""
    return ((min(num_steps, LOOK_EVERY) // FIRST_LOOK).bit_length() + 1) // 2 + num_steps // LOOK_EVERY


def stiffness(
    program: Run, scores: Scores, x: Particles, step_size: dict[str, Array], rng_key: Array, num_scores: Any
) -> tuple[Array, Particles]:
    """H times the curvature of each block of each particle, over the length of its move, and the direction of it.

    It is inf where a move leads to scores that are not finite.

    :param step_size: by site.
    :return: of shape ``(num_particles,) + sizes of the shared plates``; and the direction, as particles.
    """
    scaled, blocks = partial(_scaled, step_size), Blocks(program)
    noise = normal_like(rng_key, x)

    def look(i: Array, carry: tuple[Particles, Particles, _Power]) -> tuple[Particles, Particles, _Power]:
        start, move, power = carry
        # one score for the program to compile: the first is that of the particles, which tells their move
        v = jax.tree.map(lambda a: jnp.where(i == 0, 0, a), power.v)
        there = scaled(scores(jax.tree.map(jnp.add, x, scaled(v))))
        is_first = partial(jnp.where, i == 0)
        start = jax.tree.map(is_first, there, start)
        move = jax.tree.map(lambda s, m, xi: is_first(s + jnp.sqrt(2.0).astype(s.dtype) * xi, m), there, move, noise)
        power = _iterate(blocks, power._replace(v=v), jax.tree.map(jnp.subtract, start, there), blocks.dot(move, move))
        return start, move, jax.tree.map(is_first, _Power(move, jnp.full_like(power.largest, -jnp.inf)), power)

    begin = noise, noise, _Power(noise, jnp.zeros_like(blocks.dot(noise, noise)))
    _, _, power = lax.fori_loop(0, num_scores + 1, look, begin)
    return power.largest, power.v


def stiffest(
    program: Run, scores: Scores, x: Particles, step_size: dict[str, Array], rng_key: Array, num_scores: Any = NUM_SCORES
) -> tuple[Stiffest, Array]:
    """:func:`stiffness` of the median particle of each row: one that passes a steep place does not make its row stiff.

    :return: the stiffest row, and the stiffness of the stiffest particle of all.
    """
    of_particles, direction = stiffness(program, scores, x, step_size, rng_key, num_scores)
    blocks = Blocks(program)
    ratio, share = jnp.median(of_particles, 0), {name: part.mean(0) for name, part in blocks.parts(direction, direction).items()}
    worst = jnp.unravel_index(jnp.argmax(ratio), ratio.shape) if ratio.ndim else ()
    rows = {plate: program.plates[plate].indices[i] for plate, i in zip(blocks.plates, worst, strict=True)}
    return Stiffest(ratio[worst], {name: part[worst] for name, part in share.items()}, rows), of_particles.max()


def local_stiffness(program: Run, scores: Scores, x: Particles, step_size: dict[str, Array], rng_key: Array) -> Array:
    """The largest h times the curvature where particles stand, by derivatives: from below.

    Blocks where it is not finite are left out; nan where all are.
    """
    scaled = partial(_scaled, step_size)

    def product(v: Particles) -> Particles:
        return jax.tree.map(jnp.negative, scaled(jax.jvp(scores, (x,), (scaled(v),))[1]))

    blocks, start = Blocks(program), normal_like(rng_key, x)
    length = blocks.dot(start, start)

    def iterate(power: _Power, _: None) -> tuple[_Power, None]:
        return _iterate(blocks, power, product(power.v), length), None

    begin = _Power(start, jnp.full(length.shape, -jnp.inf, length.dtype))
    ratio = lax.scan(iterate, begin, None, NUM_POWER_ITERATIONS)[0].largest
    return jnp.nanmax(jnp.where(jnp.isfinite(ratio), ratio, jnp.nan))


def _scaled(step_size: dict[str, Array], x: Particles) -> Particles:
    """In units in which every step is 1, or back from them: the curvature is then h times that in the model's."""
    return {name: jnp.sqrt(jnp.asarray(step_size[name])).astype(x[name].dtype) * x[name] for name in x}


class _Power(NamedTuple):
    """Where a power iteration is."""

    v: Particles
    largest: Array  # Rayleigh quotient of each block so far


def _iterate(blocks: Blocks, power: _Power, image: Particles, length: Array) -> _Power:
    """A step of it: the image of its vector, in each block of the given squared length."""
    tiny = 1e-30
    quotient = blocks.dot(power.v, image) / jnp.maximum(blocks.dot(power.v, power.v), tiny)
    quotient = jnp.where(jnp.isnan(quotient), jnp.inf, quotient)
    longer = jnp.sqrt(length / jnp.maximum(blocks.dot(image, image), tiny))
    v = jax.tree.map(jnp.multiply, image, blocks.spread(longer, image))
    return _Power(v, jnp.maximum(power.largest, quotient))


def lag(program: Run, scores: Scores, x: Particles) -> Array:
    """How far clouds stand from the posterior at least, in standard deviations of it: 0 where they follow it.

    By the mean score of a row's particles, which is 0 under the posterior but for noise, four errors of which are taken out; the
    variance of scores tells the curvature.
    """
    found, blocks = scores(x), Blocks(program)
    mean = {name: jnp.broadcast_to(score.mean(0), score.shape) for name, score in found.items()}
    rest = jax.tree.map(jnp.subtract, found, mean)
    num = len(next(iter(x.values())))
    square, variance = blocks.dot(mean, mean).mean(), blocks.dot(rest, rest).mean() * num / (num - 1)
    num_elements = sum(score[0].size for score in found.values())
    noise = variance / num * (1 + 4 * (2 / num_elements) ** 0.5)
    return jnp.sqrt(jnp.maximum(square - noise, 0) / variance)


def warnings_of(look: Look, step_size: dict[str, float], num_steps: int, num_moves: int) -> list[str]:
    """Warnings of the stiffest row, where particles are spread too much, and of clouds that do not follow the parameters."""
    found, worst = list[str](), float(look.row.ratio)
    if worst >= STIFF_IN_RUN:
        site = _stiffest_site(look.row)
        where = " and ".join(f"row {int(row)} of plate '{plate}'" for plate, row in look.row.rows.items())
        size = f"about {worst:.2f}" if np.isfinite(worst) else "too large for a finite move"
        text = (
            f"site '{site}': step_size is h = {step_size[site]:g}, and h times the curvature is {size} for "
            f"{where or 'the stiffest direction'}: at 2 the particles diverge, from {STIFF_IN_RUN:g} on their variance "
            f"is more than twice the posterior's, and the report of the run wants {STIFF_AT_END:g} at most. {FIX.capitalize()}."
        )
        found.append(Warned(text, STIFFEST))
    lag, num_batches = float(look.lag), float(look.num_batches)
    if num_batches >= MANY_BATCHES and num_steps >= max(2 * num_batches, STEPS_TO_ARRIVE) and lag > LAG:
        found.append(
            f"the particles of a row move num_moves = {num_moves} times in {num_batches:.0f} steps, and stand {lag:.1f} standard "
            f"deviations of the posterior away from where they should be (above {LAG:g}), so that the parameters learn from clouds "
            f"of the past: take num_moves = {max(10, 2 * num_moves)} or more, or larger batches."
        )
    return found


def _stiffest_site(row: Stiffest) -> str:
    share = {name: np.nan_to_num(float(part)) for name, part in row.share.items()}
    return max(share, key=lambda name: share[name])


def stiffness_finding(look: Look) -> Finding:
    """The stiffest row as a number of a report."""
    why = (
        "the particles' variance exceeds the posterior's by a fraction of half this number or more, which biases what is "
        f"learned: {FIX}"
    )
    ratio = float(look.row.ratio)
    return Finding(_stiffest_site(look.row), STIFFEST, ratio, None, STIFF_AT_END, why)


def fix_of(step_size: dict[str, float], ratio: float, start: Start) -> str:
    """What to do about particles that are no longer finite.

    :param step_size: by site.
    :param ratio: h times the curvature where they stand, which should be below 2; not finite where it is not known.
    """
    one, at_start = len(set(step_size.values())) == 1, float(start.row.ratio)
    h = f"{next(iter(step_size.values())):g}" if one else ", ".join(f"{h:g} at '{name}'" for name, h in step_size.items())

    def limit(ratio: float) -> str:
        return f"of about {2 * next(iter(step_size.values())) / ratio:.2g}" if one else f"by a factor of {ratio / 2:.2g}"

    if 2 <= ratio <= HOPELESS:
        return (
            f"The step_size h = {h} is above the stability limit {limit(ratio)} where they were: take a fifth of that, or "
            "kernel='mala'."
        )
    if 2 <= at_start <= HOPELESS:
        return (
            f"The step_size h = {h} is above the stability limit {limit(at_start)} where particles start: take a fifth of that, or "
            "kernel='mala', which is right at every step."
        )
    if at_start > HOPELESS:
        return (
            f"The step_size h = {h} is above the stability limit by far where particles start: {_told_start(step_size, start)}. A "
            f"step that is stable there would lead nowhere. {ELSEWHERE}; kernel='mala' is stable there too, but may take long to "
            "leave."
        )
    is_known = 1 / HOPELESS <= ratio < 2
    known = f", limit {limit(ratio).removeprefix('of ')}" if is_known and one else ""
    flat = f" The posterior is all but flat for such a step where they start: {_told_start(step_size, start)}. {ELSEWHERE}."
    return (
        f"Particles are stable {'where they were' if is_known else 'where they start'} at fixed parameters (h = {h}{known}): take "
        "a smaller learning rate, which is the step_size too where parameters move by it, or a smaller step_size for places that "
        f"are steeper, or kernel='mala'.{flat if abs(at_start) < 1 / HOPELESS else ''}"
    )


def _told_start(step_size: dict[str, float], start: Start) -> str:
    """Where the site that is curved most starts, and how much it is curved there."""
    site = _stiffest_site(start.row)
    low, high = float(start.low[site]), float(start.high[site])
    values = f"from {low:.3g} to {high:.3g}" if low < high else f"of {low:.3g}"
    values = values if np.isfinite([low, high]).all() else "that are not finite"
    ratio = float(start.row.ratio if np.isfinite(start.row.ratio) else start.local)
    if start.row.ratio > HOPELESS and not 0 < ratio < np.inf:
        return f"site '{site}' starts at values {values}, where its first move is not finite"
    curvature = f"about {ratio / step_size[site]:.2g}"
    return f"site '{site}' starts at values {values}, where the curvature of its negative log posterior is {curvature}"
