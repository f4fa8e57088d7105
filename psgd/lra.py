"""The low-rank preconditioner of all parameters as one vector of length n ("LRA", "UVd").

    Q = (I + U V^T) diag(d),   U, V: (n, r),  d: (n,),   P = Q^T Q

All is real. Sources: psgd_torch `update_precond_lra*`, `precond_grad_lra`; psgd_jax `low_rank_approximation`; arXiv
2211.04422.
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
    """a^T b: (r,) of a matrix (n, r) and a vector (n,), 0-d of two vectors."""
    xp = namespace(b)
    return xp.sum(a * b) if a.ndim < 2 else xp.reshape(matmul(a.mT, b[:, None]), (-1,))


def matvec(a: Tensor, x: Tensor) -> Tensor:
    """a x of a matrix (n, r) and a vector (r,): (n,)."""
    return namespace(x).reshape(matmul(a, x[:, None]), (-1,))


def norm(x: Tensor) -> Scalar:
    """||x||, the 2-norm of all entries: 0-d."""
    return namespace(x).linalg.vector_norm(x)


def select(flag: bool | Flag, a: Array, b: Array) -> Array:
    """a where a decision is true, else b: at once for a Python boolean, by `where` for a 0-d array."""
    return (a if flag else b) if isinstance(flag, bool) else namespace(a).where(flag, a, b)


# ---- how U and V are kept alike, while U V^T stays as it is, or nearly --------------------
def aligned(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""U and V of equal norms, their Gram matrices a = U^T U, b = V^T V a little more alike.

        rho^4 = tr a / tr b,   E = 0.1 (a / rho^2 - b rho^2) / tr(a / rho^2 + b rho^2)
        U <- U (I - E + E^2/2) / rho,   V <- V (I + E + E^2/2) rho

    U V^T changes by the factor I + E^4/4 alone, the product of the two polynomials. The rate 0.1 is published.

    Args:
        u: (n, r). Where u or v is zero both stay.
        v: (n, r).

    Source: psgd_torch `update_precond_lra`.
    """
    xp = namespace(u)
    a, b = matmul(u.mT, u), matmul(v.mT, v)
    ta, tb = xp.sum(u * u), xp.sum(v * v)
    nonzero = (ta > 0) & (tb > 0)
    one = xp.ones_like(ta)
    rho2 = xp.where(nonzero, xp.sqrt(xp.where(nonzero, ta, one) / xp.where(nonzero, tb, one)), one)
    e = 0.1 * (a / rho2 - b * rho2) / xp.where(nonzero, ta / rho2 + tb * rho2, one)
    e2 = matmul(e, e) / 2
    rho = xp.sqrt(rho2)
    new_u, new_v = u / rho, v * rho
    new_u, new_v = new_u - matmul(new_u, e - e2), new_v + matmul(new_v, e + e2)
    return xp.where(nonzero, new_u, u), xp.where(nonzero, new_v, v)


def aligned_if_long(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U and V as they are [psgd_jax], but `aligned` where ||U||^2 or ||V||^2 is above 4.

    Fits alone let the columns of both become parallel and grow: measured, I + V^T U could not be inverted after some
    30,000 fits. No recorded run of psgd_jax comes near 4, and a million steps keep it at 4 (docs/decisions.md).
    """
    xp = namespace(u)
    long = xp.maximum(xp.sum(u * u), xp.sum(v * v)) > 4
    return tuple(xp.where(long, new, old) for new, old in zip(aligned(u, v), (u, v), strict=True))


# ---- what a step is normalised by --------------------------------------------------------
class Residual(NamedTuple):
    """The terms of the residual of d, D = ph h - v z, with ph = P h and z = P^-1 v; each (n,)."""

    ph: Tensor
    h: Tensor
    v: Tensor
    z: Tensor


@dataclass(frozen=True)
class LowRankNormaliser:
    """What the steps of d, and of U or V, are divided by.

    Args:
        diagonal: `Residual` -> ell of d, 0-d.
        side: (x, y, p, q) -> ell of U or V, 0-d, of the residual x p^T - y q^T.
        running: do Lipschitz estimates L average ell over steps, as in psgd_torch?
    """

    diagonal: Callable[[Residual], Scalar]
    side: Callable[[Tensor, Tensor, Tensor, Tensor], Scalar]
    running: bool = False


def of_products(r: Residual) -> Scalar:
    """ell = max|ph h| + max|v z| [psgd_torch]."""
    xp = namespace(r.h)
    return xp.max(xp.abs(r.ph * r.h)) + xp.max(xp.abs(r.v * r.z))


def of_squares(r: Residual) -> Scalar:
    """ell = max sqrt((ph^2 + v^2) (h^2 + z^2)) [psgd_jax '2nd']."""
    xp = namespace(r.h)
    return xp.max(_length(r.ph, r.v) * _length(r.h, r.z))


def _length(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(a^2 + b^2), without overflow or underflow of the squares."""
    xp = namespace(a)
    top = xp.maximum(xp.abs(a), xp.abs(b))
    unit = xp.where(top > 0, top, xp.ones_like(top))
    return unit * xp.sqrt((a / unit) ** 2 + (b / unit) ** 2)


def of_difference(r: Residual) -> Scalar:
    """ell = max|ph h - v z| [psgd_jax '1st']."""
    return namespace(r.h).max(namespace(r.h).abs(r.ph * r.h - r.v * r.z))


def sum_of_norms(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Scalar:
    """ell = ||x|| ||p|| + ||y|| ||q|| >= ||x p^T - y q^T||; vectors (n,) [psgd_torch; psgd_jax '2nd']."""
    return norm(x) * norm(p) + norm(y) * norm(q)


def norm_of_difference(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Scalar:
    """ell = ||x p^T - y q^T||_F of vectors (n,), by their scalar products alone [psgd_jax '1st']."""
    xp = namespace(x)
    return xp.sqrt(xp.abs(dot(x, x) * dot(p, p) + dot(y, y) * dot(q, q) - 2 * dot(x, y) * dot(p, q)))


def spread_by_rank(n: int, rank: int) -> float:
    """1 / sqrt(n (r + 10)): the deviation of the entries with which U and V begin, as published [psgd_jax]."""
    return 1 / sqrt(n * (rank + 10))


RUNNING = LowRankNormaliser(of_products, sum_of_norms, running=True)
BY_TERMS = LowRankNormaliser(of_squares, sum_of_norms)
BY_RESIDUAL = LowRankNormaliser(of_difference, norm_of_difference)


# ---- the preconditioner ------------------------------------------------------------------
def _rank(factors: Factors) -> int:
    """r of U, (n, r)."""
    return factors.Q[0].shape[-1]


@final
@dataclass(frozen=True)
class LRA(Preconditioner):
    """Q = (I + U V^T) diag(d); see the module.

    Keeps `Q` = (U, V, d) and, where the normaliser is running, `L`, the 0-d Lipschitz estimate of each.

    Args:
        rank: r; 0 is a diagonal preconditioner.
        normaliser: what steps are divided by.
        keep: (U, V) -> (U, V), how they are kept alike before each fit.
        spread: (n, r) -> deviation of the first entries of U and V [psgd_jax]; None: their norm is sqrt(0.1), as
            published [psgd_torch].
        capped: is a rank above n - 1 lowered to it [psgd_jax], rather than refused [psgd_torch]?
    """

    may_vanish = (0, 1)

    rank: int
    normaliser: LowRankNormaliser = RUNNING
    keep: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = aligned
    spread: Callable[[int, int], float] | None = None
    capped: bool = False

    @property
    def equation(self) -> str:
        """P, as text."""
        return "P = Q^T Q,  Q = (I + U V^T) diag(d)"

    def rank_for(self, n: int) -> int:
        """The rank for a vector of length n; lowered to n - 1 if `capped`."""
        return min(self.rank, max(n - 1, 0)) if self.capped else self.rank

    def init(self, like: Tensor, draws: Draws) -> Factors:
        """U and V (n, r), small and random, of the roles "U" and "V"; d = 1, (n,); L = 0. `like`: a vector (n,)."""
        n = like.shape[0]
        rank = self.rank_for(n)
        if n and not rank < n:
            raise ValueError(f"a low-rank preconditioner of rank {rank} needs more than {n} numbers; lower its rank")
        u, v = (self._begun(draws.normal(role, (n, rank), like)) for role in ("U", "V"))
        zeros = (make(like, "zeros", (), dtype=accumulation_dtype(like)) for _ in range(3))
        return Factors((u, v, make(like, "ones", (n,))), tuple(zeros) if self.normaliser.running else ())

    def _begun(self, x: Tensor) -> Tensor:
        """Normal numbers x (n, r), scaled as U and V begin."""
        if not prod(x.shape):
            return x
        return x * self.spread(*x.shape) if self.spread else x * (sqrt(0.1) / norm(x))

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of U, V and d: (n, r), (n, r), (n,)."""
        n = prod(shape)
        rank = self.rank_for(n)
        return ((n, rank), (n, rank), (n,))

    def rescaled(self, factors: Factors, scale: Scalar | float) -> Factors:
        """Q times `scale`, which d takes."""
        u, v, d = factors.Q
        return factors._replace(Q=(u, v, d * number(scale, d)))

    def balanced(self, factors: Factors, when: bool | Flag) -> Factors:
        """U / rho and V rho, of equal norms, rho^2 = ||U|| / ||V||, where `when` is true and neither is zero.

        Source: psgd_jax `_update_precond_UVd_math`.
        """
        if when is False or not _rank(factors):
            return factors
        xp, (u, v, d) = namespace(factors.Q[0]), factors.Q
        nu, nv = norm(u), norm(v)
        ok = (nu > 0) & (nv > 0) & when
        rho = xp.where(ok, xp.sqrt(nu / xp.where(ok, nv, xp.ones_like(nv))), xp.ones_like(nu))
        return factors._replace(Q=(u / rho, v * rho, d))

    def probed(self, factors: Factors) -> bool:
        """Whitening always needs a probe v."""
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
        r"""One step of d, and of U (`side` true) or V, towards P h = v.

            x = Q h,  y = Q^-T v,  z = P^-1 v,  M = I + V^T U,   m = mu / L, each with its own L
            d <- d - m (P h h - v z) d
            U <- U - m (x x^T - y y^T) V M    or    V <- V - m (I + V U^T) (x x^T - y y^T) U

        L is the Lipschitz estimate max(beta_L L + (1 - beta_L) ell, ell), or ell where the normaliser is not running.

        Args:
            factors: Q = (U, V, d), and L.
            pair: h and v, vectors (n,).
            rate: mu, 0-d or a number.
            beta_lipschitz: beta_L in [0, 1).
            draws: not used.
            side: does U move, rather than V?

        Source: psgd_torch `update_precond_lra`, psgd_jax `_update_precond_UVd_math`.
        """
        (u, v, d), h, probe, lipschitz = factors.Q, pair.h, pair.v, list(factors.L)
        rank = _rank(factors)
        if rank:
            u, v = self.keep(u, v)
        x, y, m = self._images(u, v, d, h, probe)
        for_x, for_y = shrinkage(x, pair.unit, y)
        x, h, y, probe = x * for_x, h * for_x, y * for_y, probe * for_y
        z = (y - matvec(u, solve(m, dot(v, y))) if rank else y) / d
        ph = d * (x + matvec(v, dot(u, x))) if rank else d * x

        def length(which: int, ell: Scalar, moved: bool | Flag = True) -> Any:
            """The step size m of U (0), V (1) or d (2), whose estimate L is renewed if it moves."""
            if self.normaliser.running:
                xp, ell = namespace(ell), cast(ell, lipschitz[which].dtype)
                beta = number(beta_lipschitz, ell)
                ell = xp.maximum(beta * lipschitz[which] + (1 - beta) * ell, ell)
                lipschitz[which] = ell = select(moved, ell, lipschitz[which])
            return number(number(rate, ell) / (ell + tiny(ell)), d)

        new_d = d - length(2, self.normaliser.diagonal(Residual(ph, h, probe, z))) * (ph * h - probe * z) * d
        if rank:
            other = select(side, v, u)
            wx, wy = dot(other, x), dot(other, y)
            ell = self.normaliser.side(x, y, matvec(other, wx), matvec(other, wy))
            step = self._directions(side, u, v, m, (x, wx)) - self._directions(side, u, v, m, (y, wy))
            u, v = self._moved(side, u, v, step, ell, length)
        return Factors((u, v, new_d), tuple(lipschitz))

    def _images(self, u: Tensor, v: Tensor, d: Tensor, h: Tensor, probe: Tensor) -> tuple[Tensor, ...]:
        """x = Q h and y = Q^-T v, (n,), and M = I + V^T U, (r, r), with one solve; without U and V, M is unused."""
        x, y = d * h, probe / d
        rank = u.shape[-1]
        if not rank:
            return x, y, u
        m = identity(u, rank) + matmul(v.mT, u)
        x = x + matvec(u, dot(v, x))
        return x, y - matvec(v, solve(m.mT, dot(u, y))), m

    @staticmethod
    def _directions(side: bool | Flag, u: Tensor, v: Tensor, m: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        """x (x^T V) M of U's step, (x + V U^T x) (x^T U) of V's: (n, r). pair: x, and x^T V or x^T U."""
        x, wx = pair
        left = select(side, x, x + matvec(v, wx))
        right = select(side, dot(m, wx), wx)
        return left[:, None] * right[None, :]

    @staticmethod
    def _moved(
        side: bool | Flag, u: Tensor, v: Tensor, step: Tensor, ell: Scalar, length: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """U or V after its step along `step` (n, r); the other, and its Lipschitz estimate, as it was."""
        if isinstance(side, bool):
            return (u - length(0, ell) * step, v) if side else (u, v - length(1, ell) * step)
        xp = namespace(u)
        other = xp.logical_not(side)
        first, second = length(0, ell, side), length(1, ell, other)
        return select(side, u - first * step, u), select(other, v - second * step, v)

    def precondition(self, factors: Factors, g: Tensor) -> Tensor:
        """P g = d (I + V U^T) (I + U V^T) d g of a vector (n,), in four thin products."""
        u, v, d = factors.Q
        y = d * g
        if _rank(factors):
            y = y + matvec(u, dot(v, y))
            y = y + matvec(v, dot(u, y))
        return d * y
