"""What the pipeline asks of a preconditioner, whatever its factors are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from psgd.arrays import Factors, Flag, Scalar, Tensor
from psgd.criterion import Pair
from psgd.noise import Draws
from psgd.shapes import Shape


class Preconditioner(ABC):
    """P = Q^H Q of one tensor, by factors that are fitted to pairs (v, h) so that P h = v.

    Its classes are final, frozen and compare by value: a compiled step is made once for each.
    """

    # Indices in Q of the factors that may be zero in a sound state. Where any other is zero it stays so, and P with it.
    may_vanish: ClassVar[tuple[int, ...]] = ()

    @property
    @abstractmethod
    def equation(self) -> str:
        """P, and how its factors move, as text."""

    @property
    def keeps_p(self) -> bool:
        """Is P kept beside the factors that are fitted?"""
        return False

    def with_p(self, factors: Factors) -> Factors:
        """The factors with P formed of Q, where P is kept."""
        return factors

    @abstractmethod
    def init(self, like: Tensor, draws: Draws) -> Factors:
        """The first factors of a tensor like `like`, with P = I or nearly; random ones from `draws`, of step 0."""

    @abstractmethod
    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the factors Q of a tensor."""

    @abstractmethod
    def rescaled(self, factors: Factors, scale: Scalar | float) -> Factors:
        """Factors with Q times `scale` overall, a number or 0-d, and so P times its square."""

    def balanced(self, factors: Factors, when: bool | Flag) -> Factors:
        """Factors of equal size with the same P, where `when` is true."""
        return factors

    @abstractmethod
    def probed(self, factors: Factors) -> bool:
        """Does whitening need a probe v, or is the mean over it known?"""

    @abstractmethod
    def fit(
        self,
        factors: Factors,
        pair: Pair,
        rate: Scalar | float,
        beta_lipschitz: Scalar | float,
        draws: Draws,
        side: bool | Flag = False,
    ) -> Factors:
        """One step of the factors towards P h = v.

        Args:
            factors: of a tensor of the shape of `pair.h`.
            pair: (v, h), damped.
            rate: mu, the step size, a number or 0-d.
            beta_lipschitz: beta_L, the weight of the past in the Lipschitz estimates L, where there are any.
            draws: the probes of norm bounds.
            side: does the first of two factors move, where they move one at a time?
        """

    @abstractmethod
    def precondition(self, factors: Factors, g: Tensor) -> Tensor:
        """P g, in the shape of g."""
