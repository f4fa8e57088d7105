"""What is done about gradients that are not finite, in JAX's terms: nothing is raised inside of `jax.jit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from psgd.hyperparameters import Method
from psgd.nonfinite import MAX_SKIPS, counted, not_finite, too_many
from psgd_jax_backend._state import Leaf, Path, PSGDState, Tree, states


class Guard(NamedTuple):
    """What to do about gradients that are not finite; see `scale_by_psgd`."""

    nonfinite: str = "skip"
    max_skips: int = MAX_SKIPS

    def counters(self) -> Leaf | None:
        """Before the first step."""
        return jnp.zeros(2, jnp.int32) if self.nonfinite == "skip" else None

    def finite(self, method: Method, paths: Sequence[Path], arrays: Sequence[Leaf]) -> Leaf | None:
        """Is every entry finite, or None where nobody looks? Says so where the policy is to raise."""
        filled = [x for x in arrays if x.size]
        if self.nonfinite == "propagate" or not filled:
            return None
        flags = jnp.stack([jnp.isfinite(x).all() for x in filled])
        if self.nonfinite == "skip":
            return jnp.sum(~flags) == 0  # `all` of so many would be worked out anew wherever it is asked
        names = [
            jax.tree_util.keystr(path) or "the parameter" for path, x in zip(paths, arrays, strict=False) if x.size
        ]

        def tell(flags: Leaf) -> None:
            bad = next((name for name, ok in zip(names, flags, strict=False) if not ok), "a Hessian-vector product")
            if not flags.all():
                raise FloatingPointError(not_finite(method.name, bad))

        if isinstance(flags, jax.core.Tracer):
            jax.debug.callback(tell, flags)
        else:
            tell(flags)
        return None

    def skips(self, state: PSGDState, finite: Leaf | None) -> Leaf | None:
        """The counters after a step; too many in a row are an error where that can be seen."""
        if state.skipped is None or finite is None:
            return state.skipped
        total, in_a_row = counted(state.skipped[0], state.skipped[1], (~finite).astype(jnp.int32))
        skipped = jnp.stack([jnp.maximum(total, state.skipped[0]), in_a_row])  # the largest int32 has no next
        if not isinstance(skipped, jax.core.Tracer):
            check_skips(state._replace(skipped=skipped), self.max_skips)
        return skipped


def check_skips(state: Tree, max_skips: int = MAX_SKIPS) -> None:
    """Raise FloatingPointError if an optimizer has skipped `max_skips` steps in a row; waits for its state.

    Inside `jax.jit` nothing can be raised, so call this outside, every so many steps.

    Args:
        state: of any transformation with PSGD methods in it.
        max_skips: how many are too many.

    Raises:
        FloatingPointError: if there were so many.

    Example:
        >>> import jax.numpy as jnp
        >>> from psgd_jax_backend import check_skips, kron
        >>> check_skips(kron().init({"w": jnp.zeros((4, 3))}))
    """
    worst = max(
        (int(method_state.skipped[1]) for method_state in states(state) if method_state.skipped is not None), default=0
    )
    if worst >= max_skips:
        raise FloatingPointError(too_many(worst))
