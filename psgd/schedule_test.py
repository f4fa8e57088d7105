"""Schedules of Python numbers and of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psgd.schedule import inverse_root, periodic


def test_periodic():
    due = periodic(100)
    assert [t for t in range(1, 301) if due(t, None)] == [100, 200, 300]
    assert jax.jit(lambda t: due(t, None))(jnp.arange(1, 301)).nonzero()[0].tolist() == [99, 199, 299]


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.7), (10_000, 0.7 / 2**0.5), (40_000, 0.7 / 5**0.5), (50_000, 0.3), (10**6, 0.3)]
)
def test_inverse_root(step: int, rate: float):
    assert float(inverse_root(np, 0.7, step, 10_000, 0.3)) == pytest.approx(rate, rel=1e-15)
    assert float(inverse_root(jnp, 0.7, jnp.int32(step), 10_000, 0.3)) == pytest.approx(rate, rel=1e-6)


def test_the_floor_wins_over_the_peak():
    assert float(inverse_root(np, 0.1, 1, 10_000, 0.3)) == 0.3
