"""What is done about gradients that are not finite: the policies, how skipped steps are counted, what is said."""

from __future__ import annotations

from collections.abc import Sequence

from psgd._xp import namespace
from psgd.arrays import Array, Number

POLICIES = ("skip", "raise", "propagate")  # of a step whose gradients hold a NaN or an infinity
MAX_SKIPS = 10  # in a row, by default; a bad batch now and then is skipped, but a run with ten of them is lost


def not_finite(owner: str, name: str) -> str:
    """The error text of the policy "raise": the gradient of the parameter `name` is not finite."""
    return (
        f"{owner}: the gradient of {name} holds a NaN or an infinity; see how the loss came to it, or give "
        'nonfinite="skip" to leave such steps out'
    )


def too_many(count: int, name: str = "") -> str:
    """The error text after `count` skipped steps in a row, the last for the gradient of the parameter `name`."""
    which = f", this one of {name}" if name else ""
    return (
        f"{count} steps in a row had a gradient that is not finite{which}; lower the learning rate, or go back to a "
        "checkpoint"
    )


def counted(total: Number, in_a_row: Number, skipped: Number) -> tuple[Number, Number]:
    """The numbers of skipped steps, in all and in a row, after one more step. skipped: 1 if it was skipped, else 0."""
    return total + skipped, (in_a_row + 1) * skipped


def all_finite(arrays: Sequence[Array]) -> Array:
    """Is every entry of every array finite? A 0-d boolean, of at least one array."""
    xp = namespace(arrays[0])
    return xp.all(xp.stack([xp.all(xp.isfinite(x)) for x in arrays]))
