# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The Python blocks of the README and of the documentation's pages run as pasted, and come to what the text says."""

import re
import runpy
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]


def blocks(page):
    """The page's Python blocks, each moved down to its own lines, so that a traceback points into the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        compile("\n" * text[: match.start(1)].count("\n") + match[1], str(ROOT / page), "exec")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def run(page):
    namespace = {"__name__": page}
    for block in blocks(page):
        exec(block, namespace)
    return namespace


@pytest.fixture(scope="module")
def readme():
    namespaces = [{"__name__": f"README_{i}"} for i in range(3)]
    for block, namespace in zip(blocks("README.md"), namespaces, strict=True):
        with redirect_stdout(StringIO()) as printed:
            exec(block, namespace)  # each block stands alone: a reader may paste any
        namespace["printed"] = printed.getvalue().strip()
    return namespaces


def test_readme_prints_what_it_says(readme):
    # Catches numbers that sit on an edge of rounding: they differ between versions of Python and JAX.
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [block["printed"] for block in readme] == re.findall(r"It prints `([^`]*)`", text)


def test_readme_learns_the_maximum_likelihood_precision(readme):
    # Fisher information per datum is 1 / (2 p^2); 1000 chains leave p noisy by at most p sqrt(2 / 1000)
    found, x = readme[1]["precision"], readme[1]["x"]
    exact = 1 / (x**2).mean()
    assert abs(found - exact) < 4 * exact * jnp.sqrt(2 / 1000)


def test_readme_quickstart_finds_both_modes_of_the_latent(readme):
    # a standard normal prior would have mean |z| 0.80 and 38 % of its draws within 0.5 of 0
    chains, latent = readme[0]["chains"], readme[0]["latent"]
    assert chains.shape == (1000,)
    assert abs(jnp.abs(chains).mean() - jnp.abs(latent).mean()) < 0.1
    assert (jnp.abs(chains) < 0.5).mean() < 0.05
    # the learned density, by quadrature: without jumps its modes have weights from .38 to .62, and chains do not show it
    energy = eqx.combine(readme[0]["result"].params["energy$params"], readme[0]["network"])
    z = jnp.linspace(-6, 6, 2001)
    density = jax.nn.softmax(-(z**2) / 2 - jax.vmap(energy)(z))
    for right in (density[z > 0].sum(), (chains > 0).mean()):
        assert abs(right - (latent > 0).mean()) < 0.05


def test_readme_engine_learns_the_exact_tilt(readme):
    # Fisher information 1/2 per datum; 256 chains leave the tilt noisy by 1 / sqrt(256)
    y = readme[2]["y"]
    assert readme[2]["particles"].shape == (10, 400)
    assert abs(readme[2]["result"].params["tilt"] - y.mean()) < 4 / jnp.sqrt(256)


def test_readme_quickstart_has_at_most_25_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split("```python\n")[1].split("```")[0].splitlines()) <= 25


@pytest.mark.slow
def test_minibatches_page_runs_and_learns_from_a_file(capsys):
    """200,000 rows of a memory-mapped file, with a metric, early stopping and a checkpoint."""
    page = run("docs/how_to/minibatches.md")
    printed = capsys.readouterr().out.strip()
    text = (ROOT / "docs/how_to/minibatches.md").read_text(encoding="utf-8")
    assert [printed] == re.findall(r"It prints `([^`]*)`", text)
    assert page["result"].state.particles["x"].shape == (10, 200_000, 8)


def test_devices_page_runs_and_learns(capsys):
    page = run("docs/how_to/devices.md")
    text = (ROOT / "docs" / "how_to" / "devices.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in text
    assert page["loss"].shape == ()


def test_precision_page_runs_and_its_energy_is_float32_outside():
    page = run("docs/how_to/precision.md")
    energy, z = page["Energy"](jax.random.key(0)), jax.random.normal(jax.random.key(1), (100,))
    assert energy(z).dtype == energy.last.weight.dtype == energy.hidden[0].weight.dtype == jnp.float32
    exact = z
    for layer in energy.hidden:
        exact = jax.nn.silu(layer(exact))
    exact = energy.last(exact)
    assert 1e-5 < abs(energy(z) - exact) < 0.02  # the inside is rounded to 8 bits, and the sum of 200 is not


def test_silent_error_is_what_the_page_says():
    script = runpy.run_path(str(ROOT / "docs" / "silent_error.py"))
    assert "negative_phase" not in script  # NumPyro alone
    x = script["jax"].random.normal(script["jax"].random.key(1), (400,)) / 2
    normalized, loss = script["fit"](script["normalized_precision"], script["no_latents"], x)
    unnormalized, lower_loss = script["fit"](script["unnormalized_precision"], script["no_latents"], x)
    assert normalized["precision"] == pytest.approx(float(1 / (x**2).mean()), rel=1e-2)
    assert unnormalized["precision"] < 0.01
    assert lower_loss < loss - 0.5
