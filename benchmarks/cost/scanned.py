"""What scanned layers save: compile time against depth, and the memory of an update against the batch it is mapped in.

    python -m benchmarks.cost.scanned [--json FILE] [--markdown] [--quick]

One leaf stacks all layers, each a square matrix. Compile times are of `jax.jit`, with nothing cached; depths are
compiled in alternated rounds and a ratio is the median over rounds. Memory is what the compiled update allocates
beside its arguments and results, as the compiler itself reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import jax
import numpy as np
from rich.console import Console

import psgd_jax_backend
from benchmarks.layers import LAYERWISE
from benchmarks.tables import Cells, machine, one_table

DEPTHS = (6, 12, 24, 48)
BATCHES = (None, 8, 4, 1)


def compiled(name: str, layers: int, size: int, batch: int | None = None) -> Any:
    """The compiled update of one leaf of `layers` layers. batch: of `jax.lax.map`; None maps them all at once."""
    mapping = {} if batch is None else {"lax_map_scanned_layers": True, "lax_map_batch_size": batch}
    tx = getattr(psgd_jax_backend, name)(scanned_layers=True, **mapping)
    leaf = jax.ShapeDtypeStruct((layers, size, size), np.float32)
    state = jax.eval_shape(tx.init, leaf)
    return jax.jit(lambda g, state: tx.update(g, state, g)).lower(leaf, state).compile()


def compile_seconds(name: str, depths: Sequence[int], size: int, rounds: int) -> np.ndarray:
    """Seconds of each depth, (rounds, depths)."""
    seconds = np.zeros((rounds, len(depths)))
    for i in range(rounds):
        for j, depth in enumerate(depths):
            jax.clear_caches()
            start = perf_counter()
            compiled(name, depth, size)
            seconds[i, j] = perf_counter() - start
    return seconds


def peak_bytes(name: str, layers: int, size: int, batch: int | None) -> int:
    """Bytes that the update allocates beside its arguments and results."""
    return int(compiled(name, layers, size, batch).memory_analysis().temp_size_in_bytes)


def measure(console: Console, *, quick: bool) -> dict[str, Any]:
    """All figures, as plain data."""
    depths, layers, size, rounds = (DEPTHS[:2], 4, 8, 1) if quick else (DEPTHS, 24, 128, 5)
    batches = BATCHES[-2:] if quick else BATCHES
    rows = []
    for name in LAYERWISE:
        console.log(f"{name}: scanned layers")
        seconds = compile_seconds(name, depths, size, rounds)
        times = {str(d): float(s) for d, s in zip(depths, np.median(seconds, axis=0), strict=True)}
        ratio = float(np.median(seconds[:, -2] / seconds[:, 0]))
        peak = {str(b or "all"): peak_bytes(name, layers, size, b) for b in batches}
        rows.append({"method": name, "compile": times, "ratio": ratio, "bytes": peak})
    return {"machine": machine(), "depths": depths[-2:-1] + depths[:1], "layers": layers, "size": size, "rows": rows}


def cells(result: dict[str, Any]) -> Cells:
    """A row for each method."""
    rows = result["rows"]
    deep, shallow = result["depths"]
    head = [
        "method",
        *(f"{d} layers" for d in rows[0]["compile"]),
        f"{deep} to {shallow}",
        *(f"{b} at a time" for b in rows[0]["bytes"]),
    ]
    return [head] + [
        [
            r["method"],
            *(f"{s:.2f} s" for s in r["compile"].values()),
            f"{r['ratio']:.2f}",
            *(f"{b / 2**20:.1f} MiB" for b in r["bytes"].values()),
        ]
        for r in rows
    ]


def titled(result: dict[str, Any]) -> str:
    """What the table shows."""
    return (
        f"Compiling an update of stacked {result['size']} x {result['size']} layers, and the memory of one of "
        f"{result['layers']} layers by how many are mapped at a time"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    one_table("scanned", "What scanned layers save.", measure, lambda r: (titled(r), cells(r)), 130, arguments)


if __name__ == "__main__":
    main()
