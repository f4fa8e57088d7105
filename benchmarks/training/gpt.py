"""A small GPT in plain PyTorch, and the source of Python's own library to train it on, character by character."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

CHARACTERS = 97  # ASCII from the space on, and the end of a line; others share these
HELD = 10  # every tenth file is for validation


class Attention(nn.Module):
    """Of each character to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) as well."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then a perceptron of its own for each place; both are added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width, bias=False), Attention(width, heads)
        self.between, self.up = nn.LayerNorm(width, bias=False), nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) as well."""
        x = x + self.attention(self.before(x))
        return x + self.down(functional.gelu(self.up(self.between(x))))


@dataclass(frozen=True)
class Size:
    """Of a GPT and of its batches."""

    layers: int = 4
    width: int = 80
    heads: int = 4
    context: int = 64
    batch: int = 40
    held: int = 256  # windows of validation


class GPT(nn.Module):
    """Logits of the next character."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.embedding, self.position = nn.Embedding(CHARACTERS, width), nn.Embedding(size.context, width)
        self.blocks = nn.Sequential(*(Block(width, size.heads) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, CHARACTERS, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:  # what is added to the stream is smaller the more layers there are
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * size.layers) ** 0.5 if added else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Of characters, (batch, context), with the logits' axis second, as `cross_entropy` has it."""
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position.weight))).mT


# ---- its text --------------------------------------------------------------------------
def files() -> list[Path]:
    """The modules of Python's own library that are one file, by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(folder.glob("*.py")) if path.stem in sys.stdlib_module_names]


@lru_cache
def text(*, held: bool) -> Tensor:
    """The characters to train on or to validate with, as whole numbers below `CHARACTERS`."""
    chosen = [path for i, path in enumerate(files()) if (i % HELD == HELD - 1) == held]
    whole = "".join(path.read_text(encoding="utf-8") for path in chosen)
    codes = np.frombuffer(whole.encode("ascii", "replace"), dtype=np.uint8).astype(np.int64)
    return torch.from_numpy(np.where(codes == ord("\n"), 0, (codes - 31) % CHARACTERS))


def windows(of: Tensor, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """Characters and those that follow."""
    cut = of[torch.from_numpy(starts)[:, None] + torch.arange(context + 1)]
    return cut[:, :-1], cut[:, 1:]


def batch(random: np.random.Generator, size: Size) -> tuple[Tensor, Tensor]:
    """Windows to train on, drawn anywhere."""
    characters = text(held=False)
    return windows(characters, random.integers(len(characters) - size.context, size=size.batch), size.context)


def validation(size: Size) -> tuple[Tensor, Tensor]:
    """Windows at even distances over all that is held out."""
    characters = text(held=True)
    return windows(characters, np.linspace(0, len(characters) - size.context - 1, size.held).astype(int), size.context)
