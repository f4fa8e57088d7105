"""Steps that are compiled, and those that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from psgd_torch_backend import Affine, Kron, KronNewton, KronWhiten, Procrustes
from psgd_torch_backend._fused import LARGE, suited
from psgd_torch_backend._testing import close, equal, flat, give_gradients, parameters, run, step
from psgd_torch_backend.optimizer import PSGD

pytestmark = pytest.mark.contract("torch: compiler")

PROGRAM = """
import warnings
import torch
from psgd_torch_backend import Procrustes

def trained(compile):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((256, 128), (256, 128), (5,))]
    optimizer = Procrustes(params, compile=compile)
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
        optimizer.step()
    return params

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    ours = trained(True)
    whole = trained("full")
(told,) = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
assert told.startswith("compile=True: torch.compile does not work here, so steps are eager ("), told
eager = trained(False)
for params in (ours, whole):
    assert all(map(torch.allclose, params, eager))
"""


def test_without_a_compiler_steps_are_eager_after_one_warning(tmp_path: Path):
    away = {"CXX": str(tmp_path / "none"), "CC": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | away, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("made", [Kron, KronWhiten])
def test_a_step_may_be_handed_to_the_compiler(made: type):
    """It is not traced, and takes the same steps."""
    runs = []
    for compiled in (False, True):
        params = parameters((4, 3), (4, 3), (5,))
        optimizer = made(params)
        if compiled:
            optimizer.step = torch.compile(optimizer.step)
        runs.append(run(optimizer, params, range(4)))
    assert equal(*runs)


# Alike, of other shapes, of three axes, shorter than is compiled.
SHAPES = ((256, 130), (256, 130), (130, 256), (20, 30, 64), (5,))


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (Procrustes, {}),
        (Kron, {"momentum_into_precond_update": False, "weight_decay": 0.1}),
        (Affine, {"preconditioner_update_probability": 0.5, "maximize": True}),
        (KronWhiten, {"dQ": "EQ", "momentum": 0.9, "stack_batch_size": 1, "update_preconditioner_first": False}),
        (KronNewton, {"preconditioner_update_probability": 0.5}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_compiled_passes_walk_the_same_way(made: type[PSGD], options: dict):
    runs = []
    for compiled in (False, True):
        params = parameters(*SHAPES, dtype=torch.float64)
        optimizer = made(params, lr=0.01, compile=compiled, **options)
        for t in range(5):
            give_gradients(params, t)
            step(optimizer)
        runs.append([*params, *(x for p in params for x in flat(optimizer.state[p]).values())])
    close(*runs, ulps=64)


def test_compiled_passes_serve_all_shapes():
    """Nothing is compiled after a step with a fit and one without, whatever shapes, rates and momenta come."""
    first, later = parameters((256, 130), (5,)), parameters((128, 270), (128, 270), (20, 30, 64), (7,))
    optimizer = KronWhiten(first, momentum=0.9, preconditioner_update_probability=0.5, compile=True)
    run(optimizer, first, range(4))
    optimizer.add_param_group({"params": later})
    with torch.compiler.set_stance("fail_on_recompile"):
        for t in range(4, 10):
            optimizer.param_groups[0].update(lr=0.01 / t, weight_decay=0.1 * t)
            run(optimizer, [*first, *later], range(t, t + 1))


def test_what_is_short_or_oddly_laid_out_or_waits_for_others_is_stepped_eagerly():
    recipe = Kron.method().recipe()
    trusted = replace(recipe, has_max_norm=True)
    full = torch.zeros(LARGE // 64, 64)
    assert suited(recipe, [full, None]) and not suited(trusted, [full])
    for x in (full[1:], full.mT, full.to(torch.complex64), full.to("meta")):
        assert not suited(recipe, [full, x])
