"""One optimizer step of one tensor: momentum, fit?, precondition, clip.

Every published PSGD optimizer is a point of one grid. A `Recipe` names the rule on each axis of the grid that shapes
the computation; a `Tempo` holds when and how much. `plan` turns a tempo and a step number into the few scalars and
decisions of that step: Python numbers on the host, or traced 0-d arrays. `step` does the tensor work.

State is plain data: a `State` of arrays for each tensor, and the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from psgd import criterion, kron, noise
from psgd._xp import dtype_of, lifted_dtype, make, namespace, number, real_dtype
from psgd.arrays import Array
from psgd.geometry import Geometry
from psgd.noise import Draws
from psgd.rotate import balanced
from psgd.schedule import Memory, Number, Toss, When, always, never
from psgd.shapes import Shape, as_is
from psgd.spectral import NormBound

Choose = Callable[..., Any]  # (flag, then, otherwise, operand) -> then(operand) or otherwise(operand)


# ---- the axes of the grid --------------------------------------------------------------
def power_mean(x: Array, power: int) -> Array:
    """(mean|x|^p)^(1/p), 0-d, at least float32; no power of a finite x overflows."""
    xp = namespace(x)
    wide = xp.astype(xp.abs(x), lifted_dtype(x))
    top = xp.max(wide)
    unit = xp.where(top > 0, top, xp.ones_like(top))
    return unit * xp.mean((wide / unit) ** power) ** (1 / power)


@dataclass(frozen=True)
class Clip:
    """Bounds on the direction u of a tensor: its RMS, by scaling, then each entry's modulus."""

    rms: float = inf
    entry: float = inf

    def __call__(self, u: Array) -> Array:
        xp = namespace(u)
        if self.rms < inf:
            rms = power_mean(u, 2)
            u = u * xp.astype(self.rms / xp.clip(rms, min=self.rms), real_dtype(u))
        if self.entry < inf:
            u = u / xp.clip(xp.abs(u) / self.entry, min=1.0)
        return u


@dataclass(frozen=True)
class StartScale:
    """The first scale of Q, from the first gradients: s = (max_k mean|g_k|^p + damping^p)^(-1/(2p)) over tensors k.

    With it P starts near 1/rms(g). `split` shares s between the factors of a tensor (see `kron.rescaled`).
    """

    power: int = 4
    split: bool = True

    def size(self, g: Array) -> Array:
        """(mean|g|^p)^(1/p), 0-d."""
        return power_mean(g, self.power)

    def __call__(self, sizes: Sequence[Array], damping: Number) -> Array:
        """s from the sizes of all tensors; 1 where all gradients and the damping are zero."""
        xp = namespace(sizes[0])
        wide = max((s.dtype for s in sizes), key=lambda d: xp.finfo(d).bits)
        size = xp.max(xp.stack([xp.astype(s, wide) for s in sizes]))
        damping = number(damping, size)
        top = xp.maximum(size, xp.zeros_like(size) + damping)
        unit = xp.where(top > 0, top, xp.ones_like(top))
        total = (size / unit) ** self.power + (damping / unit) ** self.power
        safe = xp.where(total > 0, total, xp.ones_like(total))
        return unit**-0.5 * safe ** (-0.5 / self.power)


# ---- a point of the grid ---------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step computes: the rule on each axis of the grid. Static and hashable; one compiled step for each.

    geometry: how factors move. bound: the norm bound they use.
    dense: which axes get a dense factor. layout: shape of a parameter -> shape of its preconditioned tensor.
    momentum: is there a momentum buffer? whiten: fit to the "gradient" or to the "momentum".
    damping: rule that adds noise to what is fitted. fit_first: fit before preconditioning, or after.
    balance_last: where a fit balances the factors, after it or before.
    start: rule of the first scale. clip: bounds on the direction; gain: a factor on it.
    dtype: name of the dtype of all state; None is the parameter's.
    """

    geometry: Geometry
    bound: NormBound = NormBound()
    dense: kron.DenseRule = kron.DenseRule()
    layout: Callable[[Shape], Shape] = as_is
    momentum: bool = True
    whiten: str = "gradient"
    damping: criterion.Damping = criterion.relative
    fit_first: bool = True
    balance_last: bool = True
    start: StartScale = StartScale()
    clip: Clip = Clip()
    gain: float = 1.0
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tempo:
    """When and how much: the numbers of a method, and its rules in time.

    momentum: beta of `averaging`. rate: step -> preconditioner learning rate. memory: beta_L. damping: size of the
    noise. fit, balance: the steps at which factors are fitted, balanced. seed: of the noise.
    """

    averaging: Callable[[ModuleType, Number, Number], Memory]
    momentum: Number
    rate: Callable[[ModuleType, Number], Number]
    memory: Number
    damping: Number
    fit: When = always
    balance: When = never
    seed: int = 0


class Plan(NamedTuple):
    """The scalars and decisions of one step."""

    fit: Any
    balance: Any
    momentum: Memory
    rate: Number
    memory: Number
    damping: Number
    key: Any


class State(NamedTuple):
    """What is kept of one tensor between steps. momentum: the tensor's shape, or None."""

    momentum: Array | None
    factors: kron.Factors


def plan(tempo: Tempo, step: Number, xp: ModuleType, toss: Toss | None = None) -> Plan:
    """The plan of a step (from 1), from the namespace of `step`. `toss` replays recorded coins."""
    key = noise.key(xp, tempo.seed, step)
    toss = partial(noise.uniform, key) if toss is None else toss
    t = step * 1.0  # an integer array would take its precision with it
    return Plan(
        fit=tempo.fit(step, toss),
        balance=tempo.balance(step, toss),
        momentum=tempo.averaging(xp, t, tempo.momentum),
        rate=tempo.rate(xp, t),
        memory=tempo.memory,
        damping=tempo.damping,
        key=key,
    )


def host_plan(tempo: Tempo, step: int, toss: Toss | None = None) -> Plan:
    """The plan in Python's own numbers: no array, no device, nothing to wait for."""
    p = plan(tempo, step, np, toss)
    blend = None if p.momentum.blend is None else (float(p.momentum.blend[0]), float(p.momentum.blend[1]))
    memory = Memory(float(p.momentum.past), blend)
    return Plan(bool(p.fit), bool(p.balance), memory, float(p.rate), p.memory, p.damping, int(p.key[0]))


# ---- the work on one tensor ------------------------------------------------------------
def branch(flag: Any, then: Callable[[Any], Any], otherwise: Callable[[Any], Any], operand: Any) -> Any:
    """`Choose` for decisions that are Python booleans."""
    return then(operand) if flag else otherwise(operand)


def working(recipe: Recipe, g: Array) -> Array:
    """A gradient in the dtype of the state."""
    return g if recipe.dtype is None else namespace(g).astype(g, dtype_of(namespace(g), recipe.dtype))


def init(recipe: Recipe, like: Array, scale: Number | None = None) -> State:
    """State before the first step of a tensor in layout shape. `scale` None: identity, to be `rescaled` when known."""
    like = working(recipe, like)
    factors = kron.init(recipe.dense(tuple(like.shape)), like)
    zeros = make(like, "zeros", tuple(like.shape)) if recipe.momentum else None
    state = State(zeros, factors)
    return state if scale is None else rescaled(recipe, state, scale)


def rescaled(recipe: Recipe, state: State, scale: Number) -> State:
    """State with Q times `scale` overall."""
    factors = kron.rescaled(recipe.geometry, state.factors, scale, split=recipe.start.split)
    return state._replace(factors=factors)


def step(
    recipe: Recipe, plan: Plan, g: Array, state: State, draws: Draws | None = None, choose: Choose = branch
) -> tuple[Array, State]:
    """One step of one tensor.

    Args:
        g: gradient in layout shape, any floating dtype; read only.
        draws: where noise comes from; the plan's counter unless replayed.
        choose: how a decision of the plan selects a branch; a framework that traces passes its own conditional.

    Returns: the direction u (shape of g, dtype of the state), to be subtracted times the learning rate; the new state.
    """
    if not prod(g.shape):
        return working(recipe, g), state
    g = working(recipe, g)
    draws = noise.Counter(plan.key) if draws is None else draws
    momentum, smooth = averaged(plan.momentum, g, state.momentum)
    seen = smooth if recipe.whiten == "momentum" else g

    def fitted(factors: kron.Factors) -> kron.Factors:
        if not recipe.balance_last:
            factors = factors._replace(Q=balanced(factors.Q, plan.balance))
        e = draws.normal("damping", g.shape, g)
        pair = criterion.whitening(recipe.geometry, seen, e, plan.damping, recipe.damping)
        factors = kron.fit(recipe.geometry, recipe.bound, factors, pair, plan.rate, plan.memory, draws)
        return factors._replace(Q=balanced(factors.Q, plan.balance)) if recipe.balance_last else factors

    new = choose(plan.fit, fitted, lambda factors: factors, state.factors)
    u = recipe.geometry.precondition((new if recipe.fit_first else state.factors).Q, smooth)
    u = recipe.clip(u)
    return u if recipe.gain == 1 else u * recipe.gain, State(momentum, new)


def averaged(memory: Memory, g: Array, m: Array | None) -> tuple[Array | None, Array]:
    """The momentum buffer after g, and what the step uses of it."""
    if m is None:
        return None, g
    past = number(memory.past, g)
    m = past * m + (1 - past) * g
    if memory.blend is None:
        return m, m
    keep, fresh = (number(x, g) for x in memory.blend)
    return m, keep * m + fresh * g


def displacement(p: Array, u: Array, lr: Number, weight_decay: Number) -> Array:
    """-lr (u + weight_decay p): what a step adds to a parameter, in the parameter's dtype."""
    u = namespace(p).astype(u, p.dtype)
    if not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
        u = u + number(weight_decay, p) * p
    return -number(lr, p) * u
