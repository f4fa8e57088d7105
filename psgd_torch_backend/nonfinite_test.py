"""Gradients that hold a NaN or an infinity: skipped, raised, or let through, as told."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from math import inf, nan

import pytest
import torch
from torch import nn

from psgd_torch_backend import PSGD, Kron, KronNewton, KronWhiten, Procrustes
from psgd_torch_backend._nonfinite import finite
from psgd_torch_backend._testing import (
    assert_untouched,
    equal,
    give_gradients,
    newton,
    of_rank,
    parameters,
    run,
)

pytestmark = pytest.mark.contract("step: not finite")
BAD = (nan, inf, -inf)


def spoilt(optimizer: PSGD, params: Sequence[nn.Parameter], t: int, value: float = nan) -> None:
    """A step of which one entry of one gradient is a value."""
    give_gradients(params, t)
    grads = [p.grad for p in params]
    grads[-1].view(-1)[-1] = value
    pairs = {}
    if newton(type(optimizer)):
        pairs = {"Hvp": [p.detach() for p in params], "vector": params, "update_preconditioner": True}
    optimizer.step(**pairs)


@pytest.mark.parametrize("value", BAD)
def test_a_skipped_step_is_as_if_it_had_not_been(optimizer_class: type[PSGD], value: float):
    """At first, later, and twice in a row: but for the count the run is the one without."""
    runs = []
    for bad in ((0, 2, 3), ()):
        params = parameters((4, 3), (4, 3), (5,))
        optimizer = optimizer_class(params, lr=0.01, **of_rank(optimizer_class, 2))
        for t in range(4):
            if t in bad:
                spoilt(optimizer, params, 9, value)
            run(optimizer, params, range(t, t + 1))
        runs.append((params, optimizer))
    (ours, skipping), (theirs, clean) = runs
    assert equal(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert {k: str(v) for k, v in skipping.state[p].items()} == {k: str(v) for k, v in clean.state[q].items()}
    assert [(group["skipped"], group["skipped_in_a_row"]) for group in skipping.param_groups] == [(3, 0)]
    assert skipping.summary().skipped == 3 and "3 steps skipped" in str(skipping.summary())
    assert "skipped" not in str(clean.summary())


def test_a_product_that_is_not_finite_is_skipped_where_it_is_fitted():
    params = parameters((4, 3))
    optimizer = KronNewton(params)
    run(optimizer, params, range(1))
    give_gradients(params, 1)
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    bad = {"Hvp": [torch.full((4, 3), nan)], "vector": [torch.ones(4, 3)]}
    optimizer.step(**bad, update_preconditioner=True)
    assert equal(params, before[0]) and str(optimizer.state_dict()["state"]) == str(before[1])
    optimizer.step(**bad, update_preconditioner=False)
    assert optimizer.param_groups[0]["skipped"] == 1 and all(p.isfinite().all() for p in params)


def test_too_many_in_a_row_are_an_error():
    """Which says so at each further one; a good step in between counts anew."""
    params = parameters((4, 3))
    optimizer = Procrustes([("layer", params[0])], max_skips=3)
    for t in range(5):
        spoilt(optimizer, params, 2 * t)
        spoilt(optimizer, params, 2 * t + 1)
        run(optimizer, params, range(t, t + 1))
    spoilt(optimizer, params, 0)
    spoilt(optimizer, params, 1)
    before = copy.deepcopy(params)
    for row in (3, 4):
        with pytest.raises(
            FloatingPointError, match=f"Procrustes: {row} steps in a row .* this one of layer; lower the"
        ):
            spoilt(optimizer, params, 2)
    assert equal(params, before) and optimizer.summary().skipped == 14


def test_the_count_is_saved():
    params = parameters((4, 3))
    optimizer = Kron(params)
    for _ in range(3):
        spoilt(optimizer, params, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = Kron(parameters((4, 3)))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert (again.param_groups[0]["skipped"], again.param_groups[0]["skipped_in_a_row"]) == (3, 3)
    assert again.summary() == optimizer.summary()


def test_raise_names_the_parameter_and_changes_nothing(optimizer_class: type[PSGD]):
    params = parameters((4, 3), (5,))
    named = list(zip(("first", "second"), params, strict=True))
    optimizer = optimizer_class(named, nonfinite="raise", **of_rank(optimizer_class, 2))
    run(optimizer, params, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(FloatingPointError, match=f"{optimizer_class.__name__}: the gradient of second holds a NaN or"):
        spoilt(optimizer, params, 2, inf)
    assert_untouched(optimizer, params, before)


def test_propagate_does_not_look():
    params = parameters((4, 3))
    optimizer = KronWhiten(params, nonfinite="propagate")
    spoilt(optimizer, params, 0)
    assert not params[0].isfinite().any() and optimizer.param_groups[0]["skipped"] == 0


def test_groups_with_one_policy_skip_together():
    """Groups that differ in a rate only are one model; those that do not look go on."""
    first, second, third = parameters((4, 3), (4, 3), (4, 3))
    optimizer = KronWhiten([{"params": [first]}, {"params": [second]}, {"params": [third], "nonfinite": "propagate"}])
    before = copy.deepcopy([first, second, third])
    give_gradients([first, second, third], 0)
    second.grad[0, 0] = nan
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip((first, second, third), before, strict=True)]
    assert moved == [False, False, True]
    assert [group["skipped"] for group in optimizer.param_groups] == [1, 1, 0]


def test_large_is_not_infinite():
    """Sums of finite numbers may overflow, of a gradient and of half precisions."""
    assert finite(
        [
            torch.full((4,), 3e38),
            torch.full((4,), 6e4, dtype=torch.float16),
            torch.full((4,), 1e300, dtype=torch.float64),
        ]
    )
    assert finite([torch.full((4,), complex(3e38, 3e38))]) and finite([])
    for value in (*BAD, complex(0, nan)):
        assert not finite([torch.ones(2), torch.tensor([1, value, -value])])


WRONG = [
    ({"nonfinite": "ignore"}, "nonfinite='ignore' must be one of 'skip', 'raise', 'propagate'"),
    ({"nonfinite": True}, "nonfinite=True must be one of"),
    ({"max_skips": 0}, "max_skips=0 must be a whole number above 0"),
    ({"max_skips": 2.5}, "max_skips=2.5 must be a whole number above 0"),
    ({"max_skips": True}, "max_skips=True must be a whole number above 0"),
]


@pytest.mark.parametrize(("options", "text"), WRONG)
def test_a_wrong_policy_is_refused(options: dict, text: str):
    with pytest.raises(ValueError, match=f"Procrustes: {text}"):
        Procrustes(parameters((4, 3)), **options)
    with pytest.raises(ValueError, match=f"Procrustes: {text}"):
        Procrustes([{"params": parameters((4, 3)), **options}])
