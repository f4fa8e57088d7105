"""Names for arrays by shape, for annotations. An array may come from any namespace that follows the standard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

Array = Any

if TYPE_CHECKING:
    from jaxtyping import Float, Inexact

    Matrix = Inexact[Array, "n n"]  # a dense factor, or a Gram matrix
    Diagonal = Inexact[Array, "n"]  # a diagonal factor
    Scalar = Float[Array, ""]  # 0-d
    Factor = Matrix | Diagonal | Scalar  # of one axis; a 0-d tensor's is 0-d
    Rows = Inexact[Array, "k n"]  # k vectors
    Tensor = Inexact[Array, "..."]  # a gradient, a probe: any number of axes
else:  # jaxtyping is a tool of ours and not needed to run
    Matrix = Diagonal = Scalar = Factor = Rows = Tensor = Array
