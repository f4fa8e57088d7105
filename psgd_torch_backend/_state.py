"""State in PyTorch's terms: nested dictionaries of tensors for each parameter.

Each tensor of the state owns its memory, so that it is saved and freed as what it is. Parameters of equal shape step in
one call: a step stacks their state, as much at a time as it takes, and writes the new state back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

from psgd.arrays import Factors
from psgd.recipe import Schedule, State, leaves, rebuilt
from psgd_torch_backend.hessian import Pairs

Entry = dict[str, Any]  # {"step": ..., "momentum": ..., "Q": {"0": ...}, "L": {"0": ...}}, and "P" where it is kept
COUNTERS = ("step", "since")
COUNTER_BYTES = 8  # int64, on the host


def begun(entry: Any) -> TypeGuard[Entry]:
    """Has a parameter state of ours? Others may keep theirs in its entry before we do."""
    return isinstance(entry, dict) and "Q" in entry


def new_counters(schedule: Schedule) -> Entry:
    """The counters of a parameter before its first step."""
    return {
        name: torch.zeros((), dtype=torch.int64, device="cpu")
        for name in (COUNTERS if schedule.counts else COUNTERS[:1])
    }


def age(entries: Sequence[Entry]) -> tuple[int, int | None]:
    """Steps of parameters so far, and those after their last fit, by the oldest of them."""
    if not entries:
        return 0, 0
    steps, oldest = max(((int(entry["step"]), entry) for entry in entries), key=lambda pair: pair[0])
    return steps, int(oldest["since"]) if "since" in oldest else None


def unscaled(entry: Entry, pairs: Pairs | None) -> bool:
    """Is the automatic scale due? At the first step, or with Hessian-vector products at the first fit."""
    if pairs is None or "since" not in entry:
        return int(entry["step"]) == 0
    return pairs.fit and int(entry["since"]) == int(entry["step"])


def to_entry(state: State) -> Entry:
    """The core's state of one parameter as plain nested dictionaries with string keys."""
    entry: Entry = {} if state.momentum is None else {"momentum": state.momentum}
    for name, tensors in state.factors._asdict().items():
        if tensors or name != "P":
            entry[name] = {str(i): x for i, x in enumerate(tensors)}
    return entry


def columns(entries: Sequence[Entry]) -> State:
    """The states of entries of one layout: what is a tensor in the state of one is a list of those of all."""
    momenta = None if entries[0].get("momentum") is None else [entry["momentum"] for entry in entries]
    factors = {}
    for name in Factors._fields:
        kept = [entry.get(name, {}) for entry in entries]  # some writers drop what is empty
        factors[name] = tuple([own[str(i)] for own in kept] for i in range(len(kept[0])))
    return State(momenta, Factors(**factors))


def to_state(entry: Entry) -> State:
    """The inverse of `to_entry`."""
    state = columns([entry])
    return rebuilt(state, [x for (x,) in leaves(state)])


def stacked(state: State) -> State:
    """A state of `columns` with one tensor for each; what is a tensor already stays as it is."""
    return rebuilt(state, [torch.stack(x) if isinstance(x, list) else x for x in leaves(state)])


def write(old: State, new: State) -> None:
    """Overwrite a state, or `columns`, in place; momentum may come in another shape of as many elements."""
    for target, source in zip(leaves(old), leaves(new), strict=True):
        if isinstance(target, list) and all(x.dtype == source.dtype for x in target):
            torch.unbind_copy(source, out=target)  # one call for all
        elif isinstance(target, list):  # of parameters that were turned to another dtype
            for x, row in zip(target, source.unbind(), strict=True):
                x.copy_(row)
        elif not (source.data_ptr() == target.data_ptr() != 0):
            target.copy_(source.reshape(target.shape))


def parted(p: torch.Tensor, scanned: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many layers a parameter stacks, and the shape of one."""
    split = 1 if scanned else 0
    return tuple(p.shape[:split]), tuple(p.shape[split:])
