"""The core driven by nothing but a loop: the optimizer that the adapters must agree with, in any namespace."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from psgd import pipeline
from psgd._xp import namespace, number
from psgd.methods import Method
from psgd.pipeline import leaves, rebuilt

Array = Any


def start(method: Method, gradients: Sequence[Array]) -> list[pipeline.State]:
    """First state of tensors that start together, with their automatic scale where the method gives none."""
    recipe, given = method.recipe(), method.start_scale()
    scales: Sequence[Any] = [given] * len(gradients)
    if given is None:
        sizes = [recipe.start.size(pipeline.working(recipe, g)) for g in gradients]
        scales = recipe.start(sizes, method.tempo().damping)
    return [pipeline.init(recipe, g, scale) for g, scale in zip(gradients, scales, strict=True)]


def trusted(method: Method, us: Sequence[Array]) -> list[Array]:
    """Directions of one step, no longer together than the method allows."""
    if not method.recipe().trusted:
        return list(us)
    factor = pipeline.trust(method.tempo().trust, us)
    return [u * number(factor, u) for u in us]


def stacked(states: Sequence[pipeline.State]) -> pipeline.State:
    """The states of layers as one, each array with a first axis for them."""
    xp = namespace(states[0].factors.Q[0])
    return rebuilt(states[0], [xp.stack(list(column)) for column in zip(*map(leaves, states), strict=True)])


def layer(state: pipeline.State, k: int) -> pipeline.State:
    """The state of layer k of `stacked` ones."""
    return rebuilt(state, [x[k, ...] for x in leaves(state)])


class Reference:
    """Parameters, their states, the number of steps done and of those after the last fit.

    scanned: parameters that stack layers; each layer goes alone, and their states are kept stacked.
    """

    def __init__(self, method: Method, params: Mapping[str, Array], scanned: Collection[str] = ()) -> None:
        self.method, self.params, self.scanned = method, dict(params), frozenset(scanned)
        self.states: dict[str, pipeline.State] = {}
        self.count = self.since = 0

    def _parts(self, name: str, x: Array) -> list[Array]:
        return [x[k, ...] for k in range(x.shape[0])] if name in self.scanned else [x]

    def _whole(self, name: str, states: list[pipeline.State]) -> pipeline.State:
        return stacked(states) if name in self.scanned else states[0]

    def _start(self, gradients: Mapping[str, Array]) -> None:
        parts = {name: self._parts(name, g) for name, g in gradients.items()}
        states = iter(start(self.method, [g for own in parts.values() for g in own]))
        self.states = {name: self._whole(name, [next(states) for _ in own]) for name, own in parts.items()}

    def step(self, gradients: Mapping[str, Array]) -> None:
        """One step of all parameters."""
        if not self.states:
            self._start(gradients)
        self.count, self.since = self.count + 1, self.since + 1
        recipe = self.method.recipe()
        plan = pipeline.host_plan(self.method.tempo(), self.count, since=self.since)
        self.since = 0 if plan.fit else self.since
        directions = []
        for name, whole in gradients.items():
            xp, old = namespace(whole), self.states[name]
            own = plan._replace(key=xp.full((1,), plan.key, dtype=xp.int32))
            states = [layer(old, k) for k in range(whole.shape[0])] if name in self.scanned else [old]
            pairs = zip(self._parts(name, whole), states, strict=True)
            us, new = zip(*(pipeline.step(recipe, own, g, state) for g, state in pairs), strict=True)
            self.states[name] = self._whole(name, list(new))
            directions.append(xp.stack(list(us)) if name in self.scanned else us[0])
        for name, u in zip(gradients, trusted(self.method, directions), strict=True):
            p = self.params[name]
            self.params[name] = p + pipeline.displacement(p, u, self.method.lr, self.method.weight_decay)
