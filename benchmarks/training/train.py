"""Real tasks: every method beside AdamW, Muon and SOAP, each at the learning rate that a small search found for it.

    psgd bench train [--task lm|digits] [--json FILE] [--resume FILE] [--only-seconds] [--markdown] [--plot FILE.png]
                     [--quick]

All start from the same weights and see the same batches. The rate rises over the first steps and falls to zero along a
line; weight decay takes the same share of the weights from all, at any rate. Rates are half a decade apart and are
tried over a quarter of the steps: the same four by everyone, then one more for as long as the best is at an edge, two
at most. The best two are then run in full, and the better of these is told. A run is kept as soon as it is over, so
that `--resume` goes on where another command was ended; resuming one that is complete only tells and draws.

Seconds are taken apart from all this, in races: everyone trains a few steps in turn, under a schedule as a whole run
has, so that a drift of the machine meets all alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from math import inf, isfinite, nan
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

import psgd_torch_backend
from benchmarks.racing import turns
from benchmarks.tables import Cells, machine, tell_table
from benchmarks.training import gpt
from benchmarks.training.transfer import ADAMW, best, held_images, rate, some_images
from conformance.plots import DASHES, HUES, colour, png, quiet
from conformance.terminal import console, known, refuse, writable, write_json
from psgd.hyperparameters import Method
from psgd.kron import Kronecker
from psgd.methods import METHODS
from psgd.schedule import Annealed
from psgd.summary import Parameter, rows

PRODUCT = 3e-4  # of learning rate and weight decay: what a step takes of each weight at the full rate
WARM = 1 / 10  # of the steps: while the rate rises
LARGEST = 2e9  # bytes of state that an optimizer may have
NEVER = "not reached"
EDGE = " (edge)"  # after a rate that is the last one tried

# What is chosen of the hyperparameters, of each method that has one of that name. A function is of the number of steps.
CHOSEN: Mapping[str, Any] = {
    "momentum": 0.9,
    "whiten_grad": False,
    "lr_preconditioner": 0.5,
    "preconditioner_lr": 0.7,
    "exact_hessian_vector_product": False,
    "preconditioner_update_probability": lambda steps: Annealed(1.0, 0.1, decay=7 / steps, flat_start=steps // 3),
}
# Where each factor would get all of the automatic scale: matrices run away.
UNSPLIT = {"preconditioner_init_scale": 1.0}


@dataclass(frozen=True)
class Task:
    """What is trained, and how long. held: inputs and targets of validation. smoothing: of the targets, of both.

    tried: steps while rates are tried. marks: how often a full run is validated. seeds: full runs, which are averaged.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[np.random.Generator], tuple[Tensor, Tensor]]
    held: Callable[[], tuple[Tensor, Tensor]]
    steps: int
    tried: int
    marks: int = 20
    seeds: int = 1
    smoothing: float = 0.0


@dataclass(frozen=True)
class Search:
    """Rates are 10^(k/2): those k that are tried, and how many more, one at a time, where the best is at an edge.

    finals: how many of the best are run in full.
    """

    begun: tuple[int, ...] = (-6, -5, -4, -3)
    more: int = 2
    finals: int = 2


@dataclass(frozen=True)
class Races:
    """How many, of how many steps; the first steps are not counted."""

    count: int = 3
    steps: int = 24
    uncounted: int = 2


def net() -> nn.Module:
    """Two convolutions, a layer and a head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10)),
    )


def tasks(*, tiny: bool = False) -> dict[str, Task]:
    """By name."""
    size = gpt.Size(layers=1, width=8, heads=2, context=8, batch=4, held=4) if tiny else gpt.Size()

    text = partial(gpt.GPT, size), partial(gpt.batch, size=size), partial(gpt.validation, size)
    images = net, partial(some_images, count=200), held_images
    steps, tried = (6, 2) if tiny else (300, 75)
    found = (
        Task("lm", "Language model", *text, steps, tried),
        Task("digits", "Digits", *images, steps, tried, seeds=1 if tiny else 3, smoothing=0.1),
    )
    return {task.name: task for task in found}


# ---- who takes part --------------------------------------------------------------------
Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """One way to train. make: optimizers of a model, from rate, weight decay and number of steps.

    newton: its optimizer needs a closure. unfit: says why a model is not for it. stranger: its faults are its own.
    """

    name: str
    make: Callable[[nn.Module, float, float, int], Optimizers]
    settings: Mapping[str, Any] = field(default_factory=dict)
    newton: bool = False
    unfit: Callable[[nn.Module], str | None] = lambda model: None
    stranger: bool = False


class Unfit(Exception):
    """Says why an optimizer cannot be used."""


def chosen(method: type[Method], steps: int) -> dict[str, Any]:
    """What is chosen of a method's hyperparameters, for a run of so many steps."""
    takes = {f.name: f.metadata["scheduled"] for f in fields(method)}
    kind = method().recipe().preconditioner
    unsplit = isinstance(kind, Kronecker) and not kind.split
    given = {name: x for name, x in CHOSEN.items() if name in takes and (takes[name] or not callable(x))}
    return {name: x(steps) if callable(x) else x for name, x in given.items()} | (UNSPLIT if unsplit else {})


def too_large(method: type[Method], model: nn.Module) -> str | None:
    """Why a method is not for a model, by the bytes of its state."""
    shapes = [Parameter(name, tuple(p.shape), "float32", False) for name, p in model.named_parameters()]
    state = sum(row.state for row in rows(method(), shapes))
    count = sum(p.numel() for p in model.parameters())
    return None if state <= LARGEST else f"its state of {count:,} parameters would be {state / 1e9:,.0f} GB"


def ours(method: type[Method]) -> Contender:
    """A registered method."""

    def make(model: nn.Module, lr: float, weight_decay: float, steps: int) -> Optimizers:
        optimizer_class = getattr(psgd_torch_backend, method.title)
        return [optimizer_class(model.parameters(), lr=lr, weight_decay=weight_decay, **chosen(method, steps))]

    newton = method().recipe().newton
    return Contender(method.title, make, chosen(method, 300), newton, partial(too_large, method))


def adamw(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The best of four pairs of betas, in one kernel."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95), fused=True)


def hidden(model: nn.Module) -> list[Tensor]:
    """Matrices between what comes in and what goes out: neither tables nor the head."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [m.weight for m in layers[:-1]]


def muon(model: nn.Module, lr: float, weight_decay: float, steps: int) -> Optimizers:
    """Muon for hidden matrices, at a rate as AdamW's, and AdamW for the rest."""
    own = hidden(model)
    rest = [p for p in model.parameters() if all(p is not q for q in own)]
    first = torch.optim.Muon(own, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [first, adamw(rest, lr, weight_decay)]


def soap(model: nn.Module, lr: float, weight_decay: float, steps: int) -> Optimizers:
    """Of heavyball, if it is there."""
    return [import_module("heavyball").SOAP(model.parameters(), lr=lr, weight_decay=weight_decay)]


def contenders() -> list[Contender]:
    """AdamW first."""
    plain = Contender(ADAMW, lambda model, *given: [adamw(model.parameters(), *given[:2])], {"betas": (0.9, 0.95)})
    others = Contender("Muon", muon), Contender("SOAP", soap, stranger=True)
    return [plain, *others, *map(ours, METHODS.values())]


# ---- training --------------------------------------------------------------------------
def share(t: int, steps: int) -> float:
    """Of the full rate, at a step counted from 0: up along a line, then down along one to zero."""
    return min((t + 1) / (WARM * steps), 1.0) * (steps - t) / steps


class Training:
    """A run that goes on step by step."""

    def __init__(self, task: Task, contender: Contender, lr: float, steps: int, seed: int = 0) -> None:
        self.task, self.contender, self.random = task, contender, np.random.default_rng(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = task.model()
        if reason := contender.unfit(self.model):
            raise Unfit(reason)
        try:
            self.optimizers = contender.make(self.model, lr, PRODUCT / lr, steps)
        except ImportError as error:
            raise Unfit(f"{error.name} is not installed") from error
        follow = torch.optim.lr_scheduler.LambdaLR
        self.schedules = [follow(optimizer, partial(share, steps=steps)) for optimizer in self.optimizers]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of any batch."""
        return functional.cross_entropy(self.model(batch[0]), batch[1], label_smoothing=self.task.smoothing)

    def step(self) -> None:
        """One, with its batch."""
        batch = self.task.batch(self.random)
        if self.contender.newton:
            (optimizer,) = self.optimizers
            closure: Any = partial(self.loss, batch)
            optimizer.step(closure)
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.loss(batch).backward()
            for optimizer in self.optimizers:
                optimizer.step()
        for schedule in self.schedules:
            schedule.step()

    def validation(self) -> float:
        """The loss of what is held out; infinite where it is none."""
        with torch.no_grad():
            value = self.loss(self.task.held()).item()
        return value if isfinite(value) else inf


def trained(task: Task, contender: Contender, lr: float, steps: int, seed: int, marks: Sequence[int]) -> list[float]:
    """Validation losses after the steps that are marked; infinite from where a run went astray."""
    run, losses = Training(task, contender, lr, steps, seed), []
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
class Missing(Exception):
    """A run is not there, and none is to be made."""


class Kept:
    """All figures, written to a file whenever there is a new one. closed: no run is to be made."""

    def __init__(self, path: Path | None, before: Mapping[str, Any] | None = None, *, closed: bool = False) -> None:
        self.path, self.closed = path, closed
        self.result: dict[str, Any] = {"machine": machine(), "runs": [], "races": [], "refused": [], **(before or {})}

    def add(self, group: str, record: dict[str, Any]) -> dict[str, Any]:
        """Keep one more."""
        self.result[group].append(record)
        write_json(self.path, self.result)
        return record

    def found(self, group: str, **key: Any) -> Iterator[dict[str, Any]]:
        """Those that say so."""
        return (record for record in self.result[group] if key.items() <= record.items())

    def drop(self, group: str, **key: Any) -> None:
        """Forget those that say so."""
        gone = list(self.found(group, **key))
        self.result[group] = [record for record in self.result[group] if record not in gone]


def as_loss(value: float | None) -> float:
    """A loss as it was before JSON, which has no infinity."""
    return inf if value is None else value


def losses_of(kept: Kept, task: Task, contender: Contender, lr: float, steps: int, seed: int, count: int) -> Any:
    """Marks and losses of a run: of one that was made before, or of a new one."""
    settings = json.loads(json.dumps(contender.settings))
    key = {"task": task.name, "optimizer": contender.name, "settings": settings, "steps": steps, "seed": seed, "lr": lr}
    record = next((r for r in kept.found("runs") if all(r[name] == value for name, value in key.items())), None)
    if record is None and kept.closed:
        raise Missing
    if record is None:
        marks = sorted({max(1, round(steps * (i + 1) / count)) for i in range(count)})
        losses = trained(task, contender, lr, steps, seed, marks)
        record = kept.add("runs", {**key, "marks": marks, "losses": losses})
        console(stderr=True).print(f"{task.name}, {contender.name}: {steps} steps at {lr:.2g}: {losses[-1]:.4f}")
    return record["marks"], list(map(as_loss, record["losses"]))


# ---- the search ------------------------------------------------------------------------
def searched(loss: Callable[[int], float], search: Search) -> dict[int, float]:
    """Losses by k: of those that are begun with, and of further ones while the best is at an edge."""
    seen = {k: loss(k) for k in search.begun}
    for _ in range(search.more):
        k = best(seen)
        if min(seen) < k < max(seen):
            break
        k += 1 if k == max(seen) else -1
        seen[k] = loss(k)
    return dict(sorted(seen.items()))


def row_of(kept: Kept, task: Task, contender: Contender, search: Search) -> dict[str, Any]:
    """The search of one contender and the best curve of its finals, averaged over seeds."""

    def run(k: int, steps: int, seed: int, count: int) -> tuple[list[int], list[float]]:
        return losses_of(kept, task, contender, rate(k), steps, seed, count)

    tried = searched(lambda k: run(k, task.tried, 0, 1)[1][-1], search)
    finals = {}
    for k in sorted(tried, key=tried.__getitem__)[: search.finals]:
        runs = [run(k, task.steps, seed, task.marks) for seed in range(task.seeds)]
        finals[k] = runs[0][0], np.mean([losses for _, losses in runs], axis=0).tolist()
    k = best({k: losses[-1] for k, (_, losses) in finals.items()})
    marks, losses = finals[k]
    return {"name": contender.name, "tried": tried, "k": k, "lr": rate(k), "marks": marks, "losses": losses}


# ---- seconds ---------------------------------------------------------------------------
def race(task: Task, rows: Sequence[Mapping[str, Any]], races: Races) -> dict[str, float]:
    """Seconds a step of everyone, averages over a short run in which all take turns, in changing order.

    They are the processor's, of one thread: what others do on the machine is not in them.
    """
    entrants = {c.name: c for c in contenders()}
    steps = races.uncounted + races.steps
    runs = {row["name"]: Training(task, entrants[row["name"]], row["lr"], steps) for row in rows}
    seconds = {name: np.zeros(steps) for name in runs}
    for t in range(steps):
        for name in turns(list(runs), t):
            start = process_time()
            runs[name].step()
            seconds[name][t] = process_time() - start
    return {name: float(seen[races.uncounted :].mean()) for name, seen in seconds.items()}


def raced(kept: Kept, task: Task, rows: Sequence[Mapping[str, Any]], races: Races) -> list[dict[str, float]]:
    """Seconds a step of everyone in each race: those that are kept, if everyone was in them, and new ones."""
    names = {row["name"] for row in rows}
    for record in list(kept.found("races", task=task.name)):
        if record["seconds"].keys() != names:
            kept.drop("races", **record)
    while len(before := list(kept.found("races", task=task.name))) < races.count:
        kept.add("races", {"task": task.name, "number": len(before), "seconds": race(task, rows, races)})
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


def rows_of(kept: Kept, task: Task, search: Search) -> list[dict[str, Any]]:
    """A row for everyone who can be used. The others are kept with their reasons."""
    found = []
    for contender in contenders():
        who = {"task": task.name, "optimizer": contender.name}
        try:
            found.append(row_of(kept, task, contender, search))
        except Missing:
            continue
        except Exception as error:
            if not (contender.stranger or isinstance(error, Unfit)):
                raise
            kept.drop("refused", **who)
            kept.add("refused", {**who, "why": str(error) if isinstance(error, Unfit) else repr(error)})
        else:
            kept.drop("refused", **who)
    return found


def compared(kept: Kept, task: Task, search: Search, races: Races) -> list[dict[str, Any]]:
    """The rows, AdamW's first, with steps and seconds to its final loss, as shares of its own."""
    found = rows_of(kept, task, search)
    if [row["name"] for row in found[:1]] != [ADAMW]:
        raise Missing(f"{task.name}: there are no runs of {ADAMW}, which all are compared with")
    seconds = raced(kept, task, found, races)
    first = found[0]
    for row in found:
        row["seconds"] = float(np.median([seen[ADAMW] for seen in seconds]))
        row["slower"] = float(np.median([seen[row["name"]] / seen[ADAMW] for seen in seconds]))
        row["share"] = reached(row["marks"], row["losses"], first["losses"][-1]) / task.steps
    return found


# ---- what is told ----------------------------------------------------------------------
def percent(value: float) -> str:
    """A share, or that there is none."""
    return f"{100 * value:.0f} %" if isfinite(value) else NEVER


def cells(found: Sequence[Mapping[str, Any]], refused: Sequence[Mapping[str, Any]]) -> Cells:
    """A row for each contender, the lowest loss first; then those that cannot be used, with their reasons."""

    def told_of(row: Mapping[str, Any]) -> list[str]:
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
    return [head, *map(told_of, ordered), *([r["optimizer"], "–", "–", r["why"], "–", "–", "–"] for r in refused)]


def looks(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The line of each: AdamW in ink, the best three in strong colours, the others thin."""
    ordered = [row["name"] for row in sorted(found, key=lambda row: row["losses"][-1]) if row["name"] != ADAMW]
    strong = {name: {"color": colour(HUES[i]), "linewidth": 2.6, "zorder": 4} for i, name in enumerate(ordered[:3])}
    weak = {
        name: {"color": colour(HUES[(i + 3) % len(HUES)]), "linestyle": DASHES[i // len(HUES)], "linewidth": 1.2}
        for i, name in enumerate(ordered[3:])
    }
    return {ADAMW: {"color": colour("ink"), "linewidth": 2.6, "zorder": 5}, **strong, **weak}


def draw(pair: Sequence[Any], task: Task, found: Sequence[Mapping[str, Any]]) -> None:
    """Validation loss against steps and against seconds, those that go on for long cut."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    by_name = {row["name"]: row for row in found}
    adamw_row, look = by_name[ADAMW], looks(found)
    for row in sorted(found, key=lambda row: row["losses"][-1]):
        marks, losses = np.asarray(row["marks"]), np.asarray(row["losses"])
        for axes, unit in zip(pair, (1.0, row["seconds"] * row["slower"]), strict=True):
            axes.plot(marks * unit, losses, label=f"{row['name']}  {losses[-1]:.3f}", **look[row["name"]])
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


def picture(told: Mapping[Task, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write a PNG: a row for each task, steps to the left and seconds to the right."""
    with png(path, (11.4, 5.0 * len(told))) as figure:
        for pair, (task, found) in zip(
            figure.subplots(len(told), 2, squeeze=False, sharey="row"), told.items(), strict=True
        ):
            draw(pair, task, found)


# ---- the command -----------------------------------------------------------------------
def read(path: Path) -> dict[str, Any]:
    """Figures of an earlier command; none where there is no file yet."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path} does not hold figures of this command: {error}")


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
    kept = Kept(json_file or resume, read(resume) if resume else None, closed=only_seconds)
    search, races = (Search((-5, -4), 1, 1), Races(1, 2, 1)) if quick else (Search(), Races())
    told: dict[Task, list[dict[str, Any]]] = {}
    out = console()
    with plainly():
        for each in wanted:
            if only_seconds:
                kept.drop("races", task=each.name)
            try:
                told[each] = compared(kept, each, search, races)
            except (Missing, Unfit) as error:
                refuse(str(error))
    for each, found in told.items():
        table = cells(found, list(kept.found("refused", task=each.name)))
        title = f"{each.title}, {each.steps} steps"
        tell_table(title, table, out, as_markdown=markdown)
    if plot:
        picture(told, plot)


if __name__ == "__main__":
    typer.run(command)
