"""The loops over a large tensor before its products and after them, each compiled to one.

On a CPU a step of large tensors is products, which no compiler makes faster, and some thirty passes over memory, of
which these make the most. They see every tensor as one flat vector, so that one loop serves all shapes: a first step
compiles two, in seconds, where whole steps take more than a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor

from psgd import criterion, pipeline
from psgd._xp import in_units, number
from psgd.arrays import Factors, Number
from psgd.noise import Draws
from psgd.recipe import Plan, Recipe, State, leaves, rebuilt
from psgd_torch_backend._compile import compiled, decoupled, with_decay

LARGE = 1 << 15  # numbers in a tensor: with fewer, a call costs as much as it saves
Flat = Tensor  # a tensor as one vector, whose length differs from call to call


def before(
    recipe: Recipe,
    plan: Plan,
    weight_decay: Tensor,
    p: Flat,
    g: Flat,
    momentum: Flat | None,
    signs: Flat | None,
    target: Flat | None,
    average: Flat,
) -> None:
    """The first stage of a parameter: what is fitted to, damped by signs, is written into `target`, what is
    preconditioned into `average`; the momentum is written over.
    """
    observed = pipeline.observe(recipe, plan, with_decay(recipe, g, p, weight_decay), momentum)
    if target is not None:
        h = pipeline.target_at_scale(recipe, plan, observed.target)
        target.copy_(h if signs is None else recipe.damping(h, signs, number(plan.damping, h)))
    average.copy_(observed.average)
    if momentum is not None and observed.momentum is not None:
        momentum.copy_(observed.momentum)


def after(recipe: Recipe, plan: Plan, lr: Tensor, weight_decay: Number, p: Flat, direction: Flat, unit: Tensor) -> None:
    """The end of the third stage: a parameter moves along its direction, which comes in units and is bounded here."""
    u = direction.clone()  # not written over, for the compiler would write the direction too
    u = recipe.clip(u, recipe.gain, unit * number(pipeline.scale_of(recipe, plan), unit))
    p.add_(pipeline.displacement(p, u, lr, weight_decay))


def of_any_length(*functions: Callable[..., None]) -> dict[str, str]:
    """The setting by which the compiler makes one loop for all lengths of the arguments that are `Flat`."""
    arguments = (x for function in functions for x in signature(function).parameters.values())
    return {"dynamic_sources": ",".join(f"L['{x.name}']" for x in arguments if "Flat" in x.annotation)}


def fit_and_precondition(
    recipe: Recipe,
    plan: Plan,
    average: Tensor,
    target: Tensor | None,
    factors: Factors,
    draws: Draws,
    stacked: bool,
    pair: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Factors]:
    """The second stage and the products of the third, which are not compiled: directions, their units, new factors.

    target: what is fitted to, damped and at its scale; None without a fit, or with a pair. stacked: are tensors, pair
    and factors stacks? pair: (v, H v) to fit to, or ().
    """
    bare, kept = _undamped(recipe), State(None, factors)
    plan = plan._replace(momentum=plan.momentum._replace(scale=None))

    def one(average: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = list(tensors)
        pair_of_one: Any = (rest.pop(0), rest.pop(0)) if pair else None
        target_of_one = average if target is None else rest.pop(0)
        old = rebuilt(kept, rest).factors
        new = old
        if plan.fit:
            new = pipeline.fit(recipe if pair else bare, plan, target_of_one, old, draws, pair_of_one)
        g, unit, _ = in_units(average)
        u = pipeline.precondition(bare, new if recipe.fit_first else old, g)
        return pipeline.laid_back(bare, u, tuple(average.shape)), unit, *leaves(State(None, new))

    tensors = [average, *pair, *([] if target is None else [target]), *leaves(kept)]
    u, units, *new = (torch.vmap(one) if stacked else one)(*tensors)
    return u, units, rebuilt(kept, new).factors


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

    @torch.compiler.config.patch(of_any_length(before, after))  # type: ignore[attr-defined]  # which torch adds when it runs
    def __call__(
        self,
        recipe: Recipe,
        plan: Plan,
        lr: Tensor,
        weight_decay: Tensor,
        targets: Sequence[Tensor],
        gradients: Sequence[Tensor],
        momenta: Sequence[Tensor | None],
        factors: Factors,
        draws: Draws,
        stacked: bool,
        pair: tuple[Tensor, ...] = (),
    ) -> Factors:
        """Step parameters of one shape, the targets, and their momenta, in place. Returns their new factors.

        stacked: `factors` and `pair` are stacks.
        """
        shape, count = tuple(targets[0].shape), len(targets)
        work = pipeline.working(recipe, gradients[0][:0])
        whitening, room = plan.fit and not pair, (count, *shape) if stacked else shape
        to_fit, average = work.new_empty(room) if whitening else None, work.new_empty(room)
        signs = None
        if whitening and recipe.damping is not criterion.undamped:
            signs = pipeline.laid_back(recipe, draws.signs("damping", (prod(shape),), work), shape).reshape(-1)
        buffers = rows(to_fit, count), rows(average, count)
        for p, g, m, *written in zip(targets, gradients, momenta, *buffers, strict=True):
            momentum = None if m is None else m.view(-1)
            self.before(recipe, plan, weight_decay, p.view(-1), g.view(-1), momentum, signs, *written)
        u, units, new = fit_and_precondition(recipe, plan, average, to_fit, factors, draws, stacked, pair)
        decay = decoupled(recipe, weight_decay)
        for p, direction, unit in zip(targets, rows(u.contiguous(), count), units.reshape(-1), strict=True):
            self.after(recipe, plan, lr, decay, p.view(-1), direction, unit)
        return new


@lru_cache
def _undamped(recipe: Recipe) -> Recipe:
    """The recipe without the damping, which `before` adds."""
    return replace(recipe, damping=criterion.undamped)
