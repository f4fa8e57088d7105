"""Shapes of a parameter as its preconditioner sees it: pure integer functions."""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]


def as_is(shape: Shape) -> Shape:
    """The shape itself."""
    return tuple(shape)


def squeeze(shape: Shape) -> Shape:
    """Drop axes of length one: (1, n) is a vector, (1, 1) a scalar."""
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
