"""What a method is made of: a point of one grid of rules, the numbers that go with it, and what is kept of a tensor.

Every published PSGD optimizer is such a point. A `Recipe` names the rule on each axis of the grid that shapes the
computation; a `Schedule` holds when and how much; a `Plan` is what a schedule comes to at one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from types import ModuleType
from typing import Any, NamedTuple

from psgd import criterion
from psgd.arrays import Array, Factors, Number
from psgd.preconditioner import Preconditioner
from psgd.scaling import Clip, InitialScale
from psgd.schedule import Averaging, When, always, never
from psgd.shapes import Shape, as_is, in_order


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step computes: the rule on each axis of the grid. Static and hashable; one compiled step for each.

    Args:
        preconditioner: the factors, and how they move.
        joint: one preconditioner of all parameters as one vector, rather than one of each.
        newton: fit to Hessian-vector products; whitening methods may be given some too.
        order: shape of a parameter -> order of its axes in the preconditioned tensor.
        layout: shape of a parameter -> shape of its preconditioned tensor.
        momentum: is there a momentum buffer?
        whiten: fit to the "gradient" or to the "momentum".
        damping: rule that adds noise to what is fitted.
        fit_first: fit before preconditioning, or after.
        balance_last: balance the factors after the fit, or before.
        initial_scale: rule of the first scale of Q.
        clip: bounds on the direction of a tensor.
        gain: factor of the direction.
        has_max_norm: is the length of a whole step bounded, over all tensors (`Schedule.max_norm`)?
        decoupled: weight decay acts on the parameter, rather than being added to the gradient.
        dtype: name of the dtype of all state and work; None is the parameter's.
        widens_half: half precisions work in float32.
        momentum_dtype: name of the dtype in which the momentum is kept; None is the parameter's.
        factor_dtype: name of the dtype in which the factors are kept; None is the work's.
        fit_precision: of the matrix products that fit the factors (`psgd._xp.products`).
        apply_precision: of the matrix products that apply them.
    """

    preconditioner: Preconditioner
    joint: bool = False
    newton: bool = False
    order: Callable[[Shape], Shape] = in_order
    layout: Callable[[Shape], Shape] = as_is
    momentum: bool = True
    whiten: str = "gradient"
    damping: criterion.Damping = criterion.relative
    fit_first: bool = True
    balance_last: bool = True
    initial_scale: InitialScale = InitialScale()
    clip: Clip = Clip()
    gain: float = 1.0
    has_max_norm: bool = False
    decoupled: bool = True
    dtype: str | None = None
    widens_half: bool = False
    momentum_dtype: str | None = None
    factor_dtype: str | None = None
    fit_precision: str | None = None
    apply_precision: str | None = None

    @property
    def keeps_p(self) -> bool:
        """Is P kept between steps beside the factors that are fitted?"""
        return self.preconditioner.keeps_p


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When and how much: the numbers of a method, and its rules in time.

    Args:
        averaging: (xp, step, beta) -> how a gradient enters the momentum.
        momentum: beta of `averaging`.
        rate: (xp, step) -> mu, the preconditioner's learning rate.
        beta_lipschitz: beta_L, the weight of the past in the Lipschitz estimates L; 0 keeps none.
        damping: lambda, the size of the noise that is added to what is fitted.
        fit: the steps at which factors are fitted.
        balance: the steps at which a fit also balances the factors.
        side: the steps at which the first of two sides moves, where a preconditioner moves one at a time.
        counts: does `fit` ask for `StepInfo.since`, an integer of state beside the number of steps?
        max_norm: largest length of a whole step, over all tensors.
        seed: of the noise.
    """

    averaging: Callable[[ModuleType, Number, Number], Averaging]
    momentum: Number
    rate: Callable[[ModuleType, Number], Number]
    beta_lipschitz: Number
    damping: Number
    fit: When = always
    balance: When = never
    side: When = never
    counts: bool = False
    max_norm: Number = inf
    seed: int = 0


class Plan(NamedTuple):
    """The scalars and decisions of one step: the values of a `Schedule` at it, and the key of its noise, (1,) int32.

    fit, balance and side are booleans, all numbers Python's or 0-d arrays, and so is the key on the host.
    """

    fit: Any
    balance: Any
    side: Any
    momentum: Averaging
    rate: Number
    beta_lipschitz: Number
    damping: Number
    key: Any


class State(NamedTuple):
    """What is kept of one tensor between steps. momentum: in the parameter's shape, or None."""

    momentum: Array | None
    factors: Factors


def leaves(state: State) -> list[Array]:
    """All arrays of a state, in a fixed order."""
    momentum = [] if state.momentum is None else [state.momentum]
    return [*momentum, *(x for arrays in state.factors for x in arrays)]


def rebuilt(state: State, arrays: Sequence[Array]) -> State:
    """A state of the structure of `state` from its leaves."""
    remaining = iter(arrays)
    momentum = None if state.momentum is None else next(remaining)
    return State(momentum, Factors(*(tuple(next(remaining) for _ in arrays) for arrays in state.factors)))
