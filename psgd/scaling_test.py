"""Bounds on directions and steps, and the first scale."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS, Framework
from psgd._testing import normals
from psgd._xp import dtype_name
from psgd.geometry import GEOMETRIES
from psgd.kron import Kronecker
from psgd.scaling import Clip, InitialScale, max_norm_factor

QUAD = Kronecker(GEOMETRIES["QUAD"])
SPIKE = "the Gram product of one step overflows to inf, and 0 * inf in the move makes every factor NaN"


# ---- clipping and scales ------------------------------------------------------------------
def test_clip_by_rms(framework: Framework):
    for scale, shrunk in ((0.5, False), (30.0, True)):
        u = scale * normals(4, 5)
        got = framework.numpy(Clip(rms=1.1)(framework.array(u, "float64")))
        factor = 1.1 / np.sqrt(np.mean(u**2)) if shrunk else 1.0
        assert got == pytest.approx(factor * u, rel=1e-14)
    assert not framework.numpy(Clip(rms=1.1)(framework.array(np.zeros(3), "float64"))).any()


def test_clip_by_entry(framework: Framework):
    got = framework.numpy(Clip(entry=2.0)(framework.array(np.array([-5.0, 1.0, 2.0, 7.0]), "float64")))
    assert got.tolist() == [-2, 1, 2, 2]


def test_clip_of_complex_entries_keeps_their_phase(framework: Framework):
    u = np.array([30 + 40j, 0.3j, -8.0])
    got = framework.numpy(Clip(entry=5.0)(framework.array(u, "complex128")))
    assert got == pytest.approx(np.array([3 + 4j, 0.3j, -5.0]), rel=1e-14)
    got = framework.numpy(Clip(rms=2.0)(framework.array(u, "complex128")))
    assert got == pytest.approx(u * 2 / np.sqrt(np.mean(np.abs(u) ** 2)), rel=1e-14)


def test_clip_goes_by_rms_first_then_by_entry(framework: Framework):
    u = np.array([100.0, 0, 0, 0])  # rms 50 -> 2, largest 4
    assert framework.numpy(Clip(2.0, 3.0)(framework.array(u, "float64"))).tolist() == [3, 0, 0, 0]


def test_no_limits_no_change():
    u = normals(3)
    assert Clip()(u) is u


def test_clip_keeps_a_direction_whose_square_overflows():
    u = FRAMEWORKS["torch"].array(np.array([1e30, -1e30]), "float32")
    assert Clip(rms=2.0)(u).tolist() == pytest.approx([2, -2])


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(("rule", "root"), [(InitialScale(4), -1 / 8), (InitialScale(2), -1 / 4)])
def test_initial_scale(framework: Framework, rule: InitialScale, root: float, damping: float):
    gs = [normals(5), 3 * normals(2, 3, seed=1), normals()]
    wanted = (max(np.mean(np.abs(g) ** rule.power) for g in gs) + damping**rule.power) ** root
    sizes = [rule.size(framework.array(g, "float64")) for g in gs]
    scales, seen = rule(sizes, damping)
    assert seen and [float(s) for s in scales] == pytest.approx([wanted] * 3, rel=1e-14)
    z = normals(5) + 1j * normals(5, seed=1)
    assert float(rule.size(framework.array(z, "complex128"))) == pytest.approx(
        np.mean(np.abs(z) ** rule.power) ** (1 / rule.power)
    )


def test_initial_scale_at_the_edges(framework: Framework):
    for g in (1e-28, 1e-20, 1.0, 1e30, 8e37):  # XLA flushes denormals, of g and of 1 / g, to zero
        for rule in (InitialScale(4), InitialScale(2)):
            size = rule.size(framework.array(np.full((2, 2), g), "float32"))
            (scale,), seen = rule([size], 0.0)
            assert seen and float(scale) == pytest.approx(g**-0.5, rel=1e-5, abs=0)


def test_what_teaches_nothing_decides_nothing(framework: Framework):
    """Not even where the damping would give a scale: it waits."""
    for g in (0.0, 1e-40, 1e-30):
        size = InitialScale().size(framework.array(np.full(3, g), "float32"))
        for damping, shared in product((0.0, 1e-9), (True, False)):
            scales, seen = InitialScale(shared=shared)([size] * 2, damping)
            assert not seen and list(map(float, scales)) == [1, 1]


def test_initial_scale_of_several_dtypes_is_the_widest():
    torch = FRAMEWORKS["torch"]
    sizes = [InitialScale().size(torch.array(np.ones(2), dtype)) for dtype in ("bfloat16", "float64", "float32")]
    assert {str(s.dtype) for s in InitialScale()(sizes, 0.0)[0]} == {"torch.float64"}


def test_a_scale_of_its_own_for_each_tensor(framework: Framework):
    rule = InitialScale(2, shared=False)
    sizes = [rule.size(framework.array(np.full(3, g), "float32")) for g in (4.0, 0.25, 0.0)]
    assert [float(s) for s in rule(sizes, 0.0)[0]] == [0.5, 2, 0.5]  # what says nothing begins as the largest does


def test_sizes_of_several_tensors_may_come_in_one_array(framework: Framework):
    sizes = [framework.array(np.array([1.0, 16.0]), "float64"), framework.array(np.array(4.0), "float64")]
    assert [framework.numpy(s).tolist() for s in InitialScale(2)(sizes, 0.0)[0]] == [0.25, 0.25]
    assert [framework.numpy(s).tolist() for s in InitialScale(2, shared=False)(sizes, 0.0)[0]] == [[1, 0.25], 0.5]


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("shared", [True, False])
def test_initial_scale_of_newton_pairs(framework: Framework, damping: float, shared: bool):
    """s = (mean v^2)^(1/4) (mean h^4 + lam^4)^(-1/8)."""
    rule, hs, vs = InitialScale(shared=shared), [normals(5), 3 * normals(2, 3, seed=1)], [2 * normals(5), normals(2, 3)]
    sizes = [rule.size(framework.array(h, "float64")) for h in hs]
    got = list(map(float, rule(sizes, damping, [framework.array(v, "float64") for v in vs])[0]))
    squares = [np.mean(np.concatenate([v.ravel() for v in vs]) ** 2)] * 2 if shared else [np.mean(v**2) for v in vs]
    fourths = [np.mean(h**4) for h in hs]
    fourths = [max(fourths)] * 2 if shared else fourths
    wanted = [s**0.25 * (f + damping**4) ** -0.125 for s, f in zip(squares, fourths, strict=True)]
    assert got == pytest.approx(wanted, rel=1e-13)


# ---- the length of a whole step -----------------------------------------------------------
@pytest.mark.parametrize("limit", [1e-3, 2.0, 5.0, 1e3])
def test_max_norm(framework: Framework, limit: float):
    us = [normals(3, 4), normals(5) + 1j * normals(5, seed=1), 2 * normals(seed=2)]
    length = np.sqrt(sum(np.sum(np.abs(u) ** 2) for u in us))
    own = [framework.array(u, "complex128" if np.iscomplexobj(u) else "float64") for u in us]
    factor = max_norm_factor(limit, own)
    assert factor.shape == () and float(factor) == pytest.approx(min(1, limit / length), rel=1e-14)
    assert 2 < length < 5


def test_max_norm_at_the_edges(framework: Framework):
    def factor(limit: float, *values: float) -> float:
        return float(max_norm_factor(limit, [framework.array(np.full((2, 2), v), "float32") for v in values]))

    assert factor(1.0, 0.0) == factor(1e-30, 0.0, 0.0) == 1
    assert factor(1.0, 1e-30) == 1
    assert factor(1e-30, 1e-30) == pytest.approx(0.5, rel=1e-6)
    assert factor(1.0, 1e30) == pytest.approx(0.5e-30, rel=1e-6, abs=0)
    assert factor(1e30, 1e30, 0.0) == pytest.approx(0.5, rel=1e-6)
    assert factor(1e30, 1e30, 1e30, 1e30, 1e30) == pytest.approx(0.25, rel=1e-6)
    assert factor(1.0, 1e-30, 1e30) == pytest.approx(0.5e-30, rel=1e-6, abs=0)


def test_max_norm_of_several_dtypes_is_in_the_widest():
    torch = FRAMEWORKS["torch"]
    us = [torch.array(np.full(4, 3.0), dtype) for dtype in ("bfloat16", "float64", "float32", "float16")]
    factor = max_norm_factor(6.0, us)
    assert dtype_name(factor.dtype) == "float64" and float(factor) == pytest.approx(0.5)
