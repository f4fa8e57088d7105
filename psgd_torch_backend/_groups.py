"""What a parameter group holds: the hyperparameters of a method, the adapter's arguments, what others keep there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, dataclass, fields
from functools import cache, lru_cache
from math import inf, nan, prod
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from psgd._xp import is_array
from psgd.arrays import Number
from psgd.calls import by_name, checked_policy, is_count
from psgd.hyperparameters import Method, checked, group_key, outside, plain
from psgd.naming import nearest, shown, unknown
from psgd.schedule import Annealed
from psgd_torch_backend._arguments import ADAPTER_DEFAULTS

Group = dict[str, Any]
Named = list[tuple[str, Tensor]]  # parameters with their names

RATES = ("lr", "weight_decay")  # may change at every step, and are no part of a recipe
SKIPS = ("skipped", "skipped_in_a_row")
# Of torch itself: what every group has, and what its schedulers keep there.
OF_TORCH = frozenset(
    ["params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", *SKIPS]
)
# What other packages are known to keep in groups, spelt as if it were a hyperparameter: timm, mmengine, Muon, ...
OF_OTHERS = frozenset(["lr_scale", "lr_mult", "decay_mult", "use_muon", "name", "type"])
# Of the constructors of torch's own optimizers: implementations of which here is one, and why.
SWITCHES = {
    "foreach": "parameters of equal shape step together anyway (stack=True)",
    "fused": "here compile=True is what fuses passes over memory",
    "capturable": "since the host decides at each step whether to fit",
    "differentiable": "since a step is not recorded for differentiation",
}


@cache
def of_torchs_optimizers() -> frozenset[str]:
    """The arguments of torch's own optimizers: groups that were made for one may be given to another."""
    classes = [x for x in vars(torch.optim).values() if isinstance(x, type) and issubclass(x, torch.optim.Optimizer)]
    return frozenset(name for x in classes for name in inspect.signature(x).parameters)


def keys(method: type[Method]) -> dict[str, Field[Any]]:
    """The hyperparameters of a method by their keys in a group."""
    return {group_key(f): f for f in fields(method)}


def renamed(method: type[Method]) -> dict[str, str]:
    """The keys of hyperparameters by their names, where they differ."""
    return {f.name: key for key, f in keys(method).items() if f.name != key}


def known(method: type[Method]) -> tuple[str, ...]:
    """All keys of a group that are ours."""
    return (*keys(method), *ADAPTER_DEFAULTS)


def arguments(method: type[Method]) -> tuple[list[str], list[str]]:
    """The keys of its hyperparameters, in the order of a call: by position, in the published order, and by name."""
    by_key = keys(method)
    by_position = [key for name in method.positional for key, f in by_key.items() if f.name == name]
    return by_position, [key for key in by_key if key not in by_position]


def by_position(owner: str, method: type[Method], values: Sequence[object], keywords: Group) -> Group:
    """Arguments that were given by position and by name, all by name."""
    names, _ = arguments(method)
    why = "" if len(names) > 1 else f", since the order of {method.source} is another"
    by_name(owner, names, values, under_keys(method, keywords), why)  # only to refuse what has no place, or two
    return dict(zip(names, values, strict=False)) | keywords


def under_keys(method: type[Method], values: Group) -> Group:
    """Hyperparameters under the keys that a group has for them."""
    for name, key in renamed(method).items():
        if name in values and key in values:
            raise ValueError(
                f"{method.name}: {name} and {key} are one hyperparameter, both are given; leave {name} out"
            )
    return {renamed(method).get(name, name): value for name, value in values.items()}


def method_of(method: type[Method], values: Group) -> Method:
    """A method from hyperparameters, under their keys or names; errors say those that were used."""
    known_fields = keys(method) | {f.name: f for f in fields(method)}
    for name in values:
        if name not in known_fields:
            raise ValueError(unknown(method.name, name, known(method)))
    under_keys(method, values)  # only to refuse what is given twice
    numbers = {known_fields[name].name: _number(method.name, name, value) for name, value in values.items()}
    for name in values:
        checked(method.name, known_fields[name], numbers[known_fields[name].name], name)
    return method(**numbers)


def drop_switches(owner: str, arguments: Group) -> None:
    """Take out the arguments of torch's own optimizers that choose between implementations, where they choose none."""
    for name in [name for name in SWITCHES if name in arguments]:
        value = arguments.pop(name)
        if value is not None and value is not False:
            raise ValueError(
                f"{owner}: {name}={value!r} would have no effect, {SWITCHES[name]}; leave it out, or give False"
            )


def complete(owner: str, method: type[Method], values: Group) -> Group:
    """Hyperparameters and the adapter's arguments, checked, with the defaults of the others, under their keys."""
    flags = _flags(owner, values)
    record = method_of(method, {k: v for k, v in values.items() if k not in ADAPTER_DEFAULTS})
    tensors = {name: x for name in RATES if isinstance(x := values.get(name), Tensor)}
    dense = {name: x for name, x in tensors.items() if x.layout == torch.strided}
    tensors = {name: x.reshape(()) if x.ndim else x for name, x in dense.items()}  # of axes of length one, a view
    return {key: _plain(getattr(record, f.name)) for key, f in keys(method).items()} | tensors | flags


def _flags(owner: str, values: Group) -> Group:
    """The adapter's arguments, checked, with the defaults of the others."""
    flags = {name: values.get(name, default) for name, default in ADAPTER_DEFAULTS.items()}
    if not (isinstance(flags["compile"], bool) or (isinstance(flags["compile"], str) and flags["compile"] == "full")):
        raise ValueError(f"{owner}: compile={shown(flags['compile'])} must be True, False or 'full'")
    for name in ("maximize", "stack"):
        if not isinstance(flags[name], bool):
            raise ValueError(f"{owner}: {name}={shown(flags[name])} must be True or False")
    size, layers = flags["stack_batch_size"], flags["scanned_layers"]
    if not (size is None or is_count(size)):
        raise ValueError(f"{owner}: stack_batch_size={shown(size)} must be None or a whole number above 0")
    if isinstance(layers, (list, set, frozenset)):
        layers = flags["scanned_layers"] = tuple(layers)
    if not (isinstance(layers, bool) or (isinstance(layers, tuple) and all(isinstance(x, str) for x in layers))):
        raise ValueError(f"{owner}: scanned_layers={shown(layers)} must be True, False or a tuple of names")
    checked_policy(owner, flags["nonfinite"], flags["max_skips"])
    return flags


def missing(method: type[Method], group: Group) -> str:
    """A key of ours that a group has lost, or ""."""
    return next((name for name in ("params", *known(method)) if name not in group), "")


# The same value is in most groups, and at most steps.
_check_rate = lru_cache(maxsize=256)(checked)


def check_rates(method: type[Method], group: Group) -> None:
    """The numbers of a group that may change at every step. Of tensors elsewhere than on a CPU the form alone is seen:
    to read their numbers is to wait for the device.
    """
    for f in fields(method):
        if f.name not in RATES:
            continue
        value = group[f.name]
        if isinstance(value, Tensor) and value.device.type != "cpu":
            value = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        if type(value) is float:
            _check_rate(method.name, f, value)
        else:
            checked(method.name, f, _number(method.name, f.name, value))
    for name in SKIPS:
        count = group.get(name, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{method.name}: {name}={count!r} must be a whole number, not below 0; set it to 0")


@dataclass(frozen=True)
class Watched:
    """A schedule that was given for a number: a function of the step, which may return anything."""

    owner: str
    name: str
    within: str
    schedule: Callable[[Number], Any]

    def __call__(self, step: Number) -> float:
        value = self.schedule(step)
        number = value.item() if hasattr(value, "item") and prod(value.shape) == 1 else value
        within = f"[{self.within[1:]}"  # at a step it may be 0, which it may not be at all of them
        try:
            number = float(number) if isinstance(number, Real) else nan
        except OverflowError:
            number = inf
        if outside(number, within):
            shown = " ".join(f"{value!r}".split())
            raise ValueError(f"{self.owner}: {self.name} gives {shown} at step {step:g}, not a number in {within}")
        return number


def watched(method: type[Method], values: Group) -> Group:
    """Hyperparameters, with a look at what functions of the step return."""
    by_key = keys(method)
    return {
        k: Watched(method.name, k, by_key[k].metadata["within"], v)
        if callable(v) and not isinstance(v, Annealed)
        else v
        for k, v in values.items()
    }


def sorted_out(method: type[Method], group: Group) -> tuple[Group, Group]:
    """What of a group is ours, and what is kept for others; a misspelt name of ours is refused."""
    names = (*known(method), *renamed(method))
    ours = {k: v for k, v in group.items() if k in names}
    others = {k: v for k, v in group.items() if k not in names}
    for k in others:
        if misspelt(k, names):
            raise ValueError(unknown(method.name, k, known(method)))
    return ours, others


def misspelt(key: str, names: Iterable[str]) -> bool:
    """Is a key of a group one of ours that went wrong? Not where it is known to be another's, or has ours as a word."""
    if not isinstance(key, str) or key in OF_TORCH | OF_OTHERS | of_torchs_optimizers():
        return False
    meant = nearest(key, names)
    return meant is not None and (key.casefold() == meant.casefold() or f"_{meant}_" not in f"_{key}_")


def _number(owner: str, name: str, value: Any) -> Any:
    """The number in an array of any library, and any other hyperparameter as it is; more than one number is refused in
    torch's own words.
    """
    if is_array(value) and prod(value.shape) != 1:
        raise ValueError(f"{owner}: {type(value).__name__} {name} must be 1-element, not of shape {tuple(value.shape)}")
    return plain(value, static=True) if is_array(value) else value


def _plain(value: object) -> object:
    """A hyperparameter as plain data: a schedule of numbers is the tuple of them."""
    return tuple(value) if isinstance(value, tuple) else value


# ---- the parameters of groups --------------------------------------------------------------
def place(groups: Sequence[Group], group: Group) -> str:
    """Where a group is among those of an optimizer, for an error."""
    return next((f"param_groups[{i}]" for i, other in enumerate(groups) if other is group), "the state dict")


def named_in(owner: str, groups: Sequence[Group], group: Group, first: int | None = None) -> Named:
    """The parameters of a group with their names. Without names they are numbered, from `first` where that is known.

    Raises ValueError for a group that was edited so that they do not go together.
    """
    params, names = group["params"], group.get("param_names")
    if not isinstance(params, (list, tuple)) or not all(isinstance(p, Tensor) for p in params):
        raise ValueError(f"{owner}: params of {place(groups, group)} must be a list of tensors")
    if names is None:
        names = [f"parameter {i}" if first is None else str(first + i) for i in range(len(params))]
    elif not isinstance(names, (list, tuple)) or len(names) != len(params):
        raise ValueError(
            f"{owner}: {place(groups, group)} has {len(params)} params and param_names={names!r}; "
            'give it as many names, or delete "param_names" from all groups'
        )
    return list(zip(names, params, strict=True))


def all_named(owner: str, groups: Sequence[Group]) -> Named:
    """Every parameter with its name: its own, or its number over all groups."""
    named: Named = []
    for group in groups:
        named += named_in(owner, groups, group, len(named))
    return named


def layered(group: Group, named: Named) -> set[int]:
    """The identities of the parameters of a group that stack layers."""
    layers = group["scanned_layers"]
    return {id(p) for name, p in named if layers is True or name in layers} if layers else set()
