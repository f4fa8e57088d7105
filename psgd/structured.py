"""Matrix products of which a part is known beforehand, because an operand is triangular or the result Hermitian.

They are computed in strips of rows, each of which leaves out what is zero or follows by symmetry. With s strips the
share (s + 1) / (2 s) of the operations of the full product remains, 5/8 of four strips, and less where two triangles
meet. Short matrices are multiplied in full.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from psgd._xp import adjoint, conj, matmul, namespace
from psgd.arrays import Columns, Matrix, Rows, Tensor

# Least rows of a strip. Measured on a CPU (docs/performance.md): below 2 x 192 rows strips save less than they cost the
# compiler, and below 2 x 256 rows copying the mirror image of a Hermitian result costs what it saves.
NARROWEST, NARROWEST_MIRRORED = 192, 256
MOST = 4  # strips: 5/8 of the operations; twice as many would leave 9/16, in narrower products


def edges(n: int, *, mirrored: bool = False) -> list[tuple[int, int]]:
    """The strips of n rows, each as (its first row, the row after its last); one strip where n is small.

    mirrored: of a Hermitian result, whose other half is copied.
    """
    count = max(1, min(MOST, n // (NARROWEST_MIRRORED if mirrored else NARROWEST)))
    cuts = [n * i // count for i in range(count + 1)]
    return list(pairwise(cuts))


def hermitian(n: int, strip: Callable[[int, int], Tensor]) -> Matrix:
    """An (n, n) Hermitian matrix, of which only strips of the upper triangle are computed and the rest is mirrored.

    Args:
        n: rows and columns.
        strip: (lo, hi) -> rows lo to hi and columns lo to n of the matrix, (hi - lo, n - lo).

    Returns: (n, n); the result of `strip` itself where there is one strip.
    """
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
    """x x^H of an (n, k) matrix: (n, n), Hermitian."""
    n, k = x.shape
    if k < n:  # copying the mirror image, n^2 / 2 numbers, would cost what the products of length k save
        return matmul(x, adjoint(x))
    return hermitian(n, lambda lo, hi: matmul(x[lo:hi, :], adjoint(x[lo:, :])))


def gram_of_columns(x: Rows) -> Matrix:
    """x^T conj(x) of a (k, n) matrix: (n, n), Hermitian."""
    return gram_of_rows(x.mT)


def gram_of_triangle(q: Matrix) -> Matrix:
    """q^H q of an upper-triangular (n, n) q: (n, n), Hermitian. What is below the diagonal of q must be zero."""
    return hermitian(q.shape[0], lambda lo, hi: matmul(adjoint(q[:hi, lo:hi]), q[:hi, lo:]))


def triangle_by_triangle(a: Matrix, b: Matrix) -> Matrix:
    """a b of upper-triangular (n, n) matrices: upper triangular again, with 15/32 of the operations in four strips.

    What is below the diagonal of `a` is not read, so that `a` may be any matrix whose triangle triu(a) is meant.
    """
    xp, rows = namespace(a), []
    cuts = edges(a.shape[0])
    if len(cuts) == 1:
        return matmul(xp.triu(a), b)
    for lo, hi in cuts:
        row = matmul(xp.triu(a[lo:hi, lo:]), b[lo:, lo:])
        rows.append(xp.concat([xp.zeros_like(a[lo:hi, :lo]), row], axis=1))
    return xp.concat(rows, axis=0)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    """The parts along an axis; a single one without a copy."""
    return parts[0] if len(parts) == 1 else namespace(parts[0]).concat(parts, axis=axis)


def upper_from_left(q: Matrix, x: Tensor) -> Tensor:
    """q x of an upper-triangular (n, n) q and an x (..., n, k): (..., n, k)."""
    return _joined([matmul(q[lo:hi, lo:], x[..., lo:, :]) for lo, hi in edges(q.shape[0])], -2)


def upper_from_right(q: Matrix, x: Tensor) -> Tensor:
    """x q^T of an upper-triangular (n, n) q and an x (..., n): (..., n)."""
    return _joined([matmul(x[..., lo:], q[lo:hi, lo:].mT) for lo, hi in edges(q.shape[0])], -1)


def adjoint_from_left(q: Matrix, x: Tensor) -> Tensor:
    """q^H x of an upper-triangular (n, n) q and an x (..., n, k): (..., n, k)."""
    return _joined([matmul(adjoint(q[:hi, lo:hi]), x[..., :hi, :]) for lo, hi in edges(q.shape[0])], -2)


def adjoint_from_right(q: Matrix, x: Tensor) -> Tensor:
    """x conj(q) = x (q^H)^T of an upper-triangular (n, n) q and an x (..., n): (..., n)."""
    return _joined([matmul(x[..., :hi], conj(q[:hi, lo:hi])) for lo, hi in edges(q.shape[0])], -1)
