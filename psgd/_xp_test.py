"""The precision of products is a matter of the context alone: of no other thread, and of none after it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework
from psgd._xp import PRECISIONS, cast, dtype_name, matmul, products

HALVED = [name for name, f in FRAMEWORKS.items() if "bfloat16" in f.dtypes]
# Sums of squares of these take more than the 8 bits of bfloat16.
A, B = (np.random.default_rng(seed).standard_normal((8, 8)) for seed in (0, 1))


def product(framework: Framework, dtype: str = "float32") -> np.ndarray:
    """A B, in the precision in force."""
    x = matmul(framework.array(A, dtype), framework.array(B, dtype))
    assert dtype_name(x.dtype) == dtype
    return framework.numpy(x)


@pytest.mark.parametrize("precision", [None, "float32", "tensorfloat32"])
def test_a_cpu_has_one_float32(framework: Framework, precision: str | None):
    wanted = framework.numpy(framework.array(A, "float32") @ framework.array(B, "float32"))
    with products(precision):
        assert np.array_equal(product(framework), wanted)
    assert wanted == pytest.approx(A @ B, rel=1e-5, abs=1e-5)


def bfloat16_product() -> np.ndarray:
    """What bfloat16 makes of A B: operands and result rounded to 8 bits, the sum exact."""
    torch = FRAMEWORKS["torch"]
    a, b = (torch.numpy(torch.array(x, "bfloat16")) for x in (A, B))
    return torch.numpy(torch.array(a @ b, "bfloat16"))


@pytest.mark.parametrize("name", HALVED)
def test_bfloat16_rounds_operands_and_result(name: str):
    framework = FRAMEWORKS[name]
    with products("bfloat16"):
        got = product(framework)
    assert np.array_equal(got, framework.numpy(framework.array(got, "bfloat16")))
    assert got == pytest.approx(bfloat16_product(), rel=2**-7)  # the sum may fall on the other side of a rounding
    assert np.abs(got - A @ B).max() > 1e-3


def test_bfloat16_is_refused_where_there_is_none():
    with products("bfloat16"), pytest.raises(ValueError, match=r"'bfloat16'.*numpy"):
        product(FRAMEWORKS["numpy"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_dtypes_are_multiplied_as_they_are(framework: Framework, precision: str | None):
    dtypes = [d for d in framework.dtypes if d != "float32"]
    wanted = [product(framework, dtype) for dtype in dtypes]
    with products(precision):
        for dtype, x in zip(dtypes, wanted, strict=True):
            assert np.array_equal(product(framework, dtype), x), dtype


def test_the_inner_precision_holds_and_the_outer_comes_back():
    torch = FRAMEWORKS["torch"]
    full = product(torch)
    with products("bfloat16"):
        half = product(torch)
        with products(None):
            assert np.array_equal(product(torch), full)
        assert np.array_equal(product(torch), half)
    assert np.array_equal(product(torch), full) and not np.array_equal(half, full)


def test_an_exception_leaves_no_precision_behind():
    torch = FRAMEWORKS["torch"]
    full = product(torch)
    with pytest.raises(RuntimeError, match="inside"), products("bfloat16"):
        raise RuntimeError("inside")
    assert np.array_equal(product(torch), full)


def test_threads_have_precisions_of_their_own():
    torch = FRAMEWORKS["torch"]
    full = product(torch)
    with ThreadPoolExecutor(1) as pool, products("bfloat16"):
        assert np.array_equal(pool.submit(product, torch).result(), full)
        assert not np.array_equal(product(torch), full)


def test_a_cast_to_its_own_dtype_is_the_array_itself(framework: Framework):
    x = framework.array(A, "float32")
    assert cast(x, x.dtype) is x
    other = framework.array(A, "float64").dtype
    assert cast(x, other).dtype == other
