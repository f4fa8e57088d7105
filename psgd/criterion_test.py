"""Damping rules to the last bit, and which pair each criterion makes."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.frameworks import Framework
from psgd.criterion import newton, proportional, relative, undamped, whitening

X = np.array([4.0, -2.0, 0.0, 1e6])
E = np.array([1.0, 3.0, -2.0, -1.0])


def damped(framework: Framework, rule, amount: float, dtype: str = "float64", x=X, e=E) -> np.ndarray:
    result = rule(framework.array(x, dtype), framework.array(e, dtype), amount)
    assert dtype in str(result.dtype)
    return framework.numpy(result)


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 2.0**-23), ("float64", 2.0**-52)])
def test_relative_damping_is_one_rounding_of_each_entry(framework: Framework, dtype: str, eps: float):
    # An entry of 2^k moves by its own unit in the last place for each unit of noise: exactly representable.
    x, e = np.array([4.0, -2.0, 2.0**20, 0.0]), np.array([1.0, 3.0, -1.0, 1.0])
    assert damped(framework, relative, 0.0, dtype, x, e).tolist() == [
        4 + 4 * eps,
        -2 + 6 * eps,
        2.0**20 - 2.0**20 * eps,
        0.0,
    ]


def test_relative_damping_adds_its_amount(framework: Framework):
    assert damped(framework, relative, 0.5) == pytest.approx(X + 0.5 * E, rel=1e-14)


def test_relative_damping_of_complex_entries_goes_by_modulus(framework: Framework):
    x, e = np.array([3 + 4j, -8j]), np.array([1j, 1 + 0j])
    got = damped(framework, relative, 0.0, "complex128", x, e)
    assert got.tolist() == [3 + (4 + 5 * 2.0**-52) * 1j, 8 * 2.0**-52 - 8j]


def test_proportional_damping(framework: Framework):
    assert damped(framework, proportional, 0.5) == pytest.approx(X + 0.5 * np.abs(X).mean() * E, rel=1e-14)
    z = np.array([3 + 4j, 0j])
    assert damped(framework, proportional, 1.0, "complex128", z, z) == pytest.approx(z + 2.5 * z)


@pytest.mark.parametrize("probed", [True, False])
def test_whitening_takes_its_noise_as_the_probe_only_where_it_must(probed: bool):
    pair = whitening(probed, X, E, 0.1, proportional)
    assert np.array_equal(pair.h, proportional(X, E, 0.1))
    assert pair.v is (E if probed else None)
    assert np.array_equal(whitening(probed, X, E, 0.1).h, relative(X, E, 0.1))


def test_undamped_is_the_tensor_itself():
    assert undamped(X, E, 0.1) is X
    pair = whitening(True, X, E, 0.1, undamped)
    assert pair.h is X and pair.v is E


def test_newton_keeps_the_probe_and_damps_the_product():
    v = np.ones(4)
    pair = newton(v, X, E, 0.1)
    assert pair.v is v and np.array_equal(pair.h, relative(X, E, 0.1))


def test_the_amount_may_be_an_array_of_higher_precision():
    x = X.astype(np.float32)
    assert whitening(False, x, x, np.asarray(1e-3)).h.dtype == np.float32
