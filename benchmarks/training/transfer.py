"""From AdamW to PSGD in PyTorch: the learning rates and the weight decay that carry over, measured.

    python -m benchmarks.training.transfer [--json FILE] [--picture FILE.png] [--markdown] [--quick]

Two small real tasks: images of digits for a convolutional net, and the source of Python's own library, character by
character, for a transformer of one layer. Every optimizer starts from the same weights and sees the same batches; its
learning rate falls to zero along a half cosine, without warm-up. Rates are half a decade apart and are tried outward,
from the method's default and from AdamW's best, until the final validation loss is well above the best on either side.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from math import inf, isfinite, log10
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import psgd_torch_backend
from benchmarks.tables import Cells, machine, tables_and_picture
from conformance.plots import DASHES, colour, png, quiet
from psgd.hyperparameters import Method
from psgd.kron import Kronecker
from psgd.methods import METHODS

TITLED = {m.title: m for m in METHODS.values()}
GOOD, SEEN = 1.05, 1.10  # of the best loss: what still counts as good, and how far rates are tried
LOWEST, HIGHEST = -12, 2  # rates are 10^(k/2) of these k
MOMENTUM = 0.9  # of methods that have none by default
WEIGHT_DECAY = 0.01  # while rates are tried: AdamW's default
ADAMW = "AdamW"
DECAYED, DECAYING = 0.75, 2  # the sum of lr * weight_decay over a run that measures it, and of how many methods
FILES = ("argparse", "dataclasses", "inspect", "pathlib", "statistics", "tarfile", "typing"), "textwrap"
TINTS = "#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7"  # told apart by the colour-blind
MARKERS = "osD^vP"
CHARACTERS, CONTEXT = 97, 32  # ASCII from the space on, and the end of a line; at a time


def kind(name: str) -> tuple[bool, bool]:
    """Of what sort a method is: does it need a closure; does it see all parameters as one vector?"""
    recipe = TITLED[name]().recipe()
    return recipe.newton, recipe.joint and not recipe.newton


@dataclass(frozen=True)
class Setup:
    """How much is run. tried: the number of rates after which a search ends, wherever it is."""

    steps: int = 150
    methods: tuple[str, ...] = tuple(METHODS)
    tried: int = 16
    repeated: bool = True


FIRST_OF_ITS_KIND = {kind(METHODS[name].title): name for name in reversed(METHODS)}
QUICK = Setup(steps=4, methods=tuple(FIRST_OF_ITS_KIND.values()), tried=2, repeated=False)


# ---- tasks -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """batch: inputs and targets; held: those of validation.

    seeds: of weights and batches; losses are averaged over them. smoothing: of the targets, in training and validation.
    newton: are methods tried that need a closure?
    """

    name: str
    by: str
    model: Callable[[], nn.Module]
    batch: Callable[[np.random.Generator], tuple[Tensor, Tensor]]
    held: Callable[[], tuple[Tensor, Tensor]]
    seeds: int = 1
    smoothing: float = 0.0
    newton: bool = False


@lru_cache
def images() -> tuple[Tensor, Tensor]:
    """All digits, 1 x 8 x 8 each, and what they are; in an order in which the last are like the others."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return torch.tensor(x[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y[order])


def net() -> nn.Module:
    """Two convolutions and a head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


TRAINED = 1200  # images; the other 597 are held out


def some_images(random: np.random.Generator, count: int = 100) -> tuple[Tensor, Tensor]:
    """A batch."""
    chosen = torch.tensor(random.choice(TRAINED, count, replace=False))
    return images()[0][chosen], images()[1][chosen]


def held_images() -> tuple[Tensor, Tensor]:
    """Those that are not trained on."""
    return images()[0][TRAINED:], images()[1][TRAINED:]


@lru_cache
def source(names: Sequence[str]) -> Tensor:
    """Source of Python's own library as whole numbers below `CHARACTERS`."""
    folder = Path(os.__file__).parent
    paths = [next(p for p in (folder / f"{n}.py", folder / n / "__init__.py") if p.is_file()) for n in names]
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    return torch.tensor([0 if c == "\n" else (ord(c) - 31) % CHARACTERS for c in text])


class Transformer(nn.Module):
    """One layer over the characters seen so far."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.position = nn.Embedding(CONTEXT, width)
        look: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, **look)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next character, with its axis second, as `cross_entropy` has it."""
        later = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        hidden = self.layer(self.embedding(x) + self.position.weight, src_mask=later)
        return self.head(self.norm(hidden)).mT


def windows(text: Tensor, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Characters and those that follow."""
    cut = text[torch.tensor(starts)[:, None] + torch.arange(CONTEXT + 1)]
    return cut[:, :-1], cut[:, 1:]


def some_source(random: np.random.Generator, count: int = 16) -> tuple[Tensor, Tensor]:
    """A batch."""
    text = source(FILES[0])
    return windows(text, random.integers(len(text) - CONTEXT, size=count))


def held_source() -> tuple[Tensor, Tensor]:
    """Of a file of its own, all of it."""
    text = source(FILES[1:])
    return windows(text, np.arange(0, len(text) - CONTEXT, CONTEXT))


TASKS = (
    Task("digits", "convolutional net", net, some_images, held_images, seeds=2, smoothing=0.1, newton=True),
    Task("characters", "transformer", Transformer, some_source, held_source),
)


# ---- runs ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Contender:
    """An optimizer: AdamW, or a method with its defaults but for `given`."""

    name: str
    given: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        """The name, with what was given."""
        return self.name + "".join(f", {name}={value:g}" for name, value in self.given)

    @property
    def method(self) -> Method | None:
        """The method; None of AdamW."""
        return TITLED[self.name]() if self.name in TITLED else None

    @property
    def newton(self) -> bool:
        """Does it need a closure?"""
        return self.method is not None and self.method.recipe().newton

    @property
    def default(self) -> float:
        """Its default learning rate."""
        return 1e-3 if self.method is None else self.method.lr

    def made(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of a model."""
        where = torch.optim if self.method is None else psgd_torch_backend
        return getattr(where, self.name)(model.parameters(), lr=lr, weight_decay=weight_decay, **dict(self.given))


def contenders(setup: Setup) -> list[Contender]:
    """AdamW, then the methods; those without momentum by default also with some, Newton's only so.

    A matrix of all parameters is none of them: on thousands of parameters it is not quick.
    """
    found = [Contender(ADAMW)]
    for method in (METHODS[name] for name in setup.methods):
        recipe, names = method().recipe(), {f.name for f in fields(method)}
        if recipe.joint and isinstance(recipe.preconditioner, Kronecker):
            continue
        plain = not recipe.momentum and "momentum" in names
        found += [] if recipe.newton else [Contender(method.title)]
        found += [Contender(method.title, (("momentum", MOMENTUM),))] if plain else []
    return found


def trained(task: Task, contender: Contender, lr: float, weight_decay: float, steps: int, seed: int) -> np.ndarray:
    """The final validation loss and the length of all weights but biases; infinities where a run went astray."""
    random = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.model()
    optimizer = contender.made(model, lr, weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=task.smoothing)

    for _ in range(steps):
        batch = task.batch(random)
        try:
            if contender.newton:
                closure: Any = partial(loss, batch)
                optimizer.step(closure)
            else:
                optimizer.zero_grad()
                loss(batch).backward()
                optimizer.step()
        except FloatingPointError:
            return np.asarray([inf, inf])
        schedule.step()
    with torch.no_grad():
        length = torch.stack([p.norm() for p in model.parameters() if p.ndim > 1]).norm()
        figures = loss(task.held()).item(), length.item()
    return np.asarray(figures if isfinite(figures[0]) else (inf, inf))


def averaged(task: Task, contender: Contender, lr: float, weight_decay: float, setup: Setup) -> np.ndarray:
    """The same, averaged over seeds."""
    runs = [
        trained(task, contender, lr, weight_decay, setup.steps, seed)
        for seed in range(task.seeds if setup.repeated else 1)
    ]
    return np.mean(runs, axis=0)


# ---- rates -----------------------------------------------------------------------------
def rate(k: int) -> float:
    """10^(k/2)."""
    return 10 ** (k / 2)


def nearest(lr: float) -> int:
    """The k of the nearest rate."""
    return round(2 * log10(lr))


def searched(loss: Callable[[int], float], begun: Sequence[int], tried: int) -> dict[int, float]:
    """Losses by k, from all between those begun outward until they are no longer near the best, or are `tried` many."""
    seen = {k: loss(k) for k in range(min(begun), max(begun) + 1)}
    while len(seen) < tried:
        edges = {min(seen): min(seen) - 1, max(seen): max(seen) + 1}
        bound = SEEN * min(seen.values())
        further = [new for k, new in edges.items() if seen[k] <= bound and LOWEST <= new <= HIGHEST]
        if not further:
            break
        seen[further[0]] = loss(further[0])
    return dict(sorted(seen.items()))


def loss_at(task: Task, contender: Contender, setup: Setup, k: int) -> float:
    """Of a rate."""
    return float(averaged(task, contender, rate(k), WEIGHT_DECAY, setup)[0])


def best(seen: Mapping[Any, float]) -> Any:
    """Where the loss is least."""
    return min(seen, key=seen.__getitem__)


def good(seen: Mapping[int, float]) -> list[int]:
    """The unbroken range around the best that is nearly as good."""
    low = high = best(seen)
    while seen.get(low - 1, inf) <= GOOD * seen[best(seen)]:
        low -= 1
    while seen.get(high + 1, inf) <= GOOD * seen[best(seen)]:
        high += 1
    return [low, high]


def curves(setup: Setup, progress: Console) -> list[dict[str, Any]]:
    """A row for each task and contender: losses by rate, the best of them and the range of those that are good."""
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        adamw = None
        for contender in contenders(setup):
            if contender.newton and not task.newton:
                continue
            begun = [nearest(contender.default), nearest(contender.default) if adamw is None else adamw]
            seen = searched(partial(loss_at, task, contender, setup), begun, setup.tried)
            adamw = best(seen) if adamw is None else adamw
            row = {"task": task.name, "optimizer": contender.label, "rates": list(map(rate, seen))}
            row |= {"losses": list(seen.values()), "best": best(seen), "good": good(seen), "adamw": adamw}
            rows.append(row)
            losses = " ".join(f"{rate(k):.0e}: {v:.3f}" for k, v in seen.items())
            progress.log(f"{task.name}, {contender.label}: {losses}")
    return rows


# ---- weight decay ----------------------------------------------------------------------
def decaying(rows: Sequence[Mapping[str, Any]], among: Sequence[Contender]) -> list[Contender]:
    """AdamW, and the best methods that need no closure, those first whose best rate is another than AdamW's."""
    row = {r["optimizer"]: r for r in rows}

    def order(contender: Contender) -> tuple[bool, float]:
        r = row[contender.label]
        return r["best"] == r["adamw"], min(r["losses"])

    methods = [c for c in among if c.method is not None and not c.newton]
    return [c for c in among if c.method is None] + sorted(methods, key=order)[:DECAYING]


def decays(found: Sequence[Mapping[str, Any]], setup: Setup, progress: Console) -> list[dict[str, Any]]:
    """Weight decay on the first task: AdamW's carried over as it is, and as its product with the rate.

    At the best rate of each, and half a decade below. `length`: of the weights, over that without decay.
    """
    task, rows = TASKS[0], []
    there = [r for r in found if r["task"] == task.name]
    own = {r["optimizer"]: r["best"] for r in there}
    product = DECAYED / (setup.steps / 2)
    for contender in decaying(there, contenders(setup)):
        progress.log(f"{task.name}, {contender.label}: weight decay")
        for k in (own[contender.label], own[contender.label] - 1):
            plain = averaged(task, contender, rate(k), 0.0, setup)
            row = {"optimizer": contender.label, "k": k, "without": float(plain[0])}
            for way, weight_decay in (("same", product / rate(own[ADAMW])), ("product", product / rate(k))):
                loss, length = averaged(task, contender, rate(k), weight_decay, setup)
                row[way] = {"weight_decay": weight_decay, "loss": float(loss), "length": float(length / plain[1])}
            rows.append(row)
    return rows


# ---- what is told ----------------------------------------------------------------------
def measure(setup: Setup, progress: Console) -> dict[str, Any]:
    """All figures, as plain data."""
    found = curves(setup, progress)
    return {
        "machine": machine(),
        "setup": asdict(setup),
        "curves": found,
        "decay": decays(found, setup, progress),
    }


def half_decades(k: int) -> str:
    """10^(k/2) with two digits."""
    return f"{rate(k):.2g}"


def curves_cells(result: Mapping[str, Any]) -> Cells:
    """A row for each contender: of each task the best rate, its ratio to AdamW's, the good ones and the loss."""
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
    ways = {"same": "same weight_decay", "product": "same lr × weight_decay"}
    head = ["optimizer", "lr", "loss without"] + [f"{way}: {x}" for way in ways.values() for x in ("length", "loss")]
    return [
        head,
        *(
            [r["optimizer"], half_decades(r["k"]), f"{r['without']:.3f}"]
            + [f"{r[way][x]:.{digits}f}" for way in ways for x, digits in (("length", 2), ("loss", 3))]
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


def look(name: str) -> dict[str, Any]:
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
    own = {r["optimizer"].split(",")[0]: r for r in rows}
    return {name: own[name] for name in sorted(own, key=lambda name: () if name == ADAMW else kind(name))}


def draw(axes: Any, task: str, result: Mapping[str, Any]) -> None:
    """Losses over those of AdamW at its best."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    rows = shown([r for r in result["curves"] if r["task"] == task])
    for name, r in rows.items():
        x = np.asarray(r["rates"]) / rate(r["adamw"])
        axes.plot(x, np.asarray(r["losses"]) / min(rows[ADAMW]["losses"]), label=name, **look(name))
    title = f"{task}, by a small {next(t.by for t in TASKS if t.name == task)}"
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.transfer", description="Rates that carry over."
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw losses by rate here, as a PNG")
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables as docs/from-adamw-in-pytorch.md has them"
    )

    def measured(console: Console, *, quick: bool) -> dict[str, Any]:
        return measure(QUICK if quick else Setup(), console)

    tables_and_picture(parser, measured, tables, picture, 150, arguments)


if __name__ == "__main__":
    main()
