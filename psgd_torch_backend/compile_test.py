"""Steps that are compiled, and those that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psgd_torch_backend import Kron, KronWhiten
from psgd_torch_backend.optimizer_test import equal, parameters, run

pytestmark = pytest.mark.contract("torch: compiler")

PROGRAM = """
import warnings
import torch
from psgd_torch_backend import Procrustes

def trained(compile):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (4, 3), (5,))]
    optimizer = Procrustes(params, compile=compile)
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
        optimizer.step()
    return params

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    ours = trained(True)
(told,) = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
assert told.startswith("compile=True: torch.compile does not work here, so steps are eager ("), told
assert all(map(torch.equal, ours, trained(False)))
"""


def test_without_a_compiler_steps_are_eager_after_one_warning(tmp_path: Path):
    away = {"CXX": str(tmp_path / "none"), "CC": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | away, capture_output=True, text=True, timeout=300
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
