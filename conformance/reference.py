"""The core driven by nothing but a loop: the optimizer that the adapters must agree with, in any namespace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psgd import pipeline
from psgd._xp import namespace, number
from psgd.methods import Method

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


class Reference:
    """Parameters, their states, the number of steps done and of those after the last fit."""

    def __init__(self, method: Method, params: Mapping[str, Array]) -> None:
        self.method, self.params = method, dict(params)
        self.states: dict[str, pipeline.State] = {}
        self.count = self.since = 0

    def step(self, gradients: Mapping[str, Array]) -> None:
        """One step of all parameters."""
        if not self.states:
            started = start(self.method, list(gradients.values()))
            self.states = dict(zip(gradients, started, strict=True))
        self.count, self.since = self.count + 1, self.since + 1
        recipe = self.method.recipe()
        plan = pipeline.host_plan(self.method.tempo(), self.count, since=self.since)
        self.since = 0 if plan.fit else self.since
        directions = []
        for name, g in gradients.items():
            xp = namespace(g)
            own = plan._replace(key=xp.full((1,), plan.key, dtype=xp.int32))
            u, self.states[name] = pipeline.step(recipe, own, g, self.states[name])
            directions.append(u)
        for name, u in zip(gradients, trusted(self.method, directions), strict=True):
            p = self.params[name]
            self.params[name] = p + pipeline.displacement(p, u, self.method.lr, self.method.weight_decay)
