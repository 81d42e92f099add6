# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""A model whose factors couple flat sites, as one unnormalized distribution of all its sample sites.

.. math:: p_\theta(x) = \frac{1}{Z(\theta)} \exp \Big( \sum_s \ell_s(x; \theta) \Big),

with :math:`x` all sample sites, data included, and :math:`\ell_s` the log terms of the model. The gradient
:math:`\nabla \log Z = E_{p_\theta} [\nabla_\theta \sum_s \ell_s(x; \theta)]` is estimated from a pool of joint values, in which
the data are free (Tang et al., *Particle dynamics for latent-variable energy-based models*, 2025, arXiv:2510.15447).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.distributions import MaskedDistribution
from numpyro.handlers import block
from numpyro.primitives import Messenger

from numpyro_ebm._compat import layers
from numpyro_ebm._map_over import map_over
from numpyro_ebm.distributions.guard import NormalizerError
from numpyro_ebm.program.rows import ROUNDING, dim_of, per_row, shared_plates
from numpyro_ebm.program.run import Run, jacobians_of, log_density_terms, run_model, total
from numpyro_ebm.program.sites import FIELD, Model, is_factor, transform_of
from numpyro_ebm.samplers import MALA, Sampler, Target

Values = dict[str, Array]  # by sample site


class record_run(Messenger):
    """Notes what a run of a model was given, by the names that sites have inside this handler."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}  # param and mutable sites and indices of plates: what makes a second run the same
        self.values: Values = {}  # sample sites other than factors
        self.kinds: dict[str, str] = {}  # what handlers outside left of each site: "param", "latent" or "observed"
        self.lifted: str | None = None  # a param that has become a latent, if there is one
        self.masked: str | None = None  # a site that is masked, if there is one
        self._open: list[tuple[str | None, str]] = []
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        self._open.append((msg.get("name"), msg["type"]))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        name, kind = self._open.pop()
        if name is None:
            return
        if kind in ("param", "sample"):
            left = "param" if msg["type"] == "param" else "observed" if msg.get("is_observed") else "latent"
            self.kinds.setdefault(name, left)  # NumPyro's lift shows a param that is asked for again as observed
        if kind == "param" and msg["type"] == "sample":
            self.lifted = name
        if kind in ("param", "mutable", "plate"):
            self.given[name] = jax.tree.map(lambda x: x, msg["value"])  # a copy: mutable sites are updated in place
        elif kind == "sample":
            self._note(name, msg)

    def _note(self, name: str, msg: dict[str, Any]) -> None:
        self.masked = self.masked or (name if any(isinstance(part, MaskedDistribution) for part in layers(msg["fn"])) else None)
        if not is_factor(msg["fn"]):
            self.values[name] = lax.stop_gradient(jnp.asarray(msg["value"]))


class unobserved(Messenger):
    """Makes every sample site but factors a latent: data are forgotten."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"] and not is_factor(msg["fn"]):
            msg["is_observed"], msg["value"] = False, None


class RandomField:
    """The joint distribution of all sample sites of a model, with what chains need of an energy site.

    Values of the pool are constrained, by site, of shape ``(num_replicates,)`` + that of the site in one run of the model. If
    all sites lie in one plate, its rows are independent, and every row of every replicate is a chain of its own; otherwise a
    replicate is. A sampler sees the chains flat and unconstrained, as an array of shape ``(num_chains, num_elements)``.

    :param model: the model.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param rng_key: a key for what else the model draws.
    :param seen: the run of the model that the pool belongs to.
    :param int num_chains: chains to keep at least.
    :raises NormalizerError: if a param has become a latent.
    :raises ValueError: if a site is masked, or stands outside a subsampled plate.
    """

    chain_sampler: Sampler = MALA()
    """How its chains move if no sampler is named."""

    def __init__(
        self, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], rng_key: Array, seen: record_run, num_chains: int
    ) -> None:
        if seen.lifted is not None:
            raise NormalizerError(
                f"param '{seen.lifted}' of a random field has become a latent site, on which the field's normalizer then depends "
                "(doubly intractable): leave it a numpyro.param."
            )
        self._call = unobserved(model), args, kwargs, rng_key
        self._given = seen.given
        with block():
            self._program = run_model(*self._call, data={**seen.given, **seen.values})
        # the plate with most rows of those around every sample site, factors too
        shared = shared_plates(self._program, [name for name, site in self._program.sites.items() if site["type"] == "sample"])
        self._plate = max(shared, key=lambda name: len(self._program.plates[name].indices), default=None)
        _require_pool(self._program, self._plate, seen.masked)
        self._rows = 1 if self._plate is None else len(self._program.plates[self._plate].indices)
        self.num_replicates = max(1, math.ceil(num_chains / self._rows))
        self._transforms = {name: transform_of(self._program.sites[name]) for name in self._program.latents}
        self._values = {name: self._value(name) for name in self._program.latents}

    def start(self, rng_key: Array, given: Mapping[str, Array]) -> Values:
        """Where the pool starts: ``given`` by site, and the values of this run, data and latents, for the rest.

        :raises ValueError: if ``given`` names an unknown site or has another shape.
        """
        if unknown := sorted(set(given) - set(self._values)):
            raise ValueError(f"init_chains['{FIELD}'] names {unknown}: the sites of the field are {sorted(self._values)}.")
        return {name: self._start_of(name, rng_key, given) for name in self._values}

    @property
    def supports(self) -> list[Any]:
        """The supports of its sites."""
        return [self._program.sites[name]["fn"].support for name in self._values]

    def to_chain(self, x: Values, sampler: Any = None) -> Array:
        """The pool as positions of a sampler, of shape ``(num_chains, num_elements)``."""
        parts = [self._as_rows(name, position) for name, position in self._unconstrained(x).items()]
        return jnp.concatenate(parts, -1).reshape(self.num_replicates * self._rows, -1)

    def from_chain(self, position: Array, sampler: Any = None) -> Values:
        """Positions of a sampler as a pool."""
        return {name: self._transforms[name](value) for name, value in self._by_site(position).items()}

    def chain_log_prob(self, sampler: Any = None) -> Target:
        """The log density of positions of a sampler, every chain by itself; without gradients in the parameters.

        The path to it starts at the flat measure of the supports, which has no normalizer: there is no reference.
        """
        given = lax.stop_gradient(self._given)

        def log_prob(position: Array, beta: Any) -> Array:
            return self._log_density_of_chains(self._by_site(position), given, beta).reshape(-1)

        return Target(log_prob)

    def _log_density(self, x: Values) -> Array:
        """The log density of every replicate as the model scales it, of shape ``(num_replicates,)``.

        The positions are held in unconstrained space, where the Jacobian makes the gradient right in a support as well.
        """
        position = lax.stop_gradient(self._unconstrained(x))
        return map_over(lambda x: total(self._terms(x, self._given)[0]), position)

    def mixes_fields(self, x: Values) -> Array:
        """Whether rows of a subsampled plate have fields of their own: whether it matters in which row a value stands."""
        if self._plate is None or not self._program.plates[self._plate].is_subsampled:
            return jnp.zeros((), bool)
        position, given = lax.stop_gradient((self._unconstrained(x), self._given))
        rolled = {name: jnp.roll(value, 1, self._axis(name)) for name, value in position.items()}
        here = jnp.roll(self._log_density_of_chains(position, given), 1, 1)
        there = self._log_density_of_chains(rolled, given)
        return jnp.any(jnp.abs(here - there) > ROUNDING * (1 + jnp.abs(here)))

    def _terms(self, x: Values, given: dict[str, Any]) -> tuple[dict[str, Array], Run]:
        with block():
            return log_density_terms(*self._call, data=given, latents=x)

    def _log_density_of_chains(self, position: Values, given: dict[str, Any], beta: Any = 1.0) -> Array:
        """Of shape ``(num_replicates, rows)``, without the scale of a subsampled plate: a row's own density has none.

        :param beta: what the log terms of the model are multiplied by; not so the Jacobians of the transforms.
        """

        def rows(x: Values) -> Array:
            terms, program = self._terms(x, given)
            jacobians = jacobians_of(program)
            terms = {name: term if name in jacobians else beta * term for name, term in terms.items()}
            return total(terms)[None] if self._plate is None else per_row(terms, program, self._plate)

        return map_over(rows, position)

    def _value(self, name: str) -> Array:
        """A site's value in this run: of its full shape, and real where data were given as integers."""
        site = self._program.sites[name]
        value = jnp.asarray(site["value"])
        value = value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.result_type(float))
        return jnp.broadcast_to(value, lax.broadcast_shapes(value.shape, site["fn"].shape()))

    def _start_of(self, name: str, rng_key: Array, given: Mapping[str, Array]) -> Array:
        value, transform = self._values[name], self._transforms[name]
        shape = (self.num_replicates, *value.shape)
        if name in given:
            start = jnp.asarray(given[name], value.dtype)
            if start.shape != shape:
                raise ValueError(f"site '{name}': init_chains['{FIELD}'] has shape {start.shape}, it must be {shape}.")
            inside = self._program.sites[name]["fn"].support(start)
            if not isinstance(inside, jax.core.Tracer) and not inside.all():
                raise ValueError(f"site '{name}': init_chains['{FIELD}'] has values outside the support, or nan.")
            return start
        position = jnp.broadcast_to(transform.inv(value), (self.num_replicates, *transform.inverse_shape(value.shape)))
        inside = jax.random.uniform(rng_key, position.shape, position.dtype, -2, 2)  # for data on the edge of their support
        return lax.stop_gradient(transform(jnp.where(jnp.isfinite(position), position, inside)))

    def _unconstrained(self, x: Values) -> Values:
        return {name: transform.inv(x[name]) for name, transform in self._transforms.items()}

    def _axis(self, name: str) -> int:
        """Where an unconstrained value of the pool has the rows, counted from the right."""
        return dict(self._program.latents[name].plates)[self._plate or ""]

    def _as_rows(self, name: str, position: Array) -> Array:
        """Of shape ``(num_replicates, rows, elements)``."""
        position = position if self._plate is None else jnp.moveaxis(position, self._axis(name), 1)
        return position.reshape(self.num_replicates, self._rows, -1)

    def _by_site(self, position: Array) -> Values:
        """Flat positions, of any number of chains, as unconstrained values by site."""
        out, begin = {}, 0
        for name, transform in self._transforms.items():
            shape = transform.inverse_shape(self._values[name].shape)
            if self._plate is not None:
                axis = self._axis(name) % len(shape)
                shape = (shape[axis], *shape[:axis], *shape[axis + 1 :])
            size = math.prod(shape) // self._rows
            part = position[:, begin : begin + size].reshape(self.num_replicates, *shape).astype(self._values[name].dtype)
            out[name] = part if self._plate is None else jnp.moveaxis(part, 1, self._axis(name))
            begin += size
        return out


def _require_pool(program: Run, plate: str | None, masked: str | None) -> None:
    if masked is not None:
        raise ValueError(
            f"site '{masked}' of a random field is masked, and where it is, the field has no density to draw the pool from: "
            "leave those rows out of the data instead."
        )
    for name in program.subsampled:
        if name != plate:
            outside = [s for s, site in program.sites.items() if site["type"] == "sample" and dim_of(site, name) is None]
            where = (
                f"site '{outside[0]}' of a random field stands outside" if outside else "a random field stands in a second plate"
            )
            raise ValueError(
                f"{where} the subsampled plate '{name}', so that the rows of a batch are no field by themselves: put all sites "
                "and factors into the one plate that is subsampled, or do not subsample."
            )
