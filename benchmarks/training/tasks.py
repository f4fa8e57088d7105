"""What is trained: the record of a task, and the images of digits that two of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]  # inputs and targets


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and its data. held: the batch of validation.

    seeds: of weights and batches; losses are averaged over them. smoothing: of the targets, in training and validation.
    newton: are methods tried that need a closure?
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[np.random.Generator], Batch]
    held: Callable[[], Batch]
    seeds: int = 1
    smoothing: float = 0.0
    newton: bool = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The cross entropy of a batch."""
        return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=self.smoothing)


@dataclass(frozen=True, kw_only=True)
class LongTask(Task):
    """How long a task is trained. tried: steps while rates are tried. marks: how often a full run is validated."""

    steps: int
    tried: int
    marks: int = 20


# ---- images of digits --------------------------------------------------------------------
TRAINED = 1200  # images; the other 597 are held out


@lru_cache
def images() -> Batch:
    """All digits, 1 x 8 x 8 each, and what they are; in an order in which the last are like the others."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return torch.tensor(x[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y[order])


def some_images(random: np.random.Generator, count: int = 100) -> Batch:
    """A batch to train on."""
    chosen = torch.tensor(random.choice(TRAINED, count, replace=False))
    return images()[0][chosen], images()[1][chosen]


def held_images() -> Batch:
    """Those that are not trained on."""
    return images()[0][TRAINED:], images()[1][TRAINED:]
