"""All parameters as one vector, for preconditioners that have one set of factors for all: how they join and split.

The factors of such a preconditioner have a row for each number of the vector, and those rows belong to the parameter
that the number is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod

from psgd._xp import namespace
from psgd.arrays import Array, Factors
from psgd.recipe import State
from psgd.shapes import Shape


def join(tensors: Sequence[Array]) -> Array:
    """At least one tensor as one vector, in row-major order, in the widest of their dtypes."""
    xp = namespace(tensors[0])
    return xp.concat([xp.reshape(x, (-1,)) for x in tensors])


def split(vector: Array, shapes: Sequence[Shape]) -> list[Array]:
    """The inverse of `join`, but for the dtypes."""
    xp = namespace(vector)
    return [xp.reshape(x, tuple(shape)) for x, shape in zip(split_rows(vector, shapes), shapes, strict=True)]


def split_rows(rows: Array, shapes: Sequence[Shape]) -> list[Array]:
    """The rows, of a vector or of a matrix, that belong to each of the tensors of these shapes."""
    ends = accumulate((prod(shape) for shape in shapes), initial=0)
    return [rows[start:end, ...] for start, end in pairwise(ends)]


def join_states(states: Sequence[State]) -> State:
    """The state of one preconditioner, from the rows that each tensor keeps; bounds are kept by all, and alike."""
    xp = namespace(states[0].factors.Q[0])
    momenta = [state.momentum for state in states if state.momentum is not None]
    factors = tuple(xp.concat(list(rows)) for rows in zip(*(state.factors.Q for state in states), strict=True))
    return State(join(momenta) if momenta else None, Factors(factors, states[0].factors.L))


def split_state(state: State, shapes: Sequence[Shape]) -> list[State]:
    """The inverse of `join_states`."""
    rows = zip(*(split_rows(q, shapes) for q in state.factors.Q), strict=True)
    momenta = [None] * len(shapes) if state.momentum is None else split(state.momentum, shapes)
    return [State(m, Factors(own, state.factors.L)) for m, own in zip(momenta, rows, strict=True)]
