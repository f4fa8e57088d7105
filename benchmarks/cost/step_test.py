"""Steps are raced beside others, of which any may be missing or broken; none of the published ones is needed here."""

import json
from itertools import product

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.cost import step
from benchmarks.peers import PEERS, Entrant
from benchmarks.sets import SETS
from conformance import cli

pytestmark = pytest.mark.xdist_group("step")  # what they look at is made once

SOURCE = '''
import torch

class Plain(torch.optim.SGD):
    """Prints, has momentum, and fits where it is told to."""
    def __init__(self, params, lr, weight_decay, share=1.0):
        print("a peer that likes to talk")
        super().__init__(params, lr, momentum=0.9)
        self.share = share

    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("Q", torch.zeros(500))
            if self.share == 1.0:
                self.state[p]["Q"].add_(1)

class Restless(Plain):
    def step(self):
        self.share = 1.0
        super().step()

class Broken(Plain):
    def step(self):
        raise AttributeError("it | never")
'''
METHOD = "kron"


@pytest.fixture(scope="module")
def entrants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    (folder / "strangers.py").write_text(SOURCE)
    path = (str(folder),)
    ours = PEERS["torch", METHOD][0]
    return (
        ours,
        Entrant("strangers:Plain", probability="share", path=path),
        Entrant("strangers:Restless", probability="share", path=path),
        Entrant("strangers:Broken", probability="share", path=path),
        Entrant("nobody:Kron", home=".venv-nobody", probability="share"),
        Entrant("strangers:Plain", note="always", path=path),
    )


@pytest.fixture(scope="module")
def ran(entrants, tmp_path_factory):
    file = tmp_path_factory.mktemp("out") / "step.json"
    scale = {"torch": (Entrant("torch.optim:AdamW", wrapped=True, scale=True),)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "PEERS", {("torch", METHOD): entrants})
        patch.setattr(step, "SCALE", scale)
        asked = ["bench", "step", "--quick", "--method", METHOD, "--framework", "torch", "--mode", "eager"]
        done = CliRunner().invoke(cli.app, [*asked, "--json", str(file)])
    assert done.exit_code == 0, done.output
    return done, json.loads(file.read_text())


def by_peer(result, updates):
    return {r["peer"]: r for r in result["rows"] if r["updates"] == updates and not r["fastest"]}


def test_every_pairing_has_a_row_and_the_fastest_one_more(ran):
    _, result = ran
    every, steady = (list(by_peer(result, updates)) for updates in step.UPDATES)
    assert every == ["strangers Plain", "strangers Restless", "strangers Broken", "nobody Kron",
                     "strangers Plain always", "torch 2.13.0+cpu AdamW"]  # fmt: skip
    assert steady == [name for name in every if not name.endswith("always")]
    assert [r["updates"] for r in result["rows"] if r["fastest"]] == list(step.UPDATES)
    assert {"processor", "load", "torch", "jax"} <= result["machine"].keys()


def test_the_fastest_alone_make_one_table(ran):
    _, result = ran
    _, *lines = step.leaders(result["rows"])
    best = [r for r in result["rows"] if r["fastest"]]
    assert [line[5:7] for line in lines] == [[r["updates"], r["peer"]] for r in best]
    assert all(line[7] == f"{r['ratio']:.2f}" for line, r in zip(lines, best, strict=True))
    (kept,) = step.leaders([{**best[0], "kept": "P"}])[1:]
    assert kept[4] == f"{METHOD}, P kept"


def test_a_row_holds_a_ratio_between_its_quartiles_or_why_there_is_none(ran):
    _, result = ran
    shared = {"set": "gpt-4x256", "framework": "torch", "mode": "eager", "method": METHOD, "dtype": "float32"}
    for r in result["rows"]:
        assert r.items() >= shared.items() and r["ours_ms"] > 0
        low, high = r["ours_quartiles_ms"]
        assert low <= r["ours_ms"] <= high and r["floor_ms"] > 0 and r["floor_ratio"] > 0
        if r["why"]:
            assert r["peer_ms"] is r["ratio"] is r["quartiles"] is None
        else:
            low, high = r["quartiles"]
            assert 0 < low <= r["ratio"] <= high and r["peer_ms"] > 0


def test_who_does_not_run_says_why(ran):
    _, result = ran
    every, steady = (by_peer(result, updates) for updates in step.UPDATES)
    assert {name: r["why"] for name, r in every.items() if r["why"]} == {
        "strangers Broken": "AttributeError: it | never",
        "nobody Kron": ".venv-nobody is missing; `make peers` makes it",
    }
    assert steady["strangers Restless"]["why"].startswith("cannot be kept from fitting: a step changes")
    assert steady["strangers Plain"]["why"] is None


def test_the_tables_and_the_last_line_are_printed_and_nothing_of_what_others_print(ran):
    done, _ = ran
    assert "A step of gpt-4x256, torch, eager, float32" in done.output and "likes to talk" not in done.output
    assert done.output.count("does not run") == 5
    assert done.output.strip().splitlines()[-1].startswith("Ours over the fastest (*) of the same method: every step: ")


def test_a_table_for_a_document_has_every_row_and_marks_the_fastest(ran):
    _, result = ran
    cells = step.cells(result["rows"])
    assert len(cells) - 1 == sum(not r["fastest"] for r in result["rows"])
    assert {len(row) for row in cells} == {8} and not any("|" in cell for row in cells for cell in row)
    assert sum("*" in row[5] for row in cells) == 2


# ---- figures ----------------------------------------------------------------------------------
def test_the_ratio_is_the_median_over_rounds_of_ours_to_the_other():
    made = step.figures(np.array([1.0, 8.0, 3.0, 2.0, 5.0]), np.array([1.0, 2.0, 1.0, 1.0, 1.0]))
    assert (made["ours_ms"], made["peer_ms"], made["ratio"], made["quartiles"]) == (3000.0, 1000.0, 3.0, [2.0, 4.0])
    assert made["ours_quartiles_ms"] == [2000.0, 5000.0]


def test_steady_is_the_average_of_a_period_with_one_fit():
    seen = {"fit": {"a": np.array([35.0]), "b": np.array([1.0])}, "rest": {"a": np.array([1.0])}}
    assert step.averaged(seen, "a", "steady") == [2.0] and step.averaged(seen, "a", "every step") == [35.0]
    assert step.averaged(seen, "b", "steady") is None and step.averaged(seen, "c", "every step") is None


def rows(**seconds):
    """Rows of ours at 2 s, beside others; "adamw" is there for scale."""
    entrants = [Entrant("x:ours"), *(Entrant(f"x:{name}", scale=name == "adamw") for name in seconds)]
    times = {e: np.array([s]) for e, s in zip(entrants, [2.0, *seconds.values()], strict=True) if s}
    names = {e: e.name for e in entrants}
    seen = {"fit": {**times, "floor": np.array([0.5])}}
    return step.rows_of({"set": "s"}, entrants, names, seen, dict.fromkeys(entrants, "ill"), "every step")


def test_the_fastest_is_of_the_same_method_and_runs():
    made = rows(slow=4.0, fast=1.0, ill=None, adamw=0.1)
    assert [(r["peer"], r["ratio"], r["why"]) for r in made] == [
        ("slow", 0.5, None),
        ("fast", 2.0, None),
        ("ill", None, "ill"),
        ("adamw", 20.0, None),
        ("fast", 2.0, None),
    ]
    assert [r["fastest"] for r in made] == [False] * 4 + [True]
    assert {(r["floor_ms"], r["floor_ratio"]) for r in made} == {(500.0, 4.0)}
    assert not any(r["fastest"] for r in rows(ill=None, adamw=0.1))


def test_the_last_line_has_the_median_and_the_worst():
    made = [
        {"fastest": fastest, "updates": updates, "ratio": ratio}
        for fastest, (updates, ratio) in product(
            [False, True], [("every step", 0.5), ("every step", 3.0), ("steady", 0.7)]
        )
    ]
    assert step.summary({"rows": made}) == (
        "Ours over the fastest (*) of the same method: every step: median 1.75, worst 3.00 of 2; "
        "steady: median 0.70, worst 0.70 of 1"
    )
    assert step.summary({"rows": []}).endswith("there is none")


def test_of_large_sets_only_the_fastest_adamw_is_beside():
    small, large = (step.beside("torch", METHOD, SETS[name]) for name in ("gpt-4x256", "gpt-12x768"))
    assert [x.name for x in small if x.scale] == ["AdamW", "AdamW fused", "Muon with AdamW"]
    assert [x.name for x in large if x.scale] == ["AdamW fused"]


@pytest.mark.parametrize(
    ("flag", "value", "known"),
    [("--set", "gpt", "400-small"), ("--framework", "numpy", "jax"), ("--mode", "lazy", "eager"),
     ("--method", "adam", "quad"), ("--dtype", "int8", "bfloat16"), ("--updates", "never", "steady")],
)  # fmt: skip
def test_what_is_unknown_is_refused_at_once(flag, value, known):
    done = CliRunner().invoke(cli.app, ["bench", "step", "--quick", flag, value])
    assert done.exit_code == 2 and f"'{value}'" in done.output and known in done.output
