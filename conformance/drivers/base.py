"""What every driver is: the four verbs, and the snapshot that it shows and is put into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from conformance.frameworks import Framework
from conformance.problems import Problem
from psgd.arrays import Factors
from psgd.hyperparameters import Method
from psgd.recipe import State

Arrays = dict[str, np.ndarray]


class Snapshot(NamedTuple):
    """All that a run holds after a step, by name: params, the updates of that step, every leaf of state."""

    params: Arrays
    updates: Arrays
    state: Arrays


def flat_state(name: str, state: State, step: int, since: Any, read: Callable[[Any], np.ndarray]) -> Arrays:
    """The state of one parameter as flat names. since: where the method counts it."""
    leaves = {f"{name}/step": np.asarray(float(step))}
    if since is not None:
        leaves[f"{name}/since"] = np.asarray(float(since))
    if state.momentum is not None:
        leaves[f"{name}/momentum"] = read(state.momentum)
    for kind, tensors in state.factors._asdict().items():
        leaves |= {f"{name}/{kind}/{i}": read(x) for i, x in enumerate(tensors)}
    return leaves


class Driver(ABC):
    """Base: start with a method, a problem, a start and a dtype."""

    name: ClassVar[str]
    framework: ClassVar[Framework]
    differentiates: ClassVar[bool] = True

    def __init__(self, method: Method, problem: Problem, start: Mapping[str, np.ndarray], dtype: str) -> None:
        self.method, self.problem, self.dtype = method, problem, self.own_dtype(dtype)
        # One preconditioner of all parameters knows no layers.
        self.scanned = frozenset[str]() if method.recipe().joint else problem.scanned
        self.before: Arrays = {}
        self.begin({name: self.array(x) for name, x in start.items()})

    @classmethod
    def own_dtype(cls, dtype: str) -> str:
        """The dtype in which this driver runs when asked for one."""
        return dtype

    def array(self, x: np.ndarray) -> Any:
        return self.framework.array(x, self.dtype)

    def batch(self, data: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: self.array(x) for name, x in data.items()}

    def step(
        self, gradients: Mapping[str, np.ndarray], pairs: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None
    ) -> Snapshot:
        """Step on given gradients, and on (v, H v) of each parameter where a method fits to them at this step."""
        self.before = self.params()
        arrays = None if pairs is None else {name: (self.array(v), self.array(h)) for name, (v, h) in pairs.items()}
        self.advance({name: self.array(g) for name, g in gradients.items()}, arrays)
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        params = self.params()
        updates = {name: x - self.before[name] for name, x in params.items()} if self.before else {}
        return Snapshot(params, updates, self.state())

    @abstractmethod
    def begin(self, params: dict[str, Any]) -> None:
        """Make the optimizer."""

    @abstractmethod
    def advance(self, gradients: dict[str, Any], pairs: dict[str, tuple[Any, Any]] | None) -> None:
        """One optimizer step."""

    @abstractmethod
    def params(self) -> Arrays:
        """Parameters as float64."""

    @abstractmethod
    def state(self) -> Arrays:
        """State leaves as float64; empty before the first step."""

    @abstractmethod
    def skipped(self) -> tuple[int, int]:
        """Steps that were skipped because a gradient was not finite, in all and in a row."""

    @abstractmethod
    def load(self, snapshot: Snapshot) -> None:
        """Continue from another's snapshot, taken after at least one step of both."""

    def gradient(self, data: Mapping[str, np.ndarray]) -> tuple[float, Arrays]:
        """Loss and gradient at the present parameters, by the framework's own autodiff."""
        raise NotImplementedError(f"{self.name} does not differentiate; give it another's gradients")

    def products(self, data: Mapping[str, np.ndarray], step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(v, H v) of each parameter at the present parameters, by the adapter's own functions."""
        raise NotImplementedError(f"{self.name} does not differentiate; give it another's gradients")


def dtype_name(x: Any) -> str:
    return str(x.dtype).rsplit(".", maxsplit=1)[-1]


def state_of_snapshot(name: str, old: State, snapshot: Snapshot, make: Callable[[np.ndarray, Any], Any]) -> State:
    """A state of the structure of `old` with the values of a snapshot."""
    momentum = old.momentum
    if momentum is not None:
        momentum = make(snapshot.state[f"{name}/momentum"], momentum)
    factors = {
        kind: tuple(make(snapshot.state[f"{name}/{kind}/{i}"], x) for i, x in enumerate(tensors))
        for kind, tensors in old.factors._asdict().items()
    }
    return State(momentum, Factors(**factors))
