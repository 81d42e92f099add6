# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
Example: A learnt energy prior for handwritten digits
=====================================================

A variational autoencoder draws its latents from :math:`N(0, I)`, but its encoder does not fill that ball evenly: digits
decoded from the holes are no digits. Here the prior is learnt with the rest [1], the normal tilted by a network :math:`E`,

.. math::

    p(z) = \frac{e^{-E(z)}}{Z} \, N(z; 0, I), \qquad x \mid z \sim N(g(z), \sigma^2 I),

with a decoder :math:`g` and an amortised guide :math:`q(z \mid x) = N(\mu(x), \mathrm{diag}(s(x)^2))`. The normaliser
:math:`Z` depends on the weights of :math:`E` and nobody knows it; ``negative_phase`` supplies its gradient from Markov chains
of the prior, and NumPyro's own ``SVI`` does the rest.

The same model with the normal prior, with the same networks, noise, steps and seed, is what to beat. Both are judged on
360 digits that neither has seen, by the squared maximum mean discrepancy (MMD^2) between those and draws of the model.

What to expect: EXPECTED

The script writes to ``--output``:

* ``samples.png``: held-out digits beside draws of both models;
* ``prior.png``: the energy of both priors with the encoded digits on top;
* ``loss.png``: the losses, that of the energy prior up to the unknown log Z;
* ``energy_prior_digits.nc``: the fit for ArviZ, with the negative chains as the group ``prior``.

**References**

1. Pang et al., *Learning latent space energy-based prior model*, NeurIPS 2020, arXiv:2006.08205.
2. Gretton et al., *A kernel two-sample test*, JMLR 13 (2012), eq. 3.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.svi import SVIRunResult
from sklearn.datasets import load_digits

from numpyro_ebm import MALA, TiltedDistribution, check_model, negative_phase, to_inference_data

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_PIXELS, LATENT_DIM = 64, 8
NUM_TRAIN = 1437  # of 1797, the others are held out
NOISE = 0.15  # sigma of the likelihood, on pixels in [0, 1]; about where the normal prior does best
BATCH_SIZE, NUM_STEPS = 256, 3000
LEARNING_RATE, ENERGY_LEARNING_RATE = 1e-3, 3e-4  # the slower the energy, the better its chains keep up
NUM_CHAINS, MALA_STEPS = 256, 10  # negative chains, and their moves between two updates
NUM_DRAWS = 300  # per negative chain, after the fit


class Digits(NamedTuple):
    """The data, split by a seeded permutation."""

    train: Array  # (1437, 64), in [0, 1]
    held_out: Array  # (360, 64)
    train_labels: np.ndarray  # (1437,), for the colours of a figure only


class Nets(NamedTuple):
    """The networks as they are before the fit."""

    decoder: eqx.nn.MLP  # latent -> mean of the pixels
    encoder: eqx.nn.MLP  # pixels -> mean and scale of the latent
    energy: eqx.nn.MLP  # latent -> scalar


def load_data(seed: int) -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    images = jnp.asarray(pixels / 16, jnp.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    train, held_out = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return Digits(images[train], images[held_out], labels[train])


def make_nets(rng_key: Array) -> Nets:
    keys = jax.random.split(rng_key, 3)
    return Nets(
        decoder=eqx.nn.MLP(LATENT_DIM, NUM_PIXELS, 256, 2, jax.nn.silu, jax.nn.sigmoid, key=keys[0]),
        encoder=eqx.nn.MLP(NUM_PIXELS, 2 * LATENT_DIM, 256, 2, jax.nn.silu, key=keys[1]),
        energy=eqx.nn.MLP(LATENT_DIM, "scalar", 64, 2, jax.nn.silu, key=keys[2]),
    )


def trained(nets: Nets, params: dict[str, Any]) -> Nets:
    """The networks with the weights of a fit."""
    return nets._replace(**{name.removesuffix("$params"): eqx.combine(p, getattr(nets, name[:-7])) for name, p in params.items()})


def normal_prior() -> dist.Distribution:
    return dist.Normal(0, 1).expand([LATENT_DIM]).to_event(1)


def model(images: Array, nets: Nets, energy_prior: bool = True, batch_size: int | None = None) -> None:
    decoder = eqx_module("decoder", nets.decoder)
    prior = normal_prior()
    if energy_prior:
        prior = TiltedDistribution(prior, eqx_module("energy", nets.energy))
    with numpyro.plate("digits", len(images), subsample_size=batch_size):
        batch = numpyro.subsample(images, event_dim=1)
        z = numpyro.sample("z", prior)
        numpyro.sample("image", dist.Normal(jax.vmap(decoder)(z), NOISE).to_event(1), obs=batch)


def guide(images: Array, nets: Nets, energy_prior: bool = True, batch_size: int | None = None) -> None:
    encoder = eqx_module("encoder", nets.encoder)
    with numpyro.plate("digits", len(images), subsample_size=batch_size):
        mean, scale = encode(encoder, numpyro.subsample(images, event_dim=1))
        numpyro.sample("z", dist.Normal(mean, scale).to_event(1))


def encode(encoder: eqx.nn.MLP, images: Array) -> tuple[Array, Array]:
    mean, scale = jnp.split(jax.vmap(encoder)(images), 2, axis=-1)
    return mean, jax.nn.softplus(scale)


def decode(decoder: eqx.nn.MLP, z: Array) -> Array:
    return jax.vmap(decoder)(z)


def make_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam, slower for the energy than for the decoder and encoder; both rates decay to a twentieth."""

    def adam(learning_rate: float) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps, alpha=0.05))

    def label(params: dict[str, Any]) -> dict[str, str]:
        return {name: "energy" if name.startswith("energy") else "rest" for name in params}

    return optax.partition({"energy": adam(ENERGY_LEARNING_RATE), "rest": adam(LEARNING_RATE)}, label)


def fit(rng_key: Array, program: Any, digits: Digits, nets: Nets, energy_prior: bool, num_steps: int) -> tuple[SVIRunResult, float]:
    """SVI, and the seconds it took, compilation included."""
    print(f"\nSVI with the {'energy' if energy_prior else 'normal'} prior")
    svi = SVI(program, guide, make_optimizer(num_steps), Trace_ELBO())
    start = time.perf_counter()
    result = svi.run(rng_key, num_steps, digits.train, nets, energy_prior=energy_prior, batch_size=BATCH_SIZE)
    return jax.block_until_ready(result), time.perf_counter() - start


def draw_from_chains(rng_key: Array, chains: Array) -> Array:
    """As many draws as training digits, at random from the second half of the negative chains, run on at fixed weights."""
    late = chains[:, chains.shape[1] // 2 :].reshape(-1, LATENT_DIM)
    return jax.random.choice(rng_key, late, (min(NUM_TRAIN, len(late)),), replace=False)


def mmd2(x: Array, y: Array, bandwidth: float) -> float:
    """The unbiased estimate of MMD^2 (Gretton et al., eq. 3); its mean is 0 for equal laws, so it can be negative."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-squared_distances(a, b) / (2 * bandwidth**2))

    def mean_off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return float(mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean())


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a**2).sum(-1)[:, None] + (b**2).sum(-1) - 2 * a @ b.T


def median_distance(x: Array) -> float:
    pairs = np.triu_indices(len(x), 1)
    return float(np.sqrt(np.median(squared_distances(np.asarray(x, np.float64), np.asarray(x, np.float64))[pairs])))


def evaluate(rng_key: Array, nets: Nets, z: Array, held_out: Array) -> tuple[float, float, float]:
    """MMD^2 to the held-out digits, of noisy draws and of decoder means, and the reconstruction error."""
    means, bandwidth = decode(nets.decoder, z), median_distance(held_out)
    noisy = means + NOISE * jax.random.normal(rng_key, means.shape)
    reconstructed = decode(nets.decoder, encode(nets.encoder, held_out)[0])
    return mmd2(noisy, held_out, bandwidth), mmd2(means, held_out, bandwidth), float(jnp.mean((reconstructed - held_out) ** 2))


def print_table(rows: dict[str, tuple[float, float, float, float]], digits: Digits, num_samples: int) -> None:
    bandwidth = median_distance(digits.held_out)
    print(f"\n{num_samples} draws of each model against {len(digits.held_out)} held-out digits.")
    print(f"MMD^2: unbiased, RBF kernel at the median held-out distance {bandwidth:.2f}. 'draws' are the model's, with noise")
    print(f"sigma = {NOISE}; 'means' are the decoder's means of the same latents, as in samples.png. Lower is better.")
    print(f"{'':<14}{'MMD^2 draws':>13}{'MMD^2 means':>13}{'reconstruction MSE':>20}{'seconds of fit':>16}")
    for name, (noisy, means, reconstruction, seconds) in rows.items():
        print(f"{name:<14}{noisy:>13.2e}{means:>13.2e}{reconstruction:>20.5f}{seconds:>16.1f}")
    floor = mmd2(digits.train, digits.held_out, bandwidth)
    print(f"{'training data':<14}{floor:>13.2e}{floor:>13.2e}")


def print_mixing(data: Any) -> None:
    """R-hat and bulk ESS of the negative chains, the worst over the latent dimensions."""
    prior = data["prior"]["z"].to_dataset(name="z")  # one form for InferenceData (ArviZ 0) and DataTree (ArviZ 1)
    rhat, ess = float(az.rhat(prior)["z"].max()), float(az.ess(prior)["z"].min())
    num_chains, num_draws = prior["z"].shape[:2]
    verdict = (
        "they mix" if rhat < 1.05 else "they mix SLOWLY: a chain stays near its mode, trust the population rather than one chain"
    )
    print(f"\nNegative chains, {num_chains} x {num_draws} draws: max R-hat {rhat:.3f}, min bulk ESS {ess:.0f} ({verdict}).")


def plot_samples(path: Path, grids: dict[str, Array], side: int = 9) -> None:
    figure, axes = plt.subplots(1, len(grids), figsize=(4 * len(grids), 4.4), layout="constrained")
    for axis, (title, images) in zip(axes, grids.items(), strict=True):
        tiles = np.ones((side, 9, side, 9))  # 8 x 8 pixels and a white line
        tiles[:, :8, :, :8] = 1 - np.asarray(images[: side**2]).reshape(side, side, 8, 8).transpose(0, 2, 1, 3)
        axis.imshow(tiles.reshape(9 * side, 9 * side)[:-1, :-1], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_priors(path: Path, priors: dict[str, tuple[dist.Distribution, Array]], labels: np.ndarray) -> None:
    """The energy of each prior on the plane through the mean encoded digit along the two widest directions of them all."""
    figure, axes = plt.subplots(1, len(priors), figsize=(6 * len(priors), 5.2), layout="constrained")
    for axis, (title, (prior, z)) in zip(axes, priors.items(), strict=True):
        centre = z.mean(0)
        plane = jnp.linalg.svd(z - centre, full_matrices=False)[2][:2]
        ticks = jnp.linspace(-3.6, 3.6, 121)
        grid = centre + jnp.stack(jnp.meshgrid(ticks, ticks), -1) @ plane
        energy = -prior.log_prob(grid)
        contour = axis.contourf(ticks, ticks, jnp.minimum(energy - energy.min(), 12), levels=24, cmap="Greys_r")
        points = (z - centre) @ plane.T
        scatter = axis.scatter(*points.T, c=labels, cmap="tab10", s=5, vmin=-0.5, vmax=9.5)
        axis.set(title=title, xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal")
        axis.set(xlabel="first principal direction", ylabel="second principal direction")
    figure.colorbar(contour, ax=axes, label="energy above its minimum on the plane, cut at 12")
    figure.colorbar(scatter, ax=axes, label="digit", ticks=range(10))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_losses(path: Path, curves: dict[str, Array]) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for label, losses in curves.items():
        losses = np.asarray(losses) / NUM_TRAIN
        window = max(len(losses) // 60, 1)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        (line,) = axis.plot(np.arange(len(smooth)) + window, smooth, label=label)
        axis.plot(np.arange(len(losses)) + 1, losses, color=line.get_color(), alpha=0.15, linewidth=0.6)
        axis.set_ylim(smooth.min() - 2, np.quantile(smooth, 0.97))
    axis.set(xlabel="step", ylabel="loss (negative ELBO) per digit")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    num_steps, num_draws = (20, 10) if args.smoke else (args.num_steps, NUM_DRAWS)
    args.output.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(args.seed), 7)
    digits, nets = load_data(args.seed), make_nets(keys[0])
    print(check_model(model, digits.train, nets, batch_size=BATCH_SIZE))

    program = negative_phase(model, num_chains=NUM_CHAINS, sampler=MALA(num_steps=MALA_STEPS))
    normal_fit, normal_seconds = fit(keys[1], model, digits, nets, False, num_steps)
    energy_fit, energy_seconds = fit(keys[1], program, digits, nets, True, num_steps)
    normal_nets, energy_nets = trained(nets, normal_fit.params), trained(nets, energy_fit.params)

    chains, _ = program.sample_chains(
        keys[2], energy_fit.params, energy_fit.state.mutable_state, num_draws, digits.train, nets, batch_size=BATCH_SIZE
    )
    energy_z = draw_from_chains(keys[3], chains["z"])
    normal_z = normal_prior().sample(keys[4], (len(energy_z),))
    rows = {
        "energy prior": (*evaluate(keys[5], energy_nets, energy_z, digits.held_out), energy_seconds),
        "normal prior": (*evaluate(keys[5], normal_nets, normal_z, digits.held_out), normal_seconds),
    }
    print_table(rows, digits, len(energy_z))

    posterior = Predictive(guide, params=energy_fit.params, num_samples=100)(keys[6], digits.held_out, nets)
    data = to_inference_data(
        energy_fit,
        chains=chains,
        posterior={"z": posterior["z"]},
        observed_data={"image": digits.held_out},
        dims={"image": ["digit", "pixel"]},
    )
    data.to_netcdf(str(args.output / "energy_prior_digits.nc"))
    print_mixing(data)

    samples = {
        "held-out digits": digits.held_out,
        "energy prior": decode(energy_nets.decoder, energy_z),
        "normal prior": decode(normal_nets.decoder, normal_z),
    }
    plot_samples(args.output / "samples.png", samples)
    learnt = TiltedDistribution(normal_prior(), energy_nets.energy)
    priors = {
        "learnt energy prior": (learnt, encode(energy_nets.encoder, digits.train)[0]),
        "normal prior": (normal_prior(), encode(normal_nets.encoder, digits.train)[0]),
    }
    plot_priors(args.output / "prior.png", priors, digits.train_labels)
    curves = {"energy prior (up to log Z)": energy_fit.losses, "normal prior": normal_fit.losses}
    plot_losses(args.output / "loss.png", curves)
    print(f"Figures and {'energy_prior_digits.nc'} are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A learnt energy prior for handwritten digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="SVI steps of each fit")
    parser.add_argument("--output", type=Path, default=Path("outputs/energy_prior_digits"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
