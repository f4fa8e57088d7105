"""Each driver tells all that it holds, and goes on from what another held."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from conformance import reference
from conformance.compare import method_for, rounded
from conformance.drivers import DRIVERS
from conformance.frameworks import double_precision
from conformance.problems import PROBLEMS
from conformance.reference import Reference
from psgd.methods import METHODS
from psgd.noise import Counter, key

# Compiling takes seconds, and adds nothing to what a driver shows.
# JAX compiles each step, and each operation by itself, once in a process: its drivers are all tried in one.
ALL_DRIVERS = pytest.mark.parametrize(
    "driver",
    [
        pytest.param(name, marks=pytest.mark.xdist_group("drivers in jax") if name.startswith("jax") else ())
        for name in DRIVERS
        if name != "torch-compiled"
    ],
)
ALL_METHODS = pytest.mark.parametrize("method", METHODS)
PROBLEM = PROBLEMS["least-squares"]
SHAPES = {name: x.shape for name, x in PROBLEM.init(0).items()}


@pytest.fixture(autouse=True)
def precise():
    with double_precision("jax"):
        yield


def made(driver, method, dtype="float64", start=None, problem=PROBLEM, **hyperparameters):
    start = rounded(problem.init(0), dtype) if start is None else start
    return DRIVERS[driver](method_for(method, problem, **hyperparameters), problem, start, dtype)


def gradients(step):
    random = np.random.default_rng(step)
    return {name: np.asarray(random.standard_normal(shape)) for name, shape in SHAPES.items()}


def assert_same(a, b, rtol=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=rtol, err_msg=name)


@ALL_DRIVERS
def test_a_driver_is_registered_by_its_name(driver):
    assert DRIVERS[driver].name == driver


@ALL_METHODS
@ALL_DRIVERS
def test_snapshots_hold_everything(driver, method):
    run = made(driver, method)
    before = run.snapshot()
    assert_same(before.params, PROBLEM.init(0))
    assert before.state == before.updates == {}
    after = run.step(gradients(1))
    assert_same(after.params, {name: before.params[name] + after.updates[name] for name in SHAPES})
    assert any(np.any(u) for u in after.updates.values())
    recipe = run.method.recipe()
    kept = {"step"} | ({"momentum"} if recipe.momentum else set())
    kept |= {"since"} if run.method.schedule().counts else set()
    for name, shape in SHAPES.items():
        own = {leaf.split("/", 1)[1]: x for leaf, x in after.state.items() if leaf.split("/")[0] == name}
        size = sum(int(np.prod(other)) for other in SHAPES.values())
        vector = np.zeros(size if recipe.joint else recipe.layout(shape))
        factors = recipe.preconditioner.init(vector, Counter(key(np, 0, 0)))
        assert own.keys() == kept | {f"{kind}/{i}" for kind in "QL" for i in range(len(getattr(factors, kind)))}
        assert own["step"] == 1
        assert own.get("momentum", np.empty(shape)).shape == shape
        assert all(x.dtype == np.float64 for x in own.values())


@ALL_METHODS
@ALL_DRIVERS
def test_snapshots_are_copies(driver, method):
    run = made(driver, method)
    first = run.step(gradients(1))
    kept = {kind: {k: x.copy() for k, x in getattr(first, kind).items()} for kind in first._fields}
    run.step(gradients(2))
    for kind, leaves in kept.items():
        for name, x in leaves.items():
            assert np.array_equal(getattr(first, kind)[name], x), f"{kind}: {name} was overwritten"


@ALL_METHODS
@ALL_DRIVERS
def test_a_run_goes_on_from_the_snapshot_of_another(driver, method):
    """Two steps, loaded into a run that has gone elsewhere, and a third: as three steps."""
    source = made("numpy", method)
    source.step(gradients(1))
    middle = source.step(gradients(2))
    run = made(driver, method)
    run.step(gradients(11))
    run.load(middle)
    assert_same(run.params(), middle.params)
    assert_same(run.state(), middle.state)
    there, here = source.step(gradients(3)), run.step(gradients(3))
    for kind in there._fields:
        assert_same(getattr(there, kind), getattr(here, kind))


@ALL_DRIVERS
def test_given_arrays_are_not_written_to(driver):
    start, given = rounded(PROBLEM.init(0), "float64"), gradients(1)
    kept = [{name: x.copy() for name, x in arrays.items()} for arrays in (start, given)]
    run = made(driver, next(iter(METHODS)), start=start)
    run.step(given)
    run.step(given)
    for arrays, before in zip((start, given), kept, strict=True):
        assert all(np.array_equal(arrays[name], before[name]) for name in before)


@ALL_DRIVERS
def test_gradients_agree_with_differences(driver):
    run = made(driver, next(iter(METHODS)))
    if not run.differentiates:
        with pytest.raises(NotImplementedError, match=driver):
            run.gradient(PROBLEM.batch(0, 1))
        return
    loss, g = run.gradient(PROBLEM.batch(0, 1))
    for name, shape in SHAPES.items():
        where, h = (0,) * len(shape), 1e-6
        start = {leaf: np.array(x) for leaf, x in PROBLEM.init(0).items()}
        start[name][where] += h
        moved = made(driver, next(iter(METHODS)), start=start).gradient(PROBLEM.batch(0, 1))[0]
        assert (moved - loss) / h == pytest.approx(g[name][where], rel=1e-3)


@ALL_DRIVERS
def test_the_dtype_that_was_asked_for(driver):
    """Single precision shows in the parameters, except in the oracle, which is always double."""
    run = made(driver, next(iter(METHODS)), "float32")
    exact = run.step(gradients(1)).params["W"]
    single = np.array_equal(exact, exact.astype(np.float32))
    assert single == (run.dtype == "float32")
    assert (run.dtype == "float64") == (driver == "numpy")


@ALL_METHODS
@ALL_DRIVERS
def test_hyperparameters_reach_the_optimizer(driver, method):
    """Another seed shows in the state, another scale or decay in the update."""
    known = {f.name for f in fields(METHODS[method])}
    wanted = {"lr": 0.5, "weight_decay": 0.5, "seed": 3, "preconditioner_init_scale": 0.1}
    changed = {name: value for name, value in wanted.items() if name in known}
    pairs = {name: (v, g) for (name, v), g in zip(gradients(2).items(), gradients(1).values(), strict=True)}
    seen = gradients(1), pairs if METHODS[method]().recipe().newton else None
    run, oracle = (made(name, method, **changed) for name in (driver, "numpy"))
    after, expected = run.step(*seen), oracle.step(*seen)
    for kind in after._fields:
        assert_same(getattr(after, kind), getattr(expected, kind))
    for name in changed:
        same = made("numpy", method, **{k: v for k, v in changed.items() if k != name}).step(*seen)
        leaves = zip(same.state.values(), expected.state.values(), strict=True)
        moved = any(not np.array_equal(x, y) for x, y in leaves)
        assert moved or any(not np.array_equal(same.updates[leaf], expected.updates[leaf]) for leaf in SHAPES), name


# ---- stacked layers -------------------------------------------------------------------------
STACKED = replace(PROBLEM, scanned=frozenset(["W", "b"]))  # six vectors of nine, and six scalars


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method().recipe().joint])
def test_a_layer_goes_as_a_parameter_alone(method):
    """The oracle with six layers in a stack, and with each of them as a parameter of its own."""

    def parted(arrays):
        rest = {name: x for name, x in arrays.items() if name not in STACKED.scanned}
        return rest | {f"{name}{k}": arrays[name][k, ...] for name in STACKED.scanned for k in range(6)}

    whole = made("numpy", method, problem=STACKED).run
    parts = Reference(whole.method, parted(whole.params))
    for step in (1, 2, 3):
        whole.step(gradients(step))
        parts.step(parted(gradients(step)))
    assert_same(parted(whole.params), parts.params)
    for name in STACKED.scanned:
        for k in range(6):
            states = (reference.layer(whole.states[name], k), parts.states[f"{name}{k}"])
            for mine, alone in zip(*map(reference.leaves, states), strict=True):
                np.testing.assert_allclose(mine, alone, rtol=1e-12)
    alike = Reference(whole.method, PROBLEM.init(0))
    for step in (1, 2, 3):
        alike.step(gradients(step))
    assert not np.allclose(alike.params["W"], whole.params["W"], rtol=1e-6)


@pytest.mark.parametrize("method", ["quad", "kron"])
@pytest.mark.parametrize("driver", ["torch", "torch-loop", "jax", "strict"])
def test_drivers_agree_on_stacked_layers(driver, method):
    """Step by step, and in what they tell of every layer; then from the snapshot of another."""
    run, oracle = (made(name, method, problem=STACKED) for name in (driver, "numpy"))
    for step in (1, 2):
        after, expected = run.step(gradients(step)), oracle.step(gradients(step))
        for kind in after._fields:
            assert_same(getattr(after, kind), getattr(expected, kind))
    assert after.state["W/Q/0"].shape[0] == after.state["b/L/0"].shape[0] == 6
    other = made(driver, method, problem=STACKED)
    other.step(gradients(11))
    other.load(expected)
    after, expected = other.step(gradients(3)), oracle.step(gradients(3))
    for kind in after._fields:
        assert_same(getattr(after, kind), getattr(expected, kind))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_products_with_the_hessian_agree(problem):
    """The vector of a parameter is the same number for number, and so, to rounding, is the product with it."""
    newton = next(name for name, made in METHODS.items() if made().recipe().newton)
    chosen, start = PROBLEMS[problem], rounded(PROBLEMS[problem].init(0), "float64")
    runs = [DRIVERS[name](method_for(newton, chosen), chosen, start, "float64") for name in ("torch", "jax")]
    theirs, ours = (run.products(chosen.batch(0, 1), 1) for run in runs)
    assert theirs.keys() == ours.keys() == start.keys()
    largest = max(np.max(np.abs(h)) for _, h in theirs.values())
    for name, (v, h) in theirs.items():
        assert np.array_equal(v, ours[name][0])
        assert np.max(np.abs(h - ours[name][1])) <= 1e-12 * largest, name
        assert all(not np.array_equal(v, w) for other, (w, _) in theirs.items() if other != name and w.shape == v.shape)


# ---- gradients that are not finite ----------------------------------------------------------
@ALL_METHODS
def test_all_skip_the_same_steps(method):
    """NaN and infinities, in a gradient or in a pair, at the first step and later: nothing moves, all count alike."""
    newton = METHODS[method]().recipe().newton
    runs = {name: made(name, method) for name in ("torch", "jax", "numpy")}
    counts = [(1, 1), (1, 0), (2, 1), (3, 2), (3, 0), (4, 1) if newton else (3, 0), (4 if newton else 3, 0)]
    for step, expected in enumerate(counts):
        seen = gradients(step)
        v = gradients(step + 100)
        pairs = {name: (v[name], seen[name].copy()) for name in seen} if newton else None
        spoilt = seen if step in (0, 2, 3) else {k: h for k, (_, h) in pairs.items()} if newton and step == 5 else None
        if spoilt is not None:
            spoilt["W"].reshape(-1)[step] = np.nan if step % 2 else -np.inf
        before = {name: run.snapshot() for name, run in runs.items()}
        after = {name: run.step(seen, pairs) for name, run in runs.items()}
        for name, run in runs.items():
            assert run.skipped() == expected, (name, step)
            if spoilt is not None:
                assert all(np.array_equal(x, before[name].params[k]) for k, x in after[name].params.items())
                assert all(np.array_equal(x, after[name].state.get(k, x)) for k, x in before[name].state.items())
            assert_same(after[name].params, after["numpy"].params)
            assert_same(after[name].state, after["numpy"].state, 1e-11)
