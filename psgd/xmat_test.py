"""The X-shaped preconditioner is the matrix that it stands for, and takes the steps that its source publishes."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.frameworks import Framework
from psgd import xmat
from psgd._xp import dtype_name
from psgd.arrays import Factors
from psgd.criterion import Pair
from psgd.xmat import XShaped

KINDS = {"1st": XShaped(xmat.by_difference), "2nd": XShaped()}
LENGTHS = pytest.mark.parametrize("n", [1, 2, 5, 6])


@pytest.fixture(params=KINDS)
def order(request: pytest.FixtureRequest) -> str:
    return request.param


def normals(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n)


def some(n: int) -> Factors:
    """Factors in the midst of a run: the determinant of every pair is positive, the middle of b is 0."""
    b = 0.4 * normals(n, 1)
    b[n // 2 : n // 2 + n % 2] = 0
    return Factors((np.exp(0.2 * normals(n)), b), ())


def pair(n: int) -> Pair:
    return Pair(3 * normals(n, 2), normals(n, 3))


def dense(factors: Factors) -> np.ndarray:
    """Q as a matrix."""
    a, b = factors.Q
    return np.diag(a) + np.fliplr(np.diag(b))


def within(framework: Framework, record, dtype: str = "float64"):
    """Every array of a record, in a framework."""
    arrays = [framework.array(x, dtype) for x in (record.Q if isinstance(record, Factors) else record[:2])]
    return Factors(tuple(arrays), ()) if isinstance(record, Factors) else Pair(*arrays)


# ---- the matrix --------------------------------------------------------------------------
@LENGTHS
def test_p_is_that_of_the_matrix(framework: Framework, n: int):
    q, g = dense(some(n)), normals(n, 4)
    got = XShaped().precondition(within(framework, some(n)), framework.array(g, "float64"))
    assert framework.numpy(got) == pytest.approx(q.T @ q @ g, rel=1e-12)


# ---- the step ----------------------------------------------------------------------------
def published(order: str, n: int, mu: float) -> list[np.ndarray]:
    """a and b after a step, from the equations of psgd_jax with the matrix itself."""
    (a, b), (h, v, _), q = some(n).Q, pair(n), dense(some(n))
    x, y = q @ h, np.linalg.solve(q.T, v)
    da, db = x**2 - y**2, x * x[::-1] - y * y[::-1]
    if n % 2:
        db[(n - 1) // 2] = 0
    m = mu / (max(np.abs(da).max(), np.abs(db).max()) if order == "1st" else (x**2 + y**2).max())
    return [a - m * (da * a + db * b[::-1]), b - m * (da * b + db * a[::-1])]


@LENGTHS
def test_a_step_is_the_published_one(framework: Framework, order: str, n: int):
    new = KINDS[order].fit(within(framework, some(n)), within(framework, pair(n)), 0.3, 0.9, None, True)
    for got, wanted in zip(new.Q, published(order, n, 0.3), strict=True):
        assert framework.numpy(got) == pytest.approx(wanted, rel=1e-12, abs=1e-14)
    assert new.L == ()


@pytest.mark.parametrize("n", [1, 5, 6])
def test_pairs_stay_positive_and_the_middle_of_b_stays_zero(order: str, n: int):
    kind, factors = KINDS[order], XShaped().init(np.zeros(n))
    for t in range(200):
        given = Pair(10.0 ** (t % 5 - 2) * normals(n, t), normals(n, 1000 + t))
        factors = kind.fit(factors, given, 0.49, 0.0, None)
        a, b = factors.Q
        assert np.all(a * a[::-1] - b * b[::-1] > 0)
        assert n % 2 == 0 or b[n // 2] == 0
    assert n == 1 or np.abs(factors.Q[1]).max() > 0


@LENGTHS
def test_without_a_signal_nothing_breaks(framework: Framework, order: str, n: int):
    zero, v = np.zeros(n), normals(n)
    for given in (Pair(zero, v), Pair(zero, zero), Pair(v, zero)):
        with np.errstate(all="raise"):
            own = within(framework, some(n), "float32"), within(framework, given, "float32")
            new = KINDS[order].fit(*own, 0.5, 0.9, None)
        assert all(np.isfinite(framework.numpy(q)).all() for q in new.Q)
    same = KINDS[order].fit(within(framework, some(n)), within(framework, Pair(zero, zero)), 0.5, 0.9, None)
    assert all(np.array_equal(framework.numpy(q), old) for q, old in zip(same.Q, some(n).Q, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_residual_of_mere_rounding_is_none(framework: Framework, dtype: str):
    """Else '1st' would make a whole step of it. n = 1 with the automatic scale: x^2 = y^2 but for rounding."""
    moved = {order: 0 for order in KINDS}
    for t in range(50):
        h, v = normals(1, t), normals(1, 100 + t)
        factors = within(framework, Factors((np.sqrt(np.abs(v / h)), np.zeros(1)), ()), dtype)
        for order, kind in KINDS.items():
            new = kind.fit(factors, within(framework, Pair(h, v), dtype), 0.1, 0.9, None)
            moved[order] += not np.array_equal(framework.numpy(new.Q[0]), framework.numpy(factors.Q[0]))
    assert moved["1st"] == 0


def test_only_residuals_of_mere_rounding_are_none(framework: Framework):
    one, rounding = np.ones(4), np.finfo(np.float64).eps
    da = np.array([7 * rounding, 9 * rounding, -9 * rounding, 0.0])
    ell, *got = xmat.by_difference(*(framework.array(x, "float64") for x in (one, one, da, da[::-1].copy())))
    kept = np.where(np.abs(da) > 8 * rounding, da, 0)
    assert [framework.numpy(x).tolist() for x in got] == [kept.tolist(), kept[::-1].tolist()]
    assert float(ell) == 9 * rounding


# ---- the record ---------------------------------------------------------------------------
def test_how_it_begins_and_is_scaled(framework: Framework):
    kind, like = XShaped(), framework.array(np.zeros(5), "float32")
    factors = kind.init(like)
    assert kind.shapes((5,)) == tuple(tuple(q.shape) for q in factors.Q) == ((5,), (5,)) and kind.probed(factors)
    assert [framework.numpy(q).tolist() for q in factors.Q] == [[1] * 5, [0] * 5] and factors.L == ()
    assert {dtype_name(q.dtype) for q in factors.Q} == {"float32"}
    scaled = kind.rescaled(within(framework, some(5)), 0.3)
    assert [framework.numpy(q) for q in scaled.Q] == [pytest.approx(0.3 * q) for q in some(5).Q]
    assert kind.balanced(factors, True) is factors


# ---- what it converges to -----------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 5, 6])
def test_fits_reduce_the_criterion(order: str, n: int):
    """E[h' P h + v' P^-1 v] = tr(H P H) + tr(P^-1) for h = H v; its least value is 2 tr H, where P = H^-1."""
    kind, factors, over = KINDS[order], XShaped().init(np.zeros(n)), []
    q = dense(some(n))
    hessian = 3 * np.linalg.inv(q.T @ q)
    for t in range(801):
        if t % 200 == 0:
            p = dense(factors).T @ dense(factors)
            over.append((np.trace(hessian @ p @ hessian) + np.trace(np.linalg.inv(p))) / (2 * np.trace(hessian)) - 1)
        v = normals(n, t)
        factors = kind.fit(factors, Pair(hessian @ v, v), 0.3 / (1 + t / 100), 0.0, None)
    assert over[0] > 0.3 and -1e-12 < over[-1] < 0.02
