"""Programs and calls as psgd_jax 0.2.9 and quad_torch 0.4.5 take them, with the import alone changed.

psgd_jax exports `hessian_helper` and `precond_update_prob_schedule`, and its modules `kron`, `affine`, `xmat` and
`low_rank_approximation` an optimizer and a `scale_by_` function each. Its states are all `PSGDState` here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psgd_jax_backend
from psgd_jax_backend import (
    affine,
    hessian_helper,
    kron,
    low_rank_approximation,
    lra,
    precond_update_prob_schedule,
    procrustes,
    quad,
    scale_by_affine,
    scale_by_kron,
    scale_by_lra,
    scale_by_xmat,
    xmat,
)
from psgd_jax_backend import named as named_module
from psgd_jax_backend._testing import close, equal, gradients, normal

Tree = Any
MASK = {"w": True, "s": False}
SCHEDULE = precond_update_prob_schedule(0.9, 0.1, 0.01, 3)
# Each argument in its published place, with a value that is not its default.
OF_KRON = {
    "learning_rate": 0.3,
    "b1": 0.5,
    "weight_decay": 0.25,
    "weight_decay_mask": MASK,
    "preconditioner_update_probability": SCHEDULE,
    "max_size_triangular": 5,
    "min_ndim_triangular": 1,
    "memory_save_mode": "one_diag",
    "momentum_into_precond_update": False,
    "preconditioner_lr": 0.2,
    "preconditioner_init_scale": 0.5,
    "mu_dtype": "bfloat16",
    "precond_dtype": jnp.float32,
    "precond_update_precision": "float32",
    "precond_grads_precision": "float32",
    "scanned_layers": {"w": False, "s": True},
    "lax_map_scanned_layers": True,
    "lax_map_batch_size": 2,
}


def with_a_coin(key: jax.Array, **own: Any) -> dict[str, Any]:
    """The arguments of affine, xmat and low_rank_approximation; own: of one of them."""
    before = {
        "learning_rate": 0.3,
        "preconditioner_update_probability": 0.7,
        "b1": 0.5,
        "nesterov": True,
        "weight_decay": 0.25,
        "mask": MASK,
    }
    after = {
        "precond_lr": optax.linear_schedule(0.2, 0.1, 5),
        "precond_init_scale": 0.5,
        "update_global_norm_clip": 0.1,
        "step_normalizer_order": "1st",
        "seed": key,
        "mu_dtype": jnp.bfloat16,
        "precision": "float32",
    }
    return {**before, **own, **after}


OF_QUAD = {
    "learning_rate": 0.3,
    "lr_style": None,
    "momentum": 0.5,
    "weight_decay": 0.25,
    "max_size_dense": 5,
    "max_skew_dense": 2.0,
    "preconditioner_lr": 0.4,
    "noise_scale": 1e-3,
    "dtype": jnp.bfloat16,
}
# What becomes of an argument in the record.
KEPT: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("dtype", "mu_dtype", "precond_dtype"), lambda x: jnp.dtype(x).name),
    "seed": lambda key: int(key[-1]),
}
OF_AFFINE = partial(with_a_coin, max_size_triangular=5, max_skew_triangular=2)
OF_LRA = partial(with_a_coin, uvd_rank_of_approximation=3)
CALLS = [
    (kron, scale_by_kron, lambda key: OF_KRON),
    (affine, scale_by_affine, OF_AFFINE),
    (xmat, scale_by_xmat, with_a_coin),
    (low_rank_approximation, scale_by_lra, OF_LRA),
    (lra, psgd_jax_backend.scale_by_low_rank_approximation, OF_LRA),
    (procrustes, psgd_jax_backend.scale_by_procrustes, lambda key: OF_QUAD),
    (quad, psgd_jax_backend.scale_by_quad, lambda key: OF_QUAD),
]


def small() -> Tree:
    return {"w": normal((4, 6)), "s": normal((2, 3, 5), 1)}


@pytest.mark.parametrize(("whole", "scaling", "published"), CALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_each_argument_has_its_published_place(
    whole: Callable, scaling: Callable, published: Callable, monkeypatch: pytest.MonkeyPatch
):
    """By position, by name, and for whoever reads the signature."""
    made: list[tuple] = []

    def recorded(method: Any, **mapping: Any) -> optax.GradientTransformation:
        made.append((method, mapping))
        state = psgd_jax_backend.PSGDState(jnp.int32(0), None, None, None, None, None)
        return optax.GradientTransformationExtraArgs(lambda p: state, lambda g, s, p=None, **extra: (g, s))

    monkeypatch.setattr(named_module, "scale_by_psgd", recorded)
    params, given = small(), published(jax.random.PRNGKey(3))
    part = {k: v for k, v in given.items() if k not in ("learning_rate", "weight_decay", "weight_decay_mask", "mask")}
    for make, own in ((whole, given), (scaling, part)):
        assert list(inspect.signature(make).parameters)[: len(own)] == list(own)
        by_place, by_name = make(*own.values()), make(**own)
        assert made[-2] == made[-1]
        ours, theirs = (tx.update(params, tx.init(params), params)[0] for tx in (by_place, by_name))
        assert equal(ours, theirs)
        method, mapping = made[-1]
        kept = {k: mapping[k] if k in mapping else getattr(method, k) for k in part}
        assert kept == {k: KEPT.get(k, lambda x: x)(v) for k, v in part.items()}
        if make is whole:  # the gradient is p: the rate times p, and where the mask says so a quarter more
            masked = any("mask" in name for name in own)
            assert jnp.allclose(ours["w"], -0.3 * 1.25 * params["w"])
            assert jnp.allclose(ours["s"], -0.3 * (1 if masked else 1.25) * params["s"])


@pytest.mark.parametrize(
    "name", [x for x in psgd_jax_backend.METHODS if len(psgd_jax_backend.METHODS[x].positional) < 2]
)
def test_methods_of_psgd_torch_take_a_learning_rate_and_names(name: str):
    whole, scaling = getattr(psgd_jax_backend, name), getattr(psgd_jax_backend, f"scale_by_{name}")
    title = psgd_jax_backend.METHODS[name].title
    rank = {f: 2 for f in inspect.signature(whole).parameters if f == "rank_of_approximation"}
    whole(0.1, **rank)
    for make, args, there in ((whole, (0.1, 0.9), "learning_rate by position"), (scaling, (0.9,), "arguments by name")):
        with pytest.raises(TypeError, match=f"takes {there}.* since the order of psgd_torch `{title}` is another") as e:
            make(*args)
        assert "\n" not in str(e.value) and "0.9" in str(e.value)
    with pytest.raises(TypeError, match="learning_rate is given twice, by position and by name; leave one out"):
        whole(0.1, learning_rate=0.1)


@pytest.mark.parametrize("make", [jax.random.PRNGKey, jax.random.key, lambda n: np.asarray(jax.random.PRNGKey(n))])
def test_a_seed_may_be_a_key(make: Callable):
    """Of the same number the same run; under jit too."""
    params, grads = small(), gradients(small(), 1)

    @jax.jit
    def step(seed: jax.Array) -> Tree:
        tx = scale_by_xmat(seed=seed)
        return tx.update(grads, tx.init(params))[0]

    ours, other = step(make(5)), step(make(6))
    tx = scale_by_xmat(seed=5)
    close(ours, jax.jit(tx.update)(grads, tx.init(params))[0], ulps=64)
    assert not equal(ours, other)
    assert equal(scale_by_xmat(seed=make(5)).init(params), tx.init(params))


# ---- the programs of psgd_jax's README ------------------------------------------------------
def test_basic_usage():
    params = {"w": jnp.ones((4, 3))}
    grads = {"w": normal((4, 3))}

    optimizer = kron()
    opt_state = optimizer.init(params)

    updates, opt_state = optimizer.update(grads, opt_state)
    new = optax.apply_updates(params, updates)
    assert new["w"].shape == (4, 3) and not equal(new, params)


def loss_fn(params: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum((params - x) ** 2)


@pytest.mark.parametrize("method", [xmat, low_rank_approximation, affine])
def test_the_whitening_program(method: Callable):
    """With the rank of 10 that three numbers are too few for."""
    params = jnp.array([1.0, 2.0, 3.0])
    x = jnp.array([0.0, 0.0, 0.0])
    opt = method(
        learning_rate=1.0,
        b1=0.0,
        preconditioner_update_probability=1.0,  # preconditioner update frequency
    )
    opt_state = opt.init(params)

    @jax.jit
    def step(params: jax.Array, x: jax.Array, opt_state: Tree) -> tuple:
        loss_val, grad = jax.value_and_grad(loss_fn)(params, x)
        updates, opt_state = opt.update(grad, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss_val

    losses = []
    for _ in range(200):
        params, opt_state, loss_val = step(params, x, opt_state)
        losses.append(float(loss_val))
        if loss_val < 1e-4:
            break
    assert losses[0] == 14.0 and losses[-1] < 1e-4


@pytest.mark.parametrize("released", [False, True], ids=["as the README has it", "as the package has it"])
@pytest.mark.parametrize("method", [xmat, low_rank_approximation, affine])
def test_the_hessian_program(method: Callable, released: bool):
    params = jnp.array([1.0, 2.0, 3.0])
    x = jnp.array([0.0, 0.0, 0.0])
    opt = method(learning_rate=1.0, b1=0.0)
    opt_state = opt.init(params)

    @jax.jit
    def step(key: jax.Array, i: jax.Array, params: jax.Array, x: jax.Array, opt_state: Tree) -> tuple:
        key, subkey = jax.random.split(key)
        loss_fn_out, grad, hvp, vector, update_precond = hessian_helper(
            subkey,
            *([i] if released else []),
            loss_fn,
            params,
            loss_fn_extra_args=(x,),
            has_aux=False,
            preconditioner_update_probability=1.0,  # update frequency handled in hessian_helper
        )
        updates, opt_state = opt.update(grad, opt_state, Hvp=hvp, vector=vector, update_preconditioner=update_precond)
        return key, optax.apply_updates(params, updates), opt_state, loss_fn_out

    key = jax.random.PRNGKey(0)
    losses = []
    for i in range(200):
        key, params, opt_state, loss_val = step(key, i, params, x, opt_state)
        losses.append(float(loss_val))
        if loss_val < 1e-4:
            break
    assert losses[0] == 14.0 and losses[-1] < 1e-4
    assert method is not xmat or len(losses) == 2


# ---- hessian_helper -------------------------------------------------------------------------
def loss_and_aux(params: Tree, scale: float = 1.0) -> tuple[jax.Array, str]:
    return scale * jnp.sum(params**3), jnp.ones(2)


HELPED: list[tuple[tuple, dict]] = [
    ((0, loss_and_aux, jnp.ones(3), (2.0,), True, 0.01), {}),
    ((1, loss_and_aux, jnp.ones(3), (2.0,)), {"has_aux": True, "preconditioner_update_probability": 0.01}),
    ((np.int32(1), loss_and_aux, jnp.ones(3), (2.0,), True), {"preconditioner_update_probability": 0.01}),
    ((jnp.int32(0), loss_and_aux, jnp.ones(3), (2.0,), True, 0.01), {}),
    ((0,), {"loss_fn": loss_and_aux, "params": jnp.ones(3), "loss_fn_extra_args": (2.0,), "has_aux": True}),
    (
        (),
        {
            "train_step": 0,
            "loss_fn": loss_and_aux,
            "params": jnp.ones(3),
            "loss_fn_extra_args": (2.0,),
            "has_aux": True,
        },
    ),
    ((loss_and_aux, jnp.ones(3), (2.0,), True, 1.0), {}),
    ((None, loss_and_aux, jnp.ones(3), (2.0,), True, 1.0), {}),
    ((loss_and_aux,), {"params": jnp.ones(3), "loss_fn_extra_args": (2.0,), "has_aux": True, "train_step": 1}),
]


@pytest.mark.parametrize(("args", "named"), HELPED)
def test_the_helper_with_and_without_a_step(args: tuple, named: dict):
    """The first two steps update whatever the probability is."""
    (loss, aux), grads, hvp, v, update = hessian_helper(jax.random.PRNGKey(1), *args, **named)
    assert bool(update) and loss == 6.0 and aux.shape == (2,)
    assert jnp.allclose(grads, 6.0) and jnp.allclose(hvp, 12 * v) and v.all()


def test_a_later_step_tosses_the_coin():
    keys = jax.random.split(jax.random.PRNGKey(0), 200)
    flags = jax.vmap(lambda k: hessian_helper(k, 2, lambda p: jnp.sum(p**2), jnp.ones(2), (), False, 0.3)[4])(keys)
    assert 30 < int(flags.sum()) < 90


NONSENSE = [
    ((jnp.ones(3), loss_and_aux), "train_step is of type ArrayImpl and must be a whole number, from 0"),
    ((0.5, loss_and_aux, jnp.ones(3)), "train_step is 0.5 and must be a whole number, from 0"),
    ((-1, loss_and_aux, jnp.ones(3)), "train_step is -1 and must be"),
    (({"w": 1.0}, loss_and_aux), "train_step is of type dict and must be"),
    ((0, jnp.ones(3), loss_and_aux), "loss_fn is of type ArrayImpl and must be a function"),
    ((0,), "loss_fn is of type NoneType and must be a function"),
    ((), "loss_fn is of type NoneType and must be a function"),
]


@pytest.mark.parametrize(("args", "text"), NONSENSE)
def test_nonsense_is_one_sentence(args: tuple, text: str):
    orders = r"; give \(key, loss_fn, params, ...\) or \(key, train_step, loss_fn, params, ...\)$"
    with pytest.raises(TypeError, match=f"^hessian_helper: {text}.*{orders}"):
        hessian_helper(jax.random.PRNGKey(0), *args)
    with pytest.raises(TypeError, match="train_step is given twice, as 0 and by its name; leave one out"):
        hessian_helper(jax.random.PRNGKey(0), 0, loss_and_aux, jnp.ones(3), train_step=0)


# ---- schedules ------------------------------------------------------------------------------
def test_the_schedule_as_it_is_made_and_given():
    by_place, by_name = precond_update_prob_schedule(0.9, 0.1, 0.01, 5), precond_update_prob_schedule(min_prob=0.02)
    assert by_place(0) == pytest.approx(0.9) and by_place(10_000) == pytest.approx(0.1)
    assert by_name(0) == 1.0 and by_name(100_000) == pytest.approx(0.02)
    for given in (by_name, lambda n: jnp.maximum(jnp.exp(-0.1 * n), 0.1), 0.5):
        params = {"w": jnp.ones((4, 3))}
        optimizer = kron(optax.linear_schedule(0.1, 0.0, 5), 0.9, 0.1, None, given)
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        assert bool(jnp.isfinite(updates["w"]).all())
