"""What is timed: a function that does one step of many equal layers, for each method and framework in variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import jax
import numpy as np
import optax
import torch

import psgd_jax_backend
import psgd_torch_backend
from psgd.hyperparameters import Method
from psgd.methods import METHODS

Run = Callable[[], None]  # one step
# Methods that whiten each layer by itself: what can step forty layers, given gradients alone.
LAYERWISE = {name: m for name, m in METHODS.items() if not (m().recipe().joint or m().recipe().newton)}
POOL = 8  # sets of gradients that are used in turn: a single one would be whitened to nothing


@dataclass(frozen=True)
class Layers:
    """`count` matrices of (size, size), float32."""

    count: int = 40
    size: int = 64

    def gradients(self) -> np.ndarray:
        """(POOL, count, size, size), of modest condition: every row and column has its own scale."""
        random = np.random.default_rng(0)
        rows, columns = np.exp(random.uniform(-1, 1, (2, self.size)))
        noise = random.standard_normal((POOL, self.count, self.size, self.size))
        return (rows[:, None] * noise * columns).astype(np.float32)


@dataclass(frozen=True)
class StepVariant:
    """One variant of a step. `start` makes the function that does it; the first call of that compiles what is compiled.

    slow_to_start: its compiler takes many seconds.
    """

    framework: str
    name: str
    start: Callable[[Layers], Run]
    slow_to_start: bool = False


def torch_run(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], layers: Layers) -> Run:
    """One step of a PyTorch optimizer, gradients given."""
    params = [torch.nn.Parameter(torch.zeros(layers.size, layers.size)) for _ in range(layers.count)]
    optimizer = make(params)
    pool = cycle([list(torch.from_numpy(g).unbind()) for g in layers.gradients()])

    def run() -> None:
        for p, g in zip(params, next(pool), strict=True):
            p.grad = g
        optimizer.step()

    return run


def jax_step(transform: optax.GradientTransformationExtraArgs) -> Any:
    """A jitted step, (gradients, state, params) -> (params, state), that may reuse the memory of state and params."""

    @partial(jax.jit, donate_argnums=(1, 2))
    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def jax_arguments(transform: optax.GradientTransformationExtraArgs, layers: Layers) -> tuple[Any, Any, Any]:
    """Sets of gradients to use in turn, first state, first params."""
    names = [f"w{i}" for i in range(layers.count)]
    pool = [dict(zip(names, map(jax.numpy.asarray, g), strict=True)) for g in layers.gradients()]
    params = {name: jax.numpy.zeros((layers.size, layers.size)) for name in names}
    return pool, transform.init(params), params


def jax_run(transform: optax.GradientTransformationExtraArgs, layers: Layers) -> Run:
    """One step of an optax transformation under `jax.jit`, gradients given; waits for the result."""
    step = jax_step(transform)
    pool, state, params = jax_arguments(transform, layers)
    turns: Iterator[Any] = cycle(pool)

    def run() -> None:
        nonlocal state, params
        params, state = jax.block_until_ready(step(next(turns), state, params))

    return run


def step_variants(method: type[Method]) -> list[StepVariant]:
    """The variants of a method's step; of each framework, the plainest first."""
    torch_class = getattr(psgd_torch_backend, method.title)
    jax_alias = getattr(psgd_jax_backend, method.name)

    def in_torch(variant: str, *, compile: bool | str = False, **flags: bool) -> StepVariant:
        make = partial(torch_class, compile=compile, **flags)
        return StepVariant("torch", variant, partial(torch_run, make), slow_to_start=bool(compile))

    def in_jax(variant: str, **flags: bool) -> StepVariant:
        return StepVariant("jax", variant, partial(jax_run, jax_alias(**flags)))

    return [
        in_torch("one tensor at a time", stack=False),
        in_torch("stacked", stack=True),
        in_torch("stacked, compiled", stack=True, compile="full"),
        StepVariant("torch", "AdamW, for scale", partial(torch_run, torch.optim.AdamW)),
        in_jax("jitted, one leaf at a time", stack=False),
        in_jax("jitted, stacked", stack=True),
    ]
