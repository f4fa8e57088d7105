"""The command: exit codes, JSON, complaints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from math import inf
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from conformance import cli, terminal, tolerances
from conformance.compare import KINDS
from conformance.report_test import comparison
from psgd.methods import METHODS

METHOD = next(iter(METHODS))
RECORDED = Path(__file__).parent / "golden"
QUICK = ["compare", "--method", METHOD, "--problem", "least-squares", "--steps", "2", "--drivers", "torch,numpy"]


def psgd(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# ---- the command as such -----------------------------------------------------------------
def test_help_loads_no_framework():
    heavy = {"torch", "jax", "matplotlib", "sklearn"}
    code = f"import sys, conformance.cli; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "conformance", "methods"], capture_output=True, text=True, check=True)
    for name, method in METHODS.items():
        assert any(line.split()[:1] == [name] and method.title in line for line in done.stdout.splitlines())
    words = done.stdout.split()
    assert all(words.count(word) > 0 for m in METHODS.values() for word in f"{m.summary} {m.source}".split())


def test_json_has_neither_infinity_nor_nan(tmp_path):
    terminal.write_json(tmp_path / "x.json", {"a": [float("nan"), float("inf"), 1.5], "b": None, "c": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5], "b": None, "c": 1}


# ---- benchmarks --------------------------------------------------------------------------
def test_benchmarks_are_listed_and_loaded_when_they_are_asked_for():
    code = "import sys, conformance.cli; sys.exit(any(m.split('.')[0] == 'benchmarks' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
    listed = psgd("bench", "--help")
    assert listed.exit_code == 0 and all(f"{name} " in listed.output for name in cli.BENCHMARKS), listed.output
    for name in cli.BENCHMARKS:
        assert "--quick" in psgd("bench", name, "--help").output
    assert psgd("bench", "nothing").exit_code == 2 and psgd("bench").exit_code == 2


def test_asking_what_a_benchmark_does_loads_no_framework():
    asked = [["bench", name, "--help"] for name in cli.BENCHMARKS if name != "train"]  # which is a PyTorch program
    heavy = {"torch", "jax", "matplotlib", "sklearn"}
    code = (
        "import sys; from typer.testing import CliRunner; from conformance import cli\n"
        f"[CliRunner().invoke(cli.app, a) for a in {asked}]; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- compare -----------------------------------------------------------------------------
@pytest.mark.parametrize("locked", [False, True])
def test_compare_passes_and_writes_its_json(tmp_path, locked):
    file = tmp_path / "out.json"
    result = psgd(*QUICK, "--json", file, *(["--locked"] if locked else []))
    assert result.exit_code == 0, result.output
    out = json.loads(file.read_text())
    assert list(out) == ["method", "problem", "steps", "dtype", "seed", "mode", "pairs"]
    assert [out["method"], out["steps"], out["mode"]] == [METHOD, 2, "locked" if locked else "free"]
    (pair,) = out["pairs"]
    assert list(pair) == ["a", "b", "max_rel_diff", "bound", "first_step_over", "verdict"]
    assert tuple(pair["max_rel_diff"]) == KINDS
    assert [pair["a"], pair["b"], pair["first_step_over"], pair["verdict"]] == ["torch", "numpy", None, "pass"]


def test_compare_fails_with_the_step_and_the_leaf(tmp_path, monkeypatch):
    monkeypatch.setitem(tolerances.LOCKED, "float64", tolerances.Bound(-1.0, "nothing is good enough"))
    result = psgd(*QUICK, "--locked", "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "FAIL" in result.output and "first at step 1" in result.output and "furthest of" in result.output
    (pair,) = json.loads((tmp_path / "out.json").read_text())["pairs"]
    assert pair["verdict"] == "fail" and pair["first_step_over"] == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--method", "nope"], "method 'nope'"),
        (["--problem", "nope"], "problem 'nope'"),
        (["--dtype", "int8"], "dtype 'int8'"),
        (["--drivers", "torch,nope"], "driver 'nope'"),
        (["--drivers", "torch"], "two drivers"),
        (["--drivers", "numpy,strict"], "differentiates"),
        (["--json", "no/such/folder.json"], "no/such"),
    ],
)
def test_what_compare_does_not_understand_is_one_sentence(arguments, word):
    result = psgd(*QUICK, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("psgd: ") and word in result.stderr and result.stderr.count("\n") == 1


def test_steps_must_be_positive():
    assert psgd(*QUICK, "--steps", "0").exit_code == 2


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_api_strict", None)
    result = psgd(*QUICK, "--drivers", "torch,strict")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "psgd: array_api_strict is not installed; pip install 'psgd[test]'"


def test_drivers_default_to_those_that_are_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_api_strict", None)
    assert cli.chosen(None) == [name for name in cli.DRIVERS if name != "strict"]


# ---- hyperparameters ------------------------------------------------------------------------
def test_values_are_literals_or_else_strings():
    given = ["lr=0.5", "seed=7", "momentum=5e-1", "preconditioner_max_size=inf", "whiten_grad=False", "dQ=QUAD"]
    given += ["grad_clip_max_amps=(1, 2)", "preconditioner_init_scale=None", "lr=0.25"]
    expected = {"lr": 0.25, "seed": 7, "momentum": 0.5, "preconditioner_max_size": inf, "whiten_grad": False}
    expected |= {"dQ": "QUAD", "grad_clip_max_amps": (1, 2), "preconditioner_init_scale": None}
    assert cli.settings("kron_whiten", given) == expected
    assert cli.settings("kron_whiten", ["dQ='QUAD'"]) == {"dQ": "QUAD"}
    assert cli.settings("kron_whiten", []) == {}


@pytest.mark.parametrize("text", ["lr=0.125", "seed=3", "dtype=float32"])
def test_settings_reach_the_drivers(monkeypatch, text):
    """Also those that have the name of an option of the command."""
    seen, begin = [], cli.DRIVERS["numpy"].begin
    monkeypatch.setattr(
        cli.DRIVERS["numpy"], "begin", lambda run, params: (seen.append(run.method), begin(run, params))
    )
    result = psgd(*QUICK, "--dtype", "float32", "--method", "quad", "--set", text, "--set", "weight_decay=0.5")
    assert result.exit_code == 0, result.output
    name = text.partition("=")[0]
    expected = METHODS["quad"].of(**cli.settings("quad", [text]))
    assert [(getattr(m, name), m.weight_decay) for m in seen] == [(getattr(expected, name), 0.5)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("lr", "NAME=VALUE"),
        ("nope=1", "'nope'"),
        ("=1", "''"),
        ("lr=fast", "lr='fast'"),
        ("lr=-1", "lr=-1"),
        ("lr={[]: 1}", "lr="),
        ("lr=(((", "lr="),
    ],
)
def test_a_setting_that_is_none_is_one_sentence(text, word):
    result = psgd(*QUICK, "--set", text)
    assert result.exit_code == 2, repr(result.exception)
    assert result.stderr.startswith("psgd: ") and word in result.stderr and result.stderr.count("\n") == 1


# ---- golden ------------------------------------------------------------------------------
def folder_of(tmp_path: Path, *more: dict, **changed: object) -> Path:
    """A folder of one recorded case, changed as told, and of more that differ from it."""
    if not (RECORDED / "index.json").is_file():
        pytest.skip("the recorded runs are not in this copy")
    index = json.loads((RECORDED / "index.json").read_text())
    case = next(c for c in index["cases"] if cli.recorded.supported(c))
    shutil.copy(RECORDED / case["file"], tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index | {"cases": [case | changed, *(case | m for m in more)]}))
    return tmp_path


def the_file(folder: Path) -> Path:
    return next(folder.glob("*.npz"))


def test_golden_passes(tmp_path):
    file = tmp_path / "out.json"
    result = psgd("golden", folder_of(tmp_path), "--json", file)
    assert result.exit_code == 0, result.output
    assert "numpy: 1 passed, 0 failed" in result.output
    out = json.loads(file.read_text())
    assert [(d["driver"], d["passed"], d["failed"]) for d in out["drivers"]] == [("numpy", 1, 0)]
    assert out["drivers"][0]["cases"][0]["verdict"] == "pass"


def test_golden_with_several_drivers(tmp_path):
    result = psgd("golden", folder_of(tmp_path), "--driver", "numpy", "--driver", "torch")
    assert result.exit_code == 0, result.output
    assert "torch: 1 passed, 0 failed" in result.output


def test_golden_fails_on_a_changed_number(tmp_path):
    folder = folder_of(tmp_path)
    with np.load(the_file(folder)) as data:
        arrays = dict(data)
    name = next(n for n in reversed(arrays) if n.split("/")[0] in ("Q", "out", "param") and arrays[n].size)
    np.savez(the_file(folder), **arrays | {name: arrays[name] * 1.5 + 1})
    result = psgd("golden", folder)
    assert result.exit_code == 1
    assert "0 passed, 1 failed" in result.output and "is off by" in result.output and name in result.output


def test_golden_counts_an_exception_as_a_failure(tmp_path):
    folder = folder_of(tmp_path)
    the_file(folder).unlink()
    result = psgd("golden", folder, "--json", folder / "out.json")
    assert result.exit_code == 1
    assert "FileNotFoundError" in result.output
    assert json.loads((folder / "out.json").read_text())["drivers"][0]["cases"][0]["error"] is None


def test_golden_names_what_is_not_yet_supported(tmp_path):
    folder = folder_of(tmp_path, {"family": "to_come"}, {"family": "primitive", "function": "later"})
    result = psgd("golden", folder)
    assert result.exit_code == 0, result.output
    assert "1 passed, 0 failed" in result.output
    assert "not yet supported families: to_come (1)" in result.output
    assert "not yet supported functions: later (1)" in result.output


def test_golden_of_one_family(tmp_path):
    result = psgd("golden", folder_of(tmp_path, {"family": "to_come"}), "--family", "to_come")
    assert result.exit_code == 0
    assert "0 passed, 0 failed" in result.output


@pytest.mark.parametrize("index", ["not json", "[]", '{"schema": 1}', '{"schema": 99, "cases": []}', None])
def test_golden_refuses_a_folder_without_a_good_index(tmp_path, index):
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    result = psgd("golden", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("psgd: ")


@pytest.mark.parametrize("arguments", [["--family", "nope"], ["--driver", "nope"]])
def test_golden_refuses_unknown_names(tmp_path, arguments):
    result = psgd("golden", folder_of(tmp_path), *arguments)
    assert result.exit_code == 2
    assert "'nope'; choose of" in result.stderr


# ---- demo --------------------------------------------------------------------------------
def test_demo_trains_compares_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "METHODS", {METHOD: METHODS[METHOD]})
    monkeypatch.setattr(cli, "DEMO_PROBLEM", "softmax-digits")
    file, picture = tmp_path / "report.html", tmp_path / "picture.png"
    result = psgd("demo", "--steps", 2, "--report", file, "--picture", picture)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"Report: {file}"
    row = next(line for line in result.stdout.splitlines() if line.startswith(METHOD))
    assert row.split()[-2:] == ["pass", "pass"] and row.count("%") == 2
    assert file.read_text(encoding="utf-8").count("<svg") == 2
    assert picture.is_file()


@pytest.mark.parametrize("failing", [True, False])
def test_demo_goes_through_every_method_and_fails_if_one_verdict_does(tmp_path, monkeypatch, failing):
    last = list(METHODS)[-1]

    def compared(method, problem, *, locked, **ignored):
        return comparison(method, locked=locked, far=1.0 if failing and locked and method == last else 1e-15)

    monkeypatch.setattr(cli, "compared", compared)
    monkeypatch.setattr(cli, "DEMO_DRIVERS", ("<one>", "two"))
    result = psgd("demo", "--steps", 2, "--report", tmp_path / "r.html")
    assert result.exit_code == int(failing), result.output
    assert all(f"\n{method} " in result.stdout for method in METHODS)
    assert ("FAIL" in result.stdout) == failing


def test_demo_says_what_is_missing_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = psgd("demo", "--report", tmp_path / "r.html")
    assert result.exit_code == 2
    assert result.stderr == "psgd: matplotlib is not installed; pip install 'psgd[report]'\n"


def test_demo_refuses_a_folder_that_is_not_there(tmp_path):
    assert psgd("demo", "--report", tmp_path / "no" / "r.html").exit_code == 2
