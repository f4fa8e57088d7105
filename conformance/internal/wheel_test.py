"""The wheel: what it holds, and that each backend works from it with its own framework alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("psgd", "psgd_torch_backend", "psgd_jax_backend", "conformance", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_it_holds_the_packages_and_no_tests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names and f"{package}/py.typed" in names
    assert "psgd_torch_backend/__init__.pyi" in names
    assert not [n for n in names if "_test" in n or "conftest" in n or "golden/" in n or n.endswith(".npz")]
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == set(PACKAGES)


@pytest.mark.parametrize(
    ("absent", "program"),
    [
        (("jax", "optax"), "import torch, psgd_torch_backend as b; b.Procrustes([torch.nn.Parameter(torch.ones(2))])"),
        (("torch",), "import jax.numpy as np, psgd_jax_backend as b; b.procrustes().init({'w': np.ones((2, 3))})"),
    ],
)
def test_a_backend_needs_its_own_framework_only(wheel: Path, tmp_path: Path, absent: tuple[str, ...], program: str):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # None in sys.modules is what makes an import fail as if nothing were installed.
    hidden = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); sys.path.insert(0, {str(tmp_path)!r})"
    seen = "import psgd; assert psgd.__file__.startswith(sys.path[0]), psgd.__file__"
    command = [sys.executable, "-P", "-c", f"{hidden}\n{program}\n{seen}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
