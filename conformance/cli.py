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
from functools import wraps
from importlib import import_module
from itertools import chain
from math import inf
from pathlib import Path
from typing import Annotated, Any, NoReturn

from conformance.packages import known_as, missing, releases

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from typer.core import TyperGroup

    from conformance.terminal import (
        Part,
        Sheet,
        console,
        end,
        files,
        known,
        packages,
        progress,
        refuse,
        verdict,
        visible,
        writable,
        write_json,
    )
except ImportError as error:
    package = known_as(error.name)
    if package is None:
        raise
    raise SystemExit(f"psgd: {missing(package)}") from None

import numpy as np

from conformance import demo as demonstration
from conformance import report as pages
from conformance.compare import Comparison, Tick, work
from conformance.compare import compare as compared
from conformance.drivers import DRIVERS
from conformance.frameworks import FRAMEWORKS, Framework, compiled_once, one_thread
from conformance.internal import golden as recorded
from conformance.problems import PROBLEMS
from conformance.tolerances import LOCKED
from psgd.cost import BYTES
from psgd.hyperparameters import Method
from psgd.methods import METHODS
from psgd.naming import shown
from psgd.summary import Parameter, counters, rows, summary

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

DEMO_PACKAGES = ("torch", "jax", "optax", "sklearn", "matplotlib")
INTERRUPTED = 130  # exit code of what Ctrl-C ended

Steps = Annotated[int, typer.Option(min=1, help="How many steps to train.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the start and of the batches.")]
Json = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the result to this file as JSON.")]
Given = Annotated[list[str] | None, typer.Option("--set", help="A hyperparameter as NAME=VALUE; may be repeated.")]


def tell_version(wanted: bool) -> None:
    """The releases of ours and of every package."""
    if wanted:
        console().print("\n".join(" ".join(item) for item in releases().items()), markup=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="Show all versions and exit.")
    ] = False,
) -> None:
    """PSGD optimizers that are the same in PyTorch and in JAX: compare them, plan with them, time them."""


# ---- comparing ----------------------------------------------------------------------------
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
            package = known_as(error.name)
            why = package.distribution if package else error.name
            console(stderr=True).print(f"left out {name}: {why} is not installed", markup=False, soft_wrap=True)
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


def pairs_table(comparison: Comparison) -> Sheet:
    """One row for each pair; what is not judged is dim."""
    kinds = list(comparison.pairs[0].curves)
    made = Sheet(["pair"], [*kinds, "bound", "first step over", "verdict"])
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
    out.print(f"[bold]{method}[/] on {problem}, {steps} steps, {dtype}, seed {seed}, {pages.MODES[comparison.mode]}")
    out.print("largest relative difference of", pairs_table(comparison))
    out.print(f"Bound: {comparison.bound.reason}.", markup=False, style="dim")
    tell_failures(out, comparison)
    end(comparison.passed)


# ---- the demonstration ----------------------------------------------------------------------
def demo_table(comparisons: Sequence[Comparison]) -> Sheet:
    """One row for each method: how it ended, how far apart, both verdicts."""
    made = Sheet(
        ["method", "problem"],
        ["last loss", "accuracy", "runs differ by", "allowed", "verdict", "step-locked"],
        spare=["allowed", "accuracy", "problem"],
    )
    for free, locked in pages.grouped(comparisons).values():
        made.add_row(
            free.method,
            free.problem,
            pages.among({d: x[-1] for d, x in free.losses.items()}, lambda x: f"{x:.4f}"),
            pages.among(free.accuracy(), pages.percent),
            pages.differs(free),
            pages.allows(free),
            verdict(free.passed),
            verdict(locked.passed),
        )
    return made


def demo_methods(given: Sequence[str], *, every: bool) -> list[str]:
    """The methods that are asked for."""
    if every and given:
        refuse("--all takes every method; give --method or --all, not both")
    if every:
        return list(METHODS)
    return [known("method", name, METHODS) for name in dict.fromkeys(given)] or demonstration.one_of_each_kind()


@app.command()
def demo(
    report: Annotated[Path, typer.Option(dir_okay=False, help="Where to write the report.")] = Path("report.html"),
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be repeated.  [default: one of each kind]")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method, which takes four times as long.")] = False,
    steps: Steps = 100,
    seed: Seed = 0,
    picture: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write loss and difference as a PNG.")
    ] = None,
) -> None:
    """Train a few methods in PyTorch and in JAX, compare, and write a report; about a minute.

    Methods with a factor for each axis train a perceptron on digits; whole-model and Newton methods have smaller
    problems. The report is written anew after each method, so that Ctrl-C leaves one of what is done.
    Exit code 1 if a run leaves its bound, 130 if it was ended early.
    """
    names = demo_methods(method or [], every=every)
    writable(report, picture)
    made = pages.Report()
    with packages():
        for package in DEMO_PACKAGES:
            import_module(package)
        try:
            with compiled_once(), one_thread():
                run_demo(made, names, steps, seed, report, picture)
        except KeyboardInterrupt:
            end_early(made, names, report)
    tell_demo(made, report)
    end(all(c.passed for c in made.comparisons))


def run_demo(
    made: pages.Report, names: Sequence[str], steps: int, seed: int, report: Path, picture: Path | None
) -> None:
    """Run method after method, and write what there is after each."""
    runs = list(demonstration.planned(names, steps))
    with progress(sum(run.work for run in chain(*runs))) as part:
        for i, pair in enumerate(runs):
            made.add([demo_run(run, seed, part) for run in pair])
            with files():
                made.write(report, names[i + 1 :])
                if picture:
                    pages.picture(made.comparisons, picture)


def demo_run(run: demonstration.Run, seed: int, part: Part) -> Comparison:
    """One comparison, which is a part of the progress."""
    with part(f"{run.method} on {run.problem}, {pages.MODES['locked' if run.locked else 'free']}") as tick:
        return compared(
            run.method,
            run.problem,
            steps=run.steps,
            dtype=demonstration.DTYPE,
            seed=seed,
            locked=run.locked,
            drivers=demonstration.DRIVERS,
            tick=tick,
            settings=run.settings,
        )


def end_early(made: pages.Report, names: Sequence[str], report: Path) -> NoReturn:
    """Tell what is done of what was to be."""
    done = list(pages.grouped(made.comparisons))
    if done:
        with files():
            made.write(report, [name for name in names if name not in done])
        tell_demo(made, report)
    what = "the report is partial" if done else "nothing is written"
    ended = f"psgd: ended early: {len(done)} of {len(names)} methods are done, and {what}"
    console(stderr=True).print(ended, soft_wrap=True)
    raise typer.Exit(INTERRUPTED)


def tell_demo(made: pages.Report, report: Path) -> None:
    """The table, what failed and where, and the place of the report."""
    out = console()
    out.print(demo_table(made.comparisons))
    out.print(f"{pages.agreement(made.comparisons)}.", markup=False)
    for c in made.comparisons:
        tell_failures(out, c, f"{c.method}, {pages.MODES[c.mode]}: ")
    out.print(f"Report: {report.absolute()}", markup=False, soft_wrap=True)


# ---- recorded runs ------------------------------------------------------------------------
def replayed(case: recorded.Case, folder: Path, framework: Framework, tick: Tick) -> recorded.Result:
    """A case's result; an exception is a failure, whose message stands for where it failed."""
    try:
        return recorded.replay(case, folder, framework)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return recorded.Result(case["file"].removesuffix(".npz"), case["family"], inf, case["rtol"], message)
    finally:
        tick(1)


Results = dict[str, list[recorded.Result]]


def replay_all(cases: Sequence[recorded.Case], folder: Path, drivers: Sequence[str]) -> Results:
    """Results of every driver, in the order of the cases."""
    frameworks = {name: loaded(FRAMEWORKS[name]) for name in drivers}
    results: Results = {}
    with progress(len(cases) * len(frameworks)) as part:
        for name, framework in frameworks.items():
            with part(f"{len(cases)} cases in {name}") as tick:
                results[name] = [replayed(case, folder, framework, tick) for case in cases]
    return results


def read_cases(folder: Path, families: Sequence[str]) -> list[recorded.Case]:
    """The cases of a folder, of some families or of all, family after family."""
    try:
        with files():
            cases = recorded.cases(folder)
    except ValueError as error:
        refuse(str(error))
    held = dict.fromkeys(case["family"] for case in cases)
    for name in families:
        known("family", name, held)
    order = list(held)
    wanted = [case for case in cases if not families or case["family"] in families]
    return sorted(wanted, key=lambda case: order.index(case["family"]))


def golden_table(results: Results) -> Sheet:
    """One row for each case, one column for each driver; families are set apart."""
    made = Sheet(["case"], ["rtol", *results], spare=["rtol"])
    family = None
    for line in zip(*results.values(), strict=True):
        if line[0].family != family:
            family = line[0].family
            made.add_section()
            made.add_row(f"[bold]{escape(visible(family))}[/]", *[""] * (1 + len(results)))
        errors = [f"[green]{r.error:.1e}[/]" if r.passed else f"[bold red]{r.error:.1e} ✗[/]" for r in line]
        made.add_row(f"  {escape(visible(line[0].case))}", f"{line[0].rtol:.0e}", *errors)
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
                out.print(visible(text), markup=False, style="red", soft_wrap=True)
    for name, lines in results.items():
        passed = sum(r.passed for r in lines)
        out.print(f"{name}: {passed} passed, {len(lines) - passed} failed", markup=False)
    for what, names in waiting.items():
        if names:
            out.print(visible(f"not yet supported {what}: {counted(names)}"), markup=False, soft_wrap=True)


# ---- planning -------------------------------------------------------------------------------
# Bytes of an adapter's counter of steps, whether it keeps one for each parameter, and bytes of its count of skips.
COUNTERS = {"torch": (8, True, 0), "jax": (4, False, 8)}
LONGEST = 2**40  # numbers along an axis
DTYPES = [name for name in BYTES if name.startswith(("float", "bfloat", "complex"))]


def read_shapes(path: Path) -> dict[str, dict[str, Any]]:
    """Parameters from a JSON file: name to shape, or name to an object with "shape", "dtype" and "scanned"."""
    try:
        given = json.loads(path.read_text())
        read = {name: x if isinstance(x, dict) else {"shape": x} for name, x in given.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        refuse(f"{path} is not a JSON object of shapes ({error}); write {{'weight': [768, 3072], ...}}")
    read = {visible(name): x for name, x in read.items()}
    for name, x in read.items():
        whole = isinstance(x.get("shape"), list) and all(type(n) is int and 0 <= n <= LONGEST for n in x["shape"])
        typed = isinstance(x.get("dtype", ""), str) and isinstance(x.get("scanned", False), bool)
        if not (whole and typed) or x.keys() - {"shape", "dtype", "scanned"} or (x.get("scanned") and not x["shape"]):
            refuse(f"{path}: {name} is {shown(x)}; give a list of whole numbers, and of a stack of layers an axis")
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
    out = console()
    out.print(whole.text(out.width), markup=False, highlight=False, soft_wrap=True)
    totals = {name: getattr(whole, name) for name in ("bytes", "state", "apply", "fit", "counters")}
    write_json(json_file, totals | {"rows": [asdict(r) for r in whole.rows]})


# ---- contracts ------------------------------------------------------------------------------
@app.command()
def contracts(
    whose: Annotated[str | None, typer.Option(help="Only those of torch, jax, input, step or state.")] = None,
    json_file: Json = None,
) -> None:
    """Run the tests of every contract with the frameworks, and show which test keeps it; exit code 1 if one fails."""
    from conformance.internal.contracts import CONTRACTS, ROOT, run

    groups = sorted({name.partition(":")[0] for name in CONTRACTS})
    if whose is not None:
        known("group of contracts", whose, groups)
    writable(json_file)
    if not (ROOT / "pyproject.toml").exists():
        refuse(f"the tests are not part of the installed package, and {ROOT} is no checkout; run it from one")
    with packages():
        wanted = [name for name in CONTRACTS if whose in (None, name.partition(":")[0])]
        found = run(wanted)
    table = Sheet(["contract", "what is demanded", "test", "verdict"], spare=())
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
    "step": "benchmarks.cost.step",
    "compile": "benchmarks.cost.compiling",
    "memory": "benchmarks.cost.memory",
    "scale": "benchmarks.cost.scale",
    "train": "benchmarks.training.train",
}


class Benchmarks(TyperGroup):
    """The group `psgd bench`: each of its commands is the function `command` of a module."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        known("benchmark", cmd_name, BENCHMARKS)
        with packages():
            function = import_module(BENCHMARKS[cmd_name]).command

        @wraps(function)
        def command(**arguments: Any) -> None:
            with packages():
                function(**arguments)

        made = typer.Typer(add_completion=False)
        made.command(cmd_name)(command)
        return typer.main.get_command(made)


bench = typer.Typer(cls=Benchmarks, no_args_is_help=True, help="Time optimizers: steps, compilation, memory, scale.")
bench.callback()(lambda: None)
app.add_typer(bench, name="bench")


# ---- the methods --------------------------------------------------------------------------
@app.command()
def methods() -> None:
    """List the registered methods."""
    made = Sheet(["name", "torch class", "summary", "source"], spare=["source", "torch class"])
    for name, method in METHODS.items():
        made.add_row(f"[bold]{name}[/]", method.title, *(escape(text) for text in (method.summary, method.source)))
    console().print(made)


def main() -> None:
    """The entry point."""
    app(prog_name="psgd")
