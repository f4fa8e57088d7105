"""One optimizer step of one tensor in three stages: observe (the momentum), fit (the factors), direct (P and the clip).

`plan` turns a schedule and a step number into the few scalars and decisions of that step: Python numbers on the host,
or traced 0-d arrays. `step` does the tensor work, in the order in which psgd_torch, quad_torch and psgd_jax do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from psgd import criterion, noise
from psgd._xp import (
    HALF,
    accumulation_dtype,
    cast,
    dtype_name,
    dtype_of,
    in_units,
    is_something,
    make,
    namespace,
    number,
    plus,
    products,
    times,
)
from psgd.arrays import Array, Dtype, Factors, Number
from psgd.noise import Draws
from psgd.recipe import Plan, Recipe, Schedule, State
from psgd.schedule import Averaging, StepInfo, Toss
from psgd.shapes import Shape, in_order

Operand = TypeVar("Operand")
Result = TypeVar("Result")
Choose = Callable[..., Any]  # (flag, then, otherwise, operand) -> then(operand) or otherwise(operand)


def plan(
    schedule: Schedule,
    step: Number,
    xp: ModuleType,
    toss: Toss | None = None,
    since: Number | None = None,
    key: Array | int | None = None,
) -> Plan:
    """The plan of a step: the numbers and decisions of a schedule at it.

    step: from 1, Python's or a 0-d array of the namespace xp. toss: replays recorded coins. since: steps after the last
    fit, this one included, where the schedule `counts` them. key: of the step, where it is known already.
    """
    key = noise.key(xp, schedule.seed, step) if key is None else key
    info = StepInfo(step, partial(noise.uniform, key) if toss is None else toss, since)
    t = step * 1.0  # an integer array would decide the dtype of what is computed with it
    return Plan(
        fit=schedule.fit(info),
        balance=schedule.balance(info),
        side=schedule.side(info),
        momentum=schedule.averaging(xp, t, schedule.momentum),
        rate=schedule.rate(xp, t),
        beta_lipschitz=schedule.beta_lipschitz,
        damping=schedule.damping,
        key=key,
    )


def host_plan(schedule: Schedule, step: int, toss: Toss | None = None, since: int | None = None) -> Plan:
    """The plan in Python's numbers, computed on the host: no array, no device, nothing to wait for."""
    p = plan(schedule, step, np, toss, since, noise.host_key(schedule.seed, step))
    averaging = p.momentum.each(float)
    decisions = bool(p.fit), bool(p.balance), bool(p.side)
    return Plan(*decisions, averaging, float(p.rate), p.beta_lipschitz, p.damping, p.key)


class Unasked:
    """Draws where none are expected: asking for any is an error."""

    def normal(self, role: str, shape: Sequence[int], like: Array, skip: Array | None = None) -> Array:
        """Raise ValueError."""
        raise ValueError(f"the preconditioner begins with random {role}; give `init` the draws of step 0")

    signs = normal


def first_key(schedule: Schedule) -> int:
    """The key of step 0 as a Python integer, for a preconditioner that begins at random."""
    return noise.host_key(schedule.seed, 0)


def branch(
    flag: bool | Array, then: Callable[[Operand], Result], otherwise: Callable[[Operand], Result], operand: Operand
) -> Result:
    """`Choose` for decisions that are Python booleans."""
    return then(operand) if flag else otherwise(operand)


def working(recipe: Recipe, g: Array) -> Array:
    """A gradient in the dtype of the step's work: the recipe's, else the wider of its own and that of the factors."""
    xp = namespace(g)
    if recipe.dtype is not None:
        return cast(g, dtype_of(xp, recipe.dtype))
    if dtype_name(g.dtype) in (HALF if recipe.widens_half else ("float16",)):
        g = cast(g, accumulation_dtype(g))
    kept = g.dtype if recipe.factor_dtype is None else dtype_of(xp, recipe.factor_dtype)
    return cast(g, xp.result_type(g.dtype, kept))


def laid_out(recipe: Recipe, x: Array) -> Array:
    """A tensor of a parameter's shape, in the order of axes and the shape that its preconditioner sees."""
    xp, shape = namespace(x), tuple(x.shape)
    order = recipe.order(shape)
    return xp.reshape(x if order == in_order(shape) else xp.permute_dims(x, order), recipe.layout(shape))


def laid_back(recipe: Recipe, x: Array, shape: Shape) -> Array:
    """The inverse of `laid_out`: a tensor as the preconditioner sees it, in the parameter's `shape`."""
    xp, order = namespace(x), recipe.order(shape)
    x = xp.reshape(x, tuple(shape[i] for i in order))
    return x if order == in_order(shape) else xp.permute_dims(x, tuple(order.index(i) for i in in_order(shape)))


def init_momentum(recipe: Recipe, like: Array) -> Array | None:
    """The momentum of a parameter before its first step: zeros in its shape, in the dtype of the buffer, or None."""
    name = recipe.momentum_dtype or recipe.dtype
    dtype = like.dtype if name is None else dtype_of(namespace(like), name)
    return make(like, "zeros", tuple(like.shape), dtype=dtype) if recipe.momentum else None


def init(recipe: Recipe, like: Array, scale: Number | None = None, draws: Draws | None = None) -> State:
    """The state of a parameter like `like` before its first step: a momentum of 0, and P = scale^2 I or nearly.

    scale: of Q; None is 1, to be `rescaled` when it is known. draws: of step 0, for factors that begin at random.
    """
    work = working(recipe, like)
    kept = work.dtype if recipe.factor_dtype is None else dtype_of(namespace(like), recipe.factor_dtype)
    factors = recipe.preconditioner.init(laid_out(recipe, work), Unasked() if draws is None else draws)
    state = State(init_momentum(recipe, like), in_dtypes(factors, [kept] * len(factors.Q)))
    return state if scale is None else rescaled(recipe, state, scale)


def size_of(recipe: Recipe, x: Array) -> Array:
    """The size of a gradient or H v, (mean|x|^p)^(1/p), 0-d, from which `initial_scales` takes the first scale."""
    return recipe.initial_scale.size(working(recipe, x))


def initial_scales(
    recipe: Recipe, schedule: Schedule, sizes: Sequence[Array], probes: Sequence[Array] | None = None
) -> tuple[list[Array], Array]:
    """The first scale of Q of each tensor that starts, and a 0-d boolean: is any of them a signal to learn from?

    sizes: at least one, as `size_of` gives them, of gradients or of H v; not 0-d where several tensors are in a stack.
    probes: v of each, where they are of H v. See `psgd.scaling.InitialScale`.
    """
    vs = None if probes is None else [working(recipe, v) for v in probes]
    return recipe.initial_scale(sizes, schedule.damping, vs)


def rescaled(recipe: Recipe, state: State, scale: Number) -> State:
    """The state with Q times `scale` overall, a number or 0-d."""
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
    """One step of one parameter: observe, fit if the plan says so, direct.

    Args:
        recipe, plan: what is computed, and the numbers and decisions of this step.
        g: gradient, in the parameter's shape, any floating dtype; read only.
        state: of the parameter; PyTorch may write over its momentum.
        draws: where noise comes from; the plan's counter unless replayed.
        choose: how a decision of the plan selects a branch; a framework that traces passes its own conditional.
        pair: (v, H v), in the parameter's shape, to fit to instead of whitening.

    Returns: the direction u (shape of g, dtype of the work), to be subtracted times the learning rate; the new state.
    """
    if not prod(g.shape):
        return working(recipe, g), state
    observed = observe(recipe, plan, g, state.momentum)
    units = in_units(observed.average, scale_of(recipe, plan))
    new = choose(
        plan.fit,
        lambda factors: fit(recipe, plan, observed.target, factors, draws, pair, units if observed.is_one else None),
        lambda factors: factors,
        state.factors,
    )
    u = direct(recipe, plan, new if recipe.fit_first else state.factors, observed.average, units)
    return u, State(observed.momentum, new)


class Observation(NamedTuple):
    """What a step sees of a tensor, in the parameter's shape. momentum: the new buffer, in its own dtype, or None.
    target: what the factors are fitted to. average: what is preconditioned. Averages are still to be multiplied by
    `scale_of`.
    """

    momentum: Array | None
    target: Array
    average: Array

    @property
    def is_one(self) -> bool:
        """Are the factors fitted to the very array that is preconditioned?"""
        return self.target is self.average


def observe(recipe: Recipe, plan: Plan, g: Array, m: Array | None) -> Observation:
    """The first stage: a gradient g enters the momentum m, both in the parameter's shape; m keeps its dtype."""
    g = working(recipe, g)
    new, averaged = average(plan.momentum, g, None if m is None else cast(m, g.dtype))
    new = new if m is None else cast(new, m.dtype)
    return Observation(new, averaged if recipe.whiten == "momentum" else g, averaged)


def scale_of(recipe: Recipe, plan: Plan) -> Number:
    """What an average, or P times it, has still to be multiplied by: `Averaging.scale`, or 1."""
    scale = plan.momentum.scale if recipe.momentum else None
    return 1.0 if scale is None else scale


def target_at_scale(recipe: Recipe, plan: Plan, target: Array) -> Array:
    """The target of an `Observation` as a fit takes it: a momentum times `scale_of`, a gradient as it is."""
    return target * number(scale_of(recipe, plan), target) if recipe.whiten == "momentum" else target


def fit(
    recipe: Recipe,
    plan: Plan,
    target: Array,
    factors: Factors,
    draws: Draws | None = None,
    pair: tuple[Array, Array] | None = None,
    units: tuple[Array, Array, Array] | None = None,
) -> Factors:
    """The second stage: factors after a fit to the target, or to a pair (v, H v) instead, in their own dtypes.

    target, pair: in the parameter's shape. units: the target's `in_units`, where that is known already.
    """
    kind, dtypes = recipe.preconditioner, [q.dtype for q in factors.Q]
    draws = noise.Counter(plan.key) if draws is None else draws
    if pair is not None:
        units = in_units(working(recipe, pair[1]))
    elif units is None:
        units = in_units(target, scale_of(recipe, plan) if recipe.whiten == "momentum" else 1.0)
    size = units[2]
    factors = in_dtypes(factors, [units[0].dtype] * len(dtypes))
    if not recipe.balance_last:
        factors = kind.balanced(factors, plan.balance)
    v = None if pair is None else pair[0]
    damped = damped_pair(recipe, plan, units, draws, v, probed=v is None and kind.probed(factors))
    # Without a signal the residual is of the probe alone, T1 = 0, and Q would grow by 1 + mu at each fit, without end.
    learns = cast(is_something(size), accumulation_dtype(units[0]))
    with products(recipe.fit_precision):
        rate = learns * number(plan.rate, learns)
        factors = kind.fit(factors, damped, rate, plan.beta_lipschitz, draws, plan.side)
    if recipe.balance_last:
        factors = kind.balanced(factors, plan.balance)
    return in_dtypes(factors, dtypes)


def damped_pair(
    recipe: Recipe,
    plan: Plan,
    units: tuple[Array, Array, Array],
    draws: Draws,
    v: Array | None,
    *,
    probed: bool,
) -> criterion.Pair:
    """The pair (v, h) of a target `in_units`, or of v and its H v: damped, in the preconditioner's shape."""
    h, unit = laid_out(recipe, units[0]), units[1]
    silent = recipe.damping is criterion.undamped and not probed
    e = h if silent else draws.signs("damping", h.shape, h)
    if v is None:
        return criterion.whitening(probed, h, e, plan.damping, recipe.damping, unit)
    return criterion.newton(laid_out(recipe, working(recipe, v)), h, e, plan.damping, recipe.damping, unit)


def in_dtypes(factors: Factors, dtypes: Sequence[Dtype]) -> Factors:
    """Factors Q and P in dtypes, one for each factor; L keeps its own."""
    q, p = (tuple(map(cast, xs, dtypes)) for xs in (factors.Q, factors.P))
    return factors._replace(Q=q, P=p)


def precondition(recipe: Recipe, factors: Factors, g: Array) -> Array:
    """P g of a g in the parameter's shape; the result is in the shape that the preconditioner sees."""
    work = in_dtypes(factors, [g.dtype] * len(factors.Q))
    with products(recipe.apply_precision):
        return recipe.preconditioner.precondition(work, laid_out(recipe, g))


def direct(
    recipe: Recipe,
    plan: Plan,
    factors: Factors,
    average: Array,
    units: tuple[Array, Array, Array] | None = None,
) -> Array:
    """The third stage: the direction u = gain clip(P m) of a parameter, from its averaged gradient m, in its shape.

    units: the average's `in_units`, where that is known already.
    """
    g, unit, _ = in_units(average, scale_of(recipe, plan)) if units is None else units
    u = recipe.clip(precondition(recipe, factors, g), recipe.gain, unit)
    return laid_back(recipe, u, tuple(average.shape))


def average(averaging: Averaging, g: Array, m: Array | None) -> tuple[Array | None, Array]:
    """The momentum, m <- past m + (1 - past) g, written over the old one, and what the step uses of it: m, or
    keep m + fresh g; see `Averaging`, whose scale is left out. Without a momentum (m None): None and g.
    """
    if m is None:
        return None, g
    past = number(averaging.past, g)
    m = plus(times(m, past), 1 - past, g, donate=True)
    if averaging.blend is None:
        return m, m
    keep, fresh = (number(x, g) for x in averaging.blend)
    return m, plus(keep * m, fresh, g, donate=True)


def displacement(p: Array, u: Array, lr: Number, weight_decay: Number) -> Array:
    """-lr (u + weight_decay p): what a step adds to a parameter p, in its shape and dtype. PyTorch may write over u."""
    xp = namespace(p)
    u = cast(u, xp.result_type(u.dtype, p.dtype))  # a large u may leave the range of p, where lr u does not
    lr = number(lr, u)
    change = times(u, -lr)
    if not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
        change = plus(change, -lr * number(weight_decay, u), cast(p, u.dtype), donate=True)
    return cast(change, p.dtype)
