"""The geometries, one record each: how a factor moves, and where its residual is measured.

Fitting P to the pair (v, h), with P h = v in the mean, moves each factor against D = T1 - T2:

    a = measure(Q, h),  T1 = Gram(lift(q, a))           what the preconditioner makes of h
    b = refer(Q, v),    T2 = Gram(lift(q, b))           what it should make, or the expectation of that over v
    q <- move(q, D, m)                                  m = mu / L, L the Lipschitz estimate, a running ||T1 + T2||

Here q is the factor of one axis, (n, n) dense or (n,) diagonal, and Q all of a tensor. Adding a geometry is adding a
record to `GEOMETRIES`. Equations: arXiv 2402.11858; names: psgd_torch's `dQ`. The first sentence of a rule's docstring
is its equation in docs/mathematics.md.
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


# ---- the factors of P: P g multiplies g by one of them along each axis ---------------------
def multiplied_out(q: Factor, g: Tensor) -> bool:
    """Is it less work to form q^H q before it acts on g? It is for a diagonal q, or an axis shorter than the others
    together.
    """
    return q.ndim < 2 or q.shape[0] * q.shape[0] < prod(g.shape)


def inner(q: Factor, axis: int) -> Factor:
    """q^H q. Hermitian, (n, n), or real, (n,)."""
    return real(conj(q) * q) if q.ndim < 2 else gram_of_columns(conj(q))


def inner_along(q: Factor, g: Tensor, axis: int) -> Tensor:
    """q^H q g along an axis of g, in two products."""
    return along(adjoint(q), along(q, g, axis), axis)


def inner_of_upper(q: Factor, axis: int) -> Factor:
    """q^H q of an upper-triangular q. Hermitian, (n, n), or real, (n,)."""
    return inner(q, axis) if q.ndim < 2 else gram_of_triangle(q)


def inner_of_upper_along(q: Factor, g: Tensor, axis: int) -> Tensor:
    """q^H q g along an axis of g, in two products, of an upper-triangular q."""
    return along_adjoint_of_upper(q, along_upper(q, g, axis), axis)


def _sided(q: Factor, axis: int) -> Factor:
    """q on the first axis, q^T on any other: what multiplies a matrix there as Q1 G Q2 does."""
    return q if axis == 0 or q.ndim < 2 else q.mT


def square(q: Factor, axis: int) -> Factor:
    """q q, with q taken as Hermitian: Q1 Q1 G Q2 Q2, each factor acting from its own side [quad_torch]."""
    side = _sided(q, axis)
    return side * side if q.ndim < 2 else matmul(side, side)


def square_along(q: Factor, g: Tensor, axis: int) -> Tensor:
    """q q g along an axis of g, in two products, with q taken as Hermitian, as in `square`."""
    side = _sided(q, axis)
    return along(side, along(side, g, axis), axis)


def stored(q: Factor, axis: int) -> Factor:
    """q. What is stored is the factor of P itself."""
    return q


class Root(NamedTuple):
    """How the factors of P follow from the stored factors q, and how they act.

    Args:
        factor: (q, axis) -> the factor of P of that axis, in the shape of q.
        act: (q, g, axis) -> that factor applied to an axis of g, without forming it.
        equation: P in terms of Q, as text.
    """

    factor: Callable[[Factor, int], Factor]
    act: Callable[[Factor, Tensor, int], Tensor]
    equation: str


OF_Q = Root(inner, inner_along, "P = Q^H Q")
OF_UPPER_Q = Root(inner_of_upper, inner_of_upper_along, "P = Q^H Q")
OF_HERMITIAN_Q = Root(square, square_along, "P = Q Q")
OF_P = Root(stored, along, "P = Q")


# ---- measure, refer: what of h and v the residual is made of -------------------------------
def upper(qs: Factors, g: Tensor) -> Tensor:
    """Q g, of upper-triangular factors. In the shape of g."""
    return along_all(qs, g, along_upper)


def inverse_adjoint(qs: Factors, v: Tensor) -> Tensor:
    """Q^-H v of triangular factors. In the shape of v, by triangular solves."""
    return along_all(qs, v, along_inverse_adjoint)


def itself(qs: Factors, v: Tensor) -> Tensor:
    """v. The pair's probe as it is."""
    return v


# ---- expected: E T2 over a random v with E v v^H = I ---------------------------------------
# A number c stands for c I. `less` is what v was multiplied by so that squares stay finite, at most 1
# (`_xp.shrinkage`). Where it is below 1, the entries of T1 are above 1e19 in float32, and c I, though not multiplied by
# less^2, is still nothing beside them.
def others(qs: Factors, axis: int) -> float:
    """c = size / n of an axis: the product of the other axes' lengths."""
    return float(prod([q.shape[0] for i, q in enumerate(qs) if i != axis]))


def isotropic(qs: Factors, axis: int, less: Scalar | float = 1.0) -> float:
    """E Gram(v) = c I. Returned as the number c = size / n of the axis."""
    return others(qs, axis)


def lifted_isotropic(qs: Factors, axis: int, less: Scalar | float = 1.0) -> Factor:
    """E Gram(q v) = c q q^H. In the shape of q; c = size / n of the axis."""
    return others(qs, axis) * outer(qs[axis])


def inverse_gram(qs: Factors, axis: int, less: Scalar | float = 1.0) -> Factor:
    """E Gram(less Q^-H v) = less^2 M_i prod of tr M_j over the other axes j, M = q^-H q^-1 of triangular factors.

    In the shape of the factor of the axis i. Each inverse is multiplied by less^(1/d), so that none of the products
    overflows. Source: psgd_jax `_update_precond_affine_dropv_math`.
    """
    inverses = [1 / conj(q) if q.ndim < 2 else adjoint(by_inverse(identity(q, q.shape[0]), q)) for q in qs]
    inverses = [x * number(less ** (1 / len(qs)), x) for x in inverses]
    mean = outer(inverses[axis])
    for i, x in enumerate(inverses):
        mean = mean if i == axis else mean * namespace(x).sum(real(x * conj(x)))
    return mean


# ---- probed: must whitening draw v, or does it take E T2? Asked of the shapes alone --------
def mean_known(qs: Factors) -> bool:
    """No: E T2 is cheaper than a draw of v."""
    return False


def mean_unknown(qs: Factors) -> bool:
    """Yes: v is always drawn, since E T2 would take the inverses of the factors."""
    return True


def mean_dear(qs: Factors) -> bool:
    """Where inverting the factors costs more than a draw of v: two dense factors, or one longer than all diagonal ones.

    Source: psgd_jax `affine`, which takes the mean elsewhere.
    """
    dense = [q.shape[0] for q in qs if q.ndim == 2]
    diagonal = [prod(q.shape) for q in qs if q.ndim < 2]
    return len(dense) > 1 or max(dense, default=0) > max(diagonal, default=0)


def unlifted(q: Factor, x: Tensor, axis: int) -> Tensor:
    """x. Nothing is added to what was measured."""
    return x


# ---- move: how a dense factor moves -------------------------------------------------------
# q: (n, n). d: D = T1 - T2, (n, n) Hermitian, perhaps `Thin`. m: mu / L, 0-d. Each returns (n, n).
def left(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """q <- q - m D q. Source: psgd_torch `update_precond_kron_*_q0p5eq1p5`, `*_qep`, `*_pro4p`."""
    return plus(q, -m, from_left(d, q))


def right(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """q <- q - m q D. Source: psgd_torch `update_precond_kron_*_qeq`."""
    return plus(q, -m, from_right(d, q))


def triangular(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """q <- q - m triu(D) q: q stays upper triangular. Source: psgd_torch `update_precond_kron_*_eq`."""
    return plus(q, -m, (triangle_from_left if isinstance(d, Thin) else triangle_by_triangle)(d, q))


def two_sided(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """q <- (1 - m D) q (1 - m D), symmetrised: stays Hermitian and, for m < 1, positive.

    Of a full D only the upper strips of the second product are computed. Source: psgd_torch
    `update_precond_kron_*_quad4p`.
    """
    r = left(q, d, m)
    if isinstance(d, Thin):
        return symmetrised(right(r, d, m))
    return symmetrised(hermitian(q.shape[0], lambda lo, hi: plus(r[lo:hi, lo:], -m, matmul(r[lo:hi, :], d[:, lo:]))))


def two_sided_half(q: Matrix, d: Hermitian, m: Scalar) -> Matrix:
    """`two_sided` by half the step: in P = Q Q it counts twice. Source: psgd_torch `update_precond_kron_*_quad`."""
    return two_sided(q, d, m / 2)


# ---- move_diagonal: how a diagonal factor moves. q, d: (n,) or 0-d; products elementwise ---
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
    """One row of the table of geometries: how factors are measured against a pair (v, h), and how they move.

    Args:
        move: (q, D, m) -> q, the step of a dense factor.
        move_diagonal: (q, D, m) -> q, the step of a diagonal factor.
        turn: (q, norm) -> q, a rotation of a dense factor after its step, or None; norm bounds skew-Hermitian matrices.
        root: how the factors of P follow from the stored ones.
        measure: (factors, h) -> a, in the shape of h; None is P h.
        refer: (factors, v) -> b, in the shape of v.
        lift: (q, x, axis) -> x, what factor q does to a or b before its Gram matrix is taken.
        expected: (factors, axis, less) -> E T2 over v with E v v^H = less^2 I; a number c stands for c I.
        probed: factors -> must whitening draw v, rather than take `expected`?
        balance_first: are the factors balanced before each fit? Else a schedule says when.
        moved: the step of a dense factor, as text.
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
        """P and the step of a dense factor, as text."""
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
        """P g: each factor of P is formed, or acts in two products, whichever is less work (`multiplied_out`).

        Args:
            qs: the stored factors, one an axis.
            g: a tensor.
            ps: the factors of P where they are kept.

        Returns: a tensor of the shape of g.
        """
        if ps:
            return along_all(ps, g)
        formed = [self.root.factor(q, axis) if multiplied_out(q, g) else None for axis, q in enumerate(qs)]
        unformed = [axis for axis, factor in enumerate(formed) if factor is None]
        for axis in unformed:
            g = self.root.act(qs[axis], g, axis)
        return along_all(formed, g, donate=bool(unformed))


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
