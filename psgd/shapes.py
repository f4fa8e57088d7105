"""Shapes of a parameter as its preconditioner sees it: pure integer functions."""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations
from math import prod

Shape = tuple[int, ...]


# ---- shape of a parameter -> shape of its preconditioned tensor ---------------------------
def as_is(shape: Shape) -> Shape:
    """The shape itself."""
    return tuple(shape)


def squeeze(shape: Shape) -> Shape:
    """The shape without axes of length one: (1, n) is a vector, (1, 1) a scalar [psgd_torch]."""
    return tuple(n for n in shape if n != 1)


def merge(shape: Shape) -> Shape:
    """The most square matrix that keeps the axes in order [quad_torch `_merge_dims`].

    Vectors in disguise, such as (1, n) or (n, 1, 1), become (n,). More than two axes are split at the point that
    minimises max(l, r) / min(l, r) of the two products, the first on ties.

    >>> merge((64, 3, 3, 3)), merge((1, 6)), merge((5, 8)), merge(())
    ((64, 27), (6,), (5, 8), ())
    """
    size = prod(shape)
    if len(shape) < 2:
        return tuple(shape)
    if size == max(shape):
        return (size,)
    if len(shape) == 2 or size == 0:
        return tuple(shape)

    def skew(split: int) -> float:
        left = prod(shape[:split])
        return max(left, size // left) / min(left, size // left)

    best = min(range(1, len(shape)), key=skew)
    return (prod(shape[:best]), prod(shape[best:]))


def matrix(shape: Shape) -> Shape:
    """The most square matrix that any order of the axes gives [psgd_jax `_shape_as_matrix`].

    Scalars and vectors become one row. Two axes stay. Of more, the order (see `matrix_order`) and the split with the
    least l^2 + r^2 of the two products.

    >>> matrix((2, 3, 6)), matrix((7,)), matrix(()), matrix((9, 2))
    ((6, 6), (1, 7), (1, 1), (9, 2))
    """
    if len(shape) < 2:
        return (1, prod(shape))
    order, split = _most_square(tuple(shape))
    left = prod(shape[i] for i in order[:split])
    return (left, prod(shape[i] for i in order[split:]))


# ---- shape of a parameter -> order of its axes before that reshape ------------------------
def in_order(shape: Shape) -> Shape:
    """The axes as they are."""
    return tuple(range(len(shape)))


def matrix_order(shape: Shape) -> Shape:
    """The order of axes with which `matrix` is the most square; of equals the first in lexicographic order."""
    return _most_square(tuple(shape))[0]


@lru_cache(maxsize=1024)
def _most_square(shape: Shape) -> tuple[Shape, int]:
    """The order of the axes, and how many of them make the rows: the first that minimises l^2 + r^2 (see `matrix`)."""
    if len(shape) < 3:
        return in_order(shape), 1

    def spread(candidate: tuple[Shape, int]) -> int:
        order, split = candidate
        return prod(shape[i] for i in order[:split]) ** 2 + prod(shape[i] for i in order[split:]) ** 2

    candidates = ((order, split) for order in permutations(in_order(shape)) for split in range(1, len(shape)))
    return min(candidates, key=spread)
