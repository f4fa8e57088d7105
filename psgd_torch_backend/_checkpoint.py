"""How an optimizer is saved; what may be loaded into one, and how it gets there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from psgd.arrays import Factors
from psgd.hyperparameters import Method
from psgd_torch_backend import _groups as groups
from psgd_torch_backend._checks import OURS, Forms, check_layer_names, check_layers, wrong_tensors
from psgd_torch_backend._groups import Group
from psgd_torch_backend._job import Job, Stepper
from psgd_torch_backend._state import COUNTERS, Entry

LARGEST_COUNT = 2**53  # up to which float64, in which schedules see it, has every whole number
WRAPPERS = {"module", "_orig_mod"}  # what DistributedDataParallel and torch.compile put into names
StateDict = dict[str, Any]
Places = list[list[tuple[int, int]]]  # of each parameter of each group: group and place in what was saved


# ---- saving ---------------------------------------------------------------------------------
@contextmanager
def plain_groups(optimizer: torch.optim.Optimizer, method: type[Method]) -> Iterator[None]:
    """Groups are saved with the name of their method and without functions, before the hooks of others see them."""

    def strip(_: torch.optim.Optimizer, state_dict: StateDict) -> None:
        state_dict["param_groups"] = [
            {"method": method.name, **{k: v for k, v in group.items() if not callable(v)}}
            for group in state_dict["param_groups"]
        ]

    handle = optimizer.register_state_dict_post_hook(strip, prepend=True)
    try:
        yield
    finally:
        handle.remove()


# ---- loading --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Loader:
    """Loads state dicts into an optimizer. owner: the name of its class. job: of a group. stepper: of a job."""

    owner: str
    method: type[Method]
    optimizer: torch.optim.Optimizer
    job: Callable[[Group], Job]
    stepper: Callable[[Job], Stepper]

    @contextmanager
    def loading(self, state_dict: StateDict) -> Iterator[None]:
        """In it torch's `load_state_dict` loads the groups, and the state as `read` gives it."""
        if not hasattr(state_dict, "copy"):
            raise ValueError(f"{self.owner}: the state dict is {type(state_dict).__name__} and no dictionary")
        state: dict[Any, Any] = {}

        def capture(_: torch.optim.Optimizer, saved: StateDict) -> StateDict:
            to_load = self.read(saved)
            if to_load is None:
                return saved  # torch refuses it
            state.update(to_load["state"])
            # Without the state, which torch would cast to the parameters' dtype; the factors have their own.
            return {**to_load, "state": {}}

        def put(optimizer: torch.optim.Optimizer) -> None:
            optimizer.state.update(state)

        # After the hooks that may still change what is loaded, and before those that want to see it.
        handles = (
            self.optimizer.register_load_state_dict_pre_hook(capture),
            self.optimizer.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, saved: StateDict) -> StateDict | None:
        """The groups and the state to load, the state by its parameters; None where the groups are others. Raises
        ValueError where the state dict does not fit.
        """
        wrong = wrong_form(saved)
        if wrong:
            raise ValueError(f"{self.owner}: the state dict {wrong}; nothing was loaded")
        if not alike(self.optimizer.param_groups, saved):
            return None
        saved = in_words(saved)
        param_groups, entries = self._groups_and_entries(saved)
        of_parameters = {index for group in param_groups for index in group["params"]}
        others = {key: x for key, x in saved["state"].items() if key not in of_parameters}
        state = others | {p: placed(entry, p.device) for p, entry in entries.items()}
        return {**saved, "param_groups": param_groups, "state": state}

    def _groups_and_entries(self, saved: StateDict) -> tuple[list[Group], dict[Tensor, Entry]]:
        """Saved groups, completed by what was not saved, and the saved state of each parameter; or an error."""
        current, loaded = self.optimizer.param_groups, self._completed(saved)
        saved_places = places(current, loaded)
        indices = [[loaded[i]["params"][k] for i, k in of_group] for of_group in saved_places]
        if all(group.get("param_names") for group in loaded):
            names = [[loaded[i]["param_names"][k] for i, k in of_group] for of_group in saved_places]
            for group, names_of_group in zip(loaded, names, strict=True):
                group["param_names"] = names_of_group
        index_of = {
            p: index
            for group, of_group in zip(current, indices, strict=True)
            for p, index in zip(group["params"], of_group, strict=True)
        }
        entries = {p: saved["state"][index] for p, index in index_of.items() if index in saved["state"]}
        filled = [{**new, "params": old["params"]} for old, new in zip(current, loaded, strict=True)]
        for i, group in enumerate(filled):
            self._check(group, entries, {k for k, _ in saved_places[i]} - {i})
        known = {name for group in filled for name, _ in groups.named_in(self.owner, current, group)}
        check_layer_names(self.owner, [group["scanned_layers"] for group in filled], known)
        return [{**group, "params": of_group} for group, of_group in zip(loaded, indices, strict=True)], entries

    def _completed(self, saved: StateDict) -> list[Group]:
        """Saved groups, completed by what was not saved; refused if they are of another optimizer."""
        names, loaded = set(groups.known(self.method)), []
        for old, new in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            values = groups.under_keys(self.method, new)
            method = values.pop("method", None)
            strange = [k for k in values if k not in names and k not in groups.OF_TORCH]
            unsigned = method is None and strange and not groups.keys(self.method).keys() <= values.keys()
            if unsigned or method not in (None, self.method.name):
                what = f"has {strange[0]!r} in its groups" if unsigned else f"is of {method}"
                raise ValueError(f"{self.owner}: the state dict is of another optimizer, it {what}; nothing was loaded")
            # Some writers make lists of tuples, and functions are not saved.
            values = {k: tuple(v) if k in names and isinstance(v, list) else v for k, v in values.items()}
            values = {k: v for k, v in values.items() if k != "param_names" or v is not None}
            stays = names | {"param_names", *groups.SKIPS}
            loaded.append({k: v for k, v in old.items() if k in stays or callable(v)} | values)
        return loaded

    def _check(self, group: Group, entries: dict[Tensor, Entry], strangers: set[int]) -> None:
        """Is saved state that of the parameters of a group as it is to be? strangers: other groups that it is from."""
        job = self.job(group)._replace(state=entries)
        check_layers(self.owner, job.named, job.layered)
        for name, p in job.named:
            wrong = self._wrong(job, p, entries.get(p, {}))
            if wrong:
                raise ValueError(f"{self.owner}: {name} {wrong}; nothing was loaded")
        if strangers and job.recipe.joint:
            raise ValueError(
                f"{self.owner}: param_groups[{min(strangers)}] of the state dict has parameters of another group here, "
                "and one preconditioner is for all of a group; group them as they were; nothing was loaded"
            )

    def _wrong(self, job: Job, p: Tensor, entry: object) -> str:
        """What keeps a saved entry from being the state of a parameter, if anything."""
        if not isinstance(entry, dict):
            return f"has {type(entry).__name__} for its state in the state dict"
        if not OURS & entry.keys():
            return ""
        try:
            return wrong_entry(job, p, entry, self.stepper(job).forms(job, p))
        except ValueError as error:  # there are no factors for so few numbers
            return f"has a state that cannot be: {error}"


# ---- state dicts ----------------------------------------------------------------------------
def wrong_form(saved: object) -> str:
    """What keeps this from being a state dict at all, if anything."""
    if not isinstance(saved, dict):
        return f"is {type(saved).__name__} and no dictionary"
    for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(saved.get(name), kind):
            return f"has no {name!r}, as state_dict() gives it"
    known: set[Hashable] = set()
    for i, group in enumerate(saved["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            return f"has no list of 'params' in its group {i}"
        indices, names = group["params"], group.get("param_names")
        unique = all(isinstance(index, (int, str)) for index in indices)
        if not unique or len({*indices, *known}) < len(indices) + len(known):
            return f"has params={indices!r} in its group {i}, where each parameter must have an index of its own"
        known.update(indices)
        if names is not None and not (
            isinstance(names, (list, tuple)) and len(names) == len(indices) and all(isinstance(x, str) for x in names)
        ):
            return f"has param_names={names!r} in its group {i}, where there must be {len(indices)} names"
    words = set(map(str, known))
    strange = [key for key in saved["state"] if (isinstance(key, int) or str(key).isdigit()) and str(key) not in words]
    return f"has state of parameter {strange[0]}, which is in none of its groups" if strange else ""


def in_words(saved: StateDict) -> StateDict:
    """A state dict whose indices are those of its groups, also where JSON has made words of those in its state."""
    known = {str(index): index for group in saved["param_groups"] for index in group["params"]}
    state = {known.get(key, key) if isinstance(key, str) else key: entry for key, entry in saved["state"].items()}
    return {**saved, "state": state}


def alike(current: list[Group], saved: StateDict) -> bool:
    """As many groups, of as many parameters? torch itself refuses others."""
    return [len(group["params"]) for group in saved["param_groups"]] == [len(group["params"]) for group in current]


def unwrapped(name: str) -> str:
    """A name without what wrappers of modules have put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def places(current: list[Group], saved: Sequence[Group]) -> Places:
    """Where each parameter is in what was saved: under its name, where both sides name the same parameters; else in its
    place.
    """
    for read in (str, unwrapped):
        ours = [[read(x) for x in group.get("param_names") or ()] for group in current]
        theirs = [[read(x) for x in group.get("param_names") or ()] for group in saved]
        where = {name: (i, k) for i, names in enumerate(theirs) for k, name in enumerate(names)}
        named = [name for names in ours for name in names]
        count = sum(len(group["params"]) for group in current)
        if len(where) == len(named) == count and where.keys() == set(named):
            return [[where[name] for name in names] for names in ours]
    return [[(i, k) for k in range(len(group["params"]))] for i, group in enumerate(current)]


def wrong_entry(job: Job, p: Tensor, entry: Entry, forms: Forms) -> str:
    """What keeps an entry of a state dict from being that of a parameter, if anything."""
    if "Q" not in entry:
        return f"has no factors Q in the state dict, which is of another optimizer; it has {', '.join(map(str, entry))}"
    for name in COUNTERS:
        needed = name in entry or name == COUNTERS[0] or job.schedule.counts
        if needed and _count(entry.get(name)) is None:
            return f"has no count {name!r} in the state dict, or one that is none: {entry.get(name)!r}"
    if job.recipe.momentum and "momentum" not in entry:
        return "has no momentum in the state dict"
    wrong = wrong_tensors(p, entry, forms)
    if wrong:
        return wrong
    tensors = {f"{kind}[{i}]": x for kind in Factors._fields for i, x in entry.get(kind, {}).items()}
    if "momentum" in entry:
        tensors["momentum"] = entry["momentum"]
    for name, x in tensors.items():
        if x.is_meta != p.is_meta:
            return f"is on {p.device}, its {name} in the state dict on {x.device}"
        if not x.is_meta and not bool(x.isfinite().all()):
            return f"has a {name} in the state dict that is not finite; go back to an earlier one"
        if name.startswith("L") and not x.is_meta and bool((x < 0).any()):
            return f"has a bound {name} in the state dict that is below 0; go back to an earlier one"
    fixed = [i for i in entry["Q"] if int(i) not in job.recipe.preconditioner.may_vanish]
    layers = len(p) if id(p) in job.layered else 1
    for i in fixed:
        rows = entry["Q"][i]
        if rows.numel() and not rows.is_meta and not bool((rows != 0).reshape(layers, -1).any(1).all()):
            return f"has a factor Q[{i}] in the state dict that is zero, and would stay zero; go back to an earlier one"
    return ""


def _count(x: object) -> int | None:
    """The whole number that a saved counter holds."""
    if isinstance(x, Tensor) and x.numel() == 1 and not (x.is_complex() or x.is_meta or x.dtype == torch.bool):
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not isfinite(x) or x != int(x):
        return None
    return int(x) if 0 <= x <= LARGEST_COUNT else None


def placed(entry: Entry, device: torch.device) -> Entry:
    """A copy of the state of a parameter on a device. Counters of ours stay on the host, as whole numbers."""
    moved: Entry = _moved(entry, device)
    if "Q" in entry:
        counts = {name: _count(entry[name]) for name in COUNTERS if name in entry}
        moved |= {k: torch.tensor(n, dtype=torch.int64, device="cpu") for k, n in counts.items() if n is not None}
        moved |= {k: dict(sorted(moved[k].items(), key=lambda x: int(x[0]))) for k in Factors._fields if k in moved}
    return moved


def _moved(value: object, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
