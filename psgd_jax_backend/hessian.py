"""Gradients and Hessian-vector products in JAX: forward over reverse, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psgd import noise
from psgd.calls import step_may_come_second
from psgd_jax_backend._state import Leaf, Tree


def names(tree: Tree) -> list[str]:
    """The names of the leaves: their path, joined by dots; "0" for a single array."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") or "0" for path, _ in paths]


def vector(step_key: Leaf, params: Tree) -> Tree:
    """The vector v: standard normal, for each leaf a function of the step's key and the leaf's name."""
    draws, (leaves, treedef) = noise.Counter(step_key), jax.tree.flatten(params)
    drawn = [
        draws.normal(f"v/{name}", jnp.shape(x), jnp.asarray(x)) for name, x in zip(names(params), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def product(
    loss_fn: Callable[..., Tree], params: Tree, v: Tree, extra: Sequence[Tree] = (), *, has_aux: bool = False
) -> tuple[Any, Tree, Tree]:
    """The loss (with its auxiliary output), the gradient, and H v.

    Of complex parameters both are in the convention df = Re <g, dp>, conjugate to `jax.grad`: what the optimizers take.
    """

    def both(p: Tree) -> tuple[Any, Any]:
        out, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(p, *extra)
        return jax.tree.map(jnp.conj, grads), out

    grads, hvp, out = jax.jvp(both, (params,), (v,), has_aux=True)
    return out, grads, hvp


def gradient(
    loss_fn: Callable[..., Tree], params: Tree, extra: Sequence[Tree] = (), *, has_aux: bool = False
) -> tuple[Any, Tree]:
    """The loss (with its auxiliary output) and the gradient, in the same convention."""
    out, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *extra)
    return out, jax.tree.map(jnp.conj, grads)


@step_may_come_second
def hessian_helper(
    key: Leaf,
    loss_fn: Callable[..., Tree],
    params: Tree,
    loss_fn_extra_args: Sequence[Tree] = (),
    has_aux: bool = False,
    preconditioner_update_probability: float = 1.0,
    *,
    train_step: Leaf | int | None = None,
) -> tuple[Any, Tree, Tree, Tree, Any]:
    """Loss, gradient and, where a coin says so, the product H v of the Hessian with a random vector.

    To be called where one would call `jax.value_and_grad`, under `jit` too. Also takes the order of psgd_jax 0.2.9,
    `(key, train_step, loss_fn, params, ...)`: a second argument that is not callable is the step.

    Args:
        key: a JAX random key (or its two words) of this step. The coin and the vector depend on it, and the vector of a
            parameter on its name: with the same key and name it is the same in PyTorch.
        loss_fn: (params, *loss_fn_extra_args) -> loss, or (loss, aux) with `has_aux`.
        params: the tree of parameters, floating point or complex.
        loss_fn_extra_args: what `loss_fn` takes beside the parameters, as a batch.
        has_aux: `loss_fn` returns an auxiliary output beside the loss.
        preconditioner_update_probability: of an update; 1 always does.
        train_step: number of this step, from 0; the first two then always update. None: the coin alone decides.

    Returns:
        what `loss_fn` returns; the gradient; H v and v, in the tree of the parameters, zeros at steps without an
        update; whether this step updates. The last three are what `update(..., Hvp=, vector=, update_preconditioner=)`
        takes.

    Raises:
        TypeError: a step that is no whole number, or a loss that is no function.

    Equation: H v = d/dt grad(p + t v) at t = 0, forward over reverse, in one pass.

    Source: psgd_jax `hessian_helper`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from psgd_jax_backend import hessian_helper
        >>> loss, grads, hvp, v, update = hessian_helper(jax.random.key(0), lambda p: jnp.sum(p**2), jnp.ones(3))
        >>> bool(jnp.allclose(hvp, 2 * v)), update
        (True, True)
    """
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jnp.asarray(key)
    high, low = jax.lax.bitcast_convert_type(words.astype(jnp.uint32), jnp.int32).reshape(-1)[:2]
    step_key = noise.key(jnp, high, low)
    v = vector(step_key, params)

    def updated() -> tuple[Any, ...]:
        return (*product(loss_fn, params, v, loss_fn_extra_args, has_aux=has_aux), v)

    def skipped() -> tuple[Any, ...]:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return (*gradient(loss_fn, params, loss_fn_extra_args, has_aux=has_aux), zeros, zeros)

    if isinstance(preconditioner_update_probability, (int, float)) and preconditioner_update_probability >= 1:
        return (*updated(), True)
    update = noise.uniform(step_key, "fit") < preconditioner_update_probability
    update = update if train_step is None else update | (jnp.asarray(train_step) < 2)
    return (*jax.lax.cond(update, updated, skipped), update)
