"""Parameters that have a preconditioner each: their first state, its scale, and steps of those that are alike."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from psgd import pipeline
from psgd.arrays import Factors
from psgd.recipe import Plan, State, leaves, rebuilt
from psgd_torch_backend._checks import Forms, forms_of, wrong_counter, wrong_tensors
from psgd_torch_backend._compile import Steps, as_tensors, on_device
from psgd_torch_backend._fused import FusedStep, suited
from psgd_torch_backend._job import (
    Job,
    PendingUpdate,
    complete_entry,
    gradient_of,
    is_true,
    rates,
    without_signal,
)
from psgd_torch_backend._noise import CachedDraws
from psgd_torch_backend._state import (
    begun,
    columns,
    count_step,
    new_counters,
    next_counters,
    parted,
    stacked,
    to_entry,
    to_state,
    unscaled,
    write,
)

Tensors = Tensor | list[Tensor]  # of one shape, stacked or by themselves

# Numbers of state beyond which a stack is cut. What is that large is bound by its products, and gains no more from
# company; a step holds several times as much beside it. Other devices than CPUs need more work in a call.
ROOM = {"cpu": 1 << 21}
ROOM_ELSEWHERE = 1 << 25


class PerTensor:
    """Steps groups."""

    def __init__(self) -> None:
        self.steps = Steps()

    @cached_property
    def fused_step(self) -> FusedStep:
        """The step of large tensors, whose loops are compiled."""
        return FusedStep()

    def __call__(self, job: Job) -> list[PendingUpdate]:
        """Step a group; what must wait for the directions of all others comes back."""
        schedule, pairs = job.schedule, job.pairs
        self.begin(job)
        for p in job.params:
            complete_entry(job, p)
        silent = _scale(job) if job.method.initial_scale() is None else set()
        if pairs is None or not schedule.counts:
            job = without_signal(job, silent)
        plans: dict[Any, tuple[Plan, CachedDraws]] = {}
        updates: list[PendingUpdate] = []
        # The largest first: what they draw begins with what the others do.
        for (age, since, *_), bucket in sorted(_buckets(job).items(), key=lambda item: -item[1][0].numel()):
            when = age, since, bucket[0].device
            if when not in plans:
                plan = job.plan_at(age, since)
                plan = on_device(plan if pairs is None else plan._replace(fit=pairs.fit), bucket[0].device)
                plans[when] = plan, CachedDraws(plan.key)
            plan, draws = plans[when]
            plan = plan._replace(fit=plan.fit and id(bucket[0]) not in silent)
            for p in bucket:
                count_step(job.state[p], fit=plan.fit)
            updates += self._step(job, plan, draws, bucket)
        return updates

    @staticmethod
    def begin(job: Job) -> None:
        """The first state of parameters that have none."""
        for p in job.params:
            if not begun(job.state.get(p)):
                job.state[p].update({**new_counters(job.schedule), **to_entry(_fresh(job, p))})

    @staticmethod
    def plan(job: Job) -> None:
        """Ask for all that the step of a group needs to know, and change nothing."""
        for p in job.params:
            job.plan_at(*next_counters(job.state.get(p), job.schedule))

    @staticmethod
    def forms(job: Job, p: Tensor) -> Forms:
        """The forms of a parameter's factors."""
        kind = p.shape, id(p) in job.layered, p.is_complex()
        if kind not in job.forms:
            job.forms[kind] = forms_of(job.recipe, *parted(p, kind[1]), kind[2])
        return job.forms[kind]

    def wrong(self, job: Job) -> Iterator[tuple[str, str]]:
        """What is wrong with the state of parameters: of all with the counters, of those that step with the rest."""
        for name, p in job.named:
            entry = job.state.get(p)
            if begun(entry):
                yield name, wrong_counter(job.schedule, entry)
                yield name, "" if p.grad is None else wrong_tensors(p, entry, self.forms(job, p), p.device)

    def _step(self, job: Job, plan: Plan, draws: CachedDraws, bucket: list[Tensor]) -> list[PendingUpdate]:
        """Step parameters of one shape, or the layers of one parameter, in batches if the group says so."""
        scanned = id(bucket[0]) in job.layered
        many, entries = scanned or len(bucket) > 1, [job.state[p] for p in bucket]
        state = columns(entries) if len(bucket) > 1 else to_state(entries[0])
        gradients = [gradient_of(p) for p in bucket]
        lists = [[p.detach() for p in bucket], [-g for g in gradients] if job.group["maximize"] else gradients]
        if job.pairs is not None and job.pairs.fit:
            lists += map(list, zip(*(job.pairs.by_parameter[id(p)] for p in bucket), strict=True))
        tensors: list[Tensors] = [x[0] if scanned else x for x in lists]
        count = len(tensors[0])
        size = job.group["stack_batch_size"] or at_a_time(count, state, bucket[0].device)
        updates: list[PendingUpdate] = []
        for some in (slice(i, i + size) for i in range(0, count, size)):
            batch = rebuilt(state, [x[some] for x in leaves(state)]) if many else state
            updates += self._batch(job, plan, draws, many, batch, *(x[some] for x in tensors))
        return updates

    def _batch(
        self,
        job: Job,
        plan: Plan,
        draws: CachedDraws,
        many: bool,
        state: State,
        targets: Tensors,
        gradients: Tensors,
        *pair: Tensors,
    ) -> list[PendingUpdate]:
        """Step tensors of one shape together, compiled as the group says and as suits them."""
        group, recipe = job.group, job.recipe
        numbers, mode = rates(group), group["compile"]
        full = mode == "full" or (mode and targets[0].device.type != "cpu")
        momenta = apart(state.momentum) if many and state.momentum is not None else [state.momentum] * len(targets)
        fused = mode and not full and suited(recipe, [*apart(targets), *apart(gradients), *momenta])
        if full or fused:
            plan, *numbers = as_tensors(plan, *numbers)
        vectors = tuple(together(x, many) for x in pair)
        if fused:  # which writes momenta where they lie
            state = state._replace(momentum=None)
            tensors = apart(targets), apart(gradients), momenta
            new = self.fused_step(recipe, plan, *numbers, *tensors, stacked(state).factors, draws, many, vectors)
            if plan.fit:
                write(state, State(None, new))
            return []
        p, g = together(targets, many), together(gradients, many)
        step = self.steps.of(recipe, many, tuple(p.shape) if full else None)
        change, new = step(plan, *numbers, p, g, stacked(state), None if full else draws, vectors or None)
        if not plan.fit:  # the factors are what they were
            state, new = (x._replace(factors=Factors((), ())) for x in (state, new))
        write(state, new)
        changes = list(change.unbind()) if many and isinstance(targets, list) else [change]
        targets = targets if isinstance(targets, list) else [targets]
        if recipe.has_max_norm:
            return [PendingUpdate(group, job.schedule.max_norm, targets, changes)]
        for target, part in zip(targets, changes, strict=True):
            target.add_(part)
        return []


def at_a_time(count: int, state: State, device: torch.device) -> int:
    """How many of `count` tensors step in one call, where the user did not say: few of large ones, in equal parts."""
    numbers = sum(x.numel() if isinstance(x, Tensor) else len(x) * x[0].numel() for x in leaves(state))
    calls = -(-numbers // ROOM.get(device.type, ROOM_ELSEWHERE))
    return -(-count // min(calls, count)) if calls and count else 1


def together(tensors: Tensors, many: bool) -> Tensor:
    """A tensor, or several as one stack."""
    return tensors if isinstance(tensors, Tensor) else torch.stack(tensors) if many else tensors[0]


def apart(tensors: Tensors) -> list[Tensor]:
    """Several tensors, or the layers of one."""
    return list(tensors.unbind()) if isinstance(tensors, Tensor) else tensors


def _fresh(job: Job, p: Tensor) -> State:
    """The first state of a parameter, or of the layers that it stacks. A scale of None is found by `_scale`."""
    scale = job.method.initial_scale() or 1.0
    layers, shape = parted(p, id(p) in job.layered)
    like = p.detach().new_empty(shape)
    state = pipeline.init(job.recipe, like)
    if not layers:
        return pipeline.rescaled(job.recipe, state, scale)
    scales = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64, device=like.device)
    each = [pipeline.rescaled(job.recipe, state, s) for s in scales.expand(layers)]
    return _by_layer(each) if each else rebuilt(state, [x.new_empty((0, *x.shape)) for x in leaves(state)])


def _by_layer(states: list[State]) -> State:
    """The state of a parameter from those of the layers that it stacks."""
    return stacked(columns(list(map(to_entry, states))))


def _scale(job: Job) -> set[int]:
    """The automatic scale of parameters at their first step; with Hessian-vector products, at their first fit.

    Returns the identities of those whose scale waits, for none of them has anything to say.
    """
    recipe, layered = job.recipe, job.layered

    size = partial(pipeline.size_of, recipe)
    due = [p for p in job.params if p.numel() and unscaled(job.state[p], job.pairs)]
    pairs = job.pairs if job.pairs is not None and job.pairs.fit else None
    signals = [gradient_of(p) if pairs is None else pairs.by_parameter[id(p)][1] for p in due]
    if not due:
        return set()
    sizes = [(torch.vmap(size) if id(p) in layered else size)(x) for p, x in zip(due, signals, strict=True)]
    probes = None if pairs is None else [pairs.by_parameter[id(p)][0] for p in due]
    scales, known = pipeline.initial_scales(recipe, job.schedule, sizes, probes)
    if not is_true(known):
        return set(map(id, due))
    for p, scale in zip(due, scales, strict=True):
        state = to_state(job.state[p])
        if id(p) in layered:
            rows = [rebuilt(state, [x[k] for x in leaves(state)]) for k in range(len(p))]
            each = [pipeline.rescaled(recipe, row, s) for row, s in zip(rows, scale.expand(len(p)), strict=True)]
            write(state, _by_layer(each))
        else:
            write(state, pipeline.rescaled(recipe, state, scale))
    return set()


def _buckets(job: Job) -> dict[tuple[Any, ...], list[Tensor]]:
    """Parameters that step in one call, being of equal age, shape, dtype and device: the counters come first."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for i, p in enumerate(job.params):
        counters = next_counters(job.state[p], job.schedule)
        alone = () if job.group["stack"] and id(p) not in job.layered else (i,)
        buckets.setdefault((*counters, p.shape, p.dtype, p.device, *alone), []).append(p)
    return buckets
