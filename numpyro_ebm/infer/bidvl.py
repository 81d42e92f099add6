# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Bi-level doubly variational learning: an energy of the visible, with an encoder and a generator that replace its two
intractable distributions.

The model is decoupled, :math:`p_\theta(v, h) = e^{-E_\theta(v)} q_\phi(h|v) / Z`, so that the encoder is its posterior, and the
generator :math:`p_\omega(v, h) = p(h) \, p_\omega(v|h)` replaces the joint distribution. With
:math:`R = \log p(h) + \log p_\omega(v|h) - \log q_\phi(h|v)`,

.. math::

    \mathrm{KL}(p_\omega \| p_\theta) &= E_{p_\omega}[E_\theta + R] + \log Z, \\
    \mathrm{KL}(p_\theta \| p_\omega) &= E_{p_\theta}[-E_\theta - R] - \log Z,

whose sum is free of :math:`\log Z`. The last expectation of :math:`-R` is the negative ELBO of a variational autoencoder on
samples of the energy, which the data replace, since the energy is learned from them.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, lax
from jax.lax import stop_gradient
from numpyro.distributions import Distribution, kl_divergence
from numpyro.handlers import scale, uncondition
from numpyro.infer import TraceMeanField_ELBO

from numpyro_ebm._checks import require_bool, require_count, require_key, require_setting
from numpyro_ebm._map_over import map_over
from numpyro_ebm._pytree import as_array
from numpyro_ebm.evaluate.guide_weights import UNWEIGHTED, guide_findings, in_groups
from numpyro_ebm.evaluate.report import Finding, not_told
from numpyro_ebm.handlers import unnormalized
from numpyro_ebm.infer.bidvl_programs import plate_of, require_real, require_together, visible_of
from numpyro_ebm.infer.bidvl_settings import Difference, Hinge, LowerLevel, Softplus
from numpyro_ebm.infer.engine import Engine, compiled_method
from numpyro_ebm.infer.score_engine import require_same_params
from numpyro_ebm.optim import apply_gradient, as_transformation
from numpyro_ebm.program.batch import Batch, drawn_batch, first_batch, over_rows, whole_batch
from numpyro_ebm.program.pair import require_latent, same_supports
from numpyro_ebm.program.rows import per_row
from numpyro_ebm.program.run import (
    Run,
    at_mean,
    constrain_params,
    log_density_terms,
    own_key,
    require_program,
    run_model,
    strong_types,
    terms_of,
    total,
    unconstrain_params,
)
from numpyro_ebm.program.sites import Model, Site, are_possible, require_possible
from numpyro_ebm.program.visible import require_batch, require_reached, require_unscaled
from numpyro_ebm.samplers import Sampler
from numpyro_ebm.samplers.base import real_positions, require_finite_chains, require_sampler
from numpyro_ebm.train.health import Health, health_of

Params = dict[str, Any]
Mutable = dict[str, Any]


class BiDVLState(NamedTuple):
    """State of :class:`~numpyro_ebm.BiDVL`."""

    #: values of the param sites of energy, encoder and generator, constrained
    params: Params
    #: param sites of the energy, unconstrained
    theta: Params
    #: param sites of the encoder, unconstrained
    phi: Params
    #: param sites of the generator, unconstrained
    omega: Params
    #: of the energy's optimizer
    optim_state: Any
    #: of the encoder's optimizer
    encoder_optim_state: Any
    #: of the generator's optimizer
    generator_optim_state: Any
    #: mutable sites of the three, such as batch statistics
    mutable_state: Mutable
    #: (), the lower level in the last step
    lower_loss: Array
    #: key of the next step
    rng_key: Array
    #: (), int32, steps made
    num_steps: Array
    #: (), int32, steps that ``stable_update`` did not make
    num_skipped: Array
    #: :class:`~numpyro_ebm.infer.IterateAverage` of the iterates, where the engine averages
    average: Any = ()


class BiDVL(Engine):
    r"""Bi-level doubly variational learning of the energy of a visible, with an encoder and a generator (Kan et al. 2022).

    Three NumPyro programs of the same arguments, the first the visible :math:`v`, in a plate of its rows:

    * ``energy`` observes it at one site, with :class:`~numpyro_ebm.EnergyDistribution` or any other distribution, and has no
      latents;
    * ``generator`` draws latents :math:`h` and observes the visible at a site *of the same name*;
    * ``encoder`` draws the latents of the generator: generator and encoder are model and guide of an autoencoder.

    Where the plate is subsampled, in all three, they take the rows of a step as in :class:`~numpyro_ebm.ScoreMatching`.

    One step is ``upper.num_steps`` of the energy, then ``lower.num_steps`` of encoder and generator. The upper level is the
    energy of data minus that of generated visibles :math:`\hat v`, whose gradient is that of the likelihood where the generator
    has the energy's distribution. The lower level, :class:`~numpyro_ebm.infer.LowerLevel`, makes the generator follow the
    energy, and the encoder both of them: by default by the symmetric divergence of generator and energy.

    The loss of a step is the upper level before it. It is not a measure of fit: without the hinge it goes to 0 as the generator
    reaches the data, whatever the energy is.

    :param energy: a NumPyro program.
    :param encoder: a NumPyro program; also ``guide``.
    :param generator: a NumPyro program; also ``model``.
    :param optim: an optax transformation for the energy, or an optimizer of :mod:`numpyro.optim`.
    :param encoder_optim: the same for the encoder.
    :param generator_optim: the same for the generator.
    :param upper: the upper level: :class:`~numpyro_ebm.infer.Difference`, :class:`~numpyro_ebm.infer.Softplus` or
        :class:`~numpyro_ebm.infer.Hinge`.
    :param LowerLevel lower: the lower level, :class:`~numpyro_ebm.infer.LowerLevel`.
    :param bool noise: whether generated visibles are samples of :math:`p(v|h)`, or its means.
    :param Sampler sampler: moves generated visibles on the learned energy before the upper level sees them, such as
        :class:`~numpyro_ebm.MALA`: it then sees what has low energy but is not generated.
    :param int batch_size: where no plate is subsampled, rows of the first argument in every step of either level, drawn with
        replacement; all of them, in order, if not given or if it is their number. Arguments with a row for each are refused
        beside it.
    :param average_iterates: whether the parameters that ``run`` and ``get_params`` return are an average of the iterates, weighed
        by about the cube of the step, instead of the last; or another power than 3. ``state.params`` is the last.
    :raises ValueError: for settings out of range; from ``init``, naming the site, for an energy with latents, latents that only
        encoder or generator has, a visible of another shape or name, rows that are in no plate or not in the same one of all
        three, shared params, or data that are not finite.
    :raises NonFiniteError: during a run, with the last good state.

    **References**

    1. Kan et al., *Bi-level doubly variational learning for energy-based latent variable models*, CVPR 2022, arXiv:2203.14702.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import BiDVL, EnergyDistribution
        >>> def energy(v):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(v)):
        ...         numpyro.sample("v", EnergyDistribution(lambda v: (v - loc) ** 2 / 2), obs=v)
        >>> def generator(v):
        ...     mean = numpyro.param("mean", 0.0)
        ...     with numpyro.plate("data", len(v)):
        ...         h = numpyro.sample("h", dist.Normal(0, 1))
        ...         numpyro.sample("v", dist.Normal(mean + 0.8 * h, 0.6), obs=v)
        >>> def encoder(v):
        ...     shift = numpyro.param("shift", 0.0)
        ...     with numpyro.plate("data", len(v)):
        ...         numpyro.sample("h", dist.Normal(0.8 * v + shift, 0.6))
        >>> v = 2.9 + jax.random.normal(jax.random.key(0), (1000,))
        >>> engine = BiDVL(
        ...     energy, encoder, generator, optax.sgd(0.02), optax.sgd(0.1), optax.sgd(0.02)
        ... )
        >>> result = engine.run(jax.random.key(1), 2000, v, progress_bar=False)
        >>> print(f"learned {result.params['loc']:.1f}, exact {v.mean():.1f}")
        learned 2.9, exact 2.9
        >>> engine.sample(jax.random.key(2), result.state, 500, v)["v"].shape
        (500,)
    """

    state_class = BiDVLState

    def __init__(
        self,
        energy: Model,
        encoder: Model,
        generator: Model,
        optim: Any,
        encoder_optim: Any,
        generator_optim: Any,
        *,
        upper: Difference | Softplus | Hinge = Difference(),
        lower: LowerLevel = LowerLevel(),
        noise: bool = True,
        sampler: Sampler | None = None,
        batch_size: int | None = None,
        average_iterates: bool | float = False,
    ) -> None:
        super().__init__(average_iterates)
        self.upper: Difference | Softplus | Hinge = require_setting("upper", upper, (Difference, Softplus, Hinge))
        self.lower: LowerLevel = require_setting("lower", lower, (LowerLevel,))
        self.noise = require_bool("noise", noise, "whether generated visibles are samples or means")
        self.sampler = None if sampler is None else require_sampler("sampler", sampler)
        self.batch_size = None if batch_size is None else require_count("batch_size", batch_size)
        if self._num_unroll_steps and lower.latent == "complete":
            raise ValueError(
                "num_unroll_steps does not go with latent='complete': encoder and generator would not be at rest where the upper "
                "level looks, and its gradient would not be the likelihood's. Leave it out."
            )
        if self._num_unroll_steps and sampler is not None:
            raise ValueError(
                "sampler does not go with num_unroll_steps: moved visibles have no gradient, so that the upper level could not "
                "look through the lower one. Leave one of them out."
            )
        self.energy, self.encoder, self.generator = energy, encoder, generator
        for what, program in {"the energy": energy, "the encoder": encoder, "the generator": generator}.items():
            require_program(what, program)
        self.model, self.guide = generator, encoder  # as SVI calls them
        self.optim, self.encoder_optim, self.generator_optim = optim, encoder_optim, generator_optim
        self._elbo = TraceMeanField_ELBO() if lower.elbo is None else lower.elbo
        self._energy = unnormalized(energy)
        optims = {"optim": optim, "encoder_optim": encoder_optim, "generator_optim": generator_optim}
        self._transformations = tuple(as_transformation(each, name) for name, each in optims.items())

    @property
    def _num_unroll_steps(self) -> int:
        return self.upper.num_unroll_steps if isinstance(self.upper, Difference) else 0

    # After a fit.

    def sample(
        self, rng_key: Array, state: BiDVLState, num_samples: int, v: Array, *args: Any, noise: bool | None = None, **kwargs: Any
    ) -> dict[str, Array]:
        """Ancestral samples of the generator: latents, and the visible given them.

        :param rng_key: a key of :func:`jax.random.key`.
        :param int num_samples: how many.
        :param v: any batch of the visible, of which the shape of a row is used.
        :param args: the other arguments of the programs.
        :param bool noise: whether the visible is drawn, or at its mean given the latents; as for the fit if not given.
        :return: by site, of shape ``(num_samples,) + event_shape``.
        """
        rng_key, num_samples = require_key("rng_key", rng_key), require_count("num_samples", num_samples)
        v = as_array("v", v)
        rows = jnp.zeros((num_samples, *jnp.shape(v)[1:]), jnp.result_type(v))
        noise = self.noise if noise is None else require_bool("noise", noise)
        return self._generated(state, rng_key, noise, rows, *args, **kwargs)

    @compiled_method
    def reconstruct(self, state: BiDVLState, *args: Any, **kwargs: Any) -> Array:
        """The generator's mean at the encoder's mean.

        :param args: arguments of the programs, the first a batch of the visible.
        :return: of its shape.
        """
        levels = self._levels_on_all(state, args, kwargs)
        data = {**state.params, **state.mutable_state}
        latents = run_model(at_mean(levels.encoder), args, kwargs, state.rng_key, data=data).drawn
        generator = at_mean(levels.generator, sites={levels.visible})
        return run_model(generator, args, kwargs, state.rng_key, data={**data, **latents}).sites[levels.visible]["value"]

    @compiled_method
    def energies(self, state: BiDVLState, *args: Any, **kwargs: Any) -> Array:
        """The learned energy of every row: the higher, the less the row is like data.

        :param args: arguments of the programs, the first a batch of the visible.
        :return: of shape ``(batch,)``.
        """
        return self._levels_on_all(state, args, kwargs).energies(state.theta, args[0], state.mutable_state)[0]

    def refine(self, rng_key: Array, state: BiDVLState, sampler: Sampler, *args: Any, **kwargs: Any) -> Array:
        """Visibles moved with a sampler on the learned energy, each a chain of its own.

        :param rng_key: a key of :func:`jax.random.key`.
        :param sampler: such as :class:`~numpyro_ebm.MALA`.
        :param args: arguments of the programs, the first where the chains start, ``(batch,) + event_shape``.
        :return: of the shape of the first argument.
        :raises ValueError: naming the site, if the visible is bounded, where chains would leave its support.
        :raises FloatingPointError: if chains run away.
        """
        moved = self._moved(state, require_key("rng_key", rng_key), require_sampler("sampler", sampler), *args, **kwargs)
        return require_finite_chains(moved, "the sampler's step is too large for the learned energy, or they start so")

    @compiled_method
    def _generated(self, state: BiDVLState, rng_key: Array, noise: bool, *args: Any, **kwargs: Any) -> dict[str, Array]:
        levels = self._levels_on_all(state, args, kwargs)
        return levels.generate(state.omega, rng_key, state.mutable_state, noise=noise).drawn

    @compiled_method
    def _moved(self, state: BiDVLState, rng_key: Array, sampler: Sampler, *args: Any, **kwargs: Any) -> Array:
        levels = self._levels_on_all(state, args, kwargs)
        return levels.move(sampler, state.theta, args[0], state.mutable_state, rng_key)

    # What the loop needs.

    @property
    def _programs(self) -> tuple[Model, Model, Model]:
        return self._energy, self.encoder, self.generator

    def _unconstrained(self, state: BiDVLState) -> Params:
        return {**state.theta, **state.phi, **state.omega}

    def _levels_on_all(self, state: BiDVLState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Levels":
        """The levels on all rows that are given, whatever their number."""
        batch = whole_batch(self._programs, args, kwargs, own_key(state.rng_key), data=_data(state))
        return _Levels(self, state, batch, kwargs)

    def _start(
        self, rng_key: Array, init_params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[BiDVLState, Array]:
        require_batch(args, "the programs", "energies are differentiated in it")
        batch = first_batch(self._programs, args, kwargs, rng_key, data=init_params, batch_size=self.batch_size)
        programs = self._inspect(rng_key, init_params, batch, kwargs)
        unconstrained = [unconstrain_params(program.params, program.param_transforms) for program in programs]
        params = {name: value for program in programs for name, value in program.params.items()}
        of_theta, of_phi, of_omega = (move.init(x) for move, x in zip(self._transformations, unconstrained, strict=True))
        count = jnp.zeros((), jnp.int32)
        mutable = {name: value for program in programs for name, value in program.mutable_state.items()}
        loss = jnp.zeros((), jnp.result_type(float))
        theta, phi, omega = unconstrained
        state = BiDVLState(params, theta, phi, omega, of_theta, of_phi, of_omega, mutable, loss, rng_key, count, count)
        _, encoder, generator = programs
        good = over_rows(lambda rows: are_possible(self._observed(rng_key, params, rows, kwargs)), batch, args[0]).all()
        return strong_types(state), good & same_supports(generator, encoder)

    def _inspect(self, rng_key: Array, given: Params, batch: Batch, kwargs: dict[str, Any]) -> tuple[Run, Run, Run]:
        """Runs of the three programs, which are refused where they do not belong together."""
        args = batch.args
        energy = run_model(batch.of(self._energy), args, kwargs, rng_key, data=given)
        visible = visible_of(energy, args[0])
        try:
            encoder = run_model(batch.of(self.encoder), args, kwargs, rng_key, data=given)
        except TypeError as error:
            raise ValueError(f"the encoder failed on a batch of visibles of shape {args[0].shape}: {error}") from error
        except Exception as error:  # which may name what is to blame, as a value of init_params
            error.add_note(f"The encoder was run on a batch of visibles of shape {args[0].shape}.")
            raise
        generator = run_model(batch.of(self.generator), args, kwargs, rng_key, data=given)
        require_together(energy, encoder, generator, visible, args[0], noise=self.noise)
        for run in (energy, encoder, generator):
            require_unscaled(run)
        for what, program in (("the energy", self._energy), ("the generator", self.generator)):
            require_reached(visible, what, batch.of(program), args, kwargs, rng_key, data=given)
        known = sorted({**energy.params, **encoder.params, **generator.params})
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"init_params names {unknown}, which is no param site: the programs have {known}.")
        if self.sampler is not None:
            require_real(energy, visible)
        mutable = sorted({*encoder.mutable_state, *generator.mutable_state})
        if mutable and self._elbo.num_particles > 1:
            raise ValueError(
                f"site '{mutable[0]}': NumPyro's ELBOs drop mutable sites with num_particles={self._elbo.num_particles}: take one "
                "particle, or a network without running statistics."
            )
        return energy, encoder, generator

    def _observed(self, rng_key: Array, params: Params, batch: Batch, kwargs: dict[str, Any]) -> dict[str, Site]:
        """The visible as the energy observes it."""
        return run_model(batch.of(self._energy), batch.args, kwargs, rng_key, data=params).observed

    def _refuse(self, rng_key: Array, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = whole_batch(self._programs, args, kwargs, rng_key, data=params)
        require_possible(self._observed(rng_key, params, batch, kwargs))
        encoder = run_model(batch.of(self.encoder), batch.args, kwargs, rng_key, data=params)
        generator = run_model(batch.of(self.generator), batch.args, kwargs, rng_key, data=params)
        for name in generator.latents:
            require_latent(generator.sites[name], encoder, ("generator", "encoder"))

    def _step(self, state: BiDVLState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BiDVLState, Array, Health]:
        rng_key, upper_key, lower_key = jax.random.split(state.rng_key, 3)
        upper_keys = jax.random.split(upper_key, self.upper.num_steps)
        lower_keys = jax.random.split(lower_key, self.lower.num_steps)
        settings: Any = {"data": _data(state), "batch_size": self.batch_size}
        inspected = _Levels(self, state, first_batch(self._programs, args, kwargs, rng_key, **settings), kwargs)

        def levels_on(key: Array) -> _Levels:
            return inspected.on(drawn_batch(self._programs, args, kwargs, key, **settings))

        def lower(state: BiDVLState, key: Array) -> tuple[BiDVLState, Array]:
            return self._lower_step(levels_on, state, state.theta, key)

        new, losses = lax.scan(partial(self._upper_step, levels_on), state, upper_keys)
        new, lower_losses = lax.scan(lower, new, lower_keys)
        params = inspected.constrained(new.theta, new.phi, new.omega)
        new = new._replace(params=params, lower_loss=lower_losses[-1], rng_key=rng_key)
        health = health_of("loss", losses[0]) | health_of("lower loss", new.lower_loss)
        health |= health_of("param", {**new.theta, **new.phi, **new.omega}) | health_of("mutable", new.mutable_state)
        return new, losses[0], health

    def _upper_step(self, levels_on: Callable[[Array], "_Levels"], state: BiDVLState, rng_key: Array) -> tuple[BiDVLState, Array]:
        batch_key, unroll_key, draw_key = jax.random.split(rng_key, 3)
        levels, keys = levels_on(batch_key), upper_keys(draw_key)

        def objective(theta: Params) -> tuple[Array, tuple[Array, Mutable]]:
            return self._upper(levels, state, theta, unroll_key, keys)

        (value, (visible, mutable)), gradient = jax.value_and_grad(objective, has_aux=True)(state.theta)
        theta, optim_state = apply_gradient(self._transformations[0], gradient, state.optim_state, state.theta)
        state = state._replace(theta=theta, optim_state=optim_state, mutable_state=mutable)
        if self.lower.latent == "complete":
            gradient = jax.grad(levels.encoder_divergence)(state.phi, state.omega, visible, state.mutable_state, keys.rest)
            phi, optim_state = apply_gradient(self._transformations[1], gradient, state.encoder_optim_state, state.phi)
            state = state._replace(phi=phi, encoder_optim_state=optim_state)
        return state, value

    def _upper(
        self, levels: "_Levels", state: BiDVLState, theta: Params, unroll_key: Array, keys: "UpperKeys"
    ) -> tuple[Array, tuple[Array, Mutable]]:
        """The upper level, after the lower one was looked ahead of as a function of the energy."""
        ahead = state
        if self._num_unroll_steps:
            unroll_keys = jax.random.split(unroll_key, self._num_unroll_steps)
            ahead, _ = lax.scan(lambda s, key: self._lower_step(lambda _: levels, s, theta, key), state, unroll_keys)
        return levels.upper(theta, ahead.phi, ahead.omega, state.mutable_state, keys)

    def _lower_step(
        self, levels_on: Callable[[Array], "_Levels"], state: BiDVLState, theta: Params, rng_key: Array
    ) -> tuple[BiDVLState, Array]:
        batch_key, draw_key = jax.random.split(rng_key)
        levels = levels_on(batch_key)
        lower = jax.value_and_grad(levels.lower, argnums=(1, 2), has_aux=True)
        (value, mutable), (of_phi, of_omega) = lower(theta, state.phi, state.omega, state.mutable_state, draw_key)
        phi, encoder_state = apply_gradient(self._transformations[1], of_phi, state.encoder_optim_state, state.phi)
        omega, generator_state = apply_gradient(self._transformations[2], of_omega, state.generator_optim_state, state.omega)
        new = state._replace(phi=phi, omega=omega, encoder_optim_state=encoder_state, generator_optim_state=generator_state)
        return new._replace(mutable_state=mutable), value

    def _loss(self, state: BiDVLState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        unroll_key, draw_key = jax.random.split(state.rng_key)
        keys = upper_keys(draw_key)
        return self._upper(self._levels_on_all(state, args, kwargs), state, state.theta, unroll_key, keys)[0]

    def _findings(self, rng_key: Array, state: BiDVLState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Finding]:
        if why := self._no_density:
            return [not_told("", "agreement of energy and generator", why)]
        fix = (
            "generated visibles are not distributed as the energy says, so that its gradient is not the likelihood's. Take a "
            "larger family for generator and encoder, more LowerLevel(num_steps=), or a smaller learning rate for the energy."
        )
        weighed = self._weigh_generator(state, rng_key, *args, **kwargs)
        of_site = partial(guide_findings, fix=fix, least=UNWEIGHTED, whose="generator")
        return [finding for site, log_weights in weighed.items() for finding in of_site(site, log_weights)]

    @property
    def _no_density(self) -> str:
        """Why minus the energy is the log density of nothing that the generator could be compared with, if so."""
        if isinstance(self.upper, Hinge):
            return "with upper=Hinge() the energy tells data from other inputs, and is that of no density"
        if not self.noise:
            return "with noise=False the energy is learned from means, which have no density that it could be compared with"
        if self.lower.latent != "exact" or self.lower.latent_weight != 1:
            return "with other latent terms than LowerLevel(latent='exact', latent_weight=1) minus the energy is no log density"
        return ""

    @partial(compiled_method, cheaply=True)
    def _weigh_generator(self, state: BiDVLState, rng_key: Array, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Log weights of samples of the generator for the rows of a step, ``(num_samples, rows)``, by the name of the visible."""
        batch_key, rng_key = jax.random.split(rng_key)
        batch = drawn_batch(self._programs, args, kwargs, batch_key, data=_data(state), batch_size=self.batch_size)
        levels = _Levels(self, state, batch, kwargs)

        def weigh(key: Array, num_samples: int) -> Array:
            return map_over(partial(levels.log_weights, state), jax.random.split(key, num_samples))

        return {levels.visible: in_groups(weigh, rng_key, batch.args[0])}

    def _fix(self) -> str:
        return "take smaller learning rates, upper=Hinge(), or spectral normalization of the energy's network."


class UpperKeys(NamedTuple):
    """Who uses which randomness in the upper level."""

    generate: Array
    refine: Array
    rest: Array  # of the lower level that was looked ahead of, or of the encoder's own step


def upper_keys(rng_key: Array) -> UpperKeys:
    """The keys of one evaluation of the upper level."""
    return UpperKeys(*jax.random.split(rng_key, 3))


class _Levels:
    """The three programs on one batch, as functions of unconstrained parameters: theta, phi and omega."""

    def __init__(self, engine: BiDVL, state: BiDVLState, batch: Batch, kwargs: dict[str, Any]) -> None:
        self.engine, self.kwargs = engine, kwargs
        self._show(batch)
        keys = jax.random.split(own_key(state.rng_key), 3)
        self.energy_key = keys[0]  # every site of it has a value
        programs = zip((self.energy, self.encoder, self.generator), keys, strict=True)
        energy, encoder, generator = (run_model(each, batch.args, kwargs, key, data=_data(state)) for each, key in programs)
        require_same_params(energy, state.theta, "the energy")
        require_same_params(encoder, state.phi, "the encoder")
        require_same_params(generator, state.omega, "the generator")
        self._of_theta, self._of_phi, self._of_omega = (each.param_transforms for each in (energy, encoder, generator))
        self._of_energy, self.visible = energy, visible_of(energy, self.v)
        self.plate = plate_of(energy, self.visible, len(self.v))
        self._row_dim = -len(generator.sites[self.visible]["fn"].batch_shape)  # the rows are outermost

    def _show(self, batch: Batch) -> None:
        self.energy, self.encoder, self.generator = map(batch.of, self.engine._programs)
        self.v, *self.rest = batch.args

    def on(self, batch: Batch) -> "_Levels":
        """The same programs on another batch."""
        other = copy.copy(self)
        other._show(batch)
        return other

    def constrained(self, theta: Params, phi: Params, omega: Params) -> Params:
        """All params at unconstrained values."""
        return {
            **constrain_params(theta, self._of_theta),
            **constrain_params(phi, self._of_phi),
            **constrain_params(omega, self._of_omega),
        }

    def energies(self, theta: Params, v: Array, mutable: Mutable) -> tuple[Array, Mutable]:
        """The energy of every row, ``(batch,)``."""
        data = {**constrain_params(theta, self._of_theta), **mutable}
        terms, run = log_density_terms(self.energy, (v, *self.rest), self.kwargs, self.energy_key, data=data, latents={})
        return -per_row(terms, run, self.plate), {**mutable, **run.mutable_state}

    def generate(self, omega: Params, rng_key: Array, mutable: Mutable, *, noise: bool | None = None) -> Run:
        """A run of the generator that draws the visible too, or takes its mean."""
        noise = self.engine.noise if noise is None else noise
        generator = uncondition(self.generator) if noise else at_mean(self.generator, sites={self.visible})
        data = {**constrain_params(omega, self._of_omega), **mutable}
        return run_model(generator, (self.v, *self.rest), self.kwargs, rng_key, data=data)

    def encode(self, phi: Params, v: Array, rng_key: Array, mutable: Mutable, latents: Params) -> Run:
        """A run of the encoder at given latents, or that draws what is not given."""
        data = {**constrain_params(phi, self._of_phi), **mutable, **latents}
        return run_model(self.encoder, (v, *self.rest), self.kwargs, rng_key, data=data)

    def upper(
        self, theta: Params, phi: Params, omega: Params, mutable: Mutable, keys: "UpperKeys"
    ) -> tuple[Array, tuple[Array, Mutable]]:
        """The energy of data over that of generated visibles, and these as they were generated."""
        unrolled = self.engine._num_unroll_steps > 0
        if not unrolled:
            phi, omega = stop_gradient((phi, omega))
        generated = self.generate(omega, keys.generate, mutable)
        visible, mutable = generated.sites[self.visible]["value"], {**mutable, **generated.mutable_state}
        sampler = self.engine.sampler
        refined = visible if sampler is None else self.move(sampler, theta, visible, mutable, keys.refine)
        of_data, mutable = self.energies(theta, self.v, mutable)
        of_generated, mutable = self.energies(theta, refined, mutable)
        value = self.engine.upper.contrast(of_data, of_generated)
        if unrolled:
            rest, mutable = self._rest(theta, phi, omega, generated, mutable, keys.rest)
            value = value - rest
        return value, (visible, mutable)

    def move(self, sampler: Sampler, theta: Params, v: Array, mutable: Mutable, rng_key: Array) -> Array:
        """Visibles after a run of a sampler on the energy, each a chain of its own; without gradient."""
        require_real(self._of_energy, self.visible)
        theta, v = stop_gradient((theta, real_positions(v)))

        def log_prob(v: Array) -> Array:
            return -self.energies(theta, v, mutable)[0]

        return sampler.run(rng_key, log_prob, sampler.init(v, log_prob)).position

    def lower(self, theta: Params, phi: Params, omega: Params, mutable: Mutable, rng_key: Array) -> tuple[Array, Mutable]:
        """The energy of generated visibles, the latent term, and the autoencoder's loss: a mean over rows."""
        draw_key, rest_key = jax.random.split(rng_key)
        generated = self.generate(omega, draw_key, mutable)
        mutable = {**mutable, **generated.mutable_state}
        energies, mutable = self.energies(theta, generated.sites[self.visible]["value"], mutable)
        rest, mutable = self._rest(theta, phi, omega, generated, mutable, rest_key)
        return energies.mean() + rest, mutable

    def _rest(
        self, theta: Params, phi: Params, omega: Params, generated: Run, mutable: Mutable, rng_key: Array
    ) -> tuple[Array, Mutable]:
        latent_key, vae_key = jax.random.split(rng_key)
        latent, mutable = self.latent_term(phi, generated, mutable, latent_key)
        vae, mutable = self.vae_loss(theta, phi, omega, mutable, vae_key)
        return self.engine.lower.latent_weight * latent + self.engine.lower.vae_weight * vae, mutable

    def latent_term(self, phi: Params, generated: Run, mutable: Mutable, rng_key: Array) -> tuple[Array, Mutable]:
        """How well the encoder tells what latents the visibles were generated from: a mean over rows."""
        visible = generated.sites[self.visible]["value"]
        latents = {name: value for name, value in generated.drawn.items() if name != self.visible}
        if self.engine.lower.latent == "exact":
            encoder = self.encode(phi, visible, rng_key, mutable, latents)
            of_encoder = terms_of(encoder)
            term = total(terms_of(generated)) - total({name: of_encoder[name] for name in latents})
        elif self.engine.lower.latent == "offset":  # the encoder's params are held fixed, and not what it makes of the visible
            encoder = self.encode(stop_gradient(phi), visible, rng_key, mutable, latents)
            term = total({name: (encoder.sites[name]["fn"].mean - h) ** 2 for name, h in latents.items()})
        else:
            encoder = self.encode(phi, visible, rng_key, mutable, {})
            term = total({name: (encoder.sites[name]["value"] - h) ** 2 for name, h in latents.items()})
        return term / len(self.v), {**mutable, **encoder.mutable_state}

    def log_weights(self, state: BiDVLState, rng_key: Array) -> Array:
        """Of one generated visible, with its latents, of every row: the decoupled model over the generator, but for log Z."""
        generated = self.generate(state.omega, rng_key, state.mutable_state, noise=True)
        visible = generated.sites[self.visible]["value"]
        latents = {name: value for name, value in generated.drawn.items() if name != self.visible}
        with numpyro.validation_enabled(False):  # a relaxed bit is not a bit
            encoder = self.encode(state.phi, visible, rng_key, state.mutable_state, latents)
            of_encoder, of_generator = terms_of(encoder), terms_of(generated)
            log_q = per_row({name: of_encoder[name] for name in latents}, encoder, self.plate)
            return (
                log_q - self.energies(state.theta, visible, state.mutable_state)[0] - per_row(of_generator, generated, self.plate)
            )

    def vae_loss(self, theta: Params, phi: Params, omega: Params, mutable: Mutable, rng_key: Array) -> tuple[Array, Mutable]:
        """NumPyro's ELBO loss of generator and encoder on data, a mean over rows that may be weighted by the energy."""
        encoder, generator = self.encoder, self.generator
        if (bounds := self.engine.lower.weight_bounds) is not None:
            energies, _ = self.energies(theta, self.v, mutable)
            weights = energy_weights(energies, bounds).reshape(-1, *[1] * (-1 - self._row_dim))
            encoder, generator = scale(encoder, scale=weights), scale(generator, scale=weights)
        params = {**constrain_params(phi, self._of_phi), **constrain_params(omega, self._of_omega), **mutable}
        args = (self.v, *self.rest)
        found = self.engine._elbo.loss_with_mutable_state(rng_key, params, generator, encoder, *args, **self.kwargs)
        return found["loss"] / len(self.v), {**mutable, **(found["mutable_state"] or {})}

    def encoder_divergence(self, phi: Params, omega: Params, visible: Array, mutable: Mutable, rng_key: Array) -> Array:
        """``latent_weight`` times KL(q(h | v) || p(h)) at the visibles that :meth:`upper` generated: a mean over rows."""
        encoder = self.encode(phi, stop_gradient(visible), rng_key, mutable, {})
        data = {**constrain_params(omega, self._of_omega), **mutable, **encoder.drawn}
        prior = run_model(self.generator, (self.v, *self.rest), self.kwargs, own_key(rng_key), data=data)
        terms = {name: _divergence(encoder.sites[name], prior.sites[name]["fn"]) for name in encoder.latents}
        return self.engine.lower.latent_weight * total(terms) / len(self.v)


def _data(state: BiDVLState) -> dict[str, Any]:
    return {**state.params, **state.mutable_state}


def energy_weights(energies: Array, bounds: tuple[float, float]) -> Array:
    """Weights of rows of data that stand for samples of the energy, with mean 1 and without gradient."""
    weights = jnp.clip(jnp.exp(jnp.mean(energies) - energies), *bounds)
    return stop_gradient(weights / weights.mean())


def _divergence(site: dict[str, Any], prior: Distribution) -> Array:
    """KL of a site's distribution from another, by one sample where there is no formula."""
    try:
        return jnp.asarray(kl_divergence(site["fn"], prior))
    except NotImplementedError:
        return site["fn"].log_prob(site["value"]) - prior.log_prob(site["value"])
