"""`psgd demo`: a few methods in PyTorch and in JAX, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from conformance import demo as demonstration
from conformance import report as pages
from conformance.cli.compare import show_failures
from conformance.cli.options import Seed, Steps
from conformance.compare import Comparison
from conformance.compare import compare as compared
from conformance.frameworks import compiled_once, one_thread
from conformance.html import percent
from conformance.terminal import Part, Sheet, console, end, files, known, packages, progress, refuse, verdict, writable
from psgd.methods import METHODS

DEMO_PACKAGES = ("torch", "jax", "optax", "sklearn", "matplotlib")
INTERRUPTED = 130  # exit code of what Ctrl-C ended


def demo_table(comparisons: Sequence[Comparison]) -> Sheet:
    """One row for each method: how it ended, how far apart, both verdicts."""
    table = Sheet(
        ["method", "problem"],
        ["last loss", "accuracy", "runs differ by", "allowed", "verdict", "step-locked"],
        spare=["allowed", "accuracy", "problem"],
    )
    for free, locked in pages.grouped(comparisons).values():
        table.add_row(
            free.method,
            free.problem,
            pages.among({d: x[-1] for d, x in free.losses.items()}, lambda x: f"{x:.4f}"),
            pages.among(free.accuracy(), percent),
            pages.differs(free),
            pages.allows(free),
            verdict(free.passed),
            verdict(locked.passed),
        )
    return table


def demo_methods(names: Sequence[str], *, every: bool) -> list[str]:
    """The methods that are asked for."""
    if every and names:
        refuse("--all takes every method; give --method or --all, not both")
    if every:
        return list(METHODS)
    return [known("method", name, METHODS) for name in dict.fromkeys(names)] or demonstration.one_of_each_kind()


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
    page = pages.Report()
    with packages():
        for package in DEMO_PACKAGES:
            import_module(package)
        try:
            with compiled_once(), one_thread():
                run_demo(page, names, steps, seed, report, picture)
        except KeyboardInterrupt:
            end_early(page, names, report)
    show_demo(page, report)
    end(all(c.passed for c in page.comparisons))


def run_demo(
    page: pages.Report, names: Sequence[str], steps: int, seed: int, report: Path, picture: Path | None
) -> None:
    """Run method after method, and write what there is after each."""
    runs = list(demonstration.planned(names, steps))
    with progress(sum(run.work for run in chain(*runs))) as part:
        for i, pair in enumerate(runs):
            page.add([demo_run(run, seed, part) for run in pair])
            with files():
                page.write(report, names[i + 1 :])
                if picture:
                    pages.picture(page.comparisons, picture)


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


def end_early(page: pages.Report, names: Sequence[str], report: Path) -> NoReturn:
    """Report what is done of what was to be."""
    done = list(pages.grouped(page.comparisons))
    if done:
        with files():
            page.write(report, [name for name in names if name not in done])
        show_demo(page, report)
    what = "the report is partial" if done else "nothing is written"
    ended = f"psgd: ended early: {len(done)} of {len(names)} methods are done, and {what}"
    console(stderr=True).print(ended, soft_wrap=True)
    raise typer.Exit(INTERRUPTED)


def show_demo(page: pages.Report, report: Path) -> None:
    """The table, what failed and where, and the place of the report."""
    out = console()
    out.print(demo_table(page.comparisons))
    out.print(f"{pages.agreement(page.comparisons)}.", markup=False)
    for c in page.comparisons:
        show_failures(out, c, f"{c.method}, {pages.MODES[c.mode]}: ")
    out.print(f"Report: {report.absolute()}", markup=False, soft_wrap=True)
