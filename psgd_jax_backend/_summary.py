"""What a transformation keeps of each parameter and what its update costs, asked before there is any state."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import optax

from psgd import summary as costs
from psgd.hyperparameters import Method
from psgd.summary import ParameterCost, Summary
from psgd_jax_backend._state import Tree, states

# Who wants to hear what is initialised with which method, in this context; see `summary`.
LISTENERS: ContextVar[tuple[Callable[[Method, Tree, list[bool], int], None], ...]] = ContextVar("listeners", default=())
COUNTER_BYTES = 4  # int32
SKIPS_BYTES = 8  # two of them


def tell_listeners(method: Method, params: Tree, flags: list[bool], more: int) -> None:
    """What `init` says of itself. flags: which leaves stack layers. more: bytes of state that are of no leaf."""
    for listener in LISTENERS.get():
        listener(method, params, flags, more)


def summary(tx: optax.GradientTransformation, params: Tree, state: Tree = None) -> Summary:
    """What a transformation keeps of each parameter and what its update costs; `print` it, or read its rows.

    Args:
        tx: any transformation with a PSGD method in it, in chains, masks and partitions too.
        params: the parameters, or their shapes as `jax.eval_shape` gives them. Nothing is allocated.
        state: the transformation's, to see how many steps were skipped; waits for it.

    Returns:
        a `psgd.summary.Summary`; of other transformations in `tx` it knows nothing.

    Raises:
        ValueError: if there is no PSGD method in `tx`.

    Example:
        >>> import jax.numpy as jnp
        >>> from psgd_jax_backend import kron, summary
        >>> print(summary(kron(), {"w": jnp.zeros((64, 10))}))  # doctest: +SKIP
    """
    lines: list[tuple[Method, ParameterCost]] = []
    counted = 0

    def record(method: Method, params: Tree, flags: list[bool], more: int) -> None:
        nonlocal counted
        parameters = [
            costs.Parameter(
                jax.tree_util.keystr(path, simple=True, separator="/") or "parameter",
                jnp.shape(x),
                jnp.result_type(x).name,
                scanned,
            )
            for (path, x), scanned in zip(jax.tree_util.tree_leaves_with_path(params), flags, strict=True)
        ]
        lines.extend((method, row) for row in costs.parameter_costs(method, parameters))
        counted += costs.counters(method, parameters, COUNTER_BYTES, each=False) + more

    token = LISTENERS.set((*LISTENERS.get(), record))
    try:
        # A function of its own, or JAX would remember what it told last time.
        jax.eval_shape(lambda x: tx.init(x), params)
    finally:
        LISTENERS.reset(token)
    if not lines and not counted:
        raise ValueError("the transformation holds no PSGD method; give one made by psgd_jax_backend, or a chain of it")
    skipped = max(
        (int(method_state.skipped[0]) for method_state in states(state) if method_state.skipped is not None), default=0
    )
    return costs.summary(lines, counted, skipped)
