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
from math import inf, prod, sqrt
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from psgd import criterion, noise
from psgd._xp import (
    HALF,
    cast,
    dtype_name,
    dtype_of,
    in_units,
    is_complex,
    is_something,
    largest,
    lifted_dtype,
    make,
    namespace,
    number,
    plus,
    products,
    times,
    tiny,
)
from psgd.arrays import Array, Factors
from psgd.kron import Kronecker
from psgd.lra import LRA
from psgd.noise import Draws
from psgd.schedule import Memory, Moment, Number, Toss, When, always, never
from psgd.shapes import Shape, as_is, in_order
from psgd.xmat import XShaped

Preconditioner = Kronecker | LRA | XShaped
Choose = Callable[..., Any]  # (flag, then, otherwise, operand) -> then(operand) or otherwise(operand)


# ---- the axes of the grid --------------------------------------------------------------
def power_mean(x: Array, power: int) -> Array:
    """(mean|x|^p)^(1/p), 0-d, at least float32; no power of a finite x overflows."""
    unit = _unit(x)
    if power == 2 and not is_complex(x):
        return unit * _rms(cast(x, unit.dtype) / unit)
    return unit * namespace(x).mean((cast(namespace(x).abs(x), unit.dtype) / unit) ** power) ** (1 / power)


def _unit(x: Array) -> Array:
    """max|x|, 0-d, at least float32; 1 where that is 0."""
    top = cast(largest(x), lifted_dtype(x))
    return namespace(x).where(top > 0, top, namespace(x).ones_like(top))


def _rms(part: Array) -> Array:
    """The RMS of a real array without entries above 1."""
    return namespace(part).linalg.vector_norm(part) / sqrt(prod(part.shape))


def trust(limit: Number, us: Sequence[Array]) -> Array:
    """min(1, limit / r), 0-d, r = ||us|| over all entries of all tensors: what keeps a whole step within `limit`."""
    sizes = [power_mean(u, 2) * sqrt(prod(u.shape)) for u in us]
    xp = namespace(sizes[0])
    wide = max((s.dtype for s in sizes), key=lambda d: xp.finfo(d).bits)
    r = power_mean(xp.stack([cast(s, wide) for s in sizes]), 2) * sqrt(len(sizes))
    limit = number(limit, r)
    long, one = r > limit, xp.ones_like(r)  # the limit may be an array that is infinite
    return xp.where(long, limit / xp.where(long, r, one), one)


@dataclass(frozen=True)
class Clip:
    """Bounds on the direction u of a tensor: its RMS, by scaling, then each entry's modulus. After that, a gain.

    u is the caller's own, as in `times`, and comes in units of a 0-d array, at least 1, or as it is. Without a bound an
    entry in units is left out where a million of its kind would pass the floats.
    """

    rms: float = inf
    entry: float = inf

    def __call__(self, u: Array, gain: float = 1.0, unit: Any = None) -> Array:
        xp = namespace(u)
        if unit is not None:
            unit = cast(unit, lifted_dtype(u))
        elif self.rms < inf:
            unit = make(u, "ones", (), dtype=lifted_dtype(u))
        if self.rms < inf and is_complex(u):
            u = u * number(xp.minimum(unit, self.rms / xp.clip(power_mean(u, 2), min=tiny(unit))), u)
        elif self.rms < inf:
            own = xp.maximum(cast(largest(u), unit.dtype), 1 / unit)
            part = times(cast(u, own.dtype), 1 / own)
            factor = xp.minimum(own * unit, self.rms / xp.clip(_rms(part), min=tiny(unit)))
            gain, last = (1.0, gain) if self.entry == inf else (gain, 1.0)
            u = cast(times(part, last * factor), u.dtype)
        elif unit is not None:
            u = times(u, number(unit, u))
            u = xp.where(xp.abs(u) >= float(xp.finfo(u.dtype).max) * 2.0**-20, xp.zeros_like(u), u)
        if self.entry < inf:
            bounded = not is_complex(u)
            u = xp.clip(u, -self.entry, self.entry) if bounded else u / xp.clip(xp.abs(u) / self.entry, min=1.0)
        return u if gain == 1 else u * gain


@dataclass(frozen=True)
class StartScale:
    """The first scale of Q, from the first gradients: s = (max_k mean|g_k|^p + damping^p)^(-1/(2p)) over tensors k.

    With it P starts near 1/rms(g). `shared`: one scale for all tensors that start together, or one for each that says
    something, and the smallest of these for the others.
    """

    power: int = 4
    shared: bool = True

    def size(self, g: Array) -> Array:
        """(mean|g|^p)^(1/p), 0-d."""
        return power_mean(g, self.power)

    def __call__(
        self, sizes: Sequence[Array], damping: Number, vs: Sequence[Array] | None = None
    ) -> tuple[list[Array], Array]:
        """s for each of the tensors that start together, and whether any of them says something, 0-d.

        Where none does, s is 1: what teaches nothing decides nothing, and the scale waits.

        sizes: at least one; of any shape where several tensors are in one. vs: the probes, of Newton pairs.
        """
        xp = namespace(sizes[0])
        wide = max((s.dtype for s in sizes), key=lambda d: xp.finfo(d).bits)
        most = xp.max(xp.stack([cast(xp.max(s), wide) for s in sizes]))
        seen = is_something(most) | xp.isnan(most)  # which nobody should overlook
        boosts: Sequence[Any] = [1.0] * len(sizes) if vs is None else self._probed(vs)
        if self.shared:
            scale = self.scale(most, damping) * boosts[0]
            return [xp.where(seen, scale, xp.ones_like(scale))] * len(sizes), seen
        each = [xp.where(is_something(s), s, cast(most, s.dtype)) for s in sizes]
        scales = [self.scale(s, damping) * boost for s, boost in zip(each, boosts, strict=True)]
        return [xp.where(seen, s, xp.ones_like(s)) for s in scales], seen

    def _probed(self, vs: Sequence[Array]) -> list[Array]:
        """What the probes v of a Newton pair add to s, as a factor: (mean|v|^2)^(1/4), of all tensors or of each."""
        if not self.shared or not vs:
            return [self._boost(power_mean(v, 2)) for v in vs]
        xp, total = namespace(vs[0]), sum(prod(v.shape) for v in vs)
        squares = [power_mean(v, 2) ** 2 * (prod(v.shape) / total) for v in vs]
        wide = max((s.dtype for s in squares), key=lambda d: xp.finfo(d).bits)
        return [self._boost(sum(cast(s, wide) for s in squares) ** 0.5)] * len(vs)

    @staticmethod
    def _boost(rms: Array) -> Array:
        """The square root of the RMS of v; 1 for a v of zero, which says nothing."""
        xp = namespace(rms)
        return xp.where(rms > 0, rms, xp.ones_like(rms)) ** 0.5

    def scale(self, size: Array, damping: Number) -> Array:
        """s of a size; 1 where it and the damping are zero."""
        xp, damping = namespace(size), number(damping, size)
        top = xp.maximum(size, xp.zeros_like(size) + damping)
        unit = xp.where(top > 0, top, xp.ones_like(top))
        total = (size / unit) ** self.power + (damping / unit) ** self.power
        safe = xp.where(total > 0, total, xp.ones_like(total))
        return unit**-0.5 * safe ** (-0.5 / self.power)


# ---- a point of the grid ---------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step computes: the rule on each axis of the grid. Static and hashable; one compiled step for each.

    preconditioner: the factors, and how they move. whole: of all parameters, as one vector, instead of each.
    newton: fit to Hessian-vector products; whitening methods may be given some too.
    order, layout: shape of a parameter -> order of its axes, shape of its preconditioned tensor.
    momentum: is there a momentum buffer? whiten: fit to the "gradient" or to the "momentum".
    damping: rule that adds noise to what is fitted. fit_first: fit before preconditioning, or after.
    balance_last: where a fit balances the factors, after it or before.
    start: rule of the first scale. clip: bounds on the direction; gain: a factor on it.
    trusted: is the length of a whole step bounded, over all tensors (`Tempo.trust`)?
    decoupled: weight decay is apart from the gradient; if not, it is part of it.
    dtype: name of the dtype of all state and work; None is the parameter's. lifted: half precisions work in float32.
    momentum_dtype, factor_dtype: names of the dtypes these are kept in; None is the parameter's, and the work's.
    fit_precision, apply_precision: of the matrix products that fit the factors, that apply them (`_xp.products`).
    """

    preconditioner: Preconditioner
    whole: bool = False
    newton: bool = False
    order: Callable[[Shape], Shape] = in_order
    layout: Callable[[Shape], Shape] = as_is
    momentum: bool = True
    whiten: str = "gradient"
    damping: criterion.Damping = criterion.relative
    fit_first: bool = True
    balance_last: bool = True
    start: StartScale = StartScale()
    clip: Clip = Clip()
    gain: float = 1.0
    trusted: bool = False
    decoupled: bool = True
    dtype: str | None = None
    lifted: bool = False
    momentum_dtype: str | None = None
    factor_dtype: str | None = None
    fit_precision: str | None = None
    apply_precision: str | None = None

    @property
    def keeps_p(self) -> bool:
        """Is P kept between steps beside the factors that are fitted?"""
        return isinstance(self.preconditioner, Kronecker) and self.preconditioner.keeps_p


@dataclass(frozen=True, kw_only=True)
class Tempo:
    """When and how much: the numbers of a method, and its rules in time.

    momentum: beta of `averaging`. rate: step -> preconditioner learning rate. memory: beta_L. damping: size of the
    noise. fit, balance: the steps at which factors are fitted, balanced. side: at which the first of two sides moves,
    where a preconditioner moves one at a time. counts: `fit` asks for `Moment.since`, an
    integer of state beside the number of steps. trust: largest length of a whole step. seed: of the noise.
    """

    averaging: Callable[[ModuleType, Number, Number], Memory]
    momentum: Number
    rate: Callable[[ModuleType, Number], Number]
    memory: Number
    damping: Number
    fit: When = always
    balance: When = never
    side: When = never
    counts: bool = False
    trust: Number = inf
    seed: int = 0


class Plan(NamedTuple):
    """The scalars and decisions of one step."""

    fit: Any
    balance: Any
    side: Any
    momentum: Memory
    rate: Number
    memory: Number
    damping: Number
    key: Any


class State(NamedTuple):
    """What is kept of one tensor between steps. momentum: the tensor's shape, or None."""

    momentum: Array | None
    factors: Factors


POLICIES = ("skip", "raise", "propagate")  # of a step whose gradients hold a NaN or an infinity
MAX_SKIPS = 10


def not_finite(owner: str, name: str) -> str:
    """What is said where the policy is to raise."""
    return (
        f"{owner}: the gradient of {name} holds a NaN or an infinity; see how the loss came to it, or give "
        'nonfinite="skip" to leave such steps out'
    )


def all_finite(arrays: Sequence[Array]) -> Array:
    """Is every entry of every array finite? 0-d; of at least one array."""
    xp = namespace(arrays[0])
    return xp.all(xp.stack([xp.all(xp.isfinite(x)) for x in arrays]))


def leaves(state: State) -> list[Array]:
    """All arrays of a state, in a fixed order."""
    momentum = [] if state.momentum is None else [state.momentum]
    return [*momentum, *(x for arrays in state.factors for x in arrays)]


def rebuilt(state: State, arrays: Sequence[Array]) -> State:
    """A state of the structure of `state` from its leaves."""
    rest = iter(arrays)
    momentum = None if state.momentum is None else next(rest)
    return State(momentum, Factors(*(tuple(next(rest) for _ in arrays) for arrays in state.factors)))


def plan(
    tempo: Tempo, step: Number, xp: ModuleType, toss: Toss | None = None, since: Number | None = None, key: Any = None
) -> Plan:
    """The plan of a step (from 1), from the namespace of `step`. `toss` replays recorded coins.

    since: steps after the last fit, this one included, where the tempo `counts` them. key: of the step, where known.
    """
    key = noise.key(xp, tempo.seed, step) if key is None else key
    moment = Moment(step, partial(noise.uniform, key) if toss is None else toss, since)
    t = step * 1.0  # an integer array would take its precision with it
    return Plan(
        fit=tempo.fit(moment),
        balance=tempo.balance(moment),
        side=tempo.side(moment),
        momentum=tempo.averaging(xp, t, tempo.momentum),
        rate=tempo.rate(xp, t),
        memory=tempo.memory,
        damping=tempo.damping,
        key=key,
    )


def host_plan(tempo: Tempo, step: int, toss: Toss | None = None, since: int | None = None) -> Plan:
    """The plan in Python's own numbers: no array, no device, nothing to wait for."""
    p = plan(tempo, step, np, toss, since, noise.host_key(tempo.seed, step))
    memory = p.momentum.each(float)
    decisions = bool(p.fit), bool(p.balance), bool(p.side)
    return Plan(*decisions, memory, float(p.rate), p.memory, p.damping, p.key)


class Unasked:
    """No draws: an error where one is asked for."""

    def normal(self, role: str, shape: Sequence[int], like: Array, skip: Array | None = None) -> Array:
        """Raise ValueError."""
        raise ValueError(f"the preconditioner begins with random {role}; give `init` the draws of step 0")

    signs = normal


def first_key(tempo: Tempo) -> int:
    """The key of step 0, for a preconditioner that begins at random, as Python's own number."""
    return noise.host_key(tempo.seed, 0)


# ---- the work on one tensor ------------------------------------------------------------
def branch(flag: Any, then: Callable[[Any], Any], otherwise: Callable[[Any], Any], operand: Any) -> Any:
    """`Choose` for decisions that are Python booleans."""
    return then(operand) if flag else otherwise(operand)


def working(recipe: Recipe, g: Array) -> Array:
    """A gradient in the dtype of the step's work."""
    xp = namespace(g)
    if recipe.dtype is not None:
        return cast(g, dtype_of(xp, recipe.dtype))
    if dtype_name(g.dtype) in (HALF if recipe.lifted else ("float16",)):
        g = cast(g, lifted_dtype(g))
    kept = g.dtype if recipe.factor_dtype is None else dtype_of(xp, recipe.factor_dtype)
    return cast(g, xp.result_type(g.dtype, kept))


def laid_out(recipe: Recipe, x: Array) -> Array:
    """A tensor of a parameter's shape in the shape its preconditioner sees."""
    xp, shape = namespace(x), tuple(x.shape)
    order = recipe.order(shape)
    return xp.reshape(x if order == in_order(shape) else xp.permute_dims(x, order), recipe.layout(shape))


def laid_back(recipe: Recipe, x: Array, shape: Shape) -> Array:
    """The inverse of `laid_out`, for a parameter of a shape."""
    xp, order = namespace(x), recipe.order(shape)
    x = xp.reshape(x, tuple(shape[i] for i in order))
    return x if order == in_order(shape) else xp.permute_dims(x, tuple(order.index(i) for i in in_order(shape)))


def init_momentum(recipe: Recipe, like: Array) -> Array | None:
    """The momentum of a parameter before its first step, in the dtype in which it is kept."""
    name = recipe.momentum_dtype or recipe.dtype
    dtype = like.dtype if name is None else dtype_of(namespace(like), name)
    return make(like, "zeros", tuple(like.shape), dtype=dtype) if recipe.momentum else None


def init(recipe: Recipe, like: Array, scale: Number | None = None, draws: Draws | None = None) -> State:
    """State before the first step of a parameter. `scale` None: identity, to be `rescaled` when known.

    draws: of step 0, for a preconditioner that begins at random.
    """
    work = working(recipe, like)
    kept = work.dtype if recipe.factor_dtype is None else dtype_of(namespace(like), recipe.factor_dtype)
    factors = recipe.preconditioner.init(laid_out(recipe, work), Unasked() if draws is None else draws)
    state = State(init_momentum(recipe, like), in_dtypes(factors, [kept] * len(factors.Q)))
    return state if scale is None else rescaled(recipe, state, scale)


def with_p(recipe: Recipe, factors: Factors) -> Factors:
    """Factors with those of P that belong to Q, where they are kept."""
    kind = recipe.preconditioner
    return kind.with_p(factors) if isinstance(kind, Kronecker) else factors


def rescaled(recipe: Recipe, state: State, scale: Number) -> State:
    """State with Q times `scale` overall."""
    return state._replace(factors=recipe.preconditioner.rescaled(state.factors, scale))


def step(
    recipe: Recipe,
    plan: Plan,
    g: Array,
    state: State,
    draws: Draws | None = None,
    choose: Choose = branch,
    pair: tuple[Array, Array] | None = None,
) -> tuple[Array, State]:
    """One step of one parameter.

    Args:
        g: gradient, in the parameter's shape, any floating dtype; read only.
        state: PyTorch may write over its momentum.
        draws: where noise comes from; the plan's counter unless replayed.
        choose: how a decision of the plan selects a branch; a framework that traces passes its own conditional.
        pair: (v, H v), in the parameter's shape, to fit to instead of whitening.

    Returns: the direction u (shape of g, dtype of the work), to be subtracted times the learning rate; the new state.
    """
    if not prod(g.shape):
        return working(recipe, g), state
    momentum, seen, smooth = observed(recipe, plan, g, state.momentum)
    old, units = state.factors, in_units(smooth, scale_of(recipe, plan))
    same = units if seen is smooth else None

    def fit(factors: Factors) -> Factors:
        return fitted(recipe, plan, seen, factors, draws, pair, same)

    new = choose(plan.fit, fit, lambda factors: factors, old)
    return directed(recipe, plan, new if recipe.fit_first else old, smooth, units), State(momentum, new)


def observed(recipe: Recipe, plan: Plan, g: Array, m: Array | None) -> tuple[Array | None, Array, Array]:
    """The new momentum; what is fitted to; what is preconditioned. The momentum comes and goes in its own dtype.

    Averages are still to be scaled, see `scale_of`.
    """
    g = working(recipe, g)
    new, smooth = averaged(plan.momentum, g, None if m is None else cast(m, g.dtype))
    new = new if m is None else cast(new, m.dtype)
    return new, smooth if recipe.whiten == "momentum" else g, smooth


def scale_of(recipe: Recipe, plan: Plan) -> Number:
    """What an average, or P of it, has still to be multiplied by."""
    scale = plan.momentum.scale if recipe.momentum else None
    return 1.0 if scale is None else scale


def to_fit(recipe: Recipe, plan: Plan, seen: Array) -> Array:
    """What a fit sees of what was `observed`: a momentum at its scale, a gradient as it is."""
    return seen * number(scale_of(recipe, plan), seen) if recipe.whiten == "momentum" else seen


def fitted(
    recipe: Recipe,
    plan: Plan,
    seen: Array,
    factors: Factors,
    draws: Draws | None = None,
    given: tuple[Array, Array] | None = None,
    units: tuple[Array, Array, Array] | None = None,
) -> Factors:
    """Factors after a fit to what was seen of a parameter, or to a given pair (v, H v), in their own dtypes.

    units: what was seen `in_units`, where that is known.
    """
    kind, dtypes = recipe.preconditioner, [q.dtype for q in factors.Q]
    if given is not None:
        units = in_units(working(recipe, given[1]))
    elif units is None:
        units = in_units(seen, scale_of(recipe, plan) if recipe.whiten == "momentum" else 1.0)
    seen, unit, size = laid_out(recipe, units[0]), *units[1:]
    draws = noise.Counter(plan.key) if draws is None else draws
    factors = in_dtypes(factors, [seen.dtype] * len(dtypes))
    if not recipe.balance_last:
        factors = kind.balanced(factors, plan.balance)
    probed = given is None and kind.probed(factors)
    silent = recipe.damping is criterion.undamped and not probed
    e = seen if silent else draws.signs("damping", seen.shape, seen)
    if given is None:
        pair = criterion.whitening(probed, seen, e, plan.damping, recipe.damping, unit)
    else:
        v = laid_out(recipe, working(recipe, given[0]))
        pair = criterion.newton(v, seen, e, plan.damping, recipe.damping, unit)
    # Where there was nothing to see, a residual is of the probe alone, and Q would grow without end.
    learns = cast(is_something(size), lifted_dtype(seen))
    with products(recipe.fit_precision):
        factors = kind.fit(factors, pair, learns * number(plan.rate, learns), plan.memory, draws, plan.side)
    if recipe.balance_last:
        factors = kind.balanced(factors, plan.balance)
    return in_dtypes(factors, dtypes)


def in_dtypes(factors: Factors, dtypes: Sequence[Any]) -> Factors:
    """Factors in dtypes, one for each axis; L keeps its own."""
    q, p = (tuple(map(cast, xs, dtypes)) for xs in (factors.Q, factors.P))
    return factors._replace(Q=q, P=p)


def preconditioned(recipe: Recipe, factors: Factors, g: Array) -> Array:
    """P g, laid out as the preconditioner sees it."""
    work = in_dtypes(factors, [g.dtype] * len(factors.Q))
    with products(recipe.apply_precision):
        return recipe.preconditioner.precondition(work, laid_out(recipe, g))


def directed(
    recipe: Recipe,
    plan: Plan,
    factors: Factors,
    smooth: Array,
    units: tuple[Array, Array, Array] | None = None,
) -> Array:
    """The direction u of a parameter, from its factors and its averaged gradient.

    units: the average `in_units`, where that is known.
    """
    g, unit, _ = in_units(smooth, scale_of(recipe, plan)) if units is None else units
    u = recipe.clip(preconditioned(recipe, factors, g), recipe.gain, unit)
    return laid_back(recipe, u, tuple(smooth.shape))


def averaged(memory: Memory, g: Array, m: Array | None) -> tuple[Array | None, Array]:
    """The momentum buffer after g, over the old one, and what the step uses of it, but for the scale."""
    if m is None:
        return None, g
    past = number(memory.past, g)
    m = plus(times(m, past), 1 - past, g, used=True)
    if memory.blend is None:
        return m, m
    keep, fresh = (number(x, g) for x in memory.blend)
    return m, plus(keep * m, fresh, g, used=True)


def displacement(p: Array, u: Array, lr: Number, weight_decay: Number) -> Array:
    """-lr (u + weight_decay p): what a step adds to a parameter, in the parameter's dtype. u is the caller's own."""
    xp = namespace(p)
    u = cast(u, xp.result_type(u.dtype, p.dtype))  # a large u may leave the range of p, where lr u does not
    lr = number(lr, u)
    change = times(u, -lr)
    if not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
        change = plus(change, -lr * number(weight_decay, u), cast(p, u.dtype), used=True)
    return cast(change, p.dtype)
