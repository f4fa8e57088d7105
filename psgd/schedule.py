"""Schedules: pure functions of the step, of Python numbers and of 0-d arrays alike.

A step is counted from 1. Conditions come back as booleans of the same kind.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

Number = Any  # a Python number or a 0-d array


def every(step: Number, period: int) -> Number:
    """Is this one of the steps period, 2 period, ...?"""
    return step % period == 0


def inverse_root(xp: ModuleType, peak: Number, step: Number, timescale: float, floor: float) -> Number:
    """max(peak / sqrt(1 + step / timescale), floor) [quad_torch `get_precond_lr`].

    The floor wins over the peak: a peak below it has no effect.
    """
    return xp.maximum(peak / xp.sqrt(xp.asarray(1.0 + step / timescale)), xp.asarray(floor))
