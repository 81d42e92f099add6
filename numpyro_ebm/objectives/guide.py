# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""A guide against the posterior by their scores in the latents: the Fisher divergence, which needs no normalizer.

The Kullback-Leibler divergence, up to the constant ``-log p(v)``, is :class:`numpyro.infer.Trace_ELBO`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro.distributions import Delta
from numpyro.handlers import substitute

from numpyro_ebm._compat import calling_objective
from numpyro_ebm.program.pair import require_latent, require_no_auxiliary, require_no_more
from numpyro_ebm.program.rows import dim_of, row_plate, shared_plates
from numpyro_ebm.program.run import Run, log_density_terms, run_model, total
from numpyro_ebm.program.sites import Model, Site, core_of, is_latent, kind_of, transform_of

Latents = dict[str, Array]


@dataclass(frozen=True)
class PosteriorFisher:
    r"""Half the Fisher divergence of a guide from the posterior, one sample per row of the data.

    .. math:: \tfrac12 \|\nabla_h [\log \tilde p(v, h) - \log q(h \mid v)]\|^2, \qquad h \sim q(\cdot \mid v).

    It is zero where the guide is the posterior. The visible is fixed; the gradient in the guide's parameters flows through the
    draw and through ``log q``. ``h`` are the values of the latents as the model has them, not transformed. Bits of the model are
    drawn relaxed by the guide, and enter by their log density at a soft value.

    Energies need no :class:`~numpyro_ebm.unnormalized`: :math:`\log Z` has no gradient in ``h``, and where it has, because the
    parameters of an energy depend on a latent, the guard refuses.

    All latents must lie in the plate whose rows are the data: the outermost that they share. :meth:`loss` stands in for
    ``Trace_ELBO().loss`` in :class:`numpyro.infer.SVI`, to fit a guide to a model without parameters of its own: the divergence
    says nothing of how well a model fits the data, so SVI must not move them.

    **References**

    1. Bao et al., *Bi-level score matching for learning energy-based latent variable models*, NeurIPS 2020,
       arXiv:2010.07856: the lower level of the deep models.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import SVI
        >>> from numpyro_ebm import PosteriorFisher
        >>> def model(v):
        ...     with numpyro.plate("data", len(v)):
        ...         h = numpyro.sample("h", dist.Normal(0, 1))
        ...         numpyro.sample("v", dist.Normal(h, 1), obs=v)
        >>> def guide(v):
        ...     slope = numpyro.param("slope", 0.0)
        ...     variance = numpyro.param("variance", 1.0, constraint=dist.constraints.positive)
        ...     with numpyro.plate("data", len(v)):
        ...         numpyro.sample("h", dist.Normal(slope * v, jnp.sqrt(variance)))
        >>> svi = SVI(model, guide, optax.adam(0.02), PosteriorFisher())
        >>> result = svi.run(
        ...     jax.random.key(0), 500, jnp.linspace(-2, 2, 50), progress_bar=False
        ... )
        >>> slope, variance = result.params["slope"], result.params["variance"]
        >>> print(f"slope {slope:.2f}, variance {variance:.2f}; both are 1/2")
        slope 0.50, variance 0.50; both are 1/2
    """

    #: SVI and the handlers read these of their objective
    can_infer_discrete: ClassVar[bool] = False
    num_particles: ClassVar[int] = 1

    def losses(self, rng_key: Array, params: dict[str, Any], model: Model, guide: Model, *args: Any, **kwargs: Any) -> Array:
        """The loss of every row of the latents' plate, of shape ``(batch,)``; subsampling does not scale it.

        :param rng_key: a key of :func:`jax.random.key`.
        :param dict params: constrained values of the param sites of model and guide, and values of their mutable sites.
        :param model: a NumPyro model.
        :param guide: its guide, which samples all its latents and nothing else.
        :param args: arguments of both.
        :raises ValueError: naming the site, if model and guide sample different latents or shapes, a latent is discrete, not
            reparametrized, without a density or outside the plate of the rows, or its values do not vary freely.
        """
        return self.losses_of_rows(None, rng_key, params, model, guide, args, kwargs)[0]

    def loss(self, rng_key: Array, params: dict[str, Any], model: Model, guide: Model, *args: Any, **kwargs: Any) -> Array:
        """The sum of :meth:`losses` over rows, a scalar.

        :raises ValueError: as :meth:`losses` does; under SVI, if the model has param sites that the guide has not.
        """
        return self.loss_with_mutable_state(rng_key, params, model, guide, *args, **kwargs)["loss"]

    def loss_with_mutable_state(
        self, rng_key: Array, params: dict[str, Any], model: Model, guide: Model, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """:meth:`loss`, and the values of the mutable sites after it."""
        losses, mutable_state = self.losses_of_rows(None, rng_key, params, model, guide, args, kwargs)
        return {"loss": losses.sum(), "mutable_state": mutable_state or None}

    def losses_of_rows(
        self,
        plate: str | None,
        rng_key: Array,
        params: dict[str, Any],
        model: Model,
        guide: Model,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Array, dict[str, Any]]:
        """:meth:`losses`, and the values of the mutable sites after it.

        :param plate: the plate of the rows, if who calls knows it; else the outermost that all latents of the guide share.
        """
        model_key, guide_key = jax.random.split(rng_key)
        drawn = run_model(guide, args, kwargs, guide_key, data=params)
        _require_scores(drawn)
        rows = _rows_of(drawn) if plate is None else plate
        indices = {name: plate.indices for name, plate in drawn.plates.items()}

        def log_ratio(h: Latents) -> tuple[Array, dict[str, Any]]:
            data = {**params, **indices}
            with numpyro.validation_enabled(False):  # it would make bits with a soft value impossible, and cut their gradient
                log_p, seen = log_density_terms(_at(h, model, drawn, rows), args, kwargs, model_key, data=data)
            require_no_more(seen, drawn)
            if calling_objective() is self:  # SVI moves the params of both
                _require_fixed_model(seen, drawn)
            log_q, _ = log_density_terms(guide, args, kwargs, guide_key, data={**data, **h})
            return total(log_p) - total(log_q), seen.mutable_state

        # params are closed over by h and by log_ratio: the guide's reach the loss on both ways
        scores, mutable_state = jax.grad(log_ratio, has_aux=True)(drawn.drawn)
        squares = [_by_row(drawn, name, rows, (score / drawn.scale(name)) ** 2) for name, score in scores.items()]
        return jnp.sum(jnp.stack(squares), 0) / 2, {**drawn.mutable_state, **mutable_state}


def _by_row(run: Run, name: str, plate: str, value: Array) -> Array:
    """The sum over everything but a plate of an array that is shaped like a latent, ``(rows,)``."""
    dim = dim_of(run.sites[name], plate)
    assert dim is not None  # all latents are in it
    value = jnp.moveaxis(value, dim - run.sites[name]["fn"].event_dim, 0)
    return value.reshape(len(value), -1).sum(-1)


def _rows_of(program: Run) -> str:
    """The plate of the rows, in which all latents of a guide lie."""
    plate = row_plate(program, program.latents)
    if plate is not None:
        return plate
    outside = next((name for name in program.latents if not shared_plates(program, [name])), None)
    where = f"site '{outside}' stands in no plate" if outside else f"the guide's latents {sorted(program.latents)} share no plate"
    raise ValueError(
        f"{where}: the loss is computed row by row, and each row needs its own latents. Put all latents in the plate of the "
        "data, in model and guide; a latent that all rows share is what a numpyro.param is for here."
    )


def _at(h: Latents, model: Model, drawn: Run, rows: str) -> Model:
    """The model with its latents at the guide's samples; refuses latents that are not those of the guide."""

    def value(site: Site) -> Array | None:
        if not is_latent(site):
            return None
        require_latent(site, drawn, plate=rows)
        return h[site["name"]]

    return substitute(model, substitute_fn=value)


def _require_scores(drawn: Run) -> None:
    """Refuses guides whose samples have no gradient in the parameters, or whose density has none in the samples."""
    if not drawn.latents:
        raise ValueError("the guide samples no latent: it must sample those of the model.")
    require_no_auxiliary(drawn)
    for name in drawn.latents:
        site = drawn.sites[name]
        kind = kind_of(site["fn"])
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"site '{name}': {kind} is discrete, and the loss needs a gradient in its value. Draw it relaxed in the guide, "
                "with GumbelBernoulli for bits, or make the latent continuous."
            )
        if not site["fn"].has_rsample:
            raise ValueError(
                f"site '{name}': samples of {kind} have no gradient in its parameters. Give the guide a reparametrized "
                "distribution such as Normal, or GumbelBernoulli for bits."
            )
        if isinstance(core_of(site["fn"]), Delta):
            raise ValueError(f"site '{name}': Delta has no density, and no score to compare with the posterior's. Use Normal.")
        _require_free(site)


def _require_free(site: Site) -> None:
    """Refuses latents that lie on a surface, where a gradient in the value means nothing."""
    shape = site["fn"].event_shape
    free = transform_of(site).inverse_shape(shape)
    if free != shape:
        raise ValueError(
            f"site '{site['name']}': values of shape {shape} that obey {site['fn'].support} have fewer free coordinates, {free}, "
            "and no gradient of their own. Sample those, and transform them with numpyro.deterministic."
        )


def _require_fixed_model(model: Run, guide: Run) -> None:
    if learned := sorted(set(model.params) - set(guide.params)):
        raise ValueError(
            f"param site '{learned[0]}' of the model: SVI would move it to where the posterior suits the guide, whatever the data. "
            "Fix it, with numpyro.handlers.block(numpyro.handlers.substitute(model, data=params), hide=list(params)), or learn "
            "it with an engine that has an objective for the model."
        )
