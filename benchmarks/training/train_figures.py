"""The table and the picture of `psgd bench train`, from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import Cells
from benchmarks.training.runs import ADAMW
from benchmarks.training.tasks import LongTask
from conformance.plots import DASHES, HUES, colour, png, quiet

NEVER = "not reached"
EDGE = " (edge)"  # after a rate that is the last one tried


def percent(value: float) -> str:
    """A share, or that there is none."""
    return f"{100 * value:.0f} %" if isfinite(value) else NEVER


def cells(found: Sequence[Mapping[str, Any]], refused: Sequence[Mapping[str, Any]]) -> Cells:
    """A row for each trainer, the lowest loss first; then those that cannot be used, with their reasons."""

    def figures_of(row: Mapping[str, Any]) -> list[str]:
        loss = row["losses"][-1]
        at_an_edge = row["k"] in (min(row["tried"]), max(row["tried"]))
        lr = f"{row['lr']:.2g}" + (EDGE if at_an_edge else "")
        figures = lr, f"{len(row['tried'])}", f"{loss:.3f}" if isfinite(loss) else "astray"
        return [
            row["name"],
            *figures,
            percent(row["share"]),
            f"{row['slower']:.2f}×",
            percent(row["share"] * row["slower"]),
        ]

    head = [
        "optimizer",
        "best lr",
        "rates tried",
        "final loss",
        "steps to AdamW's",
        "seconds a step",
        "seconds to AdamW's",
    ]
    ordered = sorted(found, key=lambda row: row["losses"][-1])
    return [head, *map(figures_of, ordered), *([r["optimizer"], "–", "–", r["why"], "–", "–", "–"] for r in refused)]


def line_styles(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The line of each: AdamW in ink, the best three in strong colours, the others thin."""
    ordered = [row["name"] for row in sorted(found, key=lambda row: row["losses"][-1]) if row["name"] != ADAMW]
    strong = {name: {"color": colour(HUES[i]), "linewidth": 2.6, "zorder": 4} for i, name in enumerate(ordered[:3])}
    weak = {
        name: {"color": colour(HUES[(i + 3) % len(HUES)]), "linestyle": DASHES[i // len(HUES)], "linewidth": 1.2}
        for i, name in enumerate(ordered[3:])
    }
    return {ADAMW: {"color": colour("ink"), "linewidth": 2.6, "zorder": 5}, **strong, **weak}


def draw(pair: Sequence[Any], task: LongTask, found: Sequence[Mapping[str, Any]]) -> None:
    """Validation loss against steps and against seconds, those that go on for long cut."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    by_name = {row["name"]: row for row in found}
    adamw_row, styles = by_name[ADAMW], line_styles(found)
    for row in sorted(found, key=lambda row: row["losses"][-1]):
        marks, losses = np.asarray(row["marks"]), np.asarray(row["losses"])
        for axes, unit in zip(pair, (1.0, row["seconds"] * row["slower"]), strict=True):
            axes.plot(marks * unit, losses, label=f"{row['name']}  {losses[-1]:.3f}", **styles[row["name"]])
    final = [row["losses"][-1] for row in found if isfinite(row["losses"][-1])]
    low, high = min(final), max(*final, adamw_row["losses"][len(adamw_row["losses"]) // 8])
    for axes, unit in zip(pair, ("steps", "seconds"), strict=True):
        axes.axhline(adamw_row["losses"][-1], color=colour("muted"), linewidth=0.8, linestyle=DASHES[1])
        axes.set(yscale="log", ylim=(low * 0.98, high * 1.02), xlim=(0, None))
        axes.set(xlabel=unit, title=f"{task.title}, by {unit}")
        axes.yaxis.set_major_locator(MaxNLocator(8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        quiet(axes)
        axes.get_legend().remove()
    pair[1].set_xlim(0, 3 * adamw_row["seconds"] * task.steps)
    pair[0].set_ylabel("validation loss", color=colour("muted"))
    pair[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.02), labelcolor=colour("ink"), handlelength=2.6)


def picture(reported: Mapping[LongTask, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write a PNG: a row for each task, steps to the left and seconds to the right."""
    with png(path, (11.4, 5.0 * len(reported))) as figure:
        for pair, (task, found) in zip(
            figure.subplots(len(reported), 2, squeeze=False, sharey="row"), reported.items(), strict=True
        ):
            draw(pair, task, found)
