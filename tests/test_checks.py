# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What settings may be: each rule by itself, and a table of the settings of all that is public."""

import re
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.optim
import optax
import pytest
from numpyro.infer import Trace_ELBO

import numpyro_ebm
from numpyro_ebm import (
    BernoulliRBM,
    BiDVL,
    BiSM,
    BlockGibbs,
    DenoisingScoreMatching,
    EnergyDistribution,
    ExactScoreMatching,
    GaussianBernoulliRBM,
    Implicit,
    ImportanceWeighted,
    IMQKernel,
    KernelSteinDiscrepancy,
    MultiscaleDenoisingScoreMatching,
    ParticleMMLE,
    RBFKernel,
    ScoreMatching,
    SlicedScoreMatching,
    UnadjustedLangevin,
    Unrolled,
    VaGES,
    Variational,
    annealed_langevin,
    annealing_schedule,
    convergence,
    denoise,
    find_map,
    fisher_divergence,
    kinetic_langevin,
    kinetic_langevin_splitting,
    ksd_test,
    langevin,
    log_normalizer,
    marginal_score,
    negative_phase,
    sample_posterior,
)
from numpyro_ebm._checks import (
    require_bool,
    require_count,
    require_fraction,
    require_instance,
    require_negative,
    require_nonnegative,
    require_one_of,
    require_positive,
)
from numpyro_ebm.infer import Averaged, Difference, Hinge, LowerLevel, Maximize, Newton, Softplus
from numpyro_ebm.samplers import MALA, NUTS

INTEGERS = [2, np.int64(2), np.uint8(2), np.array(2), jnp.array(2), jnp.uint8(2)]
REALS = [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), jnp.float32(0.5), jnp.bfloat16(0.5), Fraction(1, 2)]
NO_NUMBERS = [True, False, np.True_, np.array(True), jnp.array(True), "2", b"2", None, [2], np.array([2]), jnp.ones(1), 2j]
NO_NUMBERS += [jax.random.key(0), np.datetime64(2, "s"), int]


def _kinds(values):
    return [f"{type(value).__name__}-{value!r}".replace("\n", "") for value in values]


@pytest.mark.parametrize("value", INTEGERS, ids=_kinds(INTEGERS))
def test_integers_of_any_library_count(value):
    # Catches np.int64(2) refused, or kept as it is: a setting must hash and print like 2 wherever it comes from.
    assert type(require_count("n", value)) is int
    assert require_count("n", value) == require_count("n", value, least=2) == 2
    assert type(require_positive("x", value)) is float
    assert require_positive("x", value) == require_nonnegative("x", value) == 2.0


@pytest.mark.parametrize("value", REALS, ids=_kinds(REALS))
def test_reals_of_any_library_are_numbers_and_no_counts(value):
    # Catches jnp.float32(.1) refused, or kept as an array, which does not hash.
    for require in (require_positive, require_nonnegative, require_fraction):
        assert type(require("x", value)) is float
        assert require("x", value) == 0.5
    with pytest.raises(ValueError, match="n must be a positive integer, got "):
        require_count("n", value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=_kinds(NO_NUMBERS))
@pytest.mark.parametrize("require", [require_count, require_positive, require_nonnegative, require_fraction])
def test_what_is_no_number_is_refused(require, value):
    # Catches True for 1, and "'<=' not supported" where a word is compared with 0.
    with pytest.raises(ValueError, match="^size must be .*, got " + re.escape(repr(value))):
        require("size", value)


RANGES = [
    (require_count, {}, [1, 10**30], [0, -1, 1.0, np.nan], "a positive integer"),
    (require_count, {"least": 0}, [0, 1], [-1, 0.0], "an integer of 0 or more"),
    (require_count, {"least": 2}, [2, 3], [1], "an integer of 2 or more"),
    (require_positive, {}, [1e-300, 1e300], [0, 0.0, -1, np.inf, -np.inf, np.nan], "a positive finite number"),
    (require_nonnegative, {}, [0, 0.0, 1e300], [-1e-9, np.inf, np.nan], "a finite number of 0 or more"),
    (require_negative, {}, [-1, -1e-300], [0, 0.0, 1, -np.inf, np.nan], "a negative finite number"),
    (require_fraction, {}, [1e-9, 0.999], [0, 0.0, 1, 1.0, -0.1, np.nan, np.inf], "a number between 0 and 1"),
    (require_fraction, {"zero": True}, [0, 0.5], [1, -1e-9, np.nan], "a number of at least 0 and less than 1"),
]


@pytest.mark.parametrize(("require", "rule", "good", "bad", "wanted"), RANGES)
def test_ranges_and_their_words(require, rule, good, bad, wanted):
    # Catches a bound on the wrong side, nan or inf let through, and a message without what was found, wanted and why.
    for value in good:
        assert require("size", value, **rule) == value
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"size must be {wanted}, got {value!r}: it counts chains.")):
            require("size", value, why="it counts chains", **rule)
        with pytest.raises(ValueError, match=re.escape(f"size must be {wanted}, got {value!r}.")):
            require("size", value, **rule)


def test_traced_settings_are_refused_in_words():
    # Catches a concretization error from inside a comparison, and the representation of a tracer in a message.
    for require in (require_count, require_positive, require_nonnegative, require_fraction, require_bool):
        with pytest.raises(ValueError, match=r"size must be .*, got a traced value, which cannot be compiled in"):
            jax.jit(lambda x, require=require: require("size", x))(1)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_bools(value):
    # Catches NumPy's bools refused, or kept.
    assert type(require_bool("flag", value)) is bool
    assert require_bool("flag", value) == value


@pytest.mark.parametrize("value", ["no", "yes", "", 0, 1, None, np.array(True), jnp.array(True), [], 1.0])
def test_what_is_no_bool_is_refused(value):
    # Catches 'no' taken for True.
    with pytest.raises(ValueError, match=r"flag must be True or False, got " + re.escape(repr(value))):
        require_bool("flag", value)


def test_choices():
    # Catches a near miss, a substring, and a value whose comparison with a word is an array.
    assert require_one_of("kind", "sum", ("sum", "mean")) == "sum"
    for value in ("su", "Sum", None, 1, ("sum",), ["sum"], np.array(["sum", "mean"])):
        with pytest.raises(ValueError, match=r"kind must be one of 'sum', 'mean', got " + re.escape(repr(value))):
            require_one_of("kind", value, ("sum", "mean"))


def test_classes_are_no_instances():
    # Catches MALA for MALA(): a class has every member that its instances have.
    sampler = MALA()
    assert require_instance("sampler", sampler, ("init", "run"), "a sampler such as MALA()") is sampler
    wanted = r"sampler must be a sampler such as MALA\(\), got the class MALA: pass an instance, MALA\(\.\.\.\)"
    with pytest.raises(TypeError, match=wanted):
        require_instance("sampler", MALA, ("init", "run"), "a sampler such as MALA()")
    with pytest.raises(TypeError, match=r"sampler must be a sampler such as MALA\(\), got 'mala'"):
        require_instance("sampler", "mala", ("init", "run"), "a sampler such as MALA()")


# The table: all that is public and takes settings, as it is called with good ones, and what each of its settings must be.

KEY = jax.random.key(0)
V = np.zeros((4, 2), np.float32)
STEP = optax.sgd(0.1)


def model(v=None):
    """Never run: settings are refused before."""
    raise AssertionError("the model was run")


def _energies(**settings):
    return EnergyDistribution(lambda x: x**2, **settings)


def _rbm(**settings):
    return GaussianBernoulliRBM(jnp.zeros((2, 3)), jnp.zeros(2), jnp.zeros(3), **settings)


def _engine(make, **fixed):
    """An engine of score matching by its settings, all of them by name."""
    return lambda **given: make(**{**fixed, "model": model, "optim": STEP, "objective": ExactScoreMatching(), **given})


def _particles(**given):
    return ParticleMMLE(**{"model": model, "optim": STEP, "num_particles": 2, "step_size": 0.1, **given})


def _levels(**given):
    programs = {"energy": model, "encoder": model, "generator": model}
    return BiDVL(**{**programs, "optim": STEP, "encoder_optim": STEP, "generator_optim": STEP, **given})


def _ais(**given):
    return log_normalizer(BernoulliRBM(jnp.zeros((2, 3)), jnp.zeros(2), jnp.zeros(3)), **{"method": "ais", "rng_key": KEY, **given})


def _run(**given):
    return _particles().run(KEY, **{"num_steps": 1, **given})


def _posterior(**given):
    return sample_posterior(KEY, model, {}, V, **{"num_samples": 1, **given})


def _divergence(**given):
    return fisher_divergence(KEY, None, (V, V, V), None, **{"optim": STEP, "num_steps": 1, **given})


def _noise(**given):
    return MultiscaleDenoisingScoreMatching(**{"sigma0": 0.1, "sigma_begin": 0.1, "sigma_end": 1.0, **given})


COUNT, COUNT_OR_NONE, NATURAL, NATURAL_OR_NONE, TWO = "count", "count or None", "natural", "natural or None", "two"
POSITIVE, NONNEGATIVE, NEGATIVE, OPTIONAL = "positive", "nonnegative", "negative", "positive or None"
STEP_OR_NONE = "positive, or None for a kernel"
FRACTION, FRACTION_OR_ZERO = "fraction", "fraction or zero"
BOOL, OPTIM, SAMPLER, OBJECTIVE, LOSS = "bool", "optim", "sampler", "objective", "loss"
BILEVEL = {"guide_optim": OPTIM, "lower_loss": LOSS, "num_inner_steps": NATURAL}
SCORE = {"optim": OPTIM, "objective": OBJECTIVE, "batch_size": COUNT_OR_NONE}
TABLE = {
    "ScoreMatching": (_engine(ScoreMatching), SCORE),
    "BiSM": (
        _engine(BiSM, guide=model, guide_optim=STEP),
        {
            **SCORE,
            **BILEVEL,
            "hypergradient": "Unrolled(...) or Implicit(...)",
        },
    ),
    "Unrolled": (Unrolled, {"num_steps": NATURAL, "checkpoint": BOOL}),
    "Implicit": (
        Implicit,
        {
            "curvature": "'auto', 'hessian', 'fisher'",
            "num_cg_steps": COUNT,
            "damping": NONNEGATIVE,
            "tol": NONNEGATIVE,
            "num_draws": COUNT_OR_NONE,
        },
    ),
    "VaGES": (
        _engine(VaGES, guide=model, guide_optim=STEP),
        {
            **SCORE,
            **BILEVEL,
            "estimate": "Variational(...) or ImportanceWeighted(...)",
        },
    ),
    "Variational": (
        Variational,
        {
            "num_samples": COUNT,
            "covariance": "'unbiased', 'biased', 'none'",
            "shared_samples": BOOL,
            "variance_reduced": BOOL,
            "relaxed": BOOL,
        },
    ),
    "ImportanceWeighted": (ImportanceWeighted, {"num_samples": COUNT, "jackknife": BOOL}),
    "BiDVL": (
        _levels,
        {
            "optim": OPTIM,
            "encoder_optim": OPTIM,
            "generator_optim": OPTIM,
            "upper": "Difference(...), Softplus(...) or Hinge(...)",
            "lower": "LowerLevel(...)",
            "noise": BOOL,
            "sampler": SAMPLER,
            "batch_size": COUNT_OR_NONE,
        },
    ),
    "Difference": (Difference, {"num_steps": COUNT, "num_unroll_steps": NATURAL}),
    "Softplus": (Softplus, {"num_steps": COUNT}),
    "Hinge": (Hinge, {"num_steps": COUNT}),
    "LowerLevel": (
        LowerLevel,
        {
            "latent": "'exact', 'offset', 'complete'",
            "latent_weight": NONNEGATIVE,
            "vae_weight": NONNEGATIVE,
            "num_steps": COUNT,
        },
    ),
    "BiDVL.sample": (
        lambda **given: _levels().sample(KEY, None, v=V, **{"num_samples": 1, **given}),
        {"num_samples": COUNT},
    ),
    "BiDVL.refine": (lambda **given: _levels().refine(KEY, None, v=V, **given), {"sampler": SAMPLER}),
    "ParticleMMLE": (
        _particles,
        {
            "optim": OPTIM,
            "num_particles": COUNT,
            "step_size": STEP_OR_NONE,
            "drift": "Summed(...) or Averaged(...)",
            "order": "'jacobi', 'gauss_seidel'",
            "noise": "'batch', 'all'",
            "num_moves": COUNT,
            "average_moves": BOOL,
            "dynamics": OPTIM,
        },
    ),
    "Newton": (Newton, {"optim": OPTIM}),
    "Maximize": (Maximize, {"max_steps": COUNT}),
    "Averaged": (Averaged, {"num_data": COUNT_OR_NONE}),
    "ParticleMMLE.replicate": (lambda **given: _particles().replicate(None, **given), {"num_particles": COUNT_OR_NONE}),
    "Engine.run": (_run, {"num_steps": COUNT, "chunk_size": COUNT_OR_NONE, "stable_update": BOOL, "progress_bar": BOOL}),
    "negative_phase": (
        lambda **given: negative_phase(model, **given),
        {"num_chains": COUNT, "persistent": BOOL, "sampler": SAMPLER},
    ),
    "negative_phase of sites": (lambda sampler: negative_phase(model, sampler={"z": sampler}), {"sampler": SAMPLER}),
    "negative_phase.sample_chains": (
        lambda **given: negative_phase(model).sample_chains(KEY, {}, {}, **given),
        {"num_samples": COUNT},
    ),
    "ExactScoreMatching": (ExactScoreMatching, {"noise_scale": NONNEGATIVE, "curvature_penalty": NONNEGATIVE}),
    "SlicedScoreMatching": (
        SlicedScoreMatching,
        {
            "num_projections": COUNT,
            "directions": "'rademacher', 'normal'",
            "variance_reduced": BOOL,
            "noise_scale": NONNEGATIVE,
            "curvature_penalty": NONNEGATIVE,
        },
    ),
    "DenoisingScoreMatching": (DenoisingScoreMatching, {"sigma": POSITIVE}),
    "MultiscaleDenoisingScoreMatching": (
        _noise,
        {"sigma0": POSITIVE, "sigma_begin": POSITIVE, "sigma_end": POSITIVE, "spacing": "'geometric', 'linear'"},
    ),
    "RBFKernel": (RBFKernel, {"bandwidth": OPTIONAL}),
    "IMQKernel": (IMQKernel, {"scale": OPTIONAL, "exponent": NEGATIVE}),
    "KernelSteinDiscrepancy": (KernelSteinDiscrepancy, {"statistic": "'U', 'V'", "pairs": "'all', 'halves'"}),
    "ksd_test": (lambda **given: ksd_test(KEY, V, V, **given), {"num_bootstrap": COUNT, "change_probability": "half"}),
    "langevin": (langevin, {"step_size": POSITIVE}),
    "kinetic_langevin": (
        lambda **given: kinetic_langevin(**{"step_size": 0.1, "friction": 1.0, **given}),
        {"step_size": POSITIVE, "friction": POSITIVE, "inverse_mass": POSITIVE, "noise": BOOL, "lookahead": BOOL},
    ),
    "kinetic_langevin_splitting": (
        lambda **given: kinetic_langevin_splitting(**{"step_size": 0.1, "friction": 1.0, **given}),
        {"step_size": POSITIVE, "friction": POSITIVE},
    ),
    "MALA": (
        MALA,
        {
            "step_size": POSITIVE,
            "num_steps": NATURAL,
            "adapt": BOOL,
            "target_acceptance": FRACTION,
            "small_steps": FRACTION_OR_ZERO,
        },
    ),
    "UnadjustedLangevin": (UnadjustedLangevin, {"step_size": POSITIVE, "num_steps": NATURAL}),
    "BlockGibbs": (BlockGibbs, {"num_steps": NATURAL}),
    "annealed_langevin": (lambda **given: annealed_langevin(KEY, None, V, **given), {"step_size": POSITIVE}),
    "annealing_schedule": (
        annealing_schedule,
        {"num_hot": NATURAL, "num_cooling": NATURAL, "num_freezing": NATURAL, "hottest": POSITIVE},
    ),
    "denoise": (lambda **given: denoise(None, V, **given), {"sigma": POSITIVE}),
    "EnergyDistribution": (_energies, {"sampler": SAMPLER}),
    "GaussianBernoulliRBM": (_rbm, {"coupling": "'plain', 'scaled'", "sampler": SAMPLER}),
    "log_normalizer": (_ais, {"method": "'exact', 'ais'", "num_chains": TWO, "num_temperatures": TWO}),
    "sample_posterior": (_posterior, {"num_samples": COUNT, "num_warmup": NATURAL, "thinning": COUNT, "sampler": SAMPLER}),
    "sample_posterior by NUTS": (lambda **given: _posterior(sampler=NUTS(), **given), {"num_warmup": COUNT}),
    "NUTS": (NUTS, {"target_accept_prob": FRACTION, "max_tree_depth": COUNT, "dense_mass": BOOL}),
    "find_map": (lambda **given: find_map(KEY, model, {}, V, **given), {"num_steps": COUNT, "optim": OPTIM}),
    "marginal_score": (
        lambda **given: marginal_score(model, model, {}, V, rng_key=KEY, **given),
        {"num_samples": COUNT, "importance_weighted": BOOL, "variance_reduced": BOOL, "relaxed": BOOL},
    ),
    "fisher_divergence": (
        _divergence,
        {
            "optim": OPTIM,
            "num_steps": COUNT,
            "batch_size": COUNT_OR_NONE,
            "num_probes": COUNT,
            "num_test_probes": COUNT_OR_NONE,
            "validate_every": COUNT_OR_NONE,
        },
    ),
    "convergence": (
        lambda **given: convergence({"a": np.arange(9.0)}, **{"standard_errors": {"a": 1.0}, "num_particles": 1, **given}),
        {"num_particles": COUNT, "burn_in": NATURAL_OR_NONE},
    ),
}


class _Sampler:
    """Has what a sampler has, and could not be told from one but for being a class."""

    def init(self, position, log_prob=None): ...

    def run(self, rng_key, log_prob, state): ...


NO_COUNT = [-1, 1.5, True, "3"]
NO_NUMBER = [True, "0.1", 1j, np.nan, np.inf, np.ones(2)]
BAD = {
    COUNT: ([0, None, *NO_COUNT], ValueError, "{} must be a positive integer, got {!r}"),
    COUNT_OR_NONE: ([0, *NO_COUNT], ValueError, "{} must be a positive integer, got {!r}"),
    NATURAL: ([None, *NO_COUNT], ValueError, "{} must be an integer of 0 or more, got {!r}"),
    NATURAL_OR_NONE: (NO_COUNT, ValueError, "{} must be an integer of 0 or more, got {!r}"),
    TWO: ([1, None, *NO_COUNT], ValueError, "{} must be an integer of 2 or more, got {!r}"),
    OPTIONAL: ([0, 0.0, -0.1, *NO_NUMBER], ValueError, "{} must be a positive finite number, got {!r}"),
    POSITIVE: ([0, 0.0, -0.1, None, *NO_NUMBER], ValueError, "{} must be a positive finite number, got {!r}"),
    STEP_OR_NONE: ([0, 0.0, -0.1, *NO_NUMBER], ValueError, "{} must be a positive finite number, got {!r}"),
    NONNEGATIVE: ([-0.1, None, *NO_NUMBER], ValueError, "{} must be a finite number of 0 or more, got {!r}"),
    NEGATIVE: ([0.5, 0, None, *NO_NUMBER], ValueError, "{} must be a negative finite number, got {!r}"),
    FRACTION: ([0, 1.0, -0.1, None, *NO_NUMBER], ValueError, "{} must be a number between 0 and 1, got {!r}"),
    FRACTION_OR_ZERO: ([1.0, -0.1, *NO_NUMBER], ValueError, "{} must be a number of at least 0 and less than 1, got {!r}"),
    "half": ([0.0, 1.5, None, *NO_NUMBER], ValueError, "{} must be a number between 0 and 1, got {!r}: at most 0.5"),
    BOOL: (["no", 0, 1, None, np.array(True)], ValueError, "{} must be True or False, got {!r}"),
    SAMPLER: ([_Sampler, "mala", 3], TypeError, "{} must be a sampler such as MALA()"),
    OBJECTIVE: ([ExactScoreMatching, "dsm", None], TypeError, "{} must be a score objective such as DenoisingScoreMatching(0.1)"),
    LOSS: ([Trace_ELBO, "elbo"], TypeError, "{} must be one of NumPyro's ELBOs, such as Trace_ELBO(), or PosteriorFisher()"),
    OPTIM: (["adam", 0.1], TypeError, "{} must be an optax transformation such as optax.adam(1e-3), got {!r}"),
}
CHOICE = (["", "other", None, 1], ValueError, "{} must be one of {}, got {!r}")
FORM = (["other", None, 1], TypeError, "{} must be {}, got {!r}")


def _cases():
    for where, (make, settings) in TABLE.items():
        for name, kind in settings.items():
            values, error, text = BAD.get(kind, FORM if "(...)" in kind else CHOICE)
            for value in values:
                message = text.format(name, kind, value) if kind not in BAD else text.format(name, value)
                yield pytest.param(make, name, value, error, message, id=f"{where}-{name}-{value!r}".replace("\n", ""))


@pytest.mark.parametrize(("make", "name", "value", "error", "message"), list(_cases()))
def test_bad_settings_are_refused_by_name(make, name, value, error, message):
    # Catches a setting that is not checked, or checked under another name or by another rule.
    with pytest.raises(error, match=re.escape(message)):
        make(**{name: value})


OPTIMS = [(make, name) for make, settings in TABLE.values() for name, kind in settings.items() if kind == OPTIM]


@pytest.mark.parametrize(("make", "name"), OPTIMS)
def test_what_makes_an_optimizer_is_none(make, name):
    # Catches optax.adam for optax.adam(1e-3), and Minimize, which SVI alone can use and which would never move a param.
    for value, words in (
        (optax.adam, f"{name} is adam itself, and must be what it makes: pass an instance, such as adam(1e-3)"),
        (numpyro.optim.Adam, f"{name} is Adam itself, and must be what it makes: pass an instance, such as Adam(1e-3)"),
        (numpyro.optim.Minimize(), f"{name} is numpyro.optim.Minimize, which moves params only where it evaluates the loss"),
    ):
        with pytest.raises(TypeError, match=re.escape(words)):
            make(**{name: value})


def test_a_class_is_refused_with_the_fix():
    # Catches a class taken for an instance: its methods fail much later, about an argument too few.
    with pytest.raises(TypeError, match=r"got the class ExactScoreMatching: pass an instance, ExactScoreMatching\(\.\.\.\)"):
        ScoreMatching(model, STEP, ExactScoreMatching)
    with pytest.raises(TypeError, match=r"got the class MALA: pass an instance, MALA\(\.\.\.\)"):
        negative_phase(model, sampler={"z": MALA})


COUNTS = [
    pytest.param(make, name, id=f"{where}-{name}")
    for where, (make, settings) in TABLE.items()
    for name, kind in settings.items()
    if kind in (COUNT, COUNT_OR_NONE, NATURAL) and "." not in where and where[0].isupper()
]


@pytest.mark.parametrize(("make", "name"), COUNTS)
def test_counts_of_numpy_are_kept_as_plain_integers(make, name):
    # Catches a constructor that checks a setting and keeps what it was given.
    kept = getattr(make(**{name: np.int64(2)}), name)
    assert kept == 2
    assert type(kept) is int


@pytest.mark.parametrize("noise", ["no", 0, np.array(True)])
def test_noise_of_a_sample_is_that_of_the_fit_or_a_bool(noise):
    with pytest.raises(ValueError, match=re.escape(f"noise must be True or False, got {noise!r}")):
        _levels().sample(KEY, None, 1, V, noise=noise)


def test_settings_are_checked_nowhere_else():
    # Catches the next check written by hand, with a rule of its own.
    package = Path(numpyro_ebm.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "_checks.py":
            text = path.read_text()
            assert not re.search(r"^import numbers|isinstance\([^()]*\bbool\b", text, re.M), path
