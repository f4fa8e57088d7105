"""Algebra along one axis against einsum, for tensors of order 0 to 5."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_lowercase

import jax
import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework
from psgd.axes import along, along_all, along_inverse_adjoint, gram, outer

SHAPES = [(), (3,), (4, 3), (1, 3), (3, 4, 2), (2, 3, 1, 4), (2, 3, 2, 1, 3)]
PLACES = [(shape, axis) for shape in SHAPES for axis in range(max(len(shape), 1))]
DTYPES = ["float64", "complex128"]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def random_array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape)
    return np.asarray(x + 1j * random.standard_normal(shape) if "complex" in dtype else x)


def factors_of(shape: tuple[int, ...], axis: int, dtype: str) -> list[np.ndarray]:
    """A diagonal and a dense factor of an axis; a scalar has the first alone."""
    if not shape:
        return [random_array((), dtype, 1)]
    n = shape[axis]
    return [random_array((n,), dtype, 1), random_array((n, n), dtype, 2)]


def mode_product(q: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """q as a matrix, contracted with one axis of x."""
    if not x.ndim:
        return q * x
    letters = ascii_lowercase[: x.ndim]
    out = letters.replace(letters[axis], "z")
    return np.einsum(f"z{letters[axis]},{letters}->{out}", q if q.ndim == 2 else np.diag(q), x)


def computed(framework: Framework, dtype: str, call: Callable, inputs: list[tuple[np.ndarray, ...]]) -> list:
    """`call(i, *arrays)` for all inputs: in JAX as one compiled program, since it compiles each shape anew."""
    own = [[framework.array(x, dtype) for x in arrays] for arrays in inputs]

    def all_of_them(own: list) -> list:
        return [call(i, *arrays) for i, arrays in enumerate(own)]

    return (jax.jit(all_of_them) if framework.name == "jax" else all_of_them)(own)


def assert_close(framework: Framework, got: list, want: list[np.ndarray]) -> None:
    assert len(want) > 2
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape, i
        assert framework.numpy(x) == pytest.approx(y, rel=1e-12, abs=1e-12), i


def cases(dtype: str) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """(factor, tensor, axis): each kind of factor on each axis of each shape."""
    places = [(q, shape, axis) for shape, axis in PLACES for q in factors_of(shape, axis, dtype)]
    return [(q, random_array(shape, dtype), axis) for q, shape, axis in places]


def test_along(framework: Framework, dtype: str):
    todo = cases(dtype)
    got = computed(framework, dtype, lambda i, q, x: along(q, x, todo[i][2]), [case[:2] for case in todo])
    assert_close(framework, got, [mode_product(*case) for case in todo])


def test_along_inverse_adjoint(framework: Framework, dtype: str):
    todo = [(np.triu(q) + 2 * np.eye(len(q)) if q.ndim == 2 else q, x, axis) for q, x, axis in cases(dtype)]
    inverses = [np.linalg.inv(q).conj().T if q.ndim == 2 else 1 / q.conj() for q, _, _ in todo]
    call = lambda i, q, x: along_inverse_adjoint(q, x, todo[i][2])  # noqa: E731
    got = computed(framework, dtype, call, [case[:2] for case in todo])
    want = [mode_product(inverse, x, axis) for inverse, (_, x, axis) in zip(inverses, todo, strict=True)]
    assert_close(framework, got, want)


def test_an_axis_without_a_factor_is_left_alone(framework: Framework, dtype: str):
    x = random_array((3, 2, 4), dtype)
    todo = [(q, axis) for axis in range(3) for q in factors_of(x.shape, axis, dtype)]

    def alone(i: int, x, q):
        return along_all([q if axis == todo[i][1] else None for axis in range(3)], x)

    got = computed(framework, dtype, alone, [(x, q) for q, _ in todo])
    assert_close(framework, got, [mode_product(q, x, axis) for q, axis in todo])


def test_along_all_is_a_kronecker_product(framework: Framework, dtype: str):
    inputs, want = [], []
    for shape in SHAPES:
        x = random_array(shape, dtype)
        qs = [factors_of(shape, axis, dtype)[-(axis % 2)] for axis in range(max(len(shape), 1))]
        full = np.ones((1, 1))
        for q in qs:
            full = np.kron(full, q if q.ndim == 2 else np.diag(np.atleast_1d(q)))
        inputs.append((x, *qs))
        want.append((full @ x.ravel()).reshape(shape))
    assert_close(framework, computed(framework, dtype, lambda i, x, *qs: along_all(qs, x), inputs), want)


@pytest.mark.parametrize("diagonal", [True, False])
def test_gram(framework: Framework, dtype: str, diagonal: bool):
    places = [(shape, axis) for shape, axis in PLACES if shape or diagonal]
    tensors, want = [random_array(shape, dtype) for shape, _ in places], []
    for x, (shape, axis) in zip(tensors, places, strict=True):
        unfolded = np.moveaxis(x, axis, 0).reshape(shape[axis], -1) if shape else x.reshape(1, 1)
        full = unfolded @ unfolded.conj().T
        want.append(np.diag(full).real.reshape(shape[axis : axis + 1]) if diagonal else full)
    call = lambda i, x: gram(x, places[i][1], diagonal=diagonal)  # noqa: E731
    got = computed(framework, dtype, call, [(x,) for x in tensors])
    assert_close(framework, got, want)
    assert not diagonal or not any("complex" in str(x.dtype) for x in got)


def test_outer(framework: Framework, dtype: str):
    q = random_array((3, 3), dtype)
    got = computed(framework, dtype, lambda i, q: outer(q), [(q,), (q[0],), (q[0, 0],)])
    assert_close(framework, got, [q @ q.conj().T, np.abs(q[0]) ** 2, np.abs(q[0, 0]) ** 2])


@pytest.mark.parametrize("name", [name for name, f in FRAMEWORKS.items() if "bfloat16" in f.dtypes])
def test_half_precision_solves_in_float32(name: str):
    framework = FRAMEWORKS[name]
    q = framework.array(np.triu(random_array((4, 4), "float64")) + 2 * np.eye(4), "bfloat16")
    x = framework.array(random_array((4, 3), "float64"), "bfloat16")
    got = along_inverse_adjoint(q, x, 0)
    assert got.dtype == q.dtype
    want = np.linalg.solve(framework.numpy(q).T, framework.numpy(x))
    assert framework.numpy(got) == pytest.approx(want, rel=2**-8)  # one rounding, of the result
