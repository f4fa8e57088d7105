"""How a fault is planted in a function, and who may notice it."""

from __future__ import annotations
import __future__

import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import patch

import numpy as np

from conformance.compare import compare
from conformance.drivers.in_jax import jax_alias, jax_derivatives, jax_optimizer
from conformance.drivers.in_torch import torch_class
from conformance.frameworks import FRAMEWORKS
from conformance.internal import golden
from conformance.internal.golden_cases import Case
from conformance.problems import PROBLEMS, Problem
from psgd import (
    noise,
)
from psgd._xp import namespace
from psgd.methods import METHODS

FOLDER = Path(__file__).with_name("golden")
NOISE, GOLDEN, LOCKED = "noise", "golden", "locked"  # the catchers, in their order


PARTS = ("__code__", "__defaults__", "__kwdefaults__")


# ---- planting ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    """`place` has `old` exactly once in its source; planted, it has `new` there. catcher: the kind that must notice."""

    name: str
    place: Callable[..., Any]
    old: str
    new: str
    catcher: str

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The fault is in the code inside this block.

        Raises ValueError where the source has changed so that the fault no longer fits.
        """
        place, broken = _function(self.place), self._compiled()
        kept = {part: getattr(place, part) for part in PARTS}
        try:
            for part in PARTS:
                setattr(place, part, getattr(broken, part))
            _forget(place)
            yield
        finally:
            for part, value in kept.items():
                setattr(place, part, value)
            _forget(place)

    def _compiled(self) -> FunctionType:
        place = _function(self.place)
        source = textwrap.dedent(inspect.getsource(place))
        if source.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {place.__qualname__} has {self.old!r} {source.count(self.old)} times, not once; "
                "its source has changed, so adapt the fault"
            )
        flags = __future__.annotations.compiler_flag
        code = compile(source.replace(self.old, self.new), f"<fault: {self.name}>", "exec", flags, dont_inherit=True)
        scope: dict[str, Any] = {}
        exec(code, place.__globals__, scope)
        return _function(scope[place.__name__])


def _forget(place: FunctionType) -> None:
    """Drop what was made by the code as it was: the optimizers and programs that drivers keep, and what catchers of
    the core alone saw, unless the place is in an adapter, whose code they do not run."""
    for kept in (torch_class, jax_alias, jax_optimizer, jax_derivatives):
        kept.cache_clear()
    if place.__module__.split(".")[0] == "psgd":
        for catcher in (_noise_differs, _golden_differs):
            catcher.cache_clear()


def _function(place: Any) -> FunctionType:
    """The plain function; of a bound or static method too."""
    function = getattr(place, "__func__", place)
    if not isinstance(function, FunctionType):
        raise TypeError(f"{place!r} has no source to plant a fault in; name a function")
    return function


# ---- the catchers --------------------------------------------------------------------------
KNOWN_WORDS = (
    # (seed, step, role, first words)
    (0, 1, "damping", (999448133, -763036171, 214457285, -1272501743)),
    (4294967295, 1000000, "bound/1", (-232965903, 1818904196, 2073269657, 1543208181)),
)


@cache
def _noise_differs() -> str | None:
    """Recorded words of the noise."""
    for seed, step, role, expected in KNOWN_WORDS:
        got = noise.words(noise.key(np, seed, step), noise.role_number(role), len(expected))
        if got.tolist() != list(expected):
            return f"words of {role!r}, seed {seed}, step {step}"
        if noise.host_key(seed, step) != noise.key(np, seed, step)[0]:
            return f"key on the host, seed {seed}, step {step}"
    return None


@cache
def _cases() -> tuple[Case, ...]:
    """Recorded runs, the shortest first."""
    return tuple(sorted(golden.cases(FOLDER), key=lambda case: (FOLDER / case["file"]).stat().st_size))


@cache
def _golden_differs() -> str | None:
    """Recorded runs, in NumPy."""
    for case in _cases():
        try:
            result = golden.replay(case, FOLDER, FRAMEWORKS["numpy"])
        except (ValueError, IndexError) as error:  # other shapes, more draws than were recorded
            return f"{case['file'].removesuffix('.npz')}: {error}"
        if not result.passed:
            return f"{result.case}, {result.where} off by {result.error:.0e}"
    return None


def _tiny_init(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes_of = {"bias": (3,), "b": (3, 3), "a": (3, 3), "stack": (2, 3, 3)}
    # Small, so that the hyperbolic tangents stay away from their ends, where gradients are differences of ones.
    return {name: random.standard_normal(shape) / 8 for name, shape in shapes_of.items()}


def _tiny_batch(seed: int, step: int) -> dict[str, np.ndarray]:
    # The gradients of the second tensor are larger, so that the first tensor does not set the first scale.
    return {"weight": np.random.default_rng([seed, step]).standard_normal(3) * 3}


def _tiny_loss(params: Any, batch: Any) -> Any:
    xp = namespace(params["a"])
    rows = xp.tanh(params["a"]) @ batch["weight"] + params["b"] @ (batch["weight"] ** 2)
    for layer in range(2):
        rows = xp.tanh(params["stack"][layer, ...] @ rows)
    return xp.sum((rows + params["bias"]) ** 2)


TINY = Problem(
    name="tiny",
    summary="Two matrices of one shape, which step together, a vector, and a stack of two matrices.",
    init=_tiny_init,
    batch=_tiny_batch,
    loss=_tiny_loss,
    lr=0.01,
    chaotic=True,
    scanned=frozenset(["stack"]),
)
OFTEN = {"preconditioner_update_probability": 0.5}  # of methods that have it: some steps fit, some do not


def _locked_differs() -> str | None:
    """Steps of each method in both adapters and in the core alone, each from the reference's state."""
    with patch.dict(PROBLEMS, {TINY.name: TINY}):
        # JAX operation by operation: a compiled step would have to be compiled again for each fault.
        for drivers in (("torch", "numpy"), ("torch", "jax-eager")):
            for method in METHODS:
                known = {f.name for f in fields(METHODS[method])}
                often: dict[str, Any] = {name: value for name, value in OFTEN.items() if name in known}
                (pair,) = compare(method, TINY.name, steps=4, locked=True, drivers=drivers, **often).pairs
                if not pair.passed:
                    return f"{method}, {pair.a} and {pair.b} apart at step {pair.first_step_over}"
    return None


CATCHERS: dict[str, Callable[[], str | None]] = {
    NOISE: _noise_differs,
    GOLDEN: _golden_differs,
    LOCKED: _locked_differs,
}


def caught() -> tuple[str, str] | None:
    """The first catcher that notices anything, and what it noticed; None where all is well."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # broken code overflows
        for kind, catcher in CATCHERS.items():
            noticed = catcher()
            if noticed is not None:
                return kind, noticed
    return None
