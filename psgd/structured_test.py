"""Products in strips are the whole products, and less work."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework, double_precision
from psgd import pipeline, structured
from psgd.cost import ShapeNamespace, ShapeTracer
from psgd.geometry import GEOMETRIES
from psgd.methods import METHODS

N, K = 13, 17  # no strips of equal heights


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of a few rows have strips."""
    monkeypatch.setattr(structured, "NARROWEST", 3)
    monkeypatch.setattr(structured, "NARROWEST_MIRRORED", 3)
    assert len(structured.edges(N)) == structured.MOST


def random_matrix(m: int, n: int, dtype: str, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.standard_normal((m, n))
    return x + 1j * random.standard_normal((m, n)) if "complex" in dtype else x


# The product, the whole of it by NumPy, and what it is of: a triangle q, a second one r, a wide x and a tall y.
PRODUCTS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "gram_of_rows": (structured.gram_of_rows, lambda x: x @ x.conj().T, ("x",)),
    "gram_of_columns": (structured.gram_of_columns, lambda y: y.T @ y.conj(), ("y",)),
    "gram_of_triangle": (structured.gram_of_triangle, lambda q: q.conj().T @ q, ("q",)),
    "triangle_by_triangle": (structured.triangle_by_triangle, lambda q, r: np.triu(q) @ r, ("full", "q")),
    "upper_from_left": (structured.upper_from_left, lambda q, x: q @ x, ("q", "x")),
    "upper_from_right": (structured.upper_from_right, lambda q, y: y @ q.T, ("q", "y")),
    "adjoint_from_left": (structured.adjoint_from_left, lambda q, x: q.conj().T @ x, ("q", "x")),
    "adjoint_from_right": (structured.adjoint_from_right, lambda q, y: y @ q.conj(), ("q", "y")),
}


def operands(dtype: str) -> dict[str, np.ndarray]:
    full = random_matrix(N, N, dtype, 0)
    x, y = random_matrix(N, K, dtype, 1), random_matrix(K, N, dtype, 2)
    return {"full": full, "q": np.triu(random_matrix(N, N, dtype, 3)), "x": x, "y": y}


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_strips_make_up_the_whole_product(name: str, dtype: str):
    framework: Framework = FRAMEWORKS[name]
    arrays = operands(dtype)

    def all_of_them(own: dict) -> list:
        return [product(*(own[key] for key in of)) for product, _, of in PRODUCTS.values()]

    with double_precision(name):
        run = jax.jit(all_of_them) if name == "jax" else all_of_them
        results = run({key: framework.array(x, dtype) for key, x in arrays.items()})
        for got, (_, whole, of) in zip(results, PRODUCTS.values(), strict=True):
            assert framework.numpy(got) == pytest.approx(whole(*(arrays[key] for key in of)), rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("name", ["gram_of_rows", "gram_of_columns", "gram_of_triangle"])
def test_what_is_mirrored_is_exact(name: str):
    product, _, of = PRODUCTS[name]
    result = product(*(operands("complex128")[key] for key in of))
    first = structured.edges(N)[0][1]
    assert np.array_equal(result[first:, :first], result[:first, first:].conj().T)


def test_below_the_diagonal_nothing_is_read_or_made():
    a = operands("float64")
    spoilt = a["full"] + np.tril(np.full((N, N), np.nan), -1)
    result = structured.triangle_by_triangle(spoilt, a["q"])
    assert np.isfinite(result).all() and not np.tril(result, -1).any()


# The share of the whole product's work that s strips of equal height leave, from adding up their sizes.
SHARES = {
    "gram_of_rows": lambda s: (s + 1) / (2 * s),
    "upper_from_left": lambda s: (s + 1) / (2 * s),
    "adjoint_from_right": lambda s: (s + 1) / (2 * s),
    "gram_of_triangle": lambda s: sum((i + 1) * (s - i) for i in range(s)) / s**3,
    "triangle_by_triangle": lambda s: sum((s - i) ** 2 for i in range(s)) / s**3,
}


@pytest.mark.parametrize("name", SHARES)
def test_strips_save_the_work_that_they_say(name: str, monkeypatch: pytest.MonkeyPatch):
    product, _, of = PRODUCTS[name]
    n = 3 * structured.MOST

    def work() -> int:
        xp = ShapeNamespace()
        product(*(ShapeTracer((n, n), "float32", xp) for _ in of))
        return xp.flops

    saved = work()
    monkeypatch.setattr(structured, "MOST", 1)
    assert saved == pytest.approx(SHARES[name](4) * work())


def test_short_matrices_are_multiplied_whole():
    assert structured.edges(5) == [(0, 5)]
    assert structured.edges(0) == [(0, 0)]
    assert structured.edges(7) == [(0, 3), (3, 7)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_step_in_strips_is_the_step(geometry: str, monkeypatch: pytest.MonkeyPatch):
    method = METHODS["kron_whiten"].of(dQ=geometry, preconditioner_init_scale=0.7, lr_preconditioner=0.3)
    recipe = method.recipe()
    gradients = [random_matrix(N, K, "float64", seed) for seed in range(3)]

    def walked() -> list[np.ndarray]:
        state, seen = pipeline.init(recipe, gradients[0], 0.7), []
        for t, g in enumerate(gradients, start=1):
            plan = pipeline.plan(method.schedule(), t, np)._replace(fit=True)
            u, state = pipeline.step(recipe, plan, g, state)
            seen += [u, *state.factors.Q]
        return seen

    in_strips = walked()
    monkeypatch.setattr(structured, "MOST", 1)
    for x, y in zip(in_strips, walked(), strict=True):
        assert x == pytest.approx(y, rel=1e-12, abs=1e-12)
