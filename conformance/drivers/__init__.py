"""Drivers: one training run each, in one framework and mode, all with the same four verbs.

A driver starts from NumPy arrays, computes its own gradients where its framework differentiates, steps, and shows
everything it holds as a `Snapshot` of float64 arrays; it can also be put into the state of another's snapshot.
"""

from __future__ import annotations

from conformance.drivers.base import Arrays, Driver, Snapshot
from conformance.drivers.core import NumpyOracle, StrictCore
from conformance.drivers.in_jax import JaxEager, JaxJit
from conformance.drivers.in_torch import TorchCompiled, TorchEager, TorchLoop

__all__ = [
    "DRIVERS",
    "Arrays",
    "Driver",
    "JaxEager",
    "JaxJit",
    "NumpyOracle",
    "Snapshot",
    "StrictCore",
    "TorchCompiled",
    "TorchEager",
    "TorchLoop",
]

DRIVERS: dict[str, type[Driver]] = {
    d.name: d for d in (TorchEager, TorchLoop, TorchCompiled, JaxJit, JaxEager, NumpyOracle, StrictCore)
}
