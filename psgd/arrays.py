"""Names for arrays by shape, for annotations, and the record of a preconditioner's arrays.

An array may come from any namespace that follows the standard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

Array = Any  # of any library that follows the standard, for which there is no complete protocol to name here
Dtype = Any  # of such a library
Number = int | float | Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Inexact, Int

    Matrix = Inexact[Array, "n n"]  # a dense factor, or a Gram matrix
    Vector = Inexact[Array, "n"]
    Diagonal = Vector | Inexact[Array, ""]  # a diagonal factor; that of a 0-d tensor is 0-d
    Scalar = Float[Array, ""]  # 0-d
    Flag = Bool[Array, ""]  # a decision that is an array, 0-d
    Index = Int[Array, ""]  # 0-d
    Factor = Matrix | Diagonal  # of one axis; in one signature all are of one length
    AxisFactor = Inexact[Array, "_ _"] | Inexact[Array, "_"] | Inexact[Array, ""]  # of an axis of any length
    Rows = Inexact[Array, "k n"]  # k vectors
    Row = Inexact[Array, "1 n"]
    Columns = Inexact[Array, "n k"]  # k vectors
    PerRow = Inexact[Array, "k 1"]  # a number for each row
    Tensor = Inexact[Array, "..."]  # a gradient, a probe: any number of axes
else:  # jaxtyping serves type checkers and tests alone
    Matrix = Vector = Diagonal = Scalar = Flag = Index = Factor = AxisFactor = Array
    Rows = Row = Columns = PerRow = Tensor = Array


class Factors(NamedTuple):
    """All that a preconditioner keeps of one tensor.

    Args:
        Q: its factors, as each preconditioner says.
        L: the Lipschitz estimate of each, a running bound on its residual, 0-d, at least float32; () if none is kept.
        P: the factors of P, in the shapes of Q; () where they are not kept.
    """

    Q: tuple[Array, ...]
    L: tuple[Scalar, ...]
    P: tuple[Array, ...] = ()
