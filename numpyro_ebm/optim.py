# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

r"""What counts as an optimizer, and Langevin dynamics as optax transformations: gradient steps with noise that makes them sample.

Given the gradient :math:`g` of a potential :math:`U`, they move by a step :math:`h` at temperature :math:`T`, so that the
distribution :math:`\propto \exp(-U / T)` is stationary as :math:`h \to 0`. **The temperature is not an argument of theirs.** It
belongs to the gradient: :class:`~numpyro_ebm.ParticleMMLE` passes ``1 / num_particles`` with a gradient summed over data and ``1
/ (num_data * num_particles)`` with one averaged over them, and 1 to its particles, so that the two scalings cannot be mixed by
accident. It passes the random key too, and nothing random is kept in a state.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import optax
from jax import Array

from numpyro_ebm._checks import require_bool, require_instance, require_positive

__all__ = ["kinetic_langevin", "kinetic_langevin_splitting", "langevin"]

Schedule = Callable[[Array], Array]


def as_transformation(optim: Any, name: str = "optim") -> optax.GradientTransformationExtraArgs:
    """An optimizer as an optax transformation: optax's own, or one of :mod:`numpyro.optim`.

    What ``update`` is given besides the gradient and the optimizer does not know is left out; what the optimizer needs and
    ``update`` is not given is told by name.

    :param str name: the argument that it was passed as.
    :raises TypeError: for anything else; from ``init``, for an optimizer of other params; from ``update``, for one that needs
        what is not given, such as the value of the loss.
    """
    init, update = _functions(optim, name)

    def checked_init(params: Any) -> Any:
        try:
            return init(params)
        except (AttributeError, KeyError, ValueError) as error:
            raise TypeError(_misfit(name, params, error)) from error

    def fitted_update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        while True:
            try:
                return update(updates, state, params, **extra)
            except AttributeError as error:
                raise TypeError(_misfit(name, params, error)) from error
            except (TypeError, ValueError) as error:
                # optax says nowhere which of these an optimizer takes, and optax.chain hides it: only a call tells
                unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                if unknown is not None and unknown[1] in extra:
                    extra = {key: value for key, value in extra.items() if key != unknown[1]}
                    continue
                if needed := _NEEDED.search(str(error)):
                    raise TypeError(_lack(name, needed[1] or needed[2])) from error
                if _OTHER_TREE.search(str(error)):
                    raise TypeError(_misfit(name, params, error)) from error
                raise

    return optax.GradientTransformationExtraArgs(checked_init, fitted_update)


def apply_gradient(
    transformation: Any,
    gradient: Any,
    optim_state: Any,
    values: Any,
    *,
    value: Array | None = None,
    value_fn: Callable[[Any], Array] | None = None,
) -> tuple[Any, Any]:
    """One step of an optax transformation: the new values and its new state.

    :param value: the loss at ``values``, for optimizers that need it.
    :param value_fn: the loss as a function of them, for optimizers that search along a line: ``gradient`` must be its
        derivative, and it must see the same rows and the same noise.
    """
    extra: dict[str, Any] = {} if value is None else {"value": value}
    if value_fn is not None:
        extra |= {"grad": gradient, "value_fn": value_fn}
    updates, optim_state = transformation.update(gradient, optim_state, values, **extra)
    return optax.apply_updates(values, updates), optim_state


_NEEDED = re.compile(r"required keyword-only arguments?: (.*)|(\w+) must be provided")
_OTHER_TREE = re.compile(r"tree structure error|^Expected .*, got ")  # as JAX says it, and before 0.10.2


def _functions(optim: Any, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions of an optimizer."""
    if isinstance(optim, optax.GradientTransformation):
        optim = optax.with_extra_args_support(optim)
        return optim.init, optim.update
    if isinstance(optim, type) or callable(optim):
        what = getattr(optim, "__name__", repr(optim))
        raise TypeError(f"{name} is {what} itself, and must be what it makes: pass an instance, such as {what}(1e-3).")
    if isinstance(optim, numpyro.optim.Minimize):
        raise TypeError(
            f"{name} is numpyro.optim.Minimize, which moves params only where it evaluates the loss itself, in SVI: take an "
            "optimizer with a step, such as optax.adam(1e-3)."
        )
    require_instance(name, optim, ("init", "update", "get_params"), "an optax transformation such as optax.adam(1e-3)")

    def update(grads: Any, state: Any, params: Any = None, *, value: Any = None, **extra: Any) -> tuple[Any, Any]:
        if getattr(optim, "update_with_value", False):
            if value is None:
                raise TypeError(
                    f"{name} is an optimizer of NumPyro's that is passed the value of the loss, which is not known here: pass the "
                    "optax transformation that it was made of, without optax_to_numpyro."
                )
            state = optim.update(grads, state, value=value)
        else:
            state = optim.update(grads, state)
        return jax.tree.map(lambda new, old: new - old, optim.get_params(state), params), state

    return optim.init, update


def _misfit(name: str, params: Any, error: Exception) -> str:
    known = f" {sorted(params)}" if isinstance(params, dict) else ""
    return (
        f"{name} does not fit the params{known}: labels and masks must be trees of the same names, and an optimizer of params of "
        "its own kind (optax.lookahead) or one that searches along a line for some params only cannot be used. It failed with: "
        f"{error}"
    )


def _lack(name: str, needed: str) -> str:
    return (
        f"{name} needs {needed} beside the gradient, which is not given to it here. At most the loss is, by value and as a "
        "function of the params, and only where the gradient is that of a loss which can be evaluated again: without noise on "
        "it, a negative phase or a derivative of the step itself. Take an optimizer that needs the gradient alone, such as "
        "optax.adam(1e-3)."
    )


class LangevinState(NamedTuple):
    """State of :func:`langevin`."""

    num_steps: Array  # (), int32: steps done, for a schedule


class KineticLangevinState(NamedTuple):
    """State of :func:`kinetic_langevin` and :func:`kinetic_langevin_splitting`."""

    velocity: Any  # like the position


def langevin(step_size: float | Schedule) -> optax.GradientTransformationExtraArgs:
    r"""Overdamped Langevin: the update is :math:`-h g + \sqrt{2 h T} \, \xi`, with :math:`\xi \sim N(0, I)`.

    As the optimizer of :class:`~numpyro_ebm.ParticleMMLE` this is IPLA (summed gradient, :math:`T = 1/N`) or EBIPLA (averaged
    gradient, :math:`T = 1/(MN)`), whose stationary distribution of the parameters is :math:`\propto p_\theta(y)^N` for small h.

    :param step_size: the step :math:`h`, or a schedule of it.
    :raises ValueError: if the step is not positive and finite; when updating, without the ``temperature`` and ``rng_key``
        that the engine passes.

    **References**

    1. Akyildiz et al., *Interacting particle Langevin algorithm for maximum marginal likelihood estimation*, ESAIM: PS 29
       (2025), arXiv:2303.13429.
    2. Marks et al., *Energy-based interacting particle Langevin algorithm*, UAI 2026, arXiv:2510.12311.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ebm import langevin
        >>> optim = langevin(0.1)
        >>> state = optim.init(jnp.zeros(3))
        >>> updates, state = optim.update(
        ...     jnp.ones(3), state, temperature=0.0, rng_key=jax.random.key(0)
        ... )
        >>> updates
        Array([-0.1, -0.1, -0.1], dtype=float32)
    """
    step_size = require_step(step_size)

    def init(params: Any) -> LangevinState:
        return LangevinState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: LangevinState, params: Any = None, *, temperature: Any = None, rng_key: Any = None, **extra: Any
    ) -> tuple[Any, LangevinState]:
        _require_extra("langevin", temperature, rng_key)
        h = step_size(state.num_steps) if callable(step_size) else step_size
        noise = normal_like(rng_key, updates)
        sd = jnp.sqrt(jnp.asarray(2 * h * temperature))
        updates = jax.tree.map(lambda g, xi: -h * g + sd.astype(g.dtype) * xi, updates, noise)
        return updates, LangevinState(state.num_steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def kinetic_langevin(
    step_size: float, friction: float, *, inverse_mass: float = 1.0, noise: bool = True, lookahead: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Underdamped Langevin by the exponential integrator: exact while the gradient is frozen.

    .. math:: dx = \eta v \, dt, \qquad dv = -\gamma \eta v \, dt - g \, dt + \sqrt{2 \gamma T} \, dB.

    With :math:`e = \exp(-\gamma \eta h)` one step is

    .. math::

        x' &= x + [(1 - e) v - (h - \tfrac{1 - e}{\gamma \eta}) g] / \gamma + \xi_x, \qquad
        v' = e v - \tfrac{1 - e}{\gamma \eta} g + \xi_v, \\
        \mathrm{Var}\, \xi_x &= \tfrac{T}{\gamma} (2h - \tfrac{3 - 4e + e^2}{\gamma \eta}), \quad
        \mathrm{Var}\, \xi_v = T \tfrac{1 - e^2}{\eta}, \quad \mathrm{Cov}(\xi_x, \xi_v) = T \tfrac{(1 - e)^2}{\gamma \eta}.

    Velocities start at 0. With ``inverse_mass`` 1 this is KIPLMC1; the momentum particle descent of Lim et al. has
    ``inverse_mass`` :math:`\eta`, and its parameters have no noise and are evaluated where their velocity takes them.

    :param float step_size: the step :math:`h`.
    :param float friction: :math:`\gamma`.
    :param float inverse_mass: :math:`\eta`.
    :param bool noise: whether to inject noise.
    :param bool lookahead: whether the gradient is that at the point :math:`x + (1 - e) v / \gamma` (Nesterov); the parameters
        are then this point.
    :raises ValueError: if an argument is not positive and finite.

    **References**

    1. Oliva and Akyildiz, *Kinetic interacting particle Langevin Monte Carlo*, 2024, arXiv:2407.05790.
    2. Lim et al., *Momentum particle maximum likelihood*, ICML 2024, arXiv:2312.07335.
    """
    h, gamma = require_positive("step_size", step_size), require_positive("friction", friction)
    eta = require_positive("inverse_mass", inverse_mass)
    noise, lookahead = require_bool("noise", noise), require_bool("lookahead", lookahead)
    a = gamma * eta * h
    decay, gone = math.exp(-a), -math.expm1(-a)  # e and 1 - e
    drift = (a - gone) / (gamma * eta)  # h - (1 - e) / (gamma eta)
    var_x = _integrated_variance(a) / (gamma**2 * eta)
    var_v = -math.expm1(-2 * a) / eta
    cov = gone**2 / (gamma * eta)
    on_x = cov / math.sqrt(var_v)  # what the position shares with the velocity's noise
    rest = math.sqrt(max(var_x - on_x**2, 0.0))

    def init(params: Any) -> KineticLangevinState:
        return KineticLangevinState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: KineticLangevinState, params: Any = None, *, temperature: Any = None, rng_key: Any = None, **extra: Any
    ) -> tuple[Any, KineticLangevinState]:
        _require_extra("kinetic_langevin", temperature, rng_key)
        sd = jnp.sqrt(jnp.asarray(temperature)) if noise else jnp.zeros(())
        shared, own = (normal_like(key, updates) for key in jax.random.split(rng_key))

        def move(g: Array, v: Array, xi: Array, zeta: Array) -> Array:
            return (gone * v - drift * g) / gamma + sd.astype(g.dtype) * (on_x * xi + rest * zeta)

        def turn(g: Array, v: Array, xi: Array) -> Array:
            return decay * v - gone / (gamma * eta) * g + sd.astype(g.dtype) * math.sqrt(var_v) * xi

        velocity = jax.tree.map(turn, updates, state.velocity, shared)
        moves = jax.tree.map(move, updates, state.velocity, shared, own)
        if lookahead:
            moves = jax.tree.map(lambda m, new, old: m + gone * (new - old) / gamma, moves, velocity, state.velocity)
        return moves, KineticLangevinState(velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def kinetic_langevin_splitting(step_size: float, friction: float) -> optax.GradientTransformationExtraArgs:
    r"""Underdamped Langevin by splitting (KIPLMC2), with an error of :math:`O(h^2)` where :func:`kinetic_langevin` has O(h).

    Half a step of friction and noise, a step of velocity Verlet, and half a step of friction and noise: with
    :math:`d = \exp(-\gamma h / 2)` and :math:`\bar d = \sqrt{1 - d^2}`,

    .. math::

        x' &= x + h (d v + \bar d \sqrt T \xi) - \tfrac{h^2}{2} g(x), \\
        v' &= d^2 v - \tfrac{d h}{2} (g(x) + g(x')) + \bar d \sqrt T (d \xi + \xi').

    The gradient at :math:`x'` is that of the next step, so each step costs one: the state keeps :math:`v'` without its last
    term, which the next step adds first. What is kept starts at 0, and so the first velocity is that of half a kick.

    :param float step_size: the step :math:`h`.
    :param float friction: :math:`\gamma`.
    :raises ValueError: if an argument is not positive and finite.

    **References**

    1. Oliva and Akyildiz, *Kinetic interacting particle Langevin Monte Carlo*, 2024, arXiv:2407.05790.
    """
    h, friction = require_positive("step_size", step_size), require_positive("friction", friction)
    d = math.exp(-friction * h / 2)
    d_bar = math.sqrt(-math.expm1(-friction * h))

    def init(params: Any) -> KineticLangevinState:
        return KineticLangevinState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: KineticLangevinState, params: Any = None, *, temperature: Any = None, rng_key: Any = None, **extra: Any
    ) -> tuple[Any, KineticLangevinState]:
        _require_extra("kinetic_langevin_splitting", temperature, rng_key)
        sd = jnp.sqrt(jnp.asarray(temperature))
        before, after = (normal_like(key, updates) for key in jax.random.split(rng_key))
        velocity = jax.tree.map(lambda v, g: v - d * h / 2 * g, state.velocity, updates)  # the last term of the step before

        def move(v: Array, g: Array, xi: Array) -> Array:
            return h * (d * v + d_bar * sd.astype(g.dtype) * xi) - h**2 / 2 * g

        def turn(v: Array, g: Array, xi: Array, zeta: Array) -> Array:
            return d**2 * v - d * h / 2 * g + d_bar * sd.astype(g.dtype) * (d * xi + zeta)

        moves = jax.tree.map(move, velocity, updates, before)
        return moves, KineticLangevinState(jax.tree.map(turn, velocity, updates, before, after))

    return optax.GradientTransformationExtraArgs(init, update)


def normal_like(rng_key: Array, tree: Any) -> Any:
    """Standard normal noise of the shapes and dtypes of a pytree, every array with a key of its own.

    All noise that moves parameters and particles is drawn here. Who uses it looks it up in this module, so that a test that
    hands out noise of its own replaces one function.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(rng_key, len(leaves))
    noise = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def _integrated_variance(a: float) -> float:
    """2a - 3 + 4 exp(-a) - exp(-2a), whose terms cancel to (2/3) a^3 for small a."""
    if a > 0.1:
        return 2 * a - 3 + 4 * math.exp(-a) - math.exp(-2 * a)
    return sum((-a) ** k * (4 - 2**k) / math.factorial(k) for k in range(3, 14))


def require_step(step_size: Any) -> Any:
    """A schedule of one number for all, or a positive finite number."""
    if not callable(step_size):
        return require_positive("step_size", step_size)
    shape = jax.eval_shape(step_size, jax.ShapeDtypeStruct((), jnp.int32)).shape
    if shape != ():
        raise ValueError(f"step_size must give one number for a step, got an array of shape {shape}.")
    return step_size


def _require_extra(name: str, temperature: Any, rng_key: Any) -> None:
    if temperature is None or rng_key is None:
        raise ValueError(
            f"{name} injects noise and needs the temperature and rng_key that ParticleMMLE passes to its optimizer: it cannot be "
            "used in SVI. By hand, pass them to update: optim.update(gradient, state, temperature=..., rng_key=...)."
        )
