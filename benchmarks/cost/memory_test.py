"""State and peak are those of the optimizer, and told beside what they are to be compared with."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.cost import memory
from benchmarks.peers import PEERS, Entrant
from benchmarks.sets import SETS, ParameterSet
from conformance import cli

pytestmark = pytest.mark.xdist_group("memory")  # what they look at is made once

METHOD = "quad"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    file = tmp_path_factory.mktemp("out") / "memory.json"
    missing = Entrant("nobody:QUAD", home=".venv-nobody")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "PEERS", {("torch", METHOD): (PEERS["torch", METHOD][0], missing)})
        patch.setattr(memory, "SCALE", {"torch": (Entrant("torch.optim:AdamW", scale=True),), "jax": ()})
        done = CliRunner().invoke(cli.app, ["bench", "memory", "--quick", "--method", METHOD, "--json", str(file)])
    assert done.exit_code == 0, done.output
    return done.output, json.loads(file.read_text())["rows"]


def test_state_is_counted_beside_the_parameters(ran):
    _, (ours, missing, adamw) = ran
    tiny = SETS["gpt-4x256"].tiny()
    assert adamw["state_bytes"] == 2 * 4 * tiny.numbers + 4 * len(tiny.shapes)  # moments, and a counter each
    assert adamw["state_ratio"] == adamw["state_bytes"] / (4 * tiny.numbers)
    assert ours["state_bytes"] > adamw["state_bytes"] and ours["why"] is None
    assert missing["state_bytes"] is missing["peak_bytes"] is None and "make peers" in missing["why"]


def test_a_peak_is_beside_the_largest_stack(ran):
    _, (ours, _, adamw) = ran
    assert ours["peak_ratio"] == ours["peak_bytes"] / memory.largest_stack(SETS["gpt-4x256"].tiny())
    assert ours["peak_bytes"] > adamw["peak_bytes"] > 0
    assert memory.largest_stack(ParameterSet("", ((3, 4), (7,), (7,)), "")) == 4 * 14


def test_the_table_is_printed_with_who_does_not_run(ran):
    output, rows = ran
    assert output.count("does not run") == 1 and "ours, QUAD" in output and "AdamW" in output
    assert {len(row) for row in memory.cells({"rows": rows})} == {8}
