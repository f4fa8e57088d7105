"""What a step costs: every registered method on forty equal layers, in each framework and way of stepping.

    python -m benchmarks.step [--json FILE] [--markdown] [--quick]

Ways are timed in alternated rounds, so that a drift of the machine meets them all alike. Times are medians with their
quartiles; a speed-up is the median, over rounds, of the ratio to the first way of the same framework in that round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compiling import compile_times
from benchmarks.contenders import LAYERWISE, Contender, Layers, Run, contenders
from conformance.terminal import markdown
from psgd.methods import Method


@dataclass(frozen=True)
class Setup:
    """What is measured how often. slow: also what needs a compiler that takes many seconds."""

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
    names, seen = list(runs), {name: np.zeros(rounds) for name in runs}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            seen[name][i] = timed(runs[name], steps)
    return seen


def row(method: type[Method], contender: Contender, seconds: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    """The figures of one way. `first`: seconds of the first way of its framework, round by round."""
    low, median, high = 1e3 * np.quantile(seconds, [0.25, 0.5, 0.75])
    return {
        "method": method.name,
        "framework": contender.framework,
        "variant": contender.variant,
        "median_ms": float(median),
        "quartiles_ms": [float(low), float(high)],
        "speedup": float(np.median(first / seconds)),
    }


def step_times(method: type[Method], setup: Setup) -> list[dict[str, Any]]:
    """A row for each way to step with a method. The frameworks take turns, lest their threads meet."""
    rows = []
    ways = [c for c in contenders(method) if setup.slow or not c.slow_to_start]
    for framework in dict.fromkeys(c.framework for c in ways):
        own = {c.variant: c for c in ways if c.framework == framework}
        runs = {variant: c.start(setup.layers) for variant, c in own.items()}
        for run in runs.values():
            timed(run, steps=1)
        seen = alternated(runs, setup.rounds, setup.steps)
        first = next(iter(seen.values()))
        rows += [row(method, own[variant], seconds, first) for variant, seconds in seen.items()]
    return rows


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures were taken on, and how busy it was."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jax": jax.__version__,
    }


def measure(setup: Setup, progress: Console) -> dict[str, Any]:
    """All figures, as plain data."""
    result: dict[str, Any] = {"machine": machine(), "setup": asdict(setup), "steps": [], "compile": []}
    for method in LAYERWISE.values():
        progress.log(f"{method.title}: steps")
        result["steps"] += step_times(method, setup)
        if setup.slow:
            progress.log(f"{method.title}: compilers")
            result["compile"].append({"method": method.name, **compile_times(method, setup.layers)})
    return result


Cells = list[Sequence[str]]  # a head, then rows


def steps_cells(result: Mapping[str, Any]) -> Cells:
    """What each way of stepping took."""

    def cells(r: Mapping[str, Any]) -> Sequence[str]:
        low, high = r["quartiles_ms"]
        figures = f"{r['median_ms']:.2f} ms", f"{low:.2f} to {high:.2f}", f"{r['speedup']:.1f}×"
        return r["method"], r["framework"], r["variant"], *figures

    head = "method", "framework", "way", "median", "quartiles", "speed-up"
    return [head, *map(cells, result["steps"])]


def compile_cells(result: Mapping[str, Any]) -> Cells:
    """Seconds to the first compiled step."""
    rows = [[x if isinstance(x, str) else f"{x:.1f} s" for x in r.values()] for r in result["compile"]]
    return [[name.replace("_", ", ", 1) for name in result["compile"][0]], *rows] if rows else []


def rich_table(title: str, cells: Cells) -> Table:
    """For a terminal; methods are set apart."""
    head, *rows = cells
    table = Table(title=title)
    for column in head:
        table.add_column(column, justify="left" if column in ("method", "framework", "way") else "right")
    for i, cell in enumerate(rows):
        table.add_row(*cell, end_section=i + 1 < len(rows) and rows[i + 1][0] != cell[0])
    return table


def markdown_table(title: str, cells: Cells) -> str:
    """For a document."""
    return f"{title}:\n\n{markdown(cells)}\n"


def tables(result: Mapping[str, Any]) -> dict[str, Cells]:
    """What was measured, by title."""
    layers = result["setup"]["layers"]
    title = f"A step of {layers['count']} layers of {layers['size']} x {layers['size']}"
    told = {title: steps_cells(result), "To the first compiled step": compile_cells(result)}
    return {title: cells for title, cells in told.items() if cells}


def show(result: Mapping[str, Any], titled: Mapping[str, Cells], console: Console, *, as_markdown: bool) -> None:
    """The machine and the tables."""
    console.print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), highlight=False)
    for title, cells in titled.items():
        if as_markdown:
            print("\n" + markdown_table(title, cells))
        else:
            console.print(rich_table(title, cells))


def one_table(
    program: str,
    description: str,
    measured: Callable[..., dict[str, Any]],
    titled: Callable[[dict[str, Any]], tuple[str, Cells]],
    width: int,
    arguments: Sequence[str] | None,
) -> None:
    """Be the command of a program that measures one table: `measured` gives figures, `titled` a title and its cells."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/benchmarks.md has it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    given = parser.parse_args(arguments)
    result = measured(Console(stderr=True), quick=given.quick)
    title, cells = titled(result)
    if given.markdown:
        print(markdown_table(title, cells))
    else:
        Console(width=width).print(rich_table(title, cells))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def tables_and_picture(
    parser: argparse.ArgumentParser,
    measured: Callable[..., dict[str, Any]],
    tables: Callable[[dict[str, Any]], Mapping[str, Cells]],
    picture: Callable[[dict[str, Any], Path], None],
    width: int,
    arguments: Sequence[str] | None,
) -> None:
    """Be the command of a program that measures several tables and draws a picture; its own words are in `parser`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else width)
    result = measured(Console(stderr=True), quick=given.quick)
    show(result, tables(result), console, as_markdown=given.markdown)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if given.picture:
        picture(result, given.picture)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="What a step costs.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/benchmarks.md has them")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing compiled: does it run?")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    result = measure(QUICK if given.quick else Setup(), Console(stderr=True))
    show(result, tables(result), console, as_markdown=given.markdown)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
