"""The parameters whose steps are timed, by the names that the command gives them, and gradients for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterSet:
    """Parameters by their shapes. rounds: of a race; pool: sets of gradients that are used in turn, as a single one
    would be whitened to nothing.
    """

    name: str
    shapes: tuple[Shape, ...]
    about: str
    rounds: int = 11
    pool: int = 8

    @property
    def numbers(self) -> int:
        """How many numbers the parameters have."""
        return sum(map(prod, self.shapes))

    def tiny(self) -> ParameterSet:
        """The same kinds of tensors, small and few: does it run?"""
        shapes = dict.fromkeys(tuple(min(n, 8) for n in shape) for shape in self.shapes)
        twice = tuple(shape for shape in list(shapes)[:4] for _ in range(2))
        return replace(self, shapes=twice, rounds=3, pool=2)

    def write_gradients(self, path: Path) -> None:
        """A file of (pool, numbers), float32, of modest condition: every index of every axis has its own scale."""
        random = np.random.default_rng(0)
        out = np.lib.format.open_memmap(path, "w+", np.float32, (self.pool, self.numbers))
        start = 0
        for shape in self.shapes:
            noise = random.standard_normal((self.pool, *shape), dtype=np.float32)
            for scale in np.ix_(*(np.exp(random.uniform(-1, 1, n)).astype(np.float32) for n in shape)):
                noise *= scale
            stop = start + prod(shape)
            out[:, start:stop] = noise.reshape(self.pool, -1)
            start = stop
        out.flush()


@dataclass(frozen=True)
class GPT:
    """The parameters of a GPT, the embedding tied to the head."""

    layers: int = 4
    width: int = 256
    vocabulary: int = 8192
    context: int = 256

    def shapes(self) -> tuple[Shape, ...]:
        """Of every parameter: matrices as (to, from), each with a bias; norms with weight and bias."""
        d = self.width
        norm, products = [(d,), (d,)], [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
        block = [*norm, *norm, *(shape for to, by in products for shape in ((to, by), (to,)))]
        return ((self.vocabulary, d), (self.context, d), *(block * self.layers), *norm)

    def training_flops(self, tokens: int) -> int:
        """Floating-point operations of forward and backward: 6 for each parameter and token, and attention, whose two
        products of a head's (context, context) scores are made once forwards and twice backwards.
        """
        attention = 12 * self.layers * self.width * self.context
        return tokens * (6 * sum(map(prod, self.shapes())) + attention)


def resnet(blocks: Sequence[int] = (2, 2, 2, 2), width: int = 64, classes: int = 1000) -> tuple[Shape, ...]:
    """Of a residual network of two-convolution blocks: kernels as (to, from, 3, 3), each with a norm's two vectors."""
    shapes: list[Shape] = [(width, 3, 7, 7), (width,), (width,)]
    before = width
    for stage, count in enumerate(blocks):
        to = width << stage
        for block in range(count):
            shapes += [(to, before, 3, 3), (to,), (to,), (to, to, 3, 3), (to,), (to,)]
            if block == 0 and before != to:
                shapes += [(to, before, 1, 1), (to,), (to,)]
            before = to
    return (*shapes, (classes, before), (classes,))


SMALL = ((16, 16), (32, 16), (16, 32), (32, 32), (64, 32), (32, 64), (64, 64), (16,), (32,), (64,))
GPTS = {"gpt-4x256": GPT(), "gpt-12x768": GPT(12, 768, 50257, 1024)}
SETS: Mapping[str, ParameterSet] = MappingProxyType(
    {
        made.name: made
        for made in (
            ParameterSet("gpt-4x256", GPTS["gpt-4x256"].shapes(), "GPT of 4 layers, width 256"),
            ParameterSet("gpt-12x768", GPTS["gpt-12x768"].shapes(), "GPT of 12 layers, width 768", rounds=3, pool=2),
            ParameterSet("resnet-18", resnet(), "residual network of 18 layers", rounds=5, pool=2),
            ParameterSet("400-small", SMALL * 40, "400 tensors of at most 64 x 64", rounds=21),
            ParameterSet("embedding", ((50_000, 512),), "one embedding of 50,000 x 512", rounds=7, pool=2),
        )
    }
)


def alike(shapes: Sequence[Shape]) -> Mapping[Shape, int]:
    """How many tensors there are of each shape, which are stepped together."""
    return Counter(shapes)
