"""What a step costs beside AdamW, Muon, other published optimizers of the same method, and its bare matrix products.

    psgd bench step --set gpt-4x256 --json step.json --markdown

Gradients are given, and giving them is not timed. What counts is the ratio of ours to the other one within a round of
a race in which all take turns (`racing`); one that does not run says why in its row. "every step" fits the
preconditioner at each step; "steady" is the average of 34 steps of which one fits, as `kron`'s schedule has it in the
end, made of steps that fit and of steps that do not, each measured in a race of their own. "eager" holds torch's
compiler off everybody; "compiled" lets the others compile what they compile by themselves, and compiles ours with
`compile=True` and the step of torch's own. In JAX everybody is jitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.cost import floor
from benchmarks.peers import PEERS, PERIOD, RARELY, SCALE, Entrant
from benchmarks.racing import Field, field_of, versioned
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
from conformance.terminal import known, writable

MODES, DTYPES = ("eager", "compiled"), ("float32", "bfloat16")
UPDATES = ("every step", "steady")
PHASES = {"fit": 1.0, "rest": RARELY}  # the probability of a fit in each race
LARGE = 50_000_000  # numbers from which a process more is gigabytes more
NONE: dict[str, Any] = dict.fromkeys(
    ("ours_ms", "peer_ms", "ratio", "quartiles", "ours_quartiles_ms", "peer_quartiles_ms")
)


def beside(framework: str, method: str, parameters: ParameterSet, *, keep_p: bool = False) -> list[Entrant]:
    """Ours, its peers, and who is there for scale."""
    scale = SCALE[framework][1:2] if parameters.numbers > LARGE else SCALE[framework]
    ours, *peers = PEERS[framework, method]
    if keep_p:
        ours = replace(ours, settings={**ours.settings, "keep_p": True})
    return [ours, *peers, *scale]


def rested(field: Field, entrant: Entrant, phase: str) -> None:
    """Take out who claims to rest and fits: at rest only momentum and counters change."""
    if phase == "rest" and entrant.probability:
        changes = field.ask(entrant, "changes")
        allowed = 4 * field.parameters.numbers + 64 * len(field.parameters.shapes)
        if changes is not None and changes > allowed:
            field.drop(entrant, f"cannot be kept from fitting: a step changes {changes:,} bytes of its state")


def phase_of(
    field: Field, entrants: Sequence[Entrant], phase: str, framework: str, mode: str, method: str, dtype: str
) -> tuple[dict[Any, np.ndarray], dict[Any, str]]:
    """Seconds of each entrant, and of "floor", in one race; and why others have none."""
    parameters, compiled = field.parameters, mode == "compiled"
    for entrant in entrants:
        spec = entrant.spec(framework, compiled=compiled, dtype=dtype, probability=PHASES[phase])
        field.enter(entrant, entrant, spec, laps=2 if parameters.numbers > LARGE else 3)
        rested(field, entrant, phase)
    ours = next(entrant for entrant in entrants if entrant.ours)
    half = ours.half if dtype == "bfloat16" else {}
    products = floor.of_step(method, {**ours.settings, **half}, parameters.shapes, dtype, fit=phase == "fit")
    field.enter_products("floor", framework, dtype, products)
    seen, failures = field.race(parameters.rounds), dict(field.failures)
    field.clear()
    return seen, failures


def figures(ours: np.ndarray, peer: np.ndarray) -> dict[str, Any]:
    """Medians and quartiles in ms, and the median and the quartiles of the ratio in each round."""
    low, median, high = np.quantile(ours / peer, [0.25, 0.5, 0.75])

    def spread(x: np.ndarray) -> list[float]:
        return [float(q) for q in 1e3 * np.quantile(x, [0.25, 0.75])]

    return {
        "ours_ms": float(1e3 * np.median(ours)),
        "peer_ms": float(1e3 * np.median(peer)),
        "ratio": float(median),
        "quartiles": [float(low), float(high)],
        "ours_quartiles_ms": spread(ours),
        "peer_quartiles_ms": spread(peer),
    }


def averaged(seen: Mapping[str, Mapping[Any, np.ndarray]], who: Any, updates: str) -> np.ndarray | None:
    """Seconds a step, round by round; None for who did not run."""
    fit, rest = (seen.get(phase, {}).get(who) for phase in PHASES)
    if fit is None or updates == "every step":
        return fit
    return None if rest is None else (fit + (PERIOD - 1) * rest) / PERIOD


def rows_of(
    common: Mapping[str, Any],
    entrants: Sequence[Entrant],
    names: Mapping[Entrant, str],
    seen: Mapping[str, Mapping[Any, np.ndarray]],
    failures: Mapping[Any, str],
    updates: str,
) -> list[dict[str, Any]]:
    """A row for each entrant beside ours, and one more for the fastest of the same method."""
    ours, *others = entrants
    if updates == "steady":
        others = [x for x in others if x.probability or x.scale]
    mine, bare = averaged(seen, ours, updates), averaged(seen, "floor", updates)
    alone: dict[str, Any] = {"floor_ms": None, "floor_ratio": None}
    if mine is not None and bare is not None and bare.any():
        alone = {"floor_ms": float(1e3 * np.median(bare)), "floor_ratio": float(np.median(mine / bare))}
    rows = []
    for other in others:
        theirs = averaged(seen, other, updates)
        if mine is None:
            times, why = NONE, f"ours does not run: {failures[ours]}"
        elif theirs is None:
            alone_ms = figures(mine, mine)
            times, why = {**NONE, **{k: alone_ms[k] for k in ("ours_ms", "ours_quartiles_ms")}}, failures[other]
        else:
            times, why = figures(mine, theirs), None
        kind = {"fastest": False, "scale": other.scale}
        rows.append({**common, "updates": updates, "peer": names[other], **kind, **times, **alone, "why": why})
    able = [r for r in rows if not r["scale"] and r["ratio"] is not None]
    if able:
        rows.append({**max(able, key=lambda r: r["ratio"]), "fastest": True})
    return rows


def raced(
    parameters: ParameterSet,
    framework: str,
    mode: str,
    method: str,
    dtype: str,
    updates: Sequence[str],
    console: Console,
    *,
    keep_p: bool = False,
) -> list[dict[str, Any]]:
    """The rows of one method in one mode."""
    entrants = beside(framework, method, parameters, keep_p=keep_p)
    wanted = [x for x in updates if x == "every step" or entrants[0].probability]
    seen: dict[str, Mapping[Any, np.ndarray]] = {}
    failures: dict[Any, str] = {}
    with field_of(parameters) as field:
        for phase in PHASES if "steady" in wanted else ["fit"] * bool(wanted):
            console.log(f"{parameters.name}, {framework}, {mode}, {method}: steps that {phase}")
            able = [x for x in entrants if x not in failures and (phase == "fit" or x.probability or x.scale)]
            seen[phase], why = phase_of(field, able, phase, framework, mode, method, dtype)
            failures |= why
    names = versioned(entrants)
    common = {"set": parameters.name, "framework": framework, "mode": mode, "method": method, "dtype": dtype}
    common |= {"kept": "P" if keep_p else "Q"}
    return [row for x in wanted for row in rows_of(common, entrants, names, seen, failures, x)]


def measure(
    sets: Sequence[ParameterSet],
    frameworks: Sequence[str],
    modes: Sequence[str],
    methods: Sequence[str],
    dtype: str,
    updates: Sequence[str],
    console: Console,
    *,
    keep_p: bool = False,
) -> dict[str, Any]:
    """All figures, as plain data."""
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    for parameters in sets:
        for framework in frameworks:
            for mode in modes if framework == "torch" else [m for m in modes if m == "compiled"]:
                for method in [m for m in methods if (framework, m) in PEERS]:
                    which = parameters, framework, mode, method, dtype, updates, console
                    result["rows"] += raced(*which, keep_p=keep_p)
    return result


def cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """A row for each pairing; the fastest of the same method has a mark instead of its second row."""
    best = [{**r, "fastest": False} for r in rows if r["fastest"]]

    def times(r: Mapping[str, Any]) -> Sequence[str]:
        over = "" if r["floor_ratio"] is None else f"{r['floor_ratio']:.2f}"
        if r["why"]:
            return (*(in_ms(r, "ours"), "", "does not run", r["why"].replace("|", "/"), over),)
        low, high = r["quartiles"]
        ratio = f"{r['ratio']:.2f}" + " *" * (r in best)
        return in_ms(r, "ours"), in_ms(r, "peer"), ratio, f"{low:.2f} to {high:.2f}", over

    head = ["method", "fits", "beside", "ours", "the other", "ours / the other", "quartiles", "ours / products"]
    return [head, *([r["method"], r["updates"], r["peer"], *times(r)] for r in rows if not r["fastest"])]


def leaders(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Ours beside the fastest of the same method alone, of everything that was measured."""
    keys = ("set", "framework", "mode", "dtype", "method")
    table: Cells = [[*keys, "fits", "beside", "ours / the other", "quartiles", "ours / products"]]
    for r in rows:
        if r["fastest"]:
            low, high = r["quartiles"]
            method = r["method"] + (", P kept" if r["kept"] == "P" else "")
            over = "" if r["floor_ratio"] is None else f"{r['floor_ratio']:.2f}"
            own = *(r[k] for k in keys[:-1]), method, r["updates"], r["peer"]
            table.append([*own, f"{r['ratio']:.2f}", f"{low:.2f} to {high:.2f}", over])
    return table


def in_ms(r: Mapping[str, Any], whose: str) -> str:
    """Median and quartiles in a cell."""
    if r[f"{whose}_ms"] is None:
        return ""
    low, high = r[f"{whose}_quartiles_ms"]
    return f"{r[f'{whose}_ms']:.1f} ms ({low:.1f} to {high:.1f})"


def tables(result: Mapping[str, Any]) -> dict[str, Cells]:
    """A table for each set, framework and mode, and what ours keeps."""
    keys = ("set", "framework", "mode", "dtype", "kept")
    kinds = dict.fromkeys(tuple(r[k] for k in keys) for r in result["rows"])
    rows = {kind: [r for r in result["rows"] if tuple(r[k] for k in keys) == kind] for kind in kinds}
    return {f"A step of {', '.join(kind[:-1])}{', P kept' * (kind[-1] == 'P')}": cells(x) for kind, x in rows.items()}


def summary(result: Mapping[str, Any]) -> str:
    """Medians and worst of the ratios to the fastest peer."""
    parts = []
    for updates in UPDATES:
        ratios = [r["ratio"] for r in result["rows"] if r["fastest"] and r["updates"] == updates]
        if ratios:
            parts.append(f"{updates}: median {np.median(ratios):.2f}, worst {max(ratios):.2f} of {len(ratios)}")
    return "Ours over the fastest (*) of the same method: " + ("; ".join(parts) or "there is none")


def command(
    set_: Sets = None,
    framework: Framework = None,
    mode: Annotated[str | None, typer.Option(help="eager, or compiled as JAX always is.  [default: both]")] = None,
    method: Methods = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: of parameters and gradients.")] = "float32",
    updates: Annotated[str | None, typer.Option(help='"every step" or steady.  [default: both]')] = None,
    fastest: Annotated[bool, typer.Option("--fastest", help="Show the fastest of the same method alone.")] = False,
    keep_p: Annotated[bool, typer.Option("--keep-p", help="Let ours keep P between steps.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of each race.  [default: by the set]")] = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
    quick: Quick = False,
) -> None:
    """Time a step beside other optimizers of the same method, AdamW, Muon, and the bare matrix products."""
    writable(json_file)
    known("dtype", dtype, DTYPES)
    result = measure(
        chosen(set_, SETS, rounds=rounds, quick=quick),
        frameworks(framework),
        [known("mode", mode, MODES)] if mode else MODES,
        methods(method),
        dtype,
        [known("updates", updates, UPDATES)] if updates else UPDATES,
        Console(stderr=True),
        keep_p=keep_p,
    )
    shown = {"A step beside the fastest": leaders(result["rows"])} if fastest else tables(result)
    tell(result, shown, json_file, as_markdown=markdown, last=summary(result))
