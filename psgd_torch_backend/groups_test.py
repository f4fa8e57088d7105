"""What a group may hold, and how hyperparameters may be given: by position, by other names, beside what others keep."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from psgd.methods import METHODS
from psgd_torch_backend import PSGD, Affine, Kron, KronWhiten, LowRankApproximation, LRAWhiten, Procrustes, XMat
from psgd_torch_backend._groups import ADAPTER_DEFAULTS, SKIPS, SWITCHES, of_torchs_optimizers, renamed
from psgd_torch_backend._testing import CLASSES, assert_untouched, equal, of_rank, parameters, run

RENAMED = {name: made for name, made in CLASSES.items() if renamed(made.method)}


@pytest.fixture(params=RENAMED.values(), ids=RENAMED)
def renamed_class(request: pytest.FixtureRequest) -> type[PSGD]:
    """A method with `b1`, which a group calls `momentum`."""
    return request.param


# ---- what others keep in a group ------------------------------------------------------------
OTHERS = {
    "name": "no_decay",
    "lr_scale": 0.5,
    "lr_mult": 2.0,
    "use_muon": True,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "fused": None,
    "dampening": 0.0,
    "type": "matrix",
    "no_weight_decay": True,
    "momentum_decay": 4e-3,
    "anything": [1, 2],
}


@pytest.mark.contract("torch: groups")
def test_keys_of_others_stay_in_a_group(optimizer_class: type[PSGD]):
    """Given to the class and to `add_param_group`, copied, pickled, saved and loaded; steps are the same without."""
    plain, params = (parameters((4, 3), (4, 3), (5,)) for _ in range(2))
    rank = of_rank(optimizer_class, 2)

    def made(params: list[nn.Parameter], **others: Any) -> PSGD:
        optimizer = optimizer_class([{"params": params[:1], **others}, {"params": params[1:2]}], lr=0.01, **rank)
        optimizer.add_param_group({"params": params[2:], **others})
        return optimizer

    optimizer, twin = made(params, **OTHERS), made(plain)
    run(optimizer, params, range(2))
    run(twin, plain, range(2))
    assert equal(params, plain)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = made(copy.deepcopy(params))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for one in (optimizer, resumed, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        first, second, late = one.param_groups
        assert OTHERS.items() <= first.items() and OTHERS.items() <= late.items() and "name" not in second
        ours = {*optimizer.defaults, *SKIPS, "params"}
        assert first.keys() == ours | OTHERS.keys() and second.keys() == ours


@pytest.mark.contract("torch: groups")
def test_no_argument_of_torchs_optimizers_is_taken_for_a_misspelt_one(optimizer_class: type[PSGD]):
    """Nor one that ours have themselves, at its default."""
    keys = of_torchs_optimizers() - {"params"}
    assert {"betas", "eps", "amsgrad", "foreach", "fused", "capturable", "differentiable", "dampening", "rho"} <= keys
    group = {"params": parameters((3,))} | {k: optimizer_class(parameters((3,))).defaults.get(k, 0.5) for k in keys}
    assert keys <= optimizer_class([group], **of_rank(optimizer_class, 2)).param_groups[0].keys()


@pytest.mark.contract("input: names")
def test_near_misses_are_refused_in_a_group(optimizer_class: type[PSGD]):
    """Of every name, by one letter and by case; and by what it is called elsewhere."""
    params = parameters((3, 2))
    optimizer = optimizer_class(params, **of_rank(optimizer_class, 2))
    before = copy.deepcopy((params, optimizer.state_dict()))
    said = "unknown hyperparameter '{}'; did you mean '{}'\\? It has lr, "
    for name in optimizer.defaults:
        for wrong in (name.upper() if name.islower() else name.lower(), name + name[-1]):
            with pytest.raises(ValueError, match=said.format(wrong, name)):
                optimizer.add_param_group({"params": parameters((2,)), wrong: 0.1})
    for wrong, meant in (("learning_rate", "lr"), ("Learning-Rate", "lr"), ("beta1", "momentum")):
        with pytest.raises(ValueError, match=said.format(wrong, meant)):
            optimizer_class([{"params": parameters((2,)), wrong: 0.1}])
    assert_untouched(optimizer, params, before)


@pytest.mark.contract("torch: groups")
def test_layer_decay_runs():
    """In the manner of timm: groups with a scale, a decay and the names of their parameters, driven by a scheduler."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    named = list(model.named_parameters())
    groups = [
        {"lr_scale": 0.5 ** (3 - i), "weight_decay": 0.1 * (p.ndim > 1), "params": [p], "param_names": [name]}
        for i, (name, p) in enumerate(named)
    ]
    optimizer = Procrustes(groups, lr=0.1)
    start = [p.detach().clone() for _, p in named]
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group["lr_scale"]
        optimizer.zero_grad()
        model(torch.ones(5, 4)).square().sum().backward()
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0125, 0.025, 0.05, 0.1]
    assert [name for group in optimizer.param_groups for name in group["param_names"]] == [name for name, _ in named]
    assert all(not torch.equal(a, p) for a, (_, p) in zip(start, named, strict=True))


@pytest.mark.contract("torch: state dict")
def test_a_function_that_others_keep_is_not_saved_and_stays():
    (p,) = parameters((3,))
    optimizer = Procrustes([{"params": [p], "schedule": abs}])
    saved = optimizer.state_dict()
    assert "schedule" not in saved["param_groups"][0]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["schedule"] is abs


@pytest.mark.contract("torch: flags")
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_of_torchs_optimizers_are_taken_where_they_are_off(optimizer_class: type[PSGD], name: str):
    """As programs pass them to every optimizer; in a group they are another's."""
    for off in (None, False):
        assert optimizer_class(parameters((2,)), **{name: off}).defaults.keys().isdisjoint(SWITCHES)
    with pytest.raises(
        ValueError, match=f"^{optimizer_class.__name__}: {name}=True would have no effect, .*; leave it out"
    ):
        optimizer_class(parameters((2,)), **{name: True})
    assert optimizer_class([{"params": parameters((2,)), name: True}]).param_groups[0][name] is True


# ---- values that are edited between steps ---------------------------------------------------
def two_groups(optimizer_class: type[PSGD], **second: Any) -> tuple[list[nn.Parameter], PSGD]:
    """After two steps."""
    params = parameters((4, 3), (5,))
    groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1])], **second}]
    optimizer = optimizer_class(groups, lr=0.01, **of_rank(optimizer_class, 2))
    run(optimizer, params, range(2))
    return params, optimizer


def refused_at_the_step(
    optimizer: PSGD, params: list[nn.Parameter], text: str, error: type[Exception] = ValueError
) -> None:
    """In one sentence; the first group has not moved either."""
    before = copy.deepcopy(params), str(optimizer.state)
    with pytest.raises(error, match=text) as caught:
        run(optimizer, params, range(2, 3))
    assert "\n" not in str(caught.value)
    assert equal(params, before[0]) and str(optimizer.state) == before[1]


RATES = [float("nan"), -1.0, [0.1], None, "0.1", torch.tensor([0.0, 1.0]), torch.tensor(float("inf")), True]


@pytest.mark.contract("input: numbers")
def test_a_rate_that_is_spoilt_in_the_second_group_moves_nothing(optimizer_class: type[PSGD]):
    params, optimizer = two_groups(optimizer_class)
    for name in ("lr", "weight_decay"):
        for value in RATES:
            kept, optimizer.param_groups[1][name] = optimizer.param_groups[1][name], value
            refused_at_the_step(
                optimizer, params, rf"{optimizer_class.method.name}.* {name}\b.* \(in param_groups\[1\]\)$"
            )
            optimizer.param_groups[1][name] = kept
    run(optimizer, params, range(2, 3))


def schedule_of_errors(step: float) -> float:
    raise ArithmeticError("no rate")


SCHEDULED = [(made, f.name) for made in CLASSES.values() for f in fields(made.method) if f.metadata["scheduled"]]


@pytest.mark.contract("input: numbers")
@pytest.mark.parametrize(("made", "name"), SCHEDULED, ids=[f"{made.__name__} {name}" for made, name in SCHEDULED])
def test_a_schedule_that_fails_moves_nothing(made: type[PSGD], name: str):
    """It is asked before anything changes, in all groups. What it returns is a number in the range, or 0."""
    params, optimizer = two_groups(made)
    kept = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = schedule_of_errors
    refused_at_the_step(optimizer, params, "no rate", ArithmeticError)
    for value in (None, "0.5", torch.ones(2), float("nan"), -0.5, 10**400):
        optimizer.param_groups[1][name] = lambda step, value=value: value
        refused_at_the_step(
            optimizer, params, rf"{name} gives .* at step 3, not a number in .* \(in param_groups\[1\]\)$"
        )
    for value in (kept, lambda step: 0, lambda step: torch.tensor([0.5]), lambda step: step > 1):
        optimizer.param_groups[1][name] = value
        run(optimizer, params, range(2, 3))


@pytest.mark.contract("input: numbers")
def test_a_tensor_of_one_number_is_a_rate_of_scalars_too(optimizer_class: type[PSGD]):
    """Whatever its shape."""
    ends = []
    for lr in (torch.tensor(0.01), torch.full((1, 1), 0.01)):
        params = parameters((4, 3), ())
        ends.append(run(optimizer_class(params, lr=lr, **of_rank(optimizer_class, 2)), params, range(2)))
    assert equal(*ends) and ends[1][1].shape == ()


@pytest.mark.contract("torch: late parameters")
def test_groups_edited_in_place_need_as_many_names(optimizer_class: type[PSGD]):
    params, optimizer = two_groups(optimizer_class)
    group = optimizer.param_groups[1]
    group["params"] = [params[1], *parameters((2,))]
    said = r"param_groups\[1\] has 2 params and param_names=\['b'\]; give it as many names, or delete"
    refused_at_the_step(optimizer, params, said)
    for told in (optimizer.summary, lambda: optimizer.load_state_dict(optimizer.state_dict())):
        with pytest.raises(ValueError, match="param_names"):
            told()
    group["params"] = None
    refused_at_the_step(optimizer, params, r"params of param_groups\[1\] must be a list of tensors")
    group["params"] = params[1:]
    del group["weight_decay"]
    refused_at_the_step(optimizer, params, r"param_groups\[1\] has lost its 'weight_decay'")


# ---- by position ----------------------------------------------------------------------------
def test_arguments_by_position():
    """As quad_torch 0.4.5, psgd_jax 0.2.9 and kron_torch 0.3.3 take them, the mask apart, which optax alone has."""
    quad = (0.1, "adam", 0.9, 0.2, 64, 2.0, 0.6, 1e-8, "float64")
    with_a_coin = (0.1, 0.5, 0.8, True, 0.2)
    common = (0.2, 0.7, 3.0, "1st", 5, "float64", None)
    calls = {
        Procrustes: quad,
        CLASSES["quad"]: quad,
        Kron: (0.1, 0.8, 0.2, 0.5, 64, 1, "one_diag", False, 0.2, 0.7, "float64", "float64", None, "float32"),
        Affine: (*with_a_coin, 64, 3.0, *common),
        XMat: (*with_a_coin, *common),
        LowRankApproximation: (*with_a_coin, 4, *common),
        KronWhiten: (0.1,),
        LRAWhiten: (0.1,),
    }
    for made, values in calls.items():
        optimizer = made(parameters((4, 3)), *values)
        names = [f"{renamed(made.method).get(name, name)}" for name in made.method.positional if "mask" not in name]
        assert [optimizer.defaults[name] for name in names[: len(values)]] == list(values)
    assert Procrustes(parameters((2,)), 0.1, "adam", 0.9).defaults["momentum"] == 0.9
    assert Kron(parameters((2,)), 1e-3, 0.8).defaults["momentum"] == 0.8


def test_the_signature_says_what_goes_by_position(optimizer_class: type[PSGD]):
    signature, method = inspect.signature(optimizer_class), optimizer_class.method
    placed = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = [f.name for f in fields(method)]
    assert placed == ["params", *(renamed(method).get(x, x) for x in method.positional if x in own)]
    values = [signature.parameters[name].default for name in placed[1:]]
    assert optimizer_class(parameters((2,)), *values).defaults == optimizer_class(parameters((2,))).defaults
    with pytest.raises(TypeError, match=f"^{optimizer_class.__name__} takes lr.* by position and the others by name"):
        optimizer_class(parameters((2,)), *values, 1, 2)
    for again in {"lr", *placed[1:3]}:
        with pytest.raises(TypeError, match=f"^{optimizer_class.__name__}: {again} is given twice"):
            optimizer_class(parameters((2,)), *values, **{again: 0.5})


def test_another_order_is_said_to_be_another():
    with pytest.raises(TypeError, match="the others by name, since the order of psgd_torch `KronWhiten` is another"):
        KronWhiten(parameters((2,)), 0.1, 1.0)
    with pytest.raises(TypeError, match="momentum is given twice"):
        Kron(parameters((2,)), 0.1, 0.9, b1=0.5)


def test_one_parameter_may_stand_alone(optimizer_class: type[PSGD]):
    """As in psgd_torch, and as in a group of torch's optimizers."""
    (alone,), (listed,) = parameters((5, 4)), parameters((5, 4))
    run(optimizer_class(alone, lr=0.1), [alone], range(2))
    run(optimizer_class([listed], lr=0.1), [listed], range(2))
    assert equal([alone], [listed]) and not equal([alone], parameters((5, 4)))


# ---- b1, which a group calls momentum -------------------------------------------------------
@pytest.mark.contract("torch: groups")
def test_b1_is_taken_wherever_it_is_given(renamed_class: type[PSGD]):
    (p, q), rank = parameters((3, 2), (3, 2)), of_rank(renamed_class, 2)
    optimizer = renamed_class([{"params": [p], "b1": 0.25}], b1=0.5, **rank)
    optimizer.add_param_group({"params": [q]})
    optimizer.add_param_group({"params": parameters((4,)), "b1": 0.75})
    assert [group["momentum"] for group in optimizer.param_groups] == [0.25, 0.5, 0.75]
    assert not any("b1" in group for group in (*optimizer.param_groups, optimizer.defaults))
    assert "b1" not in str(optimizer) and "b1" not in inspect.signature(renamed_class).parameters


@pytest.mark.contract("torch: old state dicts")
def test_groups_of_before_the_key_was_momentum_load(renamed_class: type[PSGD]):
    params, rank = parameters((3, 2)), of_rank(renamed_class, 2)
    optimizer = renamed_class(params, momentum=0.5, **rank)
    run(optimizer, params, range(2))
    saved, state = copy.deepcopy(optimizer.state_dict()), optimizer.__getstate__()
    for held in (*saved["param_groups"], state["defaults"], *state["param_groups"]):
        held["b1"] = held.pop("momentum")
    unpickled = renamed_class.__new__(renamed_class)
    unpickled.__setstate__(state)
    optimizer = renamed_class(params, **rank)
    optimizer.load_state_dict(saved)
    for one in (optimizer, unpickled):
        assert one.param_groups[0]["momentum"] == 0.5 and "b1" not in one.param_groups[0]
        run(one, params, range(2, 3))
    unpickled.add_param_group({"params": parameters((2,))})
    assert unpickled.param_groups[1]["momentum"] == unpickled.defaults["momentum"] == 0.5


@pytest.mark.contract("input: names")
def test_b1_and_momentum_are_not_both_given(renamed_class: type[PSGD]):
    both, said = {"momentum": 0.5, "b1": 0.5}, r"b1 and momentum are one hyperparameter, both are given; leave b1 out"
    with pytest.raises(ValueError, match=said):
        renamed_class(parameters((2,)), **both)
    with pytest.raises(ValueError, match=said):
        renamed_class([{"params": parameters((2,)), **both}])


@pytest.mark.contract("input: names")
def test_a_group_that_is_edited_under_b1_is_refused_at_the_step(renamed_class: type[PSGD]):
    params = parameters((3, 2))
    optimizer = renamed_class(params, **of_rank(renamed_class, 2))
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["b1"] = 0.5
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(ValueError, match=f"{renamed_class.__name__}: a group calls b1 'momentum'; set that"):
        optimizer.step()
    assert_untouched(optimizer, params, before)
    del optimizer.param_groups[0]["b1"]
    optimizer.param_groups[0]["momentum"] = 1.5
    with pytest.raises(ValueError, match=rf"{renamed_class.method.name}: momentum=1\.5 must lie in \[0, 1\)"):
        optimizer.step()


# ---- names of other packages ----------------------------------------------------------------
@pytest.mark.contract("input: names")
def test_names_of_other_packages_find_ours():
    meant = [
        (Kron, {"precond_lr": 0.1}, "preconditioner_lr"),
        (Kron, {"precond_init_scale": 1.0}, "preconditioner_init_scale"),
        (Kron, {"learning_rate": 0.1}, "lr"),
        (Kron, {"betas": (0.9, 0.99)}, "momentum"),
        (KronWhiten, {"lr_params": 0.1}, "lr"),
        (KronWhiten, {"betas": (0.9, 0.99)}, "momentum"),
        (Procrustes, {"b1": 0.9}, "momentum"),
        (Affine, {"preconditioner_lr": 0.1}, "precond_lr"),
    ]
    for made, options, name in meant:
        with pytest.raises(ValueError, match=rf"did you mean '{name}'\? It has lr, "):
            made(parameters((2,)), **options)
    with pytest.raises(ValueError, match=r"memory_save_mode='smart_one_diag' must be .*; did you mean 'one_diag'\?$"):
        Kron(parameters((2,)), memory_save_mode="smart_one_diag")
    with pytest.raises(ValueError, match=r"'merge_dims'; whether axes are merged is part of a method here"):
        Kron(parameters((2,)), merge_dims=True)


@pytest.mark.contract("input: names")
def test_an_unknown_name_lists_all_that_there_are(optimizer_class: type[PSGD]):
    listed = ", ".join([*optimizer_class(parameters((2,))).defaults])
    assert set(ADAPTER_DEFAULTS) <= set(listed.split(", ")) and optimizer_class.method in METHODS.values()
    with pytest.raises(ValueError, match=f"unknown hyperparameter 'amsgrad'; it has {listed}$"):
        optimizer_class(parameters((2,)), amsgrad=True)
