"""The benchmark of a tiny problem runs, and what it compares with solves the problem too."""

import json

import torch

from benchmarks.cost import tiny


def test_everyone_is_timed(tmp_path, capsys):
    file = tmp_path / "tiny.json"
    tiny.main(["--quick", "--markdown", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [r["who"] for r in rows] == list(tiny.steps()) and rows[0]["ratio"] == 1.0
    assert all(r["ms"] > 0 for r in rows) and capsys.readouterr().out.count("\n| ") == len(rows) + 2


def test_bare_goes_along_the_valley():
    torch.manual_seed(0)
    p = torch.tensor([-1.0, 1.0], requires_grad=True)
    step = tiny.Bare(p).step
    losses = [float(step(lambda: tiny.valley(p)).detach()) for _ in range(500)]
    assert losses[0] == 4.0 and losses[-1] < 1e-3
