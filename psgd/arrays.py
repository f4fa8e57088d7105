"""Names for arrays by shape, for annotations, and the record of a preconditioner's arrays.

An array may come from any namespace that follows the standard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

Array = Any  # of any library that follows the standard, for which there is no complete protocol to name here
Dtype = Any  # of such a library
Number = int | float | Array

if TYPE_CHECKING:
    from jaxtyping import Float, Inexact

    Matrix = Inexact[Array, "n n"]  # a dense factor, or a Gram matrix
    Diagonal = Inexact[Array, "n"]  # a diagonal factor
    Scalar = Float[Array, ""]  # 0-d
    Factor = Matrix | Diagonal | Scalar  # of one axis; a 0-d tensor's is 0-d
    Rows = Inexact[Array, "k n"]  # k vectors
    Tensor = Inexact[Array, "..."]  # a gradient, a probe: any number of axes
else:  # jaxtyping serves type checkers and tests alone
    Matrix = Diagonal = Scalar = Factor = Rows = Tensor = Array


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
