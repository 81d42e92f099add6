# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Distributions whose density is known up to its normalizer (normalizing constant, partition function), and the guard that keeps
their gradients correct.

.. math:: p(x) = \frac{1}{Z} \exp(-E(x)) \, b(x), \qquad Z = \int \exp(-E(x)) \, b(x) \, dx,

with an energy :math:`E` that the user writes for one event and a base :math:`b`: a distribution
(:class:`TiltedDistribution`) or a flat measure (:class:`EnergyDistribution`). ``log_prob`` leaves out :math:`\log Z`.
That is harmless for every gradient in :math:`x` and wrong for every gradient in what :math:`Z` depends on, so such a
gradient raises :class:`NormalizerError` unless :class:`~numpyro_ebm.negative_phase` supplies the missing term.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.distributions import Distribution, ExpandedDistribution, biject_to, constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.util import sum_rightmost, validate_sample

from numpyro_ebm._checks import require_key
from numpyro_ebm._compat import calling_distribution, calling_site, comparing_kernel, layers
from numpyro_ebm._compiled import compiled
from numpyro_ebm._map_over import map_over
from numpyro_ebm._precision import is_coarse, tell_coarse_density
from numpyro_ebm._pytree import arrays_and_rest, as_array, join
from numpyro_ebm.distributions.base_measure import BaseMeasure, is_flat
from numpyro_ebm.distributions.guard import NormalizerError, place, refuse_gradient, unknown_log_normalizer
from numpyro_ebm.distributions.known import is_inside, is_known, log_prob_inside
from numpyro_ebm.samplers import MALA, Reference, Sampler, Target
from numpyro_ebm.samplers.base import require_sampler


class TiltedDistribution(Distribution):
    r"""A distribution reweighted by an energy: :math:`p(x) = \exp(-E(x)) \, b(x) / Z`.

    The prior of latent-space energy-based models: ``base`` a standard normal, ``energy`` a neural network.

    The energy is written for **one event** and returns a scalar; this class maps it over sample, plate and batch
    dimensions. It may be a function, an Equinox or Flax NNX module or a :class:`jax.tree_util.Partial` (their arrays
    become leaves of this pytree, the rest is static), or a function of ``(params, x)`` with ``params`` a pytree. What a
    plain function closes over is static, so inside :func:`numpyro.contrib.control_flow.scan` pass it as ``params``. With
    ``batch_shape``, every array of the energy and of ``params`` has those leading dimensions: a stack of energies.

    ``log_prob`` is unnormalized (``Z`` taken as 1). See :class:`~numpyro_ebm.negative_phase` to learn an energy's parameters.
    ``sample`` runs ``sampler`` from samples of ``initial``: it is **approximate**: the longer the chain, the better the samples.

    :param Distribution base: the base :math:`b`; its batch shape is broadcast with ``batch_shape``.
    :param energy: ``energy(x)``, or ``energy(params, x)`` if ``params`` is given; ``x`` of shape ``event_shape``.
    :param params: parameters of the energy, a pytree of arrays.
    :param tuple batch_shape: leading dimensions of the energy's arrays and of ``params``.
    :param Sampler sampler: how :meth:`sample` draws, and how the chains of :class:`~numpyro_ebm.negative_phase` move unless it
        is given another; 200 steps of :class:`~numpyro_ebm.MALA` for the former and 10 for the latter if not given.
    :param Distribution initial: where chains start; the base if not given.
    :param Distribution reference: what chains jump to (see :class:`~numpyro_ebm.MALA`), normalized and easy to sample; the base if
        not given, ``initial`` where the base is flat. It should be as wide as the distribution that is learned.
    :raises TypeError: if ``sampler`` is not a :class:`~numpyro_ebm.samplers.Sampler`, or ``base``, ``initial`` or ``reference`` not
        a NumPyro distribution.
    :raises ValueError: at first use, if the energy does not map one event to one real scalar.

    **References**

    1. Pang et al., *Learning latent space energy-based prior model*, NeurIPS 2020, arXiv:2006.08205, eq. 2.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import TiltedDistribution
        >>> base = dist.Normal(0, 1).expand([2]).to_event(1)
        >>> prior = TiltedDistribution(base, lambda x: -3 * x[0])  # exactly N([3, 0], I)
        >>> prior.sample(jax.random.key(0), (1000,)).mean(0).round().astype(int)
        Array([3, 0], dtype=int32)
        >>> prior.score(jnp.zeros(2))
        Array([3., 0.], dtype=float32)
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields: tuple[str, ...] = ("base", "initial", "params", "reference", "_energy_arrays")
    pytree_aux_fields: tuple[str, ...] = ("_energy_batch_ndim", "_energy_static", "_event_ndims", "guarded", "sampler")
    # The inherited defaults are wrong: has_rsample would be vacuously true, and enumerating a vector event gives
    # NumPyro's Gibbs samplers wrong answers silently.
    has_rsample = False
    has_enumerate_support = False
    reparametrized_params: list[str] = []
    is_normalized: bool = False
    """Whether ``log_prob`` includes ``log Z``. A subclass that knows its normalizer says so here."""
    # If no sampler is given: chains that go on from step to step of a fit need few moves, draws from nothing need many.
    _default_sampler: Sampler = MALA(num_steps=200)
    _default_chain_sampler: Sampler = MALA()

    def __init__(
        self,
        base: Distribution,
        energy: Callable[..., Any],
        *,
        params: Any = None,
        batch_shape: tuple[int, ...] = (),
        sampler: Sampler | None = None,
        initial: Distribution | None = None,
        reference: Distribution | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not callable(energy):
            raise TypeError(f"energy must be a function of one event, got {type(energy).__name__}.")
        if not isinstance(base, Distribution):
            raise TypeError(f"base must be a NumPyro distribution, got {type(base).__name__}: it comes before the energy.")
        for name, fn in {"initial": initial, "reference": reference}.items():
            if fn is not None and not isinstance(fn, Distribution):
                raise TypeError(f"{name} must be a NumPyro distribution such as dist.Normal(0, 1), got {type(fn).__name__}.")
            if fn is not None and fn.event_shape != base.event_shape:
                raise ValueError(f"{name} has event_shape {fn.event_shape}, the base has {base.event_shape}: they must agree.")
        if reference is not None and (not is_known(reference) or reference.support.is_discrete != base.support.is_discrete):
            raise ValueError(
                f"reference, a {type(reference).__name__}, must be a normalized distribution on events of the same kind, with "
                "samples of its own: neither masked, nor flat, nor discrete where the events are real."
            )
        self.base, self.initial, self.reference, self.params = base, initial, reference, params
        self.sampler = None if sampler is None else require_sampler("sampler", sampler)
        self.guarded = not self.is_normalized
        self._energy_arrays, self._energy_static = arrays_and_rest(energy)
        arrays = jax.tree.leaves((self._energy_arrays, params))
        for array in arrays:
            if jnp.shape(array)[: len(batch_shape)] != tuple(batch_shape):
                raise ValueError(
                    f"with batch_shape={batch_shape} every array of the energy must lead with it, one has shape {jnp.shape(array)}."
                )
        # The rank of each array without its batch, so that a batch added by vmap or scan can be told from it.
        self._event_ndims = tuple(jnp.ndim(array) - len(batch_shape) for array in arrays)
        self._energy_batch_ndim = len(batch_shape)
        batch_shape = lax.broadcast_shapes(tuple(batch_shape), base.batch_shape)
        for name, fn in {"initial": initial, "reference": reference}.items():
            if fn is None or _fits(fn.batch_shape, batch_shape):
                continue
            raise ValueError(
                f"{name} has the batch shape {fn.batch_shape}, which does not fit into that of the energy, {batch_shape}: "
                "give one distribution for all chains, or one for each element; .to_event(n) makes dimensions those of an event."
            )
        super().__init__(batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def energy(self) -> Callable[..., Any]:
        """The energy as it was given."""
        return join(self._energy_arrays, self._energy_static)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the base."""
        return self.base.support

    @property
    def _energy_batch_shape(self) -> tuple[int, ...]:
        arrays = jax.tree.leaves((self._energy_arrays, self.params))
        shapes = [jnp.shape(array)[: jnp.ndim(array) - ndim] for array, ndim in zip(arrays, self._event_ndims, strict=True)]
        return max(shapes, key=len, default=())

    @validate_sample
    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        r""":math:`\log b(x) - E(x)`, without :math:`\log Z`.

        :param value: of shape ``sample_shape + batch_shape + event_shape``.
        :return: of shape ``sample_shape + batch_shape``.
        :raises NormalizerError: in the backward pass, if the result is differentiated with respect to anything but ``value``;
            immediately if the density is used as a component of a mixture, for example, where ``Z`` does not cancel.
        """
        value = self.as_events(value)
        if self.guarded and (whole := calling_distribution((TiltedDistribution,))) is not None:
            raise NormalizerError(
                f"{place(calling_site(whole))}: {type(whole).__name__} mixes densities, and the unknown normalizer of an energy "
                "does not cancel there. Write the whole as one energy."
            )
        if self.guarded and (kernel := comparing_kernel()) is not None:
            self._refuse_ratios(kernel, value)
        # A lambda, because a bound method of a distribution that holds tracers could not be hashed.
        density, params = jax.closure_convert(lambda x: self._log_density(x), value)
        log_prob = density(value, *params)
        if self.guarded:
            log_prob = log_prob + unknown_log_normalizer(calling_site(self), log_prob.dtype, params)
        return log_prob

    def _refuse_ratios(self, kernel: str, value: Array) -> None:
        """Refuses densities to who compares them at other latents, if the energy depends on one: the guard sees gradients alone."""
        depends = jax.make_jaxpr(lambda x: self._log_density(x))(value).consts
        if any(isinstance(x, jax.core.Tracer) for x in depends):
            raise NormalizerError(
                f"{place(calling_site(self))}: {kernel} compares densities at different latents, and this energy is traced: its "
                "unknown normalizer changes with the latent that it depends on (doubly intractable). Make that a fixed value; "
                "numpyro_ebm.check_model tells what it is."
            )

    def score(self, value: Array) -> Array:
        r""":math:`\nabla_x \log p(x)`, exact whatever the normalizer.

        :param value: of shape ``sample_shape + batch_shape + event_shape``.
        :return: of the shape of ``value``.
        :raises TypeError: if the support is discrete or the value is not real.
        """
        if self.support.is_discrete or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(
                f"{place(calling_site(self))}: a score needs real events, got dtype {jnp.result_type(value)} "
                f"on the support {self.support}. Convert the value to float, or use a sampler for discrete events."
            )
        return jax.grad(lambda x: self._log_density(x).sum())(self.as_events(value))

    @property
    def mean(self) -> Array:
        """Not known in closed form, unless a subclass says it.

        :raises NotImplementedError: with what to take in its place.
        """
        raise NotImplementedError(self._no_moment("mean", "mean"))

    @property
    def variance(self) -> Array:
        """As :attr:`mean`.

        :raises NotImplementedError: with what to take in its place.
        """
        raise NotImplementedError(self._no_moment("variance", "var"))

    def _no_moment(self, moment: str, method: str) -> str:
        why = "" if self.is_normalized else ", as its normalizer is not"
        return (
            f"{place(calling_site(self))}: the {moment} of {type(self).__name__} is not known in closed form{why}. Estimate it "
            f"from many samples, .sample(key, (1000,)).{method}(0), or of a fit from its chains, negative_phase.sample_chains."
        )

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Approximate samples: independent short chains from ``initial``, moved by ``sampler``.

        The default sampler adapts its step to the chains that are drawn together. A single sample is a chain alone, which is then
        a few percent too narrow (see :class:`~numpyro_ebm.MALA`): ask for many at once, or fix the step,
        ``sampler=MALA(step_size, 200, adapt=False)``.

        A distribution far narrower than where its chains start takes longer, most of all one sample at a time, as
        :class:`numpyro.infer.Predictive` draws: from N(0, 1) the default is right down to a standard deviation of .01, and at
        .001 seven samples of ten are left where they started. Nothing tells. There give ``initial`` about as narrow, and the step,
        ``sampler=MALA(sd**2, 200, adapt=False)``, or 1000 moves, ``sampler=MALA(num_steps=1000)``. Where dimensions are correlated,
        200 moves are as many as reach over a ridge some ten times longer than it is wide.

        :param key: a key of :func:`jax.random.key`.
        :return: of shape ``sample_shape + batch_shape + event_shape``, without a gradient in what the energy depends on: one that
            needs it raises :class:`NormalizerError`.
        :raises NotImplementedError: if there is nothing to start from, or the support is discrete and no sampler is given.
        :raises RuntimeError: if chains end where the density is 0 or NaN, as those do that start there. Under ``jit``, which cannot
            raise, these samples are NaN where the support is continuous.
        """
        if not isinstance(sample_shape, tuple | list):
            raise TypeError(f"sample_shape must be a tuple, got {sample_shape!r}: ({sample_shape!r},) for one dimension.")
        num_chains = math.prod(sample_shape)
        if num_chains == 0:
            return jnp.zeros(self.shape(tuple(sample_shape)))
        key = require_key("key", key, "in a model, numpyro.handlers.seed gives it")
        samples, is_possible = compiled(_chains_from_nothing, self, key, num_chains)
        return self._without_gradient(self._possible(samples, is_possible).reshape(self.shape(tuple(sample_shape))))

    def _possible(self, samples: Array, is_possible: Array) -> Array:
        """The same samples, those made NaN that the density makes impossible; an error where that is known."""
        if not isinstance(is_possible, jax.core.Tracer) and not is_possible.all():
            num_bad = int((~is_possible).sum())
            raise RuntimeError(
                f"{place(calling_site(self))}: {num_bad} of {is_possible.size} samples are where the density is 0, NaN or inf, or "
                "on the boundary of its support. Chains that start there do not leave, and unadjusted ones may step there: give "
                "initial= a distribution inside, support= to an energy that ends, or a sampler with a smaller step."
            )
        if not jnp.issubdtype(samples.dtype, jnp.floating):
            return samples
        return jnp.where(is_possible.reshape(is_possible.shape + (1,) * self.event_dim), samples, jnp.nan)

    def _without_gradient(self, samples: Array) -> Array:
        """The same samples, with a guard where an energy's parameters would be learned from what they do to its samples."""
        if self.is_normalized or not jnp.issubdtype(samples.dtype, jnp.floating):
            return samples
        _, params = jax.closure_convert(lambda x: self._log_density(x), samples)
        return samples + refuse_gradient(
            f"{place(calling_site(self))}: samples of an energy have no gradient in what it depends on, and what is computed of "
            "them would be learned without it. Sample the site in the guide too, give it a value, or hold its energy fixed.",
            samples.dtype,
            params,
        )

    def _validate_sample(self, value: Any) -> Array:
        return super()._validate_sample(self.as_events(value))  # NumPyro's knows no lists and tables

    def initial_chains(self, key: Array, num_chains: int) -> Array:
        """Where chains start: samples of ``initial``, of shape ``(num_chains,) + batch_shape + event_shape``.

        :raises NotImplementedError: if neither ``initial`` nor the base can be sampled.
        """
        source = self.base if self.initial is None else self.initial
        try:
            return self.as_events(source.expand(self.batch_shape).sample(key, (num_chains,)))
        except NotImplementedError:
            raise NotImplementedError(
                f"{place(calling_site(self))}: chains have nowhere to start, because {type(source).__name__} cannot be sampled. "
                "Pass initial= a distribution with the same event_shape to start from."
            ) from None

    # A sampler that differentiates moves in unconstrained space, where the density has the Jacobian of the transform.

    @property
    def chain_sampler(self) -> Sampler:
        """How the chains of :class:`~numpyro_ebm.negative_phase` move if it names no sampler: by ``sampler``, if it was given."""
        return self._default_chain_sampler if self.sampler is None else self.sampler

    @property
    def supports(self) -> list[Any]:
        """The supports of what chains move."""
        return [self.support]

    def to_chain(self, value: Array, sampler: Sampler) -> Array:
        """Events as positions of ``sampler``: unconstrained if it uses the score."""
        value = self.as_events(value)
        return biject_to(self.support).inv(value) if self._unconstrains(sampler) else value

    def from_chain(self, position: Array, sampler: Sampler) -> Array:
        """Positions of ``sampler`` as events."""
        return biject_to(self.support)(position) if self._unconstrains(sampler) else position

    def chain_log_prob(self, sampler: Sampler) -> Target:
        """The log density of positions of ``sampler``, with the path to it from what chains jump to, where there is that."""
        fn = self._reference()

        def log_density(value: Array, beta: Any) -> Array:
            if fn is None or fn is self.base or (isinstance(beta, float) and beta == 1):
                return self._log_density(value, beta)
            return jnp.where(beta < 1, (1 - beta) * log_prob_inside(fn, value), 0.0) + beta * self._log_density(value)

        return Target(self._of_positions(log_density, sampler), self._chain_reference(sampler))

    def _chain_reference(self, sampler: Sampler) -> Reference | None:
        """The distribution at the start of the path, in the space of the chains."""
        fn = self._reference()
        if fn is None:
            return None

        def sample(rng_key: Array, n: int) -> Array:
            return self.to_chain(fn.expand(self.batch_shape).sample(rng_key, (n,)), sampler)

        return Reference(sample, self._of_positions(partial(log_prob_inside, fn), sampler))

    def _reference(self) -> Distribution | None:
        """What chains can jump to, and the path to the density begins at: ``reference``, else the base, else ``initial``."""
        if self.reference is not None:
            return self.reference
        fn = self.initial if is_flat(self.base) else self.base
        if fn is None or energy_site(fn) is not None or fn.support.is_discrete != self.support.is_discrete:
            return None
        return fn if is_known(fn) else None

    def _of_positions(self, log_density: Callable[..., Array], sampler: Sampler) -> Callable[..., Array]:
        """A log density of events as one of positions of ``sampler``."""
        if not self._unconstrains(
            sampler
        ):  # only the density keeps its chains in the support, and NumPyro's not without validation
            return lambda x, *beta: jnp.where(is_inside(self, x), log_density(x, *beta), -jnp.inf)
        transform = biject_to(self.support)

        def of_position(position: Array, *beta: Any) -> Array:
            value = transform(position)
            log_det = transform.log_abs_det_jacobian(position, value)
            return log_density(value, *beta) + sum_rightmost(log_det, self.event_dim - transform.codomain.event_dim)

        return of_position

    def _unconstrains(self, sampler: Sampler) -> bool:
        if not sampler.uses_score:
            return False
        if self.support.is_discrete:
            raise NotImplementedError(
                f"{place(calling_site(self))}: {type(sampler).__name__} needs the score, and the support {self.support} is "
                "discrete. Pass sampler= one that moves discrete events."
            )
        return True

    def unguarded(self) -> Self:
        """The same distribution with the guard lifted: its gradients leave out ``d log Z / d theta`` silently."""
        unguarded = copy.copy(self)
        unguarded.guarded = False
        if energy_site(self.base) is not None:
            unguarded.base = without_guard(self.base)
        return unguarded

    def as_events(self, value: Any) -> Array:
        """``value`` as an array of events: real numbers, whatever they were given as, unless the support is discrete.

        :raises ValueError: if its shape does not end in ``event_shape``.
        """
        value = as_array(f"a value of {place(calling_site(self))}", value)
        if jnp.iscomplexobj(value):
            raise TypeError(f"{place(calling_site(self))}: a value of {value.dtype} is complex, and events are real.")
        shape = value.shape[max(value.ndim - self.event_dim, 0) :]
        if shape != self.event_shape:
            raise ValueError(
                f"{place(calling_site(self))}: a value of shape {value.shape} does not end in the event shape {self.event_shape}."
            )
        if not self.support.is_discrete and (is_coarse(value) or not jnp.issubdtype(value.dtype, jnp.floating)):
            value = value.astype(jnp.result_type(float))
        return value

    def _log_density(self, value: Array, beta: Any = 1.0) -> Array:
        """``log b(x) - beta E(x)`` of a batch of events, unguarded."""
        energy_batch = self._energy_batch_shape
        batch = lax.broadcast_shapes(value.shape[: value.ndim - self.event_dim], energy_batch)
        arrays = (self._energy_arrays, self.params)
        energy = self._energy_of_event
        # From the innermost batch dimension outwards, up to the last that has an energy for every element. Arrays of size 1 are
        # shared, not copied.
        stacked = [size != 1 for size in reversed(energy_batch)]
        while stacked and not stacked[-1]:
            stacked.pop()
        if energy_batch:
            sizes = tuple(size for size in energy_batch if size != 1)
            ndims = iter(self._event_ndims)
            arrays = jax.tree.map(lambda a: jnp.reshape(a, sizes + jnp.shape(a)[jnp.ndim(a) - next(ndims) :]), arrays)
        for is_stacked in stacked:
            energy = jax.vmap(energy, in_axes=(0 if is_stacked else None, 0))
        # All dimensions before are one for the energy: a network costs XLA on the CPU 1.6 times as much under two maps.
        inner = batch[len(batch) - len(stacked) :] + self.event_shape
        events = jnp.broadcast_to(value, batch + self.event_shape).reshape(math.prod(batch[: len(batch) - len(stacked)]), *inner)
        return self.base.log_prob(value) - beta * map_over(lambda x: energy(arrays, x), events).reshape(batch)

    def _energy_of_event(self, arrays: tuple[list[Any], Any], x: Array) -> Array:
        energy_arrays, params = arrays
        energy = join(energy_arrays, self._energy_static)
        try:
            value = jnp.asarray(energy(x) if params is None else energy(params, x))
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"energy of {place(calling_site(self))} failed on one event of shape {x.shape} and dtype {x.dtype} ({error}): "
                f"write it for one event, the distribution maps it over every batch.{self._forgotten_event}"
            ) from error
        except Exception as error:
            error.add_note(f"In the energy of {place(calling_site(self))}, on one event of shape {x.shape} and dtype {x.dtype}.")
            raise
        if value.shape != ():
            raise ValueError(
                f"energy of {place(calling_site(self))} must return a scalar for one event of shape {x.shape}, "
                f"it returned {value.shape}: index or squeeze it."
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"energy of {place(calling_site(self))} must return a real scalar, it returned dtype {value.dtype}: "
                "convert it to float."
            )
        return tell_coarse_density(
            f"energy of {place(calling_site(self))}",
            value,
            "convert what enters its last layer or sum, h.astype(jnp.float32). To convert the result alone is too late.",
        )

    @property
    def _forgotten_event(self) -> str:
        """What to do where events are numbers, and the batch may be meant as one event."""
        if self.event_shape or not self.batch_shape:
            return ""
        fix = f"the distribution event_shape={self.batch_shape[-1:]}" if is_flat(self.base) else "the base .to_event(1)"
        return f" Its batch_shape is {self.batch_shape}: where one event is of shape {self.batch_shape[-1:]}, give {fix}."

    # NumPyro collects field names through a set: their order, and so the order of a pytree's leaves, would depend on
    # PYTHONHASHSEED, and a distribution passed between processes would silently exchange its arrays.

    @classmethod
    def gather_pytree_data_fields(cls) -> tuple[str, ...]:
        # NumPyro takes all names of arg_constraints for attributes that can be set; a property reads one of ours from params
        fields = super().gather_pytree_data_fields()
        return tuple(sorted(field for field in fields if not isinstance(getattr(cls, field, None), property)))

    @classmethod
    def gather_pytree_aux_fields(cls) -> tuple[str, ...]:
        return tuple(sorted(super().gather_pytree_aux_fields()))


class EnergyDistribution(TiltedDistribution):
    r"""A distribution given by its energy: :math:`p(x) = \exp(-E(x)) / Z` on a support.

    The energy alone must make it integrable. Everything else is as in :class:`TiltedDistribution`, of which this is the
    case of a flat base; a flat base cannot be sampled, so :meth:`~TiltedDistribution.sample` and negative chains need ``initial``.

    :param energy: ``energy(x)``, or ``energy(params, x)`` if ``params`` is given; ``x`` of shape ``event_shape``.
    :param tuple event_shape: the shape of one event.
    :param support: a NumPyro constraint on one event, or on its elements; the reals if not given.
    :param params: parameters of the energy, a pytree of arrays.
    :param tuple batch_shape: leading dimensions of the energy's arrays and of ``params``.
    :param Sampler sampler: how :meth:`~TiltedDistribution.sample` draws, and how the chains of
        :class:`~numpyro_ebm.negative_phase` move unless it is given another; :class:`~numpyro_ebm.MALA` if not given.
    :param Distribution initial: where chains start.
    :param Distribution reference: what chains jump to (see :class:`~numpyro_ebm.MALA`); ``initial`` if not given.
    :raises ValueError: at first use, if the energy does not map one event to one real scalar.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import EnergyDistribution
        >>> double_well = EnergyDistribution(
        ...     lambda x: (x**2 - 1) ** 2, initial=dist.Normal(0, 1)
        ... )
        >>> double_well.log_prob(jnp.array([0.0, 1.0]))
        Array([-1., 0.], dtype=float32)
        >>> stack = EnergyDistribution(
        ...     lambda k, x: k * x**2, params=jnp.array([1.0, 10.0]), batch_shape=(2,)
        ... )
        >>> stack.log_prob(jnp.ones((5, 2))).shape
        (5, 2)
    """

    base: BaseMeasure

    def __init__(
        self,
        energy: Callable[..., Any],
        event_shape: tuple[int, ...] = (),
        *,
        support: constraints.Constraint = constraints.real,
        params: Any = None,
        batch_shape: tuple[int, ...] = (),
        sampler: Sampler | None = None,
        initial: Distribution | None = None,
        reference: Distribution | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(
            BaseMeasure(support, event_shape, validate_args=validate_args),
            energy,
            params=params,
            batch_shape=batch_shape,
            sampler=sampler,
            initial=initial,
            reference=reference,
            validate_args=validate_args,
        )


def _fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    """Whether arrays of one shape broadcast to another."""
    try:
        return lax.broadcast_shapes(shape, into) == into
    except ValueError:
        return False


def _chains_from_nothing(fn: TiltedDistribution, key: Array, num_chains: int) -> tuple[Array, Array]:
    """Where chains stand after one run of the sampler from where they start, and whether their density is finite there."""
    start_key, run_key = jax.random.split(key)
    sampler = fn._default_sampler if fn.sampler is None else fn.sampler
    target = fn.chain_log_prob(sampler)
    state = sampler.init(fn.to_chain(fn.initial_chains(start_key, num_chains), sampler), target)
    state = sampler.run(run_key, target, state)
    samples = lax.stop_gradient(fn.from_chain(state.position, sampler))
    density = fn._log_density(samples)
    is_possible = jnp.isfinite(density)
    if sampler.uses_score:  # a boundary is at infinity for it, and is never left
        is_possible &= jnp.isfinite(state.position).reshape(*density.shape, -1).all(-1)
    return samples, is_possible


@promote_batch_shape.register
def _promote_batch_shape_tilted(d: TiltedDistribution):  # type: ignore[no-untyped-def]
    # vmap and scan add leading dimensions to the arrays, which the recorded batch shape does not know of and which go
    # before every old dimension: of the base, of the energy, and of what one of them was broadcast to by the other.
    promoted, base = copy.copy(d), _promoted(d.base)
    if len(base.batch_shape) > len(d.base.batch_shape):
        base = _promoted(d.base.expand(d.batch_shape))
    num_new = max(len(d._energy_batch_shape) - d._energy_batch_ndim, 0)
    arrays = (d._energy_arrays, d.params)
    if num_new:
        axes = tuple(range(num_new, num_new + len(d.batch_shape) - d._energy_batch_ndim))
        arrays = jax.tree.map(lambda array: jnp.expand_dims(array, axes), arrays)
        promoted._energy_batch_ndim = num_new + len(d.batch_shape)
    promoted._energy_arrays, promoted.params = arrays
    promoted.base = base
    promoted.initial, promoted.reference = (None if fn is None else _promoted(fn) for fn in (d.initial, d.reference))
    promoted._batch_shape = lax.broadcast_shapes(base.batch_shape, promoted._energy_batch_shape, d.batch_shape)
    return promoted


def _promoted(fn: Distribution) -> Distribution:
    """A distribution with the dimensions that vmap added; one that was expanded inside vmap can then be sampled too.

    NumPyro's own promotion leaves the expanded dimensions in front of the new ones, where samples have neither the shape nor the
    order of the batch.
    """

    def expanded_again(fn: Any) -> Any:
        if isinstance(fn, ExpandedDistribution):
            return ExpandedDistribution(fn.base_dist, fn.batch_shape)
        if len(list(layers(fn))) > 1:
            fn = copy.copy(fn)
            fn.base_dist = expanded_again(fn.base_dist)
        return fn

    return expanded_again(promote_batch_shape(fn))


def energy_site(fn: Distribution) -> TiltedDistribution | None:
    """The energy distribution with an unknown normalizer inside a site's distribution, if there is one."""
    found = next((part for part in layers(fn) if isinstance(part, TiltedDistribution)), None)
    return None if found is None or found.is_normalized else found


def with_core(fn: Distribution, change: Callable[[Any], Distribution]) -> Distribution:
    """A site's distribution with what plates, masks and users wrap replaced by ``change`` of it, the wrappers kept."""
    if len(list(layers(fn))) == 1 or isinstance(fn, TiltedDistribution):
        return change(fn)
    changed = copy.copy(fn)
    changed.base_dist = with_core(fn.base_dist, change)
    return changed


def without_guard(fn: Distribution) -> Distribution:
    """A site's distribution with the guard of its energy lifted, plates and masks kept."""
    return with_core(fn, lambda core: core.unguarded())
