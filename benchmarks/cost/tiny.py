"""What a step of a tiny Newton problem costs, beside the same equations as bare PyTorch calls: what is not arithmetic.

    python -m benchmarks.cost.tiny [--json FILE] [--markdown] [--quick]

Two numbers in Rosenbrock's valley, by the dense Newton method with its defaults and in a geometry that does not rotate.
*Bare* is the default written out for this case alone, with PyTorch's generator for noise and without anything that an
optimizer checks, keeps or can be told. psgd-torch's `Newton`, of its release on the package index, takes part where it
is installed. Everyone runs in alternated rounds, by processor time; a ratio to *bare* is the median over rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from time import process_time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import psgd_torch_backend
from benchmarks.racing import turns
from benchmarks.tables import Cells, machine, one_table
from psgd.geometry import GEOMETRIES
from psgd.hyperparameters import Method
from psgd.kron import Kronecker
from psgd.methods import METHODS

Closure = Callable[[], Tensor]
Step = Callable[[Closure], Any]
BARE = "bare"


def lower_bound(a: Tensor) -> Tensor:
    """Of the norm of a skew-symmetric matrix, by four products of 32 probes."""
    scale = a.abs().max()
    a = a / (scale + 1e-38)
    longest = a[a.norm(dim=1).argmax()]
    probes = torch.randn(32, len(a))
    v = longest + torch.sgn(probes @ longest)[:, None] * probes
    for _ in range(3):
        v = v @ a
        v = v / (v.norm(dim=1, keepdim=True) + 1e-38)
    return scale * (v @ a).norm(dim=1).max()


def rotated(q: Tensor) -> Tensor:
    """A step of q towards its polar factor."""
    r = q.T - q
    r = r / (lower_bound(r) + 1e-38)
    rq = r @ q
    rrq = r @ rq
    t1, t2 = torch.trace(rq), torch.trace(rrq)
    a = torch.where(t2 < 0, torch.clamp(-t1 / t2, max=0.125), 0.125)
    return q + a * (rq + a / 2 * rrq)


class Bare:
    """Dense Newton in the geometry Q0.5EQ1.5, of one parameter."""

    def __init__(self, p: Tensor, rate: float = 0.1, damping: float = 1e-9) -> None:
        self.p, self.rate, self.damping = p, rate, damping
        self.q, self.bound = torch.eye(p.numel()), torch.zeros(())
        self.begun = False

    def step(self, closure: Closure) -> Tensor:
        """One step."""
        loss = closure()
        (g,) = torch.autograd.grad(loss, self.p, create_graph=True)
        v = torch.randn_like(self.p)
        (h,) = torch.autograd.grad(g, self.p, v)
        with torch.no_grad():
            if not self.begun:
                self.q, self.begun = self.q * (v * v).mean() ** 0.25 * (h**4).mean() ** -0.125, True
            h = h + (self.damping + 1.2e-7 * h.abs()) * torch.randn_like(h)
            q = self.q
            a = q.T @ (q @ h)
            ell = (a * a + v * v).sum()
            self.bound = torch.maximum(0.9 * self.bound + 0.1 * ell, ell)
            q = q - self.rate / self.bound * (torch.outer(a, a @ q) - torch.outer(v, v @ q))
            self.q = rotated(q)
            self.p.sub_(self.q.T @ (self.q @ g))
        return loss


def valley(x: Tensor) -> Tensor:
    """Rosenbrock's."""
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def of_one_matrix() -> type[Method]:
    """The registered method that fits all parameters as one vector, by a dense factor."""
    recipes = {method: method().recipe() for method in METHODS.values()}
    return next(m for m, r in recipes.items() if r.joint and r.newton and isinstance(r.preconditioner, Kronecker))


def steps() -> dict[str, Callable[[Tensor], Step]]:
    """Who takes part: a parameter -> its step."""
    method = of_one_matrix()
    optimizer_class = getattr(psgd_torch_backend, method.title)
    still = next(name for name, g in GEOMETRIES.items() if g.turn is None)
    ours: dict[str, Callable[[Tensor], Step]] = {
        f"{method.title}, {dQ}": lambda p, dQ=dQ: optimizer_class([p], lr=1.0, dQ=dQ).step  # type: ignore[misc]
        for dQ in (method().dQ, still)  # type: ignore[attr-defined]
    }
    try:
        newton = import_module("psgd_torch.psgd").Newton
    except ImportError:
        return {BARE: lambda p: Bare(p).step, **ours}
    return {BARE: lambda p: Bare(p).step, **ours, "psgd-torch Newton": lambda p: newton([p], lr_params=1.0).step}


def runner(make: Callable[[Tensor], Step]) -> Callable[[], Any]:
    """A step from the start of the valley, again and again."""
    p = torch.tensor([-1.0, 1.0], requires_grad=True)
    return partial(make(p), lambda: valley(p))


def milliseconds(run: Callable[[], Any], count: int) -> float:
    """Processor time of a step."""
    start = process_time()
    for _ in range(count):
        run()
    return 1e3 * (process_time() - start) / count


def measure(console: Console, *, quick: bool) -> dict[str, Any]:
    """All figures, as plain data."""
    rounds, count = (2, 2) if quick else (15, 100)
    console.log(f"{rounds} rounds of {count} steps")
    runs = {name: runner(make) for name, make in steps().items()}
    for run in runs.values():
        milliseconds(run, count)
    seconds = {name: np.zeros(rounds) for name in runs}
    for i in range(rounds):
        for name in turns(list(runs), i):
            seconds[name][i] = milliseconds(runs[name], count)
    rows = [
        {"who": name, "ms": float(np.median(x)), "ratio": float(np.median(x / seconds[BARE]))}
        for name, x in seconds.items()
    ]
    return {"machine": machine(), "rows": rows}


def cells(result: Mapping[str, Any]) -> Cells:
    """A row for each."""
    return [
        ["who", "a step", "over bare"],
        *([r["who"], f"{r['ms']:.2f} ms", f"{r['ratio']:.2f}"] for r in result["rows"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    title = "A step of two numbers"
    one_table("tiny", "Time a step of a tiny problem.", measure, lambda r: (title, cells(r)), 80, arguments)


if __name__ == "__main__":
    main()
