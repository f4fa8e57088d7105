"""What a step costs in the long run, for methods that fit their factors more and more rarely.

    python -m benchmarks.cost.amortised [--json FILE] [--markdown] [--quick]

Beside each other in one run: a step that fits, every time; and the average step of a schedule that has come to its
last probability, over whole periods of it. What is shown is the median, over alternated rounds, of the ratio of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console

import psgd_jax_backend
import psgd_torch_backend
from benchmarks.layers import Layers, Run, jax_run, torch_run
from benchmarks.tables import Cells, machine, one_table
from psgd.hyperparameters import Method
from psgd.methods import METHODS
from psgd.schedule import Annealed

PROBABILITY = "preconditioner_update_probability"
SETS = (Layers(40, 64), Layers(8, 512))


def annealed() -> dict[str, Annealed]:
    """Methods whose probability of a fit falls by default, with its schedule."""
    defaults = {name: f.default for name, method in METHODS.items() for f in fields(method) if f.name == PROBABILITY}
    return {name: schedule for name, schedule in defaults.items() if isinstance(schedule, Annealed)}


def runs(method: type[Method], layers: Layers, share: float) -> dict[str, Callable[[], Run]]:
    """What starts a run, by framework and "always" or "rarely"."""
    torch_class, jax_alias = getattr(psgd_torch_backend, method.title), getattr(psgd_jax_backend, method.name)
    starts: dict[str, Callable[[], Run]] = {}
    for when, probability in (("always", 1.0), ("rarely", share)):
        chosen = {PROBABILITY: probability}
        starts[f"torch/{when}"] = partial(torch_run, partial(torch_class, **chosen), layers)
        starts[f"jax/{when}"] = partial(_jax_started, partial(jax_alias, **chosen), layers)
    return starts


def _jax_started(make: Callable[[], Any], layers: Layers) -> Run:
    return jax_run(make(), layers)


def average(run: Run, steps: int) -> float:
    """Seconds a step, over many."""
    start = perf_counter()
    for _ in range(steps):
        run()
    return (perf_counter() - start) / steps


def measure(console: Console, *, quick: bool) -> dict[str, Any]:
    """All figures, as plain data."""
    sets, rounds = ((Layers(2, 8),), 1) if quick else (SETS, 5)
    rows = []
    for name, schedule in annealed().items():
        period = int(np.ceil(1 / schedule.min_prob - 1e-6))
        for layers in sets:
            console.log(f"{name}: {layers.count} layers of {layers.size}")
            started = {k: start() for k, start in runs(METHODS[name], layers, schedule.min_prob).items()}
            for run in started.values():
                average(run, period)
            for framework in ("torch", "jax"):
                ratios = [
                    average(started[f"{framework}/rarely"], period)
                    / average(started[f"{framework}/always"], period // 4)
                    for _ in range(rounds)
                ]
                low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
                rows.append(
                    {
                        "method": name,
                        "framework": framework,
                        "layers": f"{layers.count} of {layers.size} x {layers.size}",
                        "period": period,
                        "ratio": float(median),
                        "quartiles": [float(low), float(high)],
                    }
                )
    return {"machine": machine(), "rows": rows}


def cells(result: dict[str, Any]) -> Cells:
    """A row for each method, framework and set of layers."""
    head = ["method", "framework", "layers", "fits every", "average step / step that fits", "quartiles"]
    return [head] + [
        [
            r["method"],
            r["framework"],
            r["layers"],
            f"{r['period']} steps",
            f"{r['ratio']:.2f}",
            " to ".join(f"{q:.2f}" for q in r["quartiles"]),
        ]
        for r in result["rows"]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    title = "The average step once the schedule has come to its last probability, over a step that fits"
    one_table("amortised", "What a step costs in the end.", measure, lambda r: (title, cells(r)), 120, arguments)


if __name__ == "__main__":
    main()
