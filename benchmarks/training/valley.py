"""Dense Newton methods in Rosenbrock's valley, in both frameworks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import lax
from rich.console import Console

import psgd_jax_backend
import psgd_torch_backend
from benchmarks.training.experiments_figures import REACHED
from psgd import pipeline
from psgd.arrays import Array
from psgd.geometry import GEOMETRIES
from psgd.hyperparameters import Method
from psgd.kron import Kronecker
from psgd.methods import METHODS
from psgd_jax_backend import hessian

AGREED = 1e-8  # a relative difference that counts as none
RATE = 1.0  # learning rate in the valley
MEMORY = 0.9  # beta_L of the fits


@dataclass(frozen=True)
class Setup:
    """How much is run. fits, drifts: steps of the fits to a fixed and to a drifting Hessian; shown: those of torch,
    whose eager steps are slow, and of the picture."""

    dimensions: int = 100
    valley_steps: int = 2_000
    seeds: int = 5
    size: int = 20
    fits: int = 30_000
    drifts: int = 10_000
    shown: int = 3_000
    marks: int = 90


QUICK = Setup(dimensions=6, valley_steps=12, seeds=2, size=4, fits=30, drifts=20, shown=10, marks=8)


# ---- Rosenbrock's valley ---------------------------------------------------------------
def rosenbrock(x: Array) -> Array:
    """sum 100 (x[1::2] - x[0::2]^2)^2 + (1 - x[0::2])^2."""
    even, odd = x[0::2], x[1::2]
    return (100 * (odd - even**2) ** 2 + (1 - even) ** 2).sum()


def of_all_parameters() -> type[Method]:
    """The method that fits one matrix to Hessian-vector products of all parameters."""

    def fits(method: type[Method]) -> bool:
        recipe = method().recipe()
        return recipe.joint and recipe.newton and isinstance(recipe.preconditioner, Kronecker)

    (found,) = filter(fits, METHODS.values())
    return found


def settings(geometry: str, seed: Any) -> dict[str, Any]:
    """The hyperparameters in the valley beside its learning rate. `seed` may be traced."""
    return {"dQ": geometry, "lr_preconditioner": 0.5, "momentum": 0.9, "seed": seed}


def torch_walk(geometry: str, seed: int, setup: Setup) -> np.ndarray:
    """The loss after each step."""
    x = torch.nn.Parameter(torch.zeros(setup.dimensions, dtype=torch.float64))
    optimizer = getattr(psgd_torch_backend, of_all_parameters().title)([x], RATE, **settings(geometry, seed))
    before = [optimizer.step(lambda: rosenbrock(x)).detach() for _ in range(setup.valley_steps)]
    return torch.stack([*before[1:], rosenbrock(x).detach()]).numpy()


def jax_walk(geometry: str, setup: Setup) -> Callable[[int], np.ndarray]:
    """The same as a function of the seed, compiled once for all of them."""
    method = of_all_parameters()

    @jax.jit
    def run(seed: Array) -> Array:
        options = settings(geometry, seed)
        transform, schedule = getattr(psgd_jax_backend, method.name)(RATE, **options), method.of(**options).schedule()

        def step(carry: Any, t: Array) -> Any:
            x, state = carry
            v = hessian.vector(pipeline.plan(schedule, t, jnp).key, x)
            _, g, h = hessian.product(rosenbrock, x, v)
            updates, state = transform.update(g, state, x, Hvp=h, vector=v, update_preconditioner=True)
            x = optax.apply_updates(x, updates)
            return (x, state), rosenbrock(x)

        x = jnp.zeros(setup.dimensions)
        return lax.scan(step, (x, transform.init(x)), jnp.arange(1, setup.valley_steps + 1, dtype=jnp.int32))[1]

    return lambda seed: np.asarray(run(jnp.asarray(seed, dtype=jnp.int32)))


def first(true: np.ndarray) -> int | None:
    """The number, from 1, of the first step that is true."""
    return int(np.argmax(true)) + 1 if true.any() else None


def agreement(a: np.ndarray, b: np.ndarray) -> int:
    """The last step until which two curves are the same."""
    return (first(~(np.abs(a - b) <= AGREED * np.abs(b))) or len(a) + 1) - 1


def valley(setup: Setup, progress: Console) -> list[dict[str, Any]]:
    """A row for each geometry and framework, with one figure for each seed."""
    rows = []
    for geometry in GEOMETRIES:
        progress.log(f"Rosenbrock: {geometry}")
        with jax.enable_x64(True):
            ours = list(map(jax_walk(geometry, setup), range(setup.seeds)))
        losses = {"torch": [torch_walk(geometry, seed, setup) for seed in range(setup.seeds)], "jax": ours}
        agreed = [agreement(*pair) for pair in zip(*losses.values(), strict=True)]
        for framework, curves in losses.items():
            finals = [float(curve[-1]) for curve in curves]
            reached = [first(curve < REACHED) for curve in curves]
            row = {"geometry": geometry, "framework": framework, "finals": finals, "reached": reached, "agreed": agreed}
            rows.append(row)
    return rows
