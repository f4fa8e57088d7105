"""`psgd plan`: the totals that the optimizers themselves tell, and complaints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import psgd_jax_backend
import psgd_torch_backend
from conformance._testing import psgd
from conformance.cli import plan
from psgd.methods import METHODS
from psgd_jax_backend import _summary
from psgd_torch_backend import optimizer

EXAMPLES = Path(__file__).parents[2] / "examples"
METHOD = "kron"
TOTALS = ("bytes", "state", "apply", "fit", "counters")


@pytest.fixture
def shapes_file(tmp_path):
    """What writes a file of shapes, given as plain data or as text."""

    def write(shapes) -> Path:
        file = tmp_path / "shapes.json"
        file.write_text(shapes if isinstance(shapes, str) else json.dumps(shapes))
        return file

    return write


@pytest.fixture
def planned(tmp_path):
    """What plans, and reads what that writes as JSON."""

    def plan(file: Path, *arguments: object, method: str = METHOD):
        out = tmp_path / "plan.json"
        result = psgd("plan", file, "--method", method, "--json", out, *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(out.read_text())

    return plan


def totals(summary) -> dict[str, int]:
    return {name: getattr(summary, name) for name in TOTALS}


def by_torch(method: str, shapes, of: str = "float32", **settings):
    kind = {"dtype": getattr(torch, of), "device": "meta"}
    params = {name: torch.nn.Parameter(torch.empty(shape, **kind)) for name, shape in shapes.items()}
    return getattr(psgd_torch_backend, METHODS[method].title)(params.items(), **settings).summary()


def by_jax(method: str, shapes):
    tree = {name: jax.ShapeDtypeStruct(tuple(shape), "float32") for name, shape in shapes.items()}
    return psgd_jax_backend.summary(getattr(psgd_jax_backend, method)(), tree)


# ---- totals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_eight_billion_is_what_both_frameworks_say(planned, method):
    file = EXAMPLES / "llama3-8b.json"
    shapes = json.loads(file.read_text())
    for framework, summary in (("torch", by_torch(method, shapes)), ("jax", by_jax(method, shapes))):
        out = planned(file, "--framework", framework, method=method)
        assert {name: out[name] for name in TOTALS} == totals(summary), framework
        assert sum(int(np.prod(r["shape"])) for r in out["rows"]) == 8_030_261_248
        assert [r["name"] for r in out["rows"]] == list(shapes)


def test_counters_are_those_of_the_adapters():
    assert plan.COUNTERS["torch"] == (optimizer.COUNTER_BYTES, True, 0)
    assert plan.COUNTERS["jax"] == (_summary.COUNTER_BYTES, False, _summary.SKIPS_BYTES)
    assert plan.COUNTERS.keys() == {"torch", "jax"}


def test_the_file_says_dtypes_and_layers(planned, shapes_file):
    shapes = {"w": (4, 6), "stack": (3, 4, 6), "wide": (4, 6)}
    file = shapes_file(
        {"w": [4, 6], "stack": {"shape": [3, 4, 6], "scanned": True}, "wide": {"shape": [4, 6], "dtype": "float32"}}
    )
    w, stack, wide = planned(file, "--dtype", "bfloat16")["rows"]
    assert [r["dtype"] for r in (w, stack, wide)] == ["bfloat16", "bfloat16", "float32"]
    assert (stack["state"], stack["fit"], stack["layers"]) == (3 * w["state"], 3 * w["fit"], 3)
    assert wide["state"] > w["state"] and wide["layers"] is None
    expected = by_torch(METHOD, shapes, scanned_layers=("stack",))
    assert {name: planned(file)[name] for name in TOTALS} == totals(expected)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("kron", {"mu_dtype": "bfloat16", "memory_save_mode": "one_diag"}),
        ("kron", {"b1": 0.0, "max_size_triangular": 5}),
        ("quad", {"dtype": "bfloat16", "momentum": 0}),
        ("kron_whiten", {"dQ": "QUAD4P", "whiten_grad": False, "momentum": 0.5}),
    ],
)
def test_settings_reach_the_method(planned, shapes_file, method, settings):
    shapes = {"w": (4, 6), "t": (2, 3, 4), "b": (5,)}
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    file = shapes_file(shapes)
    out = planned(file, *given, method=method)
    assert {name: out[name] for name in TOTALS} == totals(by_torch(method, shapes, **settings))
    assert totals(by_torch(method, shapes, **settings)) != totals(by_torch(method, shapes))


# ---- what it shows -----------------------------------------------------------------------------
def test_the_table_is_the_summary_as_text(shapes_file):
    shapes = {"blocks[0].weight": (4, 6), "[red]bias": (6,), "empty": (0, 3), "scale": ()}
    result = psgd("plan", shapes_file(shapes), "--method", METHOD)
    assert result.stdout == f"{by_torch(METHOD, shapes)}\n"


def test_the_json_holds_every_row(planned, shapes_file):
    shapes = {"w": (4, 6), "b": (6,)}
    out = planned(shapes_file(shapes))
    assert list(out) == [*TOTALS, "rows"]
    for mine, theirs in zip(out["rows"], by_torch(METHOD, shapes).rows, strict=True):
        assert mine == {**vars(theirs), "shape": list(theirs.shape), "factors": list(theirs.factors)}


def test_it_needs_no_framework(shapes_file):
    file = shapes_file({"w": [4, 6]})
    code = f"""
import sys
from conformance.cli import app
app(["plan", {str(file)!r}, "--method", {METHOD!r}], standalone_mode=False)
sys.exit(sorted({{"torch", "jax"}} & set(sys.modules)) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- complaints ----------------------------------------------------------------------------------
def assert_refused(result, *words: str) -> None:
    """One sentence, and exit code 2."""
    assert result.exit_code == 2, repr(result.exception)
    assert result.stderr.startswith("psgd: ") and result.stderr.count("\n") == 1 and not result.stdout
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("shapes", "word"),
    [
        ("not json", "not a JSON object"),
        ("[[3, 4]]", "not a JSON object"),
        ("5", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("1" * 5000, "not a JSON object"),
        ({"w": [10**400]}, "give a list of whole numbers"),
        ({"\x1b[31mw": [1.5]}, r"\x1b[31mw is"),
        ({"w": 5}, "w is"),
        ({"w": "34"}, "w is"),
        ({"w": None}, "w is"),
        ({"w": [3, -4]}, "w is"),
        ({"w": [3.0]}, "w is"),
        ({"w": [True, 3]}, "w is"),
        ({"w": [[3]]}, "w is"),
        ({"w": {}}, "w is"),
        ({"w": {"dtype": "float32"}}, "w is"),
        ({"w": {"shape": [3], "layers": True}}, "w is"),
        ({"w": {"shape": [], "scanned": True}}, "w is"),
        ({"w": {"shape": [3, 4], "scanned": "no"}}, "w is"),
        ({"w": {"shape": [3], "dtype": "nope"}}, "dtype 'nope'"),
        ({"w": {"shape": [3], "dtype": 5}}, "dtype"),
        ({"w": {"shape": [3], "dtype": ["float32"]}}, "dtype"),
        ({"w": {"shape": [3], "dtype": "int32"}}, "int32"),
        ({"w": {"shape": [3, 3], "dtype": "complex64"}}, "complex"),
    ],
)
def test_a_file_that_is_no_list_of_shapes(shapes_file, shapes, word):
    assert_refused(psgd("plan", shapes_file(shapes), "--method", METHOD), word)


def test_a_file_that_is_not_there(tmp_path):
    assert_refused(psgd("plan", tmp_path / "nope.json", "--method", METHOD), "nope.json", "No such file")
    assert_refused(psgd("plan", tmp_path, "--method", METHOD), "directory")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--method", "nope"], "method 'nope'"),
        (["--dtype", "nope"], "dtype 'nope'"),
        (["--dtype", "int32"], "int32"),
        (["--framework", "numpy"], "framework 'numpy'"),
        (["--set", "nope=1"], "'nope'"),
        (["--set", "lr"], "NAME=VALUE"),
        (["--set", "b1=2"], "b1=2"),
        (["--json", "no/such/folder.json"], "no/such"),
    ],
)
def test_what_a_plan_does_not_understand_is_one_sentence(shapes_file, arguments, word):
    assert_refused(psgd("plan", shapes_file({"w": [4, 6]}), "--method", METHOD, *arguments), word)


def test_complex_parameters_where_a_method_takes_them(planned, shapes_file):
    file = shapes_file({"w": {"shape": [3, 4], "dtype": "complex64"}})
    out = planned(file, method="kron_whiten")
    assert out["state"] == by_torch("kron_whiten", {"w": (3, 4)}, "complex64").state
