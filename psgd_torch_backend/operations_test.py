"""Operations on an optimizer in random order, most of them bad: what is refused changes nothing, the rest goes on."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psgd.hyperparameters import group_key
from psgd_torch_backend._groups import ADAPTER_DEFAULTS, renamed
from psgd_torch_backend._testing import CLASSES, NO_ARGUMENT, NO_RATE, OWN, Trial, parameters

OPERATIONS = 90  # of each method


# ---- the kinds --------------------------------------------------------------------------------
NO_NUMBER = (nan, -1.0, -inf, "much", [], {}, 1j, torch.ones(2), object())


def bad_rate(t: Trial) -> None:
    with t.edited(t.group(), t.pick("lr", "weight_decay"), t.pick(*NO_RATE)):
        t.attempt(t.go, bad=True)


def bad_number(t: Trial) -> None:
    numbers = [f for f in fields(t.made.method) if f.metadata["kind"] in ("number", "integer")]
    with t.edited(t.group(), group_key(t.pick(*numbers)), t.pick(*NO_NUMBER)):
        t.attempt(t.go, bad=True)


def bad_choice(t: Trial) -> None:
    others = [f for f in fields(t.made.method) if f.metadata["kind"] not in ("number", "integer")]
    if others:
        with t.edited(t.group(), group_key(t.pick(*others)), t.pick("nobody", 5, [1, 2, 3], {}, object(), (nan, 1.0))):
            t.attempt(t.go, bad=True)


def bad_argument(t: Trial) -> None:
    name = t.pick(*ADAPTER_DEFAULTS)
    with t.edited(t.group(), name, t.pick(*NO_ARGUMENT[name])):
        t.attempt(t.go, bad=True)


def bad_count_of_skips(t: Trial) -> None:
    with t.edited(t.group(), t.pick("skipped", "skipped_in_a_row"), t.pick(None, -1, "x", 0.5)):
        t.attempt(t.go, bad=True)


def lost_key(t: Trial) -> None:
    group = t.group()
    with t.without(group, t.pick(*[key for key in group if key in t.optimizer.defaults])):
        t.attempt(t.go, bad=True)


def key_under_another_name(t: Trial) -> None:
    for name in renamed(t.made.method):
        with t.edited(t.group(), name, 0.5):
            t.attempt(t.go, bad=True)


def key_of_another(t: Trial) -> None:
    with t.edited(t.group(), t.pick("lr_scale", "betas", 7, None), t.pick(None, 1, [])):
        t.attempt(t.go, bad=False)


def group_that_is_bad(t: Trial) -> None:
    wrong = t.pick({"lrr": 1.0}, {"lr": nan}, {"stack": 1}, {"momentum": 1.5}, {"lr": torch.ones(2)})
    t.attempt(lambda: t.optimizer.add_param_group({"params": [("z", *parameters((2,)))], **wrong}), bad=True)


def group_of_what_is_there(t: Trial) -> None:
    t.attempt(lambda: t.optimizer.add_param_group({"params": [("z", t.param())]}), bad=True)


def group_of_what_cannot_be(t: Trial) -> None:
    makes = (lambda: nn.Parameter(torch.eye(2).to_sparse()), lambda: nn.UninitializedParameter())
    t.attempt(lambda: t.optimizer.add_param_group({"params": [("z", t.pick(*makes)())]}), bad=True)


def group_that_comes_and_goes(t: Trial) -> None:
    (p,) = parameters((6, 2))
    t.attempt(lambda: t.optimizer.add_param_group({"params": [("z", p)]}), bad=False)
    t.attempt(t.step, bad=False)
    t.optimizer.param_groups.pop()
    del t.optimizer.state[p]


def group_that_is_away(t: Trial) -> None:
    group = t.optimizer.param_groups.pop(t.pick(0, 1))
    t.attempt(t.step, bad=False)
    t.optimizer.param_groups.append(group)


def parameters_that_are_none(t: Trial) -> None:
    group = t.group()
    with t.edited(group, "params", t.pick(None, "ab", 5, [1.0, 2.0], group["params"][:1], [*group["params"]] * 2)):
        t.attempt(t.optimizer.step, bad=True)


def names_that_are_too_many(t: Trial) -> None:
    with t.edited(t.group(), "param_names", t.pick(["a"], "abc", 5, ["x", "y", "z"])):
        t.attempt(t.optimizer.step, bad=True)


def no_gradients(t: Trial) -> None:
    t.gradients()
    for p in t.pick(t.params, [t.param()]):
        p.grad = None
    t.attempt(t.go, bad=False)


def gradient_that_is_not_finite(t: Trial) -> None:
    group = t.group()
    with t.edited(group, "nonfinite", t.pick("skip", "raise")):
        for p in group["params"]:
            p.grad.view(-1)[-1] = t.pick(nan, inf, -inf)
        t.attempt(t.go, bad=group["nonfinite"] == "raise")
    t.attempt(t.step, bad=False)


def gradient_that_is_sparse(t: Trial) -> None:
    t.gradients()
    p = t.pick(*[p for p in t.params if p.ndim])
    p.grad = p.grad.to_sparse()
    t.attempt(t.go, bad=True)


def gradient_of_another_shape(t: Trial) -> None:
    t.gradients()
    p = t.param()
    data = p.data
    p.data = torch.ones(7, 2)
    t.attempt(t.go, bad=True)
    p.grad = None
    p.data = data


def parameter_of_another_shape(t: Trial) -> None:
    t.gradients()
    p = t.param()
    data, p.grad = p.data, None
    p.data = t.pick(torch.ones(7, 2), torch.ones(2, 7, 3))
    p.grad = torch.ones_like(p)
    t.attempt(t.go, bad=True)
    p.grad = None
    p.data = data


def gradient_of_another_dtype(t: Trial) -> None:
    t.gradients()
    p, dtype = t.param(), t.pick(torch.float64, torch.complex64)
    data, g, p.grad = p.data, p.grad, None
    p.data = data.to(dtype)
    p.grad = g.to(dtype)
    p.data = data
    t.attempt(t.go, bad=None if dtype == torch.float64 else True)
    p.grad = None


def entry_that_is_gone(t: Trial) -> None:
    """Of a parameter's state, or of its factors."""
    entry = t.optimizer.state[t.param()]
    for held, keys in ((entry, ["step", "L"] if entry["L"] else ["step"]), (entry["Q"], ["0"])):
        with t.without(held, t.pick(*keys)):
            t.attempt(t.go, bad=True)


def entry_that_is_another(t: Trial) -> None:
    p = t.param()
    entry = t.optimizer.state[p]
    things = (
        None,
        5,
        "x",
        torch.ones(9, 9),
        torch.ones(3, dtype=torch.int8),
        torch.eye(3).to_sparse(),
        1j * entry["Q"]["0"],
    )
    held, key = t.pick((entry, "momentum"), (entry["Q"], "0"), (entry, "step"), (entry, "Q"), (entry["Q"], "9"))
    with t.edited(held, key, t.pick(*things)):
        t.attempt(t.go, bad=True)


def state_that_is_none(t: Trial) -> None:
    with t.edited(t.optimizer.state, t.param(), t.pick(None, 5, [], "x")):
        t.attempt(t.go, bad=True)


def state_that_is_gone(t: Trial) -> None:
    """It begins anew, unless it is of one preconditioner with others."""
    p = t.param()
    whole = t.made.method().recipe().joint
    old = t.optimizer.state.pop(p)
    t.attempt(t.step, bad=whole)
    if whole:
        t.optimizer.state[p] = old


def state_of_others(t: Trial) -> None:
    p = t.param()
    t.optimizer.state[p]["ema"] = t.pick(p.detach().clone(), "x", None)
    t.optimizer.state["theirs"] = 1
    t.attempt(t.step, bad=False)


def schedule_that_raises(t: Trial) -> None:
    def raises(step: Any) -> float:
        raise OWN

    for f in fields(t.made.method):
        if f.metadata["scheduled"]:
            with t.edited(t.group(), f.name, raises):
                t.attempt(t.go, bad=True)


def schedule_of_garbage(t: Trial) -> None:
    value = t.pick(None, "0.5", torch.ones(2), nan, -1.0, [0.5], 1j, 10**400, object())
    for f in fields(t.made.method):
        if f.metadata["scheduled"]:
            with t.edited(t.group(), f.name, lambda step: value):
                t.attempt(t.go, bad=True)


def closure_that_raises(t: Trial) -> None:
    def closure() -> Tensor:
        raise OWN

    t.attempt(lambda: t.optimizer.step(closure), bad=True)


def pairs_that_are_none(t: Trial) -> None:
    t.gradients()
    whole = [torch.ones_like(p) for p in t.params]
    turn = t.pick(lambda x: x.to_sparse(), lambda x: x.to(torch.complex64), lambda x: x.to("meta"))
    pairs = {"Hvp": whole, "vector": [*whole[:3], turn(whole[3])], "update_preconditioner": True}
    t.attempt(lambda: t.optimizer.step(**t.pick(pairs, {"Hvp": []}, {**pairs, "vector": 5})), bad=True)


def garbage_to_load(t: Trial) -> None:
    saved = copy.deepcopy(t.optimizer.state_dict())
    wrong = (None, [], {}, 5, {"state": {}}, {**saved, "param_groups": None}, {**saved, "state": []})
    group = {**saved["param_groups"][0], "params": [0]}
    wrong += ({**saved, "param_groups": [group]}, {**saved, "param_groups": [5, 6]}, {**saved, "state": {0: None}})
    t.attempt(lambda: t.optimizer.load_state_dict(t.pick(*wrong)), bad=True)


def own_state_to_load(t: Trial) -> None:
    t.attempt(lambda: t.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict())), bad=False)
    t.attempt(t.step, bad=False)


def a_copy(t: Trial) -> None:
    t.optimizer = t.pick(copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))(t.optimizer)
    t.attempt(t.step, bad=False)


def a_parameter_that_is_frozen(t: Trial) -> None:
    p = t.param().requires_grad_(False)

    def closure() -> Tensor:
        t.optimizer.zero_grad()
        return sum((q**2).sum() for q in t.params)

    t.attempt(lambda: t.optimizer.step(closure), bad=False)
    p.requires_grad_(True)


def no_learning_rate(t: Trial) -> None:
    first, second = t.optimizer.param_groups
    with t.edited(first, "lr", 0.0), t.edited(second, "lr", torch.zeros(())):
        t.attempt(t.go, bad=False)


KINDS = [
    x
    for x in list(vars().values())
    if callable(x) and getattr(x, "__annotations__", {}) == {"t": "Trial", "return": "None"}
]


@pytest.mark.contract("torch: closure")
@pytest.mark.contract("torch: foreign entries")
@pytest.mark.contract("step: mismatches")
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_refused_changes_nothing_and_the_rest_goes_on(name: str):
    """Every kind once, and then in random order."""
    seed = list(CLASSES).index(name)
    trial = Trial(CLASSES[name], seed)
    kinds = trial.random.sample(KINDS, len(KINDS)) + trial.random.choices(KINDS, k=OPERATIONS - len(KINDS))
    for kind in kinds:
        try:
            kind(trial)
        except Exception as error:
            error.add_note(f"in {kind.__name__}")
            raise
    trial.attempt(trial.step, bad=False)
    assert len(KINDS) >= 25 and trial.refusals >= OPERATIONS // 3
