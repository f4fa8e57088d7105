"""What optimizers keep, and what a step needs beside it, for ours and for the others.

    psgd bench memory --set gpt-4x256 --markdown

State is every tensor that is reachable from the optimizer's state after two steps, its memory counted once. The most
that a step holds at a time is, in torch, by the profiler's record of every allocation, and in JAX what the compiler
says that it allocates beside arguments and results; it is shown beside the largest stack: the bytes of all parameters
of one shape, which are stepped together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from rich.console import Console

from benchmarks.peers import PEERS, SCALE, Entrant
from benchmarks.racing import Field, field_of, versioned
from benchmarks.sets import SETS, ParameterSet, alike
from benchmarks.tables import (
    Cells,
    JsonFile,
    Markdown,
    Methods,
    Quick,
    Sets,
    chosen,
    frameworks,
    machine,
    methods,
    tell,
)
from conformance.terminal import writable
from psgd.summary import in_bytes

ITEM = 4  # bytes of a number in float32


def largest_stack(parameters: ParameterSet) -> int:
    """Bytes of the parameters of one shape, of which there are most."""
    return max(ITEM * count * prod(shape) for shape, count in alike(parameters.shapes).items())


def row(field: Field, framework: str, method: str, entrant: Entrant) -> dict[str, Any]:
    """State and peak of one optimizer, in a process of its own."""
    field.enter(entrant, entrant, entrant.spec(framework, compiled=False, dtype="float32", probability=1.0), laps=2)
    state, peak = (field.ask(entrant, what) for what in ("bytes", "peak"))
    why = field.failures.get(entrant)
    field.clear()
    size = ITEM * field.parameters.numbers
    return {
        "set": field.parameters.name,
        "framework": framework,
        "method": method,
        "state_bytes": state,
        "state_ratio": None if state is None else state / size,
        "peak_bytes": peak,
        "peak_ratio": None if peak is None else peak / largest_stack(field.parameters),
        "why": why,
    }


def measure(sets: Sequence[ParameterSet], methods: Sequence[str], console: Console) -> dict[str, Any]:
    """All figures, as plain data."""
    rows = []
    for parameters in sets:
        with field_of(parameters) as field:
            for framework, scale in SCALE.items():
                entrants = [(m, x) for m in methods for x in PEERS.get((framework, m), ())]
                entrants += [("", x) for x in scale]
                names = versioned([x for _, x in entrants])
                for method, entrant in entrants:
                    console.log(f"{parameters.name}, {framework}: {names[entrant]}")
                    rows.append({"who": names[entrant], **row(field, framework, method, entrant)})
    return {"machine": machine(), "rows": rows}


def cells(result: Mapping[str, Any]) -> Cells:
    """A row for each optimizer."""

    def figures(r: Mapping[str, Any]) -> Sequence[str]:
        if r["why"]:
            return "does not run", r["why"].replace("|", "/"), "", ""
        return (
            in_bytes(r["state_bytes"]),
            f"{r['state_ratio']:.2f}",
            in_bytes(r["peak_bytes"]),
            f"{r['peak_ratio']:.1f}",
        )

    head = ["set", "framework", "method", "who", "state", "of the parameters", "peak of a step", "of the largest stack"]
    return [head, *([*(r[k] for k in head[:4]), *figures(r)] for r in result["rows"])]


def command(
    set_: Sets = None,
    method: Methods = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
    quick: Quick = False,
) -> None:
    """Measure what optimizers keep, and the most that a step holds beside it."""
    writable(json_file)
    frameworks(None)
    result = measure(chosen(set_, SETS, quick=quick), methods(method), Console(stderr=True))
    tell(result, {"Memory": cells(result)}, json_file, as_markdown=markdown)
