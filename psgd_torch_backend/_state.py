"""State in PyTorch's terms: nested dictionaries of tensors for each parameter, and stacks of them.

Parameters of equal shape step in one call, for which their state must lie side by side in one tensor. What the
optimizer's `state` shows of each parameter are views of those stacks: nothing is copied to stack it, and what is
written to a stack is seen in the state. Once the state was replaced (loaded, copied), the stacks are made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, TypeGuard

import torch

from psgd.arrays import Factors
from psgd.pipeline import State, Tempo, leaves, rebuilt
from psgd_torch_backend.hessian import Pairs

Entry = dict[str, Any]  # {"step": ..., "momentum": ..., "Q": {"0": ...}, "L": {"0": ...}}, and "P" where it is kept
COUNTERS = ("step", "since")
COUNTER_BYTES = 8  # int64, on the host


def begun(entry: Any) -> TypeGuard[Entry]:
    """Has a parameter state of ours? Others may keep theirs in its entry before we do."""
    return isinstance(entry, dict) and "Q" in entry


def new_counters(tempo: Tempo) -> Entry:
    """The counters of a parameter before its first step."""
    return {
        name: torch.zeros((), dtype=torch.int64, device="cpu") for name in (COUNTERS if tempo.counts else COUNTERS[:1])
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


def to_state(entry: Entry) -> State:
    """The inverse of `to_entry`."""
    kept = {name: entry.get(name, {}) for name in Factors._fields}  # some writers drop what is empty
    factors = {name: tuple(own[str(i)] for i in range(len(own))) for name, own in kept.items()}
    return State(entry.get("momentum"), Factors(**factors))


class Stack:
    """The states of parameters of one layout, stacked along a new first axis."""

    def __init__(self, states: Sequence[State]) -> None:
        columns = list(zip(*map(leaves, states), strict=True))
        self.stacked = rebuilt(states[0], [torch.stack(column) for column in columns])
        unbound = [x.unbind() for x in leaves(self.stacked)]
        self.views = [rebuilt(states[0], [rows[i] for rows in unbound]) for i in range(len(states))]
        self.kept = [x for view in self.views for x in _tensors(to_entry(view))]

    def holds(self, entries: Sequence[Entry]) -> bool:
        """Do these entries show the views of this stack? Asked at every step."""
        shown = [x for entry in entries for x in _tensors(entry)]
        return len(shown) == len(self.kept) and all(map(is_, shown, self.kept))


def _tensors(entry: Entry) -> list[Any]:
    """The tensors of an entry, in the order in which it has them."""
    return [entry.get("momentum"), *(x for name in Factors._fields for x in entry.get(name, {}).values())]


def write(old: State, new: State) -> None:
    """Overwrite the tensors of a state in place; momentum may come in another shape of as many elements."""
    for target, source in zip(leaves(old), leaves(new), strict=True):
        if not (source.data_ptr() == target.data_ptr() != 0):
            target.copy_(source.reshape(target.shape))


def parted(p: torch.Tensor, scanned: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many layers a parameter stacks, and the shape of one."""
    split = 1 if scanned else 0
    return tuple(p.shape[:split]), tuple(p.shape[split:])


def gathered(entries: Sequence[Entry]) -> State:
    """The state of one preconditioner for several parameters, from the rows that each of them keeps."""
    states = [to_state(entry) for entry in entries]
    momenta = [s.momentum.reshape(-1) for s in states if s.momentum is not None]
    momentum = torch.cat(momenta) if momenta else None
    q = tuple(torch.cat(rows) for rows in zip(*(s.factors.Q for s in states), strict=True))
    return State(momentum, Factors(q, states[0].factors.L))


def scatter(entries: Sequence[Entry], new: State) -> None:
    """The inverse of `gathered`: overwrite the rows of each parameter."""
    states = [to_state(entry) for entry in entries]
    sizes = [len(s.factors.Q[0]) for s in states]
    columns = [q.split(sizes) for q in new.factors.Q]
    momenta = None if new.momentum is None else new.momentum.split(sizes)
    for k, old in enumerate(states):
        momentum = None if momenta is None else momenta[k]
        write(old, State(momentum, Factors(tuple(column[k] for column in columns), new.factors.L)))
