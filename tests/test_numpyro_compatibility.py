# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Every construct of NumPyro with every engine: right, or refused with the reason, as docs/guide/numpyro_compatibility.md says.

The energy prior exp(tilt z) N(z; 0, 1) is N(tilt, 1), so that each model has a twin whose prior is normalized. A cell is right if a
step of the two gives the same parameters. The chains of the energy stand where their mean is that of the prior: no noise is left.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.distributions import constraints
from numpyro.handlers import block, condition, do, infer_config, lift, mask, reparam, scale, scope, seed, substitute
from numpyro.infer import (
    AIES,
    ESS,
    HMC,
    MCMC,
    NUTS,
    SA,
    SVI,
    BarkerMH,
    DiscreteHMCGibbs,
    MixedHMC,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
    init_to_value,
    log_likelihood,
)
from numpyro.infer.reparam import ExplicitReparam, LocScaleReparam, NeuTraReparam, TransformReparam
from numpyro.infer.util import log_density

from numpyro_ebm import (
    MALA,
    BiDVL,
    BiSM,
    DenoisingScoreMatching,
    EnergyDistribution,
    ImportanceWeighted,
    NormalizerError,
    ParticleMMLE,
    ScoreMatching,
    TiltedDistribution,
    Unrolled,
    VaGES,
    Variational,
    check_model,
    negative_phase,
)

KEY = jax.random.key(3)
Y = jnp.array([0.3, -1.2, 2.1])
Z = jnp.array([0.4, -0.1, 0.7])
MASK = jnp.array([True, False, True])
SGD = optax.sgd(0.1)
CHAINS = jnp.array([-1.5, -0.5, 1.5, 2.5])  # their mean is the tilt
TILT = 0.5
AFFINE = dist.transforms.AffineTransform(1.0, 2.0)


FEW = MALA(num_steps=1)


def tilted(tilt, sampler=FEW):
    return TiltedDistribution(dist.Normal(0, 1), lambda tilt, z: -tilt * z, params=tilt, sampler=sampler)


def twin(tilt):
    return dist.Normal(tilt, 1)


# ---- Programs, of a prior or of its twin --------------------------------------------------------------------------------


def latent(prior):
    def model(y=Y):
        tilt = numpyro.param("tilt", TILT)
        sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(Y)):
            z = numpyro.sample("z", prior(tilt))
            numpyro.sample("y", dist.Normal(z, sd), obs=y)

    return model


def visible(prior):
    """The same without latents: the energy is that of the data."""

    def model(y=Y):
        tilt = numpyro.param("tilt", TILT)
        with numpyro.plate("data", len(Y)):
            numpyro.sample("y", prior(tilt), obs=y)

    return model


def transformed(prior):
    def model(y=Y):
        tilt = numpyro.param("tilt", TILT)
        with numpyro.plate("data", len(Y)):
            z = numpyro.sample("z", dist.TransformedDistribution(prior(tilt), AFFINE))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    return model


def before_scan(prior):
    def model(y=Y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)
            return x, None

        scan(step, numpyro.sample("z", prior(numpyro.param("tilt", TILT))), y)

    return model


def inside_scan(prior):
    def model(y=Y):
        tilt = numpyro.param("tilt", TILT)

        def step(carry, y):
            x = numpyro.sample("x", prior(tilt))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)
            return carry, None

        scan(step, 0.0, y)

    return model


def before_cond(prior):
    def model(y=Y):
        def near(z):
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

        def far(z):
            numpyro.sample("y", dist.Normal(z, 2), obs=y)

        cond(y[0] > 0, near, far, numpyro.sample("z", prior(numpyro.param("tilt", TILT))))

    return model


SLOPE = lambda slope, z: -slope * z  # noqa: E731  the branches of a cond must share it


def inside_cond(prior):
    prior = (
        (lambda tilt: TiltedDistribution(dist.Normal(0, 1), SLOPE, params=tilt, sampler=MALA(num_steps=1)))
        if prior is tilted
        else prior
    )

    def model(y=Y):
        tilt = numpyro.param("tilt", TILT)

        def branch(sign):
            return lambda _: numpyro.sample("z", prior(sign * tilt)) + numpyro.sample("y", dist.Normal(0, 1), obs=y[0])

        cond(y[0] > 0, branch(1), branch(-1), None)

    return model


SUMMED = {"enumerate": "parallel"}


def enumerated(prior, how=SUMMED):
    def model(y=Y):
        tilt = numpyro.param("tilt", TILT)
        with numpyro.plate("data", len(Y)):
            z = numpyro.sample("z", prior(tilt))
            k = numpyro.sample("k", dist.Bernoulli(0.3), infer=dict(how))
            numpyro.sample("y", dist.Normal(z + k, 1), obs=y)

    return model


def summed_out(prior):
    def model(y=Y):
        tilt = numpyro.param("tilt", TILT)
        weight = numpyro.param("weight", 0.3, constraint=constraints.unit_interval)
        with numpyro.plate("data", len(Y)):
            z = numpyro.sample("z", prior(tilt))
            mixture = dist.MixtureSameFamily(
                dist.Categorical(jnp.stack([1 - weight, weight])), dist.Normal(z[:, None] + jnp.arange(2), 1)
            )
            numpyro.sample("y", mixture, obs=y)

    return model


def subsampled(prior):
    def model(y=Y):
        tilt = numpyro.param("tilt", TILT)
        with numpyro.plate("data", len(Y), subsample_size=2):
            batch = numpyro.subsample(y, event_dim=0)
            z = numpyro.sample("z", prior(tilt))
            numpyro.sample("y", dist.Normal(z, 1), obs=batch)

    return model


def given(name="z"):
    """A guide of one latent."""

    def guide(y=Y):
        slope, width = numpyro.param("slope", 0.5), numpyro.param("width", 0.7, constraint=constraints.positive)
        with numpyro.plate("data", len(Y)):
            numpyro.sample(name, dist.Normal(slope * y, width))

    return guide


def no_latents(*args):
    """The guide of a model without latents."""


def encoder(y):
    with numpyro.plate("data", len(Y)):
        numpyro.sample("h", dist.Normal(numpyro.param("slope", 0.5) * y, 1))


def generator(y):
    with numpyro.plate("data", len(Y)):
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(numpyro.param("weight", 0.5) * h, 1), obs=y)


# ---- One step of every engine -------------------------------------------------------------------------------------------

ENGINES = ("SVI", "ParticleMMLE", "ScoreMatching", "BiSM", "VaGES", "BiDVL")
NOISE = DenoisingScoreMatching(0.3)


class Row(NamedTuple):
    """A construct, and what each engine makes of it: ``right``, ``refused: `` with words of the message, or nothing."""

    group: str
    name: str
    #: by engine, in the order of ENGINES; what is missing does not apply
    cells: tuple[str, ...]
    around: Callable[[Any], Any] = lambda model: model
    build: Callable[[Any], Any] = latent
    #: of a model
    guide: Callable[[Any], Any] = lambda model: given()
    loss: Any = None
    #: the loss of the twin, where that of the row would use its known density
    loss_of_twin: Any = None
    #: of VaGES
    estimate: Any = ImportanceWeighted()
    #: the energy site, and where latents start
    site: str = "z"
    start: dict[str, Any] = {"z": Z, "z_base": Z, "a/z": Z}
    #: where the construct stands: inside of negative_phase, outside, or either
    places: tuple[str, ...] = ("inside", "outside")
    #: engines whose cell takes seconds
    slow: tuple[str, ...] = ()
    #: whether it runs op by op, which NumPyro's control flow cannot
    eager: bool = True


def with_phase(row, model, place):
    def phase(model):
        return negative_phase(model, num_chains=4, sampler=MALA(num_steps=0), init_chains={row.site: CHAINS})

    return phase(row.around(model)) if place == "inside" else row.around(phase(model))


def learn(engine, row, prior, place):
    """What one step makes of the parameters."""
    model = (visible if engine in ("ScoreMatching", "BiDVL") else row.build)(prior)
    needs_phase = engine in ("SVI", "ParticleMMLE") and prior is tilted
    model = with_phase(row, model, place) if needs_phase else row.around(model)
    loss = row.loss if prior is tilted or row.loss_of_twin is None else row.loss_of_twin

    def start(site):  # the values are of the sites of all rows, and init_to_value's own are refused for those that this has not
        return init_to_value(site, values=row.start)

    guide = row.guide(model) if engine in ("SVI", "BiSM", "VaGES") else None
    guide = given() if guide is no_latents and engine != "SVI" else guide
    made = {
        "SVI": lambda: SVI(model, guide, SGD, loss or Trace_ELBO()),
        "ParticleMMLE": lambda: ParticleMMLE(model, SGD, num_particles=2, step_size=0.1, init_strategy=start),
        "ScoreMatching": lambda: ScoreMatching(model, SGD, NOISE),
        "BiSM": lambda: BiSM(model, guide, SGD, SGD, NOISE, loss, num_inner_steps=1, hypergradient=Unrolled(1)),
        "VaGES": lambda: VaGES(model, guide, SGD, SGD, NOISE, loss, num_inner_steps=1, estimate=row.estimate),
        "BiDVL": lambda: BiDVL(model, encoder, generator, SGD, SGD, SGD),
    }[engine]()
    state, _ = made.update(made.init(KEY, Y), Y)
    return made.get_params(state)


def auto(name, start=None, **settings):
    return lambda model: getattr(autoguide, name)(model, init_loc_fn=init_to_value(values=start or START), **settings)


def listed(model):
    guides = autoguide.AutoGuideList(model)
    guides.append(auto("AutoNormal")(model))
    return guides


def semi(model):
    """Of its local model the guide needs scores alone, which have no normalizer."""
    inside = model.fn if isinstance(model, negative_phase) else model
    return autoguide.AutoSemiDAIS(model, inside)


START = {"z": Z, "z_base": Z, "a/z": Z, "x": Z, "y": Y}
R, NO = "right", ""
NO_STATE = "refused: keeps no mutable state"
NO_LATENT = "refused: the model has no latent"
UNOBSERVED = "refused: no site observes it"
NOT_A_GUIDE = "refused: the guide"
SCALAR = {"z": jnp.array(0.2), "x": Z}


def row(group, name, *cells, **settings):
    return Row(group, name, cells, **settings)


def objective(name, loss, *cells, **settings):
    return row("objectives", name, cells[0], NO, NO, *cells[1:], NO, loss=loss, **settings)


def guides(name, *cells, guide=None, **settings):
    if name in JOINT:
        settings["estimate"] = Variational()  # the default is refused: see below
    return row("guides", name, cells[0], NO, NO, *cells[1:], NO, guide=guide or auto(name), **settings)


JOINT = (
    *("AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "AutoLaplaceApproximation"),
    *("AutoBatchedMultivariateNormal", "AutoBatchedLowRankMultivariateNormal", "AutoBNAFNormal", "AutoIAFNormal", "AutoDAIS"),
)


def handler(name, *cells, **settings):
    return row("handlers", name, *cells, **settings)


def flow(name, *cells, **settings):
    return row("control flow", name, *cells, **settings)


ROWS = [
    objective("Trace_ELBO", Trace_ELBO(), R, R, R),
    objective("TraceMeanField_ELBO", TraceMeanField_ELBO(), R, R, R, loss_of_twin=Trace_ELBO()),
    objective("TraceGraph_ELBO", TraceGraph_ELBO(), NO_STATE, R, R, slow=("BiSM", "VaGES")),
    objective("RenyiELBO", RenyiELBO(), NO_STATE, R, R),
    objective("TraceEnum_ELBO", TraceEnum_ELBO(), NO_STATE, "refused: lower_loss", "refused: lower_loss"),
    objective("num_particles above 1", Trace_ELBO(num_particles=2), "refused: drops mutable state", R, R),
    objective(
        "multi_sample_guide",
        Trace_ELBO(multi_sample_guide=True),
        "refused: keeps no mutable state of the model",
        "refused: lower_loss",
        "refused: lower_loss",
    ),
    guides("AutoNormal", R, R, R),
    guides("AutoDelta", R, R, R),
    guides("AutoDiagonalNormal", R, R, R, slow=("BiSM", "VaGES")),
    guides("AutoMultivariateNormal", R, R, R, slow=("BiSM", "VaGES")),
    guides("AutoLowRankMultivariateNormal", R, R, R, slow=("BiSM", "VaGES")),
    guides("AutoLaplaceApproximation", R, R, R, slow=("BiSM", "VaGES")),
    guides("AutoBatchedMultivariateNormal", R, R, R, guide=auto("AutoBatchedMultivariateNormal", batch_ndim=0), slow=ENGINES),
    guides(
        "AutoBatchedLowRankMultivariateNormal",
        R,
        R,
        R,
        guide=auto("AutoBatchedLowRankMultivariateNormal", batch_ndim=0),
        slow=ENGINES,
    ),
    guides("AutoBNAFNormal", R, "refused: does not have an analytic inverse", R, slow=ENGINES),
    guides("AutoIAFNormal", R, R, R, slow=ENGINES),
    guides("AutoDAIS", R, R, R, slow=ENGINES),
    guides(
        "AutoSemiDAIS",
        R,
        *["refused: uses the first argument in another way"] * 2,
        guide=semi,
        build=subsampled,
        places=("inside",),
        slow=ENGINES,
    ),
    guides("AutoGuideList", R, R, R, guide=listed, slow=("BiSM", "VaGES")),
    handler("scale", R, R, *["refused: scale multiplies its log density by 0.5"] * 4, around=lambda model: scale(model, scale=0.5)),
    handler("mask", R, R, R, R, R, R, around=lambda model: mask(model, mask=MASK)),
    handler(
        "condition on the latent",
        R,
        NO_LATENT,
        NO,
        NO_LATENT,
        NO_LATENT,
        around=lambda model: condition(model, data={"z": Z}),
        guide=lambda model: no_latents,
    ),
    handler(
        "condition on the data",
        R,
        R,
        UNOBSERVED,
        UNOBSERVED,
        UNOBSERVED,
        "refused: observes something else",
        around=lambda model: condition(model, data={"y": 1 + Y}),
    ),
    handler(
        "substitute a latent",
        R,
        R,
        NO,
        R,
        R,
        around=lambda model: substitute(model, data={"z": Z}),
        guide=lambda model: given(),
    ),
    handler("substitute the energy's param", R, NO, NO, NO, NO, around=lambda model: substitute(model, data={"tilt": TILT})),
    handler("block the energy's param", R, R, NO, R, R, around=lambda model: block(model, hide=["tilt"])),
    handler(
        "block the energy site",
        "refused: samples of an energy have no gradient",
        NO_LATENT,
        NO,
        NO_LATENT,
        NO_LATENT,
        around=lambda model: block(model, hide=["z"]),
        guide=lambda model: no_latents,
        places=("outside",),
    ),
    handler(
        "block the normalizer",
        "refused: this gradient needs d log Z",
        "refused: hides one of",
        NO,
        NO,
        NO,
        around=lambda model: block(model, expose=["z", "y", "tilt", "sd", "data"]),
    ),
    handler(
        "lift the energy's param", *["refused: depends on latent site 'tilt'"] * 2, around=lambda m: lift(m, {"tilt": twin(0.0)})
    ),
    handler("do", R, R, NO, R, R, around=lambda model: do(model, data={"z": Z})),
    handler(
        "scope",
        R,
        R,
        R,
        R,
        R,
        "refused: the generator must observe it",
        around=lambda model: scope(model, prefix="a"),
        guide=lambda model: scope(given(), prefix="a"),
        site="a/z",
        places=("inside",),
    ),
    handler("infer_config", R, R, R, R, R, R, around=lambda model: infer_config(model, config_fn=lambda site: {"note": 1})),
    handler("seed", R, *["refused: is wrapped in numpyro.handlers.seed"] * 5, around=lambda model: seed(model, rng_seed=1)),
    handler(
        "reparam: LocScaleReparam",
        *["refused: no attribute 'loc'"] * 2,
        NO,
        *["refused: no attribute 'loc'"] * 2,
        around=lambda model: reparam(model, config={"z": LocScaleReparam(0)}),
    ),
    handler(
        "reparam: TransformReparam, ExplicitReparam",
        R,
        R,
        NO,
        R,
        R,
        around=lambda model: reparam(model, config={"z": TransformReparam()}),
        build=transformed,
        guide=lambda model: given("z_base"),
        site="z_base",
        places=("inside",),
    ),
    handler(
        "reparam outside of negative_phase",
        *["refused: reparam stands outside"] * 2,
        around=lambda model: reparam(model, config={"z": ExplicitReparam(AFFINE)}),
        places=("outside",),
    ),
    flow(
        "energy before scan",
        R,
        R,
        NO,
        *["refused: belongs to all rows at once"] * 2,
        build=before_scan,
        guide=auto("AutoNormal", SCALAR),
        start=SCALAR,
        eager=False,
    ),
    flow("energy inside scan", *["refused: inside scan or cond"] * 2, build=inside_scan, guide=auto("AutoNormal"), eager=False),
    flow(
        "energy before cond",
        R,
        R,
        NO,
        *["refused: its batch shape is ()"] * 2,
        build=before_cond,
        guide=auto("AutoNormal", SCALAR),
        start=SCALAR,
        eager=False,
    ),
    flow(
        "energy inside cond",
        *["refused: inside scan or cond"] * 2,
        build=inside_cond,
        guide=auto("AutoNormal", SCALAR),
        start=SCALAR,
        eager=False,
    ),
    flow(
        "discrete latent, enumerated",
        NO_STATE,
        "refused: is discrete and has no score",
        NO,
        *["refused: lower_loss"] * 2,
        build=enumerated,
        loss=TraceEnum_ELBO(),
    ),
    flow("discrete latent, summed out", R, R, NO, R, R, build=summed_out),
    flow("subsampled plate", R, R, NO, R, R, build=subsampled, guide=lambda model: subsampled_guide, start={"z": Z[:2]}),
]


def subsampled_guide(y=Y):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", len(Y), subsample_size=2):
        numpyro.sample("z", dist.Normal(slope * numpyro.subsample(y, event_dim=0), 0.7))


def _cells():
    for row in ROWS:
        for engine, expected in zip(ENGINES, row.cells, strict=False):
            if expected:
                marks = [pytest.mark.slow] if engine in row.slow else []
                yield pytest.param(row, engine, expected, marks=marks, id=f"{row.name}-{engine}")


@pytest.mark.parametrize(("row", "engine", "expected"), [*_cells()])
def test_a_construct_is_right_or_refused_with_the_reason(row, engine, expected):
    # op by op, what is compiled for one cell is there for all
    with jax.disable_jit(row.eager and engine not in row.slow):
        for place in row.places if engine in ("SVI", "ParticleMMLE") else row.places[:1]:
            if expected == "right":
                found, exact = learn(engine, row, tilted, place), learn(engine, row, twin, place)
                assert found.keys() == exact.keys()
                jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, exact)
            else:
                with pytest.raises(Exception, match=re.escape(expected.removeprefix("refused: "))):
                    learn(engine, row, tilted, place)


# ---- NumPyro's own tools, with a learned energy that is frozen ----------------------------------------------------------


def frozen(prior, discrete=False):
    """The learned prior on other data, its param given: the normalizer is a number."""
    return substitute(enumerated(prior, {}) if discrete else latent(prior), data={"tilt": TILT, "sd": 0.5})


def of_latent(discrete=False):
    """An energy of the data whose rate is a latent: doubly intractable."""

    def model(y=Y):
        numpyro.sample("x", dist.Normal(0, 1))
        rate = (
            jnp.array([0.5, 1.5])[numpyro.sample("k", dist.Bernoulli(0.5))]
            if discrete
            else numpyro.sample("k", dist.Exponential(1.0))
        )
        numpyro.sample("y", EnergyDistribution(lambda v: rate * v**2 / 2, initial=dist.Normal(0, 1)), obs=y[0])

    return model


def walk(kernel, num_chains, model):
    mcmc = MCMC(kernel(model), num_warmup=3, num_samples=3, num_chains=num_chains, chain_method="vectorized", progress_bar=False)
    mcmc.run(KEY)
    return mcmc.get_samples()


#: a kernel, its chains, whether it moves discrete latents, and what it says of an energy that depends on a latent
KERNELS = {
    "NUTS": (NUTS, 1, False, "this gradient needs d log Z"),
    "HMC": (HMC, 1, False, "this gradient needs d log Z"),
    "BarkerMH": (BarkerMH, 1, False, "this gradient needs d log Z"),
    "SA": (SA, 1, False, "SA compares densities"),
    "AIES": (AIES, 8, False, "AIES compares densities"),
    "ESS": (ESS, 8, False, "ESS compares densities"),
    "DiscreteHMCGibbs": (lambda model: DiscreteHMCGibbs(NUTS(model)), 1, True, "DiscreteHMCGibbs compares densities"),
    "MixedHMC": (lambda model: MixedHMC(HMC(model)), 1, True, "MixedHMC compares densities"),
}


@pytest.mark.parametrize("name", [name if name == "NUTS" else pytest.param(name, marks=pytest.mark.slow) for name in KERNELS])
def test_kernels_walk_with_a_frozen_energy_as_with_the_normalized_prior(name):
    # guards against: a guard, or a constant, that changes what MCMC does
    kernel, num_chains, discrete, _ = KERNELS[name]
    found, exact = (walk(kernel, num_chains, frozen(prior, discrete)) for prior in (tilted, twin))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), found, exact)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_refuse_an_energy_that_depends_on_a_latent(name):
    # guards against: a guard that sees gradients alone (SA, AIES and ESS gave a rate of .03 for .6, the Gibbs kernels .50 for .63)
    kernel, num_chains, discrete, message = KERNELS[name]
    with pytest.raises(NormalizerError, match=f"site 'y': {message}"):
        walk(kernel, num_chains, of_latent(discrete))


def test_mcmc_on_the_negative_phase_is_refused():
    with pytest.raises(ValueError, match="site 'z': negative_phase learns parameters by gradient"):
        walk(NUTS, 1, negative_phase(latent(tilted)))


def test_enumeration_over_what_an_energy_depends_on_is_told_by_check_model():
    # numpyro sums such weights without a gradient: no guard can see it
    report = check_model(of_latent(discrete=True), Y)
    assert "latent site 'k' (doubly intractable)" in str(report)


def test_neutra_moves_a_frozen_posterior_as_that_of_the_normalized_prior():
    # guards against: an energy inside the factor of a reparametrized site that MCMC cannot move by
    def slope(prior):
        guide = autoguide.AutoDiagonalNormal(frozen(prior), init_loc_fn=init_to_value(values=START))
        seed(guide, 0)()
        moved = NeuTraReparam(guide, {"auto_loc": Z, "auto_scale": jnp.ones(3)}).reparam(frozen(prior))
        return jax.grad(lambda x: log_density(seed(moved, 0), (), {}, {"auto_shared_latent": x})[0])(Z)

    np.testing.assert_allclose(slope(tilted), slope(twin), rtol=1e-5)


def predict(prior, wrap=lambda model: model, samples=None, **settings):
    return Predictive(wrap(latent(prior)), samples, params={"tilt": jnp.array(TILT), "sd": jnp.array(0.5)}, **settings)(KEY, None)


def test_predictive_samples_a_learned_prior_by_its_sampler():
    # guards against: draws of the base, whose mean is 0
    drawn = predict(lambda tilt: tilted(tilt, sampler=None), num_samples=400)
    assert drawn["z"].shape == drawn["y"].shape == (400, 3)
    np.testing.assert_allclose(drawn["z"].mean(), TILT, atol=4 / np.sqrt(1200))
    np.testing.assert_allclose((drawn["y"] - drawn["z"]).std(), 0.5, atol=4 * 0.5 / np.sqrt(2400))


def test_predictive_takes_posterior_samples_and_sites_and_draws_what_is_missing():
    samples = {"z": jnp.arange(15.0).reshape(5, 3)}
    drawn = predict(tilted, samples=samples)
    assert drawn.keys() == {"y"}
    np.testing.assert_allclose(drawn["y"], predict(twin, samples=samples)["y"])
    assert predict(tilted, num_samples=2, return_sites=["z"]).keys() == {"z"}


def test_predictive_of_the_wrapped_model_has_the_same_samples_and_an_empty_site():
    samples = {"z": jnp.arange(15.0).reshape(5, 3)}
    drawn = predict(tilted, lambda model: negative_phase(model, num_chains=4, sampler=MALA(num_steps=0)), samples)
    assert drawn["z/log_normalizer"].size == 0
    assert drawn["y"].shape == (5, 3)


def test_log_likelihood_of_an_energy_of_the_data_lacks_log_z():
    # what log_prob leaves out is left out there: comparisons of models need log_normalizer
    found, exact = (
        log_likelihood(substitute(visible(prior), data={"tilt": TILT}), {"any": jnp.zeros(1)}, Y)["y"] for prior in (tilted, twin)
    )
    np.testing.assert_allclose(found - exact, TILT**2 / 2, rtol=1e-4)


# ---- The page -----------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "numpyro_compatibility.md"


def test_the_page_shows_this_table():
    # guards against: a page that goes stale
    if not PAGE.parents[1].exists():
        pytest.skip("the package is installed without its source tree")
    shown, kernels = _tables(PAGE.read_text(encoding="utf-8"))
    wanted = {
        (row.name, engine): cell.split(":")[0] for row in ROWS for engine, cell in zip(ENGINES, row.cells, strict=False) if cell
    }
    assert shown == wanted
    assert kernels == {(kernel, cell) for kernel in KERNELS for cell in ("right", "refused")}


def _tables(text):
    """``{(construct, engine): cell}`` of the tables of engines, cells that do not arise left out, and the table of kernels."""
    shown, kernels = {}, set()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.replace("`", "").splitlines()]
        for name, *cells in rows:
            if header[0] == "kernel":
                kernels |= {(name, cell) for cell in cells}
            else:
                engines = [(engine, cell) for some, cell in zip(header[1:], cells, strict=True) for engine in some.split(", ")]
                shown |= {(name, engine): cell for engine, cell in engines if cell != "—"}
    return shown, kernels


@pytest.mark.parametrize("name", ["AutoDiagonalNormal", "AutoIAFNormal", "AutoDAIS"])
def test_weights_refuse_guides_that_draw_all_rows_together(name):
    engine = VaGES(latent(tilted), auto(name)(latent(tilted)), SGD, SGD, NOISE, num_inner_steps=1)
    with pytest.raises(ValueError, match=r"weights are one for each row: write a guide .* or take estimate=Variational\(\)"):
        engine.update(engine.init(KEY, Y), Y)
