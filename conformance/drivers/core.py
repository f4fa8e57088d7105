"""Drivers of the core alone, in namespaces that do not differentiate."""

from __future__ import annotations

from typing import Any

from conformance.drivers.base import Arrays, Driver, Snapshot, dtype_name, flat_state, state_of_snapshot
from conformance.frameworks import FRAMEWORKS
from conformance.reference import Reference


class NumpyOracle(Driver):
    """The core in NumPy, always in float64: how far rounding takes the others."""

    name = "numpy"
    framework = FRAMEWORKS["numpy"]
    differentiates = False

    @classmethod
    def own_dtype(cls, dtype: str) -> str:
        return "float64"

    def begin(self, params: dict[str, Any]) -> None:
        self.run = Reference(self.method, params, self.scanned)

    def advance(self, gradients: dict[str, Any], pairs: dict[str, tuple[Any, Any]] | None) -> None:
        self.run.step(gradients, pairs)

    def params(self) -> Arrays:
        return {name: self.framework.numpy(p) for name, p in self.run.params.items()}

    def state(self) -> Arrays:
        flat: Arrays = {}
        since = self.run.since if self.method.schedule().counts else None
        for name, state in self.run.states.items():
            flat |= flat_state(name, state, self.run.count, since, self.framework.numpy)
        return flat

    def skipped(self) -> tuple[int, int]:
        return self.run.skipped, self.run.skipped_in_a_row

    def load(self, snapshot: Snapshot) -> None:
        for name, old in self.run.states.items():
            self.run.params[name] = self.array(snapshot.params[name])
            self.run.states[name] = state_of_snapshot(
                name, old, snapshot, lambda x, like: self.framework.array(x.reshape(like.shape), dtype_name(like))
            )
            self.run.count = int(snapshot.state[f"{name}/step"])
            self.run.since = int(snapshot.state.get(f"{name}/since", 0))


class StrictCore(NumpyOracle):
    """The core in array-api-strict, which has nothing but the standard."""

    name = "strict"
    framework = FRAMEWORKS["strict"]

    @classmethod
    def own_dtype(cls, dtype: str) -> str:
        return FRAMEWORKS["strict"].nearest(dtype)
