"""What a comparison must see: every method in every driver walks the same way, and a run that differs is told apart."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from functools import partial

import jax
import numpy as np
import pytest

from conformance import compare as comparing
from conformance.compare import KINDS, Pair, compare, envelope, furthest, method_for, nudged, rounded, work
from conformance.drivers import DRIVERS, Snapshot, TorchEager, TorchLoop
from conformance.frameworks import double_precision
from conformance.internal.contracts import COMPILING
from conformance.problems import PROBLEMS
from conformance.tolerances import LOCKED
from psgd.kron import Kronecker
from psgd.methods import METHODS


def of_method(name, *others, **options):
    """Arguments of a test. Those of a method run in one worker: what JAX has compiled for one serves the next."""
    return pytest.param(name, *others, marks=pytest.mark.xdist_group(f"compare {name}"), **options)


ALL_METHODS = pytest.mark.parametrize("method", [of_method(name) for name in METHODS])
# Compiling takes many seconds and stepping JAX operation by operation is slow: they have tests of their own.
COMPILED, EAGER = "torch-compiled", "jax-eager"
WITHOUT_JAX = ["torch", "torch-loop", "numpy", "strict"]
EVERYWHERE = [name for name in DRIVERS if name not in (COMPILED, EAGER)]
SMALL = ("rosenbrock", "least-squares")
# A matrix of all parameters, squared and cubed, is for few of them.
DENSE = [
    name for name, made in METHODS.items() if (r := made().recipe()).joint and isinstance(r.preconditioner, Kronecker)
]
CONTRACTIVE = [name for name, problem in PROBLEMS.items() if not problem.chaotic]
FIRST = next(iter(METHODS))


USERS_JIT = partial(jax.jit, compiler_options={name: own for name, (_, own) in COMPILING.items()})


@pytest.fixture
def as_users_compile(monkeypatch):
    """`jax.jit` optimizes as XLA does when told nothing, which tests elsewhere do without."""
    monkeypatch.setattr(jax, "jit", USERS_JIT)


def assert_equal(result, bound=None):
    assert result.passed, [(p.a, p.b, p.max_rel_diff(), p.worst, p.first_step_over) for p in result.pairs]
    if bound is not None:
        assert all(pair.max_rel_diff()[kind] <= bound for pair in result.pairs for kind in pair.judged)


# ---- the same steps everywhere ---------------------------------------------------------------
@pytest.mark.parametrize("problem", PROBLEMS)
@ALL_METHODS
def test_each_step_is_the_same(request, method, problem):
    if problem == "least-squares":
        request.getfixturevalue("as_users_compile")
    if method in DENSE and problem not in SMALL:
        pytest.skip("too many parameters for a matrix of them all")
    # JAX takes its time to compile a step: every method on the small problems and the stacked one, the rest by turns.
    order = (list(METHODS).index(method) + list(PROBLEMS).index(problem)) % 3 == 0
    drivers = EVERYWHERE if problem in SMALL or problem == "stacked-digits" or order else WITHOUT_JAX
    drivers = [*drivers, EAGER] if problem == "rosenbrock" else drivers
    result = compare(method, problem, steps=6, locked=True, drivers=drivers)
    assert len(result.pairs) == len(drivers) * (len(drivers) - 1) // 2
    assert_equal(result, 1e-12)


@ALL_METHODS
def test_each_compiled_step_is_the_same(method):
    result = compare(method, "rosenbrock", steps=6, locked=True, drivers=["torch", COMPILED])
    assert_equal(result, 1e-12)


@pytest.mark.parametrize("dtype", [name for name in LOCKED if name != "float64"])
@ALL_METHODS
@pytest.mark.usefixtures("as_users_compile")
def test_each_step_is_the_same_in_fewer_bits(method, dtype):
    result = compare(method, "least-squares", steps=6, dtype=dtype, locked=True, drivers=["torch", "torch-loop", "jax"])
    assert_equal(result)


def variants():
    """Settings of methods that change which operations a step takes, by the names of their hyperparameters."""
    wanted = (
        {"momentum": 0.0},
        {"momentum": 0.9, "whiten_grad": False},
        {"update_preconditioner_first": False, "preconditioner_update_probability": 0.5},
        {"preconditioner_init_scale": 0.5, "seed": 7},
        {"weight_decay": 0.2, "lr_style": None},
    )
    for name, method in METHODS.items():
        known = {f.name for f in fields(method)}
        for settings in wanted:
            if settings == {"momentum": 0.0} and not getattr(method, "whiten_grad", True):
                settings = settings | {"whiten_grad": True}  # there is no momentum to whiten
            if settings.keys() <= known:
                yield of_method(name, settings, id=f"{name}-{'-'.join(settings)}")


@pytest.mark.parametrize(("method", "settings"), list(variants()))
def test_each_step_is_the_same_with_other_settings(method, settings):
    result = compare(method, "least-squares", steps=6, locked=True, drivers=["torch", "jax", "numpy"], **settings)
    assert_equal(result, 1e-12)


def geometries():
    """Methods in each of the values that their hyperparameters by name allow."""
    for name, method in METHODS.items():
        for f in fields(method):
            if f.metadata["kind"] == "name":
                for value in f.metadata["names"]():
                    yield of_method(name, {f.name: value}, id=f"{name}-{value}")


@pytest.mark.parametrize(("method", "settings"), list(geometries()))
def test_each_step_is_the_same_in_every_named_choice(method, settings):
    problem = "least-squares" if METHODS[method](**settings).recipe().joint else "mlp-digits"
    assert_equal(compare(method, problem, steps=3, locked=True, drivers=WITHOUT_JAX, **settings), 1e-11)


def test_as_users_compile_is_not_as_tests_elsewhere_do(request):
    def program():
        traced = jax.jit(lambda x: jax.numpy.tanh(x) @ jax.numpy.exp(x.T) / (1 + x)).lower(np.ones((8, 8)))
        return traced.compile().as_text()

    if any(f"--{name}={value}" not in os.environ["XLA_FLAGS"] for name, (value, _) in COMPILING.items()):
        pytest.skip("XLA_FLAGS are the user's own")
    quick = program()
    request.getfixturevalue("as_users_compile")
    assert program() != quick


# ---- whole runs ------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-11), ("float32", 1e-5)])
@pytest.mark.parametrize("problem", CONTRACTIVE)
@ALL_METHODS
def test_whole_runs_stay_together(request, method, problem, dtype, bound):
    if problem == "least-squares":
        request.getfixturevalue("as_users_compile")  # as is compiled for single steps
    if problem != "least-squares" and (method in DENSE or dtype == "float32"):
        pytest.skip("least-squares shows it")
    double = dtype == "float64"
    steps = 400 if problem == "least-squares" and double else 120  # factors are balanced at every hundredth
    drivers = ["torch", "jax", *(["numpy"] if double else [])]
    assert_equal(compare(method, problem, steps=steps, dtype=dtype, drivers=drivers), bound)


@ALL_METHODS
def test_chaotic_runs_stay_in_their_envelope(method):
    result = compare(method, "rosenbrock", steps=120, drivers=["torch", "jax", "numpy"])
    assert_equal(result)
    assert result.bound.value is None
    assert all(np.array_equal(pair.bound, result.bound.factor * result.envelope) for pair in result.pairs)


def test_losses_and_accuracies_are_kept():
    result = compare(FIRST, "softmax-digits", steps=20, drivers=["torch", "numpy"])
    assert {name: len(losses) for name, losses in result.losses.items()} == {"torch": 20, "numpy": 20}
    assert result.losses["torch"][-1] < result.losses["torch"][0]
    accuracy = result.accuracy()
    assert accuracy["torch"] == accuracy["numpy"] > 0.5
    assert compare(FIRST, "rosenbrock", steps=1, drivers=["torch"]).accuracy() == {}


def test_each_step_ticks():
    ticks = []
    compare(FIRST, "rosenbrock", steps=3, locked=True, drivers=["torch"], tick=ticks.append)
    assert ticks == [1, 1, 1] and sum(ticks) == work("rosenbrock", "float64", steps=3, locked=True, drivers=1)


@pytest.mark.parametrize("problem", ["rosenbrock", "least-squares"])
def test_work_is_what_ticks(problem):
    ticks = []
    compare(FIRST, problem, steps=2, drivers=["torch", "numpy"], tick=ticks.append)
    assert sum(ticks) == work(problem, "float64", steps=2, locked=False, drivers=2)


# ---- runs that differ ------------------------------------------------------------------------
def other(base, **changed):
    """A driver whose method has other hyperparameters."""

    class Other(base):
        name = "other"

        def __init__(self, method, problem, start, dtype):
            made = {f.name: getattr(method, f.name) for f in fields(method)}
            super().__init__(type(method)(**made | changed), problem, start, dtype)

    return Other


def late(base, step):
    """A driver that makes a slip at one step: a parameter moves by a billionth more."""

    class Late(base):
        name = "other"
        steps = 0

        def advance(self, gradients, pairs):
            super().advance(gradients, pairs)
            self.steps += 1
            if self.steps == step:
                with self.torch.no_grad():
                    next(iter(self.tensors.values())).mul_(1 + 1e-9)

    return Late


@pytest.fixture
def with_other(monkeypatch):
    """Compare torch with another driver of our making."""

    def run(driver, method=FIRST, problem="least-squares", **options):
        monkeypatch.setitem(DRIVERS, "other", driver)
        return compare(method, problem, drivers=["torch", "other"], **options)

    return run


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("changed", [{"seed": 1}, {"lr": 0.011}, {"weight_decay": 0.5}], ids=lambda c: next(iter(c)))
@ALL_METHODS
def test_other_hyperparameters_fail(with_other, method, changed, locked):
    base = {name: value + 1e-3 if name == "lr" else value for name, value in changed.items()}
    (pair,) = with_other(other(TorchEager, **base), method, "softmax-digits", steps=4, locked=locked).pairs
    assert not pair.passed
    assert pair.first_step_over == 1


@pytest.mark.parametrize("base", [TorchEager, TorchLoop])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_the_step_of_a_slip_is_found(with_other, base, step):
    (pair,) = with_other(late(base, step), steps=5, locked=True).pairs
    assert pair.first_step_over == step
    assert pair.max_rel_diff()["params"] == pytest.approx(1e-9, rel=0.01)
    assert pair.worst["params"] == (step, "W")
    free = with_other(late(base, step), steps=5).pairs[0]
    assert free.first_step_over == step


def test_a_locked_comparison_forgets_a_slip(with_other):
    (pair,) = with_other(late(TorchEager, 2), steps=4, locked=True).pairs
    over = np.array(pair.curves["params"]) > pair.bound
    assert over.tolist() == [False, True, False, False]


def test_another_start_is_seen(monkeypatch):
    """The twin whose start is one ulp off is not the run itself."""
    start = rounded(PROBLEMS["least-squares"].init(0), "float64")
    moved = nudged(start, "float64", 0)
    assert 0 < furthest(start, moved, {})[0] <= 2.0**-52


# ---- as data ---------------------------------------------------------------------------------
def test_json_follows_its_schema():
    data = compare(FIRST, "rosenbrock", steps=3, seed=5, drivers=["torch", "torch-loop", "numpy"]).json()
    assert json.loads(json.dumps(data)) == data
    assert {k: v for k, v in data.items() if k != "pairs"} == {
        "method": FIRST,
        "problem": "rosenbrock",
        "steps": 3,
        "dtype": "float64",
        "seed": 5,
        "mode": "free",
    }
    assert [(pair["a"], pair["b"]) for pair in data["pairs"]] == [
        ("torch", "torch-loop"),
        ("torch", "numpy"),
        ("torch-loop", "numpy"),
    ]
    for pair in data["pairs"]:
        assert list(pair) == ["a", "b", "max_rel_diff", "bound", "first_step_over", "verdict"]
        assert list(pair["max_rel_diff"]) == ["params", "updates", "state"]
        assert all(isinstance(x, float) for x in (*pair["max_rel_diff"].values(), pair["bound"]))
        assert (pair["first_step_over"], pair["verdict"]) == (None, "pass")


def test_json_of_a_failure(with_other):
    result = with_other(late(TorchEager, 2), steps=3, locked=True)
    data = json.loads(json.dumps(result.json()))
    assert not result.passed
    assert data["mode"] == "locked"
    assert (data["pairs"][0]["first_step_over"], data["pairs"][0]["verdict"]) == (2, "fail")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-method", "rosenbrock", ["torch"]), "no-method"),
        ((FIRST, "no-problem", ["torch"]), "no-problem"),
        ((FIRST, "rosenbrock", ["torch", "no-driver"]), "no-driver"),
        ((FIRST, "rosenbrock", ["numpy", "strict"]), "differentiates"),
        ((FIRST, "rosenbrock", []), "differentiates"),
    ],
)
def test_wrong_names_are_refused(arguments, message):
    method, problem, drivers = arguments
    with pytest.raises(ValueError, match=message):
        compare(method, problem, steps=1, drivers=drivers)


def test_unknown_hyperparameters_are_refused():
    with pytest.raises(ValueError, match="no_such"):
        compare(FIRST, "rosenbrock", steps=1, drivers=["torch"], no_such=1)


# ---- how far two sets of leaves are apart ----------------------------------------------------
def leaves(**arrays):
    return {name: np.asarray(x, dtype=float) for name, x in arrays.items()}


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (leaves(a=[1, 2]), leaves(a=[1, 2]), (0.0, "")),
        (leaves(a=[1, 2]), leaves(a=[1, 4]), (0.5, "a")),
        (leaves(a=[1, 2], b=1), leaves(a=[1, 4], b=9), (8 / 9, "b")),
        (leaves(a=1), leaves(a=1, b=1), (np.inf, "b (in one only)")),
        (leaves(a=1), {}, (np.inf, "a (in one only)")),
        (leaves(a=[1, 2]), leaves(a=[[1, 2]]), (np.inf, "a ((2,) and (1, 2))")),
        (leaves(a=[]), leaves(a=[]), (0.0, "")),
        (leaves(a=[0, 0]), leaves(a=[0, 0]), (0.0, "")),
        ({}, {}, (0.0, "")),
    ],
)
def test_furthest(x, y, expected):
    assert furthest(x, y, {}) == expected
    distance, leaf = furthest(y, x, {})
    assert (distance, leaf.split(" ")[0]) == (expected[0], expected[1].split(" ")[0])


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (leaves(a=[1, np.nan]), leaves(a=[1, 2])),
        (leaves(a=[1, 2]), leaves(a=[np.nan, 2])),
        (leaves(a=np.nan, b=1), leaves(a=1, b=5)),
        (leaves(a=np.nan), leaves(a=np.nan)),
        (leaves(a=np.inf), leaves(a=np.inf)),
        (leaves(a=np.inf), leaves(a=1)),
        (leaves(b=[0, 0], a=[np.nan, 0]), leaves(b=[0, 0], a=[0, 0])),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_is_far_from_all(x, y):
    distance, leaf = furthest(x, y, {})
    assert not distance <= 1e300
    assert leaf == "a"


def test_a_nan_is_found_at_its_step():
    pair = Pair("a", "b", np.full(3, 1e-3), KINDS)
    for value in (1.0, np.nan, 1.0):
        pair.add(Snapshot(leaves(x=1), leaves(x=value), {}), Snapshot(leaves(x=1), leaves(x=1), {}))
    assert pair.first_step_over == 2
    assert not pair.passed


def test_a_leaf_that_crosses_zero_keeps_its_scale():
    scales = {}
    assert furthest(leaves(a=100), leaves(a=101), scales)[0] == pytest.approx(1 / 101)
    assert furthest(leaves(a=0), leaves(a=1), scales)[0] == pytest.approx(1 / 101)


def test_only_judged_kinds_decide():
    x, y = leaves(a=1), leaves(a=2)
    free = Pair("a", "b", np.full(1, 1e-3), ("params",))
    locked = Pair("a", "b", np.full(1, 1e-3), KINDS)
    for pair in (free, locked):
        pair.add(Snapshot(x, x, x), Snapshot(x, x, y))
    assert (free.first_step_over, locked.first_step_over) == (None, 1)


# ---- rounding and the envelope ---------------------------------------------------------------
@pytest.mark.parametrize("dtype", LOCKED)
def test_rounding_is_to_nearest_even_and_keeps_what_it_gave(dtype):
    x = np.random.default_rng(0).standard_normal(1000)
    ulp = comparing.ULP[dtype]
    once = rounded({"x": x}, dtype)["x"]
    assert np.all(np.abs(once - x) <= ulp / 2 * 2.0 ** np.floor(np.log2(np.abs(x))))
    assert np.array_equal(rounded({"x": once}, dtype)["x"], once)
    ties = 1 + ulp * np.array([0.5, 1.5, 2.5])
    assert np.array_equal(rounded({"x": ties}, dtype)["x"], 1 + ulp * np.array([0, 2, 2])) or dtype == "float64"


@pytest.mark.parametrize("dtype", LOCKED)
def test_nudging_moves_every_entry_by_one_ulp(dtype):
    start = rounded({"x": np.random.default_rng(0).uniform(1.1, 1.9, 100)}, dtype)
    moved = nudged(start, dtype, 1)
    steps = (moved["x"] - start["x"]) / comparing.ULP[dtype]
    assert set(steps) == {-1.0, 1.0}
    assert not np.array_equal(moved["x"], nudged(start, dtype, 2)["x"])


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method().recipe().newton])
def test_the_envelope_grows(method):
    problem = PROBLEMS["rosenbrock"]
    start = rounded(problem.init(0), "float64")
    with double_precision("torch"):
        grown = envelope(method_for(method, problem), problem, start, 200, "float64", 0, TorchEager, lambda n: None)
    assert grown.shape == (200,)
    assert np.all(np.diff(grown) >= 0)
    assert 0 < grown[0] < 1e-14
    assert grown[-1] > 10 * grown[0]


@ALL_METHODS
@pytest.mark.parametrize("problem", PROBLEMS)
def test_directions_are_as_long_as_the_problem_says(method, problem):
    made = method_for(method, PROBLEMS[problem])
    assert made.lr * made.recipe().gain == pytest.approx(PROBLEMS[problem].lr)
    assert method_for(method, PROBLEMS[problem], lr=0.5).lr == 0.5
