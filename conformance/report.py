"""Comparisons as one HTML page that opens offline: plots are inline SVG, nothing is fetched and no script runs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from conformance import tolerances
from conformance.compare import Comparison, Pair
from conformance.plots import PALETTE, Draw, draw_divergence, draw_losses, picture, svg
from conformance.tolerances import Bound
from psgd.methods import METHODS

__all__ = ["explain", "largest", "largest_bound", "picture", "render", "write"]

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


# ---- HTML ------------------------------------------------------------
def tag(name: str, *content: str, **attributes: str) -> str:
    """An element. Content is HTML already; attributes are escaped (`class_` stands for class)."""
    given = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items())
    return f"<{name}{given}>{''.join(content)}</{name}>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", class_: str = "") -> str:
    """A table of cells that are HTML already."""
    head = tag("thead", tag("tr", *(tag("th", h, scope="col") for h in heads)))
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    whole = tag("table", tag("caption", caption) if caption else "", head, body, class_=class_)
    return tag("div", whole, class_="scroll")


def prose(text: str) -> str:
    """Plain text as HTML, with `code` in backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def badge(passed: bool) -> str:
    return tag("span", "pass" if passed else "fail", class_="badge good" if passed else "badge bad")


def number(x: float) -> str:
    return f"{x:.1e}" if isfinite(x) else "not finite"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f}%"


def each(values: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    """Values of all drivers in one line; one value where all show the same."""
    shown = {name: show(value) for name, value in values.items()}
    if len(shown) > 1 and len(set(shown.values())) == 1:
        return f"{next(iter(shown.values()))} in each of {', '.join(map(escape, shown))}"
    return ", ".join(f"{escape(name)} {value}" for name, value in shown.items()) or "–"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def facts(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """What ran, and on what."""

    def distinct(key: str) -> str:
        return ", ".join(sorted({str(getattr(c, key)) for c in comparisons}))

    packages = {name: installed(name) for name in ("psgd", "torch", "jax", "numpy")}
    if packages["psgd"] == "not installed":
        from psgd import __version__

        packages["psgd"] = __version__
    ran = {"problem": distinct("problem"), "dtype": distinct("dtype"), "seed": distinct("seed")}
    walked = {"steps": ", ".join(dict.fromkeys(f"{c.steps} {MODES[c.mode]}" for c in comparisons))}
    machine = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
    return ran | walked | packages | {"python": platform.python_version()} | machine


def grouped(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Comparisons of each method, in order."""
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault(c.method, []).append(c)
    return groups


def overview(comparisons: Sequence[Comparison]) -> str:
    """One row for each comparison."""
    drivers = list(dict.fromkeys(d for c in comparisons for d in c.losses))

    def row(c: Comparison) -> list[str]:
        accuracy = c.accuracy() if c.mode == "free" else {}
        losses = {d: f"{x[-1]:.4f}" for d, x in c.losses.items()} if c.mode == "free" else {}
        link = tag("a", escape(c.method), href=f"#{c.method}")
        ends = [losses.get(d, "–") for d in drivers] + [percent(accuracy.get(d)) for d in drivers]
        return [link, MODES[c.mode], *ends, number(largest(c)), number(largest_bound(c)), badge(c.passed)]

    ends = [f"{what}<br>{escape(d)}" for what in ("last loss", "held-out accuracy") for d in drivers]
    heads = ["method", "comparison", *ends, "largest<br>difference", "its bound<br>at most", "verdict"]
    return table(heads, map(row, comparisons), class_="compact")


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
    text = f"{tag('b', 'Free-running')}, {c.steps} steps. Last loss {losses}. "
    text += f"Held-out accuracy {each(c.accuracy(), percent)}." if c.accuracy() else ""
    return tag("div", *(tag("figure", plot) for plot in plots), class_="plots") + tag("p", text) + failures(c)


def locked_block(c: Comparison, key: str) -> str:
    """A step-locked comparison: one row for each pair."""
    heads = ["pair", "params", "updates", "state", "bound", "verdict"]
    rows = [
        [
            f"{escape(pair.a)} and {escape(pair.b)}",
            *(number(x) for x in pair.max_rel_diff().values()),
            number(float(np.max(pair.bound))),
            badge(pair.passed),
        ]
        for pair in c.pairs
    ]
    caption = f"{tag('b', 'Step-locked')}, {c.steps} steps: largest relative difference that one step makes"
    return table(heads, rows, caption) + failures(c)


def failures(c: Comparison) -> str:
    return "".join(tag("p", escape(explain(pair)) + ".", class_="bad") for pair in c.pairs if not pair.passed)


def bounds_table(comparisons: Sequence[Comparison]) -> str:
    """All tolerances with their reasons; those that judged this report are marked."""
    used = [c.bound for c in comparisons]

    def row(where: str, dtype: str, bound: Bound) -> list[str]:
        value = number(bound.value) if bound.value is not None else f"{bound.factor:g} × envelope"
        mark = tag("span", "●", class_="mark", title="used in this report") if bound in used else ""
        return [mark, where, dtype, value, prose(bound.reason)]

    rows = [row("step-locked", dtype, b) for dtype, b in tolerances.LOCKED.items()]
    rows += [
        row("free, contractive problem", dtype, b) for dtype, b in tolerances.CONTRACTIVE.items() if b.value is not None
    ]
    rows += [row("free, chaotic problem or bfloat16", "any", tolerances.ENVELOPE)]
    return table(["", "comparison", "dtype", "largest allowed", "why"], rows)


READING = """
<p>Each method trained the same model once in every framework named here: from the same start, on the same batches,
with the same noise, each framework differentiating by itself. Nothing but rounding may then tell the runs apart.</p>
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

CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:70rem;margin:0 auto;padding:3rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .5rem}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .25rem}
section{margin-top:3rem;padding-top:1.5rem;border-top:1px solid var(--rule)}
section>p{max-width:52rem}
a{color:inherit;text-decoration-color:var(--muted);text-underline-offset:.2em}
.lead{font-size:1.1rem;margin:0 0 1.5rem;max-width:52rem}
.muted{color:var(--muted)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.8rem 1.5rem;margin:0 0 2rem;
background:var(--card);padding:1rem 1.25rem;border-radius:.6rem}
dt{color:var(--muted);font-size:.8rem}
dd{margin:0;font-size:.95rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums;margin:.75rem 0}
caption{text-align:left;padding:.25rem .75rem .25rem 0}
th{font-weight:500;color:var(--muted);font-size:.8rem;text-align:left;white-space:nowrap}
th,td{padding:.45rem .9rem .45rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
.compact th,.compact td{white-space:nowrap}
code{font:.92em ui-monospace,Menlo,Consolas,monospace}
.badge{display:inline-block;font-size:.78rem;font-weight:600;line-height:1;padding:.25em .6em;border-radius:1em;
border:1px solid currentColor;vertical-align:.15em}
.good{color:var(--good)}
.bad{color:var(--bad)}
.mark{color:var(--good)}
.plots{display:grid;margin:1rem 0 .5rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem 1.5rem}
figure{margin:0}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit!important}
footer{margin-top:3rem;color:var(--muted);font-size:.85rem}
"""


def palette_css() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def render(comparisons: Sequence[Comparison]) -> str:
    """The page. It needs nothing from outside and runs no script."""
    passed = sum(c.passed for c in comparisons)
    verdict = f"{passed} of {len(comparisons)} comparisons pass. {badge(passed == len(comparisons))}"
    listed = tag("dl", *(tag("div", tag("dt", k), tag("dd", escape(v))) for k, v in facts(comparisons).items()))
    sections = [section(m, group, f"p{i}") for i, (m, group) in enumerate(grouped(comparisons).items())]
    body = tag(
        "main",
        tag("h1", "One optimizer, every framework, one trajectory"),
        tag("p", verdict, class_="lead"),
        listed,
        overview(comparisons),
        tag("section", tag("h2", "How to read this"), READING),
        *sections,
        tag("section", tag("h2", "Tolerances"), bounds_table(comparisons)),
        tag("footer", "Written by psgd. Mark ● : used in this report."),
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += tag("title", "psgd: conformance report") + tag("style", palette_css(), CSS)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def write(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write the page to a file."""
    Path(path).write_text(render(comparisons), encoding="utf-8")
