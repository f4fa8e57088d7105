"""What a fit of the whole inverse Hessian costs, with its terms held by thin factors and with them formed.

    python -m benchmarks.cost.vector [--json FILE] [--markdown] [--quick]

All parameters are one vector of n numbers to such a method, so that T1 and T2 have rank one. A fit is timed by
processor time, in PyTorch, both variants in alternated rounds; the ratio is the median over rounds of its ratio in the
same round. Geometries with a rotation multiply whole matrices in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from time import process_time
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.racing import turns
from benchmarks.tables import Cells, machine, one_table
from psgd import kron, noise
from psgd import thin as low
from psgd.arrays import Factors
from psgd.criterion import Pair
from psgd.geometry import GEOMETRIES, Geometry
from psgd.kron import DenseRule
from psgd.spectral import TraceBound

LENGTHS, ROUNDS = (500, 1000, 2000, 4000), 3


@contextmanager
def terms_formed() -> Iterator[None]:
    """No axis counts as long, while the context lasts."""
    known = low.is_thin
    low.is_thin = lambda shape, axis: False
    try:
        yield
    finally:
        low.is_thin = known


def thin(fit: Callable[[], Factors]) -> None:
    """A fit as it is."""
    fit()


def formed(fit: Callable[[], Factors]) -> None:
    """A fit with T1 and T2 formed."""
    with terms_formed():
        fit()


VARIANTS = {"thin": thin, "formed": formed}


def fit_of(geometry: Geometry, n: int) -> Callable[[], Factors]:
    """A fit of a vector to a Newton pair."""
    v, h = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    factors = kron.init(DenseRule(max_skew=inf)((n,)), h)
    draws = noise.Counter(torch.ones(1, dtype=torch.int32))
    return partial(kron.fit, geometry, TraceBound(), factors, Pair(h, v), 0.1, 0.9, draws)


def seconds(variant: Callable[[Callable[[], Factors]], None], fit: Callable[[], Factors]) -> float:
    """Processor time of a fit."""
    start = process_time()
    variant(fit)
    return process_time() - start


def row(name: str, n: int, rounds: int) -> dict[str, Any]:
    """The figures of one geometry at one length."""
    fit = fit_of(GEOMETRIES[name], n)
    for variant in VARIANTS.values():
        variant(fit)
    seen: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for i in range(rounds):
        for variant in turns(list(VARIANTS), i):
            seen[variant].append(seconds(VARIANTS[variant], fit))
    ratios = np.divide(seen["thin"], seen["formed"])
    return {
        "geometry": name,
        "rotates": GEOMETRIES[name].turn is not None,
        "n": n,
        **{f"{variant}_ms": float(1e3 * np.median(x)) for variant, x in seen.items()},
        "ratio": float(np.median(ratios)),
    }


def measure(console: Console, *, quick: bool) -> dict[str, Any]:
    """All figures, as plain data."""
    lengths, rounds = ((8, 16), 1) if quick else (LENGTHS, ROUNDS)
    rows = []
    for name in GEOMETRIES:
        for n in lengths:
            # One length says what a rotation costs: many sweeps of products of whole matrices.
            if GEOMETRIES[name].turn is None or n == lengths[1]:
                console.log(f"{name}, {n}")
                rows.append(row(name, n, rounds))
    return {"machine": machine(), "rows": rows}


def cells(result: Mapping[str, Any]) -> Cells:
    """A row for each geometry and length."""
    head = ["geometry", "n", "terms formed", "thin", "ratio"]
    return [head, *(_line(r) for r in result["rows"])]


def _line(r: Mapping[str, Any]) -> Sequence[str]:
    name = r["geometry"] + (" (rotates)" if r["rotates"] else "")
    return name, f"{r['n']:,}", f"{r['formed_ms']:.1f} ms", f"{r['thin_ms']:.1f} ms", f"{r['ratio']:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    one_table(
        "vector", "Time a fit of one vector.", measure, lambda r: ("A fit of one vector", cells(r)), 80, arguments
    )


if __name__ == "__main__":
    main()
