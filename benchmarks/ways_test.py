"""The benchmark runs and says what it promises. How fast anything is, no test can say."""

import json

import pytest

from benchmarks import compiling, step
from benchmarks.contenders import LAYERWISE, Layers, contenders
from psgd.methods import METHODS


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "step.json"
    step.main(["--quick", "--json", str(path)])
    return json.loads(path.read_text())


def test_every_method_is_timed_in_every_way_that_needs_no_compiler(result):
    expected = [
        (name, way.framework, way.variant)
        for name, method in LAYERWISE.items()
        for way in contenders(method)
        if not way.slow_to_start
    ]
    assert [(r["method"], r["framework"], r["variant"]) for r in result["steps"]] == expected


def test_a_row_holds_a_median_between_its_quartiles_and_a_speedup(result):
    for r in result["steps"]:
        low, high = r["quartiles_ms"]
        assert 0 < low <= r["median_ms"] <= high
        assert r["speedup"] > 0


def test_speedups_are_over_the_first_way_of_a_framework(result):
    firsts = {(r["method"], r["framework"]): r["speedup"] for r in reversed(result["steps"])}
    assert set(firsts.values()) == {1.0}


def test_the_machine_and_the_setup_are_told(result):
    assert result["machine"]["torch_threads"] >= 1
    assert {"processor", "cores", "torch", "jax"} <= result["machine"].keys()
    assert result["setup"]["layers"] == {"count": 3, "size": 8}
    assert result["compile"] == []


def test_compilation_is_timed_in_a_process_of_its_own(tmp_path):
    name = next(iter(METHODS))
    what = [f"jax:{compiling.TRIVIAL}", f"jax:{name}"]
    seconds = compiling.in_new_process(what, Layers(count=2, size=4), str(tmp_path))
    assert len(seconds) == 2
    assert all(s > 0 for s in seconds)


def test_a_failure_there_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="nonsense"):
        compiling.in_new_process(["jax:nonsense"], Layers(count=2, size=4), str(tmp_path))


def test_tables_for_a_terminal_and_for_a_document_have_every_row(result):
    cells = step.steps_cells(result)
    assert step.rich_table("a title", cells).row_count == len(result["steps"])
    lines = step.markdown_table("a title", cells).splitlines()
    assert len(lines) == 2 + 2 + len(result["steps"])
    assert {line.count("|") for line in lines[2:]} == {7}


def test_compile_times_become_a_table_where_there_are_any(result):
    assert step.compile_cells(result) == []
    made = step.compile_cells({"compile": [{"method": "any", "torch_cold": 9.04, "jax": 0.5}]})
    assert made == [["method", "torch, cold", "jax"], ["any", "9.0 s", "0.5 s"]]
