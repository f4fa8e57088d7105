"""What optax and JAX demand of a transformation: types, trees, wrappers, injected numbers, switches, bad inputs."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import psgd_jax_backend
from psgd.methods import METHODS
from psgd_jax_backend import (
    hessian_helper,
    kron,
    kron_whiten,
    kwns4,
    precond_update_prob_schedule,
    procrustes,
    quad,
    scale_by_kron,
    summary,
)
from psgd_jax_backend._state import states
from psgd_jax_backend._testing import (
    ALIASES,
    RECIPES,
    SOME,
    TAKE_MASK,
    close,
    compiled,
    dtypes,
    equal,
    fed,
    gradients,
    normal,
    rank,
    small,
    some,
    tree,
    types,
)

pytestmark = pytest.mark.xdist_group("jax updates")  # with `transform_test`, whose compiled updates it shares

Tree = Any
FEW = {name: SOME[name] for name in ("procrustes", "kron", "xmat")}  # a rotation, a branch, a whole model
few = pytest.mark.parametrize("make", FEW.values(), ids=FEW)
named = pytest.mark.parametrize("name", METHODS)


def direction(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`scale_by_<name>`, given products where it needs them."""
    scaling = getattr(psgd_jax_backend, f"scale_by_{name}")
    return fed(scaling) if RECIPES[name].newton else scaling


def steps(optimizer: Any, params: Tree, grads: list[Tree]) -> tuple[Tree, Any, list[Tree]]:
    """Parameters, state and all updates after some gradients, by one compiled update."""
    update, state, all_updates = jax.jit(optimizer.update), optimizer.init(params), []
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
    return params, state, all_updates


# ---- arguments ------------------------------------------------------------------------------
@pytest.mark.contract("jax: arguments")
@named
def test_faces_make_transformations_with_extra_arguments(name: str):
    for function in (getattr(psgd_jax_backend, name), getattr(psgd_jax_backend, f"scale_by_{name}")):
        assert isinstance(function(), optax.GradientTransformationExtraArgs)


@pytest.mark.contract("jax: arguments")
@pytest.mark.contract("input: names")
@named
def test_an_unknown_name_lists_all_that_there_are(name: str):
    """The adapter's arguments and the mask too; and what was meant, where other packages call it otherwise."""
    for public, wrong, meant in (
        (name, "lr", "learning_rate"),
        (name, "stak", "stack"),
        (f"scale_by_{name}", "sed", "seed"),
    ):
        function = getattr(psgd_jax_backend, public)
        with pytest.raises(ValueError, match="It has") as caught:
            function(**{wrong: 0.1})
        said, listed = re.fullmatch(r"(.*) It has (.*)", str(caught.value)).groups()
        assert said == f"{name}: unknown hyperparameter {wrong!r}; did you mean {meant!r}?"
        assert sorted(listed.split(", ")) == sorted(inspect.signature(function).parameters)


@pytest.mark.contract("jax: arguments")
@pytest.mark.parametrize("decoupled", [True, False])
def test_decay_without_parameters_is_an_error_of_optax(decoupled: bool):
    optimizer, params = kwns4(weight_decay=0.1, decoupled_weight_decay=decoupled), small()
    found = []
    for tx in (optimizer, optax.adamw(0.1)):
        with pytest.raises(ValueError) as caught:
            jax.eval_shape(tx.update, params, tx.init(params))
        found.append(str(caught.value))
    assert found[0] == found[1]


# ---- trees ----------------------------------------------------------------------------------
class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclass
class Node:
    first: Any
    second: Any


FORMS: dict[str, Callable[[Any, Any], Tree]] = {
    "tuple": lambda w, b: (w, (), b),
    "named": Pair,
    "custom": Node,
    "ordered": lambda w, b: OrderedDict(z=w, a=b),
    "masked": lambda w, b: {"a": w, "b": optax.MaskedNode(), "c": b},
    "hollow": lambda w, b: [None, w, {"x": None, "y": b}],
}


@pytest.mark.contract("jax: trees")
@few
def test_containers_come_back_with_what_a_list_would_hold(make: Callable):
    optimizer, (w, b) = make(0.1), (normal((4, 3)), normal((30,), 1))

    @jax.jit
    def updates(w: Any, b: Any) -> list[Tree]:
        forms = [[w, b], *(form(w, b) for form in FORMS.values())]
        return [optimizer.update(x, optimizer.init(x), x)[0] for x in forms]

    plain, *others = updates(w, b)
    for form, other in zip(FORMS.values(), others, strict=True):
        assert jax.tree.structure(other) == jax.tree.structure(form(w, b))
        close(jax.tree.leaves(other), plain)


# ---- state ----------------------------------------------------------------------------------
@pytest.mark.contract("jax: state")
@pytest.mark.contract("jax: control flow")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@named
def test_state_fits_a_scan_of_branches_in_every_dtype(name: str, dtype: str):
    """Both refuse what changes its structure, shape, dtype or weak type."""
    with jax.enable_x64(dtype == "float64"):
        optimizer, params = ALIASES[name](0.1), tree(dtype)
        state = optimizer.init(params)

        def body(carry: tuple, t: jax.Array) -> tuple:
            updates, new = jax.lax.cond(t > 0, optimizer.update, lambda g, s, p: (g, s), params, *carry[::-1])
            return (optax.apply_updates(carry[0], updates), new), None

        def whole(params: Tree) -> tuple:
            return jax.lax.scan(body, (params, optimizer.init(params)), jnp.arange(3))[0]

        after = jax.eval_shape(whole, params)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
        for new in (after, (params, jax.eval_shape(optimizer.init, params))):
            assert jax.tree.structure(new) == jax.tree.structure((params, state)) and types(new) == types(
                (params, state)
            )
        assert not any(weak for *_, weak in types(state))


@pytest.mark.contract("jax: donation")
@few
def test_state_and_parameters_may_be_donated(make: Callable):
    """Whether the state was made by a compiled function or not."""
    optimizer, plain, _ = compiled(make)
    grads = tree()

    @partial(jax.jit, donate_argnums=(1, 2))
    def step(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for init in (optimizer.init, jax.jit(optimizer.init)):
        (ours, state), (theirs, kept) = ((p, init(p)) for p in (tree(), tree()))
        for _ in range(2):
            updates, kept = plain(grads, kept, theirs)
            theirs = optax.apply_updates(theirs, updates)
            spent = state, ours
            ours, state = step(grads, *spent)
            assert all(x.is_deleted() for x in jax.tree.leaves(spent))
        close(ours, theirs)
        close(state, kept, ulps=64)
    with pytest.raises((ValueError, RuntimeError), match=r"deleted or donated|has been deleted"):
        step(grads, *spent)


# ---- control flow ---------------------------------------------------------------------------
@pytest.mark.contract("jax: control flow")
@few
def test_an_update_outside_of_jit_is_the_compiled_one(make: Callable):
    optimizer, update, _ = compiled(make)
    params = small()
    state, grads = optimizer.init(params), gradients(params, 1)
    close(optimizer.update(grads, state, params)[0], update(grads, state, params)[0])


DERIVED = [
    pytest.param(name, at, id=f"{name}-{at}", marks=pytest.mark.xfail(strict=True, reason=reason) if reason else ())
    for name, at, reason in [
        ("procrustes", 0, "norm_bound of the zero matrix has no derivative: that of a norm at zero"),
        ("procrustes", 2, ""),
        ("kron", 0, ""),
        ("xmat", 0, ""),
    ]
]


@pytest.mark.contract("jax: control flow")
@pytest.mark.parametrize(("name", "at"), DERIVED)
def test_an_update_can_be_differentiated(name: str, at: int):
    """The gradient of what a step gives is its slope; the step is the first one, or one of factors that have moved."""
    optimizer = ALIASES[name](0.1)
    with jax.enable_x64(True):
        x = {"w": normal((4, 3), 0, "float64")}
        _, state, _ = steps(optimizer, x, [gradients(x, t) for t in range(at)])

        def after(p: Tree) -> jax.Array:
            updates, _ = optimizer.update(gradients(p, 9), state, p)
            return sum(jnp.sum(jnp.cos(u) * u) for u in jax.tree.leaves(updates))

        v = jax.tree.map(lambda p: jnp.cos(7 * p), x)
        gradient = jax.jit(jax.grad(after))(x)
        one = jax.jit(after)
        ahead, behind = (one(jax.tree.map(lambda p, d, e=e: p + e * d, x, v)) for e in (1e-6, -1e-6))
        measured = float(ahead - behind) / 2e-6
        assert abs(measured) > 1e-4
        assert float(optax.tree.vdot(gradient, v)) == pytest.approx(measured, rel=1e-5)


@pytest.mark.contract("jax: control flow")
@few
def test_checkify_finds_nothing(make: Callable):
    """No NaN, no division by zero, no index out of bounds, also where a branch is not taken; at zero gradients too."""
    optimizer, params = make(0.1), tree()

    @jax.jit
    def checked(grads: Tree, state: Any) -> Any:
        return checkify.checkify(optimizer.update, errors=checkify.all_checks)(grads, state, params)

    state = optimizer.init(params)
    for grads in (gradients(params, 1), jax.tree.map(jnp.zeros_like, params)):
        error, (_, state) = checked(grads, state)
        assert error.get() is None


@pytest.mark.contract("jax: ensembles")
@few
def test_members_of_an_ensemble_step_and_skip_alone(make: Callable):
    """Of three members with gradients of other sizes one has a NaN at the second of three steps."""
    optimizer, update, _ = compiled(make)
    params = [{"w": k * normal((4, 3), k)} for k in (1, 2, 3)]
    grads = [[{"w": 10.0**k * normal((4, 3), 10 * k + t)} for t in range(3)] for k in range(3)]
    grads[1][1] = {"w": grads[1][1]["w"].at[0, 0].set(jnp.nan)}

    def stacked(trees: list[Tree]) -> Tree:
        return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)

    both, together = stacked(params), jax.jit(jax.vmap(optimizer.update))
    state = jax.vmap(optimizer.init)(both)
    for t in range(3):
        updates, state = together(stacked([g[t] for g in grads]), state, both)
        both = optax.apply_updates(both, updates)
    for k, p in enumerate(params):
        alone = optimizer.init(p)
        for g in grads[k]:
            updates, alone = update(g, alone, p)
            p = optax.apply_updates(p, updates)
        close(jax.tree.map(lambda x, k=k: x[k], both), p)
        assert optax.tree.get(state, "skipped")[k].tolist() == optax.tree.get(alone, "skipped").tolist() == [k == 1, 0]


# ---- optax around it ------------------------------------------------------------------------
def wide_gradients(k: int) -> list[Tree]:
    return [jax.tree.map(lambda p, t=t: normal(p.shape, 10 * k + t), small()) for t in range(3)]


@pytest.mark.contract("jax: wrappers")
@few
def test_accumulated_gradients_are_one_step_of_their_mean(make: Callable):
    """float32 gradients of bfloat16 parameters, as MultiSteps keeps them; between, nothing moves."""
    params, grads = small("bfloat16"), [g for k in range(2) for g in wide_gradients(k)]
    several = optax.MultiSteps(make(0.1), every_k_schedule=3)
    means = [jax.tree.map(lambda *xs: sum(xs) / 3, *grads[i : i + 3]) for i in (0, 3)]
    ours, state, updates = steps(several, params, grads)
    theirs, expected, _ = steps(make(0.1), params, means)
    assert dtypes(ours, updates) == {"bfloat16"} and types(state) == types(several.init(params))
    assert [any(bool(u["w"].any()) for u in updates[i : i + 1]) for i in range(6)] == [False, False, True] * 2
    close(ours, theirs)
    close(state.inner_opt_state, expected, ulps=1e3)  # the means are summed in another order


@pytest.mark.contract("jax: wrappers")
@pytest.mark.parametrize("policy", ["skip", "propagate"])
@few
def test_apply_if_finite_leaves_a_bad_step_out(make: Callable, policy: str):
    """Whether the method skips it first or lets it through."""
    params, (first, second, third) = small(), wide_gradients(0)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.inf), second)
    wrapped = optax.apply_if_finite(make(0.1, nonfinite=policy), 2)
    ours, state, updates = steps(wrapped, params, [first, bad, third])
    theirs, _, _ = steps(make(0.1, nonfinite=policy), params, [first, third])
    assert not updates[1]["w"].any() and int(state.total_notfinite) == 1
    close(ours, theirs)


@pytest.mark.contract("jax: wrappers")
@pytest.mark.parametrize("split", [optax.partition, optax.multi_transform])
@pytest.mark.parametrize("newton", [False, True])
def test_other_leaves_may_have_another_optimizer(split: Callable, newton: bool):
    make = psgd_jax_backend.kron_newton if newton else kron
    params = {"w": normal((4, 3)), "deep": {"b": normal((3,), 1), "w": normal((3, 2), 2)}}
    kind = lambda p: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "rest", p)  # noqa: E731
    both = split({"matrix": make(0.1), "rest": optax.adamw(0.1)}, kind, mask_compatible_extra_args=newton)
    grads = gradients(params, 1)
    pair = {"Hvp": grads, "vector": params, "update_preconditioner": True} if newton else {}

    def part(tree: Tree) -> Tree:
        return {"w": tree["w"], "deep": {"w": tree["deep"]["w"]}}

    mine = {k: x if x is True else part(x) for k, x in pair.items()}
    rest = {"b": params["deep"]["b"]}

    @jax.jit
    def all_three() -> tuple[Tree, ...]:
        alone, other = make(0.1), optax.adamw(0.1)
        return (
            both.update(grads, both.init(params), params, **pair)[0],
            alone.update(part(grads), alone.init(part(params)), part(params), **mine)[0],
            other.update({"b": grads["deep"]["b"]}, other.init(rest), rest)[0],
        )

    ours, matrices, vectors = all_three()
    close(part(ours), matrices)
    close(ours["deep"]["b"], vectors["b"])


@pytest.mark.contract("jax: wrappers")
def test_a_chain_clips_before_it():
    params, grads = small(), jax.tree.map(lambda g: 1e3 * g, gradients(small(), 1))
    clipped = jax.tree.map(lambda g: g * (0.5 / optax.tree.norm(grads)), grads)
    ours, _, _ = steps(optax.chain(optax.clip_by_global_norm(0.5), kron(0.1)), params, [grads] * 2)
    theirs, _, _ = steps(kron(0.1), params, [clipped] * 2)
    free, _, _ = steps(kron(0.1), params, [grads] * 2)
    close(ours, theirs, ulps=64)  # another rounding of the gradient
    assert float(optax.tree.norm(optax.tree.sub(ours, free))) > 0.01


UNMAPPED = "an empty model has no factor, others have one: map_params asks for the state of an empty one"
MAPPED = [name for name in METHODS if name != "dense_newton"]
MAPPED += [pytest.param("dense_newton", marks=pytest.mark.xfail(strict=True, reason=UNMAPPED))]


@pytest.mark.contract("jax: tree tools")
@pytest.mark.parametrize("name", MAPPED)
def test_tools_of_optax_find_their_way_in_the_state(name: str):
    optimizer, params = ALIASES[name](0.1, **rank(name, 2)), small()
    state = optimizer.init(params)
    mapped = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state) and types(mapped) == types(state)
    (own,), (new,) = states(state), states(mapped)
    # What belongs to parameters is theirs: of a preconditioner of all of them only the momentum.
    changed = {"momentum": RECIPES[name].momentum, "Q": not RECIPES[name].joint, "L": not RECIPES[name].joint}
    for part, moves in changed.items():
        expected = jax.tree.map(lambda x, k=moves: x + int(k), getattr(own, part))
        assert equal(getattr(new, part), expected), part
    assert int(optax.tree.get(mapped, "count")) == int(optax.tree.get(state, "count")) == 0
    later = optax.tree.set(state, count=jnp.asarray(7, jnp.int32))
    assert int(optax.tree.get(later, "count")) == 7 and types(later) == types(state)


# ---- injected hyperparameters ---------------------------------------------------------------
def numbers(name: str) -> dict[str, float]:
    """The hyperparameters of a method that may be injected, but for the first scale, each inside its range."""
    chosen = {
        f.name: f.default
        for f in fields(METHODS[name])
        if not f.metadata["structural"] and f.metadata["kind"] == "number" and f.default is not None
    }
    chosen = {k if k != "lr" else "learning_rate": v for k, v in chosen.items() if "init_scale" not in k}
    assert not set(chosen) & set(getattr(psgd_jax_backend, name).static_args)
    return {k: 0.5 if v == inf else 0.9 * v if v else 0.2 for k, v in chosen.items()}


def injected(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    function, shape = getattr(psgd_jax_backend, name), rank(name, 2)
    made = optax.inject_hyperparams(function, static_args=tuple(shape))(**shape, **options)
    return fed(lambda: made)() if RECIPES[name].newton else made


@pytest.mark.contract("jax: hyperparameters")
@named
def test_all_numbers_can_be_scheduled(name: str):
    """A run whose numbers change after two steps is two steps with the first and two with the second ones."""
    early = numbers(name)
    late = {k: v / 2 for k, v in early.items()}
    assert {"learning_rate", "weight_decay"} < set(early) and len(early) > 3
    params, traces = small(), []
    schedules = {k: lambda t, k=k: jnp.where(t < 2, early[k], late[k]) for k in early}
    made = injected(name, **schedules)

    @jax.jit
    def update(*args: Tree) -> Tree:
        traces.append(args)
        return made.update(*args)

    constant = [ALIASES[name](**chosen, **rank(name, 2)) for chosen in (early, late)]
    before, after = (jax.jit(tx.update) for tx in constant)
    (ours, state), (theirs, alone) = (params, made.init(params)), (params, constant[0].init(params))
    first = types(state)
    for t, expected in enumerate((before, before, after, after)):
        updates, state = update(gradients(params, t), state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, alone = expected(gradients(params, t), alone, theirs)
        theirs = optax.apply_updates(theirs, updates)
    close(ours, theirs, ulps=64)
    assert len(traces) == 1 and types(state) == first
    assert {k: float(v) for k, v in state.hyperparams.items() if k in late} == pytest.approx(late)


@pytest.mark.contract("jax: hyperparameters")
@pytest.mark.parametrize("name", SOME)
def test_a_learning_rate_can_be_set_between_steps(name: str):
    """All other arguments at their defaults; nothing is traced again."""
    params, rates, traces = small(), [0.1, 0.1, 0.02], []
    made, plain = (
        injected(name, learning_rate=rates[0]),
        ALIASES[name](lambda t: jnp.asarray(rates)[t], **rank(name, 2)),
    )

    @jax.jit
    def update(*args: Tree) -> Tree:
        traces.append(args)
        return made.update(*args)

    ours, state = params, made.init(params)
    for t, rate in enumerate(rates):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        updates, state = update(gradients(params, t), state, ours)
        ours = optax.apply_updates(ours, updates)
    theirs, alone, _ = steps(plain, params, [gradients(params, t) for t in range(3)])
    close(ours, theirs, ulps=64)
    assert len(traces) == 1
    assert jax.tree.structure(optax.tree.get(state, "Q")) == jax.tree.structure(optax.tree.get(alone, "Q"))


@pytest.mark.contract("jax: hyperparameters")
@named
def test_what_shapes_the_program_is_known(name: str):
    """All that is no number, whole numbers, bounds on sizes, and what the adapter takes; the documentation tells."""
    function, scaling = getattr(psgd_jax_backend, name), getattr(psgd_jax_backend, f"scale_by_{name}")
    settings = {f.name: f for f in fields(METHODS[name])}
    for made in (function, scaling):
        static, free = set(made.static_args), set(numbers(name)) - {"learning_rate", "weight_decay"}
        assert {"stack", "lax_map_batch_size", "max_skips"} < static and not static & free
        assert ("scanned_layers" in static) is not RECIPES[name].joint
        assert all(x in static for x in settings if "max_s" in x or isinstance(settings[x].default, (bool, str)))
        assert f"`static_args={made.__name__}.static_args`" in made.__doc__
        injected = optax.inject_hyperparams(made, static_args=made.static_args)()
        assert {"stack", "max_skips"}.isdisjoint(injected.init(small() | {"v": normal((30,))}).hyperparams)
    assert set(function.static_args) - set(scaling.static_args) == {
        "mask" if name in TAKE_MASK else "weight_decay_mask"
    }


@pytest.mark.contract("jax: hyperparameters")
@pytest.mark.parametrize(
    "name", [x for x in psgd_jax_backend.__all__ if hasattr(getattr(psgd_jax_backend, x), "static_args")]
)
def test_every_function_is_injected_as_adamw_is(name: str):
    """Nothing is said of what shapes the program: optax sees no number there, and numbers elsewhere move."""
    function, params = getattr(psgd_jax_backend, name), small() | {"v": normal((30,))}
    shown = inspect.signature(function).parameters
    options = {"learning_rate": optax.linear_schedule(1e-3, 1e-4, 10)} if "learning_rate" in shown else {}
    made = optax.inject_hyperparams(function)(**options)
    method = METHODS.get(name.removeprefix("scale_by_"), METHODS["low_rank_approximation"])
    made = fed(lambda: made)() if method().recipe().newton else made
    state = jax.eval_shape(made.init, params)
    updates, new = jax.eval_shape(made.update, params, state, params)
    assert types(new) == types(state) and jax.tree.structure(updates) == jax.tree.structure(params)
    numbers = {k for k, p in shown.items() if isinstance(p.default, (int, float)) and not isinstance(p.default, bool)}
    assert numbers and set(state.hyperparams) == numbers and numbers.isdisjoint(function.static_args)


def test_a_default_is_shown_as_it_is():
    p = inspect.signature(kron).parameters["max_size_triangular"]
    q = inspect.signature(kron).parameters["preconditioner_update_probability"]
    assert (
        p.default == 8192 and repr(p.default) == "8192" and f"{p}".endswith("= 8192") and hash(p.default) == hash(8192)
    )
    assert not isinstance(p.default, int) and not callable(q.default) and q.default == precond_update_prob_schedule()
    given = kron(max_size_triangular=p.default, preconditioner_update_probability=q.default)
    assert summary(given, small()) == summary(kron(), small())


TRACED = [(procrustes, "max_skew_dense", 2.0), (quad, "max_skips", 3), (kron, "max_size_triangular", 64)]


@pytest.mark.contract("jax: hyperparameters")
@pytest.mark.parametrize(
    ("function", "name", "value"), [*TRACED, (scale_by_kron, "min_ndim_triangular", 1), (kron, "lax_map_batch_size", 4)]
)
def test_what_shapes_the_program_is_no_array(function: Callable, name: str, value: float):
    """optax makes arrays of all numbers that are given and that it is not told to leave alone."""
    made, method = optax.inject_hyperparams(function)(**{name: value}), function.__name__.removeprefix("scale_by_")
    known = optax.inject_hyperparams(function, static_args=function.static_args)(**{name: value})
    assert name not in known.init(small()).hyperparams
    remedy = f"with optax.inject_hyperparams give static_args={function.__name__}.static_args"
    told = f"{method}: {name} shapes the program, .* {remedy}"
    for init in (made.init, jax.jit(made.init)):
        with pytest.raises(ValueError, match=told) as caught:
            init(small())
        assert "\n" not in str(caught.value)


# ---- learning rates -------------------------------------------------------------------------
RATES: dict[str, Callable[[Any], Any]] = {
    "float64": lambda t: np.float64(1.0),
    "whole": lambda t: 1,
    "int32": lambda t: jnp.ones((), jnp.int32),
    "weak": lambda t: jnp.where(t < 0, 0.5, 1.0),
    "wide": lambda t: jnp.ones((), "float64" if jax.config.jax_enable_x64 else "float32"),
}


@pytest.mark.contract("jax: learning rate")
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_schedules_may_return_any_number(dtype: str, x64: bool):
    """Of the learning rate and of the arguments that are schedules themselves; the trajectory is that of the number."""
    with jax.enable_x64(x64):
        params = small(dtype)
        grads = gradients(params, 1)

        @jax.jit
        def updates(grads: Tree) -> list[Tree]:
            made = [kron(r, preconditioner_update_probability=r) for r in (1.0, *RATES.values())]
            return [tx.update(grads, tx.init(params), params) for tx in made]

        (plain, state), *others = updates(grads)
        assert dtypes(plain) == {dtype}
        for ours, new in others:
            close(ours, plain, ulps=1)
            assert types(new[0]) == types(state[0])


# ---- switches of JAX ------------------------------------------------------------------------
def flagged(switch: Callable[[], AbstractContextManager], name: str) -> None:
    """Init and one update, traced."""
    with switch():
        optimizer, params = direction(name)(), tree()
        jax.eval_shape(lambda g: optimizer.update(g, optimizer.init(params), params), params)


@pytest.mark.contract("jax: switches")
@named
def test_no_tracer_leaks(name: str):
    flagged(jax.check_tracer_leaks, name)


@pytest.mark.contract("jax: switches")
@named
def test_ranks_are_not_promoted(name: str):
    flagged(lambda: jax.numpy_rank_promotion("raise"), name)


@pytest.mark.contract("jax: switches")
@named
def test_dtypes_are_not_promoted(name: str):
    """For which optax's own learning rates and decay are too much."""
    flagged(lambda: jax.numpy_dtype_promotion("strict"), name)


@pytest.mark.contract("jax: switches")
@some
def test_a_compiled_step_moves_nothing_to_the_host_and_makes_no_nan(alias: Callable):
    """Nor where all gradients are zero."""
    optimizer, update, _ = compiled(alias)
    params = tree()
    grads = [gradients(params, 1), jax.tree.map(jnp.zeros_like, params)]
    state = optimizer.init(params)
    with jax.debug_nans(True), jax.transfer_guard("disallow"):
        for g in grads:
            updates, state = update(g, state, params)
    assert int(optax.tree.get(state, "count")) == 2 and types(updates) == types(params)


@pytest.mark.contract("jax: switches")
@pytest.mark.contract("jax: keys")
def test_no_key_is_used_twice():
    """One key serves the coin and the vector, for it is a number that both are functions of, and not consumed."""
    optimizer, params = psgd_jax_backend.kron_newton(0.1), small()

    @jax.jit
    def step(key: jax.Array, params: Tree, state: Any) -> tuple:
        own, key = jax.random.split(key)
        helped = hessian_helper(own, lambda p: jnp.sum(p["w"] ** 4), params, (), False, 0.5)
        pair = dict(zip(("Hvp", "vector", "update_preconditioner"), helped[2:], strict=True))
        return key, *optimizer.update(helped[1], state, params, **pair)

    with jax.debug_key_reuse(True):
        key, updates, state = step(jax.random.key(0), params, optimizer.init(params))
        step(key, params, state)
    assert types(updates) == types(params)


@pytest.mark.contract("jax: keys")
def test_noise_does_not_depend_on_how_keys_are_partitioned():
    found = []
    for flag in (False, True):
        with jax.threefry_partitionable(flag):
            optimizer = kron_whiten(0.1, preconditioner_update_probability=0.5)  # a coin, and a bound by noise
            helped = jax.jit(lambda k: hessian_helper(k, lambda p: jnp.sum(p["w"] ** 4), small()))(jax.random.key(3))
            found.append(
                (helped, steps(optimizer, small(), wide_gradients(0)), jax.random.normal(jax.random.key(3), 5))
            )
    assert equal(found[0][:2], found[1][:2])
    assert not equal(found[0][2], found[1][2])  # the switch was turned


@pytest.mark.contract("jax: callbacks")
@named
def test_a_step_calls_nothing_on_the_host(name: str):
    def program(policy: str) -> str:
        optimizer, params = ALIASES[name](0.1, nonfinite=policy), tree()
        return str(jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params))

    assert "callback" not in program("skip") and "callback" not in program("propagate")
    assert "callback" in program("raise")


# ---- x64 ------------------------------------------------------------------------------------
@pytest.mark.contract("jax: x64")
@few
def test_x64_may_be_turned_between_init_and_update(make: Callable):
    """Of float32 nothing changes. What float64 cannot keep, JAX says."""
    optimizer, params = make(0.1), {"w": normal((6, 3))}
    plain, expected, _ = steps(optimizer, params, [params])
    for first, then in ((False, True), (True, False)):
        with jax.enable_x64(first):
            state = optimizer.init(params)
        with jax.enable_x64(then):
            updates, new = jax.jit(optimizer.update)(params, state, params)
            assert types(new) == types(state) == types(expected)
            close(optax.apply_updates(params, updates), plain)
    with jax.enable_x64(True):
        wide = {"w": normal((6, 3), 0, "float64")}
        state = optimizer.init(wide)
    with pytest.raises((UserWarning, TypeError), match="float64"):
        jax.eval_shape(optimizer.update, wide, state, wide)


# ---- bad inputs -----------------------------------------------------------------------------
LEAVES = [0.5, np.float64(0.5), np.full((3, 2), 0.5, "float32"), np.full((3, 2), 0.5), jnp.asarray(0.5)]


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize("leaf", LEAVES, ids=["float", "numpy float", "float32", "float64", "weak"])
@pytest.mark.parametrize("make", [procrustes, kron, psgd_jax_backend.xmat])
def test_leaves_that_are_no_arrays_of_jax_step_as_those(make: Callable, leaf: Any):
    optimizer, params, array = make(0.1), {"w": leaf}, {"w": jnp.asarray(leaf, "float32")}
    update = jax.jit(optimizer.update)
    state, expected = optimizer.init(params), optimizer.init(array)
    assert types(state) == types(expected)
    ours, new = update(params, state, params)
    theirs, other = update(array, expected, array)
    assert equal((ours, new), (theirs, other)) and types((ours, new)) == types((array, expected))


OTHER_TREE = r"[Ee]xpected|mismatch|state belongs to (another|others)"
EXTRA = [None, optax.MaskedNode(), {"deep": jnp.ones(2)}]


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize("extra", EXTRA, ids=["none", "masked", "deep"])
@few
def test_a_gradient_where_another_tree_was_is_refused(make: Callable, extra: Any):
    """A place without a leaf is no leaf."""
    optimizer, params = make(0.1), {"a": normal((4, 3)), "b": normal((30,))}
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=OTHER_TREE):
        optimizer.update(params | {"b": extra}, state, params)


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize("extra", EXTRA, ids=["none", "masked", "deep"])
@few
def test_a_state_of_another_tree_is_refused(make: Callable, extra: Any):
    optimizer, params = make(0.1), {"a": normal((4, 3)), "b": normal((30,))}
    state = optimizer.init(params | {"b": extra})
    with pytest.raises(ValueError, match=OTHER_TREE):
        optimizer.update(params, state, params)


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize("extra", EXTRA[:2], ids=["none", "masked"])
def test_parameters_with_a_hole_where_a_gradient_is_are_refused(extra: Any):
    optimizer, params = scale_by_kron(), {"a": normal((4, 3)), "b": normal((30,))}
    with pytest.raises(ValueError, match=OTHER_TREE):
        optimizer.update(params, optimizer.init(params), params | {"b": extra})


FOREIGN = [
    (quad, (4, 3), (3, 4)),
    (quad, (6, 6), (2, 3, 2, 3)),  # of equal factors
    (quad, (12,), (12, 1)),
    (kron, (4, 3), (1, 4, 3)),
    (psgd_jax_backend.xmat, (4, 3), (3, 4)),
]


@pytest.mark.contract("jax: inputs")
@pytest.mark.parametrize(("make", "theirs", "ours"), FOREIGN)
def test_a_state_of_other_parameters_is_refused(make: Callable, theirs: tuple[int, ...], ours: tuple[int, ...]):
    optimizer, params = make(weight_decay=0.0), {"w": jnp.ones(ours)}
    state = optimizer.init({"w": jnp.ones(theirs)})
    with pytest.raises(ValueError, match=r"belongs? to (another|others); give update the tree that init was given"):
        jax.eval_shape(optimizer.update, params, state, params)


@pytest.mark.contract("jax: inputs")
def test_a_state_of_another_optimizer_is_refused():
    params = small()
    with pytest.raises(ValueError, match="number of updates and states"):
        procrustes(0.1).update(params, optax.adam(0.1).init(params), params)
