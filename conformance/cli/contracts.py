"""`psgd contracts`: which test keeps which contract with a framework."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from conformance.cli.options import Json, from_checkout
from conformance.terminal import Sheet, console, end, known, packages, writable, write_json


def contracts(
    whose: Annotated[str | None, typer.Option(help="Only those of torch, jax, input, step or state.")] = None,
    json_file: Json = None,
) -> None:
    """Run the tests of every contract with the frameworks, and show which test keeps it; exit code 1 if one fails."""
    maintained = from_checkout("conformance.internal.contracts", "contracts", "the tests are")
    groups = sorted({name.partition(":")[0] for name in maintained.CONTRACTS})
    if whose is not None:
        known("group of contracts", whose, groups)
    writable(json_file)
    with packages():
        wanted = [name for name in maintained.CONTRACTS if whose in (None, name.partition(":")[0])]
        verdicts = maintained.run(wanted)
    table = Sheet(["contract", "what is demanded", "test", "verdict"], spare=())
    for name in wanted:
        tests = [(v.test.rpartition("/")[2], v.word) for v in verdicts if v.contract == name] or [("-", "no test")]
        for k, words in enumerate(tests):
            table.add_row(*((name, maintained.CONTRACTS[name]) if not k else ("", "")), *map(escape, words))
    console().print(table)
    write_json(json_file, [asdict(v) | {"verdict": v.word} for v in verdicts])
    end(not any(v.failed for v in verdicts) and {v.contract for v in verdicts} == set(wanted))
