"""State that an earlier version saved loads, under the same keys, and goes on as it did then.

The files in `testdata` were written by version 0.1.0 before its modules were given new names: of each method the state
after three steps, and the parameters before and after a fourth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import psgd_jax_backend
import psgd_torch_backend
from psgd.methods import METHODS

SAVED = Path(__file__).with_name("testdata") / "before"
SHAPES = {"w": (4, 3), "b": (3,)}
RANK = "rank_of_approximation"


def drawn(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def options(name: str) -> dict[str, Any]:
    return {RANK: 2} if RANK in METHODS[name].__dataclass_fields__ else {}


def products(name: str, array: Any) -> dict[str, Any]:
    """What the fourth step fits to, of a method that fits Hessian-vector products."""
    if not METHODS[name]().recipe().newton:
        return {}
    hvp, vector = ({n: array(x) for n, x in drawn(seed).items()} for seed in (23, 33))
    return {"Hvp": hvp, "vector": vector, "update_preconditioner": True}


@pytest.fixture(scope="module")
def of_torch() -> dict[str, Any]:
    return torch.load(SAVED.with_suffix(".pt"))


@pytest.fixture(scope="module")
def of_jax() -> dict[str, np.ndarray]:
    with np.load(SAVED.with_suffix(".npz")) as arrays:
        # NumPy has no name for bfloat16 and gives its bytes.
        return {key: x.view(jnp.bfloat16) if x.dtype.kind == "V" else x for key, x in arrays.items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_state_dict_of_before_goes_on(name: str, of_torch: dict[str, Any]):
    saved = of_torch[name]
    params = {n: torch.nn.Parameter(x.clone()) for n, x in saved["before"].items()}
    optimizer = getattr(psgd_torch_backend, METHODS[name].title)(list(params.items()), lr=0.01, **options(name))
    optimizer.load_state_dict(saved["state_dict"])
    assert optimizer.state_dict()["state"].keys() == saved["state_dict"]["state"].keys()
    for n, p in params.items():
        p.grad = torch.as_tensor(drawn(13)[n])
    optimizer.step(**products(name, torch.as_tensor))
    for n, p in params.items():
        assert torch.allclose(p, saved["after"][n], rtol=1e-6, atol=1e-7), n


@pytest.mark.parametrize("name", METHODS)
def test_leaves_of_an_optax_state_of_before_go_on(name: str, of_jax: dict[str, np.ndarray]):
    def part(kind: str) -> dict[str, np.ndarray]:
        prefix = f"{name}/{kind}/"
        return {key.removeprefix(prefix): x for key, x in of_jax.items() if key.startswith(prefix)}

    params = {n: jnp.asarray(x) for n, x in part("before").items()}
    tx, saved = getattr(psgd_jax_backend, name)(0.01, **options(name)), part("state")
    paths, treedef = jax.tree_util.tree_flatten_with_path(tx.init(params))
    assert [jax.tree_util.keystr(path) for path, _ in paths] == list(saved)
    state = treedef.unflatten(map(jnp.asarray, saved.values()))
    gradients = {n: jnp.asarray(x) for n, x in drawn(13).items()}
    updates, _ = tx.update(gradients, state, params, **products(name, jnp.asarray))
    after = optax.apply_updates(params, updates)
    for n, x in part("after").items():
        assert np.allclose(after[n], x, rtol=1e-6, atol=1e-7), n
