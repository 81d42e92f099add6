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
from numpyro_ebm._pytree import keep
from numpyro_ebm.distributions.guard import NormalizerError
from numpyro_ebm.evaluate.negative_chains import ChainNumbers
from numpyro_ebm.evaluate.param_distance import (
    LEAST_COPIES,
    MOVES_BETWEEN,
    NUM_BURN,
    NUM_COPIES,
    OfBatch,
    ParamDistance,
    param_distance,
    param_findings,
    told_params,
)
from numpyro_ebm.evaluate.predictions import Predictions, prediction_findings, predictions
from numpyro_ebm.evaluate.report import Finding
from numpyro_ebm.handlers import negative_phase
from numpyro_ebm.infer.engine import Engine, compiled_method
from numpyro_ebm.infer.particle_batch import ParticleBatch, Particles, first, number_of
from numpyro_ebm.infer.particle_jumps import JumpNumbers, jump_findings, jump_numbers
from numpyro_ebm.infer.particle_moves import LEAST_ACCEPTANCE, SLOW, AdaptedMoves, How, Moves, adjusted
from numpyro_ebm.infer.particle_rows import are_independent, rows_of
from numpyro_ebm.infer.particle_settings import (
    Averaged,
    Maximize,
    Newton,
    StepSize,
    Summed,
    require_jumps,
    require_one_step,
    require_steps,
    require_steps_of,
    steps_at,
)
from numpyro_ebm.infer.particle_start import (
    are_good_rows,
    draw_particles,
    require_good_rows,
    require_learnable,
    require_noise,
    tamed,
)
from numpyro_ebm.infer.particle_strays import Gain, largest_gains, stray_findings
from numpyro_ebm.infer.phase import Phase, has_chains, health_of_chains
from numpyro_ebm.infer.stability import (
    ALL_BATCHES,
    NUM_SCORES,
    SCORES_AT_START,
    STIFF_IN_RUN,
    Look,
    Start,
    fix_of,
    lag,
    local_stiffness,
    looks_due,
    stiffest,
    stiffness_finding,
    warnings_of,
)
from numpyro_ebm.optim import as_transformation, kinetic_langevin, kinetic_langevin_splitting, langevin
from numpyro_ebm.program.check import ModelReport
from numpyro_ebm.program.minibatch import Minibatch
from numpyro_ebm.program.rows import all_batches, by_site, shared_plates
from numpyro_ebm.program.run import (
    Run,
    constrain_params,
    constrained,
    draw_latents,
    own_key,
    require_all_rows,
    require_program,
    run_model,
    strong_types,
    unconstrain_params,
)
from numpyro_ebm.program.sites import Model
from numpyro_ebm.program.streamed import require_own_rows
from numpyro_ebm.samplers import UnadjustedLangevin
from numpyro_ebm.train.health import Health, Part, health_of, is_bad, named


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
    #: what the moves of the particles keep, with a row for all data: velocities of dynamics, or with kernel='mala'
    #: :class:`~numpyro_ebm.infer.AdaptedMoves`
    dynamics_state: Any
    #: negative chains, and other mutable sites of the model
    mutable_state: dict[str, Any]
    #: the key of the next step
    rng_key: Array
    #: (), int32: steps made
    num_steps: Array
    #: (), int32: steps that ``stable_update`` skipped
    num_skipped: Array
    #: :class:`~numpyro_ebm.infer.IterateAverage` of the iterates, where the engine averages
    average: Any = ()

    @property
    def acceptance(self) -> dict[str, Array]:
        """By latent site the running mean of the acceptance of each row's moves, with kernel='mala'; empty without."""
        return self.dynamics_state.acceptance if isinstance(self.dynamics_state, AdaptedMoves) else {}


class ParticleMMLE(Engine):
    r"""Maximum marginal likelihood of the :func:`numpyro.param` sites of a model, its latents as interacting particles.

    Used like :class:`numpyro.infer.SVI`, without a guide: every latent site is a cloud of ``num_particles`` points that follow
    the posterior at the current parameters. Any model with continuous latents will do. Constrained latents move in unconstrained
    space; energy priors need :class:`~numpyro_ebm.negative_phase`, which is put around the model unless it is already there. In a
    subsampled plate every row of the data keeps its own particles, and those of the batch move; the plate's scale counts for the
    parameters and not for the particles.

    The published algorithms are settings of this engine, by the constructors :meth:`pgd`, :meth:`ipla`, :meth:`ebipla`,
    :meth:`soul`, :meth:`pqn`, :meth:`pmgd`, :meth:`kiplmc1`, :meth:`kiplmc2` and :meth:`mpd`.

    The loss is minus the mean over particles of the log joint density of unconstrained latents (the log Jacobians of their
    constraints included), up to unknown normalizers. It is no bound on the likelihood, and cannot be used to compare two fits.

    :param model: a NumPyro model, or :class:`negative_phase(model, ...) <numpyro_ebm.negative_phase>` to say how its negative
        chains move.
    :param optim: how parameters move: an optax transformation, with :func:`~numpyro_ebm.langevin` for the theory's noise, or an
        optimizer of :mod:`numpyro.optim`; :class:`~numpyro_ebm.infer.Newton` of either, which gets the Newton direction; or
        :class:`~numpyro_ebm.infer.Maximize`, by which they go to the maximum for the current cloud.
    :param int num_particles: particles per latent.
    :param step_size: the step :math:`h` of the particles, or a schedule of it by the number of steps made, or a dictionary of
        these with one for each latent site. An unadjusted particle is stable below 2 / (largest curvature of its negative log
        posterior); see :meth:`stability_limit` and :meth:`stiffness`. With ``kernel="mala"`` where steps start from, .1 if not
        given.
    :param str kernel: ``"langevin"``: unadjusted moves, as published, whose variance is too large by a fraction of about half the
        step times the curvature; ``"mala"``: Metropolis-adjusted moves of one latent site after the other, by two evaluations
        of the score each, accepted by every row of its plates and every particle for itself. They are exact at every step, and
        each row finds its own: ``state.acceptance`` and ``state.dynamics_state.step_size``.
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
    :param int num_jumps: with ``kernel="mala"``, jumps per step after these moves, of the latents whose prior is an energy with
        something to jump from (:class:`~numpyro_ebm.MALA`), accepted by every row and particle for itself; one for every 10
        moves, rounded up, if not given. Without, particles hardly cross between modes of their posterior that are far apart, and
        the weight of these modes in the prior is not learned; the report of a run tells.
    :param dynamics: how particles move instead of :func:`~numpyro_ebm.langevin`, such as
        :func:`~numpyro_ebm.kinetic_langevin`.
    :param init_strategy: a NumPyro ``init_to_...`` strategy for the particles. If not given they are samples of the prior, of the
        base for an energy; those that a step of this size would not be stable at are moved towards the posterior first.
    :param average_iterates: whether the parameters that :meth:`run` and :meth:`get_params` return are an average of the iterates,
        weighed by about the cube of the step, instead of the last; or another power than 3. ``state.params`` is the last.
    :raises ValueError: for a setting out of range; when a model is first seen, naming the site, for a discrete latent, no
        latent or no param site, a latent outside a subsampled plate, data in one that are not taken by its indices, or data that
        are not finite.
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
        step_size: StepSize | None = None,
        *,
        kernel: str = "langevin",
        drift: Summed | Averaged = Summed(),
        order: str = "jacobi",
        noise: str = "batch",
        num_moves: int = 1,
        average_moves: bool = False,
        num_jumps: int | None = None,
        dynamics: optax.GradientTransformationExtraArgs | None = None,
        init_strategy: Callable[..., Any] | None = None,
        average_iterates: bool | float = False,
    ) -> None:
        super().__init__(average_iterates)
        self.num_particles = require_count("num_particles", num_particles, why="a cloud needs particles")
        self.kernel = require_one_of("kernel", kernel, ("langevin", "mala"))
        self.step_size = require_steps(step_size, kernel)
        self.drift: Summed | Averaged = require_setting("drift", drift, (Summed, Averaged))
        self.order = require_one_of("order", order, ("jacobi", "gauss_seidel"))
        self.noise = require_one_of("noise", noise, ("batch", "all"))
        self.num_moves = require_count("num_moves", num_moves, why="particles must move")
        self.average_moves = require_bool("average_moves", average_moves)
        if dynamics is not None and noise == "all":
            raise ValueError("noise='all' is noise between visits of overdamped particles: use noise='batch' with other dynamics.")
        if kernel == "mala" and (dynamics is not None or noise == "all"):
            other = "dynamics=" if dynamics is not None else "noise='all'"
            raise ValueError(
                f"kernel='mala' does not go with {other}, which moves particles without accepting: leave one of them out."
            )
        wanted = "one of NumPyro's strategies, such as init_to_median"
        self.init_strategy = init_strategy and require_instance("init_strategy", init_strategy, ("__call__",), wanted)
        self.model, self.optim = model, optim
        self.dynamics = None if dynamics is None else as_transformation(dynamics, "dynamics")
        moving = optax.identity() if isinstance(optim, Maximize) else optim.optim if isinstance(optim, Newton) else optim
        self._transformation = as_transformation(moving)
        require_program("the model", model)
        if self.dynamics is not None:
            require_noise(self.dynamics)
        self.num_jumps = require_jumps(num_jumps, kernel, self.num_moves)
        self._moves = Moves(kernel, self.dynamics, order, num_moves, average_moves, self.num_jumps)
        self._draws = init_to_sample if init_strategy is None else init_strategy
        self._phase = Phase(model)
        self._inner = self._phase.inner

    # The published algorithms.

    @classmethod
    def pgd(
        cls, model: Model, optim: Any = None, *, num_particles: int, step_size: StepSize | None = None, **settings: Any
    ) -> Self:
        """Particle gradient descent (Kuntz et al. 2023): summed drift, no noise on the parameters.

        :param optim: gradient descent of step ``step_size`` if not given.
        """
        optim = optax.sgd(require_one_step(step_size, "pgd")) if optim is None else optim
        return cls(model, optim, num_particles, step_size, **settings)

    @classmethod
    def ipla(cls, model: Model, *, num_particles: int, step_size: StepSize | None = None, **settings: Any) -> Self:
        """The interacting particle Langevin algorithm (Akyildiz et al. 2025): PGD with noise on the parameters."""
        return cls(model, langevin(require_one_step(step_size, "ipla")), num_particles, step_size, **settings)

    @classmethod
    def ebipla(
        cls,
        model: Model,
        optim: Any = None,
        *,
        num_particles: int,
        step_size: StepSize | None = None,
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
        optim = langevin(require_one_step(step_size, "ebipla")) if optim is None else optim
        return cls(model, optim, num_particles, step_size, **{"drift": Averaged(), "noise": "all", **settings})

    @classmethod
    def soul(cls, model: Model, optim: Any = None, *, num_moves: int, step_size: StepSize | None = None, **settings: Any) -> Self:
        """Stochastic optimization by unadjusted Langevin (De Bortoli et al. 2021): one chain, averaged over its moves.

        :param optim: gradient descent of step ``step_size`` if not given.
        :param int num_moves: moves of the chain per step of the parameters.
        """
        optim = optax.sgd(require_one_step(step_size, "soul")) if optim is None else optim
        settings = {"num_particles": 1, "order": "gauss_seidel", "average_moves": True, **settings}
        return cls(model, optim, step_size=step_size, num_moves=num_moves, **settings)

    @classmethod
    def pqn(cls, model: Model, *, num_particles: int, step_size: StepSize | None = None, **settings: Any) -> Self:
        """Particle quasi-Newton (Kuntz et al. 2023): PGD by the Hessian in the parameters, which must be few."""
        return cls(model, Newton(optax.sgd(require_one_step(step_size, "pqn"))), num_particles, step_size, **settings)

    @classmethod
    def pmgd(cls, model: Model, *, num_particles: int, step_size: StepSize | None = None, **settings: Any) -> Self:
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

    # What a user calls.

    def init(self, rng_key: Array, *args: Any, init_params: dict[str, Any] | None = None, **kwargs: Any) -> ParticleState:
        """The state to start from, as :meth:`Engine.init`; particles stand where a step is stable, if no strategy says where."""
        state: ParticleState = super().init(rng_key, *args, init_params=init_params, **kwargs)
        if self.init_strategy is not None or self.dynamics is not None:
            return state
        look = self._look(state, *map(jnp.asarray, (0, ALL_BATCHES, SCORES_AT_START)), *args, **kwargs)
        is_traced = isinstance(look.wildest, jax.core.Tracer)
        return self._settled(state, *args, **kwargs) if is_traced or look.wildest > STIFF_IN_RUN else state

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
        old = number_of(state.particles)
        if num_particles % old:
            raise ValueError(f"num_particles={num_particles} is no multiple of the state's {old}: copies would weigh unequally.")

        def repeat(name: str, x: Array) -> Array:
            return jnp.repeat(x, num_particles // old, 0)

        kept = state.dynamics_state
        return state._replace(
            particles=by_site(repeat, state.particles, state.particles),
            dynamics_state=kept if isinstance(kept, AdaptedMoves) else by_site(repeat, state.particles, kept),
        )

    def stability_limit(self, state: ParticleState, *args: Any, **kwargs: Any) -> float:
        """The step above which unadjusted particles diverge where they stand: 2 / (largest curvature), by power iteration.

        :param args: arguments of the model.
        :return: an estimate for the particles that move in the next step, from above; inf where no direction is curved. Of steps
            by latent site it is that of the largest, the others in proportion.
        """
        ratio = float(self._local_stiffness(state, *args, **kwargs))
        return 2 * max(self._told_steps(state).values()) / ratio if ratio > 0 else float("inf")

    def stiffness(self, state: ParticleState, *args: Any, **kwargs: Any) -> float:
        """The step h times the curvature, of the stiffest row of a batch: the median of its particles.

        Unadjusted particles are spread too much by a fraction of about half of it, and diverge at 2. A run looks at it from its
        first steps on, less and less often, and warns from 1 on. It is measured over the length of a move.

        :param args: arguments of the model.
        """
        return float(self._look(state, *map(jnp.asarray, (0, 1, NUM_SCORES)), *args, **kwargs).row.ratio)

    @compiled_method
    def _local_stiffness(self, state: ParticleState, *args: Any, **kwargs: Any) -> Array:
        batch = self._batch(state, state.rng_key, args, kwargs)
        x, scores = batch.gather(state.particles), partial(batch.scores, state.unconstrained)
        return local_stiffness(batch.program, scores, x, self._step_size(state), state.rng_key)

    @compiled_method
    def _look(
        self, state: ParticleState, first_batch: Array, num_batches: Array, num_scores: Array, *args: Any, **kwargs: Any
    ) -> Look:
        """What there is to see in some of the batches that show all rows.

        :param num_scores: how closely to look.
        """
        program_key, look_key = jax.random.split(own_key(state.rng_key))
        batches = all_batches(self._batch(state, program_key, args, kwargs).program)
        num_all = max((len(rows) for rows in batches.values()), default=1)

        def look(i: Any) -> Look:
            rows = {plate: index[(first_batch + i) % num_all] for plate, index in batches.items()}
            batch = self._batch(state, program_key, args, kwargs, rows)
            x, scores = batch.gather(state.particles), partial(batch.scores, state.unconstrained)
            key = jax.random.fold_in(look_key, i)
            row, wildest = stiffest(batch.program, scores, x, self._step_size(state), key, num_scores)
            is_slow = batches and self.num_particles > 1
            return Look(row, wildest, lag(batch.program, scores, x) if is_slow else jnp.zeros(()), jnp.asarray(float(num_all)))

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(look, 0))
        num_batches = jnp.minimum(num_batches, num_all)
        return lax.fori_loop(0, num_batches, lambda i, seen: keep(i == 0, new := look(i), seen.worse(new)), nothing)

    @compiled_method
    def _settled(self, state: ParticleState, *args: Any, **kwargs: Any) -> ParticleState:
        """The state with all particles where a step is stable."""
        program_key, key = jax.random.split(own_key(state.rng_key))
        step_size, batches = self._step_size(state), all_batches(self._batch(state, program_key, args, kwargs).program)

        def settle(particles: Particles, rows: dict[str, Array]) -> tuple[Particles, None]:
            batch = self._batch(state._replace(particles=particles), program_key, args, kwargs, rows)
            x = tamed(batch, state.unconstrained, batch.gather(particles), step_size, key)
            return batch.scatter(particles, x), None

        particles = lax.scan(settle, state.particles, batches)[0] if batches else settle(state.particles, {})[0]
        return state._replace(particles=particles)

    @compiled_method
    def _look_at_start(self, state: ParticleState, *args: Any, **kwargs: Any) -> Start:
        """Where particles would start now."""
        data, key = {**state.params, **state.mutable_state}, own_key(state.rng_key)
        batch = self._batch(state, state.rng_key, args, kwargs)
        rows = {**data, **batch.indices}

        def draw(key: Array) -> Particles:
            return draw_latents(self._inner, args, kwargs, key, data=rows, init_strategy=self._draws)

        x = jax.vmap(draw)(jax.random.split(key, self.num_particles))
        theta, step_size = state.unconstrained, self._step_size(state)
        x = x if self.init_strategy is not None else tamed(batch, theta, x, step_size, key)
        scores = partial(batch.scores, theta)
        values = jax.vmap(lambda x: run_model(self._inner, args, kwargs, key, data=rows, latents=x).drawn)(x)
        return Start(
            stiffest(batch.program, scores, x, step_size, key)[0],
            local_stiffness(batch.program, scores, x, step_size, key),
            jax.tree.map(jnp.min, values),
            jax.tree.map(jnp.max, values),
        )

    @compiled_method
    def _finite_terms(self, state: ParticleState, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """By site, whether its log density is finite at each particle and event."""
        batch = self._batch(state, state.rng_key, args, kwargs)
        data = batch.data(state.unconstrained)
        return map_over(
            lambda x: jax.tree.map(jnp.isfinite, batch.terms(self._inner, data=data, latents=x)[0]), batch.gather(state.particles)
        )

    # What the loop needs.

    def _of_minibatch(self, batch: Minibatch, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if batch.index is None:
            raise ValueError(
                "every row keeps its own particles, and this batch does not say which rows it has: take Batches, or a source of "
                "(index, args, kwargs)."
            )
        return (batch,), kwargs

    def _rows_of(self, state: ParticleState, batch: Minibatch) -> dict[str, Any]:
        """The fields of a state that have a row for all data: by leaf the axis of the rows, or what is no integer."""
        program = run_model(self._inner, (batch,), {}, state.rng_key, data=state.params, latents=first(state.particles))
        (plate,) = program.subsampled

        def axis(name: str, x: Array) -> int | None:
            at = dict(program.latents[name].plates).get(plate)
            return None if at is None else at % x.ndim

        fields = {name: getattr(state, name) for name in sorted(self.kept_by_step)}
        return {name: by_site(axis, program.latents, tree) for name, tree in fields.items()}

    def _noise_at_rest(self, state: ParticleState, num_data: int, batch_size: int) -> dict[str, Array]:
        """By site, the variance of the noise that a row gets in each step that it is not in the batch of."""
        rate = 2 * batch_size / num_data if self.noise == "all" else 0.0
        return {name: rate * h for name, h in self._step_size(state).items()}

    def _refuse(self, rng_key: Array, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look_key = own_key(rng_key)  # as _start does
        latents = draw_latents(self._inner, args, kwargs, look_key, data=params, init_strategy=self._draws)
        require_good_rows(self._inner, args, kwargs, look_key, data=params, latents=latents)
        if self.kernel == "mala":
            particles = jax.tree.map(lambda x: jnp.asarray(x)[None], latents)
            batch = ParticleBatch(self._inner, params, particles, look_key, args, kwargs)
            theta = unconstrain_params(batch.program.params, batch.program.param_transforms)
            for name, is_independent in are_independent(batch, theta, look_key).items():
                if not is_independent:
                    raise ValueError(
                        f"site '{name}': rows of its plates depend on each other, and kernel='mala' accepts each by itself. Write "
                        "what couples them outside the plates, or take kernel='langevin'."
                    )

    def _inspect(self, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelReport:
        """What is to be known of the normalizers; refuses what negative chains cannot make right."""
        report = self._phase.report(given, args, kwargs)
        if isinstance(self.optim, (Newton, Maximize)) and report.learned:
            site = report.learned[0]
            raise NormalizerError(
                f"site '{site.name}': its unknown normalizer depends on the parameters, and optim={type(self.optim).__name__}(...) "
                "needs the curvature or the maximum of the log density. Negative chains give the gradient of the normalizer and "
                "nothing else, so that this step would leave the normalizer out. Take an optimizer that needs the gradient alone: "
                "pgd, ipla, ebipla or soul in the place of pqn and pmgd."
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
        positions = draw_latents(self._inner, args, kwargs, look_key, data=init_params, init_strategy=self._draws)
        program = run_model(self._inner, args, kwargs, look_key, data=init_params, latents=positions)
        require_learnable(program, init_params)
        if program.subsampled:
            require_own_rows(self._inner, args, kwargs, look_key, data=init_params)
        require_steps_of(self.step_size, program.latents)
        self._num_data(program)  # which a drift may need to be given
        params = unconstrain_params(program.params, program.param_transforms)
        rng_key, run_key, draw_key = jax.random.split(rng_key, 3)
        data = constrain_params(params, program.param_transforms)
        count = jnp.zeros((), jnp.int32)
        step_size = steps_at(self.step_size, program.latents, count)

        particles = draw_particles(
            self._inner, args, kwargs, draw_key, program, self.num_particles, data=data, init_strategy=self._draws
        )
        report = self._inspect(init_params, args, kwargs)
        mutable_state = self._phase.start(report, run_key, args, kwargs, data=data, latents=first(particles))
        batch = ParticleBatch(self._inner, {**data, **mutable_state}, particles, look_key, args, kwargs)
        state = ParticleState(
            params=data,
            unconstrained=params,
            optim_state=self._transformation.init(params),
            particles=particles,
            dynamics_state=self._moves.init(batch, params, particles, step_size),
            mutable_state=mutable_state,
            rng_key=rng_key,
            num_steps=count,
            num_skipped=count,
        )
        good = are_good_rows(self._inner, args, kwargs, look_key, program, data=data, latents=positions)
        if self.kernel == "mala":
            good = good & jnp.asarray(list(are_independent(batch, params, look_key).values())).all()
        return strong_types(state), good

    def _step(self, state: ParticleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ParticleState, Array, Health]:
        if (given := number_of(state.particles)) != self.num_particles:
            raise ValueError(
                f"the state has {given} particles and the engine num_particles={self.num_particles}: take engine.replicate(state)."
            )
        rng_key, model_key, move_key, rest_key, optim_key = jax.random.split(state.rng_key, 5)
        batch = self._batch(state, model_key, args, kwargs)
        theta, x, kept = state.unconstrained, batch.gather(state.particles), batch.gather(state.dynamics_state)
        step_size = self._step_size(state)
        noise_on_all = self.noise == "all" and bool(batch.indices)
        moved = self._moves(batch, theta, x, kept, step_size, move_key, state.num_steps, noise_on_all=noise_on_all)
        loss, gradient, _ = moved.gradients
        mutable_state = batch.program.mutable_state
        if has_chains(state.mutable_state):

            def terms(model: Model, theta: Any) -> tuple[dict[str, Array], Run]:
                # they do not depend on the particles: the handler sees one run of the model, with the first
                return batch.terms(model, data=batch.data(theta), latents=first(x))

            of_normalizer, mutable_state = self._phase.gradient(terms, theta)
            gradient = jax.tree.map(jnp.subtract, gradient, of_normalizer)
        new_theta, optim_state = self._move_params(batch, theta, moved.seen, gradient, state.optim_state, optim_key)
        health = _health(batch, loss, new_theta, moved.x, mutable_state)
        good = ~is_bad(health)
        particles = batch.scatter(state.particles, keep(good, moved.x, x))  # the rows of the batch: the rest stay in place
        if noise_on_all:
            particles = self._shake(rest_key, batch, particles, {name: jnp.where(good, h, 0.0) for name, h in step_size.items()})
        new = state._replace(
            params=constrain_params(new_theta, batch.program.param_transforms),
            unconstrained=new_theta,
            optim_state=optim_state,
            particles=particles,
            dynamics_state=batch.scatter(state.dynamics_state, keep(good, moved.kept, kept)),
            mutable_state=mutable_state,
            rng_key=rng_key,
        )
        return new, loss, health

    def _shake(self, rng_key: Array, batch: ParticleBatch, particles: Particles, step_size: dict[str, Array]) -> Particles:
        """Noise of variance 2h / L on all particles, batch or not (Marks et al. 2026, algorithm 2)."""
        noise = optim_module.normal_like(rng_key, particles)
        sd = {name: jnp.sqrt(2 * step_size[name] / batch.program.scale(name)) for name in particles}
        return {name: x + sd[name].astype(x.dtype) * noise[name] for name, x in particles.items()}

    def _move_params(
        self, batch: ParticleBatch, theta: Any, seen: Particles, gradient: Any, optim_state: Any, rng_key: Array
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
        batch = self._batch(state, state.rng_key, args, kwargs)
        return batch.loss(state.unconstrained, batch.gather(state.particles))

    def _batch(
        self, state: ParticleState, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Any = None
    ) -> ParticleBatch:
        """The rows of subsampled plates that are given, or that a key gives."""
        data = {**state.params, **state.mutable_state, **(rows or {})}
        batch = ParticleBatch(self._inner, data, state.particles, rng_key, args, kwargs)
        _require_same_sites(batch.program, state)
        require_all_rows(batch.program, state.particles)
        return batch

    def _step_size(self, state: ParticleState) -> dict[str, Any]:
        return steps_at(self.step_size, state.particles, state.num_steps)

    def _told_steps(self, state: ParticleState) -> dict[str, float]:
        return {name: float(h) for name, h in self._step_size(state).items()}

    def _warnings(self, state: ParticleState, before: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        data = {**state.params, **state.mutable_state}
        found = self._phase.warnings(state.mutable_state, args, kwargs, data=data)
        num_steps = int(state.num_steps)
        if self.kernel == "langevin" and self.dynamics is None and (num_batches := looks_due(before, num_steps)):
            look = self._look(state, *map(jnp.asarray, (num_steps, num_batches, NUM_SCORES)), *args, **kwargs)
            found += warnings_of(look, self._told_steps(state), num_steps, self.num_moves)
        return found

    def _findings(self, rng_key: Array, state: ParticleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Finding]:
        found = [
            Finding(site, "acceptance of moves in the row with the least", float(kept.min()), LEAST_ACCEPTANCE, None, SLOW)
            for site, kept in state.acceptance.items()
        ]
        if self.kernel == "langevin" and self.dynamics is None:
            found.append(stiffness_finding(self._look(state, *map(jnp.asarray, (0, 1, NUM_SCORES)), *args, **kwargs)))
        jumps, gains, of_data, of_params = self._cloud_numbers(state, rng_key, *args, **kwargs)
        found += stray_findings(gains, are_well=all(finding.is_well for finding in found))
        found += prediction_findings(of_data, are_well=all(finding.is_well for finding in found))
        found += jump_findings(jumps, is_adjusted=self.kernel == "mala")
        found += param_findings(of_params, are_well=all(finding.is_well for finding in found))
        if has_chains(state.mutable_state):
            numbers = self._chain_numbers(state, rng_key, *args, **kwargs)
            found += self._phase.findings(numbers, state.params, state.mutable_state, args, kwargs)
        return found

    @partial(compiled_method, cheaply=True)
    def _chain_numbers(self, state: ParticleState, rng_key: Array, *args: Any, **kwargs: Any) -> ChainNumbers:

        def run(key: Array) -> Run:
            batch = self._batch(state, own_key(key), args, kwargs)  # with rows of its own
            return self._with_a_particle(batch, state.unconstrained, batch.gather(state.particles), args, kwargs, key)

        return self._phase.numbers(rng_key, state.params, state.mutable_state, args, kwargs, run)

    @partial(compiled_method, cheaply=True)
    def _cloud_numbers(
        self, state: ParticleState, rng_key: Array, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, JumpNumbers], dict[str, Gain], Predictions, ParamDistance | None]:
        batch = self._batch(state, own_key(rng_key), args, kwargs)
        theta, x = state.unconstrained, batch.gather(state.particles)

        def run_at(key: Array, seen: Run, latents: dict[str, Array]) -> Run:
            return run_model(self._phase.inner, args, kwargs, key, data=batch.data(theta), latents=latents)

        of_data = predictions(rng_key, partial(self._with_a_particle, batch, theta, x, args, kwargs), run_at)
        rows = rows_of(batch, theta)
        of_params = self._param_distance(state, rng_key, batch, args, kwargs)
        return jump_numbers(rng_key, batch, rows, theta, x), largest_gains(rows, theta, x), of_data, of_params

    def _param_distance(
        self, state: ParticleState, rng_key: Array, batch: ParticleBatch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ParamDistance | None:
        """How far params beside energies are from the maximum, by particles that move on at these params.

        Their moves are adjusted, whatever those of the fit are: what these have done to the params is a part of the distance.
        """
        theta, every, repeated = state.unconstrained, -(-self.num_particles // NUM_COPIES), -(-LEAST_COPIES // self.num_particles)
        report = self._phase.report(state.params, args, kwargs) if has_chains(state.mutable_state) else None
        of_energies = {param for site in report.learned for param in site.params} if report else set()
        told = told_params(theta, of_energies)
        if not told or any(rows.coupled for rows in rows_of(batch, theta).values()):
            return None

        def of_batch(rows: dict[str, Array]) -> OfBatch:
            some = self._batch(state, own_key(rng_key), args, kwargs, rows)

            def terms_at(params: dict[str, Any], latents: Particles) -> tuple[dict[str, Array], Run]:
                return some.terms(some.model, data=some.data({**theta, **params}), latents=latents)

            def draw(at: tuple[Particles, AdaptedMoves, Array], key: Array) -> tuple[Any, Particles]:
                x, kept, count = at
                how = How(jax.random.split(key, MOVES_BETWEEN), jnp.ones(MOVES_BETWEEN), count + jnp.arange(MOVES_BETWEEN))
                x, kept = adjusted(some, theta, x, kept, how)
                return (x, kept, count + MOVES_BETWEEN), jax.tree.map(lambda x: x[::every], x)

            x = {name: jnp.repeat(each, repeated, 0) for name, each in some.gather(state.particles).items()}
            kept = AdaptedMoves.start(some, theta, x, self._step_size(state))
            return OfBatch(terms_at, draw, (x, kept, jnp.zeros((), jnp.int32)))

        size = sum(each.size * repeated // every for each in batch.gather(state.particles).values())
        found = param_distance(of_batch, all_batches(batch.program), told, rng_key, size, num_burn=NUM_BURN)
        if found is None or self.kernel == "mala":
            return found
        is_known = jnp.asarray(list(are_independent(batch, theta, rng_key).values())).all()
        return found._replace(steps=jnp.where(is_known, found.steps, jnp.nan))

    def _with_a_particle(
        self, batch: ParticleBatch, theta: Any, x: Particles, args: tuple[Any, ...], kwargs: dict[str, Any], key: Array
    ) -> Run:
        """The model with one of the particles."""
        at = jax.random.randint(key, (), 0, number_of(x))
        one = jax.tree.map(lambda x: x[at], x)
        return run_model(self._phase.inner, args, kwargs, key, data=batch.data(theta), latents=one)

    def _explain(self, state: ParticleState, bad: dict[Part, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        for part, code in bad.items():
            if part.kind == "plate":
                return f"{part} are out of range, or not in order."
            if part.kind == "chains":
                return self._phase.explain(part.site, code, args, kwargs, data={**state.params, **state.mutable_state})
        steps = {} if self.kernel == "mala" else self._told_steps(state)
        for h in steps.values():
            if not h > 0:
                return f"step_size gives {h} at step {int(state.num_steps)}: it must be positive."
        finite = jax.device_get(self._finite_terms(state, *args, **kwargs))
        impossible = next((site for site, is_finite in finite.items() if not is_finite.all()), None)
        what, fix = f"{named(bad)} would no longer be finite.", ""
        if steps:
            there, start = float(self._local_stiffness(state, *args, **kwargs)), self._look_at_start(state, *args, **kwargs)
            if impossible is None or there >= 2 or start.row.ratio >= 2:
                fix = fix_of(steps, there, start)
        if impossible is None:
            return f"{fix} What was seen: {what}" if fix else self._too_large(what)
        elsewhere = "scale the data, look at the model at these values, or start elsewhere, by init_params or init_strategy."
        where = f"at {int((~finite[impossible]).sum())} of {finite[impossible].size} events and particles"
        what = f"site '{impossible}': its log density is not finite {where}: "
        if not int(state.num_steps):  # it is the place, and not a step
            return f"{what}the model makes these values impossible, or overflows there. {fix or elsewhere.capitalize()}"
        too_large = "step_size or learning rate" if steps else "learning rate"
        fix = fix or f"the likely cause is too large a {too_large}: take a smaller one. If that does not help, {elsewhere}"
        what += f"it overflows where too large a {too_large} has led to, or the model makes these values impossible."
        return f"{fix} What was seen: {what}"


def _health(batch: ParticleBatch, loss: Array, theta: Any, x: Particles, mutable_state: dict[str, Any]) -> Health:
    """0 for everything that is finite and in range; of chains their status."""
    health = health_of("loss", loss) | health_of("param", theta) | health_of("particles", x)
    for name, plate in batch.program.plates.items():
        health[Part("plate", name)] = 1 - plate.is_row.all().astype(jnp.int32)
    return health | health_of_chains(mutable_state)


def _require_same_sites(program: Run, state: ParticleState) -> None:
    for kind, wanted, given in (("latent", program.latents, state.particles), ("param", program.params, state.params)):
        if wanted.keys() != given.keys():
            raise ValueError(f"the state is of another model: its {kind} sites are {sorted(given)}, the model's {sorted(wanted)}.")


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
