"""`psgd bench`: what is loaded when, and what is said where a package is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conformance._testing import psgd
from conformance.cli import bench


def test_benchmarks_are_listed_and_loaded_when_they_are_asked_for():
    code = "import sys, conformance.cli; sys.exit(any(m.split('.')[0] == 'benchmarks' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
    listed = psgd("bench", "--help")
    assert listed.exit_code == 0 and all(f"{name} " in listed.output for name in bench.BENCHMARKS), listed.output
    for name in bench.BENCHMARKS:
        assert "--quick" in psgd("bench", name, "--help").output
    assert psgd("bench", "nothing").exit_code == 2 and psgd("bench").exit_code == 2
    assert "did you mean 'step'?" in psgd("bench", "setp").stderr


@pytest.mark.parametrize("name", bench.BENCHMARKS)
@pytest.mark.parametrize("package", ["torch", "jax"])
def test_a_benchmark_without_a_framework_is_one_sentence(name, package):
    """In a process of its own, where the framework cannot be imported at all."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from conformance import cli; sys.argv = ['psgd', 'bench', {name!r}, '--quick']; cli.main()"
    )
    if name == "train" and package == "jax":
        pytest.skip("it is a PyTorch program")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"psgd: {package} is not installed; pip install {package}, or in a checkout: ")
    assert done.stderr.count("\n") == 1


def test_asking_what_a_benchmark_does_loads_no_framework():
    asked = [["bench", name, "--help"] for name in bench.BENCHMARKS if name != "train"]  # which is a PyTorch program
    heavy = {"torch", "jax", "matplotlib", "sklearn"}
    code = (
        "import sys; from typer.testing import CliRunner; from conformance import cli\n"
        f"[CliRunner().invoke(cli.app, a) for a in {asked}]; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
