"""What is no number or no state is refused in a sentence, before anything is traced; what NumPy read is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psgd.methods import METHODS
from psgd_jax_backend import PSGDState, kron, procrustes, scale_by_psgd

Tree = Any
PARAMS = {"w": jnp.asarray([0.5, -1.0, 2.0])}
NEEDS = {name: {} for name in METHODS}
NEEDS |= {"lra_whiten": {"rank_of_approximation": 1}, "lra_newton": {"rank_of_approximation": 1}}
NEEDS |= {"low_rank_approximation": {"uvd_rank_of_approximation": 1}, "kwns4": {"preconditioner_dtype": None}}


def scaling(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return scale_by_psgd(METHODS[name](**NEEDS[name]), **options)


def pair(name: str) -> dict[str, Any]:
    newton = METHODS[name](**NEEDS[name]).recipe().newton
    return {"Hvp": PARAMS, "vector": PARAMS, "update_preconditioner": True} if newton else {}


@pytest.fixture(scope="module")
def states() -> dict[str, PSGDState]:
    return {name: scaling(name).init(PARAMS) for name in METHODS}


# ---- hyperparameters ------------------------------------------------------------------------
@pytest.mark.contract("input: numbers")
@pytest.mark.parametrize("name", METHODS)
def test_an_array_that_is_known_is_checked_like_a_number(name: str):
    for f in fields(METHODS[name]):
        if f.metadata["kind"] not in ("number", "integer"):
            continue
        wrong = (np.array(-2.5), np.float32(np.nan), jnp.asarray(-2.5), jnp.ones(2), np.ones(2), jnp.asarray(0.5j))
        for value in (*wrong, jnp.asarray(True), np.array("a")):
            with pytest.raises(ValueError, match=f"{name}: {f.name}=.* must "):
                METHODS[name].of(**{f.name: value})


def test_an_array_of_one_number_is_that_number():
    assert METHODS["quad"](momentum=np.array([[0.5]]), max_size_dense=np.int64(7)) == METHODS["quad"](
        momentum=0.5, max_size_dense=7
    )
    kept = METHODS["quad"](momentum=jnp.full((1, 1), 0.5)).momentum
    assert isinstance(kept, jax.Array) and kept.shape == ()  # it may be traced at the next call
    with pytest.raises(ValueError, match=r"momentum=.*5.* must lie in \[0, 1\)"):
        procrustes(momentum=np.array(5.0))


@pytest.mark.contract("input: numbers")
@pytest.mark.parametrize("rate", [jnp.array([0.1, 0.2]), np.ones(2), np.array(-1.0), dict, [0.1], None], ids=str)
def test_a_rate_that_is_none_is_refused(rate: Any):
    with pytest.raises(ValueError, match=r"kron: lr=.* must .* learning_rate"):
        kron(rate)


def test_a_rate_of_one_number_serves_every_shape():
    updates, _ = kron(jnp.full((1, 1, 1), 0.1)).update(PARAMS, kron().init(PARAMS), PARAMS)
    assert updates["w"].shape == (3,)


# ---- state ------------------------------------------------------------------------------------
@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize("name", METHODS)
def test_state_that_numpy_read_is_taken(name: str, states: dict[str, PSGDState]):
    tx, state = scaling(name), states[name]
    ours, theirs = (tx.update(PARAMS, x, PARAMS, **pair(name)) for x in (state, jax.tree.map(np.asarray, state)))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(theirs))
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def nan(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)


def cast(dtype: str) -> Callable[[Tree], Tree]:
    return lambda tree: jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def misshapen(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.ones((*x.shape, 2), x.dtype), tree)


# The part of a state, what becomes of it, the words of the error, and whether it can be seen while JAX traces.
WRONG = [
    ("Q", nan, "Q of .* holds a NaN", False),
    ("Q", cast("float64"), "Q of .* is float64, and is kept in float32", True),
    ("Q", cast("int32"), "Q of .* is int32, and is kept in float32", True),
    ("Q", cast("object"), "Q of .* is object, and is kept in", False),
    ("Q", misshapen, "belongs to", True),
    ("L", cast("float16"), "L of .* is float16, and is kept in float32", True),
    ("L", misshapen, "belongs to", True),
    ("momentum", nan, "momentum of .* holds a NaN", False),
    ("momentum", cast("int8"), "momentum of .* is int8", True),
    ("momentum", lambda tree: None, "the state has no momentum", True),
    ("count", lambda x: jnp.asarray(-1), "count=.*-1.* must count steps", False),
    ("count", lambda x: jnp.asarray(1.5), "count=.* must count steps", True),
    ("count", lambda x: "1", "count='1' in the state must count steps", False),
    ("count", lambda x: None, "count=None in the state must count steps", True),
    ("since", lambda x: np.int32(-3), "since=.*-3.* must count steps", False),
    ("skipped", lambda x: jnp.asarray([3, -1]), "skipped=.* must count steps", False),
    ("skipped", lambda x: jnp.asarray(3), "skipped=.* must count steps", True),
]


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize("name", METHODS)
def test_state_that_is_none_is_refused(name: str, states: dict[str, PSGDState]):
    tx, state = scaling(name), states[name]
    for part, change, text, _ in WRONG:
        if jax.tree.leaves(getattr(state, part)):
            bad = state._replace(**{part: change(getattr(state, part))})
            with pytest.raises(ValueError, match=f"^{name}: .*{text}") as caught:
                tx.update(PARAMS, bad, PARAMS, **pair(name))
            assert "\n" not in str(caught.value)


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize(("part", "change", "text"), [row[:3] for row in WRONG if row[3] and row[0] != "since"])
def test_what_is_known_of_traced_state_is_refused_too(part: str, change: Any, text: str, states: dict[str, PSGDState]):
    with jax.enable_x64(text.startswith("Q of .* is float64")):
        tx, state = scaling("procrustes"), states["procrustes"]
        bad = state._replace(**{part: change(getattr(state, part))})
        with pytest.raises(ValueError, match=f"^procrustes: .*{text}"):
            jax.eval_shape(tx.update, PARAMS, bad, PARAMS)


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize("name", METHODS)
def test_state_of_another_optimizer_is_refused(name: str, states: dict[str, PSGDState]):
    foreign = {"adam": optax.adam(0.1).init(PARAMS), "none": None, "dict": states[name]._asdict()}
    for state in foreign.values():
        with pytest.raises(ValueError, match=f"{name}: the state is a .* and not a PSGDState"):
            scaling(name).update(PARAMS, state, PARAMS, **pair(name))


def test_state_of_another_tree_is_refused(states: dict[str, PSGDState]):
    with pytest.raises(ValueError, match=r"quad: .*state") as caught:
        scaling("quad").update({"w": PARAMS, "v": PARAMS["w"]}, states["quad"])
    assert "\n" not in str(caught.value)


def test_nan_is_not_looked_for_where_it_may_go_on(states: dict[str, PSGDState]):
    state = states["quad"]._replace(Q=nan(states["quad"].Q))
    updates, _ = scaling("quad", nonfinite="propagate").update(PARAMS, state, PARAMS)
    assert jnp.isnan(updates["w"]).all()


def test_state_of_each_dtype_of_parameters_is_taken():
    """With parameters, whose dtype it has, and with gradients alone, whose dtype may be another."""
    for name, method in METHODS.items():
        for dtype in ("bfloat16", "float32", *(["complex64"] if method.complex_parameters else [])):
            params = {"w": jax.ShapeDtypeStruct((3,), dtype)}
            state = jax.eval_shape(scaling(name).init, params)
            given = {} if not pair(name) else {"Hvp": params, "vector": params, "update_preconditioner": True}
            jax.eval_shape(scaling(name).update, params, state, params, **given)
            low = {"w": jax.ShapeDtypeStruct((3,), "bfloat16" if dtype == "float32" else dtype)}
            if not given:
                jax.eval_shape(scaling(name).update, low, state)
