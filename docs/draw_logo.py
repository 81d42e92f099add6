# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Draws the logo, the favicon and the thumbnail of scripts without a figure: an energy with two wells, and samples in them.

Run ``python docs/draw_logo.py``; it writes to ``docs/_static/logo``.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent / "_static" / "logo"
BLUE, ORANGE = "#3b82c4", "#e07b39"
SAMPLES = [(-1.02, 0.05), (-0.72, 0.36), (-1.22, 0.4), (0.98, 0.05), (1.2, 0.36)]


def energy(x):
    return (x**2 - 1) ** 2 + 0.12 * x


def svg(line, size=64, stroke=5, radius=4.6):
    """A square drawing: x from -1.6 to 1.6, the energy from -.3 to 2.2."""

    def place(x, y):
        return (x + 1.6) / 3.2 * size, size - 6 - (y + 0.15) / 2.1 * (size - 14)

    x = np.linspace(-1.52, 1.52, 60)
    path = "M" + " L".join("{:.1f},{:.1f}".format(*place(*point)) for point in zip(x, energy(x), strict=True))
    beads = "".join(
        '<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}"/>'.format(*place(x, energy(x) + 0.27 + up), radius, ORANGE)
        for x, up in SAMPLES[:1] + SAMPLES[3:4]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" height="{size}">'
        f'<path d="{path}" fill="none" stroke="{line}" stroke-width="{stroke}" stroke-linecap="round" stroke-linejoin="round"/>'
        f"{beads}</svg>\n"
    )


def thumbnail(path):
    figure, axes = plt.subplots(figsize=(4, 2.8))
    x = np.linspace(-1.75, 1.75, 300)
    axes.fill_between(x, np.exp(-4 * energy(x)), color=BLUE, alpha=0.25)
    axes.plot(x, energy(x), color=BLUE, linewidth=4)
    axes.scatter(*zip(*[(x, energy(x) + 0.1 + up / 2) for x, up in SAMPLES], strict=True), s=120, color=ORANGE, zorder=3)
    axes.set(xlim=(-1.75, 1.75), ylim=(-0.25, 2.2))
    axes.axis("off")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    HERE.mkdir(parents=True, exist_ok=True)
    (HERE / "logo.svg").write_text(svg(BLUE), encoding="utf-8")
    (HERE / "logo_dark.svg").write_text(svg("#8ec1ee"), encoding="utf-8")
    (HERE / "favicon.svg").write_text(svg(BLUE, stroke=7, radius=6), encoding="utf-8")
    thumbnail(HERE / "thumbnail.png")
