"""Shapes keep their size and the order of their axes."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from operator import mul

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.shapes import as_is, merge, squeeze

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


def test_squeeze_of_named_shapes():
    assert [squeeze(s) for s in ((), (1, 1), (1, 5, 1), (0, 1))] == [(), (), (5,), (0,)]
