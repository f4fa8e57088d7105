"""What may be loaded into an optimizer, and how it gets there."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from psgd.arrays import Factors
from psgd_torch_backend._checks import Forms, wrong_tensors
from psgd_torch_backend._state import COUNTERS, Entry
from psgd_torch_backend._step import Group, Job

LARGEST_COUNT = 2**53  # up to which float64, in which schedules see it, has every whole number
WRAPPERS = {"module", "_orig_mod"}  # what DistributedDataParallel and torch.compile put into names
Places = list[list[tuple[int, int]]]  # of each parameter of each group: group and place in what was saved


def wrong_form(saved: Any) -> str:
    """What keeps this from being a state dict at all, if anything."""
    if not isinstance(saved, dict):
        return f"is {type(saved).__name__} and no dictionary"
    for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(saved.get(name), kind):
            return f"has no {name!r}, as state_dict() gives it"
    seen: set[Hashable] = set()
    for i, group in enumerate(saved["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            return f"has no list of 'params' in its group {i}"
        own, names = group["params"], group.get("param_names")
        if not all(isinstance(index, (int, str)) for index in own) or len({*own, *seen}) < len(own) + len(seen):
            return f"has params={own!r} in its group {i}, where each parameter must have an index of its own"
        seen.update(own)
        if names is not None and not (
            isinstance(names, (list, tuple)) and len(names) == len(own) and all(isinstance(x, str) for x in names)
        ):
            return f"has param_names={names!r} in its group {i}, where there must be {len(own)} names"
    known = set(map(str, seen))
    strange = [key for key in saved["state"] if (isinstance(key, int) or str(key).isdigit()) and str(key) not in known]
    return f"has state of parameter {strange[0]}, which is in none of its groups" if strange else ""


def in_words(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose indices are those of its groups, also where JSON has made words of those in its state."""
    known = {str(index): index for group in saved["param_groups"] for index in group["params"]}
    state = {known.get(key, key) if isinstance(key, str) else key: entry for key, entry in saved["state"].items()}
    return {**saved, "state": state}


def alike(groups: list[Group], saved: Mapping[str, Any]) -> bool:
    """As many groups, of as many parameters? torch itself refuses others."""
    theirs = [group["params"] for group in saved["param_groups"]]
    return list(map(len, theirs)) == [len(group["params"]) for group in groups]


def unwrapped(name: str) -> str:
    """A name without what wrappers of modules have put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def places(groups: list[Group], saved: Sequence[Group]) -> Places:
    """Where each parameter is in what was saved: under its name, where both sides name the same parameters; else in its
    place.
    """
    for read in (str, unwrapped):
        ours = [[read(x) for x in group.get("param_names") or ()] for group in groups]
        theirs = [[read(x) for x in group.get("param_names") or ()] for group in saved]
        where = {name: (i, k) for i, names in enumerate(theirs) for k, name in enumerate(names)}
        named = [name for names in ours for name in names]
        count = sum(len(group["params"]) for group in groups)
        if len(where) == len(named) == count and where.keys() == set(named):
            return [[where[name] for name in names] for names in ours]
    return [[(i, k) for k in range(len(group["params"]))] for i, group in enumerate(groups)]


def wrong_entry(job: Job, p: Tensor, entry: Any, forms: Forms) -> str:
    """What keeps an entry of a state dict from being that of a parameter, if anything."""
    if "Q" not in entry:
        return f"has no factors Q in the state dict, which is of another optimizer; it has {', '.join(map(str, entry))}"
    for name in COUNTERS:
        needed = name in entry or name == COUNTERS[0] or job.schedule.counts
        if needed and _count(entry.get(name)) is None:
            return f"has no count {name!r} in the state dict, or one that is none: {entry.get(name)!r}"
    if job.recipe.momentum and "momentum" not in entry:
        return "has no momentum in the state dict"
    wrong = wrong_tensors(p, entry, forms)
    if wrong:
        return wrong
    tensors = {f"{kind}[{i}]": x for kind in Factors._fields for i, x in entry.get(kind, {}).items()}
    if "momentum" in entry:
        tensors["momentum"] = entry["momentum"]
    for name, x in tensors.items():
        if x.is_meta != p.is_meta:
            return f"is on {p.device}, its {name} in the state dict on {x.device}"
        if not x.is_meta and not bool(x.isfinite().all()):
            return f"has a {name} in the state dict that is not finite; go back to an earlier one"
        if name.startswith("L") and not x.is_meta and bool((x < 0).any()):
            return f"has a bound {name} in the state dict that is below 0; go back to an earlier one"
    fixed = [i for i in entry["Q"] if int(i) not in job.recipe.preconditioner.may_vanish]
    layers = len(p) if id(p) in job.layered else 1
    for i in fixed:
        rows = entry["Q"][i]
        if rows.numel() and not rows.is_meta and not bool((rows != 0).reshape(layers, -1).any(1).all()):
            return f"has a factor Q[{i}] in the state dict that is zero, and would stay zero; go back to an earlier one"
    return ""


def _count(x: Any) -> int | None:
    """The whole number that a saved counter holds."""
    if isinstance(x, Tensor) and x.numel() == 1 and not (x.is_complex() or x.is_meta or x.dtype == torch.bool):
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not isfinite(x) or x != int(x):
        return None
    return int(x) if 0 <= x <= LARGEST_COUNT else None


def placed(entry: Entry, device: torch.device) -> Entry:
    """A copy of the state of a parameter on a device. Counters of ours stay on the host, as whole numbers."""
    moved: Entry = _moved(entry, device)
    if "Q" in entry:
        counts = {name: _count(entry[name]) for name in COUNTERS if name in entry}
        moved |= {k: torch.tensor(n, dtype=torch.int64, device="cpu") for k, n in counts.items() if n is not None}
        moved |= {k: dict(sorted(moved[k].items(), key=lambda x: int(x[0]))) for k in Factors._fields if k in moved}
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
