"""The core driven by nothing but a loop: the optimizer that the adapters must agree with, in any namespace."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

from psgd import noise, pipeline
from psgd._xp import namespace, number
from psgd.hyperparameters import Method
from psgd.joint import join, join_states, split, split_state
from psgd.nonfinite import all_finite, counted
from psgd.recipe import State, leaves, rebuilt
from psgd.scaling import max_norm_factor

Array = Any


def start(
    method: Method, gradients: Sequence[Array], pairs: Sequence[tuple[Array, Array]] | None = None
) -> tuple[list[State], bool]:
    """First state of tensors that start together, with their automatic scale where the method gives none; and whether
    the scale is known, for which any of them has to say something.

    pairs: (v, H v) of each, from which methods that fit to them take the scale.
    """
    recipe, schedule, fixed = method.recipe(), method.schedule(), method.initial_scale()
    xp = namespace(gradients[0])
    draws = noise.Counter(xp.full((1,), pipeline.first_key(schedule), dtype=xp.int32))
    scales: Sequence[Any] = [fixed] * len(gradients)
    known: Any = True
    if fixed is None:
        targets = gradients if pairs is None else [h for _, h in pairs]
        sizes = [pipeline.size_of(recipe, x) for x in targets]
        scales, known = pipeline.initial_scales(
            recipe, schedule, sizes, None if pairs is None else [v for v, _ in pairs]
        )
    return [pipeline.init(recipe, g, scale, draws) for g, scale in zip(gradients, scales, strict=True)], bool(known)


def within_max_norm(method: Method, us: Sequence[Array]) -> list[Array]:
    """Directions of one step, no longer together than the method allows."""
    if not method.recipe().has_max_norm:
        return list(us)
    factor = max_norm_factor(method.schedule().max_norm, us)
    return [u * number(factor, u) for u in us]


def stacked(states: Sequence[State]) -> State:
    """The states of layers as one, each array with a first axis for them."""
    xp = namespace(states[0].factors.Q[0])
    return rebuilt(states[0], [xp.stack(list(column)) for column in zip(*map(leaves, states), strict=True)])


def layer(state: State, k: int) -> State:
    """The state of layer k of `stacked` ones."""
    return rebuilt(state, [x[k, ...] for x in leaves(state)])


def vectors(method: Method, step: int, params: Mapping[str, Array]) -> dict[str, Array]:
    """The vector v of each parameter at a step, as the adapters draw it."""
    key = pipeline.host_plan(method.schedule(), step, since=step).key
    xp = namespace(next(iter(params.values())))
    draws = noise.Counter(xp.full((1,), key, dtype=xp.int32))
    return {name: draws.normal(f"v/{name}", tuple(p.shape), p) for name, p in params.items()}


def fits(method: Method, step: int) -> bool:
    """Does a method that fits Hessian-vector products do so at a step, after a first one that taught it something?"""
    return pipeline.host_plan(method.schedule(), step, since=1).fit


class Reference:
    """Parameters, their states, the number of steps done and of those after the last fit.

    scanned: parameters that stack layers; each layer goes alone, and their states are kept stacked. A preconditioner of
    all parameters sees them in the order of their names; its rows are kept with the parameters that they belong to.
    """

    def __init__(self, method: Method, params: Mapping[str, Array], scanned: Collection[str] = ()) -> None:
        self.method, self.params, self.scanned = method, dict(params), frozenset(scanned)
        self.states: dict[str, State] = {}
        self.known = False
        self.count = self.since = 0
        self.skipped: Any = 0
        self.skipped_in_a_row: Any = 0

    def _parts(self, name: str, x: Array) -> list[Array]:
        return [x[k, ...] for k in range(x.shape[0])] if name in self.scanned else [x]

    def _whole(self, name: str, states: list[State]) -> State:
        return stacked(states) if name in self.scanned else states[0]

    def _start(self, gradients: Mapping[str, Array], pairs: Mapping[str, tuple[Array, Array]] | None) -> None:
        recipe = self.method.recipe()
        if recipe.joint:
            names = sorted(gradients)
            g = join([gradients[name] for name in names])
            pair = None if pairs is None else tuple(join([pairs[name][k] for name in names]) for k in (0, 1))
            (state,), self.known = start(self.method, [g], None if pair is None else [pair])
            shapes = [tuple(gradients[name].shape) for name in names]
            self.states = dict(zip(names, split_state(state, shapes), strict=True))
            return
        parts = {name: self._parts(name, g) for name, g in gradients.items()}
        given_pairs = None
        if pairs is not None:
            columns = {name: [self._parts(name, x) for x in pairs[name]] for name in gradients}
            given_pairs = [pair for name in gradients for pair in zip(*columns[name], strict=True)]
        begun, self.known = start(self.method, [g for layers in parts.values() for g in layers], given_pairs)
        states = iter(begun)
        self.states = {name: self._whole(name, [next(states) for _ in layers]) for name, layers in parts.items()}

    def step(self, gradients: Mapping[str, Array], pairs: Mapping[str, tuple[Array, Array]] | None = None) -> None:
        """One step of all parameters. pairs: (v, H v) of each, for methods that fit to them, where this step does.

        A step whose gradients or pairs are not finite is counted, and not taken.
        """
        inputs = [*gradients.values(), *(x for pair in (pairs or {}).values() for x in pair)]
        skipped = not bool(all_finite([x for x in inputs if prod(x.shape)]))
        self.skipped, self.skipped_in_a_row = counted(self.skipped, self.skipped_in_a_row, int(skipped))
        if skipped:
            return
        recipe = self.method.recipe()
        if not self.known and (pairs is not None or not recipe.newton or not self.states):
            old = self.states
            self._start(gradients, pairs)
            self.states = {name: s._replace(momentum=old.get(name, s).momentum) for name, s in self.states.items()}
        if not (self.known or recipe.newton):  # nothing to begin with: nothing is counted
            self.states = {}
            decay = self.method.weight_decay
            self.params = {
                name: p + pipeline.displacement(p, 0 * p, self.method.lr, decay) for name, p in self.params.items()
            }
            return
        self.count, self.since = self.count + 1, self.since + 1
        plan = pipeline.host_plan(self.method.schedule(), self.count, since=self.since)
        plan = plan._replace(fit=pairs is not None and self.known) if recipe.newton else plan
        self.since = 0 if plan.fit else self.since
        xp = namespace(next(iter(gradients.values())))
        plan = plan._replace(key=xp.full((1,), plan.key, dtype=xp.int32))
        if not recipe.decoupled:
            gradients = {name: g + self.method.weight_decay * self.params[name] for name, g in gradients.items()}
        step = self._step_whole if recipe.joint else self._step_each
        directions = step(recipe, plan, gradients, pairs)
        decay = self.method.weight_decay if recipe.decoupled else 0.0
        for name, u in zip(directions, within_max_norm(self.method, list(directions.values())), strict=True):
            p = self.params[name]
            self.params[name] = p + pipeline.displacement(p, u, self.method.lr, decay)

    def _step_whole(self, recipe: Any, plan: Any, gradients: Mapping[str, Array], pairs: Any) -> dict[str, Array]:
        names = sorted(gradients)
        shapes = [tuple(gradients[name].shape) for name in names]
        pair = None if pairs is None else tuple(join([pairs[name][k] for name in names]) for k in (0, 1))
        g, state = join([gradients[name] for name in names]), join_states([self.states[name] for name in names])
        u, new = pipeline.step(recipe, plan, g, state, pair=pair)
        self.states = dict(zip(names, split_state(new, shapes), strict=True))
        return dict(zip(names, split(u, shapes), strict=True))

    def _step_each(self, recipe: Any, plan: Any, gradients: Mapping[str, Array], pairs: Any) -> dict[str, Array]:
        directions = {}
        for name, whole in gradients.items():
            old, xp = self.states[name], namespace(whole)
            states = [layer(old, k) for k in range(whole.shape[0])] if name in self.scanned else [old]
            given_pairs: list[Any] = [None] * len(states)
            if pairs is not None:
                given_pairs = list(zip(*(self._parts(name, x) for x in pairs[name]), strict=True))
            steps = [
                pipeline.step(recipe, plan, g, state, pair=pair)
                for g, state, pair in zip(self._parts(name, whole), states, given_pairs, strict=True)
            ]
            self.states[name] = self._whole(name, [new for _, new in steps])
            us = [u for u, _ in steps]
            directions[name] = xp.stack(us) if name in self.scanned else us[0]
        return directions
