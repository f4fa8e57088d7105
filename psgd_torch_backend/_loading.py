"""What may be loaded into an optimizer, and how it gets there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

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
    if not isinstance(entry, dict) or not isinstance(entry.get("Q"), dict) or "step" not in entry:
        return f"has no factors Q in the state dict, which is of another optimizer; it has {', '.join(map(str, entry))}"
    found = [tuple(q.shape) for q in entry["Q"].values()]
    if found != shapes:
        return f"of shape {tuple(p.shape)} needs factors of shapes {shapes}, in the state dict they have {found}"
    momentum = entry.get("momentum")
    if momentum is not None and momentum.shape != p.shape:
        return f"has shape {tuple(p.shape)}, its momentum in the state dict {tuple(momentum.shape)}"
    if job.tempo.counts and "since" not in entry:
        return 'has no count "since" in the state dict, which is of another method'
    arrays = [momentum, *entry["Q"].values(), *entry.get("L", {}).values()]
    if not all(bool(x.isfinite().all()) for x in arrays if x is not None):
        return "has a state that is not finite in the state dict; go back to an earlier one"
    return ""


def placed(value: Any, device: torch.device, name: str = "") -> Any:
    """A copy of a nested state on a device; counters stay on the host, as whole numbers."""
    if isinstance(value, dict):
        return {k: placed(v, device, k) for k, v in value.items()}
    if name in COUNTERS:
        return torch.tensor(int(value), dtype=torch.int64)
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
