"""`psgd compare`: exit codes, JSON, complaints, hyperparameters."""

from __future__ import annotations

import json
import sys
from math import inf

import pytest

from conformance import tolerances
from conformance._testing import METHOD, QUICK, psgd
from conformance.cli import compare, options
from conformance.compare import KINDS
from psgd.methods import METHODS


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
        (["--method", "nope"], "method 'nope'; choose of"),
        (["--method", "krn"], "did you mean 'kron'? There are"),
        (["--problem", "softmax-digit"], "did you mean 'softmax-digits'?"),
        (["--drivers", "torch,numpi"], "did you mean 'numpy'?"),
        (["--dtype", "Float32"], "did you mean 'float32'?"),
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
    assert result.stderr.splitlines()[-1] == (
        "psgd: array-api-strict is not installed; pip install array-api-strict, "
        "or in a checkout: pip install -c constraints.txt '.[test]'"
    )


def test_drivers_default_to_those_that_are_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_api_strict", None)
    assert compare.chosen(None) == [name for name in compare.DRIVERS if name != "strict"]


# ---- hyperparameters ------------------------------------------------------------
def test_values_are_literals_or_else_strings():
    given = ["lr=0.5", "seed=7", "momentum=5e-1", "preconditioner_max_size=inf", "whiten_grad=False", "dQ=QUAD"]
    given += ["grad_clip_max_amps=(1, 2)", "preconditioner_init_scale=None", "lr=0.25"]
    expected = {"lr": 0.25, "seed": 7, "momentum": 0.5, "preconditioner_max_size": inf, "whiten_grad": False}
    expected |= {"dQ": "QUAD", "grad_clip_max_amps": (1, 2), "preconditioner_init_scale": None}
    assert options.settings("kron_whiten", given) == expected
    assert options.settings("kron_whiten", ["dQ='QUAD'"]) == {"dQ": "QUAD"}
    assert options.settings("kron_whiten", []) == {}


@pytest.mark.parametrize("text", ["lr=0.125", "seed=3", "dtype=float32"])
def test_settings_reach_the_drivers(monkeypatch, text):
    """Also those that have the name of an option of the command."""
    seen, begin = [], compare.DRIVERS["numpy"].begin
    monkeypatch.setattr(
        compare.DRIVERS["numpy"], "begin", lambda run, params: (seen.append(run.method), begin(run, params))
    )
    result = psgd(*QUICK, "--dtype", "float32", "--method", "quad", "--set", text, "--set", "weight_decay=0.5")
    assert result.exit_code == 0, result.output
    name = text.partition("=")[0]
    expected = METHODS["quad"].of(**options.settings("quad", [text]))
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
