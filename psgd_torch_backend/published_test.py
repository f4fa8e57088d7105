"""Programs and calls as quad_torch 0.4.5 and psgd_jax 0.2.9 take them, with the import alone changed.

quad_torch exports `QUAD`. `Procrustes` takes the arguments that it does, and psgd_jax's `hessian_helper` and
`precond_update_prob_schedule` are here too.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from psgd_torch_backend import PSGD, QUAD, LowRankApproximation, Procrustes, XMat, hessian_helper

# Each argument in its published place, with a value that is not its default.
OF_QUAD = {
    "lr": 0.3,
    "lr_style": None,
    "momentum": 0.5,
    "weight_decay": 0.25,
    "max_size_dense": 5,
    "max_skew_dense": 2.0,
    "preconditioner_lr": 0.4,
    "noise_scale": 1e-3,
    "dtype": torch.float64,
}


def stepped(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 40).reshape(4, 10)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def model() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Linear(10, 10)


@pytest.mark.parametrize("made", [QUAD, Procrustes])
def test_each_argument_has_its_published_place(made: type[PSGD]):
    assert list(inspect.signature(made).parameters)[: 1 + len(OF_QUAD)] == ["params", *OF_QUAD]
    ours, theirs, other = model(), model(), model()
    by_place, by_name = made(ours.parameters(), *OF_QUAD.values()), made(theirs.parameters(), **OF_QUAD)
    group = by_place.param_groups[0]
    assert {k: group[k] for k in OF_QUAD} == OF_QUAD | {"dtype": "float64"}
    runs = [stepped(*run) for run in ((by_place, ours), (by_name, theirs), (made(other.parameters()), other))]
    assert all(map(torch.equal, runs[0], runs[1])) and not any(map(torch.equal, runs[0], runs[2]))


def test_the_program_of_quad_torch():
    model = torch.nn.Linear(10, 10)
    optimizer = QUAD(
        model.parameters(),
        lr=0.001,
        lr_style="adam",
        momentum=0.95,
        weight_decay=0.1,
        max_size_dense=8192,
        max_skew_dense=1.0,
        preconditioner_lr=0.7,
        noise_scale=1e-9,
        dtype=torch.bfloat16,
    )
    start = [p.detach().clone() for p in model.parameters()]
    assert not any(map(torch.equal, stepped(optimizer, model), start))
    assert {q.dtype for q in optimizer.state[model.weight]["Q"].values()} == {torch.bfloat16}


# ---- the three numbers of psgd_jax's README -------------------------------------------------
def loss_fn(params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.sum((params - x) ** 2)


@pytest.mark.parametrize("made", [XMat, LowRankApproximation])
def test_the_whitening_program(made: type[PSGD]):
    """With the rank of 10 that three numbers are too few for."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer, losses = made([p], lr=1.0, b1=0.0), []
    while len(losses) < 200 and (not losses or losses[-1] > 1e-4):
        optimizer.zero_grad()
        loss = loss_fn(p, torch.zeros(3))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == 14 and losses[-1] < 1e-4


@pytest.mark.parametrize("released", [False, True], ids=["as the README has it", "as the package has it"])
@pytest.mark.parametrize("made", [XMat, LowRankApproximation])
def test_the_hessian_program(made: type[PSGD], released: bool):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer, losses = made([p], lr=1.0, b1=0.0), []
    while len(losses) < 200 and (not losses or losses[-1] > 1e-4):
        step = [len(losses)] if released else []
        loss, p.grad, hvp, vector, update_precond = hessian_helper(
            len(losses),
            *step,
            loss_fn,
            p,
            loss_fn_extra_args=(torch.zeros(3),),
            has_aux=False,
            preconditioner_update_probability=1.0,
        )
        optimizer.step(Hvp=hvp, vector=vector, update_preconditioner=update_precond)
        losses.append(loss.item())
    assert losses[0] == 14 and losses[-1] < 1e-4


@pytest.mark.parametrize("made", [LowRankApproximation])
def test_a_capped_rank_is_told_saved_and_loaded(made: type[PSGD]):
    """Also where a parameter of the group is frozen, and counts for nothing."""

    def begun() -> tuple[PSGD, torch.nn.Parameter]:
        p, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(20), requires_grad=False)
        return made([("p", p), ("q", frozen)], lr=0.1), p

    optimizer, p = begun()
    assert made([torch.nn.Parameter(torch.ones(3))]).summary().rows[0].factors == ("3x2", "3x2", "3")
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["Q"]["0"].shape == (3, 2)
    other, q = begun()
    other.load_state_dict(optimizer.state_dict())
    for o, x in ((optimizer, p), (other, q)):
        x.grad = torch.ones(3)
        x.data.fill_(1.0)
        o.step()
    assert torch.equal(p, q)


# ---- hessian_helper -------------------------------------------------------------------------
def loss_and_aux(params: Any, scale: float = 1.0) -> tuple[torch.Tensor, str]:
    return scale * (params**3).sum(), "aux"


ONES = torch.ones(3)
HELPED: list[tuple[tuple, dict]] = [
    ((0, loss_and_aux, ONES, (2.0,), True, 0.01), {}),
    ((torch.tensor(1), loss_and_aux, ONES, (2.0,)), {"has_aux": True, "preconditioner_update_probability": 0.01}),
    ((), {"train_step": 0, "loss_fn": loss_and_aux, "params": ONES, "loss_fn_extra_args": (2.0,), "has_aux": True}),
    ((loss_and_aux, ONES, (2.0,), True, 1.0), {}),
    ((loss_and_aux,), {"params": ONES, "loss_fn_extra_args": (2.0,), "has_aux": True, "train_step": 1}),
]


@pytest.mark.parametrize(("args", "named"), HELPED)
def test_the_helper_with_and_without_a_step(args: tuple, named: dict):
    """The first two steps update whatever the probability is."""
    (loss, aux), grads, hvp, v, update = hessian_helper(1, *args, **named)
    assert update is True and loss == 6.0 and aux == "aux"
    assert torch.allclose(grads, torch.full((3,), 6.0)) and torch.allclose(hvp, 12 * v) and v.all()


NONSENSE = [
    ((ONES, loss_and_aux), "train_step is of type Tensor and must be a whole number, from 0"),
    ((0.5, loss_and_aux, ONES), "train_step is 0.5 and must be a whole number, from 0"),
    ((0, ONES, loss_and_aux), "loss_fn is of type Tensor and must be a function"),
    ((), "loss_fn is of type NoneType and must be a function"),
]


@pytest.mark.parametrize(("args", "text"), NONSENSE)
def test_nonsense_is_one_sentence(args: tuple, text: str):
    orders = r"; give \(key, loss_fn, params, ...\) or \(key, train_step, loss_fn, params, ...\)$"
    with pytest.raises(TypeError, match=f"^hessian_helper: {text}{orders}"):
        hessian_helper(0, *args)
