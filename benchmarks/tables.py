"""How benchmarks speak: the machine they ran on, tables for a terminal and for a document, all figures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks.peers import PEERS, USUAL
from benchmarks.sets import ParameterSet
from conformance.packages import PACKAGES, is_there, missing, release
from conformance.terminal import Sheet, console, exits, known, markdown, refuse, writable, write_json

Cells = list[Sequence[str]]  # a head, then rows
# Columns to the left.
WORDS = ("optimizer", "set", "method", "framework", "variant", "mode", "fits", "beside", "who", "dtype")
# Columns that a terminal's tables do without where there is no room, these first.
SPARE = (
    *("quartiles", "the other", "ours", "rates tried", "x + 1", "of the largest stack", "of the parameters"),
    *("seconds to AdamW's", "launched", "operations", "dtype", "mode", "framework", "ours / products", "set"),
)

Sets = Annotated[
    list[str] | None, typer.Option("--set", help="A set of parameters; may be repeated.  [default: gpt-4x256]")
]
JsonFile = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write all figures here as JSON.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print tables as docs/benchmarks.md has them.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes and few rounds: does it run?")]
FRAMEWORKS = ("torch", "jax")
Framework = Annotated[str | None, typer.Option(help="torch or jax.  [default: both]")]
Methods = Annotated[list[str] | None, typer.Option("--method", help=f"May be repeated.  [default: {', '.join(USUAL)}]")]


def chosen(
    names: Sequence[str] | None, sets: Mapping[str, ParameterSet], *, rounds: int | None = None, quick: bool = False
) -> list[ParameterSet]:
    """The sets of parameters that a command is asked for."""
    found = [sets[known("set", name, sets)] for name in dict.fromkeys(names or [next(iter(sets))])]
    found = [x.tiny() for x in found] if quick else found
    return [replace(x, rounds=rounds) for x in found] if rounds else found


def frameworks(name: str | None) -> Sequence[str]:
    """The frameworks that a command is asked for, of which it needs both where it is not asked."""
    wanted = [known("framework", name, FRAMEWORKS)] if name else FRAMEWORKS
    for framework in wanted:
        if not is_there(framework):
            refuse(missing(PACKAGES[framework]))
    return wanted


def methods(names: Sequence[str] | None) -> list[str]:
    """The methods that a command is asked for, of those that others have too."""
    able = list(dict.fromkeys(name for _, name in PEERS))
    return [known("method", name, able) for name in names or USUAL]


def tell(
    result: dict[str, Any], titled: Mapping[str, Cells], path: Path | None, *, as_markdown: bool, last: str = ""
) -> None:
    """What a command found: the machine, tables, a last line; and all figures to a file, where one is wanted."""
    out = console()
    show(result, titled, out, as_markdown=as_markdown)
    if last:
        out.print(last, markup=False, soft_wrap=True)
    write_json(path, result)


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures were taken on, and how busy it was. A framework that is not loaded here runs in workers."""
    torch = sys.modules.get("torch")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch_threads": torch.get_num_threads() if torch else 1,
        "python": platform.python_version(),
        **{name: release(name) for name in FRAMEWORKS},
    }


def sheet(title: str, cells: Cells) -> Sheet:
    """For a terminal; methods are set apart."""
    head, *rows = cells
    words = 1 + max((i for i, column in enumerate(head) if column in WORDS), default=0)
    sheet = Sheet(head[:words], head[words:], spare=SPARE, title=title)
    for i, cell in enumerate(rows):
        if i and rows[i - 1][0] != cell[0]:
            sheet.add_section()
        sheet.add_row(*map(escape, cell))
    return sheet


def markdown_table(title: str, cells: Cells) -> str:
    """For a document."""
    return f"{title}:\n\n{markdown(cells)}\n"


def show(result: Mapping[str, Any], titled: Mapping[str, Cells], console: Console, *, as_markdown: bool) -> None:
    """The machine and the tables."""
    console.print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), highlight=False)
    for title, cells in titled.items():
        tell_table(title, cells, console, as_markdown=as_markdown)


def tell_table(title: str, cells: Cells, console: Console, *, as_markdown: bool) -> None:
    """One table."""
    if as_markdown:
        print("\n" + markdown_table(title, cells))
    else:
        console.print(sheet(title, cells))


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
    options = parser.parse_args(arguments)
    with exits():
        writable(options.json)
    result = measured(Console(stderr=True), quick=options.quick)
    title, cells = titled(result)
    tell_table(title, cells, Console(width=width), as_markdown=options.markdown)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


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
    options = parser.parse_args(arguments)
    with exits():
        writable(options.json, options.picture)
    console = Console(width=None if sys.stdout.isatty() else width)
    result = measured(Console(stderr=True), quick=options.quick)
    show(result, tables(result), console, as_markdown=options.markdown)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        picture(result, options.picture)
