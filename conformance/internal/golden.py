"""Replays recorded runs of the published implementations through the core, with their recorded random draws.

A folder holds `index.json` and one `.npz` a case; the README of `conformance/internal/golden` describes the schema.
Each family of cases has a function here that yields what the core computed beside what was recorded. What the schema
demands of a family has to be there: a case from which something is missing is none, and does not pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import inf, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from conformance.frameworks import Framework, double_precision
from conformance.reference import stacked, within_max_norm
from psgd import criterion, kron, pipeline, rotate, schedule, shapes
from psgd._xp import eps, make, namespace
from psgd.geometry import GEOMETRIES
from psgd.hyperparameters import Method
from psgd.lra import LRA
from psgd.methods import METHODS
from psgd.naming import shown
from psgd.recipe import Plan, Recipe, State
from psgd.scaling import Clip
from psgd.spectral import NormBound, TraceBound, general_bound

Case = Mapping[str, Any]
Compared = tuple[str, Any, np.ndarray]  # name, what the core computed, what was recorded
Replay = Callable[["Player"], Iterator[Compared]]

FAMILIES: dict[str, Replay] = {}
PRIMITIVES: dict[str, Callable[["Player", int], Any]] = {}


@dataclass(frozen=True)
class Result:
    """error: max |x - y| / max|y| over all arrays of a case, less the slack `atol`. where: the array of that error."""

    case: str
    family: str
    error: float
    rtol: float
    where: str

    @property
    def passed(self) -> bool:
        return self.error <= self.rtol


class Data(dict[str, np.ndarray]):
    """The arrays of a case."""

    def __missing__(self, name: str) -> np.ndarray:
        raise ValueError(f"the case lacks {name}, which its schema demands")


# What has to be recorded after each recorded step, where the core computes it. L of psgd_jax was not kept.
RESULTS = ("Q", "L", "m", "out", "param")
STATE = {"jax": ("Q", "m", "out", "param"), "optimizer": ("Q", "L", "m", "param"), "function": ("Q", "L", "out")}
DIAGONAL = 2  # the index in Q of a low-rank preconditioner's diagonal, in which its scale is


OPTIMIZERS = ("class_", "quad_torch_")
LAZY = ("quad_torch_", "class_KWNS4")  # they have no state before the first step


def kind_of(family: str) -> str:
    """Was it a transformation of psgd_jax, another optimizer, or a function that ran?"""
    return "jax" if family.startswith("jax_") else "optimizer" if family.startswith(OPTIMIZERS) else "function"


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

    def demands(self, t: int, kind: str, i: int) -> bool:
        """Has array i of a kind to be recorded after step t, where 0 is before the first?"""
        family = self.case["family"]
        if family == "primitive":
            return True
        if kind not in STATE[kind_of(family)]:
            return False
        if t or kind_of(family) != "optimizer":
            return t in (0, *(self.case.get("recorded_state_steps") or self.steps))
        if family.startswith(LAZY) or kind not in ("Q", "L"):
            return False
        given = self.case["hyperparameters"].get("preconditioner_init_scale") is not None
        unscaled = kind == "L" and family == "class_DenseNewton"  # whose Q is made when its scale is known
        return given or unscaled or (family.startswith("class_LRA") and not (kind == "Q" and i == DIAGONAL))

    def array(self, x: np.ndarray, dtype: str | None = None) -> Any:
        dtype = self.case["dtype"] if dtype is None else dtype
        if "/" in dtype:  # primitives of mixed dtype
            dtype = "complex128" if np.iscomplexobj(x) else "float64"
        return self.framework.array(x, self.framework.nearest(dtype))

    def read(self, name: str) -> Any:
        return self.array(self.data[name])

    def seen(self, t: int, shape: Sequence[int]) -> list[Any]:
        """What a function was given at a step: the gradient, and in the Newton families v and H v."""
        kinds = ("grad", "v", "h") if self.case["family"].endswith("newton") else ("grad",)
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


def family(*names: str) -> Callable[[Replay], Replay]:
    """Register a replay for families of cases."""

    def register(replay: Replay) -> Replay:
        FAMILIES.update(dict.fromkeys(names, replay))
        return replay

    return register


# ---- functions: one tensor, one fit a step ----------------------------------------------
@family("kron_whiten", "kron_newton")
def replay_kron(player: Player) -> Iterator[Compared]:
    """psgd_torch's `update_precond_kron_*` and `precond_grad_kron`."""
    options = {k: number(v) for k, v in player.case["hyperparameters"].items()}
    dense = kron.DenseRule(options["max_size"], options["max_skew"])(tuple(player.case["shapes"][0]))
    yield from replay_function(player, options, dense, options["Scale"], NormBound(), coin=True)


@family("dense_newton")
def replay_dense(player: Player) -> Iterator[Compared]:
    """psgd_torch's `update_precond_dense_*`: the Kronecker update of a vector with one dense factor."""
    options = player.case["hyperparameters"]
    yield from replay_function(player, options, (True,), options["init_scale"], TraceBound(), coin=False)


def replay_function(
    player: Player,
    options: Mapping[str, Any],
    dense: Sequence[bool],
    scale: float,
    bound: NormBound,
    *,
    coin: bool,
) -> Iterator[Compared]:
    """One tensor: fit it to each recorded pair, and compare factors, bounds and P g."""
    geometry = player.geometry
    shape = (-1,) if bound == TraceBound() else tuple(player.case["shapes"][0])
    first = player.array(player.data["grad/1/0"].reshape(shape))
    factors = kron.rescaled(geometry, kron.init(dense, first), scale)
    yield from player.state(0, "Q", factors.Q)
    yield from player.state(0, "L", factors.L)
    for t in player.steps:
        draws = Recording(player, t)
        g, *given = player.seen(t, shape)
        e = draws.normal("damping", g.shape, g)
        if given:
            v, h = given
            pair = criterion.newton(v, h, e, options["damping"])
        else:
            pair = criterion.whitening(geometry.probed(factors.Q), g, e, options["damping"])
        factors = kron.fit(geometry, bound, factors, pair, options["lr"], options["betaL"], draws)
        if coin and not geometry.balance_first:
            factors = factors._replace(Q=rotate.balanced(factors.Q, draws.toss("balance") < 0.01))
        draws.spent()
        yield from player.state(t, "Q", factors.Q)
        yield from player.state(t, "L", factors.L)
        yield from player.state(t, "out", [geometry.precondition(factors.Q, g)])


@family("lra_whiten", "lra_newton")
def replay_lra(player: Player) -> Iterator[Compared]:
    """psgd_torch's `update_precond_lra*`: the low-rank update of one vector."""
    options = player.case["hyperparameters"]
    kind, begun = LRA(options["rank"]), Recording(player, 0)
    first = player.array(player.data["grad/1/0"].reshape(-1))
    factors = kind.rescaled(kind.init(first, begun), options["init_scale"])
    begun.spent()
    yield from player.state(0, "Q", factors.Q)
    yield from player.state(0, "L", factors.L)
    for t in player.steps:
        draws = Recording(player, t)
        g, *given = player.seen(t, (-1,))
        e = draws.normal("damping", first.shape, first)
        if given:
            v, h = given
            pair = criterion.newton(v, h, e, options["damping"])
        else:
            pair = criterion.whitening(True, g, e, options["damping"])
        side = draws.toss("side") < 0.5
        factors = kind.fit(factors, pair, options["lr"], options["betaL"], draws, side)
        draws.spent()
        yield from player.state(t, "Q", factors.Q)
        yield from player.state(t, "L", factors.L)
        yield from player.state(t, "out", [kind.precondition(factors, g)])


# ---- optimizers: several tensors, whole steps --------------------------------------------
@family("quad_torch_procrustes", "quad_torch_quad")
def replay_quad_torch(player: Player) -> Iterator[Compared]:
    """quad_torch's optimizers."""
    method = METHODS[player.case["hyperparameters"]["psgd_type"]]
    return replay_optimizer(player, method, {"psgd_type": None})


@family("class_KronWhiten")
def replay_kron_whiten(player: Player) -> Iterator[Compared]:
    """psgd_torch's `KronWhiten`."""
    return replay_optimizer(player, METHODS["kron_whiten"], {"lr_params": "lr"})


# Arguments that say nothing of the mathematics.
MAPPED = dict.fromkeys(("mask", "weight_decay_mask", "scanned_layers", "lax_map_scanned_layers", "lax_map_batch_size"))


@family("jax_kron")
def replay_jax_kron(player: Player) -> Iterator[Compared]:
    """psgd_jax's `kron`: one balancing coin for all tensors."""
    renamed = MAPPED | {"learning_rate": "lr"}
    return replay_optimizer(player, METHODS["kron"], renamed, common=("fit", "balance"))


@family("jax_affine", "jax_affine_hessian")
def replay_jax_affine(player: Player) -> Iterator[Compared]:
    """psgd_jax's `affine`."""
    return replay_optimizer(player, METHODS["affine"], MAPPED | {"learning_rate": "lr"}, late=True)


@family("class_KronNewton", "class_DenseNewton", "class_LRAWhiten", "class_LRANewton", "class_KWNS4")
def replay_class(player: Player) -> Iterator[Compared]:
    """psgd_torch's other optimizers; the last word of the family is the class."""
    title = player.case["family"].removeprefix("class_")
    method = next(made for made in METHODS.values() if made.title == title)
    return replay_optimizer(player, method, {"lr_params": "lr"})


@family("jax_xmat", "jax_xmat_hessian", "jax_readme")
def replay_jax_xmat(player: Player) -> Iterator[Compared]:
    """psgd_jax's `xmat`."""
    return replay_optimizer(player, METHODS["xmat"], MAPPED | {"learning_rate": "lr"}, late=True)


@family("jax_lra", "jax_lra_hessian")
def replay_jax_lra(player: Player) -> Iterator[Compared]:
    """psgd_jax's `low_rank_approximation`."""
    return replay_optimizer(player, METHODS["low_rank_approximation"], MAPPED | {"learning_rate": "lr"}, late=True)


def replay_optimizer(
    player: Player,
    method: type[Method],
    renamed: Mapping[str, str | None],
    common: Sequence[str] = ("fit",),
    *,
    late: bool = False,
) -> Iterator[Compared]:
    """A method's pipeline, tensor after tensor, in the order in which the recorded run drew its numbers.

    common: roles of coins that were tossed once for all tensors; the others were tossed for each.
    late: the state before the first step was recorded before it got its scale.
    """
    n = len(player.case["shapes"])
    groups = player.case.get("groups") or [{"params": list(range(n))}]
    options = _options(player, method, groups, renamed)
    whole = options[0].recipe().joint
    scanned = player.case["hyperparameters"].get("scanned_layers") or [False] * n
    units = [Unit(list(range(n)))] if whole else [Unit([i], scanned[i]) for i in range(n)]
    params = [player.read(f"param/0/{i}") for i in range(n)]
    since = 0
    for t in player.steps:
        draws = Recording(player, t)
        if player.case.get("mode") == "hessian":
            draws = Recording(player, -1)  # what was drawn at this step made v, which was recorded
        tensors = [player.read(f"grad/{t}/{i}") for i in range(n)]
        if not options[0].recipe().decoupled:
            tensors = [g + options[i].weight_decay * params[i] for i, g in enumerate(tensors)]
        since += 1
        plans = _plans(player, options, groups, t, draws, since, common)
        since = 0 if plans[0].fit else since
        pairs = _pairs(player, t, draws) if plans[0].fit else None
        if pairs is None and plans[0].fit and (options[0].recipe().newton or f"flag/{t}" in player.data):
            raise ValueError(f"the case lacks h/{t}/0, which its schema demands where there is a fit")
        if whole and not plans[0].fit and f"flag/{t}" not in player.data:
            draws.normals.clear()  # psgd_jax draws a probe at every step
        if t == 1:
            begun = Recording(player, 0)
            for unit in units:
                unit.begin(options[unit.members[0]].recipe(), tensors, begun)
            begun.spent()
        if t == 1 and late:
            yield from _state(player, 0, units)
        _scale(player, options, groups, units, t, tensors, pairs, plans[0].fit)
        if t == 1 and not late:
            yield from _state(player, 0, units)
        directions: list[Any] = [None] * n
        for unit in units:
            first = unit.members[0]
            us = unit.step(options[first].recipe(), plans[first], tensors, pairs, draws)
            for i, u in zip(unit.members, us, strict=True):
                directions[i] = u
        changes = [
            pipeline.displacement(p, u, options[i].lr, options[i].weight_decay if options[i].recipe().decoupled else 0)
            for i, (p, u) in enumerate(zip(params, within_max_norm(options[0], directions), strict=True))
        ]
        params = [p + change for p, change in zip(params, changes, strict=True)]
        draws.spent()
        yield from _state(player, t, units)
        yield from player.state(t, "out", changes)
        yield from player.state(t, "param", params)


def _options(
    player: Player, method: type[Method], groups: Sequence[Any], renamed: Mapping[str, str | None]
) -> dict[int, Method]:
    """The method of each tensor, by its group."""
    options: dict[int, Method] = {}
    for group in groups:
        given = player.case["hyperparameters"] | {k: v for k, v in group.items() if k != "params"}
        kept = {renamed.get(k, k): number(v) for k, v in given.items() if v != "default schedule"}
        kept.pop(None, None)
        for name in ("dtype", "preconditioner_dtype"):
            if kept.get(name):
                kept[name] = player.framework.nearest(kept[name])
        options |= dict.fromkeys(group["params"], method.of(**kept))
    return options


class Unit:
    """What one preconditioner is for: a tensor, the layers that a tensor stacks, or all tensors as one vector."""

    def __init__(self, members: list[int], scanned: bool = False) -> None:
        self.members, self.scanned = members, scanned
        self.states: list[State] = []
        self.shapes: list[tuple[int, ...]] = []
        self.scaled = False

    @property
    def state(self) -> State:
        return stacked(self.states) if self.scanned else self.states[0]

    @property
    def momenta(self) -> list[Any]:
        """Momentum, as many arrays as there are tensors."""
        m = self.state.momentum
        return [] if m is None else [m] if len(self.members) == 1 else self.split(m)

    def joined(self, tensors: Sequence[Any]) -> Any:
        """The tensor, or all of them as one vector."""
        own = [tensors[i] for i in self.members]
        if len(self.shapes) < 2 and own[0].ndim and len(own) == 1 and not self.flat:
            return own[0]
        xp = namespace(own[0])
        return xp.concat([xp.reshape(x, (-1,)) for x in own])

    flat = False

    def split(self, vector: Any) -> list[Any]:
        """The inverse of `joined`, for vectors."""
        ends = np.cumsum([prod(shape) for shape in self.shapes]).tolist()
        xp, starts = namespace(vector), [0, *ends[:-1]]
        return [xp.reshape(vector[a:b], shape) for a, b, shape in zip(starts, ends, self.shapes, strict=True)]

    def begin(self, recipe: Recipe, tensors: Sequence[Any], draws: Any) -> None:
        """First state, not yet scaled."""
        self.shapes, self.flat = [tuple(tensors[i].shape) for i in self.members], recipe.joint
        if self.scanned:
            layers = tensors[self.members[0]]
            self.states = [pipeline.init(recipe, layers[k, ...]) for k in range(layers.shape[0])]
        else:
            self.states = [
                pipeline.init(recipe, self.joined(tensors) if self.flat else tensors[self.members[0]], None, draws)
            ]

    def rescale(self, recipe: Recipe, scale: Any) -> None:
        self.states = [pipeline.rescaled(recipe, state, scale) for state in self.states]
        self.scaled = True

    def step(self, recipe: Recipe, plan: Plan, tensors: Sequence[Any], pairs: Any, draws: Recording) -> list[Any]:
        """Directions of its tensors."""
        if self.scanned:
            u, self.states = _step_scanned(recipe, plan, tensors[self.members[0]], self.states, draws)
            return [u]
        take = self.joined if self.flat else lambda xs: xs[self.members[0]]
        pair = None if pairs is None else (take(pairs[0]), take(pairs[1]))
        u, state = pipeline.step(recipe, plan, take(tensors), self.states[0], draws, pair=pair)
        self.states = [state]
        return self.split(u) if self.flat else [u]


def _state(player: Player, t: int, units: Sequence[Unit]) -> Iterator[Compared]:
    yield from player.state(t, "Q", [q for unit in units for q in unit.state.factors.Q])
    yield from player.state(t, "L", [x for unit in units for x in unit.state.factors.L])
    flat = (player.case.get("state") or {}).get("m") == ["all, flattened"]
    momenta = [m for u in units if u.momenta for m in ([u.state.momentum] if flat else u.momenta)]
    yield from player.state(t, "m", momenta)


def _scale(
    player: Player,
    options: Mapping[int, Method],
    groups: Sequence[Any],
    units: Sequence[Unit],
    t: int,
    tensors: Sequence[Any],
    pairs: Any,
    fit: bool,
) -> None:
    """The first scale, at the first step or, from Hessian-vector products, with the first fit."""
    by_pairs = options[0].recipe().newton or f"flag/{t}" in player.data
    for group in groups:
        own = [u for u in units if set(u.members) & set(group["params"]) and not u.scaled]
        method = options[group["params"][0]]
        recipe, given = method.recipe(), method.initial_scale()
        if given is not None:
            for unit in own:
                unit.rescale(recipe, given)
        elif own and (fit or not by_pairs):
            seen = tensors if pairs is None else pairs[1]
            take = [
                seen[u.members[0]][0, ...] if u.scanned else u.joined(seen) if u.flat else seen[u.members[0]]
                for u in own
            ]
            vs = None if pairs is None else [u.joined(pairs[0]) if u.flat else pairs[0][u.members[0]] for u in own]
            sizes = [recipe.initial_scale.size(pipeline.working(recipe, x)) for x in take]
            scales, _ = recipe.initial_scale(sizes, method.schedule().damping, vs)
            for unit, scale in zip(own, scales, strict=True):
                unit.rescale(recipe, scale)


def _pairs(player: Player, t: int, draws: Recording) -> tuple[list[Any], list[Any]] | None:
    """v and H v of all tensors at a step that fits, where they were recorded; v may be the draws themselves."""
    indices = range(len(player.case["shapes"]))
    difference = f"pgrad/{t}/0" in player.data
    if not difference and f"h/{t}/0" not in player.data:
        return None
    if difference:
        gs, moved = ([player.read(f"{kind}/{t}/{i}") for i in indices] for kind in ("grad", "pgrad"))
        delta = sqrt(max(eps(g) for g in gs))
        hs = [(b - a) / delta for a, b in zip(gs, moved, strict=True)]
    else:
        hs = [player.read(f"h/{t}/{i}") for i in indices]
    if f"v/{t}/0" in player.data:
        return [player.read(f"v/{t}/{i}") for i in indices], hs
    return [draws.normal(f"v/{i}", tuple(h.shape), h) for i, h in enumerate(hs)], hs


EACH_GROUP = ("kwns4",)  # methods that toss for each group


def _plans(
    player: Player,
    options: Mapping[int, Method],
    groups: Sequence[Any],
    t: int,
    draws: Recording,
    since: int,
    common: Sequence[str],
) -> dict[int, Plan]:
    """The plan of each tensor: coins in `common` are tossed once a step, and none but that to fit where nothing is."""
    heads: dict[str, float] = {}
    group_of = {i: group["params"][0] for group in groups for i in group["params"]}
    flag = f"flag/{t}"
    asked = player.case["family"].endswith("_hessian") or player.case.get("mode") == "hessian"
    told = bool(player.data[flag]) if asked else None

    def toss(role: str) -> float:
        if role not in common:
            return draws.toss(role)
        if role not in heads:
            heads[role] = draws.toss(role) if told is None else 1.0
        return heads[role]

    plans: dict[int, Plan] = {}
    for i, method in sorted(options.items()):
        if plans and method.recipe().joint:
            plans[i] = plans[0]
            continue
        if group_of[i] == i and method.name in EACH_GROUP:
            heads.clear()
        fit = method.schedule().fit(schedule.StepInfo(t, toss, since)) if told is None else told
        asked = _asked(method)

        def seen(role: str, fit: bool = fit, asked: frozenset[str] = asked) -> float:
            return toss(role) if role in asked and fit else heads.get(role, 1.0)

        plans[i] = pipeline.host_plan(method.schedule(), t, seen, since)._replace(fit=fit)
    return plans


def _asked(method: Method) -> frozenset[str]:
    """The coins that a fit of a method depends on."""
    kind = method.recipe().preconditioner
    return frozenset(
        {"balance", "side"} if isinstance(kind, LRA) else {"balance"} if isinstance(kind, kron.Kronecker) else {}
    )


class _Layer:
    """The draws of one layer of a stack, whose draw was recorded whole."""

    def __init__(self, row: Any) -> None:
        self.row = row

    def normal(self, role: str, shape: Sequence[int], like: Any, skip: Any = None) -> Any:
        return self.row

    signs = normal


def _step_scanned(
    recipe: Recipe, plan: Plan, g: Any, states: Sequence[State], draws: Recording
) -> tuple[Any, list[State]]:
    """A step of stacked layers as psgd_jax takes it: the mean in the damping and the RMS clip are the whole stack's."""
    xp, whole = namespace(g), stacked(states)
    g = pipeline.working(recipe, g)
    seen = pipeline.target_at_scale(recipe, plan, pipeline.observe(recipe, plan, g, whole.momentum).target)
    mean = xp.mean(xp.abs(seen))
    e = draws.normal("damping", seen.shape, seen) if plan.fit else seen
    own = replace(recipe, damping=lambda x, e, amount, unit: x + amount * (mean / unit) * e, clip=Clip())
    rows = [pipeline.step(own, plan, g[k, ...], s, _Layer(e[k, ...])) for k, s in enumerate(states)]
    return recipe.clip(xp.stack([u for u, _ in rows])), [s for _, s in rows]


# ---- primitives: each step is an independent call ----------------------------------------
def primitive(name: str) -> Callable[[Callable[[Player, int], Any]], Callable[[Player, int], Any]]:
    """Register the call of a primitive."""

    def register(call: Callable[[Player, int], Any]) -> Callable[[Player, int], Any]:
        PRIMITIVES[name] = call
        return call

    return register


def _bound(player: Player, t: int, positive: bool, bound: NormBound) -> Any:
    draws = Recording(player, t)
    value = bound(player.read(f"in/{t}/0"), draws, "bound", positive=positive)
    draws.spent()
    return value


@primitive("_norm_lower_bound (kron.py, affine.py)")
def general_norm_bound(player: Player, t: int) -> Any:
    return general_bound(player.read(f"in/{t}/0"))


@primitive("_shape_as_matrix")
def matricised(player: Player, t: int) -> Any:
    return pipeline.laid_out(METHODS["affine"]().recipe(), player.read(f"in/{t}/0"))


@primitive("precond_update_prob_schedule()")
def update_probability(player: Player, t: int) -> Any:
    return np.asarray(schedule.precond_update_prob_schedule()(player.data[f"in/{t}/0"]))


@family("primitive")
def replay_primitive(player: Player) -> Iterator[Compared]:
    """Functions: each step is a call of its own."""
    if player.case["function"] == "hessian_helper":
        yield from replay_hessian_helper(player)
        return
    call = PRIMITIVES[player.case["function"]]
    for t in player.steps:
        got = call(player, t)
        got = got if isinstance(got, np.ndarray) else player.framework.numpy(got)
        yield f"out/{t}/0", got, player.data[f"out/{t}/0"]


def replay_hessian_helper(player: Player) -> Iterator[Compared]:
    """psgd_jax's `hessian_helper` on its recorded loss, mean log(1 + exp z) + 0.1 sum W^4, z = X W + b.

    The coin and the vector are the recorded ones; the products are the adapters' own where there is one, and by formula
    in namespaces that do not differentiate.
    """
    x = player.array(player.data["data/X"])
    probability = player.case["hyperparameters"]["preconditioner_update_probability"]
    name = player.framework.name
    products = import_module(f"psgd_{name}_backend.hessian") if name in HELPERS else None
    for t in player.steps:
        draws = Recording(player, t)
        w, b = (player.read(f"param/{t}/{i}") for i in (0, 1))
        flag = draws.toss("fit") < probability or t - 1 < 2
        yield f"flag/{t}", np.asarray(float(flag)), player.data[f"flag/{t}"].astype(float)
        v = [draws.normal(f"v/{i}", y.shape, y) if flag else 0 * y for i, y in enumerate((w, b))]
        loss, grads, hvp = HELPERS.get(player.framework.name, _by_formula)(products, x, [w, b], v)
        draws.spent()
        yield f"loss/{t}", player.framework.numpy(loss), player.data[f"loss/{t}"]
        yield from player.state(t, "grad", grads)
        yield from player.state(t, "v", v)
        yield from player.state(t, "h", hvp)


def _helper_loss(x: Any, params: Sequence[Any]) -> Any:
    xp, (w, b) = namespace(x), params
    z = x @ w + b
    return xp.mean(xp.log1p(xp.exp(z))) + 0.1 * xp.sum(w**4)


def _by_formula(_: Any, x: Any, params: Sequence[Any], v: Sequence[Any]) -> tuple[Any, ...]:
    xp, (w, b), (vw, vb) = namespace(x), params, v
    z, dz = x @ w + b, x @ vw + vb
    s = 1 / (1 + xp.exp(-z))
    n = prod(z.shape)
    grads = x.T @ s / n + 0.4 * w**3, xp.sum(s, axis=0) / n
    ds = s * (1 - s) * dz
    hvp = x.T @ ds / n + 1.2 * w**2 * vw, xp.sum(ds, axis=0) / n
    return _helper_loss(x, params), grads, hvp


def _by_torch(hessian: Any, x: Any, params: Sequence[Any], v: Sequence[Any]) -> tuple[Any, ...]:
    own = [p.clone().requires_grad_() for p in params]
    loss, grads, hvp = hessian.exact(lambda: _helper_loss(x, own), own, v)
    return loss.detach(), grads, hvp


def _by_jax(hessian: Any, x: Any, params: Sequence[Any], v: Sequence[Any]) -> tuple[Any, ...]:
    return hessian.product(lambda p: _helper_loss(x, p), list(params), list(v))


HELPERS: dict[str, Callable[..., tuple[Any, ...]]] = {"torch": _by_torch, "jax": _by_jax}

QUAD_BOUND = NormBound(probes=4, products=6, offset=1e-9)
PRIMITIVES |= {
    "norm_lower_bound_spd": partial(_bound, positive=True, bound=NormBound()),
    "norm_lower_bound_skh": partial(_bound, positive=False, bound=NormBound()),
    "_norm_lower_bound": partial(_bound, positive=True, bound=QUAD_BOUND),
    "_norm_lower_bound (skh)": partial(_bound, positive=False, bound=QUAD_BOUND),
}


def _turned(player: Player, t: int, turn: Callable[..., Any], bound: NormBound) -> Any:
    draws = Recording(player, t)

    def skew_norm(r: Any, **ignored: Any) -> Any:
        return bound(r, draws, "turn", positive=False)

    value = turn(player.read(f"in/{t}/0"), skew_norm)
    draws.spent()
    return value


PRIMITIVES |= {
    "procrustes_step2": partial(_turned, turn=rotate.procrustes2, bound=NormBound()),
    "procrustes_step3": partial(_turned, turn=rotate.procrustes3, bound=NormBound()),
    "_procrustes_step": partial(_turned, turn=rotate.procrustes2, bound=QUAD_BOUND),
}


@primitive("_merge_dims")
def merged(player: Player, t: int) -> Any:
    return np.array(shapes.merge(tuple(int(n) for n in player.data[f"in/{t}/0"])))


@primitive("get_precond_lr")
def preconditioner_lr(player: Player, t: int) -> Any:
    peak, step = player.data[f"in/{t}/0"]
    return np.asarray(schedule.inverse_root(np, peak, step, 10_000, 0.3))


# ---- running ------------------------------------------------------------------------------
def supported(case: Case) -> bool:
    """Can the core replay this case?"""
    return case["family"] in FAMILIES and (
        case["family"] != "primitive" or case["function"] in (*PRIMITIVES, "hessian_helper")
    )


def error(got: np.ndarray, want: np.ndarray, atol: float) -> float:
    """Largest difference beyond `atol`, over the largest recorded modulus; infinite for NaN or another shape."""
    if got.shape != want.shape:
        return inf
    if not want.size:
        return 0.0
    difference = max(float(np.max(np.abs(got - want))) - atol, 0.0)
    scale = float(np.max(np.abs(want)))
    relative = difference / scale if scale else (inf if difference else 0.0)
    return relative if relative == relative else inf


def replay(case: Case, folder: Path, framework: Framework) -> Result:
    """Replay one case; `error` is the worst of all its arrays."""
    with double_precision(framework.name), np.load(folder / case["file"]) as data:
        worst, where = compared(Player(case, Data(data), framework))
    return Result(case["file"].removesuffix(".npz"), case["family"], worst, case["rtol"], where)


def compared(player: Player) -> tuple[float, str]:
    """The worst error of a case, and its array."""
    case, names = player.case, set[str]()
    worst, where = 0.0, ""
    for name, got, want in FAMILIES[case["family"]](player):
        this = error(got, want.astype(got.dtype), case.get("atol", 0.0))
        names.add(name)
        if this >= worst:
            worst, where = this, name
    if not where:
        raise ValueError(f"{case['file']} recorded nothing to compare with")
    kinds = () if case["family"] == "primitive" else RESULTS  # whose parameters are given
    left = [x for x in player.data if x.split("/")[0] in kinds and x not in names and "/0/" not in x]
    if left:
        raise ValueError(f"{left[0]} was recorded, but nothing was computed to compare with it")
    return worst, where


def cases(folder: Path) -> list[Case]:
    """All cases of a folder, in its order; ValueError where its index is none."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no index.json; give a folder of recorded cases, as conformance/internal/golden is"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); give a folder of recorded cases") from error
    if not isinstance(index, dict) or index.get("schema") != 1:
        schema = index.get("schema") if isinstance(index, dict) else index
        raise ValueError(f"{path} has schema {shown(schema)}; this version reads schema 1")
    found = index.get("cases")
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no cases; give a folder of recorded cases, as conformance/internal/golden is")
    for k, case in enumerate(found):
        wrong = complaint(case, Path(folder))
        if wrong:
            name = shown(case["file"]) if isinstance(case, dict) and "file" in case else f"number {k}"
            raise ValueError(f"{path}: case {name}: {wrong}")
    return found


MOST = 10**6  # steps, and numbers along an axis: what is beyond was not recorded


def complaint(case: Any, folder: Path) -> str | None:
    """What is wrong with a case of an index, as far as the index tells; None where nothing is."""
    if not isinstance(case, dict):
        return f"it is {shown(case)} and not an object of fields"
    file = case.get("file")
    if not isinstance(file, str) or not file or "\0" in file:
        return f"file={shown(file)} must name its .npz file"
    if Path(file).name != file or (folder / file).resolve().parent != folder.resolve():
        return f"file={shown(file)} must be a file of this folder itself: no path out of it, and no link"
    for field, kind in {"family": str, **({"function": str} if case.get("family") == "primitive" else {})}.items():
        if not isinstance(case.get(field), kind):
            return f"{field}={shown(case.get(field))} must be a text"
    if not supported(case):
        return None
    for field, (fits, wanted) in FIELDS.items():
        if not fits(case.get(field)):
            return f"{field}={shown(case.get(field))} must be {wanted}"
    return None


def _is_whole(x: Any) -> bool:
    return type(x) is int and 0 <= x <= MOST


def _is_share(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x < 1


def _are(fits: Callable[[Any], bool], *, optional: bool = False) -> Callable[[Any], bool]:
    """Is it a list of what fits?"""
    return lambda xs: (optional and xs is None) or (isinstance(xs, list) and all(map(fits, xs)))


def _is_mapping(x: Any) -> bool:
    return isinstance(x, dict)


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


# Of a case that can be replayed: what each field has to be.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rtol": (_is_share, "a number in [0, 1)"),
    "atol": (lambda x: x is None or (type(x) in (int, float) and 0 <= x < inf), "a number in [0, inf)"),
    "steps": (lambda x: _is_whole(x) and x > 0, f"a whole number in [1, {MOST}]"),
    "recorded_state_steps": (_are(_is_whole, optional=True), "a list of steps"),
    "dtype": (_is_text, "the name of a dtype"),
    "shapes": (_are(_are(_is_whole)), f"a list of shapes, of whole numbers up to {MOST}"),
    "hyperparameters": (lambda x: x is None or _is_mapping(x), "an object of options"),
    "groups": (_are(lambda x: _is_mapping(x) and _are(_is_whole)(x.get("params")), optional=True), "a list of groups"),
    "draws": (lambda x: x is None or (_is_mapping(x) and all(map(_are(_is_text), x.values()))), "lists of draws"),
}
