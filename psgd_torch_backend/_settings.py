"""What the values in a group come to: a method, its recipe and its schedule, remembered while the values stay."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from psgd.hyperparameters import Method
from psgd.recipe import Recipe, Schedule
from psgd_torch_backend import _groups as groups
from psgd_torch_backend._groups import RATES, Group

LARGEST = 64  # how many combinations of hyperparameters are remembered


class Settings(NamedTuple):
    """What a group comes to, its rates apart."""

    method: Method
    recipe: Recipe
    schedule: Schedule


class SettingsCache:
    """The settings of the groups of an optimizer. owner: the name of its class, for errors."""

    def __init__(self, owner: str, method: type[Method]) -> None:
        self.owner, self.method = owner, method
        self._renamed = groups.renamed(method)
        self._keys = [key for key in groups.known(method) if key not in RATES]
        self._settings: dict[Hashable, Settings] = {}

    def of(self, group: Group, param_groups: Sequence[Group]) -> Settings:
        """The settings of a group, whose values are checked; made again when one of them has changed."""
        for name, new_name in self._renamed.items():
            if name in group:
                raise ValueError(f"{self.owner}: a group calls {name} {new_name!r}; set that, and delete {name!r}")
        missing = groups.missing(self.method, group)
        if missing:
            where = groups.place(param_groups, group)
            raise ValueError(f"{self.owner}: {where} has lost its {missing!r}; add groups by add_param_group alone")
        key = key_of(group[name] for name in self._keys)
        settings = None if key is None else self._settings.get(key)
        try:
            groups.check_rates(self.method, group)
            return self._new(group, key) if settings is None else settings
        except ValueError as error:
            raise ValueError(f"{error} (in {groups.place(param_groups, group)})") from error

    def _new(self, group: Group, key: Hashable) -> Settings:
        """Settings from values that are checked as the constructor checks them, remembered under a key, if any."""
        groups.complete(self.owner, self.method, {name: group[name] for name in groups.known(self.method)})
        values = {name: group[name] for name in groups.keys(self.method) if name not in RATES}
        method = groups.method_of(self.method, groups.watched(self.method, values))
        settings = Settings(method, method.recipe(), method.schedule())
        if group["scanned_layers"] and settings.recipe.joint:
            raise ValueError(
                f"{self.owner} has one preconditioner for all parameters, no scanned_layers; leave them out"
            )
        if key is not None:
            while len(self._settings) >= LARGEST:
                self._settings.pop(next(iter(self._settings)))
            self._settings[key] = settings
        return settings


def key_of(values: Iterable[object]) -> Hashable:
    """What hyperparameters may be remembered by; None where one of them may change without becoming another object."""
    values = tuple(values)
    key = tuple(map(type, values)), values  # for True is 1
    try:
        hash(key)
    except TypeError:
        return None
    return None if any(isinstance(x, Tensor) for x in values) else key
