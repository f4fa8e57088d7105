"""What is held by thin factors is the matrix that they make up, and a fit to it costs a square instead of a cube."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import jax
import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework, double_precision
from psgd import kron, noise, summary, thin
from psgd.criterion import Pair
from psgd.geometry import GEOMETRIES, inverse_gram, mean_dear
from psgd.kron import DenseRule, by_terms, by_triangle
from psgd.methods import METHODS
from psgd.spectral import NormBound, TraceBound
from psgd.thin import Thin

N = 2 * thin.BLOCK + 5  # neither one block nor whole blocks
DTYPES = ["float64", "complex128"]
DENSE = [name for name, method in METHODS.items() if method().recipe().joint and "dQ" in method.__dataclass_fields__]


def gaussian(m: int, n: int, dtype: str, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.standard_normal((m, n))
    return x + 1j * random.standard_normal((m, n)) if "complex" in dtype else x


# Each function of a matrix of either kind, with further operands.
FUNCTIONS: dict[str, Callable] = {
    "formed": lambda a, x: thin.formed(a),
    "diagonal": lambda a, x: thin.diagonal(a),
    "from_left": lambda a, x: thin.from_left(a, x),
    "from_right": lambda a, x: thin.from_right(a, x.mT),
}
UNSHIFTED: dict[str, Callable] = {
    "row_norms": lambda a, x: thin.row_norms(a),
    "row": lambda a, x: thin.row(a, thin.namespace(x).argmax(thin.row_norms(a))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_functions_of_thin_factors_are_those_of_the_matrix(name: str, dtype: str):
    framework: Framework = FRAMEWORKS[name]
    arrays = [gaussian(N, k, dtype, k) for k in (1, 2, 3)]

    def all_of_them(x, y, other) -> list:
        total, difference = (op(thin.gram(x, 0), thin.gram(y, 0)) for op in (Thin.__add__, Thin.__sub__))
        pairs = [(f, a) for f in FUNCTIONS.values() for a in (total, difference, total.less(0.5))]
        pairs += [(f, total) for f in UNSHIFTED.values()]
        return [z for f, a in pairs for z in (f(a, other), f(thin.formed(a), other))]

    with double_precision(name):
        run = jax.jit(all_of_them) if name == "jax" else all_of_them
        found = [framework.numpy(x) for x in run(*(framework.array(x, dtype) for x in arrays))]
    for own, whole in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_allclose(own, whole, rtol=0, atol=1e-12 * N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("n", [3, thin.BLOCK, N])
def test_a_triangle_times_a_triangle_is_summed_from_below(n: int, name: str, dtype: str):
    framework: Framework = FRAMEWORKS[name]
    x, y, q = gaussian(n, 1, dtype, 0), gaussian(n, 2, dtype, 1), np.triu(gaussian(n, n, dtype, 2))

    def product(x, y, q):
        return thin.triangle_from_left((thin.gram(x, 0) - thin.gram(y, 0)).less(0.5), q)

    with double_precision(name):
        run = jax.jit(product) if name == "jax" else product
        found = framework.numpy(run(*(framework.array(x, dtype) for x in (x, y, q))))
    d = x @ x.conj().T - y @ y.conj().T - 0.5 * np.eye(n)
    np.testing.assert_allclose(found, np.triu(d) @ q, rtol=0, atol=1e-12 * n)
    assert not np.tril(found, -1).any()  # not nearly: a triangular solve does not look there


KINDS = GEOMETRIES | {"EQ in the mean": replace(GEOMETRIES["EQ"], expected=inverse_gram, probed=mean_dear)}


@pytest.mark.parametrize("criterion", ["whitening", "newton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((24,), 0), ((17, 2), 0), ((2, 17), 1), ((1, 9, 1), 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_to_thin_terms_is_the_fit(kind: str, shape, axis: int, dtype: str, criterion: str, monkeypatch):
    """Of vectors and of long axes, for each geometry, criterion, norm bound and normaliser."""
    geometry = KINDS[kind]
    g, v = (gaussian(int(np.prod(shape)), 1, dtype, seed).reshape(shape) for seed in (0, 1))
    probe = criterion == "newton" or geometry.probed(kron.init(DenseRule(max_skew=inf)(shape), g).Q)
    pair = Pair(g, v if probe else None)
    start = kron.init(DenseRule(max_skew=inf)(shape), g)
    tilted = [np.triu(np.eye(*q.shape) + 0.1 * gaussian(*q.shape, dtype, 9)) if q.ndim == 2 else q for q in start.Q]
    tilted = [(q + q.conj().T) / 2 if q.ndim == 2 and kind in ("QUAD", "QUAD4P") else q for q in tilted]
    start = start._replace(Q=tuple(tilted))
    assert thin.is_thin(shape, axis) and start.Q[axis].ndim == 2
    ways = [(b, by_terms) for b in (NormBound(), NormBound(4, 6, 1e-9), TraceBound())]
    ways += [(NormBound(0, 2), n) for n in (by_terms, by_triangle) if probe or n is by_terms]
    for bound, normaliser in ways:
        draws = noise.Counter(noise.key(np, 0, 1))
        made = kron.fit(geometry, bound, start, pair, 0.5, 0.9, draws, normaliser)
        with monkeypatch.context() as patch:
            patch.setattr(thin, "is_thin", lambda shape, axis: False)
            wanted = kron.fit(geometry, bound, start, pair, 0.5, 0.9, draws, normaliser)
        assert any((q != s).any() for q, s in zip(made.Q, start.Q, strict=True))
        for own, whole in zip((*made.Q, *made.L), (*wanted.Q, *wanted.L), strict=True):
            np.testing.assert_allclose(own, whole, rtol=1e-9, atol=1e-10 * np.abs(whole).max())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("method", DENSE)
def test_a_newton_fit_of_one_vector_costs_a_square_unless_it_rotates(method: str, geometry: str):
    """Twice the numbers cost four times as much, where a rotation makes it eight times."""
    once, twice = (
        summary.parameter_cost(METHODS[method].of(dQ=geometry), "p", (n,), "float64").fit for n in (2000, 4000)
    )
    growth = 8 if GEOMETRIES[geometry].turn is not None else 4
    assert twice / once == pytest.approx(growth, rel=0.02)


def test_only_long_axes_are_thin():
    assert not any(thin.is_thin(shape, axis) for shape in ((), (7,), (8, 2), (3, 4)) for axis in range(len(shape)))
    assert thin.is_thin((8,), 0) and thin.is_thin((16, 2), 0) and not thin.is_thin((16, 2), 1)
