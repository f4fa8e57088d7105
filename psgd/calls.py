"""How calls in the forms of the published packages are read and checked, alike in both frameworks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from operator import index
from typing import Any, TypeVar

from psgd.naming import shown
from psgd.nonfinite import POLICIES

Helper = TypeVar("Helper", bound=Callable[..., Any])


def is_count(value: object) -> bool:
    """Is a value a Python integer above 0?"""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def checked_policy(owner: str, nonfinite: object, max_skips: object) -> None:
    """Raise ValueError if `nonfinite` is no policy or `max_skips` no whole number above 0."""
    if not isinstance(nonfinite, str) or nonfinite not in POLICIES:
        raise ValueError(f"{owner}: nonfinite={shown(nonfinite)} must be one of {', '.join(map(repr, POLICIES))}")
    if not is_count(max_skips):
        raise ValueError(f"{owner}: max_skips={shown(max_skips)} must be a whole number above 0")


def is_step(value: Any) -> bool:
    """Can a value be the number of a step: None, a whole number from 0, or a 0-d array of integers, traced or not?"""
    if value is None or isinstance(value, bool):
        return value is None
    if hasattr(value, "dtype"):
        return value.shape == () and "int" in str(value.dtype)
    try:
        return index(value) >= 0
    except TypeError:
        return False


def step_may_come_second(helper: Helper) -> Helper:
    """A helper of (key, loss_fn, ...) that also takes (key, train_step, loss_fn, ...), as psgd_jax 0.2.9 has it.

    A second argument that is not callable is the step. A step or loss_fn of another kind is a TypeError, before
    anything is computed.
    """
    name, orders = helper.__name__, "(key, loss_fn, params, ...) or (key, train_step, loss_fn, params, ...)"

    @wraps(helper)
    def either_order(key: Any, *args: Any, **named: Any) -> Any:
        if args and not callable(args[0]):
            if "train_step" in named:
                raise TypeError(f"{name}: train_step is given twice, as {args[0]!r} and by its name; leave one out")
            named, args = {"train_step": args[0], **named}, args[1:]
        step, loss_fn = named.get("train_step"), args[0] if args else named.get("loss_fn")
        if not (is_step(step) and callable(loss_fn)):
            wrong = (
                ("loss_fn", loss_fn, "a function") if is_step(step) else ("train_step", step, "a whole number, from 0")
            )
            what, value, wanted = wrong
            shown = repr(value) if isinstance(value, (int, float, str)) else f"of type {type(value).__name__}"
            raise TypeError(f"{name}: {what} is {shown} and must be {wanted}; give {orders}")
        return helper(key, *args, **named)

    return either_order  # type: ignore[return-value]


def by_name(
    owner: str, positions: Sequence[str], args: Sequence[object], keywords: dict[str, Any], why: str = ""
) -> dict[str, Any]:
    """All arguments of a call by their names.

    Args:
        owner: who is called, for errors.
        positions: the names of the positional arguments, in order.
        args: the arguments by position.
        keywords: the arguments by name.
        why: the reason why there are no more positions, for the error.

    Raises:
        TypeError: for more positions than there are, or an argument by position and by name.
    """
    if len(args) > len(positions):
        order = f"{', '.join(positions)} by position and the others by name" if positions else "arguments by name alone"
        raise TypeError(f"{owner} takes {order}{why}; name {shown(args[len(positions)])} and what follows it")
    by_position = dict(zip(positions, args, strict=False))
    repeated = [name for name in by_position if name in keywords]
    if repeated:
        raise TypeError(f"{owner}: {repeated[0]} is given twice, by position and by name; leave one out")
    return by_position | keywords
