"""The first compiled step is timed in processes of their own. For torch's own compiler nothing here waits."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.cost import compiling
from benchmarks.peers import PEERS, Entrant
from conformance import cli

pytestmark = pytest.mark.xdist_group("compiling")  # what they look at is made once

METHOD = "quad"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    file = tmp_path_factory.mktemp("out") / "compile.json"
    entrants = (PEERS["jax", METHOD][0], Entrant("optax:nothing"), Entrant("optax:adam", compiles=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "PEERS", {("jax", METHOD): entrants})
        asked = ["bench", "compile", "--quick", "--framework", "jax", "--method", METHOD]
        done = CliRunner().invoke(cli.app, [*asked, "--json", str(file)])
    assert done.exit_code == 0, done.output
    return done.output, json.loads(file.read_text())["rows"]


def test_who_compiles_is_timed_beside_what_compiles_next_to_nothing(ran):
    output, (ours, nothing) = ran
    assert ours["cold_s"] > ours["trivial_s"] > 0 and ours["again"] == "" and ours["why"] is None
    assert nothing["cold_s"] is None and nothing["why"].startswith("AttributeError")
    assert "ours, quad" in output and "does not run" in output


def test_torch_is_started_a_second_time_with_the_files_of_the_first(monkeypatch):
    caches = []

    def once(field, framework, entrant, cache):
        caches.append(cache)
        return {"first": 10.0 / len(caches), "again": "a rate"}

    monkeypatch.setattr(compiling, "once", once)
    made = compiling.row(None, "torch", Entrant("x:y"), 2.0)
    assert made == {"trivial_s": 2.0, "cold_s": 10.0, "cached_s": 5.0, "again": "a rate", "why": None}
    assert len(caches) == 2 and len(set(caches)) == 1
    monkeypatch.setattr(compiling, "once", lambda *_: "ill | very")
    failed = compiling.row(None, "torch", Entrant("x:y"), 2.0)
    assert failed["why"] == "ill | very" and failed["cold_s"] is failed["cached_s"] is None


def test_the_cells_tell_seconds_and_what_was_compiled_again():
    common = {"set": "s", "framework": "torch", "method": "m", "who": "w", "trivial_s": 2.04, "cold_s": 10.0}
    rows = [{**common, "cached_s": 5.0, "again": again, "why": None} for again in ("", "a | b")]
    _, first, second = compiling.cells({"rows": rows})
    assert first[4:] == ["2.0 s", "10.0 s", "5.0 s", "nothing"] and second[-1] == "a / b"
