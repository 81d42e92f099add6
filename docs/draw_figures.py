# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Draws the two figures of the front page and of the README, and the drawing of a fit by several hosts.

``hero.png``: points on a roll, the energy that ``SVI`` under ``negative_phase`` learns of them, and samples of it.
``silent_error.png``: one energy of one variable, learned by NumPyro's ``SVI`` without and with the gradient of its normalizer.
``several_hosts.png``: what each host holds in ``examples/several_hosts.py``, and what all of them share.
Run ``python docs/draw_figures.py``, which takes about two minutes of CPU time; it writes to ``docs/_static``.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO
from sklearn.datasets import make_swiss_roll

from numpyro_ebm import EnergyDistribution, negative_phase, unnormalized

HERE = Path(__file__).parent
matplotlib.use("Agg")
matplotlib.rc_file(HERE / "matplotlibrc")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

BLUE, ORANGE, GREEN = "#3b82c4", "#e07b39", "#3a9d6e"
FROM_NOTHING = LinearSegmentedColormap.from_list("", ["#8a6fc000", "#8a6fc0b0", "#c04a6b", "#e07b39", "#f2b134"])


def no_latents(*args):
    """The guide of a model without latents."""


def learned(model, x, num_steps, rate, num_chains=None):
    wrapped = unnormalized(model) if num_chains is None else negative_phase(model, num_chains=num_chains)
    svi = SVI(wrapped, no_latents, optax.adam(optax.cosine_decay_schedule(rate, num_steps)), Trace_ELBO())
    return svi.run(jax.random.key(0), num_steps, x, progress_bar=False)


# The roll.


def roll(num_rows):
    points = make_swiss_roll(num_rows, noise=0.25, random_state=0)[0][:, [0, 2]]
    return jnp.asarray(points / 5.0, dtype=jnp.float32)


class Confined(eqx.Module):
    """A network with a weak bowl, without which no density would be integrable."""

    network: eqx.nn.MLP

    def __init__(self, key, size):
        self.network = eqx.nn.MLP(size, "scalar", 128, 3, jax.nn.silu, key=key)

    def __call__(self, x):
        return self.network(jnp.atleast_1d(x)) + 0.1 * (x**2).sum()


def draw_hero():
    x, net = roll(5000), Confined(jax.random.key(1), 2)

    def model(x):
        energy = eqx_module("energy", net)
        with numpyro.plate("data", len(x), subsample_size=1000):
            x = numpyro.subsample(x, event_dim=1)
            numpyro.sample("x", EnergyDistribution(energy, (2,), initial=dist.Normal(0, 1.5).expand([2]).to_event(1)), obs=x)

    result = learned(model, x, 4000, 2e-3, num_chains=1000)
    energy = eqx.combine(result.params["energy$params"], net)
    grid = jnp.linspace(-3.1, 3.6, 300)
    density = jax.nn.softmax(-jax.vmap(jax.vmap(energy))(jnp.stack(jnp.meshgrid(grid, grid), -1)), (0, 1))
    cells = jax.random.categorical(jax.random.key(2), jnp.log(density.ravel()), shape=(2000,))
    samples = jnp.stack([grid[cells % 300], grid[cells // 300]], -1)
    samples += (grid[1] - grid[0]) * jax.random.uniform(jax.random.key(3), samples.shape, minval=-0.5, maxval=0.5)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.1))
    for ax, points, color in ((axes[0], x[:2000], BLUE), (axes[2], samples, ORANGE)):
        ax.scatter(*points.T, s=3, color=color, linewidths=0, alpha=0.8)
    axes[1].imshow(FROM_NOTHING(np.sqrt(density / density.max())), extent=[-3.1, 3.6] * 2, origin="lower")
    for ax, title in zip(axes, ("data", "learned density", "samples of the learned density"), strict=True):
        ax.set(title=title, xticks=[], yticks=[], xlim=(-3.1, 3.6), ylim=(-3.1, 3.6), aspect="equal")
        ax.spines[:].set_visible(False)
    figure.savefig(HERE / "_static" / "hero.png", dpi=200)


# The silent error.


def draw_silent_error():
    mode, spread = jax.random.normal(jax.random.key(0), (2, 1000))
    x = 1.5 * jnp.where(mode < 0.5, -1, 1) + 0.45 * spread
    net = Confined(jax.random.key(1), 1)

    def model(x):
        energy = eqx_module("energy", net)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", EnergyDistribution(energy, initial=dist.Normal(0, 1.5)), obs=x)

    grid = jnp.linspace(-4, 4, 801)
    left = dist.Normal(0, 1).cdf(0.5)
    truth = left * jnp.exp(dist.Normal(-1.5, 0.45).log_prob(grid)) + (1 - left) * jnp.exp(dist.Normal(1.5, 0.45).log_prob(grid))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.7), sharex=True)
    axes[0].hist(x, 50, density=True, color=BLUE, alpha=0.45)
    axes[0].plot(grid, truth, color=BLUE)
    axes[0].set_title("1000 rows of data")
    for ax, num_chains, title, color in (
        (axes[1], None, "SVI(model), log Z left out", ORANGE),
        (axes[2], 1000, "SVI(negative_phase(model))", GREEN),
    ):
        result = learned(model, x, 1000, 5e-3, num_chains)
        energy = eqx.combine(result.params["energy$params"], net)
        density = jax.nn.softmax(-jax.vmap(energy)(grid)) / (grid[1] - grid[0])
        loss = result.losses[-1] / len(x)
        print(f"{title}: last loss {loss:.1f} a row")
        ax.text(0.98, 0.56, f"loss {loss:,.0f}", transform=ax.transAxes, ha="right")
        ax.plot(grid, truth, color=BLUE, alpha=0.6, label="truth")
        ax.plot(grid, density, color=color, label="learned density")
        ax.fill_between(grid, density, color=color, alpha=0.2)
        ax.set_title(title)
        ax.legend(loc="upper right", handlelength=1.2)
    for ax in axes:
        ax.set(yticks=[], xlabel="x", ylim=(0, 1.05))
    figure.savefig(HERE / "_static" / "silent_error.png", dpi=200)


# Several hosts.


def draw_several_hosts():
    figure, ax = plt.subplots(figsize=(5.0, 3.5))
    rng = np.random.default_rng(0)
    box = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": "none", "linewidth": 1.8}
    ax.add_patch(FancyBboxPatch((0.0, 2.35), 4.6, 0.65, edgecolor=GREEN, **box))
    ax.text(2.3, 2.67, "parameters, on all hosts the same", ha="center", va="center", color=GREEN, fontsize=12)
    for host in range(3):
        left = 1.6 * host
        ax.add_patch(FancyBboxPatch((left, 0.0), 1.4, 1.8, edgecolor="#9a9a9a", **box))
        for (x, y), (to_x, to_y) in (((0.55, 1.85), (0.55, 2.3)), ((0.85, 2.3), (0.85, 1.85))):
            ax.annotate("", (left + to_x, to_y), (left + x, y), arrowprops={"arrowstyle": "->", "color": GREEN, "lw": 1.8})
        ax.text(left + 0.7, -0.22, f"host {host}", ha="center", va="center", fontsize=12)
        for y in np.linspace(0.22, 1.2, 6):
            ax.plot([left + 0.15, left + 0.5], [y, y], color=BLUE, linewidth=4)
            ax.scatter(left + 0.97 + 0.12 * rng.standard_normal(5).clip(-2, 2), np.full(5, y), s=16, color=ORANGE, linewidths=0)
        ax.text(left + 0.33, 1.5, "rows", ha="center", va="center", color=BLUE)
        ax.text(left + 0.97, 1.5, "particles", ha="center", va="center", color=ORANGE)
    ax.set(xlim=(-0.1, 4.7), ylim=(-0.45, 3.1), aspect="equal")
    ax.set_axis_off()
    figure.savefig(HERE / "_static" / "several_hosts.png", dpi=160)


if __name__ == "__main__":
    draw_hero()
    draw_silent_error()
    draw_several_hosts()
