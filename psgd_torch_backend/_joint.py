"""Parameters that share one preconditioner: one vector to it, in the order of their names.

The rows of the factors that belong to a parameter are its state. A parameter without a gradient counts as one with a
gradient of zero, and stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from psgd import noise, pipeline
from psgd.arrays import Array
from psgd.joint import join, join_states, split, split_state
from psgd.recipe import Plan, State, leaves, rebuilt
from psgd_torch_backend._checks import OURS, Forms, forms_of, rows_of, wrong_counter, wrong_tensors
from psgd_torch_backend._compile import Steps, as_tensors, on_device
from psgd_torch_backend._job import Job, PendingUpdate, complete_entry, is_true, pending, rates, without_signal
from psgd_torch_backend._noise import CachedDraws
from psgd_torch_backend._state import begun, count_step, new_counters, to_entry, to_state, unscaled, write

LATE = (
    "has its first gradient after the first step; one preconditioner is for all parameters, so all must have one from "
    "the start, or groups of their own"
)


class Joint:
    """Steps groups."""

    def __init__(self) -> None:
        self.steps = Steps()

    def __call__(self, job: Job) -> list[PendingUpdate]:
        """Step a group; its directions, of which some must wait for those of all others, come back."""
        members = _members(job)
        shapes = [p.shape for p in members]
        if not sum(p.numel() for p in members):
            return []
        self.begin(job)
        for p in members:
            complete_entry(job, p)
        entries = [job.state[p] for p in members]
        plan, state = job.plan(), join_states(list(map(to_state, entries)))
        g, pair = _joined_gradient(job, members), _joined_pair(job, members)
        if job.method.initial_scale() is None and unscaled(entries[0], job.pairs):
            scale, known = _first_scale(job, g, pair)
            if not known and (job.pairs is None or not job.schedule.counts):
                without_signal(job, {id(p) for p in members})
                return []
            plan = plan._replace(fit=plan.fit and known)
            state = pipeline.rescaled(job.recipe, state, scale)
        p = g if job.recipe.decoupled else join([p.detach() for p in members])  # read for its decay alone
        u, new = self._step(job, plan, p, g, state, pair)
        for entry, rows in zip(entries, split_state(new, shapes), strict=True):
            write(to_state(entry), rows)
            count_step(entry, fit=plan.fit)
        moving = [(p.detach(), part) for p, part in zip(members, split(u, shapes), strict=True) if p.grad is not None]
        targets, directions = map(list, zip(*moving, strict=True))
        return [pending(job, targets, directions)]

    def _step(
        self, job: Job, plan: Plan, p: Tensor, g: Tensor, state: State, pair: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, State]:
        """The core's step of the one vector, compiled if the group says so."""
        plan, numbers = on_device(plan, g.device), rates(job.group)
        if not job.group["compile"]:
            return self.steps.of(job.recipe, False, None)(plan, *numbers, p, g, state, CachedDraws(plan.key), pair)
        step = self.steps.of(job.recipe, False, tuple(g.shape))
        return step(*as_tensors(plan, *numbers), p, g, state, None, pair)

    @staticmethod
    def begin(job: Job) -> None:
        """The first state of all parameters, unless they have stepped."""
        if _started(job):
            return
        for p in job.group["params"]:
            if begun(job.state.get(p)):  # made without a step, perhaps for others than those that step now
                for name in OURS & job.state[p].keys():
                    del job.state[p][name]
        members = _members(job)
        if sum(p.numel() for p in members):
            _start(job, members)

    @staticmethod
    def plan(job: Job) -> None:
        """Ask for all that the step of a group needs to know, and change nothing."""
        members = _present(job)
        n = sum(p.numel() for p in members)
        if n:
            forms_of(job.recipe, (), (n,), members[0].is_complex())
            job.plan()

    @staticmethod
    def forms(job: Job, p: Tensor) -> Forms:
        """The forms of a member's rows of the factors, and of the bounds."""
        size = p.numel()
        if size not in job.forms:
            n = sum(q.numel() for q in job.group["params"] if begun(job.state.get(q)))
            job.forms[size] = rows_of(job.recipe, n, size, p.is_complex())
        return job.forms[size]

    def wrong(self, job: Job) -> Iterator[tuple[str, str]]:
        """What is wrong with the state of parameters, if anything."""
        members = [(name, p) for name, p in job.named if begun(job.state.get(p))]
        for name, p in members:
            yield name, wrong_counter(job.schedule, job.state[p])
        if not _started(job):
            return
        stepped = {id(p) for _, p in members}
        yield from ((name, LATE) for name, p in job.named if p.grad is not None and id(p) not in stepped)
        for name, p in members:
            yield name, wrong_tensors(p, job.state[p], self.forms(job, p), p.device)


def _started(job: Job) -> bool:
    """Has the preconditioner begun? State that was made without a step is no beginning."""
    entries = (job.state.get(p) for p in job.group["params"])
    return any(int(entry["step"]) for entry in entries if begun(entry))


def _present(job: Job) -> list[Tensor]:
    """All that the preconditioner began with, or begins with now."""
    return [p for p in job.group["params"] if begun(job.state.get(p))] if _started(job) else job.params


def _members(job: Job) -> list[Tensor]:
    """The same in the order of their names."""
    present = {id(p) for p in _present(job)}
    return [p for _, p in sorted(job.named, key=lambda named: _by_part(named[0])) if id(p) in present]


def _joined_gradient(job: Job, members: list[Tensor]) -> Tensor:
    """The gradients of all as one vector."""
    g = join([torch.zeros_like(p) if p.grad is None else p.grad for p in members])
    return -g if job.group["maximize"] else g


def _joined_pair(job: Job, members: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """v and H v of all as one vector each, where this step fits to them."""
    if job.pairs is None or not job.pairs.fit:
        return None
    nothing = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in members}  # of a frozen parameter
    pairs = nothing | job.pairs.by_parameter
    vs, hs = zip(*(pairs[id(p)] for p in members), strict=True)
    return join(vs), join(hs)


def _first_scale(job: Job, g: Tensor, pair: tuple[Tensor, Tensor] | None) -> tuple[Array, bool]:
    """The first scale of the factors, and whether there is a signal that it is made of."""
    probes, product = (None, g) if pair is None else ([pair[0]], pair[1])
    (scale,), known = pipeline.initial_scales(job.recipe, job.schedule, [pipeline.size_of(job.recipe, product)], probes)
    return scale, is_true(known)


def _start(job: Job, members: list[Tensor]) -> None:
    """The first state of all parameters, to each its rows."""
    like = join([p.detach() for p in members])
    key = torch.full((1,), pipeline.first_key(job.schedule), dtype=torch.int32, device=like.device)
    state = pipeline.init(job.recipe, like, job.method.initial_scale() or 1.0, noise.Counter(key))
    for p, rows in zip(members, split_state(state._replace(momentum=None), [p.shape for p in members]), strict=True):
        rows = rebuilt(rows, [x.clone() for x in leaves(rows)])
        momentum = pipeline.init_momentum(job.recipe, p.detach())
        job.state[p].update({**new_counters(job.schedule), **to_entry(rows._replace(momentum=momentum))})


def _by_part(name: str) -> list[tuple[int, int, str]]:
    """A key that orders dotted names as nested containers are ordered, numbers by their size."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.removeprefix("parameter ").split(".")
    ]
