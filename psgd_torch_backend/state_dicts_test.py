"""State dicts that were spoilt at random: refused and everything as it was, or loaded and good for the next step."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from psgd_torch_backend._testing import CLASSES, NO_ARGUMENT, NO_RATE, WHOLE, Trial

SPOILT = 200  # of all methods
NO_COUNT = (inf, nan, 2**70, 0.5, -1, None, "3", True, [1], torch.ones(2), torch.tensor(inf), torch.tensor(1j))
NO_TENSOR = (None, 5, "text", [1.0], {}, torch.ones(7), torch.ones(3, 2, 1), torch.tensor(1), torch.eye(3).to_sparse())
LATE = "first gradient after the first step"
Saved = dict[str, Any]


def entry_of(saved: Saved, r: random.Random) -> dict[str, Any]:
    return saved["state"][r.choice(list(saved["state"]))]


def group_of(saved: Saved, r: random.Random) -> dict[str, Any]:
    return r.choice(saved["param_groups"])


def tensors_of(entry: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where the tensors of an entry are, the counters apart."""
    own = [(entry, "momentum")] if "momentum" in entry else []
    return own + [(entry[kind], key) for kind in ("Q", "L", "P") for key in entry.get(kind, {})]


def a_count(saved: Saved, r: random.Random) -> None:
    entry = entry_of(saved, r)
    entry[r.choice([name for name in ("step", "since") if name in entry])] = r.choice(NO_COUNT)


def a_tensor(saved: Saved, r: random.Random) -> None:
    held, key = r.choice(tensors_of(entry_of(saved, r)))
    held[key] = r.choice(NO_TENSOR)


def some_numbers(saved: Saved, r: random.Random) -> None:
    """Not finite, complex, whole, or on no device; zero, where that is for ever."""
    entry = entry_of(saved, r)
    held, key = r.choice(tensors_of(entry))
    x = held[key].clone()
    turns: list[Callable[[Tensor], Tensor]] = [lambda x: x.to(torch.complex64), lambda x: x.to(torch.int64)]
    turns += [lambda x: x.to("meta"), lambda x: x.fill_(nan), lambda x: x * inf, lambda x: x[None], lambda x: x * 0]
    held[key] = r.choice(turns)(x)


def a_key(saved: Saved, r: random.Random) -> None:
    """Lost, under another name, or one too many."""
    entry = entry_of(saved, r)
    held = r.choice([entry, *(entry[kind] for kind in ("Q", "L") if entry[kind])])
    key = r.choice(list(held))
    change = r.choice(["lost", "renamed", "extra"])
    value = held[key] if change == "extra" else held.pop(key)
    if change != "lost":
        held[r.choice(["7", "01", 0, None, "Q", "theirs"])] = value


def an_entry(saved: Saved, r: random.Random) -> None:
    index = r.choice(list(saved["state"]))
    saved["state"][index] = r.choice([None, 5, [], "text", {"Q": None}, {"step": 3}, {}, {"theirs": 1}])


def the_entries(saved: Saved, r: random.Random) -> None:
    """Lost, of nobody, of another, or under words, as JSON has them."""
    state = saved["state"]
    first, second = r.sample(list(state), 2)
    change = r.choice(["lost", "nobody's", "another's", "words"])
    if change == "lost":
        del state[first]
    elif change == "nobody's":
        state[r.choice([99, "99", -1])] = state[first]
    elif change == "another's":
        state[first], state[second] = state[second], state[first]
    else:
        saved["state"] = {str(k): v for k, v in state.items()}


def the_parameters(saved: Saved, r: random.Random) -> None:
    group = group_of(saved, r)
    group["params"] = r.choice([[0, 0], [0], [], None, "ab", 5, [None, 1], [[0], [1]], [0.5, 1.5], [8, 9]])


def the_names(saved: Saved, r: random.Random) -> None:
    group = group_of(saved, r)
    group["param_names"] = r.choice([5, "ab", ["a"], [1, 2], {"a": 1, "b": 2}, ["x", "y"], ["a", "a"], []])


def a_value(saved: Saved, r: random.Random) -> None:
    group = group_of(saved, r)
    name = r.choice([*NO_ARGUMENT, "lr", "weight_decay", "momentum", "skipped", "seed", "method"])
    group[name] = r.choice([*NO_ARGUMENT.get(name, ()), *NO_RATE, {}])


def the_groups(saved: Saved, r: random.Random) -> None:
    whole = [None, 5, [], {}, [None, None], saved["param_groups"][:1], saved["param_groups"][::-1]]
    saved["param_groups"] = r.choice(whole)


def all_of_it(saved: Saved, r: random.Random) -> None:
    key = r.choice(list(saved))
    if r.random() < 0.5:
        del saved[key]
    else:
        saved[key] = r.choice([None, 5, "text", [1], set()])


KINDS = (a_count, a_tensor, some_numbers, a_key, an_entry, the_entries)
KINDS += (the_parameters, the_names, a_value, the_groups, all_of_it)


@pytest.mark.contract("state: of others")
@pytest.mark.parametrize("name", CLASSES)
def test_a_spoilt_state_dict_is_refused_or_good_for_a_step(name: str):
    place = list(CLASSES).index(name)
    r, refused = random.Random(100 + place), 0
    trial = Trial(CLASSES[name], place)
    good = copy.deepcopy(trial.optimizer.state_dict())
    count = SPOILT // len(CLASSES) + 1
    for kind in r.sample(KINDS, len(KINDS)) + r.choices(KINDS, k=count - len(KINDS)):
        saved = copy.deepcopy(good)
        kind(saved, r)
        before = trial.everything()
        try:
            trial.optimizer.load_state_dict(saved)
        except ValueError as error:
            said = str(error)
            assert said and "\n" not in said and len(said) < 1200, (kind.__name__, said)
            assert trial.everything() == before, (kind.__name__, said)
            refused += 1
            continue
        except Exception as error:
            error.add_note(f"in {kind.__name__}")
            raise
        try:
            trial.step()
        except RuntimeError as error:
            # A lost entry may be of a parameter that never had a gradient, which one preconditioner then leaves out.
            assert name in WHOLE and LATE in str(error), (kind.__name__, error)
        assert all(p.isfinite().all() for p in trial.params), kind.__name__
        trial.optimizer.load_state_dict(copy.deepcopy(good))
    assert refused >= count // 2
