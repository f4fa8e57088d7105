"""The norm bound is a lower bound, and a tight one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.frameworks import FRAMEWORKS, Framework
from psgd import noise
from psgd._xp import namespace
from psgd.spectral import NormBound, TraceBound, general_bound

# Over 300 seeds, seven sizes and five kinds of spectrum the worst ratio to the true norm was 0.889 with 32 probes and
# 4 products, 0.837 with 4 and 6; 0.688 with none and 2.
BOUNDS = {NormBound(): 0.85, NormBound(4, 6, 1e-9): 0.8, NormBound(0, 2): 0.68}
IDS = ["k32m4", "k4m6", "k0m2"]
N = 6  # one size for all frameworks: each new shape costs JAX a compilation


def random_matrix(n: int, dtype: str, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    a = random.standard_normal((n, n))
    return a + 1j * random.standard_normal((n, n)) if "complex" in dtype else a


def positive(a: np.ndarray) -> np.ndarray:
    return a @ a.conj().T


def skew(a: np.ndarray) -> np.ndarray:
    return a - a.conj().T


def measured(bound: NormBound, framework: Framework, a: np.ndarray, dtype: str, *, spd: bool, seed: int = 0) -> float:
    """The bound of a matrix, computed in a framework and dtype."""
    own = framework.array(a, dtype)
    result = bound(own, noise.Counter(noise.key(namespace(own), seed, 1)), "bound/0", positive=spd)
    assert result.shape == ()
    return float(result)


@pytest.mark.parametrize("spd", [True, False], ids=["positive", "skew"])
@pytest.mark.parametrize(("bound", "dtype"), [*zip(BOUNDS, ["complex128", "float32", "float64"], strict=True)], ids=IDS)
def test_bound_is_just_below_the_norm(framework: Framework, spd: bool, bound: NormBound, dtype: str):
    rounding = 10 * float(np.finfo(dtype).eps) + 5 * bound.offset
    a = (positive if spd else skew)(random_matrix(N, dtype)).astype(dtype)
    ratio = measured(bound, framework, a, dtype, spd=spd) / np.linalg.norm(a, 2)
    assert BOUNDS[bound] < ratio < 1 + rounding


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("bound", BOUNDS, ids=IDS)
def test_bound_holds_for_many_matrices(seed: int, bound: NormBound):
    for n in (1, 2, 3, 8, 30):
        for dtype in ("float64", "complex128"):
            start = random_matrix(n, dtype, seed)
            for spd, a in ((True, positive(start)), (False, skew(start))):
                if not np.any(a):
                    continue  # a real skew matrix of one row
                ratio = measured(bound, FRAMEWORKS["numpy"], a, dtype, spd=spd, seed=seed) / np.linalg.norm(a, 2)
                assert BOUNDS[bound] < ratio < 1 + 1e-14 + 10 * bound.offset


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_exact_where_one_number_is_the_spectrum(framework: Framework, dtype: str):
    v = random_matrix(N, dtype)[0]
    for a in (np.outer(v, v.conj()), 3 * np.eye(N), np.diag([0.0, 0, 5, 0, 0, 0])):
        assert measured(NormBound(), framework, a, dtype, spd=True) == pytest.approx(np.linalg.norm(a, 2), rel=1e-14)


@pytest.mark.parametrize("spd", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_zero_matrix_gives_zero(framework: Framework, dtype: str, spd: bool):
    for bound in (*BOUNDS, TraceBound()):
        assert measured(bound, framework, np.zeros((N, N)), dtype, spd=spd) == 0


@given(exponent=st.floats(-30, 30), n=st.integers(1, 8), seed=st.integers(0, 2**32 - 1), spd=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_bound_scales_with_the_matrix(exponent: float, n: int, seed: int, spd: bool):
    a = (positive if spd else skew)(random_matrix(n, "float64", seed))
    one, scaled = (
        measured(NormBound(), FRAMEWORKS["numpy"], c * a, "float64", spd=spd, seed=seed) for c in (1.0, 10**exponent)
    )
    assert scaled == pytest.approx(10**exponent * one, rel=1e-13, abs=0)


def test_float32_bound_survives_squares_that_do_not_fit(framework: Framework):
    for scale in (1e-30, 1e30):
        a = scale * positive(random_matrix(N, "float32")).astype("float32")
        bound = measured(NormBound(), framework, a, "float32", spd=True)
        assert 0.85 < bound / np.linalg.norm(a.astype(float), 2) < 1 + 1e-6


@pytest.mark.parametrize("name", [name for name, f in FRAMEWORKS.items() if "bfloat16" in f.dtypes])
def test_half_precision_is_lifted(name: str):
    framework = FRAMEWORKS[name]
    a = framework.array(positive(random_matrix(N, "float32")), "bfloat16")
    for bound in (NormBound(), TraceBound()):
        for x in (a, a[0]):
            result = bound(x, noise.Counter(noise.key(namespace(a), 0, 1)), "b", positive=True)
            assert result.dtype == namespace(a).float32
    size = measured(NormBound(), framework, positive(random_matrix(N, "float32")), "bfloat16", spd=True)
    assert size / np.linalg.norm(framework.numpy(a), 2) == pytest.approx(1, abs=0.15)


def test_a_diagonal_gives_its_largest_entry(framework: Framework):
    for dtype in ("float64", "complex128"):
        assert measured(NormBound(), framework, np.array([1.0, 3.0, 2.0]), dtype, spd=True) == 3
        assert measured(NormBound(), framework, np.array(0.5), dtype, spd=True) == 0.5


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_trace_bound(framework: Framework, dtype: str):
    a = positive(random_matrix(N, dtype))
    assert measured(TraceBound(), framework, a, dtype, spd=True) == pytest.approx(np.trace(a).real, rel=1e-14)
    r = skew(random_matrix(N, dtype))
    assert measured(TraceBound(), framework, r, dtype, spd=False) == measured(
        NormBound(), framework, r, dtype, spd=False
    )
    assert measured(TraceBound(), framework, np.array([1.0, 3.0, 2.0]), dtype, spd=True) == 3


class Fixed:
    """Draws that are one recorded matrix."""

    def __init__(self, probes: np.ndarray) -> None:
        self.probes = probes

    def normal(self, role: str, shape: tuple[int, ...], like: np.ndarray, skip: None = None) -> np.ndarray:
        assert tuple(shape) == self.probes.shape
        return self.probes


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_bound_is_the_growth_of_the_last_product(dtype: str):
    a, probes = skew(random_matrix(4, dtype)), random_matrix(4, dtype, seed=1)[:3]
    row = a[np.argmax(np.linalg.norm(a, axis=1))]
    v = row + np.sign(probes.conj() @ row)[:, None] * abs(a).max() * probes  # the start is formed of a / max|a|
    grown = [np.linalg.norm(v @ np.linalg.matrix_power(a, m), axis=1) for m in (1, 2)]
    assert NormBound(3, 2)(a, Fixed(probes), "b", positive=False) == pytest.approx(
        (grown[1] / grown[0]).max(), rel=1e-13
    )


# ---- of any square matrix -------------------------------------------------------------------
SHAPED = {
    "general": lambda a: a,
    "upper": np.triu,
    "lower": np.tril,
    "residual": lambda a: np.triu(positive(a) - 2 * positive(a.T)),
    "positive": positive,
    "skew": skew,
    "diagonal": lambda a: np.diag(np.diag(a)),
    "rank one": lambda a: np.outer(a[0], a[-1]),
}


@pytest.mark.parametrize("shaped", SHAPED.values(), ids=SHAPED)
def test_general_bound_is_below_the_norm(shaped):
    for seed in range(20):
        for n in (1, 2, 3, 8, 30):
            for dtype in ("float64", "complex128"):
                a = shaped(random_matrix(n, dtype, seed))
                if np.any(a):
                    assert 0.7 < general_bound(a) / np.linalg.norm(a, 2) < 1 + 1e-14


@pytest.mark.parametrize("shape", [positive, skew])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_general_bound_of_a_hermitian_matrix_needs_no_other_form(framework: Framework, dtype: str, shape):
    a = shape(random_matrix(N, dtype))
    own = general_bound(framework.array(a, dtype))
    assert own.shape == () and "complex" not in str(own.dtype)
    for spd in (True, False)[shape is skew :]:
        assert float(own) == pytest.approx(measured(NormBound(0, 2), framework, a, dtype, spd=spd), rel=1e-13)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_general_bound_starts_from_the_largest_row_or_column(framework: Framework, dtype: str):
    a = np.triu(random_matrix(N, dtype))
    a[:, 4] *= 3  # the largest column is larger than the largest row
    assert np.linalg.norm(a, axis=0).max() > np.linalg.norm(a, axis=1).max()
    x = a.conj().T @ a[:, np.argmax(np.linalg.norm(a, axis=0))]
    wanted = np.linalg.norm(a @ x) / np.linalg.norm(x)
    for b in (a, a.conj().T):
        assert float(general_bound(framework.array(b, dtype))) == pytest.approx(wanted, rel=1e-13)


def test_general_bound_of_zero_and_of_extremes(framework: Framework):
    assert float(general_bound(framework.array(np.zeros((N, N)), "float32"))) == 0
    for scale in (1e-30, 1e30):
        a = scale * np.triu(random_matrix(N, "float32"))
        bound = float(general_bound(framework.array(a, "float32")))
        assert 0.7 < bound / np.linalg.norm(a, 2) < 1 + 1e-6
