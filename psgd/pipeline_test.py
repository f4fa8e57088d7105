"""One step: its momentum rules, decisions, and what it does at the edges of the number range."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf, prod, sqrt
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework, double_precision
from psgd import noise, pipeline
from psgd._testing import normals
from psgd._xp import dtype_name, namespace
from psgd.arrays import Factors
from psgd.criterion import Pair, undamped
from psgd.geometry import GEOMETRIES
from psgd.hyperparameters import Method
from psgd.kron import DenseRule, Kronecker
from psgd.methods import METHODS
from psgd.noise import Counter
from psgd.pipeline import average, displacement, host_plan, plan, step
from psgd.recipe import Plan, Recipe, Schedule
from psgd.schedule import Averaging, StepInfo, capped_average, coin, corrected, from_first, nesterov, never, periodic

QUAD = Kronecker(GEOMETRIES["QUAD"])
SPIKE = "the Gram product of one step overflows to inf, and 0 * inf in the move makes every factor NaN"


# ---- momentum -----------------------------------------------------------------------------
def by_definition(rule, gradients: np.ndarray, beta: float) -> list[float]:
    """What a step uses, from all gradients so far, as the sources define it."""
    out = []
    for t in range(1, len(gradients) + 1):
        g = gradients[:t]
        ema = sum((1 - beta) * beta ** (t - 1 - i) * x for i, x in enumerate(g))
        if rule is corrected:
            out.append(ema / (1 - beta**t))
        elif rule is nesterov:
            out.append(beta * ema / (1 - beta ** (t + 1)) + (1 - beta) * g[-1] / (1 - beta**t))
        elif rule is from_first:
            out.append(ema + beta**t * g[0])  # as if the first gradient had been seen for ever
        elif (t - 1) / t <= beta:
            out.append(np.mean(g))
        else:
            out.append(beta * out[-1] + (1 - beta) * g[-1])
    return out


@pytest.mark.parametrize("rule", [capped_average, from_first, corrected, nesterov])
@pytest.mark.parametrize("beta", [0.0, 0.6, 0.95])
def test_momentum_rules(framework: Framework, rule, beta: float):
    gradients, used = normals(5), []
    m = framework.array(np.zeros(()), "float64")
    for t, value in enumerate(gradients, start=1):
        g = framework.array(np.asarray(value), "float64")
        memory = rule(np, t, beta).each(float)
        m, smooth = average(memory, g, m)
        used.append(float(smooth) * (memory.scale or 1.0))
    assert used == pytest.approx(by_definition(rule, gradients, beta), rel=1e-13)


def test_without_a_buffer_the_gradient_is_used():
    g = normals(3)
    m, smooth = average(Averaging(0.9), g, None)
    assert m is None and smooth is g


# ---- decisions ----------------------------------------------------------------------------
def schedule(**changes) -> Schedule:
    rules = {
        "averaging": capped_average,
        "momentum": 0.9,
        "rate": lambda xp, t: 0.1,
        "beta_lipschitz": 0.9,
        "damping": 0.0,
    }
    return Schedule(**(rules | changes))


def test_periodic_balance():
    assert [t for t in range(1, 301) if host_plan(schedule(balance=periodic(100)), t).balance] == [100, 200, 300]
    assert not any(host_plan(schedule(balance=never), t).balance for t in range(1, 301))


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.9])
def test_a_coin_is_fair_and_pure(probability: float):
    def heads(seed: int) -> list[bool]:
        return [host_plan(schedule(fit=coin("fit", probability), seed=seed), t).fit for t in range(1, 2001)]

    first = heads(0)
    for seed in (0, 1, 2**32 - 1):
        tosses = heads(seed)
        assert abs(np.mean(tosses) - probability) < 4 * sqrt(probability * (1 - probability) / 2000)
        assert (tosses == first) is (seed == 0)


def test_coins_of_two_roles_are_independent():
    both = schedule(fit=coin("fit", 0.5), balance=coin("balance", 0.5))
    plans = [host_plan(both, t) for t in range(1, 2001)]
    assert abs(np.mean([p.fit and p.balance for p in plans]) - 0.25) < 4 * sqrt(0.1875 / 2000)


def test_a_coin_is_strictly_below_and_tossed_even_if_sure():
    tossed = []

    def toss(role: str) -> float:
        tossed.append(role)
        return 0.5

    assert coin("a", 1.0)(StepInfo(1, toss)) is True
    assert [coin("a", p)(StepInfo(1, toss)) for p in (0.5, 0.5001)] == [False, True]
    assert tossed == ["a"] * 3


def host_plans(timing: Schedule, steps: int) -> list[Plan]:
    """The plans of the first steps, one after the other."""
    plans, since = [], 0
    for t in range(1, steps + 1):
        plans.append(host_plan(timing, t, since=since + 1))
        since = 0 if plans[-1].fit else since + 1
    return plans


def traced_plans(timing: Schedule, steps: int) -> Plan:
    """The same, compiled as one loop: of each number all its values."""

    def one(since, t):
        p = plan(timing, t, jnp, since=since + 1)
        return jnp.where(p.fit, 0, since + 1), p

    return jax.jit(lambda ts: jax.lax.scan(one, jnp.int32(0), ts)[1])(jnp.arange(1, steps + 1, dtype=jnp.int32))


PLANNED = [
    *((name, {}) for name in METHODS),
    ("kron_whiten", {"momentum": 0.9, "preconditioner_update_probability": 0.3, "seed": 2**32 - 1}),
    ("procrustes", {"preconditioner_lr": 0.301, "seed": 7}),
    ("kron", {"preconditioner_update_probability": 0.3, "b1": 0.0}),
    ("affine", {"preconditioner_update_probability": (0.9, 0.1, 0.01, 50), "nesterov": True, "seed": 7}),
    ("affine", {"precond_lr": lambda step: 0.1 / step}),
]


@pytest.mark.parametrize(("x64", "rounding"), [(False, 1e-6), (True, 1e-14)])
@pytest.mark.parametrize(("name", "options"), PLANNED)
def test_host_and_traced_plans_are_equal(name: str, options: dict, x64: bool, rounding: float):
    timing = METHODS[name](**options).schedule()
    with jax.enable_x64(x64):
        traced = traced_plans(timing, 300)
    host = host_plans(timing, 300)
    for field in ("fit", "balance", "side", "key"):
        assert np.ravel(getattr(traced, field)).tolist() == [getattr(p, field) for p in host]
    for field in ("rate", "beta_lipschitz", "damping"):
        assert np.asarray(getattr(traced, field)) == pytest.approx([getattr(p, field) for p in host], rel=rounding)
    assert np.asarray(traced.momentum.past) == pytest.approx([p.momentum.past for p in host], rel=rounding)
    assert all(type(x) is kind for p in host for x, kind in zip(p, (bool, bool, bool, Averaging, float), strict=False))


def test_the_default_schedule_fits_at_the_same_steps_on_host_and_device():
    """In float32 too, where the probability is rounded: a step sooner or later and the frameworks would part."""
    timing = METHODS["kron"]().schedule()
    host = [t for t, p in enumerate(host_plans(timing, 5000), start=1) if p.fit]
    assert (np.flatnonzero(traced_plans(timing, 5000).fit) + 1).tolist() == host
    assert host[:500] == list(range(1, 501)) and set(np.diff(host[-20:])) == {34}


@pytest.mark.parametrize(("rule", "part"), [(corrected, "scale"), (nesterov, "blend")])
def test_averages_are_planned_too(rule, part: str):
    timing, of = schedule(averaging=rule), attrgetter(f"momentum.{part}")
    with jax.enable_x64(True):
        traced = jax.jit(jax.vmap(lambda t: of(plan(timing, t, jnp))))(jnp.arange(1, 51))
    host = [of(host_plan(timing, t)) for t in range(1, 51)]
    seen, told = np.array(traced).T, np.array(host)
    assert seen == pytest.approx(told, rel=1e-13)


# ---- a step -------------------------------------------------------------------------------
def reference_vector(name: str, gradients: list[np.ndarray]) -> list[np.ndarray]:
    """Directions for a vector, written out from the equations of the sources, without noise."""
    quad_torch = name != "kron_whiten"
    power, root = (2, -1 / 4) if quad_torch else (4, -1 / 8)
    q, m, last, out = np.mean(gradients[0] ** power) ** root, gradients[0], 0.0, []
    for t, g in enumerate(gradients, start=1):
        m = m + 0.05 * (g - m) if quad_torch else g
        mu, beta = (max(0.7 / sqrt(1 + t / 10_000), 0.3), 0.95) if quad_torch else (0.1, 0.9)
        t1 = (q * q * m) ** 2
        ell = t1.max() + 1
        last = max(beta * last + (1 - beta) * ell, ell)
        d = (t1 - 1) * mu / last
        q = q * (1 - d / 2) ** 2 if name == "quad" else q * (1 - d)
        u = q * q * m
        rms = sqrt(np.mean(u**2))
        out.append(u * 1.1 / max(rms, 1.1) / 5 if quad_torch else np.clip(u * 2 / max(rms, 2), -10, 10))
    return out


def directions(made: Method, gradients: list, framework: Framework) -> list[np.ndarray]:
    """Directions of a method on one tensor; one for the inverse of the Hessian is given the gradients as products."""
    recipe, timing, scale = made.recipe(), made.schedule(), made.initial_scale()
    xp, shape = namespace(gradients[0]), tuple(gradients[0].shape)
    if recipe.joint:
        gradients = [xp.reshape(g, (-1,)) for g in gradients]
    vs = [Counter(xp.full((1,), t, dtype=xp.int32)).normal("v", tuple(g.shape), g) for t, g in enumerate(gradients)]
    if scale is None:
        sizes = [recipe.initial_scale.size(pipeline.working(recipe, gradients[0]))]
        (scale,), _ = recipe.initial_scale(sizes, timing.damping, vs[:1] if recipe.newton else None)
    first = Counter(xp.full((1,), pipeline.first_key(timing), dtype=xp.int32))
    state, out = pipeline.init(recipe, gradients[0], scale, first), []
    for g, v, p in zip(gradients, vs, host_plans(timing, len(gradients)), strict=True):
        p = p._replace(key=xp.full((1,), p.key, dtype=xp.int32))
        u, state = step(recipe, p, g, state, pair=(v, g) if recipe.newton else None)
        out.append(framework.numpy(u).reshape(shape))
    return out


def fitting(name: str, n: int) -> Method:
    """A method whose rank, if it has one, is below the length of the vector."""
    ranks = ("rank_of_approximation", "uvd_rank_of_approximation")
    made = METHODS[name]
    return made(**{rank: min(3, n - 1) for rank in ranks if rank in made.__dataclass_fields__})


@pytest.mark.parametrize("name", ["procrustes", "quad", "kron_whiten"])
def test_a_vector_takes_the_published_steps(framework: Framework, name: str):
    gradients = [10.0 ** (t % 3) * normals(6, seed=t) for t in range(6)]
    noiseless = {"damping": 0.0} if name == "kron_whiten" else {"noise_scale": 0.0}
    got = directions(METHODS[name](**noiseless), [framework.array(g, "float64") for g in gradients], framework)
    for u, wanted in zip(got, reference_vector(name, gradients), strict=True):
        assert u == pytest.approx(wanted, rel=1e-12)


def test_a_vector_takes_the_steps_of_kron(framework: Framework):
    """Written out from the equations of psgd_jax, with the noise that the step draws."""
    made = METHODS["kron"](preconditioner_init_scale=0.5)
    gradients = [10.0 ** (t % 3) * normals(6, seed=t) for t in range(6)]
    got = directions(made, [framework.array(g, "float64") for g in gradients], framework)
    q, m = 0.5 * np.ones(6), np.zeros(6)
    for t, (g, u) in enumerate(zip(gradients, got, strict=True), start=1):
        m = 0.9 * m + 0.1 * g
        smooth = m / (1 - 0.9**t)
        key = np.full((1,), host_plan(made.schedule(), t, since=1).key, np.int32)
        v = Counter(key).signs("damping", (6,), g)
        h = smooth + 2**-11.5 * np.mean(np.abs(smooth)) * v
        t1, t2 = (q * h) ** 2, (v / q) ** 2
        q = q - 0.1 / (t1 + t2).max() * (t1 - t2) * q
        wanted = q * q * smooth
        assert u == pytest.approx(wanted / max(1, sqrt(np.mean(wanted**2)) / 1.1), rel=1e-12)


@pytest.mark.parametrize("order", ["1st", "2nd"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_tensor_takes_the_steps_of_affine(framework: Framework, order: str, nesterov: bool):
    """Written out from the equations of psgd_jax for two diagonals, which draw no noise."""
    made = METHODS["affine"](max_size_triangular=0, step_normalizer_order=order, nesterov=nesterov, precond_lr=0.2)
    gradients = [10.0 ** (t % 3) * normals(2, 6, 3, seed=t) for t in range(6)]
    got = directions(made, [framework.array(g, "float64") for g in gradients], framework)
    scale = np.mean(gradients[0] ** 2) ** -0.125
    left, right, m = scale * np.ones(6), scale * np.ones(6), np.zeros((6, 6))
    for t, (tensor, u) in enumerate(zip(gradients, got, strict=True), start=1):
        g = np.transpose(tensor, (0, 2, 1)).reshape(6, 6)
        m = 0.9 * m + 0.1 * g
        smooth = m / (1 - 0.9**t)
        if nesterov:
            smooth = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        a = (left[:, None] * g * right) ** 2
        terms = [(a.sum(axis=1), np.sum(right**-2) / left**2), (a.sum(axis=0), np.sum(left**-2) / right**2)]
        left, right = (
            q - 0.2 * (t1 - t2) * q / (np.abs(t1 - t2) if order == "1st" else t1 + t2).max()
            for q, (t1, t2) in zip((left, right), terms, strict=True)
        )
        wanted = (left**2)[:, None] * smooth * right**2
        assert u == pytest.approx(np.transpose(wanted.reshape(2, 3, 6), (0, 2, 1)), rel=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_every_shape_is_laid_out_and_back(name: str):
    recipe = METHODS[name]().recipe()
    for shape in (shape for ndim in range(5) for shape in product(range(4), repeat=ndim)):
        x = np.arange(prod(shape)).reshape(shape)
        tensor = pipeline.laid_out(recipe, x)
        assert tensor.shape == recipe.layout(shape)
        assert np.array_equal(tensor.ravel(), np.transpose(x, recipe.order(shape)).ravel())
        assert np.array_equal(pipeline.laid_back(recipe, tensor, shape), x)


def test_a_step_lays_the_gradient_out_itself(framework: Framework):
    """A tensor is stepped as the matrix it makes, and its momentum keeps its own shape."""
    made = METHODS["affine"]()
    recipe, gradients = made.recipe(), [normals(2, 6, 3, seed=t) for t in range(4)]
    own = [framework.array(g, "float64") for g in gradients]
    assert recipe.layout((2, 6, 3)) == (6, 6) and recipe.order((2, 6, 3)) == (0, 2, 1)
    assert pipeline.init(recipe, own[0]).momentum.shape == (2, 6, 3)
    flat = [pipeline.laid_out(recipe, g) for g in own]
    for u, wanted in zip(directions(made, own, framework), directions(made, flat, framework), strict=True):
        assert u == pytest.approx(np.transpose(wanted.reshape(2, 3, 6), (0, 2, 1)), rel=1e-12)


def plain(**changes) -> Plan:
    return host_plan(schedule(), 1)._replace(**({"key": np.full((1,), 1, np.int32)} | changes))


def test_fit_first_or_last_and_not_at_all():
    g = normals(3, 4)
    recipe = Recipe(preconditioner=QUAD, momentum=False)
    state = pipeline.init(recipe, g, 1.0)
    first, after = step(recipe, plain(), g, state)
    last, same = step(replace(recipe, fit_first=False), plain(), g, state)
    off, kept = step(recipe, plain(fit=False), g, state)
    assert np.allclose(last, g, rtol=1e-15) and np.allclose(off, g, rtol=1e-15) and kept.factors is state.factors
    assert first == pytest.approx(QUAD.precondition(after.factors, g)) and not np.allclose(first, g)
    assert all(np.array_equal(a, b) for a, b in zip(after.factors.Q, same.factors.Q, strict=True))


@pytest.mark.parametrize("whiten", ["gradient", "momentum"])
def test_what_is_whitened_is_not_what_is_applied(whiten: str):
    kind = Kronecker(GEOMETRIES["QEQ"])
    recipe = Recipe(preconditioner=kind, whiten=whiten, gain=0.5)
    old, g = normals(3, 4), normals(3, 4, seed=1)
    state = pipeline.init(recipe, g, 1.0)._replace(momentum=old)
    u, new = step(recipe, plain(momentum=Averaging(0.5)), g, state)
    m = (old + g) / 2
    assert new.momentum == pytest.approx(m)
    assert u == pytest.approx(0.5 * kind.precondition(new.factors, m))
    seen = m if whiten == "momentum" else g
    alone = Recipe(preconditioner=kind, momentum=False)
    _, fitted = step(alone, plain(), seen, pipeline.init(alone, g, 1.0))
    assert new.factors.Q[0] == pytest.approx(fitted.factors.Q[0], rel=1e-13)


@pytest.mark.parametrize("balance_last", [True, False])
def test_balances_when_told_before_or_after_the_fit(balance_last: bool):
    diagonal = replace(QUAD, dense=DenseRule(max_size=0))
    recipe = Recipe(preconditioner=diagonal, momentum=False, balance_last=balance_last)
    g = normals(3, 4)
    state = pipeline.init(recipe, g)
    factors = state.factors._replace(Q=(8 * np.ones(3), np.ones(4) / 8))
    for balance in (True, False):
        _, new = step(recipe, plain(balance=balance), g, state._replace(factors=factors))
        sizes = [np.abs(q).max() for q in new.factors.Q]
        assert (abs(sizes[0] / sizes[1] - 1) < 1e-13) == (balance and balance_last)
        assert (sizes[0] > 2 * sizes[1]) == (not balance)


def test_tensors_without_elements_pass():
    recipe = Recipe(preconditioner=QUAD, dtype="float64")
    g = np.zeros((0, 3), np.float32)
    state = pipeline.init(recipe, g, 2.0)
    u, new = step(recipe, plain(), g, state)
    assert u.shape == (0, 3) and u.dtype == np.float64 and new is state and state.factors == Factors((), ())


def test_state_has_the_dtype_of_the_recipe():
    g = normals(3, 4).astype(np.float32)
    for dtype, wanted in ((None, np.float32), ("float64", np.float64)):
        recipe = Recipe(preconditioner=QUAD, dtype=dtype)
        u, state = step(recipe, plain(), g, pipeline.init(recipe, g, 1.0))
        assert {x.dtype for x in (u, state.momentum, *state.factors.Q, *state.factors.L)} == {np.dtype(wanted)}
    with pytest.raises(ValueError, match=r"'bfloat16'.*numpy"):
        pipeline.init(Recipe(preconditioner=QUAD, dtype="bfloat16"), g)
    for kept in ("momentum_dtype", "factor_dtype"):
        with pytest.raises(ValueError, match=r"'bfloat16'.*numpy"):
            pipeline.init(Recipe(preconditioner=QUAD, **{kept: "bfloat16"}), g)


# ---- pairs, and preconditioners that begin at random ---------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_a_given_pair_is_fitted_instead(name: str):
    recipe, p = replace(fitting(name, 12).recipe(), dtype=None), plain(damping=0.1, beta_lipschitz=0.0, side=True)
    g, v, h = (normals(*((12,) if recipe.joint else (3, 4)), seed=s) for s in range(3))
    state = pipeline.init(recipe, g, 0.7, Counter(np.full((1,), 5, np.int32)))
    _, new = step(recipe, p, g, state, pair=(v, h))
    draws = Counter(p.key)
    damped = recipe.damping(h, draws.signs("damping", h.shape, h), 0.1)
    given = Pair(pipeline.laid_out(recipe, damped), pipeline.laid_out(recipe, v))
    wanted = recipe.preconditioner.fit(state.factors, given, p.rate, 0.0, draws, True)
    assert all(np.allclose(a, b, rtol=1e-13) for a, b in zip(new.factors.Q, wanted.Q, strict=True))
    _, other = step(recipe, p, g, state, pair=(h, v))
    assert not all(np.array_equal(a, b) for a, b in zip(new.factors.Q, other.factors.Q, strict=True))
    if recipe.damping is undamped and recipe.joint:  # no noise is drawn beside a pair
        step(recipe, p, g, state, pipeline.Unasked(), pair=(v, h))
        with pytest.raises(ValueError, match="damping"):
            step(recipe, p, g, state, pipeline.Unasked())


def test_a_random_beginning_needs_draws():
    recipe, g = fitting("lra_whiten", 12).recipe(), normals(12)
    with pytest.raises(ValueError, match="begins with random U; give `init` the draws of step 0"):
        pipeline.init(recipe, g)
    first, same, other = (pipeline.init(recipe, g, 0.5, Counter(np.full((1,), k, np.int32))) for k in (1, 1, 2))
    assert np.array_equal(first.factors.Q[0], same.factors.Q[0])
    assert not np.array_equal(first.factors.Q[0], other.factors.Q[0])
    assert (first.factors.Q[2] == 0.5).all()


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_the_first_key_is_that_of_step_zero(seed: int):
    assert pipeline.first_key(schedule(seed=seed)) == int(noise.key(np, seed, 0)[0])
    assert pipeline.first_key(schedule(seed=seed)) != host_plan(schedule(seed=seed), 1).key
    assert type(pipeline.first_key(schedule(seed=seed))) is int


def test_momentum_begins_alone():
    recipe, g = Recipe(preconditioner=QUAD, momentum_dtype="float64"), normals(3, 4).astype(np.float32)
    m = pipeline.init_momentum(recipe, g)
    assert (m.shape, m.dtype) == ((3, 4), np.float64) and not m.any()
    assert pipeline.init_momentum(Recipe(preconditioner=QUAD, dtype="float64"), g).dtype == np.float64
    assert pipeline.init_momentum(Recipe(preconditioner=QUAD), g).dtype == np.float32
    assert pipeline.init_momentum(Recipe(preconditioner=QUAD, momentum=False), g) is None


# ---- dtypes -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name, f in FRAMEWORKS.items() if "bfloat16" in f.dtypes])
@pytest.mark.parametrize(
    ("given", "momentum", "factors", "kept"),
    [  # kept: momentum, factors, work
        ("float32", None, None, ("float32", "float32", "float32")),
        ("float32", "bfloat16", None, ("bfloat16", "float32", "float32")),
        ("float32", None, "bfloat16", ("float32", "bfloat16", "float32")),
        ("bfloat16", None, None, ("bfloat16", "float32", "float32")),
        ("bfloat16", "float32", "bfloat16", ("float32", "bfloat16", "float32")),
        ("float16", "bfloat16", "float16", ("bfloat16", "float16", "float32")),
        ("float32", "float64", "float64", ("float64", "float64", "float64")),
        ("float64", "float32", "float32", ("float32", "float32", "float64")),
    ],
)
def test_momentum_and_factors_keep_their_dtypes(name: str, given: str, momentum: str, factors: str, kept: tuple):
    framework = FRAMEWORKS[name]
    recipe = Recipe(
        preconditioner=Kronecker(GEOMETRIES["EQ"]), widens_half=True, momentum_dtype=momentum, factor_dtype=factors
    )
    with double_precision(name):
        g = framework.array(normals(3, 4), given)
        state = pipeline.init(recipe, g, 2.0)
        p = plain(key=framework.array(np.ones(1), "int32"))
        for _ in range(3):
            dtypes = [dtype_name(x.dtype) for x in (state.momentum, *state.factors.Q)]
            assert dtypes == [kept[0], kept[1], kept[1]]
            assert {dtype_name(x.dtype) for x in state.factors.L} == {kept[2]}
            u, state = step(recipe, p, g, state)
            assert dtype_name(u.dtype) == kept[2] == dtype_name(pipeline.working(recipe, g).dtype)


def test_half_precisions_work_as_they_are_unless_lifted():
    torch = FRAMEWORKS["torch"]
    g = torch.array(normals(3), "bfloat16")
    recipe = Recipe(preconditioner=QUAD)
    assert pipeline.working(recipe, g) is g
    assert dtype_name(pipeline.working(replace(recipe, widens_half=True), g).dtype) == "float32"
    assert dtype_name(pipeline.working(replace(recipe, dtype="float16"), g).dtype) == "float16"


def test_momentum_is_rounded_after_its_use_and_factors_before():
    torch = FRAMEWORKS["torch"]
    g, p = torch.array(normals(3, 4), "float32"), plain(key=torch.array(np.ones(1), "int32"), momentum=Averaging(0.1))
    exact = Recipe(preconditioner=Kronecker(GEOMETRIES["EQ"]))
    rounded = replace(exact, momentum_dtype="bfloat16", factor_dtype="bfloat16")
    (u, full), (v, half) = (step(r, p, g, pipeline.init(r, g, 1.0)) for r in (exact, rounded))
    for x, y in zip((full.momentum, *full.factors.Q), (half.momentum, *half.factors.Q), strict=True):
        assert x.to(y.dtype).equal(y) and not x.equal(y.to(x.dtype))
    for d, qs in ((u, full.factors.Q), (v, [q.to(g.dtype) for q in half.factors.Q])):
        assert d.allclose(GEOMETRIES["EQ"].precondition(qs, full.momentum), rtol=1e-6)


# ---- precision of products ----------------------------------------------------------------
@pytest.mark.parametrize("part", ["fit_precision", "apply_precision"])
def test_precisions_are_of_the_fit_and_of_the_direction(part: str):
    torch = FRAMEWORKS["torch"]
    g = torch.array(normals(4, 5), "float32")
    p = plain(key=torch.array(np.ones(1), "int32"))
    full = Recipe(preconditioner=QUAD, momentum=False, fit_first=False)
    state = pipeline.init(full, g, 0.7)
    u, new = step(full, p, g, state)
    v, other = step(replace(full, **{part: "bfloat16"}), p, g, state)
    assert u.equal(v) is (part == "fit_precision")
    assert new.factors.Q[0].equal(other.factors.Q[0]) is (part == "apply_precision")
    assert np.allclose(u, v, rtol=0.05, atol=0.05) and np.allclose(new.factors.Q[0], other.factors.Q[0], atol=0.05)


# ---- what is added to a parameter ---------------------------------------------------------
def test_displacement(framework: Framework):
    p, u = normals(3), normals(3, seed=1)
    for decay in (0.0, 0.1):
        got = displacement(framework.array(p, "float32"), framework.array(u, "float64"), 0.01, decay)
        assert "float32" in str(got.dtype)
        assert framework.numpy(got) == pytest.approx(-0.01 * (u + decay * p), rel=1e-6)


def test_a_step_that_is_not_taken_needs_no_parameter():
    """Without decay an infinite parameter does not make the step NaN."""
    assert displacement(np.array([inf]), np.array([1.0]), 0.1, 0.0).tolist() == [-0.1]


# ---- extremes -----------------------------------------------------------------------------
MAGNITUDES = [(name, 10.0**k) for name in METHODS for k in (-45, -38, -30, -20, 10, 20, 30)]
MAGNITUDES += [(name, 3e38) for name in METHODS]


@pytest.mark.parametrize(("name", "scale"), MAGNITUDES)
def test_every_magnitude_of_gradients_stays_finite(name: str, scale: float):
    torch = FRAMEWORKS["torch"]
    for shape in ((4, 4), (5,), ()):
        # quad_torch's matrices begin at P = 1 / rms^2, where P g may be nothing for some 30 steps.
        steps = range(40 if scale > 1e20 else 10)
        gradients = [torch.array(scale * np.clip(normals(*shape, seed=t), -1, 1), "float32") for t in steps]
        last = directions(fitting(name, prod(shape)), gradients, torch)[-1]
        assert np.isfinite(last).all()
        assert np.abs(last).max() < 10 and (last.any() or scale < 1)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_number_is_not_hidden(name: str):
    """Too large an entry may be left out, a NaN may not: without a policy it must be seen."""
    torch, g = FRAMEWORKS["torch"], normals(4, 4)
    broken = np.where(np.eye(4) > 0, np.nan, g)
    out = directions(fitting(name, 16), [torch.array(x, "float32") for x in (g, broken)], torch)
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).any()


SPIKES = [(name, size) for name in METHODS for size in (1e10, 1e15, 1e20, 1e25, 1e30)]


@pytest.mark.parametrize(("name", "size"), SPIKES)
def test_one_spike_does_not_ruin_the_factors(name: str, size: float):
    torch, gradients = FRAMEWORKS["torch"], [normals(4, 4, seed=t) for t in range(15)]
    gradients[5][0, 0] = size
    out = directions(fitting(name, 16), [torch.array(g, "float32") for g in gradients], torch)
    assert np.isfinite(out).all() and np.abs(out[-1]).max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_zero_gradients_do_nothing_and_harm_nothing(name: str):
    torch = FRAMEWORKS["torch"]
    gradients = [np.zeros((4, 4))] * 5 + [normals(4, 4, seed=t) for t in range(50)]
    out = directions(fitting(name, 16), [torch.array(g, "float32") for g in gradients], torch)
    assert not np.any(out[:5]) and np.isfinite(out).all()
    assert 0.05 < np.sqrt(np.mean(out[-1] ** 2)) < 3
