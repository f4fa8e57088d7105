"""A recorded case being replayed: its family, its draws in call order, its arrays in a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import numpy as np

from conformance.frameworks import Framework
from conformance.internal.golden_cases import Case, Data
from psgd import schedule
from psgd._xp import make, namespace
from psgd.geometry import GEOMETRIES

Compared = tuple[str, Any, np.ndarray]  # name, what the core computed, what was recorded
Replay = Callable[["Player"], Iterator[Compared]]
DIAGONAL = 2  # the index in Q of a low-rank preconditioner's diagonal, in which its scale is


# ---- families ------------------------------------------------------------------------------
# (kind, i, scaled): was array i of a kind recorded before the first step? scaled: the case gives the first scale.
Before = Callable[[str, int, bool], bool]


def never(kind: str, i: int, scaled: bool) -> bool:
    """There is no state before the first step."""
    return False


def if_scaled(kind: str, i: int, scaled: bool) -> bool:
    """Q and L exist when their scale is known."""
    return scaled and kind in ("Q", "L")


def all_but_q(kind: str, i: int, scaled: bool) -> bool:
    """Q alone waits for its scale."""
    return kind == "L" or (scaled and kind == "Q")


def all_but_the_diagonal(kind: str, i: int, scaled: bool) -> bool:
    """The scale is in the diagonal of Q alone."""
    return kind == "L" or (kind == "Q" and (scaled or i != DIAGONAL))


# What has to be recorded after each recorded step, where the core computes it. L of psgd_jax was not kept.
RESULTS = ("Q", "L", "m", "out", "param")
OF_FUNCTIONS, OF_OPTIMIZERS, OF_JAX = ("Q", "L", "out"), ("Q", "L", "m", "param"), ("Q", "m", "out", "param")


@dataclass(frozen=True)
class Family:
    """Cases that are replayed alike. kinds: of arrays that were recorded after steps; None where a step is a call of
    its own. before: which were recorded before the first step; None where all. newton: v and H v were given. flagged:
    whether a step fits was recorded."""

    replay: Replay
    kinds: tuple[str, ...] | None
    before: Before | None = None
    newton: bool = False
    flagged: bool = False


FAMILIES: dict[str, Family] = {}


def family(
    *names: str,
    kinds: tuple[str, ...] | None,
    before: Before | None = None,
    newton: bool = False,
    flagged: bool = False,
) -> Callable[[Replay], Replay]:
    """Register a replay for families of cases."""

    def register(replay: Replay) -> Replay:
        FAMILIES.update(dict.fromkeys(names, Family(replay, kinds, before, newton, flagged)))
        return replay

    return register


# ---- a case --------------------------------------------------------------------------------
class Recording:
    """Draws that were recorded, in call order: normal numbers and coins apart, since coins are decided on the host."""

    def __init__(self, player: Player, t: int) -> None:
        kinds = [k.split(":")[0] for k in (player.case.get("draws") or {}).get(str(t)) or []]
        values = [player.data[f"draw/{t}/{i}"] for i in range(len(kinds))]
        is_coin = [kind in ("rand", "uniform") for kind in kinds]
        self.player = player
        self.coins = [float(v) for v, c in zip(values, is_coin, strict=True) if c]
        self.normals = [v for v, c in zip(values, is_coin, strict=True) if not c]

    def toss(self, role: str) -> float:
        if not self.coins:
            raise ValueError(f"the step tosses for {role}, but no recorded coin is left")
        return self.coins.pop(0)

    def normal(self, role: str, shape: Sequence[int], like: Any, skip: Any = None) -> Any:
        """The next recorded array; where it is not used none was recorded, and zeros come back."""
        if skip is not None and bool(skip):
            return make(like, "zeros", tuple(shape))
        if not self.normals:
            raise ValueError(f"the step asks for a draw for {role}, but no recorded one is left")
        value = self.normals.pop(0)
        while self.normals and value.size < prod(shape):  # one vector, drawn tensor by tensor
            value = np.concatenate([value.reshape(-1), self.normals.pop(0).reshape(-1)])
        if value.size != prod(shape):
            raise ValueError(f"recorded draw for {role} has shape {value.shape}, the step asks for {tuple(shape)}")
        return namespace(like).astype(self.player.array(value.reshape(shape)), like.dtype)

    signs = normal

    def spent(self) -> None:
        if self.normals or self.coins:
            raise ValueError(f"{len(self.normals)} recorded draws and {len(self.coins)} coins were not asked for")


@dataclass(frozen=True)
class Player:
    """A case, its arrays and the framework that replays it."""

    case: Case
    data: Data
    framework: Framework

    @property
    def steps(self) -> range:
        return range(1, self.case["steps"] + 1)

    @property
    def geometry(self) -> Any:
        return GEOMETRIES[self.case["geometry"]]

    @property
    def family(self) -> Family:
        return FAMILIES[self.case["family"]]

    def demands(self, t: int, kind: str, i: int) -> bool:
        """Has array i of a kind to be recorded after step t, where 0 is before the first?"""
        family = self.family
        if family.kinds is None:
            return True
        if kind not in family.kinds:
            return False
        if not t and family.before is not None:
            scaled = self.case["hyperparameters"].get("preconditioner_init_scale") is not None
            return family.before(kind, i, scaled)
        return t in (0, *(self.case.get("recorded_state_steps") or self.steps))

    def array(self, x: np.ndarray, dtype: str | None = None) -> Any:
        dtype = self.case["dtype"] if dtype is None else dtype
        if "/" in dtype:  # primitives of mixed dtype
            dtype = "complex128" if np.iscomplexobj(x) else "float64"
        return self.framework.array(x, self.framework.nearest(dtype))

    def read(self, name: str) -> Any:
        return self.array(self.data[name])

    def observed(self, t: int, shape: Sequence[int]) -> list[Any]:
        """What a function was given at a step: the gradient, and in the Newton families v and H v."""
        kinds = ("grad", "v", "h") if self.family.newton else ("grad",)
        return [self.array(self.data[f"{kind}/{t}/0"].reshape(shape)) for kind in kinds]

    def state(self, t: int, kind: str, arrays: Sequence[Any]) -> Iterator[Compared]:
        """State arrays of step t beside the recorded ones, where they were recorded or have to be."""
        for i, x in enumerate(arrays):
            name = f"{kind}/{t}/{i}"
            if name in self.data or self.demands(t, kind, i):
                yield name, self.framework.numpy(x).reshape(self.data[name].shape), self.data[name]


def number(value: Any) -> Any:
    """A recorded option: "inf" stands for infinity, a list for a tuple, four named numbers for a schedule."""
    if isinstance(value, dict):
        return schedule.precond_update_prob_schedule(**value)
    return inf if value == "inf" else tuple(value) if isinstance(value, list) else value
