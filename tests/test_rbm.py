# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Restricted Boltzmann machines against plain enumeration, quadrature and the same model as a NumPyro program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.handlers import seed, trace
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

from numpyro_ebm import MALA, BaseMeasure, BernoulliRBM, EnergyDistribution, GaussianBernoulliRBM, NormalizerError, check_model

pytestmark = pytest.mark.usefixtures("double_precision")


W = np.array([[1.2, -0.7, 0.4], [-0.5, 0.9, 1.1]])  # two visible, three hidden
B, C, SCALE = np.array([0.3, -0.2]), np.array([-0.4, 0.2, -0.8]), np.array([0.7, 1.3])
V = np.array([[0.0, 0.0], [1.0, -2.0], [-0.3, 0.6], [3.0, 1.5]])
KINDS = ["plain", "scaled", "bernoulli"]


def _rbm(kind, w=W, b=B, c=C, scale=SCALE, **kwargs):
    return BernoulliRBM(w, b, c, **kwargs) if kind == "bernoulli" else GaussianBernoulliRBM(w, b, c, scale, kind, **kwargs)


def _states(num_units):
    return np.array(list(itertools.product((0.0, 1.0), repeat=num_units)))


def _energy(kind, v, h, w=W, b=B, c=C, scale=SCALE):
    """The energy of one pair of layers, term by term."""
    own = {"plain": 1.0, "scaled": 1 / scale**2, "bernoulli": 1.0}[kind] * np.ones(len(v))
    pairs = sum(v[i] * own[i] * w[i, j] * h[j] for i in range(len(v)) for j in range(len(h)))
    visible = -(b * v).sum() if kind == "bernoulli" else sum((v[i] - b[i]) ** 2 / (2 * scale[i] ** 2) for i in range(len(v)))
    return visible - (c * h).sum() - pairs


def _events(kind):
    return _states(2) if kind == "bernoulli" else V


def _large(kind, d, m, seed=0, size=0.5):
    draw = np.random.default_rng(seed).normal
    return _rbm(kind, size * draw(size=(d, m)), draw(size=d), draw(size=m), np.exp(0.3 * draw(size=d)))


# ---- The distribution ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_energy_is_the_formula(kind):
    # Catches a coupling divided by the variance where it must not be, and the other way round.
    for v, h in itertools.product(_events(kind), _states(3)):
        np.testing.assert_allclose(_rbm(kind).joint_energy(v, h), _energy(kind, v, h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_energy_is_a_function_of_params_and_event_as_that_of_every_energy(kind):
    # Catches a machine whose energy is not what its parent's is: TiltedDistribution says energy(params, x), for one event.
    rbm, other = _rbm(kind), _rbm(kind, scale=0.7)
    for v in _events(kind):
        np.testing.assert_allclose(rbm.energy(rbm.params, v), -rbm.log_prob(v), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(rbm.energy(other.params, v), other.free_energy(v), rtol=1e-12, atol=1e-12)
    generic = EnergyDistribution(rbm.energy, rbm.event_shape, params=rbm.params, support=rbm.support)
    np.testing.assert_allclose(generic.log_prob(_events(kind)), rbm.log_prob(_events(kind)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_sums_the_hidden_units_out(kind):
    # Catches a free energy whose softplus has another argument than the energy's terms in h.
    expected = [logsumexp(jnp.array([-_energy(kind, v, h) for h in _states(3)])) for v in _events(kind)]
    np.testing.assert_allclose(_rbm(kind).log_prob(_events(kind)), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(_rbm(kind).free_energy(_events(kind)), -np.array(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_conditionals_are_those_of_the_energy(kind):
    # Catches a mean W h where it is sigma^2 W h, a scale sigma^2 where it is sigma, and weights used transposed.
    rbm, events = _rbm(kind), _events(kind)
    energy = rbm.joint_energy(events[:, None], _states(3))  # (v, h)
    hidden = rbm.hidden_given_visible(events[:, None]).log_prob(_states(3))
    np.testing.assert_allclose(hidden, rbm.free_energy(events)[:, None] - energy, rtol=1e-10, atol=1e-12)
    visible = rbm.visible_given_hidden(_states(3)).log_prob(events[:, None])
    np.testing.assert_allclose(visible - visible[0], energy[0] - energy, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("coupling", ["plain", "scaled"])
def test_score_and_hessian_are_the_closed_forms(coupling):
    # Catches a score of the guard or the base instead of the free energy.
    w = W if coupling == "plain" else W / SCALE[:, None] ** 2
    rbm, p = _rbm(coupling), 1 / (1 + np.exp(-(C + V @ w)))
    np.testing.assert_allclose(rbm.score(V), -(V - B) / SCALE**2 + p @ w.T, rtol=1e-12)
    hessian = -np.diag(1 / SCALE**2) + np.einsum("ij,nj,kj->nik", w, p * (1 - p), w)
    np.testing.assert_allclose(jax.vmap(jax.hessian(rbm.log_prob))(jnp.array(V)), hessian, rtol=1e-10)


def test_couplings_agree_at_unit_scale():
    # Catches "scaled" multiplying where it divides: at another scale the two must differ.
    plain, scaled = (_rbm(kind, scale=1.0) for kind in ("plain", "scaled"))
    np.testing.assert_allclose(plain.log_prob(V), scaled.log_prob(V), rtol=1e-12)
    assert abs(_rbm("plain").log_prob(V[1]) - _rbm("scaled").log_prob(V[1])) > 0.1


def test_discrete_events_have_no_score():
    with pytest.raises(TypeError, match="a score needs real events"):
        _rbm("bernoulli").score(V)


# ---- The normalizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["plain", "scaled"])
def test_log_normalizer_is_the_integral_over_the_visible(coupling):
    # Catches a wrong constant of the Gaussian, and a coupling that the closed form does not follow.
    axis = jnp.linspace(-15, 15, 1501)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1)
    integral = jnp.exp(_rbm(coupling).log_prob(grid)).sum() * (axis[1] - axis[0]) ** 2
    np.testing.assert_allclose(_rbm(coupling).log_normalizer(), jnp.log(integral), rtol=1e-12)


@pytest.mark.parametrize(("d", "m"), [(3, 5), (5, 3), (12, 13), (13, 12)])
def test_binary_log_normalizer_is_the_sum_over_either_layer(d, m):
    # Catches the enumeration of the smaller layer, and of more than 2^10 states in parts, going wrong.
    rbm = _large("bernoulli", d, m)
    np.testing.assert_allclose(rbm.log_normalizer(), logsumexp(rbm.log_prob(_states(d))), rtol=1e-12)


def test_gradient_of_the_exact_log_normalizer_is_the_models_mean():
    # Catches parts of an enumeration that are summed right and differentiated wrong.
    rbm = _large("plain", 2, 12)
    h = _states(12)
    log_weight = h @ rbm.hidden_bias + rbm._log_partition(h @ rbm.weights.T)
    p = jnp.exp(log_weight - logsumexp(log_weight))

    def log_z(c, b):
        return GaussianBernoulliRBM(rbm.weights, b, c, rbm.scale).log_normalizer()

    by_c, by_b = jax.jit(jax.grad(log_z, (0, 1)))(rbm.hidden_bias, rbm.visible_bias)
    np.testing.assert_allclose(by_c, p @ h, rtol=1e-10)
    mean = p @ (rbm.visible_bias + rbm.scale**2 * (h @ rbm.weights.T))
    np.testing.assert_allclose(by_b, (mean - rbm.visible_bias) / rbm.scale**2, rtol=1e-10)


def test_uncoupled_log_normalizer_is_exact():
    # Catches the start of annealed importance sampling being off by a constant, which no error bar shows.
    expected = np.log(SCALE).sum() + np.log(2 * np.pi) + 3 * np.log(2)  # d = 2
    np.testing.assert_allclose(_rbm("plain").uncoupled_log_normalizer(), expected, rtol=1e-14)
    np.testing.assert_allclose(_rbm("plain", 0 * W, B, 0 * C).log_normalizer(), expected, rtol=1e-14)
    expected = np.log1p(np.exp(B)).sum() + 3 * np.log(2)
    np.testing.assert_allclose(_rbm("bernoulli").uncoupled_log_normalizer(), expected, rtol=1e-14)
    np.testing.assert_allclose(_rbm("bernoulli", 0 * W, B, 0 * C).log_normalizer(), expected, rtol=1e-14)


def test_enumeration_of_too_many_units_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"2\^21 states.*method='ais'"):
        GaussianBernoulliRBM(jnp.zeros((2, 21)), jnp.zeros(2), jnp.zeros(21)).log_normalizer()
    with pytest.raises(ValueError, match=r"2\^21 states"):
        BernoulliRBM(jnp.zeros((22, 21)), jnp.zeros(22), jnp.zeros(21)).log_normalizer()
    few_visible = BernoulliRBM(jnp.zeros((2, 21)), jnp.zeros(2), jnp.zeros(21))
    np.testing.assert_allclose(few_visible.log_normalizer(), 23 * np.log(2), rtol=1e-12)


# ---- In a NumPyro program -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_joint_program_has_the_distribution_as_its_marginal(kind):
    # Catches a distribution and a joint energy that share parameters and denote different models.
    rbm, events = _rbm(kind), _events(kind)

    def joint(v):
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", BaseMeasure(constraints.boolean, (3,)))
            v = numpyro.sample("v", BaseMeasure(rbm.base.support.base_constraint, (2,)), obs=v)
            numpyro.factor("coupling", -rbm.joint_energy(v, h))

    def log_joint(h):  # of every row by itself
        terms = trace(numpyro.handlers.substitute(joint, {"h": jnp.broadcast_to(h, (len(events), 3))})).get_trace(events)
        return terms["coupling"]["fn"].log_factor

    by_state = jnp.stack([log_joint(h) for h in _states(3)])
    np.testing.assert_allclose(logsumexp(by_state, axis=0), rbm.log_prob(events), rtol=1e-12)
    whole = log_density(joint, (events,), {}, {"h": jnp.tile(_states(3)[5], (len(events), 1))})[0]
    np.testing.assert_allclose(whole, by_state[5].sum(), rtol=1e-12)  # the base measures add nothing


def _program(v=None):
    w = numpyro.param("w", jnp.array(W))
    with numpyro.plate("data", 4):
        numpyro.sample("v", GaussianBernoulliRBM(w, B, C), obs=v)


def test_plain_svi_refuses_to_learn_and_check_model_says_so():
    # Catches a guard lost on the way: SVI would learn a wrong model silently.
    svi = SVI(_program, lambda v: None, optax.adam(1e-2), Trace_ELBO())
    with pytest.raises(NormalizerError, match="site 'v'"):
        svi.run(jax.random.key(0), 1, V, progress_bar=False)
    assert check_model(_program, V).sites[0].verdict.startswith("unknown normalizer, depends on param 'w'")


@pytest.mark.parametrize("kind", KINDS)
def test_guard_raises_for_parameters_and_not_for_the_free_energy(kind):
    # Catches the guard missing one of the parameters, or standing where no normalizer is needed.
    v = jnp.array(_events(kind)[1])
    parameters = [W, B, C] if kind == "bernoulli" else [W, B, C, SCALE]
    for i in range(len(parameters)):

        def machine(x, i=i):
            return _rbm(kind, *[jnp.asarray(x if k == i else p) for k, p in enumerate(parameters)])

        with pytest.raises(NormalizerError, match="d log Z / d theta"):
            jax.grad(lambda x, machine=machine: machine(x).log_prob(v))(parameters[i])
        assert jnp.isfinite(jax.grad(lambda x, machine=machine: machine(x).free_energy(v))(parameters[i])).all()
    assert jnp.isfinite(jax.grad(_rbm(kind).log_prob)(v)).all()


def test_site_can_be_drawn_in_a_plate():
    value = trace(seed(_program, 0)).get_trace()["v"]["value"]
    assert value.shape == (4, 2)
    assert jnp.isfinite(value).all()


# ---- Shapes, dtypes, pytrees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_machines_is_each_by_itself(kind):
    # Catches batch dimensions of weights and values that are matched from the wrong side.
    ws, bs = np.stack([W, 2 * W, -W]), np.stack([B, -B, 0 * B])
    v = np.random.default_rng(0).integers(0, 2, (5, 3, 2)).astype(float)
    rbm = _rbm(kind, ws, bs)
    one_by_one = [_rbm(kind, w, b) for w, b in zip(ws, bs, strict=True)]
    assert rbm.batch_shape == (3,)
    np.testing.assert_allclose(rbm.log_prob(v), np.stack([m.log_prob(v[:, i]) for i, m in enumerate(one_by_one)], 1), rtol=1e-12)
    np.testing.assert_allclose(rbm.log_normalizer(), [m.log_normalizer() for m in one_by_one], rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(lambda m: m.log_normalizer())(rbm), rbm.log_normalizer(), rtol=1e-12)
    assert rbm.sample(jax.random.key(0), (7,)).shape == (7, 3, 2)


def test_machines_made_under_vmap_are_a_batch():
    # Catches a batch dimension that vmap adds to parameters and that no shape tells of.
    ws = jnp.stack([W, 2 * W, -W])
    rbm = promote_batch_shape(jax.vmap(lambda w: GaussianBernoulliRBM(w, B, C, SCALE))(ws))
    assert rbm.batch_shape == (3,)
    np.testing.assert_allclose(rbm.log_prob(V[:3]), GaussianBernoulliRBM(ws, B, C, SCALE).log_prob(V[:3]), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_distribution_passes_through_jit_as_a_pytree(kind):
    # Catches leaves that come back in another order, and static parts that are not equal to themselves.
    rbm, count = _rbm(kind), 0

    @jax.jit
    def log_prob(rbm, v):
        nonlocal count
        count += 1
        return rbm, rbm.log_prob(v)

    again, first = log_prob(rbm, _events(kind))
    log_prob(_rbm(kind, 2 * W), _events(kind))
    assert count == 1
    np.testing.assert_allclose(first, rbm.log_prob(_events(kind)), rtol=1e-12)
    np.testing.assert_array_equal(again.weights, W)
    np.testing.assert_allclose(again.log_normalizer(), rbm.log_normalizer(), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_parameters_stay_float32_under_x64(kind):
    # Catches float64 that creeps in from NumPyro's draws or from a default dtype.
    rbm = _rbm(kind, *[np.float32(x) for x in (W, B, C, SCALE)])
    v = _events(kind).astype(np.float32 if kind != "bernoulli" else int)
    results = [rbm.log_prob(v), rbm.free_energy(v), rbm.joint_energy(v[0], jnp.zeros(3, int)), rbm.log_normalizer()]
    assert {str(x.dtype) for x in results} == {"float32"}
    assert rbm.hidden_given_visible(v).mean.dtype == jnp.float32
    if kind != "bernoulli":
        assert rbm.score(v).dtype == jnp.float32


def test_free_energy_is_finite_and_linear_where_units_saturate():
    # Catches log(1 + exp(x)) written out, which overflows.
    with jax.enable_x64(False):
        rbm = BernoulliRBM(jnp.array([[1e4, -1e4]]), jnp.zeros(1), jnp.zeros(2))
        v = jnp.array([1.0])
        assert rbm.free_energy(v) == -1e4
        np.testing.assert_array_equal(jax.grad(rbm.free_energy)(v), [-1e4])
        assert jnp.isfinite(jax.hessian(rbm.free_energy)(v)).all()


# ---- Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianBernoulliRBM(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3)), r"weights must have shape .* got \(3,\)"),
        (lambda: GaussianBernoulliRBM(jnp.zeros((0, 3)), jnp.zeros(0), jnp.zeros(3)), r"weights must have shape .* got \(0, 3\)"),
        (lambda: BernoulliRBM(W.T, B, C), r"visible_bias of shape \(2,\) does not fit weights of shape \(3, 2\).* end in \(3,\)"),
        (lambda: BernoulliRBM(W, B, B), r"hidden_bias of shape \(2,\) does not fit"),
        (lambda: GaussianBernoulliRBM(W, B, C, C), r"scale of shape \(3,\) does not fit"),
        (lambda: BernoulliRBM(np.stack([W] * 2), np.stack([B] * 3), C), r"batch shapes .* do not broadcast"),
        (lambda: GaussianBernoulliRBM(W, B, C, 0.0), "scale must be positive, got 0.0"),
        (lambda: GaussianBernoulliRBM(W, B, C, np.array([1.0, -1.0])), "scale must be positive"),
        (lambda: GaussianBernoulliRBM(W, B, C, np.nan), "scale: 1 of 1 values are NaN"),
        (lambda: BernoulliRBM(W, B, np.array([0, np.inf, 0])), "hidden_bias: 1 of 3 values are NaN or infinite"),
        (lambda: GaussianBernoulliRBM(W, B, C, 1.0, "textbook"), "coupling must be one of 'plain', 'scaled', got 'textbook'"),
        (lambda: GaussianBernoulliRBM(W, B, C, initial=dist.Normal(0, 1)), r"initial has event_shape \(\)"),
        (lambda: _rbm("plain").log_prob(jnp.zeros(3)), r"does not end in the event shape \(2,\)"),
        (lambda: _rbm("plain").hidden_given_visible(jnp.zeros((4, 1))), r"does not end in the event shape \(2,\)"),
        (lambda: _rbm("plain").visible_given_hidden(jnp.zeros(2)), r"hidden units of shape \(2,\) do not end in \(3,\)"),
        (lambda: _rbm("plain").joint_energy(jnp.zeros(2), jnp.zeros(4)), r"hidden units of shape \(4,\) do not end in \(3,\)"),
    ],
)
def test_bad_input_is_named_with_the_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_binary_value_outside_the_support_has_no_probability_if_validated():
    rbm = _rbm("bernoulli", validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        log_prob = rbm.log_prob(jnp.array([[0, 2], [0, 1]]))
    np.testing.assert_array_equal(jnp.isfinite(log_prob), [False, True])


def test_sampler_that_needs_scores_is_refused_at_binary_units():
    with pytest.raises(NotImplementedError, match="MALA needs the score"):
        _rbm("bernoulli", sampler=MALA()).sample(jax.random.key(0), (3,))
