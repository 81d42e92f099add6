# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The negative phase of a model inside an engine, which reads the health of the chains itself.

An engine differentiates a model without its normalizers, as often as it likes: once for every particle. The gradient of the
normalizers is that of all of them, and comes once a step, with the chains moved.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array

from numpyro_ebm.chains import chains_of, is_warning, status_of
from numpyro_ebm.distributions.energy import energy_site
from numpyro_ebm.evaluate.negative_chains import NUM_SAMPLES, UNADJUSTED, ChainNumbers, chain_findings, chain_numbers
from numpyro_ebm.evaluate.report import Finding, Warned
from numpyro_ebm.evaluate.stationarity import RunOf
from numpyro_ebm.handlers import explain_chains, negative_phase, unnormalized
from numpyro_ebm.program.check import ModelReport, check_run
from numpyro_ebm.program.run import Run, run_model, total
from numpyro_ebm.program.sites import Model, is_normalizer
from numpyro_ebm.train.health import Health, Part

Data = dict[str, Any]  # values of param and mutable sites and indices of plates, by name


class _without_normalizers(unnormalized):
    """Lifts the guard, and leaves out of the model's random keys those that chains take: what the model draws by itself after an
    energy site, such as dropout, is then the same with and without chains.
    """

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and energy_site(msg["fn"]) is not None:
            numpyro.prng_key()


class Phase:
    """A model without its normalizers, ``inner``, and their gradient from negative chains.

    :param model: a NumPyro model, or :class:`negative_phase(model, ...) <numpyro_ebm.negative_phase>` to say how chains move.
    """

    def __init__(self, model: Model) -> None:
        self.inner = _without_normalizers(model)
        self._is_given = isinstance(model, negative_phase)
        handler = model if isinstance(model, negative_phase) else negative_phase(model)  # which adds nothing to one inside
        self._handler = handler.without_reports()

    def report(self, data: Data, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelReport:
        """What is to be known of the model's normalizers; refuses those that chains cannot make right.

        :raises NormalizerError: naming the site.
        """
        report = check_run(self.inner, args, kwargs, data=data)
        report.require_learnable()
        return report

    def start(
        self,
        report: ModelReport,
        rng_key: Array,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        data: Data,
        latents: dict[str, Array],
    ) -> dict[str, Any]:
        """The mutable sites of the model, with chains if a gradient needs them."""
        model = self._handler if self._is_given or report.needs_negative_phase else self.inner
        return run_model(model, args, kwargs, rng_key, data=data, latents=latents).mutable_state

    def gradient(self, terms: Callable[[Model, Any], tuple[dict[str, Array], Run]], params: Any) -> tuple[Any, dict[str, Any]]:
        """The gradient of the terms ``-log Z`` in the parameters, and the mutable sites with the chains moved.

        :param terms: the log density of every site of a model at parameters, and the run that gave it.
        """

        def of_normalizers(params: Any) -> tuple[Array, dict[str, Any]]:
            of_sites, run = terms(self._handler, params)
            return total({name: term for name, term in of_sites.items() if is_normalizer(name)}), run.mutable_state

        return jax.grad(of_normalizers, has_aux=True)(params)

    def explain(self, site: str, status: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, data: Data) -> str:
        """What the status of a site's chains means, and the fix."""
        return f"site '{site}': {explain_chains(self._handler, site, status, args, kwargs, data)}"

    def warnings(self, mutable_state: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, data: Data) -> list[str]:
        """A warning for every site whose chains give one."""
        found = {site: int(status) for site, status in status_of(mutable_state).items()}
        warned = {site: status for site, status in found.items() if is_warning(status)}
        said = {site: self.explain(site, status, args, kwargs, data=data) for site, status in warned.items()}
        return [Warned(text, UNADJUSTED, site=site) if warned[site] == 1 else text for site, text in said.items()]

    def numbers(
        self, rng_key: Array, params: Data, mutable_state: Data, args: tuple[Any, ...], kwargs: Data, run_of: RunOf
    ) -> ChainNumbers:
        """What is measured of the chains of a fit; traced.

        :param run_of: a run of the model by a key, with latents from their posterior.
        """
        return chain_numbers(rng_key, self._handler, NUM_SAMPLES, params, mutable_state, args, kwargs, run_of)

    def findings(
        self, numbers: ChainNumbers, params: Data, mutable_state: Data, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Finding]:
        """What is to be said of the chains of a fit."""
        return chain_findings(self._handler, numbers, params, mutable_state, args, kwargs)


def has_chains(mutable_state: dict[str, Any]) -> bool:
    """Whether there are negative chains."""
    return bool(chains_of(mutable_state))


def health_of_chains(mutable_state: dict[str, Any]) -> Health:
    """Of each site's chains 0, or their status where it is that of an error."""
    return {Part("chains", site): jnp.where(status > 1, status, 0) for site, status in status_of(mutable_state).items()}
