"""How the command speaks: tables to standard output, bars and complaints to standard error, plain data as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from conformance.compare import Tick

PLAIN_WIDTH = 160  # of tables that go to a file or a pipe, where nothing should be cut off
EXTRAS = {  # top-level package: the extra that brings it
    "torch": "torch",
    "jax": "jax",
    "jaxlib": "jax",
    "optax": "jax",
    "sklearn": "cli",
    "matplotlib": "report",
    "array_api_strict": "test",
}


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error for progress and complaints."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)


def refuse(sentence: str) -> NoReturn:
    """Say why nothing was done, and end with exit code 2."""
    console(stderr=True).print(f"psgd: {escape(sentence)}", soft_wrap=True)
    raise typer.Exit(2)


def known(what: str, name: str, names: Collection[str]) -> str:
    """The name, if it is one of `names`."""
    if name not in names:
        refuse(f"unknown {what} {name!r}; choose of {', '.join(names)}")
    return name


@contextmanager
def packages() -> Iterator[None]:
    """A missing package becomes one sentence that names the extra which brings it."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        refuse(f"{package} is not installed; pip install 'psgd[{EXTRAS[package]}]'")


@contextmanager
def files() -> Iterator[None]:
    """A file that cannot be read or written becomes one sentence."""
    try:
        yield
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}")


@contextmanager
def progress(title: str, total: int) -> Iterator[Tick]:
    """A bar on a terminal, and one line where there is none. Yields the function that moves it on by one."""
    out = console(stderr=True)
    if not out.is_terminal:
        out.print(f"{title} ...", markup=False)
        yield lambda: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(SpinnerColumn(finished_text=" "), *columns, console=out) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


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
    for path in paths:
        if path and not path.absolute().parent.is_dir():
            refuse(f"{path.parent} is not a folder, so {path.name} cannot be written there")


def sheet(left: Collection[str], right: Collection[str] = ()) -> Table:
    """A table without lines but one: columns of words to the left, of numbers to the right."""
    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for head in left:
        made.add_column(head, overflow="fold")
    for head in right:
        made.add_column(head, justify="right", overflow="fold")
    return made


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table for a document, from its head and its lines."""
    head, *lines = cells
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def verdict(passed: bool) -> str:
    return "[green]pass[/]" if passed else "[bold red]FAIL[/]"


def end(passed: bool) -> None:
    if not passed:
        raise typer.Exit(1)
