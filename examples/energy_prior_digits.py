# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""
A learned energy prior for handwritten digits
=============================================

A variational autoencoder draws its latents from :math:`N(0, I)`, but its encoder does not fill that ball evenly: digits
decoded from the holes are not digits. Here the prior is learned with the rest [1], the normal tilted by a network :math:`E`,

.. math::

    p(z) = \frac{e^{-E(z)}}{Z} \, N(z; 0, I), \qquad x \mid z \sim N(g(z), \sigma^2 I),

with a decoder :math:`g`. The normalizer :math:`Z` depends on the weights of :math:`E` and is unknown; ``negative_phase``
supplies its gradient from Markov chains of the prior. The gradient of the likelihood needs latents too, of every digit:

* ``--engine ebipla``, the default: particles that follow the posterior by Langevin dynamics, ``--num-particles`` per digit,
  by ``ParticleMMLE.ebipla`` [2], with Adam and with persistent MALA chains for the prior, where the paper has short-run ones;
* ``--engine svi``: an amortized guide :math:`q(z \mid x) = N(\mu(x), \mathrm{diag}(s(x)^2))`, by NumPyro's own ``SVI``.

The same model with the normal prior, by ``SVI`` with the same networks, noise, steps and seed, is the baseline. Both are judged
on 360 digits that neither has seen, by the squared maximum mean discrepancy (MMD^2) [3] between those and samples of the model.
Samples of the energy prior are the negative chains, run on for 3000 moves at the learned weights; the second half is used.

What to expect: a minute and a half on two cores. Over the seeds 0 to 4 the MMD^2 of samples is 0.6e-3 on average (0.5e-3 to
0.7e-3; the estimate is unbiased) with EBIPLA, 0.8e-3 (0.1e-3 to 2.5e-3) with SVI's energy prior and 3.7e-3 (3.0e-3 to 4.6e-3)
with the normal prior; EBIPLA has the smallest error of reconstruction on every seed. R-hat of the negative chains is below 1.01
after EBIPLA, and about 1.05 after SVI, whose energy is the rougher: a single chain is slow to change from mode to mode there.

The script writes to ``--output``:

* ``samples.png``: held-out digits, and samples of both models;
* ``prior.png``: the energy of both priors over two directions of the latent space, with latents of the digits on top;
* ``loss.png``: the losses, that of the energy prior up to the unknown log Z;
* ``energy_prior_digits.nc``: the fit for ArviZ, with latents of the training digits (the particles, or samples of the guide) as
  the group ``posterior`` and the negative chains as the group ``prior``.

**References**

1. Pang et al., *Learning latent space energy-based prior model*, NeurIPS 2020, arXiv:2006.08205.
2. Marks et al., *Energy-based interacting particle Langevin algorithm*, UAI 2026, arXiv:2510.12311.
3. Gretton et al., *A kernel two-sample test*, JMLR 13 (2012), eq. 3.
"""

# sphinx_gallery_thumbnail_path = "_static/samples.png"

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
from sklearn.datasets import load_digits

from numpyro_ebm import MALA, ParticleMMLE, TiltedDistribution, check_model, find_map, negative_phase, to_inference_data

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_PIXELS, LATENT_DIM = 64, 8
NUM_TRAIN = 1437  # of 1797, the others are held out
BATCH_SIZE, NUM_STEPS = 256, 3000
LEARNING_RATE, ENERGY_LEARNING_RATE = 1e-3, 5e-4  # the slower the energy, the better its chains keep up
NUM_CHAINS, MALA_STEPS = 256, 10  # negative chains, and their moves between two updates
NUM_PARTICLES = 4  # of EBIPLA, per digit
PARTICLE_STEP, LAST_PARTICLE_STEP = 1e-2, 3e-3  # the decoder grows steeper, and the particles stable only below 2 / curvature
NUM_DRAWS, NUM_POSTERIOR_DRAWS = 300, 20  # per negative chain, and per digit by the guide, after the fit
NUM_SEARCHES, SEARCH_STEPS = 4, 500  # for the most probable latents of a held-out digit


class Digits(NamedTuple):
    """The data, split by a seeded permutation."""

    train: Array  # (1437, 64), in [0, 1]
    held_out: Array  # (360, 64)
    train_labels: np.ndarray  # (1437,), for the colors of a figure only


class Nets(NamedTuple):
    """The networks as they are before the fit, and the noise between decoder and pixels. Only SVI has the encoder."""

    decoder: eqx.nn.MLP  # latent -> mean of the pixels
    encoder: eqx.nn.MLP  # pixels -> mean and scale of the latent
    energy: eqx.nn.MLP  # latent -> scalar
    noise: float  # sigma of the likelihood, on pixels in [0, 1]


class Fit(NamedTuple):
    """One of the two models, learned."""

    engine: str
    result: Any  # with the fields params, state and losses, whatever the engine
    nets: Nets
    prior_draws: Array  # (num_draws, 8)
    posterior_draws: Array  # (num_draws, 1437, 8), latents of the training digits: particles, or samples of the guide
    reconstructions: Array  # (360, 64), of the held-out digits
    seconds: float  # of the engine, compilation included


def load_data(seed: int) -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    images = jnp.asarray(pixels / 16, jnp.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    train, held_out = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return Digits(images[train], images[held_out], labels[train])


def make_nets(rng_key: Array, noise: float) -> Nets:
    keys = jax.random.split(rng_key, 3)
    return Nets(
        decoder=eqx.nn.MLP(LATENT_DIM, NUM_PIXELS, 256, 2, jax.nn.silu, jax.nn.sigmoid, key=keys[0]),
        encoder=eqx.nn.MLP(NUM_PIXELS, 2 * LATENT_DIM, 256, 2, jax.nn.silu, key=keys[1]),
        energy=eqx.nn.MLP(LATENT_DIM, "scalar", 64, 2, jax.nn.silu, key=keys[2]),
        noise=noise,
    )


def trained(nets: Nets, params: dict[str, Any]) -> Nets:
    """The networks with the weights of a fit."""
    names = [name.removesuffix("$params") for name in params]
    return nets._replace(**{name: eqx.combine(params[f"{name}$params"], getattr(nets, name)) for name in names})


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
        numpyro.sample("image", dist.Normal(decode(decoder, z), nets.noise).to_event(1), obs=batch)


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


def run(engine: Any, rng_key: Array, digits: Digits, nets: Nets, num_steps: int, **kwargs: Any) -> tuple[Any, float]:
    """The result of an engine on the training digits, and its seconds."""
    start = time.perf_counter()
    result = engine.run(rng_key, num_steps, digits.train, nets, batch_size=BATCH_SIZE, **kwargs)
    return jax.block_until_ready(result), time.perf_counter() - start


def fit_by_svi(rng_key: Array, program: Any, digits: Digits, nets: Nets, num_steps: int, **kwargs: Any) -> tuple[Any, Array, float]:
    """The result of SVI, samples of its guide for the training digits, and its seconds."""
    run_key, draw_key = jax.random.split(rng_key)
    svi = SVI(program, guide, make_optimizer(num_steps), Trace_ELBO())
    result, seconds = run(svi, run_key, digits, nets, num_steps, **kwargs)
    draws = Predictive(guide, params=result.params, num_samples=NUM_POSTERIOR_DRAWS)(draw_key, digits.train, nets)
    return result, draws["z"], seconds


def fit_by_ebipla(
    rng_key: Array, program: Any, digits: Digits, nets: Nets, num_steps: int, num_particles: int
) -> tuple[Any, Array, float]:
    """The result of EBIPLA, its particles for the training digits, and its seconds. Particles rest between their batches."""
    step_size = optax.exponential_decay(PARTICLE_STEP, num_steps, LAST_PARTICLE_STEP / PARTICLE_STEP)
    optim = make_optimizer(num_steps)
    engine = ParticleMMLE.ebipla(program, optim, num_particles=num_particles, step_size=step_size, noise="batch")
    result, seconds = run(engine, rng_key, digits, nets, num_steps)
    limit = engine.stability_limit(result.state, digits.train, nets)
    print(f"The particles' last step is {LAST_PARTICLE_STEP:g}; the worst of them would diverge above {limit:.2g}.")
    return result, engine.get_particles(result.state, digits.train, nets)["z"], seconds


def reconstruct(
    rng_key: Array, params: dict[str, Any], posterior_draws: Array, digits: Digits, nets: Nets, energy_prior: bool = True
) -> Array:
    """The held-out digits decoded from their most probable latents, so that no encoder is judged.

    The searches begin at samples of the most similar training digits.
    """
    distances = squared_distances(np.asarray(digits.held_out), np.asarray(digits.train))
    start = {"z": posterior_draws[0, distances.argsort(-1)[:, :NUM_SEARCHES].T]}
    found = find_map(rng_key, model, params, digits.held_out, nets, energy_prior=energy_prior, start=start, num_steps=SEARCH_STEPS)
    return decode(trained(nets, params).decoder, found.latents["z"])


def late_draws(rng_key: Array, chains: Array) -> Array:
    """The second half of the negative chains, run on at fixed weights, shuffled: samples of the learned prior."""
    return jax.random.permutation(rng_key, chains[:, chains.shape[1] // 2 :].reshape(-1, LATENT_DIM))


def mmd2(x: Array, y: Array, bandwidth: float) -> float:
    """The unbiased estimate of MMD^2 (Gretton et al., eq. 3); its mean is 0 for equal distributions, so it can be negative."""
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


def print_table(rng_key: Array, fits: dict[str, Fit], digits: Digits) -> None:
    held_out, bandwidth = digits.held_out, median_distance(digits.held_out)
    num_samples = min(NUM_TRAIN, *(len(fit.prior_draws) for fit in fits.values()))
    noise = fits["normal prior"].nets.noise
    print(f"\n{num_samples} samples of each model against {len(held_out)} held-out digits.")
    print(f"MMD^2: unbiased, RBF kernel at the median held-out distance {bandwidth:.2f}. 'draws' are the model's, with noise")
    print(f"sigma = {noise}; 'means' are the decoder's means of the same latents, as in samples.png.")
    print("Equal distributions give 0 on average.")
    print("Reconstruction is at the most probable latents of the held-out digits.")
    print(f"{'':<14}{'engine':>8}{'MMD^2 draws':>13}{'MMD^2 means':>13}{'reconstruction MSE':>20}{'seconds of fit':>16}")
    for name, fit in fits.items():
        means = decode(fit.nets.decoder, fit.prior_draws[:num_samples])
        draws = means + fit.nets.noise * jax.random.normal(rng_key, means.shape)
        discrepancies = [mmd2(samples, held_out, bandwidth) for samples in (draws, means)]
        error = jnp.mean((fit.reconstructions - held_out) ** 2)
        print(f"{name:<14}{fit.engine:>8}{discrepancies[0]:>13.2e}{discrepancies[1]:>13.2e}{error:>20.5f}{fit.seconds:>16.1f}")
    floor = mmd2(digits.train, held_out, bandwidth)
    print(f"{'training data':<14}{'':>8}{floor:>13.2e}{floor:>13.2e}")


def print_mixing(data: Any) -> None:
    """R-hat and bulk ESS of the negative chains, the worst over the latent dimensions."""
    prior = data["prior"]["z"].to_dataset(name="z")  # one form for InferenceData (ArviZ 0) and DataTree (ArviZ 1)
    rhat, ess = float(az.rhat(prior)["z"].max()), float(az.ess(prior)["z"].min())
    num_chains, num_draws = prior["z"].shape[:2]
    print(f"\nNegative chains, {num_chains} x {num_draws} draws: max R-hat {rhat:.3f}, min bulk ESS {ess:.0f}.")
    if rhat > 1.01:
        print("R-hat is above 1.01: a single chain is slow between modes, and only all of them together stand for the prior.")


def plot_samples(path: Path, fits: dict[str, Fit], held_out: Array, side: int = 9) -> None:
    grids = {"held-out digits": held_out[: side**2]}
    grids |= {f"{name} (decoder means)": decode(fit.nets.decoder, fit.prior_draws[: side**2]) for name, fit in fits.items()}
    figure, axes = plt.subplots(1, len(grids), figsize=(4 * len(grids), 4.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for axis, (title, images) in zip(axes, grids.items(), strict=True):
        tiles = np.ones((side, 9, side, 9))  # 8 x 8 pixels and a white line
        tiles[:, :8, :, :8] = 1 - np.asarray(images).reshape(side, side, 8, 8).transpose(0, 2, 1, 3)
        axis.imshow(tiles.reshape(9 * side, 9 * side)[:-1, :-1], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_priors(path: Path, fits: dict[str, Fit], digits: Digits) -> None:
    """The training digits' posterior samples along their two widest directions, over the prior's energy there.

    The other directions are integrated out: the energy is minus the log of a kernel density estimate of the prior's draws in
    the plane. (On a slice, the digits would lie in front of and behind what is shown.)
    """
    figure, axes = plt.subplots(1, len(fits), figsize=(5.8 * len(fits), 5), layout="constrained")
    for axis, (name, fit) in zip(axes, fits.items(), strict=True):
        latents = fit.posterior_draws[0]
        center = latents.mean(0)
        plane = jnp.linalg.svd(latents - center, full_matrices=False)[2][:2]
        points, draws = (np.asarray((z - center) @ plane.T) for z in (latents, fit.prior_draws[:10_000]))
        limit = 1.1 * np.abs(np.concatenate([points, draws])).max()
        ticks = np.linspace(-limit, limit, 120)
        bandwidth = 0.2 * points.std()
        x, y = (np.exp(-((ticks[:, None] - draws[:, i]) ** 2) / (2 * bandwidth**2)) for i in range(2))
        energy = -np.log(y @ x.T / len(draws) + 1e-30)
        levels = np.linspace(0, 6, 13)
        contour = axis.contourf(ticks, ticks, energy - energy.min(), levels, cmap="Grays_r", vmin=-5, vmax=6)
        scatter = axis.scatter(*points.T, c=digits.train_labels, cmap="tab10", s=6, linewidth=0, vmin=-0.5, vmax=9.5)
        axis.set(title=f"{name} ({fit.engine})", xlabel="first principal direction", aspect="equal")
    axes[0].set_ylabel("second principal direction")
    figure.colorbar(contour, ax=axes, label="energy above its minimum (white: 6 or more)", aspect=30, pad=0.02)
    figure.colorbar(scatter, ax=axes, label="digit", ticks=range(10), aspect=30, pad=0.02)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_losses(path: Path, fits: dict[str, Fit]) -> None:
    """Every engine's own loss: SVI's is a negative ELBO, EBIPLA's a log density at the particles, without their entropy."""
    labels = {"EBIPLA": "minus log joint density per digit, up to log Z", "SVI": "negative ELBO per digit"}
    figure, axes = plt.subplots(1, len(fits), figsize=(5.4 * len(fits), 4), layout="constrained")
    for axis, (name, fit) in zip(axes, fits.items(), strict=True):
        losses = np.asarray(fit.result.losses) / NUM_TRAIN
        axis.plot(np.arange(len(losses)) + 1, losses, linewidth=0.8)
        axis.set_ylim(losses.min() - 3, np.quantile(losses, 0.96))  # the first steps are far above
        up_to = ", up to log Z" if fit.engine == "SVI" and name == "energy prior" else ""
        axis.set(title=f"{name} ({fit.engine})", xlabel="step", ylabel=labels[fit.engine] + up_to)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def fit_normal_prior(rng_key: Array, digits: Digits, nets: Nets, num_steps: int) -> Fit:
    print("\nSVI with the normal prior")
    fit_key, draw_key, map_key = jax.random.split(rng_key, 3)
    result, posterior, seconds = fit_by_svi(fit_key, model, digits, nets, num_steps, energy_prior=False)
    prior_draws = normal_prior().sample(draw_key, (10_000,))
    reconstructions = reconstruct(map_key, result.params, posterior, digits, nets, energy_prior=False)
    return Fit("SVI", result, trained(nets, result.params), prior_draws, posterior, reconstructions, seconds)


def fit_energy_prior(
    rng_key: Array, digits: Digits, nets: Nets, num_steps: int, num_draws: int, num_particles: int | None
) -> tuple[Fit, Array]:
    """The fit, by SVI if there are no particles, and its negative chains run on, of shape ``(256, num_draws, 8)``."""
    fit_key, chain_key, draw_key, map_key = jax.random.split(rng_key, 4)
    program = negative_phase(model, num_chains=NUM_CHAINS, sampler=MALA(num_steps=MALA_STEPS))
    if num_particles is None:
        print("\nSVI with the energy prior")
        result, posterior, seconds = fit_by_svi(fit_key, program, digits, nets, num_steps)
    else:
        print(f"\nEBIPLA with the energy prior, {num_particles} particles per digit")
        result, posterior, seconds = fit_by_ebipla(fit_key, program, digits, nets, num_steps, num_particles)
    chains, _ = program.sample_chains(chain_key, result.params, result.state.mutable_state, num_draws, digits.train, nets)
    engine, prior_draws = "SVI" if num_particles is None else "EBIPLA", late_draws(draw_key, chains["z"])
    reconstructions = reconstruct(map_key, result.params, posterior, digits, nets)
    return Fit(engine, result, trained(nets, result.params), prior_draws, posterior, reconstructions, seconds), chains["z"]


def main(args: argparse.Namespace) -> None:
    num_steps, num_draws = (50, 10) if args.smoke else (args.num_steps, NUM_DRAWS)
    num_particles = args.num_particles if args.engine == "ebipla" else None
    args.output.mkdir(parents=True, exist_ok=True)
    net_key, fit_key, noise_key = jax.random.split(jax.random.key(args.seed), 3)
    digits, nets = load_data(args.seed), make_nets(net_key, args.noise)
    print(check_model(model, digits.train, nets))

    energy_fit, chains = fit_energy_prior(fit_key, digits, nets, num_steps, num_draws, num_particles)
    fits = {"energy prior": energy_fit, "normal prior": fit_normal_prior(fit_key, digits, nets, num_steps)}
    print_table(noise_key, fits, digits)

    data = to_inference_data(
        energy_fit.result,
        chains={"z": chains},
        posterior={"z": energy_fit.posterior_draws},
        observed_data={"image": digits.train},
        dims={"z": ["digit", "latent"], "image": ["digit", "pixel"]},
    )
    data.to_netcdf(str(args.output / "energy_prior_digits.nc"))
    print_mixing(data)

    plot_samples(args.output / "samples.png", fits, digits.held_out)
    plot_priors(args.output / "prior.png", fits, digits)
    plot_losses(args.output / "loss.png", fits)
    print(f"The figures and energy_prior_digits.nc are in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A learned energy prior for handwritten digits")
    parser.add_argument("--engine", choices=["ebipla", "svi"], default="ebipla", help="what learns the energy prior")
    parser.add_argument("--num-particles", type=int, default=NUM_PARTICLES, help="of EBIPLA, per digit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.12, help="sigma of the likelihood, on pixels in [0, 1]")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="steps of each fit")
    parser.add_argument("--output", type=Path, default=Path("outputs/energy_prior_digits"))
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    main(parser.parse_args())
