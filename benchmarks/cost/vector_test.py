"""The benchmark of a vector's fit runs, both variants, and puts back what it changes."""

import json

import pytest

from benchmarks.cost import vector
from psgd import thin
from psgd.geometry import GEOMETRIES


def test_each_geometry_is_timed_in_both_variants(tmp_path, capsys):
    file = tmp_path / "vector.json"
    vector.main(["--quick", "--markdown", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert {r["geometry"] for r in rows} == set(GEOMETRIES)
    assert all(r["thin_ms"] > 0 and r["formed_ms"] > 0 and r["ratio"] > 0 for r in rows)
    assert [r["n"] for r in rows if r["rotates"]] == [16] * sum(g.turn is not None for g in GEOMETRIES.values())
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 2
    assert thin.is_thin((100,), 0)


def test_terms_are_formed_only_in_its_context():
    with pytest.raises(RuntimeError), vector.terms_formed():
        assert not thin.is_thin((100,), 0)
        raise RuntimeError
    assert thin.is_thin((100,), 0)
