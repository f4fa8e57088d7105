"""`psgd demo`: what it trains, what it leaves when it is ended early, what it costs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from conformance import demo
from conformance._testing import METHOD, README, ROOT, comparison, psgd
from conformance.cli import demo as command
from conformance.problems import PROBLEMS
from psgd.methods import METHODS


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
    monkeypatch.setattr(command.pages, "svg", lambda *ignored: "")

    def run(*arguments: str) -> list[demo.Run]:
        asked = []

        def compared(method, problem, *, steps, locked, drivers, dtype, **ignored):
            assert (drivers, dtype) == (demo.DRIVERS, demo.DTYPE)
            asked.append(demo.Run(method, problem, steps, locked))
            return comparison(method, locked=locked)

        monkeypatch.setattr(command, "compared", compared)
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
    monkeypatch.setattr(command.pages, "svg", lambda *ignored: "")

    def compared(method, problem, *, locked, **ignored):
        return comparison(method, locked=locked, far=1.0 if failing and locked and method == last else 1e-15)

    monkeypatch.setattr(command, "compared", compared)
    result = psgd("demo", "--steps", 2, "--report", tmp_path / "r.html")
    assert result.exit_code == int(failing), result.output
    assert all(f"\n{method} " in result.stdout for method in demo.one_of_each_kind())
    assert ("FAIL" in result.stdout) == ("do not agree" in result.stdout.replace("\n", " ")) == failing


@pytest.mark.parametrize("done", [0, 1, 2])
def test_demo_that_is_ended_early_leaves_what_is_done(tmp_path, monkeypatch, done):
    file, names = tmp_path / "r.html", demo.one_of_each_kind()
    calls = []
    monkeypatch.setattr(command.pages, "svg", lambda *ignored: "")

    def compared(method, problem, *, locked, **ignored):
        calls.append(method)
        if len(calls) > 2 * done + 1:
            raise KeyboardInterrupt
        return comparison(method, locked=locked)

    monkeypatch.setattr(command, "compared", compared)
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
    monkeypatch.setattr(command.pages, "svg", lambda *ignored: "")
    monkeypatch.setattr(
        command, "compared", lambda method, problem, *, locked, **ignored: comparison(method, locked=locked)
    )
    usual = getattr(command.pages, at)

    def once(*arguments):
        calls.append(at)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(*arguments)

    monkeypatch.setattr(command.pages, at, once)
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

    monkeypatch.setattr(command, "compared", compared)
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
