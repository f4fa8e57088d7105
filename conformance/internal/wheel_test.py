"""The wheel: what it holds, that each backend works from it with its own framework alone, and what needs a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conformance.internal.measures import sources

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("psgd", "psgd_torch_backend", "psgd_jax_backend", "conformance")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what the wheel holds."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(installed: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program where the packages are those of the wheel, and no checkout can be imported."""
    path = "import sys, os; sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, 'benchmarks'))]"
    first = f"sys.path.insert(0, {str(installed)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", f"{path}\n{first}\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=installed, env=environment | {"COLUMNS": "80"})


def test_it_holds_the_packages_and_neither_tests_nor_what_is_for_maintainers(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names and f"{package}/py.typed" in names
    assert {"psgd_torch_backend/__init__.pyi", "psgd_jax_backend/__init__.pyi"} <= set(names)
    product = {str(path.relative_to(ROOT)) for path in sources(ROOT, "conformance")}
    product = {n for n in product if not n.startswith("conformance/internal/")}
    assert {n for n in names if n.startswith("conformance/") and n.endswith(".py")} == product
    assert not [n for n in names if "_test" in n or "conftest" in n or "internal" in n or n.endswith(".npz")]
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == set(PACKAGES)


@pytest.mark.parametrize(
    ("absent", "program"),
    [
        (("jax", "optax"), "import torch, psgd_torch_backend as b; b.Procrustes([torch.nn.Parameter(torch.ones(2))])"),
        (("torch",), "import jax.numpy as np, psgd_jax_backend as b; b.procrustes().init({'w': np.ones((2, 3))})"),
    ],
)
def test_a_backend_needs_its_own_framework_only(installed: Path, absent: tuple[str, ...], program: str):
    # None in sys.modules is what makes an import fail as if nothing were installed.
    hidden = f"sys.modules.update(dict.fromkeys({absent!r}))"
    origin = "import psgd; assert psgd.__file__.startswith(sys.path[0]), psgd.__file__"
    done = run(installed, f"{hidden}\n{program}\n{origin}")
    assert done.returncode == 0, done.stderr


COMMAND = "from conformance.cli import main; sys.argv = ['psgd', *{!r}]; main()"


def test_its_command_compares(installed: Path):
    arguments = ["compare", "--method", "kron", "--problem", "least-squares", "--steps", "2"]
    done = run(installed, COMMAND.format([*arguments, "--drivers", "torch,numpy"]))
    assert done.returncode == 0 and "torch – numpy" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["bench"], "the benchmarks are"),
        (["bench", "step", "--quick"], "the benchmarks are"),
        (["golden", "."], "recorded runs are"),
        (["contracts"], "the tests are"),
    ],
    ids=["bench", "bench step", "golden", "contracts"],
)
def test_what_needs_a_checkout_says_so_in_one_sentence(installed: Path, arguments: list[str], what: str):
    done = run(installed, COMMAND.format(arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"psgd: {arguments[0]} needs a checkout of the repository: {what} not part of the installed package; "
        "clone it and run `make venv` there\n"
    )
