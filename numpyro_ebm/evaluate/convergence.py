# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the parameters of a run have settled, and how well their mean is known."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from numpyro_ebm._checks import require_count
from numpyro_ebm.evaluate.mixing import r_hat, sample_size
from numpyro_ebm.evaluate.standard_errors import StandardErrors


@dataclass(frozen=True)
class ConvergenceReport:
    """What :func:`convergence` found; printed as a table. Every field by param site, of the param's shape."""

    #: of shape ``(kept steps,) + shape``: mean of the steps kept so far
    running_mean: dict[str, np.ndarray]
    #: mean of the kept steps
    mean: dict[str, np.ndarray]
    #: Monte Carlo standard error of that mean, with autocorrelation
    mcse: dict[str, np.ndarray]
    #: standard deviation of the kept steps, the stationary spread
    sd: dict[str, np.ndarray]
    #: effective number of independent steps
    ess: dict[str, np.ndarray]
    #: split R-hat of the kept steps: above 1.01 the two halves differ, and the run has not settled
    r_hat: dict[str, np.ndarray]
    #: the theory's spread, standard error / sqrt(num_particles); None without standard errors
    theory: dict[str, np.ndarray] | None
    #: sd / theory; None without standard errors
    ratio: dict[str, np.ndarray] | None

    def __str__(self) -> str:
        columns = {"mean": self.mean, "mcse": self.mcse, "sd": self.sd, "ess": self.ess, "r_hat": self.r_hat}
        if self.theory is not None and self.ratio is not None:
            columns |= {"theory": self.theory, "ratio": self.ratio}
        rows = [("param", *columns), *_rows(columns)]
        widths = [max(len(row[i]) for row in rows if len(row) > 1) for i in range(len(rows[0]))]
        widths[0] = max(len(row[0]) for row in rows)
        return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)


def convergence(
    trace: Mapping[str, Any],
    *,
    burn_in: int | None = None,
    num_particles: int | None = None,
    standard_errors: StandardErrors | Mapping[str, Any] | None = None,
) -> ConvergenceReport:
    r"""Whether the parameters of a run have settled, how well their mean is known, and whether they spread as they should.

    The parameters of IPLA have the stationary distribution :math:`\propto p_\theta(y)^N` for small steps, so that their standard
    deviation is the standard error over :math:`\sqrt N`. A ``ratio`` near 1 says so. It is less than 1 where parameters have
    no noise of their own (PGD, Adam), and larger where the step is large or the negative chains are noisy.

    :param trace: parameters after every step, ``engine.run(..., collect=engine.get_params).collected``: by param site, of shape
        ``(num_steps,) + shape``.
    :param int burn_in: steps at the start that are left out, half of them if not given.
    :param int num_particles: particles of the run, which the theory's spread needs.
    :param standard_errors: of :func:`~numpyro_ebm.standard_errors`, or by param site.
    :return: a :class:`ConvergenceReport`; ``print`` it.
    :raises ValueError: if fewer than 4 steps are left, ``num_particles`` is missing or out of range, or ``standard_errors`` has
        other sites or shapes.

    **References**

    1. Akyildiz et al., *Interacting particle Langevin algorithm for maximum marginal likelihood estimation*, ESAIM: PS 29
       (2025), arXiv:2303.13429.
    2. Geyer, *Practical Markov chain Monte Carlo*, Statistical Science 7 (1992): the effective sample size.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import ParticleMMLE, convergence
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> engine = ParticleMMLE.ipla(model, num_particles=10, step_size=0.05)
        >>> result = engine.run(
        ...     jax.random.key(0),
        ...     4000,
        ...     jnp.arange(4.0),
        ...     collect=engine.get_params,
        ...     progress_bar=False,
        ... )
        >>> report = convergence(
        ...     result.collected, num_particles=10, standard_errors={"loc": (2 / 4) ** 0.5}
        ... )
        >>> mean, sd, theory = (x["loc"] for x in (report.mean, report.sd, report.theory))
        >>> print(f"mean {mean:.1f}, sd {sd:.1f}, in theory {theory:.1f}")
        mean 1.5, sd 0.2, in theory 0.2
    """
    if not isinstance(trace, Mapping):
        raise TypeError("trace must map param sites to their values: run(..., collect=engine.get_params).collected.")
    values = _by_name(trace)
    if not values:
        raise ValueError("trace has no param site: give run(..., collect=engine.get_params).collected.")
    shapes = {name: value.shape for name, value in values.items()}
    if any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"trace must have a value for every step along axis 0, as many of each param: got shapes {shapes}.")
    for name, value in values.items():
        if not np.issubdtype(value.dtype, np.number):
            raise TypeError(f"trace['{name}'] holds {value.dtype}, no numbers.")
    num_steps = next(iter(shapes.values()))[0]
    burn_in = num_steps // 2 if burn_in is None else require_count("burn_in", burn_in, least=0)
    if burn_in > num_steps - 4:
        raise ValueError(f"burn_in={burn_in} leaves {num_steps - burn_in} of {num_steps} steps: at least 4 are needed.")
    kept = {name: value[burn_in:].astype(np.float64) for name, value in values.items()}
    sd = {name: value.std(0, ddof=1) for name, value in kept.items()}
    with np.errstate(invalid="ignore", divide="ignore"):  # a parameter that does not move has neither ESS nor R-hat
        ess = {name: sample_size(value[None]) for name, value in kept.items()}
        split = {name: r_hat(value[None]) for name, value in kept.items()}
        mcse = {name: np.where(sd[name] == 0, 0.0, sd[name] / np.sqrt(ess[name])) for name in kept}
        theory = None if standard_errors is None else _theory(standard_errors, num_particles, sd)
        ratio = None if theory is None else {name: sd[name] / theory[name] for name in sd}
    counts = np.arange(1, num_steps - burn_in + 1)
    running = {name: value.cumsum(0) / counts.reshape(-1, *(1,) * (value.ndim - 1)) for name, value in kept.items()}
    return ConvergenceReport(running, {name: value[-1] for name, value in running.items()}, mcse, sd, ess, split, theory, ratio)


def _theory(
    standard_errors: StandardErrors | Mapping[str, Any], num_particles: int | None, sd: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    num_particles = require_count("num_particles", num_particles, why="standard errors are compared at that many particles")
    given = standard_errors.standard_errors if isinstance(standard_errors, StandardErrors) else standard_errors
    errors = _by_name(given)
    for name, value in sd.items():
        if name not in errors or errors[name].shape != value.shape:
            found = f"has shape {errors[name].shape}" if name in errors else "is missing"
            raise ValueError(f"param '{name}': its standard error {found}, it must have shape {value.shape}.")
        if (errors[name] <= 0).any():  # nan is what is not known
            raise ValueError(f"param '{name}': a standard error must be positive, got {errors[name].min():g}.")
    return {name: errors[name] / np.sqrt(num_particles) for name in sd}


def _by_name(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of param sites by name; those of a site that holds a pytree by ``site.path``."""
    leaves = jax.tree_util.tree_flatten_with_path(dict(tree))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


MAX_ROWS = 10  # elements of a site that are printed


def _rows(columns: dict[str, dict[str, np.ndarray]]) -> Iterator[tuple[str, ...]]:
    for name, mean in columns["mean"].items():
        for index in list(np.ndindex(mean.shape))[:MAX_ROWS]:
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            yield (label, *(f"{values[name][index]:.4g}" for values in columns.values()))
        if mean.size > MAX_ROWS:
            yield (f"{name}: {mean.size - MAX_ROWS} more",)
