"""What is measured on meshes: distance from one device, exchanges in the compiled step, bytes, times of compiling."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

import psgd_jax_backend
from conformance.internal.mesh_runs import (
    ALONE,
    BOUND,
    RATE,
    SCANNED,
    MeshRunner,
    apart,
    begun,
    mesh_of,
    put,
    reference,
    run,
    runner,
    spec,
)
from psgd.methods import METHODS
from psgd_jax_backend import state_sharding

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


def gathered(who: MeshRunner, program: str) -> Counter[str]:
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
class MeshResult:
    """What was seen and what is wrong with it."""

    method: str
    seconds: float
    complaints: list[str]


@dataclass(frozen=True)
class RunResult(MeshResult):
    """A run. params, state: how far from one device. exchanges: how many of each kind are in the compiled step, both
    branches of a decision counted. gathers: of factors, by the leaf."""

    mesh: str
    mode: str
    layout: str
    steps: int
    params: float
    state: float
    exchanges: dict[str, int] = field(default_factory=dict)
    gathers: dict[str, int] = field(default_factory=dict)


def run_result(name: str, mesh: str, mode: str, layout: str, steps: int) -> RunResult:
    """Run a method on a mesh and judge it."""
    who, (params, state) = runner(name), reference(name, steps)
    start = perf_counter()
    placed = put(who.start(), mesh_of(mesh, mode), layout)
    done = run(who, placed, begun(who, placed), range(steps))
    of_params, of_state, gathers = apart(done.params, params), apart(done.state, state), gathered(who, done.program)
    complaints = [
        f"{what} {far:.1e} apart" for what, far in (("parameters", of_params), ("state", of_state)) if not far <= BOUND
    ]
    complaints += [f"moved: {', '.join(done.moved)}"] * bool(done.moved)
    complaints += [f"{n} times {what}" for what, n in (("traced", done.traces), ("compiled", done.compiled)) if n != 1]
    needless = {leaf: n for leaf, n in gathers.items() if n > leaf.startswith(ALONE)}
    complaints += [f"gathered: {', '.join(f'{leaf} {n} times' for leaf, n in needless.items())}"] * bool(needless)
    kinds = Counter(kind for kind, _ in exchanges(done.program))
    seconds = perf_counter() - start
    return RunResult(
        name,
        seconds,
        complaints,
        mesh,
        mode,
        layout,
        steps,
        of_params,
        of_state,
        dict(sorted(kinds.items())),
        dict(gathers),
    )


# ---- how much is where, and how long it takes to compile ----------------------------------------
DEEP, SHALLOW, WIDTH = 48, 6, 64
FORMS = ("scanned", "leaves")  # layers in one leaf, a leaf for each
SHARE = 1 / 6  # of the bytes on one device, of which an eighth is the least
LONGER = 1.5  # times as long to compile eight times as many scanned layers


@dataclass(frozen=True)
class BytesResult(MeshResult):
    """Bytes of state on the fullest of eight devices, and on one device alone."""

    form: str
    spread: int
    alone: int


@dataclass(frozen=True)
class CompileResult(MeshResult):
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


def bytes_result(name: str, form: str) -> BytesResult:
    """Make the state of many layers and see how much of it is where."""
    start = perf_counter()
    tx, shapes = layered(name, form, DEEP)
    params = put({k: jnp.zeros(s, jnp.float32) for k, s in shapes.items()}, mesh_of("8", "auto"), "rows")
    state = jax.tree.leaves(jax.jit(tx.init, out_shardings=state_sharding(tx, params))(params))
    held = Counter[Any]()
    for x in state:
        held.update({shard.device: shard.data.nbytes for shard in x.addressable_shards})
    most, alone = max(held.values()), sum(x.nbytes for x in state)
    complaints = [f"{most / alone:.3f} of the bytes on one device"] * (most > SHARE * alone)
    return BytesResult(name, perf_counter() - start, complaints, form, most, alone)


def compile_result(name: str, form: str) -> CompileResult:
    """Compile updates of few and of many layers, one after the other."""
    begin, mesh, seconds = perf_counter(), mesh_of("8", "explicit"), dict[int, float]()
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
    complaints = [f"{ratio:.2f} times as long"] * (form == FORMS[0] and ratio > LONGER)
    return CompileResult(name, perf_counter() - begin, complaints, form, seconds[SHALLOW], seconds[DEEP])
