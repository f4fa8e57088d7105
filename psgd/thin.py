"""Hermitian matrices of low rank, held by their thin factors and never formed.

Where an axis is much longer than all others together, as that of a vector is, the terms of the residual are T1 = x x^H
and T2 = y y^H of matrices x, y with few columns. A product with them, their sum or their difference then costs O(n^2)
instead of O(n^3). Each function here takes a thin matrix or an array, and does the same to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from psgd import _xp
from psgd._xp import adjoint, conj, make, matmul, namespace, plus, real
from psgd.arrays import Array, Columns, Factor, Index, Matrix, Row, Rows, Scalar, Tensor, Vector

# An axis is long if it is at least so many times as long as all others together: a product with a few columns runs far
# slower for its operations than one of square matrices, so that a smaller ratio gains nothing (docs/performance.md).
RATIO = 8
# Rows of a block in `triangle_from_left`: row by row it took six times as long at n = 4000 (docs/decisions.md).
BLOCK = 64


@dataclass(frozen=True)
class Thin:
    """The Hermitian matrix left right^H - shift I, never formed.

    Args:
        left: (n, k), with few columns k.
        right: (n, k).
        shift: a number.
    """

    left: Array
    right: Array
    shift: float = 0.0

    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.left.shape[0],) * 2

    def __add__(self, other: Thin) -> Thin:
        xp = namespace(self.left)
        left, right = (xp.concat(pair, axis=1) for pair in ((self.left, other.left), (self.right, other.right)))
        return Thin(left, right, self.shift + other.shift)

    def __sub__(self, other: Thin) -> Thin:
        return self + Thin(-other.left, other.right, -other.shift)

    def less(self, shift: float) -> Thin:
        """This matrix - shift I."""
        return Thin(self.left, self.right, self.shift + shift)


Hermitian = Any  # a Matrix, or Thin


def is_thin(shape: tuple[int, ...], axis: int) -> bool:
    """Is an axis at least `RATIO` times as long as all others together, so that its Gram matrix is of low rank?"""
    return bool(shape) and RATIO * prod(shape) <= shape[axis] ** 2


def gram(x: Tensor, axis: int) -> Thin:
    """x contracted with its conjugate over every axis but one, (n, n), as its two thin factors (n, size / n)."""
    columns = unfolded(x, axis)
    return Thin(columns, columns)


def unfolded(x: Tensor, axis: int) -> Columns:
    """The unfolding of x along an axis, (n, size / n): that axis as rows."""
    xp = namespace(x)
    front = xp.permute_dims(x, (axis, *(i for i in range(x.ndim) if i != axis))) if axis else x
    return xp.reshape(front, (x.shape[axis], -1))


def part(a: Hermitian) -> Array:
    """An array with the namespace and the dtype of the matrix."""
    return a.left if isinstance(a, Thin) else a


def formed(a: Hermitian) -> Factor:
    """The matrix as an array, (n, n): left right^H - shift I of a thin one."""
    if not isinstance(a, Thin):
        return a
    product = matmul(a.left, adjoint(a.right))
    return plus(product, -a.shift, _xp.identity(product, product.shape[0])) if a.shift else product


def diagonal(a: Hermitian) -> Vector:
    """The real diagonal, (n,)."""
    if not isinstance(a, Thin):
        return _xp.diagonal(a)
    return namespace(a.left).sum(real(a.left * conj(a.right)), axis=1) - a.shift


def divided(a: Hermitian, number: Scalar) -> Hermitian:
    """The matrix over a number; of a thin one without its shift. A function, since torch.compile cannot trace `/`."""
    return Thin(a.left / number, a.right) if isinstance(a, Thin) else a / number


def row_norms(a: Hermitian) -> Vector:
    """The 2-norms of the rows, (n,); of a thin matrix without its shift."""
    if not isinstance(a, Thin):
        return namespace(a).linalg.vector_norm(a, axis=1)
    xp, inner = namespace(a.left), matmul(adjoint(a.right), a.right)
    return xp.sqrt(xp.clip(xp.sum(real(matmul(a.left, inner) * conj(a.left)), axis=1), min=0.0))


def row(a: Hermitian, index: Index) -> Row:
    """The row of a 0-d index, (1, n); of a thin matrix without its shift."""
    xp, index = namespace(part(a)), namespace(part(a)).reshape(index, (1,))
    if not isinstance(a, Thin):
        return xp.take(a, index, axis=0)
    return matmul(xp.take(a.left, index, axis=0), adjoint(a.right))


def from_left(a: Hermitian, x: Columns) -> Columns:
    """a x of an (n, n) `a` and an (n, k) x: (n, k); two thin products if `a` is thin."""
    if not isinstance(a, Thin):
        return matmul(a, x)
    return _shifted(a, matmul(a.left, matmul(adjoint(a.right), x)), x)


def from_right(a: Hermitian, x: Rows) -> Rows:
    """x a of a (k, n) x and an (n, n) `a`: (k, n); two thin products if `a` is thin."""
    if not isinstance(a, Thin):
        return matmul(x, a)
    return _shifted(a, matmul(matmul(x, a.left), adjoint(a.right)), x)


def _shifted(a: Thin, product: Tensor, x: Tensor) -> Tensor:
    """A product of the thin factors with x, less shift x."""
    return plus(product, -a.shift, x, donate=True) if a.shift else product


def triangle_from_left(a: Thin, q: Matrix) -> Matrix:
    """triu(a) q of a thin `a` and an upper-triangular q, without forming `a`.

        (triu(a) q)_i = left_i sum over j >= i of conj(right_j) q_j  -  shift q_i

    The sums are taken by blocks of `BLOCK` rows: of the rows of the same block by a product of their triangle, of later
    blocks by running sums of the products of whole blocks.

    Args:
        a: (n, n).
        q: (n, n).

    Returns: (n, n), upper triangular.
    """
    xp, n = namespace(q), q.shape[0]
    blocks = -(-n // BLOCK)
    left, right, rows = (_in_blocks(x, blocks) for x in (a.left, a.right, q))
    sums = matmul(adjoint(right), rows)  # (blocks, k, n)
    later = xp.concat([xp.zeros_like(sums[:1, :, :]), xp.flip(sums, axis=0)[:-1, :, :]], axis=0)
    later = xp.flip(_xp.running_sums(later), axis=0)
    within = xp.triu(matmul(left, adjoint(right)))
    out = matmul(xp.concat([within, left], axis=2), xp.concat([rows, later], axis=1))
    return _shifted(a, xp.reshape(out, (-1, n))[:n, :], q)


def _in_blocks(x: Columns, blocks: int) -> Tensor:
    """The rows of a matrix in blocks of equal height, (blocks, height, columns); zeros fill the last block."""
    xp, (n, columns) = namespace(x), x.shape
    height = min(BLOCK, n)
    missing = blocks * height - n
    if missing:
        x = xp.concat([x, make(x, "zeros", (missing, columns))], axis=0)
    return xp.reshape(x, (blocks, height, columns))
