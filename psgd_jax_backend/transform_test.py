"""The optax transformations: traced once, stable in type, over any tree, and clear about misuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psgd_jax_backend
from psgd.methods import METHODS
from psgd_jax_backend import PSGDState, kron_whiten, procrustes, quad, scale_by_procrustes, scale_by_psgd

ALIASES = {name: getattr(psgd_jax_backend, name) for name in METHODS}
Tree = Any


@pytest.fixture(params=ALIASES.values(), ids=ALIASES)
def alias(request: pytest.FixtureRequest) -> Callable[..., optax.GradientTransformationExtraArgs]:
    return request.param


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


def gradients(params: Tree, step: int) -> Tree:
    """They depend on the step and the parameter's values alone."""
    return jax.tree.map(lambda p: 0.3 * p + normal(p.shape, 100 + step).astype(p.dtype), params)


def run(
    optimizer: optax.GradientTransformation, params: Tree, steps: range, state: Any = None, **extra: Any
) -> tuple[Tree, Any]:
    state = optimizer.init(params) if state is None else state
    update = jax.jit(optimizer.update)
    for t in steps:
        updates, state = update(gradients(params, t), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def close(ours: Tree, theirs: Tree, ulps: float = 16) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        eps = float(jnp.finfo(jax.tree.leaves(ours)[0].dtype).eps)
        assert not x.size or np.abs(x - y).max() <= ulps * eps * np.abs(y).max()


def equal(ours: Tree, theirs: Tree) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), ours, theirs))


def types(state: Any) -> list[tuple]:
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]


# ---- faces ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_names_and_signatures(name: str):
    method = METHODS[name]
    whole, scaling = getattr(psgd_jax_backend, name), getattr(psgd_jax_backend, f"scale_by_{name}")
    assert whole.__name__ == name and scaling.__name__ == f"scale_by_{name}"
    assert {name, f"scale_by_{name}"} <= set(psgd_jax_backend.__all__)
    defaults = {f.name: f.default for f in fields(method)} | {"stack": True}
    shown = {k: p.default for k, p in inspect.signature(scaling).parameters.items()}
    assert shown == {k: v for k, v in defaults.items() if k not in ("lr", "weight_decay")}
    shown = {k: p.default for k, p in inspect.signature(whole).parameters.items()}
    assert next(iter(shown)) == "learning_rate" and shown.pop("learning_rate") == defaults.pop("lr")
    assert shown.pop("weight_decay_mask") is None and shown == defaults
    assert method.summary in whole.__doc__ and whole.__module__ == "psgd_jax_backend"


def test_the_alias_is_the_direction_with_decay_and_learning_rate():
    params = tree()
    whole = procrustes(0.125, weight_decay=0.5)
    parts = optax.chain(scale_by_procrustes(), optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(0.125))
    bare = scale_by_psgd(METHODS["procrustes"]())
    updates = [o.update(gradients(params, 1), o.init(params), params)[0] for o in (whole, parts, bare)]
    assert equal(updates[0], updates[1])
    close(updates[0], jax.tree.map(lambda u, p: -0.125 * (u + 0.5 * p), updates[2], params), ulps=4)


def test_every_method_trains(alias: Callable):
    target = normal((4, 3), 9)
    loss = jax.value_and_grad(lambda p, x: jnp.mean((x @ p["w"] + p["b"] - x @ target) ** 2))
    optimizer = alias(0.1, weight_decay=0.0)

    @jax.jit
    def step(carry: tuple, x: jax.Array) -> tuple:
        params, state = carry
        value, g = loss(params, x)
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = {"w": normal((4, 3)), "b": normal((3,))}
    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), normal((150, 16, 4), 5))
    assert losses[-1] < 0.01 * losses[0]


# ---- tracing and types ----------------------------------------------------------------------
def test_traced_once(alias: Callable):
    optimizer, params = alias(), tree()
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for t in range(105):
        updates, state = update(jax.tree.map(lambda p: p * (1 + t), params), state, params)
    assert update._cache_size() == 1
    assert int(optax.tree.get(state, "count")) == 105
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"dtype": "float32"}], ids=str)
def test_state_keeps_its_type_from_the_start(alias: Callable, options: dict, dtype: str):
    if alias is kron_whiten and "dtype" in options:
        options = {"preconditioner_update_probability": 0.5}
    optimizer, params = alias(**options), tree(dtype)
    states = [optimizer.init(params)]
    assert types(states[0]) == types(jax.eval_shape(optimizer.init, params))
    assert types(states[0]) == types(jax.jit(optimizer.init)(params))
    for call in (optimizer.update, jax.jit(optimizer.update)):
        updates, state = call(gradients(params, 1), states[-1], params)
        states.append(state)
        assert types(updates) == [(x.shape, x.dtype, False) for x in jax.tree.leaves(params)]
    assert all(types(s) == types(states[0]) for s in states)
    assert all(jax.tree.structure(s) == jax.tree.structure(states[0]) for s in states)
    assert not any(weak for *_, weak in types(states[0]))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(states[-1]))


def test_state_fits_scan_and_cond(alias: Callable):
    optimizer, params = alias(0.01), tree()
    loop, loop_state = run(optimizer, params, range(1, 4))
    grads = [gradients(params, 0)]

    def body(carry: tuple, t: jax.Array) -> tuple:
        params, state = carry
        updates, state = jax.lax.cond(
            t > 0, lambda s: optimizer.update(grads[0], s, params), lambda s: (params, s), state
        )
        return (optax.apply_updates(params, updates), state), None

    (ours, state), _ = jax.lax.scan(body, (params, optimizer.init(params)), jnp.arange(1, 4))
    for _ in range(3):
        updates, loop_state = optimizer.update(grads[0], loop_state, loop)
    assert types(state) == types(loop_state) and int(optax.tree.get(state, "count")) == 3


def test_half_precision_parameters_keep_their_dtype_beside_wide_factors():
    params = tree("bfloat16")
    optimizer = scale_by_procrustes(dtype="float32")
    updates, state = optimizer.update(gradients(params, 1), optimizer.init(params), params)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves((state.Q, state.L, state.momentum)) if x.size} == {"float32"}


def test_updates_take_the_dtype_of_parameters_else_of_gradients():
    params, grads = tree("bfloat16"), tree("float32")  # optax.MultiSteps hands over such gradients
    optimizer = procrustes()
    for given, wanted in ((params, "bfloat16"), (None, "float32")):
        decayless = procrustes(weight_decay=0.0) if given is None else optimizer
        updates, _ = decayless.update(grads, decayless.init(grads), given)
        assert {x.dtype.name for x in jax.tree.leaves(updates)} == {wanted}


@pytest.mark.parametrize("x64", [False, True])
def test_float32_is_the_same_with_x64_on(alias: Callable, x64: bool):
    wide = []
    for enabled in (False, x64):
        with jax.enable_x64(enabled):
            params, state = run(alias(0.01), tree(), range(4))
            wide.append((params, state))
            assert {x.dtype.name for x in jax.tree.leaves((params, state)) if x.size} == {"float32", "int32"}
    close(wide[0][0], wide[1][0])


def test_float64_throughout_with_x64(alias: Callable):
    with jax.enable_x64(True):
        params, state = run(alias(0.01), tree("float64"), range(3))
        assert {x.dtype.name for x in jax.tree.leaves((params, state)) if x.size} == {"float64", "int32"}


def test_donated_state_may_be_reused(alias: Callable):
    optimizer, params = alias(), tree()
    update = jax.jit(optimizer.update, donate_argnums=1)
    state = optimizer.init(params)
    for t in range(3):
        _, state = update(gradients(params, t), state, params)
    assert int(optax.tree.get(state, "count")) == 3


# ---- trees ----------------------------------------------------------------------------------
TREES = {
    "empty": {},
    "nothing": None,
    "none": {"a": None},
    "one array": jnp.ones((3, 2)),
    "no elements": [jnp.zeros((0,)), jnp.zeros((2, 0))],
    "scalars": (jnp.ones(()), jnp.ones((1,)), jnp.ones((1, 1))),
    "five axes": jnp.ones((2, 3, 1, 2, 3)),
    "named": optax.EmptyState(),
}


@pytest.mark.parametrize("params", TREES.values(), ids=TREES)
def test_any_tree(alias: Callable, params: Tree):
    optimizer = alias(weight_decay=0.1)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert types(updates) == [(x.shape, x.dtype, False) for x in jax.tree.leaves(params)]
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))


def test_state_is_a_tree_as_the_parameters():
    params = tree()
    state = scale_by_procrustes().init(params)
    assert isinstance(state, PSGDState) and jax.tree.structure(state.momentum) == jax.tree.structure(params)
    assert [q.shape for q in state.Q["b"][0]] == [(4,), (3, 3)] and len(state.L["b"][0]) == 2
    assert state.Q["b"][1] is None and state.Q["c"][1] == () and state.Q["c"][0][0].shape == ()


def test_masked_leaves_are_left_out(alias: Callable):
    params = {"keep": normal((4, 3)), "skip": jnp.arange(3)}
    masked = optax.masked(alias(weight_decay=0.0), {"keep": True, "skip": False})
    grads = {"keep": normal((4, 3), 1), "skip": jnp.ones(3, jnp.int32)}
    updates, state = jax.jit(masked.update)(grads, masked.init(params), params)
    alone, _ = alias(weight_decay=0.0).update(grads["keep"], alias(weight_decay=0.0).init(params["keep"]), params["keep"])
    assert equal(updates["skip"], grads["skip"])
    close(updates["keep"], alone)
    assert sum(x.size for x in jax.tree.leaves(state)) <= 12 + 4 + 9 + 2 + 1


def test_partitions(alias: Callable):
    params = tree()
    labels = jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "rest", params)
    optimizer = optax.partition({"matrix": alias(0.01), "rest": optax.sgd(0.1)}, labels)
    after, _ = run(optimizer, params, range(2))
    assert jax.tree.structure(after) == jax.tree.structure(params) and not equal(after, params)


def test_decay_by_mask():
    params = {"w": normal((4, 3)), "b": normal((3,))}
    grads = jax.tree.map(jnp.zeros_like, params)
    for mask in ({"w": True, "b": False}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)):
        optimizer = procrustes(0.1, weight_decay=0.5, weight_decay_mask=mask)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        close(updates["w"], -0.05 * params["w"], ulps=2)
        assert not updates["b"].any()
    full = procrustes(0.1, weight_decay=0.5)
    assert full.update(grads, full.init(params), params)[0]["b"].any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stacks_step_as_single_leaves_do(alias: Callable, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        runs = [run(alias(0.01, stack=stack), tree(dtype), range(4)) for stack in (True, False)]
        close(runs[0][0], runs[1][0])
        close(runs[0][1], runs[1][1], ulps=64)


def test_an_ensemble_under_vmap_is_its_members(alias: Callable):
    optimizer = alias(0.01)
    members = [tree(), jax.tree.map(lambda p: 2 * p + 1, tree())]
    both = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    state = jax.vmap(optimizer.init)(both)
    for t in range(3):
        grads = jax.vmap(partial(gradients, step=t))(both)
        updates, state = jax.jit(jax.vmap(optimizer.update))(grads, state, both)
        both = optax.apply_updates(both, updates)
    for i, member in enumerate(members):
        close(jax.tree.map(lambda x, i=i: x[i], both), run(optimizer, member, range(3))[0])


def test_order_of_leaves_does_not_matter(alias: Callable):
    leaves = jax.tree.leaves(tree())
    forth, _ = run(alias(0.01), leaves, range(3))
    back, _ = run(alias(0.01), leaves[::-1], range(3))
    close(forth, back[::-1])


# ---- learning rates and other arguments -----------------------------------------------------
def test_a_schedule_is_a_learning_rate(alias: Callable):
    params = tree()
    schedule = optax.piecewise_constant_schedule(0.5, {2: 0.5, 3: 0.5})
    scheduled, plain = alias(schedule, weight_decay=0.1), alias(1.0, weight_decay=0.1)
    states = [o.init(params) for o in (scheduled, plain)]
    for t, rate in enumerate((0.5, 0.5, 0.25, 0.125)):
        pairs = [jax.jit(o.update)(gradients(params, t), s, params) for o, s in zip((scheduled, plain), states, strict=True)]
        states = [s for _, s in pairs]
        close(pairs[0][0], jax.tree.map(lambda u, rate=rate: rate * u, pairs[1][0]), ulps=4)


def test_a_traced_learning_rate():
    params = tree()

    @jax.jit
    def update(rate: jax.Array) -> Tree:
        optimizer = procrustes(rate)
        return optimizer.update(gradients(params, 1), optimizer.init(params), params)[0]

    close(update(0.5), jax.tree.map(lambda u: 0.5 * u, update(1.0)), ulps=4)


def test_foreign_arguments_are_ignored(alias: Callable):
    params = tree()
    ours, _ = run(alias(0.01), params, range(2), value=jnp.ones(()))
    assert equal(ours, run(alias(0.01), params, range(2))[0])


def test_decay_needs_parameters():
    params = tree()
    with pytest.raises(ValueError, match="params"):
        procrustes().update(params, procrustes().init(params))


def test_runs_repeat_and_seeds_differ():
    params = tree()
    runs = [run(kron_whiten(0.01, seed=seed, damping=0.1), params, range(3))[0] for seed in (0, 0, 1)]
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


def test_nothing_is_printed(alias: Callable, capfd: pytest.CaptureFixture):
    run(alias(), tree(), range(2))
    assert capfd.readouterr() == ("", "")


# ---- misuse ---------------------------------------------------------------------------------
BAD_LEAVES = [
    (quad, jnp.ones(2, jnp.int32), r"quad needs floating-point parameters; \['w'\] is int32"),
    (quad, jnp.ones(2, bool), r"quad needs floating-point parameters; \['w'\] is bool"),
    (quad, 3, r"quad needs floating-point parameters; \['w'\] is int32"),
    (quad, jnp.ones(2, jnp.complex64), r"quad does not support complex parameters; \['w'\] is complex64"),
    (kron_whiten, jnp.ones(2, jnp.int32), r"kron_whiten needs floating-point parameters; \['w'\] is int32"),
]


@pytest.mark.parametrize(("alias_", "leaf", "text"), BAD_LEAVES)
def test_a_wrong_leaf_is_refused(alias_: Callable, leaf: Any, text: str):
    optimizer = alias_(weight_decay=0.0)
    with pytest.raises(TypeError, match=text) as caught:
        optimizer.init({"w": leaf})
    assert "\n" not in str(caught.value)
    good = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=text):
        optimizer.update({"w": leaf}, optimizer.init(good), good)


def test_complex_leaves_where_the_method_takes_them():
    params = {"w": normal((4, 3)) + 1j * normal((4, 3), 1), "v": normal((5,)) + 0j}
    optimizer = kron_whiten(0.05)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(200):
        updates, state = update(jax.tree.map(lambda p: 2 * p, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(jnp.abs(p).max() < 0.3 for p in params.values())
    assert all(x.dtype == jnp.complex64 for x in jax.tree.leaves(updates))


BAD_GRADIENTS = [
    ({"w": jnp.ones((3, 2))}, ValueError, r"the gradient of \['w'\] has shape \(3, 2\), its state belongs to another"),
    ({"w": jnp.ones(())}, ValueError, r"the gradient of \['w'\] has shape \(\), its state belongs to another"),
    ({"w": jnp.ones((2, 3)), "v": jnp.ones(2)}, ValueError, ""),
    ({}, ValueError, ""),
]


@pytest.mark.parametrize(("grads", "kind", "text"), BAD_GRADIENTS)
def test_a_wrong_gradient_is_refused(alias: Callable, grads: Tree, kind: type[Exception], text: str):
    params = {"w": jnp.ones((2, 3))}
    optimizer = alias(weight_decay=0.0)
    for call in (optimizer.update, jax.jit(optimizer.update)):
        with pytest.raises(kind, match=text):
            call(grads, optimizer.init(params), params if len(grads) == 1 else None)


BAD_HYPERPARAMETERS = [
    ({"learning_rate": -1.0}, r"lr=-1\.0 must lie in \[0, inf\)"),
    ({"learning_rate": float("nan")}, r"lr=nan must lie in \[0, inf\)"),
    ({"momentum": 1.0}, r"momentum=1\.0 must lie in \[0, 1\)"),
    ({"weight_decay": float("nan")}, r"weight_decay=nan must lie in \[0, inf\)"),
    ({"dtype": "int8"}, "dtype='int8' must be None or one of bfloat16"),
    ({"dtype": jnp.int8}, "dtype='int8' must be None or one of bfloat16"),
    ({"max_size_dense": 0}, r"max_size_dense=0 must lie in \[1, inf\]"),
    ({"b1": 0.9}, "unknown hyperparameter 'b1'; it has lr, weight_decay, "),
]


@pytest.mark.parametrize(("options", "text"), BAD_HYPERPARAMETERS)
def test_a_wrong_hyperparameter_is_refused(options: dict, text: str):
    with pytest.raises(ValueError, match=f"procrustes: {text}") as caught:
        procrustes(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.xfail(strict=True, reason="lr is checked, and then the default learning_rate is used")
@pytest.mark.parametrize("make", [procrustes, scale_by_procrustes])
def test_what_is_not_in_the_signature_is_refused(make: Callable):
    with pytest.raises((TypeError, ValueError), match="lr"):
        make(lr=0.5)


def test_float64_gradients_without_x64_are_float32():
    params = {"w": np.ones((2, 3))}
    optimizer = procrustes()
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["w"].dtype == jnp.float32
