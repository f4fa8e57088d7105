"""The cost of rare fits is measured over whole periods, and told."""

import json

import pytest

from benchmarks.cost import amortised
from benchmarks.layers import Layers
from psgd.methods import METHODS
from psgd.pipeline import host_plan
from psgd.schedule import Annealed

pytestmark = pytest.mark.xdist_group("amortised")  # what they look at is made once


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "amortised.json"
    amortised.main(["--quick", "--json", str(path)])
    return json.loads(path.read_text())


def test_methods_that_fit_more_and_more_rarely_are_measured_in_both_frameworks(result):
    assert amortised.annealed() == {"kron": Annealed()}
    assert [(r["method"], r["framework"], r["period"]) for r in result["rows"]] == [
        ("kron", "torch", 34),
        ("kron", "jax", 34),
    ]
    for r in result["rows"]:
        low, high = r["quartiles"]
        assert 0 < low <= r["ratio"] <= high
    assert {"processor", "torch", "jax"} <= result["machine"].keys()


@pytest.mark.parametrize("flags", [[], ["--markdown"]])
def test_the_table_is_printed(result, flags, monkeypatch, capsys):
    monkeypatch.setattr(amortised, "measure", lambda console, quick: result)
    amortised.main(["--quick", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert sum("kron" in line and "34 steps" in line and "2 of 8 x 8" in line for line in lines) == 2


def test_one_step_of_every_period_fits():
    schedule = Annealed()
    method = METHODS["kron"].of(preconditioner_update_probability=schedule.min_prob)
    fits, since = [], 0
    for step in range(1, 103):
        since += 1
        if host_plan(method.schedule(), step, since=since).fit:
            fits.append(step)
            since = 0
    assert fits == [34, 68, 102]


def test_an_average_is_over_its_steps(monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(amortised, "perf_counter", lambda: next(clock))
    done = []
    assert amortised.average(lambda: done.append(1), 8) == 0.5
    assert len(done) == 8


def test_both_schedules_run_in_both_frameworks_with_their_probabilities(monkeypatch):
    seen = {}
    monkeypatch.setattr(amortised, "torch_run", lambda make, layers: make.keywords)
    monkeypatch.setattr(amortised, "jax_run", lambda tx, layers: layers)
    for name, start in amortised.runs(METHODS["kron"], Layers(2, 4), 0.25).items():
        seen[name] = start()
    assert list(seen) == ["torch/always", "jax/always", "torch/rarely", "jax/rarely"]
    assert seen["torch/always"] == {amortised.PROBABILITY: 1.0}
    assert seen["torch/rarely"] == {amortised.PROBABILITY: 0.25}
    assert seen["jax/rarely"] == seen["jax/always"] == Layers(2, 4)
