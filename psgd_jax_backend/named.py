"""The named functions of the transformation: `<name>` and `scale_by_<name>` for each registered method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import Parameter, Signature
from textwrap import fill
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformationExtraArgs as Made

from psgd._xp import is_of_jax, is_of_numpy
from psgd.calls import by_name
from psgd.documentation import WIDTH, documented
from psgd.hyperparameters import Method, checked
from psgd.naming import shown, unknown
from psgd_jax_backend._arguments import ADAPTER, Default
from psgd_jax_backend._per_tensor import is_tree_of_flags
from psgd_jax_backend._state import Tree, states
from psgd_jax_backend.transform import scale_by_psgd

# The learning rate by optax's name for it.
OPTAX_NAMES = {"lr": "learning_rate"}


def _whole_skips(tx: Made) -> Made:
    """A chain in which nothing moves where its PSGD method skips a step: no weight decay either."""

    def update(updates: Tree, state: Tree, params: Tree = None, **extra_args: object) -> tuple[Tree, Tree]:
        updates, new = tx.update(updates, state, params, **extra_args)
        (method_state,) = states(new)
        if method_state.skipped is not None:
            go = method_state.skipped[1] == 0
            updates = jax.tree.map(lambda u: jnp.where(go, u, jnp.zeros_like(u)), updates)
        return updates, new

    return optax.GradientTransformationExtraArgs(tx.init, update)


# ---- arguments --------------------------------------------------------------------------
def _static(method: type[Method]) -> tuple[str, ...]:
    """Names of the arguments that shape the program, for `optax.inject_hyperparams(..., static_args=)`."""
    structural = [f.name for f in fields(method) if f.metadata["structural"]]
    return (*structural, method.mask_name, *ADAPTER)


def _parameters(method: type[Method], *left_out: str) -> list[Parameter]:
    """The parameters of a function: in the published order those that have a place in it, then the others by name."""
    mask = Parameter(method.mask_name, Parameter.KEYWORD_ONLY, default=None, annotation="Any")
    hyperparameters = [
        Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields(method)
    ]
    every = {p.name: p for p in (*hyperparameters, mask, *(x.parameter(name) for name, x in ADAPTER.items()))}
    static = _static(method)
    every = {name: Default.shown(p) if name in static else p for name, p in every.items() if name not in left_out}
    if method().recipe().joint:
        del every["scanned_layers"]  # there is one preconditioner for all parameters
    rate = every.get("lr")
    if rate is not None:
        every["lr"] = rate.replace(annotation=optax.ScalarOrSchedule)
    placed = [name for name in method.positional if name in every]
    first = [every.pop(name).replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for name in placed]
    return [p.replace(name=OPTAX_NAMES.get(p.name, p.name)) for p in (*first, *every.values())]


def _seed(value: Any) -> Any:
    """A seed; of a JAX key, as psgd_jax takes, its last word."""
    if not (is_of_jax(value) or is_of_numpy(value)):
        return value
    typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(value) if typed else value
    if words.ndim != 1 or words.dtype != jnp.uint32 or words.size < 2:
        return value
    word = words[-1]
    return word if isinstance(word, jax.core.Tracer) else int(word)


def _checked(
    function: str, method: type[Method], parameters: list[Parameter], args: Sequence[object], keywords: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a function was given, by name: arguments of the method, arguments of the adapter. Nothing unknown is among
    them, and no array where the program's shape is meant.
    """
    names = [p.name for p in parameters]
    positions = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    why = "" if len(method.positional) > 1 else f", since the order of {method.source} is another"
    keywords = {name: Default.meant(value) for name, value in by_name(function, positions, args, keywords, why).items()}
    if "seed" in keywords:
        keywords["seed"] = _seed(keywords["seed"])
    for name in keywords:
        if name not in names and name not in ADAPTER:
            raise ValueError(unknown(method.name, name, names))
    for name in _static(method):
        if isinstance(keywords.get(name), jax.Array):
            raise ValueError(
                f"{method.name}: {name} shapes the program, so it must be known before tracing and cannot be an array; "
                f"with optax.inject_hyperparams give static_args={function}.static_args"
            )
    return (
        {k: v for k, v in keywords.items() if k not in ADAPTER},
        {k: v for k, v in keywords.items() if k in ADAPTER},
    )


# ---- functions --------------------------------------------------------------------------
def scaling(method: type[Method], module: str, name: str = "") -> Callable[..., Made]:
    """`scale_by_<name>`: the method without learning rate and weight decay."""
    parameters, name = _parameters(method, "lr", "weight_decay", method.mask_name), f"scale_by_{name or method.name}"

    def scale_by(*args: object, **keywords: Any) -> Made:
        hyperparameters, mapping = _checked(name, method, parameters, args, keywords)
        return scale_by_psgd(method.of(**hyperparameters), **mapping)

    return _dressed(scale_by, name, method, module, parameters, SCALED)


def named_function(method: type[Method], module: str, name: str = "") -> Callable[..., Made]:
    """`<name>`: the whole optimizer: direction, decoupled weight decay, learning rate (a number or a schedule)."""
    parameters, name = _parameters(method), name or method.name
    (field,) = (f for f in fields(method) if f.name == "lr")

    def optimizer(*args: object, **keywords: Any) -> Made:
        hyperparameters, mapping = _checked(name, method, parameters, args, keywords)
        mask = hyperparameters.pop(method.mask_name, None)
        learning_rate = hyperparameters.pop("learning_rate", field.default)
        record = method.of(**hyperparameters)
        if not callable(learning_rate) or isinstance(learning_rate, type):
            try:
                learning_rate = checked(method.name, field, learning_rate)
            except ValueError as error:
                raise ValueError(f"{error}; here it is learning_rate, which may be a schedule too") from None
        if not (is_tree_of_flags(mask) or (callable(mask) and not isinstance(mask, type))):
            raise ValueError(
                f"{method.name}: {method.mask_name}={shown(mask)} must be None, a tree of booleans as the parameters "
                "or a prefix of them, or a function of the parameters that gives one"
            )
        decay = record.weight_decay
        off = isinstance(decay, (int, float)) and decay == 0
        scaled, decayed = (
            scale_by_psgd(record, **mapping),
            optax.identity() if off else optax.add_decayed_weights(decay, mask),
        )
        decoupled = record.recipe().decoupled
        parts = (scaled, decayed) if decoupled else (decayed, scaled)
        whole = optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
        return _whole_skips(whole) if decoupled and not off else whole

    return _dressed(optimizer, name, method, module, parameters, WHOLE)


# ---- documentation ----------------------------------------------------------------------
EXAMPLE = """\
>>> import jax, jax.numpy as jnp, optax
>>> from psgd_jax_backend import {name}
>>> params, x = {{"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}}, jnp.ones((8, 4))
>>> loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - 1) ** 2)
>>> tx = {made}
>>> state, start = tx.init(params), loss(params)
>>> for step in range(3):
{gradients}
...     updates, state = tx.update(grads, state, params{pair})
...     params = optax.apply_updates(params, updates)
>>> bool(loss(params) < start)
True"""
WHOLE = "{name}()"
SCALED = "optax.chain({name}(), optax.scale_by_learning_rate(0.01))"
GRADIENTS = {
    False: "...     grads = jax.grad(loss)(params)",
    True: """\
...     from psgd_jax_backend import hessian_helper
...     _, grads, hvp, v, flag = hessian_helper(jax.random.key(step), loss, params)
...     pair = {"Hvp": hvp, "vector": v, "update_preconditioner": flag}""",
}

INJECTED = """\
{moving}
Give it `static_args={name}.static_args` where you set a number that shapes the program."""
RETURNS = (
    "an `optax.GradientTransformationExtraArgs`, whose `update` also takes `Hvp=`, `vector=` and "
    "`update_preconditioner=`, as `hessian_helper` returns them; {more} Updates come back in the dtype of the "
    "parameters where these are given, else of the gradients."
)
NEEDS = {True: "it needs them.", False: "with them it fits products of the Hessian instead."}
RAISES = {
    "ValueError": "for an argument that is unknown, out of range or, where it shapes the program, an array; from "
    "`init` and `update` for trees that do not match each other; from `update` for state that `init` would not make, "
    "as in another dtype, or with a NaN, which is looked for where arrays are NumPy's or a CPU's and not traced.",
    "TypeError": "for more arguments by position than have a place; from `init` and `update` for leaves that the "
    "method does not take, such as whole numbers.",
    "FloatingPointError": "from `update`, for gradients that are not finite, as `nonfinite` and `max_skips` say.",
}
OTHERS = {
    "learning_rate": "a number in [0, inf), or a schedule: a function of the number of steps done",
    **dict.fromkeys(
        ("mask", "weight_decay_mask"),
        "which leaves lose weight: a tree of booleans, as the parameters or a prefix of them, or a function of the "
        "parameters that gives one; None is all",
    ),
    "exact_hessian_vector_product": "has no effect here: `hessian_helper` makes the products, exactly",
    **{name: argument.doc for name, argument in ADAPTER.items()},
}


def _dressed(
    function: Callable[..., Tree],
    name: str,
    method: type[Method],
    module: str,
    parameters: list[Parameter],
    call: str,
) -> Callable[..., Made]:
    """A function with the name, signature and documentation that its method's record says."""
    newton = method().recipe().newton
    names = [p.name for p in parameters]
    static = tuple(x for x in _static(method) if x in names)
    moving = ", ".join(x for x in names if x not in static)
    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    function.__signature__ = Signature(parameters, return_annotation=Made)  # type: ignore[attr-defined]
    function.static_args = static  # type: ignore[attr-defined]
    (seed,) = (f.metadata["doc"] for f in fields(method) if f.name == "seed")
    function.__doc__ = documented(
        method,
        parameters,
        OTHERS | {"seed": f"{seed}; of a JAX key, its last word"},
        rate="learning_rate" if "learning_rate" in names else "",
        returns=RETURNS.format(more=NEEDS[newton]),
        raises=RAISES,
        note=INJECTED.format(name=name, moving=fill(f"`optax.inject_hyperparams` may change {moving}.", WIDTH)),
        example=EXAMPLE.format(
            name=name, made=call.format(name=name), gradients=GRADIENTS[newton], pair=", **pair" if newton else ""
        ),
    )
    return function
