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
    """Which axes are dense: n in (1, max_size], n^2 <= max_skew * size, in tensors of at least min_ndim axes.

    spared: axes that stay diagonal whatever their length: None, "one_diag" (the longest, the last of equals) or
    "all_diag" [psgd_jax `memory_save_mode`].
    """

    max_size: float = inf
    max_skew: float = 1.0
    min_ndim: int = 0
    spared: str | None = None

    def __call__(self, shape: Shape) -> tuple[bool, ...]:
        """One boolean an axis; a scalar has one diagonal factor, a tensor without elements has no factor."""
        size = prod(shape)
        if not shape or not size:
            return (False,) * (1 if size else 0)
        if len(shape) < self.min_ndim or self.spared == "all_diag":
            return (False,) * len(shape)
        longest = max(range(len(shape)), key=lambda axis: (shape[axis], axis)) if self.spared == "one_diag" else None
        limit = inf if self.max_skew == inf else self.max_skew * size
        return tuple(i != longest and 1 < n <= self.max_size and n * n <= limit for i, n in enumerate(shape))


def init(dense: Sequence[bool], like: Tensor, *, keep_p: bool = False) -> Factors:
    """Identity factors, L = 0, of a tensor as `like`. `dense`: one boolean a factor, as `DenseRule` gives.

    Q: one factor an axis, (n, n) dense or (n,) diagonal. L: one bound a factor, at least float32. P: as Q, if kept.
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
    """Q times `scale` overall, P times its square; Python number or 0-d array.

    Each of d factors takes scale^(1/d), or, with `split` false as in quad_torch, all of it.
    Source: psgd_torch `init_kron`.
    """
    power = (2 if geometry.fits_p else 1) / (len(factors.Q) if split and factors.Q else 1)
    q, p = (tuple(x * number(scale**n, x) for x in xs) for xs, n in ((factors.Q, power), (factors.P, 2 * power)))
    return factors._replace(Q=q, P=p)


class AxisNorm(NamedTuple):
    """The norm bound with the draws of one axis."""

    bound: NormBound
    draws: Draws
    axis: int

    def positive(self, t: Factor | Thin) -> Scalar:
        """Of a positive semidefinite term, dense or diagonal."""
        return self.bound(t, self.draws, f"bound/{self.axis}", positive=True)

    def skew(self, r: Matrix, sweep: int = 0, skip: Flag | None = None) -> Scalar:
        """Of the skew-Hermitian generator of a rotation."""
        return self.bound(r, self.draws, f"turn/{self.axis}/{sweep}", positive=False, skip=skip)


# What a step is normalised by: (norm, T1, T2) -> ell and the residual D. T2 may be a number of identities.
def by_terms(norm: AxisNorm, t1: Factor | Thin, t2: Factor | Thin | float) -> tuple[Scalar, Factor | Thin]:
    """ell = ||T1 + T2||: a step is never too long, and short where both terms are large [psgd_jax '2nd']."""
    if isinstance(t2, float):
        # The bound is a sketch: of T1 + c I it is not that of T1, plus c.
        return norm.positive(t1) + t2, _less(t1, t2)
    t1 = t1 if isinstance(t2, Thin) else formed(t1)
    return norm.positive(t1 + t2), t1 - t2


def _less(t: Factor | Thin, c: float) -> Factor | Thin:
    """T - c I."""
    if isinstance(t, Thin):
        return t.less(c)
    return t - (c if t.ndim < 2 else c * identity(t, t.shape[0]))


def by_triangle(norm: AxisNorm, t1: Factor | Thin, t2: Factor | Thin) -> tuple[Scalar, Factor]:
    """ell = ||triu(T1 - T2)||: every step is as long as it may be, unless the residual is rounding [psgd_jax '1st']."""
    t1, t2 = formed(t1), formed(t2)
    xp, d = namespace(t1), t1 - t2
    if t1.ndim < 2:
        ell, terms = xp.max(xp.abs(d)), xp.max(real(t1 + t2))
    else:
        ell, terms = general_bound(xp.triu(d)), xp.max(diagonal(t1 + t2))
    seen = ell > 4 * eps(d) * terms
    ell, d = (xp.where(seen, x, xp.zeros_like(x)) for x in (ell, d))
    return cast(ell, accumulation_dtype(t1)), d


Normaliser = Callable[[AxisNorm, Any, Any], tuple[Scalar, Any]]


def _terms(
    geometry: Geometry, qs: Sequence[AxisFactor], a: Tensor, b: Tensor | None, less: Scalar, axis: int
) -> tuple[Any, Any]:
    """T1 and T2 of one factor; T2 is a number c where it is c times the identity. less: what b was multiplied by."""
    q = qs[axis]

    def term(x: Tensor) -> Factor | Thin:
        lifted = geometry.lift(q, x, axis)
        low = q.ndim == 2 and thin.is_thin(tuple(x.shape), axis)
        return thin.gram(lifted, axis) if low else gram(lifted, axis, diagonal=q.ndim < 2)

    return term(a), geometry.expected(qs, axis, less) if b is None else term(b)


def _moved(geometry: Geometry, q: Factor, d: Factor | Thin, m: Scalar, norm: AxisNorm) -> Factor:
    """One factor after its step along D."""
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
        factors: of a tensor of the shape of `pair.h`. `a` and `b` are measured once, with the old factors.
        rate: preconditioner learning rate mu, in (0, 1): the step is normalised, L >= ell >= ||D|| up to the bound.
        beta_lipschitz: beta_L in [0, 1): how slowly L forgets large residuals. 0 is the instantaneous normaliser.
        draws: roles "bound/i" and "turn/i/k" for axis i and sweep k.
        normaliser: what ell bounds.

    Source: psgd_torch `update_precond_kron_whiten_*`, `update_precond_kron_newton_*`; psgd_jax `_update_precond`,
    `_update_precond_affine_math_`; arXiv 2402.11858.
    """
    qs = balanced(factors.Q) if geometry.balance_first else factors.Q
    # Balanced factors have the same product, so that P need not be balanced with them.
    a = geometry.precondition(qs, pair.h, factors.P) if geometry.measure is None else geometry.measure(qs, pair.h)
    b = None if pair.v is None else geometry.refer(qs, pair.v)
    more, less = shrinkage(a, pair.unit, b)
    a, b = times(a, more), b if b is None else b * less if b is pair.v else times(b, less)
    moved, bounds = [], []
    for axis, (q, last) in enumerate(zip(qs, factors.L, strict=True)):
        (t1, t2), norm = _terms(geometry, qs, a, b, less, axis), AxisNorm(bound, draws, axis)
        ell, d = normaliser(norm, t1, t2)
        beta = number(beta_lipschitz, ell)
        last = namespace(q).maximum(beta * last + (1 - beta) * ell, ell)
        m = number(rate, ell) / (last + tiny(last))
        moved.append(_moved(geometry, q, d, number(m, q), norm))
        bounds.append(last)
    return factors._replace(Q=tuple(moved), L=tuple(bounds))


@final
@dataclass(frozen=True)
class Kronecker(Preconditioner):
    """The Kronecker-factored preconditioner as the pipeline sees it: a geometry, and the rules that go with it.

    dense: which axes get a dense factor. bound: the norm bound. normaliser: what a step is divided by.
    split: the first scale is shared between the factors of a tensor (see `rescaled`).
    keep_p: is P kept between steps, and not only its factors Q?
    """

    geometry: Geometry
    dense: DenseRule = DenseRule()
    bound: NormBound = NormBound()
    normaliser: Normaliser = by_terms
    split: bool = True
    keep_p: bool = False

    @property
    def equation(self) -> str:
        """What P is, to be read."""
        return self.geometry.equation

    @property
    def keeps_p(self) -> bool:
        """Is P kept beside the factors that are fitted?"""
        return self.keep_p and not self.geometry.fits_p

    def with_p(self, factors: Factors) -> Factors:
        """Factors with those of P that belong to Q, where they are kept."""
        root = self.geometry.root
        return factors._replace(P=tuple(root.factor(q, i) for i, q in enumerate(factors.Q)) if self.keeps_p else ())

    def init(self, like: Tensor, draws: Draws | None = None) -> Factors:
        """Identity factors of a tensor as `like`."""
        return init(self.dense(tuple(like.shape)), like, keep_p=self.keeps_p)

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the factors Q of a tensor."""
        dense = self.dense(shape)
        return tuple((n, n) if full else (n,) for n, full in zip(shape, dense, strict=bool(dense))) if shape else ((),)

    def rescaled(self, factors: Factors, scale: Scalar | float) -> Factors:
        """Q times `scale` overall."""
        return rescaled(self.geometry, factors, scale, split=self.split)

    def balanced(self, factors: Factors, when: bool | Flag) -> Factors:
        """Factors of equal largest entries, where `when` is true."""
        return factors._replace(Q=balanced(factors.Q, when))

    def probed(self, factors: Factors) -> bool:
        """Does whitening need a probe v?"""
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
        """One step towards fitting the pair."""
        return self.with_p(fit(self.geometry, self.bound, factors, pair, rate, beta_lipschitz, draws, self.normaliser))

    def precondition(self, factors: Factors, g: Tensor) -> Tensor:
        """P g."""
        return self.geometry.precondition(factors.Q, g, factors.P)
