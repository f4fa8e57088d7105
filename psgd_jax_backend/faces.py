"""The named faces of the transformation: `<name>` and `scale_by_<name>` for each registered method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from inspect import Parameter, Signature
from typing import Any

import jax
import jax.numpy as jnp
import optax

from psgd.methods import Method, documented
from psgd.naming import unknown
from psgd_jax_backend._stacks import Layering
from psgd_jax_backend._state import Guard, Tree, states
from psgd_jax_backend.transform import scale_by_psgd


def _whole_skips(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """A chain in which nothing moves where its PSGD method skips a step: no weight decay either."""

    def update(updates: Tree, state: Tree, params: Tree = None, **extra_args: Any) -> tuple[Tree, Tree]:
        updates, new = tx.update(updates, state, params, **extra_args)
        (own,) = states(new)
        if own.skipped is not None:
            go = own.skipped[1] == 0
            updates = jax.tree.map(lambda u: jnp.where(go, u, jnp.zeros_like(u)), updates)
        return updates, new

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _parameters(settings: Sequence[Field[Any]]) -> list[Parameter]:
    return [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in settings]


def _known(method: type[Method], names: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments, all of them in the signature."""
    for name in given:
        if name not in names:
            raise ValueError(unknown(method.name, name, [*names, *ADAPTER_DEFAULTS]))
    return given


# Arguments of every function that say how the work is mapped and guarded, not what it computes.
ADAPTER_DEFAULTS = Layering._field_defaults | Guard._field_defaults
ADAPTER = [Parameter(name, Parameter.KEYWORD_ONLY, default=default) for name, default in ADAPTER_DEFAULTS.items()]


def _static(method: type[Method]) -> tuple[str, ...]:
    """Names of the arguments that shape the program, for `optax.inject_hyperparams(..., static_args=)`."""
    structural = [f.name for f in fields(method) if f.metadata["structural"]]
    return (*structural, method.mask_name, *ADAPTER_DEFAULTS)


def _split(method: type[Method], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the method, arguments of the adapter; those that shape the program are no arrays."""
    for name in _static(method):
        if isinstance(given.get(name), jax.Array):
            raise ValueError(
                f"{method.name}: {name} shapes the program, so it must be known before tracing and cannot be an array; "
                f"with optax.inject_hyperparams give static_args={method.name}.static_args"
            )
    return (
        {k: v for k, v in given.items() if k not in ADAPTER_DEFAULTS},
        {k: v for k, v in given.items() if k in ADAPTER_DEFAULTS},
    )


def scaling(method: type[Method], module: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`scale_by_<name>`: the method without learning rate and weight decay."""
    settings = [f for f in fields(method) if f.name not in ("lr", "weight_decay")]
    names = [f.name for f in settings]

    def scale_by(**given: Any) -> optax.GradientTransformationExtraArgs:
        hyperparameters, mapping = _split(method, given)
        return scale_by_psgd(method.of(**_known(method, names, hyperparameters)), **mapping)

    return _dressed(scale_by, f"scale_by_{method.name}", method, module, _parameters(settings))


def alias(method: type[Method], module: str, name: str = "") -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`<name>`: the whole optimizer: direction, decoupled weight decay, learning rate (a number or a schedule)."""
    settings = [f for f in fields(method) if f.name != "lr"]
    default = {f.name: f.default for f in fields(method)}
    names = ["learning_rate", *(f.name for f in settings), method.mask_name]

    def optimizer(
        learning_rate: optax.ScalarOrSchedule = default["lr"], **given: Any
    ) -> optax.GradientTransformationExtraArgs:
        hyperparameters, mapping = _split(method, given)
        mask = hyperparameters.pop(method.mask_name, None)
        made = method.of(**_known(method, names, hyperparameters))
        if not callable(learning_rate):
            method.of(lr=learning_rate)  # only to check it
        decay = made.weight_decay
        off = isinstance(decay, (int, float)) and decay == 0
        scaled, decayed = (
            scale_by_psgd(made, **mapping),
            optax.identity() if off else optax.add_decayed_weights(decay, mask),
        )
        decoupled = made.recipe().decoupled
        parts = (scaled, decayed) if decoupled else (decayed, scaled)
        whole = optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
        return _whole_skips(whole) if decoupled and not off else whole

    rate = Parameter(
        "learning_rate",
        Parameter.POSITIONAL_OR_KEYWORD,
        default=default["lr"],
        annotation=optax.ScalarOrSchedule,
    )
    mask = Parameter(method.mask_name, Parameter.KEYWORD_ONLY, default=None)
    return _dressed(optimizer, name or method.name, method, module, [rate, *_parameters(settings), mask])


EXAMPLE = """\
>>> import jax, jax.numpy as jnp, optax
>>> from psgd_jax_backend import {name}
>>> params, x = {{"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}}, jnp.ones((8, 4))
>>> loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - 1) ** 2)
>>> tx = {name}()
>>> state = tx.init(params)
>>> for step in range(3):
{gradients}
...     updates, state = tx.update(grads, state, params{pair})
...     params = optax.apply_updates(params, updates)"""
GRADIENTS = {
    False: "...     grads = jax.grad(loss)(params)",
    True: """\
...     from psgd_jax_backend import hessian_helper
...     _, grads, hvp, v, flag = hessian_helper(jax.random.key(step), loss, params)
...     pair = {"Hvp": hvp, "vector": v, "update_preconditioner": flag}""",
}

INJECTED = """\
`{name}.static_args` tells `optax.inject_hyperparams` what shapes the program; it may change {moving}."""


def _dressed(
    function: Callable[..., Any], name: str, method: type[Method], module: str, parameters: list[Parameter]
) -> Callable[..., Any]:
    """A function with the name, signature and documentation that its method's record says."""
    function.__name__ = function.__qualname__ = name
    newton = method().recipe().newton
    example = EXAMPLE.format(name=name, gradients=GRADIENTS[newton], pair=", **pair" if newton else "")
    parameters = [*parameters, *ADAPTER]
    names = [p.name for p in parameters]
    static = tuple(x for x in _static(method) if x in names)
    moving = ", ".join(x for x in names if x not in static)
    function.__module__ = module
    function.__doc__ = documented(method, example, INJECTED.format(name=name, moving=moving))
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    function.static_args = static  # type: ignore[attr-defined]
    return function
