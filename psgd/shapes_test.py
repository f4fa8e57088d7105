"""Shapes keep their size and the order of their axes."""

from __future__ import annotations

from itertools import accumulate, combinations, permutations
from math import prod
from operator import mul

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.shapes import as_is, in_order, matrix, matrix_order, merge, squeeze

SHAPES = st.lists(st.integers(1, 12), max_size=6).map(tuple)
checked = settings(max_examples=300, deadline=None, derandomize=True)


def cuts(shape: tuple[int, ...]) -> set[int]:
    """Products of the leading axes: a shape that merges neighbours has some of them."""
    return {1, *accumulate(shape, mul)}


def skew(matrix: tuple[int, int]) -> float:
    return max(matrix) / min(matrix)


@given(SHAPES)
@checked
def test_rules_keep_size_and_order(shape: tuple[int, ...]):
    for rule in (as_is, squeeze, merge):
        assert prod(rule(shape)) == prod(shape)
        assert cuts(rule(shape)) <= cuts(shape)


@given(SHAPES)
@checked
def test_squeeze_drops_the_ones_alone(shape: tuple[int, ...]):
    assert 1 not in squeeze(shape)
    assert cuts(squeeze(shape)) == cuts(shape)


@given(SHAPES)
@checked
def test_merge_is_the_most_square(shape: tuple[int, ...]):
    merged, size = merge(shape), prod(shape)
    if len(shape) < 2:
        assert merged == shape
    elif max(shape) == size:
        assert merged == (size,)
    elif len(shape) == 2:
        assert merged == shape
    else:
        choices = [(prod(shape[:i]), prod(shape[i:])) for i in range(1, len(shape))]
        assert merged == min(choices, key=skew)  # min takes the first on ties


@pytest.mark.parametrize(
    ("shape", "merged"),
    [
        ((), ()),
        ((1,), (1,)),
        ((1, 1), (1,)),
        ((1, 6), (6,)),
        ((5, 1, 1), (5,)),
        ((5, 8), (5, 8)),
        ((64, 3, 3, 3), (64, 27)),
        ((2, 3, 2), (2, 6)),
        ((2, 2, 2), (2, 4)),
        ((0,), (0,)),
        ((0, 3), (0, 3)),
        ((2, 0, 3), (2, 0, 3)),
    ],
)
def test_merge_of_named_shapes(shape: tuple[int, ...], merged: tuple[int, ...]):
    assert merge(shape) == merged


@given(st.lists(st.integers(0, 7), max_size=5).map(tuple))
@checked
def test_matrix_is_the_most_square_of_any_order(shape: tuple[int, ...]):
    axes = range(len(shape))
    if len(shape) < 3:
        assert matrix(shape) == (shape if len(shape) == 2 else (1, prod(shape)))
        assert matrix_order(shape) == tuple(axes)
        return

    def sides(order: tuple[int, ...], split: int) -> tuple[int, int]:
        return prod(shape[i] for i in order[:split]), prod(shape[i] for i in order[split:])

    def squares(sides: tuple[int, int]) -> int:
        return sides[0] ** 2 + sides[1] ** 2

    # Rows are a choice of axes; any order that begins with them will do, and the first of all such orders is wanted.
    least = min(
        squares(sides((*rows, *(i for i in axes if i not in rows)), len(rows)))
        for k in axes[1:]
        for rows in combinations(axes, k)
    )
    order = next(p for p in permutations(axes) if least in {squares(sides(p, k)) for k in axes[1:]})
    assert matrix_order(shape) == order
    assert matrix(shape) == next(sides(order, k) for k in axes[1:] if squares(sides(order, k)) == least)


@pytest.mark.parametrize(
    ("shape", "order", "sides"),
    [
        ((), (), (1, 1)),
        ((7,), (0,), (1, 7)),
        ((9, 2), (0, 1), (9, 2)),
        ((2, 3, 6), (0, 1, 2), (6, 6)),
        ((2, 6, 3), (0, 2, 1), (6, 6)),
        ((64, 3, 3, 3), (0, 1, 2, 3), (64, 27)),
        ((3, 3, 32, 64), (0, 2, 1, 3), (96, 192)),
        ((2, 0, 3), (0, 1, 2), (2, 0)),
        ((1, 1, 1), (0, 1, 2), (1, 1)),
    ],
)
def test_matrix_of_named_shapes(shape: tuple[int, ...], order: tuple[int, ...], sides: tuple[int, int]):
    assert (matrix_order(shape), matrix(shape)) == (order, sides)
    assert in_order(shape) == tuple(range(len(shape)))


def test_squeeze_of_named_shapes():
    assert [squeeze(s) for s in ((), (1, 1), (1, 5, 1), (0, 1))] == [(), (), (5,), (0,)]
