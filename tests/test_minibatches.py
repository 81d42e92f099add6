# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Rows of the data by a subsampled plate: one program, with the same plates, under every engine that can learn it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import normal
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebm import (
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ExactScoreMatching,
    GumbelBernoulli,
    KernelSteinDiscrepancy,
    ParticleMMLE,
    RBFKernel,
    ScoreMatching,
    TiltedDistribution,
    UnadjustedLangevin,
    VaGES,
    Variational,
    marginal_score,
    negative_phase,
)

KEY = jax.random.key(3)
STILL, SGD = optax.sgd(0.0), optax.sgd(0.05)
SIZE, BATCH = 12, 4


def rows_of(v, subsample_size):
    """The plate of the rows, and the rows that it shows."""
    plate = numpyro.plate("data", len(v), subsample_size=subsample_size)
    with plate:
        return plate, numpyro.subsample(v, event_dim=0)


# Without latents.


def at_rest(v, x=None, subsample_size=BATCH):
    """The exact objective of a row is (v - x)^2 / 2 - 1."""
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(v), subsample_size=subsample_size) as index:
        rows = numpyro.subsample(v, event_dim=0)
        x = 0.0 if x is None else x[index]
        numpyro.sample("v", dist.Normal(loc + x, 1), obs=rows)


def subsets(losses):
    """Which rows the batches had, told from their losses where the squares of the data are powers of two."""
    sums = np.rint(2 * BATCH * (np.asarray(losses, np.float64) + 1)).astype(int)
    return (sums[:, None] >> np.arange(SIZE)) & 1


def test_a_batch_has_the_rows_that_the_plate_draws():
    """``BATCH`` different ones, each as often as any other. Catches rows drawn twice, the first rows always, the plate's scale."""
    v = jnp.sqrt(2.0 ** jnp.arange(SIZE))
    losses = ScoreMatching(at_rest, STILL, ExactScoreMatching()).run(KEY, 400, v, progress_bar=False).losses
    drawn = subsets(losses)
    np.testing.assert_array_equal(drawn.sum(1), BATCH)
    deviation = np.sqrt(BATCH / SIZE * (1 - BATCH / SIZE) / len(losses))
    np.testing.assert_allclose(drawn.mean(0), BATCH / SIZE, atol=4.5 * deviation)


@pytest.mark.parametrize("subsample_size", [BATCH, None])
def test_other_arguments_are_taken_by_the_same_indices(subsample_size):
    """Each row has a mean of its own, which is the row: the loss is -1 whatever the batch."""
    v = normal(0, SIZE)
    engine = ScoreMatching(at_rest, STILL, ExactScoreMatching())
    losses = engine.run(KEY, 10, v, v, subsample_size=subsample_size, progress_bar=False).losses
    np.testing.assert_array_equal(losses, -1)


def with_rows(v, x):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", 12, subsample_size=4):
        v, x = (numpyro.subsample(rows, event_dim=0) for rows in (v, x))
        numpyro.sample("v", dist.Normal(loc + x, 1), obs=v)


def test_other_arguments_are_rows_of_the_batch_where_the_first_is():
    """Both have all rows, or both have those of the batch. Catches rows of one taken for those that were drawn of the other."""
    engine, v = ScoreMatching(with_rows, STILL, ExactScoreMatching()), normal(0, SIZE)
    for rows in (v, v[:BATCH]):
        np.testing.assert_array_equal(engine.update(engine.init(KEY, rows, rows), rows, rows)[1], -1)
    with pytest.raises(ValueError, match=r"plate\(data, 12, dim=-1\) invalid shape of numpyro.subsample.*\(4,\)"):
        engine.init(KEY, v, v[:BATCH])


@pytest.mark.parametrize("num_rows", [3, BATCH, SIZE, 20])
@pytest.mark.parametrize("size", [SIZE, None])
def test_evaluate_takes_any_number_of_rows(num_rows, size):
    """Those that are given, all of them. Catches a loss of a batch, and a plate whose size must be theirs."""

    def model(v):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", size or len(v), subsample_size=BATCH):
            rows = numpyro.subsample(v, event_dim=0)
            numpyro.sample("v", EnergyDistribution(lambda v: (v - loc) ** 2 / 2), obs=rows)

    engine = ScoreMatching(model, STILL, ExactScoreMatching())
    state, v = engine.init(KEY, normal(0, SIZE)), normal(1, num_rows)
    np.testing.assert_allclose(engine.evaluate(state, v), (v**2).mean() / 2 - 1, rtol=1e-6)
    by_size = ScoreMatching(at_rest, STILL, ExactScoreMatching(), batch_size=BATCH)
    state = by_size.init(KEY, normal(0, SIZE), subsample_size=None)
    np.testing.assert_allclose(by_size.evaluate(state, v, subsample_size=None), (v**2).mean() / 2 - 1, rtol=1e-6)


def test_rows_may_be_given_where_the_plate_says_how_many_there_are():
    """As a loader gives them: the first argument is the batch, the plate has the size of the data."""

    def model(v):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", 1000, subsample_size=len(v)):
            numpyro.sample("v", EnergyDistribution(lambda v: (v - loc) ** 2 / 2), obs=v)

    engine, v = ScoreMatching(model, SGD, ExactScoreMatching()), normal(0, 5)
    state, loss = engine.update(engine.init(KEY, v), v)
    np.testing.assert_allclose(loss, (v**2).mean() / 2 - 1, rtol=1e-6)
    np.testing.assert_allclose(state.params["loc"], 0.05 * v.mean(), rtol=1e-5)


# With latents: rows that are all alike make every batch the same, and the plate's scale is all that could be seen.


def tilted(v, subsample_size=None):
    """h ~ N(loc, 1) as an energy with an unknown normalizer, v ~ N(h, 1): the marginal is N(loc, 2), the maximum the mean."""
    loc = numpyro.param("loc", 0.0)
    plate, rows = rows_of(v, subsample_size)
    with plate:
        energy = TiltedDistribution(dist.Normal(0, 1), lambda h: -loc * h, sampler=UnadjustedLangevin(0.1, 10))
        h = numpyro.sample("h", energy)
        numpyro.sample("v", dist.Normal(h, 1), obs=rows)


def guide(v, subsample_size=None):
    shift = numpyro.param("shift", 0.0)
    plate, rows = rows_of(v, subsample_size)
    with plate:
        numpyro.sample("h", dist.Normal(rows / 2 + shift, jnp.sqrt(0.5)))


def bits(v, subsample_size=None):
    """A mixture of two Gaussians, whose bit says which."""
    weight = numpyro.param("weight", 0.5)
    plate, rows = rows_of(v, subsample_size)
    with plate:
        h = numpyro.sample("h", dist.Bernoulli(0.4))
        numpyro.sample("v", dist.Normal(weight * h, 1), obs=rows)


def guide_of_bits(v, subsample_size=None):
    slope = numpyro.param("slope", 0.3)
    plate, rows = rows_of(v, subsample_size)
    with plate:
        numpyro.sample("h", GumbelBernoulli(slope * rows))


def energy(v, subsample_size=None):
    precision = numpyro.param("precision", 1.0)
    plate, rows = rows_of(v, subsample_size)
    with plate:
        numpyro.sample("v", TiltedDistribution(dist.Normal(0, 1), lambda v: (precision - 1) * v**2 / 2), obs=rows)


def generator(v, subsample_size=None):
    loc = numpyro.param("loc", 0.0)
    plate, rows = rows_of(v, subsample_size)
    with plate:
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(h + loc, 1), obs=rows)


DENOISING = DenoisingScoreMatching(0.3)
ENGINES = {
    "score matching": lambda: ScoreMatching(energy, SGD, DENOISING),
    "bism": lambda: BiSM(tilted, guide, SGD, SGD, DENOISING, num_inner_steps=2),
    "vages": lambda: VaGES(tilted, guide, SGD, SGD, DENOISING, num_inner_steps=2),
    "bism, bits": lambda: BiSM(bits, guide_of_bits, SGD, SGD, DENOISING, num_inner_steps=2),
    "vages, bits": lambda: VaGES(bits, guide_of_bits, SGD, SGD, DENOISING, num_inner_steps=2),
    "bidvl": lambda: BiDVL(energy, guide, generator, SGD, SGD, SGD),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_subsampled_plate_is_a_plate_of_its_rows(name):
    """Catches the plate's scale left in, in a gradient or in the loss of a guide."""
    engine, v = ENGINES[name](), jnp.full((SIZE,), 1.7)
    state = there = engine.init(KEY, v, subsample_size=BATCH)
    here = engine.init(KEY, v[:BATCH])
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
    for _ in range(2):
        there, loss = engine.update(there, v, subsample_size=BATCH)
        here, loss_here = engine.update(here, v[:BATCH])
        np.testing.assert_allclose(loss, loss_here, rtol=2e-5)
    assert any(not jnp.array_equal(there.params[name], state.params[name]) for name in state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), there.params, here.params)


# One program under every engine that can learn it.

DATA = 1.4 + np.sqrt(2) * normal(2, 60)
LEARNERS = {
    "svi": lambda model, optim: SVI(model, guide, optim, Trace_ELBO()),
    "particles": lambda model, optim: ParticleMMLE(model, optim, num_particles=20, step_size=0.1),
    "bism": lambda model, optim: BiSM(tilted, guide, optim, optax.sgd(0.2), ExactScoreMatching()),
    "vages": lambda model, optim: VaGES(
        tilted, guide, optim, optax.sgd(0.2), ExactScoreMatching(), estimate=Variational(num_samples=20)
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_one_program_is_learned_by_every_engine(name):
    """Its maximum is the mean of the data, by likelihood and by scores. Catches a scale that one engine alone leaves in or out."""
    gains = {"svi": 1 / len(DATA), "particles": 1 / len(DATA), "bism": 2, "vages": 2}  # of likelihoods of all rows, of a mean score
    optim = optax.sgd(optax.exponential_decay(0.4 * gains[name], 100, 0.5))
    chains = negative_phase(tilted, num_chains=100)
    engine = LEARNERS[name](chains, optim)
    result = engine.run(KEY, 1000, DATA, subsample_size=20, progress_bar=False)
    np.testing.assert_allclose(result.params["loc"], DATA.mean(), atol=0.055)  # 4.5 standard deviations over keys, .012 at most


@pytest.mark.parametrize("name", ["svi", "score matching"])
def test_one_program_without_latents_is_learned_by_every_engine(name):
    """Its maximum is the precision of the data, by likelihood and by scores."""
    v = normal(4, 60)
    exact = 1 / (v**2).mean()
    if name == "svi":
        optim = optax.sgd(optax.exponential_decay(0.02, 150, 0.5))
        engine = SVI(negative_phase(energy, num_chains=400), lambda *args, **kwargs: None, optim, Trace_ELBO())
    else:
        engine = ScoreMatching(energy, optax.sgd(optax.exponential_decay(0.3, 150, 0.5)), ExactScoreMatching())
    result = engine.run(KEY, 1000, v, subsample_size=20, progress_bar=False)
    np.testing.assert_allclose(result.params["precision"], exact, rtol=0.08)  # 4.5 standard deviations over keys, .018 at most


# What a batch cannot be.


def by_index(v):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(v), subsample_size=2) as index:
        numpyro.sample("v", dist.Normal(loc, 1), obs=v[index])


def scaled_before(v):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(v), subsample_size=2):
        numpyro.sample("v", dist.Normal(loc, 1), obs=numpyro.subsample(v / v.std(), event_dim=0))


def by_index_of_given_rows(v):
    loc = numpyro.param("loc", jnp.zeros(1000))
    with numpyro.plate("data", 1000, subsample_size=len(v)) as index:
        numpyro.sample("v", dist.Normal(loc[index], 1), obs=v)


def of_columns_too(v):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("columns", 3, subsample_size=2, dim=-1), numpyro.plate("data", len(v), subsample_size=2, dim=-2):
        numpyro.sample("v", dist.Normal(loc, 1), obs=numpyro.subsample(v, event_dim=0))


def of_other_size(v):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", 1000, subsample_size=2):
        numpyro.sample("v", dist.Normal(loc, 1), obs=v[:2])


@pytest.mark.parametrize("batch_size", [1, BATCH, SIZE])
@pytest.mark.parametrize("as_keyword", [False, True])
def test_covariates_are_refused_where_rows_are_drawn_without_them(batch_size, as_keyword):
    """As many rows as there are is what no shape can tell: every row was paired with the covariates of another."""
    covariates = {"x": normal(1, SIZE)}
    name, args, kwargs = ("'x'", (), covariates) if as_keyword else ("1", tuple(covariates.values()), {})
    message = rf"argument {name} has 12 rows, as the first argument has, but batch_size={batch_size} draws rows"
    engine = ScoreMatching(at_rest, SGD, ExactScoreMatching(), batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        engine.init(KEY, ROWS, *args, subsample_size=None, **kwargs)
    state = engine.init(KEY, ROWS, subsample_size=None)
    with pytest.raises(ValueError, match=message):
        engine.update(state, ROWS, *args, subsample_size=None, **kwargs)
    whole = ScoreMatching(at_rest, SGD, ExactScoreMatching())  # all of them, in order
    whole.update(whole.init(KEY, ROWS, *args, subsample_size=None, **kwargs), ROWS, *args, subsample_size=None, **kwargs)


@pytest.mark.parametrize("objective", [ExactScoreMatching(), KernelSteinDiscrepancy(RBFKernel(1.0))], ids=["rows", "pairs"])
def test_a_batch_of_all_rows_keeps_them_in_order(objective):
    """A model whose covariates come from a closure has the right number of them: drawn again, rows met those of others."""
    covariates = normal(1, SIZE)

    def regression(v):
        slope = numpyro.param("slope", 0.5)
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(slope * covariates, 1), obs=v)

    def slope_after_a_step(**settings):
        engine = ScoreMatching(regression, SGD, objective, **settings)
        return engine.update(engine.init(KEY, 3 * covariates), 3 * covariates)[0].params["slope"]

    assert slope_after_a_step(batch_size=SIZE) == slope_after_a_step() != 0.5


@pytest.mark.parametrize("pairs", ["all", "halves"])
def test_no_row_is_twice_in_a_batch_whose_rows_are_compared(pairs):
    """The only two distinct rows are compared, at every step. With replacement a row met itself in half of them."""
    objective = KernelSteinDiscrepancy(RBFKernel(1.0), pairs=pairs)
    engine = ScoreMatching(at_rest, STILL, objective, batch_size=2)
    v = jnp.array([0.0, 2.0])
    state = engine.init(KEY, v, subsample_size=None)
    losses = engine.run(KEY, 40, v, init_state=state, subsample_size=None, progress_bar=False).losses
    k = np.exp(-2.0)  # of r^2 = 4 and scores 0 and -2: u = k (s s' + (s - s') r + 1 - r^2)
    np.testing.assert_allclose(losses, k * (0 - 2 * 2 + 1 - 4), rtol=1e-5)


ROWS = normal(0, SIZE)
REFUSED = {
    "by index": (by_index, ROWS, {}, r"site 'v': it uses the first argument in another way .*numpyro.subsample\(v, event_dim"),
    "scaled before": (scaled_before, ROWS, {}, r"site 'v': it uses the first argument in another way"),
    "unknown indices": (by_index_of_given_rows, ROWS, {}, r"site 'v': it depends on the indices of plate 'data'.*the 12 rows"),
    "two plates": (of_columns_too, normal(0, SIZE, 3), {}, r"plates 'columns', 'data' are subsampled"),
    "other size": (of_other_size, ROWS, {}, r"plate 'data' shows 2 of 1000 rows, and the first argument has 12"),
    "batch of a batch": (by_index, ROWS, {"batch_size": 2}, r"plate 'data' is subsampled, and batch_size=2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_would_be_others_are_refused(name):
    model, v, settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ScoreMatching(model, SGD, ExactScoreMatching(), **settings).init(KEY, v)


def test_a_guide_that_shows_other_rows_is_refused():
    def other(v):
        guide(v, subsample_size=2)

    with pytest.raises(ValueError, match="plate 'data' shows 2 of 12 rows in the guide, and all in the model"):
        BiSM(tilted, other, SGD, SGD, DENOISING).init(KEY, ROWS)


def test_an_autoguide_keeps_a_row_for_each_of_the_data():
    """Its params have all rows, of which a batch moves its own. Catches a batch whose indices are not those of the rows."""
    v = jnp.where(jnp.arange(SIZE) < SIZE // 2, -3.0, 3.0)
    autoguide = AutoNormal(lambda v: tilted(v, BATCH))
    engine = BiSM(lambda v: tilted(v, BATCH), autoguide, STILL, optax.sgd(optax.exponential_decay(0.5, 200, 0.5)), DENOISING)
    result = engine.run(KEY, 300, v, progress_bar=False)
    np.testing.assert_allclose(result.params["h_auto_loc"], v / 2, atol=0.45)  # the posterior's mean, at a deviation of .71


def test_a_score_is_of_all_rows_that_are_given():
    """The marginal is N(loc, 2): its score is (loc - v) / 2."""
    v, params = normal(1, 5), {"loc": 0.3, "shift": 0.15}
    settings = {"rng_key": KEY, "variance_reduced": True}
    found = marginal_score(tilted, guide, params, v, subsample_size=2, **settings)
    np.testing.assert_allclose(found, (0.3 - v) / 2, atol=1e-5)
