"""Every method on meshes of eight devices: the trajectory is that of one device, and what is exchanged is counted.

    python -m conformance.internal.mesh [--json FILE] [--markdown] [--only runs|bytes|compiling ...]
                               [--method NAME ...]
                               [--mesh 8|4x2|2x2x2 ...] [--mode auto|explicit ...] [--layout rows|columns|both ...]
                               [--steps N]

Runs are of a small convex problem in float64 on eight devices that one processor plays. A row fails where a parameter
or any of the state is further than 1e-12 from one device, relative to its norm; where an update or any of the state
does not lie after a step as before it; where the step was traced or compiled twice; or where the compiled step gathers
a factor that it could do without. Bytes are of the state on one device of eight, and compiling is of the update on a
mesh. The exit code is 1 where a row fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from conformance.internal.mesh_measures import (
    DEEP,
    FORMS,
    SHALLOW,
    BytesResult,
    CompileResult,
    MeshResult,
    RunResult,
    bytes_result,
    compile_result,
    run_result,
)
from conformance.internal.mesh_runs import LAYOUTS, MESHES, MODES, SMALL, devices, runner
from conformance.packages import release
from conformance.terminal import Sheet, console, exits, markdown, writable, write_json
from psgd.methods import METHODS

# ---- telling ----------------------------------------------------------------------------------
Cells = list[list[str]]
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def judged(row: MeshResult) -> str:
    """The last cell of a row."""
    return " ".join(["FAIL:", "; ".join(row.complaints)]) if row.complaints else "pass"


def run_cells(rows: Sequence[RunResult]) -> Cells:
    """A line for each run."""
    head = [
        "method",
        "mesh",
        "axes",
        "layout",
        "steps",
        "parameters",
        "state",
        "exchanges",
        "factors gathered",
        "verdict",
    ]
    return [head] + [
        [
            *(r.method, r.mesh, r.mode, r.layout, str(r.steps), f"{r.params:.1e}", f"{r.state:.1e}"),
            *(", ".join(f"{n} {k}" for k, n in counts.items()) for counts in (r.exchanges, r.gathers)),
            judged(r),
        ]
        for r in rows
    ]


def distances(rows: Sequence[RunResult]) -> Cells:
    """The largest differences on each mesh, of parameters and of state."""
    cells = [["method", *(f"{mesh}: {what}" for mesh in MESHES for what in ("parameters", "state")), "runs", "verdict"]]
    for name in dict.fromkeys(r.method for r in rows):
        of_method, line = [r for r in rows if r.method == name], [name]
        for mesh in MESHES:
            on_mesh = [r for r in of_method if r.mesh == mesh]
            for far in ([r.params for r in on_mesh], [r.state for r in on_mesh]):
                line.append(f"{max(far):.1e}" if far else "")
        failed = [r for r in of_method if r.complaints]
        cells.append([*line, str(len(of_method)), f"{len(failed)} FAIL" if failed else "pass"])
    return cells


def counts(rows: Sequence[RunResult]) -> Cells:
    """How many exchanges there are in a compiled step: from the fewest of any method to the most."""
    cells = [["mesh", "axes", "layout", *KINDS[:-1]]]
    for key in dict.fromkeys((r.mesh, r.mode, r.layout) for r in rows):
        exchanged = [r.exchanges for r in rows if (r.mesh, r.mode, r.layout) == key]
        found = [[counted.get(kind, 0) for counted in exchanged] for kind in KINDS[:-1]]
        cells.append([*key, *(f"{min(n)} to {max(n)}" if min(n) < max(n) else str(n[0]) for n in found)])
    return cells


def bytes_cells(rows: Sequence[BytesResult]) -> Cells:
    """A line for each state."""
    head = ["method", "layers", "one device", "each of eight", "share", "verdict"]
    return [head] + [
        [r.method, r.form, f"{r.alone:,}", f"{r.spread:,}", f"{r.spread / r.alone:.3f}", judged(r)] for r in rows
    ]


def compile_cells(rows: Sequence[CompileResult]) -> Cells:
    """A line for each pair of compilations."""
    head = ["method", "layers", f"{SHALLOW} layers", f"{DEEP} layers", "ratio", "verdict"]
    return [head] + [
        [r.method, r.form, f"{r.shallow:.1f} s", f"{r.deep:.1f} s", f"{r.deep / r.shallow:.2f}", judged(r)]
        for r in rows
    ]


# ---- the command ------------------------------------------------------------------------------
def square(name: str) -> bool:
    """Has a method a matrix of all numbers by all numbers?"""
    return runner(name).shapes is SMALL


def combinations(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Meshes, modes and layouts; both is rows where there is one axis."""
    for mode in options.mode or MODES:
        for mesh in options.mesh or MESHES:
            for layout in options.layout or LAYOUTS:
                if layout != LAYOUTS[-1] or len(MESHES[mesh]) > 1:
                    yield mesh, mode, layout


def runs(options: argparse.Namespace, names: Sequence[str]) -> Iterator[MeshResult]:
    """Runs of methods."""
    # What is looked at are numbers and exchanges, not how fast the machine code is.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        for combination in combinations(options):
            for name in names:
                yield run_result(name, *combination, options.steps)


def sizes(options: argparse.Namespace, names: Sequence[str]) -> Iterator[MeshResult]:
    """Bytes of states."""
    jax.config.update("jax_disable_most_optimizations", True)
    for name in names:
        if not square(name):
            yield from (bytes_result(name, form) for form in FORMS)


def compilations(options: argparse.Namespace, names: Sequence[str]) -> Iterator[MeshResult]:
    """Times of compiling."""
    jax.config.update("jax_disable_most_optimizations", False)
    for name in names:
        if not METHODS[name]().recipe().joint:
            yield from (compile_result(name, form) for form in FORMS)


class Part(NamedTuple):
    """One of the things that can be looked at: its rows, and its tables for a terminal and for a document."""

    rows: Callable[[argparse.Namespace, Sequence[str]], Iterator[MeshResult]]
    tables: Sequence[Callable[[Any], Cells]]
    documents: Sequence[Callable[[Any], Cells]]


PARTS = {
    "runs": Part(runs, [run_cells], [distances, counts]),
    "bytes": Part(sizes, [bytes_cells], [bytes_cells]),
    "compiling": Part(compilations, [compile_cells], [compile_cells]),
}


def show(cells: Cells) -> None:
    """A table on the terminal."""
    head, *lines = cells
    sheet = Sheet(head)
    for line in lines:
        sheet.add_row(*line)
    console().print(sheet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, report, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.internal.mesh", description="Are meshes as one device?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here too, as it comes")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/sharding.md has them")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of each run")
    for flag, choices in (("only", PARTS), ("method", METHODS), ("mesh", MESHES), ("mode", MODES), ("layout", LAYOUTS)):
        parser.add_argument(f"--{flag}", action="append", choices=list(choices), help="this one alone; may be repeated")
    options = parser.parse_args(arguments)
    with exits():
        writable(options.json)
    devices()
    progress, found = console(stderr=True), dict[str, list[MeshResult]]()
    versions = {name: release(name) for name in ("jax", "jaxlib", "numpy")}
    for part in options.only or PARTS:
        rows = found.setdefault(part, [])
        for row in PARTS[part].rows(options, options.method or list(METHODS)):
            rows.append(row)
            fields_of = asdict(row)
            labels = [fields_of[key] for key in ("method", "mesh", "mode", "layout", "form") if key in fields_of]
            progress.print(
                f"{' '.join(labels)}: {judged(row)}, {row.seconds:.0f} s",
                markup=False,
                soft_wrap=True,
            )
            write_json(options.json, {"versions": versions} | {k: [asdict(r) for r in v] for k, v in found.items()})
    for part, rows in found.items():
        for cells in PARTS[part].documents if options.markdown else PARTS[part].tables:
            if options.markdown:
                console().print(markdown(cells(rows)), "", sep="\n", markup=False, soft_wrap=True)
            else:
                show(cells(rows))
    if any(row.complaints for rows in found.values() for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
