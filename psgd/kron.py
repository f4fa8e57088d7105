"""Kronecker-factored preconditioners of one tensor: which axes are dense, how factors start, and the one `fit`.

A tensor G of shape (n_1, ..., n_d) has d factors; P is the Kronecker product of Q_i^H Q_i. The dense preconditioner of
a vector is the case of one dense factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any, NamedTuple, final

from psgd import thin
from psgd._xp import accumulation_dtype, cast, eps, identity, make, namespace, number, real, shrinkage, times, tiny
from psgd.arrays import AxisFactor, Factor, Factors, Flag, Matrix, Scalar, Tensor
from psgd.axes import gram
from psgd.criterion import Pair
from psgd.geometry import Geometry
from psgd.noise import Draws
from psgd.preconditioner import Preconditioner
from psgd.rotate import balanced
from psgd.shapes import Shape
from psgd.spectral import NormBound, general_bound
from psgd.thin import Thin, diagonal, formed


@dataclass(frozen=True)
class DenseRule:
    """Which axes are dense: those of length n with 1 < n <= max_size and n^2 <= max_skew * size of the tensor.

    Args:
        max_size: longest dense axis.
        max_skew: largest ratio of n to the product of the other axes' lengths.
        min_ndim: fewest axes of a tensor with dense factors.
        spared: axes that stay diagonal all the same: None, "one_diag" (the longest, the last of equals) or "all_diag"
            [psgd_jax `memory_save_mode`].

    Source: psgd_torch `init_kron`; quad_torch; psgd_jax `_init_Q_exprs`.
    """

    max_size: float = inf
    max_skew: float = 1.0
    min_ndim: int = 0
    spared: str | None = None

    def __call__(self, shape: Shape) -> tuple[bool, ...]:
        """One boolean an axis of a shape: is it dense? (False,) of a scalar, () of a tensor without elements."""
        size = prod(shape)
        if not shape or not size:
            return (False,) * (1 if size else 0)
        if len(shape) < self.min_ndim or self.spared == "all_diag":
            return (False,) * len(shape)
        longest = max(range(len(shape)), key=lambda axis: (shape[axis], axis)) if self.spared == "one_diag" else None
        limit = inf if self.max_skew == inf else self.max_skew * size
        return tuple(i != longest and 1 < n <= self.max_size and n * n <= limit for i, n in enumerate(shape))


def init(dense: Sequence[bool], like: Tensor, *, keep_p: bool = False) -> Factors:
    """Identity factors of a tensor, with Lipschitz estimates of 0.

    Args:
        dense: one boolean a factor, as `DenseRule` gives them.
        like: a tensor of the shape, dtype and device.
        keep_p: are the factors of P kept beside those of Q?

    Returns: Q, a factor an axis, (n, n) dense or (n,) diagonal; L, a 0-d estimate a factor, at least float32; P, as Q
        or ().

    Source: psgd_torch `init_kron`.
    """
    shapes: list[tuple[int, ...]] = [(n,) for n in like.shape] or [() for _ in dense]

    def ones() -> tuple[AxisFactor, ...]:
        return tuple(
            identity(like, *shape) if full else make(like, "ones", shape)
            for shape, full in zip(shapes, dense, strict=bool(dense))
        )

    qs = ones()
    bounds = tuple(make(like, "zeros", (), dtype=accumulation_dtype(like)) for _ in qs)
    return Factors(qs, bounds, ones() if keep_p else ())  # arrays of their own: state is written in place


def rescaled(geometry: Geometry, factors: Factors, scale: Scalar | float, *, split: bool = True) -> Factors:
    """Q times `scale` overall, and so P times its square: each of d factors is multiplied by scale^(1/d).

    Args:
        geometry: says whether the stored factors are those of P, which take scale^2.
        factors: of one tensor.
        scale: Python number or 0-d array.
        split: false: every factor is multiplied by all of the scale, as in quad_torch.

    Source: psgd_torch `init_kron`.
    """
    power = (2 if geometry.fits_p else 1) / (len(factors.Q) if split and factors.Q else 1)
    q, p = (tuple(x * number(scale**n, x) for x in xs) for xs, n in ((factors.Q, power), (factors.P, 2 * power)))
    return factors._replace(Q=q, P=p)


class AxisNorm(NamedTuple):
    """The norm bound with the draws of one axis, whose roles name the axis."""

    bound: NormBound
    draws: Draws
    axis: int

    def positive(self, t: Factor | Thin) -> Scalar:
        """The bound of a positive semidefinite term, dense or diagonal: 0-d."""
        return self.bound(t, self.draws, f"bound/{self.axis}", positive=True)

    def skew(self, r: Matrix, sweep: int = 0, skip: Flag | None = None) -> Scalar:
        """The bound of r = q^H - q, the generator of rotation number `sweep`: 0-d. Unused where `skip` is true."""
        return self.bound(r, self.draws, f"turn/{self.axis}/{sweep}", positive=False, skip=skip)


# ---- what a step is normalised by: (norm, T1, T2) -> ell, 0-d, and D = T1 - T2 --------------
def by_terms(norm: AxisNorm, t1: Factor | Thin, t2: Factor | Thin | float) -> tuple[Scalar, Factor | Thin]:
    """ell = ||T1 + T2|| and D = T1 - T2: since ell >= ||D||, a step is never too long [all but psgd_jax '1st'].

    Args:
        norm: the norm bound of the axis.
        t1: (n, n), (n,) or 0-d, or `Thin`.
        t2: the same; or a number c for c I, of which ell is ||T1|| + c.
    """
    if isinstance(t2, float):
        # As published: the bound depends on its draws, and that of T1 + c I would differ from that of T1, plus c.
        return norm.positive(t1) + t2, _less(t1, t2)
    t1 = t1 if isinstance(t2, Thin) else formed(t1)
    return norm.positive(t1 + t2), t1 - t2


def _less(t: Factor | Thin, c: float) -> Factor | Thin:
    """T - c I of a dense, diagonal or thin T."""
    if isinstance(t, Thin):
        return t.less(c)
    return t - (c if t.ndim < 2 else c * identity(t, t.shape[0]))


def by_triangle(norm: AxisNorm, t1: Factor | Thin, t2: Factor | Thin) -> tuple[Scalar, Factor]:
    """ell = ||triu(D)|| and D = T1 - T2: every step is equally long, however small D is [psgd_jax '1st'].

    Where ell is no more than rounding both are 0: of a 1 x 1 factor with the automatic scale D is exactly 0 but for
    rounding, which would become a full step.

    Args:
        norm: not used; the bound is `general_bound`, or of a diagonal its largest modulus.
        t1: (n, n), (n,) or 0-d, or `Thin`.
        t2: the same.
    """
    t1, t2 = formed(t1), formed(t2)
    xp, d = namespace(t1), t1 - t2
    if t1.ndim < 2:
        ell, terms = xp.max(xp.abs(d)), xp.max(real(t1 + t2))
    else:
        ell, terms = general_bound(xp.triu(d)), xp.max(diagonal(t1 + t2))
    # T1 and T2 are squares of rounded products, each off by up to 2 eps of itself; 4 is twice that.
    above_rounding = ell > 4 * eps(d) * terms
    ell, d = (xp.where(above_rounding, x, xp.zeros_like(x)) for x in (ell, d))
    return cast(ell, accumulation_dtype(t1)), d


Normaliser = Callable[[AxisNorm, Any, Any], tuple[Scalar, Any]]


def _terms(
    geometry: Geometry, qs: Sequence[AxisFactor], a: Tensor, b: Tensor | None, less: Scalar, axis: int
) -> tuple[Any, Any]:
    """T1 and T2 of one factor, (n, n), (n,) or 0-d, or `Thin`; T2 is a number c where it is c I.

    less: what b was multiplied by, or would have been, see `shrinkage`.
    """
    q = qs[axis]

    def term(x: Tensor) -> Factor | Thin:
        lifted = geometry.lift(q, x, axis)
        low_rank = q.ndim == 2 and thin.is_thin(tuple(x.shape), axis)
        return thin.gram(lifted, axis) if low_rank else gram(lifted, axis, diagonal=q.ndim < 2)

    return term(a), geometry.expected(qs, axis, less) if b is None else term(b)


def _moved(geometry: Geometry, q: Factor, d: Factor | Thin, m: Scalar, norm: AxisNorm) -> Factor:
    """One factor after its step along D and, if the geometry has one, its rotation."""
    if q.ndim < 2:
        return geometry.move_diagonal(q, d, m)
    q = geometry.move(q, d, m)
    return q if geometry.turn is None else geometry.turn(q, norm.skew)


def fit(
    geometry: Geometry,
    bound: NormBound,
    factors: Factors,
    pair: Pair,
    rate: Scalar | float,
    beta_lipschitz: Scalar | float,
    draws: Draws,
    normaliser: Normaliser = by_terms,
) -> Factors:
    r"""Move every factor once towards fitting the pair: the one update of all geometries and both criteria.

        D = T1 - T2,   ell = ||T1 + T2|| (a lower bound),   L <- max(beta L + (1 - beta) ell, ell)
        q <- move(q, D, rate / L)

    Args:
        geometry: where the residual is measured, and how factors move.
        bound: the norm bound.
        factors: of a tensor of the shape of `pair.h`; all are measured before any moves.
        pair: (v, h) as the preconditioner sees it.
        rate: mu, the preconditioner's learning rate, in (0, 1), 0-d or a number: no step is longer, since
            L >= ell >= ||D|| up to the looseness of the bound.
        beta_lipschitz: beta_L in [0, 1): how slowly the Lipschitz estimate L forgets large residuals; 0: L is ell.
        draws: of the roles "bound/i" and "turn/i/k" for axis i and sweep k.
        normaliser: what ell is.

    Returns: the factors after the step; P is as it was (see `Kronecker.with_p`).

    Source: psgd_torch `update_precond_kron_whiten_*`, `update_precond_kron_newton_*`; psgd_jax `_update_precond`,
    `_update_precond_affine_math_`; arXiv 2402.11858.
    """
    qs = balanced(factors.Q) if geometry.balance_first else factors.Q
    # Balancing leaves the product of the factors as it is, so that a P that is kept may be used unbalanced.
    a = geometry.precondition(qs, pair.h, factors.P) if geometry.measure is None else geometry.measure(qs, pair.h)
    b = None if pair.v is None else geometry.refer(qs, pair.v)
    for_a, for_b = shrinkage(a, pair.unit, b)
    a, b = times(a, for_a), b if b is None else b * for_b if b is pair.v else times(b, for_b)
    new_qs, new_ls = [], []
    for axis, (q, lipschitz) in enumerate(zip(qs, factors.L, strict=True)):
        (t1, t2), norm = _terms(geometry, qs, a, b, for_b, axis), AxisNorm(bound, draws, axis)
        ell, d = normaliser(norm, t1, t2)
        beta = number(beta_lipschitz, ell)
        lipschitz = namespace(q).maximum(beta * lipschitz + (1 - beta) * ell, ell)
        m = number(rate, ell) / (lipschitz + tiny(lipschitz))
        new_qs.append(_moved(geometry, q, d, number(m, q), norm))
        new_ls.append(lipschitz)
    return factors._replace(Q=tuple(new_qs), L=tuple(new_ls))


@final
@dataclass(frozen=True)
class Kronecker(Preconditioner):
    """The Kronecker-factored preconditioner as the pipeline sees it: a geometry, and the rules that go with it.

    Keeps Q, a factor an axis, (n, n) or (n,); L, the 0-d Lipschitz estimate of each; and P, as Q, if `keep_p`.

    Args:
        geometry: how factors are measured and moved.
        dense: which axes get a dense factor.
        bound: the norm bound.
        normaliser: what a step is divided by.
        split: is the first scale shared between the factors of a tensor (see `rescaled`)?
        keep_p: is P kept between steps beside Q?
    """

    geometry: Geometry
    dense: DenseRule = DenseRule()
    bound: NormBound = NormBound()
    normaliser: Normaliser = by_terms
    split: bool = True
    keep_p: bool = False

    @property
    def equation(self) -> str:
        """P and how its factors move, as text."""
        return self.geometry.equation

    @property
    def keeps_p(self) -> bool:
        """Is P kept beside the factors that are fitted? Not where they are those of P."""
        return self.keep_p and not self.geometry.fits_p

    def with_p(self, factors: Factors) -> Factors:
        """The factors with P formed of Q, where P is kept, else without P."""
        root = self.geometry.root
        return factors._replace(P=tuple(root.factor(q, i) for i, q in enumerate(factors.Q)) if self.keeps_p else ())

    def init(self, like: Tensor, draws: Draws | None = None) -> Factors:
        """Identity factors of a tensor like `like`, see `psgd.kron.init`."""
        return init(self.dense(tuple(like.shape)), like, keep_p=self.keeps_p)

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the factors Q of a tensor: (n, n) or (n,) an axis, () of a scalar."""
        dense = self.dense(shape)
        return tuple((n, n) if full else (n,) for n, full in zip(shape, dense, strict=bool(dense))) if shape else ((),)

    def rescaled(self, factors: Factors, scale: Scalar | float) -> Factors:
        """Q times `scale` overall, see `psgd.kron.rescaled`."""
        return rescaled(self.geometry, factors, scale, split=self.split)

    def balanced(self, factors: Factors, when: bool | Flag) -> Factors:
        """Factors of equal largest entries where `when` is true, see `psgd.rotate.balanced`."""
        return factors._replace(Q=balanced(factors.Q, when))

    def probed(self, factors: Factors) -> bool:
        """Does whitening need a probe v, as the geometry says?"""
        return self.geometry.probed(factors.Q)

    def fit(
        self,
        factors: Factors,
        pair: Pair,
        rate: Scalar | float,
        beta_lipschitz: Scalar | float,
        draws: Draws,
        side: bool | Flag = False,
    ) -> Factors:
        """One step towards P h = v, see `psgd.kron.fit`. side: not used, since all factors move at once."""
        return self.with_p(fit(self.geometry, self.bound, factors, pair, rate, beta_lipschitz, draws, self.normaliser))

    def precondition(self, factors: Factors, g: Tensor) -> Tensor:
        """P g, in the shape of g, see `Geometry.precondition`."""
        return self.geometry.precondition(factors.Q, g, factors.P)
