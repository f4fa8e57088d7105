"""A process that steps one optimizer of one framework, when it is told to: see `racing`, which starts it by its path.

It imports NumPy and the one framework, and nothing of this project that is not what it times, so that it runs in any
environment. Questions come as lines of JSON on standard input, answers go out as lines of JSON; what cannot be done is
answered by why. Whatever the optimizers print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module, metadata
from itertools import cycle, zip_longest
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

Spec = Mapping[str, Any]
Shape = tuple[int, ...]


def release(module: str) -> str:
    """The package that a module is of, with its version where that is known."""
    top = module.split(".")[0]
    try:
        return f"{top.replace('_', '-')} {metadata.version(top.replace('_', '-'))}"
    except metadata.PackageNotFoundError:
        return top.replace("_", "-")


def shapes_of(spec: Spec) -> list[Shape]:
    """The shapes of the parameters."""
    return [tuple(shape) for shape in spec["shapes"]]


def gradients(spec: Spec) -> Iterator[list[np.ndarray]]:
    """Sets of gradients, in turn and for ever; views of a file that all workers share."""
    sizes = np.cumsum([0, *map(prod, shapes_of(spec))])
    for row in cycle(np.load(spec["gradients"], mmap_mode="r")):
        yield [row[a:b].reshape(s) for a, b, s in zip(sizes[:-1], sizes[1:], shapes_of(spec), strict=True)]


Print = tuple[int, int]  # bytes of a tensor and a checksum of them


def printed(x: np.ndarray) -> Print:
    """What tells a tensor from what it was."""
    return x.nbytes, zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def changed(before: Sequence[Print], after: Sequence[Print]) -> int:
    """Bytes of those tensors that are not what they were, or that are new."""
    return sum(b[0] for a, b in zip_longest(before, after, fillvalue=(0, 0)) if a != b)


class Stepping:
    """An optimizer at its parameters. Each step has new copies of its gradients: some optimizers write into them."""

    def give(self) -> None:
        """Put the next gradients where the step finds them."""
        raise NotImplementedError

    def step(self) -> None:
        """One step, finished when it returns."""
        raise NotImplementedError

    def state(self) -> list[Print]:
        """The tensors that it keeps, as they are now."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Bytes that it keeps beside the parameters."""
        raise NotImplementedError

    def peak(self) -> int:
        """The most bytes that a step holds at a time, beyond what was there before it."""
        raise NotImplementedError

    def launches(self) -> int:
        """How many operations a step launches."""
        raise NotImplementedError

    def compile(self) -> dict[str, Any]:
        """Seconds of what compiles, and what later steps at other rates compile again."""
        raise NotImplementedError

    def lap(self) -> float:
        """Seconds of one step; giving the gradients is not timed."""
        self.give()
        start = perf_counter()
        self.step()
        return perf_counter() - start

    def changes(self) -> int:
        """Bytes of state that a step changes."""
        before = self.state()
        self.lap()
        return changed(before, self.state())


class InTorch(Stepping):
    """A `torch.optim.Optimizer`, or several that step together."""

    def __init__(self, spec: Spec) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(1)
        if not spec["compiled"]:
            torch.compiler.set_stance("force_eager")  # for everybody, also who compiles without being asked
        self.dtype = getattr(torch, spec["dtype"])
        self.params = [torch.nn.Parameter(torch.zeros(shape, dtype=self.dtype)) for shape in shapes_of(spec)]
        self.pool = gradients(spec)
        module, name = spec["place"].split(":")
        settings = {k: self._value(v) for k, v in spec["settings"].items()}
        optimizer_class = getattr(import_module(module), name) if module else partial_muon(torch)
        self.optimizer = optimizer_class(self.params, **settings)
        self._step = torch.compile(self.optimizer.step) if spec["wrapped"] else self.optimizer.step

    def _value(self, x: Any) -> Any:
        """A setting; dtypes and tuples are written as plain data."""
        if isinstance(x, str) and x.startswith("torch."):
            return getattr(self.torch, x.removeprefix("torch."))
        return tuple(x) if isinstance(x, list) else x

    def give(self) -> None:
        for p, g in zip(self.params, next(self.pool), strict=True):
            p.grad = self.torch.from_numpy(np.array(g)).to(self.dtype)

    def step(self) -> None:
        self._step()

    def _tensors(self) -> list[Any]:
        """Every tensor in the state, once; parameters and their gradients are not of it."""
        pointers = {x.untyped_storage().data_ptr() for p in self.params for x in (p, p.grad) if x is not None}
        found: dict[Any, Any] = {}

        def gather(x: Any) -> None:
            if isinstance(x, self.torch.Tensor):
                if x.untyped_storage().data_ptr() not in pointers:
                    found.setdefault((x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape)), x)
            elif isinstance(x, Mapping):
                list(map(gather, x.values()))
            elif isinstance(x, (list, tuple)):
                list(map(gather, x))

        gather(self.optimizer.state)
        return list(found.values())

    def state(self) -> list[Print]:
        bits = self.torch.uint8
        return [printed(x.detach().contiguous().reshape(-1).view(bits).numpy()) for x in self._tensors()]

    def bytes(self) -> int:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self._tensors()}
        return sum(storages.values())

    def _traced(self, **what: Any) -> list[dict[str, Any]]:
        """The events of one step, as torch's profiler writes them."""
        self.give()
        activities = [self.torch.profiler.ProfilerActivity.CPU]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            with self.torch.profiler.profile(activities=activities, **what) as profiler:
                self.step()
            profiler.export_chrome_trace(str(path))
            return json.loads(path.read_text())["traceEvents"]

    def peak(self) -> int:
        """By every allocation, also those inside operations."""
        events = [e for e in self._traced(profile_memory=True) if e.get("name") == "[memory]"]
        held = np.cumsum([0, *(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))])
        return int(held.max())

    def launches(self) -> int:
        """Operations that call no others: the kernels."""
        spans = [e for e in self._traced() if e.get("cat") == "cpu_op"]
        spans.sort(key=lambda e: (e["tid"], e["ts"], -e["dur"]))
        following = [*spans[1:], {"tid": None, "ts": 0.0}]
        return sum(b["tid"] != a["tid"] or b["ts"] >= a["ts"] + a["dur"] for a, b in zip(spans, following, strict=True))

    def compile(self) -> dict[str, Any]:
        seconds = [self.lap() for _ in range(3)]
        self.torch.compiler.set_stance("fail_on_recompile")
        try:
            for factor in (0.5, 0.25):
                for group in self.optimizer.param_groups:
                    group["lr"] = factor * group["lr"]
                self.lap()
            again = ""
        except RuntimeError as error:
            again = reason(error)
        finally:
            self.torch.compiler.set_stance("default")
        return {"first": seconds[0], "second": seconds[1], "third": seconds[2], "again": again}


def partial_muon(torch: Any) -> Callable[..., Any]:
    """Muon where it can be, AdamW for the rest, as torch's own Muon takes matrices alone."""

    class MuonAndAdamW:
        def __init__(self, params: Sequence[Any], **settings: Any) -> None:
            matrices, others = ([p for p in params if (p.ndim == 2) is wanted] for wanted in (True, False))
            kinds = ((torch.optim.Muon, matrices), (torch.optim.AdamW, others))
            self.optimizers = [kind(members, **settings) for kind, members in kinds if members]
            self.param_groups = [group for each in self.optimizers for group in each.param_groups]

        @property
        def state(self) -> list[Any]:
            return [each.state for each in self.optimizers]

        def step(self) -> None:
            for each in self.optimizers:
                each.step()

    return MuonAndAdamW


class InJax(Stepping):
    """An optax transformation; its step is jitted, and may reuse the memory of parameters and state."""

    def __init__(self, spec: Spec) -> None:
        import jax
        import optax

        self.jax = jax
        self.dtype = getattr(jax.numpy, spec["dtype"])
        self.names = [f"{i:04}" for i in range(len(spec["shapes"]))]
        module, name = spec["place"].split(":")
        settings = dict(spec["settings"])
        if spec.get("scheduled"):
            rate = settings["learning_rate"]
            settings["learning_rate"] = lambda step: rate / (1 + step)
        transform = getattr(import_module(module), name)(**settings)
        self.params = {n: jax.numpy.zeros(s, self.dtype) for n, s in zip(self.names, shapes_of(spec), strict=True)}
        self.kept = transform.init(self.params)
        self.pool = gradients(spec)

        def step(gradients: Any, state: Any, params: Any) -> Any:
            updates, state = transform.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.jitted = jax.jit(step, donate_argnums=(1, 2))

    def give(self) -> None:
        arrays = (self.jax.numpy.asarray(np.array(g), self.dtype) for g in next(self.pool))
        self.given = self.jax.block_until_ready(dict(zip(self.names, arrays, strict=True)))

    def step(self) -> None:
        self.params, self.kept = self.jax.block_until_ready(self.jitted(self.given, self.kept, self.params))

    def state(self) -> list[Print]:
        return [printed(np.asarray(x)) for x in self.jax.tree.leaves(self.kept)]

    def bytes(self) -> int:
        return sum(x.nbytes for x in self.jax.tree.leaves(self.kept))

    def _lowered(self) -> Any:
        self.give()
        return self.jitted.lower(self.given, self.kept, self.params)

    def peak(self) -> int:
        """As the compiler says: what it allocates beside arguments and results."""
        return int(self._lowered().compile().memory_analysis().temp_size_in_bytes)

    def compile(self) -> dict[str, Any]:
        start = perf_counter()
        lowered = self._lowered()
        traced = perf_counter()
        lowered.compile()
        seconds = {"lowering": traced - start, "first": perf_counter() - start}
        self.lap()
        compiled: list[str] = []

        def listen(event: str, duration_secs: float, **_: Any) -> None:
            if event.endswith("backend_compile_duration"):
                compiled.append(event)

        self.give()
        self.jax.monitoring.register_event_duration_secs_listener(listen)
        for _ in range(3):
            self.step()
        return {**seconds, "again": f"{len(compiled)} times" if compiled else ""}


class Products:
    """Bare products of matrices, whose total is the floor of a step. spec["products"]: (batch, m, k, n, how often)."""

    def __init__(self, spec: Spec) -> None:
        self.products = [tuple(x) for x in spec["products"]]
        sizes = [(b * m * k, b * k * n, b * m * n) for b, m, k, n, _ in self.products] or [(0, 0, 0)]
        random = np.random.default_rng(0)
        self.left, self.right, self.out = (
            random.standard_normal(max(lengths), dtype=np.float32) for lengths in zip(*sizes, strict=True)
        )

    def lap(self) -> float:
        """Seconds of all of them."""
        return sum(often * self.seconds(b, m, k, n) for b, m, k, n, often in self.products)

    def seconds(self, b: int, m: int, k: int, n: int) -> float:
        """Seconds of one of them, of contiguous factors."""
        raise NotImplementedError


class TorchProducts(Products):
    """By `torch.bmm` and `torch.mm`, into memory that is there."""

    def __init__(self, spec: Spec) -> None:
        import torch

        super().__init__(spec)
        torch.set_num_threads(1)
        dtype = getattr(torch, spec["dtype"])
        self.buffers = [torch.from_numpy(x).to(dtype) for x in (self.left, self.right, self.out)]
        self.bmm, self.mm = torch.bmm, torch.mm

    def seconds(self, b: int, m: int, k: int, n: int) -> float:
        sides = ((m, k), (k, n), (m, n))
        x, y, out = (
            buffer[: b * p * q].view((b, p, q) if b > 1 else (p, q))
            for buffer, (p, q) in zip(self.buffers, sides, strict=True)
        )
        product = self.bmm if b > 1 else self.mm
        start = perf_counter()
        product(x, y, out=out)
        return perf_counter() - start


class JaxProducts(Products):
    """By jitted `jax.numpy.matmul`, of small ones several in one call, which has a cost of its own."""

    def __init__(self, spec: Spec) -> None:
        import jax

        super().__init__(spec)
        self.jax, self.dtype = jax, getattr(jax.numpy, spec["dtype"])
        self.matmuls = jax.jit(lambda xs, ys: [x @ y for x, y in zip(xs, ys, strict=True)])

    def seconds(self, b: int, m: int, k: int, n: int) -> float:
        batch, several = (b,) if b > 1 else (), max(1, min(32, 2_000_000 // (b * m * k * n)))
        xs, ys = (
            [self.jax.numpy.asarray(buffer[: b * p * q].reshape(*batch, p, q), self.dtype) for _ in range(several)]
            for buffer, (p, q) in ((self.left, (m, k)), (self.right, (k, n)))
        )
        self.jax.block_until_ready((xs, ys))
        start = perf_counter()
        self.jax.block_until_ready(self.matmuls(xs, ys))
        return (perf_counter() - start) / several


KINDS: dict[str, dict[str, Callable[[Spec], Any]]] = {
    "optimizer": {"torch": InTorch, "jax": InJax},
    "products": {"torch": TorchProducts, "jax": JaxProducts},
}


def trivial(framework: str) -> float:
    """Seconds in which a framework compiles x + 1: what its compiler costs before there is anything to compile."""
    if framework == "torch":
        import torch

        start = perf_counter()
        torch.compile(lambda x: x + 1)(torch.zeros(3))
    else:
        import jax

        zeros = jax.numpy.zeros(3)
        start = perf_counter()
        jax.jit(lambda x: x + 1).lower(zeros).compile()
    return perf_counter() - start


def reason(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]


class Worker:
    """Answers questions, about one thing at a time."""

    def __init__(self) -> None:
        self.at: Any = None

    def answer(self, ask: Mapping[str, Any]) -> Any:
        """The answer to a question: {"do": what, ...}."""
        what = ask["do"]
        if what == "release":
            return release(ask["module"])
        if what == "trivial":
            return trivial(ask["framework"])
        if what == "start":
            self.at = KINDS[ask["kind"]][ask["framework"]](ask)
            return None
        if what == "lap":
            return [self.at.lap() for _ in range(ask["steps"])]
        if what in ("changes", "bytes", "peak", "launches", "compile"):
            return getattr(self.at, what)()
        raise ValueError(f"nobody can {what}")


def pin(core: int | None) -> None:
    """Stay on one core, where the system has such a thing."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def main() -> None:
    """Answer until there are no more questions."""
    core, *paths = sys.argv[1:]
    pin(int(core) if core else None)
    sys.path[:0] = paths
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = {"answer": worker.answer(json.loads(line))}
        except Exception as error:  # a stranger's faults must not end the race
            answer = {"why": reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
