"""Rotations keep P and turn Q towards its Hermitian positive polar factor; balancing keeps the Kronecker product."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework
from psgd import noise
from psgd._xp import namespace
from psgd.rotate import balanced, polished, procrustes2, procrustes3, symmetrised
from psgd.spectral import NormBound

N = 5
TURNS = {"procrustes2": procrustes2, "procrustes3": procrustes3}
# |aR| is at most 1/8 or 1/3, or 0.15 and 0.39 where the norm bound is loose: errors (aR)^4/4 and (aR)^6/64 of U^H U.
ORTHOGONAL = {"procrustes2": 1.2e-4, "procrustes3": 6e-5}
DTYPES = ["float64", "complex128"]


def random_q(dtype: str, seed: int = 0) -> np.ndarray:
    """A random matrix; a real one can be rotated to a positive factor, its determinant being positive."""
    random = np.random.default_rng(seed)
    q = random.standard_normal((N, N))
    if "complex" in dtype:
        return q + 1j * random.standard_normal((N, N))
    q[0] *= np.sign(np.linalg.det(q))
    return q


def polar(q: np.ndarray) -> np.ndarray:
    """The Hermitian positive h of q = u h."""
    _, s, vh = np.linalg.svd(q)
    return (vh.conj().T * s) @ vh


def turned(turn: Callable, framework: Framework, q: np.ndarray, dtype: str, seed: int = 0, **options) -> np.ndarray:
    own = framework.array(q, dtype)
    draws = noise.Counter(noise.key(namespace(own), seed, 1))

    def norm(r, sweep=0, skip=None):
        return NormBound()(r, draws, f"turn/0/{sweep}", positive=False, skip=skip)

    result = turn(own, norm, **options)
    assert result.dtype == own.dtype
    return framework.numpy(result)


def asymmetry(q: np.ndarray) -> float:
    return float(np.abs(q - q.conj().T).max() / np.abs(q).max())


# ---- rotations --------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "dtype"), [*zip(TURNS, DTYPES, strict=True)])
def test_a_turn_is_a_rotation_uphill(framework: Framework, name: str, dtype: str):
    q = random_q(dtype)
    new = turned(TURNS[name], framework, q, dtype)
    rotation = new @ np.linalg.inv(q)
    assert np.abs(rotation.conj().T @ rotation - np.eye(N)).max() < ORTHOGONAL[name]
    assert np.abs(new - q).max() > 0.01
    assert np.trace(new).real > np.trace(q).real + 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TURNS)
def test_repeated_turns_reach_the_polar_factor(name: str, dtype: str):
    for seed in range(5):
        q = start = random_q(dtype, seed)
        for step in range(300):
            q = turned(TURNS[name], FRAMEWORKS["numpy"], q, dtype, seed=step)
        # Not exactly: each turn stretches by ORTHOGONAL. Of 50 starts the worst came to 7e-4 and 9e-5.
        drift = {"procrustes2": 1e-3, "procrustes3": 2e-4}[name]
        assert np.abs(q - polar(start)).max() < drift * np.abs(start).max()
        assert asymmetry(q) < 1e-9


@pytest.mark.parametrize(
    ("turn", "dtype"), [(procrustes2, "complex128"), (procrustes3, "float64"), (polished, "float64")]
)
def test_a_hermitian_positive_q_stays(framework: Framework, turn: Callable, dtype: str):
    q = polar(random_q(dtype))
    q = (q + q.conj().T) / 2
    assert np.abs(turned(turn, framework, q, dtype) - q).max() < 1e-12
    assert np.array_equal(turned(turn, framework, np.eye(N), dtype), np.eye(N))
    assert not turned(turn, framework, np.zeros((N, N)), dtype).any()


def by_definition(order: int, q: np.ndarray) -> np.ndarray:
    """The highest point of the line that the rotation takes, from the roots of the derivative of Re tr."""
    r = q.conj().T - q
    r = r / np.linalg.norm(r, 2)
    t1, t2, t3 = (np.trace(np.linalg.matrix_power(r, k) @ q).real for k in (1, 2, 3))
    slope, largest = ([t2, t1], 1 / 8) if order == 2 else ([3 / 8 * t3, t2, t1], 1 / 3)
    roots = [a.real for a in np.roots(slope) if a.real > 0]
    a = min([largest, *roots])
    return q + a * (r @ q + a / 2 * (r @ r @ q + (a / 4 * r @ r @ r @ q if order == 3 else 0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "order"), [("procrustes2", 2), ("procrustes3", 3)])
def test_a_turn_goes_to_the_highest_point_within_reach(name: str, order: int, dtype: str):
    skew = random_q(dtype, 1)
    for angle in (3.0, 1.0, 0.3, 0.1, 0.01):
        q = polar(random_q(dtype)) + angle * (skew - skew.conj().T)
        got = TURNS[name](q, lambda r, **sweep: np.asarray(np.linalg.norm(r, 2)))
        assert got == pytest.approx(by_definition(order, q), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", TURNS)
def test_the_line_search_is_exact_for_small_angles(name: str):
    h, skew = polar(random_q("float64")), random_q("float64", 1)
    skew = (skew - skew.T) / np.linalg.norm(skew - skew.T, 2)
    for angle in (1e-3, 1e-6):
        q = h + angle * skew @ h
        best = turned(TURNS[name], FRAMEWORKS["numpy"], q, "float64")
        slope = [np.trace((q.T - q) @ x) for x in (q, best)]
        assert abs(slope[1]) < 0.01 * abs(slope[0])  # no more to gain in the direction that was searched


@pytest.mark.parametrize("name", TURNS)
def test_a_negative_determinant_does_no_harm(name: str):
    q = random_q("float64")[[1, 0, 2, 3, 4]]
    sizes = np.linalg.svd(q, compute_uv=False)
    for step in range(100):
        q = turned(TURNS[name], FRAMEWORKS["numpy"], q, "float64", seed=step)
    assert np.linalg.svd(q, compute_uv=False) == pytest.approx(sizes, rel=0.01)


def test_the_higher_order_goes_further():
    q = random_q("complex128")
    gains = [np.trace(turned(t, FRAMEWORKS["numpy"], q, "complex128") - q).real for t in TURNS.values()]
    assert gains[1] > 1.5 * gains[0] > 0


@pytest.mark.parametrize(("turn", "name"), [(procrustes2, "jax"), (procrustes3, "torch"), (polished, "torch")])
def test_half_precision_turns_too(name: str, turn: Callable):
    q = random_q("float64")
    new = turned(turn, FRAMEWORKS[name], q, "bfloat16")
    assert np.trace(new) > np.trace(q) + 0.1
    assert np.linalg.svd(new, compute_uv=False) == pytest.approx(np.linalg.svd(q, compute_uv=False), rel=0.05, abs=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_polished_reaches_its_tolerance_and_stops(framework: Framework, dtype: str):
    skips, skew = [], random_q(dtype, 1)
    q = np.eye(N) + polar(random_q(dtype)) + 0.1 * (skew - skew.conj().T)

    def watched(q, norm):
        def watching(r, sweep=0, skip=None):
            skips.append(bool(skip))
            return norm(r, sweep, skip)

        return polished(q, watching, sweeps=40, tolerance=1e-6)

    new = turned(watched, framework, q, dtype)
    sweeps = skips.index(True)
    assert asymmetry(q) > 1e-2 and asymmetry(new) < 1e-6
    assert skips == [False] * sweeps + [True] * (40 - sweeps)
    shorter = [turned(polished, framework, q, dtype, sweeps=n, tolerance=1e-6) for n in (sweeps - 1, sweeps)]
    assert asymmetry(shorter[0]) >= 1e-6 and np.array_equal(shorter[1], new)


def test_polished_makes_ten_sweeps_to_a_thousandth():
    calls = []

    def norm(r, sweep, skip):
        calls.append((sweep, bool(skip)))
        return np.linalg.norm(r, 2)

    assert asymmetry(polished(polar(random_q("float64")) + 0.1 * np.triu(np.ones((N, N))), norm)) < 1e-3
    assert [sweep for sweep, _ in calls] == list(range(10)) and calls[0] == (0, False) and calls[-1] == (9, True)


def test_symmetrised(framework: Framework):
    q = random_q("complex128")
    assert np.array_equal(framework.numpy(symmetrised(framework.array(q, "complex128"))), (q + q.conj().T) / 2)


# ---- balancing --------------------------------------------------------------------------
def factors(dtype: str, sizes: tuple[float, ...] = (1e-3, 5.0, 700.0)) -> list[np.ndarray]:
    """Dense, diagonal, dense."""
    q = random_q(dtype)
    return [size * x for size, x in zip(sizes, (q, q[0], q[:2, :2]), strict=True)]


def product(qs: list[np.ndarray]) -> np.ndarray:
    return reduce(np.kron, [q if q.ndim == 2 else np.diag(q) for q in qs])


@pytest.mark.parametrize("dtype", DTYPES)
def test_balanced_keeps_the_product_and_equals_the_maxima(framework: Framework, dtype: str):
    qs = factors(dtype)
    new = [framework.numpy(q) for q in balanced([framework.array(q, dtype) for q in qs])]
    assert product(new) == pytest.approx(product(qs), rel=1e-12)
    largest = [np.abs(q).max() for q in new]
    assert largest == pytest.approx([largest[0]] * 3, rel=1e-12)


def test_balanced_leaves_what_it_should(framework: Framework):
    xp = namespace(framework.array(np.zeros(1), "float64"))
    zero = [np.zeros((2, 2)), *factors("float64")[1:]]
    for qs, when in (
        (factors("float64"), False),
        (factors("float64"), xp.asarray(False)),
        (factors("float64")[:1], True),
        (zero, True),
    ):
        new = balanced([framework.array(q, "float64") for q in qs], when)
        assert all(np.array_equal(framework.numpy(q), old) for q, old in zip(new, qs, strict=True))
    moved = balanced([framework.array(q, "float64") for q in factors("float64")], xp.asarray(True))
    assert np.abs(framework.numpy(moved[1]) - factors("float64")[1]).max() > 0.1


@pytest.mark.parametrize("sizes", [(1e-30, 1e30, 1.0), (1e-35, 1e-3, 1e35)])
def test_balanced_does_not_overflow(framework: Framework, sizes: tuple[float, ...]):
    qs = [size * np.eye(2) for size in sizes]
    new = [framework.numpy(q) for q in balanced([framework.array(q, "float32") for q in qs])]
    assert product(new) == pytest.approx(product(qs), rel=1e-4)


@pytest.mark.parametrize("name", [name for name, f in FRAMEWORKS.items() if "bfloat16" in f.dtypes])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_balanced_scales_of_half_precisions_are_float32(name: str, dtype: str):
    framework = FRAMEWORKS[name]
    qs = [framework.array(size * np.eye(2), dtype) for size in (6e-5, 3e4, 1.0)]
    new = balanced(qs)
    assert all(q.dtype == qs[0].dtype for q in new)
    # A factor passes through one rounding of its scale and one of itself.
    largest = [np.abs(framework.numpy(q)).max() for q in new]
    assert largest == pytest.approx([1.8 ** (1 / 3)] * 3, rel=2.0 ** (-7 if dtype == "bfloat16" else -10))
