"""`psgd golden`: recorded runs of the published implementations, replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from conformance.cli.options import Json, from_checkout, loaded
from conformance.compare import Tick
from conformance.frameworks import FRAMEWORKS, Framework
from conformance.terminal import (
    Sheet,
    console,
    end,
    files,
    known,
    packages,
    progress,
    refuse,
    visible,
    writable,
    write_json,
)

if TYPE_CHECKING:
    from conformance.internal import golden as recorded
    from conformance.internal.golden_cases import Case

    Results = dict[str, list[recorded.Result]]


def recordings() -> Any:
    """The module that reads and replays recorded runs, which only a checkout has."""
    return from_checkout("conformance.internal.golden", "golden", "recorded runs are")


def replayed(case: Case, folder: Path, framework: Framework, tick: Tick) -> recorded.Result:
    """A case's result; an exception is a failure, whose message stands for where it failed."""
    try:
        return recordings().replay(case, folder, framework)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return recordings().Result(case["file"].removesuffix(".npz"), case["family"], inf, case["rtol"], message)
    finally:
        tick(1)


def replay_all(cases: Sequence[Case], folder: Path, drivers: Sequence[str]) -> Results:
    """Results of every driver, in the order of the cases."""
    frameworks = {name: loaded(FRAMEWORKS[name]) for name in drivers}
    results: Results = {}
    with progress(len(cases) * len(frameworks)) as part:
        for name, framework in frameworks.items():
            with part(f"{len(cases)} cases in {name}") as tick:
                results[name] = [replayed(case, folder, framework, tick) for case in cases]
    return results


def read_cases(folder: Path, families: Sequence[str]) -> list[Case]:
    """The cases of a folder, of some families or of all, family after family."""
    try:
        with files():
            cases: list[Case] = recordings().cases(folder)
    except ValueError as error:
        refuse(str(error))
    order = list(dict.fromkeys(case["family"] for case in cases))
    for name in families:
        known("family", name, order)
    wanted = [case for case in cases if not families or case["family"] in families]
    return sorted(wanted, key=lambda case: order.index(case["family"]))


def golden_table(results: Results) -> Sheet:
    """One row for each case, one column for each driver; families are set apart."""
    table = Sheet(["case"], ["rtol", *results], spare=["rtol"])
    family = None
    for line in zip(*results.values(), strict=True):
        if line[0].family != family:
            family = line[0].family
            table.add_section()
            table.add_row(f"[bold]{escape(visible(family))}[/]", *[""] * (1 + len(results)))
        errors = [f"[green]{r.error:.1e}[/]" if r.passed else f"[bold red]{r.error:.1e} ✗[/]" for r in line]
        table.add_row(f"  {escape(visible(line[0].case))}", f"{line[0].rtol:.0e}", *errors)
    return table


def counted(names: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in names.items())


def unsupported(cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """How many cases wait for what: families by name, and functions of families that are there in part."""
    supported, replays = recordings().supported, recordings().FAMILIES
    waiting = [case for case in cases if not supported(case)]
    families = Counter(case["family"] for case in waiting if case["family"] not in replays)
    functions = Counter(case["function"] for case in waiting if case["family"] in replays)
    return {"families": dict(families), "functions": dict(functions)}


def golden_json(folder: Path, results: Results, waiting: Mapping[str, Any]) -> dict[str, Any]:
    """The result as plain data."""

    def plain(r: recorded.Result) -> dict[str, Any]:
        return vars(r) | {"verdict": "pass" if r.passed else "fail"}

    drivers = [
        {
            "driver": name,
            "passed": sum(r.passed for r in rows),
            "failed": sum(not r.passed for r in rows),
            "cases": list(map(plain, rows)),
        }
        for name, rows in results.items()
    ]
    return {"folder": str(folder), "drivers": drivers, "not_yet_supported": waiting}


def golden(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of recorded cases with its index.json.")],
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be repeated.")] = None,
    driver: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(FRAMEWORKS)}; may be repeated.  [default: numpy]")
    ] = None,
    json_file: Json = None,
) -> None:
    """Replay recorded runs of the published implementations; exit code 1 if a case is off by more than its rtol.

    The JSON holds every case of every driver. An error that is infinite or not a number is null in it.
    """
    drivers = [known("driver", name, FRAMEWORKS) for name in dict.fromkeys(driver or ["numpy"])]
    writable(json_file)
    cases = read_cases(folder, family or [])
    with packages():
        results = replay_all([case for case in cases if recordings().supported(case)], folder, drivers)
    waiting = unsupported(cases)
    write_json(json_file, golden_json(folder, results, waiting))
    show_golden(console(), results, waiting)
    end(all(r.passed for rows in results.values() for r in rows))


def show_golden(out: Console, results: Results, waiting: Mapping[str, Mapping[str, int]]) -> None:
    """The table, what failed and where, the counts, and what is not supported yet."""
    out.print("largest relative error", golden_table(results))
    for name, lines in results.items():
        for r in lines:
            if not r.passed:
                text = f"{name}: {r.case} is off by {r.error:.1e}, more than {r.rtol:.0e}, at {r.where}"
                out.print(visible(text), markup=False, style="red", soft_wrap=True)
    for name, lines in results.items():
        passed = sum(r.passed for r in lines)
        out.print(f"{name}: {passed} passed, {len(lines) - passed} failed", markup=False)
    for what, names in waiting.items():
        if names:
            out.print(visible(f"not yet supported {what}: {counted(names)}"), markup=False, soft_wrap=True)
