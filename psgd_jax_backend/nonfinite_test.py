"""Gradients that hold a NaN or an infinity: skipped, raised, or let through, as told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psgd_jax_backend
from psgd.methods import METHODS
from psgd_jax_backend import PSGDState, check_skips, kron, kron_newton, procrustes, scale_by_kron_whiten

Tree = Any
BAD = (jnp.nan, jnp.inf, -jnp.inf)
PARAMS = {"a": jnp.ones((4, 3)), "b": jnp.ones((12,))}


def given(t: int, value: float | None = None) -> Tree:
    """Gradients, one entry of which is a value."""
    keys = jax.random.split(jax.random.key(t))
    g = {name: jax.random.normal(k, PARAMS[name].shape) for name, k in zip(PARAMS, keys, strict=True)}
    return g if value is None else g | {"b": g["b"].at[-1].set(value)}


def extra(name: str, g: Tree) -> dict[str, Any]:
    return {"Hvp": g, "vector": PARAMS, "update_preconditioner": True} if METHODS[name]().recipe().newton else {}


def stepper(name: str, **options: Any) -> tuple[Tree, Callable]:
    """The first state, and a compiled step."""
    tx = getattr(psgd_jax_backend, name)(0.1, **options)

    @jax.jit
    def step(params: Tree, state: Tree, g: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(g, state, params, **extra(name, g))
        return optax.apply_updates(params, updates), state

    return tx.init(PARAMS), step


def own(state: Tree) -> PSGDState:
    (found,) = [
        x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PSGDState)) if isinstance(x, PSGDState)
    ]
    return found


def same(a: Tree, b: Tree) -> bool:
    return all(map(jnp.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("name", METHODS)
def test_a_skipped_step_is_as_if_it_had_not_been(name: str):
    """At first, later, and twice in a row, weight decay too: but for the count the run is the one without."""
    first, step = stepper(name, weight_decay=0.1)
    runs = []
    for bad in (((0, 0), (2, 1), (2, 2)), ()):
        params, state = PARAMS, first
        for t in range(4):
            for _, k in [x for x in bad if x[0] == t]:
                before = params, state
                params, state = step(params, state, given(9, BAD[k]))
                assert same(params, before[0]) and same(
                    own(state)._replace(skipped=0), own(before[1])._replace(skipped=0)
                )
            params, state = step(params, state, given(t))
        runs.append((params, own(state)))
    (ours, skipping), (theirs, clean) = runs
    assert same(ours, theirs) and same(skipping._replace(skipped=0), clean._replace(skipped=0))
    assert skipping.skipped.tolist() == [3, 0] and clean.skipped.tolist() == [0, 0]
    check_skips(state, 1)
    tx = getattr(psgd_jax_backend, name)()
    assert psgd_jax_backend.summary(tx, PARAMS).skipped == psgd_jax_backend.summary(tx, PARAMS, (clean,)).skipped == 0
    assert "3 steps skipped" in str(psgd_jax_backend.summary(tx, PARAMS, (skipping,)))


def test_a_schedule_of_the_rate_goes_on():
    """As the schedulers of PyTorch do, which are stepped by others."""
    rates = []
    tx = procrustes(lambda t: rates.append(t) or 0.1)
    state = tx.init(PARAMS)
    for value in (None, jnp.nan, None):
        _, state = tx.update(given(0, value), state, PARAMS)
    assert [int(t) for t in rates] == [0, 1, 2] and int(own(state).count) == 2


def test_too_many_in_a_row_are_an_error():
    state, step = stepper("kron", max_skips=3)
    params = PARAMS
    for _ in range(3):
        check_skips(state, 3)
        params, state = step(params, state, given(0, jnp.nan))
    with pytest.raises(FloatingPointError, match="3 steps in a row had a gradient that is not finite"):
        check_skips(state, 3)
    check_skips(step(params, state, given(0))[1], 3)
    tx = kron(max_skips=2)
    _, state = tx.update(given(0, jnp.inf), tx.init(PARAMS), PARAMS)
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        tx.update(given(0, jnp.inf), state, PARAMS)


@pytest.mark.parametrize("name", ["procrustes", "lra_whiten", "kron_newton"])
def test_raise_names_the_leaf(name: str):
    tx = getattr(psgd_jax_backend, name)(nonfinite="raise")
    state, bad = tx.init(PARAMS), given(0, jnp.inf)
    assert own(state).skipped is None
    with pytest.raises(FloatingPointError, match=rf"{name}: the gradient of \['b'\] holds a NaN or an infinity"):
        tx.update(bad, state, PARAMS, **extra(name, given(1)))
    update = jax.jit(lambda g: tx.update(g, state, PARAMS, **extra(name, given(1)))[0])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(update(given(0))))
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"{name}: the gradient of \['b'\] holds a NaN"):
        jax.block_until_ready(update(bad))
        jax.effects_barrier()


def test_a_product_that_is_not_finite_is_skipped_where_it_is_fitted():
    tx = kron_newton(0.1)
    state = tx.init(PARAMS)
    for fit, skips in ((True, [1, 1]), (False, [1, 0])):
        pair = {"Hvp": given(0, jnp.nan), "vector": PARAMS, "update_preconditioner": jnp.asarray(fit)}
        _, state = jax.jit(tx.update)(given(1), state, PARAMS, **pair)
        assert own(state).skipped.tolist() == skips and int(own(state).count) == (not fit)


def test_propagate_does_not_look():
    tx = scale_by_kron_whiten(nonfinite="propagate")
    state = tx.init(PARAMS)
    updates, new = tx.update(given(0, jnp.nan), state, PARAMS)
    assert new.skipped is None and not jnp.isfinite(updates["b"]).any() and jnp.isfinite(updates["a"]).all()


@pytest.mark.contract("jax: ensembles")
def test_an_ensemble_skips_each_by_itself():
    tx = procrustes(0.1)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    g = jax.tree.map(lambda x, y: jnp.stack([x, y]), given(0), given(0, jnp.nan))
    updates, state = jax.vmap(tx.update)(g, jax.vmap(tx.init)(many), many)
    assert own(state).skipped.tolist() == [[0, 0], [1, 1]] and own(state).count.tolist() == [1, 0]
    alone, _ = tx.update(given(0), tx.init(PARAMS), PARAMS)
    for together, single in zip(jax.tree.leaves(updates), jax.tree.leaves(alone), strict=True):
        assert jnp.allclose(together[0], single, rtol=1e-5, atol=1e-7) and not together[1].any()


@pytest.mark.parametrize("options", [{"nonfinite": "ignore"}, {"max_skips": 0}, {"max_skips": 1.5}])
def test_a_wrong_policy_is_refused(options: dict):
    with pytest.raises(ValueError, match=f"kron: {next(iter(options))}="):
        kron(**options)


def test_the_largest_count_of_skipped_steps_stays():
    params = {"w": jnp.ones((4, 3))}
    tx, largest = scale_by_kron_whiten(), np.iinfo(np.int32).max
    state = tx.init(params)._replace(skipped=jnp.asarray([largest, 0], jnp.int32))
    _, state = tx.update({"w": params["w"] * jnp.nan}, state, params)
    assert state.skipped.tolist() == [largest, 1]
