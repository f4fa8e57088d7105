"""Arrays without elements: shapes and dtypes as real arrays have them, arithmetic counted by formula."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch

from psgd import pipeline
from psgd._xp import dtype_name
from psgd.cost import BYTES, NoDraws, ShapeNamespace, ShapeTracer
from psgd.geometry import GEOMETRIES
from psgd.methods import METHODS
from psgd.noise import Counter
from psgd.recipe import Plan, Recipe, State
from psgd.scaling import Clip
from psgd.schedule import Averaging

SHAPES = [(), (1,), (1, 1), (0,), (0, 3), (5,), (4, 6), (3, 3), (2, 3, 4), (1, 4, 1, 3), (2, 3, 2, 2)]
DTYPES = ["float32", "bfloat16", "complex64"]
CASES = [
    *((name, {}) for name in METHODS),
    *(("kron_whiten", {"dQ": name, "momentum": 0.9}) for name in GEOMETRIES),
    *(("kron_whiten", {"dQ": name, "preconditioner_max_skew": inf}) for name in GEOMETRIES),  # vectors are dense too
    *((name, {"step_normalizer_order": "1st"}) for name in ("affine", "xmat", "low_rank_approximation")),
    *((name, {"rank_of_approximation": 0}) for name in ("lra_whiten", "lra_newton")),
    ("kron", {"mu_dtype": "bfloat16", "precond_dtype": "bfloat16"}),
    ("procrustes", {"dtype": "float64"}),
]
IDS = ["-".join([name, *map(str, given.values())]) for name, given in CASES]


def outline(*shape: int, dtype: str = "float32") -> ShapeTracer:
    return ShapeTracer(shape, dtype, ShapeNamespace())


def kept(state: State) -> list:
    return [*(() if state.momentum is None else (state.momentum,)), *state.factors.Q, *state.factors.L]


def seen(recipe: Recipe, g, key, draws=None) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of all that `init` and `step` give."""
    plan = Plan(True, True, True, Averaging(0.5), rate=0.1, beta_lipschitz=0.5, damping=0.1, key=key)
    state = pipeline.init(recipe, g, None, Counter(key) if draws is None else draws)
    u, new = pipeline.step(recipe, plan, g, state, draws, pair=(g, g) if recipe.newton else None)
    return [(tuple(x.shape), dtype_name(x.dtype)) for x in (*kept(state), u, *kept(new))]


@pytest.mark.parametrize(("name", "hyperparameters"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_init_and_step_give_the_shapes_and_dtypes_of_torch(name, hyperparameters, dtype):
    method = METHODS[name].of(**hyperparameters)
    if dtype.startswith("complex") and not method.complex_parameters:
        pytest.skip("takes real parameters only")
    recipe, key = method.recipe(), torch.ones(1, dtype=torch.int32)
    for shape in [(20,), (21,)] if recipe.joint else SHAPES:
        real = seen(recipe, torch.zeros(shape, dtype=getattr(torch, dtype)), key)
        assert seen(recipe, outline(*shape, dtype=dtype), None, NoDraws()) == real, shape


# ---- shapes, as NumPy has them ---------------------------------------------------------------
@pytest.mark.parametrize(
    "made",
    [
        lambda x, xp: x[None],
        lambda x, xp: x[:, 0],
        lambda x, xp: x[..., None],
        lambda x, xp: x[0, ..., ::3],
        lambda x, xp: x.mT,
        lambda x, xp: -x,
        lambda x, xp: 2 * x + x[0] ** 2,
        lambda x, xp: x[:, :1] < x,
        lambda x, xp: xp.where(x > 0, x, 0 * x[:1]),
        lambda x, xp: xp.clip(xp.abs(x), min=1.0),
        lambda x, xp: xp.reshape(x, (-1, 5)),
        lambda x, xp: xp.permute_dims(x, (2, 0, 1)),
        lambda x, xp: xp.take(x, xp.reshape(xp.argmax(x[0, 0]), (1,)), axis=1),
        lambda x, xp: xp.stack([x, x], axis=-1),
        lambda x, xp: xp.stack([x, x]),
        lambda x, xp: xp.triu(x),
        lambda x, xp: xp.sum(x),
        lambda x, xp: xp.max(x, axis=-1),
        lambda x, xp: xp.sum(x, axis=(0, -1)),
        lambda x, xp: xp.mean(x, axis=(), keepdims=True),
        lambda x, xp: xp.linalg.vector_norm(x, axis=1, keepdims=True),
        lambda x, xp: xp.zeros_like(x),
        lambda x, xp: x @ x.mT,
        lambda x, xp: x @ x[0].mT,
        lambda x, xp: x @ x[0, 0],
        lambda x, xp: x[0, :, 0] @ x,
        lambda x, xp: x[0, 0] @ x[0, 0],
    ],
)
def test_shapes_are_those_of_numpy(made):
    shape = (2, 3, 5)
    real = np.zeros(shape, np.float32)
    assert made(outline(*shape), ShapeNamespace()).shape == made(real, np).shape


def test_a_wider_dtype_wins():
    xp = ShapeNamespace()
    order = ["bfloat16", "float32", "float64"]
    for i, low in enumerate(order):
        for high in order[i:]:
            a, b = ShapeTracer((2, 2), low, xp), ShapeTracer((2, 2), high, xp)
            assert {(a * b).dtype, (b - a).dtype, (a @ b).dtype, xp.stack([a, b]).dtype} == {high}
            assert (a * 2.0).dtype == low


@pytest.mark.parametrize("dtype", sorted(BYTES))
def test_bytes_are_those_of_torch(dtype):
    x = outline(3, 5, dtype=dtype)
    assert x.nbytes == torch.empty(3, 5, dtype=getattr(torch, dtype)).nbytes


# ---- what a step must not do -----------------------------------------------------------------
@pytest.mark.parametrize("decide", [bool, float, int, lambda x: 1 if x > 0 else 0, lambda x: x is None or not x])
def test_nothing_can_depend_on_a_value(decide):
    with pytest.raises(TypeError):
        decide(outline())


def test_a_recipe_that_branches_on_values_is_refused():
    class Limited(Clip):
        def __call__(self, u, gain=1.0, unit=None):
            return u / 2 if u.xp.max(u) > 1 else u

    recipe = Recipe(preconditioner=METHODS["quad"].of().recipe().preconditioner, clip=Limited(rms=1.0))
    with pytest.raises(TypeError, match="branches on the value"):
        seen(recipe, outline(3, 3), None, NoDraws())


def test_what_the_core_does_not_ask_for_is_not_there():
    with pytest.raises(AttributeError, match="fft"):
        _ = ShapeNamespace().fft


# ---- counts --------------------------------------------------------------------------------------
def counted(work, *shapes: tuple[int, ...], dtype: str = "float32") -> int:
    xp = ShapeNamespace()
    work(xp, *(ShapeTracer(shape, dtype, xp) for shape in shapes))
    return xp.flops


@pytest.mark.parametrize(
    ("a", "b", "flops"),
    [
        ((3, 5), (5, 7), 2 * 3 * 5 * 7),
        ((2, 3, 5), (5, 7), 2 * 2 * 3 * 5 * 7),
        ((4, 1, 3, 5), (2, 5, 7), 2 * 8 * 3 * 5 * 7),
        ((3, 0), (0, 7), 0),
        ((5,), (5, 7), 2 * 5 * 7),
        ((3, 5), (5,), 2 * 3 * 5),
        ((5,), (5,), 2 * 5),
    ],
)
def test_a_product_is_two_operations_for_each_pair(a, b, flops):
    assert counted(lambda xp, x, y: x @ y, a, b) == flops


def test_products_of_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot multiply"):
        _ = outline(3, 5) @ outline(3, 5)


def test_a_triangular_solve():
    assert counted(lambda xp, q, b: xp.linalg.solve(q, b), (6, 6), (6, 4)) == 6 * 6 * 4


@pytest.mark.parametrize(
    ("work", "flops"),
    [
        (lambda xp, x: x + 1, 15),
        (lambda xp, x: x[:1] * x, 15),
        (lambda xp, x: xp.exp(-x), 30),
        (lambda xp, x: xp.sum(x, axis=0), 15),
        (lambda xp, x: xp.linalg.vector_norm(x), 15),
        (lambda xp, x: xp.reshape(xp.permute_dims(x, (1, 0)), (15,))[::2], 0),
        (lambda xp, x: xp.triu(xp.astype(xp.zeros_like(x), xp.float64)), 0),
        (lambda xp, x: xp.arange(5, dtype=xp.int32) * 3, 0),
    ],
)
def test_every_element_is_one_operation(work, flops):
    assert counted(work, (3, 5)) == flops


def test_complex_elements_count_for_four():
    assert counted(lambda xp, x: x * x, (3, 5), dtype="complex64") == 4 * counted(lambda xp, x: x * x, (3, 5))


def test_noise_is_free():
    like = outline(2, 3, dtype="bfloat16")
    e = NoDraws().normal("damping", (4, 5), like)
    assert (e.shape, e.dtype, like.xp.flops) == ((4, 5), "bfloat16", 0)
