"""The low-rank preconditioner is the matrix that it stands for, and takes the steps that its sources publish."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework
from psgd import lra, noise, pipeline
from psgd._testing import normals
from psgd._xp import dtype_name, namespace
from psgd.arrays import Factors
from psgd.criterion import Pair
from psgd.lra import LRA
from psgd.methods import METHODS
from psgd.noise import Counter, key


def as_they_are(u, v):
    """What is in U and V is the test's own."""
    return u, v


KINDS = {
    "running": LRA(3),
    "2nd": LRA(3, lra.BY_TERMS, as_they_are, lra.spread_by_rank),
    "1st": LRA(3, lra.BY_RESIDUAL, as_they_are, lra.spread_by_rank),
}
N = 8


@pytest.fixture(params=KINDS)
def order(request: pytest.FixtureRequest) -> str:
    return request.param


def some(kind: LRA, n: int = N) -> Factors:
    """Factors in the midst of a run, U and V of unlike size."""
    q = 0.8 * normals(n, kind.rank), 0.2 * normals(n, kind.rank, seed=1), np.exp(0.3 * normals(n, seed=2))
    return Factors(q, tuple(np.asarray(x) for x in (0.3, 50.0, 2.0)) if kind.normaliser.running else ())


def pair(n: int = N) -> Pair:
    return Pair(3 * normals(n, seed=3), normals(n, seed=4))


def dense(factors: Factors) -> np.ndarray:
    """Q as a matrix."""
    u, v, d = factors.Q
    return (np.eye(len(d)) + u @ v.T) @ np.diag(d)


def within(framework: Framework, x, dtype: str = "float64"):
    """Every array of a record in a framework."""
    if isinstance(x, float):
        return x
    if isinstance(x, np.ndarray):
        return framework.array(x, dtype)
    parts = [within(framework, part, dtype) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


def numbers(framework: Framework, factors: Factors) -> list[np.ndarray]:
    return [framework.numpy(x) for x in (*factors.Q, *factors.L)]


def close(got: list, wanted: list, rel: float = 1e-12) -> bool:
    return all(x == pytest.approx(y, rel=rel, abs=1e-14) for x, y in zip(got, wanted, strict=True))


# ---- the matrix --------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_p_is_that_of_the_matrix(framework: Framework, rank: int):
    kind, g = LRA(rank), normals(N, seed=5)
    factors = some(kind)
    got = framework.numpy(kind.precondition(within(framework, factors), framework.array(g, "float64")))
    assert got == pytest.approx(dense(factors).T @ dense(factors) @ g, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_images_are_those_of_the_matrix(framework: Framework, rank: int):
    kind, (h, probe, _) = LRA(rank), pair()
    factors = some(kind)
    q = dense(factors)
    arrays = (framework.array(x, "float64") for x in (*factors.Q, h, probe))
    x, y, _ = (framework.numpy(a) for a in kind._images(*arrays))
    assert x == pytest.approx(q @ h, rel=1e-12)
    assert y == pytest.approx(np.linalg.solve(q.T, probe), rel=1e-12)


# ---- the step ----------------------------------------------------------------------------
def published(order: str, factors: Factors, given: Pair, mu: float, beta: float, side: bool) -> list[np.ndarray]:
    """U, V, d and L after a step, from the equations of psgd_torch ("running") and psgd_jax with the matrix itself."""
    (u, v, d), lows, (h, probe, _) = factors.Q, list(factors.L), given
    if order == "running":
        a, b = u.T @ u, v.T @ v
        rho = (np.trace(a) / np.trace(b)) ** 0.25
        e = 0.1 * (a / rho**2 - b * rho**2) / (np.trace(a) / rho**2 + np.trace(b) * rho**2)
        u, v = u / rho, v * rho
        u, v = u @ (np.eye(3) - e + e @ e / 2), v @ (np.eye(3) + e + e @ e / 2)
    q = dense(Factors((u, v, d), ()))
    x, y, z, ph = q @ h, np.linalg.solve(q.T, probe), np.linalg.solve(q.T @ q, probe), q.T @ q @ h

    def length(which: int, ell: float) -> float:
        if order == "running":
            ell = lows[which] = np.asarray(max(beta * lows[which] + (1 - beta) * ell, ell))
        return mu / ell

    ell = {
        "running": np.abs(ph * h).max() + np.abs(probe * z).max(),
        "2nd": np.sqrt((ph**2 + probe**2) * (h**2 + z**2)).max(),
        "1st": np.abs(ph * h - probe * z).max(),
    }[order]
    d = d - length(2, ell) * (ph * h - probe * z) * d
    other = v if side else u
    p, s = other @ other.T @ x, other @ other.T @ y
    ell = np.linalg.norm(x) * np.linalg.norm(p) + np.linalg.norm(y) * np.linalg.norm(s)
    ell = np.linalg.norm(np.outer(x, p) - np.outer(y, s)) if order == "1st" else ell
    residual = np.outer(x, x) - np.outer(y, y)
    if side:
        u = u - length(0, ell) * residual @ v @ (np.eye(3) + v.T @ u)
    else:
        v = v - length(1, ell) * (np.eye(N) + v @ u.T) @ residual @ u
    return [u, v, d, *lows]


@pytest.mark.parametrize("side", [True, False])
def test_a_step_is_the_published_one(framework: Framework, order: str, side: bool):
    kind, factors = KINDS[order], some(KINDS[order])
    new = kind.fit(within(framework, factors), within(framework, pair()), 0.2, 0.9, None, side)
    assert close(numbers(framework, new), published(order, factors, pair(), 0.2, 0.9, side), 1e-11)
    for other in ("numpy", "torch"):  # and the same in all of them, closer than to a matrix that was inverted
        own = FRAMEWORKS[other]
        again = kind.fit(within(own, factors), within(own, pair()), 0.2, 0.9, None, side)
        assert close(numbers(framework, new), numbers(own, again))


@pytest.mark.parametrize("side", [True, False])
def test_a_decision_may_be_an_array(framework: Framework, order: str, side: bool):
    kind, factors = KINDS[order], within(framework, some(KINDS[order]))
    known, flag = kind.fit(factors, within(framework, pair()), 0.2, 0.9, None, side), np.asarray(side)
    array = kind.fit(factors, within(framework, pair()), 0.2, 0.9, None, framework.array(flag, _bool(framework)))
    assert close(numbers(framework, array), numbers(framework, known))
    if framework.name == "jax":
        traced = jax.jit(lambda s: kind.fit(factors, within(framework, pair()), 0.2, 0.9, None, s))(side)
        assert close(numbers(framework, traced), numbers(framework, known))


def _bool(framework: Framework) -> str:
    return "bool_" if framework.name == "jax" else "bool"


@pytest.mark.parametrize("decided", [lambda side: side, jnp.asarray])
@pytest.mark.parametrize("side", [True, False])
def test_the_side_that_does_not_move_stays_exactly(order: str, side: bool, decided):
    with jax.enable_x64(True):
        kind = replace(KINDS[order], keep=as_they_are)
        factors = within(FRAMEWORKS["jax"], some(kind))
        new = kind.fit(factors, within(FRAMEWORKS["jax"], pair()), 0.2, 0.9, None, decided(side))
        for moving, a, b in ((side, 0, 0), (not side, 1, 1)):
            assert np.array_equal(factors.Q[a], new.Q[b]) is not moving
            if kind.normaliser.running:
                assert np.array_equal(factors.L[a], new.L[b]) is not moving
        assert not np.array_equal(factors.Q[2], new.Q[2])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("side", [True, False])
def test_without_a_signal_nothing_breaks(framework: Framework, order: str, rank: int, side: bool):
    """Zero h, zero v, zero U or V; both ways of being told the side."""
    kind = replace(KINDS[order], rank=rank)
    factors, zero, v = some(kind), np.zeros(N), normals(N)
    u0, v0, d = factors.Q
    lows = tuple(np.zeros(()) for _ in factors.L)
    for q in ((u0, v0, d), (0 * u0, v0, d), (u0, 0 * v0, d), (0 * u0, 0 * v0, d)):
        for given in (Pair(zero, v), Pair(zero, zero), Pair(v, zero)):
            for flag in (side, framework.array(np.asarray(side), _bool(framework))):
                with np.errstate(all="raise"):
                    own = within(framework, Factors(q, lows), "float32"), within(framework, given, "float32")
                    new = kind.fit(*own, 0.5, 0.9, None, flag)
                assert all(np.isfinite(x).all() for x in numbers(framework, new))


def test_rank_zero_is_a_diagonal(framework: Framework):
    kind, (h, v, _) = LRA(0), pair()
    factors = some(kind)
    d, lows = factors.Q[2], [float(x) for x in factors.L]
    new = kind.fit(within(framework, factors), within(framework, pair()), 0.2, 0.9, None, True)
    t1, t2 = (d * h) ** 2, (v / d) ** 2
    ell = max(0.9 * lows[2] + 0.1 * (t1.max() + t2.max()), t1.max() + t2.max())
    assert framework.numpy(new.Q[2]) == pytest.approx(d - 0.2 / ell * (t1 - t2) * d, rel=1e-13)
    assert [float(x) for x in new.L] == pytest.approx([lows[0], lows[1], ell], rel=1e-13)


# ---- how U and V are kept alike -----------------------------------------------------------
@pytest.mark.parametrize("ratio", [1.0, 1e-3, 1e6])
def test_aligned_leaves_the_product_and_equalises_the_norms(framework: Framework, ratio: float):
    u, v = ratio * normals(N, 3), normals(N, 3, seed=1)
    a, b = (framework.numpy(x) for x in lra.aligned(framework.array(u, "float64"), framework.array(v, "float64")))
    assert np.linalg.norm(a @ b.T - u @ v.T) < 1e-5 * np.linalg.norm(u @ v.T)  # E^4/4, and |E| is a tenth at most
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=0.02)

    def unlike(x: np.ndarray, y: np.ndarray) -> float:
        scale = np.linalg.norm(x) / np.linalg.norm(y)
        return float(np.linalg.norm(x.T @ x / scale - y.T @ y * scale))

    assert unlike(a, b) < 0.98 * unlike(u, v)


@pytest.mark.parametrize("gone", [0, 1])
def test_aligned_leaves_a_vanished_side(framework: Framework, gone: int):
    pairs = [normals(N, 3), normals(N, 3, seed=1)]
    pairs[gone] = 0 * pairs[gone]
    kept = lra.aligned(*(framework.array(x, "float64") for x in pairs))
    assert all(np.array_equal(framework.numpy(a), b) for a, b in zip(kept, pairs, strict=True))


@pytest.mark.parametrize("told", [bool, lambda x: np.asarray(x)])
def test_balanced(told):
    kind = LRA(3)
    factors = some(kind)
    u, v, d = kind.balanced(factors, told(True)).Q
    assert np.linalg.norm(u) == pytest.approx(np.linalg.norm(v)) and u @ v.T == pytest.approx(
        factors.Q[0] @ factors.Q[1].T
    )
    assert u / u[0, 0] == pytest.approx(factors.Q[0] / factors.Q[0][0, 0]) and d is factors.Q[2]
    same = kind.balanced(factors, told(False))
    assert all(np.array_equal(a, b) for a, b in zip(same.Q, factors.Q, strict=True))
    for lost in ((0 * u, v, d), (u, 0 * v, d)):
        kept = kind.balanced(Factors(lost, ()), told(True))
        assert all(np.array_equal(a, b) for a, b in zip(kept.Q, lost, strict=True))


# ---- the start ---------------------------------------------------------------------------
def begun(kind: LRA, n: int, dtype: str = "float64", framework: str = "numpy") -> Factors:
    like = FRAMEWORKS[framework].array(np.zeros(n), dtype)
    return kind.init(like, Counter(noise.key(namespace(like), 0, 0)))


def test_how_it_begins(order: str):
    kind = replace(KINDS[order], rank=4)
    u, v, d = begun(kind, 1000).Q
    assert kind.shapes((10, 100)) == (u.shape, v.shape, d.shape) == ((1000, 4), (1000, 4), (1000,))
    for role, x in (("U", u), ("V", v)):
        z = Counter(noise.key(np, 0, 0)).normal(role, (1000, 4), u)
        size = sqrt(0.1) / np.linalg.norm(z) if order == "running" else 1 / sqrt(1000 * 14)
        assert x == pytest.approx(size * z, rel=1e-14)
    assert (d == 1).all() and not np.array_equal(u, v)
    assert list(begun(kind, 1000).L) == [0] * (3 if order == "running" else 0)


@pytest.mark.parametrize(("rank", "n", "capped"), [(10, 3, 2), (3, 3, 2), (3, 4, 3), (10, 1, 0), (10, 0, 0), (0, 5, 0)])
def test_a_rank_that_is_capped_is_what_the_length_allows(rank: int, n: int, capped: int):
    kind, allowed = LRA(rank, lra.BY_TERMS, capped=True), LRA(capped, lra.BY_TERMS)
    factors = begun(kind, n)
    assert [q.shape for q in factors.Q] == list(kind.shapes((n,))) == list(allowed.shapes((n,)))
    if n:
        other, given = begun(allowed, n), (pair(n), 0.5, 0.0, None, True)
        for ours, theirs in ((kind.fit(factors, *given), allowed.fit(other, *given)), (factors, other)):
            assert all(map(np.array_equal, ours.Q, theirs.Q))
            assert np.array_equal(kind.precondition(ours, normals(n)), allowed.precondition(theirs, normals(n)))
            assert all(map(np.array_equal, kind.balanced(ours, True).Q, allowed.balanced(theirs, True).Q))


@pytest.mark.parametrize(
    ("rank", "n", "fits"), [(0, 0, True), (0, 1, True), (1, 1, False), (3, 3, False), (3, 4, True)]
)
def test_the_rank_is_below_the_length(rank: int, n: int, fits: bool):
    if fits:
        assert begun(LRA(rank), n).Q[0].shape == (n, rank)
    else:
        with pytest.raises(ValueError, match=f"rank {rank} needs more than {n} numbers; lower its rank"):
            begun(LRA(rank), n)


def test_a_scale_is_of_q(order: str):
    kind = KINDS[order]
    assert dense(kind.rescaled(some(kind), 0.3)) == pytest.approx(0.3 * dense(some(kind)), rel=1e-13)


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_kept_and_bounds_are_in_float32(name: str, dtype: str, order: str):
    kind, framework = KINDS[order], FRAMEWORKS[name]
    factors = begun(kind, N, dtype, name)
    for flag in (True, framework.array(np.asarray(False), _bool(framework))):
        factors = kind.fit(factors, within(framework, pair(), dtype), 0.2, 0.9, None, flag)
        assert {dtype_name(x.dtype) for x in factors.Q} == {dtype}
        assert {dtype_name(x.dtype) for x in factors.L} <= {"float32"}
        assert all(np.isfinite(x).all() for x in numbers(framework, factors))


# ---- what it converges to -----------------------------------------------------------------
def test_fits_reduce_the_criterion(order: str):
    """E[h' P h + v' P^-1 v] = tr(H P H) + tr(P^-1) for h = H v; its least value is 2 tr H, where P = H^-1."""
    kind = KINDS[order]
    q = dense(Factors((0.7 * normals(N, 3), 0.7 * normals(N, 3, seed=1), np.geomspace(0.5, 2, N)), ()))
    hessian = np.linalg.inv(q.T @ q)
    least, factors, over = 2 * np.trace(hessian), begun(kind, N), []
    for t in range(1201):
        if t % 300 == 0:
            p = dense(factors).T @ dense(factors)
            over.append((np.trace(hessian @ p @ hessian) + np.trace(np.linalg.inv(p))) / least - 1)
        v = normals(N, seed=t)
        rate = 0.5 / (1 + t / 100)
        factors = kind.balanced(kind.fit(factors, Pair(hessian @ v, v), rate, 0.9, None, t % 2 == 0), t % 100 == 0)
    assert over[0] > 1 and 0 <= over[-1] < 0.1


# ---- for long -----------------------------------------------------------------------------------
def test_short_columns_stay_and_long_ones_are_aligned(framework: Framework):
    random = np.random.default_rng(0)
    for scale, changed in ((0.1, False), (1.0, True)):
        u, v = (framework.array(scale * random.standard_normal((6, 3)), "float64") for _ in range(2))
        new = lra.aligned_if_long(u, v)
        wanted = lra.aligned(u, v) if changed else (u, v)
        for a, b in zip(new, wanted, strict=True):
            assert np.array_equal(framework.numpy(a), framework.numpy(b))
        assert changed != np.array_equal(framework.numpy(new[0]), framework.numpy(u))


def test_columns_do_not_grow_for_ever():
    """What the fit does to U and V by itself, here by parallel columns that it has let grow long, is undone in time."""
    method = METHODS["low_rank_approximation"].of(uvd_rank_of_approximation=2, b1=0.0)
    g = np.random.default_rng(1).standard_normal((3000, 24))
    state = pipeline.init(method.recipe(), g[0], 1.0, Counter(key(np, 0, 0)))
    u, v, d = state.factors.Q
    rows = np.random.default_rng(2).standard_normal((24, 1)) * [1.0, 1.1]
    state = state._replace(factors=state.factors._replace(Q=(rows + 0.01 * u, rows + 0.01 * v, d)))
    for step, x in enumerate(g, 1):
        plan = pipeline.host_plan(method.schedule(), step)
        _, state = pipeline.step(method.recipe(), plan._replace(key=np.full(1, plan.key, np.int32)), x, state)
    assert max(np.linalg.norm(q) for q in state.factors.Q[:2]) < 3
