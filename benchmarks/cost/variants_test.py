"""The benchmark runs and says what it promises. How fast anything is, no test can say."""

import json

import pytest

from benchmarks import tables
from benchmarks.cost import variants
from benchmarks.layers import LAYERWISE, step_variants

pytestmark = pytest.mark.xdist_group("variants")  # what they look at is made once


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "variants.json"
    variants.main(["--quick", "--json", str(path)])
    return json.loads(path.read_text())


def test_every_method_is_timed_in_every_variant_that_needs_no_compiler(result):
    expected = [
        (name, variant.framework, variant.name)
        for name, method in LAYERWISE.items()
        for variant in step_variants(method)
        if not variant.slow_to_start
    ]
    assert [(r["method"], r["framework"], r["variant"]) for r in result["rows"]] == expected


def test_a_row_holds_a_median_between_its_quartiles_and_a_speedup(result):
    for r in result["rows"]:
        low, high = r["quartiles_ms"]
        assert 0 < low <= r["median_ms"] <= high
        assert r["speedup"] > 0


def test_speedups_are_over_the_first_variant_of_a_framework(result):
    firsts = {(r["method"], r["framework"]): r["speedup"] for r in reversed(result["rows"])}
    assert set(firsts.values()) == {1.0}


def test_the_machine_and_the_setup_are_told(result):
    assert result["machine"]["torch_threads"] >= 1
    assert {"processor", "cores", "torch", "jax"} <= result["machine"].keys()
    assert result["setup"]["layers"] == {"count": 3, "size": 8}


def test_tables_for_a_terminal_and_for_a_document_have_every_row(result):
    cells = variants.cells(result)
    assert len([row for row in tables.sheet("a title", cells).rows if row]) == len(result["rows"])
    lines = tables.markdown_table("a title", cells).splitlines()
    assert len(lines) == 2 + 2 + len(result["rows"])
    assert {line.count("|") for line in lines[2:]} == {7}
