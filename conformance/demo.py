"""What the demonstration runs: which methods, each on which problem, for how many steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from conformance.compare import method_for, work
from conformance.problems import PROBLEMS
from psgd.methods import METHODS
from psgd.summary import Parameter, parameter_costs

DRIVERS = ("torch", "jax")
DTYPE = "float64"
SIZES = ("mlp-digits", "softmax-digits", "rosenbrock")  # problems of 4,522, 650 and 10 parameters
OPERATIONS = 1e7  # floating-point operations that a step may take, with its fit
LOCKED_STEPS = 30
NEWTON: Mapping[str, Any] = {"lr": 0.1}  # problems have a rate for whitened steps, and a Newton step has its own length


def one_of_each_kind() -> list[str]:
    """The first method of each kind: per tensor or whole-model, whitening or Newton, and what its preconditioner is."""
    kinds: dict[Any, str] = {}
    for name, method in METHODS.items():
        recipe = method().recipe()
        kinds.setdefault((type(recipe.preconditioner), recipe.joint, recipe.newton), name)
    return list(kinds.values())


def operations(method: str, problem: str) -> int:
    """Floating-point operations of a step with its fit."""
    task = PROBLEMS[problem]
    parameters = [Parameter(name, x.shape, DTYPE, name in task.scanned) for name, x in task.init(0).items()]
    return sum(row.apply + row.fit for row in parameter_costs(method_for(method, task), parameters))


def fitting(method: str) -> str:
    """The problem for a method: the largest on which a step is cheap.

    A preconditioner of the whole model, and products with the Hessian, are for small ones.
    """
    recipe = METHODS[method]().recipe()
    sizes = SIZES[1:] if recipe.joint or recipe.newton else SIZES
    return next((problem for problem in sizes if operations(method, problem) <= OPERATIONS), sizes[-1])


class Run(NamedTuple):
    """A comparison to come."""

    method: str
    problem: str
    steps: int
    locked: bool

    @property
    def settings(self) -> Mapping[str, Any]:
        """Hyperparameters that are not their defaults."""
        return NEWTON if METHODS[self.method]().recipe().newton else {}

    @property
    def work(self) -> int:
        """How many steps of drivers it takes."""
        return work(self.problem, DTYPE, steps=self.steps, locked=self.locked, drivers=len(DRIVERS))


def planned(methods: Sequence[str], steps: int) -> Iterator[tuple[Run, Run]]:
    """For each method a free-running comparison and a short step-locked one."""
    for method in methods:
        problem = fitting(method)
        yield Run(method, problem, steps, False), Run(method, problem, min(steps, LOCKED_STEPS), True)
