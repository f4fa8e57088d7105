"""The state as named tensors."""

from __future__ import annotations

import pytest
import torch

import psgd_torch_backend
from psgd.methods import METHODS
from psgd_torch_backend import PSGD, KronWhiten, state_arrays

SHAPES = {"layer.weight": (3, 2), "layer.bias": (3,)}


def stepped(method: str, named: bool = True) -> tuple[PSGD, list[torch.nn.Parameter]]:
    """An optimizer of a method after a step with a fit, in which the last of three parameters took no part."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in (*SHAPES.values(), (2,))]
    rank = {"rank_of_approximation": 2} if hasattr(METHODS[method], "rank_of_approximation") else {}
    optimizer = getattr(psgd_torch_backend, METHODS[method].title)(
        zip((*SHAPES, "unused"), params, strict=True) if named else params, **rank
    )
    for p in params[:2]:
        p.grad = torch.arange(1.0, 1.0 + p.numel()).reshape(p.shape)
    pairs = {name: [torch.ones_like(p) for p in params] for name in ("Hvp", "vector")}
    optimizer.step(**(pairs | {"update_preconditioner": True} if METHODS[method]().recipe().newton else {}))
    return optimizer, params


@pytest.mark.parametrize("method", METHODS)
def test_the_state_is_shown_by_name(method: str):
    """All of it, as what it is and not as a copy; what others keep beside it is not shown."""
    optimizer, params = stepped(method)
    optimizer.state[params[0]]["of others"] = torch.ones(1)
    arrays = state_arrays(optimizer)
    expected = {}
    for name, p in zip(SHAPES, params, strict=False):
        for key, value in optimizer.state[p].items():
            if key != "of others":
                inner = {f"/{i}": x for i, x in value.items()} if isinstance(value, dict) else {"": value}
                expected |= {f"{name}/{key}{i}": x for i, x in inner.items()}
    assert {key: id(x) for key, x in arrays.items()} == {key: id(x) for key, x in expected.items()}
    assert arrays["layer.weight/step"] == 1 and "layer.bias/Q/0" in arrays
    assert ("layer.bias/since" in arrays) == METHODS[method]().schedule().counts
    assert ("layer.bias/momentum" in arrays) == METHODS[method]().recipe().momentum


def test_parameters_without_names_are_numbered_over_all_groups():
    optimizer, params = stepped("procrustes", named=False)
    late = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})
    assert {key.partition("/")[0] for key in state_arrays(optimizer)} == {"0", "1"}
    params[0].grad = params[1].grad = None
    late.grad = torch.ones(2)
    optimizer.step()
    assert {key.partition("/")[0] for key in state_arrays(optimizer)} == {"0", "1", "3"}


def test_two_parameters_of_one_name_are_refused():
    groups = [{"params": [("weight", torch.nn.Parameter(torch.ones(2)))]} for _ in range(2)]
    with pytest.raises(ValueError, match="KronWhiten: two parameters are called 'weight'; give each a name of its own"):
        state_arrays(KronWhiten(groups))


def test_before_the_first_step_there_is_nothing_to_show():
    assert state_arrays(KronWhiten([torch.nn.Parameter(torch.ones(2))])) == {}
