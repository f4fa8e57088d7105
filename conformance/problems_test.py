"""Each problem is one function in every framework: same values, same gradients, same data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from conformance.problems import PROBLEMS, Data, Problem

ROOT = Path(__file__).resolve().parent.parent

# Rosenbrock's valley walls curve too sharply for the step that suits the others.
GRADIENT_STEP = {"rosenbrock": 1e-3}
REMAINS = {"least-squares": 0.9}  # the noise in its targets, of variance 64, is no parameter's fault


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS.keys())
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.param


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def convert(make: Callable[[np.ndarray], Any], arrays: Data) -> dict[str, Any]:
    return {name: make(array) for name, array in arrays.items()}


def flatten(arrays: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(array) for array in arrays.values()])


def probe(problem: Problem, seed: int = 3, step: int = 2) -> tuple[Data, Data]:
    """Parameters off the start, where biases are no longer zero, and a batch."""
    random = np.random.default_rng(seed)
    params = {name: p + 0.1 * random.standard_normal(p.shape) for name, p in problem.init(seed).items()}
    return params, problem.batch(seed, step)


def in_jax(problem: Problem) -> tuple[Callable[[np.ndarray], Any], Callable[..., Any]]:
    return jnp.asarray, jax.jit(problem.loss)


def torch_gradient(problem: Problem, params: Data, batch: Data) -> Data:
    leaves = convert(lambda p: torch.tensor(p, requires_grad=True), params)
    grads = torch.autograd.grad(problem.loss(leaves, convert(torch.tensor, batch)), list(leaves.values()))
    return {name: grad.numpy() for name, grad in zip(leaves, grads, strict=True)}


def jax_gradient(problem: Problem, params: Data, batch: Data) -> Data:
    grads = jax.jit(jax.grad(problem.loss))(convert(jnp.asarray, params), convert(jnp.asarray, batch))
    return {name: np.asarray(grads[name]) for name in params}  # jax sorts the keys of a dict


def test_names_and_fields(problem: Problem):
    assert PROBLEMS[problem.name] is problem
    assert problem.summary.endswith(".") and problem.lr > 0


def test_what_stacks_layers_is_there_with_as_many_layers_each(problem: Problem):
    start = problem.init(0)
    assert problem.scanned <= start.keys()
    assert all(start[name].ndim for name in problem.scanned)
    assert len({len(start[name]) for name in problem.scanned}) <= 1


def test_two_problems_differ_in_how_they_are_preconditioned_alone():
    one, other = PROBLEMS["stacked-digits"], PROBLEMS["tensor-digits"]
    (params, batch), (same, again) = probe(one), probe(other)
    assert np.array_equal(flatten(params), flatten(same)) and np.array_equal(flatten(batch), flatten(again))
    assert one.loss(params, batch) == other.loss(params, batch)
    assert other.scanned == frozenset() and {params[name].ndim for name in one.scanned} == {1, 2, 3}


def test_layers_go_one_after_the_other():
    """Layers without effect may go anywhere; two that have one may not change places."""
    problem = PROBLEMS["stacked-digits"]
    params, batch = probe(problem)

    def loss(order: list[int], gain: list[float]) -> float:
        moved = {name: p[order] if name in problem.scanned else p for name, p in params.items()}
        return float(problem.loss(moved | {"gain": np.asarray(gain)[order]}, batch))

    assert loss([0, 1, 2, 3], [1, 0, 0, 1]) == pytest.approx(loss([1, 0, 3, 2], [1, 0, 0, 1]), rel=1e-12)
    assert loss([0, 1, 2, 3], [1, 0, 0, 1]) != pytest.approx(loss([3, 1, 2, 0], [1, 0, 0, 1]), rel=1e-6)


def test_start_and_batches_are_plain_float64(problem: Problem):
    for array in (*problem.init(0).values(), *problem.batch(0, 1).values()):
        assert type(array) is np.ndarray and array.dtype == np.float64 and array.flags.c_contiguous


def test_start_and_batches_depend_on_seed_and_step_alone(problem: Problem):
    start = flatten(problem.init(0))
    assert np.array_equal(start, flatten(problem.init(0)))
    assert not np.array_equal(start, flatten(problem.init(1)))
    if not problem.batch(0, 1):
        return
    first = flatten(problem.batch(0, 1))
    assert np.array_equal(first, flatten(problem.batch(0, 1)))
    assert not np.array_equal(first, flatten(problem.batch(0, 2)))
    assert not np.array_equal(first, flatten(problem.batch(1, 1)))


def test_a_caller_may_overwrite_what_it_got(problem: Problem):
    before = flatten(problem.init(0) | problem.batch(0, 1))
    for array in (*problem.init(0).values(), *problem.batch(0, 1).values()):
        array[...] = np.nan
    assert np.array_equal(before, flatten(problem.init(0) | problem.batch(0, 1)))


def test_loss_is_equal_in_all_namespaces(problem: Problem):
    params, batch = probe(problem)
    expected = pytest.approx(float(problem.loss(params, batch)), rel=1e-12)
    for make, call in (
        (array_api_strict.asarray, problem.loss),
        (torch.tensor, problem.loss),
        in_jax(problem),
    ):
        loss = call(convert(make, params), convert(make, batch))
        assert loss.shape == () and "float64" in str(loss.dtype) and float(loss) == expected


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_loss_keeps_a_narrow_dtype(problem: Problem, dtype: str, tolerance: float):
    params, batch = probe(problem)
    expected = pytest.approx(float(problem.loss(params, batch)), rel=tolerance)
    for make, call in ((torch.tensor, problem.loss), in_jax(problem)):
        narrow = partial(make, dtype=getattr(torch if make is torch.tensor else jnp, dtype))
        loss = call(convert(narrow, params), convert(narrow, batch))
        assert dtype in str(loss.dtype) and float(loss) == expected


def test_arrays_of_two_frameworks_are_refused():
    problem = PROBLEMS["least-squares"]
    params, batch = probe(problem)
    with pytest.raises(TypeError):
        problem.loss(convert(torch.tensor, params), convert(jnp.asarray, batch))


def test_gradients_of_torch_and_jax_agree(problem: Problem):
    params, batch = probe(problem)
    ours, theirs = torch_gradient(problem, params, batch), jax_gradient(problem, params, batch)
    for name in params:
        assert np.linalg.norm(ours[name] - theirs[name]) <= 1e-12 * np.linalg.norm(ours[name]), name


def test_gradient_matches_central_differences(problem: Problem):
    params, batch = probe(problem)
    random = np.random.default_rng(7)
    direction = {name: random.standard_normal(p.shape) for name, p in params.items()}

    def along(t: float) -> float:
        return float(problem.loss({name: p + t * direction[name] for name, p in params.items()}, batch))

    h = 1e-5
    slope = flatten(torch_gradient(problem, params, batch)) @ flatten(direction)
    assert (along(h) - along(-h)) / (2 * h) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if not problem.chaotic])
def test_no_direction_is_without_noise_unless_chaotic(name: str):
    problem = PROBLEMS[name]
    params, _ = probe(problem)
    grads = [torch_gradient(problem, params, problem.batch(0, step)) for step in range(1, 31)]
    for p in params:
        noise = np.stack([grad[p] for grad in grads])
        noise = noise - noise.mean(axis=0)
        assert np.abs(noise).max() > 0
        for axis in range(1, noise.ndim):  # each axis has a factor of the preconditioner to itself
            unfolded = np.moveaxis(noise, axis, 0).reshape(noise.shape[axis], -1)
            spread = np.linalg.svd(unfolded, compute_uv=False)
            assert spread[-1] > 1e-3 * spread[0]


# array-api-compat looks namespaces up through caches, and torch.compile says so when it traces around them.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_torch_compiles_the_loss_as_one_graph(problem: Problem):
    params, batch = (convert(torch.tensor, arrays) for arrays in probe(problem))
    compiled = torch.compile(problem.loss, backend="eager", fullgraph=True)
    assert float(compiled(params, batch)) == pytest.approx(float(problem.loss(params, batch)), rel=1e-12)


def test_gradient_descent_trains(problem: Problem):
    params, step_size = problem.init(0), GRADIENT_STEP.get(problem.name, 0.1)
    before = problem.loss(params, problem.batch(0, 1))
    for step in range(1, 101):
        grads = torch_gradient(problem, params, problem.batch(0, step))
        params = {name: p - step_size * grads[name] for name, p in params.items()}
    assert problem.loss(params, problem.batch(0, 1)) < REMAINS.get(problem.name, 0.8) * before
    if problem.evaluate:
        assert 0.0 <= problem.evaluate(problem.init(0)) < 0.4 < problem.evaluate(params) <= 1.0


def test_import_needs_no_framework():
    code = "import sys, conformance.problems; sys.exit(bool({'torch', 'jax', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
