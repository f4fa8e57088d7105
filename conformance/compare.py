"""Two comparisons of drivers on one problem: step-locked and free-running.

*Step-locked*: each driver takes each step from the reference's state, so that what one step does is seen alone, in
every leaf of the state. *Free-running*: each driver walks by itself from the same start on the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Any

import numpy as np

from conformance.drivers import DRIVERS, Arrays, Driver, Snapshot
from conformance.frameworks import double_precision
from conformance.problems import PROBLEMS, Problem
from conformance.reference import fits
from conformance.tolerances import Bound, bound_for
from psgd.hyperparameters import Method
from psgd.methods import METHODS
from psgd.naming import did_you_mean

KINDS = Snapshot._fields
Tick = Callable[[int], None]  # so many steps of drivers are done
TWINS = 4  # of an envelope, beside the run itself


@dataclass
class Pair:
    """Differences of two drivers: for each kind one number a step. `bound`: one number a step, for `judged` kinds."""

    a: str
    b: str
    bound: np.ndarray
    judged: tuple[str, ...]
    curves: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    worst: dict[str, tuple[int, str]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    def add(self, x: Snapshot, y: Snapshot) -> None:
        for kind in KINDS:
            difference, leaf = furthest(getattr(x, kind), getattr(y, kind), self.scales, kind)
            if not difference < max(self.curves[kind], default=0.0):
                self.worst[kind] = (len(self.curves[kind]) + 1, leaf)
            self.curves[kind].append(difference)

    @property
    def first_step_over(self) -> int | None:
        """First step at which a judged difference is over the bound (NaN is); None where none is."""
        largest = np.max([self.curves[kind] for kind in self.judged], axis=0)
        over = np.flatnonzero(~(largest <= self.bound))
        return int(over[0]) + 1 if over.size else None

    @property
    def passed(self) -> bool:
        return self.first_step_over is None

    def max_rel_diff(self) -> dict[str, float]:
        return {kind: float(np.max(curve)) for kind, curve in self.curves.items()}


@dataclass
class Comparison:
    """What was compared, each pair, and for plots: losses of each driver, the envelope, the last parameters."""

    method: str
    problem: str
    steps: int
    dtype: str
    seed: int
    mode: str
    bound: Bound
    pairs: list[Pair]
    losses: dict[str, list[float]]
    last: dict[str, Arrays]
    envelope: np.ndarray | None = None

    @property
    def passed(self) -> bool:
        return all(pair.passed for pair in self.pairs)

    def accuracy(self) -> dict[str, float]:
        """Held-out accuracy of each driver at the end; empty where the problem has none."""
        evaluate = PROBLEMS[self.problem].evaluate
        return {} if evaluate is None else {name: evaluate(params) for name, params in self.last.items()}

    def json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        head = {k: getattr(self, k) for k in ("method", "problem", "steps", "dtype", "seed", "mode")}
        pairs = [
            {
                "a": pair.a,
                "b": pair.b,
                "max_rel_diff": pair.max_rel_diff(),
                "bound": float(np.max(pair.bound)),
                "first_step_over": pair.first_step_over,
                "verdict": "pass" if pair.passed else "fail",
            }
            for pair in self.pairs
        ]
        return head | {"pairs": pairs}


def furthest(x: Arrays, y: Arrays, scales: dict[str, float], kind: str = "") -> tuple[float, str]:
    """Largest max|a - b| / scale over leaves, and that leaf. Leaves of one side only are infinitely far.

    The scale of a leaf is the largest modulus it has had so far, kept in `scales`: a scalar that crosses zero is not
    compared with zero.
    """
    if x.keys() != y.keys():
        return float("inf"), f"{sorted(x.keys() ^ y.keys())[0]} (in one only)"
    worst = (0.0, "")
    for name, a in x.items():
        b = y[name]
        if a.shape != b.shape:
            return float("inf"), f"{name} ({a.shape} and {b.shape})"
        size = max(float(np.max(np.abs(z), initial=0.0)) for z in (a, b))
        scale = scales[f"{kind}/{name}"] = max(size, scales.get(f"{kind}/{name}", 0.0))
        difference = float(np.max(np.abs(a - b), initial=0.0)) / scale if scale else 0.0
        if difference != difference:
            return difference, name  # NaN is further than anything
        if difference > worst[0]:
            worst = (difference, name)
    return worst


def default_of(setting: Any) -> Any:
    """The default of a hyperparameter."""
    return setting.default


def method_for(name: str, problem: Problem, **hyperparameters: Any) -> Method:
    """A method with its defaults, and the learning rate that makes its steps as long as `problem.lr` means."""
    settings, size = fields(METHODS[name]), sum(x.size for x in problem.init(0).values())
    own: dict[str, Any] = {f.name: None for f in settings if f.metadata["kind"] == "dtype"}  # the dtype of the problem
    own |= {f.name: min(default_of(f), size - 1) for f in settings if f.name.endswith("rank_of_approximation")}
    given = own | hyperparameters
    gain = METHODS[name].of(**given).recipe().gain
    return METHODS[name].of(**{"lr": problem.lr / gain, **given})


def work(problem: str, dtype: str, *, steps: int, locked: bool, drivers: int) -> int:
    """How many steps of drivers a comparison takes, those of the twins too."""
    enveloped = bound_for(PROBLEMS[problem], dtype, locked=locked).value is None
    return steps * (drivers + (TWINS + 1 if enveloped else 0))


def compare(
    method: str,
    problem: str,
    *,
    steps: int,
    dtype: str = "float64",
    seed: int = 0,
    locked: bool = False,
    drivers: Sequence[str] = tuple(DRIVERS),
    tick: Tick = lambda n: None,
    settings: Mapping[str, Any] | None = None,
    **hyperparameters: Any,
) -> Comparison:
    """Run drivers beside each other. The first that differentiates is the reference; `tick` hears of every step.

    Hyperparameters are given by keyword, or as `settings`, those too whose names are arguments here.

    Raises ValueError for names that are not registered.
    """
    registries: list[tuple[str, Mapping[str, Any]]] = [(method, METHODS), (problem, PROBLEMS)]
    for name, known in registries + [(d, DRIVERS) for d in drivers]:
        if name not in known:
            meant = did_you_mean(name, known) or f"; choose of {', '.join(known)}"
            raise ValueError(f"{name!r} is unknown{meant}")
    if not any(DRIVERS[d].differentiates for d in drivers):
        raise ValueError(f"none of {', '.join(drivers)} differentiates; add torch or jax")
    with double_precision(*(drivers if dtype == "float64" else ())):
        chosen = dict(settings or {}) | hyperparameters
        return _compare(method, PROBLEMS[problem], steps, dtype, seed, locked, drivers, tick, chosen)


def _compare(
    method: str,
    problem: Problem,
    steps: int,
    dtype: str,
    seed: int,
    locked: bool,
    drivers: Sequence[str],
    tick: Tick,
    hyperparameters: dict[str, Any],
) -> Comparison:
    configured = method_for(method, problem, **hyperparameters)
    start = rounded(problem.init(seed), dtype)
    runs = {name: DRIVERS[name](configured, problem, start, dtype) for name in drivers}
    reference = next(run for run in runs.values() if run.differentiates)
    bound = bound_for(problem, dtype, locked=locked)
    result = Comparison(
        method,
        problem.name,
        steps,
        dtype,
        seed,
        "locked" if locked else "free",
        bound,
        [],
        {d: [] for d in runs},
        {},
    )
    judged = KINDS if locked else ("params",)
    result.pairs = [Pair(a, b, np.zeros(0), judged) for a, b in combinations(runs, 2)]
    for snapshots in walk(runs, reference, problem, steps, seed, locked, result.losses):
        for pair in result.pairs:
            pair.add(snapshots[pair.a], snapshots[pair.b])
        tick(len(runs))
    result.last = {name: run.params() for name, run in runs.items()}
    if bound.value is None:
        result.envelope = envelope(configured, problem, start, steps, dtype, seed, type(reference), tick)
    for pair in result.pairs:
        pair.bound = bound.per_step(steps, result.envelope)
    return result


def walk(
    runs: Mapping[str, Driver],
    reference: Driver,
    problem: Problem,
    steps: int,
    seed: int,
    locked: bool,
    losses: dict[str, list[float]],
) -> Iterable[dict[str, Snapshot]]:
    """Snapshots of all drivers after each step. Those that do not differentiate get the reference's gradients."""
    for t in range(1, steps + 1):
        batch = problem.batch(seed, t)
        base = reference.snapshot() if locked and t > 1 else None
        snapshots = {}
        loss, gradients = reference.gradient(batch)
        fit = reference.method.recipe().newton and fits(reference.method, t)
        pairs = reference.products(batch, t) if fit else None
        for name, run in runs.items():
            if base is not None and run is not reference:
                run.load(base)
            alone = run.differentiates and run is not reference
            own = run.gradient(batch) if alone else (loss, gradients)
            losses[name].append(own[0])
            snapshots[name] = run.step(own[1], run.products(batch, t) if alone and fit else pairs)
        yield snapshots


def rounded(arrays: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    """Arrays rounded to a dtype, in float64."""
    if dtype == "bfloat16":
        as_bits = {k: np.asarray(x, np.float32).view(np.uint32) for k, x in arrays.items()}
        cut = {k: ((b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000).astype(np.uint32) for k, b in as_bits.items()}
        return {k: b.view(np.float32).astype(np.float64) for k, b in cut.items()}
    return {k: np.asarray(x, dtype).astype(np.float64) for k, x in arrays.items()}


ULP = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}


def nudged(arrays: Mapping[str, np.ndarray], dtype: str, seed: int) -> Arrays:
    """Every entry one unit in the last place up or down, at random."""
    random = np.random.Generator(np.random.PCG64(seed))
    moved = {
        k: x + np.where(random.random(x.shape) < 0.5, -1, 1) * ULP[dtype] * 2.0 ** np.floor(np.log2(np.abs(x) + 1e-300))
        for k, x in arrays.items()
    }
    return rounded(moved, dtype)


def envelope(
    method: Method,
    problem: Problem,
    start: Arrays,
    steps: int,
    dtype: str,
    seed: int,
    kind: type[Driver],
    tick: Tick,
    twins: int = TWINS,
) -> np.ndarray:
    """How far twins that start one ulp off get from the run itself: largest relative difference up to each step."""
    starts = [start, *(nudged(start, dtype, 1000 + i) for i in range(twins))]
    runs = {str(i): kind(method, problem, s, dtype) for i, s in enumerate(starts)}
    largest = np.zeros(steps)
    scales: dict[str, float] = {}
    for t in range(1, steps + 1):
        batch = problem.batch(seed, t)
        fit = method.recipe().newton and fits(method, t)
        params = [
            run.step(run.gradient(batch)[1], run.products(batch, t) if fit else None).params for run in runs.values()
        ]
        largest[t - 1] = max(furthest(params[0], twin, scales)[0] for twin in params[1:])
        tick(len(runs))
    return np.maximum.accumulate(largest)
