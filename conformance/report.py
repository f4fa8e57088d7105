"""Comparisons as one HTML page that opens offline, with plots as inline SVG, and as one picture for a README.

Colours are drawn from one palette. A figure is drawn in the light ones; inside the page each becomes a CSS variable, so
that the plots follow the reader's light or dark mode as the text does. matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from conformance import tolerances
from conformance.compare import Comparison, Pair
from conformance.tolerances import Bound
from psgd.methods import METHODS

Axes = Any  # matplotlib is not imported for its types
Figure = Any
Draw = Callable[[Axes, Sequence[Comparison]], None]

PALETTE: dict[str, tuple[str, str]] = {  # name: (light, dark)
    "paper": ("#fdfdfb", "#16181c"),
    "card": ("#f5f5f1", "#1e2126"),
    "ink": ("#23272e", "#e7e6e2"),
    "muted": ("#666c75", "#9ba1aa"),
    "rule": ("#dfdfd9", "#353941"),
    "good": ("#2a7a49", "#6cc48d"),
    "bad": ("#b3261e", "#ff8a80"),
    "hue0": ("#d9772b", "#f0a05c"),
    "hue1": ("#2f7fb5", "#6db6e6"),
    "hue2": ("#7a5bb0", "#b09be0"),
    "hue3": ("#3f8f6b", "#7cc8a4"),
    "hue4": ("#b8487a", "#e28bb1"),
    "hue5": ("#8a7a26", "#cdbb62"),
}
HUES = [name for name in PALETTE if name.startswith("hue")]
DASHES = ((0, (4, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)))
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "psgd",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


# ---- words shared with the command ------------------------------------------------------
def free(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those in which each driver walked by itself."""
    return [c for c in comparisons if c.mode == "free"]


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


# ---- drawing ------------------------------------------------------------------------------
def colour(name: str) -> str:
    return PALETTE[name][0]


def hue(i: int) -> str:
    return colour(HUES[i % len(HUES)])


def draw_losses(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    """The first driver's losses as a broad line, the others' dashed on top of it."""
    alone = len(comparisons) == 1
    for i, c in enumerate(comparisons):
        steps = np.arange(1, c.steps + 1)
        for j, (driver, losses) in enumerate(c.losses.items()):
            others = {"color": colour("ink"), "linewidth": 1.2, "linestyle": DASHES[(j - 1) % len(DASHES)]}
            look = others if j else {"color": hue(i), "linewidth": 3.4, "alpha": 0.85}
            named = driver if alone else c.method if j == 0 else driver if i == len(comparisons) - 1 else None
            axes.plot(steps, losses, label=named, marker="." if c.steps < 3 else None, **look)
    axes.set(title="Loss", xlabel="step", ylim=(0, None))
    axes.legend(loc="upper right")


def draw_divergence(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    """Largest relative difference of parameters, on a log axis; the envelope and the bound are shaded."""
    axes.set_yscale("log")
    low, high = limits(comparisons)
    alone = len(comparisons) == 1
    for i, c in enumerate(comparisons):
        steps = np.arange(1, c.steps + 1)
        shade(axes, steps, low, c, hue(i), alone)
        for j, pair in enumerate(c.pairs):
            named = f"{pair.a} and {pair.b}" if alone else c.method if j == 0 else None
            curve = np.where(np.asarray(pair.curves["params"]) > 0, pair.curves["params"], np.nan)
            axes.plot(steps, curve, color=hue(i + j), linewidth=1.5, label=named, marker="." if c.steps < 3 else None)
    axes.set(title="Largest relative difference of the parameters", xlabel="step", ylim=(low, high))
    axes.legend(loc="lower right")


def shade(axes: Axes, steps: np.ndarray, low: float, c: Comparison, tint: str, named: bool) -> None:
    """The one-ulp envelope darker, the rest below the bound lighter."""
    bottom = np.full(len(steps), low)
    if c.envelope is not None:
        label = "one-ulp envelope" if named else None
        axes.fill_between(steps, bottom, c.envelope, color=tint, alpha=0.24, linewidth=0, label=label)
        bottom = np.maximum(bottom, c.envelope)
    bound, label = c.pairs[0].bound, "bound" if named else None
    axes.fill_between(steps, bottom, bound, color=tint, alpha=0.11, linewidth=0, label=label)
    axes.plot(steps, bound, color=tint, linewidth=0.8, alpha=0.7)


def limits(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """A log axis for all differences and bounds that are positive and finite."""
    pairs = [pair for c in comparisons for pair in c.pairs]
    values = np.concatenate([np.concatenate([pair.bound, pair.curves["params"]]) for pair in pairs])
    values = values[np.isfinite(values) & (values > 0)]
    return (float(values.min()) / 4, float(values.max()) * 4) if values.size else (1e-17, 1e-9)


def power_of_ten(value: float, position: int) -> str:
    """A tick of a log axis in plain characters, which any font has."""
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "10" + f"{round(np.log10(value))}".translate(superscript)


def figure_of(panels: Sequence[Draw], comparisons: Sequence[Comparison], size: tuple[float, float]) -> Figure:
    """A figure with a panel for each drawing function."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=size, layout="constrained", facecolor=colour("paper"))
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, comparisons)
        quiet(axes)
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter(FuncFormatter(power_of_ten))
            axes.yaxis.set_minor_locator(NullLocator())
    return figure


def quiet(axes: Axes) -> None:
    """Colours of the palette on everything that is not data."""
    axes.set_facecolor("none")
    axes.grid(axis="y", color=colour("rule"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colour("muted"), length=3)
    axes.xaxis.label.set_color(colour("muted"))
    axes.title.set_color(colour("ink"))
    for spine in axes.spines.values():
        spine.set_color(colour("rule"))
    axes.margins(x=0.01)
    for text in axes.get_legend().get_texts():
        text.set_color(colour("ink"))


def svg(draw: Draw, comparison: Comparison, key: str, alt: str) -> str:
    """A panel as an SVG element for HTML: palette as CSS variables, identifiers made unique by `key`."""
    import matplotlib

    with matplotlib.rc_context(STYLE), StringIO() as out:
        figure = figure_of([draw], [comparison], (5.6, 3.5))
        figure.patch.set_visible(False)
        figure.savefig(out, format="svg", metadata={"Date": None})
        text = out.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)
    body = text[text.index("</metadata>") + len("</metadata>") :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{key}-', body).replace("url(#", f"url(#{key}-")
    body = body.replace('xlink:href="#', f'href="#{key}-')
    for name, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{name})")
    frame = box.group(1) if box else "0 0 400 250"
    return f'<svg viewBox="{frame}" role="img" aria-label="{escape(alt)}">{body}'


def picture(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write a PNG of two panels: loss curves on top of each other, and divergence with its envelope.

    Only free-running comparisons are drawn. Raises ValueError where there is none.
    """
    import matplotlib

    if not free(comparisons):
        raise ValueError("a picture needs a free-running comparison")
    with matplotlib.rc_context(STYLE):
        figure_of([draw_losses, draw_divergence], free(comparisons), (10.4, 3.8)).savefig(path, format="png", dpi=160)


# ---- HTML ---------------------------------------------------------------------------------
def tag(name: str, *content: str, **attributes: str) -> str:
    """An element. Content is HTML already; attributes are escaped (`class_` stands for class)."""
    given = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items())
    return f"<{name}{given}>{''.join(content)}</{name}>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of cells that are HTML already."""
    head = tag("thead", tag("tr", *(tag("th", h, scope="col") for h in heads)))
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("table", tag("caption", caption) if caption else "", head, body), class_="scroll")


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

    steps = {c.mode: c.steps for c in comparisons}
    packages = {name: installed(name) for name in ("psgd", "torch", "jax", "numpy")}
    if packages["psgd"] == "not installed":
        from psgd import __version__

        packages["psgd"] = __version__
    ran = {"problem": distinct("problem"), "dtype": distinct("dtype"), "seed": distinct("seed")}
    walked = {"steps": ", ".join(f"{n} ({'step-locked' if m == 'locked' else 'free-running'})" for m, n in steps.items())}
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
    rows = [
        [
            tag("a", escape(c.method), href=f"#{escape(c.method)}"),
            "step-locked" if c.mode == "locked" else "free-running",
            each({name: x[-1] for name, x in c.losses.items()}, lambda x: f"{x:.4f}"),
            each(c.accuracy(), percent),
            number(largest(c)),
            number(largest_bound(c)),
            badge(c.passed),
        ]
        for c in comparisons
    ]
    heads = ["method", "comparison", "last loss", "held-out accuracy", "largest difference", "largest bound", "verdict"]
    return table(heads, rows)


def section(method: str, comparisons: Sequence[Comparison], key: str) -> str:
    """All about one method."""
    known = METHODS.get(method)
    about = f"{known.summary} Source: {known.source}." if known else ""
    heading = tag("h2", escape(method), " ", badge(all(c.passed for c in comparisons)), id=method)
    blocks = [(walk if c.mode == "free" else steps)(c, f"{key}-{i}") for i, c in enumerate(comparisons)]
    return tag("section", heading, tag("p", escape(about), class_="muted"), *blocks)


def walk(c: Comparison, key: str) -> str:
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


def steps(c: Comparison, key: str) -> str:
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
        return [mark, where, dtype, value, escape(bound.reason)]

    rows = [row("step-locked", dtype, b) for dtype, b in tolerances.LOCKED.items()]
    rows += [row("free, contractive problem", dtype, b) for dtype, b in tolerances.CONTRACTIVE.items() if b.value is not None]
    rows += [row("free, chaotic problem or bfloat16", "any", tolerances.ENVELOPE)]
    return table(["", "comparison", "dtype", "largest allowed", "why"], rows)


READING = """
<p>Each method trained the same model once in every framework named here: from the same start, on the same batches, with the
same noise, each framework differentiating by itself. Nothing but rounding may then tell the runs apart.</p>
<p><b>Loss.</b> The broad line is one framework, the dashed line on top of it the other. Where you see one line, both agree to
the eye.</p>
<p><b>Difference.</b> What the eye cannot see: the largest difference of any parameter, relative to the largest entry of its
tensor, on a log axis. Training a network is chaotic, so even a last bit grows with time. The darker band shows how fast: it
is measured on twins of the run whose start was moved by one unit in the last place (one ulp). The lighter band ends at the
bound, a fixed multiple of it. Frameworks that do the same mathematics stay inside; a wrong formula leaves it within a few
steps. A step without any difference is not drawn.</p>
<p><b>Step-locked.</b> Here every step starts from one common state, so nothing accumulates: parameters, updates and every
leaf of the optimizer's state may differ by a few roundings only.</p>
"""

CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:70rem;margin:0 auto;padding:3rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .5rem}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .25rem}
section{margin-top:3rem;padding-top:1.5rem;border-top:1px solid var(--rule)}
section>p{max-width:46rem}
a{color:inherit;text-decoration-color:var(--muted);text-underline-offset:.2em}
.lead{font-size:1.1rem;margin:0 0 1.5rem;max-width:46rem}
.muted{color:var(--muted)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.8rem 1.5rem;margin:0 0 2rem;
background:var(--card);padding:1rem 1.25rem;border-radius:.6rem}
dt{color:var(--muted);font-size:.8rem}
dd{margin:0;font-size:.95rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums;margin:.75rem 0}
caption{text-align:left;padding:.25rem .75rem .25rem 0}
th{font-weight:500;color:var(--muted);font-size:.8rem;text-align:left;white-space:nowrap}
th,td{padding:.45rem .9rem .45rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
.badge{display:inline-block;font-size:.78rem;font-weight:600;line-height:1;padding:.25em .6em;border-radius:1em;
border:1px solid currentColor;vertical-align:.15em}
.good{color:var(--good)}
.bad{color:var(--bad)}
.mark{color:var(--good)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem 1.5rem;margin:1rem 0 .5rem}
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
