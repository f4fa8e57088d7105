"""What a method keeps of a model, and what a step of it costs, from the shapes of the parameters alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import prod
from textwrap import wrap
from typing import Any, NamedTuple

from psgd import pipeline
from psgd.arrays import Factors
from psgd.cost import BYTES, NoDraws, ShapeNamespace, ShapeTracer
from psgd.geometry import GEOMETRIES
from psgd.hyperparameters import Method
from psgd.recipe import Plan, Recipe, leaves, rebuilt
from psgd.schedule import Averaging
from psgd.shapes import Shape


@dataclass(frozen=True)
class ParameterCost:
    """What a method keeps of one parameter, and what a step of it costs.

    Args:
        name: of the parameter.
        shape: of the parameter.
        dtype: name of its dtype.
        factors: the shape of each factor as a word, such as "64x64" (dense) or "64" (diagonal).
        layers: how many layers the first axis of `shape` stacks; None where it stacks none.
        state: bytes of the state.
        apply: floating-point operations of a step that leaves the factors as they are.
        fit: floating-point operations that a fit adds.
    """

    name: str
    shape: Shape
    dtype: str
    factors: tuple[str, ...]
    layers: int | None
    state: int
    apply: int
    fit: int

    @property
    def bytes(self) -> int:
        """Bytes of the parameter itself."""
        return prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Summary:
    """The rows of all parameters of an optimizer; as text, a table.

    Args:
        methods: titles of the methods.
        rows: one a parameter.
        counters: bytes of the counters of steps.
        skipped: number of steps that were skipped since a gradient was not finite.
        notes: sentences on unusual costs.
    """

    methods: tuple[str, ...]
    rows: tuple[ParameterCost, ...]
    counters: int = 0
    skipped: int = 0
    notes: tuple[str, ...] = ()

    @property
    def state(self) -> int:
        """Bytes of all state."""
        return sum(row.state for row in self.rows) + self.counters

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(row.bytes for row in self.rows)

    @property
    def apply(self) -> int:
        """Floating-point operations of a step that leaves the factors as they are."""
        return sum(row.apply for row in self.rows)

    @property
    def fit(self) -> int:
        """Floating-point operations that a fit adds to a step."""
        return sum(row.fit for row in self.rows)

    def cells(self) -> list[tuple[str, ...]]:
        """Head, one line a parameter, and totals, as text."""
        head = ("parameter", "shape", "dtype", "factors", "state", "flops/step", "flops/fit")
        lines = [
            (
                row.name,
                sized(row.shape) or "scalar",
                row.dtype,
                " ".join(row.factors) + (f" ({row.layers} layers)" if row.layers is not None else ""),
                in_bytes(row.state),
                in_flops(row.apply),
                in_flops(row.fit),
            )
            for row in self.rows
        ]
        elements = sum(prod(row.shape) for row in self.rows)
        total = f"{elements:,} in {len(self.rows)}"
        return [
            head,
            *lines,
            ("total", total, in_bytes(self.bytes), "", in_bytes(self.state), in_flops(self.apply), in_flops(self.fit)),
        ]

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 80) -> str:
        """The table, at most `width` characters wide.

        Where that is too few, a long name has a line to itself, and columns such as shape and dtype are left out, which
        the last line says.
        """
        cells = self.cells()
        kept = _fitting(cells, width)
        left = sum(i < len(cells[0]) - 3 for i in kept)
        head, *lines, total = ([line[i] for i in kept] for line in cells)
        widths = [max(map(len, column)) for column in zip(head, *lines, total, strict=True)]
        widths[0] = max(len(head[0]), len(total[0]), min(widths[0], width - sum(widths[1:]) - 2 * (len(kept) - 1)))

        def as_text(line: Sequence[str]) -> str:
            parts = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            if len(line[0]) > widths[0]:
                parts[0] += f"\n{'':{widths[0]}}"
            return "  ".join(parts).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(kept) - 1))
        gone = [name for i, name in enumerate(cells[0]) if i not in kept]
        notes = [f"parameters: {', '.join(cells[-1][1:3])}", f"left out to fit {width} columns: {', '.join(gone)}"]
        notes *= bool(gone)
        notes += [line for note in self.notes for line in wrap(note, width)]
        notes += [f"{self.skipped:,} steps skipped: a gradient was not finite"] * bool(self.skipped)
        body = [as_text(head), rule, *map(as_text, lines), rule, as_text(total)]
        return "\n".join([", ".join(self.methods), *body, *notes])


SPARE = (2, 1, 3, 5)  # columns left out where there is no room, in this order: dtype, shape, factors, flops/step
# A fit so many times as costly as in another geometry gets a note. By count, one rotation makes that of a square matrix
# 1.6 times as costly, which needs none; that of a long vector some n times.
MUCH = 4
NAME = 24  # characters of a name for which columns are left out; a longer one may get a line to itself


def _fitting(cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """The numbers of the columns for which there is room."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] = min(widths[0], NAME)
    kept = list(range(len(widths)))
    for spare in SPARE:
        if sum(widths[i] for i in kept) + 2 * (len(kept) - 1) > width:
            kept.remove(spare)
    return kept


def sized(shape: Sequence[int]) -> str:
    """A shape as a word, such as "64x32"."""
    return "x".join(map(str, shape))


def in_bytes(n: int) -> str:
    """Bytes, in the unit that shows three digits."""
    return _scaled(n, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def in_flops(n: int) -> str:
    """Floating-point operations, in the unit that shows three digits."""
    return _scaled(n, ("", "K", "M", "G", "T", "P"), 1000)


def _scaled(n: float, units: Sequence[str], step: int) -> str:
    """A number with three digits, in the first unit in which it rounds to less than 1000."""
    power = 0
    while n >= 999.5 and power < len(units) - 1:
        n, power = n / step, power + 1
    return f"{n:.0f} {units[0]}".strip() if not power else f"{n:.3g} {units[power]}"


def parameter_cost(
    method: Method, name: str, shape: Sequence[int], dtype: str = "float32", *, scanned: bool = False
) -> ParameterCost:
    """The row of one parameter. scanned: its first axis counts layers, each with a preconditioner of its own."""
    layers, one = (shape[0], tuple(shape[1:])) if scanned else (None, tuple(shape))
    factors, state, apply, fit = _costs(method.recipe(), one, dtype)
    n = 1 if layers is None else layers
    return ParameterCost(name, tuple(shape), dtype, factors, layers, n * state, n * apply, n * fit)


class Parameter(NamedTuple):
    """A parameter by its name, shape and dtype. scanned: its first axis counts layers."""

    name: str
    shape: Shape
    dtype: str = "float32"
    scanned: bool = False


def parameter_costs(method: Method, parameters: Sequence[Parameter]) -> list[ParameterCost]:
    """The rows of the parameters of one optimizer.

    The cost of a joint preconditioner is divided among them by their numbers of elements; its Lipschitz estimates are
    in `counters`.
    """
    recipe = method.recipe()
    if not recipe.joint:
        return [parameter_cost(method, p.name, p.shape, p.dtype, scanned=p.scanned) for p in parameters]
    n = sum(prod(p.shape) for p in parameters)
    if not n:
        return [ParameterCost(p.name, p.shape, p.dtype, (), None, 0, 0, 0) for p in parameters]
    widest = _widest(parameters)
    *_, apply, fit = _costs(recipe, (n,), widest)
    factors = _whole(recipe, parameters)
    per_number = sum(q.nbytes for q in factors.Q) // n

    def one(p: Parameter) -> ParameterCost:
        size = prod(p.shape)
        momentum = pipeline.init_momentum(recipe, ShapeTracer(p.shape, p.dtype, ShapeNamespace()))
        kept = size * per_number + (0 if momentum is None else momentum.nbytes)
        words = tuple(sized((size, *q.shape[1:])) for q in factors.Q)
        return ParameterCost(p.name, p.shape, p.dtype, words, None, kept, apply * size // n, fit * size // n)

    return [one(p) for p in parameters]


def counters(method: Method, parameters: Sequence[Parameter], size: int, *, each: bool) -> int:
    """Bytes of state in no row: counters of `size` bytes, and the Lipschitz estimates of a joint preconditioner.

    each: every parameter has a copy of them, as in PyTorch; else there is one.
    """
    recipe, copies = method.recipe(), len(parameters) if each else 1
    bounds = sum(x.nbytes for x in _whole(recipe, parameters).L) if recipe.joint and parameters else 0
    return copies * (size * (1 + method.schedule().counts) + bounds)


def _widest(parameters: Sequence[Parameter]) -> str:
    """The name of the dtype in which the parameters are one vector."""
    return max((p.dtype for p in parameters), key=list(BYTES).index)


def _whole(recipe: Recipe, parameters: Sequence[Parameter]) -> Factors:
    """The factors of all parameters as one vector."""
    n = sum(prod(p.shape) for p in parameters)
    return pipeline.init(recipe, ShapeTracer((n,), _widest(parameters), ShapeNamespace()), None, NoDraws()).factors


@lru_cache(maxsize=4096)
def _costs(recipe: Recipe, shape: Shape, dtype: str) -> tuple[tuple[str, ...], int, int, int]:
    """Factors, bytes of state, operations of a step without a fit, and of the fit alone."""
    state = pipeline.init(recipe, ShapeTracer(shape, dtype, ShapeNamespace()), None, NoDraws())
    factors = tuple(sized(q.shape) or "1" for q in state.factors.Q)
    apply, both = (_operations(recipe, shape, dtype, fit) for fit in (False, True))
    return factors, sum(x.nbytes for x in leaves(state)), apply, both - apply


def _operations(recipe: Recipe, shape: Shape, dtype: str, fit: bool) -> int:
    """Floating-point operations of a step, with a fit or without."""
    xp = ShapeNamespace()
    take_step(recipe, shape, dtype, xp, fit=fit)
    return xp.flops


def take_step(recipe: Recipe, shape: Shape, dtype: str, xp: ShapeNamespace, *, fit: bool) -> None:
    """One step of a tensor of a shape and a dtype in the namespace xp, which counts the step and not the start."""
    g = ShapeTracer(shape, dtype, ShapeNamespace())
    state = pipeline.init(recipe, g, None, NoDraws())
    plan = Plan(fit, False, False, Averaging(0.5), rate=0.1, beta_lipschitz=0.5, damping=0.1, key=None)
    g, *arrays = (ShapeTracer(x.shape, x.dtype, xp) for x in (g, *leaves(state)))
    pair = (g, g) if recipe.newton else None
    u, _ = pipeline.step(recipe, plan, g, rebuilt(state, arrays), NoDraws(), pair=pair)
    pipeline.displacement(g, u, 0.1, 0.1)


def summary(pairs: Iterable[tuple[Method, ParameterCost]], counters: int = 0, skipped: int = 0) -> Summary:
    """The summary of rows, each with its method."""
    by_method: dict[Method, list[ParameterCost]] = {}
    for method, row in (pairs := list(pairs)):
        by_method.setdefault(method, []).append(row)
    notes = [note for method, group in by_method.items() for note in rotation_note(method, group)]
    titles = dict.fromkeys(method.title for method in by_method)
    return Summary(tuple(titles), tuple(row for _, row in pairs), counters, skipped, tuple(notes))


def rotation_note(method: Method, costs: Sequence[ParameterCost]) -> list[str]:
    """A sentence on the geometries that do not rotate, where a fit of these rows is much cheaper in them.

    So it is of long dense vectors, whose rotations multiply full matrices, and where rotations are repeated. costs: the
    rows of one method.
    """
    name = next((f.name for f in fields(method) if getattr(method, f.name) in tuple(GEOMETRIES)), None)
    if name is None or GEOMETRIES[getattr(method, name)].turn is None:
        return []
    parameters = [Parameter(r.name, r.shape, r.dtype, r.layers is not None) for r in costs]

    def fit(geometry: str) -> int:
        chosen: dict[str, Any] = {name: geometry}
        return sum(r.fit for r in parameter_costs(replace(method, **chosen), parameters))

    now = sum(r.fit for r in costs)
    fits = {geometry: fit(geometry) for geometry, record in GEOMETRIES.items() if record.turn is None}
    cheap = {geometry: cost for geometry, cost in fits.items() if MUCH * cost < now}
    if not cheap:
        return []
    return [
        f"{method.title}: {name}={getattr(method, name)!r} rotates, which takes most of a fit's {in_flops(now)}; "
        f"{', '.join(cheap)} do not, and fit in {in_flops(max(cheap.values()))} or less"
    ]
