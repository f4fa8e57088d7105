"""The state as named arrays."""

from __future__ import annotations

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psgd_jax_backend
from psgd.methods import METHODS
from psgd_jax_backend import PSGDState, state_arrays

PARAMS = {"a": {"w": jnp.ones((4, 3))}, "b": jnp.ones(3), "c": jnp.ones(())}


def is_state(x) -> bool:
    return isinstance(x, PSGDState)


@pytest.mark.parametrize("name", METHODS)
def test_state_is_shown_by_name(name: str):
    method = METHODS[name]
    options = {f.name: 2 for f in fields(method) if "rank_of_approximation" in f.name}
    made, kept = method(**options), getattr(psgd_jax_backend, name)(**options).init(PARAMS)
    arrays, recipe = state_arrays(kept, PARAMS), made.recipe()
    (state,) = (x for x in jax.tree.leaves(kept, is_leaf=is_state) if is_state(x))
    assert {key.split("/")[0] for key in arrays} == {"a.w", "b", "c"}
    assert ("a.w/since" in arrays) is made.schedule().counts and ("a.w/momentum" in arrays) is recipe.momentum
    sizes = sum(x.size for key, x in arrays.items() if key.split("/")[1] == "Q")
    assert sizes == sum(x.size for x in jax.tree.leaves(state.Q))


@pytest.mark.parametrize("name", ["kron", "xmat"])
def test_state_that_numpy_read_is_shown_alike(name: str):
    state = getattr(psgd_jax_backend, name)().init(PARAMS)
    ours, theirs = state_arrays(state, PARAMS), state_arrays(jax.tree.map(np.asarray, state), PARAMS)
    assert ours.keys() == theirs.keys() and all(np.array_equal(x, theirs[key]) for key, x in ours.items())


@pytest.mark.parametrize("name", ["kron", "xmat"])
def test_parameters_of_another_tree_or_of_one_name_are_refused(name: str):
    made = getattr(psgd_jax_backend, name)()
    with pytest.raises(ValueError, match=r"another tree than params \(.*\); give the params that init was given"):
        state_arrays(made.init(PARAMS), {"b": PARAMS["b"]})
    alike = {"a.w": PARAMS["b"], "a": {"w": PARAMS["c"]}}
    with pytest.raises(ValueError, match=r"two parameters are called 'a.w'; give each a name of its own"):
        state_arrays(made.init(alike), alike)


def test_of_one_parameter_and_of_no_method():
    w = jnp.ones((4, 3))
    assert state_arrays(psgd_jax_backend.kron().init(w), w)["parameter/Q/1"].shape == (3, 3)
    with pytest.raises(ValueError, match="holds 0 PSGD states; give it the state of one method"):
        state_arrays(optax.sgd(0.1).init(w), w)
