# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the report of a run can be trusted: how often it warns of a wrong fit, and of a right one.

For each diagnostic there is a problem where the fit is wrong and one where all is well, each trained from many keys at once, by
``vmap`` over ``init`` and ``update``. Of a wrong fit the number must be out of bounds that is to tell it; of a right one
none may be.

Run ``python benchmarks/report_table.py``: two and a half hours of one core, or twenty minutes with ``--num-seeds 10``; ``--only``
selects by words of a line.
"""

import argparse

import _timing
import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm import (
    MALA,
    BaseMeasure,
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ExactScoreMatching,
    GumbelBernoulli,
    Implicit,
    ImportanceWeighted,
    ParticleMMLE,
    ScoreMatching,
    SlicedScoreMatching,
    TiltedDistribution,
    Unrolled,
    VaGES,
    Variational,
    Weighted,
    diagnose,
    negative_phase,
)

# Latents with two modes, at -1.5 and 1.5, of weights .3 and .7, seen with noise.
KIND, SPREAD, NOISE = jax.random.normal(jax.random.key(0), (3, 300))
MODES = jnp.where(KIND < 0.524, 1.5, -1.5) + 0.3 * SPREAD + 0.2 * NOISE


def two_modes(y):
    tilt, slope, wall = numpyro.param("tilt", 0.0), numpyro.param("slope", -9.0), numpyro.param("wall", 2.0)
    with numpyro.plate("data", len(y)):
        energy = TiltedDistribution(dist.Normal(0, 2), lambda z: tilt * z + slope * z**2 + wall * z**4)
        z = numpyro.sample("z", energy)
        numpyro.sample("y", dist.Normal(z, 0.2), obs=y)


def of_modes(num_jumps):
    phase = negative_phase(two_modes, sampler=MALA(num_jumps=num_jumps))
    return ParticleMMLE(phase, optax.adam(1e-2), num_particles=4, step_size=0.005), MODES


def tilted(y):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def of_tilt(optim=None, **settings):
    y = 1.5 + 1.1 * NOISE
    return ParticleMMLE(negative_phase(tilted, **settings), optim or optax.adam(1e-2), num_particles=4, step_size=0.05), y


# Factor analysis, 5 visibles and 2 latents.
WEIGHTS = jax.random.normal(jax.random.key(1), (5, 2))
VISIBLE = jax.random.normal(jax.random.key(2), (2000, 2)) @ WEIGHTS.T + 0.7 * jax.random.normal(jax.random.key(3), (2000, 5))


def factors(v):
    weights = numpyro.param("weights", lambda key: 0.5 * jax.random.normal(key, (5, 2)))
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("v", dist.Normal(h @ weights.T, scale).to_event(1), obs=v)


def full(v):
    mean = numpyro.param("mean", jnp.zeros((2, 5)))
    tril = numpyro.param("tril", jnp.eye(2), constraint=constraints.lower_cholesky)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.MultivariateNormal(v @ mean.T, scale_tril=tril))


def blind(v):
    mean, log_scale = numpyro.param("mean", jnp.zeros(2)), numpyro.param("log_scale", jnp.zeros(2))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))


def narrow(v):
    mean = numpyro.param("mean", jnp.zeros((2, 5)))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(v @ mean.T, 0.05).to_event(1))


def of_factors(engine, guide, objective, rate=1e-2, **settings):
    return engine(factors, guide, optax.adam(rate), optax.adam(2e-2), objective, batch_size=100, **settings), VISIBLE


# Bits: the posterior is that of a restricted Boltzmann machine, so that a guide can have it.
COUPLING = 1.5 * jax.random.normal(jax.random.key(1), (6, 8))
OF_BITS = jax.random.bernoulli(jax.random.key(2), 0.3, (2000, 6)) @ COUPLING + 0.7 * jax.random.normal(jax.random.key(3), (2000, 8))


def machine(v):
    coupling = numpyro.param("coupling", lambda key: 0.1 * jax.random.normal(key, (8, 6)))
    bias, shift = numpyro.param("bias", jnp.zeros(6)), numpyro.param("shift", jnp.zeros(8))
    scale = numpyro.param("scale", jnp.ones(8), constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (6,)))
        v = numpyro.sample("v", BaseMeasure(constraints.real, (8,)), obs=v)
        numpyro.factor("energy", h @ bias + ((v @ coupling) * h).sum(-1) - (((v - shift) / scale) ** 2).sum(-1) / 2)


def bits(v, least=0.0):
    slope, logit = numpyro.param("slope", lambda key: 0.1 * jax.random.normal(key, (8, 6))), numpyro.param("logit", jnp.zeros(6))
    logits = v @ slope + logit
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", GumbelBernoulli(logits + least * jnp.sign(logits), 0.3).to_event(1))


def sure_bits(v):
    bits(v, least=4.0)


def of_bits(guide):
    return BiSM(machine, guide, optax.adam(1e-2), optax.adam(2e-2), DENOISING, batch_size=100), OF_BITS


# A machine of one bit, whose second mode lies where there are no rows: no score tells of it.
AROUND_ZERO = jax.random.normal(jax.random.key(12), (300, 3))


def of_two_places(odds):
    def machine(v):
        log_odds = numpyro.param("odds", odds)
        scale = numpyro.param("scale", 1.2, constraint=constraints.positive)
        with numpyro.plate("data", len(v)):
            bit = numpyro.sample("bit", BaseMeasure(constraints.boolean))
            numpyro.sample("v", BaseMeasure(constraints.real, (3,)), obs=v)
            numpyro.factor("energy", log_odds * bit - ((v - 5 * bit[..., None]) ** 2).sum(-1) / (2 * scale**2))

    def guide(v):
        slope, logit = numpyro.param("slope", 4.0), numpyro.param("logit", -30.0)
        with numpyro.plate("data", len(v)):
            numpyro.sample("bit", GumbelBernoulli(slope * v.sum(-1) + logit))

    return VaGES(machine, guide, optax.adam(1e-2), optax.adam(1e-3), SlicedScoreMatching(), batch_size=100), AROUND_ZERO


def normal(y):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y)):
        scale = jnp.where(jnp.arange(len(y)) == 0, 0.25, 1.0)  # of one row the posterior is steeper
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(loc, 1)), scale), obs=y)


def of_particles(**settings):
    return ParticleMMLE(normal, optax.adam(1e-2), num_particles=10, **settings), 1.5 + 1.1 * NOISE


# Counts, a negative binomial distribution as a mixture.
COUNTS = jax.random.poisson(jax.random.key(10), jax.random.gamma(jax.random.key(11), 1.8, (300,)) / 1.1)


def counts(y):
    shape, rate = (numpyro.param(name, 1.0, constraint=constraints.positive) for name in ("shape", "rate"))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Poisson(numpyro.sample("z", dist.Gamma(shape, rate))), obs=y)


def of_counts(optim):
    return ParticleMMLE(counts, optim, num_particles=10, kernel="mala"), COUNTS


# Two wells with a high barrier between them, seen with so much noise that both are possible.
SEEN = jnp.where(KIND < 0.524, 1.5, -1.5) + 0.3 * SPREAD + 1.5 * NOISE


def wells_in_noise(y):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", TiltedDistribution(dist.Normal(0, 2), lambda z: 8 * ((z / 1.5) ** 2 - 1) ** 2 - tilt * z))
        numpyro.sample("y", dist.Normal(z, 1.5), obs=y)


def of_wells(**settings):
    return ParticleMMLE(wells_in_noise, optax.adam(1e-2), num_particles=20, **settings), SEEN


# An energy with an encoder and a generator. What both can do is to be normal, so that data with two modes are too much for them.
def wells(v):
    wall, slope, tilt = numpyro.param("wall", 0.5), numpyro.param("slope", 1.0), numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", EnergyDistribution(lambda v: wall * v**4 / 4 - slope * v**2 / 2 - tilt * v), obs=v)


def hill(v):
    loc, scale = numpyro.param("loc", 0.0), numpyro.param("scale", 2.0, constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", EnergyDistribution(lambda v: ((v - loc) / scale) ** 2 / 2), obs=v)


def generator(v):
    mean, gain = numpyro.param("mean", 0.0), numpyro.param("gain", 1.0)
    noise = numpyro.param("noise", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(mean + gain * h, noise), obs=v)


def encoder(v):
    inverse, offset = numpyro.param("inverse", 0.5), numpyro.param("offset", 0.0)
    width = numpyro.param("width", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(inverse * v + offset, width))


def of_generator(energy, v):
    optims = optax.adam(0.01), optax.adam(0.01), optax.adam(0.01)
    return BiDVL(energy, encoder, generator, *optims, batch_size=250), v


FEW, OTHERS = NOISE[:60, None], NOISE[100:160, None]


def spikes(x):
    width = jnp.exp(numpyro.param("log_width", -0.5))
    with numpyro.plate("data", len(x)):
        energy = EnergyDistribution(lambda x: -logsumexp(-(((x - FEW) / width) ** 2) / 2), event_shape=(1,))
        numpyro.sample("x", energy, obs=x)


def wells_at_rows(x):
    tilt = numpyro.param("tilt", 0.0)
    with numpyro.plate("data", len(x)):
        start = dist.Normal(0, 2).expand([1]).to_event(1)

        def energy(x):
            return -logsumexp(-(((x - FEW) / 0.02) ** 2) / 2) - tilt * x.sum()

        numpyro.sample("x", EnergyDistribution(energy, event_shape=(1,), initial=start), obs=x)


def bell(x):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        start = dist.Normal(0, 2).expand([1]).to_event(1)
        numpyro.sample("x", EnergyDistribution(lambda x: precision * (x**2).sum() / 2, event_shape=(1,), initial=start), obs=x)


# Two modes that do not overlap, so that scores say nothing of their weights, of which the upper has .7.
APART = jnp.where(KIND < 0.524, 4.0, -4.0)[:, None] + 0.5 * NOISE[:, None]


def of_modes_apart(logit):
    def model(x):
        upper = numpyro.param("logit", logit)
        logs, centers = jax.nn.log_sigmoid(jnp.stack([upper, -upper])), jnp.array([4.0, -4.0])
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", EnergyDistribution(lambda x: -logsumexp(logs - 2 * (x - centers) ** 2), event_shape=(1,)), obs=x)

    return ScoreMatching(model, optax.adam(1e-3), ExactScoreMatching()), APART


# Two half-moons, standardized, of noise .1, and a network that learns them.
AROUND = jnp.pi * jax.random.uniform(jax.random.key(6), (1000,))
ARC = jnp.stack([jnp.cos(AROUND), jnp.sin(AROUND)], 1)
MOONS = jnp.concatenate([ARC, jnp.array([1, 0.5]) - ARC]) + 0.1 * jax.random.normal(jax.random.key(7), (2000, 2))
MOONS = (MOONS - MOONS.mean(0)) / MOONS.std(0)


def a_network(size_in, width, depth):
    start = eqx.nn.MLP(size_in, "scalar", width, depth, jax.nn.silu, key=jax.random.key(0))
    arrays, rest = eqx.partition(start, eqx.is_array)
    tree = jax.tree.structure(arrays)

    def drawn(key):
        keys = jax.tree.unflatten(tree, jax.random.split(key, tree.num_leaves))
        return jax.tree.map(lambda a, key: jax.random.normal(key, a.shape) / a.shape[-1] ** 0.5, arrays, keys)

    return eqx.combine(numpyro.param("network", drawn), rest)


def network(x, width=64, depth=2):
    energy = a_network(2, width, depth)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", TiltedDistribution(dist.Normal(0, 2).expand([2]).to_event(1), energy), obs=x)


def of_moons(sigma, rate=2e-3):
    return ScoreMatching(network, optax.adam(rate), DenoisingScoreMatching(sigma), batch_size=200), MOONS


# Two modes that hardly overlap, of which the upper has .25, for a network to learn.
TWO_BELLS = jnp.where(jnp.arange(600) < 150, 1.6, -1.5) + 0.35 * jax.random.normal(jax.random.key(13), (600,))


def of_two_bells(sigma):
    def model(x):
        energy = a_network("scalar", 32, 2)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", TiltedDistribution(dist.Normal(0, 2), energy), obs=x)

    optim = optax.adam(optax.cosine_decay_schedule(5e-3, 2500))
    return ScoreMatching(model, optim, DenoisingScoreMatching(sigma)), TWO_BELLS


# Groups whose effects have two modes, in units of which one is a thousandth of the data.
EFFECTS = jnp.where(KIND < -0.25, 1.3, -1.0) + 0.25 * SPREAD
IN_UNITS = 400 + 50 * (EFFECTS[:, None] + jax.random.normal(jax.random.key(12), (300, 5)))


def of_units(mean, scale, optim=None):
    def model(y):
        energy = a_network("scalar", 24, 1)
        with numpyro.plate("groups", len(y), dim=-2):
            prior = TiltedDistribution(dist.Normal(400, 100), lambda z: energy((z - mean) / scale))
            z = numpyro.sample("z", prior)
            with numpyro.plate("outcomes", y.shape[1], dim=-1):
                numpyro.sample("y", dist.Normal(z, 50), obs=y)

    optim = optim or optax.adam(optax.cosine_decay_schedule(1e-2, 2000))
    return ParticleMMLE(model, optim, num_particles=10, kernel="mala"), IN_UNITS


# Outcomes of 40 groups, five of each.
OF_GROUPS = 1.3 * jax.random.normal(jax.random.key(8), (40, 1)) + 0.7 * jax.random.normal(jax.random.key(9), (40, 5))


def groups(y):
    noise, (tilt, slope) = numpyro.sample("noise", dist.HalfNormal(1)), numpyro.param("of_prior", jnp.zeros(2))
    with numpyro.plate("groups", len(y), dim=-2):
        prior = TiltedDistribution(dist.Normal(0, 2), lambda z: tilt * z + jax.nn.softplus(slope) * z**2)
        z = numpyro.sample("z", prior)
        with numpyro.plate("outcomes", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(z, noise), obs=y)


# Two outcomes of each group, and as much noise as there is between two modes.
HIDDEN = EFFECTS[:, None] + jax.random.normal(jax.random.key(14), (300, 2))


def hidden_modes(y):
    noise = numpyro.param("noise", 1.5, constraint=constraints.positive)
    tilt, slope, wall = numpyro.param("tilt", 0.0), numpyro.param("slope", 0.0), numpyro.param("log_wall", -2.0)
    with numpyro.plate("groups", len(y), dim=-2):
        prior = TiltedDistribution(dist.Normal(0, 2), lambda z: tilt * z - slope * z**2 + jnp.exp(wall) * z**4)
        z = numpyro.sample("z", prior)
        with numpyro.plate("outcomes", 2, dim=-1):
            numpyro.sample("y", dist.Normal(z, noise), obs=y)


def of_hidden(optim):
    return BySVI(hidden_modes, optim, HIDDEN), HIDDEN


class BySVI:
    """NumPyro's SVI in the place of an engine, with a guide of its own family, or of a model without latents."""

    def __init__(self, model, optim, y, *, has_latents=True, validation=None):
        self.phase, self.validation = negative_phase(model), validation
        self.guide = AutoNormal(self.phase) if has_latents else lambda y: None
        self.svi = SVI(self.phase, self.guide, optim, Trace_ELBO())
        self.svi.init(jax.random.key(0), y)  # a guide looks at its model once, where nothing is traced

    def init(self, key, y):
        return self.svi.init(key, y)

    def update(self, state, y):
        return self.svi.update(state, y)

    def report(self, state, y, key):
        result = SVIRunResult(self.svi.get_params(state), state, jnp.zeros(0))
        return diagnose(result, self.phase, y, guide=self.guide, rng_key=key, validation=self.validation, warn=False)


def of_groups(optim, loc=0.0, scale=1.0):
    y = loc + scale * OF_GROUPS
    return BySVI(groups, optim, y), y


def of_rows(model, optim, y, others):
    return BySVI(model, optim, y, has_latents=False, validation=others), y


def of_few_moons(optim):
    return of_rows(lambda x: network(x, 32, 2), optim, MOONS[::4], MOONS[1::4])


def report_of(engine, state, y, key):
    if isinstance(engine, BySVI):
        return engine.report(state, y, key)
    return diagnose(state, engine, y, rng_key=key, warn=False)


def of_scores(model, objective):
    return ScoreMatching(model, optax.adam(0.03), objective), FEW


DENOISING, SLICED, IMPLICIT = DenoisingScoreMatching(0.3), SlicedScoreMatching(), {"hypergradient": Implicit()}
VARIATIONAL, WEIGHTED = {"estimate": Variational()}, {"estimate": ImportanceWeighted(10)}
FALLING = optax.cosine_decay_schedule(2e-2, 1000)  # at a constant rate a third of such fits have lost more than .05 nats
SHORT = {"sampler": MALA(0.02, 10, adapt=False, num_jumps=0), "persistent": False}
STANDING = {"sampler": MALA(1e-3, 1, adapt=False, num_jumps=0), "weights": Weighted(num_monitor_chains=256)}
# what is wrong or right: how it is learned, in how many steps, and the words of the numbers of which one must be out of bounds
PROBLEMS = {
    "modes without jumps": (lambda: of_modes(0), 300, ("R-hat", "density")),
    "modes with jumps": (lambda: of_modes(None), 2000, ()),
    "short runs that are too short": (lambda: of_tilt(**SHORT), 300, ("density",)),
    "short runs that are long": (lambda: of_tilt(sampler=MALA(0.5, 20), persistent=False), 300, ()),
    "a fit that has not arrived": (lambda: of_tilt(), 30, ("prior from posterior",)),
    "a guide that stays near its start": (lambda: of_groups(optax.adam(5e-3), 400, 50), 2000, ("guide", "beyond")),
    "a guide that has arrived": (lambda: of_groups(optax.adam(5e-3)), 2000, ()),
    "a guide at a rate that falls": (lambda: of_groups(optax.adam(optax.cosine_decay_schedule(0.02, 2000))), 2000, ()),
    "modes that noise hides, too few steps": (lambda: of_hidden(optax.adam(5e-3)), 400, ("steps of likelihood",)),
    "modes that noise hides, enough steps": (lambda: of_hidden(optax.adam(optax.cosine_decay_schedule(0.05, 2000))), 2000, ()),
    "a network of inputs in large units": (lambda: of_units(0, 1), 2000, ("best prior", "another prior", "prior from", "density")),
    "a network of standardized inputs": (lambda: of_units(400, 50), 2000, ()),
    "a network that learns slowly": (lambda: of_few_moons(optax.adam(1e-3)), 1000, ("likelihood", "from data")),
    "a network that has learned": (lambda: of_few_moons(optax.adam(optax.cosine_decay_schedule(0.03, 3000))), 3000, ()),
    "rows by heart": (lambda: of_rows(wells_at_rows, optax.adam(1e-3), FEW, OTHERS), 200, ("validation rows",)),
    "a bell, and other rows": (lambda: of_rows(bell, optax.adam(0.03), FEW, OTHERS), 400, ()),
    "params that have not arrived": (lambda: of_counts(optax.adam(5e-3)), 100, ("standard errors",)),
    "params at a constant rate": (lambda: of_counts(optax.adam(1e-2)), 600, ()),
    "weights at a large learning rate": (lambda: of_tilt(optax.sgd(0.02), **STANDING), 20, ("weights keep", "monitors")),
    "weights at a small one": (lambda: of_tilt(weights=Weighted(num_monitor_chains=256)), 300, ()),
    "particles, h above the limit of one row": (lambda: of_particles(step_size=0.1), 300, ("curvature",)),
    "particles, h for all rows": (lambda: of_particles(step_size=0.02), 600, ()),
    "adjusted particles": (lambda: of_particles(kernel="mala"), 600, ()),
    "adjusted particles without jumps": (lambda: of_wells(kernel="mala", num_jumps=0), 300, ("particles from posterior",)),
    "unadjusted particles between modes": (lambda: of_wells(step_size=0.01), 300, ("particles from posterior",)),
    "particles with jumps": (lambda: of_wells(kernel="mala"), 300, ()),
    "exact score matching, spikes": (lambda: of_scores(spikes, ExactScoreMatching()), 400, ("half the distance",)),
    "exact score matching, a bell": (lambda: of_scores(bell, ExactScoreMatching()), 400, ()),
    "scores of modes apart, other weights": (lambda: of_modes_apart(0.0), 100, ("density from rows",)),
    "scores of modes apart, weights .15 off": (lambda: of_modes_apart(0.2), 100, ("weights of modes",)),
    "scores of modes apart, their weights": (lambda: of_modes_apart(0.85), 100, ()),
    "denoising with little noise": (lambda: of_moons(0.025), 1500, ("likelihood", "density from rows")),
    "denoising with more noise": (lambda: of_moons(0.3, optax.cosine_decay_schedule(2e-3, 3000)), 3000, ()),
    "a network's modes, denoising": (lambda: of_two_bells(0.3), 2500, ()),
    "BiSM that has not arrived": (lambda: of_factors(BiSM, full, DENOISING, **IMPLICIT), 5, ("objective at the rows",)),
    "BiSM, a guide that is too narrow": (lambda: of_factors(BiSM, narrow, DENOISING, **IMPLICIT), 400, ("Pareto",)),
    "BiSM, the posterior's family": (lambda: of_factors(BiSM, full, DENOISING, **IMPLICIT), 400, ()),
    "BiSM, few unrolled steps": (lambda: of_factors(BiSM, full, SLICED, hypergradient=Unrolled(5)), 600, ("response",)),
    "BiSM, a guide that is too sure of bits": (lambda: of_bits(sure_bits), 3000, ("count",)),
    "BiSM, bits that scores have yet to learn": (lambda: of_bits(bits), 3000, ("likelihood of the rows",)),
    "a mode where there are no rows": (lambda: of_two_places(0.0), 300, ("likelihood of the rows",)),
    "modes where there are rows": (lambda: of_two_places(-8.0), 300, ()),
    "VaGES that has yet to learn": (lambda: of_factors(VaGES, full, DENOISING, **WEIGHTED), 120, ("likelihood", "maximum")),
    "BiDVL, a generator of one mode for two": (lambda: of_generator(wells, MODES), 1500, ("count", "Pareto")),
    "BiDVL, a generator of the energy's family": (lambda: of_generator(hill, 1.5 + 1.1 * NOISE), 1500, ()),
    "VaGES unweighted, a blind guide": (lambda: of_factors(VaGES, blind, SLICED, **VARIATIONAL), 600, ("Pareto", "count")),
    "VaGES unweighted, the posterior's family": (lambda: of_factors(VaGES, full, DENOISING, FALLING, **VARIATIONAL), 1000, ()),
    "VaGES weighted, a blind guide": (lambda: of_factors(VaGES, blind, SLICED, **WEIGHTED), 600, ("Pareto", "count")),
    "VaGES weighted, the posterior's family": (lambda: of_factors(VaGES, full, DENOISING, **WEIGHTED), 600, ()),
}


def trained(engine, num_steps, num_seeds, *args):
    """States after so many steps, stacked."""

    def one(key):
        def step(state, _):
            return engine.update(state, *args)

        return lax.scan(step, engine.init(key, *args), None, num_steps)[0]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), num_seeds))


def told(name, num_seeds, *, max_steps=None):
    """How many reports of a problem say what they should, of how many; and those that do not."""
    make, num_steps, words = PROBLEMS[name]
    engine, y = make()
    states, wrong = trained(engine, min(num_steps, max_steps or num_steps), num_seeds, y), []
    for i in range(num_seeds):
        report = report_of(engine, jax.tree.map(lambda x, i=i: x[i], states), y, jax.random.key(i))
        hits = [finding for finding in report.trouble if any(word in finding.quantity for word in words)]
        if bool(words) != bool(hits) or (not words and not report.is_well):
            wrong.append(report)
    return num_seeds - len(wrong), wrong


def main(args):
    print(f"{'':<44}{'wrong fit':>10}  as it should, of {args.num_seeds}")
    for name, (_, _, words) in PROBLEMS.items():
        if args.only not in name:
            continue
        count, wrong = told(name, args.num_seeds, max_steps=args.max_steps)
        print(f"{name:<44}{'fires' if words else 'silent':>10}  {count}", flush=True)
        if args.show:
            print(*wrong[: args.show], sep="\n\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=100)
    parser.add_argument("--only", default="")
    parser.add_argument("--show", type=int, default=0, help="how many of the reports that fail to print")
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    if args.smoke:
        args.num_seeds, args.max_steps = 2, 2
    _timing.use_one_core()
    main(args)
