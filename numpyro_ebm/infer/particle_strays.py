# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Whether a particle stands where the posterior hardly is, while the others of its row follow it.

One particle of a cloud may have started where the posterior is so steep that no move is accepted, or have been thrown far out by
a move on such a place, and be on its way back for as long as the run takes. Means over the rows or over the cloud do not see it.
What tells is the log density that it would gain at the place of another,

.. math:: \log p(x_j \mid \text{the rest of } i) - \log p(x_i \mid \text{the rest of } i),

site by site. A particle that follows the posterior is a sample of the conditional distribution that this is of, whose log density
is hardly further below its top than the number of its elements, however wide it is or heavy its tails are.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebm.evaluate.report import Finding
from numpyro_ebm.infer.particle_batch import ParticleBatch, Particles
from numpyro_ebm.infer.particle_rows import Rows, rows_of

GAIN = "nats that a particle would gain at another's place"
# What a million samples may lose: 60 nats where tails are those of two Cauchy variables, 14 more than on average where they are
# exponential; and on average half a nat for each element of a normal one, and one of an exponential one.
MOST, MOST_PER_ELEMENT = 100.0, 2.0
ROUNDINGS = 8  # of a log density: a sum over all data
OTHERS = 4  # places of so many others are tried: a stray is seen by any of them that is none
STRAY = (
    "a particle stands where the posterior hardly is, and the parameters learn from it as from the others. It has not left the "
    "place where it started, or is on its way back from far out: start nearer to the posterior, by another init_strategy or "
    "none, and take more steps"
)


class Gain(NamedTuple):
    """What the particle of a site gains that gains most."""

    #: (), in nats
    value: Array
    #: (), the most that is right for a row with its number of elements
    most: Array


def largest_gains(rows: dict[str, Rows], theta: Any, x: Particles) -> dict[str, Gain]:
    """By latent site; traced. Nothing of a single particle, and of rows that cannot be told apart."""
    found = {name: _gains(of_site, theta, x) for name, of_site in rows.items()}
    return {name: Gain(of_site[0].max(), of_site[1]) for name, of_site in found.items() if of_site is not None}


def without_strays(batch: ParticleBatch, theta: Any, x: Particles) -> Particles:
    """Particles that stand where others do, where they would gain more by that than is right; the others stay."""
    for name, rows in rows_of(batch, theta).items():
        if (found := _gains(rows, theta, x)) is not None:
            gains, most = found
            places = jnp.stack([jnp.roll(x[name], i, 0) for i in range(len(gains))])
            at = jnp.where(gains.max(0) > most, gains.argmax(0), 0)[None]
            x = {**x, name: jnp.take_along_axis(places, at, 0)[0]}
    return x


def _gains(rows: Rows, theta: Any, x: Particles) -> tuple[Array, Array] | None:
    """What each particle gains at its own place and at others', ``(places, particles, ...)``, and the most that is right.

    None of a single particle, and of rows that cannot be told apart.
    """
    value = x[rows.name]
    num_places = min(OTHERS, len(value) - 1) + 1
    if num_places == 1 or rows.coupled:
        return None
    log_density, shape = rows.given_others(theta, x), value.shape
    values = lax.map(lambda i: log_density(jnp.roll(value, i, 0)), jnp.arange(num_places))
    gains = values - values[0]
    num_elements = math.prod(shape) / math.prod(rows.shape_of(shape))
    rounding = ROUNDINGS * jnp.finfo(values.dtype).eps * jnp.nanmedian(jnp.abs(values))
    return jnp.where(jnp.isnan(gains), 0, gains), MOST + MOST_PER_ELEMENT * num_elements + rounding


def stray_findings(gains: dict[str, Gain], *, are_well: bool) -> list[Finding]:
    """What is said of the site that a particle strays most in: it may in others by that alone.

    :param are_well: whether the particles of all rows move as they should. Where they do not, that is the cause to tell.
    """
    if not gains:
        return []
    site, (value, most) = max(gains.items(), key=lambda item: float(item[1].value) - float(item[1].most))
    return [Finding(site, GAIN, float(value), None, float(most) if are_well else None, STRAY)]
