# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The Fisher divergence of a guide from the posterior, against the closed form of a linear-Gaussian model and of an RBM."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import block, substitute
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal

from numpyro_ebm import (
    BaseMeasure,
    EnergyDistribution,
    GumbelBernoulli,
    NormalizerError,
    PosteriorFisher,
    TiltedDistribution,
)

KEY = jax.random.key(11)
FISHER = PosteriorFisher()
D, M, ROWS = 3, 2, 4
PRECISION = np.array(
    [
        [2.0, 0.3, -0.4, 0.5, 0.2],
        [0.3, 1.5, 0.1, -0.3, 0.6],
        [-0.4, 0.1, 1.8, 0.4, 0.1],
        [0.5, -0.3, 0.4, 1.4, -0.5],
        [0.2, 0.6, 0.1, -0.5, 1.1],
    ]
)
P_HV, P_HH = PRECISION[D:, :D], PRECISION[D:, D:]


pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture
def v():
    return jax.random.normal(KEY, (ROWS, D))


def field(v):
    """The energy-based latent variable model exp(-[v; h]^T P [v; h] / 2): a factor over flat measures."""
    precision = numpyro.param("precision", jnp.asarray(PRECISION))
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.real, (M,)))
        numpyro.sample("v", BaseMeasure(constraints.real, (D,)), obs=v)
        both = jnp.concatenate([v, h], -1)
        numpyro.factor("coupling", -jnp.einsum("ni,ij,nj->n", both, precision, both) / 2)


def guide(v):
    A = numpyro.param("A", jnp.zeros((M, D)))
    root = numpyro.param("root", jnp.eye(M))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.MultivariateNormal(v @ A.T, scale_tril=root))


def some_guide_params():
    return {"A": jnp.array([[0.1, -0.5, 0.3], [0.4, 0.2, -0.1]]), "root": jnp.array([[0.8, 0.0], [0.3, 1.2]])}


def posterior_params():
    return {"A": jnp.asarray(-np.linalg.inv(P_HH) @ P_HV), "root": jnp.linalg.cholesky(jnp.linalg.inv(P_HH))}


def closed_form(params, v):
    """tr[(P_hh - S^-1) S (P_hh - S^-1)] / 2 + |P_hh (m - m*)|^2 / 2 for q = N(m, S)."""
    S = params["root"] @ params["root"].T
    gap = P_HH - jnp.linalg.inv(S)
    shift = v @ params["A"].T @ P_HH + v @ P_HV.T
    return jnp.trace(gap @ S @ gap) / 2 + (shift**2).sum(1) / 2


def drawn_at(loss, noise):
    """A loss with the guide's standard normals put in: the draw itself is what is random."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape=(), dtype=float: jnp.broadcast_to(noise, shape))
        return loss()


def expected(params, v):
    """The expectation over the guide's noise, by Gauss-Hermite: the integrand is quadratic in it."""
    x, w = np.polynomial.hermite_e.hermegauss(3)
    nodes = jnp.array(list(itertools.product(x, repeat=M)))
    weights = np.prod(list(itertools.product(w, repeat=M)), 1) / w.sum() ** M
    losses = jax.vmap(lambda noise: drawn_at(lambda: FISHER.losses(KEY, params, field, guide, v), noise))(nodes)
    return weights @ losses


def test_expected_loss_is_the_closed_form_in_a_linear_gaussian_model(v):
    # Catches a lost half, rows that are mixed, and a score of log p alone.
    params = some_guide_params()
    np.testing.assert_allclose(expected(params, v), closed_form(params, v), rtol=1e-10)


def test_expected_gradient_is_the_closed_form(v):
    # Catches a draw or a log q that is detached from the guide's parameters: either changes the gradient in A and root.
    got = jax.grad(lambda params: expected(params, v).sum())(some_guide_params())
    want = jax.grad(lambda params: closed_form(params, v).sum())(some_guide_params())
    jax.tree.map(lambda got, want: np.testing.assert_allclose(jnp.tril(got), jnp.tril(want), rtol=1e-8), got, want)


def test_both_ways_to_the_guides_parameters_matter(v):
    # Catches a test of the gradient that could not see a path go: each path alone is far from the whole.
    params = some_guide_params()

    def at(of_draw, of_density):
        h = v @ of_draw["A"].T + jax.random.normal(KEY, (ROWS, M)) @ of_draw["root"].T

        def log_ratio(h):
            both = jnp.concatenate([v, h], -1)
            log_q = dist.MultivariateNormal(v @ of_density["A"].T, scale_tril=of_density["root"]).log_prob(h)
            return -jnp.einsum("ni,ij,nj->", both, PRECISION, both) / 2 - log_q.sum()

        return (jax.grad(log_ratio)(h) ** 2).sum() / 2

    through_h, through_q = jax.grad(at, (0, 1))(params, params)
    for path in (through_h, through_q):
        assert jnp.abs(path["A"]).max() > 0.3
    with pytest.MonkeyPatch.context() as patch:  # the draw by the same noise
        noise = jax.random.normal(KEY, (ROWS, M))
        patch.setattr(jax.random, "normal", lambda key, shape=(), dtype=float: noise)
        got = jax.grad(lambda params: FISHER.loss(KEY, params, field, guide, v))(params)
    np.testing.assert_allclose(got["A"], through_h["A"] + through_q["A"], rtol=1e-10)


def test_loss_is_zero_at_the_posterior(v):
    # Catches a constant that is added, and a draw that is not the one log q is taken at.
    np.testing.assert_allclose(FISHER.losses(KEY, posterior_params(), field, guide, v), 0, atol=1e-20)


def test_loss_is_differentiable_in_the_models_parameters_through_the_guides_gradient(v):
    # Catches a model that is detached: unrolled steps of the guide need d/d theta of d/d phi, here against finite differences.
    def slope(eps):
        precision = jnp.asarray(PRECISION).at[D, 0].add(eps).at[0, D].add(eps)
        params = {"precision": precision}
        return jax.grad(lambda A: FISHER.loss(KEY, {**params, **some_guide_params(), "A": A}, field, guide, v))(
            some_guide_params()["A"]
        )

    step = 1e-4  # the slope is a polynomial of degree 2 in eps
    np.testing.assert_allclose(jax.jacfwd(slope)(0.0), (slope(step) - slope(-step)) / (2 * step), rtol=1e-6)
    assert jnp.abs(jax.jacrev(slope)(0.0)).max() > 0.1


W, B, C = np.array([[0.8, -0.5, 0.3], [-0.2, 0.6, 1.1]]), np.array([0.1, -0.2]), np.array([0.4, 0.0, -0.6])


def rbm(v):
    """A Gaussian RBM with 2 visible and 3 hidden units, jointly."""
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", BaseMeasure(constraints.boolean, (3,)))
        numpyro.sample("v", BaseMeasure(constraints.real, (2,)), obs=v)
        numpyro.factor("coupling", -((v - B) ** 2).sum(-1) / 2 + jnp.einsum("ni,ij,nj->n", v, W, h) + h @ C)


def rbm_guide(v):
    A = numpyro.param("A", jnp.asarray(W))
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", GumbelBernoulli(v @ A + C).to_event(1))


def rbm_with_a_prior(v):
    """The same with the hidden biases in Bernoullis."""
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.BernoulliLogits(C).to_event(1))
        numpyro.sample("v", BaseMeasure(constraints.real, (2,)), obs=v)
        numpyro.factor("coupling", -((v - B) ** 2).sum(-1) / 2 + jnp.einsum("ni,ij,nj->n", v, W, h))


@pytest.mark.parametrize("model", [rbm, rbm_with_a_prior])
def test_loss_of_the_exact_posterior_of_an_rbm_is_zero_at_every_soft_draw(model):
    # Catches the Concrete density in the guide, whose score in h is not the logits; bits of the model that are refused; and
    # NumPyro's validation, which puts -inf where a bit has a soft value and so loses its gradient, silently under jit.
    v = jax.random.normal(KEY, (5, 2))
    losses = jax.jit(lambda key, params: FISHER.losses(key, params, model, rbm_guide, v))
    for key in jax.random.split(KEY, 3):
        np.testing.assert_allclose(losses(key, {}), 0, atol=1e-25)
    off = jnp.asarray(W).at[0, 1].add(0.5)  # the logit's error is v_0 / 2, whatever the draw
    np.testing.assert_allclose(losses(KEY, {"A": off}), v[:, 0] ** 2 / 8, rtol=1e-10)


def two_latents(v, size=None):
    """A chain of two latents, one a matrix, rows on axis -2, and a plate inside the row plate for the visible."""
    with numpyro.plate("data", 6, subsample_size=size, dim=-2):
        batch = numpyro.subsample(v[:, None, :], event_dim=1)
        a = numpyro.sample("a", dist.Normal(0, 1).expand([2, 2]).to_event(2))
        b = numpyro.sample("b", dist.HalfNormal(1.0 + a[..., 0, 1] ** 2))
        with numpyro.plate("pixels", 3, dim=-1):
            numpyro.sample("v", dist.Normal(b + a[..., 0, 0], 1), obs=batch[..., 0, :])


def chain_guide(v, size=None):
    scale = numpyro.param("scale", 0.7, constraint=constraints.positive)
    with numpyro.plate("data", 6, subsample_size=size, dim=-2):
        a = numpyro.sample("a", dist.Normal(0.3, scale).expand([2, 2]).to_event(2))
        numpyro.sample("b", dist.LogNormal(a[..., 1, 1], scale))


def chain_losses(v, drawn):
    """The same by hand, row by row."""

    def log_ratio(a, b, v):
        log_p = dist.Normal(0, 1).log_prob(a).sum() + dist.HalfNormal(1 + a[0, 1] ** 2).log_prob(b)
        log_p += dist.Normal(b + a[0, 0], 1).log_prob(v).sum()
        return log_p - dist.Normal(0.3, 0.7).log_prob(a).sum() - dist.LogNormal(a[1, 1], 0.7).log_prob(b)

    a, b = drawn["a"].reshape(-1, 2, 2), drawn["b"].reshape(-1)
    of_a, of_b = jax.vmap(jax.grad(log_ratio, (0, 1)))(a, b, v)
    return (of_a**2).sum((1, 2)) / 2 + of_b**2 / 2


def draw_of(guide, *args):
    """What the guide draws inside the loss."""
    with numpyro.handlers.trace() as sites, numpyro.handlers.seed(rng_seed=jax.random.split(KEY)[1]):
        guide(*args)
    return {name: sites[name]["value"] for name in ("a", "b", "data")}


@pytest.mark.parametrize("size", [None, 4])
def test_rows_of_chained_latents_are_those_by_hand(size):
    # Catches a wrong row axis, a latent whose own log q is left out, log q(b | a) held fixed in a, rows of model and guide that
    # differ under subsampling, and the scale of subsampling left in.
    v = jax.random.normal(KEY, (6, 3))
    drawn = draw_of(chain_guide, v, size)
    got = jax.jit(lambda key: FISHER.losses(key, {}, two_latents, chain_guide, v, size=size))(KEY)
    assert got.shape == (size or 6,)
    np.testing.assert_allclose(got, chain_losses(v[drawn["data"]], drawn), rtol=1e-10)


def test_one_loss_is_the_sum_over_rows(v):
    # Catches a mean in place of the sum, and another draw.
    params = some_guide_params()
    losses = FISHER.losses(KEY, params, field, guide, v)
    np.testing.assert_allclose(FISHER.loss(KEY, params, field, guide, v), losses.sum(), rtol=1e-12)
    assert PosteriorFisher() == FISHER
    assert hash(FISHER) == hash(PosteriorFisher())


def frozen(v):
    return block(substitute(field, data={"precision": jnp.asarray(PRECISION)}), hide=["precision"])(v)


def test_svi_learns_the_posterior(v):
    # Catches an interface that SVI cannot use, and a gradient that does not lead to the posterior.
    svi = SVI(frozen, guide, optax.adam(optax.cosine_decay_schedule(0.05, 1500)), PosteriorFisher())
    result = svi.run(KEY, 1500, v, progress_bar=False)
    root, want = result.params["root"], posterior_params()
    np.testing.assert_allclose(v @ result.params["A"].T, v @ want["A"].T, atol=1e-3)
    np.testing.assert_allclose(jnp.tril(root) @ jnp.tril(root).T, want["root"] @ want["root"].T, atol=1e-3)
    assert result.losses[-1] < 1e-5


def test_svi_must_not_move_the_models_parameters(v):
    # Catches parameters that run to where the posterior suits the guide: the loss says nothing of the data.
    svi = SVI(field, guide, optax.adam(0.01), FISHER)
    with pytest.raises(ValueError, match="param site 'precision' of the model: SVI would move it"):
        svi.update(svi.init(KEY, v), v)


def test_autonormal_works(v):
    # Catches a guide whose plates are made by itself.
    auto = AutoNormal(lambda v: prior(v), init_loc_fn=numpyro.infer.init_to_value(values={"h": jnp.zeros(ROWS)}))
    svi = SVI(prior, auto, optax.adam(optax.cosine_decay_schedule(0.05, 3000)), PosteriorFisher())
    result = svi.run(KEY, 3000, v[:, 0], progress_bar=False)
    np.testing.assert_allclose(result.params["h_auto_loc"], v[:, 0] / 2, atol=1e-3)
    np.testing.assert_allclose(result.params["h_auto_scale"], np.sqrt(0.5), atol=1e-3)


def prior(v):
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(h, 1), obs=v)


def prior_guide(v):
    loc = numpyro.param("loc", 0.3)
    with numpyro.plate("data", len(v)):
        numpyro.sample("h", dist.Normal(loc, 1))


def test_mutable_state_is_handed_on(v):
    # Catches a running mean that SVI keeps for a guide and that this loss drops.
    def counting(v):
        count = numpyro.primitives.mutable("count", {"n": jnp.zeros((), int)})
        count["n"] = count["n"] + 1
        prior_guide(v)

    svi = SVI(prior, counting, optax.adam(0.01), FISHER)
    state = svi.init(KEY, v[:, 0])
    for _ in range(3):
        state, _ = svi.update(state, v[:, 0])
    assert state.mutable_state["count"]["n"] == 1 + 3


def test_the_guard_of_an_energy_does_not_trip_and_its_gradient_is_right(v):
    # Catches a guard that refuses a gradient which needs no normalizer: in h, in the guide's parameters, and in the model's.
    def tilted(v):
        theta = numpyro.param("theta", 0.7)
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", TiltedDistribution(dist.Normal(0, 1), lambda h: theta * h**4))
            numpyro.sample("v", dist.Normal(h, 1), obs=v)

    def by_hand(theta, loc):
        h = loc + jax.random.normal(KEY, (ROWS,))
        return ((-2 * h - 4 * theta * h**3 + v[:, 0] + (h - loc)) ** 2).sum() / 2

    noise = jax.random.normal(KEY, (ROWS,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape=(), dtype=float: jnp.broadcast_to(noise, shape))
        loss = lambda theta, loc: FISHER.loss(KEY, {"theta": theta, "loc": loc}, tilted, prior_guide, v[:, 0])  # noqa: E731
        got = loss(0.7, 0.3), jax.grad(loss, (0, 1))(0.7, 0.3)
        mixed = jax.grad(jax.grad(loss, 1), 0)(0.7, 0.3)
        want = by_hand(0.7, 0.3), jax.grad(by_hand, (0, 1))(0.7, 0.3)
        want_mixed = jax.grad(jax.grad(by_hand, 1), 0)(0.7, 0.3)
    np.testing.assert_allclose(jnp.stack([got[0], *got[1], mixed]), jnp.stack([want[0], *want[1], want_mixed]), rtol=1e-10)


def test_an_energy_whose_parameters_depend_on_a_latent_is_refused(v):
    # Catches a lifted guard: log Z of this energy has a gradient in h, which would be dropped silently.
    def doubly(v):
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", dist.Normal(0, 1))
            numpyro.sample("v", EnergyDistribution(lambda h, v: (v - h) ** 2 * jnp.exp(h), params=h, batch_shape=(len(v),)), obs=v)

    with pytest.raises(NormalizerError, match="site 'v'"):
        FISHER.loss(KEY, {}, doubly, prior_guide, v[:, 0])


def _in_plate(sample):
    def program(v):
        with numpyro.plate("data", len(v)):
            sample(v)

    return program


def _no_plate(v):
    numpyro.sample("h", dist.Normal(0, 1).expand([len(v)]))


def _global_too(v):
    numpyro.sample("g", dist.Normal(0, 1))
    prior_guide(v)


@pytest.mark.parametrize(
    ("model", "guide", "text"),
    [
        (prior, lambda v: None, "the guide samples no latent"),
        (
            prior,
            _in_plate(lambda v: numpyro.sample("h", dist.BernoulliLogits(0.0))),
            "site 'h': BernoulliLogits is discrete.*GumbelBernoulli",
        ),
        (
            prior,
            _in_plate(lambda v: numpyro.sample("h", EnergyDistribution(lambda h: h**2, initial=dist.Normal(0, 1)))),
            "site 'h'",
        ),
        (prior, _in_plate(lambda v: numpyro.sample("h", _no_gradient())), "site 'h': samples of NoGradient have no gradient"),
        (prior, _in_plate(lambda v: numpyro.sample("h", dist.Delta(v))), "site 'h': Delta has no density"),
        (
            prior,
            _in_plate(lambda v: [numpyro.sample(name, dist.Normal(0, 1)) for name in "hz"]),
            r"site 'z': the guide samples it and the model, .*\['h'\]",
        ),
        (_global_too, prior_guide, r"site 'g': the model samples it and the guide, which samples \['h'\], does not"),
        (prior, _global_too, "site 'g' stands in no plate"),
        (prior, _no_plate, "site 'h' stands in no plate"),
        (
            prior,
            _in_plate(lambda v: numpyro.sample("h", dist.Normal(0, 1).expand([2]).to_event(1))),
            r"site 'h': the guide gives shape \(4, 2\), the model needs \(4,\)",
        ),
        (_no_plate, prior_guide, "site 'h': it does not lie in plate 'data' in the model"),
        (
            _in_plate(lambda v: numpyro.sample("h", dist.Dirichlet(jnp.ones(3)))),
            _in_plate(lambda v: numpyro.sample("h", dist.Dirichlet(jnp.ones(3)))),
            r"site 'h': values of shape \(3,\) .* fewer free coordinates, \(2,\)",
        ),
    ],
)
def test_bad_programs_are_refused(v, model, guide, text):
    # Catches a silent zero gradient, a broadcast latent, and a loss that is not by row.
    with pytest.raises((ValueError, NotImplementedError), match=text):
        FISHER.losses(KEY, {}, model, guide, v[:, 0])


def test_rows_are_those_of_the_outermost_plate(v):
    # Catches latents in an inner plate, as in a model that the engines learn, refused or taken for rows of their own.
    def inner(v, scale):
        with numpyro.plate("data", len(v), dim=-2), numpyro.plate("units", 3, dim=-1):
            numpyro.sample("h", dist.Normal(v, scale))

    def as_event(v, scale):
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", dist.Normal(v, scale).expand((len(v), 3)).to_event(1))

    v = v[:, :1]
    of_plates, of_events = (
        FISHER.losses(KEY, {}, lambda v, of=of: of(v, 1.0), lambda v, of=of: of(v, 0.5), v) for of in (inner, as_event)
    )
    assert of_plates.shape == (len(v),)
    np.testing.assert_allclose(of_plates, of_events, rtol=1e-5)


def _no_gradient():
    class NoGradient(dist.Normal):
        reparametrized_params = []

    return NoGradient(0.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (AutoDiagonalNormal, "site '_auto_latent': .*AutoNormal"),
        (AutoDelta, "site 'h': Delta has no density"),
    ],
)
def test_autoguides_without_a_density_of_the_latents_are_refused(v, kind, text):
    # Catches an auxiliary draw of all latents at once, whose Deltas give a loss that means nothing.
    auto = kind(prior)
    svi = SVI(prior, auto, optax.adam(0.01), FISHER)
    with pytest.raises(ValueError, match=text):
        svi.update(svi.init(KEY, v[:, 0]), v[:, 0])
