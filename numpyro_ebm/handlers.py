# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""Effect handlers: :class:`negative_phase` supplies the gradient of the normalizer, :class:`unnormalized` leaves it out.

The gradient that ``log_prob`` lacks is an expectation under the model itself,

.. math:: -\nabla_\theta \log Z(\theta) = -E_{p_\theta} [\nabla_\theta \log \tilde p_\theta(x)],

estimated from a population of Markov chains, the negative phase of contrastive divergence.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax
from numpyro.distributions import Distribution, ExpandedDistribution, Independent, MaskedDistribution
from numpyro.distributions.util import sum_rightmost
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import ELBO
from numpyro.primitives import Messenger

from numpyro_ebm._checks import require_bool, require_count, require_key, require_setting
from numpyro_ebm._compat import (
    called_by_mcmc,
    calling_local_model,
    calling_objective,
    guide_lacks,
    handlers_of,
    hides_one_of,
    in_subsampled_plate,
    is_in_scan,
    mask_of,
    name_inside,
    one_at_a_time,
    open_handler,
    sites_named,
)
from numpyro_ebm._compiled import Watch, compiled
from numpyro_ebm._fit import fit_of
from numpyro_ebm._pytree import read_params
from numpyro_ebm.chain_moves import Keeping, advance
from numpyro_ebm.chains import (
    ChainTarget,
    chains_name,
    chains_of,
    explain,
    positions,
    tell,
)
from numpyro_ebm.distributions.base_measure import is_flat
from numpyro_ebm.distributions.energy import TiltedDistribution, energy_site, without_guard
from numpyro_ebm.distributions.guard import NormalizerError, refuse_gradient
from numpyro_ebm.program.check import check_run
from numpyro_ebm.program.random_field import RandomField, record_run
from numpyro_ebm.program.run import run_model
from numpyro_ebm.program.sites import FIELD, is_factor, is_latent, normalizer_name, require_data, require_events, stand_in
from numpyro_ebm.samplers import Sampler
from numpyro_ebm.samplers.base import require_sampler
from numpyro_ebm.weighted import Weighted, is_weighted
from numpyro_ebm.weights import LogNormalizer

Message = dict[str, Any]

__all__ = ["Weighted", "negative_phase", "unnormalized"]


class unnormalized(Messenger):
    """Lifts the guard: energy sites give their unnormalized ``log_prob`` to every gradient, and nothing is added: a
    :class:`negative_phase` inside it steps aside.

    Use it for what never needs the normalizer, although the guard cannot know that, such as forward-mode derivatives of a score
    in the parameters, or for an engine that supplies ``d log Z / d theta`` itself. A gradient that does need it is then silently
    wrong.

    :param fn: the model.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro
        >>> from numpyro.infer.util import log_density
        >>> from numpyro_ebm import EnergyDistribution, unnormalized
        >>> def model(theta):
        ...     numpyro.sample("x", EnergyDistribution(lambda x: theta * x**2), obs=2.0)
        >>> jax.grad(lambda theta: log_density(unnormalized(model), (theta,), {}, {})[0])(1.0)
        Array(-4., dtype=float32, weak_type=True)
    """

    def process_message(self, msg: Message) -> None:
        if msg["type"] == "sample" and energy_site(msg["fn"]) is not None:
            msg["fn"] = without_guard(msg["fn"])


class negative_phase(Messenger):
    r"""Corrects the gradient of a model with energy sites, in NumPyro's own ``SVI`` and wherever a model is differentiated.

    At every site whose distribution has an unknown normalizer it

    1. keeps ``num_chains`` chains in the :func:`numpyro.primitives.mutable` site ``"<site>/chains"``, a dictionary of
       ``x``, of shape ``(num_chains,)`` + the site's batch shape before plates expand it + ``event_shape``, and of what
       the sampler keeps with them (``step_size``, ``acceptance`` and ``jump_acceptance`` for :class:`~numpyro_ebm.MALA`);
    2. advances them by the sampler at the current parameters, under ``stop_gradient``;
    3. adds the factor ``"<site>/log_normalizer"``, :math:`-(m - \mathrm{stop\_gradient}(m))` with :math:`m` the chains'
       mean unnormalized log density: its value is 0, its gradient the estimate of :math:`-\nabla \log Z`.

    The factor of a site is inside its plates, so each of M latents contributes its own normalizer, and subsampling and
    :class:`numpyro.handlers.scale` scale it as they scale the site. The chains are returned in ``SVIState.mutable_state`` and
    continue in the next ``run(..., init_state=...)``. **The loss is still unnormalized**: it is off by the unknown
    :math:`\log Z`, and it cannot be used to compare two fits.

    A model in which a :func:`numpyro.factor` with parameters couples :class:`~numpyro_ebm.BaseMeasure` sites is a **random
    field**: it denotes the exponential of all its log terms over one joint normalizer. It has one population, the mutable site
    ``"random_field/chains"``, whose ``x`` is a dictionary of joint values of all sample sites, latent and observed, of shape
    ``(num_replicates,)`` + that of the site in one run of the model; and one factor, ``"random_field/log_normalizer"``. If all
    sites lie in one plate, each of its rows is a field and a chain by itself, and ``num_replicates`` is ``num_chains`` over the
    number of rows, rounded up. Under subsampling the chains belong to no row of the data: a field with covariates or
    parameters of its own for every row stops the run unless ``persistent=False``. Chains start at the values of the run,
    data and latents: short-run is then contrastive divergence, which is biased.

    :param fn: the model.
    :param int num_chains: chains at each energy site; of a random field, rounded up to a multiple of its rows. The variance that
        they add to the gradient falls as ``1 / num_chains``.
    :param sampler: how the chains move, a :class:`~numpyro_ebm.samplers.Sampler`, or a mapping from site names to samplers;
        where none is given, by the ``sampler`` of the site's distribution, and if it has none by 10 steps and a jump of
        :class:`~numpyro_ebm.MALA`, by 10 sweeps of :class:`~numpyro_ebm.BlockGibbs` at the site of an RBM.
    :param bool persistent: whether chains continue from where the last step left them (persistent contrastive divergence) or
        restart from ``initial`` or the base every time (short-run). Persistent chains of energies by row go on from where they
        stand also where a data loader gives other rows as arguments: they must then reach the new energies in one step's moves.
    :param weights: :class:`~numpyro_ebm.Weighted` for chains of energy sites that carry weights: the gradient is then right
        however slowly they move, and :meth:`log_normalizer` knows :math:`\log Z`.
    :param init_chains: a mapping from site names to where chains start, of shape ``(num_chains,) + batch_shape +
        event_shape``; samples of the site's ``initial`` or base if not given. For a random field
        ``{"random_field": {site: values, ...}}``, with values as in ``x`` above.
    :raises ValueError: if ``num_chains`` is not a positive integer; while the model is traced, naming the site, if observed
        data are not finite, ``init_chains`` names no energy site or has another shape, the state holds chains of another
        shape, a random field has masked sites or sites outside a subsampled plate, the objective or guide would drop the chains
        (``num_particles > 1``, a multi-sample guide), or :class:`numpyro.handlers.reparam` stands outside.
    :raises NormalizerError: if the normalizer of a site depends on another latent site, or a random field has discrete or
        energy sites.
    :raises RuntimeError: during a run on a CPU, through JAX, when chains turn non-finite or run away. On an accelerator a report
        would hold up every step: there the loss is nan from then on, and :meth:`check_chains` tells why.

    **References**

    1. Tieleman, *Training restricted Boltzmann machines using approximations to the likelihood gradient*, ICML 2008.
    2. Nijkamp et al., *Learning non-convergent non-persistent short-run MCMC toward energy-based model*, NeurIPS 2019,
       arXiv:1904.09770.
    3. Pang et al., *Learning latent space energy-based prior model*, NeurIPS 2020, arXiv:2006.08205, eq. 7.
    4. Tang et al., *Particle dynamics for latent-variable energy-based models*, 2025, arXiv:2510.15447: the pool of a field.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_ebm import TiltedDistribution, negative_phase
        >>> def model(y):
        ...     tilt = numpyro.param("tilt", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         z = numpyro.sample(
        ...             "z", TiltedDistribution(dist.Normal(0, 1), lambda z: -tilt * z)
        ...         )
        ...         numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> y = 1.5 + jnp.sqrt(2) * jax.random.normal(jax.random.key(0), (400,))
        >>> model = negative_phase(model, num_chains=1000)
        >>> svi = SVI(model, AutoNormal(model), optax.adam(0.02), Trace_ELBO())
        >>> result = svi.run(jax.random.key(1), 600, y, progress_bar=False)
        >>> print(f"learned {result.params['tilt']:.1f}, exact {y.mean():.1f}")
        learned 1.5, exact 1.5
        >>> result.state.mutable_state["z/chains"]["x"].shape
        (1000,)
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        *,
        num_chains: int = 256,
        sampler: Sampler | Mapping[str, Sampler] | None = None,
        persistent: bool = True,
        weights: Weighted | None = None,
        init_chains: Mapping[str, Array | Mapping[str, Array]] | None = None,
    ) -> None:
        samplers: list[Any] = list(sampler.values()) if isinstance(sampler, Mapping) else [sampler]
        for one in samplers if sampler is not None else []:
            require_sampler("sampler", one, ", or a mapping from site names to samplers")
        self.num_chains: int = require_count("num_chains", num_chains, why="every energy site needs chains")
        self.persistent: bool = require_bool("persistent", persistent)
        self.sampler: Sampler | Mapping[str, Sampler] = {} if sampler is None else sampler
        if not isinstance(init_chains, Mapping | None):
            raise TypeError(f"init_chains must map energy sites to chains, got {type(init_chains).__name__}.")
        self.weights: Weighted | None = None if weights is None else require_setting("weights", weights, (Weighted,))
        if weights is not None and not persistent:
            raise ValueError("weights go on from step to step, and chains that restart do not: take persistent=True.")
        self.init_chains: dict[str, Any] = dict(init_chains or {})
        self._open: list[tuple[Message, str]] = []
        self._lacking: list[str] = []  # latents that the guide of SVI has no value for
        # by the kind of arguments and sites, and by what the model reads beside them: whether it is a random field
        self._checked: dict[Any, bool] = {}
        self._watch = Watch(fn)
        self._reports: bool = True
        self._frozen: bool = False
        super().__init__(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fn is None:
            return super().__call__(*args, **kwargs)
        if open_handler(unnormalized) is not None:  # who lifts the guard outside wants nothing added
            return self.fn(*args, **kwargs)
        outside = open_handler(negative_phase)
        if outside is not None and self._reports and not outside._reports:  # of an engine, which reads the status itself
            return self.without_reports()(*args, **kwargs)
        seen = record_run()
        with sites_named(), self:
            try:
                with seen:
                    result = self.fn(*args, **kwargs)
            except NotImplementedError:  # a site cannot be drawn: if the model is refused anyway, that says more
                self._is_field(args, kwargs, seen)
                raise
            is_field = self._is_field(args, kwargs, seen)
            if self._lacking:  # last of all: what a handler has made a latent is refused as such
                raise ValueError(
                    f"site '{self._lacking[0]}': the guide has no such site. SVI would take a sample of its prior in every step, "
                    "which the data do not move, and count its density without that of a guide: what is learned would be wrong. "
                    "Sample it in the guide too, under this name; or make it a numpyro.param, or give it a value."
                )
            if is_field:
                self._add_field_normalizer(seen, args, kwargs)
        return result

    def _is_field(self, args: tuple[Any, ...], kwargs: dict[str, Any], seen: record_run) -> bool:
        """Whether the model is a random field with parameters; it is checked once for every kind of arguments and of sites."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        kind = structure, tuple(_kind(leaf) for leaf in leaves), tuple(seen.kinds.items()), self._watch.snapshot()
        if kind not in self._checked:
            self._checked[kind] = self._check(args, kwargs, seen)
        return self._checked[kind]

    def _add_field_normalizer(self, seen: record_run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_who_runs_it(FIELD, self)
        field_key, start_key, run_key = jax.random.split(_chain_key(FIELD), 3)
        field = RandomField(self.fn, args, kwargs, field_key, seen, self.num_chains)
        start = field.start(start_key, self.init_chains.get(FIELD, {}))
        mean = self._advance(FIELD, field, start, run_key)
        numpyro.factor(normalizer_name(FIELD), -(mean - lax.stop_gradient(mean)))

    def __enter__(self) -> Any:
        if self.fn is None:
            raise ValueError("negative_phase must see the whole model: wrap it, negative_phase(model), instead of a part of it.")
        self._open, self._lacking = [], []
        return super().__enter__()

    def process_message(self, msg: Message) -> None:
        if msg["type"] != "sample":
            return
        if msg["is_observed"]:
            require_data(msg)
            if not is_factor(msg["fn"]):
                require_events(msg, enumerated=True)
        energy = energy_site(msg["fn"])
        if energy is None or not energy.guarded:
            return
        if hides_one_of(self, msg, normalizer_name(name_inside(self, msg["name"]))):
            # a gradient would be wrong: the guard stays, and refuses it; engines have no guard
            if not self._reports:
                raise ValueError(f"site '{msg['name']}': block hides one of the site and its normalizer. Hide both, or neither.")
        else:
            self._refuse_where_it_stands(msg, energy)
            msg["fn"] = without_guard(msg["fn"])
            self._open.append((msg, msg["name"]))

    def postprocess_message(self, msg: Message) -> None:
        if is_latent(msg) and guide_lacks(msg):
            self._lacking.append(msg["name"])
        if not self._open or self._open[-1][0] is not msg:
            return
        name = self._open.pop()[1]  # the name before handlers outside this one changed it
        energy = energy_site(msg["fn"]) if msg["type"] == "sample" else None
        if energy is None:
            raise ValueError(
                f"site '{name}': reparam stands outside negative_phase, which then cannot see what became of the site. Put it "
                "inside: negative_phase(reparam(model, config=...))."
            )
        site = {**msg, "name": name}
        start_key, run_key = jax.random.split(_chain_key(name))
        mean = _where_it_stands(msg["fn"], self._advance(name, energy, self._start(site, energy, start_key), run_key))
        # a value may have more batch dimensions than its distribution: NumPyro adds up log_prob over them
        batch = jnp.shape(msg["value"])[: jnp.ndim(msg["value"]) - msg["fn"].event_dim]
        mean = jnp.broadcast_to(mean, lax.broadcast_shapes(mean.shape, batch))
        mean = mean + _fixed_support(name, energy, mean.dtype)
        numpyro.factor(normalizer_name(name_inside(self, name)), -(mean - lax.stop_gradient(mean)))

    def sample_chains(
        self,
        rng_key: Array,
        params: dict[str, Any],
        mutable_state: dict[str, Any],
        num_samples: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Samples of every energy site at fixed parameters, by moving the chains on from a fit.

        Samplers are :meth:`~numpyro_ebm.samplers.Sampler.frozen`: a step that the fit has adapted is held.

        :param rng_key: a key of :func:`jax.random.key`.
        :param dict params: values of the :func:`numpyro.param` sites, ``result.params``.
        :param mutable_state: ``result.state.mutable_state``, or ``result`` or ``result.state`` themselves.
        :param int num_samples: samples per chain, one after every run of the sampler.
        :param args: arguments of the model.
        :return: samples by site, of shape ``(num_chains, num_samples) + batch_shape + event_shape``, and the mutable state
            after the last. Every site of a random field has draws, of shape ``(num_replicates, num_samples)`` + its own.
        :raises RuntimeError: as :meth:`check_chains`, before and after.
        """
        rng_key, num_samples = require_key("rng_key", rng_key), require_count("num_samples", num_samples)
        params, mutable_state = _of_fit(params, mutable_state)
        self.check_chains(params, mutable_state, *args, **kwargs)
        state, draws = compiled(frozen_chains, rng_key, self, num_samples, params, mutable_state, args, kwargs)
        self.check_chains(params, state, *args, **kwargs)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), draws), state

    def _resampled(self, rng_key: Array, mutable_state: dict[str, Any]) -> dict[str, Any]:
        """The same mutable sites with weighted chains that all weigh the same."""
        state, weights = dict(mutable_state), self.weights
        for i, (site, chains) in enumerate(chains_of(mutable_state).items()):
            if weights is not None and is_weighted(chains):
                key = jax.random.fold_in(rng_key, i)
                density = chains["log_density"]
                x, chains = weights.weigh(key, chains["x"], chains, density, self.num_chains, resample=True)
                state[chains_name(site)] = {**chains, "x": x}
        return state

    def check_chains(self, params: dict[str, Any], mutable_state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Tells what is wrong with the chains of a fit, and the fix.

        On a CPU a run tells by itself. On an accelerator it cannot without holding up every step: there the loss becomes nan, and
        this says why.

        :param dict params: values of the :func:`numpyro.param` sites, ``result.params``.
        :param mutable_state: ``result.state.mutable_state``, or ``result`` or ``result.state`` themselves.
        :param args: arguments of the model.
        :raises RuntimeError: naming the site, where chains are not finite or run away; a warning where they are near their
            variance floor.
        """
        params, mutable_state = _of_fit(params, mutable_state)
        for site, chains in chains_of(mutable_state).items():
            if status := int(chains["status"]):
                why = explain_chains(self, site, status, args, kwargs, {**params, **mutable_state})
                tell(f"site '{site}', update {int(chains['num_updates'])}: {why}", status)

    def log_normalizer(self, mutable_state: Any) -> dict[str, LogNormalizer]:
        r""":math:`\log Z` of every energy site at the parameters of the last step, from the weights of its chains.

        It is the estimate of the monitors, where there are some. That of the chains that teach is biased: they have moved the
        parameters to where they say that :math:`\log Z` is low, by about the learning rate times the variance of the gradient at
        every step, and likelihoods look better the longer one trains.

        :param mutable_state: ``result.state.mutable_state``, or ``result`` or ``result.state`` themselves.
        :return: by site; each field has the shape of the energy's batch, and is of one element where plates or ``.expand`` repeat
            it. It is nan where chains began from
            ``init_chains``, or from a distribution whose density is not known.
        :raises ValueError: without weights.
        """
        if self.weights is None:
            raise ValueError("only weighted chains know log Z: negative_phase(model, weights=Weighted(num_monitor_chains=256)).")
        kept = {site: chains for site, chains in chains_of(_of_fit({}, mutable_state)[1]).items() if is_weighted(chains)}
        return {site: self.weights.log_normalizer(chains, self.num_chains) for site, chains in kept.items()}

    def without_reports(self) -> Self:
        """The same handler for an engine that reads the chains' ``status`` itself, and tells what is wrong between steps."""
        silent = copy.copy(self)
        silent._open, silent._lacking, silent._reports = [], [], False
        return silent

    def _advance(self, name: str, energy: ChainTarget, start: Any, run_key: Array) -> Array:
        """The mean log density at the chains of a site, moved on: a :class:`TiltedDistribution`, or a :class:`RandomField`."""
        where, is_told = chains_name(name_inside(self, name)), name in self.init_chains
        keeping = Keeping(where, self.num_chains, self.persistent, self.weights, is_told, self._reports)
        return advance(name, energy, self._sampler_of(name, energy), start, run_key, keeping)

    @property
    def _num_rows(self) -> int:
        """Chains, monitors included."""
        return self.num_chains + (0 if self.weights is None else self.weights.num_monitor_chains)

    def _start(self, site: Message, energy: TiltedDistribution, key: Array) -> Array:
        shape = (self._num_rows, *energy.batch_shape, *energy.event_shape)
        if site["name"] not in self.init_chains:
            return lax.stop_gradient(energy.initial_chains(key, self._num_rows))
        start = jnp.asarray(self.init_chains[site["name"]])
        if start.shape != shape:
            raise ValueError(f"site '{site['name']}': init_chains has shape {start.shape}, it must be {shape}.")
        start = energy.as_events(start)
        inside = energy.support(start)
        if not isinstance(inside, jax.core.Tracer) and not inside.all():
            raise ValueError(f"site '{site['name']}': init_chains has values outside the support {energy.support}, or nan.")
        return start

    def _sampler_of(self, name: str, energy: ChainTarget) -> Sampler:
        """How the chains of a site move: as this handler was told, else as the distribution of the site was."""
        named = self.sampler.get(name) if isinstance(self.sampler, Mapping) else self.sampler
        sampler: Sampler = energy.chain_sampler if named is None else named
        return sampler.frozen() if self._frozen else sampler

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any], seen: record_run) -> bool:
        """What only the whole model shows: which site depends on which, and whether every name given is a site.

        :param seen: a run of the model, with what handlers outside made of its sites.
        :return: whether the model is a random field with parameters.
        """
        report = check_run(self.fn, args, kwargs, data=seen.given, kinds=seen.kinds)
        report.require_learnable()
        sites = [site.name for site in report.sites if site.is_energy] + [FIELD] * report.is_random_field
        named = {*self.init_chains, *(self.sampler if isinstance(self.sampler, Mapping) else ())}
        if not named <= set(sites):
            raise ValueError(f"no energy site is called {sorted(named - set(sites))}: the model has {sites}.")
        return report.is_random_field

    def _refuse_where_it_stands(self, msg: Message, energy: TiltedDistribution) -> None:
        name = msg["name"]
        _refuse_who_runs_it(name, self)
        if is_in_scan(msg):
            raise NormalizerError(
                f"site '{name}': unknown normalizer inside scan or cond: it cannot be told whether it depends on the carry, "
                "which each step passes to the next. Write the steps as a plate, or as a Python loop over sites with names of "
                "their own, and branches with jnp.where."
            )
        plate = in_subsampled_plate(energy.batch_shape)
        if plate is not None and self.persistent:
            raise ValueError(
                f"site '{name}': it has an energy of its own for every row of the subsampled plate '{plate}', so that a "
                "persistent chain would belong to another energy at every step. Use persistent=False with as many steps as "
                "the chains need from their start, or do not subsample."
            )


def frozen_chains(
    rng_key: Array,
    phase: negative_phase,
    num_samples: int,
    params: dict[str, Any],
    mutable_state: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    look: Callable[[Any], Any] = positions,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The mutable state after the last of ``num_samples`` runs of the samplers, without adaptation, and where chains stood.

    :param look: what is kept of what mutable sites keep of chains after every run.
    """
    held = copy.copy(phase)
    held._open, held._frozen = [], True

    def step(state: dict[str, Any], key: Array) -> tuple[dict[str, Any], dict[str, Array]]:
        given = substitute(data={**params, **state})
        with one_at_a_time, trace() as sites, seed(rng_seed=key), given, substitute(substitute_fn=_feasible):
            held(*args, **kwargs)
        _require_complete(sites, params, state)
        state = {name: sites[name]["value"] for name in state}
        return state, look(chains_of(state))

    if phase.weights is not None:
        resample_key, rng_key = jax.random.split(rng_key)
        mutable_state = phase._resampled(resample_key, mutable_state)
    return lax.scan(step, mutable_state, jax.random.split(rng_key, num_samples))


def _refuse_who_runs_it(name: str, handler: negative_phase) -> None:
    objective = calling_objective()
    if objective is not None and type(objective).loss_with_mutable_state is ELBO.loss_with_mutable_state:
        raise ValueError(
            f"site '{name}': {type(objective).__name__} keeps no mutable state, and so no negative chains. "
            "Use Trace_ELBO() or TraceMeanField_ELBO()."
        )
    if objective is not None and objective.num_particles != 1:
        raise ValueError(
            f"site '{name}': {type(objective).__name__}(num_particles={objective.num_particles}) drops mutable state, so the "
            "negative chains would start afresh at every step. Use num_particles=1 and a larger batch or more steps."
        )
    if getattr(objective, "multi_sample_guide", False):
        raise ValueError(
            f"site '{name}': {type(objective).__name__}(multi_sample_guide=True) keeps no mutable state of the model, and so no "
            "negative chains. Use a guide that gives one sample, and more steps."
        )
    if called_by_mcmc():
        raise ValueError(
            f"site '{name}': negative_phase learns parameters by gradient, and MCMC needs the density itself. Give MCMC the "
            "model without it: an energy with fixed parameters is right as it is."
        )
    if handler in handlers_of(calling_local_model()):
        raise ValueError(
            f"site '{name}': AutoSemiDAIS runs its local_model inside a loop, which would not keep the negative chains, and needs "
            "no normalizer there. Give the handler to the model alone: AutoSemiDAIS(negative_phase(model), local_model)."
        )


def _chain_key(name: str) -> Array:
    key = numpyro.prng_key()
    if key is None:
        raise ValueError(f"site '{name}': its negative chains need a random key. Run the model under numpyro.handlers.seed.")
    return key


def _of_fit(params: Any, mutable_state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of params and of mutable sites, given as they are or as a result or state of a fit."""
    known: Any = params if isinstance(params, Mapping) else fit_of(params).params
    kept: Any = fit_of(mutable_state).mutable_state
    for what, found, given in (("params", known, params), ("mutable_state", kept, mutable_state)):
        if not isinstance(found, Mapping):
            raise TypeError(
                f"{what} must map sites to values, or be a result or state of a fit that has it, got {type(given).__name__}."
            )
    return read_params("params", known), dict(kept)


def _require_complete(sites: dict[str, Message], params: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Refuses params and chains of which some are missing, whose own starting values would take their place.

    :raises ValueError: naming them.
    """
    for what, kind, given in (("params", "param", params), ("mutable_state", "mutable", state)):
        wanted = sorted(name for name, site in sites.items() if site["type"] == kind)
        if missing := sorted(set(wanted) - set(given)):
            raise ValueError(
                f"{what} lacks {missing}, of {wanted}: pass those of a fit, result.params and result.state.mutable_state."
            )


def _kind(leaf: Any) -> Any:
    """What of an argument decides which sites a model has: not the values of an array, but a number, a flag or a size."""
    if isinstance(leaf, (jax.Array, np.ndarray)):
        return jnp.shape(leaf), jnp.result_type(leaf)
    return type(leaf), repr(leaf)


def undrawn(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose latent energies and flat sites are somewhere in their support: draws take long, and are not wanted."""
    return substitute(model, substitute_fn=_feasible)


def _feasible(msg: Message) -> Array | None:
    """A value for a latent energy or flat site where its draw is not wanted."""
    if msg["type"] != "sample" or msg["value"] is not None:
        return None
    if energy_site(msg["fn"]) is None and not is_flat(msg["fn"]):
        return None
    return stand_in(msg["fn"])


def _fixed_support(name: str, energy: TiltedDistribution, dtype: Any) -> Array:
    """0, and an error where the support depends on a parameter: the chains' mean lacks the gradient of its boundary."""
    bounds = [bound for bound in jax.tree.leaves(energy.support) if jnp.issubdtype(jnp.result_type(bound), jnp.floating)]
    message = (
        f"site '{name}': its support depends on a parameter, and the negative phase has no gradient for the boundary of a "
        "support. Fix the support, and transform the site with TransformedDistribution instead."
    )
    return refuse_gradient(message, dtype, [jnp.asarray(bound) for bound in bounds])


def _where_it_stands(fn: Distribution, log_normalizer: Array) -> Array:
    """One log-normalizer per element of the site, through the wrappers that plates, masks and users put around it."""
    if isinstance(fn, TiltedDistribution):
        return log_normalizer
    inner = _where_it_stands(fn.base_dist, log_normalizer)
    if isinstance(fn, ExpandedDistribution):
        return jnp.broadcast_to(inner, fn.batch_shape)
    if isinstance(fn, MaskedDistribution):
        return jnp.where(mask_of(fn), inner, 0.0)
    if isinstance(fn, Independent):
        return sum_rightmost(inner, fn.reinterpreted_batch_ndims)
    return inner


def explain_chains(
    phase: negative_phase, name: str, status: int, args: tuple[Any, ...], kwargs: dict[str, Any], data: dict[str, Any]
) -> str:
    """What the ``status`` of a site's chains means, and the fix, in the words of the sampler that moves them.

    A status says nothing of its sampler, which the model may give to the site: it is run again, abstractly.

    :param data: values of param and mutable sites.
    """
    found: list[Sampler] = []
    jax.eval_shape(lambda: found.append(chains_target(phase, name, args, kwargs, data)[1]))
    return explain(found[0], status)


def chains_target(
    phase: negative_phase, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], data: dict[str, Any]
) -> tuple[Any, Sampler]:
    """What the chains of a site are of, a distribution or the class of random fields, and the sampler that moves them.

    :param data: values of param and mutable sites.
    """
    phase = innermost(phase)
    program = run_model(undrawn(phase.fn), args, kwargs, jax.random.key(0), data=data)
    energy: Any = RandomField if name == FIELD else energy_site(program.sites[name]["fn"])
    return energy, phase._sampler_of(name, energy)


def innermost(phase: negative_phase) -> negative_phase:
    """The handler that has the chains, where one is around another."""
    inside: Any = phase
    while isinstance(inside, Messenger):
        if isinstance(inside, negative_phase):
            phase = inside
        inside = inside.fn
    return phase
