"""Real tasks: every method beside AdamW, Muon and SOAP, each at the learning rate that a small search found for it.

    psgd bench train [--task lm|digits] [--json FILE] [--resume FILE] [--only-seconds] [--markdown] [--plot FILE.png]
                     [--quick]

All start from the same weights and see the same batches. The rate rises over the first steps and falls to zero along a
line; weight decay takes the same share of the weights from all, at any rate. Rates are half a decade apart and are
tried over a quarter of the steps: the same four by everyone, then one more for as long as the best is at an edge, two
at most. The best two are then run in full, and the better of these is shown. A run is kept as soon as it is over, so
that `--resume` goes on where another command was ended; resuming one that is complete only tells and draws.

Seconds are taken apart from all this, in races: everyone trains a few steps in turn, under a schedule as a whole run
has, so that a drift of the machine meets all alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, nan
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.racing import turns
from benchmarks.tables import tell_table
from benchmarks.training import gpt
from benchmarks.training.records import Missing, Records, read
from benchmarks.training.runs import ADAMW, Trainer, Training, Unfit
from benchmarks.training.search import EdgeSearch, best, rate, searched
from benchmarks.training.tasks import LongTask, Task, held_images, some_images
from benchmarks.training.train_figures import cells, picture
from benchmarks.training.trainers import trainers
from conformance.terminal import console, known, refuse, writable

PRODUCT = 3e-4  # of learning rate and weight decay: what a step takes of each weight at the full rate
WARM = 1 / 10  # of the steps: while the rate rises


@dataclass(frozen=True)
class Races:
    """How many, of how many steps; the first steps are not counted."""

    count: int = 3
    steps: int = 24
    uncounted: int = 2


def small_net() -> nn.Module:
    """Two convolutions, a layer and a head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10)),
    )


def tasks(*, tiny: bool = False) -> dict[str, LongTask]:
    """By name."""
    size = gpt.Size(layers=1, width=8, heads=2, context=8, batch=4, held=4) if tiny else gpt.Size()

    length: dict[str, Any] = {"steps": 6, "tried": 2} if tiny else {"steps": 300, "tried": 75}
    language = LongTask(
        name="lm",
        title="Language model",
        model=partial(gpt.GPT, size),
        batch=partial(gpt.batch, size=size),
        held=partial(gpt.validation, size),
        **length,
    )
    digits = LongTask(
        name="digits",
        title="Digits",
        model=small_net,
        batch=partial(some_images, count=200),
        held=held_images,
        seeds=1 if tiny else 3,
        smoothing=0.1,
        **length,
    )
    return {task.name: task for task in (language, digits)}


# ---- training --------------------------------------------------------------------------
def share(t: int, steps: int) -> float:
    """Of the full rate, at a step counted from 0: up along a line, then down along one to zero."""
    return min((t + 1) / (WARM * steps), 1.0) * (steps - t) / steps


def begun(task: Task, trainer: Trainer, lr: float, steps: int, seed: int = 0) -> Training:
    """A run at its start: the same share of the weights is taken from all, and the rate follows `share`."""
    learning_rates = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=partial(share, steps=steps))
    return Training(task, trainer, lr, PRODUCT / lr, steps, learning_rates, seed)


def trained(task: Task, trainer: Trainer, lr: float, steps: int, seed: int, marks: Sequence[int]) -> list[float]:
    """Validation losses after the steps that are marked; infinite from where a run went astray."""
    run, losses = begun(task, trainer, lr, steps, seed), []
    for t in range(1, steps + 1):
        try:
            run.step()
        except FloatingPointError:  # too many steps were skipped
            break
        if t in marks:
            losses.append(run.validation())
            if losses[-1] == inf:
                break
    return losses + [inf] * (len(marks) - len(losses))


# ---- what is kept ----------------------------------------------------------------------
def as_loss(value: float | None) -> float:
    """A loss as it was before JSON, which has no infinity."""
    return inf if value is None else value


def losses_of(records: Records, task: LongTask, trainer: Trainer, lr: float, steps: int, seed: int, count: int) -> Any:
    """Marks and losses of a run: of one that was made before, or of a new one."""
    settings = json.loads(json.dumps(trainer.settings))
    key = {"task": task.name, "optimizer": trainer.name, "settings": settings, "steps": steps, "seed": seed, "lr": lr}
    record = next((r for r in records.found("runs") if all(r[name] == value for name, value in key.items())), None)
    if record is None and records.closed:
        raise Missing
    if record is None:
        marks = sorted({max(1, round(steps * (i + 1) / count)) for i in range(count)})
        losses = trained(task, trainer, lr, steps, seed, marks)
        record = records.add("runs", {**key, "marks": marks, "losses": losses})
        console(stderr=True).print(f"{task.name}, {trainer.name}: {steps} steps at {lr:.2g}: {losses[-1]:.4f}")
    return record["marks"], list(map(as_loss, record["losses"]))


# ---- the search ------------------------------------------------------------------------
def row_of(records: Records, task: LongTask, trainer: Trainer, search: EdgeSearch) -> dict[str, Any]:
    """The search of one trainer and the best curve of its finals, averaged over seeds."""

    def run(k: int, steps: int, seed: int, count: int) -> tuple[list[int], list[float]]:
        return losses_of(records, task, trainer, rate(k), steps, seed, count)

    tried = searched(lambda k: run(k, task.tried, 0, 1)[1][-1], search.begun, search)
    finals = {}
    for k in sorted(tried, key=tried.__getitem__)[: search.finals]:
        runs = [run(k, task.steps, seed, task.marks) for seed in range(task.seeds)]
        finals[k] = runs[0][0], np.mean([losses for _, losses in runs], axis=0).tolist()
    k = best({k: losses[-1] for k, (_, losses) in finals.items()})
    marks, losses = finals[k]
    return {"name": trainer.name, "tried": tried, "k": k, "lr": rate(k), "marks": marks, "losses": losses}


# ---- seconds ---------------------------------------------------------------------------
def race(task: LongTask, rows: Sequence[Mapping[str, Any]], races: Races) -> dict[str, float]:
    """Seconds a step of everyone, averages over a short run in which all take turns, in changing order.

    They are the processor's, of one thread: what others do on the machine is not in them.
    """
    entrants = {c.name: c for c in trainers()}
    steps = races.uncounted + races.steps
    runs = {row["name"]: begun(task, entrants[row["name"]], row["lr"], steps) for row in rows}
    seconds = {name: np.zeros(steps) for name in runs}
    for t in range(steps):
        for name in turns(list(runs), t):
            start = process_time()
            runs[name].step()
            seconds[name][t] = process_time() - start
    return {name: float(times[races.uncounted :].mean()) for name, times in seconds.items()}


def raced(records: Records, task: LongTask, rows: Sequence[Mapping[str, Any]], races: Races) -> list[dict[str, float]]:
    """Seconds a step of everyone in each race: those that are kept, if everyone was in them, and new ones."""
    names = {row["name"] for row in rows}
    for record in list(records.found("races", task=task.name)):
        if record["seconds"].keys() != names:
            records.drop("races", **record)
    while len(before := list(records.found("races", task=task.name))) < races.count:
        records.add("races", {"task": task.name, "number": len(before), "seconds": race(task, rows, races)})
        console(stderr=True).print(f"{task.name}: race {len(before) + 1} of {races.count}")
    return [record["seconds"] for record in before]


# ---- one task --------------------------------------------------------------------------
def reached(marks: Sequence[float], losses: Sequence[float], target: float) -> float:
    """The step at which a curve first comes down to a loss, between two marks along a line; NaN if never."""
    for i, loss in enumerate(losses):
        if loss <= target < inf:
            if i == 0 or not isfinite(losses[i - 1]):
                return float(marks[i])
            part = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return marks[i - 1] + part * (marks[i] - marks[i - 1])
    return nan


def rows_of(records: Records, task: LongTask, search: EdgeSearch) -> list[dict[str, Any]]:
    """A row for everyone who can be used. The others are kept with their reasons."""
    found = []
    for trainer in trainers():
        who = {"task": task.name, "optimizer": trainer.name}
        try:
            found.append(row_of(records, task, trainer, search))
        except Missing:
            continue
        except Exception as error:
            if not (trainer.foreign or isinstance(error, Unfit)):
                raise
            records.drop("refused", **who)
            records.add("refused", {**who, "why": str(error) if isinstance(error, Unfit) else repr(error)})
        else:
            records.drop("refused", **who)
    return found


def compared(records: Records, task: LongTask, search: EdgeSearch, races: Races) -> list[dict[str, Any]]:
    """The rows, AdamW's first, with steps and seconds to its final loss, as shares of its own."""
    found = rows_of(records, task, search)
    if [row["name"] for row in found[:1]] != [ADAMW]:
        raise Missing(f"{task.name}: there are no runs of {ADAMW}, which all are compared with")
    seconds = raced(records, task, found, races)
    first = found[0]
    for row in found:
        row["seconds"] = float(np.median([by_name[ADAMW] for by_name in seconds]))
        row["slower"] = float(np.median([by_name[row["name"]] / by_name[ADAMW] for by_name in seconds]))
        row["share"] = reached(row["marks"], row["losses"], first["losses"][-1]) / task.steps
    return found


# ---- the command -----------------------------------------------------------------------
@contextmanager
def plainly() -> Iterator[None]:
    """On one thread, and with nobody's code compiled."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_num_threads(before)


def command(
    task: Annotated[str | None, typer.Option(help="lm or digits; both by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run?")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all figures to this file, run by run.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Go on from the figures in this file, and keep it up to date.")
    ] = None,
    only_seconds: Annotated[
        bool, typer.Option("--only-seconds", help="With --resume: take the seconds anew, and train nothing.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as docs/training.md has them.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw losses here, as a PNG.")] = None,
) -> None:
    """Train real tasks with every method, AdamW, Muon and SOAP, each at its best learning rate, and compare them."""
    every = tasks(tiny=quick)
    wanted = list(every.values()) if task is None else [every[known("task", task, every)]]
    if only_seconds and resume is None:
        refuse("--only-seconds needs the runs that --resume names")
    writable(json_file, resume, plot)
    records = Records(json_file or resume, read(resume) if resume else None, closed=only_seconds)
    search, races = (EdgeSearch((-5, -4), 1, 1), Races(1, 2, 1)) if quick else (EdgeSearch(), Races())
    reported: dict[LongTask, list[dict[str, Any]]] = {}
    out = console()
    with plainly():
        for each in wanted:
            if only_seconds:
                records.drop("races", task=each.name)
            try:
                reported[each] = compared(records, each, search, races)
            except (Missing, Unfit) as error:
                refuse(str(error))
    for each, found in reported.items():
        table = cells(found, list(records.found("refused", task=each.name)))
        title = f"{each.title}, {each.steps} steps"
        tell_table(title, table, out, as_markdown=markdown)
    if plot:
        picture(reported, plot)


if __name__ == "__main__":
    typer.run(command)
