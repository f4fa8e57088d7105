"""The tables and the picture of `benchmarks.training.transfer`, from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import Cells
from benchmarks.training.runs import ADAMW
from benchmarks.training.search import rate
from conformance.plots import DASHES, colour, png, quiet
from psgd.methods import METHODS

TITLED = {m.title: m for m in METHODS.values()}
TINTS = "#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7"  # told apart by the colour-blind
MARKERS = "osD^vP"


def kind(name: str) -> tuple[bool, bool]:
    """Of what sort a method is: does it need a closure; does it see all parameters as one vector?"""
    recipe = TITLED[name]().recipe()
    return recipe.newton, recipe.joint and not recipe.newton


def half_decades(k: int) -> str:
    """10^(k/2) with two digits."""
    return f"{rate(k):.2g}"


def curves_cells(result: Mapping[str, Any]) -> Cells:
    """A row for each trainer: of each task the best rate, its ratio to AdamW's, the good ones and the loss."""
    tasks = dict.fromkeys(r["task"] for r in result["curves"])
    by = {(r["optimizer"], r["task"]): r for r in result["curves"]}

    def cells(r: Mapping[str, Any] | None) -> Sequence[str]:
        if r is None:
            return ("–",) * 4
        low, high = map(half_decades, r["good"])
        ratio = half_decades(r["best"] - r["adamw"])
        return (
            half_decades(r["best"]),
            f"{ratio}×",
            f"{low} to {high}" if low != high else low,
            f"{min(r['losses']):.3f}",
        )

    head = ["optimizer"] + [f"{task}: {word}" for task in tasks for word in ("best lr", "ratio", "within 5%", "loss")]
    names = dict.fromkeys(r["optimizer"] for r in result["curves"])
    return [head] + [[name, *(c for task in tasks for c in cells(by.get((name, task))))] for name in names]


def decay_cells(result: Mapping[str, Any]) -> Cells:
    """A row for each optimizer and rate: the weights' length over that without decay, and the loss, either way."""
    variants = {"same": "same weight_decay", "product": "same lr × weight_decay"}
    head = ["optimizer", "lr", "loss without"] + [
        f"{variant}: {x}" for variant in variants.values() for x in ("length", "loss")
    ]
    return [
        head,
        *(
            [r["optimizer"], half_decades(r["k"]), f"{r['without']:.3f}"]
            + [f"{r[variant][x]:.{digits}f}" for variant in variants for x, digits in (("length", 2), ("loss", 3))]
            for r in result["decay"]
        ),
    ]


def tables(result: Mapping[str, Any]) -> dict[str, Cells]:
    """All tables with their titles."""
    steps = result["setup"]["steps"]
    return {
        f"Final validation loss after {steps} steps, by learning rate": curves_cells(result),
        f"Length of the weights, over that without weight decay, and loss after {steps} steps": decay_cells(result),
    }


def line_style(name: str) -> dict[str, Any]:
    """The line of an optimizer: of all parameters as one vector dashed, of Newton's criterion dotted."""
    if name == ADAMW:
        return {"color": colour("ink"), "linewidth": 3.4, "zorder": 5}
    newton, whole = kind(name)
    i = [other for other in TITLED if kind(other) == (newton, whole)].index(name)
    marked = {"marker": MARKERS[i], "markersize": 6.5, "markeredgewidth": 0.6, "markeredgecolor": colour("paper")}
    line = DASHES[1] if newton else DASHES[0] if whole else "-"
    return {"color": TINTS[i], "linestyle": line, "linewidth": 1.7, **marked}


def shown(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """One row of each name, that with momentum where there are two; AdamW, then sort by sort."""
    by_name = {r["optimizer"].split(",")[0]: r for r in rows}
    return {name: by_name[name] for name in sorted(by_name, key=lambda name: () if name == ADAMW else kind(name))}


def draw(axes: Any, task: str, result: Mapping[str, Any]) -> None:
    """Losses over those of AdamW at its best."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    rows = shown([r for r in result["curves"] if r["task"] == task])
    for name, r in rows.items():
        x = np.asarray(r["rates"]) / rate(r["adamw"])
        axes.plot(x, np.asarray(r["losses"]) / min(rows[ADAMW]["losses"]), label=name, **line_style(name))
    title = f"{task}, by a small {result['models'][task]}"
    axes.set(xscale="log", title=title, xlabel="learning rate / AdamW's best", xlim=(0.025, 40), ylim=(0.92, 1.36))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def picture(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: a panel for each task, with one legend."""
    with png(path, (10.4, 4.4)) as figure:
        tasks = list(dict.fromkeys(r["task"] for r in result["curves"]))
        row = figure.subplots(1, len(tasks), sharey=True)
        for axes, task in zip(row, tasks, strict=True):
            draw(axes, task, result)
            quiet(axes)
            axes.get_legend().remove()
        row[0].set_ylabel("validation loss / AdamW's best", color=colour("muted"))
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", labelcolor=colour("ink"), handlelength=3.2)
