"""The matrix products that a step cannot do without, read off the core as it runs on shapes alone.

What a machine takes for them bare is the floor of a step: everything else that a step does comes on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

from benchmarks.sets import Shape, alike
from psgd.cost import ShapeNamespace, ShapeTracer
from psgd.methods import METHODS
from psgd.recipe import Recipe
from psgd.summary import take_step

Product = tuple[int, int, int, int]  # batch, m, k, n: of (batch, m, k) by (batch, k, n)


class Recorder(ShapeNamespace):
    """A namespace that keeps what is multiplied and how often. A triangular solve of m² n operations counts as half of
    the product of 2 m² n.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def matmul(self, a: ShapeTracer, b: ShapeTracer) -> ShapeTracer:
        """As of outlines, and written down."""
        out = super().matmul(a, b)
        m = a.shape[-2] if a.ndim > 1 else 1
        n = b.shape[-1] if b.ndim > 1 else 1
        self.products[max(1, prod(out.shape) // max(1, m * n)), m, a.shape[-1], n] += 1
        return out

    def _solve(self, a: ShapeTracer, b: ShapeTracer) -> ShapeTracer:
        m, n = b.shape[-2:]
        self.products[max(1, prod(b.shape[:-2])), m, m, n] += 0.5  # type: ignore[assignment]
        return super()._solve(a, b)


def of_tensor(recipe: Recipe, shape: Shape, dtype: str, *, fit: bool) -> Counter[Product]:
    """The products of a step of one tensor."""
    xp = Recorder()
    take_step(recipe, shape, dtype, xp, fit=fit)
    return xp.products


def of_step(
    method: str, settings: dict[str, Any], shapes: Sequence[Shape], dtype: str, *, fit: bool
) -> list[tuple[int, int, int, int, float]]:
    """(batch, m, k, n, how often) of a step of all tensors; those of one shape are stacked, as the adapters do it."""
    recipe = METHODS[method].of(**settings).recipe()
    total: Counter[Product] = Counter()
    whole = [((sum(map(prod, shapes)),), 1)]
    for shape, count in whole if recipe.joint else alike(shapes).items():
        for (batch, *sides), often in of_tensor(recipe, shape, dtype, fit=fit).items():
            total[(count * batch, *sides)] += often  # type: ignore[index]
    return [(*product, float(often)) for product, often in total.items() if prod(product)]


def flops(products: Sequence[Sequence[float]]) -> float:
    """Floating-point operations of products."""
    return sum(2 * prod(x) for x in products)
