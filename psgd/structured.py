"""Matrix products of which a part is known beforehand, because an operand is triangular or the result Hermitian.

They are computed in strips of rows, each of which leaves out what is zero or follows by symmetry. Of the work of the
whole product, s strips leave (s + 1) / (2 s), and less where two triangles meet. Short matrices are multiplied whole.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from psgd._xp import adjoint, conj, matmul, namespace
from psgd.arrays import Columns, Matrix, Rows, Tensor

# Narrower strips multiply more slowly than they save; those that are mirrored are copied too.
NARROWEST, NARROWEST_MIRRORED = 192, 256
MOST = 4


def edges(n: int, *, mirrored: bool = False) -> list[tuple[int, int]]:
    """The strips of n rows, each from its first row to the one after its last."""
    count = max(1, min(MOST, n // (NARROWEST_MIRRORED if mirrored else NARROWEST)))
    cuts = [n * i // count for i in range(count + 1)]
    return list(pairwise(cuts))


def hermitian(n: int, strip: Callable[[int, int], Tensor]) -> Matrix:
    """An (n, n) Hermitian matrix from its rows lo to hi and columns lo to n, (hi - lo, n - lo), that `strip` gives."""
    cuts = edges(n, mirrored=True)
    upper = [strip(lo, hi) for lo, hi in cuts]
    if len(upper) == 1:
        return upper[0]
    xp, rows = namespace(upper[0]), []
    for i, (lo, hi) in enumerate(cuts):
        mirrored = [adjoint(upper[j][:, lo - first : hi - first]) for j, (first, _) in enumerate(cuts[:i])]
        rows.append(xp.concat([*mirrored, upper[i]], axis=1))
    return xp.concat(rows, axis=0)


def gram_of_rows(x: Columns) -> Matrix:
    """x x^H. Where rows are shorter than the matrix is high, mirroring would cost what it saves."""
    n, k = x.shape
    if k < n:
        return matmul(x, adjoint(x))
    return hermitian(n, lambda lo, hi: matmul(x[lo:hi, :], adjoint(x[lo:, :])))


def gram_of_columns(x: Rows) -> Matrix:
    """x^T conj(x)."""
    return gram_of_rows(x.mT)


def gram_of_triangle(q: Matrix) -> Matrix:
    """q^H q of an upper-triangular q."""
    return hermitian(q.shape[0], lambda lo, hi: matmul(adjoint(q[:hi, lo:hi]), q[:hi, lo:]))


def triangle_by_triangle(a: Matrix, b: Matrix) -> Matrix:
    """a b of upper-triangular matrices; what is below their diagonals is not read."""
    xp, rows = namespace(a), []
    cuts = edges(a.shape[0])
    if len(cuts) == 1:
        return matmul(xp.triu(a), b)
    for lo, hi in cuts:
        row = matmul(xp.triu(a[lo:hi, lo:]), b[lo:, lo:])
        rows.append(xp.concat([xp.zeros_like(a[lo:hi, :lo]), row], axis=1))
    return xp.concat(rows, axis=0)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else namespace(parts[0]).concat(parts, axis=axis)


def upper_from_left(q: Matrix, x: Tensor) -> Tensor:
    """q x of an upper-triangular q and an x (..., n, k)."""
    return _joined([matmul(q[lo:hi, lo:], x[..., lo:, :]) for lo, hi in edges(q.shape[0])], -2)


def upper_from_right(q: Matrix, x: Tensor) -> Tensor:
    """x q^T, x (..., n)."""
    return _joined([matmul(x[..., lo:], q[lo:hi, lo:].mT) for lo, hi in edges(q.shape[0])], -1)


def adjoint_from_left(q: Matrix, x: Tensor) -> Tensor:
    """q^H x of an upper-triangular q."""
    return _joined([matmul(adjoint(q[:hi, lo:hi]), x[..., :hi, :]) for lo, hi in edges(q.shape[0])], -2)


def adjoint_from_right(q: Matrix, x: Tensor) -> Tensor:
    """x conj(q) = x (q^H)^T."""
    return _joined([matmul(x[..., :hi], conj(q[:hi, lo:hi])) for lo, hi in edges(q.shape[0])], -1)
