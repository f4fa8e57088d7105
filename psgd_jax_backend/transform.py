"""The one generic optax transformation. Its named faces, one for each registered method, are made in `__init__`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from inspect import Parameter, Signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from psgd import pipeline
from psgd.kron import Factors
from psgd.methods import Method, documented
from psgd.pipeline import Plan, Recipe, State

Leaf = jax.Array
Tree = Any


class PSGDState(NamedTuple):
    """count: steps done. momentum: a tree as the parameters', or None. Q, L: such a tree with a tuple of arrays, one
    for each factor, in place of every leaf."""

    count: Leaf  # type: ignore[assignment]  # a tuple's method; optax's own states have the name too
    momentum: Tree
    Q: Tree
    L: Tree


def scale_by_psgd(method: Method, *, stack: bool = True) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by a method: gives the direction u, without learning rate and weight decay.

    Leaves of equal shape and dtype are stepped together under `jax.vmap` unless `stack` is false; the numbers are the
    same, compilation and many small layers are faster. Updates come back in the dtype of the parameters where these
    are given, else of the gradients. State: `PSGDState`.

    Raises: TypeError for leaves that are not floating point, ValueError for shapes that are not those of `init`.
    """
    recipe, tempo = method.recipe(), method.tempo()

    def init(params: Tree) -> PSGDState:
        leaves, treedef = _flattened(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            _check_leaf(method, path, leaf)
        scale = method.start_scale()
        states = []
        for p in map(jnp.asarray, leaves):
            state = pipeline.init(recipe, _laid_out(recipe, p), scale)
            momentum = None if state.momentum is None else state.momentum.reshape(p.shape)
            states.append(state._replace(momentum=momentum))
        return _to_trees(jnp.zeros((), jnp.int32), states, treedef, recipe)

    def update(updates: Tree, state: PSGDState, params: Tree = None, **extra_args: Any) -> tuple[Tree, PSGDState]:
        del extra_args
        gradients, treedef = _flattened(updates)
        like = gradients if params is None else treedef.flatten_up_to(params)
        states = _to_states(state, treedef)
        for (path, g), kept in zip(jax.tree_util.tree_leaves_with_path(updates), states, strict=True):
            _check_leaf(method, path, g)
            _check_shape(method, recipe, path, g, kept)
        count = optax.safe_increment(state.count)
        plan = pipeline.plan(tempo, count, jnp)
        flat = [_laid_out(recipe, jnp.asarray(g)) for g in gradients]
        old = [_reshaped(s, g.shape) for s, g in zip(states, flat, strict=True)]
        if method.start_scale() is None:
            old = _started(recipe, tempo.damping, state.count == 0, flat, old)
        directions, new = _step_all(recipe, plan, flat, old, stack=stack)
        out = [
            u.reshape(jnp.shape(g)).astype(jnp.result_type(p))
            for u, g, p in zip(directions, gradients, like, strict=True)
        ]
        new = [_reshaped(s, jnp.shape(g)) for s, g in zip(new, gradients, strict=True)]
        return treedef.unflatten(out), _to_trees(count, new, treedef, recipe)

    return optax.GradientTransformationExtraArgs(init, update)


def _flattened(tree: Tree) -> tuple[list[Any], Any]:
    return jax.tree.leaves(tree), jax.tree.structure(tree)


# ---- checks -----------------------------------------------------------------------------
def _check_leaf(method: Method, path: Any, leaf: Any) -> None:
    dtype, where = jnp.result_type(leaf), jax.tree_util.keystr(path) or "the parameter"
    if jnp.issubdtype(dtype, jnp.complexfloating) and not method.complex_parameters:
        raise TypeError(f"{method.name} does not support complex parameters; {where} is {dtype}: split it in two")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{method.name} needs floating-point parameters; {where} is {dtype}: use optax.masked")


def _check_shape(method: Method, recipe: Recipe, path: Any, g: Any, state: State) -> None:
    layout = recipe.layout(tuple(jnp.shape(g)))
    expected = layout if 0 not in layout else ()
    if tuple(n for q in state.factors.Q for n in q.shape[:1]) != expected:
        raise ValueError(
            f"{method.name}: the gradient of {jax.tree_util.keystr(path)} has shape {jnp.shape(g)}, its state belongs "
            "to another; give update the tree that init was given"
        )


# ---- trees and stacks -------------------------------------------------------------------
def _laid_out(recipe: Recipe, x: Leaf) -> Leaf:
    return x.reshape(recipe.layout(tuple(x.shape)))


def _reshaped(state: State, shape: Sequence[int]) -> State:
    """The state with its momentum in a shape."""
    return state if state.momentum is None else state._replace(momentum=state.momentum.reshape(shape))


def _to_trees(count: Leaf, states: list[State], treedef: Any, recipe: Recipe) -> PSGDState:
    momentum = treedef.unflatten([s.momentum for s in states]) if recipe.momentum else None
    q, ell = ([getattr(s.factors, name) for s in states] for name in Factors._fields)
    return PSGDState(count, momentum, treedef.unflatten(q), treedef.unflatten(ell))


def _to_states(state: PSGDState, treedef: Any) -> list[State]:
    q, ell = treedef.flatten_up_to(state.Q), treedef.flatten_up_to(state.L)
    momentum = [None] * len(q) if state.momentum is None else treedef.flatten_up_to(state.momentum)
    return [State(m, Factors(a, b)) for m, a, b in zip(momentum, q, ell, strict=True)]


def _started(recipe: Recipe, damping: Any, first: Leaf, gradients: list[Leaf], states: list[State]) -> list[State]:
    """At the first step the factors take their automatic scale, one for all leaves."""
    sizes = [recipe.start.size(pipeline.working(recipe, g)) for g in gradients if g.size]
    if not sizes:
        return states
    scale = jnp.where(first, recipe.start(sizes, damping), 1)
    return [pipeline.rescaled(recipe, s, scale) for s in states]


def _choose(flag: Any, then: Callable[[Any], Any], otherwise: Callable[[Any], Any], operand: Any) -> Any:
    """A decision of the plan: settled while tracing where it is a Python boolean."""
    return (
        pipeline.branch(flag, then, otherwise, operand)
        if isinstance(flag, bool)
        else jax.lax.cond(flag, then, otherwise, operand)
    )


def _step_all(
    recipe: Recipe, plan: Plan, gradients: list[Leaf], states: list[State], *, stack: bool
) -> tuple[list[Leaf], list[State]]:
    """One step of all leaves; those of one shape and dtype in one call."""

    def one(g: Leaf, state: State) -> tuple[Leaf, State]:
        return pipeline.step(recipe, plan, g, state, choose=_choose)

    buckets: dict[Any, list[int]] = {}
    for i, g in enumerate(gradients):
        buckets.setdefault((g.shape, g.dtype) if stack else i, []).append(i)
    done: list[Any] = [None] * len(gradients)
    for indices in buckets.values():
        members = [(gradients[i], states[i]) for i in indices]
        if len(members) == 1:
            results = [one(*members[0])]
        else:
            stacked = jax.vmap(one)(*jax.tree.map(lambda *xs: jnp.stack(xs), *members))
            results = [jax.tree.map(lambda x, k=k: x[k], stacked) for k in range(len(members))]
        for i, result in zip(indices, results, strict=True):
            done[i] = result
    return [u for u, _ in done], [s for _, s in done]


# ---- named faces ------------------------------------------------------------------------
def _parameters(settings: Sequence[Field[Any]]) -> list[Parameter]:
    return [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in settings]


def _known(method: type[Method], names: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments, all of them in the signature."""
    for name in given:
        if name not in names:
            raise ValueError(f"{method.name}: unknown hyperparameter {name!r}; it has {', '.join(names)}")
    return given


def scaling(method: type[Method], module: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`scale_by_<name>`: the method without learning rate and weight decay."""
    settings = [f for f in fields(method) if f.name not in ("lr", "weight_decay")]
    names = [f.name for f in settings]

    def scale_by(*, stack: bool = True, **hyperparameters: Any) -> optax.GradientTransformationExtraArgs:
        return scale_by_psgd(method.of(**_known(method, names, hyperparameters)), stack=stack)

    return _dressed(scale_by, f"scale_by_{method.name}", method, module, [], settings)


def alias(method: type[Method], module: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`<name>`: the whole optimizer: direction, decoupled weight decay, learning rate (a number or a schedule)."""
    settings = [f for f in fields(method) if f.name != "lr"]
    default = {f.name: f.default for f in fields(method)}
    names = ["learning_rate", *(f.name for f in settings)]

    def optimizer(
        learning_rate: optax.ScalarOrSchedule = default["lr"],
        *,
        weight_decay_mask: Any = None,
        stack: bool = True,
        **hyperparameters: Any,
    ) -> optax.GradientTransformationExtraArgs:
        made = method.of(**_known(method, names, hyperparameters))
        if not callable(learning_rate):
            method.of(lr=learning_rate)  # only to check it
        decay = made.weight_decay
        off = isinstance(decay, (int, float)) and decay == 0
        return optax.chain(
            scale_by_psgd(made, stack=stack),
            optax.identity() if off else optax.add_decayed_weights(decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    rate = Parameter(
        "learning_rate",
        Parameter.POSITIONAL_OR_KEYWORD,
        default=default["lr"],
        annotation=optax.ScalarOrSchedule,
    )
    mask = Parameter("weight_decay_mask", Parameter.KEYWORD_ONLY, default=None)
    return _dressed(optimizer, method.name, method, module, [rate], settings, mask)


def _dressed(
    function: Callable[..., Any],
    name: str,
    method: type[Method],
    module: str,
    first: list[Parameter],
    settings: Sequence[Field[Any]],
    *more: Parameter,
) -> Callable[..., Any]:
    """A function with the name, signature and documentation that its method's record says."""
    function.__name__ = function.__qualname__ = name
    function.__module__, function.__doc__ = module, documented(method)
    flags = Parameter("stack", Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    function.__signature__ = Signature([*first, *_parameters(settings), *more, flags])  # type: ignore[attr-defined]
    return function
