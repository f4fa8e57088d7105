"""The core driven by nothing but a loop: the optimizer that the adapters must agree with, in any namespace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psgd import pipeline
from psgd._xp import namespace
from psgd.methods import Method

Array = Any


def laid_out(recipe: pipeline.Recipe, x: Array) -> Array:
    """A tensor in the shape its preconditioner sees."""
    return namespace(x).reshape(x, recipe.layout(tuple(x.shape)))


def start(method: Method, gradients: Sequence[Array]) -> list[pipeline.State]:
    """First state of tensors that start together, with one automatic scale where the method gives none."""
    recipe, scale = method.recipe(), method.start_scale()
    if scale is None:
        sizes = [recipe.start.size(pipeline.working(recipe, g)) for g in gradients]
        scale = recipe.start(sizes, method.tempo().damping)
    return [pipeline.init(recipe, laid_out(recipe, g), scale) for g in gradients]


def change(method: Method, p: Array, u: Array) -> Array:
    """What a direction in layout shape adds to a parameter."""
    u = namespace(p).reshape(u, tuple(p.shape))
    return pipeline.displacement(p, u, method.lr, method.weight_decay)


class Reference:
    """Parameters, their states and the number of steps done."""

    def __init__(self, method: Method, params: Mapping[str, Array]) -> None:
        self.method, self.params = method, dict(params)
        self.states: dict[str, pipeline.State] = {}
        self.count = 0

    def step(self, gradients: Mapping[str, Array]) -> None:
        """One step of all parameters."""
        if not self.states:
            started = start(self.method, list(gradients.values()))
            self.states = dict(zip(gradients, started, strict=True))
        self.count += 1
        recipe = self.method.recipe()
        plan = pipeline.host_plan(self.method.tempo(), self.count)
        for name, g in gradients.items():
            xp = namespace(g)
            own = plan._replace(key=xp.full((1,), plan.key, dtype=xp.int32))
            u, self.states[name] = pipeline.step(recipe, own, laid_out(recipe, g), self.states[name])
            self.params[name] = self.params[name] + change(self.method, self.params[name], u)
