"""Rates that carry over: that the search, the runs and what is reported of them are what they say."""

import io
import json
import math
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from benchmarks.training import search, transfer, transfer_figures
from benchmarks.training.runs import ADAMW
from benchmarks.training.search import OutwardSearch
from benchmarks.training.transfer import QUICK, TASKS, Setup, adamw, ours
from psgd.methods import METHODS

pytestmark = pytest.mark.xdist_group("transfer")  # what they look at is made once

DIGITS, CHARACTERS = TASKS
METHOD = "Kron"


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The figures of a quick run, what it printed, and its picture."""
    folder = tmp_path_factory.mktemp("transfer")
    given = ["--json", str(folder / "all.json"), "--picture", str(folder / "it.png")]
    with redirect_stdout(io.StringIO()) as out:
        transfer.main(["--quick", "--markdown", *given])
    return json.loads((folder / "all.json").read_text()), out.getvalue().splitlines(), (folder / "it.png").read_bytes()


def curve(k_to_loss):
    """A loss by k, infinite where none is given, that remembers what it was asked."""
    asked = []

    def loss(k):
        asked.append(k)
        return k_to_loss.get(k, math.inf)

    return loss, asked


# ---- the search --------------------------------------------------------------------------
def test_a_search_ends_where_both_sides_are_worse():
    loss, asked = curve({-6: 9.0, -5: 2.0, -4: 1.0, -3: 1.01, -2: 1.3, -1: 0.5})
    seen = search.searched(loss, [-5], OutwardSearch())
    assert list(seen) == [-5, -4, -3, -2] and sorted(asked) == list(seen), "each once, and not beyond a rise"
    assert search.best(seen) == -4 and search.good(seen) == [-4, -3]


def test_all_rates_between_those_begun_with_are_tried():
    loss, _ = curve({-6: 3.0, -5: 5.0, -4: 4.0, -3: 1.0})
    assert list(search.searched(loss, range(-6, -2), OutwardSearch())) == [-6, -5, -4, -3, -2]


def test_a_search_of_a_flat_loss_ends():
    seen = search.searched(lambda k: 1.0, [-4], OutwardSearch(1_000))
    assert list(seen) == list(range(search.LOWEST, search.HIGHEST + 1))
    assert len(search.searched(lambda k: 1.0, [-4], OutwardSearch(3))) == 3


def test_a_good_range_is_unbroken():
    assert search.good({-5: 1.0, -4: 2.0, -3: 0.99, -2: 1.0, -1: 3.0}) == [-3, -2]


# ---- the runs ----------------------------------------------------------------------------
def test_trainers_are_all_methods_and_newtons_only_with_momentum():
    found = transfer.trainers(Setup())
    assert {c.name for c in found} == {ADAMW, *(m.title for m in METHODS.values() if m.name != "dense_newton")}
    assert all(c.settings["momentum"] == 0.9 for c in found if c.newton)
    both = [c.name for c in found if sum(c.name == other.name for other in found) == 2]
    assert set(both) == {"KronWhiten", "LRAWhiten"}
    assert all(c.default == torch.optim.AdamW([torch.zeros(1)]).defaults["lr"] for c in found if c.name == ADAMW)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_batches_are_those_of_the_seed_and_none_is_held_out(task):
    (x, y), (again, _) = (task.batch(np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(x, again) and len(x) == len(y)
    held = {tuple(row.flatten().tolist()) for row in task.held()[0]}
    shown = {tuple(row.flatten().tolist()) for row in x}
    assert not held & shown and len(held) > len(shown)


def test_targets_are_the_characters_that_follow():
    x, y = CHARACTERS.batch(np.random.default_rng(0))
    assert torch.equal(x[:, 1:], y[:, :-1]) and x.shape[1] == transfer.CONTEXT
    assert set(x.unique().tolist()) <= set(range(transfer.CHARACTERS))


def test_the_transformer_does_not_see_what_follows():
    model, (x, _) = CHARACTERS.model(), CHARACTERS.batch(np.random.default_rng(0))
    other = x.clone()
    other[:, 20:] = (other[:, 20:] + 1) % transfer.CHARACTERS
    with torch.no_grad():
        one, two = model(x), model(other)
    assert torch.allclose(one[..., :20], two[..., :20], atol=1e-5) and not torch.allclose(one, two, atol=1e-2)


@pytest.mark.parametrize("trainer", [adamw(), ours(METHODS["procrustes"])], ids=lambda c: c.label)
def test_a_run_is_the_same_again_and_learns(trainer):
    random = torch.get_rng_state()
    short, again, long = (transfer.trained(DIGITS, trainer, 0.03, 0.0, steps, 0) for steps in (2, 2, 25))
    assert (short == again).all() and long[0] < 0.8 * short[0]
    assert torch.equal(random, torch.get_rng_state()), "the caller's generator is its own"


def test_a_run_that_goes_astray_is_infinitely_bad():
    assert transfer.trained(DIGITS, adamw(), 1e30, 0.0, 4, 0)[0] == math.inf
    assert transfer.trained(DIGITS, ours(METHODS["procrustes"]), 1e30, 0.0, 14, 0)[0] == math.inf


# ---- what is reported ------------------------------------------------------------------------
def test_every_figure_is_there(reported):
    result, lines, png = reported
    by_task = {task.name: {r["optimizer"] for r in result["curves"] if r["task"] == task.name} for task in TASKS}
    assert by_task["digits"] == {c.label for c in transfer.trainers(QUICK)}
    assert by_task["characters"] == {c.label for c in transfer.trainers(QUICK) if not c.newton} < by_task["digits"]
    assert all(math.isfinite(loss) for r in result["curves"] for loss in r["losses"])
    assert sum(line.startswith(f"| {ADAMW} ") for line in lines) == 1 + 2
    assert png.startswith(b"\x89PNG")
    assert {"processor", "torch"} <= result["machine"].keys()


def test_the_tables_are_printed(reported, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "measure", lambda setup, progress: reported[0])
    transfer.main([])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"{ADAMW} ") for line in lines) == 1 + 2
    assert any("Length of the weights" in line for line in lines)


def test_the_product_of_rate_and_decay_is_what_shrinks_weights(reported):
    """Of the quick run's four steps, at any rate of any optimizer; the same decay shrinks less at a lower rate."""
    rows = reported[0]["decay"]
    assert len(rows) == 2 * (1 + transfer.DECAYING) and rows[0]["optimizer"] == ADAMW
    lengths = [r["product"]["length"] for r in rows]
    assert max(lengths) - min(lengths) < 0.03 and max(lengths) < 0.5
    for fast, slow in zip(rows[::2], rows[1::2], strict=True):
        assert slow["optimizer"] == fast["optimizer"] and slow["k"] == fast["k"] - 1
        assert slow["same"]["length"] > 1.5 * fast["same"]["length"]


def test_weight_decay_is_that_of_good_methods_with_a_rate_of_their_own():
    def row(optimizer, best, loss):
        return {"optimizer": optimizer, "best": best, "adamw": -3, "losses": [9.0, loss]}

    among = [adamw(), *(ours(METHODS[name]) for name in ("kron", "quad", "kwns4", "kron_newton"))]
    rows = [
        row(c.label, *figures) for c, figures in zip(among, [(-3, 1), (-4, 3), (-3, 1), (-4, 2), (-1, 0)], strict=True)
    ]
    assert [c.name for c in transfer.decaying(rows, among)] == [ADAMW, "KWNS4", "Kron"]
    rows[3]["best"] = -3
    assert [c.name for c in transfer.decaying(rows, among)] == [ADAMW, "Kron", "QUAD"]


def test_cells_tell_ratios_to_adamw():
    row = {"task": "digits", "optimizer": ADAMW, "losses": [2.0, 1.0], "best": -4, "good": [-4, -4], "adamw": -4}
    other = row | {"optimizer": METHOD, "best": -5, "good": [-6, -5], "losses": [0.5, 0.6]}
    head, one, two = transfer_figures.curves_cells({"curves": [row, other]})
    assert head[1:] == ["digits: best lr", "digits: ratio", "digits: within 5%", "digits: loss"]
    assert one == [ADAMW, "0.01", "1×", "0.01", "1.000"]
    assert two == [METHOD, "0.0032", "0.32×", "0.001 to 0.0032", "0.500"]


def test_lines_of_the_picture_are_told_apart():
    styles = [str(transfer_figures.line_style(name)) for name in (ADAMW, *transfer_figures.TITLED)]
    assert len(set(styles)) == len(styles)
