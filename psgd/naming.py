"""What a name that is not known was meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

CUTOFF = 0.75  # of difflib's ratio: one letter of four may be off


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is spelt most alike, whatever its case; None where none is near."""
    folded = {k.casefold().replace("-", "_"): k for k in known}
    close = get_close_matches(name.casefold().replace("-", "_"), folded, n=1, cutoff=CUTOFF)
    return folded[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What an error about an unknown name adds: "; did you mean 'kron'?", or nothing where nothing is near."""
    close = nearest(name, known)
    return "" if close is None else f"; did you mean {close!r}?"
