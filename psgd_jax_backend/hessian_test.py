"""Hessian-vector products in JAX, and the optimizers that take them: as PyTorch's, and as they are documented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.flatten_util import ravel_pytree

import psgd_jax_backend
import psgd_torch_backend
from psgd import noise
from psgd.methods import METHODS
from psgd_jax_backend import hessian, hessian_helper, lra_newton, scale_by_kron_newton, scale_by_lra_newton, xmat
from psgd_torch_backend import hessian as torch_hessian

NEWTON = [name for name, method in METHODS.items() if method().recipe().newton]
PAIR = ("Hvp", "vector", "update_preconditioner")
Tree = Any


def normal(shape: tuple[int, ...], seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=dtype)


def small() -> Tree:
    return {"a": normal((4, 3)), "b": (normal((5,), 1), None)}


def cubes(params: Tree) -> jax.Array:
    """Its gradient is p^2, its Hessian diag(2 p)."""
    return sum(jnp.sum(p**3) / 3 for p in jax.tree.leaves(params))


def types(tree: Tree) -> list[tuple]:
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def close(ours: Tree, theirs: Tree, tol: float = 1e-6) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


# ---- products -------------------------------------------------------------------------------
def net(p: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] - y) ** 2)


@pytest.mark.parametrize("has_aux", [False, True])
def test_product_is_that_of_the_hessian(has_aux: bool):
    with jax.enable_x64(True):
        params = {
            name: normal(s, i, "float64") for i, (name, s) in enumerate({"w": (3, 4), "b": (4,), "v": (4,)}.items())
        }
        v = jax.tree.map(lambda p: jnp.cos(9 * p), params)
        data = normal((8, 3), 5, "float64"), normal((8,), 6, "float64")

        def loss(*args: Any) -> Any:
            return (net(*args), {"inputs": args[1]}) if has_aux else net(*args)

        out, grads, hvp = hessian.product(loss, params, v, data, has_aux=has_aux)
        value, by_reverse = jax.value_and_grad(net)(params, *data)
        close(out, (value, {"inputs": data[0]}) if has_aux else value, 1e-12)
        close(grads, by_reverse, 1e-12)
        close(hvp, jax.jvp(lambda p: jax.grad(net)(p, *data), (params,), (v,))[1], 1e-12)
        flat, back = ravel_pytree(params)
        matrix = jax.hessian(lambda p: net(back(p), *data))(flat)
        close(ravel_pytree(hvp)[0], matrix @ ravel_pytree(v)[0], 1e-12)
        close(hessian.gradient(loss, params, data, has_aux=has_aux), (out, grads), 1e-12)


def test_complex_products_are_in_the_convention_of_the_optimizers():
    with jax.enable_x64(True):
        z, v = (normal((3,), i, "float64") + 1j * normal((3,), i + 1, "float64") for i in (0, 2))

        def loss(z: jax.Array) -> jax.Array:
            return jnp.sum(jnp.abs(z) ** 4) + jnp.real(jnp.sum(z**3))

        def joined(z: jax.Array) -> jax.Array:
            return jnp.concatenate([z.real, z.imag])

        def real(x: jax.Array) -> jax.Array:
            return loss(x[:3] + 1j * x[3:])

        _, grads, hvp = hessian.product(loss, z, v)
        close(grads, jax.grad(loss)(z).conj(), 1e-12)
        close(hessian.gradient(loss, z)[1], grads, 1e-12)
        close(joined(grads), jax.grad(real)(joined(z)), 1e-12)
        close(joined(hvp), jax.hessian(real)(joined(z)) @ joined(v), 1e-12)


# ---- names and draws ------------------------------------------------------------------------
SHAPED = [
    ((2, 3), ["0"]),
    ({"w": (2, 3), "b": (3,)}, ["b", "w"]),
    ({"out": {"w": (2,)}, "in": [(3,), (2, 2)]}, ["in.0", "in.1", "out.w"]),
    ([(2,)] * 11, [str(i) for i in range(11)]),
    ({"a": None, "b": ((2,), {})}, ["b.0"]),
]


def filled(shapes: Tree) -> Tree:
    """Arrays of these shapes."""

    def is_shape(x: Any) -> bool:
        return isinstance(x, tuple) and all(isinstance(n, int) for n in x)

    return jax.tree.map(lambda shape: normal(shape, 3), shapes, is_leaf=is_shape)


def as_torch(tree: Tree) -> Any:
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)


def as_numpy(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, tree)


@pytest.mark.parametrize(("shapes", "names"), SHAPED)
def test_names(shapes: Tree, names: list[str]):
    assert hessian.names(filled(shapes)) == names


@pytest.mark.parametrize(("shapes", "names"), SHAPED[:4])
def test_the_helper_is_that_of_pytorch(shapes: Tree, names: list[str]):
    """The same vectors for the same key and name; and the loss, gradient and product that belong to them."""
    params, key = filled(shapes), 3
    ours = hessian_helper(jax.random.PRNGKey(key), cubes, params)

    def loss(p: Any) -> torch.Tensor:
        return sum((x**3).sum() / 3 for x in jax.tree.leaves(p))

    theirs = torch_hessian.hessian_helper(key, loss, as_torch(params))
    assert ours[-1] is theirs[-1] is True
    close(ours[:-1], as_numpy(theirs[:-1]))
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (ours[3], as_numpy(theirs[3]))), strict=True))
    drawn = ravel_pytree(ours[3])[0]
    assert len(np.unique(drawn)) > 0.8 * len(drawn)  # other names, other vectors


def test_coins_are_those_of_pytorch():
    params, keys = jnp.ones(2), [*range(40), 5 << 32]
    words = jnp.asarray([[k >> 32, k & 0xFFFFFFFF] for k in keys], jnp.uint32)
    ours = jax.vmap(lambda k: hessian_helper(k, cubes, params, (), False, 0.5)[4])(words)
    theirs = [torch_hessian.hessian_helper(k, lambda p: (p**3).sum(), torch.ones(2), (), False, 0.5)[4] for k in keys]
    assert ours.tolist() == theirs and 10 < sum(theirs) < 31


# ---- the helper -----------------------------------------------------------------------------
SOMETIMES = [
    (1.0, None, 1.0),
    (1, 5, 1.0),
    (0.0, None, 0.0),
    (0.0, 0, 1.0),
    (0.0, 1, 1.0),
    (0.0, 2, 0.0),
    (0.5, None, 0.5),
    (0.5, 7, 0.5),
]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("probability", "train_step", "share"), SOMETIMES)
def test_the_helper_updates_sometimes(probability: float, train_step: int | None, share: float, jit: bool):
    params, found = small(), []

    def helped(key: jax.Array, t: Any) -> tuple:
        return hessian_helper(key, cubes, params, (), False, probability, train_step=t)

    call = jax.jit(helped) if jit else helped
    for k in range(12 if jit and share == 0.5 else 3):
        loss, grads, hvp, v, update = call(jax.random.PRNGKey(k), train_step)
        close((loss, grads), (cubes(params), jax.tree.map(jnp.square, params)))
        close(hvp, jax.tree.map(lambda p, x: 2 * p * x, params, v))
        assert types(hvp) == types(v) == types(params)
        assert bool(update) is any(bool(x.any()) for x in jax.tree.leaves(v))
        found.append(bool(update))
    if jit or share != 0.5:
        assert 0.2 < np.mean(found) < 0.8 if share == 0.5 else set(found) == {bool(share)}


@pytest.mark.contract("jax: keys")
@pytest.mark.parametrize("seed", [0, 7, -1])
def test_keys_of_both_kinds(seed: int):
    old, typed = (hessian_helper(make(seed), cubes, small()) for make in (jax.random.PRNGKey, jax.random.key))
    close(old, typed, 0)
    other = hessian_helper(jax.random.key(seed + 1), cubes, small())
    assert not jnp.array_equal(old[3]["a"], other[3]["a"])


@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_the_helper_passes_what_else_the_loss_takes_and_gives(probability: float):
    def loss(p: Tree, x: jax.Array, scale: float) -> tuple[jax.Array, Tree]:
        return scale * jnp.sum(x * p["a"] ** 2), {"n": jnp.int32(3), "x": x}

    params, x = {"a": normal((3,))}, normal((3,), 1)
    (value, aux), grads, hvp, v, _ = hessian_helper(
        jax.random.PRNGKey(0), loss, params, (x, 2.0), True, probability, train_step=0
    )
    close(aux, {"n": 3, "x": x})
    close(value, 2 * jnp.sum(x * params["a"] ** 2))
    close((grads["a"], hvp["a"]), (4 * x * params["a"], 4 * x * v["a"]))


# ---- psgd_jax's programs --------------------------------------------------------------------
def loss_fn(params: Any, x: Any) -> Any:
    return ((params - x) ** 2).sum()


SETTINGS = {"b1": 0.0, "preconditioner_update_probability": 1.0}


def test_the_whitening_program():
    params, x = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 0.0, 0.0])
    optimizer = xmat(learning_rate=1.0, **SETTINGS)
    opt_state, losses = optimizer.init(params), []

    @jax.jit
    def step(params: jax.Array, x: jax.Array, opt_state: Any) -> tuple:
        loss_val, grad = jax.value_and_grad(loss_fn)(params, x)
        updates, opt_state = optimizer.update(grad, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss_val

    for _ in range(14):
        params, opt_state, loss_val = step(params, x, opt_state)
        losses.append(float(loss_val))
    assert losses[0] == 14 and min(losses) < 1e-4

    p, expected = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), []
    other = psgd_torch_backend.XMat([p], lr=1.0, **SETTINGS)
    for _ in range(14):
        other.zero_grad()
        loss = loss_fn(p, torch.zeros(3))
        loss.backward()
        other.step()
        expected.append(loss.item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


def test_the_hessian_program():
    key, start = jax.random.PRNGKey(0), jnp.array([1.0, 2.0, 3.0])
    params, x = start, jnp.array([0.0, 0.0, 0.0])
    optimizer = xmat(learning_rate=1.0, **SETTINGS)
    opt_state, losses, subkeys = optimizer.init(params), [], []

    @jax.jit
    def step(subkey: jax.Array, params: jax.Array, x: jax.Array, opt_state: Any) -> tuple:
        loss_val, grad, hvp, vector, update_preconditioner = hessian_helper(
            subkey, loss_fn, params, loss_fn_extra_args=(x,), has_aux=False, preconditioner_update_probability=1.0
        )
        updates, opt_state = optimizer.update(
            grad, opt_state, Hvp=hvp, vector=vector, update_preconditioner=update_preconditioner
        )
        return optax.apply_updates(params, updates), opt_state, loss_val

    for _ in range(3):
        key, subkey = jax.random.split(key)
        params, opt_state, loss_val = step(subkey, params, x, opt_state)
        losses.append(float(loss_val))
        subkeys.append(int(subkey[0]) << 32 | int(subkey[1]))
    assert losses[0] == 14 and losses[1] < 1e-12 and losses[2] < 1e-12

    p, expected = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), []
    other = psgd_torch_backend.XMat([p], lr=1.0, **SETTINGS)
    for subkey in subkeys:
        loss, grad, hvp, vector, update = torch_hessian.hessian_helper(subkey, loss_fn, p, (torch.zeros(3),))
        p.grad = grad
        other.step(Hvp=hvp, vector=vector, update_preconditioner=update)
        expected.append(float(loss))
    np.testing.assert_allclose(losses, expected, atol=1e-6)


# ---- optimizers that are given products -----------------------------------------------------
def given(params: Tree, update: Any = True, seed: int = 0) -> dict[str, Any]:
    """What the helper gives of a loss of cubes."""
    v = hessian.vector(noise.key(jnp, seed, 1), params)
    hvp = jax.tree.map(lambda p, x: 2 * p * x, params, v)
    return dict(zip(PAIR, (hvp, v, update), strict=True))


@pytest.mark.parametrize("name", NEWTON)
def test_newton_needs_products(name: str):
    optimizer, params = getattr(psgd_jax_backend, name)(), {"w": normal((4, 3))}
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=f"{name} fits Hessian-vector products; give update Hvp=, vector= and"):
        optimizer.update(params, state, params)


@pytest.mark.parametrize("missing", PAIR)
@pytest.mark.parametrize("name", ["kron_newton", "xmat", "kron_whiten"])
def test_products_come_together(name: str, missing: str):
    optimizer, params = getattr(psgd_jax_backend, name)(), {"w": normal((4, 3))}
    pair = {k: x for k, x in given(params).items() if k != missing}
    with pytest.raises(ValueError, match=f"{name}: {missing} is missing; Hvp, vector and update_preconditioner go"):
        optimizer.update(params, optimizer.init(params), params, **pair)


@pytest.mark.contract("jax: state")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_state_keeps_its_type(name: str, dtype: str):
    """Of every method, with a flag that is known and with one that is not."""
    optimizer = getattr(psgd_jax_backend, f"scale_by_{name}")()
    params = jax.tree.map(lambda p: p.astype(dtype), small())
    state = optimizer.init(params)
    for update in (True, jax.ShapeDtypeStruct((), "bool")):
        both = jax.eval_shape(
            lambda u, s, on: optimizer.update(u, s, params, **given(params, on)), params, state, update
        )
        assert jax.tree.structure(both) == jax.tree.structure((params, state)) and types(both) == types((params, state))


@pytest.mark.parametrize("name", ["kron_newton", "lra_newton", "dense_newton", "xmat", "affine"])
def test_factors_move_where_the_flag_says(name: str):
    optimizer, params = getattr(psgd_jax_backend, f"scale_by_{name}")(), small()
    state, traces = optimizer.init(params), []

    @jax.jit
    def update(state: Any, pair: dict) -> tuple:
        traces.append(pair)
        return optimizer.update(params, state, params, **pair)

    for t, (flag, since) in enumerate(zip([False, False, True, False, True], [1, 2, 0, 1, 0], strict=True)):
        pair = given(params, flag, t)
        pair = pair if flag else pair | {k: jax.tree.map(jnp.zeros_like, pair[k]) for k in PAIR[:2]}
        updates, new = update(state, pair)
        moved = [not jnp.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (state.Q, new.Q)), strict=True)]
        assert any(moved) is flag and int(new.since) == since and int(new.count) == t + 1
        assert all(bool(jnp.isfinite(x).all() and x.any()) for x in jax.tree.leaves(updates))
        assert types(new) == types(state)
        state = new
    assert len(traces) == 1


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["kron_newton", "lra_newton", "kron_whiten", "lra_whiten"])
def test_the_automatic_scale_is_given_once(name: str, late: bool):
    """With H = 100 I and a step of the factors that is next to nothing, P is near 1 / 100 and not 1.

    Whitening methods do not count the steps since a fit: theirs is the scale of what there is at the first step.
    """
    make, waits = getattr(psgd_jax_backend, f"scale_by_{name}"), name.endswith("newton")
    optimizer, params = make(lr_preconditioner=1e-6), small()
    state, flags = optimizer.init(params), [False, True, True] if late else [True, True]
    v = hessian.vector(noise.key(jnp, 0, 1), params)
    zeros = jax.tree.map(jnp.zeros_like, v)

    @jax.jit
    def update(state: Any, flag: jax.Array) -> tuple:
        x = jax.tree.map(lambda x, z: jnp.where(flag, x, z), v, zeros)
        pair = {"Hvp": jax.tree.map(lambda x: 100 * x, x), "vector": x, "update_preconditioner": flag}
        return optimizer.update(params, state, params, **pair)

    for k, flag in enumerate(flags):
        updates, state = update(state, jnp.asarray(flag))
        ratio = jnp.linalg.norm(ravel_pytree(updates)[0]) / jnp.linalg.norm(ravel_pytree(params)[0])
        low, high = (0.005, 0.02) if flags[0] or (waits and any(flags[: k + 1])) else (0.5, 2.0)
        assert low < ratio < high


@pytest.mark.contract("jax: wrappers")
@pytest.mark.parametrize("name", ["kron_newton", "lra_newton"])
def test_masked_leaves_have_no_products(name: str):
    """What is left out has no place in the products either; the rest steps as if it were alone."""
    made = getattr(psgd_jax_backend, name)(0.1, lr_preconditioner=0.2)
    params = {"keep": normal((4, 3)), "skip": jnp.ones(2)}
    masked = optax.masked(made, {"keep": True, "skip": False}, mask_compatible_extra_args=True)
    alone = {"keep": params["keep"]}
    everything = {k: x if k == PAIR[2] else x | {"skip": jnp.ones(2)} for k, x in given(alone).items()}

    @jax.jit
    def both() -> tuple[Tree, Tree]:
        ours, _ = masked.update(params, masked.init(params), params, **everything)
        return ours, made.update(alone, made.init(alone), alone, **given(alone))[0]

    ours, theirs = both()
    close(ours["keep"], theirs["keep"])
    assert jnp.array_equal(ours["skip"], params["skip"])


WRONG = [{"v": jnp.ones((4, 3))}, {}, [jnp.ones((4, 3))]]


@pytest.mark.parametrize("name", PAIR[:2])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("make", [scale_by_kron_newton, scale_by_lra_newton])
def test_a_wrong_tree_is_refused(make: Callable, wrong: Tree, name: str):
    optimizer, params = make(), {"w": normal((4, 3))}
    with pytest.raises(ValueError, match=r"[Dd]ict key mismatch|[Ee]xpected dict"):
        optimizer.update(params, optimizer.init(params), params, **given(params) | {name: wrong})


def test_newton_finds_the_minimum():
    """Of a quadratic with a condition of 1e4, far below where as many steps along the gradient would end."""
    scales, start = jnp.logspace(-2, 2, 12), normal((12,))
    optimizer = lra_newton(0.5, lr_preconditioner=0.5)

    def step(carry: tuple, key: jax.Array) -> tuple:
        params, state = carry
        value, grads, *pair = hessian_helper(key, lambda p: jnp.sum(scales * p**2), params)
        updates, state = optimizer.update(grads, state, params, **dict(zip(PAIR, pair, strict=True)))
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), 300)
    _, losses = jax.lax.scan(step, (start, optimizer.init(start)), keys)
    assert losses[-1] < 5e-5 * losses[0]
