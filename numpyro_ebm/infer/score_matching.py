# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Score matching for models without latents, or with their latents summed out.

.. math:: \theta^* = \arg\min_\theta E_v \, J(\nabla_v \log p(v; \theta))

for an objective :math:`J` of the score alone, in which the normalizer of :math:`p` does not occur.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebm.infer.score_engine import ScoreEngine, require_params, require_same_params
from numpyro_ebm.objectives.score import ScoreObjective, objective_keys
from numpyro_ebm.optim import apply_gradient, as_transformation
from numpyro_ebm.program.batch import Batch
from numpyro_ebm.program.run import (
    Run,
    constrain_params,
    log_density_terms,
    own_key,
    run_model,
    strong_types,
    total,
    unconstrain_params,
)
from numpyro_ebm.program.sites import Model
from numpyro_ebm.train.health import Health, health_of


class ScoreMatchingState(NamedTuple):
    """State of :class:`~numpyro_ebm.ScoreMatching`."""

    #: values of the param sites, constrained
    params: dict[str, Any]
    #: the same, unconstrained: what the optimizer moves
    unconstrained: dict[str, Any]
    #: of the optimizer
    optim_state: Any
    #: key of the next step
    rng_key: Array
    #: (), int32, steps made
    num_steps: Array
    #: (), int32, steps that ``stable_update`` did not make
    num_skipped: Array
    #: :class:`~numpyro_ebm.infer.IterateAverage` of the iterates, where the engine averages
    average: Any = ()


class ScoreMatching(ScoreEngine):
    """Score matching of a model without latents, used like NumPyro's ``SVI``.

    The model's first argument is the visible, ``(rows,) + event_shape``, which it observes at one site, one row per element of
    one plate. Its log density may leave out any normalizer, as that of :class:`~numpyro_ebm.EnergyDistribution` does; where
    latents can be summed out by hand, as in a restricted Boltzmann machine, their free energy is the energy.

    Where the plate is subsampled, a step is on the rows that it draws: the model takes them with
    ``numpyro.subsample(v, event_dim=...)`` of the first argument as it is, and uses nothing else of it but its shape.
    :meth:`evaluate` is on all rows that it is given.

    :param model: a NumPyro model without latent sites.
    :param optim: an optax transformation, or an optimizer of :mod:`numpyro.optim`. What searches along a line, such as
        ``optax.lbfgs()``, sees one batch and one noise in every step.
    :param objective: what is minimized: :class:`~numpyro_ebm.ExactScoreMatching`, :class:`~numpyro_ebm.SlicedScoreMatching`,
        :class:`~numpyro_ebm.DenoisingScoreMatching` or :class:`~numpyro_ebm.MultiscaleDenoisingScoreMatching`.
    :param int batch_size: where no plate is subsampled, rows of the first argument in every step, drawn with replacement,
        or without where the objective compares rows; all of them, in order, if not given or if it is their number. Arguments
        with a row for each are refused beside it.
    :param average_iterates: whether the parameters that ``run`` and ``get_params`` return are an average of the iterates, weighed
        by about the cube of the step, instead of the last; or another power than 3. ``state.params`` is the last.
    :raises ValueError: from ``init``, naming the site and the fix, if the first argument does not reach exactly one
        continuous site, row by row; if the model has latents, mutable sites, or no params; if a subsampled plate takes its rows
        otherwise; if the model has no density at the data, because they are not finite or its energy there is not, or where the
        objective's noise takes them. Where an objective without noise finds no density beside the data it is a warning.

    **References**

    1. Hyvarinen, *Estimation of non-normalized statistical models by score matching*, JMLR 6 (2005).
    2. Vincent, *A connection between score matching and denoising autoencoders*, Neural Computation 23 (2011).
    3. Song et al., *Sliced score matching*, UAI 2019, arXiv:1905.07088.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> from numpyro.distributions import constraints
        >>> from numpyro_ebm import EnergyDistribution, ExactScoreMatching, ScoreMatching
        >>> def model(v):
        ...     precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("data", len(v)):
        ...         numpyro.sample(
        ...             "v", EnergyDistribution(lambda v: precision * v**2 / 2), obs=v
        ...         )
        >>> v = jax.random.normal(jax.random.key(0), (400,)) / 2
        >>> engine = ScoreMatching(model, optax.adam(0.05), ExactScoreMatching())
        >>> result = engine.run(jax.random.key(1), 500, v, progress_bar=False)
        >>> print(f"learned {result.params['precision']:.1f}, exact {1 / (v**2).mean():.1f}")
        learned 4.2, exact 4.2
    """

    state_class = ScoreMatchingState

    def __init__(
        self,
        model: Model,
        optim: Any,
        objective: ScoreObjective,
        *,
        batch_size: int | None = None,
        average_iterates: bool | float = False,
    ) -> None:
        super().__init__(model, objective, batch_size, average_iterates)
        self.optim = optim
        self._transformation = as_transformation(optim)

    def _start(
        self, rng_key: Array, init_params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ScoreMatchingState, Array]:
        batch = self._first_batch(rng_key, init_params, args, kwargs)
        _, program = self._inspect(rng_key, init_params, batch, kwargs)
        if program.latents:
            raise ValueError(
                f"site '{next(iter(program.latents))}': ScoreMatching has no latents. Sum them out, or learn the model by an "
                "engine that has: BiSM with a guide, or ParticleMMLE."
            )
        require_params(program, init_params)
        theta = unconstrain_params(program.params, program.param_transforms)
        count = jnp.zeros((), jnp.int32)
        params = constrain_params(theta, program.param_transforms)
        state = ScoreMatchingState(params, theta, self._transformation.init(theta), rng_key, count, count)
        return strong_types(state), self._are_good_rows(rng_key, params, batch, args, kwargs)

    def _step(
        self, state: ScoreMatchingState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ScoreMatchingState, Array, Health]:
        rng_key, batch_key, loss_key = jax.random.split(state.rng_key, 3)
        batch = self._batch(batch_key, state.params, args, kwargs)
        transforms = self._read(state, batch, kwargs).param_transforms

        def loss(theta: Any) -> Array:
            return self._mean_loss(loss_key, constrain_params(theta, transforms), batch, kwargs)

        value, gradient = jax.value_and_grad(loss)(state.unconstrained)
        theta, optim_state = apply_gradient(
            self._transformation, gradient, state.optim_state, state.unconstrained, value=value, value_fn=loss
        )
        params = constrain_params(theta, transforms)
        new = state._replace(params=params, unconstrained=theta, optim_state=optim_state, rng_key=rng_key)
        return new, value, health_of("loss", value) | health_of("param", theta)

    def _batch_loss(self, state: ScoreMatchingState, batch: Batch, kwargs: dict[str, Any]) -> Array:
        self._read(state, batch, kwargs)
        return self._mean_loss(state.rng_key, state.params, batch, kwargs)

    def _mean_loss(self, rng_key: Array, params: dict[str, Any], batch: Batch, kwargs: dict[str, Any]) -> Array:
        """The objective's mean over the rows of a batch."""
        keys, model = objective_keys(rng_key), batch.of(self._inner)
        v, *rest = batch.args

        def log_p(v: Array) -> Array:
            return total(log_density_terms(model, (v, *rest), kwargs, own_key(rng_key), data=params)[0])

        v_tilde = self.objective.perturb(keys.noise, v)
        return self.objective.loss(jax.grad(log_p), keys.loss, v, v_tilde).mean()

    def _read(self, state: ScoreMatchingState, batch: Batch, kwargs: dict[str, Any]) -> Run:
        program = run_model(batch.of(self._inner), batch.args, kwargs, own_key(state.rng_key), data=state.params)
        require_same_params(program, state.params)
        return program
