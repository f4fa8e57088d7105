"""Comparisons as one HTML page that opens offline: plots are inline SVG, nothing is fetched and no script runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from conformance import tolerances
from conformance.compare import Comparison, Pair
from conformance.html import CSS, badge, each, folded, number, palette_css, percent, prose, table, tag
from conformance.packages import releases
from conformance.plots import Draw, draw_divergence, draw_losses, picture, svg
from conformance.tolerances import Bound
from psgd.methods import METHODS

__all__ = ["Report", "agreement", "explain", "largest", "largest_bound", "picture", "render"]

MODES = {"free": "free-running", "locked": "step-locked"}


# ---- words shared with the command ------------------------------------------------------
def explain(pair: Pair) -> str:
    """Where a pair that failed left its bound, and the leaf that is furthest."""
    step = pair.first_step_over
    if step is None:
        return f"{pair.a} and {pair.b} stay within the bound"
    now = {kind: pair.curves[kind][step - 1] for kind in pair.judged}
    kind = max(now, key=lambda k: now[k] if isfinite(now[k]) else inf)
    at, leaf = pair.worst.get(kind, (step, "a leaf that is not finite"))
    return (
        f"{pair.a} and {pair.b}: over the bound first at step {step}, where {kind} differ by {now[kind]:.1e} and "
        f"{pair.bound[step - 1]:.1e} is allowed; furthest of {kind} is {leaf}, at step {at}"
    )


def largest(comparison: Comparison) -> float:
    """Largest difference of what is judged, over all pairs and steps."""
    return float(np.max([pair.curves[kind] for pair in comparison.pairs for kind in pair.judged]))


def largest_bound(comparison: Comparison) -> float:
    return float(np.max([pair.bound for pair in comparison.pairs]))


def agreement(comparisons: Sequence[Comparison]) -> str:
    """The result in a sentence: all agree, and how closely, or who does not."""
    names = " and ".join(dict.fromkeys(d for c in comparisons for d in c.losses))
    methods = list(grouped(comparisons))
    apart = [method for method, group in grouped(comparisons).items() if not all(c.passed for c in group)]
    if apart:
        return f"{names} do not agree in {len(apart)} of {counted(len(methods))}: {', '.join(apart)}"
    locked, free = ([c for c in comparisons if c.mode == mode] for mode in ("locked", "free"))
    how = []
    if locked:
        allowed = max(map(largest_bound, locked))
        how.append(
            f"one step from a common state differs by {max(map(largest, locked)):.1e} at most ({allowed:g} is allowed)"
        )
    if free:
        how.append("whole runs stay within their bounds")
    return f"{names} agree in {'all ' if len(methods) > 1 else ''}{counted(len(methods))}: {', and '.join(how)}"


def counted(n: int) -> str:
    return f"{n} method{'s' if n > 1 else ''}"


def is_falling(losses: Sequence[float]) -> bool:
    """Does a loss still fall at its end: in the last tenth by more than a hundredth of what it fell in all?"""
    tenth = max(1, len(losses) // 10)
    before, last = np.mean(losses[-2 * tenth : -tenth] or losses[:1]), np.mean(losses[-tenth:])
    return len(losses) < 10 or bool(before - last > 0.01 * (losses[0] - last) > 0)


# ---- HTML ------------------------------------------------------------
def facts(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """What ran, and on what; as HTML."""

    def distinct(key: str) -> str:
        return ", ".join(sorted({str(getattr(c, key)) for c in comparisons}))

    ran = {"problems": distinct("problem"), "dtype": distinct("dtype"), "seed": distinct("seed")}
    ran["steps"] = ", ".join(dict.fromkeys(f"{c.steps} {MODES[c.mode]}" for c in comparisons))
    ran["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    packages = (tag("span", escape(f"{name} {version}"), class_="n") for name, version in releases().items())
    return {k: escape(v) for k, v in ran.items()} | {"packages": ", ".join(packages)}


def grouped(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Comparisons of each method, in order."""
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault(c.method, []).append(c)
    return groups


def overview(comparisons: Sequence[Comparison]) -> str:
    """One row for each method."""
    heads = [
        "method",
        "problem",
        "last loss",
        "accuracy",
        "whole run",
        "allowed",
        "one step",
        "allowed",
        "verdict",
    ]

    def row(method: str, group: Sequence[Comparison]) -> list[str]:
        modes = {c.mode: c for c in group}
        free, locked = modes.get("free"), modes.get("locked")
        ends = {d: x[-1] for d, x in free.losses.items()} if free else {}
        accuracy = free.accuracy() if free else {}
        return [
            tag("a", escape(method), href=f"#{method}"),
            escape(group[0].problem),
            among(ends, lambda x: f"{x:.4f}"),
            among(accuracy, percent),
            *(prose(show(c)) if c else "–" for c in (free, locked) for show in (differs, allows)),
            badge(all(c.passed for c in group)),
        ]

    return table(heads, (row(*item) for item in grouped(comparisons).items()))


def differs(c: Comparison) -> str:
    return number(largest(c))


def allows(c: Comparison) -> str:
    return number(largest_bound(c))


def among(values: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    """What all drivers show, which is one value where they agree."""
    return " / ".join(dict.fromkeys(map(show, values.values()))) or "–"


def section(method: str, comparisons: Sequence[Comparison], key: str) -> str:
    """All about one method."""
    known = METHODS.get(method)
    about = f"{known.summary} Source: {known.source}." if known else ""
    heading = tag("h2", escape(method), " ", badge(all(c.passed for c in comparisons)), id=method)
    blocks = [(free_block if c.mode == "free" else locked_block)(c, f"{key}-{i}") for i, c in enumerate(comparisons)]
    return tag("section", heading, tag("p", prose(about), class_="muted"), *blocks)


def free_block(c: Comparison, key: str) -> str:
    """A free-running comparison: two plots and what they end in."""
    names = " and ".join(c.losses)
    losses = each({name: x[-1] for name, x in c.losses.items()}, lambda x: f"{x:.6f}")
    alts = [
        f"Loss of {names} at each of {c.steps} steps with {c.method} on {c.problem}; at the end {losses}.",
        f"Largest relative difference of the parameters of {names} at each step, on a log axis: at most "
        f"{number(largest(c))}, under a bound that ends at {number(float(c.pairs[0].bound[-1]))}.",
    ]
    draws: list[Draw] = [draw_losses, draw_divergence]
    plots = [svg(d, c, f"{key}-{i}", alt) for i, (d, alt) in enumerate(zip(draws, alts, strict=True))]
    text = f"{tag('b', 'Free-running')} on {escape(c.problem)}, {c.steps} steps. Last loss {losses}"
    text += f"; held-out accuracy {each(c.accuracy(), percent)}." if c.accuracy() else "."
    text += f" The loss still falls at the end: {SHORT}." if is_falling(next(iter(c.losses.values()))) else ""
    return tag("div", *(tag("figure", plot) for plot in plots), class_="plots") + tag("p", text) + failures(c)


SHORT = "the run is too short to show where it ends"


def locked_block(c: Comparison, key: str) -> str:
    """A step-locked comparison: a line for each pair."""
    lines = []
    for pair in c.pairs:
        differences = ", ".join(f"{kind} {number(x)}" for kind, x in pair.max_rel_diff().items())
        lines.append(f"{pair.a} and {pair.b}: {differences}; allowed is {number(float(np.max(pair.bound)))}.")
    head = f"{tag('b', 'Step-locked')}, {c.steps} steps. The largest relative difference that one step makes: "
    return tag("p", head, prose(" ".join(lines))) + failures(c)


def failures(c: Comparison) -> str:
    return "".join(tag("p", prose(explain(pair)) + ".", class_="bad") for pair in c.pairs if not pair.passed)


def bounds_table(comparisons: Sequence[Comparison]) -> str:
    """All tolerances with their reasons; those that judged this report are marked."""
    used = [c.bound for c in comparisons]

    def row(where: str, dtype: str, bound: Bound) -> list[str]:
        value = prose(number(bound.value)) if bound.value is not None else f"{bound.factor:g} × envelope"
        mark = tag("span", "●", class_="good", title="used in this report") if bound in used else ""
        return [mark, where, dtype, value, prose(bound.reason)]

    rows = [row("step-locked", dtype, b) for dtype, b in tolerances.LOCKED.items()]
    rows += [
        row("free, contractive problem", dtype, b) for dtype, b in tolerances.CONTRACTIVE.items() if b.value is not None
    ]
    rows += [row("free, chaotic problem or bfloat16", "any", tolerances.ENVELOPE)]
    return table(["used", "comparison", "dtype", "largest allowed", "why"], rows)


READING = """
<p>Each method trained one model in every framework named here: from the same start, on the same batches, with the
same noise, each framework differentiating by itself. Nothing but rounding may then tell the runs apart. The runs are
short: they show whether the frameworks agree, and not how good a method is.</p>
<p><b>Loss.</b> The broad line is one framework, the dashed line on top of it another. Where you see one line, they
agree to the eye.</p>
<p><b>Difference.</b> What the eye cannot see: the largest difference of any parameter, relative to the largest entry
of its tensor, on a log axis. Training a network is chaotic, so even a last bit may grow with time. The darker band
shows how far: it is measured on twins of the run whose start was moved by one unit in the last place (one ulp). The
lighter band ends at the bound, a fixed multiple of it. Frameworks that do the same mathematics stay inside; a wrong
formula leaves it within a few steps. Where nothing differs, nothing is drawn.</p>
<p><b>Step-locked.</b> Here every step starts from one common state, so nothing accumulates: parameters, updates and
every leaf of the optimizer's state may differ by a few roundings only.</p>
"""


@dataclass
class Report:
    """The page, to which methods are added as they are done."""

    comparisons: list[Comparison] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)

    def add(self, comparisons: Sequence[Comparison]) -> None:
        """The comparisons of one method."""
        drawn = section(comparisons[0].method, comparisons, f"p{len(self.sections)}")  # Ctrl-C here adds nothing
        self.sections.append(drawn)
        self.comparisons += comparisons

    def html(self, left: Sequence[str] = ()) -> str:
        """The page; it needs nothing from outside and runs no script. left: methods that were to run and have not."""
        done, passed = self.comparisons, all(c.passed for c in self.comparisons)
        lead = tag("p", prose(agreement(done)), ". ", badge(passed), class_="lead")
        if left:
            many = f"This report is partial: {', '.join(left)} {'have' if len(left) > 1 else 'has'} not run."
            lead += tag("p", prose(many), class_="bad")
        wide = {"packages": {"class_": "wide"}}
        items = (tag("div", tag("dt", k), tag("dd", v), **wide.get(k, {})) for k, v in facts(done).items())
        body = tag(
            "main",
            tag("h1", "One optimizer, every framework, one trajectory"),
            lead,
            folded("All figures, method by method", overview(done), unfolded=not passed),
            tag("dl", *items),
            tag("section", tag("h2", "How to read this"), READING),
            *self.sections,
            tag("section", tag("h2", "Tolerances"), folded("All bounds and their reasons", bounds_table(done))),
            tag("footer", "Written by psgd."),
        )
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        head += tag("title", "psgd: conformance report") + tag("style", palette_css(), CSS)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'

    def write(self, path: Path, left: Sequence[str] = ()) -> None:
        """Write the page to a file."""
        path.write_text(self.html(left), encoding="utf-8")


def render(comparisons: Sequence[Comparison]) -> str:
    """The page of comparisons."""
    page = Report()
    for group in grouped(comparisons).values():
        page.add(group)
    return page.html()
