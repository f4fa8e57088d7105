"""Runs of a method on a mesh of eight devices that one processor plays, and on one device."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import psgd_jax_backend
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


# ---- what the runs are on ------------------------------------------------------------------------
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


class MeshRunner(NamedTuple):
    """A method and the shapes that it runs on."""

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


def runner(name: str) -> MeshRunner:
    """Of a method with its defaults, but all of its state in the dtype of the parameters."""
    recipe = METHODS[name]().recipe()
    options = {f.name: None for f in fields(METHODS[name]) if f.metadata["kind"] == "dtype"}
    n = sum(prod(shape) for shape in SHAPES.values())
    square = recipe.joint and (n, n) in map(tuple, recipe.preconditioner.shapes((n,)))
    shapes = SMALL if square else FEWER if recipe.joint else SHAPES
    scanned = {} if recipe.joint else {"scanned_layers": {leaf: leaf == SCANNED for leaf in shapes}}
    return MeshRunner(name, shapes, getattr(psgd_jax_backend, name)(RATE, **scanned, **options), recipe.newton)


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


def mesh_of(mesh: str, mode: str) -> Mesh:
    sizes = MESHES[mesh]
    return jax.make_mesh(sizes, ("x", "y", "z")[: len(sizes)], axis_types=(MODES[mode],) * len(sizes))


def put(tree: Tree, mesh: Mesh, layout: str) -> Tree:
    """Parameters on a mesh."""
    return {k: jax.device_put(x, NamedSharding(mesh, spec(np.shape(x), mesh, layout))) for k, x in tree.items()}


# ---- running ----------------------------------------------------------------------------------
COMPILING = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event
_compiled = Counter[str]()


@cache
def _listening() -> None:
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _compiled.update([event]))


class Outcome(NamedTuple):
    """What came of a run: updates, parameters and state; which of them lie elsewhere than at the start; how often
    the step was traced and compiled; and the program."""

    updates: Tree
    params: Tree
    state: Tree
    moved: list[str]
    traces: int
    compiled: int
    program: str


def run(who: MeshRunner, params: Tree, state: Tree, steps: range) -> Outcome:
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
    return Outcome(*end, moved, traces, _compiled[COMPILING] - before, program)


def begun(who: MeshRunner, params: Tree) -> Tree:
    """The state of parameters on a mesh, made where it is to lie."""
    return jax.jit(who.optimizer.init, out_shardings=state_sharding(who.optimizer, params))(params)


@cache
def reference(name: str, steps: int) -> tuple[Tree, Tree]:
    """Parameters and state after steps on one device."""
    who = runner(name)
    params = jax.tree.map(jnp.asarray, who.start())
    done = run(who, params, jax.jit(who.optimizer.init)(params), range(steps))
    return jax.tree.map(np.asarray, (done.params, done.state))


def apart(ours: Tree, theirs: Tree) -> float:
    """The largest difference of two trees, leaf by leaf, relative to the norm of theirs."""

    def one(x: Any, y: Any) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        size = float(np.linalg.norm(y))
        return float(np.linalg.norm(x - y)) / (size or 1.0)

    # NumPy's, of which a NaN comes out
    return float(np.max([one(x, y) for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)], initial=0.0))
