"""Our optimizers are timed beside others, of which any may be missing or broken. None of them is needed here."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import peers
from benchmarks.peers import GPT, Entrant, Racer

HERE = __name__


class Stub(torch.optim.SGD):
    """A peer that compiles nothing, prints, and takes its gradients away as some do."""

    seen: ClassVar[list] = []

    def __init__(self, params, lr, weight_decay, share=None):
        print("a peer that likes to talk")
        super().__init__(params, lr)
        self.seen.append(share)

    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.zero_()
                p.grad = None


class Broken(Stub):
    def step(self):
        raise AttributeError("it | never\nran")


STUBS = {
    "kron": (Entrant(f"{HERE}:Stub", probability="share"), Entrant("no_such_package:Kron")),
    "quad": (Entrant(f"{HERE}:Broken"),),
    "procrustes": (),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "peers.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PEERS", STUBS)
        peers.main(["--quick", "--json", str(path)])
    return json.loads(path.read_text())


@pytest.fixture
def tiny():
    return GPT(layers=1, width=2, vocabulary=8, context=3)


def test_every_method_is_beside_adamw_and_its_peers_and_steady_only_where_it_may_fit_rarely(result):
    adamw, stubs = list(map(str, peers.ADAMW)), {k: list(map(str, v)) for k, v in STUBS.items()}
    expected = [("every step", method, peer) for method in peers.OURS for peer in adamw + stubs[method]]
    expected += [("steady", "kron", peer) for peer in adamw + stubs["kron"]]
    assert [(r["updates"], r["method"], r["peer"]) for r in result["rows"]] == expected
    shared = {"set": str(peers.QUICK.model), "framework": "torch", "mode": "eager"}
    assert all(r.items() >= shared.items() for r in result["rows"])


def test_no_two_entrants_have_one_name():
    names = [str(entrant) for entrant in (*peers.ADAMW, *(p for beside in peers.PEERS.values() for p in beside))]
    assert len({*names, *peers.OURS}) == len(names) + len(peers.OURS)


def test_a_row_holds_a_ratio_between_its_quartiles_or_why_there_is_none(result):
    whys = {r["peer"]: r["why"] for r in result["rows"] if r["why"]}
    assert whys == {
        "no-such-package Kron": "ModuleNotFoundError: No module named 'no_such_package'",
        str(STUBS["quad"][0]): "AttributeError: it | never",
    }
    for r in result["rows"]:
        if r["why"]:
            assert r["ours_ms"] is r["peer_ms"] is r["ratio"] is r["quartiles"] is None
        else:
            low, high = r["quartiles"]
            assert 0 < low <= r["ratio"] <= high
            assert r["ours_ms"] > 0 and r["peer_ms"] > 0


def test_the_machine_and_the_setup_are_told_and_one_thread_was_used(result):
    assert result["machine"]["torch_threads"] == 1
    assert result["setup"]["model"] == {"layers": 1, "width": 8, "vocabulary": 32, "context": 4}


@pytest.mark.parametrize("flags", [[], ["--markdown"], ["--compiled"]])
def test_the_table_is_printed_with_what_failed(result, flags, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(peers, "measure", lambda console, quick, compiled: asked.append(compiled) or result)
    peers.main(["--quick", *flags])
    out = capsys.readouterr().out
    assert asked == ["--compiled" in flags]
    assert out.count("does not run") == 3 and "likes to talk" not in out
    if "--markdown" in flags:
        assert {line.count("|") for line in out.splitlines() if line.startswith("|")} == {9}


def test_the_shapes_are_those_of_a_gpt():
    shapes = GPT().shapes()
    assert shapes.count((256,)) == 4 * (4 + 2) + 2 and len(shapes) == 2 + 4 * 12 + 2
    assert {s: shapes.count(s) for s in shapes if len(s) == 2} == {
        (8192, 256): 1,
        (768, 256): 4,
        (256, 256): 4 + 1,
        (1024, 256): 4,
        (256, 1024): 4,
    }
    model = torch.nn.TransformerEncoderLayer(256, nhead=4, dim_feedforward=1024)
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(shapes[2:14])


def test_gradients_differ_from_step_to_step_and_have_a_scale_for_every_index(tiny):
    pool = tiny.gradients()
    assert len(pool) == peers.POOL
    assert [tuple(g.shape) for g in pool[0]] == tiny.shapes()
    assert {g.dtype for g in pool[0]} == {torch.float32}
    assert not any(torch.equal(a, b) for a, b in zip(pool[0], pool[1], strict=True))
    rms = torch.stack([g[0] for g in GPT(1, 64, 2048, 4).gradients()]).square().mean((0, 2)).sqrt()
    assert 4 < rms.max() / rms.min() < 1.5 * np.exp(2)


def test_a_racer_leaves_the_pool_as_it_was_and_gives_each_set_in_turn(tiny):
    pool = tiny.gradients()
    before = [[g.clone() for g in gradients] for gradients in pool]
    racer = Racer(Entrant(f"{HERE}:Stub"), tiny, pool, compiled=False, fits_every=1)
    for _ in range(2 * len(pool) - 3):
        racer.lap()
    assert all(torch.equal(a, b) for x, y in zip(pool, before, strict=True) for a, b in zip(x, y, strict=True))
    for p, *gradients in zip(racer.params, *pool, strict=True):
        torch.testing.assert_close(p.detach(), -2 * peers.COMMON["lr"] * torch.stack(gradients).sum(0))


@pytest.mark.parametrize("updates", peers.UPDATES)
def test_those_that_may_fit_rarely_are_told_how_often(tiny, updates, monkeypatch):
    monkeypatch.setattr(peers, "OURS", {"kron": Entrant(f"{HERE}:Stub", note="ours", probability="share")})
    monkeypatch.setattr(peers, "PEERS", STUBS)
    monkeypatch.setattr(Stub, "seen", [])
    setup = peers.Setup(tiny, dict.fromkeys(peers.UPDATES, 1))
    peers.raced(setup, tiny.gradients(), "eager", updates, Console(quiet=True))
    assert Stub.seen == 2 * [{"every step": 1, "steady": 1 / 34}[updates]]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_race_compiles_ours_by_its_flag_and_adamw_by_its_step(tiny, compiled, monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda step: wrapped.append(step) or step)
    params = [torch.nn.Parameter(torch.zeros(2))]
    ours = peers.OURS["kron"].stepping(params, compiled=compiled, share=1.0).__self__
    assert ours.param_groups[0]["compile"] is compiled and not wrapped
    peers.ADAMW[0].stepping(params, compiled=compiled, share=1.0)
    assert len(wrapped) == compiled


def test_the_compiler_is_held_off_others_too(monkeypatch):
    ran = []

    def backend(graph, inputs):
        ran.append("compiled")
        return graph.forward

    doubled = torch.compile(lambda x: 2 * x, backend=backend)
    with peers.compiler("eager"):
        assert doubled(torch.ones(1)) == 2 and not ran
    with peers.compiler("compiled"):
        assert doubled(torch.ones(1)) == 2 and ran == ["compiled"]


def test_all_take_turns_step_by_step_in_changing_order():
    order = []

    class Fake:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def lap(self):
            order.append(self.name)
            return next(self.seconds)

    seen = peers.race({"a": Fake("a", [1, 3, 5, 7]), "b": Fake("b", [2, 2, 4, 4])}, rounds=2, steps=2)
    assert "".join(order) == "abbaabba"
    np.testing.assert_array_equal(seen["a"], [2, 6])
    np.testing.assert_array_equal(seen["b"], [2, 4])


def test_the_ratio_is_the_median_over_rounds_of_ours_to_the_other():
    made = peers.figures(np.array([1.0, 8.0, 3.0, 2.0, 5.0]), np.array([1.0, 2.0, 1.0, 1.0, 1.0]))
    assert made == {"ours_ms": 3000.0, "peer_ms": 1000.0, "ratio": 3.0, "quartiles": [2.0, 4.0]}
