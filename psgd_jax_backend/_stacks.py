"""How the step of one tensor is mapped over many: over the layers of a leaf, over leaves of one shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psgd import pipeline
from psgd.arrays import Factors
from psgd.pipeline import Plan, Recipe, State
from psgd_jax_backend._sharding import Spread
from psgd_jax_backend._state import Leaf, Tree

# A leaf so many times as large as its factors is not gathered.
LONG = 8


class Layering(NamedTuple):
    """How the step of one tensor is mapped over many; the numbers are the same. See `scale_by_psgd`."""

    stack: bool = True
    scanned_layers: Tree = None
    lax_map_scanned_layers: bool = False
    lax_map_batch_size: int = 8
    spread_over: str | tuple[str, ...] | None = None

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

    def over(self, one: Callable[..., Any], *stacks: Any) -> Any:
        """A function of one tensor, mapped over stacks of them."""
        if self.lax_map_scanned_layers and all(x.size for x in jax.tree.leaves(stacks)):
            # A batch of one would keep an axis of length one, which costs XLA several stacks of memory.
            size = None if self.lax_map_batch_size == 1 else self.lax_map_batch_size
            return jax.lax.map(lambda xs: one(*xs), stacks, batch_size=size)
        return jax.vmap(one)(*stacks)


def choose(flag: Any, then: Callable[[Any], Any], otherwise: Callable[[Any], Any], operand: Any) -> Any:
    """A decision of the plan: settled here where it is known, outside of `jax.jit` or as a Python boolean."""
    if isinstance(flag, jax.core.Tracer):
        return jax.lax.cond(flag, then, otherwise, operand)
    return pipeline.branch(bool(flag), then, otherwise, operand)


class Stepper(NamedTuple):
    """`pipeline.step` of all leaves, with what is the same for all of them."""

    recipe: Recipe
    plan: Plan
    layering: Layering
    spread: Spread

    def step(
        self,
        gradients: list[Leaf],
        states: list[State],
        scanned: list[bool],
        pair: tuple[list[Leaf], list[Leaf]] | None,
    ) -> tuple[list[Leaf], list[State]]:
        """One step of all leaves; those of one shape and dtype in one call."""
        pairs: list[Any] = [None] * len(gradients) if pair is None else list(zip(*pair, strict=True))
        buckets: dict[Any, list[int]] = {}
        for i, g in enumerate(gradients):
            buckets.setdefault((g.shape, g.dtype) if self.layering.stack and not scanned[i] else i, []).append(i)
        done: list[Any] = [None] * len(gradients)
        for indices in buckets.values():
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

    def _alone(self, g: Leaf, state: State, pair: Any) -> tuple[Leaf, State]:
        """Of a leaf by itself: whole on every device, as its factors have to be; one that is much larger than they
        are, such as an embedding, stays split, and sums are exchanged instead."""
        whole, factors = self.spread.whole, state.factors
        if g.size <= LONG * sum(q.size for q in factors.Q):
            return self.spread.everywhere(self._one, g, state, pair)
        u, new = self._one(g, state._replace(factors=whole(factors)), pair)
        return u, new._replace(factors=whole(new.factors))

    def _one(self, g: Leaf, state: State, pair: Any) -> tuple[Leaf, State]:
        return pipeline.step(self.recipe, self.plan, g, state, choose=choose, pair=pair)

    def _each(self, one: Callable[..., Any], *stacks: Any) -> Any:
        """A function of one tensor, of every layer where it is."""
        return self.spread.each(partial(self.layering.over, one), *stacks)

    def _layers(self, g: Leaf, state: State, pair: Any) -> tuple[Leaf, State]:
        """Of a leaf that stacks layers."""
        if not g.size:
            return self.layering.over(self._one, g, state, pair)
        apart, together = self.spread.apart, self.spread.together
        m, factors = apart(state.momentum), apart(state.factors, at_once=True)
        u, new = self._each(self._one, apart(g), State(m, factors), apart(pair))
        if g.shape[0] % self.spread.devices:
            return together((u, new), g.shape[0])
        return together(u), new._replace(momentum=together(new.momentum))  # factors stay where they are

    def _leaves(self, gradients: list[Leaf], states: list[State], pairs: list[Any]) -> list[tuple[Leaf, State]]:
        """Of several equal leaves. The factors are put together where they are needed and taken apart only where they
        are fitted: a step that leaves them as they are leaves them where they are."""
        recipe, plan, n = self.recipe, self.plan, len(gradients)

        def stacked(leaves: list[Any]) -> Any:
            return self.spread.apart(jax.tree.map(lambda *xs: jnp.stack(xs), *leaves))

        def unstacked(stack: Any) -> list[Any]:
            whole = self.spread.together(stack, n)
            return [jax.tree.map(lambda x, k=k: x[k], whole) for k in range(n)]

        observe = partial(pipeline.observed, recipe, plan)
        momentum, seen, smooth = self._each(observe, stacked(gradients), stacked([s.momentum for s in states]))

        def directed(factors: Factors) -> Leaf:
            return self._each(partial(pipeline.directed, recipe), factors, smooth)

        def fitted(leaves: list[Factors]) -> tuple[list[Factors], Leaf]:
            def one(x: Leaf, own: Factors, pair: Any) -> Factors:
                return pipeline.fitted(recipe, plan, x, own, given=pair)

            old = stacked(leaves)
            new = self._each(one, seen, old, stacked(pairs))
            return unstacked(new), directed(new if recipe.fit_first else old)

        def kept(leaves: list[Factors]) -> tuple[list[Factors], Leaf]:
            return leaves, directed(stacked(leaves))

        factors, u = choose(plan.fit, fitted, kept, [s.factors for s in states])
        momenta = [None] * n if momentum is None else unstacked(momentum)
        return [(u, State(m, f)) for u, m, f in zip(unstacked(u), momenta, factors, strict=True)]
