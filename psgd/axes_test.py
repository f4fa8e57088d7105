"""Algebra along one axis against einsum, for tensors of order 0 to 5."""

from __future__ import annotations

from string import ascii_lowercase

import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework, double_precision
from psgd.axes import along, along_all, along_inverse_adjoint, gram, outer

SHAPES = [(), (3,), (4, 3), (1, 3), (3, 4, 2), (2, 3, 1, 4), (2, 3, 2, 1, 3)]
PLACES = [(shape, axis) for shape in SHAPES for axis in range(max(len(shape), 1))]
DTYPES = ["float64", "complex128"]


@pytest.fixture(params=FRAMEWORKS.values(), ids=FRAMEWORKS)
def framework(request: pytest.FixtureRequest):
    with double_precision(request.param.name):
        yield request.param


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


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert got == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), PLACES)
def test_along(framework: Framework, shape: tuple[int, ...], axis: int, dtype: str):
    x = random_array(shape, dtype)
    for q in factors_of(shape, axis, dtype):
        got = along(framework.array(q, dtype), framework.array(x, dtype), axis)
        close(framework.numpy(got), mode_product(q, x, axis))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), PLACES)
def test_along_inverse_adjoint(framework: Framework, shape: tuple[int, ...], axis: int, dtype: str):
    x = random_array(shape, dtype)
    for q in factors_of(shape, axis, dtype):
        if q.ndim == 2:
            q = np.triu(q) + 2 * np.eye(len(q))
        inverse = np.linalg.inv(q).conj().T if q.ndim == 2 else 1 / q.conj()
        got = along_inverse_adjoint(framework.array(q, dtype), framework.array(x, dtype), axis)
        close(framework.numpy(got), mode_product(inverse, x, axis))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_along_all_is_a_kronecker_product(framework: Framework, shape: tuple[int, ...], dtype: str):
    x = random_array(shape, dtype)
    qs = [factors_of(shape, axis, dtype)[-(axis % 2)] for axis in range(max(len(shape), 1))]
    full = np.ones((1, 1))
    for q in qs:
        full = np.kron(full, q if q.ndim == 2 else np.diag(np.atleast_1d(q)))
    got = along_all([framework.array(q, dtype) for q in qs], framework.array(x, dtype))
    close(framework.numpy(got), (full @ x.ravel()).reshape(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), PLACES)
def test_gram(framework: Framework, shape: tuple[int, ...], axis: int, dtype: str):
    x = random_array(shape, dtype)
    unfolded = np.moveaxis(x, axis, 0).reshape(shape[axis], -1) if shape else x.reshape(1, 1)
    full = unfolded @ unfolded.conj().T
    got = gram(framework.array(x, dtype), axis, diagonal=True)
    close(framework.numpy(got), np.diag(full).real.reshape(shape[axis : axis + 1]))
    assert "complex" not in str(got.dtype)
    if shape:
        close(framework.numpy(gram(framework.array(x, dtype), axis, diagonal=False)), full)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outer(framework: Framework, dtype: str):
    q = random_array((3, 3), dtype)
    close(framework.numpy(outer(framework.array(q, dtype))), q @ q.conj().T)
    close(framework.numpy(outer(framework.array(q[0], dtype))), np.abs(q[0]) ** 2)


@pytest.mark.parametrize("name", [name for name, f in FRAMEWORKS.items() if "bfloat16" in f.dtypes])
def test_half_precision_solves_in_float32(name: str):
    framework = FRAMEWORKS[name]
    q = framework.array(np.triu(random_array((4, 4), "float64")) + 2 * np.eye(4), "bfloat16")
    x = framework.array(random_array((4, 3), "float64"), "bfloat16")
    got = along_inverse_adjoint(q, x, 0)
    assert got.dtype == q.dtype
    want = np.linalg.solve(framework.numpy(q).T, framework.numpy(x))
    assert framework.numpy(got) == pytest.approx(want, rel=2**-8)  # one rounding, of the result
