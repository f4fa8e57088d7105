"""What drives an optax transformation, from its package (flax's linen and nnx, equinox), and what keeps its state."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import psgd_jax_backend
from psgd_jax_backend import PSGDState, hessian_helper, xmat
from psgd_jax_backend._testing import RECIPES, SOME, compiled, equal, gradients, small, types

Tree = Any
ROOT = Path(__file__).resolve().parents[1]
EACH_KIND = ("procrustes", "kron", "kron_newton", "xmat")
TWO_KINDS = ("procrustes", "kron_newton")  # of leaves and their gradients; with products
each_kind, two_kinds = (pytest.mark.parametrize("name", names) for names in (EACH_KIND, TWO_KINDS))

IMAGES, LABELS = load_digits(return_X_y=True)
X = jnp.asarray(IMAGES[:200].reshape(200, 4, 2, 4, 2).mean((2, 4)).reshape(200, 16) / 16, jnp.float32)
Y = jnp.asarray(LABELS[:200])


HALF = 20  # steps to a checkpoint, and from it to the end


def rated(name: str) -> optax.GradientTransformationExtraArgs:
    """A method at a rate that suits it."""
    return getattr(psgd_jax_backend, name)(0.2 if RECIPES[name].newton else 0.1)


def cross_entropy(model: Callable[[jax.Array], jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()


def with_product(loss: Callable, params: Tree, step: Any) -> tuple[jax.Array, Tree, dict[str, Any]]:
    """Loss, gradients, and what methods that fit Hessian-vector products take beside them."""
    value, grads, *rest = hessian_helper(jax.random.fold_in(jax.random.key(0), step), loss, params)
    return value, grads, dict(zip(("Hvp", "vector", "update_preconditioner"), rest, strict=True))


def repeated(step: Callable, state: Tree) -> tuple[Tree, list[jax.Array]]:
    """The state after half of the steps, and their losses."""
    losses = []
    for _ in range(HALF):
        state, value = step(state)
        losses.append(value)
    return state, losses


def own(state: Tree) -> list[PSGDState]:
    """The states of PSGD methods in another."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PSGDState))
    return [x for x in leaves if isinstance(x, PSGDState)]


def by_orbax(path: Path, saved: Tree, like: Tree) -> Tree:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


# ---- clients --------------------------------------------------------------------------------
class Net(nn.Module):
    """Two layers with boxed kernels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        dense = partial(nn.Dense, 16, use_bias=False, kernel_init=boxed)
        return dense()(nn.tanh(dense()(x)))


@pytest.mark.contract("jax: clients")
@pytest.mark.contract("jax: checkpoints")
@two_kinds
def test_a_train_state_of_flax_trains_boxes_and_resumes(name: str, tmp_path: Path):
    """`apply_gradients` gives `update` no more than gradients; with products, its two lines are written out."""
    net, tx = Net(), rated(name)

    def create() -> TrainState:
        made = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(0), X)["params"], tx=tx)
        return made.replace(step=jnp.zeros((), jnp.int32))  # a Python number is of another type than what is restored

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss(params: Tree) -> jax.Array:
            return cross_entropy(lambda x: state.apply_fn({"params": params}, x))

        if not RECIPES[name].newton:
            value, grads = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), value
        value, grads, extra = with_product(loss, state.params, state.step)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

    first = create()
    (halfway, _), losses = repeated(step, first), []
    state, losses = repeated(step, halfway)
    assert losses[-1] < 0.6 * step(first)[1]
    assert isinstance(state.params["Dense_0"]["kernel"], nn.Partitioned)
    resumed, _ = repeated(step, by_orbax(tmp_path / "checkpoint", halfway, jax.eval_shape(create)))
    assert equal(resumed, state) and int(state.step) == 2 * HALF


class Model(nnx.Module):
    """Two layers, and a count that is no parameter."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.head = (nnx.Linear(16, 16, use_bias=False, rngs=rngs) for _ in range(2))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.tanh(self.hidden(x)))


def with_nnx(tx: optax.GradientTransformation, seed: int = 0) -> tuple[Model, nnx.Optimizer]:
    model = Model(nnx.Rngs(seed))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.contract("jax: clients")
@pytest.mark.contract("jax: checkpoints")
@each_kind
def test_an_optimizer_of_nnx_trains_comes_apart_and_resumes(name: str, tmp_path: Path):
    """Its `update` hands products on."""
    tx = rated(name)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
        if RECIPES[name].newton:
            graph, params, rest = nnx.split(model, nnx.Param, ...)

            def loss(p: nnx.State) -> jax.Array:
                return cross_entropy(nnx.merge(graph, p, rest))

            value, grads, extra = with_product(loss, params, optimizer.step[...])
        else:
            (value, grads), extra = nnx.value_and_grad(cross_entropy)(model), {}
        optimizer.update(model, grads, **extra)
        model.calls[...] += 1
        return value

    pair = with_nnx(tx)
    losses = [step(*pair) for _ in range(HALF)]
    halfway = jax.tree.map(jnp.copy, nnx.state(pair))
    losses += [step(*pair) for _ in range(HALF)]
    assert losses[-1] < 0.6 * losses[0]
    restored = by_orbax(tmp_path / "checkpoint", halfway, jax.tree.map(ocp.utils.to_shape_dtype_struct, halfway))
    merged, updated = nnx.merge(nnx.graphdef(pair), restored), with_nnx(tx, seed=1)
    nnx.update(updated, halfway)
    for resumed in (merged, updated):
        for _ in range(HALF):
            step(*resumed)
        assert equal(nnx.state(resumed), nnx.state(pair)) and int(resumed[0].calls[...]) == 2 * HALF


class Module(eqx.Module):
    """A perceptron, which holds functions too, and an array of whole numbers."""

    layers: eqx.nn.MLP
    order: jax.Array

    def __init__(self, seed: int) -> None:
        self.layers = eqx.nn.MLP(16, 16, 16, 1, jax.nn.tanh, key=jax.random.key(seed))
        self.order = jnp.arange(16)[::-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.layers)(x[:, self.order])


@pytest.mark.contract("jax: clients")
@pytest.mark.contract("jax: checkpoints")
@two_kinds
def test_a_module_of_equinox_trains_and_resumes(name: str):
    """None where it holds no parameter."""
    tx = rated(name)

    def create(seed: int) -> Tree:
        model = Module(seed)
        return model, tx.init(eqx.filter(model, eqx.is_inexact_array)), jnp.zeros((), jnp.int32)

    @eqx.filter_jit
    def step(now: Tree) -> tuple[Tree, jax.Array]:
        model, state, t = now
        params, static = eqx.partition(model, eqx.is_inexact_array)
        if RECIPES[name].newton:
            value, grads, extra = with_product(lambda p: cross_entropy(eqx.combine(p, static)), params, t)
        else:
            (value, grads), extra = eqx.filter_value_and_grad(cross_entropy)(model), {}
        updates, state = tx.update(grads, state, params, **extra)
        return (eqx.apply_updates(model, updates), state, t + 1), value

    first = create(0)
    halfway, _ = repeated(step, first)
    last, losses = repeated(step, halfway)
    assert losses[-1] < 0.6 * step(first)[1]
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, halfway)
    for like in (create(1), eqx.filter_eval_shape(create, 1)):
        file.seek(0)
        resumed, _ = repeated(step, eqx.tree_deserialise_leaves(file, like))
        assert equal(*(eqx.filter(x, eqx.is_array) for x in (resumed, last)))


@pytest.mark.contract("jax: clients")
@pytest.mark.parametrize("name", EACH_KIND)
def test_the_state_of_an_nnx_optimizer_keeps_its_structure(name: str):
    """Or it could be no carry of a loop, would be traced twice, and no target for what was saved after a step."""

    def structure(steps: int) -> Any:
        def made() -> tuple[Model, nnx.Optimizer]:
            model, optimizer = with_nnx(rated(name))
            params = nnx.state(model, nnx.Param)
            for _ in range(steps):
                optimizer.update(model, params, **with_product(lambda p: 0.0, params, 0)[2])
            return model, optimizer

        return jax.tree.structure(nnx.state(nnx.eval_shape(made)[1]))

    assert structure(0) == structure(1)


# ---- checkpoints ----------------------------------------------------------------------------
def by_manager(path: Path, saved: Tree, like: Tree) -> Tree:
    with ocp.CheckpointManager(path) as manager:
        manager.save(HALF, args=ocp.args.StandardSave(saved))
        manager.wait_until_finished()
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))


def by_pytree_checkpointer(path: Path, saved: Tree, like: Tree) -> Tree:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
        return checkpointer.restore(path, like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))


def by_name(path: Path, saved: Tree, like: Tree) -> Tree:
    """Without a target orbax knows dicts and lists alone, so leaves are in another order; their names are the same."""

    def named(tree: Tree) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(at, simple=True, separator="/"): leaf for at, leaf in leaves}

    plain = by_orbax(path, saved, None)
    assert not own(plain) and named(plain).keys() == named(like).keys()
    return jax.tree.unflatten(jax.tree.structure(like), [named(plain)[name] for name in named(like)])


def by_flax(path: Path, saved: Tree, like: Tree) -> Tree:
    path.write_bytes(flax.serialization.to_bytes(saved))
    return flax.serialization.from_bytes(like, path.read_bytes())


def by_equinox(path: Path, saved: Tree, like: Tree) -> Tree:
    eqx.tree_serialise_leaves(path, saved)
    return eqx.tree_deserialise_leaves(path, like)


def by_pickle(path: Path, saved: Tree, like: Tree) -> Tree:
    path.write_bytes(pickle.dumps(saved))
    return pickle.loads(path.read_bytes())


KEEPERS = (by_orbax, by_manager, by_pytree_checkpointer, by_name, by_flax, by_equinox, by_pickle)


def walked(made: tuple, params: Tree, state: Tree, steps: range) -> tuple[Tree, Tree]:
    for t in steps:
        updates, state = made[1](gradients(jax.tree.map(jnp.asarray, params), t), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@cache
def journey(name: str, dtype: str) -> tuple[Tree, Tree, Tree]:
    """Parameters and state at the start, halfway, and at the end."""
    made = compiled(SOME[name])
    first = small(dtype), made[0].init(small(dtype))
    halfway = walked(made, *first, range(3))
    last = walked(made, *halfway, range(3, 6))
    assert not equal(walked(made, halfway[0], first[1], range(3, 6)), last)  # the state matters
    return first, halfway, last


@pytest.mark.contract("jax: checkpoints")
@pytest.mark.parametrize("keeper", KEEPERS, ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, "float32") for n in EACH_KIND), *((n, "bfloat16") for n in TWO_KINDS)]
)
def test_a_resumed_run_is_the_same_to_the_bit(name: str, dtype: str, keeper: Callable, tmp_path: Path):
    _, halfway, last = journey(name, dtype)
    made = compiled(SOME[name])
    like = jax.eval_shape(lambda: (small(dtype), made[0].init(small(dtype))))
    restored, traces = keeper(tmp_path / "checkpoint", halfway, like), len(made[2])
    assert jax.tree.structure(restored) == jax.tree.structure(halfway) and equal(restored, halfway)
    assert types(jax.tree.map(jnp.asarray, restored)) == types(halfway)
    assert equal(walked(made, *restored, range(3, 6)), last) and len(made[2]) == traces


@pytest.mark.contract("jax: checkpoints")
def test_a_state_within_other_states_resumes(tmp_path: Path):
    params, kinds = small() | {"b": jnp.ones(5)}, {"w": "matrix", "b": "rest"}
    parts = {"matrix": xmat(0.1), "rest": optax.inject_hyperparams(optax.adamw)(0.1)}
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.partition(parts, kinds)), 2)
    made = tx, jax.jit(tx.update)
    halfway = walked(made, params, tx.init(params), range(3))  # in the middle of an accumulation
    restored = by_orbax(tmp_path / "checkpoint", halfway, jax.eval_shape(lambda: (params, tx.init(params))))
    assert equal(*(walked(made, *x, range(3, 6)) for x in (restored, halfway)))


def finish(folder: str) -> None:
    """What another process does: it makes everything anew but for what lies in a folder."""
    made = compiled(SOME["procrustes"])
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.eval_shape(lambda: (small(), made[0].init(small())))
        restored = checkpointer.restore(Path(folder) / "halfway", like)
        checkpointer.save(Path(folder) / "last", walked(made, *restored, range(3, 6)))


@pytest.mark.contract("jax: checkpoints")
def test_another_process_goes_on_to_the_bit(tmp_path: Path):
    _, halfway, last = journey("procrustes", "float32")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "halfway", halfway)
        checkpointer.wait_until_finished()
        command = f"from {__name__} import finish; finish({str(tmp_path)!r})"
        done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert equal(checkpointer.restore(tmp_path / "last", last), last)
