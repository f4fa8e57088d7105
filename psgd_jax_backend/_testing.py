"""What the tests of the optax transformations share: methods by kind, trees, compiled updates, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psgd_jax_backend
from psgd.methods import METHODS

Tree = Any


def fed(alias: Callable) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """A method that fits Hessian-vector products, given those of the Hessian 0.3 I at every step."""

    def optimizer(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        made = alias(*args, **options)

        def update(grads: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
            v = jax.tree.map(lambda g: jnp.cos(9.0 * g), grads)  # of each number its own, wherever it lies
            pair = {"Hvp": jax.tree.map(lambda x: 0.3 * x, v), "vector": v, "update_preconditioner": True}
            return made.update(grads, state, params, **(pair | extra))

        return optax.GradientTransformationExtraArgs(made.init, update)

    optimizer.__name__ = alias.__name__
    return optimizer


RECIPES = {name: method().recipe() for name, method in METHODS.items()}
ALIASES = {name: getattr(psgd_jax_backend, name) for name in METHODS}
ALIASES = {name: fed(alias) if RECIPES[name].newton else alias for name, alias in ALIASES.items()}
SOME = {n: ALIASES[n] for n in ("procrustes", "kron_whiten", "kron", "affine", "kron_newton", "lra_newton", "xmat")}
RANK = {"lra_whiten": "rank_of_approximation", "lra_newton": "rank_of_approximation"}
RANK["low_rank_approximation"] = "uvd_rank_of_approximation"
some = pytest.mark.parametrize("alias", SOME.values(), ids=SOME)  # where compiling each method would take too long


def rank(name: str, r: int) -> dict[str, int]:
    """The rank of a low-rank method, which must be smaller than the number of parameters."""
    return {RANK[name]: r} if name in RANK else {}


def normal(shape: tuple[int, ...], seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=dtype)


def tree(dtype: str = "float32") -> Tree:
    """Two matrices of one shape, a vector, a scalar, an empty leaf, and places without a leaf."""
    return {
        "a": normal((4, 3), 0, dtype),
        "b": (normal((4, 3), 1, dtype), None, normal((5,), 2, dtype)),
        "c": [normal((), 3, dtype), jnp.zeros((0, 3), dtype)],
        "d": {},
    }


def small(dtype: str = "float32") -> Tree:
    return {"w": normal((4, 3), 0, dtype)}


def gradients(params: Tree, step: int) -> Tree:
    """They depend on the step and the parameter's values alone."""
    return jax.tree.map(lambda p: 0.3 * p + normal(p.shape, 100 + step).astype(p.dtype), params)


@cache
def compiled(alias: Callable, x64: bool = False, **options: Any) -> tuple[optax.GradientTransformation, Callable, list]:
    """An optimizer with its jitted update, shared by the tests since compiling is what takes time; and its traces."""
    optimizer, traces = alias(0.01, **options), []

    @jax.jit
    def update(*args: Tree) -> Tree:
        traces.append(args)
        return optimizer.update(*args)

    return optimizer, update, traces


def close(ours: Tree, theirs: Tree, ulps: float = 16) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs) and types(ours) == types(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        bound = ulps * float(jnp.finfo(x.dtype).eps) if jnp.issubdtype(x.dtype, jnp.floating) else 0.0
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert not x.size or np.abs(x - y).max() <= bound * np.abs(y).max()


def equal(ours: Tree, theirs: Tree) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), ours, theirs))


def types(state: Any) -> list[tuple]:
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]


def dtypes(*trees: Tree) -> set[str]:
    return {x.dtype.name for x in jax.tree.leaves(trees) if x.size}


TAKE_MASK = ("affine", "xmat", "low_rank_approximation")
