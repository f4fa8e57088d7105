"""The one generic optax transformation; its named faces, one for each registered method, are in `faces`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from psgd import noise, pipeline
from psgd._xp import real_dtype
from psgd.arrays import Number
from psgd.calls import checked_policy
from psgd.documentation import entries, filled
from psgd.hyperparameters import Method
from psgd.nonfinite import MAX_SKIPS
from psgd.recipe import Plan, Recipe, Schedule, State
from psgd.scaling import max_norm_factor
from psgd_jax_backend import _joint as joint
from psgd_jax_backend._arguments import ADAPTER_SENTENCES
from psgd_jax_backend._checks import (
    GivenPair,
    check_kept,
    check_leaf,
    check_pair,
    check_parameters,
    check_record,
    check_shapes,
)
from psgd_jax_backend._nonfinite import Guard
from psgd_jax_backend._per_tensor import Layering, Stepper, Tensors, choose, numbers
from psgd_jax_backend._sharding import Spread
from psgd_jax_backend._state import Flag, Leaf, Paths, PSGDState, Tree, TreeDef, checked_states, to_states, to_trees
from psgd_jax_backend._summary import SKIPS_BYTES, tell_listeners


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
    scaling = Scaling(method, recipe, method.schedule(), layering, guard)
    return optax.GradientTransformationExtraArgs(scaling.init, scaling.update)


scale_by_psgd.__doc__ = filled(scale_by_psgd.__doc__, adapter=entries(ADAPTER_SENTENCES))


Numbers = dict[str, Any]  # hyperparameters that are arrays, by their names


class Scaling(NamedTuple):
    """The transformation: a method, how its work is mapped over leaves, and its guard."""

    method: Method
    recipe: Recipe
    schedule: Schedule
    layering: Layering
    guard: Guard

    def init(self, params: Tree) -> PSGDState:
        """The state before the first step."""
        leaves, treedef = _flattened(params)
        flags = self.layering.flags(params)
        for (path, leaf), scanned in zip(jax.tree_util.tree_leaves_with_path(params), flags, strict=True):
            check_leaf(self.method, path, leaf, scanned)
        tell_listeners(self.method, params, flags, SKIPS_BYTES if self.guard.nonfinite == "skip" else 0)
        arrays = list(map(jnp.asarray, leaves))
        args = arrays, self.numbers()
        spread = Spread.of(arrays, self.layering.spread_over)
        first = partial(self._first_state, treedef, flags)
        # Of shapes alone, for along Explicit axes arrays cannot be joined.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)

        def places() -> PSGDState:
            return self._places(spread, treedef, flags, arrays, jax.eval_shape(first, *shapes))

        return spread.run(first, places, *args)

    def _first_state(self, treedef: TreeDef, flags: list[bool], arrays: list[Leaf], numbers: Numbers) -> PSGDState:
        """The state of parameters before their first step."""
        with_numbers = self.with_numbers(numbers)
        recipe, scale = with_numbers.recipe, with_numbers.method.initial_scale()
        draws = noise.Counter(noise.key(jnp, with_numbers.schedule.seed, 0))

        def one(p: Leaf) -> State:
            return pipeline.init(recipe, p, scale, draws)

        momenta = [pipeline.init_momentum(recipe, x) for x in arrays]
        if recipe.joint:
            states = [one(joint.as_vector(arrays))]
        else:
            states = [(jax.vmap(one) if scanned else one)(p) for p, scanned in zip(arrays, flags, strict=True)]
        count = jnp.zeros((), jnp.int32)
        since = jnp.zeros((), jnp.int32) if self.schedule.counts else None  # an array apart, for each may be donated
        counters = PSGDState(count, since, self.guard.counters(), None, None, None)
        return to_trees(counters, momenta, states, treedef, recipe)

    def _places(
        self, spread: Spread, treedef: TreeDef, flags: list[bool], arrays: list[Leaf], shapes: PSGDState
    ) -> PSGDState:
        """Where each array of a state lies: as its parameter, or as a specification says."""
        _, states = to_states(shapes, treedef, self.recipe.joint)
        layered = [False] if self.recipe.joint else flags
        places = [
            State(None, jax.tree.map(lambda x, s=scanned: spread.spec(x.shape, s), state.factors))
            for state, scanned in zip(states, layered, strict=True)
        ]
        counters = jax.tree.map(lambda _: PartitionSpec(), shapes._replace(momentum=None, Q=None, L=None))
        return to_trees(counters, arrays, places, treedef, self.recipe)

    def update(
        self,
        updates: Tree,
        state: PSGDState,
        params: Tree = None,
        *,
        Hvp: Tree = None,
        vector: Tree = None,
        update_preconditioner: Flag | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, PSGDState]:
        """The directions of a step, and the state after it."""
        del extra_args
        leaves, treedef = _flattened(updates)
        like = leaves if params is None else treedef.flatten_up_to(params)
        flags, paths = self.layering.flags(updates), jax.tree_util.tree_leaves_with_path(updates)
        gradients = list(map(jnp.asarray, leaves))
        for (path, g), scanned in zip(paths, flags, strict=True):
            check_leaf(self.method, path, g, scanned)
        pair = check_pair(self.method, paths, treedef, Hvp, vector, update_preconditioner)
        self._check_state(treedef, flags, paths, gradients, state, like, has_params=params is not None)
        like = list(map(jnp.asarray, like))
        state = jax.tree.map(jnp.asarray, state)  # what was read from a file may be of NumPy
        spread = Spread.of([*gradients, *like], self.layering.spread_over)

        def work(
            gradients: list[Leaf], state: PSGDState, pair: GivenPair | None, numbers: Numbers
        ) -> tuple[list[Leaf], PSGDState]:
            fitted = [] if pair is None else [jnp.where(pair.update, x, 0) for x in (*pair.vector, *pair.Hvp)]
            go = self.guard.finite(self.method, [path for path, _ in paths], [*gradients, *fitted])
            directions, new = self.with_numbers(numbers)._step(spread, treedef, flags, go, gradients, state, pair)
            return [u.astype(p.dtype) for u, p in zip(directions, like, strict=True)], new

        with jax.numpy_dtype_promotion("standard"):  # counters, rates and decisions meet in the plan
            directions, new = spread.run(work, lambda: (like, state), gradients, state, pair, self.numbers())
        return treedef.unflatten(directions), new

    def _check_state(
        self,
        treedef: TreeDef,
        flags: list[bool],
        paths: Paths,
        gradients: list[Leaf],
        state: PSGDState,
        like: Sequence[Tree],
        *,
        has_params: bool,
    ) -> None:
        """Refuse state and parameters that do not go with the gradients, before anything is traced.

        like: the parameters, or else the gradients.
        """
        method, recipe = self.method, self.recipe
        check_record(method, recipe, state, len(paths))
        arrays = checked_states(method.name, state, treedef, recipe.joint)
        check_shapes(method, recipe, paths, flags, gradients, *arrays)
        check_parameters(method, paths, like)
        look = self.guard.nonfinite != "propagate"
        check_kept(method, recipe, paths, like if has_params else None, *arrays, look=look)

    def numbers(self) -> dict[str, Any]:
        """Hyperparameters that are arrays: arguments of the work, as all else that lies on a mesh."""
        return {f.name: x for f in fields(self.method) if isinstance(x := getattr(self.method, f.name), jax.Array)}

    def with_numbers(self, numbers: Numbers) -> Scaling:
        """The same with other arrays as hyperparameters."""
        if not numbers:
            return self
        method = replace(self.method, **numbers)
        return self._replace(method=method, recipe=method.recipe(), schedule=method.schedule())

    def _step(
        self,
        spread: Spread,
        treedef: TreeDef,
        flags: list[bool],
        go: Leaf | None,
        gradients: list[Leaf],
        state: PSGDState,
        pair: GivenPair | None,
    ) -> tuple[list[Leaf], PSGDState]:
        """Directions and state after a step; where `go` is false none, and the state as it was."""
        recipe, finite, shapes = self.recipe, go, [g.shape for g in gradients]
        momenta, states = to_states(state, treedef, recipe.joint)
        tensors = Tensors(gradients, states, flags, None if pair is None else (pair.vector, pair.Hvp))
        tensors = joint.as_one(recipe, tensors, momenta) if recipe.joint else tensors
        counters, plan = self._plan(state, go, pair)
        stepper = Stepper(recipe, plan, self.layering, spread, numbers(state.count, len(tensors.gradients)))
        if self.method.initial_scale() is None:
            stepper, tensors, go = self._start(stepper, tensors, counters, go)
        placed = [
            s._replace(factors=spread.placed(s.factors, scanned))
            for s, scanned in zip(tensors.states, tensors.scanned, strict=True)
        ]
        # What is computed of a step that is skipped is thrown away; it must only be finite. Nothing is fitted then.
        tensors = tensors._replace(gradients=_only_if(go, tensors.gradients), states=placed)
        directions, new = stepper.step(tensors)
        directions = _within_max_norm(recipe, self.schedule.max_norm, directions)
        new_momenta: list[Any] = [s.momentum for s in new]
        if recipe.joint:
            directions = joint.as_leaves(directions[0], shapes)
            new_momenta = joint.as_leaves(new_momenta[0], shapes)
        momenta = [
            None if m is None else _if_gone(go, m.astype(old.dtype), old)
            for m, old in zip(new_momenta, momenta, strict=True)
        ]
        counters = self._counted(state, counters, stepper.plan, go, finite)
        return _only_if(go, directions), to_trees(counters, momenta, new, treedef, recipe)

    def _plan(self, state: PSGDState, go: Leaf | None, pair: GivenPair | None) -> tuple[PSGDState, Plan]:
        """The counters of a step, and its plan; nothing is fitted where `go` is false."""
        count = optax.safe_increment(state.count)
        since = None if state.since is None else optax.safe_increment(state.since)
        plan = pipeline.plan(self.schedule, count, jnp, since=since)
        plan = plan if pair is None else plan._replace(fit=pair.update)
        plan = plan if go is None else plan._replace(fit=go & plan.fit)
        return state._replace(count=count, since=since), plan

    def _start(
        self, stepper: Stepper, tensors: Tensors, counters: PSGDState, go: Leaf | None
    ) -> tuple[Stepper, Tensors, Leaf | None]:
        """The automatic scale where it is due, and what follows: nothing is fitted, nor counted where a first gradient
        was to give the scale, before there is something to take it from.
        """
        by_pair, plan = tensors.pair is not None and counters.since is not None, stepper.plan
        due = (counters.since == counters.count) & plan.fit if by_pair else counters.count == 1
        states, known = choose(
            due if go is None else due & go,
            lambda states: stepper.started(self.schedule, tensors._replace(states=states)),
            lambda states: (states, jnp.ones((), bool)),
            tensors.states,
        )
        if not by_pair:
            go = known if go is None else known & go
        stepper = stepper._replace(plan=plan._replace(fit=known & plan.fit))
        return stepper, tensors._replace(states=states), go

    def _counted(self, old: PSGDState, new: PSGDState, plan: Plan, go: Leaf | None, finite: Leaf | None) -> PSGDState:
        """The counters after a step, which did not count where `go` is false."""
        skipped = self.guard.skips(old, finite)
        counters = old._replace(count=_if_gone(go, new.count, old.count), skipped=skipped)
        if new.since is None:
            return counters
        return counters._replace(since=_if_gone(go, jnp.where(plan.fit, 0, new.since), old.since))


def _only_if(go: Leaf | None, arrays: list[Leaf]) -> list[Leaf]:
    """Arrays, or zeros where a step is skipped."""
    return arrays if go is None else [jnp.where(go, x, 0) for x in arrays]


def _if_gone(go: Leaf | None, new: Leaf, old: Tree) -> Leaf:
    """What is new, or what was where a step is skipped."""
    return new if go is None else jnp.where(go, new, old)


def _flattened(tree: Tree) -> tuple[list[Any], Any]:
    return jax.tree.leaves(tree), jax.tree.structure(tree)


def _within_max_norm(recipe: Recipe, limit: Number, directions: list[Leaf]) -> list[Leaf]:
    """Directions no longer than a limit, all of them together, where the recipe says so."""
    filled = [u for u in directions if u.size]
    if not recipe.has_max_norm or not filled:
        return directions
    factor = max_norm_factor(limit, filled)
    return [u * factor.astype(real_dtype(u)) for u in directions]
