"""The command: exit codes, JSON, complaints."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from math import inf
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import tables
from benchmarks.cost import step
from benchmarks.training import train
from conformance import cli, demo, packages, terminal, tolerances
from conformance.compare import KINDS
from conformance.internal import contracts, soak
from conformance.problems import PROBLEMS
from conformance.report_test import comparison
from psgd.methods import METHODS

METHOD = next(iter(METHODS))
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECORDED = ROOT / "conformance/internal/golden"
QUICK = ["compare", "--method", METHOD, "--problem", "least-squares", "--steps", "2", "--drivers", "torch,numpy"]


def psgd(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# ---- the command as such -----------------------------------------------------------------
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


# ---- tables ------------------------------------------------------------------------------
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
    told = train.cells([run], [{"optimizer": "x", "why": "it keeps more than there is of memory"}])
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


# ---- benchmarks --------------------------------------------------------------------------
def test_benchmarks_are_listed_and_loaded_when_they_are_asked_for():
    code = "import sys, conformance.cli; sys.exit(any(m.split('.')[0] == 'benchmarks' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
    listed = psgd("bench", "--help")
    assert listed.exit_code == 0 and all(f"{name} " in listed.output for name in cli.BENCHMARKS), listed.output
    for name in cli.BENCHMARKS:
        assert "--quick" in psgd("bench", name, "--help").output
    assert psgd("bench", "nothing").exit_code == 2 and psgd("bench").exit_code == 2
    assert "did you mean 'step'?" in psgd("bench", "setp").stderr


@pytest.mark.parametrize("name", cli.BENCHMARKS)
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

    for module, name in [(cli, "replay_all"), (cli, "run_demo"), (step, "measure"), (contracts, "run")]:
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


# ---- demo --------------------------------------------------------------------------------
def test_demo_trains_compares_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SIZES", ("softmax-digits",))
    file, picture = tmp_path / "report.html", tmp_path / "picture.png"
    result = psgd("demo", "--method", METHOD, "--steps", 2, "--report", file, "--picture", picture)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"Report: {file}"
    row = next(line for line in result.stdout.splitlines() if line.startswith(METHOD))
    assert row.split()[-2:] == ["pass", "pass"] and row.count("%") == 1
    page = file.read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "partial" not in page
    assert picture.is_file()
    ends = [line for line in result.stderr.splitlines() if re.search(r": \d+ s", line)]
    assert len(ends) == 2 and "free-running" in ends[0] and "s left" in ends[0] and "s left" not in ends[1]


def of_the_makefile() -> list[str]:
    """The arguments of `psgd` in the target `demo`, which is the first command of the README."""
    assert "\nmake demo" in README.replace("$ ", "\n") and README.index("make demo") < README.index("$ psgd")
    line = re.search(r"^demo:.*\n\t\$\(BIN\)/psgd (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return shlex.split(line[1])


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """What runs the command without training, and gives each comparison that it asks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.pages, "svg", lambda *ignored: "")

    def run(*arguments: str) -> list[demo.Run]:
        asked = []

        def compared(method, problem, *, steps, locked, drivers, dtype, **ignored):
            assert (drivers, dtype) == (demo.DRIVERS, demo.DTYPE)
            asked.append(demo.Run(method, problem, steps, locked))
            return comparison(method, locked=locked)

        monkeypatch.setattr(cli, "compared", compared)
        result = psgd(*arguments)
        assert result.exit_code == 0, result.output
        return asked

    return run


@pytest.mark.parametrize(("more", "steps", "operations"), [([], 4_000, 1e10), (["--all"], 12_000, 8e10)])
def test_the_first_command_ends(ran, more, steps, operations):
    """Not by a clock: steps of drivers, and floating-point operations of these, twice of what they are."""
    asked = ran(*of_the_makefile(), *more)
    assert sum(run.work for run in asked) < steps
    assert sum(run.work * demo.operations(run.method, run.problem) for run in asked) < operations
    assert Path("report.html").is_file()


def test_the_first_command_as_it_is_in_few_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = psgd(*of_the_makefile(), "--steps", 1)
    assert result.exit_code == 0, result.output
    assert f"torch and jax agree in all {len(demo.one_of_each_kind())} methods" in result.stdout.replace("\n", " ")
    assert Path("report.html").read_text().count("<svg") == 2 * len(demo.one_of_each_kind())


def test_demo_has_one_of_each_kind_or_those_that_are_asked_for(ran):
    kinds = {(type(r.preconditioner), r.joint, r.newton) for r in (m().recipe() for m in METHODS.values())}
    usual = [run.method for run in ran("demo") if not run.locked]
    assert len(usual) == len(set(usual)) == len(kinds) < len(METHODS)
    last = list(METHODS)[-1]
    assert {run.method for run in ran("demo", "--method", last, "--method", METHOD)} == {last, METHOD}
    assert [run.method for run in ran("demo", "--all")] == [name for name in METHODS for _ in range(2)]
    assert psgd("demo", "--all", "--method", METHOD).exit_code == 2
    assert "did you mean 'kron'?" in psgd("demo", "--method", "krn").stderr


def test_problems_of_the_demo_are_each_smaller_and_fit():
    sizes = [sum(x.size for x in PROBLEMS[name].init(0).values()) for name in demo.SIZES]
    assert sizes == [4522, 650, 10] and all(f"{n:,}" in Path(demo.__file__).read_text() for n in sizes)
    for name, method in METHODS.items():
        recipe = method().recipe()
        fits = demo.fitting(name)
        assert demo.operations(name, fits) <= demo.OPERATIONS
        assert (fits == demo.SIZES[0]) == (not (recipe.joint or recipe.newton))


@pytest.mark.parametrize("failing", [True, False])
def test_demo_fails_if_one_verdict_does(tmp_path, monkeypatch, failing):
    last = demo.one_of_each_kind()[-1]
    monkeypatch.setattr(cli.pages, "svg", lambda *ignored: "")

    def compared(method, problem, *, locked, **ignored):
        return comparison(method, locked=locked, far=1.0 if failing and locked and method == last else 1e-15)

    monkeypatch.setattr(cli, "compared", compared)
    result = psgd("demo", "--steps", 2, "--report", tmp_path / "r.html")
    assert result.exit_code == int(failing), result.output
    assert all(f"\n{method} " in result.stdout for method in demo.one_of_each_kind())
    assert ("FAIL" in result.stdout) == ("do not agree" in result.stdout.replace("\n", " ")) == failing


@pytest.mark.parametrize("done", [0, 1, 2])
def test_demo_that_is_ended_early_leaves_what_is_done(tmp_path, monkeypatch, done):
    file, names = tmp_path / "r.html", demo.one_of_each_kind()
    calls = []
    monkeypatch.setattr(cli.pages, "svg", lambda *ignored: "")

    def compared(method, problem, *, locked, **ignored):
        calls.append(method)
        if len(calls) > 2 * done + 1:
            raise KeyboardInterrupt
        return comparison(method, locked=locked)

    monkeypatch.setattr(cli, "compared", compared)
    result = psgd("demo", "--report", file)
    assert result.exit_code == 130
    assert f"ended early: {done} of {len(names)} methods are done" in result.stderr
    assert file.exists() == bool(done)
    if done:
        assert f"This report is partial: {', '.join(names[done:])} have not run." in file.read_text()
        assert "partial" in result.stdout + result.stderr


@pytest.mark.parametrize("at", ["section", "facts"])
def test_demo_that_is_ended_while_it_writes_has_what_it_tells(tmp_path, monkeypatch, at):
    names, file, calls = demo.one_of_each_kind(), tmp_path / "r.html", []
    monkeypatch.setattr(cli.pages, "svg", lambda *ignored: "")
    monkeypatch.setattr(cli, "compared", lambda method, problem, *, locked, **more: comparison(method, locked=locked))
    usual = getattr(cli.pages, at)

    def once(*given):
        calls.append(at)
        return raised(KeyboardInterrupt()) if len(calls) == 2 else usual(*given)

    monkeypatch.setattr(cli.pages, at, once)
    result = psgd("demo", "--report", file)
    told = int(re.search(r"(\d) of \d methods are done", result.stderr)[1])
    assert result.exit_code == 130 and told == (1 if at == "section" else 2)
    assert f"partial: {', '.join(names[told:])} have not run" in file.read_text()
    assert file.read_text().count("<section><h2 id=") == told


def test_demo_leaves_jax_and_torch_as_they_were(tmp_path, monkeypatch):
    import jax
    import torch

    seen = []
    before = jax.config.jax_compilation_cache_dir, torch.get_num_threads()

    def compared(method, problem, *, locked, **ignored):
        seen.append((jax.config.jax_compilation_cache_dir, torch.get_num_threads()))
        return comparison(method, locked=locked)

    monkeypatch.setattr(cli, "compared", compared)
    assert psgd("demo", "--method", METHOD, "--report", tmp_path / "r.html").exit_code == 0
    assert all(folder and threads == 1 for folder, threads in seen)
    assert (jax.config.jax_compilation_cache_dir, torch.get_num_threads()) == before


@pytest.mark.parametrize(
    ("module", "name"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn"), ("jax", "jax"), ("torch", "torch")]
)
def test_demo_says_what_is_missing_before_it_trains(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    result = psgd("demo", "--report", tmp_path / "r.html")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"psgd: {name} is not installed; pip install {name}, or in a checkout: pip install")
    assert result.stderr.count("\n") == 1


def test_demo_refuses_a_folder_that_is_not_there(tmp_path):
    assert psgd("demo", "--report", tmp_path / "no" / "r.html").exit_code == 2
