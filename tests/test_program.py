# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Programs as functions: densities against NumPyro's own, starts, rows of subsampled plates."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import mask, scale, scope, seed, substitute, trace
from numpyro.infer import init_to_median, init_to_sample, init_to_uniform, init_to_value
from numpyro.infer.util import log_density, potential_energy

from numpyro_ebm import EnergyDistribution, ParticleMMLE, TiltedDistribution
from numpyro_ebm.program.rows import all_batches, by_site, full_shape, gather, per_row, scatter, subsampled_indices
from numpyro_ebm.program.run import (
    constrain_params,
    constrained,
    draw_latents,
    log_density_terms,
    run_model,
    total,
    unconstrain_params,
    whole_plates,
)
from numpyro_ebm.program.sites import finite_events

KEY = jax.random.key(3)
ROWS = jnp.array([4, 1, 5])
Y = jnp.array([0.3, -1.0, 2.0, 0.5, 1.5, -0.2])


def _of_every_support():
    sd = numpyro.sample("sd", dist.LogNormal(0, 1))
    numpyro.sample("share", dist.Dirichlet(jnp.array([2.0, 1.0, 3.0])))
    numpyro.sample("factor", dist.LKJCholesky(3, 1.5))
    numpyro.sample("angle", dist.TruncatedNormal(0, sd, low=-1, high=2))
    numpyro.sample("below", dist.Uniform(0, sd))  # its support depends on another latent
    numpyro.sample("ordered", dist.TransformedDistribution(dist.Normal(0, 1).expand([3]), dist.transforms.OrderedTransform()))
    numpyro.sample("cov", dist.Wishart(5.0, jnp.eye(2)))


def _in_plates():
    with numpyro.plate("columns", 2, dim=-1), numpyro.plate("rows", 3, dim=-2):
        x = numpyro.sample("x", dist.Gamma(2, 1))
        numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("y", dist.Normal(x, 1), obs=0.5)


def _scaled():
    with scale(scale=2.5), numpyro.plate("data", 6, subsample_size=3):
        x = numpyro.sample("x", dist.HalfNormal(1))
        numpyro.sample("y", dist.Normal(x, 1), obs=1.0)


def _masked():
    with numpyro.plate("data", 3):
        with mask(mask=jnp.array([True, False, True])):
            x = numpyro.sample("x", dist.HalfNormal(1))
        numpyro.sample("w", dist.HalfNormal(1).mask(jnp.array([True, True, False])))
        numpyro.sample("y", dist.Normal(x, 1), obs=1.0)


def _time_series():
    def step(x, y):
        x = numpyro.sample("x", dist.LogNormal(0.5 * x, 1))
        with numpyro.plate("sensors", 2):
            gain = numpyro.sample("gain", dist.HalfNormal(x))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)
        return x, gain

    scan(step, jnp.zeros(()), Y)


def _inside_a_scope():
    with scope(prefix="a"), numpyro.plate("data", 3):
        numpyro.sample("x", dist.Gamma(2, 1))


def _start(model, key=KEY, strategy=init_to_uniform):
    return jax.jit(lambda key: draw_latents(model, (), {}, key, data={}, init_strategy=strategy))(key)


@pytest.mark.parametrize("model", [_of_every_support, _in_plates, _scaled, _masked, _time_series, _inside_a_scope])
def test_density_and_its_gradient_are_numpyros(model):
    """Catches a log Jacobian that is missing, not summed over its event, or scaled or masked otherwise than its site."""
    latents = _start(model)

    def ours(latents):
        return total(log_density_terms(model, (), {}, KEY, data={}, latents=latents)[0])

    def numpyros(latents):
        return -potential_energy(seed(model, KEY), (), {}, latents)

    (value, gradient), (exact, exact_gradient) = (jax.jit(jax.value_and_grad(f))(latents) for f in (ours, numpyros))
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, exact_gradient)


@pytest.mark.parametrize("model", [_of_every_support, _in_plates, _scaled, _masked, _time_series, _inside_a_scope])
def test_density_without_jacobian_is_that_of_the_values(model):
    latents = _start(model)

    @jax.jit
    def both(latents):
        terms, program = log_density_terms(model, (), {}, KEY, data={}, latents=latents, jacobian=False)
        values = {name: program.sites[name]["value"] for name in latents}
        return total(terms), log_density(seed(model, KEY), (), {}, values)[0]

    np.testing.assert_allclose(*both(latents), rtol=1e-5)


def test_starts_lie_in_the_support_and_come_back_from_it():
    latents = _start(_of_every_support, strategy=init_to_sample)
    assert latents["share"].shape == (2,)  # one fewer than the shares
    assert latents["factor"].shape == (3,)
    assert latents["cov"].shape == (3,)

    @jax.jit
    def inside_and_back(latents):
        program = run_model(_of_every_support, (), {}, KEY, latents=latents)
        assert program.latents["share"].event_dim == program.latents["cov"].event_dim == 1
        sites = [program.sites[name] for name in latents]
        inside = jnp.stack([site["fn"].support(site["value"]).all() for site in sites])
        return inside, {site["name"]: biject_to(site["fn"].support).inv(site["value"]) for site in sites}

    inside, back = inside_and_back(latents)
    assert inside.all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), back, latents)


def test_starts_follow_the_strategy():
    """Catches a strategy that is not asked, or asked for sites inside a scan alone."""
    at = init_to_value(values={"x": jnp.full((3, 2), 2.0)})
    np.testing.assert_allclose(_start(_in_plates, strategy=at)["x"], np.full((3, 2), np.log(2)), rtol=1e-6)
    median = _start(_scaled, strategy=init_to_median(num_samples=1001))["x"]
    np.testing.assert_allclose(np.exp(median), np.full(3, 0.674), rtol=0.15)  # that of a half normal, within 4 standard errors
    assert len(np.unique(_start(_scaled, strategy=init_to_sample)["x"])) == 3
    assert jnp.abs(_start(_time_series, strategy=init_to_uniform(radius=0.01))["x"]).max() < 0.01


def test_energy_sites_start_from_their_initial_or_base():
    """Catches the energy's own sampler being run, and starts outside the plates."""

    def model():
        with numpyro.plate("data", 500):
            numpyro.sample("a", TiltedDistribution(dist.Uniform(3, 4), lambda x: jnp.sin(x)))
            numpyro.sample("b", EnergyDistribution(lambda x: x**2, initial=dist.Uniform(5, 6)))

    latents = _start(model, strategy=init_to_sample)
    values = constrained(model, (), {}, KEY, data={}, latents=latents)
    assert values["a"].shape == values["b"].shape == (500,)
    assert 3 < values["a"].min() < 3.1
    assert 3.9 < values["a"].max() < 4
    assert 5 < values["b"].min() < 5.1
    assert 5.9 < values["b"].max() < 6


def test_runs_on_the_same_key_are_the_same_and_leave_the_data_alone():
    """Catches a mutable site updated in place in what the caller gave."""

    def model():
        state = numpyro.primitives.mutable("count", {"inner": {"n": 0}})
        state["inner"]["n"] = state["inner"]["n"] + 1
        numpyro.deterministic("noise", jax.random.normal(numpyro.prng_key()))
        numpyro.param("p", 1.5)

    given = {"count": {"inner": {"n": 4}}, "p": 2.5}
    a, b = (run_model(model, (), {}, KEY, data=given) for _ in range(2))
    assert a.sites["noise"]["value"] == b.sites["noise"]["value"]
    assert a.mutable_state == b.mutable_state == {"count": {"inner": {"n": 5}}}
    assert given == {"count": {"inner": {"n": 4}}, "p": 2.5}
    assert a.params == {"p": 2.5}


def test_params_go_to_unconstrained_values_and_back():
    def model():
        numpyro.param("sd", 2.0, constraint=constraints.positive)
        numpyro.param("weights", {"a": jnp.ones(2), "b": 1.0})

    program = run_model(model, (), {}, KEY)
    free = unconstrain_params(program.params, program.param_transforms)
    np.testing.assert_allclose(free["sd"], np.log(2), rtol=1e-6)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(free))
    back = constrain_params(free, program.param_transforms)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, program.params)


# Rows.


def _batch(y, size=3):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(y), subsample_size=size) as index:
        z = numpyro.sample("z", dist.Normal(loc, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(z[..., 0] * z[..., 1], 1), obs=y[index])


def _grid(size=(2, 3)):
    """Latents in one, in both, and with an event whose unconstrained shape is another."""
    with numpyro.plate("rows", 4, subsample_size=size[0], dim=-2) as i:
        share = dist.TransformedDistribution(dist.Normal(0, 1).expand([2]).to_event(1), dist.transforms.StickBreakingTransform())
        numpyro.sample("row", share)
        with numpyro.plate("columns", 5, subsample_size=size[1], dim=-1) as j:
            cell = numpyro.sample("cell", dist.HalfNormal(1))
            numpyro.deterministic("at", 10 * i[:, None] + j)
            numpyro.sample("y", dist.Normal(cell, 1), obs=1.0)


def test_program_says_what_is_subsampled_and_how_much_it_stands_for():
    program = run_model(_grid, (), {}, KEY)
    assert set(program.subsampled) == {"rows", "columns"}
    assert program.scale("row") == 2
    assert program.scale("cell") == pytest.approx(2 * 5 / 3)
    assert program.scale("cell") == pytest.approx(program.sites["cell"]["scale"])
    assert not run_model(_grid, ((4, 5),), {}, KEY).subsampled


def test_density_takes_the_rows_of_the_batch_from_a_store_of_all():
    store = {"z": jax.random.normal(KEY, (6, 2))}
    given = {"data": ROWS, "loc": 0.5}
    terms, program = log_density_terms(_batch, (Y,), {}, KEY, data=given, latents=store)
    np.testing.assert_array_equal(program.sites["z"]["value"], store["z"][ROWS])
    z, y = store["z"][ROWS], Y[ROWS]
    by_hand = dist.Normal(0.5, 1).log_prob(z).sum(-1) + dist.Normal(z.prod(-1), 1).log_prob(y)
    np.testing.assert_allclose(total(terms), 2 * by_hand.sum(), rtol=1e-5)
    np.testing.assert_allclose(per_row(terms, program, "data"), by_hand, rtol=1e-5)


def test_per_row_density_of_nested_plates_sums_the_inner_one():
    """Catches the other plate's axis being kept, or the scale of the plate itself being left in."""
    given = {"rows": jnp.array([3, 0]), "columns": jnp.array([4, 2, 0])}
    latents = draw_latents(_grid, (), {}, KEY, data=given, init_strategy=init_to_uniform)
    terms, program = log_density_terms(_grid, (), {}, KEY, data=given, latents=latents)
    found = per_row(terms, program, "rows")
    assert found.shape == (2,)
    np.testing.assert_allclose(found.sum() * 2, total(terms), rtol=1e-5)
    cell = jnp.exp(latents["cell"])
    inner = dist.HalfNormal(1).log_prob(cell) + latents["cell"] + dist.Normal(cell, 1).log_prob(1.0)
    outer = dist.Normal(0, 1).log_prob(latents["row"][:, 0]).sum(-1)
    np.testing.assert_allclose(found, inner.sum(-1) * 5 / 3 + outer, rtol=1e-5)


def test_per_row_density_refuses_a_site_outside_the_plate():
    def model():
        numpyro.sample("shared", dist.Normal(0, 1))
        with numpyro.plate("data", 3):
            numpyro.sample("z", dist.Normal(0, 1))

    latents = _start(model)
    terms, program = log_density_terms(model, (), {}, KEY, data={}, latents=latents)
    with pytest.raises(ValueError, match="site 'shared' stands outside plate 'data'"):
        per_row(terms, program, "data")


def test_whole_plates_show_every_row_once_in_order():
    """Also against indices that a caller substitutes inside the model, as data loaders do."""

    def loaded(rows):
        with substitute(data={"data": rows}):
            plate = numpyro.plate("data", 6, subsample_size=len(rows))
        with plate as index:
            numpyro.deterministic("seen", index)
            numpyro.sample("z", dist.Normal(0, 1))

    for model, args in ((loaded, (ROWS,)), (_batch, (Y,))):
        with whole_plates():
            program = run_model(model, args, {}, KEY)
        np.testing.assert_array_equal(program.plates["data"].indices, np.arange(6))
        assert program.sites["z"]["value"].shape[0] == 6
        assert not program.subsampled
    assert len(run_model(loaded, (ROWS,), {}, KEY).plates["data"].indices) == 3


def test_constrained_values_are_those_of_all_rows():
    latents = {"row": jax.random.normal(KEY, (4, 1, 2)), "cell": jnp.log(jnp.arange(1.0, 21).reshape(4, 5))}
    values = constrained(_grid, (), {}, KEY, data={}, latents=latents)
    np.testing.assert_allclose(values["cell"], np.arange(1.0, 21).reshape(4, 5), rtol=1e-6)
    np.testing.assert_allclose(values["row"], biject_to(constraints.simplex)(latents["row"]), rtol=1e-6)


@pytest.mark.parametrize("num_particles", [(), (7,)])
def test_rows_of_one_and_two_plates_are_gathered_and_put_back(num_particles):
    """Against indexing by hand, with and without an axis of particles in front."""
    given = {"rows": jnp.array([3, 0]), "columns": jnp.array([4, 2, 0])}
    latents = draw_latents(_grid, (), {}, KEY, data=given, init_strategy=init_to_uniform)
    program = run_model(_grid, (), {}, KEY, data=given, latents=latents)
    indices = subsampled_indices(program)
    shapes = {"row": (4, 1, 2), "cell": (4, 5)}
    picks = {"row": np.s_[..., [3, 0], :, :], "cell": (..., *np.ix_([3, 0], [4, 2, 0]))}
    for name, shape in shapes.items():
        assert full_shape((*num_particles, *latents[name].shape), program, name) == (*num_particles, *shape)
        store = np.asarray(jax.random.normal(KEY, (*num_particles, *shape)))
        rows = gather(program, indices, name, jnp.asarray(store))
        np.testing.assert_array_equal(rows, store[picks[name]])
        by_hand = store.copy()
        by_hand[picks[name]] = 2 * by_hand[picks[name]]
        np.testing.assert_array_equal(scatter(program, indices, name, jnp.asarray(store), 2 * rows), by_hand)


def test_batches_show_every_row_also_where_the_size_does_not_divide():
    batches = all_batches(run_model(_grid, (), {}, KEY))
    assert batches["rows"].shape == (4, 2)  # two batches of rows, two of columns
    assert batches["columns"].shape == (4, 3)
    shown = {
        (i, j)
        for rows, columns in zip(batches["rows"], batches["columns"], strict=True)
        for i in rows.tolist()
        for j in columns.tolist()
    }
    assert shown == {(i, j) for i in range(4) for j in range(5)}


def test_functions_by_site_leave_what_belongs_to_no_site():
    """Catches counts of an optimizer's state being gathered as if they were rows."""
    state = {"velocity": {"z": jnp.ones(3)}, "count": 4}
    doubled = by_site(lambda name, x: 2 * x, ["z"], state)
    np.testing.assert_array_equal(doubled["velocity"]["z"], 2 * np.ones(3))
    assert doubled["count"] == 4


def test_indices_of_all_rows_must_be_in_order():
    """A whole plate is not gathered: other indices would pair rows of the data with particles of others."""

    def rows(index):
        return run_model(_batch, (Y, len(index)), {}, KEY, data={"data": jnp.asarray(index)}).plates["data"].is_row.all()

    assert rows(range(6))
    assert not rows([1, 0, 2, 3, 4, 5])
    assert rows([5, 0])
    assert not rows([6, 0])
    assert not rows([-1, 0])


def test_finite_events_are_counted_by_event_and_mask():
    def model(y):
        numpyro.sample("y", dist.Normal(0, 1).expand([2, 2]).to_event(1).mask(jnp.array([True, False])), obs=y)

    def events(y):
        return finite_events(run_model(model, (jnp.asarray(y),), {}, KEY).sites["y"]).tolist()

    assert events([[0.0, np.nan], [1.0, 2.0]]) == [False, True]
    assert events([[0.0, 1.0], [np.inf, np.nan]]) == [True, True]


def test_scanned_site_in_a_plate_outside_the_program_keeps_its_axes():
    """A plate inside a scan is not seen from outside: it scales nothing and is not gathered."""
    program = run_model(_time_series, (), {}, KEY)
    assert program.latents["gain"].plates == ()
    assert program.scale("gain") == 1
    with trace() as sites, seed(rng_seed=KEY):
        _time_series()
    assert sites["gain"]["value"].shape == (6, 2)


def test_plate_subsampled_inside_a_scan_is_refused():
    """Its rows are not seen from outside: particles would stay with the place in the batch instead of the row."""

    def model():
        def step(x, y):
            with numpyro.plate("sensors", 4, subsample_size=2):
                gain = numpyro.sample("gain", dist.Normal(x, 1))
            return gain.sum(), None

        scan(step, jnp.zeros(()), Y)

    with pytest.raises(ValueError, match="site 'gain': plate 'sensors' is subsampled inside"):
        run_model(model, (), {}, KEY, latents=_start(model))


@pytest.mark.parametrize("first", ["param", "plate"])
def test_a_param_and_a_plate_of_one_name_are_told_apart_or_refused(first):
    # catches a param that a plate of its name hides, which is then not learned
    def model(y):
        if first == "param":
            numpyro.param("g", 0.0)
        with numpyro.plate("g", len(y)):
            loc = numpyro.param("g" if first == "plate" else "loc", 0.0)
            x = numpyro.sample("x", dist.Normal(loc, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    with pytest.raises(ValueError, match=r"site 'g': the model has both a \w+ and a \w+ of this name.*different names"):
        ParticleMMLE(model, optax.sgd(0.1), num_particles=2, step_size=0.1).init(jax.random.key(0), jnp.ones(3))
