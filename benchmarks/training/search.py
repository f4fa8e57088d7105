"""Learning rates are tried half a decade apart: 10^(k/2), k a whole number. Which are tried, and which is the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf, log10
from typing import Protocol, TypeVar

GOOD, NEAR = 1.05, 1.10  # of the best loss: what still counts as good, and how far rates are tried outward
LOWEST, HIGHEST = -12, 2  # k of the rates that an outward search tries
Key = TypeVar("Key")


def rate(k: int) -> float:
    """10^(k/2)."""
    return 10 ** (k / 2)


def nearest(lr: float) -> int:
    """The k of the nearest rate."""
    return round(2 * log10(lr))


def best(losses: Mapping[Key, float]) -> Key:
    """Where the loss is least."""
    return min(losses, key=losses.__getitem__)


def good(losses: Mapping[int, float]) -> list[int]:
    """The unbroken range around the best that is nearly as good."""
    low = high = best(losses)
    while losses.get(low - 1, inf) <= GOOD * losses[best(losses)]:
        low -= 1
    while losses.get(high + 1, inf) <= GOOD * losses[best(losses)]:
        high += 1
    return [low, high]


class Further(Protocol):
    """How a search goes on."""

    def further(self, losses: Mapping[int, float]) -> int | None:
        """The next k, after these losses by k; None where the search ends."""


@dataclass(frozen=True)
class EdgeSearch:
    """Those k that everyone tries, and how many more, one at a time, while the best is at an edge.

    finals: how many of the best are run in full.
    """

    begun: tuple[int, ...] = (-6, -5, -4, -3)
    more: int = 2
    finals: int = 2

    def further(self, losses: Mapping[int, float]) -> int | None:
        """Beyond the edge at which the best is."""
        k = best(losses)
        if len(losses) == len(self.begun) + self.more or min(losses) < k < max(losses):
            return None
        return k + 1 if k == max(losses) else k - 1


@dataclass(frozen=True)
class OutwardSearch:
    """Outward on both sides until losses are no longer near the best, or `tried` rates are tried."""

    tried: int = 16

    def further(self, losses: Mapping[int, float]) -> int | None:
        """Beyond an edge that is near the best, the lower edge first."""
        if len(losses) >= self.tried:
            return None
        edges = {min(losses): min(losses) - 1, max(losses): max(losses) + 1}
        bound = NEAR * min(losses.values())
        return next((k for edge, k in edges.items() if losses[edge] <= bound and LOWEST <= k <= HIGHEST), None)


def searched(loss: Callable[[int], float], begun: Iterable[int], search: Further) -> dict[int, float]:
    """Losses by k: of those that are begun with, and then of one after the other that the search asks for."""
    losses = {k: loss(k) for k in begun}
    while (k := search.further(losses)) is not None:
        losses[k] = loss(k)
    return dict(sorted(losses.items()))
