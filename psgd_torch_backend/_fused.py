"""The passes over a large tensor before its products and after them, each compiled to one loop.

On a CPU a step of large tensors is products, which no compiler makes faster, and some thirty passes over memory, of
which these make the most. They see every tensor as one flat vector, so that one loop serves all shapes: a first step
compiles two, in seconds, where whole steps take more than a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from psgd import criterion, pipeline
from psgd._xp import in_units, number
from psgd.arrays import Factors
from psgd.noise import Draws
from psgd.recipe import Plan, Recipe, State, leaves, rebuilt
from psgd_torch_backend._step import compiled

LARGE = 1 << 15  # numbers in a tensor: with fewer, a call costs as much as it saves
# The arguments of compiled functions that differ in length from call to call.
ANY_LENGTH = {"dynamic_sources": ",".join(f"L['{name}']" for name in "pgmehsu")}


def before(recipe: Recipe, plan: Plan, decay: Tensor, p: Tensor, g: Tensor, m: Any, e: Any, h: Any, s: Tensor) -> None:
    """The momentum after g, into m; what is fitted to, damped by e, into h; what is preconditioned, into s."""
    g = g if recipe.decoupled else g + decay * p
    seen = pipeline.observe(recipe, plan, g, m)
    if h is not None:
        target = pipeline.target_at_scale(recipe, plan, seen.target)
        h.copy_(target if e is None else recipe.damping(target, e, number(plan.damping, target)))
    s.copy_(seen.average)
    if m is not None:
        m.copy_(seen.momentum)


def after(recipe: Recipe, plan: Plan, lr: Tensor, decay: Any, p: Tensor, u: Tensor, unit: Tensor) -> None:
    """The step of a parameter along u, which comes in units, of bounded length."""
    u = u.clone()  # not written over, for the compiler would write u too
    u = recipe.clip(u, recipe.gain, unit * number(pipeline.scale_of(recipe, plan), unit))
    p.add_(pipeline.displacement(p, u, lr, decay))


def rows(x: Tensor | None, count: int) -> list[Any]:
    """A tensor, or so many that are stacked, as flat vectors."""
    return [None] * count if x is None else list(x.view(count, -1).unbind())


def suited(recipe: Recipe, tensors: Sequence[Tensor | None]) -> bool:
    """May these be stepped as flat vectors, and is it worth while?"""
    return not recipe.has_max_norm and all(
        x.device.type == "cpu" and x.numel() >= LARGE and x.is_contiguous() and not x.is_complex()
        for x in tensors
        if x is not None
    )


class FusedStep:
    """Steps of tensors that are `suited`."""

    def __init__(self) -> None:
        self.before, self.after = compiled(before), compiled(after)

    @torch.compiler.config.patch(ANY_LENGTH)  # type: ignore[attr-defined]  # which torch adds when it runs
    def __call__(
        self,
        recipe: Recipe,
        plan: Plan,
        lr: Tensor,
        decay: Tensor,
        targets: Sequence[Tensor],
        gradients: Sequence[Tensor],
        momenta: Sequence[Tensor | None],
        old: Factors,
        draws: Draws,
        stacked: bool,
        pair: tuple[Tensor, ...] = (),
    ) -> Factors:
        """Step parameters of one shape, and their momenta, in place. Returns their new factors.

        stacked: `old` and `pair` are stacks.
        """
        bare, shape = _bare(recipe), tuple(targets[0].shape)
        plain = plan._replace(momentum=plan.momentum._replace(scale=None))
        work = pipeline.working(recipe, gradients[0][:0])
        whitening = plan.fit and not pair
        room = (len(targets), *shape) if stacked else shape
        h, s = work.new_empty(room) if whitening else None, work.new_empty(room)
        e = None
        if whitening and recipe.damping is not criterion.undamped:
            e = pipeline.laid_back(recipe, draws.signs("damping", (prod(shape),), work), shape).reshape(-1)
        buffers = [rows(x, len(targets)) for x in (h, s)]
        for p, g, m, *mine in zip(targets, gradients, momenta, *buffers, strict=True):
            flat = None if m is None else m.view(-1)
            self.before(recipe, plan, decay, p.view(-1), g.view(-1), flat, e, *mine)

        def one(s: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            rest = list(tensors)
            own: Any = (rest.pop(0), rest.pop(0)) if pair else None
            seen = rest.pop(0) if whitening else s
            mine = rebuilt(kept, rest).factors
            new = mine
            if plan.fit:
                new = pipeline.fit(recipe if pair else bare, plain, seen, mine, draws, own)
            g, unit, _ = in_units(s)
            u = pipeline.precondition(bare, new if recipe.fit_first else mine, g)
            return pipeline.laid_back(bare, u, tuple(s.shape)), unit, *leaves(State(None, new))

        kept = State(None, old)
        given = [s, *pair, *([h] if whitening else []), *leaves(kept)]
        u, units, *new = (torch.vmap(one) if stacked else one)(*given)
        for p, x, unit in zip(targets, rows(u.contiguous(), len(targets)), units.reshape(-1), strict=True):
            self.after(recipe, plan, lr, decay if recipe.decoupled else 0.0, p.view(-1), x, unit)
        return rebuilt(kept, new).factors


@lru_cache
def _bare(recipe: Recipe) -> Recipe:
    """The recipe without what the passes do before a fit."""
    return replace(recipe, damping=criterion.undamped)
