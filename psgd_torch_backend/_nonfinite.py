"""Gradients that are not finite: how they are found, and which groups then step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psgd.nonfinite import all_finite, counted, not_finite, too_many
from psgd_torch_backend._groups import SKIPS, Group
from psgd_torch_backend._job import Job


def finite(tensors: Sequence[Tensor]) -> bool:
    """Is every entry of every tensor finite? One small pass over each, and one wait for the device."""
    if not tensors or tensors[0].is_meta:  # where there are no numbers
        return True
    sums = [x.sum(dtype=torch.float32 if x.element_size() < 4 else None) for x in tensors]
    near = sums
    if any(s.dtype != torch.float32 or s.device != sums[0].device for s in sums):
        near = [(s.abs() if s.is_complex() else s).to(sums[0].device, torch.float32) for s in sums]
    # A sum of large numbers may overflow, so that only a finite one settles it.
    return bool(torch.stack(near).isfinite().all()) or bool(all_finite(tensors))


def admitted(owner: str, jobs: list[Job]) -> list[Job]:
    """The groups that step: without those that skip, where one of them reads something that is not finite.

    Raises FloatingPointError where a group says so, or has skipped too often. Skipped steps are counted in the groups.
    """
    checked = [job for job in jobs if job.group["nonfinite"] != "propagate"]
    if finite([x for job in checked for x in job.inputs()]):
        for job in checked:
            _count(job.group, skipped=0)
        return jobs
    bad = [(job, name) for job in checked for name in _not_finite(job)]
    for job, name in bad:
        if job.group["nonfinite"] == "raise":
            raise FloatingPointError(not_finite(owner, name))
    skipping = [job.group for job in checked if job.group["nonfinite"] == "skip"]
    for group in skipping:
        _count(group, skipped=1)
    for group in skipping:
        if group["skipped_in_a_row"] >= group["max_skips"]:
            raise FloatingPointError(f"{owner}: {too_many(group['skipped_in_a_row'], bad[0][1])}")
    return [job for job in jobs if job.group["nonfinite"] != "skip"]


def _count(group: Group, skipped: int) -> None:
    """Count a step in a group. skipped: 1 where it was, else 0."""
    total, in_a_row = (group.get(name, 0) for name in SKIPS)
    group.update(zip(SKIPS, counted(total, in_a_row, skipped), strict=True))


def _not_finite(job: Job) -> list[str]:
    """The names of the parameters of which a step reads something that is not finite."""
    stepping = {id(p) for p in job.params}
    return [name for name, p in job.named if id(p) in stepping and not finite(job.inputs_of(p))]
