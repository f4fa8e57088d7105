"""Parameters that have a preconditioner each: their first state, its scale, and steps of those that are alike."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from psgd import pipeline
from psgd.pipeline import leaves, rebuilt
from psgd_torch_backend._state import Stack, new_counters, parted, to_entry, to_state, unscaled, write
from psgd_torch_backend._step import Held, Job, Steps, as_tensors, begin_momentum, gradient_of, on_device


class Each:
    """Steps groups; `stacks` are the states of those that step together, by the first of them."""

    def __init__(self) -> None:
        self.stacks: dict[int, Stack] = {}
        self.steps = Steps()

    def __call__(self, job: Job) -> list[Held]:
        """Step a group; what must wait for the directions of all others comes back."""
        tempo, pairs = job.tempo, job.pairs
        for p in job.params:
            if "Q" not in job.state[p]:
                job.state[p].update({**new_counters(tempo), **to_entry(_fresh(job, p))})
            begin_momentum(job, p)
        if job.method.start_scale() is None:
            _scale(job)
        plans: dict[Any, pipeline.Plan] = {}
        waiting: list[Held] = []
        for (age, since, *_), bucket in _buckets(job).items():
            if (age, since) not in plans:
                plans[age, since] = pipeline.host_plan(tempo, age, since=since)
            plan = plans[age, since] if pairs is None else plans[age, since]._replace(fit=pairs.fit)
            if since is not None:
                for p in bucket:
                    job.state[p]["since"].fill_(0 if plan.fit else since)
            waiting += self._step(job, plan, bucket)
        return waiting

    @staticmethod
    def shapes(job: Job, p: Tensor) -> list[tuple[int, ...]]:
        """The shapes of a parameter's factors."""
        return _shapes(job.recipe, *parted(p, id(p) in job.layered))

    def checked(self, job: Job, p: Tensor) -> str:
        """What is wrong with a parameter's state, if anything."""
        factors = job.state[p].get("Q") if job.state.get(p) else None
        if factors is None or [q.shape for q in factors.values()] == self.shapes(job, p):
            return ""
        return f"shape {tuple(p.shape)}, its state belongs to another; delete optimizer.state[p]"

    def _step(self, job: Job, plan: pipeline.Plan, bucket: list[Tensor]) -> list[Held]:
        """Step parameters of one shape, or the layers of one parameter, in batches if the group says so."""
        group, recipe, pairs = job.group, job.recipe, job.pairs
        scanned = id(bucket[0]) in job.layered
        state = self._gathered(job, bucket)
        many = scanned or len(bucket) > 1
        count = len(bucket[0]) if scanned else len(bucket)
        size = group["stack_batch_size"] or max(count, 1)
        plan, numbers = on_device(plan, bucket[0].device), [group["lr"], group["weight_decay"]]
        if group["compile"]:
            plan, *numbers = as_tensors(plan, *numbers)
        waiting: list[Held] = []
        for some in (slice(i, i + size) for i in range(0, count, size)):
            targets = [bucket[0].detach()[some]] if scanned else [p.detach() for p in bucket[some]]
            gradients = [gradient_of(bucket[0])[some]] if scanned else [gradient_of(p) for p in bucket[some]]
            batch = rebuilt(state, [x[some] for x in leaves(state)]) if many and size < count else state
            stacked = many and not scanned
            p, g = (torch.stack(xs) if stacked else xs[0] for xs in (targets, gradients))
            pair = None
            if pairs is not None and pairs.fit:
                given = [pairs.by_parameter[id(p)] for p in (bucket if scanned else bucket[some])]
                columns = [[x[some] for x in xs] if scanned else list(xs) for xs in zip(*given, strict=True)]
                pair = tuple(torch.stack(xs) if stacked else xs[0] for xs in columns)
            g = -g if group["maximize"] else g
            step = self.steps.of(recipe, many, tuple(p.shape) if group["compile"] else None)
            change, new = step(plan, *numbers, p, g, batch, pair)
            write(batch, new)
            changes = list(change.unbind()) if stacked else [change]
            if recipe.trusted:
                waiting.append(Held(group, job.tempo.trust, targets, changes))
            else:
                for target, part in zip(targets, changes, strict=True):
                    target.add_(part)
        return waiting

    def _gathered(self, job: Job, bucket: list[Tensor]) -> pipeline.State:
        """The state of a bucket, to be overwritten in place: of one parameter, or the stack of them all."""
        states = [to_state(job.state[p]) for p in bucket]
        if len(bucket) == 1:
            return states[0]
        stack = self.stacks.get(id(bucket[0]))
        if stack is None or not stack.holds(states):
            stack = self.stacks[id(bucket[0])] = Stack(states)
            for p, view in zip(bucket, stack.views, strict=True):
                job.state[p].update(to_entry(view))
        return stack.stacked


@lru_cache(maxsize=4096)
def _shapes(recipe: pipeline.Recipe, layers: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of the factors of a tensor of a shape, stacked in so many layers."""
    return [(*layers, *q) for q in recipe.preconditioner.shapes(recipe.layout(shape))]


def _fresh(job: Job, p: Tensor) -> pipeline.State:
    """The first state of a parameter, or of the layers that it stacks. A scale of None is found by `_scale`."""
    scale = job.method.start_scale() or 1.0
    layers, shape = parted(p, id(p) in job.layered)
    like = p.detach().new_empty(shape)
    state = pipeline.init(job.recipe, like)
    if not layers:
        return pipeline.rescaled(job.recipe, state, scale)
    scales = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64, device=like.device)
    each = [pipeline.rescaled(job.recipe, state, s) for s in scales.expand(layers)]
    return Stack(each).stacked if each else rebuilt(state, [x.new_empty((0, *x.shape)) for x in leaves(state)])


def _scale(job: Job) -> None:
    """The automatic scale of parameters at their first step; with Hessian-vector products, at their first fit."""
    recipe, layered = job.recipe, job.layered

    def size(g: Tensor) -> Tensor:
        return recipe.start.size(pipeline.working(recipe, g))

    due = [p for p in job.params if p.numel() and unscaled(job.state[p], job.pairs)]
    pairs = job.pairs if job.pairs is not None and job.pairs.fit else None
    seen = [gradient_of(p) if pairs is None else pairs.by_parameter[id(p)][1] for p in due]
    sizes = [(torch.vmap(size) if id(p) in layered else size)(x) for p, x in zip(due, seen, strict=True)]
    scales = recipe.start(sizes, job.tempo.damping) if due else []
    if pairs is not None and due:
        vs = [pipeline.working(recipe, pairs.by_parameter[id(p)][0]) for p in due]
        scales = [scale * boost for scale, boost in zip(scales, recipe.start.probed(vs), strict=True)]
    for p, scale in zip(due, scales, strict=True):
        state = to_state(job.state[p])
        if id(p) in layered:
            rows = [rebuilt(state, [x[k] for x in leaves(state)]) for k in range(len(p))]
            each = [pipeline.rescaled(recipe, row, s) for row, s in zip(rows, scale.expand(len(p)), strict=True)]
            write(state, Stack(each).stacked)
        else:
            write(state, pipeline.rescaled(recipe, state, scale))


def _buckets(job: Job) -> dict[tuple[Any, ...], list[Tensor]]:
    """Parameters that step in one call, being of equal age, shape, dtype and device. All grow one step older."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for i, p in enumerate(job.params):
        entry = job.state[p]
        age = entry["step"] = entry["step"] + 1
        since = int(entry["since"]) + 1 if "since" in entry else None
        alone = () if job.group["stack"] and id(p) not in job.layered else (i,)
        buckets.setdefault((int(age), since, p.shape, p.dtype, p.device, *alone), []).append(p)
    return buckets
