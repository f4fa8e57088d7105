"""The state of an optimizer in JAX's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from psgd.arrays import Factors
from psgd.joint import split_state
from psgd.recipe import Recipe, State

Leaf = jax.Array
Tree = Any  # of arrays, in any containers
TreeDef = Any  # a `jax.tree_util.PyTreeDef`, which checkers do not know
Path = tuple[Any, ...]  # of a leaf in its tree
Paths = list[tuple[Path, Any]]  # of all leaves, with them
Flag = Leaf | bool  # a decision, which may be traced
Pair = tuple[Leaf, Leaf]  # (v, H v)


_LEAF = jax.tree.structure(0)


class PSGDState(NamedTuple):
    """The state of a method: only arrays.

    Args:
        count: steps done.
        since: steps done after the last fit, or None where the method does not ask.
        skipped: steps that were skipped, in all and in a row, (2,), or None where none are.
        momentum: a tree as the parameters', or None.
        Q: such a tree with a tuple of arrays, one for each factor, in place of every leaf; one such tuple for a
            preconditioner of all parameters.
        L: as Q, the running bounds of its factors.
        P: as Q, or None where it is not kept.
    """

    count: Leaf  # type: ignore[assignment]  # a tuple's method; optax's own states have the name too
    since: Leaf | None
    skipped: Leaf | None
    momentum: Tree
    Q: Tree
    L: Tree
    P: Tree = None


def states(state: Tree) -> list[PSGDState]:
    """The states of PSGD methods in the state of a transformation."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PSGDState))
    return [x for x in leaves if isinstance(x, PSGDState)]


def state_arrays(state: Tree, params: Tree) -> dict[str, Leaf]:
    """The state of a PSGD method as named arrays, as `psgd_torch_backend.state_arrays` names those of PyTorch.

    Args:
        state: of a transformation with one PSGD method in it.
        params: the parameters of that state, or their shapes.

    Returns:
        "NAME/step", "NAME/since" (where the method counts it), "NAME/momentum", "NAME/Q/0", "NAME/L/0" and "NAME/P/0"
        (where it is kept) with a number for each factor, NAME being the path of a parameter, joined by dots, and
        "parameter" of a single array. Of one preconditioner for all parameters each has its rows.

    Raises:
        ValueError: if there is no state of a PSGD method in `state`, or more than one; if it is that of other
            parameters; if two paths come to one name.

    Example:
        >>> import jax.numpy as jnp
        >>> from psgd_jax_backend import kron, state_arrays
        >>> params = {"w": jnp.ones((4, 3))}
        >>> state_arrays(kron().init(params), params)["w/Q/0"].shape
        (4, 4)
    """
    found = states(state)
    if len(found) != 1:
        raise ValueError(f"state_arrays: the state holds {len(found)} PSGD states; give it the state of one method")
    (kept,), (paths, treedef) = found, jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "parameter" for path, _ in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"state_arrays: two parameters are called {twice!r}; give each a name of its own")
    # The factors of one tensor, or of all parameters as one, are arrays in a tuple; others are tuples in a tree.
    joint = isinstance(kept.Q, tuple) and jax.tree_util.all_leaves(kept.Q) and _opened(treedef) != _LEAF
    momenta, parts = checked_states(
        "state_arrays", kept, treedef, joint, "params", "give the params that init was given"
    )
    parts = split_state(parts[0], [x.shape for _, x in paths]) if joint else parts
    arrays: dict[str, Leaf] = {}
    for name, momentum, part in zip(names, momenta, parts, strict=True):
        single = {"step": kept.count, "since": kept.since, "momentum": momentum}
        arrays |= {f"{name}/{kind}": x for kind, x in single.items() if x is not None}
        factors = part.factors._asdict().items()
        arrays |= {f"{name}/{kind}/{i}": x for kind, xs in factors for i, x in enumerate(xs)}
    return arrays


# ---- trees and leaves -------------------------------------------------------------------
def to_trees(
    counters: PSGDState, momenta: Sequence[Leaf | None], states: list[State], treedef: TreeDef, recipe: Recipe
) -> PSGDState:
    """The state of all leaves, with the counters of another."""
    momentum = treedef.unflatten(momenta) if recipe.momentum else None
    kept = Factors._fields if recipe.keeps_p else ("Q", "L")
    if recipe.joint:
        return counters._replace(momentum=momentum, **{name: getattr(states[0].factors, name) for name in kept})
    open_, factors = _opened(treedef), [s.factors for s in states]
    columns = {name: open_.unflatten([getattr(leaf_factors, name) for leaf_factors in factors]) for name in kept}
    return counters._replace(momentum=momentum, **columns)


def _opened(treedef: TreeDef) -> Any:
    """The tree with a leaf in place of each box: a node around one leaf, such as flax's, that says something of the
    parameter alone and may not hold several factors.
    """

    def is_box(x: Tree) -> bool:
        children = jax.tree_util.treedef_children(jax.tree.structure(x))
        container = isinstance(x, (Mapping, Sequence))
        return not container and len(children) == 1 and jax.tree_util.treedef_is_leaf(children[0])

    return jax.tree.structure(jax.tree.map(lambda _: 0, treedef.unflatten([0] * treedef.num_leaves), is_leaf=is_box))


def to_states(state: PSGDState, treedef: TreeDef, joint: bool) -> tuple[list[Any], list[State]]:
    """Momentum of each leaf; the states, of each leaf or of all as one vector (without momentum)."""
    n = treedef.num_leaves
    momenta = [None] * n if state.momentum is None else treedef.flatten_up_to(state.momentum)
    trees = [tree for name in Factors._fields if (tree := getattr(state, name)) is not None]
    columns = [[x] if joint else _opened(treedef).flatten_up_to(x) for x in trees]
    # Some containers of state, such as flax's, give a tuple back as a node of their own.
    factors = [Factors(*(tuple(jax.tree.leaves(x)) for x in row)) for row in zip(*columns, strict=True)]
    owners = [None] if joint else momenta
    return momenta, [State(m, f) for m, f in zip(owners, factors, strict=True)]


def checked_states(
    owner: str,
    state: PSGDState,
    treedef: TreeDef,
    joint: bool,
    whose: str = "the gradients",
    remedy: str = "give update the tree that init was given",
) -> tuple[list[Any], list[State]]:
    """`to_states` of a state that may be of another tree than it must be; whose that is, and the remedy, for errors."""
    try:
        return to_states(state, treedef, joint)
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{owner}: the state is of another tree than {whose} ({said}); {remedy}") from error
