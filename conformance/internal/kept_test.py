"""P kept between steps (`keep_p`): the same walk by fewer products, for twice the memory of the factors."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import psgd_jax_backend
import psgd_torch_backend
from conformance.compare import compare
from psgd import summary
from psgd.cost import BYTES
from psgd.geometry import GEOMETRIES
from psgd.kron import DenseRule, Kronecker
from psgd.methods import METHODS
from psgd_torch_backend.optimizer import PSGD

KEEPING = sorted(name for name, method in METHODS.items() if any(f.name == "keep_p" for f in fields(method)))
SHAPES = ((5, 4), (4, 4), (4, 4), (3, 2, 4), (6,), ())
WHITENING = [name for name in KEEPING if not METHODS[name]().recipe().newton]


def settings(name: str) -> dict:
    """The work of half precisions in float64, for a tight comparison."""
    return {"preconditioner_dtype": None} if factors_dtype(name) else {}


def factors_dtype(name: str) -> str | None:
    """The dtype of a method's factors by default, where it is not that of the parameters."""
    return getattr(METHODS[name](), "preconditioner_dtype", None)


def made(name: str, params, **options) -> PSGD:
    return getattr(psgd_torch_backend, METHODS[name].title)(params, **settings(name), **options)


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    random = np.random.default_rng(0)
    return [torch.nn.Parameter(torch.tensor(random.standard_normal(shape))) for shape in shapes]


def run(optimizer: PSGD, params, steps: int, seed: int = 1) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.tensor(random.standard_normal(p.shape))
        optimizer.step()
    return [p.detach().clone() for p in params]


def kept(optimizer: PSGD, p: torch.Tensor) -> list[torch.Tensor]:
    """What P has to be of the factors that a parameter has."""
    kind = optimizer._job(optimizer.param_groups[0]).recipe.preconditioner
    return [kind.geometry.root.factor(q, i) for i, q in enumerate(optimizer.state[p]["Q"].values())]


# Operation by operation JAX compiles each one for each shape, and each branch anew: it walks where tensors are few.
WALKS = {"mlp-digits": ["torch", "torch-loop", "jax", "numpy", "strict"], "least-squares": ["torch", "jax-eager"]}


@pytest.mark.xdist_group("kept")  # those operations are compiled once in a process
@pytest.mark.parametrize("problem", WALKS)
@pytest.mark.parametrize("name", KEEPING)
def test_all_drivers_walk_the_same_way(name: str, problem: str):
    report = compare(name, problem, steps=4, drivers=WALKS[problem], locked=True, keep_p=True, **settings(name))
    assert report.passed, report


@pytest.mark.parametrize("name", WHITENING)
def test_the_walk_is_that_of_q_alone(name: str):
    walks = []
    for keep in (False, True):
        params = parameters(*SHAPES)
        optimizer = made(name, params, keep_p=keep, lr=0.1)
        walks.append(run(optimizer, params, 12))
        assert all(("P" in optimizer.state[p]) is keep for p in params)
    for one, other in zip(*walks, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", WHITENING)
def test_what_is_kept_is_p(name: str):
    params = parameters(*SHAPES)
    optimizer = made(name, params, keep_p=True)
    run(optimizer, params, 3)
    for p in params:
        own = list(optimizer.state[p]["P"].values())
        assert own and all(
            torch.allclose(x, y, rtol=1e-12, atol=0) for x, y in zip(own, kept(optimizer, p), strict=True)
        )


@pytest.mark.parametrize("name", KEEPING)
def test_a_step_without_a_fit_multiplies_less(name: str):
    rows = [summary.parameter_cost(METHODS[name](keep_p=keep), "w", (256, 256)) for keep in (False, True)]
    assert rows[1].apply < 0.8 * rows[0].apply
    factors = 2 * 256 * 256 * BYTES[factors_dtype(name) or "float32"]
    assert rows[1].state == rows[0].state + factors


@pytest.mark.parametrize("name", [name for name, g in GEOMETRIES.items() if g.fits_p])
def test_where_p_itself_is_fitted_there_is_nothing_to_keep(name: str):
    kind = Kronecker(GEOMETRIES[name], DenseRule(), keep_p=True)
    factors = kind.init(np.zeros((3, 3)))
    assert factors.P == () and kind.with_p(factors) == factors


@pytest.mark.parametrize("layers", [False, True])
def test_it_may_be_switched_between_steps(layers: bool):
    walks = []
    for switched in (False, True):
        params = parameters((2, 4, 4), (2, 4, 4))
        optimizer = made("quad", params, scanned_layers=layers)
        run(optimizer, params, 2)
        for keep in (switched, False):
            optimizer.param_groups[0]["keep_p"] = keep
            walk = run(optimizer, params, 2, seed=2)
            assert all(("P" in optimizer.state[p]) is keep for p in params)
        walks.append(walk)
    for one, other in zip(*walks, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_a_checkpoint_has_it_and_a_wrong_one_is_refused():
    params = parameters((4, 4), (4, 4))
    optimizer = made("kron", params, keep_p=True)
    run(optimizer, params, 2)
    saved, wanted = optimizer.state_dict(), run(optimizer, params, 1, seed=3)
    again = parameters((4, 4), (4, 4))
    other = made("kron", again)
    other.load_state_dict(saved)
    assert other.param_groups[0]["keep_p"] is True and "P" in other.state[again[1]]
    saved["state"][1]["P"]["0"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"parameter 1 .* needs factors P of shapes .*; nothing was loaded"):
        other.load_state_dict(saved)
    assert len(wanted) == 2


@pytest.mark.parametrize("name", WHITENING)
def test_jax_keeps_it_under_jit(name: str):
    tx = getattr(psgd_jax_backend, name)(keep_p=True, **settings(name))
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4)), "b": jnp.ones(3)}
    state, step = tx.init(params), jax.jit(tx.update)
    for k in range(3):
        grads = jax.tree.map(lambda x, k=k: jnp.cos(jnp.arange(x.size, dtype=x.dtype) + k).reshape(x.shape), params)
        _, state = step(grads, state, params)
    own = next(part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "Q")) if hasattr(part, "Q"))
    root = METHODS[name](**settings(name)).recipe().preconditioner.geometry.root
    for leaf in params:
        for i, (q, p) in enumerate(zip(own.Q[leaf], own.P[leaf], strict=True)):
            assert np.allclose(p, root.factor(q, i), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("began", "goes_on", "has"), [(True, False, "has P"), (False, True, "has no P")])
def test_jax_refuses_a_state_of_the_other_kind(began: bool, goes_on: bool, has: str):
    params = {"w": jnp.ones((4, 4))}
    state = psgd_jax_backend.kron(keep_p=began).init(params)
    with pytest.raises(ValueError, match=f"kron: keep_p={goes_on}, but the state {has}; give the state of an `init`"):
        psgd_jax_backend.kron(keep_p=goes_on).update(params, state, params)


def test_only_the_products_change():
    """The record of a method is that without it, but for the flag."""
    one, other = (METHODS["quad"](keep_p=keep).recipe() for keep in (True, False))
    assert replace(one, preconditioner=replace(one.preconditioner, keep_p=False)) == other
