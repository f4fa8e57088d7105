"""The optax transformations: traced once, stable in type, over any tree, and clear about misuse."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import psgd_jax_backend
import psgd_torch_backend
from psgd.methods import METHODS
from psgd_jax_backend import (
    PSGDState,
    affine,
    hessian_helper,
    kron,
    kron_whiten,
    kwns4,
    lra,
    lra_whiten,
    procrustes,
    quad,
    scale_by_affine,
    scale_by_kron,
    scale_by_kwns4,
    scale_by_procrustes,
    scale_by_psgd,
    xmat,
)
from psgd_jax_backend._testing import (
    ALIASES,
    RECIPES,
    TAKE_MASK,
    Tree,
    close,
    compiled,
    dtypes,
    equal,
    gradients,
    normal,
    rank,
    small,
    some,
    tree,
    types,
)

pytestmark = pytest.mark.xdist_group("jax updates")  # what `compiled` keeps is compiled in one worker alone


OF_LEAVES = {name: alias for name, alias in ALIASES.items() if not RECIPES[name].joint}
of_leaves = pytest.mark.parametrize("alias", OF_LEAVES.values(), ids=OF_LEAVES)


@pytest.fixture(params=ALIASES.values(), ids=ALIASES)
def alias(request: pytest.FixtureRequest) -> Callable[..., optax.GradientTransformationExtraArgs]:
    return request.param


def run(made: tuple, params: Tree, steps: range) -> tuple[Tree, Any]:
    optimizer, update, _ = made
    state = optimizer.init(params)
    for t in steps:
        updates, state = update(gradients(params, t), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# ---- functions ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_names_and_signatures(name: str):
    method = METHODS[name]
    whole, scaling = getattr(psgd_jax_backend, name), getattr(psgd_jax_backend, f"scale_by_{name}")
    assert whole.__name__ == name and scaling.__name__ == f"scale_by_{name}"
    assert {name, f"scale_by_{name}"} <= set(psgd_jax_backend.__all__)
    defaults = {f.name: f.default for f in fields(method)} | {"stack": True, "scanned_layers": None}
    defaults |= {"lax_map_scanned_layers": False, "lax_map_batch_size": 8, "spread_over": None}
    defaults |= {"nonfinite": "skip", "max_skips": 10}
    if method().recipe().joint:
        del defaults["scanned_layers"]  # which is refused
    shown = {k: p.default for k, p in inspect.signature(scaling).parameters.items()}
    assert shown == {k: v for k, v in defaults.items() if k not in ("lr", "weight_decay")}
    shown = {k: p.default for k, p in inspect.signature(whole).parameters.items()}
    assert next(iter(shown)) == "learning_rate" and shown.pop("learning_rate") == defaults.pop("lr")
    assert shown.pop("mask" if name in TAKE_MASK else "weight_decay_mask") is None and shown == defaults
    assert method.summary in whole.__doc__ and whole.__module__ == "psgd_jax_backend"


def test_lra_is_low_rank_approximation():
    long, params = psgd_jax_backend.low_rank_approximation, small()
    assert lra.__name__ == "lra" and "lra" in psgd_jax_backend.__all__
    assert lra.__doc__.replace("lra", long.__name__) == long.__doc__.replace("lra", long.__name__)
    assert inspect.signature(lra) == inspect.signature(long)

    @jax.jit
    def both(grads: Tree) -> list[Tree]:
        made = [alias(0.1, uvd_rank_of_approximation=2) for alias in (lra, long)]
        return [o.update(grads, o.init(params), params)[0] for o in made]

    assert equal(*both(params))


def test_the_alias_is_the_direction_with_decay_and_learning_rate():
    params = small()

    @jax.jit
    def three(grads: Tree) -> list[Tree]:
        whole = procrustes(0.125, weight_decay=0.5)
        parts = [scale_by_procrustes(), optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(0.125)]
        bare = scale_by_psgd(METHODS["procrustes"]())
        return [o.update(grads, o.init(params), params)[0] for o in (whole, optax.chain(*parts), bare)]

    whole, parts, bare = three(gradients(params, 1))
    close(whole, parts, ulps=4)
    close(whole, jax.tree.map(lambda u, p: -0.125 * (u + 0.5 * p), bare, params), ulps=4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name: str):
    target = normal((4, 3), 9)
    optimizer = getattr(psgd_jax_backend, name)(optax.linear_schedule(0.5, 0.0, 150), weight_decay=0.0)

    def loss(p: Tree, x: jax.Array) -> jax.Array:
        return jnp.mean((x @ (p["w"] - target)) ** 2)

    def step(carry: tuple, now: tuple) -> tuple:
        (params, state), (key, x), pair = carry, now, {}
        if RECIPES[name].newton:
            value, g, *rest = hessian_helper(key, loss, params, (x,))
            pair = dict(zip(("Hvp", "vector", "update_preconditioner"), rest, strict=True))
        else:
            value, g = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(g, state, params, **pair)
        return (optax.apply_updates(params, updates), state), value

    steps = jax.random.split(jax.random.PRNGKey(0), 150), normal((150, 16, 4), 5)
    _, losses = jax.lax.scan(step, (small(), optimizer.init(small())), steps)
    assert losses[-1] < 0.02 * losses[0]


# ---- tracing and types ----------------------------------------------------------------------
@pytest.mark.contract("jax: purity")
@some
def test_traced_once(alias: Callable):
    optimizer, update, traces = compiled(alias)
    params = tree()
    state = optimizer.init(params)
    run(compiled(alias), params, range(1))
    before, grow = len(traces), jax.jit(lambda p, t: jax.tree.map(lambda x: x * (1.0 + t), p))
    for t in range(0, 2000, 10):
        updates, state = update(grow(params, t), state, params)
    assert len(traces) == before
    assert int(optax.tree.get(state, "count")) == 200
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))


TYPED = [
    (kron_whiten, {"preconditioner_update_probability": 0.5}),
    (kron_whiten, {"momentum": 0.9, "preconditioner_init_scale": 0.1}),
    *((alias, options) for alias in (procrustes, quad) for options in ({}, {"dtype": "float32"})),
    *((kron, {"preconditioner_update_probability": p}) for p in (0.3, lambda t: 1 / t)),
    *((affine, options) for options in ({"nesterov": True}, {"update_global_norm_clip": 1.0})),
]


@pytest.mark.contract("jax: state")
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize(("alias", "options"), TYPED)
def test_state_keeps_its_type_from_the_start(alias: Callable, options: dict, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        optimizer, params = alias(**options), tree(dtype)
        state = optimizer.init(params)
        updates, new = jax.eval_shape(optimizer.update, params, state, params)
        assert types(new) == types(state) == types(jax.eval_shape(optimizer.init, params))
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert types(updates) == [(x.shape, x.dtype, False) for x in jax.tree.leaves(params)]
        assert not any(weak for *_, weak in types(state))
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
        kept = options.get("dtype", dtype)
        assert dtypes(state) == {"int32", kept, "float32" if kept == "bfloat16" else kept}


KEPT = [
    (scale_by_kron, {}, "bfloat16", "bfloat16", "float32"),
    (scale_by_affine, {}, "bfloat16", "bfloat16", "float32"),
    (scale_by_kron, {"mu_dtype": "bfloat16", "precond_dtype": jnp.bfloat16}, "float32", "bfloat16", "bfloat16"),
    (scale_by_kron, {"mu_dtype": jnp.float32}, "float16", "float32", "float32"),
    (scale_by_affine, {"mu_dtype": jnp.float16}, "float32", "float16", "float32"),
]


@pytest.mark.contract("jax: dtypes")
@pytest.mark.parametrize(("scaling", "options", "dtype", "momentum", "factors"), KEPT)
def test_state_is_kept_in_its_dtypes(scaling: Callable, options: dict, dtype: str, momentum: str, factors: str):
    optimizer, params = scaling(**options), tree(dtype)
    state = optimizer.init(params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    assert types(new) == types(state) and dtypes(updates) == {dtype}
    assert [dtypes(x) for x in (new.momentum, new.Q, new.L)] == [{momentum}, {factors}, {"float32"}]
    assert new.count.dtype.name == new.since.dtype.name == "int32"


@pytest.mark.contract("jax: control flow")
def test_state_fits_scan_and_cond():
    (optimizer, update, _), params = compiled(quad), small()

    def body(carry: tuple, t: jax.Array) -> tuple:
        params, state = carry
        updates, state = jax.lax.cond(t > 0, optimizer.update, lambda g, s, p: (g, s), params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, state), _ = jax.lax.scan(body, (params, optimizer.init(params)), jnp.arange(1, 4))
    looped, loop_state = params, optimizer.init(params)
    for _ in range(3):
        updates, loop_state = update(looped, loop_state, looped)
        looped = optax.apply_updates(looped, updates)
    close(after, looped)
    close(state, loop_state, ulps=64)


@pytest.mark.contract("jax: dtypes")
def test_updates_take_the_dtype_of_parameters_else_of_gradients():
    params, grads = tree("bfloat16"), tree("float32")  # optax.MultiSteps hands over such gradients
    optimizer = scale_by_procrustes(dtype="float32")
    for given, wanted in ((params, "bfloat16"), (None, "float32")):
        state = optimizer.init(params)
        updates, new = jax.eval_shape(optimizer.update, grads, state, given)
        assert dtypes(updates) == {wanted} and dtypes(new) == {"float32", "int32"}


@pytest.mark.contract("jax: dtypes")
def test_half_precision_parameters_train_beside_wide_factors():
    made = compiled(quad, dtype="float32")
    params, state = run(made, small("bfloat16"), range(3))
    assert dtypes(params) == {"bfloat16"} and dtypes(state) == {"float32", "int32"}
    assert not equal(params, small("bfloat16"))


@pytest.mark.contract("jax: x64")
@pytest.mark.parametrize("alias", [quad, kron_whiten])
def test_float32_is_the_same_with_x64_on(alias: Callable):
    off = run(compiled(alias), small(), range(4))
    with jax.enable_x64(True):
        on = run(compiled(alias, x64=True), small(), range(4))
        assert dtypes(on) == {"float32", "int32"}
    close(off[0], on[0])
    close(off[1], on[1], ulps=64)


# ---- trees ----------------------------------------------------------------------------------
@pytest.mark.contract("jax: trees")
@pytest.mark.parametrize("params", [{}, None, {"a": None}, [jnp.zeros((0,)), jnp.zeros((2, 0))], optax.EmptyState()])
@pytest.mark.parametrize("name", METHODS)
def test_trees_with_nothing_in_them(name: str, params: Tree):
    optimizer = ALIASES[name](weight_decay=0.0, **rank(name, 0))
    if params is None and RECIPES[name].newton:
        params = (None,)  # products that are None are no products
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert types(updates) == types(params) and int(optax.tree.get(state, "count")) == 1


STRANGE = [
    (quad, (2, 3, 1, 2, 3)),
    (kron_whiten, (1, 3, 2)),
    (kron, (2, 3, 4)),
    (kron, (2, 3, 2, 2)),
    (affine, (2, 3, 4)),
    (affine, (3, 1, 2, 3)),
]


@pytest.mark.contract("jax: trees")
@pytest.mark.parametrize(("alias", "shape"), STRANGE)
def test_strange_shapes(alias: Callable, shape: tuple[int, ...]):
    params = [(jnp.ones(()), jnp.ones((1,)), jnp.ones((1, 1))), {"many": jnp.ones(shape)}]
    optimizer = alias()
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params) and types(updates) == types(params)
    assert all(bool(jnp.isfinite(x).all() and x.any()) for x in jax.tree.leaves(updates))


@pytest.mark.contract("jax: trees")
def test_state_is_a_tree_as_the_parameters():
    params = tree()
    state = scale_by_procrustes().init(params)
    assert isinstance(state, PSGDState) and jax.tree.structure(state.momentum) == jax.tree.structure(params)
    assert [q.shape for q in state.Q["b"][0]] == [(4,), (3, 3)] and len(state.L["b"][0]) == 2
    assert state.Q["b"][1] is None and state.Q["c"][1] == () and state.Q["c"][0][0].shape == ()
    assert state.momentum["a"].shape == (4, 3) and state.since is None


@pytest.mark.contract("jax: trees")
@pytest.mark.contract("jax: wrappers")
def test_masked_leaves_are_left_out():
    optimizer, update, _ = compiled(quad)
    params, grads = {"keep": small(), "skip": jnp.arange(3)}, {"keep": small(), "skip": jnp.ones(3, jnp.int32)}
    masked = optax.masked(optimizer, {"keep": True, "skip": False})
    updates, state = jax.jit(masked.update)(grads, masked.init(params), params)
    alone, lone_state = update(grads["keep"], optimizer.init(params["keep"]), params["keep"])
    assert equal(updates["skip"], grads["skip"]) and types(state) == types(lone_state)
    close(updates["keep"], alone)


@pytest.mark.parametrize(
    ("alias", "name"), [(quad, "weight_decay_mask"), (kron, "weight_decay_mask"), (affine, "mask"), (xmat, "mask")]
)
def test_decay_by_mask(alias: Callable, name: str):
    params = {"w": normal((4, 3)), "b": normal((3,))}
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def decayed() -> list[Tree]:
        masks = ({"w": True, "b": False}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p), None)
        made = [alias(0.1, weight_decay=0.5, **{name: mask}) for mask in masks]
        return [o.update(zeros, o.init(params), params)[0] for o in made]

    first, second, full = decayed()
    close(full, jax.tree.map(lambda p: -0.05 * p, params), ulps=2)
    assert not first["b"].any() and equal(first, second) and equal(first["w"], full["w"])


def test_coupled_decay_is_part_of_the_gradient():
    params, masks = {"w": normal((4, 3)), "b": normal((3,))}, ({"w": True, "b": False}, None)
    grads, some = gradients(params, 1), masks[0]

    @jax.jit
    def steps() -> tuple[list[Tree], list[Tree]]:
        direction = scale_by_kwns4()
        made = [kwns4(0.1, weight_decay=0.5, decoupled_weight_decay=False, weight_decay_mask=m) for m in masks]
        decayed = [
            jax.tree.map(lambda g, p, on: g + 0.5 * on * p, grads, params, mask or {"w": True, "b": True})
            for mask in (some, None)
        ]
        theirs = [direction.update(g, direction.init(params), params)[0] for g in decayed]
        return [o.update(grads, o.init(params), params)[0] for o in made], theirs

    ours, theirs = steps()
    for u, v in zip(ours, theirs, strict=True):
        close(u, jax.tree.map(lambda x: -0.1 * x, v), ulps=4)
    assert not equal(*ours)


@pytest.mark.parametrize("alias", [quad, kron_whiten])
def test_stacks_step_as_single_leaves_do(alias: Callable):
    pair = [normal((4, 3)), normal((4, 3), 1)]
    runs = [run(compiled(alias, stack=stack), pair, range(4)) for stack in (True, False)]
    close(runs[0][0], runs[1][0])
    close(runs[0][1], runs[1][1], ulps=64)


@pytest.mark.parametrize("alias", [quad, kron, affine])
def test_slices_of_a_stack_are_the_same_code_wherever_they_are(alias: Callable):
    """What is known of them makes each a kernel of its own, and those are most of the time that compiling takes."""

    def slices(leaves: int) -> int:
        params = [jax.ShapeDtypeStruct((6, 4), "float32")] * leaves
        optimizer = alias()
        program = jax.jit(optimizer.update).lower(params, jax.eval_shape(optimizer.init, params), params).as_text()
        return program.count("stablehlo.slice")

    assert slices(36) - slices(4) <= 16  # twice the root of them, and not each


@pytest.mark.contract("jax: ensembles")
def test_an_ensemble_under_vmap_is_its_members():
    alias = procrustes  # the one with rotations, and so with the most that could branch
    optimizer, _, _ = compiled(alias)
    members = [small(), {"w": 2 * small()["w"] + 1}]
    both = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    state, update = jax.vmap(optimizer.init)(both), jax.jit(jax.vmap(optimizer.update))
    for t in range(3):
        grads = jax.tree.map(lambda *xs: jnp.stack(xs), *(gradients({"w": w}, t) for w in both["w"]))
        updates, state = update(grads, state, both)
        both = optax.apply_updates(both, updates)
    for i, member in enumerate(members):
        close({"w": both["w"][i]}, run(compiled(alias), member, range(3))[0])


def test_order_of_leaves_does_not_matter():
    leaves = [normal((4, 3)), normal((5,)), normal((4, 3), 1)]
    (forth, _), (back, _) = (run(compiled(quad), x, range(3)) for x in (leaves, leaves[::-1]))
    close(forth, back[::-1])


@pytest.mark.parametrize("name", [*METHODS, "scale_by_kron", "lra"])
def test_the_example_of_the_documentation_runs(name: str):
    example = doctest.DocTestParser().get_doctest(getattr(psgd_jax_backend, name).__doc__, {}, name, None, 0)
    assert len(example.examples) >= 5
    assert doctest.DocTestRunner().run(example).failed == 0


# ---- one preconditioner of all parameters ---------------------------------------------------
WHOLE = {
    "lra_whiten": ([(30, 10), (30, 10), (30,)], [()] * 3),
    "lra_newton": ([(30, 10), (30, 10), (30,)], [()] * 3),
    "dense_newton": ([(30, 30)], [()]),
    "xmat": ([(30,), (30,)], []),
    "low_rank_approximation": ([(30, 10), (30, 10), (30,)], []),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", WHOLE)
def test_the_state_of_a_whole_model(name: str, dtype: str):
    """One tuple of factors for a tree with places without a leaf and with leaves without a number."""
    optimizer, params = ALIASES[name](), tree(dtype)
    state = optimizer.init(params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert types(updates) == [(x.shape, x.dtype, False) for x in jax.tree.leaves(params)]
    assert types(new) == types(state) and jax.tree.structure(new) == jax.tree.structure(state)
    own = optax.tree.get(state, "Q"), optax.tree.get(state, "L")
    assert all(isinstance(x, tuple) for x in own)
    assert tuple([x.shape for x in factors] for factors in own) == WHOLE[name]
    momentum = optax.tree.get(state, "momentum")
    assert (momentum is None) is not RECIPES[name].momentum
    assert momentum is None or types(momentum) == types(params)


@pytest.mark.parametrize("alias", [lra_whiten, xmat, ALIASES["lra_newton"]])
def test_a_whole_model_is_one_vector(alias: Callable):
    params = tree()
    vector = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(params)])
    (ours, state), (theirs, other) = walk(alias(0.1), params), walk(alias(0.1), vector)
    close(jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(ours)]), theirs)
    close(state[0].Q, other[0].Q, ulps=64)


@pytest.mark.contract("jax: dtypes")
@pytest.mark.parametrize("name", WHOLE)
def test_leaves_of_a_whole_model_keep_their_dtypes(name: str):
    params = {"a": normal((4, 3), 0, "bfloat16"), "b": normal((5,), 1)}
    optimizer = ALIASES[name]()
    state = optimizer.init(params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    assert types(updates) == types(params) and types(new) == types(state)
    assert dtypes(optax.tree.get(state, "Q")) == {"float32"}


def test_a_whole_model_is_no_stack_of_layers():
    with pytest.raises(ValueError, match="xmat has one preconditioner for all parameters, no scanned_layers"):
        xmat(0.1, scanned_layers=STACKED)
    compare(walk(xmat(0.1, scanned_layers=False), layers()), walk(xmat(0.1, stack=False), layers()))


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("grads", [{"w": jnp.ones((5, 3))}, {"w": jnp.ones((4, 3)), "v": jnp.ones(2)}, {}])
def test_a_wrong_gradient_of_a_whole_model_is_refused(name: str, grads: Tree):
    params = {"w": jnp.ones((4, 3))}
    optimizer = ALIASES[name](weight_decay=0.0)
    state = optimizer.init(params)
    numbers = rf"{name}: the gradients have {sum(x.size for x in jax.tree.leaves(grads))} numbers, the state"
    with pytest.raises(ValueError, match=rf"{numbers} belongs to others|[Ee]xpected dict|[Dd]ict key mismatch"):
        optimizer.update(grads, state, params if len(grads) == 1 else None)


# ---- leaves that stack layers ---------------------------------------------------------------
def walk(optimizer: optax.GradientTransformation, start: Tree) -> tuple[Tree, Tree]:
    """Parameters and state after three steps down |p|^2, in one compilation."""

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(lambda p: p + 0.1, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=3)[0])(start)


def layers() -> Tree:
    """A stack of three matrices, one of three scalars, and a plain matrix."""
    return {"layers": {"w": normal((3, 4, 2)), "gain": normal((3,), 1)}, "head": normal((4, 2), 2)}


STACKED = {"layers": True, "head": False}  # a prefix of that tree


def apart(stacks: Tree) -> Tree:
    """The same, parameters or state, with each layer in a place of its own."""

    def row(i: int) -> Tree:
        return jax.tree.map(lambda x: x[i], stacks["layers"])

    return {"layers": [row(i) for i in range(3)], "head": stacks["head"]}


def compare(ours: tuple, theirs: tuple, split: Callable[[Tree], Tree] = lambda x: x) -> None:
    """Parameters and state of two walks; `split` makes the places of the first those of the second."""
    close(split(ours[0]), theirs[0])
    for name in ("momentum", "Q", "L"):
        mine, other = (getattr(state[0], name) for _, state in (ours, theirs))
        assert mine is other is None or close(split(mine), other, ulps=64) is None
    close(ours[1][0].count, theirs[1][0].count)


@of_leaves
def test_layers_step_as_leaves_do(alias: Callable):
    compare(walk(alias(0.1, scanned_layers=STACKED), layers()), walk(alias(0.1), apart(layers())), apart)


@pytest.mark.parametrize("size", [2, 8])
def test_layers_step_in_batches(size: int):
    """A stack of layers and a stack of equal leaves, in batches that do not come out even."""
    params = {"layers": normal((3, 4, 2)), "head": [normal((4, 2), i) for i in range(3)]}
    options = {"scanned_layers": STACKED, "preconditioner_update_probability": 0.5}
    batched = kron(0.1, lax_map_scanned_layers=True, lax_map_batch_size=size, **options)
    compare(walk(batched, params), walk(kron(0.1, **options), params))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in WHOLE])
def test_no_layers_and_empty_layers_are_let_be(name: str, batched: bool):
    params = {"none": jnp.zeros((0, 4, 3)), "hollow": jnp.zeros((3, 0, 2)), "points": jnp.zeros((0,))}
    mapping = {"scanned_layers": True, "lax_map_scanned_layers": batched, "lax_map_batch_size": 2}
    optimizer = ALIASES[name](**mapping, **rank(name, 0))
    state = optimizer.init(params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    assert types(updates) == types(params) and types(new) == types(state)


BAD_LAYERS = [
    ({"scanned_layers": {"v": True}}, "scanned_layers has another structure than the parameters"),
    ({"scanned_layers": {"w": True, "s": {"t": True}}}, "scanned_layers has another structure than the parameters"),
    ({"scanned_layers": True}, r"kron: scanned_layers says that \['s'\] stacks layers, but it is a scalar"),
    ({"lax_map_scanned_layers": True, "lax_map_batch_size": 0}, "kron: lax_map_batch_size=0 must be a whole number"),
]


@pytest.mark.parametrize(("options", "text"), BAD_LAYERS)
def test_wrong_layers_are_refused(options: dict, text: str):
    with pytest.raises(ValueError, match=text):
        scale_by_kron(**options).init({"w": jnp.ones((2, 3)), "s": jnp.ones(())})


# ---- flax -----------------------------------------------------------------------------------
@pytest.mark.contract("jax: trees")
@pytest.mark.parametrize("alias", [kron, affine])
def test_boxes_come_back(alias: Callable):
    plain = {"w": normal((4, 2)), "stack": normal((3, 4, 2), 1)}
    boxed = {
        "w": nn.Partitioned(plain["w"], names=("in", "out")),
        "stack": nn.LogicallyPartitioned(plain["stack"], names=(None, "in", "out")),
    }
    optimizer = alias(0.1, scanned_layers={"w": False, "stack": True})
    (params, state), (expected, alone) = walk(optimizer, boxed), walk(optimizer, plain)
    assert jax.tree.structure(params) == jax.tree.structure(boxed)
    assert isinstance(params["stack"], nn.LogicallyPartitioned) and params["w"].names == ("in", "out")
    close(nn.unbox(params), expected)
    close(jax.tree.leaves(state), jax.tree.leaves(alone), ulps=64)


@pytest.mark.parametrize("alias", [kron, affine])
def test_nnx_states_and_optimizers(alias: Callable):
    model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), normal((16, 4))
    params, optimizer = nnx.state(model, nnx.Param), alias(0.1)
    updates, _ = jax.eval_shape(optimizer.update, params, optimizer.init(params), params)
    assert isinstance(updates, nnx.State) and jax.tree.structure(updates) == jax.tree.structure(params)

    def loss(model: nnx.Linear) -> jax.Array:
        return jnp.mean((model(x) - x @ jnp.ones((4, 3))) ** 2)

    trained, start = nnx.Optimizer(model, optimizer, wrt=nnx.Param), loss(model)

    @nnx.jit
    def step(model: nnx.Linear, trained: nnx.Optimizer) -> None:
        trained.update(model, nnx.grad(loss)(model))

    for _ in range(20):
        step(model, trained)
    assert loss(model) < 0.2 * start


# ---- when factors are fitted, and how far a step goes ---------------------------------------
def test_code_for_psgd_jax_runs():
    params, grads = small(), gradients(small(), 1)
    start = params
    optimizer = kron()
    opt_state = optimizer.init(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    assert types(params) == types(start) and not equal(params, start)


RHYTHMS = [
    ({"preconditioner_update_probability": 0.3}, 100, [4, 8, 12]),
    ({}, 5000, [4907, 4941, 4975]),
    ({"preconditioner_update_probability": lambda t: 1 / (1 + 0.01 * t)}, 1000, [2, 4, 6]),
]


@cache
def fits_in_pytorch(which: int) -> list[int]:
    """The steps at which PyTorch's optimizer fits in a rhythm."""
    options, steps, _ = RHYTHMS[which]
    theirs = torch.nn.Parameter(torch.ones(1))
    theirs.grad = torch.ones(1)
    other, found = psgd_torch_backend.Kron([theirs], **options), []
    for t in range(1, steps + 1):
        other.step()
        found += [t] if int(other.state[theirs]["since"]) == 0 else []
    return found


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("which", range(len(RHYTHMS)))
def test_fits_are_at_the_steps_of_pytorch(which: int, x64: bool):
    (options, steps, some), expected = RHYTHMS[which], fits_in_pytorch(which)
    with jax.enable_x64(x64):
        optimizer, p = scale_by_kron(**options), jnp.ones(1, "float32")

        def step(state: PSGDState, _: None) -> tuple[PSGDState, tuple]:
            _, new = optimizer.update(p, state, p)
            return new, (new.since == 0, jnp.any(new.Q[0] != state.Q[0]))

        _, (counted, moved) = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(optimizer.init(p))
    found = [int(t) + 1 for t in np.flatnonzero(counted)]
    assert found == expected and set(some) <= set(found)
    assert set(np.flatnonzero(moved) + 1) <= set(found)


BOUNDED = [
    (affine, "update_global_norm_clip", None),
    (xmat, "update_global_norm_clip", None),
    (lra, "update_global_norm_clip", None),
    (ALIASES["kron_newton"], "grad_clip_max_norm", float("inf")),
    (ALIASES["lra_newton"], "grad_clip_max_norm", float("inf")),
]


@pytest.mark.parametrize(("alias", "name", "unbounded"), BOUNDED)
def test_the_whole_step_is_bounded(alias: Callable, name: str, unbounded: float | None):
    """All leaves together, in one ratio; shorter steps are not lengthened."""
    grads = {"a": normal((4, 3)), "b": normal((4, 3), 1), "none": jnp.zeros((0, 3))}
    made = [alias(1.0, **{name: limit}) for limit in (unbounded, 0.5, 1e3)]
    free, short, long = jax.jit(lambda g: [o.update(g, o.init(g), g)[0] for o in made])(grads)
    length = float(optax.tree.norm(free))
    assert 2 < length < 1e3
    close(short, jax.tree.map(lambda u: u * 0.5 / length, free))
    close(long, free, ulps=4)


# ---- learning rates and other arguments -----------------------------------------------------
@pytest.mark.contract("jax: learning rate")
def test_a_schedule_is_a_learning_rate():
    params = small()
    made = [quad(optax.piecewise_constant_schedule(0.5, {2: 0.5, 3: 0.5})), quad(1.0)]

    @jax.jit
    def both(grads: Tree, states: list) -> list:
        return [o.update(grads, s, params) for o, s in zip(made, states, strict=True)]

    states = [o.init(params) for o in made]
    for t, rate in enumerate((0.5, 0.5, 0.25, 0.125)):
        (scheduled, s), (plain, z) = both(gradients(params, t), states)
        close(scheduled, jax.tree.map(lambda u, rate=rate: rate * u, plain), ulps=4)
        states = [s, z]


@pytest.mark.contract("jax: learning rate")
def test_a_traced_learning_rate():
    params = small()

    @jax.jit
    def update(rate: jax.Array) -> Tree:
        optimizer = quad(rate)
        return optimizer.update(gradients(params, 1), optimizer.init(params), params)[0]

    close(update(0.5), jax.tree.map(lambda u: 0.5 * u, update(1.0)), ulps=4)


@pytest.mark.contract("jax: arguments")
def test_foreign_arguments_are_ignored(alias: Callable):
    optimizer, params = alias(), small()
    updates, _ = jax.eval_shape(lambda g: optimizer.update(g, optimizer.init(g), params, value=1.0), params)
    assert types(updates) == types(params)


@pytest.mark.contract("jax: arguments")
def test_decay_needs_parameters():
    optimizer, params = quad(), small()
    with pytest.raises(ValueError, match="params"):
        jax.eval_shape(optimizer.update, params, optimizer.init(params))


@pytest.mark.contract("jax: purity")
@some
def test_runs_repeat(alias: Callable):
    first, second = (run(compiled(alias), tree(), range(3)) for _ in range(2))
    assert equal(first, second)


@pytest.mark.contract("jax: purity")
@some
def test_nothing_is_printed(alias: Callable, capfd: pytest.CaptureFixture):
    run(compiled(alias), tree(), range(2))
    assert capfd.readouterr() == ("", "")


# ---- misuse ---------------------------------------------------------------------------------
BAD_LEAVES = [
    (quad, jnp.ones(2, jnp.int32), r"quad needs floating-point parameters; \['w'\] is int32"),
    (quad, jnp.ones(2, bool), r"quad needs floating-point parameters; \['w'\] is bool"),
    (quad, 3, r"quad needs floating-point parameters; \['w'\] is int32"),
    (quad, jnp.ones(2, jnp.complex64), r"quad does not support complex parameters; \['w'\] is complex64"),
    (kron_whiten, jnp.ones(2, jnp.int32), r"kron_whiten needs floating-point parameters; \['w'\] is int32"),
]


@pytest.mark.contract("jax: inputs")
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
    params = {"w": normal((4, 3)) + 1j * normal((4, 3), 1)}
    optimizer, update, _ = compiled(kron_whiten)
    state, start = optimizer.init(params), params
    for _ in range(100):
        updates, state = update(params, state, params)  # the gradient of |p|^2 / 2
        params = optax.apply_updates(params, updates)
    assert all(jnp.abs(params[k]).mean() < 0.3 * jnp.abs(start[k]).mean() for k in params)
    assert dtypes(updates) == {"complex64"} and "complex64" in dtypes(state)


BAD_GRADIENTS = [
    ({"w": jnp.ones((3, 2))}, ValueError, r"the gradient of \['w'\] has shape \(3, 2\), its state belongs to another"),
    ({"w": jnp.ones(())}, ValueError, r"the gradient of \['w'\] has shape \(\), its state belongs to another"),
    ({"w": jnp.ones((2, 3)), "v": jnp.ones(2)}, ValueError, "'v'"),
    ({}, ValueError, "'w'"),
]


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize(("grads", "kind", "text"), BAD_GRADIENTS)
@of_leaves
def test_a_wrong_gradient_is_refused(alias: Callable, grads: Tree, kind: type[Exception], text: str):
    params = {"w": jnp.ones((2, 3))}
    optimizer = alias(weight_decay=0.0)
    with pytest.raises(kind, match=text):
        optimizer.update(grads, optimizer.init(params), params if len(grads) == 1 else None)


BAD_HYPERPARAMETERS = [
    ({"learning_rate": -1.0}, r"lr=-1\.0 must lie in \[0, inf\)"),
    ({"learning_rate": float("nan")}, r"lr=nan must lie in \[0, inf\)"),
    ({"momentum": 1.0}, r"momentum=1\.0 must lie in \[0, 1\)"),
    ({"weight_decay": float("nan")}, r"weight_decay=nan must lie in \[0, inf\)"),
    ({"dtype": "int8"}, "dtype='int8' must be None or one of bfloat16"),
    ({"dtype": jnp.int8}, "dtype='int8' must be None or one of bfloat16"),
    ({"max_size_dense": 0}, r"max_size_dense=0 must lie in \[1, inf\]"),
]


@pytest.mark.parametrize(("options", "text"), BAD_HYPERPARAMETERS)
def test_a_wrong_hyperparameter_is_refused(options: dict, text: str):
    with pytest.raises(ValueError, match=f"procrustes: {text}") as caught:
        procrustes(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [procrustes, scale_by_procrustes])
def test_what_is_not_in_the_signature_is_refused(make: Callable):
    with pytest.raises((TypeError, ValueError), match="lr"):
        make(lr=0.5)
