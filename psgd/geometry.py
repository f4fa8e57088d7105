"""The geometries, one record each: how a factor moves, and where its residual is measured.

Fitting P to the pair (v, h), with P h = v in the mean, moves each factor against D = T1 - T2:

    a = measure(Q, h),  T1 = Gram(lift(q, a))           what the preconditioner makes of h
    b = refer(Q, v),    T2 = Gram(lift(q, b))           what it should make, or the expectation of that over v
    q <- move(q, D, m)                                  m = mu / L, L a running bound on ||T1 + T2||

Adding a geometry is adding a record to `GEOMETRIES`. Equations: arXiv 2402.11858; names: psgd_torch's `dQ`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from psgd._xp import adjoint, by_inverse, conj, identity, matmul, namespace, number, plus, real
from psgd.arrays import AxisFactor, Diagonal, Factor, Matrix, Scalar, Tensor
from psgd.axes import along, along_adjoint_of_upper, along_all, along_inverse_adjoint, along_upper, outer
from psgd.rotate import polished, procrustes2, symmetrised
from psgd.spectral import SkewNorm
from psgd.structured import gram_of_columns, gram_of_triangle, hermitian, triangle_by_triangle
from psgd.thin import Hermitian, Thin, from_left, from_right, triangle_from_left

Factors = Sequence[AxisFactor]


# P g is in every case a product of factors along the axes of g.
def multiplied_out(q: Factor, g: Tensor) -> bool:
    """Is it less work to multiply the two factors of P before they act on g? On axes shorter than the rest."""
    return q.ndim < 2 or q.shape[0] * q.shape[0] < prod(g.shape)


def inner(q: Factor, axis: int) -> Factor:
    """q^H q."""
    return real(conj(q) * q) if q.ndim < 2 else gram_of_columns(conj(q))


def inner_along(q: Factor, g: Tensor, axis: int) -> Tensor:
    """q^H q g."""
    return along(adjoint(q), along(q, g, axis), axis)


def inner_of_upper(q: Factor, axis: int) -> Factor:
    """q^H q of an upper-triangular q."""
    return inner(q, axis) if q.ndim < 2 else gram_of_triangle(q)


def inner_of_upper_along(q: Factor, g: Tensor, axis: int) -> Tensor:
    """q^H q g of an upper-triangular q."""
    return along_adjoint_of_upper(q, along_upper(q, g, axis), axis)


def _sided(q: Factor, axis: int) -> Factor:
    return q if axis == 0 or q.ndim < 2 else q.mT


def square(q: Factor, axis: int) -> Factor:
    """q q, with q taken as Hermitian: Q1 Q1 G Q2 Q2, each factor acting from its own side [quad_torch]."""
    side = _sided(q, axis)
    return side * side if q.ndim < 2 else matmul(side, side)


def square_along(q: Factor, g: Tensor, axis: int) -> Tensor:
    """q q g, with q taken as Hermitian."""
    side = _sided(q, axis)
    return along(side, along(side, g, axis), axis)


def stored(q: Factor, axis: int) -> Factor:
    """q."""
    return q


class Root(NamedTuple):
    """What the factors of P are of those that are stored.

    factor: (q, axis) -> the factor of P of an axis. act: (q, g, axis) -> the same applied to g, without forming it.
    equation: what P is of Q, to be read.
    """

    factor: Callable[[Factor, int], Factor]
    act: Callable[[Factor, Tensor, int], Tensor]
    equation: str


OF_Q = Root(inner, inner_along, "P = Q^H Q")
OF_UPPER_Q = Root(inner_of_upper, inner_of_upper_along, "P = Q^H Q")
OF_HERMITIAN_Q = Root(square, square_along, "P = Q Q")
OF_P = Root(stored, along, "P = Q")


# Where things are measured.
def upper(qs: Factors, g: Tensor) -> Tensor:
    """Q g, of upper-triangular factors."""
    return along_all(qs, g, along_upper)


def inverse_adjoint(qs: Factors, v: Tensor) -> Tensor:
    """Q^-H v of triangular factors."""
    return along_all(qs, v, along_inverse_adjoint)


def itself(qs: Factors, v: Tensor) -> Tensor:
    """v."""
    return v


# What T2 is in the mean over v ~ N(0, I); a number stands for so many times the identity.
def others(qs: Factors, axis: int) -> float:
    """c = size / n of an axis: the product of the other axes' lengths."""
    return float(prod([q.shape[0] for i, q in enumerate(qs) if i != axis]))


def isotropic(qs: Factors, axis: int, less: Scalar | float = 1.0) -> float:
    """E Gram(v) = c I, which is nothing beside a T1 of which anything was left out."""
    return others(qs, axis)


def lifted_isotropic(qs: Factors, axis: int, less: Scalar | float = 1.0) -> Factor:
    """E Gram(q v) = c q q^H, which is nothing beside a T1 of which anything was left out."""
    return others(qs, axis) * outer(qs[axis])


def inverse_gram(qs: Factors, axis: int, less: Scalar | float = 1.0) -> Factor:
    """E Gram(less Q^-H v) = less^2 M_i prod of tr M_j over the other axes j, M = q^-H q^-1 of triangular factors."""
    inverses = [1 / conj(q) if q.ndim < 2 else adjoint(by_inverse(identity(q, q.shape[0]), q)) for q in qs]
    inverses = [x * number(less ** (1 / len(qs)), x) for x in inverses]
    mean = outer(inverses[axis])
    for i, x in enumerate(inverses):
        mean = mean if i == axis else mean * namespace(x).sum(real(x * conj(x)))
    return mean


# Must v be drawn, though its mean effect may be known? Asked with the shapes of the factors alone.
def mean_known(qs: Factors) -> bool:
    """No: the mean is as cheap as can be."""
    return False


def mean_unknown(qs: Factors) -> bool:
    """Yes: there is no mean to take."""
    return True


def mean_dear(qs: Factors) -> bool:
    """Where inverting would cost more than a draw: two dense factors, or one longer than all diagonal ones."""
    dense = [q.shape[0] for q in qs if q.ndim == 2]
    diagonal = [prod(q.shape) for q in qs if q.ndim < 2]
    return len(dense) > 1 or max(dense, default=0) > max(diagonal, default=0)


def unlifted(q: Factor, x: Tensor, axis: int) -> Tensor:
    """x."""
    return x


# How a dense factor moves.
def left(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """q <- q - m D q."""
    return plus(q, -m, from_left(d, q))


def right(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """q <- q - m q D."""
    return plus(q, -m, from_right(d, q))


def triangular(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """q <- q - m triu(D) q: q stays upper triangular."""
    return plus(q, -m, (triangle_from_left if isinstance(d, Thin) else triangle_by_triangle)(d, q))


def two_sided(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """q <- (1 - m D) q (1 - m D), symmetrised: stays Hermitian and, for m < 1, positive."""
    r = left(q, d, m)
    if isinstance(d, Thin):
        return symmetrised(right(r, d, m))
    return symmetrised(hermitian(q.shape[0], lambda lo, hi: plus(r[lo:hi, lo:], -m, matmul(r[lo:hi, :], d[:, lo:]))))


def two_sided_half(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """`two_sided` by half the step: in P = Q Q it counts twice."""
    return two_sided(q, d, m / 2)


# How a diagonal factor moves.
def scaled(q: Diagonal, d: Diagonal, m: Scalar) -> Diagonal:
    """q <- q (1 - m d)."""
    return q * (1 - m * d)


def scaled_twice(q: Diagonal, d: Diagonal, m: Scalar) -> Diagonal:
    """q <- q (1 - m d)^2."""
    return scaled(scaled(q, d, m), d, m)


def scaled_twice_half(q: Diagonal, d: Diagonal, m: Scalar) -> Diagonal:
    """q <- q (1 - (m/2) d)^2."""
    return scaled_twice(q, d, m / 2)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One row of the table of geometries.

    Args:
        move: (q, D, m) -> q of a dense factor.
        move_diagonal: the same of a diagonal factor; all products elementwise.
        turn: after a dense factor has moved: (q, norm of a skew matrix) -> q, a rotation, or None.
        root: what the factors of P are of the stored ones.
        measure: (factors, h) -> a; None is P h.
        refer: (factors, v) -> b.
        lift: (q, x, axis) -> x, what factor q adds before the Gram products.
        expected: (factors, axis, less) -> E T2 over v ~ N(0, less^2 I); a number stands for so many times the identity.
        probed: factors -> must whitening draw v, rather than take `expected`?
        balance_first: balances the factors before each fit; the others do it rarely, as recipe and schedule say.
        moved: how a dense factor moves, to be read.
    """

    move: Callable[[Matrix, Hermitian, Scalar], Matrix]
    move_diagonal: Callable[[Diagonal, Diagonal, Scalar], Diagonal] = scaled
    turn: Callable[[Matrix, SkewNorm], Matrix] | None = None
    root: Root = OF_Q
    measure: Callable[[Factors, Tensor], Tensor] | None = None
    refer: Callable[[Factors, Tensor], Tensor] = itself
    lift: Callable[[Factor, Tensor, int], Tensor] = unlifted
    expected: Callable[..., Factor | float] = isotropic
    probed: Callable[[Factors], bool] = mean_known
    balance_first: bool = False
    moved: str = ""

    @property
    def equation(self) -> str:
        """What the factor of an axis is, to be read."""
        return (
            f"{self.root.equation} along each axis,  {self.moved}"
            if self.moved
            else f"{self.root.equation} along each axis"
        )

    @property
    def fits_p(self) -> bool:
        """Are the stored factors those of P, not of Q?"""
        return self.root == OF_P

    def precondition(self, qs: Factors, g: Tensor, ps: Factors = ()) -> Tensor:
        """P g. ps: the factors of P where they are kept; else each is formed, or acts in two products."""
        if ps:
            return along_all(ps, g)
        formed = [self.root.factor(q, axis) if multiplied_out(q, g) else None for axis, q in enumerate(qs)]
        twice = [axis for axis, factor in enumerate(formed) if factor is None]
        for axis in twice:
            g = self.root.act(qs[axis], g, axis)
        return along_all(formed, g, donate=bool(twice))


GEOMETRIES: dict[str, Geometry] = {
    "EQ": Geometry(
        move=triangular,
        root=OF_UPPER_Q,
        measure=upper,
        refer=inverse_adjoint,
        expected=inverse_gram,
        probed=mean_unknown,
        moved="Q <- Q - m triu(D) Q",
    ),
    "QEP": Geometry(move=left, lift=along, expected=lifted_isotropic, balance_first=True, moved="Q <- Q - m D Q"),
    "QEQ": Geometry(move=right, moved="Q <- Q - m Q D"),
    "Q0.5EQ1.5": Geometry(move=left, turn=procrustes2, moved="Q <- Q - m D Q, then turned towards Hermitian"),
    "QUAD": Geometry(move=two_sided_half, move_diagonal=scaled_twice_half, moved="Q <- (1 - m D/2) Q (1 - m D/2)"),
    "PRO4P": Geometry(move=left, turn=polished, root=OF_P, moved="Q <- Q - m D Q, then turned towards Hermitian"),
    "QUAD4P": Geometry(move=two_sided, move_diagonal=scaled_twice, root=OF_P, moved="Q <- (1 - m D) Q (1 - m D)"),
}
