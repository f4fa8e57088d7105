"""What the preconditioners are good for: a curved valley, and Hessians to fit, in every geometry and both frameworks.

    python -m benchmarks.training.experiments [--json FILE] [--picture FILE.png] [--markdown] [--quick]

The valley is Rosenbrock's function in 100 dimensions, walked by the method that fits one matrix to all parameters. Its
noise is a function of seed, step and name, so that both frameworks walk one trajectory until rounding parts them. The
Hessians are fitted from pairs (v, h) that are drawn once and shown to every geometry in both frameworks, and to BFGS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from rich.console import Console

from benchmarks.tables import machine, tables_and_picture
from benchmarks.training.experiments_figures import BFGS, picture, tables
from benchmarks.training.valley import (
    MEMORY,
    QUICK,
    Setup,
    valley,
)
from psgd import criterion, noise
from psgd._xp import identity, namespace
from psgd.arrays import Array, Factors
from psgd.geometry import GEOMETRIES
from psgd.kron import DenseRule, Kronecker
from psgd.spectral import TraceBound


# ---- Hessians to fit -------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Panel:
    """Pairs to fit, (steps, n) each, and the Hessians H' that errors are taken with.

    rate: of the fits. marks: the steps after which errors are taken; hessians: H' there, (marks, n, n). reported: those
    that the table has.
    """

    title: str
    rate: float
    vs: np.ndarray
    hs: np.ndarray
    marks: np.ndarray
    hessians: np.ndarray
    reported: tuple[int, ...]

    def until(self, step: int) -> Panel:
        """Its beginning."""
        n = int((self.marks <= step).sum())
        return Panel(
            self.title, self.rate, self.vs[:step], self.hs[:step], self.marks[:n], self.hessians[:n], self.reported
        )


def marked(steps: int, count: int, reported: Sequence[int]) -> np.ndarray:
    """Steps at even distances on a log axis, among them those that are reported and the last."""
    even = np.round(np.geomspace(1, steps, count)).astype(int)
    return np.unique([*even, *(t for t in reported if t <= steps), steps])


def fixed(title: str, rate: float, eps: float, setup: Setup) -> Panel:
    """H with 1 on the diagonal and 0.5 beside it, seen with noise: H' = (H^2 + eps^2 I)^(1/2)."""
    n, steps, random = setup.size, setup.fits, np.random.default_rng(0)
    h = np.eye(n) + (np.eye(n, k=1) + np.eye(n, k=-1)) / 2
    values, vectors = np.linalg.eigh(h)
    perturbed = vectors * np.sqrt(values**2 + eps**2) @ vectors.T
    vs, ns = random.standard_normal((2, steps, n))
    reported = (1_000, 3_000, 10_000, 30_000)
    marks = marked(steps, setup.marks, reported)
    return Panel(title, rate, vs, vs @ h + eps * ns, marks, np.broadcast_to(perturbed, (len(marks), n, n)), reported)


def drifting(title: str, rate: float, setup: Setup) -> Panel:
    """H begins as ones / 4 and grows by u u' at each step, u ~ U(0, 1)^n."""
    n, steps, random = setup.size, setup.drifts, np.random.default_rng(0)
    us, vs = random.uniform(size=(steps, n)), random.standard_normal((steps, n))
    reported = (100, 1_000, 10_000)
    marks, h = marked(steps, setup.marks, reported), np.full((n, n), 0.25)
    hs, hessians = np.zeros((steps, n)), []
    for t, (u, v) in enumerate(zip(us, vs, strict=True), start=1):
        h = h + np.outer(u, u)
        hs[t - 1] = h @ v
        if t in marks:
            hessians.append(h)
    return Panel(title, rate, vs, hs, marks, np.stack(hessians), reported)


def panels(setup: Setup) -> list[Panel]:
    """Clean, noisy and drifting."""
    return [
        fixed("Clean", 0.5, 0.0, setup),
        fixed("Noisy, ε = 0.01", 0.1, 0.01, setup),
        drifting("Drifting", 1.0, setup),
    ]


class Learner(Protocol):
    """What fits P to pairs, in any framework. Hashable."""

    def start(self, like: Array) -> Any:
        """The first state, P = I, for vectors as `like`."""

    def moved(self, state: Any, v: Array, h: Array, rate: Array | float, key: Array) -> Any:
        """The state after one pair."""

    def inverse(self, state: Any) -> Array:
        """P."""


@dataclass(frozen=True)
class Fitted:
    """The preconditioner that the method of the valley has, by itself and without damping."""

    kind: Kronecker

    def start(self, like: Array) -> Factors:
        """Factors of the identity."""
        return self.kind.init(like)

    def moved(self, state: Factors, v: Array, h: Array, rate: Array | float, key: Array) -> Factors:
        """One fit."""
        draws = noise.Counter(key)
        pair = criterion.newton(v, h, draws.normal("damping", h.shape, h), 0.0)
        return self.kind.fit(state, pair, rate, MEMORY, draws)

    def inverse(self, state: Factors) -> Array:
        """P, the preconditioned identity."""
        q = state.Q[0]
        return self.kind.precondition(state, identity(q, q.shape[0]))


@dataclass(frozen=True)
class Textbook:
    """BFGS: the inverse update of P on (v, h), h negated where v'h < 0."""

    def start(self, like: Array) -> Array:
        """The identity."""
        return identity(like, like.shape[0])

    def moved(self, state: Array, v: Array, h: Array, rate: Array | float, key: Array) -> Array:
        """P <- (I - v h' / v'h) P (I - h v' / v'h) + v v' / v'h, neither of the last two arguments being used."""
        xp, curvature = namespace(v), v @ h
        h, curvature = xp.where(curvature < 0, -h, h), xp.abs(curvature)
        turn = self.start(v) - v[:, None] * h / curvature
        return turn @ state @ turn.mT + v[:, None] * v / curvature

    def inverse(self, state: Array) -> Array:
        """P is the state."""
        return state


def learners() -> dict[str, Learner]:
    """Every geometry, and BFGS."""
    bound, dense = TraceBound(), DenseRule(max_skew=inf)
    return {name: Fitted(Kronecker(g, dense, bound)) for name, g in GEOMETRIES.items()} | {BFGS: Textbook()}


def error(p: Array, h: Array) -> Array:
    """||P H' - I||_F."""
    return namespace(p).linalg.vector_norm(p @ h - identity(p, p.shape[0]))


def eager(learner: Learner, panel: Panel, convert: Callable[[np.ndarray], Array] = np.asarray) -> np.ndarray:
    """Errors at the marks, step by step: in NumPy, or in the framework that `convert` leads to."""
    vs, hs, hessians = map(convert, (panel.vs, panel.hs, panel.hessians.copy()))
    state, errors = learner.start(vs[0]), []
    for (begin, end), h in zip(pairwise([0, *panel.marks.tolist()]), hessians, strict=True):
        for t in range(begin, end):
            state = learner.moved(state, vs[t], hs[t], panel.rate, convert(noise.key(np, 0, t + 1)))
        errors.append(float(error(learner.inverse(state), h)))
    return np.asarray(errors)


@partial(jax.jit, static_argnums=0)
def _scanned(learner: Learner, rate: Array, vs: Array, hs: Array, marks: Array, hessians: Array) -> Array:
    def step(t: Array, state: Any) -> Any:
        return learner.moved(state, vs[t], hs[t], rate, noise.key(jnp, 0, t + 1))

    def to_mark(carry: Any, mark: Any) -> Any:
        begin, state = carry
        end, h = mark
        state = lax.fori_loop(begin, end, step, state)
        return (end, state), error(learner.inverse(state), h)

    return lax.scan(to_mark, (jnp.zeros_like(marks[0]), learner.start(vs[0])), (marks, hessians))[1]


def scanned(learner: Learner, panel: Panel) -> np.ndarray:
    """The same in one compiled call of JAX, which serves all panels of one length."""
    with jax.enable_x64(True):
        arrays = panel.rate, panel.vs, panel.hs, panel.marks.astype(np.int32), panel.hessians
        return np.asarray(_scanned(learner, *map(jnp.asarray, arrays)))


def fits(setup: Setup, progress: Console) -> list[dict[str, Any]]:
    """A row for each panel, learner and framework."""
    rows = []
    for panel in panels(setup):
        short = panel.until(setup.shown)
        for name, learner in learners().items():
            progress.log(f"{panel.title}: {name}")
            with torch.no_grad():
                shown = eager(learner, short, torch.from_numpy)
            for framework, part, errors in (("torch", short, shown), ("jax", panel, scanned(learner, panel))):
                curve = {"marks": part.marks.tolist(), "errors": errors.tolist()}
                rows.append(
                    {"panel": panel.title, "method": name, "framework": framework, "reported": panel.reported, **curve}
                )
    return rows


# ---- the program ----------------------------------------------------------------------
def measure(setup: Setup, progress: Console) -> dict[str, Any]:
    """All figures, as plain data."""
    return {
        "machine": machine(),
        "setup": asdict(setup),
        "rosenbrock": valley(setup, progress),
        "fitting": fits(setup, progress),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.experiments", description="Valleys and Hessians."
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the fits here, as a PNG")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/benchmarks.md has them")

    def measured(console: Console, *, quick: bool) -> dict[str, Any]:
        return measure(QUICK if quick else Setup(), console)

    tables_and_picture(parser, measured, tables, picture, 110, arguments)


if __name__ == "__main__":
    main()
