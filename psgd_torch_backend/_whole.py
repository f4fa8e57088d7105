"""Parameters that share one preconditioner: one vector to it, in the order of their names.

The rows of the factors that belong to a parameter are its state. A parameter without a gradient counts as one with a
gradient of zero, and stays where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psgd import noise, pipeline
from psgd.arrays import Factors
from psgd_torch_backend._noise import Draws
from psgd_torch_backend._state import gathered, new_counters, scatter, to_entry, unscaled
from psgd_torch_backend._step import Held, Job, Steps, as_tensors, follow, is_true, on_device, waits

LATE = (
    "its first gradient after the first step; one preconditioner is for all parameters, so all must have one from the "
    "start, or groups of their own"
)


class Whole:
    """Steps groups."""

    def __init__(self) -> None:
        self.steps = Steps()

    def __call__(self, job: Job) -> list[Held]:
        """Step a group; its directions, of which some must wait for those of all others, come back."""
        group, recipe, pairs, members = job.group, job.recipe, job.pairs, _members(job)
        n = sum(p.numel() for p in members)
        if not n:
            return []
        if not job.state.get(members[0]):
            _start(job, members)
        for p in members:
            follow(job, p)
        entries = [job.state[p] for p in members]
        plan, state = job.plan(), gathered(entries)
        g = _joined([torch.zeros_like(p) if p.grad is None else p.grad for p in members])
        g = -g if group["maximize"] else g
        pair = None
        if pairs is not None and pairs.fit:
            nothing = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in members}  # of a frozen parameter
            vs, hs = zip(*((nothing | pairs.by_parameter)[id(p)] for p in members), strict=True)
            pair = _joined(list(vs)), _joined(list(hs))
        if job.method.start_scale() is None and unscaled(entries[0], pairs):
            seen = pipeline.working(recipe, g if pair is None else pair[1])
            vs = None if pair is None else [pipeline.working(recipe, pair[0])]
            (scale,), known = recipe.start([recipe.start.size(seen)], job.tempo.damping, vs)
            known = is_true(known)
            if not known and (pairs is None or not job.tempo.counts):
                waits(job, {id(p) for p in members})
                return []
            plan = plan._replace(fit=plan.fit and known)
            state = pipeline.rescaled(recipe, state, scale)
        on, numbers = on_device(plan, g.device), [group["lr"], group["weight_decay"]]
        if group["compile"]:
            on, *numbers = as_tensors(on, *numbers)
        step = self.steps.of(recipe, False, (n,) if group["compile"] else None)
        u, new = step(on, *numbers, g, g, state, None if group["compile"] else Draws(on.key), pair)
        scatter(entries, new)
        for entry in entries:
            entry["step"] = entry["step"] + 1
            if "since" in entry:
                entry["since"].fill_(0 if plan.fit else int(entry["since"]) + 1)
        parts = [x.reshape(p.shape) for x, p in zip(u.split([p.numel() for p in members]), members, strict=True)]
        moved = [(p.detach(), x) for p, x in zip(members, parts, strict=True) if p.grad is not None]
        return [Held(group, job.tempo.trust if recipe.trusted else None, *map(list, zip(*moved, strict=True)))]

    @staticmethod
    def shapes(job: Job, p: Tensor) -> list[tuple[int, ...]]:
        """The shapes of a parameter's rows of the factors."""
        n = sum(x.numel() for x in job.group["params"])
        return [(p.numel(), *q[1:]) for q in job.recipe.preconditioner.shapes((n,))]

    @staticmethod
    def checked(job: Job, p: Tensor) -> str:
        """What is wrong with a parameter's state, if anything."""
        entry = job.state.get(p)
        if not entry:
            late = any(job.state.get(q) for q in job.group["params"])
            return LATE if late else ""
        if len(entry["Q"]["0"]) == p.numel() and entry.get("momentum", p).shape == p.shape:
            return ""
        return f"shape {tuple(p.shape)}, its state belongs to another; delete optimizer.state[p]"


def _members(job: Job) -> list[Tensor]:
    """All that the preconditioner began with, or begins with now, in the order of their names."""
    known = [p for p in job.group["params"] if job.state.get(p)]
    present = {id(p) for p in known or job.params}
    return [p for _, p in sorted(job.named, key=lambda named: _by_part(named[0])) if id(p) in present]


def _start(job: Job, members: list[Tensor]) -> None:
    """The first state of all parameters, to each its rows."""
    sizes = [p.numel() for p in members]
    like = _joined([p.detach() for p in members])
    key = torch.full((1,), pipeline.first_key(job.tempo), dtype=torch.int32, device=like.device)
    state = pipeline.init(job.recipe, like, job.method.start_scale() or 1.0, noise.Counter(key))
    rows = zip(*(q.split(sizes) for q in state.factors.Q), strict=True)
    for p, own in zip(members, rows, strict=True):
        factors = Factors(tuple(x.clone() for x in own), tuple(x.clone() for x in state.factors.L))
        momentum = pipeline.init_momentum(job.recipe, p.detach())
        job.state[p].update({**new_counters(job.tempo), **to_entry(pipeline.State(momentum, factors))})


def _joined(tensors: list[Tensor]) -> Tensor:
    """All tensors as one vector, in the widest of their dtypes."""
    return torch.cat([x.reshape(-1) for x in tensors])


def _by_part(name: str) -> list[tuple[int, int, str]]:
    """A key that orders dotted names as nested containers are ordered, numbers by their size."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.removeprefix("parameter ").split(".")
    ]
