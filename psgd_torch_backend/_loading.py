"""What may be loaded into an optimizer, and how it gets there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from psgd.arrays import Factors
from psgd_torch_backend._state import COUNTERS, Entry
from psgd_torch_backend._step import Group, Job


def matched(groups: list[Group], saved: Mapping[str, Any]) -> Iterator[tuple[Tensor, Entry]]:
    """Each parameter with the state that was saved of it."""
    for own, theirs in zip(groups, saved["param_groups"], strict=True):
        for p, index in zip(own["params"], theirs["params"], strict=True):
            if index in saved["state"]:
                yield p, saved["state"][index]


def alike(groups: list[Group], saved: Mapping[str, Any]) -> bool:
    """As many groups, of as many parameters? torch itself refuses others."""
    theirs = [group["params"] for group in saved["param_groups"]]
    return list(map(len, theirs)) == [len(group["params"]) for group in groups]


def complaint(job: Job, p: Tensor, entry: Any, shapes: list[tuple[int, ...]]) -> str:
    """What keeps a saved state from being that of a parameter, if anything. shapes: of its factors."""
    if not isinstance(entry, dict) or not isinstance(entry.get("Q"), dict):
        return f"has no factors Q in the state dict, which is of another optimizer; it has {', '.join(map(str, entry))}"
    for name in COUNTERS if job.tempo.counts else COUNTERS[:1]:
        count = entry.get(name)
        if isinstance(count, bool) or not isinstance(count, (int, float, Tensor)) or not count >= 0:
            return f"has no count {name!r} in the state dict, or one that is none: {count!r}"
    arrays = {"momentum": entry.get("momentum")}
    arrays |= {f"{kind} {i}": x for kind in Factors._fields for i, x in entry.get(kind, {}).items()}
    for name, x in arrays.items():
        if x is not None and not (isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            return f"has a {name} in the state dict that is no tensor of floating-point numbers, but {kind}"
    for kind in [kind for kind in ("Q", "P") if kind in entry]:
        found = [tuple(q.shape) for q in entry[kind].values()]
        if found != shapes:
            return f"of shape {tuple(p.shape)} needs factors {kind} of shapes {shapes}, in the state dict are {found}"
    momentum = entry.get("momentum")
    if momentum is not None and momentum.shape != p.shape:
        return f"has shape {tuple(p.shape)}, its momentum in the state dict {tuple(momentum.shape)}"
    for name, x in arrays.items():
        if x is not None and not x.is_meta and not bool(x.isfinite().all()):
            return f"has a {name} in the state dict that is not finite; go back to an earlier one"
    return ""


def placed(value: Any, device: torch.device, name: str = "") -> Any:
    """A copy of a nested state on a device; counters stay on the host, as whole numbers."""
    if isinstance(value, dict):
        return {k: placed(v, device, k) for k, v in value.items()}
    if name in COUNTERS:
        return torch.tensor(int(value), dtype=torch.int64, device="cpu")
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
