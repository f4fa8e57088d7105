"""Who trains: the record of an optimizer with its settings, and a run of it on a task, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import psgd_torch_backend
from benchmarks.training.tasks import Batch, Task
from psgd.hyperparameters import Method

ADAMW = "AdamW"
Optimizers = Sequence[torch.optim.Optimizer]
LearningRates = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Unfit(Exception):
    """Says why an optimizer cannot be used."""


@dataclass(frozen=True)
class Trainer:
    """An optimizer with its settings. make: optimizers of a model, from rate, weight decay and number of steps.

    method: of ours; None of others. default: its learning rate where none is given. unfit: says why a model is not for
    it. foreign: its faults are not ours.
    """

    name: str
    make: Callable[[nn.Module, float, float, int], Optimizers]
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: type[Method] | None = None
    default: float = 1e-3
    unfit: Callable[[nn.Module], str | None] = lambda model: None
    foreign: bool = False

    @property
    def newton(self) -> bool:
        """Does it need a closure?"""
        return self.method is not None and self.method().recipe().newton

    @property
    def label(self) -> str:
        """The name, with its settings."""
        return self.name + "".join(f", {name}={value:g}" for name, value in self.settings.items())


def of_method(
    method: type[Method],
    settings: Callable[[int], Mapping[str, Any]],
    shown: Mapping[str, Any],
    unfit: Callable[[nn.Module], str | None] = lambda model: None,
) -> Trainer:
    """A registered method. settings: a function of the number of steps; shown: what is told of them."""

    def make(model: nn.Module, lr: float, weight_decay: float, steps: int) -> Optimizers:
        optimizer_class = getattr(psgd_torch_backend, method.title)
        return [optimizer_class(model.parameters(), lr=lr, weight_decay=weight_decay, **settings(steps))]

    return Trainer(method.title, make, shown, method, method().lr, unfit)


class Training:
    """A run that goes on step by step, from weights and on batches that depend on the seed alone."""

    def __init__(
        self,
        task: Task,
        trainer: Trainer,
        lr: float,
        weight_decay: float,
        steps: int,
        learning_rates: LearningRates,
        seed: int = 0,
    ) -> None:
        self.task, self.trainer, self.random = task, trainer, np.random.default_rng(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = task.model()
        if reason := trainer.unfit(self.model):
            raise Unfit(reason)
        try:
            self.optimizers = trainer.make(self.model, lr, weight_decay, steps)
        except ImportError as error:
            raise Unfit(f"{error.name} is not installed") from error
        self.schedules = list(map(learning_rates, self.optimizers))

    def loss(self, batch: Batch) -> Tensor:
        """Of any batch."""
        return self.task.loss(self.model, batch)

    def step(self) -> None:
        """One, with its batch."""
        batch = self.task.batch(self.random)
        if self.trainer.newton:
            (optimizer,) = self.optimizers
            closure: Any = partial(self.loss, batch)
            optimizer.step(closure)
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.loss(batch).backward()
            for optimizer in self.optimizers:
                optimizer.step()
        for schedule in self.schedules:
            schedule.step()

    def validation(self) -> float:
        """The loss of what is held out; infinite where it is none."""
        with torch.no_grad():
            value = self.loss(self.task.held()).item()
        return value if isfinite(value) else inf
