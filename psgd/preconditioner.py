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

    # The factors that may be zero and fit again; another that is zero stays zero, and so does the step.
    may_vanish: ClassVar[tuple[int, ...]] = ()

    @property
    @abstractmethod
    def equation(self) -> str:
        """What P is, to be read."""

    @property
    def keeps_p(self) -> bool:
        """Is P kept beside the factors that are fitted?"""
        return False

    def with_p(self, factors: Factors) -> Factors:
        """Factors with those of P that belong to Q, where they are kept."""
        return factors

    @abstractmethod
    def init(self, like: Tensor, draws: Draws) -> Factors:
        """The first factors of a tensor as `like`, of P = I or nearly; random ones from `draws`."""

    @abstractmethod
    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the factors Q of a tensor."""

    @abstractmethod
    def rescaled(self, factors: Factors, scale: Scalar | float) -> Factors:
        """Factors with Q times `scale` overall, and so P times its square."""

    def balanced(self, factors: Factors, when: bool | Flag) -> Factors:
        """Where `when` is true, factors that are alike in size, of the same P."""
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
        """One step towards P h = v.

        rate: mu, the step size. beta_lipschitz: beta of the running Lipschitz estimates L, where there are any.
        draws: the probes of norm bounds. side: which of two factors moves, where they move one at a time.
        """

    @abstractmethod
    def precondition(self, factors: Factors, g: Tensor) -> Tensor:
        """P g."""
