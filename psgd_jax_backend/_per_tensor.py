"""How the step of one tensor is mapped over many: over the layers of a leaf, over leaves of one shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from psgd import pipeline
from psgd.arrays import Factors
from psgd.calls import is_count
from psgd.hyperparameters import plain
from psgd.naming import shown
from psgd.recipe import Plan, Recipe, Schedule, State
from psgd_jax_backend._sharding import Spread
from psgd_jax_backend._state import Flag, Leaf, Pair, Tree

Operand = TypeVar("Operand")
Result = TypeVar("Result")

# A leaf so many times as large as its factors is not gathered.
LONG = 8


MOST_LAYERS = 2**31 - 1  # that JAX can count


def is_tree_of_flags(tree: Tree) -> bool:
    """Is it a tree of booleans, or None?"""
    return all(isinstance(plain(x), bool) for x in jax.tree.leaves(tree))


class Layering(NamedTuple):
    """How the step of one tensor is mapped over many; the numbers are the same. See `scale_by_psgd`."""

    stack: bool = True
    scanned_layers: Tree = None
    lax_map_scanned_layers: bool = False
    lax_map_batch_size: int = 8
    spread_over: str | tuple[str, ...] | None = None

    def complaint(self) -> str | None:
        """Which of them is none, and what it must be."""
        for name in ("stack", "lax_map_scanned_layers"):
            if not isinstance(getattr(self, name), bool):
                return f"{name}={shown(getattr(self, name))} must be True or False"
        if not (is_count(self.lax_map_batch_size) and self.lax_map_batch_size <= MOST_LAYERS):
            return f"lax_map_batch_size={shown(self.lax_map_batch_size)} must be a whole number in [1, {MOST_LAYERS}]"
        if not is_tree_of_flags(self.scanned_layers):
            return (
                f"scanned_layers={shown(self.scanned_layers)} must be None or a tree of booleans, as the parameters or "
                "a prefix of them"
            )
        axes = self.spread_over
        names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
        if not all(isinstance(x, str) for x in names):
            return f"spread_over={shown(axes)} must be None, the name of an axis of the mesh, or a tuple of such names"
        return None

    def flags(self, tree: Tree) -> list[bool]:
        """Is each leaf of a tree a stack of layers?"""
        if self.scanned_layers is None:
            return [False] * len(jax.tree.leaves(tree))
        try:
            flags = jax.tree.leaves(jax.tree.broadcast(self.scanned_layers, tree))
        except ValueError as error:
            raise ValueError(
                f"scanned_layers has another structure than the parameters ({error}); give one boolean for each "
                "parameter, or for each of their subtrees"
            ) from error
        return [bool(flag) for flag in flags]

    def buckets(self, leaves: list[Leaf], scanned: list[bool]) -> list[list[int]]:
        """Which leaves are stepped together."""
        found: dict[Any, list[int]] = {}
        for i, x in enumerate(leaves):
            found.setdefault((x.shape, x.dtype) if self.stack and not scanned[i] else i, []).append(i)
        return list(found.values())

    def over(self, one: Callable[..., Tree], *stacks: Tree) -> Any:
        """A function of one tensor, mapped over stacks of them."""
        if self.lax_map_scanned_layers and all(x.size for x in jax.tree.leaves(stacks)):
            # A batch of one would keep an axis of length one, which costs XLA several stacks of memory.
            size = None if self.lax_map_batch_size == 1 else self.lax_map_batch_size
            return jax.lax.map(lambda xs: one(*xs), stacks, batch_size=size)
        return jax.vmap(one)(*stacks)


def choose(
    flag: Flag, then: Callable[[Operand], Result], otherwise: Callable[[Operand], Result], operand: Operand
) -> Result:
    """A decision of the plan: settled here where it is known, outside of `jax.jit` or as a Python boolean."""
    if isinstance(flag, jax.core.Tracer):
        return jax.lax.cond(flag, then, otherwise, operand)
    return pipeline.branch(bool(flag), then, otherwise, operand)


class Tensors(NamedTuple):
    """What is stepped: gradients, their states, which of them stack layers, and (v, H v) where these are fitted to."""

    gradients: list[Leaf]
    states: list[State]
    scanned: list[bool]
    pair: tuple[list[Leaf], list[Leaf]] | None


class Stepper(NamedTuple):
    """`pipeline.step` of all leaves, with what is the same for all of them."""

    recipe: Recipe
    plan: Plan
    layering: Layering
    spread: Spread
    places: list[Any]

    def step(self, tensors: Tensors) -> tuple[list[Leaf], list[State]]:
        """One step of all leaves; those of one shape and dtype in one call."""
        gradients, states, scanned, pair = tensors
        pairs: list[Tree] = [None] * len(gradients) if pair is None else list(zip(*pair, strict=True))
        done: list[Any] = [None] * len(gradients)
        for indices in self.layering.buckets(gradients, scanned):
            members = [(gradients[i], states[i], pairs[i]) for i in indices]
            if scanned[indices[0]]:
                results = [self._layers(*members[0])]
            elif len(members) == 1 or not gradients[indices[0]].size:
                results = [self._alone(*member) for member in members]
            else:
                results = self._leaves(*map(list, zip(*members, strict=True)))
            for i, result in zip(indices, results, strict=True):
                done[i] = result
        return [u for u, _ in done], [s for _, s in done]

    def started(self, schedule: Schedule, tensors: Tensors) -> tuple[list[State], Leaf]:
        """The states with factors of their automatic scale, which is that of gradients, or of the pair if it is
        fitted; and whether there was anything to take it from."""
        gradients, states, scanned, pair = tensors
        scales_of = partial(pipeline.initial_scales, self.recipe, schedule)
        filled = [i for i, g in enumerate(gradients) if g.size]
        if not filled:
            return states, jnp.ones((), bool)
        scales, known = scales_of(self._sizes(gradients, scanned))
        if pair is not None:
            of_pair, pair_known = scales_of(self._sizes(pair[1], scanned), [pair[0][i] for i in filled])
            scales = [jnp.where(self.plan.fit, x, y) for x, y in zip(of_pair, scales, strict=True)]
            known = jnp.where(self.plan.fit, pair_known, known)
        rescaled, started = partial(pipeline.rescaled, self.recipe), list(states)
        for i, scale in zip(filled, scales, strict=True):
            if scanned[i]:
                started[i] = jax.vmap(rescaled)(states[i], jnp.broadcast_to(scale, gradients[i].shape[:1]))
            else:
                started[i] = rescaled(states[i], scale)
        return started, known

    def _sizes(self, leaves: list[Leaf], scanned: list[bool]) -> list[Leaf]:
        """Sizes of the leaves that have elements, of each layer where they are stacks of them."""

        size = partial(pipeline.size_of, self.recipe)
        sizes: dict[int, Leaf] = {}
        for indices in self.layering.buckets(leaves, scanned):
            filled = [leaves[i] for i in indices if leaves[i].size]
            if len(filled) > 1 and not self.spread.axes:
                sizes |= zip(indices, self._parts(jax.vmap(size)(jnp.stack(filled)), len(filled)), strict=True)
            else:
                one = jax.vmap(size) if scanned[indices[0]] else size
                sizes |= zip(indices, map(one, filled), strict=False)
        return [sizes[i] for i in sorted(sizes)]

    def _alone(self, g: Leaf, state: State, pair: Pair | None) -> tuple[Leaf, State]:
        """Of a leaf by itself: whole on every device, as its factors have to be; one that is much larger than they
        are, such as an embedding, stays split, and sums are exchanged instead."""
        whole, factors = self.spread.replicated, state.factors
        if g.size <= LONG * sum(q.size for q in factors.Q):
            return self.spread.everywhere(self._one, g, state, pair)
        u, new = self._one(g, state._replace(factors=whole(factors)), pair)
        return u, new._replace(factors=whole(new.factors))

    def _one(self, g: Leaf, state: State, pair: Pair | None) -> tuple[Leaf, State]:
        return pipeline.step(self.recipe, self.plan, g, state, choose=choose, pair=pair)

    def _each(self, one: Callable[..., Tree], *stacks: Tree) -> Any:
        """A function of one tensor, of every layer where it is."""
        return self.spread.each(partial(self.layering.over, one), *stacks)

    def _parts(self, stack: Tree, n: int) -> list[Any]:
        """The n parts of stacks."""
        at = partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        return [jax.tree.map(partial(at, index=sum(place)), stack) for place in self.places[:n]]

    def _layers(self, g: Leaf, state: State, pair: Pair | None) -> tuple[Leaf, State]:
        """Of a leaf that stacks layers."""
        if not g.size:
            return self.layering.over(self._one, g, state, pair)
        apart, together = self.spread.apart, self.spread.together
        m, factors = apart(state.momentum), apart(state.factors, at_once=True)
        u, new = self._each(self._one, apart(g), State(m, factors), apart(pair))
        if g.shape[0] % self.spread.devices:
            return together((u, new), g.shape[0])
        return together(u), new._replace(momentum=together(new.momentum))  # factors stay where they are

    def _leaves(self, gradients: list[Leaf], states: list[State], pairs: list[Tree]) -> list[tuple[Leaf, State]]:
        """Of several equal leaves. The factors are put together where they are needed and taken apart only where they
        are fitted: a step that leaves them as they are leaves them where they are."""
        recipe, plan, n = self.recipe, self.plan, len(gradients)

        def stacked(leaves: list[Tree]) -> Any:
            return self.spread.apart(jax.tree.map(lambda *xs: jnp.stack(xs), *leaves))

        def unstacked(stack: Tree) -> list[Any]:
            return self._parts(self.spread.together(stack, n), n)

        # Leaf by leaf: operations that are equal are compiled once, but each slice of a stack is another.
        observed = [pipeline.observe(recipe, plan, g, s.momentum) for g, s in zip(gradients, states, strict=True)]
        momenta, targets, averages = map(list, zip(*observed, strict=True))
        average = stacked(averages)

        def directed(factors: Factors) -> list[Leaf]:
            return unstacked(self._each(partial(pipeline.direct, recipe, plan), factors, average))

        def fitted(leaves: list[Factors]) -> tuple[list[Factors], list[Leaf]]:
            def one(x: Leaf, factors: Factors, pair: Pair | None) -> Factors:
                return pipeline.fit(recipe, plan, x, factors, pair=pair)

            old = stacked(leaves)
            new = self._each(one, average if targets[0] is averages[0] else stacked(targets), old, stacked(pairs))
            return unstacked(new), directed(new if recipe.fit_first else old)

        def kept(leaves: list[Factors]) -> tuple[list[Factors], list[Leaf]]:
            return leaves, directed(stacked(leaves))

        factors, us = choose(plan.fit, fitted, kept, [s.factors for s in states])
        return [(u, State(m, f)) for u, m, f in zip(us, momenta, factors, strict=True)]


def numbers(count: Flag, n: int) -> list[Any]:
    """The numbers below n, each as two of which it is the sum.

    count: of steps, never negative, which the compiler does not know, and so it knows none of these numbers: slices of
    a stack then differ in their arguments alone, and what is equal is compiled once.
    """
    if not isinstance(count, jax.core.Tracer):
        return [(k,) for k in range(n)]
    side = isqrt(n) + 1
    below = jnp.arange(side, dtype=jnp.uint32) + jnp.minimum(count, 0).astype(jnp.uint32)
    ones, many = list(below), list(below * side)
    return [(many[k // side], ones[k % side]) for k in range(n)]
