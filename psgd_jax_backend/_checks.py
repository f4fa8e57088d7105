"""What `init` and `update` refuse, in one sentence and before anything is traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psgd import pipeline
from psgd._xp import accumulation_dtype, dtype_name, has_nan, is_array, is_traced, on_host
from psgd.arrays import Dtype, Factors
from psgd.hyperparameters import Method
from psgd.naming import shown
from psgd.recipe import Recipe, State
from psgd.shapes import Shape
from psgd_jax_backend._state import Flag, Leaf, Path, Paths, PSGDState, Tree, TreeDef

INIT = "give the state that `init` of the same settings made for these parameters"


class GivenPair(NamedTuple):
    """(v, H v), leaf by leaf, and whether to fit to them."""

    vector: list[Leaf]
    Hvp: list[Leaf]
    update: Any


def check_leaf(method: Method, path: Path, leaf: Tree, scanned: bool) -> None:
    """Refuse a leaf that the method does not take."""
    dtype, where = jnp.result_type(leaf), jax.tree_util.keystr(path) or "the parameter"
    if scanned and not jnp.ndim(leaf):
        raise ValueError(f"{method.name}: scanned_layers says that {where} stacks layers, but it is a scalar")
    if jnp.issubdtype(dtype, jnp.complexfloating) and not method.complex_parameters:
        raise TypeError(f"{method.name} does not support complex parameters; {where} is {dtype}: split it in two")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{method.name} needs floating-point parameters; {where} is {dtype}: use optax.masked")


def check_parameters(method: Method, paths: Paths, like: Sequence[Tree]) -> None:
    """Refuse parameters that are not those of the gradients."""
    for (path, g), p in zip(paths, like, strict=True):
        if p is None or getattr(p, "shape", ()) != jnp.shape(g):
            raise ValueError(
                f"{method.name}: expected a parameter of shape {jnp.shape(g)} at {jax.tree_util.keystr(path)}, as its "
                f"gradient has, found {getattr(p, 'shape', p)}; give update the trees that init was given"
            )


def check_pair(
    method: Method, paths: Paths, treedef: TreeDef, hvp: Tree, vector: Tree, update_preconditioner: Flag | None
) -> GivenPair | None:
    """The Hessian-vector products that `update` was given, or None; refused where they do not go together."""
    arguments = {"Hvp": hvp, "vector": vector, "update_preconditioner": update_preconditioner}
    missing = [name for name, value in arguments.items() if value is None]
    if len(missing) == len(arguments):
        if method.recipe().newton:
            raise ValueError(
                f"{method.name} fits Hessian-vector products; give update Hvp=, vector= and update_preconditioner=, "
                "as hessian_helper returns them"
            )
        return None
    if missing:
        raise ValueError(f"{method.name}: {missing[0]} is missing; Hvp, vector and update_preconditioner go together")
    vs, hs = (list(map(jnp.asarray, treedef.flatten_up_to(tree))) for tree in (vector, hvp))
    for (path, g), v, h in zip(paths, vs, hs, strict=True):
        if not jnp.shape(g) == v.shape == h.shape:
            raise ValueError(
                f"{method.name}: vector and Hvp of {jax.tree_util.keystr(path)} have shapes {v.shape} and {h.shape}, "
                f"its gradient {jnp.shape(g)}; give what hessian_helper returns for the same parameters"
            )
    return GivenPair(vs, hs, update_preconditioner)


# ---- state --------------------------------------------------------------------------------
def check_record(method: Method, recipe: Recipe, state: object, leaves: int) -> None:
    """Refuse the state of another optimizer, and counters that count nothing. leaves: of the gradients."""
    if not isinstance(state, PSGDState):
        raise ValueError(f"{method.name}: the state is a {type(state).__name__} and not a PSGDState; {INIT}")
    if recipe.keeps_p != (state.P is not None):
        has = "has no P" if recipe.keeps_p else "has P"
        raise ValueError(
            f"{method.name}: keep_p={recipe.keeps_p}, but the state {has}; give the state of an `init` with the same "
            "keep_p"
        )
    wanted = {"momentum": recipe.momentum, "since": method.schedule().counts}
    for name, is_wanted in wanted.items() if leaves else ():
        if is_wanted != (getattr(state, name) is not None):
            has = "no" if is_wanted else "a"
            raise ValueError(f"{method.name}: the state has {has} {name}, as another's has; {INIT}")
    for name, shape in {"count": (), "since": (), "skipped": (2,)}.items():
        x = getattr(state, name)
        if x is None and name != "count":
            continue
        whole = type(x) is int or (is_array(x) and dtype_name(x.dtype).startswith(("int", "uint")))
        if not whole or jnp.shape(x) != shape or (_is_known(x) and on_host(x).min() < 0):
            raise ValueError(f"{method.name}: {name}={shown(x)} in the state must count steps, from 0; {INIT}")


def check_shapes(
    method: Method,
    recipe: Recipe,
    paths: Paths,
    flags: Sequence[bool],
    gradients: Sequence[Leaf],
    momenta: Sequence[Leaf | None],
    states: Sequence[State],
) -> None:
    """Refuse the state of other parameters."""
    shapes = recipe.preconditioner.shapes
    if recipe.joint:
        n = sum(g.size for g in gradients)
        if _is_of_others(gradients, momenta, states[0].factors, shapes((n,))):
            raise ValueError(
                f"{method.name}: the gradients have {n} numbers, the state belongs to others; give update the tree "
                "that init was given"
            )
        return
    for (path, _), g, m, state, scanned in zip(paths, gradients, momenta, states, flags, strict=True):
        layers, shape = (g.shape[:1], g.shape[1:]) if scanned else ((), g.shape)
        if _is_of_others([g], [m], state.factors, ((*layers, *q) for q in shapes(recipe.layout(shape))), layers):
            raise ValueError(
                f"{method.name}: the gradient of {jax.tree_util.keystr(path)} has shape {g.shape}, its state belongs "
                "to another; give update the tree that init was given"
            )


def check_kept(
    method: Method,
    recipe: Recipe,
    paths: Paths,
    like: Sequence[Tree] | None,
    momenta: Sequence[Leaf | None],
    states: Sequence[State],
    *,
    look: bool,
) -> None:
    """Refuse state in other dtypes than `init` makes it in, or with a NaN that is seen without a transfer.

    like: the parameters, where they are given. look: for NaN.
    """
    names = [jax.tree_util.keystr(path) or "the parameter" for path, _ in paths]
    owners = [_computed(method)] * len(names) if like is None else [[jnp.result_type(p)] for p in like]
    for name, m, dtypes in zip(names, momenta, owners, strict=True):
        _check_arrays(method, recipe, name, {"momentum": () if m is None else (m,)}, dtypes, look)
    if recipe.joint:
        joined = _computed(method) if like is None or not names else [_widest([dtypes for (dtypes,) in owners])]
        names, owners = ["all parameters"], [joined]
    for name, state, dtypes in zip(names, states, owners, strict=True):
        _check_arrays(method, recipe, name, state.factors._asdict(), dtypes, look)


def _is_of_others(
    gradients: Sequence[Leaf],
    momenta: Sequence[Leaf | None],
    factors: Factors,
    shapes: Iterable[Shape],
    layers: tuple[int, ...] = (),
) -> bool:
    """Does state belong to other parameters than gradients do, whose factors have some shapes?"""
    moved = [m for m, g in zip(momenta, gradients, strict=True) if m is not None and getattr(m, "shape", 0) != g.shape]
    q, bounds, p = ([getattr(x, "shape", None) for x in xs] for xs in factors)
    return bool(moved) or q != list(shapes) or any(x != layers for x in bounds) or (bool(p) and p != q)


def _check_arrays(
    method: Method,
    recipe: Recipe,
    where: str,
    arrays: Mapping[str, Sequence[object]],
    owners: Sequence[Dtype],
    look: bool,
) -> None:
    """Refuse arrays in dtypes in which none of the owners would keep them, and NaN."""
    for name, xs in arrays.items():
        for x in xs:
            kept = [_kept(recipe, owner)[name] for owner in owners]
            if not is_array(x) or x.dtype not in kept:
                has = x.dtype if is_array(x) else f"a {type(x).__name__}"
                raise ValueError(f"{method.name}: {name} of {where} is {has}, and is kept in {kept[0]}; {INIT}")
            if look and _is_at_hand(x) and has_nan(x):
                raise ValueError(f"{method.name}: {name} of {where} holds a NaN; go back to a checkpoint without one")


@cache
def _kept(recipe: Recipe, owner: Dtype) -> dict[str, Any]:
    """The dtypes in which the state of a parameter is kept, by the parameter's."""

    def arrays(x: Leaf) -> dict[str, Any]:
        work = pipeline.working(recipe, x)
        q = work.astype(recipe.factor_dtype or work.dtype)
        momentum = x.astype(recipe.momentum_dtype or recipe.dtype or x.dtype)
        return {"momentum": momentum, "Q": q, "P": q, "L": jnp.zeros((), accumulation_dtype(work))}

    return {name: x.dtype for name, x in jax.eval_shape(arrays, jax.ShapeDtypeStruct((), owner)).items()}


def _computed(method: Method) -> list[Any]:
    """The dtypes that parameters may have."""
    wide = jnp.result_type(float) == "float64"
    names = ["float32", "bfloat16", "float16", *(["float64"] if wide else [])]
    names += ["complex64", *(["complex128"] if wide else [])] if method.complex_parameters else []
    return list(map(jnp.dtype, names))


def _widest(owners: Sequence[Dtype]) -> Any:
    """The dtype of arrays of such dtypes as one."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*owners)


def _is_known(x: object) -> bool:
    """Are the numbers of an array known: is it not traced, nor on another process?"""
    return not isinstance(x, jax.Array) or (not is_traced(x) and x.is_fully_addressable)


def _is_at_hand(x: object) -> bool:
    """Are the numbers of an array in the memory of the host, and in one piece?"""
    if not isinstance(x, jax.Array):
        return True
    return _is_known(x) and {d.platform for d in x.devices()} == {"cpu"} and len(x.devices()) == 1
