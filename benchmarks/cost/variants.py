"""What a step costs: every registered method on forty equal layers, in each framework and variant of the step.

    python -m benchmarks.cost.variants [--json FILE] [--markdown] [--quick]

Variants are timed in alternated rounds, so that a drift of the machine meets them all alike. Times are medians with
their quartiles; a speed-up is the median, over rounds, of the ratio to the first variant of the same framework in that
round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.layers import LAYERWISE, Layers, Run, StepVariant, step_variants
from benchmarks.racing import turns
from benchmarks.tables import Cells, machine, one_table
from psgd.hyperparameters import Method


@dataclass(frozen=True)
class Setup:
    """What is measured how often. slow: also the variants that need a compiler of many seconds."""

    layers: Layers = field(default_factory=Layers)
    rounds: int = 15
    steps: int = 3
    slow: bool = True


QUICK = Setup(Layers(count=3, size=8), rounds=3, steps=1, slow=False)


def timed(run: Run, steps: int) -> float:
    """Seconds a step, after one that is not counted."""
    run()
    start = perf_counter()
    for _ in range(steps):
        run()
    return (perf_counter() - start) / steps


def alternated(runs: Mapping[str, Run], rounds: int, steps: int) -> dict[str, np.ndarray]:
    """Seconds a step of each, (rounds,). Each round starts with another one."""
    by_variant = {name: np.zeros(rounds) for name in runs}
    for i in range(rounds):
        for name in turns(list(runs), i):
            by_variant[name][i] = timed(runs[name], steps)
    return by_variant


def row(method: type[Method], variant: StepVariant, seconds: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    """The figures of one variant. `first`: seconds of the first of its framework, round by round."""
    low, median, high = 1e3 * np.quantile(seconds, [0.25, 0.5, 0.75])
    return {
        "method": method.name,
        "framework": variant.framework,
        "variant": variant.name,
        "median_ms": float(median),
        "quartiles_ms": [float(low), float(high)],
        "speedup": float(np.median(first / seconds)),
    }


def step_times(method: type[Method], setup: Setup) -> list[dict[str, Any]]:
    """A row for each variant of a method's step. The frameworks take turns, lest their threads meet."""
    rows = []
    variants = [c for c in step_variants(method) if setup.slow or not c.slow_to_start]
    for framework in dict.fromkeys(c.framework for c in variants):
        of_framework = {c.name: c for c in variants if c.framework == framework}
        runs = {name: c.start(setup.layers) for name, c in of_framework.items()}
        for run in runs.values():
            timed(run, steps=1)
        by_variant = alternated(runs, setup.rounds, setup.steps)
        first = next(iter(by_variant.values()))
        rows += [row(method, of_framework[name], times, first) for name, times in by_variant.items()]
    return rows


def measure(console: Console, *, quick: bool) -> dict[str, Any]:
    """All figures, as plain data."""
    setup = QUICK if quick else Setup()
    result: dict[str, Any] = {"machine": machine(), "setup": asdict(setup), "rows": []}
    for method in LAYERWISE.values():
        console.log(f"{method.title}: steps")
        result["rows"] += step_times(method, setup)
    return result


def cells(result: Mapping[str, Any]) -> Cells:
    """What each variant of the step took."""

    def figures(r: Mapping[str, Any]) -> Sequence[str]:
        low, high = r["quartiles_ms"]
        times = f"{r['median_ms']:.2f} ms", f"{low:.2f} to {high:.2f}", f"{r['speedup']:.1f}×"
        return r["method"], r["framework"], r["variant"], *times

    head = "method", "framework", "variant", "median", "quartiles", "speed-up"
    return [head, *map(figures, result["rows"])]


def titled(result: Mapping[str, Any]) -> str:
    """What the table shows."""
    layers = result["setup"]["layers"]
    return f"A step of {layers['count']} layers of {layers['size']} x {layers['size']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    one_table("variants", "What a step costs.", measure, lambda r: (titled(r), cells(r)), 110, arguments)


if __name__ == "__main__":
    main()
