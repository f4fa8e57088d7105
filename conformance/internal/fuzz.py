"""Hostile gradients: every method on streams of all kinds, in both frameworks, in float32 and in bfloat16.

    python -m conformance.internal.fuzz [--steps N] [--framework torch|jax] [--dtype NAME] [--method NAME ...]
                               [--json FILE] [--markdown]

The first half of a stream is hostile, the second half is standard normal. What is looked at is the direction of each
step, which is what moves a parameter times the learning rate. A row fails where a direction or a number of state is
not finite, where the method has a bound and passes it, and where at the end it neither moves again nor is on its way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib import import_module
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from conformance import terminal
from conformance.internal.soak import conclude, settings
from conformance.terminal import Sheet, console, exits, verdict, writable
from psgd.hyperparameters import Method
from psgd.methods import METHODS

SHAPE = (4, 3)
STEPS = 2000
AGAIN = 1e-3  # RMS of the last directions of a stream of `STEPS`, at least, or twice what it was at its lowest before
BOUND = 100.0  # RMS of any direction at most, of a method with bounds: AdamW moves by 3 after a jump
Draw = Callable[[np.random.Generator, int], np.ndarray]  # of n gradients


# ---- what the gradients are -------------------------------------------------------------------
def normal(random: np.random.Generator, n: int) -> np.ndarray:
    return random.standard_normal((n, *SHAPE))


def sizes(choose: Callable[[np.random.Generator, np.ndarray], np.ndarray]) -> Draw:
    """Standard normal, clipped so that no number leaves float32, times a size that is a function of the step."""

    def draw(random: np.random.Generator, n: int) -> np.ndarray:
        factors = choose(random, np.arange(n)).astype(np.float64)
        return np.clip(normal(random, n), -3, 3) * factors[:, None, None]

    return draw


def always(size: float) -> Draw:
    return sizes(lambda _, t: np.full(len(t), size))


def then(first: float, second: float) -> Draw:
    """One size, from the middle on another."""
    return sizes(lambda _, t: np.where(t < len(t) / 2, first, second))


def once(size: float, at: Callable[[np.ndarray], np.ndarray]) -> Draw:
    """Another size at some steps."""
    return sizes(lambda _, t: np.where(at(t), size, 1.0))


def constant(random: np.random.Generator, n: int) -> np.ndarray:
    return np.broadcast_to(normal(random, 1), (n, *SHAPE)).copy()


def of_rank_one(random: np.random.Generator, n: int) -> np.ndarray:
    return normal(random, n)[:, :, :1] * normal(random, n)[:, :1, :]


def rows_by_lot(random: np.random.Generator, n: int) -> np.ndarray:
    here = random.integers(SHAPE[0], size=n)[:, None, None] == np.arange(SHAPE[0])[:, None]
    return np.where(here, normal(random, n), 0.0)


def one_entry(random: np.random.Generator, n: int) -> np.ndarray:
    g = np.zeros((n, *SHAPE))
    g[:, 0, 0] = random.standard_normal(n)
    return g


def heavy_tailed(random: np.random.Generator, n: int) -> np.ndarray:
    return random.standard_cauchy((n, *SHAPE))


def unlike_entries(random: np.random.Generator, n: int) -> np.ndarray:
    return normal(random, n) * np.logspace(-12, 12, SHAPE[0] * SHAPE[1]).reshape(SHAPE)


def signs(random: np.random.Generator, n: int) -> np.ndarray:
    return constant(random, n) * np.where(np.arange(n) % 2, -1.0, 1.0)[:, None, None]


def broken_now_and_then(random: np.random.Generator, n: int) -> np.ndarray:
    g = normal(random, n)
    g[3::7, 0, 0], g[5::11, 1, 1] = np.nan, np.inf
    return g


STREAMS: dict[str, Draw] = {
    "normal": normal,
    "flat first step": once(0.0, lambda t: t == 0),
    "flat for half of the time": always(0.0),
    "flat every other step": once(0.0, lambda t: t % 2 == 1),
    "first one 1e4 too small": once(1e-4, lambda t: t == 0),
    "first one 1e4 too large": once(1e4, lambda t: t == 0),
    "first one subnormal": once(1e-40, lambda t: t == 0),
    "first one of 1e-30": once(1e-30, lambda t: t == 0),
    "jump by 1e10": then(1.0, 1e10),
    "fall by 1e10": then(1.0, 1e-10),
    "spikes of 1e20": once(1e20, lambda t: t % 10 == 5),
    "1e25": always(1e25),
    "1e37": always(1e37),
    "1e-20": always(1e-20),
    "1e-37, then 1e37": then(1e-37, 1e37),
    "flat, then 1e30": then(0.0, 1e30),
    "any size": sizes(lambda random, t: 10.0 ** random.uniform(-37, 37, len(t))),
    "constant": constant,
    "rank one": of_rank_one,
    "rows by lot": rows_by_lot,
    "heavy tails": heavy_tailed,
    "entries 1e24 apart": unlike_entries,
    "signs": signs,
    "broken now and then": broken_now_and_then,
}


def drawn(stream: str, steps: int) -> np.ndarray:
    """A stream of gradients, the same for all methods."""
    random = np.random.default_rng([*stream.encode()])
    hostile = STREAMS[stream](random, steps // 2)
    return np.concatenate([hostile, normal(random, steps - len(hostile))])


# ---- who runs on them -------------------------------------------------------------------------
@dataclass(frozen=True)
class FuzzCase:
    """A method with its defaults, or with the option that bounds a whole step where its tensors have no bound."""

    method: str
    bound: str | None = None

    @property
    def title(self) -> str:
        return self.method + (f", {self.bound}" if self.bound else "")

    def configured(self) -> Method:
        return settings(METHODS[self.method], lr=1.0, **({self.bound: 1.0} if self.bound else {}))

    def limit(self) -> float:
        """What the RMS of a direction may not pass."""
        clipped = self.bound is not None or self.configured().recipe().clip.rms < inf
        return BOUND if clipped else inf


def cases() -> list[FuzzCase]:
    """Every method; those without bounds with the option that gives them one, too."""
    found = []
    for name, kind in METHODS.items():
        names = {f.name for f in fields(kind)} & {"grad_clip_max_norm", "update_global_norm_clip"}
        found += [FuzzCase(name), *(FuzzCase(name, bound) for bound in sorted(names))]
    return found


@dataclass(frozen=True)
class Directions:
    """The RMS of the direction of each step, and whether all state was finite in the end."""

    lengths: np.ndarray
    finite: bool


def run_torch(case: FuzzCase, dtype: str, gradients: np.ndarray, vectors: np.ndarray) -> Directions:
    """Directions of a `torch.optim.Optimizer`."""
    torch: Any = import_module("torch")
    configured, kind = case.configured(), METHODS[case.method]
    p = torch.nn.Parameter(torch.zeros(SHAPE, dtype=getattr(torch, dtype)))
    options = {f.name: getattr(configured, f.name) for f in fields(configured)}
    optimizer = getattr(import_module("psgd_torch_backend"), kind.title)([p], **options, max_skips=len(gradients))
    lengths = []
    for g, v in zip(torch.tensor(gradients).to(p.dtype), torch.tensor(vectors).to(p.dtype), strict=True):
        p.grad = g
        pair = {"Hvp": [g], "vector": [v], "update_preconditioner": True} if configured.recipe().newton else {}
        optimizer.step(**pair)
        lengths.append(p.detach().double().square().mean().sqrt().item())
        p.detach().zero_()
    state = [x for x in _tensors(optimizer.state[p]) if torch.is_tensor(x)]
    return Directions(np.array(lengths), all(bool(x.isfinite().all()) for x in state))


def _tensors(entry: Any) -> list[Any]:
    return [x for value in entry.values() for x in _tensors(value)] if isinstance(entry, dict) else [entry]


def run_jax(case: FuzzCase, dtype: str, gradients: np.ndarray, vectors: np.ndarray) -> Directions:
    """Directions of an optax transformation, in a scan."""
    jnp: Any = import_module("jax.numpy")
    lengths, finite = _scanned(case)(*(jnp.asarray(x, dtype) for x in (gradients, vectors)))
    return Directions(np.asarray(lengths, np.float64), bool(finite))


@cache
def _scanned(case: FuzzCase) -> Callable[..., Any]:
    jax: Any = import_module("jax")
    configured, jnp = case.configured(), jax.numpy
    tx = import_module("psgd_jax_backend").scale_by_psgd(configured)

    @jax.jit
    def run(gradients: Any, vectors: Any) -> Any:
        def step(state: Any, drawn: Any) -> Any:
            g, v = drawn
            pair = {"Hvp": g, "vector": v, "update_preconditioner": True} if configured.recipe().newton else {}
            u, state = tx.update(g, state, jnp.zeros_like(g), **pair)
            most = jnp.max(jnp.abs(u.astype(jnp.float32)))
            unit = jnp.where(most > 0, most, 1)
            return state, unit * jnp.sqrt(jnp.mean((u.astype(jnp.float32) / unit) ** 2))

        state, lengths = jax.lax.scan(step, tx.init(gradients[0]), (gradients, vectors))
        numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        return lengths, jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()

    return run


RUNNERS = {"torch": run_torch, "jax": run_jax}
DTYPES = ("float32", "bfloat16")


# ---- what was seen ----------------------------------------------------------------------------
@dataclass(frozen=True)
class FuzzResult:
    """One stream. largest, last: RMS of the directions, in learning rates."""

    framework: str
    method: str
    dtype: str
    stream: str
    largest: float
    last: float
    complaints: list[str]


def judged(framework: str, case: FuzzCase, dtype: str, stream: str, steps: int) -> FuzzResult:
    """A stream, run and judged."""
    gradients = drawn(stream, steps)
    vectors = np.random.default_rng(1).standard_normal(gradients.shape)
    directions = RUNNERS[framework](case, dtype, gradients, vectors)
    lengths = directions.lengths
    window = max(steps // 20, 1)
    largest, last = float(np.max(lengths)), float(np.median(lengths[-window:]))
    lowest = min(float(np.median(part)) for part in np.array_split(lengths[steps // 2 :], 10))
    found = [
        ("a direction is not finite", not np.isfinite(lengths).all()),
        ("state is not finite", not directions.finite),
        (f"moves by more than {BOUND:g}", largest > case.limit()),
        ("does not move again", steps >= STEPS and not (last >= AGAIN or last > 2 * lowest > 0)),
    ]
    return FuzzResult(framework, case.title, dtype, stream, largest, last, [words for words, bad in found if bad])


# ---- telling ----------------------------------------------------------------------------------
HEAD = ("framework", "dtype", "method", "streams", "steps", "largest", "last", "verdict")


def summarised(rows: Sequence[FuzzResult], steps: int) -> list[str]:
    """All streams of a method in a framework and a dtype, as one line but for its verdict."""
    largest = max(rows, key=lambda row: row.largest)
    last = [row.last for row in rows]
    first = rows[0]
    spread = f"{min(last):.2g} to {max(last):.2g}"
    return [first.framework, first.dtype, first.method, str(len(rows)), f"{steps:,}", f"{largest.largest:.2g}", spread]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, report, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.internal.fuzz", description="Is any gradient too hostile?"
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="length of a stream")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was seen here too")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/soak.md has it")
    parser.add_argument("--framework", action="append", choices=RUNNERS, help="this one alone; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="this one alone; may be repeated")
    parser.add_argument("--method", action="append", choices=METHODS, help="this one alone; may be repeated")
    options = parser.parse_args(arguments)
    with exits():
        writable(options.json)
    found, lines, progress = list[FuzzResult](), list[list[str]](), console(stderr=True)
    chosen = [c for c in cases() if c.method in (options.method or METHODS)]
    for framework in options.framework or RUNNERS:
        for dtype in options.dtype or DTYPES:
            for case in chosen:
                start = perf_counter()
                rows = list(map(partial(judged, framework, case, dtype, steps=options.steps), STREAMS))
                found += rows
                bad = [f"{row.stream}: {'; '.join(row.complaints)}" for row in rows if row.complaints]
                lines.append([*summarised(rows, options.steps), "FAIL: " + ", ".join(bad) if bad else "pass"])
                progress.print(f"{' '.join(lines[-1])}: {perf_counter() - start:.0f} s", markup=False)
    if options.markdown:
        console().print(terminal.markdown([HEAD, *lines]), markup=False, soft_wrap=True)
    else:
        sheet = Sheet(HEAD[:3], HEAD[3:])
        for line in lines:
            sheet.add_row(*line[:-1], verdict(line[-1] == "pass"))
        console().print(sheet)
    conclude(found, options.json)


if __name__ == "__main__":
    main()
