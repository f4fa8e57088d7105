"""What the first compiled step costs, of ours and of those others that compile by themselves.

    psgd bench compile --set gpt-4x256 --markdown

Each is the first thing that a new process compiles, with an empty cache ("cold") and once more in a further process
that finds the files of the first ("cached"); "x + 1" is what the framework's compiler takes there for almost nothing.
torch compiles at the first step, JAX ahead of it (`jit(...).lower(...).compile()`, without a cache on disk). Later
steps, at other learning rates, then show whether anything is compiled again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from benchmarks.peers import PEERS, Entrant
from benchmarks.racing import Field, Worker, field_of, versioned
from benchmarks.sets import SETS, ParameterSet
from benchmarks.tables import (
    Cells,
    Framework,
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

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def trivial(framework: str) -> float:
    """Seconds to compile x + 1 in a new process with an empty cache."""
    with TemporaryDirectory() as cache:
        worker = Worker(Entrant(":").python, environment={CACHE: cache})
        try:
            return worker.ask("trivial", framework=framework)
        finally:
            worker.close()


def once(field: Field, framework: str, entrant: Entrant, cache: str) -> dict[str, Any] | str:
    """Seconds of the first steps in a new process; or why there are none."""
    spec = entrant.spec(framework, compiled=True, dtype="float32", probability=1.0) | {"scheduled": True}
    field.enter(entrant, entrant, spec, environment={CACHE: cache})
    figures = field.ask(entrant, "compile") or field.failures[entrant]
    field.clear()
    return figures


def row(field: Field, framework: str, entrant: Entrant, bare: float) -> dict[str, Any]:
    """The figures of one optimizer. again: what later steps compiled again, if anything."""
    with TemporaryDirectory() as cache:
        cold = once(field, framework, entrant, cache)
        cached = once(field, framework, entrant, cache) if framework == "torch" else None
    failed = isinstance(cold, str)
    return {
        "trivial_s": bare,
        "cold_s": None if isinstance(cold, str) else cold["first"],
        "cached_s": cached["first"] if isinstance(cached, dict) else None,
        "again": None if isinstance(cold, str) else cold["again"],
        "why": cold if failed else None,
    }


def measure(
    sets: Sequence[ParameterSet], frameworks: Sequence[str], methods: Sequence[str], console: Console
) -> dict[str, Any]:
    """All figures, as plain data."""
    rows: list[dict[str, Any]] = []
    for framework in frameworks:
        bare = trivial(framework)
        for parameters in sets:
            with field_of(parameters) as field:
                for method in methods:
                    entrants = [x for x in PEERS.get((framework, method), ()) if x.compiles]
                    for entrant, name in versioned(entrants).items():
                        console.log(f"{parameters.name}, {framework}: {name}")
                        common = {"set": parameters.name, "framework": framework, "method": method, "who": name}
                        rows.append(common | row(field, framework, entrant, bare))
    return {"machine": machine(), "rows": rows}


def cells(result: Mapping[str, Any]) -> Cells:
    """A row for each optimizer."""

    def seconds(x: float | None) -> str:
        return "" if x is None else f"{x:.1f} s"

    def figures(r: Mapping[str, Any]) -> Sequence[str]:
        if r["why"]:
            return seconds(r["trivial_s"]), "does not run", "", r["why"].replace("|", "/")
        return *(seconds(r[k]) for k in ("trivial_s", "cold_s", "cached_s")), r["again"].replace("|", "/") or "nothing"

    head = ["set", "framework", "method", "who", "x + 1", "cold", "cached", "compiled again"]
    return [head, *([*(r[k] for k in head[:4]), *figures(r)] for r in result["rows"])]


def command(
    set_: Sets = None,
    framework: Framework = None,
    method: Methods = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
    quick: Quick = False,
) -> None:
    """Time the first compiled step, and see that later ones compile nothing."""
    writable(json_file)
    result = measure(
        chosen(set_, SETS, quick=quick),
        frameworks(framework),
        methods(method),
        Console(stderr=True),
    )
    tell(result, {"To the first compiled step": cells(result)}, json_file, as_markdown=markdown)
