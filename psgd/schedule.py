"""Schedules: pure functions of the step, of Python numbers and of 0-d arrays alike.

A step is counted from 1. Decisions come back as booleans of the same kind as the step, and depend on nothing else but a
toss, which itself is a function of seed, step and role, and, where it is kept, the time since the last such decision.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from psgd._xp import namespace
from psgd.arrays import Number

Toss = Callable[[str], Number]  # role -> a uniform number in [0, 1)


class StepInfo(NamedTuple):
    """All that a decision may depend on. since: steps after the last one that was decided for, this one included."""

    step: Number
    toss: Toss
    since: Number = None  # None where nobody counts


When = Callable[[StepInfo], Any]  # -> a boolean


def at(value: Number | Callable[[Number], Number], step: Number) -> Number:
    """A number, or what a schedule gives at a step."""
    return value(step) if callable(value) else value


# ---- how gradients are averaged --------------------------------------------------------
class Averaging(NamedTuple):
    """m <- past m + (1 - past) g; the step uses m, or `scale` m, or keep m + fresh g with `blend` = (keep, fresh)."""

    past: Number
    scale: Number | None = None
    blend: tuple[Number, Number] | None = None

    def each(self, number: Callable[[Number], Number]) -> Averaging:
        """The same of other numbers."""
        scale = None if self.scale is None else number(self.scale)
        blend = None if self.blend is None else (number(self.blend[0]), number(self.blend[1]))
        return Averaging(number(self.past), scale, blend)


def capped_average(xp: ModuleType, t: Number, beta: Number) -> Averaging:
    """The plain average of all gradients until its weight reaches beta, then an EMA [psgd_torch]."""
    return Averaging(xp.minimum(xp.asarray((t - 1) / t), xp.asarray(beta)))


def from_first(xp: ModuleType, t: Number, beta: Number) -> Averaging:
    """An EMA that starts at the first gradient [quad_torch]."""
    return Averaging(xp.asarray(beta) * (t > 1))


def corrected(xp: ModuleType, t: Number, beta: Number) -> Averaging:
    """An EMA from zero, divided by its total weight 1 - beta^t [psgd_jax]."""
    return Averaging(beta, scale=1 / (1 - beta**t))


def nesterov(xp: ModuleType, t: Number, beta: Number) -> Averaging:
    """The same, looked at one step ahead [psgd_jax, `nesterov=True`]."""
    return Averaging(beta, blend=(beta / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta**t)))


# ---- when something happens ------------------------------------------------------------
def always(info: StepInfo) -> bool:
    """At every step."""
    return True


def never(info: StepInfo) -> bool:
    """At no step."""
    return False


def periodic(period: int) -> When:
    """At steps period, 2 period, ..."""
    return lambda info: info.step % period == 0


def coin(role: str, probability: Number | Callable[[Number], Number]) -> When:
    """With a probability (a number or a schedule), by one toss a step, tossed also where the outcome is sure."""

    def when(info: StepInfo) -> Any:
        heads = info.toss(role) < at(probability, info.step * 1.0)
        return True if isinstance(probability, (int, float)) and probability >= 1 else heads

    return when


def unfitted(otherwise: When) -> When:
    """While nothing was fitted yet, and when `otherwise` says, which is asked at every step. Needs `StepInfo.since`."""

    def when(info: StepInfo) -> Any:
        due = otherwise(info)
        return True if due is True else (info.since >= info.step) | due

    return when


def early(steps: int, otherwise: When) -> When:
    """At the first steps, and when `otherwise` says, which is asked at every step."""

    def when(info: StepInfo) -> Any:
        due = otherwise(info)
        return True if due is True else (info.step <= steps) | due

    return when


def evenly(probability: Number | Callable[[Number], Number]) -> When:
    """As often as a probability (a number or a schedule) says, at even distances: once 1 / probability steps are over.

    0.3 is every fourth step. The slack of 1e-6 is for 1 / probability to come to the same whole number in float32 and
    in float64. Source: psgd_jax `kron`, whose counter is `StepInfo.since`.
    """
    return lambda info: info.since * at(probability, info.step * 1.0) >= 1 - 1e-6


class Annealed(NamedTuple):
    """A probability that falls from `max_prob` to `min_prob`: flat for `flat_start` steps, then exponentially.

        p(t) = min(max(max_prob exp(-decay (t - flat_start)), min_prob), max_prob)

    A plain tuple of four numbers, so that it can be saved; called with a step. Source: psgd_jax
    `precond_update_prob_schedule`.
    """

    max_prob: float = 1.0
    min_prob: float = 0.03
    decay: float = 0.001
    flat_start: float = 500

    def __call__(self, step: Number) -> Number:
        xp = np if isinstance(step, (int, float, np.generic)) else namespace(step)
        fall = xp.clip(xp.asarray(step - self.flat_start), min=0)
        return xp.clip(self.max_prob * xp.exp(-self.decay * fall), min=self.min_prob)


def precond_update_prob_schedule(
    max_prob: float = 1.0, min_prob: float = 0.03, decay: float = 0.001, flat_start: float = 500
) -> Annealed:
    """The probability of a fit that `kron` starts with: often at first, then every 34th step.

    Args:
        max_prob: first probability, at most 1.
        min_prob: last probability, above 0 and at most `max_prob`.
        decay: rate of the exponential fall, per step, at least 0.
        flat_start: steps before the fall.

    Returns:
        a schedule, step -> probability.

    Raises:
        ValueError: for numbers out of range.

    Equation: p(t) = min(max(max_prob exp(-decay (t - flat_start)), min_prob), max_prob)

    Source: psgd_jax `precond_update_prob_schedule`.

    Example:
        >>> from psgd import precond_update_prob_schedule
        >>> [round(float(precond_update_prob_schedule()(t)), 3) for t in (1, 500, 1500, 4500)]
        [1.0, 1.0, 0.368, 0.03]
    """
    if not 0 < min_prob <= max_prob <= 1:
        raise ValueError(f"min_prob={min_prob!r} and max_prob={max_prob!r} must satisfy 0 < min_prob <= max_prob <= 1")
    if not (0 <= decay < inf and flat_start >= 0):
        raise ValueError(f"decay={decay!r} must lie in [0, inf) and flat_start={flat_start!r} must not be negative")
    return Annealed(max_prob, min_prob, decay, flat_start)


# ---- how large a step of the factors is ------------------------------------------------
def inverse_root(xp: ModuleType, peak: Number, step: Number, timescale: float, floor: float) -> Number:
    """max(peak / sqrt(1 + step / timescale), floor) [quad_torch `get_precond_lr`].

    The floor wins over the peak: a peak below it has no effect.
    """
    return xp.maximum(peak / xp.sqrt(xp.asarray(1.0 + step / timescale)), xp.asarray(floor))
