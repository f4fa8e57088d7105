"""Moves that leave P = Q^H Q (nearly) as it is: rotations, symmetrising, balancing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import and_
from typing import Any

from psgd._xp import accumulation_dtype, adjoint, cast, diagonal, matmul, namespace, number, plus, real_dtype, tiny
from psgd.arrays import AxisFactor, Flag, Matrix, Scalar
from psgd.spectral import SkewNorm


def symmetrised(q: Matrix) -> Matrix:
    """(q + q^H) / 2."""
    return (q + adjoint(q)) / 2


def balanced(qs: Sequence[AxisFactor], when: bool | Flag = True) -> tuple[AxisFactor, ...]:
    """Scale the d factors of a tensor to equal largest entries: q_i <- q_i g / r_i, r_i = max|q_i|, g^d = prod r_i.

    The product of the factors, and so P, is unchanged. Where the boolean `when` is false nothing is. A factor that
    is zero leaves all as they are. Scales are computed in float32 for half precisions.
    Source: psgd_torch `balance_kron_precond`, quad_torch `_balance_preconditioners`.
    """
    if when is False or len(qs) < 2:
        return tuple(qs)
    xp, dtype = namespace(qs[0]), accumulation_dtype(qs[0])
    sizes = [cast(xp.max(xp.abs(q)), dtype) for q in qs]
    ok = reduce(and_, [r > 0 for r in sizes]) & when
    logs = [xp.log(xp.where(ok, r, xp.ones_like(r))) for r in sizes]
    mean = sum(logs) / len(qs)
    return tuple(q * cast(xp.exp(mean - r), real_dtype(q)) for q, r in zip(qs, logs, strict=True))


def _unit_skew(q: Matrix, norm: SkewNorm, **sweep: Any) -> Matrix:
    """R = (q^H - q) / ||q^H - q||, the direction of steepest ascent of Re tr(exp(aR) q) over rotations."""
    r = adjoint(q) - q
    return r / (cast(norm(r, **sweep), real_dtype(q)) + tiny(q))


def _trace(a: Matrix) -> Scalar:
    """Re tr a, lifted from half precision."""
    return namespace(a).sum(cast(diagonal(a), accumulation_dtype(a)))


def procrustes2(q: Matrix, norm: SkewNorm, largest: float = 1 / 8) -> Matrix:
    r"""Rotate q towards its Hermitian polar factor by a line search to second order.

        q <- q + a (R q + (a/2) R^2 q),   a = min(-t1/t2, 1/8),   t_k = Re tr(R^k q)

    `q`: (n, n). A real q of negative determinant has no rotation to a positive factor; it is turned as far as it goes.
    Source: psgd_torch `procrustes_step2`, quad_torch `_procrustes_step` (the same with its own norm bound).
    """
    xp = namespace(q)
    r = _unit_skew(q, norm)
    rq = matmul(r, q)
    rrq = matmul(r, rq)
    # t1 = ||q^H - q||^2 / (2 ||R||) is negative only by rounding.
    t1, t2 = xp.clip(_trace(rq), min=0.0), _trace(rrq)
    a = xp.where(t2 < 0, xp.clip(t1 / xp.where(t2 < 0, -t2, xp.ones_like(t2)), max=largest), largest)
    a = number(a, q)
    return plus(q, a, plus(rq, a / 2, rrq))


def procrustes3(q: Matrix, norm: SkewNorm, largest: float = 1 / 3, **sweep: Any) -> Matrix:
    r"""The same line search to third order, for a q that may be far from Hermitian.

        q <- q + a (R q + (a/2) (R^2 q + (a/4) R^3 q)),   a = min(larger root of t1 + a t2 + (3/8) a^2 t3 = 0, 1/3)

    Only where t1 > 0 > t3, else q stays. 1/8 instead of Taylor's 1/6 makes the polynomial closer to orthogonal. The
    root is taken in the form without cancellation. Source: psgd_torch `procrustes_step3`.
    """
    xp = namespace(q)
    r = _unit_skew(q, norm, **sweep)
    rq = matmul(r, q)
    rrq = matmul(r, rq)
    rrrq = matmul(r, rrq)
    t1, t2, t3 = _trace(rq), _trace(rrq), _trace(rrrq)
    ok = (t1 > 0) & (t3 < 0)
    one = xp.ones_like(t1)
    root = xp.sqrt(xp.where(ok, t2 * t2 - 1.5 * t1 * t3, one))
    falling = ok & (t2 < 0)
    near = 2 * t1 / xp.where(falling, root - t2, one)
    far = (t2 + root) / xp.where(ok, -0.75 * t3, one)
    a = number(xp.where(ok, xp.clip(xp.where(falling, near, far), max=largest), 0 * one), q)
    return plus(q, a, plus(rq, a / 2, plus(rrq, a / 4, rrrq)))


def polished(q: Matrix, norm: SkewNorm, sweeps: int = 10, tolerance: float = 1e-3) -> Matrix:
    """Rotate by `procrustes3` until max|q^H - q| < tolerance max|q|, at most `sweeps` times.

    The number of products is fixed and sweeps after the last needed one are masked: nothing branches on values.
    """
    xp = namespace(q)
    done = xp.max(xp.abs(q)) < 0  # false, as an array
    for sweep in range(sweeps):
        q = xp.where(done, q, procrustes3(q, norm, sweep=sweep, skip=done))
        done = done | (xp.max(xp.abs(adjoint(q) - q)) < tolerance * xp.max(xp.abs(q)))
    return q
