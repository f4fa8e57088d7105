"""A long run of every method, which shows that nothing drifts: a million steps on one problem, and poor gradients.

    python -m conformance.internal.soak [--quick] [--json FILE] [--markdown]
                               [--framework torch|jax] [--method NAME ...] [--torch-steps N]

Twenty times on the way, the end included, everything that the run holds is looked at. A row fails where a number is not
finite, a dtype has changed, a counter is wrong, a step was skipped, Q has passed what bounds it or has grown faster
than the steps went on, or the loss has not stayed small. The exit code is 1 where a row fails.

JAX scans over the steps, of every method. PyTorch calls them one by one, which takes milliseconds each, so that one
method speaks for all: its step, compiled, is the same code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import nan, prod, sqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.markup import escape

from conformance import terminal
from conformance.drivers import Arrays
from conformance.internal.soak_runs import (
    RANK,
    RATE,
    RUNNERS,
    RUNS,
    Runner,
    SoakRun,
    TorchRunner,
)
from conformance.packages import release
from conformance.terminal import Sheet, console, exits, verdict, writable, write_json
from psgd import criterion
from psgd.hyperparameters import Method
from psgd.methods import METHODS

CHECKPOINTS = 20
SETTLED = 1000  # steps; what happens before is the start


# ---- checkpoints ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Checkpoint:
    """What was seen after a step: how many were counted and skipped, which arrays are not finite, the norm of Q; and
    what was raised, after which nothing follows."""

    step: int
    count: int
    skipped: int
    bad: list[str]
    dtypes: list[str]
    norm: float
    loss: float | None
    raised: str = ""


def norm_of_q(state: Arrays, *, whole: bool) -> float:
    """The Frobenius norm of Q: of factors of axes, the product of theirs; of others the largest."""
    norms = [float(np.linalg.norm(x)) for name, x in state.items() if "/Q/" in name]
    return float(np.max(norms, initial=0.0)) if whole else prod(norms)  # NumPy's, of which a NaN comes out


def checkpoint(driver: Runner, run: SoakRun, step: int) -> Checkpoint:
    """At everything that a run holds."""
    params, _, state = driver.snapshot()
    bad = [name for name, x in (params | state).items() if not np.isfinite(x).all()]
    norm = norm_of_q(state, whole=driver.method.recipe().joint)
    skipped, _ = driver.skipped()
    return Checkpoint(step, int(state.get("w/step", 0)), skipped, bad, driver.dtypes(), norm, run.loss(params["w"]))


def checkpoints(driver: Runner, run: SoakRun) -> Iterator[Checkpoint]:
    """A run from the start, as seen on the way."""
    driver.begin({name: driver.array(x) for name, x in run.start().items()})
    n = run.steps // CHECKPOINTS
    for i in range(CHECKPOINTS):
        try:
            driver.run(run, run.drawn(i, n))
        except (ArithmeticError, RuntimeError) as error:
            yield replace(checkpoint(driver, run, (i + 1) * n), raised=f"{type(error).__name__}: {error}")
            return
        yield checkpoint(driver, run, (i + 1) * n)


# ---- judging ----------------------------------------------------------------------------------
def ceiling(method: Method, run: SoakRun) -> float:
    """The norm that Q may reach, of gradients with entries near 1.

    What is fitted is never below the noise d that damps it. In directions that are never seen one factor settles where
    (q d)^2 = 1/q^2, at d^(-1/2). Each of k triangular ones settles where (Q d)^2 = 1/q_i^2, Q = q_1 ... q_k, and Q at
    d^(-k/(k+1)), below which the other geometries stay. Without noise y = v/q there, and a fit moves q by
    rate y^2 q / ell: q^2 of each factor grows by 2 rate each time, where v^2 and ell are near 1. Twice either, for the
    spread of the noise, in each factor, and for as many directions as there are numbers.
    """
    schedule, recipe = method.schedule(), method.recipe()
    k, root = 1 if recipe.joint else len(run.shape), sqrt(prod(run.shape))
    if recipe.damping is criterion.undamped:
        return (2 * sqrt(2 * float(schedule.rate(np, 1.0)) * run.steps)) ** k * root
    return 2**k * float(schedule.damping) ** (-k / (k + 1)) * root


# Times as large in the second half of a run as in the first. A factor without noise grows as the root of the steps, Q
# of two such as the steps, which makes 2; what compounds is far above.
FASTEST = 2.5
LARGEST_LOSS = 10 * RATE  # a whitened step is about as long as the rate, and f settles near it


def largest(points: Sequence[Checkpoint]) -> float:
    """The largest norm of Q, NaN if one is."""
    return float(np.max([x.norm for x in points], initial=0.0))


def growth(points: Sequence[Checkpoint]) -> float:
    """The largest norm of Q in the second half of a run, over that in the first."""
    half = len(points) // 2
    return largest(points[half:]) / largest(points[:half]) if half else nan


def complaints(points: Sequence[Checkpoint], limit: float) -> list[str]:
    """What is wrong with a run, and since which step. limit: of the norm of Q."""
    settled = [x for x in points if x.step >= SETTLED]
    losses = [x for x in settled if x.loss is not None and not x.loss <= LARGEST_LOSS]
    found = {
        "{0.raised}": [x for x in points if x.raised],
        "not finite: {0.bad}": [x for x in points if x.bad],
        "{0.count} steps counted": [x for x in points if x.count != x.step],
        "{0.skipped} steps skipped": [x for x in points if x.skipped],
        "other dtypes": [x for x in points if x.dtypes != points[0].dtypes],
        f"‖Q‖ is {{0.norm:.3g}}, above {limit:.3g}": [x for x in points if not x.norm <= limit],
        "f is {0.loss:.3g}": losses,
    }
    wrong = [f"{what.format(points[0])} at step {points[0].step}" for what, points in found.items() if points]
    if len(settled) > CHECKPOINTS // 2 and growth(points) > FASTEST:
        wrong.append(f"‖Q‖ grew {growth(points):.2g} times in the second half")
    return wrong


@dataclass(frozen=True)
class SoakResult:
    """A run and what is wrong with it."""

    framework: str
    method: str
    run: str
    steps: int
    limit: float
    seconds: float
    complaints: list[str]
    checkpoints: list[Checkpoint]


def settings(method: type[Method], lr: float = RATE, **hyperparameters: Any) -> Method:
    """The defaults, but for weight decay, which pulls away from the optimum, and ranks above the count of numbers."""
    ranks = {f.name: RANK for f in fields(method) if f.name.endswith("rank_of_approximation")}
    return method.of(lr=lr, weight_decay=0.0, **ranks, **hyperparameters)


def results(runner: type[Runner], name: str, runs: Sequence[SoakRun]) -> Iterator[SoakResult]:
    """The runs of a method in a framework. Those on like gradients share what was compiled."""
    method, drivers = settings(METHODS[name]), dict[bool, Runner]()
    for run in runs:
        if run.curved not in drivers:
            drivers[run.curved] = runner(method, run.problem(), run.start(), "float32")
        start, limit = perf_counter(), ceiling(method, run)
        points = list(checkpoints(drivers[run.curved], run))
        seconds = perf_counter() - start
        yield SoakResult(
            runner.framework.name, name, run.name, run.steps, limit, seconds, complaints(points, limit), points
        )


# ---- telling ----------------------------------------------------------------------------------
WORDS, NUMBERS = ("framework", "method", "gradients"), ("steps", "largest ‖Q‖", "last ‖Q‖", "growth", "last f")
HEAD = (*WORDS, *NUMBERS, "verdict")


def cells(row: SoakResult) -> list[str]:
    """A row in words, but for its verdict."""
    last = row.checkpoints[-1]
    loss = "" if last.loss is None else f"{last.loss:.3f}"
    norms = f"{largest(row.checkpoints):.3g}", f"{last.norm:.3g}", f"{growth(row.checkpoints):.2f}"
    numbers = f"{row.steps:,}", *norms, loss
    return [row.framework, row.method, row.run, *numbers]


def table(found: Sequence[SoakResult]) -> Sheet:
    """For a terminal."""
    sheet = Sheet(WORDS, [*NUMBERS, HEAD[-1]])
    for row in found:
        sheet.add_row(*cells(row), " ".join([verdict(not row.complaints), escape("; ".join(row.complaints))]).rstrip())
    return sheet


def markdown(found: Sequence[SoakResult]) -> str:
    """For a document."""
    lines = [[*cells(row), "FAIL: " + "; ".join(row.complaints) if row.complaints else "pass"] for row in found]
    return terminal.markdown([HEAD, *lines])


def conclude(found: Sequence[Any], path: Path | None) -> None:
    """Write all rows to a file, where one is wanted, and exit with 1 if any has complaints."""
    versions = {name: release(name) for name in ("torch", "jax", "numpy")}
    write_json(path, {"versions": versions, "rows": [asdict(row) for row in found]})
    if any(row.complaints for row in found):
        sys.exit(1)


LONG = RUNS[0].steps
SHORT = {LONG: 200, RUNS[1].steps: 60}  # of --quick


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, report, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(prog="python -m conformance.internal.soak", description="Does anything drift?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was seen here too")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/soak.md has it")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--framework", action="append", choices=RUNNERS, help="this one alone; may be repeated")
    parser.add_argument("--method", action="append", choices=METHODS, help="this one alone; may be repeated")
    parser.add_argument("--torch-steps", type=int, default=LONG, metavar="N", help="length of PyTorch's longest run")
    options = parser.parse_args(arguments)
    with exits():
        writable(options.json)
    found, progress = list[SoakResult](), console(stderr=True)
    for framework in options.framework or RUNNERS:
        lengths = SHORT if options.quick else {LONG: options.torch_steps} if framework == "torch" else {}
        runs = [replace(run, steps=lengths.get(run.steps, run.steps)) for run in RUNS]
        runner = TorchRunner if options.quick and framework == "torch" else RUNNERS[framework]
        for name in options.method or (METHODS if framework == "jax" else list(METHODS)[:1]):
            for row in results(runner, name, runs):
                found.append(row)
                progress.print(f"{' '.join(cells(row)[:4])}: {row.seconds:.0f} s", markup=False)
    if options.markdown:
        console().print(markdown(found), markup=False, soft_wrap=True)
    else:
        console().print(table(found))
    conclude(found, options.json)


if __name__ == "__main__":
    main()
