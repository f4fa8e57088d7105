"""One preconditioner for all parameters, to which they are one vector, in the order of the tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from psgd.joint import join, split
from psgd.recipe import Recipe
from psgd_jax_backend._per_tensor import Tensors
from psgd_jax_backend._state import Leaf


def as_vector(leaves: Sequence[Leaf]) -> Leaf:
    """All leaves as one vector, in the widest of their dtypes."""
    return join(leaves) if leaves else jnp.zeros((0,))


def as_one(recipe: Recipe, tensors: Tensors, momenta: Sequence[Leaf]) -> Tensors:
    """All tensors as one, with the state that is one already."""
    (state,), pair = tensors.states, tensors.pair
    state = state._replace(momentum=as_vector(momenta) if recipe.momentum else None)
    joined_pair = None if pair is None else ([as_vector(pair[0])], [as_vector(pair[1])])
    return Tensors([as_vector(tensors.gradients)], [state], [False], joined_pair)


def as_leaves(vector: Leaf | None, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """A vector as leaves of these shapes; None as so many."""
    return [None] * len(shapes) if vector is None else split(vector, shapes)
