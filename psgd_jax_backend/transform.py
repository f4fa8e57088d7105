"""The one generic optax transformation; its named faces, one for each registered method, are in `faces`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import fields, replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from psgd import noise, pipeline
from psgd import summary as costs
from psgd._xp import real_dtype
from psgd.arrays import Factors
from psgd.calls import checked_policy
from psgd.documentation import entries, filled
from psgd.hyperparameters import Method
from psgd.nonfinite import MAX_SKIPS
from psgd.recipe import Recipe, Schedule, State
from psgd.scaling import max_norm_factor
from psgd.summary import Row, Summary
from psgd_jax_backend._arguments import ADAPTER_SENTENCES
from psgd_jax_backend._checks import check_kept, check_leaf, check_parameters, check_record, check_shapes
from psgd_jax_backend._per_tensor import Layering, Stepper, choose, numbers
from psgd_jax_backend._sharding import Spread
from psgd_jax_backend._state import Guard, Leaf, PSGDState, Tree, states


def scale_by_psgd(
    method: Method,
    *,
    stack: bool = True,
    scanned_layers: Tree = None,
    lax_map_scanned_layers: bool = False,
    lax_map_batch_size: int = 8,
    spread_over: str | tuple[str, ...] | None = None,
    nonfinite: str = "skip",
    max_skips: int = MAX_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by a method: gives the direction u, without learning rate and weight decay.

    Args:
        method: a record of `psgd.METHODS`.
        {adapter}

    Returns:
        a transformation with state `PSGDState`. Updates come back in the dtype of the parameters where these are
        given, else of the gradients, and in the boxes of the gradients.

    Raises:
        ValueError: for an argument of the adapter that is out of range; from `init` and `update` for trees that do not
            match each other; from `update` for state of another method, of other dtypes, with negative counts or, where
            it is looked for (in arrays of NumPy and of a CPU that are not traced), with a NaN.
        TypeError: from `init` and `update` for leaves that the method does not take, such as whole numbers.
        FloatingPointError: from `update`, for gradients that are not finite, as `nonfinite` and `max_skips` say.

    Equation: u = P g, g the average of gradients; P is that of the method.

    Example:
        >>> import jax.numpy as jnp
        >>> from psgd import METHODS
        >>> from psgd_jax_backend import scale_by_psgd
        >>> tx = scale_by_psgd(METHODS["quad"](momentum=0.9), stack=False)
        >>> params = {"w": jnp.ones((4, 3))}
        >>> updates, state = tx.update(params, tx.init(params))
        >>> updates["w"].shape
        (4, 3)
    """
    recipe = method.recipe()
    layering = Layering(stack, scanned_layers, lax_map_scanned_layers, lax_map_batch_size, spread_over)
    guard, wrong = Guard(nonfinite, max_skips), layering.complaint()
    if wrong:
        raise ValueError(f"{method.name}: {wrong}")
    checked_policy(method.name, *guard)
    if recipe.joint and any(map(bool, jax.tree.leaves(scanned_layers))):
        raise ValueError(f"{method.name} has one preconditioner for all parameters, no scanned_layers; leave them out")
    made = Scaling(method, recipe, method.schedule(), layering, guard)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


scale_by_psgd.__doc__ = filled(scale_by_psgd.__doc__, adapter=entries(ADAPTER_SENTENCES))


class Given(NamedTuple):
    """(v, H v), leaf by leaf, and whether to fit to them."""

    vector: list[Leaf]
    Hvp: list[Leaf]
    update: Any


class Scaling(NamedTuple):
    """The transformation: a method, how its work is mapped over leaves, and its guard."""

    method: Method
    recipe: Recipe
    schedule: Schedule
    layering: Layering
    guard: Guard

    def init(self, params: Tree) -> PSGDState:
        """The state before the first step."""
        method, recipe, guard = self.method, self.recipe, self.guard
        leaves, treedef = _flattened(params)
        flags = self.layering.flags(params)
        for (path, leaf), scanned in zip(jax.tree_util.tree_leaves_with_path(params), flags, strict=True):
            check_leaf(method, path, leaf, scanned)
        for told in _listeners.get():
            told(method, params, flags, SKIPS_BYTES if guard.nonfinite == "skip" else 0)

        def begun(arrays: list[Leaf], numbers: dict[str, Any]) -> PSGDState:
            own = self.with_numbers(numbers)
            recipe, scale, key = own.recipe, own.method.initial_scale(), noise.key(jnp, own.schedule.seed, 0)

            def one(p: Leaf) -> State:
                return pipeline.init(recipe, p, scale, noise.Counter(key))

            momenta = [pipeline.init_momentum(recipe, x) for x in arrays]
            whole = [one(_joined(arrays))] if recipe.joint else None
            states = whole or [_over(one, scanned)(p) for p, scanned in zip(arrays, flags, strict=True)]
            count = jnp.zeros((), jnp.int32)
            since = jnp.zeros((), jnp.int32) if self.schedule.counts else None  # its own, for each may be donated
            counters = PSGDState(count, since, guard.counters(), None, None, None)
            return _to_trees(counters, momenta, states, treedef, recipe)

        def places(shapes: PSGDState, spread: Spread) -> PSGDState:
            _, states = _to_states(shapes, treedef, recipe)
            layered = [False] if recipe.joint else flags
            lying = [
                State(None, jax.tree.map(lambda x, s=scanned: spread.spec(x.shape, s), state.factors))
                for state, scanned in zip(states, layered, strict=True)
            ]
            counters = jax.tree.map(lambda _: PartitionSpec(), shapes._replace(momentum=None, Q=None, L=None))
            return _to_trees(counters, arrays, lying, treedef, recipe)

        arrays = list(map(jnp.asarray, leaves))
        args = arrays, self.numbers()
        spread = Spread.of(arrays, self.layering.spread_over)
        # Of shapes alone, for along Explicit axes arrays cannot be joined.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        return spread.run(begun, lambda: places(jax.eval_shape(begun, *shapes), spread), *args)

    def update(
        self,
        updates: Tree,
        state: PSGDState,
        params: Tree = None,
        *,
        Hvp: Tree = None,
        vector: Tree = None,
        update_preconditioner: Any = None,
        **extra_args: Any,
    ) -> tuple[Tree, PSGDState]:
        """The directions of a step, and the state after it."""
        del extra_args
        method, recipe = self.method, self.recipe
        leaves, treedef = _flattened(updates)
        like = leaves if params is None else treedef.flatten_up_to(params)
        flags, paths = self.layering.flags(updates), jax.tree_util.tree_leaves_with_path(updates)
        gradients = list(map(jnp.asarray, leaves))
        for (path, g), scanned in zip(paths, flags, strict=True):
            check_leaf(method, path, g, scanned)
        given = _pair(method, paths, treedef, Hvp, vector, update_preconditioner)
        check_record(method, recipe, state, len(leaves))
        kept = _kept_states(method, state, treedef, recipe)
        check_shapes(method, recipe, paths, flags, gradients, *kept)
        check_parameters(method, paths, like)
        look = self.guard.nonfinite != "propagate"
        check_kept(method, recipe, paths, None if params is None else like, *kept, look=look)
        state = jax.tree.map(jnp.asarray, state)  # what was read from a file may be of NumPy
        like = list(map(jnp.asarray, like))
        spread = Spread.of([*gradients, *like], self.layering.spread_over)

        def work(
            gradients: list[Leaf], state: PSGDState, given: Given | None, numbers: dict[str, Any]
        ) -> tuple[list[Leaf], PSGDState]:
            fitted = [] if given is None else [jnp.where(given.update, x, 0) for x in (*given.vector, *given.Hvp)]
            go = self.guard.finite(method, [path for path, _ in paths], [*gradients, *fitted])
            directions, new = self.with_numbers(numbers)._step(spread, treedef, flags, go, gradients, state, given)
            return [u.astype(p.dtype) for u, p in zip(directions, like, strict=True)], new

        with jax.numpy_dtype_promotion("standard"):  # counters, rates and decisions meet in the plan
            directions, new = spread.run(work, lambda: (like, state), gradients, state, given, self.numbers())
        return treedef.unflatten(directions), new

    def numbers(self) -> dict[str, Any]:
        """Hyperparameters that are arrays: arguments of the work, as all else that lies on a mesh."""
        return {f.name: x for f in fields(self.method) if isinstance(x := getattr(self.method, f.name), jax.Array)}

    def with_numbers(self, numbers: dict[str, Any]) -> Scaling:
        """The same with other arrays as hyperparameters."""
        if not numbers:
            return self
        method = replace(self.method, **numbers)
        return self._replace(method=method, recipe=method.recipe(), schedule=method.schedule())

    def _step(
        self,
        spread: Spread,
        treedef: Any,
        flags: list[bool],
        go: Leaf | None,
        gradients: list[Leaf],
        state: PSGDState,
        given: Given | None,
    ) -> tuple[list[Leaf], PSGDState]:
        """Directions and state after a step; where `go` is false none, and the state as it was."""
        recipe, schedule = self.recipe, self.schedule
        shapes = [g.shape for g in gradients]
        pair = None if given is None else (given.vector, given.Hvp)
        momenta, states = _to_states(state, treedef, recipe)
        count = optax.safe_increment(state.count)
        since = None if state.since is None else optax.safe_increment(state.since)
        plan = pipeline.plan(schedule, count, jnp, since=since)
        plan = plan if given is None else plan._replace(fit=given.update)
        plan = plan if go is None else plan._replace(fit=go & plan.fit)
        if recipe.joint:
            gradients, flags = [_joined(gradients)], [False]
            states = [states[0]._replace(momentum=_joined(momenta) if recipe.momentum else None)]
            pair = None if pair is None else ([_joined(pair[0])], [_joined(pair[1])])
        stepper = Stepper(recipe, plan, self.layering, spread, numbers(state.count, len(gradients)))
        finite = go
        if self.method.initial_scale() is None:
            first = state.count == 0 if since is None or pair is None else (since == count) & plan.fit
            started = partial(stepper.started, schedule, gradients, flags, pair)
            states, known = choose(
                first if go is None else first & go, started, lambda states: (states, jnp.ones((), bool)), states
            )
            plan = plan._replace(fit=known & plan.fit)
            stepper = stepper._replace(plan=plan)
            if since is None or pair is None:  # with nothing to begin with nothing is counted
                go = known if go is None else known & go
        states = [
            s._replace(factors=spread.placed(s.factors, scanned)) for s, scanned in zip(states, flags, strict=True)
        ]
        # What is computed of a step that is skipped is thrown away; it must only be finite. Nothing is fitted then.
        directions, new = stepper.step(_only_if(go, gradients), states, flags, pair)
        directions = _within_max_norm(recipe, schedule.max_norm, directions)
        parts: list[Any] = [s.momentum for s in new]
        if recipe.joint:
            directions = _parted(directions[0], shapes)
            parts = [None] * len(momenta) if parts[0] is None else _parted(parts[0], shapes)
        directions = _only_if(go, directions)
        momenta = [
            None if m is None else _kept(go, m.astype(was.dtype), was) for m, was in zip(parts, momenta, strict=True)
        ]
        counters = state._replace(count=_kept(go, count, state.count), skipped=self.guard.counted(state, finite))
        if since is not None:
            counters = counters._replace(since=_kept(go, jnp.where(plan.fit, 0, since), state.since))
        return directions, _to_trees(counters, momenta, new, treedef, recipe)


def _only_if(go: Leaf | None, arrays: list[Leaf]) -> list[Leaf]:
    """Arrays, or zeros where a step is skipped."""
    return arrays if go is None else [jnp.where(go, x, 0) for x in arrays]


def _kept(go: Leaf | None, new: Leaf, old: Any) -> Leaf:
    """What is new, or what was where a step is skipped."""
    return new if go is None else jnp.where(go, new, old)


def _pair(
    method: Method, paths: Any, treedef: Any, hvp: Tree, vector: Tree, update_preconditioner: Any
) -> Given | None:
    """What was given of Hessian-vector products."""
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
    return Given(vs, hs, update_preconditioner)


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

    Returns:
        a `psgd.summary.Summary`; of other transformations in `tx` it knows nothing.

    Raises:
        ValueError: if there is no PSGD method in `tx`.

    Example:
        >>> import jax.numpy as jnp
        >>> from psgd_jax_backend import kron, summary
        >>> print(summary(kron(), {"w": jnp.zeros((64, 10))}))  # doctest: +SKIP
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


# ---- trees and stacks -------------------------------------------------------------------
def _to_trees(counters: PSGDState, momenta: list[Any], states: list[State], treedef: Any, recipe: Recipe) -> PSGDState:
    """The state of all leaves, with the counters of another."""
    momentum = treedef.unflatten(momenta) if recipe.momentum else None
    kept = Factors._fields if recipe.keeps_p else ("Q", "L")
    if recipe.joint:
        return counters._replace(momentum=momentum, **{name: getattr(states[0].factors, name) for name in kept})
    open_, factors = _opened(treedef), [s.factors for s in states]
    columns = {name: open_.unflatten([getattr(own, name) for own in factors]) for name in kept}
    return counters._replace(momentum=momentum, **columns)


def _opened(treedef: Any) -> Any:
    """The tree with a leaf in place of each box: a node around one leaf, such as flax's, that says something of the
    parameter alone and may not hold several factors.
    """

    def is_box(x: Any) -> bool:
        children = jax.tree_util.treedef_children(jax.tree.structure(x))
        container = isinstance(x, (Mapping, Sequence))
        return not container and len(children) == 1 and jax.tree_util.treedef_is_leaf(children[0])

    return jax.tree.structure(jax.tree.map(lambda _: 0, treedef.unflatten([0] * treedef.num_leaves), is_leaf=is_box))


def _to_states(state: PSGDState, treedef: Any, recipe: Recipe) -> tuple[list[Any], list[State]]:
    """Momentum of each leaf; the states, of each leaf or of all as one vector (without momentum)."""
    n = treedef.num_leaves
    momenta = [None] * n if state.momentum is None else treedef.flatten_up_to(state.momentum)
    trees = [tree for name in Factors._fields if (tree := getattr(state, name)) is not None]
    columns = [[x] if recipe.joint else _opened(treedef).flatten_up_to(x) for x in trees]
    # Some containers of state, such as flax's, give a tuple back as a node of their own.
    factors = [Factors(*(tuple(jax.tree.leaves(x)) for x in row)) for row in zip(*columns, strict=True)]
    owners = [None] if recipe.joint else momenta
    return momenta, [State(m, f) for m, f in zip(owners, factors, strict=True)]


def _kept_states(method: Method, state: PSGDState, treedef: Any, recipe: Recipe) -> tuple[list[Any], list[State]]:
    """`_to_states` of a state that may be of other trees than the gradients."""
    try:
        return _to_states(state, treedef, recipe)
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{method.name}: the state is of another tree than the gradients ({said}); give update the tree that init "
            "was given"
        ) from error


def _within_max_norm(recipe: Recipe, limit: Any, directions: list[Leaf]) -> list[Leaf]:
    """Directions no longer than a limit, all of them together, where the recipe says so."""
    there = [u for u in directions if u.size]
    if not recipe.has_max_norm or not there:
        return directions
    factor = max_norm_factor(limit, there)
    return [u * factor.astype(real_dtype(u)) for u in directions]
