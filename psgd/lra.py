"""The low-rank preconditioner of all parameters as one vector of length n ("LRA", "UVd").

    Q = (I + U V^T) diag(d),   U, V: (n, r),  d: (n,),   P = Q^T Q

Real. Sources: psgd_torch `update_precond_lra*`, `precond_grad_lra`; psgd_jax `low_rank_approximation`; the paper is
arXiv 2211.04422.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, NamedTuple, final

from psgd._xp import accumulation_dtype, cast, identity, make, matmul, namespace, number, shrinkage, solve, tiny
from psgd.arrays import Array, Factors, Flag, Scalar, Tensor
from psgd.criterion import Pair
from psgd.noise import Draws
from psgd.preconditioner import Preconditioner
from psgd.shapes import Shape


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of a matrix (n, r) and a vector (n,), or of two vectors."""
    xp = namespace(b)
    return xp.sum(a * b) if a.ndim < 2 else xp.reshape(matmul(a.mT, b[:, None]), (-1,))


def matvec(a: Tensor, x: Tensor) -> Tensor:
    """a x of a matrix (n, r) and a vector (r,)."""
    return namespace(x).reshape(matmul(a, x[:, None]), (-1,))


def norm(x: Tensor) -> Scalar:
    """||x||."""
    return namespace(x).linalg.vector_norm(x)


def select(flag: bool | Flag, a: Array, b: Array) -> Array:
    """a where a decision is true, else b: settled at once where it is Python's."""
    return (a if flag else b) if isinstance(flag, bool) else namespace(a).where(flag, a, b)


# ---- how U and V are kept alike: U V^T is unchanged, or nearly ---------------------------
def aligned(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""U and V of equal size, their Gram matrices a little more alike [psgd_torch].

        rho^4 = tr(U^T U) / tr(V^T V),   E = 0.1 (a / rho^2 - b rho^2) / tr(a / rho^2 + b rho^2),  a = U^T U, b = V^T V
        U <- U (I - E + E^2/2) / rho,   V <- V (I + E + E^2/2) rho

    The product of the two polynomials is I + E^4/4. Where U or V is zero both stay.
    """
    xp = namespace(u)
    a, b = matmul(u.mT, u), matmul(v.mT, v)
    ta, tb = xp.sum(u * u), xp.sum(v * v)
    there = (ta > 0) & (tb > 0)
    one = xp.ones_like(ta)
    rho2 = xp.where(there, xp.sqrt(xp.where(there, ta, one) / xp.where(there, tb, one)), one)
    e = 0.1 * (a / rho2 - b * rho2) / xp.where(there, ta / rho2 + tb * rho2, one)
    e2 = matmul(e, e) / 2
    rho = xp.sqrt(rho2)
    wide, narrow = u / rho, v * rho
    wide, narrow = wide - matmul(wide, e - e2), narrow + matmul(narrow, e + e2)
    return xp.where(there, wide, u), xp.where(there, narrow, v)


def aligned_if_long(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U and V as they are [psgd_jax], but `aligned` where the square of either's norm is above 4.

    A fit alone lets the columns of both become parallel and grow; after some 30,000 fits I + V^T U has no inverse.
    """
    xp = namespace(u)
    long = xp.maximum(xp.sum(u * u), xp.sum(v * v)) > 4
    return tuple(xp.where(long, new, old) for new, old in zip(aligned(u, v), (u, v), strict=True))


# ---- what a step is normalised by --------------------------------------------------------
class Residual(NamedTuple):
    """The terms of the residual of d (D = ph h - v z), and of U or V (x, y and their images p, q)."""

    ph: Tensor
    h: Tensor
    v: Tensor
    z: Tensor


@dataclass(frozen=True)
class LowRankNormaliser:
    """ell of d's residual, and of U's or V's. running: ell has a memory (`L`), as in psgd_torch."""

    diagonal: Callable[[Residual], Scalar]
    side: Callable[[Tensor, Tensor, Tensor, Tensor], Scalar]
    running: bool = False


def of_products(r: Residual) -> Scalar:
    """max|ph h| + max|v z| [psgd_torch]."""
    xp = namespace(r.h)
    return xp.max(xp.abs(r.ph * r.h)) + xp.max(xp.abs(r.v * r.z))


def of_squares(r: Residual) -> Scalar:
    """max sqrt((ph^2 + v^2) (h^2 + z^2)) [psgd_jax '2nd']."""
    xp = namespace(r.h)
    return xp.max(_length(r.ph, r.v) * _length(r.h, r.z))


def _length(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(a^2 + b^2), of numbers whose squares vanish too."""
    xp = namespace(a)
    top = xp.maximum(xp.abs(a), xp.abs(b))
    unit = xp.where(top > 0, top, xp.ones_like(top))
    return unit * xp.sqrt((a / unit) ** 2 + (b / unit) ** 2)


def of_difference(r: Residual) -> Scalar:
    """max|ph h - v z| [psgd_jax '1st']."""
    return namespace(r.h).max(namespace(r.h).abs(r.ph * r.h - r.v * r.z))


def sum_of_norms(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Scalar:
    """||x|| ||p|| + ||y|| ||q||."""
    return norm(x) * norm(p) + norm(y) * norm(q)


def norm_of_difference(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Scalar:
    """||x p^T - y q^T||, the Frobenius norm of a matrix of rank two."""
    xp = namespace(x)
    return xp.sqrt(xp.abs(dot(x, x) * dot(p, p) + dot(y, y) * dot(q, q) - 2 * dot(x, y) * dot(p, q)))


def spread_by_rank(n: int, rank: int) -> float:
    """1 / sqrt(n (r + 10)): how the entries of U and V begin in psgd_jax."""
    return 1 / sqrt(n * (rank + 10))


RUNNING = LowRankNormaliser(of_products, sum_of_norms, running=True)
BY_TERMS = LowRankNormaliser(of_squares, sum_of_norms)
BY_RESIDUAL = LowRankNormaliser(of_difference, norm_of_difference)


# ---- the preconditioner ------------------------------------------------------------------
def _rank(factors: Factors) -> int:
    return factors.Q[0].shape[-1]


@final
@dataclass(frozen=True)
class LRA(Preconditioner):
    """Q = (I + U V^T) diag(d); see the module. Keeps `Q` = (U, V, d), and `L` of each where the normaliser runs.

    rank: r; 0 is a diagonal preconditioner. spread: (n, r) -> the deviation of the entries with which U and V begin, or
    None to scale them to a norm of sqrt(0.1). keep: how U and V are kept alike at each fit. capped: a rank that n
    numbers are too few for is n - 1 [psgd_jax takes any], and not refused [psgd_torch].
    """

    may_vanish = (0, 1)

    rank: int
    normaliser: LowRankNormaliser = RUNNING
    keep: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = aligned
    spread: Callable[[int, int], float] | None = None
    capped: bool = False

    @property
    def equation(self) -> str:
        """What P is, to be read."""
        return "P = Q^T Q,  Q = (I + U V^T) diag(d)"

    def rank_for(self, n: int) -> int:
        """The rank of the preconditioner of a vector of length n: below n."""
        return min(self.rank, max(n - 1, 0)) if self.capped else self.rank

    def init(self, like: Tensor, draws: Draws) -> Factors:
        """U and V small and random, from the roles "U" and "V"; d = 1."""
        n = like.shape[0]
        rank = self.rank_for(n)
        if n and not rank < n:
            raise ValueError(f"a low-rank preconditioner of rank {rank} needs more than {n} numbers; lower its rank")
        u, v = (self._begun(draws.normal(role, (n, rank), like)) for role in ("U", "V"))
        zeros = (make(like, "zeros", (), dtype=accumulation_dtype(like)) for _ in range(3))
        return Factors((u, v, make(like, "ones", (n,))), tuple(zeros) if self.normaliser.running else ())

    def _begun(self, x: Tensor) -> Tensor:
        if not prod(x.shape):
            return x
        return x * self.spread(*x.shape) if self.spread else x * (sqrt(0.1) / norm(x))

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of U, V and d."""
        n = prod(shape)
        rank = self.rank_for(n)
        return ((n, rank), (n, rank), (n,))

    def rescaled(self, factors: Factors, scale: Scalar | float) -> Factors:
        """Q times `scale`: in d."""
        u, v, d = factors.Q
        return factors._replace(Q=(u, v, d * number(scale, d)))

    def balanced(self, factors: Factors, when: bool | Flag) -> Factors:
        """U and V of equal norm, where `when` is true."""
        if when is False or not _rank(factors):
            return factors
        xp, (u, v, d) = namespace(factors.Q[0]), factors.Q
        nu, nv = norm(u), norm(v)
        ok = (nu > 0) & (nv > 0) & when
        rho = xp.where(ok, xp.sqrt(nu / xp.where(ok, nv, xp.ones_like(nv))), xp.ones_like(nu))
        return factors._replace(Q=(u / rho, v * rho, d))

    def probed(self, factors: Factors) -> bool:
        """Whitening needs a probe v."""
        return True

    def fit(
        self,
        factors: Factors,
        pair: Pair,
        rate: Scalar | float,
        beta_lipschitz: Scalar | float,
        draws: Draws,
        side: bool | Flag = False,
    ) -> Factors:
        r"""One step of d and of U (`side` true) or V towards P h = v.

        x = Q h,  y = Q^-T v,  z = P^-1 v,  M = I + V^T U
        d <- d - m (P h h - v z) d
        U <- U - m (x x^T V - y y^T V) M           m = mu / ell, each with its own ell
        V <- V - m ((I + V U^T) (x x^T - y y^T) U)
        """
        (u, v, d), h, probe, lows = factors.Q, pair.h, pair.v, list(factors.L)
        rank = _rank(factors)
        if rank:
            u, v = self.keep(u, v)
        x, y, m = self._images(u, v, d, h, probe)
        more, less = shrinkage(x, pair.unit, y)
        x, h, y, probe = x * more, h * more, y * less, probe * less
        z = (y - matvec(u, solve(m, dot(v, y))) if rank else y) / d
        ph = d * (x + matvec(v, dot(u, x))) if rank else d * x

        def length(which: int, ell: Scalar, moved: bool | Flag = True) -> Any:
            if self.normaliser.running:
                xp, ell = namespace(ell), cast(ell, lows[which].dtype)
                beta = number(beta_lipschitz, ell)
                ell = xp.maximum(beta * lows[which] + (1 - beta) * ell, ell)
                lows[which] = ell = select(moved, ell, lows[which])
            return number(number(rate, ell) / (ell + tiny(ell)), d)

        new_d = d - length(2, self.normaliser.diagonal(Residual(ph, h, probe, z))) * (ph * h - probe * z) * d
        if rank:
            other = select(side, v, u)
            wx, wy = dot(other, x), dot(other, y)
            ell = self.normaliser.side(x, y, matvec(other, wx), matvec(other, wy))
            step = self._directions(side, u, v, m, (x, wx)) - self._directions(side, u, v, m, (y, wy))
            u, v = self._moved(side, u, v, step, ell, length)
        return Factors((u, v, new_d), tuple(lows))

    def _images(self, u: Tensor, v: Tensor, d: Tensor, h: Tensor, probe: Tensor) -> tuple[Tensor, ...]:
        """x = Q h, y = Q^-T v and M."""
        x, y = d * h, probe / d
        rank = u.shape[-1]
        if not rank:
            return x, y, u
        m = identity(u, rank) + matmul(v.mT, u)
        x = x + matvec(u, dot(v, x))
        return x, y - matvec(v, solve(m.mT, dot(u, y))), m

    @staticmethod
    def _directions(side: bool | Flag, u: Tensor, v: Tensor, m: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        """x (x^T V) M of U's step, (x + V U^T x) (x^T U) of V's: (n, r)."""
        x, wx = pair
        left = select(side, x, x + matvec(v, wx))
        right = select(side, dot(m, wx), wx)
        return left[:, None] * right[None, :]

    @staticmethod
    def _moved(
        side: bool | Flag, u: Tensor, v: Tensor, step: Tensor, ell: Scalar, length: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """U or V after its step; the other, and its bound, as it was."""
        if isinstance(side, bool):
            return (u - length(0, ell) * step, v) if side else (u, v - length(1, ell) * step)
        xp = namespace(u)
        other = xp.logical_not(side)
        first, second = length(0, ell, side), length(1, ell, other)
        return select(side, u - first * step, u), select(other, v - second * step, v)

    def precondition(self, factors: Factors, g: Tensor) -> Tensor:
        """P g = d (I + V U^T) (I + U V^T) d g."""
        u, v, d = factors.Q
        y = d * g
        if _rank(factors):
            y = y + matvec(u, dot(v, y))
            y = y + matvec(v, dot(u, y))
        return d * y
