"""What a long run is on, and who runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from conformance.drivers import Arrays, JaxEager, TorchEager
from conformance.problems import Problem

RATE = 0.01  # of learning
RANK = 2  # of preconditioners that have one: below the four numbers of the problem
Draw = Callable[[np.random.Generator, int], np.ndarray]  # of n gradients, or of their noise


# ---- what the runs are on ---------------------------------------------------------------------
def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


# f(W) = 0.5 |A (W - W*) B|^2 by A^T A, B B^T and W*; its Hessian has eigenvalues from 0.3 to 2.8.
QUADRATIC: Arrays = {
    "left": np.array([[2.0, 0.5], [0.5, 1.0]]),
    "right": np.array([[1.2, -0.3], [-0.3, 0.5]]),
    "optimum": np.array([[0.5, -0.5], [1.0, 0.25]]),
}


def slope(apart: Any, known: Mapping[str, Any]) -> Any:
    """A^T A X B B^T: the gradient of f at W* + X, and the product of its Hessian with X."""
    return known["left"] @ apart @ known["right"]


def gradient_and_pair(
    curved: bool, w: Any, g: Any, v: Any, known: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The gradient, from what was drawn; and (v, H v), where H without f is g g^T, the Hessian of <g, W>^2 / 2."""
    if not curved:
        return {"w": g}, {"w": (v, g * (g * v).sum())}
    return {"w": slope(w - known["optimum"], known) + g}, {"w": (v, slope(v, known))}


@dataclass(frozen=True)
class SoakRun:
    """What the gradients are. draw: them, or where they are those of f (`curved`) their noise."""

    name: str
    steps: int
    shape: tuple[int, int]
    draw: Draw
    curved: bool = False

    def start(self) -> Arrays:
        return {"w": np.zeros(self.shape)}

    def problem(self) -> Problem:
        """As drivers want it."""
        none: Arrays = {}
        return Problem(self.name, "", lambda _: self.start(), lambda *_: none, lambda *_: 0.0, RATE, chaotic=True)

    def drawn(self, number: int, n: int) -> Arrays:
        """What chance gives to the n steps before a checkpoint: the same in both frameworks and for every method."""
        random = np.random.default_rng(number)
        return {"g": self.draw(random, n), "v": normal(random, n, *self.shape)}

    def loss(self, w: np.ndarray) -> float | None:
        """f without noise."""
        apart = w - QUADRATIC["optimum"] if self.curved else w
        return float(np.sum(apart * slope(apart, QUADRATIC))) / 2 if self.curved else None


ROWS, COLUMNS = 6, 4


def of_rank_one(random: np.random.Generator, n: int) -> np.ndarray:
    """Any vector on the left, always the same on the right, so that most directions of the right are never seen."""
    return normal(random, n, ROWS, 1) * np.array([1.0, -1.0, 0.5, 2.0], np.float32)


def constant(random: np.random.Generator, n: int) -> np.ndarray:
    """Ones."""
    return np.ones((n, ROWS, COLUMNS), np.float32)


def sparse(random: np.random.Generator, n: int) -> np.ndarray:
    """Zeros but in one row, at each step another one by lot."""
    here = random.integers(ROWS, size=n)[:, None, None] == np.arange(ROWS)[:, None]
    return np.where(here, normal(random, n, ROWS, COLUMNS), np.float32(0))


RUNS = (
    SoakRun("noisy quadratic", 1_000_000, (2, 2), lambda random, n: normal(random, n, 2, 2), curved=True),
    SoakRun("rank one", 20_000, (ROWS, COLUMNS), of_rank_one),
    SoakRun("constant", 20_000, (ROWS, COLUMNS), constant),
    SoakRun("sparse", 20_000, (ROWS, COLUMNS), sparse),
)


# ---- who runs ---------------------------------------------------------------------------------
class TorchRunner(TorchEager):
    """PyTorch, step by step."""

    def run(self, run: SoakRun, drawn: Arrays) -> None:
        """A step for each of the draws."""
        known, w = self.batch(QUADRATIC), self.tensors["w"].detach()
        for g, v in zip(*(x.unbind() for x in self.batch(drawn).values()), strict=True):
            self.advance(*gradient_and_pair(run.curved, w, g, v, known))

    def dtypes(self) -> list[str]:
        """Of the parameter and of its state."""
        (p,) = self.tensors.values()
        state = import_module("psgd_torch_backend").state_arrays(self.optimizer)
        counters = ("w/step", "w/since")
        return [str(x.dtype) for x in [p, *(x for name, x in state.items() if name not in counters)]]


class CompiledRunner(TorchRunner):
    """PyTorch, step by step, compiled."""

    flags: ClassVar[dict[str, bool]] = {"compile": True}


class JaxRunner(JaxEager):
    """JAX, all steps in one scan under `jax.jit`."""

    def run(self, run: SoakRun, drawn: Arrays) -> None:
        """A step for each of the draws."""
        self.tree, self.inner = self.scan(run.curved, (self.tree, self.inner), self.batch(drawn))

    @cached_property
    def scan(self) -> Any:
        """Compiled once, whatever is begun anew."""
        return self.jax.jit(self._scan, static_argnums=0)

    def _scan(self, curved: bool, held: Any, drawn: Any) -> Any:
        known = self.batch(QUADRATIC)

        def step(held: Any, draws: Any) -> Any:
            self.tree, self.inner = held
            self.advance(*gradient_and_pair(curved, self.tree["w"], draws["g"], draws["v"], known))
            return (self.tree, self.inner), None

        return self.jax.lax.scan(step, held, drawn)[0]

    def dtypes(self) -> list[str]:
        """Of the parameter and of its state."""
        return [str(x.dtype) for x in self.jax.tree.leaves((self.tree, self.inner))]


Runner = TorchRunner | JaxRunner
RUNNERS: dict[str, type[Runner]] = {"jax": JaxRunner, "torch": CompiledRunner}
