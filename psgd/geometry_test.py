"""What a geometry takes in place of a probe: its mean, worked out here with the Kronecker products themselves."""

from __future__ import annotations

from functools import reduce
from math import prod

import numpy as np
import pytest

from psgd import kron
from psgd.geometry import GEOMETRIES, inverse_gram, isotropic, lifted_isotropic, mean_dear

DTYPES = ["float64", "complex128"]
# Lengths of the axes, and which factors are dense.
FACTORS = [
    ((), ""),
    ((1,), "d"),
    ((4,), "d"),
    ((4,), "m"),
    ((3, 4), "mm"),
    ((3, 4), "md"),
    ((3, 4), "dm"),
    ((3, 4), "dd"),
    ((2, 3, 4), "mmm"),
    ((2, 3, 4), "dmd"),
    ((1, 3, 2), "dmm"),
]


def factors_of(shape: tuple[int, ...], kinds: str, dtype: str) -> list[np.ndarray]:
    """Upper triangular matrices and diagonals, neither Hermitian nor near the identity."""
    random = np.random.default_rng(len(shape))

    def normal(*shape: int) -> np.ndarray:
        x = random.standard_normal(shape)
        return np.asarray(x + 1j * random.standard_normal(shape) if "complex" in dtype else x)

    if not shape:
        return [normal() + 2]
    return [
        np.triu(normal(n, n)) + 2 * np.eye(n) if kind == "m" else normal(n) + 2
        for n, kind in zip(shape, kinds, strict=True)
    ]


def full(q: np.ndarray) -> np.ndarray:
    """A factor as a matrix."""
    return q if q.ndim == 2 else np.diag(np.atleast_1d(q))


def mean_gram(qs: list[np.ndarray], operator: np.ndarray, axis: int) -> np.ndarray:
    """E Gram(operator v) of an axis: its covariance operator operator^H, traced over the other axes."""
    sizes = [len(full(q)) for q in qs]
    before, n, after = prod(sizes[:axis]), sizes[axis], prod(sizes[axis + 1 :])
    covariance = (operator @ operator.conj().T).reshape(before, n, after, before, n, after)
    wanted = np.einsum("aibajb->ij", covariance)
    return wanted if qs[axis].ndim == 2 else np.diag(wanted).real.reshape(qs[axis].shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "kinds"), FACTORS)
def test_inverse_gram_is_the_mean_over_probes(shape: tuple[int, ...], kinds: str, dtype: str):
    qs = factors_of(shape, kinds, dtype)
    inverse = np.linalg.inv(reduce(np.kron, map(full, qs))).conj().T
    for axis, q in enumerate(qs):
        got, wanted = inverse_gram(qs, axis), mean_gram(qs, inverse, axis)
        assert got.shape == q.shape and got.dtype == wanted.dtype
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "kinds"), FACTORS)
def test_isotropic_means(shape: tuple[int, ...], kinds: str, dtype: str):
    if not shape:
        shape, kinds = (1,), "d"
    qs = factors_of(shape, kinds, dtype)
    for axis, q in enumerate(qs):
        wanted = mean_gram(qs, np.eye(prod(shape), dtype=dtype), axis)
        assert isotropic(qs, axis) * (np.eye(len(q)) if q.ndim == 2 else np.ones(len(q))) == pytest.approx(wanted)
        lifted = [q if i == axis else np.eye(len(q)) for i, q in enumerate(qs)]
        wanted = mean_gram(qs, reduce(np.kron, map(full, lifted)), axis)
        assert lifted_isotropic(qs, axis) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("lengths", [(1, 3), (3, 1), (2, 3), (3, 2), (3, 3)])
def test_a_mean_is_dear_unless_the_diagonal_side_is_the_longer(lengths: tuple[int, int]):
    like = np.zeros(lengths)
    left, right = lengths
    for dense in ((True, True), (True, False), (False, True), (False, False)):
        cheap = dense == (False, False)
        cheap |= dense == (False, True) and left >= right
        cheap |= dense == (True, False) and right >= left
        assert mean_dear(kron.init(dense, like).Q) is not cheap


def test_means_that_are_dear_in_other_numbers_of_axes():
    def dear(shape: tuple[int, ...], *dense: bool) -> bool:
        return mean_dear(kron.init(dense, np.zeros(shape)).Q)

    assert not dear((), False) and not dear((5,), False) and not mean_dear(())
    assert dear((5,), True)
    assert not dear((3, 4, 5), False, True, False) and dear((3, 6, 5), False, True, False)
    assert dear((3, 4, 9), True, True, False)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_only_triangular_factors_must_see_a_probe(name: str):
    for dense in ((True, False), (False, False)):
        assert GEOMETRIES[name].probed(kron.init(dense, np.zeros((2, 3))).Q) is (name == "EQ")
