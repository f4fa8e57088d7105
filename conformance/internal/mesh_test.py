"""Meshes of eight devices are as one device, whoever makes the state, steps, wraps, saves or shares the work.

Tests in a group run in one child of this process, which has eight devices; here only their outcomes are told.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from conformance.internal import mesh as mesh_command
from conformance.internal import mesh_measures as measures
from conformance.internal import mesh_runs as runs
from conformance.internal.mesh_runs import BOUND, DEVICES, LAYOUTS, MESHES, MODES, apart, mesh_of, put
from psgd.methods import METHODS
from psgd_jax_backend import affine, lra, quad, state_sharding, xmat
from psgd_jax_backend._state import states

Tree = Any
ROOT = Path(__file__).resolve().parents[2]
CHILD = "PSGD_MESH_CHILD"
ENVIRONMENT = {
    CHILD: "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(DEVICES),
    "JAX_ENABLE_X64": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # numbers and layouts are looked at, and compiling takes the time
    "NPROC": str(4 * DEVICES),
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "PYTHONPATH": str(ROOT),
}
SECONDS = 1800

walking, other = (pytest.mark.xdist_group(name) for name in ("mesh runs", "mesh others"))
sharding = pytest.mark.contract("jax: sharding")
state_of = pytest.mark.contract("jax: state sharding")
checkpoints = pytest.mark.contract("jax: checkpoints")
processes = pytest.mark.contract("jax: processes")


# ---- a child with eight devices ---------------------------------------------------------------
@cache
def outcomes(tests: tuple[str, ...], folder: Path) -> dict[str, str]:
    """What became of tests, by name, in a child: "" where one passed, "skipped: ...", or what went wrong."""
    file = folder / "outcomes.xml"
    file.unlink(missing_ok=True)  # of another group
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={file}", *tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as late:
        return dict.fromkeys(tests, f"no outcome after {SECONDS} s\n{late.stdout!r}")
    if not file.exists():
        return dict.fromkeys(tests, f"the child ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    told = {}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        told[case.attrib["name"]] = "\n".join(
            f"{'skipped: ' if found.tag == 'skipped' else ''}{found.attrib.get('message', '')}\n{found.text or ''}"
            for found in case
            if found.tag in ("failure", "error", "skipped")
        )
    return told


@pytest.fixture(autouse=True)
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A test of a group is replaced by its outcome in the child, which runs all that are asked for of the group."""
    mark = request.node.get_closest_marker("xdist_group")
    if mark is None or os.environ.get(CHILD):
        return
    asked = [
        f"{Path(__file__).relative_to(ROOT)}::{item.name}"
        for item in request.session.items
        if item.path == request.node.path and item.get_closest_marker("xdist_group") == mark
    ]

    def told(**_: Any) -> None:
        found = outcomes(tuple(asked), tmp_path_factory.getbasetemp())
        text = found.get(request.node.name, found.get(asked[0], "the child did not run it"))
        if text.startswith("skipped: "):
            pytest.skip(text)
        if text:
            pytest.fail(text, pytrace=False)

    request.node.obj = told


# ---- every method -----------------------------------------------------------------------------
PLACES = [
    (mesh, mode, layout)
    for mesh, mode, layout in product(MESHES, MODES, LAYOUTS)
    if layout != LAYOUTS[-1] or len(MESHES[mesh]) > 1
]
# Each method and each place; there are more places than methods, and some methods compile in no time.
QUICK = "xmat", "dense_newton"
ROTATION = list(zip_longest([*METHODS, *QUICK, *QUICK], PLACES))


def test_each_method_and_each_place_is_in_the_rotation():
    names, places = zip(*ROTATION, strict=True)
    assert set(names) == set(METHODS) and set(places) == set(PLACES)
    assert all(None not in pair for pair in ROTATION)


@sharding
@state_of
@walking
@pytest.mark.parametrize(("name", "place"), ROTATION, ids=["-".join([name, *place]) for name, place in ROTATION])
def test_a_run_is_that_of_one_device(name: str, place: tuple[str, str, str]):
    row = measures.run_result(name, *place, steps=10)
    assert not row.complaints and row.exchanges
    assert apart(runs.reference(name, 10)[0], runs.runner(name).start()) > 1e-3  # it does move


# ---- users ------------------------------------------------------------------------------------
PARAMS = {"w": (16, 8), "v": (16, 8), "b": (8,)}  # two of a bucket
LAYERED = {"s": (8, 8, 16), "b": (8,)}
LAYERS = {"s": True, "b": False}


def start(shapes: dict[str, tuple[int, ...]] = PARAMS) -> Tree:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape) for name, shape in shapes.items()}


def on_mesh(mode: str = "explicit", shapes: dict[str, tuple[int, ...]] = PARAMS, mesh: str = "4x2") -> Tree:
    return put(start(shapes), mesh_of(mesh, mode), "both")


def slope(params: Tree, t: Any) -> Tree:
    """Gradients that depend on the step and on each number by itself."""
    return jax.tree.map(lambda p: 0.3 * p + jnp.cos(3 * p + t), params)


def begun(tx: optax.GradientTransformation, params: Tree) -> Tree:
    """State, on the mesh where there is one."""
    there = isinstance(jax.tree.leaves(params)[0].sharding, NamedSharding)
    return jax.jit(tx.init, out_shardings=state_sharding(tx, params) if there else None)(params)


def scanned(tx: optax.GradientTransformation, params: Tree, state: Tree = None, steps: range = range(6)) -> Any:
    """Parameters and state after steps in one scan, which asks that their types stay as they are."""

    def step(held: tuple[Tree, Tree], t: Any) -> tuple[tuple[Tree, Tree], None]:
        params, state = held
        updates, state = tx.update(slope(params, t), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(held: tuple[Tree, Tree], times: jax.Array) -> tuple[Tree, Tree]:
        return jax.lax.scan(step, held, times)[0]

    return run((params, begun(tx, params) if state is None else state), np.array(steps, np.float64))


@cache
def alone(make: Callable[[], optax.GradientTransformation], layered: bool = False) -> tuple[Tree, Tree]:
    """Parameters and state on one device."""
    return scanned(make(), jax.tree.map(jnp.asarray, start(LAYERED if layered else PARAMS)))


def lie_as(ours: Tree, lying: Tree) -> bool:
    """Do arrays lie as other arrays, or as shardings say?"""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(lying), strict=True)
    return all(x.sharding.is_equivalent_to(getattr(y, "sharding", y), x.ndim) for x, y in pairs)


def plain() -> optax.GradientTransformation:
    return quad(0.01)


def by_layers(**options: Any) -> Callable[[], optax.GradientTransformation]:
    return lambda: quad(0.01, scanned_layers=LAYERS, **options)


INJECTED = optax.inject_hyperparams(quad, static_args=quad.static_args)
WRAPPED: dict[str, Callable[[], optax.GradientTransformation]] = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), plain(), optax.add_decayed_weights(-1e-3)),
    "partition": lambda: optax.multi_transform(
        {"matrix": affine(0.01), "other": optax.adamw(0.01)}, {"w": "matrix", "v": "matrix", "b": "other"}
    ),
    "MultiSteps": lambda: optax.MultiSteps(affine(0.01), every_k_schedule=2).gradient_transformation(),
}
MAPPED = {
    "lax.map": by_layers(lax_map_scanned_layers=True, lax_map_batch_size=2),
    "over one axis": by_layers(spread_over="x"),
    "over none": by_layers(spread_over=()),
}


def assert_as_alone(make: Callable[[], optax.GradientTransformation], mode: str, layered: bool = False) -> None:
    tx, params = make(), on_mesh(mode, LAYERED if layered else PARAMS)
    ours = scanned(tx, params)
    assert apart(ours, alone(make, layered)) <= BOUND
    # Along Auto axes it is for the compiler to say where what goes round in a loop lies.
    assert mode == "auto" or lie_as(ours, (params, state_sharding(tx, params)))


@sharding
@state_of
@other
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_and_scanned_over_steps_it_is_as_on_one_device(make: Callable):
    assert_as_alone(make, "explicit")


@sharding
@other
def test_injected_hyperparameters_are_as_on_one_device():
    assert_as_alone(lambda: INJECTED(learning_rate=0.01), "explicit")


@sharding
@other
@pytest.mark.parametrize(("how", "mode"), [("lax.map", "auto"), ("over one axis", "explicit"), ("over none", "auto")])
def test_however_layers_are_mapped_they_are_as_on_one_device(how: str, mode: str):
    assert_as_alone(MAPPED[how], mode, layered=True)


@state_of
@other
def test_layers_lie_over_the_axes_they_are_spread_over():
    specs = {
        how: state_sharding(make(), on_mesh(shapes=LAYERED))[0].Q["s"][0].spec[:1]
        for how, make in (MAPPED | {"over all": by_layers()}).items()
    }
    assert specs.pop("over none") in ((), (None,))
    both = (("y", "x"),)
    assert specs == {"lax.map": both, "over all": both, "over one axis": ("x",)}


@sharding
@other
def test_a_mesh_in_force_changes_nothing():
    params = on_mesh()
    with jax.set_mesh(mesh_of("4x2", "explicit")):
        state = jax.jit(plain().init)(params)  # no shardings need be told here
        assert lie_as(state, state_sharding(plain(), params))
        ours = scanned(plain(), params, state)
    theirs = scanned(plain(), params)
    assert lie_as(ours, theirs) and apart(ours, theirs) == 0


@sharding
@other
@pytest.mark.parametrize("make", [lra, xmat])
def test_one_preconditioner_of_all_parameters_may_begin_with_a_mesh_in_force(make: Callable):
    params = on_mesh()
    with jax.set_mesh(mesh_of("4x2", "explicit")):
        assert lie_as(jax.jit(make().init)(params), state_sharding(make(), params))


@sharding
@other
@pytest.mark.parametrize("mode", MODES)
def test_an_update_outside_of_jit(mode: str):
    tx, params = affine(0.01), {"w": on_mesh(mode)["w"]}
    state = tx.init(params)
    assert lie_as(state, state_sharding(tx, params))
    updates, after = tx.update(slope(params, 0.0), state, params)
    assert lie_as((updates, after), (params, state))
    single = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    assert apart((updates, after), tx.update(slope(single, 0.0), tx.init(single), single)) <= BOUND


@sharding
@other
def test_each_device_may_have_its_own_batch():
    """Inside jax.shard_map: replicated parameters, a mean of gradients, and all devices step alike."""
    mesh, tx = mesh_of("8", "auto"), plain()
    params, x = {"w": np.ones((4, 3))}, np.random.default_rng(1).standard_normal((16, 4))

    def loss(params: Tree, x: jax.Array) -> jax.Array:
        return jnp.mean((x @ params["w"] - 0.5) ** 2)

    def step(params: Tree, state: Tree, x: jax.Array, mean: Callable[[Tree], Tree]) -> tuple[Tree, Tree]:
        # Of varying parameters, or JAX would add up the gradients of all devices by itself.
        own = params if mean is None else jax.lax.pcast(params, "x", to="varying")
        gradients = jax.grad(loss)(own, x)
        gradients = gradients if mean is None else mean(gradients)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    each = PartitionSpec()
    mapped = jax.shard_map(
        partial(step, mean=partial(jax.lax.pmean, axis_name="x")),
        mesh=mesh,
        in_specs=(each, each, PartitionSpec("x")),
        out_specs=each,
    )
    results = []
    for one in (jax.jit(mapped), jax.jit(partial(step, mean=None))):
        p, state = params, tx.init(params)
        for _ in range(4):
            p, state = one(p, state, x)
        results.append((p, state))
    assert apart(*results) <= BOUND and apart(results[0][0], params) > 1e-3


@sharding
@other
def test_a_learning_rate_may_be_traced():
    params = on_mesh()

    @jax.jit
    def step(rate: Any, params: Tree) -> Tree:
        tx = quad(rate)
        return tx.update(slope(params, 0.0), tx.init(params), params)[0]

    half, whole = step(0.01, params), step(0.02, params)
    assert lie_as(whole, params) and apart(jax.tree.map(lambda x: 2 * x, half), whole) <= BOUND
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole)) > 0


@sharding
@other
def test_an_ensemble_may_lie_on_a_mesh():
    tx, mesh = quad(0.01, scanned_layers={"s": True}), mesh_of("4x2", "auto")
    members = np.random.default_rng(2).standard_normal((2, 4, 8, 8))

    def stepped(w: Any) -> Any:
        params = {"s": w}
        updates, state = tx.update(slope(params, 0.0), tx.init(params), params)
        return updates["s"], state[0].Q["s"]

    there = jax.device_put(members, NamedSharding(mesh, PartitionSpec("y", None, "x")))
    together = jax.jit(jax.vmap(stepped))(there)
    one_by_one = [jax.jit(stepped)(jnp.asarray(w)) for w in members]
    assert apart(together, jax.tree.map(lambda *xs: np.stack(xs), *one_by_one)) <= BOUND


@sharding
@other
def test_a_step_with_a_nan_on_one_device_is_skipped_on_all():
    tx, params = plain(), on_mesh()
    state = begun(tx, params)
    update = jax.jit(tx.update)
    good = slope(params, 0.0)
    one = np.zeros((16, 8))
    one[3, 1] = np.nan
    bad = good | {"w": good["w"] + jax.device_put(one, good["w"].sharding)}
    _, state = update(good, state, params)
    updates, after = update(bad, state, params)
    assert lie_as((updates, after), (params, state)) and not any(x.any() for x in jax.tree.leaves(updates))
    (own,), (was,) = states(after), states(state)
    assert own.skipped.tolist() == [1, 1] and apart(own._replace(skipped=was.skipped), was) == 0
    updates, _ = update(good, after, params)
    assert all(bool(jnp.isfinite(x).all()) and x.any() for x in jax.tree.leaves(updates))


@state_of
@other
def test_arrays_of_numpy_stay_on_one_device():
    tx, params = plain(), start()
    updates, state = jax.jit(tx.update)(slope(params, 0.0), tx.init(params), params)
    assert {x.sharding.num_devices for x in jax.tree.leaves((updates, state))} == {1}


# ---- misuse -----------------------------------------------------------------------------------
@sharding
@other
def test_an_axis_that_the_mesh_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"spread_over='rows': 'rows' is no axis of the mesh, which has \('x', 'y'\)"):
        quad(spread_over="rows").init(on_mesh())


@state_of
@other
def test_parameters_without_a_mesh_or_on_two_are_refused():
    params = on_mesh()
    with pytest.raises(ValueError, match=r"state_sharding: \['w'\] has sharding Single.*; put it on a mesh"):
        state_sharding(plain(), params | {"w": jnp.ones((16, 8))})
    with pytest.raises(ValueError, match="state_sharding: the parameters lie on 2 meshes; put them on one"):
        state_sharding(plain(), params | {"w": on_mesh(mesh="8")["w"]})


# ---- checkpoints ------------------------------------------------------------------------------
@checkpoints
@state_of
@other
def test_a_run_goes_on_from_a_checkpoint_here_and_on_another_mesh(tmp_path: Path):
    import orbax.checkpoint as ocp

    make, first, second = by_layers(), range(50), range(50, 100)
    tx = make()
    halfway = scanned(tx, on_mesh(shapes=LAYERED), steps=first)
    end = scanned(tx, *halfway, steps=second)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", halfway)
        checkpointer.wait_until_finished()
        for mesh in ("4x2", "8"):
            params = on_mesh(shapes=LAYERED, mesh=mesh)
            lying = jax.tree.map(lambda x: x.sharding, params), state_sharding(tx, params)
            target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), halfway, lying)
            restored = checkpointer.restore(tmp_path / "half", target)
            assert lie_as(restored, lying)
            assert apart(scanned(tx, *restored, steps=second), end) <= (0 if mesh == "4x2" else BOUND)


# ---- processes --------------------------------------------------------------------------------
STEPS = 8


def worker(rank: int, processes: int, port: int, devices: int, file: str) -> None:
    """One of several processes; the first writes what all of them have in the end."""
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, rank)
    assert jax.process_count() == processes and len(jax.devices()) == devices
    mesh, whole = jax.make_mesh((devices,), ("x",), axis_types=(MODES["auto"],)), start(LAYERED)

    def there(x: np.ndarray) -> jax.Array:
        lying = NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "x") if devices > 1 else PartitionSpec())
        return jax.make_array_from_callback(x.shape, lying, lambda index: x[index])

    params = jax.tree.map(there, whole)
    tx = by_layers()()
    state, update = begun(tx, params), jax.jit(tx.update)
    for t in range(STEPS):
        updates, state = update(jax.jit(slope)(params, float(t)), state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    replicated = NamedSharding(mesh, PartitionSpec())
    held = jax.jit(lambda x: x, out_shardings=replicated)((params, state))
    leaves = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(held)]
    if rank == 0:
        np.savez(file, *leaves)


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile: it stays taken here, and who listens on it shares it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("localhost", 0))
        yield held.getsockname()[1]


def ran(processes: int, devices: int, folder: Path) -> list[np.ndarray]:
    """What so many processes with so many devices in all come to."""
    with free_port() as port:
        return ran_at(port, processes, devices, folder)


def ran_at(port: int, processes: int, devices: int, folder: Path) -> list[np.ndarray]:
    """The same, where they meet at this port."""
    file = folder / f"{processes}-{devices}.npz"
    environment = os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices // processes)}
    command = [
        sys.executable,
        "-m",
        "conformance.internal.mesh_test",
        str(processes),
        str(port),
        str(devices),
        str(file),
    ]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(processes)
    ]
    try:
        told = [child.communicate(timeout=SECONDS)[0] for child in children]
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end of {processes} processes after {SECONDS} s", pytrace=False)
    finally:
        for child in children:
            child.kill()
    for rank, (child, text) in enumerate(zip(children, told, strict=True)):
        assert child.returncode == 0, f"process {rank} ended with {child.returncode}:\n{text}"
    with np.load(file) as found:
        return list(found.values())


@processes
def test_two_processes_run_as_one(tmp_path: Path):
    two, one, single = (ran(*how, tmp_path) for how in ((2, 4), (1, 4), (1, 1)))
    assert all(np.array_equal(x, y) for x, y in zip(two, one, strict=True))
    assert apart(two, single) <= BOUND and len(two) > 8


# ---- the command ------------------------------------------------------------------------------
def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in (os.environ | ENVIRONMENT).items() if k not in ("NPROC", "JAX_NUM_CPU_DEVICES")}
    line = [sys.executable, "-m", "conformance.internal.mesh", "--method=xmat", *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)


def test_the_command_runs_and_weighs_by_itself(tmp_path: Path):
    """And eight devices are there without being asked for."""
    file = tmp_path / "mesh.json"
    flags = "--only=runs", "--only=bytes", "--mesh=8", "--mode=auto", "--layout=rows", "--steps=3"
    done = command(*flags, "--markdown", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    (row,) = found["runs"]
    assert (row["method"], row["mesh"], row["mode"], row["layout"], row["steps"]) == ("xmat", "8", "auto", "rows", 3)
    assert not row["complaints"] and row["params"] <= BOUND
    assert [r["form"] for r in found["bytes"]] == list(measures.FORMS)
    assert all(6 * r["spread"] <= r["alone"] for r in found["bytes"])
    assert "| xmat |" in done.stdout and "all-gather" in done.stdout


def result_with(**seen: Any) -> measures.RunResult:
    fine = dict(mesh="8", mode="auto", layout="rows", steps=9, params=1e-16, state=2e-16, exchanges={"all-gather": 3})
    return measures.RunResult("xmat", 1.0, **{"complaints": []} | fine | seen)


@pytest.mark.parametrize("flags", [[], ["--markdown"]])
def test_failure_is_told(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(mesh_command, "devices", lambda: None)
    rows = [result_with(), result_with(mesh="4x2", complaints=["traced 2 times"])]
    part = mesh_command.PARTS["runs"]
    monkeypatch.setitem(mesh_command.PARTS, "runs", part._replace(rows=lambda given, names: iter(rows[:1])))
    mesh_command.main(["--only=runs", *flags])
    assert "pass" in capsys.readouterr().out
    monkeypatch.setitem(mesh_command.PARTS, "runs", part._replace(rows=lambda given, names: iter(rows)))
    with pytest.raises(SystemExit) as exit:
        mesh_command.main(["--only=runs", *flags])
    told = capsys.readouterr()
    assert exit.value.code == 1 and "FAIL" in told.out and "traced 2 times" in told.err


def test_a_run_is_judged(monkeypatch: pytest.MonkeyPatch):
    """What is planted in one is told."""
    who = runs.runner("quad")
    gather = "%g = f64[80,80]{1,0} all-gather(%x), dimensions={0}\n"
    both = gather + "%h = (f64[1,64,64]{2,1,0}, /*index=1*/f64[8]{0}) all-gather-start(%y)\n%i = f64[] all-reduce(%z)\n"
    assert measures.exchanges(both) == [
        ("all-gather", [(80, 80)]),
        ("all-gather", [(1, 64, 64), (8,)]),
        ("all-reduce", [()]),
    ]
    assert measures.gathered(who, both) == {"lone 80x80": 1, "bucket2 64x64": 1}

    def judged(program: str = gather, moved: tuple[str, ...] = (), traces: int = 1, scale: float = 1.0) -> list[str]:
        params = {"w": np.ones(3)}
        done = runs.Outcome(params, {"w": scale * np.ones(3)}, params, list(moved), traces, 1, program)
        monkeypatch.setattr(measures, "reference", lambda *_: (params, params))
        for name in ("mesh_of", "put", "begun"):
            monkeypatch.setattr(measures, name, lambda *_: None)
        monkeypatch.setattr(measures, "run", lambda *_: done)
        return measures.run_result("quad", "8", "auto", "rows", 3).complaints

    assert judged() == []
    assert judged(both) == ["gathered: bucket2 64x64 1 times"]
    assert judged(gather + gather) == ["gathered: lone 80x80 2 times"]
    assert judged(moved=("[0]['w']",)) == ["moved: [0]['w']"]
    assert judged(traces=2) == ["2 times traced"]
    assert judged(scale=1 + 1e-11) == ["parameters 1.0e-11 apart"] and judged(scale=np.nan) == ["parameters nan apart"]


if __name__ == "__main__":
    count, port, devices, file, rank = sys.argv[1:]
    worker(int(rank), int(count), int(port), int(devices), file)
