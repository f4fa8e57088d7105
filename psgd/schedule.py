"""Schedules: pure functions of the step, of Python numbers and of 0-d arrays alike.

A step is counted from 1. Decisions come back as booleans of the same kind as the step, and depend on nothing else but a
toss, which itself is a function of seed, step and role.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

Number = Any  # a Python number or a 0-d array
Toss = Callable[[str], Number]  # role -> a uniform number in [0, 1)
When = Callable[[Number, Toss], Any]  # (step, toss) -> a boolean


# ---- how gradients are averaged --------------------------------------------------------
class Memory(NamedTuple):
    """m <- past m + (1 - past) g; the step uses m, or keep m + fresh g where `blend` = (keep, fresh) is given."""

    past: Number
    blend: tuple[Number, Number] | None = None


def capped_average(xp: ModuleType, t: Number, beta: Number) -> Memory:
    """The plain average of all gradients until its weight reaches beta, then an EMA [psgd_torch]."""
    return Memory(xp.minimum(xp.asarray((t - 1) / t), xp.asarray(beta)))


def from_first(xp: ModuleType, t: Number, beta: Number) -> Memory:
    """An EMA that starts at the first gradient [quad_torch]."""
    return Memory(xp.asarray(beta) * (t > 1))


def corrected(xp: ModuleType, t: Number, beta: Number) -> Memory:
    """An EMA from zero, divided by its total weight 1 - beta^t [psgd_jax]."""
    return Memory(beta, (1 / (1 - beta**t), 0.0))


def nesterov(xp: ModuleType, t: Number, beta: Number) -> Memory:
    """The same, looked at one step ahead [psgd_jax, `nesterov=True`]."""
    return Memory(beta, (beta / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta**t)))


# ---- when something happens ------------------------------------------------------------
def always(step: Number, toss: Toss) -> bool:
    """At every step."""
    return True


def never(step: Number, toss: Toss) -> bool:
    """At no step."""
    return False


def periodic(period: int) -> When:
    """At steps period, 2 period, ..."""
    return lambda step, toss: step % period == 0


def coin(role: str, probability: Number) -> When:
    """With a probability, by one toss a step, tossed also where the outcome is sure."""

    def when(step: Number, toss: Toss) -> Any:
        heads = toss(role) < probability
        return True if isinstance(probability, (int, float)) and probability >= 1 else heads

    return when


# ---- how large a step of the factors is ------------------------------------------------
def inverse_root(xp: ModuleType, peak: Number, step: Number, timescale: float, floor: float) -> Number:
    """max(peak / sqrt(1 + step / timescale), floor) [quad_torch `get_precond_lr`].

    The floor wins over the peak: a peak below it has no effect.
    """
    return xp.maximum(peak / xp.sqrt(xp.asarray(1.0 + step / timescale)), xp.asarray(floor))
