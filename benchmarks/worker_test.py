"""A worker gives every step its gradients, times it, and looks at what it keeps; here in the process of the test."""

import json

import jax
import numpy as np
import pytest
import torch

from benchmarks import worker
from benchmarks.sets import ParameterSet

SET = ParameterSet("two", ((3, 4), (4,)), "", pool=2)
HERE = __name__


class Hungry(torch.optim.SGD):
    """Takes its gradients away, keeps what it saw and a hundred numbers more, and needs a thousand for a moment."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, lr)
        self.steps = 0

    @torch.no_grad()
    def step(self):
        super().step()
        self.steps += 1
        room = torch.ones(1000)
        room.add_(1)
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("seen", []).append(p.grad.clone())
            if "fixed" not in self.state[p]:
                fixed = torch.zeros(2, 50)
                self.state[p]["fixed"] = {"low": fixed[0], "high": fixed[1]}
            self.state[p]["itself"] = p
            p.grad.zero_()
            p.grad = None


@pytest.fixture
def spec(tmp_path):
    SET.write_gradients(tmp_path / "g.npy")
    shared = {"shapes": SET.shapes, "gradients": str(tmp_path / "g.npy"), "dtype": "float32"}
    return {**shared, "compiled": True, "wrapped": False}


@pytest.fixture
def hungry(spec):
    return worker.InTorch({**spec, "place": f"{HERE}:Hungry", "settings": {"lr": 1.0}})


@pytest.fixture
def in_jax(spec):
    return worker.InJax({**spec, "place": "optax:adam", "settings": {"learning_rate": 1.0}})


def test_each_step_has_the_next_gradients_whatever_the_optimizer_does_to_them(hungry, spec):
    for _ in range(5):
        hungry.lap()
    pool = np.load(spec["gradients"])
    given = np.stack([torch.cat([x.reshape(-1) for x in xs]).numpy() for xs in zip(*seen(hungry), strict=True)])
    np.testing.assert_array_equal(given, pool[[0, 1, 0, 1, 0]])


def seen(stepping):
    return [stepping.optimizer.state[p]["seen"] for p in stepping.params]


def test_only_the_step_is_timed(hungry, monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(worker, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(hungry, "give", lambda: order.append("given"))
    monkeypatch.setattr(hungry, "step", lambda: order.append("stepped"))
    order = []
    assert hungry.lap() == 4.0 and order == ["given", "stepped"]


def test_state_is_counted_once_and_without_the_parameters(hungry):
    hungry.lap()
    assert hungry.bytes() == 4 * (16 + 2 * 100)


def test_bytes_that_a_step_changes_are_seen():
    a = np.arange(4.0)
    before, after = (list(map(worker.printed, xs)) for xs in ([a, a, a], [a.copy(), a + 1, a[:2], a]))
    assert worker.changed(before, after) == 32 + 16 + 32
    assert worker.printed(np.array(0.0)) != worker.printed(np.array(-0.0))


def test_changes_are_those_of_a_step(in_jax):
    assert in_jax.changes() == 4 + 2 * 4 * 16  # the counter and both moments


def test_the_most_that_a_step_holds_is_that_of_all_its_allocations(hungry):
    hungry.lap()
    assert 4000 <= hungry.peak() <= 4000 + 1000


def test_what_an_operation_calls_is_not_launched_beside_it(spec):
    class Adds(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad)
                p.mul_(2)

    globals()["Adds"] = Adds
    made = worker.InTorch({**spec, "place": f"{HERE}:Adds", "settings": {"lr": 1.0}})
    made.lap()
    nested = made.launches() - 2 * 2
    assert 0 <= nested <= 2  # some releases note the entry into `step` too


def test_muon_takes_the_matrices_and_adamw_the_rest(spec):
    made = worker.InTorch({**spec, "place": ":Muon", "settings": {"lr": 1.0, "weight_decay": 0.0}})
    made.lap()
    kinds = {
        type(each).__name__: [p.ndim for p in each.param_groups[0]["params"]] for each in made.optimizer.optimizers
    }
    assert kinds == {"Muon": [2], "AdamW": [1]}
    assert all(bool(p.any()) for p in made.params) and made.bytes() >= 4 * (12 + 2 * 4)


def test_settings_written_as_data_are_what_torch_wants(spec):
    made = worker.InTorch({**spec, "place": "torch.optim:Adam", "settings": {"lr": 1e-3, "betas": [0.5, 0.6]}})
    assert made.optimizer.defaults["betas"] == (0.5, 0.6)
    assert made._value("torch.bfloat16") is torch.bfloat16


def test_a_jitted_step_moves_the_parameters(in_jax, spec):
    in_jax.lap()
    pool = np.load(spec["gradients"])[0]
    moved = np.concatenate([np.array(x).ravel() for x in in_jax.params.values()])
    np.testing.assert_allclose(moved, -np.sign(pool), atol=1e-3)
    assert in_jax.bytes() == 4 + 2 * 4 * 16 and in_jax.peak() >= 0


def test_steps_that_compile_again_are_told_and_others_are_not(spec, monkeypatch):
    """A rate that is a constant of the compiled step is compiled in."""
    schedule = {**spec, "place": "optax:adam", "settings": {"learning_rate": 1.0}, "scheduled": True}
    figures = worker.InJax(schedule).compile()
    assert figures["again"] == "" and 0 < figures["lowering"] < figures["first"]
    again = worker.InJax(schedule)
    ran = again.jitted
    monkeypatch.setattr(again, "jitted", lambda *xs: jax.jit(lambda *ys: ran(*ys))(*xs))
    monkeypatch.setattr(again, "_lowered", lambda: ran.lower(again.given, again.kept, again.params))
    again.give()
    assert again.compile()["again"] == "3 times"


@pytest.mark.parametrize(("constant", "expected"), [(True, True), (False, False)])
def test_torch_tells_whether_another_rate_compiles_again(spec, constant, expected):
    class Compiled(torch.optim.SGD):
        def __init__(self, params, lr, constant):
            super().__init__(params, lr)
            self.constant = constant
            self.run = torch.compile(lambda p, g, rate: p - rate * g, backend="eager", dynamic=False)

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                rate = group["lr"] if self.constant else torch.tensor(group["lr"])
                for p in group["params"]:
                    p.copy_(self.run(p, p.grad, rate))

    globals()["Compiled"] = Compiled
    settings = {"lr": 1.0, "constant": constant}
    figures = worker.InTorch({**spec, "place": f"{HERE}:Compiled", "settings": settings}).compile()
    assert bool(figures["again"]) is expected and figures["first"] > 0


@pytest.mark.parametrize("kind", ["torch", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bare_products_are_weighed_by_how_often_they_are_made(kind, dtype, monkeypatch):
    products = [(2, 3, 4, 5, 1.0), (1, 6, 4, 2, 0.5)]
    made = worker.KINDS["products"][kind]({"products": products, "dtype": dtype})
    assert made.lap() > 0
    seconds = {products[0][:4]: 2.0, products[1][:4]: 10.0}
    monkeypatch.setattr(made, "seconds", lambda *sides: seconds[sides])
    assert made.lap() == 2.0 + 0.5 * 10.0


def test_an_answer_is_what_was_asked_or_why_there_is_none(hungry):
    asked = worker.Worker()
    asked.at = hungry
    assert len(asked.answer({"do": "lap", "steps": 2})) == 2
    with pytest.raises(ValueError, match="nobody can fly"):
        asked.answer({"do": "fly"})
    assert worker.reason(AttributeError("it never\nran")) == "AttributeError: it never"
    assert worker.release("torch.optim").startswith("torch 2") and worker.release("no_such.part") == "no-such"
    assert json.dumps(asked.answer({"do": "changes"}))
