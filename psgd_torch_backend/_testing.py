"""What the tests of the PyTorch optimizers share: methods by kind, parameters, steps, comparisons."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import inf, nan
from typing import Any

import torch
from torch import Tensor, nn

import psgd_torch_backend
from psgd.methods import METHODS
from psgd_torch_backend import PSGD

CLASSES = {name: getattr(psgd_torch_backend, made.title) for name, made in METHODS.items()}
RECIPES = {name: made().recipe() for name, made in METHODS.items()}
WHOLE = {name: made for name, made in CLASSES.items() if RECIPES[name].joint}
OF_TENSORS = {name: made for name, made in CLASSES.items() if not RECIPES[name].joint}


def newton(optimizer_class: type[PSGD]) -> bool:
    return RECIPES[optimizer_class.method.name].newton


def of_rank(optimizer_class: type[PSGD], rank: int) -> dict[str, int]:
    """The option of the low-rank methods that makes them fit to few numbers."""
    return {f.name: rank for f in fields(optimizer_class.method) if f.name.endswith("rank_of_approximation")}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


SHAPES = ((4, 3), (4, 3), (5,), (), (4, 3))


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients that depend on the step and the parameter's values alone."""
    for p in params:
        p.grad = 0.3 * p.detach() + normal(*p.shape, seed=100 + step, dtype=p.dtype)


def descend(optimizer: PSGD, loss: Callable[[], Tensor]) -> None:
    """One step, in the way of the method: with a closure that returns the loss, or after its backward()."""
    if newton(type(optimizer)):
        optimizer.step(loss)
        return
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def run(optimizer: PSGD, params: list[nn.Parameter], steps: range) -> list[nn.Parameter]:
    """Steps with the gradients of `give_gradients`, by a loss that has them where the method wants one."""
    for t in steps:
        noises = [normal(*p.shape, seed=100 + t, dtype=p.dtype) for p in params]
        if newton(type(optimizer)):
            optimizer.step(
                lambda noises=noises: sum(
                    0.15 * (p.abs() ** 2).sum() + (p * g.conj()).real.sum() for p, g in zip(params, noises, strict=True)
                )
            )
        else:
            give_gradients(params, t)
            optimizer.step()
    return params


def step(optimizer: PSGD) -> None:
    """One step with the gradients there are; where the method wants them, with products of a Hessian of 0.3."""
    if not newton(type(optimizer)):
        optimizer.step()
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    # An even function of the gradients, of each entry.
    vectors = [torch.cos(torch.zeros_like(p) if p.grad is None else p.grad).contiguous() for p in params]
    optimizer.step(Hvp=[0.3 * v for v in vectors], vector=vectors, update_preconditioner=True)


def equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def close(ours: list[nn.Parameter], theirs: list[nn.Parameter], ulps: float = 16) -> None:
    for p, q in zip(ours, theirs, strict=True):
        p, q = p.detach(), q.detach()
        if not p.is_floating_point():
            assert torch.equal(p, q)
            continue
        assert (p - q).abs().max() <= ulps * torch.finfo(p.dtype).eps * q.abs().max()


def flat(entry: dict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a nested state by their paths."""
    out: dict[str, Tensor] = {}
    for key, value in entry.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


class Bars(nn.Module):
    """Is the bright bar of a noisy picture upright?"""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 16, 2)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(normal(*p.shape, seed=i) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))

    @staticmethod
    def batch(seed: int, n: int = 64) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = 0.5 * torch.randn(n, 1, 6, 6, generator=generator)
        upright, place = torch.randint(2, (n,), generator=generator), torch.randint(6, (n,), generator=generator)
        for i in range(n):
            x[i, 0].select(int(upright[i]), int(place[i])).add_(1)
        return x, upright

    def loss(self, seed: int) -> Tensor:
        x, y = self.batch(seed)
        return nn.functional.cross_entropy(self(x), y)


def assert_untouched(optimizer: PSGD, params: list[nn.Parameter], before: tuple) -> None:
    then, saved = before
    assert equal(params, then)
    now = optimizer.state_dict()
    assert now["param_groups"] == saved["param_groups"] and list(now["state"]) == list(saved["state"])
    ours, theirs = flat_all(now), flat_all(saved)
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def flat_all(state_dict: dict) -> dict[str, Tensor]:
    return flat({str(k): v for k, v in state_dict["state"].items()})


# ---- optimizers that things happen to ---------------------------------------------------------
NAMED = {"a": (4, 3), "b": (4, 3), "c": (5,), "d": ()}
OWN = ArithmeticError  # what functions of ours raise, which no optimizer does


def seen(x: Any) -> Any:
    """A thing as plain data that is equal where the thing is the same, bit by bit."""
    if isinstance(x, dict):
        return {id(k) if isinstance(k, Tensor) else k: seen(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [seen(v) for v in x]
    if isinstance(x, nn.Parameter):
        return id(x)
    if isinstance(x, Tensor) and x.layout == torch.strided:
        return x.dtype, tuple(x.shape), x.detach().contiguous().view(-1).view(torch.uint8).tolist()
    return repr(x) if isinstance(x, (float, Tensor)) else x


class Trial:
    """An optimizer of four named parameters in two groups, and what happens to it."""

    def __init__(self, made: type[PSGD], seed: int) -> None:
        self.made, self.random, self.refusals = made, random.Random(seed), 0
        named = list(zip(NAMED, parameters(*NAMED.values()), strict=True))
        groups = [{"params": named[:2]}, {"params": named[2:], "momentum": 0.5}]
        self.optimizer = made(groups, lr=1e-3, **of_rank(made, 1))
        self.time = 0
        for _ in range(2):
            self.step()

    @property
    def params(self) -> list[nn.Parameter]:
        held = [group["params"] for group in self.optimizer.param_groups]
        return [p for params in held if isinstance(params, list) for p in params if isinstance(p, nn.Parameter)]

    def pick(self, *values: Any) -> Any:
        return self.random.choice(values)

    def group(self) -> dict[str, Any]:
        return self.pick(*self.optimizer.param_groups)

    def param(self) -> nn.Parameter:
        return self.pick(*self.params)

    def gradients(self) -> None:
        self.time += 1
        for p in self.params:
            p.grad = normal(*p.shape, seed=self.time, dtype=p.dtype)

    def go(self) -> None:
        """A step on the gradients there are."""
        if newton(self.made):
            vectors = [torch.ones_like(p) for p in self.params]
            self.optimizer.step(Hvp=[0.3 * v for v in vectors], vector=vectors, update_preconditioner=True)
        else:
            self.optimizer.step()

    def step(self) -> None:
        self.gradients()
        self.go()

    def everything(self) -> Any:
        values = [seen(p.detach()) for p in self.params]
        return values, seen(dict(self.optimizer.state)), seen(self.optimizer.param_groups)

    def attempt(self, call: Callable[[], Any], *, bad: bool | None = None) -> None:
        """A call that is bad, good, or either: it changes nothing where it is refused, in one sentence."""
        before = self.everything()
        try:
            call()
        except (ValueError, TypeError, RuntimeError, FloatingPointError, OWN) as error:
            assert bad is not False, error
            said = str(error)
            assert type(error) is OWN or (said and "\n" not in said and len(said) < 1200), said
            ours = (self.made.__name__, self.made.method.name, "some parameters", "loaded state dict")
            assert type(error) is OWN or said.startswith(ours), said
            assert self.everything() == before, said
            self.refusals += 1
        else:
            assert bad is not True
        assert all(p.isfinite().all() for p in self.params if p.is_floating_point())

    @contextmanager
    def edited(self, held: Any, key: Any, value: Any) -> Iterator[None]:
        """An entry is another for a while, and there are gradients; None of it stays."""
        self.gradients()
        missing = key not in held if isinstance(held, dict) else False
        old = None if missing else held[key]
        held[key] = value
        try:
            yield
        finally:
            if missing:
                del held[key]
            else:
                held[key] = old

    @contextmanager
    def without(self, held: dict[Any, Any], key: Any) -> Iterator[None]:
        self.gradients()
        before = dict(held)
        del held[key]
        try:
            yield
        finally:
            held.clear()
            held.update(before)


NO_RATE = (nan, inf, -1.0, "0.1", None, [0.1], 1j, True, torch.tensor([0.0, 1.0]), torch.tensor(nan), torch.ones(1, 2))
NO_ARGUMENT = {
    "maximize": (None, 1, "yes"),
    "stack": (0, None),
    "compile": ("yes", None, []),
    "scanned_layers": (5, ("nobody",), ["nobody"], (1,)),
    "stack_batch_size": (0, 2.0, True, "all"),
    "nonfinite": ("no", None, []),
    "max_skips": (0, None, 2.5),
}
