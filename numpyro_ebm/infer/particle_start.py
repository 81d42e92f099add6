# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Before particles move: what they cannot learn from, and where they start.

Both are questions about all rows of the data. A run of the model shows those of one batch, so they go through the data batch by
batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm.infer.particle_batch import ParticleBatch, Particles
from numpyro_ebm.infer.particle_moves import How, Moves, adjusted
from numpyro_ebm.infer.particle_strays import without_strays
from numpyro_ebm.infer.stability import SCORES_AT_START, STIFF_IN_RUN, Blocks, stiffness
from numpyro_ebm.program.provenance import mark, sources
from numpyro_ebm.program.rows import all_batches, full_shape, scatter
from numpyro_ebm.program.run import Run, draw_latents, jacobians_of, require_continuous, run_model
from numpyro_ebm.program.sites import Model, events_inside, finite_events, is_normalizer, require_data

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def require_noise(dynamics: Any) -> None:
    """Refuses dynamics that move particles by their scores alone, which take all of them to the mode.

    :param dynamics: an optax transformation.
    :raises ValueError: with what to take.
    """
    x = {"x": jnp.zeros(2)}

    def moves() -> Any:
        key, state, seen = mark(jax.random.PRNGKey(0), "noise"), dynamics.init(x), []
        for _ in range(2):  # noise may come by way of velocities
            updates, state = dynamics.update(x, state, x, temperature=1.0, rng_key=key)
            seen.append(updates)
        return seen

    if not any(jax.tree.leaves(sources(moves))):
        raise ValueError(
            "dynamics moves particles without noise, so that all of a cloud would come together at the mode: take "
            "numpyro_ebm.langevin(step_size), kinetic_langevin(step_size, friction), or leave it out."
        )


def require_learnable(program: Run, given: dict[str, Any]) -> None:
    """Refuses a model that particles cannot learn, whatever the data.

    :param given: values of param sites to start from.
    :raises ValueError: naming the site.
    """
    require_continuous(program)
    if not program.latents:
        raise ValueError("the model has no latent site, so that there are no particles: learn its parameters by SVI.")
    if not program.params:
        raise ValueError("the model has no param site, so that there is nothing to learn: draw its latents by MCMC.")
    if not [name for name in program.observed if not is_normalizer(name) and name not in jacobians_of(program)]:
        raise ValueError(
            f"the model observes nothing: its sites {sorted(program.latents)} are all latent, and every value of its parameters is "
            "as good. Give it the data, numpyro.sample(..., obs=y)."
        )
    if unknown := sorted(set(given) - set(program.params)):
        raise ValueError(f"init_params names {unknown}, which is no param site: the model has {sorted(program.params)}.")
    for name, site in program.latents.items():
        outside = set(program.subsampled) - {plate for plate, _ in site.plates}
        if outside:
            around = min(outside)
            raise ValueError(
                f"site '{name}' stands outside the subsampled plate '{around}': its posterior depends on all rows of the data, "
                "and a batch would give its particles noise that is not Langevin's. Make it a numpyro.param, or do not "
                f"subsample '{around}'."
            )


def are_good_rows(
    model: Model, args: Args, kwargs: Kwargs, rng_key: Array, program: Run, *, data: dict[str, Any], latents: dict[str, Array]
) -> Array:
    """Whether all observed data are finite and inside their supports, and every index of a plate is that of a row; traced.

    :param program: a run of the model at ``data`` and ``latents``.
    """
    finite = _finite_batches(model, args, kwargs, rng_key, program, data, latents).all()
    return finite & jnp.asarray([plate.is_row.all() for plate in program.plates.values()]).all()


def require_good_rows(
    model: Model, args: Args, kwargs: Kwargs, rng_key: Array, *, data: dict[str, Any], latents: dict[str, Array]
) -> None:
    """Refuses rows that are none of :func:`are_good_rows`; not traced.

    :raises ValueError: naming the site or plate.
    """
    program = run_model(model, args, kwargs, rng_key, data=data, latents=latents)
    for name, plate in program.plates.items():
        if not plate.is_row.all():
            bad = int(plate.indices[~plate.is_row][0])
            if plate.is_subsampled:
                raise ValueError(f"plate '{name}': index {bad} is out of range for {plate.size} rows of data.")
            raise ValueError(
                f"plate '{name}': index {bad} is out of order. The plate is not subsampled and has all {plate.size} rows: give "
                "them, and their particles, in the order of their indices."
            )
    finite = jax.jit(lambda data, latents: _finite_batches(model, args, kwargs, rng_key, program, data, latents))
    worst = jnp.argmin(finite(data, latents))
    rows = {plate: index[worst] for plate, index in all_batches(program).items()}
    program = run_model(model, args, kwargs, rng_key, data={**data, **rows}, latents=latents)
    for site in program.observed.values():
        require_data(site)


def draw_particles(
    model: Model,
    args: Args,
    kwargs: Kwargs,
    rng_key: Array,
    program: Run,
    num_particles: int,
    *,
    data: dict[str, Any],
    init_strategy: Callable[..., Any],
) -> Particles:
    """Particles for all rows of the data.

    :param program: a run of the model.
    """
    batches = all_batches(program)
    num_batches = max([len(rows) for rows in batches.values()], default=1)

    def draw(key: Array, rows: dict[str, Array]) -> Particles:
        def one(key: Array) -> dict[str, Array]:
            return draw_latents(model, args, kwargs, key, data={**data, **rows}, init_strategy=init_strategy)

        return jax.vmap(one)(jax.random.split(key, num_particles))

    keys = jax.random.split(rng_key, num_batches)
    if not batches or any(plate.places is not None for plate in program.plates.values()):  # all the rows that there are
        return draw(keys[0], {})
    shapes = jax.eval_shape(draw, keys[0], {plate: rows[0] for plate, rows in batches.items()})
    full = {name: jnp.zeros(full_shape(x.shape, program, name), x.dtype) for name, x in shapes.items()}

    def fill(store: Particles, batch: tuple[Array, dict[str, Array]]) -> tuple[Particles, None]:
        key, rows = batch
        return {name: scatter(program, rows, name, store[name], x) for name, x in draw(key, rows).items()}, None

    return lax.scan(fill, full, (keys, batches))[0]


NUM_ROUNDS, MOVES_PER_ROUND = 5, 10


def tamed(batch: ParticleBatch, theta: Any, x: Particles, step_size: dict[str, Any], rng_key: Array) -> Particles:
    """Particles moved on, at fixed parameters, from where a step of theirs would be unstable; the others stay.

    Samples of a prior stand anywhere in its tails, where the likelihood may be as steep as it likes: that of a scale near 0 has a
    curvature without bound. Metropolis-adjusted moves, whose steps adapt, leave such places towards the posterior.
    """
    scores, blocks = lambda x: batch.scores(theta, x), Blocks(batch.program)
    try:
        kept = Moves("mala", None, "jacobi", 1, False).init(batch, theta, x, step_size)
    except ValueError:  # rows that are not independent: where unadjusted particles start is where they start
        return x

    def are_wild(x: Particles, key: Array) -> Array:
        return stiffness(batch.program, scores, x, step_size, key, SCORES_AT_START)[0] > STIFF_IN_RUN

    def going(carry: tuple[Any, ...]) -> Array:
        count, _, _, wild = carry
        return (count == 0) | ((count <= NUM_ROUNDS) & wild.any())

    def moved(count: Array, x: Particles, kept: Any, wild: Array) -> tuple[Particles, Any]:
        counts = count * MOVES_PER_ROUND + jnp.arange(MOVES_PER_ROUND)
        keys = jax.random.split(jax.random.fold_in(rng_key, count), MOVES_PER_ROUND)
        new, kept = adjusted(batch, theta, x, kept, How(keys, jnp.ones(MOVES_PER_ROUND), counts))
        return jax.tree.map(lambda wild, new, old: jnp.where(wild, new, old), blocks.spread(wild, x), new, x), kept

    def round_of(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, x, kept, wild = carry  # none is known to be wild in the first round, which only looks
        x, kept = lax.cond(wild.any(), moved, lambda count, x, kept, wild: (x, kept), count, x, kept, wild)
        return count + 1, x, kept, are_wild(x, jax.random.fold_in(rng_key, -1 - count))

    none = jnp.zeros_like(blocks.dot(x, x), bool)
    _, x, _, wild = lax.while_loop(going, round_of, (jnp.zeros((), jnp.int32), x, kept, none))
    # what is still wild stands where another particle of its row does, if there is one that is not
    tame_first, num_tame = jnp.argsort(wild, 0), jnp.maximum((~wild).sum(0), 1)
    place = jnp.arange(len(wild)).reshape(-1, *[1] * (wild.ndim - 1))
    source = jnp.where(wild & ~wild.all(0), jnp.take_along_axis(tame_first, place % num_tame, 0), place)
    x = {name: jnp.take_along_axis(x[name], at, 0) for name, at in blocks.spread(source, x).items()}
    return without_strays(batch, theta, x)


def _finite_batches(
    model: Model, args: Args, kwargs: Kwargs, rng_key: Array, program: Run, data: dict[str, Any], latents: dict[str, Array]
) -> Array:
    """Whether the observed data of each batch are finite and inside their supports, of shape (num_batches,)."""

    def finite(rows: dict[str, Array]) -> Array:
        seen = run_model(model, args, kwargs, rng_key, data={**data, **rows}, latents=latents)
        good = [f(site).all() for site in seen.observed.values() for f in (finite_events, events_inside)]
        return jnp.asarray(good).all()

    batches = all_batches(program)
    return lax.map(finite, batches) if batches else finite({})[None]
