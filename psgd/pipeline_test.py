"""One step: its momentum rules, decisions, clipping and scales, and what it does at the edges of the number range."""

from __future__ import annotations

from math import inf, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework, double_precision
from psgd import kron, pipeline
from psgd._xp import namespace
from psgd.geometry import GEOMETRIES
from psgd.methods import METHODS, Method
from psgd.pipeline import (
    Clip,
    Plan,
    Recipe,
    StartScale,
    Tempo,
    averaged,
    displacement,
    host_plan,
    plan,
    step,
)
from psgd.schedule import Memory, capped_average, coin, corrected, from_first, nesterov, never, periodic

SPIKE = "the Gram product of one step overflows to inf, and 0 * inf in the move makes every factor NaN"


@pytest.fixture(params=FRAMEWORKS.values(), ids=FRAMEWORKS)
def framework(request: pytest.FixtureRequest):
    with double_precision(request.param.name):
        yield request.param


def normals(*shape: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


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
        m, smooth = averaged(rule(np, t, beta), g, m)
        used.append(float(smooth))
    assert used == pytest.approx(by_definition(rule, gradients, beta), rel=1e-13)


def test_without_a_buffer_the_gradient_is_used():
    g = normals(3)
    m, smooth = averaged(Memory(0.9), g, None)
    assert m is None and smooth is g


# ---- decisions ----------------------------------------------------------------------------
def tempo(**changes) -> Tempo:
    rules = {"averaging": capped_average, "momentum": 0.9, "rate": lambda xp, t: 0.1, "memory": 0.9, "damping": 0.0}
    return Tempo(**(rules | changes))


def test_periodic_balance():
    assert [t for t in range(1, 301) if host_plan(tempo(balance=periodic(100)), t).balance] == [100, 200, 300]
    assert not any(host_plan(tempo(balance=never), t).balance for t in range(1, 301))


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.9])
def test_a_coin_is_fair_and_pure(probability: float):
    def heads(seed: int) -> list[bool]:
        return [host_plan(tempo(fit=coin("fit", probability), seed=seed), t).fit for t in range(1, 2001)]

    first = heads(0)
    for seed in (0, 1, 2**32 - 1):
        tosses = heads(seed)
        assert abs(np.mean(tosses) - probability) < 4 * sqrt(probability * (1 - probability) / 2000)
        assert (tosses == first) is (seed == 0)


def test_coins_of_two_roles_are_independent():
    both = tempo(fit=coin("fit", 0.5), balance=coin("balance", 0.5))
    plans = [host_plan(both, t) for t in range(1, 2001)]
    assert abs(np.mean([p.fit and p.balance for p in plans]) - 0.25) < 4 * sqrt(0.1875 / 2000)


def test_a_coin_is_strictly_below_and_tossed_even_if_sure():
    tossed = []

    def toss(role: str) -> float:
        tossed.append(role)
        return 0.5

    assert coin("a", 1.0)(1, toss) is True
    assert [coin("a", p)(1, toss) for p in (0.5, 0.5001)] == [False, True]
    assert tossed == ["a"] * 3


PLANNED = [
    *((name, {}) for name in METHODS),
    ("kron_whiten", {"momentum": 0.9, "preconditioner_update_probability": 0.3, "seed": 2**32 - 1}),
    ("procrustes", {"preconditioner_lr": 0.301, "seed": 7}),
]


@pytest.mark.parametrize(("x64", "rounding"), [(False, 1e-6), (True, 1e-14)])
@pytest.mark.parametrize(("name", "options"), PLANNED)
def test_host_and_traced_plans_are_equal(name: str, options: dict, x64: bool, rounding: float):
    timing = METHODS[name](**options).tempo()
    with jax.enable_x64(x64):
        traced = jax.jit(jax.vmap(lambda t: plan(timing, t, jnp)))(jnp.arange(1, 301, dtype=jnp.int32))
    host = [host_plan(timing, t) for t in range(1, 301)]
    for field in ("fit", "balance", "key"):
        assert np.ravel(getattr(traced, field)).tolist() == [getattr(p, field) for p in host]
    for field in ("rate", "memory", "damping"):
        assert np.asarray(getattr(traced, field)) == pytest.approx([getattr(p, field) for p in host], rel=rounding)
    assert np.asarray(traced.momentum.past) == pytest.approx([p.momentum.past for p in host], rel=rounding)
    assert all(type(x) is kind for p in host for x, kind in zip(p, (bool, bool, Memory, float), strict=False))


@pytest.mark.parametrize("rule", [corrected, nesterov])
def test_blends_are_planned_too(rule):
    timing = tempo(averaging=rule)
    with jax.enable_x64(True):
        traced = jax.jit(jax.vmap(lambda t: plan(timing, t, jnp).momentum.blend))(jnp.arange(1, 51))
    host = [host_plan(timing, t).momentum.blend for t in range(1, 51)]
    assert np.stack(np.broadcast_arrays(*traced), axis=1) == pytest.approx(np.array(host), rel=1e-13)


# ---- clipping and scales ------------------------------------------------------------------
def test_clip_by_rms(framework: Framework):
    for scale, shrunk in ((0.5, False), (30.0, True)):
        u = scale * normals(4, 5)
        got = framework.numpy(Clip(rms=1.1)(framework.array(u, "float64")))
        factor = 1.1 / np.sqrt(np.mean(u**2)) if shrunk else 1.0
        assert got == pytest.approx(factor * u, rel=1e-14)
    assert not framework.numpy(Clip(rms=1.1)(framework.array(np.zeros(3), "float64"))).any()


def test_clip_by_entry(framework: Framework):
    got = framework.numpy(Clip(entry=2.0)(framework.array(np.array([-5.0, 1.0, 2.0, 7.0]), "float64")))
    assert got.tolist() == [-2, 1, 2, 2]


def test_clip_of_complex_entries_keeps_their_phase(framework: Framework):
    u = np.array([30 + 40j, 0.3j, -8.0])
    got = framework.numpy(Clip(entry=5.0)(framework.array(u, "complex128")))
    assert got == pytest.approx(np.array([3 + 4j, 0.3j, -5.0]), rel=1e-14)
    got = framework.numpy(Clip(rms=2.0)(framework.array(u, "complex128")))
    assert got == pytest.approx(u * 2 / np.sqrt(np.mean(np.abs(u) ** 2)), rel=1e-14)


def test_clip_goes_by_rms_first_then_by_entry(framework: Framework):
    u = np.array([100.0, 0, 0, 0])  # rms 50 -> 2, largest 4
    assert framework.numpy(Clip(2.0, 3.0)(framework.array(u, "float64"))).tolist() == [3, 0, 0, 0]


def test_no_limits_no_change():
    u = normals(3)
    assert Clip()(u) is u


def test_clip_keeps_a_direction_whose_square_overflows():
    u = FRAMEWORKS["torch"].array(np.array([1e30, -1e30]), "float32")
    assert Clip(rms=2.0)(u).tolist() == pytest.approx([2, -2])


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(("rule", "root"), [(StartScale(4), -1 / 8), (StartScale(2), -1 / 4)])
def test_start_scale(framework: Framework, rule: StartScale, root: float, damping: float):
    gs = [normals(5), 3 * normals(2, 3, seed=1), normals()]
    wanted = (max(np.mean(np.abs(g) ** rule.power) for g in gs) + damping**rule.power) ** root
    sizes = [rule.size(framework.array(g, "float64")) for g in gs]
    assert float(rule(sizes, damping)) == pytest.approx(wanted, rel=1e-14)
    z = normals(5) + 1j * normals(5, seed=1)
    assert float(rule.size(framework.array(z, "complex128"))) == pytest.approx(
        np.mean(np.abs(z) ** rule.power) ** (1 / rule.power)
    )


def test_start_scale_at_the_edges(framework: Framework):
    for g in (2e-38, 1e-20, 1.0, 1e30, 8e37):  # XLA flushes denormals, of g and of 1 / g, to zero
        for rule in (StartScale(4), StartScale(2)):
            size = rule.size(framework.array(np.full((2, 2), g), "float32"))
            assert float(rule([size], 0.0)) == pytest.approx(g**-0.5, rel=1e-5, abs=0)
    zero = StartScale().size(framework.array(np.zeros(3), "float32"))
    assert float(StartScale()([zero], 0.0)) == 1
    assert float(StartScale()([zero], 1e-4)) == pytest.approx(100, rel=1e-5)


def test_start_scale_of_several_dtypes_is_the_widest():
    torch = FRAMEWORKS["torch"]
    sizes = [StartScale().size(torch.array(np.ones(2), dtype)) for dtype in ("bfloat16", "float64", "float32")]
    assert str(StartScale()(sizes, 0.0).dtype) == "torch.float64"


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
    """Directions of a method on one tensor in layout shape."""
    recipe, timing = made.recipe(), made.tempo()
    scale = recipe.start([recipe.start.size(pipeline.working(recipe, gradients[0]))], timing.damping)
    state, out = pipeline.init(recipe, gradients[0], scale), []
    for t, g in enumerate(gradients, start=1):
        p = host_plan(timing, t)
        xp = namespace(g)
        u, state = step(recipe, p._replace(key=xp.full((1,), p.key, dtype=xp.int32)), g, state)
        out.append(framework.numpy(u))
    return out


@pytest.mark.parametrize("name", ["procrustes", "quad", "kron_whiten"])
def test_a_vector_takes_the_published_steps(framework: Framework, name: str):
    gradients = [10.0 ** (t % 3) * normals(6, seed=t) for t in range(6)]
    noiseless = {"damping": 0.0} if name == "kron_whiten" else {"noise_scale": 0.0}
    got = directions(METHODS[name](**noiseless), [framework.array(g, "float64") for g in gradients], framework)
    for u, wanted in zip(got, reference_vector(name, gradients), strict=True):
        assert u == pytest.approx(wanted, rel=1e-12)


def plain(**changes) -> Plan:
    return host_plan(tempo(), 1)._replace(key=np.full((1,), 1, np.int32), **changes)


def test_fit_first_or_last_and_not_at_all():
    g = normals(3, 4)
    geometry = GEOMETRIES["QUAD"]
    state = pipeline.init(Recipe(geometry=geometry, momentum=False), g, 1.0)
    first, after = step(Recipe(geometry=geometry, momentum=False), plain(), g, state)
    last, same = step(Recipe(geometry=geometry, momentum=False, fit_first=False), plain(), g, state)
    off, kept = step(Recipe(geometry=geometry, momentum=False), plain(fit=False), g, state)
    assert np.array_equal(last, g) and np.array_equal(off, g) and kept.factors is state.factors
    assert np.array_equal(first, geometry.precondition(after.factors.Q, g)) and not np.allclose(first, g)
    assert all(np.array_equal(a, b) for a, b in zip(after.factors.Q, same.factors.Q, strict=True))


@pytest.mark.parametrize("whiten", ["gradient", "momentum"])
def test_what_is_whitened_is_not_what_is_applied(whiten: str):
    recipe = Recipe(geometry=GEOMETRIES["QEQ"], whiten=whiten, gain=0.5)
    old, g = normals(3, 4), normals(3, 4, seed=1)
    state = pipeline.init(recipe, g, 1.0)._replace(momentum=old)
    u, new = step(recipe, plain(momentum=Memory(0.5)), g, state)
    m = (old + g) / 2
    assert new.momentum == pytest.approx(m)
    assert u == pytest.approx(0.5 * recipe.geometry.precondition(new.factors.Q, m))
    seen = m if whiten == "momentum" else g
    alone = Recipe(geometry=recipe.geometry, momentum=False)
    _, fitted = step(alone, plain(), seen, pipeline.init(alone, g, 1.0))
    assert new.factors.Q[0] == pytest.approx(fitted.factors.Q[0], rel=1e-13)


@pytest.mark.parametrize("balance_last", [True, False])
def test_balances_when_told_before_or_after_the_fit(balance_last: bool):
    diagonal = kron.DenseRule(max_size=0)
    recipe = Recipe(geometry=GEOMETRIES["QUAD"], dense=diagonal, momentum=False, balance_last=balance_last)
    g = normals(3, 4)
    state = pipeline.init(recipe, g)
    factors = state.factors._replace(Q=(8 * np.ones(3), np.ones(4) / 8))
    for balance in (True, False):
        _, new = step(recipe, plain(balance=balance), g, state._replace(factors=factors))
        sizes = [np.abs(q).max() for q in new.factors.Q]
        assert (abs(sizes[0] / sizes[1] - 1) < 1e-13) == (balance and balance_last)
        assert (sizes[0] > 2 * sizes[1]) == (not balance)


def test_tensors_without_elements_pass():
    recipe = Recipe(geometry=GEOMETRIES["QUAD"], dtype="float64")
    g = np.zeros((0, 3), np.float32)
    state = pipeline.init(recipe, g, 2.0)
    u, new = step(recipe, plain(), g, state)
    assert u.shape == (0, 3) and u.dtype == np.float64 and new is state and state.factors == kron.Factors((), ())


def test_state_has_the_dtype_of_the_recipe():
    g = normals(3, 4).astype(np.float32)
    for dtype, wanted in ((None, np.float32), ("float64", np.float64)):
        recipe = Recipe(geometry=GEOMETRIES["QUAD"], dtype=dtype)
        u, state = step(recipe, plain(), g, pipeline.init(recipe, g, 1.0))
        assert {x.dtype for x in (u, state.momentum, *state.factors.Q, *state.factors.L)} == {np.dtype(wanted)}
    with pytest.raises(ValueError, match=r"'bfloat16'.*numpy"):
        pipeline.init(Recipe(geometry=GEOMETRIES["QUAD"], dtype="bfloat16"), g)


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
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e-20, 1e10, 1e20, 1e30, 3e38])
def test_every_magnitude_of_gradients_stays_finite(name: str, scale: float):
    torch = FRAMEWORKS["torch"]
    for shape in ((4, 4), (5,), ()):
        gradients = [torch.array(scale * np.clip(normals(*shape, seed=t), -1, 1), "float32") for t in range(10)]
        last = directions(METHODS[name](), gradients, torch)[-1]
        assert np.isfinite(last).all()
        assert np.abs(last).max() < 10 and (last.any() or scale < 1)


SPIKES = [(name, size) for name in METHODS for size in (1e10, 1e15)]
SPIKES += [
    pytest.param(name, size, marks=pytest.mark.xfail(strict=True, reason=SPIKE))
    for name in METHODS
    for size in (1e25, 1e30)
]


@pytest.mark.parametrize(("name", "size"), SPIKES)
def test_one_spike_does_not_ruin_the_factors(name: str, size: float):
    torch, gradients = FRAMEWORKS["torch"], [normals(4, 4, seed=t) for t in range(15)]
    gradients[5][0, 0] = size
    out = directions(METHODS[name](), [torch.array(g, "float32") for g in gradients], torch)
    assert np.isfinite(out).all() and np.abs(out[-1]).max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_zero_gradients_do_nothing_and_harm_nothing(name: str):
    torch = FRAMEWORKS["torch"]
    gradients = [np.zeros((4, 4))] * 5 + [normals(4, 4, seed=t) for t in range(50)]
    out = directions(METHODS[name](), [torch.array(g, "float32") for g in gradients], torch)
    assert not np.any(out[:5]) and np.isfinite(out).all()
    assert 0.05 < np.sqrt(np.mean(out[-1] ** 2)) < 3
