"""The one table of tolerances, each with its reason; relative to the largest modulus a leaf has had."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conformance.problems import Problem


@dataclass(frozen=True)
class Bound:
    """Largest relative difference allowed, or None: `factor` times the measured one-ulp envelope of the problem."""

    value: float | None
    reason: str
    factor: float = 1.0

    def per_step(self, steps: int, envelope: np.ndarray | None) -> np.ndarray:
        """The bound at each step, (steps,)."""
        if self.value is not None:
            return np.full(steps, self.value)
        if envelope is None:
            raise ValueError("a bound without a value needs the envelope of the problem")
        return self.factor * envelope


ENVELOPE = Bound(
    None,
    "within ten times what one ulp at the start grows to (four twins): a twin is rounded differently once, a framework "
    "at every operation. Largest ratio seen: 6.7, over 3 methods, 3 problems, 2 dtypes and up to 3 seeds, 300 steps",
    factor=10.0,
)
LOCKED = {
    "float64": Bound(
        1e-12,
        "one step from one state; largest seen: 3e-13 (updates, a thousandth of their parameters), 5e-15 (state)",
    ),
    "float32": Bound(2e-5, "one step from one state; the largest difference seen is 7e-6 (updates), 4e-6 (state)"),
    "bfloat16": Bound(
        0.5,
        "one step from one state; an update is seen as the difference of two rounded parameters, and half an ulp of a "
        "parameter with 8 bits is a good part of an update: largest seen 0.38 (updates), 0.05 (state)",
    ),
}
CONTRACTIVE = {
    "float64": Bound(1e-11, "rounding is forgotten as the run converges; the largest difference seen is 5e-15"),
    "float32": Bound(1e-5, "rounding is forgotten as the run converges; the largest difference seen is 4e-6"),
    "bfloat16": ENVELOPE,
}


def bound_for(problem: Problem, dtype: str, *, locked: bool) -> Bound:
    """The row of the table for a comparison."""
    if locked:
        return LOCKED[dtype]
    return ENVELOPE if problem.chaotic else CONTRACTIVE[dtype]
