"""What a step of a small GPT's parameters costs beside AdamW, and beside other published optimizers of the same method.

    make peers
    OMP_NUM_THREADS=1 .venv-peers/bin/python -m benchmarks.peers [--json FILE] [--markdown] [--quick] [--compiled]

All optimizers take turns, step by step, so that a drift of the machine meets them all alike; what counts is the ratio
of ours to the other one within a round. The others are installed by `make peers`, in an environment of their own; one
that cannot be imported or does not run says why in its row. The gradients are given, and giving them is not timed.

"every step" fits the preconditioner at each step; "steady" at one step of 34, as `kron`'s schedule does in the end, and
is then the average over such a period. "eager" holds torch's compiler off everybody; "compiled" (with --compiled) lets
the others compile what they compile by themselves, and compiles ours with `compile=True` and AdamW's step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module, metadata
from itertools import cycle
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.contenders import POOL
from benchmarks.step import Cells, machine, one_table

PERIOD = 34  # steps a fit, in the end of kron's schedule
MODES = ("eager", "compiled")
UPDATES = {"every step": 1, "steady": PERIOD}  # steps a fit
Failure = str  # why an optimizer does not run
Pool = Sequence[Sequence[Tensor]]  # sets of gradients, used in turn


@dataclass(frozen=True)
class GPT:
    """The parameters of a GPT, the embedding tied to the head."""

    layers: int = 4
    width: int = 256
    vocabulary: int = 8192
    context: int = 256

    def __str__(self) -> str:
        return f"GPT of {self.layers} layers, width {self.width}"

    def shapes(self) -> list[tuple[int, ...]]:
        """Of every parameter: matrices as (to, from), each with a bias; norms with weight and bias."""
        d = self.width
        norm, products = [(d,), (d,)], [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
        block = [*norm, *norm, *(shape for to, by in products for shape in ((to, by), (to,)))]
        return [(self.vocabulary, d), (self.context, d), *(block * self.layers), *norm]

    def gradients(self) -> Pool:
        """POOL sets, float32, of modest condition: every index of every axis has its own scale."""
        random = np.random.default_rng(0)

        def scaled(shape: tuple[int, ...]) -> np.ndarray:
            scales = np.ix_(*(np.exp(random.uniform(-1, 1, n)).astype(np.float32) for n in shape))
            noise = random.standard_normal((POOL, *shape), dtype=np.float32)
            for scale in scales:
                noise *= scale
            return noise

        return list(zip(*(torch.from_numpy(scaled(shape)).unbind() for shape in self.shapes()), strict=True))


@dataclass(frozen=True)
class Setup:
    """What is measured how often. rounds: for each entry of UPDATES."""

    model: GPT = field(default_factory=GPT)
    rounds: Mapping[str, int] = field(default_factory=lambda: {"every step": 11, "steady": 5})


QUICK = Setup(GPT(layers=1, width=8, vocabulary=32, context=4), {"every step": 3, "steady": 1})


@dataclass(frozen=True)
class Entrant:
    """An optimizer by the place of its class, with settings that make it do what the others do.

    probability: the name of the setting that says how often it fits. compiling: what to set for a compiled step.
    wrapped: its whole step is to be compiled, as it compiles nothing by itself.
    """

    place: str  # "module:Class"
    settings: Mapping[str, Any] = field(default_factory=dict)
    probability: str | None = None
    compiling: Mapping[str, Any] = field(default_factory=dict)
    wrapped: bool = False
    note: str = ""

    def __str__(self) -> str:
        module, name = self.place.split(":")
        return " ".join(filter(None, [*self.release(module), name, self.note]))

    @staticmethod
    def release(module: str) -> list[str]:
        """A package with its version; nothing of torch, whose version all share."""
        package = module.split(".")[0].replace("_", "-")
        if package == "torch":
            return []
        try:
            return [package, metadata.version(package)]
        except metadata.PackageNotFoundError:
            return [package]

    def stepping(self, params: list[torch.nn.Parameter], *, compiled: bool, share: float) -> Callable[[], Any]:
        """What does one step of `params`, gradients given."""
        module, name = self.place.split(":")
        chosen = {**COMMON, **self.settings, **(self.compiling if compiled else {})}
        if self.probability:
            chosen[self.probability] = share
        step = getattr(import_module(module), name)(params, **chosen).step
        return torch.compile(step) if compiled and self.wrapped else step


COMMON = {"lr": 1e-3, "weight_decay": 0.01}
# Axes above this stay diagonal, the embedding's longer one alone: a factor of 8192 x 8192 would be all that is timed.
LONGEST = 2048
OURS_COMPILED = {"compile": True}
OURS = {
    "kron": Entrant(
        "psgd_torch_backend:Kron",
        {"b1": 0.9, "max_size_triangular": LONGEST},
        "preconditioner_update_probability",
        OURS_COMPILED,
    ),
    "quad": Entrant("psgd_torch_backend:QUAD", {"momentum": 0.9}, compiling=OURS_COMPILED),
    "procrustes": Entrant("psgd_torch_backend:Procrustes", {"momentum": 0.9}, compiling=OURS_COMPILED),
}
ADAMW = (
    Entrant("torch.optim:AdamW", wrapped=True),
    Entrant("torch.optim:AdamW", {"fused": True}, wrapped=True, note="fused"),
)
# heavyball's rule for what stays diagonal is ours when its mode is "smart_one_diag".
PEERS: Mapping[str, Sequence[Entrant]] = {
    "kron": (
        Entrant("kron_torch:Kron", {"b1": 0.9, "max_size_triangular": LONGEST}, "preconditioner_update_probability"),
        Entrant(
            "heavyball:PSGDKron",
            {"betas": (0.9, 0.999), "max_size_triangular": LONGEST},
            "preconditioner_update_probability",
        ),
        Entrant(
            "pytorch_optimizer:Kron",
            {"momentum": 0.9, "max_size_triangular": LONGEST},
            "pre_conditioner_update_probability",
        ),
    ),
    "quad": (Entrant("quad_torch:QUAD", {"momentum": 0.9}),),
    "procrustes": (
        Entrant(
            "heavyball:PSGDPRO",
            {"betas": (0.9, 0.999), "memory_save_mode": "smart_one_diag"},
            "preconditioner_update_probability",
        ),
    ),
}


class Racer:
    """An optimizer at its parameters; some steps are made at once, for what comes with the first ones."""

    def __init__(self, entrant: Entrant, model: GPT, pool: Pool, *, compiled: bool, fits_every: int) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(shape)) for shape in model.shapes()]
        self.pool = cycle(pool)
        self.step = entrant.stepping(self.params, compiled=compiled, share=1 / fits_every)
        for _ in range(max(3, fits_every)):
            self.lap()

    def lap(self) -> float:
        """Seconds of one step. Its gradients are copies: some optimizers write into them."""
        for p, g in zip(self.params, next(self.pool), strict=True):
            p.grad = g.clone()
        start = perf_counter()
        self.step()
        return perf_counter() - start


def started(entrant: Entrant, *given: Any, **how: Any) -> Racer | Failure:
    """A racer, or why there is none: a stranger's faults must not end the program."""
    try:
        return Racer(entrant, *given, **how)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]


def race(racers: Mapping[Any, Racer], rounds: int, steps: int) -> dict[Any, np.ndarray]:
    """Seconds a step of each, (rounds,): averages over `steps` steps. In each all take turns, in changing order."""
    names, seen = list(racers), {name: np.zeros((rounds, steps)) for name in racers}
    for turn in range(rounds * steps):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seen[name].flat[turn] = racers[name].lap()
    return {name: laps.mean(axis=1) for name, laps in seen.items()}


def pairings(updates: str) -> list[tuple[str, Entrant]]:
    """Methods, and who is beside them. Steady is only for methods that may fit now and then."""
    methods = [name for name, ours in OURS.items() if UPDATES[updates] == 1 or ours.probability]
    return [(method, peer) for method in methods for peer in (*ADAMW, *PEERS[method])]


def figures(ours: np.ndarray, peer: np.ndarray) -> dict[str, Any]:
    """Medians in ms, and the median and the quartiles of the ratio in each round."""
    low, median, high = np.quantile(ours / peer, [0.25, 0.5, 0.75])
    return {
        "ours_ms": float(1e3 * np.median(ours)),
        "peer_ms": float(1e3 * np.median(peer)),
        "ratio": float(median),
        "quartiles": [float(low), float(high)],
    }


def compiler(mode: str) -> AbstractContextManager[Any]:
    """Holds torch's compiler off, in everybody's code, unless it is wanted."""
    return nullcontext() if mode == "compiled" else torch.compiler.set_stance("force_eager")


def raced(setup: Setup, pool: Pool, mode: str, updates: str, console: Console) -> list[dict[str, Any]]:
    """A row for each pairing. Everyone starts once, also who stands in many rows."""
    pairs = pairings(updates)
    racers: dict[str, Racer] = {}
    failures: dict[str, Failure] = {}
    for who in dict.fromkeys([*(method for method, _ in pairs), *(str(peer) for _, peer in pairs)]):
        console.log(f"{mode}, {updates}: {who}")
        ours = OURS.get(who)
        entrant = ours or next(peer for _, peer in pairs if str(peer) == who)
        make: Callable[..., Racer | Failure] = Racer if ours else started
        racer = make(entrant, setup.model, pool, compiled=mode == "compiled", fits_every=UPDATES[updates])
        if isinstance(racer, Failure):
            failures[who] = racer
        else:
            racers[who] = racer
    seconds = race(racers, setup.rounds[updates], UPDATES[updates])
    none = {"ours_ms": None, "peer_ms": None, "ratio": None, "quartiles": None}
    return [
        {
            "set": str(setup.model),
            "framework": "torch",
            "mode": mode,
            "updates": updates,
            "method": method,
            "peer": str(peer),
            **(figures(seconds[method], seconds[str(peer)]) if str(peer) in racers else none),
            "why": failures.get(str(peer)),
        }
        for method, peer in pairs
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's products on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(console: Console, *, quick: bool, compiled: bool = False) -> dict[str, Any]:
    """All figures, as plain data."""
    setup = QUICK if quick else Setup()
    pool, rows = setup.model.gradients(), []
    # What others print must not come into the table.
    with one_thread(), redirect_stdout(sys.stderr):
        result = {"machine": machine(), "setup": asdict(setup)}
        for mode in MODES[: 1 + compiled]:
            for updates in UPDATES:
                with compiler(mode):
                    rows += raced(setup, pool, mode, updates, console)
    return {**result, "rows": rows}


def cells(result: dict[str, Any]) -> Cells:
    """A row for each pairing."""

    def told(r: Mapping[str, Any]) -> Sequence[str]:
        if r["why"]:
            return "", "", "does not run", r["why"].replace("|", "/")
        low, high = r["quartiles"]
        return f"{r['ours_ms']:.1f} ms", f"{r['peer_ms']:.1f} ms", f"{r['ratio']:.2f}", f"{low:.2f} to {high:.2f}"

    head = ["method", "mode", "fits", "beside", "ours", "the other", "ours / the other", "quartiles"]
    return [head, *([r["method"], r["mode"], r["updates"], r["peer"], *told(r)] for r in result["rows"])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--compiled", action="store_true")
    given, shared = own.parse_known_args(arguments)
    description = "Step times beside AdamW and other PSGD optimizers. With --compiled also compiled ones, minutes more."
    title = "A step of torch's optimizers"
    one_table(
        "peers",
        description,
        partial(measure, compiled=given.compiled),
        lambda r: (f"{title}, {r['rows'][0]['set']}", cells(r)),
        150,
        shared,
    )


if __name__ == "__main__":
    main()
