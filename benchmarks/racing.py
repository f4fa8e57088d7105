"""Contenders in processes of their own, each in its own environment, take turns step by step.

All are pinned to one core and have one thread, and who is not stepping sleeps, waiting for a line; so that frameworks
are comparable, and a drift of the machine meets all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.peers import ROOT, Entrant
from benchmarks.sets import ParameterSet

Environment = Mapping[str, str]
INHERITED: Environment = MappingProxyType({})
WORKER = Path(__file__).with_name("worker.py")
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1"
) | {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}
# glibc then keeps up to 64 MiB of what was freed, in blocks of up to 32 MiB, and does not fetch it anew at each step.
FREED_STAYS = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "67108864"}


class CannotRun(Exception):
    """A contender cannot run, and why."""


def one_core() -> int | None:
    """The core on which all of them run; None where processes cannot be bound to one."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


class Worker:
    """A process that answers questions; see `benchmarks.worker`."""

    def __init__(self, python: str, path: Sequence[str] = (), environment: Environment = INHERITED) -> None:
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        core = one_core()
        for needed in (Path(python), *map(Path, path)):
            if not needed.exists():
                name = needed.relative_to(ROOT).parts[0] if needed.is_relative_to(ROOT) else needed
                raise CannotRun(f"{name} is missing; `make peers` makes it")
        # -P: the folder of the worker is no place to import from.
        self.process = subprocess.Popen(
            [python, "-P", str(WORKER), "" if core is None else str(core), *path],
            env={**inherited, **ONE_THREAD, **FREED_STAYS, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, do: str, **what: Any) -> Any:
        """The answer to a question; CannotRun where there is none."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise CannotRun(f"its process ended with code {self.process.wait()}")
        message = json.loads(line)
        if "why" in message:
            raise CannotRun(message["why"])
        return message["answer"]

    def laps(self, steps: int = 1) -> list[float]:
        """Seconds of each of so many steps."""
        return self.ask("lap", steps=steps)

    def close(self) -> None:
        """End the process. What it was still to be told, where it has ended, goes nowhere."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):  # closing writes what is left, and closes all the same
                if stream:
                    stream.close()


class Field:
    """The workers of a race on one set of parameters; they and the file of gradients go when it is left."""

    def __init__(self, parameters: ParameterSet, folder: Path) -> None:
        self.parameters, self.folder = parameters, folder
        self.workers: dict[Any, Worker] = {}
        self.failures: dict[Any, str] = {}
        self.gradients = folder / "gradients.npy"
        parameters.write_gradients(self.gradients)

    def enter(
        self,
        name: Any,
        entrant: Entrant,
        spec: Mapping[str, Any],
        laps: int = 0,
        environment: Environment = MappingProxyType({}),
    ) -> None:
        """Start a contender, who makes some steps at once, for what comes with the first ones; or note why not."""
        shared = {"shapes": self.parameters.shapes, "gradients": str(self.gradients)}
        self._enter(name, entrant.python, entrant.path, {**spec, **shared}, laps, environment)

    def enter_products(self, name: Any, framework: str, dtype: str, products: Sequence[Sequence[float]]) -> None:
        """Start who makes bare products of matrices."""
        spec = {"kind": "products", "framework": framework, "dtype": dtype, "products": products}
        self._enter(name, Entrant(":").python, (), spec, 2, {})

    def _enter(
        self, name: Any, python: str, path: Sequence[str], spec: Mapping[str, Any], laps: int, environment: Environment
    ) -> None:
        worker = None
        try:
            worker = Worker(python, path, environment)
            worker.ask("start", **spec)
            worker.laps(laps)
            self.workers[name] = worker
        except CannotRun as error:
            self.failures[name] = str(error)
            if worker:
                worker.close()

    def ask(self, name: Any, do: str) -> Any:
        """What a contender answers; None, with its reason noted, where it cannot, or could not start."""
        try:
            return self.workers[name].ask(do) if name in self.workers else None
        except CannotRun as error:
            self.drop(name, str(error))
            return None

    def drop(self, name: Any, why: str) -> None:
        """Take a contender out, for a reason."""
        self.failures[name] = why
        self.workers.pop(name).close()

    def race(self, rounds: int, busy: float = 0.05) -> dict[Any, np.ndarray]:
        """Seconds a step of each, (rounds,). In each round all take turns, in changing order. A turn is so many steps
        that the first contender is busy for some time, at most eight, of which the median counts.
        """
        seconds: dict[Any, list[float]] = {name: [] for name in self.workers}
        steps = self._steps(busy)
        for turn in range(rounds):
            for name in turns(list(self.workers), turn):
                try:
                    seconds[name].append(float(np.median(self.workers[name].laps(steps))))
                except CannotRun as error:
                    self.drop(name, str(error))
        return {name: np.array(seconds[name]) for name in self.workers}

    def _steps(self, busy: float) -> int:
        first = next(iter(self.workers.values()), None)
        return 1 if first is None else max(1, min(8, int(busy / min(first.laps(2)))))

    def clear(self) -> None:
        """End all processes, for another race."""
        for worker in self.workers.values():
            worker.close()
        self.workers, self.failures = {}, {}


def turns(names: list[Any], turn: int) -> list[Any]:
    """The names in the order of one round: each round begins with another one."""
    shift = turn % len(names) if names else 0
    return names[shift:] + names[:shift]


@contextmanager
def field_of(parameters: ParameterSet) -> Iterator[Field]:
    """A field for a race."""
    with TemporaryDirectory() as folder:
        field = Field(parameters, Path(folder))
        try:
            yield field
        finally:
            field.clear()


def versioned(entrants: Sequence[Entrant]) -> dict[Entrant, str]:
    """Every entrant's name with the release that its environment has of it."""
    names: dict[Entrant, str] = {}
    known: dict[Any, str] = {}
    for entrant in entrants:
        key = (entrant.python, entrant.path, entrant.module)
        if entrant.module and not entrant.ours and key not in known:
            known[key] = _release(*key)
        names[entrant] = " ".join(filter(None, ["ours," if entrant.ours else known.get(key), entrant.name]))
    return names


def _release(python: str, path: Sequence[str], module: str) -> str:
    plain = module.split(".")[0].replace("_", "-")
    try:
        worker = Worker(python, path)
    except CannotRun:
        return plain
    try:
        return worker.ask("release", module=module)
    except CannotRun:
        return plain
    finally:
        worker.close()
