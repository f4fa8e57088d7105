"""A parameter group in a step: what its step reads, plans and completes, and the updates that wait for all groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from psgd import pipeline
from psgd._xp import real_dtype
from psgd.arrays import Number
from psgd.hyperparameters import Method
from psgd.recipe import Plan, Recipe, Schedule, State
from psgd.scaling import max_norm_factor
from psgd_torch_backend._checks import Forms
from psgd_torch_backend._compile import decoupled
from psgd_torch_backend._groups import Group, Named
from psgd_torch_backend._state import age, begun, to_entry, to_state
from psgd_torch_backend.hessian import Pairs


class Job(NamedTuple):
    """A group in a step.

    method, recipe, schedule: of the group. state: of all parameters of the optimizer. named: the group's parameters
    with their names. layered: the identities of those that stack layers. params: those that have a gradient. pairs: of
    this step. forms, plans: what was asked for so far, of factors by the shapes of parameters, and of plans by their
    counters.
    """

    group: Group
    method: Method
    recipe: Recipe
    schedule: Schedule
    state: MutableMapping[Tensor, Any]
    named: Named
    layered: set[int]
    params: list[Tensor]
    pairs: Pairs | None
    forms: dict[Any, Forms]
    plans: dict[tuple[int, int | None], Plan]

    def inputs_of(self, p: Tensor) -> list[Tensor]:
        """What a step reads of a parameter: its gradient, and the pair it fits to."""
        pairs = self.pairs.by_parameter.get(id(p), ()) if self.pairs is not None and self.pairs.fit else ()
        return [x for x in (p.grad, *pairs) if x is not None and x.numel()]

    def inputs(self) -> list[Tensor]:
        """All that the step reads."""
        return [x for p in self.params for x in self.inputs_of(p)]

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
    """Directions that wait for those of all other parameters, and where they go, with the rates to go there by.

    weight_decay: that which is apart from the gradient. max_norm: None where the length of a step is not bounded.
    """

    lr: Number
    weight_decay: Number
    max_norm: Number | None
    targets: list[Tensor]
    directions: list[Tensor]


class Stepper(Protocol):
    """What steps the parameters of a group: each by itself, or all as one vector."""

    def __call__(self, job: Job) -> list[PendingUpdate]:
        """Step a group; what must wait for the directions of all others comes back."""

    def begin(self, job: Job) -> None:
        """Make the first state of parameters that have none."""

    def plan(self, job: Job) -> None:
        """Ask for all that the step of a group needs to know, and change nothing."""

    def forms(self, job: Job, p: Tensor) -> Forms:
        """The forms of what is kept of a parameter's factors."""

    def wrong(self, job: Job) -> Iterator[tuple[str, str]]:
        """Names of parameters, each with what is wrong with its state, if anything."""


def complete_entry(job: Job, p: Tensor) -> None:
    """What was switched after the first step of a parameter: momentum begins as its gradient, P as that of Q."""
    entry = job.state[p]
    if entry.get("Q") and job.recipe.keeps_p != ("P" in entry):
        entry.pop("P", None)
        with_p = job.recipe.preconditioner.with_p
        kept = (torch.vmap(with_p) if id(p) in job.layered else with_p)(to_state(entry).factors)
        entry.update(to_entry(State(None, kept)))
    if job.recipe.momentum and "momentum" not in entry:
        momentum = pipeline.init_momentum(job.recipe, p.detach())
        if momentum is not None and p.grad is not None:
            momentum.copy_(p.grad)
        job.state[p] = {"momentum": momentum, **entry}


def without_signal(job: Job, silent: Collection[int]) -> Job:
    """The job without parameters that have nothing to begin with: nothing of them is counted, and they only decay."""
    lr, weight_decay = rates(job.group)
    for p in job.params:
        if id(p) in silent:
            p.add_(pipeline.displacement(p, torch.zeros_like(p), lr, decoupled(job.recipe, weight_decay)))
    return job._replace(params=[p for p in job.params if id(p) not in silent])


def pending(job: Job, targets: list[Tensor], directions: list[Tensor]) -> PendingUpdate:
    """Directions of parameters of a group, to wait."""
    lr, weight_decay = rates(job.group)
    max_norm = job.schedule.max_norm if job.recipe.has_max_norm else None
    return PendingUpdate(lr, decoupled(job.recipe, weight_decay), max_norm, targets, directions)


def rates(group: Group) -> list[Number]:
    """Learning rate and weight decay; a tensor that holds one, whatever its shape, as a 0-d one."""
    numbers = group["lr"], group["weight_decay"]
    return [x.reshape(()) if isinstance(x, Tensor) else x for x in numbers]


def gradient_of(p: Tensor) -> Tensor:
    """The gradient of a parameter that had one when the step began."""
    if p.grad is None:
        raise RuntimeError("a parameter lost its gradient while it was stepped")
    return p.grad


def is_true(x: Tensor) -> bool:
    """A decision that the host waits for; yes where there are no numbers."""
    return x.is_meta or bool(x)


def apply_pending(updates: Sequence[PendingUpdate]) -> None:
    """Move parameters along the directions that waited; the bound on a step's length is on all of them together."""
    directions = [u for update in updates for u in update.directions if u.numel()]
    if not directions:
        return
    near = [u.to(directions[0].device) for u in directions]
    for update in updates:
        factor = None if update.max_norm is None else max_norm_factor(update.max_norm, near)
        for p, u in zip(update.targets, update.directions, strict=True):
            u = u if factor is None else u * factor.to(u.device, real_dtype(u))
            p.add_(pipeline.displacement(p, u, update.lr, update.weight_decay))


@contextmanager
def without_autocast(tensors: Iterable[Tensor]) -> Iterator[None]:
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
