"""The command `psgd`: train in every framework, compare the trajectories, replay recorded runs.

Exit codes: 0 where every verdict is a pass, 1 where one is not, 2 where the command was not understood or a package is
missing. Frameworks load when a driver asks for them, so help is quick.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import chain
from math import inf
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from typer.core import TyperGroup

    from conformance.terminal import (
        console,
        end,
        files,
        known,
        packages,
        progress,
        refuse,
        sheet,
        verdict,
        writable,
        write_json,
    )
except ImportError as missing:
    raise SystemExit(f"psgd: {missing.name} is not installed; pip install 'psgd[cli]'") from None

import numpy as np

from conformance import golden as recorded
from conformance import report as pages
from conformance.compare import Comparison, Tick
from conformance.compare import compare as compared
from conformance.drivers import DRIVERS
from conformance.frameworks import FRAMEWORKS, Framework
from conformance.problems import PROBLEMS
from conformance.tolerances import LOCKED, bound_for
from psgd.methods import METHODS, Method
from psgd.outline import BYTES
from psgd.summary import Parameter, counters, rows, summary

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

DEMO_PROBLEM = "mlp-digits"
DEMO_DRIVERS = ("torch", "jax")
DEMO_PACKAGES = ("torch", "jax", "optax", "sklearn", "matplotlib")
DEMO_LOCKED_STEPS = 30

Steps = Annotated[int, typer.Option(min=1, help="How many steps to train.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the start and of the batches.")]
Json = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the result to this file as JSON.")]
Given = Annotated[list[str] | None, typer.Option("--set", help="A hyperparameter as NAME=VALUE; may be repeated.")]


# ---- comparing ----------------------------------------------------------------------------
def run(
    method: str,
    problem: str,
    steps: int,
    dtype: str,
    seed: int,
    locked: bool,
    drivers: Sequence[str],
    hyperparameters: Mapping[str, Any] | None = None,
) -> Comparison:
    """A comparison behind a progress bar."""
    enveloped = bound_for(PROBLEMS[problem], dtype, locked=locked).value is None
    title = f"{method}, {pages.MODES['locked' if locked else 'free']}"
    with progress(title, steps * (2 if enveloped else 1)) as tick:
        return compared(
            method,
            problem,
            steps=steps,
            dtype=dtype,
            seed=seed,
            locked=locked,
            drivers=drivers,
            tick=tick,
            settings=hyperparameters,
        )


def settings(method: str, given: Sequence[str]) -> dict[str, Any]:
    """Hyperparameters from NAME=VALUE; a value is a Python literal, or else a string."""
    read: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign:
            refuse(f"--set {text} has no value; write it as NAME=VALUE")
        try:
            read[name] = inf if value == "inf" else ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            read[name] = value
    try:
        METHODS[method].of(**read)
    except ValueError as error:
        refuse(str(error))
    return read


def loaded(framework: Framework) -> Framework:
    """A framework that is installed; ImportError where it is not."""
    framework.array(np.zeros(1), "float32")
    return framework


def installed(names: Sequence[str]) -> list[str]:
    """Those drivers whose framework is there; the others are named once."""
    there = []
    for name in names:
        try:
            loaded(DRIVERS[name].framework)
            there.append(name)
        except ImportError as error:
            console(stderr=True).print(f"left out {name}: {error.name} is not installed", markup=False)
    return there


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


def pairs_table(comparison: Comparison) -> Table:
    """One row for each pair; what is not judged is dim."""
    kinds = list(comparison.pairs[0].curves)
    made = sheet(["pair"], [*kinds, "bound", "first step over", "verdict"])
    for pair in comparison.pairs:
        shown = [f"{x:.1e}" if kind in pair.judged else f"[dim]{x:.1e}[/]" for kind, x in pair.max_rel_diff().items()]
        over = str(pair.first_step_over or "–")
        made.add_row(f"{pair.a} – {pair.b}", *shown, f"{np.max(pair.bound):.1e}", over, verdict(pair.passed))
    return made


def tell_failures(out: Console, comparison: Comparison, prefix: str = "") -> None:
    for pair in comparison.pairs:
        if not pair.passed:
            out.print(prefix + pages.explain(pair), markup=False, style="red", soft_wrap=True)


@app.command()
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
    given: Given = None,
    json_file: Json = None,
) -> None:
    """Run drivers beside each other on one problem; exit code 1 if a pair leaves its bound.

    The JSON holds a list of pairs. A number that is infinite or not a number is null in it.
    """
    known("method", method, METHODS)
    known("problem", problem, PROBLEMS)
    known("dtype", dtype, LOCKED)
    writable(json_file)
    hyperparameters = settings(method, given or [])
    with packages():
        comparison = run(method, problem, steps, dtype, seed, locked, chosen(drivers), hyperparameters)
    write_json(json_file, comparison.json())
    out = console()
    out.print(f"[bold]{method}[/] on {problem}, {steps} steps, {dtype}, seed {seed}, {pages.MODES[comparison.mode]}")
    out.print("largest relative difference of", pairs_table(comparison))
    out.print(f"Bound: {comparison.bound.reason}.", markup=False, style="dim")
    tell_failures(out, comparison)
    end(comparison.passed)


# ---- the demonstration ----------------------------------------------------------------------
def demo_table(runs: Sequence[tuple[Comparison, Comparison]]) -> Table:
    """One row for each method: how it ended, how far apart, both verdicts."""
    ends = [f"{what}\n{driver}" for what in ("loss", "acc.") for driver in DEMO_DRIVERS]
    made = sheet(["method"], [*ends, "largest\ndifference", "bound\nat most", "\nverdict", "step-\nlocked"])
    for free, locked in runs:
        accuracy = free.accuracy()
        made.add_row(
            free.method,
            *(f"{free.losses[driver][-1]:.4f}" for driver in DEMO_DRIVERS),
            *(pages.percent(accuracy.get(driver)) for driver in DEMO_DRIVERS),
            f"{pages.largest(free):.1e}",
            f"{pages.largest_bound(free):.1e}",
            verdict(free.passed),
            verdict(locked.passed),
        )
    return made


@app.command()
def demo(
    report: Annotated[Path, typer.Option(dir_okay=False, help="Where to write the report.")] = Path("report.html"),
    steps: Steps = 150,
    seed: Seed = 0,
    picture: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write loss and difference as a PNG.")
    ] = None,
) -> None:
    """Train the digits with every method in PyTorch and in JAX, compare, and write a report.

    Exit code 1 if a run leaves its bound.
    """
    writable(report, picture)
    with packages():
        for package in DEMO_PACKAGES:
            import_module(package)
        runs = [demo_runs(method, steps, seed) for method in METHODS]
    comparisons = list(chain(*runs))
    with files():
        pages.write(comparisons, report)
        if picture:
            pages.picture(comparisons, picture)
    finish_demo(runs, report)


def demo_runs(method: str, steps: int, seed: int) -> tuple[Comparison, Comparison]:
    """A method's free-running comparison and a short step-locked one."""
    few = min(steps, DEMO_LOCKED_STEPS)
    free = run(method, DEMO_PROBLEM, steps, "float64", seed, False, DEMO_DRIVERS)
    return free, run(method, DEMO_PROBLEM, few, "float64", seed, True, DEMO_DRIVERS)


def finish_demo(runs: Sequence[tuple[Comparison, Comparison]], report: Path) -> None:
    """The table, what failed and where, and the place of the report."""
    out, first = console(), runs[0][0]
    out.print(f"\n[bold]{first.problem}[/], {first.steps} steps in {first.dtype}, with {' and '.join(first.losses)}")
    out.print(demo_table(runs))
    for c in chain(*runs):
        tell_failures(out, c, f"{c.method}, {pages.MODES[c.mode]}: ")
    out.print(f"Report: {report.absolute()}", markup=False, soft_wrap=True)
    end(all(c.passed for c in chain(*runs)))


# ---- recorded runs ------------------------------------------------------------------------
def replayed(case: recorded.Case, folder: Path, framework: Framework, tick: Tick) -> recorded.Result:
    """A case's result; an exception is a failure, whose message stands for where it failed."""
    try:
        return recorded.replay(case, folder, framework)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return recorded.Result(
            str(case["file"]).removesuffix(".npz"), case["family"], inf, case.get("rtol", 0.0), message
        )
    finally:
        tick()


Results = dict[str, list[recorded.Result]]


def replay_all(cases: Sequence[recorded.Case], folder: Path, drivers: Sequence[str]) -> Results:
    """Results of every driver, in the order of the cases."""
    frameworks = {name: loaded(FRAMEWORKS[name]) for name in drivers}
    results: Results = {}
    for name, framework in frameworks.items():
        with progress(f"{len(cases)} cases in {name}", len(cases)) as tick:
            results[name] = [replayed(case, folder, framework, tick) for case in cases]
    return results


def read_cases(folder: Path, families: Sequence[str]) -> list[recorded.Case]:
    """The cases of a folder, of some families or of all, family after family."""
    try:
        with files():
            cases = recorded.cases(folder)
        held = dict.fromkeys(case["family"] for case in cases)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(str(error) if type(error) is ValueError else f"{folder}/index.json is not an index of cases: {error!r}")
    for name in families:
        known("family", name, held)
    order = list(held)
    wanted = [case for case in cases if not families or case["family"] in families]
    return sorted(wanted, key=lambda case: order.index(case["family"]))


def golden_table(results: Results) -> Table:
    """One row for each case, one column for each driver; families are set apart."""
    made = sheet(["case"], ["rtol", *results])
    family = None
    for line in zip(*results.values(), strict=True):
        if line[0].family != family:
            family = line[0].family
            made.add_section()
            made.add_row(f"[bold]{escape(family)}[/]")
        errors = [f"[green]{r.error:.1e}[/]" if r.passed else f"[bold red]{r.error:.1e} ✗[/]" for r in line]
        made.add_row(f"  {escape(line[0].case)}", f"{line[0].rtol:.0e}", *errors)
    return made


def counted(names: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in names.items())


def unsupported(cases: Sequence[recorded.Case]) -> dict[str, dict[str, int]]:
    """How many cases wait for what: families by name, and functions of families that are there in part."""
    waiting = [case for case in cases if not recorded.supported(case)]
    families = Counter(case["family"] for case in waiting if case["family"] not in recorded.FAMILIES)
    functions = Counter(case["function"] for case in waiting if case["family"] in recorded.FAMILIES)
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


@app.command()
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
        results = replay_all([case for case in cases if recorded.supported(case)], folder, drivers)
    waiting = unsupported(cases)
    write_json(json_file, golden_json(folder, results, waiting))
    tell_golden(console(), results, waiting)
    end(all(r.passed for rows in results.values() for r in rows))


def tell_golden(out: Console, results: Results, waiting: Mapping[str, Mapping[str, int]]) -> None:
    """The table, what failed and where, the counts, and what is not supported yet."""
    out.print("largest relative error", golden_table(results))
    for name, lines in results.items():
        for r in lines:
            if not r.passed:
                text = f"{name}: {r.case} is off by {r.error:.1e}, more than {r.rtol:.0e}, at {r.where}"
                out.print(text, markup=False, style="red", soft_wrap=True)
    for name, lines in results.items():
        passed = sum(r.passed for r in lines)
        out.print(f"{name}: {passed} passed, {len(lines) - passed} failed", markup=False)
    for what, names in waiting.items():
        if names:
            out.print(f"not yet supported {what}: {counted(names)}", markup=False, soft_wrap=True)


# ---- planning -------------------------------------------------------------------------------
# Bytes of an adapter's counter of steps, whether it keeps one for each parameter, and bytes of its count of skips.
COUNTERS = {"torch": (8, True, 0), "jax": (4, False, 8)}
DTYPES = [name for name in BYTES if name.startswith(("float", "bfloat", "complex"))]


def read_shapes(path: Path) -> dict[str, dict[str, Any]]:
    """Parameters from a JSON file: name to shape, or name to an object with "shape", "dtype" and "scanned"."""
    try:
        given = json.loads(path.read_text())
        read = {name: x if isinstance(x, dict) else {"shape": x} for name, x in given.items()}
    except (OSError, ValueError, AttributeError) as error:
        refuse(f"{path} is not a JSON object of shapes ({error}); write {{'weight': [768, 3072], ...}}")
    for name, x in read.items():
        whole = isinstance(x.get("shape"), list) and all(type(n) is int and n >= 0 for n in x["shape"])
        typed = isinstance(x.get("dtype", ""), str) and isinstance(x.get("scanned", False), bool)
        if not (whole and typed) or x.keys() - {"shape", "dtype", "scanned"} or (x.get("scanned") and not x["shape"]):
            refuse(f"{path}: {name} is {json.dumps(x)}; give a list of whole numbers, and of a stack of layers an axis")
        known("dtype", x.get("dtype", "float32"), DTYPES)
    return read


def refuse_complex(method: Method, parameters: Mapping[str, Mapping[str, Any]], dtype: str) -> None:
    """Refuse complex parameters where a method takes none."""
    for name, x in parameters.items():
        if x.get("dtype", dtype).startswith("complex") and not method.complex_parameters:
            refuse(f"{method.name} does not support complex parameters; {name} is {x.get('dtype', dtype)}")


@app.command()
def plan(
    shapes: Annotated[Path, typer.Argument(metavar="SHAPES.json", help="Names and shapes of the parameters.")],
    method: Annotated[str, typer.Option(help="A registered method; `psgd methods` lists them.")],
    dtype: Annotated[str, typer.Option(help="Of parameters whose dtype the file leaves open.")] = "float32",
    framework: Annotated[str, typer.Option(help="torch or jax: whose counters of steps are added.")] = "torch",
    given: Given = None,
    json_file: Json = None,
) -> None:
    """Show what a method would keep of a model and what a step would cost, from its shapes alone."""
    known("method", method, METHODS)
    known("dtype", dtype, DTYPES)
    known("framework", framework, COUNTERS)
    writable(json_file)
    made = METHODS[method].of(**settings(method, given or []))
    size, each, skips = COUNTERS[framework]
    parameters = read_shapes(shapes)
    refuse_complex(made, parameters, dtype)
    known_shapes = [
        Parameter(name, tuple(x["shape"]), x.get("dtype", dtype), x.get("scanned", False))
        for name, x in parameters.items()
    ]
    counted = counters(made, known_shapes, size, each=each) + skips
    whole = summary([(made, r) for r in rows(made, known_shapes)], counted)
    console().print(str(whole), markup=False, highlight=False, soft_wrap=True)
    totals = {name: getattr(whole, name) for name in ("bytes", "state", "apply", "fit", "counters")}
    write_json(json_file, totals | {"rows": [asdict(r) for r in whole.rows]})


# ---- contracts ------------------------------------------------------------------------------
@app.command()
def contracts(
    whose: Annotated[str | None, typer.Option(help="Only those of torch, jax, input, step or state.")] = None,
    json_file: Json = None,
) -> None:
    """Run the tests of every contract with the frameworks, and show which test keeps it; exit code 1 if one fails."""
    from conformance.contracts import CONTRACTS, ROOT, run

    groups = sorted({name.partition(":")[0] for name in CONTRACTS})
    if whose is not None:
        known("group of contracts", whose, groups)
    if not (ROOT / "pyproject.toml").exists():
        refuse(f"the tests are not part of the installed package, and {ROOT} is no checkout; run it from one")
    with packages():
        wanted = [name for name in CONTRACTS if whose in (None, name.partition(":")[0])]
        found = run(wanted)
    table = sheet(["contract", "what is demanded", "test", "verdict"])
    for name in wanted:
        own = [(v.test.rpartition("/")[2], v.word) for v in found if v.contract == name] or [("-", "no test")]
        for k, words in enumerate(own):
            table.add_row(*((name, CONTRACTS[name]) if not k else ("", "")), *map(escape, words))
    console().print(table)
    write_json(json_file, [asdict(v) | {"verdict": v.word} for v in found])
    if any(v.failed for v in found) or {v.contract for v in found} != set(wanted):
        raise typer.Exit(1)


# ---- benchmarks ---------------------------------------------------------------------------
# By name: nothing here depends on them, and none is loaded that is not asked for.
BENCHMARKS = {
    "step": "benchmarks.step",
    "compile": "benchmarks.compiling",
    "memory": "benchmarks.memory",
    "scale": "benchmarks.scale",
    "train": "benchmarks.train",
}


class Benchmarks(TyperGroup):
    """The group `psgd bench`: each of its commands is the function `command` of a module."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in BENCHMARKS:
            return None
        with packages():
            module = import_module(BENCHMARKS[cmd_name])
        made = typer.Typer(add_completion=False)
        made.command(cmd_name)(module.command)
        return typer.main.get_command(made)


bench = typer.Typer(cls=Benchmarks, no_args_is_help=True, help="Time optimizers: steps, compilation, memory, scale.")
bench.callback()(lambda: None)
app.add_typer(bench, name="bench")


# ---- the methods --------------------------------------------------------------------------
@app.command()
def methods() -> None:
    """List the registered methods."""
    made = sheet(["name", "torch class", "summary", "source"])
    for name, method in METHODS.items():
        made.add_row(f"[bold]{name}[/]", method.title, *(escape(text) for text in (method.summary, method.source)))
    console().print(made)


def main() -> None:
    """The entry point."""
    app(prog_name="psgd")
