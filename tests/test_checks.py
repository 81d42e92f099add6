# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What settings may be: each rule by itself, and a table of refusals over all public constructors."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm._checks import (
    require_bool,
    require_count,
    require_fraction,
    require_instance,
    require_nonnegative,
    require_one_of,
    require_positive,
)
from numpyro_ebm.samplers import MALA

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
