"""Every contract has a test, and the table tells what became of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.cli import app
from conformance.internal import contracts
from conformance.internal.contracts import CONTRACTS, ROOT, Verdict, verdicts

FOLDERS = ("psgd", "psgd_torch_backend", "psgd_jax_backend", "conformance", "benchmarks", "examples", "docs")
MARK = re.compile(r'pytest\.mark\.contract\("(.*?)"\)')
TESTS = """
import pytest

@pytest.mark.contract("torch: hooks")
@pytest.mark.parametrize("x", [1, 2, 3])
def test_good(x):
    assert x

@pytest.mark.contract("torch: hooks")
@pytest.mark.contract("step: modes")
@pytest.mark.parametrize("x", [0, 1])
def test_half(x):
    assert x

@pytest.mark.contract("step: modes")
@pytest.mark.skip
def test_none():
    pass

def test_of_nothing():
    raise AssertionError
"""


def test_every_contract_has_a_test_and_every_mark_a_contract():
    tests = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*_test.py")} - {Path(__file__)}
    said = {name for path in tests for name in MARK.findall(path.read_text())}
    assert said == set(CONTRACTS)


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_outcomes_of_marked_tests_are_collected(tmp_path, workers):
    (tmp_path / "some_test.py").write_text(TESTS)
    file = tmp_path / "outcomes.json"
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", f"--contracts={file}", *workers, tmp_path]
    done = subprocess.run([*command, "--rootdir", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert "1 failed, 4 passed, 1 skipped" in done.stdout
    found = [(v.contract, v.test.rpartition("::")[2], v.word) for v in verdicts(json.loads(file.read_text()))]
    assert sorted(found) == [
        ("step: modes", "test_half", "failed (1 of 2)"),
        ("step: modes", "test_none", "skipped"),
        ("torch: hooks", "test_good", "passed (3)"),
        ("torch: hooks", "test_half", "failed (1 of 2)"),
    ]


GROUPED = """
import os
import pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("x", range(9))
def test_in_a_group(x):
    with open("FILE", "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def test_tests_of_a_group_run_in_one_worker(tmp_path):
    """Or each worker would make anew what they share."""
    seen = tmp_path / "workers"
    (tmp_path / "some_test.py").write_text(GROUPED.replace("FILE", str(seen)))
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run([*command, "-n", "2", "--dist", "loadgroup"], cwd=ROOT, capture_output=True, text=True)
    workers = seen.read_text().split()
    assert len(workers) == 9 and len(set(workers)) == 1, done.stdout


def test_a_mark_that_is_no_contract_is_refused(tmp_path):
    (tmp_path / "some_test.py").write_text(TESTS.replace("step: modes", "step: nothing"))
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "shows 'step: nothing', which is no contract" in done.stdout + done.stderr


@pytest.mark.parametrize("whose", ["jax", "state"])
@pytest.mark.parametrize(("failed", "lost", "code"), [(0, False, 0), (1, False, 1), (0, True, 1)])
def test_the_command_shows_a_table(monkeypatch, tmp_path, failed, lost, code, whose):
    """It ends with 1 where a test fails, or where a contract has none."""
    asked = [name for name in CONTRACTS if name.startswith(f"{whose}: ")]
    assert len(asked) > 1

    def run(names):
        assert names == asked
        return [Verdict(name, f"a/b_test.py::test_{i}", 2, 0, failed) for i, name in enumerate(names[lost:])]

    monkeypatch.setattr(contracts, "run", run)
    file = tmp_path / "contracts.json"
    result = CliRunner().invoke(app, ["contracts", "--whose", whose, "--json", str(file)])
    assert result.exit_code == code
    assert all(name in result.stdout for name in asked) and "b_test.py::test_0" in result.stdout
    assert ("no test" in result.stdout) == lost
    assert len(json.loads(file.read_text())) == len(asked) - lost


def test_contracts_of_nobody_are_refused():
    result = CliRunner().invoke(app, ["contracts", "--whose", "nobody"])
    assert result.exit_code == 2 and "group of contracts 'nobody'" in result.stderr
