"""`psgd compare`: one method and one problem in several drivers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from conformance import report
from conformance.cli.options import Assignments, Json, Seed, Steps, loaded, settings
from conformance.compare import Comparison, work
from conformance.compare import compare as compared
from conformance.drivers import DRIVERS
from conformance.packages import known_as
from conformance.problems import PROBLEMS
from conformance.terminal import Sheet, console, end, known, packages, progress, refuse, verdict, writable, write_json
from conformance.tolerances import LOCKED
from psgd.methods import METHODS


def installed(names: Sequence[str]) -> list[str]:
    """Those drivers whose framework is there; the others are named once."""
    available = []
    for name in names:
        try:
            loaded(DRIVERS[name].framework)
            available.append(name)
        except ImportError as error:
            package = known_as(error.name)
            why = package.distribution if package else error.name
            console(stderr=True).print(f"left out {name}: {why} is not installed", markup=False, soft_wrap=True)
    return available


def chosen(drivers: str | None) -> list[str]:
    """Drivers by name, or all that are installed. A comparison needs two, and one that differentiates."""
    names = list(dict.fromkeys(name.strip() for name in drivers.split(","))) if drivers is not None else None
    names = installed(list(DRIVERS)) if names is None else [known("driver", name, DRIVERS) for name in names]
    if len(names) < 2:
        refuse(f"a comparison needs two drivers or more; choose of {', '.join(DRIVERS)}")
    if not any(DRIVERS[name].differentiates for name in names):
        able = ", ".join(name for name, driver in DRIVERS.items() if driver.differentiates)
        refuse(f"none of {', '.join(names)} differentiates; add one of {able}")
    return names


def pairs_table(comparison: Comparison) -> Sheet:
    """One row for each pair; what is not judged is dim."""
    kinds = list(comparison.pairs[0].curves)
    table = Sheet(["pair"], [*kinds, "bound", "first step over", "verdict"])
    for pair in comparison.pairs:
        largest = [f"{x:.1e}" if kind in pair.judged else f"[dim]{x:.1e}[/]" for kind, x in pair.max_rel_diff().items()]
        over = str(pair.first_step_over or "–")
        table.add_row(f"{pair.a} – {pair.b}", *largest, f"{np.max(pair.bound):.1e}", over, verdict(pair.passed))
    return table


def show_failures(out: Console, comparison: Comparison, prefix: str = "") -> None:
    """Where each pair that failed left its bound."""
    for pair in comparison.pairs:
        if not pair.passed:
            out.print(prefix + report.explain(pair), markup=False, style="red", soft_wrap=True)


def compare(
    method: Annotated[str, typer.Option(help="A registered method; `psgd methods` lists them.")],
    problem: Annotated[str, typer.Option(help=f"One of {', '.join(PROBLEMS)}.")],
    steps: Steps = 100,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(LOCKED)}.")] = "float64",
    seed: Seed = 0,
    locked: Annotated[bool, typer.Option("--locked", help="Take each step from one common state.")] = False,
    drivers: Annotated[
        str | None, typer.Option(help=f"At least two of {','.join(DRIVERS)}; default: all that are installed.")
    ] = None,
    assignments: Assignments = None,
    json_file: Json = None,
) -> None:
    """Run drivers beside each other on one problem; exit code 1 if a pair leaves its bound.

    The JSON holds a list of pairs. A number that is infinite or not a number is null in it.
    """
    known("method", method, METHODS)
    known("problem", problem, PROBLEMS)
    known("dtype", dtype, LOCKED)
    writable(json_file)
    hyperparameters = settings(method, assignments or [])
    with packages():
        names = chosen(drivers)
        total = work(problem, dtype, steps=steps, locked=locked, drivers=len(names))
        with progress(total) as part, part(f"{method} on {problem}") as tick:
            comparison = compared(
                method,
                problem,
                steps=steps,
                dtype=dtype,
                seed=seed,
                locked=locked,
                drivers=names,
                tick=tick,
                settings=hyperparameters,
            )
    write_json(json_file, comparison.json())
    out = console()
    out.print(f"[bold]{method}[/] on {problem}, {steps} steps, {dtype}, seed {seed}, {report.MODES[comparison.mode]}")
    out.print("largest relative difference of", pairs_table(comparison))
    out.print(f"Bound: {comparison.bound.reason}.", markup=False, style="dim")
    show_failures(out, comparison)
    end(comparison.passed)
