# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Maximum marginal likelihood with interacting particles: PGD, IPLA, EBIPLA, SOUL and the kinetic forms.

Parameters :math:`\theta` that maximize :math:`\log p_\theta(y) = \log \int p_\theta(x, y) \, dx` by Fisher's identity
:math:`\nabla \log p_\theta(y) = E_{p_\theta(x \mid y)} [\nabla_\theta \log p_\theta(x, y)]`, with the expectation over a cloud of
N particles that follow the posterior by Langevin dynamics while the parameters move:

.. math::

    x_i &\leftarrow x_i + h \, \nabla_x \log p_\theta(x_i, y) + \sqrt{2h} \, \xi_i, \\
    \theta &\leftarrow \theta + \frac{h}{N} \sum_i \nabla_\theta \log p_\theta(x_i, y) \; (+ \sqrt{2h / N} \, \xi_0).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_sample

import numpyro_ebm.optim as optim_module
from numpyro_ebm._checks import require_bool, require_count, require_instance, require_one_of, require_setting
from numpyro_ebm._map_over import map_over
from numpyro_ebm.distributions.guard import NormalizerError
from numpyro_ebm.evaluate.negative_chains import ChainNumbers
from numpyro_ebm.evaluate.report import Finding
from numpyro_ebm.handlers import negative_phase
from numpyro_ebm.infer.engine import Engine, compiled_method
from numpyro_ebm.infer.particle_settings import Averaged, Maximize, Newton, Summed
from numpyro_ebm.infer.particle_start import are_good_rows, draw_particles, require_good_rows, require_learnable, require_noise
from numpyro_ebm.infer.phase import Phase, has_chains, health_of_chains
from numpyro_ebm.infer.stability import Particles, fix_of, largest_curvature, running_stiffness, warnings_of
from numpyro_ebm.infer.step import Health, Part, health_of, is_bad, keep
from numpyro_ebm.optim import (
    Schedule,
    as_transformation,
    kinetic_langevin,
    kinetic_langevin_splitting,
    langevin,
    require_step,
)
from numpyro_ebm.program.check import ModelReport
from numpyro_ebm.program.rows import by_site, gather, scatter, shared_plates, subsampled_indices
from numpyro_ebm.program.run import (
    Run,
    constrain_params,
    constrained,
    draw_latents,
    log_density_terms,
    own_key,
    require_all_rows,
    require_program,
    run_model,
    strong_types,
    total,
    unconstrain_params,
)
from numpyro_ebm.program.sites import Model
from numpyro_ebm.samplers import UnadjustedLangevin


class ParticleState(NamedTuple):
    """State of :class:`ParticleMMLE`."""

    #: param sites, constrained
    params: dict[str, Any]
    #: param sites, unconstrained: what the optimizer moves
    unconstrained: dict[str, Any]
    #: what the optimizer keeps
    optim_state: Any
    #: latent sites, unconstrained, of shape ``(num_particles,) + batch_shape + event_shape`` with a row for all data
    particles: Particles
    #: what the dynamics of the particles keep, such as velocities, with a row for all data
    dynamics_state: Any
    #: negative chains, and other mutable sites of the model
    mutable_state: dict[str, Any]
    #: by latent site and element of its event: running mean over plates of h times the particles' variance of the score
    stiffness: dict[str, Array]
    #: the key of the next step
    rng_key: Array
    #: (), int32: steps made
    num_steps: Array
    #: (), int32: steps that ``stable_update`` skipped
    num_skipped: Array


class ParticleMMLE(Engine):
    r"""Maximum marginal likelihood of the :func:`numpyro.param` sites of a model, its latents as interacting particles.

    Used like :class:`numpyro.infer.SVI`, without a guide: every latent site is a cloud of ``num_particles`` points that follow
    the posterior at the current parameters. Any model with continuous latents will do. Constrained latents move in unconstrained
    space; energy priors need :class:`~numpyro_ebm.negative_phase`, which is put around the model unless it is already there. In a
    subsampled plate every row of the data keeps its own particles, and those of the batch move; the plate's scale counts for the
    parameters and not for the particles.

    The published algorithms are settings of this engine, by the constructors :meth:`pgd`, :meth:`ipla`, :meth:`ebipla`,
    :meth:`soul`, :meth:`pqn`, :meth:`pmgd`, :meth:`kiplmc1`, :meth:`kiplmc2` and :meth:`mpd`.

    The loss is minus the mean over particles of the log joint density, up to unknown normalizers. It is not a bound on the
    likelihood, and it cannot be used to compare two fits.

    :param model: a NumPyro model, or :class:`negative_phase(model, ...) <numpyro_ebm.negative_phase>` to say how its negative
        chains move.
    :param optim: how parameters move: an optax transformation, with :func:`~numpyro_ebm.langevin` for the theory's noise, or an
        optimizer of :mod:`numpyro.optim`; :class:`~numpyro_ebm.infer.Newton` of either, which gets the Newton direction; or
        :class:`~numpyro_ebm.infer.Maximize`, by which they go to the maximum for the current cloud.
    :param int num_particles: particles per latent.
    :param step_size: the step :math:`h` of the particles, or a schedule of it by the number of steps made. A particle is stable
        below 2 / (largest curvature of its negative log posterior); see :meth:`stability_limit`.
    :param drift: :class:`~numpyro_ebm.infer.Summed`: the optimizer gets the gradient of the loss, a sum over data, at
        temperature ``1 / num_particles``; :class:`~numpyro_ebm.infer.Averaged`: both divided by the number of data.
    :param str order: ``"jacobi"``: particles and parameters move from the same point; ``"gauss_seidel"``: parameters see the
        particles moved.
    :param str noise: with subsampling, ``"batch"``: the particles of the batch move with noise of variance 2h and the others rest
        (Kuntz et al.); ``"all"``: the batch drifts, and all particles get noise of variance 2h / L, L the number of batches
        in the data (Marks et al.); of several moves of a batch, that is the noise of the last. Without subsampling they are
        the same.
    :param int num_moves: moves of the particles per step of the parameters.
    :param bool average_moves: whether the parameters see the mean gradient over all those moves, instead of the last.
    :param dynamics: how particles move instead of :func:`~numpyro_ebm.langevin`, such as
        :func:`~numpyro_ebm.kinetic_langevin`.
    :param init_strategy: a NumPyro ``init_to_...`` strategy for the particles; samples of the prior if not given, of the base
        for an energy.
    :raises ValueError: for a setting out of range; when a model is first seen, naming the site, for a discrete latent, no
        latent or no param site, a latent outside a subsampled plate, or data that are not finite.
    :raises NormalizerError: when a model is first seen, naming the site, if an unknown normalizer depends on a latent, or on
        parameters that do not move by their gradient.
    :raises NonFiniteError: during a run, with the last good state.

    **References**

    1. Kuntz, Lim and Johansen, *Particle algorithms for maximum likelihood training of latent variable models*, AISTATS 2023.
    2. Akyildiz et al., *Interacting particle Langevin algorithm for maximum marginal likelihood estimation*, ESAIM: PS 29
       (2025), arXiv:2303.13429.
    3. Marks, Wang and Akyildiz, *Energy-based interacting particle Langevin algorithm*, UAI 2026, arXiv:2510.12311.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro_ebm import ParticleMMLE
        >>> def model(y):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(loc, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> y = 2.9 + jax.random.normal(jax.random.key(0), (100,))
        >>> engine = ParticleMMLE(model, optax.sgd(0.01), num_particles=20, step_size=0.1)
        >>> result = engine.run(jax.random.key(1), 500, y, progress_bar=False)
        >>> print(f"learned {result.params['loc']:.1f}, exact {y.mean():.1f}")
        learned 3.0, exact 3.0
        >>> engine.get_particles(result.state, y)["x"].shape
        (20, 100)
    """

    state_class = ParticleState
    kept_by_step = frozenset({"particles", "dynamics_state"})

    def __init__(
        self,
        model: Model,
        optim: Any,
        num_particles: int,
        step_size: float | Schedule,
        *,
        drift: Summed | Averaged = Summed(),
        order: str = "jacobi",
        noise: str = "batch",
        num_moves: int = 1,
        average_moves: bool = False,
        dynamics: optax.GradientTransformationExtraArgs | None = None,
        init_strategy: Callable[..., Any] = init_to_sample,
    ) -> None:
        super().__init__()
        self.num_particles = require_count("num_particles", num_particles, why="a cloud needs particles")
        self.step_size = require_step(step_size)
        self.drift: Summed | Averaged = require_setting("drift", drift, (Summed, Averaged))
        self.order = require_one_of("order", order, ("jacobi", "gauss_seidel"))
        self.noise = require_one_of("noise", noise, ("batch", "all"))
        self.num_moves = require_count("num_moves", num_moves, why="particles must move")
        self.average_moves = require_bool("average_moves", average_moves)
        if dynamics is not None and noise == "all":
            raise ValueError("noise='all' is noise between visits of overdamped particles: use noise='batch' with other dynamics.")
        wanted = "one of NumPyro's strategies, such as init_to_median"
        self.init_strategy = require_instance("init_strategy", init_strategy, ("__call__",), wanted)
        self.model, self.optim = model, optim
        self.dynamics = None if dynamics is None else as_transformation(dynamics, "dynamics")
        moving = optax.identity() if isinstance(optim, Maximize) else optim.optim if isinstance(optim, Newton) else optim
        self._transformation = as_transformation(moving)
        require_program("the model", model)
        if self.dynamics is not None:
            require_noise(self.dynamics)
        self._phase = Phase(model)
        self._inner = self._phase.inner

    # The published algorithms.

    @classmethod
    def pgd(cls, model: Model, optim: Any = None, *, num_particles: int, step_size: float | Schedule, **settings: Any) -> Self:
        """Particle gradient descent (Kuntz et al. 2023): summed drift, no noise on the parameters.

        :param optim: gradient descent of step ``step_size`` if not given.
        """
        optim = optax.sgd(step_size) if optim is None else optim
        return cls(model, optim, num_particles, step_size, **settings)

    @classmethod
    def ipla(cls, model: Model, *, num_particles: int, step_size: float | Schedule, **settings: Any) -> Self:
        """The interacting particle Langevin algorithm (Akyildiz et al. 2025): PGD with noise on the parameters."""
        return cls(model, langevin(step_size), num_particles, step_size, **settings)

    @classmethod
    def ebipla(
        cls,
        model: Model,
        optim: Any = None,
        *,
        num_particles: int,
        step_size: float | Schedule,
        num_chains: int = 256,
        prior_step_size: float = 0.1,
        num_prior_steps: int = 60,
        **settings: Any,
    ) -> Self:
        r"""The energy-based interacting particle Langevin algorithm (Marks et al. 2026, algorithms 1 and 2).

        Averaged drift, noise on all particles at every step, and for an energy prior short-run chains that restart from
        its base at every step. Unadjusted short-run chains are biased in what they learn (see *Conventions* in the
        documentation): give the model as ``negative_phase(model, ...)`` for other chains.

        :param optim: Langevin of step ``step_size`` with the theory's noise :math:`\sqrt{2h / (MN)}` if not given; the paper's
            experiments use Adam.
        :param int num_chains: negative chains at every energy site, independent of the size of the batch.
        :param float prior_step_size: their step h. Of where they start chains keep :math:`(1 - hc)^J` in a direction of curvature
            c: .002 with the defaults for the base's own where that is a standard normal.
        :param int num_prior_steps: their number of steps J.
        """
        if not isinstance(model, negative_phase):
            sampler = UnadjustedLangevin(prior_step_size, num_prior_steps)
            model = negative_phase(model, num_chains=num_chains, sampler=sampler, persistent=False)
        optim = langevin(step_size) if optim is None else optim
        return cls(model, optim, num_particles, step_size, **{"drift": Averaged(), "noise": "all", **settings})

    @classmethod
    def soul(cls, model: Model, optim: Any = None, *, num_moves: int, step_size: float | Schedule, **settings: Any) -> Self:
        """Stochastic optimization by unadjusted Langevin (De Bortoli et al. 2021): one chain, averaged over its moves.

        :param optim: gradient descent of step ``step_size`` if not given.
        :param int num_moves: moves of the chain per step of the parameters.
        """
        optim = optax.sgd(step_size) if optim is None else optim
        settings = {"num_particles": 1, "order": "gauss_seidel", "average_moves": True, **settings}
        return cls(model, optim, step_size=step_size, num_moves=num_moves, **settings)

    @classmethod
    def pqn(cls, model: Model, *, num_particles: int, step_size: float | Schedule, **settings: Any) -> Self:
        """Particle quasi-Newton (Kuntz et al. 2023): PGD by the Hessian in the parameters, which must be few."""
        return cls(model, Newton(optax.sgd(step_size)), num_particles, step_size, **settings)

    @classmethod
    def pmgd(cls, model: Model, *, num_particles: int, step_size: float | Schedule, **settings: Any) -> Self:
        """Particle marginal gradient descent (Kuntz et al. 2023): parameters always at the maximum for the cloud."""
        return cls(model, Maximize(), num_particles, step_size, **{"order": "gauss_seidel", **settings})

    @classmethod
    def kiplmc1(cls, model: Model, *, num_particles: int, step_size: float, friction: float, **settings: Any) -> Self:
        """Kinetic interacting particle Langevin, exponential integrator (Oliva and Akyildiz 2024)."""
        move = kinetic_langevin(step_size, friction)
        return cls(model, move, num_particles, step_size, dynamics=move, **settings)

    @classmethod
    def kiplmc2(cls, model: Model, *, num_particles: int, step_size: float, friction: float, **settings: Any) -> Self:
        """Kinetic interacting particle Langevin, splitting integrator (Oliva and Akyildiz 2024)."""
        move = kinetic_langevin_splitting(step_size, friction)
        return cls(model, move, num_particles, step_size, dynamics=move, **settings)

    @classmethod
    def mpd(
        cls,
        model: Model,
        optim: Any = None,
        *,
        num_particles: int,
        step_size: float,
        friction: float = 0.9,
        inverse_mass: float = 1.0,
        **settings: Any,
    ) -> Self:
        """Momentum particle descent (Lim et al. 2024): kinetic particles, parameters by Nesterov's momentum without noise."""
        if optim is None:
            optim = kinetic_langevin(step_size, friction, inverse_mass=inverse_mass, noise=False, lookahead=True)
        dynamics = kinetic_langevin(step_size, friction, inverse_mass=inverse_mass)
        return cls(model, optim, num_particles, step_size, dynamics=dynamics, **settings)

    # Between runs.

    @compiled_method
    def get_particles(self, state: ParticleState, *args: Any, **kwargs: Any) -> Particles:
        """The particles, constrained, for all rows of the data.

        :param args: arguments of the model.
        :return: by latent site, of shape ``(num_particles,) + batch_shape + event_shape``.
        """
        data = {**state.params, **state.mutable_state}
        return jax.vmap(lambda x: constrained(self._inner, args, kwargs, state.rng_key, data=data, latents=x))(state.particles)

    def replicate(self, state: ParticleState, num_particles: int | None = None) -> ParticleState:
        """A state with every particle copied, to go on from after a warm-up with fewer (Marks et al. 2026, algorithm 3).

        Copies stay together until noise has separated them, about 1 / (h * curvature) moves.

        :param int num_particles: particles in the new state, a multiple of those in the old; this engine's if not given.
        :raises ValueError: if it is not a multiple.
        """
        num_particles = self.num_particles if num_particles is None else require_count("num_particles", num_particles)
        self._require_state(state)
        old = _num_particles(state.particles)
        if num_particles % old:
            raise ValueError(f"num_particles={num_particles} is no multiple of the state's {old}: copies would weigh unequally.")

        def repeat(name: str, x: Array) -> Array:
            return jnp.repeat(x, num_particles // old, 0)

        return state._replace(
            particles=by_site(repeat, state.particles, state.particles),
            dynamics_state=by_site(repeat, state.particles, state.dynamics_state),
        )

    def stability_limit(self, state: ParticleState, *args: Any, **kwargs: Any) -> float:
        """The step above which unadjusted particles diverge where they stand: 2 / (largest curvature), by power iteration.

        :param args: arguments of the model.
        :return: an estimate for the particles that move in the next step, from above; inf where no direction is curved.
        """
        curvature = float(self._largest_curvature(state, *args, **kwargs))
        return 2 / curvature if curvature > 0 else float("inf")

    @compiled_method
    def _largest_curvature(self, state: ParticleState, *args: Any, **kwargs: Any) -> Array:
        batch = _Batch(self._inner, state, state.rng_key, args, kwargs)
        return largest_curvature(partial(batch.scores, state.unconstrained), batch.gather(state.particles), state.rng_key)

    @compiled_method
    def _finite_terms(self, state: ParticleState, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """By site, whether its log density is finite at each particle and event."""
        batch = _Batch(self._inner, state, state.rng_key, args, kwargs)
        data = batch.data(state.unconstrained)
        return map_over(
            lambda x: jax.tree.map(jnp.isfinite, batch.terms(self._inner, data=data, latents=x)[0]), batch.gather(state.particles)
        )

    # What the loop needs.

    def _refuse(self, rng_key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look_key = own_key(rng_key)  # as _start does
        latents = draw_latents(self._inner, args, kwargs, look_key, data=params, init_strategy=self.init_strategy)
        require_good_rows(self._inner, args, kwargs, look_key, data=params, latents=latents)

    def _inspect(self, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelReport:
        """What is to be known of the normalizers; refuses what negative chains cannot make right."""
        report = self._phase.report(given, args, kwargs)
        if isinstance(self.optim, (Newton, Maximize)) and report.learned:
            site = report.learned[0]
            raise NormalizerError(
                f"site '{site.name}': its unknown normalizer depends on the parameters, and optim={type(self.optim).__name__}(...) "
                "goes by the unnormalized density, of which negative chains give no more than the gradient. Take an optimizer of "
                "the gradient: pgd, ipla, ebipla or soul in the place of pqn and pmgd."
            )
        return report

    def _num_data(self, program: Run) -> int:
        """What the gradient is divided by."""
        if isinstance(self.drift, Summed):
            return 1
        if self.drift.num_data is not None:
            return self.drift.num_data
        shared = shared_plates(program, program.latents)
        if not shared:
            raise ValueError(
                "drift=Averaged() divides by the number of data, and no plate has all latent sites in it: give it, "
                "drift=Averaged(num_data=...), or take drift=Summed()."
            )
        return int(np.prod([program.plates[plate].size for plate in shared]))

    def _start(
        self, rng_key: Array, init_params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ParticleState, Array]:
        look_key = own_key(rng_key)  # of runs from which nothing is kept
        positions = draw_latents(self._inner, args, kwargs, look_key, data=init_params, init_strategy=self.init_strategy)
        program = run_model(self._inner, args, kwargs, look_key, data=init_params, latents=positions)
        require_learnable(program, init_params)
        self._num_data(program)  # which a drift may need to be given
        params = unconstrain_params(program.params, program.param_transforms)
        rng_key, run_key, draw_key = jax.random.split(rng_key, 3)
        data = constrain_params(params, program.param_transforms)
        particles = draw_particles(
            self._inner, args, kwargs, draw_key, program, self.num_particles, data=data, init_strategy=self.init_strategy
        )
        report = self._inspect(init_params, args, kwargs)
        mutable_state = self._phase.start(report, run_key, args, kwargs, data=data, latents=_first(particles))
        stiffness = {name: jnp.zeros(x.shape[x.ndim - program.latents[name].event_dim :], x.dtype) for name, x in particles.items()}
        count = jnp.zeros((), jnp.int32)
        state = ParticleState(
            params=data,
            unconstrained=params,
            optim_state=self._transformation.init(params),
            particles=particles,
            dynamics_state=() if self.dynamics is None else self.dynamics.init(particles),
            mutable_state=mutable_state,
            stiffness=stiffness,
            rng_key=rng_key,
            num_steps=count,
            num_skipped=count,
        )
        return strong_types(state), are_good_rows(self._inner, args, kwargs, look_key, program, data=data, latents=positions)

    def _step(self, state: ParticleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ParticleState, Array, Health]:
        if (given := _num_particles(state.particles)) != self.num_particles:
            raise ValueError(
                f"the state has {given} particles and the engine num_particles={self.num_particles}: take engine.replicate(state)."
            )
        rng_key, model_key, move_key, rest_key, optim_key = jax.random.split(state.rng_key, 5)
        batch = _Batch(self._inner, state, model_key, args, kwargs)
        theta, x, kept = state.unconstrained, batch.gather(state.particles), batch.gather(state.dynamics_state)
        step_size = self._step_size(state)
        new_x, new_kept, seen, (loss, gradient, scores) = self._move(batch, theta, x, kept, step_size, move_key)
        mutable_state = batch.program.mutable_state
        if has_chains(state.mutable_state):

            def terms(model: Model, theta: Any) -> tuple[dict[str, Array], Run]:
                # they do not depend on the particles: the handler sees one run of the model, with the first
                return batch.terms(model, data=batch.data(theta), latents=_first(x))

            of_normalizer, mutable_state = self._phase.gradient(terms, theta)
            gradient = jax.tree.map(jnp.subtract, gradient, of_normalizer)
        new_theta, optim_state = self._move_params(batch, theta, seen, gradient, state.optim_state, optim_key)
        stiffness = running_stiffness(batch.program, state.stiffness, state.num_steps, scores, step_size)
        health = _health(batch, loss, new_theta, new_x, mutable_state)
        good = ~is_bad(health)
        particles = batch.scatter(state.particles, keep(good, new_x, x))  # the rows of the batch: the rest stay in place
        if self.noise == "all" and batch.indices:
            particles = self._shake(rest_key, batch, particles, jnp.where(good, step_size, 0.0))
        new = state._replace(
            params=constrain_params(new_theta, batch.program.param_transforms),
            unconstrained=new_theta,
            optim_state=optim_state,
            particles=particles,
            dynamics_state=batch.scatter(state.dynamics_state, keep(good, new_kept, kept)),
            mutable_state=mutable_state,
            stiffness=stiffness,
            rng_key=rng_key,
        )
        return new, loss, health

    def _move(
        self, batch: "_Batch", theta: Any, x: Particles, kept: Any, step_size: Any, rng_key: Array
    ) -> tuple[Particles, Any, Particles, "_Gradients"]:
        """Particles after their moves, what the dynamics keep, the cloud that parameters see, and the gradients there."""
        keys = jax.random.split(rng_key, self.num_moves)
        noise = np.ones(self.num_moves)
        if self.noise == "all" and batch.indices:
            noise[-1] = 0  # it comes with that on all particles, from this visit of the batch to the next
        jacobi = self.order == "jacobi"
        if self.num_moves == 1 and jacobi:
            gradients = batch.gradients(theta, x)
            return *self._push(keys[0], x, kept, gradients.scores, step_size, noise[0]), x, gradients
        if self.average_moves:
            return self._move_and_average(batch, theta, x, kept, step_size, (keys, jnp.asarray(noise)))

        def move(carry: tuple[Particles, Any], how: tuple[Array, Array]) -> tuple[tuple[Particles, Any], None]:
            (x, kept), (key, noise) = carry, how
            return self._push(key, x, kept, batch.scores(theta, x), step_size, noise), None

        (new_x, new_kept), _ = lax.scan(move, (x, kept), (keys, jnp.asarray(noise)))
        seen = x if jacobi else new_x
        return new_x, new_kept, seen, batch.gradients(theta, seen)

    def _move_and_average(
        self, batch: "_Batch", theta: Any, x: Particles, kept: Any, step_size: Any, moves: tuple[Array, Array]
    ) -> tuple[Particles, Any, Particles, "_Gradients"]:
        """The same with the mean gradient over the points before the moves (Jacobi) or after them (Gauss-Seidel)."""
        start = batch.gradients(theta, x)

        def move(carry: tuple[Particles, Any, _Gradients, Any], how: tuple[Array, Array]) -> tuple[Any, None]:
            (x, kept, before, (loss, gradient)), (key, noise) = carry, how
            x, kept = self._push(key, x, kept, before.scores, step_size, noise)
            after = batch.gradients(theta, x)
            counted = before if self.order == "jacobi" else after
            mean = jax.tree.map(lambda sum, new: sum + new / self.num_moves, (loss, gradient), (counted.loss, counted.of_params))
            return (x, kept, after, mean), None

        nothing = jax.tree.map(jnp.zeros_like, (start.loss, start.of_params))
        (new_x, new_kept, last, (loss, gradient)), _ = lax.scan(move, (x, kept, start, nothing), moves)
        return new_x, new_kept, x if self.order == "jacobi" else new_x, _Gradients(loss, gradient, last.scores)

    def _push(
        self, rng_key: Array, x: Particles, kept: Any, scores: Particles, step_size: Any, noise: Any
    ) -> tuple[Particles, Any]:
        """One move of the particles of a batch, with noise (1) or without (0)."""
        if self.dynamics is not None:
            minus = jax.tree.map(jnp.negative, scores)
            moves, kept = self.dynamics.update(minus, kept, x, temperature=1.0, rng_key=rng_key)
            return optax.apply_updates(x, moves), kept
        h = jnp.asarray(step_size)
        x = jax.tree.map(lambda x, s: x + h.astype(x.dtype) * s, x, scores)
        if isinstance(noise, Array) or noise:
            sd = noise * jnp.sqrt(2 * h)
            x = jax.tree.map(lambda x, xi: x + sd.astype(x.dtype) * xi, x, optim_module.normal_like(rng_key, x))
        return x, kept

    def _shake(self, rng_key: Array, batch: "_Batch", particles: Particles, step_size: Array) -> Particles:
        """Noise of variance 2h / L on all particles, batch or not (Marks et al. 2026, algorithm 2)."""
        noise = optim_module.normal_like(rng_key, particles)
        sd = {name: jnp.sqrt(2 * step_size / batch.program.scale(name)) for name in particles}
        return {name: x + sd[name].astype(x.dtype) * noise[name] for name, x in particles.items()}

    def _move_params(
        self, batch: "_Batch", theta: Any, seen: Particles, gradient: Any, optim_state: Any, rng_key: Array
    ) -> tuple[Any, Any]:
        if isinstance(self.optim, (Newton, Maximize)):
            flat, unravel = ravel_pytree(theta)

            def loss(flat: Array) -> Array:
                return batch.loss(unravel(flat), seen)

            if isinstance(self.optim, Maximize):
                return unravel(_minimize(loss, flat, self.optim.max_steps)), optim_state
            gradient = unravel(jnp.linalg.solve(jax.hessian(loss)(flat), ravel_pytree(gradient)[0]))
        num_data = self._num_data(batch.program)
        if not isinstance(self.optim, Newton):
            gradient = jax.tree.map(lambda g: g / num_data, gradient)
        temperature = 1 / (num_data * self.num_particles)
        updates, optim_state = self._transformation.update(gradient, optim_state, theta, temperature=temperature, rng_key=rng_key)
        return optax.apply_updates(theta, updates), optim_state

    def _loss(self, state: ParticleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        batch = _Batch(self._inner, state, state.rng_key, args, kwargs)
        return batch.loss(state.unconstrained, batch.gather(state.particles))

    def _step_size(self, state: ParticleState) -> Any:
        return self.step_size(state.num_steps) if callable(self.step_size) else self.step_size

    def _warnings(self, state: ParticleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        data = {**state.params, **state.mutable_state}
        found = self._phase.warnings(state.mutable_state, args, kwargs, data=data)
        if self.dynamics is None:
            found += warnings_of(state.stiffness, float(self._step_size(state)))
        return found

    def _findings(self, rng_key: Array, state: ParticleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Finding]:
        if not has_chains(state.mutable_state):
            return []
        numbers = self._chain_numbers(state, rng_key, *args, **kwargs)
        return self._phase.findings(numbers, state.params, state.mutable_state, args, kwargs)

    @partial(compiled_method, cheaply=True)
    def _chain_numbers(self, state: ParticleState, rng_key: Array, *args: Any, **kwargs: Any) -> ChainNumbers:
        return self._phase.numbers(rng_key, state.params, state.mutable_state, args, kwargs)

    def _explain(
        self, state: ParticleState, bad: dict[Part, int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, str]:
        for part, code in bad.items():
            if part.kind == "plate":
                return f"{part} are out of range, or not in order.", ""
            if part.kind == "chains":
                return self._phase.explain(part.site, code, args, kwargs, data={**state.params, **state.mutable_state}), ""
        what, _ = super()._explain(state, bad, args, kwargs)
        finite = jax.device_get(self._finite_terms(state, *args, **kwargs))
        for site, is_finite in finite.items():
            if not is_finite.all():
                where = f"at {int((~is_finite).sum())} of {is_finite.size} events and particles"
                return (
                    f"site '{site}': its log density is not finite {where}: the model makes these impossible, or overflows there.",
                    "Scale the data, look at the model at these values, or start elsewhere, by init_params or init_strategy.",
                )
        if not (h := float(self._step_size(state))) > 0:
            return f"step_size gives {h} at step {int(state.num_steps)}: it must be positive.", ""
        limit = self.stability_limit(state, *args, **kwargs)
        return what, fix_of(h, limit)


class _Gradients(NamedTuple):
    """The loss at a cloud, and its gradients."""

    loss: Array  # (), minus the mean over particles of the log joint density
    of_params: Any  # gradient of the loss
    scores: Particles  # of each particle, without the scale of its plates


class _Batch:
    """One run of a model on some rows of the data: what a step needs to know, and its log joint density."""

    def __init__(self, model: Model, state: ParticleState, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model = model
        self.terms = partial(log_density_terms, args=args, kwargs=kwargs, rng_key=rng_key)
        data = {**state.params, **state.mutable_state}
        self.program = run_model(model, args, kwargs, rng_key, data=data, latents=_first(state.particles))
        _require_same_sites(self.program, state)
        require_all_rows(self.program, state.particles)
        self.indices = subsampled_indices(self.program)
        self._given = {**state.mutable_state, **self.indices}  # to another run on the same rows

    def gather(self, stores: Any) -> Any:
        """The batch's rows of particles, or of what is kept with them."""
        return by_site(lambda name, x: gather(self.program, self.indices, name, x), self.program.latents, stores)

    def scatter(self, stores: Any, rows: Any) -> Any:
        """All rows, with the batch's replaced."""
        return by_site(lambda name, *x: scatter(self.program, self.indices, name, *x), self.program.latents, stores, rows)

    def data(self, theta: Any) -> dict[str, Any]:
        """What :attr:`terms` needs beside latents: values of param and mutable sites, and which rows."""
        return {**constrain_params(theta, self.program.param_transforms), **self._given}

    def log_joint(self, theta: Any, x: Particles) -> Array:
        """The log joint density, summed over particles."""
        data = self.data(theta)
        return map_over(lambda x: total(self.terms(self.model, data=data, latents=x)[0]), x).sum()

    def loss(self, theta: Any, x: Particles) -> Array:
        return -self.log_joint(theta, x) / _num_particles(x)

    def gradients(self, theta: Any, x: Particles) -> _Gradients:
        """One backward pass for parameters and particles together."""
        value, (of_params, of_x) = jax.value_and_grad(self.log_joint, (0, 1))(theta, x)
        of_params = jax.tree.map(lambda g: -g / _num_particles(x), of_params)
        return _Gradients(-value / _num_particles(x), of_params, self._unscaled(of_x))

    def scores(self, theta: Any, x: Particles) -> Particles:
        """Scores of the particles alone."""
        return self._unscaled(jax.grad(self.log_joint, 1)(theta, x))

    def _unscaled(self, scores: Particles) -> Particles:
        # A plate's scale makes a batch stand for all data, which is meant for parameters: a row's own posterior has none.
        return {name: score / self.program.scale(name) for name, score in scores.items()}


def _first(particles: Particles) -> Particles:
    return {name: x[0] for name, x in particles.items()}


def _num_particles(particles: Particles) -> int:
    return len(next(iter(particles.values())))


def _require_same_sites(program: Run, state: ParticleState) -> None:
    for kind, wanted, given in (("latent", program.latents, state.particles), ("param", program.params, state.params)):
        if wanted.keys() != given.keys():
            raise ValueError(f"the state is of another model: its {kind} sites are {sorted(given)}, the model's {sorted(wanted)}.")


def _health(batch: _Batch, loss: Array, theta: Any, x: Particles, mutable_state: dict[str, Any]) -> Health:
    """0 for everything that is finite and in range; of chains their status."""
    health = health_of("loss", loss) | health_of("param", theta) | health_of("particles", x)
    for name, plate in batch.program.plates.items():
        health[Part("plate", name)] = 1 - plate.is_row.all().astype(jnp.int32)
    return health | health_of_chains(mutable_state)


def _minimize(loss: Callable[[Array], Array], start: Array, max_steps: int) -> Array:
    """L-BFGS until a step is lost in rounding."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)
    tolerance = 1e3 * jnp.finfo(start.dtype).eps

    def going(carry: tuple[Array, Any, Array, Array]) -> Array:
        x, _, size, count = carry
        return (count < max_steps) & (size > tolerance * (1 + jnp.linalg.norm(x)))

    def step(carry: tuple[Array, Any, Array, Array]) -> tuple[Array, Any, Array, Array]:
        x, state, _, count = carry
        value, gradient = value_and_grad(x, state=state)
        update, state = solver.update(gradient, state, x, value=value, grad=gradient, value_fn=loss)
        return x + update, state, jnp.linalg.norm(update), count + 1

    begin = start, solver.init(start), jnp.full((), jnp.inf, start.dtype), jnp.zeros((), jnp.int32)
    return lax.while_loop(going, step, begin)[0]
