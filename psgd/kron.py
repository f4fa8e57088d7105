"""Kronecker-factored preconditioners of one tensor: which axes are dense, how factors start, and the one `fit`.

A tensor G of shape (n_1, ..., n_d) has d factors; P is the Kronecker product of Q_i^H Q_i. The dense preconditioner of
a vector is the case of one dense factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import NamedTuple

from psgd._xp import diagonal, identity, lifted_dtype, make, namespace, number, tiny
from psgd.arrays import Factor, Matrix, Scalar, Tensor
from psgd.axes import gram
from psgd.criterion import Pair
from psgd.geometry import Geometry
from psgd.noise import Draws
from psgd.rotate import balanced
from psgd.shapes import Shape
from psgd.spectral import NormBound


class Factors(NamedTuple):
    """Q: one factor an axis, (n, n) dense or (n,) diagonal. L: one 0-d bound a factor, at least float32."""

    Q: tuple[Factor, ...]
    L: tuple[Scalar, ...]


@dataclass(frozen=True)
class DenseRule:
    """Which axes are dense: n in (1, max_size], n^2 <= max_skew * size, in tensors of at least min_ndim axes."""

    max_size: float = inf
    max_skew: float = 1.0
    min_ndim: int = 0

    def __call__(self, shape: Shape) -> tuple[bool, ...]:
        """One boolean an axis; a scalar has one diagonal factor, a tensor without elements has no factor."""
        size = prod(shape)
        if not shape or not size:
            return (False,) * (1 if size else 0)
        wide = len(shape) >= self.min_ndim
        limit = inf if self.max_skew == inf else self.max_skew * size
        return tuple(wide and 1 < n <= self.max_size and n * n <= limit for n in shape)


def init(dense: Sequence[bool], like: Tensor) -> Factors:
    """Identity factors, L = 0, of a tensor as `like`. `dense`: one boolean a factor, as `DenseRule` gives."""
    shapes: list[tuple[int, ...]] = [(n,) for n in like.shape] or [() for _ in dense]
    qs = tuple(
        identity(like, *shape) if full else make(like, "ones", shape)
        for shape, full in zip(shapes, dense, strict=bool(dense))
    )
    return Factors(qs, tuple(make(like, "zeros", (), dtype=lifted_dtype(like)) for _ in qs))


def rescaled(geometry: Geometry, factors: Factors, scale: Scalar | float, *, split: bool = True) -> Factors:
    """Q times `scale` overall, P times its square; Python number or 0-d array.

    Each of d factors takes scale^(1/d), or, with `split` false as in quad_torch, all of it.
    Source: psgd_torch `init_kron`.
    """
    power = (2 if geometry.fits_p else 1) / (len(factors.Q) if split and factors.Q else 1)
    return factors._replace(Q=tuple(q * number(scale**power, q) for q in factors.Q))


class AxisNorm(NamedTuple):
    """The norm bound with the draws of one axis."""

    bound: NormBound
    draws: Draws
    axis: int

    def positive(self, t: Factor) -> Scalar:
        """Of a positive semidefinite term, dense or diagonal."""
        return self.bound(t, self.draws, f"bound/{self.axis}", positive=True)

    def skew(self, r: Matrix, sweep: int = 0, skip: Scalar | None = None) -> Scalar:
        """Of the skew-Hermitian generator of a rotation."""
        return self.bound(r, self.draws, f"turn/{self.axis}/{sweep}", positive=False, skip=skip)


def _terms(geometry: Geometry, q: Factor, a: Tensor, b: Tensor | None, axis: int) -> tuple[Factor, Factor | float]:
    """T1 and T2 of one factor; T2 is a number c where it is c times the identity."""
    diagonal = q.ndim < 2
    t1 = gram(geometry.lift(q, a, axis), axis, diagonal=diagonal)
    if geometry.expected is not None and b is None:
        return t1, prod(a.shape) / prod(q.shape[:1]) * geometry.expected(q)
    return t1, gram(geometry.lift(q, b, axis), axis, diagonal=diagonal)


def _moved(geometry: Geometry, q: Factor, d: Factor, m: Scalar, norm: AxisNorm) -> Factor:
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
    memory: Scalar | float,
    draws: Draws,
) -> Factors:
    r"""Move every factor once towards fitting the pair: the one update of all geometries and both criteria.

        D = T1 - T2,   ell = ||T1 + T2|| (a lower bound),   L <- max(memory L + (1 - memory) ell, ell)
        q <- move(q, D, rate / L)

    Args:
        factors: of a tensor of the shape of `pair.h`. `a` and `b` are measured once, with the old factors.
        rate: preconditioner learning rate mu, in (0, 1): the step is normalised, L >= ell >= ||D|| up to the bound.
        memory: beta_L in [0, 1): how slowly L forgets large residuals. 0 is the instantaneous normaliser.
        draws: roles "bound/i" and "turn/i/k" for axis i and sweep k.

    Source: psgd_torch `update_precond_kron_whiten_*`, `update_precond_kron_newton_*`; arXiv 2402.11858.
    """
    qs = balanced(factors.Q) if geometry.balance_first else factors.Q
    a = (geometry.measure or geometry.precondition)(qs, pair.h)
    b = None if pair.v is None else geometry.refer(qs, pair.v)
    moved, bounds = [], []
    for axis, (q, last) in enumerate(zip(qs, factors.L, strict=True)):
        (t1, t2), norm = _terms(geometry, q, a, b, axis), AxisNorm(bound, draws, axis)
        if isinstance(t2, float):
            # The bound is a sketch: of T1 + c I it is not that of T1, plus c.
            ell, d = norm.positive(t1) + t2, t1 - (t2 if q.ndim < 2 else t2 * identity(q, q.shape[0]))
        else:
            ell, d = norm.positive(t1 + t2), t1 - t2
        beta = number(memory, ell)
        last = namespace(q).maximum(beta * last + (1 - beta) * ell, ell)
        # Where there was nothing to see, all of D would be T2, and Q would grow without end.
        seen = namespace(q).sum(t1 if q.ndim < 2 else diagonal(t1)) > 0
        m = number(rate, ell) / (last + tiny(last)) * namespace(q).astype(seen, last.dtype)
        moved.append(_moved(geometry, q, d, number(m, q), norm))
        bounds.append(last)
    return Factors(tuple(moved), tuple(bounds))
