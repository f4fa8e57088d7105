"""The X-shaped preconditioner of all parameters as one vector: diagonals both ways, at the cost of two vectors.

With f(x) the reversal of x, Q = diag(a) + adiag(b):

    Q x = a x + b f(x),     Q^T y = a y + f(b y)

with a and b of the length n of the vector. All is real. Source: psgd_jax `_update_precond_Xmat_math_`,
`_precond_grad_Xmat_math`; arXiv 2211.04422.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import final

from psgd._xp import eps, make, namespace, number, shrinkage, tiny
from psgd.arrays import Factors, Flag, Scalar, Tensor
from psgd.criterion import Pair
from psgd.noise import Draws
from psgd.preconditioner import Preconditioner
from psgd.shapes import Shape


def flipped(x: Tensor) -> Tensor:
    """f(x): the vector read backwards."""
    return namespace(x).flip(x, axis=0)


# ---- what a step is normalised by: (x, y, Da, Db), each (n,) -> ell, 0-d, Da, Db -----------
Steps = tuple[Scalar, Tensor, Tensor]


def by_squares(x: Tensor, y: Tensor, da: Tensor, db: Tensor) -> Steps:
    """ell = max(x^2 + y^2) >= max(|Da|, |Db|) [psgd_jax '2nd']."""
    return namespace(x).max(x * x + y * y), da, db


def by_difference(x: Tensor, y: Tensor, da: Tensor, db: Tensor) -> Steps:
    """ell = max(|Da|, |Db|), with residuals that are no more than rounding set to 0 [psgd_jax '1st'].

    Otherwise rounding would become a full step where Da is exactly 0, as for n = 1 with the automatic scale.
    """
    # x^2 and y^2 are each off by up to 2 eps of themselves; 4 is twice that, as in `psgd.kron.by_triangle`.
    xp, rounding = namespace(x), 4 * eps(x) * (x * x + y * y)
    da = xp.where(xp.abs(da) > rounding, da, xp.zeros_like(da))
    db = xp.where(xp.abs(db) > rounding, db, xp.zeros_like(db))
    return xp.max(xp.maximum(xp.abs(da), xp.abs(db))), da, db


@final
@dataclass(frozen=True)
class XShaped(Preconditioner):
    """Q = diag(a) + adiag(b); see the module. Keeps `Q` = (a, b), each (n,), and no Lipschitz estimates.

    normaliser: (x, y, Da, Db) -> ell, Da, Db, what a step is divided by.
    """

    may_vanish = (1,)

    normaliser: Callable[[Tensor, Tensor, Tensor, Tensor], Steps] = by_squares

    @property
    def equation(self) -> str:
        """P, as text."""
        return "P = Q^T Q,  Q = diag(a) + adiag(b)"

    def init(self, like: Tensor, draws: Draws | None = None) -> Factors:
        """a = 1, b = 0, each in the shape of `like`, a vector."""
        return Factors((make(like, "ones", tuple(like.shape)), make(like, "zeros", tuple(like.shape))), ())

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of a and b, (n,) both."""
        return ((prod(shape),), (prod(shape),))

    def rescaled(self, factors: Factors, scale: Scalar | float) -> Factors:
        """Q times `scale`: both a and b."""
        return factors._replace(Q=tuple(q * number(scale, q) for q in factors.Q))

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
        r"""One step towards P h = v.

            x = Q h,  y = Q^-T v,   Da = x^2 - y^2,  Db = x f(x) - y f(y),  m = mu / ell
            a <- a - m (Da a + Db f(b)),    b <- b - m (Da b + Db f(a))

        The middle of b stays 0 where n is odd. Each pair of entries is a 2 x 2 matrix, whose determinant
        a f(a) - b f(b) stays positive for mu < 1/2.

        Args:
            factors: Q = (a, b).
            pair: h and v, vectors (n,).
            rate: mu, 0-d or a number.
            beta_lipschitz, draws, side: not used.

        Source: psgd_jax `_update_precond_Xmat_math_`.
        """
        a, b = factors.Q
        ell, da, db = self._steps(a, b, pair)
        m = number(rate, a) / (ell + tiny(a))
        return Factors((a - m * (da * a + db * flipped(b)), b - m * (da * b + db * flipped(a))), factors.L)

    def _steps(self, a: Tensor, b: Tensor, pair: Pair) -> Steps:
        """ell, Da and Db of a pair. A function of its own, so that the memory of x and y is free before the step."""
        x = a * pair.h + b * flipped(pair.h)
        y = self._inverse_adjoint(a, b, pair.v)
        for_x, for_y = shrinkage(x, pair.unit, y)
        x, y = x * for_x, y * for_y
        da, db = x * x - y * y, x * flipped(x) - y * flipped(y)
        if a.shape[0] % 2:
            i = make(a, "arange", a.shape[0], dtype=namespace(a).int32)
            db = namespace(a).where(i == a.shape[0] // 2, namespace(a).zeros_like(db), db)
        return self.normaliser(x, y, da, db)

    @staticmethod
    def _inverse_adjoint(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        """Q^-T v, (n,), by quotients of a and b, since the products in a f(a) - b f(b) may overflow."""
        w, ratio = v / a, b / flipped(a)
        return (w - flipped(ratio * w)) / (1 - ratio * flipped(ratio))

    def precondition(self, factors: Factors, g: Tensor) -> Tensor:
        """P g = Q^T (Q g) of a vector (n,)."""
        a, b = factors.Q
        y = a * g + b * flipped(g)
        return a * y + flipped(b * y)
