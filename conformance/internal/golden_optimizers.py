"""Replays of whole optimizers: several tensors, in the order in which the recorded run drew its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

from conformance.internal.golden_player import Compared, Player, Recording, number
from conformance.reference import stacked, within_max_norm
from psgd import kron, pipeline, schedule
from psgd._xp import eps, namespace
from psgd.hyperparameters import Method
from psgd.joint import join, split
from psgd.lra import LRA
from psgd.recipe import Plan, Recipe, State
from psgd.scaling import Clip


def replay_optimizer(
    player: Player,
    method: type[Method],
    renamed: Mapping[str, str | None],
    common: Sequence[str] = ("fit",),
    *,
    late: bool = False,
    by_group: bool = False,
) -> Iterator[Compared]:
    """A method's pipeline, tensor after tensor, in the order in which the recorded run drew its numbers.

    common: roles of coins that were tossed once for all tensors; the others were tossed for each.
    late: the state before the first step was recorded before it got its scale.
    by_group: coins were tossed for each group of parameters.
    """
    n = len(player.case["shapes"])
    groups = player.case.get("groups") or [{"params": list(range(n))}]
    options = _options(player, method, groups, renamed)
    joint = options[0].recipe().joint
    scanned = player.case["hyperparameters"].get("scanned_layers") or [False] * n
    units = [Unit(list(range(n)))] if joint else [Unit([i], scanned[i]) for i in range(n)]
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
        plans = _plans(player, options, groups, t, draws, since, common, by_group)
        since = 0 if plans[0].fit else since
        pairs = _pairs(player, t, draws) if plans[0].fit else None
        if pairs is None and plans[0].fit and (options[0].recipe().newton or f"flag/{t}" in player.data):
            raise ValueError(f"the case lacks h/{t}/0, which its schema demands where there is a fit")
        if joint and not plans[0].fit and f"flag/{t}" not in player.data:
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
        recorded = player.case["hyperparameters"] | {k: v for k, v in group.items() if k != "params"}
        kept = {renamed.get(k, k): number(v) for k, v in recorded.items() if v != "default schedule"}
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
        members = [tensors[i] for i in self.members]
        if len(self.shapes) < 2 and members[0].ndim and len(members) == 1 and not self.flat:
            return members[0]
        return join(members)

    flat = False

    def split(self, vector: Any) -> list[Any]:
        """The inverse of `joined`, for vectors."""
        return split(vector, self.shapes)

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
        unscaled = [u for u in units if set(u.members) & set(group["params"]) and not u.scaled]
        method = options[group["params"][0]]
        recipe, scale = method.recipe(), method.initial_scale()
        if scale is not None:
            for unit in unscaled:
                unit.rescale(recipe, scale)
        elif unscaled and (fit or not by_pairs):
            fitted = tensors if pairs is None else pairs[1]
            take = [
                fitted[u.members[0]][0, ...] if u.scanned else u.joined(fitted) if u.flat else fitted[u.members[0]]
                for u in unscaled
            ]
            vs = None if pairs is None else [u.joined(pairs[0]) if u.flat else pairs[0][u.members[0]] for u in unscaled]
            sizes = [pipeline.size_of(recipe, x) for x in take]
            scales, _ = pipeline.initial_scales(recipe, method.schedule(), sizes, vs)
            for unit, scale in zip(unscaled, scales, strict=True):
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


def _plans(
    player: Player,
    options: Mapping[int, Method],
    groups: Sequence[Any],
    t: int,
    draws: Recording,
    since: int,
    common: Sequence[str],
    by_group: bool,
) -> dict[int, Plan]:
    """The plan of each tensor: coins in `common` are tossed once a step, and none but that to fit where nothing is."""
    heads: dict[str, float] = {}
    group_of = {i: group["params"][0] for group in groups for i in group["params"]}
    flag = f"flag/{t}"
    flagged = player.family.flagged or player.case.get("mode") == "hessian"
    recorded = bool(player.data[flag]) if flagged else None

    def toss(role: str) -> float:
        if role not in common:
            return draws.toss(role)
        if role not in heads:
            heads[role] = draws.toss(role) if recorded is None else 1.0
        return heads[role]

    plans: dict[int, Plan] = {}
    for i, method in sorted(options.items()):
        if plans and method.recipe().joint:
            plans[i] = plans[0]
            continue
        if group_of[i] == i and by_group:
            heads.clear()
        fit = method.schedule().fit(schedule.StepInfo(t, toss, since)) if recorded is None else recorded
        asked = _asked(method)

        def coin(role: str, fit: bool = fit, asked: frozenset[str] = asked) -> float:
            return toss(role) if role in asked and fit else heads.get(role, 1.0)

        plans[i] = pipeline.host_plan(method.schedule(), t, coin, since)._replace(fit=fit)
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
    xp, stack = namespace(g), stacked(states)
    g = pipeline.working(recipe, g)
    observed = pipeline.target_at_scale(recipe, plan, pipeline.observe(recipe, plan, g, stack.momentum).target)
    mean = xp.mean(xp.abs(observed))
    e = draws.normal("damping", observed.shape, observed) if plan.fit else observed
    unclipped = replace(recipe, damping=lambda x, e, amount, unit: x + amount * (mean / unit) * e, clip=Clip())
    rows = [pipeline.step(unclipped, plan, g[k, ...], s, _Layer(e[k, ...])) for k, s in enumerate(states)]
    return recipe.clip(xp.stack([u for u, _ in rows])), [s for _, s in rows]
