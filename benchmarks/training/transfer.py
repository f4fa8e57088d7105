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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.tables import machine, tables_and_picture
from benchmarks.training.runs import ADAMW, Trainer, Training, of_method
from benchmarks.training.search import OutwardSearch, best, good, nearest, rate, searched
from benchmarks.training.tasks import Task, held_images, some_images
from benchmarks.training.transfer_figures import kind, picture, tables
from psgd.hyperparameters import Method
from psgd.kron import Kronecker
from psgd.methods import METHODS

MOMENTUM = 0.9  # of methods that have none by default
WEIGHT_DECAY = 0.01  # while rates are tried: AdamW's default
DECAYED, DECAYING = 0.75, 2  # the sum of lr * weight_decay over a run that measures it, and of how many methods
FILES = ("argparse", "dataclasses", "inspect", "pathlib", "statistics", "tarfile", "typing"), "textwrap"
CHARACTERS, CONTEXT = 97, 32  # ASCII from the space on, and the end of a line; at a time


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
def wide_net() -> nn.Module:
    """Two convolutions and a head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


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
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, **options)
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
    Task(
        name="digits",
        title="convolutional net",
        model=wide_net,
        batch=some_images,
        held=held_images,
        seeds=2,
        smoothing=0.1,
    ),
    Task(
        name="characters",
        title="transformer",
        model=Transformer,
        batch=some_source,
        held=held_source,
        newton=False,
    ),
)


# ---- runs ------------------------------------------------------------------------------
def adamw() -> Trainer:
    """AdamW with its defaults."""
    return Trainer(ADAMW, lambda model, lr, decay, _: [torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)])


def ours(method: type[Method], **settings: float) -> Trainer:
    """A method with its defaults but for some."""
    return of_method(method, lambda steps: settings, settings)


def trainers(setup: Setup) -> list[Trainer]:
    """AdamW, then the methods; those without momentum by default also with some, Newton's only so.

    A matrix of all parameters is none of them: on thousands of parameters it is not quick.
    """
    found = [adamw()]
    for method in (METHODS[name] for name in setup.methods):
        recipe, names = method().recipe(), {f.name for f in fields(method)}
        if recipe.joint and isinstance(recipe.preconditioner, Kronecker):
            continue
        plain = not recipe.momentum and "momentum" in names
        found += [] if recipe.newton else [ours(method)]
        found += [ours(method, momentum=MOMENTUM)] if plain else []
    return found


def trained(task: Task, trainer: Trainer, lr: float, weight_decay: float, steps: int, seed: int) -> np.ndarray:
    """The final validation loss and the length of all weights but biases; infinities where a run went astray."""
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    run = Training(task, trainer, lr, weight_decay, steps, cosine, seed)
    try:
        for _ in range(steps):
            run.step()
    except FloatingPointError:
        return np.asarray([inf, inf])
    with torch.no_grad():
        length = torch.stack([p.norm() for p in run.model.parameters() if p.ndim > 1]).norm()
    loss = run.validation()
    return np.asarray((loss, length.item()) if isfinite(loss) else (inf, inf))


def averaged(task: Task, trainer: Trainer, lr: float, weight_decay: float, setup: Setup) -> np.ndarray:
    """The same, averaged over seeds."""
    runs = [
        trained(task, trainer, lr, weight_decay, setup.steps, seed)
        for seed in range(task.seeds if setup.repeated else 1)
    ]
    return np.mean(runs, axis=0)


# ---- rates -----------------------------------------------------------------------------
def loss_at(task: Task, trainer: Trainer, setup: Setup, k: int) -> float:
    """Of a rate."""
    return float(averaged(task, trainer, rate(k), WEIGHT_DECAY, setup)[0])


def curves(setup: Setup, progress: Console) -> list[dict[str, Any]]:
    """A row for each task and trainer: losses by rate, the best of them and the range of those that are good."""
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        adamw_k: int | None = None
        for trainer in trainers(setup):
            if trainer.newton and not task.newton:
                continue
            ends = sorted({nearest(trainer.default), nearest(trainer.default) if adamw_k is None else adamw_k})
            begun = range(ends[0], ends[-1] + 1)
            losses = searched(partial(loss_at, task, trainer, setup), begun, OutwardSearch(setup.tried))
            adamw_k = best(losses) if adamw_k is None else adamw_k
            row: dict[str, Any] = {"task": task.name, "optimizer": trainer.label, "rates": list(map(rate, losses))}
            row |= {"losses": list(losses.values()), "best": best(losses), "good": good(losses), "adamw": adamw_k}
            rows.append(row)
            listed = " ".join(f"{rate(k):.0e}: {loss:.3f}" for k, loss in losses.items())
            progress.log(f"{task.name}, {trainer.label}: {listed}")
    return rows


# ---- weight decay ----------------------------------------------------------------------
def decaying(rows: Sequence[Mapping[str, Any]], among: Sequence[Trainer]) -> list[Trainer]:
    """AdamW, and the best methods that need no closure, those first whose best rate is another than AdamW's."""
    row = {r["optimizer"]: r for r in rows}

    def order(trainer: Trainer) -> tuple[bool, float]:
        r = row[trainer.label]
        return r["best"] == r["adamw"], min(r["losses"])

    methods = [c for c in among if c.method is not None and not c.newton]
    return [c for c in among if c.method is None] + sorted(methods, key=order)[:DECAYING]


def decays(found: Sequence[Mapping[str, Any]], setup: Setup, progress: Console) -> list[dict[str, Any]]:
    """Weight decay on the first task: AdamW's carried over as it is, and as its product with the rate.

    At the best rate of each, and half a decade below. `length`: of the weights, over that without decay.
    """
    task, rows = TASKS[0], []
    of_task = [r for r in found if r["task"] == task.name]
    best_k = {r["optimizer"]: r["best"] for r in of_task}
    product = DECAYED / (setup.steps / 2)
    for trainer in decaying(of_task, trainers(setup)):
        progress.log(f"{task.name}, {trainer.label}: weight decay")
        for k in (best_k[trainer.label], best_k[trainer.label] - 1):
            plain = averaged(task, trainer, rate(k), 0.0, setup)
            row = {"optimizer": trainer.label, "k": k, "without": float(plain[0])}
            for variant, weight_decay in (("same", product / rate(best_k[ADAMW])), ("product", product / rate(k))):
                loss, length = averaged(task, trainer, rate(k), weight_decay, setup)
                row[variant] = {"weight_decay": weight_decay, "loss": float(loss), "length": float(length / plain[1])}
            rows.append(row)
    return rows


# ---- what is reported ----------------------------------------------------------------------
def measure(setup: Setup, progress: Console) -> dict[str, Any]:
    """All figures, as plain data."""
    found = curves(setup, progress)
    return {
        "machine": machine(),
        "setup": asdict(setup),
        "models": {task.name: task.title for task in TASKS},
        "curves": found,
        "decay": decays(found, setup, progress),
    }


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
