"""Real tasks: that the search, the runs, what is kept of them and what is reported are what they say."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer

from benchmarks.training import gpt, runs, search, train, train_figures, trainers
from benchmarks.training.records import Records
from benchmarks.training.runs import ADAMW, Trainer
from benchmarks.training.search import EdgeSearch
from benchmarks.training.train import PRODUCT, Races, begun
from psgd.methods import METHODS

TINY, FULL = train.tasks(tiny=True), train.tasks()
BY_NAME = {c.name: c for c in train.trainers()}
METHOD = "KronWhiten"
REFUSED = replace(BY_NAME[METHOD], name="Refused", unfit=lambda model: "it is refused")
BROKEN = Trainer("Broken", lambda *given: [][0], foreign=True)
FEW = [BY_NAME[ADAMW], BY_NAME[METHOD], REFUSED]


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Three trainers instead of all."""
    monkeypatch.setattr(train, "trainers", lambda: FEW)


@pytest.fixture
def no_training(monkeypatch):
    """A run would be a fault, unless it is refused."""

    def fail(task, trainer, *given):
        begun(task, trainer, 0.01, 1)
        pytest.fail("a run that is kept was made again")

    monkeypatch.setattr(train, "trained", fail)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Figures and picture of a quick command."""
    folder = tmp_path_factory.mktemp("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "trainers", lambda: FEW)
        train.command(quick=True, json_file=folder / "all.json", plot=folder / "it.png")
    return json.loads((folder / "all.json").read_text()), (folder / "it.png").read_bytes()


@pytest.fixture
def file(reported, tmp_path):
    """A file with those figures."""
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(reported[0]))
    return path


# ---- the search --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("minimum", "expected"),
    [(-4, [-6, -5, -4, -3]), (-3, [-6, -5, -4, -3, -2]), (-8, [-8, -7, -6, -5, -4, -3]), (9, [-6, -5, -4, -3, -2, -1])],
    ids=["inside", "at the edge", "below", "too far"],
)
def test_a_search_goes_on_where_the_best_is_at_an_edge(minimum, expected):
    asked = []

    def loss(k):
        asked.append(k)
        return abs(k - minimum)

    seen = search.searched(loss, (-6, -5, -4, -3), EdgeSearch((-6, -5, -4, -3), more=2))
    assert list(seen) == expected == sorted(asked), "each once"
    assert search.best(seen) == min(expected, key=lambda k: abs(k - minimum))


def test_the_better_of_two_full_runs_is_told(monkeypatch):
    def losses(task, trainer, lr, steps, seed, marks):
        ending = {0.01: 9.0, 0.1: 2.0}.get(round(lr, 4), 1.0) if steps == 100 else abs(np.log10(lr) + 2.2)
        return [ending + seed] * len(marks)

    monkeypatch.setattr(train, "trained", losses)
    task = replace(FULL["digits"], steps=100, tried=10, seeds=3)
    kept = Records(None)
    row = train.row_of(kept, task, BY_NAME[ADAMW], EdgeSearch())
    assert search.best(row["tried"]) == -4 and (row["k"], row["losses"][-1]) == (-5, 2.0), "the mean of three seeds"
    assert len(list(kept.found("runs", steps=100))) == 2 * 3
    assert train.row_of(kept, task, BY_NAME[ADAMW], EdgeSearch(finals=1))["losses"][-1] == 10.0


# ---- the runs ----------------------------------------------------------------------------
def test_the_rate_rises_and_falls_to_zero_along_lines():
    rates = np.array([train.share(t, 100) for t in range(101)])
    assert rates[0] == pytest.approx(0.1) and rates.argmax() == 9 and rates[100] == 0
    assert rates[9:] == pytest.approx(np.linspace(0.91, 0, 92))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_step_takes_the_same_share_of_the_weights_from_all(name):
    if BY_NAME[name].foreign:
        pytest.importorskip("heavyball")
    run = begun(FULL["digits"], BY_NAME[name], 0.05, 10)
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    assert all(group["initial_lr"] * group["weight_decay"] == pytest.approx(PRODUCT) for group in groups)
    stepped = [id(p) for group in groups for p in group["params"]]
    assert sorted(stepped) == sorted(map(id, run.model.parameters())), "each parameter by one optimizer"


def test_every_method_takes_part_beside_three_others():
    methods = {m.title: m for m in METHODS.values()}
    assert next(iter(BY_NAME)) == ADAMW and BY_NAME.keys() == {ADAMW, "Muon", "SOAP"} | methods.keys()
    assert all(BY_NAME[name].newton == m().recipe().newton for name, m in methods.items())


def test_muon_has_the_matrices_between_and_adamw_the_rest():
    model = FULL["lm"].model()
    own = {id(p) for p in trainers.hidden(model)}
    names = [name for name, p in model.named_parameters() if id(p) in own]
    assert len(names) == 4 * 6 and all(name.startswith("blocks.") for name in names)
    assert [tuple(p.shape) for p in trainers.hidden(train.small_net())] == [(12, 32)]


def test_only_a_matrix_of_all_parameters_is_too_large_for_the_language_model():
    refused = {
        (task.name, method.name): reason
        for task in FULL.values()
        for method in METHODS.values()
        if (reason := trainers.too_large(method, task.model()))
    }
    assert refused == {("lm", "dense_newton"): "its state of 328,560 parameters would be 432 GB"}


@pytest.mark.parametrize("task", TINY.values(), ids=TINY)
@pytest.mark.parametrize("name", [ADAMW, METHOD, "LRANewton"])
def test_a_run_is_the_same_again(task, name):
    def run(there):
        torch.manual_seed(there)
        before = torch.get_rng_state()
        losses = train.trained(task, BY_NAME[name], 0.01, 4, 3, [1, 4])
        assert torch.equal(before, torch.get_rng_state()), "the caller's generator is its own"
        return losses

    with torch.random.fork_rng():
        one, two = map(run, (1, 2))
    assert one == two and len(one) == 2 and one[0] != one[1]


@pytest.mark.parametrize("name", [ADAMW, METHOD])
def test_a_run_learns(name):
    first, last = train.trained(FULL["digits"], BY_NAME[name], 0.03, 30, 0, [1, 30])
    assert last < 0.8 * first


@pytest.mark.parametrize("name", [ADAMW, METHOD])
def test_a_run_that_goes_astray_is_infinitely_bad_from_there(name):
    losses = train.trained(TINY["digits"], BY_NAME[name], 1e30, 20, 0, [1, 10, 20])
    assert len(losses) == 3 and losses[1:] == [math.inf] * 2


# ---- the language model --------------------------------------------------------------------
def test_the_model_does_not_see_what_follows():
    task = TINY["lm"]
    model, (x, y) = task.model(), task.batch(np.random.default_rng(0))
    assert torch.equal(x[:, 1:], y[:, :-1])
    other = x.clone()
    other[:, 5:] = (other[:, 5:] + 1) % gpt.CHARACTERS
    for name, p in model.named_parameters():
        if name.endswith("out.weight"):
            torch.nn.init.normal_(p)
    with torch.no_grad():
        one, two = model(x), model(other)
    assert torch.allclose(one[..., :5], two[..., :5], atol=1e-6) and not torch.allclose(one, two, atol=1e-3)


def test_the_text_is_split_by_files():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in gpt.files()}
    sizes = [len(gpt.text(held=held)) for held in (False, True)]
    assert sum(sizes) == sum(map(len, texts.values())) and sizes[0] > 5 * sizes[1] > 1_000_000
    names = list(texts)
    assert names == sorted(names) and len(texts[names[0]]) + sum(len(texts[n]) for n in names[1:9]) <= sizes[0]
    start = "".join(chr(31 + c) if c else "\n" for c in gpt.text(held=True)[:200].tolist())
    assert start.isascii() and texts[names[gpt.HELD - 1]].startswith(start[:50])


# ---- what is kept --------------------------------------------------------------------------
def test_everything_is_kept(reported):
    result, png = reported
    for name, task in TINY.items():
        runs = [r for r in result["runs"] if r["task"] == name and r["steps"] == task.steps]
        assert [r["optimizer"] for r in runs] == [ADAMW, METHOD]
        assert all(r["marks"] == sorted(set(r["marks"])) and r["marks"][-1] == task.steps for r in runs)
        assert all(math.isfinite(loss) for r in runs for loss in r["losses"])
        tried = [r["lr"] for r in result["runs"] if r["task"] == name and r["steps"] == task.tried]
        assert len(tried) == 2 * 3, "two rates and the one beyond the better"
        (race,) = (r for r in result["races"] if r["task"] == name)
        assert race["seconds"].keys() == {ADAMW, METHOD} and min(race["seconds"].values()) > 0
        assert {"task": name, "optimizer": "Refused", "why": "it is refused"} in result["refused"]
    assert png.startswith(b"\x89PNG") and {"processor", "torch"} <= result["machine"].keys()


def test_a_command_that_was_ended_goes_on(reported, file, monkeypatch):
    result, made, train_one = reported[0], [], train.trained
    monkeypatch.setattr(train, "trained", lambda *given: made.append(given[1].name) or train_one(*given))
    gone = next(r for r in result["runs"] if r["optimizer"] == METHOD and r["steps"] == TINY["lm"].steps)
    file.write_text(json.dumps(result | {"runs": [r for r in result["runs"] if r is not gone]}))
    train.command(quick=True, resume=file)
    assert [name for name in made if name != "Refused"] == [METHOD]
    again = json.loads(file.read_text())
    assert again["runs"][-1] == gone and len(again["runs"]) == len(result["runs"]) and again["races"] == result["races"]


def test_what_is_complete_is_only_told(reported, file, no_training, monkeypatch, capsys):
    monkeypatch.setattr(train, "race", lambda *given: pytest.fail("no race is missing"))
    train.command(quick=True, resume=file, markdown=True)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"| {ADAMW} ") and "100 %" in line for line in lines) == 2
    assert sum("it is refused" in line for line in lines) == 2
    assert json.loads(file.read_text()) == reported[0]


def test_seconds_alone_are_taken_anew(reported, file, no_training):
    train.command("lm", quick=True, resume=file, only_seconds=True)
    before, after = reported[0], json.loads(file.read_text())
    assert after["runs"] == before["runs"]
    changed = {task for task in TINY for r in after["races"] if r["task"] == task and r not in before["races"]}
    assert changed == {"lm"} and len(after["races"]) == 2


def test_seconds_alone_need_runs(tmp_path):
    with pytest.raises(typer.Exit):
        train.command(quick=True, only_seconds=True)
    with pytest.raises(typer.Exit):
        train.command("lm", quick=True, only_seconds=True, resume=tmp_path / "nothing.json")


def test_races_that_not_all_were_in_are_run_again(reported):
    kept = Records(None, json.loads(json.dumps(reported[0])))
    rows = [{"name": ADAMW, "lr": 0.01}]
    seen = train.raced(kept, TINY["lm"], rows, Races(2, 1, 0))
    assert [race.keys() for race in seen] == [{ADAMW}] * 2 and len(list(kept.found("races", task="digits"))) == 1


def test_a_foreign_fault_is_its_own_and_ours_is_not(monkeypatch):
    kept, edge = Records(None), EdgeSearch((-4,), 0)
    monkeypatch.setattr(train, "trainers", lambda: [BROKEN])
    assert train.rows_of(kept, TINY["digits"], edge) == []
    assert "IndexError" in kept.result["refused"][0]["why"]
    monkeypatch.setattr(train, "trainers", lambda: [replace(BROKEN, foreign=False)])
    with pytest.raises(IndexError):
        train.rows_of(kept, TINY["digits"], edge)


def test_what_is_not_installed_says_so(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(trainers, "import_module", missing)
    with pytest.raises(runs.Unfit, match="heavyball is not installed"):
        begun(TINY["digits"], BY_NAME["SOAP"], 0.01, 2)


# ---- what is reported ------------------------------------------------------------------------
def test_a_loss_is_reached_between_two_marks():
    marks, losses = [10, 20, 30, 40], [4.0, 3.0, 1.0, 2.0]
    assert train.reached(marks, losses, 2.0) == 25
    assert train.reached(marks, losses, 4.5) == 10 and train.reached(marks, losses, 3.0) == 20
    assert math.isnan(train.reached(marks, losses, 0.9))
    assert train.reached(marks, [math.inf, 3.0, 1.0, 1.0], 3.5) == 20
    assert math.isnan(train.reached(marks, [math.inf] * 4, math.inf))


def figures(name, share, slower, *losses):
    row = {
        "name": name,
        "k": -4,
        "lr": 0.01,
        "tried": {-5: 2.0, -4: 1.0, -3: 2.0},
        "marks": list(range(1, len(losses) + 1)),
        "losses": losses,
    }
    return row | {"seconds": 0.5, "share": share, "slower": slower}


def test_the_table_has_shares_of_adamw_and_reasons():
    rows = [
        figures(ADAMW, 1.0, 1.0, 3.0, 2.0),
        figures("Fast", 0.5, 1.5, 2.0, 1.0),
        figures("Bad", math.nan, 2.0, 9, math.inf),
    ]
    head, *lines = train_figures.cells(rows, [{"optimizer": "None", "why": "too large"}])
    assert [line[0] for line in lines] == ["Fast", ADAMW, "Bad", "None"]
    assert all(len(line) == len(head) for line in lines)
    assert lines[0][1:] == ["0.01", "3", "1.000", "50 %", "1.50×", "75 %"]
    assert train_figures.cells([rows[1] | {"tried": {-5: 2.0, -4: 1.0}}], [])[1][1] == f"0.01{train_figures.EDGE}"
    assert lines[2][3:] == ["astray", train_figures.NEVER, "2.00×", train_figures.NEVER] and "too large" in lines[3]


def test_shares_and_seconds_are_those_of_the_runs_and_the_races(reported, no_training):
    kept, task = Records(None, reported[0]), TINY["digits"]
    kept.result["races"] = [
        {"task": task.name, "number": i, "seconds": {ADAMW: s, METHOD: s * ratio}}
        for i, (s, ratio) in enumerate([(1.0, 2.0), (3.0, 2.5), (2.0, 9.0)])
    ]
    first, other = train.compared(kept, task, EdgeSearch((-5, -4), 1, 1), Races(3))
    assert (first["slower"], other["slower"], other["seconds"]) == (1.0, 2.5, 2.0)
    assert first["share"] == 1.0
    assert other["share"] == train.reached(other["marks"], other["losses"], first["losses"][-1]) / task.steps


def test_lines_of_the_picture_are_told_apart_and_the_best_are_strong():
    rows = [figures(name, 1.0, 1.0, 9.0, float(len(name) + i / 99)) for i, name in enumerate(BY_NAME)]
    styles = train_figures.line_styles(rows)
    assert len({str(x) for x in styles.values()}) == len(BY_NAME)
    strong = {name for name, x in styles.items() if x["linewidth"] > 2}
    assert strong == {ADAMW, *sorted(BY_NAME.keys() - {ADAMW}, key=lambda n: len(n) + list(BY_NAME).index(n) / 99)[:3]}
