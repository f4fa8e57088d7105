"""The command as such: help, versions, tables, files that cannot be written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest

from benchmarks import tables
from benchmarks.cost import step
from benchmarks.training import train_figures
from conformance import cli, packages, terminal
from conformance._testing import METHOD, RECORDED, ROOT, psgd
from conformance.internal import contracts, soak
from psgd.methods import METHODS


def test_help_loads_no_framework():
    heavy = {"torch", "jax", "matplotlib", "sklearn"}
    code = f"import sys, conformance.cli; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_runs_as_a_module():
    wide = os.environ | {"COLUMNS": "160"}
    command = [sys.executable, "-m", "conformance", "methods"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=wide)
    for name, method in METHODS.items():
        assert any(line.split()[:1] == [name] and method.title in line for line in done.stdout.splitlines())
    words = done.stdout.split()
    assert all(words.count(word) > 0 for m in METHODS.values() for word in f"{m.summary} {m.source}".split())


def test_versions_are_those_that_are_installed(monkeypatch):
    result = psgd("--version")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0] == f"psgd {cli.releases()['psgd']}"
    assert all(f"{name} {version(name)}" in lines for name in ("torch", "jax", "optax", "numpy", "scikit-learn"))
    monkeypatch.setattr(packages, "version", lambda name: raised(packages.PackageNotFoundError(name)))
    assert "torch not installed" in psgd("--version").stdout.splitlines()


def raised(error: Exception):
    raise error


def test_packages_are_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {"": project["dependencies"], **project["optional-dependencies"]}
    names = {extra: [re.split("[<>=]", x)[0] for x in given] for extra, given in asked.items()}
    for package in packages.PACKAGES.values():
        assert package.distribution in names[package.extra]


def test_a_command_that_is_misspelt_says_what_was_meant():
    result = psgd("comprae")
    assert result.exit_code == 2 and "compare" in result.stderr and "Traceback" not in result.stderr


def test_a_reader_that_stops_is_no_error():
    """As `head` does."""
    code = "import sys; from conformance import cli; sys.argv = ['psgd', 'methods']; cli.main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        assert run.stderr.read() == b""


# ---- tables ------------------------------------------------------------------
def shown(made, width: int | None, monkeypatch) -> str:
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    out = terminal.console()
    with out.capture() as text:
        out.print(made)
    return text.get()


def a_sheet() -> terminal.Sheet:
    made = terminal.Sheet(
        ["name", "what it is"], ["a long head", "spare one", "spare two"], spare=["spare one", "spare two"]
    )
    made.add_row(
        "a_name_that_stays_whole", "a sentence of many words which may break anywhere", "1.5e-12", "7" * 20, "8" * 15
    )
    return made


@pytest.mark.parametrize(("width", "gone"), [(None, ["spare one"]), (140, []), (50, ["spare one", "spare two"])])
def test_a_table_fits_or_says_what_it_leaves_out(monkeypatch, width, gone):
    text = shown(a_sheet(), width, monkeypatch)
    assert max(map(len, text.splitlines())) <= (width or 80)
    assert "a_name_that_stays_whole" in text and "1.5e-12" in text
    last = text.splitlines()[-1].strip()
    assert last == f"left out to fit {width or 80} columns: {', '.join(gone)}" if gone else "left out" not in text
    assert ("7" * 20 in text, "8" * 15 in text) == ("spare one" not in gone, "spare two" not in gone)


def test_tables_of_benchmarks_fit(monkeypatch):
    """With cells as long as they get."""
    ms, who = "130.1 ms (129.9 to 131.4)", "pytorch-optimizer 4.1.0 Kron"
    common = {"method": max(METHODS, key=len), "updates": "every step", "peer": who, "fastest": False, "why": None}
    times = {f"{x}_{y}": z for x in ("ours", "peer") for y, z in (("ms", 130.1), ("quartiles_ms", [129.9, 131.4]))}
    row = common | times | {"ratio": 0.884, "quartiles": [0.8, 0.9], "floor_ratio": 1.2}
    assert ms in step.cells([row])[1]
    text = shown(tables.sheet("A step", step.cells([row])), None, monkeypatch)
    assert max(map(len, text.splitlines())) <= 80 and who in text and "0.88" in text and "left out to fit" in text
    run = {"name": max(METHODS, key=len), "losses": [1.69], "k": 5, "tried": [5], "lr": 3.2e-3}
    run |= {"share": float("nan"), "slower": 1.2}
    told = train_figures.cells([run], [{"optimizer": "x", "why": "it keeps more than there is of memory"}])
    text = shown(tables.sheet("Training", told), None, monkeypatch)
    assert max(map(len, text.splitlines())) <= 80 and run["name"] in text and "1.690" in text and "memory" in text


def test_a_column_of_sentences_is_not_left_out(monkeypatch):
    made = terminal.Sheet(["name"], ["why", "x"], spare=["why", "x"])
    made.add_row("a" * 30, "it does not run since something is missing here", "9" * 31)
    assert "missing" in shown(made, 60, monkeypatch) and "9" * 31 not in shown(made, 60, monkeypatch)


@pytest.mark.parametrize("width", [80, 60, 160])
def test_methods_and_plans_obey_columns(monkeypatch, width, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({f"layers.{i}.a_long_name.weight": [4096, 14336] for i in range(40)}))
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (["methods"], ["plan", tmp_path / "x.json", "--method", METHOD]):
        lines = psgd(*arguments).stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert any(f"left out to fit {width} columns" in line for line in lines) == (width < 160)
    assert all(re.search(rf"^{name} ", psgd("methods").stdout, re.MULTILINE) for name in METHODS)


def test_json_has_neither_infinity_nor_nan(tmp_path):
    terminal.write_json(tmp_path / "x.json", {"a": [float("nan"), float("inf"), 1.5], "b": None, "c": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5], "b": None, "c": 1}


# ---- files -------------------------------------------------------------------
UNWRITABLE = ["no/such/out.json", ".", "x" * 300]


@pytest.mark.parametrize("file", UNWRITABLE, ids=["no folder", "a folder", "a long name"])
@pytest.mark.parametrize(
    "command",
    [
        ["golden", RECORDED, "--json"],
        ["demo", "--report"],
        ["demo", "--picture"],
        ["contracts", "--json"],
        ["bench", "step", "--json"],
    ],
    ids=lambda command: " ".join(map(str, [command[0], command[-1]])),
)
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch, command, file):
    def work(*_, **__):
        raise AssertionError("work began")

    for module, name in [(cli.golden, "replay_all"), (cli.demo, "run_demo"), (step, "measure"), (contracts, "run")]:
        monkeypatch.setattr(module, name, work)
    monkeypatch.chdir(tmp_path)
    result = psgd(*command, file)
    assert result.exit_code == 2, repr(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_look_whether_a_file_can_be_written_leaves_no_trace(tmp_path):
    old = tmp_path / "old"
    old.write_text("kept")
    terminal.writable(old, tmp_path / "new", None)
    assert old.read_text() == "kept" and list(tmp_path.iterdir()) == [old]


def test_a_program_without_typer_ends_with_the_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--json", str(tmp_path / "no" / "out.json")])
    assert capsys.readouterr().err.startswith("psgd: ")
