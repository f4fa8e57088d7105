"""How the command speaks: tables to standard output, bars and complaints to standard error, plain data as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from textwrap import fill
from time import monotonic
from typing import Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from conformance.compare import Tick
from conformance.packages import known_as, missing
from psgd.naming import did_you_mean

LONG = 32  # characters from which a cell is a sentence, whose lines may break
NARROW = 16  # characters of a line of a sentence, at least
Part = Callable[[str], AbstractContextManager[Tick]]


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error for progress and complaints; as wide as COLUMNS, a terminal, or else 80."""
    return Console(stderr=stderr, highlight=False)


def visible(text: str) -> str:
    """Text from a file, whose control characters a terminal would obey: they are shown as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def refuse(sentence: str) -> NoReturn:
    """Say why nothing was done, and end with exit code 2."""
    console(stderr=True).print(f"psgd: {escape(visible(sentence))}", soft_wrap=True)
    raise typer.Exit(2)


def known(what: str, name: str, names: Collection[str]) -> str:
    """The name, if it is one of `names`."""
    if name not in names:
        meant = did_you_mean(name, names)
        refuse(f"unknown {what} {name!r}{meant + ' There are' if meant else '; choose of'} {', '.join(names)}")
    return name


@contextmanager
def packages() -> Iterator[None]:
    """A missing package becomes one sentence with the remedy."""
    try:
        yield
    except ImportError as error:
        package = known_as(error.name)
        if package is None:
            raise
        refuse(missing(package))


@contextmanager
def files() -> Iterator[None]:
    """A file that cannot be read or written becomes one sentence."""
    try:
        yield
    except OSError as error:
        refuse(f"{error.filename or 'a file'}: {error.strerror or error}")


@contextmanager
def progress(total: int) -> Iterator[Part]:
    """Progress of work in parts: on a terminal a bar with the time left, and everywhere a line when a part ends.

    Yields what begins a part, given its title; that yields the function that moves on, by one or by so many.
    """
    out, begun, done = console(stderr=True), monotonic(), 0
    bar = Progress(
        *(SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), BarColumn(20)),
        *(TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        console=out,
        disable=not out.is_terminal,
        transient=True,
    )
    task = bar.add_task("", total=total)

    @contextmanager
    def part(title: str) -> Iterator[Tick]:
        start = monotonic()

        def tick(n: int = 1) -> None:
            nonlocal done
            done += n
            bar.advance(task, n)

        bar.update(task, description=escape(title))
        yield tick
        now = monotonic()
        left = f"; about {(now - begun) * (total - done) / done:.0f} s left" if 0 < done < total else ""
        out.print(f"{title}: {now - start:.0f} s{left}", markup=False)

    with bar:
        yield part


def finite(value: Any) -> Any:
    """Plain data for JSON, which has no infinity and no NaN: such numbers become null."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def write_json(path: Path | None, value: Any) -> None:
    """Write to a file, where one is wanted."""
    if not path:
        return
    with files():
        path.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def writable(*paths: Path | None) -> None:
    """Refuse at once, and not after the work, what could not be written at its end."""
    for path in filter(None, paths):
        if not path.absolute().parent.is_dir():
            refuse(f"{path.parent} is not a folder, so {path.name} cannot be written there")
        with files():
            if path.is_dir():
                refuse(f"{path} is a folder and cannot be written to")
            if path.exists():
                if not os.access(path, os.W_OK):
                    refuse(f"{path} may not be written to")
            else:
                path.touch()  # nothing less tells of every name and every file system
                path.unlink()


@contextmanager
def exits() -> Iterator[None]:
    """For programs that typer does not run: a refusal ends them too."""
    try:
        yield
    except typer.Exit as refused:
        raise SystemExit(refused.exit_code) from None


@dataclass
class Sheet:
    """A table without lines but one: columns of words to the left, of numbers to the right; only sentences break.

    spare: columns that are left out where there is no room, these first; a line then says which. Where none is named,
    any but the first and the last, from the right. One of numbers stays where a sentence says why there is none. None
    among the rows sets them apart.
    """

    left: Sequence[str]
    right: Sequence[str] = ()
    spare: Sequence[str] | None = None
    title: str | None = None
    rows: list[tuple[str, ...] | None] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def add_section(self) -> None:
        self.rows.append(None)

    def widest(self, column: int) -> int:
        """Characters of the longest cell of a column."""
        return max((Text.from_markup(row[column]).cell_len for row in self.rows if row is not None), default=0)

    def table(self, without: Collection[str] = ()) -> Table:
        """The table without some columns."""
        grid = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=self.title, title_justify="left")
        heads = [*self.left, *self.right]
        kept = [i for i, head in enumerate(heads) if head not in without]
        for i in kept:
            widest, rigid = self.widest(i), self.widest(i) < LONG
            head = fill(heads[i], max(widest, *map(len, heads[i].split()))) if heads[i] else ""
            grid.add_column(
                head,
                justify="left" if heads[i] in self.left else "right",
                no_wrap=rigid,
                min_width=max(widest, *map(len, head.split("\n"))) if rigid else NARROW,
                overflow="fold",
            )
        for row in self.rows:
            if row is None:
                grid.add_section()
            else:
                grid.add_row(*(row[i] for i in kept))
        return grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sentences = [head for i, head in enumerate(self.right, len(self.left)) if self.widest(i) >= LONG]
        able = [head for head in (*self.left, *self.right) if head not in sentences]
        wanted = able[-2:0:-1] if self.spare is None else self.spare  # rather than cut off what is last
        spare, without = [head for head in wanted if head in able], list[str]()
        endless = options.update_width(10_000)  # in which no column is narrowed
        while spare and Measurement.get(console, endless, self.table(without)).minimum > options.max_width:
            without.append(spare.pop(0))
        yield self.table(without)
        if without:
            yield Text(f"left out to fit {options.max_width} columns: {', '.join(without)}", style="dim")


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table for a document, from its head and its lines."""
    head, *lines = cells
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def verdict(passed: bool) -> str:
    return "[green]pass[/]" if passed else "[bold red]FAIL[/]"


def end(passed: bool) -> None:
    if not passed:
        raise typer.Exit(1)
