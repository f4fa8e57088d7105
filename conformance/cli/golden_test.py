"""`psgd golden`: exit codes, JSON, complaints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conformance._testing import RECORDED, psgd
from conformance.internal import golden


def folder_of(tmp_path: Path, *more: dict, **changed: object) -> Path:
    """A folder of one recorded case, changed as told, and of more that differ from it."""
    if not (RECORDED / "index.json").is_file():
        pytest.skip("the recorded runs are not in this copy")
    index = json.loads((RECORDED / "index.json").read_text())
    case = next(c for c in index["cases"] if golden.supported(c))
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


def test_golden_shows_and_does_not_send_what_a_terminal_would_obey(tmp_path):
    """In the names of files and families, in the table, in sentences and in what an exception says."""
    name = "red\x1b[31m\u202e.npz"
    folder = folder_of(tmp_path, {"family": "to\x1bcome", "file": name}, {"file": name}, {"rtol": 0.5, "file": "x.npz"})
    result = psgd("golden", folder)
    assert result.exit_code == 1
    assert "\x1b[31m" not in result.output and "\u202e" not in result.output
    assert result.output.count(r"red\x1b[31m\u202e") == 3 and r"to\x1bcome (1)" in result.output
    result = psgd("golden", folder, "--family", "\x1b[31m")
    assert result.exit_code == 2 and "\x1b[31m" not in result.stderr and r"to\x1bcome" in result.stderr


@pytest.mark.parametrize(
    "index", ["not json", "[]", '{"schema": 1}', '{"schema": 99, "cases": []}', '{"schema": 1, "cases": []}', None]
)
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
