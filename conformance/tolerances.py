"""The one table of tolerances, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conformance.problems import Problem


@dataclass(frozen=True)
class Bound:
    """Largest relative difference allowed, or None: `factor` times the measured one-ulp envelope."""

    value: float | None
    reason: str
    factor: float = 1.0

    def per_step(self, steps: int, envelope: np.ndarray | None) -> np.ndarray:
        """The bound at each step."""
        if self.value is not None:
            return np.full(steps, self.value)
        assert envelope is not None
        return self.factor * envelope


LOCKED = {
    "float64": Bound(1e-12, "one step"),
    "float32": Bound(1e-4, "one step"),
    "bfloat16": Bound(0.3, "one step"),
}
FREE = {
    "float64": Bound(1e-11, "contractive"),
    "float32": Bound(1e-5, "contractive"),
    "bfloat16": Bound(None, "contractive"),
}
CHAOTIC = Bound(None, "one-ulp envelope")


def bound_for(problem: Problem, dtype: str, *, locked: bool) -> Bound:
    """The row of the table for a comparison."""
    if locked:
        return LOCKED[dtype]
    return CHAOTIC if problem.chaotic else FREE[dtype]
