# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What steps cost on a GPU, by what a user calls over the same maths by hand in one compiled ``lax.scan``.

Small steps are what a device shows most: it waits for the host wherever a loop or a branch asks it something. Both sides have
the same network, data and random numbers, as in ``engines.py`` and ``negative_phase.py``, where the cases come from.

* ``denoising``: ``ScoreMatching.run`` of an energy of two hidden layers, 128 wide, on 128 points of a plane.
* ``CD-20``: the same energy by ``SVI(negative_phase)``, 256 chains and 20 unadjusted Langevin moves a step.
* ``latent prior``: ``SVI(negative_phase)`` of 128 images, latents of 10, 256 chains and 10 steps of MALA a step.
* ``particles``: ``ParticleMMLE.run`` of such a model, 4 particles.

Wall time of a step and CPU time of the host in it, the two sides in turn, medians; then seconds of the first call, which
compiles. Some minutes on one device; it runs on a CPU too. ``python benchmarks/device.py --help``.
"""

import argparse
import time

import engines
import jax
import negative_phase
import numpy as np


def latent_prior():
    images = engines.images()
    (ours, by_svi), (hand, by_hand) = negative_phase.by_numpyro_ebm(images), negative_phase.by_hand(images)
    return engines.in_scan(by_svi, ours), engines.in_scan(by_hand, hand)


CASES = {
    "denoising": (engines.denoising, 1),
    "CD-20": (engines.contrastive_divergence, 5),
    "latent prior": (latent_prior, 5),
    "particles": (engines.particles, 5),
}


def timed(run, num_steps):
    """Wall and CPU seconds of one call, ready on the host."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run(num_steps))
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(title, runs, num_steps, repeats):
    first = [timed(run, num_steps)[0] for run in runs]
    times = np.array([[timed(run, num_steps) for run in runs] for _ in range(repeats)]) / num_steps
    ratios = times[:, 0, 0] / times[:, 1, 0]
    (ours, our_host), (hand, its_host) = np.median(times, 0) * 1e3
    print(
        f"{title:<14}{np.median(ratios):7.3f} (from {ratios.min():.3f} to {ratios.max():.3f}); {ours:7.4f} against {hand:7.4f} ms; "
        f"the host {our_host:7.4f} against {its_host:7.4f} ms; first call {first[0]:5.1f} against {first[1]:5.1f} s",
        flush=True,
    )


def main(args):
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"device {jax.devices()[0].device_kind}; {args.num_steps} steps, medians of {args.repeats} rounds")
    for title, (make, fewer) in CASES.items():
        compare(title, make(), max(2, args.num_steps // fewer), args.repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=1000, help="denoising steps of a run; of the others a fifth")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of runs")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.num_steps, args.repeats = 2, 1
    main(args)
