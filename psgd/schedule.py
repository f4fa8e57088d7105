"""Schedules: pure functions of the step, of Python numbers and of 0-d arrays alike.

A step is counted from 1. A decision is a boolean, Python's or a 0-d array as the step is. It depends on the step, on a
toss, which is a function of seed, step and role, and, where that is counted, on the steps since the last fit.
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
    """All that a decision may depend on.

    Args:
        step: the number of the step, from 1.
        toss: role -> a uniform number in [0, 1).
        since: steps after the last fit, this one included; None where the schedule does not count them.
    """

    step: Number
    toss: Toss
    since: Number = None


When = Callable[[StepInfo], Any]  # -> a boolean


def at(value: Number | Callable[[Number], Number], step: Number) -> Number:
    """The value of a number or of a schedule (a function of the step) at a step."""
    return value(step) if callable(value) else value


# ---- how gradients are averaged --------------------------------------------------------
class Averaging(NamedTuple):
    """How a gradient g enters the momentum m at one step, and what of m the step uses.

        m <- past m + (1 - past) g,   used: m, or scale m, or keep m + fresh g

    Args:
        past: weight of the old m, in [0, 1).
        scale: factor of m; None is 1.
        blend: (keep, fresh), or None.
    """

    past: Number
    scale: Number | None = None
    blend: tuple[Number, Number] | None = None

    def each(self, number: Callable[[Number], Number]) -> Averaging:
        """The same averaging with `number` applied to each of its numbers."""
        scale = None if self.scale is None else number(self.scale)
        blend = None if self.blend is None else (number(self.blend[0]), number(self.blend[1]))
        return Averaging(number(self.past), scale, blend)


def capped_average(xp: ModuleType, t: Number, beta: Number) -> Averaging:
    """past = min(1 - 1/t, beta): the plain mean of all gradients until it would forget slower than beta, then an
    exponential average [psgd_torch].
    """
    return Averaging(xp.minimum(xp.asarray((t - 1) / t), xp.asarray(beta)))


def from_first(xp: ModuleType, t: Number, beta: Number) -> Averaging:
    """past = beta, and 0 at t = 1: an exponential average that starts at the first gradient [quad_torch]."""
    return Averaging(xp.asarray(beta) * (t > 1))


def corrected(xp: ModuleType, t: Number, beta: Number) -> Averaging:
    """past = beta, from m = 0, with m / (1 - beta^t) used: divided by its total weight [psgd_jax]."""
    return Averaging(beta, scale=1 / (1 - beta**t))


def nesterov(xp: ModuleType, t: Number, beta: Number) -> Averaging:
    """past = beta, with beta m / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t) used [psgd_jax, `nesterov=True`]."""
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
    """With a probability, by one toss a step: toss(role) < probability.

    It is tossed also where the probability is 1, as published, so that recorded tosses stay in order.

    Args:
        role: names the toss.
        probability: a number in (0, 1] or a schedule.
    """

    def when(info: StepInfo) -> Any:
        heads = info.toss(role) < at(probability, info.step * 1.0)
        return True if isinstance(probability, (int, float)) and probability >= 1 else heads

    return when


def unfitted(otherwise: When) -> When:
    """While nothing was fitted yet, that is `since` = `step`, and when `otherwise` says, which is asked at every step.

    Source: psgd_torch's Newton methods, whose preconditioner begins with the first pair.
    """

    def when(info: StepInfo) -> Any:
        due = otherwise(info)
        return True if due is True else (info.since >= info.step) | due

    return when


def early(steps: int, otherwise: When) -> When:
    """At the first steps, and when `otherwise` says, which is asked at every step.

    Source: psgd_jax's methods with a coin, with steps = 2.
    """

    def when(info: StepInfo) -> Any:
        due = otherwise(info)
        return True if due is True else (info.step <= steps) | due

    return when


def evenly(probability: Number | Callable[[Number], Number]) -> When:
    """At even distances, once 1 / probability steps are over since the last time: since * probability >= 1.

    0.3 is every fourth step. The slack of 1e-6, eight roundings of float32, is for 1 / probability to come to the same
    whole number in float32 and in float64, so that both frameworks fit at the same steps.

    Args:
        probability: a number in (0, 1] or a schedule.

    Source: psgd_jax `kron`, whose counter is `StepInfo.since`.
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
    """max(peak / sqrt(1 + step / timescale), floor), 0-d.

    Args:
        xp: the namespace to compute in.
        peak: value at step 0; without effect below the floor.
        step: the number of the step.
        timescale: steps until the value is peak / sqrt(2); 10,000 in quad_torch.
        floor: least value; 0.3 in quad_torch.

    Source: quad_torch `get_precond_lr`.
    """
    return xp.maximum(peak / xp.sqrt(xp.asarray(1.0 + step / timescale)), xp.asarray(floor))
