"""Every method on meshes of eight devices: the trajectory is that of one device, and what is exchanged is counted.

    python -m conformance.internal.mesh [--json FILE] [--markdown] [--only walks|bytes|compiling ...]
                               [--method NAME ...]
                               [--mesh 8|4x2|2x2x2 ...] [--mode auto|explicit ...] [--layout rows|columns|both ...]
                               [--steps N]

Walks are of a small convex problem in float64 on eight devices that one processor plays. A row fails where a parameter
or any of the state is further than 1e-12 from one device, relative to its norm; where an update or any of the state
does not lie after a step as before it; where the step was traced or compiled twice; or where the compiled step gathers
a factor that it could do without. Bytes are of the state on one device of eight, and compiling is of the update on a
mesh. The exit code is 1 where a row fails.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from math import prod
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import psgd_jax_backend
from conformance.packages import release
from conformance.terminal import Sheet, console, exits, markdown, writable, write_json
from psgd.methods import METHODS
from psgd_jax_backend import state_sharding

Tree = Any
DEVICES = 8
MESHES = {"8": (8,), "4x2": (4, 2), "2x2x2": (2, 2, 2)}
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
LAYOUTS = ("rows", "columns", "both")
BOUND = 1e-12  # of differences; float64 has 2e-16
NOISES = 5  # recorded gradients, again and again
RATE, SLOPE = 0.01, 0.3


def devices() -> None:
    """Eight of them, played by threads. To be called before JAX looks for any."""
    # The devices wait for one another in each collective, and XLA has no more threads than processors unless told.
    os.environ.setdefault("NPROC", str(4 * DEVICES))
    # Its warnings about moves that it knows no short way for: what it makes of them is counted.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)


# ---- what is walked on ------------------------------------------------------------------------
# A bucket of equal leaves, scanned layers, a matrix by itself, a bias. No two lengths are alike, so that the shape of a
# factor tells whose it is; the factors of the matrices are large enough to be spread, those of the layers always are.
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"bucket{i}": (64, 72) for i in range(3)},
    "layers": (8, 16, 24),
    "lone": (80, 88),
    "bias": (8,),
}
# For one preconditioner of all parameters, and where that is a matrix of all numbers by all numbers.
FEWER = SHAPES | {f"bucket{i}": (16, 24) for i in range(3)} | {"lone": (24, 32)}
SMALL: dict[str, tuple[int, ...]] = {"lone": (8, 16), "bias": (8,)}
SCANNED, ALONE = "layers", "lone"


class Walker(NamedTuple):
    """A method and the shapes that it walks on."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    optimizer: optax.GradientTransformationExtraArgs
    newton: bool

    def start(self) -> Tree:
        """Parameters, on no device yet."""
        random = np.random.default_rng(0)
        return {name: random.standard_normal(shape) for name, shape in self.shapes.items()}

    def noises(self) -> list[Tree]:
        """What is added to gradients."""
        random = np.random.default_rng(1)
        return [{n: random.standard_normal(s) for n, s in self.shapes.items()} for _ in range(NOISES)]

    def step(self, params: Tree, state: Tree, noise: Tree) -> tuple[Tree, Tree, Tree]:
        """Updates, parameters and state after a step on the gradient of 0.15 |p|^2, with noise."""
        gradients, given = jax.tree.map(lambda p, x: SLOPE * p + x, params, noise), {}
        if self.newton:  # v is any function of each number by itself, and H v is known
            v = jax.tree.map(lambda g: jnp.cos(9 * g), gradients)
            given = {"vector": v, "Hvp": jax.tree.map(lambda x: SLOPE * x, v), "update_preconditioner": True}
        updates, state = self.optimizer.update(gradients, state, params, **given)
        return updates, optax.apply_updates(params, updates), state


def walker(name: str) -> Walker:
    """Of a method with its defaults, but all of its state in the dtype of the parameters."""
    recipe = METHODS[name]().recipe()
    options = {f.name: None for f in fields(METHODS[name]) if f.metadata["kind"] == "dtype"}
    n = sum(prod(shape) for shape in SHAPES.values())
    square = recipe.joint and (n, n) in map(tuple, recipe.preconditioner.shapes((n,)))
    shapes = SMALL if square else FEWER if recipe.joint else SHAPES
    scanned = {} if recipe.joint else {"scanned_layers": {leaf: leaf == SCANNED for leaf in shapes}}
    return Walker(name, shapes, getattr(psgd_jax_backend, name)(RATE, **scanned, **options), recipe.newton)


def spec(shape: Sequence[int], mesh: Mesh, layout: str) -> PartitionSpec:
    """How a parameter lies: its rows over the first axis, its columns over all, or rows over the first and columns over
    the others; each layer of a stack likewise, and a bias as rows do."""
    first, *others = mesh.axis_names
    if len(shape) < 2:
        return PartitionSpec(first) if layout == "rows" else PartitionSpec()
    own = {
        "rows": (first, None),
        "columns": (None, mesh.axis_names),
        "both": (first, tuple(others)),
    }[layout]
    return PartitionSpec(*[None] * (len(shape) - 2), *own)


def made_mesh(mesh: str, mode: str) -> Mesh:
    sizes = MESHES[mesh]
    return jax.make_mesh(sizes, ("x", "y", "z")[: len(sizes)], axis_types=(MODES[mode],) * len(sizes))


def put(tree: Tree, mesh: Mesh, layout: str) -> Tree:
    """Parameters on a mesh."""
    return {k: jax.device_put(x, NamedSharding(mesh, spec(np.shape(x), mesh, layout))) for k, x in tree.items()}


# ---- walking ----------------------------------------------------------------------------------
COMPILING = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event
_compiled = Counter[str]()


@cache
def _listening() -> None:
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _compiled.update([event]))


class Walked(NamedTuple):
    """What came out: updates, parameters and state; which of them lie elsewhere than at the start; how often the step
    was traced and compiled; and the program."""

    updates: Tree
    params: Tree
    state: Tree
    moved: list[str]
    traces: int
    compiled: int
    program: str


def walk(who: Walker, params: Tree, state: Tree, steps: range) -> Walked:
    """From parameters and state wherever they lie."""
    traces = 0

    @jax.jit
    def step(params: Tree, state: Tree, noise: Tree) -> tuple[Tree, Tree, Tree]:
        nonlocal traces
        traces += 1
        return who.step(params, state, noise)

    _listening()
    noises = [{k: jax.device_put(x, params[k].sharding) for k, x in own.items()} for own in who.noises()]
    start, before = (params, params, state), _compiled[COMPILING]
    program = step.lower(params, state, noises[0]).compile().as_text() or ""
    updates = params
    for t in steps:
        updates, params, state = step(params, state, noises[t % NOISES])
    end = updates, params, state
    moved = [
        jax.tree_util.keystr(path)
        for (path, x), was in zip(jax.tree_util.tree_leaves_with_path(end), jax.tree.leaves(start), strict=True)
        if not x.sharding.is_equivalent_to(was.sharding, x.ndim)
    ]
    return Walked(*end, moved, traces, _compiled[COMPILING] - before, program)


def begun(who: Walker, params: Tree) -> Tree:
    """The state of parameters on a mesh, made where it is to lie."""
    return jax.jit(who.optimizer.init, out_shardings=state_sharding(who.optimizer, params))(params)


@cache
def reference(name: str, steps: int) -> tuple[Tree, Tree]:
    """Parameters and state after steps on one device."""
    who = walker(name)
    params = jax.tree.map(jnp.asarray, who.start())
    done = walk(who, params, jax.jit(who.optimizer.init)(params), range(steps))
    return jax.tree.map(np.asarray, (done.params, done.state))


def apart(ours: Tree, theirs: Tree) -> float:
    """The largest difference of two trees, leaf by leaf, relative to the norm of theirs."""

    def one(x: Any, y: Any) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        size = float(np.linalg.norm(y))
        return float(np.linalg.norm(x - y)) / (size or 1.0)

    # NumPy's, of which a NaN comes out
    return float(np.max([one(x, y) for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)], initial=0.0))


# ---- what is exchanged ------------------------------------------------------------------------
EXCHANGE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")


def exchanges(program: str) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Each exchange in a compiled program: its kind, and the shapes of what a device holds after it."""
    plain = re.sub(r"/\*.*?\*/", "", program)
    return [
        (kind, [tuple(int(n) for n in shape.split(",") if n) for shape in SHAPE.findall(types)])
        for types, kind in EXCHANGE.findall(plain)
    ]


def gathered(who: Walker, program: str) -> Counter[str]:
    """How often a whole factor is gathered, of each leaf that has matrices for factors, by the name of the leaf."""
    method = METHODS[who.name]()
    recipe, owners = method.recipe(), dict[tuple[int, ...], str]()
    if recipe.joint:
        return Counter()
    for name, shape in who.shapes.items():
        for factor in recipe.preconditioner.shapes(recipe.layout(shape[1:] if name == SCANNED else shape)):
            if len(factor) > 1:
                owners[tuple(factor)] = f"{name} {'x'.join(map(str, factor))}"
    shapes = [shape for kind, held in exchanges(program) if kind == "all-gather" for shape in held]
    return Counter(owners[shape[-2:]] for shape in shapes if shape[-2:] in owners)


# ---- rows -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """What was seen and what is wrong with it."""

    method: str
    seconds: float
    complaints: list[str]


@dataclass(frozen=True)
class WalkRow(Row):
    """A walk. params, state: how far from one device. exchanges: how many of each kind are in the compiled step, both
    branches of a decision counted. gathers: of factors, by the leaf."""

    mesh: str
    mode: str
    layout: str
    steps: int
    params: float
    state: float
    exchanges: dict[str, int] = field(default_factory=dict)
    gathers: dict[str, int] = field(default_factory=dict)


def walk_row(name: str, mesh: str, mode: str, layout: str, steps: int) -> WalkRow:
    """Walk a method on a mesh and judge it."""
    who, (params, state) = walker(name), reference(name, steps)
    start = perf_counter()
    there = put(who.start(), made_mesh(mesh, mode), layout)
    done = walk(who, there, begun(who, there), range(steps))
    of_params, of_state, gathers = apart(done.params, params), apart(done.state, state), gathered(who, done.program)
    told = [
        f"{what} {far:.1e} apart" for what, far in (("parameters", of_params), ("state", of_state)) if not far <= BOUND
    ]
    told += [f"moved: {', '.join(done.moved)}"] * bool(done.moved)
    told += [f"{n} times {what}" for what, n in (("traced", done.traces), ("compiled", done.compiled)) if n != 1]
    needless = {leaf: n for leaf, n in gathers.items() if n > leaf.startswith(ALONE)}
    told += [f"gathered: {', '.join(f'{leaf} {n} times' for leaf, n in needless.items())}"] * bool(needless)
    kinds = Counter(kind for kind, _ in exchanges(done.program))
    seconds = perf_counter() - start
    return WalkRow(
        name, seconds, told, mesh, mode, layout, steps, of_params, of_state, dict(sorted(kinds.items())), dict(gathers)
    )


# ---- how much is where, and how long it takes to compile ----------------------------------------
DEEP, SHALLOW, WIDTH = 48, 6, 64
FORMS = ("scanned", "leaves")  # layers in one leaf, a leaf for each
SHARE = 1 / 6  # of the bytes on one device, of which an eighth is the least
LONGER = 1.5  # times as long to compile eight times as many scanned layers


@dataclass(frozen=True)
class BytesRow(Row):
    """Bytes of state on the fullest of eight devices, and on one device alone."""

    form: str
    spread: int
    alone: int


@dataclass(frozen=True)
class CompileRow(Row):
    """Seconds of the processor to compile an update of few and of many layers."""

    form: str
    shallow: float
    deep: float


def layered(name: str, form: str, layers: int) -> tuple[optax.GradientTransformation, dict[str, tuple[int, ...]]]:
    """An optimizer for equal layers, and their shapes. One preconditioner of all parameters knows no layers."""
    scanned = {"scanned_layers": True} if form == FORMS[0] and not METHODS[name]().recipe().joint else {}
    one: dict[str, tuple[int, ...]] = {"layers": (layers, WIDTH, WIDTH)}
    many: dict[str, tuple[int, ...]] = {f"layer{i}": (WIDTH, WIDTH) for i in range(layers)}
    return getattr(psgd_jax_backend, name)(RATE, **scanned), one if form == FORMS[0] else many


def bytes_row(name: str, form: str) -> BytesRow:
    """Make the state of many layers and see how much of it is where."""
    start = perf_counter()
    tx, shapes = layered(name, form, DEEP)
    params = put({k: jnp.zeros(s, jnp.float32) for k, s in shapes.items()}, made_mesh("8", "auto"), "rows")
    state = jax.tree.leaves(jax.jit(tx.init, out_shardings=state_sharding(tx, params))(params))
    there = Counter[Any]()
    for x in state:
        there.update({shard.device: shard.data.nbytes for shard in x.addressable_shards})
    most, alone = max(there.values()), sum(x.nbytes for x in state)
    told = [f"{most / alone:.3f} of the bytes on one device"] * (most > SHARE * alone)
    return BytesRow(name, perf_counter() - start, told, form, most, alone)


def compile_row(name: str, form: str) -> CompileRow:
    """Compile updates of few and of many layers, one after the other."""
    begin, mesh, seconds = perf_counter(), made_mesh("8", "explicit"), dict[int, float]()
    for layers in (SHALLOW, SHALLOW, DEEP):  # the first of all warms up
        tx, shapes = layered(name, form, layers)
        params = {
            k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec(s, mesh, "rows")))
            for k, s in shapes.items()
        }
        typed = jax.tree.map(
            lambda x, lying: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lying),
            jax.eval_shape(tx.init, params),
            state_sharding(tx, params),
        )
        jax.clear_caches()
        start = process_time()  # of the processor, whoever else may use it
        jax.jit(tx.update).lower(params, typed, params).compile()
        seconds[layers] = process_time() - start
    ratio = seconds[DEEP] / seconds[SHALLOW]
    told = [f"{ratio:.2f} times as long"] * (form == FORMS[0] and ratio > LONGER)
    return CompileRow(name, perf_counter() - begin, told, form, seconds[SHALLOW], seconds[DEEP])


# ---- telling ----------------------------------------------------------------------------------
Cells = list[list[str]]
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def judged(row: Row) -> str:
    """The last cell of a row."""
    return " ".join(["FAIL:", "; ".join(row.complaints)]) if row.complaints else "pass"


def walk_cells(rows: Sequence[WalkRow]) -> Cells:
    """A line for each walk."""
    head = [
        "method",
        "mesh",
        "axes",
        "layout",
        "steps",
        "parameters",
        "state",
        "exchanges",
        "factors gathered",
        "verdict",
    ]
    return [head] + [
        [
            *(r.method, r.mesh, r.mode, r.layout, str(r.steps), f"{r.params:.1e}", f"{r.state:.1e}"),
            *(", ".join(f"{n} {k}" for k, n in counts.items()) for counts in (r.exchanges, r.gathers)),
            judged(r),
        ]
        for r in rows
    ]


def distances(rows: Sequence[WalkRow]) -> Cells:
    """The largest differences on each mesh, of parameters and of state."""
    cells = [
        ["method", *(f"{mesh}: {what}" for mesh in MESHES for what in ("parameters", "state")), "walks", "verdict"]
    ]
    for name in dict.fromkeys(r.method for r in rows):
        own, line = [r for r in rows if r.method == name], [name]
        for mesh in MESHES:
            there = [r for r in own if r.mesh == mesh]
            for far in ([r.params for r in there], [r.state for r in there]):
                line.append(f"{max(far):.1e}" if far else "")
        failed = [r for r in own if r.complaints]
        cells.append([*line, str(len(own)), f"{len(failed)} FAIL" if failed else "pass"])
    return cells


def counts(rows: Sequence[WalkRow]) -> Cells:
    """How many exchanges there are in a compiled step: from the fewest of any method to the most."""
    cells = [["mesh", "axes", "layout", *KINDS[:-1]]]
    for key in dict.fromkeys((r.mesh, r.mode, r.layout) for r in rows):
        own = [r.exchanges for r in rows if (r.mesh, r.mode, r.layout) == key]
        found = [[counted.get(kind, 0) for counted in own] for kind in KINDS[:-1]]
        cells.append([*key, *(f"{min(n)} to {max(n)}" if min(n) < max(n) else str(n[0]) for n in found)])
    return cells


def bytes_cells(rows: Sequence[BytesRow]) -> Cells:
    """A line for each state."""
    head = ["method", "layers", "one device", "each of eight", "share", "verdict"]
    return [head] + [
        [r.method, r.form, f"{r.alone:,}", f"{r.spread:,}", f"{r.spread / r.alone:.3f}", judged(r)] for r in rows
    ]


def compile_cells(rows: Sequence[CompileRow]) -> Cells:
    """A line for each pair of compilations."""
    head = ["method", "layers", f"{SHALLOW} layers", f"{DEEP} layers", "ratio", "verdict"]
    return [head] + [
        [r.method, r.form, f"{r.shallow:.1f} s", f"{r.deep:.1f} s", f"{r.deep / r.shallow:.2f}", judged(r)]
        for r in rows
    ]


# ---- the command ------------------------------------------------------------------------------
def square(name: str) -> bool:
    """Has a method a matrix of all numbers by all numbers?"""
    return walker(name).shapes is SMALL


def combinations(given: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Meshes, modes and layouts; both is rows where there is one axis."""
    for mode in given.mode or MODES:
        for mesh in given.mesh or MESHES:
            for layout in given.layout or LAYOUTS:
                if layout != LAYOUTS[-1] or len(MESHES[mesh]) > 1:
                    yield mesh, mode, layout


def walks(given: argparse.Namespace, names: Sequence[str]) -> Iterator[Row]:
    """Walks of methods."""
    # What is looked at are numbers and exchanges, not how fast the machine code is.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        for combination in combinations(given):
            for name in names:
                yield walk_row(name, *combination, given.steps)


def sizes(given: argparse.Namespace, names: Sequence[str]) -> Iterator[Row]:
    """Bytes of states."""
    jax.config.update("jax_disable_most_optimizations", True)
    for name in names:
        if not square(name):
            yield from (bytes_row(name, form) for form in FORMS)


def compilations(given: argparse.Namespace, names: Sequence[str]) -> Iterator[Row]:
    """Times of compiling."""
    jax.config.update("jax_disable_most_optimizations", False)
    for name in names:
        if not METHODS[name]().recipe().joint:
            yield from (compile_row(name, form) for form in FORMS)


class Part(NamedTuple):
    """One of the things that can be looked at: its rows, and its tables for a terminal and for a document."""

    rows: Callable[[argparse.Namespace, Sequence[str]], Iterator[Row]]
    tables: Sequence[Callable[[Any], Cells]]
    documents: Sequence[Callable[[Any], Cells]]


PARTS = {
    "walks": Part(walks, [walk_cells], [distances, counts]),
    "bytes": Part(sizes, [bytes_cells], [bytes_cells]),
    "compiling": Part(compilations, [compile_cells], [compile_cells]),
}


def tell(cells: Cells) -> None:
    """A table on the terminal."""
    head, *lines = cells
    made = Sheet(head)
    for line in lines:
        made.add_row(*line)
    console().print(made)


def main(arguments: Sequence[str] | None = None) -> None:
    """Look, tell, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.internal.mesh", description="Are meshes as one device?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was seen here too, as it comes")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/sharding.md has them")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of each walk")
    for flag, choices in (("only", PARTS), ("method", METHODS), ("mesh", MESHES), ("mode", MODES), ("layout", LAYOUTS)):
        parser.add_argument(f"--{flag}", action="append", choices=list(choices), help="this one alone; may be repeated")
    given = parser.parse_args(arguments)
    with exits():
        writable(given.json)
    devices()
    progress, found = console(stderr=True), dict[str, list[Row]]()
    versions = {name: release(name) for name in ("jax", "jaxlib", "numpy")}
    for part in given.only or PARTS:
        rows = found.setdefault(part, [])
        for row in PARTS[part].rows(given, given.method or list(METHODS)):
            rows.append(row)
            seen = asdict(row)
            told = " ".join(str(seen[key]) for key in ("method", "mesh", "mode", "layout", "form") if key in seen)
            progress.print(f"{told}: {judged(row)}, {row.seconds:.0f} s", markup=False, soft_wrap=True)
            write_json(given.json, {"versions": versions} | {k: [asdict(r) for r in v] for k, v in found.items()})
    for part, rows in found.items():
        for cells in PARTS[part].documents if given.markdown else PARTS[part].tables:
            if given.markdown:
                console().print(markdown(cells(rows)), "", sep="\n", markup=False, soft_wrap=True)
            else:
                tell(cells(rows))
    if any(row.complaints for rows in found.values() for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
