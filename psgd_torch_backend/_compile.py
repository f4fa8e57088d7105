"""The step of tensors as a function, called on one or mapped over a stack of them, eager or compiled."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from psgd import noise, pipeline
from psgd.arrays import Number
from psgd.recipe import Plan, Recipe, State, leaves, rebuilt
from psgd_torch_backend._noise import OpaqueDraws

Step = Callable[..., tuple[Tensor, State]]
Function = TypeVar("Function", bound=Callable[..., object])


def with_decay(recipe: Recipe, g: Tensor, p: Tensor, weight_decay: Number) -> Tensor:
    """A gradient, with the weight decay of its parameter where that is part of it."""
    return g if recipe.decoupled else g + weight_decay * p


def decoupled(recipe: Recipe, weight_decay: Number) -> Number:
    """The weight decay that is apart from the gradient."""
    return weight_decay if recipe.decoupled else 0.0


def make_step(recipe: Recipe, *, stacked: bool, layout: Sequence[int] | None = None) -> Step:
    """(plan, lr, weight_decay, p, g, state, draws, pair) -> (what to add to p, new state), of tensors or of stacks.

    A recipe whose whole step is bounded gives the direction instead: its length is known when all are. So does one for
    all parameters as one vector.
    layout: the shape of one tensor for which to compile the step, or None.
    """
    if layout is not None:
        recipe = _with_fixed_layout(recipe, tuple(layout))

    def step(
        plan: Plan,
        lr: Number,
        weight_decay: Number,
        p: Tensor,
        g: Tensor,
        state: State,
        draws: noise.Draws | None = None,
        pair: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        draws = OpaqueDraws(plan.key) if draws is None else draws
        first = 0 if pair is None else 2  # leaf of the state among the tensors

        def one(p: Tensor, g: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            pair_of_one: Any = tensors[:first] or None
            old, g = rebuilt(state, tensors[first:]), with_decay(recipe, g, p, weight_decay)
            u, new = pipeline.step(recipe, plan, g, old, draws, pair=pair_of_one)
            if recipe.has_max_norm or recipe.joint:
                return u, *leaves(new)
            return pipeline.displacement(p, u, lr, decoupled(recipe, weight_decay)), *leaves(new)

        # Flat tensors in and out: torch.vmap takes no None, which is the momentum of a recipe without.
        change, *new = (torch.vmap(one) if stacked else one)(p, g, *(pair or ()), *leaves(state))
        return change, rebuilt(state, new)

    return step if layout is None else compiled(step)


def compiled(function: Function) -> Function:
    """A function compiled, as one graph; itself where torch cannot compile."""
    if not compiler_works():
        return function
    # Each layout compiles once; without its own count, dynamo gives up after eight shapes of one function.
    wanted = {"recompile_limit": 64, "isolate_recompiles": True}
    known = inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    return torch.compile(function, fullgraph=True, dynamic=False, **options)  # type: ignore[return-value]


@cache
def compiler_works() -> bool:
    """Can torch compile anything here? If not, warns, once."""
    try:
        torch.compile(torch.neg)(torch.zeros(1))
    except Exception as error:  # whatever a backend, or the compiler that it calls, may raise
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"compile=True: torch.compile does not work here, so steps are eager ({reason})", stacklevel=2)
        return False
    return True


class Steps:
    """Steps, each made once for what it is to do."""

    def __init__(self) -> None:
        self._steps: dict[tuple[Recipe, bool, tuple[int, ...] | None], Step] = {}

    def of(self, recipe: Recipe, stacked: bool, layout: tuple[int, ...] | None) -> Step:
        """`make_step`, once for each; `layout` has the axis of the stack too."""
        key = (recipe, stacked, layout)
        if key not in self._steps:
            one = layout[1:] if layout is not None and stacked else layout
            self._steps[key] = make_step(recipe, stacked=stacked, layout=one)
        return self._steps[key]


def _with_fixed_layout(recipe: Recipe, shape: tuple[int, ...]) -> Recipe:
    """The recipe with the layout of one shape worked out: the compiler need not follow how."""
    order, layout = recipe.order(shape), recipe.layout(shape)
    return replace(recipe, order=lambda _: order, layout=lambda _: layout)


def on_device(plan: Plan, device: torch.device) -> Plan:
    """The plan with its noise key as a tensor, which is all that an eager step needs."""
    return plan._replace(key=torch.full((1,), plan.key, dtype=torch.int32, device=device))


def as_tensors(plan: Plan, *numbers: Number) -> tuple[Any, ...]:
    """The plan and further numbers as 0-d tensors, so that a new value is no reason to compile again."""

    def tensor(x: Number) -> Tensor:
        return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")

    plan = plan._replace(
        balance=torch.tensor(plan.balance, device="cpu"),
        side=torch.tensor(plan.side, device="cpu"),
        momentum=plan.momentum.each(tensor),
        rate=tensor(plan.rate),
        beta_lipschitz=tensor(plan.beta_lipschitz),
        damping=tensor(plan.damping),
    )
    return plan, *map(tensor, numbers)
