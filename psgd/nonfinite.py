"""What is done about gradients that are not finite: the policies, what is said, and the one look."""

from __future__ import annotations

from collections.abc import Sequence

from psgd._xp import namespace
from psgd.arrays import Array

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
