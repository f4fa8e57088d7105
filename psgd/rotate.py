"""Moves that leave P = Q^H Q (nearly) as it is: rotations, symmetrising, balancing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import and_

from psgd._xp import accumulation_dtype, adjoint, cast, diagonal, matmul, namespace, number, plus, real_dtype, tiny
from psgd.arrays import AxisFactor, Flag, Matrix, Scalar
from psgd.spectral import SkewNorm


def symmetrised(q: Matrix) -> Matrix:
    """(q + q^H) / 2, the nearest Hermitian matrix to an (n, n) q."""
    return (q + adjoint(q)) / 2


def balanced(qs: Sequence[AxisFactor], when: bool | Flag = True) -> tuple[AxisFactor, ...]:
    """Scale the d factors of a tensor to equal largest entries; their Kronecker product, and so P, stays as it is.

        q_i <- q_i (r_1 ... r_d)^(1/d) / r_i,   r_i = max|q_i|

    Args:
        qs: the factors. If one is zero, or there is only one, nothing changes.
        when: where false, nothing changes: Python's at once, an array's by a scale of 1.

    Returns: the factors. Scales are computed in logarithms, in float32 for half precisions.

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


def _unit_skew(q: Matrix, norm: SkewNorm, sweep: int = 0, skip: Flag | None = None) -> Matrix:
    """R = (q^H - q) / ||q^H - q||, (n, n), the direction of steepest ascent of Re tr(exp(aR) q) over rotations."""
    r = adjoint(q) - q
    return r / (cast(norm(r, sweep=sweep, skip=skip), real_dtype(q)) + tiny(q))


def _trace(a: Matrix) -> Scalar:
    """Re tr a, 0-d, summed in float32 for half precisions."""
    return namespace(a).sum(cast(diagonal(a), accumulation_dtype(a)))


def procrustes2(q: Matrix, norm: SkewNorm, largest: float = 1 / 8) -> Matrix:
    r"""Rotate q towards its Hermitian polar factor by a line search to second order.

        q <- q + a (R q + (a/2) R^2 q),   a = min(-t1/t2, 1/8) if t2 < 0 else 1/8,   t_k = Re tr(R^k q)

    with R = (q^H - q) / ||q^H - q||. A real q of negative determinant has no rotation to a positive factor, and is
    turned as far as it goes.

    Args:
        q: (n, n).
        norm: bound on the norm of a skew-Hermitian matrix.
        largest: largest angle a; 1/8 is published.

    Returns: (n, n).

    Source: psgd_torch `procrustes_step2`, quad_torch `_procrustes_step` (the same with its own norm bound).
    """
    xp = namespace(q)
    r = _unit_skew(q, norm)
    rq = matmul(r, q)
    rrq = matmul(r, rq)
    # t1 = ||q^H - q||_F^2 / (2 ||q^H - q||) is negative only by rounding.
    t1, t2 = xp.clip(_trace(rq), min=0.0), _trace(rrq)
    a = xp.where(t2 < 0, xp.clip(t1 / xp.where(t2 < 0, -t2, xp.ones_like(t2)), max=largest), largest)
    a = number(a, q)
    return plus(q, a, plus(rq, a / 2, rrq))


def procrustes3(q: Matrix, norm: SkewNorm, largest: float = 1 / 3, sweep: int = 0, skip: Flag | None = None) -> Matrix:
    r"""The line search of `procrustes2` to third order, for a q that may be far from Hermitian.

        q <- q + a (R q + (a/2) (R^2 q + (a/4) R^3 q)),   a = min(larger root of t1 + a t2 + (3/8) a^2 t3 = 0, 1/3)

    where t1 > 0 > t3; elsewhere q stays. The coefficient 1/8 of R^3, not Taylor's 1/6, makes I + aR + ... closer to
    unitary: its error is (aR)^6 / 64.

    Args:
        q: (n, n).
        norm: bound on the norm of a skew-Hermitian matrix, with the number of the sweep and `skip`.
        largest: largest angle a; 1/3 is published.
        sweep: how many rotations came before, for the role of the draw.
        skip: 0-d boolean; where true the result is not used.

    Returns: (n, n).

    Source: psgd_torch `procrustes_step3`.
    """
    xp = namespace(q)
    r = _unit_skew(q, norm, sweep, skip)
    rq = matmul(r, q)
    rrq = matmul(r, rq)
    rrrq = matmul(r, rrq)
    t1, t2, t3 = _trace(rq), _trace(rrq), _trace(rrrq)
    # The slope of Re tr along a is t1 + a t2 + (3/8) a^2 t3: hence 4 (3/8) = 1.5 in the discriminant, 2 (3/8) = 0.75
    # below it. Where t2 < 0 the usual form of the root cancels for a nearly Hermitian q, and the other is taken.
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

    All sweeps are computed, and those after the last needed one are masked: nothing branches on the value of an array.

    Args:
        q: (n, n).
        norm: as of `procrustes3`.
        sweeps: largest number of rotations; 10 is published.
        tolerance: when q is Hermitian enough; 0.001 is published.

    Returns: (n, n).

    Source: psgd_torch `update_precond_kron_whiten_pro4p`.
    """
    xp = namespace(q)
    done = xp.max(xp.abs(q)) < 0  # false, but as a 0-d array
    for sweep in range(sweeps):
        q = xp.where(done, q, procrustes3(q, norm, sweep=sweep, skip=done))
        done = done | (xp.max(xp.abs(adjoint(q) - q)) < tolerance * xp.max(xp.abs(q)))
    return q
