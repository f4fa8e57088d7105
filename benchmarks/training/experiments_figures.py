"""The tables and the picture of `benchmarks.training.experiments`, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import Cells
from conformance.plots import HUES, colour, png, power_of_ten, quiet

REACHED = 1e-10  # a loss that counts as the minimum
BFGS = "BFGS"
STYLES: dict[str, Any] = {
    "torch": {"linewidth": 3.4, "alpha": 0.4},
    "jax": {"linewidth": 1.2, "linestyle": (0, (4, 2))},
}


def valley_cells(result: dict[str, Any]) -> Cells:
    """A row for each geometry and framework; steps are medians over the seeds, those that never come being last."""

    def cells(r: dict[str, Any]) -> Sequence[str]:
        finals, reached = r["finals"], [inf if t is None else t for t in r["reached"]]
        middle = float(np.median(reached)) if np.isfinite(reached).sum() > len(reached) / 2 else inf
        span = f"{min(finals):.0e} to {max(finals):.0e}"
        steps = "never" if middle == inf else f"{middle:.0f}", f"{np.median(r['agreed']):.0f}", f"{min(r['agreed'])}"
        return r["geometry"], r["framework"], f"{np.median(finals):.1e}", span, *steps

    head = "geometry", "framework", "final f", "range", f"below {REACHED:.0e} at", "the same until", "at least until"
    return [head, *map(cells, result["rosenbrock"])]


def fits_cells(rows: Sequence[dict[str, Any]]) -> Cells:
    """A row for each learner and framework of one panel."""

    def cells(r: dict[str, Any]) -> Sequence[str]:
        at = dict(zip(r["marks"], r["errors"], strict=True))
        return r["method"], r["framework"], *(f"{at[t]:.2g}" if t in at else "–" for t in r["reported"])

    head = "method", "framework", *(f"step {t:,}" for t in rows[0]["reported"])
    return [head, *map(cells, rows)]


def by_panel(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the fits, panel by panel."""
    titles = dict.fromkeys(r["panel"] for r in result["fitting"])
    return {title: [r for r in result["fitting"] if r["panel"] == title] for title in titles}


def tables(result: dict[str, Any]) -> dict[str, Cells]:
    """All tables with their titles."""
    setup = result["setup"]
    length = f"{setup['valley_steps']:,} steps"
    title = f"Rosenbrock in {setup['dimensions']} dimensions, {length}, medians of {setup['seeds']} seeds"
    fitted = {f"{name}: ‖P H′ - I‖ of P fitted to H": fits_cells(rows) for name, rows in by_panel(result).items()}
    return {title: valley_cells(result), **fitted}


def tints(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each; of BFGS that of ink."""
    hues = cycle(map(colour, [*HUES, "bad"]))
    return {name: colour("ink") if name == BFGS else next(hues) for name in methods}


def draw(axes: Any, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """The errors of one panel: torch broad and pale, JAX dashed on top."""
    axes.set(xscale="log", yscale="log", title=title, xlabel="step")
    of = tints(list(dict.fromkeys(r["method"] for r in rows)))
    for r in rows:
        axes.plot(r["marks"], r["errors"], color=of[r["method"]], **STYLES[r["framework"]])
    for method, tint in of.items():
        axes.plot([], [], color=tint, linewidth=2.4, label=method)
    for framework, style in STYLES.items():
        axes.plot([], [], color=colour("muted"), label=framework, **style)
    ticked(axes.xaxis, *axes.get_xlim())
    ticked(axes.yaxis, *axes.get_ylim())


def ticked(axis: Any, low: float, high: float) -> None:
    """Ticks at powers of ten, every second of them where there are many."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    powers = np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    axis.set_major_locator(FixedLocator(10.0 ** powers[powers % (2 if len(powers) > 7 else 1) == 0]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(power_of_ten))


def picture(result: dict[str, Any], path: Path) -> None:
    """Write a PNG of the fits, a panel each, with one legend."""
    with png(path, (10.4, 4.4)) as figure:
        drawn = by_panel(result)
        row = figure.subplots(1, len(drawn))
        for axes, (title, rows) in zip(row, drawn.items(), strict=True):
            draw(axes, title, rows)
            quiet(axes)
            axes.get_legend().remove()
        row[0].set_ylabel("‖P H′ - I‖", color=colour("muted"))
        handles, labels = row[0].get_legend_handles_labels()
        layout = {"ncols": len(labels), "labelcolor": colour("ink"), "handlelength": 2.4, "columnspacing": 1.3}
        figure.legend(handles, labels, loc="outside lower center", **layout)
