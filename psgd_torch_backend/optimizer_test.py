"""The PyTorch optimizers: trained with, saved, copied, compiled, misused."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from psgd import noise
from psgd._xp import namespace
from psgd.hyperparameters import group_key
from psgd.methods import METHODS
from psgd.recipe import Recipe
from psgd.schedule import precond_update_prob_schedule
from psgd_torch_backend import PSGD, Affine, Kron, KronWhiten, Procrustes
from psgd_torch_backend._groups import SKIPS
from psgd_torch_backend._noise import BLOCK, CachedDraws
from psgd_torch_backend._per_tensor import ROOM, PerTensor
from psgd_torch_backend._testing import (
    CLASSES,
    RECIPES,
    SHAPES,
    Bars,
    assert_untouched,
    close,
    descend,
    equal,
    flat,
    flat_all,
    give_gradients,
    newton,
    normal,
    of_rank,
    parameters,
    run,
    step,
)
from psgd_torch_backend.named import named_class


# ---- use ------------------------------------------------------------------------------------
def test_code_for_quad_torch_runs_and_trains():
    model = Bars()
    optimizer = Procrustes(
        model.parameters(),
        lr=0.001,
        lr_style="adam",
        momentum=0.95,
        weight_decay=0.1,
        max_size_dense=16384,
        max_skew_dense=1.0,
        preconditioner_lr=0.7,
        preconditioner_init_scale=None,
        noise_scale=1e-9,
        dtype=torch.bfloat16,
    )
    optimizer.param_groups[0]["lr"] = 0.1  # there are a hundred steps only
    start = model.loss(0).item()
    for t in range(1, 121):
        optimizer.zero_grad()
        model.loss(t).backward()
        optimizer.step()
    assert model.loss(0).item() < 0.6 * start  # 0.46 was seen; 0.2 with state in float32
    for p in model.parameters():
        assert p.dtype == torch.float32
        tensors = flat(optimizer.state[p])
        assert tensors.pop("step") == 120
        wanted = {k: torch.float32 if k.startswith("L") else torch.bfloat16 for k in tensors}
        assert {k: x.dtype for k, x in tensors.items()} == wanted
    assert [tuple(q.shape) for q in optimizer.state[model.conv.weight]["Q"].values()] == [(4, 4), (9,)]


def test_every_method_trains(optimizer_class: type[PSGD]):
    model = Bars()
    rate = {"LowRankApproximation": 0.03}.get(optimizer_class.__name__, 0.1)
    optimizer, start = optimizer_class(model.parameters(), lr=rate), model.loss(0).item()
    for t in range(1, 81):
        descend(optimizer, lambda t=t: model.loss(t))
    assert model.loss(0).item() < 0.5 * start  # 0.36 at most was seen


@pytest.mark.contract("torch: groups")
def test_signature_and_defaults_are_those_of_the_method(optimizer_class: type[PSGD]):
    method = optimizer_class.method
    signature = inspect.signature(optimizer_class).parameters
    defaults = {group_key(f): f.default for f in fields(method)}
    assert defaults.items() <= {k: p.default for k, p in signature.items()}.items()
    optimizer = optimizer_class(parameters((2,)))
    kept = optimizer.defaults if "scanned_layers" in signature else optimizer.defaults | {"scanned_layers": None}
    told = {k: p.default for k, p in signature.items() if k != "params"}
    assert {"scanned_layers": None} | told == kept and ("scanned_layers" in told) is not method().recipe().joint
    assert method.summary in optimizer_class.__doc__ and optimizer_class.__module__ == "psgd_torch_backend"


def test_state_is_nested_dictionaries_of_tensors(tensor_class: type[PSGD]):
    params = parameters((4, 3), (2, 3, 2), ())
    optimizer = tensor_class(params, momentum=0.9)
    run(optimizer, params, range(2))
    for p in params:
        entry = optimizer.state[p]
        counted = ["since"] if tensor_class.method().schedule().counts else []
        assert list(entry) == ["step", *counted, "momentum", "Q", "L"] and entry["momentum"].shape == p.shape
        assert list(entry["Q"]) == list(entry["L"]) == [str(i) for i in range(len(entry["Q"]))]
        assert all(isinstance(x, Tensor) for x in flat(entry).values()) and int(entry["step"]) == 2


def test_weight_decay_is_decoupled(optimizer_class: type[PSGD]):
    runs = []
    for decay in (0.0, 0.5):
        params = parameters((4, 3), dtype=torch.float64)
        run(optimizer_class(params, lr=0.1, weight_decay=decay), params, range(1))
        runs.append(params[0].detach())
    (start,) = parameters((4, 3), dtype=torch.float64)
    assert torch.allclose(runs[1], runs[0] - 0.05 * start.detach(), rtol=1e-13)


@pytest.mark.contract("step: no learning rate")
def test_no_learning_rate_no_change(optimizer_class: type[PSGD]):
    params = parameters(*SHAPES)
    optimizer = optimizer_class(params, lr=0.0, weight_decay=0.1)
    run(optimizer, params, range(3))
    assert equal(params, parameters(*SHAPES)) and int(optimizer.state[params[0]]["step"]) == 3


@pytest.mark.contract("step: zero gradients")
def test_zero_gradients_change_nothing(optimizer_class: type[PSGD]):
    params = parameters(*SHAPES)
    optimizer = optimizer_class(params, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        step(optimizer)
    assert equal(params, parameters(*SHAPES))
    assert all(p.isfinite().all() for p in run(optimizer, params, range(3)))


@pytest.mark.contract("step: zero gradients")
def test_a_dead_parameter_without_noise_stays_finite(optimizer_class: type[PSGD]):
    without = {
        "damping": 0.0,
        "noise_scale": 0.0,
        "lr_preconditioner": 0.9,
        "preconditioner_lr": 0.9,
        "precond_lr": 0.9,
    }
    params = parameters((3, 3))
    known = {f.name for f in fields(optimizer_class.method)}
    options = {k: v for k, v in without.items() if k in known} | of_rank(optimizer_class, 2)
    optimizer = optimizer_class(params, **options)
    params[0].grad = torch.zeros(3, 3)
    for _ in range(100):
        step(optimizer)
    assert params[0].isfinite().all()


@pytest.mark.contract("torch: flags")
def test_maximize_climbs(optimizer_class: type[PSGD]):
    down, up = parameters(*SHAPES), parameters(*SHAPES)
    give_gradients(down, 1)
    for p, q in zip(down, up, strict=True):
        q.grad = -p.grad
    step(optimizer_class(down))
    step(optimizer_class(up, maximize=True))
    assert equal(down, up)


def test_the_example_of_the_documentation_runs(optimizer_class: type[PSGD]):
    example = doctest.DocTestParser().get_doctest(optimizer_class.__doc__, {}, optimizer_class.__name__, None, 0)
    assert len(example.examples) >= 5
    assert doctest.DocTestRunner().run(example).failed == 0


# ---- groups ---------------------------------------------------------------------------------
@pytest.mark.contract("torch: groups")
def test_groups_are_optimizers_of_their_own(optimizer_class: type[PSGD]):
    own = [{"lr": 0.1, "weight_decay": 0.2}, {"lr": 0.01, "momentum": 0.5, "seed": 3, "maximize": True}]
    together, apart = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    rank = of_rank(optimizer_class, 2)
    named = zip("ab", together, own, strict=True)
    grouped = optimizer_class([{"params": [(name, p)], **options} for name, p, options in named], **rank)
    run(grouped, together, range(3))
    for name, p, options in zip("ab", apart, own, strict=True):
        run(optimizer_class([(name, p)], **options, **rank), [p], range(3))
    assert equal(together, apart)


@pytest.mark.contract("torch: groups")
def test_every_argument_is_legal_in_a_group(optimizer_class: type[PSGD]):
    options = optimizer_class(parameters((2,))).defaults
    optimizer = optimizer_class([{"params": parameters((2,)), **options}])
    (group,) = optimizer.param_groups
    assert {k: v for k, v in group.items() if k not in ("params", *SKIPS)} == options


@pytest.mark.contract("torch: late parameters")
def test_parameters_may_come_late(tensor_class: type[PSGD]):
    """By add_param_group, unfrozen, or without a gradient for a while: each starts its own count."""
    early, late, frozen, idle = parameters((4, 3), (4, 3), (4, 3), (4, 3))
    frozen.requires_grad_(False)
    optimizer = tensor_class([early, frozen, idle])
    run(optimizer, [early], range(3))
    assert not optimizer.state.get(idle) and not optimizer.state.get(frozen)
    optimizer.add_param_group({"params": [late], "lr": 0.02})
    frozen.requires_grad_(True)
    run(optimizer, [early, late, frozen], range(3, 5))
    steps = [int(optimizer.state[p]["step"]) for p in (early, late, frozen)]
    assert steps == [5, 2, 2] and optimizer.param_groups[1]["lr"] == 0.02
    before = idle.detach().clone()
    early.grad = None
    run(optimizer, [late, frozen], range(5, 7))
    assert [int(optimizer.state[p]["step"]) for p in (early, late, frozen)] == [5, 4, 4]
    assert torch.equal(idle, before) and all(p.isfinite().all() for p in (early, late, frozen))


@pytest.mark.contract("step: no gradients")
def test_without_any_gradient_nothing_happens(optimizer_class: type[PSGD]):
    params = parameters(*SHAPES)
    optimizer = optimizer_class(params)
    loss = torch.zeros((), requires_grad=True)  # of something else
    assert torch.equal(optimizer.step(lambda: loss), loss)
    assert not optimizer.state and equal(params, parameters(*SHAPES))


@pytest.mark.contract("torch: kinds of parameters")
def test_named_parameters_appear_in_errors():
    with pytest.raises(TypeError, match=r"embedding is torch\.complex64"):
        Procrustes([("embedding", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])


# ---- closures -------------------------------------------------------------------------------
@pytest.mark.contract("torch: closure")
def test_a_closure_is_called_once_with_gradients_on():
    (p,) = parameters((3,))
    optimizer, calls = Procrustes([p]), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    expected = (p**2).sum().item()
    assert optimizer.step(closure).item() == expected and calls == [True]
    assert int(optimizer.state[p]["step"]) == 1 and not torch.equal(p, parameters((3,))[0])
    optimizer.step(closure=closure)
    assert int(optimizer.state[p]["step"]) == 2


@pytest.mark.contract("torch: closure")
def test_a_closure_may_leave_backward_to_the_optimizer(optimizer_class: type[PSGD]):
    """As in psgd_torch's programs, whose closures return a loss, or a sequence that begins with it."""
    ours, theirs = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    optimizer, twin = (optimizer_class(ps, lr=0.1) for ps in (ours, theirs))
    for t, wrapped in enumerate([lambda loss: loss, lambda loss: (loss, "more"), lambda loss: [loss, 1]] * 2):
        returned = optimizer.step(lambda: wrapped(sum((p**2).sum() for p in ours)))  # noqa: B023
        loss = returned if t % 3 == 0 else returned[0]
        assert type(returned) is type(wrapped(loss)) and not loss.requires_grad and loss > 0
        descend(twin, lambda: sum((p**2).sum() for p in theirs))
    assert equal(ours, theirs) and not equal(ours, parameters((4, 3), (5,)))
    assert newton(optimizer_class) or all(p.grad is None for p in ours)


@pytest.mark.contract("torch: closure")
def test_gradients_that_are_there_are_those_that_are_used():
    """Of some parameters: a closure that differentiated a part has not left it to the optimizer."""
    ours, theirs = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    optimizer, twin = Procrustes(ours), Procrustes(theirs)
    ours[0].grad, theirs[0].grad = torch.ones(4, 3), torch.ones(4, 3)
    optimizer.step(lambda: sum((p**2).sum() for p in ours))
    twin.step()
    assert equal(ours, theirs) and torch.equal(ours[0].grad, torch.ones(4, 3)) and ours[1].grad is None


@pytest.mark.contract("torch: closure")
def test_a_closure_that_drops_its_gradients_changes_nothing():
    params = parameters((4, 3))
    optimizer = Procrustes(params)

    def closure() -> Tensor:
        loss = (params[0] ** 2).sum()
        loss.backward()
        optimizer.zero_grad()
        return loss

    optimizer.step(closure)
    assert equal(params, parameters((4, 3))) and not optimizer.state and params[0].grad is None


@pytest.mark.contract("torch: closure")
def test_gradients_of_a_step_that_fails_are_not_left_behind():
    params = parameters((4, 3))
    optimizer = Procrustes(params, nonfinite="raise")
    with pytest.raises(FloatingPointError):
        optimizer.step(lambda: params[0].sum() * torch.inf)
    assert params[0].grad is None and equal(params, parameters((4, 3)))


@pytest.mark.contract("torch: closure")
def test_what_waits_for_gradients_sees_those_of_a_closure_without_backward():
    params, seen = parameters((4, 3), (5,)), []
    frozen = nn.Parameter(torch.ones(4, 3), requires_grad=False)
    elsewhere = nn.Parameter(torch.ones(()))
    params[0].register_hook(lambda g: seen.append(tuple(g.shape)))
    optimizer = Procrustes([*params, frozen])
    optimizer.step(lambda: elsewhere * (params[0] * frozen).sum())
    assert seen == [(4, 3)] and elsewhere.grad is None and list(optimizer.state) == [params[0]]


@pytest.mark.contract("torch: closure")
def test_a_closure_that_fails_changes_nothing():
    params = parameters(*SHAPES)
    optimizer = Procrustes(params)
    run(optimizer, params, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()))

    def closure() -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert_untouched(optimizer, params, before)


# ---- misuse ---------------------------------------------------------------------------------
BAD_PARAMETERS = [
    (lambda: nn.Parameter(torch.eye(2).to_sparse()), "sparse parameters"),
    (lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)), "complex parameters.*torch.complex64"),
]


@pytest.mark.contract("torch: kinds of parameters")
@pytest.mark.parametrize(("make", "text"), BAD_PARAMETERS)
def test_a_wrong_parameter_is_refused(make: Callable[[], nn.Parameter], text: str):
    with pytest.raises(TypeError, match=f"Procrustes .*{text}") as caught:
        Procrustes([make()])
    assert "\n" not in str(caught.value)
    params = parameters((3, 2))
    optimizer = Procrustes(params)
    run(optimizer, params, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(TypeError, match="parameter 0 is"):
        optimizer.add_param_group({"params": [make()]})
    assert_untouched(optimizer, params, before)


BAD_HYPERPARAMETERS = [
    ({"lr": -1.0}, r"lr=-1\.0 must lie in \[0, inf\)"),
    ({"lr": float("nan")}, r"lr=nan must lie in \[0, inf\)"),
    ({"lr": torch.ones(2)}, r"Tensor lr must be 1-element, not of shape \(2,\)"),
    ({"momentum": 1.0}, r"momentum=1\.0 must lie in \[0, 1\)"),
    ({"dtype": "int8"}, "dtype='int8' must be None or one of bfloat16"),
    ({"dtype": torch.int8}, "dtype='int8' must be None or one of bfloat16"),
    ({"stack": 1}, "stack=1 must be True or False"),
    ({"compile": "yes"}, "compile='yes' must be True, False or 'full'"),
    ({"maximize": None}, "maximize=None must be True or False"),
    ({"stak": True}, r"unknown hyperparameter 'stak'; did you mean 'stack'\? It has lr, "),
    ({"scanned_layers": 1}, "scanned_layers=1 must be"),
    ({"stack_batch_size": 0}, "stack_batch_size=0 must be None or a whole number above 0"),
    ({"stack_batch_size": 2.0}, r"stack_batch_size=2\.0 must be None or a whole number above 0"),
]


@pytest.mark.contract("input: numbers")
@pytest.mark.contract("input: choices")
@pytest.mark.contract("input: dtypes")
@pytest.mark.contract("input: names")
@pytest.mark.parametrize(("options", "text"), BAD_HYPERPARAMETERS)
def test_a_wrong_hyperparameter_is_refused(options: dict, text: str):
    with pytest.raises(ValueError, match=text) as caught:
        Procrustes(parameters((2,)), **options)
    assert "\n" not in str(caught.value)
    params = parameters((3, 2))
    optimizer = Procrustes(params)
    run(optimizer, params, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": parameters((2,)), **options})
    assert_untouched(optimizer, params, before)


@pytest.mark.contract("input: parameters")
@pytest.mark.parametrize("given", [[], [torch.ones(2) * nn.Parameter(torch.ones(2))]])
def test_what_torch_refuses_is_refused(given: object):
    with pytest.raises((ValueError, TypeError)):
        Procrustes(given)


def sparse_gradient(p: nn.Parameter) -> None:
    p.grad = torch.eye(3).to_sparse()


def other_gradient(p: nn.Parameter) -> None:
    p.grad = torch.ones(3, 3)
    p.data = torch.ones(2, 2)


def other_state(p: nn.Parameter) -> None:
    p.data = torch.ones(4, 4)
    p.grad = torch.ones(4, 4)


BAD_GRADIENTS = [
    (sparse_gradient, "does not support sparse gradients; that of parameter 0 is torch.sparse_coo"),
    (other_gradient, r"parameter 0 has shape \(2, 2\) and a gradient of shape \(3, 3\)"),
    (other_state, r"parameter 0 has shape \(4, 4\), its state belongs to another"),
]


@pytest.mark.contract("step: mismatches")
@pytest.mark.parametrize(("spoil", "text"), BAD_GRADIENTS)
def test_a_wrong_gradient_stops_the_step_before_it_starts(optimizer_class: type[PSGD], spoil: Callable, text: str):
    params = parameters((3, 3), (3, 3))
    groups = [{"params": params[:1]}, {"params": params[1:]}]  # the second group is bad
    optimizer = optimizer_class(groups, **of_rank(optimizer_class, 2))
    run(optimizer, params, range(2))
    give_gradients(params, 2)
    spoil(params[1])
    before = copy.deepcopy((params, optimizer.state_dict()))
    pairs = {}
    if newton(optimizer_class):
        pairs = {k: [torch.ones_like(p) for p in params] for k in ("Hvp", "vector")} | {"update_preconditioner": True}
    with pytest.raises(RuntimeError, match=text) as caught:
        optimizer.step(**pairs)
    assert "\n" not in str(caught.value)
    assert_untouched(optimizer, params, before)


@pytest.mark.contract("input: numbers")
def test_a_value_spoilt_later_is_refused_at_the_step():
    params = parameters((3, 3))
    optimizer = Procrustes(params)
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["momentum"] = 1.5
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        optimizer.step()
    assert_untouched(optimizer, params, before)


@pytest.mark.contract("torch: gradients")
def test_gradients_are_never_written(optimizer_class: type[PSGD]):
    params = parameters(*SHAPES)
    optimizer = optimizer_class(params, weight_decay=0.1, maximize=True)
    for t in range(3):
        give_gradients(params, t)
        gradients = [p.grad for p in params]
        values = [g.clone() for g in gradients]
        step(optimizer)
        assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
        assert equal(gradients, values)


# ---- saving and copying ---------------------------------------------------------------------
SAVED = [
    ("procrustes", {}, torch.float32),
    ("procrustes", {"dtype": "float32"}, torch.bfloat16),
    ("quad", {"dtype": torch.bfloat16}, torch.float32),
    ("kron_whiten", {"momentum": 0.9, "preconditioner_update_probability": 0.5}, torch.float64),
    ("kron_whiten", {}, torch.float16),
    ("kron_whiten", {}, torch.complex64),
    ("kron", {"preconditioner_update_probability": 0.15}, torch.float32),  # fits at steps 7 and 14
    ("kron", {"mu_dtype": "float32"}, torch.bfloat16),
    ("affine", {"preconditioner_update_probability": 0.5, "nesterov": True, "mu_dtype": "bfloat16"}, torch.float64),
    ("affine", {"update_global_norm_clip": 0.1}, torch.float16),
    ("kron_newton", {"preconditioner_update_probability": 0.5}, torch.complex64),
    ("kwns4", {"decoupled_weight_decay": False}, torch.float32),
    ("lra_whiten", {"preconditioner_update_probability": 0.5, "momentum": 0.9}, torch.bfloat16),
    ("lra_newton", {"preconditioner_update_probability": 0.3, "momentum": 0.9}, torch.float32),
    ("dense_newton", {"exact_hessian_vector_product": False, "grad_clip_max_norm": 0.5}, torch.float64),
    ("xmat", {"preconditioner_update_probability": 0.5, "mu_dtype": "bfloat16"}, torch.float32),
    ("low_rank_approximation", {"uvd_rank_of_approximation": 3, "nesterov": True}, torch.float16),
]


@pytest.mark.contract("torch: state dict")
@pytest.mark.parametrize(("name", "options", "dtype"), SAVED)
def test_a_loaded_run_continues_bit_for_bit(name: str, options: dict, dtype: torch.dtype):
    params = parameters(*SHAPES, dtype=dtype)
    optimizer = CLASSES[name](params, lr=0.01, **options)
    run(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save((params, optimizer.state_dict()), file)
    run(optimizer, params, range(4, 10))

    file.seek(0)
    loaded, state_dict = torch.load(file, weights_only=True)
    resumed = CLASSES[name](loaded)
    resumed.load_state_dict(state_dict)
    kinds = [{k: x.dtype for k, x in flat(o.state[p[0]]).items()} for o, p in ((optimizer, params), (resumed, loaded))]
    assert kinds[0] == kinds[1]
    run(resumed, loaded, range(4, 10))
    assert equal(loaded, params)


@pytest.mark.contract("state: at any time")
def test_loading_copies(optimizer_class: type[PSGD]):
    """A state dict stays as it was when the optimizer that loaded it steps, and when that which made it does."""
    params, others = parameters(*SHAPES), parameters(*SHAPES)
    optimizer, other = optimizer_class(params), optimizer_class(others)
    run(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    run(other, others, range(3, 5))
    assert all(torch.equal(x, flat_all(kept)[k]) for k, x in flat_all(saved).items())


@pytest.mark.contract("torch: hooks")
def test_hooks_may_replace_what_is_loaded():
    params = parameters((3, 3))
    optimizer = Procrustes(params)
    run(optimizer, params, range(2))

    def hook(optimizer: PSGD, state_dict: dict) -> dict:
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["momentum"].fill_(7)
        return state_dict

    other = Procrustes(params)
    other.register_load_state_dict_pre_hook(hook)
    other.load_state_dict(optimizer.state_dict())
    assert (other.state[params[0]]["momentum"] == 7).all()


@pytest.mark.contract("torch: copies")
@pytest.mark.contract("state: at any time")
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_walk_on_alone(optimizer_class: type[PSGD], copier: Callable):
    params = parameters(*SHAPES)
    optimizer = optimizer_class(params, lr=0.01)
    run(optimizer, params, range(3))
    twin = copier(optimizer)
    theirs = twin.param_groups[0]["params"]
    assert type(twin) is optimizer_class and equal(theirs, params) and theirs[0] is not params[0]
    run(optimizer, params, range(3, 6))
    assert not equal(theirs, params)
    run(twin, theirs, range(3, 6))
    assert equal(theirs, params)


@pytest.mark.contract("torch: foreign entries")
def test_foreign_entries_of_the_state_are_let_be():
    params = parameters((3, 3))
    optimizer = Procrustes(params)
    optimizer.state["test"] = 1
    run(optimizer, params, range(2))
    assert optimizer.state["test"] == 1


# ---- learning rates -------------------------------------------------------------------------
schedulers = torch.optim.lr_scheduler


def cycled(optimizer: PSGD) -> bool:
    """torch's schedulers cycle a hyperparameter of the name momentum, and no other."""
    return "momentum" in optimizer.defaults


SCHEDULERS = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=cycled(o)),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=5, cycle_momentum=cycled(o)),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=20),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=5),
    "LinearLR": lambda o: schedulers.LinearLR(o),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.contract("torch: schedulers")
@pytest.mark.parametrize("attach", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("name", ["procrustes", "kron", "lra_newton"])
def test_schedulers_attach(name: str, attach: Callable):
    params = parameters(*SHAPES)
    optimizer = CLASSES[name](params, lr=0.05)
    scheduler, rates = attach(optimizer), []
    for t in range(6):
        run(optimizer, params, range(t, t + 1))
        rates.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    assert len(set(rates)) > 2 and all(p.isfinite().all() for p in params)
    optimizer.add_param_group({"params": parameters((2,))} | {"initial_lr": 0.05})


@pytest.mark.contract("torch: tensor lr")
def test_a_tensor_learning_rate_is_a_learning_rate(optimizer_class: type[PSGD]):
    floats, tensors = parameters(*SHAPES), parameters(*SHAPES)
    ours, theirs = optimizer_class(floats, lr=0.125), optimizer_class(tensors, lr=torch.tensor(0.125))
    for t, rate in enumerate((0.125, 0.25)):
        ours.param_groups[0]["lr"] = rate
        theirs.param_groups[0]["lr"].fill_(rate)
        run(ours, floats, range(t, t + 1))
        run(theirs, tensors, range(t, t + 1))
    assert equal(floats, tensors)


# ---- layout ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stacks_step_as_single_parameters_do(tensor_class: type[PSGD], dtype: torch.dtype):
    together, apart = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    run(tensor_class(together, lr=0.01), together, range(5))
    run(tensor_class(apart, lr=0.01, stack=False), apart, range(5))
    close(together, apart)


def test_stacks_step_in_batches(tensor_class: type[PSGD]):
    results = []
    for options in ({"stack_batch_size": 2}, {"stack": False}):
        params = parameters(*SHAPES, dtype=torch.float64)
        optimizer = tensor_class(params, lr=0.01, **options)
        run(optimizer, params, range(4))
        results.append([*params, *(x for p in params for x in flat(optimizer.state[p]).values())])
    close(*results)


@pytest.mark.parametrize(("room", "sizes"), [(1 << 21, [7]), (1000, [4, 3]), (400, [2, 2, 2, 1]), (1, [1] * 7)])
def test_large_stacks_are_cut_by_themselves(monkeypatch: pytest.MonkeyPatch, room: int, sizes: list[int]):
    """Seven matrices of 8 x 8 and their factors, 194 numbers of state each, with the bounds of the factors."""
    seen = []

    def spied(
        self: PerTensor, job: Any, plan: Any, draws: Any, many: bool, state: Any, targets: Any, *rest: Any
    ) -> Any:
        seen.append(len(targets))
        return batch(self, job, plan, draws, many, state, targets, *rest)

    batch = PerTensor._batch
    monkeypatch.setattr(PerTensor, "_batch", spied)
    monkeypatch.setitem(ROOM, "cpu", room)
    cut, apart = (parameters(*[(8, 8)] * 7, dtype=torch.float64) for _ in range(2))
    run(Procrustes(cut), cut, range(1))
    assert seen == sizes
    run(Procrustes(apart, stack=False), apart, range(1))
    close(cut, apart)


def test_stacks_follow_a_changing_company(tensor_class: type[PSGD]):
    """Parameters that step together, then in other company, then alone: as if each had always been alone."""
    company = [[0, 1, 2], [0, 1], [1, 2], [2], [0, 1, 2], [0, 2]]
    results = []
    for stack in (True, False):
        params = parameters((4, 3), (4, 3), (4, 3), dtype=torch.float64)
        optimizer = tensor_class(params, lr=0.01, stack=stack)
        for t, members in enumerate(company):
            for p in params:
                p.grad = None
            run(optimizer, [params[i] for i in members], range(t, t + 1))
        results.append([*params, *(x for p in params for x in flat(optimizer.state[p]).values())])
    close(*results)


def test_order_of_parameters_does_not_matter(optimizer_class: type[PSGD]):
    forth, back = parameters(*SHAPES), parameters(*SHAPES)
    run(optimizer_class(zip("abcde", forth, strict=True), lr=0.01), forth, range(4))
    run(optimizer_class([*zip("abcde", back, strict=True)][::-1], lr=0.01), back, range(4))
    close(forth, back)


STRANGE = [(), (1,), (1, 1), (1, 7), (7, 1), (0,), (0, 3), (2, 3, 1, 2, 3), (1000,), (300, 2)]


@pytest.mark.contract("step: shapes")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", STRANGE, ids=str)
def test_every_shape_steps(
    request: pytest.FixtureRequest, tensor_class: type[PSGD], shape: tuple[int, ...], count: int
):
    params = parameters(*[shape] * count)
    optimizer = tensor_class(params, lr=0.01, weight_decay=0.0)
    run(optimizer, params, range(3))
    for p, start in zip(params, parameters(*[shape] * count), strict=True):
        assert p.shape == start.shape and p.isfinite().all()
        assert not p.numel() or not torch.equal(p, start)


@pytest.mark.contract("step: shapes")
def test_whole_models_of_every_shape_step(whole_class: type[PSGD]):
    for shapes in (STRANGE[:-2], [()], [(1,), ()], [(7, 1)], [(0,), (2,)]):
        params = parameters(*shapes)
        run(whole_class(params, lr=0.01, **of_rank(whole_class, 0)), params, range(3))
        for p, start in zip(params, parameters(*shapes), strict=True):
            assert p.shape == start.shape and p.isfinite().all()
            assert not p.numel() or not torch.equal(p, start)


LAYOUTS = {
    "transposed": lambda: normal(3, 2, 4, 5).permute(3, 1, 0, 2),
    "channels_last": lambda: normal(5, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "strided": lambda: normal(10, 2, 3, 4)[::2],
}


@pytest.mark.contract("step: strides")
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_does_not_matter(optimizer_class: type[PSGD], make: Callable[[], Tensor]):
    results = []
    for change in (lambda x: x, torch.Tensor.contiguous):
        p = nn.Parameter(change(make()))
        strides = p.stride()
        optimizer = optimizer_class([p], lr=0.01)
        for t in range(3):
            p.grad = change(make() + t)
            step(optimizer)
        assert p.stride() == strides
        results.append(p.contiguous())
    assert torch.equal(*results)


@pytest.mark.contract("step: strides")
def test_an_expanded_gradient_will_do():
    (p,), (q,) = parameters((3, 4)), parameters((3, 4))
    p.grad, q.grad = torch.ones(1, 4).expand(3, 4), torch.ones(3, 4)
    Procrustes([p]).step()
    Procrustes([q]).step()
    assert torch.equal(p, q)


@pytest.mark.contract("torch: kinds of parameters")
def test_complex_parameters_where_the_method_takes_them():
    params = parameters((4, 3), (5,), dtype=torch.complex64)
    optimizer = KronWhiten(params, lr=0.05)
    for _ in range(200):
        for p in params:
            p.grad = 2 * p.detach()
        optimizer.step()
    assert all(p.abs().max() < 0.3 for p in params)


# ---- nothing global -------------------------------------------------------------------------
@pytest.mark.contract("torch: distributed data")
def test_parallel_copies_follow_one_trajectory_without_global_noise(optimizer_class: type[PSGD]):
    first, second = parameters(*SHAPES), parameters(*SHAPES)
    ours, theirs = optimizer_class(first), optimizer_class(second)
    generator = torch.get_rng_state()
    for t in range(4):
        run(ours, first, range(t, t + 1))
        torch.rand(3) if t % 2 else None
        before = torch.get_rng_state()
        run(theirs, second, range(t, t + 1))
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, second)
    assert not torch.equal(torch.get_rng_state(), generator)  # the test did advance it


def test_seeds_differ():
    runs = []
    for seed in (0, 1):
        params = parameters((4, 3))
        runs.append(run(KronWhiten(params, seed=seed, damping=0.1), params, range(3)))
    assert not equal(*runs)


@pytest.mark.contract("torch: silence")
def test_nothing_is_printed(optimizer_class: type[PSGD], capfd: pytest.CaptureFixture):
    params = parameters(*SHAPES)
    optimizer = optimizer_class(params)
    run(optimizer, params, range(3))
    optimizer.load_state_dict(optimizer.state_dict())
    assert capfd.readouterr() == ("", "")


# ---- one preconditioner for all parameters --------------------------------------------------
def test_the_rows_of_a_whole_model_are_state_of_its_parameters(whole_class: type[PSGD]):
    params = parameters(*SHAPES)
    optimizer = whole_class(params, **of_rank(whole_class, 3), momentum=0.9)
    run(optimizer, params, range(2))
    factors = [tuple(q) for q in RECIPES[whole_class.method.name].preconditioner.shapes((42,))]
    rows = [[(p.numel(), *(3 if n == 10 else n for n in q[1:])) for q in factors] for p in params]
    assert len(rows[0]) == {"DenseNewton": 1, "XMat": 2}.get(whole_class.__name__, 3)
    for p, wanted in zip(params, rows, strict=True):
        entry = optimizer.state[p]
        counted = ["since"] if whole_class.method().schedule().counts else []
        assert list(entry) == ["step", *counted, "momentum", "Q", "L"] and entry["momentum"].shape == p.shape
        assert [tuple(q.shape) for q in entry["Q"].values()] == wanted and int(entry["step"]) == 2
        assert all(torch.equal(x, optimizer.state[params[0]]["L"][k]) for k, x in entry["L"].items())


def test_a_whole_model_is_in_the_order_of_names(whole_class: type[PSGD]):
    """Also across the tenth, without names; the preconditioner does mix parameters."""
    shapes = [(2,)] * 12
    forth, back = parameters(*shapes), parameters(*shapes)
    run(whole_class(forth, lr=0.01), forth, range(3))
    named = [(str(i), p) for i, p in enumerate(back)]
    run(whole_class(named[::-1], lr=0.01), back, range(3))
    close(forth, back)
    renamed = parameters(*shapes)
    run(whole_class([(str(-i % 12), p) for i, p in enumerate(renamed)], lr=0.01), renamed, range(3))
    assert not torch.allclose(renamed[1], forth[1], rtol=1e-4)


@pytest.mark.contract("step: no gradients")
def test_a_parameter_of_a_whole_model_without_gradient_stays(whole_class: type[PSGD]):
    """Its gradient counts as zero, and it grows older with the others."""
    idle, zero = parameters(*SHAPES), parameters(*SHAPES)
    ours = whole_class(idle, lr=0.1, weight_decay=0.1, momentum=0.9)
    theirs = whole_class(zero, lr=0.1, weight_decay=0.1, momentum=0.9)
    for t in range(3):
        for params in (idle, zero):
            give_gradients(params, t)
        if t:
            idle[2].grad, zero[2].grad = None, torch.zeros(5)
            before = idle[2].detach().clone()
        step(ours)
        step(theirs)
    assert torch.equal(idle[2], before) and not torch.equal(zero[2], before)
    assert equal(idle[:2] + idle[3:], zero[:2] + zero[3:]) and int(ours.state[idle[2]]["step"]) == 3


@pytest.mark.contract("torch: late parameters")
@pytest.mark.parametrize("groups", [1, 2])
def test_a_late_parameter_of_a_whole_model_is_refused(whole_class: type[PSGD], groups: int):
    params = parameters((4, 3), (4, 3), (2,))
    given = [{"params": params[:1]}, {"params": params[1:]}] if groups == 2 else params
    optimizer = whole_class(given)
    run(optimizer, params[:2], range(2))
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="has its first gradient after the first step"):
        run(optimizer, params, range(2, 3))
    assert_untouched(optimizer, params, before)


@pytest.mark.contract("torch: late parameters")
def test_groups_of_whole_models_have_preconditioners_of_their_own(whole_class: type[PSGD]):
    """A parameter may come late in a group of its own."""
    first, late = parameters((4, 3), (5, 3))
    optimizer = whole_class([("first", first)], lr=0.01)
    run(optimizer, [first], range(2))
    optimizer.add_param_group({"params": [("late", late)]})
    run(optimizer, [first, late], range(2, 4))
    assert [int(optimizer.state[p]["step"]) for p in (first, late)] == [4, 2]
    (alone,) = parameters((4, 3))
    assert equal(run(whole_class([("first", alone)], lr=0.01), [alone], range(4)), [first])


def test_a_compiled_whole_model_walks_the_same_way():
    compiled, eager = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    options = {"lr": 0.01, "rank_of_approximation": 2}
    ours = CLASSES["lra_newton"](compiled, compile="full", **options)
    run(ours, compiled, range(5))
    close(compiled, run(CLASSES["lra_newton"](eager, **options), eager, range(5)), ulps=64)


@pytest.mark.contract("step: shapes")
def test_a_low_rank_needs_more_numbers():
    params = parameters((5,))
    optimizer = CLASSES["lra_whiten"](params)
    give_gradients(params, 1)
    with pytest.raises(ValueError, match="rank 10 needs more than 5 numbers"):
        optimizer.step()
    assert equal(params, parameters((5,))) and not optimizer.state.get(params[0])


# ---- compiled -------------------------------------------------------------------------------
def test_the_opaque_noise_has_the_same_bits():
    key = noise.key(namespace(torch.zeros(1)), 3, 4)
    for dtype, wide in ((torch.float32, np.float32), (torch.float64, np.float64)):
        role = noise.role_number("damping")
        for signs, draw in ((False, noise.normal), (True, noise.signs)):
            got = torch.ops.psgd.noise(signs, key, role, 100, dtype)
            assert np.array_equal(got.numpy(), draw(noise.key(np, 3, 4), role, 100, wide))
    opcheck = torch.library.opcheck(torch.ops.psgd.noise.default, (True, key, 5, 10, torch.float32))
    assert set(opcheck.values()) == {"SUCCESS"}


@pytest.mark.contract("torch: compiler")
def test_a_compiled_optimizer_compiles_once_and_walks_the_same_way(capfd: pytest.CaptureFixture):
    """A stack of two matrices, each with a diagonal and a dense factor, for a hundred steps and a balance."""
    compiled, eager = parameters((4, 3), (4, 3)), parameters((4, 3), (4, 3))
    ours, theirs = Procrustes(compiled, lr=0.01, compile="full"), Procrustes(eager, lr=0.01)
    for t in range(105):
        # Warnings are errors here, and after the first step so is compiling.
        with torch.compiler.set_stance("fail_on_recompile" if t else "default"):
            for optimizer, params in ((ours, compiled), (theirs, eager)):
                optimizer.param_groups[0].update(lr=0.01 / (1 + t), momentum=0.95 if t < 50 else 0.9)
                run(optimizer, params, range(t, t + 1))
    close(compiled, eager, ulps=64)
    assert capfd.readouterr() == ("", "")


# ---- parameters that stack layers -----------------------------------------------------------
LAYERS = ((5, 4, 3), (5, 3), (5,))


def both_ways(optimizer_class: type[PSGD], batch: int | None = None, layers: tuple = LAYERS, **options) -> list[list]:
    """Parameters and state of every layer, trained in stacks of layers, and each as a parameter of its own."""
    stacks = parameters(*layers, dtype=torch.float64)
    singles = [nn.Parameter(x.clone()) for p in stacks for x in p.detach()]
    ours = optimizer_class(stacks, scanned_layers=True, stack_batch_size=batch, weight_decay=0.1, **options)
    theirs = optimizer_class(singles, weight_decay=0.1, **options | {"compile": False})
    for t in range(5):
        give_gradients(stacks, t)
        for q, g in zip(singles, (g for p in stacks for g in p.grad), strict=True):
            q.grad = g.clone()
        step(ours)
        step(theirs)
    entries = [flat(ours.state[p]) for p in stacks]
    mine = [
        {k: x[i] if x.ndim else x for k, x in e.items()}
        for e, p in zip(entries, stacks, strict=True)
        for i in range(len(p))
    ]
    return [
        [*(x for p in stacks for x in p), *(x for e in mine for x in e.values())],
        [*singles, *(x for q in singles for x in flat(theirs.state[q]).values())],
    ]


@pytest.mark.parametrize(("batch", "maximize"), [(None, False), (1, True), (2, False), (5, True)])
def test_layers_step_as_parameters_do(tensor_class: type[PSGD], batch: int | None, maximize: bool):
    close(*both_ways(tensor_class, batch, lr=0.01, maximize=maximize))


def test_noise_in_blocks_is_that_of_the_core():
    key = noise.key(namespace(torch.zeros(1)), 3, torch.tensor(5))
    like = torch.zeros(1, dtype=torch.float64)
    shape = (2, BLOCK + 1)
    assert torch.equal(*(draws(key).normal("damping", shape, like) for draws in (CachedDraws, noise.Counter)))


def test_compiled_layers_step_as_parameters_do():
    """With fits and without, in batches of two and one, and a bound on the whole step, which is not compiled."""
    options = {"preconditioner_update_probability": 0.5, "update_global_norm_clip": 0.5}
    close(*both_ways(Affine, 2, layers=((3, 4, 3),), lr=0.01, compile="full", **options), ulps=64)


def test_some_parameters_of_a_group_stack_layers():
    by_name, by_group = parameters(*LAYERS), parameters(*LAYERS)
    ours = Kron(list(zip(("stack", "matrix", "vector"), by_name, strict=True)), scanned_layers=("stack",), lr=0.01)
    theirs = Kron([{"params": by_group[:1], "scanned_layers": True}, {"params": by_group[1:]}], lr=0.01)
    run(ours, by_name, range(3))
    assert equal(by_name, run(theirs, by_group, range(3)))
    assert [tuple(ours.state[p]["Q"]["0"].shape) for p in by_name] == [(5, 4, 4), (5, 5), (5,)]


@pytest.mark.contract("step: shapes")
@pytest.mark.parametrize("shape", [(0, 4, 3), (0,), (5, 0, 3), (5, 0)], ids=str)
def test_no_layers_and_empty_layers_are_let_be(tensor_class: type[PSGD], shape: tuple[int, ...]):
    empty, full = parameters(shape, (2, 3))
    (alone,) = parameters(shape, (2, 3))[1:]
    optimizer = tensor_class([("empty", empty), ("full", full)], scanned_layers=True, stack_batch_size=2)
    run(optimizer, [empty, full], range(3))
    run(tensor_class([("full", alone)], scanned_layers=True), [alone], range(3))
    close([full], [alone])
    entry = flat(optimizer.state[empty])
    assert int(entry["step"]) == 3 and all(x.shape[0] == shape[0] for x in entry.values() if x.ndim)


def test_a_scalar_stacks_no_layers():
    named = [("stack", parameters((2, 3))[0]), ("scale", parameters(())[0])]
    with pytest.raises(ValueError, match="Procrustes: scale is a scalar and cannot stack layers") as caught:
        Procrustes(named, scanned_layers=True)
    assert "\n" not in str(caught.value)
    optimizer = Procrustes(named)
    with pytest.raises(ValueError, match="Procrustes: gain is a scalar"):
        optimizer.add_param_group({"params": [("gain", nn.Parameter(torch.ones(())))], "scanned_layers": True})
    assert len(optimizer.param_groups) == 1


def test_loaded_layers_continue_bit_for_bit(tensor_class: type[PSGD]):
    params = parameters(*LAYERS, dtype=torch.bfloat16)
    optimizer = tensor_class(params, scanned_layers=True, stack_batch_size=2, lr=0.01)
    run(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save((params, optimizer.state_dict()), file)
    run(optimizer, params, range(3, 6))
    file.seek(0)
    loaded, state_dict = torch.load(file, weights_only=True)
    resumed = tensor_class(loaded)
    resumed.load_state_dict(state_dict)
    assert equal(run(resumed, loaded, range(3, 6)), params)


# ---- when factors are fitted ----------------------------------------------------------------
def fits(optimizer: PSGD, p: nn.Parameter, steps: int) -> list[int]:
    """The steps, from 1, at which Q moves away from where it was. The counter must say the same."""
    found, before = [], [torch.eye(n) for n in p.shape]
    for t in range(1, steps + 1):
        run(optimizer, [p], range(t, t + 1))
        now, since = [q.clone() for q in optimizer.state[p]["Q"].values()], optimizer.state[p]["since"]
        found += [] if equal(now, before) else [t]
        before = now
        assert int(since) == t - max(found, default=0) and since.dtype == torch.int64 and since.device.type == "cpu"
    return found


def test_fits_are_at_even_distances():
    """0.3 is every fourth step, 0.25 too, and 1 / 3 every third."""
    for probability, period in ((0.3, 4), (0.25, 4), (1 / 3, 3), (1.0, 1)):
        (p,) = parameters((3, 2))
        assert fits(Kron([p], preconditioner_update_probability=probability), p, 13) == [*range(period, 14, period)]


def test_the_annealed_probability_is_plain_numbers():
    for given, kept in (({}, (1.0, 0.03, 0.001, 500)), ({"flat_start": 2, "decay": 9.0}, (1.0, 0.03, 9.0, 2))):
        (p,) = parameters((3, 2))
        optimizer = Kron([p], preconditioner_update_probability=precond_update_prob_schedule(**given))
        (group,) = optimizer.param_groups
        assert type(group["preconditioner_update_probability"]) is tuple
        assert group["preconditioner_update_probability"] == kept
    assert Kron(parameters((2,))).defaults["preconditioner_update_probability"] == (1.0, 0.03, 0.001, 500)
    assert fits(optimizer, p, 40) == [1, 2, 36]  # then every 34th


def test_a_probability_that_is_a_function_stays_out_of_the_state_dict():
    (p,), (q,) = parameters((3, 2)), parameters((3, 2))
    halved = {"preconditioner_update_probability": lambda t: 0.5 if t <= 4 else 0.25}
    optimizer = Kron([p], **halved)
    assert fits(optimizer, p, 6) == [2, 4]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert "preconditioner_update_probability" not in saved["param_groups"][0]
    q.data.copy_(p.data)
    resumed = Kron([q], **halved)
    resumed.load_state_dict(saved)
    (group,) = resumed.param_groups
    assert group["preconditioner_update_probability"] is halved["preconditioner_update_probability"]
    run(optimizer, [p], range(7, 13))
    assert equal(run(resumed, [q], range(7, 13)), [p]) and int(resumed.state[q]["since"]) == 0


def test_a_compiled_optimizer_fits_now_and_then():
    compiled, eager = parameters((4, 3)), parameters((4, 3))
    options = {"lr": 0.01, "preconditioner_update_probability": 0.5}
    run(Kron(compiled, compile="full", **options), compiled, range(6))
    close(compiled, run(Kron(eager, **options), eager, range(6)), ulps=64)


# ---- bounds and dtypes ----------------------------------------------------------------------
def directions(limit: float | None, *groups: tuple, **options) -> list[Tensor]:
    """What one step of Affine subtracts from every parameter, by learning rate."""
    grouped = [parameters(*shapes, dtype=torch.float64) for shapes in groups]
    optimizer = Affine([{"params": g} for g in grouped], lr=0.1, update_global_norm_clip=limit, **options)
    optimizer.param_groups[-1]["lr"] = 0.01
    starts = [[p.detach().clone() for p in g] for g in grouped]
    for g in grouped:
        give_gradients(g, 1)
    optimizer.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    return [
        (a - p.detach()) / r for s, g, r in zip(starts, grouped, rates, strict=True) for a, p in zip(s, g, strict=True)
    ]


def test_the_whole_step_is_bounded():
    """All groups and tensors together, in one ratio; shorter steps are not lengthened."""
    groups = (((4, 3), (4, 3), (5,)), ((2, 2, 3), (), (0, 3)))
    free = directions(None, *groups)
    length = torch.cat([u.flatten() for u in free]).norm()
    for limit in (0.5, 2.0):
        bounded = directions(limit, *groups)
        assert length > limit and all(
            torch.allclose(b, u * limit / length, 1e-12) for b, u in zip(bounded, free, strict=True)
        )
    assert equal(directions(1.01 * length.item(), *groups), free)


def test_weight_decay_is_outside_the_bound():
    (bare,), (decayed,) = (directions(0.5, ((4, 3),), weight_decay=d) for d in (0.0, 0.3))
    (start,) = parameters((4, 3), dtype=torch.float64)
    assert torch.allclose(decayed, bare + 0.3 * start.detach(), 1e-12)


KEPT = [
    (Kron, {}, torch.bfloat16, "bfloat16", "float32"),
    (Affine, {}, torch.bfloat16, "bfloat16", "float32"),
    (Kron, {}, torch.float64, "float64", "float64"),
    (Kron, {"mu_dtype": "bfloat16", "precond_dtype": torch.bfloat16}, torch.float32, "bfloat16", "bfloat16"),
    (Kron, {"mu_dtype": torch.float32, "precond_dtype": "float64"}, torch.float16, "float32", "float64"),
    (Affine, {"mu_dtype": torch.float16}, torch.float32, "float16", "float32"),
]


@pytest.mark.parametrize(("optimizer_class_", "options", "dtype", "momentum", "factors"), KEPT)
def test_state_is_kept_in_its_dtypes(
    optimizer_class_: type[PSGD], options: dict, dtype: torch.dtype, momentum: str, factors: str
):
    params = parameters(*SHAPES, dtype=dtype)
    optimizer = optimizer_class_(params, lr=0.01, **options)
    run(optimizer, params, range(3))
    for p in params:
        entry = optimizer.state[p]
        assert p.dtype == dtype and p.isfinite().all() and entry["momentum"].dtype == getattr(torch, momentum)
        assert {q.dtype for q in entry["Q"].values()} == {getattr(torch, factors)}
        assert all(x.dtype in (torch.float32, torch.float64) for x in entry["L"].values())


@pytest.mark.parametrize("name", ["kron_newton", "lra_newton", "dense_newton"])
def test_a_newton_step_is_bounded_as_a_whole(name: str):
    """Over parameters and groups."""

    def moved(limit: float) -> Tensor:
        groups = parameters((4, 3), (5, 3), dtype=torch.float64), parameters((2, 2, 3), dtype=torch.float64)
        start = [p.detach().clone() for g in groups for p in g]
        optimizer = CLASSES[name]([{"params": list(g)} for g in groups], lr=1.0, grad_clip_max_norm=limit)
        params = run(optimizer, [p for g in groups for p in g], range(1))
        return torch.cat([(a - p.detach()).flatten() for a, p in zip(start, params, strict=True)])

    free = moved(float("inf"))
    length = free.norm()
    assert length > 0.5
    assert torch.allclose(moved(0.5), free * 0.5 / length, 1e-12)
    assert torch.equal(moved(1.01 * length.item()), free)


def test_coupled_weight_decay_is_part_of_the_gradient():
    """In stacks and alone, up and down."""
    for options in ({}, {"maximize": True}, {"stack": False}):
        ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
        coupled = CLASSES["kwns4"](ours, lr=0.1, weight_decay=0.5, decoupled_weight_decay=False, **options)
        plain = CLASSES["kwns4"](theirs, lr=0.1, weight_decay=0.0, **options)
        sign = -1 if "maximize" in options else 1
        for t in range(4):
            give_gradients(ours, t)
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad + sign * 0.5 * q.detach()
            coupled.step()
            plain.step()
        close(ours, theirs)
        assert not equal(ours, parameters(*SHAPES))


COUPLED = {
    "lra_whiten": {"preconditioner_init_scale": 1.0},
    "affine": {"update_global_norm_clip": 0.5, "precond_init_scale": 1.0},
}


@pytest.mark.parametrize("name", COUPLED)
def test_weight_decay_may_be_part_of_the_gradient_of_any_method(name: str, monkeypatch: pytest.MonkeyPatch):
    """Of one preconditioner for all parameters, and where directions wait for a bound on the whole step, too."""

    class Coupled(METHODS[name]):  # type: ignore[misc]
        def recipe(self) -> Recipe:
            return replace(METHODS[name].recipe(self), decoupled=False)

    options = {"lr": 0.1} | COUPLED[name]
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    coupled = named_class(dataclass(frozen=True, kw_only=True)(Coupled), __name__)(ours, weight_decay=0.3, **options)
    plain = CLASSES[name](theirs, weight_decay=0.0, **options)
    for t in range(3):
        give_gradients(ours, t)
        give_gradients(theirs, t)
        for p in theirs:
            p.grad.add_(p.detach(), alpha=0.3)
        step(coupled)
        step(plain)
    close(ours, theirs, ulps=16)
