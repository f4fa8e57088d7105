"""What scanned layers save: that it is measured and told, and the part that a compiler tells the same every time."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

import psgd_jax_backend
from benchmarks.cost import scanned
from psgd.methods import METHODS

pytestmark = pytest.mark.xdist_group("scanned")  # what they look at is made once

METHOD = "quad"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "scanned.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanned, "LAYERWISE", {METHOD: METHODS[METHOD]})
        scanned.main(["--quick", "--json", str(path)])
    return json.loads(path.read_text())


def test_every_figure_is_there(result):
    (row,) = result["rows"]
    assert row["method"] == METHOD
    assert list(row["compile"]) == ["6", "12"] and list(row["bytes"]) == ["4", "1"]
    assert all(x > 0 for x in (*row["compile"].values(), *row["bytes"].values(), row["ratio"]))
    assert {"processor", "torch", "jax"} <= result["machine"].keys()


@pytest.mark.parametrize("flags", [[], ["--markdown"]])
def test_the_table_is_printed(result, flags, monkeypatch, capsys):
    monkeypatch.setattr(scanned, "measure", lambda console, quick: result)
    scanned.main(["--quick", *flags])
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if METHOD in line)
    assert line.count(" s ") == 2 and line.count("MiB") == 2
    assert all(word in " ".join(lines) for word in ("6", "layers", "4 at a", "time"))  # heads may break


def test_a_ratio_is_of_the_depths_that_its_column_names(monkeypatch):
    """Each depth takes as many seconds as it has layers, and the bytes say what was asked for."""
    monkeypatch.setattr(scanned, "LAYERWISE", {METHOD: METHODS[METHOD]})
    monkeypatch.setattr(scanned, "compile_seconds", lambda name, depths, *_: np.asarray([depths, depths]))
    monkeypatch.setattr(scanned, "peak_bytes", lambda name, layers, size, batch: (batch or layers) * 2**20)
    head, row = scanned.cells(scanned.measure(Console(quiet=True), quick=False))
    shown = dict(zip(head, row, strict=True))
    assert shown["24 to 6"] == "4.00" and shown["48 layers"] == "48.00 s"
    assert (shown["all at a time"], shown["8 at a time"], shown["1 at a time"]) == ("24.0 MiB", "8.0 MiB", "1.0 MiB")


def test_what_is_traced_does_not_grow_with_the_depth():

    def equations(layers):
        tx = getattr(psgd_jax_backend, METHOD)(scanned_layers=True)
        leaf = jax.ShapeDtypeStruct((layers, 8, 8), "float32")
        traced = jax.make_jaxpr(lambda g, state: tx.update(g, state, g))(leaf, jax.eval_shape(tx.init, leaf))
        return str(traced).count("\n")

    assert equations(6) == equations(48)


@pytest.mark.parametrize("name", ["quad", "kron"])
def test_mapping_in_batches_bounds_the_memory_of_an_update(name):
    one, four, everything = (scanned.peak_bytes(name, 16, 64, batch) for batch in (1, 4, None))
    assert four < everything
    assert one < four
