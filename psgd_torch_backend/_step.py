"""The core's step, called on one parameter or mapped over a stack of them, eager or compiled."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psgd import noise, pipeline
from psgd._xp import real_dtype
from psgd.hyperparameters import Method
from psgd.nonfinite import all_finite
from psgd.recipe import Plan, Recipe, Schedule, State, leaves, rebuilt
from psgd.scaling import max_norm_factor
from psgd_torch_backend._checks import Forms
from psgd_torch_backend._noise import OpaqueDraws
from psgd_torch_backend._state import age, begun, to_entry, to_state
from psgd_torch_backend.hessian import Pairs

Step = Callable[..., tuple[Tensor, State]]
Group = dict[str, Any]


class Job(NamedTuple):
    """A group in a step: its method, the state of all parameters, its own with their names, those of them that stack
    layers (by identity), those that have a gradient, the pairs of this step; and the forms of factors by the shapes of
    parameters, and plans by the counters of parameters, as far as they were asked for.
    """

    group: Group
    method: Method
    recipe: Recipe
    schedule: Schedule
    state: MutableMapping[Tensor, Any]
    named: list[tuple[str, Tensor]]
    layered: set[int]
    params: list[Tensor]
    pairs: Pairs | None
    forms: dict[Any, Forms]
    plans: dict[Any, Plan]

    def _read(self, p: Tensor) -> list[Tensor]:
        """What a step reads of a parameter: its gradient, and the pair it fits to."""
        pairs = self.pairs.by_parameter.get(id(p), ()) if self.pairs is not None and self.pairs.fit else ()
        return [x for x in (p.grad, *pairs) if x is not None and x.numel()]

    def seen(self) -> list[Tensor]:
        """All that the step reads."""
        return [x for p in self.params for x in self._read(p)]

    def not_finite(self) -> list[str]:
        """The names of the parameters of which it reads something that is not finite."""
        mine = {id(p) for p in self.params}
        return [name for name, p in self.named if id(p) in mine and not finite(self._read(p))]

    def plan(self) -> Plan:
        """The plan of the group's next step."""
        steps, since = age([self.state[p] for p in self.group["params"] if begun(self.state.get(p))])
        plan = self.plan_at(steps + 1, None if since is None else since + 1)
        return plan if self.pairs is None else plan._replace(fit=self.pairs.fit)

    def plan_at(self, step: int, since: int | None) -> Plan:
        """The plan of a step, asked for before anything changes, and then again: what it may raise, it raises then."""
        when = step, since
        if step < 1:
            raise ValueError(f"a counter 'step' of the state is {step - 1}; load a state dict, or delete that state")
        if when not in self.plans:
            self.plans[when] = host_plan(self.schedule, *when)
        return self.plans[when]


@lru_cache(maxsize=64)
def host_plan(schedule: Schedule, step: int, since: int | None) -> Plan:
    """The plan of a step, made once: it is asked before the closure is called, and for each parameter."""
    return pipeline.host_plan(schedule, step, since=since)


class PendingUpdate(NamedTuple):
    """Directions that wait for those of all other parameters, and where they go."""

    group: Group
    max_norm: Any
    targets: list[Tensor]
    directions: list[Tensor]


def complete_entry(job: Job, p: Tensor) -> None:
    """What was switched after the first step of a parameter: momentum begins as its gradient, P as that of Q."""
    entry = job.state[p]
    if entry.get("Q") and job.recipe.keeps_p != ("P" in entry):
        entry.pop("P", None)
        with_p = partial(pipeline.with_p, job.recipe)
        kept = (torch.vmap(with_p) if id(p) in job.layered else with_p)(to_state(entry).factors)
        entry.update(to_entry(State(None, kept)))
    if job.recipe.momentum and "momentum" not in entry:
        momentum = pipeline.init_momentum(job.recipe, p.detach())
        if momentum is not None and p.grad is not None:
            momentum.copy_(p.grad)
        job.state[p] = {"momentum": momentum, **entry}


def without_signal(job: Job, silent: Collection[int]) -> Job:
    """The job without parameters that have nothing to begin with: nothing of them is counted, and they only decay."""
    lr, decay = rates(job.group)
    for p in job.params:
        if id(p) in silent:
            decayed = decay if job.recipe.decoupled else 0.0
            p.add_(pipeline.displacement(p, torch.zeros_like(p), lr, decayed))
    return job._replace(params=[p for p in job.params if id(p) not in silent])


def rates(group: Group) -> list[Any]:
    """Learning rate and weight decay; a tensor that holds one, whatever its shape, as a 0-d one."""
    numbers = group["lr"], group["weight_decay"]
    return [x.reshape(()) if isinstance(x, Tensor) else x for x in numbers]


def apply_pending(waiting: Sequence[PendingUpdate]) -> None:
    """Take the steps that were held, those of bounded length together."""
    directions = [u for held in waiting for u in held.directions if u.numel()]
    if not directions:
        return
    near = [u.to(directions[0].device) for u in directions]
    for held in waiting:
        factor = None if held.max_norm is None else max_norm_factor(held.max_norm, near)
        for p, u in zip(held.targets, held.directions, strict=True):
            u = u if factor is None else u * factor.to(u.device, real_dtype(u))
            p.add_(pipeline.displacement(p, u, *rates(held.group)))


def sharded(p: Tensor) -> str:
    """What this is, if it is a part of a tensor, the rest of which is elsewhere. Nothing is imported to ask."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(p, module.DTensor):
        return "a DTensor"
    # So FullyShardedDataParallel marks what it has made flat.
    return "a flat shard of FullyShardedDataParallel" if getattr(p, "_fsdp_flattened", False) else ""


@contextmanager
def in_full(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Products in the precision of their factors, and state of ordinary tensors, where the caller has switched
    `torch.autocast` or `torch.inference_mode` on.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device in {x.device.type for x in tensors}:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def finite(tensors: Sequence[Tensor]) -> bool:
    """Is every entry of every tensor finite? One small pass over each, and one wait for the device."""
    if not tensors or tensors[0].is_meta:  # where there are no numbers
        return True
    sums = [x.sum(dtype=torch.float32 if x.element_size() < 4 else None) for x in tensors]
    near = sums
    if any(s.dtype != torch.float32 or s.device != sums[0].device for s in sums):
        near = [(s.abs() if s.is_complex() else s).to(sums[0].device, torch.float32) for s in sums]
    # A sum of large numbers may overflow, so that only a finite one settles it.
    return bool(torch.stack(near).isfinite().all()) or bool(all_finite(tensors))


def is_true(x: Tensor) -> bool:
    """A decision that the host waits for; yes where there are no numbers."""
    return x.is_meta or bool(x)


def gradient_of(p: Tensor) -> Tensor:
    """The gradient of a parameter that had one when the step began."""
    if p.grad is None:
        raise RuntimeError("a parameter lost its gradient while it was stepped")
    return p.grad


def make_step(recipe: Recipe, *, stacked: bool, layout: Sequence[int] | None = None) -> Step:
    """(plan, lr, weight_decay, p, g, state, draws, pair) -> (what to add to p, new state), of tensors or of stacks.

    A recipe whose whole step is bounded gives the direction instead: its length is known when all are. So does one for
    all parameters as one vector.
    layout: the shape of one tensor for which to compile the step, or None.
    """
    if layout is not None:
        recipe = _settled(recipe, tuple(layout))

    def step(
        plan: Plan,
        lr: Any,
        weight_decay: Any,
        p: Tensor,
        g: Tensor,
        state: State,
        draws: noise.Draws | None = None,
        pair: Any = None,
    ) -> tuple[Tensor, State]:
        draws = OpaqueDraws(plan.key) if draws is None else draws
        given = 0 if pair is None else 2

        def one(p: Tensor, g: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            own: Any = tensors[:given] or None
            rest = tensors[given:]
            if not recipe.decoupled:
                g = g + weight_decay * p
            u, new = pipeline.step(recipe, plan, g, rebuilt(state, rest), draws, pair=own)
            if recipe.has_max_norm or recipe.joint:
                return u, *leaves(new)
            return pipeline.displacement(p, u, lr, weight_decay if recipe.decoupled else 0.0), *leaves(new)

        # Flat tensors in and out: torch.vmap takes no None, which is the momentum of a recipe without.
        change, *new = (torch.vmap(one) if stacked else one)(p, g, *(pair or ()), *leaves(state))
        return change, rebuilt(state, new)

    return step if layout is None else compiled(step)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled, as one graph; itself where torch cannot compile."""
    if not compiler_works():
        return f
    # Each layout compiles once; without its own count, dynamo gives up after eight shapes of one function.
    wanted = {"recompile_limit": 64, "isolate_recompiles": True}
    known = inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    return torch.compile(f, fullgraph=True, dynamic=False, **options)


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
    """Steps that were made, by what they were made for."""

    def __init__(self) -> None:
        self._made: dict[Any, Step] = {}

    def of(self, recipe: Recipe, stacked: bool, layout: tuple[int, ...] | None) -> Step:
        """`make_step`, once for each; `layout` has the axis of the stack too."""
        key = (recipe, stacked, layout)
        if key not in self._made:
            one = layout[1:] if layout is not None and stacked else layout
            self._made[key] = make_step(recipe, stacked=stacked, layout=one)
        return self._made[key]


def _settled(recipe: Recipe, shape: tuple[int, ...]) -> Recipe:
    """The recipe with the layout of one shape worked out: the compiler need not follow how."""
    order, layout = recipe.order(shape), recipe.layout(shape)
    return replace(recipe, order=lambda _: order, layout=lambda _: layout)


def on_device(plan: Plan, device: torch.device) -> Plan:
    """The plan with its noise key as a tensor, which is all that an eager step needs."""
    return plan._replace(key=torch.full((1,), plan.key, dtype=torch.int32, device=device))


def as_tensors(plan: Plan, *numbers: Any) -> tuple[Any, ...]:
    """The plan and further numbers as 0-d tensors, so that a new value is no reason to compile again."""

    def tensor(x: Any) -> Tensor:
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
