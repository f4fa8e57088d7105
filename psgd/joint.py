"""All parameters as one vector, for preconditioners that have one set of factors for all: how they join and split.

The factors of such a preconditioner have a row for each entry of the vector; the rows of a parameter's entries are kept
in the state of that parameter.
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
    """At least one tensor as one vector, (n,): one after the other, row-major, in the widest of their dtypes."""
    xp = namespace(tensors[0])
    return xp.concat([xp.reshape(x, (-1,)) for x in tensors])


def split(vector: Array, shapes: Sequence[Shape]) -> list[Array]:
    """The inverse of `join`, but for the dtypes: a vector, (n,), as tensors of these shapes, n entries in all."""
    xp = namespace(vector)
    return [xp.reshape(x, tuple(shape)) for x, shape in zip(split_rows(vector, shapes), shapes, strict=True)]


def split_rows(rows: Array, shapes: Sequence[Shape]) -> list[Array]:
    """The rows of a vector (n,) or a matrix (n, k) that belong to each of the tensors of these shapes, in order."""
    ends = accumulate((prod(shape) for shape in shapes), initial=0)
    return [rows[start:end, ...] for start, end in pairwise(ends)]


def join_states(states: Sequence[State]) -> State:
    """The state of a joint preconditioner, from the rows that each tensor keeps.

    states: at least one, in the order of the vector. The Lipschitz estimates L are the same in all, and are taken from
    the first.
    """
    xp = namespace(states[0].factors.Q[0])
    momenta = [state.momentum for state in states if state.momentum is not None]
    factors = tuple(xp.concat(list(rows)) for rows in zip(*(state.factors.Q for state in states), strict=True))
    return State(join(momenta) if momenta else None, Factors(factors, states[0].factors.L))


def split_state(state: State, shapes: Sequence[Shape]) -> list[State]:
    """The inverse of `join_states`: each tensor gets its rows, and all get the same L."""
    rows = zip(*(split_rows(q, shapes) for q in state.factors.Q), strict=True)
    momenta = [None] * len(shapes) if state.momentum is None else split(state.momentum, shapes)
    return [State(m, Factors(q, state.factors.L)) for m, q in zip(momenta, rows, strict=True)]
