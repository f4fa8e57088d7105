"""The one generic optax transformation; its named faces, one for each registered method, are in `faces`."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from psgd import noise, pipeline
from psgd import summary as costs
from psgd._xp import real_dtype
from psgd.arrays import Factors
from psgd.methods import Method
from psgd.pipeline import Plan, Recipe, State
from psgd.summary import Row, Summary
from psgd_jax_backend._state import Guard, Leaf, PSGDState, Tree, states


class Mapping(NamedTuple):
    """How the step of one tensor is mapped over many; the numbers are the same.

    stack: leaves of equal shape and dtype are stepped together.
    scanned_layers: a tree of booleans, as the parameters or a prefix of them: which leaves hold one layer for each
    entry of their first axis. Each layer is preconditioned by itself.
    lax_map_scanned_layers: map over stacks in batches of `lax_map_batch_size`, which bounds the memory of the update.
    """

    stack: bool = True
    scanned_layers: Tree = None
    lax_map_scanned_layers: bool = False
    lax_map_batch_size: int = 8

    def flags(self, tree: Tree) -> list[bool]:
        """Is each leaf of a tree a stack of layers?"""
        if self.scanned_layers is None:
            return [False] * len(jax.tree.leaves(tree))
        try:
            flags = jax.tree.leaves(jax.tree.broadcast(self.scanned_layers, tree))
        except ValueError as error:
            raise ValueError(
                f"scanned_layers has another structure than the parameters ({error}); give one boolean for each "
                "parameter, or for each of their subtrees"
            ) from error
        return [bool(flag) for flag in flags]

    def over(self, one: Callable[..., Any], *stacks: Any) -> Any:
        """A function of one tensor, mapped over stacks of them."""
        if self.lax_map_scanned_layers and all(x.size for x in jax.tree.leaves(stacks)):
            # A batch of one would keep an axis of length one, which costs XLA several stacks of memory.
            size = None if self.lax_map_batch_size == 1 else self.lax_map_batch_size
            return jax.lax.map(lambda xs: one(*xs), stacks, batch_size=size)
        return jax.vmap(one)(*stacks)


def scale_by_psgd(
    method: Method,
    *,
    stack: bool = True,
    scanned_layers: Tree = None,
    lax_map_scanned_layers: bool = False,
    lax_map_batch_size: int = 8,
    nonfinite: str = "skip",
    max_skips: int = pipeline.MAX_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by a method: gives the direction u, without learning rate and weight decay.

    Args:
        method: a record of `psgd.METHODS`.
        stack: step leaves of equal shape and dtype together, under `jax.vmap`; compilation and many small layers are
            faster.
        scanned_layers: tree of booleans, as the parameters or a prefix of them: leaves whose first axis counts layers,
            as `nn.scan` makes them. Each layer is preconditioned by itself, as if it were a leaf of its own.
        lax_map_scanned_layers: step stacks in batches of `lax_map_batch_size` layers, for less memory at a time.
        nonfinite: what to do where a gradient holds a NaN or an infinity: "skip" the step, which then is as if it had
            not been but for the count of such steps in the state, and updates are zero; "raise", under `jax.jit` by a
            callback to the host; or "propagate", and do not look.
        max_skips: where `update` is not traced, the error after so many skipped steps in a row; else see `check_skips`.

    Returns: a transformation with state `PSGDState`. Updates come back in the dtype of the parameters where these are
    given, else of the gradients, and in the boxes of the gradients.

    Raises: TypeError for leaves that are not floating point, ValueError for shapes that are not those of `init`.
    """
    recipe, tempo = method.recipe(), method.tempo()
    mapping = Mapping(stack, scanned_layers, lax_map_scanned_layers, lax_map_batch_size)
    guard = Guard(nonfinite, max_skips)
    pipeline.checked_policy(method.name, *guard)
    if recipe.whole and any(map(bool, jax.tree.leaves(scanned_layers))):
        raise ValueError(f"{method.name} has one preconditioner for all parameters, no scanned_layers; leave them out")
    if lax_map_scanned_layers and not (isinstance(lax_map_batch_size, int) and lax_map_batch_size > 0):
        raise ValueError(f"{method.name}: lax_map_batch_size={lax_map_batch_size!r} must be a whole number above 0")

    def init(params: Tree) -> PSGDState:
        leaves, treedef = _flattened(params)
        flags = mapping.flags(params)
        for (path, leaf), scanned in zip(jax.tree_util.tree_leaves_with_path(params), flags, strict=True):
            _check_leaf(method, path, leaf, scanned)
        for told in _listeners.get():
            told(method, params, flags, SKIPS_BYTES if guard.nonfinite == "skip" else 0)
        scale = method.start_scale()

        def one(p: Leaf) -> State:
            return pipeline.init(recipe, p, scale, noise.Counter(noise.key(jnp, tempo.seed, 0)))

        arrays = list(map(jnp.asarray, leaves))
        if recipe.whole:
            state = one(_joined(arrays))
            momenta = [pipeline.init_momentum(recipe, x) for x in arrays]
            states = [state._replace(momentum=momenta[0] if momenta else None)]
        else:
            states = [_over(one, scanned)(p) for p, scanned in zip(arrays, flags, strict=True)]
            momenta = [state.momentum for state in states]
        count = jnp.zeros((), jnp.int32)
        since = jnp.zeros((), jnp.int32) if tempo.counts else None  # its own, for each may be donated
        return _to_trees(PSGDState(count, since, guard.counters(), None, None, None), momenta, states, treedef, recipe)

    def update(
        updates: Tree,
        state: PSGDState,
        params: Tree = None,
        *,
        Hvp: Tree = None,
        vector: Tree = None,
        update_preconditioner: Any = None,
        **extra_args: Any,
    ) -> tuple[Tree, PSGDState]:
        del extra_args
        leaves, treedef = _flattened(updates)
        like = leaves if params is None else treedef.flatten_up_to(params)
        flags, paths = mapping.flags(updates), jax.tree_util.tree_leaves_with_path(updates)
        pair = _pair(method, paths, treedef, Hvp, vector, update_preconditioner)
        gradients = list(map(jnp.asarray, leaves))
        for (path, g), scanned in zip(paths, flags, strict=True):
            _check_leaf(method, path, g, scanned)
        fitted = [] if pair is None else [jnp.where(update_preconditioner, x, 0) for xs in pair for x in xs]
        go = guard.finite(method, [path for path, _ in paths], [*gradients, *fitted])
        # What is computed of a step that is skipped is thrown away; it must only be finite.
        gradients = _only_if(go, gradients)
        pair = None if pair is None else (_only_if(go, pair[0]), _only_if(go, pair[1]))
        momenta, states = _to_states(state, treedef, recipe)
        if recipe.whole:
            _check_whole(method, recipe, gradients, momenta, states[0])
            shapes, gradients, flags = [g.shape for g in gradients], [_joined(gradients)], [False]
            states = [states[0]._replace(momentum=_joined(momenta) if recipe.momentum else None)]
            pair = None if pair is None else ([_joined(pair[0])], [_joined(pair[1])])
        else:
            for (path, g), kept, scanned in zip(paths, states, flags, strict=True):
                _check_shape(method, recipe, path, g, kept, scanned)
        count = optax.safe_increment(state.count)
        since = None if state.since is None else optax.safe_increment(state.since)
        plan = pipeline.plan(tempo, count, jnp, since=since)
        plan = plan if pair is None else plan._replace(fit=update_preconditioner)
        plan = plan if go is None else plan._replace(fit=go & plan.fit)
        if method.start_scale() is None:
            first = state.count == 0 if since is None or pair is None else (since == count) & plan.fit
            first = first if go is None else first & go
            states = _started(recipe, tempo.damping, first, plan.fit, gradients, states, flags, pair)
        directions, new = _step_all(recipe, plan, gradients, states, flags, mapping, pair)
        directions = _trusted(recipe, tempo.trust, directions)
        parts: list[Any] = [s.momentum for s in new]
        if recipe.whole:
            directions = _parted(directions[0], shapes)
            parts = [None] * len(momenta) if parts[0] is None else _parted(parts[0], shapes)
        momenta = [
            None if m is None else _kept(go, m.astype(was.dtype), was) for m, was in zip(parts, momenta, strict=True)
        ]
        out = [u.astype(jnp.result_type(p)) for u, p in zip(_only_if(go, directions), like, strict=True)]
        counters = state._replace(count=_kept(go, count, state.count), skipped=guard.counted(state, go))
        if since is not None:
            counters = counters._replace(since=_kept(go, jnp.where(plan.fit, 0, since), state.since))
        return treedef.unflatten(out), _to_trees(counters, momenta, new, treedef, recipe)

    return optax.GradientTransformationExtraArgs(init, update)


def _only_if(go: Leaf | None, arrays: list[Leaf]) -> list[Leaf]:
    """Arrays, or zeros where a step is skipped."""
    return arrays if go is None else [jnp.where(go, x, 0) for x in arrays]


def _kept(go: Leaf | None, new: Leaf, old: Any) -> Leaf:
    """What is new, or what was where a step is skipped."""
    return new if go is None else jnp.where(go, new, old)


def _pair(
    method: Method, paths: Any, treedef: Any, hvp: Tree, vector: Tree, update_preconditioner: Any
) -> tuple[list[Leaf], list[Leaf]] | None:
    """(v, H v), leaf by leaf, where they were given."""
    given = [x is not None for x in (hvp, vector, update_preconditioner)]
    if not any(given):
        if method.recipe().newton:
            raise ValueError(
                f"{method.name} fits Hessian-vector products; give update Hvp=, vector= and update_preconditioner=, "
                "as hessian_helper returns them"
            )
        return None
    if not all(given):
        missing = [n for n, g in zip(("Hvp", "vector", "update_preconditioner"), given, strict=True) if not g]
        raise ValueError(f"{method.name}: {missing[0]} is missing; Hvp, vector and update_preconditioner go together")
    vs, hs = (list(map(jnp.asarray, treedef.flatten_up_to(tree))) for tree in (vector, hvp))
    for (path, g), v, h in zip(paths, vs, hs, strict=True):
        if not jnp.shape(g) == v.shape == h.shape:
            raise ValueError(
                f"{method.name}: vector and Hvp of {jax.tree_util.keystr(path)} have shapes {v.shape} and {h.shape}, "
                f"its gradient {jnp.shape(g)}; give what hessian_helper returns for the same parameters"
            )
    return vs, hs


def _joined(leaves: list[Leaf]) -> Leaf:
    """All leaves as one vector, in the widest of their dtypes."""
    return jnp.concatenate([x.reshape(-1) for x in leaves]) if leaves else jnp.zeros((0,))


def _parted(vector: Leaf, shapes: list[Any]) -> list[Leaf]:
    """The inverse of `_joined`, but for the dtypes."""
    ends = list(accumulate(prod(shape) for shape in shapes))
    return [x.reshape(shape) for x, shape in zip(jnp.split(vector, ends[:-1]), shapes, strict=True)] if shapes else []


def _over(one: Callable[..., Any], scanned: bool) -> Callable[..., Any]:
    """A function of one tensor, or of a leaf of many."""
    return jax.vmap(one) if scanned else one


def _flattened(tree: Tree) -> tuple[list[Any], Any]:
    return jax.tree.leaves(tree), jax.tree.structure(tree)


# ---- looking ----------------------------------------------------------------------------
# Who wants to hear what is initialised with which method, in this context; see `summary`.
_listeners: ContextVar[tuple[Callable[[Method, Tree, list[bool], int], None], ...]] = ContextVar(
    "listeners", default=()
)
COUNTER_BYTES = 4  # int32
SKIPS_BYTES = 8  # two of them


def summary(tx: optax.GradientTransformation, params: Tree, state: Tree = None) -> Summary:
    """What a transformation keeps of each parameter and what its update costs; `print` it, or read its rows.

    Args:
        tx: any transformation with a PSGD method in it, in chains, masks and partitions too.
        params: the parameters, or their shapes as `jax.eval_shape` gives them. Nothing is allocated.
        state: the transformation's, to see how many steps were skipped; waits for it.

    Returns: a `psgd.summary.Summary`; of other transformations in `tx` it knows nothing.

    Raises: ValueError if there is no PSGD method in `tx`.
    """
    lines: list[tuple[Method, Row]] = []
    counted = 0

    def told(method: Method, params: Tree, flags: list[bool], more: int) -> None:
        nonlocal counted
        parameters = [
            costs.Parameter(
                jax.tree_util.keystr(path, simple=True, separator="/") or "parameter",
                jnp.shape(x),
                jnp.result_type(x).name,
                scanned,
            )
            for (path, x), scanned in zip(jax.tree_util.tree_leaves_with_path(params), flags, strict=True)
        ]
        lines.extend((method, row) for row in costs.rows(method, parameters))
        counted += costs.counters(method, parameters, COUNTER_BYTES, each=False) + more

    token = _listeners.set((*_listeners.get(), told))
    try:
        # A function of its own, or JAX would remember what it told last time.
        jax.eval_shape(lambda x: tx.init(x), params)
    finally:
        _listeners.reset(token)
    if not lines and not counted:
        raise ValueError("the transformation holds no PSGD method; give one made by psgd_jax_backend, or a chain of it")
    skipped = max((int(own.skipped[0]) for own in states(state) if own.skipped is not None), default=0)
    return costs.summary(lines, counted, skipped)


# ---- checks -----------------------------------------------------------------------------
def _check_leaf(method: Method, path: Any, leaf: Any, scanned: bool) -> None:
    dtype, where = jnp.result_type(leaf), jax.tree_util.keystr(path) or "the parameter"
    if scanned and not jnp.ndim(leaf):
        raise ValueError(f"{method.name}: scanned_layers says that {where} stacks layers, but it is a scalar")
    if jnp.issubdtype(dtype, jnp.complexfloating) and not method.complex_parameters:
        raise TypeError(f"{method.name} does not support complex parameters; {where} is {dtype}: split it in two")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{method.name} needs floating-point parameters; {where} is {dtype}: use optax.masked")


def _check_shape(method: Method, recipe: Recipe, path: Any, g: Any, state: State, scanned: bool) -> None:
    layers, shape = (jnp.shape(g)[:1], jnp.shape(g)[1:]) if scanned else ((), jnp.shape(g))
    expected = recipe.preconditioner.shapes(recipe.layout(shape))
    if tuple(q.shape for q in state.factors.Q) != tuple((*layers, *q) for q in expected):
        raise ValueError(
            f"{method.name}: the gradient of {jax.tree_util.keystr(path)} has shape {jnp.shape(g)}, its state belongs "
            "to another; give update the tree that init was given"
        )


# ---- trees and stacks -------------------------------------------------------------------
def _to_trees(counters: PSGDState, momenta: list[Any], states: list[State], treedef: Any, recipe: Recipe) -> PSGDState:
    """The state of all leaves, with the counters of another."""
    momentum = treedef.unflatten(momenta) if recipe.momentum else None
    if recipe.whole:
        return counters._replace(momentum=momentum, **states[0].factors._asdict())
    columns = {name: treedef.unflatten([getattr(s.factors, name) for s in states]) for name in Factors._fields}
    return counters._replace(momentum=momentum, **columns)


def _to_states(state: PSGDState, treedef: Any, recipe: Recipe) -> tuple[list[Any], list[State]]:
    """Momentum of each leaf; the states, of each leaf or of all as one vector (without momentum)."""
    n = treedef.num_leaves
    momenta = [None] * n if state.momentum is None else treedef.flatten_up_to(state.momentum)
    q, ell = ([x] if recipe.whole else treedef.flatten_up_to(x) for x in (state.Q, state.L))
    # Some containers of state, such as flax's, give a tuple back as a node of their own.
    factors = [Factors(tuple(jax.tree.leaves(a)), tuple(jax.tree.leaves(b))) for a, b in zip(q, ell, strict=True)]
    owners = [None] if recipe.whole else momenta
    return momenta, [State(m, f) for m, f in zip(owners, factors, strict=True)]


def _check_whole(
    method: Method, recipe: Recipe, gradients: list[Leaf], momenta: list[Leaf | None], state: State
) -> None:
    n = sum(g.size for g in gradients)
    moved = [m for g, m in zip(gradients, momenta, strict=True) if m is not None and m.shape != g.shape]
    if moved or tuple(q.shape for q in state.factors.Q) != recipe.preconditioner.shapes((n,)):
        raise ValueError(
            f"{method.name}: the gradients have {n} numbers, the state belongs to others; give update the tree that "
            "init was given"
        )


def _started(
    recipe: Recipe,
    damping: Any,
    first: Leaf,
    fit: Any,
    gradients: list[Leaf],
    states: list[State],
    flags: list[bool],
    pair: tuple[list[Leaf], list[Leaf]] | None,
) -> list[State]:
    """At the first step, or with Hessian-vector products at the first fit, the factors take their automatic scale."""
    there = [i for i, g in enumerate(gradients) if g.size]

    def size(g: Leaf) -> Leaf:
        return recipe.start.size(pipeline.working(recipe, g))

    scales = recipe.start([_over(size, flags[i])(gradients[i]) for i in there], damping)
    if pair is not None:
        fresh = recipe.start([_over(size, flags[i])(pair[1][i]) for i in there], damping)
        boosts = recipe.start.probed([pipeline.working(recipe, pair[0][i]) for i in there])
        own = zip(scales, fresh, boosts, strict=True)
        scales = [jnp.where(fit, of_pair * boost, of_gradient) for of_gradient, of_pair, boost in own]
    started = list(states)
    for i, scale in zip(there, scales, strict=True):
        scale = jnp.where(first, scale, 1)
        if flags[i]:
            scale = jnp.broadcast_to(scale, gradients[i].shape[:1])
        started[i] = _over(lambda s, c: pipeline.rescaled(recipe, s, c), flags[i])(states[i], scale)
    return started


def _trusted(recipe: Recipe, limit: Any, directions: list[Leaf]) -> list[Leaf]:
    """Directions no longer than a limit, all of them together, where the recipe says so."""
    there = [u for u in directions if u.size]
    if not recipe.trusted or not there:
        return directions
    factor = pipeline.trust(limit, there)
    return [u * factor.astype(real_dtype(u)) for u in directions]


def _choose(flag: Any, then: Callable[[Any], Any], otherwise: Callable[[Any], Any], operand: Any) -> Any:
    """A decision of the plan: settled while tracing where it is a Python boolean."""
    return (
        pipeline.branch(flag, then, otherwise, operand)
        if isinstance(flag, bool)
        else jax.lax.cond(flag, then, otherwise, operand)
    )


def _step_all(
    recipe: Recipe,
    plan: Plan,
    gradients: list[Leaf],
    states: list[State],
    flags: list[bool],
    mapping: Mapping,
    pair: tuple[list[Leaf], list[Leaf]] | None,
) -> tuple[list[Leaf], list[State]]:
    """One step of all leaves; those of one shape and dtype in one call."""

    def one(g: Leaf, state: State, own: Any) -> tuple[Leaf, State]:
        return pipeline.step(recipe, plan, g, state, choose=_choose, pair=own)

    pairs: list[Any] = [None] * len(gradients) if pair is None else list(zip(*pair, strict=True))

    buckets: dict[Any, list[int]] = {}
    for i, g in enumerate(gradients):
        buckets.setdefault((g.shape, g.dtype) if mapping.stack and not flags[i] else i, []).append(i)
    done: list[Any] = [None] * len(gradients)
    for indices in buckets.values():
        members = [(gradients[i], states[i], pairs[i]) for i in indices]
        if flags[indices[0]]:
            results = [mapping.over(one, *members[0])]
        elif len(members) == 1 or not gradients[indices[0]].size:
            results = [one(*member) for member in members]
        else:
            results = _step_stack(recipe, plan, *map(list, zip(*members, strict=True)), mapping=mapping)
        for i, result in zip(indices, results, strict=True):
            done[i] = result
    return [u for u, _ in done], [s for _, s in done]


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _unstacked(tree: Any, n: int) -> list[Any]:
    return [jax.tree.map(lambda x, k=k: x[k], tree) for k in range(n)]


def _step_stack(
    recipe: Recipe, plan: Plan, gradients: list[Leaf], states: list[State], pairs: list[Any], *, mapping: Mapping
) -> list[tuple[Leaf, State]]:
    """`pipeline.step` of several equal leaves. The factors are put together and taken apart only where they are fitted:
    a step that leaves them as they are leaves them where they are."""
    n, old = len(gradients), [s.factors for s in states]
    observe = partial(pipeline.observed, recipe, plan)
    if states[0].momentum is None:
        momentum, seen, smooth = mapping.over(lambda g: observe(g, None), _stacked(gradients))
    else:
        momentum, seen, smooth = mapping.over(observe, _stacked(gradients), _stacked([s.momentum for s in states]))

    def fitted(factors: list[Factors]) -> list[Factors]:
        def one(x: Leaf, own: Factors, pair: Any) -> Factors:
            return pipeline.fitted(recipe, plan, x, own, given=pair)

        return _unstacked(mapping.over(one, seen, _stacked(factors), _stacked(pairs)), n)

    new = _choose(plan.fit, fitted, lambda factors: factors, old)
    u = mapping.over(partial(pipeline.directed, recipe), _stacked(new if recipe.fit_first else old), smooth)
    momenta = [None] * n if momentum is None else list(momentum)
    return [(u[k], State(momenta[k], new[k])) for k in range(n)]
