"""Lower bounds on the spectral norm of a matrix, by a few products with probe vectors.

The step size of a factor is divided by such a bound, so that it is computed at each fit of each dense factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psgd._xp import accumulation_dtype, adjoint, cast, conj, matmul, namespace, real, tiny
from psgd.arrays import Factor, Flag, Matrix, PerRow, Row, Rows, Scalar
from psgd.noise import Draws
from psgd.thin import Hermitian, Thin, diagonal, divided, from_right, part, row, row_norms


def norm_bound(a: Hermitian, probes: Rows | None, *, products: int, positive: bool, offset: float = 0.0) -> Scalar:
    r"""Lower bound on ||a||_2 of a Hermitian or skew-Hermitian matrix.

    With A = a / S, the row A_j of largest norm starts the probes v_r in the dominant subspace; the bound is the growth
    of their length by the last of m products:

        V_r = A_j + sgn(<A_j, v_r>) v_r,   bound = S max_r ||V_r A^m|| / ||V_r A^(m-1)||

    Args:
        a: (n, n), or `Thin` if it is positive. The zero matrix gives 0.
        probes: (k, n) standard normal rows v_r; None starts from A_j alone.
        products: m, at least 1.
        positive: `a` is positive semidefinite: S is its largest diagonal entry, else its largest modulus.
        offset: added to every entry of the last normalised probes; quad_torch does so with 1e-9.

    Returns: 0-d, real, in the dtype of |a|. All divisors have the smallest normal number added, so that 0 / 0 is 0.

    Source: psgd_torch `norm_lower_bound_spd`, `norm_lower_bound_skh`; quad_torch `_norm_lower_bound`; of psgd_jax's
    `_norm_lower_bound` the case of a Hermitian matrix.
    """
    xp, small = namespace(part(a)), tiny(part(a))
    scale = xp.max(diagonal(a)) if positive else xp.max(xp.abs(a))
    a = divided(a, scale + small)
    longest = row(a, xp.argmax(row_norms(a)))
    v = longest if probes is None else longest + _phases(probes, longest) * probes
    for _ in range(products - 1):
        v = from_right(a, v)
        v = v / (xp.linalg.vector_norm(v, axis=1, keepdims=True) + small)
    if offset:
        v = v + offset
    return scale * xp.max(xp.linalg.vector_norm(from_right(a, v), axis=1))


def _phases(probes: Rows, row: Row) -> PerRow:
    """sgn(<row, v>) of each probe v, (k, 1): times it, no probe points against the row."""
    xp = namespace(probes)
    overlap = matmul(conj(probes), row.mT)
    size = xp.abs(overlap)
    return overlap / xp.where(size == 0, xp.ones_like(size), size)


def general_bound(a: Matrix) -> Scalar:
    r"""Lower bound on ||a||_2 of any square matrix, by two products from its largest row or column.

        x = a a_j^H of the row a_j of largest norm,   bound = ||a^H x|| / ||x||

    and the same with a^H for `a` where a column is longer than every row.

    Args:
        a: (n, n), such as the triangle of a residual; the zero matrix gives 0.

    Returns: 0-d, real, in the dtype of |a|.

    Source: psgd_jax `_norm_lower_bound`.
    """
    xp, small = namespace(a), tiny(a)
    scale = xp.max(xp.abs(a))
    a = a / (scale + small)
    rows, columns = (xp.sum(real(a * conj(a)), axis=axis) for axis in (1, 0))
    flip = xp.max(columns) > xp.max(rows)
    a = xp.where(flip, adjoint(a), a)
    largest = xp.argmax(xp.where(flip, columns, rows))
    row = xp.take(a, xp.reshape(largest, (1,)), axis=0)
    x = matmul(a, adjoint(row))
    x = x / (xp.linalg.vector_norm(x) + small)
    return scale * xp.linalg.vector_norm(matmul(adjoint(a), x))


@dataclass(frozen=True)
class NormBound:
    """`norm_bound` with its settings, and the largest entry for diagonal factors.

    The published settings are `NormBound(32, 4)` of psgd_torch, `NormBound(4, 6, 1e-9)` of quad_torch and
    `NormBound(0, 2)` of psgd_jax.

    Args:
        probes: k, the number of normal probes; 0 starts from the largest row alone.
        products: m, the number of products.
        offset: see `norm_bound`.
    """

    probes: int = 32
    products: int = 4
    offset: float = 0.0

    def __call__(
        self, a: Factor | Thin, draws: Draws, role: str, *, positive: bool, skip: Flag | None = None
    ) -> Scalar:
        """The bound of an (n, n) matrix, or the largest entry of an (n,) or 0-d diagonal.

        Args:
            a: the matrix or diagonal.
            draws: where the probes come from.
            role: the role of that draw.
            positive: see `norm_bound`.
            skip: 0-d boolean; where true the bound is not used, and recorded draws have no probes for it.

        Returns: 0-d, real, at least float32.
        """
        xp, like = namespace(part(a)), part(a)
        if a.ndim < 2:
            bound = xp.max(real(a))
        else:
            probes = draws.normal(role, (self.probes, a.shape[0]), like, skip) if self.probes else None
            bound = norm_bound(a, probes, products=self.products, positive=positive, offset=self.offset)
        return cast(bound, accumulation_dtype(like))


@dataclass(frozen=True)
class TraceBound(NormBound):
    """The trace instead of the norm of a positive matrix: at least the norm, at most rank times it.

    Of T1 + T2 with one column each that is at most twice the norm. Skew-Hermitian matrices and diagonals are bounded
    as by `NormBound`. Source: psgd_torch `update_precond_dense_*`.
    """

    def __call__(
        self, a: Factor | Thin, draws: Draws, role: str, *, positive: bool, skip: Flag | None = None
    ) -> Scalar:
        if not positive or a.ndim < 2:
            return super().__call__(a, draws, role, positive=positive, skip=skip)
        like = part(a)
        return namespace(like).sum(cast(diagonal(a), accumulation_dtype(like)))


SkewNorm = Callable[..., Scalar]  # (r, sweep=0, skip=None) -> 0-d bound on the norm of a skew-Hermitian r
