"""Plots of comparisons: panels as inline SVG for a page, two panels as a PNG for a README.

Colours are of one palette. Figures are drawn in the light ones; in an SVG each becomes a CSS variable, so that plots
follow the reader's light or dark mode as text does. matplotlib is imported only where something is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from conformance.compare import Comparison

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
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "psgd",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlecolor": PALETTE["ink"][0],
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def free(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those in which each driver walked by itself."""
    return [c for c in comparisons if c.mode == "free"]


def colour(name: str) -> str:
    return PALETTE[name][0]


def hue(i: int) -> str:
    return colour(HUES[i % len(HUES)])


def draw_losses(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    """The first driver's losses as a broad line, the others' dashed on top of it."""
    alone = len(comparisons) == 1
    for i, c in enumerate(comparisons):
        (first, losses), *others = c.losses.items()
        label = first if alone else c.method
        axes.plot(steps_of(c), losses, color=hue(i), linewidth=3.4, alpha=0.85, label=label, marker=dot(c))
        for dashes, (driver, losses) in zip(cycle(DASHES), others, strict=False):
            look = {"color": colour("ink"), "linewidth": 1.2, "linestyle": dashes}
            axes.plot(steps_of(c), losses, label=driver if alone else None, **look)
    first, *rest = comparisons[0].losses
    axes.set_title("Loss" if alone else f"Loss, with {first} (solid) and {', '.join(rest)} (dashed)")
    axes.set(xlabel="step", ylim=(0, None))


def draw_divergence(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    """Largest relative difference of parameters, on a log axis; the envelope and the bound are shaded."""
    axes.set_yscale("log")
    low, high = limits(comparisons)
    alone = len(comparisons) == 1
    for i, c in enumerate(comparisons):
        shade(axes, c, low, hue(i), alone)
        for j, pair in enumerate(c.pairs):
            label = f"{pair.a} and {pair.b}" if alone else None if j else c.method
            curve = np.where(np.asarray(pair.curves["params"]) > 0, pair.curves["params"], np.nan)
            axes.plot(steps_of(c), curve, color=hue(i + j), linewidth=1.6, label=label, marker=dot(c))
    titles = "Largest relative difference of the parameters", "Largest difference, one-ulp envelope, bound (dotted)"
    axes.set(title=titles[not alone], xlabel="step", ylim=(low, high))


def shade(axes: Axes, c: Comparison, low: float, tint: str, alone: bool) -> None:
    """Below the bound: the one-ulp envelope darker, the rest lighter. Among others, the bound is a dotted line only."""
    steps, bound, bottom = steps_of(c), c.pairs[0].bound, np.full(c.steps, low)
    fill = {"color": tint, "linewidth": 0}
    if c.envelope is not None:
        label = "one-ulp envelope" if alone else None
        axes.fill_between(steps, bottom, c.envelope, alpha=0.26 if alone else 0.09, label=label, **fill)
        bottom = np.maximum(bottom, c.envelope)
    if alone:
        axes.fill_between(steps, bottom, bound, alpha=0.12, label="bound", **fill)
    edge = {"linewidth": 0.8, "alpha": 0.7} if alone else {"linewidth": 1.1, "linestyle": DASHES[1]}
    axes.plot(steps, bound, color=tint, **edge)


def steps_of(c: Comparison) -> np.ndarray:
    return np.arange(1, c.steps + 1)


def dot(c: Comparison) -> str | None:
    """A marker where a line would have no length."""
    return "." if c.steps < 3 else None


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


def blank(size: tuple[float, float]) -> Figure:
    """An empty figure on the palette's paper, in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    return Figure(figsize=size, layout=layout, facecolor=colour("paper"))


@contextmanager
def png(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure to draw on, which is then written as a PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = blank(size)
        yield figure
        figure.savefig(path, format="png", dpi=160)


def figure_of(panels: Sequence[Draw], comparisons: Sequence[Comparison], figure: Figure) -> Figure:
    """The figure with a panel for each drawing function."""
    from matplotlib.ticker import FuncFormatter, NullLocator

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
    for spine in axes.spines.values():
        spine.set_color(colour("rule"))
    axes.margins(x=0.01)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=3, labelcolor=colour("ink"), borderaxespad=0)


def svg(draw: Draw, comparison: Comparison, key: str, alt: str) -> str:
    """A panel as an SVG element for HTML: palette as CSS variables, identifiers made unique by `key`."""
    import matplotlib

    with matplotlib.rc_context(STYLE), StringIO() as out:
        figure = figure_of([draw], [comparison], blank((5.6, 3.5)))
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
    if not free(comparisons):
        raise ValueError("a picture needs a free-running comparison")
    with png(path, (10.4, 3.8)) as figure:
        figure_of([draw_losses, draw_divergence], free(comparisons), figure)
