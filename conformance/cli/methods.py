"""`psgd methods`: the registry as a table."""

from __future__ import annotations

from rich.markup import escape

from conformance.terminal import Sheet, console
from psgd.methods import METHODS


def methods() -> None:
    """List the registered methods."""
    table = Sheet(["name", "torch class", "summary", "source"], spare=["source", "torch class"])
    for name, method in METHODS.items():
        table.add_row(f"[bold]{name}[/]", method.title, *(escape(text) for text in (method.summary, method.source)))
    console().print(table)
