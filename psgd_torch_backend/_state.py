"""State in PyTorch's terms: nested dictionaries of tensors for each parameter.

Each tensor of the state owns its memory, so that it is saved and freed as what it is. Parameters of equal shape step in
one call: a step stacks their state, as much at a time as it takes, and writes the new state back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from psgd.arrays import Factors
from psgd.recipe import Schedule, State, leaves, rebuilt
from psgd_torch_backend._groups import all_named
from psgd_torch_backend.hessian import Pairs

Entry = dict[str, Any]  # {"step": ..., "momentum": ..., "Q": {"0": ...}, "L": {"0": ...}}, and "P" where it is kept
COUNTERS = ("step", "since")
COUNTER_BYTES = 8  # int64, on the host


def begun(entry: object) -> TypeGuard[Entry]:
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


def next_counters(entry: object, schedule: Schedule) -> tuple[int, int | None]:
    """What the counters of a parameter come to at its next step."""
    if not begun(entry):
        return 1, 1 if schedule.counts else None
    return int(entry["step"]) + 1, int(entry["since"]) + 1 if "since" in entry else None


def count_step(entry: Entry, *, fit: bool) -> None:
    """Count a step of a parameter. fit: does the step fit?"""
    entry["step"].add_(1)
    if "since" in entry:
        entry["since"].fill_(0 if fit else int(entry["since"]) + 1)


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
        factors[name] = tuple([tensors[str(i)] for tensors in kept] for i in range(len(kept[0])))
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


def state_arrays(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer of this package as flat names and tensors, for tools that compare, watch or export it.

    Args:
        optimizer: one of this package, before or after its first step.

    Returns:
        The tensors of the state themselves, not copies, by name: "NAME/step" and "NAME/since", the counters, and
        "NAME/momentum", "NAME/Q/0", "NAME/L/0", "NAME/P/0", ..., as far as the method keeps them. NAME is that of the
        parameter, or its number over all groups where parameters have no names. Parameters without a step yet, and what
        others keep in the state, are left out.

    Raises:
        ValueError: two parameters, of two groups, have one name.

    Example:
        >>> import torch
        >>> from psgd_torch_backend import KronWhiten, state_arrays
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = KronWhiten(layer.named_parameters())
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(x.shape) for name, x in state_arrays(optimizer).items() if name.startswith("weight/Q")}
        {'weight/Q/0': (2, 2), 'weight/Q/1': (3,)}
    """
    owner, arrays = type(optimizer).__name__, dict[str, Tensor]()
    named = all_named(owner, optimizer.param_groups)
    if len(dict(named)) < len(named):
        names = [name for name, _ in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{owner}: two parameters are called {twice!r}; give each a name of its own")
    for name, p in named:
        entry = optimizer.state.get(p)
        if not begun(entry):
            continue
        arrays |= {f"{name}/{key}": entry[key] for key in (*COUNTERS, "momentum") if key in entry}
        for kind in Factors._fields:
            arrays |= {f"{name}/{kind}/{i}": x for i, x in entry.get(kind, {}).items()}
    return arrays
